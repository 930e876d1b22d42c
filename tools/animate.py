"""Show how the samples of a training run change: an animation of the grids that train.py --sample-every has drawn.

python -m tools.animate results/000-DiT-XL-2 --output samples.gif
"""

from dataclasses import dataclass
from pathlib import Path

from runtime.config import Config, option
from runtime.errors import UserError
from runtime.parser import Parser


@dataclass(frozen=True)
class AnimateConfig(Config):
    """Options of animate.py."""

    run: str = option(help="folder of a run that was trained with --sample-every", positional=True, metavar="RUN")
    output: str | None = option(None, "GIF file to write (default: samples.gif in the run's folder)", metavar="FILE")

    def check(self):
        if self.output is not None and Path(self.output).suffix.lower() != ".gif":
            raise UserError(f"--output {self.output}: is an animation; name a .gif file")


def main(argv=None):
    parser = Parser(AnimateConfig, __doc__)
    config = parser.parse(argv)
    with parser.report_errors():
        from runtime.files import check_output  # PyTorch, which the grids' module imports, takes seconds
        from training.grids import write_animation

        output = config.output or str(Path(config.run) / "samples.gif")
        if not Path(config.run).is_dir():
            raise UserError(f"{config.run}: no such folder; name the folder of a run")
        check_output(output, "--output")
        frames = write_animation(config.run, output)
        if not frames:
            raise UserError(f"{config.run}: has no grids in samples/; train with --sample-every")
        print(f"{frames} grids in {output}")


if __name__ == "__main__":
    main()
