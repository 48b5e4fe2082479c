"""How a model comes from a Hugging Face folder and goes to one.

A checkpoint is under its family's own names (data/checkpoint.py): what is saved here loads in `transformers` and the
other way round. Blocks can be read one at a time (`stream=True`), so a model may be larger than memory.
"""

import copy
from pathlib import Path

import torch

from data.checkpoint import Checkpoint
from data.command import InputError, told_bytes
from data.config import Config
from data.device import free_memory
from data.hub import model_folder
from data.writer import CheckpointWriter


class Pretrained:
    """What gpt.py's GPT does with checkpoints. A model that comes from one knows `source`, the folder opened for
    reading, and `place`, the device and dtype of what is read; `streams`: its blocks stay on disk; `sparse`: its 2:4
    layers are compressed as they are read."""

    source, place, streams, sparse = None, {}, False, False

    @classmethod
    def open(cls, name_or_dir: str | Path) -> "Pretrained":
        """A preset's, a Hub id's or a folder's model without its weights: on the meta device, `source` is the folder
        opened for reading. Raises InputError where a tensor is missing, superfluous or of another shape."""
        config = Config.read(model_folder(name_or_dir, weights=False))  # before tens of gigabytes are fetched in vain
        with torch.device("meta"):
            model = cls(config)
        model.source = Checkpoint(model_folder(name_or_dir), config.raw)
        if model.source.compressed:
            from compressed import expect_compressed  # here: only such checkpoints need Triton
            expect_compressed(model, model.source.stored)
        model.source.match(model.tensors())
        return model

    @classmethod
    def from_pretrained(cls, name_or_dir: str | Path, device="cpu", dtype: torch.dtype | None = None,
                        stream: bool = False, sparse: bool = False) -> "Pretrained":
        """Load a preset, a Hub id or a Hugging Face folder. dtype None: the checkpoint's own on a GPU, float32 on a
        CPU. stream=True leaves the blocks on disk for `blocks()` to read one by one, to this device and in this dtype
        whatever `to()` does; sparse=True keeps 2:4 layers compressed in memory (a folder written by save_compressed of
        compressed.py is so in any case).
        Raises InputError where a tensor is missing, superfluous, of another shape or not finite, or memory is short."""
        model = cls.open(name_or_dir)
        if dtype is None:
            on_cpu = torch.device(device).type == "cpu"
            dtype = torch.float32 if on_cpu else model.source.stored("model.embed_tokens.weight")
        model.streams, model.sparse, model.place = stream, sparse, dict(device=device, dtype=dtype)
        if not stream:
            need = model.source.size(dtype) // (2 if sparse and not model.source.compressed else 1)  # 2:4: about half
            if need > (free := free_memory(torch.device(device))):
                raise InputError(f"{name_or_dir} takes {told_bytes(need)} of memory, and {told_bytes(free)} are free "
                                 f"on {device}: take a smaller or a compressed model, or a larger machine")
        for name, part in model.model.items():
            if name != "layers":
                model.source.load(part, f"model.{name}", **model.place)
        if model.config.tie_word_embeddings:
            model.source.check_tied_head()
            model.tie()
        else:
            model.source.load(model.lm_head, "lm_head", **model.place)
        if not stream:
            for i, block in enumerate(model.model.layers):
                model.load_block(block, i)
        if sparse and not stream and not any(name.endswith(".values") for name in model.state_dict()):
            from compressed import none_is_24
            raise none_is_24(name_or_dir)
        return model.eval()

    def load_block(self, block, i):
        """Fill block i, which is on the meta device, from the checkpoint."""
        self.source.load(block, f"model.layers.{i}", **self.place)
        if self.sparse:
            from compressed import sparsify  # here: dense models don't need Triton
            sparsify(block)

    def block(self, i):
        """Block i; a streamed model reads it from disk and does not keep it."""
        if not self.streams:
            return self.model.layers[i]
        block = copy.deepcopy(self.model.layers[i])  # on the meta device
        self.load_block(block, i)
        return block

    def blocks(self):
        """The blocks in order, each read when its turn comes."""
        return map(self.block, range(self.config.num_hidden_layers))

    def tensors(self):
        """{name: tensor} that a checkpoint holds: all but a tied head, which is the embedding."""
        tied = ["lm_head.weight"] if self.config.tie_word_embeddings else []
        return {name: tensor for name, tensor in self.state_dict().items() if name not in tied}

    def save_pretrained(self, dir: str | Path, tokenizer_from: str | Path | None = None):
        """Write a Hugging Face folder: config.json, model.safetensors, and the tokenizer files of another folder
        (None: of the one that the model was loaded from). What this program has written there before is replaced.
        Raises InputError for a streamed model, one in training by ast_train.py, and one without a config.json."""
        if self.streams:
            raise InputError(f"the blocks of a streamed model are not in memory: load {self.source.folder} whole to "
                             f"save it as {dir}")
        raw, tensors = self.config.raw, self.tensors()
        if not raw:
            raise InputError(f"a model without a config.json can't be saved as {dir}: make its Config by from_dict")
        if any(name.endswith(".mask") for name in tensors):
            raise InputError(f"layers in training can't be saved as {dir}: `merge` them, or take ast_loop.save_model")
        key = "dtype" if "dtype" in raw else "torch_dtype"  # the name that transformers 5 or 4 gives it
        with CheckpointWriter(dir, raw | {key: str(self.lm_head.weight.dtype).removeprefix("torch.")},
                              tokenizer_from or (self.source and self.source.folder)) as out:
            out.write("model.safetensors", tensors)
