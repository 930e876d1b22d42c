"""Train a DiT on images: an image folder (one folder a class), or scikit-learn's digits.

    torchrun --nproc_per_node=8 train.py --model DiT-XL/2 --data-path /path/to/imagenet/train --run-dir runs/xl2
    python train.py --data-path digits --vae none --image-size 8 --num-classes 10 --model DiT-S/2 --max-steps 1500

The recipe is the paper's (section 4): AdamW, constant learning rate 1e-4, no weight decay, batch 256, horizontal flips, EMA
0.9999. A command with --run-dir, given again, resumes where the run stopped.
"""

import sys
from dataclasses import dataclass

from data.config import DataConfig
from data.crop import center_crop_arr  # noqa: F401 -- scripts made for the original release import it from here
from evaluation.config import EvalConfig
from runtime.config import Config, flag, option
from runtime.errors import UserError
from runtime.parser import Parser
from training.config import (
    PRESETS,
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
        if self.data.text_encoder and self.model.num_classes not in (0, self.model.defaults()["num_classes"]):
            raise UserError(
                f"--num-classes {self.model.num_classes}: --text-encoder takes the place of classes; leave it out"
            )
        if self.monitor.sample_labels and self.data.text_encoder:
            raise UserError("--sample-labels: --text-encoder takes the place of classes; use --sample-prompts")
        if self.monitor.sample_prompts and not self.data.text_encoder:
            raise UserError("--sample-prompts: needs --text-encoder; for classes use --sample-labels")
        if self.data.text_length and not self.data.text_encoder:
            raise UserError("--text-length: needs --text-encoder")
        if self.data.data_path == "digits" and self.vae != "none":
            raise UserError("--vae: the digits are 8x8 pixels, too small for an autoencoder; pass --vae none")
        for name in ("eval_cfg_scale", "sample_cfg_scale"):
            scale = self.flat()[name]
            if scale not in (None, 1) and self.recipe.label_dropout == 0 and self.model.num_classes:
                raise UserError(f"{flag(name)} {scale}: guidance needs null labels, and --label-dropout is 0; pass 1")


def main(argv=None):
    parser = Parser(TrainConfig, __doc__, presets={"recipe": PRESETS})
    config = parser.parse(argv)
    signals = StopSignals()  # before the slow imports: a signal that comes during them is not lost
    with parser.report_errors():
        mark_starting(config.run.run_dir)
        from runtime.devices import explain_out_of_memory
        from runtime.distributed import processes

        advice = f"lower --global-batch-size {config.recipe.global_batch_size}, or pass --grad-accum or --grad-checkpoint"
        advice += "" if config.compute.shard else ", or --shard with several processes"
        with processes(config.compute.device, config.timeout) as context, explain_out_of_memory(advice):
            status = train(config, context, signals)
    sys.exit(status)


def train(config, context, signals):
    """Train as config says. Returns the exit status: 0 when finished or preempted, 130 after Ctrl-C."""
    from training import finetune, setup  # PyTorch, timm and torchvision take seconds: not before the command line is read
    from training.grids import Grids
    from training.session import Session
    from training.trainer import Trainer
    from training.validation import Validation

    config = setup.resolve_precision(config, context.device)
    config, source = context.run_on_all_ranks(lambda: finetune.resolve(config))
    if config.run.dry_run:
        from training import plan

        plan.show(config, context, context.run_on_all_ranks(lambda: setup.load_data(config, context)))
        return 0
    with Session(config, context, signals) as session:
        dataset, space, model, notes = context.run_on_all_ranks(lambda: setup.prepare(config, context, source))
        source = None  # frees the memory: its weights have been copied
        text = setup.open_text(config, dataset, context.device)
        evaluator = make_evaluator(config, context, space, text, dataset)
        space, precision = space.place(context.device), config.compute.precision
        grids = context.run_on_all_ranks(lambda: Grids(config, session, space, dataset.classes, text, dataset))
        validation = Validation(config, session, dataset, text)
        total_steps = config.recipe.total_steps(len(dataset))
        trainer = Trainer(config.recipe, config.compute, context, model, space, precision, total_steps, text)
        session.resume(trainer, dataset, config.flat())
        setup.introduce(config, trainer, dataset, session, notes)
        for batch in session.batches():
            session.record(trainer.step(batch))
            validation.measure_if_due()
            grids.draw_if_due()
            if session.due(config.run.ckpt_every):
                session.save()
            if session.due(config.evaluation.eval_every):
                with session.meter.paused():
                    fid = evaluator(trainer.whole(trainer.ema.module), session.stop_requested)
                session.record_fid(fid, config.evaluation.eval_samples)
        grids.animate()
    return session.exit_status


def make_evaluator(config, context, space, text=None, dataset=None):
    """What measures FID during training, or None. With texts image i has that of an image of the data, chosen at random."""
    if not config.evaluation.eval_every:
        return None
    from data.text_encoder import encode_texts
    from evaluation.during_training import Evaluator  # SciPy and torch-fidelity take seconds to import
    from sampling.noise import image_label

    def texts(indices):
        keys = [(image_label(seed, index, len(dataset)), 0) for index in indices]
        return encode_texts(text, dataset.texts(keys), context.device)

    batch_size = config.recipe.global_batch_size // context.world_size  # what fits in training fits here
    model, seed = config.model, config.recipe.global_seed
    of_texts = texts if text else None
    return Evaluator(config.evaluation, context, space, model.image_size, model.num_classes, batch_size, seed, of_texts)


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
