"""Oracles for eval.py and data/tasks.py: perplexity against a plain loop over transformers, log-likelihoods against one
pair at a time, prompts against texts written by hand, tables against numbers worked out by hand."""

import json
import math
import re
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from conftest import ROOT, SHARED, make_checkpoint

from data import load_text, load_tokenizer, stdlib
from data.command import InputError, run
from data.tasks import SEVEN, TASKS, Example, encode_pair, load_task
from data.text import evaluation_ids
from eval import accuracy, log_likelihoods, perplexity, zero_shot
from gpt import GPT
from results.compare import compare, merge, plot, read_rows, table
from results.readme import tables as readme_tables

STORY = "One day the model had read all the words in the house and it could not find a new one anywhere. "
ROWS = {  # a few rows in the schema of every task, with what makes prompts go wrong: spaces at ends, markup, odd labels
    "boolq": [dict(passage=STORY * 3, question="could the model find a new word", label=0, idx=0),
              dict(passage="Words are few. ", question="are words few", label=1, idx=1),
              dict(passage="Café — “naïve”.", question="is it so", label=1, idx=2)],
    "rte": [dict(sentence1=STORY, sentence2="The model reads.", label=0, idx=0),
            dict(sentence1="The house is red.", sentence2="The house is blue.", label=1, idx=1)],
    "hellaswag": [dict(activity_label="Reading", ctx_a="[header] How to read [title] Open a book. ", ctx_b="the model",
                       endings=["reads [step] it.", "  eats  it.", "can't.", "[substeps] is red and blue and green."],
                       label="3"),
                  dict(activity_label="Roof", ctx_a="A man is on a roof.", ctx_b="",
                       endings=["he sings.", "he falls down.", "he", "it is a bee."], label="1")],
    "winogrande": [dict(sentence="The box was big so the _ fell down the hill.", option1="ball",
                        option2="girl named Lily", answer="2"),
                   dict(sentence="_ was happy, and _ too .", option1="Tom", option2="The dog", answer="1")],
    "arc_easy": [dict(id="a", question="Which one is a toy?", choices=dict(text=["a ball", "the sun", "rain", "time"],
                                                                           label=["A", "B", "C", "D"]), answerKey="A"),
                 dict(id="b", question="What do words do?", choices=dict(text=["read", "go away", "play"],
                                                                         label=["1", "2", "3"]), answerKey="3")],
    "openbookqa": [dict(id="a", question_stem="the sun is ", choices=dict(text=["a star", "a very big dog", "b", "c d"],
                                                                        label=["A", "B", "C", "D"]), answerKey=" B"),
                   dict(id="b", question_stem=STORY + "so it",
                        choices=dict(text=["cried", "played", "saw", "ran away"], label=list("ABCD")), answerKey="A")],
    "piqa": [dict(goal="open a box", sol1="Pull the top.", sol2="Push the sun with a long and heavy word.", label=0),
             dict(goal="Find a friend ", sol1="be kind", sol2="be kind and play", label=1)],
    "mmlu": [dict(question=" Which word is it?\n", subject="high_school_reading", choices=["one", "two", "three", "1"],
                  answer=i) for i in (2, 0, 3)],
}
ROWS["arc_challenge"] = ROWS["arc_easy"][::-1]
DEV = [dict(question=f"How many are {i}?", subject="high_school_reading", choices=["1", "2", "3", "4"], answer=i % 4)
       for i in range(6)]


def write_tasks(folder):
    """ROWS as a --tasks-dir."""
    (folder / "mmlu").mkdir(parents=True)
    for name, rows in ROWS.items():
        path = folder / "mmlu" / "test.jsonl" if name == "mmlu" else folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    (folder / "mmlu" / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DEV))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "random"
    make_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("data") / "tasks")


def run_eval(*arguments):
    return subprocess.run([sys.executable, str(ROOT / "eval.py"), "--device", "cpu", *map(str, arguments)],
                          capture_output=True, text=True, cwd=ROOT)


# ---------------------------------------------------------------------------------------------------- text sources

class Words:
    """A tokenizer whose tokens are words."""
    encode = staticmethod(str.split)


def test_sources_of_the_hub(monkeypatch):
    """How the papers' scripts join the rows, on a Hub that answers with 2,000 numbers; would catch another column or
    separator, the text of another split, and more of C4 than its first 1,100 documents and 256 windows."""
    asked, rows = [], [str(i) for i in range(2000)]

    def load_dataset(path, name, *, split, data_files, revision):
        asked.append((path, name, split, data_files, revision))
        return {"sentence" if path.startswith("ptb") else "text": rows}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert load_text("wikitext2", "test") == "\n\n".join(rows)
    assert load_text("ptb") == load_text("ptb", "validation") == " ".join(rows)
    assert evaluation_ids("ptb", "test", Words, 4) == rows
    assert evaluation_ids("c4", "test", Words, 4) == rows[:1024]
    assert evaluation_ids("c4", "test", Words, 8) == rows[:1100]
    assert evaluation_ids("c4", "validation", Words, 4) == rows[1100:]  # no text of the test
    branch, c4 = "refs/convert/parquet", {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    ptb = [("ptb-text-only/ptb_text_only", None, split, {split: f"penn_treebank/{split}/0000.parquet"}, branch)
           for split in ("test", "validation", "test")]
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test", None, None), *ptb,
                     *[("allenai/c4", None, "validation", c4, None)] * 3]


# ------------------------------------------------------------------------------------------------------ perplexity

def plain_perplexity(folder, ids, seqlen):
    """The protocol of ALGORITHMS as the papers' scripts write it: a loop over windows, on the model of transformers."""
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses = []
    with torch.no_grad():
        for i in range(len(ids) // seqlen):
            window = torch.tensor([ids[i * seqlen:(i + 1) * seqlen]])
            logits = model(window).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, window[0, 1:]).double())
    return math.exp(torch.stack(losses).mean())


def test_splits_of_tiny_share_nothing():
    """Would catch test text that is trained on: a module in two splits, or a docstring that a training module has,
    too."""
    names = {split: re.findall(r"^Help on module (\S+)$", load_text("tiny", split), re.M)
             for split in ("train", "validation", "test")}
    assert all(names.values()) and sum(map(len, names.values())) == len(set(sum(names.values(), [])))
    trained = {doc for name in names["train"] for _, doc in stdlib.documentation()[name] if len(doc) > 60}
    trained = {doc.replace("\n", "\n    ").replace("    \n", "\n") + "\n\n" for doc in trained}  # as on a page
    for split in "validation", "test":
        code, text = load_text("tiny-code", split), load_text("tiny", split)
        assert all(stdlib.modules()[name] in code for name in names[split])
        assert not any(doc in text for doc in trained)


def test_perplexity_is_that_of_a_plain_loop_also_streamed(checkpoint):
    """Would catch: windows that overlap or keep the tail, a mean over windows of other lengths, blocks read wrongly."""
    ids = torch.randint(300, (64 * 5 + 17,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = plain_perplexity(checkpoint, ids, 64)
    for stream in False, True:
        model = GPT.from_pretrained(checkpoint, stream=stream)
        for batch in 1, 2, 8:
            assert perplexity(model, ids, 64, batch) == pytest.approx(expected, abs=1e-3)


def test_a_streamed_model_is_read_once_and_a_block_at_a_time(checkpoint, blocks_read, monkeypatch):
    """Would catch: blocks read again for every batch, blocks that are kept, hidden states that take no heed of what
    memory is free. A window of this model's hidden states takes 8 kB."""
    ids, model = list(range(300)) + list(range(20)), GPT.from_pretrained(checkpoint, stream=True)
    assert not blocks_read
    found = []
    for free, times in (10**9, 1), (40_000, 3), (0, 5):  # five windows: together; two, two and one; one by one
        blocks_read.clear()
        monkeypatch.setattr("eval.free_memory", lambda device: free)
        found.append(perplexity(model, ids, 64, batch=1))
        assert blocks_read == ["model.layers.0", "model.layers.1"] * times
    assert found[0] == found[1] == found[2]


def test_a_model_that_does_not_fit_is_not_loaded_whole(checkpoint, monkeypatch, tmp_path, capsys):
    """The command streams a model that is larger than memory, and refuses what would need all of it."""
    import eval
    (tmp_path / "text.txt").write_text("the model reads words and the words are few " * 40)
    monkeypatch.setattr("eval.free_memory", lambda device: 100_000)  # of 145,024 bytes
    monkeypatch.setattr(sys, "argv", ["eval.py", "--model", str(checkpoint), "--data", str(tmp_path / "text.txt")])
    eval.main()
    assert "perplexity" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--speed"])
    with pytest.raises(InputError, match="--speed needs .*random in memory, 0.0 GB"):
        eval.main()


@pytest.mark.parametrize("folder, text, seqlen", [
    (ROOT / "data" / "tiny", "tiny", 256),
    (SHARED / "models" / "stories260K", SHARED / "text" / "wikitext2-test.raw", 512),
], ids=["tiny", "stories260K on WikiText-2"])
def test_perplexity_of_real_models(folder, text, seqlen):
    """40 windows; would catch a tokenizer, rotary base or norm epsilon that only looks right on random weights."""
    if not folder.is_dir():
        pytest.skip("needs the files beside the repository")
    ids = load_tokenizer(folder).encode(load_text(str(text))[:100_000])[:40 * seqlen]
    assert len(ids) == 40 * seqlen
    assert perplexity(GPT.from_pretrained(folder), ids, seqlen) == pytest.approx(
        plain_perplexity(folder, ids, seqlen), abs=1e-3)


# ------------------------------------------------------------------------------------------------- log-likelihoods

def reference(model, context, continuation, max_length):
    """log P(continuation | context), one pair at a time and one token at a time."""
    ids = (context + continuation)[-(max_length + 1):]
    total = 0.0
    for i in range(len(continuation)):
        end = len(ids) - len(continuation) + i
        with torch.no_grad():
            total += model(torch.tensor([ids[:end]]))[0, -1].float().log_softmax(-1)[ids[end]].item()
    return total


def test_log_likelihoods_are_those_of_one_pair_at_a_time(checkpoint):
    """Whatever the batch size and order; would catch padding that leaks in, continuations cut at the wrong place,
    contexts that are cut from the right, and pairs that share a pass although more than their last token differs."""
    model, rng = GPT.from_pretrained(checkpoint), torch.Generator().manual_seed(0)
    pairs = [(torch.randint(300, (a,), generator=rng).tolist(), torch.randint(300, (b,), generator=rng).tolist())
             for a, b in [(1, 1), (5, 3), (20, 2), (63, 1), (64, 1), (64, 3), (90, 7), (3, 2)]]
    context, (first, second) = pairs[2]
    pairs += [(context, [first, 7]), (context, [8]), (context + [first], [9]), pairs[1]]  # some share a pass
    expected = [reference(model, *pair, max_length=64) for pair in pairs]
    for batch in 1, 3, 8:
        assert log_likelihoods(model, pairs, 64, batch) == pytest.approx(expected, abs=1e-5)
    assert log_likelihoods(model, pairs[::-1], 64, 4)[::-1] == pytest.approx(expected, abs=1e-5)
    streamed = GPT.from_pretrained(checkpoint, stream=True)
    assert log_likelihoods(streamed, pairs, 64, 3) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(InputError, match="65 tokens is longer than the model's context of 64"):
        log_likelihoods(model, [([1], [2] * 65)], 64)


def test_boundary_of_context_and_continuation(checkpoint):
    """Spaces at a context's end belong to the continuation; both parts are the text as it is tokenized whole."""
    tokenizer = load_tokenizer(checkpoint)
    for context, continuation in ("the model", " reads"), ("the model  ", " reads"), ("Answer:", " no"):
        before, after = encode_pair(tokenizer, context, continuation)
        assert before == tokenizer.encode(context.rstrip())
        assert before + after == tokenizer.encode(context + continuation) and after
    with pytest.raises(InputError, match="no tokens"):
        encode_pair(tokenizer, "  ", "word")


def test_pairs_are_those_of_transformers(tasks_dir):
    """The choices of every task, cut as the harness cuts them, through transformers' tokenizer of the model that ships;
    would catch a BOS, or a space before the first word, that only one side adds."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("google.protobuf", reason="transformers reads tokenizer.model with it")
    folder = ROOT / "data" / "tiny"
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for pair in [pair for name in ROWS for example in load_task(name, tasks_dir) for pair in example.pairs]:
        assert encode_pair(ours, *pair) == encode_pair(theirs, *pair)


# ----------------------------------------------------------------------------------------------------------- tasks

def test_prompts(tasks_dir):
    """The words, spaces and line ends that the harness shows the model, written by hand."""
    first = {name: load_task(name, tasks_dir)[0] for name in ROWS}
    assert first["rte"].pairs == [(STORY + "\nQuestion: The model reads. True or False?\nAnswer:", " True"),
                                  (STORY + "\nQuestion: The model reads. True or False?\nAnswer:", " False")]
    assert load_task("boolq", tasks_dir)[1].pairs[1] == ("Words are few. \nQuestion: are words few?\nAnswer:", " yes")
    assert first["hellaswag"].pairs[0] == ("Reading: How to read. Open a book. The model", " reads it.")
    assert [c for _, c in first["hellaswag"].pairs[1:]] == [" eats it.", " can't.", "  is red and blue and green."]
    assert first["winogrande"].pairs == [("The box was big so the ball", " fell down the hill."),
                                         ("The box was big so the girl named Lily", " fell down the hill.")]
    assert load_task("winogrande", tasks_dir)[1].pairs[1] == ("The dog", " was happy, and _ too .")
    assert first["arc_challenge"].pairs[2] == ("Question: What do words do?\nAnswer:", " play")
    assert first["openbookqa"].pairs[0] == ("the sun is ", " a star")
    assert first["piqa"].pairs[1] == ("Question: open a box\nAnswer:", " Push the sun with a long and heavy word.")
    assert {name: example.gold for name, example in first.items()} == dict(
        boolq=0, rte=0, hellaswag=3, winogrande=1, arc_easy=0, arc_challenge=2, openbookqa=1, piqa=0, mmlu=2)
    prompt = "The following are multiple choice questions (with answers) about high school reading.\n\n"
    for i, letter in enumerate("ABCDA"):
        prompt += f"How many are {i}?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: {letter}\n\n"
    prompt += "Which word is it?\nA. one\nB. two\nC. three\nD. 1\nAnswer:"
    assert first["mmlu"].pairs == [(prompt, f" {letter}") for letter in "ABCD"]


def test_tasks_from_parquet_and_from_folders(tasks_dir, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    parquet.write_table(pyarrow.Table.from_pylist(ROWS["arc_easy"]), tmp_path / "arc_easy.parquet")
    (tmp_path / "piqa" / "data").mkdir(parents=True)
    for i, row in enumerate(ROWS["piqa"]):
        (tmp_path / "piqa" / "data" / f"validation-{i:05d}-of-00002.jsonl").write_text(json.dumps(row))
    for name in "arc_easy", "piqa":
        assert load_task(name, tmp_path) == load_task(name, tasks_dir)


def test_accuracy_and_its_standard_error():
    """By hand: of four questions the first, second and fourth are right, per character only the second and fourth."""
    examples = [Example([("", "")] * 2, gold, lengths)
                for gold, lengths in [(0, [1, 9]), (1, [2, 2]), (0, [1, 1]), (1, [4, 4])]]
    scores = [-2.0, -3.0, -5.0, -1.0, -2.0, -1.0, -7.0, -6.0]
    found = accuracy(examples, scores, normalise=True)
    assert found["questions"] == 4 and found["acc"] == 0.75 and found["acc_norm"] == 0.5
    assert found["acc_stderr"] == pytest.approx(math.sqrt((3 * 0.25**2 + 0.75**2) / 3 / 4))
    examples[0].group = examples[1].group = "a"  # pooled: 0 inside the first group, 2 * 0.5^2 inside the second
    assert accuracy(examples, scores, False)["acc_stderr"] == pytest.approx(math.sqrt(0.5 / 2 / 4))
    assert accuracy(examples[:1], scores, False)["acc_stderr"] is None


def test_zero_shot_does_not_depend_on_the_batch(checkpoint, tasks_dir, capsys):
    model, tokenizer = GPT.from_pretrained(checkpoint), load_tokenizer(checkpoint)
    results = [zero_shot(model, tokenizer, list(ROWS), tasks_dir, batch=batch) for batch in (1, 5)]
    assert results[0] == results[1]
    assert results[0]["mean"]["acc"] == pytest.approx(sum(results[0][name]["acc"] for name in ROWS) / len(ROWS))
    normalised = {"hellaswag", "arc_easy", "arc_challenge", "openbookqa", "piqa"}
    assert {name for name in ROWS if "acc_norm" in results[0][name]} == normalised
    assert zero_shot(model, tokenizer, ["mmlu"], tasks_dir, limit=2)["mmlu"]["questions"] == 2
    assert "mean" in capsys.readouterr().out


@pytest.mark.parametrize("name, content, said", [
    ("boolq", '{"passage": "a", "label": 1}\n', "row 1 .* boolq .*'question' is missing"),
    ("boolq", '{"passage": "a", "question": "b", "label": -1}\n', "answer -1 is none of 2"),
    ("arc_easy", '{"question": "a", "choices": ["b"], "answerKey": "A"}\n', "schema of arc_easy"),
    ("piqa", '{"goal": "a", "sol1": null, "sol2": "b", "label": 1}\n', "a text is missing"),
    ("piqa", '["goal"]\n', "schema of piqa"),
    ("winogrande", '{"sentence": "no gap", "option1": "a", "option2": "b", "answer": "1"}\n', "schema of winogrande"),
    ("rte", "", "rte.jsonl is empty"),
    ("rte", "{\n", "rte.jsonl can't be read as JSON lines"),
    ("mmlu", "{}\n", "no data of mmlu: neither mmlu/dev"),
])
def test_bad_task_files_are_one_sentence(tmp_path, name, content, said):
    (tmp_path / f"{name}.jsonl").write_text(content)
    with pytest.raises(InputError, match=said):
        load_task(name, tmp_path)


def test_missing_tasks_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for arguments, said in [(("rhyme",), "no task 'rhyme': there are boolq, rte"),
                            (("rte", tmp_path), "no data of rte"), (("piqa",), "baber/piqa.* --tasks-dir")]:
        with pytest.raises(InputError, match=said):
            load_task(*arguments)
    (tmp_path / "rte.parquet").write_text("nonsense")
    with pytest.raises(InputError, match="can't be read as parquet"):
        load_task("rte", tmp_path)
    assert SEVEN == ["boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"]
    assert set(ROWS) == set(TASKS)


# ------------------------------------------------------------------------------------------------ tables and plots

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
    head = "| model | data (seqlen) | method | sparsity | perplexity | change | seconds |\n| :-- | :-- | :-- | --: |"
    assert table(rows).startswith(head)
    assert lines == [["dense", "0%", "5.00", "", ""],
                     ["wanda", "2:4", "11.00 ± 1.41 (2 seeds)", "", "12"],
                     ["wanda + swap", "2:4", "9.25 ± 0.35 (2 seeds)", "-15.9%", "12"],
                     ["wanda", "70%", "80.00", "", "12"],
                     ["wanda + dsnot (cycles 10)", "70%", "70.00", "-12.5%", "12"],
                     ["wanda + dsnot (cycles 50)", "70%", "60.00", "-25.0%", "12"]]
    rows[-1]["tasks"] = {"rte": dict(acc=0.5, acc_stderr=0.1)}
    for kind, start in ("png", b"\x89PNG"), ("svg", b"<?xml"):
        plot(rows, tmp_path / f"picture.{kind}")
        assert (tmp_path / f"picture.{kind}").read_bytes().startswith(start)


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


# ----------------------------------------------------------------------------------------------------- the command

def test_command(checkpoint, tasks_dir, tmp_path):
    """One run of everything, as it is recorded."""
    (tmp_path / "text.txt").write_text("the model reads words and the words are few " * 40)
    out = run_eval("--model", checkpoint, "--data", tmp_path / "text.txt", "--tasks", "rte", "piqa", "--tasks-dir",
                   tasks_dir, "--speed", "--json", tmp_path / "result.json")
    assert out.returncode == 0 and "seqlen 64" in out.stdout and "decode" in out.stdout, out.stderr
    row = json.loads((tmp_path / "result.json").read_text())["results"]["rows"][0]
    assert row["method"] == "dense" and row["tasks"].keys() == {"rte", "piqa", "mean"} and row["perplexity"] > 1
    weights = sum(p.numel() for p in GPT.from_pretrained(checkpoint).parameters())
    assert row["speed"]["weight_bytes"] == 4 * weights and row["speed"]["peak_memory_bytes"] > 4 * weights
    (row,) = read_rows(tmp_path / "result.json")
    assert row["data"] == "text.txt" and row["seqlen"] == 64 and row["amount"] == "0%"


@pytest.mark.parametrize("arguments, said", [
    (["--tasks", "rhyme"], "--tasks rhyme: there is no such task"),
    (["--tasks", "piqa"], "the data of piqa (baber/piqa) are not in the Hub's cache"),
    (["--tasks", "rte", "--tasks-dir", "data"], "--tasks-dir data has no data of rte"),
    (["--tasks", "rte", "--tasks-dir", "nowhere"], "--tasks-dir nowhere is no folder"),
    (["--data", "ptb"], "ptb_text_only is not in the cache and can't be fetched"),
    (["--compare", "nowhere.json"], "there is no such file"), (["--compare", "LICENSE"], "neither a result file"),
    (["--plot", "a.png"], "needs --compare"), (["--seqlen", "1"], "--seqlen 1"),
    (["--limit", "3"], "they need --tasks"), (["--by-method"], "needs --compare"),
    (["--compare", "x.json", "--speed"], "leave out --data"),
])
def test_bad_input_is_one_sentence(arguments, said, monkeypatch, capsys, tmp_path):
    """On stderr, with exit code 2 and nothing written."""
    import eval

    def unreachable(*_, **__):
        raise ConnectionError

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["eval.py", *arguments, "--device=cpu", f"--json={tmp_path / 'result.json'}"])
    with pytest.raises(SystemExit) as end:
        run(eval.main)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and said in error, error
    assert not list(tmp_path.iterdir())


def test_a_table_of_nothing_is_refused(tmp_path):
    run = dict(model="m", score="wanda", refine="none", pattern=None, sparsity=0.5)
    (tmp_path / "pruning.json").write_text(json.dumps({"run": run, "layers": []}))
    with pytest.raises(InputError, match="there is no perplexity"):
        compare(Namespace(compare=[tmp_path], by_method=True, plot=None, json=None))


def test_readme_shows_the_results():
    """Would catch a number in README's tables that no result file holds, and one that was measured again."""
    readme = (ROOT / "README.md").read_text()
    for name, text in readme_tables().items():
        assert f"<!-- {name} -->\n{text}\n<!-- end -->" in readme, f"run results/readme.py: {name} has changed"
    assert readme.count("<!-- end -->") == len(readme_tables())
