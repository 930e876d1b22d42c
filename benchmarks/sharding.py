"""What train.py --shard saves in memory, and what --ddp-comm bf16 changes in the losses; on CPUs.

    MALLOC_MMAP_THRESHOLD_=65536 OMP_NUM_THREADS=1 python -m benchmarks.sharding memory --processes 4
    OMP_NUM_THREADS=1 python -m benchmarks.sharding exchange

memory: the most that each process holds in a few steps with a model of 400 million parameters, with a copy in each process
(DDP) and with --shard. The first variable makes the C library give freed memory back to the system, so that what is counted
is what is needed. exchange: how far the losses of 100 steps on the digits, in two processes, are from those with gradients
that are exchanged in float32; beside it what --precision bf16 and another seed change.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # torch-fidelity installs a package named tests
sys.path.insert(0, str(Path(__file__).parent.parent))
from helpers import Ranks, metrics

import train
from data.autoencoder import StoredSpace
from models import DiT_models
from runtime.config import Config, option
from runtime.devices import host_memory
from runtime.distributed import processes
from runtime.errors import RunError
from runtime.files import check_output, write_json
from runtime.parser import Parser
from training import sharding  # noqa: F401 -- counted as memory before the model in both kinds
from training.config import ComputeConfig, RecipeConfig
from training.meter import peak_memory
from training.trainer import Trainer

DIGITS = (
    "--data-path digits --vae none --image-size 8 --num-classes 10 --hidden-size 96 --depth 4 --num-heads 4 --patch-size 2 "
    "--global-batch-size 64 --lr 2e-3 --ema-warmup --device cpu --log-every 1 --num-workers 0 --max-steps 100"
).split()
KINDS = {"copies": None, "shards": "all"}
VARIANTS = {
    "--ddp-comm bf16": ["--ddp-comm", "bf16"],
    "--precision bf16": ["--precision", "bf16"],
    "another seed": ["--global-seed", "1000"],
}


@dataclass(frozen=True)
class ShardingConfig(Config):
    """Options of sharding.py."""

    what: str = option("memory", "what to measure", choices=("memory", "exchange"), positional=True, metavar="WHAT")
    processes: int = option(4, "number of processes, for memory", low=1, high=1024)
    model: str = option("DiT-L/8", "model, for memory", choices=tuple(DiT_models), metavar="DiT-{S,B,L,XL}/{2,4,8}")
    depth: int = option(21, "its number of blocks; 21 of DiT-L are 400 million parameters", low=1, high=512)
    batch_size: int = option(4, "images of an update over all processes, for memory", low=1, high=100_000)
    kind: str | None = option(None, "measure this alone (default: one after the other)", choices=tuple(KINDS))
    seeds: int = option(3, "number of seeds, for exchange", low=1, high=1000)
    json: str | None = option(None, "write the numbers to this file (default: they are only printed)", metavar="FILE")


def make_steps(argv):
    """In each process: three updates of a new model. Prints the most memory that it had, and what it had before."""
    how, model, depth, batch_size = argv
    size = int(batch_size)
    with processes("cpu") as context:
        before = peak_memory(context.device)
        compute, recipe = ComputeConfig(shard=KINDS[how]), RecipeConfig(global_batch_size=size)
        torch.manual_seed(0)
        trainer = Trainer(recipe, compute, context, DiT_models[model](depth=int(depth)), StoredSpace(4, 8, 1.0, 0.0))
        for _ in range(3):
            number = size // context.world_size
            moments, label = torch.rand(number, 2, 4, 32, 32), torch.zeros(number, dtype=torch.int64)
            trainer.step({"moments": moments, "label": label})
        print(sum(p.numel() for p in trainer.model.parameters()), before, peak_memory(context.device))


def start(main, argv, number, folder):
    """The output of each process. Raises RunError where one fails."""
    ranks = Ranks(main, argv, number, Path(folder) / "output")
    if any(ranks.wait(timeout=3600)):
        raise RunError(f"a process has failed: {ranks.text().strip()[-500:]}")
    return [ranks.text(rank) for rank in range(number)]


def measure_memory(config):
    """{kind: [(parameters, bytes before, bytes at most) of each process]}."""
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for how in [config.kind] if config.kind else KINDS:
            argv = (how, config.model, config.depth, config.batch_size)
            outputs = start(make_steps, argv, config.processes, folder)
            rows[how] = [tuple(map(int, text.splitlines()[-1].split())) for text in outputs]
    return rows


def print_memory(rows, config):
    print(f"{next(iter(rows.values()))[0][0] / 1e6:,.0f} million parameters, batch {config.batch_size}, 3 steps; "
          f"{config.processes} processes, {host_memory() / 2**30:.1f} GiB in this machine")  # fmt: skip
    for how, processes_of_it in rows.items():
        peaks = [peak / 2**30 for _, _, peak in processes_of_it]
        base = processes_of_it[0][1] / 2**30
        print(f"{how:10}{max(peaks):7.2f} GiB in the largest process, {sum(peaks):7.2f} in all, {base:.2f} GiB of each "
              "before the model")  # fmt: skip


def measure_exchange(config):
    """{variant: differences of the loss in each step of each seed}, relative to the run with float32 exchange."""
    torch.set_num_threads(1)
    found = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:

        def losses(seed, *options):
            run_dir = tempfile.mkdtemp(dir=folder)
            start(train.main, [*DIGITS, "--global-seed", seed, *options, "--run-dir", run_dir], 2, folder)
            return [row["loss"] for row in metrics(Path(run_dir))]

        for seed in range(config.seeds):
            expected = losses(seed)
            for name, options in VARIANTS.items():
                shifted = ["--global-seed", str(seed + 1000)] if "seed" in name else options
                pairs = zip(losses(seed, *shifted), expected, strict=True)
                found[name].append([loss / other - 1 for loss, other in pairs])
    return found


def print_exchange(found, config):
    print(f"loss of each of 100 steps, relative to gradients exchanged in float32, {config.seeds} seeds")
    for name, runs in found.items():
        steps = [difference for run in runs for difference in run]
        print(f"{name:20} at most {max(map(abs, steps)):.2e}, in the mean {sum(steps) / len(steps):+.2e}")


def main(argv=None):
    parser = Parser(ShardingConfig, __doc__)
    config = parser.parse(argv)
    with parser.report_errors():
        if config.json:
            check_output(config.json, "--json")
        measure, show = {"memory": (measure_memory, print_memory), "exchange": (measure_exchange, print_exchange)}[
            config.what
        ]
        found = measure(config)
        show(found, config)
        if config.json:
            write_json(config.json, found)


if __name__ == "__main__":
    main()
