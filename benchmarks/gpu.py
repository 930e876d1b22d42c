"""Everything that is worth measuring on a GPU, one row after the other: training and sampling steps, the commands from end
to end, checkpoints, and the time to start.

    python -m benchmarks gpu --minutes 9                 # until all rows are there: the same command goes on
    python -m benchmarks gpu --only train-XL sample      # rows whose names begin so
    python -m benchmarks gpu --processes 8               # the rows of training with DDP and --shard, on eight GPUs
    python -m benchmarks gpu --small --device cpu        # tiny sizes: whether everything works

Each row is measured in processes of its own and becomes a line of {folder}/rows.jsonl. A row that is there is not measured
again. At the end, and whenever the time is up, all rows are printed as tables and written to gpu.md and gpu.json.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm

from benchmarks import timing
from benchmarks.timing import table
from checkpoint import files
from runtime.config import Config, option
from runtime.devices import has_bf16, pick_device
from runtime.errors import RunError, UserError
from runtime.files import replace_file, write_errors, write_json
from runtime.parser import Parser

ROOT = Path(__file__).parents[1]
ROW_SECONDS = 540
TINY = "--hidden-size 48 --depth 2 --num-heads 2".split()  # with --small, instead of the models' own sizes


@dataclass(frozen=True)
class GPUConfig(Config):
    """Options of gpu.py."""

    folder: str = option("results/gpu", "folder of the rows and tables, and of large temporary files")
    only: tuple[str, ...] | None = option(None, "measure rows whose names begin with one of these (default: all)",
        metavar="NAME")  # fmt: skip
    minutes: float | None = option(None, "end after this time; a row that is cut off is measured next time (default: go on "
        "to the end)", above=0, high=1e6)  # fmt: skip
    retry: bool = option(False, "measure rows again that have failed")
    processes: int = option(1, "GPUs of this machine; with several, training is measured on all of them together", low=1,
        high=1024)  # fmt: skip
    small: bool = option(False, "use tiny models and batches, to see whether everything works")
    device: str | None = option(None, "where to compute (default: the best there is)", choices=("cuda", "cpu"))


class TimeUpError(Exception):
    """A row did not end in the time that was left."""


class Bench:
    """Starts the processes of the rows. deadline: on time.monotonic's clock."""

    def __init__(self, config):
        self.config, self.device, self.deadline = config, pick_device(config.device), float("inf")
        self.folder = Path(config.folder)
        self.path = self.folder / "rows.jsonl"
        self.precision = "bf16" if self.device == "cuda" and has_bf16(torch.device("cuda")) else "fp32"
        self.compile = "eager" if config.small else "inductor"  # the backend, which takes a minute for each row on a CPU

    def start(self, *words, processes=1, environment=None, output=subprocess.PIPE, errors=subprocess.PIPE):
        """Start `python WORDS`, or the same under torchrun, in a process group of its own."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *(torchrun if processes > 1 else []), *map(str, words)]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, **(environment or {})}
        return subprocess.Popen(
            command, stdout=output, stderr=errors, text=True, cwd=ROOT, env=environment, start_new_session=True
        )

    def run(self, *words, **options):
        """What `python WORDS` prints. Raises RunError where it fails, and TimeUpError."""
        with stopping(self.start(*words, **options)) as process:
            try:
                out, errors = process.communicate(timeout=max(1, min(self.left(), ROW_SECONDS)))
            except subprocess.TimeoutExpired:
                raise TimeUpError from None
        if process.returncode:
            raise RunError(reason_in(errors) or f"{words[0]} {words[1]}: ended with status {process.returncode}")
        return out

    def left(self):
        return self.deadline - time.monotonic()

    def measured(self, name):
        """The row of this name, or {}."""
        return next((row for row in read_rows(self.path) if row["name"] == name), {})


def reason_in(text):
    """The line of the output of a command that says why it failed: that of a UserError, the end of the first traceback, or
    the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found = [line for line in lines if ": error: " in line]
    found += [line for line in lines if re.match(r"\w[\w.]*(Error|Exception)\b", line)]
    return next(iter(found + lines[-1:]), "")[:300]


@contextlib.contextmanager
def stopping(process):
    """Ends the process and all that it has started. torchrun ends its workers, which are in other process groups."""
    try:
        yield process
    finally:
        if "torch.distributed.run" in process.args and process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# ----------------------------------------------------------------------------------------------------------------------
# The rows. Each function returns what it has measured, as a dict


def matrix_products(bench, tokens):
    """The rates of products: of large square matrices, and of the shapes in a block of DiT-XL/2."""
    d = 48 if bench.config.small else 1152
    shapes = {"square": None, "qkv": (tokens, d, 3 * d), "attention out": (tokens, d, d), "fc1": (tokens, d, 4 * d),
        "fc2": (tokens, 4 * d, d)}  # fmt: skip
    products = {name: timing.MatrixProduct(bench.device, bench.precision, shape) for name, shape in shapes.items()}
    rounds, calls = (2, 1) if bench.config.small else (10, 20)
    timings = timing.race(products, bench.device, rounds, calls=calls)
    return {f"{name} TFLOP/s": product.rate(timings[name]) / 1e12 for name, product in products.items()}


def step(script, bench, model, batch_size, variant, *more):
    """A step by benchmarks/train_step.py or sampling.py. more: further options of these."""
    small = bench.config.small
    rounds = ["--repeats", 2, "--warmup", 1] if small else ["--repeats", 5, "--calls", 10]
    out = bench.run(
        "-m", "benchmarks", script, "--model", f"DiT-{model}", "--image-size", 32 if small else 256,
        *(TINY if small else ()), "--batch-size", batch_size, "--variants", variant, "--device", bench.device,
        "--compile", bench.compile, "--precision", bench.precision, *rounds, *more, "--json",
        processes=bench.config.processes,
    )  # fmt: skip
    report = json.loads(out[out.index("{") :])
    times = report["variants"][variant]
    seconds = statistics.median(times["seconds"])
    matrix = report["matrix_flops_per_second"]
    row = {"model": model, "image_size": report["image_size"], "batch_size": batch_size, "variant": variant}
    row |= {"seconds_per_step": seconds, "share of the matrix rate": report["flops_per_step"] / seconds / matrix}
    row |= {"matrix TFLOP/s": matrix / 1e12, "memory GiB": times["peak_memory_gib"], "start seconds": times["first"]}
    if times["profile"]:
        whole = sum(times["profile"].values())
        row["profile"] = {category: share / whole for category, share in times["profile"].items()}
        row["largest"] = times["largest"]
    if script == "train_step":
        return row | {"images/s": report["processes"] * batch_size / seconds}
    decoding = report["decoding_seconds"]
    rates = {f"images/s, {n} steps": batch_size / (n * seconds + decoding) for n in (250, 20)}
    return row | rates | {"decoding seconds": decoding}


training = partial(step, "train_step")


def sampling(bench, *arguments):
    return step("sampling", bench, *arguments, "--vae", autoencoder(bench))


def train_command(bench, batch_size, seconds, benchmark, *more):
    """train.py from stored latents for so many seconds, as the benchmark's row predicts them. The speed is that of the
    lines of the log but for the first, which has the start."""
    expected, processes, small = bench.measured(benchmark).get("images/s"), bench.config.processes, bench.config.small
    batch, lines = processes * batch_size, 3 if small else 6
    every = max(1, round((expected or 100.0) * seconds / batch / lines))
    with temporary(bench) as run:
        words = *train_options(bench, batch), "--compile", bench.compile, "--log-every", every, *more
        start = time.monotonic()
        bench.run(*words, "--max-steps", lines * every, "--run-dir", run, processes=processes)
        seconds = time.monotonic() - start
        rates = [json.loads(line)["images_per_second"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        memory = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["peak_memory_gib"]
    return compared(benchmark, "images/s", statistics.median(rates[1:]), expected) | {
        "batch_size": batch_size, "steps": lines * every, "memory GiB": memory, "whole seconds": seconds,
    }  # fmt: skip


def sample_command(bench, number, batch_size, steps, benchmark):
    """sample_ddp.py. The speed is that of the images after the first batch, by the times of the files."""
    expected = bench.measured(benchmark).get(f"images/s, {steps} steps")
    source = "--ckpt", checkpoint(bench), "--vae", autoencoder(bench)
    with temporary(bench) as folder:
        start = time.monotonic()
        bench.run(
            "sample_ddp.py", *source, "--sample-dir", folder, "--folder", "set", "--num-fid-samples", number,
            "--per-proc-batch-size", batch_size, "--num-sampling-steps", steps, "--device", bench.device, "--precision",
            bench.precision, "--compile", bench.compile,
        )  # fmt: skip
        seconds = time.monotonic() - start
        times = sorted(path.stat().st_mtime for path in (folder / "set").glob("*.png"))
    rate = (number - batch_size) / (times[-1] - times[batch_size - 1])
    return compared(benchmark, f"images/s, {steps} steps", rate, expected) | {
        "batch_size": batch_size, "images": number, "whole seconds": seconds,
    }  # fmt: skip


def compared(benchmark, what, value, expected):
    return {what: value, "of the row": benchmark, "share of that row": value / expected if expected else None}


def saving(bench, model, batch_size, repeats):
    """The row `saving` of benchmarks/rows.py."""
    with temporary(bench) as folder:
        bench.run(
            "-m", "benchmarks", "saving", "--model", f"DiT-{model}", *(TINY if bench.config.small else ()), "--batch-size",
            batch_size, "--device", bench.device, "--folder", folder, "--repeats", repeats, "--json", folder / "out.json",
        )  # fmt: skip
        rows = json.loads((folder / "out.json").read_text())["saving"]
    return {"model": model, "MiB": rows[0]["MiB"], **{row["what"]: row["seconds"] for row in rows}}


def starting(bench, batch_size):
    """Seconds from the start of train.py to the end of its first step: eager, compiled, and compiled once more."""
    options, found = train_options(bench, batch_size), {}
    with temporary(bench) as folder, open(folder / "output", "w") as output:
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}
        compiled = "--compile", bench.compile
        for name, more in {"eager": (), "compiled": compiled, "compiled again": compiled}.items():
            run, start = folder / name.replace(" ", "-"), time.monotonic()
            words = *options, *more, "--log-every", 1, "--run-dir", run
            with stopping(bench.start(*words, environment=cache, output=output, errors=output)) as process:
                while not (run / "metrics.jsonl").is_file() or not (run / "metrics.jsonl").stat().st_size:
                    if process.poll() is not None:
                        raise RunError(reason_in((folder / "output").read_text()))
                    if time.monotonic() > min(bench.deadline, start + ROW_SECONDS):
                        raise TimeUpError
                    time.sleep(0.02)
            found[f"{name}, seconds"] = time.monotonic() - start
    return found


# ----------------------------------------------------------------------------------------------------------------------
# What the commands need: made once in the folder


@contextlib.contextmanager
def temporary(bench):
    """A folder on the disk of --folder, which is deleted afterwards."""
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        yield Path(folder)


def made_once(name):
    """Turns make(bench, path) into a function of the Bench alone, whose result is the path in its folder, made unless it is
    there."""

    def wrap(make):
        def get(bench):
            path = bench.folder / name
            if not path.exists():
                with temporary(bench) as folder:
                    make(bench, folder / name)
                    shutil.move(folder / name, path)
            return path

        return get

    return wrap


@made_once("autoencoder")
def autoencoder(bench, path):
    """Random weights in the sizes of the Stable Diffusion autoencoder."""
    from diffusers import AutoencoderKL

    sizes = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4}
    if not bench.config.small:
        sizes = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    AutoencoderKL(latent_channels=4, **kinds, **sizes).save_pretrained(path)


@made_once("latents")
def stored_latents(bench, path):
    """Random moments."""
    from benchmarks.rows import make_latents

    size, images = (32, 256) if bench.config.small else (256, 8192)
    path.mkdir()
    make_latents(path, images, size)


@made_once("checkpoint.pt")
def checkpoint(bench, path):
    """Random weights of the model that train_command trains."""
    from benchmarks.train_step import StepConfig, build_model

    words = [str(word) for word in model_options(bench)]
    config = Parser(StepConfig, "").parse(words)
    model = build_model(config)
    files.save(path, {"ema": model.state_dict(), "model_config": model.config, "args": config.flat()})


def model_options(bench):
    if bench.config.small:
        return "--model", "DiT-S/2", *TINY, "--image-size", 32
    return "--model", "DiT-XL/2", "--image-size", 256


def train_options(bench, batch_size):
    return (
        "train.py", "--data-path", stored_latents(bench), "--vae", "random numbers", *model_options(bench), "--device",
        bench.device, "--precision", bench.precision, "--global-batch-size", batch_size, "--num-workers",
        0 if bench.config.small else 4,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# The list


def make_list(config):
    """{name: (function of a Bench, its other arguments)}."""
    small, rows = config.small, {}
    batches, middle = ((2,), 2) if small else ((32, 64, 128, 256), 128)
    few, many = batches[0], batches[-1]
    for n in batches:
        rows[f"train-XL-256-b{n}"] = training, "XL/2", n, "compiled", *(["--profile"] if n == middle else [])
    rows[f"train-XL-256-b{few}-eager"] = training, "XL/2", few, "eager"
    rows[f"train-XL-256-b{few}-original"] = training, "XL/2", few, "baseline", "--profile"
    if config.processes > 1:
        rows[f"train-XL-256-b{middle}-sharded"] = training, "XL/2", middle, "compiled", "--shard"
    for model in "S" if small else "SBL":
        rows[f"train-{model}-256-b{many}"] = training, f"{model}/2", many, "compiled"
    rows[f"train-XL-512-b{few}"] = training, "XL/2", few, "compiled", "--image-size", 64 if small else 512
    rows["command-train"] = train_command, middle, 4 if small else 120, f"train-XL-256-b{middle}"
    if config.processes > 1:
        return rows
    batches, middle = ((2,), 2) if small else ((16, 32, 64, 128), 64)
    for n in batches:
        rows[f"sample-XL-256-b{n}"] = sampling, "XL/2", n, "compiled"
    rows[f"sample-XL-256-b{middle}-original"] = sampling, "XL/2", middle, "baseline"
    for steps in (20, 250):
        number = 2 * middle if small else 512
        rows[f"command-sample-{steps}"] = sample_command, number, middle, steps, f"sample-XL-256-b{middle}"
    rows["saving-XL"] = saving, "XL/2", few, 1
    rows["start-XL"] = starting, few
    rows["matrix"] = matrix_products, 256 * many
    return rows


def read_rows(path):
    """The rows of the file; a line that was cut off is left out."""
    rows = []
    for line in path.read_text().splitlines()[1:] if path.exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def begin(bench):
    """Write the first line of the file, or check it: where, and how, its rows are measured. Returns it."""
    config = bench.config
    setting = {"machine": timing.machine(bench.device), "torch": torch.__version__, "cuda": torch.version.cuda}
    setting |= {"precision": bench.precision, "processes": config.processes, "small": config.small}
    bench.folder.mkdir(parents=True, exist_ok=True)
    if not bench.path.exists():
        replace_file(bench.path, lambda file: file.write(f"{json.dumps(setting)}\n".encode()))
    try:
        recorded = json.loads(bench.path.read_text().splitlines()[0])
        changed = [f"{name} {recorded[name]}" for name in setting if recorded[name] != setting[name]]
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{bench.path}: damaged; delete it, or choose another --folder") from None
    if changed:
        raise UserError(
            f"--folder {config.folder}: its rows were measured with {', '.join(changed)}; choose another folder"
        )
    return setting


def measure(bench):
    """Measure the rows that are missing. Returns the names of those that are left for the next time."""
    config, rows = bench.config, make_list(bench.config)
    wanted = [name for name in rows if not config.only or name.startswith(config.only)]
    if not wanted:
        raise UserError(f"--only {' '.join(config.only)}: no row begins so; they are {', '.join(rows)}")
    done = {row["name"] for row in read_rows(bench.path) if not (config.retry and "error" in row)}
    missing = [name for name in wanted if name not in done]
    if config.minutes:
        bench.deadline = time.monotonic() + 60 * config.minutes
    bar = tqdm(missing, desc="Measuring", unit="row")
    for i, name in enumerate(bar):
        bar.set_postfix_str(name)
        start = time.monotonic()
        try:
            function, *arguments = rows[name]
            row = function(bench, *arguments)
        except TimeUpError:
            if i and bench.left() <= 0:
                return missing[i:]
            row = {"error": f"did not end within {time.monotonic() - start:.0f} s"}
        except UserError as error:
            row = {"error": str(error)}
        with open(bench.path, "a") as file:
            file.write(json.dumps({"name": name, **row, "took seconds": round(time.monotonic() - start, 1)}) + "\n")
        if bench.left() <= 0:
            return missing[i + 1 :]
    return []


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def tables(setting, rows):
    """Markdown: a table for each kind of row, which is the first word of its name, and of the profiles."""
    where = f"{setting['machine']}, torch {setting['torch']}, CUDA {setting['cuda']}, {setting['precision']}"
    parts = [where + (f", {setting['processes']} processes" if setting["processes"] > 1 else "")]
    for kind in dict.fromkeys(row["name"].split("-")[0] for row in rows):
        of_kind = [row for row in rows if row["name"].split("-")[0] == kind]
        parts.append(table([{k: v for k, v in row.items() if k not in ("profile", "largest")} for row in of_kind]))
    percent = [(row["name"], row["profile"].items()) for row in rows if "profile" in row]
    profiles = [{"name": name, **{kind: f"{share:.1%}" for kind, share in parts}} for name, parts in percent]
    if profiles:
        parts.append("Where the time goes\n\n" + table(profiles))
    for row in rows:
        if row.get("largest"):
            head = ["| seconds | kind | what |", "|---|---|---|"]
            lines = [f"| {seconds:.4g} | {kind} | `{what[:90]}` |" for what, kind, seconds in row["largest"] if what]
            parts.append("\n".join([f"The largest parts of a step of {row['name']}\n", *head, *lines]))
    return "\n\n".join(parts) + "\n"


def main(argv=None):
    parser = Parser(GPUConfig, __doc__)
    config = parser.parse(argv)
    with parser.report_errors():
        bench = Bench(config)
        with write_errors(f"--folder {config.folder}"):
            setting = begin(bench)
            left = measure(bench)
            order = list(make_list(config))
            latest = {row["name"]: row for row in read_rows(bench.path)}  # of a row that was measured again the last one
            rows = sorted(latest.values(), key=lambda row: order.index(row["name"]))
            text = tables(setting, rows)
            replace_file(bench.folder / "gpu.md", lambda file: file.write(text.encode()))
            write_json(bench.folder / "gpu.json", {**setting, "rows": rows})
        print(text)
        if left:
            print(f"{len(left)} rows are left; the same command goes on with {left[0]}")
        if failed := [row["name"] for row in rows if "error" in row]:
            raise RunError(f"rows that failed: {', '.join(failed)}; with --retry they are measured again")
