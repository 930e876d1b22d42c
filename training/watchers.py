"""What is watched while a model is trained. A watcher is an object with `every`, the steps between two calls (None: never),
that is called with the Trainer, on all ranks. It returns {name: number or PIL image} for the run's records, a line for the
log, or None; rank 0's counts. One that has `at_end` is called after the last step too; `line(values)` makes the line of the
log. Training goes on as if it had not been called: torch's random state is set anew in each step, the weights must stay.

    class WeightNorm:
        every = 100

        def __call__(self, trainer):
            return {"weight_norm": float(torch.nn.utils.get_total_norm(trainer.ema.weights))}
"""

import dataclasses

import numpy as np
import torch

from data.autoencoder import encode_batch
from data.condition import EXAMPLES
from data.config import COLUMNS
from data.images import load_dataset
from data.latents import StoredLatents
from data.order import batches_of_one_shape, make_loader
from data.table import beside_the_data, columns_in, is_table
from diffusion.registry import OBJECTIVES
from runtime import seeds
from runtime.errors import UserError, about
from runtime.shapes import sides
from sampling.config import GuidanceConfig, choose_sampler
from sampling.grid import as_pictures, draw_grid
from sampling.pipeline import Pipeline, to_uint8
from training.setup import divide

SEED = 0  # of the noise: the same in all runs, so that their grids can be compared
MIN_SIDE = 64  # pixels; smaller images are enlarged to about this
MAX_IMAGES = 512  # of a larger folder of held-out images, chosen at random
NUM_TIMESTEPS, NUM_RANGES = 1000, 4  # each held-out image is seen once in each range of t


class Samples:
    """A grid of images that the averaged weights draw, with the same noise and conditions each time, every --sample-every
    steps and at the end. All ranks draw a part of it. config: MonitorConfig. image_size: in pixels. Raises
    UserError for words that the condition does not know, and for a sampler that cannot draw from the model."""

    at_end = True

    def __init__(self, config, trainer, image_size):
        self.every, self.context, self.condition = config.sample_every, trainer.context, trainer.condition
        self.average = config.watch_average
        self.batch_size, self.enlarge = min(trainer.part_size, EXAMPLES), max(1, MIN_SIDE // max(sides(image_size)))
        self.sides = trainer.model.sizes.sides
        objective, condition, device = trainer.model.objective, trainer.condition, trainer.device
        self.labels, self.titles = condition.examples(device)
        if words := config.sample_labels or config.sample_prompts:
            with about("--sample-labels" if config.sample_labels else "--sample-prompts", option=condition.option):
                choices = condition.parse(words)
            self.labels, self.titles = condition.encode(choices, device), condition.titles(choices)
        scale = config.sample_cfg_scale
        # guidance needs the null condition, and a meanflow has learned it
        guided = self.titles and trainer.recipe.label_dropout and not OBJECTIVES[objective].average
        scale = (4.0 if guided else 1.0) if scale is None else scale
        self.guidance = GuidanceConfig(cfg_scale=scale)
        self.sampler = choose_sampler("sample", objective, config.sample_sampler, config.sample_sampling_steps, scale)

    def __call__(self, trainer):
        with about("--sample-cfg-scale", option="--cfg-scale"):
            images = self.images(trainer)
        columns = num_columns(len(images)) if len(self.sides) == 2 else 1  # of clips each row is a strip
        return {"samples": draw_grid(images, columns, self.enlarge, self.titles)}

    def images(self, trainer):
        """The grid's images, uint8 (N, H, W, 3), on all ranks. Image i depends on its label and on i alone."""
        context, model = self.context, trainer.averaged(self.average)
        named = {"precision": trainer.compute.precision, "condition": self.condition}
        pipeline = Pipeline(model, trainer.space, self.sampler, self.guidance, **named)
        mine, drawn = range(context.rank, len(self.labels), context.world_size), []
        with context.together():
            for first in range(0, len(mine), self.batch_size):
                indices = mine[first : first + self.batch_size]
                drawn.extend(as_pictures(to_uint8(pipeline(self.labels[list(indices)], *pipeline.noise(SEED, indices)))))
        return np.stack(context.all_in_turn(drawn))


def num_columns(number):
    """Columns of a grid of `number` images: about square, and without gaps in the last row if possible."""
    square = int(np.ceil(number**0.5))
    return next((columns for columns in range(square, 2 * square + 1) if number % columns == 0), square)


class Validation:
    """The loss of the trained weights, or of --watch-average, on held-out images, every --val-every steps and at the end.
    It rises while the training loss falls where a model begins to memorise its images, in fine-tuning above all.

    config: MonitorConfig. data, model, vae, channels: DataConfig, ModelOptions, autoencoder, images' channels of the run.
    The held-out images are encoded once; each rank keeps its part on the CPU. Image, timestep and noise do not depend on
    --global-seed, so that runs can be compared. Raises UserError for images that cannot be used."""

    at_end = True

    def __init__(self, config, trainer, data, model, vae, channels):
        self.every, self.context, self.batch_size = config.val_every, trainer.context, trainer.part_size
        self.average, context, condition = config.watch_average, trainer.context, trainer.condition
        with beside_the_data(), about("--val-data-path", option="--data-path"), context.together():
            columns = {name: getattr(data, name) for name in COLUMNS}  # training's may be rows, these files
            path, there = config.val_data_path, dict.fromkeys(columns)
            if is_table(path):
                there = context.on_main(columns_in, path, columns)
            data = dataclasses.replace(data, data_path=path, flip=False, **there)
            held_out = load_dataset(data, model.image_size, 0, context, model.num_frames)
            if held_out.channels != channels:
                problem = f"has images of {held_out.channels} channels, training has {channels}"
                raise UserError(f"--data-path {data.data_path}", problem, "give held-out images of the same kind")
            space = held_out.open_space(vae)
            if statistics := getattr(trainer.space, "statistics", None):
                space.normalise_by(statistics)
            if trainer.model.sizes.other_sizes and not isinstance(held_out, StoredLatents):
                held_out.read_ratios(context)
                divide(held_out, trainer.model.sizes, space.factor)
            self.read(held_out, space.to(context.device), condition.for_data(held_out, data).to(context.device))

    def read(self, dataset, space, condition):
        """This rank's part: the images' numbers, x_0 (N, C, h, w) and y (N, ...)."""
        chosen = seeds.generator(0, seeds.VALIDATION).permutation(len(dataset))[:MAX_IMAGES]
        self.indices = chosen[self.context.rank :: self.context.world_size].tolist()
        self.batches = batches_of_one_shape(dataset, self.indices, self.batch_size)
        several = dataset.shape_of is not None
        self.shape_of = [dataset.shape_of[batch[0]] if several else 0 for batch in self.batches]
        self.shapes = ["{}x{}".format(*shape) for shape in dataset.shapes] if several else [""]
        # the encoder's posterior is sampled from torch's stream, which each training step sets anew
        torch.manual_seed(seeds.torch_seed(0, seeds.VALIDATION, self.context.rank))
        order, device = [[(index, 0) for index in batch] for batch in self.batches], self.context.device
        loader = make_loader(dataset, order)
        self.held_out = [(encode_batch(space, batch, device).cpu(), condition.y(batch, device).cpu()) for batch in loader]

    def __call__(self, trainer):
        return {f"val_loss{name}": loss for name, loss in self.losses(trainer).items()}

    def line(self, values):
        values = dict(values)
        mean = values.pop("val_loss")
        names = (name.removeprefix("val_loss_").replace("t_", "t ").replace("_", "-") for name in values)
        parts = (f"{loss:.4f} at {name}" for name, loss in zip(names, values.values(), strict=True))
        return f"Validation Loss: {mean:.4f} ({', '.join(parts)})"

    @torch.no_grad()
    def losses(self, trainer):
        """Mean losses over all images, on all ranks: "" of all t, "_t_0_249" of a range, "_256x384" of a shape."""
        model = trainer.averaged(self.average) if self.average else trainer.full(trainer.model)
        width, counts = NUM_TIMESTEPS // NUM_RANGES, [0] * len(self.shapes)
        sums = torch.zeros(NUM_RANGES, len(self.shapes), dtype=torch.float64)
        for part in range(NUM_RANGES):
            for batch, shape, (x_0, y) in zip(self.batches, self.shape_of, self.held_out, strict=True):
                random = [seeds.generator(0, seeds.VALIDATION, 1 + part, index) for index in batch]
                t = torch.tensor([part * width + int(generator.integers(width)) for generator in random])
                noise = [torch.from_numpy(generator.standard_normal(x_0.shape[1:], "float32")) for generator in random]
                noise = torch.stack(noise)
                x_0, t, noise, y = (values.to(trainer.device) for values in (x_0, t, noise, y))
                with trainer.autocast:
                    found = trainer.objective.training_losses(model, x_0, t, {"y": y}, noise)
                sums[part, shape] += found["loss"].cpu().double().sum()
                counts[shape] += len(batch)
        gathered = self.context.all_gather((sums, torch.tensor(counts) / NUM_RANGES))
        sums, counts = (sum(parts) for parts in zip(*gathered, strict=True))
        totals = (sums.sum(1) / counts.sum()).tolist()
        found = {"": sum(totals) / NUM_RANGES}
        found |= {f"_t_{part * width}_{(part + 1) * width - 1}": total for part, total in enumerate(totals)}
        of_shapes = zip(self.shapes, (sums.mean(0) / counts).tolist(), counts, strict=True)
        return found | {f"_{shape}": loss for shape, loss, count in of_shapes if shape and count}
