"""What the pictures of the studies share."""

from matplotlib.ticker import LogLocator, NullFormatter

from runtime.files import replace_file, write_errors


def save(figure, path, dpi=110):
    """Write a figure as a .png file. Raises UserError."""
    with write_errors(path):
        replace_file(path, lambda file: figure.savefig(file, format="png", dpi=dpi))


def finish(axes, title="", xlabel="", ylabel="", legend="best", log="", floor=None):
    """Labels, grid and legend. log: the names of the logarithmic axes. floor: of the distance, that of real images."""
    if floor is not None:
        axes.axhline(floor, color="grey", linestyle=":", linewidth=1)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    for name in log:
        axes.set(**{f"{name}scale": "log"})
        axis = getattr(axes, f"{name}axis")
        low, high = axis.get_view_interval()
        subs = (1, 2, 5) if high < 300 * low else (1,)
        axis.set(major_locator=LogLocator(subs=subs), major_formatter="{x:g}", minor_formatter=NullFormatter())
    axes.grid(color="#e6e6e6", linewidth=0.7, which="both")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(frameon=False, fontsize=8, loc=legend)
