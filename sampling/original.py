"""What sample.py draws for a seed: the original release's classes and its random stream. app.py draws the same."""

import torch

from runtime.errors import UserError
from sampling.editing import interpolate_classes, interpolate_seeds

LABELS = ("207", "360", "387", "974", "88", "979", "417", "279")


def default_labels(num_classes):
    """The classes to draw where none are given: the original's of ImageNet, else the first eight. A list of text."""
    return [*LABELS] if num_classes == 1000 else [str(label) for label in range(min(num_classes, len(LABELS)))] or ["0"]


def choose_labels(config, source):
    """The class, or the prompt, of every image of a SampleConfig, a list of numbers. Raises UserError."""
    if source.text_encoder:
        check_prompts(source, "--prompt")
        if config.labels or config.editing.interpolate == "classes":
            option = "--labels" if config.labels else "--interpolate classes"
            raise UserError(f"{option}: {source.checkpoint.path} was trained on texts, not on classes; use --prompt")
        labels = range(len(source.class_names))
    else:
        labels = source.parse_labels(config.labels or default_labels(source.settings["num_classes"]))
    if config.editing.interpolate == "classes" and len(labels) < 2:
        raise UserError("--interpolate classes: needs two --labels or more")
    return [label for label in labels for _ in range(config.samples_per_label)]


def check_prompts(source, option):
    """Raises UserError where a model of texts has no prompts."""
    if source.text_encoder and not source.class_names:
        raise UserError(f"{option}: {source.checkpoint.path} was trained on texts; say what to draw with {option}")


def draw_noise(pipeline, labels, editing, columns, generator=None):
    """(z, y, captions, step_noise) of an image of each label, or of rows that interpolate. The stream is the original's: z,
    then at every step the noise of a doubled batch, whose second half, that of the unconditional images, is not used.

    editing: an EditingConfig. columns: images in a row that interpolates. generator: of the pipeline's device (default:
    torch's own). step_noise(x, i) draws, so that it must be called once for each step, in order."""
    z = torch.randn(len(labels), *pipeline.shape, device=pipeline.device, generator=generator)
    y = torch.tensor(labels, device=pipeline.device)
    captions, row = [pipeline.class_name(label) for label in labels], 1
    if editing.interpolate:
        row = columns
        if editing.interpolate == "seeds":
            z, y, captions = interpolate_seeds(z, y, captions, row, 1 if editing.to_seed is None else editing.to_seed)
        else:
            z, y, captions = interpolate_classes(z, y, captions, row, pipeline.num_classes)

    def step_noise(x, i):
        noise = torch.randn(2 * len(x) // row, *x.shape[1:], device=pipeline.device, generator=generator)
        return noise.chunk(2)[0].repeat_interleave(row, dim=0)  # one noise for the images of a row, else they would jump

    return z, y, captions, step_noise
