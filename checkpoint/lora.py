"""LoRA (Hu et al. 2022): each linear layer of attention and MLP gets W + B A with W frozen, A (rank, inputs) normal and B
(outputs, rank) zero at first. A checkpoint holds A, B and what else the base model lacks, and names the base."""

import torch
from torch import nn
from torch.nn.utils import parametrize

LAYERS = {"attn", "cross_attn", "text_attn", "time_attn", "mlp"}  # of a block
PREFIX, WEIGHT = ".parametrizations.weight", ".weight"  # of the names of such a layer's tensors, and of its plain weight


class LowRank(nn.Module):
    """weight -> weight + B A."""

    def __init__(self, weight, rank):
        super().__init__()
        self.A = nn.Parameter(torch.randn(rank, weight.shape[1], device=weight.device) / weight.shape[1] ** 0.5)
        self.B = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))

    def forward(self, weight):
        return weight + self.B @ self.A


def add(model, rank, base=None):
    """Freeze what a DiT has from its base, a state dict (default: everything), and add pairs of this rank, from torch's
    random stream. Sets `model.own`, the names in its state dict that a checkpoint has to hold. Returns a line to log."""
    state = model.state_dict().items()
    taken = {name for name, x in state if base is None or (name in base and torch.equal(x, base[name].to(x)))}
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and name not in taken)
    for name, module in [*model.blocks.named_modules()]:
        inside = not LAYERS.isdisjoint(name.split(".")) and f"blocks.{name}{WEIGHT}" in taken
        if inside and isinstance(module, nn.Linear):
            parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank))
    model.own = {name for name in model.state_dict() if name.replace(f"{PREFIX}.original", WEIGHT) not in taken}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"LoRA of rank {rank}: {trained:,} values are trained; checkpoints hold these, and need the base model"


def merge(base, own):
    """The state dict of the plain model: of the base's, and what a checkpoint holds of its own."""
    merged = {**base, **{name: value for name, value in own.items() if PREFIX not in name}}
    for name, A in own.items():
        if name.endswith(f"{PREFIX}.0.A"):
            layer, weight = name.removesuffix("A"), name.removesuffix(f"{PREFIX}.0.A") + WEIGHT
            merged[weight] = base[weight] + own[layer + "B"] @ A
    return merged
