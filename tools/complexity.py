"""Count what a model costs: parameters, MACs, memory and hours of training. The counts come from running the model on
PyTorch's meta device, which computes shapes and no values.

    python -m tools.complexity --model DiT-B/4 --block in-context --precision bf16 --images 1e8 --peak-tflops 989
    python -m tools.complexity --image-size 64 --vae none    # a model of pixels
    python -m tools.complexity --table                       # the paper's models beside our counts

The paper's "Gflops" are GMACs: 1e9 multiply-accumulates of the matrix products, the attention and the patch convolution in
one forward pass of one image. A MAC is two FLOPs. studies/scaling.py draws FID against them.
"""

import json
import sys
from collections import namedtuple
from dataclasses import dataclass

from checkpoint.config import DEFAULT, MAX_SIZE, ModelOptions
from runtime.config import Config, flag, option
from runtime.errors import UserError
from runtime.files import reason
from runtime.parser import Parser
from training.cost import build, count, forward_macs, rows, trainable

DESIGN = [name for name in ModelOptions.defaults() if name not in ("model", "image_size", "num_classes", "block")]


@dataclass(frozen=True)
class CostConfig(Config):
    """Options of complexity.py."""

    model: ModelOptions
    vae: str = option("ema", 'the autoencoder: "ema", "mse", a folder or a hub name; or "none" for a model of pixels')
    channels: int | None = option(None, "channels of the latent, or of the images for --vae none (default: the "
        "autoencoder's, 3 for images)", low=1, high=MAX_SIZE)  # fmt: skip
    text_width: int = option(0, "width of a text encoder's tokens, for a model of texts in place of classes; 0 is none",
        low=0, high=MAX_SIZE)  # fmt: skip
    text_length: int = option(120, "tokens of a text", low=1, high=MAX_SIZE)
    batch_size: int = option(32, "images at once on one device, for the memory", low=1, high=10_000_000)
    precision: str = option("fp32", "precision of training, for the memory; bf16 is autocast's",
        choices=("fp32", "tf32", "bf16"))  # fmt: skip
    shard: int = option(1, "number of devices among which train.py --shard divides weights, gradients, optimizer state and "
        "EMA, for the memory", low=1, high=1_000_000, metavar="DEVICES")  # fmt: skip
    images: float = option(float(400_000 * 256), "number of images to train on, for the hours", low=1, high=1e15)
    peak_tflops: float | None = option(None, "peak of all devices together at this precision, in TFLOP/s (default: hours "
        "are not printed)", low=1e-6, high=1e12)  # fmt: skip
    utilization: float = option(1.0, "share of the peak that is reached, for the hours", low=0.001, high=1)
    table: bool = option(False, "print the paper's models beside our counts; the exit status is 1 where one is out of "
        "tolerance")  # fmt: skip
    json: bool = option(False, "print JSON instead of a table")

    def check(self):
        for name, value in self.flat().items() if self.table else ():
            if name not in ("table", "json") and value != self.defaults()[name]:
                raise UserError(f"{flag(name)}: is for the cost of one model; leave it out, or leave out --table")


# Models of the paper. gmacs: its "Gflops". parameters: trainable, in millions. fid: FID-50K after 400K steps, without
# guidance, where the paper gives it
Published = namedtuple("Published", "model block image_size gmacs parameters fid")

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


def cost(config):
    """The cost of one model, as a dict. Raises UserError for one that cannot be built or counted."""
    from data.autoencoder import load_space, model_sizes  # here and below: PyTorch takes seconds to import

    name, size, num_classes = config.model.model or DEFAULT, config.model.image_size, config.model.num_classes
    factor, channels = 8, 4  # of the released autoencoders, which need not be here
    if config.vae not in ("ema", "mse"):
        space = load_space(config.vae)
        factor, channels = space.factor, space.channels
    condition, texts = {"num_classes": 1000 if num_classes is None else num_classes}, {}
    if config.text_width:
        from data.condition import Texts

        condition = Texts(config.text_width, config.text_length).model_arguments()
        texts = {"text_width": config.text_width, "text_length": config.text_length}
    design = {"block": "adaln-zero", **config.model.overrides()}
    patch_size = config.model.patch_size or int(name.partition("/")[2])
    sizes = model_sizes(size, config.model.aspect_buckets, factor, patch_size)
    try:
        model = build(name, **sizes, in_channels=config.channels or channels, **condition, **design)
        counted = count(model, config.batch_size, config.precision, config.shard)
    except ValueError as error:
        raise UserError(f"--model {name} with these sizes", error) from None
    except (RuntimeError, MemoryError) as error:  # what PyTorch raises where a size needs more than 64 bits
        raise UserError(f"--model {name} with these sizes", f"too large to be counted ({reason(error)})") from None
    settings = {"batch_size": config.batch_size, "precision": config.precision, "shard": config.shard}
    report = {"model": name, **design, "image_size": size, "num_classes": condition["num_classes"], **settings}
    report |= texts | counted
    if config.peak_tflops:
        report |= {name: getattr(config, name) for name in ("images", "peak_tflops", "utilization")}
        flops_per_second = config.peak_tflops * 1e12 * config.utilization
        report["hours"] = config.images * counted["training_flops_per_image"] / flops_per_second / 3600
    return report


def print_cost(report):
    changes = [f"{name.replace('_', ' ')} {report[name]}" for name in DESIGN if name in report]
    words = [report["model"], report["block"], *changes]
    words += [f"{report['image_size']} px", f"{report['tokens']} tokens"]
    if "text_width" in report:
        words.append(f"texts of {report['text_length']} tokens of width {report['text_width']}")
    else:
        words.append(f"{report['num_classes']} classes")
    shard = f", divided among {report['shard']} devices" if report["shard"] > 1 else ""
    print(f"{', '.join(words)}; batch {report['batch_size']} on each device, {report['precision']}{shard}")
    lines = rows(report)
    if "hours" in report:
        speed = f"{report['images']:,.0f} images, at {report['utilization']:.0%} of {report['peak_tflops']:g} TFLOP/s"
        lines.append(("whole run", f"{report['hours']:,.1f} hours for {speed}"))
    for title, text in lines:
        print(f"  {title:<24}{text}")


def compare_with_paper():
    """Our counts of the paper's models: a list of dicts, `within_tolerance` among the keys."""
    from tqdm import tqdm

    compared = []
    for paper in tqdm(PUBLISHED, desc="counting", unit="model", leave=False):
        model = build(paper.model, block=paper.block, input_size=paper.image_size // 8)
        gmacs, parameters = forward_macs(model) / 1e9, trainable(model)
        agrees = abs(gmacs - paper.gmacs) <= TOLERANCE[paper.image_size] and round(parameters / 1e6) == paper.parameters
        ours = {"counted_gmacs": gmacs, "counted_parameters": parameters, "within_tolerance": agrees}
        compared.append(paper._asdict() | ours)
    return compared


def print_comparison(compared):
    print(f"{'':<31}{'GMACs (the paper: Gflops)':>29}{'parameters (M)':>24}")
    print(f"{'model':<10}{'block':<17}{'px':>4}{'paper':>11}{'counted':>9}{'diff.':>9}{'paper':>12}{'counted':>12}")
    for row in compared:
        gmacs, parameters = row["counted_gmacs"], row["counted_parameters"] / 1e6
        print(
            f"{row['model']:<10}{row['block']:<17}{row['image_size']:>4}{row['gmacs']:>11.2f}{gmacs:>9.2f}"
            f"{gmacs - row['gmacs']:>+9.2f}{row['parameters']:>12}{parameters:>12.2f}"
            f"{'' if row['within_tolerance'] else '  OUT OF TOLERANCE'}"
        )


def main(argv=None):
    parser = Parser(CostConfig, __doc__)
    config = parser.parse(argv)
    with parser.report_errors():
        report = compare_with_paper() if config.table else cost(config)
        if config.json:
            print(json.dumps(report, indent=2))
        else:
            (print_comparison if config.table else print_cost)(report)
    if config.table and not all(row["within_tolerance"] for row in report):
        sys.exit(1)


if __name__ == "__main__":
    main()
