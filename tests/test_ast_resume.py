"""The training loop of AST against being stopped, killed and begun again."""

# ruff: noqa: F811 (fixtures that test_ast_train.py has)

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file
from torch.distributed.checkpoint import filesystem

import ast_loop
import ast_train
import dsnot
import sparse_matmul
from ast_method import learning_rate
from conftest import ROOT
from data.command import InputError
from data.state import check_room
from data.train_tiny import train_tokenizer
from data.writer import alone_in
from gpt import GPT
from test_ast_train import CONFIG, command, files, train  # noqa: F401


@pytest.fixture
def stopped(monkeypatch):
    """Inside stopped(step), training is interrupted at that step."""
    @contextmanager
    def context(at):
        def killed(step, *schedule):
            if step == at:
                raise KeyboardInterrupt
            return learning_rate(step, *schedule)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(ast_loop, "learning_rate", killed)
            yield
    return context


def test_a_stopped_run_ends_with_the_same_weights(tmp_path, train, stopped, files):
    straight = train(tmp_path / "straight", "--methods", "ast-slorb", "--slorb-k", 8)
    with stopped(7):  # after the state of step 6
        train(tmp_path / "stopped", "--methods", "ast-slorb", "--slorb-k", 8)
    work = tmp_path / "stopped" / "ast-slorb.training"
    assert [path.name for path in work.iterdir()] == ["step-0000006"]
    (work / "step-0000009.partial").mkdir()  # what is left of a state that was being written
    resumed = train(tmp_path / "stopped", "--methods", "ast-slorb", "--slorb-k", 8)
    expected, found = (load_file(tmp_path / run / "ast-slorb" / "model.safetensors") for run in ("straight", "stopped"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    for key in ("validation", "history", "flips"):
        assert resumed["runs"]["ast-slorb"][key] == straight["runs"]["ast-slorb"][key]

    for name, value, message in [("--lr", 0.1, "with --lr 0.003, not 0.1"),
                                 ("--model", files / "other", "another model")]:
        with pytest.raises(InputError, match=message):
            train(tmp_path / "stopped", "--methods", "ast-slorb", "--slorb-k", 8, name, value)
    os.utime(files / "text.txt")  # as if it had been edited
    with pytest.raises(InputError, match="holds a run of other texts: give the options it had"):
        train(tmp_path / "stopped", "--methods", "ast-slorb", "--slorb-k", 8)
    assert [path.name for path in work.rglob("*")] == ["step-0000012", "run.json"]  # what a finished run needs


def test_a_model_that_is_not_the_runs_own_is_not_measured(tmp_path, train, files, monkeypatch):
    """Would catch another command's model reported as AST's, and one that replaces hours of training."""
    first = train(tmp_path, "--steps", 3)
    assert train(tmp_path, "--steps", 3, "--slorb-k", 8)["table"] == first["table"]  # which this model has no use for
    for main, options in (dsnot.main, ["--calib", files / "text.txt", "--data", files / "text.txt", "--seqlen", 32]), (
            sparse_matmul.main, []):
        argv = ["command.py", "--model", files / "model", "--out", tmp_path / "ast", *options]
        monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
        with pytest.raises(InputError, match="holds a model that ast_train.py has made"):
            main()
    for mark, words in [("null", "ast holds a model that another command has made"),
                        ('{"command": "ast_train.py"}', "ast is not the model that the training in .* has saved"),
                        (None, "ast is not the model that the training in .* has saved")]:
        (tmp_path / "ast" / "run.json").write_text(mark) if mark else shutil.rmtree(tmp_path / "ast")
        with pytest.raises(InputError, match=words):
            train(tmp_path, "--steps", 3)
    shutil.rmtree(tmp_path / "ast.training")
    assert train(tmp_path, "--steps", 3)["table"] == first["table"]


def test_a_model_of_another_training_is_not_replaced(tmp_path, train, capsys):
    for _ in range(2):
        train(tmp_path, "--steps", 3)
        shutil.rmtree(tmp_path / "ast.training")
    assert "note" not in capsys.readouterr().out
    with pytest.raises(InputError, match="ast holds a model of another training: choose another --out, or delete it"):
        train(tmp_path, "--steps", 4)
    train(tmp_path / "again", "--model", tmp_path / "ast", "--steps", 1)
    assert "has been pruned before" in capsys.readouterr().out


def test_what_a_run_stopped_while_measuring_leaves_stops_nobody(tmp_path, train, monkeypatch):
    """Would catch a training that ends with an error because of a mask that another one has left, and a folder of the
    user's that is taken for one."""
    def killed(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ast_train, "perplexity", lambda *_, **__: 1.0 if not list(tmp_path.glob("one*")) else killed())
        train(tmp_path, "--one-shot", "--steps", 1)
    shutil.copytree(tmp_path / "one-shot-magnitude", tmp_path / "one-shot-wanda.partial")

    def killed_in_the_middle(folder, **_):
        if folder.exists():
            (folder / "run.json").unlink()
            killed()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed_in_the_middle)
        train(tmp_path, "--one-shot", "--steps", 1)
    found = train(tmp_path, "--one-shot", "--steps", 1, "--methods", "dense", "--seed", 1)
    assert "one-shot magnitude" in found["table"]
    assert not list(tmp_path.glob("one*"))
    (tmp_path / "one-shot-wanda").mkdir()
    (tmp_path / "one-shot-wanda" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="one-shot-wanda exists and is no model that was written here"):
        train(tmp_path, "--one-shot", "--steps", 1, "--methods", "dense", "--seed", 1)
    assert (tmp_path / "one-shot-wanda" / "mine.txt").is_file()


def test_a_run_killed_between_its_first_model_and_its_first_state_begins_anew(tmp_path, train, monkeypatch):
    """Would catch an output folder that is taken for somebody else's because it holds a model and no state yet."""
    def killed(*_, **__):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ast_loop, "save_state", killed)
        train(tmp_path, "--steps", 3)
    assert [path.name for path in tmp_path.iterdir()] == ["ast"]
    shutil.rmtree(tmp_path / "ast")
    (tmp_path / "ast.partial").mkdir()
    (tmp_path / "ast.partial" / ".run.json.1.partial").touch()  # by a kill while the folder is begun
    assert train(tmp_path, "--steps", 3)["runs"]["ast"]["step"] == 3


def test_another_tokenizer_is_noticed(files, tmp_path, train):
    """Would catch a training that goes on with other tokens."""
    shutil.copytree(files / "model", tmp_path / "model")
    train(tmp_path / "out", "--model", tmp_path / "model", "--steps", 3)
    text = (files / "text.txt").read_text()[50000:]
    train_tokenizer(tmp_path / "model" / "tokenizer.model", text, CONFIG["vocab_size"])
    with pytest.raises(InputError, match="ast.training holds a run of another model or tokenizer"):
        train(tmp_path / "out", "--model", tmp_path / "model", "--steps", 3)


def test_a_full_disk_is_told_and_leaves_the_state_before(tmp_path, train, monkeypatch):
    usage = type(shutil.disk_usage(tmp_path))
    with monkeypatch.context() as patch, pytest.raises(InputError, match="0.10 MB free: make room"):
        patch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 10**5, 10**5))
        train(tmp_path / "small")
    assert not (tmp_path / "small").exists()
    write = filesystem._write_item

    def ends_with(error):
        def failing(*args, **options):
            if any((tmp_path / "out" / "ast.training").glob("step-0000003")):
                raise error
            return write(*args, **options)
        return failing

    for error, expected, words in ((OSError(28, "No space left on device"), InputError, "of step 6 .* before is kept"),
                                   (KeyboardInterrupt(), KeyboardInterrupt, None)):
        with monkeypatch.context() as patch, pytest.raises(expected, match=words):
            patch.setattr(filesystem, "_write_item", ends_with(error))
            train(tmp_path / "out")
        assert [path.name for path in (tmp_path / "out" / "ast.training").iterdir()] == ["step-0000003"]
    assert train(tmp_path / "out")["runs"]["ast"]["step"] == 12


def test_room_is_not_asked_for_twice(tmp_path, monkeypatch):
    """Would catch a run that fits when it begins and is refused when it goes on."""
    model, numbers, usage = nn.Linear(30, 10), 310, type(shutil.disk_usage(tmp_path))
    state, size = 3 * 4 * numbers, 4 * numbers
    for name, content in ("m.training/step-1/0.distcp", state), ("m/model.safetensors", size):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(bytes(content))
    for free in state + size, state + size - 1:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - free, free))
        with nullcontext() if free == state + size else pytest.raises(InputError, match="make room"):
            check_room(tmp_path / "m.training", model, {}, tmp_path / "m", size)


def test_room_is_asked_for_what_is_saved(files, tmp_path, monkeypatch, train):
    """Would catch a disk that has room for a dense model and not for one with SLoRB."""
    asked = []
    monkeypatch.setattr(ast_loop, "check_room", lambda *found: asked.append(found[-1]))
    train(tmp_path, "--methods", "ast-slorb", "--slorb-k", 8, "--steps", 1)
    saved = sum(x.nbytes for x in load_file(tmp_path / "ast-slorb" / "model.safetensors").values())
    assert asked == [saved] and saved > sum(x.nbytes for x in load_file(files / "model" / "model.safetensors").values())


def test_one_run_at_a_time_writes_a_folder(tmp_path, train):
    with alone_in(tmp_path / "out"), pytest.raises(InputError, match="another run is writing to"):
        train(tmp_path / "out")


def test_a_finished_training_is_found_again(tmp_path, train):
    """Would catch swaps that are made before another start is refused, and the state before, which a run that was
    killed while it removed it has left."""
    options = "--steps", 2, "--save-every", 1
    train(tmp_path, *options)
    with pytest.raises(InputError, match="holds a run with --start-from dense, not swap"):
        train(tmp_path, *options, "--start-from", "swap")
    assert not (tmp_path / "start").exists()
    (tmp_path / "ast.training" / "step-0000001").mkdir()
    train(tmp_path, *options)
    assert [path.name for path in (tmp_path / "ast.training").iterdir()] == ["step-0000002"]


def test_methods_side_by_side_end_together(files, tmp_path):
    """Would catch processes that wait for each other for ever after Ctrl-C, which reaches all of them."""
    words = command(files, tmp_path, "--methods", "ast", "dense", "--steps", 10000)
    env = os.environ | {"OMP_NUM_THREADS": "2"}
    begun = subprocess.Popen([sys.executable, ROOT / words[0], *words[1:]], env=env, text=True, start_new_session=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE,  # a shell's background jobs ignore SIGINT
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    seen = set()
    while not seen >= {"ast", "dense"}:  # both are training
        line = begun.stdout.readline()
        assert line, begun.stderr.read()
        seen.add(line.split(" step ")[0])
    os.killpg(begun.pid, signal.SIGINT)
    _, said = begun.communicate(timeout=60)
    assert begun.returncode == 130 and said.startswith("interrupted: the same command goes on"), said
    assert len(said.splitlines()) == 1, said


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_methods_side_by_side_end_with_the_one_that_began_them(tmp_path):
    """Would catch processes that train on after theirs was killed, where the next run of the command waits for them."""
    (tmp_path / "begin.py").write_text(f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from data.processes import side_by_side
def work(name):
    print(os.getpid(), flush=True)
    time.sleep(300)
if __name__ == "__main__":
    list(side_by_side(work, ["a", "b"], 1))
""")
    begun = subprocess.Popen([sys.executable, tmp_path / "begin.py"], stdout=subprocess.PIPE, text=True)
    workers = [int(begun.stdout.readline()) for _ in "ab"]
    begun.kill()
    begun.wait()
    end = time.monotonic() + 30
    while left := [pid for pid in workers if running(pid)]:
        if time.monotonic() > end:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            raise AssertionError("they go on")
        time.sleep(0.1)


def running(pid):
    """Whether a process is there and no zombie, which nobody may collect in a container."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_state(tmp_path, train, monkeypatch):
    """Would catch a learning rate that is blamed for the model's own NaN."""
    monkeypatch.setattr(ast_loop, "backward", lambda *_: torch.tensor(math.nan))
    with pytest.raises(InputError, match="the loss is nan.* at step 0: give another model"):
        train(tmp_path / "ruined")
    monkeypatch.undo()

    def broken(step, *rest):
        return math.nan if step == 4 else learning_rate(step, *rest)  # spoils the weights before step 5
    monkeypatch.setattr(ast_loop, "learning_rate", broken)
    with pytest.raises(InputError, match="the loss is nan.* at step 5: lower --lr .* the state of step 3 is kept"):
        train(tmp_path)
    assert (tmp_path / "ast.training" / "step-0000003").is_dir() and (tmp_path / "ast" / "model.safetensors").is_file()


@pytest.mark.parametrize("file, content", [("run.json", None), ("run.json", b"null"), ("run.json", b'{"step": 3}'),
                                           ("__0_0.distcp", None), (".metadata", None)])
def test_a_damaged_state_gets_a_sentence(tmp_path, train, stopped, caplog, file, content):
    """Would catch a traceback, raised or logged by PyTorch, from a file that is cut off (None) or holds something else.
    """
    with stopped(4):
        train(tmp_path)
    state = tmp_path / "ast.training" / "step-0000003"
    (state / file).write_bytes((state / file).read_bytes()[:20] if content is None else content)
    with pytest.raises(InputError, match="step-0000003 is damaged: delete it"):
        train(tmp_path)
    assert not [record for record in caplog.records if record.name == "root"], "it would be printed"


def test_a_finished_training_asks_for_no_teacher(tmp_path, train, monkeypatch, capsys):
    """And where the models are is said in the end."""
    train(tmp_path, "--steps", 2)
    loaded, load = [], GPT.from_pretrained
    monkeypatch.setattr(GPT, "from_pretrained", lambda *place, **options: (loaded.append(place),
                                                                            load(*place, **options))[1])
    monkeypatch.setattr(ast_train, "measure", lambda *_: {})
    train(tmp_path, "--steps", 2)
    assert len(loaded) == 1 and f"saved {tmp_path / 'ast'}, {tmp_path / 'curve.png'}" in capsys.readouterr().out
