"""The walk through the blocks and the command of dsnot.py: what it writes, how it goes on, what it refuses."""

import argparse
import contextlib
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

import dsnot
import walk
from conftest import ROOT, make_checkpoint
from data import calibration, estimate
from data.calibration import InputStats, inputs_of, place_for, steps, watch
from data.command import InputError, run
from data.device import allowed, free_memory
from data.method import shared_by
from data.writer import CheckpointWriter, alone_in
from gpt import GPT, Config, all_prunable, layer_inputs, prunable, rotary
from test_gpt import ALL, ids_for, theirs


def command(monkeypatch, model, out, *options):
    text = str(model / "text.txt")
    monkeypatch.setattr(sys, "argv", ["dsnot.py", "--device", "cpu", "--model", str(model / "m"), "--calib", text,
                                      "--data", text, "--nsamples", "4", "--seqlen", "32", "--out", str(out), *options])
    run(dsnot.main)


def tensors(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.mark.parametrize("options", [
    ("--sparsity", "0.6", "--compare"), ("--sparsity", "0.6", "--propagate"),
    ("--pattern", "2:4", "--refine", "dsnot+swap", "--refit"), ("--pattern", "2:4", "--score", "magnitude"),
    ("--pattern", "4:8", "--score", "sparsegpt", "--refine-layers", "attn"),
    ("--sparsity", "0.5", "--score", "sparsegpt", "--refine", "none"),
])
def test_command(monkeypatch, capsys, model, tmp_path, options):
    """Would catch a checkpoint that transformers can't load or reads differently, layers that are not pruned or not
    exactly, embeddings or norms that changed, and a table without its numbers."""
    transformers = pytest.importorskip("transformers")
    command(monkeypatch, model, tmp_path / "out", *options, "--json", str(tmp_path / "r.json"))
    result = json.loads((tmp_path / "r.json").read_text())["results"]
    printed = capsys.readouterr().out
    assert all(f"{row['perplexity']:.2f}" in printed and math.isfinite(row["perplexity"]) for row in result["rows"])
    assert len(result["rows"]) == 2 + ("--compare" in options)
    before, after = tensors(model / "m"), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, W in after.items():
        if "proj" not in name:
            assert torch.equal(W, before[name])
        elif "--pattern" in options:
            n, m = map(int, options[1].split(":"))
            assert ((W != 0).view(len(W), -1, m).sum(-1) == n).all()
        elif "sparsegpt" not in options:
            assert ((W == 0).sum(1) == int(W.shape[1] * 0.6)).all()
            assert torch.equal(W[W != 0], before[name][W != 0])
    ids = torch.randint(0, 64, (1, 20))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(ids).logits
    torch.testing.assert_close(GPT.from_pretrained(tmp_path / "out")(ids), theirs, rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize("said, dtype", [({"torch_dtype": 5}, torch.float32), ({"dtype": "nn"}, torch.float32),
                                         ({}, torch.float32), ({"torch_dtype": "bfloat16"}, torch.bfloat16)])
def test_stored_dtype(said, dtype):
    """A traceback of the dry run."""
    assert estimate.stored_dtype(argparse.Namespace(raw=said)) == dtype


@pytest.mark.parametrize("goes_on", [False, True])
def test_an_interruption_says_whether_the_command_goes_on(capsys, goes_on):
    def main():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as stopped:
        run(main, goes_on)
    assert stopped.value.code == 130 and ("goes on" in capsys.readouterr().err) == goes_on


def test_letters_that_the_terminal_lacks_are_replaced():
    """Would catch a traceback in the middle of a text."""
    words = [sys.executable, "gpt.py", "--max-new-tokens", "1", "--prompt", "Zoë"]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert done.returncode == 0 and b"Zo?" in done.stdout, done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a file that is always full")
def test_a_full_disk_below_the_output_gets_a_sentence():
    with open("/dev/full", "w") as full:
        words = [sys.executable, "gpt.py", "--max-new-tokens", "1"]
        done = subprocess.run(words, cwd=ROOT, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2 and done.stderr == b"error: the output: No space left on device\n"


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
    with the wrong sign: all aim half-way; with refit, a layer that adds to it also at half of what it lacks."""
    pytest.importorskip("transformers")
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
                y = (wanted[name] + seen[name]) / 2 @ W.T
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


def test_dry_run_writes_nothing(monkeypatch, capsys, model, tmp_path):
    """Only config.json is needed, every layer is named, nothing is written."""
    only = tmp_path / "only"
    only.mkdir()
    (only / "config.json").write_bytes((model / "m" / "config.json").read_bytes())
    for options in (["--refine", "swap", "--refit"], ["--score", "sparsegpt", "--pattern", "2:4"],
                    ["--refine", "swap", "--no-propagate"], ["--global-swaps", "4"], ["--allocate", "sensitivity"]):
        command(monkeypatch, model, tmp_path / "out", "--model", str(only), "--dry-run", *options)
        printed = capsys.readouterr().out
        assert all(f"{name}_proj" in printed for name in "q k v o gate up down".split()) and "memory" in printed
        assert f"{sum(W.numel() for W in tensors(model / 'm').values()):,} parameters" in printed
    large = json.loads((only / "config.json").read_text()) | dict(vocab_size=10**6)
    (only / "config.json").write_text(json.dumps(large))
    command(monkeypatch, model, tmp_path / "out", "--model", str(only), "--dry-run")
    assert "a window's logits in evaluation 0.3 GB" in capsys.readouterr().out  # 32 tokens in float32, twice
    assert [p.name for p in tmp_path.iterdir()] == ["only"]


@pytest.mark.parametrize("options, goal, trials, rounds", [
    (["--refine", "none"], 0, 0, 0), (["--refine", "none", "--allocate", "sensitivity"], 0, 1, 0),
    (["--refine", "swap"], 1, 0, 0), (["--refine", "none", "--global-swaps", "3"], 0, 0, 3)])
def test_dry_run_counts_all_that_takes_time(monkeypatch, model, tmp_path, options, goal, trials, rounds):
    """Where all that is timed takes a second, be it a sample of 32 tokens or 64 rows of a weight. Would catch layers of
    fewer rows that are told too short, trials of which the output head is forgotten, and a dense model, beside the
    pruned one, that takes no time, memory or disk."""
    monkeypatch.setattr(estimate, "timed", lambda work, device: (1.0, work()))
    command(monkeypatch, model, tmp_path / "out", "--dry-run", "--json", str(tmp_path / "r.json"), *options)
    layers = all_prunable(GPT.from_pretrained(model / "m"))
    blocks, samples, tried = 2, 4 * 32 / 32, 2048 / 32  # of calibration text and of a trial, each a second
    expected = sum(max(1, len(layer.weight) / 64) for layer in layers.values())
    expected += blocks * (2 + goal) * samples * (1 + trials)  # through a block, to its statistics; again to allocate
    expected += trials * len(layers) * tried * (blocks + 1) / 2 + trials * len(layers) * tried  # blocks, and the head
    swapped = (rounds + 1) * 8192 / 32 * bool(rounds)
    expected += blocks * 6 * swapped + 5 * swapped
    found = json.loads((tmp_path / "r.json").read_text())["results"]
    assert found["seconds"] == pytest.approx(expected)
    whole = 4 * sum(W.numel() for W in tensors(model / "m").values())
    block = 4 * sum(p.numel() for p in GPT.open(model / "m").model.layers[0].parameters())
    assert found["read_gb"] == whole / 1e9 and found["written_gb"] == (1 + bool(rounds)) * whole / 1e9
    if not rounds:
        held = next(size for name, size in found["memory_gb"].items() if name.startswith("weights"))
        assert held == pytest.approx((whole - (1 - goal) * block) / 1e9)  # of two blocks


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


def test_disk_too_small(monkeypatch, capsys, model, tmp_path):
    """Would catch a run that finds out after hours that its result, or the second of two, does not fit."""
    usage, one = type(shutil.disk_usage(tmp_path)), (model / "m/model.safetensors").stat().st_size
    for free, options in (5000, []), (one * 3 // 2, ["--compare"]):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - free, free))
        monkeypatch.setattr(dsnot, "perplexity", None)  # nothing is measured before
        expect_refusal(monkeypatch, capsys, model, tmp_path / "out", options, " MB free")


BAD = {
    "sparsity": (["--sparsity", "1.2"], "1.2"),
    "pattern": (["--pattern", "5:4"], "5:4"),
    "nothing to allocate": (["--pattern", "2:4", "--allocate", "owl"], "--allocate owl"),
    "no pattern": (["--pattern", "half"], "half"),
    "no threshold in it": (["--refine", "swap", "--threshold", "0.2"], "--threshold is for DSnoT, which --refine swap"),
    "too much to allocate": (["--allocate", "owl", "--sparsity", "0.999"], "--sparsity 0.999 can't be reached"),
    "negative cycles": (["--cycles", "-1"], "cycles -1"),
    "negative threshold": (["--threshold", "-1"], "threshold -1"),
    "a sparsity and a pattern": (["--sparsity", "0.5", "--pattern", "2:4"],
                                 "--pattern: not allowed with argument --sparsity"),
    "no such refinement": (["--refine", "swaps"], "invalid choice: 'swaps'"),
    "does not divide": (["--pattern", "3:7"], "--pattern 3:7 needs rows"),
    "no name": (["--out", "/"], "--out /"),
    "a name above": (["--out", "missing/.."], "--out missing/.. has no name"),
    "a long name": (["--out", "a" * 300], "File name too long"),
    "a text with a long name": (["--calib", "a" * 300], "File name too long"),
    "no cycles in it": (["--refine", "none", "--cycles", "9"], "--cycles 9 is for swaps"),
    "nothing refined": (["--refine", "none", "--refine-layers", "attn"], "--refine-layers attn is for refined layers"),
    "nothing to compare": (["--refine", "none", "--compare"], "--compare prunes once more without refinement"),
    "no signs to check": (["--refine", "swap", "--no-sign-check"], "--sign-check is for DSnoT, which --refine swap"),
    "unknown model": (["--model", "llama9"], "llama9"),
    "no such folder": (["--model", "./nothing/here"], "nothing/here"),
    "a file for a folder": (["--model", str(ROOT / "README.md")], "README.md is a file: a model is a folder"),
    "a slip": (["--model", "data/tinny"], "data/tinny is no folder here (data/tiny is)"),
    "a folder or a Hub id": (["--model", "tests/nothing"], "tests/nothing is no folder here"),
    "no such text": (["--calib", "nothing.txt"], "nothing.txt"),
    "long window": (["--seqlen", "100000"], "100000"),
    "nsamples": (["--nsamples", "0"], "nsamples 0"),
    "Hub out of reach, model": (["--model", "llama2-7b"], "meta-llama/Llama-2-7b-hf"),
    "Hub out of reach, text": (["--data", "wikitext2"], "Salesforce/wikitext"),
    "device": (["--device", "tpu9"], "tpu9"),
    "json": (["--json", "README.md/all.json"], "README.md is a file"),
    "out": (["--out", "README.md/out"], "README.md is a file"),
}


def expect_refusal(monkeypatch, capsys, model, out, options, said):
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, model, out, *options)
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1 and said in error[0], error
    assert not out.exists() and not list(out.parent.glob(f"{out.name}*"))


@pytest.mark.parametrize("name", BAD)
def test_bad_options(monkeypatch, capsys, model, tmp_path, name):
    """One sentence that names the value, exit code 2, nothing written."""
    expect_refusal(monkeypatch, capsys, model, tmp_path / "out", *BAD[name])


def test_bad_texts_and_files(monkeypatch, capsys, model, tmp_path):
    """An empty text, one that is too short, one that is no text; a missing and a truncated weight file."""
    for name, content, said in [("empty.txt", b"", "empty"), ("blank.txt", b"\n", "is empty"),
                                ("no.txt", b"\xff\xfe\x00", "UTF-8"),
                                ("short.txt", b"the words", "tokens, fewer than one window")]:
        (tmp_path / name).write_bytes(content)
        for option in "--calib", "--data":
            expect_refusal(monkeypatch, capsys, model, tmp_path / "out", [option, str(tmp_path / name)], said)
    broken = tmp_path / "broken"
    for damage, said in [(lambda f: f.unlink(), "missing"),
                         (lambda f: f.write_bytes(f.read_bytes()[:-100]), "truncated")]:
        make_checkpoint(broken)
        damage(broken / "model.safetensors")
        expect_refusal(monkeypatch, capsys, model, tmp_path / "out", ["--model", str(broken)], said)


def test_activations_that_are_not_finite(monkeypatch, capsys, model, tmp_path):
    """Would catch a mask chosen from NaN: the layer is named. And blocks finished before it left behind, for a run
    that would end there again, in the way of others; a ruined dense model's perplexity made up from NaN."""
    overflows = tmp_path / "overflows"
    make_checkpoint(overflows)
    tensors = load_file(overflows / "model.safetensors")
    for name, scale in ("up", 1e10), ("down", 1e38):  # what flows into the second block is too large
        tensors[f"model.layers.0.mlp.{name}_proj.weight"] *= scale
    save_file(tensors, overflows / "model.safetensors")
    expect_refusal(monkeypatch, capsys, model, tmp_path / "out", ["--model", str(overflows)],
                   "layers.1.self_attn.q_proj are not finite")
    import gpt
    real = gpt.GPT.embed
    monkeypatch.setattr(gpt.GPT, "embed", lambda self, *ids: real(self, *ids) * float("nan"))
    expect_refusal(monkeypatch, capsys, model, tmp_path / "out", [], "layers.0.self_attn.q_proj are not finite")


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


def test_full_disk(monkeypatch, capsys, model, tmp_path):
    """A file that can't be written whole leaves nothing that looks like a checkpoint."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        expect_refusal(monkeypatch, capsys, model, tmp_path / "out", [], "can't write")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_existing_folders_are_respected(monkeypatch, capsys, model, tmp_path):
    """Would catch overwriting the model that is being read, one that came from elsewhere, or a folder that holds
    something else, or a finished run of other options, and work that is done before the refusal."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    theirs("llama", {}).save_pretrained(tmp_path / "theirs")
    with monkeypatch.context() as patch:
        patch.setattr(dsnot, "perplexity", None)
        for out in tmp_path / "mine", tmp_path / "theirs", model / "m":
            with pytest.raises(SystemExit):
                command(monkeypatch, model, out)
            assert "choose another output folder" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    for again in False, True:
        command(monkeypatch, model, tmp_path / "new", "--sparsity", "0.5")
        assert ("is finished, and will be measured again" in capsys.readouterr().out) == again
    with pytest.raises(SystemExit):
        command(monkeypatch, model, tmp_path / "new", "--sparsity", "0.6", "--nsamples", "3")
    assert "holds a finished run, which differs in sparsity, nsamples: choose another" in capsys.readouterr().err
    assert json.loads((tmp_path / "new" / "pruning.json").read_text())["run"]["sparsity"] == 0.5
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    for out in tmp_path / "here", tmp_path / "here" / "below":  # a rename takes it from the shell that stands there
        with pytest.raises(SystemExit):
            command(monkeypatch, model, out)
        assert "it is the current folder, or one above it: choose" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.ismount("/proc"), reason="a disk that is mounted")
def test_where_a_disk_is_mounted_no_folder_is_made(monkeypatch, capsys, model):
    """Would catch a run that fails at its last step, each time."""
    with pytest.raises(SystemExit):
        command(monkeypatch, model, "/proc")
    assert "a disk is mounted there (a folder inside it will do)" in capsys.readouterr().err


def test_a_folder_in_use_is_refused_at_once(monkeypatch, capsys, model, tmp_path):
    """Would catch a dense evaluation of an hour before the refusal."""
    monkeypatch.setattr(dsnot, "perplexity", None)
    with alone_in(tmp_path / "out.partial"), pytest.raises(SystemExit):
        command(monkeypatch, model, tmp_path / "out")
    assert "another run is writing to" in capsys.readouterr().err


@pytest.mark.parametrize("options, ending", [
    ([], "-wanda-dsnot-70"), (["--pattern", "2:4"], "-wanda-dsnot-2of4"),
    (["--refine-layers", "attn", "--cycles", "50", "--no-sign-check"],
     "-wanda-dsnot-70-cycles-50-no-sign-check-refine-layers-attn"),
    (["--calib", "a/b.txt", "--nsamples", "8", "--seqlen", "9"], "-wanda-dsnot-70-calib-b.txt-nsamples-8-seqlen-9"),
    (["--threshold", "0.2", "--seed", "3"], "-wanda-dsnot-70-seed3-threshold-0.2"),
    (["--allocate", "owl", "--refine", "swap", "--no-propagate"], "-wanda-swap-70-owl-no-propagate")])
def test_runs_that_differ_have_folders_that_differ(monkeypatch, options, ending):
    """Would catch hours of work that are replaced by those of other options."""
    monkeypatch.setattr(sys, "argv", ["dsnot.py", *options])
    args = dsnot.options()
    dsnot.fill_in(args, Config.read(ROOT / "data" / "tiny"), "tiny")
    assert args.out == f"out/tiny{ending}"


@pytest.mark.parametrize("options, compares", [
    ([], True), (["--data", "a.txt"], False), (["--refine", "none"], False), (["--refine", "none", "--refit"], True)])
def test_what_is_compared_if_nobody_asks(monkeypatch, options, compares):
    """On a text of the user's own a second pruning would double the time."""
    monkeypatch.setattr(sys, "argv", ["dsnot.py", *options])
    args = dsnot.options()
    dsnot.fill_in(args, Config.read(ROOT / "data" / "tiny"), "tiny")
    assert args.compare == compares


def test_two_rows_have_two_names(monkeypatch, capsys, model, tmp_path):
    """Would catch a table in which one can't be told from the other, and columns that long names push apart."""
    command(monkeypatch, model, tmp_path / "out", "--refine", "none", "--propagate", "--compare")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith("wanda")] == ["wanda", "wanda (propagate)"]
    command(monkeypatch, model, tmp_path / "long", "--refine", "dsnot+swap", "--refit", "--global-swaps", "1")
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("method", "dense", "wanda"))]
    assert len(table) == 3 and len(set(map(len, table))) == 1


def test_memory_for_the_activations(monkeypatch, capsys, model, tmp_path):
    """Would catch a run that finds out later, and one that is finished being refused for what it would have needed."""
    command(monkeypatch, model, tmp_path / "done")
    before, full = tensors(tmp_path / "done"), lambda device: 100
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(estimate, "free_memory", full)
        expect_refusal(patch, capsys, model, tmp_path / "out", [], "--nsamples 4 of --seqlen 32 make ")
        command(patch, model, tmp_path / "done")
    assert all(torch.equal(before[name], W) for name, W in tensors(tmp_path / "done").items())


@pytest.mark.parametrize("gpu, cpu, fits", [(75, 100, False), (500, 100, True), (75, 200, True), (250, 100, False)])
def test_activations_lie_in_one_place(monkeypatch, gpu, cpu, fits):
    """Would catch a run of 150 GB that is let in because the GPU's memory and the computer's together have room."""
    def free(device):
        return 1e9 * (gpu if torch.device(device).type == "cuda" else cpu)
    for module in estimate, calibration:
        monkeypatch.setattr(module, "free_memory", free)
    monkeypatch.setattr(estimate, "state_bytes", lambda *_: 150e9)
    args = argparse.Namespace(device="cuda", nsamples=1, seqlen=1, global_swaps=0)
    with contextlib.nullcontext() if fits else pytest.raises(InputError, match="make 150.0 GB of activations"):
        estimate.check_memory(args, None)
    place = place_for(argparse.Namespace(hidden_size=1), 75e9, torch.device("cuda"), torch.float16)
    assert fits == (150 < (cpu if place == "cpu" else gpu))


def test_the_limits_of_a_container_count_and_cached_files_do_not(monkeypatch, tmp_path):
    """Would catch a decision by the memory of a host of which a job may have a part, and one against a model because
    it is in the cache."""
    root, own = tmp_path / "cgroup", tmp_path / "own"
    job = root / "cluster" / "job"
    job.mkdir(parents=True)
    for folder, most, used, cached in (job, "max", 500, 0), (job.parent, "1000", 700, 200):
        (folder / "memory.max").write_text(most + "\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_anon 7\ninactive_file {cached}\nactive_file 30\n")
    own.write_text("1:cpu:/elsewhere\n0::/cluster/job\n")
    assert list(allowed(root, own)) == [1000 - 700 + 200 + 30]
    with monkeypatch.context() as patch:
        patch.setattr("data.device.allowed", lambda: allowed(root, own))
        assert free_memory(torch.device("cpu")) == 530
    (job.parent / "memory.stat").unlink()  # a group that goes away
    assert not list(allowed(root, own))
    own.write_text("4:memory:/version/1\n")
    assert not list(allowed(root, own)) and not list(allowed(root, tmp_path / "no Linux"))


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


def test_what_may_surprise_is_said(monkeypatch, capsys, model, tmp_path):
    """Would catch a pruned model being measured as the dense one without a word; windows that are too long and a
    text that is too short to fit weights to, likewise."""
    command(monkeypatch, model, tmp_path / "once")
    said = capsys.readouterr().out
    assert not any(words in said for words in ("pruned before", "made for", "are fitted", "overlap"))
    command(monkeypatch, model, tmp_path / "often", "--nsamples", "1000")
    assert "tokens to calibrate on, so that 1000 windows of 32 overlap" in capsys.readouterr().out
    command(monkeypatch, model, tmp_path / "short", "--refit", "--nsamples", "1")
    assert "weights are fitted to 32 tokens of calibration text, fewer than the 56 inputs" in capsys.readouterr().out
    command(monkeypatch, model, tmp_path / "twice", "--model", str(tmp_path / "once"), "--seqlen", "65")
    said = capsys.readouterr().out
    assert "pruned before" in said and "65 tokens, more than the 64 that the model is made for" in said
    dense = next(line for line in said.splitlines() if line.startswith("dense"))
    assert "%" not in dense  # how sparse it is, nobody has counted


def test_a_run_is_told_by_its_texts_and_its_notes(monkeypatch, capsys, model, tmp_path):
    """Would catch a finished folder being taken for the answer after its calibration text was edited, and one whose
    notes are damaged ending in a traceback."""
    text, found = tmp_path / "text.txt", []
    text.write_text("the words are few " * 400)
    for damage in "", '{"run": ', '{"a": 1}':
        if damage:
            (tmp_path / "out" / "pruning.json").write_text(damage)
        command(monkeypatch, model, tmp_path / "out", "--calib", str(text))
        found.append(tensors(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    text.write_text("the model reads " * 400)
    with pytest.raises(SystemExit):
        command(monkeypatch, model, tmp_path / "out", "--calib", str(text))
    assert "finished run, which differs in files (text.txt)" in capsys.readouterr().err


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


@pytest.mark.parametrize("world, allocate, propagate, tokens", [
    (1, "uniform", False, 5 * 32), (1, "uniform", True, 2 * 5 * 32), (2, "uniform", False, 3 * 32),
    (1, "sensitivity", False, 5 * 32 + 14 * 2048), (2, "sensitivity", True, 3 * 32 + 14 * 2048)])
def test_hidden_states_are_counted(monkeypatch, model, world, allocate, propagate, tokens):
    """Would catch a run that is let in without room for the dense model's states, trials or a process's odd sequence;
    processes that each count all memory as theirs; a dtype that is not the one they are held in."""
    monkeypatch.setattr(estimate, "processes", lambda: (0, world))
    monkeypatch.setattr(estimate, "has_goal", lambda **_: propagate)
    dense = GPT.open(model / "m")
    dense.config.raw["dtype"] = "bfloat16"
    args = argparse.Namespace(device="cpu", nsamples=5, seqlen=32, allocate=allocate)
    need = tokens * 32 * 4  # float32 on a CPU whatever the checkpoint holds
    assert estimate.state_bytes(args, dense) == need
    monkeypatch.setattr(estimate, "free_memory", lambda device: world * need)
    estimate.check_memory(args, dense)
    monkeypatch.setattr(estimate, "free_memory", lambda device: world * need - 1)
    with pytest.raises(InputError, match="of activations"):
        estimate.check_memory(args, dense)
    assert estimate.whole_memory(args, dense)["two models"] == 2 * 4 * sum(p.numel() for p in dense.parameters())
    for free, place in (2 * 5 * 32 * 2 + 1, "cuda"), (2 * 5 * 32 * 2, "cpu"):
        monkeypatch.setattr(calibration, "free_memory", lambda device: free)
        assert place_for(dense.config, 5, "cuda", torch.float16) == place


def test_tokens_at_a_time():
    """Would catch windows longer than 2048 tokens of which none is looked at."""
    assert [estimate.probe_tokens(seqlen) for seqlen in (1, 2048, 4096)] == [2048, 2048, 4096]


def test_what_names_a_run(monkeypatch, model):
    """Would catch shares that another number of processes has found taken for those of this one, and a text that is
    another one because its path is written in another way."""
    def name(**options):
        args = dict(nsamples=4, seqlen=32, seed=0, calib=f"{model}/text.txt", pattern=None, allocate="uniform")
        return shared_by(argparse.Namespace(**args | options), GPT.open(model / "m").source)
    assert name() == name(calib=f"{model}/m/../text.txt") != name(calib=f"{model}/m/config.json")
    found = {world: [] for world in (1, 2, 3)}
    for world, names in found.items():
        monkeypatch.setattr("data.method.processes", lambda: (0, world))
        names += [name(), name(allocate="sensitivity")]
    assert found[1][0] == found[2][0] == found[3][0]
    assert len({names[1].get("processes") for names in found.values()}) == 3 and "processes" not in found[1][1]


@pytest.mark.parametrize("config, inputs, layer", [
    (dict(head_dim=10, intermediate_size=64), 40, "self_attn.o_proj"),
    (dict(intermediate_size=72), 72, "mlp.down_proj"),
    (dict(hidden_size=40, head_dim=8, intermediate_size=64), 40, "mlp.up_proj")])
def test_every_layers_rows_have_to_fit(monkeypatch, capsys, model, tmp_path, config, inputs, layer):
    """Would catch a pattern that is tried on some of the layers alone, and a run that ends at the first other one."""
    make_checkpoint(tmp_path / "m", **config)
    first = GPT.open(tmp_path / "m").model.layers[0]
    sizes = layer_inputs(Config.read(tmp_path / "m"))
    assert sizes == {name: W.in_features for name, W in prunable(first).items()} and sizes[layer] == inputs
    expect_refusal(monkeypatch, capsys, model, tmp_path / "out", ["--model", str(tmp_path / "m"), "--pattern", "2:16"],
                   f"but a layer has {inputs} inputs")


def test_what_is_compared_differs_in_refinement_alone(monkeypatch, capsys, model, tmp_path):
    """Would catch a mask for comparison that is refined or of another score or allocation, calibration by another seed,
    a text that is calibrated on being measured, and a sparsity that is not that of all weights together."""
    seeds, real = [], dsnot.calibration_windows
    monkeypatch.setattr(dsnot, "calibration_windows", lambda *args: (seeds.append(args[-1]), real(*args))[1])
    command(monkeypatch, model, tmp_path / "out", "--score", "magnitude", "--sparsity", "0.5", "--refine", "swap",
            "--refit", "--cycles", "3", "--allocate", "sensitivity", "--seed", "2", "--compare", "--json",
            str(tmp_path / "r.json"))
    said, entry = capsys.readouterr().out, json.loads((tmp_path / "r.json").read_text())
    assert seeds == [2] and entry["options"]["split"] == "held-out" and "perplexity on the last tenth of " in said
    for folder, row in zip(("out.unrefined", "out"), entry["results"]["rows"][1:]):
        run = json.loads((tmp_path / folder / "pruning.json").read_text())["run"]
        assert [run[name] for name in ("score", "allocate", "seed")] == ["magnitude", "sensitivity", 2]
        expected = ["none", False, False, None] if folder == "out.unrefined" else ["swap", True, True, 3]
        assert [run[name] for name in ("refine", "refit", "propagate", "cycles")] == expected
        zeros = torch.cat([(W == 0).flatten() for name, W in tensors(tmp_path / folder).items() if "proj" in name])
        assert row["sparsity"] == pytest.approx(zeros.double().mean().item())
        assert row["sparsity"] == pytest.approx(0.5, abs=2e-3)  # as without an allocation
