"""One checkpoint under many settings: each combination of the listed averages, samplers and guidance draws images of the
same labels from the same noise, and is measured against a reference. The work of tools/sweep.py."""

import itertools
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from diffusion import samplers
from evaluation.comparison import cell, check_cache, features_of, measure
from evaluation.config import SWEPT
from evaluation.extraction import complete, extract_all
from evaluation.features import load_network
from evaluation.image_sets import need_images, open_reference
from runtime import files
from runtime.config import combinations, flag
from runtime.devices import explain_out_of_memory
from runtime.errors import UserError
from sampling.config import GuidanceConfig, SampleConfig, SampleSetConfig, command
from sampling.labels import SetLabels, choices_of_set
from sampling.opened import Opened
from sampling.pipeline import Pipeline


def sweep(config, context):
    """Measure the settings of a SweepConfig that its results.json lacks, print a table, draw curves. Raises UserError."""
    with context.together():
        listed = settings(config)
        opened = open_all([setting for _, setting in listed])
    measurer, path, locks = Measurer(config, context, next(iter(opened.values()))), Path(config.output, "results.json"), []

    def claim_folder():
        """Lock the folder until this function ends. Returns what the rows are made with, and those that there are."""
        locks.append(files.lock_folder(config.output))
        rows = files.read_json(path, list) if path.exists() else []
        if rows is None or not all(isinstance(row, dict) and {"made_with", "networks"} <= row.keys() for row in rows):
            raise UserError(path, "damaged", "delete it, or choose another --output")
        return [measurer.key(one) for one in opened.values()], rows

    keys, rows = context.on_main(claim_folder)
    options = {setting: {**one.config.flat(), **one.settings} for setting, one in opened.items()}
    names = [name for name in config.flat() if len({json.dumps(values.get(name)) for values in options.values()}) > 1]
    numbers = [title for network in config.features for title in (f"FD of {network}", "precision", "recall")]
    titles, found = [*map(flag, names), *numbers, "seconds", "images/s"], {}
    context.print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    for (setting, one), key in zip(opened.items(), keys, strict=True):
        row = next((row for row in rows if row["made_with"] == key), None)
        if row is None:
            row = {"made_with": key, "command": command(setting), **measurer.measure(one)}
            rows.append(row)
            context.on_main(write, path, lambda: files.write_json(path, rows))
        cells = [text_of(options[setting][name]) for name in names]
        cells += [cell(of, name, 3) for of in row["networks"].values() for name in ("fd", "precision", "recall")]
        context.print(f"| {' | '.join([*cells, *(f'{row[n]:.1f}' for n in ('seconds', 'images_per_second'))])} |")
        found[setting] = row
    for network in config.features if context.is_main else ():
        print(describe_best(network, found, options, names))
    if context.is_main:
        picture, figure = path.with_name("curves.png"), curves(config.features, listed, found, names)
        write(picture, lambda: files.replace_file(picture, lambda file: figure.savefig(file, format="png", dpi=130)))
        print(f"written to {path} and {picture}")


def settings(config):
    """Every combination of the lists of a SweepConfig: [(options as they are listed, SampleSetConfig that draws so)]. Where
    there is no guidance, its other options have no effect and are left out of the latter."""
    values, found = config.flat(), []
    for parts in itertools.product(*(combinations(config_class, values) for config_class in SWEPT)):
        listed = {name: value for part in parts for name, value in part.items()}
        without = {**GuidanceConfig.defaults(), "cfg_scale": 1.0} if listed["cfg_scale"] == 1 else {}
        found.append((listed, SampleSetConfig.from_flat({**values, **listed, **without})))
    return found


def weights_of(setting):
    return setting.source.average, setting.guidance.guide_ckpt


def open_all(settings):
    """{setting: Opened}, each checked. Checkpoints are opened once. Raises UserError."""
    opened, models = {}, {}
    for setting in settings:
        weights = weights_of(setting)
        models[weights] = models[weights].vary(setting) if weights in models else Opened.open(setting)
        opened[setting] = models[weights]
    return opened


@dataclass(frozen=True)
class Drawn:
    """The images of a set, drawn while they are read; an image set as of `evaluation.image_sets`. number: of images, or of
    clips of so many `frames`, which are its images then."""

    pipeline: Pipeline
    labels: SetLabels
    number: int
    frames: int
    path: str
    statistics: dict = field(default_factory=dict)  # none are known beforehand

    def __len__(self):
        return self.number * self.frames

    def batches(self, start, stop, batch_size):
        """Yield uint8 (up to batch_size images or clips, H, W, 3): the batches that begin in [start, stop), which are the
        same ones for any number of processes, and those of sample_ddp.py."""
        whole = batch_size * self.frames
        for first in range(-(-start // whole) * batch_size, -(-stop // whole) * batch_size, batch_size):
            indices = range(first, min(first + batch_size, self.number))
            x_T, step_noise = self.pipeline.noise(self.labels.seed, indices)
            x_0 = samplers.last(self.pipeline.steps(self.labels.choices(indices), x_T, step_noise))
            pixels = self.pipeline.to_pixels(x_0)
            yield pixels.reshape(-1, *pixels.shape[-3:])


class Measurer:
    """Measures settings, each an `Opened`, against the reference. one: any of them. Raises UserError."""

    def __init__(self, config, context, one):
        self.config, self.context, self.references, self.built = config, context, None, None
        with context.together():
            self.reference = open_reference(config.ref, "--ref", one.settings["image_size"], config.image_column)
        context.on_main(self.reference.check)
        context.on_main(check_cache, config.cache)
        self.given = context.on_main(choices_of_set, config, one)
        with context.together():
            weights, names = config.inception_weights, config.features
            self.networks = {name: load_network(name, weights, context.device) for name in names}
            need_images(self.networks, self.reference, "--ref")
        self.sha256 = context.on_main(self.reference.checksum)
        self.weights = context.on_main(lambda: {name: x.weights["sha256"] for name, x in self.networks.items()})

    def key(self, opened):
        """All that the numbers of a setting depend on, as plain JSON."""
        measured = {"num_fid_samples": self.config.num_fid_samples, "resamples": self.config.resamples}
        measured |= {"reference": self.sha256, "networks": self.weights, "checkpoint_crc32": opened.checkpoint.checksum}
        return json.loads(json.dumps(opened.made_with(self.given) | measured))

    def measure(self, opened):
        """The numbers of a setting, a dict."""
        config, context = self.config, self.context
        if self.references is None:
            names = {name: f"{self.sha256[:16]}-{sha256[:16]}" for name, sha256 in self.weights.items()}
            features = features_of(self.reference, self.networks, context, config, names, warnings := [])
            self.references = self.complete(features, self.reference) if context.is_main else {}
            for line in warnings:
                context.print(f"warning: {line}")
        labels = SetLabels.of(config, opened, self.given)
        number, frames = config.num_fid_samples, opened.frames or 1
        drawn = Drawn(self.pipeline(opened), labels, number, frames, opened.checkpoint.path)
        begin = time.perf_counter()
        with explain_out_of_memory("lower --per-proc-batch-size"), torch.inference_mode():
            features = extract_all(self.networks, drawn, context, config.per_proc_batch_size, "images")
        seconds = time.perf_counter() - begin
        networks = context.on_main(self.compare, features, drawn)
        return {"networks": networks, "seconds": seconds, "images_per_second": len(drawn) / seconds}

    def pipeline(self, opened):
        """Of a setting; the last model is kept while its weights are wanted."""
        if self.built != weights_of(opened.config):
            self.last, self.built = None, weights_of(opened.config)  # frees the memory before the next model needs it
            with self.context.together():
                self.last = Pipeline.build(opened, self.context.device)
        return self.last.vary(opened)

    def complete(self, features, images):
        device = self.context.device
        return {name: complete(features[name], images, network, device) for name, network in self.networks.items()}

    def compare(self, features, drawn):
        """{network: numbers, with standard errors}."""
        found = {}
        for name, samples in self.complete(features, drawn).items():
            numbers, errors = measure(self.references[name], samples, self.config.resamples, drawn.path)
            found[name] = {**numbers, "standard_errors": errors}
        return found


def write(path, action):
    with files.write_errors(path, "; the rows so far are kept"):
        action()


def text_of(value):
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else "-" if value is None else str(value)


def describe_best(network, found, options, names):
    """The setting with the lowest distance, the command that draws its images, and one that draws a few. found: {setting:
    row}. options: {setting: options}. names: of the options in which the settings differ."""
    numbers = {setting: row["networks"][network] for setting, row in found.items()}
    setting = min(numbers, key=lambda setting: numbers[setting]["fd"])
    best, others, close = numbers[setting], [x for key, x in numbers.items() if key != setting], ""
    if others and (error := best["standard_errors"].get("fd")):
        count = sum(x["fd"] - best["fd"] <= 2 * max(error, x["standard_errors"]["fd"]) for x in others)
        close = f"; {count} of {len(others)} others within two standard errors"
    given = " ".join(f"{flag(name)} {text_of(options[setting][name])}" for name in names)
    lines = [f"Best FD of {network}: {cell(best, 'fd', 3)}, {given or 'the only setting'}{close}", command(setting)]
    if not setting.prompts:  # of which sample.py takes no file; its own autoencoder and scale are others
        own = {name: options[setting][name] for name in ("vae", "cfg_scale")}
        lines.append(command(SampleConfig.from_flat({**setting.flat(), **own})))
    return "\n    ".join(lines)


def curves(networks, listed, found, names):
    """A figure: for each network the distance over the guidance scale, and precision against recall, with a line for each
    combination of the other options. listed: of `settings`. found: {setting: row}. names: of the options that differ."""
    from matplotlib.figure import Figure  # takes a second to import

    lines = {}
    for options, setting in listed:
        label = " ".join(f"{flag(name)} {text_of(options[name])}" for name in names if name != "cfg_scale")
        lines.setdefault(label, []).append((found[setting]["made_with"]["cfg_scale"], found[setting]["networks"]))
    figure = Figure(figsize=(10, 4 * len(networks)), layout="constrained")
    for network, (left, right) in zip(networks, figure.subplots(len(networks), 2, squeeze=False), strict=True):
        for label, points in lines.items():
            points = sorted(points, key=lambda point: point[0])
            scales, rows = [scale for scale, _ in points], [numbers[network] for _, numbers in points]
            errors = [row["standard_errors"].get("fd", 0) for row in rows]
            left.errorbar(scales, [row["fd"] for row in rows], errors, marker="o", markersize=4, capsize=3, label=label)
            places = [(row["recall"], row["precision"]) for row in rows if row["recall"] is not None]
            right.plot(*zip(*places, strict=True), marker="o", markersize=4) if places else None
            for scale, place in zip(scales, places, strict=False):
                right.annotate(f"{scale:g}", place, (4, 4), textcoords="offset points", fontsize=7)
        left.set(xlabel="guidance scale", ylabel=f"FD of {network}")
        right.set(xlabel="recall", ylabel="precision", title="beside the points: guidance scales")
        right.margins(0.12)  # room for the numbers
        left.grid(alpha=0.3), right.grid(alpha=0.3)
    if len(lines) > 1:
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return figure
