"""What a run of dsnot.py takes, known before it begins: memory and disk by the configuration, time from a random block.
"""

import itertools
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from allocate import probe_tokens
from data.calibration import divergence, input_stats, readers, steps
from data.command import InputError, check_disk, record, told_bytes
from data.device import timed
from data.method import LAYER, blocks_of, has_goal, needs_gram, refine_of, rows_apart
from data.processes import free_share, processes, say
from data.writer import CheckpointWriter, alone_in, finished
from global_swaps import ROUND, tokens_at_a_time
from gpt import GPT, Block, all_prunable, prunable, rotary
from swaps import CHUNK

BATCH = 8192  # tokens that go through a block at a time


def held_states(nsamples, seqlen, layers, aims, allocate):
    """The most tokens whose hidden states a process holds at once: its calibration text, twice when it aims at the
    dense model; while "sensitivity" allocates, that text and one trial for every layer."""
    trials = probe_tokens(seqlen) * layers if allocate == "sensitivity" else 0
    return nsamples * seqlen + max(nsamples * seqlen * aims, trials)


def stored_dtype(config):
    """The dtype of a checkpoint's tensors, as far as config.json tells it."""
    found = getattr(torch, str(config.raw.get("dtype") or config.raw.get("torch_dtype")), None)
    return found if isinstance(found, torch.dtype) else torch.float32


def held_dtype(args, config):
    """The dtype in which a run holds the model."""
    return torch.float32 if args.device == "cpu" else stored_dtype(config)


def state_bytes(args, model):
    """Bytes of the hidden states that each process of a run holds at a time, at most."""
    nsamples, layers = -(-args.nsamples // processes()[1]), len(all_prunable(model))
    states = held_states(nsamples, args.seqlen, layers, has_goal(**vars(args)), args.allocate)
    return states * model.config.hidden_size * held_dtype(args, model.config).itemsize


def told_each(memory):
    """{what for: bytes} in words."""
    return ", ".join(f"{name} {told_bytes(size)}" for name, size in memory.items())


def check_memory(args, model):
    """Raise InputError where the calibration text's activations don't fit into memory."""
    need, world, device = state_bytes(args, model), processes()[1], torch.device(args.device)
    free = free_share(torch.device("cpu"))
    if device.type == "cuda":
        free = max(free, free_share(device) / 2)  # all are in one place: see place_for
    if need > free:
        raise InputError(f"--nsamples {args.nsamples} of --seqlen {args.seqlen} make {told_bytes(world * need)} of "
                         f"activations, and {told_bytes(world * free)} of memory are free for them: give fewer or "
                         f"shorter ones")


def check_folders(args, model, passes, same):
    """Raise InputError where a pass, as in prune_and_measure, can't fill its folder or has too little memory or disk;
    returns notes on those that are finished."""
    source, missing, notes = model.source, [], []  # missing: bytes, of each folder that is to be filled
    blocks = [(None, *blocks_of(place, how)) for _, place, how in passes
              if "global_swaps" in how and not finished(place, how | same)]
    for name, place, how in reversed(blocks + passes):  # --out itself is the first to be refused
        writer = CheckpointWriter(place, source.raw, source.folder, made=how | same)  # refuses a folder it can't fill
        if finished(place, how | same):
            notes.append(f"{place} is finished" + ", and will be measured again" * (name is not None))
        else:
            missing.append(writer.missing(source.size()))
        if writer.partial.exists():
            with alone_in(writer.partial) if processes()[0] == 0 else nullcontext():  # refuses one that is in use
                pass
    if missing:
        check_memory(args, model)
    if blocks:
        check_global_swaps(args, model)
    check_disk(Path(args.out), sum(missing), args.out)
    return notes


def whole_memory(args, model):
    """{what for: bytes of memory} that global swaps take at most: the dense and the pruned model, the gradient in
    float32, what tokens_at_a_time leave behind in each block and in the one that is computed again, their logits and
    those that a round compares with."""
    config, weights = model.config, sum(layer.weight.numel() for layer in all_prunable(model).values())
    C, M, tokens = config.hidden_size, config.intermediate_size, tokens_at_a_time(args.seqlen)
    itemsize = held_dtype(args, config).itemsize
    kept = 3 if args.device == "cpu" else 1  # as measured: malloc does not give everything back at once
    return {"two models": 2 * sum(p.numel() for p in model.parameters()) * itemsize,
            "a gradient": 4 * weights,
            "activations": kept * tokens * (config.num_hidden_layers * (4 * C + M) + 32 * C + 11 * M) * itemsize,
            "logits": 4 * config.vocab_size * (max(ROUND, args.seqlen) + 6 * tokens)}


def check_global_swaps(args, model):
    """Raise InputError where what global swaps hold does not fit into memory."""
    memory = whole_memory(args, model)
    if (need := sum(memory.values())) > (free := free_share(torch.device(args.device))):
        raise InputError(f"--global-swaps needs {told_bytes(need)} of memory ({told_each(memory)}), and "
                         f"{told_bytes(free)} are free on {args.device}: leave it out, or take a larger machine")


def needed_memory(args, model, methods):
    """{what for: bytes of memory} that each process of a run takes at most, beside what a program with PyTorch takes
    and what evaluation keeps of its text."""
    config, block, whole = model.config, model.model.layers[0], sum(p.numel() for p in model.parameters())
    weights, itemsize = [layer.weight for layer in prunable(block).values()], held_dtype(args, config).itemsize
    elsewhere = config.num_hidden_layers - 1 - has_goal(**vars(args))  # blocks that are not in memory
    n, m = methods[0]["pattern"] or (1 - args.sparsity, 1)
    widest, equations = max(W.shape[1] for W in weights), max(W.numel() * W.shape[1] for W in weights) * (n / m) ** 2
    gram, sensitivity = any(needs_gram(**method) for method in methods), args.allocate == "sensitivity"
    needed = {
        "the calibration text's activations": state_bytes(args, model),
        "weights": (whole - elsewhere * sum(p.numel() for p in block.parameters())) * itemsize,
        "a layer's scores": (56 if "swap" in args.refine else 28) * max(W.numel() for W in weights),
        "a batch's activations": 4 * max(BATCH, args.seqlen) * config.intermediate_size * itemsize,
        "Gram matrices": gram * (24 if args.score == "sparsegpt" else 16) * widest ** 2,
        "refit's equations": args.refit * 20 * min(max(CHUNK, (widest * n / m) ** 2), equations),
        "the logits of trials": sensitivity * 24 * probe_tokens(args.seqlen) * config.vocab_size}
    logits = 8 if itemsize == 4 else itemsize + 8  # bytes: as they come, in float32, and their softmax
    stages = {  # each begins when what the one before held is gone
        "": needed,
        " in evaluation": {name: needed[name] for name in ("weights", "a batch's activations")} |
                          {"a window's logits": logits * args.seqlen * config.vocab_size},
        " for global swaps": whole_memory(args, model) if args.global_swaps else {}}
    largest = max(stages, key=lambda stage: sum(stages[stage].values()))
    return {name + largest: size for name, size in stages[largest].items() if size}


def fastest(work, device):
    """`timed`, short work again: the first time is longer."""
    taken = [timed(work, device)]
    while sum(seconds for seconds, _ in taken) < 0.5 and len(taken) < 5:
        taken.append(timed(work, device))
    return min(taken, key=lambda one: one[0])


@torch.inference_mode()
def needed_seconds(args, config, methods, block, prune_layer):
    """How long pruning takes each process, from a random block and a random head on which its steps are timed."""
    layers, world, sample = prunable(block), processes()[1], torch.arange(min(args.seqlen, 256), device=args.device)
    where = sample, rotary(config, sample)
    (step,), halves = steps(block, *where), steps(block, *where, halves=True)
    x = torch.randn(1, len(sample), config.hidden_size, device=args.device, dtype=held_dtype(args, config))
    groups, stages = readers(step, x, layers), [(half, [one]) for half in halves for one in readers(half, x, layers)]
    gram = any(needs_gram(**method) for method in methods)
    watching, stats = fastest(lambda: input_stats(step, [x], layers, groups, gram), args.device)
    running, _ = fastest(lambda: step(x), args.device)

    def walking(propagate, goal):  # the text through the block, and to where its layers are seen
        if not propagate:
            return running + watching
        seen, _ = fastest(lambda: [input_stats(half, [x], layers, one, gram, (half, [x], layers) if goal else None)
                                   for half, one in stages], args.device)
        return running * (1 + goal) + seen

    tokens, blocks = -(-args.nsamples // world) * args.seqlen, config.num_hidden_layers
    block_seconds = sum(walking(m["propagate"], has_goal(**m)) for m in methods) * tokens / len(sample)
    tried, swapped = 0, 0  # tokens: of trials in a block, of global swaps in all
    if args.allocate != "uniform":  # a pass through the dense model; a trial goes from its block to the last one
        tried = len(layers) * probe_tokens(args.seqlen) if args.allocate == "sensitivity" else 0
        through = running * tried * (blocks + 1) / 2
        block_seconds += len(methods) * ((running + watching) * tokens + through) / len(sample)
    if args.global_swaps:  # a round more is for the curvature
        swapped = (args.global_swaps + 1) * max(ROUND, args.seqlen * world) / world
        # the dense model's output, the pruned one's with a gradient, which takes three passes more, and a check or two
        block_seconds += swapped * 6 * running / len(sample)
    block_seconds += layer_seconds(args, methods, layers, stats, prune_layer)
    compared = len(methods) * tried * blocks + 5 * swapped  # through the head: a round twice, and with a gradient
    heads = compared * head_seconds(config, x[0], args.device) if compared else 0.0
    return block_seconds * blocks + heads


def layer_seconds(args, methods, layers, stats, prune_layer):
    """How long it takes to prune a block's layers by all methods."""
    taken, needed = {}, 0.0  # taken: seconds by what decides them, so that like layers are timed once
    for method, (name, layer) in itertools.product(methods, layers.items()):
        W, options = layer.weight, {k: method[k] for k in LAYER} | dict(refine=refine_of(name, **method))
        how = partial(prune_layer, stats=stats[name], **options)
        part = args.device == "cpu" and args.score != "sparsegpt"  # elsewhere time is not in proportion to the rows
        rows = min(64, len(W)) if part else len(W)
        if (kind := (W.shape, *options.items())) not in taken:
            if args.device != "cpu":
                how(W[:64])  # warms up
            taken[kind], _ = fastest(lambda: how(W[:rows]), args.device)
        needed += taken[kind] * len(W) / rows / (processes()[1] if rows_apart(**options) else 1)
    return needed


def head_seconds(config, x, device):
    """How long a token's logits take, from x [tokens, C], and their comparison with others."""
    vocabulary = min(config.vocab_size, 8192)  # time is in proportion to it
    head = torch.randn(vocabulary, config.hidden_size, device=device, dtype=x.dtype)
    expected = (x @ head.T).float().log_softmax(-1)
    comparing, _ = fastest(lambda: divergence(x @ head.T, expected), device)
    return comparing * config.vocab_size / vocabulary / len(x)


def dry_run(args, config, amount, methods, prune_layer):
    """Print what a run with these methods (the options of prune, each) would take: from the configuration, and from a
    random block."""
    with torch.device("meta"):
        model = GPT(config)
    whole, stored = sum(p.numel() for p in model.parameters()), stored_dtype(config)
    blocks, (rank, world) = config.num_hidden_layers, processes()
    memory = needed_memory(args, model, methods)
    block = Block(config).to(args.device, held_dtype(args, config))
    weights, size = {name: layer.weight for name, layer in prunable(block).items()}, whole * stored.itemsize
    say(f"{args.model}, {amount} pruned: {blocks} blocks with {sum(W.numel() for W in weights.values()):,} weights to "
        f"prune in each, {whole:,} parameters")
    for name, W in weights.items():
        say(f"    {name:<18} {W.shape[0]:>6} x {W.shape[1]}")
    written = (len(methods) + (args.global_swaps > 0)) * size  # what is pruned block by block is written before
    each = f" in each of {world} processes" * (world > 1)
    say(f"memory    {told_bytes(sum(memory.values()))} on {args.device}{each}: {told_each(memory)}; evaluation "
        f"also keeps hidden states of its text, in at most half of what is free")
    say(f"disk      {told_bytes(size)} to read, {told_bytes(written)} to write")
    needed = needed_seconds(args, config, methods, block, prune_layer)  # the last: it takes a while itself
    unit, seconds = next((u for u in (("days", 86400), ("hours", 3600), ("minutes", 60)) if needed > 2 * u[1]),
                         ("seconds", 1))
    say(f"time      {needed / seconds:,.1f} {unit} on {args.device}, estimated from a part of one of the {blocks} "
        f"blocks and as busy as the machine is now; reading, writing and evaluation come on top")
    if rank == 0:
        record(args, {"memory_gb": {name: size / 1e9 for name, size in memory.items()}, "read_gb": size / 1e9,
                      "written_gb": written / 1e9, "seconds": needed})
