"""Oracles for exact swaps and refit: direct errors, exhaustive pairs, normal equations."""

import pytest
import torch

import dsnot
import swaps
import walk
from data.command import DeadEnd
from dsnot import InputStats, keep_mask, sparsegpt, wanda_score
from test_dsnot import random_layer, stats_of

AMOUNTS = [dict(sparsity=0.5), dict(sparsity=0.75), dict(sparsity=0.9),
           dict(pattern=(2, 4)), dict(pattern=(1, 4)), dict(pattern=(4, 8))]


def squared_error(W, kept_weights, inputs, dense_inputs=None):
    """||W Z - W_sparse X||^2 per row, from the inputs themselves, in float64."""
    z = (inputs if dense_inputs is None else dense_inputs).flatten(0, 1).double()
    return (z @ W.double().T - inputs.flatten(0, 1).double() @ kept_weights.double().T).square().sum(0)


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


@pytest.mark.parametrize("width", [30, 1000, 1024, 1030, 2048])
def test_lowest_is_topk(width):
    """Would catch columns that the search in two steps overlooks, and rows that have fewer than k to offer."""
    x = torch.randn(40, width, generator=torch.Generator().manual_seed(width))
    x[:20, torch.randperm(width)[:width - 5]] = torch.inf
    found = swaps.lowest(x, 16)
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


def test_a_giant_input_does_not_stop_swaps():
    """Would catch what counts as rounding growing with one input, which may be a thousand times as large as others."""
    W, inputs, _, gram, _, keep = swap_case(5, dict(sparsity=0.7), False, rows=20, width=64, tokens=64)
    keep[:, 7], found = True, []
    for large in 1, 1000:
        scale = torch.ones(64)
        scale[7] = large
        found.append(dsnot.swap_refine(W, keep, gram * scale * scale[:, None], candidates=64))
    rows = found[0][:, 7] & found[1][:, 7]
    usual, giant = (squared_error(W[rows], (W * new)[rows], inputs).sum() for new in found)
    assert rows.sum() > 5 and giant < 1.02 * usual


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


@pytest.mark.parametrize("amount", AMOUNTS + [dict(pattern=(1, 16))])
@pytest.mark.parametrize("most", [3, None])
def test_a_row_does_not_depend_on_others(amount, most):
    """Would catch swaps of a row that is done while others go on, and sums over rows. Whole numbers: all sums are
    exact, whatever their order."""
    g = torch.Generator().manual_seed(8)
    W = torch.randint(-8, 9, (12, 128), generator=g) * torch.tensor([1.0, 4.0]).repeat(6)[:, None]  # rows of two sizes
    x = torch.randint(-3, 4, (64, 128), generator=g).float()
    gram, keep = x.T @ x, keep_mask(W.abs(), **amount)
    options = dict(pattern=amount.get("pattern"), max_swaps=most)
    new = dsnot.swap_refine(W, keep, gram, **options)
    for row in range(12):
        one = slice(row, row + 1)
        assert torch.equal(new[one], dsnot.swap_refine(W[one], keep[one], gram, **options))


def test_swaps_of_uneven_rows():
    """Would catch rows of a SparseGPT mask, which keep different numbers of weights, trading theirs; full and empty
    rows."""
    W, inputs, _, gram, _, _ = swap_case(2, dict(sparsity=0.5), False, rows=12, width=100)
    keep = torch.rand(12, 100, generator=torch.Generator().manual_seed(0)) < torch.linspace(0, 1, 12)[:, None]
    new = dsnot.swap_refine(W, keep, gram, candidates=8)
    assert torch.equal(new.sum(1), keep.sum(1))
    assert (squared_error(W, W * new, inputs) <= squared_error(W, W * keep, inputs) * (1 + 1e-6)).all()


def test_refit_of_inputs_that_are_nearly_alike():
    """Would catch a run that ends where float32 finds no Cholesky factor for some rows: they are damped more."""
    W, _ = random_layer(6, rows=4, width=2048, tokens=8)
    gram = torch.full((2048, 2048), 1e3) - 5 * torch.eye(2048)  # not positive, as rounding may leave it
    keep = torch.ones_like(W, dtype=torch.bool)
    keep[0, 1:], keep[1, 1000:] = False, False
    new = dsnot.refit_weights(W, keep, gram, damp=1e-3)
    assert torch.linalg.cholesky_ex(gram + 1e-3 * gram.diagonal().diag())[1] > 0
    assert new.isfinite().all() and torch.equal(new != 0, keep)
    assert swaps.relative_error(W, new, gram) < 1e-3
    torch.testing.assert_close(new[2:], W[2:], rtol=0, atol=1e-3)  # rows that keep all lack nothing


@pytest.mark.parametrize("with_cross", [False, True])
def test_a_giant_input_does_not_weaken_others(with_cross):
    """A model computes the same where an input is 2^17 times as large and its weights as much smaller. Would catch a
    damping that the largest inputs set for all: then refit pulls the others to 0, and perplexity explodes."""
    W, _, _, gram, goal, keep = swap_case(3, dict(sparsity=0.5), with_cross)
    times = torch.where(torch.arange(W.shape[1]) % 16 == 5, 2.0 ** 17, 1.0)
    giant, goals = gram * times * times[:, None], [goal, None if goal is None else goal * times]
    for work in (lambda W, gram, goal: dsnot.refit_weights(W, keep, gram, goal=goal),
                 lambda W, gram, goal: dsnot.dense_weights(W, gram, W @ gram if goal is None else goal)):
        expected, found = work(W, gram, goals[0]), work(W / times, giant, goals[1]) * times
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_an_input_that_is_all_but_silent_keeps_usual_weights():
    """Would catch refit, or the dense weights that SparseGPT prunes towards, reading by weights in the hundreds what a
    norm's weight of 0.001 has hidden from the layer: a scale that serves such a weight rounds its neighbours to 0."""
    W, inputs, _, _, _, keep = swap_case(4, dict(sparsity=0.5), False, rows=10, width=64, tokens=64)
    x = inputs.flatten(0, 1)
    lost = torch.where(keep, 0, W)
    hidden = (x @ lost.T).sum(1)  # what pruning takes away
    x[:, 7] = 1e-3 * hidden
    keep[:, 7] = True
    new = dsnot.refit_weights(W, keep, x.T @ x)
    assert new[:, 7].abs().max() < 20 * W.abs().max()
    new = dsnot.dense_weights(W, x.T @ x, (x @ W.T + 0.1 * hidden[:, None]).T @ x)
    assert new[:, 7].abs().max() < W.abs().max()


def test_swaps_and_refit_of_few_tokens_draw_the_weights_towards_the_dense_ones():
    """Would catch turns that tell refit a goal where none was given, so that damping draws towards 0."""
    W, _, _, gram, _, keep = swap_case(5, dict(sparsity=0.5), False, rows=16, width=128, tokens=5)
    for rounds in 0, 1:
        new = dsnot.swap_and_refit(W, keep, gram, rounds=rounds)
        again = dsnot.refit_weights(W, new != 0, gram)
        torch.testing.assert_close(new, again)
        assert new.norm() > 0.95 * (W * (new != 0)).norm()  # else 0.56


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
    assert swaps.relative_error(W, W * keep, gram) == pytest.approx(expected.item(), rel=1e-4)


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
    aimed = dsnot.prune_layer(W, stats, goal=walk.layer_goal(W, stats, "weights"), score="sparsegpt", refine="none",
                              sparsity=0.5)
    plain = sparsegpt(W, stats.gram, sparsity=0.5)
    assert (inputs @ aimed.T - z @ W.T).square().sum() < 0.8 * (inputs @ plain.T - z @ W.T).square().sum()


def test_the_worst_mask_becomes_the_best():
    """Would catch swaps that end too soon in a wide row, and a bound that holds in each turn instead of all. Where
    inputs have nothing to do with each other, the best mask is known."""
    squares = torch.stack([torch.randperm(512) for _ in range(4)]) + 512.0
    W, gram, best = squares.sqrt(), torch.eye(512), keep_mask(squares, 0.5)
    assert torch.equal(dsnot.swap_refine(W, ~best, gram), best)
    for most in 20, 100:
        flips = (dsnot.swap_refine(W, ~best, gram, max_swaps=most) == best).sum(1)
        assert (flips == 2 * most).all()


@pytest.mark.parametrize("with_cross", [False, True])
def test_refit_swaps_again(with_cross):
    """Would catch turns that are left out where nobody asks for a number, and a goal that changes with the weights."""
    W, inputs, z, gram, goal, keep = swap_case(4, dict(sparsity=0.6), with_cross, rows=40, width=48, tokens=64)
    errors = [squared_error(W, dsnot.swap_and_refit(W, keep, gram, goal=goal, **rounds), inputs, z).sum()
              for rounds in (dict(rounds=0), dict(rounds=1), {})]
    assert errors[1] == errors[2] < 0.999 * errors[0]


@pytest.mark.parametrize("amount", AMOUNTS)
def test_inputs_that_are_always_zero(amount):
    """Would catch NaN and a Cholesky factor that is not there where ReLU leaves inputs dead."""
    W, inputs = random_layer(9, rows=12, width=64)
    inputs[..., ::5] = 0
    stats = stats_of(inputs, gram=True)
    keep = keep_mask(W.abs(), **amount)
    new = dsnot.swap_and_refit(W, keep, stats.gram, pattern=amount.get("pattern"))
    assert new.isfinite().all() and torch.equal((new != 0).sum(1), keep.sum(1))
    assert squared_error(W, new, inputs).sum() < 0.9 * squared_error(W, W * keep, inputs).sum()
    assert dsnot.dense_weights(W, stats.gram, W @ stats.gram).isfinite().all()


def test_the_size_of_all_inputs_does_not_matter():
    """Would catch a floor that is none for small activations."""
    W, _, _, gram, goal, keep = swap_case(3, dict(sparsity=0.5), True, rows=20, width=64, tokens=64)
    small = 2.0 ** -30
    for work in (lambda gram, goal: dsnot.swap_refine(W, keep, gram, goal=goal),
                 lambda gram, goal: dsnot.swap_and_refit(W, keep, gram, goal=goal),
                 lambda gram, goal: dsnot.sparsegpt(W, gram, sparsity=0.5),
                 lambda gram, goal: dsnot.dense_weights(W, gram, goal)):
        torch.testing.assert_close(work(gram * small, goal * small), work(gram, goal), rtol=0, atol=0)


def test_damping_if_nobody_asks():
    """Would catch weights that are drawn to the old ones more than float32 needs."""
    W, inputs, z, gram, goal, keep = swap_case(3, dict(sparsity=0.6), True, rows=10, width=32, tokens=64)
    for work, most in ((lambda **damp: dsnot.refit_weights(W, keep, gram, goal=goal, **damp), 1e-5),
                       (lambda **damp: dsnot.dense_weights(W, gram, goal, **damp), 5e-2)):
        best, found = (squared_error(W, work(**damp), inputs, z).sum() for damp in (dict(damp=0.0), {}))
        assert 0 < found / best - 1 < most


def test_refit_ends_where_no_damping_helps():
    """Would catch weights that come from no Cholesky factor, written as finished."""
    gram, keep = 2 * torch.eye(16) - 1, torch.ones(4, 16, dtype=torch.bool)
    with pytest.raises(torch.linalg.LinAlgError):
        dsnot.refit_weights(torch.randn(4, 16), keep, gram)
    stats = InputStats(16, gram=True)
    stats.add(torch.randn(4, 16))
    stats.gram = gram
    with pytest.raises(DeadEnd, match="flow into layer 7 are too few or too much alike"):
        walk.prune_linear(torch.randn(4, 16), "layer 7", stats, "weights", torch.float32,
                          prune_layer=dsnot.prune_layer, score="wanda", refine="none", refit=True, sparsity=0.1)
