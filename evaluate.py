"""Measure samples against a reference: FID, sFID, Inception Score, precision and recall, as in the paper's tables, and
newer distances, between the features of one network or several.

    python evaluate.py VIRTUAL_imagenet256_labeled.npz samples/NAME.npz
    python evaluate.py REFERENCE SAMPLES --features inception efficientnet-lite0
    torchrun --nproc_per_node=gpu evaluate.py REFERENCE SAMPLES     # all GPUs share the work

Each input is an .npz file (arr_0: uint8 images (N, H, W, 3); or mu, sigma, mu_s, sigma_s; or both) or a folder of images.
The numbers, and what they were made from, are written to SAMPLES.metrics.json."""

import runtime  # noqa: F401 -- first: from here on Ctrl-C prints a line  # isort: skip
import sys

from evaluation.config import EvaluateConfig
from runtime import files
from runtime.parser import Parser


def main(argv=None):
    with Parser(EvaluateConfig, __doc__).processes(argv) as (config, context):
        from evaluation.comparison import compare, table

        report, output = compare(config, context)
        if report:
            for line in report["warnings"]:
                print(f"warning: {line}", file=sys.stderr)
            print(table(report))
            with files.write_errors(output):
                files.write_json(output, report)
            print(f"written to {output}")


if __name__ == "__main__":
    main()
