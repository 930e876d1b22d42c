"""Devices and the precision of their arithmetic."""

import contextlib
import importlib.util
import os
import shutil
import sys
from pathlib import Path

import torch

from runtime.errors import OutOfMemoryError, UserError


def pick_device(name=None):
    """The name of the device to use: `name`, or by default the best there is. Raises UserError where it is missing."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is not None and not available[name]:
        raise UserError(f"--device {name}", "PyTorch finds none here", "leave the option out for the best there is")
    return name or next(device for device in available if available[device])


def has_bf16(device):
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def set_precision(precision, device):
    """Set the arithmetic of float32 matrix products and convolutions: "fp32" computes them in full, "tf32" and "bf16" allow
    TF32 on GPUs. bf16 itself is autocast's. Returns the autocast context to run the model in."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
        torch.backends.cudnn.allow_tf32 = precision != "fp32"
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def use_deterministic_kernels():
    """From now on an operation gives the same bits each time on a GPU too; one without such kernels raises RuntimeError."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # one of the two values that cuBLAS is deterministic with
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, for the sake of code that reads such memory


def precision_warning(precision, device):
    """A line of warning where bf16 is emulated, else None."""
    if precision == "bf16" and not has_bf16(device):
        return "--precision bf16: this machine has no bfloat16 instructions, fp32 will be far faster"
    return None


def check_compile(backend, device):
    """Raises UserError where torch.compile would fail at the first step, for want of a compiler or an unknown backend.
    backend: the value of --compile, or None. device: "cuda", "mps" or "cpu"."""
    if backend not in (None, "inductor") and backend not in (known := torch.compiler.list_backends(exclude_tags=())):
        raise UserError(f"--compile {backend}", "not a backend of torch.compile", f"take one of {', '.join(known)}")
    if backend != "inductor":
        return
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if device == "cuda" and not importlib.util.find_spec("triton"):
        raise UserError("--compile", "needs the package triton, which PyTorch's builds for CUDA bring", "install it")
    if device == "cuda" and not any(map(shutil.which, (os.environ.get("CC", "gcc"), "gcc", "clang"))):
        raise UserError("--compile", "needs a C compiler, and there is neither gcc nor clang", "install one")
    if device == "cpu" and not shutil.which(compiler):
        problem = f"needs a C++ compiler, and there is no {compiler}"
        raise UserError("--compile", problem, "install it, or name another in CXX")


def host_memory():
    """Bytes of memory that this process may use, swap not counted; None where the system does not say."""
    total = None
    with contextlib.suppress(OSError, ValueError, AttributeError):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))  # a container's; "max" where it has no limit
    return total


def check_memory(needed, advice):
    """Raises OutOfMemoryError where more bytes are needed than there are: the machine would swap, and then the system would
    kill the process, which could not say why. needed: a lower bound."""
    if (total := host_memory()) and needed > total:
        raise OutOfMemoryError(f"out of memory: needs {needed / 2**30:,.0f} GiB or more of {total / 2**30:,.0f}; {advice}")


@contextlib.contextmanager
def explain_out_of_memory(advice):
    """Raise PyTorch's errors about memory as one line that ends with `advice`, the options that save memory."""
    try:
        yield
    except OutOfMemoryError as error:  # of check_memory, which may not know the options
        raise OutOfMemoryError(f"{str(error).rpartition('; ')[0] or error}; {advice}") from None
    except (MemoryError, RuntimeError) as error:  # the CPU's allocator raises a plain RuntimeError
        text = str(error).split("\n")[0][:160]
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in text:
            raise
        raise OutOfMemoryError(f"out of memory{text and f' ({text})'}; {advice}") from None
