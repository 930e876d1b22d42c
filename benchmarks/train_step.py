"""A training step from latents: ours, eager and compiled, against the original release's recipe and the matrix rate.

    python benchmarks/train_step.py --model DiT-S/4 --batch-size 16 --device cpu --precision bf16 --json
    python benchmarks/train_step.py --model DiT-XL/2 --batch-size 64 --device cuda --profile --plot train_step.png

The original's recipe: float32 (on a GPU TF32), eager, AdamW with PyTorch's defaults, the average one parameter at a time.
Ours is `train.Trainer`, as train.py runs it. Variants take turns; medians are shown.
"""

import copy
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.profiler import record_function

sys.path.insert(0, str(Path(__file__).parent.parent))
import complexity
import train
from benchmarks import timing
from cli import options
from data import autoencoder as latents
from diffusion import create_diffusion
from runtime import distributed
from runtime.errors import UserError

COLOURS = {
    "matrix products": "#4269d0",
    "attention": "#97bbf5",
    "norms, GELU, other elementwise": "#efb118",
    "optimizer": "#ff725c",
    "moving average": "#6cc5b0",
    "Python, dispatch, waiting": "#9498a0",
}


def parse_args(argv=None):
    parser = options.Parser(__doc__.split("\n")[0] + " Takes the options of train.py beside these.")
    parser.add_argument("--profile", action="store_true", help="also say where the time of each variant goes")
    parser.add_argument("--plot", metavar="FILE", help="draw the profile")
    data_path = ["--data-path", "random latents"]
    mine, args = timing.parse(parser, lambda rest: train.parse_args(data_path + rest), argv, "--global-batch-size")
    args.precision = args.precision or ("bf16" if args.device == "cuda" else "fp32")
    with parser.reporting():
        train.check_batch(args, 1)
        build(args)
        if mine.plot and (Path(mine.plot).suffix != ".png" or not Path(mine.plot).absolute().parent.is_dir()):
            raise UserError(f"--plot {mine.plot}: name a .png file in a folder that exists")
    return parser, mine, args


LATENTS = latents.Stored({"channels": 4, "factor": 8, "scaling": 1.0, "shift": 0.0})


@dataclass
class Ours:
    """Makes the step of train.py."""

    args: object
    compile: str | None

    def __call__(self):
        args = copy.copy(self.args)
        args.compile = self.compile
        model = lively(train.build_model(args, LATENTS))
        trainer = train.Trainer(args, distributed.setup(args.device), model, LATENTS)
        mean = random_latents(args, model)
        moments = torch.stack([mean, torch.rand_like(mean)], dim=1)  # as stored: the mean and standard deviation
        batch = {"moments": moments.half(), "label": random_labels(args)}
        return lambda: trainer.update(batch)


@dataclass
class OriginalRecipe:
    """Makes the step of the original release's recipe."""

    args: object

    def __call__(self):
        args = self.args
        device = torch.device(args.device)
        timing.set_precision(args.device, "tf32")
        model = lively(train.build_model(args, LATENTS)).to(device).train()
        average = copy.deepcopy(model).requires_grad_(False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
        diffusion = create_diffusion("")
        x_0, y = random_latents(args, model).to(device), random_labels(args).to(device)

        def step():
            t = torch.randint(diffusion.num_timesteps, (len(x_0),), device=device)
            loss = diffusion.training_losses(model, x_0, t, {"y": y})["loss"].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad(), record_function("moving average"):
                for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
                    mean.mul_(0.9999).add_(weight, alpha=1 - 0.9999)

        return step


def build(args):
    """The model without values. Raises UserError for sizes that cannot be built."""
    with torch.device("meta"):
        return train.build_model(args, LATENTS)


def lively(model):
    """Without the zeros that adaLN-Zero starts from: arithmetic on zeros can be faster than on numbers."""
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def random_latents(args, model):
    return torch.randn(args.global_batch_size, model.in_channels, model.input_size, model.input_size)


def random_labels(args):
    return torch.randint(max(args.num_classes, 1), (args.global_batch_size,))


def where_time_goes(profile, device, elapsed):
    """{category: seconds} of one step, by the operation that takes the time; a GPU's idle time is spent waiting."""
    seconds = dict.fromkeys(COLOURS, 0.0)
    for event in profile.events():
        if event.device_type != torch.autograd.DeviceType.CPU:  # a kernel: its time is its operation's, and counted there
            continue
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        seconds[category_of(event)] += own / 1e6
    if device.type == "cuda":
        seconds["Python, dispatch, waiting"] += max(0.0, elapsed - sum(seconds.values()))
    return seconds


def category_of(event):
    name, parents = event.name, []
    while event.cpu_parent is not None:
        event = event.cpu_parent
        parents.append(event.name)
    family = [name, *parents]
    if any("lerp" in n or n == "moving average" for n in family):
        return "moving average"
    if any(n.startswith("Optimizer.step") or "adamw" in n or "vector_norm" in n or "foreach_norm" in n for n in family):
        return "optimizer"
    if "scaled_dot_product" in name or "attention" in name:
        return "attention"
    if name.removeprefix("aten::") in (
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "mkldnn_convolution",
        "cudnn_convolution",
        "convolution_backward",
    ):
        return "matrix products"
    if "linear" in name and "mkldnn" in name:
        return "matrix products"
    if name.startswith("aten::") or "CompiledFxGraph" in name or "triton" in name:
        return "norms, GELU, other elementwise"
    return "Python, dispatch, waiting"


def measure(mine, args):
    """The report, a dict."""
    flops = 3 * 2 * complexity.forward_macs(build(args)) * args.global_batch_size
    settings = ("model", "block", "image_size", "grad_accum", "grad_checkpoint")
    report = {**{name: getattr(args, name) for name in settings}, "batch_size": args.global_batch_size}
    profile = where_time_goes if mine.profile or mine.plot else None
    return report | timing.compare(mine, args, OriginalRecipe, Ours, flops, args.global_batch_size, profile)


def print_profile(report):
    print(f"\n{'where the time goes':34}" + "".join(f"{name:>12}" for name in report["variants"]))
    for category in COLOURS:
        shares = [times["profile"][category] / sum(times["profile"].values()) for times in report["variants"].values()]
        print(f"{category:34}" + "".join(f"{share:12.1%}" for share in shares))


def draw_profile(path, report):
    """A bar for each variant, as long as its step, cut into categories."""
    figure = Figure(figsize=(9, 1.2 + 0.6 * len(report["variants"])), layout="constrained")
    axes = figure.subplots()
    for name, times in reversed(report["variants"].items()):
        left, total = 0.0, sum(times["profile"].values())
        for category, colour in COLOURS.items():
            length = times["profile"][category] / total * statistics.median(times["seconds"])
            axes.barh(name, length, left=left, color=colour, label=category)
            left += length
    needed = report["flops_per_step"] / report["matrix_flops_per_second"]
    axes.axvline(needed, color="black", linestyle="--", linewidth=1)
    axes.text(
        needed, len(report["variants"]) - 0.5, "all products at the matrix rate ", va="bottom", ha="right", fontsize=8
    )
    axes.set_ylim(-0.5, len(report["variants"]) - 0.2)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[: len(COLOURS)], labels[: len(COLOURS)], loc="outside lower center", ncols=3, frameon=False)
    axes.set(xlabel=f"seconds a step, {report['precision']}, {report['machine']}", title=describe(report))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def describe(report):
    return f"training step of {report['model']}, {report['image_size']} px, batch {report['batch_size']}"


def main(argv=None):
    parser, mine, args = parse_args(argv)
    with parser.reporting():
        report = measure(mine, args)
    timing.show(mine, report, describe(report))
    if mine.profile and not mine.json:
        print_profile(report)
    if mine.plot:
        draw_profile(mine.plot, report)


if __name__ == "__main__":
    main()
