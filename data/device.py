"""What the machine has and how fast it is; CUDA graphs."""

import os
import platform
import re
import time
from pathlib import Path

import torch


def free_memory(device):
    """Bytes that are free on a device, of a GPU with what PyTorch holds and does not use; of a CPU what Linux calls
    available and a container's limit leaves, elsewhere all that is built in, or no end where even that is not known."""
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    try:
        available = 1024 * int(re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())[1])
        return min([available, *allowed()])
    except (OSError, TypeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**62


def allowed(root=Path("/sys/fs/cgroup"), own=Path("/proc/self/cgroup")):
    """Bytes that this process may still take by each limit on its control groups (version 2), which is what containers
    and schedulers set; cached files count as free, for they make room."""
    group = re.search(r"^0::/(.*)$", own.read_text(), re.MULTILINE) if own.exists() else None
    for folder in [root / group[1], *(root / group[1]).parents] if group else []:
        try:
            most, used, stat = ((folder / f"memory.{name}").read_text() for name in ("max", "current", "stat"))
            yield int(most) - int(used) + sum(map(int, re.findall(r"^(?:in)?active_file (\d+)$", stat, re.MULTILINE)))
        except (OSError, ValueError):  # no such group, or one without a limit ("max")
            pass


def out_of_memory(error):
    """Whether an error of Python's or PyTorch's says that memory is full, the GPU's or the computer's."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def compiler_failed(error):
    """Why torch.compile has failed, if that is what an error says."""
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        lines = str(error).strip().splitlines()
        return max(lines, key=lambda line: ("error:" in line, not line.endswith("raised:")))  # the first of these


def fast_in_bf16(device):
    """Whether a device multiplies faster in bf16 than in float32: a GPU since Ampere, a CPU with AMX or
    AVX512_BF16."""
    if device != "cpu":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    tests = [getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("amx_tile", "avx512_bf16")]
    return any(test() for test in tests if test)


def timed(work, device):
    """(seconds that work() takes, what it returns)."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    begin = time.perf_counter()
    result = work()
    wait()
    return time.perf_counter() - begin, result


def graphed(step, *inputs):
    """step as a CUDA graph, which a later call replays without running its Python. The tensors of a call are copied
    into those of the first, and the result is overwritten by the next call."""
    inputs = [x.clone() for x in inputs]
    with torch.cuda.device(inputs[0].device):  # streams and graphs belong to the current one
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                step(*inputs)  # sparse_matmul.py times its tiles, cuBLAS takes its workspace
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):  # else the stream of the first graph, perhaps another GPU's
            result = step(*inputs)

    def replay(*new):
        with torch.cuda.device(result.device):
            for old, x in zip(inputs, new):
                old.copy_(x)
            graph.replay()
        return result
    return replay


def processor():
    """The CPU's name, where Linux tells it."""
    try:
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return f"CPU {platform.machine()}"
