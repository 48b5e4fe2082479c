"""What the tests share: the repository's root on the path, and where files beside the repository would be."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the Hub: a slip should fail at once, not wait for a network

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"  # models, texts and golden outputs that are no part of the repository
sys.path.insert(0, str(ROOT))


def make_checkpoint(folder, **changes):
    """A random two-layer LLaMA as a Hugging Face folder with a tokenizer of its own."""
    import torch
    from data.train_tiny import train_tokenizer
    from gpt import GPT, Config
    torch.manual_seed(0)
    raw = dict(model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=300, hidden_size=32, intermediate_size=56,
               num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_act="silu", rms_norm_eps=1e-5,
               rope_theta=10000.0, max_position_embeddings=64, tie_word_embeddings=False) | changes
    GPT(Config.from_dict(raw)).save_pretrained(folder)
    text = "the model reads words and the words are few so it can learn them by heart in no time at all\n" * 20
    train_tokenizer(folder / "tokenizer.model", text, vocab_size=300)
