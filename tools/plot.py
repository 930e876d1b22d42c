"""Draw the curves of one or more training runs: loss and its parts, gradient norm, validation loss, FID. Or show how the
samples of a run change: an animation of the grids that train.py --sample-every has drawn.

    python -m tools.plot results/000-DiT-XL-2 --output curves.png
    python -m tools.plot results/a results/b --x hours --smooth 20
    python -m tools.plot results/000-DiT-XL-2 --animate samples.gif

The numbers are those of metrics.jsonl in the run folders. The panels for which no run has numbers are left out."""

import runtime  # noqa: F401 -- first: from here on Ctrl-C prints a line  # isort: skip
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from runtime.config import Config, option
from runtime.errors import UserError
from runtime.files import check_output, check_regular, read_json, reason, replace_file, write_errors
from runtime.parser import Parser

X_LABELS = {"steps": "steps", "images": "images seen", "hours": "hours of training"}
SMOOTHED = {"loss": "Loss", "mse": "Loss, part mse", "vb": "Loss, part vb", "grad_norm": "Gradient norm"}
PANELS = {**SMOOTHED, "val_loss": "Validation loss", "fid": "FID"}


@dataclass(frozen=True)
class PlotConfig(Config):
    """Options of tools/plot.py."""

    runs: tuple[str, ...] = option(help="run folders of train.py", positional=True, path="folder", metavar="RUN")
    output: str | None = option(None, "file of the figure; its ending chooses the format, such as .png, .pdf or .svg "
        "(default: curves.png, or none with --animate)", metavar="FILE")  # fmt: skip
    x: str = option("steps", "what the curves are drawn against", choices=tuple(X_LABELS))
    smooth: int | None = option(None, "draw training curves as the mean over this many rows of metrics.jsonl; 1 draws the "
        "rows as they are (default: a fiftieth of the rows)", low=1, metavar="ROWS")  # fmt: skip
    animate: str | None = option(None, "write an animation of the run's grids of samples into this file (default: none)",
        path="output", metavar="FILE.gif")  # fmt: skip

    def check(self):
        if self.animate and Path(self.animate).suffix.lower() != ".gif":
            raise UserError(f"--animate {self.animate}", "name a .gif file")
        if self.animate and len(self.runs) > 1:
            raise UserError("--animate", f"shows one run, these are {len(self.runs)}", "name one of them")


def read_rows(run):
    """The rows of a run's metrics.jsonl that have a step. A row that a kill cut off is left out. Raises UserError."""
    path, rows = Path(run) / "metrics.jsonl", []
    try:
        check_regular(path)
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(path, f"cannot be read ({reason(error)})") from None
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and number(row.get("step")) is not None:
            rows.append(row)
    return rows


def number(value):
    """The value if it is a number that is finite and below 1e300, else None."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 else None


def column(rows, name):
    """Steps and values of a column, in the order of steps. A step that occurs twice has its last value."""
    found = {row["step"]: row[name] for row in rows if number(row.get(name)) is not None}
    return sorted(found), [found[step] for step in sorted(found)]


def positions(run, rows, steps, x):
    """The steps in units of `x`. Raises UserError where the run does not record what that needs."""
    import numpy as np

    if x == "images":
        batch_size = number((read_json(Path(run) / "options.json") or {}).get("global_batch_size"))
        if batch_size is None:
            raise UserError("--x images", f"{run}/options.json has no global_batch_size", "choose --x steps")
        return np.multiply(steps, float(batch_size))
    if x == "hours":
        known, seconds = column(rows, "training_seconds")
        if not known:
            raise UserError("--x hours", f"{run}/metrics.jsonl has no training_seconds", "choose --x steps")
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
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator

    names = sorted({name for rows in runs.values() for row in rows for name in row})
    # of --eval-features other than inception, beside the number of images
    others = {name: f"FD of {name[3:]}" for name in names if name.startswith("fd_") and f"{name}_samples" in names}
    titles = PANELS | others
    panels = [name for name in titles if any(column(rows, name)[0] for rows in runs.values())]
    if not panels:
        raise UserError(", ".join(runs), f"metrics.jsonl has none of the columns {', '.join(PANELS)}")
    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(4.6 * across, 3.2 * down + 0.5), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharex=True).flat
    for axes, name in zip(grid, panels, strict=False):
        for i, (run, rows) in enumerate(runs.items()):
            ranges = sorted({key for row in rows for key in row if key.startswith(f"{name}_t")})  # of timesteps
            for n, part in enumerate([name] if name in others else [name, *ranges]):
                steps, values = column(rows, part)
                if not steps:
                    continue
                x, color = positions(run, rows, steps, config.x), f"C{i % 10}"
                line = {"linewidth": 0.8, "linestyle": (0, (2 * n - 1, 1.5))} if n else {"linewidth": 1.5}
                window = config.smooth or max(1, len(values) // 50)
                if name in SMOOTHED and window > 1:
                    axes.plot(x, values, color=color, alpha=0.2, linewidth=0.8)
                    values = moving_mean(values, window)
                marker = "o" if name not in SMOOTHED and not n and len(values) < 30 else None
                axes.plot(x, values, color=color, marker=marker, markersize=3, **line)
                if n and not i:
                    place = {"xycoords": axes.get_yaxis_transform(), "fontsize": 8, "va": "center"}
                    axes.annotate(part.removeprefix(f"{name}_"), (1.01, values[-1]), **place)
        drawn = np.concatenate([line.get_ydata() for line in axes.lines])
        if name not in {"fid", *others} and drawn.min() > 0 and drawn.max() > 3 * drawn.min():
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        if config.x != "hours":
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 400k
        axes.tick_params(labelsize=8, labelbottom=True)
        axes.set_title(titles[name], fontsize=10)
        axes.set_xlabel(X_LABELS[config.x], fontsize=9)
        axes.grid(alpha=0.3)
    for axes in grid[len(panels) :]:
        axes.remove()
    names = [Path(run).name for run in runs]
    labels = names if len({*names}) == len(names) else runs
    handles = [figure.axes[0].plot([], [], color=f"C{i % 10}", label=label)[0] for i, label in enumerate(labels)]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(4, len(runs)), frameon=False)
    return figure


def plot(config):
    """Write the figure, or the animation, or both. Raises UserError."""
    if config.animate:
        from training.grids import write_animation  # PyTorch, which it imports, takes seconds

        if not (count := write_animation(config.runs[0], config.animate)):
            raise UserError(config.runs[0], "has no grids in samples/", "train with --sample-every")
        print(f"{count} grids in {config.animate}")
        if not config.output:
            return
    output = config.output or "curves.png"
    check_output(output, "--output")
    runs = {run: read_rows(run) for run in config.runs}
    for run in [run for run, rows in runs.items() if not rows]:
        print(f"{run}: left out, metrics.jsonl has no rows yet", file=sys.stderr)
        del runs[run]
    if not runs:
        names = ", ".join(config.runs)
        raise UserError(names, "no rows in metrics.jsonl", "they come every --log-every steps of train.py")
    figure, ending = draw(runs, config), Path(output).suffix[1:].lower()
    formats = sorted(figure.canvas.get_supported_filetypes())
    if ending not in formats:
        raise UserError(f"--output {output}", f"its ending is none of {', '.join(formats)}")
    with write_errors(f"--output {output}"):
        replace_file(output, lambda file: figure.savefig(file, format=ending, dpi=130))
    print(f"written to {output}")


def main(argv=None):
    with Parser(PlotConfig, __doc__).options(argv) as config:
        plot(config)


if __name__ == "__main__":
    main()
