"""The digits drawn by prompts: whether a model draws what the words say. Also makes a random text encoder to compare with.

    python -m studies.text_digits --ckpt demo/text/run/checkpoints/0001000.pt
    python -m studies.text_digits --make-encoder demo/random

The captions of the data are made from the templates in data/captions.py. UNSEEN has templates that are never trained on,
WORDINGS words that are never trained on: the text encoder alone can know what they mean. The random encoder is a small T5:
each word of a text leaves a token of its own. Its tokenizer knows the words of UNSEEN, as that of a real encoder would, and
spells those of WORDINGS. Prints, for each kind of prompts, the share of images that a classifier of real digits assigns to
the digit in the prompt, and for prompts without a digit the digits that are drawn. The exit status is 1 where a bound is
missed.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from data.config import MAX_SIDE
from runtime.config import Config, option
from runtime.errors import UserError
from runtime.files import write_json
from runtime.parser import Parser
from sampling.config import ComputeConfig, GuidanceConfig, SamplerConfig

UNSEEN = ("please draw me a {}", "this is what a {} looks like", "{} in black ink", "my favourite number is {}")
UNSEEN_WITHOUT_DIGIT = ("please draw me a number", "a picture in black ink")
COUNT = "one two three four five six seven eight nine".split()
WORDINGS = {  # {kind: prompts for 0, 1, ... 9, None where there is none}
    "plurals": [f"look, {word}s" for word in "zeroe one two three four five sixe seven eight nine".split()],
    "ordinals": [None, *(f"the {n} digit" for n in "first second third fourth fifth sixth seventh eighth ninth".split())],
    "Roman numerals": [None, *"I II III IV V VI VII VIII IX".split()],
    "successors": [None, *(f"the number after {word}" for word in ["zero", *COUNT[:-1]])],
    "groups": [None, *"a soloist,a pair,a trio,a quartet,a quintet,a sextet,a septet,an octet".split(","), None],
    "misspelt": "zerro wone tow thre foor fife siks sevn eigth nien".split(),
}
BOUNDS = {"trained templates": ("accuracy", 0.95), "no digit, trained": ("digits", 8)}


@dataclass(frozen=True)
class TextDigitsConfig(Config):
    """Options of text_digits.py."""

    compute: ComputeConfig
    make_encoder: str | None = option(None, "folder to make the text encoder in (default: none is made)", metavar="FOLDER")
    width: int = option(64, "width of the encoder's tokens", low=8, high=MAX_SIDE)
    ckpt: str | None = option(None, "model to measure (default: none is measured)")
    images: int = option(480, "images for each kind of prompts, and a quarter of them for each of words that are never "
        "trained on", low=20, high=100_000)  # fmt: skip
    cfg_scale: float = option(3.0, "guidance scale", low=0)
    output: str | None = option(None, "also write the numbers to this .json file", metavar="FILE", path="output")

    def check(self):
        if bool(self.make_encoder) == bool(self.ckpt):
            raise UserError("--make-encoder, --ckpt: give one of the two")


def make_encoder(folder, width=64, seed=0):
    """Write a small T5 with random weights, and a tokenizer of the captions' words, to a folder. Returns the folder."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel, logging

    from data.captions import digit_captions

    texts = [*digit_captions(range(10)).texts, *UNSEEN, *UNSEEN_WITHOUT_DIGIT]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    special = ["<pad>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # so that unknown words are spelled out
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", model_max_length=64
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=16, d_ff=2 * width, num_layers=2, num_heads=4)
        T5EncoderModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def kinds_of_prompts():
    """{kind: [(prompt, digit, or None where the prompt has none)]}."""
    from data.captions import TEMPLATES, WITHOUT_DIGIT, WORDS

    def filled(templates):
        return [(template.format(word), digit) for template in templates for digit, name in enumerate(WORDS)
                for word in (name, digit)]  # fmt: skip

    wordings = {kind: [(text, digit) for digit, text in enumerate(texts) if text] for kind, texts in WORDINGS.items()}
    return {
        "trained templates": filled(TEMPLATES),
        "unseen templates": filled(UNSEEN),
        **wordings,
        "no digit, trained": [(text, None) for text in WITHOUT_DIGIT],
        "no digit, unseen": [(text, None) for text in UNSEEN_WITHOUT_DIGIT],
    }


def measure(config):
    """{kind of prompts: {accuracy, or digits (how many kinds are drawn) and most_frequent (its share)}}."""
    import numpy as np
    import torch

    from sampling.pipeline import Pipeline, to_uint8
    from studies.digits import real_digits

    classifier, report = real_digits()[2], {}
    pipeline = Pipeline.load(
        config.ckpt, SamplerConfig(sampler="ddpm", num_sampling_steps=50), GuidanceConfig(cfg_scale=config.cfg_scale),
        config.compute,
    )  # fmt: skip
    for kind, prompts in kinds_of_prompts().items():
        images = config.images // 4 if kind in WORDINGS else config.images
        drawn, numbers = [], torch.arange(images) * len(prompts) // images  # all prompts equally often
        for batch in torch.arange(images).split(120):
            x_T, step_noise = pipeline.noise(0, batch.tolist())
            texts = [prompts[number][0] for number in numbers[batch].tolist()]
            drawn.append(to_uint8(pipeline(texts, x_T, step_noise)))
        pixels = np.concatenate(drawn).mean(axis=-1).reshape(images, -1) / 127.5 - 1
        found = classifier.predict(pixels)
        wanted = np.array([prompts[number][1] for number in numbers.tolist()])
        if wanted[0] is None:
            shares = np.bincount(found, minlength=10) / images
            report[kind] = {"digits": int((shares > 0.01).sum()), "most_frequent": float(shares.max())}
        else:
            report[kind] = {"accuracy": float((found == wanted).mean())}
    return report


def main(argv=None):
    parser = Parser(TextDigitsConfig, __doc__)
    config = parser.parse(argv)
    with parser.report_errors():
        if config.make_encoder:
            print(f"A T5 with random weights of width {config.width} in {make_encoder(config.make_encoder, config.width)}")
            return
        report, met = measure(config), True
        for kind, numbers in report.items():
            name, bound = BOUNDS.get(kind, (None, 0))
            good = not name or numbers[name] >= bound
            met &= good
            values = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in numbers.items())
            print(f"  {kind:20}{values}{f' (bound: {name} {bound})' if name else ''}{'' if good else ', MISSED'}")
        if config.output:
            write_json(Path(config.output), report)
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
