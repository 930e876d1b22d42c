"""Options of training: the weights to start from, the recipe, how it is computed, and the run's record."""

import math
from dataclasses import dataclass

from diffusion.registry import SAMPLERS
from runtime.config import Config, flag, option
from runtime.errors import UserError


@dataclass(frozen=True)
class FinetuneConfig(Config):
    """fine-tuning"""

    # a run that is resumed has its weights: these three have no effect then, and the file may be gone
    init_from: str | None = option(None, "start from the weights of this checkpoint, .safetensors file, or folder or hub "
        "name in diffusers' format; the model's sizes and design come from it (default: random weights)",
        metavar="WHERE", changeable=True, basic=True)  # fmt: skip
    init_average: str | None = option(None, "the weights of --init-from to take: an average by its decay, or model for the "
        "trained ones (default: the first average)", metavar="AVERAGE", changeable=True)  # fmt: skip
    keep_classes: tuple[str, ...] | None = option(None, "the class of --init-from that each class of this run starts from, "
        "in the order of the class folders: numbers or names, - for none; or a text file with one in each line (default: "
        "of the same name; without names of the same number)", metavar="CLASS", changeable=True)  # fmt: skip
    freeze: tuple[str, ...] | None = option(None, "do not train the parameters whose names match one of these patterns, "
        "such as 'blocks.*.attn.*' (default: train all)", metavar="PATTERN")  # fmt: skip
    lora_rank: int | None = option(None, "train changes of this rank of the linear layers of attention and MLP (Hu et al. "
        "2022), and what --init-from lacks; small checkpoints, which need that model's file (default: train all weights)",
        low=1, high=1024)  # fmt: skip

    def check(self):
        if self.keep_classes and not self.init_from:
            raise UserError("--keep-classes: needs --init-from, the model whose classes are meant")
        if self.lora_rank and not self.init_from:
            raise UserError(f"--lora-rank {self.lora_rank}", "needs --init-from, the model that is changed", "name one")
        if self.init_average and not self.init_from:
            raise UserError("--init-average: needs --init-from, whose weights are meant")


# Names for sets of options: what --recipe changes where the command line does not say otherwise. docs/recipes.md has the
# measurements behind "fast"
PRESETS = {"paper": {}, "fast": {"objective": "flow", "timestep_sampling": "logit-normal"}}


@dataclass(frozen=True)
class RecipeConfig(Config):
    """training recipe; the defaults are the paper's (section 4)"""

    recipe: str = option("paper", "set of options: paper, or fast, which learns more in the same time (--objective flow "
        "--timestep-sampling logit-normal); given options win", choices=tuple(PRESETS), changeable=True)  # fmt: skip
    epochs: int = option(1400, "passes over the data", low=1, changeable=True)
    max_steps: int | None = option(None, "stop after so many updates (default: all)", low=1, changeable=True, basic=True)
    global_batch_size: int = option(256, "images in an update, over all processes", low=1, high=10_000_000, basic=True)
    global_seed: int = option(0, "seed of everything random", low=0, high=2**63 - 1)
    lr: float = option(1e-4, "learning rate of AdamW", above=0, basic=True)
    latent_norm: str | None = option(None, "how latents are normalised: by the autoencoder's factor, or by each channel's "
        "mean and standard deviation on the data (default: factor, or as the model of --init-from)",
        choices=("factor", "channel"))  # fmt: skip
    lr_warmup_steps: int = option(0, "raise the learning rate linearly to --lr over so many updates", low=0)
    lr_schedule: str = option("constant", "learning rate after the warm-up: constant, or a cosine that falls to 0 at the "
        "end of the run, which --max-steps or --epochs sets", choices=("constant", "cosine"))  # fmt: skip
    betas: tuple[float, float] = option((0.9, 0.999), "decay rates of AdamW's two moments", low=0, high=0.999999)
    weight_decay: float = option(0.0, "weight decay of AdamW", low=0)
    clip_grad_norm: float | None = option(None, "scale gradients down to this norm (default: off)", above=0)
    ema_decay: float = option(0.9999, "decay of the exponential moving average of the weights", low=0, high=1)
    more_ema_decays: tuple[float, ...] | None = option(None, "decays of further averages, of which sample.py --average "
        "takes one; each is a copy of the weights (default: none)", low=0, high=1, metavar="DECAY")  # fmt: skip
    ema_warmup: bool = option(False, "start the moving average with a low decay, for short runs")
    label_dropout: float = option(0.1, "share of labels replaced by the null class, for guidance", low=0, high=1)
    guidance_in_target: float = option(1.0, "scale of the classifier-free guidance that a meanflow learns, so that samples "
        "are guided in one evaluation; 1 is no guidance", low=1)  # fmt: skip
    timestep_sampling: str = option("uniform", "how often each timestep is trained: all alike, or logit-normal, which "
        "prefers the middle (Esser et al. 2024)", choices=("uniform", "logit-normal"))  # fmt: skip
    max_bad_steps: int = option(10, "stop at a line of the log after so many non-finite updates", low=1, changeable=True)

    def check(self):
        if len(self.ema_decays) <= len(self.more_ema_decays or ()):
            raise UserError("--more-ema-decays", "names a decay twice, or that of --ema-decay", "name each once")

    @property
    def ema_decays(self):
        """{name: decay} of all averages, the first of which is used where none is named."""
        return {str(decay): decay for decay in (self.ema_decay, *(self.more_ema_decays or ()))}

    def total_steps(self, num_images):
        """Updates of the whole run on a dataset of `num_images` images."""
        return min(self.epochs * num_images // self.global_batch_size, self.max_steps or 2**63)

    def learning_rate(self, step, total_steps):
        """Learning rate of the update that `step` updates were made before, of `total_steps` (a constant one ignores them).
        It depends on nothing else, so that a resumed run has the same."""
        if step < self.lr_warmup_steps:
            return self.lr * (step + 1) / self.lr_warmup_steps
        if self.lr_schedule == "constant":
            return self.lr
        progress = (step - self.lr_warmup_steps) / (total_steps - self.lr_warmup_steps)  # from 0 to 1
        return self.lr * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class ComputeConfig(Config):
    """computation"""

    precision: str | None = option(None, "precision of matrix products (default: bf16 on GPUs that have it, else fp32)",
        choices=("fp32", "tf32", "bf16"))  # fmt: skip
    compile: str | None = option(None, "compile the model's blocks with this backend of torch.compile, inductor unless "
        "named (default: off)", const="inductor", metavar="BACKEND", changeable=True)  # fmt: skip
    grad_accum: int = option(1, "split each process's batch into this many parts, computed one after the other to save "
        "memory; the update is the same", low=1, metavar="K", changeable=True)  # fmt: skip
    grad_checkpoint: int = option(0, "gradient checkpointing of every K-th block: its activations are computed again, not "
        "kept; 1 saves most memory, 0 is off; the update is the same", low=0, metavar="K", changeable=True)  # fmt: skip
    shard: str | None = option(None, "divide weights, gradients, optimizer state and EMA among the processes, for models "
        "that one device cannot hold: all divides among all, node among those of each node; all unless named (default: "
        "each process has its own)", choices=("all", "node"), const="all", changeable=True)  # fmt: skip
    deterministic: bool = option(False, "use kernels that give the same bits each time, so that a resumed run on a GPU is "
        "exactly an uninterrupted one; slower on GPUs, without effect on CPUs", changeable=True)  # fmt: skip
    device: str | None = option(None, "where to compute (default: the best there is)", choices=("cuda", "mps", "cpu"),
        changeable=True)  # fmt: skip
    timeout: float | None = option(None, "seconds that a process waits for the others before it gives up; more than it "
        "takes to list the data, to save or to measure FID (default: 1800, and 600 in the exchange of gradients of GPUs)",
        above=0, high=1e6, changeable=True)  # fmt: skip


@dataclass(frozen=True)
class RunConfig(Config):
    """record of the run"""

    results_dir: str = option("results", "folder in which numbered run folders are made", changeable=True)
    run_dir: str | None = option(None, "run folder, instead of a numbered one; a run that is there is resumed "
        "(default: none)", changeable=True, basic=True)  # fmt: skip
    log_every: int = option(100, "steps between lines of the log", low=1, changeable=True)
    ckpt_every: int = option(50_000, "steps between checkpoints", low=1, changeable=True)
    keep_last: int = option(0, "number of checkpoints to keep, the latest; 0 keeps all", low=0, changeable=True)
    keep_every: int = option(0, "also keep checkpoints whose step is a multiple of this; 0: none", low=0, changeable=True)
    resume: str | None = option(None, 'where to resume: "auto" (the latest undamaged checkpoint in --run-dir, if any), '
        '"none", or the path of a checkpoint (default: auto with --run-dir, else none)', changeable=True)  # fmt: skip
    allow_changes: bool = option(False, "resume although options that change the result differ", changeable=True)
    dry_run: bool = option(False, "print the run's plan, cost and likely mistakes, and write nothing", changeable=True)

    def check(self):
        if self.resume == "auto" and not self.run_dir:
            raise UserError("--resume auto: needs --run-dir, the folder to look in")

    @property
    def how_to_resume(self):
        """The value of --resume, its default resolved."""
        return self.resume or ("auto" if self.run_dir else "none")


@dataclass(frozen=True)
class MonitorConfig(Config):
    """watching the run"""

    sample_every: int | None = option(None, "draw a grid of images with the averaged weights every N steps, into samples/ "
        "in the run's folder (default: never)", low=1, metavar="N", changeable=True)  # fmt: skip
    sample_labels: tuple[str, ...] | None = option(None, "classes of the grid's images, by number or name, or .npy files "
        "of vectors (default: all classes, or 16 of them if there are more)", metavar="CLASS", changeable=True)  # fmt: skip
    sample_prompts: tuple[str, ...] | None = option(None, "texts of the grid's images, in place of classes (default: those "
        "of 16 images, spread over the data)", metavar="TEXT", changeable=True, repeatable=True)  # fmt: skip
    sample_sampler: str | None = option(None, "sampler of the grid's images (default: dpm-solver++, or for flows the "
        "objective's own)", choices=tuple(SAMPLERS), metavar="SAMPLER", changeable=True)  # fmt: skip
    sample_sampling_steps: int | None = option(None, "the sampler's steps (default: 20)", low=1, high=1000, changeable=True)
    sample_cfg_scale: float | None = option(None, "guidance scale of the grid's images; 1 turns guidance off (default: 4, "
        "or 1 for a meanflow or a model without null labels)", low=0, changeable=True)  # fmt: skip
    watch_average: str | None = option(None, "the average that grids, FID and the loss of held-out images are of, by its "
        "decay (default: that of --ema-decay; for held-out images the trained weights)", metavar="DECAY",
        changeable=True)  # fmt: skip
    val_data_path: str | None = option(None, "held-out images whose loss is measured: a folder as --data-path takes it, "
        "with the same names of the classes (default: none)", metavar="FOLDER", changeable=True)  # fmt: skip
    val_every: int | None = option(None, "measure the loss of the images of --val-data-path every N steps (default: "
        "never)", low=1, metavar="N", changeable=True)  # fmt: skip
    peak_tflops: float | None = option(None, "peak of one device at the run's precision in TFLOP/s, for the utilisation in "
        "the progress bar (default: by a table of GPUs, if it is there)", low=1e-6, high=1e12, changeable=True)  # fmt: skip
    report_to: tuple[str, ...] | None = option(None, "also send metrics, grids and options to these trackers: tensorboard, "
        "wandb (default: none)", choices="training.trackers:TRACKERS", metavar="TRACKER", changeable=True)  # fmt: skip

    def check(self):
        if (self.val_every is None) != (self.val_data_path is None):
            raise UserError("--val-every and --val-data-path: both are needed, or neither")
        for name in ("labels", "prompts", "sampler", "sampling_steps", "cfg_scale"):
            if getattr(self, f"sample_{name}") is not None and not self.sample_every:
                raise UserError(flag(f"sample_{name}"), "needs --sample-every, the steps between grids", "give both")
