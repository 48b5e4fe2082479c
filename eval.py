"""Measure a model: perplexity.

Perplexity is that of the pruning papers: the text is tokenized once (with BOS where the model's tokenizer adds it), cut
into windows of `seqlen` tokens that do not overlap, the tail is dropped, and the negative log-likelihood is averaged over
all predicted tokens, which are the seqlen - 1 last ones of every window. Numbers of different `seqlen` can't be
compared (LLaMA2-7B on WikiText-2: 5.47 at 2048, 5.12 at 4096), so it is printed beside every figure.

    python eval.py --model tiny
    python eval.py --model llama2-7b --data wikitext2 --seqlen 2048
"""

import math
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import load_text, load_tokenizer, windows
from data.command import InputError, parser, record, run, start
from gpt import GPT, rotary


@torch.inference_mode()
def perplexity(model, ids, seqlen, batch=8, progress=False):
    """Perplexity of a model on token ids (a list or a 1-D tensor), protocol as above -> float.

    A model that is held in memory takes `batch` windows at a time through all its blocks; a streamed one takes all
    windows through one block at a time, so each block is read once."""
    x = windows(ids, seqlen)
    device = model.model.embed_tokens.weight.device
    positions = torch.arange(seqlen, device=device)
    rope = rotary(model.config, positions)
    total = 0.0
    bar = tqdm(total=len(x) * len(model.model.layers), desc="perplexity", unit="window-block", disable=None if progress else True, leave=False)
    for group in [x] if model.streams else x.split(batch):
        hidden = [model.embed(part.to(device)) for part in group.split(batch)]
        for block in model.blocks():
            for i, part in enumerate(hidden):
                hidden[i] = block(part, positions, rope)
                bar.update(len(part))
        for part, target in zip(hidden, group.split(batch)):
            logits = model.head(part)[:, :-1].float()
            total += F.cross_entropy(logits.flatten(0, 1), target[:, 1:].to(device).flatten(), reduction="sum").double().item()
    bar.close()
    return math.exp(min(total / (len(x) * (seqlen - 1)), 700.0))  # a ruined model overflows nothing


def default_seqlen(config):
    """The papers' 2048 tokens, or what a smaller model was made for."""
    return min(2048, config.raw.get("max_position_embeddings") or 2048)


def main():
    p = parser(__doc__)
    p.add_argument("--model", default="tiny", help="a preset, a Hub id or a folder")
    p.add_argument("--data", help="tiny, wikitext2, c4 or a text file (default: tiny for tiny, else wikitext2)")
    p.add_argument("--split", default="test", choices=["validation", "test"], help="which text of tiny, wikitext2")
    p.add_argument("--seqlen", type=int, help="tokens a window (default: 2048, or the model's own limit if that is lower)")
    p.add_argument("--batch", type=int, default=8, help="windows at a time")
    p.add_argument("--stream", action="store_true", help="read the model block by block (for one larger than memory)")
    args = p.parse_args()
    start(args)
    data = args.data or ("tiny" if args.model == "tiny" else "wikitext2")
    model = GPT.from_pretrained(args.model, device=args.device, stream=args.stream)
    seqlen = args.seqlen or default_seqlen(model.config)
    if seqlen < 2 or args.batch < 1:
        raise InputError(f"--seqlen {seqlen} must be at least 2, --batch {args.batch} at least 1")
    ids = load_tokenizer(args.model).encode(load_text(data, args.split if data in ("tiny", "wikitext2") else None))
    begin = time.perf_counter()
    ppl = perplexity(model, ids, seqlen, args.batch, progress=True)
    tokens = len(ids) // seqlen * seqlen
    print(f"{args.model} on {data}: perplexity {ppl:.3f}  (seqlen {seqlen}, {tokens:,} of {len(ids):,} tokens, "
          f"{time.perf_counter() - begin:.1f} s)")
    record(args, {"perplexity": ppl, "data": data, "seqlen": seqlen, "tokens": tokens})


if __name__ == "__main__":
    run(main)
