"""Measure models: perplexity, zero-shot accuracy, speed; tables and plots of what was measured.

Perplexity is that of the pruning papers: the text is tokenized once (with BOS where the model's tokenizer adds it), cut
into windows of `seqlen` tokens that do not overlap, the tail is dropped, and the negative log-likelihood is averaged
over all predicted tokens, which are the seqlen - 1 last ones of every window. Of C4 the first 256 windows count.
Numbers of different `seqlen` can't be compared (LLaMA2-7B on WikiText-2: 5.47 at 2048, 5.12 at 4096), so it is printed
beside every figure.

Zero-shot accuracy is that of EleutherAI's lm-evaluation-harness: for every choice of a question the log-likelihood of
the choice after its context, contexts cut from the left where the model can't take them whole. `acc` counts questions
whose right choice is the most likely one, `acc_norm` those where it is so per character. The one difference:
log-likelihoods are float32 also where the model computes in bfloat16.

    python eval.py --model tiny
    python eval.py --model llama2-7b --data wikitext2 --seqlen 2048
    python eval.py --model out/llama2-7b-wanda-dsnot-70 --tasks --json results/tasks.json
    python eval.py --compare results/dsnot-*.json --plot assets/dsnot.png

Shapes: B batch, T tokens, C hidden size.
"""

import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import load_tokenizer, windows
from data.command import InputError, parser, record, run, start, write_atomically
from data.tasks import SEVEN, TASKS, encode_pair, load_task
from data.text import SOURCES, evaluation_ids
from gpt import GPT, rotary

# ------------------------------------------------------------------------------------------ perplexity and accuracy


def hidden_states(model, batches, label, progress):
    """Yield what the last block makes of each batch of ids [B, T]: x [B, T, C].

    A model that is held in memory takes one batch at a time through all its blocks; a streamed one takes as many as
    make a million tokens through one block at a time, so that blocks are rarely read twice."""
    device, longest = model.model.embed_tokens.weight.device, max(ids.shape[1] for ids in batches)
    positions = torch.arange(longest, device=device)
    rope = rotary(model.config, positions)
    together = max(1, 2**20 // max(ids.numel() for ids in batches)) if model.streams else 1
    with tqdm(total=sum(map(len, batches)) * len(model.model.layers), desc=label, unit="sequence-block", leave=False,
              disable=None if progress else True) as bar:
        for i in range(0, len(batches), together):
            hidden = [model.embed(ids.to(device)) for ids in batches[i:i + together]]
            for block in model.blocks():
                for j, x in enumerate(hidden):
                    T = x.shape[1]
                    hidden[j] = block(x, positions[:T], rope and (rope[0][:T], rope[1][:T]))
                    bar.update(len(x))
            yield from hidden


@torch.inference_mode()
def perplexity(model, ids, seqlen, batch=8, progress=False):
    """Perplexity of a model on token ids (a list or a 1-D tensor), protocol as above, `batch` windows at a time."""
    x, total = windows(ids, seqlen), 0.0
    batches = x.split(batch)
    for part, hidden in zip(batches, hidden_states(model, batches, "perplexity", progress)):
        logits, target = model.head(hidden)[:, :-1].float(), part[:, 1:].to(hidden.device)
        total += F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum").double().item()
    return math.exp(min(total / (len(x) * (seqlen - 1)), 700.0))  # a ruined model overflows nothing


def default_seqlen(config):
    """The papers' 2048 tokens, or what a smaller model was made for."""
    return min(2048, context_length(config))


def context_length(config):
    """The most tokens that a model is made for."""
    return config.positions or config.raw.get("max_position_embeddings") or 2048


@torch.inference_mode()
def log_likelihoods(model, pairs, max_length, batch=8, progress=False):
    """log P(continuation | context) in nats of every pair of ids (context, continuation) -> list of floats.

    Of a pair longer than max_length + 1 tokens the left end is cut off; the last token is only predicted. Pairs that
    differ in nothing but the last token (" yes", " no") share one pass; long ones go first, `batch` at a time."""
    rows = {}  # {input ids: [(index of the pair, continuation)]}
    for i, (context, continuation) in enumerate(pairs):
        if len(continuation) > max_length:
            raise InputError(f"a choice of {len(continuation)} tokens is longer than the model's context of "
                             f"{max_length}")
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
    pair of each example. The standard error pools the variances of the examples' groups; None for a single question."""
    right = {"acc": [], "acc_norm": []} if normalise else {"acc": []}
    for example in examples:
        own, scores = scores[:len(example.pairs)], scores[len(example.pairs):]
        per_character = [score / n if n else -math.inf for score, n in zip(own, example.lengths)]
        for name, values in zip(right, (own, per_character)):
            right[name].append(float(values.index(max(values)) == example.gold))
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


def zero_shot(model, tokenizer, names, folder=None, limit=None, batch=8):
    """{task: accuracy(...)} and their "mean", printed as they come; acc_norm's mean takes acc where it is alone."""
    tasks = {name: load_task(name, folder, limit) for name in names}  # bad data end the command before the work begins
    results = {}
    print(f"{'task':<16}{'questions':>10}{'acc':>18}{'acc_norm':>18}")
    for name, examples in tasks.items():
        pairs = [encode_pair(tokenizer, *pair) for example in examples for pair in example.pairs]
        scores = log_likelihoods(model, pairs, context_length(model.config), batch, progress=True)
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


# ----------------------------------------------------------------------------------------------------------- speed

def speed(model, ids, new_tokens=64, repeats=3):
    """Tokens per second of a prompt ids [1, T] (prefill) and of greedy decoding one sequence after it, medians; bytes
    of the weights; peak memory in bytes, on a GPU of what torch allocated, else of the whole process."""
    times = []
    for _ in range(1 + repeats):  # the first one warms up
        marks = [time.perf_counter()]
        for token in model.stream(ids, new_tokens + 1, temperature=0):
            token.tolist()  # waits for the device
            marks.append(time.perf_counter())
        decoding = (marks[-1] - marks[2]) / (new_tokens - 1)  # without the second token, which records a CUDA graph
        times.append((marks[1] - marks[0], decoding))
    prefill, decode = (statistics.median(column) for column in zip(*times[1:]))
    if ids.is_cuda:
        peak = torch.cuda.max_memory_allocated(ids.device)
    else:
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    tensors = [*model.parameters(), *model.buffers()]  # tied ones once
    return {"prompt_tokens": ids.shape[1], "prefill_tokens_per_second": ids.shape[1] / prefill,
            "decode_tokens_per_second": 1 / decode, "weight_bytes": sum(t.numel() * t.element_size() for t in tensors),
            "peak_memory_bytes": peak}


# ------------------------------------------------------------------------------------------------ tables and plots

IGNORED = {"json", "out", "model", "data", "calib", "split", "device", "sparsity", "pattern", "score", "refine",
           "compare", "seed", "plot", "stream", "batch", "methods", "tasks", "limit", "speed"}  # never name a method


def read_rows(path):
    """The rows of a result file (--json of any command) or of a checkpoint folder with pruning.json, each a dict:
    model, data, seqlen, method, amount ("70%" or "2:4"), sparsity (a share), perplexity, options, and what was measured
    besides. Raises InputError where it is neither."""
    path = Path(path)
    file = path / "pruning.json" if path.is_dir() else path
    try:
        entry = json.loads(file.read_text())
        if "run" in entry:  # pruning.json
            options, results = entry["run"], {"rows": [{"method": method_of(entry["run"]), "layers": entry["layers"]}]}
        else:
            options, results = entry["options"], entry["results"]
        rows = results.get("rows") or [{"method": name} | row for name, row in results["table"].items()]
        if "table" in results:  # of ast_train.py, where a sparsity replaces the pattern
            amount, data, seqlen = options["sparsity"] or options["pattern"], options["eval_data"], options["seqlen"]
        else:
            amount = options.get("amount") or options.get("pattern") or options.get("sparsity")
            data, seqlen = results.get("data"), results.get("seqlen")
        common = {"model": options["model"], "data": data, "seqlen": seqlen, "amount": amount, "options": options}
        return [complete(common | row) for row in rows]
    except FileNotFoundError:
        raise InputError(f"--compare {path}: there is no such file or folder" if file == path else
                         f"--compare {path}: it has no pruning.json, which dsnot.py writes into a checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"--compare {path} is neither a result file (--json of dsnot.py, ast_train.py or eval.py) "
                         f"nor a pruned checkpoint: {type(e).__name__} {e}") from None


def method_of(run):
    """The method's name from what dsnot.py notes of a run."""
    steps = [run["score"], *run["refine"].replace("none", "").split("+"), "refit" * run.get("refit", False)]
    return " + ".join(filter(None, steps))


def complete(row):
    """A row with paths shortened to names, the amount as text and the sparsity as a number."""
    amount = "0%" if row["method"].startswith("dense") or row["amount"] is None else row["amount"]
    amount = amount if isinstance(amount, str) else f"{amount:.0%}"
    n, _, m = amount.rstrip("%").partition(":")
    layers = row.get("layers") or []
    parts = Path(row["model"]).parts  # a snapshot in the Hub's cache: .../models--OWNER--NAME/snapshots/COMMIT
    model = parts[-3].split("--")[-1] if "snapshots" in parts[-2:-1] else parts[-1]
    data = Path(row["data"]).name if row["data"] else None
    return {"perplexity": None} | row | {"model": model, "data": data, "amount": amount, "layers": layers,
                                         "sparsity": 1 - int(n) / int(m) if m else float(n) / 100}


def merge(rows):
    """Rows as they are shown: those that differ in nothing but the seed are averaged (`spread`: their standard
    deviation); where other options differ, the method is named with them; none is shown twice if two files hold it."""
    def key(row):
        return tuple(row[k] for k in ("model", "data", "seqlen", "amount", "method"))

    def alike(row, other):
        return row["perplexity"] == other["perplexity"] and row.get("tasks") == other.get("tasks")

    groups = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    merged = []
    for group in groups.values():
        if len({row["perplexity"] for row in group}) > 1:
            pairs = [(a["options"], b["options"]) for a in group for b in group if a["perplexity"] != b["perplexity"]]
            pairs = [(a, b) for a, b in pairs if a.get("seed") == b.get("seed")]
            differ = sorted({k for a, b in pairs for k in a.keys() & b.keys() - IGNORED if a[k] != b[k]})
            for row in group:
                said = [said_of(k, row["options"].get(k)) for k in differ if row["options"].get(k) is not None]
                row["method"] += f" ({', '.join(said)})" if said else ""
        same = {}  # {what is shown: {seed: row}}; rows of one seed that differ for no known reason stay apart
        for row in group:
            seed, again = row["options"].get("seed"), 0
            while not alike(row, same.setdefault((key(row), again), {}).setdefault(seed, row)):
                again += 1
        for by_seed in same.values():
            values = list(dict.fromkeys(row["perplexity"] for row in by_seed.values() if row["perplexity"]))
            merged.append(next(iter(by_seed.values())) | {
                "perplexity": statistics.mean(values) if values else None, "runs": len(values),
                "spread": statistics.stdev(values) if values[1:] else None})
    return sorted(merged, key=lambda r: (r["model"], r["data"] or "", r["seqlen"] or 0, r["sparsity"], r["amount"],
                                         r["method"]))


def said_of(name, value):
    """An option in words: cycles 50, sign check, no sign check."""
    name = name.replace("_", " ")
    return f"{'' if value else 'no '}{name}" if isinstance(value, bool) else f"{name} {value}"


def table(rows):
    """The rows as a markdown table. Change: of the perplexity, relative to the same mask before its refinement."""
    tasks = list(dict.fromkeys(task for row in rows for task in row.get("tasks") or {}))
    timed = ["decode (tokens/s)", "weights (GB)"] if any("speed" in row for row in rows) else []
    head = ["model", "data (seqlen)", "method", "sparsity", "perplexity", "change", "seconds", *tasks, *timed]
    lines = [head, [":--"] * 3 + ["--:"] * (len(head) - 3)]
    before = {(r["model"], r["data"], r["seqlen"], r["amount"], r["method"]): r.get("perplexity") for r in rows}
    for row in rows:
        ppl, (start, refined, _) = row.get("perplexity"), row["method"].partition(" + ")
        old = before.get((row["model"], row["data"], row["seqlen"], row["amount"], start)) if refined else None
        spread = f" ± {row['spread']:.2f} ({row['runs']} seeds)" if row["spread"] else ""
        lines.append([row["model"], f"{row['data']} ({row['seqlen']})" if row["data"] else "", row["method"],
                      row["amount"], f"{ppl:.2f}{spread}" if ppl else "",
                      f"{ppl / old - 1:+.1%}" if ppl and old else "",
                      f"{row['seconds']:,.0f}" if row.get("seconds") and row["amount"] != "0%" else "",
                      *(f"{row['tasks'][t]['acc']:.1%}" if t in (row.get("tasks") or {}) else "" for t in tasks)])
        if timed:
            of = row.get("speed")
            lines[-1] += [f"{of['decode_tokens_per_second']:,.1f}" if of else "",
                          f"{of['weight_bytes'] / 1e9:,.3f}" if of else ""]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table_by_method(rows):
    """Perplexity alone as markdown, a table for each model and text: methods down, sparsities across."""
    tables = {}
    for row in rows:
        if row.get("perplexity"):
            methods = tables.setdefault((row["model"], row["data"], row["seqlen"]), {})
            methods.setdefault(row["method"], {})[row["amount"]] = row
    texts = []
    for (model, data, seqlen), methods in tables.items():
        amounts = [a for a in dict.fromkeys(a for found in methods.values() for a in found) if a != "0%"]
        dense = next((found["0%"]["perplexity"] for found in methods.values() if "0%" in found), math.nan)
        lines = [[f"{model} on {data} ({seqlen}), dense {dense:.2f}", *amounts], [":--", *["--:"] * len(amounts)]]
        lines += [[method, *(f"{found[a]['perplexity']:.2f}" if a in found else "" for a in amounts)]
                  for method, found in sorted(methods.items(), key=lambda m: -list(m[1].values())[-1]["perplexity"])
                  if "0%" not in found]
        texts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(texts)


# readable on white and on black
COLOURS = "#4c8dd6 #e07b39 #3fa66a #b65fc8 #c9a227 #d1495b #2fa5a5 #e58fb1 #7d8c3a #8c6bd6".split()


def compare(args):
    """Print the table of --compare, and draw --plot."""
    rows = merge([row for path in args.compare for row in read_rows(path)])
    print(table_by_method(rows) if args.by_method else table(rows))
    if args.plot:
        plot(rows, args.plot)
        print(f"\nsaved {args.plot}")
    for row in rows:
        del row["options"]
    record(args, {"rows": rows})


def plot(rows, path):
    """Draw what the rows hold, a panel below the other: perplexity over sparsity for every model and text, accuracy,
    and maps of the layers unless more than six rows have them. Transparent, readable on light and dark pages."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    measured = [r for r in rows if r.get("perplexity")]
    charts = dict.fromkeys((r["model"], r["data"], r["seqlen"]) for r in measured if r["amount"] != "0%")
    tested, mapped = [r for r in rows if r.get("tasks")], [r for r in rows if r["layers"]]
    panels = [(3.4, perplexity_panel, [r for r in measured if (r["model"], r["data"], r["seqlen"]) == chart])
              for chart in charts]
    panels += [(3.0, accuracy_panel, tested)] if tested else []
    panels += [(1.9, layer_panel, (r, mapped)) for r in mapped] if len(mapped) <= 6 else []
    if not panels:
        raise InputError("--plot: there is nothing to draw; compare results of pruned models")
    grey = "#808080"
    inks = ["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"]
    with pyplot.rc_context(dict.fromkeys(inks, grey) | {"font.size": 9, "grid.color": grey, "grid.alpha": 0.25}):
        heights = [height for height, _, _ in panels]
        figure = pyplot.figure(figsize=(8, sum(heights)), layout="constrained")
        parts = figure.subfigures(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
        for part, (_, draw, what) in zip(parts, panels):
            draw(part.subplots(), what)
            if part.axes[0].get_legend_handles_labels()[0]:
                part.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=3)
        kind = Path(path).suffix[1:]
        write_atomically(path, lambda beside: figure.savefig(beside, format=kind, dpi=160, transparent=True))
        pyplot.close(figure)


def perplexity_panel(axis, rows):
    """Perplexity over sparsity of one model on one text: a colour for each method, dashed and hollow those without
    refinement; n:m patterns stand to the right of the sparsities."""
    from matplotlib.ticker import LogFormatter
    pruned = [r for r in rows if r["amount"] != "0%"]
    numbers = sorted({100 * r["sparsity"] for r in pruned if ":" not in r["amount"]})
    patterns = list(dict.fromkeys(r["amount"] for r in pruned if ":" in r["amount"]))
    step = max((numbers[-1] - numbers[0]) / 6, 2) if numbers else 1
    place = {pattern: (numbers or [0])[-1] + step * (i + 1) for i, pattern in enumerate(patterns)}
    for method, colour in zip(dict.fromkeys(r["method"] for r in pruned), COLOURS * len(pruned)):
        refined = " + " in method
        style, look = "-" if refined else "--", dict(color=colour, markersize=5, label=method,
                                                     markerfacecolor=None if refined else "none")
        own = sorted((r for r in pruned if r["method"] == method), key=lambda r: r["sparsity"])
        for marker, line, part in ("o", style, [r for r in own if r["amount"] not in place]), \
                                  ("D", "", [r for r in own if r["amount"] in place]):
            x, y = [place.get(r["amount"], 100 * r["sparsity"]) for r in part], [r["perplexity"] for r in part]
            if part:
                axis.plot(x, y, marker=marker, linestyle=line, **look)
                axis.errorbar(x, y, [r["spread"] or 0 for r in part], fmt="none", ecolor=look["color"], capsize=2)
                look["label"] = None
    for r in rows:
        if r["method"] == "dense":
            axis.axhline(r["perplexity"], color="#808080", linewidth=1, label=f"dense, {r['perplexity']:.2f}")
    axis.set_xticks([*numbers, *place.values()], [*(f"{x:g} %" for x in numbers), *patterns])
    axis.set(xlabel="sparsity of the linear layers", ylabel="perplexity (log scale)", yscale="log",
             title=f"{rows[0]['model']} on {rows[0]['data']}, windows of {rows[0]['seqlen']} tokens")
    axis.yaxis.set_major_formatter(LogFormatter())
    axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.5)))  # between powers of ten where there's room
    axis.grid(True)


def accuracy_panel(axis, rows):
    """Accuracy of every task, a bar for each row, with standard errors."""
    tasks = list(dict.fromkeys(task for r in rows for task in r["tasks"]))
    width = 0.8 / len(rows)
    for i, (r, colour) in enumerate(zip(rows, COLOURS * len(rows))):
        own = [(t, r["tasks"][task]) for t, task in enumerate(tasks) if task in r["tasks"]]
        axis.bar([t + (i - (len(rows) - 1) / 2) * width for t, _ in own], [100 * a["acc"] for _, a in own],
                 width * 0.92, yerr=[100 * (a.get("acc_stderr") or 0) for _, a in own], color=colour, ecolor="#808080",
                 label=f"{r['model']}, {r['method']}, {r['amount']}".removesuffix(", 0%"))
    axis.set_xticks(range(len(tasks)), tasks, fontsize=8)
    axis.set(ylabel="accuracy (%)", title="zero-shot accuracy and its standard error")
    axis.grid(True, axis="y")


def layer_panel(axis, what):
    """A map of one row's layers, kinds by blocks: the reconstruction error where it was recorded, else the sparsity.
    what: the row, and all rows that are drawn: they share one scale."""
    row, rows = what
    value, scale, label = "sparsity", 100, "sparsity (%)"
    if all("error" in layer for r in rows for layer in r["layers"]):
        value, scale, label = "error", 1, "reconstruction error"
    every = [scale * layer[value] for r in rows for layer in r["layers"]]
    of = {tuple(layer["layer"].removeprefix("model.layers.").split(".", 1)): layer for layer in row["layers"]}
    blocks, kinds = sorted({int(block) for block, _ in of}), list(dict.fromkeys(kind for _, kind in of))
    cells = [[scale * of[str(b), kind][value] if (str(b), kind) in of else math.nan for b in blocks] for kind in kinds]
    image = axis.imshow(cells, aspect="auto", cmap="viridis", vmin=min(every), vmax=max(every))
    axis.set_yticks(range(len(kinds)), [kind.split(".")[-1] for kind in kinds], fontsize=7)
    axis.set_xticks(range(0, len(blocks), -(-len(blocks) // 16)), blocks[::-(-len(blocks) // 16)])
    axis.set(xlabel="block", title=f"{row['model']}, {row['method']}, {row['amount']}")
    axis.figure.colorbar(image, ax=axis, pad=0.01, label=label)


@torch.inference_mode()
def describe(model, name):
    """What sets a model apart in a table {model, method, amount, layers}: what dsnot.py noted in its folder, else the
    share of zeros in its linear layers, by which it is "dense" or "sparse"."""
    noted = model.source.folder / "pruning.json"
    if noted.is_file():
        row = read_rows(model.source.folder)[0]
        return {key: row[key] for key in ("model", "method", "amount", "layers")}
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
            "amount": "2:4" if groups_fit else f"{share:.0%}"}


def options():
    p = parser(__doc__)
    p.add_argument("--model", default="tiny", help="a preset, a Hub id or a folder")
    p.add_argument("--batch", type=int, default=8, help="windows or choices at a time")
    p.add_argument("--stream", action="store_true", help="read the model block by block (for one larger than memory)")
    p.add_argument("--sparse", action="store_true", help="run layers that are 2:4 compressed (sparse_matmul.py)")
    group = p.add_argument_group("perplexity")
    group.add_argument("--data", help=f"{', '.join(SOURCES)} or a text file (default: tiny for tiny, else wikitext2; "
                                      f"with --tasks or --speed: none)")
    group.add_argument("--split", default="test", choices=["validation", "test"], help="which text of tiny, wikitext2, ptb")
    group.add_argument("--seqlen", type=int, help="tokens a window (default: 2048, or the model's limit if lower)")
    group = p.add_argument_group("zero-shot accuracy")
    group.add_argument("--tasks", nargs="*", metavar="TASK",
                       help=f"some of {', '.join(TASKS)}; none named: the first seven")
    group.add_argument("--tasks-dir", metavar="FOLDER",
                       help="read the tasks from here (data/tasks.py says how) instead of the Hub")
    group.add_argument("--limit", type=int, help="only so many first questions of every task")
    group = p.add_argument_group("speed")
    group.add_argument("--speed", action="store_true", help="measure prefill and decoding of one sequence, and memory")
    group = p.add_argument_group("tables and plots, instead of a measurement")
    group.add_argument("--compare", nargs="+", metavar="PATH",
                       help="print a table of result files and pruned checkpoints")
    group.add_argument("--by-method", action="store_true", help="perplexity alone, sparsities side by side")
    group.add_argument("--plot", metavar="FILE", help="and draw them (.png or .svg)")
    return p.parse_args()


def check(args):
    """Raise InputError for options that can't be meant."""
    for name, low in ("seqlen", 2), ("batch", 1), ("limit", 1):
        if (value := getattr(args, name)) is not None and value < low:
            raise InputError(f"--{name} {value} must be at least {low}")
    if args.plot and (not args.compare or Path(args.plot).suffix not in (".png", ".svg")):
        raise InputError(f"--plot {args.plot} needs --compare, and a file that ends in .png or .svg")
    if args.speed and args.stream:
        raise InputError("--speed measures a model in memory: leave --stream out")
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
    data = args.data or ("tiny" if args.model == "tiny" else "wikitext2")
    model = GPT.from_pretrained(args.model, device=args.device, stream=args.stream, sparse=args.sparse)
    tokenizer = load_tokenizer(args.model)
    row, results = describe(model, args.model), {}
    if args.data or (args.tasks is None and not args.speed):
        seqlen = args.seqlen or default_seqlen(model.config)
        ids = evaluation_ids(data, args.split if data in SOURCES else None, tokenizer, seqlen)  # a file is read whole
        begin = time.perf_counter()
        row["perplexity"] = perplexity(model, ids, seqlen, args.batch, progress=True)
        tokens = len(ids) // seqlen * seqlen
        results = {"data": data, "seqlen": seqlen, "tokens": tokens}
        print(f"{args.model} on {data}: perplexity {row['perplexity']:.3f}  (seqlen {seqlen}, {tokens:,} of "
              f"{len(ids):,} tokens, {time.perf_counter() - begin:.1f} s)")
    if args.tasks is not None:
        row["tasks"] = zero_shot(model, tokenizer, args.tasks or SEVEN, args.tasks_dir, args.limit, args.batch)
    if args.speed:
        text = torch.arange(min(512, context_length(model.config) // 2), device=args.device) % model.config.vocab_size
        row["speed"] = measured = speed(model, text[None])
        print(f"{args.model} on {args.device}: prefill {measured['prefill_tokens_per_second']:,.1f} tokens/s "
              f"({measured['prompt_tokens']} tokens), decode {measured['decode_tokens_per_second']:,.1f} tokens/s, "
              f"weights {measured['weight_bytes'] / 1e9:,.3f} GB, "
              f"peak memory {measured['peak_memory_bytes'] / 1e9:,.2f} GB")
    record(args, results | {"rows": [row]})


if __name__ == "__main__":
    run(main)
