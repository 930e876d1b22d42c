"""A set of samples compared with a reference: the work of evaluate.py, shared by all processes of a Context."""

import functools
import math
import os
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from evaluation.extraction import complete, extract_all
from evaluation.features import load_network
from evaluation.image_sets import open_images
from evaluation.metrics import METRICS, FeatureSet, Statistics, standard_errors
from runtime import files
from runtime.devices import explain_out_of_memory
from runtime.errors import UserError

SPLIT_SIZE, PAPER_SAMPLES = 5000, 50_000
FEWEST = 4  # images, that precision and recall need
HALVES_FROM = 20  # samples from which on standard errors are computed
PUBLISHED = {"fid": "fd", "sfid": "sfd", **{name: name for name in ("inception_score", "precision", "recall")}}


def compare(config, context):
    """(report, path): the report on rank 0, whose place is `path`; None on other ranks. The report holds, for each network,
    the numbers of METRICS, None for one that needs what an input does not have, and standard errors; what they were made
    from; and `warnings`. The numbers of the Inception network stand, as published ones are called, at its top too.

    config: an EvaluateConfig. Raises UserError."""
    with context.together():
        inputs = {name: open_images(getattr(config, name), config.image_column) for name in ("reference", "samples")}
    output = context.on_main(check_outputs, config)
    warnings = context.on_main(lambda: [*check(**inputs)])
    with context.together():
        networks = {name: load_network(name, config.inception_weights, context.device) for name in config.features}
    sums = context.on_main(lambda: {name: images.checksum() for name, images in inputs.items()})
    weights = context.on_main(lambda: {name: network.weights for name, network in networks.items()})
    features = {}
    for name, images in inputs.items():
        keys = {network: f"{sums[name][:16]}-{weights[network]['sha256'][:16]}" for network in networks}
        features[name] = features_of(images, networks, context, config, keys, warnings)
    if not context.is_main:
        return None, output
    found = {}
    for name, network in networks.items():
        sets = [complete(features[key][name], images, network, context.device) for key, images in inputs.items()]
        numbers, errors = measure(*sets, config.resamples, inputs["samples"].path)
        warnings += check_predictions(name, sets[1].logits)
        made_from = {"preprocessing": network.preprocessing, "weights": weights[name]}
        found[name] = {**numbers, "standard_errors": errors, **made_from}
    return make_report(config, context, found, inputs, sums, warnings), output


def check_outputs(config):
    """The report's path. Makes the folder of --cache. Raises UserError where one of them cannot be written to."""
    # realpath, because Path.resolve() raises RuntimeError for links that form a loop
    samples = Path(os.path.realpath(config.samples))
    output = samples.with_name(f"{samples.name}.metrics.json")
    files.check_output(output, "the report")
    check_cache(config.cache)
    return output


def check_cache(folder):
    """Make the folder of --cache, if there is one. Raises UserError where it cannot be written to."""
    if folder:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"cannot be written ({files.reason(error)})"
            raise UserError(f"--cache {folder}", problem, "name another folder") from None
        files.check_output(Path(folder, "features.pt"), "--cache")


def check(reference, samples):
    """Yields warnings about what a number from these two sets would mean. Raises UserError where it would mean nothing."""
    for images in (reference, samples):
        images.check()
        if 0 < len(images) < FEWEST:
            raise UserError(images.path, f"{len(images)} images; at least {FEWEST} are needed")
    if 0 < len(samples) < PAPER_SAMPLES:
        text = f"{len(samples)} samples, fewer than {PAPER_SAMPLES}: with fewer images FD and sFD grow and the Inception"
        yield f"{text} Score shrinks; compare only with numbers from as many, not with published ones"
    if reference.size and samples.size and reference.size != samples.size:
        (h1, w1), (h2, w2) = reference.size, samples.size
        yield f"reference images have {w1}x{h1} pixels, samples {w2}x{h2}: the difference in sharpness is in every number"
    for images in (reference, samples):
        if images.labels is not None and len(images) > 1 and len(np.unique(images.labels)) == 1:
            text = f"{images.path}: all images have the label {images.labels[0]}; the numbers compare one class with all"
            text += " classes of the other set"
            yield f"{text}, and the Inception Score, which rewards variety of classes, means nothing"
        if not len(images):
            yield f"{images.path}: statistics without images; only FID and sFID of the Inception network compare with them"
    if in_order(samples.labels):
        yield f"{samples.path}: ordered by label; the Inception Score, of splits of {SPLIT_SIZE}, is too low: shuffle them"
    # of the files in a folder; the images of an .npz file may come from anywhere
    jpeg = [images.jpeg for images in (reference, samples)]
    if None not in jpeg and abs(jpeg[0] - jpeg[1]) > 0.1:
        text = f"{jpeg[0]:.0%} of the reference are JPEG files, {jpeg[1]:.0%} of the samples: the traces of that"
        yield f"{text} compression are part of every number; save both sets in one format"


def in_order(labels):
    """Whether labels of more than one split change from one to the next far more rarely than shuffled ones."""
    if labels is None or len(labels) <= SPLIT_SIZE:
        return False
    _, counts = np.unique(labels, return_counts=True)
    return np.mean(labels[1:] != labels[:-1]) < (1 - np.square(counts / len(labels)).sum()) / 2


def check_predictions(name, logits):
    """Yields a warning where a network sees one class in most samples, which labels do not tell: mode collapse, say."""
    counts = torch.zeros(1) if logits is None else torch.bincount(logits.argmax(dim=1)) / len(logits)
    if (share := counts.max().item()) > 0.5:
        text = f"{name} puts {share:.0%} of the samples into one class ({counts.argmax().item()}): with one class only, FD"
        yield f"{text} and recall measure what is missing rather than how good the images are"


def features_of(images, networks, context, config, keys, warnings):
    """{network: FeatureSet} of a set on rank 0, of None on other ranks or without images. With --cache they are read from
    there, or kept there under the `keys` of the networks; what is not there takes one pass over the images."""
    found = dict.fromkeys(networks)
    if not len(images):
        return found
    paths = {name: Path(config.cache, f"{key}.pt") for name, key in keys.items()} if config.cache else {}
    kept = context.broadcast([name for name, path in paths.items() if path.exists()])
    with context.together():
        if context.is_main:
            found |= {name: load_features(paths[name]) for name in kept}
    missing = {name: network for name, network in networks.items() if name not in kept}
    if missing:
        with explain_out_of_memory("lower --batch-size"):
            found |= extract_all(missing, images, context, config.batch_size, f"features of {images.path.name}")
    for name in missing if context.is_main and paths else ():
        content = {**vars(found[name]), "spatial": found[name].spatial and vars(found[name].spatial)}
        try:
            files.replace_file(paths[name], functools.partial(torch.save, content))
        except OSError as error:  # hours of work must not be lost for it
            warnings.append(f"--cache {paths[name]}: cannot be written ({files.reason(error)}); the features are not kept")
    return found


def load_features(path):
    try:
        files.check_regular(path)
        content = torch.load(path, weights_only=True)
        if content["spatial"]:
            statistics = Statistics(0)
            vars(statistics).update(content["spatial"])
            content["spatial"] = statistics
        return FeatureSet(**content)
    except Exception as error:  # a damaged file raises one of many
        raise UserError(f"--cache: {path} cannot be read ({files.reason(error)}); delete it") from error


def measure(reference, samples, resamples, path):
    """({name: number or None}, {name: standard error}) of METRICS, of two FeatureSets. resamples: see `standard_errors`; 0
    for none. Raises UserError, which names `path`, for a number that is not finite."""
    numbers, errors = {name: None for metric in METRICS for name in metric.titles}, {}
    fewest = min((len(x.pooled) for x in (reference, samples) if x.pooled is not None), default=math.inf)
    for metric in tqdm(METRICS, desc="metrics", unit="metric", leave=False):
        there = metric.reference is None or getattr(reference, metric.reference) is not None
        if not there or getattr(samples, metric.samples) is None or fewest < metric.fewest:
            continue
        values = metric.measure(reference, samples)
        numbers |= zip(metric.titles, values, strict=True)
        if not all(map(math.isfinite, values)):
            raise UserError(path, f"{', '.join(metric.titles.values())} is not finite; the statistics or features overflow")
        count = 0 if samples.pooled is None else len(samples.pooled)
        if metric.halves and resamples and count >= HALVES_FROM:
            halves = standard_errors(lambda part, of=metric.measure: of(reference, samples.part(part)), count, resamples)
            errors |= zip(metric.titles, halves, strict=True)
    return numbers, errors


def make_report(config, context, found, inputs, sums, warnings):
    report = {"networks": found, "warnings": warnings}
    if inception := found.get("inception"):
        report |= {name: inception[key] for name, key in PUBLISHED.items()} | {"inception_weights": inception["weights"]}
    for name, images in inputs.items():
        report[name] = {"path": str(images.path), "sha256": sums[name], "images": len(images), "height_width": images.size,
                        "statistics_of_file": sorted(images.statistics)}  # fmt: skip
    device = torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else str(context.device)
    settings = {"batch_size": config.batch_size, "processes": context.world_size, "device": device}
    report["settings"] = {**settings, "resamples": config.resamples, "split_size": SPLIT_SIZE}
    packages = ("torch", "torch-fidelity", "timm", "numpy", "pillow")
    return report | {"versions": {"python": platform.python_version(), **{name: version(name) for name in packages}}}


def table(report):
    """Text: a line for each number of METRICS, a column for each network of a report, "-" for None."""
    networks = report["networks"]
    lines = [f"{report['samples']['images']} images".ljust(24) + "".join(f"{name:>24}" for name in networks)]
    for metric in METRICS:
        for name, title in metric.titles.items():
            cells = [cell(found, name, metric.digits) for found in networks.values()]
            lines.append(title.ljust(24) + "".join(f"{text:>24}" for text in cells))
    return "\n".join(lines)


def cell(found, name, digits):
    """The number of this name as text, with its standard error if there is one; "-" for None."""
    number, error = found[name], found["standard_errors"].get(name)
    text = "-" if number is None else f"{number:.{digits}f}"
    return text if error is None else f"{text} +- {error:.{digits}f}"
