"""How fast images are read, decoded, cropped and mirrored, through data.loader as train.py uses it.

OMP_NUM_THREADS=1 python benchmarks/images.py --num-workers 0 1 2
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.latents import folder_of, make_parser, report
from data import images as data

WIDTH, HEIGHT = 500, 375  # the most frequent size in ImageNet


def main(argv=None):
    parser = make_parser(__doc__, "an image folder, one folder a class", images=200, batch_size=16)
    parser.set_defaults(cold=False)
    args = parser.parse_args(argv)
    with parser.reporting(), folder_of(args, make_images) as folder:
        dataset = data.load(folder, args.image_size)
        sizes = [Path(dataset.name(i)).stat().st_size for i in range(len(dataset))]
        report(args, dataset, "images", {"image_size": args.image_size, "bytes_per_file": round(sum(sizes) / len(sizes))})


def make_images(folder, args):
    """JPEG files with a photograph's spectrum: amplitudes fall as 1 / frequency, the colours go mostly together."""
    (folder / "all").mkdir()
    random = np.random.default_rng(0)
    fall = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH))
    fall[0, 0] = np.inf
    for i in tqdm(range(args.images), desc="Making images", unit="image", disable=args.json):
        spectrum = np.fft.rfft2(random.standard_normal((4, HEIGHT, WIDTH))) / fall
        grey, *colours = np.fft.irfft2(spectrum, (HEIGHT, WIDTH))
        pixels = np.stack([grey + 0.3 * colour for colour in colours], axis=2)
        pixels = np.clip(128 + 50 * pixels / pixels.std(), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"all/{i:05d}.jpg", quality=95)


if __name__ == "__main__":
    main()
