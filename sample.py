"""Draw images of chosen classes from a DiT.

    python sample.py --image-size 512 --seed 1
    python sample.py --ckpt results/000-DiT-XL-2/checkpoints/0400000.pt --labels "golden retriever" 417 --output dog.png

With the same weights and seed these are the original release's images, on the CPU; for sets of images see sample_ddp.py.
"""

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import checkpoint
import distributed
import options
import sampling
from errors import UserError

LABELS = ["207", "360", "387", "974", "88", "979", "417", "279"]


def parse_args(argv=None):
    parser = options.Parser(__doc__.split("\n")[0])
    sampling.add_options(parser, vae="mse", cfg_scale=4.0)
    parser.add_argument("--seed", type=options.count, default=0, help="seed of weights, noise and every step")
    parser.add_argument("--labels", nargs="+", metavar="CLASS",
                        help=f"numbers or names (default: {' '.join(LABELS)}, or a model's first eight)")  # fmt: skip
    parser.add_argument("--samples-per-label", type=options.positive, default=1, help="images of each label, side by side")
    parser.add_argument("--output", default="sample.png", help="the grid's file")
    parser.add_argument("--columns", type=options.positive, default=4, help="images a row")
    parser.add_argument("--enlarge", type=options.positive, default=1, help="repeat each pixel so many times")
    parser.add_argument("--captions", action="store_true", help="write its class under each image")
    return parser, options.parse_with_checkpoint(parser, argv)


def main(argv=None):
    parser, args = parse_args(argv)
    with parser.reporting():
        sampling.check(args)
        if args.labels is None:
            default = [str(label) for label in range(min(args.num_classes, len(LABELS)))] or ["0"]
            args.labels = LABELS if args.num_classes == 1000 else default
        labels = sampling.parse_labels(args.labels, args)
        if Path(args.output).suffix.lower() not in Image.registered_extensions():
            raise UserError(f"--output {args.output}: name an image file, such as sample.png")
        if not Path(args.output).absolute().parent.is_dir():
            raise UserError(f"--output {args.output}: its folder does not exist")
        labels = [label for label in labels for _ in range(args.samples_per_label)]
        device = distributed.setup(args.device).device
        sampling.use_tf32(device, args.tf32)
        images = draw(args, labels, device)
    names = sampling.class_names(args)
    captions = [names.get(label, str(label)) for label in labels] if args.captions else None
    save_grid(args.output, sampling.to_uint8(images), args.columns, args.enlarge, captions)
    print(f"{len(labels)} images in {args.output}")


def draw(args, labels, device):
    """The original's random stream: weights, then z, then at every step the noise of a doubled batch, whose second half,
    that of the unconditional images, is thrown away. Computing that half is not needed to keep the stream."""
    torch.manual_seed(args.seed)
    model, space = sampling.load_model(args)
    space.place(device)
    model.to(device)
    shape = (len(labels), model.in_channels, model.input_size, model.input_size)
    z = torch.randn(*shape, device=device)
    y = torch.tensor(labels, device=device)

    def step_noise(x, i):
        return torch.randn(2 * len(x), *x.shape[1:], device=device)[: len(x)]

    with torch.no_grad():
        return sampling.draw(model, space, y, z, step_noise, args.cfg_scale, args.num_sampling_steps, progress=True)


def save_grid(path, images, columns, enlarge=1, captions=None):
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
    checkpoint.replace_file(
        path, lambda file: grid.save(file, format=Image.registered_extensions()[Path(path).suffix.lower()])
    )


def _fit(text, width, pen, font):
    while len(text) > 1 and pen.textlength(text, font) > width:
        text = text[:-2] + "…"
    return text


if __name__ == "__main__":
    main()
