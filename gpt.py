"""A LLaMA in one file: blocks, its relatives by configuration, generation.

The model is the decoder of LLaMA (Touvron et al. 2023): x = embed(ids); for every block
    x = x + attention(norm(x));   x = x + mlp(norm(x))
then logits = head(norm(x)). Norms are RMSNorm, positions are rotary embeddings in the split-half form (so that Hugging
Face weights load unchanged), several query heads may share one key/value head, the MLP is SwiGLU. Where a relative
(Mistral, Qwen, OPT, GPT-2) differs, a field of `Config` says how (data/config.py, which fills them from config.json).

Parameter names are those of Hugging Face's LLaMA whatever the family; every projection is an nn.Linear of its own. How
a model comes from a checkpoint and goes to one, whole or block by block, is in data/pretrained.py.

    python gpt.py --prompt "Return the value of"
    python gpt.py --model llama2-7b --prompt "The capital of France is"

Shapes: B batch, T tokens, S places in the cache, C = hidden_size, H query heads, K key/value heads, D head_dim.
"""

import argparse
import math
import time
from typing import Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from data import load_tokenizer
from data.command import InputError, at_least, parser, record, run, start, told_bytes
from data.config import ACTIVATIONS, Config
from data.device import free_memory, graphed
from data.pretrained import Pretrained
from data.tokenizer import encode_open, end_tokens


def norm(c):
    return (nn.LayerNorm if c.layer_norm else nn.RMSNorm)(c.hidden_size, eps=c.rms_norm_eps)


def rotary(config, positions):
    """cos and sin [T, D] of the angles by which positions [T] turn each pair (i, i + D/2) of a head's features, sin
    with the sign that `rotate` needs; None for a model whose positions are learned."""
    if config.positions:
        return None
    pairs = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim
    frequency = 1.0 / config.rope_theta ** pairs  # [D/2], radians per token
    scaling = config.rope_scaling
    if config.rope_kind == "linear":
        frequency = frequency / scaling["factor"]
    if config.rope_kind == "llama3":  # pairs that turn often in the original context keep their speed, slow ones do not
        turns = frequency * scaling["original_max_position_embeddings"] / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / scaling["factor"])
    angle = positions[:, None].float() * frequency  # [T, D/2]
    return torch.cat([angle, angle], -1).cos(), torch.cat([-angle, angle], -1).sin()


def rotate(x, cos, sin):
    """Turn the features of x [..., T, D] by the angles of `rotary`: (left, right) cos + (-right, left) sin."""
    return torch.addcmul(x * cos.to(x.dtype), x.roll(x.shape[-1] // 2, -1), sin.to(x.dtype))


def slorb(x, S, X):
    """(x X^T) S^T of x [..., in]: AST's low-rank boost. X sums k neighbouring inputs, each scaled; only its nonzeros
    are kept, [in]; S [out, in/k]."""
    return F.linear((x * X).unflatten(-1, (S.shape[1], -1)).sum(-1), S)


class SlorbLinear(nn.Linear):
    """y = x W^T + b + slorb(x, S, X) with a sparse W."""

    def __init__(self, in_features, out_features, bias, k):
        super().__init__(in_features, out_features, bias)
        self.slorb_S = nn.Parameter(torch.zeros(out_features, in_features // k))
        self.slorb_X = nn.Parameter(torch.ones(in_features))

    def forward(self, x):
        return super().forward(x) + slorb(x, self.slorb_S, self.slorb_X)


def linear(c, in_features, out_features, bias):
    """A linear layer of a block."""
    return (SlorbLinear(in_features, out_features, bias, c.slorb_k) if c.slorb_k
            else nn.Linear(in_features, out_features, bias))


class Attention(nn.Module):
    def __init__(self, c, reach=None):  # reach: over how many tokens, its own included; None: over all
        super().__init__()
        self.c, self.reach = c, reach
        self.q_proj = linear(c, c.hidden_size, c.num_attention_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = linear(c, c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = linear(c, c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = linear(c, c.num_attention_heads * c.head_dim, c.hidden_size, bias=c.o_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = (nn.RMSNorm(c.head_dim, c.rms_norm_eps) for _ in range(2))

    def forward(self, x, positions, rope, cache=None):
        B, T, _ = x.shape
        q, k, v = (p(x).view(B, T, -1, self.c.head_dim).transpose(1, 2)  # [B, H or K, T, D]
                   for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = (old.index_copy_(2, positions, new) for old, new in zip(cache, (k, v)))  # [B, K, S, D]
        mask = None
        if cache is not None or (self.reach and T > self.reach):
            here, keys = positions[:, None], torch.arange(k.shape[2], device=x.device)
            mask = keys <= here  # [T, S]
            if self.reach:
                mask &= keys > here - self.reach
        groups = self.c.num_attention_heads // self.c.num_key_value_heads
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)  # [B, H, S, D]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        if c.gated:
            self.gate_proj = linear(c, c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = linear(c, c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = linear(c, c.intermediate_size, c.hidden_size, bias=c.mlp_bias)
        self.gated, self.act = c.gated, ACTIVATIONS[c.activation]

    def forward(self, x):
        if self.gated:
            return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(self.act(self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, c, layer=0):
        super().__init__()
        self.self_attn = Attention(c, c.reaches[layer] if c.reaches else None)
        self.mlp = MLP(c)
        self.input_layernorm = norm(c)
        self.post_attention_layernorm = norm(c)
        self.post_norm = c.post_norm

    def forward(self, x, positions, rope, cache=None):
        """x [B, T, C] at positions [T] -> [B, T, C]. rope: rotary(config, positions). cache: this block's (keys,
        values) [B, K, S, D], written at `positions`; without one, x is the whole sequence."""
        return self.transform(self.attend(x, positions, rope, cache))

    def attend(self, x, positions, rope, cache=None):
        """The first half of the block."""
        if self.post_norm:
            return self.input_layernorm(x + self.self_attn(x, positions, rope, cache))
        return x + self.self_attn(self.input_layernorm(x), positions, rope, cache)

    def transform(self, x):
        """The second half."""
        if self.post_norm:
            return self.post_attention_layernorm(x + self.mlp(x))
        return x + self.mlp(self.post_attention_layernorm(x))


def prunable(block):
    """{name: nn.Linear} of a block: the layers that are pruned."""
    return {name: layer for name, layer in block.named_modules() if isinstance(layer, nn.Linear)}


def all_prunable(model):
    """The same of all blocks of a model, by their full names; those of a streamed one are on the meta device."""
    return {f"model.layers.{i}.{name}": layer for i, block in enumerate(model.model.layers)
            for name, layer in prunable(block).items()}


def layer_inputs(config):
    """{name: how many inputs it has} of the layers of a block that are pruned."""
    with torch.device("meta"):
        return {name: layer.in_features for name, layer in prunable(Block(config)).items()}


class GPT(nn.Module, Pretrained):
    """The model; `GPT.from_pretrained` loads one, `save_pretrained` writes it."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = c = config
        width = c.embed_size or c.hidden_size
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(c.vocab_size, width),
            layers=nn.ModuleList(Block(c, i) for i in range(c.num_hidden_layers)),
            norm=nn.Identity() if c.post_norm else norm(c)))
        if c.positions:
            self.model["embed_positions"] = nn.Embedding(c.position_offset + c.positions, c.hidden_size)
        if width != c.hidden_size:
            self.model["project_in"] = nn.Linear(width, c.hidden_size, bias=False)
            self.model["project_out"] = nn.Linear(c.hidden_size, width, bias=False)
        self.lm_head = nn.Linear(width, c.vocab_size, bias=False)
        self.tie()

    def tie(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self):
        return self.model.embed_tokens.weight.device

    def check_tokens(self, ids):
        """Raise InputError where a token is not in the vocabulary; a GPU would only say that an assert has failed."""
        if (wrong := ids[(ids < 0) | (ids >= self.config.vocab_size)]).numel():
            raise InputError(f"token {wrong[0]} is none of the model's {self.config.vocab_size}: "
                             f"the tokenizer is not its own")

    def embed(self, ids, positions=None):
        """ids [B, T], on a CPU or where the model is -> x [B, T, C]; learned positions [T] (None: from 0) are added
        where the model has them."""
        if not ids.is_cuda:  # there the check would wait for the GPU: whoever moves ids there checks them first
            self.check_tokens(ids)
        ids = ids.to(self.device)
        x = self.model.embed_tokens(ids)
        if "project_in" in self.model:
            x = self.model.project_in(x)
        if self.config.positions:
            self.check_length(ids.shape[1])
            positions = torch.arange(ids.shape[1], device=ids.device) if positions is None else positions
            x = x + self.model.embed_positions(positions + self.config.position_offset)
        return x

    def head(self, x):
        """x [B, T, C] -> logits [B, T, vocab]."""
        x = self.model.norm(x)
        return self.lm_head(self.model.project_out(x) if "project_out" in self.model else x)

    def forward(self, ids):
        """ids [B, T], on a CPU or where the model is -> logits [B, T, vocab]."""
        positions = torch.arange(ids.shape[1], device=self.device)
        return self.head(self.hidden(ids, positions, rotary(self.config, positions)))

    def hidden(self, ids, positions, rope, caches=None):
        """The last block's output [B, T, C] for ids [B, T] at positions [T]. With caches (one per block) only these
        tokens are new."""
        x = self.embed(ids, positions)
        rope = rope and [angles.to(x.dtype) for angles in rope]  # once, not in every block
        for i, block in enumerate(self.blocks()):
            x = block(x, positions, rope, caches[i] if caches else None)
            del block  # before the next one is read
        return x

    def check_length(self, tokens):
        """Raise InputError if a text of so many tokens has more positions than the model has learned."""
        if self.config.positions and tokens > self.config.positions:
            raise InputError(f"{tokens} tokens are too many for this model, which has learned {self.config.positions} "
                             f"positions: use fewer")

    # generation

    def new_caches(self, batch, length):
        """Empty keys and values for every block: [(keys, values)], each [B, K, length, D]. Raises InputError where
        memory is short."""
        c, w = self.config, self.model.embed_tokens.weight
        shape = (batch, c.num_key_value_heads, length, c.head_dim)
        need, free = 2 * c.num_hidden_layers * math.prod(shape) * w.itemsize, free_memory(w.device)
        if need > free:
            raise InputError(f"the keys and values of {length} tokens take {told_bytes(need)}, and {told_bytes(free)} "
                             f"are free on {w.device}: ask for fewer new tokens")
        return [(w.new_zeros(shape), w.new_zeros(shape)) for _ in self.model.layers]

    def sample(self, ids: Tensor, max_new_tokens: int, temperature: float = 1.0,
               top_k: int | None = None) -> Iterator[Tensor]:
        """Yield `max_new_tokens` times the next token [B, 1] of ids [B, T], an inference tensor. temperature 0 takes
        the most likely token; top_k samples among the k most likely ones. Raises InputError at once where the model
        can't read so much."""
        T = ids.shape[1]
        assert T > 0 and temperature >= 0 and (top_k is None or top_k > 0), (T, temperature, top_k)
        self.check_tokens(ids)
        self.check_length(T + max_new_tokens - 1)  # the last token is not read
        caches = self.new_caches(len(ids), T + max_new_tokens)
        return self._sampled(ids.to(self.device), caches, max_new_tokens, temperature, top_k)

    @torch.inference_mode()
    def _sampled(self, ids, caches, max_new_tokens, temperature, top_k):
        T = ids.shape[1]
        everywhere = torch.arange(T + max_new_tokens, device=ids.device)
        angles = rotary(self.config, everywhere)
        positions = everywhere[:T]

        def step(ids, positions):
            rope = angles and (angles[0][positions], angles[1][positions])
            return self.head(self.hidden(ids, positions, rope, caches)[:, -1]).float()

        for new in range(max_new_tokens):
            if new == 1 and ids.is_cuda and not self.streams:
                step = graphed(step, ids, positions)
            logits = step(ids, positions)  # [B, vocab]
            if new == 0 and not logits.isfinite().all():
                raise InputError("the model's output is NaN or infinite: its weights are ruined, or too large for its "
                                 "dtype")
            if top_k is not None:
                logits[logits < logits.topk(min(top_k, logits.shape[-1]))[0][:, -1:]] = -math.inf
            if temperature == 0:
                ids = logits.argmax(-1, keepdim=True)
            else:
                ids = torch.multinomial(((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1), 1)
            positions = positions[-1:] + 1
            yield ids

    def generate(self, ids: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
        """ids [B, T] -> ids [B, T + max_new_tokens]: `sample`, collected."""
        return torch.cat([ids.to(self.device), *self.sample(ids, max_new_tokens, temperature, top_k)], dim=1)


# -------------------------------------------------------------------------------------------------------- the command

def main():
    p = parser(__doc__)
    p.add_argument("--model", default="tiny", help="a preset (data/hub.py lists them), a Hub id or a folder")
    p.add_argument("--prompt", default="Return the value of", help="the text to continue")
    p.add_argument("--max-new-tokens", type=int, default=200, help="how many tokens to add, if no end of text comes")
    p.add_argument("--temperature", type=float, default=0.8, help="0: always the most likely token")
    p.add_argument("--top-k", type=int, default=50, help="sample among the k most likely tokens")
    p.add_argument("--sparse", action=argparse.BooleanOptionalAction, default=False,
                   help="keep 2:4 layers compressed and compute with them (sparse_matmul.py)")
    args = p.parse_args()
    start(args)
    at_least(args, max_new_tokens=1, top_k=1)
    if args.temperature and not 1e-6 <= args.temperature <= 1e6:
        raise InputError(f"--temperature {args.temperature} must be 0 or a number from 1e-6 to 1e6")
    if args.prompt != args.prompt.encode(errors="replace").decode():
        raise InputError(f"--prompt {ascii(args.prompt)} is no UTF-8 text")
    model = GPT.from_pretrained(args.model, device=args.device, sparse=args.sparse)
    tokenizer = load_tokenizer(model.source.folder)
    ids = encode_open(tokenizer, args.prompt)
    if not ids:
        raise InputError(f"--prompt {args.prompt!r} has no tokens")
    prompt, ends = torch.tensor([ids], device=args.device), end_tokens(model.source.folder)
    sampled = model.sample(prompt, args.max_new_tokens, args.temperature, args.top_k)
    begin, shown = time.perf_counter(), len(tokenizer.decode(ids))
    print(tokenizer.decode(ids), end="", flush=True)
    for token in sampled:
        ids.append(token.item())
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # a character of several tokens is shown when it is whole
            print(text[shown:], end="", flush=True)
            shown = len(text)
        if ids[-1] in ends:
            break
    new = len(ids) - prompt.shape[1]
    seconds, beyond = time.perf_counter() - begin, model.config.remark(len(ids))
    remark = f"; {len(ids)} with the prompt{beyond}" if beyond else ""
    print(f"\n\n{new} token{'s' * (new != 1)} in {seconds:.2f} s, {new / seconds:.1f} tokens/s on {args.device}"
          f"{remark}")
    record(args, {"text": tokenizer.decode(ids), "tokens_per_second": new / seconds})


if __name__ == "__main__":
    run(main)
