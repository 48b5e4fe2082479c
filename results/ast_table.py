"""README's AST tables and assets/ast.png from the files of results/ast.sh: python results/ast_table.py

What is not measured yet is left out."""

import json
import math
import statistics
import sys
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
from matplotlib import pyplot

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from results.compare import markdown

VARIANTS = {"seed0": "AST", "no-distillation": "no distillation", "static-decay": "static decay", "no-decay": "no decay",
            "fixed-mask": "fixed mask", "wanda": "mask by Wanda score", "dense-start": "dense start"}


def read(name):
    path = ROOT / "results" / f"ast-{name}.json"
    return json.loads(path.read_text())["results"] if path.is_file() else None


def gap_closed(table, perplexity):
    """The share of the log-perplexity between a table's best one-shot mask and its dense model that is gone."""
    best = min(row["perplexity"] for name, row in table.items() if name.startswith("one-shot"))
    return math.log(best / perplexity) / math.log(best / table["dense"]["perplexity"])


def rows(tables):
    """Rows of several seeds as markdown: perplexity, its deviation over seeds, share of the gap, tokens."""
    for name, row in tables[0].items():
        values = [found[name]["perplexity"] for found in tables if name in found]
        mean, spread = statistics.mean(values), f" ± {statistics.stdev(values):.3f}" if len(set(values)) > 1 else ""
        yield name, f"{mean:.3f}{spread}", f"{gap_closed(tables[0], mean):.1%}", f"{row['tokens']:,}"


def main():
    runs, tables = read("seed0")["runs"], []
    for seed in range(3):
        if found := read(f"seed{seed}"):
            control = (read(f"control{seed}") or {"table": {}})["table"]
            tables.append(control | found["table"])
    if long := read("long"):
        tables[0] |= {f"{name}, longer": row for name, row in long["table"].items() if name.startswith("AST")}
    print(markdown(["tiny, 2:4", "test perplexity", "gap closed", "training tokens"], list(rows(tables))), end="\n\n")

    ablation = {said: found["table"]["AST"] for name, said in VARIANTS.items() if (found := read(name))}
    closed = {said: gap_closed(tables[0], row["perplexity"]) for said, row in ablation.items()}
    print(markdown(["AST at the default's tokens, seed 0", "test perplexity", "gap closed"],
                   [[said, f"{row['perplexity']:.3f}", f"{closed[said]:.1%}"] for said, row in ablation.items()]))

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.6))
    options = json.loads((ROOT / "results/ast-seed0.json").read_text())["options"]
    for method, run in runs.items():
        steps, values = zip(*run["validation"])
        tokens = [step * options["batch"] * options["seqlen"] / 1000 for step in steps]
        left.plot(tokens, values, marker=".", label=method)
    left.set(xlabel="thousand training tokens", ylabel="validation perplexity")
    left.legend()
    right.barh(list(closed), [100 * share for share in closed.values()])
    right.invert_yaxis()
    right.set(xlabel="share of the perplexity gap closed, test text (%)")
    figure.tight_layout()
    figure.savefig(ROOT / "assets/ast.png", dpi=120)


if __name__ == "__main__":
    main()
