"""The exponential moving average of a model's weights, with which all results are reported."""

import copy

import torch


class EMA:
    """`module` holds the average: a copy of the model in eval mode, made here unless it is given. Only trainable
    parameters are averaged; the frozen position embedding never changes."""

    def __init__(self, model, decay=0.9999, warmup=False, module=None):
        self.decay, self.warmup = decay, warmup
        self.module = module or copy.deepcopy(model).eval().requires_grad_(False)
        trained = [p.requires_grad for p in model.parameters()]
        self.averages = [p for p, use in zip(self.module.parameters(), trained, strict=True) if use]
        self.weights = [p for p in model.parameters() if p.requires_grad]

    @torch.no_grad()
    def update(self, step):
        """average <- decay * average + (1 - decay) * weights, in one fused call. step: number of updates made before,
        from 0. With warm-up the decay is at most (1 + step) / (10 + step), so that a short run forgets its initial
        weights."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        torch._foreach_lerp_(self.averages, self.weights, 1 - decay)
