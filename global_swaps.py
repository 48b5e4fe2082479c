"""Swaps by the output of the whole model: what a layer's own error does not tell.

The loss L is KL(dense || model) of the next token, in nats. By L's gradient at all weights, pruned ones too, a weight
that changes by d (to prune: -w; to grow: the dense w) changes L by about

    d dL/dw + damping / 2 * f q d^2

where f is the mean square of -log P's gradient at the row's output, for tokens that the model itself draws, and q that
of the weight's input: the diagonal of K-FAC's curvature (arXiv 1503.05671), taken before the first round. In a round
each row makes the swap that promises most, if one promises anything. Where all together don't lower the loss on the
round's own text, they are taken back, and the damping doubles until they do, ten times at most; where they do at once,
it falls by a third (Levenberg-Marquardt).

Shapes: a weight W, its gradient and its mask are [out, in]; B texts of T tokens, V words of which P is the probability.
"""

from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from data.calibration import add_product, divergence, watch_gradients
from data.command import InputError
from data.processes import add_up, processes, progress_bar
from gpt import GPT, all_prunable

ROUND = 8192  # tokens of a round: with fewer, gradients are noisier
DAMPING = 16.0  # of the first round: above 1, as all rows change at once and each promises as if it were alone


def tokens_at_a_time(seqlen):
    """The most tokens that go through the models at a time."""
    return max(2048, seqlen)


@torch.inference_mode(False)  # a caller may be in it, and gradients are not
def swap_globally(model: GPT, dense: GPT, samples: Tensor, rounds: int, pattern: tuple[int, int] | None = None):
    """Swap weights of a pruned model, in place, by what the output of the whole model loses. Returns the loss before
    and after each round, in nats a token.

    samples [n, seqlen]: calibration ids, ROUND tokens a round by turns, which processes share. Both models are whole in
    memory, on one device; tokens are drawn by PyTorch's global random numbers. pattern: (n, m) of the masks, which
    stays; None: each row keeps as many as it has. Raises InputError for a streamed model."""
    if model.streams or dense.streams:
        raise InputError("global swaps need both models in memory: load them without stream=True")
    rank, world = processes()
    layers, originals = all_prunable(model), all_prunable(dense)
    seqlen = samples.shape[1]
    texts = samples[rank::world].split(max(1, ROUND // seqlen // world))
    texts = [[ids.to(model.device) for ids in text.split(tokens_at_a_time(seqlen) // seqlen)] for text in texts]
    curvature, damping, losses = curvature_of(model, layers, texts[0]), DAMPING, []
    for i in progress_bar(range(rounds), desc="global swaps", unit="round"):
        text = texts[i % len(texts)]
        with torch.no_grad():
            expected = [dense(ids).float().log_softmax(-1) for ids in text]
        before, found = output_gradients(model, layers, text, expected, divergence)
        for attempt in range(10):
            undo = {name: swap_one(layer.weight, originals[name].weight, found[name][0], *curvature[name], damping,
                                   pattern) for name, layer in layers.items()}
            with torch.no_grad():
                after = mean_loss(sum(divergence(model(ids), y) for ids, y in zip(text, expected)), text)
            if after < before:
                damping /= 1.5 if attempt == 0 else 1
                break
            for name, (at, values) in undo.items():
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
    """{layer's name: (f [out], q [in])}, as above: for tokens that the model itself draws after a text's."""
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
    """A total over the tokens of a text, divided by how many these are; both summed over all processes."""
    both = torch.tensor([total, sum(ids.numel() for ids in text)], dtype=torch.double, device=total.device)
    add_up(both)
    return (both[0] / both[1]).item()


def output_gradients(model, layers, text, expected, loss):
    """The mean of loss(logits, expected) over the tokens of a text, a list of ids [B, T], and {layer's name:
    (dL/dW [out, in], f [out], q [in])}, as above (f and q are for curvature_of)."""
    found, total = {}, torch.zeros((), device=text[0].device)

    def seen(name, x, g):
        x, g = x.flatten(0, 1), g.flatten(0, 1)  # [tokens, in], [tokens, out]
        gradient, f, q = found.get(name, (None, 0, 0))
        found[name] = add_product(gradient, g, x), f + g.float().square().sum(0), q + x.float().square().sum(0)

    with recomputed(model), watch_gradients(model.model.embed_tokens, layers, seen):
        for ids, y in zip(text, expected):
            part = loss(model(ids), y)
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
    of the same layer; f, q, damping as above, pattern as in swap_globally. Returns what undoes it: (places, values)."""
    keep = W != 0
    d = torch.where(keep, -W, dense).float()
    price = d * (gradient + damping / 2 * f[:, None] * q * d)
    m = pattern[1] if pattern else W.shape[1]
    losing, j = price.masked_fill(~keep, torch.inf).unflatten(1, (-1, m)).min(-1)  # [out, groups]
    gaining, i = price.masked_fill(keep | (d == 0), torch.inf).unflatten(1, (-1, m)).min(-1)
    change, group = (losing + gaining).min(1)
    row = (change < 0).nonzero()[:, 0]
    j, i = (x[row, group[row]] + group[row] * m for x in (j, i))
    at = torch.cat([row, row]), torch.cat([j, i])
    values = W[at]
    W[row, j], W[row, i] = 0, dense[row, i]
    return at, values
