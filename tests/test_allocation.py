"""Oracles for layers that differ in sparsity: what --allocate gives each of them."""

import pytest
import torch

import dsnot
from data.calibration import watch
from dsnot import InputStats, keep_mask, wanda_score


@pytest.mark.parametrize("kind", ["owl", "sensitivity"])
def test_allocation(monkeypatch, checkpoint, kind):
    """Would catch shares whose mean is not what was asked for, outliers counted wrongly, and a damage that is not that
    of one layer pruned alone, which a loop over whole models computes here."""
    dense, windows, found = dsnot.GPT.from_pretrained(checkpoint), torch.randint(0, 300, (6, 32)), []
    real = dsnot.damage
    monkeypatch.setattr(dsnot, "damage", lambda *args: found.append(real(*args)) or found[0])
    positions = torch.arange(32)
    with torch.inference_mode():
        shares = dsnot.allocation(dsnot.GPT.from_pretrained(checkpoint, stream=True),
                                  (dsnot.rotary(dense.config, positions), positions),
                                  [dense.embed(ids) for ids in windows.split(4)], 0.6, kind)
        inputs, layers = {}, dsnot.all_prunable(dense)
        with watch(layers, inputs.__setitem__):
            dense(windows)
        stats = {}
        for name, x in inputs.items():
            stats[name] = InputStats(x.shape[-1])
            for sequence in x:
                stats[name].add(sequence)
        sizes = torch.tensor([layer.weight.numel() for layer in layers.values()], dtype=torch.double)
        assert list(shares) == list(layers)
        mean = torch.tensor(list(shares.values()), dtype=torch.double) @ sizes / sizes.sum()
        assert mean.item() == pytest.approx(0.6, abs=1e-9)
        scores = {name: wanda_score(layer.weight, stats[name]) for name, layer in layers.items()}
        if kind == "owl":
            many = []
            for block in range(2):
                flat = torch.cat([score.flatten() for name, score in scores.items() if f"layers.{block}." in name])
                many.append((flat > 5 * flat.mean()).float().mean().item())
            first, second = (list(shares.values())[i] for i in (0, 7))
            apart = 0.16 if many[0] > many[1] else -0.16 if many[0] < many[1] else 0
            assert second - first == pytest.approx(apart, abs=1e-6)
            return
        expected = dense(windows[:4]).log_softmax(-1)
        for name, layer in layers.items():
            W = layer.weight.data
            layer.weight.data = torch.where(keep_mask(scores[name], sparsity=0.6), W, 0)
            got = dense(windows[:4]).log_softmax(-1)
            layer.weight.data = W
            damage = (expected.exp() * (expected - got)).sum().item()
            assert found[0][list(layers).index(name)].item() == pytest.approx(damage, rel=1e-3, abs=1e-4)


def test_shares_are_the_cheapest():
    """Every other choice of shares that prunes as much costs at least as much."""
    generator = torch.Generator().manual_seed(0)
    grid, sizes = torch.arange(5).double() / 10, torch.ones(4).double()
    cost = torch.rand(4, 5, generator=generator).double().cumsum(1).cumsum(1)  # convex, as errors are
    shares = dsnot.cheapest(cost, grid, sizes, 0.2)
    index = (shares * 10).round().long()
    choices = torch.cartesian_prod(*[torch.arange(5)] * 4)
    same = choices[choices.sum(1) == index.sum()]
    assert index.sum() <= 8 and index.sum() >= 7
    assert cost[torch.arange(4), index].sum() <= cost[torch.arange(4), same].sum(1).min() + 1e-9
