"""What the tests share: the repository's root on the path, and where files beside the repository would be."""

import os
import random
import sys
import weakref
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the Hub: a slip should fail at once, not wait for a network

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"  # models, texts and golden outputs that are no part of the repository
sys.path.insert(0, str(ROOT))


@pytest.fixture
def blocks_read(monkeypatch):
    """The names of the blocks that have been read from checkpoints; fails where one is read while another is in
    memory."""
    from data.checkpoint import Checkpoint
    from gpt import Block
    load, alive, read = Checkpoint.load, [], []

    def watched(source, module, prefix, **place):
        if isinstance(module, Block):
            assert not any(one() for one in alive), f"another block is in memory while {prefix} is read"
            read.append(prefix)
        load(source, module, prefix, **place)
        if isinstance(module, Block):
            alive[:] = [weakref.ref(p.untyped_storage()) for p in module.parameters()]

    monkeypatch.setattr(Checkpoint, "load", watched)
    return read


def make_checkpoint(folder, **changes):
    """A random two-layer LLaMA as a Hugging Face folder with a tokenizer of its own."""
    import torch
    from data.train_tiny import train_tokenizer
    from gpt import GPT, Config
    torch.manual_seed(0)
    raw = dict(model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=300, hidden_size=32,
               intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
               hidden_act="silu", rms_norm_eps=1e-5, rope_theta=10000.0, max_position_embeddings=64,
               tie_word_embeddings=False) | changes
    GPT(Config.from_dict(raw)).save_pretrained(folder)
    text = "the model reads words and the words are few so it can learn them by heart in no time at all\n" * 20
    train_tokenizer(folder / "tokenizer.model", text, vocab_size=300)


@pytest.fixture
def folder(tmp_path):
    """A small LLaMA's folder to damage."""
    from test_gpt import theirs
    theirs("llama", {}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder that make_checkpoint made."""
    folder = tmp_path_factory.mktemp("model") / "random"
    make_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a small model, m, and text.txt to calibrate and measure on."""
    folder = tmp_path_factory.mktemp("model")
    make_checkpoint(folder / "m")
    words = "the model reads words and the words are few so it can learn them by heart in no time at all".split()
    rng = random.Random(0)
    (folder / "text.txt").write_text("\n".join(" ".join(rng.choices(words, k=12)) for _ in range(400)))
    return folder
