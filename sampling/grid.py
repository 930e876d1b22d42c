"""Images in rows and columns, with captions, as picture files, and the steps of sampling as a grid or an animation."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from runtime.errors import RunError, UserError
from runtime.files import check_output, replace_file, write_errors

GAP, CAPTION_HEIGHT = 2, 20  # pixels
MAX_PIXELS = 2**30  # 4 GiB of memory
FRAMES, STEPS = 50, 10  # at most this many steps are shown in an animation, in a grid
DURATION, LAST_DURATION = 100, 1500  # of an animation's frames, in milliseconds


def grid_size(number, side, columns, captions):
    """(width, height) in pixels of a grid of `number` images of `side` pixels."""
    columns = min(columns, number)
    return columns * (side + GAP) + GAP, -(-number // columns) * (side + GAP + CAPTION_HEIGHT * bool(captions)) + GAP


def draw_grid(images, columns, enlarge=1, captions=None):
    """A PIL image of images (N, H, H, 3) uint8, each pixel repeated `enlarge` times, with a caption under each if given."""
    side, font, columns = images.shape[1] * enlarge, ImageFont.load_default(size=14), min(columns, len(images))
    grid = Image.new("RGB", grid_size(len(images), side, columns, captions), "white" if captions else "black")
    pen, height = ImageDraw.Draw(grid), side + GAP + CAPTION_HEIGHT * bool(captions)
    for i, pixels in enumerate(images):
        left, top = GAP + i % columns * (side + GAP), GAP + i // columns * height
        grid.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST), (left, top))
        if captions:
            text = captions[i]
            while len(text) > 1 and pen.textlength(text, font) > side:
                text = text[:-2] + "…"
            pen.text((left + side / 2, top + side + CAPTION_HEIGHT / 2), text, "black", font, anchor="mm")
    return grid


def picture_format(path):
    """Pillow's name of the format that belongs to a file's name, or None."""
    return Image.registered_extensions().get(Path(path).suffix.lower())


def check_picture(path, option, number, side, columns, captions=False):
    """Raises UserError, before any work, where a grid could not be written to `path`; otherwise see `grid_size`."""
    check_output(path, option)
    width, height = grid_size(number, side, columns, captions)
    if picture_format(path) not in Image.SAVE:
        raise UserError(f"{option} {path}: cannot be written in this format; name an image file, such as sample.png")
    if width * height > MAX_PIXELS:
        raise UserError(f"{option} {path}: {width} x {height} pixels are too many; draw fewer images, or enlarge them less")
    try:
        for size in ((width, 1), (1, height)):  # some formats limit the sides, and some have no colours
            Image.new("RGB", size).save(io.BytesIO(), format=picture_format(path))
    except Exception as error:  # every format raises its own kinds
        raise UserError(f"{option} {path}: cannot hold {width} x {height} pixels in colour ({error}); use .png") from None


def check_trajectory(path, option, number, side, columns):
    """As `check_picture`, of the steps of `number` images."""
    number, columns = (number, columns) if picture_format(path) == "GIF" else (number * STEPS, STEPS)
    check_picture(path, option, number, side, columns)


def write_picture(path, picture, **options):
    """Write a PIL image atomically. Raises RunError, such as for a full disk."""
    content = io.BytesIO()  # some of Pillow's formats write to a file without noticing that the disk is full
    picture.save(content, format=picture_format(path), **options)
    with write_errors(path, error_class=RunError):
        replace_file(path, lambda file: file.write(content.getbuffer()))


def write_trajectory(path, decode, predictions, columns, enlarge):
    """Show how the predicted x_0 changes: as an animation if `path` is a .gif, else as a grid with a row for each image.

    decode: function from x_0 to images (N, H, W, 3) uint8. predictions: x_0 of every step. columns: of an animation."""
    animated = picture_format(path) == "GIF"
    count = min(len(predictions), FRAMES if animated else STEPS)
    frames = [decode(predictions[round(i)]) for i in np.linspace(0, len(predictions) - 1, count)]
    if animated:
        first, *others = [draw_grid(images, columns, enlarge) for images in frames]
        durations = [DURATION] * len(others) + [LAST_DURATION]
        write_picture(path, first, save_all=True, append_images=others, duration=durations, loop=0)
    else:
        rows = np.stack(frames, axis=1)  # (N, count, H, W, 3)
        write_picture(path, draw_grid(rows.reshape(-1, *rows.shape[2:]), count, enlarge))
