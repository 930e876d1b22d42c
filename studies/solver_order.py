"""How the error of each sampler falls with the number of steps, on data N(0.3, 0.5^2), whose exact denoiser is known.

python -m studies.solver_order        prints the errors and orders, writes assets/solver_order.png
"""

from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from diffusion import sample
from diffusion.registry import SAMPLERS
from runtime.config import Config, option
from runtime.parser import Parser
from studies import gaussian
from studies.plots import finish, save

DETERMINISTIC = [name for name, sampler in SAMPLERS.items() if sampler.is_deterministic() and not sampler.flow]
FITTED = [20, 28, 40, 56, 80]
NUMBERS = [*FITTED, 112, 160, 224, 320, 448, 640, 999]
STYLES = dict(zip(DETERMINISTIC, ("k-", "C0.-", "C2.-", "C3.-", "C1.--"), strict=True))


def plot_errors(axes, x_T):
    """RMS errors at t = 250, where the order shows, and of x_0, where the last step's error adds to it."""
    print(f"{'sampler':14} {'order at t=250':>14}   x_0 after " + " ".join(f"{n:>8}" for n in NUMBERS) + "  steps")
    bar = tqdm(total=len(DETERMINISTIC) * len(NUMBERS), leave=False)
    for sampler in DETERMINISTIC:
        errors = {250: [], None: []}
        for n in NUMBERS:
            for t_end, row in errors.items():
                row.append(gaussian.error_at(sampler, n, t_end, x_T))
            bar.update()
        order = gaussian.fitted_order(FITTED, errors[250][: len(FITTED)])
        bar.write(f"{sampler:14} {order:14.2f}   {'':9} " + " ".join(f"{error:8.1e}" for error in errors[None]))
        for axis, t_end in zip(axes, errors, strict=True):
            axis.loglog(NUMBERS, errors[t_end], STYLES[sampler], label=f"{sampler}: order {order:.2f}" if t_end else None)
            axis.set_xticks([20, 40, 80, 160, 320, 640], [20, 40, 80, 160, 320, 640])
            axis.minorticks_off()
    bar.close()
    sigma = (1 / gaussian.ALPHA_BAR[0] - 1) ** 0.5
    z = (gaussian.exact_trajectory(x_T, 999, None) - gaussian.MU) / gaussian.S
    floor = sigma**2 / (2 * gaussian.S) * z.square().mean().sqrt().item()
    print(f"the floor of x_0, one Euler step from sigma_0 = {sigma:.4f}: {floor:.1e}")
    axes[0].axvspan(20, 80, color="0.93", zorder=0)
    finish(axes[0], "x at t = 250", "steps", "RMS error against the exact trajectory")
    axes[0].set_ylim(1e-8, 0.1)
    axes[1].axhline(floor, color="black", linestyle=":", linewidth=1, label="floor: last step from the lowest noise level")
    finish(axes[1], "x$_0$", "steps")
    axes[1].set_ylim(1e-6, 0.2)


def plot_ddpm(axis, num_steps, samples):
    """Mean and standard deviation of DDPM's x, drawn and by their recursion."""
    torch.manual_seed(0)
    x_T = torch.randn(samples, 1, 1, 1, dtype=torch.float64)
    for fraction, color, name in ((-1.0, "tab:blue", "posterior"), (1.0, "tab:red", "beta")):
        mean, variance = gaussian.ddpm_recursion(num_steps, fraction).T
        outs = sample("ddpm", lambda x, t, fraction=fraction: gaussian.denoiser(x, t, fraction), x_T, num_steps)
        drawn = np.array([(x_T.mean(), x_T.std())] + [(out["sample"].mean(), out["sample"].std()) for out in outs])
        ends = zip(("mean", "std"), (mean[-1], variance[-1] ** 0.5), drawn[-1], (gaussian.MU, gaussian.S), strict=True)
        for moment, exact, found, of_data in ends:
            print(f"ddpm, variance {name}, {moment} of x_0: {exact:.4f}, drawn {found:.4f}; of the data {of_data}")
        axis.plot(variance**0.5, color=color, linewidth=1, label=f"standard deviation, {name} variance")
        axis.plot(mean, color=color, linewidth=1, linestyle="--", label=f"mean, {name} variance")
        axis.plot(drawn, ".", color=color, markersize=4)
    finish(axis, "DDPM: closed form, and drawn (dots)", "step")


@dataclass(frozen=True)
class OrderConfig(Config):
    """Options of solver_order.py."""

    out: str = option("assets/solver_order.png", "the picture to write", metavar="FILE", path="output")


def main(argv=None):
    parser = Parser(OrderConfig, __doc__)
    config = parser.parse(argv)
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    axes = figure.subplots(1, 3)
    with parser.report_errors():
        plot_errors(axes[:2], torch.randn(256, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
        plot_ddpm(axes[2], num_steps=25, samples=100_000)
        save(figure, config.out, dpi=90)


if __name__ == "__main__":
    main()
