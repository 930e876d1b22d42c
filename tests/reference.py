"""What several tests share: the reference numbers in golden/, what they were made with (golden/README.md), and a guard
against steps that wait for a GPU."""

import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

GOLDEN = Path(__file__).parent / "golden"
OPTIONS = {"default": {}, "fixed_large": {"learn_sigma": False}, "xstart": {"predict_xstart": True}, "kl": {"use_kl": True}}
OPTIONS["cosine"] = {"noise_schedule": "squaredcos_cap_v2"}
# the model of small.npz and train.npz
SMALL = {"input_size": 8, "patch_size": 2, "in_channels": 4, "num_classes": 10}
SMALL |= {"hidden_size": 96, "depth": 3, "num_heads": 4}


def golden(name):
    return np.load(GOLDEN / f"{name}.npz")


def normal(key, *shape):
    values = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    return torch.from_numpy(values.astype(np.float32))


def fill(model):
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name != "pos_embed":
                std = 0.1 if tensor.ndim == 1 else 1 / np.sqrt(np.prod(tensor.shape[1:]))
                tensor.copy_(normal(name, *tensor.shape)).mul_(float(std))
    return model.eval()


def filled(constructor, **options):
    """fill(constructor(**options)), but without the random weights that `fill` replaces: 675 million take seconds."""

    def keep(tensor, *args, **options):
        return tensor

    with mock.patch.multiple(torch.Tensor, uniform_=keep, normal_=keep):
        model = constructor(**options)
    return fill(model)


def stub(learn_sigma):
    """The model of diffusion.npz, loops.npz and steps.npz, which sees the timesteps of the full process."""

    def model(x, t, y=None):
        eps = 0.7 * torch.tanh(x) + 0.1 * t.view(-1, 1, 1, 1) / 1000
        return torch.cat([eps, 0.9 * torch.cos(x)], dim=1) if learn_sigma else eps

    return model


def assert_golden(actual, expected, what, tol=1e-5):
    actual = np.asarray(actual.detach() if isinstance(actual, torch.Tensor) else actual, dtype=np.float64)
    expected = np.asarray(expected, dtype=np.float64)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, the reference has {expected.shape}"
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error <= tol, f"{what}: off by {error:.2e} of the largest value, allowed {tol:.0e}"


def training_batch(i):
    """(x_0, noise, t, y) of step i of train.npz."""
    x_0, noise = normal(f"batch{i}", 8, 4, 8, 8) * 0.5, normal(f"noise{i}", 8, 4, 8, 8)
    t = torch.from_numpy(np.random.RandomState(i).randint(0, 1000, 8))
    return x_0, noise, t, torch.from_numpy(np.random.RandomState(1000 + i).randint(0, 10, 8))


class HostTraffic(TorchDispatchMode):
    """Fails on what would copy between host and device, or wait for the device, were the device a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        tensors = [a for a in args if isinstance(a, torch.Tensor) and a.ndim > 0]
        assert "_local_scalar_dense" not in name, "a step waits for the device"
        assert not any(a.device.type == "cpu" for a in tensors), f"{name} reads a tensor on the host"
        assert "_to_copy" not in name or not tensors or tensors[0].device.type != "cpu", f"{name} copies from the host"
        return func(*args, **(kwargs or {}))
