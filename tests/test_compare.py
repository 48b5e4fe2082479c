"""Oracles for eval.py --compare: tables against numbers worked out by hand, names, and pictures."""

import json
import math
from argparse import Namespace

import pytest

from data.command import InputError
from gpt import GPT
from results.compare import (accuracy_panel, compare, layer_panel, merge, perplexity_panel, plot, read_rows, table,
                             table_by_method)
from test_eval import run_eval


def result_file(folder, name, rows, **options):
    options = dict(model="some/where/llama", sparsity=0.7, pattern=None, seed=0, cycles=50) | options
    path = folder / f"{name}.json"
    rows = [dict(method=method, sparsity=0.7, perplexity=perplexity, seconds=12.4, layers=layers)
            for method, perplexity, layers in rows]
    results = {"data": "wikitext2", "seqlen": 2048, "rows": rows}
    path.write_text(json.dumps({"options": options, "results": results}))
    return path


def test_table(tmp_path):
    """By hand; would catch a change relative to the wrong row, seeds or options mixed up, duplicates shown twice."""
    layers = [dict(layer=f"model.layers.{i}.mlp.{kind}", weights=4, sparsity=0.7, error=0.1 * i + 0.1)
              for i in range(3) for kind in ("up_proj", "down_proj")]
    dense = ("dense", 5.0, [])
    files = [result_file(tmp_path, "a", [dense, ("wanda", 80.0, layers), ("wanda + dsnot", 60.0, layers)]),
             result_file(tmp_path, "b", [dense, ("wanda", 80.0, []), ("wanda + dsnot", 70.0, [])], cycles=10),
             result_file(tmp_path, "c", [dense, ("wanda", 12.0, []), ("wanda + swap", 9.0, [])], pattern="2:4"),
             result_file(tmp_path, "d", [dense, ("wanda", 10.0, []), ("wanda + swap", 9.5, [])], pattern="2:4", seed=1)]
    rows = merge([row for path in files for row in read_rows(path)])
    lines = [[cell.strip() for cell in line.split("|")[3:-1]] for line in table(rows).split("\n")[2:]]
    head = ("| model | data (seqlen) | method | sparsity | perplexity | by refinement | seconds |\n"
            "| :-- | :-- | :-- | --")
    assert table(rows).startswith(head)
    assert lines == [["dense", "0%", "5.00", "", ""],
                     ["wanda", "2:4", "11.00 ± 1.41 (2 seeds)", "", "12"],
                     ["wanda + swap", "2:4", "9.25 ± 0.35 (2 seeds)", "-15.9%", "12"],
                     ["wanda", "70%", "80.00", "", "12"],
                     ["wanda + dsnot (cycles 10)", "70%", "70.00", "-12.5%", "12"],
                     ["wanda + dsnot (cycles 50)", "70%", "60.00", "-25.0%", "12"]]
    more = [result_file(tmp_path, "e", [("wanda", 50.0, []), ("wanda + swap", 45.0, [])], allocate="owl"),
            result_file(tmp_path, "f", [("wanda", 80.0, []), ("wanda + swap", 60.0, []), ("AST + SLoRB", 6.0, []),
                                        ("AST", 7.0, [])], allocate="uniform")]
    changes = [line.split("|")[6].strip() for line in table(merge([row for path in more for row in read_rows(path)]))
               .split("\n")[2:]]
    ruined = read_rows(result_file(tmp_path, "g", [dense, ("wanda", float("nan"), [])]))
    assert len(merge(ruined + ruined)) == 2  # NaN is no number, but the same one twice is one row
    other = [result_file(tmp_path, f"h{seed}", [("wanda", 10.0 + seed, [])], seed=seed, nsamples=128 >> seed)
             for seed in (0, 1)]
    merged = merge([row for path in other for row in read_rows(path)])
    assert [(row["method"], row["perplexity"]) for row in merged] == [
        ("wanda (nsamples 128)", 10.0), ("wanda (nsamples 64)", 11.0)]  # they differ in more than the seed
    splits = [result_file(tmp_path, split, [("wanda", 10.0, [])], split=split) for split in ("test", "validation")]
    assert [row["data"] for path in splits for row in read_rows(path)] == ["wikitext2", "wikitext2, validation"]
    found = [dict(row, options=dict(seed=seed), tasks={"rte": dict(acc=0.5 + seed / 10)}) for seed in (0, 1)
             for row in read_rows(splits[0])]
    assert len(merge(found)) == 2  # accuracies are not averaged, and none is left out
    assert changes == ["", "", "", "", "-25.0%", "-10.0%"]  # AST, AST + SLoRB, Wanda and with owl, swaps and with owl
    rows[-1]["tasks"] = {"rte": dict(acc=0.5, acc_stderr=0.1)}
    for kind, start in ("png", b"\x89PNG"), ("svg", b"<?xml"):
        plot(rows, tmp_path / f"picture.{kind}")
        assert (tmp_path / f"picture.{kind}").read_bytes().startswith(start)


def test_a_method_that_prunes_nothing_keeps_its_place(tmp_path):
    """Would catch --sparsity 0 that takes the method out of the table by methods."""
    files = [result_file(tmp_path, str(s), [("dense", 5.0, []), ("wanda", 5.0 + 10 * s, [])], sparsity=s)
             for s in (0.0, 0.5)]
    assert table_by_method(merge([row for path in files for row in read_rows(path)])).split("\n") == [
        "| llama on wikitext2 (2048), dense 5.00 | 50% |", "| :-- | --: |", "| wanda | 10.00 |"]


def test_a_ruined_dense_model_has_a_table(tmp_path):
    """Would catch a traceback, or another order, where a perplexity is infinite, also that of one of two seeds."""
    files = [result_file(tmp_path, name, [("dense", math.inf, []), ("wanda", 9.0, []), ("magnitude", ruined, []),
                                          ("sparsegpt", 50.0, [])], seed=i)
             for i, (name, ruined) in enumerate([("a", math.inf), ("b", 1e5)])]
    for chosen in files[:1], files:
        rows = merge([row for file in chosen for row in read_rows(file)])
        assert [line.split("|")[1].strip() for line in table_by_method(rows).split("\n")[2:]] == [
            "magnitude", "sparsegpt", "wanda"]


def test_methods_that_beat_the_dense_model_stand_last(tmp_path):
    """Would catch an order that turns around where the mean loss is negative."""
    file = result_file(tmp_path, "a", [("dense", 20.62, []), ("wanda", 20.31, []), ("magnitude", 20.6, [])])
    assert [line.split("|")[1].strip() for line in table_by_method(merge(read_rows(file))).split("\n")[2:]] == [
        "magnitude", "wanda"]


def test_amounts_stand_in_order(tmp_path):
    """Would catch columns in the order in which methods happen to have them."""
    files = [result_file(tmp_path, f"{name}{i}", [(method, 9.0, [])], **amount) for name, method, amounts in (
        ("a", "magnitude", [dict(sparsity=0.7)]),
        ("b", "wanda", [dict(sparsity=0.7), dict(sparsity=0.5), dict(pattern="2:4")]))
             for i, amount in enumerate(amounts)]
    text = table_by_method(merge([row for path in files for row in read_rows(path)]))
    assert text.startswith("| llama on wikitext2 (2048) | 2:4 | 50% | 70% |")


@pytest.mark.parametrize("model, name", [
    (".", "."), ("..", ".."), ("snapshots/abc", "abc"), ("a/b/", "b"), ("meta-llama/Llama-2-7b-hf", "Llama-2-7b-hf"),
    ("models--gpt2/snapshots/abc", "gpt2")])
def test_models_have_names(model, name, tmp_path):
    """Would catch a traceback where a path has too few parts for one of the Hub's cache."""
    path = result_file(tmp_path, "a", [("wanda", 9.0, [])])
    entry = json.loads(path.read_text())
    entry["options"]["model"] = model
    path.write_text(json.dumps(entry))
    assert [row["model"] for row in read_rows(path)] == [name]


def test_texts_of_one_name_are_kept_apart(tmp_path):
    """Would catch a table of two texts: the dense model tells them apart."""
    files = [result_file(tmp_path, name, [("dense", dense, []), ("wanda", 9.0 + share, [])], sparsity=share)
             for name, dense, share in (("a", 5.0, 0.5), ("b", 5.0001, 0.6), ("c", 5.2, 0.7))]
    texts = table_by_method(merge([row for path in files for row in read_rows(path)])).split("\n\n")
    assert [text.split("|")[1].strip() for text in texts] == [
        "llama on wikitext2, dense 5 (2048), dense 5.00", "llama on wikitext2, dense 5.2 (2048), dense 5.20"]
    assert [line.split("|")[2:-1] for line in texts[0].split("\n")[::2]] == [[" 50% ", " 60% "], [" 9.50 ", " 9.60 "]]


def test_only_unusual_propagation_is_said(tmp_path):
    """Would catch plain methods that are renamed, and so left out of a table, when a file names every option."""
    files = [result_file(tmp_path, "a", [("wanda", 12.0, [])], propagate=False),
             result_file(tmp_path, "b", [("wanda", 13.0, [])], propagate=True),
             result_file(tmp_path, "c", [("wanda + swap", 9.0, [])], propagate=True),
             result_file(tmp_path, "d", [("wanda + swap", 10.0, [])], propagate=False)]
    rows = merge([row for path in files for row in read_rows(path)])
    assert {row["perplexity"]: row["method"] for row in rows} == {
        12.0: "wanda", 13.0: "wanda (propagate)", 9.0: "wanda + swap", 10.0: "wanda + swap (no propagate)"}


def test_results_of_training_and_pruned_folders(tmp_path):
    entry = {"options": dict(model="tiny", sparsity=None, pattern="2:4", eval_data="tiny", seqlen=256, seed=0),
             "results": {"table": {"dense": dict(perplexity=5.0), "AST": dict(perplexity=5.5)}}}
    (tmp_path / "ast.json").write_text(json.dumps(entry))
    assert [(r["method"], r["amount"], r["sparsity"], r["perplexity"]) for r in read_rows(tmp_path / "ast.json")] == [
        ("dense", "0%", 0.0, 5.0), ("AST", "2:4", 0.5, 5.5)]
    (tmp_path / "pruning.json").write_text(json.dumps({"layers": [], "run": dict(
        model="cache/models--meta-llama--Llama-2-7b-hf/snapshots/abc", score="wanda", refine="dsnot+swap", refit=True,
        sparsity=0.6, pattern=None)}))
    row = read_rows(tmp_path)[0]
    assert (row["model"], row["method"], row["sparsity"]) == ("Llama-2-7b-hf", "wanda + dsnot + swap + refit", 0.6)


def test_pruned_folders_that_differ_in_an_option_are_told_apart(checkpoint, tmp_path):
    """Would catch a row that is dropped because neither folder has a perplexity, and options that eval.py forgets."""
    folders, files = [tmp_path / allocate for allocate in ("uniform", "owl")], []
    for folder, error in zip(folders, (0.1, 0.2)):
        model = GPT.from_pretrained(checkpoint)
        model.model.norm.weight.data *= 1 + error
        model.save_pretrained(folder)
        method = dict(score="wanda", refine="swap", refit=False, allocate=folder.name)
        layers = [dict(layer="model.layers.0.mlp.up_proj", weights=4, sparsity=0.6, error=error)]
        (folder / "pruning.json").write_text(json.dumps({"layers": layers, "run": method | dict(
            model=str(checkpoint), sparsity=0.6, pattern=None, seed=0, files=[[folder.name, 1, 2]])}))
        files.append(tmp_path / f"{folder.name}.json")
        assert run_eval("--model", folder, "--data", "LICENSE", "--json", files[-1]).returncode == 0
    for paths in folders, files, folders * 2, files * 2:
        rows = merge([row for path in paths for row in read_rows(path)])
        assert [row["method"] for row in rows] == ["wanda + swap", "wanda + swap (allocate owl)"]
    assert str(checkpoint) not in json.dumps(json.loads(files[0].read_text())["results"])


def test_parts_of_a_text_are_kept_apart(checkpoint, tmp_path):
    """Would catch another part's perplexity under the name of a whole text, taken for another seed's, or compared."""
    GPT.from_pretrained(checkpoint).save_pretrained(tmp_path / "pruned")
    (tmp_path / "pruned/pruning.json").write_text(json.dumps({"layers": [], "run": dict(
        model=str(checkpoint), score="wanda", refine="none", sparsity=0.5, pattern=None, seed=0)}))
    (tmp_path / "text.txt").write_text("the model reads words and the words are few " * 400)
    names = {}
    for split in None, "held-out", "validation", "test":
        words = ["--split", split] if split else []
        for model in checkpoint, tmp_path / "pruned":
            file = tmp_path / f"{split}-{model.name}.json"
            assert run_eval("--model", model, "--data", tmp_path / "text.txt", *words, "--json", file).returncode == 0
            names[file] = "text.txt" + f", {split}" * bool(split)
    for file, name in names.items():
        assert [row["data"] for row in read_rows(file)] == [name]
    rows = merge([row for file in names for row in read_rows(file)])
    assert [(row["data"], row["method"], row["runs"]) for row in rows] == [
        (name, method, 1) for name in sorted(set(names.values())) for method in ("dense", "wanda")]
    old = result_file(tmp_path, "old", [("wanda", 9.0, [])], split="validation")  # of a named text
    assert [row["data"] for row in read_rows(old)] == ["wikitext2, validation"]


def test_what_is_no_perplexity_is_not_averaged(tmp_path):
    """Would catch a pruned folder that stands for another seed's, a mean of some tasks beside that of others, and a
    part of the questions shown as all."""
    for seed in 0, 1:
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "pruning.json").write_text(json.dumps({
            "layers": [dict(layer="model.layers.0.mlp.up_proj", weights=4, sparsity=0.5, error=0.1 + seed)],
            "run": dict(model="m", score="wanda", refine="none", sparsity=0.5, pattern=None, seed=seed)}))
    assert len(merge([row for seed in "01" for row in read_rows(tmp_path / seed)])) == 2
    results = []
    measured = [(["rte", "mean"], None), (["rte", "piqa", "mean"], None), (["rte", "mean"], 1)]
    for i, (tasks, limit) in enumerate(measured):
        entry = dict(options=dict(model="m", sparsity=None, seed=0, limit=limit), results={"rows": [
            dict(method="dense", tasks={task: dict(acc=0.5 + i / 10) for task in tasks})]})
        (tmp_path / f"{i}.json").write_text(json.dumps(entry))
        results.append(read_rows(tmp_path / f"{i}.json"))
    lines = table(merge(sum(results, []))).split("\n")
    assert "| rte | piqa |" in lines[0] and "mean" not in lines[0]
    assert [line.split("|")[3].strip() for line in lines[2:]] == ["dense", "dense", "dense (limit 1)"]
    assert "| mean |" in table(merge(results[0] + results[2]))
    alone = [dict(row, tasks={task: dict(acc=0.5)}) for task in ("rte", "piqa") for row in results[0]]
    assert "| rte | piqa |" in table(merge(alone))  # measured one by one, they have no mean


def test_seeds_that_agree_count_all_the_same(tmp_path):
    """Would catch a mean over the different perplexities of three seeds, of which two are equal."""
    rows = []
    for seed, perplexity in enumerate([10.0, 10.0, 13.0]):
        rows += read_rows(result_file(tmp_path, "r", [("dense", 5.0, []), ("wanda", perplexity, [])], seed=seed))
    dense, found = merge(rows)
    assert (dense["perplexity"], dense["runs"], dense["spread"]) == (5, 1, None)
    assert (found["perplexity"], found["runs"]) == (11, 3) and found["spread"] == pytest.approx(3 ** 0.5)


def test_what_tells_two_trainings_apart(tmp_path):
    """Would catch the training text left out of a name, and how often a state was saved in it."""
    rows = []
    for seconds, (data, every) in enumerate([("tiny", 100), ("tiny-code", 50)]):
        options = dict(model="tiny", sparsity=None, pattern="2:4", eval_data="tiny", seqlen=256, seed=0, data=[data],
                       save_every=every)
        table = {"AST": dict(perplexity=5.5 + seconds)}
        (tmp_path / "ast.json").write_text(json.dumps({"options": options, "results": {"table": table}}))
        rows += read_rows(tmp_path / "ast.json")
    assert [row["method"] for row in merge(rows)] == ["AST (data tiny)", "AST (data tiny-code)"]


def test_a_table_of_nothing_is_refused(tmp_path):
    run = dict(model="m", score="wanda", refine="none", pattern=None, sparsity=0.5)
    (tmp_path / "pruning.json").write_text(json.dumps({"run": run, "layers": []}))
    with pytest.raises(InputError, match="there is no perplexity"):
        compare(Namespace(compare=[tmp_path], by_method=True, plot=None, json=None))


def test_pictures_show_the_numbers():
    """Would catch a point in another method's line, a map on its side, and shares drawn as percent."""
    from matplotlib.figure import Figure
    layers = [dict(layer=f"model.layers.{i}.mlp.{kind}", weights=4, sparsity=0.5 + i / 10 + j / 100)
              for i in range(3) for j, kind in enumerate(("up_proj", "down_proj"))]
    rows = [dict(model="m", data="d", seqlen=8, method=method, amount=amount, perplexity=ppl, spread=None,
                 layers=layers, tasks={"rte": dict(acc=ppl / 100)})
            for method, amount, ppl in [("dense", "0%", 5.0), ("a", "50%", 7.0), ("b", "50%", 6.0), ("a", "70%", 9.0)]]
    axis = Figure().subplots()
    perplexity_panel(axis, (rows, {"50%": "red", "70%": "blue"}))
    names = [text.get_text() for text in axis.get_yticklabels()]
    shown = {(box.get_label(), names[int(y)], x) for box in axis.containers for x, y in zip(*box[0].get_data())}
    assert shown == {(row["amount"], row["method"], row["perplexity"]) for row in rows[1:]}
    axis = Figure().subplots()
    accuracy_panel(axis, rows)
    assert [bar.get_height() for bar in axis.patches] == pytest.approx([5, 7, 6, 9])
    axis = Figure().subplots()
    others = {"tasks": {task: dict(acc=0.4) for task in ("rte", "piqa", "mean")}}
    accuracy_panel(axis, [rows[0], rows[1] | others])
    assert [text.get_text() for text in axis.get_xticklabels()] == ["rte", "piqa"]
    axis = Figure().subplots()
    layer_panel(axis, (rows[1], rows))
    assert axis.images[0].get_array().flatten().tolist() == pytest.approx([50, 60, 70, 51, 61, 71])
    assert [text.get_text() for text in axis.get_yticklabels()] == ["up_proj", "down_proj"]
