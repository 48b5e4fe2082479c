"""Does it harm to calibrate on text that a model knows by heart? `tiny` is trained on for EPOCHS over 128 windows of
its training text, then pruned, calibrated on these windows or on 128 of validation text, which it has never seen, and
measured on the test text.

    python tests/compare_memorised.py --json results/memorised.json                 (about eight minutes on two cores)
"""

import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import load_tokenizer, windows
from data.command import parser, record, run, start
from data.method import propagates
from data.processes import progress_bar
from data.text import evaluation_ids, load_text
from dsnot import prune_layer
from eval import perplexity
from gpt import GPT
from walk import prune

EPOCHS, BATCH, LR = 10, 8, 3e-4
METHODS = {"magnitude": ("magnitude", "none", False), "wanda": ("wanda", "none", False),
           "sparsegpt": ("sparsegpt", "none", False), "wanda + swap": ("wanda", "swap", False),
           "wanda + swap + refit": ("wanda", "swap", True)}


def memorise(model, texts):
    """Train a model on windows [n, T] until it knows them."""
    optimizer = torch.optim.AdamW(model.parameters(), LR, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in progress_bar(range(EPOCHS), desc="learning by heart"):
        for ids in texts[torch.randperm(len(texts))].split(BATCH):
            loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


def main():
    args = parser(__doc__).parse_args()
    start(args)
    tokenizer, rows = load_tokenizer("tiny"), []
    known, new = (windows(tokenizer.encode(load_text("tiny", split)), 256) for split in ("train", "validation"))
    known, new = (found[torch.linspace(0, len(found) - 1, 128).long()].to(args.device) for found in (known, new))
    ids = evaluation_ids("tiny", "test", tokenizer, 256)
    model = GPT.from_pretrained("tiny", device=args.device, dtype=torch.float32)

    def measured(method, amount, calibration, model):
        rows.append({"method": method, "amount": amount, "calibration": calibration,
                     "perplexity": perplexity(model, ids, 256)})
        print(f"{method:<22} {amount:>4} {calibration:<15} perplexity {rows[-1]['perplexity']:.2f}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        memorise(model, known)
        model.save_pretrained(f"{folder}/dense")
        measured("dense", "0%", "", model)
        print(f"perplexity of the text that it knows: {perplexity(model, known.flatten(), 256):.2f}")
        for label, amount in ("70%", dict(sparsity=0.7)), ("2:4", dict(pattern=(2, 4))):
            for method, (score, refine, refit) in METHODS.items():
                for text, calibration in (("known by heart", known), ("new", new)):
                    out = Path(folder) / f"{method}-{label}-{text}".replace(":", "of")
                    prune(GPT.from_pretrained(f"{folder}/dense", device=args.device, stream=True), calibration,
                          out, {}, prune_layer, score=score, refine=refine, refit=refit,
                          propagate=propagates(method), **amount)
                    measured(method, label, text, GPT.from_pretrained(out, device=args.device))
    record(args, rows)


if __name__ == "__main__":
    run(main)
