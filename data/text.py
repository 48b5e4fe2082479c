"""Text sources, and windows of token ids cut from them.

A source is a name below or the path of a text file; a split is "train" (calibration, training), "validation" or "test".
A file has no splits of its own, and is cut by its characters as PARTS tells. A `.jsonl` or `.json` file has a document
in the "text" of each line, any other file is one running text; a `.bin` of data/stream.py, for training, holds tokens.
"""

import filecmp
import json
import platform
import random
from functools import lru_cache
from pathlib import Path

import torch

from data.command import InputError, versions
from data.hub import PRESETS
from data.processes import progress_bar, say
from data.stdlib import stdlib_source, stdlib_text

SOURCES = ("tiny", "tiny-code", "wikitext2", "ptb", "c4")
OF_PYTHON = "tiny", "tiny-code"  # the library's documentation and source
PARTS = {  # the splits of a file: from which to which twentieth, and in words
    None: (0, 20, ""), "train": (0, 18, "the first nine tenths of "), "held-out": (18, 20, "the last tenth of "),
    "validation": (18, 19, "the first half of the last tenth of "), "test": (19, 20, "the last twentieth of "),
    # of one that is not for training: for validation, for the test
    "first-half": (0, 10, "the first half of "), "second-half": (10, 20, "the second half of ")}


def hub_rows(path, name=None, split="train", file=None, revision=None,
             instead="text files in place of named texts (--data, --calib, --eval-data)"):
    """The rows of a Hub data set, or of one file of it. Raises InputError where it can't be had, with what to give
    `instead`."""
    import datasets
    import huggingface_hub
    huggingface_hub.logging.set_verbosity_error()  # what goes wrong is said once, below
    datasets.disable_progress_bars()
    try:
        if not file:
            return datasets.load_dataset(path, name, split=split)
        # fetched by itself: `datasets` does not find again without a network what it has been given as data_files
        local = huggingface_hub.hf_hub_download(path, file, repo_type="dataset", revision=revision)
        return datasets.load_dataset("parquet" if file.endswith("parquet") else "json", data_files=local, split=split)
    except Exception as e:  # the Hub's client raises a family of errors that changes between versions
        absent = isinstance(e, (ConnectionError, huggingface_hub.errors.LocalEntryNotFoundError))
        reason = "the Hub is out of reach" if absent else getattr(e, "strerror", None) or type(e).__name__
        raise InputError(f"the data set {path} is not in the cache and can't be fetched ({reason}): "
                         f"without a network, give {instead}") from None


def text_versions(sources):
    """What tells that one of those texts is another by now: `versions` of files, and Python's where the text is its."""
    return versions(sources) + [[f"{name}, by Python's version", platform.python_version()]
                                for name in sources if name in OF_PYTHON]


def json_lines(path):
    """The "text" of every line of a file that is not blank. Raises InputError that names the line where there is none.
    """
    texts = []
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:  # half a character, which JSON can name, becomes "?"
                texts += [json.loads(line)["text"].encode(errors="replace").decode()] if line.strip() else []
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
                why = f" ({e})" if isinstance(e, ValueError) else '; each line is one object with a "text"'
                raise InputError(f"{path}, line {number}: no JSON object with a \"text\"{why}") from None
    return texts


def running_text(path):
    """A file's text. Windows' line ends become "\\n": models have seldom seen others. Raises InputError where it is not
    UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise InputError(f"{path} is not UTF-8 text ({e.reason} at byte {e.start}): give a text file") from None
    if "\0" in text:  # UTF-16 without its mark reads like this
        raise InputError(f"{path} is not UTF-8 text (it holds zero bytes): give a text file")
    return text.replace("\r\n", "\n")


def documents(source, split, shard=0):
    """The documents of a source as a list of texts; a running text is a single one. shard: which file of C4's 1024."""
    assert split in PARTS, split
    if source not in SOURCES:
        return file_documents(source, split)
    split = split or "test"
    if source == "tiny":
        return [stdlib_text(split)]
    if source == "tiny-code":
        return [stdlib_source(split)]
    if source == "wikitext2":  # rows as the Hub serves them joined by "\n\n": the protocol of the papers
        return ["\n\n".join(hub_rows("Salesforce/wikitext", "wikitext-2-raw-v1", split)["text"])]
    if source == "ptb":  # Penn Treebank, joined as the papers do; the branch with files, because main holds a script
        rows = hub_rows("ptb-text-only/ptb_text_only", file=f"penn_treebank/{split}/0000.parquet",
                        revision="refs/convert/parquet")
        return [" ".join(rows["sentence"])]
    name, shards = ("train", 1024) if split == "train" else ("validation", 8)
    return hub_rows("allenai/c4", file=f"en/c4-{name}.{shard:05d}-of-{shards:05d}.json.gz")["text"]


def file_documents(source, split):
    """`documents` of a file."""
    path = Path(source)
    kind = path.suffix.lower()
    if kind == ".bin":
        raise InputError(f"{source} holds tokens for ast_train.py: give the text that it was made from")
    if not path.is_file():
        raise InputError(f"no text source {source!r}: give a text file or one of {', '.join(SOURCES)}")
    texts = json_lines(path) if kind in (".jsonl", ".json") else [running_text(path)]
    begin, end = part_of(sum(map(len, texts)), split)
    found, at = [], 0
    for text in texts:
        found.append(text[max(0, begin - at):max(0, end - at)])
        at += len(text)
    return [text for text in found if text]


def part_of(length, split):
    """The begin and the end of a split, of so many characters or tokens of a file."""
    return [length * twentieths // 20 for twentieths in PARTS[split][:2]]


def usual_text(folder, otherwise):
    """The text of a model's folder where none is asked for: "tiny" if it has the tokenizer of the model that ships."""
    ours, theirs = Path(PRESETS["tiny"], "tokenizer.model"), Path(folder, "tokenizer.model")
    return "tiny" if theirs.is_file() and filecmp.cmp(ours, theirs, shallow=False) else otherwise


def load_text(source, split=None):
    """A source's text as one string. Raises InputError if there is none."""
    found = documents(source, split)
    if source == "c4":  # the papers test on the first 1,100 documents of what C4 calls validation; ours are the next
        found = [" ".join(found[1100:2200] if split == "validation" else found[:1100])]
    text = "\n\n".join(found)
    if not text.strip():
        raise InputError(f"the text of {source} is empty")
    return text


def told(source, split):
    """What is read of a source, in words."""
    if source in SOURCES:
        return f"the validation text of {source}" if split == "validation" else source
    return PARTS[split][2] + source


def evaluation_ids(source, split, tokenizer, seqlen):
    """The ids of the text that perplexity is measured on: of C4 the first 256 windows, as the papers do, else all."""
    if source in SOURCES and split not in (None, "validation", "test"):
        raise InputError(f"--split {split} is a part of a file: of {source} there are validation and test")
    ids = tokenizer.encode(load_text(source, split))
    check_length(ids, seqlen, f"the evaluation text, {told(source, split)},")
    return ids[:256 * seqlen] if source == "c4" else ids


def check_length(ids, seqlen, name):
    """Raise InputError, which names the text, where its ids fill no window."""
    if len(ids) < seqlen:
        raise InputError(f"{name} has {len(ids)} tokens, fewer than one window of {seqlen}: "
                         f"give a longer text or a smaller --seqlen")


def windows(ids, seqlen: int, name: str = "the text") -> torch.Tensor:
    """Token ids -> non-overlapping windows [n, seqlen]; the tail that fills none is dropped. Raises InputError, which
    names the text, where there is no window."""
    check_length(ids, seqlen, name)
    n = len(ids) // seqlen
    return torch.as_tensor(ids[:n * seqlen]).long().view(n, seqlen)


def calibration_windows(source: str, tokenizer, nsamples: int, seqlen: int, seed: int) -> torch.Tensor:
    """`nsamples` random windows [nsamples, seqlen] from the training split of a source, each within one document."""
    texts, rng = documents(source, "train"), random.Random(seed)
    if not any(text.strip() for text in texts):
        raise InputError(f"{source} is empty, or too short to calibrate on a part of it: give another text")
    encode = lru_cache(16)(lambda i: tokenizer.encode(texts[i]))  # a few long documents once, not for every window
    if len(texts) == 1 and seqlen <= len(encode(0)) < nsamples * seqlen:
        say(f"note: {source} has {len(encode(0)):,} tokens to calibrate on, so that {nsamples} windows of {seqlen} "
            f"overlap")
    samples, short, longest = [], set(), 0
    with progress_bar(total=nsamples, desc="calibration text", unit="window") as bar:
        while len(samples) < nsamples:
            if (i := rng.randrange(len(texts))) in short:
                continue
            ids = encode(i)
            if len(ids) >= seqlen:
                begin = rng.randint(0, len(ids) - seqlen)
                samples.append(ids[begin:begin + seqlen])
                bar.update()
                continue
            short.add(i)
            longest = max(longest, len(ids))
            if len(short) == len(texts):
                text = (f"no document of the calibration text {source} is long enough: the longest" if len(texts) > 1
                        else f"the part of {source} to calibrate on")
                raise InputError(f"{text} has {longest} tokens, fewer than one window of --seqlen {seqlen}: give a "
                                 f"longer text or a smaller --seqlen")
    return torch.tensor(samples)
