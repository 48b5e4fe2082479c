"""AST: retrain a model under a 2:4 mask that learns with it, taught by its dense self.

Adaptive Sparse Trainer (Huang et al., AAAI 2025, arXiv 2407.20584). Its formulas are in `ast_method.py`; the
training loop, with its precision and memory, is in `ast_loop.py`; here are the recipes, the first weights, the results
and the command. Beyond the paper: with --start-from swap W begins as dsnot.py's exact swaps and refit leave it, pruned
weights and SLoRB's S at 0.

    python ast_train.py                                                  (the model that ships, 2:4)
    torchrun --nproc-per-node 8 ast_train.py --recipe llama2-7b --data c4.bin:0.7 arxiv.bin:0.3    (see data/stream.py)

A run that was stopped goes on when the same command is given again, on as many processes as you like, and ends with the
same weights (with another number of processes, or on a GPU, but for rounding): nothing is random but the windows that
are read, and those depend on --seed and the step alone.
"""

import gc
import math
import shutil
import sys
import time
from argparse import BooleanOptionalAction
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from ast_loop import amount, train
from ast_method import SparseLinear, decay_at, distillation_loss  # noqa: F401 (part of this file's interface)
from data import load_tokenizer, windows
from data.command import InputError, Parser, parser, record, run, versions, write_atomically
from data.device import compiler_failed, fast_in_bf16, out_of_memory
from data.hub import model_folder
from data.method import SCORES, parse_pattern
from data.processes import process_group, processes, say, side_by_side
from data.state import last_state
from data.stream import Mixture, evaluation_split, evaluation_tokens, sources_of
from data.text import SOURCES, text_versions, told, usual_text
from data.writer import CheckpointWriter, alone_in, noted, pruned_here, remove
from dsnot import prune_layer
from eval import perplexity
from gpt import GPT, Config, layer_inputs
from masks import check_pattern
from walk import prune

RECIPES = {  # ours for the model that ships, the paper's for the others
    "tiny": dict(
        model="tiny", methods=["ast", "ast-slorb"], steps=250, batch=8, micro_batch=8, seqlen=256, save_every=100,
        lr=3e-4, lr_end=1.0, average=0.6, warmup=20, decay=3e-3, decay_steps=100, kl_weight=1.0, temperature=1.0),
    "llama2-7b": dict(
        model="llama2-7b", methods=["ast-slorb"], steps=15000, batch=128, micro_batch=1, seqlen=4096, save_every=500,
        lr=2e-5, warmup=500, decay=6e-5, decay_steps=3000, kl_weight=0.5, temperature=2.0, checkpoint_activations=True),
    "gpt2": dict(
        model="openai-community/gpt2", methods=["ast-slorb"], steps=40000, batch=128, micro_batch=8, seqlen=1024,
        save_every=1000, lr=2e-4, warmup=2000, decay=1e-4, decay_steps=10000, kl_weight=0.67, temperature=2.0),
}
CALIBRATION = 128  # windows
SLORB_K = 16  # as in the paper, where it divides a layer's inputs


# --------------------------------------------------------------------------------- from the first weights to the last

def one_shot(args, folder, calibration, replace=False, **method):
    """Prune the model into `folder`, all processes together. Raises InputError where a run with other options or files
    has left something there, unless `replace`: then what this command has left goes."""
    model = GPT.from_pretrained(args.model, device=args.device, stream=True)
    given = {name: str(getattr(args, name)) for name in ("model", "data", "seqlen", "seed", "pattern", "sparsity")}
    made = {"command": "ast_train.py", **given, **method}
    made["files"] = versions(model.source.parts()) + text_versions(sources_of(args.data))
    for left in [folder, folder.with_name(f"{folder.name}.partial")] if replace else []:
        before = noted(left / "run.json") or {}
        if before.get("command") == made["command"] and before != made:
            remove(left)
    prune(model, calibration, folder, made, prune_layer, batch=args.micro_batch, **method, **amount(args))


def first_weights(args, calibration):
    """The folder of the student's first weights. "swap": the model with the mask that exact swaps find and the weights
    that suit it. Its pruned weights are 0 and return when their gradients have moved them far enough."""
    if args.start_from == "dense":
        return args.model
    for method in args.methods:
        if method != "dense":  # what ast_loop.resume would find out after hours of swaps
            last_state(Path(args.out) / f"{method}.training", {"start_from": args.start_from})
    folder = Path(args.out) / "start"  # trained models may have begun with what is there
    one_shot(args, folder, calibration, score="wanda", refine="swap", refit=True, propagate=True)
    return folder


def train_alone(method, args, start):
    """`train` in a process of its own."""
    with process_group(args), failures_told(args):
        return train(method, args, start, *texts(args, load_tokenizer(args.model)))


def train_all(args, start, mixture, held_out, calibration):
    """Train the models, side by side or one after the other; returns a record of each method."""
    runs, threads = {}, torch.get_num_threads() // len(args.methods)
    # on a CPU side by side: two processes of one thread get more done than two threads that wait for each other
    beside = args.device == "cpu" and processes()[1] == 1 and len(args.methods) > 1 and threads > 0
    one_by_one = ((method, train(method, args, start, mixture, held_out, calibration)) for method in args.methods)
    for method, state in side_by_side(train_alone, args.methods, threads, args, start) if beside else one_by_one:
        runs[method] = state
        if processes()[0] == 0:
            plot(Path(args.out) / "curve.png", runs)
    return runs


# -------------------------------------------------------------------------------------------------------- the results

def plot(path, runs):
    """The curves of all runs: loss, validation perplexity, mask flips, decay."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(18, 4))
    axes = figure.subplots(1, 4)
    for method, state in sorted(runs.items()):  # side by side, either may end first
        axes[1].plot(*zip(*state["validation"]), marker=".", label=method)
        for axis, key, scale in zip(axes[[0, 2, 3]], ("loss", "flips", "decay"), (1, 100, 1)):
            axis.plot([row["step"] for row in state["history"]], [scale * row[key] for row in state["history"]])
    titles = "training loss (nats/token)", "validation perplexity", "mask flips at a refresh (%)", "decay"
    for axis, title in zip(axes, titles):
        axis.set(title=title, xlabel="step")
    axes[1].set_yscale("log")
    axes[1].yaxis.set_major_formatter("{x:.4g}")
    axes[1].yaxis.set_minor_formatter("{x:.4g}")
    axes[1].legend()
    figure.tight_layout()
    write_atomically(path, lambda beside: figure.savefig(beside, format="png", dpi=120))


def measure(args, test_ids, calibration, start):
    """Measure dense, one-shot, first (`start`) and trained models on the test text; returns a row for each, by name.
    gap_closed: how much of the log-perplexity between the best one-shot mask and the dense model has gone."""
    rows = {}

    def add(name, folder, used):
        model = GPT.from_pretrained(folder, device=args.device)
        kept = sum(p.count_nonzero().item() for p in model.parameters())
        ppl = perplexity(model, test_ids, args.seqlen, args.micro_batch, progress=True)
        rows[name] = dict(parameters=kept, tokens=used, perplexity=ppl)
        print(f"  {name:21}  {ppl:15.3f}", flush=True)

    gc.collect()  # what training has left on the GPU
    add("dense", args.model, 0)
    for score in SCORES if args.one_shot else []:
        pruned = Path(args.out) / f"one-shot-{score}"
        one_shot(args, pruned, calibration, replace=True, score=score, refine="none")
        add(f"one-shot {score}", pruned, 0 if score == "magnitude" else calibration.numel())
        remove(pruned)
    best = min((math.log(found["perplexity"]) for name, found in rows.items() if name != "dense"), default=math.nan)
    if start != args.model:
        add("swaps + refit (start)", start, calibration.numel())
    for method in args.methods:
        name = {"dense": "dense, trained on", "ast": "AST", "ast-slorb": "AST + SLoRB"}[method]
        before = calibration.numel() if method != "dense" and (start != args.model or args.score == "wanda") else 0
        add(name, Path(args.out) / method, before + args.steps * args.batch * args.seqlen)
    gap = best - math.log(rows["dense"]["perplexity"])
    for found in rows.values():
        found["gap_closed"] = (best - math.log(found["perplexity"])) / gap if gap > 0 else None  # NaN: no masks
    return rows


def print_table(rows):
    print(f"{'':21}  parameters kept  test perplexity  gap closed    tokens read")
    for name, row in rows.items():
        closed = "" if row["gap_closed"] is None else f"{row['gap_closed']:.1%}"
        print(f"{name:21}  {row['parameters']:15,}  {row['perplexity']:15.3f}  {closed:>10}  {row['tokens']:13,}")


# -------------------------------------------------------------------------------------------------------- the command

def options(description=__doc__):
    compiler = any(map(shutil.which, ["cl"] if sys.platform == "win32" else ["g++", "clang++"]))
    early = Parser(add_help=False)  # reads --recipe first, where the defaults of the others come from
    early.add_argument("--recipe", choices=RECIPES, default="tiny")
    p = parser(description)
    p.add_argument("--recipe", choices=RECIPES, default="tiny", help="where the other options begin")
    p.add_argument("--model", help="student and teacher: a preset (data/hub.py lists them), a Hub id or a folder")
    p.add_argument("--methods", nargs="+", choices=["dense", "ast", "ast-slorb"],
                   help="what to train; dense: the model itself, by cross-entropy, the control")
    p.add_argument("--out", default="out/ast", help="the folder for a model of each method, their states and curve.png")
    g = p.add_argument_group("method")
    how_many = g.add_mutually_exclusive_group()
    how_many.add_argument("--pattern", default="2:4", metavar="N:M", help="N kept of every M")
    how_many.add_argument("--sparsity", type=float, help="prune this share of every row instead")
    g.add_argument("--start-from", choices=["dense", "swap"], default="dense",
                   help="the first weights: the model's, or what dsnot.py --refine swap --refit leaves of them")
    g.add_argument("--score", choices=["magnitude", "wanda"], default="magnitude",
                   help="keep the highest |W| or |W| ||x||")
    g.add_argument("--mask-every", type=int, default=10, help="steps between choices of the mask; 0: it stays")
    g.add_argument("--decay", type=float, help="lambda: how strongly pruned weights are pulled to 0")
    g.add_argument("--decay-steps", type=int, help="T0: steps in which the decay grows to lambda")
    g.add_argument("--kl-weight", type=float,
                   help="a: the share of distillation in the loss, the rest is cross-entropy; 0: no teacher")
    g.add_argument("--temperature", type=float, help="T: divides the logits of both models in distillation")
    g.add_argument("--slorb-k", type=int,
                   help=f"k: neighbouring inputs that share a parameter of SLoRB in each row (default: {SLORB_K}, or "
                        f"the next lower number that divides all inputs)")
    g = p.add_argument_group("data")
    g.add_argument("--data", nargs="+", metavar="SOURCE[:WEIGHT]",
                   help=f"{', '.join(SOURCES)}, a text file or a .bin of data.stream; of c4 one file of its 1024 "
                        f"(default: tiny where the model has tiny's tokenizer, else c4)")
    g.add_argument("--eval-data", metavar="SOURCE",
                   help="validation and test text, one of the same; of a file half for each, or half of its last tenth "
                        "if it, or a .bin, is trained on; a .bin only if it alone is (default: tiny or wikitext2)")
    g.add_argument("--seqlen", type=int, help="tokens a window")
    g = p.add_argument_group("training")
    g.add_argument("--steps", type=int, help="updates of the weights, each of --batch windows")
    g.add_argument("--batch", type=int, help="windows a step, over all processes")
    g.add_argument("--micro-batch", type=int, help="windows that a process takes at a time, at most")
    g.add_argument("--lr", type=float, help="peak learning rate")
    g.add_argument("--lr-end", type=float, default=0.1, help="the share of it that is left at the last step")
    g.add_argument("--average", type=float, default=0.0,
                   help="keep the mean of the weights over this share of the steps, the last ones; 0: the last weights")
    g.add_argument("--warmup", type=int, help="steps until the peak")
    g.add_argument("--save-every", type=int, help="steps between validations, each with a state to go on from")
    g.add_argument("--one-shot", action=BooleanOptionalAction, default=True, help="one-shot masks in the table")
    g = p.add_argument_group("machine")
    g.add_argument("--dtype", choices=["float32", "bfloat16"], help="arithmetic (default: bfloat16 where it is fast)")
    g.add_argument("--compile", action=BooleanOptionalAction, default=compiler,
                   help="torch.compile; needs a C++ compiler")
    g.add_argument("--checkpoint-activations", action=BooleanOptionalAction, default=False,
                   help="compute activations twice instead of keeping them")
    g.add_argument("--shard", type=int, default=0,
                   help="processes that share one copy of the weights (1: data-parallel; 0: all)")
    p.set_defaults(**RECIPES[early.parse_known_args()[0].recipe])
    args = p.parse_args()
    args.dtype = args.dtype or ("bfloat16" if fast_in_bf16(args.device) else "float32")
    return args


def check(args):
    """Raise InputError for options that can't be."""
    world, out = processes()[1], Path(args.out)
    if len(set(args.methods)) < len(args.methods):
        raise InputError(f"--methods {' '.join(args.methods)} names one twice: name it once")
    if (out / "config.json").is_file():
        raise InputError(f"--out {args.out} is a model: give a folder to hold the models that are trained")
    ours = ["curve.png", "*.training"]
    ours += [f"{name}{end}" for name in ["start", *args.methods] for end in ("/run.json", ".partial")]
    if out.is_dir() and any(out.glob("[!.]*")) and not any(found for pattern in ours for found in out.glob(pattern)):
        raise InputError(f"--out {args.out} exists and holds no training of this program: choose another output folder")
    if args.start_from == "swap" and args.methods == ["dense"]:
        raise InputError("--start-from swap is for sparse models, and --methods dense names none")
    for names, right, rule in [
            ("steps batch micro_batch save_every temperature lr", lambda v: 0 < v < math.inf,
             "must be above 0 and finite"),
            ("slorb_k", lambda v: v is None or v > 0, "must be above 0"),
            ("seqlen", lambda v: v > 1, "must be at least 2"),
            ("mask_every decay decay_steps warmup", lambda v: 0 <= v < math.inf, "can't be negative or infinite"),
            ("kl_weight lr_end average", lambda v: 0 <= v <= 1, "must lie between 0 and 1"),
            ("sparsity", lambda v: v is None or 0 < v < 1, "must lie between 0 and 1"),
            ("batch", lambda v: v % world == 0, f"must be a multiple of the {world} processes"),
            ("shard", lambda v: v == 0 or v > 0 and world % v == 0, f"must divide the {world} process(es)")]:
        for name in names.split():
            if not right(getattr(args, name)):
                raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)} {rule}")


@contextmanager
def failures_told(args):
    """Inside, running out of memory and a compiler that fails raise an InputError that names the options that help."""
    try:
        yield
    except RuntimeError as e:
        killed = isinstance(e, BrokenProcessPool)  # a process of side_by_side
        if not (killed or out_of_memory(e)):
            if reason := compiler_failed(e):
                raise InputError(f"torch.compile has failed ({reason}): give --no-compile") from None
            raise
        what = "a training process has died, most likely of full memory" if killed else "out of memory"
        kept = f"; the last state is kept in {args.out}" if any(Path(args.out).glob("*.training/step-*")) else ""
        raise InputError(f"{what}: lower --micro-batch ({args.micro_batch}), add --checkpoint-activations or "
                         f"take more GPUs{kept}") from None


def texts(args, tokenizer):
    """What training reads: a mixture, validation windows, and Wanda's and SparseGPT's inputs [CALIBRATION, seqlen]."""
    mixture = Mixture(args.data, tokenizer, args.seqlen, args.batch)
    held_out = windows(evaluation_tokens(args.eval_data, "validation", args.data, tokenizer, args.seqlen),
                       args.seqlen + 1, f"the validation text of {args.eval_data}")
    return mixture, held_out, mixture.batch(args.seed, 0, CALIBRATION, stream=0)[:, :-1]


def fitting_k(asked, inputs):
    """--slorb-k, or where it is None the default that divides the inputs {layer: how many} of all layers. Raises
    InputError where what is asked for doesn't."""
    common = math.gcd(*inputs.values())
    fits = next(k for k in range(min(asked or SLORB_K, common), 0, -1) if common % k == 0)
    for name, width in inputs.items():
        if asked and width % asked:
            raise InputError(f"--slorb-k {asked} does not divide the {width} inputs of {name}: give --slorb-k {fits}, "
                             f"or --methods ast")
    return asked or fits


def settle(args, folder, config):
    """Settle the options that depend on the model in `folder`. Raises InputError where others don't fit it."""
    if config.slorb_k:
        raise InputError(f"{args.model} has been through AST and has SLoRB parameters: give the dense model")
    inputs = layer_inputs(config)
    if args.sparsity is None:
        for width in inputs.values():
            check_pattern(parse_pattern(args.pattern), width)
    if "ast-slorb" in args.methods:
        args.slorb_k = fitting_k(args.slorb_k, inputs)
    for method in args.methods:  # this refuses a folder in which another command's model is
        CheckpointWriter(Path(args.out) / method, config.raw, folder, made={"command": "ast_train.py"}, goes_on=False)
    text = usual_text(folder, None)
    args.data, args.eval_data = args.data or [text or "c4"], args.eval_data or text or "wikitext2"


def prepare(args):
    """Check the options, settle those that depend on the model, and read what `texts` does and the ids of the test
    text. Raises InputError for what can't be trained; nothing is written yet."""
    check(args)
    folder = model_folder(args.model, weights=False)
    tokenizer = load_tokenizer(folder)
    settle(args, folder, Config.read(folder))
    model = GPT.open(args.model)  # here its weights are fetched
    model.source.check_dense()
    mixture, held_out, calibration = texts(args, tokenizer)
    test_ids = evaluation_tokens(args.eval_data, "test", args.data, tokenizer, args.seqlen)
    for ids in held_out, calibration, windows(test_ids, args.seqlen, f"the test text of {args.eval_data}"):
        model.check_tokens(ids)
    say(f"{mixture.tokens:,} tokens of training text, {args.steps * args.batch * args.seqlen:,} will be read "
        f"in windows of {args.seqlen} tokens{model.config.remark(args.seqlen)}")
    if pruned_here(folder):
        say(f"note: {args.model} has been pruned before; it is what is called dense here")
    return mixture, held_out, calibration, test_ids


def main():
    args, started = options(), time.perf_counter()
    with ExitStack() as held, failures_told(args):
        with process_group(args):
            mixture, held_out, calibration, test_ids = prepare(args)
            if processes()[0] == 0:
                held.enter_context(alone_in(Path(args.out)))  # until all is measured
            start = first_weights(args, calibration)
            runs = train_all(args, start, mixture, held_out, calibration)
            if processes()[0] > 0:
                return
        del mixture, held_out  # which measuring needs no more
        split = evaluation_split(args.eval_data, "test", args.data)
        text = told(args.eval_data, split)
        print(f"measuring the dense{', one-shot' * args.one_shot} and trained models on {text}:", flush=True)
        table = measure(args, test_ids, calibration, start)
    print(f"\n{args.model} on {text}, windows of {args.seqlen} tokens")
    print_table(table)
    print("\nsaved " + ", ".join(str(Path(args.out) / name) for name in [*args.methods, "curve.png"]))
    record(args, {"seconds": time.perf_counter() - started, "split": split, "runs": runs, "table": table})


if __name__ == "__main__":
    run(main, goes_on=True)
