"""Train a DiT on images: an image folder (one folder a class), or scikit-learn's digits.

    torchrun --nproc_per_node=8 train.py --model DiT-XL/2 --data-path /path/to/imagenet/train --run-dir runs/xl2
    python train.py --data-path digits --vae none --image-size 8 --num-classes 10 --model DiT-S/2 --max-steps 1500

The recipe is the paper's (section 4): AdamW, constant learning rate 1e-4, no weight decay, batch 256, horizontal flips, EMA
0.9999. A command with --run-dir, given again, resumes where the run stopped.
"""

import dataclasses
import math
import sys
from dataclasses import dataclass

from cli.parser import Parser
from data.config import DataConfig
from data.crop import center_crop_arr  # noqa: F401 -- scripts made for the original release import it from here
from evaluation.config import EvalConfig
from runtime.config import Config, flag, option
from runtime.errors import UserError
from training.config import (
    ComputeConfig,
    FinetuneConfig,
    MonitorConfig,
    RecipeConfig,
    RunConfig,
    TrainedDesign,
    TrainedModel,
)
from training.signals import StopSignals
from training.status import mark_starting


@dataclass(frozen=True)
class TrainConfig(Config):
    """All options of a training run."""

    data: DataConfig
    model: TrainedModel
    design: TrainedDesign
    finetune: FinetuneConfig
    recipe: RecipeConfig
    compute: ComputeConfig
    run: RunConfig
    evaluation: EvalConfig
    monitor: MonitorConfig
    vae: str = option("ema", 'autoencoder: "ema" or "mse" of the Stable Diffusion VAE, a folder or hub name of an '
        'AutoencoderKL, or "none" for pixels')  # fmt: skip
    timeout: float | None = option(None, "seconds that a process waits for the others before it gives up; more than it "
        "takes to list the data, to save or to measure FID (default: 1800, and 600 in the exchange of gradients of GPUs)",
        above=0, high=1e6, changeable=True)  # fmt: skip

    def check(self):
        if self.data.data_path == "digits" and self.vae != "none":
            raise UserError("--vae: the digits are 8x8 pixels, too small for an autoencoder; pass --vae none")
        for name in ("eval_cfg_scale", "sample_cfg_scale"):
            scale = self.flat()[name]
            if scale not in (None, 1) and self.recipe.label_dropout == 0 and self.model.num_classes:
                raise UserError(f"{flag(name)} {scale}: guidance needs null labels, and --label-dropout is 0; pass 1")


def main(argv=None):
    parser = Parser(TrainConfig, __doc__)
    config = parser.parse(argv)
    signals = StopSignals()  # before the slow imports: a signal that comes during them is not lost
    with parser.report_errors():
        mark_starting(config.run.run_dir)
        from runtime.devices import explain_out_of_memory
        from runtime.distributed import processes

        advice = f"lower --global-batch-size {config.recipe.global_batch_size}, or pass --grad-accum or --grad-checkpoint"
        with processes(config.compute.device, config.timeout) as context, explain_out_of_memory(advice):
            status = train(config, context, signals)
    sys.exit(status)


def train(config, context, signals):
    """Train as config says. Returns the exit status: 0 when finished or preempted, 130 after Ctrl-C."""
    from training import finetune  # PyTorch, timm and torchvision take seconds: not before the command line is read
    from training.grids import Grids
    from training.session import Session
    from training.trainer import Trainer
    from training.validation import Validation

    config = resolve_precision(config, context.device)
    config, source = context.run_on_all_ranks(lambda: finetune.resolve(config))
    if config.run.dry_run:
        from training import plan

        plan.show(config, context, context.run_on_all_ranks(lambda: load_data(config, context)), build_model)
        return 0
    with Session(config, context, signals) as session:
        dataset, space, model, notes = context.run_on_all_ranks(lambda: prepare(config, context, source))
        source = None  # frees the memory: its weights have been copied
        evaluator = make_evaluator(config, context, space)
        space, precision = space.place(context.device), config.compute.precision
        grids = context.run_on_all_ranks(lambda: Grids(config, session, space, dataset.classes))
        validation = Validation(config, session, dataset)
        total_steps = config.recipe.total_steps(len(dataset))
        trainer = Trainer(config.recipe, config.compute, context, model, space, precision, total_steps)
        session.resume(trainer, dataset, config.flat())
        introduce(config, trainer, dataset, session, notes)
        for batch in session.batches():
            session.record(trainer.step(batch))
            validation.measure_if_due()
            grids.draw_if_due()
            if session.due(config.run.ckpt_every):
                session.save()
            if session.due(config.evaluation.eval_every):
                with session.meter.paused():
                    fid = evaluator(trainer.ema.module, session.stop_requested)
                session.record_fid(fid, config.evaluation.eval_samples)
        grids.animate()
    return session.exit_status


# ----------------------------------------------------------------------------------------------------------------------
# Data, latent space and model, checked before anything slow


def resolve_precision(config, device):
    """The config with the precision that its default means on this device."""
    from runtime.devices import check_compile, has_bf16

    check_compile(config.compute.compile, device.type)
    default = "bf16" if device.type == "cuda" and has_bf16(device) else "fp32"
    compute = dataclasses.replace(config.compute, precision=config.compute.precision or default)
    return dataclasses.replace(config, compute=compute)


def prepare(config, context, source):
    """(dataset, latent space, model, lines for the log). source: of the first weights, None for random ones. Raises
    UserError for what cannot work."""
    from training import finetune
    from training.trackers import check_installed

    check_installed(config.monitor.report_to)
    dataset = load_data(config, context)
    space = dataset.open_space(config.vae, decode=bool(config.evaluation.eval_every or config.monitor.sample_every))
    check_size(config, context, space)
    model = build_model(config, space)
    notes = [*dataset.notes, *(source.load_into(model) if source else [])]
    return dataset, space, model, notes + finetune.freeze(model, config.finetune.freeze)


def load_data(config, context):
    """The dataset of the options. Raises UserError where it does not fit them."""
    from data.images import load_dataset

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


def build_model(config, space):
    """The DiT of the options, initialised from --global-seed."""
    import torch

    from data.autoencoder import check_image_size
    from models import DiT_models

    overrides = config.design.overrides()
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


def check_size(config, context, space):
    """Raises OutOfMemoryError for a model or a batch that this machine cannot hold, by lower bounds of what is needed."""
    import torch

    from runtime.devices import check_memory

    with torch.device("meta"):
        model = build_model(config, space)
    batch_size, on_host = config.recipe.global_batch_size // context.world_size, context.device.type == "cpu"
    weights = 4 * sum(p.numel() for p in model.parameters())
    images = batch_size * config.model.image_size**2  # bytes of a channel, of which there are one or three
    if on_host:  # gradients, EMA and two moments beside the weights; ten activations of each token in a block
        blocks = len(model.blocks) if not config.compute.grad_checkpoint else 1
        part = math.ceil(batch_size / config.compute.grad_accum)
        weights, images = 5 * weights, 5 * images + 40 * part * model.pos_embed.numel() * blocks
    options = ("--global-batch-size or --image-size", "--hidden-size, --depth, --mlp-ratio or --num-classes")
    check_memory(weights + images, f"lower {options[weights > images]}")


def make_evaluator(config, context, space):
    """What measures FID during training, or None."""
    if not config.evaluation.eval_every:
        return None
    from evaluation.during_training import Evaluator  # SciPy and torch-fidelity take seconds to import

    batch_size = config.recipe.global_batch_size // context.world_size  # what fits in training fits here
    model, seed = config.model, config.recipe.global_seed
    return Evaluator(config.evaluation, context, space, model.image_size, model.num_classes, batch_size, seed)


def introduce(config, trainer, dataset, session, notes):
    """Log what is trained on what, and what may be a mistake."""
    from runtime.devices import precision_warning

    parameters = sum(p.numel() for p in trainer.ema.weights)
    precision, where = config.compute.precision, trainer.context.describe()
    session.log(f"{config.model.model} ({config.design.block}), {parameters:,} trainable parameters, {precision}, {where}")
    session.log(
        f"{len(dataset):,} images of {len(dataset.classes)} classes from {config.data.data_path}; run folder "
        f"{session.run_dir}"
    )
    for note in notes:
        session.log(note)
    given, found = config.model.num_classes, len(dataset.classes)
    if found < given:
        session.log(f"--num-classes {given}: the data has {found} classes, so labels from {found} on are never trained")
    if warning := precision_warning(precision, trainer.device):
        session.log(warning)


# ----------------------------------------------------------------------------------------------------------------------
# Functions of the original release's train.py that other scripts import


def update_ema(ema_model, model, decay=0.9999):
    """Move the parameters of ema_model towards those of model: average <- decay * average + (1 - decay) * weights."""
    for average, weight in zip(ema_model.parameters(), model.parameters(), strict=True):
        average.data.lerp_(weight.data, 1 - decay)


def requires_grad(model, flag=True):
    """Set requires_grad of all parameters of a model."""
    for parameter in model.parameters():
        parameter.requires_grad = flag


if __name__ == "__main__":
    main()
