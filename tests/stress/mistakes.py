"""Make every mistake that we can think of, with every command, and check that each is answered with one line.

    OMP_NUM_THREADS=1 python tests/stress/mistakes.py --json mistakes.json
    OMP_NUM_THREADS=1 python tests/stress/mistakes.py --only evaluate

A mistake is a wrong value or combination of options, a file that is missing, damaged or of a special kind, a record in it
that is wrong, a number that is none, a size that does not fit, a full disk, or Ctrl-C. The right answer is one line on
stderr that names the option or the file, an exit status that says so, and an end within a minute; no traceback, no file
lost or changed, no temporary file left. Commands run in forked processes, some in two as under torchrun, and some as a user
starts them. The exit status is 1 if an answer is wrong.
"""

import contextlib
import gc
import importlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # torch-fidelity installs a package named tests
sys.path.insert(0, str(Path(__file__).parents[2]))
from helpers import ROOT, Ranks, command_module
from stress.mistake_cases import KINDS, VALID, all_cases
from stress.mistake_inputs import make_inputs

from runtime.config import Config, option
from runtime.files import check_output, write_json
from runtime.parser import Parser

MEMORY = 8 * 2**30  # bytes that a command may ask for beyond what this process has


@dataclass(frozen=True)
class MistakesConfig(Config):
    """Options of mistakes.py."""

    only: tuple[str, ...] | None = option(None, "only the cases of these commands or kinds (default: all)", metavar="WORD",
        choices=(*VALID, *KINDS))  # fmt: skip
    json: str | None = option(None, "write every answer to this file (default: only the table is printed)", metavar="FILE")


def snapshot(folder, contents=False):
    """{path: what tells whether it has changed}; status.json and a run's options.json may."""
    found = {}
    for parent, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = os.path.join(parent, name)
            info = os.lstat(path)
            regular = contents and os.path.isfile(path) and not os.path.islink(path)
            if name not in ("status.json", "options.json", ".lock") and (regular or not contents or os.path.islink(path)):
                found[path] = Path(path).read_bytes() if regular else (info.st_size * (name not in folders), info.st_mode)
                if not contents and name not in folders:
                    found[path] += (info.st_mtime_ns,)
    return found


def limit_resources(case):
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background jobs ignore it, and so would their children
    if case.limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (case.limit, case.limit))
    used = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))  # or the machine would swap


class Answer:
    """A case that runs, and what came of it."""

    def __init__(self, case, root, number, inputs):
        self.case, self.inputs, self.start = case, inputs, time.monotonic()
        self.folder = root if inputs is None else root / f"case{number}"
        self.output, self.interrupted = root / f"output{number}", False
        if inputs is not None:
            self.folder.mkdir()
            (self.folder / "in").symlink_to(root / "in")
            for name in case.copies:
                subprocess.run(["cp", "-a", root / "in" / name, self.folder / name], check=True)
            self.copies = snapshot(self.folder, contents=True)
        # stdout and stderr of each process; files would have the limit too
        self.pipes, self.said = [(os.pipe(), os.pipe()) for _ in range(case.ranks)], {}
        if case.alone:
            (_, out), (_, err) = self.pipes[0]
            settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
            self.processes = [subprocess.Popen(
                [sys.executable, "-m", command_module(case.command), *case.argv], cwd=self.folder, stdout=out, stderr=err,
                env=os.environ | settings, preexec_fn=lambda: limit_resources(case),
            )]  # fmt: skip
        else:
            self.processes = Ranks(self.run_command, case.argv, case.ranks, self.output).processes
        for read, write in sum(self.pipes, ()):
            os.close(write)
            os.set_blocking(read, False)

    def run_command(self, argv):
        """In the forked process: what it says goes through the pipes."""
        for number, (_, write) in enumerate(self.pipes[int(os.environ["RANK"])], 1):
            os.dup2(write, number)
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115
        tqdm._instances.clear()  # the bar of this benchmark
        os.chdir(self.folder)
        limit_resources(self.case)
        sys.argv[0] = f"{self.case.command}.py"
        importlib.import_module(command_module(self.case.command)).main(argv)

    def statuses(self):
        """Exit statuses of the processes; None for one that runs."""
        if self.case.alone:
            return [self.processes[0].poll()]
        return [process.exitcode for process in self.processes]

    def texts(self, stream):
        """What the processes have said: 0 for stdout, 1 for stderr."""
        for pair in self.pipes:
            with contextlib.suppress(BlockingIOError):
                while content := os.read(read := pair[stream][0], 1 << 16):
                    self.said[read] = self.said.get(read, b"") + content
        return [self.said.get(pair[stream][0], b"").decode(errors="replace") for pair in self.pipes]

    def is_done(self):
        seconds = time.monotonic() - self.start
        limit = 30 if self.case.ranks > 1 else 60
        if (
            self.case.interrupt is not None
            and not self.interrupted
            and seconds > 1
            and self.case.interrupt in "".join(self.texts(0) + self.texts(1))
        ):
            self.interrupted = True
            for process in self.processes:
                os.kill(process.pid, signal.SIGINT)
        self.texts(0), self.texts(1)  # a full pipe would stop the command
        if None not in self.statuses():
            return True
        if seconds > limit:
            for process in self.processes:
                process.kill()
                process.wait() if self.case.alone else process.join()
            self.late = True
        return seconds > limit

    late = False

    def report(self):
        seconds, case = time.monotonic() - self.start, self.case
        stdout, stderr = self.texts(0), self.texts(1)
        lines = [line for text in stderr for line in text.replace("\r", "\n").split("\n")]
        errors = [line for line in lines if re.match(r"\S+: error: ", line)]
        wrong = []
        if self.late:
            wrong.append("did not end")
        if "Traceback" in "".join(stderr + stdout):
            wrong.append("traceback")
        if case.interrupt is not None and not self.interrupted:
            wrong.append("ended before Ctrl-C")
        if any(status not in case.status for status in self.statuses()) and not self.late:
            wrong.append(f"status {self.statuses()}")
        if (
            len(errors) != (0 not in case.status)
            and "Stopped (interrupted)" not in case.words
            and not (len(errors) < 2 and 0 in case.status and len(case.status) > 1)
        ):
            wrong.append(f"{len(errors)} error lines")
        elif errors and stderr and not any(text.rstrip("\n").endswith(errors[0]) for text in stderr):
            wrong.append("more than one line")
        said = "\n".join(errors or stdout)
        wrong += [f"does not say {word!r}" for word in case.words if word not in said and 0 not in case.status]
        if errors and len(errors[0]) > 800:
            wrong.append("a long line")
        if self.inputs is not None:
            after = snapshot(self.folder, contents=True)
            if 0 not in case.status:
                changed = [
                    p
                    for p, content in self.copies.items()
                    if after.get(p) is None or (isinstance(content, bytes) and not after[p].startswith(content))
                ]
                wrong += [f"changed {os.path.relpath(p, self.folder)}" for p in changed]
            wrong += [
                f"left {os.path.relpath(p, self.folder)}"
                for p in after
                if p.endswith((".tmp", ".part")) or "code-was-run" in p
            ]
            if case.kind != "values" and (now := snapshot(self.inputs)) != self.inputs_before:
                wrong += [f"changed {p}" for p in {*now, *self.inputs_before} if now.get(p) != self.inputs_before.get(p)][
                    :3
                ]
                type(self).inputs_before = now
            shutil.rmtree(self.folder, ignore_errors=True)
        for read, _ in sum(self.pipes, ()):
            os.close(read)
        text = "".join(stderr)[-1500:] + "".join(stdout)[-1500:]
        return {"command": case.command, "kind": case.kind, "name": case.name, "wrong": "; ".join(wrong),
        "seconds": round(seconds, 2),
                "line": errors[0] if errors else "", "text": text if wrong else ""}  # fmt: skip

    inputs_before = None


def run_cases(cases, root, without_inputs=False, jobs=2, progress=False):
    """The answers to the cases, a list of dicts in their order. `wrong` says what is wrong with one."""
    answers, running, waiting = {}, {}, list(enumerate(cases))
    inputs = None if without_inputs else root / "in"
    Answer.inputs_before = inputs and snapshot(inputs)
    gc.freeze()  # or collecting would copy the pages that forked processes share
    with tqdm(total=len(cases), desc="Mistakes", unit="case", mininterval=5, disable=not progress) as bar:
        while waiting or running:
            while waiting and sum(answer.case.ranks for answer in running.values()) < jobs:
                number, chosen = waiting.pop(0)
                running[number] = Answer(chosen, root, number, inputs)
            for number, answer in list(running.items()):
                if answer.is_done():
                    answers[number] = answer.report()
                    if progress and answers[number]["wrong"]:
                        tqdm.write(
                            f"{answers[number]['name']}\n    {answers[number]['wrong']}: {answers[number]['line']}",
                            file=sys.stderr,
                        )
                    del running[number]
                    bar.update()
            time.sleep(0.005)
    gc.unfreeze()
    return [answers[number] for number in range(len(cases))]


def prepare():
    """Import once what the commands import after parsing, so that forked processes need not."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)  # forked processes may not use OpenMP's threads
    modules = ("sklearn.datasets", "diffusers", "matplotlib.figure", "torch_fidelity", "evaluation.comparison",
    "evaluation.likelihood",
               "evaluation.during_training", "training.session", "training.trainer", "training.finetune",
               "sampling.image_set",
               "sampling.grid", "sampling.original", "data.extraction", "checkpoint.diffusers_folder",
               "data.class_names")  # fmt: skip
    for module in (*map(command_module, VALID), *modules):
        importlib.import_module(module)
    from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel  # noqa: F401 -- imported when they are named


def main(argv=None):
    parser = Parser(MistakesConfig, __doc__)
    config = parser.parse(argv)
    with parser.report_errors():
        if config.json:
            check_output(config.json, "--json")
        start = time.perf_counter()
        prepare()
        cases = [case for case in all_cases() if not config.only or {case.command, case.kind} & {*config.only}]
        with tempfile.TemporaryDirectory() as folder:
            make_inputs(Path(folder), run_cases)
            answers = run_cases(cases, Path(folder), progress=True)
    print_table(answers)
    print(f"{time.perf_counter() - start:.0f} s, torch {torch.__version__}")
    if config.json:
        write_json(config.json, answers)
    sys.exit(any(answer["wrong"] for answer in answers))


def print_table(answers):
    """Right answers and mistakes by command and kind."""
    count, right = (
        Counter((a["command"], a["kind"]) for a in answers if not (a["wrong"] and good)) for good in (False, True)
    )
    kinds = [kind for kind in KINDS if any(kind == found for _, found in count)]
    print(f"| command | {' | '.join([*kinds, 'all'])} |\n|{'---|' * (len(kinds) + 2)}")
    for command in [*(command for command in VALID if any(command == found for found, _ in count)), "all"]:
        cells = []
        for kind in [*kinds, "all"]:
            of, good = (
                sum(n for (c, k), n in which.items() if command in (c, "all") and kind in (k, "all"))
                for which in (count, right)
            )
            cells.append(f"{good}/{of}" if of else "")
        print(f"| {' | '.join([command, *cells])} |")


if __name__ == "__main__":
    main()
