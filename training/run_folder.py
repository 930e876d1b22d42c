"""The folder of a run, which holds everything needed to continue, explain and repeat it:

options.json   all options            log.txt         the lines that people parse
status.json    running, preempted...  metrics.jsonl   the numbers, one JSON object a line
checkpoints/   {step:07d}.pt          samples/        {step:07d}.png, grids of images
tensorboard/   event files            .lock           held by the process that writes here
"""

import contextlib
import json
import math
import os
import re
import shutil
import time
from pathlib import Path

from tqdm.auto import tqdm

from checkpoint.files import set_aside
from runtime import files
from runtime.errors import RunError, UserError
from sampling.grid import write_picture
from training.grids import grid_paths
from training.status import write_status
from training.trackers import Trackers


def make_numbered(results_dir, model):
    """Make the next `{index:03d}-{model}` in results_dir. Returns its path. Raises OSError."""
    results = Path(results_dir)
    results.mkdir(parents=True, exist_ok=True)
    index = max((int(match[0]) + 1 for p in results.iterdir() if (match := re.match(r"\d{3,}(?=-)", p.name))), default=0)
    while True:
        folder = results / f"{index:03d}-{model.replace('/', '-')}"
        try:
            folder.mkdir()
            return folder
        except FileExistsError:  # another run took the number in between
            index += 1


class RunFolder:
    """Rank 0's access to the folder of a run. Raises UserError where another run holds it or it cannot be written to.

    error: the first failure to write a record. It is kept and not raised, because one rank must not end alone between two
    calls that all ranks take part in; the session looks at it before each step."""

    def __init__(self, path, is_new=False):
        self.path, self.is_new = Path(path), is_new
        self._lock = files.lock_folder(self.path)
        self.checkpoints = self.path / "checkpoints"
        self.log_file = self.metrics_file = self.trackers = self.error = None
        self.write_status("starting")

    def start(self, options, step):
        """Record the options, drop the metrics and grids of later steps than `step`, and open the records and trackers.
        Raises RunError, and UserError for a tracker that cannot start."""
        with files.write_errors(self.path, "; checkpoints are untouched", RunError):
            self.checkpoints.mkdir(exist_ok=True)
            for name in ("log.txt", "metrics.jsonl"):
                with contextlib.suppress(FileNotFoundError):
                    files.check_regular(self.path / name)  # a pipe would be waited for
            files.remove_leftovers(self.checkpoints)
            self._drop_later_metrics(step)
            files.remove_leftovers(self.path / "samples")
            for path in grid_paths(self.path):
                if int(path.stem) > step:
                    path.unlink()
            files.write_json(self.path / "options.json", options)
            self.log_file = open(self.path / "log.txt", "a", buffering=1, errors="backslashreplace")  # noqa: SIM115
            self.metrics_file = open(self.path / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115
            set_aside(self.checkpoints, step, self.log)
            self.trackers = Trackers(options["report_to"], self.path, options, self.log)
        self.is_new = False
        self.write_status("running", step)

    def _drop_later_metrics(self, step):
        """Cut metrics.jsonl before the first row of a later step, so that no step stands in it twice."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text(errors="replace").splitlines(keepends=True):
            try:
                row = json.loads(line)
                if not line.endswith("\n") or row["step"] > step:
                    break
            except (ValueError, KeyError, TypeError, RecursionError):  # half a line is what a kill leaves
                break
            kept.append(line)
        files.replace_file(path, lambda file: file.write("".join(kept).encode()))

    def write_status(self, state, step=None):
        self._keep_errors(lambda: write_status(self.path, state, step))

    def log(self, text):
        """Print a line, above the progress bar, and add it to log.txt."""
        tqdm.write(text)
        if self.log_file:
            line = f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {text}\n"
            self._keep_errors(lambda: self.log_file.write(line))

    def write_metrics(self, values):
        """Add a row to metrics.jsonl. JSON has no NaN, which means are where no update was finite: it becomes null."""
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._keep_errors(lambda: self.metrics_file.write(json.dumps(values) + "\n"))
        self.trackers.add_row(values)

    def write_grid(self, step, picture):
        """Write a PIL image to samples/. Returns its path. Raises RunError."""
        path = self.path / f"samples/{step:07d}.png"
        with files.write_errors(self.path, "; checkpoints are untouched", RunError):
            path.parent.mkdir(exist_ok=True)
        write_picture(path, picture)
        self.trackers.add_picture(step, picture)
        return path

    def close(self):
        for file in filter(None, (self.log_file, self.metrics_file)):
            self._keep_errors(lambda file=file: (file.flush(), os.fsync(file.fileno())))
            self._keep_errors(file.close)
        if self.trackers:
            self.trackers.close()
        self._lock.close()
        if self.is_new:  # nothing was begun here: a mistake in the command leaves no folder behind
            shutil.rmtree(self.path, ignore_errors=True)

    def _keep_errors(self, write):
        try:
            write()
        except OSError as error:
            self.error = self.error or files.unwritable(self.path, error)


def open_run_folder(run, model, context):
    """(path, RunFolder on rank 0 and None on the others). run: a RunConfig. Raises UserError, on every rank, where the
    folder is in use, cannot be written to, or is not seen by all processes."""
    folder = None

    def open_it():
        nonlocal folder
        try:
            if run.run_dir:
                folder = RunFolder(run.run_dir, is_new=not Path(run.run_dir).exists())
            else:
                folder = RunFolder(make_numbered(run.results_dir, model), is_new=True)
        except OSError as error:
            option = f"--run-dir {run.run_dir}" if run.run_dir else f"--results-dir {run.results_dir}"
            raise UserError(f"{option}: cannot be written to ({files.reason(error)})") from None
        return str(folder.path), time.time_ns()

    path, token = context.run_on_main(open_it)
    shared = Path(path) / f".shared-{token}"
    try:
        if folder:
            with files.write_errors(path):
                shared.touch()
        context.barrier()
        context.run_on_all_ranks(lambda: _check_shared(path, shared, context))
    except BaseException:
        if folder:
            folder.close()
        raise
    finally:
        if folder:
            shared.unlink(missing_ok=True)
    return path, folder


def _check_shared(path, shared, context, patience=10.0):
    """Raises UserError where this process does not see the file that rank 0 has made: nodes with folders of their own would
    train, and fail only when they resume."""
    deadline = time.monotonic() + patience  # network file systems show a new file with a delay
    while not shared.exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"--run-dir {path}: process {context.rank} does not see the folder that process 0 writes to; choose one on "
                "storage that all nodes share"
            )
        time.sleep(0.1)
