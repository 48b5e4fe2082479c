"""What the 2:4 matmul gains on a GPU; `python sparse_matmul.py` runs this there.

Each shape of LLaMA2's layers, with 1 to 4096 rows of x, against F.linear of the dense weight and of torch's own 2:4
form of it: medians of CUDA graphs, the weights going round so many copies that no cache holds them. Then the decoding
speed of a whole model of LLaMA2-7B's shape. Drawn to assets/sparse_matmul.svg."""

import copy
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F

from compressed import sparsify
from data.command import write_atomically
from eval import speed
from gpt import GPT, Config, prunable
from results.compare import GREY, LOOK
from sparse_matmul import KINDS, compress, prune_24, sparse_linear

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (8192, 8192), (28672, 8192), (8192, 28672)]
ROWS = [1, 4, 16, 32, 64, 128, 256, 1024, 4096]
LLAMA2_7B = Config(32000, 4096, 11008, 32, 32, 32, 128, 1e-5, 10000.0, False)


def size(w):
    """Bytes of a weight, dense or Sparse24."""
    return w.nbytes if torch.is_tensor(w) else sum(t.nbytes for t in (w.values, w.meta, w.scale) if t is not None)


def capture(call, weights):
    """A CUDA graph of calls that go round the weights, and the number of calls."""
    for w in weights:
        call(w)  # compiles, tunes, allocates
    torch.cuda.synchronize()
    graph, calls = torch.cuda.CUDAGraph(), 2 * max(4, len(weights))
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(weights[i % len(weights)])
    return graph, calls


def microseconds(graphs, repeats=7):
    """{name: (graph, calls)} -> {name: median time of a call}; the graphs take turns."""
    times = {name: [] for name in graphs}
    for name, (graph, calls) in repeats * list(graphs.items()):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times[name].append(begin.elapsed_time(end) * 1000 / calls)
    return {name: statistics.median(t) for name, t in times.items()}


def matmuls(device, dtype=torch.bfloat16):
    """Yield after each shape what is known by then {bandwidth: that of a copy in bytes per microsecond, table: a row
    for each shape and number of rows of x}."""
    big, table = torch.empty(2 ** 30, dtype=torch.uint8, device=device), []
    bandwidth = 2 * big.nbytes / microseconds({"copy": capture(big.clone().copy_, [big])})["copy"]
    print(f"{torch.cuda.get_device_name()}, {dtype}, a copy moves {bandwidth / 1e6:.2f} TB/s\n"
          "microseconds, times as fast as dense, share of that bandwidth")
    for N, K in SHAPES:
        W = prune_24(torch.randn(N, K, device=device)).to(dtype)
        forms = {"dense": W} | {kind: compress(W, bits) for kind, bits in KINDS.items()}
        copies = {name: [copy.deepcopy(w) for _ in range(1 + 300_000_000 // size(w))] for name, w in forms.items()}
        try:
            copies["torch"] = [torch.sparse.to_sparse_semi_structured(W) for W in copies["dense"]]
        except RuntimeError as e:  # whatever it can't do on this GPU must not cost the other numbers
            print(f"torch's own 2:4 is left out: {e}")
        for M in ROWS:
            x, graphs = torch.randn(M, K, device=device, dtype=dtype), {}
            for library in ("cublas", "cublaslt"):  # the faster one is "dense"
                torch.backends.cuda.preferred_blas_library(library)
                graphs[library] = capture(lambda W: F.linear(x, W), copies["dense"])
            torch.backends.cuda.preferred_blas_library("default")
            graphs |= {kind: capture(lambda w: sparse_linear(x, w), copies[kind]) for kind in KINDS}
            if "torch" in copies:
                graphs["torch"] = capture(lambda W: F.linear(x, W), copies["torch"])
            us = microseconds(graphs)
            us = {"dense": min(us.pop("cublas"), us.pop("cublaslt"))} | us
            share = {name: size(w) / us[name] / bandwidth for name, w in forms.items()}
            table.append({"N": N, "K": K, "M": M, "us": us, "share_of_bandwidth": share})
            print(f"{N:>5} x {K:<5} M {M:<4}" + "".join(
                f"{name:>10}{t:>8.1f} {us['dense'] / t:>5.2f}x" + (f" {share[name]:>4.0%}" if name in share else "")
                for name, t in us.items()), flush=True)
        yield {"bandwidth": bandwidth, "table": table}


@torch.no_grad()
def decode(device, kind, config=LLAMA2_7B):
    """Tokens per second of one sequence in a model of this shape with random weights, "dense" or of a kind."""
    with torch.device("meta"):
        model = GPT(config).to(torch.bfloat16)
    for parameter in model.to_empty(device=device).parameters():
        parameter.normal_(std=0.02)
    for block in model.model.layers if kind != "dense" else []:
        for layer in prunable(block).values():
            layer.weight.data = prune_24(layer.weight.data)
        sparsify(block, KINDS[kind])
    return speed(model, torch.ones(1, 16, dtype=torch.long, device=device))["decode_tokens_per_second"]


def draw(table, path):
    """Speed-up over M, a panel per kind of values, a line per shape; dashed the ceiling, by the bits of a weight, and
    solid what is as fast as dense. Readable on light and dark pages."""
    import matplotlib
    from matplotlib.figure import Figure
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(12, 3.8), layout="constrained")
        panels = figure.subplots(1, len(KINDS), sharey=True)
        for axis, (kind, bits) in zip(panels, KINDS.items()):
            for N, K in SHAPES:
                lines = {line["M"]: line["us"] for line in table if (line["N"], line["K"]) == (N, K)}
                axis.semilogx(list(lines), [us["dense"] / us[kind] for us in lines.values()], label=f"{N} x {K}")
            axis.axhline(16 / (bits / 2 + 1.125 if bits else 9), color=GREY, linestyle="--")
            axis.axhline(1, color=GREY)
            axis.set_xticks(ROWS, ROWS)
            axis.minorticks_off()
            axis.set(title=kind, xlabel="rows of x")
        panels[0].set(ylabel="times as fast as dense", ylim=(0, None))
        figure.legend(*axis.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=len(SHAPES))
        write_atomically(path, lambda file: figure.savefig(file, format="svg", transparent=True))


def measure(device):
    """Yield all that is measured by then, so that a run that is cut off has something to show."""
    for results in matmuls(device):
        yield results
    draw(results["table"], Path(__file__).parents[1] / "assets" / "sparse_matmul.svg")
    results["decode_tokens_per_second"] = rates = {kind: decode(device, kind) for kind in ("dense", *KINDS)}
    print("LLaMA2-7B's shape decodes", ", ".join(f"{rate:.1f} tokens/s {kind}" for kind, rate in rates.items()))
    yield results
