"""Time and memory of the metrics on random feature vectors, without the network.

OMP_NUM_THREADS=2 python -m benchmarks.metrics --json metrics.json
"""

import json
import platform
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from evaluation.metrics import Statistics, frechet_distance, inception_score, precision_recall
from runtime.config import Config, option
from runtime.files import check_output
from runtime.parser import Parser


@dataclass(frozen=True)
class BenchmarkConfig(Config):
    """Options of this benchmark."""

    samples: int = option(50_000, "number of feature vectors of samples", low=4)
    reference: int = option(10_000, "number of feature vectors of the reference", low=4)
    dim: int = option(2048, "length of a feature vector", low=1)
    classes: int = option(1008, "number of logits for the Inception Score", low=1)
    device: str = option("cpu", "where to compute; the memory that is shown is the host's", choices=("cuda", "mps", "cpu"))
    json: str | None = option(None, "file to which the table is written as JSON (default: none)", metavar="FILE")


def peak_gib():
    """Highest resident memory of this process so far, GiB; Linux counts KiB, macOS bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


def main(argv=None):
    parser = Parser(BenchmarkConfig, __doc__)
    config = parser.parse(argv)
    with parser.report_errors():
        if config.json:
            check_output(config.json, "--json")
        run(config)


def run(config):
    rows = []

    def measure(title, work):
        start = time.perf_counter()
        result = work()
        rows.append({"step": title, "seconds": time.perf_counter() - start, "peak_gib": peak_gib()})
        print(f"{title:<44}{rows[-1]['seconds']:>10.1f} s{rows[-1]['peak_gib']:>10.2f} GiB", flush=True)
        return result

    generator = torch.Generator().manual_seed(0)
    samples, reference = (
        torch.randn(n, config.dim, generator=generator).to(config.device) for n in (config.samples, config.reference)
    )
    vectors = f"{config.samples} x {config.dim}"

    def stream(x):
        statistics = Statistics(config.dim, config.device)
        for batch in x.split(64):
            statistics.update(batch)
        return statistics.mu, statistics.sigma

    print(f"{'step':<44}{'time':>12}{'peak so far':>14}")
    measure("the vectors alone", lambda: None)
    moments = measure(f"mean and covariance of {vectors}", lambda: stream(samples))
    reference_moments = stream(reference)
    measure(f"Frechet distance, {config.dim} dimensions", lambda: frechet_distance(*reference_moments, *moments))
    measure(
        f"precision, recall: {vectors}, {config.reference}",
        lambda: precision_recall(reference, samples, progress=sys.stderr.isatty()),
    )
    logits = torch.randn(config.samples, config.classes, generator=generator)
    measure(f"Inception Score of {config.samples} x {config.classes}", lambda: inception_score(logits))
    if config.json:
        settings = {**config.flat(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        settings["machine"] = platform.processor() or platform.machine()
        Path(config.json).write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
