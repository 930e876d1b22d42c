"""How this process was started: by torchrun, by Slurm's srun, or alone. Light to import."""

import os
import re

from runtime.errors import UserError


def launched():
    """(rank, local rank, world size) from the environment of torchrun or srun; (0, 0, 1) for a process on its own.

    torchrun sets RANK; srun sets SLURM_PROCID, and SLURM_STEP_NUM_TASKS, which a batch script without srun does not have.
    Raises UserError where the variables are incomplete."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    if "RANK" not in os.environ and os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
    try:
        return tuple(int(os.environ.get(name, default)) for name, default in zip(names, (0, 0, 1), strict=True))
    except ValueError:
        variables = f"the environment's {', '.join(names)} are not numbers"
        raise UserError(f"{variables}; start with torchrun, or unset them") from None


def rendezvous_address():
    """Set MASTER_ADDR and MASTER_PORT from Slurm's variables where srun has started the processes. Raises UserError where
    there is no address to meet at: the processes would otherwise wait for ever, or train copies of the model."""
    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        return
    if "RANK" in os.environ:
        missing = " and ".join(name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ)
        raise UserError(f"RANK is set but not {missing}: start with torchrun, or set {missing}, or unset RANK")
    if "MASTER_ADDR" not in os.environ:  # SLURM_LAUNCH_NODE_IPADDR would be the login node's where srun was started there
        one_node = os.environ.get("SLURM_STEP_NUM_NODES", "1") == "1"
        os.environ["MASTER_ADDR"] = "127.0.0.1" if one_node else first_node(os.environ.get("SLURM_STEP_NODELIST", ""))
    # a port for each job and step, below those that the system gives to outgoing connections
    number = int(os.environ.get("SLURM_JOB_ID", 0)) + 997 * int(os.environ.get("SLURM_STEP_ID", 0))
    os.environ.setdefault("MASTER_PORT", str(20_000 + number % 10_000))


def first_node(nodes):
    """The first name in Slurm's list of nodes: gpu017 in "gpu[017-019,021],login1". Raises UserError where it is empty."""
    name = re.sub(r"\[(\w+)[^]]*\]", r"\1", re.match(r"(?:[^,[]|\[[^]]*\])*", nodes)[0])
    if not name:
        raise UserError("srun named no node to meet at: export MASTER_ADDR, the name of the first node")
    return name
