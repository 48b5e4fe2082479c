"""A model whose 2:4 layers are compressed (sparse_matmul.py): the layer, and the folder on disk.

Such a folder holds `X.values`, `X.meta` (and `X.scale`) in place of `X.weight` for each 2:4 layer X, as laid out in
sparse_matmul.py; `transformers` can't read it. The command that writes one is

    python sparse_matmul.py --model out/llama2-7b-wanda-dsnot-2of4 --bits 8 --out out/small
"""

import copy

import torch
import torch.nn as nn

from data.command import InputError, versions
from data.hub import repository
from data.writer import CheckpointWriter, noted, shard
from gpt import GPT, prunable, slorb
from sparse_matmul import Sparse24, compress, crowded, sparse_linear


class SparseLinear24(nn.Module):
    """An nn.Linear or SlorbLinear with a compressed weight; what it holds is what a compressed folder stores."""

    def __init__(self, w, linear):
        super().__init__()
        self.shape = w.shape
        for name in ("values", "meta", "scale"):
            self.register_buffer(name, getattr(w, name))
        for name in ("bias", "slorb_S", "slorb_X"):
            self.register_parameter(name, getattr(linear, name, None))

    def forward(self, x):
        y = sparse_linear(x, Sparse24(self.values, self.meta, self.shape, self.scale), self.bias)
        return y if self.slorb_S is None else y + slorb(x, self.slorb_S, self.slorb_X)


def sparsify(block: nn.Module, bits: int | None = None) -> int:
    """Replace each prunable layer of a block that is 2:4, K a multiple of 16, by its compressed form; count them."""
    found = {name: layer for name, layer in prunable(block).items()
             if layer.in_features % 16 == 0 and not crowded(layer.weight).any()}
    for name, layer in found.items():
        block.set_submodule(name, SparseLinear24(compress(layer.weight, bits), layer))
    return len(found)


def none_is_24(model):
    return InputError(f"{model}: no linear layer of the blocks is 2:4 with a multiple of 16 inputs: give one that was "
                      f"pruned with --pattern 2:4")


def expect_compressed(model: nn.Module, stored):
    """Prepare a model on the meta device for a checkpoint; stored(name) is the dtype of that tensor, or None. Where
    X.values is stored, layer X becomes an empty SparseLinear24 of that kind."""
    for name, layer in prunable(model).items():
        if (dtype := stored(f"{name}.values")) is not None:
            N, K = layer.weight.shape
            scaled = dtype in (torch.int8, torch.uint8)
            w = Sparse24(torch.empty(N, K // (4 if dtype == torch.uint8 else 2), dtype=dtype, device="meta"),
                         torch.empty(N, K // 16, dtype=torch.int16, device="meta"), (N, K),
                         torch.empty(N, -(-K // 128), device="meta") if scaled else None)
            model.set_submodule(name, SparseLinear24(w, layer))


def save_compressed(model: str, folder, bits: int | None = None) -> dict:
    """Write a checkpoint (a preset, a Hub id or a folder) again as `folder` with its 2:4 layers compressed, a block at
    a time. Returns {layers: how many, before, after: bytes on disk}. Raises InputError if no layer is 2:4."""
    on_disk = GPT.open(model)
    source = on_disk.source
    if source.compressed:
        raise InputError(f"{model} is compressed already: give the folder that it was made from")
    made = dict(command="sparse_matmul.py", model=repository(source.folder), bits=bits, files=versions(source.parts()))
    out = CheckpointWriter(folder, source.raw, source.folder, made=made, goes_on=False)
    if out.differs:
        raise InputError(f"{folder} holds a compressed model, which differs in {out.differs}: choose another --out, or "
                         f"delete it")
    if noted(out.folder / "run.json") != out.made:  # else it is finished
        with out:
            write_compressed(out, on_disk, bits, model)
    small = GPT.open(folder).source
    before, after = (sum(path.stat().st_size for path in c.paths) for c in (source, small))
    return {"layers": sum(name.endswith(".meta") for name in small.files), "before": before, "after": after}


def write_compressed(out, on_disk, bits, model):
    """Write a model that is on disk with its 2:4 layers compressed by a CheckpointWriter. model: what it is called."""
    source, count, layers = on_disk.source, on_disk.config.num_hidden_layers, 0
    for i in range(count):
        block, prefix = copy.deepcopy(on_disk.model.layers[i]), f"model.layers.{i}"  # on the meta device
        block.load_state_dict({name: source.tensor(f"{prefix}.{name}").contiguous() for name in block.state_dict()},
                              assign=True)  # in the dtypes that they have on disk
        layers += sparsify(block, bits)
        if source.layout.conv1d and len({type(getattr(block.self_attn, f"{x}_proj")) for x in "qkv"}) > 1:
            raise InputError(f"{model}: q, k and v of block {i} share a tensor, but not all of them are 2:4")
        out.write(shard(i, count), {f"{prefix}.{name}": value for name, value in block.state_dict().items()})
        del block  # before the next one is read
    if not layers:
        raise none_is_24(model)
    out.write(shard(count, count), source.rest())
