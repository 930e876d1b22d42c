"""Kill training and sampling at random moments, damage checkpoints in between, and check that nothing is lost.

    OMP_NUM_THREADS=1 python tests/stress/faults.py --json faults.json

Training runs on the digits and on a folder of random images, with data workers, in one process and in two (gloo, CPU). A
run is killed with SIGKILL, all processes or one of two, at a random moment or while a checkpoint is being written. Between
restarts the latest checkpoints get a flipped bit or are truncated. Now and then all of them are; train.py must refuse to
start then. The final state of a run (weights, EMA, optimizer, metrics, losses in the log) has to equal that of an
undisturbed run, and a set of samples has to be the same file. The exit status is 1 if anything differs.
"""

import importlib
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # torch-fidelity installs a package named tests
sys.path.insert(0, str(Path(__file__).parents[2]))
from helpers import Ranks, assert_same_state, latest, without_timings

import sample_ddp
import train
from benchmarks.timing import table
from checkpoint import files
from runtime.config import Config, option
from runtime.errors import RunError
from runtime.files import write_json
from runtime.parser import Parser

# --log-every divides --ckpt-every: every row of the metrics then covers a whole interval, also the first after a resume
TRAINING = (
    "--vae none --image-size 8 --hidden-size 96 --depth 2 --num-heads 2 --lr 1e-3 --device cpu --log-every 2 "
    "--ckpt-every 4 --keep-last 3 --max-steps 40 --num-workers 2 --label-dropout 0.3"
).split()
SAMPLING = "--num-sampling-steps 3 --num-fid-samples 150 --per-proc-batch-size 5 --device cpu --folder set".split()


@dataclass(frozen=True)
class FaultsConfig(Config):
    """Options of faults.py."""

    kills: int = option(216, "number of kills: three quarters in training, the others in sampling", low=8, high=1_000_000)
    seed: int = option(0, "seed of the moments and damages; they also depend on the machine's speed", low=0, high=2**63 - 1)
    json: str | None = option(None, "also write the numbers to this file", metavar="FILE", path="output")


def main(argv=None):
    parser = Parser(FaultsConfig, __doc__)
    config = parser.parse(argv)
    with parser.report_errors():
        start = time.perf_counter()
        rows = run_scenarios(config)
    total = {"scenario": "all"} | {key: sum(row.get(key, 0) for row in rows) for key in list(rows[0])[1:]}
    print(table([*rows, total]))
    print(f"{time.perf_counter() - start:.0f} s, seed {config.seed}, torch {torch.__version__}")
    if config.json:
        write_json(config.json, [*rows, total])
    sys.exit(total["runs that differ"] > 0)


def run_scenarios(config):
    """The counts of every scenario, a list of dicts."""
    torch.set_num_threads(1)  # forked processes may not use OpenMP's threads
    # what the commands import after parsing, once here and not in every forked process
    for module in ("sklearn.datasets", "training.run", "training.trainer", "sampling.image_set"):
        importlib.import_module(module)

    rows, chance = [], random.Random(config.seed)
    with tempfile.TemporaryDirectory() as folder, tqdm(total=config.kills, desc="Kills", unit="kill") as bar:
        root = Path(folder)
        make_images(root / "images")
        for data in ("digits", root / "images"):
            for world_size in (1, 2):
                scenario = Training(root / f"{Path(data).name}-{world_size}", data, world_size, chance, bar)
                rows.append(scenario.run(config.kills * 3 // 16))
        for world_size in (1, 2):
            ckpt = root / f"digits-{world_size}/whole/checkpoints/0000040.pt"
            left = config.kills - bar.n
            scenario = Sampling(root / f"samples-{world_size}", ckpt, world_size, chance, bar)
            rows.append(scenario.run(left // 2 if world_size == 1 else left))
    return rows


def make_images(root):
    pixels = np.random.default_rng(0)
    for name in ("ant", "bee", "cat"):
        (root / name).mkdir(parents=True)
        for i in range(17):
            Image.fromarray(pixels.integers(0, 256, (12 + i, 14, 3), dtype=np.uint8)).save(root / name / f"{i}.png")


class Scenario:
    """A command that is killed and started again until it finishes, and then from the beginning, until the kills are used
    up."""

    def __init__(self, folder, world_size, chance, bar):
        folder.mkdir()
        self.folder, self.world_size, self.chance, self.bar = folder, world_size, chance, bar
        self.lives, self.counts = 0, dict.fromkeys(["kills", *self.columns, "runs to the end", "runs that differ"], 0)

    def start(self, folder):
        self.lives += 1
        return Ranks(self.main, self.command(folder), self.world_size, self.folder / f"output{self.lives}")

    def run(self, kills):
        start = time.perf_counter()
        undisturbed = self.start(self.folder / "whole")
        assert undisturbed.wait() == [0] * self.world_size, undisturbed.text()
        self.duration = time.perf_counter() - start
        counts = self.counts
        while counts["kills"] < kills:
            run = self.start(self.folder / "parts")
            while counts["kills"] < kills and self.kill(run):
                counts["kills"] += 1
                self.bar.update()
                self.after_kill(run)
                run = self.start(self.folder / "parts")
            if any(codes := run.wait()):
                print(run.text(), file=sys.stderr)
                raise RunError(f"{self.name}: exit statuses {codes}, and the output above")
            counts["runs to the end"] += 1
            try:
                self.compare(self.folder / "whole", self.folder / "parts")
            except AssertionError as error:
                counts["runs that differ"] += 1
                print(f"{self.name}: {error}", file=sys.stderr)
            shutil.rmtree(self.folder / "parts")
        return {"scenario": self.name, **counts}

    def kill(self, run):
        """Kill a run, at a random moment or in the middle of a write. Returns False where it finished before."""
        deadline = time.monotonic() + self.chance.uniform(0, 0.6 * self.duration)
        in_write = self.chance.random() < 0.4
        while any(process.is_alive() for process in run.processes):
            if in_write and time.monotonic() > deadline - self.duration / 3 and self.writing():
                break
            if not in_write and time.monotonic() > deadline:
                break
            time.sleep(0.0005)
        alive = [process for process in run.processes if process.is_alive()]
        for process in alive if self.chance.random() < 0.7 else self.chance.sample(alive, min(1, len(alive))):
            process.kill()
        for process in run.processes:  # the other one notices that it is alone, unless it still waits for the first to join
            process.join(2)
            if process.is_alive():
                process.kill()
                process.join()
        return any(process.exitcode == -signal.SIGKILL for process in run.processes)


class Training(Scenario):
    columns = (
        "while writing", "files damaged", "recognised", "flip changed no data", "passed over by train.py",
        "all damaged: refused", "steps repeated",
    )  # fmt: skip

    def __init__(self, folder, data, world_size, chance, bar):
        super().__init__(folder, world_size, chance, bar)
        self.name = f"training, {Path(data).name}, {world_size} process{'es' * (world_size > 1)}"
        classes, batch = (10, 8) if data == "digits" else (3, 4)
        self.main = train.main
        self.options = [*TRAINING, "--data-path", data, "--num-classes", classes, "--global-batch-size", batch]
        self.checkpoints = folder / "parts/checkpoints"

    def command(self, folder):
        return [*self.options, "--run-dir", folder]

    def writing(self):
        return any(self.checkpoints.glob(".*.pt.*.tmp"))

    def after_kill(self, run):
        self.counts["while writing"] += self.writing()
        self.counts["passed over by train.py"] += run.text().count("trying the one before it")
        metrics = self.folder / "parts/metrics.jsonl"
        reached = re.findall(r'"step": (\d+)', metrics.read_text()) if metrics.exists() else []
        whole = [path for path in files.newest_first(self.checkpoints) if self.is_whole(path)]
        if whole and self.chance.random() < 0.08:
            self.refuse_when_all_are_damaged(whole)
        elif len(whole) > 1 and self.chance.random() < 0.6:
            number = self.chance.randint(1, len(whole) - 1)
            for path in whole[:number]:
                self.damage(path)
            whole = whole[number:]
        resumes_at = int(whole[0].stem) if whole else 0
        self.counts["steps repeated"] += max(0, int(reached[-1]) - resumes_at) if reached else 0

    def is_whole(self, path):
        try:
            files.verify(path)
            return bool(files.load(path))
        except files.CheckpointError:
            return False

    def damage(self, path):
        """Flip a bit of a random byte or truncate the file. Count whether that is recognised."""
        before = path.read_bytes()
        damaged = bytearray(before)
        if self.chance.random() < 0.5:
            damaged[self.chance.randrange(len(damaged))] ^= 1 << self.chance.randrange(8)
        else:
            del damaged[self.chance.randrange(len(damaged)) :]
        expected = files.load(path, mmap=False)
        path.write_bytes(damaged)
        self.counts["files damaged"] += 1
        if not self.is_whole(path):
            self.counts["recognised"] += 1
            return
        assert_same_state(files.load(path, mmap=False), expected)  # a byte of padding, or of a date
        self.counts["flip changed no data"] += 1
        path.write_bytes(before)
        self.damage(path)

    def refuse_when_all_are_damaged(self, whole):
        """A start must change nothing but the run's status. The checkpoints are then restored for the next start."""
        copies = {path: path.read_bytes() for path in whole}
        for path in whole:
            self.damage(path)
        before = {path: path.read_bytes() for path in (self.folder / "parts").rglob("*.*") if ".tmp" not in path.name}
        run = self.start(self.folder / "parts")
        assert run.wait() == [2] * self.world_size, run.text()
        assert "are damaged; restore one from a copy" in run.text(), run.text()
        for path, content in before.items():
            assert path.name == "status.json" or path.read_bytes() == content, path
        self.counts["all damaged: refused"] += 1
        for path, content in copies.items():
            path.write_bytes(content)

    def compare(self, whole, parts):
        assert_same_state(latest(parts), latest(whole))
        assert without_timings(parts) == without_timings(whole), "metrics.jsonl differs"
        # log.txt keeps the lines of steps that were repeated; they must say the same each time
        logs = [re.findall(r"\(step=(\d+)\) Train Loss: (\S+),", (run / "log.txt").read_text()) for run in (whole, parts)]
        assert set(logs[0]) == set(logs[1]), "losses in log.txt differ"
        assert not self.writing(), "a temporary file is left"


class Sampling(Scenario):
    columns = ("while writing", "files damaged")

    def __init__(self, folder, ckpt, world_size, chance, bar):
        super().__init__(folder, world_size, chance, bar)
        self.name = f"sampling, {world_size} process{'es' * (world_size > 1)}"
        self.main, self.ckpt = sample_ddp.main, ckpt

    def command(self, folder):
        return ["--ckpt", self.ckpt, *SAMPLING, "--sample-dir", folder]

    def writing(self):
        parts = self.folder / "parts"
        return any(parts.glob(".*.tmp")) or any(parts.glob("set/.*.tmp"))

    def after_kill(self, run):
        self.counts["while writing"] += self.writing()
        for path in self.chance.sample(images := sorted((self.folder / "parts/set").glob("*.png")), min(2, len(images))):
            os.truncate(path, self.chance.randrange(path.stat().st_size))
            self.counts["files damaged"] += 1

    def compare(self, whole, parts):
        assert (parts / "set.npz").read_bytes() == (whole / "set.npz").read_bytes(), "the .npz differs"
        assert not self.writing(), "a temporary file is left"


if __name__ == "__main__":
    main()
