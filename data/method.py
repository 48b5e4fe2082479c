"""A method of dsnot.py, by its options: what it is called, and what it needs."""

from data.command import InputError

LAYER = ["score", "refine", "refit", "cycles", "threshold", "sign_check", "sparsity", "pattern"]  # of prune_layer
METHOD = LAYER + ["propagate", "refine_layers", "allocate"]  # of prune
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


def needs_gram(score, refine, refit=False, **_):
    """Whether a method, given by these options of `prune`, needs the Gram matrices of the inputs."""
    return refit or score == "sparsegpt" or "swap" in refine


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
