"""AST's training loop: a student that learns under its mask from a teacher, and what it saves on the way.

The method is in `ast_method.py`, the command in `ast_train.py`. Beyond the paper: with --average, on where a recipe
says so, the result is the mean of W over the last steps, which evens out what single windows did to it.

Precision, and bytes for LLaMA2-7B (6.74 G parameters) on one GPU. On top come activations (fewer with
--checkpoint-activations), with SLoRB 6.5 GB, and with --average 27.0 GB.
    student W            float32    27.0 GB     small steps would be lost in bf16
    its gradient         float32    27.0 GB     also holds u (ast_method.py); an update takes one layer's memory more
    M and V              float32    53.9 GB
    mask                 bool        6.5 GB     whole on every GPU
    teacher              bf16       13.5 GB     arithmetic is bf16, on several GPUs hidden states, too; norms, logits
                                                in the loss and sums are float32
                                   127.9 GB     on N GPUs: 121.4 / N + 6.5 GB each; at the start each holds all of W

`args` are the options of `ast_train.py`; `ids` are windows of tokens, [n, seqlen + 1].
"""

import functools
import gc
import math
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from ast_method import (CLIP, AnnealedAdamW, SparseLinear, add_to_mean, averaged, decay_at, learning_rate,
                        sparse_layers, training_loss, whole)
from data import load_tokenizer
from data.calibration import InputStats, watch
from data.command import InputError
from data.method import parse_pattern
from data.processes import add_up, mean_over_processes, processes, say
from data.state import check_room, load_state, save_state
from data.stream import fingerprint, sources_of
from data.text import text_versions
from data.writer import CheckpointWriter, noted
from gpt import GPT, all_prunable
from masks import magnitude_score, wanda_score

LOG_EVERY = 10  # steps
NEUTRAL = {"recipe", "methods", "out", "json", "device", "micro_batch", "save_every", "one_shot", "compile", "shard",
           "checkpoint_activations"}  # options that may change when a run goes on
MASKED = {"pattern", "sparsity", "score", "mask_every", "decay", "decay_steps", "start_from",
          "kl_weight", "temperature"}  # mean nothing to the dense model, which has no mask and can't teach itself


# -------------------------------------------------------------------------------------------------------- the student

def arithmetic(args):
    """bf16 products where --dtype asks for them; weights stay as they are."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.dtype == "bfloat16")


def amount(args):
    return dict(pattern=parse_pattern(args.pattern)) if args.sparsity is None else dict(sparsity=args.sparsity)


@torch.no_grad()
def calibrated(model, args, calibration):
    """{name: InputStats} of the linear layers of all blocks."""
    linears = all_prunable(model)
    stats = {name: InputStats(linear.in_features) for name, linear in linears.items()}

    def seen(name, x):
        for sequence in x:
            stats[name].add(sequence)

    rank, world = processes()
    with watch(linears, seen):
        for ids in calibration[rank::world].split(args.micro_batch):
            model(ids.to(args.device))
    for one in stats.values():
        one.all_reduce()
    return stats


def make_sparse(model, args, slorb_k, calibration):
    """Turn the linear layers of all blocks into SparseLinear."""
    stats = calibrated(model, args, calibration) if args.score == "wanda" else None
    for name, linear in all_prunable(model).items():
        score = functools.partial(wanda_score, stats=stats[name]) if stats else magnitude_score
        model.set_submodule(name, SparseLinear(linear, score, slorb_k, **amount(args)))


def new_student(args, method, start, source, calibration):
    """The model that a method trains, with the first weights from the folder `start` (dense: its own), and what tells
    it from others: of its dense checkpoint `source` the configuration and the tokenizer, and the sum of its weights."""
    student = GPT.from_pretrained(args.model if method == "dense" else start, args.device, torch.float32)
    tokens = fingerprint(load_tokenizer(source.folder))
    identity = f"{source.raw} {tokens} {sum(p.double().sum().item() for p in student.parameters()):.6g}"
    if method != "dense":
        make_sparse(student, args, args.slorb_k if method == "ast-slorb" else None, calibration)
    return student, identity


def set_up(model, args, checkpoint_activations=False):
    """Compile a model's blocks and spread them over the processes, as far as that is asked for."""
    _, world = processes()
    shard, spread = args.shard or world, world > 1
    if spread:
        mesh = dist.init_device_mesh(torch.device(args.device).type, (world // shard, shard),
                                     mesh_dim_names=("copies", "parts"))
        precision = MixedPrecisionPolicy(getattr(torch, args.dtype), torch.float32, cast_forward_inputs=False)
        fsdp = dict(mesh=mesh if shard < world else mesh["parts"], mp_policy=precision)
    for block in model.model.layers:
        if args.compile:  # before `checkpoint`, which hides what it calls; one block's code serves all of them
            block.forward = torch.compile(block.forward)
        if checkpoint_activations:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if spread:
            fully_shard(block, **fsdp)
    return fully_shard(model, **fsdp) if spread else model


def to_save(model, source):
    """{name: (tensor, the dtype in which it is saved)} of a student: that of the dense checkpoint `source`, for SLoRB's
    that of the weight beside them."""
    tensors = {name: value for name, value in model.tensors().items() if not name.endswith(".mask")}
    like = {name: name if name in source.files else name.rpartition(".slorb_")[0] + ".weight" for name in tensors}
    return {name: (value, source.stored(like[name])) for name, value in tensors.items()}


def save_model(folder, model, source, made):
    """Write the student as a Hugging Face folder in the dtypes of its dense checkpoint `source`; pruned weights are 0.
    made: a dict that names the run.

    SLoRB's S and X stand beside each weight. `transformers` does not know them; there, add them to the weights, with k
    the "slorb_k" of config.json:      weight += slorb_S.repeat_interleave(k, 1) * slorb_X
    (GPT-2's files have W^T and S^T, and those of q, k and v side by side, as they have their X: take each third.)"""
    layers = sparse_layers(model)
    masks = {f"{name}.weight": layer.mask for name, layer in layers.items()}
    k = next((layer.slorb_k for layer in layers.values()), None)
    assert not k or len(layers) == len(all_prunable(model)), "SLoRB stands beside all layers of the blocks, or none"
    tensors = {}
    for name, (value, dtype) in to_save(model, source).items():
        value = whole(value) * masks[name] if name in masks else whole(value)
        if processes()[0] == 0:
            tensors[name] = value.to("cpu", dtype)
    if processes()[0] == 0:
        raw = model.config.raw | ({"slorb_k": k} if k else {})
        with CheckpointWriter(folder, raw, source.folder, made=made, goes_on=False) as out:
            out.write("model.safetensors", tensors)


# ------------------------------------------------------------------------------------------------------- the training

@torch.no_grad()
def validation_perplexity(model, ids, args):
    """Perplexity on windows [n, seqlen + 1]."""
    rank, world = processes()
    own = ids[rank::world]
    left, spare = len(own), -(-len(ids) // world) - len(own)  # a spare window is read, so that all read equally many
    loss = torch.zeros((), device=args.device)
    for part in torch.cat([own, ids[:spare]]).split(args.micro_batch):
        part = part.to(args.device)
        with arithmetic(args):
            logits = model(part[:, :-1])
        if count := min(len(part), left):
            loss += count * training_loss(logits[:count], None, part[:count, 1:])  # a sum over windows
        left -= count
    add_up(loss)
    return math.exp(min(700.0, loss.item() / len(ids)))  # a ruined model: no overflow, no NaN


def backward(student, teacher, ids, args):
    """Add the gradients of the mean loss on windows [n, seqlen + 1], a micro-batch at a time; returns that loss."""
    loss = 0.0
    for part in ids.split(args.micro_batch):
        with arithmetic(args):
            with torch.no_grad():
                teacher_logits = teacher(part[:, :-1]) if teacher else None
            logits = student(part[:, :-1])
        mean = training_loss(logits, teacher_logits, part[:, 1:], args.kl_weight, args.temperature, args.compile)
        share = mean * (len(part) / len(ids))
        share.backward()
        loss += share.detach()
    return loss


def update_masks(layers, device):
    """Choose all masks again; returns the shares of their entries that changed (since the last time, since the first).
    """
    flips = torch.tensor([layer.update_mask() for layer in layers], dtype=torch.double).sum(0).to(device)
    add_up(flips)
    return (flips / sum(layer.mask.numel() for layer in layers)).tolist()


def resume(method, args, identity, student, optimizer, mean, source):
    """Load what a stopped run has left; returns its state and a dict that names the run. Raises InputError where the
    folders of this run hold something else, or their disk is too small."""
    work, saved = Path(args.out) / f"{method}.training", Path(args.out) / method
    unused = NEUTRAL | (MASKED if method == "dense" else set()) | (set() if method == "ast-slorb" else {"slorb_k"})
    options = {name: str(value) for name, value in vars(args).items() if name not in unused}
    options |= {"model": identity, "texts": str(text_versions([*sources_of(args.data), args.eval_data]))}
    made = {"command": "ast_train.py", "method": method} | options
    state = load_state(work, student, optimizer, mean, options, args.steps)
    if (there := noted(saved / "run.json")) != made and state["step"]:
        raise InputError(f"{saved} is not the model that the training in {work} has saved: bring that back, or delete "
                         f"{work} to train anew")
    if there not in (None, made):
        raise InputError(f"{saved} holds a model of another training: choose another --out, or delete it")
    if state["step"] < args.steps:
        size = sum(value.numel() * dtype.itemsize for value, dtype in to_save(student, source).values())
        check_room(work, student, mean, saved, size)
    return state, made


def log(method, args, row, seconds):
    """Print a row of the history; seconds: what a step takes."""
    speed, left = args.batch * args.seqlen / seconds, seconds * (args.steps - row["step"]) / 60
    say(f"{method} step {row['step']:6d}/{args.steps}  loss {row['loss']:7.4f}  lr {row['lr']:.1e}  "
        f"decay {row['decay']:.1e}  flips {row['flips']:6.2%} (since start {row['flips_all']:6.2%})  "
        f"{speed:8,.0f} tokens/s  {left:6.1f} min left")


def validate(method, args, student, held_out, source, made, state):
    """Add the student's validation perplexity to `state`, and save the model if it is the best so far."""
    ppl = validation_perplexity(student, held_out, args)
    best = ppl < min((before for _, before in state["validation"]), default=math.inf)
    state["validation"].append((state["step"], ppl))
    say(f"{method} step {state['step']:6d}/{args.steps}  validation perplexity {ppl:.3f}{' (best so far)' * best}")
    if args.device.startswith("cuda"):
        state["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    if best:
        save_model(Path(args.out) / method, student, source, made)


def train(method, args, start, mixture, held_out, calibration):
    """Train one model, whose first weights are in the folder `start`, and return its record; the best one by validation
    is the folder `args.out / method`."""
    source, work = GPT.open(args.model).source, Path(args.out) / f"{method}.training"
    torch.compiler.reset()  # a function is compiled for a few kinds of blocks; those of all methods are too many
    gc.collect()  # compiled blocks of the method before refer to each other, and stay on the GPU until this
    student, identity = new_student(args, method, start, source, calibration)
    layers = list(sparse_layers(student).values())
    student = set_up(student, args, args.checkpoint_activations)
    optimizer = AnnealedAdamW(student, args.lr)
    mean = {name: W.detach().clone() for name, W in student.named_parameters()} if args.average else {}
    average_from = args.steps - round(args.average * args.steps)
    state, made = resume(method, args, identity, student, optimizer, mean, source)
    teacher = None
    if layers and args.kl_weight and state["step"] < args.steps:
        teacher = set_up(GPT.from_pretrained(args.model, args.device, getattr(torch, args.dtype)), args)
    rank, world = processes()
    started, first = time.perf_counter(), state["step"]
    if first < args.steps:
        say(f"{method} trains{', after compiling its first step' * args.compile}: a line every {LOG_EVERY} steps")
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()

    for step in range(first, args.steps):
        lr = learning_rate(step, args.steps, args.lr, args.warmup, args.lr_end)
        decay = decay_at(step, args.decay, args.decay_steps) if layers else 0.0
        for group in optimizer.param_groups:
            group["lr"], group["decay"] = lr, decay
        if layers and args.mask_every and step and step % args.mask_every == 0:
            state["flips"] = update_masks(layers, args.device)

        ids = mixture.batch(args.seed, step, args.batch)[rank::world]
        student.check_tokens(ids)
        loss = mean_over_processes(backward(student, teacher, ids.to(args.device), args))
        norm = whole(nn.utils.clip_grad_norm_(student.parameters(), CLIP)).item()
        if not math.isfinite(loss + norm):
            kept = f"; the state of step {state['step']} is kept in {work}" if state["step"] else ""
            way_out = f"lower --lr ({args.lr})" if step else "give another model, or --dtype float32"
            raise InputError(f"the loss is {loss}, its gradient's norm {norm} at step {step}: {way_out}{kept}")
        optimizer.step()
        optimizer.zero_grad()

        done, now = step + 1, time.perf_counter()
        seconds = (now - started) / max(1, step - first)
        if step == first:  # it has compiled, which the others don't
            started = now
        if done > average_from:
            add_to_mean(mean, student, done - average_from)
        if done % LOG_EVERY == 0 or done == args.steps:
            flips, flips_all = state["flips"]
            state["history"].append(dict(step=done, loss=loss, lr=lr, decay=decay, flips=flips, flips_all=flips_all))
            log(method, args, state["history"][-1], seconds)
        if done % args.save_every == 0 or done == args.steps:
            state |= dict(step=done, tokens_per_second=args.batch * args.seqlen / seconds)
            with averaged(student, mean, masks=args.mask_every > 0) if done > average_from else nullcontext():
                validate(method, args, student, held_out, source, made, state)
            save_state(work, student, optimizer, mean, state, finished=done == args.steps)
            started += time.perf_counter() - now  # a step takes no longer for it
    return state
