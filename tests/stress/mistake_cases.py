"""The mistakes that tests/stress/mistakes.py makes: wrong values of all options, and the table in mistakes.txt."""

import dataclasses
import importlib
import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path

from helpers import command_module
from stress.mistake_inputs import LISTS, WORDS

from runtime.config import field_types, flag

# A command line of each command that works; its files are those of mistake_inputs.py
VALID = {
    "train": "--data-path digits --vae none --image-size 8 --num-classes 10 --hidden-size 16 --depth 1 --num-heads 2 "
    "--patch-size 2 --global-batch-size 12 --lr 1e-3 --device cpu --log-every 2 --num-workers 0 --ckpt-every 2 "
    "--max-steps 4",
    "sample": "--ckpt in/tiny.pt --num-sampling-steps 2 --device cpu --labels 1 2 --output out.png",
    "sample_ddp": "--ckpt in/tiny.pt --num-sampling-steps 2 --num-fid-samples 4 --per-proc-batch-size 2 --device cpu "
    "--folder set",
    "evaluate": "in/reference.npz in/samples.npz --inception-weights in/inception.pth --device cpu",
    "likelihood": "--ckpt in/tiny.pt --data-path digits --num-images 4 --num-timesteps 4 --device cpu "
    "--output likelihood.json",
    "extract_latents": "--data-path in/images --out latents-new --vae in/vae --image-size 16 --batch-size 4 "
    "--num-workers 0 --device cpu",
    "complexity": "--model DiT-S/8 --image-size 64",
    "convert": "in/tiny.pt out.safetensors", "plot": "in/run-whole --output curves.png",
    "sweep": "--ckpt in/tiny.pt --ref in/reference.npz --num-fid-samples 4 --num-sampling-steps 2 --device cpu "
    "--inception-weights in/inception.pth --output swept",
    "app": "",
}  # fmt: skip
CONFIGS = {
    "train": "TrainConfig", "sample": "SampleConfig", "sample_ddp": "SampleSetConfig", "evaluate": "EvaluateConfig",
    "likelihood": "LikelihoodConfig", "extract_latents": "ExtractConfig", "complexity": "CostConfig",
    "convert": "ConvertConfig", "plot": "PlotConfig", "app": "AppConfig",
    "sweep": "SweepConfig",
}  # fmt: skip
TABLE = (Path(__file__).parent / "mistakes.txt").read_text()
KINDS = ("values", *re.findall(r"^\[(\w+)\]$", TABLE, re.M))


@dataclass(frozen=True)
class Case:
    """A mistake. word, more: what the line must hold. status: the exit statuses that are right; 0 is for no mistake.
    ranks: number of processes. alone: whether to start Python anew, as a user does. limit: bytes that a file may grow to.
    interrupt: the text after which Ctrl-C is pressed. slow: whether it takes seconds."""

    command: str
    kind: str
    argv: tuple
    word: str = ""
    status: tuple = (1, 2)
    ranks: int = 1
    alone: bool = False
    limit: int | None = None
    interrupt: str | None = None
    slow: bool = False
    more: str = ""

    @property
    def is_simple(self):
        """Whether any process can run it, and at once."""
        return self.ranks == 1 and not self.alone and self.limit is None and self.interrupt is None and not self.slow

    @property
    def name(self):
        extra = [f"{self.ranks} processes"] * (self.ranks > 1) + ["own process"] * self.alone
        extra += [f"files up to {self.limit} bytes"] * (self.limit is not None)
        return " ".join([self.command, *map(ascii, self.argv), *(f"[{word}]" for word in extra)])


def config_class(command):
    return getattr(importlib.import_module(command_module(command)), CONFIGS[command])


def value_cases(*commands):
    """Values of the wrong kind and out of bounds for every option of the commands, by the configs' own fields."""
    for command in commands:
        valid, own = VALID[command].split(), config_class(command)
        kinds = {name: of for part in nested(own) for name, of in field_types(part).items()}
        for field in own.all_fields():
            name, bounds = flag(field.name), field.metadata
            if field.default is dataclasses.MISSING:
                word = (bounds["metavar"] or field.name.upper()) if bounds["positional"] else name
                yield Case(command, "values", (), word)
            if bounds["positional"]:
                continue
            kind, count, _ = kinds[field.name]
            bad = ["", "wrong"] if bounds["choices"] else [""]
            if kind in (int, float):
                bad = ["", "wrong", "nan", str(2**70) if kind is int else "inf"]
                bad += [low - 1] if (low := bounds["low"]) is not None else []
                bad += [above] if (above := bounds["above"]) is not None else []
                bad += [high + 1] if (high := bounds["high"]) is not None else []
            wrong = [[name, *[str(value)] * (count if isinstance(count, int) else 1)] for value in bad]
            wrong = [[f"{name}=maybe"]] if kind is bool else wrong + [[name]] * (bounds["const"] is None)
            yield from (Case(command, "values", (*valid, *words), name) for words in wrong)
        yield Case(command, "values", (*valid, "--unknown-option", "1"), "--unknown-option")
        if command != "plot":  # takes any number of runs
            yield Case(command, "values", (*valid, "extra-word", "another", "third"), "another")


def nested(config):
    """A config class and those that are nested in it."""
    yield config
    for kind, _, _ in field_types(config).values():
        if hasattr(kind, "all_fields"):
            yield from nested(kind)


def table_cases():
    """The cases of mistakes.txt, in its order."""
    for line in TABLE.splitlines():
        if found := re.fullmatch(r"\[(\w+)\]", line):
            kind = found[1]
        elif line and not line.startswith("#"):
            left, word, more = (part.strip() for part in f"{line}| | ".split("|")[:3])
            commands, _, extra = left.partition(": ")
            settings = dict(part.partition("=")[::2] for part in more.split())
            status = settings.get("status", "130" if "interrupt" in settings else "1,2")
            fixed = {"status": tuple(map(int, status.split(","))), "interrupt": settings.get("interrupt")}
            fixed |= {word: word in settings for word in ("alone", "slow")}
            limits, ranks = settings.get("limit", "").split(","), settings.get("ranks", "1").split(",")
            word = word if "|" in line else extra.split()[0]
            made = expansions(extra.split(), word)
            for command, (words, said, more), limit, number in itertools.product(commands.split(", "), made, limits, ranks):
                needs = {"ranks": int(number), "limit": int(limit) if limit else None, **fixed}
                yield Case(command, kind, combine(VALID[command].split(), words), said, more=more, **needs)


def combine(valid, words):
    """The words added to the valid line; where they have arguments without a flag, these replace the line's own."""
    (own, valid), (given, words) = map(split_arguments, (valid, words))
    return (*(given or own), *valid, *words)


def split_arguments(words):
    """The arguments without a flag that the words begin with, and the others."""
    number = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    return words[:number], words[number:]


def expansions(words, expected, more=""):
    """(words, what the error must say, what else) for each choice in the braces of the words."""
    place = next((i for i, word in enumerate(words) if re.search(r"\{.+?\}", word)), None)
    if place is None:
        yield words, expected, more
        return
    before, choices, after = re.split(r"\{(.+?)\}", words[place], maxsplit=1)
    for of, choice in ((part, name) for part in choices.split(",") for name in LISTS.get(part, [part])):
        said = re.match(r"[\w.-]{0,30}", choice, re.ASCII)[0].removesuffix(".")
        made = [*words[:place], f"{before}{choice}{after}".replace("{}", choice), *words[place + 1 :]]
        yield from expansions(made, expected.replace("{}", said), more or WORDS.get(of, {}).get(choice, ""))


def all_cases():
    return [*value_cases(*CONFIGS), *table_cases()]


def copies(case, inputs):
    """The files and folders of the inputs that a case may change, since its words name them without in/."""
    words = [word.split("=")[-1].split(os.sep)[0] for word in case.argv]
    return [word for word in dict.fromkeys(words) if word not in ("", ".", "..") and os.path.lexists(inputs / word)]
