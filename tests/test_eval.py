"""Oracles for eval.py: perplexity against a plain loop over transformers, speed by hand, and the command."""

import json
import math
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from conftest import ROOT, SHARED, make_checkpoint

import eval as evaluation
from data import load_text, load_tokenizer
from data.command import InputError, run
from data.tasks import SEVEN
from dsnot import keep_mask
from eval import describe, perplexity, speed
from gpt import GPT, all_prunable
from results.compare import read_rows
from test_tasks import write_tasks


def run_eval(*arguments):
    return subprocess.run([sys.executable, str(ROOT / "eval.py"), "--device", "cpu", *map(str, arguments)],
                          capture_output=True, text=True, cwd=ROOT)


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
    memory is free and of who else takes it. A window of this model's hidden states takes 8 kB."""
    ids, model = list(range(300)) + list(range(20)), GPT.from_pretrained(checkpoint, stream=True)
    assert not blocks_read
    found = []
    # five windows: together; two, two and one; the same by one of two processes; one by one
    for free, world, times in (10**9, 1, 1), (40_000, 1, 3), (80_000, 2, 3), (0, 1, 5):
        blocks_read.clear()
        monkeypatch.setattr("data.processes.free_memory", lambda device: free)
        monkeypatch.setattr("data.processes.processes", lambda: (0, world))
        found.append(perplexity(model, ids, 64, batch=1))
        assert blocks_read == ["model.layers.0", "model.layers.1"] * times
    assert len(set(found)) == 1


def test_a_model_that_does_not_fit_is_not_loaded_whole(checkpoint, monkeypatch, tmp_path, capsys):
    """The command streams a model that is larger than memory, and refuses what would need all of it; a compressed one
    needs half."""
    (tmp_path / "text.txt").write_text("the model reads words and the words are few " * 40)
    for module in "processes", "pretrained":
        monkeypatch.setattr(f"data.{module}.free_memory", lambda device: 100_000)  # of 145,024 bytes
    monkeypatch.setattr(sys, "argv", ["eval.py", "--model", str(checkpoint), "--data", str(tmp_path / "text.txt")])
    evaluation.main()
    assert "perplexity" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--speed"])
    with pytest.raises(InputError, match="random takes 0.15 MB of memory, and 0.10 MB are free"):
        evaluation.main()
    with pytest.raises(InputError, match="no linear layer of the blocks is 2:4"):  # there was memory to look
        GPT.from_pretrained(checkpoint, sparse=True)


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


# ----------------------------------------------------------------------------------------------------- the command

def test_command(checkpoint, tmp_path):
    """One run of everything, as it is recorded."""
    tasks_dir = write_tasks(tmp_path / "tasks")
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


def test_the_command_measures_all_windows_of_a_split(model, tmp_path):
    """Would catch another text than the one that is named, and a part of it."""
    text = model / "text.txt"
    done = run_eval("--model", model / "m", "--data", text, "--split", "test", "--seqlen", 32, "--json",
                    tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "r.json").read_text())["results"]
    ids = load_tokenizer(model / "m").encode(load_text(str(text), "test"))
    expected = perplexity(GPT.from_pretrained(model / "m"), ids, 32)
    assert found["rows"][0]["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert found["tokens"] == len(ids) // 32 * 32 < len(ids)


def test_speed_of_a_model_with_few_positions(tmp_path):
    make_checkpoint(tmp_path / "m", model_type="gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=20)
    done = run_eval("--model", tmp_path / "m", "--speed", "--json", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "r.json").read_text())["results"]["rows"][0]["speed"]["prompt_tokens"] == 10


@pytest.mark.parametrize("arguments, said", [
    (["--tasks", "rhyme"], "--tasks rhyme: there is no such task"),
    (["--tasks", "piqa"], "baber/piqa is not in the cache and can't be fetched"),
    (["--tasks", "rte", "--tasks-dir", "data"], "--tasks-dir data has no data of rte"),
    (["--tasks", "rte", "--tasks-dir", "nowhere"], "--tasks-dir nowhere is no folder"),
    (["--data", "ptb"], "ptb_text_only is not in the cache and can't be fetched"),
    (["--compare", "nowhere.json"], "there is no file or folder"), (["--compare", "LICENSE"], "neither a result file"),
    (["--compare", "results/tiny"], "to compare the files that --json wrote, give results/tiny/*.json"),
    (["--plot", "a.png"], "needs --compare"), (["--seqlen", "1"], "--seqlen 1"),
    (["--limit", "3"], "they need --tasks"), (["--by-method"], "needs --compare"),
    (["--compare", "x.json", "--model", "x"], "leave out --model"),
    (["--compare", "x.json", "--speed"], "leave out --model"), (["--compare", "x.json", "--seqlen", "9"], "leave out"),
    (["--speed", "--split", "validation"], "--split validation is for perplexity"),
    (["--tasks", "--seqlen", "9"], "--seqlen 9 is for perplexity"), (["--batch", "0"], "batch 0"),
    (["--tasks", "--limit", "-1"], "limit -1"), (["--sparse"], "no linear layer of the blocks is 2:4"),
])
def test_bad_input_is_one_sentence(arguments, said, monkeypatch, capsys, tmp_path):
    """On stderr, with exit code 2 and nothing written."""
    def unreachable(*_, **__):
        raise ConnectionError

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["eval.py", *arguments, "--device=cpu", f"--json={tmp_path / 'result.json'}"])
    with pytest.raises(SystemExit) as end:
        run(evaluation.main)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and said in error, error
    assert not list(tmp_path.iterdir())


def test_a_ruined_model_has_an_infinite_perplexity(checkpoint):
    """Would catch an OverflowError in the place of a number."""
    model = GPT.from_pretrained(checkpoint)
    model.lm_head.weight.data *= 1e6
    assert perplexity(model, list(range(64)), 64) == float("inf")


def test_speed_by_hand(monkeypatch):
    """On a clock that the model sets; would catch the run that warms up or the slow second token being counted."""
    now, runs = [0.0], iter([(100, 50), (2, 0.25), (4, 0.5), (6, 1)])

    def sample(ids, many, temperature):
        prefill, decode = next(runs)
        for i in range(many):
            now[0] += prefill if i == 0 else 9 if i == 1 else decode
            yield torch.zeros(1)
    monkeypatch.setattr(evaluation, "time", Namespace(perf_counter=lambda: now[0]))
    model = Namespace(sample=sample, parameters=lambda: [torch.zeros(3)], buffers=lambda: [])
    found = speed(model, torch.zeros(1, 8), new_tokens=5)
    assert found["prefill_tokens_per_second"] == 8 / 4 and found["decode_tokens_per_second"] == 1 / 0.5


@pytest.mark.parametrize("amount, said", [(dict(sparsity=0.0), ("dense", "0%")),
                                          (dict(sparsity=0.5), ("sparse", "50%")),
                                          (dict(pattern=(2, 4)), ("sparse", "2:4")),
                                          (dict(pattern=(4, 8)), ("sparse", "50%"))])
def test_what_a_model_without_notes_is_called(checkpoint, tmp_path, amount, said):
    """Would catch a pruned model in the place of the dense one, and a mask that is not 2:4 taken for it."""
    model = GPT.from_pretrained(checkpoint)
    for layer in all_prunable(model).values():
        layer.weight.data *= keep_mask(torch.rand_like(layer.weight), **amount)
    found = describe(model, "m")
    assert (found["method"], found["amount"]) == said
    if said[1] == "2:4":  # also while it is compressed
        model.save_pretrained(tmp_path / "m")
        found = describe(GPT.from_pretrained(tmp_path / "m", sparse=True), "m")
        assert (found["method"], found["amount"]) == said


def test_what_tasks_are_given(checkpoint, monkeypatch):
    """Would catch --limit and --batch that nobody hears, tasks that nobody asked for, and bad data that are found only
    when something has been measured."""
    given = []
    monkeypatch.setattr(evaluation, "encoded_tasks", lambda tokenizer, *rest: given.append(rest) or "tasks")
    monkeypatch.setattr(evaluation, "perplexity", lambda *_, **__: given.append("perplexity") or 1.0)
    monkeypatch.setattr(evaluation, "zero_shot", lambda model, *rest: given.append(rest))
    monkeypatch.setattr(sys, "argv", ["eval.py", "--device=cpu", f"--model={checkpoint}", "--tasks", "--limit=3",
                                      "--batch=2", f"--data={__file__}"])
    evaluation.main()
    assert given == [(SEVEN, 64, None, 3), "perplexity", ("tasks", 2)]
