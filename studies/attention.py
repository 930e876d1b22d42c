"""Attention of models of clips, compared at equal processor time: over all tokens (adaln-zero), within frames and then over
time (space-time), and within frames alone (frames), a model without time.

    OMP_NUM_THREADS=1 python -m studies.attention --init-from results/frames --seconds 120 --frames 6

The designs train on the moving digits in turns, a step each, from random weights or from those of a model of single frames,
until each has used its seconds of the processor. Then clips are drawn from the same noise, and judged as by
`studies.moving`. Lines of the table: GMACs of a forward pass, processor time of a step, the loss of held-out clips at all
times and at those with more noise than signal (t > 600), and the judge's numbers.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.timing import table
from checkpoint.opened import Checkpoint
from data.autoencoder import Pixels, to_model_range
from data.clips import SIDE, MovingDigits
from data.order import GlobalOrder
from models import BLOCKS, DiTBlock
from runtime.config import Config, option
from runtime.errors import UserError
from runtime.parser import Parser
from sampling.config import GuidanceConfig, SamplerConfig
from sampling.pipeline import Pipeline, to_uint8
from studies.moving import measure, real_clips
from studies.recipes import begin
from training.cost import forward_macs
from training.finetune import inflate

RECIPE = "--data-path moving-mnist --vae none --image-size 32 --num-classes 10 --recipe fast --ema-warmup --device cpu"
SIZES = ("hidden_size", "depth", "num_heads")


class FramesBlock(DiTBlock):
    """adaLN-Zero whose tokens attend to those of their own frame: each frame is an image."""

    needs_frames = True

    def forward(self, x, c, frames, text=None, rope=None):
        positions = {} if rope is None else {"rope": rope[: x.shape[1] // frames]}
        x = x.unflatten(1, (frames, -1)).flatten(0, 1)  # (N F, T / F, D)
        x = super().forward(x, c.repeat_interleave(frames, dim=0), text, **positions)
        return x.unflatten(0, (-1, frames)).flatten(1, 2)


@dataclass(frozen=True)
class AttentionConfig(Config):
    """Options of attention.py."""

    init_from: str | None = option(None, "a model of single moving digits, of whose sizes and weights all start (default: "
        "random)", metavar="WHERE")  # fmt: skip
    blocks: tuple[str, ...] = option(("adaln-zero", "space-time", "frames"), "designs", choices=(*BLOCKS, "frames"))
    seconds: float = option(120.0, "processor time of each design's training", above=0)
    seeds: tuple[int, ...] = option((0,), "of weights, data and noise of the training", low=0)
    frames: int = option(6, "of a clip", low=2, high=64)
    hidden_size: int = option(48, "width, without --init-from", low=1)
    depth: int = option(5, "blocks, without --init-from", low=1)
    num_heads: int = option(2, "heads, without --init-from", low=1)
    batch: int = option(8, "clips of an update", low=1)
    lr: float = option(2e-3, "learning rate, constant after 50 steps", above=0)
    samples: int = option(50, "clips to draw", low=10)
    cfg_scale: float = option(2.0, "guidance scale", low=0)


class Run:
    """The training of one design with one seed."""

    def __init__(self, config, block, seed, source):
        sizes = vars(source.sizes) if source else vars(config)
        words = f"{RECIPE} --block {block} --num-frames {config.frames} --patch-size 4 --rope --global-seed {seed}"
        words += f" --global-batch-size {config.batch} --lr {config.lr} --lr-warmup-steps 50"
        words += "".join(f" --{name.replace('_', '-')} {sizes[name]}" for name in SIZES)
        self.data = MovingDigits(SIDE, seed, config.frames)
        _, self.trainer = begin(words.split(), Pixels(1), len(self.data))
        self.block, self.seed, self.seconds, model = block, seed, 0.0, self.trainer.model
        if source:
            weights = {**inflate(source.weights, source.sizes, model), "pos_embed": model.pos_embed}
            for weighted in (model, *(ema.module for ema in self.trainer.emas.values())):
                weighted.load_state_dict(weights)
        self.batches = iter(GlobalOrder(len(self.data), config.batch, seed, 0, 1, 0, 2**62))

    def step(self):
        items = [self.data.read(index) for index, _ in next(self.batches)]
        start = time.process_time()
        self.trainer.step({name: torch.stack([torch.as_tensor(item[name]) for item in items]) for name in items[0]})
        self.seconds += time.process_time() - start

    @torch.inference_mode()
    def row(self, config):
        """The numbers of the averaged weights, a dict."""
        model, held_out = self.trainer.ema.module.eval(), MovingDigits(SIDE, 10**6, config.frames)
        items = [held_out.read(index) for index in range(96)]
        x_0, y = to_model_range(torch.stack([i["image"] for i in items])), torch.tensor([i["label"] for i in items])
        t, noise = torch.linspace(5, 995, 96), torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
        parts = zip(*(values.split(16) for values in (x_0, t, y, noise)), strict=True)
        losses = [self.trainer.objective.training_losses(model, x, t, {"y": y}, n)["loss"] for x, t, y, n in parts]
        found = {"loss": float(torch.cat(losses).mean()), "loss_t600": float(torch.cat(losses)[t > 600].mean())}
        labels, clips = np.arange(config.samples) % 10, []
        pipeline = Pipeline(model, Pixels(1), SamplerConfig("ddim", 20, eta=1.0), GuidanceConfig(config.cfg_scale))
        for part in np.array_split(np.arange(config.samples), -(-config.samples // 50)):
            clips.append(to_uint8(pipeline(labels[part], *pipeline.noise(0, part.tolist())))[..., 0])
        steps = self.trainer.steps_made
        costs = {"GMACs": forward_macs(model.to("meta")) / 1e9, "ms_a_step": 1e3 * self.seconds / steps, "steps": steps}
        return {"block": self.block, "seed": self.seed, **costs, **found, **measure(np.concatenate(clips), labels)}


def main(argv=None):
    BLOCKS["frames"] = FramesBlock
    parser = Parser(AttentionConfig, __doc__)
    config = parser.parse(argv)
    with parser.report_errors():
        torch.set_num_threads(1)
        source, rows = Checkpoint.open(config.init_from) if config.init_from else None, []
        if source and (source.sizes.sides, source.sizes.patch) != ((1, SIDE, SIDE), (1, 4, 4)):
            problem, way_out = "no model of single moving digits", "train one: --num-frames 1 --patch-size 4 --rope"
            raise UserError(f"--init-from {config.init_from}", problem, way_out)
        for seed in config.seeds:
            runs = [Run(config, block, seed, source) for block in config.blocks]
            while open_runs := [run for run in runs if run.seconds < config.seconds]:
                for run in open_runs:
                    run.step()
            rows += [run.row(config) for run in runs]
        real = measure(*real_clips(min(config.samples, 1000), config.frames))
        print(table([*rows, {"block": "real clips", **real}]))


if __name__ == "__main__":
    main()
