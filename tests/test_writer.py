"""Folders that are written: whole or not at all, by one run at a time, and in nobody else's place."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT, make_checkpoint
from data.command import InputError
from data.writer import CheckpointWriter, alone_in, pruned_here, shard
from gpt import GPT


def test_folders_of_others_beside_a_checkpoint_are_left_alone(tmp_path):
    """Would catch a folder of the user's that has a name which we might use for a moment."""
    make_checkpoint(tmp_path / "source")
    for name in "out.before", "out.partial":
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    model = GPT.from_pretrained(tmp_path / "source")
    with pytest.raises(InputError, match="out.partial is no unfinished run of this program"):
        model.save_pretrained(tmp_path / "out")
    (tmp_path / "out.partial").rename(tmp_path / "elsewhere")
    for _ in range(2):
        model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out.before" / "mine.txt").is_file() and (tmp_path / "elsewhere" / "mine.txt").is_file()


def test_a_finished_checkpoint_takes_the_place_of_the_one_before(tmp_path_factory, tmp_path, monkeypatch):
    """Would catch a moment at which a kill costs the old checkpoint or the finished new one; and a folder behind a
    link."""
    source = tmp_path_factory.mktemp("source")
    make_checkpoint(source)
    model = GPT.from_pretrained(source)
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")

    def write():
        with CheckpointWriter(tmp_path / "link", model.config.raw, source, made={"run": 1}) as out:
            if not out.done("model.safetensors"):
                out.write("model.safetensors", model.state_dict())

    for kills in range(3):
        calls, rename = [], Path.rename

        def killed(path, to):
            calls.append(path)
            if len(calls) > kills:
                raise KeyboardInterrupt
            return rename(path, to)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", killed)
            if kills < 2:
                with pytest.raises(KeyboardInterrupt):
                    write()
                assert (tmp_path / "disk.partial" / "model.safetensors").is_file()
        write()
        assert GPT.from_pretrained(tmp_path / "link") and sorted(p.name for p in tmp_path.iterdir()) == ["disk", "link"]
        assert (tmp_path / "link").is_symlink()
    (tmp_path / "disk" / "run.json").unlink()  # as in a model that came from elsewhere
    with pytest.raises(InputError, match="no model that was written here"):
        write()


def test_two_runs_do_not_write_one_folder(tmp_path):
    """Would catch a second run whose few last files take the place of the first one's finished model."""
    def writer():
        return CheckpointWriter(tmp_path / "m", {"model_type": "llama"}, made={"a": 1})
    with writer() as first:
        first.write("model.safetensors", {"w": torch.ones(3)})
        with pytest.raises(InputError, match="another run is writing"), writer():
            pass
    assert load_file(tmp_path / "m" / "model.safetensors")["w"].sum() == 3
    with writer():  # nobody holds it any more
        pass


def test_a_lock_is_one_on_the_folder_that_is_there(tmp_path, monkeypatch):
    """Would catch a folder that its owner moves away between being opened and locked: two runs would hold the next."""
    def moved(handle, how):
        (tmp_path / "m").rename(tmp_path / "finished")
    monkeypatch.setattr(fcntl, "flock", moved)
    (tmp_path / "m").mkdir()
    with pytest.raises(InputError, match="another run has just finished with"), alone_in(tmp_path / "m"):
        pass


def test_a_disk_that_is_full_at_the_end_gets_its_room_back(tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "source")
    model = GPT.from_pretrained(tmp_path / "source")

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(InputError, match="No space left"):
        model.save_pretrained(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_killed_run_leaves_nothing_in_the_finished_folder(tmp_path):
    """Would catch the half of a file that was being written, and a model that lies aside for a moment and is lost."""
    killed = """if True:
        import os, sys, torch
        from data import writer
        from data.writer import CheckpointWriter
        with CheckpointWriter(sys.argv[1], {"model_type": "llama"}, made={}) as out:
            out.write("model-00001-of-00002.safetensors", {"a": torch.ones(3)})
            writer.save_file = lambda *_, **__: os._exit(9)
            out.write("model-00002-of-00002.safetensors", {"b": torch.ones(3)})
    """
    folder, aside = tmp_path / "m", tmp_path / ".m.before"
    assert subprocess.run([sys.executable, "-c", killed, folder], cwd=ROOT).returncode == 9
    with CheckpointWriter(folder, {"model_type": "llama"}, made={}) as out:
        assert out.done("model-00001-of-00002.safetensors")
        out.write("model-00002-of-00002.safetensors", {"b": torch.ones(3)})
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json", "run.json"]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * 3 * 4
    folder.rename(aside)  # as a run does that is killed before its next line
    CheckpointWriter(folder, {"model_type": "llama"})
    assert folder.is_dir() and not aside.exists()


def test_others_may_read_what_is_written(folder, tmp_path):
    """Would catch weights that only their owner may read, which is what safetensors makes of them by itself."""
    before = os.umask(0o022)
    GPT.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "copy").iterdir()} == {0o644}


def test_nothing_half_written(folder, monkeypatch):
    """A full disk while saving: one sentence, and neither a folder nor a rest of one."""
    model = GPT.from_pretrained(folder)

    def full(*_, **__):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("data.writer.save_file", full)
    with pytest.raises(InputError, match="No space left"):
        model.save_pretrained(folder.with_name("b"))
    assert [p.name for p in folder.parent.iterdir()] == ["model"]
    with pytest.raises(InputError, match="choose another"):
        model.save_pretrained(folder)


@pytest.mark.parametrize("files", [5, [1], [[]], [["a", 1, 2]], {}])
def test_a_run_json_of_another_kind_gets_a_sentence(tmp_path, files):
    """Would catch a traceback where a refusal looks for the files that have changed."""
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "run.json").write_text(json.dumps({"command": "x", "files": files}))
    with pytest.raises(InputError, match=r"differs in files \(.*b\)"):
        CheckpointWriter(tmp_path / "there", {"model_type": "llama"}, made={"command": "x", "files": [["b", 1, 2]]})


def test_what_is_done_is_known_of_many_blocks(tmp_path):
    """Would catch records of block 10 that are taken for those of block 1, blocks that are noted and not written, and
    room that is asked for what is there already."""
    with suppress(KeyboardInterrupt), CheckpointWriter(tmp_path / "m", {"model_type": "llama"}, made={"a": 1}) as out:
        for i in 1, 10, 11:
            out.write(shard(i, 12), {"w": torch.ones(100)})
        out.note(layers=[{"layer": f"model.layers.{i}.up"} for i in (1, 2, 10)], seconds=7)
        raise KeyboardInterrupt
    out = CheckpointWriter(tmp_path / "m", {"model_type": "llama"}, made={"a": 1})
    assert out.progress(12) == ({i: [{"layer": f"model.layers.{i}.up"}] for i in (1, 10)}, 7)
    assert 10_000 - 3 * 600 < out.missing(10_000) < 10_000 - 3 * 400


def test_a_run_that_does_not_go_on_begins_anew(tmp_path, monkeypatch):
    """Would catch what it has left refused as another run's, also when it was killed while that was thrown away, or a
    block of it in the finished folder."""
    def writer(number):
        return CheckpointWriter(tmp_path / "m", {"model_type": "llama"}, made={"command": "x", "a": number},
                                goes_on=False)
    removed, remove = [], Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path, **how: removed.append(path.name) or remove(path, **how))
    for number in 1, 2:
        with writer(number) as out:  # killed, as it were
            out.write("model-00001-of-00002.safetensors", {"w": torch.ones(3)})
            (tmp_path / "kept").mkdir(exist_ok=True)
            for file in out.partial.iterdir():
                (tmp_path / "kept" / file.name).write_bytes(file.read_bytes())
        (tmp_path / "kept").rename(tmp_path / "m.partial")
        removed.clear()
        with writer(2) as out:
            assert removed[0].startswith("model") and "run.json" not in removed  # which tells whose folder it is
            assert not list(out.partial.glob("*.safetensors"))
            out.write("model.safetensors", {"w": torch.ones(3)})


@pytest.mark.parametrize("place", ["m", "m.partial"])
def test_a_folder_of_hidden_files_is_not_empty(tmp_path, place):
    """Would catch a repository of the user's, in which nothing is committed yet, removed as an empty folder."""
    (tmp_path / place / ".git").mkdir(parents=True)
    with pytest.raises(InputError, match="m exists and is no model|m.partial is no unfinished run"):
        CheckpointWriter(tmp_path / "m", {"model_type": "llama"}, made={"a": 1})
    (tmp_path / place / ".git").rmdir()
    (tmp_path / place / ".model.safetensors.12.partial").touch()  # of a run that was killed
    with CheckpointWriter(tmp_path / "m", {"model_type": "llama"}, made={"a": 1}) as out:
        out.write("model.safetensors", {"w": torch.ones(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_finished_folder_may_not_have_an_unfinished_ones_name(tmp_path):
    """Would catch a model in x.partial that goes when another one is written to x."""
    with pytest.raises(InputError, match="x.partial: a folder of that name is an unfinished one: choose another"):
        CheckpointWriter(tmp_path / "x.partial", {"model_type": "llama"}, made={"a": 1})


@pytest.mark.parametrize("others", [False, True])
def test_what_is_removed_while_it_is_written_is_not_finished(tmp_path, others):
    """Would catch a finished folder that lacks the blocks which were written before, and one of another run that is
    removed."""
    with pytest.raises(InputError, match="m.partial was removed or replaced while it was being written"):
        with CheckpointWriter(tmp_path / "m", {"model_type": "llama"}, made={"a": 1}) as out:
            out.write("model-00001-of-00002.safetensors", {"w": torch.ones(3)})
            shutil.rmtree(out.partial)
            if others:
                out.partial.mkdir()
                out.marker.write_text('{"a": 2}')
            out.write("model-00002-of-00002.safetensors", {"v": torch.ones(3)})
    assert [path.name for path in tmp_path.rglob("*")] == ["m.partial", "run.json"] * others


@pytest.mark.parametrize("method", [5, None, ["ast"]])
def test_a_run_json_of_another_program_says_nothing(tmp_path, method):
    (tmp_path / "run.json").write_text(json.dumps({"method": method}))
    assert not pruned_here(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"method": "ast-slorb"}))
    assert pruned_here(tmp_path)


def test_all_files_of_a_tokenizer_come_along(tmp_path):
    """Would catch a saved model that `transformers` tokenizes for otherwise, or that knows no end of text."""
    make_checkpoint(tmp_path / "a")
    names = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
             "merges.txt", "chat_template.jinja", "generation_config.json"}
    for name in names:
        (tmp_path / "a" / name).write_text("{}")
    GPT.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert names < {path.name for path in (tmp_path / "b").iterdir()}


def test_a_tokenizer_that_is_gone_is_asked_for_first(tmp_path):
    """Would catch a model that is saved without one, as if it had none."""
    make_checkpoint(tmp_path / "a")
    model = GPT.from_pretrained(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    with pytest.raises(InputError, match="a, whose tokenizer belongs to .*c, is no folder"):
        model.save_pretrained(tmp_path / "c")
    model.save_pretrained(tmp_path / "c", tokenizer_from=tmp_path / "b")
    assert (tmp_path / "c" / "tokenizer.model").is_file()


def test_a_model_that_is_read_by_another_name_is_not_replaced(tmp_path, monkeypatch):
    """Would catch a folder that is replaced by what is made of it, where a link or a relative path leads to it."""
    make_checkpoint(tmp_path / "a")
    (tmp_path / "link").symlink_to("a")
    monkeypatch.chdir(tmp_path)
    for name in "link", "a":
        with pytest.raises(InputError, match="a is the model that is being read"):
            GPT.from_pretrained(name).save_pretrained(tmp_path / "a")


def test_a_tokenizer_that_may_not_be_read_ends_a_run_at_once(tmp_path, monkeypatch):
    """Would catch hours of pruning before a file that is copied in the end turns out to be another user's."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "tokenizer.json").write_text("{}")

    def refuse(path, mode):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError, match="tokenizer.json"):
        CheckpointWriter(tmp_path / "out", {"model_type": "llama"}, tokenizer_from=tmp_path / "m")
    assert not (tmp_path / "out.partial").exists()
