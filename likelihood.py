"""Measure how well a pixel-space DiT knows images: the variational bound, in bits per dimension.

    python likelihood.py --ckpt results/000-DiT-S-4/checkpoints/0400000.pt --data-path /path/to/test
    torchrun --nproc_per_node=gpu likelihood.py --ckpt CKPT --data-path digits --num-timesteps 100

The bound of -log2 p(image | its class) under the averaged weights (DDPM, Ho et al. 2020, eq. 5), with one draw of noise per
image and timestep, over pixels of 256 levels. (The digits have 17, spread over the 256.) Writes the total, the prior, every
timestep's term and their standard errors over the images to --output, and a plot of the terms beside it.
"""

import math
import os
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from checkpoint import files as checkpoint
from cli import options
from data import images as data
from diffusion import create_diffusion
from runtime import distributed, files, seeds
from runtime.errors import UserError
from sampling import pipeline as sampling


def parse_args(argv=None):
    parser = options.Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--ckpt", required=True, help="a checkpoint of train.py, or weights as .safetensors; what it records need not be "
        "repeated")  # fmt: skip
    add("--data-path", required=True, help='an image folder, one folder a class; or "digits"')
    options.add_model_options(parser, vae="ema")
    add = parser.add_argument_group("bound").add_argument
    add("--num-images", type=options.number(int, low=2), default=1000, help="images to measure, drawn from the data by "
        "--seed; all where there are fewer")  # fmt: skip
    add("--num-timesteps", type=options.number(int, low=2, high=1000), default=1000, help="timesteps of the process; with "
        "fewer than the 1000 of training it is another process, whose bound is looser")  # fmt: skip
    add("--batch-size", type=options.positive, default=32, help="images per process and forward pass")
    add("--seed", type=options.count, default=0, help="seed of the choice of images and of each image's noise")
    add("--output", default="likelihood.json", help="the report's file; the plot is a .png of the same name")
    options.add_device_option(parser)
    args = options.parse_with_checkpoint(parser, argv)
    output = Path(args.output).absolute()
    if output.suffix != ".json":
        parser.error(f"--output {args.output}: name a .json file; the plot gets the same name with .png")
    if not os.access(output.parent, os.W_OK):
        parser.error(f"--output {args.output}: its folder is missing or cannot be written to")
    return parser, args


def main(argv=None):
    parser, args = parse_args(argv)
    with parser.reporting():
        try:
            likelihood(args, distributed.setup(args.device))
        finally:
            distributed.close()


def likelihood(args, context):
    check_space(args)
    dataset = data.load(args.data_path, args.image_size, flip=False)
    labels = class_numbers(args, dataset)
    model, space = sampling.load_model(args)
    if space.channels != dataset.channels:
        raise UserError(
            f"--data-path {args.data_path}: images of {dataset.channels} channels, {args.ckpt} works on {space.channels}"
        )
    sampling.use_tf32(context.device, False)
    diffusion = create_diffusion(str(args.num_timesteps), learn_sigma=model.learn_sigma)
    indices = choose(len(dataset), args.num_images, args.seed)
    rows = measure(model.to(context.device), diffusion, dataset, labels, indices, args, context)
    if context.is_main:
        report = summarise(rows, diffusion)
        write_report(args, context, report)
        total, terms = report["total"], report["terms"]["mean"]
        print(
            f"{total['mean']:.4f} +- {total['standard_error']:.4f} bits per dimension: decoder term {terms[0]:.4f}, other "
            f"terms {sum(terms[1:]):.4f}, prior {report['prior']['mean']:.2g} ({len(rows)} images, "
            f"{diffusion.num_timesteps} timesteps)\nwritten to {args.output}"
        )


def check_space(args):
    """Refuse a model of latents."""
    channels = checkpoint.model_config(args.state, args.ckpt)["in_channels"]
    if channels not in (1, 3):
        raise UserError(
            f"--ckpt {args.ckpt}: works on latents, so its bound is on a density of latents: it says nothing in bits about "
            "images, of which the autoencoder drops a part and gives no probability; use a model trained with --vae none"
        )
    if args.vae != "none":
        raise UserError(
            f"--vae {args.vae}: {args.ckpt} has {channels} channels, like pixels; if it works on them, pass none"
        )


def class_numbers(args, dataset):
    """The model's number of each of the data's classes: by name where the checkpoint records names, else in order."""
    if not args.num_classes:
        return [0] * len(dataset.classes)
    names = checkpoint.options(args.state).get("class_names") or []
    unknown = [name for name in dataset.classes if name not in names]
    if names and unknown:
        raise UserError(
            f"--data-path {args.data_path}: {unknown[0]!r} is no class of {args.ckpt}, which knows {', '.join(names[:5])}"
            f"{', ...' if len(names) > 5 else ''}; name the folders as in training"
        )
    if not names and len(dataset.classes) != args.num_classes:
        raise UserError(
            f"--data-path {args.data_path}: {len(dataset.classes)} classes, {args.ckpt} has {args.num_classes} and records "
            "no names to tell which these are; give a folder of all classes"
        )
    return [names.index(name) for name in dataset.classes] if names else list(range(args.num_classes))


def choose(num_images, wanted, seed):
    """Indices of the images to measure: the first `wanted` of a shuffled order, so that more images add to fewer."""
    if num_images < 2:
        raise UserError("--data-path: one image alone; a standard error needs at least 2")
    return seeds.generator(seed, seeds.BOUND_CHOICE).permutation(num_images)[:wanted].tolist()


def measure(model, diffusion, dataset, labels, indices, args, context):
    """The `bound` of images `indices` of the dataset, in their order, on every rank. Batches are dealt out whole, so that
    the number of processes changes no bit of the result."""
    batches = [indices[first : first + args.batch_size] for first in range(0, len(indices), args.batch_size)]
    mine = batches[context.rank :: context.world_size]
    rows, problem = [], None
    total = sum(map(len, mine)) * diffusion.num_timesteps
    with tqdm(total=total, desc="Bound", unit="step", unit_scale=True, disable=not context.is_main) as bar:
        try:
            for batch in mine:
                items = [dataset[index, 0] for index in batch]
                x_0 = data.to_model_range(torch.stack([item["image"] for item in items]).to(context.device))
                y = torch.tensor([labels[item["label"]] for item in items], device=context.device)

                def denoise(x_t, t, y=y):
                    bar.update(len(x_t))
                    return model(x_t, t, y)

                rows.append(bound(diffusion, denoise, x_0, args.seed, batch))
        except data.DataError as error:
            problem = str(error).removesuffix(", or pass --skip-bad-images")  # an option of training
    gathered = context.all_gather((rows, problem))
    problems = [problem for _, problem in gathered if problem]
    if problems:
        raise UserError(problems[0])
    return torch.cat([gathered[b % context.world_size][0][b // context.world_size] for b in range(len(batches))])


def bound(diffusion, denoise, x_0, seed, indices):
    """The terms of the bound, DDPM, eq. 5, in bits per dimension: (N, num_timesteps + 1) float64 on the CPU, L_0 (the
    decoder's), L_1, ..., and L_T (the prior's) last. x_0: (N, C, H, W) in [-1, 1]; image n's noise belongs to
    (seed, indices[n])."""
    generators = [seeds.generator(seed, seeds.BOUND_NOISE, index) for index in indices]

    def step_noise(x, i):
        rows = [generator.standard_normal(x.shape[1:], "float32") for generator in generators]
        return torch.from_numpy(np.stack(rows)).to(x.device)

    found = diffusion.calc_bpd_loop(denoise, x_0, step_noise=step_noise)
    return torch.cat([found["vb"].flip(1), found["prior_bpd"][:, None]], dim=1).cpu().double()


def summarise(rows, diffusion):
    """Mean over images and its standard error of the total, the prior and each term; terms by ascending timestep."""

    def moments(values):
        return {"mean": values.mean(0).tolist(), "standard_error": (values.std(0) / math.sqrt(len(rows))).tolist()}

    timesteps = diffusion.table("timestep_map", rows).tolist()
    return {
        "unit": "bits per dimension",
        "images": len(rows),
        "total": moments(rows.sum(1)),
        "prior": moments(rows[:, -1]),
        "terms": {"timestep": timesteps, **moments(rows[:, :-1])},
    }


def write_report(args, context, report):
    settings = {
        **{name: getattr(args, name) for name in ("ckpt", "data_path", "num_timesteps", "batch_size", "seed")},
        "checkpoint_crc32": files.checksum(args.ckpt),
        "checkpoint_step": args.state.get("step"),
        "processes": context.world_size,
        "device": context.device.type,
        "torch": torch.__version__,
    }
    files.write_json(args.output, {**report, "settings": settings})
    figure = plot(report)
    files.replace_file(
        Path(args.output).with_suffix(".png"), lambda file: figure.savefig(file, format="png", bbox_inches="tight")
    )


def plot(report):
    """A figure of the terms over the timesteps, both logarithmic, with a band of one standard error."""
    from matplotlib.figure import Figure  # takes a second to import; without pyplot there is no window and no state

    terms, total, prior = report["terms"], report["total"], report["prior"]
    t, mean, error = (np.array(terms[name]) for name in ("timestep", "mean", "standard_error"))
    figure = Figure(figsize=(6.4, 3.6), dpi=120)
    axes = figure.subplots()
    axes.fill_between(t + 1, mean - error, mean + error, alpha=0.3, linewidth=0)
    axes.plot(t + 1, mean, marker=".", markersize=3, linewidth=1)
    axes.annotate(f"decoder term {mean[0]:.2f}", (1, mean[0]), (0, -14), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlabel="timestep t + 1", ylabel="bits per dimension")
    axes.set_title(
        f"{total['mean']:.3f} ± {total['standard_error']:.3f} bits per dimension, of which prior {prior['mean']:.2g}\n"
        f"{report['images']} images, {len(t)} timesteps",
        fontsize="medium",
    )
    axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    main()
