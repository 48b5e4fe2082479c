"""Prune a language model without training: score the weights, mask the lowest, refine the mask.

DSnoT ("Dynamic Sparse No Training", Zhang et al., ICLR 2024, arXiv 2310.08915) starts from the mask of another method
and lets pruned weights grow back while others are pruned in their place, one pair per row and cycle, so that the
*expected* difference between dense and sparse output shrinks. In the letters of the code, for a linear layer y = x W^T:

    s_k   average over the N calibration sequences of the sum of x_k over a sequence's tokens (`stats.sum`)
    q_k   the same for x_k^2 (`.square`);  v_k: average over sequences of the variance of x_k inside one (`.variance`)
    D     = W * s                           what each weight contributes to the output, on average
    e     = sum of D over a row's pruned weights              the row's expected error, dense less sparse
    grow  i: of the weights pruned at the start the one with the largest D / v^p if e > 0, else with the smallest
          (p: `var_power`, 1)
    prune j: of those kept at the start the one with the lowest Wanda score |W| sqrt(q) among those whose D pushes e
          back towards zero (n:m: the one with the lowest score in i's group of m, whatever its D)
    e    <- e + D_j - D_i, until |e| <= threshold, `cycles` swaps are done or e would change its sign; no weight moves
          twice

Starting masks: magnitude, Wanda and SparseGPT (`masks.py`). Beyond the paper: swaps by the exact error instead of its
mean, and the best weights for a mask (`swaps.py`), targets that make up for a part of what earlier layers lost
(`walk.py`, which takes the model block by block), a sparsity of its own for every layer (`allocate.py`), and at last
swaps by the output of the whole model (`global_swaps.py`).

Where this differs from the authors' code (`dsnot_refine` by itself has their defaults, `prune_layer` and the command
have ours): every linear layer is refined unless you ask for `--refine-layers attn` (theirs silently skips the MLP); a
row of 4096 inputs makes 50 swaps, one of 11008 inputs 134, one of 256 three (theirs make 50 whatever the width); the
sign check is an option, on by default (theirs is on with a pattern, off without one, whatever its flag says); a row
without candidates stops instead of running off its lists, so layers of any size work; fifty swaps need only the fifty
best candidates of each kind, so a row is sorted only where candidates tie; with SparseGPT as the start the kept weights
are corrected anew, for the refined mask; on its n:m masks, too, weights are pruned by the lowest Wanda score (theirs:
w^2 over the diagonal of the inverse Hessian).
The threshold is in units of s, so its meaning depends on the sequence length, as in the paper.

    python dsnot.py                                             (the model that ships, 70 %)
    python dsnot.py --model llama2-7b --sparsity 0.7

Shapes: a weight W, its scores and masks are [out, in]; True in a mask = keep.
"""

import argparse
import os
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from allocate import MOST
from data import calibration_windows, load_tokenizer, windows
from data.calibration import InputStats
from data.command import InputError, at_least, parser, record, run
from data.estimate import BATCH, check_folders, dry_run
from data.hub import model_folder
from data.method import (ALLOCATIONS, METHOD, NSAMPLES, REFINES, SCORES, USUAL, fill_in, fits_weights, method_of,
                         parse_pattern, said_of, shared_by)
from data.processes import process_group, processes, say
from data.text import SOURCES, evaluation_ids, told, usual_text
from data.writer import noted, pruned_here
from eval import perplexity
from gpt import GPT, Config, layer_inputs
from masks import check_pattern, keep_mask, magnitude_score, sparsegpt, wanda_score
from swaps import dense_weights, refit_weights, swap_and_refit, swap_refine, with_pruned
from walk import prune, prune_globally


# -------------------------------------------------------------------------------------------------------------- DSnoT

@torch.no_grad()
def dsnot_refine(W: Tensor, keep: Tensor, stats: InputStats, score: Tensor, *, cycles: int = 50, threshold: float = 0.1,
                 var_power: float = 1.0, sign_check: bool | None = None,
                 pattern: tuple[int, int] | None = None) -> Tensor:
    """Refine a mask by prune-and-grow (the rule at the top of this file); returns the new mask.

    W, keep, score [out, in]: weights, starting mask and the scores by which n:m prunes (else not used).
    cycles: swaps per row at most; threshold: a row stops once |e| is no larger, in units of s; var_power: p.
    sign_check: stop a row also when a swap would turn the sign of e; None is the published choice: only for n:m.
    These are the published defaults, for rows of 4096, and ruin narrow ones: give 50 cycles to 4096 inputs, three to
    256, and check the sign, as prune_layer does.
    pattern: (n, m) of the mask, which stays intact; None: unstructured, the number kept in each row stays."""
    assert W.shape == keep.shape == score.shape, (W.shape, keep.shape, score.shape)
    if pattern:
        check_pattern(pattern, W.shape[1])
    sign_check = pattern is not None if sign_check is None else sign_check
    cycles, s = min(cycles, W.shape[1]), stats.sum
    rows = 64 if W.device.type == "cpu" else len(W)  # on a CPU, what a few rows need stays in its cache
    chunks = list(zip(W.split(rows), keep.split(rows)))
    found = [_grow_candidates(w.float(), k, stats, cycles, var_power) for w, k in chunks]
    e, grow, growable = map(torch.cat, zip(*found))
    if pattern is None:
        drop, droppable = map(torch.cat, zip(*(_prune_candidates(w.float(), k, stats, cycles) for w, k in chunks)))
    new, row = keep.clone(), torch.arange(len(W), device=W.device)
    active, start_sign = torch.ones_like(row, dtype=torch.bool), e.sign()
    used_grow, used_drop = W.new_zeros(2, len(W), 2, dtype=torch.long)  # how much of each list is used up
    for _ in range(cycles):
        active &= e.abs() > threshold
        side = (e > 0).long()
        i = grow[row, side, used_grow[row, side]]
        active &= used_grow.sum(1) < growable
        if pattern is None:
            j = drop[row, side, used_drop[row, side]]
            active &= used_drop[row, side] < droppable[row, side]
            used_drop[row, side] += 1
        else:
            member = (i - i % pattern[1])[:, None] + torch.arange(pattern[1], device=W.device)  # [out, m]: its group
            kept = keep[row[:, None], member] & new[row[:, None], member]  # at the start and still
            least, at = score[row[:, None], member].float().masked_fill(~kept, torch.inf).min(1)
            j = member[row, at]
            active &= least < torch.inf
        used_grow[row, side] += 1
        after = e + W[row, j].float() * s[j] - W[row, i].float() * s[i]
        if sign_check:
            active &= after.sign() == start_sign
        if not active.any():
            break
        new[row, i] |= active  # each row grows one i and prunes one j; one that has stopped writes what was there
        new[row, j] &= ~active
        e = torch.where(active, after, e)
    return new


def _grow_candidates(W, keep, stats, cycles, var_power):
    """The rows' error e [rows]; the best weights to grow for e <= 0 and for e > 0 [rows, 2, cycles]; how many a row can
    grow, at most `cycles` [rows]: from both lists together, which are two ends of the same pruned weights."""
    D = W * stats.sum
    gain = D / (stats.variance ** var_power).clamp(min=1e-30)  # a dead input's gain is 0, not 0 / 0
    low, count = extremes(gain.masked_fill(keep, torch.inf), cycles)
    high, _ = extremes(gain.masked_fill_(keep, -torch.inf), cycles, largest=True)
    return D.masked_fill_(keep, 0).sum(1), torch.stack([low, high], 1), count


def _prune_candidates(W, keep, stats, cycles):
    """The best weights to prune for e <= 0 and for e > 0 [rows, 2, cycles], and the number of each [rows, 2]."""
    score = W * (stats.square.sqrt() * stats.sum.sign())  # the Wanda score with the sign of D
    above, above_count = extremes(torch.where(keep & (score > 0), score, torch.inf), cycles)
    below, below_count = extremes(torch.where(keep & (score < 0), -score, torch.inf), cycles)
    return torch.stack([above, below], 1), torch.stack([above_count, below_count], 1)


def extremes(key, k, largest=False):
    """The k smallest entries of each row of key [rows, width] (largest: the k largest), best first: their indices
    [rows, k] and how many are finite [rows]. Those come in the order of a stable sort (largest: of one read from its
    end), but only rows with ties are sorted."""
    value, index = key.topk(min(k + 1, key.shape[1]), dim=1, largest=largest)
    tied = ((value[:, 1:] == value[:, :-1]) & value[:, 1:].isfinite()).any(1)
    if tied.any():
        order = key[tied].argsort(dim=1, stable=True)
        index[tied] = (order.flip(1) if largest else order)[:, :index.shape[1]]
    return index[:, :k], value[:, :k].isfinite().sum(1)


# ---------------------------------------------------------------------------------------------------------- one layer

DAMP = 0.01  # of refit; its default, a hundredth of this, is enough for float32 but fits the calibration too closely


@torch.no_grad()
def prune_layer(W, stats, *, score, refine, goal=None, sparsity=None, pattern=None, refit=False, cycles=None,
                threshold=USUAL["threshold"], sign_check=USUAL["sign_check"]):
    """One layer's pruned weight [out, in] in float32. stats: its InputStats, with a Gram matrix where needs_gram says
    so; goal: as in swap_refine; score, refine: of SCORES and REFINES; sparsity or pattern: as in keep_mask; cycles:
    the most swaps of a row, of DSnoT (None: 50 per 4096 inputs) and of each turn of exact swaps (None: until none
    helps); threshold, sign_check: of DSnoT."""
    assert score in SCORES and refine in REFINES, (score, refine)
    W, amount = W.float(), dict(pattern=pattern) if pattern else dict(sparsity=sparsity)
    scores = magnitude_score(W) if score == "magnitude" else wanda_score(W, stats)
    if score == "sparsegpt":
        weights_for = partial(sparsegpt, W if goal is None else dense_weights(W, stats.gram, goal), stats.gram)
        new = weights_for(**amount)
        keep = new != 0
    else:
        weights_for = lambda keep: torch.where(keep, W, 0)
        keep = keep_mask(scores, **amount)
        new = weights_for(keep=keep)
    if "dsnot" in refine:
        few = max(1, round(W.shape[1] * 50 / 4096)) if cycles is None else cycles
        keep = dsnot_refine(W, keep, stats, scores, cycles=few, threshold=threshold, sign_check=sign_check,
                            pattern=pattern)
    if refit and "swap" in refine:
        return swap_and_refit(W, keep, stats.gram, goal=goal, max_swaps=cycles, pattern=pattern, damp=DAMP)
    if refit:
        return refit_weights(W, keep, stats.gram, goal=goal, damp=DAMP)
    if "dsnot" in refine:
        new = weights_for(keep=keep)
    if "swap" in refine:
        if score == "sparsegpt":  # swaps are made among the corrected weights
            goal = W @ stats.gram if goal is None else goal
            W = with_pruned(new, keep, stats.gram, goal)
        new = weights_for(keep=swap_refine(W, keep, stats.gram, goal=goal, max_swaps=cycles, pattern=pattern))
    return new


# -------------------------------------------------------------------------------------------------------- the command

def options():
    p = parser(__doc__)
    p.add_argument("--model", default="tiny", help="a preset (data/hub.py lists them), a Hub id or a folder")
    p.add_argument("--out", help="the folder of the pruned checkpoint (default: out/MODEL-METHOD)")
    p.add_argument("--dry-run", action="store_true",
                   help="say what the run would take in memory, disk and time; fetches config.json alone")
    group = p.add_argument_group("what to prune")
    how_many = group.add_mutually_exclusive_group()
    how_many.add_argument("--sparsity", type=float, default=0.7, help="the share of weights to prune")
    how_many.add_argument("--pattern", metavar="N:M", help="such as 2:4: N kept of every M consecutive weights")
    group.add_argument("--score", default="wanda", choices=SCORES, help="the first mask")
    group.add_argument("--allocate", default="uniform", choices=ALLOCATIONS,
                       help="uniform: the same sparsity everywhere; owl: less in blocks with more outliers; "
                            "sensitivity: less in layers whose pruning hurts more")
    group = p.add_argument_group("how to refine the mask")
    group.add_argument("--refine", default="dsnot", choices=REFINES,
                       help="DSnoT's rule, swaps that lower the exact error, or both")
    group.add_argument("--refit", action=argparse.BooleanOptionalAction, default=False,
                       help="make the kept weights the best ones for the mask (least squares); with swaps, by turns")
    group.add_argument("--propagate", action=argparse.BooleanOptionalAction, default=None,
                       help="prune layer after layer on what the pruned ones leave, and make up for some of it "
                            "(default: with swap or --refit)")
    group.add_argument("--global-swaps", type=int, default=0, metavar="ROUNDS",
                       help="at the end so many rounds of swaps by the output of the whole model, which has to fit "
                            "into memory three times (in 16 bits four times)")
    group.add_argument("--cycles", type=int,
                       help="swaps per row at most, of DSnoT and of each turn of exact ones (default: of DSnoT's 50 "
                            "per 4096 inputs, of exact ones until none helps)")
    group.add_argument("--threshold", type=float,
                       help=f"DSnoT: a row is left alone once its expected error in a sequence is no larger "
                            f"(default: {USUAL['threshold']})")
    group.add_argument("--sign-check", action=argparse.BooleanOptionalAction, default=None,
                       help="DSnoT: stop a row before its expected error changes sign (default: yes)")
    group.add_argument("--refine-layers", default=USUAL["refine_layers"], choices=["attn", "all"],
                       help="refine the masks of attention alone, or of the MLP, too")
    group = p.add_argument_group("calibration and evaluation")
    group.add_argument("--calib",
                       help=f"text: {', '.join(SOURCES)} or a file (default: tiny where the model has tiny's "
                            f"tokenizer, else c4)")
    group.add_argument("--nsamples", type=int, default=NSAMPLES, help="calibration sequences")
    group.add_argument("--seqlen", type=int, help="tokens a sequence (default: 2048, or the model's limit if lower)")
    group.add_argument("--data", help="evaluation text, one of the same (default: tiny or wikitext2)")
    group.add_argument("--split", choices=["validation", "test", "held-out"],
                       help="of a named text (default: test); of a file the halves of its last tenth, or both "
                            "(default: all of it if calibration reads none of it, else held-out)")
    group.add_argument("--compare", action=argparse.BooleanOptionalAction, default=None,
                       help="prune a second time without refinement, for comparison (default: where the model has "
                            "tiny's tokenizer and the text is tiny)")
    return p.parse_args()


def check(args, config):
    """Raise InputError for options that can't be meant."""
    allocates, unrefined, no_dsnot = args.allocate != "uniform", args.refine == "none", "dsnot" not in args.refine
    left_out = f"which --refine {args.refine} leaves out"
    at_least(args, nsamples=processes()[1], seqlen=2, cycles=0, threshold=0, global_swaps=0)
    if args.pattern:
        for width in layer_inputs(config).values():
            check_pattern(parse_pattern(args.pattern), width)
    for wrong, sentence in [
            (not 0 <= args.sparsity < 1,
             f"--sparsity {args.sparsity} must be at least 0 and below 1 (0.7 prunes 70 %)"),
            (allocates and args.pattern,
             f"--allocate {args.allocate} can't change the pattern {args.pattern}: give a --sparsity"),
            (allocates and args.sparsity > MOST,
             f"--allocate {args.allocate} prunes no layer by more than {MOST}, so that --sparsity {args.sparsity} "
             f"can't be reached: lower it, or leave out --allocate"),
            (args.out is not None and Path(os.path.normpath(args.out)).name in ("", ".."),
             f"--out {args.out} has no name of its own: give a folder to make"),
            (args.cycles is not None and unrefined, f"--cycles {args.cycles} is for swaps, {left_out}"),
            (args.refine_layers != "all" and unrefined,
             f"--refine-layers {args.refine_layers} is for refined layers, {left_out}"),
            (args.threshold is not None and no_dsnot, f"--threshold is for DSnoT, {left_out}"),
            (args.sign_check is not None and no_dsnot, f"--sign-check is for DSnoT, {left_out}"),
            (args.compare and not args.propagate and method_of(vars(args)) == args.score,
             "--compare prunes once more without refinement, and there is none: leave it out")]:
        if wrong:
            raise InputError(sentence)


def prune_and_measure(args, folder, amount, passes):
    """Make the checkpoint of each of the passes (name, folder, options of prune; the first one, the dense model, is
    there and has none), measure it and print a line; returns the rows of the table."""
    def load(folder):
        return GPT.from_pretrained(folder, device=args.device, stream=True)

    tokenizer, batch = load_tokenizer(folder), max(1, BATCH // args.seqlen)
    model = GPT.open(args.model)  # here its weights are fetched
    config = model.config
    model.source.check_dense()
    same = shared_by(args, model.source)
    notes = check_folders(args, model, passes[1:], same)
    if args.data not in SOURCES and os.path.realpath(args.data) == os.path.realpath(args.calib):
        args.split = args.split or "held-out"  # which is recorded, too
    ids = evaluation_ids(args.data, args.split, tokenizer, args.seqlen)
    calibration = calibration_windows(args.calib, tokenizer, args.nsamples, args.seqlen, args.seed)
    count = len(windows(ids, args.seqlen))
    allocated = f" ({said_of('allocate', args.allocate)})" * (args.allocate != "uniform")
    read = f"{count} window{'s' * (count != 1)} of {args.seqlen} tokens{config.remark(args.seqlen)}"
    say(f"{args.model}: {amount} pruned{allocated}, calibration {args.nsamples} x {args.seqlen} tokens of "
        f"{args.calib}, perplexity on {told(args.data, args.split)} ({read})")
    if pruned_here(folder):
        notes.append(f"{args.model} has been pruned before; it is what is called dense here")
    if fits_weights(args.score, args.refit) and calibration.numel() < config.intermediate_size:
        notes.append(f"weights are fitted to {calibration.numel()} tokens of calibration text, fewer than the "
                     f"{config.intermediate_size} inputs of a layer: give more --nsamples, or other texts suffer")
    for one in notes:
        say(f"note: {one}")

    rows, width = [], max(24, *(len(name) for name, *_ in passes))
    zeros = None if pruned_here(folder) else 0.0  # of what is called dense here
    say(f"\n{'method':<{width}}{'sparsity':>10} {'perplexity':>13} {'seconds':>9}")
    for name, place, how in passes:
        seconds, layers = 0.0, []
        if how:
            make = prune_globally if "global_swaps" in how else prune
            layers = make(load(folder), calibration, place, how | same, prune_layer, batch=batch, **how)
            seconds = noted(Path(place) / "pruning.json")["seconds"]
            zeros = sum(one["weights"] * one["sparsity"] for one in layers) / sum(one["weights"] for one in layers)
        ppl = perplexity(load(place), ids, args.seqlen, batch, progress=True)
        rows.append({"method": name, "sparsity": zeros, "perplexity": ppl, "seconds": seconds, "layers": layers})
        say(f"{name:<{width}}{'' if zeros is None else f'{zeros:.2%}':>10} {ppl:>13.2f} {seconds:>9.1f}")
    return rows


def main():
    args = options()
    with process_group(args):
        folder = model_folder(args.model, weights=False, config_only=args.dry_run)
        config = Config.read(folder)
        check(args, config)
        amount, title = fill_in(args, config, usual_text(folder, None))
        method = {name: getattr(args, name) for name in METHOD}
        method |= dict(pattern=parse_pattern(args.pattern), sparsity=None) if args.pattern else {}
        plain = method | USUAL | dict(refine="none", refit=False, propagate=False)
        method |= dict(global_swaps=args.global_swaps) if args.global_swaps else {}
        if args.dry_run:
            return dry_run(args, config, amount, [method] + [plain] * args.compare, prune_layer)
        out = Path(os.path.normpath(args.out))  # "missing/.." is where it will be written
        title += " (propagate)" * (args.compare and title == args.score)  # else both have one name
        passes = [("dense", folder, None), (title, out, method)]
        if args.compare:
            passes.insert(1, (args.score, out.with_name(out.name + ".unrefined"), plain))
        rows = prune_and_measure(args, folder, amount, passes)
        say(f"\nsaved {out}")
        if processes()[0] == 0:
            record(args, {"data": args.data, "seqlen": args.seqlen, "rows": rows})


if __name__ == "__main__":
    run(main, goes_on=True)
