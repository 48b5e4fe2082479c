"""Oracles for zero-shot tasks: log-likelihoods against one pair at a time, prompts against texts written by hand."""

import json
import math

import pytest
import torch
from conftest import ROOT

import eval as evaluation
from data import load_tokenizer, tasks
from data.command import InputError
from data.tasks import SEVEN, TASKS, Example, encode_pair, load_task
from eval import accuracy, encoded_tasks, log_likelihoods, perplexity, zero_shot
from gpt import GPT

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
def tasks_dir(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("data") / "tasks")


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


def test_boundary_of_context_and_continuation(checkpoint):
    """Spaces at a context's end belong to the continuation; both parts are the text as it is tokenized whole."""
    tokenizer = load_tokenizer(checkpoint)
    for context, continuation in ("the model", " reads"), ("the model  ", " reads"), ("Answer:", " no"):
        before, after = encode_pair(tokenizer, context, continuation)
        assert before == tokenizer.encode(context.rstrip())
        assert before + after == tokenizer.encode(context + continuation) and after
    for pair in ("  ", "word"), ("word", ""):
        with pytest.raises(InputError, match="no tokens"):  # an empty continuation would be the likeliest of all
            encode_pair(tokenizer, *pair)


def test_pairs_are_those_of_transformers(tasks_dir):
    """The choices of every task, cut as the harness cuts them, through transformers' tokenizer of the model that ships;
    would catch a BOS, or a space before the first word, that only one side adds."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("google.protobuf", reason="transformers reads tokenizer.model with it")
    folder = ROOT / "data" / "tiny"
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    theirs.last = []  # what it puts after a text
    for pair in [pair for name in ROWS for example in load_task(name, tasks_dir) for pair in example.pairs]:
        assert encode_pair(ours, *pair) == encode_pair(theirs, *pair)


def test_likelihoods_of_a_bf16_model_are_float32(checkpoint):
    """Would catch log-likelihoods rounded to 8 bits, which tie."""
    model, ids = GPT.from_pretrained(checkpoint, dtype=torch.bfloat16), torch.randint(300, (256,)).tolist()
    found = torch.tensor(log_likelihoods(model, [(ids[i:i + 9], ids[i + 9:i + 10]) for i in range(0, 200, 10)], 64))
    with torch.no_grad():
        logits = [model(torch.tensor([ids[i:i + 9]]))[0, -1].float() for i in range(0, 200, 10)]
    expected = torch.stack([x.log_softmax(-1)[ids[i * 10 + 9]] for i, x in enumerate(logits)])
    assert (found != found.bfloat16()).any() and (found - expected).abs().max() < 0.05
    exact = torch.nn.functional.cross_entropy(torch.cat([model(torch.tensor([ids[i:i + 64]]))[0, :-1].float()
                                                         for i in range(0, 256, 64)]).double(),
                                              torch.tensor(ids).view(4, 64)[:, 1:].flatten()).exp().item()
    assert perplexity(model, ids, 64) == pytest.approx(exact, rel=1e-4)


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
    (tmp_path / "piqa" / "other").mkdir()
    (tmp_path / "piqa" / "other" / "validation.jsonl").write_text(json.dumps(ROWS["piqa"][0]))
    with pytest.raises(InputError, match="validation data of piqa in .*data and in .*other: leave"):
        load_task("piqa", tmp_path)  # a data set's configurations, which would be mixed
    (tmp_path / "arc_easy.jsonl").write_text(json.dumps(ROWS["arc_easy"][0]))
    with pytest.raises(InputError, match="arc_easy.jsonl and in .*arc_easy.parquet: leave in one"):
        load_task("arc_easy", tmp_path)


def test_marks_and_half_characters_in_task_files(tmp_path, checkpoint):
    """Would catch a file that Windows has marked as UTF-8, and half a surrogate, which no tokenizer takes."""
    row = json.dumps(dict(goal="half \ud800", sol1="a", sol2="b", label=0))
    (tmp_path / "piqa.jsonl").write_text("\ufeff" + row, "utf-8")
    assert load_task("piqa", tmp_path)[0].pairs[0] == ("Question: half ?\nAnswer:", " a")
    assert encoded_tasks(load_tokenizer(checkpoint), ["piqa"], 64, tmp_path)["piqa"][1]


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
    assert accuracy(examples, [math.nan] * 8, True)["acc"] == 0  # a ruined model answers nothing


def test_zero_shot_does_not_depend_on_the_batch(checkpoint, tasks_dir, capsys):
    model, tokenizer = GPT.from_pretrained(checkpoint), load_tokenizer(checkpoint)
    results = [zero_shot(model, encoded_tasks(tokenizer, ROWS, 64, tasks_dir), batch) for batch in (1, 5)]
    assert results[0] == results[1]
    assert results[0]["mean"]["acc"] == pytest.approx(sum(results[0][name]["acc"] for name in ROWS) / len(ROWS))
    normalised = {"hellaswag", "arc_easy", "arc_challenge", "openbookqa", "piqa"}
    assert {name for name in ROWS if "acc_norm" in results[0][name]} == normalised
    limited = encoded_tasks(tokenizer, ["mmlu"], 64, tasks_dir, limit=2)
    assert zero_shot(model, limited)["mmlu"]["questions"] == 2
    with pytest.raises(InputError, match="boolq: a choice of 4 tokens is longer than the model's context of 3"):
        encoded_tasks(tokenizer, ["boolq"], 3, tasks_dir)
    assert "mean" in capsys.readouterr().out


@pytest.mark.parametrize("name, content, said", [
    ("boolq", '{"passage": "a", "label": 1}\n', "row 1 .* boolq .*'question' is missing"),
    ("boolq", '{"passage": "a", "question": "b", "label": -1}\n', "answer -1 is none of 2"),
    ("arc_easy", '{"question": "a", "choices": ["b"], "answerKey": "A"}\n', "schema of arc_easy"),
    ("piqa", '{"goal": "a", "sol1": null, "sol2": "b", "label": 1}\n', "a text is missing"),
    ("piqa", '{"goal": null, "sol1": "a", "sol2": "b", "label": 1}\n', "schema of piqa"),
    ("openbookqa", '{"question_stem": "a", "choices": {"text": "bc", "label": ["A", "B"]}, "answerKey": "A"}\n',
     "'bc' is no list"),
    ("rte", "[" * 100_000, "rte.jsonl can't be read as JSON lines"),
    ("piqa", '["goal"]\n', "piqa.jsonl: row 1 does not have the schema of piqa"),
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


def test_lengths_are_those_of_the_choices_in_characters(tasks_dir, tmp_path):
    """Would catch acc_norm by bytes, by tokens, or with the space before a choice."""
    assert load_task("hellaswag", tasks_dir)[0].lengths == [9, 8, 6, 27]
    (tmp_path / "piqa.jsonl").write_text(json.dumps(dict(goal="a", sol1="été", sol2="naïveté", label=0)))
    assert load_task("piqa", tmp_path)[0].lengths == [3, 7]
    assert [example.group for name in ("mmlu", "piqa") for example in load_task(name, tasks_dir)] == [
        *3 * ["high_school_reading"], "", ""]
    # per character the second, by one character more the first; a choice without characters is never the answer
    example = Example([("", "")] * 3, 1, [1, 4, 0])
    assert accuracy([example], [-1.9, -7.4, -0.1], True)["acc_norm"] == 1


def test_what_the_hub_is_asked_for(monkeypatch):
    """Would catch another configuration, the solved examples of MMLU taken from its test, and a training split."""
    asked = []

    def hub_rows(path, name, split, instead):
        asked.append((path, name, split))
        return DEV if split == "dev" else ROWS[task]
    monkeypatch.setattr(tasks, "hub_rows", hub_rows)
    for task in TASKS:
        assert len(load_task(task)) == len(ROWS[task])
    assert asked == [("aps/super_glue", "boolq", "validation"), ("nyu-mll/glue", "rte", "validation"),
                     ("Rowan/hellaswag", None, "validation"), ("allenai/winogrande", "winogrande_xl", "validation"),
                     ("allenai/ai2_arc", "ARC-Easy", "test"), ("allenai/ai2_arc", "ARC-Challenge", "test"),
                     ("allenai/openbookqa", "main", "test"), ("baber/piqa", None, "validation"),
                     ("cais/mmlu", "all", "test"), ("cais/mmlu", "all", "dev")]


def test_subjects_of_mmlu(tmp_path):
    """Would catch a limit on all subjects together, and questions with fewer solved examples than five."""
    write_tasks(tmp_path / "tasks")
    folder = tmp_path / "tasks" / "mmlu"
    other = [row | dict(subject="law") for row in ROWS["mmlu"]]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*ROWS["mmlu"], *other]))
    law = [json.dumps(row | dict(subject="law")) + "\n" for row in DEV]
    for many in 4, 5:
        (folder / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DEV) + "".join(law[:many]))
        if many == 4:
            with pytest.raises(InputError, match="needs 5 solved examples of 'law'"):
                load_task("mmlu", tmp_path / "tasks")
    assert [example.group for example in load_task("mmlu", tmp_path / "tasks", limit=2)] == [
        *2 * ["high_school_reading"], *2 * ["law"]]
    question = dict(question="a", choices=["b", "c", "d", "e"], answer=0)
    for wrong, said in (question | dict(subject=3), "a text is missing"), (question, "'subject' is missing"):
        (folder / "dev.jsonl").write_text(json.dumps(wrong) + "\n")
        with pytest.raises(InputError, match=said):
            load_task("mmlu", tmp_path / "tasks")


def test_zero_shot_by_hand(checkpoint, tasks_dir, monkeypatch):
    """Would catch contexts that are longer than the model's, and a mean that takes tasks without acc_norm for 0."""
    lengths, real = [], evaluation.log_likelihoods
    monkeypatch.setattr(evaluation, "log_likelihoods", lambda model, pairs, most, *rest, **how: (
        lengths.append(most), real(model, pairs, most, *rest, **how))[1])
    found = zero_shot(GPT.from_pretrained(checkpoint),
                      encoded_tasks(load_tokenizer(checkpoint), ["boolq", "piqa"], 64, tasks_dir))
    assert lengths == [64, 64] and "acc_norm" not in found["boolq"]
    assert found["mean"]["acc_norm"] == (found["boolq"]["acc"] + found["piqa"]["acc_norm"]) / 2
