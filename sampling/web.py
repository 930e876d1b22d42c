"""What the web page (tools/app.py) does, without Gradio: it finds checkpoints, draws as sample.py does, and writes and
reads pictures that carry their settings."""

import contextlib
import json
import os
import re
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin

from checkpoint.opened import newest_of_run
from diffusion.registry import OBJECTIVES
from runtime.devices import explain_out_of_memory
from runtime.errors import UserError
from runtime.shapes import sides
from sampling import grid
from sampling.config import ComputeConfig, SampleConfig, command, recorded_drawing
from sampling.editing import draw_noise
from sampling.labels import choose
from sampling.opened import Opened, image_sizes
from sampling.pipeline import Pipeline

MAX_IMAGES = 256  # of one drawing
PREVIEW_SECONDS = 0.25  # between two pictures of the predicted x_0, at least
SAMPLER = ("dpm-solver++", 20)  # of the page for diffusions: the published 250 steps are slow to watch

# The options of sample.py that the page has, as the page calls them
TITLES = {
    "ckpt": "Checkpoint", "labels": "Classes", "prompt": "Prompts", "vector": "sample.py with --vector",
    "samples_per_label": "Number of images", "interpolate": "Interpolate",
    "image_size": "Size", "cfg_scale": "Guidance", "sampler": "Sampler", "num_sampling_steps": "Steps", "seed": "Seed",
}  # fmt: skip


@contextlib.contextmanager
def page_words():
    """Let errors of the block say the page's titles in place of the flags."""
    try:
        yield
    except UserError as error:
        text = re.sub(r"--([a-z0-9-]+)", lambda found: TITLES.get(found[1].replace("-", "_"), found[0]), str(error))
        raise UserError(text) from None


def find_checkpoints(first=None):
    """Paths of `first`, if given, of the models in assets/, of the checkpoints below demo/ and results/, the newest first,
    and of the released ones. Raises UserError where there are none."""
    found = [path for folder in ("demo", "results") for path in Path(folder).glob("**/checkpoints/*.pt")]
    found = [path for path in found if re.fullmatch(r"\d{7,}", path.stem) and path.is_file()]
    found.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    paths = [newest_of_run(first)] if first else []
    small, released = sorted(Path("assets").glob("*.safetensors")), sorted(Path("pretrained_models").glob("*.pt"))
    paths += map(str, [*small, *found, *released])
    if not paths:
        raise UserError("--ckpt: there is no checkpoint below demo/ or results/; run `make demo`, or name one")
    return list(dict.fromkeys(paths))


def page_config(values, compute, vae=None):
    """The SampleConfig of the page's values, a dict with keys of TITLES; `samples_per_label` counts the images of each
    class, or those of a row that interpolates. Lines of `prompt` take the place of classes. Raises UserError."""
    with page_words():
        prompts = [line.strip() for line in (values.get("prompt") or "").splitlines() if line.strip()]
        labels, interpolate = prompts or values["labels"], values["interpolate"]
        # it is checked here: a SampleConfig that interpolates has it in another field
        count = SampleConfig(samples_per_label=values["samples_per_label"]).samples_per_label
        if not labels:
            raise UserError("--labels: choose one or more, or write --prompt for a model of texts")
        if interpolate and (len(labels) < 2 or count < 2):
            raise UserError("--interpolate: needs two classes or more, and two images or more")
        number = (len(labels) - bool(interpolate)) * count
        if number > MAX_IMAGES:
            raise UserError(f"--samples-per-label: {number} in all are too many at once; draw {MAX_IMAGES} or fewer")
        columns = count if interpolate else min(4 // count * count or min(count, 8), number)
        own = {"samples_per_label": 1 if interpolate else count, "columns": columns, "captions": True, "vae": vae,
               "labels": None if prompts else labels, "prompt": prompts or None,
               "interpolate": "classes" if interpolate else None}  # fmt: skip
        return SampleConfig.from_flat({**compute.flat(), **recorded_drawing(values), **values, **own})


class Artist:
    """Draws for all visitors, and keeps the last model."""

    def __init__(self):
        self.key = self.pipeline = self.state = None
        self.lock = threading.Lock()  # of torch's own random stream: a drawing that was stopped may still be preparing

    def prepare(self, opened, seed):
        """(pipeline, generator) to draw from an `Opened` with the random stream of sample.py.

        On a CPU this stream begins with the model's initial weights, so that a new seed builds the model again; on a GPU
        the noise has a stream of its own."""
        checkpoint, on_cpu = opened.checkpoint, opened.device.type == "cpu"
        key = (checkpoint.path, *map(os.path.getmtime, checkpoint.files), seed if on_cpu else None)
        with self.lock:
            if key != self.key:
                self.key = self.pipeline = None  # frees the memory before the next model needs it
                torch.manual_seed(seed)
                self.pipeline = Pipeline.build(opened, draw_initial_weights=on_cpu)
                self.key, self.state = key, torch.get_rng_state()
            kept, state = self.pipeline, self.state
        generator = torch.Generator(opened.device)
        generator = generator.set_state(state) if on_cpu else generator.manual_seed(seed)
        return kept.vary(opened), generator

    def draw(self, config):
        """Draw the images of a `page_config`: an iterator of (config, step, images, titles). The images (N, H, W, 3) are
        the predicted x_0 of the step, and at last, with step 0, what sample.py draws. The config is completed so that
        sample.py writes the same grid. Raises UserError, in the page's words."""
        advice = "draw fewer images at once"
        with page_words(), explain_out_of_memory(advice):
            opened = Opened.open(config)
            choices = choose(config, opened)
            number = (len(choices) - 1) * config.columns if config.editing.interpolate else len(choices)
            opened.check_memory(number, advice)
            config = replace(opened.config, enlarge=max(1, 96 // max(sides(opened.settings["image_size"]))))
            pipeline, generator = self.prepare(opened, config.seed)
            start, titles = draw_noise(pipeline, choices, config.editing, config.columns, generator)
            due = 0.0
            for out in pipeline.steps(**start):
                begin = time.monotonic()
                if out["step"] and begin >= due:
                    yield config, out["step"], pipeline.to_pixels(out["pred_xstart"]), titles
                    due = time.monotonic() + max(PREVIEW_SECONDS, 4 * (time.monotonic() - begin))  # a fifth of the time
            yield config, 0, pipeline.to_pixels(out["sample"]), titles


def offers(ckpt, vae=None, compute=None):
    """What the page offers for a checkpoint: ([(text, word)] of its classes, default words, (sampler, steps, guidance),
    sizes). There are no classes for a model of texts or vectors. Raises UserError."""
    opened = Opened.open(SampleConfig.from_flat({"ckpt": ckpt, "vae": vae, **(compute or ComputeConfig()).flat()}))
    condition, objective = opened.condition, OBJECTIVES[opened.checkpoint.model_config["objective"]]
    (sampler, steps), choices = objective.default_sampler if objective.flow else SAMPLER, condition.all()
    settings = {"sampler": sampler, "num_sampling_steps": steps, "cfg_scale": opened.config.guidance.cfg_scale}
    settings = tuple((opened.checkpoint.drawing or {}).get(name, value) for name, value in settings.items())
    sizes = [*map(str, image_sizes(opened.checkpoint, opened.space))]
    if choices is None:
        return [], [], settings, sizes
    titles = zip(choices, condition.titles(choices), condition.words(choices), strict=True)
    texts = [(str(i) if title == str(i) else f"{i} {title}", word) for i, title, word in titles]
    return texts, condition.words(condition.default()), settings, sizes


# ----------------------------------------------------------------------------------------------------------------------
# Pictures that carry their settings, as text chunks of the PNG format


def draw_grid(config, images, titles):
    """The grid that sample.py draws, a PIL image; of clips the strips of their frames."""
    return grid.draw_grid(grid.as_pictures(images), config.columns, config.enlarge, titles)


def write_pictures(folder, config, images, titles):
    """Write the grid and every image to `folder`, with their settings, and an archive of them all. Returns (path of the
    grid, [(path, title)] of the images, path of the archive)."""
    texts = {"command": command(config), "settings": json.dumps(config.flat())}

    def write(name, picture, **more):
        info = PngImagePlugin.PngInfo()
        for key, text in (texts | more).items():
            info.add_text(key, text)
        grid.write_picture(path := os.path.join(folder, name), picture, pnginfo=info)
        return path

    path, singles = write("grid.png", draw_grid(config, images, titles)), []
    for i, (pixels, title) in enumerate(zip(images, titles, strict=True)):
        if images.ndim == 5:  # a clip, which plays
            grid.write_images(clip := os.path.join(folder, f"{i:03d}.webp"), pixels[None], 1, config.enlarge)
            singles.append((clip, title))
        else:
            singles.append((write(f"{i:03d}.png", Image.fromarray(pixels), image=str(i), caption=title), title))
    with zipfile.ZipFile(os.path.join(folder, "images.zip"), "w") as archive:
        for member in (path, *dict(singles)):
            archive.write(member, os.path.basename(member))
    return path, singles, archive.filename


def read_settings(path):
    """The page's values, with keys of TITLES, of a picture of `write_pictures`. Raises UserError."""
    try:
        with Image.open(path) as picture:
            config = SampleConfig.from_flat({"ckpt": "", "labels": [], **json.loads(picture.info["settings"])})
    except (OSError, Image.DecompressionBombError, KeyError, ValueError, TypeError, AttributeError, RecursionError):
        raise UserError("this file holds no settings; choose a picture that this page or its download has made") from None
    values = {name: value for name, value in config.flat().items() if name in TITLES and name != "vector"}
    interpolate = config.editing.interpolate == "classes"
    values |= {"labels": values["labels"] or [], "prompt": "\n".join(values["prompt"] or []), "interpolate": interpolate}
    return values | {"samples_per_label": config.columns if interpolate else config.samples_per_label}
