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
from runtime.distributed import first_sentence
from runtime.errors import RunError, UserError
from sampling.grid import write_picture
from training.status import write_status
from training.trackers import Trackers, image_paths


@contextlib.contextmanager
def run_folder(run, model, context):
    """The RunFolder of a RunConfig, until the block ends. model: its name, for a numbered folder. Raises UserError, on all
    ranks, where the folder is in use, cannot be written to, or is not seen by all processes."""
    folder, end = RunFolder(run, context), None
    try:
        folder.path = Path(context.on_main(folder.open, model))
        folder.check_shared()
        yield folder
        with context.together():
            folder.finish_writing()
        context.barrier()
    except BaseException as error:
        folder.outcome, end = "failed", error
        raise
    finally:
        folder.close(end)


class RunFolder:
    """What the processes know of the folder, which rank 0 alone writes to.

    outcome: the state to leave in status.json. step: of the run, once it has begun. saver: writes the checkpoints. error:
    the first failure to write a record. It is kept and not raised, because one rank must not end alone between two calls
    that all ranks take part in; the run looks at it before each step."""

    def __init__(self, run, context):
        self.run, self.context, self.outcome, self.is_new = run, context, "failed", False
        self.path = self.step = self.saver = self.error = None
        self._lock = self.log_file = self.metrics_file = self.trackers = None
        self._early = []  # lines of the log from before its file is open

    @property
    def checkpoints(self):
        return self.path / "checkpoints"

    def open(self, model):
        """On rank 0: make the folder and lock it. Returns its path."""
        run_dir, results_dir = self.run.run_dir, self.run.results_dir
        try:
            self.is_new = not (run_dir and Path(run_dir).exists())
            self.path = Path(run_dir) if run_dir else make_numbered(results_dir, model)
            self._lock = files.lock_folder(self.path)
        except OSError as error:
            option = f"--run-dir {run_dir}" if run_dir else f"--results-dir {results_dir}"
            raise UserError(option, f"cannot be written to ({files.reason(error)})", "choose another folder") from None
        self.write_status("starting")
        return str(self.path)

    def check_shared(self, patience=10.0):
        """Raises UserError where a rank does not see what rank 0 writes: it would train, and fail only on resuming."""
        shared = self.path / f".shared-{self.context.broadcast(time.time_ns())}"
        try:
            with self.context.together(), files.write_errors(self.path):
                if self.context.is_main:
                    shared.touch()
            with self.context.together():
                deadline = time.monotonic() + patience  # network file systems show a new file with a delay
                while not shared.exists():
                    if time.monotonic() > deadline:
                        problem = f"process {self.context.rank} does not see the folder that process 0 writes to"
                        raise UserError(f"--run-dir {self.path}", problem, "choose one on storage that all nodes share")
                    time.sleep(0.1)
        finally:
            if self.context.is_main:
                shared.unlink(missing_ok=True)

    def start(self, options, step):
        """Begin to record, in place of what later steps than `step` have left. Raises RunError; UserError of a tracker."""
        if not self.context.is_main:
            return
        with files.write_errors(self.path, "; checkpoints are untouched"):
            self.checkpoints.mkdir(exist_ok=True)
            log, metrics = self.path / "log.txt", self.path / "metrics.jsonl"
            for path in (log, metrics):
                with contextlib.suppress(FileNotFoundError):
                    files.check_regular(path)  # a pipe would be waited for
            for folder in (self.checkpoints, self.path / "samples"):
                files.remove_leftovers(folder)
            drop_later_metrics(metrics, step)
            for of, _, path in image_paths(self.path):
                if of > step:
                    path.unlink()
            files.write_json(self.path / "options.json", options)
            self.log_file = open(log, "a", buffering=1, errors="backslashreplace")  # noqa: SIM115
            self.metrics_file = open(metrics, "a", buffering=1)  # noqa: SIM115
            self.log_file.writelines(self._early)
            set_aside(self.checkpoints, step, self.log)
            self.trackers = Trackers(options["report_to"], self.path, options, self.log)
        self.is_new = False
        self.write_status("running", step)

    def write_status(self, state, step=None):
        self._keep_errors(lambda: write_status(self.path, state, step))

    def log(self, text):
        """Print a line, above the progress bar, and add it to log.txt."""
        if self.context.is_main:
            tqdm.write(text)
            line = f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {text}\n"
            if self.log_file:
                self._keep_errors(lambda: self.log_file.write(line))
            else:
                self._early.append(line)

    def write_metrics(self, step, values):
        """Add a row to metrics.jsonl. JSON has no NaN, which means are where no update was finite: it becomes null."""
        if self.context.is_main:
            values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
            self._keep_errors(lambda: self.metrics_file.write(json.dumps({"step": step, **values}) + "\n"))
            self.trackers.add((step, values))

    def write_image(self, step, name, image):
        """Write a PIL image to samples/, called by the step, and by its name unless that is "samples"."""
        path = self.path / f"samples/{'' if name == 'samples' else f'{name}-'}{step:07d}.png"
        self._keep_errors(lambda: (path.parent.mkdir(exist_ok=True), write_picture(path, image)))
        self.trackers.add((step, {name: image}))
        if self.error is None:
            self.log(f"(step={step:07d}) {name.capitalize()}: {path}")

    def _keep_errors(self, write):
        try:
            write()
        except (OSError, RunError) as error:
            self.error = self.error or (error if isinstance(error, RunError) else files.unwritable(self.path, error))

    def finish_writing(self):
        """Wait for the last checkpoint. Raises what went wrong with it, or with a record."""
        try:
            if self.saver:
                self.saver.wait()
        except OSError as error:
            raise files.unwritable(self.path, error) from None
        if self.error:
            raise self.error

    def close(self, error=None):
        """Write how the run ended. error: what ended it, which is reported whatever else goes wrong here."""
        if not self.context.is_main or self._lock is None:
            return
        try:
            if self.saver:
                with contextlib.suppress(Exception):
                    self.saver.wait()
            self.write_status(self.outcome, self.step)  # before the log: its line is printed, which may fail
            if error is not None and self.step is not None:
                self.log(f"Stopped at step {self.step}: {error if isinstance(error, UserError) else first_sentence(error)}")
            elif self.outcome == "finished":
                self.log(f"Done: {self.step} steps, run folder {self.path}")
            elif self.outcome != "failed":
                self.log(f"Stopped ({self.outcome}), saved at step {self.step}; to resume, give the same command with "
                    f"--run-dir {self.path}")  # fmt: skip
        finally:
            for file in filter(None, (self.log_file, self.metrics_file)):
                self._keep_errors(lambda file=file: (file.flush(), os.fsync(file.fileno())))
                self._keep_errors(file.close)
            if self.trackers:
                self.trackers.close()
            self._lock.close()
            if self.is_new:  # nothing was begun here: a mistake in the command leaves no folder behind
                shutil.rmtree(self.path, ignore_errors=True)


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


def drop_later_metrics(path, step):
    """Cut metrics.jsonl before the first row of a later step, so that no step stands in it twice. Raises OSError."""
    if not path.exists():
        return
    kept = []
    # half a line is what a kill leaves
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        for line in path.read_text(errors="replace").splitlines(keepends=True):
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
            kept.append(line)
    files.replace_file(path, lambda file: file.write("".join(kept).encode()))
