"""What is drawn from: checkpoint, autoencoder and guiding checkpoint, opened once and checked before slow work."""

import contextlib
from dataclasses import dataclass

import download
from checkpoint.opened import Checkpoint
from data.autoencoder import RELEASED, load_space
from data.text_encoder import TextEncoder, check_same
from diffusion.registry import SAMPLERS
from models import DiT_models
from runtime.config import flag
from runtime.devices import check_compile, check_memory, pick_device
from runtime.errors import UserError
from sampling.config import ComputeConfig, GuidanceConfig, SamplerConfig, SourceConfig, TextConfig
from sampling.labels import parse_labels, readable_names


@dataclass(frozen=True)
class Source:
    """Open checkpoints that fit together, and how to draw from them. `Pipeline.build` makes the models.

    checkpoint: the model to draw from. guide: a weaker one to guide away from, or None. space: the model's space, whose
    weights are not read yet. vae_name: its name in messages. settings: model, image_size (pixels), num_classes and vae, as
    given or as the checkpoint has them. class_names: by number; empty where they are not known; of a model of texts the
    prompts. text_encoder: of such a model, its weights not read yet. negative: the text to guide away from, or None."""

    checkpoint: Checkpoint
    guide: Checkpoint | None
    space: object
    vae_name: str
    settings: dict
    class_names: list
    sampler: SamplerConfig
    guidance: GuidanceConfig
    compute: ComputeConfig
    text_encoder: TextEncoder | None = None
    negative: str | None = None

    @classmethod
    def open(cls, source, sampler=None, guidance=None, compute=None, released_vae="ema", text=None, prompts=()):
        """source: a SourceConfig or a checkpoint's path. released_vae: "ema" or "mse", the decoder to use unless `source`
        or the checkpoint names another autoencoder. text: a TextConfig. prompts: texts that take the place of classes.
        Raises UserError for everything that cannot work."""
        source = source if isinstance(source, SourceConfig) else SourceConfig(ckpt=str(source))
        sampler, guidance, compute = sampler or SamplerConfig(), guidance or GuidanceConfig(), compute or ComputeConfig()
        check_compile(compute.compile, pick_device(compute.device))
        sampler.check_steps()
        checkpoint = Checkpoint.open(source.ckpt, source.num_heads) if source.ckpt else released_checkpoint(source)
        guide = open_guide(guidance, checkpoint)
        check_kind(checkpoint, sampler, guidance)
        text = text or TextConfig()
        text_encoder = open_text_encoder(text, checkpoint, prompts)
        space, vae, vae_name = open_space(source, checkpoint, released_vae)
        settings = {**settle(source, checkpoint, space, vae_name), "vae": vae}
        if not source.ckpt:
            checkpoint = Checkpoint.open(download.download(download.released_checkpoint(settings["image_size"])))
        names = list(prompts) if text_encoder else readable_names(checkpoint.class_names, settings["num_classes"])
        options = (sampler, guidance, compute)
        return cls(checkpoint, guide, space, vae_name, settings, names, *options, text_encoder, text.negative_prompt)

    def parse_labels(self, words):
        """Class numbers of words that are numbers, names or WordNet numbers. Raises UserError."""
        return parse_labels(words, self.class_names, self.settings["num_classes"])

    def check_memory(self, number, advice):
        """Raises OutOfMemoryError where the memory of a CPU cannot hold `number` images that are drawn at once: six
        activations of each token in a block, with guidance, and the images. advice: how to need less."""
        if pick_device(self.compute.device) == "cpu":
            model = self.checkpoint.model_config
            tokens = 2 * (model["input_size"] // model["patch_size"]) ** 2
            check_memory(4 * number * (6 * tokens * model["hidden_size"] + 9 * self.settings["image_size"] ** 2), advice)

    def place_text_encoder(self, device):
        """The text encoder with its weights on the device, or None. Raises UserError where it is not the model's."""
        if self.text_encoder:
            with rename_text_encoder(self.text_encoder.name, self.checkpoint):
                check_same(
                    "--text-encoder", self.text_encoder.place(device), self.checkpoint.text_encoder[1], self.checkpoint.path
                )
        return self.text_encoder

    def place_space(self, device):
        """The space with its weights on the device."""
        with rename_vae(self.settings["vae"], self.vae_name):
            return self.space.place(device)


def released_checkpoint(source):
    """What is known of the released checkpoint without the file, which is downloaded when all else has been checked."""
    size = source.image_size or 256
    if (source.model or "DiT-XL/2") != "DiT-XL/2" or size not in (256, 512) or source.num_classes not in (None, 1000):
        raise UserError(
            "without --ckpt only the released models can be drawn from: --model DiT-XL/2, --image-size 256 or 512, "
            "--num-classes 1000; name your own with --ckpt"
        )
    return Checkpoint({}, "the released DiT-XL/2", {"model_config": {"input_size": size // 8}})


def check_kind(checkpoint, sampler, guidance):
    """Raises UserError where the model lacks what the sampler or the guidance needs."""
    config, path = checkpoint.model_config, checkpoint.path
    if SAMPLERS[sampler.sampler].flow and config["objective"] != "flow":
        raise UserError(f"--sampler {sampler.sampler}: {path} is no flow model; choose ddpm, ddim or another solver")


def open_text_encoder(text, checkpoint, prompts):
    """The TextEncoder of a model of texts, None for other models. Raises UserError."""
    config, path, name = checkpoint.model_config, checkpoint.path, text.text_encoder or checkpoint.text_encoder[0]
    if not config["text_width"]:
        given = {"--prompt": prompts, "--negative-prompt": text.negative_prompt, "--text-encoder": text.text_encoder}
        for option in filter(given.get, given):
            raise UserError(f"{option}: {path} was trained on classes, not on texts; use --labels")
        return None
    if not name:
        raise UserError(f"{path}: does not record its text encoder; name it with --text-encoder")
    with rename_text_encoder(name, checkpoint):
        encoder = TextEncoder(name, config["text_length"])
    if encoder.width != config["text_width"]:
        raise UserError(f"--text-encoder {name}: has tokens of width {encoder.width}, {path} takes {config['text_width']}")
    return encoder


@contextlib.contextmanager
def rename_text_encoder(name, checkpoint):
    """Let errors of a text encoder that the checkpoint records tell the way out."""
    try:
        yield
    except UserError as error:
        reason = str(error)
        if name == checkpoint.text_encoder[0]:
            reason = reason.replace(f"--text-encoder {name}:", f"text encoder {name}, recorded in {checkpoint.path}:", 1)
            reason = reason.split("; pass")[0] + "; name it with --text-encoder if it is elsewhere now"
        raise UserError(reason) from None


def open_guide(guidance, checkpoint):
    """The guiding checkpoint or None, after a check that the model can be guided so."""
    path, config, guide = checkpoint.path, checkpoint.model_config, None
    if guidance.cfg_channels == "3" and config["in_channels"] < 3:
        raise UserError(f"--cfg-channels 3: the model has {config['in_channels']}; leave the option out")
    if guidance.guide_ckpt:
        guide = Checkpoint.open(guidance.guide_ckpt)
        for name in ("in_channels", "input_size", "num_classes", "learn_sigma", "objective", "predict", "text_width"):
            found = guide.model_config[name]
            if found != config[name]:
                raise UserError(f"--guide-ckpt {guide.path}: {name} {found}, but {path} has {config[name]}")
    elif guidance.cfg_scale != 1 and config["class_dropout_prob"] == 0 and (config["num_classes"] or config["text_width"]):
        raise UserError(f"{path}: cannot be guided, it was trained without null labels; pass --cfg-scale 1")
    return guide


def open_space(source, checkpoint, released_vae):
    """(space, value of --vae, its name in messages)."""
    # the released "ema" and "mse" share one latent space and differ in the decoder, which is each command's own choice
    recorded = None if checkpoint.vae in RELEASED else checkpoint.vae
    vae, channels = source.vae or recorded or released_vae, checkpoint.model_config["in_channels"]
    name = f"--vae {vae}" if source.vae else f"autoencoder {vae}" + (f", recorded in {checkpoint.path}" if recorded else "")
    if vae == "none" and channels not in (1, 3):
        raise UserError(f"{name}: {checkpoint.path} has {channels} channels, it works on latents; name its autoencoder")
    with rename_vae(vae, name):
        return load_space(vae, channels), vae, name


def settle(source, checkpoint, space, vae_name="the autoencoder"):
    """The model's name, image_size and num_classes, as a dict. Raises UserError where the checkpoint, the space and the
    options that were given contradict each other. source: a SourceConfig. vae_name: the space in messages."""
    path, config = checkpoint.path, checkpoint.model_config
    size = space.factor * config["input_size"]
    expected = checkpoint.image_size if checkpoint.vae else size
    if (space.channels, size) != (config["in_channels"], expected):
        raise UserError(
            f"{vae_name}: {space.channels} channels, {expected // space.factor} cells a side at {expected} pixels; "
            f"{path} has {config['in_channels']} and {config['input_size']}"
        )
    model = checkpoint.describe()
    model = model if model in DiT_models else checkpoint.options.get("model", model)
    settings = {"model": model, "image_size": size, "num_classes": config["num_classes"]}
    for name, value in {**settings, "num_heads": config["num_heads"]}.items():
        if getattr(source, name) not in (None, value):
            raise UserError(f"{flag(name)} {getattr(source, name)}: {path} holds {value}; leave the option out to use that")
    return settings


@contextlib.contextmanager
def rename_vae(vae, name):
    """Let errors of the autoencoder say --vae only where the user has given it."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(f"--vae {RELEASED.get(vae, vae)}:", f"{name}:", 1)) from None
