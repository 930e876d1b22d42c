"""ema.py against the recursion written out."""

import pytest
import torch

from training.ema import EMA


@pytest.mark.parametrize(("decay", "warmup"), [(0.99, False), (0.9999, True), (0.0, False), (1.0, False)])
def test_average_is_the_recursion(decay, warmup):
    model = torch.nn.Linear(3, 2).double()
    model.bias.requires_grad = False  # like the position embedding
    ema = EMA(model, decay, warmup)
    expected, frozen = model.weight.detach().clone(), model.bias.clone()
    for step in range(20):
        with torch.no_grad():
            model.weight += torch.randn_like(model.weight)
            model.bias += 1
        ema.update(step)
        d = min(decay, (1 + step) / (10 + step)) if warmup else decay
        expected = d * expected + (1 - d) * model.weight.detach()
    torch.testing.assert_close(ema.module.weight, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(ema.module.bias, frozen), "what is frozen is left out"
    assert not ema.module.training
    assert not any(p.requires_grad for p in ema.module.parameters())
