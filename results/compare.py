"""Tables and plots of what was measured: of result files (--json of any command) and of pruned checkpoints.

    python eval.py --compare results/tiny/*.json --by-method --plot out/tiny.png

A row is a dict: model, data, seqlen, method ("wanda + dsnot"), amount ("70%" or "2:4"), sparsity (a share), perplexity,
options (of the run), layers [{layer, weights, sparsity, error}], and what else was measured (tasks, speed, seconds).
"""

import itertools
import json
import math
import re
import statistics
import textwrap
from pathlib import Path

from data.command import InputError, record, write_atomically
from data.method import SCORES, method_of, percent, propagates, said_of
from data.text import SOURCES

NAMELESS = {"json", "out", "model", "data", "split", "device", "sparsity", "pattern", "score", "refine",
            "compare", "seed", "seqlen", "plot", "batch", "methods", "tasks", "tasks_dir", "speed", "files",
            "command", "processes", "dry_run", "sparse", "by_method", "recipe", "save_every", "one_shot", "micro_batch",
            "compile", "shard", "checkpoint_activations"}  # options that never tell one method from another ...
TRAINED = {"data", "score"}  # ... but those of training do


def read_rows(path):
    """The rows of a result file or of a checkpoint folder with pruning.json. Raises InputError where it is neither."""
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
            amount = options.get("pattern") or options.get("sparsity")
            data, seqlen = results.get("data"), results.get("seqlen")
        split = results.get("split", options.get("split"))
        common = {"model": options["model"], "data": data, "split": split, "seqlen": seqlen, "amount": amount}
        dense = next((row.get("perplexity") for row in rows if row["method"] == "dense"), None)
        return [complete(common | row | {"dense": dense, "options": options | row.get("options", {})}) for row in rows]
    except FileNotFoundError:
        if file == path:
            raise InputError(f"there is no file or folder {path}") from None
        way_out = (": give the file that --json wrote when it was measured" if (path / "config.json").is_file() else
                   f"; to compare the files that --json wrote, give {path}/*.json")
        raise InputError(f"{path} is no folder that dsnot.py has pruned{way_out}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as e:
        why = f": {e}" if isinstance(e, (OSError, ValueError)) else ""
        raise InputError(f"{path} is neither a result file with a table (--json of dsnot.py, ast_train.py or eval.py) "
                         f"nor a pruned checkpoint{why}") from None


def complete(row):
    """A row with paths shortened to names, the amount as text and the sparsity as a number."""
    amount = "0%" if row["method"].startswith("dense") or row["amount"] is None else row["amount"]
    amount = amount if isinstance(amount, str) else percent(amount)
    n, _, m = amount.rstrip("%").partition(":")
    layers = row.get("layers") or []
    parts = Path(row["model"]).parts or (".",)
    parts = parts[:-2] if parts[2:] and parts[-2] == "snapshots" else parts
    model = re.sub("^models--(.*--)?", "", parts[-1])  # in the Hub's cache: models--OWNER--NAME/snapshots/COMMIT
    said = row["split"] and not (row["split"] == "test" and row["data"] in SOURCES)
    data = row["data"] and Path(row["data"]).name + (f", {row['split']}" if said else "")
    return {"perplexity": None} | row | {"model": model, "data": data, "amount": amount, "layers": layers,
                                         "sparsity": 1 - int(n) / int(m) if m else float(n) / 100}


def key(row, method=None):
    """The key of a row among others; with `method`, that of the same measurement for that method."""
    return row["model"], row["data"], row["seqlen"], row["amount"], method or row["method"]


def tell_apart(rows):
    """Where dense models of one name and text differ in perplexity, they are other models, or other texts: `data` then
    says which."""
    known = {}  # {(model, data, seqlen): perplexities that differ}
    for row in rows:
        if (dense := row.get("dense")) and math.isfinite(dense):
            found = known.setdefault((row["model"], row["data"], row["seqlen"]), [])
            row["dense"] = next((other for other in found if math.isclose(dense, other, rel_tol=1e-2)), dense)
            found += [row["dense"]] * (row["dense"] not in found)
    for row in rows:
        if len(known.get((row["model"], row["data"], row["seqlen"]), [])) > 1 and row.get("dense"):
            row["data"] += f", dense {row['dense']:.4g}"


def alike(row, other):
    """Whether two rows hold the same measurement."""
    a, b = row["perplexity"], other["perplexity"]
    close = bool(a and b) and (math.isclose(a, b, rel_tol=1e-5) or math.isnan(a) and math.isnan(b))
    close |= a is b is None and row["layers"] == other["layers"]
    return close and all(row.get(more) == other.get(more) for more in ("tasks", "speed"))


def name_options(rows):
    """Where rows of one method and amount differ in options, the method is named with them, at all amounts alike."""
    methods = {}
    for row in rows:
        methods.setdefault((row["model"], row["data"], row["seqlen"], row["method"]), []).append(row)
    for group in methods.values():
        pairs = [(a["options"], b["options"]) for a in group for b in group if a["amount"] == b["amount"]
                 and not alike(a, b)]
        nameless = NAMELESS - TRAINED if any("eval_data" in row["options"] for row in group) else NAMELESS
        differ = sorted({k for a, b in pairs for k in a.keys() & b.keys() - nameless
                         if (a[k] or None) != (b[k] or None)})  # what is not given is off
        for row in group:
            said = [said_of(k, row["options"][k]) for k in differ if not is_usual(k, row)]
            row["method"] += f" ({', '.join(said)})" if said else ""


def merge(rows):
    """Rows as they are shown: named with the options in which they differ; those that differ in nothing but the seed
    are averaged (`spread`: their standard deviation); none is shown twice if two files hold it."""
    tell_apart(rows)
    name_options(rows)
    groups, merged = {}, []
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    for group in groups.values():
        same = {}  # {attempt: {seed: row}}; rows of one seed that differ for no known reason stay apart
        for row in group:  # as do those with another thing than a perplexity
            alone = row["perplexity"] is None or row.get("tasks") or row.get("speed")
            seed = None if alone else row["options"].get("seed")
            for attempt in itertools.count():  # the first one that has no other row of this seed
                if alike(row, same.setdefault(attempt, {}).setdefault(seed, row)):
                    break
        for by_seed in same.values():
            values = [row["perplexity"] for row in by_seed.values() if row["perplexity"]]
            if group[0]["method"] == "dense":  # of several runs
                values = values[:1]
            merged.append(next(iter(by_seed.values())) | {
                "perplexity": statistics.mean(values) if values else None, "runs": len(values),
                "spread": statistics.stdev(values) if values[1:] and all(map(math.isfinite, values)) else None})
    return sorted(merged, key=lambda r: (r["model"], r["data"] or "", r["seqlen"] or 0, r["sparsity"], r["amount"],
                                         r["method"]))


def is_usual(name, row):
    """Whether an option of a row is as it is if nobody asks for it: that need not be said."""
    value = row["options"].get(name)
    if name == "propagate":
        return value in (None, propagates(row["method"]))
    return value in (None, "uniform")


def markdown(head, lines, texts=1):
    """A markdown table; its first columns are texts, the others numbers."""
    rule = [":--"] * texts + ["--:"] * (len(head) - texts)
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *lines])


def before(row, known):
    """The perplexity of a row's mask before its refinement, from known {key: perplexity}; None where there is none. Its
    options are the row's; where these say nothing of its layers' sparsity, a mask of which none are said will do."""
    steps, bracket, said = row["method"].partition(" (")
    start, refined, _ = steps.partition(" + ")
    if not refined or start not in SCORES:
        return None
    plain = None if "allocate" in said else known.get(key(row, start))
    return known.get(key(row, start + bracket + said)) or plain


def tasks_of(rows):
    """The zero-shot tasks that rows have; "mean" only where it is of the same tasks in each."""
    tested = [row["tasks"] for row in rows if row.get("tasks")]
    return [task for task in dict.fromkeys(task for tasks in tested for task in tasks)
            if task != "mean" or len({*map(frozenset, tested)}) == 1]


def table(rows):
    """The rows as a markdown table. By refinement: the change of the perplexity, relative to the same mask before."""
    tasks = tasks_of(rows)
    timed = ["decode (tokens/s)", "weights (GB)"] if any("speed" in row for row in rows) else []
    head = ["model", "data (seqlen)", "method", "sparsity", "perplexity", "by refinement", "seconds", *tasks, *timed]
    lines = []
    known = {key(row): row.get("perplexity") for row in rows}
    for row in rows:
        ppl, old = row.get("perplexity"), before(row, known)
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
    return markdown(head, lines, texts=3)


def from_the_worst(methods, dense):
    """The names of {method: {amount: row}} by what they lose to the dense perplexity (in its logarithm; None: unknown),
    as a multiple of what all lose at an amount on average, in the mean over the amounts that a method has."""
    lost, usual, dense = {}, {}, dense if dense and math.isfinite(dense) else 1
    for method, found in methods.items():
        for amount, row in found.items():
            ppl = row["perplexity"] if math.isfinite(row["perplexity"]) else 1e300
            lost.setdefault(method, {})[amount] = value = math.log(ppl / dense)
            usual.setdefault(amount, []).append(value)
    return sorted(methods, key=lambda method: -statistics.mean(
        value / (abs(statistics.mean(usual[amount])) or 1) for amount, value in lost[method].items()))


def table_by_method(rows):
    """Perplexity alone as markdown, a table for each model and text: methods down, sparsities across."""
    tables = {}
    for row in rows:
        if row.get("perplexity"):
            methods = tables.setdefault((row["model"], row["data"], row["seqlen"]), {})
            methods.setdefault(row["method"], {})[row["amount"]] = row
    texts = []
    for (model, data, seqlen), methods in tables.items():
        sparsity = {a: row["sparsity"] for found in methods.values() for a, row in found.items()}
        amounts = sorted(sparsity.keys() - {"0%"}, key=lambda a: (sparsity[a], a))
        dense = next((found["0%"]["perplexity"] for found in methods.values() if "0%" in found), None)
        pruned = {method: {a: found[a] for a in amounts if a in found} for method, found in methods.items()
                  if found.keys() - {"0%"}}
        lines = [[method, *(f"{pruned[method][a]['perplexity']:.2f}" if a in pruned[method] else "" for a in amounts)]
                 for method in from_the_worst(pruned, dense)]
        told = f", dense {dense:.2f}" if dense else ""
        texts.append(markdown([f"{model} on {data} ({seqlen}){told}", *amounts], lines))
    return "\n\n".join(texts)


# readable on white and on black
COLOURS, GREY = "#4c8dd6 #e07b39 #3fa66a #b65fc8 #c9a227 #d1495b #2fa5a5 #e58fb1 #7d8c3a #8c6bd6".split(), "#808080"
INKS = ["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"]
LOOK = dict.fromkeys(INKS, GREY) | {"font.size": 9, "grid.alpha": 0.3}


def compare(args):
    """Print the table of --compare, and draw --plot."""
    rows = merge([row for path in args.compare for row in read_rows(path)])
    if args.by_method and not any(row["perplexity"] for row in rows):
        raise InputError("--by-method: there is no perplexity in what is compared; leave the option out")
    print(table_by_method(rows) if args.by_method else table(rows))
    if not any(row["perplexity"] or row.get("tasks") or row.get("speed") for row in rows):
        print("\nno perplexity: a pruned folder holds none; compare the files that --json wrote")
    if args.plot:
        plot(rows, args.plot)
        print(f"\nsaved {args.plot}")
    for row in rows:
        del row["options"]
    record(args, {"rows": rows})


def plot(rows, path):
    """Draw what the rows hold, a panel below the other: perplexity for every model and text, accuracy, and maps of the
    layers unless more than six rows have them. Transparent, readable on light and dark pages."""
    import matplotlib
    from matplotlib.figure import Figure
    charts = {}  # {(model, data, seqlen): rows}
    for r in rows:
        if r["perplexity"]:
            charts.setdefault((r["model"], r["data"], r["seqlen"]), []).append(r)
    others = [r["amount"] for r in rows if r["amount"] != "0%"]
    amounts = dict.fromkeys(["2:4", "50%", "70%", "60%", "4:8", *others])  # alike in all pictures
    colours = dict(zip(amounts, COLOURS * len(amounts)))
    tested, mapped = [r for r in rows if r.get("tasks")], [r for r in rows if r["layers"]]
    panels = [(1.3 + 0.28 * len({r["method"] for r in chart}), perplexity_panel, (chart, colours))
              for chart in charts.values() if any(r["amount"] != "0%" for r in chart)]
    panels += [(3.0, accuracy_panel, tested)] if tested else []
    panels += [(2.0, layer_panel, (r, mapped)) for r in mapped] if len(mapped) <= 6 else []
    if not panels:
        raise InputError("--plot: there is nothing to draw; compare results of pruned models")
    with matplotlib.rc_context(LOOK):
        heights = [height for height, _, _ in panels]
        figure = Figure(figsize=(8, sum(heights)), layout="constrained")
        parts = figure.subfigures(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
        for part, (_, draw, what) in zip(parts, panels):
            draw(part.subplots(), what)
            if part.axes[0].get_legend_handles_labels()[0]:
                part.legend(frameon=False, loc="outside lower center", ncols=6)
        kind = Path(path).suffix[1:]
        write_atomically(path, lambda beside: figure.savefig(beside, format=kind, dpi=160, transparent=True))


def perplexity_panel(axis, what):
    """Perplexity of one model on one text: methods in the order of from_the_worst, and the spread over seeds. what: the
    rows, and a colour for each amount."""
    from matplotlib.ticker import LogFormatter
    rows, colours = what
    pruned = [r for r in rows if r["amount"] != "0%"]
    found = {}
    for r in pruned:
        found.setdefault(r["method"], {})[r["amount"]] = r
    dense = next((r["perplexity"] for r in rows if r["method"] == "dense"), None)
    methods = from_the_worst(found, dense)[::-1]
    for amount in dict.fromkeys(r["amount"] for r in pruned):
        own = [r for r in pruned if r["amount"] == amount]
        axis.errorbar([r["perplexity"] for r in own], [methods.index(r["method"]) for r in own],
                      xerr=[r["spread"] or 0 for r in own], fmt="o", color=colours[amount], label=amount)
    if dense:
        axis.axvline(dense, color=GREY, label=f"dense, {dense:.2f}")
    axis.set_ylim(-0.6, len(methods) - 0.4)
    axis.set_yticks(range(len(methods)), [textwrap.fill(method, 42) for method in methods], fontsize=7.5)
    axis.set(xlabel="perplexity (log scale)", xscale="log",
             title=f"{rows[0]['model']} on {rows[0]['data']}, windows of {rows[0]['seqlen']} tokens")
    axis.xaxis.set_major_formatter(LogFormatter())
    axis.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.5)))  # between powers of ten where there's room
    axis.grid(True)


def accuracy_panel(axis, rows):
    """Accuracy of every task, a bar for each row, with standard errors."""
    tasks = tasks_of(rows)
    width = 0.8 / len(rows)
    for i, (r, colour) in enumerate(zip(rows, COLOURS * len(rows))):
        own = [(t, r["tasks"][task]) for t, task in enumerate(tasks) if task in r["tasks"]]
        axis.bar([t + (i - (len(rows) - 1) / 2) * width for t, _ in own], [100 * a["acc"] for _, a in own],
                 width * 0.92, yerr=[100 * (a.get("acc_stderr") or 0) for _, a in own], color=colour, ecolor=GREY,
                 label=f"{r['model']}, {r['method']}, {r['amount']}".removesuffix(", 0%"))
    axis.set_xticks(range(len(tasks)), tasks, fontsize=8)
    axis.set(ylabel="accuracy (%)", title="zero-shot accuracy and its standard error")
    axis.grid(True, axis="y")


def layer_panel(axis, what):
    """A map of one row's layers, kinds by blocks: the reconstruction error where it was recorded, else the sparsity.
    what: the row, and all rows that are drawn: those that show the same share one scale."""
    def values(row):
        if all("error" in layer for layer in row["layers"]):
            return "relative error of the output", [layer["error"] for layer in row["layers"]]
        return "sparsity (%)", [100 * layer["sparsity"] for layer in row["layers"]]

    row, rows = what
    label, own = values(row)
    every = [value for other in map(values, rows) if other[0] == label for value in other[1]]
    low, high = min(every), max(every)
    high = max(high, low + 1) if label == "sparsity (%)" else high  # less than a point apart is the same colour
    of = {tuple(layer["layer"].removeprefix("model.layers.").split(".", 1)): value
          for layer, value in zip(row["layers"], own)}
    blocks, kinds = sorted({int(block) for block, _ in of}), list(dict.fromkeys(kind for _, kind in of))
    cells = [[of.get((str(block), kind), math.nan) for block in blocks] for kind in kinds]
    image = axis.imshow(cells, aspect="auto", cmap="viridis", vmin=low, vmax=high)
    axis.set_yticks(range(len(kinds)), [kind.split(".")[-1] for kind in kinds], fontsize=8)
    step = -(-len(blocks) // 16)
    axis.set_xticks(range(0, len(blocks), step), blocks[::step])
    axis.set(xlabel="block", title=f"{row['model']}, {row['method']}, {row['amount']}")
    axis.figure.colorbar(image, ax=axis, pad=0.01, label=textwrap.fill(label, 16))
