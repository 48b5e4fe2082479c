"""Tokenizers read from a Hugging Face folder: SentencePiece (`tokenizer.model`) or byte-level BPE (`tokenizer.json`)."""

import json

from data.command import InputError
from data.hub import model_folder


class SentencePiece:
    """LLaMA 1 and 2, TinyLlama, Mistral: `tokenizer.model`. BOS is put before every text."""

    def __init__(self, path):
        from sentencepiece import SentencePieceProcessor
        try:
            self.model = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as e:
            raise InputError(f"{path} is not a SentencePiece model: {e}") from None
        self.vocab_size, self.bos = self.model.vocab_size(), self.model.bos_id()

    def encode(self, text):
        """text -> list of ids, BOS first."""
        return [self.bos] + self.model.encode(text)

    def decode(self, ids):
        """ids -> text, special tokens left out."""
        return self.model.decode([i for i in ids if not self.model.is_control(i)])


def load_tokenizer(name_or_dir):
    """The tokenizer of a preset, a Hub id or a folder: an object with .encode(text) -> list[int], .decode(ids) -> str."""
    folder = model_folder(name_or_dir, weights=False)
    if (folder / "tokenizer.model").is_file():
        return SentencePiece(folder / "tokenizer.model")
    raise InputError(f"{folder} has no tokenizer: tokenizer.model is missing")
