"""Oracles for layers that differ in sparsity: what --allocate gives each of them."""

import pytest
import torch

import allocate
from data.calibration import watch
from dsnot import keep_mask, wanda_score
from gpt import GPT, all_prunable, rotary
from test_dsnot import stats_of


@pytest.mark.parametrize("kind", ["owl", "sensitivity"])
def test_allocation(monkeypatch, checkpoint, kind):
    """Would catch shares whose mean is not what was asked for, outliers counted wrongly or a block with more of them
    pruned more, and a cost that is not the damage of one layer pruned alone, which a loop over whole models computes
    here, times the growth of its error, by a mask of each share."""
    dense, windows, found = GPT.from_pretrained(checkpoint), torch.randint(0, 300, (6, 32)), []
    damage, cheapest = allocate.damage, allocate.cheapest
    monkeypatch.setattr(allocate, "damage", lambda *args: found.append(damage(*args)) or found[0])
    monkeypatch.setattr(allocate, "cheapest", lambda *args: found.append(args) or cheapest(*args))
    assert (allocate.REACH, allocate.OUTLIER) == (0.08, 5)  # as published
    monkeypatch.setattr(allocate, "OUTLIER", 2)  # a random model has none above 5 times the mean
    positions = torch.arange(32)
    with torch.inference_mode():
        shares = allocate.allocation(GPT.from_pretrained(checkpoint, stream=True),
                                  (positions, rotary(dense.config, positions)),
                                  [dense.embed(ids) for ids in windows.split(4)], 0.6, kind)
        inputs, layers = {}, all_prunable(dense)
        with watch(layers, inputs.__setitem__):
            dense(windows)
        sizes = torch.tensor([layer.weight.numel() for layer in layers.values()], dtype=torch.double)
        assert list(shares) == list(layers)
        mean = torch.tensor(list(shares.values()), dtype=torch.double) @ sizes / sizes.sum()
        assert mean.item() == pytest.approx(0.6, abs=1e-9)
        scores = {name: wanda_score(layer.weight, stats_of(inputs[name])) for name, layer in layers.items()}
        if kind == "owl":
            many = []
            for block in range(2):
                flat = torch.cat([score.flatten() for name, score in scores.items() if f"layers.{block}." in name])
                many.append((flat > 2 * flat.mean()).float().mean().item())
            first, second = (list(shares.values())[i] for i in (0, 7))
            assert many[0] != many[1]
            assert second - first == pytest.approx(0.16 if many[0] > many[1] else -0.16, abs=1e-6)
            return
        damages, (cost, grid, *_) = found
        expected = dense(windows[:4]).log_softmax(-1)
        for alone, row, (name, layer) in zip(damages, cost, layers.items(), strict=True):
            W = layer.weight.data
            layer.weight.data = torch.where(keep_mask(scores[name], sparsity=0.6), W, 0)
            got = dense(windows[:4]).log_softmax(-1)
            layer.weight.data = W
            assert alone.item() == pytest.approx((expected.exp() * (expected - got)).sum().item(), rel=1e-3, abs=1e-4)
            lost = torch.tensor([(scores[name] * ~keep_mask(scores[name], share)).square().sum().item()
                                 for share in (0.6, *grid.tolist())]).double()
            torch.testing.assert_close(row, alone * lost[1:] / lost[0], rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind, sparsity, lowest", [
    ("owl", 0.95, 0.9), ("sensitivity", 0.05, 0), ("sensitivity", 0.6, 0.44), ("sensitivity", 0.97, 0.81)])
def test_shares_have_bounds(monkeypatch, checkpoint, kind, sparsity, lowest):
    """Would catch shares below 0, above MOST, or whose mean the bounds have moved."""
    monkeypatch.setattr(allocate, "OUTLIER", 2)
    model, ids, positions = GPT.from_pretrained(checkpoint), torch.randint(0, 300, (6, 32)), torch.arange(32)
    with torch.inference_mode():
        shares = allocate.allocation(model, (positions, rotary(model.config, positions)), [model.embed(ids)],
                                  sparsity, kind)
    sizes = {name: layer.weight.numel() for name, layer in all_prunable(model).items()}
    assert sum(shares[name] * sizes[name] for name in sizes) / sum(sizes.values()) == pytest.approx(sparsity, abs=1e-6)
    assert lowest <= min(shares.values()) < sparsity < max(shares.values()) <= min(allocate.MOST, sparsity + 0.16)


@pytest.mark.parametrize("sparsity", [0.03, 0.5, 0.7, 0.97])
def test_layers_that_differ_lose_as_many_weights_as_equal_ones(sparsity):
    """Would catch a method that looks better because it prunes less: of every row a mask prunes whole weights, rounded
    down, and other shares lose other fractions by that."""
    torch.manual_seed(0)
    layers = {i: torch.nn.Linear(*shape, bias=False) for i, shape in enumerate([(64, 32), (172, 20), (64, 100)] * 30)}
    sizes = torch.tensor([layer.weight.numel() for layer in layers.values()], dtype=torch.double)
    change = (torch.rand(len(sizes)).double() - 0.5) * 0.2
    asked = (sparsity + change - change @ sizes / sizes.sum()).clamp(0, allocate.MOST)
    shares = allocate.whole_weights(dict(enumerate(asked.tolist())), layers, sparsity)
    own, equal = ([(~keep_mask(layer.weight, sparsity=amount)).sum(1).unique().item() for layer, amount in
                   zip(layers.values(), amounts)] for amounts in (shares.values(), [sparsity] * len(layers)))
    assert all(count <= allocate.MOST * layer.in_features for count, layer in zip(own, layers.values()))
    if 0.1 < sparsity < 0.89:  # else some shares are 0 or MOST
        rows = torch.tensor([layer.out_features for layer in layers.values()])
        assert abs(rows @ torch.tensor(own) - rows @ torch.tensor(equal)) <= 50  # half a weight of the last 100 rows
        for layer, count, before, share in zip(layers.values(), own, equal, asked):
            assert abs(count - before - (share - sparsity) * layer.in_features) < 2.2  # half of 100 rows on 32


@pytest.mark.parametrize("sizes, dear", [((1, 1, 1, 1), 0), ((1, 4, 1, 2), 0), ((1, 4, 1, 2), 1e30)])
def test_shares_are_the_cheapest(sizes, dear):
    """Every other choice of shares that prunes as much, of layers of several sizes, costs at least as much; also where
    one layer is dear beyond all others, because what it has pruned so far was never used."""
    grid, sizes = torch.arange(5).double() / 10, torch.tensor(sizes).double()
    cost = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)).double().cumsum(1).cumsum(1)  # convex
    cost[0, 1:] += dear
    shares = allocate.cheapest(cost, grid, sizes, 0.2)
    choices = torch.cartesian_prod(*[torch.arange(5)] * 4)
    pruned, total = grid[choices] @ sizes, shares @ sizes
    # short by no more than a step of the largest layer
    assert 0.2 * sizes.sum() - 0.1 * sizes.max() - 1e-9 < total <= 0.2 * sizes.sum() + 1e-9
    spent = cost[torch.arange(4), (shares * 10).round().long()].sum()
    assert spent <= cost[torch.arange(4), choices[pruned >= total - 1e-9]].sum(1).min() + 1e-9
