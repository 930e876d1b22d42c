"""Flags that several commands share, their checks and their error messages. A user's mistake gets one line and status 2."""

import argparse
import contextlib
import importlib.util
import math
import os
import shutil
import sys

import torch

from checkpoint import files as checkpoint
from models import BLOCKS, DiT_models
from runtime.errors import UserError


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to an option's help, unless there is none, or the help tells it in words."""

    def _get_help_string(self, action):  # what the base class itself overrides
        told = action.default is None or "(default" in (action.help or "")
        return action.help if told else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with defaults in its help; an error is one line, printed by rank 0 alone."""

    def __init__(self, description):
        # abbreviations would change their meaning with every new option
        super().__init__(description=description, formatter_class=Formatter, allow_abbrev=False)

    def error(self, message, status=UserError.status):
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(status)

    @contextlib.contextmanager
    def reporting(self):
        """What the user can mend, raised anywhere below, becomes the one line."""
        try:
            yield
        except UserError as error:
            self.error(error, error.status)


def number(kind=float, low=None, high=None, above=None):
    """An argparse type: a finite int or float in [low, high], or greater than `above`."""
    bounds = [f"{low} or more" if low is not None else "", f"{high} or less" if high is not None else ""]
    bounds += [f"more than {above}" if above is not None else ""]
    wanted = f"{'a whole number' if kind is int else 'a number'}, {' and '.join(filter(None, bounds))}".rstrip(", ")

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
        outside = (low is not None and value < low) or (high is not None and value > high)
        if not math.isfinite(value) or outside or (above is not None and value <= above):
            raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
        return value

    return parse


@contextlib.contextmanager
def naming(option):
    """A module's ValueError becomes the user's, with the option's name before it."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{option}: {error}") from None


positive = number(int, low=1)
count = number(int, low=0)


def add_model_options(parser, vae=None):
    """vae: the command's default autoencoder; None for a command that needs none."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", choices=list(DiT_models), default="DiT-XL/2", metavar="DiT-{S,B,L,XL}/{2,4,8}",
                       help="size and patch size")  # fmt: skip
    group.add_argument("--image-size", type=positive, default=256, help="side in pixels")
    group.add_argument("--num-classes", type=count, default=1000, help="number of classes; 0 is unconditional")
    if vae:
        group.add_argument(
            "--vae",
            default=vae,
            help='autoencoder: "ema" or "mse" of the Stable Diffusion VAE, a folder or hub name of an AutoencoderKL, or '
            '"none" for pixels',
        )


DESIGN = ("block", "hidden_size", "depth", "num_heads", "patch_size", "mlp_ratio")


def add_design_options(parser):
    """Points of the paper's design space beside the twelve models."""
    group = parser.add_argument_group("design")
    group.add_argument("--block", choices=list(BLOCKS), default="adaln-zero", help="how the condition enters the blocks")
    for name, kind, text in (
        ("hidden-size", positive, "width D"),
        ("depth", positive, "number of blocks"),
        ("num-heads", positive, "number of attention heads"),
        ("patch-size", positive, "side of a patch, in latent cells"),
        ("mlp-ratio", number(above=0), "width of the MLP's hidden layer, as a multiple of D"),
    ):
        group.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=f"{text} (default: the model's)")


def design(args):
    """The keyword arguments of DiT that `add_design_options` gave, on top of the named model's."""
    return {name: getattr(args, name) for name in DESIGN if hasattr(args, name)}


def add_device_option(parser):
    parser.add_argument("--device", choices=["cuda", "mps", "cpu"], help="where to compute (default: the best there is)")


def add_compile_option(parser):
    parser.add_argument("--compile", nargs="?", const="inductor", metavar="BACKEND", help="compile the model's blocks, one "
        "for all; BACKEND, of torch.compile, is inductor unless named (default: off)")  # fmt: skip


def check_compile(backend, device):
    """Raises UserError where torch.compile would fail at the first step, for want of a compiler or a known backend.
    backend: what --compile says, or None. device: "cuda", "mps" or "cpu"."""
    if backend in (None, "inductor"):
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        if backend and device == "cuda" and not importlib.util.find_spec("triton"):
            raise UserError("--compile: needs the package triton, which PyTorch's builds for CUDA bring; install it")
        if backend and device == "cuda" and not any(map(shutil.which, (os.environ.get("CC", "gcc"), "gcc", "clang"))):
            raise UserError("--compile: needs a C compiler, and there is neither gcc nor clang; install one")
        if backend and device == "cpu" and not shutil.which(compiler):
            raise UserError(
                f"--compile: needs a C++ compiler, and there is no {compiler}; install it, or name another in CXX"
            )
    elif backend not in (known := torch.compiler.list_backends(exclude_tags=())):
        raise UserError(f"--compile {backend}: not a backend of torch.compile; these are {', '.join(known)}")


def check_image_size(image_size, factor, patch_size):
    """Raises UserError where the autoencoder's downsampling and the patch size do not divide the image."""
    unit = factor * patch_size
    if image_size % unit:
        below = image_size // unit * unit
        fits = f"{below} and {below + unit} are the nearest that fit" if below else f"{unit} is the smallest that fits"
        raise UserError(
            f"--image-size {image_size}: not a multiple of {unit} (autoencoder {factor} times patch {patch_size}); {fits}"
        )


def parse_with_checkpoint(parser, argv=None):
    """Parse a sampler's command line. What --ckpt records (model, image size, classes, autoencoder) becomes the default of
    the flags, so that it need not be repeated; a flag that contradicts it is an error. Adds `args.state`, the checkpoint's
    dict, or None without --ckpt."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--ckpt")
    ckpt = early.parse_known_args(argv)[0].ckpt
    recorded, state = {}, None
    if ckpt is not None:
        try:
            state = checkpoint.load(ckpt)
            recorded = recorded_options(state, ckpt)
        except checkpoint.CheckpointError as error:
            parser.error(f"--ckpt {error}")
        parser.set_defaults(**recorded)
    args = parser.parse_args(argv)
    for name, value in recorded.items():
        given = getattr(args, name)
        # a path or hub name of the same autoencoder may differ between machines, so --vae may be given anew
        if given != value and name != "vae":
            parser.error(f"--{name.replace('_', '-')} {given}: {ckpt} holds {value}; leave the option out to use that")
    args.state = state
    return args


def recorded_options(state, path):
    config, recorded = checkpoint.model_config(state, path), checkpoint.options(state)
    name = checkpoint.describe(config)
    found = {
        "model": name if name in DiT_models else recorded.get("model", name),
        "num_classes": config["num_classes"],
        "image_size": recorded.get("image_size", 8 * config["input_size"]),
    }
    # the released "ema" and "mse" share one latent space and differ in the decoder, which is each command's own choice
    if recorded.get("vae", "ema") not in ("ema", "mse"):
        found["vae"] = recorded["vae"]
    return found
