"""What pruning a checkpoint of LLaMA2-7B's shape (random weights, 13.5 GB of bfloat16) takes: memory, disk traffic, and
what is lost when it is killed in the middle.

    python tests/bench_streaming.py --json results/streaming-7b.json                  (needs 30 GB of disk)

The command runs as its users run it; /proc is read beside it, five times a second. Resident memory has two parts: what
the process allocated, and those pages of the mapped checkpoint that it has touched and that the system may take back at
any time.

On a GPU nothing is killed: the model is pruned from end to end on 128 x 2048 tokens of tiny's text.

    python tests/bench_streaming.py --device cuda --options="--refine swap" --json out/gpu-7b.json
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from data.command import InputError, at_least, parser, record, run, start
from gpt import GPT, Block, Config

RAW = dict(model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=32000, hidden_size=4096,
           intermediate_size=11008, num_attention_heads=32, num_key_value_heads=32, hidden_act="silu",
           rms_norm_eps=1e-5, rope_theta=10000.0, max_position_embeddings=4096, tie_word_embeddings=False,
           torch_dtype="bfloat16")


def make(folder, raw, device):
    """A folder with random weights, one shard for each block."""
    folder.mkdir(parents=True, exist_ok=True)
    config, index = Config.from_dict(raw), {}
    with torch.device("meta"):
        rest = {k: v for k, v in GPT(config).state_dict().items() if ".layers." not in k}
    parts = [rest] + [{f"model.layers.{i}.{k}": v for k, v in Block(config).to("meta").state_dict().items()}
                      for i in range(config.num_hidden_layers)]
    for i, part in enumerate(parts):
        file = f"model-{i:05d}.safetensors"
        tensors = {k: torch.ones(v.shape, dtype=torch.bfloat16) if "norm" in k else
                   torch.empty(v.shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02).cpu()
                   for k, v in part.items()}
        save_file(tensors, folder / file)
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(raw))
    shutil.copy(ROOT / "data" / "tiny" / "tokenizer.model", folder)


def forget(folder):
    """Drop a folder's files from the page cache, so that reading them is reading the disk."""
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def watch(command, out, kill_after=None):
    """Run the command; {phase: peaks and traffic} in GB and seconds, the phases told apart by what is on disk.
    kill_after: SIGKILL it when so many blocks are written."""
    process, partial, phases = subprocess.Popen(command, cwd=ROOT), out.with_name(out.name + ".partial"), {}
    while process.poll() is None:
        name = ("pruning" if partial.exists() else
                "evaluating the pruned model" if out.exists() else "evaluating the dense model")
        now = phases.setdefault(name, dict(peak_rss=0, peak_allocated=0, peak_mapped=0, begin=time.time()))
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            status = dict(line.split(":") for line in lines if "kB" in line)
            traffic = dict(line.split(":") for line in Path(f"/proc/{process.pid}/io").read_text().splitlines())
        except (OSError, ValueError):
            break  # it ended between two looks
        for key, field in ("peak_rss", "VmRSS"), ("peak_allocated", "RssAnon"), ("peak_mapped", "RssFile"):
            now[key] = max(now[key], int(status.get(field, "0 kB").split()[0]) * 1024 / 1e9)
        now |= dict(end=time.time(), read=int(traffic["read_bytes"]) / 1e9, written=int(traffic["write_bytes"]) / 1e9)
        phases[name] = now
        blocks = len(list(partial.glob("model-*.safetensors")))
        if kill_after and blocks >= kill_after:
            process.kill()
        time.sleep(0.2)
    code, before = process.wait(), dict(read=0, written=0)
    for now in phases.values():
        total = {key: now[key] for key in before}
        now |= {key: now[key] - before[key] for key in before} | {"seconds": now.pop("end") - now.pop("begin")}
        before = total
    return code, phases


def on_a_gpu(command, file):
    """Seconds of the command from start to end and of pruning by each method, and the peak of the GPU's memory in GB.
    file: where it records its results."""
    begin = time.perf_counter()
    subprocess.run([*command, "--json", file], cwd=ROOT, check=True)
    seconds, found = time.perf_counter() - begin, json.loads(file.read_text())
    results = {"seconds": seconds, "peak_gpu_memory_gb": found["peak_gpu_memory_gb"],
               "seconds_of_pruning": {row["method"]: row["seconds"] for row in found["results"]["rows"][1:]}}
    print(json.dumps(results, indent=1))
    return results


def main():
    p = parser(__doc__)
    p.add_argument("--folder", default="out/random-7b", help="where the model is made; the pruned one lies beside it")
    p.add_argument("--layers", type=int, default=32, help="its blocks")
    p.add_argument("--hidden", type=int, default=4096, help="its width; --hidden 256 --layers 4: to try the script")
    p.add_argument("--nsamples", type=int, help="calibration sequences (default: 2, on a GPU 128)")
    p.add_argument("--seqlen", type=int, help="tokens a sequence (default: 512, on a GPU 2048)")
    p.add_argument("--options", default="", help="more options of dsnot.py")
    args = p.parse_args()
    start(args)
    at_least(args, layers=2, hidden=32, nsamples=1, seqlen=2)
    gpu = args.device != "cpu"
    args.nsamples, args.seqlen = args.nsamples or (128 if gpu else 2), args.seqlen or (2048 if gpu else 512)
    folder, out = Path(args.folder).absolute(), Path(args.folder + "-pruned").absolute()
    text = "tiny" if gpu else Path(args.folder + ".txt").absolute()
    raw = RAW | dict(num_hidden_layers=args.layers, hidden_size=args.hidden, intermediate_size=args.hidden * 43 // 16)
    if not (folder / "config.json").exists():
        make(folder, raw, args.device)
    if json.loads((folder / "config.json").read_text()) != raw:
        raise InputError(f"--folder {args.folder} holds a model of another shape: delete it, or choose another")
    command = [sys.executable, "dsnot.py", "--model", folder, "--out", out, "--calib", text, "--data", text,
               "--nsamples", args.nsamples, "--seqlen", args.seqlen, "--device", args.device, "--no-compare",
               *args.options.split()]
    command = [str(word) for word in command]
    for left in out, out.with_name(out.name + ".partial"):
        shutil.rmtree(left, ignore_errors=True)
    if gpu:
        return record(args, on_a_gpu(command, Path(args.folder + ".json").absolute()))
    text.write_text("the words of a text are all that a model reads\n" * args.seqlen)
    forget(folder)
    code, killed = watch(command, out, kill_after=args.layers // 2)
    assert code == -9, f"the run ended with {code} before it could be killed"
    print(f"killed after {args.layers // 2} blocks; the same command once more:", flush=True)
    forget(folder)
    code, resumed = watch(command, out)
    assert code == 0, f"the resumed run ended with {code}"
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9
    activations = args.nsamples * args.seqlen * args.hidden * 4 / 1e9
    results = {"checkpoint_gb": size, "activations_gb": activations, "blocks": args.layers,
               f"killed after {args.layers // 2} blocks": killed, "started again": resumed}
    print(json.dumps(results, indent=1))
    record(args, results)


if __name__ == "__main__":
    run(main)
