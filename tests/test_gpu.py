"""What a GPU computes against what a CPU computes, and against the published outputs. Skipped where there is no GPU."""

import copy
import json
import sys

import pytest
import torch

import ast_train
import dsnot
import global_swaps
from compressed import sparsify
from conftest import make_checkpoint
from data.calibration import divergence
from dsnot import dsnot_refine, keep_mask, magnitude_score, refit_weights, sparsegpt, swap_refine, wanda_score
from global_swaps import swap_globally
from gpt import GPT, all_prunable, prunable
from sparse_matmul import compress, decompress, prune_24, sparse_linear
from swaps import relative_error
from test_dsnot import published_dsnot, published_sparsegpt, random_layer, stats_of
from test_gpt import ALL, ids_for, ours

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
AMOUNTS = [dict(sparsity=0.6), dict(pattern=(2, 4)), dict(pattern=(4, 8))]


def same(a, b, share=1e-3):
    """Whether two masks agree but for what sums in another order decide otherwise."""
    return (a.cpu() != b.cpu()).float().mean() <= share


@pytest.mark.parametrize("amount", AMOUNTS)
def test_masks_and_weights_are_those_of_a_cpu(amount):
    """Would catch statistics, masks, DSnoT, SparseGPT, swaps or refit that depend on where they run."""
    W, inputs = random_layer(7, rows=96, width=256, tokens=128)
    found, pattern = {}, amount.get("pattern")
    for device in "cpu", "cuda":
        w, stats = W.to(device), stats_of(inputs.to(device), gram=True)
        score = wanda_score(w, stats)
        keep = keep_mask(score, **amount)
        swapped = swap_refine(w, keep, stats.gram, pattern=pattern)
        found[device] = dict(
            gram=stats.gram, variance=stats.variance, magnitude=keep_mask(magnitude_score(w), **amount), wanda=keep,
            dsnot=dsnot_refine(w, keep, stats, score, cycles=20, sign_check=False, pattern=pattern),
            sparsegpt=sparsegpt(w, stats.gram, keep=keep), own=sparsegpt(w, stats.gram, **amount) != 0,
            refit=refit_weights(w, keep, stats.gram), swap=relative_error(w, w * swapped, stats.gram))
    for name, value in found["cpu"].items():
        other = found["cuda"][name]
        if name == "swap":  # a swap that is chosen otherwise leads elsewhere, to an error that is as low
            assert other == pytest.approx(value, rel=0.01) and value < 0.9 * relative_error(
                W, W * found["cpu"]["wanda"], found["cpu"]["gram"])
        elif value.dtype == torch.bool:
            assert same(value, other), (name, (value != other.cpu()).float().mean())
        else:
            torch.testing.assert_close(other.cpu(), value, rtol=1e-3, atol=1e-3 * value.abs().max().item())


def test_published_masks():
    """DSnoT's published implementation, on a GPU; SparseGPT's masks and weights."""
    for case, found, expected in published_dsnot("cuda"):
        assert same(found, expected), case
    for case, new, expected in published_sparsegpt("cuda"):
        assert same(new == 0, expected == 0), case
        alike = (new - expected).abs() <= 1e-3  # where a mask differs, so do the weights to its right
        assert alike.float().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_global_swaps(dtype, tmp_path):
    """Would catch gradients that a CPU finds otherwise, and swaps that don't lower the loss in 16 bits."""
    make_checkpoint(tmp_path)
    ids, found = torch.randint(0, 64, (12, 16)), {}
    for device in "cpu", "cuda":
        dense, pruned = (GPT.from_pretrained(tmp_path, device=device, dtype=dtype) for _ in range(2))
        layers = all_prunable(pruned)
        for layer in layers.values():
            layer.weight.data *= keep_mask(layer.weight, pattern=(2, 4))
        text = [ids.to(device)]
        with torch.no_grad():
            expected = [dense(text[0]).float().log_softmax(-1)]
        _, found[device] = global_swaps.output_gradients(pruned, layers, text, expected, divergence)
        losses = swap_globally(pruned, dense, ids, 4, (2, 4))
        assert losses[-1][1] < losses[0][0]
        assert all(((layer.weight != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all() for layer in layers.values())
    slack = 1e-3 if dtype == torch.float32 else 0.1
    for name, sums in found["cpu"].items():
        for a, b in zip(sums, found["cuda"][name]):
            torch.testing.assert_close(b.cpu(), a, rtol=slack, atol=slack * a.abs().max().item())


def check_greedy(model, ids, slack):
    """That the text which a model adds, token by token, is what it finds most likely when it reads all of it."""
    text = model.generate(ids, 12, temperature=0)
    for length in range(ids.shape[1], text.shape[1]):
        logits = model(text[:, :length])[:, -1].float()
        assert (logits.gather(1, text[:, length:length + 1])[:, 0] >= logits.amax(1) - slack).all()


@pytest.mark.parametrize("family, changes", ALL)
@torch.no_grad()
def test_logits_and_text(family, changes):
    """Would catch tensors left on the CPU, an attention kernel that computes something else, and a CUDA graph that
    repeats its first token or reads old positions."""
    model, ids = ours(family, changes), ids_for(batch=2, length=9)
    expected = model(ids)
    torch.testing.assert_close(model.cuda()(ids).cpu(), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(model.generate(ids, 4, temperature=0), model.generate(ids.cuda(), 4, temperature=0))
    ids = ids.cuda()
    check_greedy(model, ids, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_sparse_products(dtype, bits):
    """Would catch a tile that is chosen for a shape which it computes wrongly, lost leading dimensions, a bias."""
    for N, K in (40, 64), (512, 1392):
        W, bias = prune_24(torch.randn(N, K, device="cuda")).to(dtype), torch.randn(N, device="cuda", dtype=dtype)
        w = compress(W, bits)
        dense = decompress(w).double()
        for shape in (1,), (1, 1), (3,), (2, 20), (1500,):
            x = torch.randn(*shape, K, device="cuda", dtype=dtype)
            expected = x.double() @ dense.T + bias.double()
            size = x.double().abs() @ dense.abs().T
            error = (sparse_linear(x, w, bias).double() - expected).abs()
            assert (error <= 4 * torch.finfo(dtype).eps * (size * 0.05 + expected.abs())).all(), (N, K, shape)


@torch.no_grad()
def test_a_compressed_model_writes_the_same_text(tmp_path):
    """Would catch tiles that are timed inside a CUDA graph, and a wrong layer in the place of another."""
    make_checkpoint(tmp_path / "m")
    model = GPT.from_pretrained(tmp_path / "m", device="cuda", dtype=torch.bfloat16)
    for block in model.model.layers:
        for layer in prunable(block).values():
            layer.weight.copy_(prune_24(layer.weight))
    small = copy.deepcopy(model)
    assert sum(sparsify(block) for block in small.model.layers) >= 8
    ids = torch.randint(3, 96, (1, 9), device="cuda")
    torch.testing.assert_close(small(ids).float(), model(ids).float(), rtol=0.05, atol=0.05)
    check_greedy(small, ids, 0.1)


def test_commands(monkeypatch, tmp_path):
    """Would catch a command that fails on a GPU, or finds something else there."""
    make_checkpoint(tmp_path / "m")
    (tmp_path / "text.txt").write_text("the model reads words and the words are few so it can learn them\n" * 400)
    text, found = str(tmp_path / "text.txt"), {}
    for device in "cpu", "cuda":
        def run(main, *options):
            monkeypatch.setattr(sys, "argv", ["-", "--model", str(tmp_path / "m"), "--data", text, "--seqlen", "32",
                                              "--device", device, "--json", str(tmp_path / "r.json"), *options])
            main()
            return json.loads((tmp_path / "r.json").read_text())["results"]
        out = str(tmp_path / device)
        pruned = run(dsnot.main, "--calib", text, "--nsamples", "8", "--refine", "swap", "--refit", "--out", out)
        trained = run(ast_train.main, "--eval-data", text, "--methods", "ast", "ast-slorb", "--batch", "4",
                      "--micro-batch", "2", "--steps", "6", "--warmup", "2", "--decay-steps", "3", "--no-one-shot",
                      "--no-compile", "--dtype", "float32", "--slorb-k", "8", "--out", out + "-ast")
        found[device] = [row["perplexity"] for row in pruned["rows"]] + [
            row["perplexity"] for row in trained["table"].values()]
    assert found["cuda"] == pytest.approx(found["cpu"], rel=0.01)
