"""Timing variants of the same work against each other, in turns, and against the rate of matrix products.

Each variant lives in a process of its own, so that none sees another's memory, settings or compiled code; while one works
the others wait. One more process multiplies matrices: what it reaches is the limit that shares refer to.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
import traceback
from dataclasses import dataclass, field

import torch
from tqdm.auto import tqdm

from cli import options
from runtime import devices
from runtime.errors import RunError, UserError
from training.watch import peak_memory

VARIANTS = ("baseline", "eager", "compiled")  # the original's recipe, and ours without and with --compile
PROFILED = 5  # calls
MATRIX_PRODUCT = "matrix product"
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}


def parse(parser, command, argv, batch_option):
    """(mine, theirs): the options of a benchmark, which are added to its `parser`, and those of the command that it times:
    command(argv) parses what is left. batch_option: that command's name of --batch-size."""
    add = parser.add_argument
    add("--batch-size", batch_option, dest="batch_size", type=options.positive, default=16, metavar="N",
        help="images at once, on one device")  # fmt: skip
    add("--variants", nargs="+", choices=VARIANTS, help="what takes part (default: all that can)")
    add("--repeats", type=options.positive, default=10, help="rounds that count")
    add("--warmup", type=options.count, default=2, help="rounds that do not, after the first, which is start-up")
    add("--json", action="store_true", help="print JSON instead of a table")
    mine, rest = parser.parse_known_args(argv)
    _, theirs = command([*rest, batch_option, str(mine.batch_size)])
    with parser.reporting():
        theirs.device = theirs.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if devices.pick_device(theirs.device) == "mps":
            raise UserError("--device mps: cannot be timed here; pass --device cpu")
        asked = theirs.compile or (mine.variants and "compiled" in mine.variants)
        theirs.compile, mine.variants = theirs.compile or "inductor", mine.variants or list(VARIANTS)
        try:
            options.check_compile(theirs.compile, theirs.device)
        except UserError as error:
            if asked:
                raise
            print(f"{error}; left out here", file=sys.stderr)
            mine.variants = [name for name in mine.variants if name != "compiled"]
        if theirs.precision == "bf16" and not devices.has_bf16(torch.device(theirs.device)):
            theirs.precision = "fp32"
            print("--precision bf16: this machine has no bfloat16 instructions; measured in fp32", file=sys.stderr)
    return mine, theirs


@dataclass
class Timing:
    """Of one variant: seconds of each call, of the first one (start-up, compilation), peak memory, profile."""

    first: float = 0.0
    seconds: list = field(default_factory=list)
    peak_memory_gib: float = 0.0
    profile: dict = field(default_factory=dict)

    @property
    def median(self):
        return statistics.median(self.seconds)


def compare(mine, theirs, baseline, ours, flops, images, profile=None):
    """The report, a dict: every variant of `mine`, in turns with each other and with matrix products. baseline(theirs) and
    ours(theirs, compile) make makers, see `race`. flops, images: of one call."""
    makers = {"baseline": baseline(theirs), "eager": ours(theirs, None), "compiled": ours(theirs, theirs.compile)}
    makers = {name: makers[name] for name in VARIANTS if name in mine.variants}
    product = MatrixProduct(theirs.device, theirs.precision)
    timings = race({**makers, MATRIX_PRODUCT: product}, theirs.device, mine.repeats, mine.warmup, profile)
    return summarise(timings, product, flops, images)


def race(makers, device, repeats, warmup=2, profile=None):
    """{name: Timing}. makers: {name: make}, where make(), picklable, is called in the variant's process and returns what is
    timed, a function without arguments. warmup: calls after the first, which is kept apart, that are not counted. profile:
    {what: seconds} of a torch.profiler.profile of one more call, in the variant's process; means of several are taken.
    Raises RunError where one fails."""
    with contextlib.ExitStack() as stack:
        runners = {name: stack.enter_context(Runner(name, make, device, profile)) for name, make in makers.items()}
        timings = {name: Timing() for name in makers}
        for i in tqdm(range(1 + warmup + repeats), desc="Timing", unit="round", leave=False):
            for name, runner in runners.items():
                seconds = runner.ask("run")
                if i == 0:
                    timings[name].first = seconds
                elif i > warmup:
                    timings[name].seconds.append(seconds)
        for name, runner in runners.items():
            timings[name].peak_memory_gib = runner.ask("memory")
        for _ in range(PROFILED if profile else 0):
            for name, runner in runners.items():
                total = timings[name].profile
                for what, seconds in runner.ask("profile").items():
                    total[what] = total.get(what, 0.0) + seconds / PROFILED
    return timings


class Runner:
    """A variant in its process. GPUs cannot be used in forked processes; CPUs can, and forking saves importing again."""

    def __init__(self, name, make, device, profile):
        context = multiprocessing.get_context("fork" if device == "cpu" else "spawn")
        self.name, (self.pipe, self.theirs) = name, context.Pipe()
        self.process = context.Process(target=_serve, args=(make, device, profile, self.theirs), daemon=True)

    def __enter__(self):
        self.process.start()
        self.theirs.close()  # so that its death ends the pipe
        return self

    def ask(self, what):
        try:
            self.pipe.send(what)
            answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            reason = f"exit code {self.process.exitcode}"
            raise RunError(f"{self.name}: its process died ({reason}); is there memory for it?") from None
        if isinstance(answer, str):
            raise RunError(f"{self.name}: {answer}")
        return answer

    def __exit__(self, *error):
        self.process.kill()
        self.process.join()


def _serve(make, device, profile, pipe):
    device, call, parent = torch.device(device), None, os.getppid()
    try:
        while True:
            while not pipe.poll(1):
                if os.getppid() != parent:  # killed; the pipe does not tell, since forked siblings hold its other end too
                    return
            what = pipe.recv()
            if what == "memory":
                pipe.send(peak_memory(device) / 2**30)
            elif what == "profile":
                pipe.send(_profiled(call, device, profile))
            else:
                if call and device.type == "cuda":  # its memory went back after its last turn, for the others to use
                    call()
                    synchronize(device)
                start = time.perf_counter()
                call = call or make()
                call()
                synchronize(device)
                pipe.send(time.perf_counter() - start)
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    except Exception as error:
        pipe.send((traceback.format_exc() if os.environ.get("DEBUG") else str(error)).strip() or type(error).__name__)


def _profiled(call, device, digest):
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells of its start and end, and of every GPU that is not there
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=activities) as profile:
        start = time.perf_counter()
        call()
        synchronize(device)
        elapsed = time.perf_counter() - start
    return digest(profile, device, elapsed)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class MatrixProduct:
    """A maker of square matrix products as large as fill the device: the rate that nothing else exceeds."""

    device: str
    precision: str

    @property
    def side(self):
        return 8192 if self.device == "cuda" else 2048

    def rate(self, timing):
        """FLOP/s."""
        return 2 * self.side**3 / timing.median

    def __call__(self):
        set_precision(self.device, self.precision)
        a, b = (torch.randn(self.side, self.side, device=self.device, dtype=DTYPES[self.precision]) for _ in range(2))
        return lambda: a @ b


def set_precision(device, precision):
    if device == "cuda":
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")


def machine(device):
    """The device's name, for the record that every number needs."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = []
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    name = (names or [platform.processor() or platform.machine()])[0]
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def summarise(timings, product, flops, images):
    """What both benchmarks of steps report, a dict. timings: of `race`, the `product`'s among them. flops, images: of one
    call. The fastest variant but "baseline" is the one that counts."""
    timings = dict(timings)
    rate = product.rate(timings.pop(MATRIX_PRODUCT))
    report = {"machine": machine(product.device), "torch": torch.__version__, "precision": product.precision}
    report |= {"flops_per_step": flops, "matrix_flops_per_second": rate}
    ours = min((name for name in timings if name != "baseline"), key=lambda name: timings[name].median, default=None)
    if "baseline" in timings:
        report["baseline_seconds_per_step"] = timings["baseline"].median
    if ours:
        report |= {"fastest": ours, "seconds_per_step": timings[ours].median}
        report["share_of_matrix_rate"] = flops / timings[ours].median / rate
        report["images_per_second"] = images / timings[ours].median
    if ours and "baseline" in timings:
        report["times_the_baseline"] = timings["baseline"].median / timings[ours].median
    return report | {"variants": {name: dataclasses.asdict(times) for name, times in timings.items()}}


def print_table(report):
    base, flops = report.get("baseline_seconds_per_step"), report["flops_per_step"]
    print(f"{report['machine']}; torch {report['torch']}; {report['precision']} products at "
          f"{report['matrix_flops_per_second'] / 1e9:,.0f} GFLOP/s, {flops / 1e9:,.1f} GFLOP a step")  # fmt: skip
    print(f"{'':12}{'s/step':>10}{'(least - most)':>20}{'speed-up':>10}{'share':>8}{'memory':>11}{'start-up':>10}")
    for name, times in report["variants"].items():
        seconds = statistics.median(times["seconds"])
        spread = f"({min(times['seconds']):.4f} - {max(times['seconds']):.4f})"
        ratio = f"{base / seconds:.2f}" if base else ""
        share = flops / seconds / report["matrix_flops_per_second"]
        print(f"{name:12}{seconds:10.4f}{spread:>20}{ratio:>10}{share:8.1%}{times['peak_memory_gib']:7.2f} GiB"
              f"{times['first']:8.1f} s")  # fmt: skip


def show(mine, report, title):
    if mine.json:
        return print(json.dumps(report, indent=2))
    print(title)
    print_table(report)
