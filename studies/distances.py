"""What each metric says of real images against other real images: as they are, blurred, noisy, as JPEG files of low
quality, of half the classes, and of each image ten times.

    python -m studies.distances --data-path /path/to/cifar10/test
"""

import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageFilter
from tqdm.auto import tqdm

from evaluation.comparison import measure, table
from evaluation.extraction import join
from evaluation.features import load_network
from evaluation.image_sets import open_images
from evaluation.metrics import FeatureSet
from runtime.config import Config, option
from runtime.parser import Parser


@dataclass(frozen=True)
class DistancesConfig(Config):
    """Options of this study."""

    data_path: str = option(help="folder of image folders, one for each class, all of one size", path="folder")
    images: int = option(1000, "images of a set; the data must have three times as many of each class", low=100)


def noisy(image):
    noise = np.random.default_rng(image.tobytes()[0]).normal(0, 12, (*image.size[::-1], 3))
    return np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)


def as_jpeg(image):
    image.save(stream := io.BytesIO(), "JPEG", quality=20)
    return Image.open(stream)


def main(argv=None):
    parser = Parser(DistancesConfig, __doc__)
    config = parser.parse(argv)
    with parser.report_errors():
        folder, network = open_images(config.data_path), load_network("efficientnet-lite0")
        images = np.concatenate([*folder.batches(0, len(folder), 500)])
        places = [np.flatnonzero(folder.labels == name) for name in np.unique(folder.labels)]
        count = config.images // len(places)
        first, second, third = (np.concatenate([p[i * count : (i + 1) * count] for p in places]) for i in range(3))
        sets = {"reference": images[first], "real": images[second], "more": images[third[: len(third) // 2]]}
        changes = {"blurred": lambda image: image.filter(ImageFilter.GaussianBlur(1)), "noisy": noisy, "JPEG": as_jpeg}
        for name, change in changes.items():
            sets[name] = np.stack([np.asarray(change(Image.fromarray(image))) for image in sets["real"]])
        found = {}
        for name, batch in tqdm(sets.items(), desc="features", unit="set"):
            outputs = [network(part) for part in torch.from_numpy(batch).split(64)]
            found[name] = join([FeatureSet(x.pooled, logits=x.logits) for x in outputs])
        more, real = found.pop("more"), found["real"]
        found["half the classes"] = join([real.part(slice(len(more.pooled))), more])
        found["each ten times"] = real.part(torch.arange(len(real.pooled)) // 10 * 10)
        reference, *sets = (x.part(slice(None)) for x in found.values())  # with means and covariances
        numbers = [measure(reference, x, 10, "this set") for x in sets]
        columns = zip([*found][1:], [{**values, "standard_errors": errors} for values, errors in numbers], strict=True)
        print(table({"samples": {"images": len(second)}, "networks": dict(columns)}))


if __name__ == "__main__":
    main()
