"""What the layers of a propagated run should aim at: perplexity of validation text after swaps alone and after swaps
and refit, for the places and shares that walk.AIM may name.

    python tests/compare_goal.py --json results/goal-tiny.json                    (half a minute for each of the twenty)
    python tests/compare_goal.py --model FOLDER --data TEXT_FILE --json results/goal-NAME.json
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import walk
from data import calibration_windows, load_tokenizer
from data.command import parser, record, run, start
from data.text import SOURCES, evaluation_ids
from dsnot import prune_layer
from eval import perplexity
from gpt import GPT


def main():
    p = parser(__doc__)
    p.add_argument("--model", default="tiny", help="a preset, a Hub id or a folder")
    p.add_argument("--data", default="tiny", help="a text source or a file, whose last tenth is measured")
    args = p.parse_args()
    start(args)
    tokenizer, rows = load_tokenizer(args.model), []
    calibration = calibration_windows(args.data, tokenizer, 128, 256, args.seed)
    ids = evaluation_ids(args.data, "validation" if args.data in SOURCES else "held-out", tokenizer, 256)
    for label, amount in ("70%", dict(sparsity=0.7)), ("2:4", dict(pattern=(2, 4))):
        for free in walk.AIM:
            for walk.AIM[free] in (0.0, 0.0), (0.5, 0.0), (1.0, 0.0), (0.5, 0.5), (1.0, 1.0):
                with tempfile.TemporaryDirectory() as folder:
                    dense = GPT.from_pretrained(args.model, device=args.device, stream=True)
                    walk.prune(dense, calibration, Path(folder) / "out", {}, prune_layer, score="wanda", refine="swap",
                               refit=free == "weights", propagate=True, **amount)
                    found = perplexity(GPT.from_pretrained(Path(folder) / "out", device=args.device), ids, 256)
                rows.append({"amount": label, "free": free, "aim": walk.AIM[free], "perplexity": found})
                print(f"{label}, {free}, aiming at {walk.AIM[free]}: perplexity {found:.2f}", flush=True)
    record(args, rows)


if __name__ == "__main__":
    run(main)
