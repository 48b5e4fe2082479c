"""What the layers of a model see when calibration text flows through it, block by block.

The text is a list `hidden` of hidden states [sequences, tokens, C]. A step (a block, or half of one) is called with
each of them; while it runs, `watch` sees the input of every linear layer, which `InputStats` sum up.
"""

from contextlib import contextmanager, suppress
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from data.device import free_memory
from data.processes import add_up


class InputStats:
    """What a linear layer's inputs x look like, in float32, over N calibration sequences, [in] each:
        sum       s_k, the mean over sequences of the sum of x_k over a sequence's tokens
        square    q_k, the same of x_k^2: ||x_k||^2 but for a factor that all inputs share
        variance  v_k, the mean over sequences of the (biased) variance of x_k inside the sequence
    and on demand
        gram   [in, in]   the sum of x x^T over all tokens
        cross  [in, in]   if z is given, the sum of z x^T; z: what the layer gets in the dense model
        lack   [out, in]  if d is given, the sum of d x^T; d: the dense model's hidden state less the one that is there,
                          to which the layer's output is added"""

    def __init__(self, in_features: int, gram: bool = False):
        self.sequences, self.with_gram, self.gram, self.cross, self.lack = 0, gram, None, None, None
        self._sums = torch.zeros(3, in_features)  # of sum, square and variance over sequences

    @torch.no_grad()
    def add(self, x: Tensor, z: Tensor | None = None, d: Tensor | None = None):
        """One calibration sequence: x, z [tokens, in], d [tokens, out]. The sums are kept on their device."""
        assert x.ndim == 2, f"one sequence [tokens, in] at a time, not {tuple(x.shape)}"
        exact = x.float()
        self.sequences += 1
        one = torch.stack([exact.sum(0), exact.square().sum(0), exact.var(0, unbiased=False)])
        self._sums = self._sums.to(x.device) + one
        if self.with_gram:
            self.gram = add_product(self.gram, x, x)
        if z is not None:
            self.cross = add_product(self.cross, z, x)
        if d is not None:
            self.lack = add_product(self.lack, d, x)

    def all_reduce(self):
        """Add up what all processes have seen."""
        count = torch.tensor(self.sequences, device=self._sums.device)
        for tensor in (count, self._sums, self.gram, self.cross, self.lack):
            if tensor is not None:
                add_up(tensor)
        self.sequences = count.item()

    def _mean(self, i):
        assert self.sequences, "no calibration sequence has reached this layer"
        return self._sums[i] / self.sequences

    sum = property(lambda self: self._mean(0))
    square = property(lambda self: self._mean(1))
    variance = property(lambda self: self._mean(2))


def add_product(total, a, b):
    """total (None: zeros) + a^T b of a, b [tokens, ...], in float32. An NVIDIA GPU multiplies 16-bit numbers as they
    are: the products are as exact, the sums are float32 there, too, and it takes a fraction of the time."""
    if a.is_cuda and a.dtype == b.dtype and b.dtype in (torch.float16, torch.bfloat16) and not torch.version.hip:
        product = torch.mm(a.T, b, out_dtype=torch.float32)
        return product if total is None else total.add_(product)
    return a.float().T @ b.float() if total is None else total.addmm_(a.float().T, b.float())


@contextmanager
def held(hooks):
    """Inside, PyTorch's hooks are in place."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def watch(linears, seen):
    """While it is open, `seen(name, x)` is called for the input x [sequences, tokens, in] of each layer."""
    return held([layer.register_forward_pre_hook(lambda _, inputs, name=name: seen(name, inputs[0]))
                 for name, layer in linears.items()])


def watch_gradients(embedding, linears, seen):
    """While it is open, a backward pass calls `seen(name, x, g)` for the input x [B, T, in] of each layer and the
    gradient g [B, T, out] at its output; no parameter has to require one. embedding: the module where the text enters.
    """
    def hook_for(name):
        def hook(_, inputs, output):
            output.register_hook(lambda g: seen(name, inputs[0], g))
        return hook
    hooks = [layer.register_forward_hook(hook_for(name)) for name, layer in linears.items()]
    return held([*hooks, embedding.register_forward_hook(lambda _, inputs, x: x.requires_grad_())])


def divergence(logits, expected):
    """KL(expected || what logits [B, T, V] say), summed over tokens; expected: log-probabilities."""
    return F.kl_div(logits.float().log_softmax(-1), expected, reduction="sum", log_target=True)


def steps(block, positions, rope, halves=False):
    """A block as one function of x [sequences, tokens, C], or as its two halves; x comes and goes where it lives."""
    def on_its_way(function):
        return lambda x: function(x.to(positions.device)).to(x.device)
    if halves:
        return [on_its_way(partial(block.attend, positions=positions, rope=rope)), on_its_way(block.transform)]
    return [on_its_way(partial(block, positions=positions, rope=rope))]


class Enough(Exception):
    """All inputs have been seen; the rest of the pass is left out, which with --propagate saves a third of the time."""


def inputs_of(step, x, linears):
    """{name: its input} of linear layers, in the order in which a step calls them for x; what comes after the last one
    is not computed."""
    inputs = {}

    def seen(name, tensor):
        inputs[name] = tensor
        if len(inputs) == len(linears):
            raise Enough
    with watch(linears, seen), suppress(Enough):
        step(x)
    return inputs


def readers(step, x, linears):
    """The linear layers that a step calls, in order, those that read the same tensor (q, k, v; gate, up) together."""
    together = {}
    for name, tensor in inputs_of(step, x, linears).items():
        together.setdefault(id(tensor), []).append(name)
    return list(together.values())


def input_stats(step, hidden, linears, groups, gram=False, teacher=None, adds=False):
    """{name: InputStats} of some groups of linear layers of a step that is called with each [sequences, tokens, C] of
    `hidden`, over all processes. teacher: (step, hidden, linears) of the dense model, to know what they get there;
    adds: their output is added to `hidden` and is to make up for what that lacks."""
    stats = {group[0]: InputStats(linears[group[0]].in_features, gram) for group in groups}
    dense_step, dense, dense_linears = teacher or (None, None, None)
    for i, x in enumerate(hidden):
        nothing, targets = [None] * len(x), {}
        inputs = inputs_of(step, x, {name: linears[name] for name in stats})
        if teacher:
            targets = inputs_of(dense_step, dense[i], {name: dense_linears[name] for name in stats})
        for name, one in stats.items():
            lack = (dense[i].float() - x.float()).to(inputs[name].device) if adds else nothing
            for sequence in zip(inputs[name], targets.get(name, nothing), lack):
                one.add(*sequence)
    for one in stats.values():
        one.all_reduce()
    return {name: stats[group[0]] for group in groups for name in group}


def move(step, hidden):
    """hidden <- step(hidden), one batch at a time, so that little more than one copy exists."""
    for i, x in enumerate(hidden):
        hidden[i] = step(x)


def place_for(config, states, device, dtype):
    """Where so many hidden states fit beside everything else: on the device if they take less than half of what is
    free there, else in the computer's memory."""
    need = states * config.hidden_size * dtype.itemsize
    return device if need < free_memory(device) / 2 else "cpu"
