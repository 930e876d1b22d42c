"""From a checkpoint to a decoded batch, for every command that draws images."""

import argparse

import torch

import checkpoint
import diffusion
import download
import guidance
import latents
import options
import seeds
from errors import UserError
from models import DiT


def add_options(parser, vae, cfg_scale):
    options.add_model_options(parser, vae)
    add = parser.add_argument_group("sampling").add_argument
    add("--ckpt", help="a checkpoint of train.py or of the original release, or weights as .safetensors (default: the "
        "released DiT-XL/2 for the image size, downloaded when missing); what it records need not be repeated")  # fmt: skip
    add("--cfg-scale", type=options.number(low=0), default=cfg_scale, help="guidance weight; 1 turns guidance off")
    add("--num-sampling-steps", type=options.number(int, low=1, high=1000), default=250, help="DDPM steps")
    add("--tf32", action=argparse.BooleanOptionalAction, default=True, help="TF32 matrix products on GPUs")
    options.add_device_option(parser)


def check(args):
    """What can be refused before a model is built. Raises UserError."""
    if args.ckpt is None:
        if args.model != "DiT-XL/2" or args.image_size not in (256, 512) or args.num_classes != 1000:
            raise UserError(
                "without --ckpt only the released models can be drawn from: --model DiT-XL/2, --image-size 256 or 512, "
                "--num-classes 1000; name your own with --ckpt"
            )
        return
    config = checkpoint.model_config(args.state, args.ckpt)
    if args.vae == "none" and config["in_channels"] not in (1, 3):
        raise UserError(
            f"--vae none: {args.ckpt} has {config['in_channels']} channels, it works on latents; name its autoencoder"
        )
    if args.cfg_scale != 1 and config["class_dropout_prob"] == 0 and config["num_classes"]:
        raise UserError(f"--cfg-scale {args.cfg_scale}: {args.ckpt} was trained without null labels; pass --cfg-scale 1")


def class_names(args):
    """Names of the classes, by number: the checkpoint's own, ImageNet's for 1000 classes without such a record, or {}."""
    recorded = checkpoint.options(args.state).get("class_names") if args.state else None
    if recorded is None and args.num_classes == 1000:
        from torchvision.models import ResNet50_Weights  # its metadata alone; takes a second to import

        recorded = ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    return dict(enumerate(recorded or []))


def parse_labels(words, args):
    """Class numbers from numbers or names. Raises UserError with the way out for what is neither."""
    names, labels = class_names(args), []
    highest = max(args.num_classes - 1, 0)
    for word in words:
        if word.lstrip("-").isdecimal():
            if not 0 <= int(word) <= highest:
                raise UserError(f"--labels {word}: out of range, the model's classes are 0 to {highest}")
            labels.append(int(word))
            continue
        found = [number for number, name in names.items() if name.lower() == word.lower() and number <= highest]
        if len(found) != 1:
            near = [f"{n} ({name})" for n, name in names.items() if word.lower() in name.lower()][:5]
            hint = f"; did you mean {', '.join(near)}?" if near else "; give its number"
            raise UserError(f"--labels {word}: {'several classes are' if found else 'no class is'} called that{hint}")
        labels += found
    return labels


def load_model(args):
    """(model, space): the weights that --ckpt names, or the released ones, in eval mode on the CPU, and the space that its
    x_0 lives in, not yet placed. args are checked against the weights. Raises UserError."""
    state = args.state
    if state is None:
        state = download.find_model(download.released_checkpoint(args.image_size))
    config = checkpoint.model_config(state, args.ckpt)
    space = latents.load(args.vae, config["in_channels"])
    if (space.channels, space.factor * config["input_size"]) != (config["in_channels"], args.image_size):
        raise UserError(
            f"--vae {args.vae}: {space.channels} channels, {args.image_size // space.factor} cells a side at --image-size "
            f"{args.image_size}; {args.ckpt} has {config['in_channels']} and {config['input_size']}"
        )
    model = DiT(**config)
    try:
        model.load_state_dict(checkpoint.weights(state))
    except RuntimeError as error:
        raise UserError(f"--ckpt {args.ckpt}: its weights do not fit ({str(error).split(chr(10))[1].strip()})") from None
    return model.eval().requires_grad_(False), space


def image_label(seed, index, num_classes):
    """Image `index`'s class, drawn with its own random numbers."""
    return int(seeds.generator(seed, seeds.SAMPLE_LABEL, index).integers(max(num_classes, 1)))


def image_noise(seed, indices, num_steps, shape):
    """All the noise of images `indices`, (num_steps + 1, N, *shape), on the CPU: entry 0 is x_T, entry 1 + i the noise of
    step i. An image's noise depends on the seed and its index alone."""
    rows = [
        torch.from_numpy(
            seeds.generator(seed, seeds.SAMPLE_NOISE, index).standard_normal((num_steps + 1, *shape), "float32")
        )
        for index in indices
    ]
    return torch.stack(rows, dim=1)


def to_uint8(images):
    """(N, C, H, W) in [-1, 1] -> (N, H, W, 3) uint8, grey repeated: clamp(127.5 x + 128, 0, 255), truncated."""
    pixels = torch.clamp(127.5 * images + 128, 0, 255).to(torch.uint8)
    return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()


def use_tf32(device, tf32):
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32


def draw(model, space, y, noise, step_noise, cfg_scale, num_steps, progress=False):
    """Draw images of classes y: (N,) from noise x_T: (N, C, H, W), with `num_steps` DDPM steps, each of which adds
    step_noise(x, i). Returns decoded images, (N, 3 or C, H, W) in about [-1, 1]."""
    denoiser = guidance.guided_denoiser(model, y, model.null_class, cfg_scale)
    steps = diffusion.sample("ddpm", denoiser, noise, num_steps, step_noise=step_noise, progress=progress)
    return space.decode(diffusion.samplers.last(steps))
