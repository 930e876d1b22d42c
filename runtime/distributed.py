"""Processes: the same script under torchrun or srun, on one node or many, and as plain `python`."""

import contextlib
import datetime
import os
import re
import sys
import threading
import time
import uuid
from concurrent.futures import Future, wait
from dataclasses import dataclass

import torch
import torch.distributed as dist

from runtime.devices import pick_device
from runtime.errors import RunError, UserError
from runtime.launch import launched, rendezvous_address

ALONE = ", or set SLURM_STEP_NUM_TASKS=1 for one process alone"
JOIN = datetime.timedelta(minutes=10)  # in which all processes have to start; torchrun, too, waits so long for its nodes


@dataclass
class Context:
    """This process among the processes of the run."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    host_group: object = None  # the gloo process group for small objects, which go from host to host
    _depth: int = 0  # blocks of together() that are open

    @property
    def is_main(self):
        return self.rank == 0

    def describe(self):
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type.upper()
        how = f"{self.world_size} processes" if self.world_size > 1 else "one process"
        return f"{how} on {name}"

    def print(self, text):
        """Print on rank 0 alone."""
        if self.is_main:
            print(text, flush=True)

    def barrier(self):
        self._check_exchange()
        if self.world_size > 1:
            dist.barrier(group=self.host_group)

    def all_gather(self, value, nested=False):
        """Every rank's picklable value, in the order of ranks, on every rank. Does not wait for the devices.

        nested: for together() alone, as of `broadcast`."""
        self._check_exchange(nested)
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.host_group)
        return values

    def all_in_turn(self, items):
        """The items of all ranks, in order, on every rank, where rank r has those numbered r, r + world_size, ..."""
        parts = self.all_gather(items)
        return [parts[i % self.world_size][i // self.world_size] for i in range(sum(map(len, parts)))]

    def broadcast(self, value, nested=False):
        """Rank 0's picklable value, on every rank."""
        self._check_exchange(nested)
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, 0, group=self.host_group)
        return values[0]

    def any(self, flags):
        """For each of a few booleans whether any rank's is true: a list, on every rank."""
        self._check_exchange()
        total = torch.tensor(flags, dtype=torch.int32)
        if self.world_size > 1:
            dist.all_reduce(total, op=dist.ReduceOp.MAX, group=self.host_group)
        return total.bool().tolist()

    def _check_exchange(self, nested=False):
        assert nested or not self._depth, "nothing may be exchanged inside of together(): see there"

    @contextlib.contextmanager
    def together(self):
        """A block that all ranks run. Where it raises a UserError on one rank, every rank raises that error at the block's
        end, instead of waiting for the one that failed.

        Blocks may stand inside of blocks, in functions that the outer one calls: the first error, whatever the block, is
        what each rank's next exchange finds, and it ends all of them. So nothing else may be exchanged inside a block: a
        rank that failed earlier would not take part."""
        error, self._depth = None, self._depth + 1
        try:
            yield
        except UserError as problem:
            if problem.shared:  # of a block inside this one: all ranks are leaving with it
                raise
            error = problem
        finally:
            self._depth -= 1
        found = self.all_gather((self._depth, error), nested=True)
        for _, problem in found:
            if problem is not None:
                problem.shared, problem.of_one_rank = True, False  # all ranks know it now: one of them prints it
                raise problem
        assert len(set(found)) == 1, f"the ranks run different blocks of together(), at depths {found}"

    def on_main(self, function, *args):
        """function(*args) of rank 0 alone: its value, which must be picklable, or its UserError, on every rank."""
        with self.together():
            value = function(*args) if self.is_main else None
        return self.broadcast(value, nested=True)


class LostProcessError(RunError):
    """Another process, its host or the network has failed."""

    of_one_rank = True


@contextlib.contextmanager
def explain(what, advice, taken=None):
    """Raise a RuntimeError of process groups as one line: "process 1 {what} (Connection closed by peer ...); {advice}".

    taken: the advice where the port is another process's."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        why, in_use = first_sentence(error), "EADDRINUSE" in str(error)
        raise LostProcessError(f"process {launched()[0]} {what} ({why}); {taken if in_use else advice}") from None


def first_sentence(error):
    """What an error of PyTorch says, in one line."""
    text = re.sub(r"\[/\S*\] *", "", str(error) or type(error).__name__)  # without the line of gloo's source
    return re.split(r"\. |\n", text)[0][:200]


@contextlib.contextmanager
def processes(device=None, timeout=None, stop=None):
    """The Context of this process, joined to those that torchrun or srun has started, until the block ends.

    device: "cuda", "mps", "cpu"; None for the best one. timeout: seconds after which a process that waits for the others
    gives up; None for PyTorch's own, 30 minutes with gloo and 10 with NCCL. stop: whether a signal that the caller handles
    has asked for an end; while the others are waited for, that is a KeyboardInterrupt. Raises UserError for a device that
    is missing or cannot be shared, and LostProcessError where the connection to another process breaks."""
    advice = "a process, a host or the network has failed: see the output of the others; the same command resumes"
    try:
        context = setup(device, timeout, stop)
        with explain("lost the connection to another", advice):
            yield context
    finally:
        close()


def setup(device=None, timeout=None, stop=None):
    """Join the other processes; see `processes`, which also leaves them."""
    name = pick_device(device)
    rank, local_rank, world_size = launched()
    torch_device = torch.device(name)
    if name == "cuda":
        found = torch.cuda.device_count()
        if found == 1 and "RANK" not in os.environ:
            local_rank = 0  # `srun --gpus-per-task=1` shows each process its own GPU alone
        if local_rank >= found:
            way_out = f"torchrun's --nproc_per_node={found} or srun's --ntasks-per-node={found}"
            raise UserError(f"process {local_rank} of this node has no GPU", f"there are {found}",
                            f"start no more processes on a node than it has GPUs, with {way_out}")  # fmt: skip
        torch_device = torch.device(name, local_rank)
        torch.cuda.set_device(torch_device)
    if name == "mps" and world_size > 1:
        raise UserError("MPS cannot be shared by processes: use plain `python`, or --device cpu")
    context = Context(rank, local_rank, world_size, torch_device)
    if world_size > 1:
        rendezvous_address()
        backend = "cpu:gloo,cuda:nccl" if name == "cuda" else "gloo"
        patience = datetime.timedelta(seconds=timeout) if timeout else None
        advice = "check that each host's name stands for an address that the others reach, not for 127.0.1.1, or set "
        advice += "GLOO_SOCKET_IFNAME to the name of the network interface, such as eth0"
        taken = f"another process has port {os.environ['MASTER_PORT']}, perhaps a command that was started the same way: "
        taken += f"wait for it{ALONE if 'RANK' not in os.environ else ''}, or set MASTER_PORT to another number"
        with explain("cannot connect to the others", advice, taken):
            store = wait_for_others(lambda: meet(rank, world_size), rank, world_size, stop)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=patience)
            context.host_group = dist.new_group(backend="gloo", timeout=patience) if name == "cuda" else dist.group.WORLD
    return context


def meet(rank, world_size):
    """The store in which this start of the processes has met."""
    store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=JOIN))
    return dist.PrefixStore(agree_on_attempt(store, rank, world_size), store)


def wait_for_others(join, rank, world_size, stop=None, after=10.0):
    """join(), which returns when all processes are there. Prints a line where that takes longer than so many seconds. It is
    called in a thread, because this one would not notice Ctrl-C while it waits in PyTorch's C++ code."""
    found = Future()

    def call():
        try:
            found.set_result(join())
        except Exception as error:
            found.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    start = "start all of them with srun or torchrun"
    if "RANK" not in os.environ:  # a shell inside of an allocation looks like the first of its tasks
        start += ALONE
    text = f"process {rank} of {world_size} waits for the other {world_size - 1} to start, for up to {JOIN}; {start}"
    begin = time.monotonic()
    while not wait([found], timeout=min(after, 0.5)).done:
        if stop and stop():
            raise KeyboardInterrupt  # there is nothing to save yet
        if text and time.monotonic() - begin >= after:
            print(text, file=sys.stderr, flush=True)
            text = None
    return found.result()


def agree_on_attempt(store, rank, world_size, patience=JOIN.seconds):
    """A name that this start of the processes shares, and no earlier one. torchrun keeps its store when it restarts its
    workers, with the addresses of the dead ones in it; its count of restarts is each node's own, and may differ."""
    mine = uuid.uuid4().hex
    if rank == 0:
        store.set("attempt", mine)
        for other in range(1, world_size):
            store.set(store.get(f"{mine} {other}").decode(), "welcome")
        return mine
    for _ in range(patience):
        attempt = store.get("attempt").decode()  # perhaps an earlier one still: then nobody will answer
        store.set(f"{attempt} {rank}", mine)
        with contextlib.suppress(dist.DistStoreError):
            store.wait([mine], datetime.timedelta(seconds=1))
            return attempt
    raise dist.DistStoreError(f"no answer from process 0 within {patience} s")


def close():
    if dist.is_initialized():
        dist.destroy_process_group()
