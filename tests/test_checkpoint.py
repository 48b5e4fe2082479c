"""Checkpoint folders: what is read, in which of its old forms, and what is refused in which words."""

import json
import os
import random
import subprocess
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import make_checkpoint
from data.command import InputError
from gpt import GPT
from test_gpt import BASE, CASES, LLAMA3, command, gap, ids_for, theirs, transformers

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


# what is refused, and in which words

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
    sparse = torch.eye(4).to_sparse()
    for content in ({"a": subprocess.Popen}, {"a": 3}, [3], {"a": sparse}, {"a": sparse.to_sparse_csr()},
                    {3: torch.ones(1)}):
        torch.save(content, folder / "pytorch_model.bin")
        assert "pytorch_model.bin" in refused(monkeypatch, capsys, folder)
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": 3}')
    assert "index" in refused(monkeypatch, capsys, folder)


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
