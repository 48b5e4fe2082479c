"""What a stopped training goes on from: weights, moments and mean by torch.distributed.checkpoint, which writes
and reads them with as many processes as there are, and a run.json of everything else. It reads by pickle, which can
run code: go on from states of your own alone.

`work` is the folder of the states, of which one is kept: step-0000100, named by the steps that are done.
"""

import json
import logging
import shutil
import warnings

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from data.command import InputError, check_disk
from data.processes import processes, say, wait

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # by dcp: without torchrun it is


def save_state(work, model, optimizer, mean, state, finished=False):
    """Write what a stopped run needs to go on; of a finished one that is run.json alone. It takes the place of the
    state before when it is complete. Raises InputError where it can't be written, such as on a full disk; the state
    before is kept."""
    final, partial = work / f"step-{state['step']:07d}", work / f"step-{state['step']:07d}.partial"
    first = processes()[0] == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
    wait()
    try:
        if first or not finished:  # of a finished one nobody else writes, or waits before the folder is renamed
            partial.mkdir(parents=True, exist_ok=True)
        if not finished:
            weights, moments = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optimizer": moments, "mean": mean}, checkpoint_id=partial)
        if first:
            (partial / "run.json").write_text(json.dumps(state))
            partial.rename(final)
            remove_all_but(final)
    except (OSError, CheckpointException) as e:
        shutil.rmtree(partial, ignore_errors=True)
        causes = [e] if isinstance(e, OSError) else [cause for cause, _ in e.failures.values()]
        if others := [cause for cause in causes if not isinstance(cause, OSError)
                      and "inline_container" not in str(cause)]:  # PyTorch's own write error
            raise others[0] from None  # Ctrl-C, memory
        kept = "; the state before is kept" if any(work.glob("step-*")) else ""
        raise InputError(f"can't write the state of step {state['step']} to {work}: is the disk full? Make room and "
                         f"give the same command again{kept}") from None
    wait()


def remove_all_but(last, **how):
    """Remove the other states beside the last one; how: as shutil.rmtree takes it."""
    for other in last.parent.glob("step-*"):
        if other != last:
            shutil.rmtree(other, **how)


def check_room(work, model, mean, folder, size):
    """Raise InputError if the disk has no room for two states and, for `folder`, two models of `size` bytes: those
    before go when the next are complete. What is there of them already is not asked for again."""
    numbers, masks = (sum(x.numel() for x in group) for group in (model.parameters(), model.buffers()))
    need = 2 * (4 * numbers * (4 if mean else 3) + masks + size)  # W, M, V and the mean in float32
    held = sum(path.stat().st_size for path in [*work.rglob("*.distcp"), *folder.glob("*.safetensors")])
    check_disk(work, need - held, work)


def last_state(work, options):
    """The folder of the last state in `work` and what it tells; (None, that of step 0) where there is none. Raises
    InputError if it is damaged, or belongs to a run with other options."""
    found = sorted(path for path in work.glob("step-*") if path.suffix != ".partial")
    first = dict(step=0, options=options, flips=[0, 0], history=[], validation=[])
    if not found:
        return None, first
    try:
        state = json.loads((found[-1] / "run.json").read_text())
        if missing := first.keys() - state:
            raise KeyError(missing)
        before = dict(state["options"])
    except (OSError, ValueError, KeyError, TypeError):
        raise damaged(found[-1]) from None
    files = {"model": "of another model or tokenizer", "texts": "of other texts"}  # other options may be the reason
    for name in sorted(options, key=files.__contains__):
        if (old := before.get(name)) != (value := options[name]):
            option = f"--{name.replace('_', '-')}"
            with_other = f"with {option} {old}" + f", not {value}" * (value != "None")
            told = files.get(name) or (f"without {option}" if old in (None, "None") else with_other)
            raise InputError(f"{work} holds a run {told}: give the options it had, choose another --out, or delete it")
    return found[-1], state


def damaged(folder):
    return InputError(f"{folder} is damaged: delete it or choose another --out")


def load_state(work, model, optimizer, mean, options, steps):
    """The last state in `work`, as last_state finds it, loaded into model, optimizer and mean if fewer than `steps` are
    done."""
    folder, state = last_state(work, options)
    if folder is None:
        return state
    if state["step"] >= steps:
        if processes()[0] == 0:  # save_state may have been killed as it did this
            remove_all_but(folder, ignore_errors=True)
        say(f"{work} is finished")
        return state
    weights, moments = get_state_dict(model, optimizer)
    logging.disable(logging.WARNING)  # PyTorch logs a traceback of what is a sentence here
    try:
        dcp.load({"model": weights, "optimizer": moments, "mean": mean}, checkpoint_id=folder)
    except (CheckpointException, OSError):
        raise damaged(folder) from None
    finally:
        logging.disable(logging.NOTSET)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    say(f"{work} goes on at step {state['step']}")
    return state
