"""How fast images are read, decoded, cropped and mirrored, through make_loader as train.py uses it.

OMP_NUM_THREADS=1 python benchmarks/images.py --num-workers 0 1 2
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.latents import ReadingConfig, folder_of, report
from data.images import ImageDataset
from runtime.parser import Parser

WIDTH, HEIGHT = 500, 375  # the most frequent size in ImageNet


def main(argv=None):
    parser = Parser(ReadingConfig, __doc__, defaults={"images": 200, "batch_size": 16})
    config = parser.parse(argv)
    with parser.report_errors(), folder_of(config, make_images) as folder:
        dataset = ImageDataset(folder, config.image_size)
        sizes = [Path(dataset.path(i)).stat().st_size for i in range(len(dataset))]
        facts = {"image_size": config.image_size, "bytes_per_file": round(sum(sizes) / len(sizes))}
        report(config, dataset, "images", facts)


def make_images(folder, config):
    """JPEG files with a photograph's spectrum: amplitudes fall as 1 / frequency, the colours go mostly together."""
    (folder / "all").mkdir()
    random = np.random.default_rng(0)
    fall = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH))
    fall[0, 0] = np.inf
    for i in tqdm(range(config.images), desc="Making images", unit="image", disable=config.json):
        spectrum = np.fft.rfft2(random.standard_normal((4, HEIGHT, WIDTH))) / fall
        grey, *colours = np.fft.irfft2(spectrum, (HEIGHT, WIDTH))
        pixels = np.stack([grey + 0.3 * colour for colour in colours], axis=2)
        pixels = np.clip(128 + 50 * pixels / pixels.std(), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"all/{i:05d}.jpg", quality=95)


if __name__ == "__main__":
    main()
