"""What is measured in README.md and results/README.md: puts their tables between markers and draws their pictures, from
the files of results/. Of what a long study makes one by one, runs that have no file yet are left out.

    python results/readme.py
"""

import argparse
import json
import math
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from data.command import InputError, run, write_atomically
from data.method import fill_in
from gpt import Config
from results.compare import COLOURS, LOOK, markdown, merge, plot, read_rows, table_by_method

PAGES = ROOT / "README.md", ROOT / "results/README.md"
MODELS = {"smollm2-135m-instruct": "SmolLM2", "tiny": "tiny", "stories260K": "stories260K"}  # as tables call them
OPENING = {  # the methods of README.md's first pictures, as compare.py names them and as they are called there
    "dense": "dense", "magnitude": "magnitude", "wanda": "Wanda",
    "wanda + dsnot (refine layers all, sign check)": "Wanda + DSnoT", "sparsegpt": "SparseGPT",
    "sparsegpt (propagate)": "SparseGPT, propagated",
    "wanda + swap": "Wanda + swaps", "wanda + swap + global": "Wanda + swaps + global swaps",
    "sparsegpt + swap": "SparseGPT + swaps",
    "wanda + dsnot": "Wanda + DSnoT",
    "wanda + swap + refit": "Wanda + swaps + refit",
    "wanda + swap + refit (allocate sensitivity)": "Wanda + swaps + refit, by sensitivity",
    "sparsegpt + swap + refit (allocate sensitivity)": "SparseGPT + swaps + refit, by sensitivity",
    "sparsegpt + swap + refit + global (allocate sensitivity)":
        "SparseGPT + swaps + refit + global swaps, by sensitivity",
    "AST": "AST", "AST + SLoRB": "AST + SLoRB"}
CHOICES = [  # what is done, the command that does it, and its names in compare.py's tables
    ("Wanda", "dsnot.py --refine none", "wanda"),
    ("DSnoT, our settings", "dsnot.py", "wanda + dsnot (refine layers all, sign check)", "wanda + dsnot"),
    ("DSnoT as published", "dsnot.py --cycles 50 --refine-layers attn`, at 70 % `--no-sign-check",
     "wanda + dsnot (cycles 50, refine layers attn, no sign check)",
     "wanda + dsnot (cycles 50, refine layers attn, sign check)"),
    ("SparseGPT", "dsnot.py --score sparsegpt --refine none", "sparsegpt"),
    ("SparseGPT, propagated", "dsnot.py --score sparsegpt --refine none --propagate", "sparsegpt (propagate)"),
    ("swaps", "dsnot.py --refine swap", "wanda + swap"),
    ("swaps, global swaps", "dsnot.py --refine swap --global-swaps 16", "wanda + swap + global"),
    ("swaps, refit", "dsnot.py --refine swap --refit", "wanda + swap + refit"),
    ("swaps, refit, by sensitivity", "dsnot.py --refine swap --refit --allocate sensitivity",
     "wanda + swap + refit (allocate sensitivity)"),
    ("from SparseGPT's mask: swaps, refit", "dsnot.py --score sparsegpt --refine swap --refit",
     "sparsegpt + swap + refit"),
    ("the same, by sensitivity", "dsnot.py --score sparsegpt --refine swap --refit --allocate sensitivity",
     "sparsegpt + swap + refit (allocate sensitivity)"),
    ("swaps, refit, global swaps", "dsnot.py --refine swap --refit --global-swaps 16", "wanda + swap + refit + global"),
    ("from SparseGPT's mask: swaps, refit, global swaps",
     "dsnot.py --score sparsegpt --refine swap --refit --global-swaps 16", "sparsegpt + swap + refit + global"),
    ("the same, by sensitivity",
     "dsnot.py --score sparsegpt --refine swap --refit --allocate sensitivity --global-swaps 16",
     "sparsegpt + swap + refit + global (allocate sensitivity)"),
    ("AST", "ast_train.py --methods ast", "AST"), ("AST + SLoRB", "ast_train.py --methods ast-slorb", "AST + SLoRB")]
PARTS = {  # of AST: what a run without one, or with another, is called; its file and the row of its table
    "AST": ("seed0", "AST"), "no distillation": ("no-distillation", "AST"), "static decay": ("static-decay", "AST"),
    "no decay": ("no-decay", "AST"), "fixed mask": ("fixed-mask", "AST"), "with SLoRB": ("seed0", "AST + SLoRB")}
SETTINGS = {  # likewise
    "mask by Wanda score": ("wanda", "AST"), "swap start": ("swap-start", "AST"),
    "temperature 2": ("temperature2", "AST"), "temperature 4": ("temperature4", "AST"),
    "3 parts text, 7 parts code": ("code", "AST"), "with SLoRB, longer": ("long", "AST + SLoRB"),
    "the dense model, trained on as long": ("control-long", "dense, trained on")}


def made(name, key="results"):
    """What results/NAME.json holds under a key, or None."""
    path = ROOT / "results" / f"{name}.json"
    return json.loads(path.read_text())[key] if path.is_file() else None


def results(name, key="results"):
    """The same of a file that must be there; else raises InputError."""
    if (found := made(name, key)) is None:
        raise InputError(f"there is no results/{name}.json, which a page shows: make it first")
    return found


def pruned(*patterns):
    """The rows of the files of results/ whose names fit some patterns. Raises InputError for one that none fits."""
    files = {pattern: sorted((ROOT / "results").glob(f"{pattern}.json")) for pattern in patterns}
    for pattern, fit in files.items():
        if not fit:
            raise InputError(f"there is no results/{pattern}.json, which a page shows: make some first")
    return merge([row for fit in files.values() for path in fit for row in read_rows(path)])


def studied(*models):
    """The rows of what results/smollm2.sh and study.sh have made of some of MODELS."""
    return pruned(*(f"{name}/[0-9]*" for name in models))


def opening(rows, data):
    """Those of the rows that the first pictures show, named as there."""
    return [row | {"method": OPENING[row["method"]], "data": data, "layers": []} for row in rows
            if row["method"] in OPENING and row["amount"] in ("0%", "50%", "70%", "2:4")]


def quick_start():
    """What README's first command prints, into the folder that is its own."""
    options, path = results("quick-start", "options"), ROOT / "results/quick-start.txt"
    own = argparse.Namespace(**options | {"out": None})
    fill_in(own, Config.read(ROOT / "data/tiny"), own.data)
    return "\n".join(["```text", path.read_text().strip().replace(options["out"], own.out), "```"])


def choices():
    """Which method when: perplexity by method, the best of each column in bold."""
    rows = studied(*MODELS) + pruned("ast-seed*")
    found = {(row["model"], row["method"], row["amount"]): f"{row['perplexity']:.2f}" for row in rows}
    cells = [(model, amount) for model in MODELS for amount in ("70%", "2:4")]
    columns = [[next((found[model, name, amount] for name in names if (model, name, amount) in found), "")
                for _, _, *names in CHOICES] for model, amount in cells]
    best = [min(filter(None, column), key=float, default=None) for column in columns]
    lines = [[said, f"`{command}`", *(f"**{x}**" if x == least else x for x, least in zip(row, best))]
             for (said, command, *_), *row in zip(CHOICES, *columns)]
    dense = ["the dense model", "", *(found[model, "dense", "0%"] for model, _ in cells)]
    head = ["method", "command", *(f"{MODELS[model]} {amount}" for model, amount in cells)]
    return markdown(head, [dense, *lines], texts=2)


def over_seeds():
    """Perplexity of tiny, mean and deviation over the seeds, of the methods that were run by all three."""
    found = {}
    for row in pruned("seeds/[0-9]*", "tiny/0.7-*", "tiny/2of4-*"):
        if row["runs"] == 3:
            found.setdefault(row["method"], {})[row["amount"]] = f"{row['perplexity']:.2f} ± {row['spread']:.2f}"
    lines = [[method, *(cells.get(amount, "") for amount in ("70%", "2:4"))] for method, cells in found.items()]
    perplexity = lambda line: float(line[1].partition(" ")[0] or 0)  # at 70 %
    return markdown(["tiny, three seeds", "70%", "2:4"], sorted(lines, key=perplexity, reverse=True))


def cost():
    """DSnoT's time by score and amount."""
    rows = [row for row in results("bench_dsnot") if row["against"] == "torch.sort"]
    amounts = list(dict.fromkeys(row["amount"] for row in rows))
    found = {(row["method"], row["amount"]): f"{row['ratio']:.2f}" for row in rows}
    return markdown(["x torch.sort", *amounts], [[method, *(found[method, amount] for amount in amounts)]
                                                 for method in dict.fromkeys(row["method"] for row in rows)])


def most_swaps(row):
    return f"at most {row['max_swaps']}" if row["max_swaps"] else "until none helps"


def cost_of_swaps():
    rows = [row for row in results("bench_dsnot") if row["against"] == "sparsegpt"]
    return markdown(["amount", "swaps in a row", "x SparseGPT", "error of the output", "SparseGPT's"], [
        [row["amount"], most_swaps(row), f"{row['ratio']:.2f}", f"{row['error']:.3f}",
         f"{row['error_of_sparsegpt']:.3f}"] for row in rows], texts=2)


def cost_on_a_gpu():
    """Seconds of a 4096 x 4096 layer."""
    rows, lines = results("bench_dsnot-h100"), {}
    for row in rows:
        if row["against"] == "torch.sort" and row["method"].startswith("wanda"):
            lines.setdefault("score, mask and 50 cycles of DSnoT", {})[row["amount"]] = row["seconds"]
        elif row["against"] == "sparsegpt":
            lines.setdefault(f"exact swaps of a row, {most_swaps(row)}", {})[row["amount"]] = row["seconds"]
            if not row["max_swaps"]:
                lines.setdefault("SparseGPT", {})[row["amount"]] = row["seconds"] / row["ratio"]
    return markdown([f"seconds on one {results('bench_dsnot-h100', 'hardware')}", "70 %", "2:4"], [
        [said, *(f"{found[amount]:.2f}" for amount in ("70 %", "2:4"))] for said, found in lines.items()])


def speed_of_products():
    """How many times as fast as a dense product each form of a weight is, for some shapes and numbers of rows of x."""
    kinds = "2:4", "2:4 int8", "2:4 int4", "torch"
    lines = [[f"{row['N']} x {row['K']}", f"{row['M']}", f"{row['us']['dense']:.1f}",
              *(f"{row['us']['dense'] / row['us'][kind]:.2f}" for kind in kinds)]
             for row in results("sparse-matmul")["table"] if row["M"] in (1, 16, 64, 256, 4096)]
    head = ["weight", "rows of x", "dense bf16, µs", "2:4 bf16", "2:4 int8", "2:4 int4", "PyTorch's own 2:4"]
    return markdown(head, lines)


def decoding():
    """Tokens a second of one sequence, in a model of LLaMA2-7B's shape."""
    rates = results("sparse-matmul")["decode_tokens_per_second"]
    names = {"dense": "dense bf16", "2:4": "2:4 bf16"}
    return markdown(["LLaMA2-7B's shape", *(names.get(name, name) for name in rates)], [
        ["tokens a second", *(f"{rate:.0f}" for rate in rates.values())],
        ["times as fast as dense", *(f"{rate / rates['dense']:.2f}" for rate in rates.values())]])


SAID = {(0.0, 0.0): "what dense weights make of its inputs", (0.5, 0.0): "half-way",
        (1.0, 0.0): "the dense model's output",
        (0.5, 0.5): "half-way, and half of what the hidden state lacks",
        (1.0, 1.0): "the dense model's output, and all that the hidden state lacks",
        (0.5, 1.0): "half-way, and all that the hidden state lacks"}


def goal():
    """Perplexity by what the layers of a propagated run aim at, see walk.AIM."""
    found = {name: rows for name in MODELS if (rows := made(f"goal-{name}"))}
    cells = [(name, amount) for name, rows in found.items() for amount in dict.fromkeys(row["amount"] for row in rows)]
    tried = {tuple(row["aim"]) for rows in found.values() for row in rows}
    lines = [[{"mask": "swaps", "weights": "swaps + refit"}[free], words,
              *(f"{row['perplexity']:.2f}" for name, amount in cells for row in found[name]
                if (row["amount"], row["free"], tuple(row["aim"])) == (amount, free, aim))]
             for free in ("mask", "weights") for aim, words in SAID.items() if aim in tried]
    return markdown(["after", "a layer aims at", *(" ".join(cell) for cell in cells)], lines, texts=2)


def aims():
    """The same of SmolLM2, by how much refit is damped, too."""
    found = {(tuple(row["aim"]), f"{row['damp']:g} of {row['damped_by']}"): f"{row['perplexity']:.2f}"
             for row in results("aim-smollm2")}
    damps = list(dict.fromkeys(damp for _, damp in found))
    return markdown(["SmolLM2 2:4, swaps + refit: a layer aims at", *(f"damped by {damp}" for damp in damps)], [
        [words, *(found.get((aim, damp), "") for damp in damps)]
        for aim, words in SAID.items() if any(tried == aim for tried, _ in found)])


def gap_closed(table, perplexity):
    """The share of the log-perplexity between a table's best one-shot mask and its dense model that is gone."""
    best = min(row["perplexity"] for name, row in table.items() if name.startswith("one-shot"))
    return math.log(best / perplexity) / math.log(best / table["dense"]["perplexity"])


def retrained():
    """Perplexity (mean and deviation over the seeds that have been run), share of the gap, size and tokens of training
    of all rows of ast_train.py's table, and of its control's."""
    tables = [found["table"] | (made(f"ast-control{seed}") or {"table": {}})["table"]
              for seed in range(3) if (found := made(f"ast-seed{seed}"))]
    lines = []
    for name, row in tables[0].items():
        values = [found[name]["perplexity"] for found in tables if name in found]
        spread = f" ± {statistics.stdev(values):.3f}" if len(set(values)) > 1 else ""
        closed = statistics.mean(gap_closed(found, found[name]["perplexity"]) for found in tables if name in found)
        trained = "" if name == "dense" or name.startswith("one-shot") else f"{row['tokens']:,}"
        lines.append([name, f"{statistics.mean(values):.3f}{spread}", f"{closed:.1%}", f"{row['parameters'] / 1e6:.2f}",
                      trained])
    head = ["tiny, 2:4", "test perplexity", "gap closed", "million parameters that are not 0", "training tokens read"]
    return markdown(head, lines)


def ablation(variants):
    """{variant: the row of its table, with the share of the gap that it has "closed"} of seed 0."""
    first, found = results("ast-seed0")["table"], {}
    for said, (name, row) in variants.items():
        if trained := made(f"ast-{name}"):
            row = trained["table"][row]
            found[said] = row | {"closed": gap_closed(first, row["perplexity"])}
    return found


def compressed():
    """The dense and the compressed models: perplexity and size."""
    names = {"dense": "dense", "2of4": "2:4 (Wanda, swaps, refit)", "bf16": "the same compressed, bf16", "int8": "int8",
             "int4": "int4"}
    sizes = {kind: results(f"sparse-bytes-{kind}")["after"] for kind in ("bf16", "int8", "int4")}
    sizes |= dict.fromkeys(("dense", "2of4"), results("sparse-bytes-bf16")["before"])
    return markdown(["`tiny` on its test text (256 tokens)", "perplexity", "MB on disk"], [
        [said, f"{results(f'sparse-tiny-{kind}')['rows'][0]['perplexity']:.2f}", f"{sizes[kind] / 1e6:.2f}"]
        for kind, said in names.items()])


def texts():
    """What each model makes of one prompt, as it came."""
    names = {"dense": "dense", "70": "70 %, swaps + refit", "2of4": "2:4, swaps + refit", "ast": "2:4, AST"}
    parts = [f"[{said}]\n{results(f'text-{name}')['text'].rstrip(chr(0xfffd)).rstrip()}"
             for name, said in names.items()]
    return "```text\n" + "\n\n".join(parts) + "\n```"


def streamed():
    """What pruning a checkpoint of LLaMA2-7B's shape took, phase by phase."""
    lines, found = [], results("streaming-7b")
    for name, phases in found.items():
        for phase, now in phases.items() if isinstance(phases, dict) else ():
            numbers = [now[key] for key in ("peak_rss", "peak_allocated", "read", "written")]
            lines.append([name, phase, *(f"{number:.1f}" for number in [*numbers, now["seconds"] / 60])])
    head = ["run", "phase", "resident, peak GB", "allocated, peak GB", "read GB", "written GB", "minutes"]
    return markdown(head, lines, texts=2)


def ablated():
    return markdown(["AST, seed 0", "test perplexity", "gap closed", "training tokens read"], [
        [said, f"{row['perplexity']:.3f}", f"{row['closed']:.1%}", f"{row['tokens']:,}"]
        for said, row in ablation(PARTS | SETTINGS).items()])


def giant():
    """Perplexity by how many times as large an input of each block is."""
    found, times = {}, {}
    for row in results("giant"):
        found.setdefault(row["method"], []).append(f"{row['perplexity']:.2f}")
        times[f"x {row['times']:,}"] = None
    return markdown(["tiny, 70%", *times], [[method, *cells] for method, cells in found.items()])


def tables():
    """{name of its marker in a page: text}."""
    return {
        "quick start": quick_start(), "choices": choices(), "tables": table_by_method(studied(*MODELS)),
        "seeds": over_seeds(), "settings": table_by_method(pruned("settings/*")),
        "goal": goal(), "aims": aims(),
        "cost": cost(), "cost of swaps": cost_of_swaps(), "cost on a GPU": cost_on_a_gpu(),
        "overfit": table_by_method(pruned("overfit/[0-9]*")), "products": speed_of_products(), "decoding": decoding(),
        "retrained": retrained(), "giant": giant(),
        "ablation": ablated(), "compressed": compressed(), "streamed": streamed(), "texts": texts()}


def draw_ast(path):
    """Validation perplexity while training, and what each part of the method is worth."""
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure
    with matplotlib.rc_context(LOOK | {"axes.prop_cycle": cycler(color=COLOURS)}):
        figure = Figure(figsize=(8, 2.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        for name in "seed0", "long":
            found, options = made(f"ast-{name}"), made(f"ast-{name}", "options")
            for method, trained in found["runs"].items() if found else ():
                steps, values = zip(*trained["validation"])
                left.plot([step * options["batch"] * options["seqlen"] / 1000 for step in steps], values, marker=".",
                          label={"ast": "AST", "ast-slorb": "AST + SLoRB"}[method] + ", longer" * (name == "long"))
        left.set(xlabel="thousand training tokens", ylabel="validation perplexity", xscale="log")
        left.set_xticks([200, 500, 1000, 2000], ["200", "500", "1,000", "2,000"])
        left.minorticks_off()
        left.legend(frameon=False, loc="lower left")
        closed = {said: 100 * row["closed"] for said, row in ablation(PARTS).items()}
        right.barh(list(closed), list(closed.values()))
        right.invert_yaxis()
        right.set(xlabel="gap closed on the test text (%)")
        figure.savefig(path, dpi=160, transparent=True)


def pages():
    """{path: text} of the pages, with their tables as results/ has them now."""
    contents = {path: path.read_text("utf-8") for path in PAGES}
    for name, table in tables().items():
        marked = re.compile(rf"(<!-- {name} -->).*?(\n<!-- end -->)", re.DOTALL)
        if sum(len(marked.findall(text)) for text in contents.values()) != 1:
            raise InputError(f"README.md and results/README.md have no place, or several, for the table {name}")
        contents = {path: marked.sub(lambda found: f"{found[1]}\n{table}{found[2]}", text)
                    for path, text in contents.items()}
    return contents


def held():
    """{path: content} of the pages and their pictures."""
    return {path: path.read_bytes() for path in [*PAGES, *(ROOT / "assets").iterdir()]}


def main():
    argparse.ArgumentParser(description=__doc__).parse_args()
    before, contents = held(), pages()
    plot(opening(studied("smollm2-135m-instruct"), "WikiText-2"), ROOT / "assets/overview.png")
    trained = [row for row in pruned("ast-seed*") if row["method"].startswith("AST")]
    plot(opening(studied("tiny") + trained, "its test text"), ROOT / "assets/choices.png")
    for name in MODELS:
        plot(studied(name), ROOT / f"assets/{name}.png")
    shares = "", "-owl", "-sensitivity"
    plot(pruned(*(f"tiny/0.7-wanda-swap-refit{share}" for share in shares)), ROOT / "assets/layers.png")
    draw_ast(ROOT / "assets/ast.png")
    for path, text in contents.items():
        write_atomically(path, lambda new: new.write_text(text, "utf-8"))
    changed = [str(path.relative_to(ROOT)) for path, content in held().items() if content != before.get(path)]
    print(f"changed: {', '.join(changed)}" if changed else "nothing has changed")


if __name__ == "__main__":
    run(main)
