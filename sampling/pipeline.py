"""From a checkpoint to a decoded batch, for every command that draws images."""

import argparse

import torch
from torch import nn

import diffusion
import download
from checkpoint import files as checkpoint
from cli import options
from data import autoencoder as latents
from diffusion import guidance
from models import DiT
from runtime import devices, seeds
from runtime.errors import UserError


def add_options(parser, vae, cfg_scale):
    options.add_model_options(parser, vae)
    add = parser.add_argument_group("sampling").add_argument
    add("--ckpt", help="a checkpoint of train.py or of the original release, or weights as .safetensors (default: the "
        "released DiT-XL/2 for the image size, downloaded when missing); what it records need not be repeated")  # fmt: skip
    add("--cfg-scale", type=options.number(low=0), default=cfg_scale, help="guidance weight; 1 turns guidance off")
    add("--num-sampling-steps", type=options.number(int, low=1, high=1000), default=250, help="steps in time")
    add("--sampler", choices=diffusion.samplers.SAMPLERS, default="ddpm", help="ddpm is the paper's; the last four need "
        "10 to 30 steps, of which heun evaluates the model twice in each")  # fmt: skip
    add("--eta", type=options.number(low=0, high=1), default=0.0, help="of ddim: noise a step, 0 none to 1 about ddpm's")
    add("--spacing", choices=diffusion.samplers.SPACINGS, help="of timesteps, for the last four (default: linspace)")
    add("--tf32", action=argparse.BooleanOptionalAction, default=True, help="TF32 matrix products on GPUs")
    add("--precision", choices=["fp32", "tf32", "bf16"], help="of the model's matrix products (default: what --tf32 says)")
    options.add_compile_option(parser)
    options.add_device_option(parser)

    add = parser.add_argument_group("guidance").add_argument
    add("--cfg-channels", choices=["3", "all"], help="guided channels (default: 3 of four, as published; all of others)")
    add("--guidance-interval", type=options.number(low=0, high=1), nargs=2, metavar=("LO", "HI"),
        help="guide only where LO <= t / 1000 <= HI, and save the second pass elsewhere (default: everywhere)")  # fmt: skip
    add(
        "--guidance-schedule", choices=list(guidance.SCHEDULES), default="constant", help="how the scale grows to the image"
    )
    add("--guidance-rescale", type=options.number(low=0, high=1), default=0.0, help="phi of Lin et al. 2024")
    add("--guide-ckpt", help="guide away from this weaker model instead of the unconditional one (Karras et al. 2024)")


def check(args):
    """What can be refused before a model is built. Raises UserError."""
    check_arithmetic(args)
    with options.naming("--guidance-interval"):
        guidance.check_interval(args.guidance_interval)
    options.check_compile(args.compile, devices.pick_device(args.device))
    if args.ckpt is None:
        if args.model != "DiT-XL/2" or args.image_size not in (256, 512) or args.num_classes != 1000:
            raise UserError(
                "without --ckpt only the released models can be drawn from: --model DiT-XL/2, --image-size 256 or 512, "
                "--num-classes 1000; name your own with --ckpt"
            )
        config = {"in_channels": 4, "input_size": args.image_size // 8, "num_classes": 1000, "learn_sigma": True}
    else:
        config = checkpoint.model_config(args.state, args.ckpt)
    if args.vae == "none" and config["in_channels"] not in (1, 3):
        raise UserError(
            f"--vae none: {args.ckpt} has {config['in_channels']} channels, it works on latents; name its autoencoder"
        )
    if args.cfg_channels == "3" and config["in_channels"] < 3:
        raise UserError(f"--cfg-channels 3: the model has {config['in_channels']}; leave the option out")
    if args.guide_ckpt:
        if args.cfg_scale == 1:
            raise UserError("--guide-ckpt: does nothing at --cfg-scale 1; raise that")
        guide = checkpoint.model_config(checkpoint.load(args.guide_ckpt), args.guide_ckpt)
        for name in ("in_channels", "input_size", "num_classes", "learn_sigma"):
            if guide[name] != config[name]:
                raise UserError(f"--guide-ckpt {args.guide_ckpt}: {name} {guide[name]}, but {args.ckpt} has {config[name]}")
    elif args.ckpt and args.cfg_scale != 1 and config["class_dropout_prob"] == 0 and config["num_classes"]:
        raise UserError(f"--cfg-scale {args.cfg_scale}: {args.ckpt} was trained without null labels; pass --cfg-scale 1")


def check_arithmetic(args):
    """What does not depend on a model. Raises UserError."""
    if args.precision == "tf32" and not args.tf32:
        raise UserError("--precision tf32: contradicts --no-tf32; leave one of them out")
    with options.naming(f"--sampler {args.sampler}"):
        diffusion.check_sampler(args.sampler, args.num_sampling_steps, args.eta, args.spacing)


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
    return build(state, config, args.ckpt), space


def build(state, config, path):
    model = DiT(**config)
    try:
        model.load_state_dict(checkpoint.weights(state))
    except RuntimeError as error:
        raise UserError(f"{path}: its weights do not fit ({str(error).split(chr(10))[1].strip()})") from None
    return model.eval().requires_grad_(False)


def load_guide(args):
    """The weaker model that --guide-ckpt names, or None."""
    if not args.guide_ckpt:
        return None
    state = checkpoint.load(args.guide_ckpt)
    return build(state, checkpoint.model_config(state, args.guide_ckpt), args.guide_ckpt)


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


def place(args, model, device):
    """A model (or None) on its device, in the precision and compiled as args ask."""
    use_tf32(device, args.tf32 and args.precision != "fp32")
    if model is None:
        return None
    if args.precision == "bf16":  # what autocast would do to these weights in every step
        for linear in (module for module in model.modules() if isinstance(module, nn.Linear)):
            linear.bfloat16()
    if args.compile:
        model.compile_blocks(args.compile)
    return model.to(device)


def denoiser(args, model, y, guide=None):
    """The model under labels y: (N,) int64 (or weights of classes), guided as args say, for `diffusion.sample`."""
    channels = int(args.cfg_channels) if args.cfg_channels == "3" else args.cfg_channels
    denoise = guidance.guided_denoiser(
        model, y, model.null_class, args.cfg_scale, channels, args.guidance_interval, args.guidance_schedule,
        args.guidance_rescale, guide,
    )  # fmt: skip
    return torch.autocast(y.device.type, torch.bfloat16, enabled=args.precision == "bf16")(denoise)


def steps(args, denoise, noise, step_noise, **options):
    """The sampler that args name, from x_T: (N, C, H, W): an iterator, see `diffusion.sample`, whose options these are."""
    return diffusion.sample(
        args.sampler, denoise, noise, args.num_sampling_steps,
        eta=args.eta, spacing=args.spacing, step_noise=step_noise, **options,
    )  # fmt: skip


def is_deterministic(args):
    return args.sampler != "ddpm" and args.eta == 0


def draw(model, space, y, noise, cfg_scale, num_steps):
    """The paper's sampling: DDPM steps from noise as of `image_noise`, (num_steps + 1, N, C, H, W), to decoded images."""
    denoise = guidance.guided_denoiser(model, y, model.null_class, cfg_scale)
    out = diffusion.sample("ddpm", denoise, noise[0], num_steps, step_noise=lambda x, i: noise[1 + i])
    return space.decode(diffusion.samplers.last(out))
