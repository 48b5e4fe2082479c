"""Zero-shot tasks: multiple-choice questions as pairs of a context and a continuation, in the words of the community's
harness (EleutherAI lm-evaluation-harness 0.4): `load_task` for every task, `encode_pair` for the token ids of a pair.

Every choice of a question is one pair; the model answers with the choice whose continuation is the most likely one.
A continuation is a space and the choice. In WinoGrande it is the rest of the sentence, and the contexts differ.
Data come from the Hub (files, no scripts), or from a local folder with the same columns, which are those that the
functions below read:

    TASKS_DIR/boolq.jsonl                        one file a task: .jsonl, .json (lines, too) or .parquet
    TASKS_DIR/mmlu/dev.jsonl, test.jsonl         or a folder a task, with files that begin with the name of the split
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from data.command import InputError
from data.text import hub_rows
from data.tokenizer import encode_open


@dataclass
class Example:
    """One question: pairs [(context, continuation)], a pair per choice; gold: the index of the right one; lengths: of
    the choices in characters, by which a log-likelihood is normalised; group: of questions, whose variances are
    pooled."""
    pairs: list
    gold: int
    lengths: list
    group: str = ""


@dataclass
class Task:
    """path, name, split: where the Hub has it; question: a row -> (context or contexts, choices, index of the right
    one); normalise: whether the harness also reports accuracy by log-likelihood per character; shots: how many solved
    examples come first."""
    path: str
    name: str | None
    split: str
    question: Callable[[dict], tuple]
    normalise: bool = False
    shots: int = 0


def listed(choices):
    """The choices of a row; TypeError where they are no list: a text would be taken letter by letter."""
    if not isinstance(choices, list):
        raise TypeError(f"{choices!r} is no list")
    return choices


def boolq(row):
    context = row["passage"] + "\nQuestion: " + row["question"]
    return context + "?\nAnswer:", ["no", "yes"], row["label"]


def rte(row):
    context = row["sentence1"] + "\nQuestion: " + row["sentence2"]
    return context + " True or False?\nAnswer:", ["True", "False"], row["label"]


def hellaswag(row):
    def clean(text):  # WikiHow's markup
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
    context = row["activity_label"] + ": " + row["ctx_a"] + " " + row["ctx_b"].capitalize()
    return clean(context), [clean(ending) for ending in listed(row["endings"])], int(row["label"])


def winogrande(row):
    before, after = row["sentence"].split("_", 1)
    return [before + row[option] for option in ("option1", "option2")], [after.strip()] * 2, int(row["answer"]) - 1


def arc(row):
    context, choices = "Question: " + row["question"] + "\nAnswer:", row["choices"]
    return context, listed(choices["text"]), choices["label"].index(row["answerKey"])


def openbookqa(row):
    choices = row["choices"]
    return row["question_stem"], listed(choices["text"]), choices["label"].index(row["answerKey"].lstrip())


def piqa(row):
    return "Question: " + row["goal"] + "\nAnswer:", [row["sol1"], row["sol2"]], row["label"]


def mmlu(row):
    lines = [f"\n{letter}. " + choice for letter, choice in zip("ABCD", listed(row["choices"]), strict=True)]
    return row["question"].strip() + "".join(lines) + "\nAnswer:", list("ABCD"), row["answer"]


TASKS = {
    "boolq": Task("aps/super_glue", "boolq", "validation", boolq),
    "rte": Task("nyu-mll/glue", "rte", "validation", rte),
    "hellaswag": Task("Rowan/hellaswag", None, "validation", hellaswag, normalise=True),
    "winogrande": Task("allenai/winogrande", "winogrande_xl", "validation", winogrande),
    "arc_easy": Task("allenai/ai2_arc", "ARC-Easy", "test", arc, normalise=True),
    "arc_challenge": Task("allenai/ai2_arc", "ARC-Challenge", "test", arc, normalise=True),
    "openbookqa": Task("allenai/openbookqa", "main", "test", openbookqa, normalise=True),
    "piqa": Task("baber/piqa", None, "validation", piqa, normalise=True),
    "mmlu": Task("cais/mmlu", "all", "test", mmlu, shots=5),
}
SEVEN = list(TASKS)[:7]  # those of the pruning papers


def read_file(path):
    """The rows of a .parquet file or of JSON lines."""
    try:
        if path.suffix == ".parquet":
            from pyarrow import ArrowException, parquet
            try:
                rows = parquet.read_table(path).to_pylist()
            except ArrowException as e:
                raise ValueError(str(e).split("\n")[0]) from None
        else:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, ValueError, RecursionError) as e:
        kind = "parquet" if path.suffix == ".parquet" else "JSON lines"
        raise InputError(f"{path} can't be read as {kind}: {e}") from None
    if not rows:
        raise InputError(f"{path} is empty")
    return rows


def read_split(name, split, folder):
    """The rows of one split of a task, and where they are from."""
    task = TASKS[name]
    if folder is None:
        instead = f"--tasks-dir FOLDER with {name}.jsonl or {name}/ in it, and so for each task"
        return list(hub_rows(task.path, task.name, split, instead=instead)), task.path
    kinds = (".jsonl", ".json", ".parquet")
    inside = sorted(path for path in (Path(folder) / name).rglob(f"{split}*") if path.suffix in kinds)
    alone = [path for path in (Path(folder) / f"{name}{kind}" for kind in kinds) if path.is_file()]
    files = alone if alone and split == task.split else inside
    if not files:
        raise InputError(f"--tasks-dir {folder} has no data of {name}: neither {name}/{split}*.jsonl nor .parquet"
                         + f", nor {name}.jsonl or .parquet" * (split == task.split))
    if len({path.suffix for path in files}) > 1:  # most likely the same rows
        raise InputError(f"--tasks-dir {folder} has {split} data of {name} in {' and in '.join(map(str, files[:3]))}: "
                         f"leave in one of them")
    if len(places := sorted({str(path.parent) for path in files})) > 1:  # a snapshot of the Hub has all configurations
        raise InputError(f"--tasks-dir {folder} has {split} data of {name} in {' and in '.join(places[:3])}: leave in "
                         f"{Path(folder) / name} that of {task.name or 'one'} alone")
    return [row for path in files for row in read_file(path)], files[0] if len(files) == 1 else Path(folder) / name


def asked(name, row, i, source):
    """A row's (contexts, choices, index of the right one, subject), checked: "" where a task has no subjects. Raises
    InputError where it has another schema."""
    try:
        contexts, choices, gold = TASKS[name].question(row)
        contexts = contexts if isinstance(contexts, list) else [contexts] * len(choices)
        subject = row["subject"] if TASKS[name].shots else ""
        if not all(isinstance(text, str) for text in [*contexts, *choices, subject]):
            raise ValueError("a text is missing")
        if gold not in range(len(choices)):
            raise ValueError(f"the answer {gold!r} is none of {len(choices)} choices")
        contexts, choices, [subject] = ([text.encode(errors="replace").decode() for text in texts]
                                        for texts in (contexts, choices, [subject]))  # half a surrogate is no text
        return contexts, choices, gold, subject
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as e:
        reason = f"the column {e} is missing" if isinstance(e, KeyError) else str(e)
        raise InputError(f"{source}: row {i + 1} does not have the schema of {name} ({reason})") from None


def load_task(name, folder=None, limit=None):
    """The Examples of a task, from the Hub or from a folder; limit: only so many first ones (of each subject in MMLU).
    Raises InputError for an unknown task, missing data or another schema."""
    if name not in TASKS:
        raise InputError(f"no task {name!r}: there are {', '.join(TASKS)}")
    task = TASKS[name]
    rows, source = read_split(name, task.split, folder)
    solved = {}  # {group: what stands before each of its questions}
    if task.shots:
        dev, solved_in = read_split(name, "dev", folder)
        for i, row in enumerate(dev):
            contexts, choices, gold, subject = asked(name, row, i, solved_in)
            solved.setdefault(subject, []).append(f"{contexts[0]} {choices[gold]}\n\n")
    examples, seen, before = [], {}, ""
    for i, row in enumerate(rows):
        contexts, choices, gold, subject = asked(name, row, i, source)
        seen[subject] = seen.get(subject, 0) + 1
        if limit is not None and seen[subject] > limit:
            continue
        if task.shots:
            if len(solved.get(subject, [])) < task.shots:
                raise InputError(f"{source}: {name} needs {task.shots} solved examples of {subject!r} in its split dev")
            before = "".join([f"The following are multiple choice questions (with answers) about "
                              f"{subject.replace('_', ' ')}.\n\n", *solved[subject][:task.shots]])
        pairs = [(before + context, " " + choice) for context, choice in zip(contexts, choices)]
        examples.append(Example(pairs, gold, [len(choice) for choice in choices], subject))
    return examples


def encode_pair(tokenizer, context, continuation):
    """The ids of a context and of what continues it. Spaces at the context's end belong to the continuation, and the
    two are cut where the context alone would end: a token that reaches across counts as the continuation's."""
    text = context.rstrip()
    before, whole = encode_open(tokenizer, text), encode_open(tokenizer, context + continuation)
    if not text or len(whole) <= len(before):
        raise InputError(f"the context {context[-40:]!r} or its continuation {continuation!r} has no tokens")
    return before, whole[len(before):]
