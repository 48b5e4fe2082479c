"""A model's folder on disk: config.json, safetensors files and a tokenizer, as the Hugging Face Hub has them.

`Layout` is what the files of a family call our tensors and how they lay them out; `Checkpoint` reads tensors one at a
time, so that a model may be larger than memory. `data/writer.py` writes such a folder.
"""

import json
import math
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from data.command import InputError, told_bytes

TOKENIZER_FILES = ["tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json"]
PROJECTION = re.compile(r"\.(self_attn|mlp)\.\w+\.(weight|bias|slorb_S|slorb_X|values|meta|scale)$")
BUFFERS = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(bias|masked_bias)$")  # constants that old files carry along


# -------------------------------------------------------------------------------------------------- names and layouts

@dataclass
class Layout:
    """What a family's files call our tensors: `names` turn our names, which are LLaMA's, into its own, one after the
    other. conv1d: the weights of a block's projections are transposed, and q, k, v are one tensor, c_attn."""
    names: tuple = ()
    conv1d: bool = False

    def name(self, ours):
        for old, new in self.names:
            ours = ours.replace(old, new)
        return ours

    def theirs(self, tensors):
        """Our tensors {name: tensor} under the family's names and in its layout; q, k, v of a layer come together."""
        groups, found = {}, {}  # groups: {their name: {our name: tensor}}
        for name, value in tensors.items():
            transposed = self.conv1d and PROJECTION.search(name)  # a bias has one dimension
            groups.setdefault(self.name(name), {})[name] = value.t() if transposed else value
        for name, parts in groups.items():
            assert len(parts) == (3 if "c_attn" in name else 1), f"{name} needs q, k and v, not only {list(parts)}"
            ordered = [parts[k] for k in (sorted(parts, key=which) if "c_attn" in name else parts)]
            found[name] = torch.cat(ordered, -1) if len(ordered) > 1 else ordered[0]
        return found

    def ours(self, name, value):
        """The tensor that we call `name` out of the family's `value`."""
        if not (self.conv1d and PROJECTION.search(name)):
            return value
        return (value.chunk(3, -1)[which(name)] if "c_attn" in self.name(name) else value).t()


def which(name):
    """Which of q, k, v a tensor belongs to."""
    return ("q_proj", "k_proj", "v_proj").index(name.split(".")[-2])


def bare(name):
    """A tensor's name without the prefixes that files of the same family have or lack."""
    return re.sub(r"^(model\.|decoder\.|transformer\.)*", "", name)


LAYOUTS = {  # of the families that do not keep to LLaMA's, by model_type
    "opt": Layout(
        names=(("model.norm", "model.final_layer_norm"), ("model.", "model.decoder."), (".mlp.up_proj", ".fc1"),
               (".mlp.down_proj", ".fc2"), ("self_attn.o_proj", "self_attn.out_proj"),
               ("input_layernorm", "self_attn_layer_norm"), ("post_attention_layernorm", "final_layer_norm"))),
    "gpt2": Layout(
        names=(("model.embed_tokens", "transformer.wte"), ("model.embed_positions", "transformer.wpe"),
               ("model.norm", "transformer.ln_f"), ("model.layers", "transformer.h"), ("input_layernorm", "ln_1"),
               ("post_attention_layernorm", "ln_2"), ("self_attn.q_proj", "attn.c_attn"),
               ("self_attn.k_proj", "attn.c_attn"), ("self_attn.v_proj", "attn.c_attn"),
               ("self_attn.o_proj", "attn.c_proj"), ("mlp.up_proj", "mlp.c_fc"), ("mlp.down_proj", "mlp.c_proj")),
        conv1d=True),
}


def layout_of(raw):
    """The Layout of a model with this config.json."""
    return LAYOUTS.get(raw["model_type"], Layout())


# ------------------------------------------------------------------------------------------------------------ reading

def read_tensors(path, names=None):
    """{name: tensor} of a safetensors or a PyTorch file, all or some; memory-mapped: only what is touched is read."""
    if not path.is_file():
        raise InputError(f"{path} is missing; is the download complete?")
    path.open("rb").close()  # tells where it may not be read, which safetensors calls something else
    try:
        if path.suffix == ".bin":  # files from before torch 1.6 are no zip archives and can't be mapped
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            if not all(isinstance(name, str) and torch.is_tensor(value) and value.layout is torch.strided
                       and value.device.type == "cpu" for name, value in tensors.items()):
                raise ValueError("it holds more than dense tensors")
            return {k: tensors[k] for k in (tensors if names is None else names)}
        with safe_open(path, framework="pt") as f:
            return {k: f.get_tensor(k) for k in (f.keys() if names is None else names)}
    except Exception as e:  # a damaged pickle can raise anything
        reason = str(e).split("\n")[0]
        if "Cannot allocate memory" in reason:
            raise InputError(f"{path} of {told_bytes(path.stat().st_size)} can't be mapped: Linux maps no file that is "
                             f"larger than memory and swap; add swap, or run `sudo sysctl vm.overcommit_memory=1`"
                             ) from None
        raise InputError(f"{path} can't be read, it is truncated or damaged ({reason}); fetch it again") from None


def weight_files(folder):
    """safetensors where there are any, else pytorch_model*.bin; with an index, the files that it names."""
    names = ["model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin"]
    path = next((folder / name for name in names if (folder / name).is_file()), folder / "model.safetensors")
    if path.suffix != ".json":
        if not path.is_file() and (parts := sorted(folder.glob("*model-*-of-*"))):
            index = names[0] if parts[0].suffix == ".safetensors" else names[2]
            raise InputError(f"{folder} holds {parts[0].name}, but not {index}, which tells what else there is; is the "
                             f"download complete?")
        return [path]
    try:
        named = sorted(set(json.loads(path.read_text("utf-8"))["weight_map"].values()))
        other = path.with_suffix("").with_suffix("")  # model.safetensors, pytorch_model.bin
        if other.is_file() and other.name not in named:
            raise InputError(f"{folder} holds one model in {other.name} and another in the files that {path.name} "
                             f"names: delete the one that is not meant")
        return [folder / name for name in named]
    except InputError:
        raise
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{path} is not an index of weights: {type(e).__name__} {e}") from None


class Checkpoint:
    """A folder opened for reading: tensors under our names, read when they are asked for.

    Opening reads only headers (of a .bin older than PyTorch 1.6, everything); `match` compares them with what the model
    needs, so a checkpoint that does not fit is refused before any work is done. After that, `files` {name: path},
    `paths` (each file once) and `shapes` {name: shape} are known."""

    def __init__(self, folder, raw):
        """raw: the folder's config.json."""
        self.folder, self.raw, self.layout = Path(folder), raw, layout_of(raw)
        self._found = {}  # {bare name: (path, name in the file, tensor)}
        for path in weight_files(self.folder):
            for name, value in read_tensors(path).items():
                if BUFFERS.search(name):
                    continue
                if (twin := self._found.get(bare(name))):
                    raise InputError(f"{path}: {name} and {twin[1]} are the same tensor of the model: delete one")
                self._found[bare(name)] = (path, name, value)
        self.compressed = any(name.endswith(".values") for name in self._found)  # 2:4 layers of sparse_matmul.py

    def __deepcopy__(self, memo):
        return self  # read alone: the copy of a model needs none of its file

    def parts(self):
        """The paths of all that makes a model: weights, configuration, tokenizer. Some may not be there."""
        return [*self.paths, *(self.folder / name for name in ["config.json", *TOKENIZER_FILES])]

    def stored(self, name):
        """The dtype in which a tensor is on disk; None where there is none of our name `name`."""
        found = self._found.get(bare(self.layout.name(name)))
        return found and found[2].dtype

    def match(self, parameters):
        """Find every tensor's place in a model. parameters {our name: tensor on the meta device}: all that it needs.
        Raises InputError where a tensor is missing, superfluous or of another shape."""
        wanted = {bare(name): (name, value) for name, value in self.layout.theirs(parameters).items()}
        if "lm_head.weight" not in parameters and "lm_head.weight" in self._found:  # the head may stand for both
            self._found.setdefault(bare(self.layout.name("model.embed_tokens.weight")), self._found["lm_head.weight"])
        for key, (name, value) in wanted.items():
            if key not in self._found:
                raise InputError(f"{self.folder}: the tensor {name} is missing; is the download complete?")
            there = self._found[key][2]
            if there.shape != value.shape:
                raise InputError(f"{self.folder}: {name} has shape {tuple(there.shape)}, "
                                 f"config.json implies {tuple(value.shape)}")
            if there.is_floating_point() != value.is_floating_point() or "float8" in str(there.dtype):
                raise InputError(f"{self.folder}: {name} holds {there.dtype} values; "
                                 f"quantized models of other programs can't be read")
        for key in self._found.keys() - wanted.keys() - {"lm_head.weight"}:  # a tied head may be stored all the same
            raise InputError(f"{self.folder}: the tensor {self._found[key][1]} has no place in this model; "
                             f"is config.json the right one?")
        here = {name: self._found[bare(self.layout.name(name))] for name in parameters}
        self.files = {name: path for name, (path, _, _) in here.items()}
        self.paths = sorted(set(self.files.values()))
        self.shapes = {name: tuple(value.shape) for name, value in parameters.items()}
        self._names = {name: theirs for name, (_, theirs, _) in here.items()}

    def check_tied_head(self):
        """Raise InputError if a head is stored that is not the embedding, to which config.json ties it."""
        path, name, _ = self._found.get("lm_head.weight", (None, None, None))
        if path and not torch.equal(read_tensors(path, [name])[name], self.tensor("model.embed_tokens.weight")):
            raise InputError(f"{path}: {name} is not the embedding, to which config.json ties it: say "
                             f"\"tie_word_embeddings\": false there")

    def check_dense(self):
        """Raise InputError if layers are compressed: such a model can be run, but not pruned or trained."""
        if self.compressed:
            raise InputError(f"{self.folder} holds compressed 2:4 layers: give the folder that it was made from")

    def tensor(self, name):
        """One tensor under our name, as it is on disk. Raises InputError if a value is not finite."""
        path, theirs = self.files[name], self._names[name]
        if path.suffix == ".bin":
            value = self._found[bare(theirs)][2].clone()  # of what is mapped, or in memory already
        else:
            value = read_tensors(path, [theirs])[theirs]
        value = self.layout.ours(name, value)
        if not torch.stack(value.aminmax()).isfinite().all():  # a NaN is the minimum and maximum of its tensor
            raise InputError(f"{path}: {theirs} holds NaN or infinite values")
        return value

    def as_stored(self, tensors):
        """Tensors {our name: tensor} of a model that was read from here, in the dtypes on disk. Norms and biases, which
        no pruning changes, are as they are there, even where the model holds them in a shorter dtype."""
        return {name: W.to(self.stored(name)) if W.dim() > 1 else self.tensor(name) for name, W in tensors.items()}

    def rest(self):
        """{our name: tensor} of everything outside the blocks."""
        return {name: self.tensor(name) for name in self.files if not name.startswith("model.layers.")}

    def size(self, dtype=None):
        """Bytes of all tensors as they are on disk; with a dtype, of floating-point ones in that."""
        stored = {name: self.stored(name) for name in self.shapes}
        return sum(math.prod(shape) * (dtype if dtype and stored[name].is_floating_point else stored[name]).itemsize
                   for name, shape in self.shapes.items())

    def load(self, module, prefix, device, dtype):
        """Fill all parameters of a module (on the meta device) with the tensors below `prefix`."""
        state = {k: self.tensor(f"{prefix}.{k}") for k in module.state_dict()}
        state = {k: v.to(device, dtype if v.is_floating_point() else v.dtype).contiguous() for k, v in state.items()}
        module.load_state_dict(state, assign=True)
