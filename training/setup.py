"""What a run is set up from: precision, data, latent space and model, checked before anything slow."""

import dataclasses
import math

import numpy as np
import torch

from checkpoint.config import DEFAULT
from data.autoencoder import LatentSpace, model_sizes
from data.condition import Classes, open_condition
from data.images import MapDataset, load_dataset
from data.latents import StoredLatents, read_statistics
from data.statistics import measure
from diffusion.registry import OBJECTIVES
from models import DiT_models
from runtime.config import differences
from runtime.devices import check_compile, check_memory, has_bf16
from runtime.errors import UserError
from runtime.shapes import sides
from training import finetune
from training.config import RecipeConfig
from training.trackers import check_installed


def resolve(config, context, resumed=None):
    """(config, source) of a TrainConfig: the config with the precision, the model's name and its design filled in, and what
    `finetune.resolve` returns as the source of the first weights. resumed: the Checkpoint to continue. Raises UserError."""
    check_installed(config.monitor.report_to)
    check_batch(config.recipe, config.compute, context.world_size)
    compute = resolve_precision(config.compute, context.device)
    model, source = finetune.resolve(config.model, config.finetune, resumed)
    if config.data.kind != "classes":  # which takes the place of the classes
        model = dataclasses.replace(model, num_classes=0)
    return dataclasses.replace(config, model=model, compute=compute), source


def resolve_precision(compute, device):
    """The ComputeConfig with the precision that its default means on this device. Raises UserError."""
    check_compile(compute.compile, device.type)
    default = "bf16" if device.type == "cuda" and has_bf16(device) else "fp32"
    return dataclasses.replace(compute, precision=compute.precision or default)


def check_batch(recipe, compute, world_size):
    size, parts = recipe.global_batch_size, compute.grad_accum
    if size % world_size:
        nearest = math.ceil(size / world_size) * world_size
        raise UserError(f"--global-batch-size {size}", f"not a multiple of the {world_size} processes", f"{nearest} is")
    if parts * world_size > size:
        problem = f"more than the {size // world_size} images that a process has of each batch"
        raise UserError(f"--grad-accum {parts}", problem, "lower it")


def load_data(data, model, recipe, context, dataset=None):
    """(dataset, ModelOptions with the number of classes) of a DataConfig, ModelOptions and a RecipeConfig. dataset: in
    place of the one that `data` names. All ranks call it. Raises UserError."""
    with context.together():
        if isinstance(dataset, MapDataset):
            dataset.check_sides(model.image_size)
        dataset = dataset or load_dataset(data, model.image_size, recipe.global_seed, context, model.num_frames)
        found = len(dataset.classes)
        if model.aspect_buckets and (dataset.in_memory or isinstance(dataset, StoredLatents)):
            problem = f"{data.data_path} holds images of one shape"
            raise UserError(f"--aspect-buckets {model.aspect_buckets}", problem, "leave the option out")
        if model.num_classes and found > model.num_classes:
            way_out = f"pass --num-classes {found}, or 0 to ignore them"
            raise UserError(f"--num-classes {model.num_classes}", f"{data.data_path} has {found} classes", way_out)
        if (images := recipe.epochs * len(dataset)) < (size := recipe.global_batch_size):
            problem = f"more than the {images} images of all epochs"
            raise UserError(f"--global-batch-size {size}", problem, "lower it, or raise --epochs")
    if model.aspect_buckets:
        dataset.read_ratios(context)
    return dataset, dataclasses.replace(model, num_classes=found if model.num_classes is None else model.num_classes)


def prepare(config, context, dataset, source=None):
    """(latent space, condition, model, lines to log) of a resolved TrainConfig; source: as resolved. Raises UserError."""
    space = dataset.open_space(config.vae, decode=bool(config.evaluation.eval_every or config.monitor.sample_every))
    condition = open_condition(config.data, dataset, config.model.num_classes)
    check_size(config.model, config.recipe, config.compute, context, space, condition)
    model = build_model(config.model, config.recipe, space, condition)
    guidable = OBJECTIVES[model.objective].average and (model.num_classes or model.condition)
    if (scale := config.recipe.guidance_in_target) != 1 and not guidable:
        raise UserError(f"--guidance-in-target {scale}", "is for --objective meanflow with classes", "leave it out")
    lines = [*dataset.notes, *class_notes(dataset.classes, config.model.num_classes)]
    lines += divide(dataset, model.sizes, space.factor, config.recipe.global_batch_size)
    lines += [f"Conditioned on {condition.describe()}"]
    if model.time_shift != 1:
        lines += [f"The time of the flow is shifted by {model.time_shift:.4g} (--time-shift), recorded for sampling"]
    if source:
        words, dropout = config.finetune.keep_classes, config.recipe.label_dropout
        rows = finetune.label_rows(source, words, config.model.num_classes, dropout, dataset.classes)
        lines += finetune.load_into(model, source, rows)
        ignored = RecipeConfig.changeable() | {"global_seed", "global_batch_size", "label_dropout", "latent_norm"}
        if changed := differences(source.options, config.recipe.flat(), ignored):
            lines += [f"The weights were trained with {'; '.join(changed)}"]
    return space, condition, model, lines + finetune.freeze(model, config.finetune, source)


def normalise(config, context, dataset, space, resumed=None, source=None):
    """Give the latent space, which is on its device, the statistics that --latent-norm asks for; a run that is resumed
    keeps those of its checkpoint. Returns lines for the log. All ranks call it. Raises UserError."""
    with context.together():
        before = (resumed or source) if config.recipe.latent_norm is None else resumed
        statistics, origin = before and before.latents, before and before.path
        if config.recipe.latent_norm == "factor" or not (statistics or config.recipe.latent_norm):
            return []
        if not isinstance(space, LatentSpace):
            problem = f"--vae {config.vae} gives no latents of diffusers' autoencoders"
            raise UserError("--latent-norm channel", problem, "leave the option out")
        if not statistics and isinstance(dataset, StoredLatents):
            statistics, origin = read_statistics(dataset.folder, dataset.settings), f"all images of {dataset.folder}"
    if not statistics:
        found = measure(dataset, space, config.recipe.global_seed, context, config.data.num_workers)
        statistics, origin = found[0], f"{found[1]:,} images"
    if min(statistics["std"]) == 0:
        problem = f"channel {statistics['std'].index(0)} of the latents is the same everywhere"
        raise UserError("--latent-norm channel", problem, "look at the autoencoder, or leave the option out")
    space.normalise_by(statistics)
    space.to(context.device)
    return [f"Latents are normalised by each channel's mean and standard deviation, of {origin}"]


def divide(dataset, model_sizes, factor, batch_size=1):
    """Crop the dataset's images to the shapes of a model, a DiTConfig. factor: pixels of a latent cell. Returns lines."""
    if not model_sizes.other_sizes:
        return []
    sizes = sorted((model_sizes.sides, *model_sizes.other_sizes))
    lines = [dataset.divide([tuple(side * factor for side in size) for size in sizes])]
    few = [shape for shape, n in zip(*np.unique(dataset.shape_of, return_counts=True), strict=True) if n < batch_size]
    if few:
        names = ", ".join("{}x{}".format(*dataset.shapes[shape]) for shape in few)
        lines += [f"Of the shapes {names} there are fewer images than --global-batch-size, so a batch repeats them"]
    return lines


def class_notes(names, num_classes=0):
    """Lines where a class is called by a number that is not its own, so that --labels would mean another one, and where
    the model has more classes than the data, which has `names`."""
    lines, found = [], len(names)
    if wrong := [number for number, name in enumerate(names) if name.isdecimal() and int(name) != number]:
        lines += [f'Classes are numbered in the order of their names: "{names[wrong[0]]}" is class {wrong[0]}. A word that '
            "is one class's number and another's name is refused by --labels; 00, 01, ... would be in order"]  # fmt: skip
    if found < num_classes:
        lines += [f"--num-classes {num_classes}: the data has {found} classes, so labels from {found} on are never trained"]
    return lines


def build_model(options, recipe, space, condition=None):
    """The DiT of ModelOptions, initialised from --global-seed. recipe: a RecipeConfig. condition: what it draws by
    (default: classes, 1000 unless their number is given). Raises UserError."""
    condition = condition or Classes(1000 if options.num_classes is None else options.num_classes)
    overrides, name = options.overrides(), options.model or DEFAULT
    constructor = DiT_models[name]
    patch_size, side = overrides.get("patch_size", constructor.keywords["patch_size"]), getattr(space, "side", None)
    sizes = model_sizes(options.image_size, options.aspect_buckets, space.factor, patch_size, side)
    arguments, cells = {**sizes, "in_channels": space.channels, **overrides}, sizes["input_size"]
    if frames := options.num_frames:
        arguments |= {"input_size": (frames, *cells), "patch_size": (options.patch_frames or 1, patch_size, patch_size)}
    if OBJECTIVES[options.objective or "diffusion"].flow and space.factor > 1:
        numbers = space.channels * math.prod(cells) * (options.num_frames or 1)
        arguments = {"time_shift": default_time_shift(numbers), **arguments}
    torch.manual_seed(recipe.global_seed)
    try:
        return constructor(**arguments, **condition.model_arguments(), class_dropout_prob=recipe.label_dropout)
    except ValueError as error:
        where = f"--model {options.model} with these overrides" if options.model else "the options of the model"
        raise UserError(where, error) from None


def default_time_shift(numbers):
    """--time-shift of latents of so many numbers: sqrt(numbers / 4096), as published for latents of many dimensions (RAE,
    Zheng et al. 2025), but not below 1: what was trained before, on 4096 numbers or fewer, stays as it is."""
    return max(1.0, (numbers / 4096) ** 0.5)


def check_size(options, recipe, compute, context, space, condition):
    """Raises OutOfMemoryError for a model or a batch that this machine cannot hold, by lower bounds of what is needed."""
    with torch.device("meta"):
        model = build_model(options, recipe, space, condition)
    batch_size, on_host = recipe.global_batch_size // context.world_size, context.device.type == "cpu"
    weights = 4 * sum(p.numel() for p in model.parameters())
    pixels = math.prod(sides(options.image_size)) * (options.num_frames or 1)
    images = batch_size * pixels  # bytes of a channel, of which there are one or three
    if on_host:  # gradients, averages and two moments beside the weights; ten activations of each token in a block
        blocks = len(model.blocks) if not compute.grad_checkpoint else 1
        part = math.ceil(batch_size / compute.grad_accum)
        copies = 4 + len(recipe.ema_decays)
        copies = max(1, copies / context.world_size) if compute.shard else copies  # each process makes the first weights
        weights, images = copies * weights, 5 * images + 40 * part * model.pos_embed.numel() * blocks
    advice = ("--global-batch-size or --image-size", "--hidden-size, --depth, --mlp-ratio or --num-classes")
    check_memory(weights + images, f"lower {advice[weights > images]}")
