"""Layers that differ in sparsity: how much of each to prune, so that the model loses least.

By OWL (Yin et al. 2024, arXiv 2310.05175), from the outliers of a block's scores, or by sensitivity, what the model's
output loses when a layer alone is pruned.
"""

import torch
import torch.nn.functional as F

from data.calibration import divergence, input_stats, move, readers, steps
from data.method import ALLOCATIONS
from data.processes import add_up, progress_bar
from gpt import all_prunable, prunable
from masks import keep_mask, wanda_score

MOST = 0.99  # the largest share of a layer that an allocation prunes
REACH, OUTLIER = 0.08, 5  # OWL's lambda and M, as published
SPAN = 15  # hundredths: how far from the asked share "sensitivity" looks


def probe_tokens(seqlen):
    """The most tokens that "sensitivity" looks at, one window at least: more of them find no better shares."""
    return max(512, seqlen)


@torch.no_grad()
def allocation(model, where, hidden, sparsity, kind, whole=False):
    """{layer's name: the share of it to prune}, over all weights `sparsity`, from one pass of `hidden`, batches
    [sequences, tokens, C], through the dense model. where: (positions, rope) for `steps`; kind:
    "owl"          a block's share falls linearly from sparsity + REACH, of the block with the fewest outliers, to
                   sparsity - REACH. An outlier is a Wanda score above OUTLIER times the block's mean (Yin et al. 2024,
                   arXiv 2310.05175)
    "sensitivity"  each layer alone is pruned by Wanda; its damage is the KL divergence of the model's output on up to
                   probe_tokens of each process's first batch. For other shares it is scaled by the layer's squared
                   error as if its inputs were uncorrelated: the sum of the squared Wanda scores that are pruned. Of the
                   shares within SPAN of `sparsity` those with the least total damage are taken.
    In the end all shares are moved alike, within 0 and MOST, until they prune `sparsity` in all.
    whole: every row of a layer loses the same whole number of weights, see whole_weights."""
    layers = all_prunable(model)
    if kind == "uniform":
        return dict.fromkeys(layers, sparsity)
    assert kind in ALLOCATIONS and sparsity is not None, (kind, sparsity)
    sizes = torch.tensor([layer.weight.numel() for layer in layers.values()], dtype=torch.double)
    hidden, trials, measured = list(hidden), [], []
    grid = sparsity + torch.arange(-SPAN, SPAN + 1, dtype=torch.double) / 100
    grid = grid[(grid > -1e-9) & (grid < MOST + 0.005)].clamp(min=0)
    seqlen = hidden[0].shape[1]
    probe = hidden[0][:probe_tokens(seqlen) // seqlen]
    for i in progress_bar(range(model.config.num_hidden_layers), desc="allocating", unit="block"):
        block = model.block(i)
        (step,), linears = steps(block, *where), prunable(block)
        stats = input_stats(step, hidden, linears, readers(step, hidden[0][:1], linears))
        scores = {name: wanda_score(layer.weight, stats[name]) for name, layer in linears.items()}
        if kind == "owl":
            measured += [outliers(scores.values())] * len(scores)
        else:
            move(step, trials)
            trials += [pruned_alone(step, probe, layer, scores[name], sparsity) for name, layer in linears.items()]
            measured += [growth(score, sparsity, grid) for score in scores.values()]
            probe = step(probe)
        move(step, hidden)
        del block, linears, step, stats, scores  # before the next one is read
    if kind == "owl":
        many = torch.tensor(measured, dtype=torch.double)
        shares = sparsity + REACH - 2 * REACH * (many - many.min()) / (many.max() - many.min()).clamp(min=1e-30)
    else:
        shares = cheapest(torch.stack(measured) * damage(model, probe, trials)[:, None], grid, sizes, sparsity)
    for _ in range(100):  # a share stays between 0 and MOST, so one step may not be enough
        shares = (shares + sparsity - (shares * sizes).sum() / sizes.sum()).clamp(0, MOST)
    shares = dict(zip(layers, shares.tolist()))
    return whole_weights(shares, layers, sparsity) if whole else shares


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


def cheapest(cost, grid, sizes, sparsity):
    """For every layer the share of `grid` [shares] that makes the sum of cost [layers, shares] least, where they prune
    about `sparsity` of all weights: at a price per weight (a Lagrange multiplier) that is found by bisection."""
    low, high = 0.0, cost.max().item() * 1e3
    for _ in range(200):  # costs may differ by more than 1e30, of layers that so far have lost nothing
        price = (low + high) / 2
        shares = grid[(cost - price * sizes[:, None] / sizes.mean() * grid).argmin(1)]
        low, high = (low, price) if (shares * sizes).sum() > sparsity * sizes.sum() else (price, high)
    return shares
