"""A set of samples compared with a reference: the work of evaluate.py, shared by all processes of a Context."""

import math
import os
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from evaluation.image_sets import checksum, open_images
from evaluation.inception import SPATIAL, Features, extract, gaussians, inception_weights, load_inception
from evaluation.metrics import Statistics, frechet_distance, inception_score, precision_recall
from runtime import files
from runtime.devices import explain_out_of_memory
from runtime.errors import UserError

METRICS = {"fid": "FID", "sfid": "sFID", "inception_score": "Inception Score", "precision": "precision", "recall": "recall"}
NEIGHBOURS, SPLIT_SIZE, PAPER_SAMPLES = 3, 5000, 50_000


def compare(config, context):
    """(report, path): the report on rank 0, whose place is `path`; None on other ranks. The report holds the five METRICS,
    None for one that needs images which an input does not have; what they were made from; and `warnings`.

    config: an EvaluateConfig. Raises UserError."""
    names = "reference", "samples"
    inputs = context.run_on_all_ranks(lambda: {name: open_images(getattr(config, name)) for name in names})
    output = context.run_on_main(lambda: check_outputs(config))
    warnings = context.run_on_main(lambda: check(**inputs))
    weights = context.run_on_main(lambda: inception_weights(config.inception_weights))
    network = context.run_on_all_ranks(lambda: load_inception(weights, context.device))
    checksums = context.run_on_main(
        lambda: {name: checksum(images.path, images.files) for name, images in inputs.items()}
        | {"inception_weights": checksum(weights)}
    )
    features = {}
    for name, images in inputs.items():
        key = f"{checksums[name][:16]}-{checksums['inception_weights'][:16]}"
        features[name] = features_of(images, network, context, config, key, warnings)
    if not context.is_main:
        return None, output
    numbers = measure(inputs, features, context.device)
    warnings += check_predictions(features["samples"]) if features["samples"] else []
    return make_report(config, context, numbers, inputs, weights, checksums, warnings), output


def check_outputs(config):
    """The report's path. Makes the folder of --cache. Raises UserError where one of them cannot be written to."""
    # realpath, because Path.resolve() raises RuntimeError for links that form a loop
    samples = Path(os.path.realpath(config.samples))
    output = samples.with_name(f"{samples.name}.metrics.json")
    files.check_output(output, "the report")
    if config.cache is not None:
        with files.write_errors(f"--cache {config.cache}", "; name another folder"):
            Path(config.cache).mkdir(parents=True, exist_ok=True)
        files.check_output(Path(config.cache) / "features.npz", "--cache")
    return output


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
                f"{images.path}: all images have the label {images.labels[0]}; the numbers compare one class with all "
                "classes of the other set, and the Inception Score, which rewards variety of classes, means nothing"
            )
    for images, unknown in ((reference, "precision and recall"), (samples, "Inception Score, precision and recall")):
        if not len(images):
            warnings.append(f"{images.path}: has statistics and no images, so no {unknown}")
    return warnings


def check_predictions(features):
    """A warning where the network sees one class in most samples, which labels do not tell: mode collapse, for example."""
    counts = torch.bincount(features.logits.argmax(dim=1))
    share = counts.max().item() / len(features.logits)
    warning = (
        f"the network puts {share:.0%} of the samples into one class ({counts.argmax().item()}): with one class only, "
        "FID and recall measure what is missing rather than how good the images are"
    )
    return [warning] if share > 0.5 else []


def features_of(images, network, context, config, key, warnings):
    """Features of a set on rank 0, None on other ranks or without images; read from --cache, or kept there under `key`."""
    if not len(images):
        return None
    path = Path(config.cache) / f"{key}.npz" if config.cache is not None else None
    if context.broadcast(bool(path and path.exists())):
        return context.run_on_all_ranks(lambda: load_features(path) if context.is_main else None)
    with explain_out_of_memory("lower --batch-size"):
        features = extract(network, images, context, config.batch_size, f"features of {images.path.name}")
    if features and path:
        try:
            save_features(features, path)
        except OSError as error:  # hours of work must not be lost for it
            warnings.append(f"--cache {path}: cannot be written ({files.reason(error)}); the features are not kept")
    return features


def save_features(features, path):
    spatial = {f"spatial_{name}": value for name, value in vars(features.spatial).items()}  # count, mean and scatter
    arrays = {"pooled": features.pooled, "logits": features.logits, **spatial}
    files.replace_file(path, lambda file: np.savez(file, **arrays))


def load_features(path):
    try:
        files.check_regular(path)
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(array) for name, array in file.items()}
        spatial = Statistics(SPATIAL)
        spatial.count, spatial.mean = int(arrays["spatial_count"]), arrays["spatial_mean"]
        spatial.scatter = arrays["spatial_scatter"]
        return Features(arrays["pooled"], arrays["logits"], spatial)
    except Exception as error:  # a damaged zip raises one of many
        raise UserError(f"--cache: {path} cannot be read ({files.reason(error)}); delete it") from error


def measure(inputs, features, device):
    """The METRICS by name; None for one that needs images which an input does not have. Raises UserError where a number is
    not finite."""
    reference, samples = (gaussians(inputs[name], features[name], device) for name in ("reference", "samples"))
    numbers = dict.fromkeys(METRICS)
    for name, mu, sigma in (("fid", "mu", "sigma"), ("sfid", "mu_s", "sigma_s")):
        if mu in reference and mu in samples:
            numbers[name] = frechet_distance(reference[mu], reference[sigma], samples[mu], samples[sigma])
    if features["samples"]:
        numbers["inception_score"] = inception_score(features["samples"].logits, SPLIT_SIZE)
    if features["samples"] and features["reference"]:
        pooled = (features[name].pooled.to(device) for name in ("reference", "samples"))
        numbers["precision"], numbers["recall"] = precision_recall(*pooled, k=NEIGHBOURS, progress=True)
    for name, number in numbers.items():
        if number is not None and not math.isfinite(number):
            raise UserError(f"{inputs['samples'].path}: {METRICS[name]} is not finite; the statistics or features overflow")
    return numbers


def make_report(config, context, numbers, inputs, weights, checksums, warnings):
    sets = {
        name: {
            "path": str(images.path),
            "sha256": checksums[name],
            "images": len(images),
            "height_width": images.size,
            "statistics_of_file": sorted(images.statistics),
        }
        for name, images in inputs.items()
    }
    versions = {name: version(name) for name in ("torch", "torch-fidelity", "numpy", "pillow")}
    return {
        **numbers,
        **sets,
        "inception_weights": {"path": str(weights), "sha256": checksums["inception_weights"]},
        "settings": {
            "batch_size": config.batch_size,
            "processes": context.world_size,
            "device": torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else str(context.device),
            "neighbours": NEIGHBOURS,
            "split_size": SPLIT_SIZE,
        },
        "versions": {"python": platform.python_version(), **versions},
        "warnings": warnings,
    }


def table(title, numbers):
    """Text: the METRICS of a report under their names, "-" for None."""
    digits = {"precision": 4, "recall": 4}
    cells = ["-" if numbers[name] is None else f"{numbers[name]:.{digits.get(name, 3)}f}" for name in METRICS]
    lines = (" " * len(title), METRICS.values()), (title, cells)
    return "\n".join(start + "".join(f"{cell:>17}" for cell in row) for start, row in lines)
