"""What a run is set up from: precision, data, latent space and model, checked before anything slow."""

import dataclasses
import math

import torch

from data.autoencoder import check_image_size
from data.images import load_dataset
from models import DiT_models
from runtime.config import flag
from runtime.devices import check_compile, check_memory, has_bf16, precision_warning
from runtime.errors import UserError
from training import finetune
from training.config import PRESETS
from training.trackers import check_installed


def resolve_precision(config, device):
    """The config with the precision that its default means on this device."""
    check_compile(config.compute.compile, device.type)
    default = "bf16" if device.type == "cuda" and has_bf16(device) else "fp32"
    compute = dataclasses.replace(config.compute, precision=config.compute.precision or default)
    return dataclasses.replace(config, compute=compute)


def prepare(config, context, source):
    """(dataset, latent space, model, lines for the log). source: of the first weights, None for random ones. Raises
    UserError for what cannot work."""
    check_installed(config.monitor.report_to)
    dataset = load_data(config, context)
    space = dataset.open_space(config.vae, decode=bool(config.evaluation.eval_every or config.monitor.sample_every))
    text = open_text(config, dataset)
    check_size(config, context, space, text)
    model = build_model(config, space, text)
    check_recipe(config.recipe, model)
    notes = [*dataset.notes, *(source.load_into(model) if source else [])]
    if text:
        model.text_embedder.null_text.data.copy_(text.null)
        notes.append(f"Conditioned on texts of up to {text.length} tokens, encoded by {text.name} (CRC-32 {text.crc32})")
    return dataset, space, model, notes + finetune.freeze(model, config.finetune.freeze)


def open_text(config, dataset, device="cpu"):
    """What encodes the texts of the run, on a device; None for a run with classes. Raises UserError."""
    text = dataset.open_text(config.data, prompts=bool(config.monitor.sample_prompts))
    return text and text.place(device)


def load_data(config, context):
    """The dataset of the options. Raises UserError where it does not fit them."""
    check_batch(config, context.world_size)
    dataset = load_dataset(config.data, config.model.image_size, config.recipe.global_seed, context)
    check_dataset(config, dataset)
    return dataset


def check_batch(config, world_size):
    size, parts = config.recipe.global_batch_size, config.compute.grad_accum
    if size % world_size:
        raise UserError(
            f"--global-batch-size {size}: not a multiple of the {world_size} processes; "
            f"{math.ceil(size / world_size) * world_size} is"
        )
    if parts * world_size > size:
        raise UserError(
            f"--grad-accum {parts}: more than the {size // world_size} images that a process has of each batch; lower it"
        )


def check_dataset(config, dataset):
    num_classes, found = config.model.num_classes, len(dataset.classes)
    if num_classes and found > num_classes:
        raise UserError(
            f"--num-classes {num_classes}: {config.data.data_path} has {found} classes; "
            f"pass --num-classes {found}, or 0 to ignore them"
        )
    images = config.recipe.epochs * len(dataset)
    if images < config.recipe.global_batch_size:
        raise UserError(
            f"--global-batch-size {config.recipe.global_batch_size}: more than the {images} images of all epochs; "
            "lower it, or raise --epochs"
        )


def build_model(config, space, text=None):
    """The DiT of the options, initialised from --global-seed. text: of `open_text`."""
    overrides = config.design.overrides()
    if text:
        overrides |= {"text_width": text.width, "text_length": text.length}
    constructor = DiT_models[config.model.model]
    check_image_size(config.model.image_size, space.factor, overrides.get("patch_size", constructor.keywords["patch_size"]))
    torch.manual_seed(config.recipe.global_seed)
    try:
        return constructor(
            input_size=config.model.image_size // space.factor,
            in_channels=space.channels,
            class_dropout_prob=config.recipe.label_dropout,
            num_classes=config.model.num_classes,
            **overrides,
        )
    except ValueError as error:
        raise UserError(f"--model {config.model.model} with these overrides: {error}") from None


def check_recipe(recipe, model):
    """Raises UserError where the recipe does not fit the model."""
    if model.objective == "flow" and recipe.loss_weight != "uniform":
        raise UserError(f"--loss-weight {recipe.loss_weight}: is defined for --objective diffusion; leave it out")


def check_size(config, context, space, text=None):
    """Raises OutOfMemoryError for a model or a batch that this machine cannot hold, by lower bounds of what is needed."""
    with torch.device("meta"):
        model = build_model(config, space, text)
    batch_size, on_host = config.recipe.global_batch_size // context.world_size, context.device.type == "cpu"
    weights = 4 * sum(p.numel() for p in model.parameters())
    images = batch_size * config.model.image_size**2  # bytes of a channel, of which there are one or three
    if on_host:  # gradients, EMA and two moments beside the weights; ten activations of each token in a block
        blocks = len(model.blocks) if not config.compute.grad_checkpoint else 1
        part = math.ceil(batch_size / config.compute.grad_accum)
        copies = max(1, 5 / context.world_size) if config.compute.shard else 5  # each process makes the first weights
        weights, images = copies * weights, 5 * images + 40 * part * model.pos_embed.numel() * blocks
    options = ("--global-batch-size or --image-size", "--hidden-size, --depth, --mlp-ratio or --num-classes")
    check_memory(weights + images, f"lower {options[weights > images]}")


def introduce(config, trainer, dataset, session, notes):
    """Log what is trained on what, and what may be a mistake."""
    parameters = sum(p.numel() for p in trainer.ema.weights)
    precision, where = config.compute.precision, trainer.context.describe()
    session.log(f"{config.model.model} ({config.design.block}), {parameters:,} trainable parameters, {precision}, {where}")
    if config.compute.shard:
        number = trainer.mesh["shard"].size()
        session.log(f"Weights, gradients, optimizer state and EMA are divided among {number} processes (--shard)")
    session.log(
        f"{len(dataset):,} images of {len(dataset.classes)} classes from {config.data.data_path}; run folder "
        f"{session.run_dir}"
    )
    for note in notes:
        session.log(note)
    preset, now = PRESETS[config.recipe.recipe], config.flat()
    if preset:
        session.log(f"--recipe {config.recipe.recipe} is {' '.join(f'{flag(name)} {now[name]}' for name in preset)}")
    given, found = config.model.num_classes, len(dataset.classes)
    if found < given:
        session.log(f"--num-classes {given}: the data has {found} classes, so labels from {found} on are never trained")
    if warning := precision_warning(precision, trainer.device):
        session.log(warning)
