"""Kill training and sampling at random moments, damage checkpoints in between, and see whether anything is lost.

    OMP_NUM_THREADS=1 python benchmarks/faults.py --json faults.json

Training runs on the digits and on a folder of random images, with data workers, on one process and on two (gloo, CPU). A
run is killed with SIGKILL, all processes or one of two, at a random moment or while a checkpoint is being written. Between
restarts the latest checkpoints get a flipped byte or are cut short; now and then all of them, which has to be refused. What
a run leaves in the end - parameters, average, optimizer, metrics, log - has to equal what an undisturbed one leaves, and a
set of samples has to be the same file. Exit status 1 if anything differs.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import sample_ddp
import train
from benchmarks.runs import Ranks, assert_same_state, latest, without_timings
from checkpoint import files as checkpoint

MODEL = "--vae none --image-size 8 --hidden-size 96 --depth 2 --num-heads 2 --lr 1e-3 --device cpu --log-every 3"
TRAINING = (MODEL + " --ckpt-every 4 --keep-last 3 --max-steps 40 --num-workers 2 --label-dropout 0.3").split()
SAMPLING = "--num-sampling-steps 3 --num-fid-samples 150 --per-proc-batch-size 5 --device cpu --folder set".split()


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=216, help="in all: three quarters in training, the rest in sampling")
    parser.add_argument("--seed", type=int, default=0, help="of moments and damages; the machine's timing adds to them")
    parser.add_argument("--json", metavar="FILE", help="write the counts here too")
    args = parser.parse_args()
    if args.kills < 8:
        parser.error("--kills must be at least 8")
    return args


def main():
    args = parse_args()
    torch.set_num_threads(1)  # forked processes may not use OpenMP's
    import sklearn.datasets  # noqa: F401 -- here, once, not in every process

    start, rows = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder, tqdm(total=args.kills, desc="Kills", unit="kill") as bar:
        root = Path(folder)
        make_images(root / "images")
        chance = random.Random(args.seed)
        for data in ("digits", root / "images"):
            for world_size in (1, 2):
                scenario = Training(root / f"{Path(data).name}-{world_size}", data, world_size, chance, bar)
                rows.append(scenario.run(args.kills * 3 // 16))
        for world_size in (1, 2):
            ckpt = root / f"digits-{world_size}/whole/checkpoints/0000040.pt"
            left = args.kills - bar.n
            scenario = Sampling(root / f"samples-{world_size}", ckpt, world_size, chance, bar)
            rows.append(scenario.run(left // 2 if world_size == 1 else left))
    columns = list(rows[0])
    total = {"scenario": "all"} | {key: sum(row.get(key, 0) for row in rows) for key in columns[1:]}
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in [*rows, total]:
        print(f"| {' | '.join(str(row.get(key, '')) for key in columns)} |")
    print(f"{time.perf_counter() - start:.0f} s, seed {args.seed}, torch {torch.__version__}")
    if args.json:
        Path(args.json).write_text(json.dumps([*rows, total], indent=2) + "\n")
    sys.exit(total["runs that differ"] > 0)


def make_images(root):
    pixels = np.random.default_rng(0)
    for name in ("ant", "bee", "cat"):
        (root / name).mkdir(parents=True)
        for i in range(17):
            Image.fromarray(pixels.integers(0, 256, (12 + i, 14, 3), dtype=np.uint8)).save(root / name / f"{i}.png")


class Scenario:
    """A command that is killed and started again until it is through, and then anew, until the kills are used up."""

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
                raise SystemExit(f"{self.name}: exit statuses {codes}\n{run.text()}")
            counts["runs to the end"] += 1
            try:
                self.compare(self.folder / "whole", self.folder / "parts")
            except AssertionError as error:
                counts["runs that differ"] += 1
                print(f"{self.name}: {error}", file=sys.stderr)
            shutil.rmtree(self.folder / "parts")
        return {"scenario": self.name, **counts}

    def kill(self, run):
        """Kill a run, at a random moment or in the middle of a write. Returns False where it came to its end before."""
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
        for process in run.processes:  # the other one sees that it is alone, unless it waits for the first to join
            process.join(2)
            if process.is_alive():
                process.kill()
                process.join()
        return any(process.exitcode == -signal.SIGKILL for process in run.processes)


class Training(Scenario):
    columns = (
        "inside a write", "files damaged", "recognised", "flip changed no data", "passed over by train.py",
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
        self.counts["inside a write"] += self.writing()
        text = run.text()
        self.counts["passed over by train.py"] += text.count("trying the one before it")
        log = self.folder / "parts/log.txt"
        reached = re.findall(r"\(step=(\d+)\)", log.read_text()) if log.exists() else []
        whole = [path for path in checkpoint.newest_first(self.checkpoints) if self.is_whole(path)]
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
            checkpoint.verify(path)
            return bool(checkpoint.load(path))
        except checkpoint.CheckpointError:
            return False

    def damage(self, path):
        """Flip a random byte's bit or cut the file short; note whether that is recognised."""
        before = path.read_bytes()
        damaged = bytearray(before)
        if self.chance.random() < 0.5:
            damaged[self.chance.randrange(len(damaged))] ^= 1 << self.chance.randrange(8)
        else:
            del damaged[self.chance.randrange(len(damaged)) :]
        expected = checkpoint.load(path, mmap=False)
        path.write_bytes(damaged)
        self.counts["files damaged"] += 1
        if not self.is_whole(path):
            self.counts["recognised"] += 1
            return
        assert_same_state(checkpoint.load(path, mmap=False), expected)  # a byte of padding, or of a date
        self.counts["flip changed no data"] += 1
        path.write_bytes(before)
        self.damage(path)

    def refuse_when_all_are_damaged(self, whole):
        """Nothing may be touched, and a checkpoint that is brought back is gone on from."""
        copies = {path: path.read_bytes() for path in whole}
        for path in whole:
            self.damage(path)
        before = {path: path.read_bytes() for path in (self.folder / "parts").rglob("*.*") if ".tmp" not in path.name}
        run = self.start(self.folder / "parts")
        assert run.wait() == [2] * self.world_size, run.text()
        assert "is whole; bring one back" in run.text(), run.text()
        for path, content in before.items():
            assert path.name == ".lock" or path.read_bytes() == content, path
        self.counts["all damaged: refused"] += 1
        for path, content in copies.items():
            path.write_bytes(content)

    def compare(self, whole, parts):
        assert_same_state(latest(parts), latest(whole))
        assert without_timings(parts) == without_timings(whole), "metrics.jsonl differs"
        logs = [re.findall(r"\(step=(\d+)\) Train Loss: (\S+),", (run / "log.txt").read_text()) for run in (whole, parts)]
        assert logs[0] == logs[1], "log.txt differs"
        assert not self.writing(), "a temporary file is left"


class Sampling(Scenario):
    columns = ("inside a write", "files damaged")

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
        self.counts["inside a write"] += self.writing()
        for path in self.chance.sample(images := sorted((self.folder / "parts/set").glob("*.png")), min(2, len(images))):
            os.truncate(path, self.chance.randrange(path.stat().st_size))
            self.counts["files damaged"] += 1

    def compare(self, whole, parts):
        assert (parts / "set.npz").read_bytes() == (whole / "set.npz").read_bytes(), "the .npz differs"
        assert not self.writing(), "a temporary file is left"


if __name__ == "__main__":
    main()
