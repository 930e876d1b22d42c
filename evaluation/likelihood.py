"""The likelihood of a pixel-space model in bits per dimension: the work of tools/likelihood.py. Of a diffusion it is the
variational bound, of a flow the density that its ODE gives."""

import math
import textwrap
from functools import partial

import numpy as np
import torch
from tqdm.auto import tqdm

from data.autoencoder import load_space, to_model_range
from data.config import COLUMNS, DataConfig
from data.images import load_dataset
from data.latents import is_latents_folder
from data.order import make_loader
from diffusion import create_diffusion
from diffusion.flow import flow_log_likelihood, likelihood_levels
from diffusion.registry import OBJECTIVES
from runtime import files, seeds
from runtime.devices import explain_out_of_memory, set_precision
from runtime.errors import RunError, UserError
from sampling.opened import open_checkpoint, settle


def measure_likelihood(config, context):
    """The report of a LikelihoodConfig on rank 0, None on other ranks. Raises UserError."""
    with context.together():
        for path in (config.report, config.report.with_suffix(".png")):
            files.check_output(path, "--output")
        checkpoint = open_checkpoint(config)
        where, channels = f"--data-path {config.data_path}", checkpoint.model_config["in_channels"]
        if is_latents_folder(config.data_path):
            raise UserError(where, "holds latents of extract_latents.py", "name the folder of images")
        image_size = settle(config, checkpoint, pixel_space(config, checkpoint))["image_size"]
        encoder = config.text_encoder or checkpoint.condition.record().get("name")  # of a model of texts
        columns = {name: getattr(config, name) for name in COLUMNS}
        data = DataConfig(data_path=config.data_path, flip=False, text_encoder=encoder, **columns)
    dataset = load_dataset(data, image_size, context=context, num_frames=checkpoint.sizes.frames)
    with context.together():
        if dataset.channels != channels:
            problem = f"images of {dataset.channels} channels, {config.ckpt} works on {channels}"
            raise UserError(where, problem, "name images of that kind")
        condition = checkpoint.condition.for_data(dataset, data).to(context.device)
        indices = choose(len(dataset), config.num_images, config.seed)
        model, steps = checkpoint.build_model().requires_grad_(False), config.num_timesteps
    if OBJECTIVES[model.objective].flow:
        terms, timesteps = partial(flow_terms, steps), [1000 * s for s in likelihood_levels(steps)[1:]]
    else:
        diffusion = create_diffusion(str(steps), learn_sigma=model.learn_sigma, predict=model.predict)
        terms, timesteps = partial(bound, diffusion), diffusion.timestep_map
    with set_precision("fp32", context.device), explain_out_of_memory("lower --batch-size"):
        rows = measure(model.to(context.device), terms, dataset, condition, indices, config, context)
    if not context.is_main:
        return None
    if not rows.isfinite().all():
        raise RunError(f"--ckpt {config.ckpt}: the likelihood is not finite; take another checkpoint")
    return make_report(rows, timesteps, config, checkpoint, context)


def pixel_space(config, checkpoint):
    """The latent space of a model of pixels. Raises UserError for a model of latents."""
    where, channels, vae = f"--ckpt {config.ckpt}", checkpoint.model_config["in_channels"], config.vae or checkpoint.vae
    if channels not in (1, 3):
        problem = "works on latents, so its likelihood is none of images, to which the autoencoder gives no probability"
        raise UserError(where, problem, "use a model that was trained with --vae none")
    if vae != "none":
        problem = f"{channels} channels, like pixels, but {f'--vae is {vae}' if vae else 'records no --vae'}"
        raise UserError(where, problem, "if it works on pixels, pass --vae none")
    return load_space(vae, channels)


def choose(num_images, wanted, seed):
    """The first `wanted` indices of a shuffled order: a larger number keeps those of a smaller one. Raises UserError."""
    if num_images < 2:
        raise UserError("--data-path", "holds one image; a standard error needs at least 2")
    return seeds.generator(seed, seeds.BOUND_CHOICE).permutation(num_images)[:wanted].tolist()


def measure(model, terms, dataset, condition, indices, config, context):
    """The terms of the images `indices` of the dataset, in their order, on every rank. The ranks take whole batches in
    turn, so that their number changes no bit of the result. terms: `bound` or `flow_terms` with its first argument."""
    batches = [indices[first : first + config.batch_size] for first in range(0, len(indices), config.batch_size)]
    mine, rows = batches[context.rank :: context.world_size], []
    total = sum(map(len, mine)) * config.num_timesteps * (2 if OBJECTIVES[model.objective].flow else 1)
    bar = tqdm(total=total, desc="Likelihood", unit="step", unit_scale=True, disable=not context.is_main)
    with context.together(), bar:
        for batch in make_loader(dataset, [[(index, 0) for index in batch] for batch in mine]):
            y = condition.y(batch, context.device)

            def denoise(x_t, t, y=y):
                bar.update(len(x_t))
                return model(x_t, torch.as_tensor(t, device=x_t.device).expand(len(x_t)), y)  # a flow's t is one number

            x_0 = to_model_range(batch["image"].to(context.device))
            rows.append(terms(denoise, x_0, config.seed, batch["index"].tolist()))
    return torch.cat(context.all_in_turn(rows))


def bound(diffusion, denoise, x_0, seed, indices):
    """The terms of the bound, DDPM (Ho et al. 2020), eq. 5, in bits per dimension: (N, num_timesteps + 1) float64 on the
    CPU: L_0 (the decoder's), L_1, ..., and L_T (the prior's) last.

    x_0: (N, C, H, W) in [-1, 1]. The noise of image n depends on (seed, indices[n]) alone."""
    generators = [seeds.generator(seed, seeds.BOUND_NOISE, index) for index in indices]

    def step_noise(x, i):
        rows = [generator.standard_normal(x.shape[1:], "float32") for generator in generators]
        return torch.from_numpy(np.stack(rows)).to(x.device)

    found = diffusion.calc_bpd_loop(denoise, x_0, step_noise=step_noise)
    return torch.cat([found["vb"].flip(1), found["prior_bpd"][:, None]], dim=1).cpu().double()


def flow_terms(num_steps, velocity, x_0, seed, indices):
    """-log2 p(x_0) of a flow in bits per dimension, as summands (N, num_steps + 1) float64 on the CPU: of each step of the
    ODE, from the data on, and last of the noise, with the width of the 256 levels. See `flow_log_likelihood`.

    x_0: (N, C, H, W) in [-1, 1], of 256 levels, which uniform noise makes continuous (Theis et al. 2016, section 3.1): the
    mean is an upper bound for the levels. That noise and the probe of image n depend on (seed, indices[n]) alone."""
    generators = [seeds.generator(seed, seeds.BOUND_NOISE, index) for index in indices]
    noise = np.stack([generator.random(x_0.shape[1:], "float32") - 0.5 for generator in generators]) * (2 / 255)
    probe = np.stack([generator.integers(2, size=x_0.shape[1:]) * 2 - 1 for generator in generators])
    noise, probe = (torch.from_numpy(values).to(x_0) for values in (noise, probe))
    prior, integrals = flow_log_likelihood(velocity, x_0 + noise, num_steps, probe)
    rows = torch.cat([integrals, prior[:, None]], dim=1).cpu().double() / (-math.log(2) * x_0[0].numel())
    rows[:, -1] += math.log2(255 / 2)
    return rows


def make_report(rows, timesteps, config, checkpoint, context):
    """Mean over images, and its standard error, of the total, the prior and the term of each of the `timesteps`, and what
    they were made from. rows: see `bound` and `flow_terms`. timesteps: of the training process, ascending."""

    def moments(values):
        return {"mean": values.mean(0).tolist(), "standard_error": (values.std(0) / math.sqrt(len(rows))).tolist()}

    names = ("ckpt", "lora", "average", "data_path", "num_timesteps", "batch_size", "seed")
    return {
        "unit": "bits per dimension",
        "images": len(rows),
        "total": moments(rows.sum(1)),
        "prior": moments(rows[:, -1]),
        "terms": {"timestep": timesteps, **moments(rows[:, :-1])},
        "settings": {
            **{name: getattr(config, name) for name in names},
            "checkpoint_crc32": checkpoint.checksum,
            "checkpoint_step": checkpoint.step,
            "objective": checkpoint.model_config["objective"],
            "processes": context.world_size,
            "device": context.device.type,
            "torch": torch.__version__,
        },
    }


def describe(report):
    """One line: the total, its parts, and of how many images and steps."""
    total, terms, prior = report["total"], report["terms"]["mean"], report["prior"]["mean"]
    parts = f"decoder term {terms[0]:.4f}, other terms {sum(terms[1:]):.4f}, prior {prior:.2g}"
    steps = f"{len(terms)} timesteps"
    if OBJECTIVES[report["settings"]["objective"]].flow:
        parts, steps = f"change of volume {sum(terms):.4f}, prior {prior:.4f}", f"{len(terms)} steps of the ODE"
    bits = f"{total['mean']:.4f} +- {total['standard_error']:.4f} bits per dimension"
    return f"{bits}: {parts} ({report['images']} images, {steps})"


def write_report(report, output):
    """Write the report as JSON, and a plot of its terms beside it. Raises RunError."""
    figure, path = plot(report), output.with_suffix(".png")
    with files.write_errors(output):
        files.write_json(output, report)
        files.replace_file(path, lambda file: figure.savefig(file, format="png", bbox_inches="tight"))


def plot(report):
    """A figure of the terms over the timesteps, with a band of one standard error. A flow's terms may be negative."""
    from matplotlib.figure import Figure  # takes a second to import; without pyplot there is no window and no state

    t, mean, error = (np.array(report["terms"][name]) for name in ("timestep", "mean", "standard_error"))
    figure = Figure(figsize=(6.4, 3.6), dpi=120)
    axes = figure.subplots()
    axes.fill_between(t + 1, mean - error, mean + error, alpha=0.3, linewidth=0)
    axes.plot(t + 1, mean, marker=".", markersize=3, linewidth=1)
    is_flow = OBJECTIVES[report["settings"]["objective"]].flow
    axes.set(xscale="log", yscale="linear" if is_flow else "log", ylabel="bits per dimension")
    axes.set_xlabel("time 1000 s + 1 at the end of the step" if is_flow else "timestep t + 1")
    axes.set_title(textwrap.fill(describe(report), 70), fontsize="medium")
    axes.grid(alpha=0.3)
    return figure
