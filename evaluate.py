"""Measure samples against a reference: FID, sFID, Inception Score, precision and recall, as in the paper's tables.

    python evaluate.py VIRTUAL_imagenet256_labeled.npz samples/NAME.npz
    torchrun --nproc_per_node=gpu evaluate.py REFERENCE SAMPLES     # the work shared by all GPUs
    python evaluate.py --reproduce                                  # the commands behind Tables 2 and 3

Each input is a .npz (arr_0: uint8 images (N, H, W, 3); or mu, sigma, mu_s, sigma_s, or both) or a folder of images.
Writes the numbers, and what they were made from, to SAMPLES.metrics.json.
"""

import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from cli import options
from evaluation.image_sets import checksum, open_images
from evaluation.inception import SPATIAL, Features, extract, gaussians, inception_weights, load_inception
from evaluation.metrics import Statistics, frechet_distance, inception_score, precision_recall
from runtime import distributed, files
from runtime.errors import UserError

METRICS = ["fid", "sfid", "inception_score", "precision", "recall"]
HEADINGS = ["FID", "sFID", "Inception Score", "precision", "recall"]
NEIGHBOURS, SPLIT_SIZE, PAPER_SAMPLES = 3, 5000, 50_000

PUBLISHED = {  # (pixels, cfg_scale): METRICS of DiT-XL/2; DiT paper, Tables 2 (256 px) and 3 (512 px)
    (256, 1.0): (9.62, 6.85, 121.50, 0.67, 0.67),
    (256, 1.25): (3.22, 5.28, 201.77, 0.76, 0.62),
    (256, 1.5): (2.27, 4.60, 278.24, 0.83, 0.57),
    (512, 1.0): (12.03, 7.12, 105.25, 0.75, 0.64),
    (512, 1.25): (4.64, 5.77, 174.77, 0.81, 0.57),
    (512, 1.5): (3.04, 5.02, 240.82, 0.84, 0.54),
}
REFERENCES = {256: "VIRTUAL_imagenet256_labeled.npz", 512: "VIRTUAL_imagenet512.npz"}


def parse_args(argv=None):
    parser = options.Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("reference", metavar="REFERENCE", nargs="?", help=".npz file or folder of images to compare with")
    add("samples", metavar="SAMPLES", nargs="?", help=".npz file or folder of the images to measure")
    add("--inception-weights", metavar="PATH", help="the network's state dict; without it, torch-fidelity's is downloaded")
    add("--batch-size", type=options.positive, default=64, help="images per process and forward pass")
    add("--cache", metavar="FOLDER", help="keep features here, 12 kB an image and 33 MB a set, and use them again for the "
        "same images and weights")  # fmt: skip
    add("--reproduce", action="store_true", help="print the two commands behind each row of the paper's Tables 2 and 3, "
        "the published numbers, and below them the measured ones where there are any")  # fmt: skip
    options.add_device_option(parser)
    args = parser.parse_args(argv)
    if args.samples is None and not (args.reproduce and args.reference is None):
        parser.error("REFERENCE and SAMPLES: both are needed, or --reproduce alone")
    if args.inception_weights and not Path(args.inception_weights).is_file():
        parser.error(f"--inception-weights {args.inception_weights}: no such file; without the option it is downloaded")
    if args.samples and not os.access(report_path(args.samples).parent, os.W_OK):
        parser.error(f"SAMPLES {args.samples}: its folder is missing or cannot be written to, as the .metrics.json needs")
    return parser, args


def main(argv=None):
    parser, args = parse_args(argv)
    if args.samples is None:
        print(reproduction())
        return
    with parser.reporting():
        try:
            evaluate(args, distributed.setup(args.device))
        finally:
            distributed.close()


def evaluate(args, context):
    inputs = {name: open_images(getattr(args, name)) for name in ("reference", "samples")}
    weights, checksums, warnings = context.run_on_main(lambda: prepare(args, inputs))
    network = load_inception(weights, context.device)
    features = {}
    for name, images in inputs.items():
        key = f"{checksums[name][:16]}-{checksums['inception_weights'][:16]}"
        features[name] = features_of(images, network, context, args, key)
    if not context.is_main:
        return
    warnings += check_predictions(features["samples"])
    numbers = measure(inputs, features, context.device)
    output = write_report(args, context, numbers, inputs, weights, checksums, warnings)
    for line in warnings:
        print(f"warning: {line}", file=sys.stderr)
    print(table({f"{len(inputs['samples'])} images": [numbers[name] for name in METRICS]}))
    print(f"written to {output}")
    if args.reproduce:
        print("\n" + reproduction(Path(args.samples)))


def prepare(args, inputs):
    """Once for all ranks: the network's file, checksums of all that goes in, and warnings about it."""
    warnings = check(**inputs)
    weights = inception_weights(args.inception_weights)
    checksums = {name: checksum(images.path, images.files) for name, images in inputs.items()}
    return weights, {**checksums, "inception_weights": checksum(weights)}, warnings


def check(reference, samples):
    """Warnings about what a number from these two sets would mean. Raises UserError where it would mean nothing."""
    for images in (reference, samples):
        images.check()
        if 0 < len(images) <= NEIGHBOURS:
            raise UserError(f"{images.path}: {len(images)} images; at least {NEIGHBOURS + 1} are needed")
    warnings = []
    if 0 < len(samples) < PAPER_SAMPLES:
        warnings.append(
            f"{len(samples)} samples, fewer than {PAPER_SAMPLES}: with fewer images FID and sFID grow and the "
            "Inception Score shrinks; compare only with numbers from as many, not with published ones"
        )
    if reference.size and samples.size and reference.size != samples.size:
        (h1, w1), (h2, w2) = reference.size, samples.size
        warnings.append(
            f"reference images have {w1}x{h1} pixels, samples {w2}x{h2}: the difference in sharpness after resizing to "
            "299x299 is part of every number"
        )
    for images in (reference, samples):
        if images.labels is not None and len(images) > 1 and len(np.unique(images.labels)) == 1:
            warnings.append(
                f"{images.path}: all images have the label {images.labels[0]}; the numbers compare one class with "
                "whatever the other set holds, and the Inception Score, which rewards variety of classes, says nothing"
            )
    for images, unknown in ((reference, "precision and recall"), (samples, "Inception Score, precision and recall")):
        if not len(images):
            warnings.append(f"{images.path}: has statistics and no images, so no {unknown}")
    return warnings


def check_predictions(features):
    """A warning where the network itself sees one class, which labels need not tell (collapse, or one label drawn)."""
    if not features:
        return []
    counts = torch.bincount(features.logits.argmax(dim=1))
    share = counts.max().item() / len(features.logits)
    if share <= 0.5:
        return []
    return [
        f"the network puts {share:.0%} of the samples into one class ({counts.argmax().item()}): with one class only, "
        "FID and recall measure what is missing rather than how good the images are"
    ]


def features_of(images, network, context, args, key):
    """Features of a set on rank 0, None elsewhere or without images; read from and written to --cache under `key`."""
    if not len(images):
        return None
    path = Path(args.cache) / f"{key}.npz" if args.cache else None
    cached = context.broadcast(bool(path and path.exists()))
    if cached:
        return load_features(path, context.device) if context.is_main else None
    features = extract(network, images, context, args.batch_size, progress=f"features of {images.path.name}")
    if features and path:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_features(features, path)
    return features


def save_features(features, path):
    spatial = features.spatial
    arrays = {
        "pooled": features.pooled.numpy(),
        "logits": features.logits.numpy(),
        "spatial_count": spatial.count,
        "spatial_mean": spatial.mu,
        "spatial_scatter": spatial.scatter.cpu().numpy(),
    }
    files.replace_file(path, lambda file: np.savez(file, **arrays))


def load_features(path, device):
    spatial = Statistics(SPATIAL, device)
    try:
        with np.load(path, allow_pickle=False) as file:
            spatial.count = int(file["spatial_count"])
            spatial.mean = torch.from_numpy(file["spatial_mean"]).to(spatial.mean)
            spatial.scatter = torch.from_numpy(file["spatial_scatter"]).to(spatial.scatter)
            return Features(torch.from_numpy(file["pooled"]), torch.from_numpy(file["logits"]), spatial)
    except Exception as error:  # a damaged zip raises one of many
        raise UserError(f"--cache: {path} cannot be read ({error}); delete it") from error


def measure(inputs, features, device):
    """The five numbers by name; None for one that needs images which an input does not have."""
    moments = {name: gaussians(images, features[name]) for name, images in inputs.items()}
    numbers = dict.fromkeys(METRICS)
    for name in ("fid", "sfid"):
        if name in moments["reference"] and name in moments["samples"]:
            numbers[name] = frechet_distance(*moments["reference"][name], *moments["samples"][name])
    if features["samples"]:
        numbers["inception_score"] = inception_score(features["samples"].logits, SPLIT_SIZE)
    if features["samples"] and features["reference"]:
        pooled = (features[name].pooled.to(device) for name in ("reference", "samples"))
        numbers["precision"], numbers["recall"] = precision_recall(*pooled, k=NEIGHBOURS, progress=True)
    return numbers


def write_report(args, context, numbers, inputs, weights, checksums, warnings):
    report = {
        **numbers,
        **{
            name: {
                "path": str(images.path),
                "sha256": checksums[name],
                "images": len(images),
                "height_width": images.size,
                "statistics_of_file": sorted(images.statistics),
            }
            for name, images in inputs.items()
        },
        "inception_weights": {"path": str(weights), "sha256": checksums["inception_weights"]},
        "settings": {
            "batch_size": args.batch_size,
            "processes": context.world_size,
            "device": torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else str(context.device),
            "neighbours": NEIGHBOURS,
            "split_size": SPLIT_SIZE,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "torch-fidelity", "numpy", "pillow")},
        },
        "warnings": warnings,
    }
    output = report_path(args.samples)
    files.write_json(output, report)
    return output


def report_path(samples):
    samples = Path(samples).resolve()
    return samples.with_name(samples.name + ".metrics.json")


def table(rows):
    """Text of a table: {title: values of METRICS, None for unknown}."""
    width = max(map(len, rows), default=0)
    lines = [" " * width + "".join(f"{heading:>17}" for heading in HEADINGS)]
    for title, values in rows.items():
        cells = (
            "-" if value is None else f"{value:.{4 if name in METRICS[3:] else 3}f}"
            for name, value in zip(METRICS, values, strict=True)
        )
        lines.append(f"{title:<{width}}" + "".join(f"{cell:>17}" for cell in cells))
    return "\n".join(lines)


def reproduction(measured=None):
    """Text: commands and published numbers of each row of Tables 2 and 3, and the measured numbers where there are any.

    These are read beside the samples `measured` if they carry the row's name, else where the commands put them."""
    parts = []
    for (size, cfg_scale), published in PUBLISHED.items():
        name = f"DiT-XL-2-pretrained-size-{size}-vae-ema-cfg-{cfg_scale}-seed-0"
        samples = Path("samples") / f"{name}.npz"
        if measured and measured.name in (name, samples.name):
            samples = measured
        rows = {"published": published}
        if report_path(samples).exists():
            report = json.loads(report_path(samples).read_text())
            rows[f"measured ({report['samples']['images']} images)"] = [report[metric] for metric in METRICS]
        parts.append(
            f"# Table {2 if size == 256 else 3}: DiT-XL/2, {size} px, "
            f"{f'cfg {cfg_scale}' if cfg_scale != 1 else 'no guidance'}\n"
            f"torchrun --nproc_per_node=gpu sample_ddp.py --image-size {size} --cfg-scale {cfg_scale} "
            f"--num-sampling-steps 250 --num-fid-samples {PAPER_SAMPLES}\n"
            f"torchrun --nproc_per_node=gpu evaluate.py {REFERENCES[size]} {samples}\n{table(rows)}"
        )
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
