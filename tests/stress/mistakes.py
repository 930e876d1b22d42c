"""Make every mistake that we can think of, with every command, and check that each is answered with one line.

    OMP_NUM_THREADS=1 python tests/stress/mistakes.py --json mistakes.json
    OMP_NUM_THREADS=1 python tests/stress/mistakes.py --only evaluate

A mistake is a wrong value or combination of options, a file that is missing, damaged or of a special kind, a record in it
that is wrong, a number that is none, a size that does not fit, a full disk, or Ctrl-C: the table is mistakes.txt. The right
answer is one line on stderr that names the option or the file, an exit status that says so, and an end within a minute; no
traceback, no file lost or changed, no temporary file left. Commands run in forked processes, some in two as under torchrun,
and some as a user starts them. The exit status is 1 if an answer is wrong.
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
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # torch-fidelity installs a package named tests
sys.path.insert(0, str(Path(__file__).parents[2]))
from helpers import ROOT, Ranks, command_module
from stress.mistake_cases import KINDS, VALID, all_cases, copies
from stress.mistake_inputs import make_inputs

from benchmarks.timing import table
from runtime.config import Config, option
from runtime.files import write_json
from runtime.parser import Parser

MEMORY = 8 * 2**30  # bytes that a command may ask for beyond what this process has
MAY_CHANGE = ("status.json", "options.json", ".lock")


@dataclass(frozen=True)
class MistakesConfig(Config):
    """Options of mistakes.py."""

    only: tuple[str, ...] | None = option(None, "only the cases of these commands or kinds (default: all)", metavar="WORD",
        choices=(*VALID, *KINDS))  # fmt: skip
    json: str | None = option(None, "also write the numbers to this file", metavar="FILE", path="output")


def stamps(folder):
    """{path: what tells whether it has changed}."""
    found = {}
    for parent, folders, names in os.walk(folder):
        for path in (os.path.join(parent, name) for name in [*folders, *names] if name not in MAY_CHANGE):
            info = os.lstat(path)
            found[path] = (info.st_mode,) if os.path.isdir(path) else (info.st_mode, info.st_size, info.st_mtime_ns)
    return found


def contents(folder):
    """{path: bytes} of the regular files, and {path: None} of everything else but folders."""
    paths = [os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names if name not in MAY_CHANGE]
    regular = {path: os.path.isfile(path) and not os.path.islink(path) for path in paths}
    return {path: Path(path).read_bytes() if regular[path] else None for path in paths}


def limit_resources(case):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and their children too
    if case.limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (case.limit, case.limit))
    used = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))  # or the machine would swap


class Answer:
    """A case that runs, and what came of it. inputs: the stamps of the inputs before; None while these are made."""

    def __init__(self, case, root, number, inputs):
        self.case, self.inputs, self.start, self.late, self.interrupted = case, inputs, time.monotonic(), False, False
        self.root, self.folder = root, root if inputs is None else root / f"case{number}"
        if inputs is not None:
            self.before = make_folder(case, root, self.folder)
        # stdout and stderr of each process; files would have the limit too
        self.pipes, self.said = [(os.pipe(), os.pipe()) for _ in range(case.ranks)], {}
        if case.alone:
            settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
            self.processes = [subprocess.Popen(
                [sys.executable, "-m", command_module(case.command), *case.argv], cwd=self.folder,
                stdout=self.pipes[0][0][1], stderr=self.pipes[0][1][1], env=os.environ | settings,
                preexec_fn=lambda: limit_resources(case),
            )]  # fmt: skip
        else:
            self.processes = Ranks(self.run_command, case.argv, case.ranks, root / f"output{number}").processes
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
        return [process.poll() if self.case.alone else process.exitcode for process in self.processes]

    def texts(self, stream):
        """What the processes have said: 0 for stdout, 1 for stderr. To be called often: a full pipe stops the command."""
        for pair in self.pipes:
            with contextlib.suppress(BlockingIOError):
                while content := os.read(read := pair[stream][0], 1 << 16):
                    self.said[read] = self.said.get(read, b"") + content
        return [self.said.get(pair[stream][0], b"").decode(errors="replace") for pair in self.pipes]

    def is_done(self):
        seconds, said, wait_for = time.monotonic() - self.start, self.texts(0) + self.texts(1), self.case.interrupt
        if wait_for == "" and "libtorch" not in Path(f"/proc/{self.processes[0].pid}/maps").read_text():
            wait_for = None  # without a text, what is interrupted is the import of PyTorch
        if wait_for is not None and not self.interrupted and seconds > 1 and wait_for in "".join(said):
            self.interrupted = True
            for process in self.processes:
                os.kill(process.pid, signal.SIGINT)
        if None not in self.statuses():
            return True
        if seconds > (30 if self.case.ranks > 1 else 60):
            self.late = True
            for process in self.processes:
                process.kill()
                process.wait() if self.case.alone else process.join()
        return self.late

    def report(self):
        """{command, kind, name, wrong: what is wrong with the answer, "" for nothing, seconds, line, text}."""
        seconds, case, stdout, stderr = time.monotonic() - self.start, self.case, self.texts(0), self.texts(1)
        wrong, line = judge(case, self.statuses(), stdout, stderr, self.late, self.interrupted)
        if self.inputs is not None:
            wrong += changes(case, self.folder, self.before)
            if case.kind != "values" and (now := stamps(self.root / "in")) != self.inputs:
                wrong += [f"changed {path}" for path in {*now, *self.inputs} if now.get(path) != self.inputs.get(path)][:3]
                self.inputs.clear()
                self.inputs.update(now)
            shutil.rmtree(self.folder, ignore_errors=True)
        for read, _ in sum(self.pipes, ()):
            os.close(read)
        text = "".join(stderr)[-1500:] + "".join(stdout)[-1500:] if wrong else ""
        return {
            "command": case.command, "kind": case.kind, "name": case.name, "wrong": "; ".join(wrong),
            "seconds": round(seconds, 2), "line": line, "text": text,
        }  # fmt: skip


def make_folder(case, root, folder):
    """The folder in which a case runs. Returns its contents."""
    folder.mkdir()
    (folder / "in").symlink_to(root / "in")
    for name in copies(case, root / "in"):
        subprocess.run(["cp", "-a", root / "in" / name, folder / name], check=True)
    return contents(folder)


def judge(case, statuses, stdout, stderr, late=False, interrupted=False):
    """(what is wrong with an answer, its line). statuses, stdout, stderr: of each process."""
    lines = [line for text in stderr for line in text.replace("\r", "\n").split("\n")]
    errors = [line for line in lines if re.match(r"\S+: error: ", line)]
    is_mistake, may_be = 0 not in case.status, len(case.status) > 1 and 0 in case.status
    missing = [word for word in (case.word, case.more) if word not in "\n".join(errors or stdout)]
    stopped = case.word.startswith("Stopped")  # a run that was interrupted says so in its log, and not as an error
    faults = {
        "did not end": late,
        "traceback": "Traceback" in "".join(stderr + stdout),
        "ended before Ctrl-C": case.interrupt is not None and not interrupted,
        f"status {statuses}": not late and not {*statuses} <= {*case.status},
        f"{len(errors)} error lines": len(errors) != is_mistake and not stopped and not (may_be and len(errors) < 2),
        "more than one line": len(errors) == 1 and not any(text.rstrip("\n").endswith(errors[0]) for text in stderr),
        f"does not say {missing}": is_mistake and bool(missing),
        "a long line": bool(errors) and len(errors[0]) > 800,
    }
    return [fault for fault, found in faults.items() if found], errors[0] if errors else ""


def changes(case, folder, before):
    """The files of the case's folder that were changed or left. A log may be longer than it was."""
    after = contents(folder)
    found = [f"left {path}" for path in after if path.endswith((".tmp", ".part")) or "code-was-run" in path]
    for path, content in before.items() if 0 not in case.status else ():
        if path not in after or (content is not None and not (after[path] or b"").startswith(content)):
            found.append(f"changed {path}")
    return found


def run_cases(cases, root, without_inputs=False, jobs=2, progress=False):
    """The answers to the cases, a list of dicts in their order. `wrong` says what is wrong with one."""
    answers, running, waiting = {}, {}, list(enumerate(cases))
    inputs = None if without_inputs else stamps(root / "in")
    gc.freeze()  # or collecting would copy the pages that forked processes share
    with tqdm(total=len(cases), desc="Mistakes", unit="case", mininterval=5, disable=not progress) as bar:
        while waiting or running:
            while waiting and sum(answer.case.ranks for answer in running.values()) < jobs:
                number, chosen = waiting.pop(0)
                running[number] = Answer(chosen, root, number, inputs)
            for number in [number for number, answer in running.items() if answer.is_done()]:
                found = answers[number] = running.pop(number).report()
                if progress and found["wrong"]:
                    tqdm.write(f"{found['name']}\n    {found['wrong']}: {found['line']}", file=sys.stderr)
                bar.update()
            time.sleep(0.005)
    gc.unfreeze()
    return [answers[number] for number in range(len(cases))]


def prepare():
    """Import once what the commands import after parsing, so that forked processes need not."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)  # forked processes may not use OpenMP's threads
    modules = (
        "sklearn.datasets", "diffusers", "matplotlib.figure", "torch_fidelity", "evaluation.comparison",
        "evaluation.likelihood", "evaluation.during_training", "training.run", "training.trainer", "training.finetune",
        "sampling.image_set", "sampling.grid", "sampling.labels", "sampling.editing", "data.extraction",
        "checkpoint.diffusers_folder", "data.listing",
    )  # fmt: skip
    for module in (*map(command_module, VALID), *modules):
        importlib.import_module(module)
    from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel  # noqa: F401 -- imported when they are named


def main(argv=None):
    parser = Parser(MistakesConfig, __doc__)
    config = parser.parse(argv)
    with parser.report_errors():
        start = time.perf_counter()
        prepare()
        cases = [case for case in all_cases() if not config.only or {case.command, case.kind} & {*config.only}]
        with tempfile.TemporaryDirectory() as folder:
            make_inputs(Path(folder), run_cases)
            answers = run_cases(cases, Path(folder), progress=True)
    print(table_of(answers))
    print(f"{time.perf_counter() - start:.0f} s, torch {torch.__version__}")
    if config.json:
        write_json(config.json, answers)
    sys.exit(any(answer["wrong"] for answer in answers))


def table_of(answers):
    """Right answers and mistakes by command and kind, as Markdown."""

    def share(command, kind):
        chosen = [a for a in answers if command in (a["command"], "all") and kind in (a["kind"], "all")]
        return f"{sum(not a['wrong'] for a in chosen)}/{len(chosen)}" if chosen else ""

    commands = [name for name in VALID if any(answer["command"] == name for answer in answers)]
    kinds = [name for name in KINDS if any(answer["kind"] == name for answer in answers)]
    return table([{"command": of, **{kind: share(of, kind) for kind in (*kinds, "all")}} for of in (*commands, "all")])


if __name__ == "__main__":
    main()
