"""The 2:4 format and its kernel. The kernel runs in Triton's interpreter, in a process of its own: Triton reads
TRITON_INTERPRET when it is imported, and another test may have imported it already."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from safetensors.torch import load_file

import sparse_matmul
from compressed import save_compressed
from data.command import InputError
from dsnot import prune_layer
from gpt import GPT, Config, prunable
from sparse_matmul import compress, decompress, prune_24, sparse_linear
from walk import prune

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
BYTES = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


@pytest.mark.parametrize("dtype", DTYPES)
def test_decompression_is_exact(dtype):
    """Catches a lost, moved or rounded value: groups with two, one, no non-zero; all places; rows that are views."""
    torch.manual_seed(0)
    W = prune_24(torch.randn(33, 144)).to(dtype)
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
    W = prune_24(torch.randn(9, 272)) * torch.logspace(-3, 3, 272)  # each stretch has a size of its own
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
    W, x, bias = prune_24(torch.randn(40, 64)).to(dtype), torch.randn(2, 3, 64).to(dtype), torch.randn(40).to(dtype)
    assert torch.equal(sparse_linear(x, compress(W), bias), F.linear(x, W, bias))
    assert not sparse_linear(x.requires_grad_(), compress(W), bias).requires_grad  # whichever way it is computed


def run(*arguments, **environment):
    """Run Python in the repository's folder."""
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=900,
                          env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the command measures for minutes")
def test_the_command_checks_every_tile(tmp_path):
    """Catches wrong decoding, masks, strides, parts of K, scales, accumulation in less than float32, in any tile; and a
    command that claims a speed without a GPU."""
    pytest.importorskip("triton")
    done = run("sparse_matmul.py", "--json", str(tmp_path / "check.json"))
    if "only 0-dimensional arrays" in done.stderr:
        pytest.skip("the interpreter of this Triton (3.6, say) needs a NumPy before 2.4")
    assert done.returncode == 0, done.stderr
    assert "speeds need a GPU" in done.stdout
    assert json.loads((tmp_path / "check.json").read_text())["results"] == {"agrees": True}


def compiled(kernel, arch, dtype, bits, tile, BM):
    """A kernel compiled for a GPU that need not be there, for rows whose length is a multiple of 64."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    BN, size, split, warps, stages = tile
    values = dict(BITS=bits, BM=BM, BN=BN, BG=size, BW=size, SPLIT=split, STAGES=stages, stride_k=1,
                  dtype=triton.language.float16 if dtype == "fp16" else triton.language.bfloat16)
    types = dict(x="*i64" if kernel is sparse_matmul.row_kernel else f"*{dtype}", W=f"*{dtype}", y="*fp32",
                 pairs={16: "*i32", 8: "*i16", 4: "*i8"}[bits], meta="*i16", scale=f"*{dtype}",
                 M="i32", N="i32", G="i32", stride_m="i32")
    names = kernel.arg_names
    source = triton.compiler.ASTSource(
        kernel, {name: types.get(name, "constexpr") for name in names}, {n: values[n] for n in names if n in values},
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in types})
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})


@pytest.mark.parametrize("arch,dtype,bits", [(90, "fp16", 16), (90, "bf16", 16), (90, "bf16", 8), (90, "bf16", 4),
                                             (80, "bf16", 16), (80, "bf16", 4)])
def test_kernels_compile(tmp_path, arch, dtype, bits):
    """Catches what the interpreter does not see: types and layouts that Triton's compiler refuses, matmuls that miss
    the tensor cores, registers that spill to the stack, more shared memory than a small GPU has."""
    knobs = pytest.importorskip("triton").knobs
    for kernel, tile, BM in [(sparse_matmul.row_kernel, sparse_matmul.ONE_ROW[1], 1),
                             (sparse_matmul.matmul_kernel, sparse_matmul.MORE_ROWS[1], 16),
                             (sparse_matmul.dense_kernel, (32, 32, 1, 4, 1), None)]:
        built = compiled(kernel, arch, dtype, bits, tile, BM)
        (tmp_path / "cubin").write_bytes(built.asm["cubin"])
        usage = subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", tmp_path / "cubin"], capture_output=True,
                               text=True).stdout
        assert "STACK:0" in usage and built.metadata.shared <= 99 * 1024, (tile, BM, usage, built.metadata)
        if BM == 16:
            assert ("wgmma" if arch == 90 else "mma.sync") in built.asm["ptx"]


def test_the_benchmark(tmp_path):
    """Catches what would fail on a GPU after minutes of measuring: a whole model's speed, the picture."""
    from bench_sparse_matmul import KINDS, ROWS, SHAPES, decode, draw
    small = Config(65, 32, 48, 1, 4, 2, 8, 1e-5, 10000.0, False)
    assert all(decode("cpu", kind, small) > 0 for kind in ("dense", "2:4 int4"))
    us = {"dense": 2.0} | dict.fromkeys(KINDS, 1.0)
    draw([{"N": N, "K": K, "M": M, "us": us} for N, K in SHAPES for M in ROWS], tmp_path / "picture.svg")
    assert "</svg>" in (tmp_path / "picture.svg").read_text()


def test_without_triton():
    """Catches an import that a Mac can't do."""
    done = run("-c", "import sys; sys.modules['triton'] = None\nimport torch, sparse_matmul as s\n"
               "w = s.compress(s.prune_24(torch.randn(8, 16)))\nprint(s.sparse_linear(torch.ones(2, 16), w).shape)")
    assert "[2, 8]" in done.stdout, done.stderr


FAMILIES = {
    "llama": dict(model_type="llama", vocab_size=65, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
                  num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5),
    "opt": dict(model_type="opt", vocab_size=65, hidden_size=32, ffn_dim=40, num_hidden_layers=2, num_attention_heads=4,
                activation_function="relu", do_layer_norm_before=False, max_position_embeddings=20,
                word_embed_proj_dim=16),
    "gpt2": dict(model_type="gpt2", vocab_size=65, n_embd=32, n_inner=40, n_layer=2, n_head=4, n_positions=20,
                 activation_function="gelu_new", layer_norm_epsilon=1e-5)}
FAMILIES |= {f"{family}-slorb": FAMILIES[family] | {"slorb_k": 8} for family in ("llama", "gpt2")}


def checkpoint(folder, raw, dtype=torch.float32, dense=("mlp.up_proj",)):
    """A random model whose linear layers are all 2:4 but those named `dense` in block 1. Of them mlp.down_proj, with 40
    columns, does not fit the format."""
    torch.manual_seed(0)
    model = GPT(Config.from_dict(raw))
    for i, block in enumerate(model.model.layers):
        for name, layer in prunable(block).items():
            if (i, name) not in [(1, name) for name in dense]:
                layer.weight.data = prune_24(layer.weight.data)
    for name, parameter in model.named_parameters():
        if "slorb" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter)
        if "project_" in name:  # 2:4, but in no block
            parameter.data = prune_24(parameter.data)
    model.to(dtype).save_pretrained(folder)


def compressed_layers(model):
    return {name for name, layer in model.named_modules() if hasattr(layer, "meta")}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_models_run_on_it(tmp_path, family):
    """Catches a layer that is missed; the head, a projection outside of the blocks or a dense layer that is not; the
    boost of SLoRB lost; tensors that a family's names or layout mix up; other logits, loaded whole or block by block,
    from a dense folder or a compressed one."""
    checkpoint(tmp_path / "dense", FAMILIES[family])
    ids = torch.randint(65, (2, 7))
    expected = GPT.from_pretrained(tmp_path / "dense")(ids)
    saved = save_compressed(tmp_path / "dense", tmp_path / "small")
    names = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj"}
    names |= {"mlp.gate_proj"} if "llama" in family else set()
    wanted = {f"model.layers.{i}.{name}" for i in (0, 1) for name in names} - {"model.layers.1.mlp.up_proj"}
    assert saved["layers"] == len(wanted) and saved["after"] < saved["before"]
    for folder, sparse in ("dense", True), ("small", False), ("small", True):
        model = GPT.from_pretrained(tmp_path / folder, sparse=sparse)
        assert compressed_layers(model) == wanted
        assert torch.equal(model(ids), expected)
        assert torch.equal(GPT.from_pretrained(tmp_path / folder, sparse=sparse, stream=True)(ids), expected)


@torch.no_grad()
@pytest.mark.parametrize("bits,share", [(None, 9 / 16), (8, 5 / 16), (4, 3 / 16)])
def test_compressed_folder(tmp_path, bits, share):
    """Catches a folder that is larger than promised, in another dtype, or that comes back as another model."""
    checkpoint(tmp_path / "dense", FAMILIES["llama"] | {"intermediate_size": 48}, torch.bfloat16, dense=())
    model, ids = GPT.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16), torch.randint(65, (2, 7))
    layers = [layer for block in model.model.layers for layer in prunable(block).values()]
    done = run("sparse_matmul.py", "--model", str(tmp_path / "dense"), "--out", str(tmp_path / "small"),
               *(["--bits", str(bits)] if bits else []))
    assert done.returncode == 0, done.stderr
    tensors = {k: v for file in (tmp_path / "small").glob("*.safetensors") for k, v in load_file(file).items()}
    size = sum(v.nbytes for k, v in tensors.items() if k.endswith((".values", ".meta")))
    assert size == share * sum(layer.weight.nbytes for layer in layers)
    assert not any("proj.weight" in name for name in tensors)
    for layer in layers:
        layer.weight.data = decompress(compress(layer.weight.data, bits))
    assert torch.equal(GPT.from_pretrained(tmp_path / "small", dtype=torch.bfloat16)(ids), model(ids))


def test_what_cannot_be_compressed(tmp_path):
    """Catches a dense model passed off as a compressed one, a tensor of GPT-2 torn apart, a half-written folder, and a
    folder that is replaced by another kind of model."""
    GPT(Config.from_dict(FAMILIES["llama"])).save_pretrained(tmp_path / "plain")
    checkpoint(tmp_path / "mixed", FAMILIES["gpt2"], dense=["self_attn.v_proj"])
    checkpoint(tmp_path / "good", FAMILIES["llama"])
    first = save_compressed(tmp_path / "good", tmp_path / "small", 8)
    (tmp_path / "small" / "NOTES.md").write_text("mine")
    assert save_compressed(tmp_path / "good", tmp_path / "small", 8) == first  # it is finished
    assert (tmp_path / "small" / "NOTES.md").read_text() == "mine"
    with pytest.raises(InputError, match="holds a compressed model, which differs in bits: choose another --out"):
        save_compressed(tmp_path / "good", tmp_path / "small")
    os.utime(tmp_path / "good" / "config.json", (0, 0))
    with pytest.raises(InputError, match=r"holds a compressed model, which differs in files \(config.json\)"):
        save_compressed(tmp_path / "good", tmp_path / "small", 8)
    with pytest.raises(InputError, match="plain holds a model that another command has made"):
        save_compressed(tmp_path / "good", tmp_path / "plain")
    for folder, message in [("plain", "no linear layer"), ("small", "compressed already"),
                            ("mixed", "q, k and v of block 1 share a tensor")]:
        with pytest.raises(InputError, match=message):
            save_compressed(tmp_path / folder, tmp_path / "new")
    with pytest.raises(InputError, match="compressed 2:4 layers: give the folder that it was made from"):
        prune(GPT.from_pretrained(tmp_path / "small", stream=True), torch.zeros(1, 4, dtype=torch.long),
              tmp_path / "new", {}, prune_layer)
    assert {path.name for path in tmp_path.iterdir()} == {"plain", "mixed", "good", "small"}
    with pytest.raises(InputError, match="no linear layer"):
        GPT.from_pretrained(tmp_path / "plain", sparse=True)
    assert run("sparse_matmul.py", "--bits", "8").returncode == 2


@pytest.mark.parametrize("bits, top", [(8, 127), (4, 7)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_quantization_uses_the_scale_that_is_stored(bits, top, dtype):
    """Would catch a scale more than there are columns for, values divided by a scale that rounding has changed, and
    ones that wrap round where float16 has few digits left for it."""
    torch.manual_seed(0)
    W = prune_24(torch.randn(9, 256)).to(dtype)
    w = compress(W, bits)
    assert w.scale.shape == (9, 2) and compress(W[:, :144].contiguous(), bits).scale.shape == (9, 2)
    kept, scale = compress(W).values.float(), w.scale.float().repeat_interleave(64, 1)
    values = w.values.float() if bits == 8 else torch.stack(
        [w.values.view(torch.int8) << 4 >> 4, w.values.view(torch.int8) >> 4], -1).flatten(1).float()
    assert ((values * scale - kept).abs() <= 0.5001 * scale).all()
    tiny = torch.tensor([[1e-5 * top / 127, 0, 0, -1e-5 * top / 127] * 4], dtype=torch.float16)
    q = compress(tiny, bits).values
    assert (q == (torch.tensor([127, -127] * 4) if bits == 8 else 7 | (-7 & 15) << 4)).all()
