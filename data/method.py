"""A method of dsnot.py, by its options: what it needs, what it and its runs are called."""

import os
from pathlib import Path

from data.command import InputError, versions
from data.hub import repository
from data.processes import processes
from data.text import text_versions

LAYER = ["score", "refine", "refit", "cycles", "threshold", "sign_check", "sparsity", "pattern"]  # of prune_layer
METHOD = LAYER + ["propagate", "refine_layers", "allocate"]  # of prune
SCORES = "magnitude", "wanda", "sparsegpt"  # a new one needs a line in prune_layer and in what it needs below
REFINES = "none", "dsnot", "swap", "dsnot+swap"
ALLOCATIONS = "uniform", "owl", "sensitivity"
NSAMPLES = 128
USUAL = dict(cycles=None, threshold=0.1, sign_check=True, refine_layers="all")  # how masks are refined if nobody asks


def method_of(run):
    """The name of a method, from its options."""
    steps = [run["score"], *run["refine"].replace("none", "").split("+"), "refit" * run.get("refit", False),
             "global" * bool(run.get("global_swaps"))]
    return " + ".join(filter(None, steps))


def propagates(method):
    """Whether a method of that name prunes layer after layer if nobody asks for something else."""
    return "swap" in method or "refit" in method


def parse_pattern(text):
    """"2:4" -> (2, 4). Raises InputError where it is no n:m with 0 < n < m."""
    try:
        n, m = map(int, text.split(":"))
    except ValueError:
        n = m = 0
    if not 0 < n < m:
        raise InputError(f"--pattern {text} is no n:m with 0 < n < m, such as 2:4 (two kept of every four)")
    return n, m


def fits_weights(score, refit=False, **_):
    """Whether a method, given by these options of `prune`, chooses the values of kept weights, too, not only a mask."""
    return refit or score == "sparsegpt"


def needs_gram(score, refine, refit=False, **_):
    """Whether a method, given by these options of `prune`, needs the Gram matrices of the inputs."""
    return fits_weights(score, refit) or "swap" in refine


def has_goal(propagate=False, **method):
    """Whether layers aim at the dense model's outputs; its hidden states are then computed beside the pruned ones."""
    return propagate and needs_gram(**method)


def rows_apart(score, pattern=None, **_):
    """Whether a method, given by these options of `prune`, prunes each row independently, so that processes can share
    the rows: all but unstructured SparseGPT, whose threshold spans them."""
    return score != "sparsegpt" or pattern is not None


def refine_of(name, refine, refine_layers="all", **_):
    """How a block's layer of that name is refined, given these options of `prune`."""
    return refine if refine_layers == "all" or "self_attn" in name else "none"


def percent(share):
    """0.7 -> "70%", 0.995 -> "99.5%"."""
    return f"{100 * share:g}%"


def said_of(name, value):
    """An option in words: cycles 50, sign check, no sign check."""
    name = name.replace("_", " ")
    value = " ".join(map(str, value)) if isinstance(value, list) else value
    return f"{'' if value else 'no '}{name}" if isinstance(value, bool) else f"{name} {value}"


def folder_name(model):
    """What a model is called where its folder, preset or Hub id says so: the last part, of "." and ".." that of the
    folder they stand for."""
    return Path(os.path.abspath(model)).name


def fill_in(args, config, text):
    """Fill in the options that depend on others; returns the amount that is pruned and the method's name. text: to
    calibrate and measure on if none is given, None: C4 and WikiText-2."""
    usual = USUAL | dict(calib=text or "c4", nsamples=NSAMPLES, seqlen=config.window_length())
    for name in "threshold", "sign_check", "calib", "seqlen":
        if getattr(args, name) is None:
            setattr(args, name, usual[name])
    args.data, method = args.data or text or "wikitext2", method_of(vars(args))
    args.propagate = propagates(method) if args.propagate is None else args.propagate
    if args.compare is None:
        args.compare = args.data == text and method != args.score  # it refines
    args.out = args.out or str(Path("out") / out_name(args, method, usual))
    return args.pattern or percent(args.sparsity), method


def out_name(args, method, usual):
    """What --out is called if nobody says: the model, the method, and each option that is not the usual one."""
    amount = args.pattern or percent(args.sparsity)
    name = [folder_name(args.model), args.score, args.refine + "+refit" * args.refit,
            f"global-{args.global_swaps}" * (args.global_swaps > 0), amount.replace(":", "of").rstrip("%"),
            args.allocate * (args.allocate != "uniform"), f"seed{args.seed}" * (args.seed != 0),
            said_of("propagate", args.propagate).replace(" ", "-") * (args.propagate != propagates(method))]
    for option, value in usual.items():
        if (given := getattr(args, option)) != value:
            name.append(said_of(option, Path(given).name[-40:] if option == "calib" else given).replace(" ", "-"))
    return "-".join(filter(None, name))


def shared_by(args, source):
    """What names a run beside its method: the options and the files that every checkpoint it makes depends on."""
    same = {option: getattr(args, option) for option in ("nsamples", "seqlen", "seed")}
    same |= dict(calib=os.path.normpath(args.calib), model=repository(source.folder),
                 pattern=args.pattern,  # as text, in which tables name it, instead of the method's pair of numbers
                 files=versions(source.parts()) + text_versions([args.calib]), command="dsnot.py")
    if args.allocate == "sensitivity" and processes()[1] > 1:
        same["processes"] = processes()[1]  # each looks at tokens of its own, so others would find other shares
    return same


def blocks_of(out, run):
    """The folder beside `out` in which global swaps find what was pruned block by block, and what names its run."""
    out = Path(out)
    local = {name: value for name, value in run.items() if name != "global_swaps"}
    return out.with_name(f"{out.name}.blocks"), local | {"blocks_of": out.name}
