"""What a config.json says of a model, whatever its family: the fields of `Config`.

FAMILIES puts a file into the words of LLaMA's; `described` makes the fields of it, with the Hub's default for what an
older file leaves out; `check` refuses what gpt.py does not compute, above all what would run and be wrong.
"""

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch.nn.functional as F

from data.command import InputError

TANH = partial(F.gelu, approximate="tanh")
ACTIVATIONS = {"silu": F.silu, "swish": F.silu, "relu": F.relu, "gelu": F.gelu, "gelu_python": F.gelu, "gelu_new": TANH,
               "gelu_pytorch_tanh": TANH}
ROPE_KINDS = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                                                               "original_max_position_embeddings")}


@dataclass
class Config:
    """What config.json says about the shape of a model; `raw` is the file itself, which is written back."""
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
    # what some checkpoints and the relatives change; the values here are those of the first LLaMA
    rope_scaling: dict = field(default_factory=dict)  # rotary angles for longer contexts: "llama3" or "linear"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm of every query and key head
    reaches: tuple = ()  # for every layer, to how many tokens attention reaches, itself included; None: to all
    activation: str = "silu"
    gated: bool = True  # down(act(gate(x)) * up(x)), else down(act(up(x)))
    layer_norm: bool = False  # LayerNorm with a bias instead of RMSNorm
    post_norm: bool = False  # norm(x + f(x)) instead of x + f(norm(x)), and no norm before the head
    positions: int = 0  # so many learned position embeddings instead of rotary ones
    position_offset: int = 0  # the row of the first position in their table
    embed_size: int | None = None  # narrower embedding and head, projected to and from hidden_size
    slorb_k: int = 0  # SLoRB beside every linear layer of a block (ast_method.py), a sum over so many inputs; 0: none

    @classmethod
    def read(cls, folder):
        """The configuration of a model's folder. Raises InputError where there is none."""
        path = Path(folder) / "config.json"
        try:
            return cls.from_dict(json.loads(path.read_text("utf-8")))
        except OSError as e:
            raise InputError(f"{path} can't be read: {e.strerror}") from None
        except InputError:
            raise
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError, ZeroDivisionError) as e:
            raise InputError(f"{path} is not a model's configuration: {type(e).__name__} {e}") from None

    @classmethod
    def from_dict(cls, raw):
        """raw: the content of a config.json. Raises InputError where it is not one that gpt.py can run, KeyError
        where a size is missing."""
        found = described(raw)
        config = cls(raw=raw, **{name: found[name] for name in cls.__dataclass_fields__ if name in found})
        check(config)
        return config

    @property
    def context_length(self):
        """The most tokens that the model is made for."""
        return self.positions or self.raw.get("max_position_embeddings") or 2048

    def window_length(self):
        """The pruning papers' 2048 tokens, or what a smaller model is made for; two at least, one of which is
        predicted."""
        return max(2, min(2048, self.context_length))

    def remark(self, tokens):
        """Where so many tokens are more than the model is made for, that; else nothing."""
        most = self.context_length
        return f", more than the {most} that the model is made for" if tokens > most else ""

    @property
    def rope_kind(self):
        return self.rope_scaling.get("rope_type", self.rope_scaling.get("type", "default"))


def qwen(raw):
    return dict(first_sliding_layer=raw.get("max_window_layers", 28), sliding_window=raw.get("sliding_window", 4096),
                use_sliding_window=raw.get("use_sliding_window", False), layer_types=raw.get("layer_types"),
                num_key_value_heads=raw.get("num_key_value_heads", 32), mlp_bias=False)


FAMILIES = {  # by model_type: what a config.json says, in LLaMA's words and in the fields of Config
    "llama": lambda raw: {},
    "mistral": lambda raw: dict(
        use_sliding_window=True, sliding_window=raw.get("sliding_window", 4096), first_sliding_layer=0,
        layer_types=raw.get("layer_types"), num_key_value_heads=raw.get("num_key_value_heads", 8),
        attention_bias=False, mlp_bias=False),
    "qwen2": lambda raw: dict(qkv_bias=True, attention_bias=False, **qwen(raw)),
    "qwen3": lambda raw: dict(qk_norm=True, head_dim=raw.get("head_dim", 128), **qwen(raw)),
    "opt": lambda raw: dict(
        intermediate_size=raw["ffn_dim"], hidden_act=raw.get("activation_function", "relu"), gated=False,
        rms_norm_eps=1e-5, attention_bias=raw.get("enable_bias", True), mlp_bias=raw.get("enable_bias", True),
        layer_norm=True, post_norm=not raw.get("do_layer_norm_before", True),
        positions=raw["max_position_embeddings"], position_offset=2, embed_size=raw.get("word_embed_proj_dim"),
        num_key_value_heads=None, head_dim=None, tie_word_embeddings=raw.get("tie_word_embeddings", True)),
    "gpt2": lambda raw: dict(
        hidden_size=raw["n_embd"], intermediate_size=raw.get("n_inner") or 4 * raw["n_embd"], gated=False,
        num_hidden_layers=raw["n_layer"], num_attention_heads=raw["n_head"],
        hidden_act=raw.get("activation_function", "gelu_new"), rms_norm_eps=raw.get("layer_norm_epsilon", 1e-5),
        attention_bias=True, mlp_bias=True, layer_norm=True, positions=raw["n_positions"], num_key_value_heads=None,
        head_dim=None, tie_word_embeddings=raw.get("tie_word_embeddings", True)),
}

# what a config.json may also ask for, and the only value that is computed here
UNUSUAL = {"quantization_config": None, "partial_rotary_factor": 1.0, "layer_norm_elementwise_affine": True,
           "_remove_final_layer_norm": False, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
           "add_cross_attention": False, "is_causal": True, "per_layer_config": None}


def described(raw):
    """{field of Config: value} and more, from `raw`, the content of a config.json. Raises InputError where
    a family or a kind of layer is unknown, KeyError where a size is missing."""
    if raw.get("model_type") not in FAMILIES:
        raise InputError(f"config.json: model_type {raw.get('model_type')!r} is not supported "
                         f"({', '.join(FAMILIES)} are)")
    ours = FAMILIES[raw["model_type"]](raw)
    no_windows = dict(use_sliding_window=False, layer_types=None)  # unless the family knows them
    said = {"hidden_act": "silu", **raw, **no_windows, **ours}  # in LLaMA's words; what comes later wins
    heads, layers, bias = said["num_attention_heads"], said["num_hidden_layers"], said.get("attention_bias", False)
    check_whole("num_hidden_layers", layers, 5)  # before lists of so many are made
    rope = said.get("rope_scaling") or said.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise InputError(f"config.json: the rotary scaling {rope!r} is no JSON object")
    rope = rope | {"original_max_position_embeddings": (
        said.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        or said.get("max_position_embeddings"))}
    reach = said.get("sliding_window") if said.get("use_sliding_window") else None
    first = min(said.get("first_sliding_layer", layers), layers)
    kinds = said.get("layer_types") or ["full_attention"] * first + ["sliding_attention"] * (layers - first)
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise InputError(f"config.json: layer_types {kind!r} is not supported "
                             f"(full_attention and sliding_attention are)")
    return ours | dict(
        vocab_size=said["vocab_size"], hidden_size=said["hidden_size"], intermediate_size=said["intermediate_size"],
        num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=said.get("num_key_value_heads") or heads,
        head_dim=said.get("head_dim") or said["hidden_size"] // heads,
        rms_norm_eps=said.get("rms_norm_eps", 1e-6),  # the Hub's own default where a file leaves it out
        rope_theta=rope.get("rope_theta") or said.get("rope_theta") or 10000.0, rope_scaling=rope,
        tie_word_embeddings=said.get("tie_word_embeddings", False),
        qkv_bias=ours.get("qkv_bias", bias), o_bias=bias, mlp_bias=said.get("mlp_bias", False),
        reaches=tuple(reach if kind == "sliding_attention" else None for kind in kinds),
        activation=said["hidden_act"], slorb_k=raw.get("slorb_k", 0))


def check(config):
    """Raise InputError where config.json asks for something that gpt.py does not compute."""
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
                 "head_dim", "positions" if config.layer_norm else "context_length"):
        check_whole(name, getattr(config, name), 8)
    if config.embed_size is not None:
        check_whole("embed_size", config.embed_size, 8)
    for name in ("tie_word_embeddings", "attention_bias", "mlp_bias", "enable_bias", "use_sliding_window",
                 "do_layer_norm_before"):
        if (asked := config.raw.get(name)) not in (None, True, False):
            raise InputError(f"config.json: {name} {asked!r} is neither true nor false")
    if type(config.slorb_k) is not int or config.slorb_k < 0:
        raise InputError(f"config.json: slorb_k {config.slorb_k!r} is not a whole number from 0")
    for name in "rms_norm_eps", "rope_theta":
        if type(value := getattr(config, name)) not in (int, float) or not 0 < value < 1e30:
            raise InputError(f"config.json: {name} {value!r} is not a positive number")
    if config.num_attention_heads % config.num_key_value_heads:
        raise InputError(f"config.json: {config.num_attention_heads} attention heads can't share "
                         f"{config.num_key_value_heads} key/value heads evenly")
    if config.reaches and len(config.reaches) != config.num_hidden_layers:
        raise InputError(f"config.json: layer_types names {len(config.reaches)} of {config.num_hidden_layers} layers")
    for reach in set(config.reaches) - {None}:
        check_whole("sliding_window", reach, 8)
    if config.activation not in ACTIVATIONS:
        raise InputError(f"config.json: activation {config.activation!r} is not supported ({', '.join(ACTIVATIONS)} "
                         f"are)")
    check_rotary(config)
    for name, usual in UNUSUAL.items():
        if (asked := (config.rope_scaling | config.raw).get(name)) not in (None, usual):
            raise InputError(f"config.json: {name} {asked!r} is not supported")


def check_rotary(config):
    """`check` of the rotary embeddings and what stretches them for longer contexts."""
    scaling = config.rope_scaling
    if config.head_dim % 2 and not config.positions:
        raise InputError(f"config.json: rotary embeddings need an even head_dim, not {config.head_dim}")
    if config.rope_kind not in ROPE_KINDS:
        raise InputError(f"config.json: rotary scaling {config.rope_kind!r} is not supported "
                         f"({', '.join(ROPE_KINDS)} are)")
    for name in ROPE_KINDS[config.rope_kind]:
        if type(value := scaling.get(name)) not in (int, float) or not 0 < value < 1e30:
            raise InputError(f"config.json: {name} is missing or not positive in the rotary scaling {scaling}")
    if config.rope_kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise InputError(f"config.json: low_freq_factor is not below high_freq_factor in {scaling}")


def check_whole(name, value, power):
    """Raise InputError where a number of config.json is no whole one from 1 to 10^power."""
    if type(value) is not int or not 0 < value <= 10**power:
        raise InputError(f"config.json: {name} {value!r} is not a whole number from 1 to 10^{power}")
