"""Diffusion Transformers: Peebles and Xie, "Scalable Diffusion Models with Transformers" (ICCV 2023), Figure 3.

    x_t -> patches -> tokens -> N blocks -> final layer -> eps and the covariance's interpolation, of x_t's size

A noised latent becomes a sequence of tokens; `depth` transformer blocks process it under the condition, which is the
timestep t and the class y; a linear layer turns each token back into a patch. How the condition reaches the blocks is the
`block` design, of which the paper compares four. Shapes: N batch, C channels, H = W input side, P patch side,
T = (H / P)^2 tokens, D width.

    model = DiT_models["DiT-XL/2"](input_size=32, num_classes=1000)
    eps_and_variance = model(x_t, t, y)      # (N, 2C, H, W)

With `text_width` the condition is a text in place of the class: every block also attends to the text's tokens.
"""

import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import AttentionRope, build_rotary_pos_embed
from timm.models.vision_transformer import Attention, Mlp, PatchEmbed
from torch import nn
from torch.utils.checkpoint import checkpoint

# ----------------------------------------------------------------------------------------------------------------------
# Embeddings of the position, the timestep and the class


def position_embedding(width, grid_size):
    """Fixed 2D sine-cosine embedding, computed in float64. Returns (T, D): the first half of D encodes the column, the
    second the row, each as [sin, cos] of position / 10000^(i / (D/4))."""
    frequencies = 10000.0 ** -(np.arange(width // 4) / (width / 4))
    angles = np.arange(grid_size)[:, None] * frequencies  # (grid, D/4)
    one_axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # (grid, D/2)
    row, column = np.divmod(np.arange(grid_size**2), grid_size)
    return torch.from_numpy(np.concatenate([one_axis[column], one_axis[row]], axis=1))


class TimestepEmbedder(nn.Module):
    """t: (N,) in [0, 1000), fractions allowed -> (N, D): a 256-dimensional sinusoid, then a two-layer MLP."""

    frequency_size = 256

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.frequency_size, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        half = self.frequency_size // 2
        # computed here: a buffer outside of the state dict would stay empty in a model that is built on the meta device
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angles = t[:, None].float() * frequencies  # (N, 128)
        # float32 always: half precision cannot tell neighbouring timesteps apart
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """y: (N,) int64 -> (N, D), through a table whose last row, `null_class`, stands for "no class". Or y: (N, rows of the
    table) float, weights of the rows.

    In training each label is replaced by the null class with probability `dropout` (Ho and Salimans 2022), which is what
    makes guidance possible; a caller that has called `drop` itself puts this module into eval mode. Without dropout there
    is no null row, unless there are no classes at all."""

    def __init__(self, num_classes, width, dropout):
        super().__init__()
        self.null_class, self.dropout = num_classes, dropout
        self.embedding_table = nn.Embedding(num_classes + (dropout > 0 or num_classes == 0), width)

    def forward(self, y):
        if y.is_floating_point():
            return y @ self.embedding_table.weight
        return self.embedding_table(self.drop(y) if self.training else y)

    def drop(self, y):
        if self.dropout == 0:
            return y
        return y.masked_fill(torch.rand(len(y), device=y.device) < self.dropout, self.null_class)


class TextEmbedder(nn.Module):
    """A text y: (N, L, W + 1) float, of each token the W numbers that a text encoder gave, then 1, or 0 for padding ->
    tokens (N, L, D), by a two-layer MLP, and their mask (N, 1, 1, L) bool (Chen et al. 2024, PixArt-alpha). Labels (N,)
    int64 stand for no text.

    null_text: (L, W + 1), the empty text, which in training replaces each text with probability `dropout`; a caller that
    has called `drop` itself puts this module into eval mode."""

    def __init__(self, text_width, text_length, width, dropout):
        super().__init__()
        self.dropout = dropout
        self.null_text = nn.Parameter(torch.zeros(text_length, text_width + 1), requires_grad=False)
        self.null_text.data[0, -1] = 1  # a token to attend to, until the encoder's are put here
        self.mlp = nn.Sequential(nn.Linear(text_width, width), nn.GELU(approximate="tanh"), nn.Linear(width, width))

    def forward(self, y):
        if not y.is_floating_point():
            y = self.null_text.expand(len(y), -1, -1)
        elif self.training:
            y = self.drop(y, self.null_text)
        return self.mlp(y[..., :-1]), y[:, None, None, :, -1].bool()

    def drop(self, y, null_text):
        if self.dropout == 0:
            return y
        return torch.where(torch.rand(len(y), 1, 1, device=y.device) < self.dropout, null_text, y)


# ----------------------------------------------------------------------------------------------------------------------
# The four block designs: section 3.2 and Figure 3 of the paper, from right to left


class TransformerBlock(nn.Module):
    """The standard ViT block. The in-context design uses it as it is, with the condition as two of the tokens; the other
    designs add to it."""

    num_modulations = 0  # vectors of (N, D) that the design regresses from the condition

    def __init__(self, width, num_heads, mlp_ratio=4.0, rope=False, text=False):
        super().__init__()
        # an adaptive design brings scale and shift from the condition, so its norms have none of their own
        norm = partial(nn.LayerNorm, width, elementwise_affine=self.num_modulations == 0, eps=1e-6)
        self.norm1 = norm()
        attention = partial(AttentionRope, num_prefix_tokens=0) if rope else Attention
        self.attn = attention(width, num_heads=num_heads, qkv_bias=True)
        self.norm2 = norm()
        self.mlp = Mlp(width, int(width * mlp_ratio), act_layer=partial(nn.GELU, approximate="tanh"))
        if self.num_modulations:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, self.num_modulations * width))
        if text:
            self.norm_text, self.text_attn = nn.LayerNorm(width, eps=1e-6), CrossAttention(width, num_heads)

    def forward(self, x, c, text=None, **positions):
        """x: (N, T, D). c: the condition: unused here, whose tokens are among x; (N, 2, D) in cross-attention; else (N, D).
        text: (tokens, mask) as of `TextEmbedder`, for blocks made with `text`. positions: `rope`, the rotations of x's
        tokens, where the model has them."""
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

    def __init__(self, width, num_heads, mlp_ratio=4.0, **attention):
        super().__init__(width, num_heads, mlp_ratio, **attention)
        self.norm_cross = nn.LayerNorm(width, eps=1e-6)
        self.cross_attn = CrossAttention(width, num_heads)

    def forward(self, x, c, text=None, **positions):
        x = self.add_text(x + self.attn(self.norm1(x), **positions), text)
        x = x + self.cross_attn(self.norm_cross(x), c)
        return x + self.mlp(self.norm2(x))


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


class AdaLNBlock(TransformerBlock):
    """Scale and shift of both norms are regressed from c = t_emb + y_emb."""

    num_modulations = 4

    def forward(self, x, c, text=None, **positions):
        shift1, scale1, shift2, scale2 = self.adaLN_modulation(c).unsqueeze(1).chunk(4, dim=-1)  # each (N, 1, D)
        x = self.add_text(x + self.attn(modulate(self.norm1(x), shift1, scale1), **positions), text)
        return x + self.mlp(modulate(self.norm2(x), shift2, scale2))


class DiTBlock(TransformerBlock):
    """adaLN-Zero: also a gate on each branch, all zero at first, so that every block starts as the identity."""

    num_modulations = 6

    def forward(self, x, c, text=None, **positions):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=-1)
        x = self.add_text(x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), **positions), text)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


BLOCKS = {
    "adaln-zero": DiTBlock,
    "adaln": AdaLNBlock,
    "cross-attention": CrossAttentionBlock,
    "in-context": TransformerBlock,
}


class FinalLayer(nn.Module):
    """Norm (adaptive where the blocks' norms are), then a linear map of each token to its patch."""

    def __init__(self, width, patch_size, out_channels, adaptive):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=not adaptive, eps=1e-6)
        self.linear = nn.Linear(width, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width)) if adaptive else None

    def forward(self, x, c):
        x = self.norm_final(x)
        if self.adaLN_modulation is not None:
            x = modulate(x, *self.adaLN_modulation(c).unsqueeze(1).chunk(2, dim=-1))
        return self.linear(x)


# ----------------------------------------------------------------------------------------------------------------------
# The model

OUTPUTS = [("diffusion", "eps"), ("diffusion", "v"), ("flow", "v")]


class DiT(nn.Module):
    """A diffusion model with a transformer for its backbone.

    input_size: side of x in latent cells (pixels / 8 for the Stable Diffusion autoencoder). class_dropout_prob: share of
    labels replaced by the null class in training. num_classes: 0 for an unconditional model. learn_sigma: also predict
    the interpolation of log-variances, as C more channels. block: one of `BLOCKS`.

    Newer ideas, all off by default. objective, predict: what the first C channels of the output are, for those who read
    them: eps or v of a "diffusion" (see `diffusion`), or the velocity v of a "flow". rope: rotary position embeddings
    in two dimensions (Su et al. 2021, Heo et al. 2024), beside the fixed ones. text_width: W of the text encoder whose
    texts, of up to `text_length` tokens, are the condition; the new branch of each block adds nothing at first, so that a
    model trained without it can be continued. There are no classes then.
    Raises ValueError for sizes that cannot be built.

    config: all these arguments by name. gradient_checkpointing: with k > 0, every k-th block keeps no activations and
    computes them again for the gradient.
    """

    def __init__(
        self,
        input_size=32,
        patch_size=2,
        in_channels=4,
        hidden_size=1152,
        depth=28,
        num_heads=16,
        mlp_ratio=4.0,
        class_dropout_prob=0.1,
        num_classes=1000,
        learn_sigma=True,
        block="adaln-zero",
        objective="diffusion",
        predict="eps",
        rope=False,
        text_width=0,
        text_length=120,
    ):
        arguments = dict(locals())
        super().__init__()
        self.config = {name: value for name, value in arguments.items() if name not in ("self", "__class__")}
        if block not in BLOCKS:
            raise ValueError(f"block {block!r} is not one of {', '.join(BLOCKS)}")
        if input_size % patch_size:
            raise ValueError(f"input size {input_size} is not a multiple of the patch size {patch_size}")
        if hidden_size % num_heads:
            raise ValueError(f"hidden size {hidden_size} is not a multiple of the number of heads {num_heads}")
        if hidden_size % 4:
            raise ValueError(f"hidden size {hidden_size} is not a multiple of 4, which the position embedding needs")
        if int(hidden_size * mlp_ratio) < 1:
            raise ValueError(f"MLP ratio {mlp_ratio} leaves the MLP no hidden unit at hidden size {hidden_size}")
        if (objective, predict) not in OUTPUTS:
            raise ValueError(f"objective {objective!r} with {predict!r} predicted is not one of {OUTPUTS}")
        if rope and (block == "in-context" or hidden_size // num_heads % 4):
            raise ValueError("rotary positions need heads whose width is a multiple of 4, and no in-context block")
        if text_width and num_classes:
            raise ValueError(f"a model of texts has no classes, these are {num_classes}")
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.num_classes, self.null_class, self.learn_sigma, self.block = num_classes, num_classes, learn_sigma, block
        self.objective, self.predict = objective, predict
        self.text_width, self.text_length = text_width, text_length
        self.gradient_checkpointing = 0
        self.head_size = hidden_size // num_heads if rope else None

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size, bias=True)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.x_embedder.num_patches, hidden_size), requires_grad=False)
        if text_width:
            self.text_embedder = TextEmbedder(text_width, text_length, hidden_size, class_dropout_prob)
        new_block = partial(BLOCKS[block], hidden_size, num_heads, mlp_ratio, rope=rope, text=text_width > 0)
        self.blocks = nn.ModuleList(new_block() for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels, BLOCKS[block].num_modulations > 0)
        self.initialize_weights()

    @property
    def guided_channels(self):
        """How many channels of eps are guided by default. The original release guides the first three of the autoencoder's
        four, and its published numbers depend on it: a scale of 1.5 on three channels is about 1.375 on four."""
        return 3 if self.in_channels == 4 else self.in_channels

    def initialize_weights(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.flatten(1))  # the patch convolution as a linear layer
        nn.init.zeros_(self.x_embedder.proj.bias)
        if not self.pos_embed.is_meta:  # a meta model has no values, but computing these may need very much memory
            grid_size = self.input_size // self.patch_size
            self.pos_embed.data.copy_(position_embedding(self.pos_embed.shape[-1], grid_size))
        for embedding in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(embedding.weight, std=0.02)
        zero = [self.final_layer.linear] + [block.text_attn.proj for block in self.blocks if self.text_width]
        if self.block == "adaln-zero":
            zero += [layer.adaLN_modulation[1] for layer in [*self.blocks, self.final_layer]]
        for linear in zero:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x, t, y):
        """x: (N, C, H, W) noised latents. t: (N,) timesteps in [0, 1000). y: (N,) int64 labels in [0, num_classes], the
        last for "no class", or (N, num_classes + 1) float weights of their embeddings; for a model of texts (N, L, W + 1),
        see `TextEmbedder`. Returns (N, 2C, H, W): eps, then the interpolation of log-variances in about [-1, 1]; with
        learn_sigma=False eps alone."""
        # (N, T, D), in this order in memory too, which the embedder leaves transposed and every later x would inherit
        x = self.x_embedder(x).contiguous() + self.pos_embed
        extra = {}  # what blocks get besides x and c
        if self.text_width:
            extra["text"] = self.text_embedder(y)
            y = torch.zeros(len(x), dtype=torch.int64, device=x.device)  # the null class, the only one
        t_emb, y_emb = self.t_embedder(t), self.y_embedder(y)  # each (N, D)
        if BLOCKS[self.block].num_modulations:
            c = t_emb + y_emb  # (N, D)
        else:
            c = torch.stack([t_emb, y_emb], dim=1)  # (N, 2, D)
        if self.block == "in-context":
            x = torch.cat([x, c.to(x.dtype)], dim=1)  # (N, T + 2, D), the two without a position
        if self.head_size:
            extra["rope"] = self.rotations(x.device)
        for i, block in enumerate(self.blocks):
            if self.gradient_checkpointing and i % self.gradient_checkpointing == 0 and torch.is_grad_enabled():
                # a block draws nothing
                x = checkpoint(block, x, c, use_reentrant=False, preserve_rng_state=False, **extra)
            else:
                x = block(x, c, **extra)
        return self.unpatchify(self.final_layer(x[:, : self.pos_embed.shape[1]], c))  # of the image's tokens

    def rotations(self, device):
        """sin and cos of rotary positions for each token and entry of a head's queries, (T, 2d) float32. Computed here: see
        `TimestepEmbedder`."""
        side = self.input_size // self.patch_size
        return torch.cat(build_rotary_pos_embed([side, side], dim=self.head_size, in_pixels=False, device=device), dim=-1)

    def compile_blocks(self, backend="inductor"):
        """Compile the blocks, where all the time goes, on first use: one is compiled and the others share its code, so that
        more of them take no longer. Weights and state dict stay as they are."""
        for block in self.blocks:
            block.compile(backend=backend, dynamic=False)

    def unpatchify(self, x):
        """(N, T, P * P * C') -> (N, C', H, W); a token's values run row in patch, column in patch, channel."""
        side, patch = self.input_size // self.patch_size, self.patch_size
        x = x.reshape(len(x), side, side, patch, patch, self.out_channels)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), self.out_channels, side * patch, side * patch)

    def forward_with_cfg(self, x, t, y, cfg_scale):
        """Classifier-free guidance in the original release's form, for scripts written for it: the batch is doubled,
        y holds the labels and then the null class, only the first half of x is read, and both halves of the result hold
        the same guided eps. New code calls `diffusion.guidance.guided_denoiser`."""
        if len(x) % 2:
            raise ValueError(f"forward_with_cfg needs a doubled batch, [conditional; unconditional], not {len(x)} images")
        half = x[: len(x) // 2]
        out = self(torch.cat([half, half]), t, y)
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
