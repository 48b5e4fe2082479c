"""README's AST tables and assets/ast.png from the files of results/ast.sh: python results/ast_table.py

What is not measured yet is left out."""

import json
import math
import statistics
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
from matplotlib import pyplot

ROOT = Path(__file__).parents[1]
VARIANTS = {"seed0": "AST", "no-distillation": "no distillation", "static-decay": "static decay", "no-decay": "no decay",
            "fixed-mask": "fixed mask", "wanda": "mask by Wanda score", "dense-start": "dense start"}


def read(name):
    path = ROOT / "results" / f"ast-{name}.json"
    return json.loads(path.read_text())["results"] if path.is_file() else None


def rows(tables):
    """Rows of several seeds as markdown: perplexity, its deviation over seeds, share of the gap, tokens."""
    first, *_ = tables
    best = min(row["perplexity"] for name, row in first.items() if name.startswith("one-shot"))
    dense = first["dense"]["perplexity"]
    for name, row in first.items():
        values = [found[name]["perplexity"] for found in tables if name in found]
        closed = math.log(best / statistics.mean(values)) / math.log(best / dense)
        spread = f" ± {statistics.stdev(values):.3f}" if len(set(values)) > 1 else ""
        yield name, values, f"{statistics.mean(values):.3f}{spread}", f"{closed:.1%}", f"{row['tokens']:,}"


def table(head, lines):
    for line in [head, [":--"] + ["--:"] * (len(head) - 1), *lines]:
        print("| " + " | ".join(line) + " |")


def main():
    runs, tables = read("seed0")["runs"], []
    for seed in range(3):
        if found := read(f"seed{seed}"):
            control = (read(f"control{seed}") or {"table": {}})["table"]
            tables.append(control | found["table"])
    best, dense = tables[0]["one-shot sparsegpt"]["perplexity"], tables[0]["dense"]["perplexity"]
    if long := read("long"):
        tables[0] |= {f"{name}, longer": row for name, row in long["table"].items() if name.startswith("AST")}
    table(["tiny, 2:4", "test perplexity", "gap closed", "training tokens"],
          [[name, *said] for name, _, *said in rows(tables)])

    closed = lambda row: math.log(best / row["perplexity"]) / math.log(best / dense)
    ablation = {said: found["table"]["AST"] for name, said in VARIANTS.items() if (found := read(name))}
    print()
    table(["AST at the default's tokens, seed 0", "test perplexity", "gap closed"],
          [[said, f"{row['perplexity']:.3f}", f"{closed(row):.1%}"] for said, row in ablation.items()])

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.6))
    options = json.loads((ROOT / "results/ast-seed0.json").read_text())["options"]
    for method, run in runs.items():
        steps, values = zip(*run["validation"])
        tokens = [step * options["batch"] * options["seqlen"] / 1000 for step in steps]
        left.plot(tokens, values, marker=".", label=method)
    left.set(xlabel="thousand training tokens", ylabel="validation perplexity")
    left.legend()
    right.barh(list(ablation), [100 * closed(row) for row in ablation.values()])
    right.invert_yaxis()
    right.set(xlabel="share of the perplexity gap closed, test text (%)")
    figure.tight_layout()
    figure.savefig(ROOT / "assets/ast.png", dpi=120)


if __name__ == "__main__":
    main()
