"""The paper's models beside our counts of GMACs and parameters. The exit status is 1 where one is out of tolerance.

    python -m studies.published

The paper's "Gflops" are GMACs: see tools/complexity.py. studies/scaling.py draws FID against them.
"""

import json
import sys
from collections import namedtuple
from dataclasses import dataclass

from tqdm import tqdm

from runtime.config import Config, option
from runtime.parser import Parser
from training.cost import build, forward_macs, trainable


@dataclass(frozen=True)
class PublishedConfig(Config):
    """Options of studies/published.py."""

    json: bool = option(False, "print JSON instead of a table")


# Models of the paper. gmacs: its "Gflops". parameters: trainable, in millions. fid: FID-50K after 400K steps, without
# guidance, where the paper gives it
Published = namedtuple("Published", "model block image_size gmacs parameters fid")

# DiT paper, Table 4 (the twelve models, and XL/2 at 512 px) and Figure 5 with section 3.2 (the block designs)
PUBLISHED = [
    Published("DiT-S/8", "adaln-zero", 256, 0.36, 33, 153.60),
    Published("DiT-S/4", "adaln-zero", 256, 1.41, 33, 100.41),
    Published("DiT-S/2", "adaln-zero", 256, 6.06, 33, 68.40),
    Published("DiT-B/8", "adaln-zero", 256, 1.42, 131, 122.74),
    Published("DiT-B/4", "adaln-zero", 256, 5.56, 130, 68.38),
    Published("DiT-B/2", "adaln-zero", 256, 23.01, 130, 43.47),
    Published("DiT-L/8", "adaln-zero", 256, 5.01, 459, 118.87),
    Published("DiT-L/4", "adaln-zero", 256, 19.70, 458, 45.64),
    Published("DiT-L/2", "adaln-zero", 256, 80.71, 458, 23.33),
    Published("DiT-XL/8", "adaln-zero", 256, 7.39, 676, 106.41),
    Published("DiT-XL/4", "adaln-zero", 256, 29.05, 675, 43.01),
    Published("DiT-XL/2", "adaln-zero", 256, 118.64, 675, 19.47),
    Published("DiT-XL/2", "adaln", 256, 118.56, 600, 25.21),
    Published("DiT-XL/2", "cross-attention", 256, 137.62, 598, 26.14),
    Published("DiT-XL/2", "in-context", 256, 119.37, 449, 35.24),
    Published("DiT-XL/2", "adaln-zero", 512, 524.60, 675, None),
]
TOLERANCE = {256: 0.03, 512: 0.07}  # GMACs by image size: the paper's own count is not described to the last product


def compare():
    """Our counts of the paper's models: a list of dicts, `within_tolerance` among the keys."""
    compared = []
    for paper in tqdm(PUBLISHED, desc="counting", unit="model", leave=False):
        model = build(paper.model, block=paper.block, input_size=paper.image_size // 8)
        gmacs, parameters = forward_macs(model) / 1e9, trainable(model)
        agrees = abs(gmacs - paper.gmacs) <= TOLERANCE[paper.image_size] and round(parameters / 1e6) == paper.parameters
        ours = {"counted_gmacs": gmacs, "counted_parameters": parameters, "within_tolerance": agrees}
        compared.append(paper._asdict() | ours)
    return compared


def print_table(compared):
    print(f"{'':<31}{'GMACs (the paper: Gflops)':>29}{'parameters (M)':>24}")
    print(f"{'model':<10}{'block':<17}{'px':>4}{'paper':>11}{'counted':>9}{'diff.':>9}{'paper':>12}{'counted':>12}")
    for row in compared:
        gmacs, parameters = row["counted_gmacs"], row["counted_parameters"] / 1e6
        print(
            f"{row['model']:<10}{row['block']:<17}{row['image_size']:>4}{row['gmacs']:>11.2f}{gmacs:>9.2f}"
            f"{gmacs - row['gmacs']:>+9.2f}{row['parameters']:>12}{parameters:>12.2f}"
            f"{'' if row['within_tolerance'] else '  OUT OF TOLERANCE'}"
        )


def main(argv=None):
    parser = Parser(PublishedConfig, __doc__)
    config = parser.parse(argv)
    with parser.report_errors():
        compared = compare()
        if config.json:
            print(json.dumps(compared, indent=2))
        else:
            print_table(compared)
    if not all(row["within_tolerance"] for row in compared):
        sys.exit(1)


if __name__ == "__main__":
    main()
