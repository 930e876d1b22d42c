"""Small autoencoders of several kinds, trained for a moment, and models of their latents; and what the time shift does.

    python -m studies.latents colours --data-path PHOTOS --output results/latents
    python -m studies.latents shift --data-path /path/to/cifar10/train --output results/shift

"colours": for each kind an autoencoder of diffusers with few channels is trained on crops of the photographs; then the
model of train.py learns its latents, with --latent-norm channel, and draws. A picture has photographs in its first row,
what the autoencoder makes of them in the second, and samples below. "shift": flows of 64-pixel images, of 12,288 numbers,
which differ in --time-shift alone. Both print Frechet distances of mean colours: of 2x2 parts, or of 8x8.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import trange

from data.autoencoder import load_space, to_model_range
from data.config import DataConfig
from data.images import MapDataset, load_dataset
from evaluation.metrics import Statistics, frechet_distance
from runtime.config import Config, option
from runtime.parser import Parser
from sampling.config import GuidanceConfig, SamplerConfig
from sampling.grid import draw_grid
from sampling.pipeline import Pipeline, to_uint8
from train import TrainConfig, train

SIDE = 64
MODEL = {
    "image_size": SIDE, "hidden_size": 96, "depth": 3, "num_heads": 4, "num_classes": 0, "label_dropout": 0.0, "lr": 1e-3,
    "global_batch_size": 16, "ema_decay": 0.99, "ema_warmup": True, "device": "cpu", "num_workers": 0, "objective": "flow",
}  # fmt: skip
WIDTHS = (8, 16, 32, 32)  # of the autoencoders' levels: a factor of 8
KINDS = {  # class of diffusers: arguments; all give 8 channels of 8x8 cells
    "AutoencoderKL": {
        "latent_channels": 8, "block_out_channels": WIDTHS, "norm_num_groups": 8, "layers_per_block": 1,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4},
    "AutoencoderDC": {"latent_channels": 8, **{
        f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in {
            "block_out_channels": WIDTHS, "block_types": "ResBlock", "layers_per_block": (1,) * 4,
            "qkv_multiscales": ((),) * 4}.items()}},
    "AutoencoderTiny": {"latent_channels": 8, "encoder_block_out_channels": (16,) * 4, "num_encoder_blocks": (1,) * 4,
        "decoder_block_out_channels": (16,) * 4, "num_decoder_blocks": (1,) * 4, "scaling_factor": 1.0},
}  # fmt: skip


@dataclass(frozen=True)
class LatentsConfig(Config):
    """Options of the study."""

    what: str = option(help="colours or shift", positional=True, choices=("colours", "shift"))
    data_path: str = option(help="a folder with one folder of images per class")
    output: str = option(help="folder for pictures and results")
    kinds: tuple[str, ...] = option(tuple(KINDS), "autoencoders of colours", choices=tuple(KINDS))
    autoencoder_steps: int = option(120, "updates of each autoencoder", low=1)
    steps: int = option(150, "updates of each model", low=1)
    shifts: tuple[float, ...] = option((1.0, 3**0.5, 3.0), "values of --time-shift")
    seeds: int = option(1, "models of each shift", low=1)
    num_samples: int = option(500, "images that each model of shift draws", low=2)
    num_images: int = option(5000, "images that are read, at most", low=2)


def main(argv=None):
    parser = Parser(LatentsConfig, __doc__)
    config = parser.parse(argv)
    with parser.report_errors():
        Path(config.output).mkdir(parents=True, exist_ok=True)
        images = read(config)
        (colours if config.what == "colours" else shift)(config, images)


def read(config):
    """(N, 3, SIDE, SIDE) uint8, in an order of a fixed seed."""
    dataset = load_dataset(DataConfig(config.data_path, flip=False), SIDE)
    chosen = np.random.default_rng(0).permutation(len(dataset))[: config.num_images]
    return torch.stack([dataset[int(index), 0]["image"] for index in chosen])


def colours(config, images):
    for kind in config.kinds:
        folder, run = (Path(config.output) / f"{kind}-{name}" for name in ("autoencoder", "run"))
        train_autoencoder(kind, images, config.autoencoder_steps).save_pretrained(folder)
        options = {"vae": str(folder), "latent_norm": "channel", "patch_size": 2, "max_steps": config.steps}
        pipeline = draw_from(images, run, options)
        photos, space = images[:8], load_space(str(folder)).to("cpu")
        decoded = torch.from_numpy(to_uint8(space.decode(space.encode(to_model_range(photos))))).permute(0, 3, 1, 2)
        samples = draw(pipeline, 64)
        rows = torch.cat([photos, decoded, samples[:24]]).permute(0, 2, 3, 1).numpy()
        draw_grid(rows, 8).save(Path(config.output) / f"{kind}.png")
        report(config, kind=kind, distance=distance(images, samples, 2), flips=distance(images[::2], images[1::2], 2))


def train_autoencoder(kind, images, steps):
    """A small autoencoder after some updates on crops: mean absolute error, and for a posterior a little of KL."""
    import diffusers  # takes seconds

    torch.manual_seed(0)
    vae = getattr(diffusers, kind)(**KINDS[kind])
    optimizer, random = torch.optim.AdamW(vae.parameters(), lr=2e-3), np.random.default_rng(0)
    for step in trange(steps, desc=kind):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        top, left = random.integers(SIDE - 32 + 1, size=2)
        batch = images[random.integers(len(images), size=8), :, top : top + 32, left : left + 32]
        x, kl = to_model_range(batch), 0.0
        latent = vae.encode(x)[0]
        if kind == "AutoencoderKL":
            latent, kl = latent.sample(), 1e-6 * latent.kl().mean()
        loss = (vae.decode(latent)[0] - x).abs().mean() + kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"{kind}: mean absolute error {loss:.3f} on the last batch")
    return vae.eval()


def shift(config, images):
    held_out, images = images[: len(images) // 5], images[len(images) // 5 :]
    for seed in range(config.seeds):
        for value in config.shifts:
            options = {"vae": "none", "patch_size": 8, "time_shift": value, "max_steps": config.steps, "global_seed": seed}
            pipeline = draw_from(images, Path(config.output) / f"shift-{value:.3g}-{seed}", options)
            pipeline.sampler = SamplerConfig("flow-heun", 10)
            samples = draw(pipeline, config.num_samples)
            draw_grid(samples[:32].permute(0, 2, 3, 1).numpy(), 8).save(
                Path(config.output) / f"shift-{value:.3g}-{seed}.png"
            )
            report(config, shift=value, seed=seed, distance=distance(held_out, samples, 8))
    report(config, real=distance(held_out, images[: config.num_samples], 8))


def draw_from(images, run, options):
    """The pipeline of a model that train.py has trained on the images."""
    dataset = MapDataset([*zip(images, [0] * len(images), strict=True)], classes=["photo"], seed=0)
    train(
        TrainConfig.from_flat({**MODEL, "data_path": "images in memory", "run_dir": str(run), **options}), dataset=dataset
    )
    return Pipeline.load(run, guidance=GuidanceConfig(cfg_scale=1.0))


def draw(pipeline, number):
    """(number, 3, SIDE, SIDE) uint8."""
    parts = [range(first, min(first + 64, number)) for first in range(0, number, 64)]
    drawn = [to_uint8(pipeline([0] * len(part), *pipeline.noise(0, part))) for part in parts]
    return torch.from_numpy(np.concatenate(drawn)).permute(0, 3, 1, 2)


def distance(images, others, cells):
    """The Frechet distance of the mean colours, in [0, 1], of cells x cells parts of the images."""
    parts = [F.adaptive_avg_pool2d(x.float() / 255, cells).flatten(1) for x in (images, others)]
    a, b = (Statistics(3 * cells**2).update(values) for values in parts)
    return frechet_distance(a.mu, a.sigma, b.mu, b.sigma)


def report(config, **values):
    line = json.dumps(values)
    print(line, flush=True)
    with open(Path(config.output) / "results.jsonl", "a") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    main()
