"""Oracles for dsnot.py: golden masks, a slow loop per row that follows the formulas, and the command itself."""

import json
import math
import os
import random
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import dsnot
from conftest import ROOT, SHARED, make_checkpoint
from data.calibration import watch
from data.command import InputError, run
from dsnot import InputStats, dsnot_refine, keep_mask, magnitude_score, sparsegpt, wanda_score
from test_gpt import ALL, ids_for, theirs


def golden(name):
    path = SHARED / "golden" / name
    if not path.is_file():
        pytest.skip("the published implementations' outputs are not here")
    f = safe_open(path, framework="pt")
    return f, json.loads(f.metadata()["cases"])


def stats_of(inputs, gram=False):
    stats = InputStats(inputs.shape[-1], gram=gram)
    for x in inputs:
        stats.add(x)
    return stats


def random_layer(seed, rows=24, width=64, sequences=4, tokens=16):
    g = torch.Generator().manual_seed(seed)
    inputs = (torch.randn(sequences, tokens, width, generator=g) * torch.rand(width, generator=g) * 2 +
              torch.randn(width, generator=g) * 0.3)
    return torch.randn(rows, width, generator=g), inputs


# ------------------------------------------------------------------------------------------------------ statistics

def test_stats_follow_their_definition():
    """Would catch a mean over tokens instead of a sum, an unbiased variance, variance over all sequences together."""
    _, inputs = random_layer(0)
    x, stats = inputs.double(), stats_of(inputs, gram=True)
    torch.testing.assert_close(stats.sum.double(), x.sum(1).mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.square.double(), x.square().sum(1).mean(0), rtol=1e-5, atol=1e-5)
    variance = torch.stack([((s - s.mean(0)) ** 2).mean(0) for s in x]).mean(0)
    torch.testing.assert_close(stats.variance.double(), variance, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.gram.double(), torch.einsum("nti,ntj->ij", x, x), rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------- masks

@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.5, 0.7, 0.99])
@pytest.mark.parametrize("ties", [False, True])
def test_mask_equals_stable_sort(sparsity, ties):
    """Would catch a wrong count in any row and ties broken in another order than a stable sort does."""
    score = torch.randn(33, 50).abs()
    score = (score * 3).round() if ties else score
    expected = torch.ones(33, 50, dtype=torch.bool)
    for r in range(33):
        expected[r, sorted(range(50), key=lambda k: score[r, k].item())[:int(50 * sparsity)]] = False
    assert torch.equal(keep_mask(score, sparsity), expected)


@pytest.mark.parametrize("n,m", [(2, 4), (4, 8), (1, 4), (3, 5), (15, 16)])
def test_nm_mask_equals_slow_loop(n, m):
    """Would catch a group that is not n of m, and pruning anything but the lowest of a group (ties from the left)."""
    score = (torch.randn(9, 6 * m).abs() * 4).round()
    keep = keep_mask(score, pattern=(n, m))
    assert (keep.view(9, -1, m).sum(-1) == n).all()
    for r in range(9):
        for left in range(0, 6 * m, m):
            lowest = sorted(range(left, left + m), key=lambda k: score[r, k].item())[:m - n]
            assert [k for k in range(left, left + m) if not keep[r, k]] == sorted(lowest)


def test_pattern_must_divide_the_row():
    """Would catch a column left over being kept or dropped in silence."""
    for refuse in (lambda: keep_mask(torch.rand(4, 10), pattern=(2, 4)),
                   lambda: sparsegpt(torch.rand(4, 10), torch.eye(10), pattern=(2, 4))):
        with pytest.raises(InputError, match="2:4.*10 inputs"):
            refuse()


# ----------------------------------------------------------------------------------------------------------- DSnoT

def slow_dsnot(W, keep, stats, score, cycles, threshold, var_power, sign_check, pattern):
    """The update rule, one row at a time, in float32 and in the order of the formulas."""
    W, new = W.float(), keep.clone()
    D = W * stats.sum
    gain = D / (stats.variance ** var_power).clamp(min=1e-30)
    wanda = wanda_score(W, stats)
    for r in range(len(W)):
        columns = range(W.shape[1])
        e = torch.where(keep[r:r + 1], 0, D[r:r + 1]).sum(1)[0]  # summed as a row of its matrix
        start = e.sign()
        growable = sorted((k for k in columns if not keep[r, k]), key=lambda k: gain[r, k].item())
        low = high = 0
        kept = [k for k in columns if keep[r, k]]
        by_side = {side: sorted((k for k in kept if (D[r, k] > 0 if side < 0 else D[r, k] < 0)),
                                key=lambda k: wanda[r, k].item())
                   for side in (-1, 1)}
        for _ in range(min(cycles, W.shape[1])):
            if e.abs() <= threshold or low + high >= len(growable):
                break
            if e > 0:
                g, high = growable[-1 - high], high + 1
            else:
                g, low = growable[low], low + 1
            if pattern is None:
                candidates = by_side[1 if e >= 0 else -1]
            else:
                left = g - g % pattern[1]
                candidates = sorted((k for k in range(left, left + pattern[1]) if k in kept),
                                    key=lambda k: score[r, k].item())
            if not candidates:
                break
            p = candidates[0]
            after = e + D[r, p] - D[r, g]
            if sign_check and after.sign() != start:
                break
            candidates.pop(0)
            kept.remove(p)
            new[r, g], new[r, p], e = True, False, after
    return new


CASES = [  # seed, layer, amount, cycles, threshold, var_power, sign_check
    (0, {}, dict(sparsity=0.5), 50, 0.1, 1.0, False),
    (1, {}, dict(sparsity=0.7), 50, 0.1, 1.0, True),
    (2, dict(rows=3, width=8), dict(sparsity=0.5), 50, 0.0, 1.0, False),
    (3, dict(rows=5, width=12), dict(sparsity=0.1), 50, 0.0, 2.0, False),
    (4, dict(rows=5, width=12), dict(sparsity=0.95), 50, 0.0, 1.0, False),
    (5, {}, dict(sparsity=0.6), 3, 0.1, 0.5, False),
    (6, {}, dict(pattern=(2, 4)), 50, 0.1, 1.0, True),
    (7, {}, dict(pattern=(4, 8)), 50, 0.1, 1.0, False),
    (8, {}, dict(pattern=(1, 4)), 50, 0.0, 1.0, False),
    (9, dict(rows=70, width=1000), dict(sparsity=0.7), 50, 0.1, 1.0, False),
    (10, dict(sequences=1, tokens=1), dict(sparsity=0.5), 10, 0.1, 1.0, False),  # no variance at all
]


@pytest.mark.parametrize("kind", ["plain", "dead inputs", "constant rows", "bf16", "zero rows"])
@pytest.mark.parametrize("case", CASES, ids=[str(c[0]) for c in CASES])
def test_dsnot_equals_slow_loop(case, kind):
    """Would catch any departure from the rule: a wrong side, an index used twice, lists that run out, ties, the
    sign check, the threshold, NaN from dead inputs."""
    seed, layer, amount, cycles, threshold, var_power, sign_check = case
    W, inputs = random_layer(seed, **layer)
    if kind == "dead inputs":
        inputs[..., ::3] = 0
    elif kind == "constant rows":
        W[::2] = 0.5
    elif kind == "zero rows":
        W[::2] = 0
    elif kind == "bf16":
        W = W.bfloat16()
    stats, pattern = stats_of(inputs), amount.get("pattern")
    for score in (magnitude_score(W), wanda_score(W, stats)):
        keep = keep_mask(score, **amount)
        options = dict(cycles=cycles, threshold=threshold, var_power=var_power, sign_check=sign_check, pattern=pattern)
        new = dsnot_refine(W, keep, stats, score, **options)
        assert torch.equal(new, slow_dsnot(W, keep, stats, score, **options))
        assert torch.equal(new.sum(1), keep.sum(1))
        if pattern:
            assert (new.view(len(W), -1, pattern[1]).sum(-1) == pattern[0]).all()


def test_dsnot_golden():
    """The published implementation's masks, bit for bit: would catch a method that only resembles DSnoT."""
    f, cases = golden("dsnot.safetensors")
    W, stats = f.get_tensor("weight"), stats_of(f.get_tensor("inputs"))
    assert len(cases) == 16
    for i, case in enumerate(cases):
        score = wanda_score(W, stats) if case["init"] == "wanda" else magnitude_score(W)
        pattern = (case["n"], case["m"]) if "n" in case else None
        keep = keep_mask(score, pattern=pattern) if pattern else keep_mask(score, case["sparsity"])
        new = dsnot_refine(W, keep, stats, score, cycles=case["cycles"], threshold=case["threshold"],
                           var_power=case["pow_var"], sign_check=case["sign_check"], pattern=pattern)
        assert torch.equal(~new, f.get_tensor(f"pruned.{i}")), case


def test_dsnot_lowers_the_expected_error():
    """Would catch growing what should be pruned: with the sign check, the mean error of no row may rise."""
    W, inputs = random_layer(3, rows=64, width=256)
    stats = stats_of(inputs)
    keep = keep_mask(wanda_score(W, stats), 0.7)
    new = dsnot_refine(W, keep, stats, wanda_score(W, stats), sign_check=True)
    before, after = (((W * ~mask) @ inputs.sum(1).mean(0)).abs() for mask in (keep, new))
    assert (after <= before + 1e-4).all() and after.mean() < 0.5 * before.mean()


# ----------------------------------------------------------------------------------------------- exact swaps, refit

def squared_error(W, kept_weights, inputs, dense_inputs=None):
    """||W Z - W_sparse X||^2 per row, from the inputs themselves, in float64."""
    z = (inputs if dense_inputs is None else dense_inputs).flatten(0, 1).double()
    return (z @ W.double().T - inputs.flatten(0, 1).double() @ kept_weights.double().T).square().sum(0)


AMOUNTS = [dict(sparsity=0.5), dict(sparsity=0.75), dict(sparsity=0.9),
           dict(pattern=(2, 4)), dict(pattern=(1, 4)), dict(pattern=(4, 8))]


def inputs_case(seed, with_cross, **layer):
    """A layer W, what it gets, what it would get in the dense model z, and InputStats of both."""
    W, z = random_layer(seed, **layer)
    inputs = z + 0.3 * torch.randn(z.shape, generator=torch.Generator().manual_seed(seed)) if with_cross else z
    stats = InputStats(W.shape[1], gram=True)
    for n, x in enumerate(inputs):
        stats.add(x, z[n] if with_cross else None)
    return W, inputs, z, stats


def swap_case(seed, amount, with_cross, **layer):
    W, inputs, z, stats = inputs_case(seed, with_cross, **layer)
    goal = W @ stats.cross if with_cross else None
    return W, inputs, z, stats.gram, goal, keep_mask(wanda_score(W, stats), **amount)


@pytest.mark.parametrize("width", [30, 1000, 1024, 2048])
def test_lowest_is_topk(width):
    """Would catch columns that the search in two steps overlooks, and rows that have fewer than k to offer."""
    x = torch.randn(40, width, generator=torch.Generator().manual_seed(width))
    x[:20, torch.randperm(width)[:width - 5]] = torch.inf
    found = dsnot.lowest(x, 16)
    assert torch.equal(x.gather(1, found), x.topk(16, dim=1, largest=False)[0])
    assert all(len(set(row)) == 16 for row in found.tolist())


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("with_cross", [False, True])
def test_swaps_end_where_no_swap_helps(amount, with_cross):
    """Would catch a wrong price of a swap, an error that rises, a broken pattern, and stopping too early: every pair
    that is left is tried, directly on the inputs."""
    W, inputs, z, gram, goal, keep = swap_case(0, amount, with_cross, rows=6, width=24, tokens=32)
    pattern = amount.get("pattern")
    new = dsnot.swap_refine(W, keep, gram, goal=goal, candidates=24, pattern=pattern)
    before, after = squared_error(W, W * keep, inputs, z), squared_error(W, W * new, inputs, z)
    assert (after <= before * (1 + 1e-6)).all() and after.sum() < before.sum()
    assert torch.equal(new.sum(1), keep.sum(1))
    for r in range(len(W)):
        for j in range(24):
            for i in range(24):
                allowed = new[r, j] and not new[r, i] and (pattern is None or i // pattern[1] == j // pattern[1])
                if allowed:
                    other = new[r].clone()
                    other[j], other[i] = False, True
                    assert squared_error(W[r:r + 1], W[r:r + 1] * other, inputs, z)[0] >= after[r] * (1 - 1e-4)
    if pattern:
        assert (new.view(len(W), -1, pattern[1]).sum(-1) == pattern[0]).all()


@pytest.mark.parametrize("amount", AMOUNTS)
def test_few_candidates_do_as_well_as_all(amount):
    """Would catch a choice of candidates that misses good swaps."""
    W, inputs, _, gram, _, keep = swap_case(1, amount, False, rows=40, width=96, tokens=64)
    pattern = amount.get("pattern")
    masks = [dsnot.swap_refine(W, keep, gram, candidates=c, pattern=pattern) for c in (8, 96)]
    few, all_pairs = (squared_error(W, W * mask, inputs).sum() for mask in masks)
    assert few < all_pairs * 1.03
    one = dsnot.swap_refine(W, keep, gram, max_swaps=1, pattern=pattern)
    assert ((one != keep).sum(1) <= 2).all() and (one != keep).any()


@pytest.mark.parametrize("refine,refit", [("dsnot", False), ("swap", False), ("swap", True), ("dsnot+swap", False)])
def test_cycles_bound_the_swaps(refine, refit):
    """Would catch a --cycles that one of the refinements does not hear: a swap flips two weights of a row."""
    W, _, _, stats = inputs_case(4, False, rows=20, width=64, tokens=64)
    options = dict(score="wanda", refine=refine, refit=refit, sparsity=0.5)
    keep = keep_mask(wanda_score(W, stats), sparsity=0.5)
    flips = [((dsnot.prune_layer(W, stats, cycles=c, **options) != 0) != keep).sum(1).max().item()
             for c in (0, 1, None)]
    turns = 2 if refit or "+" in refine else 1
    assert flips[0] == 0 and 0 < flips[1] <= 2 * turns and (flips[2] > flips[1] or refine == "dsnot")


def test_swaps_of_uneven_rows():
    """Would catch rows of a SparseGPT mask, which keep different numbers of weights, trading theirs; full and empty
    rows."""
    W, inputs, _, gram, _, _ = swap_case(2, dict(sparsity=0.5), False, rows=12, width=100)
    keep = torch.rand(12, 100, generator=torch.Generator().manual_seed(0)) < torch.linspace(0, 1, 12)[:, None]
    new = dsnot.swap_refine(W, keep, gram, candidates=8)
    assert torch.equal(new.sum(1), keep.sum(1))
    assert (squared_error(W, W * new, inputs) <= squared_error(W, W * keep, inputs) * (1 + 1e-6)).all()


@pytest.mark.parametrize("with_cross", [False, True])
def test_refit_is_least_squares(with_cross):
    """Would catch weights that are not the best ones for the mask: the normal equations hold, and lstsq agrees."""
    W, inputs, z, gram, goal, keep = swap_case(3, dict(sparsity=0.6), with_cross, rows=10, width=32, tokens=64)
    keep[3] = False
    new = dsnot.refit_weights(W, keep, gram, goal=goal, damp=0.0)
    assert torch.equal(new != 0, keep)
    x, y = inputs.flatten(0, 1).double(), z.flatten(0, 1).double() @ W.double().T
    for r in (r for r in range(10) if keep[r].any()):
        k = keep[r]
        residual = x[:, k].T @ (x[:, k] @ new[r, k].double() - y[:, r])
        assert residual.norm() <= 1e-4 * (x[:, k].T @ y[:, r]).norm()
        best = torch.linalg.lstsq(x[:, k], y[:, r:r + 1]).solution[:, 0]
        torch.testing.assert_close(new[r, k].double(), best, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("amount", AMOUNTS)
def test_swaps_after_a_refit_lower_the_error(amount):
    """Would catch a wrong value for a weight that comes back, and rounds that undo each other or the pattern."""
    W, inputs, z, gram, goal, keep = swap_case(4, amount, True, rows=40, width=48, tokens=64)
    errors = []
    for rounds in range(4):
        new = dsnot.swap_and_refit(W, keep, gram, goal=goal, pattern=amount.get("pattern"), rounds=rounds)
        assert torch.equal((new != 0).sum(1), keep.sum(1))
        errors.append(((inputs @ new.T - z @ W.T) ** 2).sum((0, 1)))
    assert all((after <= before * (1 + 1e-4)).all() for before, after in zip(errors, errors[1:]))
    assert errors[1].sum() < errors[0].sum()
    if pattern := amount.get("pattern"):
        assert ((new != 0).view(len(W), -1, pattern[1]).sum(-1) == pattern[0]).all()


def test_dense_weights_are_least_squares():
    """Would catch a wrong goal for SparseGPT: they are the refit of a mask that keeps all, and W where its own output
    is the goal."""
    W, _, _, gram, goal, keep = swap_case(3, dict(sparsity=0.6), True, rows=10, width=32, tokens=64)
    expected = dsnot.refit_weights(W, torch.ones_like(keep), gram, goal=goal, damp=0.0)
    torch.testing.assert_close(dsnot.dense_weights(W, gram, goal, damp=0.0), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(dsnot.dense_weights(W, gram, W @ gram), W)
    assert not (expected - W).abs().max() < 0.01


def test_reported_error_is_the_error():
    """Would catch an error that is not ||(W - W_sparse) X||^2 / ||W X||^2."""
    W, inputs, _, gram, _, keep = swap_case(4, dict(sparsity=0.5), False)
    expected = squared_error(W, W * keep, inputs).sum() / squared_error(W, W * 0, inputs).sum()
    assert dsnot.relative_error(W, W * keep, gram) == pytest.approx(expected.item(), rel=1e-4)


# ------------------------------------------------------------------------------------------------------- SparseGPT

def slow_sparsegpt(W, gram, mask, damp):
    """Optimal brain surgeon, column by column in float64: the exact inverse of what remains, for a given mask."""
    W, H = W.double().clone(), gram.double()
    H = H + damp * H.diagonal().mean() * torch.eye(len(H))
    for k in range(len(H)):
        inverse = torch.linalg.inv(H[k:, k:])
        error = torch.where(mask[:, k], 0, W[:, k]) / inverse[0, 0]
        W[:, k:] -= error[:, None] * inverse[0]
    return W * mask


@pytest.mark.parametrize("amount", [dict(sparsity=0.5), dict(sparsity=0.8), dict(pattern=(2, 4)), dict(pattern=(1, 3))])
def test_sparsegpt_equals_slow_loop(amount):
    """Would catch an error spread over the wrong columns or blocks, or a wrong Cholesky factor."""
    W, inputs = random_layer(4, rows=10, width=48, tokens=32)
    gram = stats_of(inputs, gram=True).gram
    new = sparsegpt(W, gram, **amount, block=16)
    torch.testing.assert_close(new.double(), slow_sparsegpt(W, gram, new != 0, 0.01), rtol=1e-4, atol=1e-4)
    if "pattern" in amount:
        n, m = amount["pattern"]
        assert ((new != 0).view(10, -1, m).sum(-1) == n).all()
    else:
        assert abs((new == 0).float().mean() - amount["sparsity"]) < 0.01
    # the same mask, the same correction
    assert torch.allclose(sparsegpt(W, gram, keep=new != 0, block=16), new, atol=1e-5)


def test_pruned_weights_come_back_with_their_best_values():
    """Would catch a wrong slope or a wrong goal: alone, no other value of a pruned weight lowers its row's error as
    much."""
    W, inputs, z, stats = inputs_case(7, True, rows=3, width=12, tokens=32)
    keep = keep_mask(W.abs(), 0.5)
    new, goal = torch.where(keep, W, 0), W @ stats.cross
    values = dsnot.with_pruned(new, keep, stats.gram, goal)
    assert torch.equal(values[keep], W[keep])
    for r, i in (~keep).nonzero().tolist():
        def error(value):
            other = new.clone()
            other[r, i] = value
            return squared_error(W, other, inputs, z)[r]
        best = values[r, i].item()
        assert error(best) < min(error(best - 0.05), error(best + 0.05), error(0))


def test_sparsegpt_aims_for_what_propagation_says():
    """Would catch a correction that ignores what the pruned layers before have done: the goal is the dense model's
    output."""
    W, inputs, z, stats = inputs_case(6, True, rows=10, width=32, tokens=64)
    aimed = dsnot.prune_layer(W, stats, goal=dsnot.layer_goal(W, stats, "weights"), score="sparsegpt", refine="none",
                              sparsity=0.5)
    plain = sparsegpt(W, stats.gram, sparsity=0.5)
    assert (inputs @ aimed.T - z @ W.T).square().sum() < 0.8 * (inputs @ plain.T - z @ W.T).square().sum()


def test_sparsegpt_survives_dead_inputs():
    """Would catch a singular Hessian ending in NaN, and dead inputs keeping their weights."""
    W, inputs = random_layer(5, rows=6, width=32)
    inputs[..., 3:9] = 0
    new = sparsegpt(W, stats_of(inputs, gram=True).gram, sparsity=0.5)
    assert new.isfinite().all() and (new[:, 3:9] == 0).all()


def test_sparsegpt_golden():
    """The published implementation: masks identical, weights to 1e-4."""
    f, cases = golden("sparsegpt.safetensors")
    W, stats = f.get_tensor("weight"), stats_of(f.get_tensor("inputs"), gram=True)
    for i, case in enumerate(cases):
        amount = dict(pattern=(case["n"], case["m"])) if case["n"] else dict(sparsity=case["sparsity"])
        new = sparsegpt(W, stats.gram, **amount, damp=case["damp"], block=case["block"])
        expected = f.get_tensor(f"result.{i}")
        assert torch.equal(new == 0, expected == 0), case
        torch.testing.assert_close(new, expected, rtol=0, atol=1e-4)


# ----------------------------------------------------------------------------------------------------- the command

@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_checkpoint(folder / "m")
    words = "the model reads words and the words are few so it can learn them by heart in no time at all".split()
    rng = random.Random(0)
    (folder / "text.txt").write_text("\n".join(" ".join(rng.choices(words, k=12)) for _ in range(400)))
    return folder


def command(monkeypatch, model, out, *options):
    text = str(model / "text.txt")
    monkeypatch.setattr(sys, "argv", ["dsnot.py", "--device", "cpu", "--model", str(model / "m"), "--calib", text,
                                      "--data", text, "--nsamples", "4", "--seqlen", "32", "--out", str(out), *options])
    run(dsnot.main)


def tensors(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.mark.parametrize("options", [
    ("--sparsity", "0.6", "--compare"), ("--sparsity", "0.6", "--propagate"),
    ("--pattern", "2:4", "--refine", "dsnot+swap", "--refit"), ("--pattern", "2:4", "--score", "magnitude"),
    ("--pattern", "4:8", "--score", "sparsegpt", "--refine-layers", "attn"),
    ("--sparsity", "0.5", "--score", "sparsegpt", "--refine", "none"),
])
def test_command(monkeypatch, capsys, model, tmp_path, options):
    """Would catch a checkpoint that transformers can't load or reads differently, layers that are not pruned or not
    exactly, embeddings or norms that changed, and a table without its numbers."""
    transformers = pytest.importorskip("transformers")
    from gpt import GPT
    command(monkeypatch, model, tmp_path / "out", *options, "--json", str(tmp_path / "r.json"))
    result = json.loads((tmp_path / "r.json").read_text())["results"]
    printed = capsys.readouterr().out
    assert all(f"{row['perplexity']:.2f}" in printed and math.isfinite(row["perplexity"]) for row in result["rows"])
    assert len(result["rows"]) == 2 + ("--compare" in options)
    before, after = tensors(model / "m"), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, W in after.items():
        if "proj" not in name:
            assert torch.equal(W, before[name])
        elif "--pattern" in options:
            n, m = map(int, options[1].split(":"))
            assert ((W != 0).view(len(W), -1, m).sum(-1) == n).all()
        elif "sparsegpt" not in options:
            assert ((W == 0).sum(1) == int(W.shape[1] * 0.6)).all()
            assert torch.equal(W[W != 0], before[name][W != 0])
    ids = torch.randint(0, 64, (1, 20))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(ids).logits
    torch.testing.assert_close(GPT.from_pretrained(tmp_path / "out")(ids), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("after,method", [(1, ["--score", "sparsegpt"]), (8, ["--score", "sparsegpt"]),
                                          (13, ["--refine", "swap"])])
def test_interrupted_run_goes_on(monkeypatch, capsys, model, tmp_path, after, method):
    """Would catch lost blocks, blocks done twice with other results, and anything random that depends on the stop."""
    command(monkeypatch, model, tmp_path / "whole", *method)
    real, calls = dsnot.prune_layer, []

    def stop(*args, **options):
        calls.append(1)
        if len(calls) == after:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(dsnot, "prune_layer", stop)
    with pytest.raises(SystemExit):
        command(monkeypatch, model, tmp_path / "cut", *method)
    assert not (tmp_path / "cut").exists()
    log, calls[:] = tmp_path / "cut.partial" / "pruning.json", []
    if stopped_late := log.is_file():
        log.write_text(json.dumps(json.loads(log.read_text()) | {"seconds": 1000}))
    monkeypatch.setattr(dsnot, "prune_layer", lambda *args, **options: (calls.append(1), real(*args, **options))[1])
    command(monkeypatch, model, tmp_path / "cut", *method)
    assert len(calls) == 14 - (after - 1) // 7 * 7, "a finished block was pruned again"
    for file in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert (tmp_path / "cut" / file.name).read_bytes() == file.read_bytes()
    layers = [json.loads((tmp_path / run / "pruning.json").read_text())["layers"] for run in ("whole", "cut")]
    assert layers[0] == layers[1] and len(layers[0]) == 14 and all("error" in layer for layer in layers[0])
    seconds = json.loads((tmp_path / "cut" / "pruning.json").read_text())["seconds"]
    assert (seconds > 1000) == stopped_late == (after > 7), "the time before the stop counts, too"


@pytest.mark.parametrize("goes_on", [False, True])
def test_an_interruption_says_whether_the_command_goes_on(capsys, goes_on):
    def main():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as stopped:
        run(main, goes_on)
    assert stopped.value.code == 130 and ("goes on" in capsys.readouterr().err) == goes_on


def test_a_finished_folder_is_made_anew_when_the_model_has_changed(monkeypatch, model, tmp_path):
    """Would catch the masks of weights that are no longer there being handed out; and work done twice where they
    are."""
    shutil.copytree(model, tmp_path / "model")
    real, calls = dsnot.prune_layer, []
    monkeypatch.setattr(dsnot, "prune_layer", lambda *args, **options: (calls.append(1), real(*args, **options))[1])
    for times, layers in (1, 14), (2, 14), (3, 28):
        if times == 3:
            os.utime(tmp_path / "model" / "m" / "model.safetensors", (0, 0))
        command(monkeypatch, tmp_path / "model", tmp_path / "out")
        assert len(calls) == layers


@pytest.mark.parametrize("family, changes", ALL)
def test_every_family_is_pruned(family, changes, tmp_path):
    """Would catch layers that are left out, fused or transposed weights pruned along the wrong side, a head or a
    projection of the embedding that is pruned, and folders that transformers reads otherwise."""
    transformers = pytest.importorskip("transformers")
    theirs(family, changes).save_pretrained(tmp_path / "m")
    windows, ids = ids_for(batch=6), ids_for(seed=2)
    for score, refine, amount in [("wanda", "dsnot", dict(sparsity=0.6)), ("sparsegpt", "dsnot", dict(pattern=(2, 4))),
                                  ("magnitude", "swap", dict(pattern=(4, 8)))]:
        dense = dsnot.GPT.from_pretrained(tmp_path / "m")
        dsnot.prune(dsnot.GPT.from_pretrained(tmp_path / "m", stream=True), windows, tmp_path / "out", {"run": score},
                    batch=4, score=score, refine=refine, propagate=refine == "swap", **amount)
        pruned = dsnot.GPT.from_pretrained(tmp_path / "out")
        layers = {f"model.layers.{i}.{name}.weight": layer.weight for i, block in enumerate(pruned.model.layers)
                  for name, layer in dsnot.prunable(block).items()}
        assert len(layers) == 3 * (7 if dense.config.gated else 6)
        for name, W in layers.items():
            n, m = amount.get("pattern", (W.shape[1] - int(W.shape[1] * 0.6), W.shape[1]))
            kept = (W != 0).view(len(W), -1, m).sum(-1)
            assert (kept <= n).all() if score == "sparsegpt" else (kept == n).all(), name  # it also clears dead inputs
        assert all(name in layers or torch.equal(value, dense.state_dict()[name])
                   for name, value in pruned.state_dict().items())
        other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        torch.testing.assert_close(pruned(ids), other(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family, changes", ALL)
@pytest.mark.parametrize("refit", [False, True])
def test_layers_aim_at_the_dense_model(monkeypatch, family, changes, refit, tmp_path):
    """Would catch inputs of the wrong model in a goal, and a hidden state that is made up for in the wrong layer or
    with the wrong sign: with refit, a layer that adds to it aims at all that is missing in the dense one; masks aim
    half-way."""
    pytest.importorskip("transformers")
    theirs(family, changes).save_pretrained(tmp_path)
    model, goals = dsnot.GPT.from_pretrained(tmp_path), []
    monkeypatch.setattr(dsnot, "prune_layer", lambda W, stats, goal, **_: (goals.append(goal), W)[1])
    block, ids = model.model.layers[1], ids_for(batch=4)
    dense = model.embed(ids)
    sparse = dense + 0.2 * torch.randn(dense.shape, generator=torch.Generator().manual_seed(0))
    where = dsnot.rotary(model.config, torch.arange(ids.shape[1])), torch.arange(ids.shape[1])
    linears, expected, x, z = dsnot.prunable(block), [], sparse, dense
    with torch.no_grad():
        for step in dsnot.steps(block, *where, halves=True):
            seen, wanted = {}, {}
            with watch(linears, seen.__setitem__):
                after = step(x)
            with watch(linears, wanted.__setitem__):
                step(z)
            for i, name in enumerate(seen):
                W = linears[name].weight
                y = wanted[name] @ W.T if refit else (wanted[name] + seen[name]) / 2 @ W.T
                if refit and i == len(seen) - 1:
                    y = y + z - x
                expected.append(torch.einsum("nto,nti->oi", y, seen[name]))
            x, z = after, step(z)
        dsnot.prune_block(block, where, list(sparse.split(2)), list(dense.split(2)), "b", lambda name: torch.float32,
                          score="wanda", refine="swap", refit=refit, propagate=True,
                          sparsity={f"b.{name}": 0.5 for name in linears})
    assert len(goals) == len(linears)
    for goal, found in zip(expected, goals):
        torch.testing.assert_close(found, goal, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options, alike", [
    (("--sparsity", "0.6"), 0.999),
    (("--sparsity", "0.6", "--allocate", "sensitivity"), 0.9),  # a layer's share may move a step
    (("--pattern", "2:4", "--score", "sparsegpt", "--refine", "swap"), 0.99),
    (("--sparsity", "0.5", "--score", "sparsegpt", "--refine", "none"), 0.99),
])
def test_two_processes_prune_as_one(monkeypatch, capsys, model, tmp_path, options, alike):
    """Would catch statistics that are not those of all sequences, rows that nobody or two prune, and two writers."""
    command(monkeypatch, model, tmp_path / "one", *options, "--json", str(tmp_path / "one.json"))
    one = sys.argv[1:-3]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    two = subprocess.run([*torchrun, ROOT / "dsnot.py", *one[:one.index("--out")], "--out", tmp_path / "two", *options,
                          "--json", tmp_path / "two.json"], capture_output=True, text=True, timeout=300)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("saved") == 1
    same, total = 0, 0
    for name, W in tensors(tmp_path / "one").items():
        other = tensors(tmp_path / "two")[name]
        same, total = same + ((W == 0) == (other == 0)).sum().item(), total + W.numel()
    assert same >= total * alike
    rows = [json.loads((tmp_path / f"{n}.json").read_text())["results"]["rows"] for n in ("one", "two")]
    assert rows[0][-1]["perplexity"] == pytest.approx(rows[1][-1]["perplexity"], rel=1e-3 if alike > 0.99 else 3e-2)


@pytest.mark.parametrize("kind", ["owl", "sensitivity"])
def test_allocation(monkeypatch, model, kind):
    """Would catch shares whose mean is not what was asked for, outliers counted wrongly, and a damage that is not that
    of one layer pruned alone, which a loop over whole models computes here."""
    dense, windows, found = dsnot.GPT.from_pretrained(model / "m"), torch.randint(0, 300, (6, 32)), []
    real = dsnot.damage
    monkeypatch.setattr(dsnot, "damage", lambda *args: found.append(real(*args)) or found[0])
    positions = torch.arange(32)
    with torch.inference_mode():
        shares = dsnot.allocation(dsnot.GPT.from_pretrained(model / "m", stream=True),
                                  (dsnot.rotary(dense.config, positions), positions),
                                  [dense.embed(ids) for ids in windows.split(4)], 0.6, kind)
        inputs, layers = {}, {f"model.layers.{i}.{name}": layer for i, block in enumerate(dense.model.layers)
                              for name, layer in dsnot.prunable(block).items()}
        with watch(layers, inputs.__setitem__):
            dense(windows)
        stats = {}
        for name, x in inputs.items():
            stats[name] = InputStats(x.shape[-1])
            for sequence in x:
                stats[name].add(sequence)
        sizes = torch.tensor([layer.weight.numel() for layer in layers.values()], dtype=torch.double)
        assert list(shares) == list(layers)
        mean = torch.tensor(list(shares.values()), dtype=torch.double) @ sizes / sizes.sum()
        assert mean.item() == pytest.approx(0.6, abs=1e-9)
        scores = {name: wanda_score(layer.weight, stats[name]) for name, layer in layers.items()}
        if kind == "owl":
            many = []
            for block in range(2):
                flat = torch.cat([score.flatten() for name, score in scores.items() if f"layers.{block}." in name])
                many.append((flat > 5 * flat.mean()).float().mean().item())
            first, second = (list(shares.values())[i] for i in (0, 7))
            apart = 0.16 if many[0] > many[1] else -0.16 if many[0] < many[1] else 0
            assert second - first == pytest.approx(apart, abs=1e-6)
            return
        expected = dense(windows[:4]).log_softmax(-1)
        for name, layer in layers.items():
            W = layer.weight.data
            layer.weight.data = torch.where(keep_mask(scores[name], sparsity=0.6), W, 0)
            got = dense(windows[:4]).log_softmax(-1)
            layer.weight.data = W
            damage = (expected.exp() * (expected - got)).sum().item()
            assert found[0][list(layers).index(name)].item() == pytest.approx(damage, rel=1e-3, abs=1e-4)


def test_shares_are_the_cheapest():
    """Every other choice of shares that prunes as much costs at least as much."""
    generator = torch.Generator().manual_seed(0)
    grid, sizes = torch.arange(5).double() / 10, torch.ones(4).double()
    cost = torch.rand(4, 5, generator=generator).double().cumsum(1).cumsum(1)  # convex, as errors are
    shares = dsnot.cheapest(cost, grid, sizes, 0.2)
    index = (shares * 10).round().long()
    choices = torch.cartesian_prod(*[torch.arange(5)] * 4)
    same = choices[choices.sum(1) == index.sum()]
    assert index.sum() <= 8 and index.sum() >= 7
    assert cost[torch.arange(4), index].sum() <= cost[torch.arange(4), same].sum(1).min() + 1e-9


def test_dry_run_writes_nothing(monkeypatch, capsys, model, tmp_path):
    """Only config.json is needed, every layer is named, nothing is written."""
    only = tmp_path / "only"
    only.mkdir()
    (only / "config.json").write_bytes((model / "m" / "config.json").read_bytes())
    for options in (["--refine", "swap", "--refit"], ["--score", "sparsegpt", "--pattern", "2:4"],
                    ["--refine", "swap", "--no-propagate"]):
        command(monkeypatch, model, tmp_path / "out", "--model", str(only), "--dry-run", *options)
        printed = capsys.readouterr().out
        assert all(f"{name}_proj" in printed for name in "q k v o gate up down".split()) and "memory" in printed
        assert f"{sum(W.numel() for W in tensors(model / 'm').values()):,} parameters" in printed
    assert [p.name for p in tmp_path.iterdir()] == ["only"]


@pytest.mark.parametrize("options", [{}, {"propagate": True}, {"allocate": "sensitivity"}])
def test_one_block_is_in_memory_at_a_time(blocks_read, model, tmp_path, options):
    """Would catch a loop variable, a hook or a list that keeps the block before, which is 0.8 GB of LLaMA2-7B."""
    dsnot.prune(dsnot.GPT.from_pretrained(model / "m", stream=True), torch.randint(0, 300, (4, 32)), tmp_path / "out",
                {}, batch=2, score="wanda", refine="swap", sparsity=0.5, **options)
    assert blocks_read == ["model.layers.0", "model.layers.1"] * (2 if "allocate" in options else 1)


def test_disk_too_small(monkeypatch, capsys, model, tmp_path):
    """Would catch a run that finds out after hours that its result does not fit."""
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 5000, 5000))
    expect_refusal(monkeypatch, capsys, model, tmp_path / "out", [], "0.0 GB free")


BAD = {
    "sparsity": (["--sparsity", "1.2"], "1.2"),
    "pattern": (["--pattern", "5:4"], "5:4"),
    "nothing to allocate": (["--pattern", "2:4", "--allocate", "owl"], "--allocate owl"),
    "no pattern": (["--pattern", "half"], "half"),
    "a sparsity and a pattern": (["--sparsity", "0.5", "--pattern", "2:4"],
                                 "--pattern: not allowed with argument --sparsity"),
    "no such refinement": (["--refine", "swaps"], "invalid choice: 'swaps'"),
    "does not divide": (["--pattern", "3:7"], "--pattern 3:7 needs rows"),
    "no name": (["--out", "/"], "--out /"),
    "a name above": (["--out", "missing/.."], "--out missing/.. has no name"),
    "a long name": (["--out", "a" * 300], "File name too long"),
    "a text with a long name": (["--calib", "a" * 300], "is too long for a name"),
    "no cycles in it": (["--refine", "none", "--cycles", "9"], "--cycles 9 is for swaps"),
    "no signs to check": (["--refine", "swap", "--no-sign-check"], "--sign-check is for DSnoT, which --refine swap"),
    "unknown model": (["--model", "llama9"], "llama9"),
    "no such folder": (["--model", "./nothing/here"], "nothing/here"),
    "a folder, no Hub id": (["--model", "tests/nothing"], "there is no folder tests/nothing"),
    "no such text": (["--calib", "nothing.txt"], "nothing.txt"),
    "long window": (["--seqlen", "100000"], "100000"),
    "nsamples": (["--nsamples", "0"], "nsamples 0"),
    "Hub out of reach, model": (["--model", "llama2-7b"], "meta-llama/Llama-2-7b-hf"),
    "Hub out of reach, text": (["--data", "wikitext2"], "Salesforce/wikitext"),
    "device": (["--device", "tpu9"], "tpu9"),
    "json": (["--json", "README.md/all.json"], "README.md is a file"),
    "out": (["--out", "README.md/out"], "README.md is a file"),
}


def expect_refusal(monkeypatch, capsys, model, out, options, said):
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, model, out, *options)
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1 and said in error[0], error
    assert not out.exists() and not list(out.parent.glob(f"{out.name}*"))


@pytest.mark.parametrize("name", BAD)
def test_bad_options(monkeypatch, capsys, model, tmp_path, name):
    """One sentence that names the value, exit code 2, nothing written."""
    expect_refusal(monkeypatch, capsys, model, tmp_path / "out", *BAD[name])


def test_bad_texts_and_files(monkeypatch, capsys, model, tmp_path):
    """An empty text, one that is too short, one that is no text; a missing and a truncated weight file."""
    for name, content, said in [("empty.txt", b"", "empty"), ("short.txt", b"the words", "fewer than one window"),
                                ("no.txt", b"\xff\xfe\x00", "UTF-8")]:
        (tmp_path / name).write_bytes(content)
        for option in "--calib", "--data":
            expect_refusal(monkeypatch, capsys, model, tmp_path / "out", [option, str(tmp_path / name)], said)
    broken = tmp_path / "broken"
    for damage, said in [(lambda f: f.unlink(), "missing"),
                         (lambda f: f.write_bytes(f.read_bytes()[:-100]), "truncated")]:
        make_checkpoint(broken)
        damage(broken / "model.safetensors")
        expect_refusal(monkeypatch, capsys, model, tmp_path / "out", ["--model", str(broken)], said)


def test_activations_that_are_not_finite(monkeypatch, capsys, model, tmp_path):
    """Would catch a mask chosen from NaN: the layer is named."""
    import gpt
    real = gpt.GPT.embed
    monkeypatch.setattr(gpt.GPT, "embed", lambda self, *ids: real(self, *ids) * float("nan"))
    expect_refusal(monkeypatch, capsys, model, tmp_path / "out", [], "layers.0.self_attn.q_proj are not finite")


def test_full_disk(monkeypatch, capsys, model, tmp_path):
    """A file that can't be written whole leaves nothing that looks like a checkpoint."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        expect_refusal(monkeypatch, capsys, model, tmp_path / "out", [], "can't write")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_existing_folders_are_respected(monkeypatch, capsys, model, tmp_path):
    """Would catch overwriting the model that is being read, one that came from elsewhere, or a folder that holds
    something else, and work that is done before the refusal. What was written here is replaced."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    theirs("llama", {}).save_pretrained(tmp_path / "theirs")
    with monkeypatch.context() as patch:
        patch.setattr(dsnot, "perplexity", None)
        for out in tmp_path / "mine", tmp_path / "theirs", model / "m":
            with pytest.raises(SystemExit):
                command(monkeypatch, model, out)
            assert "choose another output folder" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    for sparsity in "0.5", "0.6":
        command(monkeypatch, model, tmp_path / "new", "--sparsity", sparsity)
        assert ("finished run with other options" in capsys.readouterr().out) == (sparsity == "0.6")
    assert json.loads((tmp_path / "new" / "pruning.json").read_text())["run"]["sparsity"] == 0.6


def test_what_may_surprise_is_said(monkeypatch, capsys, model, tmp_path):
    """Would catch a pruned model being measured as the dense one without a word; windows that are too long and a
    text that is too short to fit weights to, likewise."""
    command(monkeypatch, model, tmp_path / "once")
    said = capsys.readouterr().out
    assert not any(words in said for words in ("pruned before", "made for", "are fitted"))
    command(monkeypatch, model, tmp_path / "short", "--refit", "--nsamples", "1")
    assert "weights are fitted to 32 tokens of calibration text, fewer than the 56 inputs" in capsys.readouterr().out
    command(monkeypatch, model, tmp_path / "twice", "--model", str(tmp_path / "once"), "--seqlen", "65")
    said = capsys.readouterr().out
    assert "pruned before" in said and "65 tokens, more than the 64 that the model is made for" in said


def test_a_run_is_told_by_its_texts_and_its_notes(monkeypatch, model, tmp_path):
    """Would catch a finished folder being taken for the answer after its calibration text was edited, and one whose
    notes are damaged ending in a traceback."""
    text, found = tmp_path / "text.txt", []
    for words, damage in ("the words are few ", ""), ("the model reads ", ""), ("", '{"run": '), ("", '{"a": 1}'):
        if words:
            text.write_text(words * 400)
        else:
            (tmp_path / "out" / "pruning.json").write_text(damage)
        command(monkeypatch, model, tmp_path / "out", "--calib", str(text))
        found.append(tensors(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"])
    assert not torch.equal(found[0], found[1]) and torch.equal(found[1], found[2]) and torch.equal(found[1], found[3])


def test_time_is_kept(monkeypatch, model, tmp_path):
    """Would catch a finished folder being told to have taken no time."""
    seconds = []
    for _ in range(2):
        command(monkeypatch, model, tmp_path / "out", "--json", str(tmp_path / "new" / "result.json"))
        seconds.append(json.loads((tmp_path / "new" / "result.json").read_text())["results"]["rows"][-1]["seconds"])
    assert seconds[0] == seconds[1] > 0
