"""Scores, masks and SparseGPT: where pruning starts.

A score says for each weight how much it matters, and a mask keeps the highest ones of each row, or of each group of m:

    magnitude   |W|
    Wanda       |W| sqrt(q), where sqrt(q) is the norm of the weight's input but for a factor that all share
                (Sun et al. 2023, arXiv 2306.11695)

SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774) goes through the columns k of a weight from the left, prunes where
w_k^2 / U_kk^2 is low, and corrects what is to the right of it. With H the Gram matrix of the inputs and H^-1 = U^T U (U
upper triangular), every row does for each k that it prunes

    w_l <- w_l - w_k / U_kk U_kl    for all l >= k

Shapes: a weight W, its scores and masks are [out, in]; True in a mask = keep.
"""

import torch
from torch import Tensor

from data.calibration import InputStats
from data.command import InputError


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
    # how many of its group come before each entry: up to m = 32 pairs are compared faster than groups are sorted
    rank = torch.zeros_like(group, dtype=torch.int16)
    for i in range(m):
        for j in range(i + 1, m):
            first = group[i] <= group[j]
            rank[j] += first
            rank[i] += ~first
    return (rank >= m - n).T.reshape(rows, width)


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
            drop = score <= score.flatten().kthvalue(min(int(score.numel() * sparsity) + 1, score.numel()))[0]
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
