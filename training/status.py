"""status.json in the folder of a run, which job scripts read. Light to import: it is written before PyTorch is loaded."""

import time
from pathlib import Path

from runtime import files
from runtime.launch import launched


def write_status(folder, state, step=None):
    """state: starting, running, preempted, interrupted, finished or failed. Raises OSError."""
    status = {"state": state, "step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S")}
    files.write_json(Path(folder) / "status.json", status)


def mark_starting(run_dir):
    """Replace the status that an earlier process has left, such as "preempted", before anything can fail: a job script
    would requeue a job that fails at its start again and again. Raises UserError where another run holds the folder."""
    if run_dir and (Path(run_dir) / "status.json").exists() and launched()[0] == 0:
        with files.lock_folder(run_dir), files.write_errors(run_dir):
            write_status(run_dir, "starting")
