"""Tokenizers read from a Hugging Face folder, with the ids that the models' own tokenizers give.

`tokenizer.model` is SentencePiece (LLaMA 1 and 2, Vicuna, Mistral, TinyLlama). Else it is byte-level BPE (GPT-2, OPT,
LLaMA 3, Qwen, SmolLM) in four steps, all described by `tokenizer.json`: added tokens such as <|endoftext|> are cut out;
the rest is normalized or not; regular expressions cut it into pieces; tiktoken merges the bytes of each piece.
"""

import functools
import json
import unicodedata
from pathlib import Path

from data.command import InputError
from data.hub import model_folder

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def read_json(path):
    """The content of a JSON file, {} where there is no file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
        return found
    except ValueError as e:
        raise InputError(f"{path} is damaged ({e}); fetch it again") from None


class SentencePiece:
    """`tokenizer.model`. BOS comes first unless tokenizer_config.json says otherwise; "<s>" in a text is plain text."""

    def __init__(self, path):
        from sentencepiece import SentencePieceProcessor
        try:
            self.model = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as e:
            raise InputError(f"{path} is not a SentencePiece model: {e}") from None
        self.vocab_size, self.bos = self.model.vocab_size(), self.model.bos_id()
        self.first = [self.bos] if read_json(path.with_name("tokenizer_config.json")).get("add_bos_token", True) else []
        self.last, self.end = [], [i for i in [self.model.eos_id()] if i >= 0]

    def encode(self, text):
        """text -> list of ids, BOS first."""
        return self.first + self.model.encode(text)

    def decode(self, ids):
        """ids -> text; special tokens, and ids with which a model's vocabulary is padded, are left out."""
        model = self.model
        return model.decode([i for i in ids if i < self.vocab_size and not model.is_control(i) | model.is_unknown(i)])


def byte_characters():
    """{character: byte}: how GPT-2's files write bytes. A printable one is itself, the others are 256, 257, ..."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE = byte_characters()


def to_bytes(token):
    return bytes(BYTE[c] for c in token)


def splits_of(pre_tokenizer, path):
    """The pre-tokenizer of a tokenizer.json as regular expressions that cut a text one after the other, each isolating
    its matches; and whether a space is put before the text."""
    patterns, prefix_space = [], False
    for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
        kind = step.get("type")
        if kind == "ByteLevel":
            patterns += [GPT2_SPLIT] if step.get("use_regex", True) else []
            prefix_space |= step.get("add_prefix_space", False)
        elif kind == "Digits":
            patterns.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        elif kind == "Split" and "Regex" in step["pattern"] and step["behavior"] == "Isolated":
            patterns.append(step["pattern"]["Regex"])
        else:
            raise InputError(f"{path}: the pre-tokenizer {json.dumps(step)} is not supported")
    return patterns, prefix_space


def isolate(pattern, text):
    """Cut a text into the matches of a pattern and what lies between them."""
    end = 0
    for match in pattern.finditer(text):
        if match.start() > end:
            yield text[end:match.start()]
        if match.end() > match.start():
            yield match.group()
        end = match.end()
    if end < len(text):
        yield text[end:]


class ByteBPE:
    """Byte-level BPE. vocab {token: id} and merges [(left, right)] in GPT-2's spelling, best merge first; splits:
    regular expressions; added {content: {"id", "special", ...}}: tokens recognised in the text before anything else;
    first and last: ids put around every text; end: [the id of EOS] or []; unknown: the id of a byte that the vocabulary
    lacks (None: such bytes are dropped); whole: a piece that is a token is not merged, whatever the merges say."""

    def __init__(self, vocab, merges, splits, added, first=(), last=(), end=(), unknown=None, nfc=False,
                 prefix_space=False, whole=False):
        import regex  # tiktoken's own dependency: Unicode classes such as \p{L}
        from tiktoken import Encoding
        # tiktoken numbers tokens by the order of merges, bytes first; the model's ids need not follow it (OPT's do not)
        ranks, tokens = {bytes([b]): b for b in range(256)}, sorted(BYTE, key=BYTE.get)
        for left, right in merges:
            if ranks.setdefault(to_bytes(left + right), len(ranks)) == len(tokens):  # not yet made by a better merge
                tokens.append(left + right)
        self.merge = Encoding("merges", pat_str="(?s:.+)", mergeable_ranks=ranks, special_tokens={})
        self.ids = [vocab.get(token, unknown) for token in tokens]
        self.splits = [regex.compile(pattern) for pattern in splits]
        self.nfc, self.prefix_space = nfc, prefix_space
        self.first, self.last, self.end = list(first), list(last), list(end)
        self.added = {content: token["id"] for content, token in added.items()}

        def found(content):  # some are no part of a word, some take the whitespace around them along
            token, text = added[content], regex.escape(content)
            text = rf"(?<!\w){text}(?!\w)" if token.get("single_word") else text
            return r"\s*" * token.get("lstrip", False) + text + r"\s*" * token.get("rstrip", False)

        self.cut = regex.compile("|".join(map(found, sorted(added, key=len, reverse=True))) or "(?!)")  # longest first

        self.texts = {i: to_bytes(token) for token, i in vocab.items() if set(token) <= BYTE.keys()}  # {id: bytes}
        self.whole = {text: i for i, text in self.texts.items()} if whole else {}
        self.texts |= {token["id"]: b"" if token.get("special") else t.encode() for t, token in added.items()}
        self.vocab_size = max(self.texts) + 1
        self.piece = functools.lru_cache(maxsize=2**17)(self.piece)  # most pieces of a text are words seen before

    def piece(self, text):
        """The ids of one piece."""
        if text.encode() in self.whole:
            return [self.whole[text.encode()]]
        return [self.ids[rank] for rank in self.merge.encode_ordinary(text) if self.ids[rank] is not None]

    def plain(self, text):
        """The ids of a text without added tokens."""
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        if self.prefix_space and text and not text.startswith(" "):
            text = " " + text
        pieces = [text] if text else []
        for pattern in self.splits:
            pieces = [part for piece in pieces for part in isolate(pattern, piece)]
        return [i for piece in pieces for i in self.piece(piece)]

    def encode(self, text):
        """text -> list of ids, with BOS where the model's own tokenizer puts it."""
        ids, end = list(self.first), 0
        for match in self.cut.finditer(text):
            found = match.group()
            ids += self.plain(text[end:match.start()])
            ids.append(self.added[found] if found in self.added else self.added[found.strip()])
            end = match.end()
        return ids + self.plain(text[end:]) + self.last

    def decode(self, ids):
        """ids -> text; special tokens, and ids with which a model's vocabulary is padded, are left out."""
        return b"".join(self.texts.get(i, b"") for i in ids).decode("utf-8", errors="replace")


def added_tokens(tokenizer, config, named, vocab):
    """{content: {"id", "special", ...}} of the tokens that are cut out of a text: those that tokenizer.json or
    tokenizer_config.json lists, and those with a role such as bos_token."""
    added = {token["content"]: {**token, "id": int(i)} for i, token in config.get("added_tokens_decoder", {}).items()}
    added |= {token["content"]: token for token in tokenizer.get("added_tokens", [])}
    for content in named.values():
        if content in added or content in vocab:
            added[content] = {"id": vocab.get(content), **added.get(content, {}), "special": True}
    return added


def template(post_processor):
    """The ids that a tokenizer.json puts before and after a text."""
    around = ([], [])
    for step in post_processor.get("processors", [post_processor]) if post_processor else []:
        if step["type"] == "TemplateProcessing":
            side = 0
            for part in step["single"]:
                if "Sequence" in part:
                    side = 1
                else:
                    around[side].extend(step["special_tokens"][part["SpecialToken"]["id"]]["ids"])
        elif step["type"] != "ByteLevel":
            raise InputError(f"a tokenizer's post-processor {step['type']} is not supported")
    return around


def load_byte_bpe(folder):
    """A ByteBPE from tokenizer.json, else from GPT-2's vocab.json and merges.txt."""
    path, config = folder / "tokenizer.json", read_json(folder / "tokenizer_config.json")
    tokenizer, roles = read_json(path), read_json(folder / "special_tokens_map.json") | config
    add_bos = False  # tokenizer.json says it in its post-processor
    try:
        if not tokenizer:
            path, kind = folder / "vocab.json", config.get("tokenizer_class") or "GPT2Tokenizer"
            if not kind.startswith("GPT2"):
                raise InputError(f"{folder}: tokenizer.json is missing, and vocab.json does not describe a {kind}")
            lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
            merges = [line for line in lines if line and not line.startswith("#version")]
            tokenizer = {"model": {"vocab": read_json(path), "merges": merges}, "pre_tokenizer": {
                "type": "ByteLevel", "add_prefix_space": config.get("add_prefix_space", False)}}
            roles = dict.fromkeys(["bos_token", "eos_token", "unk_token"], "<|endoftext|>") | roles
            add_bos = config.get("add_bos_token", False)
        model, normalizer = tokenizer["model"], tokenizer.get("normalizer") or {"normalizers": []}
        steps = normalizer.get("normalizers", [normalizer])
        if model.get("type", "BPE") != "BPE" or '"ByteLevel"' not in json.dumps(tokenizer["pre_tokenizer"]):
            raise InputError(f"{path} is no byte-level BPE, the only kind besides SentencePiece that is supported")
        if any(step["type"] != "NFC" for step in steps):
            raise InputError(f"{path}: the normalizer {json.dumps(normalizer)} is not supported")
        named = {role: token["content"] if isinstance(token, dict) else token for role, token in roles.items()
                 if role in ("bos_token", "eos_token", "unk_token", "pad_token") and token}
        added = added_tokens(tokenizer, config, named, model["vocab"])
        first, last = template(tokenizer.get("post_processor"))
        if add_bos:
            first = [added[named["bos_token"]]["id"]]
        end = [added[named["eos_token"]]["id"]] if named.get("eos_token") in added else []
        splits, prefix_space = splits_of(tokenizer["pre_tokenizer"], path)
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        return ByteBPE(model["vocab"], merges, splits, added, first, last, end, nfc=bool(steps),
                       prefix_space=prefix_space, unknown=model["vocab"].get(model.get("unk_token")),
                       whole=model.get("ignore_merges", False))
    except InputError:
        raise
    except Exception as e:  # whatever a damaged one leads to, a bad regular expression, too
        raise InputError(f"{path} is not a tokenizer: {type(e).__name__} {e}") from None


def load_tokenizer(name_or_dir: str | Path):
    """The tokenizer of a preset, a Hub id or a folder: .encode(text) -> list[int], .decode(ids) -> str."""
    folder = model_folder(name_or_dir, weights=False)
    files = {path.name for path in folder.iterdir()}
    if "tokenizer.model" in files:
        return SentencePiece(folder / "tokenizer.model")
    if "tokenizer.json" in files or {"vocab.json", "merges.txt"} <= files:
        return load_byte_bpe(folder)
    raise InputError(f"{folder} has no tokenizer: no tokenizer.model, no tokenizer.json, no vocab.json and merges.txt")
