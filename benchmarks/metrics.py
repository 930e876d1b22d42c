"""Time and memory of the metrics on random feature vectors, without the network.

OMP_NUM_THREADS=2 python benchmarks/metrics.py --json metrics.json
"""

import json
import platform
import resource
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # before this file's own folder: it has the module's name
from cli import options
from evaluation.metrics import Statistics, frechet_distance, inception_score, precision_recall


def parse_args():
    parser, vectors = options.Parser(__doc__.split("\n")[0]), options.number(int, low=4)
    parser.add_argument("--samples", type=vectors, default=50_000, help="feature vectors of samples")
    parser.add_argument("--reference", type=vectors, default=10_000, help="feature vectors of the reference")
    parser.add_argument("--dim", type=options.positive, default=2048, help="length of a vector")
    parser.add_argument("--classes", type=options.positive, default=1008, help="logits of the Inception Score")
    parser.add_argument("--device", default="cpu", help="where to compute; memory is that of the host")
    parser.add_argument("--json", metavar="FILE", help="write the table here too")
    return parser.parse_args()


def peak_gib():
    """Highest resident memory of this process so far, GiB; Linux counts KiB, macOS bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


def main():
    args = parse_args()
    rows = []

    def measure(title, work):
        start = time.perf_counter()
        result = work()
        rows.append({"step": title, "seconds": time.perf_counter() - start, "peak_gib": peak_gib()})
        print(f"{title:<44}{rows[-1]['seconds']:>10.1f} s{rows[-1]['peak_gib']:>10.2f} GiB", flush=True)
        return result

    generator = torch.Generator().manual_seed(0)
    samples, reference = (
        torch.randn(n, args.dim, generator=generator).to(args.device) for n in (args.samples, args.reference)
    )
    vectors = f"{args.samples} x {args.dim}"

    def stream(x):
        statistics = Statistics(args.dim, args.device)
        for batch in x.split(64):
            statistics.update(batch)
        return statistics.mu, statistics.sigma

    print(f"{'step':<44}{'time':>12}{'peak so far':>14}")
    measure("the vectors alone", lambda: None)
    moments = measure(f"mean and covariance of {vectors}", lambda: stream(samples))
    reference_moments = stream(reference)
    measure(f"Frechet distance, {args.dim} dimensions", lambda: frechet_distance(*reference_moments, *moments))
    measure(
        f"precision, recall: {vectors}, {args.reference}",
        lambda: precision_recall(reference, samples, progress=sys.stderr.isatty()),
    )
    logits = torch.randn(args.samples, args.classes, generator=generator)
    measure(f"Inception Score of {args.samples} x {args.classes}", lambda: inception_score(logits))
    if args.json:
        settings = {**vars(args), "threads": torch.get_num_threads(), "torch": torch.__version__}
        settings["machine"] = platform.processor() or platform.machine()
        Path(args.json).write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
