"""How fast the devices could be: the peak of their arithmetic, and the images per second of training that it allows."""

import re

import torch

from training.cost import build, forward_macs

# Dense TFLOP/s of one GPU, without sparsity, from NVIDIA's data sheets
PEAK_TFLOPS = {
    "B200": {"bf16": 2250, "tf32": 1125, "fp32": 75},
    "H200": {"bf16": 989, "tf32": 495, "fp32": 67},
    "H100 PCIe": {"bf16": 756, "tf32": 378, "fp32": 51},
    "H100": {"bf16": 989, "tf32": 495, "fp32": 67},
    "A100": {"bf16": 312, "tf32": 156, "fp32": 19.5},
    "A10": {"bf16": 125, "tf32": 62.5, "fp32": 31.2},
    "L40S": {"bf16": 362, "tf32": 183, "fp32": 91.6},
    "L4": {"bf16": 121, "tf32": 60, "fp32": 30.3},
    "RTX 4090": {"bf16": 165, "tf32": 82.6, "fp32": 82.6},
    "RTX 3090": {"bf16": 71, "tf32": 35.6, "fp32": 35.6},
    "V100": {"fp32": 15.7},
}


def peak_tflops(device_name, precision):
    """TFLOP/s of a GPU at a precision by the table; None for one that is not in it. A more specific name comes first."""
    found = (peaks for name, peaks in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", device_name))
    return next(found, {}).get(precision)


def peak_images_per_second(model, context, precision, tflops=None):
    """Images per second of training that all processes' devices would reach at their peak; None where it is not known.

    tflops: of one device (default: the table's). The FLOPs are those of complexity.py: two for a multiply-accumulate, and
    a backward pass of twice the forward pass."""
    if tflops is None and context.device.type == "cuda":
        tflops = peak_tflops(torch.cuda.get_device_name(context.device), precision)
    if tflops is None:
        return None
    flops = 3 * 2 * forward_macs(build("DiT-S/2", **model.config))  # its own sizes replace all of that name's
    return context.world_size * tflops * 1e12 / flops
