"""Draw FID-50K against the GMACs of a forward pass: the paper's models, and results of your own.

    python -m studies.scaling scaling.png
    python -m studies.scaling scaling.png --results samples/*.metrics.json

Prints the correlation of log GMACs and FID. The GMACs of the results are counted as complexity.py counts them.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from tqdm import tqdm

from checkpoint.config import ModelOptions
from data.autoencoder import latent_sides
from runtime.config import Config, option
from runtime.errors import UserError
from runtime.files import reason
from runtime.parser import Parser
from studies.plots import finish, save
from studies.published import PUBLISHED
from training.cost import build, forward_macs

SCALING = [row for row in PUBLISHED if row.block == "adaln-zero" and row.image_size == 256]  # the twelve models
DESIGNS = [row for row in PUBLISHED if row.model == "DiT-XL/2" and row.image_size == 256]
COLORS = {"S": "#56b4e9", "B": "#009e73", "L": "#e69f00", "XL": "#cc3311"}  # of the sizes


@dataclass(frozen=True)
class ScalingConfig(Config):
    """Options of studies/scaling.py."""

    picture: str = option(help="file of the picture", positional=True, metavar="FILE.png", path="output")
    results: tuple[str, ...] | None = option(None, "files of more points: reports of evaluate.py, or JSON objects "
        "or lists of objects with model and fid, and, where they differ from the default, block, hidden_size, depth, "
        "num_heads, patch_size, mlp_ratio, image_size, label (default: none)", metavar="FILE.json")  # fmt: skip
    json: bool = option(False, "print JSON")

    def check(self):
        if not self.picture.endswith(".png"):
            raise UserError(f"{self.picture}: must be a name ending in .png")


def read_results(path):
    """Points of a JSON file: a report of evaluate.py, whose model is read from the name that sample_ddp.py gave the
    samples, or an object or a list of objects with "model" and "fid" (and the fields of ModelOptions, "image_size",
    "label"). Returns a list of {"label", "gmacs", "fid"}. Raises UserError."""
    try:
        entries = json.loads(Path(path).read_bytes())
        return [result_point(entry) for entry in (entries if isinstance(entries, list) else [entries])]
    except OSError as error:
        raise UserError(f"{path}: {reason(error)}") from None
    except (ValueError, RuntimeError) as error:  # UserError is one; RuntimeError: the sizes overflow, or nested too deeply
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from None


def result_point(entry):
    if not isinstance(entry, dict) or type(entry.get("fid")) not in (int, float) or not math.isfinite(entry["fid"]):
        raise UserError('each result must be an object with a number "fid"')
    if "model" not in entry:
        name = Path(str(entry["samples"].get("path"))).name if isinstance(entry.get("samples"), dict) else ""
        match = re.match(r"DiT-(XL|L|B|S)-([248])-.*-size-(\d+)-", name)
        if not match:
            raise UserError(f'the samples\' name {name!r} does not tell their model; add "model": "DiT-..."')
        entry = {"model": f"DiT-{match[1]}/{match[2]}", "image_size": int(match[3])} | entry
    options = ModelOptions.from_flat(entry)
    overrides = {name: value for name, value in options.overrides().items() if name in entry}
    model = build(options.model, input_size=latent_sides(options.image_size, 8), **overrides)
    differences = [f"{name.replace('_', ' ')} {value}".removeprefix("block ") for name, value in overrides.items()]
    differences += [f"{options.image_size} px"] if options.image_size != 256 else []
    label = str(entry.get("label", ", ".join([options.model, *differences])))
    return {"label": label, "gmacs": forward_macs(model) / 1e9, "fid": float(entry["fid"])}


def correlation(points):
    """Pearson's, of log GMACs and FID. points: pairs, at least three (two always lie on a line)."""
    gmacs, fids = np.array(points).T
    return float(np.corrcoef(np.log(gmacs), fids)[0, 1])


def draw(path, results, title):
    figure = Figure(figsize=(9.6, 4.8), layout="constrained")
    scaling, designs = figure.subplots(1, 2, width_ratios=[2.2, 1])
    markers = {"8": "o", "4": "s", "2": "^"}
    outline = {"edgecolors": "white", "linewidths": 0.8}
    for size, color in COLORS.items():
        rows = [row for row in SCALING if row.model.startswith(f"DiT-{size}/")]
        gmacs, fids = [row.gmacs for row in rows], [row.fid for row in rows]
        scaling.plot(gmacs, fids, color=color, lw=1.2, zorder=1, label=f"DiT-{size}")
        for row in rows:
            scaling.scatter(row.gmacs, row.fid, 58, color=color, marker=markers[row.model[-1]], zorder=2, **outline)
    for patch, marker in markers.items():
        scaling.scatter([], [], 46, color="#666666", marker=marker, label=f"patch size {patch}")
    middle = np.median([row.gmacs for row in SCALING])
    for n, point in enumerate(results):
        at, right = (point["gmacs"], point["fid"]), point["gmacs"] > middle
        scaling.scatter(*at, 80, color="black", marker="*", zorder=3, label="" if n else "your results")
        where = {"xytext": (-7 if right else 7, 3), "textcoords": "offset points", "ha": "right" if right else "left"}
        halo = [withStroke(linewidth=3, foreground="white")]
        scaling.annotate(point["label"], at, **where, fontsize=8, path_effects=halo)
    finish(scaling, title, "GMACs of a forward pass (the paper's Gflops)", "FID-50K", log="x")

    for row in DESIGNS:
        at = row.gmacs, row.fid
        designs.scatter(*at, 58, color=COLORS["XL"], marker="^", **outline)
        designs.annotate(row.block, at, fontsize=9, xytext=(0, 8), textcoords="offset points", ha="center")
    designs.set(xlim=(110, 145), ylim=(15, 40))
    finish(designs, "Block designs, DiT-XL/2", "GMACs", legend=None)
    save(figure, path, dpi=120)


def plot(path, files):
    """Draw the picture. Returns what was drawn, as a dict. Raises UserError."""
    with tqdm(files, desc="Counting", unit="file", leave=False) as progress:
        results = [point for file in progress for point in read_results(file)]
    paper = correlation([(row.gmacs, row.fid) for row in SCALING])
    report = {"plot": path, "correlation_paper": paper, "results": results}
    if len(results) >= 3 and all(len({point[key] for point in results}) > 1 for key in ("gmacs", "fid")):
        report["correlation_results"] = correlation([(point["gmacs"], point["fid"]) for point in results])
    draw(path, results, f"The paper's models at 400K steps: correlation {paper:.2f}")
    return report


def main(argv=None):
    parser = Parser(ScalingConfig, __doc__)
    config = parser.parse(argv)
    with parser.report_errors():
        report = plot(config.picture, config.results or ())
    if config.json:
        print(json.dumps(report, indent=2))
        return
    print(f"written to {config.picture}; correlation of log GMACs and FID-50K:")
    print(f"  the paper's {len(SCALING)} models: {report['correlation_paper']:.2f}")
    if "correlation_results" in report:
        print(f"  your {len(report['results'])} results: {report['correlation_results']:.2f}")


if __name__ == "__main__":
    main()
