"""AST against its formulas: mask, gradient, optimizer, schedules, loss, SLoRB."""

import math
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import ast_method
from ast_method import AnnealedAdamW, SparseLinear, decay_at, distillation_loss, learning_rate, training_loss
from dsnot import keep_mask


def layer(out=6, width=16, **options):
    torch.manual_seed(0)
    return SparseLinear(nn.Linear(width, out).double(), **options)


def test_the_gradient_at_the_masked_weight_reaches_all_of_it():
    sparse, x = layer(), torch.randn(5, 16, dtype=torch.double)
    masked = (sparse.weight * sparse.mask).detach().requires_grad_()
    F.linear(x, masked, sparse.bias).square().sum().backward()
    y = sparse(x)
    y.square().sum().backward()
    assert torch.equal(y, F.linear(x, masked, sparse.bias))
    assert torch.equal(sparse.weight.grad, masked.grad) and (sparse.weight.grad[~sparse.mask] != 0).all()


def test_the_mask_is_a_bool_buffer_that_follows_the_weight():
    sparse = layer()
    assert sparse.state_dict()["mask"].dtype == torch.bool and sparse.mask.view(-1, 4).sum(1).eq(2).all()
    assert sparse.update_mask() == (0, 0)
    before = sparse.mask.clone()
    with torch.no_grad():
        sparse.weight[0] = torch.where(sparse.mask[0], 0.0, 1.0)  # the first row turns round
    assert sparse.update_mask() == (16, 16)
    assert torch.equal(sparse.mask[0], ~before[0]) and torch.equal(sparse.mask[1:], before[1:])
    assert sparse.update_mask() == (0, 16)
    merged = sparse.merge()
    assert type(merged) is nn.Linear and torch.equal(merged.weight, sparse.weight * sparse.mask)


def transcription(W, mask, grads, lr, decay, T0, b1=0.9, b2=0.95, eps=1e-8):
    """The formula at the head of ast_method.py, one line each."""
    M, V = torch.zeros_like(W), torch.zeros_like(W)
    for step, g in enumerate(grads):
        t = step + 1
        M = b1 * M + (1 - b1) * g
        u = M / (1 - b1 ** t) + decay * min(step / T0, 1) * (~mask).double() * W
        V = b2 * V + (1 - b2) * u * u
        W = W - lr * u / ((V / (1 - b2 ** t)).sqrt() + eps)
    return W


@pytest.mark.parametrize("still, lr", [(False, 1e-2), (True, 1e-5)])
def test_the_optimizer_is_the_formula(still, lr):
    """Twenty steps; with zero gradients pruned weights only shrink and kept ones stay (a decay of the wrong sign, a
    decay inside the first moment or outside the second would show)."""
    sparse = layer()
    W, mask = sparse.weight.detach().clone(), sparse.mask.clone()
    bias = sparse.bias.detach().clone().requires_grad_()
    optimizer, plain = AnnealedAdamW(sparse, lr), torch.optim.AdamW([bias], lr, betas=(0.9, 0.95), weight_decay=0)
    grads = [torch.randn_like(W) * (not still) for _ in range(20)]
    for step, g in enumerate(grads):
        before = sparse.weight.detach().clone()
        for group in optimizer.param_groups:
            group["decay"] = decay_at(step, 0.1, 8)
        sparse.weight.grad = g.clone()
        sparse.bias.grad, bias.grad = g[:, 0].clone(), g[:, 0].clone()
        optimizer.step()
        plain.step()
        if still and step:
            assert (sparse.weight.abs() < before.abs())[~mask].all()
    assert (sparse.weight - transcription(W, mask, grads, lr, 0.1, 8)).abs().max() < 1e-6
    assert (sparse.bias - bias).abs().max() < 1e-6
    if still:
        assert torch.equal(sparse.weight[mask], W[mask])


def test_the_mean_of_the_weights_takes_their_place_and_gives_it_back():
    """Would catch a wrong mean, masks that don't fit it, and training that goes on from it."""
    torch.manual_seed(0)
    model = nn.Sequential(SparseLinear(nn.Linear(16, 8), pattern=(2, 4)), nn.Linear(8, 4))
    mean, seen = {name: W.detach().clone() for name, W in model.named_parameters()}, []
    for count in 1, 2, 3:
        with torch.no_grad():
            for W in model.parameters():
                W.add_(torch.randn_like(W))
        ast_method.add_to_mean(mean, model, count)
        seen.append({name: W.detach().clone() for name, W in model.named_parameters()})
    model[0].update_mask()
    mask = model[0].mask.clone()
    with ast_method.averaged(model, mean):
        for name, W in model.named_parameters():
            torch.testing.assert_close(W.detach(), sum(one[name] for one in seen) / 3)
        assert torch.equal(model[0].mask, keep_mask(model[0].weight.detach().abs(), pattern=(2, 4)))
        assert not torch.equal(model[0].mask, mask)
    assert all(torch.equal(W, seen[-1][name]) for name, W in model.named_parameters())
    assert torch.equal(model[0].mask, mask)
    with ast_method.averaged(model, mean, masks=False):
        assert torch.equal(model[0].mask, mask)


def test_schedules():
    assert [decay_at(step, 6e-5, 3000) for step in (0, 1500, 3000, 9000)] == [0, 3e-5, 6e-5, 6e-5]
    assert decay_at(0, 6e-5, 0) == 6e-5  # static
    rates = [learning_rate(step, 100, 1.0, 10) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1 and rates[10:] == sorted(rates[10:], reverse=True)
    assert math.isclose(rates[55], 0.55) and 0.1 < rates[99] < 0.101


class Largest(TorchDispatchMode):
    """The largest float32 tensor that is made meanwhile."""
    size = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        result = f(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor) and x.dtype == torch.float32:
                self.size = max(self.size, x.numel())
        return result


def test_the_loss_is_the_written_out_divergence(monkeypatch):
    student, teacher = (torch.randn(2, 7, 11, dtype=torch.float32) * 3 for _ in range(2))
    a, b = student.clone().requires_grad_(), student.clone().requires_grad_()
    p, q = (teacher / 2).softmax(-1), (b / 2).softmax(-1)
    written = 4 * (p * (p / q).log()).sum(-1).mean()
    loss = distillation_loss(a, teacher, 2.0)
    loss.backward()
    written.backward()
    assert (loss - written).abs() < 1e-5 and (a.grad - b.grad).abs().max() < 1e-6
    targets = torch.randint(11, (2, 7))
    task = F.cross_entropy(student.flatten(0, 1), targets.flatten())
    assert (training_loss(student, teacher, targets, 0.7, 2.0) - (0.7 * loss + 0.3 * task)).abs() < 1e-5
    assert (training_loss(student, None, targets, 0.7, 2.0) - task).abs() < 1e-6
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # needs no C++ compiler
    ast_method.compiled_mixed_loss.cache_clear()
    assert (training_loss(student, teacher, targets, 0.7, 2.0, compiled=True) - (0.7 * loss + 0.3 * task)).abs() < 1e-5
    ast_method.compiled_mixed_loss.cache_clear()
    with torch.inference_mode():
        assert (distillation_loss(student, teacher, 2.0) - loss).abs() < 1e-6
    assert torch.autograd.gradcheck(lambda x: distillation_loss(x, teacher.double(), 2.0), b.detach().double()
                                    .requires_grad_())


def test_the_loss_never_holds_all_logits_in_float32(monkeypatch):
    monkeypatch.setattr(ast_method, "CHUNK", 8)
    student, teacher = torch.randn(1, 64, 50).bfloat16().requires_grad_(), torch.randn(1, 64, 50).bfloat16()
    kept = []  # for the way back
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        loss = training_loss(student, teacher, torch.zeros(1, 64, dtype=torch.long), 0.5, 2.0)
    assert kept and all(x.dtype == torch.bfloat16 or x.numel() <= 64 for x in kept)
    with largest:
        loss.backward()
    assert largest.size <= 8 * 50 and student.grad.dtype == torch.bfloat16


def test_slorb_begins_as_the_mean_of_the_pruned_weights():
    sparse, x = layer(slorb_k=8), torch.randn(5, 16, dtype=torch.double)
    X = torch.block_diag(torch.ones(1, 8), torch.ones(1, 8)).double()  # [in/k, in]
    S = torch.stack([(sparse.weight * ~sparse.mask)[:, i:i + 8].sum(1) / 8 for i in (0, 8)], 1)
    y = x @ (sparse.weight * sparse.mask).T + (x @ X.T) @ S.T + sparse.bias
    assert (sparse(x) - y).abs().max() < 1e-12
    with torch.no_grad():
        sparse.slorb_X.uniform_(0.5, 2)
    assert (sparse.merge()(x) - sparse(x)).abs().max() < 1e-12
    sparse(x).sum().backward()
    assert sparse.slorb_S.grad.abs().min() > 0 and sparse.slorb_X.grad.abs().min() > 0
