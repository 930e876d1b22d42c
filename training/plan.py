"""The plan of a training run, which `train.py --dry-run` prints: data, cost, time, memory and disk, and what may be a
mistake. Nothing is written."""

import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.autoencoder import Autoencoder, StoredSpace
from data.images import Digits, ImageDataset
from data.order import GlobalOrder, make_loader, next_batch
from runtime.devices import precision_warning, set_precision
from runtime.errors import UserError
from training import finetune, resume
from training.cost import forward_macs, trainable, training_memory
from training.many_gpus import Step
from training.meter import peak_memory
from training.setup import build_model, open_text
from training.trainer import Trainer

FEW_IMAGES = 50  # of a class
STEPS, STEP_LIMIT, LIMIT = 3, 10.0, 20.0  # updates to measure; seconds that one, and all of them, may take


def show(config, context, dataset):
    """Print the plan on rank 0. All ranks call it. config: a TrainConfig whose defaults are resolved. Raises UserError
    for a model that cannot be built."""
    recipe, total_steps = config.recipe, config.recipe.total_steps(len(dataset))
    checkpoint = resume.peek(config.run)
    done = (checkpoint.step or 0) if checkpoint else 0
    rows, warnings = [], data_warnings(config, dataset) + recipe_warnings(config, total_steps)
    try:
        space = dataset.open_space(config.vae)
    except UserError as error:
        if not isinstance(dataset, ImageDataset):
            raise
        space = StoredSpace(4, 8, 1.0, 0.0)  # that of the released autoencoders
        warnings.append(f"training would not start: {error}")
    text = open_text(config, dataset)  # not on the meta device: it has values
    with torch.device("meta"):
        model = build_model(config, space, text)
    finetune.freeze(model, config.finetune.freeze)
    model.gradient_checkpointing = config.compute.grad_checkpoint
    macs = forward_macs(model)

    images = recipe.global_batch_size * total_steps
    rows.append(("data", f"{len(dataset):,} images of {len(dataset.classes):,} classes from {config.data.data_path}"))
    rows.append(("model", f"{config.model.model} ({config.design.block}), {model.pos_embed.shape[1]:,} tokens"))
    rows.append(("parameters", f"{trainable(model):,} trainable"))
    rows.append(("forward pass", f"{macs / 1e9:,.2f} GMACs an image"))
    flops = 6 * macs * recipe.global_batch_size  # two FLOPs a MAC; the backward pass costs twice the forward pass
    rows.append(("update", f"{flops / 1e12:,.2f} TFLOP, {recipe.global_batch_size:,} images"))
    steps = f"{total_steps:,} steps, {images / len(dataset):,.1f} epochs, {flops * total_steps:.3g} FLOP"
    rows.append(("whole run", steps + (f"; {done:,} steps are made" if done else "")))

    batch_size = math.ceil(recipe.global_batch_size / context.world_size / config.compute.grad_accum)
    num_shards = 1
    if config.compute.shard:
        from training.sharding import make_mesh  # takes most of a second to import

        num_shards = make_mesh(context, config.compute.shard)["shard"].size()
    memory = memory_parts(model, batch_size, config.compute.precision, num_shards)
    free = free_memory(context)
    rows += [(f"memory: {name}", gib(value)) for name, value in memory.items()]
    needed = sum(memory.values())
    rows.append(("memory in all", f"{gib(needed)} on each device, of {gib(free)} free" if free else gib(needed)))
    if isinstance(space, Autoencoder):
        rows.append(("", "the autoencoder, which encodes the batch beforehand, is not counted"))
    fits = free is None or needed < free
    if not fits:
        also = "" if config.compute.shard else ", or --shard with several processes"
        warnings.append(f"the device has {gib(free)} free, of {gib(needed)} needed; lower --global-batch-size, or pass "
            f"--grad-accum or --grad-checkpoint{also}")  # fmt: skip
    files, disk = checkpoint_rows(config, model, done, total_steps)
    rows += files
    warnings += disk

    rate = product_rate(context.device, config.compute.precision)
    seconds, how = flops / context.world_size / rate, f"at least, at {rate / 1e12:,.2f} TFLOP/s of its matrix products"
    why_not = "" if fits else "the memory is too small"
    if fits and seconds > STEP_LIMIT:
        why_not = f"one would take more than {STEP_LIMIT:g} s"
    elif fits and isinstance(dataset, ImageDataset) and type(space) is StoredSpace:
        why_not = "there is no autoencoder"
    why_not = next(filter(None, context.all_gather(why_not)), "")  # all ranks have to decide alike
    if why_not:
        how += f"; not measured, because {why_not}"
    else:
        seconds, peak = measure(config, context, dataset, space)
        how = f"measured, {recipe.global_batch_size / seconds:,.1f} images a second"
        if context.device.type == "cuda":
            how += f"; {gib(peak)} of memory were used at most"
    rows.append(("time of an update", f"{seconds:,.3g} s {how}"))
    rows.append(("time of the run", f"{seconds * max(total_steps - done, 0) / 3600:,.2f} hours on {context.describe()}"))
    if warning := precision_warning(config.compute.precision, context.device):
        warnings.append(warning)
    context.print("Plan of the run; nothing is written")
    for title, text in rows:
        context.print(f"  {title:<24}{text}")
    for warning in warnings:
        context.print(f"Warning: {warning}")


def gib(nbytes):
    return f"{nbytes / 2**30:,.2f} GiB"


# ----------------------------------------------------------------------------------------------------------------------
# Warnings


def data_warnings(config, dataset, num_sampled=200):
    """Lines about classes with few images, labels without images, and images smaller than the crop (of a sample)."""
    lines, size, classes = list(dataset.notes), config.model.image_size, config.model.num_classes
    counts = np.bincount(dataset.labels, minlength=len(dataset.classes))
    few = [f"{dataset.classes[i]} ({counts[i]})" for i in counts.argsort(kind="stable") if counts[i] < FEW_IMAGES]
    if few:
        more = ", ..." if len(few) > 5 else ""
        lines.append(f"{len(few)} of {len(counts)} classes have fewer than {FEW_IMAGES} images: {', '.join(few[:5])}{more}")
    if len(counts) < classes:
        lines.append(f"--num-classes {classes}: the data has {len(counts)} classes, so labels from {len(counts)} on are "
            "never trained")  # fmt: skip
    if not isinstance(dataset, ImageDataset) or isinstance(dataset, Digits):
        return lines
    sampled = np.random.default_rng(0).permutation(len(dataset))[:num_sampled]
    small = unreadable = 0
    for index in sampled:
        try:
            with Image.open(dataset.path(int(index))) as image:
                small += min(image.size) < size
        except Exception:  # PIL raises a dozen kinds
            unreadable += 1
    if small:
        lines.append(f"--image-size {size}: {small} of {len(sampled)} images looked at are smaller, and will be enlarged")
    if unreadable:
        lines.append(f"{unreadable} of {len(sampled)} images looked at cannot be read; training ends at the first one "
            "unless --skip-bad-images is given")  # fmt: skip
    return lines


def recipe_warnings(config, total_steps):
    """Lines about a learning rate that was not scaled to the batch, and an EMA longer than the run."""
    recipe, lines = config.recipe, []
    ratio = recipe.global_batch_size / 256
    if recipe.lr == recipe.defaults()["lr"] and not 0.5 < ratio < 2:
        lines.append(f"--lr {recipe.lr:g}: is the paper's for batches of 256, --global-batch-size is "
            f"{recipe.global_batch_size}; in proportion it would be {recipe.lr * ratio:.2g}, with the square root "
            f"{recipe.lr * ratio**0.5:.2g}")  # fmt: skip
    left = recipe.ema_decay**total_steps
    if left > 0.1 and not recipe.ema_warmup and not config.finetune.init_from:
        lines.append(f"--ema-decay {recipe.ema_decay}: after {total_steps:,} steps the average still has {left:.0%} of the "
            "initial weights; pass --ema-warmup")  # fmt: skip
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# Memory and disk


def memory_parts(model, batch_size, precision, num_shards=1):
    """Bytes by what holds them in a step, where --shard divides among `num_shards` processes: those of `Step.memory`, and
    the gradients of a block's activations, or with gradient checkpointing the block's activations that are computed
    again."""
    parts = Step(model, batch_size, precision, shard=True).memory(num_shards)
    parts = {name.split(" ")[0]: nbytes for name, nbytes in parts.items() if name != "total"}
    kept, model.gradient_checkpointing = model.gradient_checkpointing, 0
    whole = training_memory(model, batch_size, precision)["activations"] if kept else parts["activations"]
    model.gradient_checkpointing = kept
    return parts | {"backward pass": whole // len(model.blocks) * (2 if kept else 1)}


def free_memory(context):
    """Bytes that a process can use on its device, None where that is not known."""
    if context.device.type == "cuda":
        return torch.cuda.mem_get_info(context.device)[0]
    if context.device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux
        return None
    return available // int(os.environ.get("LOCAL_WORLD_SIZE", context.world_size))


def checkpoint_rows(config, model, done, total_steps):
    """(rows of the plan, warnings) about the checkpoints: float32 weights, EMA, and the optimizer's two moments."""
    run, everything = config.run, sum(p.numel() for p in model.parameters())
    size = 4 * (2 * everything + 2 * trainable(model))
    count = total_steps // run.ckpt_every + bool(total_steps % run.ckpt_every)
    made = count - done // run.ckpt_every if total_steps > done else 0
    kept = made
    if run.keep_last:
        periodic = math.lcm(run.ckpt_every, run.keep_every) if run.keep_every else 0
        kept = min(made, run.keep_last + ((total_steps - done) // periodic if periodic else 0))
    most = min(made, kept + bool(run.keep_last))  # an old one is deleted once the new one is written
    folder = Path(run.run_dir or run.results_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    text = f"{made:,} to write, {kept:,} to keep, {gib(size)} each, {gib(size * most)} of {gib(free)} free on the disk"
    if size * most <= free:
        return [("checkpoints", text)], []
    way_out = "raise --ckpt-every" if run.keep_last == 1 else "pass --keep-last 1, or raise --ckpt-every"
    return [("checkpoints", text)], [f"{folder}: the checkpoints need {gib(size * most)}, {gib(free)} are free; {way_out}"]


# ----------------------------------------------------------------------------------------------------------------------
# Time


def product_rate(device, precision):
    """FLOP/s that a product of large matrices reaches on the device."""
    size = 1024 if device.type == "cpu" else 8192
    a = torch.rand(size, size, device=device)
    times = []
    with set_precision(precision, device):
        for _ in range(4):
            start = time.perf_counter()
            float((a @ a)[0, 0])  # waits for the device
            times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def measure(config, context, dataset, space):
    """(seconds of an update, bytes of memory at most) of a few real updates, data included, after one to warm up. Raises
    UserError for data that cannot be read."""
    recipe, compute = config.recipe, config.compute
    text, total_steps = open_text(config, dataset, context.device), recipe.total_steps(len(dataset))
    model = build_model(config, space, text)
    finetune.freeze(model, config.finetune.freeze)
    space = space.place(context.device)
    trainer = Trainer(recipe, compute, context, model, space, compute.precision, total_steps, text)
    num_images = (1 + STEPS) * recipe.global_batch_size
    order = GlobalOrder(len(dataset), recipe.global_batch_size, recipe.global_seed, context.rank, context.world_size, 0,
        num_images)  # fmt: skip
    batches, times = iter(make_loader(dataset, order, config.data.num_workers)), []
    for _ in range(1 + STEPS):
        start = time.perf_counter()
        batch, failure = next_batch(batches)
        if failures := list(filter(None, context.all_gather(failure))):
            del batches  # ends the workers
            raise UserError(failures[0])
        float(trainer.step(batch).grad_norm)  # waits for the device
        times.append(time.perf_counter() - start)
        if context.any([sum(times) > LIMIT])[0]:
            break
    seconds = times[1:] or times
    return max(context.all_gather(sum(seconds) / len(seconds))), peak_memory(context.device)
