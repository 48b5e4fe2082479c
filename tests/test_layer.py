"""What becomes of one layer: the steps of prune_layer against the functions that it is made of, and the record."""

import pytest
import torch

import dsnot
from dsnot import (DAMP, InputStats, dsnot_refine, keep_mask, magnitude_score, refit_weights, sparsegpt, swap_and_refit,
                   swap_refine, wanda_score)
from swaps import relative_error
from test_swap import inputs_case, squared_error
from walk import layer_goal, prune_linear


@pytest.mark.parametrize("amount", [dict(sparsity=0.6), dict(pattern=(2, 4))])
@pytest.mark.parametrize("score", ["magnitude", "wanda"])
def test_a_layer_is_pruned_step_by_step(amount, score):
    """Every option reaches its function; would catch one that is left out, and another's default."""
    W, _, _, stats = inputs_case(4, True, rows=30, width=384, tokens=64)
    scores = magnitude_score(W) if score == "magnitude" else wanda_score(W, stats)
    keep, pattern, goal = keep_mask(scores, **amount), amount.get("pattern"), layer_goal(W, stats, "mask")

    def pruned(refine, **options):
        return dsnot.prune_layer(W, stats, goal=goal, score=score, refine=refine, **amount, **options)
    assert torch.equal(pruned("none"), W * keep)
    for options, used in ({}, dict(cycles=5, threshold=0.1, sign_check=True)), (
            dict(cycles=50, threshold=30.0, sign_check=False), dict(cycles=50, threshold=30.0, sign_check=False)):
        other = dsnot_refine(W, keep, stats, scores, pattern=pattern, **used)
        assert torch.equal(pruned("dsnot", **options), W * other) and not torch.equal(other, keep)
        both = swap_refine(W, other, stats.gram, goal=goal, max_swaps=options.get("cycles"), pattern=pattern)
        assert torch.equal(pruned("dsnot+swap", **options), W * both)
    more = dict(goal=goal, pattern=pattern)
    assert torch.equal(pruned("swap"), W * swap_refine(W, keep, stats.gram, **more))
    assert torch.equal(pruned("none", refit=True), refit_weights(W, keep, stats.gram, goal=goal, damp=DAMP))
    more |= dict(damp=DAMP)
    assert torch.equal(pruned("swap", refit=True), swap_and_refit(W, keep, stats.gram, **more))
    assert torch.equal(pruned("swap", refit=True, cycles=2), swap_and_refit(W, keep, stats.gram, max_swaps=2, **more))


@pytest.mark.parametrize("amount", [dict(sparsity=0.7), dict(pattern=(2, 4)), dict(pattern=(1, 4))])
@pytest.mark.parametrize("refine, refit", [("dsnot", False), ("swap", False), ("dsnot+swap", False), ("none", True)])
def test_refinements_begin_with_the_mask_of_sparsegpt(amount, refine, refit):
    """Would catch a mask turned round, which of 2:4 is one, too, or another score's: no cycles change nothing."""
    W, _, _, stats = inputs_case(4, False, rows=20, width=256, tokens=256)
    plain = sparsegpt(W, stats.gram, **amount)
    found = dsnot.prune_layer(W, stats, score="sparsegpt", refine=refine, refit=refit, cycles=0, **amount)
    assert torch.equal(found != 0, plain != 0)
    if not refit:
        torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("with_cross", [False, True])
def test_swaps_after_sparsegpt_lower_its_error(with_cross):
    """Would catch swaps among the first weights instead of the corrected ones, and a goal that is left out."""
    W, inputs, z, stats = inputs_case(4, with_cross, rows=20, width=128, tokens=256)
    goal = layer_goal(W, stats, "weights")
    plain, swapped = (dsnot.prune_layer(W, stats, goal=goal, score="sparsegpt", refine=refine, sparsity=0.6)
                      for refine in ("none", "swap"))
    before, after = (squared_error(W, new, inputs, z).sum() for new in (plain, swapped))
    assert after < 0.99 * before
    aim = W @ stats.gram if goal is None else goal
    W = W if goal is None else dsnot.dense_weights(W, stats.gram, goal)
    mask = swap_refine(dsnot.with_pruned(plain, plain != 0, stats.gram, aim), plain != 0, stats.gram, goal=aim)
    assert torch.equal(swapped, sparsegpt(W, stats.gram, keep=mask))


def test_the_error_that_is_noted():
    """Of the weights before, and of those that are stored."""
    torch.manual_seed(0)
    weight, stats = torch.randn(8, 16), InputStats(16, gram=True)
    stats.add(torch.randn(40, 16))
    before = weight.clone()
    found = prune_linear(weight, "a", stats, "mask", torch.bfloat16, prune_layer=dsnot.prune_layer, score="wanda",
                         refine="none", sparsity=0.5)
    assert found == dict(layer="a", weights=128, sparsity=0.5, error=relative_error(before, weight, stats.gram))
    assert torch.equal(weight, weight.bfloat16().float()) and 0 < found["error"] < 1
    assert relative_error(before, weight, torch.zeros(16, 16)) == 0
