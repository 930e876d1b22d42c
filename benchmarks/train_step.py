"""A training step from latents: ours, eager and compiled, against the original release's recipe and the matrix rate.

    python -m benchmarks train_step --model DiT-S/4 --batch-size 16 --device cpu --precision bf16 --json
    python -m benchmarks train_step --model DiT-XL/2 --batch-size 64 --device cuda --profile --plot train_step.png
    torchrun --nproc_per_node=8 -m benchmarks train_step --model DiT-XL/2 --batch-size 64 --calls 10

The original's recipe is float32 (on a GPU TF32), eager, DDP also on one device, AdamW with PyTorch's defaults, and an EMA
that is updated one parameter at a time. Ours is the step of train.py. The variants take turns; medians are printed. Under
torchrun the batch size is that of each process.
"""

import copy
import re
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from benchmarks import timing
from checkpoint.config import ModelOptions
from data.autoencoder import LatentSpace
from diffusion import create_diffusion
from runtime import distributed
from runtime.config import Config, option
from runtime.devices import set_precision
from runtime.errors import UserError
from runtime.files import replace_file
from runtime.launch import launched
from runtime.parser import Parser
from training import setup
from training.config import ComputeConfig, RecipeConfig
from training.cost import forward_macs
from training.trainer import Trainer

COLOURS = {
    "matrix products": "#4269d0",
    "attention": "#97bbf5",
    "norms, GELU, other elementwise": "#efb118",
    "optimizer": "#ff725c",
    "moving average": "#6cc5b0",
    "exchange of gradients": "#a463f2",
    timing.WAITING: "#9498a0",
}
# The first pattern that a GPU kernel's name has decides on its category; Inductor names kernels after what it has fused
KERNELS = {
    r"triton_(poi|red|per)": "norms, GELU, other elementwise",
    r"nccl": "exchange of gradients",
    r"flash|fmha|sdpa|attention": "attention",
    r"gemm|gemv|nvjet|cutlass|xmma|split_?k|triton_(tem|mm)|conv|[wd]grad": "matrix products",
    r"lerp": "moving average",
    r"adam|lpnorm": "optimizer",
}
MATRIX_PRODUCTS = "mm addmm bmm baddbmm mkldnn_convolution cudnn_convolution convolution_backward".split()
# The profiler's own event where the GPU's queue is full, to which it assigns the kernels of the operation around it again
QUEUE_FULL = "Command Buffer Full"
SPACE = LatentSpace(channels=4, factor=8, scaling=1.0, shift=0.0)


@dataclass(frozen=True)
class StepConfig(Config):
    """Options of train_step.py."""

    timing: timing.TimingConfig
    model: ModelOptions
    compute: ComputeConfig
    profile: bool = option(False, "also measure where the time of each variant goes")
    plot: str | None = option(None, "draw where the time goes into this .png file", metavar="FILE", path="output")

    def check(self):
        if self.plot and Path(self.plot).suffix != ".png":
            raise UserError(f"--plot {self.plot}: name a .png file")

    @property
    def recipe(self):
        return RecipeConfig(global_batch_size=self.timing.batch_size * launched()[2])


def build_model(config, condition=None):
    """The model of a config, by default of classes. Parameters that start at zero get random values: arithmetic on zeros
    can be faster."""
    model = setup.build_model(config.model, config.recipe, SPACE, condition)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.is_meta and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


def ours(config):
    """The step of train.py."""
    trainer, batch = make_trainer(config)
    return lambda: trainer.step(batch)


def make_trainer(config):
    """(Trainer, a batch of stored latents in the memory that train.py's loader keeps them in)"""
    compute, context = config.compute, distributed.setup(config.compute.device)
    with context.device:  # where drawing the first weights of XL/2 takes no time
        model = build_model(config)
    trainer = Trainer(config.recipe, compute, context, model, SPACE)
    mean, label = random_batch(config, model)
    batch = {"moments": torch.stack([mean, torch.rand_like(mean)], dim=1).half(), "label": label}
    if trainer.device.type == "cuda":
        batch = {name: values.pin_memory() for name, values in batch.items()}
    return trainer, batch


def original_recipe(config):
    """The step of the original release's recipe."""
    device = distributed.setup(config.compute.device).device
    set_precision("tf32", device)
    with device:
        model = build_model(config).train()
    average = copy.deepcopy(model).requires_grad_(False)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    parallel = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    diffusion = create_diffusion("")
    x_0, y = (values.to(device) for values in random_batch(config, model))

    def step():
        t = torch.randint(diffusion.num_timesteps, (len(x_0),), device=device)
        loss = diffusion.training_losses(parallel, x_0, t, {"y": y})["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad(), record_function("moving average"):
            for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
                mean.mul_(0.9999).add_(weight, alpha=1 - 0.9999)

    return step


def random_batch(config, model):
    """Latents (N, C, H, W) and labels (N,)."""
    size = config.timing.batch_size
    labels = torch.randint(max(model.num_classes, 1), (size,))
    return torch.randn(size, model.in_channels, *model.sizes.sides), labels


def where_time_goes(profile, device):
    """{(category, what): seconds} of one step: what are the operations on a CPU, and the kernels on a GPU. Every category
    is there."""
    seconds = Counter(dict.fromkeys(((category, "") for category in COLOURS), 0.0))
    operations, kernels = [], Counter()
    for event in profile.events():
        if event.device_type != torch.autograd.DeviceType.CPU:
            kernels[event.name] += event.time_range.elapsed_us() / 1e6
        elif event.name != QUEUE_FULL:
            operations.append(event)
    if device.type != "cuda":
        for event in operations:
            seconds[category_of(event), event.name] += event.self_cpu_time_total / 1e6
        return seconds
    for event in operations:
        kernels.pop(event.name, None)  # no kernel, but the span of an operation's kernels
        for kernel in event.kernels:
            seconds[kernel_category(kernel.name, event), kernel.name] += kernel.duration / 1e6
            kernels[kernel.name] -= kernel.duration / 1e6
    for name, rest in kernels.items():  # of which the profiler does not tell the operation
        seconds[kernel_category(name), name] += max(0.0, rest)
    return seconds


def kernel_category(name, operation=None):
    """By the operation that launched the kernel, where it tells more than the kernel's name."""
    category = operation and category_of(operation)
    if category in ("optimizer", "moving average"):
        return category
    found = (category for pattern, category in KERNELS.items() if re.search(pattern, name, re.IGNORECASE))
    return next(found, "norms, GELU, other elementwise")


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
    if any("c10d" in n or "gloo" in n for n in family):
        return "exchange of gradients"
    if "scaled_dot_product" in name or "attention" in name:
        return "attention"
    if name.removeprefix("aten::") in MATRIX_PRODUCTS or ("linear" in name and "mkldnn" in name):
        return "matrix products"
    if name.startswith("aten::") or "CompiledFxGraph" in name or "triton" in name:
        return "norms, GELU, other elementwise"
    return timing.WAITING


def print_profile(report):
    print(f"\n{'where the time goes':34}" + "".join(f"{name:>12}" for name in report["variants"]))
    for category in COLOURS:
        shares = [times["profile"][category] / sum(times["profile"].values()) for times in report["variants"].values()]
        print(f"{category:34}" + "".join(f"{share:12.1%}" for share in shares))


def draw_profile(path, report, title):
    """Draw a bar for each variant, as long as its step takes, divided into the categories."""
    from matplotlib.figure import Figure

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
    axes.text(needed, len(report["variants"]) - 0.5, "all products at the matrix rate ", va="bottom", ha="right",
        fontsize=8)  # fmt: skip
    axes.set_ylim(-0.5, len(report["variants"]) - 0.2)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[: len(COLOURS)], labels[: len(COLOURS)], loc="outside lower center", ncols=3, frameon=False)
    axes.set(xlabel=f"seconds per step, {report['precision']}, {report['machine']}", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    replace_file(path, lambda file: figure.savefig(file, format="png", dpi=120))


def measure(config):
    """Time the step. Returns the report, a dict. Raises UserError for what cannot work, before anything slow."""
    config = timing.resolve(config, gpu_precision="bf16")
    setup.check_batch(config.recipe, config.compute, launched()[2])
    with torch.device("meta"):
        macs = forward_macs(build_model(config))
    model, compute, size = config.model, config.compute, config.timing.batch_size
    profile = where_time_goes if config.profile or config.plot else None
    setting = {"model": model.name, "block": model.block, "image_size": model.image_size, "batch_size": size}
    setting |= {"grad_accum": compute.grad_accum, "grad_checkpoint": compute.grad_checkpoint}
    return setting | timing.compare(config, original_recipe, ours, 3 * 2 * macs * size, size, profile)


def main(argv=None):
    parser = Parser(StepConfig, __doc__)
    config = parser.parse(argv)
    with parser.report_errors():
        report = measure(config)
        title = "training step of {model}, {image_size} px, batch {batch_size}".format(**report)
        timing.show(report, title, config.timing.json)
        if launched()[0]:
            return
        if config.profile and not config.timing.json:
            print_profile(report)
        if config.plot:
            draw_profile(config.plot, report, title)
