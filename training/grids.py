"""The grids of a run as an animation over the steps, which train.py writes at the end, and plot.py --animate."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from runtime.errors import UserError
from runtime.files import check_regular
from sampling import grid as pictures
from training.trackers import image_paths

MAX_FRAMES = 200  # of an animation
TITLE_HEIGHT = 20  # pixels


def write_animation(run_dir, output):
    """Write an animation of the grids of a run, with their steps, to `output`, a .gif: MAX_FRAMES at most, spread evenly;
    grids of another size than the latest are left out. Returns the number of frames. Raises UserError."""
    paths = [path for _, name, path in sorted(image_paths(run_dir)) if name == "samples"]
    if not paths:
        return 0
    font, frames = ImageFont.load_default(size=14), []
    for i in np.linspace(len(paths) - 1, 0, min(len(paths), MAX_FRAMES)).round().astype(int):
        try:
            check_regular(paths[i])
            with Image.open(paths[i]) as file:
                grid = file.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # what PIL raises for damaged files
            raise UserError(f"{paths[i]}: not a readable image ({error}); remove it") from None
        frame = Image.new("RGB", (grid.width, grid.height + TITLE_HEIGHT), "white")
        frame.paste(grid, (0, TITLE_HEIGHT))
        center = grid.width / 2, TITLE_HEIGHT / 2
        ImageDraw.Draw(frame).text(center, f"step {int(paths[i].stem):,}", "black", font, anchor="mm")
        frames += [frame] if not frames or frame.size == frames[0].size else []
    pictures.write_animation(output, frames[::-1], 3 * pictures.DURATION, pictures.LAST_DURATION)
    return len(frames)
