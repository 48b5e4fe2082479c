"""The command of dsnot.py: what it writes, what it refuses, what its runs are called and what it says."""

import argparse
import json
import math
import os
import resource
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import dsnot
from conftest import ROOT, make_checkpoint
from data import load_text, load_tokenizer
from data.command import run
from data.method import shared_by
from data.writer import alone_in
from eval import perplexity
from gpt import GPT, Config, layer_inputs, prunable
from test_gpt import theirs


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
    made = json.loads((tmp_path / "out" / "pruning.json").read_text())["run"]
    assert (made["sparsity"] is None) == ("--pattern" in options)
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


def test_each_row_is_the_perplexity_of_its_model(monkeypatch, model, tmp_path):
    """Would catch the dense model measured in another's place, and text that calibration has read."""
    command(monkeypatch, model, tmp_path / "out", "--sparsity", "0.6", "--compare", "--json", str(tmp_path / "r.json"))
    ids = load_tokenizer(model / "m").encode(load_text(str(model / "text.txt"), "held-out"))
    rows = json.loads((tmp_path / "r.json").read_text())["results"]["rows"]
    for folder, row in zip((model / "m", tmp_path / "out.unrefined", tmp_path / "out"), rows, strict=True):
        assert row["perplexity"] == pytest.approx(perplexity(GPT.from_pretrained(folder), ids, 32), rel=1e-5)


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


def test_what_names_a_run(monkeypatch, model):
    """Would catch shares that another number of processes has found taken for those of this one, and a text that is
    another one because its path is written in another way."""
    def name(**options):
        args = dict(nsamples=4, seqlen=32, seed=0, calib=f"{model}/text.txt", pattern=None, allocate="uniform")
        return shared_by(argparse.Namespace(**args | options), GPT.open(model / "m").source)
    assert name() == name(calib=f"{model}/m/../text.txt") != name(calib=f"{model}/m/config.json")
    before = name(calib="tiny"), name(calib="tiny-code"), name()
    monkeypatch.setattr("platform.python_version", lambda: "3.99.0")  # whose library these texts are
    after = name(calib="tiny"), name(calib="tiny-code"), name()
    assert [a == b for a, b in zip(before, after)] == [False, False, True]
    assert after[0]["files"][-1] == ["tiny, by Python's version", "3.99.0"]
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
