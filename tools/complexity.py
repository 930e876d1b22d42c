"""Count what a model costs: parameters, MACs, memory and hours of training. The counts come from running the model on
PyTorch's meta device, which computes shapes and no values.

    python -m tools.complexity --model DiT-B/4 --block in-context --precision bf16 --images 1e8 --peak-tflops 989
    python -m tools.complexity --precision bf16 --gpus 64 --shard          # memory and an estimate of the time on many GPUs
    python -m tools.complexity --table                       # the paper's models beside our counts

The paper's "Gflops" are GMACs: 1e9 multiply-accumulates of the matrix products, the attention and the patch convolution in
one forward pass of one image. A MAC is two FLOPs. studies/scaling.py draws FID against them.
"""

import json
import sys
from dataclasses import dataclass
from typing import NamedTuple

from checkpoint.config import MAX_SIZE, DesignOptions, ModelOptions
from runtime.config import Config, flag, option
from runtime.errors import UserError
from runtime.files import reason
from runtime.parser import Parser
from training import many_gpus
from training.cost import build, forward_macs, input_side, trainable, training_memory

# PyTorch and the models take seconds to import: functions import them, so that --help and mistakes are fast

SCALING = (1, 8, 64, 256, 1024)  # GPUs of the rows of the estimate, besides --gpus


@dataclass(frozen=True)
class ClusterOptions(Config):
    """many GPUs"""

    gpus: int | None = option(None, "also print each GPU's memory and exchange with this many GPUs, and estimate the time "
        "of a step with them and with 1, 8, 64, 256 and 1024 (default: off)", low=1, high=1_000_000)  # fmt: skip
    shard: str | None = option(None, "divide weights, gradients, optimizer state and EMA, as train.py --shard does, among "
        "all GPUs, or with node among those of each node (default: each has a copy)", choices=("all", "node"),
        const="all")  # fmt: skip
    gpus_per_node: int = option(8, "GPUs in a node", low=1, high=10_000)
    node_bandwidth: float = option(360.0, "GB/s that a GPU sends to the others of its node; the default is 80 % of what "
        "the NVLink of an H100 has, 450 GB/s", low=0.001, high=1e6)  # fmt: skip
    network_bandwidth: float = option(40.0, "GB/s that a GPU sends to other nodes through its own adapter; the default is "
        "80 % of what InfiniBand NDR has, 50 GB/s (400 Gbit/s)", low=0.001, high=1e6)  # fmt: skip
    network_latency: float = option(5.0, "microseconds from a node to the next", low=0, high=1e6)

    def check(self):
        for name, value in self.flat().items():
            if self.gpus is None and value != self.defaults()[name]:
                raise UserError(f"{flag(name)}: needs --gpus, their number")
        if self.gpus and self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise UserError(f"--gpus {self.gpus}: not a multiple of --gpus-per-node {self.gpus_per_node}")

    def network(self):
        return many_gpus.Network(
            self.gpus_per_node, self.node_bandwidth * 1e9, self.network_bandwidth * 1e9, self.network_latency * 1e-6
        )


@dataclass(frozen=True)
class CostConfig(Config):
    """Options of complexity.py."""

    model: ModelOptions
    design: DesignOptions
    cluster: ClusterOptions
    downsampling: int = option(8, "pixels per latent cell and side; 1 for a model of pixels", low=1, high=MAX_SIZE)
    channels: int = option(4, "channels of the latent, or of the image for a model of pixels", low=1, high=MAX_SIZE)
    text_width: int = option(0, "width of a text encoder's tokens, for a model of texts in place of classes; 0 is none",
        low=0, high=MAX_SIZE)  # fmt: skip
    text_length: int = option(120, "tokens of a text", low=1, high=MAX_SIZE)
    batch_size: int = option(32, "images at once on one device, for the memory", low=1, high=10_000_000)
    precision: str = option("fp32", "precision of training, for the memory; bf16 is autocast's",
        choices=("fp32", "tf32", "bf16"))  # fmt: skip
    images: float = option(float(400_000 * 256), "number of images to train on, for the hours", low=1, high=1e15)
    peak_tflops: float | None = option(None, "peak of all devices together at this precision, in TFLOP/s (default: hours "
        "are not printed; --gpus takes that of H100s)", low=1e-6, high=1e12)  # fmt: skip
    utilization: float | None = option(None, "share of the peak that is reached (default: 1 for the hours, 0.4 for --gpus)",
        low=0.001, high=1)  # fmt: skip
    table: bool = option(False, "print the paper's models beside our counts; the exit status is 1 where one is out of "
        "tolerance")  # fmt: skip
    json: bool = option(False, "print JSON instead of a table")

    def check(self):
        for name, value in self.flat().items() if self.table else ():
            if name not in ("table", "json") and value != self.defaults()[name]:
                raise UserError(f"{flag(name)}: is for the cost of one model; leave it out, or leave out --table")


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

# ----------------------------------------------------------------------------------------------------------------------
# Reports


def cost(config):
    """The cost of one model, as a dict. Raises UserError for one that cannot be built or counted."""
    size, overrides = config.model.image_size, config.design.overrides()
    try:
        side = input_side(size, config.downsampling)
        classes = config.model.num_classes if not config.text_width else 0
        if config.text_width:
            overrides |= {"text_width": config.text_width, "text_length": config.text_length}
        model = build(config.model.model, input_size=side, in_channels=config.channels, num_classes=classes, **overrides)
        macs = forward_macs(model)
        memory = training_memory(model, config.batch_size, config.precision)
    except ValueError as error:
        raise UserError(f"--model {config.model.model} with these sizes: {error}") from None
    except (RuntimeError, MemoryError) as error:  # what PyTorch raises where a size needs more than 64 bits
        raise UserError(
            f"--model {config.model.model} with these sizes: too large to be counted ({reason(error)})"
        ) from None
    flops = 3 * 2 * macs  # the backward pass is two products for each one of the forward pass
    report = {
        "model": config.model.model,
        **overrides,
        "image_size": size,
        "num_classes": classes,
        "tokens": model.pos_embed.shape[1],
        "parameters": trainable(model),
        "forward_macs_per_image": macs,
        "training_flops_per_image": flops,
        "precision": config.precision,
        "batch_size": config.batch_size,
        "training_memory_bytes": memory,
    }
    if config.peak_tflops:
        reached = config.utilization or 1.0
        seconds = config.images * flops / (config.peak_tflops * 1e12 * reached)
        report |= {"images": config.images, "peak_tflops": config.peak_tflops, "utilization": reached}
        report["hours"] = seconds / 3600
    if config.cluster.gpus:
        report["many_gpus"] = on_many_gpus(config, model)
    return report


def on_many_gpus(config, model):
    """What `training.many_gpus` counts and estimates for --gpus, and for other numbers of GPUs, as a dict."""
    from training.throughput import PEAK_TFLOPS

    cluster, reached = config.cluster, config.utilization or 0.4
    peak = (config.peak_tflops or PEAK_TFLOPS["H100"][config.precision] * cluster.gpus) / cluster.gpus
    step = many_gpus.Step(model, config.batch_size, config.precision, cluster.shard)
    counts = sorted({*SCALING, cluster.gpus})
    rows = [step.estimate(cluster.network(), gpus, peak * 1e12 * reached) for gpus in counts]
    return {**cluster.flat(), "peak_tflops_of_each": peak, "utilization": reached, "estimates": rows}


def print_cost(report):
    changes = [f"{name.replace('_', ' ')} {report[name]}" for name in DesignOptions.defaults() if name in report]
    changes[0] = report["block"]
    condition = f"{report['num_classes']} classes"
    if "text_width" in report:
        condition = f"texts of {report['text_length']} tokens of width {report['text_width']}"
    size = f"{report['image_size']} px, {report['tokens']} tokens, {condition}"
    print(", ".join([report["model"], *changes, size]))
    rows = [
        ("trainable parameters", f"{report['parameters'] / 1e6:,.2f} M"),
        ("forward pass of an image", f"{report['forward_macs_per_image'] / 1e9:,.2f} GMACs"),
        ("training step of an image", f"{report['training_flops_per_image'] / 1e9:,.2f} GFLOP"),
    ]
    for part, nbytes in report["training_memory_bytes"].items():
        title = (
            f"  in all, {report['precision']}, batch {report['batch_size']}" if part == "total" else f"memory for {part}"
        )
        rows += [(title, f"{nbytes / 2**30:,.2f} GiB")]
    if "hours" in report:
        rows += [(f"training on {report['images']:,.0f} images", f"{report['hours']:,.1f} hours")]
    for title, value in rows:
        print(f"  {title:<36}{value:>18}")
    if "hours" in report:
        print(f"  at {report['utilization']:.0%} of {report['peak_tflops']:g} TFLOP/s")
    if "many_gpus" in report:
        print_many_gpus(report["many_gpus"], report["batch_size"])


def print_many_gpus(report, batch_size):
    asked = next(row for row in report["estimates"] if row["gpus"] == report["gpus"])
    kind = {None: "a copy on each (DDP)", "all": "divided among all", "node": "divided in each node"}[report["shard"]]
    print(f"on {report['gpus']} GPUs, {report['gpus_per_node']} in a node, {kind}, batch {batch_size} on each")
    for part, nbytes in asked["memory_bytes"].items():
        title = "  in all" if part == "total" else part
        print(f"  {title:<36}{nbytes / 2**30:>14,.2f} GiB")
    for part, nbytes in asked["exchanged_bytes"].items():
        print(f"  {part:<36}{nbytes / 1e9:>14,.2f} GB sent by each in a step")
    compute = f"{report['utilization']:.0%} of {report['peak_tflops_of_each']:g} TFLOP/s"
    network = f"{report['network_bandwidth']:g} GB/s and {report['network_latency']:g} us between nodes"
    print(f"estimate, at {compute}, {report['node_bandwidth']:g} GB/s in a node, {network}")
    titles = ("GPUs", 6), ("memory", 12), ("sent", 12), ("computing", 12), ("step", 10), ("images/s", 12), ("scaling", 9)
    print("".join(f"{title:>{width}}" for title, width in titles))
    for row in report["estimates"]:
        sent = sum(row["exchanged_bytes"].values())
        print(
            f"{row['gpus']:6}{row['memory_bytes']['total'] / 2**30:8,.1f} GiB{sent / 1e9:9,.2f} GB"
            f"{row['computing_seconds']:10.3f} s{row['step_seconds']:8.3f} s{row['images_per_second']:12,.0f}"
            f"{row['scaling']:9.1%}"
        )


def compare_with_paper():
    """Our counts of the paper's models: a list of dicts, `within_tolerance` among the keys."""
    from tqdm import tqdm

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


def main(argv=None):
    parser = Parser(CostConfig, __doc__)
    config = parser.parse(argv)
    with parser.report_errors():
        report = compare_with_paper() if config.table else cost(config)
        if config.json:
            print(json.dumps(report, indent=2))
        elif config.table:
            print_comparison(report)
        else:
            print_cost(report)
    if config.table and not all(row["within_tolerance"] for row in report):
        sys.exit(1)


if __name__ == "__main__":
    main()
