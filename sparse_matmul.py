"""2:4 weights, small and fast a token at a time: a storage format, and a Triton kernel that multiplies with it.

Of every four consecutive weights of a row (a group) two are kept. Their values are stored side by side, their places
i0 < i1 in four bits:

    group        0.0   1.5   0.0  -2.0          values  1.5 -2.0            two numbers instead of four
    place          0     1     2     3          nibble  i0 | i1 << 2 = 1 | 3 << 2 = 0b1101

A group with fewer than two non-zeros is filled up with zeros, each at a place of its own (a pruned -0.0 may come back
as 0.0; everything else comes back bit for bit). For W [N, K], K a multiple of 16, little-endian and without padding:

    values  [N, K/2]   dtype of W   group g of a row has v0 at 2g and v1 at 2g + 1
            [N, K/2]   int8         the same order, 8-bit:  W = value * scale
            [N, K/4]   uint8        4-bit: byte g is group g, v0 in its low half, v1 in its high half, two's complement
    meta    [N, K/16]  int16        group g is nibble g % 4 (bits 4 * (g % 4) and up) of word g // 4
    scale   [N, K/128, rounded up]  dtype of W, quantized values only: column j serves columns 128j .. 128j + 127 of W

Quantization is symmetric, to nearest, -127..127 or -7..7 (a float16 scale below 6e-5 is itself coarse). A model whose
layers are stored so: compressed.py.

A token at a time, a matmul waits for its weights: 16 bits each if dense, here 9 (8 of values, 1 of places), so 1.78
times as fast is what to expect; int8 and int4 values read 5.125 and 3.125 bits (3.1 and 5.1 times), but putting them
together takes time, too. An older version came to 1.6 to 1.8 and to 2 to 2.5 times on an H100. For one row of x no W is
built: W x = sum v0 x[i0] + v1 x[i1]. For more rows W is put together in registers as the left operand of the tensor
cores; K is split, so that a small N fills the GPU, too. Where many rows make arithmetic the limit, W is decompressed
for the dense matmul. Which tile, or the dense way, is timed at the first call for each shape of W and number of rows
of x, rounded up to a power of two (so call once before capturing a CUDA graph). With more rows of x a W that was never
compressed won on that H100: 4096 x 4096 from 4 rows on at the latest, the largest ones in bf16 from 128, in int8 and
int4 from 64 (results/sparse-matmul.json).

    python sparse_matmul.py                                            # check the kernel and, on a GPU, measure it
    python sparse_matmul.py --model out/llama2-7b-wanda-dsnot-2of4 --bits 8 --out out/small

Letters: M rows of x, N rows of W (outputs), K columns (inputs), G = K/4 groups; BM, BN, BG the sizes of a tile.
"""

from __future__ import annotations  # without Triton the kernels' annotations have no meaning

import itertools
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from data.command import InputError, parser, record, run, start
from data.method import folder_name
from data.processes import progress_bar
from masks import keep_mask

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported
try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:  # no Triton for this system: the torch reference does the work
    triton, jit = None, lambda function: function


# ------------------------------------------------------------------------------- the format, in torch (the reference)

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


# [16, 2]: the two places to store, by which of the four are non-zero (bit p: place p), filled up from the left. The
# inner sort is stable: the places of non-zeros come first, then the others
PLACES = torch.tensor([sorted(sorted(range(4), key=lambda p: not code >> p & 1)[:2]) for code in range(16)])


def crowded(W):
    """Which groups of W [N, K] hold more than two non-zeros: bool [N, K/4]."""
    return (W.reshape(len(W), -1, 4) != 0).sum(-1) > 2


def compress(W: torch.Tensor, bits: int | None = None) -> Sparse24:
    """W [N, K] -> its 2:4 form. bits: None keeps the dtype (float16, bfloat16, float32), 8 and 4 quantize the values.
    Raises InputError where K is no multiple of 16, the dtype is another one, or a group has more than two non-zeros."""
    assert bits in (None, 8, 4), bits
    N, K = W.shape
    if K % 16 or W.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise InputError(f"a {W.dtype} weight with {K} columns can't be stored as 2:4: the columns must be a multiple "
                         "of 16, the dtype float16, bfloat16 or float32")
    groups = W.detach().reshape(N, K // 4, 4)
    if (wrong := crowded(W)).any():
        row, g = wrong.nonzero()[0].tolist()
        held = groups[row, g].tolist()
        raise InputError(f"the weight is not 2:4: row {row}, columns {4 * g} to {4 * g + 3} hold {held}")
    place = PLACES.to(W.device)[((groups != 0) * torch.tensor([1, 2, 4, 8], device=W.device)).sum(-1)]  # [N, K/4, 2]
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


# -------------------------------------------------------------------------------------------------------- the kernels

@jit
def unpack(pair, BITS: tl.constexpr, dtype: tl.constexpr, out: tl.constexpr):
    """Two values of BITS bits that are stored as one integer: v0 and v1 as dtype `out`; of 16 bits they are `dtype`."""
    if BITS < 16:  # sign-extended
        v0 = (pair.to(tl.int32) << (32 - BITS)) >> (32 - BITS)
        v1 = (pair.to(tl.int32) << (32 - 2 * BITS)) >> (32 - BITS)
    else:
        v0 = pair.to(tl.int16).to(dtype, bitcast=True)
        v1 = (pair >> 16).to(tl.int16).to(dtype, bitcast=True)
    return v0.to(out), v1.to(out)


@jit
def row_kernel(x, pairs, meta, scale, y, N, G, dtype: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr,
               BW: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr):
    """y [SPLIT, N] for one row x of `dtype`, given as int64 [G]: a group's four numbers, of which a shift by 16 i
    brings the one at place i to the low end. A tile is BN rows and BW words of meta, four groups each."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.minimum(n, N - 1).to(tl.int64)  # beyond the end the last row is read again, and never stored
    four = tl.arange(0, 4)
    acc = tl.zeros([BN, BW], tl.float32)
    for first in tl.range(tl.program_id(1) * BW, G // 4, SPLIT * BW, num_stages=STAGES):
        word = first + tl.arange(0, BW)
        group, inside = word[:, None] * 4 + four[None, :], word < G // 4  # [BW, 4], [BW]
        pair = tl.load(pairs + rows[:, None, None] * G + group[None], mask=inside[None, :, None], other=0)
        places = tl.load(meta + rows[:, None] * (G // 4) + word[None, :], mask=inside[None, :], other=0).to(tl.int32)
        nibble = places[:, :, None] >> (four * 4)[None, None, :]  # [BN, BW, 4]: 3 masks i0, 12 masks 4 i1
        v0, v1 = unpack(pair, BITS, dtype, tl.float32)
        xs = tl.load(x + group, mask=inside[:, None], other=0)[None]  # [1, BW, 4]
        x0 = (xs >> ((nibble & 3) * 16).to(tl.int64)).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        x1 = (xs >> ((nibble & 12) * 4).to(tl.int64)).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        part = tl.sum(v0 * x0 + v1 * x1, 2)
        if BITS < 16:  # 8 words share a scale
            part *= tl.load(scale + rows[:, None] * tl.cdiv(G, 32) + (word // 8)[None, :],
                            mask=inside[None, :], other=0).to(tl.float32)
        acc += part
    y += tl.program_id(1).to(tl.int64) * N
    tl.store(y + n, tl.sum(acc, 1).to(y.dtype.element_ty), mask=n < N)


@jit
def load_tile(pairs, meta, rows, first, G, BITS: tl.constexpr, BN: tl.constexpr, BG: tl.constexpr,
              dtype: tl.constexpr, out: tl.constexpr):
    """A tile of a weight of `dtype`, rows [BN] and groups first to first + BG - 1: v0 and v1 as dtype `out`, and the
    nibbles in the low four bits, all [BN, BG]. A word of meta is loaded once for its four groups."""
    groups, words = first + tl.arange(0, BG), first // 4 + tl.arange(0, BG // 4)
    pair = tl.load(pairs + rows[:, None] * G + groups[None, :], mask=(groups < G)[None, :], other=0)
    word = tl.load(meta + rows[:, None] * (G // 4) + words[None, :], mask=(words < G // 4)[None, :], other=0)
    nibble = tl.reshape(word.to(tl.int32)[:, :, None] >> (tl.arange(0, 4) * 4)[None, None, :], [BN, BG])
    v0, v1 = unpack(pair, BITS, dtype, out)
    return v0, v1, nibble


@jit
def spread(v0, v1, nibble):
    """16-bit values [BN, BG] at their places: [BN, 4 BG]. Each group is put together as one 64-bit number."""
    v0_bits = v0.to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF
    v1_bits = v1.to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF
    group = (v0_bits << ((nibble & 3) * 16).to(tl.int64)) | (v1_bits << ((nibble & 12) * 4).to(tl.int64))
    d0 = group.to(tl.int16).to(v0.dtype, bitcast=True)
    d1 = (group >> 16).to(tl.int16).to(v0.dtype, bitcast=True)
    d2 = (group >> 32).to(tl.int16).to(v0.dtype, bitcast=True)
    d3 = (group >> 48).to(tl.int16).to(v0.dtype, bitcast=True)
    return tl.interleave(tl.interleave(d0, d2), tl.interleave(d1, d3))


@jit
def matmul_kernel(x, pairs, meta, scale, y, M, N, G, stride_m, stride_k, BITS: tl.constexpr, BM: tl.constexpr,
                  BN: tl.constexpr, BG: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr):
    """y [SPLIT, M, N]: part s sums the tiles s, s + SPLIT, ... of K. Quantized values need BG = 32."""
    dtype: tl.constexpr = x.dtype.element_ty
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.minimum(n, N - 1).to(tl.int64)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    acc = tl.zeros([BN, BM], tl.float32)
    for first in tl.range(tl.program_id(2) * BG, G, SPLIT * BG, num_stages=STAGES):
        k = first * 4 + tl.arange(0, BG * 4)
        v0, v1, nibble = load_tile(pairs, meta, rows, first, G, BITS, BN, BG, dtype, dtype)
        W = spread(v0, v1, nibble)  # [BN, 4 BG]
        xT = tl.load(x + m[None, :] * stride_m + k[:, None] * stride_k,
                     mask=(m < M)[None, :] & (k < 4 * G)[:, None], other=0)  # [4 BG, BM]
        if BITS < 16:  # integers are exact in both dtypes; the scale comes after the sum
            s = tl.load(scale + rows * tl.cdiv(G, 32) + first // 32).to(tl.float32)
            acc += tl.dot(W, xT) * s[:, None]
        else:
            acc = tl.dot(W, xT, acc)
    y += tl.program_id(2).to(tl.int64) * M * N
    tl.store(y + m[None, :].to(tl.int64) * N + n[:, None], acc.to(y.dtype.element_ty),
             mask=(m < M)[None, :] & (n < N)[:, None])


@jit
def dense_kernel(pairs, meta, scale, W, N, G, BITS: tl.constexpr, BN: tl.constexpr, BG: tl.constexpr):
    """W [N, 4 G], decompressed; BG = 32, so that a tile has one scale per row."""
    dtype: tl.constexpr = W.dtype.element_ty
    n, first = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BG
    rows = tl.minimum(n, N - 1).to(tl.int64)
    v0, v1, nibble = load_tile(pairs, meta, rows, first, G, BITS, BN, BG, dtype, tl.float32)
    if BITS < 16:
        s = tl.load(scale + rows * tl.cdiv(G, 32) + first // 32).to(tl.float32)[:, None]
        v0, v1 = v0 * s, v1 * s
    k = first * 4 + tl.arange(0, BG * 4)
    tl.store(W + rows[:, None] * (4 * G) + k[None, :], spread(v0.to(dtype), v1.to(dtype), nibble),
             mask=(n < N)[:, None] & (k < 4 * G)[None, :])


# -------------------------------------------------------------------------------------------------------- the wrapper

PAIR = {4: torch.int8, 8: torch.int16, 16: torch.int32}  # two values of so many bits as one integer
# tiles to try: BN, BG (for one row BW), parts of K, warps, stages
ONE_ROW = [(2, 64, 1, 2, 1), (2, 64, 1, 2, 3), (4, 64, 1, 2, 1), (4, 128, 1, 2, 1), (4, 128, 1, 4, 1)]
# all split K: the sum of parts is a launch more, and if only some made it, launches would decide for a small weight
MORE_ROWS = [(64, 32, 2, 4, 4), (64, 32, 4, 4, 3), (64, 32, 8, 4, 2), (64, 64, 4, 4, 3)]
MOST_ROWS = 1024  # of x that are tried with the kernel; from about 256 on it is faster to decompress W first
fastest = {}  # (shape, bits, dtype, device, rows of x rounded up) -> tile, or None for the dense way; measured once


def tiles(w, M):
    """Those to try for M rows of x: quantized values have a scale for 32 groups."""
    return ONE_ROW if M == 1 else [tile for tile in MORE_ROWS if w.scale is None or tile[1] == 32]


def operands(w):
    """What the kernels read of w: pairs, meta, scale (any pointer where there is none)."""
    return w.values.view(PAIR[w.bits]), w.meta, w.meta if w.scale is None else w.scale


def matmul(x, w, tile):
    """x [M, K] @ W.T -> [M, N] with a kernel and tile (BN, BG or BW, parts of K, warps, stages)."""
    assert x.dtype.itemsize == 2, f"the kernels are for 16-bit numbers, not for {x.dtype}"
    BN, size, split, warps, stages = tile
    (M, K), N = x.shape, w.shape[0]
    y = torch.empty(split, M, N, device=x.device, dtype=x.dtype if split == 1 else torch.float32)
    if M == 1:
        row = x.reshape(-1).contiguous()
        fours = row if row.data_ptr() % 8 == 0 else row.clone()
        row_kernel[triton.cdiv(N, BN), split](
            fours.view(torch.int64), *operands(w), y, N, K // 4,
            tl.float16 if x.dtype == torch.float16 else tl.bfloat16,
            w.bits, BN, size, split, stages, num_warps=warps)
    else:
        BM = min(64, max(16, triton.next_power_of_2(M)))  # at 128 registers spill
        matmul_kernel[triton.cdiv(N, BN), triton.cdiv(M, BM), split](
            x, *operands(w), y, M, N, K // 4, *x.stride(), w.bits, BM, BN, size, split, stages, num_warps=warps)
    return y[0] if split == 1 else y.sum(0).to(x.dtype)


def dense(w):
    """`decompress` by the kernel: one pass over the bytes."""
    N, K = w.shape
    W = torch.empty(N, K, device=w.meta.device, dtype=w.dtype)
    dense_kernel[triton.cdiv(N, 32), triton.cdiv(K, 128)](*operands(w), W, N, K // 4, BITS=w.bits, BN=32, BG=32)
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
            except (triton.OutOfResources, torch.OutOfMemoryError):  # too little shared memory, or memory
                return float("inf")
        fastest[key] = min([*tiles(w, M), None], key=milliseconds)
    return fastest.get(key)


@torch.no_grad()
def sparse_linear(x: torch.Tensor, w: Sparse24, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K] @ W.T (+ bias) -> [..., N], without gradient; 16-bit numbers on a GPU with Triton by a kernel, else
    dense."""
    assert x.shape[-1] == w.shape[1] and x.dtype == w.dtype, (x.shape, x.dtype, w.shape, w.dtype)
    if triton is None or not x.is_cuda or x.dtype == torch.float32:
        return F.linear(x, decompress(w), bias)
    with torch.cuda.device(x.device):  # Triton launches on the current one
        flat = x.reshape(-1, x.shape[-1])
        tile = fastest_tile(flat, w)
        y = F.linear(flat, dense(w)) if tile is None else matmul(flat, w, tile)
    return (y if bias is None else y + bias).view(*x.shape[:-1], w.shape[0])


# ---------------------------------------------------------------------------------------------- check and the command

KINDS = {"2:4": None, "2:4 int8": 8, "2:4 int4": 4}  # values of so many bits


def prune_24(W):
    """W [N, K] without the two smallest weights of every group."""
    return torch.where(keep_mask(W.abs(), pattern=(2, 4)), W, 0)


def check(device, dtypes, largest, rows):
    """Every tile, dtype, kind of values; random shapes and strides; against float64: one rounding, a float32 sum."""
    cases = list(itertools.product(dtypes, KINDS.values(), rows))
    for dtype, bits, M in progress_bar(cases, desc="checking"):
        N, K, step = random.randint(1, largest[0]), 16 * random.randint(1, largest[1] // 16), random.randint(1, 2)
        w = compress(prune_24(torch.randn(N, K, device=device)).to(dtype), bits)
        assert torch.equal(dense(w), decompress(w)), (dtype, bits, N, K)
        x = torch.randn(M, step * K + 7, device=device).to(dtype)[:, :step * K:step]
        W = decompress(Sparse24(w.values, w.meta, w.shape, w.scale if bits is None else w.scale.double())).double()
        y, size = x.double() @ W.T, x.double().abs() @ W.abs().T  # of value times scale, not rounded
        for tile in tiles(w, M):
            error = (matmul(x, w, tile).double() - y).abs()
            assert (error <= torch.finfo(dtype).eps * y.abs() + 2e-6 * size).all(), (dtype, bits, M, N, K, tile)


def main():
    p = parser(__doc__)
    p.add_argument("--model", help="write this 2:4 model (a preset, a Hub id or a folder) again, compressed")
    p.add_argument("--out", help="the compressed folder (default: out/MODEL-compressed, or out/MODEL-int8)")
    p.add_argument("--bits", type=int, choices=[8, 4], help="quantize the values (default: they stay as they are)")
    args = p.parse_args()
    start(args)
    if args.model:
        from compressed import save_compressed  # here: it imports this file
        out = args.out or f"out/{folder_name(args.model)}-{f'int{args.bits}' if args.bits else 'compressed'}"
        saved = save_compressed(args.model, out, args.bits)
        print("saved {}: {layers} layers compressed, {before:,} -> {after:,} bytes on disk".format(out, **saved))
        return record(args, saved)
    if args.out or args.bits:
        raise InputError("--out and --bits tell how to compress a model: they need --model")
    gpu = args.device.startswith("cuda")
    if triton is None or not (gpu or os.environ.get("TRITON_INTERPRET")):
        raise InputError(f"--device {args.device}: the kernel needs Triton, and runs on a CPU only without a GPU")
    if not gpu:
        check("cpu", [torch.float16], (40, 600), [1, 1, 17, 130])
        print("The kernel agrees with float64 in Triton's interpreter; speeds need a GPU.")
        return record(args, {"agrees": True})
    with torch.cuda.device(args.device):
        check(args.device, [torch.float16, torch.bfloat16], (600, 4800), [1, 5, 40, 4096])
        print("The kernel agrees with float64.", flush=True)
        sys.path.append(str(Path(__file__).parent / "tests"))
        from bench_sparse_matmul import measure  # a file of its own, so that this one stays short
        for results in measure(args.device):
            record(args, results)


if __name__ == "__main__":
    run(main)
