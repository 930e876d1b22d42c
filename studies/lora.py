"""Fine-tuning all weights, LoRA of two ranks, and training from scratch, on two sets of digits.

    OMP_NUM_THREADS=1 python -m studies.lora --output results/lora

The base is assets/mnist.safetensors, which draws MNIST's digits. "turned" are the same digits mirrored at their diagonal;
"enlarged" are scikit-learn's digits of 8x8 pixels, made 28x28. Each training is one of
train.py in a process of its own; of two learning rates on "turned" the better one counts, and is that of "enlarged". Then
digits are drawn, turned back or made small again, and a classifier of the original digits judges whether they show the
class that was asked for. The same command goes on where it was stopped.
"""

import json
import multiprocessing
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data.images import DATASETS, Digits, Mnist
from runtime.config import Config, option
from runtime.parser import Parser
from sampling.config import GuidanceConfig, SamplerConfig
from sampling.pipeline import Pipeline, to_uint8
from studies.digits import mnist, real_digits, to_vectors
from train import TrainConfig, train

BASE = Path(__file__).parents[1] / "assets/mnist.safetensors"
RECIPE = {
    "vae": "none", "image_size": 28, "num_classes": 10, "objective": "flow", "global_batch_size": 16, "lr_warmup_steps": 20,
    "lr_schedule": "cosine", "ema_decay": 0.98, "ema_warmup": True, "device": "cpu", "num_workers": 0, "log_every": 10,
}  # fmt: skip
SIZES = {"hidden_size": 160, "depth": 6, "num_heads": 4, "patch_size": 7}  # of the base
ARMS = {  # name: (options, learning rates)
    "all weights": ({"init_from": str(BASE)}, (1e-3, 3e-3)),
    "LoRA, rank 16": ({"init_from": str(BASE), "lora_rank": 16}, (3e-3, 1e-2)),
    "LoRA, rank 4": ({"init_from": str(BASE), "lora_rank": 4}, (3e-3, 1e-2)),
    "from scratch": (SIZES, (1e-3, 3e-3)),
}


class Turned(Mnist):
    source = "turned"

    @staticmethod
    def load():
        values, labels = Mnist.load()
        return turn(values), labels


class Enlarged(Mnist):
    source, title = "enlarged", "the enlarged digits"

    @staticmethod
    def load():
        values, labels = Digits.load()
        return resize(values, 28), labels


DATASETS |= {"turned": Turned, "enlarged": Enlarged}


def turn(values):
    """Images (N, H, H), mirrored at the diagonal; its own inverse."""
    return values.transpose(0, 2, 1)


def resize(values, side):
    """Values (N, H, H) in [0, 255] in another size."""
    resized = F.interpolate(torch.from_numpy(values)[:, None].float(), size=side, mode="bicubic", antialias=True)
    return resized[:, 0].clamp(0, 255).numpy()


def accuracy(data, images, labels):
    """Share of images (N, 28, 28) uint8 that the classifier of the original digits assigns to their label."""
    if data == "turned":
        found = mnist()[1].read(torch.from_numpy(turn(images).copy())[:, None])[1].numpy()
    else:
        found = real_digits()[2].predict(to_vectors(resize(images, 8)))
    return float((found == labels).mean())


@dataclass(frozen=True)
class LoraConfig(Config):
    """Options of the study."""

    output: str = option(help="folder for the runs and results.jsonl")
    steps: int = option(300, "updates of each training", low=20)
    samples: int = option(200, "digits that each model draws", low=10)


class Cost:
    """A watcher of train.py: processor seconds and the largest memory of the process so far."""

    every = 10

    def __call__(self, trainer):
        # not getrusage's, which begins with that of the process that started this one
        status = Path("/proc/self/status").read_text()
        return {"processor_seconds": time.process_time(), "peak_kib": int(status.split("VmHWM:")[1].split()[0])}


def train_arm(options):
    train(TrainConfig.from_flat(options), watchers=[Cost()])


def measure(config, data, arm, lr):
    """Train, in another process, and draw. Returns a dict of what was measured."""
    run = Path(config.output) / f"{data}-{arm.replace(', ', '-').replace(' ', '-')}-{lr:g}"
    options = {**RECIPE, **ARMS[arm][0], "lr": lr, "data_path": data, "max_steps": config.steps, "run_dir": str(run)}
    process = multiprocessing.get_context("spawn").Process(target=train_arm, args=(options,))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(process.exitcode)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "processor_seconds" in row]
    (first, last), (checkpoint,) = (rows[0], rows[-1]), (run / "checkpoints").glob("*.pt")
    pipeline = Pipeline.load(run, SamplerConfig("flow-heun", 10), GuidanceConfig(cfg_scale=2.0))
    labels = np.arange(config.samples) % 10
    images = to_uint8(pipeline(labels, *pipeline.noise(0, range(config.samples))))[..., 0]
    seconds = (last["processor_seconds"] - first["processor_seconds"]) / (last["step"] - first["step"])
    return {
        "data": data, "arm": arm, "lr": lr, "accuracy": accuracy(data, images, labels), "seconds_per_step": seconds,
        "peak_mib": last["peak_kib"] / 1024, "checkpoint_mb": checkpoint.stat().st_size / 1e6,
    }  # fmt: skip


def real(data, number):
    """The accuracy of real digits, turned or enlarged, and back."""
    values, labels = DATASETS[data].load()
    chosen = np.random.default_rng(0).permutation(len(labels))[:number]
    return accuracy(data, np.round(values[chosen]).astype(np.uint8), labels[chosen])


def main(argv=None):
    parser = Parser(LoraConfig, __doc__)
    config = parser.parse(argv)
    with parser.report_errors():
        path = Path(config.output) / "results.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        rates = {arm: rates for arm, (_, rates) in ARMS.items()}
        for data in ("turned", "enlarged"):
            for arm in ARMS:
                rows = [row for row in results if (row["data"], row["arm"]) == (data, arm)]
                for lr in rates[arm]:
                    if lr not in [row["lr"] for row in rows]:
                        rows.append(measure(config, data, arm, lr))
                        with open(path, "a") as file:
                            file.write(json.dumps(rows[-1]) + "\n")
                best = max(rows, key=lambda row: row["accuracy"])
                rates[arm] = (best["lr"],)
                others = "".join(f", {row['accuracy']:.1%} with {row['lr']:g}" for row in rows if row is not best)
                print(f"{data:9} {arm:14} {best['accuracy']:6.1%} with lr {best['lr']:g}{others};  "
                      f"{best['seconds_per_step']:.3f} s/step, {best['peak_mib']:.0f} MiB, {best['checkpoint_mb']:.1f} MB",
                      flush=True)  # fmt: skip
            print(f"{data:9} real digits    {real(data, config.samples):6.1%}", flush=True)


if __name__ == "__main__":
    main()
