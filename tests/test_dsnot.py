"""Oracles for statistics, masks, DSnoT and SparseGPT: golden outputs, slow loops per row that follow the formulas."""

import json

import pytest
import torch
from safetensors import safe_open

from conftest import SHARED
from data.command import InputError
from dsnot import InputStats, dsnot_refine, extremes, keep_mask, magnitude_score, sparsegpt, wanda_score


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


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_of_products_are_those_of_float64(device, dtype):
    """Would catch sums in 16 bits, and statistics that stay on another device than the inputs."""
    x, z = torch.randn(2, 3, 500, 48, device=device).to(dtype)
    stats = InputStats(48, gram=True)
    for pair in zip(x, z):
        stats.add(*pair)
    x, z = x.flatten(0, 1).double(), z.flatten(0, 1).double()
    for found, exact in ((stats.gram, x.T @ x), (stats.cross, z.T @ x)):
        assert found.dtype == torch.float32 and found.device == x.device
        assert (found - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_statistics_and_scores_are_float32(dtype):
    """Would catch sums and scores of 16-bit numbers in 16 bits, which overflow or make ties."""
    x, W, stats = (100 * torch.randn(3, 500, 48)).to(dtype), torch.randn(8, 48).to(dtype), InputStats(48)
    for sequence in x:
        stats.add(sequence)
    exact = x.double()
    for found, expected in ((stats.sum, exact.sum(1).mean(0)), (stats.square, exact.square().sum(1).mean(0)),
                            (stats.variance, exact.var(1, unbiased=False).mean(0)),
                            (magnitude_score(W), W.double().abs()),
                            (wanda_score(W, stats), W.double().abs() * exact.square().sum(1).mean(0).sqrt())):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-2)


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


def published_dsnot(device="cpu"):
    """Yield each case of the published implementation: what it is, our mask on a device, and theirs."""
    f, cases = golden("dsnot.safetensors")
    W, stats = f.get_tensor("weight").to(device), stats_of(f.get_tensor("inputs").to(device))
    assert len(cases) == 16
    for i, case in enumerate(cases):
        score = wanda_score(W, stats) if case["init"] == "wanda" else magnitude_score(W)
        pattern = (case["n"], case["m"]) if "n" in case else None
        keep = keep_mask(score, pattern=pattern) if pattern else keep_mask(score, case["sparsity"])
        new = dsnot_refine(W, keep, stats, score, cycles=case["cycles"], threshold=case["threshold"],
                           var_power=case["pow_var"], sign_check=case["sign_check"], pattern=pattern)
        yield case, ~new.cpu(), f.get_tensor(f"pruned.{i}")


def test_dsnot_golden():
    """The published implementation's masks, bit for bit: would catch a method that only resembles DSnoT."""
    for case, found, expected in published_dsnot():
        assert torch.equal(found, expected), case


def test_dsnot_lowers_the_expected_error():
    """Would catch growing what should be pruned: with the sign check, the mean error of no row may rise."""
    W, inputs = random_layer(3, rows=64, width=256)
    stats = stats_of(inputs)
    keep = keep_mask(wanda_score(W, stats), 0.7)
    new = dsnot_refine(W, keep, stats, wanda_score(W, stats), sign_check=True)
    before, after = (((W * ~mask) @ inputs.sum(1).mean(0)).abs() for mask in (keep, new))
    assert (after <= before + 1e-4).all() and after.mean() < 0.5 * before.mean()


@pytest.mark.parametrize("amount, checked", [(dict(sparsity=0.7), False), (dict(pattern=(2, 4)), True)])
def test_what_dsnot_does_if_nobody_asks(amount, checked):
    """Would catch other defaults than the published ones: 50 cycles, a threshold of 0.1, v^1, and the sign check with a
    pattern alone."""
    W, inputs = random_layer(1, rows=200, width=256)
    stats = stats_of(inputs)
    score, pattern = wanda_score(W, stats), amount.get("pattern")
    keep = keep_mask(score, **amount)
    usual = dict(cycles=50, threshold=0.1, var_power=1.0, sign_check=checked, pattern=pattern)
    expected = dsnot_refine(W, keep, stats, score, **usual)
    assert torch.equal(dsnot_refine(W, keep, stats, score, pattern=pattern), expected)
    for other in dict(cycles=1), dict(threshold=0), dict(var_power=0), dict(sign_check=not checked):
        assert not torch.equal(dsnot_refine(W, keep, stats, score, **usual | other), expected), other


@pytest.mark.parametrize("largest", [False, True])
def test_extremes_in_the_order_of_a_stable_sort(largest):
    """Would catch ties between the last one that is listed and the first that isn't."""
    key = torch.stack([torch.randperm(40) for _ in range(50)]).float()
    key[key == 7], key[key == 32] = 6, 33  # the 7th and the 8th, from either end
    order = key.argsort(dim=1, stable=True)
    found, count = extremes(key, 7, largest)
    assert torch.equal(found, (order.flip(1) if largest else order)[:, :7]) and (count == 7).all()


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


def test_what_sparsegpt_does_if_nobody_asks():
    """Would catch another damping than the published one, and a threshold over other columns than 128."""
    W, inputs = random_layer(4, rows=10, width=256, tokens=300)
    gram = stats_of(inputs, gram=True).gram
    assert sparsegpt(W, gram, sparsity=0.0).count_nonzero() == W.numel()
    found = sparsegpt(W, gram, sparsity=0.5)
    assert torch.equal(found, sparsegpt(W, gram, sparsity=0.5, damp=0.01, block=128))
    assert not torch.equal(found, sparsegpt(W, gram, sparsity=0.5, block=256))


def test_sparsegpt_survives_dead_inputs():
    """Would catch a singular Hessian ending in NaN, and dead inputs keeping their weights."""
    W, inputs = random_layer(5, rows=6, width=32)
    inputs[..., 3:9] = 0
    new = sparsegpt(W, stats_of(inputs, gram=True).gram, sparsity=0.5)
    assert new.isfinite().all() and (new[:, 3:9] == 0).all()


def published_sparsegpt(device="cpu"):
    """Yield each case of the published implementation: what it is, our weights from a device, and theirs."""
    f, cases = golden("sparsegpt.safetensors")
    W, stats = f.get_tensor("weight").to(device), stats_of(f.get_tensor("inputs").to(device), gram=True)
    for i, case in enumerate(cases):
        amount = dict(pattern=(case["n"], case["m"])) if case["n"] else dict(sparsity=case["sparsity"])
        new = sparsegpt(W, stats.gram, **amount, damp=case["damp"], block=case["block"])
        yield case, new.cpu(), f.get_tensor(f"result.{i}")


def test_sparsegpt_golden():
    """The published implementation: masks identical, weights to 1e-4."""
    for case, new, expected in published_sparsegpt():
        assert torch.equal(new == 0, expected == 0), case
        torch.testing.assert_close(new, expected, rtol=0, atol=1e-4)
