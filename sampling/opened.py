"""What is drawn from: checkpoint, autoencoder and guiding checkpoint, opened once and checked before slow work."""

import math
from dataclasses import dataclass, replace

import torch

import download
from checkpoint.opened import Checkpoint
from data.autoencoder import RELEASED, LatentSpace, latent_sides, load_space
from data.condition import Condition
from models import DiT_models
from runtime.config import flag
from runtime.devices import check_compile, check_memory, pick_device
from runtime.errors import UserError, about
from runtime.files import checksum_of_text
from runtime.shapes import plain_size, sides
from sampling.config import DrawConfig

# Options that do not change the images of a set
FREE = ("ckpt", "sample_dir", "folder", "num_fid_samples", "per_proc_batch_size", "device", "text_encoder", "vector")
# What must be the same of a model and of the weaker one that it is guided away from
SHARED_WITH_GUIDE = ("in_channels", "input_size", "num_classes", "learn_sigma", "objective", "predict", "other_sizes")


@dataclass(frozen=True)
class Opened:
    """A model that can be drawn from, opened and checked; `Pipeline.build` makes it.

    config: a DrawConfig whose sampler is completed. guide: of a weaker model to guide away from. vae_name: of the latent
    space in messages. settings: model, image_size (pixels), num_classes and vae, as given or as the checkpoint has them."""

    config: DrawConfig
    checkpoint: Checkpoint
    guide: Checkpoint | None
    space: object
    vae_name: str
    settings: dict
    condition: Condition

    @classmethod
    def open(cls, config):
        """Raises UserError for everything that cannot work."""
        source = config.source
        checkpoint = open_checkpoint(source)
        path, objective, text = checkpoint.path, checkpoint.model_config["objective"], config.text
        guidance = complete_guidance(config, checkpoint)
        config = replace(config, sampler=config.sampler.completed(objective, path), guidance=guidance)
        condition = checkpoint.condition.prepare(path, text.negative_prompt, text.text_encoder)
        guide = open_guide(guidance, checkpoint)
        space, vae, vae_name = open_space(source, checkpoint, config.released_vae)
        settings = {**settle(source, checkpoint, space, vae_name), "vae": vae}
        check_compile(config.compute.compile, pick_device(config.compute.device))
        if not source.ckpt:
            checkpoint = Checkpoint.open(download.download(download.released_checkpoint(settings["image_size"])))
        return cls(config, checkpoint, guide, space, vae_name, settings, condition)

    @property
    def device(self):
        return torch.device(pick_device(self.config.compute.device))

    def vary(self, config):
        """The same weights with the sampler and guidance of another config. Raises UserError as `open`."""
        guidance = complete_guidance(config, self.checkpoint)
        sampler = config.sampler.completed(self.checkpoint.model_config["objective"], self.checkpoint.path)
        return replace(self, config=replace(config, sampler=sampler, guidance=guidance))

    def made_with(self, given):
        """What images of a SampleSetConfig are made with beside the checkpoint, a dict. given: its `choices_of_set`."""
        by_class = self.condition.option == "--labels"
        settings = {name: value for name, value in self.config.flat().items() if name not in FREE} | self.settings
        settings["guide_ckpt"] = self.guide and self.guide.checksum
        settings["labels"] = given if by_class else None
        settings["prompts"] = None if by_class else checksum_of_text(self.condition.words(given))
        return settings

    @property
    def frames(self):
        """Of a clip, where the model draws clips; else None."""
        return self.checkpoint.sizes.frames

    @property
    def sides(self):
        """Of the latents that are drawn: those of image_size."""
        return (*self.checkpoint.sizes.sides[:-2], *latent_sides(self.settings["image_size"], self.space.factor))

    def check_memory(self, number, advice):
        """Raises OutOfMemoryError where the memory of a CPU cannot hold `number` images that are drawn at once: six
        activations of each token in a block, with guidance, and the images. advice: how to need less."""
        if self.device.type == "cpu":
            model = self.checkpoint.sizes
            tokens = 2 * math.prod(model.grid)
            pixels = math.prod(sides(self.settings["image_size"])) * (self.frames or 1)
            check_memory(4 * number * (6 * tokens * model.hidden_size + 9 * pixels), advice)


def open_checkpoint(source):
    """The Checkpoint of a SourceConfig; of the released one what is known without the file, which is downloaded later."""
    if source.ckpt:
        where = {"where": source.lora, "base": source.ckpt} if source.lora else {"where": source.ckpt}
        found = Checkpoint.open(num_heads=source.num_heads, average=source.average, **where)
        if source.lora and "base" not in found.state:
            raise UserError(f"--lora {source.lora}", "holds no LoRA weights", "name it as --ckpt, without --lora")
        return found
    size = source.image_size or 256
    if source.average:
        raise UserError("--average: needs --ckpt, whose weights are meant; the released models have one average each")
    if (source.model or "DiT-XL/2") != "DiT-XL/2" or size not in (256, 512) or source.num_classes not in (None, 1000):
        known = "--model DiT-XL/2, --image-size 256 or 512, --num-classes 1000"
        raise UserError(f"without --ckpt only the released models can be drawn from: {known}; name your own with --ckpt")
    return Checkpoint({}, "the released DiT-XL/2", {"model_config": {"input_size": size // 8}})


def complete_guidance(options, checkpoint):
    """The GuidanceConfig of a DrawConfig, with the model's scale by default. Raises UserError if it cannot be guided so."""
    config = checkpoint.model_config
    conditional = config["num_classes"] or checkpoint.condition_record
    unguided = not options.guidance.guide_ckpt and conditional and config["class_dropout_prob"] == 0
    guidance = options.guidance.completed(config["objective"], checkpoint.path, 1.0 if unguided else options.usual_scale)
    if guidance.cfg_channels == "3" and config["in_channels"] < 3:
        raise UserError(f"--cfg-channels 3: the model has {config['in_channels']}; leave the option out")
    if unguided and guidance.cfg_scale != 1:
        problem = f"{checkpoint.path} cannot be guided, it was trained without null labels"
        raise UserError(f"--cfg-scale {guidance.cfg_scale}", problem, "pass --cfg-scale 1")
    return guidance


def open_guide(guidance, checkpoint):
    """The guiding checkpoint or None. Raises UserError where it is of another kind."""
    if not guidance.guide_ckpt:
        return None
    path, config = checkpoint.path, checkpoint.model_config
    guide = Checkpoint.open(guidance.guide_ckpt)
    where = f"--guide-ckpt {guide.path}"
    for name in SHARED_WITH_GUIDE:
        if (found := guide.model_config[name]) != config[name]:
            raise UserError(where, f"{name} {found}, but {path} has {config[name]}", "choose a guide of the same kind")
    if guide.condition_record != checkpoint.condition_record:
        raise UserError(where, f"draws by {guide.condition.describe()}, {path} by another condition")
    if guide.latents != checkpoint.latents:
        raise UserError(where, f"its latents are normalised otherwise than those of {path}", "choose another guide")
    return guide


def open_space(source, checkpoint, released_vae):
    """(space, value of --vae, its name in messages)."""
    # the released "ema" and "mse" share one latent space and differ in the decoder, which is each command's own choice
    recorded = None if checkpoint.vae in RELEASED else checkpoint.vae
    vae, channels = source.vae or recorded or released_vae, checkpoint.model_config["in_channels"]
    name = f"--vae {vae}" if source.vae else f"autoencoder {vae}" + (f", recorded in {checkpoint.path}" if recorded else "")
    if vae == "none" and channels not in (1, 3):
        raise UserError(f"{name}: {checkpoint.path} has {channels} channels, it works on latents; name its autoencoder")
    if not source.vae and not checkpoint.vae and channels in (1, 3):
        problem = f"{channels} channels, like pixels, but records no --vae"
        raise UserError(checkpoint.path, problem, "if it works on pixels, pass --vae none")
    with about(name):  # --vae only where the user has given it
        space = load_space(vae, channels)
    if checkpoint.latents and isinstance(space, LatentSpace):
        space.normalise_by(checkpoint.latents)
    return space, vae, name


def image_sizes(checkpoint, space):
    """The sizes in pixels that a model draws, its own first; see `runtime.shapes`."""
    sizes = checkpoint.sizes
    return [plain_size([space.factor * side for side in cells]) for cells in (sizes.sides[-2:], *sizes.other_sizes)]


def settle(source, checkpoint, space, vae_name="the autoencoder"):
    """{"model", "image_size", "num_classes"}. Raises UserError where checkpoint, space and a SourceConfig contradict."""
    path, config = checkpoint.path, checkpoint.model_config
    cells = checkpoint.sizes.sides[-2:]  # of a frame, where it draws clips
    if len(cells) != 2:
        problem = "its x has one side, the commands draw images and clips"
        raise UserError(path, problem, "draw with sampling.pipeline.Pipeline")
    size = plain_size([space.factor * side for side in cells])
    expected = getattr(space, "side", None) or (checkpoint.image_size if checkpoint.vae else size)
    if (space.channels, size) != (config["in_channels"], expected):
        wanted = plain_size([side // space.factor for side in sides(expected)])
        wanted = f"{space.channels} channels, {wanted} cells a side at {expected} pixels"
        raise UserError(vae_name, f"{wanted}; {path} has {config['in_channels']} and {plain_size(cells)}")
    model = checkpoint.describe()
    model = model if model in DiT_models else checkpoint.options.get("model") or model
    if source.image_size in image_sizes(checkpoint, space):
        size = source.image_size
    settings = {"model": model, "image_size": size, "num_classes": config["num_classes"]}
    for name, value in {**settings, "num_heads": config["num_heads"]}.items():
        if getattr(source, name) not in (None, value):
            way_out = "leave the option out to use that"
            if name == "image_size" and len(others := image_sizes(checkpoint, space)) > 1:
                value, way_out = ", ".join(map(str, others)), "pass one of them"
            raise UserError(f"{flag(name)} {getattr(source, name)}", f"{path} holds {value}", way_out)
    return settings
