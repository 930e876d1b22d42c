"""What to draw: the choice of classes, prompts or vectors for sample.py and the page, and for each image of a set."""

from collections.abc import Sequence
from dataclasses import dataclass

from data.captions import read_prompts
from data.condition import Condition, draw
from runtime.errors import UserError, about


def given_choices(opened, labels, prompts, vectors):
    """The choices that --labels, --prompt or --vector name for an `Opened`, a list or None. Raises UserError."""
    condition, given = opened.condition, {"--labels": labels, "--prompt": prompts, "--vector": vectors}
    for option, words in given.items():
        if words and option != condition.option:
            raise UserError(option, f"{opened.checkpoint.path} draws by {condition.describe()}", f"use {condition.option}")
    words = given.get(condition.option)
    return condition.parse(words) if words else None


def choose(config, opened):
    """The choice of each image of a SampleConfig. Raises UserError."""
    choices = given_choices(opened, config.labels, config.prompt, config.vector) or opened.condition.default()
    if config.editing.interpolate == "classes" and len(choices) < 2:
        raise UserError("--interpolate classes", f"needs two {opened.condition.option} or more")
    return [choice for choice in choices for _ in range(config.samples_per_label)]


def choices_of_set(config, opened):
    """The choices that a SampleSetConfig names; None for all that there are. Raises UserError."""
    with about("--prompts", option="--prompt"):
        choices = given_choices(opened, config.labels, config.prompts and read_prompts(config.prompts), config.vector)
        return choices or (None if opened.condition.all() is not None else opened.condition.default())


@dataclass(frozen=True)
class SetLabels:
    """What the images of a set are of: of `every` choice in turn, or image i of one that is drawn for (seed, i)."""

    condition: Condition
    every: Sequence
    in_turn: bool
    seed: int

    @classmethod
    def of(cls, config, opened, given):
        """Of a SetConfig, for an `Opened`. given: its `choices_of_set`."""
        every, in_turn = given or opened.condition.all(), bool(given or config.balanced_labels)
        return cls(opened.condition, every, in_turn, config.global_seed)

    def position(self, index):
        return index % len(self.every) if self.in_turn else draw(self.seed, [index], len(self.every))[0]

    def choices(self, indices):
        """Of the images `indices`."""
        return [self.every[self.position(index)] for index in indices]

    def label(self, index):
        """The number that the set records for image `index`."""
        return self.condition.label(self.every, self.position(index))
