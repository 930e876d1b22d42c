"""Convert a model's weights: to .safetensors, to a plain .pt, or to a folder for diffusers' DiTPipeline.

    python -m tools.convert results/000-DiT-XL-2/checkpoints/0400000.pt my-dit.safetensors
    python -m tools.convert my-dit.safetensors my-dit              # a folder: model_index.json, transformer/, vae/, ...
    python -m tools.convert facebook/DiT-XL-2-256 DiT-XL-2-256x256.pt

The weights are the averaged ones where there are any, and every conversion is exact but that of --dtype.
docs/interchange.md tells what each form holds, and how the folder is used with diffusers."""

import runtime  # noqa: F401 -- first: from here on Ctrl-C prints a line  # isort: skip
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from checkpoint.config import MAX_SIZE
from runtime.config import Config, flag, option
from runtime.errors import RunError, UserError
from runtime.parser import Parser
from sampling.config import RECORDED, SampleConfig


@dataclass(frozen=True)
class ConvertConfig(Config):
    """Options of convert.py."""

    source: str = option(help="a .pt or .safetensors file, a folder in diffusers' format, or the name of such a model on "
        "the Hugging Face hub", positional=True)  # fmt: skip
    target: str = option(help="what to write: a .safetensors or .pt file; any other name is a folder in diffusers' format",
        positional=True)  # fmt: skip
    overwrite: bool = option(False, "replace TARGET if it exists")
    vae: str | None = option(None, 'autoencoder of the model: "ema" or "mse" of the Stable Diffusion VAE, a folder or hub '
        'name of an AutoencoderKL; "none" leaves it out of the folder (default: the one that SOURCE records; for a model '
        "of 4 channels without a record, ema)")  # fmt: skip
    average: str | None = option(None, "the weights of SOURCE to take: an average by its decay, such as 0.999, or model "
        "for the trained ones (default: the average of --ema-decay)")  # fmt: skip
    dtype: str | None = option(None, "type of the numbers in a file, rounded to it; pos_embed, which is not trained, stays "
        "as it is (default: SOURCE's)", choices=("float32", "bfloat16", "float16"))  # fmt: skip
    drawing: str | None = option(None, "options that sample.py shall take by default for a .safetensors file, in quotes "
        "(default: SOURCE's, if any)", metavar="'--OPTION VALUE ...'")  # fmt: skip
    num_heads: int | None = option(None, "number of attention heads, for weights without a record of it (default: "
        "SOURCE's)", low=1, high=MAX_SIZE)  # fmt: skip

    def check(self):
        if Path(self.target).suffix in (".bin", ".ckpt", ".pth"):
            raise UserError(f"TARGET {self.target}: name a .safetensors file, a .pt file or a folder")
        for name, fits in (("drawing", (".safetensors",)), ("dtype", (".safetensors", ".pt"))):
            if getattr(self, name) and Path(self.target).suffix not in fits:
                raise UserError(f"--{name}", f"does not go with TARGET {self.target}", f"name a {fits[0]} file")


def main(argv=None):
    with Parser(ConvertConfig, __doc__).options(argv) as config:
        check_target(config)
        convert(config, config.drawing and read_drawing(config.drawing))


def check_target(config):
    """Raises UserError where the target may not be written."""
    target, where = Path(config.target), f"TARGET {config.target}"
    if not os.access(target.absolute().parent, os.W_OK):
        raise UserError(where, "its folder does not exist or cannot be written to", "name another place")
    is_file = target.suffix in (".safetensors", ".pt")
    exists = os.path.lexists(target)
    if exists and not os.path.isfile(target if is_file else target / "model_index.json"):
        # a folder of photos, say, is not deleted for a mistyped name
        kind = "a file" if is_file else "a folder in diffusers' format"
        raise UserError(where, f"exists and is not {kind}", "name another place")
    if exists and not config.overwrite:
        raise UserError(where, "exists", "pass --overwrite to replace it")


def read_drawing(words):
    """{name: value} of the options of --drawing that differ from sample.py's defaults. Raises UserError."""
    values, defaults = Parser(SampleConfig, "").parse(shlex.split(words)).flat(), SampleConfig().flat()
    found = {name: value for name, value in values.items() if value != defaults[name]}
    if others := [flag(name) for name in found if name not in RECORDED]:
        raise UserError(f"--drawing {words}", f"{others[0]} cannot be recorded", "leave it out")
    return found


def convert(config, drawing=None):
    """Read the source, check it, and write the target atomically. drawing: to record in place of the source's."""
    import torch  # here and below: takes seconds to import
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from checkpoint import diffusers_folder, metadata
    from checkpoint.opened import Checkpoint
    from runtime.files import reason, replace_file

    checkpoint, target = Checkpoint.open(config.source, config.num_heads, average=config.average), Path(config.target)
    checkpoint.check_weights()
    lost = diffusers_folder.newer_options(checkpoint)
    if target.suffix == ".pt" and lost:
        raise UserError(f"TARGET {target}: a .pt file of weights cannot record {lost}; write a .safetensors file")
    record = metadata.of(checkpoint, vae=None if config.vae == "none" else config.vae)
    record |= {"drawing": drawing or record["drawing"]}
    weights = {name: tensor.contiguous() for name, tensor in checkpoint.weights.items()}
    if config.dtype:
        dtype = getattr(torch, config.dtype)
        weights |= {name: tensor.to(dtype) for name, tensor in weights.items() if name != "pos_embed"}
    try:
        if target.suffix == ".pt":
            replace_file(target, lambda file: torch.save(weights, file))
        elif target.suffix == ".safetensors":
            replace_file(target, lambda file: save_file(weights, file.name, metadata.to_text(record, weights)))
        else:
            diffusers_folder.write(target, checkpoint, record, load_autoencoder(config, checkpoint))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise RunError(f"TARGET {target}: cannot be written ({reason(error)}); what was there is untouched") from None
    print(f"{checkpoint.describe()}, {len(weights)} tensors, in {target}")


def load_autoencoder(config, checkpoint):
    """diffusers' AutoencoderKL for the folder, or None. Raises UserError."""
    from data.autoencoder import load_space

    model = checkpoint.model_config
    vae = config.vae or checkpoint.vae or ("ema" if model["in_channels"] == 4 else "none")
    if vae == "none":
        return None
    try:
        space = load_space(vae).to("cpu")
    except UserError as error:
        raise UserError(f"{error}, or --vae none to leave it out") from None
    if space.channels != model["in_channels"]:
        raise UserError(f"--vae {vae}: {space.channels} channels, {config.source} has {model['in_channels']}")
    if space.kind != "AutoencoderKL" or not isinstance(space.scaling, float):
        problem = f"is a {space.kind}, whose latents diffusers' DiTPipeline does not normalise as they were"
        raise UserError(f"--vae {vae}", problem, "pass --vae none to leave it out")
    return space.vae


if __name__ == "__main__":
    main()
