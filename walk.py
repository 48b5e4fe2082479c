"""The walk through a model that all pruning takes: block after block, one in memory at a time.

For each block: read its weights from the checkpoint, run the calibration text's hidden states through it while the
inputs of every linear layer are summed up (data/calibration.py), prune each layer (`prune_layer` of dsnot.py, which is
handed down as an argument), run the hidden states through the pruned block, write it, let it go. With targets that make
up for a part of what earlier layers lost (`layer_goal`), a dense copy of the block moves what flows in the dense model.
A finished block on disk is the record of progress: start an interrupted run again and it goes on. Swaps by the whole
model's output (`global_swaps.py`) come last and need all of it in memory.

Several processes share the calibration text and the rows of every weight (not of SparseGPT's without a pattern).

Shapes: hidden states are [sequences, tokens, C]; a layer's weight W and its goal are [out, in].
"""

import copy
import itertools
import time
from contextlib import nullcontext

import torch

from allocate import allocation
from data.calibration import input_stats, move, place_for, readers, steps
from data.command import DeadEnd, InputError, check_disk, versions
from data.estimate import held_states
from data.method import blocks_of, fits_weights, has_goal, needs_gram, refine_of, rows_apart
from data.processes import add_up, from_first, processes, progress_bar, say, wait
from data.writer import CheckpointWriter, finished, noted, remove, shard
from global_swaps import swap_globally
from gpt import GPT, all_prunable, prunable, rotary
from swaps import relative_error

# What a layer's output should be with --propagate, (a, b). a mixes two targets: at 0 what the dense weights make of the
# inputs that the layer now gets, at 1 its output in the dense model. b, for o_proj and down_proj alone, whose outputs
# are added to the hidden state: the share of the hidden state's error so far (dense less pruned) that they also try to
# repair. Weights can make up for some of it, a mask alone for less (tests/compare_goal.py); trying all of it fits them
# too closely to the calibration text (results/aim-smollm2.json).
AIM = {"mask": (0.5, 0.0), "weights": (0.5, 0.5)}


def layer_goal(W, stats, adjusts):
    """The goal [out, in] of a layer, as in swap_refine, from its InputStats; None: what its dense weights make of its
    inputs. adjusts: "mask" or "weights", what its method can choose (see AIM)."""
    if stats.cross is None:
        return None
    a, b = AIM[adjusts]
    goal = W.float() @ torch.lerp(stats.gram, stats.cross, a)  # W z is the output in the dense model, of its input z
    return goal if stats.lack is None else goal.add_(stats.lack, alpha=b)


def prune_rows(W, stats, goal, prune_layer, **options):
    """prune_layer, each process taking its share of the rows where they are apart, else all taking the first one's."""
    rank, world = processes()
    if world == 1 or not rows_apart(**options):
        return from_first(prune_layer(W, stats, goal=goal, **options))
    rows = torch.arange(len(W), device=W.device).tensor_split(world)[rank]
    new = torch.zeros_like(W, dtype=torch.float32)
    new[rows] = prune_layer(W[rows], stats, goal=None if goal is None else goal[rows], **options)
    add_up(new)
    return new


def prune_linear(weight, name, stats, adjusts, dtype, **options):
    """prune_rows of one layer's weight, in place, rounded to the dtype in which it will be read again. Returns its
    record. adjusts: as in layer_goal. Raises DeadEnd where its inputs are not finite or too few to fit weights to, or
    where these don't fit into the dtype."""
    if not all(x.isfinite().all() for x in (stats.square, stats.cross, stats.lack) if x is not None):
        raise DeadEnd(f"the calibration activations that flow into {name} are not finite")
    try:
        W = prune_rows(weight, stats, layer_goal(weight, stats, adjusts), **options).to(dtype)
    except torch.linalg.LinAlgError:
        raise DeadEnd(f"the calibration activations that flow into {name} are too few or too much alike to fit its "
                      f"weights to them: give more --nsamples, or another --calib text") from None
    if not W.isfinite().all():  # float16 ends at 65504
        raise DeadEnd(f"the weights that suit {name} do not fit into {str(dtype).removeprefix('torch.')}, in which "
                      f"the checkpoint is stored: leave out --refit or --score sparsegpt, which change them")
    error = {} if stats.gram is None else {"error": relative_error(weight, W, stats.gram)}
    weight.copy_(W)
    return layer_record(name, W) | error


@torch.no_grad()
def prune_block(block, where, hidden, dense, prefix, stored, *, score, refine, sparsity, refit=False, propagate=False,
                refine_layers="all", **options):
    """Prune the linear layers of one block in place and move `hidden`, a list of [sequences, tokens, C], through it,
    and `dense`, what flows in the dense model (empty: not needed). where: (positions, rope) for `steps`; sparsity:
    {layer's name: share}; stored: a tensor's name -> its dtype on disk. Returns a record per layer.

    With propagate each layer is pruned on inputs that the pruned layers before it have made; without, all layers of a
    block on inputs that the block's dense weights have made. Of either half of a block the last layer, o_proj or
    down_proj, is the one whose output is added to the hidden state."""
    gram = needs_gram(score, refine, refit)
    adjusts = "weights" if fits_weights(score, refit) else "mask"
    linears, records, original = prunable(block), [], copy.deepcopy(block) if dense else None
    for half, step in enumerate(steps(block, *where, halves=propagate)):
        teacher = (steps(original, *where, halves=True)[half], dense, prunable(original)) if dense else None
        groups = readers(step, hidden[0][:1], linears)
        for stage in [[group] for group in groups] if propagate else [groups]:
            adds = bool(dense) and stage == groups[-1:] and AIM[adjusts][1] > 0
            stats = input_stats(step, hidden, linears, stage, gram, teacher, adds)
            for name in itertools.chain(*stage):
                layer = f"{prefix}.{name}"
                records.append(prune_linear(
                    linears[name].weight, layer, stats[name], adjusts, stored(f"{layer}.weight"), score=score,
                    refine=refine_of(name, refine, refine_layers), refit=refit, sparsity=sparsity[layer], **options))
        move(step, hidden)
        if dense:
            move(teacher[0], dense)
    return records


def layer_record(name, W):
    return {"layer": name, "weights": W.numel(), "sparsity": (W == 0).double().mean().item()}


@torch.inference_mode()
def prune(model, samples, out, made, prune_layer, *, batch=8, propagate=False, sparsity=None, allocate="uniform",
          **options):
    """Prune a streamed model block by block into the checkpoint folder `out`.

    samples [nsamples, seqlen]: calibration ids, of which each process takes its share. made: a dict that names this
    run and its options; an interrupted run of that name goes on, a finished one is not made again. prune_layer: that of
    dsnot.py, or a function like it; propagate: see prune_block; options: refine_layers and those of prune_layer.
    Returns a record per layer, {layer, weights: how many, sparsity, error}, which is also written to out/pruning.json,
    with the seconds that it took; error, where Gram matrices are needed: relative_error on the inputs that the layer
    gets here, whatever its goal. Raises InputError where the model is not streamed, activations are not finite or the
    disk is too small."""
    if not model.streams:
        raise InputError("a model in memory can't be pruned into a folder: load it with stream=True")
    begin = time.perf_counter()
    source, device, count = model.source, model.place["device"], len(model.model.layers)
    source.check_dense()
    rank, world = processes()
    if done := finished(out, made):
        return done["layers"]
    positions = torch.arange(samples.shape[1], device=device)
    where, samples = (positions, rotary(model.config, positions)), samples[rank::world]
    files, aims = versions(source.paths), has_goal(propagate, **options)
    states = held_states(*samples.shape, len(all_prunable(model)), aims, allocate)
    home = place_for(model.config, states, torch.device(device), model.place["dtype"])
    writer = CheckpointWriter(out, model.config.raw, source.folder, made=made)
    wait()  # everybody has looked at the folder, which the first one now fills
    with writer if rank == 0 else nullcontext():
        if rank == 0:
            check_disk(writer.partial, writer.missing(source.size()), out)
        wait()  # the folder is there
        done, seconds = writer.progress(count)
        if done:
            say(f"{out}: going on after {len(done)} of {count} blocks")

        def embedded():  # made twice, so that what allocation has used is gone before it is needed again
            return (model.embed(ids).to(home) for ids in samples.split(batch))

        shares = allocation(model, where, embedded(), sparsity, allocate, whole=rows_apart(**options))
        hidden = list(embedded())  # the input of the next block
        dense, records = list(hidden) if aims else [], []
        for i in progress_bar(range(count), desc="pruning", unit="block"):
            block = model.block(i)
            prefix, file = f"model.layers.{i}", shard(i, count)
            if i in done:
                move(steps(block, *where)[0], dense)
                writer.load(file, block, prefix)
                move(steps(block, *where)[0], hidden)
                records += done[i]
            else:
                records += prune_block(block, where, hidden, dense, prefix, source.stored, prune_layer=prune_layer,
                                       sparsity=shares, propagate=propagate, **options)
                if rank == 0:
                    writer.note(run=made, seconds=seconds + time.perf_counter() - begin, layers=records)
                    writer.save(file, block, prefix, source)
            del block  # before the next one is read
        if versions(source.paths) != files:
            raise DeadEnd(f"{source.folder} was changed while it was being pruned: give the command again")
        if rank == 0:
            writer.write(shard(count, count), source.rest())
        wait()  # everybody has read what the next line moves
    wait()  # the checkpoint is in its place
    return records


def prune_globally(model, samples, out, made, prune_layer, *, global_swaps, pattern=None, **options):
    """`prune` into the folder of blocks_of, which is removed once `out` is there, then so many rounds of
    `swap_globally`, for which the dense and the pruned model are held whole in memory. Arguments as in `prune`."""
    (start, local), first, source = blocks_of(out, made), processes()[0] == 0, model.source
    if done := finished(out, made):
        if first and (finished(start, local) or not start.exists()):  # a run was killed before or while it was removed
            remove(start)
        return done["layers"]
    prune(model, samples, start, local, prune_layer, pattern=pattern, **options)
    begin, before = time.perf_counter(), noted(start / "pruning.json")
    with CheckpointWriter(out, model.config.raw, start, made=made) if first else nullcontext() as writer:
        dense, pruned = (GPT.from_pretrained(folder, **model.place) for folder in (source.folder, start))
        losses = swap_globally(pruned, dense, samples, global_swaps, pattern)
        records = [layer_record(name, layer.weight) for name, layer in all_prunable(pruned).items()]
        if first:
            seconds = before["seconds"] + time.perf_counter() - begin
            writer.note(run=made, seconds=seconds, losses=losses, layers=records)
            writer.write("model.safetensors", source.as_stored(pruned.tensors()) | source.rest())
    dense = pruned = None  # mapped files would keep Windows from removing them
    if first:
        remove(start)
    wait()
    return records
