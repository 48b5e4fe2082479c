"""Several processes: those that torchrun begins, which share one run, and those that do a piece of work each, side by
side on a CPU; and what one of them says of its progress."""

import os
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process

import torch
import torch.distributed as dist
from tqdm import tqdm

from data.command import start
from data.device import free_memory

QUIET = 60  # seconds between the lines of progress_bar where there is no terminal


@contextmanager
def process_group(args):
    """Call `start` of data.command. Inside, torchrun's processes form a group, each with the GPU of its LOCAL_RANK;
    without torchrun, of whose variables others may set some, there is none."""
    torchrun = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ)
    cuda = args.device.startswith("cuda")
    if torchrun and cuda:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    start(args, together=True)
    if torchrun:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield
    finally:
        if torchrun:
            dist.destroy_process_group()


def processes():
    """(this process, how many there are); (0, 1) outside of `process_group`, too."""
    grouped = dist.is_available() and dist.is_initialized()  # some builds of PyTorch have no torch.distributed
    return (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)


def free_share(device):
    """Bytes that are free on a device for this process: those of torchrun share a CPU's memory."""
    return free_memory(device) // (1 if device.type == "cuda" else processes()[1])


class Lines:
    """A file that makes a line of each state that tqdm writes."""

    @staticmethod
    def write(text):
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)


def progress_bar(*what, disable=False, **options):
    """tqdm in the first process alone; without a terminal, a line a minute tells a log where a long run is."""
    if not sys.stderr.isatty():
        options |= dict(file=Lines(), mininterval=QUIET, miniters=1, delay=QUIET, ascii=True, ncols=100)
    return tqdm(*what, leave=False, disable=disable or processes()[0] > 0, **options)


def say(text):
    """Print, in the first process alone."""
    if processes()[0] == 0:
        print(text, flush=True)


def wait():
    """Until all processes are here."""
    if processes()[1] > 1:
        dist.barrier()


def add_up(tensor):
    """Replace a tensor in every process by the sum over all of them."""
    if processes()[1] > 1:
        dist.all_reduce(tensor)


def from_first(tensor):
    """The first process's tensor, in place of each one's: those of unlike machines differ by rounding."""
    if processes()[1] > 1:
        dist.broadcast(tensor, 0)
    return tensor


def mean_over_processes(value):
    """The mean of a scalar tensor over all processes, as a number."""
    add_up(value)
    return value.item() / processes()[1]


def side_by_side(work, names, threads, *rest):
    """Call work(name, *rest) for all names at once, a process each on so many threads; yields (name, what it returns)
    as they end. An error or Ctrl-C ends all of them: the processes themselves ignore Ctrl-C, which would leave some of
    them waiting."""
    ignore = dict(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    with ProcessPoolExecutor(len(names), get_context("spawn"), **ignore) as pool:
        began = {pool.submit(_alone, work, threads, name, *rest): name for name in names}
        try:
            for ended in as_completed(began):
                yield began[ended], ended.result()
        except BaseException:
            for process in active_children():
                process.kill()
            raise


def _alone(work, threads, *arguments):
    """work(*arguments) on so many threads, in a process that ends when the one that began it is killed."""
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its usual lock would outlive a process that is killed
    torch.set_num_threads(threads)
    return work(*arguments)
