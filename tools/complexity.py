"""Count what a model costs: parameters, MACs, FLOPs and memory of training. The counts come from running the model on
PyTorch's meta device, which computes shapes and no values.

    python -m tools.complexity --model DiT-B/4 --block in-context --precision bf16
    python -m tools.complexity --image-size 64 --vae none    # a model of pixels

The paper's "Gflops" are GMACs: 1e9 multiply-accumulates of the matrix products, the attention and the patch convolution in
one forward pass of one image. A MAC is two FLOPs. studies/published.py compares our counts with the paper's."""

import runtime  # noqa: F401 -- first: from here on Ctrl-C prints a line  # isort: skip
import json
from dataclasses import dataclass, replace

from checkpoint.config import DEFAULT, MAX_SIZE, ModelOptions
from runtime.config import Config, option
from runtime.errors import UserError
from runtime.files import reason
from runtime.parser import Parser

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
    import torch  # here and below: what takes seconds to import

    from data.autoencoder import LatentSpace, load_space
    from data.condition import Texts
    from training.config import RecipeConfig
    from training.cost import count
    from training.setup import build_model

    options, name, condition, texts = config.model, config.model.model or DEFAULT, None, {}
    space = LatentSpace(4, 8, 1.0, 0.0)  # that of the released autoencoders, which need not be here
    space = space if config.vae in ("ema", "mse") else load_space(config.vae)
    space = LatentSpace(config.channels or space.channels, space.factor, 1.0, 0.0)
    if config.text_width:
        texts = {"text_width": config.text_width, "text_length": config.text_length}
        condition, options = Texts(config.text_width, config.text_length), replace(options, num_classes=0)
    try:
        with torch.device("meta"):
            model = build_model(options, RecipeConfig(), space, condition)
        counted = count(model, config.batch_size, config.precision, config.shard)
    except (RuntimeError, MemoryError) as error:  # what PyTorch raises where a size needs more than 64 bits
        raise UserError(f"--model {name} with these sizes", f"too large to be counted ({reason(error)})") from None
    settings = {"batch_size": config.batch_size, "precision": config.precision, "shard": config.shard}
    design = {"model": name, "block": model.block, **options.overrides()}
    return design | {"image_size": options.image_size, "num_classes": model.num_classes} | settings | texts | counted


def print_cost(report):
    from training.cost import rows

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
    with Parser(CostConfig, __doc__).options(argv) as config:
        report = cost(config)
        if config.json:
            print(json.dumps(report, indent=2))
        else:
            print_cost(report)


if __name__ == "__main__":
    main()
