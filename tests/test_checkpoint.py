"""Checkpoint folders and the Hub: what is read, in which of its old forms, what is written, and what is refused in
which words."""

import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

import ast_train
import dsnot
import eval
import gpt
import sparse_matmul
from conftest import ROOT, make_checkpoint
from safetensors.torch import load_file, save_file

from data.command import InputError
from data.hub import model_folder, repository
from data.writer import CheckpointWriter, alone_in, pruned_here, shard
from gpt import GPT
from test_gpt import BASE, CASES, LLAMA3, command, gap, ids_for, theirs, transformers


@pytest.fixture
def folder(tmp_path):
    """A small LLaMA's folder to damage."""
    theirs("llama", {}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


BIN = {  # what the files on the Hub look like: {case: (family, changes, names changed, constants carried along)}
    "vicuna": ("llama", {}, lambda k: k, {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": 6 for i in range(3)}),
    "gpt2": ("gpt2", {}, lambda k: k.removeprefix("transformer."),
             {f"h.{i}.attn.{x}": 1 for i in range(3) for x in ("bias", "masked_bias")}),
    "opt without model.": ("opt", {}, lambda k: k.removeprefix("model."), {}),
    "opt, tied head in the file": ("opt", CASES["opt"]["350m"], lambda k: k, {"lm_head.weight": None}),
    "llama, tied head alone": ("llama", dict(tie_word_embeddings=True),
                               lambda k: k.replace("model.embed_tokens", "lm_head"), {}),
    "gpt2, tied head alone": ("gpt2", {}, lambda k: k.replace("transformer.wte", "lm_head"), {}),
}


@pytest.mark.parametrize("case", BIN)
@pytest.mark.parametrize("files", ["one", "old", "two"])
@torch.no_grad()
def test_pytorch_files(case, files, tmp_path):
    """pytorch_model*.bin as the Hub has them: other prefixes, constants, a tied head stored twice or without the
    embedding, shards, the format from before torch 1.6."""
    family, changes, rename, constants = BIN[case]
    other = theirs(family, changes)
    other.config.save_pretrained(tmp_path)
    tied = "lm_head.weight" if other.config.tie_word_embeddings else None
    state = {rename(k): v for k, v in other.state_dict().items() if k != tied}
    state |= {k: torch.ones(n) if n else other.get_input_embeddings().weight.clone() for k, n in constants.items()}
    names = list(state)
    if files == "two":
        shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
        weight_map = {name: shard for shard, inside in shards.items() for name in inside}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    else:
        shards = {"pytorch_model.bin": names}
    for shard, inside in shards.items():
        torch.save({k: state[k] for k in inside}, tmp_path / shard, _use_new_zipfile_serialization=files != "old")
    assert gap(GPT.from_pretrained(tmp_path)(ids_for()), other(ids_for()).logits) < 1e-4


@pytest.mark.parametrize("rope", ["plain", "linear", "llama3"])
@torch.no_grad()
def test_older_config(rope, folder):
    """config.json as transformers 4 wrote it, or the first LLaMA's, which leaves out all that did not exist yet; and
    its content must come back as it was."""
    scaling = {"linear": {"type": "linear", "factor": 2.0},
               "llama3": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}}
    raw = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", torch_dtype="float32",
               **{k: BASE[k] for k in BASE if k not in ("num_key_value_heads", "pad_token_id")})
    if rope != "plain":
        raw |= dict(rope_theta=500.0, rope_scaling=scaling[rope], num_key_value_heads=4, a_fork=[1, {"x": None}])
    (folder / "config.json").write_text(json.dumps(raw))
    other = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = GPT.from_pretrained(folder)
    assert gap(model(ids_for()), other(ids_for()).logits) < 1e-4
    model.bfloat16().save_pretrained(folder.with_name("b"))
    assert json.loads((folder.with_name("b") / "config.json").read_text()) == raw | {"torch_dtype": "bfloat16"}


@pytest.mark.parametrize("family, changes, more", [
    ("llama", {}, dict(rope_scaling={"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0})),
    ("llama", dict(rope_parameters=LLAMA3), dict(original_max_position_embeddings=32)),
    ("llama", {}, dict(rope_scaling={k: v for k, v in LLAMA3.items() if "original" not in k})),
    ("llama", {}, dict(use_sliding_window=True, sliding_window=3, layer_types=["sliding_attention"] * 3)),
    ("llama", {}, dict(qkv_bias=True, qk_norm=True)),
    ("mistral", dict(sliding_window=3), dict(layer_types=["full_attention", "sliding_attention", "full_attention"])),
    ("mistral", {}, dict(attention_bias=True, mlp_bias=True)),
    ("qwen2", {}, dict(attention_bias=True, mlp_bias=True)),
    ("opt", {}, dict(num_key_value_heads=2, head_dim=8, activation_function=None, do_layer_norm_before=None)),
    ("gpt2", {}, dict(num_key_value_heads=2, head_dim=8, activation_function=None, layer_norm_epsilon=None)),
    ("llama", {}, dict(hidden_act="swish")), ("gpt2", {}, dict(activation_function="gelu_pytorch_tanh")),
])
@torch.no_grad()
def test_what_a_config_says_beside_the_usual(family, changes, more, tmp_path):
    """Would catch logits that silently differ by what a config.json says twice, in another family's words, or leaves
    out (None)."""
    theirs(family, changes).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text()) | more
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k not in more or v is not None}))
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert gap(GPT.from_pretrained(tmp_path)(ids_for()), other(ids_for()).logits) < 1e-4


def test_a_folder_that_holds_two_models_is_refused(folder):
    """Would catch one of them taken in silence: a head beside the embedding that ties it, a tensor under two names, the
    shards of one model beside the file of another. And values that need a scale from elsewhere."""
    state, file = load_file(folder / "model.safetensors"), folder / "model.safetensors"

    def refused(words, **more):
        save_file(state | more, file, metadata={"format": "pt"})
        with pytest.raises(InputError, match=words):
            GPT.from_pretrained(folder)

    refused("norm.weight are the same tensor of the model: delete one", **{"norm.weight": torch.ones(48)})
    refused("float8_e4m3fn values", **{"model.norm.weight": state["model.norm.weight"].to(torch.float8_e4m3fn)})
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": True}))
    refused("lm_head.weight is not the embedding, to which config.json ties it")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, file, metadata={"format": "pt"})
    GPT.from_pretrained(folder)
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("holds one model in model.safetensors and another in the files")


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


# what is refused, and in which words

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


def refused(monkeypatch, capsys, folder):
    """The one sentence with which `python gpt.py --model folder` ends."""
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, "--model", str(folder), "--device", "cpu")
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


def change(folder, edit):
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("edit, words", [
    (lambda s: s.pop(Q), "missing"),
    (lambda s: s.update({Q.replace("q_proj", "z_proj"): s[Q].clone()}), "no place"),
    (lambda s: s.update({Q: s[Q][:-1].clone()}), "(47, 48)"),
    (lambda s: s.update({Q: s[Q].to(torch.int8)}), "int8"),
    (lambda s: s[Q].__setitem__((3, 5), float("nan")), "NaN"),
    (lambda s: s[Q].__setitem__((3, 5), float("-inf")), "infinite"),
], ids=["missing", "superfluous", "shape", "integers", "nan", "inf"])
def test_tensors_are_accounted_for(edit, words, folder, monkeypatch, capsys):
    """A tensor that is lost, ignored, cut or not finite and changes the model without a word."""
    change(folder, edit)
    error = refused(monkeypatch, capsys, folder)
    assert words in error and Q.replace("q_proj", "z_proj" if words == "no place" else "q_proj") in error


@pytest.mark.parametrize("file, damage, words", [
    ("model.safetensors", lambda b: b[:len(b) // 2], "truncated"),
    ("model.safetensors", lambda b: b[:5], "truncated"),
    ("config.json", lambda b: b[:len(b) // 2], "config.json"),
    ("config.json", lambda b: b"[1, 2]", "config.json"),
    ("config.json", lambda b: b.replace(b'"hidden_size"', b'"hidden"'), "hidden_size"),
    ("config.json", lambda b: b.replace(b'"hidden_size": 48', b'"hidden_size": "48"'), "hidden_size"),
    ("config.json", lambda b: b.replace(b'"max_position_embeddings": 64', b'"max_position_embeddings": "64"'), "'64'"),
    ("config.json", lambda b: b.replace(b'"llama"', b'"mamba"'), "mamba"),
    ("config.json", lambda b: b.replace(b'"silu"', b'"swoosh"'), "swoosh"),
    ("config.json", lambda b: b.replace(b'"rope_type": "default"', b'"rope_type": "yarn"'), "yarn"),
    ("config.json", lambda b: b.replace(b'"rope_type": "default"', b'"rope_type": "llama3"'), "factor"),
    ("config.json", lambda b: b.replace(b'"silu"', b'"silu", "is_causal": false'), "is_causal False is not supported"),
    ("config.json", lambda b: b.replace(b'"rope_type": "default"', json.dumps(
        LLAMA3 | {"low_freq_factor": 5})[1:-1].encode()), "low_freq_factor is not below high_freq_factor"),
    ("config.json", lambda b: b.replace(b'"num_key_value_heads": 4', b'"num_key_value_heads": 3'), "evenly"),
    ("config.json", lambda b: b.replace(b'"num_attention_heads": 4', b'"num_attention_heads": 0'), "config.json"),
    ("config.json", lambda b: b.replace(b'"num_hidden_layers": 3', b'"num_hidden_layers": 1' + b"0" * 12), "10^5"),
    ("config.json", lambda b: b.replace(b'"silu"', b'"silu", "rope_scaling": "x"'), "'x' is no JSON object"),
    ("config.json", lambda b: b.replace(b'"silu"', b'"silu", "rope_scaling": [["factor", 2]]'), "is no JSON object"),
    ("config.json", lambda b: b.replace(b'"tie_word_embeddings": false', b'"tie_word_embeddings": "false"'),
     "tie_word_embeddings 'false' is neither true nor false"),
    ("config.json", None, "config.json is missing"),
    ("model.safetensors", None, "model.safetensors is missing"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_damaged_files(file, damage, words, folder, monkeypatch, capsys):
    """A traceback, or a model that runs, where a file is cut, missing or not what this repository computes."""
    path = folder / file
    content = path.read_bytes()
    path.unlink()
    if damage:
        path.write_bytes(damage(content))
    assert words in refused(monkeypatch, capsys, folder)


def test_shards_without_their_index(folder, monkeypatch, capsys):
    """Would catch model.safetensors, which such a model does not have, asked for in its place."""
    before = folder / "model.safetensors"
    for name, index in [("model-00001-of-00002.safetensors", "model.safetensors.index.json"),
                        ("pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json")]:
        before = before.rename(folder / name)
        assert f"{index}, which tells what else" in refused(monkeypatch, capsys, folder)


def test_damaged_pytorch_files(folder, monkeypatch, capsys):
    """A cut .bin or index, and one that would run code while it is read."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    whole = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(whole[:len(whole) // 2])
    assert "truncated" in refused(monkeypatch, capsys, folder)
    for legacy in False, True:
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        whole, rng = (folder / "pytorch_model.bin").read_bytes(), random.Random(0)
        for _ in range(30):
            damaged = bytearray(whole)
            for _ in range(8):  # near the end of a zip and the begin of a legacy file, where the names are
                damaged[rng.randrange(1500) if legacy else -1 - rng.randrange(1500)] ^= 1 << rng.randrange(8)
            (folder / "pytorch_model.bin").write_bytes(damaged)
            with suppress(InputError):  # some damage is none, or falls on a number
                GPT.from_pretrained(folder)
    for content in {"a": subprocess.Popen}, {"a": 3}, [3]:
        torch.save(content, folder / "pytorch_model.bin")
        assert "pytorch_model.bin" in refused(monkeypatch, capsys, folder)
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": 3}')
    assert "index" in refused(monkeypatch, capsys, folder)


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


def test_unknown_model(folder, monkeypatch, capsys):
    """A misspelt preset, a folder that is not there, and one that holds models."""
    assert "llama2-7b" in refused(monkeypatch, capsys, "lama2-7b")
    assert "no model" in refused(monkeypatch, capsys, "./nowhere")
    assert f"config.json is missing; give {folder}" in refused(monkeypatch, capsys, folder.parent)
    (folder.parent / "half.partial").mkdir()
    assert "half is not finished yet: give the command" in refused(monkeypatch, capsys, folder.parent / "half")


def test_a_folder_named_like_a_preset(folder, tmp_path, monkeypatch):
    """Would catch "./tiny" that gets the weights of that folder and the tokenizer of the model that ships."""
    folder.rename(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    for name in "./tiny", "tiny/", Path("tiny"):
        assert model_folder(model_folder(name)) == Path("tiny")
    assert model_folder("tiny") != Path("tiny")


def test_hub_unreachable(tmp_path):
    """The real command without a network: one sentence that says what to do, soon."""
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "gpt.py", "--model", "llama2-7b"], cwd=ROOT, env=environment,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "meta-llama/Llama-2-7b-hf" in done.stderr and "--model FOLDER" in done.stderr


@pytest.mark.parametrize("held, calls", [("model.safetensors", 1), ("pytorch_model.bin", 2)])
def test_safetensors_are_preferred(held, calls, tmp_path, monkeypatch):
    """Weights that are downloaded twice, or not at all where only PyTorch's files exist."""
    asked = []

    def download(target, allow_patterns):
        asked.append(allow_patterns)
        if any(fnmatch(held, pattern) for pattern in allow_patterns):
            (tmp_path / held).touch()
        return str(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert model_folder("opt-125m", weights=False) == tmp_path and not any(tmp_path.iterdir())
    assert model_folder("opt-125m") == tmp_path and [p.name for p in tmp_path.iterdir()] == [held]
    assert len(asked) == 1 + calls
    assert not any(fnmatch("consolidated.safetensors", pattern) for patterns in asked for pattern in patterns)


def test_nothing_large_is_fetched_in_vain(tmp_path, monkeypatch):
    """Would catch a hundred gigabytes that are fetched before the sentence that the model can't be read."""
    asked = []

    def download(target, allow_patterns):
        asked.extend(allow_patterns)
        (tmp_path / "config.json").write_text('{"model_type": "gemma2"}')
        return str(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for words in [dsnot, "--sparsity", "0.5"], [dsnot, "--dry-run"], [ast_train], [eval], [sparse_matmul], [gpt]:
        monkeypatch.setattr(sys, "argv", ["command", "--device", "cpu", "--model", "google/gemma-2-9b", *words[1:]])
        with pytest.raises(InputError, match="gemma2|no tokenizer"):
            words[0].main()
    assert asked and not any(fnmatch(name, pattern) for pattern in asked
                             for name in ("model.safetensors", "pytorch_model.bin"))


def test_the_folder_of_an_organisation_hides_no_model_of_the_hub(tmp_path, monkeypatch):
    """Would catch llama2-13b refused where llama2-7b was copied to meta-llama/Llama-2-7b-hf."""
    (tmp_path / "meta-llama").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda target, allow_patterns: target)
    for name in "llama2-13b", "meta-llama/Llama-2-13b-hf":
        assert model_folder(name, weights=False) == Path("meta-llama/Llama-2-13b-hf")
    with pytest.raises(InputError, match="there is no folder ./meta-llama/x: check its name"):
        model_folder("./meta-llama/x")


def test_a_run_is_known_by_its_repository(tmp_path):
    """Would catch a run that can't go on because the model's README has changed on the Hub."""
    cache = tmp_path / "models--a--b"
    for name in "1", "2":
        (cache / "snapshots" / name).mkdir(parents=True)
        assert repository(cache / "snapshots" / name) == str(cache.resolve())
    assert repository(cache) == str(cache.resolve())


def test_a_file_that_memory_can_not_map_is_not_called_damaged(folder, monkeypatch, capsys):
    """Linux refuses to map what is larger than memory and swap; fetching it again would not help."""
    def full(*_, **__):
        raise OSError("unable to mmap 24 bytes from file <x>: Cannot allocate memory (12)")
    monkeypatch.setattr("data.checkpoint.safe_open", full)
    error = refused(monkeypatch, capsys, folder)
    assert "add swap" in error and "damaged" not in error


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_not_called_damaged(folder, monkeypatch, capsys):
    (folder / "model.safetensors").chmod(0)
    assert "Permission denied" in refused(monkeypatch, capsys, folder)


@pytest.mark.parametrize("error, words", [
    ("GatedRepoError", "ask for access"), ("RepositoryNotFoundError", "no public model"),
    ("HTTPError", "--model FOLDER"), ("LocalEntryNotFoundError", "out of reach.*--model FOLDER"),
    ("HFValidationError", "Hub id")])
def test_hub_errors(error, words, monkeypatch):
    """A traceback, or the wrong way out, where the Hub refuses, does not know the model or hangs up."""
    kind = getattr(pytest.importorskip("huggingface_hub.errors"), error)

    def download(*_, **__):
        raise kind.__new__(kind)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(InputError, match=words):
        model_folder("meta-llama/Llama-2-7b-hf")


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


def test_a_tensor_is_the_readers_own(tmp_path):
    """Would catch a .bin file that a streamed model reads otherwise after its block was pruned in place."""
    make_checkpoint(tmp_path)
    state = GPT.from_pretrained(tmp_path).state_dict()
    (tmp_path / "model.safetensors").unlink()
    for zipped in False, True:
        torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        model = GPT.from_pretrained(tmp_path, stream=True)
        model.block(0).self_attn.q_proj.weight.data.zero_()
        assert model.block(0).self_attn.q_proj.weight.count_nonzero()


def test_all_files_of_a_tokenizer_come_along(tmp_path):
    """Would catch a saved model that `transformers` tokenizes for otherwise, or that knows no end of text."""
    make_checkpoint(tmp_path / "a")
    names = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
             "merges.txt", "chat_template.jinja", "generation_config.json"}
    for name in names:
        (tmp_path / "a" / name).write_text("{}")
    GPT.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert names < {path.name for path in (tmp_path / "b").iterdir()}


def test_a_model_that_is_read_by_another_name_is_not_replaced(tmp_path, monkeypatch):
    """Would catch a folder that is replaced by what is made of it, where a link or a relative path leads to it."""
    make_checkpoint(tmp_path / "a")
    (tmp_path / "link").symlink_to("a")
    monkeypatch.chdir(tmp_path)
    for name in "link", "a":
        with pytest.raises(InputError, match="a is the model that is being read"):
            GPT.from_pretrained(name).save_pretrained(tmp_path / "a")


def test_what_is_fetched(monkeypatch):
    """Would catch an index or the end of a text left on the Hub, and a tokenizer fetched for a config.json alone."""
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda target, allow_patterns: asked.append(
        allow_patterns) or "nowhere")
    model_folder("opt-125m", config_only=True)
    model_folder("opt-125m")
    assert asked[0] == ["config.json"] and "generation_config.json" in asked[1]
    assert "model.safetensors.index.json" in asked[1] and "pytorch_model.bin.index.json" in asked[2]
