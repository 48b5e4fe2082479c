"""2:4 weights that are small and fast: a storage format, one Triton kernel that multiplies with it, its benchmark.

Of every four consecutive weights of a row (a group) two are kept. Their values are stored side by side, their places
i0 < i1 in four bits:

    group        0.0   1.5   0.0  -2.0          values  1.5 -2.0            two numbers instead of four
    place          0     1     2     3          nibble  i0 | i1 << 2 = 1 | 3 << 2 = 0b1101

A group with fewer than two non-zeros is filled up with zeros, each at a place of its own (a pruned -0.0 comes back as
0.0; everything else comes back bit for bit). For W [N, K] with K a multiple of 16, little-endian and without padding:

    values  [N, K/2]   dtype of W   group g of a row has v0 at 2g and v1 at 2g + 1
            [N, K/2]   int8         the same order, 8-bit:  W = value * scale
            [N, K/4]   uint8        4-bit: byte g is group g, v0 in its low half, v1 in its high half, two's complement
    meta    [N, K/16]  int16        group g is nibble g % 4 (bits 4 * (g % 4) and up) of word g // 4
    scale   [N, K/128, rounded up]  dtype of W, quantized values only: column j serves columns 128j .. 128j + 127 of W

Quantization is symmetric, to nearest, -127..127 or -7..7. A compressed model is a Hugging Face folder whose safetensors
hold `X.values`, `X.meta` (and `X.scale`) in place of `X.weight` for each 2:4 layer X; all else is as it was.

Why it is faster. A token at a time, a matmul waits for its weights: 16 bits per weight dense, here 8 + 1, so at most
16/9 = 1.78 times as fast; int8 and int4 values read 5.125 and 3.125 bits (3.1 and 5.1 times). The kernel
  - reads two values as one integer, so that a group is one word in every dtype and no layout changes on the way;
  - for one row of x builds no W at all: per group it selects two of four x, W x = sum v0 x[i0] + v1 x[i1], in float32;
  - for more rows puts W together in registers and feeds the tensor cores, W as the left operand (64 wide even where x
    has 16 rows), K split among programs where N alone can't fill the GPU; parts are summed in float32, in fixed order;
  - where many rows make arithmetic the limit, W is decompressed and handed to the dense matmul.
Which tile, or the dense way, is timed at the first call for each shape (so call once before capturing a CUDA graph).

What is known. The kernel is checked in Triton's interpreter (fp16, fp32) and compiles for sm_90; no GPU has run it
yet, so no speed is confirmed. Decoding by nested interleaves was taken because it compiles to the fewest sm_90
instructions, 42 per group, against 72 for a comparison with arange(4) and 80 for loading each group's word four times
(32 x 128 tile of W, 16 rows of x). At one row of x the count is 20 for bf16 values, 22 to 30 for int8 and 24 to 27 for
int4: instructions rather than bytes may limit the last two.

    python sparse_matmul.py                   # check, then time (speeds need a GPU; no network)
    python sparse_matmul.py --device cuda:1

    model = GPT.from_pretrained("out/a-2:4-model", device="cuda")     # then, for a folder of about 0.57 of the size:
    save_compressed(model, "out/small")

Letters: M rows of x, N rows of W (outputs), K columns (inputs), G = K/4 groups; BM, BN, BG the sizes of a tile.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.command import InputError, parser, record, run, start, write_atomically

INTERPRET = __name__ == "__main__" and not torch.cuda.is_available()
if INTERPRET:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported
try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:  # no Triton for this system: the torch reference does the work
    triton, jit = None, lambda function: function


# --------------------------------------------------------------------------------- the format, in torch (the reference)

@dataclass
class Sparse24:
    """A 2:4 weight of `shape` (N, K); the tensors are laid out as the head of this file says."""
    values: torch.Tensor
    meta: torch.Tensor
    shape: tuple[int, int]
    scale: torch.Tensor | None = None

    @property
    def bits(self):
        return {torch.int8: 8, torch.uint8: 4}.get(self.values.dtype) or 8 * self.values.element_size()

    @property
    def dtype(self):
        return self.values.dtype if self.scale is None else self.scale.dtype


# [16, 2]: the two places to store, by which of the four are non-zero (bit p: place p), filled up from the left
KEEP = torch.tensor([sorted(sorted(range(4), key=lambda p: not code >> p & 1)[:2]) for code in range(16)])


def is_24(W):
    """Whether no group of W [N, K] has more than two non-zeros."""
    return W.shape[1] % 4 == 0 and bool(((W.reshape(W.shape[0], -1, 4) != 0).sum(-1) <= 2).all())


def compress(W: torch.Tensor, bits: int | None = None) -> Sparse24:
    """W [N, K] -> its 2:4 form. bits: None keeps the dtype (float16, bfloat16, float32), 8 and 4 quantize the values.
    Raises InputError where K is no multiple of 16, the dtype is another one, or a group has more than two non-zeros."""
    N, K = W.shape
    if K % 16 or W.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise InputError(f"a {W.dtype} weight with {K} columns can't be stored as 2:4: the columns must be a multiple "
                         "of 16, the dtype float16, bfloat16 or float32")
    groups = W.detach().reshape(N, K // 4, 4)
    kept = groups != 0
    crowded = kept.sum(-1) > 2
    if crowded.any():
        row, g = crowded.nonzero()[0].tolist()
        raise InputError(f"the weight is not 2:4: row {row}, columns {4 * g} to {4 * g + 3} hold "
                         f"{groups[row, g].tolist()}")
    code = (kept * torch.tensor([1, 2, 4, 8], device=W.device)).sum(-1)  # [N, K/4]
    place = KEEP.to(W.device)[code]  # [N, K/4, 2]
    nibble = (place[..., 0] | place[..., 1] << 2).view(N, K // 16, 4)
    meta = (nibble << torch.arange(0, 16, 4, device=W.device)).sum(-1).to(torch.int16)  # from 32768 on it wraps
    values = groups.gather(-1, place).view(N, K // 2)
    if bits is None:
        return Sparse24(values, meta, (N, K))
    top = {8: 127, 4: 7}[bits]
    padded = F.pad(values.float(), (0, -K // 2 % 64)).view(N, -1, 64)  # 64 kept values in 128 columns
    scale = (padded.abs().amax(-1) / top).to(W.dtype)
    q = (padded / scale.float()[..., None]).nan_to_num(0.0).round().clamp(-top, top)  # 0/0 where all are zero
    q = q.view(N, -1)[:, :K // 2].to(torch.int8)
    if bits == 4:
        q = (q[:, 0::2] & 15 | q[:, 1::2] << 4).view(torch.uint8)
    return Sparse24(q, meta, (N, K), scale)


def decompress(w: Sparse24) -> torch.Tensor:
    """The dense weight [N, K], exactly as `compress` got it (quantized: value * scale, rounded once to the dtype)."""
    N, K = w.shape
    values = w.values
    if w.bits == 4:
        low, high = values.view(torch.int8) << 4 >> 4, values.view(torch.int8) >> 4
        values = torch.stack([low, high], -1).view(N, K // 2)
    if w.scale is not None:
        values = (values.float() * w.scale.float().repeat_interleave(64, 1)[:, :K // 2]).to(w.dtype)
    nibble = (w.meta.long()[..., None] >> torch.arange(0, 16, 4, device=w.meta.device) & 15).view(N, K // 4)
    place = torch.stack([nibble & 3, nibble >> 2], -1)  # [N, K/4, 2]
    return values.new_zeros(N, K // 4, 4).scatter_(-1, place, values.view(N, K // 4, 2)).view(N, K)


# ----------------------------------------------------------------------------------------------------------- the kernel

@jit
def load(pairs, meta, rows, groups, G):
    """A tile [rows, groups] of the weight: each group's two values as one integer, its nibble in the low four bits."""
    inside = (groups < G)[None, :]
    pair = tl.load(pairs + rows[:, None] * G + groups[None, :], mask=inside, other=0)
    word = tl.load(meta + rows[:, None] * (G // 4) + (groups // 4)[None, :], mask=inside, other=0)
    return pair, word.to(tl.int32) >> (groups % 4 * 4)[None, :]


@jit
def value(pair, WHICH: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr, out: tl.constexpr):
    """v0 (WHICH = 0) or v1 (WHICH = 1) of each pair, as dtype `out`; `dtype` is that of the weight."""
    if BITS < 16:
        v = ((pair.to(tl.int32) << (32 - BITS - BITS * WHICH)) >> (32 - BITS)).to(out)  # sign-extended
    elif BITS == 32:
        v = (pair >> (32 * WHICH)).to(tl.int32).to(dtype, bitcast=True).to(out)
    elif dtype == tl.bfloat16 and out == tl.float32:  # a bfloat16 is the upper half of a float32
        v = ((pair >> (16 * WHICH)) << 16).to(tl.float32, bitcast=True)
    else:
        v = (pair >> (16 * WHICH)).to(tl.int16).to(dtype, bitcast=True).to(out)
    return v


@jit
def spread(v0, v1, nibble):
    """Values [BN, BG] at their places: [BN, 4 BG]. In the nibble, 3 masks i0 and 12 masks i1; i0 < i1."""
    zero = tl.zeros_like(v0)
    d0 = tl.where((nibble & 3) == 0, v0, zero)
    d1 = tl.where((nibble & 3) == 1, v0, tl.where((nibble & 12) == 4, v1, zero))
    d2 = tl.where((nibble & 3) == 2, v0, tl.where((nibble & 12) == 8, v1, zero))
    d3 = tl.where((nibble & 12) == 12, v1, zero)
    return tl.interleave(tl.interleave(d0, d2), tl.interleave(d1, d3))


@jit
def matmul_kernel(x, pairs, meta, scale, y, M, N, G, stride_m, stride_k, BITS: tl.constexpr, BM: tl.constexpr,
                  BN: tl.constexpr, BG: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr):
    """y [SPLIT, M, N]: part s sums the tiles s, s + SPLIT, ... of K. Quantized values need BG = 32 if BM > 1."""
    dtype: tl.constexpr = x.dtype.element_ty
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.minimum(n, N - 1).to(tl.int64)  # beyond the end the last row is read again, and never stored
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    acc = tl.zeros([BN, BG // 4 if BM == 1 else BM], tl.float32)
    for first in tl.range(tl.program_id(2) * BG, G, SPLIT * BG, num_stages=STAGES):
        pair, nibble = load(pairs, meta, rows, first + tl.arange(0, BG), G)
        k = first * 4 + tl.arange(0, BG * 4)
        if BM == 1:
            columns = tl.load(x + k * stride_k, mask=k < 4 * G, other=0).to(tl.float32)
            even, odd = tl.split(tl.reshape(columns, [BG, 2, 2]))
            x0, x2 = tl.split(even)
            x1, x3 = tl.split(odd)
            at_i0 = tl.where((nibble & 2) != 0, x2[None, :], tl.where((nibble & 1) != 0, x1[None, :], x0[None, :]))
            at_i1 = tl.where((nibble & 8) != 0, tl.where((nibble & 4) != 0, x3[None, :], x2[None, :]), x1[None, :])
            part = value(pair, 0, BITS, dtype, tl.float32) * at_i0 + value(pair, 1, BITS, dtype, tl.float32) * at_i1
            part = tl.sum(tl.reshape(part, [BN, BG // 4, 4]), 2)
            if BITS < 16:  # 32 groups, 8 words of meta, share a scale
                word = first // 4 + tl.arange(0, BG // 4)
                part *= tl.load(scale + rows[:, None] * tl.cdiv(G, 32) + (word // 8)[None, :],
                                mask=(word < G // 4)[None, :], other=0).to(tl.float32)
            acc += part
        else:
            W = spread(value(pair, 0, BITS, dtype, dtype), value(pair, 1, BITS, dtype, dtype), nibble)  # [BN, 4 BG]
            xT = tl.load(x + m[None, :] * stride_m + k[:, None] * stride_k,
                         mask=(m < M)[None, :] & (k < 4 * G)[:, None], other=0)  # [4 BG, BM]
            if BITS < 16:  # integers are exact in every dtype; the scale comes after the sum
                s = tl.load(scale + rows * tl.cdiv(G, 32) + first // 32).to(tl.float32)
                acc += tl.dot(W, xT, input_precision="ieee") * s[:, None]
            else:
                acc = tl.dot(W, xT, acc, input_precision="ieee")
    y += tl.program_id(2).to(tl.int64) * M * N
    if BM == 1:
        tl.store(y + n, tl.sum(acc, 1).to(y.dtype.element_ty), mask=n < N)
    else:
        tl.store(y + m[None, :].to(tl.int64) * N + n[:, None], acc.to(y.dtype.element_ty),
                 mask=(m < M)[None, :] & (n < N)[:, None])


@jit
def dense_kernel(pairs, meta, scale, W, N, G, BITS: tl.constexpr, BN: tl.constexpr, BG: tl.constexpr):
    """W [N, 4 G], decompressed; BG = 32, so that a tile has one scale per row."""
    dtype: tl.constexpr = W.dtype.element_ty
    n, first = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BG
    rows = tl.minimum(n, N - 1).to(tl.int64)
    pair, nibble = load(pairs, meta, rows, first + tl.arange(0, BG), G)
    if BITS < 16:
        s = tl.load(scale + rows * tl.cdiv(G, 32) + first // 32).to(tl.float32)[:, None]
        v0 = (value(pair, 0, BITS, dtype, tl.float32) * s).to(dtype)
        v1 = (value(pair, 1, BITS, dtype, tl.float32) * s).to(dtype)
    else:
        v0, v1 = value(pair, 0, BITS, dtype, dtype), value(pair, 1, BITS, dtype, dtype)
    k = first * 4 + tl.arange(0, BG * 4)
    mask = (n < N)[:, None] & (k < 4 * G)[None, :]
    tl.store(W + rows[:, None] * (4 * G) + k[None, :], spread(v0, v1, nibble), mask=mask)


# ---------------------------------------------------------------------------------------------------------- the wrapper

PAIR = {4: torch.int8, 8: torch.int16, 16: torch.int32, 32: torch.int64}  # two values of so many bits as one integer
# tiles to try: BN, BG, parts of K, warps, stages
ONE_ROW = [(16, 128, 1, 4, 1), (16, 128, 4, 4, 1), (32, 128, 1, 4, 1), (8, 256, 1, 4, 1), (16, 128, 1, 4, 3),
           (16, 128, 4, 4, 3)]
MORE_ROWS = [(64, 32, 1, 4, 3), (64, 32, 4, 4, 3), (32, 32, 1, 2, 4), (32, 32, 4, 2, 4), (128, 32, 1, 8, 3),
             (128, 32, 2, 8, 3)]
MOST_ROWS = 1024  # of x that are tried with the kernel; the dense way should win from about 200 on
fastest = {}  # what to measure once: (shape, bits, dtype, device, rows of x rounded up) -> tile, or None for dense


def matmul(x, w, tile):
    """x [M, K] @ W.T -> [M, N] with the kernel and tile (BN, BG, parts of K, warps, stages)."""
    BN, BG, split, warps, stages = tile
    (M, K), N = x.shape, w.shape[0]
    BM = 1 if M == 1 else min(128, max(16, triton.next_power_of_2(M)))
    scale = w.meta if w.scale is None else w.scale  # not read without quantization
    y = torch.empty(split, M, N, device=x.device, dtype=x.dtype if split == 1 else torch.float32)
    matmul_kernel[triton.cdiv(N, BN), triton.cdiv(M, BM), split](
        x, w.values.view(PAIR[w.bits]), w.meta, scale, y, M, N, K // 4, *x.stride(),
        BITS=w.bits, BM=BM, BN=BN, BG=BG, SPLIT=split, STAGES=stages, num_warps=warps)
    return y[0] if split == 1 else y.sum(0).to(x.dtype)


def dense(w):
    """`decompress` by the kernel: one pass over the bytes."""
    N, K = w.shape
    W = torch.empty(N, K, device=w.meta.device, dtype=w.dtype)
    scale = w.meta if w.scale is None else w.scale  # not read without quantization
    dense_kernel[triton.cdiv(N, 32), triton.cdiv(K, 128)](
        w.values.view(PAIR[w.bits]), w.meta, scale, W, N, K // 4, BITS=w.bits, BN=32, BG=32)
    return W


def fastest_tile(x, w):
    """The tile for x [M, K], None for the dense way: timed once per key of `fastest`."""
    M = x.shape[0]
    key = (w.shape, w.bits, w.dtype, x.device, M if M == 1 else max(16, triton.next_power_of_2(M)))
    if 0 < M <= MOST_ROWS and key not in fastest:
        def milliseconds(tile):
            call = (lambda: matmul(x, w, tile)) if tile else (lambda: F.linear(x, dense(w)))
            try:
                return triton.testing.do_bench(call, warmup=5, rep=20, return_mode="median")
            except triton.OutOfResources:  # this GPU has less shared memory than the tile takes
                return float("inf")
        fastest[key] = min([*(ONE_ROW if M == 1 else MORE_ROWS), None], key=milliseconds)
    return fastest.get(key)


def sparse_linear(x: torch.Tensor, w: Sparse24, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K] @ W.T (+ bias) -> [..., N], in the dtype of both; without gradient. By the kernel on a GPU that has
    Triton, else by decompressing."""
    assert x.shape[-1] == w.shape[1] and x.dtype == w.dtype, (x.shape, x.dtype, w.shape, w.dtype)
    if triton is None or not x.is_cuda:
        return F.linear(x, decompress(w), bias)
    with torch.cuda.device(x.device):  # Triton launches on the current one
        flat = x.reshape(-1, x.shape[-1])
        tile = fastest_tile(flat, w)
        y = F.linear(flat, dense(w)) if tile is None else matmul(flat, w, tile)
    y = y.view(*x.shape[:-1], w.shape[0])
    return y if bias is None else y + bias


# -------------------------------------------------------------------------------------------------------- a model on it

class SparseLinear24(nn.Module):
    """nn.Linear with a compressed weight. Its buffers values, meta and scale are what a compressed folder stores."""

    def __init__(self, w: Sparse24, bias=None):
        super().__init__()
        self.shape = w.shape
        for name in ("values", "meta", "scale"):
            self.register_buffer(name, getattr(w, name))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def from_linear(cls, linear, bits=None):
        return cls(compress(linear.weight, bits), None if linear.bias is None else linear.bias.detach())

    def forward(self, x):
        return sparse_linear(x, Sparse24(self.values, self.meta, self.shape, self.scale), self.bias)


def prunable(module):
    """The linear layers of a model or a block, {name: layer}, without the output head."""
    return {name: layer for name, layer in module.named_modules() if type(layer) is nn.Linear and name != "lm_head"}


def sparsify_model(module: nn.Module, bits: int | None = None) -> int:
    """Replace, in a model or a block, every linear layer that is 2:4 (K a multiple of 16) by its compressed form.
    Returns how many they were; what is not 2:4 stays dense."""
    found = 0
    for name, layer in prunable(module).items():
        if layer.in_features % 16 == 0 and is_24(layer.weight):
            module.set_submodule(name, SparseLinear24.from_linear(layer, bits))
            found += 1
    return found


def expect_compressed(module: nn.Module, stored, prefix: str = ""):
    """Prepare a module on the meta device for a checkpoint; stored(name) is the shape of that tensor, or None.
    Where `prefix` + X.values is stored, layer X becomes an empty SparseLinear24 of that kind."""
    for name, layer in prunable(module).items():
        N, K = layer.weight.shape
        shape = stored(f"{prefix}{name}.values")
        if shape is None or K % 16:
            continue
        quantized = stored(f"{prefix}{name}.scale") is not None
        four = quantized and tuple(shape) == (N, K // 4)
        dtype = torch.uint8 if four else torch.int8 if quantized else layer.weight.dtype
        w = Sparse24(torch.empty(N, K // 4 if four else K // 2, dtype=dtype, device="meta"),
                     torch.empty(N, K // 16, dtype=torch.int16, device="meta"), (N, K),
                     torch.empty(N, -(-K // 128), device="meta") if quantized else None)
        module.set_submodule(name, SparseLinear24(w, layer.bias))


def save_compressed(model, dir, bits: int | None = None):
    """Compress the 2:4 layers of a `gpt.GPT` in place and write it as a folder, which `GPT.from_pretrained` reads.
    Raises InputError if no layer is 2:4."""
    sparsify_model(model, bits)
    if not any(isinstance(layer, SparseLinear24) for layer in model.modules()):
        raise InputError("no linear layer of the model is 2:4, nothing to compress; prune it with a 2:4 pattern first")
    model.save_pretrained(dir)


# -------------------------------------------------------------------------------------------------- check and benchmark

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (8192, 8192), (28672, 8192), (8192, 28672)]  # LLaMA2's
ROWS = [2 ** i for i in range(13)]
KINDS = {"2:4": None, "2:4 int8": 8, "2:4 int4": 4}


def random_24(N, K, dtype, device):
    """Normal weights of which every group loses the two smallest."""
    W = torch.randn(N, K, device=device).view(N, -1, 4)
    return W.scatter(-1, W.abs().topk(2, dim=-1, largest=False).indices, 0.0).view(N, K).to(dtype)


def check(device, dtypes, N, K, rows):
    """Every tile, dtype and kind of values against float64, within one rounding to the dtype and a float32 sum."""
    cases = [(dtype, kind, M) for dtype in dtypes for kind in KINDS for M in rows]
    for dtype, kind, M in cases:
        W = random_24(N, K, dtype, device)
        w = compress(W, KINDS[kind])
        assert KINDS[kind] or torch.equal(decompress(w), W), (dtype, N, K)
        assert torch.equal(dense(w), decompress(w)), (kind, dtype, N, K)
        x = torch.randn(M, K + 8, device=device).to(dtype)[:, :K]  # its rows are not contiguous
        exact = Sparse24(w.values, w.meta, w.shape, None if w.scale is None else w.scale.double())
        W = decompress(exact).double()  # quantized values times scale, not rounded
        y, size = x.double() @ W.T, x.double().abs() @ W.abs().T
        for tile in ONE_ROW if M == 1 else MORE_ROWS:
            error = (matmul(x, w, tile).double() - y).abs() / (torch.finfo(dtype).eps * y.abs() + 2e-6 * size)
            assert error.max() <= 1, f"{kind} {dtype} M={M} {N}x{K} tile {tile}: {error.max():.2f} times the rounding"
    return len(cases)


def capture(call, weights):
    """A CUDA graph of calls that go round the weights, and the number of calls."""
    for w in weights:
        call(w)  # compiles, tunes, allocates
    torch.cuda.synchronize()
    graph, calls = torch.cuda.CUDAGraph(), 2 * max(4, len(weights))
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(weights[i % len(weights)])
    return graph, calls


def microseconds(contestants, repeats=7):
    """{name: (graph, calls)} -> {name: median time of a call}; the contestants take turns."""
    times = {name: [] for name in contestants}
    for name, (graph, calls) in repeats * list(contestants.items()):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times[name].append(begin.elapsed_time(end) * 1000 / calls)
    return {name: sorted(t)[len(t) // 2] for name, t in times.items()}


def benchmark(device, dtype=torch.bfloat16):
    """Time every shape and number of rows against the fastest dense matmul that torch has. Weights go round so many
    copies that no cache holds them."""
    big = torch.empty(2 ** 30, dtype=torch.uint8, device=device)
    us = microseconds({"copy": capture(big.clone().copy_, [big])})
    bandwidth = 2 * big.numel() / us["copy"]  # bytes per microsecond
    print(f"{torch.cuda.get_device_name()}, {dtype}, a copy moves {bandwidth / 1e6:.2f} TB/s\n"
          "microseconds, times as fast as dense, share of that bandwidth\n"
          f"{'N x K':>13} {'M':>4} {'dense':>9}" + "".join(f"{kind:>22}" for kind in KINDS) + "  torch's 2:4")
    table = []
    for N, K in SHAPES:
        W = random_24(N, K, dtype, device)
        weights = {"dense": [W.clone() for _ in range(1 + 300_000_000 // W.nbytes)]}
        size = {}
        for kind, bits in KINDS.items():
            w = compress(W, bits)
            size[kind] = sum(t.nbytes for t in (w.values, w.meta, w.scale) if t is not None)
            weights[kind] = [Sparse24(w.values.clone(), w.meta.clone(), w.shape, w.scale)
                             for _ in range(1 + 300_000_000 // size[kind])]
        for M in ROWS:
            x = torch.randn(M, K, device=device, dtype=dtype)
            graphs, refused = {kind: capture(lambda w: sparse_linear(x, w), weights[kind]) for kind in KINDS}, None
            for library in ("cublaslt", "cublas", "default"):
                torch.backends.cuda.preferred_blas_library(library)
                graphs[library] = capture(lambda W: F.linear(x, W), weights["dense"])
            try:
                graphs["torch"] = capture(lambda W: F.linear(x, W), [torch.sparse.to_sparse_semi_structured(W)])
            except (RuntimeError, AttributeError) as e:  # not for this GPU, shape or torch: a dash in the table
                refused = str(e)
            us = microseconds(graphs)
            us["dense"] = min(us.pop(library) for library in ("cublaslt", "cublas", "default"))
            line = {"N": N, "K": K, "M": M, "us": us, "torch_refused": refused,
                    "speedup": {name: us["dense"] / us[name] for name in us},
                    "of_bandwidth": {kind: size[kind] / bandwidth / us[kind] for kind in KINDS}}
            table.append(line)
            cells = [f"{us[kind]:>9.1f} {us['dense'] / us[kind]:>5.2f}x {line['of_bandwidth'][kind]:>4.0%} "
                     for kind in KINDS]
            cells.append(f"{us['dense'] / us['torch']:>7.2f}x" if "torch" in us else f"{'-':>8}")
            print(f"{N:>6} x{K:>5} {M:>4} {us['dense']:>9.1f}", *cells, sep="", flush=True)
    return {"bandwidth_bytes_per_s": bandwidth * 1e6, "dtype": str(dtype), "table": table}


def draw(table, path):
    """Speed-up over M, a panel per kind of values, a line per shape, dashed the ceiling."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    grey = "#808080"  # readable on white and on black
    inks = ["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"]
    plt.rcParams.update(dict.fromkeys(inks, grey))
    figure, axes = plt.subplots(1, len(KINDS), figsize=(12, 3.6), layout="constrained")
    for axis, (kind, bits) in zip(axes, KINDS.items()):
        for N, K in SHAPES:
            lines = [line for line in table if (line["N"], line["K"]) == (N, K)]
            axis.plot([line["M"] for line in lines], [line["speedup"][kind] for line in lines], label=f"{N} x {K}")
        axis.axhline(16 / (bits / 2 + 1.125 if bits else 9), color=grey, linestyle="--")  # by the bits of a weight
        axis.axhline(1, color=grey, linewidth=0.5)
        axis.set(title=kind, xlabel="rows of x", ylabel="times as fast as dense", ylim=(0, None))
        axis.set_xscale("log", base=2)
    axes[-1].legend(frameon=False, fontsize=7)
    write_atomically(path, lambda file: figure.savefig(file, format="svg", transparent=True))


def main():
    args = parser(__doc__).parse_args()
    start(args)
    gpu = torch.device(args.device).type == "cuda"
    if triton is None or not (gpu or INTERPRET):
        raise InputError(f"--device {args.device}: the kernel needs Triton, and runs on a CPU only without a GPU")
    begin = time.perf_counter()
    if gpu:
        torch.cuda.set_device(args.device)
        cases = check(args.device, [torch.float16, torch.bfloat16], 200, 4112, [1, 2, 33, 130])
    else:
        cases = check("cpu", [torch.float16, torch.float32], 24, 144, [1, 17])
    print(f"{cases} cases agree with float64, with every tile ({time.perf_counter() - begin:.0f} s)", flush=True)
    if not gpu:
        print("This was Triton's interpreter: speeds need a GPU.")
        return record(args, {"cases": cases})
    here = Path(__file__).parent
    args.json = args.json or str(here / "results" / "sparse_matmul.json")
    results = {"cases": cases} | benchmark(args.device)
    record(args, results)
    (here / "assets").mkdir(exist_ok=True)
    draw(results["table"], here / "assets" / "sparse_matmul.svg")
    print(f"{args.json} and assets/sparse_matmul.svg are written; {time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    run(main)
