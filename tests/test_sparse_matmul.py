"""The 2:4 format and its kernel. The kernel runs in Triton's interpreter, in a process of its own: Triton reads
TRITON_INTERPRET when it is imported, and another test may have imported it already."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import sparse_matmul  # noqa: E402
from data.command import InputError  # noqa: E402
from gpt import GPT, Config  # noqa: E402
from sparse_matmul import (Sparse24, SparseLinear24, compress, decompress, expect_compressed, random_24,  # noqa: E402
                           save_compressed, sparse_linear, sparsify_model)

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
BYTES = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


@pytest.mark.parametrize("dtype", DTYPES)
def test_decompression_is_exact(dtype):
    """Catches a lost, moved or rounded value: groups with two, one, no non-zero; all places; rows that are views."""
    torch.manual_seed(0)
    W = random_24(33, 144, dtype, "cpu")
    W[torch.rand(W.shape) < 0.3] = 0
    w = compress(W)
    assert w.values.shape == (33, 72) and w.meta.shape == (33, 9) and w.meta.dtype == torch.int16
    assert torch.equal(decompress(w).view(BYTES[dtype]), W.view(BYTES[dtype]))
    wide = torch.zeros(33, 200, dtype=dtype)
    wide[:, 8:152] = W
    assert torch.equal(decompress(compress(wide[:, 8:152])), W)


def test_bytes_are_as_documented():
    """Catches a change of the format: files written earlier would be read wrongly."""
    W = torch.tensor([[0, 1.5, 0, -2, 1, 2, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0]])
    w = compress(W)
    assert w.values.tolist() == [[1.5, -2, 1, 2, 0, 3, 0, 0]]
    nibbles = [1 | 3 << 2, 0 | 1 << 2, 0 | 2 << 2, 0 | 1 << 2]  # zeros fill up from the left
    assert w.meta.tolist() == [[sum(n << 4 * i for i, n in enumerate(nibbles))]]
    assert compress(torch.tensor([[0.0] * 12 + [0, 0, 1, 1]])).meta.item() == 0xE444 - 2 ** 16  # the sign bit is used
    eight, four = compress(W, 8), compress(W, 4)
    assert eight.values.dtype == torch.int8 and eight.values.tolist() == [[64, -85, 42, 85, 0, 127, 0, 0]]
    assert four.values.dtype == torch.uint8 and four.values.tolist() == [[4 | (-5 & 15) << 4, 2 | 5 << 4, 7 << 4, 0]]
    assert eight.scale.tolist() == [[pytest.approx(3 / 127)]] and four.scale.tolist() == [[pytest.approx(3 / 7)]]


@pytest.mark.parametrize("bits,top", [(8, 127), (4, 7)])
def test_quantization_rounds_to_nearest(bits, top):
    """Catches a scale shared by the wrong 128 columns, lopsided rounding, and zeros that stop being zero."""
    torch.manual_seed(0)
    W = random_24(9, 272, torch.float32, "cpu") * torch.logspace(-3, 3, 272)  # each stretch has a size of its own
    got = decompress(compress(W, bits))
    for first in range(0, 272, 128):
        part, error = W[:, first:first + 128], (got - W)[:, first:first + 128].abs()
        assert (error <= part.abs().amax(1, keepdim=True) / top * 0.5001).all()
    assert (got[W == 0] == 0).all()
    assert torch.equal(decompress(compress(torch.zeros(2, 16), bits)), torch.zeros(2, 16))


@pytest.mark.parametrize("W,message", [
    (torch.zeros(2, 24), "24 columns"), (torch.zeros(2, 16, dtype=torch.float64), "float64"),
    (F.pad(torch.tensor([[0.0] * 4, [1, 2, 0, 3]]), (8, 4)), r"row 1, columns 8 to 11 hold \[1.0, 2.0, 0.0, 3.0\]")])
def test_what_cannot_be_stored_is_named(W, message):
    """Catches weights that would be cut silently: dense ones, ragged ones, other dtypes."""
    with pytest.raises(InputError, match=message):
        compress(W)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_is_linear(dtype):
    """Catches a transposed weight, lost leading dimensions, a forgotten bias, in the path that CPUs take."""
    torch.manual_seed(0)
    W, x, bias = random_24(40, 64, dtype, "cpu"), torch.randn(2, 3, 64).to(dtype), torch.randn(40).to(dtype)
    assert torch.equal(sparse_linear(x, compress(W), bias), F.linear(x, W, bias))


def run(*arguments, **environment):
    """Run Python in the repository's folder."""
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)


def interpret(*arguments):
    """Run Python with Triton's interpreter; skip where it can't work at all."""
    pytest.importorskip("triton")
    done = run(*arguments, TRITON_INTERPRET="1")
    if "only 0-dimensional arrays" in done.stderr:
        pytest.skip("the interpreter of this Triton (3.6, say) needs a NumPy before 2.4")
    assert done.returncode == 0, done.stderr
    return done.stdout


def kernel_against_float64():
    """Odd N, M and strides, K below one tile, with and without split, by a loop over groups in float64."""
    torch.manual_seed(1)
    for N, K, M, dtype, bits, tile in [
            (33, 16, 1, torch.float16, None, (16, 128, 1, 4, 1)), (33, 400, 1, torch.float32, 8, (16, 32, 2, 4, 1)),
            (7, 272, 1, torch.float16, 4, (8, 32, 1, 4, 3)), (33, 16, 3, torch.float32, None, (32, 32, 2, 4, 1)),
            (65, 400, 18, torch.float16, None, (64, 32, 2, 4, 3)), (20, 272, 130, torch.float16, 4, (32, 32, 1, 4, 3)),
            (20, 272, 5, torch.float32, 8, (32, 32, 2, 4, 3))]:
        w = compress(random_24(N, K, dtype, "cpu"), bits)
        assert torch.equal(sparse_matmul.dense(w), decompress(w)), (N, K, dtype, bits)
        x = torch.randn(2 * K, M + 3).to(dtype)[::2, :M].T  # no stride is 1
        W = decompress(Sparse24(w.values, w.meta, w.shape, None if bits is None else w.scale.double())).double()
        exact = torch.stack([(x[:, 4 * g:4 * g + 4].double() @ W[:, 4 * g:4 * g + 4].T) for g in range(K // 4)]).sum(0)
        y = sparse_matmul.matmul(x, w, tile)
        assert y.dtype == dtype and y.shape == (M, N)
        limit = torch.finfo(dtype).eps * exact.abs() + 2e-6 * (x.double().abs() @ W.abs().T)
        assert ((y.double() - exact).abs() <= limit).all(), (N, K, M, dtype, bits, tile)


def test_kernel_against_float64():
    """Catches wrong decoding, masks, strides, split-K parts, scales, accumulation in less than float32."""
    interpret(__file__)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the command measures for minutes")
def test_the_command_checks_every_tile(tmp_path):
    """Catches a tile that is wrong, and a command that can't do without a GPU or claims a speed there."""
    assert "speeds need a GPU" in interpret("sparse_matmul.py", "--json", str(tmp_path / "check.json"))
    assert set(json.loads((tmp_path / "check.json").read_text())["results"]) == {"cases"}


def test_without_triton():
    """Catches an import that a Mac can't do."""
    done = run("-c", "import sys; sys.modules['triton'] = None\nimport torch, sparse_matmul as s\n"
               "w = s.compress(s.random_24(8, 16, torch.float32, 'cpu'))\n"
               "print(s.sparse_linear(torch.ones(2, 16), w).shape)")
    assert "[2, 8]" in done.stdout, done.stderr


def small_model(prune=True):
    torch.manual_seed(0)
    model = GPT(Config(65, 32, 48, 2, 4, 2, 8, 1e-5, 10000.0, False, raw=dict(
        model_type="llama", vocab_size=65, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5))).eval()
    for name, layer in sparse_matmul.prunable(model).items():
        if prune and name != "model.layers.1.mlp.up_proj":
            layer.weight.data = random_24(*layer.weight.shape, torch.float32, "cpu")
    return model


@torch.no_grad()
def test_a_model_runs_on_it():
    """Catches a layer that is missed, the head or a dense layer that is not, and logits that differ."""
    model, ids = small_model(), torch.randint(65, (2, 7))
    expected = model(ids)
    assert sparsify_model(model) == 13
    assert type(model.model.layers[1].mlp.up_proj) is nn.Linear and type(model.lm_head) is nn.Linear
    assert torch.equal(model(ids), expected)
    linear = nn.Linear(16, 8)
    linear.weight.data = random_24(8, 16, torch.float32, "cpu")
    assert torch.equal(SparseLinear24.from_linear(linear)(torch.ones(16)), linear(torch.ones(16)))


@torch.no_grad()
@pytest.mark.parametrize("bits,share", [(None, 9 / 16), (8, 5 / 16), (4, 3 / 16)])
def test_compressed_folder(tmp_path, bits, share):
    """Catches a file that is larger than promised, names that do not fit, and a model that comes back different."""
    model, ids = small_model(), torch.randint(65, (2, 7))
    model.model.layers[1].mlp.up_proj.weight.data = random_24(48, 32, torch.float32, "cpu")
    model = model.to(torch.bfloat16)
    dense_bytes = sum(layer.weight.nbytes for layer in sparse_matmul.prunable(model).values())
    save_compressed(model, tmp_path / "small", bits)
    with safe_open(tmp_path / "small" / "model.safetensors", framework="pt") as f:
        tensors = {name: f.get_tensor(name) for name in f.keys()}
    linear = [name for name in tensors if name.endswith((".values", ".meta", ".scale"))]
    assert len(linear) == 14 * (2 if bits is None else 3) and not any("proj.weight" in name for name in tensors)
    size = sum(tensors[name].nbytes for name in linear if not name.endswith(".scale"))
    assert size == dense_bytes * share
    with torch.device("meta"):
        again = GPT(model.config)
    expect_compressed(again, lambda name: tensors[name].shape if name in tensors else None)
    again.load_state_dict(tensors, strict=True, assign=True)
    assert torch.equal(again(ids), model(ids))


def test_nothing_to_compress(tmp_path):
    """Catches a dense model passed off as a compressed one."""
    with pytest.raises(InputError, match="no linear layer"):
        save_compressed(small_model(prune=False), tmp_path / "small")
    assert not list(tmp_path.iterdir())


if __name__ == "__main__":
    kernel_against_float64()
