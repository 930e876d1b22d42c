"""Find the best settings to draw with: measure every combination of guidance, average, sampler and steps.

    python -m tools.sweep --ckpt results/xl2 --ref VIRTUAL_imagenet256_labeled.npz --cfg-scale 1 1.25 1.5 2 \\
        --guidance-interval 0 1  0.2 0.8 --sampler dpm-solver++ --num-sampling-steps 20 50
    torchrun --nproc_per_node=gpu -m tools.sweep --ckpt CKPT --ref FOLDER --features efficientnet-lite0 --average ema model

Options of the samplers take lists of values. Each setting draws the images of sample_ddp.py, of the same labels from the
same noise, and measures them in memory: FD with its standard error, precision, recall and more. Rows are
printed as they come and kept in --output, from where the same command resumes. In the end curves are drawn, and the best
setting is named, with the commands that draw it."""

import runtime  # noqa: F401 -- first: from here on Ctrl-C prints a line  # isort: skip
from evaluation.config import SweepConfig
from runtime.parser import Parser


def main(argv=None):
    with Parser(SweepConfig, __doc__).processes(argv) as (config, context):
        from evaluation.sweep import sweep

        sweep(config, context)


if __name__ == "__main__":
    main()
