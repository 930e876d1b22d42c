"""What a model costs: parameters, multiply-accumulates and memory of a training step, counted on PyTorch's meta device,
which computes shapes and no values.

    model = build("DiT-XL/2", num_classes=10)
    print(trainable(model), forward_macs(model), training_memory(model, batch_size=32, precision="bf16"))
"""

# PyTorch and the models take seconds to import: functions import them, so that complexity.py starts fast


def build(name, **arguments):
    """A model of `DiT_models` on the meta device. Raises ValueError for sizes that cannot be built."""
    import torch

    from models import DiT_models

    with torch.device("meta"):
        return DiT_models[name](**arguments)


def input_side(image_size, downsampling=8):
    """Pixels -> latent cells. Raises ValueError where the cells do not fill the image."""
    if image_size % downsampling:
        raise ValueError(f"image size {image_size} is not a multiple of {downsampling}, the pixels per latent cell")
    return image_size // downsampling


def inputs(model, batch_size):
    x = model.pos_embed.new_empty(batch_size, model.in_channels, model.input_size, model.input_size)
    text = (batch_size, model.text_length, model.text_width + 1)
    return x, x.new_empty(batch_size), x.new_empty(text) if model.text_width else x.new_empty(batch_size).long()


def trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def forward_macs(model):
    """Multiply-accumulates of a forward pass of one image."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs(model, 1))
    return counter.get_total_flops() // 2


def activation_bytes(model, batch_size, precision):
    """Bytes that autograd keeps from the forward to the backward pass of a training step, each storage once: activations
    and, in bf16, copies of the weights. The parameters themselves are not among them."""
    import torch
    import torch.nn.functional as F
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.overrides import TorchFunctionMode

    class GPUKernels(TorchFunctionMode):
        """Gives tensors on the meta device the dtypes and the attention kernel of a GPU. The meta device has no autocast:
        this is autocast's rule for the three functions of `DiT` that it runs in bf16. And the meta device's attention
        stores the (T, T) weights, which the GPU's fused kernels do not: for the backward pass they keep q, k, v, the
        output and one number per query."""

        def __torch_function__(self, function, types, args=(), kwargs=None):
            if precision == "bf16" and function in (F.linear, F.conv2d, F.scaled_dot_product_attention):
                args = [a.bfloat16() if isinstance(a, torch.Tensor) else a for a in args]
            if function is F.scaled_dot_product_attention:
                return torch.ops.aten._scaled_dot_product_efficient_attention(*args, None, compute_log_sumexp=True)[0]
            return function(*args, **(kwargs or {}))

    parameters = {StorageWeakRef(p.untyped_storage()) for p in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[StorageWeakRef(storage)] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), GPUKernels():
        out = model.train()(*inputs(model, batch_size))  # holds the graph, so no storage's identity is used twice
    del out
    return sum(nbytes for storage, nbytes in saved.items() if storage not in parameters)


def training_memory(model, batch_size, precision):
    """Bytes by what holds them, on one device under DDP. Weights, gradients, both moments of AdamW and the EMA are float32
    at every precision. Not counted: what kernels need while they run, the allocator's fragments, CUDA's context."""
    everything, learned = (4 * n for n in (sum(p.numel() for p in model.parameters()), trainable(model)))
    parts = {
        "weights": everything,
        "ema": everything,
        "gradients": learned,
        "optimizer": 2 * learned,
        "activations": activation_bytes(model, batch_size, precision),
    }
    return parts | {"total": sum(parts.values())}
