"""FID of a model during its training, or the Frechet distance between the features of other networks: all ranks draw
samples, rank 0 compares them with the reference.

config = EvalConfig(eval_every=1000, eval_reference="reference.npz")
fid = FID(config, trainer, 256)
fid.measure(trainer.averaged())
"""

import torch
from tqdm.auto import tqdm

from evaluation.extraction import complete, extract_all, gather_statistics
from evaluation.features import load_network
from evaluation.image_sets import need_images, open_reference
from evaluation.metrics import Statistics, frechet_distance
from runtime.errors import about
from sampling.config import GuidanceConfig, choose_sampler
from sampling.pipeline import Pipeline, to_uint8

MAX_BATCH = 32  # images that a process draws at once, as sample_ddp.py does: a decoder needs more for each than training


def name_of(network):
    """What the distance between the features of this network is called in metrics.jsonl and by the trackers."""
    return "fid" if network == "inception" else f"fd_{network}"


class FID:
    """Measures FID of the averaged weights as an EvalConfig says; a watcher of `training.watchers`.

    image_size: of the images in pixels. signals: StopSignals, which end a measurement. average: the trainer's to
    measure, by its name. column: the run's --image-column, for a reference that has it. Of clips all frames are
    compared with the reference's images. Image i depends on (--global-seed, i) alone, so that the number of ranks
    changes the result by rounding at most. torch's random state and its precision settings stay as they are. All ranks
    make one, which measures the reference, and call it. Raises UserError for a reference or weights that cannot be
    used."""

    slow = True

    def __init__(self, config, trainer, image_size, signals=None, average=None, column=None):
        context, space, self.every, self.config = trainer.context, trainer.space, config.eval_every, config
        self.context, self.space, self.condition = context, space, trainer.condition
        self.batch_size, self.seed = min(trainer.part_size, MAX_BATCH), trainer.recipe.global_seed
        self.signals, self.average, scale = signals, average, config.eval_cfg_scale
        named, self.guidance = (config.eval_sampler, config.eval_sampling_steps), GuidanceConfig(cfg_scale=scale)
        self.sampler = choose_sampler("eval", trainer.model.objective, *named, scale)
        with context.together():
            reference = open_reference(config.eval_reference, "--eval-reference", image_size, column)
        context.on_main(reference.check)
        with about("--eval-features", option="--features"), context.together():
            weights, names = config.inception_weights, config.eval_features
            self.networks = {name: load_network(name, weights, context.device) for name in names}
            missing = need_images(self.networks, reference, "--eval-reference")
        features = missing and extract_all(missing, reference, context, self.batch_size, "features of the reference")
        self.references = {}  # {network: mean and covariance}, on rank 0
        for name, network in self.networks.items() if context.is_main else ():
            completed = complete(features.get(name), reference, network, context.device)
            self.references[name] = completed.mu, completed.sigma
        with torch.no_grad():  # of stored latents nothing was decoded yet: now, rather than after thousands of steps
            space.decode(torch.zeros(self.batch_size, space.channels, *trainer.model.sizes.sides, device=context.device))

    def __call__(self, trainer):
        with about("--eval-cfg-scale", option="--cfg-scale"):
            return self.measure(trainer.averaged(self.average))

    def line(self, values):
        titles = {name: "FID" if name == "inception" else f"FD of {name}" for name in self.networks}
        found = ", ".join(f"{title}: {values[name_of(name)]:.4f}" for name, title in titles.items())
        return f"{found} of {self.config.eval_samples:,} images"

    def measure(self, model):
        """{"fid": FID of `model`, "fid_samples": number of images} on rank 0, of other networks than Inception by the names
        of `name_of`; a line where a stop was asked for; None on other ranks. Raises UserError for images not finite."""
        assert not model.training, "labels would be dropped"
        statistics, found = self.draw(model), {}
        if isinstance(statistics, str) or statistics is None:
            return statistics
        for network, of_samples in statistics.items():
            name = name_of(network)
            found[name] = frechet_distance(*self.references[network], of_samples.mu, of_samples.sigma)
            found[f"{name}_samples"] = self.config.eval_samples
        return found

    def draw(self, model):
        """{network: Statistics of the samples' features} on rank 0, None on other ranks, or a line. Each rank draws one
        batch in each round, so that all ranks look for a stop equally often."""
        context, num_samples = self.context, self.config.eval_samples
        pipeline = Pipeline(model, self.space, self.sampler, self.guidance, condition=self.condition)
        statistics, round_size = {}, self.batch_size * context.world_size
        with tqdm(total=num_samples, desc="FID", unit="image", leave=False, disable=not context.is_main) as bar:
            for first in range(0, num_samples, round_size):
                if context.any([self.signals is not None and self.signals.requested])[0]:
                    return "FID: not measured, a stop was asked for"
                end = min(first + round_size, num_samples)
                indices = range(first, end)[context.rank :: context.world_size]
                with context.together():
                    if indices:
                        y = self.condition.random(self.seed, indices, context.device)
                        images = to_uint8(pipeline(y, *pipeline.noise(self.seed, indices)))  # (N, H, W, 3), on the CPU
                        images = torch.from_numpy(images).flatten(0, -4).to(context.device)  # of clips all frames
                        for name, network in self.networks.items():
                            pooled = network(images).pooled
                            statistics.setdefault(name, Statistics(pooled.shape[1], context.device)).update(pooled)
                bar.update(end - first)
        return gather_statistics(statistics, context)
