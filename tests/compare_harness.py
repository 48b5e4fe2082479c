"""Compare data/tasks.py and eval.py with EleutherAI's lm-evaluation-harness, example by example, on a few local rows.

    pip install "lm-eval[hf]==0.4.13"                                  (by hand: nothing else here needs it)
    python tests/compare_harness.py --json results/harness.json        (the model that ships; or --model FOLDER)

The harness runs its own task definitions, on transformers' model and tokenizer; only the rows are ours. Prompts,
tokens, where they are cut, log-likelihoods, accuracies and standard errors have to be the same.
"""

import sys
import tempfile
from pathlib import Path

import torch
from test_tasks import ROWS, STORY, write_tasks

from data import load_tokenizer
from data.command import InputError, parser, record, run, start
from data.hub import model_folder
from data.tasks import TASKS, encode_pair, load_task
from eval import accuracy, log_likelihoods
from gpt import GPT

try:
    from lm_eval.api.metrics import mean_stderr
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml
    missing = None
except ImportError as e:
    missing = e


def harness_task(manager, name, folder):
    """The harness's own definition of a task, reading our rows."""
    if name == "mmlu":
        files, task = {"test": "mmlu/test.jsonl", "dev": "mmlu/dev.jsonl"}, "mmlu_high_school_biology"
        other = dict(num_fewshot=5, description="The following are multiple choice questions (with answers) about "
                                                "high school reading.\n\n")  # the rows' subject, not biology
    else:
        files, task, other = {TASKS[name].split: f"{name}.jsonl"}, name, {}
        other |= dict.fromkeys({"training_split", "validation_split", "test_split"} - {f"{TASKS[name].split}_split"})
    files = {split: str(folder / file) for split, file in files.items()}
    config = load_yaml(manager.task_index[task].yaml_path, resolve_func=True) | other
    config.pop("tag", None)
    config |= dict(dataset_path="json", dataset_name=None, dataset_kwargs=dict(data_files=files))
    return ConfigurableTask(config=config)


def main():
    p = parser(__doc__)
    p.add_argument("--model", default="tiny", help="a preset, a Hub id or a folder")
    args = p.parse_args()
    start(args)
    if missing:
        raise InputError(f'the harness is not installed ({missing}): pip install "lm-eval[hf]==0.4.13"')
    folder, manager = model_folder(args.model), TaskManager()
    model, tokenizer = GPT.from_pretrained(folder), load_tokenizer(folder)
    theirs = HFLM(str(folder), device="cpu", dtype="float32", batch_size=4)
    assert model.config.context_length == theirs.max_length
    tasks = {}
    ROWS["boolq"].append(dict(passage=STORY * 40, question="is this too long", label=0, idx=3))  # has to be cut
    with tempfile.TemporaryDirectory() as temporary:
        data = write_tasks(Path(temporary) / "tasks")
        for name in ROWS:
            examples = load_task(name, data)
            pairs = [encode_pair(tokenizer, *pair) for example in examples for pair in example.pairs]
            scores = log_likelihoods(model, pairs, model.config.context_length)
            task = harness_task(manager, name, data)
            task.build_all_requests(limit=None)
            assert [i.args for i in task.instances] == [pair for example in examples for pair in example.pairs], name
            answers = theirs.loglikelihood(task.instances, disable_tqdm=True)
            difference = (torch.tensor(scores) - torch.tensor([answer[0] for answer in answers])).abs().max().item()
            expected = {}
            for example, row in zip(examples, task.eval_docs):
                own, answers = answers[:len(example.pairs)], answers[len(example.pairs):]
                for metric, hit in task.process_results(row, own).items():
                    expected.setdefault(metric, []).append(float(hit))
            found = accuracy(examples, scores, TASKS[name].normalise)
            for metric, hits in expected.items():
                assert abs(found[metric] - sum(hits) / len(hits)) < 1e-12, (name, metric)
                assert abs(found[f"{metric}_stderr"] - mean_stderr(hits)) < 1e-12, (name, metric)
            assert expected.keys() == {m for m in found if m in ("acc", "acc_norm")}, (name, list(expected))
            cut = sum(len(a) + len(b) > model.config.context_length + 1 for a, b in pairs)
            print(f"{name:<14} {len(pairs):3} pairs, {cut:2} cut from the left: prompts and accuracies are equal, "
                  f"log-likelihoods differ by {difference:.1e} at most")
            tasks[name] = {"pairs": len(pairs), "cut_from_the_left": cut, "largest_difference": difference}
    record(args, {"tasks": tasks})
    worst = max(task["largest_difference"] for task in tasks.values())
    print(f"{len(tasks)} tasks, the largest difference of a log-likelihood is {worst:.1e}")
    sys.exit(f"log-likelihoods differ by {worst}" if not worst <= 1e-4 else 0)  # NaN, too


if __name__ == "__main__":
    run(main)
