"""FID of a model while it trains: all ranks draw, rank 0 compares.

evaluator = Evaluator(args, context, space)     # once: refuses what cannot work, measures the reference
fid = evaluator(ema.module)
"""

import torch
from tqdm.auto import tqdm

from evaluation.image_sets import open_images
from evaluation.inception import POOLED, extract, gather_statistics, gaussians, inception_weights, load_inception
from evaluation.metrics import Statistics, frechet_distance
from runtime.errors import UserError
from sampling import pipeline as sampling


class Evaluator:
    """Measures as `args` say: eval_reference, eval_samples, eval_cfg_scale, eval_sampling_steps, inception_weights.

    Image i depends on (global_seed, i) alone, so the number of ranks changes the result by rounding at most; no random
    state of training is touched. Every rank has to make and call it. Raises UserError for an unusable reference."""

    def __init__(self, args, context, space):
        self.args, self.context, self.space = args, context, space
        self.batch_size = args.global_batch_size // context.world_size  # what fits in training fits here
        try:
            self.reference = open_images(args.eval_reference)
        except UserError as error:
            raise UserError(f"--eval-reference {error}") from None
        self.check(self.reference)
        weights = context.run_on_main(lambda: inception_weights(args.inception_weights))
        self.network = load_inception(weights, context.device)
        self.moments = self.measure_reference()

    def check(self, images):
        """Refuse, before anything slow, a reference that these samples cannot be compared with."""
        side = self.args.image_size
        if images.size and tuple(images.size) != (side, side):
            height, width = images.size
            raise UserError(
                f"--eval-reference {images.path}: {width}x{height} pixels, --image-size is {side}: the difference in "
                "sharpness would be part of the number; give a reference of that size"
            )
        if "mu" not in images.statistics and len(images) < 2:
            raise UserError(f"--eval-reference {images.path}: holds neither mu and sigma nor 2 images")
        self.context.run_on_main(images.check)

    def __call__(self, model, stop=None):
        """FID of `model`, in eval mode, on rank 0; None on the others, and where a requested `stop` cut it short."""
        statistics = self.draw(model, stop)
        return statistics and frechet_distance(*self.moments, statistics.mu, statistics.sigma)

    def measure_reference(self):
        """(mu, sigma) on rank 0: the file's own, or those of its images."""
        features = None
        if "mu" not in self.reference.statistics:
            features = extract(self.network, self.reference, self.context, self.batch_size, "features of the reference")
        return gaussians(self.reference, features)["fid"] if self.context.is_main else None

    @torch.inference_mode()
    def draw(self, model, stop):
        """Statistics of the samples' features, on rank 0; None on the others, or after a stop. In each round every rank
        draws one batch, so that all come to the question of stopping equally often."""
        args, context = self.args, self.context
        shape = (model.in_channels, model.input_size, model.input_size)
        statistics = Statistics(POOLED, context.device)
        with tqdm(total=args.eval_samples, desc="FID", unit="image", leave=False, disable=not context.is_main) as bar:
            for first in range(0, args.eval_samples, self.batch_size * context.world_size):
                if stop and context.any([stop.requested])[0]:
                    return None
                end = min(first + self.batch_size * context.world_size, args.eval_samples)
                indices = range(first, end)[context.rank :: context.world_size]
                if indices:
                    statistics.update(self.features(model, shape, indices))
                bar.update(end - first)
        return gather_statistics(statistics, context)

    def features(self, model, shape, indices):
        args, device = self.args, self.context.device
        steps, scale = args.eval_sampling_steps, args.eval_cfg_scale
        noise = sampling.image_noise(args.global_seed, indices, steps, shape).to(device)
        y = [sampling.image_label(args.global_seed, index, args.num_classes) for index in indices]
        y = torch.tensor(y, device=device)
        images = sampling.draw(model, self.space, y, noise, scale, steps)
        pooled, _, _ = self.network(torch.from_numpy(sampling.to_uint8(images)).to(device))
        return pooled
