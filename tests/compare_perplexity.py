"""Compare the perplexity of eval.py with that of a plain loop over transformers on a whole text.

    python tests/compare_perplexity.py --json results/perplexity-tiny.json
    python tests/compare_perplexity.py --model FOLDER --data FILE --seqlen 512 --json results/perplexity-FOLDER.json

The tests do the same on 40 windows. Exits with 1 if the two differ by more than 1e-3.
"""

import sys

from test_eval import plain_perplexity  # which puts the repository on the path, too

from data import load_tokenizer, windows
from data.command import at_least, parser, record, run, start
from data.hub import model_folder
from data.text import SOURCES, evaluation_ids
from eval import perplexity
from gpt import GPT


def main():
    p = parser(__doc__)
    p.add_argument("--model", default="tiny", help="a LLaMA: a preset, a Hub id or a folder")
    p.add_argument("--data", default="tiny", help=f"text: {', '.join(SOURCES)} or a file, which is read whole")
    p.add_argument("--seqlen", type=int, help="tokens a window (default: 2048, or the model's limit if lower)")
    args = p.parse_args()
    start(args)
    at_least(args, seqlen=2)
    folder = model_folder(args.model)
    model = GPT.from_pretrained(folder, stream=True)
    args.seqlen = args.seqlen or model.config.window_length()
    ids = evaluation_ids(args.data, "test" if args.data in SOURCES else None, load_tokenizer(folder), args.seqlen)
    ours = perplexity(model, ids, args.seqlen, batch=max(1, 4096 // args.seqlen))
    plain = plain_perplexity(folder, ids, args.seqlen)
    count = len(windows(ids, args.seqlen))
    print(f"{count} windows of {args.seqlen} of {len(ids):,} tokens: ours {ours:.5f}, a plain loop over transformers "
          f"{plain:.5f}, difference {abs(ours - plain):.1e}")
    record(args, {"tokens": len(ids), "windows": count, "ours": ours, "plain_loop": plain})
    sys.exit(not abs(ours - plain) <= 1e-3)  # NaN is no agreement


if __name__ == "__main__":
    run(main)
