"""What a model costs: parameters, multiply-accumulates and memory of a training step, counted on PyTorch's meta device,
which computes shapes and no values; and the images per second that a GPU's peak allows. `train.py --dry-run` and
complexity.py print the same rows.

    cost = count(build("DiT-XL/2", num_classes=10), batch_size=32, precision="bf16")
    print(cost["parameters"], cost["training_memory_bytes"]["total"], rows(cost))
"""

import math
import re

import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from diffusion.registry import OBJECTIVES
from models import DiT_models
from runtime.shapes import plain_size


def build(name, **arguments):
    """A model of `DiT_models` on the meta device. Raises ValueError for sizes that cannot be built."""
    with torch.device("meta"):
        return DiT_models[name](**arguments)


def inputs(model, batch_size, sides=None):
    """x, t, y of a batch. sides: of x (default: the model's input_size)."""
    x = model.pos_embed.new_empty(batch_size, model.in_channels, *(sides or model.sizes.sides))
    t = x.new_empty(batch_size)
    return x, t, model.condition.blank(batch_size).to(x.device) if model.condition else t.long()


def trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def forward_macs(model, sides=None):
    """Multiply-accumulates of a forward pass of one image. sides: as of `inputs`."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs(model, 1, sides))
    return counter.get_total_flops() // 2


def training_flops(model, macs, guidance=1.0):
    """Of one image: two for a multiply-accumulate, and a backward pass of twice the forward pass. macs: `forward_macs`.
    guidance: in the target, for which the unconditional prediction is computed."""
    return int(2 * macs * (3 + OBJECTIVES[model.objective].target_passes + (guidance != 1)))


def activation_bytes(model, batch_size, precision, sharded=False):
    """Bytes that autograd keeps from the forward to the backward pass of a training step, each storage once: activations
    and, in bf16, copies of the weights (not of the blocks with --shard, which are gathered in bf16), without parameters."""

    class GPUKernels(TorchFunctionMode):
        """Gives tensors on the meta device the dtypes and the attention kernel of a GPU. The meta device has no autocast:
        this is its rule for the three functions of `DiT` that it runs in bf16. And the meta device's attention stores the
        (T, T) weights; the GPU's fused kernels keep q, k, v, the output and one number per query."""

        def __torch_function__(self, function, types, args=(), kwargs=None):
            if precision == "bf16" and function in (F.linear, F.conv2d, F.conv3d, F.scaled_dot_product_attention):
                args = [self.cast(a) if isinstance(a, torch.Tensor) else a for a in args]
            if function is F.scaled_dot_product_attention:
                return torch.ops.aten._scaled_dot_product_efficient_attention(*args, None, compute_log_sumexp=True)[0]
            return function(*args, **(kwargs or {}))

        def cast(self, tensor):
            copy = tensor.bfloat16()
            if tensor in gathered:
                ignored.add(StorageWeakRef(copy.untyped_storage()))
            return copy

    gathered = set(model.blocks.parameters()) if sharded else ()
    ignored, saved = {StorageWeakRef(p.untyped_storage()) for p in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[StorageWeakRef(storage)] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), GPUKernels():
        out = model.train()(*inputs(model, batch_size))  # holds the graph, so no storage's identity is used twice
    del out
    return sum(nbytes for storage, nbytes in saved.items() if storage not in ignored)


def training_memory(model, batch_size, precision, num_shards=1, num_averages=1):
    """Bytes by what holds them on each device. batch_size: of a device. num_shards: processes among which --shard divides.

    Weights, gradients, both moments of AdamW and the EMAs are float32 at every precision. With shards, two blocks are
    gathered, the weights outside of blocks, which stay float32, and the gradients of one block. The backward pass holds the
    gradients of a block's activations, and with gradient checkpointing these activations. Not counted: what kernels need
    while they run, the allocator's fragments, CUDA's context."""
    everything, learned = (4 * n for n in (sum(p.numel() for p in model.parameters()), trainable(model)))
    parts = {"weights": everything, "ema": num_averages * everything, "gradients": learned, "optimizer": 2 * learned}
    parts = {name: math.ceil(nbytes / num_shards) for name, nbytes in parts.items()}
    parts["activations"] = activations = activation_bytes(model, batch_size, precision, num_shards > 1)
    if num_shards > 1:
        block = 4 * sum(p.numel() for p in model.blocks[0].parameters())
        in_block = block // 2 if precision == "bf16" else block
        parts["gathered"] = 2 * in_block + everything - len(model.blocks) * block + block
    if kept := model.gradient_checkpointing:
        model.gradient_checkpointing = 0
        activations = activation_bytes(model, batch_size, precision)
        model.gradient_checkpointing = kept
    parts["backward pass"] = activations // len(model.blocks) * (2 if kept else 1)
    return parts | {"total": sum(parts.values())}


def count(model, batch_size, precision, num_shards=1, num_averages=1, guidance=1.0):
    """The cost of training a model on the meta device, a dict of numbers; see `training_memory` and `training_flops`."""
    macs, memory = forward_macs(model), training_memory(model, batch_size, precision, num_shards, num_averages)
    found = {"tokens": model.pos_embed.shape[1], "parameters": trainable(model), "forward_macs_per_image": macs}
    if model.sizes.frames:
        found["frames"] = model.sizes.frames
    if model.sizes.other_sizes:
        found["forward_macs_by_latent_size"] = {plain_size(s): forward_macs(model, s) for s in model.sizes.other_sizes}
    return found | {"training_flops_per_image": training_flops(model, macs, guidance), "training_memory_bytes": memory}


def rows(cost, free=None):
    """What is printed of a cost: pairs of a title and a text. free: bytes that the device has, if that is known."""
    memory = {f"memory: {part}": gib(nbytes) for part, nbytes in cost["training_memory_bytes"].items()}
    unit = "a clip" if "frames" in cost else "an image"
    in_all = f"{memory.pop('memory: total')} on each device" + (f", of {gib(free)} free" if free else "")
    others = ", ".join(f"{macs / 1e9:,.2f} of {size}" for size, macs in cost.get("forward_macs_by_latent_size", {}).items())
    return [
        ("parameters", f"{cost['parameters']:,} trainable"),
        ("forward pass", f"{cost['forward_macs_per_image'] / 1e9:,.2f} GMACs {unit}"),
        *([("of other shapes", f"{others} latent cells")] if others else []),
        ("training step", f"{cost['training_flops_per_image'] / 1e9:,.2f} GFLOP {unit}"),
        *memory.items(),
        ("memory in all", in_all),
    ]


def gib(nbytes):
    return f"{nbytes / 2**30:,.2f} GiB"


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
    return next((of for name, of in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", device_name)), {}).get(precision)


def peak_images_per_second(model, context, precision, tflops=None, guidance=1.0):
    """Images per second of training that all processes' devices would reach at their peak; None where it is not known.
    tflops: of one device (default: the table's). guidance: see `training_flops`."""
    if tflops is None and context.device.type == "cuda":
        tflops = peak_tflops(torch.cuda.get_device_name(context.device), precision)
    if tflops is None:
        return None
    model = build("DiT-S/2", **model.config)  # its own sizes replace all of that name's
    return context.world_size * tflops * 1e12 / training_flops(model, forward_macs(model), guidance)
