"""The samplers and the guidance schedules by name. Importing this module is fast: it imports neither torch nor diffusers,
so that a command can check its options and print its help at once."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

# How the timesteps of diffusers' solvers are chosen: Lin et al. 2024, Table 2
SPACINGS = ("leading", "linspace", "trailing")
DEFAULT_SPACING = "linspace"  # starts at the last timestep, where x_T is nearest to pure noise


@dataclass(frozen=True)
class Sampler:
    """A sampler of `diffusion.sample`.

    name: its key in `SAMPLERS`. help: a phrase for help texts. options: which of "eta" and "spacing" it takes. adds_noise:
    every step adds noise, whatever eta is. stages: evaluations of the model in each step but the last, which takes one.
    A sampler of our own has `step`, which gives, for a `GaussianDiffusion` and eta, the method that makes one step, and
    `respacings`, patterns for `space_timesteps` of which the first possible one is used. A sampler of diffusers has
    `scheduler`, the name of the class, and `settings`, the class's arguments. A sampler of flow models alone has `flow`, a
    method of `flow.flow_steps`; its denoiser predicts the velocity."""

    name: str
    help: str
    options: tuple[str, ...] = ()
    adds_noise: bool = False
    stages: int = 1
    step: Callable | None = None
    respacings: tuple[str, ...] = ("{}",)
    scheduler: str | None = None
    settings: Mapping = field(default_factory=dict)
    flow: str | None = None

    def evaluations(self, num_steps):
        """How often the model is evaluated for `num_steps` steps."""
        return self.stages * (num_steps - 1) + 1

    def is_deterministic(self, eta=0.0):
        """Whether x_0 depends on x_T alone."""
        return not self.adds_noise and not eta


SAMPLERS = {
    sampler.name: sampler
    for sampler in (
        Sampler(
            "ddpm",
            "ancestral sampling, the sampler of the paper (Ho et al. 2020)",
            adds_noise=True,
            step=lambda process, eta: process.p_sample,
        ),
        Sampler(
            "ddim",
            "deterministic unless eta is above 0 (Song et al. 2021)",
            options=("eta",),
            step=lambda process, eta: partial(process.ddim_sample, eta=eta),
            respacings=("ddim{}", "{}"),  # an integer stride where one gives exactly this number of steps
        ),
        # The settings are those that the papers advise for guided sampling: order 2 on the predicted x_0, which is "2M" of
        # DPM-Solver++, and UniPC with B_2(h) = e^h - 1. Thresholding is for pixels, whose range is known.
        Sampler(
            "dpm-solver++",
            "multistep solver of order 2 (Lu et al. 2022)",
            options=("spacing",),
            scheduler="DPMSolverMultistepScheduler",
            settings={"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "thresholding": False},
        ),
        Sampler(
            "unipc",
            "predictor and corrector of order 2 (Zhao et al. 2023)",
            options=("spacing",),
            scheduler="UniPCMultistepScheduler",
            settings={"predict_x0": True, "solver_order": 2, "solver_type": "bh2", "thresholding": False},
        ),
        Sampler(
            "heun",
            "order 2 with two evaluations per step (Karras et al. 2022, algorithm 1)",
            options=("spacing",),
            stages=2,
            scheduler="HeunDiscreteScheduler",
        ),
        Sampler(
            "euler",
            "order 1 with one evaluation per step (Karras et al. 2022)",
            options=("spacing",),
            scheduler="EulerDiscreteScheduler",
        ),
        Sampler("flow-euler", "for flow models: order 1, equal steps in the flow's time", flow="euler"),
        Sampler("flow-heun", "for flow models: order 2 with two evaluations per step", stages=2, flow="heun"),
        Sampler("flow-sde", "for flow models: Euler-Maruyama (Ma et al. 2024)", adds_noise=True, flow="sde"),
    )
}

# How the guidance scale grows during sampling: each function maps s = 1 - t / num_timesteps, which is 0 at pure noise and 1
# at the image, to a share in [0, 1]; the scale is 1 + share * (cfg_scale - 1).
GUIDANCE_SCHEDULES = {
    "constant": lambda s: 1.0,
    "linear": lambda s: s,  # Chang et al. 2023 (Muse)
    "power-cosine": lambda s: (1 - math.cos(math.pi * s**4)) / 2,  # Gao et al. 2023 (MDT), with the power 4
}


def check_options(name, eta=0.0, spacing=None):
    """The sampler of this name. Raises ValueError for an unknown name, and for an option that the sampler does not take.
    The number of steps is not checked: see `diffusion.check_sampler`."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler {name!r} is not one of {', '.join(SAMPLERS)}")
    sampler = SAMPLERS[name]
    for option, given in (("eta", eta != 0), ("spacing", spacing is not None)):
        if given and option not in sampler.options:
            takers = ", ".join(other.name for other in SAMPLERS.values() if option in other.options)
            raise ValueError(f"{option} is an option of {takers}, not of {name}")
    if spacing is not None and spacing not in SPACINGS:
        raise ValueError(f"spacing {spacing!r} is not one of {', '.join(SPACINGS)}")
    return sampler
