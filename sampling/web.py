"""What the web page (app.py) does, without Gradio: it finds checkpoints, draws as sample.py does, and writes and reads
pictures that carry their settings."""

import json
import os
import re
import shlex
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin

from runtime.config import flag
from runtime.devices import explain_out_of_memory, pick_device
from runtime.errors import UserError
from sampling import grid
from sampling.config import EditingConfig, GuidanceConfig, SampleConfig, SamplerConfig, SourceConfig
from sampling.original import choose_labels, default_labels, draw_noise
from sampling.pipeline import Pipeline
from sampling.source import Source

MAX_IMAGES = 256  # of one drawing
PREVIEW_SECONDS = 0.25  # between two pictures of the predicted x_0, at least

# The options of sample.py that the page has, as the page calls them
TITLES = {
    "ckpt": "Checkpoint", "labels": "Classes", "prompt": "Prompts",
    "samples_per_label": "Number of images", "interpolate": "Interpolate",
    "cfg_scale": "Guidance", "sampler": "Sampler", "num_sampling_steps": "Steps", "seed": "Seed",
}  # fmt: skip


def page_words(message):
    """An error's message with the page's titles in place of the flags."""
    return re.sub(r"--([a-z0-9-]+)", lambda found: TITLES.get(found[1].replace("-", "_"), found[0]), str(message))


def find_checkpoints(first=None):
    """Paths of `first`, if given, of the checkpoints below demo/ and results/, the newest first, and of the released ones.
    Raises UserError where there are none."""
    found = [path for folder in ("demo", "results") for path in Path(folder).glob("**/checkpoints/*.pt")]
    found = [path for path in found if re.fullmatch(r"\d{7,}", path.stem) and path.is_file()]
    found.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    paths = [*([first] if first else []), *map(str, found), *map(str, sorted(Path("pretrained_models").glob("*.pt")))]
    if not paths:
        raise UserError("--ckpt: there is no checkpoint below demo/ or results/; run `make demo`, or name one")
    return list(dict.fromkeys(paths))


def page_config(values, compute, vae=None):
    """The SampleConfig of the page's values, a dict with the keys of TITLES; `samples_per_label` counts the images of each
    class, or those of a row that interpolates. Lines of `prompt` take the place of classes. Raises UserError, in the page's
    words."""
    try:
        prompts = [line.strip() for line in (values.get("prompt") or "").splitlines() if line.strip()]
        labels, interpolate = prompts or values["labels"], values["interpolate"]
        # it is checked here, because a SampleConfig that interpolates has it in another field
        count = SampleConfig(samples_per_label=values["samples_per_label"]).samples_per_label
        if not labels:
            raise UserError("Classes: choose one or more, or write Prompts for a model of texts")
        if interpolate and (len(labels) < 2 or count < 2):
            raise UserError("Interpolate: needs two classes or more, and two images or more")
        rows = len(labels) - 1 if interpolate else len(labels)
        if rows * count > MAX_IMAGES:
            raise UserError(f"Number of images: {rows * count} in all are too many at once; draw {MAX_IMAGES} or fewer")
        return SampleConfig(
            labels=None if prompts else tuple(labels), prompt=tuple(prompts) or None, seed=values["seed"],
            samples_per_label=1 if interpolate else count,
            columns=count if interpolate else min(4 // count * count or min(count, 8), len(labels) * count), captions=True,
            editing=EditingConfig(interpolate="classes" if interpolate else None),
            source=SourceConfig(ckpt=values["ckpt"], vae=vae),
            sampler=SamplerConfig(sampler=values["sampler"], num_sampling_steps=values["num_sampling_steps"]),
            guidance=GuidanceConfig(cfg_scale=values["cfg_scale"]), compute=compute,
        )  # fmt: skip
    except UserError as error:
        raise UserError(page_words(error)) from None


class Artist:
    """Draws for all visitors, and keeps the last model."""

    def __init__(self):
        self.key = self.pipeline = self.state = None
        self.lock = threading.Lock()  # of torch's own random stream: a drawing that was stopped may still be preparing

    def prepare(self, source, seed):
        """(pipeline, generator) to draw from an opened Source with the random stream of sample.py.

        On a CPU this stream begins with the model's initial weights, so that a new seed builds the model again; on a GPU
        the noise has a stream of its own."""
        device = torch.device(pick_device(source.compute.device))
        on_cpu, modified = device.type == "cpu", map(os.path.getmtime, source.checkpoint.files)
        key = (source.checkpoint.path, *modified, seed if on_cpu else None)
        with self.lock:
            if key != self.key:
                self.key = self.pipeline = None  # frees the memory before the next model needs it
                torch.manual_seed(seed)
                self.pipeline = Pipeline.build(source, device, draw_initial_weights=on_cpu)
                self.key, self.state = key, torch.get_rng_state()
            kept, state = self.pipeline, self.state
        generator = torch.Generator(device)
        generator = generator.set_state(state) if on_cpu else generator.manual_seed(seed)
        names = {"precision": kept.precision, "class_names": source.class_names, "text_encoder": kept.text_encoder}
        return Pipeline(kept.model, kept.space, source.sampler, source.guidance, **names), generator

    def draw(self, config):
        """Draw the images of a `page_config`: an iterator of (config, step, images, captions). The images (N, H, W, 3) are
        the predicted x_0 of the step, and at last, with step 0, what sample.py draws. The config is completed so that
        sample.py writes the same grid. Raises UserError, in the page's words."""
        try:
            with explain_out_of_memory("draw fewer images at once"):
                options = (config.source, config.sampler, config.guidance, config.compute, "mse", config.text)
                source = Source.open(*options, config.prompt or ())
                labels = choose_labels(config, source)
                number = (len(labels) - 1) * config.columns if config.editing.interpolate else len(labels)
                source.check_memory(number, "draw fewer images at once")
                config = replace(config, enlarge=max(1, 96 // source.settings["image_size"]))
                pipeline, generator = self.prepare(source, config.seed)
                z, y, captions, step_noise = draw_noise(pipeline, labels, config.editing, config.columns, generator)
                due = 0.0
                for out in pipeline.steps(y, z, step_noise):
                    start = time.monotonic()
                    if out["step"] and start >= due:
                        yield config, out["step"], pipeline.to_pixels(out["pred_xstart"]), captions
                        due = time.monotonic() + max(PREVIEW_SECONDS, 4 * (time.monotonic() - start))  # a fifth of the time
                yield config, 0, pipeline.to_pixels(out["sample"]), captions
        except UserError as error:
            raise UserError(page_words(error)) from None


def class_choices(ckpt, vae=None):
    """([(text, number as text)], default numbers) of the classes of a checkpoint; none for a model of texts. Raises
    UserError."""
    source = Source.open(SourceConfig(ckpt=ckpt, vae=vae), released_vae="mse")
    if source.text_encoder:
        return [], []
    number, names = max(source.settings["num_classes"], 1), source.class_names
    texts = [f"{i} {names[i]}" if i < len(names) and names[i] != str(i) else str(i) for i in range(number)]
    return [(text, str(i)) for i, text in enumerate(texts)], default_labels(source.settings["num_classes"])


# ----------------------------------------------------------------------------------------------------------------------
# Pictures that carry their settings, as text chunks of the PNG format


def command(config):
    """The command line of sample.py for a SampleConfig."""
    words, defaults = ["python", "sample.py"], SampleConfig().flat()
    for name, value in config.flat().items():
        if isinstance(value, bool) and value != defaults[name]:
            words.append(flag(name) if value else flag(f"no_{name}"))
        elif value != defaults[name]:
            words += [flag(name), *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def draw_grid(config, images, captions):
    """The grid that sample.py draws, a PIL image."""
    return grid.draw_grid(images, config.columns, config.enlarge, captions)


def write_pictures(folder, config, images, captions):
    """Write the grid and every image to `folder`, with their settings, and an archive of them all. Returns (path of the
    grid, [(path, caption)] of the images, path of the archive)."""

    def write(name, picture, **more):
        info = PngImagePlugin.PngInfo()
        texts = {"command": command(config), "settings": json.dumps(config.flat()), **more}
        for key, text in texts.items():
            info.add_text(key, text)
        grid.write_picture(path := os.path.join(folder, name), picture, pnginfo=info)
        return path

    singles = [
        (write(f"{i:03d}.png", Image.fromarray(pixels), image=str(i), caption=caption), caption)
        for i, (pixels, caption) in enumerate(zip(images, captions, strict=True))
    ]
    path, archive = write("grid.png", draw_grid(config, images, captions)), os.path.join(folder, "images.zip")
    with zipfile.ZipFile(archive, "w") as file:
        for member in [path, *(single for single, _ in singles)]:
            file.write(member, os.path.basename(member))
    return path, singles, archive


def read_settings(path):
    """The page's values, with the keys of TITLES, of a picture of `write_pictures`. Raises UserError."""
    try:
        with Image.open(path) as picture:
            config = SampleConfig.from_flat({"ckpt": "", "labels": [], **json.loads(picture.info["settings"])})
    except (OSError, Image.DecompressionBombError, KeyError, ValueError, TypeError, AttributeError, RecursionError):
        raise UserError("this file holds no settings; choose a picture that this page or its download has made") from None
    values = {name: value for name, value in config.flat().items() if name in TITLES}
    interpolate = config.editing.interpolate == "classes"
    return values | {
        "labels": values["labels"] or [],
        "prompt": "\n".join(values["prompt"] or []),
        "interpolate": interpolate,
        "samples_per_label": config.columns if interpolate else config.samples_per_label,
    }
