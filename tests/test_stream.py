"""Texts as streams of token ids, kept in .bin files and drawn from by weight, as training reads them."""

import argparse
import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data import load_tokenizer, stream
from data.command import InputError
from data.writer import alone_in


def test_a_bin_file_returns_the_tokens(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stream, "PIECE", 5000)
    monkeypatch.setattr(sys, "argv", ["stream", "--model", str(checkpoint), "--data", argparse.__file__,
                                      "--out", str(tmp_path / "text.bin")])
    stream.main()
    tokenizer = load_tokenizer(checkpoint)
    ids = stream.open_bin(tmp_path / "text.bin", tokenizer)
    assert isinstance(ids, np.memmap) and f"{len(ids):,} tokens" in capsys.readouterr().out
    assert ids[0] == tokenizer.bos and (ids == tokenizer.bos).sum() == 1
    begin = tokenizer.decode(ids.tolist())
    text = Path(argparse.__file__).read_text()
    assert text.startswith(begin[:4000]) and 0.89 * len(text) < len(begin) < 0.91 * len(text)  # the rest is measured
    parts = [stream.tokens(str(tmp_path / "text.bin"), tokenizer, split) for split in ("train", "validation", "test")]
    assert np.array_equal(np.concatenate(parts), ids)  # the splits share nothing and lose nothing
    monkeypatch.setattr(stream, "MEASURED", 7)
    for split, part in zip(("train", "validation", "test"), parts):  # C4's would be measured for hours, were it whole
        assert np.array_equal(stream.tokens(str(tmp_path / "text.bin"), tokenizer, split),
                              part if split == "train" else part[:7])

    for changed in dict(vocab_size=301), dict(first=[]):  # another size; the same, and no BOS
        with pytest.raises(InputError, match="made by another tokenizer, of 300 tokens, than the model's, of 30"):
            other = copy.copy(tokenizer)
            vars(other).update(changed)
            stream.open_bin(tmp_path / "text.bin", other)
    (tmp_path / "text.bin").write_bytes((tmp_path / "text.bin").read_bytes()[:-1])
    with pytest.raises(InputError, match="damaged"):
        stream.open_bin(tmp_path / "text.bin", tokenizer)


def test_a_stopped_run_goes_on_after_its_finished_shards(checkpoint, tmp_path, monkeypatch, capsys):
    """Would catch a day of tokenizing that is lost, tokens that stand twice or not at all, and leftovers."""
    texts, asked = [["one two", "three"], ["four"], ["five six"]], []

    def documents(source, split, shard):
        asked.append(shard)
        if asked == [0, 1]:
            yield_first = iter(["fo"])  # a part of it is written when the process is stopped

            class Stopped(list):
                def __iter__(self):
                    yield next(yield_first)
                    raise KeyboardInterrupt
            return Stopped([])
        return texts[shard]

    def write(name, shards=3):
        monkeypatch.setattr(sys, "argv", ["stream", "--model", str(checkpoint), "--data", "c4", "--shards", str(shards),
                                          "--out", str(tmp_path / name)])
        stream.main()
    monkeypatch.setattr(stream, "documents", lambda source, split, shard: texts[shard])
    write("whole.bin")
    monkeypatch.setattr(stream, "documents", documents)
    with pytest.raises(KeyboardInterrupt):
        write("cut.bin")
    assert [path.name for path in tmp_path.iterdir() if "cut" in path.name] == ["cut.bin.partial"]
    with pytest.raises(InputError, match="cut.bin.partial holds something else, or what a run with other options"):
        write("cut.bin", shards=2)
    with pytest.raises(InputError, match="another run is writing to"), alone_in(tmp_path / "cut.bin.partial"):
        write("cut.bin")
    write("cut.bin")
    assert asked == [0, 1, 1, 2] and "going on after 1 of 3 shards" in capsys.readouterr().out
    assert (tmp_path / "cut.bin").read_bytes() == (tmp_path / "whole.bin").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"whole.bin", "cut.bin"}


@pytest.mark.parametrize("lines, words", [
    ('{"text": "a"}\n\n{"txt": "b"}\n', "line 3: no JSON object with a \"text\"; each line is one object"),
    ('{"text": "a"}\n{"text": 5}', "line 2"), ("[1]", "line 1"), ("\n", "has no text"),
    ('{"text": "a"}\n{"text": "\xff', "line 2")])
def test_a_bad_line_is_named(checkpoint, tmp_path, monkeypatch, lines, words):
    """And nothing is left behind."""
    (tmp_path / "a.jsonl").write_bytes(lines.encode("latin-1"))
    monkeypatch.setattr(sys, "argv", ["stream", "--model", str(checkpoint), "--data", str(tmp_path / "a.jsonl"),
                                      "--out", str(tmp_path / "out" / "a.bin")])
    with pytest.raises(InputError, match=words):
        stream.main()
    assert not (tmp_path / "out" / "a.bin.partial").exists() and not (tmp_path / "out" / "a.bin").exists()


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_half_a_character_is_no_reason_to_stop(checkpoint, tmp_path, name):
    (tmp_path / name).write_text('{"text": "a \\ud800 b"}')
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer.decode(stream.tokens(str(tmp_path / name), tokenizer, None).tolist()).strip() == "a ? b"


def test_nothing_is_replaced(checkpoint, tmp_path, monkeypatch):
    """Hours of tokenizing are not repeated because a command is."""
    monkeypatch.setattr(sys, "argv", ["stream", "--model", str(checkpoint), "--data", "LICENSE", "--out",
                                      str(tmp_path / "a.bin")])
    stream.main()
    before = (tmp_path / "a.bin").read_bytes()
    with pytest.raises(InputError, match="a.bin exists: delete it to make it anew"):
        stream.main()
    assert (tmp_path / "a.bin").read_bytes() == before


def test_a_folder_is_no_place_for_a_bin_file(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "a.bin").mkdir()
    monkeypatch.setattr(sys, "argv", ["stream", "--model", str(checkpoint), "--data", "LICENSE", "--out",
                                      str(tmp_path / "a.bin")])
    monkeypatch.setattr(stream, "write_bin", None)  # before any work
    with pytest.raises(InputError, match="a.bin can't be written: it is a folder"):
        stream.main()


def test_what_a_tokenizer_puts_around_a_text_stands_around_the_whole(monkeypatch):
    """Would catch marks of begin and end inside a text that is tokenized piece by piece, ids lost with them, and texts
    that run into each other where the tokenizer marks none."""
    class Bytes:
        first, last, end, vocab_size = [1], [2], [3], 300

        def encode(self, text):
            return self.first + list(text.encode()) + self.last
    monkeypatch.setattr(stream, "PIECE", 10)
    texts = ["one line\n" * 5, "another"]
    for Bytes.first, Bytes.last, between in ([1], [2], []), ([1], [], []), ([], [], [3]):
        found = np.concatenate(list(stream.encode(texts, Bytes(), "bytes"))).tolist()
        assert found == [id for text in texts for id in Bytes().encode(text) + between]


def test_a_mixture_draws_by_weight_and_by_step_alone(checkpoint, tmp_path):
    """Would catch a resumed run that reads other windows, and text that is read often while other text is never
    read."""
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": "a" * 50}) for _ in range(500)))
    (tmp_path / "b.txt").write_text("b\n" * 20000)
    tokenizer = load_tokenizer(checkpoint)
    mixture = stream.Mixture([f"{tmp_path / 'a.jsonl'}:3", str(tmp_path / "b.txt")], tokenizer, 16, 4)
    ids = mixture.batch(0, 5, 400)
    share = sum("a" in tokenizer.decode(row.tolist()) for row in ids) / 400
    assert ids.shape == (400, 17) and 0.68 < share < 0.82
    assert torch.equal(ids, mixture.batch(0, 5, 400))
    assert not torch.equal(ids, mixture.batch(0, 6, 400)) and not torch.equal(ids, mixture.batch(1, 5, 400))
    alone = stream.Mixture([str(tmp_path / "b.txt")], tokenizer, 16, 4)
    alone.streams = [np.arange(10016)]  # a window's first token tells where it begins
    begin = torch.cat([alone.batch(3, step, 4)[:, 0] for step in range(100)]).sort()[0]
    assert begin.diff().max() < 2 * 10000 / 400 and begin[0] < 50 and begin[-1] > 9950
    for name, source in [("C:\\a.txt", "C:\\a.txt"), ("C:\\a.txt:3", "C:\\a.txt"), ("a:b/c.txt", "a:b/c.txt")]:
        assert stream.sources_of([name]) == [source]
    with pytest.raises(InputError, match="weight 'x' is not a number"):
        stream.Mixture([f"{tmp_path / 'b.txt'}:x"], tokenizer, 16, 4)


class Large:
    """A tokenizer of more tokens than 16 bits can name."""
    first, last, end, vocab_size = [1], [], [], 70_000

    def encode(self, text):
        return [1, *(int(word) if word.isdigit() else 3 for word in text.split())]


def test_large_vocabularies_keep_their_ids(tmp_path):
    """Would catch ids that are cut to 16 bits, as they are written or as they are read: LLaMA 3 has 128,256."""
    stream.write_bin(tmp_path / "a.bin", [lambda: ["69999 2 65536"], lambda: ["65535"]], Large(), "a", {})
    ids = stream.open_bin(tmp_path / "a.bin", Large())
    assert ids.tolist() == [1, 69999, 2, 65536, 1, 65535] and ids.dtype == np.uint32
    for size, dtype in (1 << 16, np.uint16), ((1 << 16) + 1, np.uint32):
        Large.vocab_size = size
        assert stream.token_type(Large()) == dtype


def test_streams_are_drawn_anew_in_each_step():
    """Would catch a small batch that takes the same streams each time, a seed that moves no window, and a last window
    that ends beyond its stream."""
    mixture = stream.Mixture.__new__(stream.Mixture)
    mixture.seqlen, mixture.weights = 16, np.array([0.75, 0.25])
    mixture.streams = [np.arange(18), np.arange(100, 118)]
    first = torch.cat([mixture.batch(0, step, 4)[:, 0] for step in range(100)])
    assert 0.68 < (first < 100).double().mean() < 0.82 and set(first.tolist()) == {0, 1, 100, 101}
    mixture.streams, mixture.weights = [np.arange(10000)], np.array([1.0])
    assert not torch.equal(mixture.batch(0, 0, 4), mixture.batch(1, 0, 4))
