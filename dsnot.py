"""Prune a language model without training: score the weights, mask the lowest, refine the mask.

DSnoT ("Dynamic Sparse No Training", Zhang et al., ICLR 2024, arXiv 2310.08915) starts from the mask of another method
and lets pruned weights grow back while others are pruned in their place, one pair per row and cycle, so that the
*expected* difference between dense and sparse output shrinks. In the letters of the code, for a linear layer y = x W^T:

    s_k   average over the N calibration sequences of the sum of x_k over a sequence's tokens (`stats.sum`)
    q_k   the same for x_k^2 (`.square`);  v_k: average over sequences of the variance of x_k inside one (`.variance`)
    D     = W * s                           what each weight contributes to the output, on average
    e     = sum of D over a row's pruned weights              the row's expected error, dense less sparse
    grow  the pruned weight with the largest D / v^p if e > 0, else with the smallest (`var_power`: p, 1)
    prune the kept weight with the lowest Wanda score |W| sqrt(q) among those whose D pushes e back towards zero
          (n:m: the lowest score in the grown weight's own group of m, whatever its D)
    e    <- e + D[pruned] - D[grown], until |e| <= threshold, `cycles` swaps are done or e would change its sign

Starting masks: magnitude |W|; Wanda |W| sqrt(q) (Sun et al. 2023); SparseGPT (Frantar & Alistarh 2023), which also
corrects the weights that remain. Beyond the paper: swaps by the exact error instead of its mean (`swap_refine`), the
best weights for a mask (`refit_weights`), targets that make up for a part of what earlier layers lost (`layer_goal`),
a sparsity of its own for every layer (`allocation`), and at last swaps by the output of the whole model
(`swap_globally`).

Where this differs from the authors' code (`dsnot_refine` by itself has their defaults, `prune_layer` and the command
have ours): every linear layer is refined unless you ask for `--refine-layers attn` (theirs silently skips the MLP); a
row of 4096 inputs makes 50 swaps, one of 11008 inputs 134, one of 256 three (theirs make 50 whatever the width); the
sign check is an option, on if nobody asks (theirs is on with a pattern, off without one, whatever its flag says); a row
without candidates stops instead of running off its lists, so layers of any size work; fifty swaps need only the fifty
best candidates of each kind, so a row is sorted only where candidates tie; SparseGPT as the starting mask corrects the
weights for the refined mask, by its Hessian; on its n:m masks, too, weights are pruned by the lowest Wanda score
(theirs: w^2 over the diagonal of the inverse Hessian).
The threshold is in units of s, so its meaning depends on the sequence length, as in the paper.

One block of the model is in memory at a time, and its dense copy where layers aim at the dense model's outputs; swaps
by the whole model's output need all of it. A finished block on disk is the record of progress: start an interrupted run
again and it goes on.

    python dsnot.py                                             (the model that ships, 70 %)
    python dsnot.py --model llama2-7b --sparsity 0.7

Shapes: a weight W, its scores and masks are [out, in]; True in a mask = keep.
"""

import argparse
import copy
import itertools
import os
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from data import calibration_windows, load_tokenizer, windows
from data.calibration import InputStats, add_product, input_stats, move, place_for, readers, steps, watch_gradients
from data.checkpoint import CheckpointWriter, finished, noted, pruned_here, remove, shard
from data.command import DeadEnd, InputError, at_least, check_disk, parser, record, run, versions
from data.estimate import CHUNK, ROUND, check_folders, dry_run, held_states, probe_tokens
from data.hub import model_folder
from data.method import (ALLOCATIONS, METHOD, NSAMPLES, REFINES, SCORES, USUAL, blocks_of, fill_in, has_goal, method_of,
                         needs_gram, parse_pattern, refine_of, rows_apart, said_of, shared_by)
from data.processes import add_up, from_first, process_group, processes, progress_bar, say, wait
from data.text import SOURCES, evaluation_ids, told, usual_text
from eval import perplexity
from gpt import GPT, Config, all_prunable, layer_inputs, prunable, rotary


# --------------------------------------------------------------------------------------------------- scores and masks

@torch.no_grad()
def magnitude_score(W: Tensor) -> Tensor:
    """|W| [out, in] in float32."""
    return W.float().abs()


@torch.no_grad()
def wanda_score(W: Tensor, stats: InputStats) -> Tensor:
    """|W| times the norm of the weight's input [out, in] in float32 (Sun et al. 2023, arXiv 2306.11695)."""
    return W.float().abs().mul_(stats.square.sqrt())


def check_pattern(pattern, width):
    """The pattern (n, m), or InputError where m does not divide a row of `width` weights."""
    n, m = pattern
    assert 0 < n < m, f"a pattern (n, m) keeps n of every m, not {pattern}"
    if width % m:
        raise InputError(f"--pattern {n}:{m} needs rows that {m} divides, but a layer has {width} inputs: "
                         f"give another, or a --sparsity")
    return pattern


def keep_mask(score: Tensor, sparsity: float | None = None, pattern: tuple[int, int] | None = None) -> Tensor:
    """The mask that keeps the highest scores [out, in].

    sparsity: in every row the int(in * sparsity) lowest are pruned. pattern (n, m): in every m consecutive ones n are
    kept. Equal scores are pruned from the left. Raises InputError where m does not divide the row."""
    assert (sparsity is None) != (pattern is None), "either a sparsity or a pattern"
    assert pattern or 0 <= sparsity <= 1, sparsity
    rows, width = score.shape
    if pattern is None:
        k = int(width * sparsity)
        if k == 0:
            return torch.ones_like(score, dtype=torch.bool)
        kth = score.kthvalue(k, dim=1, keepdim=True)[0]
        keep = score > kth
        tied = keep.sum(1, dtype=torch.int32) < width - k  # several equal the k-th, and `>` has dropped them all
        if tied.any():
            equal, more = score[tied] == kth[tied], width - k - keep[tied].sum(1, keepdim=True)
            keep[tied] |= equal & (equal.cumsum(1, dtype=torch.int32) > equal.sum(1, keepdim=True) - more)
        return keep
    n, m = check_pattern(pattern, width)
    group = score.reshape(-1, m).T.contiguous()  # [m, groups]
    # how many of its group come before each entry: pairs are compared more than twice as fast as groups are sorted
    rank = torch.zeros_like(group, dtype=torch.int16)
    for i in range(m):
        for j in range(i + 1, m):
            first = group[i] <= group[j]
            rank[j] += first
            rank[i] += ~first
    return (rank >= m - n).T.reshape(rows, width)


# -------------------------------------------------------------------------------------------------------------- DSnoT

@torch.no_grad()
def dsnot_refine(W: Tensor, keep: Tensor, stats: InputStats, score: Tensor, *, cycles: int = 50, threshold: float = 0.1,
                 var_power: float = 1.0, sign_check: bool | None = None,
                 pattern: tuple[int, int] | None = None) -> Tensor:
    """Refine a mask by prune-and-grow (the rule at the top of this file); returns the new mask.

    W, keep, score [out, in]: weights, starting mask and the scores that it came from (used for n:m).
    cycles: swaps per row at most; threshold: a row stops once |e| is no larger, in units of s; var_power: p.
    sign_check: stop a row also when a swap would turn the sign of e; None is the published choice: only for n:m.
    These are the published defaults, for rows of 4096, and ruin narrow ones: give 50 cycles to 4096 inputs, three to
    256, and check the sign, as prune_layer does.
    pattern: (n, m) of the mask, which stays intact; None: unstructured, the number kept in each row stays."""
    assert W.shape == keep.shape == score.shape, (W.shape, keep.shape, score.shape)
    pattern = pattern and check_pattern(pattern, W.shape[1])
    sign_check = pattern is not None if sign_check is None else sign_check
    cycles, s = min(cycles, W.shape[1]), stats.sum
    rows = 64 if W.device.type == "cpu" else len(W)  # on a CPU, what a few rows need stays in its cache
    chunks = list(zip(W.split(rows), keep.split(rows)))
    found = [_grow_candidates(w.float(), k, stats, cycles, var_power) for w, k in chunks]
    e, grow, growable = map(torch.cat, zip(*found))
    if pattern is None:
        drop, droppable = map(torch.cat, zip(*(_prune_candidates(w.float(), k, stats, cycles) for w, k in chunks)))
    new, row = keep.clone(), torch.arange(len(W), device=W.device)
    active, start_sign = torch.ones_like(row, dtype=torch.bool), e.sign()
    grown, pruned = W.new_zeros(2, len(W), 2, dtype=torch.long)  # how much of each list is used up
    for _ in range(cycles):
        active &= e.abs() > threshold
        side = (e > 0).long()
        g = grow[row, side, grown[row, side]]
        active &= grown.sum(1) < growable
        if pattern is None:
            p = drop[row, side, pruned[row, side]]
            active &= pruned[row, side] < droppable[row, side]
            pruned[row, side] += 1
        else:
            member = (g - g % pattern[1])[:, None] + torch.arange(pattern[1], device=W.device)  # [out, m]: its group
            kept = keep[row[:, None], member] & new[row[:, None], member]  # at the start and still
            least, at = score[row[:, None], member].float().masked_fill(~kept, torch.inf).min(1)
            p = member[row, at]
            active &= least < torch.inf
        grown[row, side] += 1
        after = e + W[row, p].float() * s[p] - W[row, g].float() * s[g]
        if sign_check:
            active &= after.sign() == start_sign
        if not active.any():
            break
        new[row, g] |= active  # each row has one g and one p; picking the active rows would make a GPU wait
        new[row, p] &= ~active
        e = torch.where(active, after, e)
    return new


def _grow_candidates(W, keep, stats, cycles, var_power):
    """The rows' error e [rows]; the best weights to grow for e <= 0 and for e > 0 [rows, 2, cycles]; their number."""
    D = W * stats.sum
    gain = D / (stats.variance ** var_power).clamp(min=1e-30)  # a dead input's gain is 0, not 0 / 0
    low, count = extremes(gain.masked_fill(keep, torch.inf), cycles)
    high, _ = extremes(gain.masked_fill_(keep, -torch.inf), cycles, largest=True)
    return D.masked_fill_(keep, 0).sum(1), torch.stack([low, high], 1), count


def _prune_candidates(W, keep, stats, cycles):
    """The best weights to prune for e <= 0 and for e > 0 [rows, 2, cycles], and the number of each [rows, 2]."""
    score = W * (stats.square.sqrt() * stats.sum.sign())  # the Wanda score with the sign of D
    above, above_count = extremes(torch.where(keep & (score > 0), score, torch.inf), cycles)
    below, below_count = extremes(torch.where(keep & (score < 0), -score, torch.inf), cycles)
    return torch.stack([above, below], 1), torch.stack([above_count, below_count], 1)


def extremes(key, k, largest=False):
    """The k smallest entries of each row of key [rows, width] (largest: the k largest), best first: their indices
    [rows, k] and how many are finite [rows]. Those come in the order of a stable sort (largest: of one read from its
    end), but only rows with ties are sorted."""
    value, index = key.topk(min(k + 1, key.shape[1]), dim=1, largest=largest)
    tied = ((value[:, 1:] == value[:, :-1]) & value[:, 1:].isfinite()).any(1)
    if tied.any():
        order = key[tied].argsort(dim=1, stable=True)
        index[tied] = (order.flip(1) if largest else order)[:, :index.shape[1]]
    return index[:, :k], value[:, :k].isfinite().sum(1)


# -------------------------------------------------------------------------------------------------------- exact swaps

@torch.no_grad()
def swap_refine(W: Tensor, keep: Tensor, gram: Tensor, *, goal: Tensor | None = None, max_swaps: int | None = None,
                candidates: int = 16, pattern: tuple[int, int] | None = None) -> Tensor:
    """Refine a mask by swaps that lower the true squared error of each row the most; returns the new mask.

    With G the Gram matrix and r what a row lacks, its pruned weights, the error is r G r^T. Pruning weight j adds w_j
    to r_j and growing i takes w_i from r_i, so with g = r G a swap adds exactly
        (2 w_j g_j + w_j^2 G_jj) + (-2 w_i g_i + w_i^2 G_ii) - 2 w_i w_j G_ij,
    and the best one is taken until none lowers the error by more than rounding (SparseSwaps, arXiv 2512.10922, has the
    same idea). It is searched among the `candidates` best weights of each side (n:m: among the groups that promise
    most); several swaps are made among them, exactly, before g is brought up to date for all weights.

    W, keep [out, in]; gram [in, in]: sum of x x^T over the inputs x that the sparse layer gets; goal [out, in]: sum of
    y x^T over the outputs y that it should give, None: those of W. Then g is the goal less what the kept weights make.
    max_swaps: per row, None: until none helps, or as many as the row is wide. pattern: (n, m) of the mask, which stays.
    """
    assert W.shape == keep.shape, (W.shape, keep.shape)
    pattern = pattern and check_pattern(pattern, W.shape[1])
    new, W, G = keep.clone(), W.float(), gram.float()
    goal = None if goal is None else goal.float()
    pool = max(2 * candidates, pattern[1] if pattern else 0)  # weights of a row that are weighed against each other
    # on a CPU, what 512 rows need stays in its cache
    at_a_time = min(512 if W.device.type == "cpu" else len(W), max(1, CHUNK // max(W.shape[1], pool ** 2)))
    for rows in torch.arange(len(W), device=W.device).split(at_a_time):
        w, mask = W[rows], keep[rows]
        g = torch.where(mask, 0, w) @ G if goal is None else goal[rows] - torch.where(mask, w, 0) @ G
        # flipping weight k alone costs square_k + slope_k g_k, its price; a pair costs slope_j slope_i G_ij / 2 more
        slope, square = torch.where(mask, 2 * w, -2 * w), w.square() * G.diagonal()
        left = torch.full_like(rows, w.shape[1] if max_swaps is None else max_swaps)
        most = square.amax(1)
        # smaller gains are rounding: 1e-6 of the row's largest w^2 G_kk, less where few inputs are gigantic
        least = (1e-2 * square.median(1)[0]).clamp(1e-9 * most, 1e-6 * most)
        squares = torch.where(torch.stack([mask, ~mask]), square, torch.inf)  # [2, rows, in], to prune and to grow
        while len(rows):
            price = torch.addcmul(squares, slope, g)  # of pruning or growing one weight and no other; inf: can't be
            column, made = _swap_round(price, mask, slope, G, left, least, candidates, pattern)
            (row, which), count = made.nonzero(as_tuple=True), made.sum(1)
            if not len(row):
                new[rows] = mask
                break
            at, used, first = column[row, which], count // 2, count.cumsum(0) - count  # first: a row's flips in `at`
            # to a row of g, for each of its flips, slope / 2 times that weight's row of G
            g += F.embedding_bag(at, G, first, mode="sum", per_sample_weights=slope[row, at] / 2)
            mask[row, at], slope[row, at] = ~mask[row, at], -slope[row, at]
            squares[:, row, at] = squares[:, row, at].flip(0)  # what could be pruned can be grown, and the reverse
            go_on, left = (used > 0) & (used < left), left - used
            if go_on.sum() <= 0.8 * len(rows):  # dropping a few finished rows would copy all the others
                new[rows] = mask
                squares = squares[:, go_on]
                rows, mask, g, slope, left, least = (x[go_on] for x in (rows, mask, g, slope, left, least))
    return new


def _swap_round(price, mask, slope, G, left, least, candidates, pattern):
    """Choose a few swaps in each row, the best first, at most left[row], each of which lowers the error by more than
    least[row]. Returns the columns that flip [rows, 2 swaps], the i-th swap prunes column 2 i and grows column 2 i + 1,
    and which of these flips the row makes (bool, the same). price [2, rows, in] of pruning and of growing, mask, slope
    [rows, in], G: as in swap_refine."""
    drop, grow = _swap_candidates(price, mask, candidates, pattern)
    (rows, groups, a), b = drop.shape, grow.shape[2]
    drop, grow, k = drop.flatten(1), grow.flatten(1), groups * a
    both = torch.cat([drop, grow], 1)  # [rows, k + groups * b], those to grow from k on
    step, cost = slope.gather(1, both), torch.cat([price[0].gather(1, drop), price[1].gather(1, grow)], 1)
    # what one flip adds to the price of another [rows, all, all], and of these what belongs to pairs of a group
    added = entries(G, both[:, :, None], both[:, None, :]).mul_(step[:, :, None]).mul_(step[:, None, :] / 2)
    together = added[:, :k, k:].unflatten(1, (groups, a)).unflatten(3, (groups, b)).diagonal(0, 1, 3).movedim(3, 1)
    together = together.contiguous()  # [rows, groups, a, b]
    added.diagonal(0, 1, 2).fill_(torch.inf)  # nothing flips twice
    group, i, j = torch.unravel_index(torch.arange(k * b, device=G.device), (groups, a, b))
    flips = torch.stack([group * a + i, k + group * b + j], 1)  # [pairs, 2], of `both`
    changes, chosen = [], []
    for _ in range(k):
        change = cost[:, :k].view(rows, groups, a, 1) + cost[:, k:].view(rows, groups, 1, b)
        change, best = change.add_(together).flatten(1).min(1)
        if not (G.is_cuda or (change < -least).any()):  # a GPU would have to wait for the answer
            break
        changes.append(change)
        chosen.append(flips[best])  # [rows, 2]
        cost += added.gather(1, chosen[-1][:, :, None].expand(-1, -1, both.shape[1])).sum(1)
    if not changes:
        return both[:, :1], torch.zeros_like(mask[:, :1])
    made = (torch.stack(changes, 1) < -least[:, None]).cumprod(1)  # a row that has found none is done
    made = made.bool() & (torch.arange(len(changes), device=G.device) < left[:, None])
    return both.gather(1, torch.cat(chosen, 1)), made.repeat_interleave(2, 1)


def _swap_candidates(price, keep, candidates, pattern):
    """The weights of each row that may be pruned and grown for each other [rows, groups, a] and [rows, groups, b]:
    those with the lowest price, as one group, or the most promising groups of a pattern."""
    rows, width = keep.shape
    if pattern is None:  # a side that has fewer is filled up with others, which _swap_round leaves alone
        return [lowest(side, min(candidates, width))[:, None] for side in price]
    n, m = pattern
    promise = price.unflatten(2, (-1, m)).amin(3).sum(0)  # a group's best of each side
    count = min(max(1, candidates // max(n, m - n)), width // m)
    group = promise.topk(count, dim=1, largest=False)[1]  # [rows, groups]
    group = group[:, :, None].expand(-1, -1, m)
    member = group * m + keep.view(rows, -1, m).gather(1, group).long().argsort(-1)  # the pruned ones first
    return member[:, :, m - n:], member[:, :, :m - n]


def lowest(x, k):
    """The columns of the k smallest entries of each row of x [rows, width], in order. To sort fewer entries, a row is
    cut into width / 16 sets of 16 columns: the k smallest lie in the k sets with the smallest minima."""
    rows, width = x.shape
    if width % 16 or width < 64 * k:
        return x.topk(k, dim=1, largest=False)[1]
    first = x.view(rows, 16, -1).amin(1).topk(k, dim=1, largest=False)[1]
    among = (first[:, :, None] + torch.arange(0, width, width // 16, device=x.device)).flatten(1)
    return among.gather(1, x.gather(1, among).topk(k, dim=1, largest=False)[1])


def entries(G, i, j):
    """G[i, j] of indices that are broadcast together, on a CPU several times as fast."""
    at = i * G.shape[1] + j
    return G.flatten().index_select(0, at.view(-1)).view(at.shape)


@torch.no_grad()
def refit_weights(W: Tensor, keep: Tensor, gram: Tensor, *, goal: Tensor | None = None, damp: float = 1e-4) -> Tensor:
    """The weights that give the least squared error for a mask [out, in]: on each row's kept weights k they solve
    G_kk u = (G w)_k, or goal_k with `goal` [out, in] as in swap_refine. damp: each kept weight i is drawn towards that
    of W with the strength damp * G_ii, or the median of these if that is more; rows whose Cholesky factor fails by that
    in float32 are solved with a hundred times as much. Batched over rows."""
    W, gram = W.float(), gram.float()
    aim = W @ gram if goal is None else goal.float()
    own, new, kept = own_scale(gram), torch.zeros_like(W), keep.sum(1)
    own = own.clamp(min=own.median())  # what a norm has all but silenced would get weights in the thousands

    def system(rows, k, damp, **options):
        G = entries(gram, k[:, :, None], k[:, None, :])
        G.diagonal(0, 1, 2).add_(damp * own[k])
        b = aim[rows[:, None], k] + damp * own[k] * W[rows[:, None], k]
        return *torch.linalg.cholesky_ex(G, **options), b

    for count in kept[kept > 0].unique().tolist():  # rows that keep equally many are solved together
        for rows in (kept == count).nonzero()[:, 0].split(max(1, CHUNK // count ** 2)):
            k = keep[rows].nonzero()[:, 1].view(-1, count)
            L, failed, b = system(rows, k, damp)
            if (again := failed > 0).any():
                L[again], _, b[again] = system(rows[again], k[again], 100 * damp, check_errors=True)
            new[rows[:, None], k] = torch.cholesky_solve(b[:, :, None], L)[:, :, 0]
    return new


@torch.no_grad()
def swap_and_refit(W, keep, gram, *, goal=None, max_swaps=None, pattern=None, rounds=1, damp=1e-4):
    """The weights [out, in] after swaps and refit in turns. Refit gives the kept weights new values, and to each pruned
    one `with_pruned` the best value with which it could come back: the next swaps are made among these. Only refit's
    damping, and rounding to a dtype, can make the error rise. Arguments as in swap_refine, keep: to start from; rounds:
    turns after the first; damp: as in refit_weights."""
    gram = gram.float()
    aim = W.float() @ gram if goal is None else goal.float()
    swap = partial(swap_refine, gram=gram, goal=aim, max_swaps=max_swaps, pattern=pattern)
    refit = partial(refit_weights, W, gram=gram, goal=aim, damp=damp)
    keep = swap(W, keep)
    new = refit(keep)
    for _ in range(rounds):
        keep = swap(with_pruned(new, keep, gram, aim), keep)
        new = refit(keep)
    return new


def with_pruned(new, keep, gram, goal):
    """Corrected weights [out, in] to swap among: the kept ones of `new`, and of each pruned one the value that would
    lower the error most if it alone came back, (goal - new G)_i / G_ii. Arguments as in swap_refine."""
    return torch.where(keep, new, (goal - new @ gram) / gram.diagonal().clamp(min=1e-20))


def dense_weights(W, gram, goal, damp=0.01):
    """The dense weights [out, in] that come closest to the goal, as in swap_refine: W + (goal - W G) G^-1, with G
    damped as in refit_weights. SparseGPT, which prunes towards the weights it is given, is given these."""
    change, G = goal - W.float() @ gram, gram + (damp * own_scale(gram)).diag()
    return W.float() + torch.cholesky_solve(change.T, torch.linalg.cholesky(G)).T


def own_scale(gram):
    """The diagonal of a Gram matrix [in], and where that is 0 its mean: what damping is measured in, so that no input
    is damped by the size of another."""
    own = gram.diagonal()
    return torch.where(own > 0, own, own.mean().clamp(min=1e-20))


# ---------------------------------------------------------------------------------------------------------- SparseGPT

@torch.no_grad()
def sparsegpt(W: Tensor, gram: Tensor, *, sparsity: float | None = None, pattern: tuple[int, int] | None = None,
              keep: Tensor | None = None, damp: float = 0.01, block: int = 128) -> Tensor:
    """Prune and correct the weights that remain (Frantar & Alistarh 2023, arXiv 2301.00774); returns them, float32.

    Columns are taken from left to right; what is lost by pruning one is made up for by the columns to its right, by the
    inverse of the Hessian H, which is the Gram matrix up to a factor that cancels (but where an input is always 0: its
    H_kk is 1). W [out, in]; gram [in, in]: the sum of x x^T. sparsity: the lowest w^2 / U_kk^2 of each `block` of
    columns, over all rows together (as published, one more than the share); pattern (n, m): within each group, of which
    fewer than n are kept where inputs are always 0; keep [out, in]: for a given mask only correct. damp: added to H's
    diagonal, times its mean."""
    assert (sparsity is None) + (pattern is None) + (keep is None) == 2, "one of sparsity, pattern, keep"
    assert sparsity is None or 0 <= sparsity <= 1, sparsity
    width, dead = W.shape[1], gram.diagonal() == 0
    if pattern:
        _, m = check_pattern(pattern, width)
        block = -(-block // m) * m  # groups stay whole
    W = W.float().masked_fill(dead, 0)
    H = gram.float() + dead.diag()
    H.diagonal().add_(damp * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)  # H^-1 = U^T U
    for left in range(0, width, block):
        right = min(left + block, width)
        w, u = W[:, left:right], U[left:right, left:right]
        if keep is not None:
            drop = ~keep[:, left:right]
        elif sparsity is not None:
            score = w.square() / u.diagonal().square()
            drop = score <= score.flatten().sort()[0][min(int(score.numel() * sparsity), score.numel() - 1)]
            drop &= sparsity > 0  # else one would go here, too
        else:
            drop = torch.zeros_like(w, dtype=torch.bool)
        error = torch.zeros_like(w)
        for i in range(right - left):
            if pattern and i % m == 0:  # decided when the sweep gets there, on weights corrected so far
                group = slice(i, i + m)
                drop[:, group] = ~keep_mask(w[:, group].square() / u.diagonal()[group].square(), pattern=pattern)
            error[:, i] = torch.where(drop[:, i], w[:, i], 0) / u[i, i]
            w[:, i:] -= error[:, i:i + 1] * u[i, i:]
            w[:, i].masked_fill_(drop[:, i], 0)
        W[:, right:] -= error @ U[left:right, right:]
    return W


# ------------------------------------------------------------------------------------- layers that differ in sparsity

MOST = 0.99  # the largest share of a layer that an allocation prunes
REACH, OUTLIER = 0.08, 5  # OWL's lambda and M, as published


@torch.no_grad()
def allocation(model, where, hidden, sparsity, kind, whole=False):
    """{layer's name: the share of it to prune}, over all weights `sparsity`, from one pass of `hidden`, batches
    [sequences, tokens, C], through the dense model. where: (rope, positions) for `steps`; kind:
    "owl"          a block's share falls linearly from sparsity + REACH, of the block with the fewest outliers, to
                   sparsity - REACH; then all are moved to the right mean. An outlier is a Wanda score above OUTLIER
                   times the block's mean (Yin et al. 2024, arXiv 2310.05175)
    "sensitivity"  each layer alone is pruned by Wanda; its damage is the KL divergence of the model's output on up to
                   2048 tokens of each process's first batch (one window, if that is longer). For other shares it is
                   scaled by the layer's squared error as if its inputs were uncorrelated: the sum of the squared Wanda
                   scores that are pruned. Of the shares from 0.1 below `sparsity` to 0.09 above those with the least
                   total damage are taken.
    whole: every row of a layer loses as many weights, see whole_weights."""
    layers = all_prunable(model)
    if kind == "uniform":
        return dict.fromkeys(layers, sparsity)
    assert kind in ALLOCATIONS and sparsity is not None, (kind, sparsity)
    sizes = torch.tensor([layer.weight.numel() for layer in layers.values()], dtype=torch.double)
    hidden, trials, found = list(hidden), [], []
    grid = sparsity + torch.arange(-10, 10, dtype=torch.double) / 100
    grid = grid[(grid > -1e-9) & (grid < MOST + 0.005)].clamp(min=0)
    seqlen = hidden[0].shape[1]
    probe = hidden[0][:probe_tokens(seqlen) // seqlen]
    for i in progress_bar(range(model.config.num_hidden_layers), desc="allocating", unit="block"):
        block = model.block(i)
        (step,), linears = steps(block, *where), prunable(block)
        stats = input_stats(step, hidden, linears, readers(step, hidden[0][:1], linears))
        scores = {name: wanda_score(layer.weight, stats[name]) for name, layer in linears.items()}
        if kind == "owl":
            found += [outliers(scores.values())] * len(scores)
        else:
            move(step, trials)
            trials += [pruned_alone(step, probe, layer, scores[name], sparsity) for name, layer in linears.items()]
            found += [growth(score, sparsity, grid) for score in scores.values()]
            probe = step(probe)
        move(step, hidden)
        del block, linears, step  # before the next one is read
    if kind == "owl":
        many = torch.tensor(found, dtype=torch.double)
        shares = sparsity + REACH - 2 * REACH * (many - many.min()) / (many.max() - many.min()).clamp(min=1e-30)
    else:
        shares = cheapest(torch.stack(found) * damage(model, probe, trials)[:, None], grid, sizes, sparsity)
    for _ in range(100):  # a share stays between 0 and MOST, so one step may not be enough
        shares = (shares + sparsity - (shares * sizes).sum() / sizes.sum()).clamp(0, MOST)
    found = dict(zip(layers, shares.tolist()))
    return whole_weights(found, layers, sparsity) if whole else found


def whole_weights(shares, layers, sparsity):
    """An allocation's shares as whole numbers of a row's weights, of which all layers {name: layer} together lose as
    many as by a mask of `sparsity` everywhere. What one layer's share is rounded by, the next one makes up for."""
    found, owed = {}, 0.0
    for name, layer in layers.items():
        rows, width = layer.weight.shape
        exact = int(width * sparsity) + width * (shares[name] - sparsity) + owed / rows
        count = min(max(0, round(exact)), int(width * MOST))
        found[name], owed = (count + 0.5) / width, rows * (exact - count)  # 0.5: keep_mask rounds down
    return found


def outliers(scores):
    """The share of entries, of all scores together, that are above OUTLIER times the mean."""
    count = sum(score.numel() for score in scores)
    mean = sum(score.sum().item() for score in scores) / count
    return sum((score > OUTLIER * mean).sum().item() for score in scores) / count


def pruned_alone(step, x, layer, score, sparsity):
    """step(x) while one linear layer is pruned by its scores."""
    W = layer.weight.data
    layer.weight.data = torch.where(keep_mask(score, sparsity=sparsity), W, 0)
    try:
        return step(x)
    finally:
        layer.weight.data = W


def growth(score, sparsity, grid):
    """By Wanda scores [out, in], a layer's squared error at the shares of `grid` as multiples of that at `sparsity`."""
    lost = F.pad(score.sort(1)[0].square_().sum(0).double().cumsum(0).cpu(), (1, 0))  # by pruning so many of each row
    width = len(lost) - 1
    return lost[(grid * width).long()] / lost[int(sparsity * width)].clamp(min=1e-30)


def damage(model, probe, trials):
    """The KL divergence [trials] from the output that the hidden states `probe` give to that of each trial."""
    expected = model.head(probe.to(model.device)).float().log_softmax(-1)
    found = torch.stack([divergence(model.head(x.to(model.device)), expected) for x in trials])
    add_up(found)
    return found.double().cpu().clamp(min=1e-12)  # with 0 all that `growth` tells of a layer would be lost


def divergence(logits, expected):
    """KL(expected || what logits [B, T, V] say), summed over tokens; expected: log-probabilities."""
    return F.kl_div(logits.float().log_softmax(-1), expected, reduction="sum", log_target=True)


def cheapest(cost, grid, sizes, sparsity):
    """For every layer the share of `grid` [shares] that makes the sum of cost [layers, shares] least, where they prune
    `sparsity` of all weights together: at a price per weight (a Lagrange multiplier) that is found by bisection."""
    low, high = 0.0, cost.max().item() * 1e3
    for _ in range(100):
        price = (low + high) / 2
        shares = grid[(cost - price * sizes[:, None] / sizes.mean() * grid).argmin(1)]
        low, high = (low, price) if (shares * sizes).sum() > sparsity * sizes.sum() else (price, high)
    return shares


# -------------------------------------------------------------------------------- walking the blocks, from a layer up

# What a layer's output should be with --propagate, (a, b). a mixes two targets: at 0 what the dense weights make of the
# inputs that the layer now gets, at 1 its output in the dense model. b, for o_proj and down_proj alone, whose outputs
# are added to the hidden state: the share of the hidden state's error so far (dense less pruned) that they also try to
# repair. Weights can make up for some of it, a mask alone can't; who tries all of it learns the calibration text by
# heart (tests/compare_goal.py).
AIM = {"mask": (0.5, 0.0), "weights": (0.5, 0.5)}
DAMP = 0.01  # of refit, for the same reason; float32 would do with a hundredth of it


def layer_goal(W, stats, adjusts):
    """The goal [out, in] of a layer, as in swap_refine, from its InputStats; None: what its dense weights make of its
    inputs. adjusts: "mask" or "weights", what its method can choose (see AIM)."""
    if stats.cross is None:
        return None
    a, b = AIM[adjusts]
    goal = W.float() @ torch.lerp(stats.gram, stats.cross, a)  # W z is the output in the dense model, of its input z
    return goal if stats.lack is None else goal.add_(stats.lack, alpha=b)


@torch.no_grad()
def prune_layer(W, stats, *, score, refine, goal=None, sparsity=None, pattern=None, refit=False, cycles=None,
                threshold=USUAL["threshold"], sign_check=USUAL["sign_check"]):
    """One layer's pruned weight [out, in] in float32, from its InputStats and its goal as in swap_refine. score and
    refine are of SCORES and REFINES."""
    assert score in SCORES and refine in REFINES, (score, refine)
    W, amount = W.float(), dict(pattern=pattern) if pattern else dict(sparsity=sparsity)
    scores = magnitude_score(W) if score == "magnitude" else wanda_score(W, stats)
    if score == "sparsegpt":
        weights_for = partial(sparsegpt, W if goal is None else dense_weights(W, stats.gram, goal), stats.gram)
        new = weights_for(**amount)
        keep = new != 0
    else:
        weights_for = lambda keep: torch.where(keep, W, 0)
        keep = keep_mask(scores, **amount)
        new = weights_for(keep=keep)
    if "dsnot" in refine:
        few = max(1, round(W.shape[1] * 50 / 4096)) if cycles is None else cycles
        keep = dsnot_refine(W, keep, stats, scores, cycles=few, threshold=threshold, sign_check=sign_check,
                            pattern=pattern)
    if refit and "swap" in refine:
        return swap_and_refit(W, keep, stats.gram, goal=goal, max_swaps=cycles, pattern=pattern, damp=DAMP)
    if refit:
        return refit_weights(W, keep, stats.gram, goal=goal, damp=DAMP)
    if "dsnot" in refine:
        new = weights_for(keep=keep)
    if "swap" in refine:
        if score == "sparsegpt":  # swaps are made among the corrected weights
            goal = W @ stats.gram if goal is None else goal
            W = with_pruned(new, keep, stats.gram, goal)
        new = weights_for(keep=swap_refine(W, keep, stats.gram, goal=goal, max_swaps=cycles, pattern=pattern))
    return new


def prune_rows(W, stats, goal, **options):
    """prune_layer, each process taking its share of the rows where they are apart, else all taking the first one's."""
    rank, world = processes()
    if world == 1 or not rows_apart(**options):
        return from_first(prune_layer(W, stats, goal=goal, **options))
    rows = torch.arange(len(W), device=W.device).tensor_split(world)[rank]
    new = torch.zeros_like(W, dtype=torch.float32)
    new[rows] = prune_layer(W[rows], stats, goal=None if goal is None else goal[rows], **options)
    add_up(new)
    return new


def prune_linear(weight, name, stats, adjusts, dtype, **options):
    """prune_rows of one layer's weight, in place, rounded to the dtype in which it will be read again. Returns its
    record. adjusts: as in layer_goal. Raises DeadEnd where its inputs are not finite or too few to fit weights to, or
    where these don't fit into the dtype."""
    if not all(x.isfinite().all() for x in (stats.square, stats.cross, stats.lack) if x is not None):
        raise DeadEnd(f"the calibration activations that flow into {name} are not finite")
    try:
        W = prune_rows(weight, stats, layer_goal(weight, stats, adjusts), **options).to(dtype)
    except torch.linalg.LinAlgError:
        raise DeadEnd(f"the calibration activations that flow into {name} are too few or too much alike to fit its "
                      f"weights to them: give more --nsamples, or another --calib text") from None
    if not W.isfinite().all():  # float16 ends at 65504
        raise DeadEnd(f"the weights that suit {name} do not fit into {str(dtype).removeprefix('torch.')}, in which "
                      f"the checkpoint is stored: leave out --refit or --score sparsegpt, which change them")
    error = {} if stats.gram is None else {"error": relative_error(weight, W, stats.gram)}
    weight.copy_(W)
    return layer_record(name, W) | error


def relative_error(W, pruned, gram):
    """||(W - pruned) X||^2 / ||W X||^2 of a layer, from its inputs' Gram matrix; 0 where nothing comes out."""
    lost, whole = (((W @ gram) * W).sum().item() for W in (W.float() - pruned.float(), W.float()))
    return max(0.0, lost / whole) if whole > 0 else 0.0


@torch.no_grad()
def prune_block(block, where, hidden, dense, prefix, stored, *, score, refine, sparsity, refit=False, propagate=False,
                refine_layers="all", **options):
    """Prune the linear layers of one block in place and move `hidden`, a list of [sequences, tokens, C], through it,
    and `dense`, what flows in the dense model (empty: not needed). where: (rope, positions) for `steps`; sparsity:
    {layer's name: share}; stored: a tensor's name -> its dtype on disk. Returns a record per layer.

    With propagate each layer is pruned on inputs that the pruned layers before it have made; without, all layers of a
    block on inputs that the block's dense weights have made. Of either half of a block the last layer, o_proj or
    down_proj, is the one whose output is added to the hidden state."""
    gram = needs_gram(score, refine, refit)
    adjusts = "weights" if refit or score == "sparsegpt" else "mask"
    linears, records, original = prunable(block), [], copy.deepcopy(block) if dense else None
    for half, step in enumerate(steps(block, *where, halves=propagate)):
        teacher = (steps(original, *where, halves=True)[half], dense, prunable(original)) if dense else None
        groups = readers(step, hidden[0][:1], linears)
        for stage in [[group] for group in groups] if propagate else [groups]:
            adds = bool(dense) and stage == groups[-1:] and AIM[adjusts][1] > 0
            stats = input_stats(step, hidden, linears, stage, gram, teacher, adds)
            for name in itertools.chain(*stage):
                layer = f"{prefix}.{name}"
                records.append(prune_linear(
                    linears[name].weight, layer, stats[name], adjusts, stored(f"{layer}.weight"), score=score,
                    refine=refine_of(name, refine, refine_layers), refit=refit, sparsity=sparsity[layer], **options))
        move(step, hidden)
        if dense:
            move(teacher[0], dense)
    return records


def layer_record(name, W):
    return {"layer": name, "weights": W.numel(), "sparsity": (W == 0).double().mean().item()}


@torch.inference_mode()
def prune(model, samples, out, made, *, batch=8, propagate=False, sparsity=None, allocate="uniform", **options):
    """Prune a streamed model block by block into the checkpoint folder `out`.

    samples [nsamples, seqlen]: calibration ids, of which each process takes its share. made: a dict that names this
    run and its options; an interrupted run of that name goes on, a finished one is not made again. propagate: see
    prune_block; options: refine_layers and those of prune_layer. Returns a record per layer, {layer, weights, sparsity,
    error where it is known}, which is also written to out/pruning.json, with the seconds that it took. Raises
    InputError where the model is not streamed, activations are not finite or the disk is too small."""
    if not model.streams:
        raise InputError("a model in memory can't be pruned into a folder: load it with stream=True")
    begin = time.perf_counter()
    source, device, count = model.source, model.place["device"], len(model.model.layers)
    source.check_dense()
    rank, world = processes()
    if done := finished(out, made):
        return done["layers"]
    positions = torch.arange(samples.shape[1], device=device)
    where, samples = (rotary(model.config, positions), positions), samples[rank::world]
    files, aims = versions(source.paths), has_goal(propagate, **options)
    states = held_states(*samples.shape, len(all_prunable(model)), aims, allocate)
    home = place_for(model.config, states, torch.device(device), model.place["dtype"])
    writer = CheckpointWriter(out, model.config.raw, source.folder, made=made)
    wait()  # everybody has looked at the folder, which the first one now fills
    with writer if rank == 0 else nullcontext():
        if rank == 0:
            check_disk(writer.partial, writer.missing(source.size()), out)
        wait()  # the folder is there
        done, seconds = writer.progress(count)
        if done:
            say(f"{out}: going on after {len(done)} of {count} blocks")

        def embedded():  # made twice, so that what allocation has used is gone before it is needed again
            return (model.embed(ids).to(home) for ids in samples.split(batch))

        shares = allocation(model, where, embedded(), sparsity, allocate, whole=rows_apart(**options))
        hidden = list(embedded())  # the input of the next block
        dense, records = list(hidden) if aims else [], []
        for i in progress_bar(range(count), desc="pruning", unit="block"):
            block = model.block(i)
            prefix, file = f"model.layers.{i}", shard(i, count)
            if i in done:
                move(steps(block, *where)[0], dense)
                writer.load(file, block, prefix)
                move(steps(block, *where)[0], hidden)
                records += done[i]
            else:
                records += prune_block(block, where, hidden, dense, prefix, source.stored, sparsity=shares,
                                       propagate=propagate, **options)
                if rank == 0:
                    writer.note(run=made, seconds=seconds + time.perf_counter() - begin, layers=records)
                    tensors = {f"{prefix}.{k}": v for k, v in block.state_dict().items()}
                    writer.write(file, {name: v.to(source.stored(name)) for name, v in tensors.items()})
            del block  # before the next one is read
        if versions(source.paths) != files:
            raise DeadEnd(f"{source.folder} was changed while it was being pruned: give the command again")
        if rank == 0:
            writer.write(shard(count, count), source.rest())
        wait()  # everybody has read what the next line moves
    wait()  # the checkpoint is in its place
    return records


# ----------------------------------------------------------------------------- swaps by the output of the whole model

@torch.inference_mode(False)
def swap_globally(model: GPT, dense: GPT, samples: Tensor, rounds: int, pattern: tuple[int, int] | None = None):
    """Swap weights of a pruned model, in place, by what the output of the whole model loses. Returns the loss before
    and after each round, in nats a token.

    The loss L is KL(dense || model) of the next token. By its gradient at all weights, pruned ones too, a weight that
    changes by d (pruned: -w; grown: w of the dense model) changes it by about
        d dL/dw + damping / 2 * f q d^2,
    where f is the mean square of -log P's gradient at the row's output, for tokens that the model itself draws, and q
    that of the weight's input: the curvature as K-FAC (arXiv 1503.05671) takes it apart, and of that the diagonal, as
    it is before the first round. In a round each row makes the swap that promises most, if one promises anything. Where
    all together don't lower the loss on the round's own text, they are taken back, and the damping doubles until they
    do, ten times at most; where they do at once, it falls by a third (Levenberg-Marquardt). Tokens are drawn by
    PyTorch's global random numbers.

    samples [n, seqlen]: calibration ids, ROUND tokens a round by turns, which processes share. Both models are whole in
    memory, on one device. pattern: (n, m) of the masks, which stays; None: each row keeps as many as it has. Raises
    InputError for a streamed model."""
    if model.streams:
        raise InputError("global swaps change a model in memory: load it without stream=True")
    rank, world = processes()
    layers, originals = all_prunable(model), all_prunable(dense)
    seqlen = samples.shape[1]
    texts = samples[rank::world].split(max(1, ROUND // seqlen // world))
    texts = [[ids.to(model.device) for ids in text.split(probe_tokens(seqlen) // seqlen)] for text in texts]
    curvature, damping, losses = curvature_of(model, layers, texts[0]), 16.0, []
    for i in progress_bar(range(rounds), desc="global swaps", unit="round"):
        text = texts[i % len(texts)]
        with torch.no_grad():
            expected = [dense(ids).float().log_softmax(-1) for ids in text]
        before, found = output_gradients(model, layers, text, expected, divergence)
        for attempt in range(10):
            undone = {name: swap_one(layer.weight, originals[name].weight, found[name][0], *curvature[name], damping,
                                     pattern) for name, layer in layers.items()}
            with torch.no_grad():
                after = mean_loss(sum(divergence(model(ids), x) for ids, x in zip(text, expected)), text)
            if after < before:
                damping /= 1.5 if attempt == 0 else 1
                break
            for name, (at, values) in undone.items():
                layers[name].weight.data[at] = values
            damping *= 2
        losses.append((before, min(before, after)))
        del found  # as large as the model, and so is the next one
    return losses


@contextmanager
def recomputed(model):
    """Inside, gradients reach what flows through a model but no weights; each block is computed again for them."""
    asked = [W.requires_grad for W in model.parameters()]
    for block in model.blocks():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        model.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for block in model.blocks():
            del block.forward
        for W, before in zip(model.parameters(), asked):
            W.requires_grad_(before)


def curvature_of(model, layers, text):
    """{layer's name: (f [out], q [in])}, as in swap_globally: for tokens that the model itself draws after a text's."""
    if rank := processes()[0]:  # else all draw by the same random numbers
        torch.manual_seed(torch.initial_seed() + rank)
    with torch.no_grad():
        drawn = [torch.distributions.Categorical(logits=model(ids).float()).sample() for ids in text]
    _, found = output_gradients(model, layers, text, drawn, log_loss)
    return {name: (f, q) for name, (_, f, q) in found.items()}


def log_loss(logits, ids):
    """-log P of ids [B, T] by logits [B, T, V], summed over tokens."""
    return F.cross_entropy(logits.float().flatten(0, 1), ids.flatten(), reduction="sum")


def mean_loss(total, text):
    """A total over the tokens of a text, by their number, over all processes."""
    both = torch.tensor([total, sum(ids.numel() for ids in text)], dtype=torch.double, device=total.device)
    add_up(both)
    return (both[0] / both[1]).item()


def output_gradients(model, layers, text, expected, loss):
    """The mean of loss(logits, expected) over the tokens of a text, a list of ids [B, T], and {layer's name: its
    gradient (dL/dW [out, in], f [out], q [in])}, as in swap_globally (f and q are for curvature_of)."""
    found, total = {}, torch.zeros((), device=text[0].device)

    def seen(name, x, g):
        x, g = x.flatten(0, 1), g.flatten(0, 1)  # [tokens, in], [tokens, out]
        gradient, f, q = found.get(name, (None, 0, 0))
        found[name] = add_product(gradient, g, x), f + g.float().square().sum(0), q + x.float().square().sum(0)

    with recomputed(model), watch_gradients(model.model.embed_tokens, layers, seen):
        for ids, x in zip(text, expected):
            part = loss(model(ids), x)
            part.backward()  # computes each block again, of which only the layers' inputs are kept
            total += part.detach()
            del part  # which holds them
    tokens = torch.tensor(sum(ids.numel() for ids in text), device=total.device)
    add_up(tokens)
    for sums in found.values():
        for one in sums:
            add_up(one.div_(tokens))
    return mean_loss(total, text), found


@torch.no_grad()
def swap_one(W, dense, gradient, f, q, damping, pattern):
    """Make in every row of W [out, in], in place, the swap that promises most, if one does. dense, gradient [out, in]:
    of the same layer; f, q, damping, pattern as in swap_globally. Returns what undoes it: (places, values)."""
    keep = W != 0
    d = torch.where(keep, -W, dense).float()
    price = d * (gradient + damping / 2 * f[:, None] * q * d)
    m = pattern[1] if pattern else W.shape[1]
    (losing, p), (gaining, g) = (price.masked_fill(other, torch.inf).unflatten(1, (-1, m)).min(-1)
                                for other in (~keep, keep | (d == 0)))  # [out, groups]
    change, group = (losing + gaining).min(1)
    row = (change < 0).nonzero()[:, 0]
    p, g = (x[row, group[row]] + group[row] * m for x in (p, g))
    at = torch.cat([row, row]), torch.cat([p, g])
    values = W[at]
    W[at] = torch.cat([torch.zeros_like(dense[row, p]), dense[row, g]])
    return at, values


def prune_globally(model, samples, out, made, *, global_swaps, pattern=None, **options):
    """`prune` into the folder of blocks_of, which goes when `out` is there, then so many rounds of `swap_globally`, for
    which the dense and the pruned model are held whole in memory. The arguments are those of `prune`."""
    (start, local), first, source = blocks_of(out, made), processes()[0] == 0, model.source
    if done := finished(out, made):
        if first and (finished(start, local) or not start.exists()):  # a run was killed before or while it was removed
            remove(start)
        return done["layers"]
    prune(model, samples, start, local, pattern=pattern, **options)
    begin, before = time.perf_counter(), noted(start / "pruning.json")
    with CheckpointWriter(out, model.config.raw, start, made=made) if first else nullcontext() as writer:
        dense, pruned = (GPT.from_pretrained(folder, **model.place) for folder in (source.folder, start))
        losses = swap_globally(pruned, dense, samples, global_swaps, pattern)
        records = [layer_record(name, layer.weight) for name, layer in all_prunable(pruned).items()]
        if first:
            seconds = before["seconds"] + time.perf_counter() - begin
            writer.note(run=made, seconds=seconds, losses=losses, layers=records)
            tensors = {name: W.to(source.stored(name)) for name, W in pruned.tensors().items()}
            writer.write("model.safetensors", tensors | source.rest())
    dense = pruned = tensors = None  # mapped files would keep Windows from removing them
    if first:
        remove(start)
    wait()
    return records


# -------------------------------------------------------------------------------------------------------- the command

def options():
    p = parser(__doc__)
    p.add_argument("--model", default="tiny", help="a preset (data/hub.py lists them), a Hub id or a folder")
    p.add_argument("--out", help="the folder of the pruned checkpoint (default: out/MODEL-METHOD)")
    p.add_argument("--dry-run", action="store_true",
                   help="say what the run would take in memory, disk and time; fetches config.json alone")
    group = p.add_argument_group("what to prune")
    how_many = group.add_mutually_exclusive_group()
    how_many.add_argument("--sparsity", type=float, default=0.7, help="the share of weights to prune")
    how_many.add_argument("--pattern", metavar="N:M", help="such as 2:4: N kept of every M consecutive weights")
    group.add_argument("--score", default="wanda", choices=SCORES, help="the first mask")
    group.add_argument("--allocate", default="uniform", choices=ALLOCATIONS,
                       help="uniform: the same sparsity everywhere; owl: less in blocks with more outliers; "
                            "sensitivity: less in layers whose pruning hurts more")
    group = p.add_argument_group("how to refine the mask")
    group.add_argument("--refine", default="dsnot", choices=REFINES,
                       help="DSnoT's rule, swaps that lower the exact error, or both")
    group.add_argument("--refit", action=argparse.BooleanOptionalAction, default=False,
                       help="make the kept weights the best ones for the mask (least squares); with swaps, by turns")
    group.add_argument("--propagate", action=argparse.BooleanOptionalAction, default=None,
                       help="prune layer after layer on what the pruned ones leave, and make up for some of it "
                            "(default: with swap or --refit)")
    group.add_argument("--global-swaps", type=int, default=0, metavar="ROUNDS",
                       help="at the end so many rounds of swaps by the output of the whole model, which has to fit "
                            "into memory three times (in 16 bits four times)")
    group.add_argument("--cycles", type=int,
                       help="swaps per row at most, of DSnoT and of each turn of exact ones (default: of DSnoT's as "
                            "many as 50 are to 4096 inputs, of exact ones until none helps)")
    group.add_argument("--threshold", type=float,
                       help=f"DSnoT: a row is left alone once its expected error in a sequence is no larger "
                            f"(default: {USUAL['threshold']})")
    group.add_argument("--sign-check", action=argparse.BooleanOptionalAction, default=None,
                       help="DSnoT: stop a row before its expected error changes sign (default: yes)")
    group.add_argument("--refine-layers", default=USUAL["refine_layers"], choices=["attn", "all"],
                       help="refine the masks of attention alone, or of the MLP, too")
    group = p.add_argument_group("calibration and evaluation")
    group.add_argument("--calib",
                       help=f"text: {', '.join(SOURCES)} or a file (default: tiny where the model has tiny's "
                            f"tokenizer, else c4)")
    group.add_argument("--nsamples", type=int, default=NSAMPLES, help="calibration sequences")
    group.add_argument("--seqlen", type=int, help="tokens a sequence (default: 2048, or the model's limit if lower)")
    group.add_argument("--data", help="evaluation text, one of the same (default: tiny or wikitext2)")
    group.add_argument("--split", choices=["validation", "test", "held-out"],
                       help="of a named text (default: test); of a file the halves of its last tenth, or both "
                            "(default: all of it if calibration reads none of it, else held-out)")
    group.add_argument("--compare", action=argparse.BooleanOptionalAction, default=None,
                       help="prune a second time without refinement, for comparison (default: where the model has "
                            "tiny's tokenizer and the text is tiny)")
    return p.parse_args()


def check(args, config):
    """Raise InputError for options that can't be meant."""
    allocates, unrefined, no_dsnot = args.allocate != "uniform", args.refine == "none", "dsnot" not in args.refine
    left_out = f"which --refine {args.refine} leaves out"
    at_least(args, nsamples=processes()[1], seqlen=2, cycles=0, threshold=0, global_swaps=0)
    if args.pattern:
        for width in layer_inputs(config).values():
            check_pattern(parse_pattern(args.pattern), width)
    for wrong, sentence in [
            (not 0 <= args.sparsity < 1,
             f"--sparsity {args.sparsity} must be at least 0 and below 1 (0.7 prunes 70 %)"),
            (allocates and args.pattern,
             f"--allocate {args.allocate} can't change the pattern {args.pattern}: give a --sparsity"),
            (allocates and args.sparsity > MOST,
             f"--allocate {args.allocate} prunes no layer by more than {MOST}, so that --sparsity {args.sparsity} "
             f"can't be reached: lower it, or leave out --allocate"),
            (args.out is not None and Path(os.path.normpath(args.out)).name in ("", ".."),
             f"--out {args.out} has no name of its own: give a folder to make"),
            (args.cycles is not None and unrefined, f"--cycles {args.cycles} is for swaps, {left_out}"),
            (args.refine_layers != "all" and unrefined,
             f"--refine-layers {args.refine_layers} is for refined layers, {left_out}"),
            (args.threshold is not None and no_dsnot, f"--threshold is for DSnoT, {left_out}"),
            (args.sign_check is not None and no_dsnot, f"--sign-check is for DSnoT, {left_out}"),
            (args.compare and not args.propagate and method_of(vars(args)) == args.score,
             "--compare prunes once more without refinement, and there is none: leave it out")]:
        if wrong:
            raise InputError(sentence)


def prune_and_measure(args, folder, amount, passes):
    """Make the checkpoint of each of the passes (name, folder, options of prune; the first one, the dense model, is
    there and has none), measure it and print a line; returns the rows of the table."""
    def load(folder):
        return GPT.from_pretrained(folder, device=args.device, stream=True)

    tokenizer, batch = load_tokenizer(folder), max(1, 8192 // args.seqlen)
    model = GPT.open(args.model)  # here its weights are fetched
    config = model.config
    model.source.check_dense()
    same = shared_by(args, model.source)
    notes = check_folders(args, model, passes[1:], same)
    if args.data not in SOURCES and os.path.realpath(args.data) == os.path.realpath(args.calib):
        args.split = args.split or "held-out"  # which is recorded, too
    ids = evaluation_ids(args.data, args.split, tokenizer, args.seqlen)
    calibration = calibration_windows(args.calib, tokenizer, args.nsamples, args.seqlen, args.seed)
    count = len(windows(ids, args.seqlen))
    allocated = f" ({said_of('allocate', args.allocate)})" * (args.allocate != "uniform")
    read = f"{count} window{'s' * (count != 1)} of {args.seqlen} tokens{config.remark(args.seqlen)}"
    say(f"{args.model}: {amount} pruned{allocated}, calibration {args.nsamples} x {args.seqlen} tokens of "
        f"{args.calib}, perplexity on {told(args.data, args.split)} ({read})")
    if pruned_here(folder):
        notes.append(f"{args.model} has been pruned before; it is what is called dense here")
    if (args.refit or args.score == "sparsegpt") and calibration.numel() < config.intermediate_size:
        notes.append(f"weights are fitted to {calibration.numel()} tokens of calibration text, fewer than the "
                     f"{config.intermediate_size} inputs of a layer: give more --nsamples, or other texts suffer")
    for one in notes:
        say(f"note: {one}")

    rows, width = [], max(24, *(len(name) for name, *_ in passes))
    zeros = None if pruned_here(folder) else 0.0  # of what is called dense here
    say(f"\n{'method':<{width}}{'sparsity':>10} {'perplexity':>13} {'seconds':>9}")
    for name, place, how in passes:
        seconds, layers = 0.0, []
        if how:
            make = prune_globally if "global_swaps" in how else prune
            layers = make(load(folder), calibration, place, how | same, batch=batch, **how)
            seconds = noted(Path(place) / "pruning.json")["seconds"]
            zeros = sum(one["weights"] * one["sparsity"] for one in layers) / sum(one["weights"] for one in layers)
        ppl = perplexity(load(place), ids, args.seqlen, batch, progress=True)
        rows.append({"method": name, "sparsity": zeros, "perplexity": ppl, "seconds": seconds, "layers": layers})
        say(f"{name:<{width}}{'' if zeros is None else f'{zeros:.2%}':>10} {ppl:>13.2f} {seconds:>9.1f}")
    return rows


def main():
    args = options()
    with process_group(args):
        folder = model_folder(args.model, weights=False, config_only=args.dry_run)
        config = Config.read(folder)
        check(args, config)
        amount, title = fill_in(args, config, usual_text(folder, None))
        method = {name: getattr(args, name) for name in METHOD}
        method |= dict(pattern=args.pattern and parse_pattern(args.pattern))
        plain = method | USUAL | dict(refine="none", refit=False, propagate=False)
        method |= dict(global_swaps=args.global_swaps) if args.global_swaps else {}
        if args.dry_run:
            return dry_run(args, config, amount, [method] + [plain] * args.compare, prune_layer, divergence)
        out = Path(os.path.normpath(args.out))  # "missing/.." is where it will be written
        title += " (propagate)" * (args.compare and title == args.score)  # else both have one name
        passes = [("dense", folder, None), (title, out, method)]
        if args.compare:
            passes.insert(1, (args.score, out.with_name(out.name + ".unrefined"), plain))
        rows = prune_and_measure(args, folder, amount, passes)
        say(f"\nsaved {out}")
        if processes()[0] == 0:
            record(args, {"data": args.data, "seqlen": args.seqlen, "rows": rows})


if __name__ == "__main__":
    run(main, goes_on=True)
