"""What every command shares: the options --seed --device --json, one way to fail, one way to record a result."""

import argparse
import errno
import json
import os
import platform
import random
import re
import shutil
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch

from data.device import compiler_failed, out_of_memory, processor


class InputError(ValueError):
    """Bad input from the user: one sentence that names the offending value and the way out."""


class DeadEnd(InputError):
    """Input with which a run would end at the same place each time: what it has finished is of no use."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults in --help, but for those that a command works out."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """One whose complaints are one sentence, like all others."""

    def error(self, message):
        raise InputError(f"{message}; --help tells all options")


def parser(description):
    """An argument parser with the options that all commands have."""
    module = getattr(sys.modules["__main__"], "__spec__", None)  # of python -m
    p = Parser(prog=module and f"python -m {module.name}", description=description.strip().split("\n\n")[0],
               formatter_class=HelpFormatter)
    group = p.add_argument_group("run")
    group.add_argument("--seed", type=int, default=0, help="seed of everything random")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                       help="cpu, cuda, cuda:1, ...")
    group.add_argument("--json", metavar="FILE", help="record configuration, versions, seed and results here")
    return p


def start(args, together=False):
    """Seed Python's and PyTorch's generators and check the options that all commands have. together: the processes of
    torchrun share the work, which they would else all do."""
    if not together and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("this command runs in one process: leave out torchrun, which is for dsnot.py and ast_train.py")
    if not 0 <= args.seed < 2**63:
        raise InputError(f"--seed {args.seed} must be at least 0 and below 2^63")
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        raise InputError(f"--device {args.device} is not supported: give cpu, cuda or cuda:1")
    try:
        device = torch.ones(1, device=args.device).device  # too old a GPU fails where it computes
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as e:
        usable = "cpu or cuda" if torch.cuda.is_available() else "cpu; this PyTorch sees no GPU"
        raise InputError(f"--device {args.device} can't be used ({str(e).splitlines()[0]}): give {usable}") from None
    if args.json:
        check_json(args.json, getattr(args, "out", None))


def check_json(path, out):
    """Raise InputError where --json can't be written, or would replace what is no record of a run."""
    if obstacle := what_keeps_from_writing(path):
        raise InputError(f"--json {path} can't be written: {obstacle}")
    if out and os.path.realpath(path) == os.path.realpath(out):
        raise InputError(f"--json {path} is where --out goes: give another name")
    if Path(path).exists():
        if not Path(path).is_file():
            raise InputError(f"--json {path} is no regular file: give another name")
        if not is_record(path):
            raise InputError(f"--json {path} exists and holds something else than the results of a run: give another "
                             f"name")


def at_least(args, **lowest):
    """Raise InputError for an option that is given and lower than its lowest value, or too large for an index:
    at_least(args, seqlen=2)."""
    for name, low in lowest.items():
        if (value := getattr(args, name)) is not None and not low <= value < 2**62:  # NaN, too
            bound = f"at least {low}" if not value >= low else "below 2^62"
            raise InputError(f"--{name.replace('_', '-')} {value} must be {bound}")


def existing(path):
    """The nearest path that exists, of a path and those above it."""
    return next(above for above in (path, *path.absolute().parents) if above.exists())


def told_bytes(size):
    """A number of bytes in words: 13.5 GB, 0.15 MB."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"


def check_disk(place, need, name):
    """Raise InputError, which speaks of `name`, if the disk of a place has no room for `need` bytes more."""
    if need > (free := shutil.disk_usage(existing(place)).free):
        raise InputError(f"{name} will need {told_bytes(need)} more and its disk has {told_bytes(free)} free: make "
                         f"room or choose another output folder")


def what_keeps_from_writing(path):
    """Why a file or folder can't be made at a path, in words; None where it can."""
    path = Path(path).absolute()
    try:
        (beside(path) if path.name else path).is_dir()  # complains of a name that is too long
        above = existing(path.parent)
    except OSError as e:
        return e.strerror
    if not above.is_dir():
        return f"{above} is a file"
    return None if os.access(above, os.W_OK) else f"you may not write to {above}"


def versions(paths):
    """[[name, bytes, time of the last change]] of those paths that are files: what tells that one was replaced."""
    found = [(Path(path).name, Path(path).stat()) for path in paths if Path(path).is_file()]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in found]


def beside(path):
    """Where this process writes a file that takes the place of `path` when it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def write_atomically(path, write):
    """Call `write(new)` on a path beside `path`, then rename: the file is either whole or not there. Makes its folder;
    a link stays one."""
    path = Path(os.path.realpath(path))
    new = beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.touch()
        mode = new.stat().st_mode  # what the user's umask makes of it: safetensors lets nobody else read
        write(new)
        new.chmod(mode)
        os.replace(new, path)
    except OSError as e:
        raise InputError(f"can't write {path}: {e.strerror or e}") from None
    finally:
        with suppress(OSError):
            new.unlink(missing_ok=True)


def is_record(path):
    """Whether a file is empty or what `record` has written."""
    with open(path, "rb") as f:
        return b'{\n "command":'.startswith(f.read(13))


def record(args, results):
    """Write {options, versions, hardware, results} to the file of --json, if one was given."""
    if not args.json:
        return
    cuda = str(args.device).startswith("cuda")
    entry = {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "options": {k: v for k, v in vars(args).items() if k != "json"},
        "versions": {"python": platform.python_version(),
                     **{p: metadata.version(p) for p in ("torch", "numpy", "safetensors")}},
        "hardware": torch.cuda.get_device_name() if cuda else f"{processor()}, {torch.get_num_threads()} threads",
        "results": results,
    }
    if cuda:
        entry["peak_gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    write_atomically(args.json, lambda path: path.write_text(json.dumps(entry, indent=1) + "\n"))


def run(main, goes_on=False):
    """Run a command: bad input is one sentence on stderr and exit code 2, never a traceback. goes_on: the command goes
    on from what is finished when it is given again."""
    with suppress(AttributeError):  # where the output is no file
        sys.stdout.reconfigure(errors="replace")  # of letters that the terminal's encoding lacks
    try:
        main()
        sys.stdout.flush()  # here a full disk still gets a sentence
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as e:
        print(f"error: the GPU's memory is full ({str(e).split('. ')[0]}): give shorter or fewer texts at a "
              f"time, or --device cpu", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as e:
        if out_of_memory(e):
            print("error: the computer's memory is full: give shorter or fewer texts at a time", file=sys.stderr)
        elif reason := compiler_failed(e):
            print(f"error: torch.compile has failed ({reason}): go without --compile, or with --no-compile",
                  file=sys.stderr)
        else:
            raise
        sys.exit(2)
    except BrokenPipeError:  # what reads the output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("stopped: nothing reads the output any more", file=sys.stderr)
        sys.exit(1)
    except OSError as e:
        if e.errno == errno.ENOSPC and e.filename is None:  # where the output goes
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            e.filename = "the output"
        if e.filename is None or e.strerror is None:
            raise
        print(f"error: {e.filename}: {e.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        way_on = ": the same command goes on from what has been saved, if anything has" * goes_on
        print(f"interrupted{way_on}", file=sys.stderr)
        sys.exit(130)
