"""A training run's folder, which holds everything needed to continue, explain and repeat it:

options.json   all options, resolved      log.txt         the lines that people parse
status.json    running, preempted, ...    metrics.jsonl   the numbers, one JSON object a line
checkpoints/   {step:07d}.pt              .lock           held by the process that writes here
"""

import json
import math
import os
import re
import time
from pathlib import Path

from tqdm.auto import tqdm

from checkpoint import files as checkpoint
from runtime import files
from runtime.errors import RunError, UserError


def numbered(results_dir, model):
    """Make the next `{index:03d}-{model}` in results_dir. Returns its path."""
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


def mark_started(folder):
    """Replace a status that an earlier process has left, such as "preempted", before anything of this one can fail: a job
    script that reads the status would otherwise requeue a job that fails at its start, again and again. A run that another
    process holds is left alone."""
    path = Path(folder) / "status.json"
    if not path.exists():
        return
    try:
        with files.lock_folder(Path(folder)):
            files.write_json(path, {"state": "starting", "time": time.strftime("%Y-%m-%dT%H:%M:%S")})
    except (UserError, OSError):
        pass  # RunFolder meets the same obstacle a little later, and tells it


class RunFolder:
    """Rank 0's hold on a run's folder. Raises UserError where another run holds it, or it cannot be written."""

    def __init__(self, path):
        self.path = Path(path)
        self._lock = files.lock_folder(self.path)
        self.checkpoints = self.path / "checkpoints"
        self.log_file = self.metrics_file = self.error = None
        try:
            self.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            raise _unwritable(self.checkpoints, error) from None
        files.remove_leftovers(self.checkpoints)

    def start(self, options, step):
        """Cut the records back to `step`, note the options, and begin to record. Raises RunError."""
        try:
            self._cut_back("log.txt", step, lambda line: (m := re.search(r"\(step=(\d+)\)", line)) and int(m[1]))
            self._cut_back("metrics.jsonl", step, _step_of_metrics)
            files.write_json(self.path / "options.json", options)
            self.log_file = open(self.path / "log.txt", "a", buffering=1)  # noqa: SIM115
            self.metrics_file = open(self.path / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115
            checkpoint.set_aside(self.checkpoints, step, self.log)
        except OSError as error:
            raise _unwritable(self.path, error) from None
        self.mark("running", step)

    def _cut_back(self, name, step, step_of):
        """Drop everything from the first line of a later step on, so that no step stands twice."""
        path = self.path / name
        if not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines(keepends=True):
            if not line.endswith("\n") or (step_of(line) or 0) > step:  # half a line is what a kill leaves
                break
            kept.append(line)
        files.replace_file(path, lambda file: file.write("".join(kept).encode()))

    def mark(self, state, step):
        """Leave a mark: running, preempted, interrupted, finished or failed."""
        status = {"state": state, "step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S")}
        self._noting_errors(lambda: files.write_json(self.path / "status.json", status))

    def log(self, text):
        tqdm.write(text)
        if self.log_file:
            line = f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {text}\n"
            self._noting_errors(lambda: self.log_file.write(line))

    def metrics(self, **values):
        # JSON has no NaN, which the mean over an interval without a finite update is
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._noting_errors(lambda: self.metrics_file.write(json.dumps(values) + "\n"))

    def close(self):
        for file in filter(None, (self.log_file, self.metrics_file)):
            self._noting_errors(lambda file=file: (file.flush(), os.fsync(file.fileno())))
            self._noting_errors(file.close)
        self._lock.close()

    def _noting_errors(self, write):
        """A full disk must not end one rank between two calls that all take part in: `error` is for the loop to look at."""
        try:
            write()
        except OSError as error:
            self.error = self.error or _unwritable(self.path, error)


def _unwritable(path, error):
    return RunError(f"{path}: cannot be written to ({error.strerror}); checkpoints are untouched")


def _step_of_metrics(line):
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return None
