"""What a run needs, told before it begins: time, memory, disk, and the place of its activations."""

import argparse
import contextlib
import json
import shutil

import pytest
import torch

import dsnot
from data import calibration, estimate
from data.calibration import place_for
from data.command import InputError
from data.device import allowed, free_memory
from gpt import GPT, all_prunable
from test_prune import command, expect_refusal, tensors


@pytest.mark.parametrize("said, dtype", [({"torch_dtype": 5}, torch.float32), ({"dtype": "nn"}, torch.float32),
                                         ({}, torch.float32), ({"torch_dtype": "bfloat16"}, torch.bfloat16)])
def test_stored_dtype(said, dtype):
    """A traceback of the dry run."""
    assert estimate.stored_dtype(argparse.Namespace(raw=said)) == dtype


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
    blocks, samples, tried = 2, 4 * 32 / 32, 512 / 32  # of calibration text and of a trial, each a second
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


def test_disk_too_small(monkeypatch, capsys, model, tmp_path):
    """Would catch a run that finds out after hours that its result, or the second of two, does not fit."""
    usage, one = type(shutil.disk_usage(tmp_path)), (model / "m/model.safetensors").stat().st_size
    for free, options in (5000, []), (one * 3 // 2, ["--compare"]):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - free, free))
        monkeypatch.setattr(dsnot, "perplexity", None)  # nothing is measured before
        expect_refusal(monkeypatch, capsys, model, tmp_path / "out", options, " MB free")


def test_memory_for_the_activations(monkeypatch, capsys, model, tmp_path):
    """Would catch a run that finds out later, and one that is finished being refused for what it would have needed."""
    command(monkeypatch, model, tmp_path / "done")
    before, full = tensors(tmp_path / "done"), lambda device: 100
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr("data.processes.free_memory", full)
        expect_refusal(patch, capsys, model, tmp_path / "out", [], "--nsamples 4 of --seqlen 32 make ")
        command(patch, model, tmp_path / "done")
    assert all(torch.equal(before[name], W) for name, W in tensors(tmp_path / "done").items())


@pytest.mark.parametrize("gpu, cpu, fits", [(75, 100, False), (500, 100, True), (75, 200, True), (250, 100, False)])
def test_activations_lie_in_one_place(monkeypatch, gpu, cpu, fits):
    """Would catch a run of 150 GB that is let in because the GPU's memory and the computer's together have room."""
    def free(device):
        return 1e9 * (gpu if torch.device(device).type == "cuda" else cpu)
    for module in "processes", "calibration":
        monkeypatch.setattr(f"data.{module}.free_memory", free)
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


@pytest.mark.parametrize("world, allocate, propagate, tokens", [
    (1, "uniform", False, 5 * 32), (1, "uniform", True, 2 * 5 * 32), (2, "uniform", False, 3 * 32),
    (1, "sensitivity", False, 5 * 32 + 14 * 512), (2, "sensitivity", True, 3 * 32 + 14 * 512)])
def test_hidden_states_are_counted(monkeypatch, model, world, allocate, propagate, tokens):
    """Would catch a run that is let in without room for the dense model's states, trials or a process's odd sequence;
    processes that each count all memory as theirs; a dtype that is not the one they are held in."""
    for where in "estimate", "processes":
        monkeypatch.setattr(f"data.{where}.processes", lambda: (0, world))
    monkeypatch.setattr(estimate, "has_goal", lambda **_: propagate)
    dense = GPT.open(model / "m")
    dense.config.raw["dtype"] = "bfloat16"
    args = argparse.Namespace(device="cpu", nsamples=5, seqlen=32, allocate=allocate)
    need = tokens * 32 * 4  # float32 on a CPU whatever the checkpoint holds
    assert estimate.state_bytes(args, dense) == need
    monkeypatch.setattr("data.processes.free_memory", lambda device: world * need)
    estimate.check_memory(args, dense)
    monkeypatch.setattr("data.processes.free_memory", lambda device: world * need - 1)
    with pytest.raises(InputError, match="of activations"):
        estimate.check_memory(args, dense)
    assert estimate.whole_memory(args, dense)["two models"] == 2 * 4 * sum(p.numel() for p in dense.parameters())
    for free, place in (2 * 5 * 32 * 2 + 1, "cuda"), (2 * 5 * 32 * 2, "cpu"):
        monkeypatch.setattr(calibration, "free_memory", lambda device: free)
        assert place_for(dense.config, 5, "cuda", torch.float16) == place


def test_tokens_at_a_time():
    """Would catch windows longer than a pass of which none is looked at."""
    assert [estimate.probe_tokens(seqlen) for seqlen in (1, 512, 4096)] == [512, 512, 4096]
    assert [estimate.tokens_at_a_time(seqlen) for seqlen in (1, 2048, 4096)] == [2048, 2048, 4096]
