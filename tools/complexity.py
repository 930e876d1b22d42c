"""Count what a model costs: parameters, MACs, FLOPs and memory of training. The counts come from running the model on
PyTorch's meta device, which computes shapes and no values.

    python -m tools.complexity --model DiT-B/4 --block in-context --precision bf16
    python -m tools.complexity --image-size 64 --vae none    # a model of pixels

The paper's "Gflops" are GMACs: 1e9 multiply-accumulates of the matrix products, the attention and the patch convolution in
one forward pass of one image. A MAC is two FLOPs. studies/published.py compares our counts with the paper's.
"""

import json
from dataclasses import dataclass

from checkpoint.config import DEFAULT, MAX_SIZE, ModelOptions
from runtime.config import Config, option
from runtime.errors import UserError
from runtime.files import reason
from runtime.parser import Parser
from training.cost import build, count, rows

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
    json: bool = option(False, "print JSON instead of a table")


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
    sizes = {**sizes, **design, **config.model.clip_sizes(sizes["input_size"], patch_size)}
    try:
        model = build(name, **sizes, in_channels=config.channels or channels, **condition)
        counted = count(model, config.batch_size, config.precision, config.shard)
    except ValueError as error:
        raise UserError(f"--model {name} with these sizes", error) from None
    except (RuntimeError, MemoryError) as error:  # what PyTorch raises where a size needs more than 64 bits
        raise UserError(f"--model {name} with these sizes", f"too large to be counted ({reason(error)})") from None
    settings = {"batch_size": config.batch_size, "precision": config.precision, "shard": config.shard}
    report = {"model": name, **design, "image_size": size, "num_classes": condition["num_classes"], **settings}
    return report | texts | counted


def print_cost(report):
    changes = [f"{name.replace('_', ' ')} {report[name]}" for name in DESIGN if name in report]
    words = [report["model"], report["block"], *changes]
    words += [f"{report['frames']} frames"] if "frames" in report else []
    words += [f"{report['image_size']} px", f"{report['tokens']} tokens"]
    if "text_width" in report:
        words.append(f"texts of {report['text_length']} tokens of width {report['text_width']}")
    else:
        words.append(f"{report['num_classes']} classes")
    shard = f", divided among {report['shard']} devices" if report["shard"] > 1 else ""
    print(f"{', '.join(words)}; batch {report['batch_size']} on each device, {report['precision']}{shard}")
    for title, text in rows(report):
        print(f"  {title:<24}{text}")


def main(argv=None):
    parser = Parser(CostConfig, __doc__)
    config = parser.parse(argv)
    with parser.report_errors():
        report = cost(config)
        if config.json:
            print(json.dumps(report, indent=2))
        else:
            print_cost(report)


if __name__ == "__main__":
    main()
