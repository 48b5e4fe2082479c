"""A model's folder on disk: config.json, safetensors files and a tokenizer, as the Hugging Face Hub has them.

`Layout` is what the files of a family call our tensors and how they lay them out; `Checkpoint` reads tensors one at a
time, so that a model may be larger than memory; `CheckpointWriter` writes a folder whole or not at all, and goes on
where an interrupted run stopped.
"""

import json
import math
import os
import re
import shutil
import zipfile
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data.command import DeadEnd, InputError, told_bytes, what_keeps_from_writing, write_atomically

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
            if not all(torch.is_tensor(value) for value in tensors.values()):
                raise ValueError("it holds more than tensors")
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
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as e:
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


# ------------------------------------------------------------------------------------------------------------ writing

def noted(path):
    """The JSON object that a file holds; None where there is no such file, or a damaged one."""
    try:
        found = json.loads(Path(path).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def as_noted(run):
    """A dict as `noted` will give it back: a tuple is a list there."""
    return json.loads(json.dumps(run))


def finished(out, run):
    """What pruning.json notes of a finished run in the folder `out`; None where that is none, or another."""
    found = noted(Path(out) / "pruning.json")
    return found if found and found.get("run") == as_noted(run) else None


def pruned_here(folder):
    """Whether the model in a folder was pruned by dsnot.py or trained with masks by ast_train.py."""
    method = (noted(folder / "run.json") or {}).get("method")
    return (folder / "pruning.json").is_file() or method in ("ast", "ast-slorb")


def shard(i, blocks):
    """The file of block i of so many; shard(blocks, blocks) is that of everything else."""
    return f"model-{i + 1:05d}-of-{blocks + 1:05d}.safetensors"


@contextmanager
def alone_in(folder):
    """Inside, a folder belongs to this process alone, until it ends in whatever way. It is made if need be, and then
    removed again if it stays empty. Raises InputError where another process has it."""
    handle, made = None, not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with suppress(ImportError):  # Windows has no fcntl
            import fcntl
            handle = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"another run is writing to {folder}: wait for it, or choose another output "
                                 f"folder") from None
            except OSError:  # some network drives have no locks
                pass
            if not (folder.exists() and os.path.samestat(os.fstat(handle), folder.stat())):
                raise InputError(f"another run has just finished with {folder}: give the command again")
        yield
    finally:
        if handle is not None:
            os.close(handle)
        if made:
            with suppress(OSError):
                folder.rmdir()


def occupied(folder, *known):
    """Whether a folder holds more than files of known names and what a killed run of ours has left of one; hidden
    files, such as .git, count."""
    return folder.is_dir() and not all(path.name in known or path.match(".*.partial") for path in folder.iterdir())


def what_keeps_from_renaming(folder):
    """Why a folder of this name can't be put aside or in place, in words; None where it can."""
    if folder.is_file():
        return f"{folder} is a file"
    if folder.suffix == ".partial":
        return "a folder of that name is an unfinished one"
    if os.path.ismount(folder):
        return "a disk is mounted there (a folder inside it will do)"
    return "it is the current folder, or one above it" if folder in (here := Path.cwd(), *here.parents) else None


class CheckpointWriter:
    """Writes a Hugging Face folder beside its final place; leaving the `with` block renames it, an error removes it,
    unless it holds finished files to go on from and the error is no DeadEnd.

    `made` (a dict) identifies the run and is written as run.json. Where an interrupted run has left an unfinished
    folder with the same one, its files are kept and `done` tells which they are (goes_on=False: they are thrown away).
    run.json stays in the finished folder. Never replaced are: a folder without one (it was not made here), what another
    command (made["command"]) has made and, unless goes_on=False, a finished run with another `made`; made=None
    replaces whatever was made here.
    `differs`: what a finished run that the folder holds has otherwise; "" where that is nothing."""

    def __init__(self, folder, raw_config, tokenizer_from=None, made=None, goes_on=True):
        self.folder, self.raw, self.made = Path(os.path.realpath(folder)), raw_config, as_noted(made or {})
        self.goes_on = goes_on and made is not None
        self.layout = layout_of(raw_config)
        self.partial = self.folder.with_name((self.folder.name or "root") + ".partial")
        self.marker, self.tokenizer_from = self.partial / "run.json", tokenizer_from
        self.before = self.folder.with_name(f".{self.folder.name}.before")  # a name that nobody else picks
        try:
            if self.before.is_dir() and not self.folder.exists():  # a run was killed between the renames of `finish`
                with suppress(FileNotFoundError):  # another process has just done it
                    self.before.rename(self.folder)
            read = tokenizer_from and self.folder.exists() and self.folder.samefile(tokenizer_from)
            obstacle = what_keeps_from_renaming(self.folder) or what_keeps_from_writing(self.folder)
            there = occupied(self.folder)
            mark = there and noted(self.folder / "run.json") or {}
            taken = there and not (self.folder / "run.json").is_file()
            strange = not self.marker.is_file() and occupied(self.partial)
        except OSError as e:  # a name that is too long, a folder that may not be read
            raise InputError(f"can't write {folder}: {e.strerror}") from None
        if read:
            raise InputError(f"{folder} is the model that is being read: choose another output folder")
        if obstacle:
            raise InputError(f"can't write {folder}: {obstacle}: choose another output folder")
        if taken:
            raise InputError(f"{folder} exists and is no model that was written here: choose another output folder")
        self.differs = self.differing(mark) if there else ""
        maker, command = mark.get("command"), self.made.get("command")
        if there and made is not None and maker != command:
            raise InputError(f"{folder} holds a model that {maker or 'another command'} has made: choose another "
                             f"output folder, or delete it")
        if self.differs and self.goes_on:
            raise InputError(f"{folder} holds a finished run, which differs in {self.differs}: choose another output "
                             f"folder, or delete it")
        if strange:
            raise InputError(f"{self.partial} is no unfinished run of this program: move it away or choose another "
                             f"output folder")
        left = noted(self.marker) or {}
        ours = left == self.made if self.goes_on else left.get("command") == command
        if not ours and any(self.partial.glob("*.safetensors")):
            raise InputError(f"{self.partial} holds the finished blocks of another run, which differs in "
                             f"{self.differing(left)}: give what it had, choose another output folder, or delete it")

    def differing(self, other):
        """The names of what another run's `made` has otherwise, as text."""
        def files(run):
            """{name: all that `versions` tells}; none from a damaged run.json."""
            found = run.get("files") if isinstance(run.get("files"), list) else []
            return {str(file[0]): file for file in found if isinstance(file, list) and file}
        ours, theirs = files(self.made), files(other)
        changed = ", ".join(sorted(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)))
        return ", ".join(f"{name} ({changed})" if name == "files" and changed else name
                         for name in {**other, **self.made} if other.get(name) != self.made.get(name))

    def __enter__(self):
        with ExitStack() as held:
            try:
                held.enter_context(alone_in(self.partial))
                same = self.goes_on and noted(self.marker) == self.made
                for path in self.partial.glob(".*.partial" if same else "*"):  # same: the last file of a killed run
                    if path != self.marker:  # by which another run would know what a kill here leaves; replaced below
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
            except OSError as e:
                raise InputError(f"can't write {self.partial}: {e.strerror or e}") from None
            if not same:
                write_atomically(self.marker, lambda path: path.write_text(json.dumps(self.made)))
            self.held = held.pop_all()
        return self

    def missing(self, size):
        """The bytes that are still to be written of a checkpoint of `size` bytes."""
        return size - sum(path.stat().st_size for path in self.partial.glob("*.safetensors"))

    def check_own(self):
        """Raise InputError where the unfinished folder is no longer the one that was begun."""
        if noted(self.marker) != self.made:
            raise InputError(f"{self.partial} was removed or replaced while it was being written: give the command "
                             f"again")

    def done(self, file):
        return (self.partial / file).is_file()

    def note(self, **what):
        """Write pruning.json: what names the run, the seconds so far, a record of each layer, and what else is known.
        """
        self.check_own()
        text = json.dumps(what, indent=1)
        write_atomically(self.partial / "pruning.json", lambda path: path.write_text(text))

    def progress(self, count):
        """{block: the records of its layers} of those of `count` blocks that are done, and the seconds they took."""
        known = noted(self.partial / "pruning.json") or {"layers": [], "seconds": 0}
        records = {i: [one for one in known["layers"] if one["layer"].startswith(f"model.layers.{i}.")]
                   for i in range(count)}
        return {i: found for i, found in records.items() if found and self.done(shard(i, count))}, known["seconds"]

    def load(self, file, module, prefix):
        """Fill a module with the tensors below `prefix` of a file that is done."""
        held, names = read_tensors(self.partial / file), {k: f"{prefix}.{k}" for k in module.state_dict()}
        module.load_state_dict({k: self.layout.ours(name, held[self.layout.name(name)]) for k, name in names.items()})

    def save(self, file, module, prefix, stored):
        """Write what `load` reads: the tensors of a module below `prefix`, each in the dtype stored(our name)."""
        tensors = {f"{prefix}.{k}": v for k, v in module.state_dict().items()}
        self.write(file, {name: v.to(stored(name)) for name, v in tensors.items()})

    def write(self, file, tensors):
        """Write {our name: tensor} as one safetensors file under the family's names, whole or not at all."""
        self.check_own()
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.layout.theirs(tensors).items()}

        def write(path):
            try:
                save_file(tensors, path, metadata={"format": "pt"})
            except SafetensorError as e:
                raise OSError(str(e)) from None
        write_atomically(self.partial / file, write)

    def __exit__(self, kind, error, trace):
        finished = False
        with self.held:
            try:
                if kind is None:
                    self.finish()
                    finished = True
            finally:
                kept = self.goes_on and not isinstance(error, DeadEnd) and any(self.partial.glob("*.safetensors"))
                if not finished and not kept and noted(self.marker) == self.made:
                    with suppress(OSError):  # the error that led here is the one to tell
                        remove(self.partial)

    def finish(self):
        """Write what else belongs into the folder, and put it in its place."""
        self.check_own()
        shards = sorted(self.partial.glob("*.safetensors"))
        if [file.name for file in shards] != ["model.safetensors"]:
            weights, size = {}, 0
            for file in shards:
                tensors = read_tensors(file)
                weights |= dict.fromkeys(tensors, file.name)
                size += sum(tensor.nbytes for tensor in tensors.values())
                del tensors  # mapped files would keep Windows from renaming their folder
            index = json.dumps({"metadata": {"total_size": size}, "weight_map": weights}, indent=1)
            write_atomically(self.partial / "model.safetensors.index.json", lambda path: path.write_text(index))
        text = json.dumps(self.raw, indent=1) + "\n"
        write_atomically(self.partial / "config.json", lambda path: path.write_text(text))
        for name in TOKENIZER_FILES if self.tokenizer_from else []:
            source = Path(self.tokenizer_from) / name
            if source.is_file():
                write_atomically(self.partial / name, lambda path: shutil.copyfile(source, path))
        shutil.rmtree(self.before, ignore_errors=True)
        if self.folder.is_dir():
            self.folder.rename(self.before)
        self.partial.rename(self.folder)
        shutil.rmtree(self.before, ignore_errors=True)


def remove(folder):
    """Remove a folder, which is whole under its name or not there, and what a run that was killed in here has left."""
    gone = folder.with_name(f".{folder.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    if folder.exists():
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)  # another run may be at it, too
