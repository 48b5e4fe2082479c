"""The recipe of the model that ships, from texts to a folder, at a size of seconds."""

import argparse
import sys
import typing
from pathlib import Path

import pytest
import torch

from data import load_tokenizer, train_tiny
from data.command import InputError
from gpt import GPT

TEXT = Path(argparse.__file__).read_text()


@pytest.fixture
def train(monkeypatch):
    """Run the command on short texts: train(folder, options...)."""
    monkeypatch.setitem(train_tiny.CONFIG, "vocab_size", 400)
    monkeypatch.setattr(train_tiny, "stdlib_text", lambda split: TEXT[:40_000] if split == "train" else TEXT[40_000:])
    monkeypatch.setattr(train_tiny, "stdlib_source", lambda: Path(typing.__file__).read_text()[:40_000])

    def run(out, *options):
        monkeypatch.setattr(sys, "argv", ["train_tiny", "--device", "cpu", "--hidden-size", "128", "--layers", "1",
                                          "--steps", "4", "--batch", "2", "--seqlen", "32", "--save-every", "2",
                                          "--out", str(out), *options])
        train_tiny.main()
    return run


def test_every_window_of_the_validation_counts_once():
    """Would catch a last batch that is smaller and counts as much as the others."""
    model, ids = train_tiny.new_model(128, 1, 4), torch.randint(400, (33, 5))
    expected = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).item()
    assert train_tiny.validation_loss(model, ids).item() == pytest.approx(expected, rel=1e-5)


def test_documentation_is_not_learned_by_heart():
    """Would catch a change of the recipe that ships, and a long training that reads few pages again and again."""
    assert train_tiny.documentation_share(549_679, 2000 * 32 * 256) == 0.3
    assert train_tiny.documentation_share(549_679, 1500 * 128 * 256) == pytest.approx(10 * 549_679 / 49_152_000)


def test_a_stopped_training_ends_with_the_same_bytes(tmp_path, train, monkeypatch, capsys):
    """Would catch a recipe that no longer runs, and a run that does not go on."""
    train(tmp_path / "whole")
    draw = train_tiny.draw

    def stop(streams, share, seed, step, *sizes):
        if step == 3:
            raise KeyboardInterrupt
        return draw(streams, share, seed, step, *sizes)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_tiny, "draw", stop)
        train(tmp_path / "cut")
    capsys.readouterr()
    train(tmp_path / "cut")
    assert "going on at step 2" in capsys.readouterr().out
    whole, cut = (tmp_path / name / "model.safetensors" for name in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "cut"}
    with pytest.raises(InputError, match="whole holds a finished model: choose another folder, or delete it"):
        train(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # at the very end
        patch.setattr(train_tiny.shutil, "rmtree", lambda path, **_: stop(None, 0, 0, 3))
        train(tmp_path / "late")
    train(tmp_path / "late")
    assert (tmp_path / "late" / "model.safetensors").read_bytes() == whole.read_bytes()
    ids = load_tokenizer(tmp_path / "cut").encode("the parser")
    model = GPT.from_pretrained(tmp_path / "cut")
    assert model(torch.tensor([ids])).isfinite().all() and model.config.raw["max_position_embeddings"] == 32


def test_a_damaged_state_gets_a_sentence(tmp_path, train):
    (tmp_path / "out.training").mkdir()
    (tmp_path / "out.training" / "state.pt").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="state.pt is damaged: delete it"):
        train(tmp_path / "out", "--seed", str(2**62))
