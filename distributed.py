"""Processes and devices: the same script under torchrun, on one node or many, and as plain `python`."""

import ctypes
import os
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist

from errors import UserError


def launched_rank():
    """This process's rank, known before any process group is: 0 outside torchrun."""
    return int(os.environ.get("RANK", 0))


@dataclass
class Context:
    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    control: object = None  # the group for flags and small objects, which go from host to host

    @property
    def is_main(self):
        return self.rank == 0

    def describe(self):
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type.upper()
        how = f"{self.world_size} processes" if self.world_size > 1 else "one process"
        return f"{how} on {name}"

    def barrier(self):
        if self.world_size > 1:
            dist.barrier(group=self.control)

    def broadcast(self, value):
        """Rank 0's picklable value, on every rank."""
        return self.gather(value)[0]

    def gather(self, value):
        """Every rank's picklable value, in the order of ranks, on every rank. Waits for the hosts, not for the devices."""
        values = [value]
        if self.world_size > 1:
            values = [None] * self.world_size
            dist.all_gather_object(values, value, group=self.control)
        return values

    def together(self, action):
        """action() of this rank. Where a rank raises a UserError every rank does, instead of waiting for that one."""
        value, error = None, None
        try:
            value = action()
        except UserError as problem:
            error = problem
        for problem in filter(None, self.gather(error)):
            raise problem
        return value

    def on_main(self, work):
        """What work() returns on rank 0, picklable, on every rank; so is a UserError that it raises."""
        return self.broadcast(self.together(lambda: work() if self.is_main else None))

    def any(self, flags):
        """Whether any rank raised each flag: the or of a small list of booleans, on every rank."""
        if self.world_size == 1:
            return list(flags)
        total = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(total, op=dist.ReduceOp.MAX, group=self.control)
        return [bool(flag) for flag in total]


def close():
    if dist.is_initialized():
        dist.destroy_process_group()


def pick_device(name=None):
    """The device called `name`, by default the best there is. Raises UserError where it is not there."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
    if not there[name]():
        raise UserError(f"--device {name}: PyTorch finds none here; leave the option out for the best there is")
    return name


def keep_freed_memory():
    """Have glibc keep what tensors free for the next step, instead of returning it to the system, which zeroes every page
    anew: in a step of DiT-S/4 at batch 16, 73 page faults instead of 18,640, 3 ms in the kernel instead of 63."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # other C libraries have none
        for option, value in ((-1, 2**31 - 1), (-3, 32 << 20)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD: the most they take
            libc.mallopt(option, value)


NO_BF16 = "--precision bf16: this machine has no bfloat16 instructions, fp32 will be far faster"


def has_bf16(device):
    """Whether the device multiplies bfloat16 matrices by itself, and does not imitate it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def setup(device=None):
    """Join the processes that torchrun started, if it did. device: "cuda", "mps", "cpu" or None for the best there is.
    Raises UserError, in one line, for what cannot work."""
    name = pick_device(device)
    rank, world_size = launched_rank(), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if name == "cuda" and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this node has no GPU: there are {torch.cuda.device_count()}; "
            f"start torchrun with --nproc_per_node={torch.cuda.device_count()}"
        )
    if name == "mps" and world_size > 1:
        raise UserError("MPS cannot be shared by processes: use plain `python`, or --device cpu")
    place = torch.device(name, local_rank) if name == "cuda" else torch.device(name)
    context = Context(rank, local_rank, world_size, place)
    if name == "cuda":
        torch.cuda.set_device(place)
    if name == "cpu":
        keep_freed_memory()
    if world_size > 1:
        # torchrun keeps its store over restarts, with the addresses of dead workers in it: each attempt has keys of its own
        store, _, _ = next(dist.rendezvous("env://", rank, world_size))
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "cpu:gloo,cuda:nccl" if name == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
        context.control = dist.new_group(backend="gloo") if name == "cuda" else dist.group.WORLD
    return context
