"""Interrupt each long command in four ways, give it again, and compare with an undisturbed run.

    OMP_NUM_THREADS=1 python tests/stress/interrupted.py     # Linux; about five minutes on two cores

A hang-up (SIGHUP) and a full disk (the limit of the size of files, set to 0 while the command runs) come once its first
output is there; its output may go to a reader that goes away (`| head`); and its file system may have no locks (ENOLCK,
simulated in its process). The exit status of this script is 1 if a result differs.
"""

import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # torch-fidelity installs a package named tests
sys.path.insert(0, str(Path(__file__).parents[2]))
from helpers import ROOT, assert_same_state, latest, make_autoencoder, make_inception, wait_for

CPU = " --device cpu --num-workers 1 "
TRAIN = "--data-path digits --vae none --image-size 8 --hidden-size 32 --depth 2 --num-heads 2 --lr 1e-3 --log-every 20"
TRAIN += CPU + "--global-batch-size 8 --ckpt-every 100 --max-steps 1000 --run-dir run"
EXTRACT = "--data-path ../images --vae ../vae --image-size 64" + CPU + "--batch-size 2 --shard-size 2 --out out"
SAMPLE = (
    "--ckpt ../train-undisturbed/run --num-fid-samples 400 --per-proc-batch-size 5 --num-sampling-steps 10 --folder set"
)
EVALUATE = "../reference.npz samples.npz --inception-weights ../inception.pth --cache cache --batch-size 4"
COMMANDS = {  # arguments, what shows that it has begun, its result; all paths as seen from the folder that it runs in
    "train": (TRAIN, "run/checkpoints/*.pt", "run"),
    "extract_latents": (EXTRACT, "out/shard-*", "out/shard-*"),
    "sample_ddp": (f"{SAMPLE} --device cpu", "samples/set/*.png", "samples/set.npz"),
    "evaluate": (f"{EVALUATE} --device cpu", "cache/*", "samples.npz.metrics.json"),
}
WITHOUT_LOCKS = """
import errno, fcntl, runpy, sys, unittest.mock
fcntl.lockf = fcntl.flock = unittest.mock.Mock(side_effect=OSError(errno.ENOLCK, "No locks available"))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
WAYS = ("hang-up", "closed pipe", "full disk", "no locks")


def make_inputs(folder):
    rng = np.random.default_rng(0)
    for i in range(200):
        (folder / f"images/{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"images/{i % 2}/{i}.png")
    np.savez(folder / "reference.npz", rng.integers(0, 256, (24, 32, 32, 3), dtype=np.uint8))
    make_autoencoder(folder / "vae")
    make_inception(folder / "inception.pth")


def start(command, folder, way=None):
    """The process of a command in a folder of its own, which holds the samples to measure."""
    folder.mkdir(exist_ok=True)
    np.savez(folder / "samples.npz", np.random.default_rng(1).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8))
    python = [sys.executable, *(["-c", WITHOUT_LOCKS] if way == "no locks" else [])]
    words = [*python, str(ROOT / f"{command}.py"), *COMMANDS[command][0].split()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run(command, folder):
    output = (process := start(command, folder)).communicate()[0]
    assert process.returncode == 0, output.decode()


def interrupt(command, folder, way):
    """(exit status, the last line that the command printed)."""
    process = start(command, folder, way)
    if way == "closed pipe":
        process.stdout.read(1)
        process.stdout.close()
        return process.wait(), ""
    if way in ("hang-up", "full disk"):
        wait_for(lambda: any(folder.glob(COMMANDS[command][1])) or process.poll() is not None, seconds=300, pause=0.01)
        assert process.poll() is None, f"{command} ended before it could be interrupted"
    if way == "hang-up":
        process.send_signal(signal.SIGHUP)
    if way == "full disk":
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, 0))
    lines = process.communicate()[0].decode().replace("\r", "\n").strip().splitlines()
    return process.returncode, "".join(lines[-1:])


def same(command, folder, undisturbed):
    """Whether two folders hold the same bytes; of training, the same weights, EMA, optimizer and counts."""
    if command == "train":
        return not assert_same_state(latest(folder / "run"), latest(undisturbed / "run"))  # raises
    results = [{path.name: path.read_bytes() for path in f.glob(COMMANDS[command][2])} for f in (folder, undisturbed)]
    return results[0] == results[1] != {}


def main():
    print(f"| command | {' | '.join(WAYS)} |\n|{'---|' * (len(WAYS) + 1)}")
    lost = 0
    with tempfile.TemporaryDirectory() as root:
        make_inputs(root := Path(root))
        for command in COMMANDS:
            cells = []
            run(command, undisturbed := root / f"{command}-undisturbed")
            for way in WAYS:
                folder = root / f"{command}-{way.replace(' ', '-')}"
                status, line = interrupt(command, folder, way)
                print(f"{command}, {way}: exit status {status}; {line}", file=sys.stderr, flush=True)
                if way in ("hang-up", "full disk"):  # the other two may not stop the command
                    run(command, folder)
                cells.append(f"{status}, {'same' if same(command, folder, undisturbed) else 'LOST'}")
            print(f"| `{command}.py` | {' | '.join(cells)} |", flush=True)
            lost += "LOST" in str(cells)
    sys.exit(lost > 0)


if __name__ == "__main__":
    main()
