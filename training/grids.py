"""Grids of images that the EMA weights draw during training, with the same noise and labels each time, and an animation of
them over the steps. All ranks draw a part of each grid."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from data.text_encoder import encode_texts
from runtime.errors import UserError
from runtime.files import check_regular
from sampling.config import GuidanceConfig, SamplerConfig
from sampling.grid import DURATION, LAST_DURATION, draw_grid, write_picture
from sampling.labels import parse_labels, readable_names
from sampling.pipeline import Pipeline, to_uint8

SAMPLER = SamplerConfig(sampler="dpm-solver++", num_sampling_steps=20)
NUM_IMAGES = 16  # of a grid whose labels are not given, if there are so many classes
SEED = 0  # of the noise: the same in all runs, so that their grids can be compared
MIN_SIDE = 64  # smaller images are enlarged to about so many pixels
MAX_FRAMES = 200  # of an animation
TITLE_HEIGHT = 20  # pixels


class Grids:
    """Draws a grid every --sample-every steps into the run's folder. Every rank makes it and calls it.

    config: TrainConfig. space: of the model's x_0, able to decode. class_names: of the data. text: what encodes the texts
    of a model of texts, and dataset: the data, where these come from. torch's random state and the weights stay as they
    are. Raises UserError for labels that the model does not have."""

    def __init__(self, config, session, space, class_names, text=None, dataset=None):
        monitor, num_classes = config.monitor, config.model.num_classes
        self.session, self.space, self.every = session, space, monitor.sample_every
        if not self.every:
            return
        if text:
            self.labels, self.captions = choose_texts(monitor.sample_prompts, text, dataset, session.context.device)
        else:
            names = readable_names(class_names, num_classes)
            labels = choose_labels(monitor.sample_labels, names, num_classes)
            self.captions = (
                [names[label] if label < len(names) else str(label) for label in labels] if num_classes else None
            )
            self.labels = torch.tensor(labels)
        scale = monitor.sample_cfg_scale
        if scale is None:  # guidance needs the null class
            scale = 4.0 if (num_classes or text) and config.recipe.label_dropout else 1.0
        self.guidance, self.precision = GuidanceConfig(cfg_scale=scale), config.compute.precision
        self.enlarge = max(1, MIN_SIDE // config.model.image_size)
        self.batch_size = min(config.recipe.global_batch_size // session.context.world_size, NUM_IMAGES)

    def draw_if_due(self):
        """Draw a grid and record it, if this step is one of those. Images that are not finite are a line in the log."""
        if not self.session.due(self.every):
            return
        trainer = self.session.trainer
        with self.session.meter.paused():
            try:
                images = self.images(trainer.whole(trainer.ema.module))
            except UserError as error:  # training need not end for it
                self.session.log(f"No samples at step {trainer.steps_made}: {error}")
                return
            self.session.record_grid(draw_grid(images, num_columns(len(images)), self.enlarge, self.captions))

    def images(self, model):
        """The grid's images, uint8 (N, H, W, 3), on all ranks. Image i depends on its label and on i alone."""
        context = self.session.context
        pipeline = Pipeline(model, self.space, SAMPLER, self.guidance, precision=self.precision)
        mine = range(context.rank, len(self.labels), context.world_size)

        def draw():
            batches = [mine[i : i + self.batch_size] for i in range(0, len(mine), self.batch_size)]
            return [
                pixels
                for batch in batches
                for pixels in to_uint8(pipeline(self.labels[list(batch)], *pipeline.noise(SEED, batch)))
            ]

        parts = context.all_gather(context.run_on_all_ranks(draw))
        return np.stack([parts[i % context.world_size][i // context.world_size] for i in range(len(self.labels))])

    def animate(self):
        """After the loop: write samples.gif beside the grids' folder, if the run is finished."""
        if not self.every or self.session.outcome != "finished":
            return
        run_dir = Path(self.session.run_dir)
        if self.session.context.run_on_main(lambda: write_animation(run_dir, run_dir / "samples.gif")):
            self.session.log(f"Animation of the samples: {run_dir / 'samples.gif'}")


def choose_labels(words, names, num_classes):
    """Class numbers of --sample-labels; by default all classes, or NUM_IMAGES spread evenly over them if there are more.
    Raises UserError."""
    if words:
        try:
            return parse_labels(words, names, num_classes)
        except UserError as error:
            raise UserError(str(error).replace("--labels", "--sample-labels", 1)) from None
    if num_classes == 0:
        return [0] * NUM_IMAGES
    return (
        [i * num_classes // NUM_IMAGES for i in range(NUM_IMAGES)] if num_classes > NUM_IMAGES else list(range(num_classes))
    )


def choose_texts(prompts, text, dataset, device):
    """(y, captions) of --sample-prompts; by default of NUM_IMAGES images, spread evenly over the data."""
    if prompts:
        return text(prompts), list(prompts)
    keys = [(i * len(dataset) // NUM_IMAGES, 0) for i in range(NUM_IMAGES)]
    captions = dataset.captions
    texts = [captions.texts[captions.choose(dataset.seed, *key)] for key in keys]
    return encode_texts(text, dataset.texts(keys), device), texts


def num_columns(number):
    """Columns of a grid of `number` images: about square, and without gaps in the last row if possible."""
    square = int(np.ceil(number**0.5))
    return next((columns for columns in range(square, 2 * square + 1) if number % columns == 0), square)


def grid_paths(run_dir):
    """The grids of a run's folder in the order of their steps."""
    return sorted(path for path in (Path(run_dir) / "samples").glob("*.png") if path.stem.isdecimal())


def write_animation(run_dir, output):
    """Write an animation of a run's grids, with the step above each, to `output`, a .gif. Of more than MAX_FRAMES grids it
    shows so many, evenly spread; grids of another size than the latest are left out. Returns the number of frames, 0 where
    there are no grids. Raises UserError."""
    paths = grid_paths(run_dir)
    if not paths:
        return 0
    font, frames = ImageFont.load_default(size=14), []
    for i in np.linspace(len(paths) - 1, 0, min(len(paths), MAX_FRAMES)).round().astype(int):
        try:
            check_regular(paths[i])
            with Image.open(paths[i]) as file:
                grid = file.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # what PIL raises for damaged files
            raise UserError(f"{paths[i]}: not a readable picture ({error}); remove it") from None
        frame = Image.new("RGB", (grid.width, grid.height + TITLE_HEIGHT), "white")
        frame.paste(grid, (0, TITLE_HEIGHT))
        center = grid.width / 2, TITLE_HEIGHT / 2
        ImageDraw.Draw(frame).text(center, f"step {int(paths[i].stem):,}", "black", font, anchor="mm")
        frames += [frame] if not frames or frame.size == frames[0].size else []
    first, *others = reversed(frames)
    durations = [DURATION * 3] * len(others) + [LAST_DURATION]
    write_picture(output, first, save_all=True, append_images=others, duration=durations, loop=0)
    return len(frames)
