"""Time and memory for the names of a million image files, as train.py reads them and with torchvision's ImageFolder.

OMP_NUM_THREADS=1 python -m benchmarks.listing     # two processes with two data workers each; Linux, some minutes
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from data.config import DataConfig
from data.images import load_dataset
from runtime.distributed import processes


def main():
    with tempfile.TemporaryDirectory() as folder:
        number = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
        for path in (Path(folder, f"class_{i // 1000:04d}", f"image_{i:08d}.JPEG") for i in range(number)):
            path.parent.mkdir(exist_ok=True)
            if path.stem.endswith("0000"):  # file systems limit the links to one file
                original = path
                original.touch()
            else:
                os.link(original, path)
        for way in ("ImageFolder", "train.py"):
            launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "benchmarks.listing"]
            subprocess.run([*launch, way, folder], check=True)


def memory():
    """MiB that this process shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024


def read_all(names):
    """The memory in MiB that a data worker takes by reading all names."""
    before = memory()
    for name in names:
        name[0]  # ImageFolder's are tuples of path and class
    return memory() - before


def measure(way, folder):
    with processes("cpu") as context:
        context.run_on_main(lambda: np.zeros(1))  # what the first exchange imports is not measured
        before, start, cpu = memory(), time.perf_counter(), time.process_time()
        shared = way == "train.py" and load_dataset(DataConfig(folder), 256, context=context)
        names = shared.names if shared else ImageFolder(folder).samples
        seconds, cpu, added = time.perf_counter() - start, time.process_time() - cpu, memory() - before
        row = f"{way}, process {context.rank}: {seconds:.1f} s, of which {cpu:.1f} s on a CPU; {added:.0f} MiB"
        workers = DataLoader([names, names], None, num_workers=2, collate_fn=read_all)
        print(f"{row}; each data worker {' and '.join(f'{value:.0f} MiB' for value in workers)}", flush=True)
        context.barrier()


if __name__ == "__main__":
    measure(*sys.argv[1:]) if "RANK" in os.environ else main()
