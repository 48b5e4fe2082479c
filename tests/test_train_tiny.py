"""The recipe of the model that ships, from texts to a folder, at a size of seconds."""

import argparse
import copy
import random
import shutil
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from data import load_tokenizer, train_tiny
from data.command import InputError
from data.text import windows
from data.writer import alone_in
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


def stop_at_the_end(monkeypatch, run):
    """Stop a training when only its state is left to be removed."""
    rmtree = shutil.rmtree

    def stop(path, **how):
        if (path / "state.pt").exists():
            raise KeyboardInterrupt
        rmtree(path, **how)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", stop)
        run()


def test_every_window_of_the_validation_counts_once():
    """Would catch a last batch that is smaller and counts as much as the others."""
    model, ids = train_tiny.new_model(128, 1, 4), torch.randint(400, (33, 5))
    expected = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).item()
    assert train_tiny.validation_loss(model, ids).item() == pytest.approx(expected, rel=1e-5)


def test_documentation_is_not_learned_by_heart():
    """Would catch a change of the recipe that ships, and a long training that reads few pages again and again."""
    assert train_tiny.documentation_share(549_679, 2000 * 32 * 256) == 0.3
    assert train_tiny.documentation_share(549_679, 1500 * 128 * 256) == pytest.approx(10 * 549_679 / 49_152_000)


@pytest.mark.usefixtures("train")
def test_source_code_spells_tokens_out(tmp_path, monkeypatch):
    """Would catch a text that ends where a string of somebody's program says so; in others' texts it does."""
    monkeypatch.setattr(train_tiny, "stdlib_source", lambda: Path(typing.__file__).read_text()[:40_000] + "</s>" * 9)
    tokenizer, (_, source) = train_tiny.read(tmp_path, packages=False)
    assert 2 not in source and tokenizer.decode(source.tolist()).endswith("</s>" * 9)
    assert load_tokenizer(tmp_path).encode("</s>")[-1] == 2 == len(load_tokenizer(tmp_path).encode("</s>"))


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
    stop_at_the_end(monkeypatch, lambda: train(tmp_path / "late"))
    train(tmp_path / "late")
    assert "going on at step 4" in capsys.readouterr().out
    assert (tmp_path / "late" / "model.safetensors").read_bytes() == whole.read_bytes()
    ids = load_tokenizer(tmp_path / "cut").encode("the parser")
    model = GPT.from_pretrained(tmp_path / "cut")
    assert model(torch.tensor([ids])).isfinite().all() and model.config.raw["max_position_embeddings"] == 32


def test_a_damaged_state_gets_a_sentence(tmp_path, train):
    (tmp_path / "out.training").mkdir()
    (tmp_path / "out.training" / "state.pt").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="state.pt is damaged: delete it"):
        train(tmp_path / "out", "--seed", str(2**62))
    for other in [], {"step": 1}:
        torch.save(other, tmp_path / "out.training" / "state.pt")
        with pytest.raises(InputError, match="state.pt is damaged: delete it"):
            train(tmp_path / "out")
    whole = (tmp_path / "out.training" / "state.pt").read_bytes()
    for i in range(60):  # a damaged pickle can raise anything
        rng, damaged = random.Random(i), bytearray(whole)
        for _ in range(4):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        (tmp_path / "out.training" / "state.pt").write_bytes(damaged)
        with pytest.raises(InputError, match="state.pt"):
            train_tiny.last_state(tmp_path / "out.training" / "state.pt", None, None, [])


def test_a_training_of_another_python_is_not_gone_on_with(tmp_path, train, monkeypatch):
    """Would catch a model that has read the documentation of two Pythons."""
    stop_at_the_end(monkeypatch, lambda: train(tmp_path / "out"))
    monkeypatch.setattr("platform.python_version", lambda: "3.99.0")
    with pytest.raises(InputError, match="other options, or of another Python"):
        train(tmp_path / "out")


def test_a_folder_of_the_users_is_not_taken_for_a_state(tmp_path, train):
    """Would catch one that is removed at the end of a training."""
    for name in "thesis.tex", ".git":
        (tmp_path / "out.training").mkdir()
        (tmp_path / "out.training" / name).write_text("mine")
        with pytest.raises(InputError, match="out.training is no unfinished training of this program: move it away"):
            train(tmp_path / "out")
        assert (tmp_path / "out.training" / name).read_text() == "mine"
        shutil.rmtree(tmp_path / "out.training")


def test_one_training_at_a_time_fills_a_folder(tmp_path, train):
    with alone_in(tmp_path / "out.training"), pytest.raises(InputError, match="another run is writing to"):
        train(tmp_path / "out")


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path, train, monkeypatch):
    """Would catch a model of NaN that is saved as a finished one."""
    with pytest.raises(InputError, match="the validation loss is nan after 2 steps: give a lower --lr"):
        train(tmp_path / "out", "--lr", "1e30")
    assert not (tmp_path / "out").exists()


def test_the_schedule():
    """Would catch a warm-up that begins with nothing, and a rate that does not fall to 0."""
    found = [train_tiny.schedule(step, 1100, 2.0) for step in (0, 99, 100, 350, 600, 1100)]
    assert found == pytest.approx([0.02, 2, 2, 1 + 0.5 ** 0.5, 1, 0])


def test_windows_are_drawn_by_share_and_by_step():
    """Would catch source code in the place of documentation, a text's end that is never read, and a seed that nothing
    hears."""
    streams = [np.arange(start, start + 10, dtype=np.uint16) for start in (0, 100)]
    ids = train_tiny.draw(streams, 0.3, 5, 7, 1000, 8)
    assert torch.equal(ids, ids[:, :1] + torch.arange(9)) and set(ids[:, 0].tolist()) == {0, 1, 100, 101}
    assert (ids[:, 0] < 100).double().mean().item() == pytest.approx(0.3, abs=0.06)
    for seed, step, same in (5, 7, True), (6, 7, False), (5, 8, False):
        assert torch.equal(ids, train_tiny.draw(streams, 0.3, seed, step, 1000, 8)) == same


def test_the_first_weights():
    """Would catch projections back to the hidden state that are as large as the others, or larger."""
    model = train_tiny.new_model(256, 2, 8)
    for name, W in model.named_parameters():
        if W.dim() == 2:
            expected = 0.01 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            assert W.std().item() == pytest.approx(expected, rel=0.05), name


def test_training_is_the_plain_loop(tmp_path, monkeypatch):
    """Would catch another target than the next token, a gradient that is not clipped or not forgotten, weight decay of
    norms in place of matrices, and a rate that does not follow the schedule; a state of other options that goes on."""
    monkeypatch.setattr(train_tiny, "fast_in_bf16", lambda device: False)
    monkeypatch.setitem(train_tiny.CONFIG, "vocab_size", 400)
    torch.manual_seed(0)
    streams = [np.random.RandomState(0).randint(400, size=n).astype(np.uint16) for n in (20, 100)]
    args = argparse.Namespace(hidden_size=128, layers=1, packages=False, steps=4, batch=48, seqlen=8, lr=0.5, seed=3,
                              compile=False, device="cpu", save_every=4)
    model = train_tiny.new_model(128, 1, 8)
    for W in model.parameters():
        W.data *= 3
    twin = copy.deepcopy(model)
    groups = [dict(params=[W], weight_decay=0.1 if W.dim() == 2 else 0.0) for W in twin.parameters()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step in range(4):
        ids = train_tiny.draw(streams, 10 * 20 / (4 * 48 * 8), 3, step, 48, 8)
        optimizer.zero_grad()
        F.cross_entropy(twin(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        assert torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0) > 1
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * (step + 1) / 100
        optimizer.step()
    train_tiny.train(args, model, streams, torch.arange(18).view(2, 9), tmp_path / "state.pt")
    for (name, W), other in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(W, other, rtol=1e-4, atol=1e-5, msg=name)
    for name, value in dict(packages=True, steps=5, batch=3, seqlen=9, lr=0.4, seed=4).items():
        with pytest.raises(InputError, match="belongs to a run with other options"):
            train_tiny.train(argparse.Namespace(**vars(args) | {name: value}), model, streams, None,
                             tmp_path / "state.pt")


def test_what_is_read_and_what_is_written(tmp_path, train, monkeypatch):
    """Would catch a validation on training text, documentation taken for source code, and a folder twice as large."""
    seen = []
    monkeypatch.setattr(train_tiny, "train", lambda args, model, streams, held_out, file: (
        seen.append(([stream.tolist() for stream in streams], held_out)), [])[1])
    train(tmp_path / "out")
    tokenizer, ((streams, held_out),) = load_tokenizer(tmp_path / "out"), seen
    docs, source = TEXT[:40_000], Path(typing.__file__).read_text()[:40_000]
    assert streams[0] == tokenizer.encode(docs) and tokenizer.decode(streams[1][1:200]) in source
    assert torch.equal(held_out, windows(tokenizer.encode(TEXT[40_000:]), 33))
    assert {W.dtype for W in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
