"""What a checkpoint costs the training loop: the copy that it waits for, beside writing the file at once.

OMP_NUM_THREADS=1 python benchmarks/saving.py --model DiT-S/2
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from checkpoint import files as checkpoint
from models import DiT_models
from training.ema import EMA


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", choices=list(DiT_models), default="DiT-S/2", help="whose state is saved")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the state is")
    parser.add_argument("--folder", default=".", help="on the disk to write to; a temporary folder is made in it")
    parser.add_argument("--repeats", type=int, default=5, help="of which the median is shown")
    parser.add_argument("--json", metavar="FILE", help="write the numbers here too")
    args = parser.parse_args()

    state = trained_state(args.model, torch.device(args.device))
    seconds = {"written at once": [], "copied, the loop waits": [], "then written in the background": []}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        writer = checkpoint.Writer(folder, keep_last=1)
        for step in range(1, 2 * args.repeats, 2):
            seconds["written at once"].append(timed(lambda step=step: checkpoint.save(f"{folder}/{step:07d}.pt", state)))
            seconds["copied, the loop waits"].append(timed(lambda step=step: writer.save(step + 1, state)))
            seconds["then written in the background"].append(timed(writer.wait))
        size = os.path.getsize(checkpoint.newest_first(folder)[0])
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{args.model} on {args.device}, {size / 2**20:.0f} MiB, median of {args.repeats} (least to most)")
    for name, values in seconds.items():
        print(f"{name:32}{medians[name]:8.3f} s   ({min(values):.3f} to {max(values):.3f})")
    if args.json:
        Path(args.json).write_text(json.dumps({"model": args.model, "bytes": size, **medians}, indent=2) + "\n")


def trained_state(name, device):
    """Model, average and optimizer after one update."""
    model = DiT_models[name]().to(device)
    ema, optimizer = EMA(model), torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in ema.weights:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {"model": model.state_dict(), "ema": ema.module.state_dict(), "opt": optimizer.state_dict()}


def timed(action):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
