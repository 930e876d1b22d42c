"""The samplers, the objectives and the guidance schedules by name: one line adds one. Importing this module is fast: it
imports neither torch nor diffusers, so that a command can check its options and print its help at once."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pkgutil import resolve_name

# How the timesteps of diffusers' solvers are chosen: Lin et al. 2024, Table 2
SPACINGS = ("leading", "linspace", "trailing")
DEFAULT_SPACING = "linspace"  # starts at the last timestep, where x_T is nearest to pure noise


@dataclass(frozen=True)
class Sampler:
    """A sampler of `diffusion.sample`.

    name: its key in `SAMPLERS`. help: a phrase for help texts. function: of (process, denoise, x, steps, noise), see
    `diffusion.samplers`; or its place, as text, so that it is imported on use. options: which of "eta", an argument of the
    function, and "spacing" it takes. adds_noise: every step adds noise, whatever eta is. stages: evaluations of the model
    in each step but the last, which takes one. flow: for models of flows alone, its denoiser predicts the velocity.
    average: for models of a flow's average velocity alone, its denoiser takes r too. respacings: patterns for
    `space_timesteps`, of which the first possible one is used. scheduler, settings: of a solver of diffusers, the name of
    its class and the class's arguments."""

    name: str
    help: str
    function: Callable | str
    options: tuple[str, ...] = ()
    adds_noise: bool = False
    stages: int = 1
    flow: bool = False
    average: bool = False
    respacings: tuple[str, ...] = ("{}",)
    scheduler: str | None = None
    settings: Mapping = field(default_factory=dict)

    def evaluations(self, num_steps):
        """How often the model is evaluated for `num_steps` steps."""
        return self.stages * (num_steps - 1) + 1

    def is_deterministic(self, eta=0.0):
        """Whether x_0 depends on x_T alone."""
        return not self.adds_noise and not eta


def solver(name, help, scheduler, stages=1, **settings):
    """A Sampler of diffusers."""
    function = "diffusion.samplers:solver"
    return Sampler(name, help, function, ("spacing",), stages=stages, scheduler=scheduler, settings=settings)


SAMPLERS = {
    sampler.name: sampler
    for sampler in (
        Sampler("ddpm", "ancestral sampling, the sampler of the paper (Ho et al. 2020)", "diffusion.samplers:ddpm",
                adds_noise=True),
        Sampler("ddim", "deterministic unless eta is above 0 (Song et al. 2021)", "diffusion.samplers:ddim", ("eta",),
                respacings=("ddim{}", "{}")),  # an integer stride where one gives exactly this number of steps
        # The settings are those that the papers advise for guided sampling: order 2 on the predicted x_0, which is "2M" of
        # DPM-Solver++, and UniPC with B_2(h) = e^h - 1. Thresholding is for pixels, whose range is known.
        solver("dpm-solver++", "multistep solver of order 2 (Lu et al. 2022)", "DPMSolverMultistepScheduler",
               algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", thresholding=False),
        solver("unipc", "predictor and corrector of order 2 (Zhao et al. 2023)", "UniPCMultistepScheduler",
               predict_x0=True, solver_order=2, solver_type="bh2", thresholding=False),
        solver("heun", "order 2 with two evaluations per step (Karras et al. 2022, algorithm 1)",
               "HeunDiscreteScheduler", stages=2),
        solver("euler", "order 1 with one evaluation per step (Karras et al. 2022)", "EulerDiscreteScheduler"),
        Sampler("flow-euler", "for flow models: order 1, equal steps in the flow's time", "diffusion.samplers:flow_euler",
                flow=True),
        Sampler("flow-heun", "for flow models: order 2 with two evaluations per step", "diffusion.samplers:flow_heun",
                stages=2, flow=True),
        Sampler("flow-sde", "for flow models: Euler-Maruyama (Ma et al. 2024)", "diffusion.samplers:flow_sde",
                adds_noise=True, flow=True),
        Sampler("meanflow", "for meanflow models: equal steps of the average velocity (Geng et al. 2025)",
                "diffusion.samplers:meanflow", flow=True, average=True),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Objective:
    """What a model is trained for, and how its output is read.

    make: a class, or where it is, as text; an object of it is made by `make_objective`, which says what it must have.
    predicts: what the model's output may be, the default first. default_sampler: (name, number of steps) to draw with where
    none is chosen. flow: whether the output is the velocity of `diffusion.flow`; average: whether it is its average over an
    interval, for a model that takes r too: `diffusion.meanflow`. target_passes: forward passes for the unguided target."""

    make: Callable | str
    predicts: tuple[str, ...]
    default_sampler: tuple[str, int]
    flow: bool = False
    average: bool = False
    target_passes: float = 0


OBJECTIVES = {
    "diffusion": Objective("diffusion.gaussian_diffusion:Diffusion", ("eps", "v"), ("ddpm", 250)),
    # 20 steps are not the fewest that would do: the solvers of order 2 in docs/sampling.md gain nothing after them
    "flow": Objective("diffusion.flow:Flow", ("v",), ("flow-heun", 20), flow=True),
    # the velocity and twice a pass for its slope, of a quarter of the images
    "meanflow": Objective("diffusion.meanflow:MeanFlow", ("v",), ("meanflow", 1), flow=True, average=True,
                          target_passes=0.75),
}  # fmt: skip


def make_objective(objective, predict=None, learn_sigma=True, guidance=1.0, null=None):
    """The objective of this name in `OBJECTIVES`, for a model that predicts `predict` (default: the objective's own) and
    with learn_sigma the variance. guidance, null: of a MeanFlow. It has

        draw_timesteps(number, device, sampling)     (number, ...) timesteps; sampling: "uniform" or "logit-normal"
        training_losses(model, x_start, t, model_kwargs, noise)     a dict of (N,) tensors: `loss`, which is minimised, and
                                                                    what else is to be logged, by its name

    Raises ValueError for a prediction or a variance that it lacks."""
    chosen = OBJECTIVES[objective]
    predict = predict or chosen.predicts[0]
    if predict not in chosen.predicts:
        raise ValueError(f"objective {objective!r} predicts {' or '.join(chosen.predicts)}, not {predict!r}")
    options = {"guidance": guidance, "null": null} if chosen.average else {}
    return load(chosen.make)(predict=predict, learn_sigma=learn_sigma, **options)


def load(function):
    """The function or class itself, imported where only its place is known: "package.module:name"."""
    return resolve_name(function) if isinstance(function, str) else function


# How the guidance scale grows during sampling: each function maps s = 1 - t / num_timesteps, which is 0 at pure noise and 1
# at the image, to a share in [0, 1]; the scale is 1 + share * (cfg_scale - 1).
GUIDANCE_SCHEDULES = {
    "constant": lambda s: 1.0,
    "linear": lambda s: s,  # Chang et al. 2023 (Muse)
    "power-cosine": lambda s: (1 - math.cos(math.pi * s**4)) / 2,  # Gao et al. 2023 (MDT), with the power 4
}


def check_options(name, eta=0.0, spacing=None):
    """The sampler of this name; or a Sampler, which is returned. Raises ValueError for an unknown name, and for an option
    that the sampler does not take. The number of steps is not checked: see `diffusion.check_sampler`."""
    if not isinstance(name, Sampler) and name not in SAMPLERS:
        raise ValueError(f"sampler {name!r} is not one of {', '.join(SAMPLERS)}")
    sampler = name if isinstance(name, Sampler) else SAMPLERS[name]
    for option, given in (("eta", eta != 0), ("spacing", spacing is not None)):
        if given and option not in sampler.options:
            takers = ", ".join(other.name for other in SAMPLERS.values() if option in other.options)
            raise ValueError(f"{option} is an option of {takers}, not of {sampler.name}")
    if spacing is not None and spacing not in SPACINGS:
        raise ValueError(f"spacing {spacing!r} is not one of {', '.join(SPACINGS)}")
    return sampler
