"""The plan that `train.py --dry-run` prints: data, cost, time, memory, disk and likely mistakes. Nothing is written."""

import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from checkpoint.opened import name_of
from data.autoencoder import LatentSpace
from data.clips import ClipDataset
from data.condition import open_condition
from data.images import ImageDataset, MapDataset
from data.order import make_loader, next_batch, order_of
from runtime.devices import precision_warning, set_precision
from runtime.errors import UserError
from runtime.shapes import sides
from training import finetune
from training.cost import count, gib, rows
from training.meter import peak_memory
from training.setup import build_model, class_notes, divide, load_data
from training.trainer import Trainer

FEW_IMAGES = 50  # of a class
SAMPLED = 200  # images that are looked at
STEPS, STEP_LIMIT, LIMIT = 3, 10.0, 20.0  # updates to measure; seconds that one, and all of them, may take


def show(config, context, dataset=None, resumed=None):
    """Print the plan on rank 0. All ranks call it. config, resumed: see `setup.resolve`. Raises UserError."""
    recipe, compute, images = config.recipe, config.compute, config.recipe.global_batch_size
    dataset, options = load_data(config.data, config.model, recipe, context, dataset)
    total_steps, done = recipe.total_steps(len(dataset)), (resumed and resumed.step) or 0
    warnings = data_warnings(options, dataset) + recipe_warnings(recipe, total_steps, bool(config.finetune.init_from))
    try:
        space, why_not = dataset.open_space(config.vae), ""
    except UserError as error:
        space, why_not = LatentSpace(4, 8, 1.0, 0.0), "there is no autoencoder"  # the space of the released ones
        warnings.append(f"training would not start: {error}")
    condition = open_condition(config.data, dataset, options.num_classes)  # not on the meta device: it has values
    with torch.device("meta"):
        model = build_model(options, recipe, space, condition)
    shapes = divide(dataset, model.sizes, space.factor, images)
    finetune.freeze(model, config.finetune)
    model.gradient_checkpointing, num_shards = compute.grad_checkpoint, 1
    if compute.shard:
        from training.sharding import make_mesh  # takes most of a second to import

        num_shards = make_mesh(context, compute.shard)["shard"].size()
    batch_size = math.ceil(images / context.world_size / compute.grad_accum)
    cost = count(model, batch_size, compute.precision, num_shards, len(recipe.ema_decays), recipe.guidance_in_target)
    free = free_memory(context)
    flops, needed = images * cost["training_flops_per_image"], cost["training_memory_bytes"]["total"]
    steps = f"{total_steps:,} steps, {images * total_steps / len(dataset):,.1f} epochs, {flops * total_steps:.3g} FLOP"
    disk, disk_warning = checkpoints(config.run, model, len(recipe.ema_decays), done, total_steps)
    plan = [
        ("data", f"{len(dataset):,} images of {len(dataset.classes):,} classes from {config.data.data_path}"),
        *[("shapes", line) for line in shapes[:1]],
        ("model", f"{name_of(model.config)} ({model.block}), {cost['tokens']:,} tokens"),
        *rows(cost, free),
        ("checkpoints", disk),
        ("update", f"{flops / 1e12:,.2f} TFLOP, {images:,} images"),
        ("whole run", steps + (f"; {done:,} steps are made" if done else "")),
    ]
    if free is not None and needed >= free:
        why_not = "the memory is too small"
        also = "" if compute.shard else ", or --shard with several processes"
        way_out = f"lower --global-batch-size, or pass --grad-accum or --grad-checkpoint{also}"
        warnings.append(f"the device has {gib(free)} free, of {gib(needed)} needed; {way_out}")
    warnings += [*shapes[1:], disk_warning, precision_warning(compute.precision, context.device)]

    rate = product_rate(context.device, compute.precision)
    seconds, how = flops / context.world_size / rate, f"at least, at {rate / 1e12:,.2f} TFLOP/s of its matrix products"
    if not why_not and seconds > STEP_LIMIT:
        why_not = f"one would take more than {STEP_LIMIT:g} s"
    if why_not := next(filter(None, context.all_gather(why_not)), ""):  # all ranks have to decide alike
        how += f"; not measured, because {why_not}"
    else:
        model = build_model(options, recipe, space, condition)
        finetune.freeze(model, config.finetune)
        space, condition = space.to(context.device), condition.to(context.device)
        trainer = Trainer(recipe, compute, context, model, space, total_steps, condition)
        seconds, peak = measure(trainer, dataset, config.data.num_workers)
        how = f"measured, {images / seconds:,.1f} images a second"
        if context.device.type == "cuda":
            how += f"; {gib(peak)} of memory were used at most"
    plan.append(("time of an update", f"{seconds:,.3g} s {how}"))
    plan.append(("time of the run", f"{seconds * max(total_steps - done, 0) / 3600:,.2f} hours on {context.describe()}"))
    lines = [f"  {title:<24}{words}" for title, words in plan] + [f"Warning: {line}" for line in warnings if line]
    context.print("\n".join(["Plan of the run; nothing is written", *lines]))


def data_warnings(options, dataset):
    """Lines about classes with few images, and, of a sample, images that are smaller than the crop or cannot be read."""
    lines, size = [*dataset.notes, *class_notes(dataset.classes, options.num_classes)], options.image_size
    height, width = sides(size)
    counts = np.bincount(dataset.labels, minlength=len(dataset.classes))
    few = [f"{dataset.classes[i]} ({counts[i]})" for i in counts.argsort(kind="stable") if counts[i] < FEW_IMAGES]
    if few:
        more = ", ..." if len(few) > 5 else ""
        lines.append(f"{len(few)} of {len(counts)} classes have fewer than {FEW_IMAGES} images: {', '.join(few[:5])}{more}")
    if not isinstance(dataset, ImageDataset) or isinstance(dataset, MapDataset | ClipDataset):
        return lines
    sampled = np.random.default_rng(0).permutation(len(dataset))[:SAMPLED]
    small = unreadable = 0
    for index in sampled:
        try:
            with Image.open(dataset.file(int(index))) as image:
                small += image.height < height or image.width < width
        except Exception:  # PIL raises a dozen kinds
            unreadable += 1
    looked_at = f"of {len(sampled)} images looked at"
    if small:
        lines.append(f"--image-size {size}: {small} {looked_at} are smaller, and will be enlarged")
    if unreadable:
        lines.append(f"{unreadable} {looked_at} cannot be read; training ends at the first one without --skip-bad-images")
    return lines


def recipe_warnings(recipe, total_steps, finetuned):
    """Lines about a learning rate that was not scaled to the batch, and an EMA longer than the run."""
    lines, ratio = [], recipe.global_batch_size / 256
    if recipe.lr == recipe.defaults()["lr"] and not 0.5 < ratio < 2:
        other = f"in proportion it would be {recipe.lr * ratio:.2g}, with the square root {recipe.lr * ratio**0.5:.2g}"
        size = f"--global-batch-size is {recipe.global_batch_size}"
        lines.append(f"--lr {recipe.lr:g}: is the paper's for batches of 256, {size}; {other}")
    left = recipe.ema_decay**total_steps
    if left > 0.1 and not recipe.ema_warmup and not finetuned:
        lines.append(f"--ema-decay {recipe.ema_decay}: after {total_steps:,} steps the average still has {left:.0%} of the "
            "initial weights; pass --ema-warmup, or --more-ema-decays for others")  # fmt: skip
    return lines


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


def checkpoints(run, model, num_averages, done, total_steps):
    """(text, warning or None) about the checkpoints: float32 weights, averages, and the optimizer's two moments."""
    stored = [p for p in model.parameters() if p.requires_grad or not model.own]
    size = 4 * sum(p.numel() * (1 + num_averages + 2 * p.requires_grad) for p in stored)
    kept = made = math.ceil(total_steps / run.ckpt_every) - done // run.ckpt_every if total_steps > done else 0
    if run.keep_last:
        also = (total_steps - done) // math.lcm(run.ckpt_every, run.keep_every) if run.keep_every else 0
        kept = min(made, run.keep_last + also)
    most = min(made, kept + bool(run.keep_last))  # an old one is deleted once the new one is written
    folder = Path(run.run_dir or run.results_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    text = f"{made:,} to write, {kept:,} to keep, {gib(size)} each, {gib(size * most)} of {gib(free)} free on the disk"
    way_out = "raise --ckpt-every" if run.keep_last == 1 else "pass --keep-last 1, or raise --ckpt-every"
    warning = f"{folder}: the checkpoints need {gib(size * most)}, {gib(free)} are free; {way_out}"
    return text, warning if size * most > free else None


def product_rate(device, precision):
    """FLOP/s that a product of large matrices reaches on the device."""
    size = 1024 if device.type == "cpu" else 8192
    a, times = torch.rand(size, size, device=device), []
    with set_precision(precision, device):
        for _ in range(4):
            start = time.perf_counter()
            float((a @ a)[0, 0])  # waits for the device
            times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def measure(trainer, dataset, num_workers):
    """(seconds of an update, bytes of memory at most) of a few real updates, data included, after one to warm up."""
    context, size, seed = trainer.context, trainer.recipe.global_batch_size, trainer.recipe.global_seed
    order = order_of(dataset, size, seed, context.rank, context.world_size, 0, (1 + STEPS) * size)
    batches, times = iter(make_loader(dataset, order, num_workers)), []
    for _ in range(1 + STEPS):
        start = time.perf_counter()
        batch, failure = next_batch(batches)
        if failure := next(filter(None, context.all_gather(failure)), None):
            del batches  # ends the workers
            raise UserError(failure)
        float(trainer.step(batch).grad_norm)  # waits for the device
        times.append(time.perf_counter() - start)
        if context.any([sum(times) > LIMIT])[0]:
            break
    seconds = times[1:] or times
    return max(context.all_gather(sum(seconds) / len(seconds))), peak_memory(context.device)
