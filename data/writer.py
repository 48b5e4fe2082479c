"""Writing a model's folder, whole or not at all: `CheckpointWriter` goes on where an interrupted run stopped.

Beside the files that the Hugging Face Hub knows, a folder holds what tells its run: pruning.json or run.json.
"""

import json
import os
import shutil
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from data.checkpoint import TOKENIZER_FILES, layout_of, read_tensors
from data.command import DeadEnd, InputError, what_keeps_from_writing, write_atomically


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
        if tokenizer_from and not os.path.isdir(tokenizer_from):
            raise InputError(f"{tokenizer_from}, whose tokenizer belongs to {folder}, is no folder")
        for source in self.tokenizer_files():
            source.open("rb").close()  # what may not be read ends the run here, not after the last block
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

    def tokenizer_files(self):
        """The paths of what is copied beside the weights."""
        paths = [Path(self.tokenizer_from) / name for name in TOKENIZER_FILES] if self.tokenizer_from else []
        return [path for path in paths if path.is_file()]

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

    def save(self, file, module, prefix, source):
        """Write what `load` reads: the tensors of a pruned module below `prefix`, as in the Checkpoint `source`."""
        self.write(file, source.as_stored({f"{prefix}.{k}": v for k, v in module.state_dict().items()}))

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
        for source in self.tokenizer_files():
            write_atomically(self.partial / source.name, lambda path: shutil.copyfile(source, path))
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
