"""FID of a model during its training: all ranks draw samples, rank 0 compares them with the reference.

evaluator = Evaluator(EvalConfig(eval_every=1000, eval_reference="reference.npz"), context, space, 256, 1000, 32, seed=0)
fid = evaluator(ema.module)
"""

import contextlib

import torch
from tqdm.auto import tqdm

from evaluation.image_sets import open_images
from evaluation.inception import POOLED, extract, gather_statistics, gaussians, inception_weights, load_inception
from evaluation.metrics import Statistics, frechet_distance
from runtime.errors import UserError
from sampling.config import GuidanceConfig, SamplerConfig
from sampling.noise import image_label
from sampling.pipeline import Pipeline, to_uint8


class Evaluator:
    """Measures FID as an EvalConfig says, with the paper's sampler.

    space: of the model's x_0. texts: function from images' indices to y, for a model of texts. image_size: side of the
    images in pixels. batch_size: images that a process draws at once. Image i depends on (seed, i) alone, so that the
    number of ranks changes the result by rounding at most. torch's random state, its precision settings and the model's
    mode stay as they are. Every rank has to make the Evaluator and to call it. Making it opens the reference and measures
    it. Raises UserError for a reference or weights that cannot be used."""

    def __init__(self, config, context, space, image_size, num_classes, batch_size, seed, texts=None):
        self.config, self.context, self.space, self.texts = config, context, space, texts
        self.num_classes, self.batch_size, self.seed = num_classes, batch_size, seed
        self.sampler = SamplerConfig(num_sampling_steps=config.eval_sampling_steps)
        self.guidance = GuidanceConfig(cfg_scale=config.eval_cfg_scale)
        reference = context.run_on_all_ranks(lambda: self.open_reference(image_size))
        context.run_on_main(reference.check)
        weights = context.run_on_main(lambda: inception_weights(config.inception_weights))
        self.network = context.run_on_all_ranks(lambda: load_inception(weights, context.device))
        features = None
        if "mu" not in reference.statistics:
            features = extract(self.network, reference, context, batch_size, "features of the reference")
        self.reference = gaussians(reference, features, context.device) if context.is_main else None

    def open_reference(self, side):
        """The reference's images. Raises UserError where samples of `side` pixels cannot be compared with them."""
        try:
            images = open_images(self.config.eval_reference)
        except UserError as error:
            raise UserError(f"--eval-reference {error}") from None
        if images.size and tuple(images.size) != (side, side):
            height, width = images.size
            raise UserError(
                f"--eval-reference {images.path}: {width}x{height} pixels, --image-size is {side}: the difference in "
                "sharpness would be part of the number; give a reference of that size"
            )
        if "mu" not in images.statistics and len(images) < 2:
            raise UserError(f"--eval-reference {images.path}: holds neither mu and sigma nor 2 images")
        return images

    def __call__(self, model, should_stop=None):
        """FID of `model` on rank 0. None on other ranks, after a stop, and where images are not finite, which is printed.

        should_stop(): whether to give up, the same on all ranks; asked before each batch."""
        try:
            with eval_mode(model):
                statistics = self.draw(model, should_stop)
        except UserError as error:  # training need not end for it
            self.context.print(f"FID cannot be measured: {error}")
            return None
        if statistics is None:
            return None
        return frechet_distance(self.reference["mu"], self.reference["sigma"], statistics.mu, statistics.sigma)

    def draw(self, model, should_stop):
        """Statistics of the samples' features on rank 0; None on other ranks and after a stop. Each rank draws one batch in
        each round, so that all ranks ask should_stop() equally often. Raises UserError, on all ranks, for images that are
        not finite."""
        context, num_samples = self.context, self.config.eval_samples
        pipeline = Pipeline(model, self.space, self.sampler, self.guidance)
        statistics = Statistics(POOLED, context.device)
        with tqdm(total=num_samples, desc="FID", unit="image", leave=False, disable=not context.is_main) as bar:
            for first in range(0, num_samples, self.batch_size * context.world_size):
                if should_stop and should_stop():
                    return None
                end = min(first + self.batch_size * context.world_size, num_samples)
                indices = range(first, end)[context.rank :: context.world_size]
                images = context.run_on_all_ranks(lambda indices=indices: self.images(pipeline, indices))
                if indices:
                    pooled, _, _ = self.network(torch.from_numpy(images).to(context.device))
                    statistics.update(pooled)
                bar.update(end - first)
        return gather_statistics(statistics, context)

    def images(self, pipeline, indices):
        """The images of these indices, uint8 (N, H, W, 3) on the CPU; None for no indices."""
        if not indices:
            return None
        labels = [image_label(self.seed, index, self.num_classes) for index in indices]
        labels = self.texts(indices) if self.texts else labels
        return to_uint8(pipeline(labels, *pipeline.noise(self.seed, indices)))


@contextlib.contextmanager
def eval_mode(model):
    """Every module of `model` in eval mode, and afterwards in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
