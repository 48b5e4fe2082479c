"""What AST costs: its training step against the same step with dense weights and the same teacher, by default on
`tiny`.

    python tests/bench_ast.py --json results/bench_ast.json

Steps of both kinds take turns, so other load on the machine slows both alike. Every --mask-every-th step of AST chooses
the mask anew: that share of the median choice is added to the median step. The options are those of ast_train.py.
"""

import statistics
import sys
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from ast_loop import backward, make_sparse, set_up
from ast_method import CLIP, AnnealedAdamW, sparse_layers
from ast_train import SLORB_K, options
from data.command import record, run, start
from data.device import timed
from gpt import GPT

STEPS, WARM = 30, 2  # of each kind; the first ones compile and don't count


def main():
    args = options(__doc__)
    start(args)
    teacher = set_up(GPT.from_pretrained(args.model, args.device, getattr(torch, args.dtype)), args)
    students = {"dense": GPT.from_pretrained(args.model, args.device, torch.float32)}
    for method, slorb_k in ("ast", None), ("ast-slorb", args.slorb_k or SLORB_K):
        students[method] = GPT.from_pretrained(args.model, args.device, torch.float32)
        make_sparse(students[method], args, slorb_k, None)
    ids = torch.randint(students["dense"].config.vocab_size, (args.batch, args.seqlen + 1), device=args.device)

    def step(student, optimizer):
        backward(student, teacher, ids, args)
        nn.utils.clip_grad_norm_(student.parameters(), CLIP).item()
        optimizer.step()
        optimizer.zero_grad()

    def choose(student):
        for layer in sparse_layers(student).values():
            layer.update_mask()

    pairs = {method: (set_up(student, args), AnnealedAdamW(student, 1e-6)) for method, student in students.items()}
    steps, choices = {method: [] for method in pairs}, []
    for _ in range(STEPS):
        for method, pair in pairs.items():
            steps[method].append(timed(lambda: step(*pair), args.device)[0])
        choices.append(timed(lambda: choose(students["ast"]), args.device)[0])
    middle = {method: statistics.median(taken[WARM:]) for method, taken in steps.items()}
    choice = statistics.median(choices[WARM:]) / args.mask_every if args.mask_every else 0.0
    rows = {method: {"seconds": middle[method] + (method != "dense") * choice} for method in middle}
    for method, row in rows.items():
        row["ratio"] = row["seconds"] / rows["dense"]["seconds"]
        print(f"{method:10} {row['seconds']:6.3f} s a step of {len(ids)} x {args.seqlen} tokens, "
              f"{row['ratio']:5.3f} x dense")
    record(args, rows)


if __name__ == "__main__":
    run(main)
