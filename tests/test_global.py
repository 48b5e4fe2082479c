"""Swaps by the output of the whole model: their pieces against autograd and slow loops, and the command."""

import copy
import gc
import itertools
import json
import math
import shutil
import weakref

import pytest
import torch
import torch.nn.functional as F

import global_swaps
import walk
from conftest import make_checkpoint
from data.calibration import divergence
from data.command import InputError
from data.writer import alone_in
from global_swaps import swap_globally
from gpt import GPT, all_prunable
from masks import keep_mask
from test_gpt import ALL, ids_for, theirs
from test_prune import command, tensors


@pytest.fixture
def pair(tmp_path):
    """A pruned model, its dense self, ids."""
    torch.manual_seed(0)
    make_checkpoint(tmp_path / "m")
    dense, pruned = (GPT.from_pretrained(tmp_path / "m") for _ in range(2))
    for layer in all_prunable(pruned).values():
        W = layer.weight.data
        W *= keep_mask(torch.rand_like(W), pattern=(2, 4))
    return pruned, dense, torch.randint(0, 64, (12, 16))


def test_gradients(pair):
    """dL/dW, f and q of every layer against autograd, whole and in parts; would catch a sum that is no mean, hooks on
    the wrong layer, and hooks that stay."""
    pruned, dense, ids = pair
    layers, seen, outputs = all_prunable(pruned), {}, {}
    expected = dense(ids).log_softmax(-1).detach()
    loss, found = global_swaps.output_gradients(pruned, layers, ids.split(5), expected.split(5), divergence)
    for name, layer in layers.items():
        def keep(_, inputs, y, name=name):
            seen[name], outputs[name] = inputs[0], y
        layer.register_forward_hook(keep)
    pruned.requires_grad_(True)
    whole = F.kl_div(pruned(ids).log_softmax(-1), expected, reduction="sum", log_target=True) / ids.numel()
    assert math.isclose(loss, whole.item(), rel_tol=1e-5) and loss > 0
    at_outputs = torch.autograd.grad(whole, list(outputs.values()), retain_graph=True)
    for (name, layer), g in zip(layers.items(), at_outputs):
        (W,) = torch.autograd.grad(whole, layer.weight, retain_graph=True)
        f = (g * ids.numel()).square().flatten(0, 1).mean(0)
        for ours, exact in zip(found[name], (W, f, seen[name].square().flatten(0, 1).mean(0))):
            torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_one_swap(pattern):
    """Against a loop over all pairs; would catch a pair of two groups or rows, a sign, what can't be undone, and a swap
    that promises nothing."""
    torch.manual_seed(1)
    dense, gradient, f, q = torch.randn(6, 16), torch.randn(6, 16), torch.rand(6), torch.rand(16)
    gradient[5] = 0  # no swap helps here
    keep = keep_mask(torch.rand(6, 16), pattern=(2, 4))
    W = torch.where(keep, torch.randn(6, 16), 0)
    before, want = W.clone(), W.clone()
    for r in range(6):
        best = (0.0, None, None)
        for p, g in itertools.product(keep[r].nonzero()[:, 0].tolist(), (~keep[r]).nonzero()[:, 0].tolist()):
            change = sum(d * gradient[r, k] + 3.0 / 2 * f[r] * q[k] * d ** 2
                         for k, d in ((p, -W[r, p]), (g, dense[r, g]))).item()
            if (pattern is None or p // 4 == g // 4) and change < best[0]:
                best = change, p, g
        assert (best[1] is None) == (r == 5)
        if best[1] is not None:
            want[r, best[1]], want[r, best[2]] = 0, dense[r, best[2]]
    at, values = global_swaps.swap_one(W, dense, gradient, f, q, 3.0, pattern)
    assert torch.equal(W, want) and not torch.equal(W, before)
    W[at] = values
    assert torch.equal(W, before)


def test_the_loss_falls_and_masks_keep_their_size(pair):
    """On text of its own, round by round; would catch swaps that harm, a broken 2:4 and values that nobody has."""
    pruned, dense, ids = pair
    before = {name: layer.weight.clone() for name, layer in all_prunable(pruned).items()}
    losses = swap_globally(pruned, dense, ids, 5, (2, 4))
    assert len(losses) == 5 and losses[-1][1] < losses[0][0]
    assert all(after < begin for begin, after in losses)
    for (name, layer), known in zip(all_prunable(pruned).items(), all_prunable(dense).values()):
        assert ((layer.weight != 0).unflatten(1, (-1, 4)).sum(-1) == 2).all()
        assert ((layer.weight == 0) | (layer.weight == known.weight)).all()
        assert not torch.equal(layer.weight, before[name])


def test_swaps_that_harm_are_taken_back(pair, monkeypatch):
    """Bit for bit, however often they are tried."""
    pruned, dense, ids = pair
    before = {name: layer.weight.clone() for name, layer in all_prunable(pruned).items()}
    swap, tried = global_swaps.swap_one, []

    def wrong(W, dense, gradient, f, q, damping, pattern):
        tried.append(damping)
        return swap(W, dense, -gradient, 0 * f, q, damping, pattern)
    monkeypatch.setattr(global_swaps, "swap_one", wrong)
    losses = swap_globally(pruned, dense, ids, 1, (2, 4))
    assert losses[0][0] == losses[0][1] and len(set(tried)) == 10
    assert all(torch.equal(layer.weight, before[name]) for name, layer in all_prunable(pruned).items())


@pytest.mark.parametrize("family, changes", ALL)
def test_every_family(family, changes, tmp_path):
    """Learned positions, tied heads, biases, norms behind a layer: the loss falls wherever the text enters."""
    theirs(family, changes).save_pretrained(tmp_path)
    dense, pruned = (GPT.from_pretrained(tmp_path) for _ in range(2))
    for layer in all_prunable(pruned).values():
        layer.weight.data *= keep_mask(layer.weight.abs(), sparsity=0.5)
    before = {name: (layer.weight != 0).sum(1) for name, layer in all_prunable(pruned).items()}
    losses = swap_globally(pruned, dense, ids_for(batch=6), 4)
    assert losses[-1][1] < losses[0][0]
    assert all(torch.equal(before[name], (layer.weight != 0).sum(1)) for name, layer in all_prunable(pruned).items())


@pytest.mark.parametrize("options", [("--pattern", "2:4", "--refine", "swap"), ("--sparsity", "0.6", "--refit"),
                                     ("--sparsity", "0.5", "--refine", "none")])
def test_command(monkeypatch, capsys, model, tmp_path, options):
    """Masks of the same size as without global swaps, another output, a table that names them, no folder left; a run
    that was stopped in between goes on from its blocks, and one that is finished is only measured."""
    command(monkeypatch, model, tmp_path / "local", *options)
    whole = swap_globally

    def stopped(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(walk, "swap_globally", stopped)
    words = *options, "--compare", "--global-swaps", "3", "--json", str(tmp_path / "r.json")
    with pytest.raises(SystemExit):
        command(monkeypatch, model, tmp_path / "out", *words)
    assert (tmp_path / "out.blocks" / "config.json").exists() and not (tmp_path / "out").exists()
    monkeypatch.setattr(walk, "swap_globally", whole)
    command(monkeypatch, model, tmp_path / "at-once", *words)
    capsys.readouterr()
    command(monkeypatch, model, tmp_path / "out", *words)
    assert "out.blocks is finished\n" in capsys.readouterr().out
    local, ours, at_once = (tensors(tmp_path / name) for name in ("local", "out", "at-once"))
    assert all(torch.equal(W, at_once[name]) for name, W in ours.items())
    assert local.keys() == ours.keys() and any(not torch.equal(W, ours[name]) for name, W in local.items())
    for name, W in local.items():
        assert torch.equal((W != 0).sum(1), (ours[name] != 0).sum(1)) if "proj" in name else torch.equal(W, ours[name])
    noted = json.loads((tmp_path / "out" / "pruning.json").read_text())
    first, last = noted["losses"][0][0], noted["losses"][-1][1]
    assert len(noted["losses"]) == 3 and last < first
    rows = json.loads((tmp_path / "r.json").read_text())["results"]["rows"]
    assert rows[-1]["method"].endswith(" + global") and len(rows) == 3 and not (tmp_path / "out.blocks").exists()
    monkeypatch.setattr(walk, "swap_globally", stopped)
    command(monkeypatch, model, tmp_path / "out", *words)
    assert json.loads((tmp_path / "r.json").read_text())["results"]["rows"] == rows


def test_the_folders_of_a_run(monkeypatch, capsys, model, tmp_path):
    """Would catch a second run that takes the first one's place while weights are swapped, blocks that a run killed at
    its end leaves behind, and a finished run of the user's that is taken for such blocks."""
    whole, removed, words = swap_globally, walk.remove, ("--refine", "none", "--global-swaps", "1")

    def locked(*args):
        with pytest.raises(InputError, match="another run is writing"), alone_in(tmp_path / "out.partial"):
            pass
        return whole(*args)

    def killed(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(walk, "swap_globally", locked)
    monkeypatch.setattr(walk, "remove", killed)
    with pytest.raises(SystemExit):
        command(monkeypatch, model, tmp_path / "out", *words)
    assert (tmp_path / "out").exists() and (tmp_path / "out.blocks").exists()
    monkeypatch.setattr(walk, "remove", removed)
    shutil.copytree(tmp_path / "out.blocks", tmp_path / "half")
    command(monkeypatch, model, tmp_path / "out", *words)
    (tmp_path / "half").rename(tmp_path / ".out.blocks.gone")  # killed while they were removed
    command(monkeypatch, model, tmp_path / "out", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    command(monkeypatch, model, tmp_path / "mine.blocks", "--refine", "none")
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, model, tmp_path / "mine", *words)
    error = capsys.readouterr().err
    assert end.value.code == 2 and "mine.blocks holds a finished run, which differs in blocks_of" in error


def test_nothing_is_held_afterwards(pair):
    """Would catch weights of gigabytes that wait for the garbage collector, and a gradient that nobody asked for."""
    (_, dense, ids), pruned = pair, copy.deepcopy(pair[0])
    gc.disable()
    try:
        swap_globally(pruned, dense, ids, 1, (2, 4))
        weight = weakref.ref(pruned.model.layers[0].mlp.up_proj.weight)
        assert all(W.requires_grad and W.grad is None for W in pruned.parameters())
        del pruned
        assert weight() is None
    finally:
        gc.enable()


def test_the_model_is_left_as_it_was(pair):
    """After an error, too: else each later pass would compute its blocks twice."""
    (pruned, dense, ids) = pair
    pruned = copy.deepcopy(pruned)
    with pytest.raises(RuntimeError), torch.inference_mode():
        swap_globally(pruned, dense, ids, 1, (2, 3))
    assert not any("forward" in vars(block) for block in pruned.blocks())
    with torch.inference_mode():  # as without
        found = swap_globally(pruned, dense, ids, 1, (2, 4))
    assert found[0][1] < found[0][0]
    pruned(ids).sum().backward()
    assert pruned.block(0).mlp.up_proj.weight.grad is not None
    streamed = copy.deepcopy(pruned)
    streamed.streams = True
    for models in (streamed, dense), (pruned, streamed):
        with pytest.raises(InputError, match="load them without stream=True"):
            swap_globally(*models, ids, 1)


def test_memory_is_asked_for_first(monkeypatch, capsys, model, tmp_path):
    monkeypatch.setattr("data.processes.free_memory", lambda _: 10**6)
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, model, tmp_path / "out", "--global-swaps", "3")
    error = capsys.readouterr().err
    assert end.value.code == 2 and "--global-swaps needs" in error and "and 1.00 MB are free on cpu" in error
    assert not list(tmp_path.iterdir())


def test_gradients_and_losses_are_means_over_all_processes(pair, monkeypatch):
    """Would catch processes that swap by what each has read: as if another one had read the same text."""
    pruned, dense, ids = pair
    expected = dense(ids).log_softmax(-1).detach()
    args = pruned, all_prunable(pruned), ids.split(5), expected.split(5), divergence
    alone, found = global_swaps.output_gradients(*args)
    with monkeypatch.context() as patch:
        patch.setattr(global_swaps, "add_up", lambda x: x.mul_(2))
        beside, twice = global_swaps.output_gradients(*args)
    assert beside == pytest.approx(alone)
    for name, sums in found.items():
        for one, other in zip(sums, twice[name]):
            torch.testing.assert_close(one, other)
    monkeypatch.setattr(global_swaps, "add_up", lambda x: x.add_(torch.tensor([10.0, 5.0])))
    assert global_swaps.mean_loss(torch.tensor(2.0), [ids[0, :3]]) == pytest.approx(12 / 8)


def test_other_processes_draw_other_tokens(pair, monkeypatch):
    pruned, _, ids = pair
    found = []
    for rank in 0, 1:
        torch.manual_seed(3)
        monkeypatch.setattr(global_swaps, "processes", lambda: (rank, 2))
        found.append(global_swaps.curvature_of(pruned, all_prunable(pruned), [ids])["model.layers.0.mlp.up_proj"])
    assert torch.equal(found[0][1], found[1][1]) and not torch.equal(found[0][0], found[1][0])


def test_rounds_read_texts_by_turns_and_curvature_the_models_own_tokens(pair, monkeypatch):
    """Would catch swaps that suit a single text, and the curvature of the text or of the likeliest tokens."""
    pruned, dense, ids = pair
    read, real = [], global_swaps.output_gradients
    monkeypatch.setattr(global_swaps, "output_gradients", lambda model, layers, text, expected, loss: (
        read.append((text, expected)), real(model, layers, text, expected, loss))[1])
    monkeypatch.setattr(global_swaps, "ROUND", 64)
    torch.manual_seed(5)
    with torch.no_grad():
        logits = pruned(ids[:4])
    drawn = torch.distributions.Categorical(logits=logits).sample()
    torch.manual_seed(5)
    swap_globally(copy.deepcopy(pruned), dense, ids, 4, (2, 4))
    assert [torch.cat(text).tolist() for text, _ in read] == [ids[a:a + 4].tolist() for a in (0, 0, 4, 8, 0)]
    assert torch.equal(torch.cat(read[0][1]), drawn) and not torch.equal(drawn, logits.argmax(-1))
    read.clear()
    monkeypatch.setattr(global_swaps, "processes", lambda: (1, 2))
    swap_globally(pruned, dense, ids, 3, (2, 4))
    assert [torch.cat(text).tolist() for text, _ in read[1:]] == [ids[1::2][a:a + 2].tolist() for a in (0, 2, 4)]


def test_damping_falls_while_all_swaps_help(pair, monkeypatch):
    """Would catch rounds that go on as carefully as the first."""
    tried, swap = [], global_swaps.swap_one
    monkeypatch.setattr(global_swaps, "swap_one", lambda *args: tried.append(args[5]) or swap(*args))
    swap_globally(*pair, 3, (2, 4))
    assert list(dict.fromkeys(tried)) == pytest.approx([16, 16 / 1.5, 16 / 1.5 ** 2])


def test_a_weight_that_was_zero_does_not_come_back():
    """Would catch a row that loses weights because the dense model has zeros of its own."""
    torch.manual_seed(1)
    dense, gradient, f, q = torch.randn(6, 16), torch.randn(6, 16), torch.rand(6), torch.rand(16)
    keep = keep_mask(torch.rand(6, 16), pattern=(2, 4))
    dense[~keep & (torch.rand(6, 16) < 0.7)] = 0
    W = torch.where(keep, dense, 0)
    global_swaps.swap_one(W, dense, gradient, f, q, 0.1, None)
    assert ((W != 0).sum(1) == 8).all() and not torch.equal(W != 0, keep)


def test_what_global_swaps_write(monkeypatch, model, tmp_path):
    """Dtypes as they were, and a record of what is pruned; would catch a checkpoint of twice the size."""
    half = GPT.from_pretrained(model / "m").to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half", tokenizer_from=model / "m")
    command(monkeypatch, model, tmp_path / "out", "--model", str(tmp_path / "half"), "--sparsity", "0.5", "--refine",
            "none", "--global-swaps", "1")
    before, after = tensors(tmp_path / "half"), tensors(tmp_path / "out")
    assert {name: W.dtype for name, W in after.items()} == {name: W.dtype for name, W in before.items()}
    layers = json.loads((tmp_path / "out" / "pruning.json").read_text())["layers"]
    assert len(layers) == 14
    for one in layers:
        W = after[one["layer"] + ".weight"]
        assert one == dict(layer=one["layer"], weights=W.numel(), sparsity=(W == 0).double().mean().item())


def test_what_global_swaps_are_given(monkeypatch, model, tmp_path):
    """Would catch swaps out of a pattern's groups, and the time of the blocks forgotten."""
    given, noted = [], walk.noted
    monkeypatch.setattr(walk, "swap_globally", lambda *args: given.append(args[3:]) or [])
    monkeypatch.setattr(walk, "noted", lambda file: noted(file) | dict(
        {"seconds": 1000.0} if file.parent.name == "out.blocks" else {}))
    command(monkeypatch, model, tmp_path / "out", "--pattern", "2:4", "--refine", "none", "--global-swaps", "2")
    assert given == [(2, (2, 4))]
    assert json.loads((tmp_path / "out" / "pruning.json").read_text())["seconds"] > 1000
