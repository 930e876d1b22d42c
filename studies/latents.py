"""Small autoencoders of several kinds, trained for a moment, and models of their latents; and what the time shift does.

    python -m studies.latents colours --data-path PHOTOS --num-images 20 --output results/latents
    python -m studies.latents shift --data-path /path/to/cifar10/train --output results/shift

"colours": for each kind an autoencoder of diffusers with few channels is trained on crops of the photographs; then the
model of train.py learns the latents of eight photographs by heart, each a class, with --latent-norm channel, and draws
them. The picture has the photographs in its first row, and for each kind what the autoencoder makes of them and below it
what the model draws. Both are measured: the share of the photographs' colours, see `explained`, that is there. "shift":
flows of 64-pixel images, of 12,288 numbers, which differ in --time-shift alone, and Frechet distances of mean colours.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import trange

from data.autoencoder import to_model_range
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
    "image_size": SIDE, "hidden_size": 96, "depth": 3, "num_heads": 4, "label_dropout": 0.0, "lr": 1e-3,
    "global_batch_size": 16, "ema_decay": 0.99, "ema_warmup": True, "device": "cpu", "num_workers": 0, "objective": "flow",
}  # fmt: skip
WIDTHS = (16, 16, 32, 32)  # of the autoencoders' levels: a factor of 8
KINDS = {  # class of diffusers: arguments; all give 8x8 cells
    # one group: a norm for each channel or two would take the mean colour away
    "AutoencoderKL": {
        "latent_channels": 4, "block_out_channels": WIDTHS, "norm_num_groups": 1, "layers_per_block": 1,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4},
    "AutoencoderDC": {"latent_channels": 8, **{
        f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in {
            "block_out_channels": (8, 16, 32, 32), "block_types": "ResBlock", "layers_per_block": (1,) * 4,
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
    autoencoder_steps: int = option(600, "updates of each autoencoder", low=1)
    steps: int = option(600, "updates of each model", low=1)
    shifts: tuple[float, ...] = option((1.0, 3**0.5), "values of --time-shift")
    seeds: int = option(2, "models of each shift", low=1)
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
    photos, labels = images[:8], range(len(images[:8]))
    rows = [photos]
    for kind in config.kinds:
        folder, run = (Path(config.output) / f"{kind}-{name}" for name in ("autoencoder", "run"))
        if not folder.exists():
            train_autoencoder(kind, images, config.autoencoder_steps).save_pretrained(folder)
        options = {"vae": str(folder), "latent_norm": "channel", "patch_size": 2, "max_steps": config.steps}
        pipeline = draw_from(photos, labels, run, options)
        decoded = to_uint8(pipeline.space.decode(pipeline.space.encode(to_model_range(photos))))
        rows += [torch.from_numpy(decoded).permute(0, 3, 1, 2), draw(pipeline, labels)]
        draw_grid(torch.cat(rows).permute(0, 2, 3, 1).numpy(), len(photos)).save(Path(config.output) / "colours.png")
        report(config, kind=kind, decoded=explained(photos, rows[-2]), drawn=explained(photos, rows[-1]))


def coarse(images):
    """The mean colours, in [0, 1], of 8x8 parts of uint8 images: (N, 3, 8, 8)."""
    return F.adaptive_avg_pool2d(images.float() / 255, 8)


def explained(images, others):
    """1 - |c(others) - c(images)|^2 / |c(images)|^2, where c are the mean colours of 8x8 parts less their mean grey: 1 for
    the same colours, 0 for grey pictures."""
    c, found = (x - x.mean(1, keepdim=True) for x in (coarse(images), coarse(others)))
    return float(1 - (found - c).square().sum() / c.square().sum())


def train_autoencoder(kind, images, steps):
    """A small autoencoder after some updates on crops: mean absolute error, squared error of the mean colours of 8x8
    pixels, and for a posterior a little of KL."""
    import diffusers  # takes seconds
    from diffusers.models.autoencoders.vae import AutoencoderTinyBlock

    torch.manual_seed(0)
    vae = getattr(diffusers, kind)(**KINDS[kind])
    if kind != "AutoencoderDC":  # which has shortcuts around all of its layers
        # PyTorch's default shrinks the signal in each layer: what AutoencoderTiny decodes hardly depends on the picture
        for module in vae.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        for module in vae.modules():
            if isinstance(module, AutoencoderTinyBlock):
                nn.init.zeros_(module.conv[-1].weight)  # of a residual branch
    optimizer, random = torch.optim.AdamW(vae.parameters()), np.random.default_rng(0)
    for step in trange(steps, desc=kind):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        top, left = random.integers(SIDE - 32 + 1, size=2)
        batch = images[random.integers(len(images), size=8), :, top : top + 32, left : left + 32]
        x, kl = to_model_range(batch), 0.0
        latent = vae.encode(x)[0]
        if kind == "AutoencoderKL":
            latent, kl = latent.sample(), 1e-6 * latent.kl().mean()
        error = vae.decode(latent)[0] - x
        loss = error.abs().mean() + 2 * F.avg_pool2d(error, 8).square().mean() + kl
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
    return vae.eval()


def shift(config, images):
    held_out, images = images[: len(images) // 5], images[len(images) // 5 :]
    for seed in range(config.seeds):
        for value in config.shifts:
            # a token's 192 numbers of noise have to pass through the model's width
            options = {"vae": "none", "patch_size": 8, "hidden_size": 256, "depth": 2, "global_batch_size": 8}
            options |= {"time_shift": value, "max_steps": config.steps, "global_seed": seed}
            pipeline = draw_from(images, [0] * len(images), Path(config.output) / f"shift-{value:.3g}-{seed}", options)
            samples = draw(pipeline, [0] * config.num_samples)
            draw_grid(samples[:32].permute(0, 2, 3, 1).numpy(), 8).save(
                Path(config.output) / f"shift-{value:.3g}-{seed}.png"
            )
            report(config, shift=value, seed=seed, distance=distance(held_out, samples))
    report(config, real=distance(held_out, images[: config.num_samples]))


def draw_from(images, labels, run, options):
    """The pipeline of a model that train.py has trained on the images."""
    dataset = MapDataset([*zip(images, labels, strict=True)], flip=False)
    train(
        TrainConfig.from_flat({**MODEL, "data_path": "images in memory", "run_dir": str(run), **options}), dataset=dataset
    )
    return Pipeline.load(run, SamplerConfig("flow-heun", 10), GuidanceConfig(cfg_scale=1.0))


def draw(pipeline, labels):
    """(N, 3, SIDE, SIDE) uint8 of N labels."""
    parts = [range(first, min(first + 64, len(labels))) for first in range(0, len(labels), 64)]
    drawn = [to_uint8(pipeline(labels[part.start : part.stop], *pipeline.noise(0, part))) for part in parts]
    return torch.from_numpy(np.concatenate(drawn)).permute(0, 3, 1, 2)


def distance(images, others):
    """The Frechet distance of the mean colours of 8x8 parts of the images."""
    a, b = (Statistics(192).update(coarse(x).flatten(1)) for x in (images, others))
    return frechet_distance(a.mu, a.sigma, b.mu, b.sigma)


def report(config, **values):
    line = json.dumps(values)
    print(line, flush=True)
    with open(Path(config.output) / "results.jsonl", "a") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    main()
