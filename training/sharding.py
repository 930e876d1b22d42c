"""Sharded training (--shard): each process keeps its part of the weights, gradients, moments and EMA. This is PyTorch's
FSDP2 (Zhao et al. 2023, "PyTorch FSDP"), the third stage of ZeRO (Rajbhandari et al. 2020).

Each tensor is divided along its first axis. A block's weights are gathered before the block is computed, forward and
backward, and freed afterwards; its gradients are averaged while they are divided again.

    shard(model, make_mesh(context, "all"))     # in place: the parameters are DTensors now
    average = copy_of(model)                    # divided in the same way
    state = gather(optimizer.state_dict(), keep=context.is_main)     # full tensors in the host's memory
"""

import copy

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from checkpoint.saver import copy_to_host, map_tensors
from models import DiT
from runtime.errors import UserError
from runtime.files import reason
from runtime.launch import launched

TOLERANCE = 1e-3  # relative difference of gradients; a sum instead of an average is a difference of 1 or more


def make_mesh(context, how):
    """The grid of processes. how: "all" divides over all of them; "node" over those of a node, of which each has a full
    copy. Every rank calls it. Raises UserError where that cannot be."""
    device, size = context.device.type, context.world_size
    if device == "mps":
        raise UserError("--shard: MPS cannot be shared by processes; leave the option out")
    if not dist.is_initialized():  # a process on its own
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if how == "all":
        return init_device_mesh(device, (size,), mesh_dim_names=("shard",))
    local_ranks = context.all_gather(launched()[1])
    per_node = max(local_ranks) + 1
    if local_ranks != list(range(per_node)) * (size // per_node):
        raise UserError("--shard node: needs equally many processes on each node, numbered node by node; pass --shard")
    return init_device_mesh(device, (size // per_node, per_node), mesh_dim_names=("replicate", "shard"))


def shard(model, mesh, precision="fp32"):
    """Divide the parameters of a DiT, one group for each block and one for the rest, and move them to the mesh's device.

    precision: with "bf16" the blocks' weights are gathered in bfloat16, to which autocast would cast them; the rest stays
    float32, and with it the tokens between the blocks. Gradients are always averaged in float32."""
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)


def probe(context, mesh):
    """Compare the gradient of a tiny sharded model with the average of the processes' own gradients: some of the versions
    of PyTorch before 2.15 crash on CPUs or sum them, which Adam would hide. All ranks call it. Raises UserError, on all."""
    random = torch.Generator().manual_seed(context.rank)
    x, y = torch.randn(2, 1, 4, 4, generator=random).to(context.device), torch.tensor([0, 1], device=context.device)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            alone = DiT(4, 2, 1, hidden_size=8, depth=2, num_heads=2, num_classes=2)
            for parameter in alone.parameters():
                torch.nn.init.normal_(parameter, std=0.2)  # zero weights, as at the start, have few gradients
        sharded = copy.deepcopy(alone)
        shard(sharded, mesh)
        alone.to(context.device)
        for model in (alone, sharded):
            model.eval()(x, y, y).square().mean().backward()
        found = [p.grad.full_tensor().cpu() for p in sharded.parameters() if p.requires_grad]
        own = [p.grad.cpu() for p in alone.parameters() if p.requires_grad]
        expected = [sum(parts) / len(parts) for parts in zip(*context.all_gather(own), strict=True)]
        difference = max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))
        problem = None if difference < TOLERANCE else f"the gradients are wrong by {difference:.2g} of their size"
    except Exception as error:  # whatever this version raises
        problem = f"{type(error).__name__}: {reason(error)}"
    if found := next(filter(None, context.all_gather(problem)), None):
        problem = f"does not work with PyTorch {torch.__version__} on {context.device.type} ({found})"
        raise UserError("--shard", problem, "use version 2.15 or later, or leave the option out")


def copy_of(model, full=False):
    """A copy of a sharded DiT in eval mode. Divided in the same way it holds weights and computes nothing. full: with all
    weights on this process's device, for an evaluation: the processes may call it differently often, which would leave them
    waiting with a sharded one. Every rank calls it."""
    weights = model.state_dict().items()
    with torch.device("meta"):
        copied = DiT(**model.config, condition=model.condition)
    weights = {name: value.full_tensor() if full else value.detach().clone() for name, value in weights}
    copied.load_state_dict(weights, assign=True)
    return copied.eval().requires_grad_(False)


def gather(state, keep):
    """A copy of a nested state in the host's memory with full tensors, where `keep` is true; None for each tensor where it
    is false. One tensor is gathered after the other, so that no device holds more. Every rank calls it. Copies of CUDA
    tensors are asynchronous, as those of `copy_to_host`."""

    def full(tensor):
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return copy_to_host(tensor) if keep else None

    return map_tensors(full, state)


def scatter(state, model):
    """This process's parts of the full tensors in a state with `model`, `ema`, `emas` and `opt`: the inverse of `gather`,
    without communication. Raises ValueError where shapes differ from those of the sharded model."""
    parameters = dict(model.named_parameters())
    by_number = dict(enumerate(parameters.values()))  # as the optimizer's state counts them
    saved = state["opt"]["state"].items()
    moments = {number: {**values, "step": copy.deepcopy(values["step"])} for number, values in saved}
    for number, values in moments.items():
        values |= {key: _part(value, by_number[number]) for key, value in values.items() if key != "step"}
    sets = {"model": state["model"], "ema": state["ema"], **state.get("emas", {})}
    sets = {of: {name: _part(value, parameters[name]) for name, value in full.items()} for of, full in sets.items()}
    model, ema = sets.pop("model"), sets.pop("ema")
    return {**state, "model": model, "ema": ema, "emas": sets, "opt": {**state["opt"], "state": moments}}


def _part(full, parameter):
    """The DTensor of `full` that is divided like `parameter`. Each part is copied: a view would keep all of it."""
    if full.shape != parameter.shape:
        raise ValueError(f"a tensor of {tuple(full.shape)}, must be {tuple(parameter.shape)}")
    mesh = parameter.device_mesh
    parts, number = full.chunk(mesh["shard"].size()), mesh["shard"].get_local_rank()
    part = parts[number] if number < len(parts) else full[:0]
    part = part.to(mesh.device_type, parameter.dtype, copy=True)
    like = {"shape": parameter.shape, "stride": parameter.stride()}
    return DTensor.from_local(part, mesh, parameter.placements, run_check=False, **like)
