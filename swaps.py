"""Exact swaps and refit: the mask by which a layer's output loses least, and the best weights for it.

The squared error of a layer y = x W^T, ||(W - W_sparse) X||^2, depends on its inputs X by their Gram matrix G = X X^T
alone. So each row can be improved exactly, whatever mask it starts from:

    swaps   prune one kept weight and grow a pruned one, the pair by which the error falls most, until none helps
    refit   the kept weights that make the error least: a linear system of the rows and columns of G that they read

The error may also be that against a goal, other outputs than those of W: see `goal`.

Shapes: a weight W, its masks and its goal are [out, in]; True in a mask = keep.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from masks import check_pattern

CHUNK = 2**26  # elements at a time, at most: of what swaps on a GPU hold of a few rows, and of the systems of refit


def relative_error(W, pruned, gram):
    """||(W - pruned) X||^2 / ||W X||^2 of a layer, from its inputs' Gram matrix; 0 where nothing comes out."""
    lost, whole = (((V @ gram) * V).sum().item() for V in (W.float() - pruned.float(), W.float()))
    return max(0.0, lost / whole) if whole > 0 else 0.0


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
    if pattern:
        check_pattern(pattern, W.shape[1])
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
            at, used, first = column[row, which], count // 2, count.cumsum(0) - count  # first: where a row's begin
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
    # what one flip adds to the price of another [rows, all, all], `together`: of each pair
    added = entries(G, both[:, :, None], both[:, None, :]).mul_(step[:, :, None]).mul_(step[:, None, :] / 2)
    group, i, j = torch.unravel_index(torch.arange(k * b, device=G.device), (groups, a, b))
    flips = torch.stack([group * a + i, k + group * b + j], 1)  # [pairs, 2], of `both`
    together = added[:, flips[:, 0], flips[:, 1]].view(rows, groups, a, b)
    added.diagonal(0, 1, 2).fill_(torch.inf)  # nothing flips twice
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
    of W with the strength damp * G_ii, or damp times the median of all G_ii if that is more; rows whose Cholesky factor
    fails by that in float32 are solved with a hundred times as much. Batched over rows. dsnot.py damps by 0.01."""
    W, gram = W.float(), gram.float()
    aim = W @ gram if goal is None else goal.float()
    own, new, kept = own_scale(gram, floor=1), torch.zeros_like(W), keep.sum(1)

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
    """The dense weights [out, in] that come closest to the goal, as in swap_refine: W + (goal - W G) G^-1, where G's
    diagonal is raised by damp * own_scale. SparseGPT, which prunes towards the weights it gets, gets these."""
    change, G = goal - W.float() @ gram, gram + (damp * own_scale(gram, floor=0.03)).diag()
    return W.float() + torch.cholesky_solve(change.T, torch.linalg.cholesky(G)).T


def own_scale(gram, floor):
    """What damping is measured in [in]: the diagonal of a Gram matrix, where that is 0 its mean, and at least `floor`
    times its median: what a norm has all but silenced would else get weights in the hundreds."""
    own = gram.diagonal()
    own = torch.where(own > 0, own, own.mean().clamp(min=1e-20))
    return own.clamp(min=floor * own.median())
