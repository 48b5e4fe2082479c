"""Damaged checkpoints and senseless options through the commands, at random: each ends well, or with one sentence and
code 2.

    python tests/robustness.py --trials 480 --json results/robustness.json

A traceback, another exit code, more than one line of error or something half-written is a defect, printed with the
trial's seed; the exit code is then 1. Interruptions are tried too: pruning or training that is stopped at a random call
goes on to the same bytes, and training whose state was damaged meanwhile says so.
"""

import contextlib
import io
import json
import math
import os
import random
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import ast_loop
import ast_train
import dsnot
import eval
import gpt
import sparse_matmul
from conftest import make_checkpoint
from data.command import at_least, parser, record, run, start

FAMILIES = {  # by model_type: the sizes of a small model, in its family's words
    "llama": {},
    "opt": dict(ffn_dim=56, word_embed_proj_dim=16, do_layer_norm_before=True, activation_function="relu"),
    "gpt2": dict(n_embd=32, n_inner=56, n_layer=2, n_head=4, n_positions=64, activation_function="gelu_new")}
COMMANDS = {"dsnot": dsnot, "ast_train": ast_train, "sparse_matmul": sparse_matmul, "eval": eval, "gpt": gpt}
OPTIONS = {  # those whose values are tried
    "dsnot": "sparsity pattern nsamples seqlen cycles threshold seed device calib data score refine allocate split "
             "global-swaps json out",
    "ast_train": "pattern sparsity score mask-every decay decay-steps kl-weight temperature slorb-k data eval-data "
                 "seqlen batch micro-batch lr lr-end average warmup save-every seed device dtype shard start-from "
                 "json out",
    "sparse_matmul": "bits seed device json out",
    "eval": "batch data split seqlen tasks limit compare plot seed device json",
    "gpt": "max-new-tokens temperature top-k seed device json prompt"}
ODD = [None, -1, 0, 1, 3, 7, 2.5, 10**12, math.nan, "", "x", True, [], [1], {}, {"a": 1}, "\ud800"]
WORDS = ["-1", "0", "1", "2", "3", "0.5", "1e-9", "1e9", "nan", "inf", "-inf", "", "x",
         "2:4", "0:4", "4:4", "5:4", "1:32", "-1:2", "2:4:8", "é", "../..", "/", "/dev/null", "tiny", "a" * 300]


def damage_config(folder, rng):
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        key = rng.choice([*raw, "rope_scaling", "head_dim", "sliding_window", "layer_types", "attention_bias",
                          "enable_bias", "slorb_k"])
        if rng.random() < 0.3:
            raw.pop(key, None)
        else:
            raw[key] = rng.choice(ODD)
    path.write_text(json.dumps(raw))
    return "config.json changed"


def damage_bytes(folder, rng):
    path = rng.choice([p for p in sorted(folder.iterdir()) if p.is_file()])
    data = bytearray(path.read_bytes())
    kind = rng.choice(["cut", "flipped", "emptied", "removed", "replaced"])
    if kind == "cut":
        data = data[:rng.randrange(len(data))]
    elif kind == "flipped":
        for _ in range(rng.choice([1, 10])):
            data[rng.randrange(min(len(data), rng.choice([16, 2000, 10**9])))] ^= 1 << rng.randrange(8)
    elif kind == "emptied":
        data = b""
    elif kind == "replaced":
        data = rng.choice([b"null", b"[]", b"{}", b"\xff\xfe", b"0" * 100, b"<html>404</html>"])
    path.unlink()
    if kind != "removed":
        path.write_bytes(data)
    return f"{path.name} {kind}"


def damage_tensors(folder, rng):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    kind = rng.choice(["left out", "transposed", "longer", "int", "nan", "inf", "one more", "zero", "renamed", "half"])
    W = tensors[name]
    if kind in ("left out", "renamed"):
        del tensors[name]
    changed = {"transposed": lambda: W.t().contiguous(), "longer": lambda: torch.cat([W, W]),
               "int": lambda: W.to(torch.int32), "nan": lambda: torch.full_like(W, math.nan),
               "inf": lambda: W * math.inf, "zero": lambda: torch.zeros_like(W), "half": lambda: W.half()}
    if kind in changed:
        tensors[name] = changed[kind]()
    if kind in ("one more", "renamed"):
        tensors[name + ".old"] = W.clone()
    save_file(tensors, path, metadata={"format": "pt"})
    return f"{name} {kind}"


def usual_options(command, text, here):
    """Options with which a command has a second's work."""
    return {
        "dsnot": ["--calib", text, "--data", text, "--nsamples", 3, "--seqlen", 32, "--out", here / "out"],
        "ast_train": ["--data", text, "--eval-data", text, "--seqlen", 16, "--steps", 4, "--batch", 2,
                      "--micro-batch", 2, "--save-every", 2, "--mask-every", 1, "--warmup", 1,
                      "--methods", "ast-slorb", "--slorb-k", 4, "--no-one-shot", "--no-compile", "--out", here / "out"],
        "sparse_matmul": ["--out", here / "out"], "eval": ["--data", text, "--seqlen", 32],
        "gpt": ["--max-new-tokens", 4]}[command]


def odd_options(command, rng):
    names, words = OPTIONS[command].split(), []
    for name in rng.sample(names, rng.choice([1, 1, 2, 3])):
        word = rng.choice(WORDS)
        if name in ("out", "json") and word in ("", "tiny", "x", "2:4", "0.5", "../..", "/dev/null"):
            word = "/dev/null/x"
        words.append(f"--{name}={word}")
    return words


def outcome(main, words):
    """(exit code, what went wrong or None, last line of the error) of a command."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = ["command", *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run(main)
        return 0, None, ""
    except SystemExit as stop:
        lines = err.getvalue().strip().splitlines()
        wrong = None if stop.code == 2 and len(lines) == 1 else f"exit code {stop.code}: {lines}"
        return stop.code, wrong, lines[-1] if lines else ""
    except BaseException:
        return None, traceback.format_exc(), ""
    finally:
        sys.argv = before


@contextlib.contextmanager
def stopped(module, function, calls):
    """Inside, a function of a module is interrupted after so many calls."""
    real, left = getattr(module, function), [calls]

    def stopping(*args, **options):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*args, **options)
    setattr(module, function, stopping)
    yield
    setattr(module, function, real)


def stopped_and_gone_on(model, text, here, rng):
    """Prune or train, stop at a random call of prune_layer or backward, go on: the same bytes as without a stop?"""
    command, place, function, calls, choices = rng.choice([
        (dsnot, dsnot, "prune_layer", 12, [["--refine", "swap"], ["--score", "sparsegpt"], ["--pattern", "2:4"],
                                           ["--refine", "dsnot+swap", "--refit"]]),
        (ast_train, ast_loop, "backward", 4, [["--methods", "ast"], ["--average", "0.5"],
                                              ["--start-from", "swap"], ["--decay", "0"]])])
    words = ["--model", model, "--device", "cpu", *usual_options(command.__name__, text, here), *rng.choice(choices)]
    assert outcome(command.main, [*words, "--out", here / "whole"])[0] == 0, words
    with stopped(place, function, rng.randrange(calls)):
        code = outcome(command.main, [*words, "--out", here / "cut"])[0]
    assert code == 130 and not any((here / "cut").glob("*.safetensors")), words
    assert outcome(command.main, [*words, "--out", here / "cut"])[0] == 0, words
    for path in (here / "whole").rglob("*.safetensors"):
        if path.read_bytes() != (here / "cut" / path.relative_to(here / "whole")).read_bytes():
            return f"{path.name} differs after a stop: {words}"


def damage_state(model, text, here, rng):
    """Stop a training run at its last step and damage its state: what the same command, given again, is to meet."""
    words = ["--model", model, "--device", "cpu", *usual_options("ast_train", text, here)]
    with stopped(ast_loop, "backward", 3):
        assert outcome(ast_train.main, words)[0] == 130
    state, = (here / "out" / "ast-slorb.training").glob("step-*")
    return damage_bytes(state, rng)


def make_2_of_4(folder, family):
    """A random 2:4 model, so that the commands that want one have one."""
    dense = folder.with_name(f"{family}-dense")
    make_checkpoint(dense, model_type=family, **FAMILIES[family])
    model = gpt.GPT.from_pretrained(dense)
    for layer in gpt.all_prunable(model).values():
        layer.weight.data = sparse_matmul.prune_24(layer.weight.data)
    model.save_pretrained(folder)


def main():
    p = parser(__doc__)
    p.add_argument("--trials", type=int, default=480, help="how many; each has a seed of its own")
    args = p.parse_args()
    start(args)
    at_least(args, trials=1)
    counts, defects = {}, []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        args.json = args.json and str(Path(args.json).absolute())
        os.chdir(folder)  # where odd values of --out and --json may write
        for family in FAMILIES:
            make_2_of_4(folder / family, family)
        text = folder / "text.txt"
        text.write_text("the model reads words and the words are few so it can learn them by heart in no time\n" * 100)
        for trial in range(args.trials):
            rng, here = random.Random(args.seed * 10**6 + trial), folder / "trial"
            shutil.rmtree(here, ignore_errors=True)
            here.mkdir()
            shutil.copytree(folder / rng.choice([*FAMILIES]), here / "m")
            kind = rng.choice(["config", "bytes", "tensors", "options", "stop", "state"])
            if kind == "stop":
                wrong, told, said, code = stopped_and_gone_on(here / "m", text, here, rng), "", "", "same bytes"
            else:
                damage = {"config": damage_config, "bytes": damage_bytes, "tensors": damage_tensors}
                command = "ast_train" if kind == "state" else rng.choice([*COMMANDS])
                words = odd_options(command, rng) if kind == "options" else []
                told = f"{command}, " + (damage_state(here / "m", text, here, rng) if kind == "state" else
                                         damage[kind](here / "m", rng) if kind in damage else " ".join(words))
                words = ["--model", here / "m", "--device", "cpu", *usual_options(command, text, here), *words]
                code, wrong, said = outcome(COMMANDS[command].main, words)
                left = [p.name for p in here.rglob("*") if p.name.endswith((".partial", ".before"))]
                half = (command in ("dsnot", "sparse_matmul") and kind != "options" and code == 2 and
                        (here / "out").exists())
                if not wrong and (left or half):
                    wrong = f"left behind: {left or 'out'}"
            counts.setdefault(kind, {}).setdefault(str(code), 0)
            counts[kind][str(code)] += 1
            if wrong:
                defects.append({"trial": trial, "what": f"{kind}: {told}", "wrong": wrong})
                print(f"trial {trial}, {kind}: {told}\n{wrong}", flush=True)
    print(f"what was damaged, and how often a command ended with which exit code: {json.dumps(counts)}")
    print(f"{args.trials} trials, {len(defects)} defects")
    record(args, {"counts": counts, "defects": defects})
    sys.exit(bool(defects))


if __name__ == "__main__":
    run(main)
