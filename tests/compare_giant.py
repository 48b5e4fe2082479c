"""What methods make of giant activations, as large models have: in every block of `tiny` one row of up_proj is
multiplied and the column of down_proj that reads it divided by a power of 2. That changes nothing of what the model
computes, so a method should not notice.

    python tests/compare_giant.py --json results/giant.json                           (a quarter of an hour on one core)
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import calibration_windows, load_tokenizer
from data.command import parser, record, run, start
from data.text import evaluation_ids
from dsnot import prune_layer
from eval import perplexity
from gpt import GPT
from walk import prune

METHODS = {  # name: (score, refine, refit, propagate)
    "wanda": ("wanda", "none", False, False), "wanda + dsnot": ("wanda", "dsnot", False, False),
    "sparsegpt": ("sparsegpt", "none", False, False), "sparsegpt (propagate)": ("sparsegpt", "none", False, True),
    "wanda + swap": ("wanda", "swap", False, True), "wanda + swap + refit": ("wanda", "swap", True, True),
    "sparsegpt + swap + refit": ("sparsegpt", "swap", True, True)}


def main():
    args = parser(__doc__).parse_args()
    start(args)
    tokenizer, rows = load_tokenizer("tiny"), []
    calibration = calibration_windows("tiny", tokenizer, 128, 256, args.seed)
    ids = evaluation_ids("tiny", "test", tokenizer, 256)
    for power in 0, 10, 14, 17:
        model = GPT.from_pretrained("tiny")
        for block in model.blocks():
            up, down = block.mlp.up_proj.weight.data, block.mlp.down_proj.weight.data
            which = down.norm(dim=0).argmax()
            up[which] *= 2.0 ** power
            down[:, which] /= 2.0 ** power
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(f"{folder}/dense")
            for method, (score, refine, refit, propagate) in METHODS.items():
                dense = GPT.from_pretrained(f"{folder}/dense", device=args.device, stream=True)
                prune(dense, calibration, f"{folder}/{method}", {}, prune_layer, score=score, refine=refine,
                      refit=refit, propagate=propagate, sparsity=0.7, batch=32)
                found = perplexity(GPT.from_pretrained(f"{folder}/{method}", device=args.device), ids, 256)
                rows.append({"method": method, "times": 2 ** power, "perplexity": found})
                print(f"2^{power}, {method}: perplexity {found:.2f}", flush=True)
    record(args, rows)


if __name__ == "__main__":
    run(main)
