"""Options that choose a model: the size table's names and the points of the design space beside them."""

from dataclasses import dataclass

from runtime.config import Config, option

# The keys of models.DiT_models and models.BLOCKS, which take seconds to import; a test compares
MODELS = tuple(f"DiT-{size}/{patch}" for size in ("S", "B", "L", "XL") for patch in (2, 4, 8))
BLOCKS = ("adaln-zero", "adaln", "cross-attention", "in-context")
OBJECTIVES, PREDICTIONS = ("diffusion", "flow"), ("eps", "v")
MAX_SIZE, MAX_DEPTH = 2**16, 512  # of an image's side or a width, of blocks: larger numbers would use up the memory


@dataclass(frozen=True)
class ModelOptions(Config):
    """model"""

    model: str = option("DiT-XL/2", "size and patch size", choices=MODELS, metavar="DiT-{S,B,L,XL}/{2,4,8}")
    image_size: int = option(256, "side of the images in pixels", low=1, high=MAX_SIZE)
    num_classes: int = option(1000, "number of classes; 0 is an unconditional model", low=0, high=10_000_000)


@dataclass(frozen=True)
class DesignOptions(Config):
    """design"""

    block: str = option("adaln-zero", "how timestep and class enter the blocks", choices=BLOCKS)
    hidden_size: int | None = option(None, "width D of the tokens (default: the model's)", low=1, high=MAX_SIZE)
    depth: int | None = option(None, "number of blocks (default: the model's)", low=1, high=MAX_DEPTH)
    num_heads: int | None = option(None, "number of attention heads (default: the model's)", low=1, high=MAX_SIZE)
    patch_size: int | None = option(None, "side of a patch in latent cells (default: the model's)", low=1, high=MAX_SIZE)
    mlp_ratio: float | None = option(
        None, "width of the MLP's hidden layer as a multiple of D (default: the model's)", above=0, high=1024
    )
    rope: bool | None = option(None, "rotary position embeddings in the attention, beside the fixed ones (default: off)")

    def overrides(self):
        """The keyword arguments of DiT that were given, on top of the named model's."""
        return {name: value for name, value in self.flat().items() if value is not None}


@dataclass(frozen=True)
class DiTConfig(Config):
    """The arguments of models.DiT, which a checkpoint stores."""

    input_size: int = option(32, low=1, high=MAX_SIZE)
    patch_size: int = option(2, low=1, high=MAX_SIZE)
    in_channels: int = option(4, low=1, high=MAX_SIZE)
    hidden_size: int = option(1152, low=1, high=MAX_SIZE)
    depth: int = option(28, low=1, high=MAX_DEPTH)
    num_heads: int = option(16, low=1, high=MAX_SIZE)
    mlp_ratio: float = option(4.0, above=0, high=1024)
    class_dropout_prob: float = option(0.1, low=0, high=1)
    num_classes: int = option(1000, low=0, high=10_000_000)
    learn_sigma: bool = option(True)
    block: str = option("adaln-zero", choices=BLOCKS)
    objective: str = option("diffusion", choices=OBJECTIVES)
    predict: str = option("eps", choices=PREDICTIONS)
    rope: bool = option(False)
    text_width: int = option(0, low=0, high=MAX_SIZE)
    text_length: int = option(120, low=1, high=MAX_SIZE)
