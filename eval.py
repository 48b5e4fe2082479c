"""Measure models: perplexity, zero-shot accuracy, speed; tables and plots of results (results/compare.py).

Perplexity is that of the pruning papers: the text is tokenized once (with BOS where the model's tokenizer adds it), cut
into windows of `seqlen` tokens that do not overlap, the tail is dropped, and the negative log-likelihood is averaged
over all predicted tokens, the last seqlen - 1 of every window. Of C4 the first 256 windows count.
Numbers of different `seqlen` can't be compared (LLaMA2-7B on WikiText-2: 5.47 at 2048, 5.12 at 4096), so it is printed
beside every figure. Blocks are read from disk one at a time, so a model may be larger than memory.

Zero-shot accuracy is that of EleutherAI's lm-evaluation-harness: for every choice of a question the log-likelihood of
the choice after its context, contexts cut from the left where the model can't take them whole. `acc` counts questions
whose right choice is the most likely one, `acc_norm` those where it is so after each log-likelihood is divided by its
choice's length in characters. The one difference: log-likelihoods are float32 also where the model computes in
bfloat16.

    python eval.py --model tiny
    python eval.py --model llama2-7b --data wikitext2 --seqlen 2048
    python eval.py --model out/llama2-7b-wanda-dsnot-70 --tasks --json results/tasks.json
    python eval.py --compare results/tiny/*.json --plot out/tiny.png

Shapes: B batch, T tokens, C hidden size.
"""

import math
import statistics
import sys
import time
from argparse import BooleanOptionalAction
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import load_tokenizer, windows
from data.command import InputError, at_least, parser, record, run, start, what_keeps_from_writing
from data.processes import free_share, progress_bar
from data.tasks import SEVEN, TASKS, encode_pair, load_task
from data.text import SOURCES, evaluation_ids, told, usual_text
from gpt import GPT, rotary
from results.compare import compare, read_rows

try:
    import resource
except ImportError:  # Windows
    resource = None

# -------------------------------------------------------------------------------------------- perplexity and accuracy


def hidden_states(model, batches, label, progress):
    """Yield what the last block makes of each batch of ids [B, T]: x [B, T, C].

    A model that is held in memory takes one batch at a time through all its blocks. A streamed one takes as many as
    fill half of the free memory through one block at a time, so that every block is read once if the text's hidden
    states fit there. Peak memory: embedding, head, one block, these hidden states, what a batch takes in a block."""
    device, c, longest = model.device, model.config, max(ids.shape[1] for ids in batches)
    positions = torch.arange(longest, device=device)
    rope, together = rotary(c, positions), 1
    if model.streams:
        size = max(ids.numel() for ids in batches) * c.hidden_size * model.model.embed_tokens.weight.element_size()
        together = max(1, free_share(device) // 2 // size)  # each of torchrun's processes measures the whole text
    with progress_bar(total=sum(map(len, batches)) * c.num_hidden_layers, desc=label, unit="sequence-block",
                      disable=not progress) as bar:
        for i in range(0, len(batches), together):
            hidden = [model.embed(ids) for ids in batches[i:i + together]]
            for block in model.blocks():
                for j, x in enumerate(hidden):
                    T = x.shape[1]
                    hidden[j] = block(x, positions[:T], rope and (rope[0][:T], rope[1][:T]))
                    bar.update(len(x))
                del block  # before the next one is read
            yield from hidden


@torch.inference_mode()
def perplexity(model: GPT, ids, seqlen: int, batch: int = 8, progress: bool = False) -> float:
    """Perplexity of a model on token ids (a list or a 1-D tensor), protocol as above, `batch` windows at a time in the
    blocks and one at a time in the head, whose float32 logits would be the largest tensor of all."""
    assert seqlen > 1, "a window's first token is not predicted"
    x, total = windows(ids, seqlen), 0.0
    batches = x.split(batch)
    for part, hidden in zip(batches, hidden_states(model, batches, "perplexity", progress)):
        for window, h in zip(part.to(hidden.device), hidden):
            total += F.cross_entropy(model.head(h[:-1]).float(), window[1:], reduction="sum").double()
    loss = total.item() / (len(x) * (seqlen - 1))
    return math.exp(loss) if loss < 700 else math.inf  # or NaN: a ruined model


@torch.inference_mode()
def log_likelihoods(model, pairs, max_length, batch=8, progress=False):
    """log P(continuation | context) in nats of every pair of ids (context, continuation), lists of a token or more ->
    list of floats.

    Of a pair longer than max_length + 1 tokens the left end is cut off; the last token is only predicted. Pairs that
    differ in nothing but the last token (" yes", " no") share one pass; long ones go first, `batch` at a time."""
    rows = {}  # {input ids: [(index of the pair, continuation)]}
    for i, (context, continuation) in enumerate(pairs):
        assert len(continuation) <= max_length, (len(continuation), max_length)
        rows.setdefault(tuple((context + continuation)[-(max_length + 1):-1]), []).append((i, continuation))
    order = sorted(rows, key=len, reverse=True)
    parts = [order[i:i + batch] for i in range(0, len(order), batch)]
    batches = [nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in part], batch_first=True) for part in parts]
    found = [0.0] * len(pairs)
    for part, hidden in zip(parts, hidden_states(model, batches, "log-likelihood", progress)):
        for ids, x in zip(part, hidden):  # causal attention: what is padded on the right changes nothing on the left
            longest = max(len(continuation) for _, continuation in rows[ids])
            log_p = model.head(x[len(ids) - longest:len(ids)]).float().log_softmax(-1)  # [longest, vocab]
            for i, continuation in rows[ids]:
                target = torch.tensor(continuation, device=x.device)[:, None]
                found[i] = log_p[-len(continuation):].gather(1, target).sum().item()
    return found


def accuracy(examples, scores, normalise):
    """{acc, acc_stderr, questions} and where `normalise` {acc_norm, acc_norm_stderr}. scores: a log-likelihood for each
    pair of each example. The standard error pools the variances of the examples' groups; None where each group has a
    single question."""
    right, scores = {"acc": []} | ({"acc_norm": []} if normalise else {}), iter(scores)
    for example in examples:
        own = [next(scores) for _ in example.pairs]
        values = {"acc": own, "acc_norm": [score / n if n else -math.inf for score, n in zip(own, example.lengths)]}
        for name in right:
            chosen = None if any(map(math.isnan, own)) else values[name].index(max(values[name]))  # NaN: a ruined model
            right[name].append(float(chosen == example.gold))
    groups = {}
    for i, example in enumerate(examples):
        groups.setdefault(example.group, []).append(i)
    result, free = {"questions": len(examples)}, len(examples) - len(groups)  # degrees of freedom
    for name, hits in right.items():
        squares = 0.0
        for members in groups.values():
            mean = statistics.mean(hits[i] for i in members)
            squares += sum((hits[i] - mean) ** 2 for i in members)
        result[name] = statistics.mean(hits)
        result[f"{name}_stderr"] = math.sqrt(squares / free / len(hits)) if free else None
    return result


def encoded_tasks(tokenizer, names, context_length, folder=None, limit=None):
    """{task: (its Examples, the ids of their pairs)}, folder and limit as in load_task. Raises InputError for bad data,
    and a choice that is longer than the model's context."""
    tasks = {}
    for name in names:
        examples = load_task(name, folder, limit)
        pairs = [encode_pair(tokenizer, *pair) for example in examples for pair in example.pairs]
        if (longest := max(len(continuation) for _, continuation in pairs)) > context_length:
            raise InputError(f"{name}: a choice of {longest} tokens is longer than the model's context of "
                             f"{context_length}")
        tasks[name] = examples, pairs
    return tasks


def zero_shot(model, tasks, batch=8):
    """{task: accuracy(...)} of encoded_tasks and their "mean", printed as they come; acc_norm's mean takes acc where it
    is alone."""
    results = {}
    print(f"{'task':<16}{'questions':>10}{'acc':>18}{'acc_norm':>18}")
    for name, (examples, pairs) in tasks.items():
        scores = log_likelihoods(model, pairs, model.config.context_length, batch, progress=True)
        results[name] = accuracy(examples, scores, TASKS[name].normalise)
        print(task_line(name, results[name]), flush=True)
    if len(results) > 1:
        results["mean"] = {"acc": statistics.mean(r["acc"] for r in results.values()),
                           "acc_norm": statistics.mean(r.get("acc_norm", r["acc"]) for r in results.values())}
        print(task_line("mean", results["mean"]))
    return results


def task_line(name, result):
    cells = [f"{result[m]:.2%}" + (f" ± {e:.2%}" if (e := result.get(f"{m}_stderr")) else "") if m in result else ""
             for m in ("acc", "acc_norm")]
    return f"{name:<16}{result.get('questions', ''):>10}{cells[0]:>18}{cells[1]:>18}"


# -------------------------------------------------------------------------------------------------------------- speed

REPEATS = 3  # timed runs; one before them warms up, and times the tiles of sparse_matmul.py, which takes memory


def speed(model, ids, new_tokens=64):
    """Tokens per second of a prompt ids [1, T] (prefill) and of greedy decoding one sequence after it, medians; bytes
    of the weights; peak memory in bytes, on a GPU what torch allocated, else of the process (Windows: None)."""
    times = []
    for i in range(1 + REPEATS):
        if i == 1 and ids.is_cuda:
            torch.cuda.reset_peak_memory_stats(ids.device)
        marks = [time.perf_counter()]
        for token in model.sample(ids, new_tokens + 1, temperature=0):
            token.tolist()  # waits for the device
            marks.append(time.perf_counter())
        decoding = (marks[-1] - marks[2]) / (new_tokens - 1)  # without the second token, which records a CUDA graph
        times.append((marks[1] - marks[0], decoding))
    prefill, decode = (statistics.median(column) for column in zip(*times[1:]))
    if ids.is_cuda:
        peak = torch.cuda.max_memory_allocated(ids.device)
    elif resource:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    else:
        peak = None
    tensors = [*model.parameters(), *model.buffers()]  # tied ones once
    return {"prompt_tokens": ids.shape[1], "new_tokens": new_tokens,
            "prefill_tokens_per_second": ids.shape[1] / prefill, "decode_tokens_per_second": 1 / decode,
            "weight_bytes": sum(t.numel() * t.element_size() for t in tensors), "peak_memory_bytes": peak}


@torch.inference_mode()
def describe(model, name):
    """What sets a model apart in a table {model, method, amount, options, layers}: what dsnot.py noted in its folder,
    else the share of zeros in its linear layers, by which it is "dense" or "sparse"."""
    noted = model.source.folder / "pruning.json"
    if noted.is_file():
        row = read_rows(model.source.folder)[0]
        options = {name: value for name, value in row["options"].items() if name not in ("model", "files", "command")}
        return {key: row[key] for key in ("model", "method", "amount")} | dict(options=options, layers=row["layers"])
    zeros = total = 0
    groups_fit = True  # 2:4
    for block in model.blocks():
        for layer in block.modules():
            if hasattr(layer, "meta"):  # compressed 2:4
                zeros, total = zeros + math.prod(layer.shape) // 2, total + math.prod(layer.shape)
            elif isinstance(layer, nn.Linear):
                zeros, total = zeros + (layer.weight == 0).sum().item(), total + layer.weight.numel()
                groups_fit &= layer.in_features % 4 == 0 and bool((layer.weight.view(-1, 4) != 0).sum(1).max() <= 2)
    share = zeros / total
    return {"model": name, "method": "dense" if share < 0.01 else "sparse",
            "amount": "2:4" if groups_fit and round(share, 2) == 0.5 else f"{share:.0%}"}


def options():
    p = parser(__doc__)
    p.add_argument("--model", help="a preset (data/hub.py lists them), a Hub id or a folder (default: tiny)")
    p.add_argument("--batch", type=int, default=8, help="windows or choices at a time")
    p.add_argument("--sparse", action=BooleanOptionalAction, default=False,
                   help="keep 2:4 layers compressed and compute with them (sparse_matmul.py)")
    group = p.add_argument_group("perplexity")
    group.add_argument("--data", help=f"{', '.join(SOURCES)} or a text file (default: tiny or wikitext2; "
                                      f"with --tasks or --speed: none)")
    group.add_argument("--split", choices=["validation", "test", "held-out", "first-half", "second-half"],
                       help="validation or test of a named text (default: test), of a file the halves of its last "
                            "tenth; held-out: both; first-half, second-half: of the file (default: all of it)")
    group.add_argument("--seqlen", type=int, help="tokens a window (default: 2048, or the model's limit if lower)")
    group = p.add_argument_group("zero-shot accuracy")
    group.add_argument("--tasks", nargs="*", metavar="TASK",
                       help=f"some of {', '.join(TASKS)}; none named: the first seven")
    group.add_argument("--tasks-dir", metavar="FOLDER",
                       help="read the tasks from here (data/tasks.py says how) instead of the Hub")
    group.add_argument("--limit", type=int, help="only so many first questions of every task (of MMLU's subjects)")
    group = p.add_argument_group("speed")
    group.add_argument("--speed", action="store_true", help="measure prefill and decoding of one sequence, and memory")
    group = p.add_argument_group("tables and plots, instead of a measurement")
    group.add_argument("--compare", nargs="+", metavar="PATH",
                       help="print a table of result files and pruned checkpoints")
    group.add_argument("--by-method", action="store_true", help="perplexity alone, sparsities side by side")
    group.add_argument("--plot", metavar="FILE", help="and draw them (.png or .svg), with maps of six rows at most")
    return p.parse_args()


def check(args):
    """Raise InputError for options that can't be meant."""
    at_least(args, seqlen=2, batch=1, limit=1)
    if (args.limit or args.tasks_dir) and args.tasks is None:
        raise InputError("--limit and --tasks-dir tell how to run tasks: they need --tasks")
    if args.by_method and not args.compare:
        raise InputError("--by-method tells how to print a table: it needs --compare")
    if args.compare and (args.data or args.split or args.tasks is not None or args.speed or args.seqlen or args.sparse
                         or args.model):
        raise InputError("--compare prints what was measured before: leave out --model, --data, --split, --seqlen, "
                         "--tasks, --speed and --sparse")
    if args.plot and not args.compare:
        raise InputError(f"--plot {args.plot} draws what is compared: it needs --compare")
    if args.plot and Path(args.plot).suffix.lower() not in (".png", ".svg"):
        raise InputError(f"--plot {args.plot} must end in .png or .svg")
    if args.plot and (obstacle := what_keeps_from_writing(args.plot)):
        raise InputError(f"--plot {args.plot} can't be written: {obstacle}")
    for name in "seqlen", "split":
        if getattr(args, name) and not args.data and (args.tasks is not None or args.speed):
            raise InputError(f"--{name} {getattr(args, name)} is for perplexity: it needs --data")
    for name in args.tasks or []:
        if name not in TASKS:
            raise InputError(f"--tasks {name}: there is no such task; there are {', '.join(TASKS)}")
    if args.tasks_dir and not Path(args.tasks_dir).is_dir():
        raise InputError(f"--tasks-dir {args.tasks_dir} is no folder")


def main():
    args = options()
    start(args)
    check(args)
    if args.compare:
        return compare(args)
    args.model = args.model or "tiny"
    streamed = not args.speed and not args.sparse  # they need all blocks in memory
    model = GPT.from_pretrained(args.model, device=args.device, stream=streamed, sparse=args.sparse)
    tokenizer = load_tokenizer(model.source.folder)
    if args.tasks is not None:  # before there is work that bad data would lose
        tasks = encoded_tasks(tokenizer, args.tasks or SEVEN, model.config.context_length, args.tasks_dir, args.limit)
    row, results = describe(model, args.model) if args.json else {}, {}  # it reads every block once
    if args.data or (args.tasks is None and not args.speed):
        data = args.data or usual_text(model.source.folder, "wikitext2")
        seqlen = args.seqlen or model.config.window_length()
        ids = evaluation_ids(data, args.split, tokenizer, seqlen)
        begin = time.perf_counter()
        row["perplexity"] = perplexity(model, ids, seqlen, args.batch, progress=True)
        tokens = len(ids) // seqlen * seqlen
        results = {"data": data, "seqlen": seqlen, "tokens": tokens}
        print(f"{args.model} on {told(data, args.split)}: perplexity {row['perplexity']:.3f}  "
              f"(seqlen {seqlen}{model.config.remark(seqlen)}, {tokens:,} of {len(ids):,} tokens, "
              f"{time.perf_counter() - begin:.1f} s)")
    if args.tasks is not None:
        row["tasks"] = zero_shot(model, tasks, args.batch)
    if args.speed:
        new_tokens = max(2, min(64, model.config.context_length // 2))
        length = max(1, min(512, model.config.context_length - new_tokens))
        text = torch.arange(length, device=args.device) % model.config.vocab_size
        row["speed"] = measured = speed(model, text[None], new_tokens)
        print(f"{args.model} on {args.device}: prefill {measured['prefill_tokens_per_second']:,.1f} tokens/s "
              f"({measured['prompt_tokens']} tokens), decode {measured['decode_tokens_per_second']:,.1f} tokens/s, "
              f"weights {measured['weight_bytes'] / 1e9:,.3f} GB in memory"
              + (f", peak memory {peak / 1e9:,.2f} GB" if (peak := measured["peak_memory_bytes"]) else ""))
    record(args, results | {"rows": [row]})


if __name__ == "__main__":
    run(main)
