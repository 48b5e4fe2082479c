"""gpt.py against `transformers`: the same logits, folders and text; and what it refuses, in which words."""

import json
import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SHARED, make_checkpoint
from safetensors.torch import load_file, save_file

from data.checkpoint import CheckpointWriter, layout_of
from data.command import InputError, run
from data.hub import model_folder
from gpt import GPT, Config, main

transformers = pytest.importorskip("transformers")

BASE = dict(vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=None)
OPT = dict(vocab_size=96, hidden_size=48, ffn_dim=80, num_hidden_layers=3, num_attention_heads=4, dropout=0.0,
           word_embed_proj_dim=48, max_position_embeddings=40, bos_token_id=2, eos_token_id=2, pad_token_id=1)
GPT2 = dict(vocab_size=96, n_embd=48, n_layer=3, n_head=4, n_positions=40, bos_token_id=1, eos_token_id=1)
LLAMA3 = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)

CASES = {  # family: {name: what differs from BASE, OPT or GPT2}
    "llama": {
        "many key/value heads": dict(),
        "grouped heads": dict(num_key_value_heads=2),
        "one key/value head, tied": dict(num_key_value_heads=1, tie_word_embeddings=True),
        "head_dim apart": dict(head_dim=20, num_key_value_heads=2),
        "another rotary base and epsilon": dict(rope_parameters=dict(rope_type="default", rope_theta=500.0),
                                                rms_norm_eps=1e-3),
        "LLaMA 3.1 rotary scaling": dict(head_dim=16, rope_parameters=LLAMA3),
        "linear rotary scaling": dict(rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=4.0)),
        "biases": dict(attention_bias=True, mlp_bias=True),
    },
    "mistral": {
        "window shorter than the text": dict(num_key_value_heads=2, sliding_window=5),
        "window of one token": dict(sliding_window=1),
        "no window": dict(sliding_window=None, head_dim=16),
    },
    "qwen2": {
        "biases": dict(num_key_value_heads=2),
        "tied": dict(tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1e6)),
        "a window in the last layers": dict(use_sliding_window=True, sliding_window=4, max_window_layers=2),
    },
    "qwen3": {
        "head_dim apart": dict(head_dim=16, num_key_value_heads=2),
        "tied": dict(head_dim=12, tie_word_embeddings=True),
        "biases and windows": dict(head_dim=8, attention_bias=True, use_sliding_window=True, sliding_window=3,
                                   layer_types=["full_attention", "sliding_attention", "full_attention"]),
    },
    "opt": {
        "125m": dict(),
        "350m": dict(do_layer_norm_before=False, word_embed_proj_dim=32),
        "untied, no biases, gelu": dict(tie_word_embeddings=False, enable_bias=False, activation_function="gelu"),
        "narrow embedding": dict(word_embed_proj_dim=24),
    },
    "gpt2": {
        "small": dict(),
        "wide MLP": dict(n_inner=64, activation_function="relu"),
        "untied, another epsilon": dict(tie_word_embeddings=False, layer_norm_epsilon=1e-3, n_head=2),
    },
}
ALL = [pytest.param(family, changes, id=f"{family}: {name}")
       for family, cases in CASES.items() for name, changes in cases.items()]
ONE_EACH = [pytest.param(family, next(iter(cases.values())), id=family) for family, cases in CASES.items()]


def theirs(family, changes, seed=0):
    """A random `transformers` model in which every parameter, biases and norms included, differs from its default."""
    base = {"opt": OPT, "gpt2": GPT2}.get(family, BASE)
    config = transformers.AutoConfig.for_model(family, **(base | changes))
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.15)
    return model


def ids_for(seed=1, batch=2, length=24):
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


def gap(a, b):
    return (a - b).abs().max().item()


@pytest.fixture
def folder(tmp_path):
    """A small LLaMA's folder to damage."""
    theirs("llama", {}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("family, changes", ALL)
@torch.no_grad()
def test_logits_and_round_trip(family, changes, tmp_path):
    """A wrong norm, bias, mask, rotary angle, activation or tensor name in any family; a folder that `transformers`
    reads differently after we wrote it, or a config.json of which we lost a part."""
    other = theirs(family, changes)
    other.save_pretrained(tmp_path / "a")
    model, ids = GPT.from_pretrained(tmp_path / "a"), ids_for()
    expected = other(ids).logits
    assert gap(model(ids), expected) < 1e-4
    model.save_pretrained(tmp_path / "b")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32,
                                                                    output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert torch.equal(again(ids).logits, expected)
    a, b = (json.loads((tmp_path / x / "config.json").read_text()) for x in "ab")
    assert a == b
    a, b = (load_file(tmp_path / x / "model.safetensors") for x in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("family, changes", ONE_EACH)
@torch.no_grad()
def test_block_by_block(family, changes, tmp_path):
    """A model written as one file per block, as pruning does, that `transformers` can't read: a wrong index, or GPT-2's
    q, k and v not fused again. A streamed model unlike a loaded one. A finished file that is read back wrongly."""
    other = theirs(family, changes)
    other.save_pretrained(tmp_path / "a")
    ids, model = ids_for(), GPT.from_pretrained(tmp_path / "a", stream=True)
    assert gap(model(ids), other(ids).logits) < 1e-4
    with CheckpointWriter(tmp_path / "b", model.config.raw, keep={"run": 1}) as out:
        rest = {k: v for k, v in model.state_dict().items() if not v.is_meta}
        rest.pop("lm_head.weight" if model.config.tie_word_embeddings else None, None)
        out.write("model-rest.safetensors", rest)
        for i, block in enumerate(model.blocks()):
            block.self_attn.k_proj.weight[:] = 0
            out.write(f"model-{i}.safetensors", {f"model.layers.{i}.{k}": v for k, v in block.state_dict().items()})
            again = GPT.from_pretrained(tmp_path / "a").model.layers[i]
            out.load(f"model-{i}.safetensors", again, f"model.layers.{i}")
            assert all(torch.equal(again.state_dict()[k], v) for k, v in block.state_dict().items())
    new = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
    assert gap(GPT.from_pretrained(tmp_path / "b")(ids), new(ids).logits) < 1e-4
    assert gap(new(ids).logits, other(ids).logits) > 1e-3


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
        with CheckpointWriter(tmp_path / "link", model.config.raw, source, keep={"run": 1}) as out:
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


def test_ids_of_another_tokenizer_get_a_sentence(tmp_path):
    make_checkpoint(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="token 300 is beyond the model's 300"):
        model(torch.tensor([[1, 300]]))


BIN = {  # what the files on the Hub look like: {case: (family, changes, names changed, constants carried along)}
    "vicuna": ("llama", {}, lambda k: k, {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": 6 for i in range(3)}),
    "gpt2": ("gpt2", {}, lambda k: k.removeprefix("transformer."),
             {f"h.{i}.attn.{x}": 1 for i in range(3) for x in ("bias", "masked_bias")}),
    "opt without model.": ("opt", {}, lambda k: k.removeprefix("model."), {}),
    "opt, tied head in the file": ("opt", CASES["opt"]["350m"], lambda k: k, {"lm_head.weight": 96}),
}


@pytest.mark.parametrize("case", BIN)
@pytest.mark.parametrize("files", ["one", "old", "two"])
@torch.no_grad()
def test_pytorch_files(case, files, tmp_path):
    """pytorch_model*.bin as the Hub has them: other prefixes, constants, a tied head stored twice, shards, the format
    from before torch 1.6."""
    family, changes, rename, constants = BIN[case]
    other = theirs(family, changes)
    other.config.save_pretrained(tmp_path)
    tied = "lm_head.weight" if other.config.tie_word_embeddings else None
    state = {rename(k): v for k, v in other.state_dict().items() if k != tied}
    state |= {k: torch.ones(n) for k, n in constants.items()}
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


@pytest.mark.parametrize("family, changes", ONE_EACH + [
    pytest.param("llama", dict(num_key_value_heads=2, rope_parameters=LLAMA3), id="llama, grouped heads and scaling"),
    pytest.param("opt", CASES["opt"]["350m"], id="opt-350m"),
    pytest.param("qwen2", CASES["qwen2"]["a window in the last layers"], id="qwen2, windows")])
@torch.no_grad()
def test_cache(family, changes):
    """A cache that forgets, mixes up the sequences of a batch or shifts positions: greedy text is that of no cache."""
    model, ids = ours(family, changes), ids_for(batch=3, length=9)
    text = model.generate(ids, 12, temperature=0)
    assert torch.equal(text[:, :9], ids)
    for length in range(9, 21):
        assert torch.equal(text[:, length], model(text[:, :length])[:, -1].argmax(-1))


def ours(family, changes):
    """Our model with the weights of `theirs`, without a file in between."""
    other = theirs(family, changes)
    config = Config.from_dict(other.config.to_dict())
    model = GPT(config).eval()
    own = layout_of(config.raw)
    state = other.state_dict()
    model.load_state_dict({k: own.ours(k, state[own.name(k)]) for k in model.state_dict()})
    return model


def test_sampling():
    """Top-k that lets other tokens through, a temperature that does nothing, a seed that doesn't decide the text."""
    model, ids = ours("llama", {}), ids_for(batch=1, length=4)
    torch.manual_seed(0)
    first = model.generate(ids, 30, temperature=1.5, top_k=3)
    torch.manual_seed(0)
    assert torch.equal(first, model.generate(ids, 30, temperature=1.5, top_k=3))
    best = model(first).topk(3).indices
    assert all(first[0, t + 1] in best[0, t] for t in range(3, 33))
    assert not torch.equal(first, model.generate(ids, 30, temperature=0))
    assert torch.equal(model.generate(ids, 30, temperature=1.5, top_k=1), model.generate(ids, 30, temperature=0))


def test_learned_positions_end():
    """A text longer than GPT-2's or OPT's positions, which would read past the table or fail without a reason."""
    for family in ("gpt2", "opt"):
        model = ours(family, {})
        model(ids_for(length=40))
        with pytest.raises(InputError, match="40 positions"):
            model(ids_for(length=41))
        with pytest.raises(InputError, match="40 positions"):
            model.generate(ids_for(length=30), 12)
        assert model.generate(ids_for(length=30), 11).shape[1] == 41  # the last token is not read


STORY = ("Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she "
         "saw a big, red ball. She wanted to play with it, but it was too high.")


@pytest.mark.skipif(not (SHARED / "models/stories260K").is_dir(), reason="the model is no part of the repository")
def test_story(monkeypatch, capsys):
    """The whole chain, from the command to the text on the screen, on a real model with a known text."""
    command(monkeypatch, "--model", str(SHARED / "models/stories260K"), "--prompt", "Once upon a time",
            "--temperature", "0", "--max-new-tokens", "60", "--device", "cpu")
    shown = capsys.readouterr().out
    assert shown.startswith(STORY)
    assert "tokens/s" in shown


# what is refused, and in which words

def command(monkeypatch, *arguments):
    """`python gpt.py arguments` in this process."""
    monkeypatch.setattr(sys, "argv", ["gpt.py", *arguments])
    run(main)


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
    ("config.json", lambda b: b.replace(b'"num_key_value_heads": 4', b'"num_key_value_heads": 3'), "evenly"),
    ("config.json", lambda b: b.replace(b'"num_attention_heads": 4', b'"num_attention_heads": 0'), "config.json"),
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


def test_damaged_pytorch_files(folder, monkeypatch, capsys):
    """A cut .bin or index, and one that would run code while it is read."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    whole = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(whole[:len(whole) // 2])
    assert "truncated" in refused(monkeypatch, capsys, folder)
    torch.save({"a": subprocess.Popen}, folder / "pytorch_model.bin")
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
    monkeypatch.setattr("data.checkpoint.save_file", full)
    with pytest.raises(InputError, match="No space left"):
        model.save_pretrained(folder.with_name("b"))
    assert [p.name for p in folder.parent.iterdir()] == ["model"]
    with pytest.raises(InputError, match="choose another"):
        model.save_pretrained(folder)


def test_unknown_model(monkeypatch, capsys):
    """A misspelt preset, and a folder that is not there."""
    assert "llama2-7b" in refused(monkeypatch, capsys, "lama2-7b")
    assert "no model" in refused(monkeypatch, capsys, "./nowhere")


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


@pytest.mark.parametrize("error, words", [
    ("GatedRepoError", "ask for access"), ("RepositoryNotFoundError", "check the id"), ("HTTPError", "--model FOLDER"),
    ("LocalEntryNotFoundError", "--model FOLDER"), ("HFValidationError", "Hub id")])
def test_hub_errors(error, words, monkeypatch):
    """A traceback, or the wrong way out, where the Hub refuses, does not know the model or hangs up."""
    kind = getattr(pytest.importorskip("huggingface_hub.errors"), error)

    def download(*_, **__):
        raise kind.__new__(kind)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(InputError, match=words):
        model_folder("meta-llama/Llama-2-7b-hf")
