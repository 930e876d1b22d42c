"""What a model costs, counted by running it on PyTorch's meta device, which computes shapes and no values:

    python complexity.py --model DiT-B/4 --block in-context --precision bf16 --images 1e8 --peak-tflops 989
    python complexity.py --table                       # the paper's models beside our counts
    python complexity.py --plot scaling.png --results samples/*.metrics.json

The paper's "Gflops" are GMACs: 1e9 multiply-accumulates of the matrix products, the attention and the patch convolution in
one forward pass of one image. A MAC is two FLOPs.
"""

import json
import math
import os
import re
import sys
from argparse import SUPPRESS
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from cli import options
from models import DiT_models


class Published(NamedTuple):
    """A model of the paper. gmacs: its "Gflops". parameters: trainable, in millions. fid: FID-50K after 400K steps, without
    guidance, where the paper gives it."""

    model: str
    block: str
    image_size: int
    gmacs: float
    parameters: int
    fid: float | None


# DiT paper, Table 4 (the twelve models, and XL/2 at 512 px) and Figure 5 with section 3.2 (the block designs)
PUBLISHED = [
    Published("DiT-S/8", "adaln-zero", 256, 0.36, 33, 153.60),
    Published("DiT-S/4", "adaln-zero", 256, 1.41, 33, 100.41),
    Published("DiT-S/2", "adaln-zero", 256, 6.06, 33, 68.40),
    Published("DiT-B/8", "adaln-zero", 256, 1.42, 131, 122.74),
    Published("DiT-B/4", "adaln-zero", 256, 5.56, 130, 68.38),
    Published("DiT-B/2", "adaln-zero", 256, 23.01, 130, 43.47),
    Published("DiT-L/8", "adaln-zero", 256, 5.01, 459, 118.87),
    Published("DiT-L/4", "adaln-zero", 256, 19.70, 458, 45.64),
    Published("DiT-L/2", "adaln-zero", 256, 80.71, 458, 23.33),
    Published("DiT-XL/8", "adaln-zero", 256, 7.39, 676, 106.41),
    Published("DiT-XL/4", "adaln-zero", 256, 29.05, 675, 43.01),
    Published("DiT-XL/2", "adaln-zero", 256, 118.64, 675, 19.47),
    Published("DiT-XL/2", "adaln", 256, 118.56, 600, 25.21),
    Published("DiT-XL/2", "cross-attention", 256, 137.62, 598, 26.14),
    Published("DiT-XL/2", "in-context", 256, 119.37, 449, 35.24),
    Published("DiT-XL/2", "adaln-zero", 512, 524.60, 675, None),
]
TOLERANCE = {256: 0.03, 512: 0.07}  # GMACs by image size: the paper's own count is not described to the last product
SCALING = [row for row in PUBLISHED if row.block == "adaln-zero" and row.image_size == 256]  # the twelve models
DESIGNS = [row for row in PUBLISHED if row.model == "DiT-XL/2" and row.image_size == 256]

# ----------------------------------------------------------------------------------------------------------------------
# Options


def parse_args():
    parser = options.Parser(
        "Parameters, MACs, memory and hours of a model, counted on the meta device; the paper's models beside these "
        "counts; FID against MACs."
    )
    options.add_model_options(parser)
    options.add_design_options(parser)
    add = parser.add_argument_group("cost").add_argument
    add("--downsampling", type=options.positive, default=8, help="pixels a latent cell, per side; 1 for a model of pixels")
    add(
        "--channels", type=options.positive, default=4, help="channels of the latent, or of the image for a model of pixels"
    )
    add("--batch-size", type=options.positive, default=32, help="images at once on one device, for the memory")
    add("--precision", choices=["fp32", "tf32", "bf16"], default="fp32", help="for the memory; bf16: by autocast")
    add("--images", type=options.number(above=0), default=400_000 * 256, help="images to train on, for the hours")
    add(
        "--peak-tflops",
        type=options.number(above=0),
        default=SUPPRESS,
        help="peak of all devices together, in TFLOP/s at this precision; without it no hours",
    )
    add(
        "--utilization",
        type=options.number(above=0, high=1),
        default=1.0,
        help="share of the peak that is reached, in (0, 1]",
    )
    modes = parser.add_argument_group("other modes and output")
    mode = modes.add_mutually_exclusive_group()
    mode.add_argument(
        "--table",
        action="store_true",
        help="count the paper's models and print both; exit status 1 where a count is out of tolerance",
    )
    mode.add_argument("--plot", metavar="FILE.png", default=SUPPRESS, help="draw FID-50K against GMACs")
    modes.add_argument(
        "--results",
        metavar="FILE.json",
        nargs="+",
        default=[],
        help="more points for --plot: reports of evaluate.py, or lists of objects with model and fid, and where they "
        f"differ from the default {', '.join(options.DESIGN)}, image_size, label",
    )
    modes.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    plotting = "plot" in args
    if args.results and not plotting:
        parser.error("--results: needs --plot FILE.png, where the points are drawn")
    if plotting and not (args.plot.endswith(".png") and Path(args.plot).parent.is_dir()):
        parser.error(f"--plot {args.plot}: must be a name ending in .png, in a folder that exists")
    if plotting or args.table:
        shared = ("table", "plot", "results", "json")
        for name, value in vars(args).items():
            if name not in shared and value != parser.get_default(name):
                parser.error(
                    f"--{name.replace('_', '-')}: is for the cost of one model, leave it out or leave out --table/--plot"
                )
    return parser, args


# ----------------------------------------------------------------------------------------------------------------------
# Counting


def build(name, **arguments):
    """A model of `DiT_models` without values. Raises ValueError for sizes that cannot be built."""
    with torch.device("meta"):
        return DiT_models[name](**arguments)


def input_side(image_size, downsampling=8):
    """Pixels -> latent cells. Raises ValueError where the cells do not fill the image."""
    if image_size % downsampling:
        raise ValueError(f"image size {image_size} is not a multiple of {downsampling}, the pixels a latent cell")
    return image_size // downsampling


def inputs(model, batch_size):
    x = torch.empty(batch_size, model.in_channels, model.input_size, model.input_size, device="meta")
    return x, torch.empty(batch_size, device="meta"), torch.empty(batch_size, dtype=torch.int64, device="meta")


def trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def forward_macs(model):
    """Multiply-accumulates of a forward pass of one image."""
    with FlopCounterMode(display=False) as counter:
        model(*inputs(model, 1))
    return counter.get_total_flops() // 2


class GPUKernels(TorchFunctionMode):
    """Gives tensors on the meta device the dtypes and the attention kernel of a GPU. Autocast does not exist there: this
    is its rule for the three functions of `DiT` that it runs in bf16. And plain attention there materialises the (T, T)
    weights, which the fused kernels never store; to backward they leave q, k, v, the output and one number a query."""

    def __init__(self, precision):
        super().__init__()
        self.autocast = precision == "bf16"

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if self.autocast and function in (F.linear, F.conv2d, F.scaled_dot_product_attention):
            args = [a.bfloat16() if isinstance(a, torch.Tensor) else a for a in args]
        if function is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_efficient_attention(*args, None, compute_log_sumexp=True)[0]
        return function(*args, **(kwargs or {}))


def activation_bytes(model, batch_size, precision):
    """Bytes that autograd keeps from the forward to the backward pass of a training step, each storage once: activations
    and, in bf16, copies of the weights. The parameters themselves are not among them."""
    parameters = {StorageWeakRef(p.untyped_storage()) for p in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[StorageWeakRef(storage)] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), GPUKernels(precision):
        out = model.train()(*inputs(model, batch_size))  # holds the graph, so no storage's identity is used twice
    del out
    return sum(nbytes for storage, nbytes in saved.items() if storage not in parameters)


def training_memory(model, batch_size, precision):
    """Bytes by what holds them, on one device under DDP. Weights, gradients, both moments of AdamW and the EMA are float32
    at every precision. Not in it: what kernels need while they run, the allocator's fragments, CUDA's context."""
    everything, learned = (4 * n for n in (sum(p.numel() for p in model.parameters()), trainable(model)))
    parts = {
        "weights": everything,
        "ema": everything,
        "gradients": learned,
        "optimizer": 2 * learned,
        "activations": activation_bytes(model, batch_size, precision),
    }
    return parts | {"total": sum(parts.values())}


# ----------------------------------------------------------------------------------------------------------------------
# Reports


def cost(args):
    """All about one model, as a dict. Raises ValueError for one that cannot be built."""
    side = input_side(args.image_size, args.downsampling)
    arguments = options.design(args)
    model = build(args.model, input_size=side, in_channels=args.channels, num_classes=args.num_classes, **arguments)
    macs = forward_macs(model)
    flops = 3 * 2 * macs  # the backward pass is two products for each one of the forward pass
    report = {
        "model": args.model,
        **arguments,
        "block": model.block,
        "image_size": args.image_size,
        "num_classes": args.num_classes,
        "tokens": model.pos_embed.shape[1],
        "parameters": trainable(model),
        "forward_macs_per_image": macs,
        "training_flops_per_image": flops,
        "precision": args.precision,
        "batch_size": args.batch_size,
        "training_memory_bytes": training_memory(model, args.batch_size, args.precision),
    }
    if "peak_tflops" in args:
        seconds = args.images * flops / (args.peak_tflops * 1e12 * args.utilization)
        report |= {name: getattr(args, name) for name in ("images", "peak_tflops", "utilization")}
        report["hours"] = seconds / 3600
    return report


def print_cost(report):
    changes = [f"{name.replace('_', ' ')} {report[name]}" for name in options.DESIGN[1:] if name in report]
    size = f"{report['image_size']} px, {report['tokens']} tokens, {report['num_classes']} classes"
    print(", ".join([report["model"], report["block"], *changes, size]))
    rows = [
        ("trainable parameters", f"{report['parameters'] / 1e6:,.2f} M"),
        ("forward pass of an image", f"{report['forward_macs_per_image'] / 1e9:,.2f} GMACs"),
        ("training step of an image", f"{report['training_flops_per_image'] / 1e9:,.2f} GFLOP"),
    ]
    memory = report["training_memory_bytes"]
    rows += [(f"memory for {part}", f"{memory[part] / 2**30:,.2f} GiB") for part in list(memory)[:-1]]
    rows += [(f"  in all, {report['precision']}, batch {report['batch_size']}", f"{memory['total'] / 2**30:,.2f} GiB")]
    if "hours" in report:
        rows += [(f"training on {report['images']:,.0f} images", f"{report['hours']:,.1f} hours")]
    for title, value in rows:
        print(f"  {title:<36}{value:>18}")
    if "hours" in report:
        print(f"  at {report['utilization']:.0%} of {report['peak_tflops']:g} TFLOP/s")


def compare_with_paper():
    """Our counts of the paper's models: a list of dicts, `within_tolerance` among the keys."""
    rows = []
    for paper in tqdm(PUBLISHED, desc="counting", unit="model", leave=False):
        model = build(paper.model, block=paper.block, input_size=input_side(paper.image_size))
        gmacs, parameters = forward_macs(model) / 1e9, trainable(model)
        agrees = abs(gmacs - paper.gmacs) <= TOLERANCE[paper.image_size] and round(parameters / 1e6) == paper.parameters
        ours = {"counted_gmacs": gmacs, "counted_parameters": parameters, "within_tolerance": agrees}
        rows.append(paper._asdict() | ours)
    return rows


def print_comparison(rows):
    print(f"{'':<31}{'GMACs (the paper: Gflops)':>29}{'parameters (M)':>24}")
    print(f"{'model':<10}{'block':<17}{'px':>4}{'paper':>11}{'counted':>9}{'diff.':>9}{'paper':>12}{'counted':>12}")
    for row in rows:
        difference = row["counted_gmacs"] - row["gmacs"]
        print(
            f"{row['model']:<10}{row['block']:<17}{row['image_size']:>4}{row['gmacs']:>11.2f}{row['counted_gmacs']:>9.2f}"
            f"{difference:>+9.2f}{row['parameters']:>12}{row['counted_parameters'] / 1e6:>12.2f}"
            f"{'' if row['within_tolerance'] else '  OUT OF TOLERANCE'}"
        )


# ----------------------------------------------------------------------------------------------------------------------
# FID against GMACs


def read_results(path):
    """Points of a JSON file: a report of evaluate.py, whose model is read from the name that sample_ddp.py gave the
    samples, or an object or a list of objects with "model" and "fid" (and keys of `options.DESIGN`, "image_size", "label").
    Returns a list of (label, model on the meta device, fid). Raises ValueError with the reason."""
    try:
        entries = json.loads(Path(path).read_text())
        return [result_point(entry) for entry in (entries if isinstance(entries, list) else [entries])]
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:  # whatever values it holds
        raise ValueError(f"{path}: {str(error).splitlines()[0]}") from None


def result_point(entry):
    if not isinstance(entry, dict) or not isinstance(entry.get("fid"), int | float) or not math.isfinite(entry["fid"]):
        raise ValueError('each result must be an object with a number "fid"')
    if "model" not in entry:
        name = Path(entry.get("samples", {}).get("path", "")).name
        match = re.match(r"DiT-(XL|L|B|S)-([248])-.*-size-(\d+)-", name)
        if not match:
            raise ValueError(f'the samples\' name {name!r} does not tell their model; add "model": "DiT-..."')
        entry = {"model": f"DiT-{match[1]}/{match[2]}", "image_size": int(match[3])} | entry
    if entry["model"] not in DiT_models:
        raise ValueError(f"model {entry['model']!r} is not one of {', '.join(DiT_models)}")
    overrides = {name: entry[name] for name in options.DESIGN if name in entry}
    image_size = entry.get("image_size", 256)
    model = build(entry["model"], input_size=input_side(image_size), **overrides)
    differences = [f"{name.replace('_', ' ')} {value}".removeprefix("block ") for name, value in overrides.items()]
    differences += [f"{image_size} px"] if image_size != 256 else []
    label = entry.get("label", ", ".join([entry["model"], *differences]))
    return label, model, entry["fid"]


def correlation(points):
    """Pearson's, of log GMACs and FID. points: pairs, at least three (two always lie on a line)."""
    gmacs, fids = np.array(points).T
    return float(np.corrcoef(np.log(gmacs), fids)[0, 1])


def draw(path, results, title):
    figure = Figure(figsize=(9.6, 4.8), layout="constrained")
    scaling, designs = figure.subplots(1, 2, width_ratios=[2.2, 1])
    colors = {"S": "#56b4e9", "B": "#009e73", "L": "#e69f00", "XL": "#cc3311"}
    markers = {"8": "o", "4": "s", "2": "^"}
    for size, color in colors.items():
        rows = [row for row in SCALING if row.model.startswith(f"DiT-{size}/")]
        scaling.plot(
            [row.gmacs for row in rows], [row.fid for row in rows], color=color, lw=1.2, zorder=1, label=f"DiT-{size}"
        )
        for row in rows:
            marker = markers[row.model.split("/")[1]]
            scaling.scatter(
                row.gmacs, row.fid, 58, color=color, marker=marker, edgecolors="white", linewidths=0.8, zorder=2
            )
    for patch, marker in markers.items():
        scaling.scatter([], [], 46, color="#666666", marker=marker, label=f"patch size {patch}")
    middle = np.median([row.gmacs for row in SCALING])
    for n, point in enumerate(results):
        at, right = (point["gmacs"], point["fid"]), point["gmacs"] > middle
        scaling.scatter(*at, 80, color="black", marker="*", zorder=3, label="" if n else "your results")
        where = {"xytext": (-7 if right else 7, 3), "textcoords": "offset points", "ha": "right" if right else "left"}
        scaling.annotate(
            point["label"], at, **where, fontsize=8, path_effects=[withStroke(linewidth=3, foreground="white")]
        )
    scaling.set(xscale="log", xlabel="GMACs of a forward pass (the paper's Gflops)", ylabel="FID-50K", title=title)
    scaling.xaxis.set_major_formatter("{x:g}")
    scaling.legend(frameon=False, fontsize=9, ncols=2)

    for row in DESIGNS:
        designs.scatter(row.gmacs, row.fid, 58, color=colors["XL"], marker="^", edgecolors="white", linewidths=0.8)
        designs.annotate(
            row.block, (row.gmacs, row.fid), fontsize=9, xytext=(0, 8), textcoords="offset points", ha="center"
        )
    designs.set(xlim=(110, 145), ylim=(15, 40), xlabel="GMACs", title="Block designs, DiT-XL/2")
    for axes in (scaling, designs):
        axes.grid(color="#e6e6e6", lw=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    temporary = f"{path}.{os.getpid()}.tmp"
    figure.savefig(temporary, format="png", dpi=120)
    os.replace(temporary, path)


def plot(path, files):
    """Draw, and return what was drawn as a dict."""
    points = [point for file in files for point in read_results(file)]  # all are checked before the first is counted
    results = [
        {"label": label, "gmacs": forward_macs(model) / 1e9, "fid": fid}
        for label, model, fid in tqdm(points, desc="counting", unit="model", leave=False)
    ]
    paper = correlation([(row.gmacs, row.fid) for row in SCALING])
    report = {"plot": path, "correlation_paper": paper, "results": results}
    if len(results) >= 3:
        report["correlation_results"] = correlation([(point["gmacs"], point["fid"]) for point in results])
    draw(path, results, f"The paper's models at 400K steps: correlation {paper:.2f}")
    return report


def main():
    parser, args = parse_args()
    try:
        if args.table:
            rows = compare_with_paper()
            print(json.dumps(rows, indent=2)) if args.json else print_comparison(rows)
            sys.exit(not all(row["within_tolerance"] for row in rows))
        report = plot(args.plot, args.results) if "plot" in args else cost(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if args.json:
        print(json.dumps(report, indent=2))
    elif "plot" in args:
        print(f"written to {args.plot}; correlation of log GMACs and FID-50K:")
        print(f"  the paper's {len(SCALING)} models: {report['correlation_paper']:.2f}")
        if "correlation_results" in report:
            print(f"  your {len(report['results'])} results: {report['correlation_results']:.2f}")
    else:
        print_cost(report)


if __name__ == "__main__":
    main()
