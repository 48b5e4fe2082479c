"""AST's method: layers whose mask learns with them, annealed decay, SLoRB, and the loss by which a teacher trains them.

Adaptive Sparse Trainer (Huang et al., AAAI 2025, arXiv 2407.20584). The dense weight W stays; the forward pass sees
    W~ = m * W,   m [out, in] = 1 for the two weights of every four with the highest score, chosen anew every few steps.
The gradient g at W~ is applied to all of W ("straight through"), so a pruned weight goes on learning and may come back.
A decay pulls pruned weights to zero, weak at first so that masks can still change, then strong so that they settle:
    lambda(t) = lambda * min(t / T0, 1)
    M <- b1 M + (1 - b1) g                      in step t = 1, 2, ...: the decay stays out of the first moment ...
    u  = M / (1 - b1^t) + lambda(t - 1) (1 - m) W
    V <- b2 V + (1 - b2) u^2                    ... and is inside the second
    W <- W - lr * u / (sqrt(V / (1 - b2^t)) + eps)
(g of all weights together is first cut to the norm CLIP.)
The loss is a * T^2 KL(teacher || student), both at temperature T, + (1 - a) * cross-entropy; the dense model teaches.
SLoRB adds a few dense parameters, y = x W~^T + (x X^T) S^T: X [in/k, in] sums k neighbouring inputs, S [out, in/k]
begins as the mean of k neighbours of (1 - m) W. X is trained where it isn't zero and kept as a vector [in], so x X^T
stays a grouped sum. In training it is merged into the weight, W~ + (S, each column repeated k times) * X, for one
product a layer; that sum is dense, so a finished model keeps the two apart and W~ sparse.

Where we differ from the authors' code, and why. Their GPT-2 code negates an integer mask with `~` (1 becomes -2, 0
becomes -1), so its decay makes weights grow: our mask is a bool. It divides the decay, too, by 1 - b1^t, which is 1
after a few dozen steps: ours follows the formula. It keeps the mask as an attribute of a Parameter, which checkpoints
lose: ours is a buffer. It trains all of X, a dense matrix. It makes V from an M that is not divided by 1 - b1^t, which
lengthens the first steps up to 10 times, and shrinks all matrices by a weight decay of 0.1. As there, weights without a
mask take plain Adam steps; V is the mean of u^2, not of g^2, so where g is mostly noise, weights that have a mask take
steps up to 4.4 times as long.

Shapes: a weight W and its mask m are [out, in]; N tokens, in windows [B, tokens].
"""

import functools
import math
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from data.processes import processes
from masks import keep_mask, magnitude_score

BETAS, CLIP = (0.9, 0.95), 1.0  # of Adam; the largest norm of a step's gradient
CHUNK = 512  # tokens whose logits are float32 at a time


def learning_rate(step: int, steps: int, peak: float, warmup: int, end: float = 0.1) -> float:
    """Linear warm-up to `peak`, then half a cosine down to `end * peak`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (end + (1 - end) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def decay_at(step: int, decay: float, warmup_steps: int) -> float:
    """lambda(t): grows linearly to `decay` over `warmup_steps` steps and stays there; 0 steps: static decay."""
    return decay * min(step / warmup_steps, 1.0) if warmup_steps else decay


class StraightThrough(torch.autograd.Function):
    """m * W whose gradient reaches all of W."""

    @staticmethod
    def forward(ctx, W, mask):
        return W * mask

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def whole(tensor):
    """All of a tensor that may be spread over processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def mine(tensor):
    """The part of it that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class SparseLinear(nn.Linear):
    """A linear layer that trains W [out, in] and computes with m * W; `mask` (bool, True = keep) is a buffer.

    score: W -> what keep_mask ranks; amount: its sparsity=... or pattern=(n, m), 2:4 if neither is given. slorb_k: k of
    SLoRB, which divides the inputs; None: without. Raises InputError where a pattern's m does not divide them."""

    def __init__(self, linear, score=magnitude_score, slorb_k=None, **amount):
        assert not (linear.in_features % (slorb_k or 1) or hasattr(linear, "slorb_S")), (linear, slorb_k)
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.score, self.slorb_k, self.amount = score, slorb_k, amount or dict(pattern=(2, 4))
        W = linear.weight.detach()
        self.register_buffer("mask", keep_mask(score(W), **self.amount))
        self.first_mask = self.counted(self.mask).to("cpu", copy=True)  # to count flips
        if slorb_k:
            S = (W * ~self.mask).unflatten(1, (-1, slorb_k)).mean(-1)  # kept weights count as 0
            self.slorb_S, self.slorb_X = nn.Parameter(S), nn.Parameter(W.new_ones(W.shape[1]))

    def forward(self, x):
        return F.linear(x, self.effective(), self.bias)

    def effective(self):
        """The weight that the layer computes with, [out, in]: m * W, and SLoRB's S X where there is one."""
        W = StraightThrough.apply(self.weight, self.mask)
        if not self.slorb_k:
            return W
        return W + (self.slorb_S[:, :, None] * self.slorb_X.view(-1, self.slorb_k)).flatten(1)

    @torch.no_grad()
    def update_mask(self) -> tuple[int, int]:
        """Choose the mask again; returns how many of its entries changed (since the last time, since the first), of the
        rows whose flips this process counts."""
        new = keep_mask(self.score(whole(self.weight)), **self.amount)
        earlier = self.counted(self.mask), self.first_mask.to(new.device)
        flips = [(self.counted(new) != before).count_nonzero().item() for before in earlier]
        self.mask.copy_(new)
        return tuple(flips)

    @staticmethod
    def counted(mask):
        """The rows of a mask whose flips this process counts: of the first masks it keeps no more."""
        rank, world = processes()
        return mask.tensor_split(world)[rank]

    def pruned(self):
        """(not mask), the rows that belong to this process's part of W."""
        if isinstance(self.weight, DTensor):
            place = self.weight.device_mesh, self.weight.placements
            return ~mine(distribute_tensor(self.mask, *place, src_data_rank=None))
        return ~self.mask

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A plain nn.Linear that computes the same: sparse, or dense if there is SLoRB to merge."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.effective())
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.clone())
        return linear


def sparse_layers(model):
    """{name: layer} of a model's SparseLinear layers."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, SparseLinear)}


class AnnealedAdamW(torch.optim.AdamW):
    """AdamW, and for the weights of SparseLinear layers the update at the head of this file. Their group's `decay` is
    lambda(t), to be set before each step as the learning rate is."""

    def __init__(self, model, lr):
        self.layer_of = {layer.weight: layer for layer in sparse_layers(model).values()}
        rest = [p for p in model.parameters() if p not in self.layer_of]
        groups = [dict(params=list(self.layer_of), betas=(0.0, BETAS[1]), first_beta=BETAS[0], decay=0.0),
                  dict(params=rest)]
        super().__init__([g for g in groups if g["params"]], lr=lr, betas=BETAS, weight_decay=0.0, fused=True)
        self._step_supports_amp_scaling = False  # u is made before the fused update: a GradScaler has to come first

    def _init_group(self, group, params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps):
        """Here Adam collects what it will update. Of a sparse weight it is handed u in place of the gradient and of the
        first moment (with beta 0 the mean of both is u); M, the first moment in its state, is updated here."""
        has_complex = super()._init_group(group, params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps)
        if "first_beta" in group:
            for i, (W, grad, moment, t) in enumerate(zip(params, grads, exp_avgs, state_steps)):
                u, M = mine(grad), mine(moment)
                M.lerp_(u, 1 - group["first_beta"])
                torch.div(M, 1 - group["first_beta"] ** (t + 1), out=u)  # the gradient's memory now holds u
                u.add_(mine(W) * self.layer_of[W].pruned(), alpha=group["decay"])
                exp_avgs[i] = grad
        return has_complex


def add_to_mean(mean, model, count):
    """Update a running mean {name: tensor}, in place, by a model's weights, the count-th that it takes."""
    for name, W in model.named_parameters():
        mean[name].lerp_(W.detach(), 1 / count)


@contextmanager
def averaged(model, mean, masks=True):
    """Inside, `model` has the weights of `mean`, which holds the model's own, and with `masks` the masks that fit them.
    Both come back at the end, but not after an error."""
    layers = sparse_layers(model).values() if masks else []
    before = [layer.mask.clone() for layer in layers]
    exchange(model, mean)
    for layer in layers:
        layer.update_mask()
    yield
    exchange(model, mean)
    for layer, mask in zip(layers, before):
        layer.mask.copy_(mask)


@torch.no_grad()
def exchange(model, tensors):
    """Exchange the values of a model's weights and of tensors {name: tensor}, in place, a weight at a time."""
    if isinstance(model, FSDPModule):
        model.reshard()  # a forward pass leaves the outermost weights whole
    for name, W in model.named_parameters():
        old = W.clone()
        W.copy_(tensors[name])
        tensors[name].copy_(old)


def by_chunks(f, logits, *others):
    """The sum of f(logits [N, vocab], *others [N, ...]) over chunks of tokens; f gets logits in float32 or better. What
    it makes of a chunk is freed before the next one, and computed again in the backward pass."""
    chunks = zip(*(x.split(CHUNK) for x in (logits, *others)), strict=True)
    return sum(checkpoint(lambda chunk, *rest: f(at_least_float32(chunk), *rest), *chunk, use_reentrant=False,
                          preserve_rng_state=False) for chunk in chunks)  # nothing in f is random


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def kl(student, teacher, temperature):
    """T^2 KL(teacher || student), summed over tokens; logits [N, vocab]."""
    student, teacher = (F.log_softmax(at_least_float32(x) / temperature, -1) for x in (student, teacher))
    return temperature ** 2 * F.kl_div(student, teacher, reduction="sum", log_target=True)


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of logits [..., vocab], averaged over tokens -> scalar; little memory beside them.
    (`training_loss` has cross-entropy, too.)"""
    student, teacher = student_logits.flatten(0, -2), teacher_logits.flatten(0, -2)
    return by_chunks(functools.partial(kl, temperature=temperature), student, teacher) / len(student)


def mixed_loss(student, target, teacher, kl_weight, temperature):
    """a * distillation + (1 - a) * cross-entropy, summed over tokens; logits [N, vocab], targets [N]."""
    loss = kl_weight * kl(student, teacher, temperature)
    if kl_weight < 1:
        loss = loss + (1 - kl_weight) * F.cross_entropy(student, target, reduction="sum")
    return loss


@functools.cache
def compiled_mixed_loss():
    return torch.compile(mixed_loss)  # this alone takes seconds


def training_loss(student_logits, teacher_logits, targets, kl_weight=0.0, temperature=1.0, compiled=False):
    """a * distillation + (1 - a) * cross-entropy, averaged over tokens; logits [B, tokens, vocab], targets [B, tokens].
    Without a teacher (None) the cross-entropy alone."""
    student, target = student_logits.flatten(0, 1), targets.flatten()
    if teacher_logits is None:
        return by_chunks(functools.partial(F.cross_entropy, reduction="sum"), student, target) / len(target)
    mixed = functools.partial(compiled_mixed_loss() if compiled else mixed_loss, kl_weight=kl_weight,
                              temperature=temperature)
    return by_chunks(mixed, student, target, teacher_logits.flatten(0, 1)) / len(target)
