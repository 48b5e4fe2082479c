"""Tokenizers read from a Hugging Face folder, with the ids that the models' own tokenizers give.

`tokenizer.model` is SentencePiece (LLaMA 1 and 2, Vicuna, Mistral, TinyLlama). Folders without one have a
`tokenizer.json` (LLaMA 3, Qwen, SmolLM) or GPT-2's `vocab.json` and `merges.txt` (OPT, too), which the `tokenizers`
library computes.
"""

import json
import re
from pathlib import Path

from data.command import InputError
from data.hub import model_folder

ROLES = ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"]


def read_json(path):
    """The content of a JSON file, {} where there is no file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
        return found
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path} is damaged ({e}); fetch it again") from None


def content(token):
    """What a token looks like, which files write plainly or with its properties beside it."""
    return token["content"] if isinstance(token, dict) else token


def small_files(folder):
    """What tokenizer_config.json and special_tokens_map.json say, and {"bos_token": what it looks like, ...}."""
    said = read_json(folder / "special_tokens_map.json") | read_json(folder / "tokenizer_config.json")
    return said, {role: content(said[role]) for role in ROLES if said.get(role)}


def added_tokens(folder, config):
    """{id: what it looks like and its other properties} of the tokens that small files add to a model's own."""
    added = {i: dict(content=token, normalized=True) for token, i in read_json(folder / "added_tokens.json").items()}
    return added | {int(i): token for i, token in config.get("added_tokens_decoder", {}).items()}


def eos_ids(path):
    """The ids of EOS that a JSON file names, the usual one first; [] where it names none."""
    said = read_json(path).get("eos_token_id")
    ids = said if isinstance(said, list) else [] if said is None else [said]
    if not all(type(i) is int for i in ids):
        raise InputError(f"{path}: eos_token_id {said!r} is no id, nor a list of some")
    return ids


def end_tokens(folder):
    """The ids after which a text of the model is at its end: those of generation_config.json, else of config.json."""
    return set(eos_ids(folder / "generation_config.json") or eos_ids(folder / "config.json"))


class SentencePiece:
    """`tokenizer.model`. BOS comes first unless tokenizer_config.json says otherwise. Recognised in a text are the
    tokens that the folder adds to the model's, calls special (Mistral's [INST]) or gives a role ("<unk>", of which Penn
    Treebank is full); where nothing stands beside the model, "<s>" is plain text."""

    def __init__(self, path):
        from sentencepiece import SentencePieceProcessor
        try:
            self.model = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as e:
            raise InputError(f"{path} is not a SentencePiece model: {e}") from None
        (config, roles), own = small_files(path.parent), self.model.vocab_size()
        self.bos, eos = self.model.bos_id(), self.model.eos_id()
        begin = self.model.id_to_piece(self.bos) if self.bos >= 0 else None
        if config.get("add_prefix_space") is False or roles.get("bos_token", begin) != begin:
            raise InputError(f"{path} begins a text otherwise than tokenizer_config.json asks (add_prefix_space, "
                             f"bos_token): add the model's tokenizer.json")
        listed = added_tokens(path.parent, config)
        for token in listed.values():
            if odd := [name for name in ("lstrip", "rstrip", "single_word") if token.get(name)]:
                raise InputError(f"{path} does not tell how {token['content']!r} takes spaces along, as "
                                 f"tokenizer_config.json asks ({', '.join(odd)}): add the model's tokenizer.json")
        self.added = {token: i for token in roles.values()
                      if self.model.id_to_piece(i := self.model.piece_to_id(token)) == token}
        self.added |= {token["content"]: i for i, token in listed.items() if i >= own or token.get("special")}
        self.cut = re.compile("|".join(map(re.escape, sorted(self.added, key=len, reverse=True))) or "(?!)")
        self.vocab_size = max([own, *(i + 1 for i in self.added.values())])
        self.end = [eos] if eos >= 0 else []
        self.legacy = config.get("legacy") is True
        self.first = [self.bos] if config.get("add_bos_token", True) and self.bos >= 0 else []
        self.last = self.end if config.get("add_eos_token", False) else []

    def encode(self, text):
        """text -> list of ids, BOS first."""
        ids, end = list(self.first), 0
        for found in self.cut.finditer(text):
            ids += [*self._piece(text[end:found.start()], end), self.added[found.group()]]
            end = found.end()
        return ids + self._piece(text[end:], end) + self.last

    def _piece(self, text, begin):
        """The ids of what follows an added token, or of the text's `begin` 0, where alone SentencePiece's space stands
        (in folders that ask for "legacy", before each piece that has none)."""
        if begin == 0 or not text:
            return self.model.encode(text)
        text = " " * (self.legacy and text[0] != " ") + text
        return self.model.encode("\n" + text)[len(self.model.encode("\n")):]

    def decode(self, ids):
        """ids -> text; special and added tokens, and ids with which a model's vocabulary is padded, are left out."""
        model, own = self.model, self.model.vocab_size()
        return model.decode([i for i in ids if i < own and not (model.is_control(i) or model.is_unknown(i))])


class HubTokenizer:
    """A tokenizer of the `tokenizers` library, `model`. end: [id of EOS], [] where there is none."""

    def __init__(self, model, end):
        model.no_truncation()
        model.no_padding()
        marked = model.encode("a")
        text = [i for i, sequence in enumerate(marked.sequence_ids) if sequence is not None]
        self.first, self.last = (marked.ids[:text[0]], marked.ids[text[-1] + 1:]) if text else (marked.ids, [])
        self.vocab_size = max(model.get_vocab().values()) + 1
        self.model, self.end = model, end

    def encode(self, text):
        """text -> list of ids, with BOS where the model's own tokenizer puts it."""
        return self.model.encode(text).ids

    def decode(self, ids):
        """ids -> text; special tokens, and ids with which a model's vocabulary is padded, are left out."""
        return self.model.decode(ids)


def add_tokens(model, folder, config, roles):
    """Let a `tokenizers` model recognise the tokens that a folder's small files add to its own."""
    from tokenizers import AddedToken
    known = {token.content: token for token in model.get_added_tokens_decoder().values()}  # with their properties
    for i, token in sorted(added_tokens(folder, config).items()):
        if "special" in token or token["content"] not in known:  # added_tokens.json tells no properties
            known[token["content"]] = AddedToken(**token)
        token = known[token["content"]]
        (model.add_special_tokens if token.special else model.add_tokens)([token])
        if model.token_to_id(token.content) != i:
            raise InputError(f"{folder}: the added token {token.content!r} is to be {i}, but the vocabulary makes it "
                             f"{model.token_to_id(token.content)}")
    special = [*roles.values(), *map(content, config.get("additional_special_tokens") or [])]
    model.add_special_tokens([known.get(token, token) for token in special if model.token_to_id(token) is not None])


def gpt2_tokenizer(folder, config, roles):
    """The tokenizer of vocab.json and merges.txt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    kind = config.get("tokenizer_class") or "GPT2Tokenizer"
    if not kind.startswith("GPT2"):
        raise InputError(f"{folder}: tokenizer.json is missing, and vocab.json does not describe a {kind}")
    model = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=config.get("add_prefix_space", False))
    model.decoder = decoders.ByteLevel()
    add_tokens(model, folder, config, roles)
    bos, eos = ([roles[f"{name}_token"]] if config.get(f"add_{name}_token") else [] for name in ("bos", "eos"))
    if bos + eos:
        model.post_processor = processors.TemplateProcessing(
            single=[*bos, "$A", *eos], special_tokens=[(token, model.token_to_id(token)) for token in {*bos, *eos}])
    return model


def load_hub_tokenizer(folder):
    """A HubTokenizer from tokenizer.json, else from vocab.json and merges.txt."""
    from tokenizers import Tokenizer
    (config, roles), path = small_files(folder), folder / "tokenizer.json"
    try:
        if path.is_file():
            model = Tokenizer.from_file(str(path))
            add_tokens(model, folder, config, roles)
        else:
            path = folder / "vocab.json"
            roles = dict.fromkeys(["bos_token", "eos_token", "unk_token"], "<|endoftext|>") | roles
            model = gpt2_tokenizer(folder, config, roles)
        end = model.token_to_id(roles["eos_token"]) if "eos_token" in roles else None
        # GPT-2's small files leave it to config.json
        return HubTokenizer(model, eos_ids(folder / "config.json")[:1] if end is None else [end])
    except InputError:
        raise
    except Exception as e:  # the library raises nothing more special, whatever is damaged
        raise InputError(f"{path} is not a tokenizer: {type(e).__name__} {e}") from None


def encode_open(tokenizer, text):
    """The ids of a text that goes on: without the EOS that some tokenizers put after each."""
    ids = tokenizer.encode(text)
    return ids[:len(ids) - len(tokenizer.last)]


def load_tokenizer(name_or_dir: str | Path):
    """The tokenizer of a preset, a Hub id or a folder, which needs no model beside it: .encode(text) -> list[int],
    .decode(ids) -> str."""
    holds = "config.json", "tokenizer.model", "tokenizer.json", "vocab.json"
    folder = model_folder(name_or_dir, weights=False, holds=holds)
    files = {path.name for path in folder.iterdir()}
    if "tokenizer.model" in files:
        try:
            return SentencePiece(folder / "tokenizer.model")
        except InputError:
            if "tokenizer.json" not in files:
                raise
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise InputError(f"{folder}: the small files beside tokenizer.model are damaged ({type(e).__name__} {e}); "
                             f"fetch them again") from None
    if "tokenizer.json" in files or {"vocab.json", "merges.txt"} <= files:
        return load_hub_tokenizer(folder)
    raise InputError(f"{folder} has no tokenizer: no tokenizer.model, no tokenizer.json, no vocab.json and merges.txt")
