"""Train a DiT on images: an image folder (one folder a class), or scikit-learn's digits.

    torchrun --nproc_per_node=8 train.py --model DiT-XL/2 --data-path /path/to/imagenet/train --run-dir runs/xl2
    python train.py --data-path digits --vae none --image-size 8 --model DiT-S/2 --max-steps 1500

The recipe is the paper's (section 4): AdamW, constant learning rate 1e-4, no weight decay, batch 256, horizontal flips, EMA
0.9999. A command with --run-dir, given again, resumes where the run stopped."""

import runtime  # noqa: F401 -- first: from here on Ctrl-C prints a line  # isort: skip
import sys
from dataclasses import dataclass, replace

from checkpoint.config import ModelOptions
from data.config import TrainingDataConfig
from data.crop import center_crop_arr  # noqa: F401 -- scripts made for the original release import it from here
from evaluation.config import EvalConfig
from runtime.config import Config, flag, option
from runtime.errors import UserError
from runtime.parser import Parser
from training.config import PRESETS, ComputeConfig, FinetuneConfig, MonitorConfig, RecipeConfig, RunConfig
from training.signals import StopSignals
from training.status import mark_starting


@dataclass(frozen=True)
class TrainConfig(Config):
    """All options of a training run."""

    data: TrainingDataConfig
    model: ModelOptions
    finetune: FinetuneConfig
    recipe: RecipeConfig
    compute: ComputeConfig
    run: RunConfig
    evaluation: EvalConfig
    monitor: MonitorConfig
    vae: str = option("ema", 'autoencoder: "ema" or "mse" of the Stable Diffusion VAE, a folder or hub name of an '
        'autoencoder of diffusers, or "none" for pixels', basic=True)  # fmt: skip

    @classmethod
    def from_flat(cls, values):
        """As of every config; --recipe stands for what it stands for on the command line, where `values` lack it."""
        recipe = values.get("recipe")
        return super().from_flat((PRESETS.get(recipe, {}) if isinstance(recipe, str) else {}) | values)

    def check(self):
        if self.data.kind != "classes" and self.model.num_classes:
            option = "--text-encoder" if self.data.text_encoder else f"--condition {self.data.kind}"
            raise UserError(f"--num-classes {self.model.num_classes}: {option} takes the place of classes; leave it out")
        if self.monitor.sample_labels and self.data.text_encoder:
            raise UserError("--sample-labels: --text-encoder takes the place of classes; use --sample-prompts")
        if self.monitor.sample_prompts and not self.data.text_encoder:
            raise UserError("--sample-prompts: needs --text-encoder; for classes use --sample-labels")
        if self.data.text_length and not self.data.text_encoder:
            raise UserError("--text-length: needs --text-encoder")
        if self.data.data_path == "digits" and self.vae != "none":
            raise UserError("--vae: the digits are 8x8 pixels, too small for an autoencoder; pass --vae none")
        if self.finetune.lora_rank and self.compute.shard:
            raise UserError(f"--lora-rank {self.finetune.lora_rank}", "does not go with --shard", "leave one of them out")
        if self.recipe.latent_norm and self.vae == "none":
            raise UserError(f"--latent-norm {self.recipe.latent_norm}", "pixels are no latents", "leave the option out")
        watched, averages = self.monitor.watch_average, self.recipe.ema_decays
        if watched not in (None, *averages):
            problem = f"the averages of this run are {', '.join(averages)}"
            raise UserError(f"--watch-average {watched}", problem, "name one, or add it with --more-ema-decays")
        for name in ("eval_cfg_scale", "sample_cfg_scale", "guidance_in_target"):
            scale = self.flat()[name]
            if scale not in (None, 1) and self.recipe.label_dropout == 0 and self.model.num_classes != 0:
                raise UserError(f"{flag(name)} {scale}: guidance needs null labels, and --label-dropout is 0; pass 1")


def make_parser():
    """The parser of a TrainConfig, which knows what --recipe stands for."""
    return Parser(TrainConfig, __doc__, presets={"recipe": PRESETS})


def main(argv=None):
    parser = make_parser()
    config = parser.parse(argv)
    signals = StopSignals()  # before the slow imports: a signal that comes during them is not lost
    with parser.report_errors():
        mark_starting(config.run.run_dir)
        sys.exit(train(config, signals))


def train(config, signals=None, dataset=None, watchers=()):
    """Train as a TrainConfig says. signals: StopSignals. dataset: in place of that of --data-path. watchers: more, see
    `training.watchers`. Returns the exit status: 0 when finished or preempted, 130 after Ctrl-C. Raises UserError."""
    # PyTorch, timm and torchvision take seconds: not before the command line is read
    from runtime.devices import explain_out_of_memory
    from runtime.distributed import processes
    from training import resume, setup
    from training.run import Run
    from training.run_folder import run_folder
    from training.trainer import Trainer

    shard = "" if config.compute.shard else ", or --shard with several processes"
    # first the options that a resumed run may change
    advice = f"pass --grad-accum or --grad-checkpoint{shard}; in a new run, "
    advice += f"lower --global-batch-size {config.recipe.global_batch_size}"
    stop = signals and (lambda: signals.requested)
    with processes(config.compute.device, config.compute.timeout, stop) as context, explain_out_of_memory(advice):
        with context.together():
            resumed = resume.peek(config.run, config.model.num_heads)
            config, source = setup.resolve(config, context, resumed)
        if config.run.dry_run:
            from training import plan

            plan.show(config, context, dataset, resumed)
            return 0
        with run_folder(config.run, config.model.name, context) as folder:
            dataset, model_options = setup.load_data(config.data, config.model, config.recipe, context, dataset)
            config = replace(config, model=model_options)
            with context.together():
                space, condition, model, lines = setup.prepare(config, context, dataset, source)
                space, condition = space.to(context.device), condition.to(context.device)
            lines += setup.normalise(config, context, dataset, space, resumed, source)
            source = resumed = None  # frees the memory: the weights have been copied
            total_steps = config.recipe.total_steps(len(dataset))
            trainer = Trainer(config.recipe, config.compute, context, model, space, total_steps, condition)
            watchers = [*make_watchers(config, trainer, dataset, signals), *watchers]
            run = Run(config, context, folder, trainer, dataset, watchers, signals)
            run.introduce(lines)
            for batch in run.batches():
                run.record(trainer.step(batch))
                run.watch()
        return run.exit_status


def make_watchers(config, trainer, dataset, signals):
    """The list of what the options ask to watch: see `training.watchers`."""
    from training.watchers import Samples, Validation

    monitor, evaluation, size, column = config.monitor, config.evaluation, config.model.image_size, config.data.image_column
    watchers = []
    if monitor.val_every:
        watchers.append(Validation(monitor, trainer, config.data, config.model, config.vae, dataset.channels))
    if monitor.sample_every:
        with trainer.context.together():
            watchers.append(Samples(monitor, trainer, size))
    if evaluation.eval_every:
        from evaluation.during_training import FID  # SciPy and torch-fidelity take seconds to import

        watchers.append(FID(evaluation, trainer, size, signals, monitor.watch_average, column))
    return watchers


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
