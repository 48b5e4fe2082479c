"""A LLaMA in one file: configuration, blocks, checkpoints, generation.

The model is the decoder of LLaMA (Touvron et al. 2023): x = embed(ids); for every block
    x = x + attention(norm(x));   x = x + mlp(norm(x))
then logits = head(norm(x)). Norms are RMSNorm, positions are rotary embeddings in the split-half form (so that Hugging
Face weights load unchanged), several query heads may share one key/value head, the MLP is SwiGLU. Which of its
relatives a checkpoint is, its config.json says; nothing about a checkpoint is assumed here.

Parameter names are those of Hugging Face's LLaMA, and a checkpoint is a Hugging Face folder: what is saved here loads in
`transformers` and the other way round. Blocks can be read one at a time (`stream=True`), so a model may be larger than
memory.

    python gpt.py --prompt "Return the"
    python gpt.py --model llama2-7b --prompt "The capital of France is"

Shapes: B batch, T tokens, S tokens in the cache, C = hidden_size, H query heads, K key/value heads, D head_dim.
"""

import json
import math
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data import load_tokenizer
from data.command import InputError, parser, record, run, start, write_atomically
from data.hub import model_folder


@dataclass
class Config:
    """What config.json says about the shape of a model; `raw` is the file itself, written back unchanged."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    raw: dict = field(repr=False, default_factory=dict)

    @classmethod
    def from_dict(cls, raw):
        """raw: the content of a config.json. Raises InputError where it is not one that this file can run."""
        if raw.get("model_type") != "llama":
            raise InputError(f"config.json: model_type {raw.get('model_type')!r} is not supported (llama is)")
        if raw.get("hidden_act", "silu") != "silu":
            raise InputError(f"config.json: hidden_act {raw['hidden_act']!r} is not supported (silu is)")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise InputError(f"config.json: rotary scaling {rope} is not supported")
        heads = raw["num_attention_heads"]
        return cls(
            vocab_size=raw["vocab_size"], hidden_size=raw["hidden_size"], intermediate_size=raw["intermediate_size"],
            num_hidden_layers=raw["num_hidden_layers"], num_attention_heads=heads,
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),  # the Hub's own default where a file leaves it out
            rope_theta=rope.get("rope_theta", raw.get("rope_theta", 10000.0)),
            tie_word_embeddings=raw.get("tie_word_embeddings", False), raw=raw)


# ------------------------------------------------------------------------------------------------------ the model

class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)  # float32 whatever x is
        return self.weight * normed.to(x.dtype)


def rotary(config, positions):
    """cos and sin [T, D] of the angles by which positions [T] turn each pair (i, i + D/2) of a head's features."""
    pairs = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim
    angle = positions[:, None].float() * (1.0 / config.rope_theta ** pairs)  # [T, D/2]
    return torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()


def rotate(x, cos, sin):
    """Turn the features of x [..., T, D] by the angles of `rotary`."""
    left, right = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-right, left], -1) * sin.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x, positions, rope, cache=None):
        B, T, _ = x.shape
        q, k, v = (p(x).view(B, T, -1, self.c.head_dim).transpose(1, 2)  # [B, H or K, T, D]
                   for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *rope), rotate(k, *rope)
        mask = None
        if cache is not None:
            k, v = (old.index_copy_(2, positions, new) for old, new in zip(cache, (k, v)))  # [B, K, S, D]
            mask = positions[:, None] >= torch.arange(k.shape[2], device=x.device)  # [T, S]
        groups = self.c.num_attention_heads // self.c.num_key_value_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)  # [B, H, S, D]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=cache is None)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, positions, rope, cache=None):
        """x [B, T, C] at positions [T] -> [B, T, C]. rope: rotary(config, positions). cache: this block's (keys, values)
        [B, K, S, D], written at `positions`; without one, x is the whole sequence."""
        x = x + self.self_attn(self.input_layernorm(x), positions, rope, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(c.vocab_size, c.hidden_size),
            layers=nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers)),
            norm=RMSNorm(c.hidden_size, c.rms_norm_eps)))
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        if c.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def embed(self, ids):
        return self.model.embed_tokens(ids)

    def head(self, x):
        return self.lm_head(self.model.norm(x))

    def forward(self, ids, positions=None, caches=None):
        """ids [B, T] -> logits [B, T, vocab]. With caches (one per block) only the tokens at `positions` [T] are new."""
        positions = torch.arange(ids.shape[1], device=ids.device) if positions is None else positions
        x, rope = self.embed(ids), rotary(self.config, positions)
        for i, block in enumerate(self.model.layers):
            x = block(x, positions, rope, caches[i] if caches else None)
        return self.head(x)

    # generation

    def new_caches(self, batch, length):
        """Empty keys and values for every block: [(keys, values)], each [B, K, length, D]."""
        c, w = self.config, self.model.embed_tokens.weight
        shape = (batch, c.num_key_value_heads, length, c.head_dim)
        return [(w.new_zeros(shape), w.new_zeros(shape)) for _ in self.model.layers]

    @torch.inference_mode()
    def stream(self, ids, max_new_tokens, temperature=1.0, top_k=None):
        """Yield `max_new_tokens` times the next token [B, 1] of ids [B, T]. temperature 0 takes the most likely token;
        top_k samples among the k most likely ones."""
        T = ids.shape[1]
        caches = self.new_caches(ids.shape[0], T + max_new_tokens)
        positions = torch.arange(T, device=ids.device)
        for _ in range(max_new_tokens):
            logits = self(ids, positions, caches)[:, -1].float()  # [B, vocab]
            if top_k is not None:
                logits[logits < logits.topk(min(top_k, logits.shape[-1]))[0][:, -1:]] = -math.inf
            if temperature == 0:
                ids = logits.argmax(-1, keepdim=True)
            else:
                ids = torch.multinomial((logits / temperature).softmax(-1), 1)
            positions = positions[-1:] + 1
            yield ids

    def generate(self, ids, max_new_tokens, temperature=1.0, top_k=None):
        """ids [B, T] -> ids [B, T + max_new_tokens]: `stream`, collected."""
        return torch.cat([ids, *self.stream(ids, max_new_tokens, temperature, top_k)], dim=1)

    # checkpoints

    @classmethod
    def from_pretrained(cls, name_or_dir, device="cpu", dtype=None, stream=False):
        """Load a preset, a Hub id or a Hugging Face folder. dtype None: the checkpoint's own on a GPU, float32 on a CPU.
        stream=True leaves the blocks on disk for `blocks()` to read one by one.
        Raises InputError where a tensor is missing, superfluous, of another shape or not finite."""
        checkpoint = Checkpoint(model_folder(name_or_dir))
        if dtype is None and torch.device(device).type == "cpu":
            dtype = torch.float32
        with torch.device("meta"):
            model = cls(checkpoint.config)
        model.source, model.streams = checkpoint, stream
        model.place = dict(device=device, dtype=dtype)
        for name, part in [("model.embed_tokens", model.model.embed_tokens), ("model.norm", model.model.norm),
                           ("lm_head", model.lm_head)]:
            if name == "lm_head" and model.config.tie_word_embeddings:
                model.lm_head.weight = model.model.embed_tokens.weight
            else:
                checkpoint.load(part, name, **model.place)
        if not stream:
            for i, block in enumerate(model.model.layers):
                checkpoint.load(block, f"model.layers.{i}", **model.place)
        return model.eval()

    def blocks(self):
        """The blocks in order; a streamed model reads each from disk when its turn comes and forgets it afterwards."""
        for i, block in enumerate(self.model.layers):
            if self.streams:
                with torch.device("meta"):
                    block = Block(self.config)
                self.source.load(block.eval(), f"model.layers.{i}", **self.place)
            yield block

    def save_pretrained(self, dir, tokenizer_from=None):
        """Write a Hugging Face folder: config.json, model.safetensors, and the tokenizer files of another folder (None: of
        the one that the model was loaded from)."""
        tensors = {k: v for k, v in self.state_dict().items() if not (k == "lm_head.weight" and self.config.tie_word_embeddings)}
        dtype = str(self.lm_head.weight.dtype).removeprefix("torch.")
        with CheckpointWriter(dir, self.config.raw | {"torch_dtype": dtype},
                              tokenizer_from or (self.source and self.source.folder)) as out:
            out.write("model.safetensors", tensors)

    source, streams = None, False  # the checkpoint that from_pretrained read


# --------------------------------------------------------------------------------------------------- checkpoints

TOKENIZER_FILES = ["tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
                   "merges.txt", "generation_config.json"]


class Checkpoint:
    """A Hugging Face folder opened for reading: `config`, and tensors read from safetensors when they are asked for.

    Opening reads only headers and compares them with the model's parameters, so a checkpoint that does not fit is
    refused before any work is done."""

    def __init__(self, folder):
        self.folder = Path(folder)
        try:
            self.config = Config.from_dict(json.loads((self.folder / "config.json").read_text()))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as e:
            raise InputError(f"{self.folder / 'config.json'} is not a model's configuration: {type(e).__name__} {e}") from None
        with torch.device("meta"):
            model = GPT(self.config)
        self.files, self.shapes = self._headers()
        tied = {"lm_head.weight"} if self.config.tie_word_embeddings else set()
        wanted = {k: tuple(v.shape) for k, v in model.state_dict().items() if k not in tied}
        found = {k for k in self.files if k not in tied and not k.endswith("rotary_emb.inv_freq")}  # old files carry the latter
        for name in sorted(wanted.keys() | found):
            if name not in found:
                raise InputError(f"{self.folder}: the tensor {name} is missing; is the download complete?")
            if name not in wanted:
                raise InputError(f"{self.folder}: the tensor {name} has no place in this model; is config.json the right one?")
            if self.shapes[name] != wanted[name]:
                raise InputError(f"{self.folder}: {name} has shape {self.shapes[name]}, config.json implies {wanted[name]}")

    def _headers(self):
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (json.JSONDecodeError, KeyError, AttributeError) as e:
                raise InputError(f"{index} is not an index of safetensors files: {type(e).__name__} {e}") from None
        else:
            names = ["model.safetensors"]
        files, shapes = {}, {}
        for name in names:
            for tensor, view in self._open(self.folder / name, lambda f: [(k, f.get_slice(k)) for k in f.keys()]):
                files[tensor], shapes[tensor] = self.folder / name, tuple(view.get_shape())
        return files, shapes

    def _open(self, path, read):
        try:
            with safe_open(path, framework="pt") as f:
                return read(f)
        except FileNotFoundError:
            raise InputError(f"{path} is missing; is the download complete?") from None
        except (SafetensorError, OSError) as e:
            raise InputError(f"{path} can't be read, it is truncated or damaged ({e}); fetch it again") from None

    def tensor(self, name):
        """One tensor as it is on disk. Raises InputError if a value is not finite."""
        value = self._open(self.files[name], lambda f: f.get_tensor(name))
        if not value.isfinite().all():
            raise InputError(f"{self.files[name]}: {name} holds NaN or infinite values")
        return value

    def load(self, module, prefix, device, dtype):
        """Fill all parameters of a module (on the meta device) with the tensors below `prefix`."""
        state = {k: self.tensor(f"{prefix}.{k}").to(device=device, dtype=dtype) for k in module.state_dict()}
        module.load_state_dict(state, assign=True)


class CheckpointWriter:
    """Writes a Hugging Face folder beside its final place; leaving the `with` block renames it, an error removes it.

    `keep` names the run: with it, the files that an interrupted run of the same name has finished are kept and `done`
    tells which they are."""

    def __init__(self, folder, raw_config, tokenizer_from=None, keep=None):
        self.folder, self.raw, self.keep = Path(folder), raw_config, keep
        self.partial = self.folder.absolute().with_name(self.folder.absolute().name + ".partial")
        self.tokenizer_from = tokenizer_from
        if tokenizer_from and self.folder.exists() and self.folder.samefile(tokenizer_from):
            raise InputError(f"{folder} is the model that is being read: choose another output folder")
        if self.folder.is_file() or (self.folder.is_dir() and any(self.folder.iterdir())
                                     and not (self.folder / "config.json").is_file()):
            raise InputError(f"{folder} exists and is no model folder: choose another output folder")

    def __enter__(self):
        marker = self.partial / "run.json"
        try:
            if self.keep is None or not marker.is_file() or json.loads(marker.read_text()) != self.keep:
                shutil.rmtree(self.partial, ignore_errors=True)
                self.partial.mkdir(parents=True)
                marker.write_text(json.dumps(self.keep))
        except OSError as e:
            raise InputError(f"can't write {self.partial}: {e.strerror or e}") from None
        return self

    def done(self, file):
        return (self.partial / file).is_file()

    def write(self, file, tensors):
        """Write one safetensors file, whole or not at all."""
        tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}

        def write(path):
            try:
                save_file(tensors, path, metadata={"format": "pt"})
            except SafetensorError as e:
                raise OSError(str(e)) from None
        write_atomically(self.partial / file, write)

    def __exit__(self, kind, error, trace):
        if kind is not None:
            if self.keep is None or not any(self.partial.glob("*.safetensors")):
                shutil.rmtree(self.partial, ignore_errors=True)
            return
        shards = sorted(self.partial.glob("*.safetensors"))
        if [s.name for s in shards] != ["model.safetensors"]:
            weights, size = {}, 0
            for shard in shards:
                with safe_open(shard, framework="pt") as f:
                    weights |= dict.fromkeys(f.keys(), shard.name)
                size += shard.stat().st_size
            index = json.dumps({"metadata": {"total_size": size}, "weight_map": weights}, indent=1)
            write_atomically(self.partial / "model.safetensors.index.json", lambda path: path.write_text(index))
        write_atomically(self.partial / "config.json", lambda path: path.write_text(json.dumps(self.raw, indent=1) + "\n"))
        for name in TOKENIZER_FILES:
            if self.tokenizer_from and (Path(self.tokenizer_from) / name).is_file():
                write_atomically(self.partial / name, lambda path: shutil.copyfile(Path(self.tokenizer_from) / name, path))
        (self.partial / "run.json").unlink()
        if self.folder.is_dir():
            shutil.rmtree(self.folder)
        self.partial.rename(self.folder)


# ---------------------------------------------------------------------------------------------------- the command

def main():
    p = parser(__doc__)
    p.add_argument("--model", default="tiny", help="a preset, a Hub id or a folder")
    p.add_argument("--prompt", default="Return the", help="the text to continue")
    p.add_argument("--max-new-tokens", type=int, default=200)
    p.add_argument("--temperature", type=float, default=0.8, help="0: always the most likely token")
    p.add_argument("--top-k", type=int, default=50, help="sample among the k most likely tokens")
    args = p.parse_args()
    start(args)
    if args.max_new_tokens < 1 or args.temperature < 0 or args.top_k < 1:
        raise InputError("--max-new-tokens and --top-k must be at least 1, --temperature at least 0")
    model = GPT.from_pretrained(args.model, device=args.device)
    tokenizer = load_tokenizer(args.model)
    ids = tokenizer.encode(args.prompt)
    if not ids:
        raise InputError(f"--prompt {args.prompt!r} has no tokens")
    begin, shown = time.perf_counter(), len(tokenizer.decode(ids))
    print(tokenizer.decode(ids), end="", flush=True)
    for token in model.stream(torch.tensor([ids], device=args.device), args.max_new_tokens, args.temperature, args.top_k):
        ids.append(token.item())
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # a character of several tokens is shown when it is whole
            print(text[shown:], end="", flush=True)
            shown = len(text)
    seconds = time.perf_counter() - begin
    print(f"\n\n{args.max_new_tokens} tokens in {seconds:.2f} s, {args.max_new_tokens / seconds:.1f} tokens/s on {args.device}")
    record(args, {"text": tokenizer.decode(ids), "tokens_per_second": args.max_new_tokens / seconds})


if __name__ == "__main__":
    run(main)
