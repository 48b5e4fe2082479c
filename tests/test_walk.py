"""The walk through the blocks: what it makes of every family, what it keeps in memory, how it goes on."""

import json
import os
import shutil
import subprocess
import sys
import weakref

import pytest
import torch

import dsnot
import walk
from conftest import ROOT
from data.calibration import InputStats, inputs_of, steps, watch
from data.command import InputError
from data.writer import CheckpointWriter
from gpt import GPT, all_prunable, prunable, rotary
from test_gpt import ALL, ids_for, theirs
from test_prune import command, tensors


@pytest.mark.parametrize("make, how", [(walk.prune, {}), (walk.prune_globally, {"global_swaps": 1})])
def test_what_is_not_pruned_stays_as_it_is_on_disk(model, tmp_path, make, how):
    """Would catch norms and biases that are rounded to the dtype in which a model runs."""
    fine = GPT.from_pretrained(model / "m")
    for W in fine.parameters():
        if W.dim() == 1:
            W.data.normal_()
    fine.save_pretrained(tmp_path / "fine", tokenizer_from=model / "m")
    coarse = GPT.from_pretrained(tmp_path / "fine", dtype=torch.bfloat16, stream=True)
    make(coarse, torch.randint(0, 64, (4, 32)), tmp_path / "out", {}, dsnot.prune_layer, score="wanda", refine="none",
         sparsity=0.5, **how)
    before, after = tensors(tmp_path / "fine"), tensors(tmp_path / "out")
    for name, W in before.items():
        assert after[name].dtype == W.dtype and ("proj" in name) != torch.equal(after[name], W), name


@pytest.mark.parametrize("after,method", [(1, ["--score", "sparsegpt"]), (8, ["--score", "sparsegpt"]),
                                          (13, ["--refine", "swap"])])
def test_interrupted_run_goes_on(monkeypatch, capsys, model, tmp_path, after, method):
    """Would catch lost blocks, blocks done twice with other results, and anything random that depends on the stop."""
    command(monkeypatch, model, tmp_path / "whole", *method)
    real, calls = dsnot.prune_layer, []

    def stop(*args, **options):
        calls.append(1)
        if len(calls) == after:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(dsnot, "prune_layer", stop)
    with pytest.raises(SystemExit):
        command(monkeypatch, model, tmp_path / "cut", *method)
    assert not (tmp_path / "cut").exists()
    log, calls[:] = tmp_path / "cut.partial" / "pruning.json", []
    if stopped_late := log.is_file():
        log.write_text(json.dumps(json.loads(log.read_text()) | {"seconds": 1000}))
    monkeypatch.setattr(dsnot, "prune_layer", lambda *args, **options: (calls.append(1), real(*args, **options))[1])
    capsys.readouterr()
    command(monkeypatch, model, tmp_path / "cut", *method)
    assert ("going on after 1 of 2 blocks" in capsys.readouterr().out) == stopped_late
    assert len(calls) == 14 - (after - 1) // 7 * 7, "a finished block was pruned again"
    for file in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert (tmp_path / "cut" / file.name).read_bytes() == file.read_bytes()
    layers = [json.loads((tmp_path / run / "pruning.json").read_text())["layers"] for run in ("whole", "cut")]
    assert layers[0] == layers[1] and len(layers[0]) == 14 and all("error" in layer for layer in layers[0])
    seconds = json.loads((tmp_path / "cut" / "pruning.json").read_text())["seconds"]
    assert (seconds > 1000) == stopped_late == (after > 7), "the time before the stop counts, too"


def test_a_block_without_its_records_is_pruned_again(monkeypatch, capsys, model, tmp_path):
    """Would catch a table and a pruning.json of some of the layers, after the disk has lost the file."""
    real, blocks = walk.prune_block, []

    def stop(*args, **options):
        blocks.append(args[4])
        if len(blocks) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(walk, "prune_block", stop)
    with pytest.raises(SystemExit):
        command(monkeypatch, model, tmp_path / "out")
    (tmp_path / "out.partial" / "pruning.json").write_text("")
    monkeypatch.setattr(walk, "prune_block", real)
    command(monkeypatch, model, tmp_path / "out")
    assert blocks == ["model.layers.0", "model.layers.1"] and "going on" not in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out" / "pruning.json").read_text())["layers"]) == 14


def test_what_follows_the_last_layer_that_is_seen_is_not_computed(model):
    """Would catch passes through layers whose inputs nobody asked for, and hooks that stay."""
    block = GPT.from_pretrained(model / "m").model.layers[0]
    layers, x = prunable(block), torch.randn(1, 8, 32)
    step = steps(block, torch.arange(8), rotary(GPT.open(model / "m").config, torch.arange(8)))[0]
    expected = step(x)
    with watch({"o": layers["self_attn.o_proj"]}, lambda *_: pytest.fail("attention's output was computed")):
        found = inputs_of(step, x, {name: layers[name] for name in ("self_attn.q_proj", "self_attn.v_proj")})
    assert list(found) == ["self_attn.q_proj", "self_attn.v_proj"]
    assert torch.equal(found["self_attn.q_proj"], block.input_layernorm(x)) and torch.equal(step(x), expected)


def test_a_finished_folder_is_no_answer_when_the_model_has_changed(monkeypatch, capsys, model, tmp_path):
    """Would catch the masks of weights that are no longer there being handed out; and work done twice where they
    are."""
    shutil.copytree(model, tmp_path / "model")
    real, calls = dsnot.prune_layer, []
    monkeypatch.setattr(dsnot, "prune_layer", lambda *args, **options: (calls.append(1), real(*args, **options))[1])
    for _ in range(2):
        command(monkeypatch, tmp_path / "model", tmp_path / "out")
        assert len(calls) == 14
    for file, before in ("model.safetensors", ""), ("tokenizer.model", "model.safetensors, "):
        os.utime(tmp_path / "model" / "m" / file, (0, 0))
        with pytest.raises(SystemExit):
            command(monkeypatch, tmp_path / "model", tmp_path / "out")
        assert f"differs in files ({before}{file}): choose another" in capsys.readouterr().err


@pytest.mark.parametrize("family, changes", ALL)
def test_every_family_is_pruned(family, changes, tmp_path):
    """Would catch layers that are left out, fused or transposed weights pruned along the wrong side, a head or a
    projection of the embedding that is pruned, and folders that transformers reads otherwise."""
    transformers = pytest.importorskip("transformers")
    theirs(family, changes).save_pretrained(tmp_path / "m")
    windows, ids = ids_for(batch=6), ids_for(seed=2)
    for score, refine, amount in [("wanda", "dsnot", dict(sparsity=0.6)), ("sparsegpt", "dsnot", dict(pattern=(2, 4))),
                                  ("magnitude", "swap", dict(pattern=(4, 8)))]:
        dense = GPT.from_pretrained(tmp_path / "m")
        walk.prune(GPT.from_pretrained(tmp_path / "m", stream=True), windows, tmp_path / score, {"run": score},
                   dsnot.prune_layer, batch=4, score=score, refine=refine, propagate=refine == "swap", **amount)
        pruned = GPT.from_pretrained(tmp_path / score)
        layers = {f"{name}.weight": layer.weight for name, layer in all_prunable(pruned).items()}
        assert len(layers) == 3 * (7 if dense.config.gated else 6)
        for name, W in layers.items():
            n, m = amount.get("pattern", (W.shape[1] - int(W.shape[1] * 0.6), W.shape[1]))
            kept = (W != 0).view(len(W), -1, m).sum(-1)
            assert (kept <= n).all() if score == "sparsegpt" else (kept == n).all(), name  # it also clears dead inputs
        assert all(name in layers or torch.equal(value, dense.state_dict()[name])
                   for name, value in pruned.state_dict().items())
        other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / score, dtype=torch.float32)
        torch.testing.assert_close(pruned(ids), other(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family, changes", ALL)
@pytest.mark.parametrize("refit", [False, True])
def test_layers_aim_at_the_dense_model(monkeypatch, family, changes, refit, tmp_path):
    """Would catch inputs of the wrong model in a goal, and a hidden state that is made up for in the wrong layer or
    with the wrong sign: all aim a part of the way; with refit, a layer that adds to it also at half of what it lacks.
    """
    pytest.importorskip("transformers")
    assert walk.AIM == {"mask": (0.5, 0.0), "weights": (0.5, 0.5)}
    monkeypatch.setattr(walk, "AIM", {"mask": (0.25, 0.0), "weights": (0.25, 0.5)})  # by half, both targets look alike
    theirs(family, changes).save_pretrained(tmp_path)
    model, goals = GPT.from_pretrained(tmp_path), []
    block, ids = model.model.layers[1], ids_for(batch=4)
    dense = model.embed(ids)
    sparse = dense + 0.2 * torch.randn(dense.shape, generator=torch.Generator().manual_seed(0))
    where = torch.arange(ids.shape[1]), rotary(model.config, torch.arange(ids.shape[1]))
    linears, expected, x, z = prunable(block), [], sparse, dense
    with torch.no_grad():
        for step in steps(block, *where, halves=True):
            seen, wanted = {}, {}
            with watch(linears, seen.__setitem__):
                after = step(x)
            with watch(linears, wanted.__setitem__):
                step(z)
            for i, name in enumerate(seen):
                W = linears[name].weight
                y = (seen[name] + (wanted[name] - seen[name]) / 4) @ W.T
                if refit and i == len(seen) - 1:
                    y = y + (z - x) / 2
                expected.append(torch.einsum("nto,nti->oi", y, seen[name]))
            x, z = after, step(z)
        walk.prune_block(block, where, list(sparse.split(2)), list(dense.split(2)), "b", lambda name: torch.float32,
                         prune_layer=lambda W, stats, goal, **_: (goals.append(goal), W)[1], score="wanda",
                         refine="swap", refit=refit, propagate=True, sparsity={f"b.{name}": 0.5 for name in linears})
    assert len(goals) == len(linears)
    for goal, found in zip(expected, goals):
        torch.testing.assert_close(found, goal, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options, alike", [
    (("--sparsity", "0.6"), 0.999),
    (("--sparsity", "0.6", "--allocate", "sensitivity"), 0.9),  # a layer's share may move a step
    (("--pattern", "2:4", "--score", "sparsegpt", "--refine", "swap"), 0.99),
    (("--sparsity", "0.5", "--score", "sparsegpt", "--refine", "none"), 0.99),
    (("--sparsity", "0.5", "--refine", "none", "--global-swaps", "3"), 0.9),  # each draws tokens of its own
])
def test_two_processes_prune_as_one(monkeypatch, model, tmp_path, options, alike):
    """Would catch statistics that are not those of all sequences, rows that nobody or two prune, and two writers."""
    command(monkeypatch, model, tmp_path / "one", *options, "--json", str(tmp_path / "one.json"))
    one = sys.argv[1:-3]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    two = subprocess.run([*torchrun, ROOT / "dsnot.py", *one[:one.index("--out")], "--out", tmp_path / "two", *options,
                          "--json", tmp_path / "two.json"], capture_output=True, text=True, timeout=300)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("saved") == 1
    same, total = 0, 0
    for name, W in tensors(tmp_path / "one").items():
        other = tensors(tmp_path / "two")[name]
        if "proj" in name and "sparsegpt" not in options:
            assert len(set((other != 0).sum(1).tolist())) == 1, name  # of all rows, whoever has pruned them
        same, total = same + ((W == 0) == (other == 0)).sum().item(), total + W.numel()
    assert same >= total * alike
    rows = [json.loads((tmp_path / f"{n}.json").read_text())["results"]["rows"] for n in ("one", "two")]
    assert rows[0][-1]["perplexity"] == pytest.approx(rows[1][-1]["perplexity"], rel=1e-3 if alike > 0.99 else 3e-2)


@pytest.mark.parametrize("options", [{}, {"propagate": True}, {"allocate": "sensitivity"}])
def test_one_block_is_in_memory_at_a_time(blocks_read, model, tmp_path, options):
    """Would catch a loop variable, a hook or a list that keeps the block before, which is 0.8 GB of LLaMA2-7B."""
    walk.prune(GPT.from_pretrained(model / "m", stream=True), torch.randint(0, 300, (4, 32)), tmp_path / "out",
               {}, dsnot.prune_layer, batch=2, score="wanda", refine="swap", sparsity=0.5, **options)
    assert blocks_read == ["model.layers.0", "model.layers.1"] * (2 if "allocate" in options else 1)


def test_a_model_that_changes_while_it_is_pruned_is_refused(monkeypatch, model, tmp_path):
    """Would catch a finished folder that is made of two models."""
    shutil.copytree(model / "m", tmp_path / "m")
    dense, real = GPT.from_pretrained(tmp_path / "m", stream=True), walk.prune_block
    monkeypatch.setattr(walk, "prune_block", lambda *args, **how: (os.utime(tmp_path / "m" / "model.safetensors"),
                                                                   real(*args, **how))[1])
    with pytest.raises(InputError, match="m was changed while it was being pruned: give the command again"):
        walk.prune(dense, torch.randint(0, 300, (4, 32)), tmp_path / "out", {}, dsnot.prune_layer, score="wanda",
                   refine="none", sparsity=0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_run_is_known_by_any_dict(monkeypatch, model, tmp_path):
    """A finished run whose name held a tuple was taken for another: in JSON it is a list."""
    dense, how = GPT.from_pretrained(model / "m", stream=True), dict(score="wanda", refine="none", pattern=(2, 4))
    first = walk.prune(dense, torch.randint(0, 300, (4, 32)), tmp_path / "out", dict(how), dsnot.prune_layer, **how)
    monkeypatch.setattr(walk, "prune_block", None)
    assert walk.prune(dense, torch.zeros(4, 32), tmp_path / "out", dict(how), dsnot.prune_layer, **how) == first != []


@pytest.mark.parametrize("propagate", [False, True])
def test_hidden_states_are_not_kept(monkeypatch, model, tmp_path, propagate):
    """Would catch a list that holds the embedded text, which is as large as all activations, to the end."""
    embedded, alive = [], []
    embed, prune_block = GPT.embed, walk.prune_block

    def watched(self, ids):
        x = embed(self, ids)
        embedded.append(weakref.ref(x))
        return x

    monkeypatch.setattr(GPT, "embed", watched)
    monkeypatch.setattr(walk, "prune_block", lambda *args, **options: (
        alive.append(sum(x() is not None for x in embedded)), prune_block(*args, **options))[1])
    walk.prune(GPT.from_pretrained(model / "m", stream=True), torch.randint(0, 300, (4, 32)), tmp_path / "out",
               {}, dsnot.prune_layer, batch=2, score="wanda", refine="none", sparsity=0.5, propagate=propagate)
    assert alive == [2, 0]


def test_weights_that_do_not_fit_into_the_dtype_of_the_checkpoint():
    """Would catch an infinite weight written as finished, and the layer after it accused."""
    torch.manual_seed(0)
    weight, stats = 6e4 * torch.randn(8, 16).sign(), InputStats(16, gram=True)
    stats.add(torch.randn(40, 1) + 0.1 * torch.randn(40, 16))  # one input stands for the others
    before, how = weight.half(), dict(score="wanda", refine="none", refit=True, sparsity=0.5)
    assert before.isfinite().all()
    with pytest.raises(InputError, match="that suit layer 7 do not fit into float16"):
        walk.prune_linear(weight, "layer 7", stats, "weights", torch.float16, prune_layer=dsnot.prune_layer, **how)
    assert torch.equal(weight, before.float())  # nothing has changed
    found = walk.prune_linear(weight, "layer 7", stats, "weights", torch.bfloat16, prune_layer=dsnot.prune_layer, **how)
    assert found["sparsity"] == 0.5


def test_what_an_unfinished_run_differs_in_is_said(monkeypatch, capsys, model, tmp_path):
    """Would catch a run of other options that goes on, and a block that is noted, but not written, taken for done."""
    command(monkeypatch, model, tmp_path / "whole")
    real, noted = CheckpointWriter.note, []

    def killed(writer, **what):
        real(writer, **what)
        noted.append(what)
        if len(noted) == 2:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(CheckpointWriter, "note", killed)
        command(patch, model, tmp_path / "out")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        command(monkeypatch, model, tmp_path / "out", "--nsamples", "3", "--cycles", "2")
    assert "another run, which differs in cycles, nsamples: give what it had" in capsys.readouterr().err
    command(monkeypatch, model, tmp_path / "out")
    assert "going on after 1 of 2 blocks" in capsys.readouterr().out
    assert all(torch.equal(tensors(tmp_path / "out")[name], W) for name, W in tensors(tmp_path / "whole").items())


def test_time_is_kept(monkeypatch, model, tmp_path):
    """Would catch a finished folder being told to have taken no time."""
    seconds = []
    for _ in range(2):
        command(monkeypatch, model, tmp_path / "out", "--json", str(tmp_path / "new" / "result.json"))
        seconds.append(json.loads((tmp_path / "new" / "result.json").read_text())["results"]["rows"][-1]["seconds"])
    assert seconds[0] == seconds[1] > 0


def test_refine_layers(monkeypatch, model, tmp_path):
    """Would catch an option that nothing hears, or the wrong half."""
    for name, options in ("none", ["--refine", "none"]), ("attn", ["--refine-layers", "attn"]), ("all", []):
        command(monkeypatch, model, tmp_path / name, "--sparsity", "0.6", *options)
    none, attn, every = (tensors(tmp_path / name) for name in ("none", "attn", "all"))
    for name in (name for name in none if "layers.0." in name and "proj" in name):  # what flows into it is dense
        assert torch.equal(attn[name], (every if "self_attn" in name else none)[name]), name
    for part in "self_attn", "mlp":
        assert any(not torch.equal(none[name], every[name]) for name in none if "layers.0." in name and part in name)


def test_sparsegpt_aims_at_what_is_missing(monkeypatch, model, tmp_path):
    """Its weights can make up for what a mask can't."""
    aims, real = [], walk.layer_goal
    monkeypatch.setattr(walk, "layer_goal", lambda W, stats, adjusts: aims.append(adjusts) or real(W, stats, adjusts))
    for method in (["--score", "sparsegpt"], ["--refine", "swap", "--refit"], ["--refine", "swap"]):
        command(monkeypatch, model, tmp_path / "-".join(method), "--propagate", *method)
    assert aims == 28 * ["weights"] + 14 * ["mask"]
