"""Texts to calibrate and measure on: sources of the Hub, splits that share nothing, and odd files."""

import gzip
import json
import random
import re

import pytest

from data import calibration_windows, load_text, stdlib
from data.command import InputError
from data.stream import evaluation_tokens
from data.text import documents, evaluation_ids, told
from test_eval import run_eval


class Words:
    """A tokenizer whose tokens are words."""
    encode = staticmethod(str.split)


def test_sources_of_the_hub(monkeypatch):
    """How the papers' scripts join the rows, on a Hub that answers with 2,000 numbers; would catch another column or
    separator, the text of another split, and more of C4 than its first 1,100 documents and 256 windows."""
    asked, rows = [], [str(i) for i in range(2000)]

    def load_dataset(path, *named, **options):
        asked.append((path, *named, options))
        return {"sentence" if path == "parquet" else "text": rows}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda path, file, repo_type, revision: (
        path, file, repo_type, revision))
    assert load_text("wikitext2", "test") == "\n\n".join(rows)
    assert load_text("ptb") == load_text("ptb", "validation") == " ".join(rows)
    assert evaluation_ids("ptb", "test", Words, 4) == rows
    assert evaluation_ids("c4", "test", Words, 4) == rows[:1024]
    assert evaluation_ids("c4", "test", Words, 8) == rows[:1100]
    assert evaluation_ids("c4", "validation", Words, 4) == rows[1100:]  # no text of the test
    assert evaluation_tokens("c4", "test", ["a.txt"], Words, 4) == rows[:1024]  # ast_train.py measures the same
    ptb = [("parquet", dict(split="train", data_files=(
        "ptb-text-only/ptb_text_only", f"penn_treebank/{split}/0000.parquet", "dataset", "refs/convert/parquet")))
           for split in ("test", "validation", "test")]
    c4 = "allenai/c4", "en/c4-validation.00000-of-00008.json.gz", "dataset", None
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", dict(split="test")), *ptb,
                     *[("json", dict(split="train", data_files=c4))] * 4]


def test_what_was_fetched_is_found_without_a_network(monkeypatch, tmp_path):
    """A login node fetches C4 and PTB, a compute node without a network calibrates on them: the Hub's cache as a
    download leaves it is enough."""
    import datasets
    import huggingface_hub
    import pyarrow
    import pyarrow.parquet
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.file_download.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    for name, branch, file in [("allenai--c4", "main", "en/c4-train.00000-of-01024.json.gz"),
                               ("ptb-text-only--ptb_text_only", "refs/convert/parquet",
                                "penn_treebank/test/0000.parquet")]:
        place = tmp_path / "hub" / f"datasets--{name}"
        blob, link, ref = place / "blobs/abc", place / "snapshots/1234" / file, place / "refs" / branch
        for path in blob, link, ref:
            path.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text("1234")
        link.symlink_to(blob)
        if file.endswith("gz"):
            lines = [json.dumps(dict(text=text, timestamp="2019-04-25T12:57:54Z", url="u")) for text in ("one", "two")]
            blob.write_bytes(gzip.compress("\n".join(lines).encode()))
        else:
            pyarrow.parquet.write_table(pyarrow.table({"sentence": ["a b", "c"]}), blob)
    assert list(documents("c4", "train")) == ["one", "two"] and documents("ptb", "test") == ["a b c"]
    said = "allenai/c4 is not in the cache and can't be fetched .the Hub is out of reach"
    with pytest.raises(InputError, match=said):
        documents("c4", "test")


def test_splits_of_a_file(tmp_path):
    """Would catch a number of dsnot.py, which measures the last tenth of a file that it calibrates on, that eval.py
    can't repeat, one that does not say what it was measured on, and splits that overlap."""
    text = "".join(f"line {i} of a text\n" for i in range(600))
    (tmp_path / "a.txt").write_text(text)
    n = len(text)
    for split, read, words in [
            (None, text, ""), ("held-out", text[n * 9 // 10:], "the last tenth of "),
            ("validation", text[n * 9 // 10:n * 19 // 20], "the first half of the last tenth of "),
            ("test", text[n * 19 // 20:], "the last twentieth of "),
            ("first-half", text[:n // 2], "the first half of "), ("second-half", text[n // 2:], "the second half of ")]:
        assert load_text(str(tmp_path / "a.txt"), split) == read
        said = run_eval("--data", tmp_path / "a.txt", "--seqlen", 32, *(["--split", split] if split else [])).stdout
        assert f"tiny on {words}{tmp_path / 'a.txt'}: perplexity" in said
    refused = run_eval("--data", "tiny", "--split", "second-half")
    assert refused.returncode == 2 and "of tiny there are validation and test" in refused.stderr
    assert told("tiny", "validation") == "the validation text of tiny" and told("tiny", None) == "tiny"
    lines = "".join(json.dumps({"text": part}) + "\n" for part in (text[:50], "", text[50:n - 9], text[n - 9:]))
    (tmp_path / "a.jsonl").write_text(lines)  # of which one document is nearly all: it is cut, too
    for split in "train", "validation", "test":
        lines, whole = (documents(str(tmp_path / name), split) for name in ("a.jsonl", "a.txt"))
        assert "".join(lines) == "".join(whole)


def test_what_windows_adds_to_a_file_is_no_text(tmp_path):
    """Would catch a token in front of a file that some editors have saved, and line ends that no model has seen, which
    multiply perplexity by three."""
    (tmp_path / "a.txt").write_bytes("wörter\r\nund\rmehr\n".encode("utf-8-sig"))
    assert documents(str(tmp_path / "a.txt"), None) == ["wörter\nund\rmehr\n"]


def test_a_few_long_documents_are_tokenized_once(tmp_path):
    """Would catch minutes spent on a file of three books, and windows that depend on what is kept."""
    texts = [" ".join(f"{book}-{i}" for i in range(5000)) for book in "abc"]
    path = tmp_path / "books.JSONL"  # a shouting JSONL is one, too
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    counted = []

    class Numbers:
        def encode(self, text):
            counted.append(text)
            return [int(word[2:]) + 10000 * "abc".index(word[0]) for word in text.split()]
    found = calibration_windows(str(path), Numbers(), 40, 8, seed=1)
    assert sorted(counted) == sorted(documents(str(path), "train"))
    rng, expected = random.Random(1), []
    for _ in range(40):
        ids = Numbers().encode(documents(str(path), "train")[rng.randrange(3)])
        begin = rng.randint(0, len(ids) - 8)
        expected.append(ids[begin:begin + 8])
    assert found.tolist() == expected


@pytest.mark.parametrize("name, content, said", [
    ("a.jsonl", b'{"text": "a", "x": ' + b"[" * 100000 + b"]" * 100000 + b"}", 'line 1: no JSON object with a "text"'),
    ("a.txt", "wide".encode("utf-16-le"), "it holds zero bytes")])
def test_odd_files_get_a_sentence(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        documents(str(tmp_path / name), None)


def test_splits_of_tiny_share_nothing():
    """Would catch test text that is trained on: a module in two splits, or a docstring that a training module has,
    too."""
    names = {split: re.findall(r"^Help on module (\S+)$", load_text("tiny", split), re.M)
             for split in ("train", "validation", "test")}
    assert all(names.values()) and sum(map(len, names.values())) == len(set(sum(names.values(), [])))
    trained = {doc for name in names["train"] for _, doc in stdlib.documentation()[name] if len(doc) > 60}
    trained = {doc.replace("\n", "\n    ").replace("    \n", "\n") + "\n\n" for doc in trained}  # as on a page
    for split in "validation", "test":
        code, text = load_text("tiny-code", split), load_text("tiny", split)
        assert all(stdlib.modules()[name] in code for name in names[split])
        assert not any(doc in text for doc in trained)
