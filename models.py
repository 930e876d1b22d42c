"""Diffusion Transformers: Peebles and Xie, "Scalable Diffusion Models with Transformers" (ICCV 2023), Figure 3.

    x_t -> patches -> tokens -> N blocks -> final layer -> eps and the covariance's interpolation, of x_t's size

A noised latent becomes a sequence of tokens; `depth` transformer blocks process it under the condition, which is the
timestep t and the class y; a linear layer turns each token back into a patch. How the condition reaches the blocks is the
`block` design, of which the paper compares four. Shapes: N batch, C channels, H, W input sides, P patch side,
T = H W / P^2 tokens, D width.

    model = DiT_models["DiT-XL/2"](input_size=32, num_classes=1000)
    eps_and_variance = model(x_t, t, y)      # (N, 2C, H, W)

With another `condition` y is a text or a vector in place of the class: data/condition.py."""

import copy
import dataclasses
import functools
import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import AttentionRope, build_rotary_pos_embed
from timm.models.vision_transformer import Attention, Mlp
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffusion.registry import OBJECTIVES

# ----------------------------------------------------------------------------------------------------------------------
# Embeddings of the patches, their positions, the timestep and the condition


class PatchEmbed(nn.Module):
    """x: (N, C, *grid) -> tokens (N, T, D), by a convolution whose stride is its kernel: a linear layer of each patch."""

    def __init__(self, input_size, patch_size, in_channels, width):
        super().__init__()
        convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(input_size)]
        self.proj = convolution(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        # in this order in memory too, which the convolution leaves transposed and every later x would inherit
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()


def position_embedding(width, grid):
    """Fixed sine-cosine embedding, computed in float64. grid: tokens along each side, or of a square's side. Returns
    (T, D): a part of D for each side, the last side (the column) first, each as [sin, cos] of position / 10000^(i / (D/4))
    for two sides. Of three sides the first, the time, has no part: all frames have the same rows, those of a picture."""
    grid = (grid, grid) if isinstance(grid, int) else tuple(grid)
    sides = grid[-2:]
    half = width // (2 * len(sides))  # sines of a side
    places = np.indices(sides).reshape(len(sides), -1)  # (sides, T)
    parts = []
    for position in places[::-1]:
        angles = position[:, None] * 10000.0 ** -(np.arange(half) / half)
        parts += [np.sin(angles), np.cos(angles)]
    return torch.from_numpy(np.tile(np.concatenate(parts, axis=1), (math.prod(grid[:-2]), 1)))


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def positions_on(device, width, grid):
    """`position_embedding` as float32 on a device, (T, D); of the meta device without values."""
    if device.type == "meta":
        return torch.empty(math.prod(grid), width, device=device)
    return position_embedding(width, grid).float().to(device)


def get_2d_sincos_pos_embed(embed_dim, grid_size, cls_token=False, extra_tokens=0):
    """`position_embedding` by the original release's name, as (T, D) numpy; rows of zeros for extra tokens come first."""
    rows = position_embedding(embed_dim, grid_size).numpy()
    return np.concatenate([np.zeros((extra_tokens if cls_token else 0, embed_dim)), rows])


class TimestepEmbedder(nn.Module):
    """t: (N,) in [0, 1000), fractions allowed -> (N, D): a 256-dimensional sinusoid of scale * t, then a two-layer MLP."""

    def __init__(self, hidden_size, frequency_embedding_size=256, scale=1.0):
        super().__init__()
        self.frequency_embedding_size, self.scale = frequency_embedding_size, scale
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    @staticmethod
    def timestep_embedding(t, dim, max_period=10000):
        """[cos, sin] of t * max_period^(-i / (dim / 2)): (N, dim) float32, whose last column is 0 where dim is odd."""
        half = dim // 2
        # computed here: a buffer outside of the state dict would stay empty in a model that is built on the meta device
        frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        # float32 at least: half precision cannot tell neighbouring t apart
        angles = t[:, None].to(torch.promote_types(t.dtype, torch.float32)) * frequencies
        return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))

    def forward(self, t):
        weight = self.mlp[0].weight  # a method of layers that PyTorch has quantized, which take float32
        dtype = weight.dtype if isinstance(weight, torch.Tensor) else torch.float32
        return self.mlp(self.timestep_embedding(t * self.scale, self.frequency_embedding_size).to(dtype))

    @torch.no_grad()
    def imitate(self, other):
        """Fit the last layer by least squares, so that t gives about what it gives in `other`, of another scale."""
        t = torch.arange(1001.0)
        hidden = self.mlp[:2](self.timestep_embedding(t * self.scale, self.frequency_embedding_size))
        hidden = F.pad(hidden, (0, 1), value=1.0).double()  # for the bias
        ridge = 1e-2 * torch.eye(hidden.shape[1]).double()  # slow sinusoids are nearly dependent
        fitted = torch.linalg.solve(hidden.T @ hidden + ridge, hidden.T @ other(t).double())
        self.mlp[2].weight.copy_(fitted[:-1].T)
        self.mlp[2].bias.copy_(fitted[-1])


class LabelEmbedder(nn.Module):
    """y: (N,) int64 -> (N, D), through a table whose last row, number `num_classes`, stands for "no class". Or y: (N, rows
    of the table) float, weights of the rows.

    In training each label is replaced by the null class with probability `dropout_prob` (Ho and Salimans 2022), which is
    what makes guidance possible; a caller that drops labels itself puts this module into eval mode. Without dropout there
    is no null row, unless there are no classes at all. Raises ValueError for labels out of range or of another type."""

    def __init__(self, num_classes, hidden_size, dropout_prob):
        super().__init__()
        self.num_classes, self.dropout_prob = num_classes, dropout_prob
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0 or num_classes == 0), hidden_size)

    def forward(self, y, train=None, force_drop_ids=None):
        """train, force_drop_ids: as in the original release, whether to drop, and where (1) whatever chance says."""
        rows = self.embedding_table.num_embeddings
        if y.dtype == torch.bool or tuple(y.shape[1:]) != ((rows,) if y.is_floating_point() else ()):
            wanted = f"labels are (N,) int64, float weights of classes are (N, {rows})"
            raise ValueError(f"y is {y.dtype} of shape {tuple(y.shape)}: {wanted}")
        if y.is_floating_point():
            return y @ self.embedding_table.weight
        train = self.training if train is None else train
        if (train and self.dropout_prob > 0) or force_drop_ids is not None:
            y = self.token_drop(y, force_drop_ids)
        try:
            return self.embedding_table(y)
        except IndexError:  # of a CPU; a GPU would have to be waited for
            raise ValueError(f"y holds the labels {y.min()} to {y.max()}: they must be 0 to {rows - 1}") from None

    def token_drop(self, labels, force_drop_ids=None):
        """labels with the null class by chance, or where force_drop_ids is 1."""
        if force_drop_ids is None:
            dropped = torch.rand(labels.shape[0], device=labels.device) < self.dropout_prob
        else:
            dropped = force_drop_ids == 1
        return labels.masked_fill(dropped, self.num_classes)


class TextEmbedder(nn.Module):
    """A text y: (N, L, W + 1) float, of each token the W numbers that a text encoder gave, then 1, or 0 for padding ->
    tokens (N, L, D), by a two-layer MLP, and their mask (N, 1, 1, L) bool (Chen et al. 2024, PixArt-alpha). Labels (N,)
    int64 stand for no text. null_text: (L, W + 1), the empty text."""

    attends = True  # every block attends to the tokens

    def __init__(self, text_width, text_length, hidden_size):
        super().__init__()
        self.null_text = nn.Parameter(torch.zeros(text_length, text_width + 1), requires_grad=False)
        self.null_text.data[0, -1] = 1  # a token to attend to, until the encoder's are put here
        self.mlp = nn.Sequential(nn.Linear(text_width, hidden_size), nn.GELU("tanh"), nn.Linear(hidden_size, hidden_size))

    def forward(self, y):
        if not y.is_floating_point():
            y = self.null_text.expand(y.shape[0], -1, -1)
        if y.ndim != 3 or y.shape[2] != self.null_text.shape[1]:
            raise ValueError(f"y has shape {tuple(y.shape)}: texts are (N, L, {self.null_text.shape[1]})")
        return self.mlp(y[..., :-1]), y[:, None, None, :, -1].bool()


class VectorEmbedder(nn.Module):
    """A vector y: (N, size + 1) float, the numbers and then 1, or 0 for no condition -> (N, D), by a two-layer MLP. Its
    last layer starts at zero, so that a model trained without it can be continued."""

    def __init__(self, size, hidden_size):
        super().__init__()
        self.size = size
        self.mlp = nn.Sequential(nn.Linear(size + 1, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, y):
        if y.ndim != 2 or y.shape[1] != self.size + 1:
            raise ValueError(f"y has shape {tuple(y.shape)}: vectors are (N, {self.size + 1}), the last number 1 or 0")
        return self.mlp(y)


# ----------------------------------------------------------------------------------------------------------------------
# The four block designs: section 3.2 and Figure 3 of the paper, from right to left; and one for clips


class TransformerBlock(nn.Module):
    """The standard ViT block. The in-context design uses it as it is, with the condition as two of the tokens; the other
    designs add to it. A design is a subclass and its line in BLOCKS."""

    num_modulations = 0  # vectors of (N, D) that the design regresses from the condition
    zero_init = False  # whether the layers that regress them start at zero
    condition_tokens = False  # whether t_emb and y_emb are two of the tokens
    needs_frames = False  # whether `forward` takes the number of frames: tokens along the first of three sides, else 1

    def __init__(self, hidden_size, num_heads, mlp_ratio=4.0, rope=False, text=False):
        super().__init__()
        # an adaptive design brings scale and shift from the condition, so its norms have none of their own
        norm = partial(nn.LayerNorm, hidden_size, elementwise_affine=self.num_modulations == 0, eps=1e-6)
        self.norm1 = norm()
        attention = partial(AttentionRope, num_prefix_tokens=0) if rope else Attention
        self.attn = attention(hidden_size, num_heads=num_heads, qkv_bias=True)
        self.norm2 = norm()
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), act_layer=partial(nn.GELU, approximate="tanh"))
        if self.num_modulations:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, self.num_modulations * hidden_size))
        if text:
            self.norm_text, self.text_attn = nn.LayerNorm(hidden_size, eps=1e-6), CrossAttention(hidden_size, num_heads)

    def forward(self, x, c, text=None, **positions):
        """x: (N, T, D). c: the condition: unused here, whose tokens are among x; (N, 2, D) in cross-attention; else (N, D).
        text: (tokens, mask) as of `TextEmbedder`, for blocks made with `text`. positions: `rope`, x's rotations."""
        x = self.add_text(x + self.attn(self.norm1(x), **positions), text)
        return x + self.mlp(self.norm2(x))

    def add_text(self, x, text):
        """x, plus what it gets from attending to the text, where there is one."""
        return x if text is None else x + self.text_attn(self.norm_text(x), *text)


class CrossAttention(nn.Module):
    """Multi-head attention of the tokens x: (N, T, D) to a sequence c: (N, L, D), where mask: (N, 1, 1, L) is true."""

    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, c, mask=None):
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (N, heads, T, d)
        k, v = self.kv(c).unflatten(-1, (2, self.num_heads, -1)).unbind(2)  # each (N, L, heads, d)
        out = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)  # (N, heads, T, d)
        return self.proj(out.transpose(1, 2).flatten(2))


class CrossAttentionBlock(TransformerBlock):
    """Self-attention, cross-attention to (t_emb, y_emb), MLP."""

    def __init__(self, hidden_size, num_heads, mlp_ratio=4.0, **attention):
        super().__init__(hidden_size, num_heads, mlp_ratio, **attention)
        self.norm_cross = nn.LayerNorm(hidden_size, eps=1e-6)
        self.cross_attn = CrossAttention(hidden_size, num_heads)

    def forward(self, x, c, text=None, **positions):
        x = self.add_text(x + self.attn(self.norm1(x), **positions), text)
        x = x + self.cross_attn(self.norm_cross(x), c)
        return x + self.mlp(self.norm2(x))


def modulate(x, shift, scale):
    """x: (N, T, D). shift, scale: (N, D), or (N, 1, D)."""
    shift, scale = (m.unsqueeze(1) if m.dim() == 2 else m for m in (shift, scale))
    return x * (1 + scale) + shift


class AdaLNBlock(TransformerBlock):
    """Scale and shift of both norms are regressed from c = t_emb + y_emb."""

    num_modulations = 4

    def forward(self, x, c, text=None, **positions):
        shift1, scale1, shift2, scale2 = self.adaLN_modulation(c).chunk(4, dim=-1)  # each (N, D)
        x = self.add_text(x + self.attn(modulate(self.norm1(x), shift1, scale1), **positions), text)
        return x + self.mlp(modulate(self.norm2(x), shift2, scale2))


class DiTBlock(TransformerBlock):
    """adaLN-Zero: also a gate on each branch, all zero at first, so that every block starts as the identity."""

    num_modulations = 6
    zero_init = True

    def forward(self, x, c, text=None, **positions):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)  # each (N, D)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1), **positions)
        x = self.add_text(x, text)
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class SpaceTimeBlock(DiTBlock):
    """adaLN-Zero for clips, whose attention is in two parts (Ma et al. 2024, Latte, variant 3): a token attends to those of
    its frame, then to those of its place, over time; not to all T, so that the cost of long clips grows about linearly. The
    modulations of `DiTBlock` come first: it can start from the weights of an image model."""

    num_modulations = 9
    needs_frames = True

    def __init__(self, hidden_size, num_heads, mlp_ratio=4.0, rope=False, text=False):
        super().__init__(hidden_size, num_heads, mlp_ratio, rope, text)
        self.norm_time, self.attn_time = copy.deepcopy(self.norm1), copy.deepcopy(self.attn)

    def forward(self, x, c, frames, text=None, rope=None):
        shift1, scale1, gate1, shift2, scale2, gate2, shift3, scale3, gate3 = self.adaLN_modulation(c).chunk(9, dim=-1)
        # rotations are relative: all frames have the same differences of places, all places the same differences of times
        tokens = x.shape[1] // frames
        in_frame, in_time = ({}, {}) if rope is None else ({"rope": rope[:tokens]}, {"rope": rope[::tokens]})
        h = modulate(self.norm1(x), shift1, scale1).unflatten(1, (frames, -1))  # (N, F, T / F, D)
        h = self.attn(h.flatten(0, 1), **in_frame).unflatten(0, h.shape[:2])
        x = x + gate1.unsqueeze(1) * h.flatten(1, 2)
        h = modulate(self.norm_time(x), shift3, scale3).unflatten(1, (frames, -1)).transpose(1, 2)  # (N, T / F, F, D)
        h = self.attn_time(h.flatten(0, 1), **in_time).unflatten(0, h.shape[:2])
        x = self.add_text(x + gate3.unsqueeze(1) * h.transpose(1, 2).flatten(1, 2), text)
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class InContextBlock(TransformerBlock):
    """The standard block; the condition comes as two more tokens."""

    condition_tokens = True


BLOCKS = {
    "adaln-zero": DiTBlock,
    "adaln": AdaLNBlock,
    "cross-attention": CrossAttentionBlock,
    "in-context": InContextBlock,
    "space-time": SpaceTimeBlock,
}


class FinalLayer(nn.Module):
    """Norm, adaptive where the blocks' norms are, and a linear map of each token to its patch. patch_size: as in `DiT`."""

    def __init__(self, hidden_size, patch_size, out_channels, adaptive=True):
        super().__init__()
        values = (patch_size**2 if isinstance(patch_size, int) else math.prod(patch_size)) * out_channels
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=not adaptive, eps=1e-6)
        self.linear = nn.Linear(hidden_size, values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size)) if adaptive else None

    def forward(self, x, c):
        x = self.norm_final(x)
        if self.adaLN_modulation is not None:
            x = modulate(x, *self.adaLN_modulation(c).chunk(2, dim=-1))
        return self.linear(x)


# ----------------------------------------------------------------------------------------------------------------------
# The model

# Types and bounds of the model's arguments; larger numbers, as of a damaged record, would use up the memory
MAX_SIZE, MAX_CLASSES = 2**16, 10_000_000
LIMITS = {
    "input_size": (int, 1, MAX_SIZE), "patch_size": (int, 1, MAX_SIZE), "in_channels": (int, 1, MAX_SIZE),
    "hidden_size": (int, 1, MAX_SIZE), "depth": (int, 1, 512), "num_heads": (int, 1, MAX_SIZE),
    "mlp_ratio": (float, 0, 1024), "class_dropout_prob": (float, 0, 1), "num_classes": (int, 0, MAX_CLASSES),
    "learn_sigma": (bool, False, True), "rope": (bool, False, True), "time_shift": (float, 1e-3, 1e3),
}  # fmt: skip


@dataclass(frozen=True)
class DiTConfig:
    """The arguments of `DiT` but its condition: plain numbers and names, which a checkpoint stores.

    input_size: side of a square x in latent cells (pixels / 8 for the Stable Diffusion autoencoder), or its one to three
    sides: (L,), (H, W), or (F, H, W) of a clip of F frames. patch_size: likewise. class_dropout_prob: share of labels
    replaced by the null class in training. other_sizes: of x that the model takes too, with positions computed for each.
    num_classes: 0 for an unconditional model. learn_sigma: also predict the interpolation of log-variances, as C more
    channels. block: one of `BLOCKS`.

    Newer ideas, off by default. objective, predict: what the first C channels of the output are, for those who read them
    (`diffusion.registry.OBJECTIVES`): eps or v of a "diffusion", the velocity v of a "flow", its average of a "meanflow".
    rope: rotary position embeddings for each side (Su et al. 2021, Heo et al. 2024), beside the fixed ones.
    time_shift: of a flow's timesteps in training and sampling, `diffusion.flow.shift_time`.
    Raises ValueError for what cannot be built."""

    input_size: int | tuple = 32
    patch_size: int | tuple = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1
    num_classes: int = 1000
    learn_sigma: bool = True
    block: str = "adaln-zero"
    objective: str = "diffusion"
    predict: str = "eps"
    rope: bool = False
    time_shift: float = 1.0
    other_sizes: tuple = ()

    def __post_init__(self):
        sizes = self.input_size, self.patch_size
        count = next((len(size) for size in sizes if isinstance(size, (tuple, list))), 2)
        sides, patch = (tuple(size) if isinstance(size, (tuple, list)) else (size,) * count for size in sizes)
        if not len(sides) == len(patch) == count in (1, 2, 3):
            raise ValueError(f"input size {sizes[0]!r:.50} and patch size {sizes[1]!r:.50} do not have 1 to 3 sides each")
        others = tuple(tuple(size) for size in self.other_sizes)
        values = {"input_size": sum((sides, *others), ()), "patch_size": patch}
        for name, (kind, low, high) in LIMITS.items():
            for value in values.get(name, (getattr(self, name),)):
                if type(value) not in (kind, int if kind is float else kind) or not low <= value <= high:
                    raise ValueError(f"{name} {value!r:.50} is no {kind.__name__} from {low} to {high}")
        if self.block not in BLOCKS:
            raise ValueError(f"block {self.block!r:.50} is not one of {', '.join(BLOCKS)}")
        for size, given in ((sides, sizes[0]), *zip(others, others, strict=True)):
            if len(size) != count or any(side % cells for side, cells in zip(size, patch, strict=True)):
                raise ValueError(f"input size {given} is not a multiple of the patch size {sizes[1]}")
        width, heads = self.hidden_size, self.num_heads
        if width % heads:
            raise ValueError(f"hidden size {width} is not a multiple of the number of heads {heads}")
        if width % (parts := 2 * min(count, 2)):
            raise ValueError(f"hidden size {width} is not a multiple of {parts}, which the position embedding needs")
        if int(width * self.mlp_ratio) < 1:
            raise ValueError(f"MLP ratio {self.mlp_ratio} leaves the MLP no hidden unit at hidden size {width}")
        if self.objective not in OBJECTIVES or self.predict not in OBJECTIVES[self.objective].predicts:
            outputs = ", ".join(f"{name} with {' or '.join(of.predicts)}" for name, of in OBJECTIVES.items())
            raise ValueError(f"objective {self.objective!r} with {self.predict!r} predicted is not one of {outputs}")
        if self.time_shift != 1 and not OBJECTIVES[self.objective].flow:
            raise ValueError(f"time shift {self.time_shift} is for flows, the objective is {self.objective!r}")
        if self.rope and (BLOCKS[self.block].condition_tokens or width // heads % (2 * count)):
            problem = f"rotary positions need heads whose width is a multiple of {2 * count}, and no in-context block"
            raise ValueError(problem)
        # the sides of x and of a patch, always as tuples, and the tokens along each side
        derived = {"sides": sides, "patch": patch, "other_sizes": others, "grid": self.grid_of(sides, patch)}
        for name, size in (("input_size", sides), ("patch_size", patch)):
            derived[name] = size[0] if size == size[:1] * 2 else size  # one form of each size: a square's is a number
        self.__dict__.update(derived)  # the dataclass is frozen

    @property
    def frames(self):
        """Of a clip x, in latent cells; None for other x."""
        return self.sides[0] if len(self.sides) == 3 else None

    def grid_of(self, sides, patch=None):
        """Tokens along each side."""
        return tuple(np.floor_divide(sides, patch or self.patch).tolist())


class DiT(nn.Module):
    """A diffusion model with a transformer for its backbone. Arguments: those of `DiTConfig`, and

    condition: what y is in place of a class, an object whose `embedder(hidden_size)` gives the module that turns y into
    (N, D), or, where it has `attends`, into tokens that every block attends to, and their mask; data/condition.py has them.
    There are no classes then. What it adds starts at zero, so that a model trained without it can be continued.

    config: the arguments of `DiTConfig` by name; each is an attribute too. gradient_checkpointing: with k > 0, every k-th
    block keeps no activations and computes them again for the gradient. Raises ValueError for what cannot be built."""

    def __init__(self, *arguments, condition=None, **named):
        super().__init__()
        sizes = DiTConfig(*arguments, **named)
        self.config, self.sizes, self.condition = dataclasses.asdict(sizes), sizes, condition
        for name, value in self.config.items():  # model.in_channels, model.num_classes ...
            setattr(self, name, value)
        self.out_channels = sizes.in_channels * (2 if sizes.learn_sigma else 1)
        self.null_class, self.gradient_checkpointing = sizes.num_classes, 0
        self.own, self.base = None, None  # with LoRA: see checkpoint.lora
        width, design = sizes.hidden_size, BLOCKS[sizes.block]
        if condition is not None and sizes.num_classes:
            raise ValueError(f"a model of another condition has no classes, these are {sizes.num_classes}")

        self.x_embedder = PatchEmbed(sizes.sides, sizes.patch, sizes.in_channels, width)
        average = OBJECTIVES[sizes.objective].average  # is differentiated with respect to t, which has to enter slowly
        self.t_embedder = TimestepEmbedder(width, scale=0.01 if average else 1.0)
        self.span_embedder = TimestepEmbedder(width, scale=0.01) if average else None  # of t - r
        embedder = condition and condition.embedder(width)
        attends = getattr(embedder, "attends", False)
        # drawn in any case, for the random stream; with tokens to attend to there is a y_emb too, the same for all
        labels = LabelEmbedder(sizes.num_classes, width, sizes.class_dropout_prob)
        self.y_embedder = labels if embedder is None or attends else embedder
        self.text_embedder = embedder if attends else None
        self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(sizes.grid), width), requires_grad=False)
        # of a clip: a linear layer of the time's sine-cosine embedding, which starts at zero, as in a model of pictures
        self.time_embed = nn.Linear(width, width, bias=False) if len(sizes.grid) == 3 else None
        new_block = partial(design, width, sizes.num_heads, sizes.mlp_ratio, rope=sizes.rope, text=attends)
        self.blocks = nn.ModuleList(new_block() for _ in range(sizes.depth))
        self.final_layer = FinalLayer(width, sizes.patch, self.out_channels, design.num_modulations > 0)
        self.initialize_weights()

    @property
    def guided_channels(self):
        """How many channels are guided by default. The original release guides the first three of the autoencoder's four,
        and its published numbers depend on it: a scale of 1.5 on three channels is about 1.375 on four. A model of another
        objective, or of another number of channels, is guided on all."""
        as_published = self.in_channels == 4 and (self.objective, self.predict) == ("diffusion", "eps")
        return 3 if as_published else self.in_channels

    def initialize_weights(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.flatten(1))  # the patch convolution as a linear layer
        nn.init.zeros_(self.x_embedder.proj.bias)
        if not self.pos_embed.is_meta:  # a meta model has no values, but computing these may need very much memory
            self.pos_embed.data.copy_(position_embedding(self.pos_embed.shape[-1], self.sizes.grid))
        tables = [self.y_embedder.embedding_table] if isinstance(self.y_embedder, LabelEmbedder) else []
        for embedding in (*tables, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(embedding.weight, std=0.02)
        zero = [self.final_layer.linear, self.time_embed, self.span_embedder and self.span_embedder.mlp[2]]
        zero += [block.text_attn.proj for block in self.blocks if self.text_embedder]
        if BLOCKS[self.block].zero_init:
            zero += [layer.adaLN_modulation[1] for layer in [*self.blocks, self.final_layer]]
        for linear in filter(None, zero):
            for parameter in linear.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x, t, y, r=None):
        """x: (N, C, H, W) noised latents, or (N, C, *sides). t: (N,) timesteps in [0, 1000). y: (N,) int64 labels in [0,
        num_classes], the last for "no class", or (N, num_classes + 1) float weights of their embeddings; with another
        condition what its embedder takes. r: (N,), of an average velocity, the other end of its interval (default: t).
        Returns (N, 2C, H, W): eps, then the interpolation of log-variances in about [-1, 1]; with learn_sigma=False eps
        alone. Raises ValueError for other shapes, and for labels of another type."""
        self.check_shapes(x, t, y)
        grid, positions, other = self.sizes.grid, self.pos_embed, tuple(x.shape[2:]) in self.sizes.other_sizes
        if other:
            grid = self.sizes.grid_of(x.shape[2:])
            positions = positions_on(x.device, self.hidden_size, grid).to(positions.dtype)
        x = self.x_embedder(x) + positions  # (N, T, D)
        extra, frames = {}, grid[0] if len(grid) == 3 else 1  # extra: what blocks get besides x and c
        if self.time_embed is not None:
            times = position_embedding(self.hidden_size, (frames,)).to(x)  # (F, D), computed here: see `TimestepEmbedder`
            x = x + self.time_embed(times).repeat_interleave(x.shape[1] // frames, dim=0)
        if self.text_embedder is not None:
            extra["text"] = self.text_embedder(y)
            y = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)  # the null class, the only one
        t_emb, y_emb = self.t_embedder(t), self.y_embedder(y)  # each (N, D)
        if self.span_embedder is not None:
            t_emb = t_emb + self.span_embedder(torch.zeros_like(t) if r is None else t - r)
        design = BLOCKS[self.block]
        # (N, D) where the design regresses modulations from it, else (N, 2, D)
        c = t_emb + y_emb if design.num_modulations else torch.stack([t_emb, y_emb], dim=1)
        if design.condition_tokens:
            x = torch.cat([x, c.to(x.dtype)], dim=1)  # (N, T + 2, D), the two without a position
        if self.sizes.rope:
            extra["rope"] = self.rotations(x.device, grid)
        if design.needs_frames:
            extra["frames"] = frames
        for i, block in enumerate(self.blocks):
            if self.gradient_checkpointing and i % self.gradient_checkpointing == 0 and torch.is_grad_enabled():
                # a block draws nothing
                x = checkpoint(block, x, c, use_reentrant=False, preserve_rng_state=False, **extra)
            else:
                x = block(x, c, **extra)
        x = self.final_layer(x[:, : positions.shape[-2]], c)  # of the image's tokens
        return self.unpatchify(x, grid) if other else self.unpatchify(x)

    def check_shapes(self, x, t, y):
        """Raises ValueError, in a sentence, for what `forward` does not take."""
        replaced = self.pos_embed.shape[1] != math.prod(self.sizes.grid)  # by a fork, with another size's
        taken = x.shape[2:] if replaced or tuple(x.shape[2:]) in self.sizes.other_sizes else self.sizes.sides
        wanted = (self.in_channels, *taken)
        if tuple(x.shape[1:]) != wanted or not x.is_floating_point():
            raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}, must be float (N, {', '.join(map(str, wanted))})")
        for name, values in (("t", t), ("y", y)):
            shape = getattr(values, "shape", ())
            if shape[:1] != x.shape[:1] or (name == "t" and len(shape) != 1) or not isinstance(values, torch.Tensor):
                found = f"{type(values).__name__} of shape {tuple(shape)}"
                raise ValueError(f"{name} is a {found}, must be a tensor with one entry for each of the {len(x)} in x")

    def rotations(self, device, grid=None):
        """sin and cos of rotary positions for each token and entry of a head's queries, (T, 2d) float32. Computed here: see
        `TimestepEmbedder`."""
        grid = [*(grid or self.sizes.grid)]
        width = 2 * (self.sizes.hidden_size // self.num_heads) // len(grid)  # which the function halves, for two sides
        return torch.cat(build_rotary_pos_embed(grid, dim=width, in_pixels=False, device=device), dim=-1)

    def compile_blocks(self, backend="inductor"):
        """Compile the blocks, where all the time goes, on first use: one is compiled and the others share its code, so that
        more of them take no longer. Weights and state dict stay as they are."""
        for block in self.blocks:
            block.compile(backend=backend, dynamic=None if self.sizes.other_sizes else False)

    def unpatchify(self, x, grid=None):
        """(N, T, P * P * C') -> (N, C', H, W); a token's values run row in patch, column in patch, channel. A square's side
        follows from the number of tokens, so that a fork may replace `pos_embed` by that of another size."""
        grid, patch = grid or self.sizes.grid, self.sizes.patch
        if x.shape[1] != math.prod(grid) and len(set(grid)) == 1:
            grid = (round(x.shape[1] ** (1 / len(grid))),) * len(grid)
        n = len(grid)
        x = x.reshape(-1, *grid, *patch, self.out_channels)
        # (N, C', h, p, w, q)
        x = x.permute(0, 2 * n + 1, *(axis for side in range(n) for axis in (1 + side, 1 + n + side)))
        return x.reshape(-1, self.out_channels, *(cells * size for cells, size in zip(grid, patch, strict=True)))

    def forward_with_cfg(self, x, t, y, cfg_scale):
        """Classifier-free guidance in the original release's form, for scripts written for it: the batch is doubled,
        y holds the labels and then the null class, only the first half of x is read, and both halves of the result hold
        the same guided eps. New code calls `diffusion.guidance.guided_denoiser`."""
        if x.shape[0] % 2:
            raise ValueError(f"forward_with_cfg needs a doubled batch, [conditional; unconditional], not {len(x)} images")
        half = x[: x.shape[0] // 2]
        out = self(torch.cat([half, half]), t, y)
        out = out[0] if isinstance(out, tuple | list) else out  # of a fork's forward, which may return more
        cond, uncond = out.chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)  # Ho and Salimans 2022, eq. 6, with cfg_scale = 1 + w
        eps = torch.cat([guided, guided])[:, : self.guided_channels]
        return torch.cat([eps, out[:, self.guided_channels :]], dim=1)


#        depth    D  heads          DiT paper, Table 1
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}

DiT_models = {
    f"DiT-{size}/{patch}": partial(DiT, depth=depth, hidden_size=width, num_heads=heads, patch_size=patch)
    for size, (depth, width, heads) in SIZES.items()
    for patch in (2, 4, 8)
}
# the same twelve as names, for `from models import DiT_XL_2`
DiT_S_2, DiT_S_4, DiT_S_8, DiT_B_2, DiT_B_4, DiT_B_8, *larger = DiT_models.values()
DiT_L_2, DiT_L_4, DiT_L_8, DiT_XL_2, DiT_XL_4, DiT_XL_8 = larger
