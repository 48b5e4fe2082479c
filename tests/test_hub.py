"""Presets and the Hub: what a model's name leads to, what is fetched, and what is said where that fails."""

import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

import ast_train
import dsnot
import eval
import gpt
import sparse_matmul
from conftest import ROOT
from data.command import InputError
from data.hub import model_folder, repository
from test_checkpoint import refused


def test_unknown_model(folder, monkeypatch, capsys):
    """A misspelt preset, a folder that is not there, and one that holds models."""
    assert "llama2-7b" in refused(monkeypatch, capsys, "lama2-7b")
    assert "no model" in refused(monkeypatch, capsys, "./nowhere")
    assert f"config.json is missing; give {folder}" in refused(monkeypatch, capsys, folder.parent)
    (folder.parent / "half.partial").mkdir()
    assert "half is not finished yet: give the command" in refused(monkeypatch, capsys, folder.parent / "half")


def test_a_folder_named_like_a_preset(folder, tmp_path, monkeypatch):
    """Would catch "./tiny" that gets the weights of that folder and the tokenizer of the model that ships."""
    folder.rename(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    for name in "./tiny", "tiny/", Path("tiny"):
        assert model_folder(model_folder(name)) == Path("tiny")
    assert model_folder("tiny") != Path("tiny")


def test_hub_unreachable(tmp_path):
    """The real command without a network: one sentence that says what to do, soon."""
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "gpt.py", "--model", "llama2-7b"], cwd=ROOT, env=environment,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "meta-llama/Llama-2-7b-hf" in done.stderr and "--model FOLDER" in done.stderr


@pytest.mark.parametrize("held, calls", [("model.safetensors", 1), ("pytorch_model.bin", 2)])
def test_safetensors_are_preferred(held, calls, tmp_path, monkeypatch):
    """Weights that are downloaded twice, or not at all where only PyTorch's files exist."""
    asked = []

    def download(target, allow_patterns):
        asked.append(allow_patterns)
        if any(fnmatch(held, pattern) for pattern in allow_patterns):
            (tmp_path / held).touch()
        return str(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert model_folder("opt-125m", weights=False) == tmp_path and not any(tmp_path.iterdir())
    assert model_folder("opt-125m") == tmp_path and [p.name for p in tmp_path.iterdir()] == [held]
    assert len(asked) == 1 + calls
    assert not any(fnmatch("consolidated.safetensors", pattern) for patterns in asked for pattern in patterns)


def test_nothing_large_is_fetched_in_vain(tmp_path, monkeypatch):
    """Would catch a hundred gigabytes that are fetched before the sentence that the model can't be read."""
    asked = []

    def download(target, allow_patterns):
        asked.extend(allow_patterns)
        (tmp_path / "config.json").write_text('{"model_type": "gemma2"}')
        return str(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for words in [dsnot, "--sparsity", "0.5"], [dsnot, "--dry-run"], [ast_train], [eval], [sparse_matmul], [gpt]:
        monkeypatch.setattr(sys, "argv", ["command", "--device", "cpu", "--model", "google/gemma-2-9b", *words[1:]])
        with pytest.raises(InputError, match="gemma2|no tokenizer"):
            words[0].main()
    assert asked and not any(fnmatch(name, pattern) for pattern in asked
                             for name in ("model.safetensors", "pytorch_model.bin"))


def test_the_folder_of_an_organisation_hides_no_model_of_the_hub(tmp_path, monkeypatch):
    """Would catch llama2-13b refused where llama2-7b was copied to meta-llama/Llama-2-7b-hf."""
    (tmp_path / "meta-llama").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda target, allow_patterns: target)
    for name in "llama2-13b", "meta-llama/Llama-2-13b-hf":
        assert model_folder(name, weights=False) == Path("meta-llama/Llama-2-13b-hf")
    with pytest.raises(InputError, match="there is no folder ./meta-llama/x: check its name"):
        model_folder("./meta-llama/x")


def test_a_run_is_known_by_its_repository(tmp_path):
    """Would catch a run that can't go on because the model's README has changed on the Hub."""
    cache = tmp_path / "models--a--b"
    for name in "1", "2":
        (cache / "snapshots" / name).mkdir(parents=True)
        assert repository(cache / "snapshots" / name) == str(cache.resolve())
    assert repository(cache) == str(cache.resolve())


@pytest.mark.parametrize("error, words", [
    ("GatedRepoError", "ask for access"), ("RepositoryNotFoundError", "no public model"),
    ("HTTPError", "--model FOLDER"), ("LocalEntryNotFoundError", "out of reach.*--model FOLDER"),
    ("HFValidationError", "Hub id")])
def test_hub_errors(error, words, monkeypatch):
    """A traceback, or the wrong way out, where the Hub refuses, does not know the model or hangs up."""
    kind = getattr(pytest.importorskip("huggingface_hub.errors"), error)

    def download(*_, **__):
        raise kind.__new__(kind)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(InputError, match=words):
        model_folder("meta-llama/Llama-2-7b-hf")


def test_what_is_fetched(monkeypatch):
    """Would catch an index or the end of a text left on the Hub, and a tokenizer fetched for a config.json alone."""
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda target, allow_patterns: asked.append(
        allow_patterns) or "nowhere")
    model_folder("opt-125m", config_only=True)
    model_folder("opt-125m")
    assert asked[0] == ["config.json"] and "generation_config.json" in asked[1]
    assert "model.safetensors.index.json" in asked[1] and "pytorch_model.bin.index.json" in asked[2]
