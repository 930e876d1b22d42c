"""Options that choose a model: a name of the size table, and what differs from it."""

from dataclasses import dataclass

from diffusion.registry import OBJECTIVES
from runtime.config import Config, KeysOf, option
from runtime.errors import UserError
from runtime.shapes import ImageSize

DEFAULT = "DiT-XL/2"
MODELS = tuple(f"DiT-{size}/{patch}" for size in KeysOf("models:SIZES") for patch in (2, 4, 8))
PREDICTIONS = tuple(dict.fromkeys(predict for objective in OBJECTIVES.values() for predict in objective.predicts))
MAX_SIZE, MAX_DEPTH = 2**16, 512  # of an image's side or a width, of blocks: larger numbers would use up the memory


@dataclass(frozen=True)
class ModelOptions(Config):
    """model"""

    model: str | None = option(None, "size and patch size (default: DiT-XL/2, or those of --init-from)", choices=MODELS,
        metavar="DiT-{S,B,L,XL}/{2,4,8}", basic=True)  # fmt: skip
    image_size: ImageSize = option(256, "side of the images in pixels, or their HEIGHTxWIDTH", low=1, high=MAX_SIZE,
        basic=True)  # fmt: skip
    num_frames: int | None = option(None, "frames of a clip: the data are clips, and the model draws clips (default: "
        "images)", low=1, high=MAX_SIZE)  # fmt: skip
    aspect_buckets: int | None = option(None, "train on this many shapes of about the area of --image-size, from half to "
        "twice its width for its height, and give each image the one nearest to its own (default: one shape, that of "
        "--image-size)", choices=(3, 5, 7, 9))  # fmt: skip
    num_classes: int | None = option(None, "number of classes; 0 is an unconditional model (default: as many as the data "
        "has)", low=0, high=10_000_000, basic=True)  # fmt: skip
    block: str | None = option(None, "how timestep and class enter the blocks (default: adaln-zero, or that of "
        "--init-from)", choices="models:BLOCKS")  # fmt: skip
    hidden_size: int | None = option(None, "width D of the tokens (default: the model's)", low=1, high=MAX_SIZE)
    depth: int | None = option(None, "number of blocks (default: the model's)", low=1, high=MAX_DEPTH)
    num_heads: int | None = option(None, "number of attention heads (default: the model's)", low=1, high=MAX_SIZE)
    patch_size: int | None = option(None, "side of a patch in latent cells (default: the model's)", low=1, high=MAX_SIZE)
    patch_frames: int | None = option(None, "frames of a clip that a patch spans (default: 1, or those of --init-from)",
        low=1, high=MAX_SIZE)  # fmt: skip
    mlp_ratio: float | None = option(None, "width of the MLP's hidden layer as a multiple of D (default: the model's)",
        above=0, high=1024)  # fmt: skip
    rope: bool | None = option(None, "rotary position embeddings in the attention, beside the fixed ones (default: off)")
    objective: str | None = option(None, "what is learned: the paper's diffusion; a flow along straight lines between "
        "noise and data (Liu et al. 2023; Ma et al. 2024); or meanflow, a flow's average velocity, for samples in one step "
        "(Geng et al. 2025) (default: diffusion, or that of --init-from)",
        choices="diffusion.registry:OBJECTIVES")  # fmt: skip
    predict: str | None = option(None, "the model's output: the noise eps, or v, which mixes it with the clean image "
        "(default: eps, v for a flow, or that of --init-from)", choices=PREDICTIONS)  # fmt: skip
    time_shift: float | None = option(None, "shift of a flow's time towards noise, t' = s t / (1 + (s - 1) t), in training "
        "and sampling (Esser et al. 2024) (default: s = sqrt(d / 4096) for latents of d numbers, at least 1; or that of "
        "--init-from)", low=1e-3, high=1e3)  # fmt: skip

    def check(self):
        if self.aspect_buckets and self.num_frames:
            raise UserError(f"--aspect-buckets {self.aspect_buckets}", "is for images, not for clips", "leave it out")
        if self.patch_frames and not self.num_frames:
            raise UserError(f"--patch-frames {self.patch_frames}", "is for clips", "give --num-frames too")
        if self.patch_frames and self.num_frames % self.patch_frames:
            problem = f"not a multiple of --patch-frames {self.patch_frames}"
            raise UserError(f"--num-frames {self.num_frames}", problem, "change one of the two")
        allowed = OBJECTIVES[self.objective].predicts if self.objective else PREDICTIONS
        if self.predict and self.predict not in allowed:
            raise UserError(f"--predict {self.predict}", f"a {self.objective} predicts {' or '.join(allowed)}",
                            "leave the option out")  # fmt: skip
        if self.time_shift not in (None, 1) and self.objective and not OBJECTIVES[self.objective].flow:
            raise UserError(f"--time-shift {self.time_shift}", f"a {self.objective} has none", "pass --objective flow")

    @property
    def name(self):
        """Of the model, by its sizes: see `checkpoint.opened.name_of`. Imports torch."""
        from checkpoint.opened import name_of
        from models import DiT_models

        return name_of(DiT_models[self.model or DEFAULT].keywords | self.overrides())

    def overrides(self):
        """The keyword arguments of DiT that were given, on top of the named model's."""
        others = ("model", "image_size", "num_frames", "aspect_buckets", "num_classes", "patch_frames")
        given = {name: value for name, value in self.flat().items() if value is not None and name not in others}
        if self.objective:
            chosen = OBJECTIVES[self.objective]
            given = {**given, "predict": self.predict or chosen.predicts[0]}
            given |= {"learn_sigma": False} if chosen.flow else {}
        return given
