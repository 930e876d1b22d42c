"""Measure how well a pixel-space DiT models images: -log2 p(image | class), in bits per dimension.

    python -m tools.likelihood --ckpt results/000-DiT-S-4/checkpoints/0400000.pt --data-path /path/to/test
    torchrun --nproc_per_node=gpu -m tools.likelihood --ckpt CKPT --data-path digits --num-timesteps 100

Of a diffusion it is the variational bound (DDPM, Ho et al. 2020, eq. 5), with one draw of noise per image and timestep; of
a flow the density along its ODE (Chen et al. 2018), with one random probe per image for the divergence. Weights are the
averaged ones, and pixels have 256 levels. (The digits have 17 levels, spread over the 256.) The total, the prior, the term
of every timestep and their standard errors over the images are written to --output, and a plot of the terms beside it."""

import runtime  # noqa: F401 -- first: from here on Ctrl-C prints a line  # isort: skip
from evaluation.config import LikelihoodConfig
from runtime.parser import Parser


def main(argv=None):
    with Parser(LikelihoodConfig, __doc__).processes(argv) as (config, context):
        from evaluation.likelihood import describe, measure_likelihood, write_report

        if report := measure_likelihood(config, context):
            print(describe(report))
            write_report(report, config.report)
            print(f"written to {config.report}")


if __name__ == "__main__":
    main()
