"""Whole commands in forked processes, which start in a fraction of a second, and comparisons of what their runs leave.

Import the command's modules first, and keep torch to one thread: forked processes may not use OpenMP's threads."""

import atexit
import json
import multiprocessing.util
import os
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from checkpoint import files

ROOT = Path(__file__).parents[1]

# Whether this version of PyTorch shards models on CPUs; train.py --shard asks itself (training/sharding.py)
SHARDS = torch.__version__ >= (2, 15)
TIMINGS = {"steps_per_second", "images_per_second", "peak_memory_gib", "training_seconds", "utilization"}


def command_file(name):
    """The file of a command, which is at the root or in tools/."""
    return next(path for path in (ROOT / f"{name}.py", ROOT / f"tools/{name}.py") if path.exists())


def command_module(name):
    """The name to import a command by, and to run it by with python -m."""
    return ".".join(command_file(name).relative_to(ROOT).with_suffix("").parts)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_timings(folder):
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in metrics(folder)]


def latest(folder):
    return files.load(files.newest_first(folder / "checkpoints")[0])


def flat(tree, path=()):
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in flat(value, (*path, key)).items()}
    return {path: tree}


def assert_same_state(a, b):
    for part in ("model", "ema", "emas", "opt"):
        left, right = flat(a.get(part, {})), flat(b.get(part, {}))
        assert left.keys() == right.keys()
        for key, value in left.items():
            same = torch.equal(value, right[key]) if isinstance(value, torch.Tensor) else value == right[key]
            assert same, f"{part} {key} differs from the undisturbed run's"
    assert (a["step"], a["images_seen"]) == (b["step"], b["images_seen"])


def wait_for(condition, seconds=60, pause=0.05):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if condition():
                return
        except (OSError, ValueError, IndexError):  # the file is not there yet, or empty, or half written
            pass
        time.sleep(pause)
    raise AssertionError(f"not so after {seconds} s")


def call(main, *argv):
    """Run a command's main. Returns its exit status."""
    handlers = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)}
    try:
        main([str(word) for word in argv])
    except SystemExit as end:
        return end.code or 0
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)
    return 0


def _rank(main, argv, rank, world_size, port, output):
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    with open(f"{output}.{rank}", "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file  # pytest's own captures would swallow it
        torch.set_num_threads(1)
        tqdm.set_lock(threading.RLock())  # its own is shared between processes, and stays taken where one is killed
        os._exit(_status(main, argv))


def _status(main, argv):
    try:
        return call(main, *argv)
    except BaseException:
        traceback.print_exc()
        return 99


def paced(argv):
    """train.py with a pause in each step, for forked processes: one that is waited for makes few, on a busy machine too."""
    import train
    from training.trainer import Trainer

    step = Trainer.step
    Trainer.step = lambda trainer, batch: (time.sleep(0.02), step(trainer, batch))[1]
    train.main(argv)


def to_the_end(main, argv):
    """Run a command, and then what the interpreter does at its exit, while the last error is still held."""
    atexit._clear()  # what this process has registered before it was forked
    atexit.register(multiprocessing.util._exit_function)
    try:
        main(argv)
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()


class Ranks:
    """The same command on several processes, as torchrun would start them."""

    def __init__(self, main, argv, world_size, output):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        fork = multiprocessing.get_context("fork")
        self.output, self.world_size = output, world_size
        self.processes = [
            fork.Process(target=_rank, args=(main, argv, rank, world_size, port, output)) for rank in range(world_size)
        ]
        for rank, process in enumerate(self.processes):
            open(f"{output}.{rank}", "w").close()  # there to be read, however early it is killed
            process.start()

    def wait(self, timeout=120):
        """Exit statuses in the order of ranks; -9 for a process that was killed."""
        for process in self.processes:
            process.join(timeout)
            if process.is_alive():
                for other in self.processes:
                    other.kill()
                    other.join()
                raise AssertionError(f"still running after {timeout} s:\n{self.text()}")
        return [process.exitcode for process in self.processes]

    def text(self, rank=0):
        return open(f"{self.output}.{rank}").read()


# ----------------------------------------------------------------------------------------------------------------------
# Small inputs. Each function returns the path


def make_images(folder):
    """Three classes of four pictures each, of different sizes."""
    random = np.random.default_rng(0)
    for label, name in enumerate(["ant", "bee", "cat"]):
        (folder / name).mkdir(parents=True)
        for i in range(4):
            pixels = random.integers(0, 256, (20 + i, 24 + label, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def make_autoencoder(folder):
    """A small random AutoencoderKL of the Stable Diffusion kind: 4 latent channels, a factor of 8."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4}
    vae = AutoencoderKL(
        latent_channels=4, down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, **blocks
    )
    vae.save_pretrained(folder)
    return folder


def make_inception(path):
    """Weights of the Inception network's shapes, drawn at random: tests may not download the real ones."""
    from torch_fidelity import feature_extractor_inceptionv3 as port

    network = port.FeatureExtractorInceptionV3
    # its constructor insists on loading weights
    with (
        torch.device("meta"),
        mock.patch.object(port, "load_state_dict_from_url"),
        mock.patch.object(network, "load_state_dict"),
    ):
        inception = network("inception", ["2048"])
    torch.manual_seed(0)
    inception.to_empty(device="cpu")
    for module in inception.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):  # PyTorch's own defaults shrink features to 1e-8
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.normal_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    torch.save(inception.state_dict(), path)
    return path
