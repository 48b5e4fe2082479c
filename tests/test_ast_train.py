"""The training loop of AST against being spread and fed nonsense."""

import argparse
import functools
import json
import os
import socket
import subprocess
import sys
import typing
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file

import ast_loop
import ast_train
import bench_ast
import compressed
from conftest import ROOT, make_checkpoint
from data import load_text, load_tokenizer
from data.command import InputError
from data.device import fast_in_bf16
from data.stream import evaluation_tokens, open_bin, tokens, write_bin
from data.train_tiny import train_tokenizer
from gpt import GPT, Config, all_prunable

CONFIG = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=384, hidden_size=32, intermediate_size=64,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, hidden_act="silu", rms_norm_eps=1e-5,
    rope_theta=10000.0, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    torch_dtype="float32")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a text and a random model: text.txt, model/."""
    root = tmp_path_factory.mktemp("ast")
    text = "".join(Path(module.__file__).read_text() for module in (argparse, typing))
    (root / "text.txt").write_text(text)
    (root / "tokenizer").mkdir()
    train_tokenizer(root / "tokenizer" / "tokenizer.model", text[:50000], CONFIG["vocab_size"])
    for seed, name in enumerate(["model", "other"]):
        torch.manual_seed(seed)
        model = GPT(Config.from_dict(CONFIG))
        for weight in model.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.05)
        model.save_pretrained(root / name, tokenizer_from=root / "tokenizer")
    return root


def command(files, out, *options):
    model, text = str(files / "model"), str(files / "text.txt")
    return ["ast_train.py", "--model", model, "--data", text, "--eval-data", text, "--out", str(out),
            "--methods", "ast", "--seqlen", "32", "--batch", "4", "--micro-batch", "2", "--steps", "12",
            "--warmup", "2", "--lr", "3e-3", "--mask-every", "3", "--decay-steps", "6", "--save-every", "3",
            "--no-one-shot", "--no-compile", "--start-from", "dense", "--dtype", "float32", "--device", "cpu",
            *map(str, options)]


@pytest.fixture
def train(files, monkeypatch):
    """Run the command in this process -> the results that it records."""
    def run(out, *options):
        monkeypatch.setattr(sys, "argv", command(files, out, "--json", files / "run.json", *options))
        ast_train.main()
        return json.loads((files / "run.json").read_text())["results"]
    return run


# the training

def check_sparse(folder, source):
    """Exactly two of four in every prunable layer, everything else dense, every name and dtype as it was."""
    tensors, dense = load_file(folder / "model.safetensors"), load_file(source / "model.safetensors")
    names = {f"{name}.weight" for name in all_prunable(GPT.from_pretrained(source))}
    assert len(names) == 14 and tensors.keys() >= dense.keys()
    for name in dense:
        assert tensors[name].dtype == dense[name].dtype
        assert name not in names or ((tensors[name] != 0).view(-1, 4).sum(1) == 2).all()
    return tensors


def test_it_learns_and_transformers_loads_what_it_writes(files, tmp_path, train, capsys):
    transformers = pytest.importorskip("transformers")
    found = train(tmp_path, "--methods", "ast", "ast-slorb", "dense", "--one-shot", "--slorb-k", 8, "--steps", 9)
    assert (tmp_path / "curve.png").stat().st_size > 10_000
    rows, history = found["table"], found["runs"]["ast"]["history"]
    assert list(rows) == ["dense", "one-shot magnitude", "one-shot wanda", "one-shot sparsegpt", "AST", "AST + SLoRB",
                          "dense, trained on"]
    assert rows["AST"]["tokens"] == 9 * 4 * 32 and rows["AST"]["perplexity"] < rows["one-shot sparsegpt"]["perplexity"]
    kept = {name: row["parameters"] for name, row in rows.items()}
    assert kept["AST"] == kept["one-shot magnitude"] < kept["AST + SLoRB"] < kept["dense"]
    assert rows["dense"]["tokens"] == rows["one-shot magnitude"]["tokens"] == 0 < rows["one-shot wanda"]["tokens"]
    assert history[-1]["flips_all"] > 0 and "gap closed" in capsys.readouterr().out
    ids = torch.randint(384, (2, 20))
    check_sparse(tmp_path / "ast", files / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ast")
    assert (theirs(ids).logits - GPT.from_pretrained(tmp_path / "ast")(ids)).abs().max() < 1e-4

    tensors = check_sparse(tmp_path / "ast-slorb", files / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ast-slorb")
    for name, weight in theirs.named_parameters():  # the lines that the docstring of save_model gives
        if (S := tensors.get(name.replace("weight", "slorb_S"))) is not None:
            weight.data += S.repeat_interleave(8, 1) * tensors[name.replace("weight", "slorb_X")]
    assert (theirs(ids).logits - GPT.from_pretrained(tmp_path / "ast-slorb")(ids)).abs().max() < 1e-4


def test_swaps_make_the_first_weights(files, tmp_path, train):
    """A run too slow to move a weight ends where it began: at a 2:4 model whose weights were fitted to their mask."""
    found = train(tmp_path, "--start-from", "swap", "--steps", 1, "--lr", 1e-12)
    first, last = GPT.from_pretrained(tmp_path / "start").state_dict(), check_sparse(tmp_path / "ast", files / "model")
    assert all((first[name] - value).abs().max() < 1e-9 for name, value in last.items())
    dense = train(tmp_path / "dense", "--steps", 1, "--lr", 1e-12)
    assert found["table"]["AST"]["perplexity"] == found["table"]["swaps + refit (start)"]["perplexity"]
    assert found["runs"]["ast"]["history"][0]["loss"] < dense["runs"]["ast"]["history"][0]["loss"]
    with pytest.raises(InputError, match="start holds a finished run, which differs in seed"):  # and is still there
        train(tmp_path, "--start-from", "swap", "--steps", 1, "--lr", 1e-12, "--seed", 5)
    assert (tmp_path / "start" / "model.safetensors.index.json").is_file()


def test_the_dense_control_learns(tmp_path, train):
    """Would catch one that distils from itself, whose gradient is rounding; options of sparse models mean nothing to
    it."""
    found = train(tmp_path, "--methods", "dense", "--kl-weight", 1)
    loss, decay = [[row[key] for row in found["runs"]["dense"]["history"]] for key in ("loss", "decay")]
    assert min(loss) > 1 and not any(decay)
    assert found["table"]["dense, trained on"]["perplexity"] < 0.75 * found["table"]["dense"]["perplexity"]
    assert train(tmp_path, "--methods", "dense", "--kl-weight", 0.5, "--temperature", 3)["table"] == found["table"]


@pytest.mark.parametrize("method", ["ast", "dense"])
def test_models_that_cannot_be_trained_are_refused_at_once(files, tmp_path, train, monkeypatch, method):
    """Would catch days of training before a refusal."""
    train(tmp_path / "first", "--methods", "ast", "ast-slorb", "--slorb-k", 8, "--steps", 1)
    compressed.save_compressed(tmp_path / "first" / "ast", tmp_path / "small")
    monkeypatch.setattr(ast_train, "train", None)
    for model, words in (tmp_path / "small", "holds compressed 2:4 layers"), (
            tmp_path / "first" / "ast-slorb", "has SLoRB parameters: give the dense model"):
        with pytest.raises(InputError, match=words):
            train(tmp_path / "out", "--model", model, "--methods", method)
    less = GPT(Config.from_dict(CONFIG | dict(vocab_size=96)))
    less.save_pretrained(tmp_path / "less", tokenizer_from=files / "model")
    with pytest.raises(InputError, match="is none of the model's 96: the tokenizer is not its own"):
        train(tmp_path / "out", "--model", tmp_path / "less", "--methods", method)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="24 does not divide the 32 inputs of self_attn.q_proj: give --slorb-k 16, or"):
        train(tmp_path / "out", "--methods", method, "ast-slorb", "--slorb-k", 24)


def test_the_ablations_do_what_they_say(tmp_path, train):
    run = lambda name, *options: train(tmp_path / name, "--steps", 4, *options)["runs"]["ast"]
    base = run("base")
    for name, options in ("whole", ["--micro-batch", 4, "--checkpoint-activations"]), ("uneven", ["--micro-batch", 3]):
        other = run(name, *options)
        assert abs(base["history"][-1]["loss"] - other["history"][-1]["loss"]) < 1e-5  # only the order of sums differs
    fixed = run("fixed", "--mask-every", 0, "--decay-steps", 0, "--kl-weight", 0, "--score", "wanda", "--sparsity", .75)
    assert fixed["flips"] == [0, 0] and fixed["history"][-1]["decay"] == 3e-3  # static
    tensors = load_file(tmp_path / "fixed" / "ast" / "model.safetensors")
    for name in ("gate", "down"):
        assert (tensors[f"model.layers.1.mlp.{name}_proj.weight"] == 0).float().mean() == 0.75
    assert run("none", "--decay", 0)["history"][-1]["decay"] == 0


DRIVER = """
import os, sys
sys.path[:0] = [{root!r}]
import ast_loop
import ast_train
import dsnot
from ast_loop import backward, fully_shard
from ast_method import decay_at
def stop(step, *rest):
    if step == 12:
        raise SystemExit
    return decay_at(step, *rest)
def half(student, teacher, ids, args):
    assert len(ids) == args.batch // 2
    return backward(student, teacher, ids, args)
def spread(module, mesh, **how):
    assert tuple(mesh.shape) == ((2, 1) if shard == "1" else (2,)), mesh
    return fully_shard(module, mesh=mesh, **how)
ast_loop.backward, ast_loop.fully_shard = half, spread
runs = [({parts!r}, "0", False), ({copies!r}, "1", False), ({stopped!r}, "0", True), ({swapped!r}, "0", False)]
for port, (out, shard, stops) in zip({ports}, runs):
    os.environ["MASTER_PORT"] = str(port)
    sys.argv = {command!r} + ["--out", out, "--json", out + ".json", "--shard", shard]
    if out == {swapped!r}:
        sys.argv += ["--start-from", "swap", "--steps", "2", "--save-every", "2"]
    ast_loop.decay_at = stop if stops else decay_at
    try:
        ast_train.main()
    except SystemExit:
        pass
"""


def test_two_processes_follow_one(files, tmp_path, train):
    """Sharded (FSDP2) and data-parallel, each on half of a batch, from dense and from swapped weights; then one process
    goes on where two were stopped."""
    options = ["--steps", "20", "--save-every", "10"]
    names = {name: str(tmp_path / name) for name in ("parts", "copies", "stopped", "swapped")}
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in names]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        ports = [free.getsockname()[1] for free in sockets]
    code = DRIVER.format(root=str(ROOT), command=command(files, "", *options), ports=ports, **names)
    env = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}  # what torchrun sets
    both = [subprocess.Popen([sys.executable, "-c", code], env=env | dict(RANK=rank, LOCAL_RANK=rank)) for rank in "01"]
    assert [process.wait(timeout=600) for process in both] == [0, 0]
    one = train(tmp_path / "one", *options)["runs"]["ast"]
    for name in ("parts", "copies"):
        two = json.loads((tmp_path / f"{name}.json").read_text())["results"]["runs"]["ast"]
        assert all(abs(a["loss"] - b["loss"]) < 1e-4 for a, b in zip(one["history"], two["history"], strict=True)), name
        assert all(abs(a / b - 1) < 1e-3 for (_, a), (_, b) in zip(one["validation"], two["validation"], strict=True))
        for key in "flips", "flips_all":
            flips = [row[key] for row in one["history"]]
            assert [row[key] for row in two["history"]] == pytest.approx(flips, abs=1e-3) and max(flips) > 5e-3
        check_sparse(tmp_path / name / "ast", files / "model")
        assert not list((tmp_path / name).rglob("*.partial"))  # by the slower process
    alone = train(tmp_path / "alone", "--start-from", "swap", "--steps", 2, "--save-every", 2)["runs"]["ast"]
    two = json.loads((tmp_path / "swapped.json").read_text())["results"]["runs"]["ast"]
    assert two["history"][0]["loss"] == pytest.approx(alone["history"][0]["loss"], rel=1e-2)  # both prune: sums differ
    assert (tmp_path / "stopped" / "ast.training" / "step-0000010").is_dir()
    resumed = train(tmp_path / "stopped", *options)["runs"]["ast"]
    assert abs(one["history"][-1]["loss"] - resumed["history"][-1]["loss"]) < 1e-4


def test_methods_side_by_side_are_those_one_after_the_other(tmp_path, train, monkeypatch):
    """Would catch a process that reads other text, and an error in one that is not told."""
    methods = "--methods", "ast", "dense", "--steps", 3
    for threads in 2, 1:  # 1: no room for two processes
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        train(tmp_path / str(threads), *methods)
    for method in "ast", "dense":
        beside, alone = (load_file(tmp_path / run / method / "model.safetensors") for run in "21")
        assert all(torch.allclose(beside[name], alone[name], rtol=1e-4, atol=1e-6) for name in alone)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(InputError, match="holds a run with --lr"):
        train(tmp_path / "2", *methods, "--lr", 1e-3)


# what users get wrong

@pytest.mark.parametrize("options, message", [
    (["--lr-end", "2"], "--lr-end 2.0 must lie between 0 and 1"),
    (["--decay", "-1"], "--decay -1.0 can't be negative"),
    (["--batch", "10000"], "fewer than one batch of 10000 windows"),
    (["--batch", "0"], "--batch 0 must be above 0"),
    (["--temperature", "inf"], "--temperature inf must be above 0 and finite"),
    (["--kl-weight", "1.5"], "--kl-weight 1.5 must lie between 0 and 1"),
    (["--pattern", "4:2"], "--pattern 4:2 is no n:m"),
    (["--methods", "ast", "ast"], "--methods ast ast names one twice"),
    (["--shard", "3"], "--shard 3 must divide the 1 process"),
    (["--out", str(ROOT / "data" / "tiny")], "data/tiny is a model: give a folder"),
    (["--out", str(ROOT / "data")], "data exists and holds no training of this program: choose another"),
    (["--methods", "dense", "--start-from", "swap"], "--start-from swap is for sparse models"),
    (["--out", str(ROOT / "README.md" / "out")], "README.md is a file: choose another output folder"),
    (["--sparsity", "0.5", "--pattern", "2:4"], "--pattern: not allowed with argument --sparsity"),
    (["--methods", "ast-slorb", "--slorb-k", "7"], "--slorb-k 7 does not divide"),
    (["--eval-data", "nowhere.txt"], "no text source 'nowhere.txt'"),
    (["--eval-data", "a.bin"], "a.bin can be measured only where it alone is trained on, for other --data may"),
    (["--data", "nowhere.bin"], "nowhere.bin can't be read"),
])
def test_wrong_options_get_a_sentence(tmp_path, train, options, message):
    with pytest.raises(InputError, match=message):
        train(tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_every_window_of_the_validation_counts_once(files, monkeypatch):
    """Would catch a run that goes on with another number of processes and compares perplexities of different texts, and
    processes that wait for each other because one has a window more."""
    args, ids = argparse.Namespace(device="cpu", dtype="float32", micro_batch=2), torch.randint(384, (7, 33))
    model, losses, steps = GPT.from_pretrained(files / "model"), [], []
    model.register_forward_hook(lambda *_: steps.append(rank))
    monkeypatch.setattr(ast_loop, "processes", lambda: (rank, world))
    monkeypatch.setattr(ast_loop, "add_up", lambda loss: losses.append(loss.item()))
    for world, args.micro_batch in (1, 2), (1, 3), (1, 2000), (3, 2), (8, 2):
        losses.clear()
        steps.clear()
        for rank in range(world):
            ast_loop.validation_perplexity(model, ids, args)
        expected = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).item()
        assert sum(losses) / len(ids) == pytest.approx(expected, rel=1e-5)
        assert len({steps[:-1].count(rank) for rank in range(world)}) == 1


def test_processes_share_the_calibration_text(files, monkeypatch):
    """Would catch processes that each run all of it for Wanda's score, and statistics that differ between them."""
    args, ids, added = argparse.Namespace(device="cpu", micro_batch=2), torch.randint(384, (7, 32)), []
    model = GPT.from_pretrained(files / "model")
    whole, parts = ast_loop.calibrated(model, args, ids), []
    monkeypatch.setattr(ast_loop.InputStats, "all_reduce", lambda stats: added.append(stats))
    for rank in 0, 1:
        monkeypatch.setattr(ast_loop, "processes", lambda: (rank, 2))
        parts.append(ast_loop.calibrated(model, args, ids))
    for name, stats in whole.items():
        first, second = (part[name] for part in parts)
        assert (first.sequences, second.sequences) == (4, 3)
        torch.testing.assert_close(4 * first.square + 3 * second.square, 7 * stats.square)
    assert len(added) == 2 * len(whole)


@pytest.mark.parametrize("name", ["amx_tile", "avx512_bf16"])
def test_bf16_is_taken_where_the_processor_multiplies_it_fast(monkeypatch, name):
    """Would catch a PyTorch that tells it by another name: training would take twice as long, and nobody would know."""
    for known in "amx_tile", "avx512_bf16":
        monkeypatch.setattr(torch.cpu, f"_is_{known}_supported", lambda known=known: known == name)
    assert fast_in_bf16("cpu")


@pytest.mark.parametrize("inside", [False, True])
def test_blocks_are_compiled_also_inside_checkpoints(files, monkeypatch, inside):
    """Would catch a student that runs uncompiled for all its training, which no error tells."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    options = argparse.Namespace(shard=0, device="cpu", dtype="float32", compile=True, seed=0, json=None)
    with ast_train.process_group(options):
        model = ast_loop.set_up(GPT.from_pretrained(files / "model"), options, checkpoint_activations=inside)
    torch._dynamo.utils.counters.clear()
    model(torch.arange(32)[None]).mean().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_processes_share_a_batch_evenly(monkeypatch):
    monkeypatch.setattr(ast_train, "processes", lambda: (0, 2))
    monkeypatch.setattr(sys, "argv", ["ast_train.py", "--batch", "5"])
    with pytest.raises(InputError, match="--batch 5 must be a multiple of the 2 processes"):
        ast_train.check(ast_train.options())


def test_a_compiler_that_fails_gets_a_sentence(tmp_path, train, monkeypatch):
    """Would catch PyTorch's traceback on a machine whose compiler can't be found when it is needed."""
    monkeypatch.setattr(ast_loop, "backward", lambda *_: torch.compile(torch.sin)(torch.ones(3)))
    with (torch._inductor.config.patch({"cpp.cxx": ("gone/g++",), "force_disable_caches": True}),
          pytest.raises(InputError, match="torch.compile has failed .*gone/g.*: give --no-compile")):
        train(tmp_path)


def test_running_out_of_memory_gets_a_sentence(tmp_path, train, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(ast_loop, "training_loss", full)
    with pytest.raises(InputError, match="out of memory: lower --micro-batch"):
        train(tmp_path)


@pytest.mark.parametrize("recipe", ast_train.RECIPES)
def test_every_recipe_sets_every_option(monkeypatch, recipe):
    monkeypatch.setattr(sys, "argv", ["ast_train.py", "--recipe", recipe, "--steps", "3"])
    args = vars(ast_train.options())
    later = ["data", "eval_data", "slorb_k"]  # depend on the model
    assert args.pop("steps") == 3
    assert {name for name, value in args.items() if value is None} == {"json", "sparsity", *later}


@pytest.mark.parametrize("model, texts", [("tiny", (["tiny"], "tiny", 16)),
                                          ("other", (["c4"], "wikitext2", 16)), ("odd", (["c4"], "wikitext2", 4))])
def test_texts_suit_the_model(files, monkeypatch, tmp_path, model, texts):
    """Would catch a model of one's own that learns Python's documentation because nobody named a text, or that is
    refused because 16 does not divide its inputs."""
    def stop(args, _):
        raise KeyError(args.data, args.eval_data, args.slorb_k)
    monkeypatch.setattr(ast_train, "texts", stop)
    if model == "odd":
        make_checkpoint(files / model, intermediate_size=60)
    monkeypatch.setattr(sys, "argv", ["ast_train.py", "--device", "cpu", "--out", str(tmp_path / "out"), "--model",
                                      model if model == "tiny" else str(files / model)])
    with pytest.raises(KeyError) as stopped:
        ast_train.main()
    assert stopped.value.args == texts


@pytest.mark.parametrize("data, own, validation, test", [
    ("uneven.txt", "uneven.txt", "validation", "test"), ("b.txt", "uneven.txt", "first-half", "second-half"),
    ("b.bin", "uneven.txt", "validation", "test"), ("link.bin", "uneven.txt", "validation", "test"),
    ("b.bin", "b.bin", "validation", "test")])
def test_validation_and_test_are_apart_from_training(files, data, own, validation, test):
    """Would catch a file of which a twentieth is measured without need, one that is trained on, and a test text that
    is not the one that eval.py and dsnot.py measure (the last tenth holds a fifth of these tokens)."""
    text, tokenizer = (files / "text.txt").read_text(), load_tokenizer(files / "model")
    (files / "uneven.txt").write_text(text[:40000] + "x" * 4000)
    (files / "b.txt").write_text(text[:9999])
    write_bin(files / "b.bin", [lambda: [text[:9999]]], tokenizer, "b", {})
    (files / "link.bin").unlink(missing_ok=True)
    (files / "link.bin").symlink_to("b.txt")  # as the Hub's cache has them: what it points to has any name
    source, trained = str(files / own), [f"{files / data}:2"]
    found = [evaluation_tokens(source, split, trained, tokenizer, 32).tolist() for split in ("validation", "test")]
    if own == "b.bin":
        for others in [*trained, str(files / "b.txt")], [str(files / "c.bin")]:
            with pytest.raises(InputError, match="where it alone is trained on"):
                evaluation_tokens(source, "test", others, tokenizer, 32)
        ids = open_bin(files / own, tokenizer).tolist()
        assert found[0] + found[1] == ids[len(ids) * 9 // 10:] and len(found[1]) - len(found[0]) in (0, 1)
    else:
        assert found == [tokenizer.encode(load_text(source, split)) for split in (validation, test)]
    if data == own == "uneven.txt":
        assert tokens(source, tokenizer, "train").tolist() == tokenizer.encode(load_text(source, "train"))


def test_the_benchmark_runs(files, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_ast, "STEPS", 3)
    monkeypatch.setattr(sys, "argv", command(files, tmp_path / "out", "--json", tmp_path / "bench.json"))
    bench_ast.main()
    found = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert list(found) == ["dense", "ast", "ast-slorb"] and found["dense"]["ratio"] == 1
