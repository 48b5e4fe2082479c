"""What a program that calls these files, and not their commands, relies on: no graph is held, nothing is left changed,
what can't be meant is refused."""

import ast
import copy
import json
import re
import subprocess
import sys
from importlib import import_module

import pytest
import torch
import torch.nn as nn

import ast_method
from allocate import allocation
from ast_method import AnnealedAdamW, training_loss
from ast_train import SparseLinear, decay_at, distillation_loss
from conftest import ROOT, make_checkpoint
from data.calibration import InputStats, watch
from data.command import InputError
from data.config import check
from data.text import windows
from dsnot import (ALLOCATIONS, dsnot_refine, keep_mask, prune_layer, sparsegpt, swap_and_refit, swap_refine,
                   wanda_score)
from eval import perplexity
from gpt import GPT, Config, all_prunable
from sparse_matmul import compress
from walk import prune


def test_the_snippets_of_the_page(capsys):
    for snippet in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        exec(snippet, {})
    masked, swapped, refitted, *text, dense, pruned = capsys.readouterr().out.splitlines()
    assert 1 > float(masked) > float(swapped) > float(refitted) > 0
    assert text[0].startswith("Return the value of") and 10 < float(dense) < 40
    assert float(dense) < float(pruned) < 3 * float(dense)


def test_scripts_name_what_there_is():
    """Would catch a script of tests/ or results/, which no test runs, that a renaming elsewhere has left behind."""
    ours = {path.stem: import_module(path.stem) for path in ROOT.glob("*.py")}
    for script in [*ROOT.glob("tests/*.py"), *ROOT.glob("results/*.py")]:
        for node in ast.walk(ast.parse(script.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in [*ours, "data"]:
                found, names = import_module(node.module), [alias.name for alias in node.names]
            elif isinstance(node, ast.Attribute) and getattr(node.value, "id", None) in ours:
                found, names = ours[node.value.id], [node.attr]
            else:
                continue
            for name in names:
                assert hasattr(found, name), f"{script.name}, line {node.lineno}: {found.__name__} has no {name}"


LIKE_WINDOWS = """import runpy, sys, torch, torch.distributed as dist
sys.modules.update(dict.fromkeys(["fcntl", "resource", "triton"]))  # which can't be imported then
del dist.init_process_group, dist.HashStore, torch.compile  # which takes seconds, and fails in some locales
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("command", [
    ["dsnot.py", "--calib", "text.txt", "--data", "text.txt", "--seqlen", "16", "--nsamples", "2", "--out", "sparse"],
    ["ast_train.py", "--data", "text.txt", "--eval-data", "text.txt", "--seqlen", "16", "--steps", "2", "--batch", "2",
     "--methods", "ast", "--no-one-shot", "--no-compile", "--out", "trained"],
    ["eval.py", "--speed", "--json", "speed.json"]])
def test_what_linux_alone_has_is_not_needed(command, model, tmp_path):
    """Would catch a command that needs a module, or a part of PyTorch, that Windows does not have, or UTF-8 as the
    encoding of files where nobody asks for another."""
    config = tmp_path / "m/config.json"
    raw = json.loads(config.read_text()) | {"_name_or_path": "models/\u6771\u4eac"}
    config.write_text(json.dumps(raw, ensure_ascii=False), "utf-8")
    (tmp_path / "text.txt").write_text("the model reads words and the words are few " * 100)
    done = subprocess.run([sys.executable, "-X", "utf8=0", "-c", LIKE_WINDOWS, ROOT / command[0], *command[1:],
                           "--model", "m"], cwd=tmp_path,
                          env=dict(LC_ALL="C", PYTHONCOERCECLOCALE="0", OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)),
                          capture_output=True, text=True)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    make_checkpoint(tmp_path / "m")
    return GPT.from_pretrained(tmp_path / "m")


@pytest.fixture
def layer():
    """A layer with its inputs' statistics, which were collected with gradients on."""
    torch.manual_seed(0)
    linear, stats = nn.Linear(64, 24), InputStats(64, gram=True)
    for _ in range(8):
        stats.add(nn.Linear(64, 64)(torch.randn(32, 64)))
    return linear.weight, stats


def test_statistics_hold_no_graph(model):
    """Would catch a calibration loop that runs out of memory, each pass's activations kept by the sums."""
    linears = all_prunable(model)
    stats = {name: InputStats(linear.in_features, gram=True) for name, linear in linears.items()}

    def seen(name, x):
        for sequence in x:
            stats[name].add(sequence)

    with watch(linears, seen):
        model(torch.randint(0, 64, (3, 16)))
    assert all(s.sequences == 3 and not (s.gram.requires_grad or s.sum.requires_grad) for s in stats.values())


def test_parameters_are_pruned_like_tensors(layer):
    W, stats = layer
    with torch.inference_mode():  # in which many collect them
        stats.add(torch.randn(32, 64))
    gram = stats.gram
    score = wanda_score(W, stats)
    keep = keep_mask(score, 0.5)
    for found in (score, sparsegpt(W, gram, sparsity=0.5), swap_and_refit(W, keep, gram),
                  prune_layer(W, stats, score="sparsegpt", refine="dsnot+swap", sparsity=0.5)):
        assert not found.requires_grad
    assert torch.equal(swap_refine(W, keep, gram), swap_refine(W.detach(), keep, gram))
    assert torch.equal(dsnot_refine(W, keep, stats, score), dsnot_refine(W.detach(), keep, stats, score))


def test_what_cannot_be_meant_is_refused(layer, model, tmp_path):
    W, stats = layer
    keep = keep_mask(W.abs(), 0.5)
    for wrong in (lambda: keep_mask(W, 70), lambda: keep_mask(W, -0.1), lambda: sparsegpt(W, stats.gram, sparsity=70),
                  lambda: swap_refine(W[:5], keep, stats.gram), lambda: dsnot_refine(W[:5], keep, stats, W[:5]),
                  lambda: prune_layer(W, stats, score="obs", refine="none", sparsity=0.5),
                  lambda: prune_layer(W, stats, score="wanda", refine="swaps", sparsity=0.5),
                  lambda: allocation(model, None, [], 0.5, "evo"), lambda: allocation(model, None, [], None, "owl"),
                  lambda: SparseLinear(nn.Linear(64, 8), slorb_k=7), lambda: compress(W, bits=16),
                  lambda: stats.add(torch.randn(3, 32, 64)), lambda: keep_mask(W, pattern=(4, 2)),
                  lambda: prune_layer(W, InputStats(64), score="wanda", refine="none", sparsity=0.5)):
        with pytest.raises(AssertionError):
            wrong()
    with pytest.raises(TypeError):  # the name that swap_refine gives what is called cycles here
        prune_layer(W, stats, score="wanda", refine="swap", sparsity=0.5, max_swaps=3)
    for refine in swap_refine, dsnot_refine:
        with pytest.raises(InputError, match="--pattern 2:5 needs rows that 5 divides"):
            refine(W, keep, *([stats, W] if refine is dsnot_refine else [stats.gram]), pattern=(2, 5))
    with pytest.raises(InputError, match="load it with stream=True"):
        prune(model, torch.randint(0, 64, (2, 16)), tmp_path / "out", {}, prune_layer, score="wanda", refine="none",
              sparsity=0.5)
    assert "evo" not in ALLOCATIONS and not (tmp_path / "out").exists()


def test_models_are_saved_only_if_they_can_be_read_again(model, tmp_path):
    config = Config(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                    num_key_value_heads=1, head_dim=16, rms_norm_eps=1e-5, rope_theta=1e4, tie_word_embeddings=False)
    check(config)
    with pytest.raises(InputError, match="make its Config by from_dict"):
        GPT(config).save_pretrained(tmp_path / "out")
    for name, linear in all_prunable(model).items():
        model.set_submodule(name, SparseLinear(linear))
    with pytest.raises(InputError, match="layers in training can't be saved"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    ids = torch.randint(0, 64, (2, 16))
    expected, drawn = model(ids), torch.get_rng_state()
    for name, linear in all_prunable(model).items():
        model.set_submodule(name, linear.merge())
    assert torch.equal(torch.get_rng_state(), drawn)
    model.save_pretrained(tmp_path / "out")
    torch.testing.assert_close(GPT.from_pretrained(tmp_path / "out")(ids), expected)


def test_the_copy_of_a_model_needs_none_of_its_file(model):
    twin = copy.deepcopy(model)
    assert twin.source is model.source
    assert twin.lm_head.weight.data_ptr() != model.lm_head.weight.data_ptr()


def test_tokens_may_be_of_any_kind(model):
    ids = torch.randint(0, 64, (40,))
    expected = perplexity(model, ids, 16)
    for kind in torch.int32, torch.int16, torch.uint8:
        assert perplexity(model, ids.to(kind), 16) == expected
    assert windows(ids.short().numpy(), 16).dtype == torch.long
    with pytest.raises(InputError, match="token -100 is none of the model's 300"):
        model(torch.tensor([[1, -100]]))


@pytest.mark.parametrize("ruined", [None, 1])
def test_scaled_gradients(ruined):
    """float16 training scales the loss; a step whose gradient is not finite is left out. Would catch an update made of
    gradients that are still scaled, and moments that one such step ruins."""
    def trained(scaled):
        torch.manual_seed(0)
        net = nn.Sequential(SparseLinear(nn.Linear(64, 24)))
        x, optimizer = torch.randn(5, 64), AnnealedAdamW(net, 1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for i in range(5):
            optimizer.param_groups[0]["decay"] = 0.1
            loss = net(x).square().sum()
            if i == ruined:
                if not scaled:
                    continue
                loss = loss * torch.inf
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return net[0].weight.detach()
    torch.testing.assert_close(trained(True), trained(False))


def test_the_command_of_ast_offers_its_functions():
    assert decay_at(5, 0.2, 10) == 0.1 and ast_method.SparseLinear is SparseLinear
    assert distillation_loss(torch.ones(1, 2, 5), torch.ones(1, 2, 5), 2.0) == 0


def test_logits_of_other_texts_are_no_teachers():
    student, teacher = torch.randn(2, 1024, 5), torch.randn(1, 1024, 5)
    with pytest.raises(ValueError):
        distillation_loss(student, teacher, 2.0)
    with pytest.raises(ValueError):
        training_loss(student, teacher, torch.zeros(2, 1024, dtype=torch.long), kl_weight=0.5)
