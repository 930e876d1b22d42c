"""Draw images of chosen classes from a DiT.

    python sample.py --image-size 512 --seed 1
    python sample.py --ckpt results/000-DiT-XL-2/checkpoints/0400000.pt --labels "golden retriever" 417 --output dog.png
    python sample.py --sampler dpm-solver++ --num-sampling-steps 20 --interpolate classes --labels 207 360
    python sample.py --init-image photo.jpg --strength 0.6 --labels 88

With the same weights and seed these are the original release's images, on the CPU; for sets of images see sample_ddp.py.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import diffusion
from cli import options
from data import images as data
from diffusion import editing, guidance, samplers
from runtime import devices, distributed, files
from runtime.errors import UserError
from sampling import pipeline as sampling

LABELS = ["207", "360", "387", "974", "88", "979", "417", "279"]


def parse_args(argv=None):
    parser = options.Parser(__doc__.split("\n")[0])
    sampling.add_options(parser, vae="mse", cfg_scale=4.0)
    add = parser.add_argument_group("images").add_argument
    add("--seed", type=options.count, default=0, help="seed of weights, noise and every step")
    add("--labels", nargs="+", metavar="CLASS",
        help=f"numbers or names (default: {' '.join(LABELS)}, or a model's first eight)")  # fmt: skip
    add("--samples-per-label", type=options.positive, default=1, help="images of each label, side by side")
    add("--output", default="sample.png", help="the grid's file")
    add("--columns", type=options.positive, default=4, help="images a row")
    add("--enlarge", type=options.positive, default=1, help="repeat each pixel so many times")
    add("--captions", action="store_true", help="write its class under each image")
    add("--save-trajectory", metavar="FILE", help="the predicted x_0 over the steps: .gif moves, else one row an image")

    add = parser.add_argument_group("image to image").add_argument
    add("--interpolate", choices=["seeds", "classes"],
        help="rows of --columns images, from a label's noise to --to-seed's, or from a class to the next")  # fmt: skip
    add("--to-seed", type=options.count, default=1, help="of --interpolate seeds")
    add("--init-image", metavar="FILE", help="start from this image, cropped like training images")
    add("--strength", type=options.number(above=0, high=1), default=0.75, help="share of the steps made from --init-image")
    add("--invert", action="store_true", help="start from the noise that DDIM inversion finds for --init-image, with "
        "--sampler ddim")  # fmt: skip
    add("--mask", metavar="FILE", help="redraw --init-image only where this picture is white; all steps are made")
    return parser, options.parse_with_checkpoint(parser, argv)


def check(args):
    """What the flags of this command alone can get wrong. Resolves args.labels. Raises UserError."""
    sampling.check(args)
    if args.labels is None:
        default = [str(label) for label in range(min(args.num_classes, len(LABELS)))] or ["0"]
        args.labels = LABELS if args.num_classes == 1000 else default
    args.labels = sampling.parse_labels(args.labels, args)
    for option, path in (("--output", args.output), ("--save-trajectory", args.save_trajectory)):
        if path and Path(path).suffix.lower() not in Image.registered_extensions():
            raise UserError(f"{option} {path}: name an image file, such as sample.png")
        if path and not Path(path).absolute().parent.is_dir():
            raise UserError(f"{option} {path}: its folder does not exist")
    for option, needs in (("mask", "init_image"), ("invert", "init_image")):
        if getattr(args, option) and not getattr(args, needs):
            raise UserError(f"--{option}: needs --init-image, the image to work on")
    if args.invert and (not sampling.is_deterministic(args) or args.sampler != "ddim" or args.mask):
        raise UserError("--invert: is the way back of --sampler ddim with --eta 0, and does not go with --mask")
    if args.init_image and args.interpolate:
        raise UserError("--interpolate: does not go with --init-image")
    if args.interpolate == "classes" and len(args.labels) < 2:
        raise UserError("--interpolate classes: needs two --labels or more")
    if args.interpolate and args.columns < 2:
        raise UserError(f"--columns {args.columns}: --interpolate needs two or more")
    if args.interpolate and args.samples_per_label > 1:
        raise UserError("--samples-per-label: does not go with --interpolate")


def main(argv=None):
    parser, args = parse_args(argv)
    with parser.reporting():
        check(args)
        picture = None
        if args.init_image:
            picture = data.center_crop_arr(data.open_image(args.init_image), args.image_size)
        mask = data.center_crop_arr(data.open_image(args.mask), args.image_size) if args.mask else None
        device = distributed.setup(args.device).device
        if args.precision == "bf16" and not devices.has_bf16(device):
            print(devices.NO_BF16, file=sys.stderr)
        images, captions = draw(args, device, picture, mask)
        save_grid(args.output, images, args.columns, args.enlarge, captions if args.captions else None)
    print(f"{len(images)} images in {args.output}")


def draw(args, device, picture=None, mask=None):
    """Returns images (N, H, W, 3) uint8 and a caption for each.

    The original's random stream: weights, then z, then at every step the noise of a doubled batch, whose second half, that
    of the unconditional images, is thrown away. Computing that half is not needed to keep the stream."""
    torch.manual_seed(args.seed)
    model, space = sampling.load_model(args)
    space.place(device)
    model, guide = sampling.place(args, model, device), sampling.place(args, sampling.load_guide(args), device)
    names = sampling.class_names(args)
    labels = [label for label in args.labels for _ in range(args.samples_per_label)]
    captions = [names.get(label, str(label)) for label in labels]
    z = torch.randn(len(labels), model.in_channels, model.input_size, model.input_size, device=device)
    y = torch.tensor(labels, device=device)
    if args.interpolate:
        z, y, captions = interpolate(args, model, z, y, captions)
    denoise = sampling.denoiser(args, model, y, guide)
    start = {"progress": True}
    if picture is not None:
        x_0 = encode(model, space, picture, device).expand_as(z)
        if mask is not None:
            cells = torch.nn.functional.max_pool2d(to_tensor(mask, device)[:, :1], space.factor)  # a cell with any white
            denoise = editing.inpainting_denoiser(denoise, diffusion.create_diffusion(""), x_0, (cells < 0).float())
        elif args.invert:
            steps = diffusion.create_diffusion(f"ddim{args.num_sampling_steps}")
            z = samplers.last(editing.ddim_inversion(steps, denoise, x_0, progress=True))
        else:
            start |= {"init": x_0, "strength": args.strength}

    def step_noise(x, i):
        frames = args.columns if args.interpolate else 1  # frames of a row share their noise, else they would jump
        rows = len(x) // frames
        return torch.randn(2 * rows, *x.shape[1:], device=device)[:rows].repeat_interleave(frames, dim=0)

    seen = []
    with torch.no_grad():
        for out in sampling.steps(args, denoise, z, step_noise, **start):
            if args.save_trajectory:
                seen.append(out["pred_xstart"].cpu())
        images = sampling.to_uint8(space.decode(out["sample"]))
        if args.save_trajectory:
            save_trajectory(args, space, seen, device)
    return images, captions


def interpolate(args, model, z, y, captions):
    """Rows of args.columns images: (z, y, captions) from each label's noise to that of --to-seed (spherically), or from
    each class to the next (linearly between their embeddings)."""
    weights = torch.linspace(0, 1, args.columns, device=z.device)
    if args.interpolate == "seeds":
        generator = torch.Generator(z.device).manual_seed(args.to_seed)
        other = torch.randn(z.shape, device=z.device, generator=generator)
        rows = [editing.slerp(z[i : i + 1], other[i : i + 1], weights.view(-1, 1, 1, 1)) for i in range(len(z))]
        return torch.cat(rows), y.repeat_interleave(args.columns), [c for c in captions for _ in weights]
    rows = [
        guidance.mix_classes(a.expand(args.columns), b.expand(args.columns), weights[:, None], model.num_classes)
        for a, b in zip(y, y[1:], strict=False)
    ]
    text = [f"{a} - {b} {w:.2f}" for a, b in zip(captions, captions[1:], strict=False) for w in weights.tolist()]
    return z[: len(rows)].repeat_interleave(args.columns, dim=0), torch.cat(rows), text


def to_tensor(picture, device):
    """A PIL image -> (1, 3, H, W) in [-1, 1]."""
    return data.to_model_range(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].to(device))


def encode(model, space, picture, device):
    image = to_tensor(picture, device)
    if model.in_channels == 1:  # a model of grey pixels
        image = image.mean(dim=1, keepdim=True)
    return space.encode(image)


def save_trajectory(args, space, seen, device):
    """The predicted x_0 of every step as a moving picture, or of ten steps as a grid with one row an image."""
    gif = Path(args.save_trajectory).suffix.lower() == ".gif"
    count = min(len(seen), 50 if gif else 10)
    kept = [seen[round(i)] for i in np.linspace(0, len(seen) - 1, count)]
    decoded = [sampling.to_uint8(space.decode(x_0.to(device))) for x_0 in kept]
    if gif:
        frames = [grid_of(images, args.columns, args.enlarge) for images in decoded]
        options = {"save_all": True, "append_images": frames[1:], "duration": [100] * (count - 1) + [1500], "loop": 0}
        files.replace_file(args.save_trajectory, lambda file: frames[0].save(file, format="GIF", **options))
    else:
        rows = np.stack(decoded, axis=1).reshape(-1, *decoded[0].shape[1:])
        save_grid(args.save_trajectory, rows, count, args.enlarge)


def save_grid(path, images, columns, enlarge=1, captions=None):
    grid = grid_of(images, columns, enlarge, captions)
    file_format = Image.registered_extensions()[Path(path).suffix.lower()]
    try:
        files.replace_file(path, lambda file: grid.save(file, format=file_format))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None


def grid_of(images, columns, enlarge=1, captions=None):
    """images: (N, H, W, 3) uint8. Enlarged without smoothing, two pixels apart, with a caption under each if asked."""
    side, gap, font = images.shape[1] * enlarge, 2, ImageFont.load_default(size=14)
    line = 20 if captions else 0
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    size = (columns * (side + gap) + gap, rows * (side + line + gap) + gap)
    grid = Image.new("RGB", size, "white" if captions else "black")
    pen = ImageDraw.Draw(grid)
    for i, pixels in enumerate(images):
        left, top = gap + i % columns * (side + gap), gap + i // columns * (side + line + gap)
        grid.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST), (left, top))
        if captions:
            pen.text(
                (left + side / 2, top + side + line / 2), _fit(captions[i], side, pen, font), "black", font, anchor="mm"
            )
    return grid


def _fit(text, width, pen, font):
    while len(text) > 1 and pen.textlength(text, font) > width:
        text = text[:-2] + "…"
    return text


if __name__ == "__main__":
    main()
