"""What a 4096 x 4096 layer costs, in one run: score + mask + DSnoT as a multiple of one torch.sort of the matrix, and
exact swaps as a multiple of SparseGPT, with the squared error that each leaves.

    python tests/bench_dsnot.py --json results/bench_dsnot.json
"""

import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from data.command import at_least, parser, record, run, start
from data.device import timed
from dsnot import InputStats, dsnot_refine, keep_mask, magnitude_score, sparsegpt, swap_refine, wanda_score
from swaps import relative_error

AMOUNTS = {"50 %": dict(sparsity=0.5), "70 %": dict(sparsity=0.7),
           "2:4": dict(pattern=(2, 4)), "4:8": dict(pattern=(4, 8))}


def main():
    p = parser(__doc__)
    p.add_argument("--size", type=int, default=4096)
    p.add_argument("--repeats", type=int, default=5)
    args = p.parse_args()
    start(args)
    at_least(args, size=64, repeats=1)
    n, device = args.size, args.device
    W = torch.randn(n, n, device=device).bfloat16().float()  # rounded as in checkpoints, so that scores tie
    stats = InputStats(n, gram=True)
    scale, mix = torch.rand(n, device=device) * 2, torch.randn(n // 4, n, device=device) / (n // 4) ** 0.5
    for _ in range(8):  # inputs of which a part moves together, as in a model
        x = torch.randn(n // 4, n // 4, device=device) @ mix + 0.3 * torch.randn(n // 4, n, device=device)
        stats.add((x + 0.1) * scale)

    def work(score, amount):
        scores = magnitude_score(W) if score == "magnitude" else wanda_score(W, stats)
        keep = keep_mask(scores, **amount)
        return dsnot_refine(W, keep, stats, scores, pattern=amount.get("pattern"), sign_check=False)

    results = []
    for score in "wanda", "magnitude":
        for label, amount in AMOUNTS.items():
            taken = [[timed(job, device)[0] for job in (lambda: torch.sort(W), lambda: work(score, amount))]
                     for _ in range(args.repeats)]  # in turns, so that other load on the machine meets both
            sort, ours = map(statistics.median, zip(*taken))
            results.append({"method": f"{score} + dsnot", "amount": label, "against": "torch.sort",
                            "seconds": ours, "ratio": ours / sort})
            print(f"{score:<10} {label:>5}  50 cycles: {ours / sort:5.2f} x torch.sort, {ours:.2f} s", flush=True)
    for label in "70 %", "2:4":
        amount = AMOUNTS[label]
        keep = keep_mask(wanda_score(W, stats), **amount)

        def best_of(work):  # a GPU's kernels are loaded by the first
            return min((timed(work, device) for _ in range(1 + (device != "cpu"))), key=lambda found: found[0])

        theirs, corrected = best_of(lambda: sparsegpt(W, stats.gram, **amount))
        goal = relative_error(W, corrected, stats.gram)
        for most in n // 64, n // 32, None:
            ours, new = best_of(lambda: swap_refine(W, keep, stats.gram, pattern=amount.get("pattern"), max_swaps=most))
            error = relative_error(W, W * new, stats.gram)
            results.append({"method": "wanda + swap", "amount": label, "against": "sparsegpt", "max_swaps": most,
                            "seconds": ours, "ratio": ours / theirs, "error": error, "error_of_sparsegpt": goal})
            print(f"swaps {label:>5}, {most or 'all'}: {ours / theirs:5.2f} x SparseGPT, {ours:.2f} s, "
                  f"error {error:.4f} (SparseGPT {goal:.4f})", flush=True)
    record(args, results)


if __name__ == "__main__":
    run(main)
