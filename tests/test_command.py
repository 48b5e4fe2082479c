"""What all commands share: one way to begin, to fail, to write and to record."""

import errno
import json
import os
import random
import stat
import subprocess
import sys
from argparse import Namespace

import pytest
import torch

import gpt
from conftest import ROOT
from data import command, processes
from data.command import (InputError, at_least, check_disk, parser, record, run, start, told_bytes, versions,
                          what_keeps_from_writing, write_atomically)


def given(**options):
    return Namespace(**dict(seed=0, device="cpu", json=None) | options)


def test_one_seed_is_for_everything_random():
    drawn = []
    for seed in 3, 3, 4:
        start(given(seed=seed))
        drawn.append((random.random(), torch.rand(2).tolist()))
    assert drawn[0] == drawn[1] and drawn[0][0] != drawn[2][0] and drawn[0][1] != drawn[2][1]


@pytest.mark.parametrize("options, said", [
    (dict(seed=2**63), f"--seed {2**63} must be at least 0 and below"), (dict(seed=-1), "--seed -1 must be at least 0"),
    (dict(device="mps"), "--device mps is not supported: give cpu, cuda or cuda:1"),
    (dict(device="cuda:"), "is not supported"), (dict(device="cpu:0"), "is not supported"),
    (dict(json="LICENSE/a.json"), "--json LICENSE/a.json can't be written: .*LICENSE is a file"),
    (dict(json="x" * 250), "can't be written: File name too long"),  # with what is added until the file is whole
    (dict(json="LICENSE"), "--json LICENSE exists and holds something else than the results of a run"),
    (dict(json="data/tiny/config.json"), "holds something else"), (dict(json="dsnot.py"), "holds something else"),
    (dict(json="data"), "--json data is no regular file: give another name"), (dict(json="/"), "no regular file"),
    (dict(json="."), "--json . is no regular file"),
    (dict(json="out/../new", out="new"), "--json out/../new is where --out goes: give another name")])
def test_what_every_command_refuses(monkeypatch, options, said):
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError, match=said):
        start(given(**options))


def test_what_every_command_takes(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").touch()
    record(given(json="before"), {})
    for options in (dict(seed=0), dict(seed=2**63 - 1), dict(json="new/deep/a.json"), dict(json="a", out="b"),
                    dict(json="empty"), dict(json="before")):
        start(given(**options))
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "before"}


def test_links_in_a_circle_get_a_sentence(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="loop is where --out goes"):
        start(given(json=tmp_path / "loop", out=str(tmp_path / "loop")))
    with pytest.raises(InputError, match="can't write .*loop/a: File exists"):
        write_atomically(tmp_path / "loop" / "a", lambda new: new.write_text(""))


def test_a_missing_gpu_gets_a_sentence(monkeypatch):
    """Would catch an error of PyTorch's, many lines long, and a GPU that is taken for usable before it has computed."""
    def broken(*_, **__):
        raise RuntimeError("CUDA error: no kernel image\nmore of it")
    monkeypatch.setattr(torch, "ones", broken)
    for there, usable in (False, "give cpu; this PyTorch sees no GPU"), (True, "give cpu or cuda"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
        with pytest.raises(InputError) as refused:
            start(given(device="cuda:7"))
        assert str(refused.value) == f"--device cuda:7 can't be used (CUDA error: no kernel image): {usable}"


def test_torchrun_is_for_those_that_share(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    start(given(), together=True)
    with pytest.raises(InputError, match="leave out torchrun"):
        start(given())


def test_defaults_in_the_help(monkeypatch, capsys):
    """Would catch "(default: None)", and a description that is the whole docstring."""
    p = parser("First words.\n\nThe rest of it.")
    p.add_argument("--fixed", default=0.3, help="a number")
    p.add_argument("--depends", help="a name (default: it depends)")
    with pytest.raises(SystemExit):
        p.parse_args(["--help"])
    said = capsys.readouterr().out
    assert "(default: 0.3)" in said and "None" not in said and "First words." in said and "The rest" not in said
    for words in ["--nothing"], ["--seed", "x"]:
        with pytest.raises(InputError, match="; --help tells all options$"):
            p.parse_args(words)


def test_the_lowest_value():
    args = Namespace(seqlen=2, top_k=None, limit=0, share=float("nan"))
    at_least(args, seqlen=2, top_k=1)
    with pytest.raises(InputError, match="--limit 0 must be at least 1"):
        at_least(args, limit=1)
    with pytest.raises(InputError, match="--share nan must be at least 0"):
        at_least(args, seqlen=1, share=0)
    for large in 10**400, float("inf"):
        with pytest.raises(InputError, match=r"--seqlen .* must be below 2\^62"):
            at_least(Namespace(seqlen=large), seqlen=2)


def test_bytes_in_words():
    assert [told_bytes(n) for n in (0, 150_000, 99_999_999, 10**8, 13_480_000_000, 1.5e15)] == [
        "0.00 MB", "0.15 MB", "100.00 MB", "0.1 GB", "13.5 GB", "1,500,000.0 GB"]


def test_room_on_the_disk(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(command.shutil, "disk_usage", lambda path: (asked.append(path), Namespace(free=1000))[1])
    check_disk(tmp_path / "new" / "deep", 1000, "it")
    with pytest.raises(InputError, match="^it will need 0.00 MB more and its disk has 0.00 MB free: make room or"):
        check_disk(tmp_path / "new", 1001, "it")
    assert asked == [tmp_path] * 2  # the nearest that exists


def test_a_folder_that_is_not_ours(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    assert what_keeps_from_writing(tmp_path / "new" / "a") == f"you may not write to {tmp_path}"


def test_a_replaced_file_is_noticed(tmp_path):
    path = tmp_path / "a"
    path.write_text("one")
    os.utime(path, ns=(0, 0))
    first = versions([path, tmp_path, tmp_path / "none", "tiny"])
    assert first == [["a", 3, 0]]  # neither folders nor what is no file
    os.utime(path, ns=(0, 1))
    assert versions([path]) == [["a", 3, 1]]


def test_a_file_is_whole_or_not_there(monkeypatch, tmp_path):
    """Would catch half a file, one that nobody else can read, a link that becomes a file, and leftovers."""
    real, link = tmp_path / "deep" / "real", tmp_path / "link"
    link.symlink_to("deep/real")

    def write(path):
        path.write_text("new")
        path.chmod(0o600)  # as safetensors does
        assert path.parent == real.parent and path != real
    write_atomically(link, write)
    assert link.is_symlink() and real.read_text() == "new"
    fresh = tmp_path / "fresh"
    fresh.touch()
    assert stat.S_IMODE(real.stat().st_mode) == stat.S_IMODE(fresh.stat().st_mode)

    def full(path):
        path.write_text("ha")
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(InputError, match=f"can't write {real}: No space left on device"):
        write_atomically(link, full)
    with pytest.raises(KeyError):
        write_atomically(real, lambda path: {}[path])
    with pytest.raises(InputError, match="can't write .*a.json: "):
        write_atomically(fresh / "a.json", write)
    assert [path.name for path in real.parent.iterdir()] == ["real"] and real.read_text() == "new"


def test_what_is_recorded(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["/somewhere/x.py", "--width", "3"])
    monkeypatch.setattr(command, "processor", lambda: "a CPU")
    record(given(width=3), {"a": 1})  # nowhere
    record(given(width=3, json=tmp_path / "new" / "r.json"), {"a": 1})
    entry = json.loads((tmp_path / "new" / "r.json").read_text())
    assert entry.pop("versions").keys() == {"python", "torch", "numpy", "safetensors"}
    assert entry == {"command": "x.py --width 3", "options": dict(seed=0, device="cpu", width=3), "results": {"a": 1},
                     "hardware": f"a CPU, {torch.get_num_threads()} threads"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2_500_000_000)
    record(given(device="cuda:0", json=tmp_path / "g.json"), {})
    entry = json.loads((tmp_path / "g.json").read_text())
    assert entry["hardware"] == "a GPU" and entry["peak_gpu_memory_gb"] == 2.5


@pytest.mark.parametrize("raised, code, said", [
    (InputError("a is wrong"), 2, "error: a is wrong\n"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), 2,
     "error: the GPU's memory is full (CUDA out of memory): give shorter or fewer texts at a time, or --device cpu\n"),
    (torch._dynamo.exc.BackendCompilerFailed(print, RuntimeError("why\nmore"), None), 2, "error: torch.compile has "
     "failed (RuntimeError: why): go without --compile, or with --no-compile\n"),
    (torch._inductor.exc.CppCompileError(["g++"], "a.cpp:3: fatal error: no Python.h\ncompilation terminated."), 2,
     "error: torch.compile has failed (a.cpp:3: fatal error: no Python.h): go without --compile, or with "
     "--no-compile\n"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 2,
     "error: the computer's memory is full: give shorter or fewer texts at a time\n"),
    (MemoryError(), 2, "error: the computer's memory is full: give shorter or fewer texts at a time\n"),
    (OSError(errno.EACCES, "Permission denied", "a.txt"), 2, "error: a.txt: Permission denied\n"),
    (KeyboardInterrupt(), 130, "interrupted\n")])
def test_an_end_is_one_sentence(capsys, raised, code, said):
    def main():
        raise raised
    with pytest.raises(SystemExit) as end:
        run(main)
    assert (end.value.code, capsys.readouterr().err) == (code, said)


def test_other_errors_are_shown_whole():
    """Would catch a bug of ours told as one of the user's."""
    def main():
        raise raised
    for raised in (ValueError("x"), RuntimeError("x"), OSError("x"), OSError(errno.EIO, "x")):
        with pytest.raises(type(raised), match="x"):
            run(main)


def test_the_way_on_is_told_where_there_is_one(capsys):
    def main():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as end:
        run(main, goes_on=True)
    said = "interrupted: the same command goes on from what has been saved, if anything has\n"
    assert (end.value.code, capsys.readouterr().err) == (130, said)


def test_a_process_of_many(monkeypatch, capsys):
    """Would catch each of them saying everything, or taking the first one's GPU, and a RANK that something else than
    torchrun has set."""
    made = []
    monkeypatch.setattr(processes, "start", lambda args, together: made.append((args.device, together)))
    monkeypatch.setattr(processes.dist, "init_process_group", made.append)
    monkeypatch.setattr(processes.dist, "destroy_process_group", lambda: made.append("gone"))
    torchrun = dict(RANK="1", LOCAL_RANK="3", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    for env, device, then in [({}, "cuda", "cuda"), (dict(RANK="1", WORLD_SIZE="1"), "cuda", "cuda"),
                              (torchrun, "cpu", "cpu"), (torchrun, "cuda", "cuda:3")]:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        made.clear()
        with pytest.raises(KeyError), processes.process_group(given(device=device)):
            {}["an error inside"]
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        assert made == [(then, True)] + [backend, "gone"] * (env is torchrun)
    assert processes.processes() == (0, 1)
    processes.say("first")
    monkeypatch.setattr(processes, "processes", lambda: (1, 2))
    processes.say("second")
    assert processes.progress_bar(range(3)).disable
    assert capsys.readouterr().out == "first\n"
    monkeypatch.setattr(processes.dist, "all_reduce", lambda x: x.mul_(4))
    assert processes.mean_over_processes(torch.tensor(3.0)) == 6.0


def test_a_few_damaged_inputs_and_interruptions():
    """The first trials of tests/robustness.py, one of each kind: would catch a command that it can no longer stop."""
    ended = subprocess.run([sys.executable, ROOT / "tests/robustness.py", "--trials", "21"], capture_output=True,
                           text=True)
    assert ended.returncode == 0 and "21 trials, 0 defects" in ended.stdout, ended.stdout + ended.stderr


def test_letters_that_the_terminal_lacks_are_replaced():
    """Would catch a traceback in the middle of a text."""
    words = [sys.executable, "gpt.py", "--max-new-tokens", "1", "--prompt", "Zoë"]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert done.returncode == 0 and b"Zo?" in done.stdout, done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a file that is always full")
def test_a_full_disk_below_the_output_gets_a_sentence():
    with open("/dev/full", "w") as full:
        words = [sys.executable, "gpt.py", "--max-new-tokens", "1"]
        done = subprocess.run(words, cwd=ROOT, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2 and done.stderr == b"error: the output: No space left on device\n"


def test_json_is_a_file(monkeypatch, tmp_path):
    """Would catch a device that a result replaces, which root may do, and a link that becomes a file."""
    words = ["gpt.py", "--device=cpu", "--max-new-tokens=1", "--json"]
    for name, said in ("/dev/null", "--json /dev/null is no regular file"), (tmp_path, "is no regular file"):
        monkeypatch.setattr(sys, "argv", [*words, str(name)])
        with pytest.raises(InputError, match=said):
            gpt.main()
    with pytest.raises(InputError, match="is where --out goes"):
        start(Namespace(seed=0, device="cpu", json=f"{tmp_path}/x/../out", out=str(tmp_path / "out")))
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    monkeypatch.setattr(sys, "argv", [*words, str(tmp_path / "link.json")])
    gpt.main()
    assert (tmp_path / "link.json").is_symlink() and json.loads((tmp_path / "real.json").read_text())["results"]


def test_a_log_tells_where_a_long_run_is(monkeypatch, capsys):
    """Would catch a run of days whose log says nothing, because a bar needs a terminal, and a short one that chatters.
    """
    for seconds, said in (0, ["pruning:  33%", "pruning:  67%"]), (60, []):
        monkeypatch.setattr(processes, "QUIET", seconds)
        assert list(processes.progress_bar(range(3), desc="pruning")) == [0, 1, 2]
        lines = capsys.readouterr().err.splitlines()
        assert all(any(line.startswith(start) for line in lines) for start in said) and bool(lines) == bool(said)
