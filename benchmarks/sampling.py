"""Drawing images: a guided step of ours, eager and compiled, against the original release's recipe and the matrix rate.

    python benchmarks/sampling.py --model DiT-S/4 --batch-size 16 --device cpu --precision bf16 --json
    python benchmarks/sampling.py --model DiT-XL/2 --batch-size 64 --device cuda --repeats 250

The original's recipe: float32 (on a GPU TF32), eager, the batch doubled in every step, `p_sample_loop` around
`forward_with_cfg`. Ours is the loop of sample_ddp.py. Each variant draws its batch step by step, in turns with the others;
--repeats 250 times a whole run of 250 steps. Drawing the noise and decoding, the same for all, are not in it.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import complexity
import sample_ddp
from benchmarks import timing
from benchmarks.train_step import lively
from cli import options
from diffusion import create_diffusion, samplers
from models import DiT_models
from runtime import distributed
from runtime.errors import UserError
from sampling import pipeline as sampling


def parse_args(argv=None):
    parser = options.Parser(__doc__.split("\n")[0] + " Takes the options of sample_ddp.py beside these.")
    mine, args = timing.parse(parser, sample_ddp.parse_args, argv, "--per-proc-batch-size")
    args.precision = args.precision or ("tf32" if args.tf32 and args.device == "cuda" else "fp32")
    with parser.reporting():
        for option in ("ckpt", "guide_ckpt", "guidance_interval"):
            if getattr(args, option):
                raise UserError(f"--{option.replace('_', '-')}: models here are random, every step is guided; leave it out")
        sampling.check_arithmetic(args)
        options.check_image_size(args.image_size, 8, DiT_models[args.model].keywords["patch_size"])
    return parser, mine, args


def build(args):
    return DiT_models[args.model](input_size=args.image_size // 8, num_classes=args.num_classes)


@dataclass
class Ours:
    """Makes the next step of sample_ddp.py's loop, over and over."""

    args: object
    compile: str | None

    def __call__(self):
        args, device = self.args, distributed.setup(self.args.device).device
        args.compile = self.compile
        model = sampling.place(args, lively(build(args)).eval(), device)
        shape = (model.in_channels, model.input_size, model.input_size)
        steps = 0 if sampling.is_deterministic(args) else args.num_sampling_steps
        noise = sampling.image_noise(0, range(args.per_proc_batch_size), steps, shape).to(device)
        y = labels(args, device)

        def loop():
            while True:
                denoise = sampling.denoiser(args, model, y)
                yield from sampling.steps(args, denoise, noise[0], lambda x, i: noise[1 + i])

        return torch.inference_mode()(partial(next, loop()))


@dataclass
class OriginalRecipe:
    """Makes the next step of the original release's loop, over and over."""

    args: object

    def __call__(self):
        args, device = self.args, torch.device(self.args.device)
        timing.set_precision(args.device, "tf32")
        model = lively(build(args)).eval().to(device)
        diffusion = create_diffusion(str(args.num_sampling_steps))
        y = labels(args, device)
        kwargs = {"y": torch.cat([y, torch.full_like(y, model.null_class)]), "cfg_scale": args.cfg_scale}
        shape = (2 * len(y), model.in_channels, model.input_size, model.input_size)
        noise = torch.randn(*shape, device=device)

        def loop():
            while True:
                yield from diffusion.p_sample_loop_progressive(
                    model.forward_with_cfg, shape, noise, clip_denoised=False, model_kwargs=kwargs, device=device
                )

        return torch.no_grad()(partial(next, loop()))


def labels(args, device):
    return torch.arange(args.per_proc_batch_size, device=device) % max(args.num_classes, 1)


def measure(mine, args):
    """The report, a dict."""
    with torch.device("meta"):
        macs = complexity.forward_macs(build(args))
    evaluations = samplers.model_evaluations(args.sampler, args.num_sampling_steps) / args.num_sampling_steps
    flops = 2 * macs * evaluations * (1 if args.cfg_scale == 1 else 2) * args.per_proc_batch_size
    settings = ("model", "image_size", "sampler", "num_sampling_steps", "cfg_scale")
    report = {**{name: getattr(args, name) for name in settings}, "batch_size": args.per_proc_batch_size}
    images = args.per_proc_batch_size / args.num_sampling_steps
    report |= timing.compare(mine, args, OriginalRecipe, Ours, flops, images)
    if "images_per_second" in report:
        report["images_per_second_without_decoding"] = report.pop("images_per_second")
    return report


def main(argv=None):
    parser, mine, args = parse_args(argv)
    with parser.reporting():
        report = measure(mine, args)
    timing.show(mine, report, f"sampling step of {args.model}, {args.image_size} px, batch {args.per_proc_batch_size}, "
                f"{args.sampler}, guidance {args.cfg_scale}")  # fmt: skip


if __name__ == "__main__":
    main()
