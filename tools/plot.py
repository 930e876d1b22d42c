"""Draw the curves of one or more training runs: loss and its parts, gradient norm, validation loss, FID.

    python -m tools.plot results/000-DiT-XL-2 --output curves.png
    python -m tools.plot results/a results/b --x hours --smooth 20

The numbers are those of metrics.jsonl in the run folders. The panels for which no run has numbers are left out.
"""

import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from runtime.config import Config, option
from runtime.errors import UserError
from runtime.parser import Parser

X_LABELS = {"steps": "steps", "images": "images seen", "hours": "hours of training"}
PANELS = {
    "loss": "Loss",
    "mse": "Loss, part mse",
    "vb": "Loss, part vb",
    "grad_norm": "Gradient norm",
    "val_loss": "Validation loss",
    "fid": "FID",
}
SMOOTHED = ("loss", "mse", "vb", "grad_norm")


@dataclass(frozen=True)
class PlotConfig(Config):
    """Options of plot.py."""

    runs: tuple[str, ...] = option(help="run folders, which hold metrics.jsonl", positional=True, metavar="RUN")
    output: str = option("curves.png", "file of the picture; its ending chooses the format, such as .png, .pdf or .svg",
        metavar="FILE")  # fmt: skip
    x: str = option("steps", "what the curves are drawn against", choices=tuple(X_LABELS))
    smooth: int | None = option(None, "draw training curves as the mean over this many rows of metrics.jsonl; 1 draws the "
        "rows as they are (default: a fiftieth of the rows)", low=1, metavar="ROWS")  # fmt: skip


def read_rows(run):
    """The rows of a run's metrics.jsonl that have a step. A row that a kill cut off is left out. Raises UserError."""
    from runtime.files import check_regular

    path, rows = Path(run) / "metrics.jsonl", []
    if not Path(run).is_dir():
        raise UserError(f"{run}: no such folder; name run folders of train.py, such as results/000-DiT-XL-2")
    try:
        if os.path.lexists(path):
            check_regular(path)
        text = path.read_text(errors="replace") if path.exists() else ""
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and number(row.get("step")) is not None:
            rows.append(row)
    return rows


def number(value):
    """The value if it is a finite number, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    return value if is_number and math.isfinite(value) else None


def column(rows, name):
    """Steps and values of a column, in the order of steps. A step that occurs twice has its last value."""
    found = {row["step"]: row[name] for row in rows if number(row.get(name)) is not None}
    return sorted(found), [found[step] for step in sorted(found)]


def positions(run, rows, steps, x):
    """The steps in units of `x`. Raises UserError where the run does not record what that needs."""
    import numpy as np

    from runtime.files import read_json

    if x == "images":
        batch_size = number((read_json(Path(run) / "options.json") or {}).get("global_batch_size"))
        if batch_size is None:
            raise UserError(f"--x images: {run}/options.json has no global_batch_size; choose --x steps")
        return np.multiply(steps, float(batch_size))
    if x == "hours":
        known, seconds = column(rows, "training_seconds")
        if not known:
            raise UserError(f"--x hours: {run}/metrics.jsonl has no training_seconds; choose --x steps")
        return np.interp(steps, [0, *known], [0, *seconds]) / 3600  # rows of FID have no time of their own
    return np.array(steps, float)


def moving_mean(values, window):
    """The mean of the `window` values around each one, of fewer at both ends."""
    import numpy as np

    sums, middle = np.cumsum([0.0, *values]), np.arange(len(values))
    first, end = np.maximum(middle - (window - 1) // 2, 0), np.minimum(middle + window // 2 + 1, len(values))
    return (sums[end] - sums[first]) / (end - first)


def draw(runs, config):
    """The figure of {run: rows}. Raises UserError where no run has a column to draw."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

    panels = {name: title for name, title in PANELS.items() if any(column(rows, name)[0] for rows in runs.values())}
    if not panels:
        raise UserError(f"{', '.join(runs)}: metrics.jsonl has none of the columns {', '.join(PANELS)}")
    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(4.6 * across, 3.2 * down + 0.5), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharex=True).flat
    names = [Path(run).name for run in runs]
    labels = dict(zip(runs, names if len({*names}) == len(names) else runs, strict=True))

    for axes, (name, title) in zip(grid, panels.items(), strict=False):
        ranges = sorted({key for rows in runs.values() for row in rows for key in row if key.startswith(f"{name}_t")})
        all_values, ends = [], {}  # ends: where each range of t has its furthest value
        for i, (run, rows) in enumerate(runs.items()):
            for part in [name, *ranges]:
                steps, values = column(rows, part)
                if not steps:
                    continue
                all_values += values
                x, colour, line = positions(run, rows, steps, config.x), f"C{i % 10}", {"linewidth": 1.5}
                if name in SMOOTHED:
                    window = config.smooth or max(1, len(values) // 50)
                    if window > 1:
                        axes.plot(x, values, color=colour, alpha=0.2, linewidth=0.8)
                    values = moving_mean(values, window)
                else:
                    line["marker"] = "o" if len(values) < 30 else None
                if part != name:
                    line |= {"linewidth": 0.8, "linestyle": (0, (1 + 2 * ranges.index(part), 1.5)), "marker": None}
                axes.plot(x, values, color=colour, markersize=3, **line)
                if part != name:
                    ends[part] = max(ends.get(part, (-1,)), (x[-1], values[-1], colour))
        for part, (*end, colour) in ends.items():
            axes.annotate(part.removeprefix(f"{name}_"), (1.01, end[1]), xycoords=axes.get_yaxis_transform(), color=colour,
                fontsize=8, va="center")  # fmt: skip
        if name != "fid" and min(all_values) > 0 and max(all_values) > 3 * min(all_values):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        if config.x != "hours":
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 400k
        axes.tick_params(labelsize=8, labelbottom=True)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(X_LABELS[config.x], fontsize=9)
        axes.grid(alpha=0.3)
    for axes in grid[len(panels) :]:
        axes.remove()
    handles = [figure.axes[0].plot([], [], color=f"C{i % 10}", label=label)[0] for i, label in enumerate(labels.values())]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(4, len(runs)), frameon=False)
    return figure


def plot(config):
    """Write the picture. Raises UserError."""
    from runtime.files import check_output, replace_file, write_errors

    check_output(config.output, "--output")
    runs = {}
    for run in config.runs:
        if rows := read_rows(run):
            runs[run] = rows
        else:
            print(f"{run}: left out, metrics.jsonl has no rows yet", file=sys.stderr)
    if not runs:
        names = ", ".join(config.runs)
        raise UserError(f"{names}: no rows in metrics.jsonl; they come every --log-every steps of train.py")
    figure, ending = draw(runs, config), Path(config.output).suffix[1:].lower()
    formats = sorted(figure.canvas.get_supported_filetypes())
    if ending not in formats:
        raise UserError(f"--output {config.output}: its ending is none of {', '.join(formats)}")
    with write_errors(f"--output {config.output}"):
        replace_file(config.output, lambda file: figure.savefig(file, format=ending, dpi=130))
    print(f"written to {config.output}")


def main(argv=None):
    parser = Parser(PlotConfig, __doc__)
    config = parser.parse(argv)
    with parser.report_errors():
        plot(config)


if __name__ == "__main__":
    main()
