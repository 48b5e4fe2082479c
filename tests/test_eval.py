"""Oracles for eval.py: perplexity against a plain loop over transformers, tables against numbers worked out by hand,
and the command."""

import gzip
import json
import math
import random
import re
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from conftest import ROOT, SHARED, make_checkpoint

import eval as evaluation
from data import calibration_windows, load_text, load_tokenizer, processes, stdlib
from data.command import InputError, run, start
from data.tasks import SEVEN
from data.text import documents, evaluation_ids, told
from dsnot import keep_mask
from eval import describe, perplexity, speed
from gpt import GPT, all_prunable
from results.compare import (accuracy_panel, compare, layer_panel, merge, perplexity_panel, plot, read_rows, table,
                             table_by_method)
from results.readme import PAGES, pages, tables
from test_tasks import write_tasks

def run_eval(*arguments):
    return subprocess.run([sys.executable, str(ROOT / "eval.py"), "--device", "cpu", *map(str, arguments)],
                          capture_output=True, text=True, cwd=ROOT)


# ---------------------------------------------------------------------------------------------------- text sources

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
    ptb = [("parquet", dict(split="train", data_files=(
        "ptb-text-only/ptb_text_only", f"penn_treebank/{split}/0000.parquet", "dataset", "refs/convert/parquet")))
           for split in ("test", "validation", "test")]
    c4 = "allenai/c4", "en/c4-validation.00000-of-00008.json.gz", "dataset", None
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", dict(split="test")), *ptb,
                     *[("json", dict(split="train", data_files=c4))] * 3]


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


# ------------------------------------------------------------------------------------------------------ perplexity

def plain_perplexity(folder, ids, seqlen):
    """The protocol of ALGORITHMS as the papers' scripts write it: a loop over windows, on the model of transformers."""
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses = []
    with torch.no_grad():
        for i in range(len(ids) // seqlen):
            window = torch.tensor([ids[i * seqlen:(i + 1) * seqlen]])
            logits = model(window).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, window[0, 1:]).double())
    return math.exp(torch.stack(losses).mean())


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


def test_perplexity_is_that_of_a_plain_loop_also_streamed(checkpoint):
    """Would catch: windows that overlap or keep the tail, a mean over windows of other lengths, blocks read wrongly."""
    ids = torch.randint(300, (64 * 5 + 17,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = plain_perplexity(checkpoint, ids, 64)
    for stream in False, True:
        model = GPT.from_pretrained(checkpoint, stream=stream)
        for batch in 1, 2, 8:
            assert perplexity(model, ids, 64, batch) == pytest.approx(expected, abs=1e-3)


def test_a_streamed_model_is_read_once_and_a_block_at_a_time(checkpoint, blocks_read, monkeypatch):
    """Would catch: blocks read again for every batch, blocks that are kept, hidden states that take no heed of what
    memory is free. A window of this model's hidden states takes 8 kB."""
    ids, model = list(range(300)) + list(range(20)), GPT.from_pretrained(checkpoint, stream=True)
    assert not blocks_read
    found = []
    for free, times in (10**9, 1), (40_000, 3), (0, 5):  # five windows: together; two, two and one; one by one
        blocks_read.clear()
        monkeypatch.setattr("eval.free_memory", lambda device: free)
        found.append(perplexity(model, ids, 64, batch=1))
        assert blocks_read == ["model.layers.0", "model.layers.1"] * times
    assert found[0] == found[1] == found[2]


def test_a_model_that_does_not_fit_is_not_loaded_whole(checkpoint, monkeypatch, tmp_path, capsys):
    """The command streams a model that is larger than memory, and refuses what would need all of it; a compressed one
    needs half."""
    import gpt
    (tmp_path / "text.txt").write_text("the model reads words and the words are few " * 40)
    for module in evaluation, gpt:
        monkeypatch.setattr(module, "free_memory", lambda device: 100_000)  # of 145,024 bytes
    monkeypatch.setattr(sys, "argv", ["eval.py", "--model", str(checkpoint), "--data", str(tmp_path / "text.txt")])
    evaluation.main()
    assert "perplexity" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--speed"])
    with pytest.raises(InputError, match="random takes 0.15 MB of memory, and 0.10 MB are free"):
        evaluation.main()
    with pytest.raises(InputError, match="no linear layer of the blocks is 2:4"):  # there was memory to look
        GPT.from_pretrained(checkpoint, sparse=True)


@pytest.mark.parametrize("folder, text, seqlen", [
    (ROOT / "data" / "tiny", "tiny", 256),
    (SHARED / "models" / "stories260K", SHARED / "text" / "wikitext2-test.raw", 512),
], ids=["tiny", "stories260K on WikiText-2"])
def test_perplexity_of_real_models(folder, text, seqlen):
    """40 windows; would catch a tokenizer, rotary base or norm epsilon that only looks right on random weights."""
    if not folder.is_dir():
        pytest.skip("needs the files beside the repository")
    ids = load_tokenizer(folder).encode(load_text(str(text))[:100_000])[:40 * seqlen]
    assert len(ids) == 40 * seqlen
    assert perplexity(GPT.from_pretrained(folder), ids, seqlen) == pytest.approx(
        plain_perplexity(folder, ids, seqlen), abs=1e-3)


# ------------------------------------------------------------------------------------------------ tables and plots

def result_file(folder, name, rows, **options):
    options = dict(model="some/where/llama", sparsity=0.7, pattern=None, seed=0, cycles=50) | options
    path = folder / f"{name}.json"
    rows = [dict(method=method, sparsity=0.7, perplexity=perplexity, seconds=12.4, layers=layers)
            for method, perplexity, layers in rows]
    results = {"data": "wikitext2", "seqlen": 2048, "rows": rows}
    path.write_text(json.dumps({"options": options, "results": results}))
    return path


def test_table(tmp_path):
    """By hand; would catch a change relative to the wrong row, seeds or options mixed up, duplicates shown twice."""
    layers = [dict(layer=f"model.layers.{i}.mlp.{kind}", weights=4, sparsity=0.7, error=0.1 * i + 0.1)
              for i in range(3) for kind in ("up_proj", "down_proj")]
    dense = ("dense", 5.0, [])
    files = [result_file(tmp_path, "a", [dense, ("wanda", 80.0, layers), ("wanda + dsnot", 60.0, layers)]),
             result_file(tmp_path, "b", [dense, ("wanda", 80.0, []), ("wanda + dsnot", 70.0, [])], cycles=10),
             result_file(tmp_path, "c", [dense, ("wanda", 12.0, []), ("wanda + swap", 9.0, [])], pattern="2:4"),
             result_file(tmp_path, "d", [dense, ("wanda", 10.0, []), ("wanda + swap", 9.5, [])], pattern="2:4", seed=1)]
    rows = merge([row for path in files for row in read_rows(path)])
    lines = [[cell.strip() for cell in line.split("|")[3:-1]] for line in table(rows).split("\n")[2:]]
    head = ("| model | data (seqlen) | method | sparsity | perplexity | by refinement | seconds |\n"
            "| :-- | :-- | :-- | --")
    assert table(rows).startswith(head)
    assert lines == [["dense", "0%", "5.00", "", ""],
                     ["wanda", "2:4", "11.00 ± 1.41 (2 seeds)", "", "12"],
                     ["wanda + swap", "2:4", "9.25 ± 0.35 (2 seeds)", "-15.9%", "12"],
                     ["wanda", "70%", "80.00", "", "12"],
                     ["wanda + dsnot (cycles 10)", "70%", "70.00", "-12.5%", "12"],
                     ["wanda + dsnot (cycles 50)", "70%", "60.00", "-25.0%", "12"]]
    more = [result_file(tmp_path, "e", [("wanda", 50.0, []), ("wanda + swap", 45.0, [])], allocate="owl"),
            result_file(tmp_path, "f", [("wanda", 80.0, []), ("wanda + swap", 60.0, []), ("AST + SLoRB", 6.0, []),
                                        ("AST", 7.0, [])], allocate="uniform")]
    changes = [line.split("|")[6].strip() for line in table(merge([row for path in more for row in read_rows(path)]))
               .split("\n")[2:]]
    ruined = read_rows(result_file(tmp_path, "g", [dense, ("wanda", float("nan"), [])]))
    assert len(merge(ruined + ruined)) == 2  # NaN is no number, but the same one twice is one row
    other = [result_file(tmp_path, f"h{seed}", [("wanda", 10.0 + seed, [])], seed=seed, nsamples=128 >> seed)
             for seed in (0, 1)]
    merged = merge([row for path in other for row in read_rows(path)])
    assert [(row["method"], row["perplexity"]) for row in merged] == [
        ("wanda (nsamples 128)", 10.0), ("wanda (nsamples 64)", 11.0)]  # they differ in more than the seed
    splits = [result_file(tmp_path, split, [("wanda", 10.0, [])], split=split) for split in ("test", "validation")]
    assert [row["data"] for path in splits for row in read_rows(path)] == ["wikitext2", "wikitext2, validation"]
    found = [dict(row, options=dict(seed=seed), tasks={"rte": dict(acc=0.5 + seed / 10)}) for seed in (0, 1)
             for row in read_rows(splits[0])]
    assert len(merge(found)) == 2  # accuracies are not averaged, and none is left out
    assert changes == ["", "", "", "", "-25.0%", "-10.0%"]  # AST, AST + SLoRB, Wanda and with owl, swaps and with owl
    rows[-1]["tasks"] = {"rte": dict(acc=0.5, acc_stderr=0.1)}
    for kind, start in ("png", b"\x89PNG"), ("svg", b"<?xml"):
        plot(rows, tmp_path / f"picture.{kind}")
        assert (tmp_path / f"picture.{kind}").read_bytes().startswith(start)


def test_a_method_that_prunes_nothing_keeps_its_place(tmp_path):
    """Would catch --sparsity 0 that takes the method out of the table by methods."""
    files = [result_file(tmp_path, str(s), [("dense", 5.0, []), ("wanda", 5.0 + 10 * s, [])], sparsity=s)
             for s in (0.0, 0.5)]
    assert table_by_method(merge([row for path in files for row in read_rows(path)])).split("\n") == [
        "| llama on wikitext2 (2048), dense 5.00 | 50% |", "| :-- | --: |", "| wanda | 10.00 |"]


def test_a_ruined_dense_model_has_a_table(tmp_path):
    """Would catch a traceback, or another order, where a perplexity is infinite, also that of one of two seeds."""
    files = [result_file(tmp_path, name, [("dense", math.inf, []), ("wanda", 9.0, []), ("magnitude", ruined, []),
                                          ("sparsegpt", 50.0, [])], seed=i)
             for i, (name, ruined) in enumerate([("a", math.inf), ("b", 1e5)])]
    for chosen in files[:1], files:
        rows = merge([row for file in chosen for row in read_rows(file)])
        assert [line.split("|")[1].strip() for line in table_by_method(rows).split("\n")[2:]] == [
            "magnitude", "sparsegpt", "wanda"]


def test_methods_that_beat_the_dense_model_stand_last(tmp_path):
    """Would catch an order that turns around where the mean loss is negative."""
    file = result_file(tmp_path, "a", [("dense", 20.62, []), ("wanda", 20.31, []), ("magnitude", 20.6, [])])
    assert [line.split("|")[1].strip() for line in table_by_method(merge(read_rows(file))).split("\n")[2:]] == [
        "magnitude", "wanda"]


def test_amounts_stand_in_order(tmp_path):
    """Would catch columns in the order in which methods happen to have them."""
    files = [result_file(tmp_path, f"{name}{i}", [(method, 9.0, [])], **amount) for name, method, amounts in (
        ("a", "magnitude", [dict(sparsity=0.7)]),
        ("b", "wanda", [dict(sparsity=0.7), dict(sparsity=0.5), dict(pattern="2:4")]))
             for i, amount in enumerate(amounts)]
    text = table_by_method(merge([row for path in files for row in read_rows(path)]))
    assert text.startswith("| llama on wikitext2 (2048) | 2:4 | 50% | 70% |")


@pytest.mark.parametrize("model, name", [
    (".", "."), ("..", ".."), ("snapshots/abc", "abc"), ("a/b/", "b"), ("meta-llama/Llama-2-7b-hf", "Llama-2-7b-hf"),
    ("models--gpt2/snapshots/abc", "gpt2")])
def test_models_have_names(model, name, tmp_path):
    """Would catch a traceback where a path has too few parts for one of the Hub's cache."""
    path = result_file(tmp_path, "a", [("wanda", 9.0, [])])
    entry = json.loads(path.read_text())
    entry["options"]["model"] = model
    path.write_text(json.dumps(entry))
    assert [row["model"] for row in read_rows(path)] == [name]


def test_texts_of_one_name_are_kept_apart(tmp_path):
    """Would catch a table of two texts: the dense model tells them apart."""
    files = [result_file(tmp_path, name, [("dense", dense, []), ("wanda", 9.0 + share, [])], sparsity=share)
             for name, dense, share in (("a", 5.0, 0.5), ("b", 5.0001, 0.6), ("c", 5.2, 0.7))]
    texts = table_by_method(merge([row for path in files for row in read_rows(path)])).split("\n\n")
    assert [text.split("|")[1].strip() for text in texts] == [
        "llama on wikitext2, dense 5 (2048), dense 5.00", "llama on wikitext2, dense 5.2 (2048), dense 5.20"]
    assert [line.split("|")[2:-1] for line in texts[0].split("\n")[::2]] == [[" 50% ", " 60% "], [" 9.50 ", " 9.60 "]]


def test_only_unusual_propagation_is_said(tmp_path):
    """Would catch plain methods that are renamed, and so left out of a table, when a file names every option."""
    files = [result_file(tmp_path, "a", [("wanda", 12.0, [])], propagate=False),
             result_file(tmp_path, "b", [("wanda", 13.0, [])], propagate=True),
             result_file(tmp_path, "c", [("wanda + swap", 9.0, [])], propagate=True),
             result_file(tmp_path, "d", [("wanda + swap", 10.0, [])], propagate=False)]
    rows = merge([row for path in files for row in read_rows(path)])
    assert {row["perplexity"]: row["method"] for row in rows} == {
        12.0: "wanda", 13.0: "wanda (propagate)", 9.0: "wanda + swap", 10.0: "wanda + swap (no propagate)"}


def test_results_of_training_and_pruned_folders(tmp_path):
    entry = {"options": dict(model="tiny", sparsity=None, pattern="2:4", eval_data="tiny", seqlen=256, seed=0),
             "results": {"table": {"dense": dict(perplexity=5.0), "AST": dict(perplexity=5.5)}}}
    (tmp_path / "ast.json").write_text(json.dumps(entry))
    assert [(r["method"], r["amount"], r["sparsity"], r["perplexity"]) for r in read_rows(tmp_path / "ast.json")] == [
        ("dense", "0%", 0.0, 5.0), ("AST", "2:4", 0.5, 5.5)]
    (tmp_path / "pruning.json").write_text(json.dumps({"layers": [], "run": dict(
        model="cache/models--meta-llama--Llama-2-7b-hf/snapshots/abc", score="wanda", refine="dsnot+swap", refit=True,
        sparsity=0.6, pattern=None)}))
    row = read_rows(tmp_path)[0]
    assert (row["model"], row["method"], row["sparsity"]) == ("Llama-2-7b-hf", "wanda + dsnot + swap + refit", 0.6)


def test_pruned_folders_that_differ_in_an_option_are_told_apart(checkpoint, tmp_path):
    """Would catch a row that is dropped because neither folder has a perplexity, and options that eval.py forgets."""
    folders, files = [tmp_path / allocate for allocate in ("uniform", "owl")], []
    for folder, error in zip(folders, (0.1, 0.2)):
        model = GPT.from_pretrained(checkpoint)
        model.model.norm.weight.data *= 1 + error
        model.save_pretrained(folder)
        method = dict(score="wanda", refine="swap", refit=False, allocate=folder.name)
        layers = [dict(layer="model.layers.0.mlp.up_proj", weights=4, sparsity=0.6, error=error)]
        (folder / "pruning.json").write_text(json.dumps({"layers": layers, "run": method | dict(
            model=str(checkpoint), sparsity=0.6, pattern=None, seed=0, files=[[folder.name, 1, 2]])}))
        files.append(tmp_path / f"{folder.name}.json")
        assert run_eval("--model", folder, "--data", "LICENSE", "--json", files[-1]).returncode == 0
    for paths in folders, files, folders * 2, files * 2:
        rows = merge([row for path in paths for row in read_rows(path)])
        assert [row["method"] for row in rows] == ["wanda + swap", "wanda + swap (allocate owl)"]
    assert str(checkpoint) not in json.dumps(json.loads(files[0].read_text())["results"])


def test_parts_of_a_text_are_kept_apart(checkpoint, tmp_path):
    """Would catch another part's perplexity under the name of a whole text, taken for another seed's, or compared."""
    GPT.from_pretrained(checkpoint).save_pretrained(tmp_path / "pruned")
    (tmp_path / "pruned/pruning.json").write_text(json.dumps({"layers": [], "run": dict(
        model=str(checkpoint), score="wanda", refine="none", sparsity=0.5, pattern=None, seed=0)}))
    (tmp_path / "text.txt").write_text("the model reads words and the words are few " * 400)
    names = {}
    for split in None, "held-out", "validation", "test":
        words = ["--split", split] if split else []
        for model in checkpoint, tmp_path / "pruned":
            file = tmp_path / f"{split}-{model.name}.json"
            assert run_eval("--model", model, "--data", tmp_path / "text.txt", *words, "--json", file).returncode == 0
            names[file] = "text.txt" + f", {split}" * bool(split)
    for file, name in names.items():
        assert [row["data"] for row in read_rows(file)] == [name]
    rows = merge([row for file in names for row in read_rows(file)])
    assert [(row["data"], row["method"], row["runs"]) for row in rows] == [
        (name, method, 1) for name in sorted(set(names.values())) for method in ("dense", "wanda")]
    old = result_file(tmp_path, "old", [("wanda", 9.0, [])], split="validation")  # of a named text
    assert [row["data"] for row in read_rows(old)] == ["wikitext2, validation"]


def test_what_is_no_perplexity_is_not_averaged(tmp_path):
    """Would catch a pruned folder that stands for another seed's, a mean of some tasks beside that of others, and a
    part of the questions shown as all."""
    for seed in 0, 1:
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "pruning.json").write_text(json.dumps({
            "layers": [dict(layer="model.layers.0.mlp.up_proj", weights=4, sparsity=0.5, error=0.1 + seed)],
            "run": dict(model="m", score="wanda", refine="none", sparsity=0.5, pattern=None, seed=seed)}))
    assert len(merge([row for seed in "01" for row in read_rows(tmp_path / seed)])) == 2
    results = []
    measured = [(["rte", "mean"], None), (["rte", "piqa", "mean"], None), (["rte", "mean"], 1)]
    for i, (tasks, limit) in enumerate(measured):
        entry = dict(options=dict(model="m", sparsity=None, seed=0, limit=limit), results={"rows": [
            dict(method="dense", tasks={task: dict(acc=0.5 + i / 10) for task in tasks})]})
        (tmp_path / f"{i}.json").write_text(json.dumps(entry))
        results.append(read_rows(tmp_path / f"{i}.json"))
    lines = table(merge(sum(results, []))).split("\n")
    assert "| rte | piqa |" in lines[0] and "mean" not in lines[0]
    assert [line.split("|")[3].strip() for line in lines[2:]] == ["dense", "dense", "dense (limit 1)"]
    assert "| mean |" in table(merge(results[0] + results[2]))
    alone = [dict(row, tasks={task: dict(acc=0.5)}) for task in ("rte", "piqa") for row in results[0]]
    assert "| rte | piqa |" in table(merge(alone))  # measured one by one, they have no mean


def test_what_tells_two_trainings_apart(tmp_path):
    """Would catch the training text left out of a name, and how often a state was saved in it."""
    rows = []
    for seconds, (data, every) in enumerate([("tiny", 100), ("tiny-code", 50)]):
        options = dict(model="tiny", sparsity=None, pattern="2:4", eval_data="tiny", seqlen=256, seed=0, data=[data],
                       save_every=every)
        table = {"AST": dict(perplexity=5.5 + seconds)}
        (tmp_path / "ast.json").write_text(json.dumps({"options": options, "results": {"table": table}}))
        rows += read_rows(tmp_path / "ast.json")
    assert [row["method"] for row in merge(rows)] == ["AST (data tiny)", "AST (data tiny-code)"]


# ----------------------------------------------------------------------------------------------------- the command

def test_command(checkpoint, tmp_path):
    """One run of everything, as it is recorded."""
    tasks_dir = write_tasks(tmp_path / "tasks")
    (tmp_path / "text.txt").write_text("the model reads words and the words are few " * 40)
    out = run_eval("--model", checkpoint, "--data", tmp_path / "text.txt", "--tasks", "rte", "piqa", "--tasks-dir",
                   tasks_dir, "--speed", "--json", tmp_path / "result.json")
    assert out.returncode == 0 and "seqlen 64" in out.stdout and "decode" in out.stdout, out.stderr
    row = json.loads((tmp_path / "result.json").read_text())["results"]["rows"][0]
    assert row["method"] == "dense" and row["tasks"].keys() == {"rte", "piqa", "mean"} and row["perplexity"] > 1
    weights = sum(p.numel() for p in GPT.from_pretrained(checkpoint).parameters())
    assert row["speed"]["weight_bytes"] == 4 * weights and row["speed"]["peak_memory_bytes"] > 4 * weights
    (row,) = read_rows(tmp_path / "result.json")
    assert row["data"] == "text.txt" and row["seqlen"] == 64 and row["amount"] == "0%"


def test_speed_of_a_model_with_few_positions(tmp_path):
    make_checkpoint(tmp_path / "m", model_type="gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=20)
    done = run_eval("--model", tmp_path / "m", "--speed", "--json", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "r.json").read_text())["results"]["rows"][0]["speed"]["prompt_tokens"] == 10


@pytest.mark.parametrize("arguments, said", [
    (["--tasks", "rhyme"], "--tasks rhyme: there is no such task"),
    (["--tasks", "piqa"], "baber/piqa is not in the cache and can't be fetched"),
    (["--tasks", "rte", "--tasks-dir", "data"], "--tasks-dir data has no data of rte"),
    (["--tasks", "rte", "--tasks-dir", "nowhere"], "--tasks-dir nowhere is no folder"),
    (["--data", "ptb"], "ptb_text_only is not in the cache and can't be fetched"),
    (["--compare", "nowhere.json"], "there is no file or folder"), (["--compare", "LICENSE"], "neither a result file"),
    (["--compare", "results/tiny"], "to compare the files that --json wrote, give results/tiny/*.json"),
    (["--plot", "a.png"], "needs --compare"), (["--seqlen", "1"], "--seqlen 1"),
    (["--limit", "3"], "they need --tasks"), (["--by-method"], "needs --compare"),
    (["--compare", "x.json", "--model", "x"], "leave out --model"),
    (["--compare", "x.json", "--speed"], "leave out --model"), (["--compare", "x.json", "--seqlen", "9"], "leave out"),
    (["--speed", "--split", "validation"], "--split validation is for perplexity"),
    (["--tasks", "--seqlen", "9"], "--seqlen 9 is for perplexity"), (["--batch", "0"], "batch 0"),
    (["--tasks", "--limit", "-1"], "limit -1"),
])
def test_bad_input_is_one_sentence(arguments, said, monkeypatch, capsys, tmp_path):
    """On stderr, with exit code 2 and nothing written."""
    def unreachable(*_, **__):
        raise ConnectionError

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["eval.py", *arguments, "--device=cpu", f"--json={tmp_path / 'result.json'}"])
    with pytest.raises(SystemExit) as end:
        run(evaluation.main)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and said in error, error
    assert not list(tmp_path.iterdir())


def test_json_is_a_file(monkeypatch, tmp_path):
    """Would catch a device that a result replaces, which root may do, and a link that becomes a file."""
    import gpt
    words = ["gpt.py", "--device=cpu", "--max-new-tokens=1", "--json"]
    for name, said in ("/dev/null", "--json /dev/null is no regular file"), (tmp_path, "is no regular file"):
        monkeypatch.setattr(sys, "argv", [*words, str(name)])
        with pytest.raises(InputError, match=said):
            gpt.main()
    with pytest.raises(InputError, match="is where --out goes"):
        start(Namespace(seed=0, device="cpu", json=f"{tmp_path}/x/../out", out=str(tmp_path / "out")))
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    monkeypatch.setattr(sys, "argv", [*words, str(tmp_path / "link.json")])
    gpt.main()
    assert (tmp_path / "link.json").is_symlink() and json.loads((tmp_path / "real.json").read_text())["results"]


def test_a_table_of_nothing_is_refused(tmp_path):
    run = dict(model="m", score="wanda", refine="none", pattern=None, sparsity=0.5)
    (tmp_path / "pruning.json").write_text(json.dumps({"run": run, "layers": []}))
    with pytest.raises(InputError, match="there is no perplexity"):
        compare(Namespace(compare=[tmp_path], by_method=True, plot=None, json=None))


def test_pages_show_the_results():
    """Would catch a number in a page's tables that no result file holds, and one that was measured again."""
    shown = pages()
    for page, text in shown.items():
        assert page.read_text() == text, f"run results/readme.py: {page} has changed"
    assert sum(text.count("<!-- end -->") for text in shown.values()) == len(tables())


def test_links_lead_somewhere():
    """Would catch a picture or a section that has moved."""
    for page in PAGES:
        links = re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text())
        assert links
        for path, section in links:
            there = page.parent / path if path else page
            assert there.exists(), f"{page} shows {path}"
            titles = [re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-")
                      for title in re.findall("^#+ (.*)", there.read_text(), re.M)] if section else [""]
            assert (section or "") in titles, f"{page} shows {path}#{section}"


def test_files_that_pages_name_exist():
    """Would catch a number whose source is not there."""
    for page in PAGES:
        names = set(re.findall(r"results/[\w./*-]+\.(?:json|py|sh)", page.read_text()))
        assert len(names) > 5
        for name in names:
            assert list(ROOT.glob(name)), f"{page} names {name}"


def test_a_log_tells_where_a_long_run_is(monkeypatch, capsys):
    """Would catch a run of days whose log says nothing, because a bar needs a terminal, and a short one that chatters.
    """
    for seconds, said in (0, ["pruning:  33%", "pruning:  67%"]), (60, []):
        monkeypatch.setattr(processes, "QUIET", seconds)
        assert list(processes.progress_bar(range(3), desc="pruning")) == [0, 1, 2]
        lines = capsys.readouterr().err.splitlines()
        assert all(any(line.startswith(start) for line in lines) for start in said) and bool(lines) == bool(said)


def test_a_ruined_model_has_an_infinite_perplexity(checkpoint):
    """Would catch an OverflowError in the place of a number."""
    model = GPT.from_pretrained(checkpoint)
    model.lm_head.weight.data *= 1e6
    assert perplexity(model, list(range(64)), 64) == float("inf")


def test_speed_by_hand(monkeypatch):
    """On a clock that the model sets; would catch the run that warms up or the slow second token being counted."""
    now, runs = [0.0], iter([(100, 50), (2, 0.25), (4, 0.5), (6, 1)])

    def sample(ids, many, temperature):
        prefill, decode = next(runs)
        for i in range(many):
            now[0] += prefill if i == 0 else 9 if i == 1 else decode
            yield torch.zeros(1)
    monkeypatch.setattr(evaluation, "time", Namespace(perf_counter=lambda: now[0]))
    model = Namespace(sample=sample, parameters=lambda: [torch.zeros(3)], buffers=lambda: [])
    found = speed(model, torch.zeros(1, 8), new_tokens=5)
    assert found["prefill_tokens_per_second"] == 8 / 4 and found["decode_tokens_per_second"] == 1 / 0.5


@pytest.mark.parametrize("amount, said", [(dict(sparsity=0.0), ("dense", "0%")),
                                          (dict(sparsity=0.5), ("sparse", "50%")),
                                          (dict(pattern=(2, 4)), ("sparse", "2:4")),
                                          (dict(pattern=(4, 8)), ("sparse", "50%"))])
def test_what_a_model_without_notes_is_called(checkpoint, tmp_path, amount, said):
    """Would catch a pruned model in the place of the dense one, and a mask that is not 2:4 taken for it."""
    model = GPT.from_pretrained(checkpoint)
    for layer in all_prunable(model).values():
        layer.weight.data *= keep_mask(torch.rand_like(layer.weight), **amount)
    found = describe(model, "m")
    assert (found["method"], found["amount"]) == said
    if said[1] == "2:4":  # also while it is compressed
        model.save_pretrained(tmp_path / "m")
        found = describe(GPT.from_pretrained(tmp_path / "m", sparse=True), "m")
        assert (found["method"], found["amount"]) == said


def test_what_tasks_are_given(checkpoint, monkeypatch):
    """Would catch --limit and --batch that nobody hears, and tasks that nobody asked for."""
    given = []
    monkeypatch.setattr(evaluation, "zero_shot", lambda model, tokenizer, *rest: given.append(rest))
    monkeypatch.setattr(sys, "argv", ["eval.py", "--device=cpu", f"--model={checkpoint}", "--tasks", "--limit=3",
                                      "--batch=2"])
    evaluation.main()
    assert given == [(SEVEN, None, 3, 2)]


def test_pictures_show_the_numbers():
    """Would catch a point in another method's line, a map on its side, and shares drawn as percent."""
    from matplotlib.figure import Figure
    layers = [dict(layer=f"model.layers.{i}.mlp.{kind}", weights=4, sparsity=0.5 + i / 10 + j / 100)
              for i in range(3) for j, kind in enumerate(("up_proj", "down_proj"))]
    rows = [dict(model="m", data="d", seqlen=8, method=method, amount=amount, perplexity=ppl, spread=None,
                 layers=layers, tasks={"rte": dict(acc=ppl / 100)})
            for method, amount, ppl in [("dense", "0%", 5.0), ("a", "50%", 7.0), ("b", "50%", 6.0), ("a", "70%", 9.0)]]
    axis = Figure().subplots()
    perplexity_panel(axis, (rows, {"50%": "red", "70%": "blue"}))
    names = [text.get_text() for text in axis.get_yticklabels()]
    shown = {(box.get_label(), names[int(y)], x) for box in axis.containers for x, y in zip(*box[0].get_data())}
    assert shown == {(row["amount"], row["method"], row["perplexity"]) for row in rows[1:]}
    axis = Figure().subplots()
    accuracy_panel(axis, rows)
    assert [bar.get_height() for bar in axis.patches] == pytest.approx([5, 7, 6, 9])
    axis = Figure().subplots()
    layer_panel(axis, (rows[1], rows))
    assert axis.images[0].get_array().flatten().tolist() == pytest.approx([50, 60, 70, 51, 61, 71])
    assert [text.get_text() for text in axis.get_yticklabels()] == ["up_proj", "down_proj"]
