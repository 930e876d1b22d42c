"""Time variants of the same work in turns, and compare them with the rate of matrix products.

Each variant runs in a process of its own, so that none sees another's memory, settings or compiled code. While one
computes, the others wait. One more process multiplies matrices; its rate is what the shares refer to. Under torchrun each
rank has such processes, and the same variant of all ranks is one DDP.
"""

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from functools import partial

import torch
from tqdm.auto import tqdm

from runtime.config import Config, option
from runtime.devices import check_compile, has_bf16, pick_device, set_precision
from runtime.errors import RunError, UserError
from runtime.launch import launched
from training.meter import peak_memory

VARIANTS = ("baseline", "eager", "compiled")  # the original release's recipe, and ours without and with --compile
PROFILED_CALLS = 5
LARGEST = 15  # operations or kernels of a profile that are named
MATRIX_PRODUCT = "matrix product"
WAITING = "Python, dispatch, waiting"  # category of a profile


@dataclass(frozen=True)
class TimingConfig(Config):
    """timing"""

    batch_size: int = option(16, "images computed at once, on one device", low=1, high=65536)
    variants: tuple[str, ...] | None = option(None, "variants to time (default: all that can run here)", choices=VARIANTS)
    repeats: int = option(10, "number of timed rounds", low=1, high=10_000_000)
    calls: int = option(1, "steps in a round; a GPU makes them without waiting for the host in between, as in a real run",
        low=1, high=10_000)  # fmt: skip
    warmup: int = option(2, "rounds that are not counted, besides the first one, which is the start-up", low=0, high=10_000)
    json: bool = option(False, "print JSON instead of a table")


def resolve(config, gpu_precision):
    """The config with its `timing` and `compute` decided for this machine: variants that can run, device, precision and
    compiler. gpu_precision: the default precision on a GPU; elsewhere it is fp32. Raises UserError."""
    timing, compute = config.timing, config.compute
    device = pick_device(compute.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device == "mps":
        raise UserError("--device mps: is not supported here; pass --device cpu")
    compiler = compute.compile or "inductor"
    variants = timing.variants or VARIANTS
    try:
        check_compile(compiler, device)
    except UserError as error:
        if compute.compile or "compiled" in (timing.variants or ()):
            raise
        print(f"{error}; the compiled variant is left out", file=sys.stderr)
        variants = [name for name in variants if name != "compiled"]
    precision = compute.precision or (gpu_precision if device == "cuda" else "fp32")
    if precision == "bf16" and not has_bf16(torch.device(device)):
        precision = "fp32"
        print("--precision bf16: this machine has no bfloat16 instructions; fp32 is measured", file=sys.stderr)
    return dataclasses.replace(
        config,
        timing=dataclasses.replace(timing, variants=variants),
        compute=dataclasses.replace(compute, device=device, compile=compiler, precision=precision),
    )


@dataclass
class Timing:
    """Measurements of one variant. first: seconds of the first call, with start-up and compilation. seconds: of a call, in
    each timed round. profile: {category: seconds} of one call. largest: its operations or kernels that take most of it, as
    [name, category, seconds]."""

    first: float = 0.0
    seconds: list = field(default_factory=list)
    peak_memory_gib: float = 0.0
    profile: dict = field(default_factory=dict)
    largest: list = field(default_factory=list)

    @property
    def median(self):
        return statistics.median(self.seconds)


def compare(config, baseline, ours, flops, images, profile=None, extra=None):
    """Time the variants of a resolved config. Returns the report, a dict. baseline(config) and ours(config), where
    config.compute.compile may be None, make what is timed, in the variant's process. flops, images: of one call on one
    device. extra: {name: maker} of other work to time, once a round, whose median is reported as "{name}_seconds"."""
    eager = dataclasses.replace(config, compute=dataclasses.replace(config.compute, compile=None))
    makers = {"baseline": partial(baseline, config), "eager": partial(ours, eager), "compiled": partial(ours, config)}
    makers = {name: makers[name] for name in VARIANTS if name in config.timing.variants}
    product = MatrixProduct(config.compute.device, config.compute.precision)
    extra = extra or {}
    makers |= {MATRIX_PRODUCT: product, **extra}
    repeats, warmup, calls = config.timing.repeats, config.timing.warmup, config.timing.calls
    timings = race(makers, product.device, repeats, warmup, profile, calls, once=extra)
    others = {f"{name}_seconds": timings.pop(name).median for name in extra}
    return summarise(timings, product, flops, images) | others


def race(makers, device, repeats, warmup=2, profile=None, calls=1, once=()):
    """Time all makers in turns. Returns {name: Timing}.

    makers: {name: make}. make() must be picklable; it is called in the variant's process and returns the function without
    arguments that is timed. warmup: uncounted calls after the first. profile: turns a torch.profiler.profile of one more
    call into {(category, operation or kernel): seconds}, in the variant's process; the mean of several is taken, and what
    a GPU's timed calls take longer than its kernels is waiting. calls: in each timed round, but for the makers named in
    `once`. Raises RunError where one fails."""
    with contextlib.ExitStack() as stack:
        runners = {name: stack.enter_context(Runner(name, make, device, profile)) for name, make in makers.items()}
        timings = {name: Timing() for name in makers}
        for i in tqdm(range(1 + warmup + repeats), desc="Timing", unit="round", leave=False):
            for name, runner in runners.items():
                number = calls if i > warmup and name not in once else 1
                seconds = runner.ask(number)
                if i == 0:
                    timings[name].first = seconds
                elif i > warmup:
                    timings[name].seconds.append(seconds / number)
        for name, runner in runners.items():
            timings[name].peak_memory_gib = runner.ask("memory")
        profiles = {name: Counter() for name in runners if profile}
        for _ in range(PROFILED_CALLS):
            for name, total in profiles.items():
                total.update(runners[name].ask("profile"))
    for name, total in profiles.items():
        categories, timing = Counter(), timings[name]
        for (category, _), seconds in total.items():
            categories[category] += seconds / PROFILED_CALLS
        if device == "cuda":
            categories[WAITING] += max(0.0, timing.median - sum(categories.values()))
        timing.profile = dict(categories)
        timing.largest = [
            [what, category, seconds / PROFILED_CALLS] for (category, what), seconds in total.most_common(LARGEST)
        ]
    return timings


class Runner:
    """A variant in its process. A GPU cannot be used in a forked process; a CPU can, and forking saves importing again."""

    def __init__(self, name, make, device, profile):
        context = multiprocessing.get_context("fork" if device == "cpu" else "spawn")
        self.name, (self.pipe, self.theirs) = name, context.Pipe()
        self.process = context.Process(target=_serve, args=(make, device, profile, self.theirs), daemon=True)

    def __enter__(self):
        self.process.start()
        self.theirs.close()  # so that the pipe ends when the process dies
        return self

    def ask(self, what):
        try:
            self.pipe.send(what)
            answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            raise RunError(f"{self.name}: its process died (exit code {code}); is there memory for it?") from None
        if isinstance(answer, str):
            raise RunError(f"{self.name}: {answer}")
        return answer

    def __exit__(self, *error):
        self.process.kill()
        self.process.join()


def _serve(make, device, profile, pipe):
    device, call, parent = torch.device(device), None, os.getppid()
    try:
        if device.type == "cuda":
            torch.cuda.set_device(launched()[1])  # the matrix products, too, are each rank's own GPU's
        while True:
            while not pipe.poll(1):
                if os.getppid() != parent:  # killed; the pipe stays open, since forked siblings hold its other end too
                    return
            what = pipe.recv()
            if what == "memory":
                pipe.send(peak_memory(device) / 2**30)
            elif what == "profile":
                pipe.send(_profile(call, device, profile))
            else:
                if call and device.type == "cuda":  # it gave its memory to the others after its last turn
                    call()
                    synchronize(device)
                start = time.perf_counter()
                call = call or make()
                for _ in range(what):
                    call()
                synchronize(device)
                pipe.send(time.perf_counter() - start)
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    except Exception as error:
        text = traceback.format_exc() if os.environ.get("DEBUG") else str(error).strip().split("\n")[0]
        pipe.send(text or type(error).__name__)


def _profile(call, device, categorise):
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it reports its start, its end and every missing GPU
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=activities) as profile:
        call()
        synchronize(device)
    return categorise(profile, device)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class MatrixProduct:
    """Makes a product of an (M, K) and a (K, N) matrix: by default square ones that are large enough to use the whole
    device, whose rate is taken as the limit."""

    device: str
    precision: str
    shape: tuple | None = None

    @property
    def sides(self):
        """(M, K, N)"""
        return self.shape or (8192 if self.device == "cuda" else 2048,) * 3

    def rate(self, timing):
        """FLOP/s."""
        return 2 * math.prod(self.sides) / timing.median

    def __call__(self):
        set_precision(self.precision, torch.device(self.device))
        dtype, (m, k, n) = torch.bfloat16 if self.precision == "bf16" else torch.float32, self.sides
        a, b = (torch.randn(*shape, device=self.device, dtype=dtype) for shape in ((m, k), (k, n)))
        return lambda: a @ b


def machine(device):
    """The device's name, which belongs to every measurement."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = []
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    name = (names or [platform.processor() or platform.machine()])[0]
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def summarise(timings, product, flops, images):
    """The report of a race, a dict. timings: of `race`, with the `product`'s among them. flops, images: of one call on one
    device. The headline numbers are those of our fastest variant, and images_per_second is that of all devices."""
    timings, processes = dict(timings), launched()[2]
    rate = product.rate(timings.pop(MATRIX_PRODUCT))
    report = {"machine": machine(product.device), "torch": torch.__version__, "precision": product.precision}
    report["processes"] = processes
    report |= {"flops_per_step": flops, "matrix_flops_per_second": rate}
    ours = min((name for name in timings if name != "baseline"), key=lambda name: timings[name].median, default=None)
    if "baseline" in timings:
        report["baseline_seconds_per_step"] = timings["baseline"].median
    if ours:
        report |= {"fastest": ours, "seconds_per_step": timings[ours].median}
        report["share_of_matrix_rate"] = flops / timings[ours].median / rate
        report["images_per_second"] = processes * images / timings[ours].median
    if ours and "baseline" in timings:
        report["times_the_baseline"] = timings["baseline"].median / timings[ours].median
    return report | {"variants": {name: dataclasses.asdict(times) for name, times in timings.items()}}


def show(report, title, as_json):
    """Print the report as JSON, or the title and a table, on rank 0."""
    if launched()[0]:
        return
    if as_json:
        return print(json.dumps(report, indent=2))
    base, flops, rate = (
        report.get(key) for key in ("baseline_seconds_per_step", "flops_per_step", "matrix_flops_per_second")
    )
    print(f"{title}\n{report['machine']}; torch {report['torch']}; {report['precision']} products at "
          f"{rate / 1e9:,.0f} GFLOP/s, {flops / 1e9:,.1f} GFLOP per step")  # fmt: skip
    rows = []
    for name, times in report["variants"].items():
        seconds = statistics.median(times["seconds"])
        row = {"variant": name, "s/step": seconds, "least": min(times["seconds"]), "most": max(times["seconds"])}
        row |= {"speed-up": base / seconds if base else None, "share of the rate": flops / seconds / rate}
        rows.append(row | {"memory, GiB": times["peak_memory_gib"], "start-up, s": times["first"]})
    print(table(rows))


def table(rows):
    """Rows, as dicts, as a Markdown table: shares in percent, other numbers with four digits."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [[name.replace("_", " ") for name in columns], ["---"] * len(columns)]
    lines += [[cell(name, row.get(name)) for name in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(name, value):
    if isinstance(value, float):
        return f"{value:.1%}" if "share" in name else f"{value:.4g}"
    return "" if value is None else str(value)
