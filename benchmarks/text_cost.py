"""What texts cost: time of a training step, and memory, of a model of texts beside the model of classes of the same size.

    python -m benchmarks.text_cost --model DiT-S/4 --image-size 128 --batch-size 16 --device cpu
    python -m benchmarks.text_cost --model DiT-XL/2 --batch-size 32 --text-width 4096 --precision bf16 --device cuda

Latents and texts are stored ones, so that neither the autoencoder nor the text encoder runs. The two models take turns,
each in a process of its own; medians are printed. The memory is what `complexity.py` counts.
"""

import dataclasses
from dataclasses import dataclass

import torch

from benchmarks import timing
from benchmarks.train_step import SPACE
from checkpoint.config import MAX_SIZE, DesignOptions, ModelOptions
from data.text_encoder import StoredTexts
from runtime import distributed
from runtime.config import Config, option
from runtime.parser import Parser
from training import setup
from training.config import ComputeConfig, RecipeConfig
from training.cost import forward_macs, training_memory
from training.trainer import Trainer


@dataclass(frozen=True)
class TextCostConfig(Config):
    """Options of text_cost.py."""

    model: ModelOptions
    design: DesignOptions
    compute: ComputeConfig
    batch_size: int = option(16, "images of a step", low=1, high=65536)
    text_width: int = option(1024, "width of a text's tokens", low=1, high=MAX_SIZE)
    text_length: int = option(120, "tokens of a text, with padding", low=1, high=MAX_SIZE)
    repeats: int = option(10, "number of timed rounds", low=1, high=100_000)
    calls: int = option(1, "steps in a round", low=1, high=10_000)

    @property
    def recipe(self):
        return RecipeConfig(global_batch_size=self.batch_size)


@dataclass
class Step:
    """Makes the training step of a model of texts, or of classes."""

    config: TextCostConfig
    with_text: bool

    def model_and_text(self):
        config, text = self.config, None
        if self.with_text:
            null = torch.randn(config.text_length, config.text_width + 1)
            text = StoredTexts("", "", config.text_width, config.text_length, null)
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=0))
        return setup.build_model(config, SPACE, text), text

    def __call__(self):
        config, (model, text) = self.config, self.model_and_text()
        model, size = timing.replace_zeros(model), config.batch_size
        batch = {"label": torch.zeros(size, dtype=torch.int64)}
        batch["moments"] = torch.rand(size, 2, 4, model.input_size, model.input_size).half()
        if text:
            lengths = torch.randint(5, text.length + 1, (size,))
            batch |= {"text_tokens": torch.randn(int(lengths.sum()), text.width).half(), "text_lengths": lengths}
        context, compute = distributed.setup(config.compute.device), config.compute
        trainer = Trainer(config.recipe, compute, context, model, SPACE, compute.precision or "fp32", text=text)
        return lambda: trainer.step(batch)


def measure(config):
    """{"classes" and "texts": {seconds, gmacs, parameters, memory in GiB}}."""
    steps = {"classes": Step(config, False), "texts": Step(config, True)}
    timings, report = timing.race(steps, config.compute.device or "cpu", config.repeats, calls=config.calls), {}
    for name, step in steps.items():
        with torch.device("meta"):
            model = step.model_and_text()[0]
        report[name] = {
            "seconds": timings[name].median,
            "gmacs": forward_macs(model) / 1e9,
            "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "memory_gib": training_memory(model, config.batch_size, config.compute.precision or "fp32")["total"] / 2**30,
        }
    return report


def main(argv=None):
    parser = Parser(TextCostConfig, __doc__)
    config = parser.parse(argv)
    with parser.report_errors():
        report = measure(config)
        print(f"{config.model.model}, {config.model.image_size} px, batch {config.batch_size}, texts of "
            f"{config.text_length} tokens of width {config.text_width}")  # fmt: skip
        for name, row in report.items():
            sizes = f"{row['gmacs']:10.2f} GMACs{row['parameters'] / 1e6:10.2f} M parameters{row['memory_gib']:9.2f} GiB"
            print(f"{name:10}{row['seconds']:9.4f} s a step{sizes}")


if __name__ == "__main__":
    main()
