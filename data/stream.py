"""Token streams for training: long arrays of token ids, in memory or memory-mapped, and mixtures of them.

A text that is too long to tokenize at every start is tokenized once, but for what is held out of it, into a `.bin`
file, which training memory-maps:

    python -m data.stream --model llama2-7b --data c4 --shards 52 --out c4.bin
    python -m data.stream --model llama2-7b --data arxiv.jsonl --out arxiv.bin

The file is a header of 40 bytes (a mark, then as 64-bit numbers the size of the vocabulary, the `fingerprint` of the
tokenizer, the bytes of a token and the number of tokens) and then the ids. Every document begins with the BOS token
where the model's tokenizer puts one; where it puts nothing around a text, every document ends with the EOS token.
"""

import functools
import json
import os
import shutil
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import torch

from data.command import (InputError, parser, record, run, start, what_keeps_from_writing,
                          write_atomically)
from data.hub import model_folder, repository
from data.processes import progress_bar
from data.text import SOURCES, documents, evaluation_ids, load_text, part_of, text_versions
from data.tokenizer import load_tokenizer
from data.writer import alone_in, noted, occupied

HEADER, MARK = struct.Struct("<8sQQQQ"), b"TOKENBIN"
PROBE = "The 1st of May:\n    naïve(x) -> 'été', 12345 + 67.89;\tLes élèves, 東京 🙂 don't.\n"
GOLDEN = (5 ** 0.5 - 1) / 2
MEASURED = 256 * 2048  # tokens of a .bin at most, as of C4
PIECE = 50_000  # characters that are tokenized at a time: SentencePiece is slower on long texts


def pieces(texts):
    """Texts -> (piece, whether it begins a text, whether it ends it): long ones are cut at line ends, which bounds
    memory."""
    for text in texts:
        begin = 0
        while begin < len(text):
            end = text.find("\n", begin + PIECE) + 1 or len(text)
            yield text[begin:end], begin == 0, end == len(text)
            begin = end


def fingerprint(tokenizer):
    """A number that tells a tokenizer from others, by what it makes of a text."""
    return zlib.crc32(str(list(tokenizer.encode(PROBE))).encode())


def token_type(tokenizer):
    """The smallest type that holds an id."""
    return np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32


def encode(texts, tokenizer, label):
    """Texts -> arrays of ids, one for each piece. What the tokenizer puts around a text stands around the whole of it;
    SentencePiece begins every piece with a space, though."""
    dtype = token_type(tokenizer)
    before, after = len(tokenizer.first), len(tokenizer.last)
    with progress_bar(total=sum(map(len, texts)), desc=f"tokens of {label}", unit=" characters",
                      unit_scale=True) as bar:
        for piece, first, last in pieces(texts):
            ids = tokenizer.encode(piece)
            ids = ids[0 if first else before:len(ids) - (0 if last else after)]
            if last and before + after == 0:
                ids = ids + tokenizer.end
            yield np.array(ids, dtype)
            bar.update(len(piece))


def write_bin(path, shards, tokenizer, label, made):
    """Tokenize shards, functions that return a list of texts each, into a `.bin` file, whole or not at all; returns the
    number of tokens. made: a dict that names the run: where one of the same name was interrupted, it goes on after the
    shards that it has finished, which lie in `path`.partial."""
    work, width = Path(f"{path}.partial"), np.dtype(token_type(tokenizer)).itemsize
    log, file = work / "run.json", work / "tokens"
    with alone_in(work):
        before = noted(log) if occupied(work) else {"made": made, "shards": 0, "tokens": 0}
        if not before or before.get("made") != made:
            raise InputError(f"{work} holds something else, or what a run with other options has finished: give those, "
                             f"choose another --out, or delete it")
        done, count = before["shards"], before["tokens"]
        if done:
            print(f"going on after {done} of {len(shards)} shards")

        def note():
            text = json.dumps({"made": made, "shards": done, "tokens": count})
            write_atomically(log, lambda beside: beside.write_text(text))

        try:
            note()
            with open(file, "r+b" if done else "wb") as f:
                f.truncate(HEADER.size + width * count)
                f.seek(0, os.SEEK_END)
                for texts in shards[done:]:
                    for ids in encode(texts(), tokenizer, label):
                        f.write(ids.tobytes())
                        count += len(ids)
                    f.flush()
                    os.fsync(f.fileno())  # before run.json says that they are there
                    done += 1
                    note()
                if not count:
                    raise InputError(f"{label} has no text")
                f.seek(0)
                f.write(HEADER.pack(MARK, tokenizer.vocab_size, fingerprint(tokenizer), width, count))
            file.replace(path)
        except OSError as e:
            if e.filename not in (None, str(file)):  # of what is read
                raise
            raise InputError(f"can't write {path}: {e.strerror or e}") from None
        finally:
            if not (done and count and file.exists()):  # nothing to go on from
                shutil.rmtree(work, ignore_errors=True)
    return count


def open_bin(path, tokenizer):
    """A `.bin` file as an array of ids that stays on disk. Raises InputError for a damaged one or another tokenizer's.
    """
    try:
        with open(path, "rb") as f:
            mark, vocabulary, made_by, width, count = HEADER.unpack(f.read(HEADER.size))
    except OSError as e:
        raise InputError(f"{path} can't be read: {e.strerror} (`python -m data.stream` makes such files)") from None
    except struct.error:
        mark = None
    if mark != MARK or Path(path).stat().st_size != HEADER.size + width * count:
        raise InputError(f"{path} is damaged, of an older version, or was not made by `python -m data.stream`: "
                         f"make it anew")
    if (vocabulary, made_by) != (tokenizer.vocab_size, fingerprint(tokenizer)):
        raise InputError(f"{path} was made by another tokenizer, of {vocabulary} tokens, than the model's, of "
                         f"{tokenizer.vocab_size}: make it anew with this --model")
    return np.memmap(path, np.uint16 if width == 2 else np.uint32, mode="r", offset=HEADER.size, shape=(count,))


def tokens(source, tokenizer, split):
    """The ids of a split of a source (1-D array): for training document by document, else as perplexity reads them."""
    if source.endswith(".bin"):
        ids = open_bin(source, tokenizer)
        begin, end = part_of(len(ids), split)
        return ids[begin:end] if split == "train" else ids[begin:end][:MEASURED].astype(np.int64)
    if split == "train":
        texts = documents(source, "train")
        return np.concatenate([np.array([], token_type(tokenizer)), *encode(texts, tokenizer, source)])
    return np.array(tokenizer.encode(load_text(source, split)))


def weighted(name):
    """"text.txt:0.7" -> ("text.txt", "0.7"); without a weight it is "1" (a file with a ":" in its name needs one)."""
    source, _, weight = name.rpartition(":")
    return (source, weight) if source and not set(weight) & set("/\\") else (name, "1")


def sources_of(names):
    """The sources of a mixture, without their weights."""
    return [weighted(name)[0] for name in names]


def evaluation_split(source, split, names):
    """What `split`, "validation" or "test", is of a source that is measured where a mixture of `names` is trained on. A
    named text has both. A file is cut in halves; where it is trained on, too, or may be (nobody knows what went into a
    .bin), only its last tenth is. Raises InputError for a .bin that is measured where others are trained on, which may
    hold the same text and are cut elsewhere."""
    names = sources_of(names)
    own, *trained = (Path(name).resolve() for name in [source, *names])
    if source.endswith(".bin") and {own} != set(trained):
        raise InputError(f"--eval-data {source} can be measured only where it alone is trained on, for other --data "
                         f"may hold the same text: give the text that it was made from")
    if source in SOURCES or own in trained or any(name.endswith(".bin") for name in names):  # as `tokens` tells them
        return split
    return {"validation": "first-half", "test": "second-half"}[split]


def evaluation_tokens(source, split, names, tokenizer, seqlen):
    """The ids of the validation or the test text, as evaluation_split cuts it."""
    if source in SOURCES and split == "test":
        return evaluation_ids(source, "test", tokenizer, seqlen)
    return tokens(source, tokenizer, evaluation_split(source, split, names))


class Mixture:
    """Training batches: windows from several streams, drawn at random as often as their weights say. Where windows
    begin moves on by the golden ratio of a stream's length, from a random place: that spreads those of a single stream
    evenly, however many there are, so most of it is read before any of it is read again (of several streams, less
    evenly)."""

    def __init__(self, names, tokenizer, seqlen, batch):
        """names: sources, each with or without `:weight`. Raises InputError for a stream shorter than one batch."""
        self.seqlen, self.streams, weights = seqlen, [], []
        for name in names:
            source, weight = weighted(name)
            try:
                weight = float(weight)
            except ValueError:
                raise InputError(f"--data {name}: the weight {weight!r} is not a number") from None
            if not 0 < weight < float("inf"):
                raise InputError(f"--data {name}: the weight must be a positive number")
            ids = tokens(source, tokenizer, "train")
            if len(ids) < batch * seqlen + 1:
                raise InputError(f"{source} has {len(ids)} tokens for training, fewer than one batch of {batch} "
                                 f"windows of {seqlen}: give a longer text, or a smaller --batch or --seqlen")
            self.streams.append(ids)
            weights.append(weight)
        self.weights, self.tokens = np.array(weights) / sum(weights), sum(map(len, self.streams))

    def batch(self, seed, step, count, stream=None):
        """ids [count, seqlen + 1], of one stream or of all. Seed and step alone decide them, so a resumed run reads
        what it would have read."""
        rows, offset, rng = [], np.random.default_rng(seed).random(), np.random.default_rng([seed, step])
        chosen = [stream] * count if stream is not None else rng.choice(len(self.streams), count, p=self.weights)
        for n, i in enumerate(chosen, step * count):  # n counts the windows of all streams
            begin = int((offset + n * GOLDEN) % 1 * (len(self.streams[i]) - self.seqlen))
            rows.append(self.streams[i][begin:begin + self.seqlen + 1].astype(np.int64))
        return torch.from_numpy(np.stack(rows))


def main():
    p = parser(__doc__)
    p.add_argument("--model", required=True,
                   help="whose tokenizer: a preset (data/hub.py lists them), a Hub id or a folder")
    p.add_argument("--data", required=True,
                   help=f"{', '.join(SOURCES)} or a file: of .jsonl and .json the \"text\" of each line, else all")
    p.add_argument("--shards", type=int, default=1,
                   help="files of C4 to take, of 1024 with about 0.17 billion tokens each")
    p.add_argument("--out", required=True, help="the .bin file")
    args = p.parse_args()
    start(args)
    if not args.out.endswith(".bin"):
        raise InputError(f"--out {args.out} must end in .bin")
    if obstacle := "it is a folder" if Path(args.out).is_dir() else what_keeps_from_writing(args.out):
        raise InputError(f"--out {args.out} can't be written: {obstacle}")
    if Path(args.out).is_file():
        raise InputError(f"--out {args.out} exists: delete it to make it anew")
    if not 1 <= args.shards <= (1024 if args.data == "c4" else 1):
        raise InputError(f"--shards {args.shards}: C4 has 1024 of them, every other text 1")
    folder = model_folder(args.model, weights=False)
    tokenizer = load_tokenizer(folder)
    made = dict(model=repository(folder), data=args.data, shards=args.shards, files=text_versions([args.data]),
                tokenizer=fingerprint(tokenizer))
    shards = [functools.partial(documents, args.data, "train", shard) for shard in range(args.shards)]
    count = write_bin(args.out, shards, tokenizer, args.data, made)
    print(f"{args.out}: {count:,} tokens, {Path(args.out).stat().st_size / 1e6:,.1f} MB")
    record(args, {"tokens": count})


if __name__ == "__main__":
    run(main, goes_on="c4" in sys.argv)  # other texts are one shard
