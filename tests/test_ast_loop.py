"""The training loop of AST against a plain one that follows the formulas, and what it begins and ends with."""

import argparse
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import ast_loop
import ast_train
from data import load_tokenizer, windows
from data.calibration import watch
from data.stream import Mixture, evaluation_tokens
from dsnot import keep_mask, wanda_score
from eval import perplexity
from gpt import GPT, all_prunable
from test_ast_train import command, files, train  # noqa: F401
from test_dsnot import stats_of

STEPS, LR, END, WARMUP, DECAY, T0, KL, T, SEED, CLIP = 8, 1e-2, 0.3, 2, 0.05, 5, 0.6, 2.0, 7, 0.1


def plain_training(files, every):  # noqa: F811
    """The loop of `train` as the head of ast_method.py tells it: the weights {name: W} and the loss of each step, the
    last masks {name: mask}."""
    student, teacher = (GPT.from_pretrained(files / "model") for _ in range(2))
    mixture = Mixture([str(files / "text.txt")], load_tokenizer(files / "model"), 32, 4)
    masked = {f"{name}.weight" for name in all_prunable(student)}
    W = {name: p.detach().clone() for name, p in student.named_parameters()}
    M, V = ({name: torch.zeros_like(w) for name, w in W.items()} for _ in range(2))
    mask, weights, losses = {name: keep_mask(W[name].abs(), pattern=(2, 4)) for name in masked}, [], []
    for step in range(STEPS):
        if every and step and step % every == 0:
            mask = {name: keep_mask(W[name].abs(), pattern=(2, 4)) for name in masked}
        cosine = END + (1 - END) * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) / 2
        lr = LR * ((step + 1) / WARMUP if step < WARMUP else cosine)
        for name, p in student.named_parameters():
            p.data, p.grad = W[name] * mask[name] if name in masked else W[name].clone(), None
        ids = mixture.batch(SEED, step, 4)
        logits = student(ids[:, :-1]).flatten(0, 1)
        with torch.no_grad():
            target = teacher(ids[:, :-1]).flatten(0, 1)
        p, q = (target / T).softmax(-1), (logits / T).log_softmax(-1)
        loss = KL * T ** 2 * (p * (p.log() - q)).sum(-1).mean()
        loss = loss + (1 - KL) * F.cross_entropy(logits, ids[:, 1:].flatten())
        loss.backward()
        losses.append(loss.item())
        norm = sum(p.grad.square().sum() for p in student.parameters()).sqrt()
        assert norm > CLIP
        for name, p in student.named_parameters():
            g = p.grad * CLIP / norm
            M[name] = 0.9 * M[name] + 0.1 * g
            u = M[name] / (1 - 0.9 ** (step + 1))
            if name in masked:
                u = u + DECAY * min(step / T0, 1) * ~mask[name] * W[name]
            V[name] = 0.95 * V[name] + 0.05 * (u if name in masked else g) ** 2
            W[name] = W[name] - lr * u / ((V[name] / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
        weights.append(dict(W))
    return weights, losses, mask


@pytest.mark.parametrize("average, every", [(0.5, 3), (0.5, 0), (0, 3)])
def test_training_is_the_plain_loop(files, tmp_path, train, monkeypatch, average, every):  # noqa: F811
    """Would catch an option that the loop does not hear, a mask that is chosen too early, late or never, a gradient
    that is not clipped or not forgotten, a mean of other steps, and masks that don't fit it."""
    assert ast_loop.CLIP == 1  # as published
    monkeypatch.setattr(ast_loop, "CLIP", CLIP)
    found = train(tmp_path, "--steps", STEPS, "--save-every", STEPS, "--lr", LR, "--lr-end", END, "--warmup", WARMUP,
                  "--decay", DECAY, "--decay-steps", T0, "--mask-every", every, "--kl-weight", KL, "--temperature", T,
                  "--seed", SEED, "--average", average)["runs"]["ast"]
    weights, losses, mask = plain_training(files, every)
    saved = load_file(tmp_path / "ast" / "model.safetensors")
    last = weights[STEPS - round(average * STEPS):] or weights[-1:]
    mean = {name: sum(W[name] for W in last) / len(last) for name in saved}
    if average and every:
        mask = {name: keep_mask(mean[name].abs(), pattern=(2, 4)) for name in mask}
    assert found["history"][-1]["loss"] == pytest.approx(losses[-1], rel=1e-4)
    for name, W in saved.items():
        assert (W - mean[name] * mask.get(name, 1)).abs().mean() < 1e-5, name


@pytest.mark.parametrize("micro_batch", [2, 5])
def test_masks_by_wanda(files, micro_batch):  # noqa: F811
    """Would catch masks of |W| alone, at first or when they are chosen again, another layer's inputs, and calibration
    text that is left out."""
    args = argparse.Namespace(score="wanda", sparsity=None, pattern="2:4", micro_batch=micro_batch, device="cpu")
    model, ids, inputs = GPT.from_pretrained(files / "model"), torch.randint(384, (5, 32)), {}
    with torch.no_grad(), watch(all_prunable(model), inputs.__setitem__):
        model(ids)
    expected = {name: stats_of(x) for name, x in inputs.items()}
    ast_loop.make_sparse(model, args, None, ids)
    for name, layer in ast_loop.sparse_layers(model).items():
        assert torch.equal(layer.mask, keep_mask(wanda_score(layer.weight, expected[name]), pattern=(2, 4)))
        assert not torch.equal(layer.mask, keep_mask(layer.weight.abs(), pattern=(2, 4)))
        layer.weight.data = torch.randn_like(layer.weight)
        layer.update_mask()
        assert torch.equal(layer.mask, keep_mask(wanda_score(layer.weight, expected[name]), pattern=(2, 4)))


@pytest.mark.parametrize("last, times", [(2.5, 3), (3.5, 2)])
def test_the_best_model_by_validation_is_kept(tmp_path, train, monkeypatch, last, times):  # noqa: F811
    """Would catch the last model in place of the best, also where it is better than the one before."""
    found, saved, save = iter([5.0, 3.0, 4.0, last]), [], ast_loop.save_model
    monkeypatch.setattr(ast_loop, "validation_perplexity", lambda *_: next(found))
    monkeypatch.setattr(ast_loop, "save_model", lambda *args: (saved.append(args[0]), save(*args)))
    train(tmp_path)
    assert saved == times * [tmp_path / "ast"]


def test_the_table_is_of_the_test_text_and_of_what_is_saved(files, tmp_path, train):  # noqa: F811
    """Would catch text that was trained on, and a folder that holds another model or twice its bytes."""
    GPT.from_pretrained(files / "model").bfloat16().save_pretrained(tmp_path / "half", tokenizer_from=files / "model")
    options = "--model", tmp_path / "half", "--steps", 1, "--methods", "ast-slorb", "--slorb-k", 8
    text, table = str(files / "text.txt"), train(tmp_path / "out", *options)["table"]
    ids = evaluation_tokens(text, "test", [text], load_tokenizer(files / "model"), 32)
    for name, folder in ("dense", "half"), ("AST + SLoRB", "out/ast-slorb"):
        expected = perplexity(GPT.from_pretrained(tmp_path / folder), ids, 32)
        assert table[name]["perplexity"] == pytest.approx(expected, rel=1e-5)
    tensors = load_file(tmp_path / "out/ast-slorb/model.safetensors").values()
    assert {W.dtype for W in tensors} == {torch.bfloat16}


def test_where_the_first_weights_come_from(files, tmp_path, train):  # noqa: F811
    """Would catch a dense control that begins with pruned weights, and a start that is not fitted to its mask."""
    table = train(tmp_path, "--methods", "ast", "dense", "--start-from", "swap", "--steps", 1, "--lr", 1e-12)["table"]
    assert table["dense, trained on"]["perplexity"] == table["dense"]["perplexity"]
    run = json.loads((tmp_path / "start" / "pruning.json").read_text())["run"]
    assert [run[name] for name in ("score", "refine", "refit", "propagate", "pattern")] == [
        "wanda", "swap", True, True, "2:4"]


def test_arithmetic_in_bf16():
    x = torch.randn(2, 4)
    for dtype in "float32", "bfloat16":
        with ast_loop.arithmetic(argparse.Namespace(device="cpu", dtype=dtype)):
            assert F.linear(x, x).dtype == getattr(torch, dtype)


def test_validation_test_and_calibration_text(files, tmp_path, monkeypatch):  # noqa: F811
    """Would catch a best model that is chosen by the test text, a table of the validation text, and calibration windows
    that are longer than those of the training."""
    monkeypatch.setattr(sys, "argv", command(files, tmp_path / "out", "--seed", 3))
    _, held_out, calibration, test_ids = ast_train.prepare(ast_train.options())
    text, tokenizer = str(files / "text.txt"), load_tokenizer(files / "model")
    ids = {split: evaluation_tokens(text, split, [text], tokenizer, 32) for split in ("validation", "test")}
    assert torch.equal(held_out, windows(ids["validation"], 33)) and test_ids.tolist() == ids["test"].tolist()
    assert torch.equal(calibration, Mixture([text], tokenizer, 32, 4).batch(3, 0, 128)[:, :-1])


def test_one_shot_masks_of_other_options_and_files_are_others(files, tmp_path, monkeypatch):  # noqa: F811
    """Would catch a finished mask that is taken for that of another seed, window, amount, text or method."""
    text = tmp_path / "text.txt"
    text.write_text("words " * 500)
    runs = []
    monkeypatch.setattr(ast_train, "prune", lambda model, ids, folder, made, *_, **__: runs.append(made))

    def made(*options, **method):
        monkeypatch.setattr(sys, "argv", command(files, tmp_path / "out", "--data", text, *options))
        ast_train.one_shot(ast_train.options(), tmp_path / "start", None, **method)
        return runs.pop()

    first = made(score="wanda")
    assert made("--lr", 1, score="wanda") == first
    others = [made(*options, score="wanda") for options in (
        ["--seed", 1], ["--seqlen", 16], ["--pattern", "4:8"], ["--sparsity", 0.5], ["--model", files / "other"])]
    others.append(made(score="magnitude"))
    text.write_text("other words " * 500)
    others.append(made(score="wanda"))
    assert first not in others


def test_the_gap_that_is_closed(tmp_path, monkeypatch):
    """By hand; would catch a share of the perplexity instead of its logarithm, one that counts from another mask than
    the best of the one-shot ones, windows of another length, and tokens that were not read."""
    found, asked = {"m": 4, "one-shot-magnitude": 64, "one-shot-wanda": 16, "one-shot-sparsegpt": 32, "start": 11,
                    "ast": 8}, set()
    monkeypatch.setattr(ast_train, "one_shot", lambda args, folder, *_, **__: folder.mkdir())
    monkeypatch.setattr(ast_train.GPT, "from_pretrained", lambda folder, **_: argparse.Namespace(
        folder=folder, parameters=lambda: [torch.eye(3)]))
    monkeypatch.setattr(ast_train, "perplexity", lambda model, ids, seqlen, *_, **__: (
        asked.add(seqlen), found[Path(model.folder).name])[1])
    args = argparse.Namespace(model="m", out=tmp_path, device="cpu", seqlen=32, micro_batch=2, one_shot=True,
                              methods=["ast"], steps=3, batch=4)
    rows = ast_train.measure(args, None, torch.zeros(5, 32), tmp_path / "start")
    assert [row["gap_closed"] for name, row in rows.items() if "start" not in name] == pytest.approx(
        [1, -1, 0, -0.5, 0.5])
    assert [row["tokens"] for row in rows.values()] == [0, 0, 160, 160, 160, 160 + 3 * 4 * 32] and asked == {32}
    assert all(row["parameters"] == 3 for row in rows.values())
