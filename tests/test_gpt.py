"""gpt.py against `transformers`: the same logits, folders that it reads back, and text."""

import json
import math
import sys

import pytest
import torch
from conftest import SHARED, make_checkpoint
from safetensors.torch import load_file

from data import load_tokenizer
from data.checkpoint import layout_of
from data.command import InputError, run
from data.writer import CheckpointWriter
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
    with CheckpointWriter(tmp_path / "b", model.config.raw, made={"run": 1}) as out:
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


def test_ids_of_another_tokenizer_get_a_sentence(tmp_path):
    make_checkpoint(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="token 300 is none of the model's 300"):
        model(torch.tensor([[1, 300]]))
    with pytest.raises(InputError, match="token 301 is none of the model's 300"):
        model.generate(torch.tensor([[301]]), 1)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_ids_may_be_on_the_cpu(family):
    """Would catch positions that are made where the ids are and not where the model is."""
    model = ours(family, {}).to("meta")
    assert model(ids_for()).device.type == "meta"


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


def command(monkeypatch, *arguments):
    """`python gpt.py arguments` in this process."""
    monkeypatch.setattr(sys, "argv", ["gpt.py", *arguments])
    run(main)


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


def test_a_text_ends(monkeypatch, capsys):
    """Would catch a model that is asked for more after it has said that the text is over."""
    words = "--device", "cpu", "--max-new-tokens", "5"
    for ends, said in (set(), "\n5 tokens in"), (set(range(4096)), "\n1 token in"):
        monkeypatch.setattr("gpt.end_tokens", lambda folder: ends)
        command(monkeypatch, *words)
        assert said in capsys.readouterr().out


def test_what_cannot_be_sampled_gets_a_sentence(tmp_path):
    """Would catch a traceback, on a GPU a failed assert, from a model that computes NaN, and from more keys and values
    than memory holds."""
    make_checkpoint(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="the keys and values of 1000000000000000001 tokens take .* GB"):
        model.generate(torch.tensor([[1]]), 10**18)
    for ruined, temperature in (math.inf, 1), (3e38, 1), (3e38, 0):  # of 3e38 come numbers too large for float32
        model.lm_head.weight.data[:] = ruined
        with pytest.raises(InputError, match="the model's output is NaN or infinite"):
            model.generate(torch.tensor([[1]]), 2, temperature)


@pytest.mark.parametrize("vocabulary, words", [(300, "tokens are too many"), (96, "none of the model's 96")])
def test_what_a_model_cannot_read_leaves_no_prompt_behind(vocabulary, words, monkeypatch, capsys, tmp_path):
    """Would catch an error that sticks to the prompt."""
    theirs("gpt2", dict(vocab_size=vocabulary)).save_pretrained(tmp_path)
    make_checkpoint(tmp_path / "other")
    (tmp_path / "other" / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    with pytest.raises(SystemExit):
        command(monkeypatch, "--model", str(tmp_path), "--prompt", "the model", "--max-new-tokens", "100")
    out, error = capsys.readouterr()
    assert words in error and not out


def test_torchrun_is_refused(monkeypatch, capsys):
    """Would catch every process printing the same text."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        command(monkeypatch, "--max-new-tokens", "1")
    assert "runs in one process" in capsys.readouterr().err


def test_the_command_passes_its_options_on(monkeypatch, tmp_path, capsys):
    """Would catch an option that nothing hears, numbers that can't be meant, an EOS between the prompt and what
    follows, a result that --json does not get, and a remark that forgets the prompt."""
    heard = {}

    def sample(self, ids, *given):
        heard["sample"] = given
        assert ids[0, -1] != 2
        return iter(torch.tensor([[[1]], [[2]]]))
    real = GPT.from_pretrained.__func__
    monkeypatch.setattr(GPT, "from_pretrained", classmethod(
        lambda cls, name, device, sparse: (heard.update(sparse=sparse), real(cls, name, device))[1]))
    monkeypatch.setattr(GPT, "sample", sample)
    make_checkpoint(tmp_path / "m", max_position_embeddings=3)
    (tmp_path / "m" / "tokenizer_config.json").write_text('{"add_eos_token": true}')
    assert load_tokenizer(tmp_path / "m").encode("the")[-1] == 2
    words = "--device", "cpu", "--model", str(tmp_path / "m"), "--json", str(tmp_path / "r.json")
    command(monkeypatch, *words, "--prompt", "the", "--max-new-tokens", "7", "--top-k", "3", "--temperature", "0.5",
            "--sparse")
    assert heard == dict(sample=(7, 0.5, 3), sparse=True)
    assert "with the prompt, more than the 3 that the model is made for" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["results"].keys() == {"text", "tokens_per_second"}
    for option, value in [("--top-k", "0"), ("--max-new-tokens", "0"), ("--temperature", "inf"), ("--prompt", "\udcff"),
                          ("--temperature", "1e-7"), ("--temperature", "nan"), ("--temperature", "-1"),
                          ("--temperature", "1e300")]:
        with pytest.raises(SystemExit):
            command(monkeypatch, *words, option, value)
        assert f"error: {option} " in capsys.readouterr().err


def test_characters_of_several_tokens_are_shown_when_they_are_whole(monkeypatch, capsys):
    """Would catch the halves of a character on the screen."""
    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode(errors="replace")
    monkeypatch.setattr("gpt.load_tokenizer", lambda folder: Bytes())
    monkeypatch.setattr("gpt.encode_open", lambda tokenizer, text: list(text.encode()))
    monkeypatch.setattr(GPT, "sample", lambda *_: iter(torch.tensor([[[id]] for id in "ë!".encode()])))
    command(monkeypatch, "--device", "cpu", "--prompt", "Zo")
    assert capsys.readouterr().out.startswith("Zoë!\n")
    with pytest.raises(SystemExit):
        command(monkeypatch, "--device", "cpu", "--prompt", "")
    assert "--prompt '' has no tokens" in capsys.readouterr().err


@pytest.mark.parametrize("family, changes, said", [
    ("llama", dict(quantization_config={"bits": 4}), "quantization_config"),
    ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
    ("llama", dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5)), "partial_rotary_factor"),
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by"),
    ("gpt2", dict(scale_attn_weights=False), "scale_attn_weights"), ("gpt2", dict(add_cross_attention=True), "cross"),
    ("opt", dict(_remove_final_layer_norm=True), "_remove_final"), ("opt", dict(enable_bias="false"), "neither true"),
    ("opt", dict(layer_norm_elementwise_affine=False), "elementwise_affine"),
    ("opt", dict(do_layer_norm_before="false"), "neither true"),
    ("opt", dict(word_embed_proj_dim="16"), "embed_size '16'"),
    ("opt", dict(max_position_embeddings=None), "positions None"), ("gpt2", dict(n_positions=0), "positions 0"),
    ("qwen2", dict(use_sliding_window="false"), "neither true"),
    ("mistral", dict(sliding_window=0), "sliding_window 0"),
    ("qwen3", dict(layer_types=["full_attention"]), "names 1 of 3"), ("llama", dict(head_dim=7), "even head_dim"),
    ("llama", dict(rms_norm_eps=0), "rms_norm_eps 0"), ("llama", dict(slorb_k=-4), "slorb_k -4"),
    ("llama", dict(slorb_k=True), "slorb_k True"), ("llama", dict(slorb_k="4"), "slorb_k '4'"),
    ("llama", dict(rope_scaling=LLAMA3 | dict(high_freq_factor=1.0)), "not below"),
    ("llama", dict(rope_scaling=dict(type="linear", factor=0)), "factor is missing or not positive"),
    ("llama", dict(rope_scaling=dict(type="default", rope_type="linear")), "factor is missing"),
])
def test_what_is_not_computed_here_is_refused(family, changes, said):
    """Would catch a model that runs, with other logits than those that its config.json asks for."""
    base = dict(opt=OPT, gpt2=GPT2).get(family, BASE)
    Config.from_dict(dict(model_type=family) | base)
    with pytest.raises(InputError, match=said):
        Config.from_dict(dict(model_type=family) | base | changes)


@pytest.mark.parametrize("family, said", [
    ("llama", dict(sliding_window=3)), ("mistral", {}), ("qwen2", {}), ("qwen2", dict(use_sliding_window=True)),
    ("qwen3", {}), ("qwen3", dict(use_sliding_window=True)), ("opt", {}), ("gpt2", {})])
def test_what_a_config_leaves_out_is_the_default_of_the_hub(family, said):
    """Would catch other sizes, windows, biases or ties for a config.json that is silent about them: an early Mistral's
    or Qwen's."""
    left = {"opt": "enable_bias tie_word_embeddings", "gpt2": "tie_word_embeddings"}.get(
        family, "num_key_value_heads head_dim sliding_window max_window_layers use_sliding_window")
    large = BASE | dict(hidden_size=2048, num_attention_heads=32, num_hidden_layers=30)
    base = dict(opt=OPT, gpt2=GPT2).get(family, large)
    raw = {k: v for k, v in base.items() if k not in left.split()} | dict(model_type=family) | said
    theirs = transformers.AutoConfig.for_model(**raw)
    config = Config.from_dict(raw)
    assert config.tie_word_embeddings == theirs.tie_word_embeddings
    assert config.num_key_value_heads == getattr(theirs, "num_key_value_heads", theirs.num_attention_heads)
    assert config.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert config.mlp_bias == getattr(theirs, "enable_bias", family == "gpt2")
    kinds = getattr(theirs, "layer_types", None) or len(config.reaches) * [
        "sliding_attention" if family == "mistral" else "full_attention"]
    assert config.reaches == tuple(theirs.sliding_window if kind == "sliding_attention" else None for kind in kinds)


def test_lengths_that_a_model_is_made_for():
    """Would catch windows longer than the papers' where a model reads more, and a remark on a text that just fits."""
    most = {n: Config.from_dict(BASE | dict(model_type="llama", max_position_embeddings=n)) for n in (64, 4096, 1)}
    assert [config.window_length() for config in most.values()] == [64, 2048, 2]  # of one token nothing is predicted
    assert not most[64].remark(64) and "more than the 64" in most[64].remark(65)
    assert Config.from_dict({k: v for k, v in most[64].raw.items() if "max_pos" not in k}).context_length == 2048
    Config.from_dict(GPT2 | dict(model_type="gpt2", n_embd=52, n_head=4))  # odd heads, but learned positions


def test_more_likely_tokens_than_there_are():
    """Would catch a traceback for a top_k above the vocabulary, and NaN of a temperature that is next to nothing."""
    model, ids = ours("llama", {}), ids_for(batch=1, length=4)
    assert model.generate(ids, 2, top_k=1000).shape == (1, 6)
    assert torch.equal(model.generate(ids, 5, temperature=1e-40), model.generate(ids, 5, temperature=0))


def test_what_a_loaded_and_a_streamed_model_are(monkeypatch, tmp_path):
    """Would catch a device's own dtype that is not the checkpoint's, a streamed model saved without its blocks, and
    another folder's tokenizer that gives way to the model's own."""
    make_checkpoint(tmp_path / "a")
    GPT.from_pretrained(tmp_path / "a").bfloat16().save_pretrained(tmp_path / "b")
    assert GPT.from_pretrained(tmp_path / "b", device="meta").lm_head.weight.dtype == torch.bfloat16
    assert GPT.from_pretrained(tmp_path / "b").lm_head.weight.dtype == torch.float32
    with pytest.raises(InputError, match="the blocks of a streamed model are not in memory"):
        GPT.from_pretrained(tmp_path / "a", stream=True).save_pretrained(tmp_path / "c")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text("{}")
    GPT.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "c", tokenizer_from=tmp_path / "other")
    assert {path.name for path in (tmp_path / "c").glob("tokenizer*")} == {"tokenizer.json"}
