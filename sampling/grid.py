"""Images in rows and columns, with titles, as image files, and the steps of sampling as a grid or an animation."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from runtime.errors import UserError
from runtime.files import replace_file, write_errors
from runtime.shapes import sides

GAP, TITLE_HEIGHT = 2, 20  # pixels
MAX_PIXELS = 2**30  # 4 GiB of memory
FRAMES, STEPS = 50, 10  # at most this many steps are shown in an animation, in a grid
ANIMATED = ("GIF", "WEBP")  # formats in which clips are animations
DURATION, LAST_DURATION = 100, 1500  # of an animation's frames, in milliseconds


def grid_size(number, size, columns, titles):
    """(width, height) in pixels of a grid of `number` images of size (height, width). titles: whether it has some."""
    columns, (height, width) = min(columns, number), size
    return columns * (width + GAP) + GAP, -(-number // columns) * (height + GAP + TITLE_HEIGHT * bool(titles)) + GAP


def as_pictures(images):
    """Images (N, H, W, 3) as they are, clips (N, F, H, W, 3) as strips of their frames (N, H, F W, 3)."""
    if images.ndim == 4:
        return images
    number, frames, height, width, channels = images.shape
    return images.transpose(0, 2, 1, 3, 4).reshape(number, height, frames * width, channels)


def draw_grid(images, columns, enlarge=1, titles=None):
    """A PIL image of images (N, H, W, 3) uint8, each pixel repeated `enlarge` times, with a title under each if given."""
    height, width = (side * enlarge for side in images.shape[1:3])
    font, columns = ImageFont.load_default(size=14), min(columns, len(images))
    grid = Image.new("RGB", grid_size(len(images), (height, width), columns, titles), "white" if titles else "black")
    pen, row = ImageDraw.Draw(grid), height + GAP + TITLE_HEIGHT * bool(titles)
    for i, pixels in enumerate(images):
        left, top = GAP + i % columns * (width + GAP), GAP + i // columns * row
        grid.paste(Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST), (left, top))
        if titles:
            text = titles[i]
            while len(text) > 1 and pen.textlength(text, font) > width:
                text = text[:-2] + "…"
            pen.text((left + width / 2, top + height + TITLE_HEIGHT / 2), text, "black", font, anchor="mm")
    return grid


def image_format(path):
    """Pillow's name of the format that belongs to a file's name, or None."""
    return Image.registered_extensions().get(Path(path).suffix.lower())


def check_files(config, number, size, frames=None):
    """Raises UserError where the files of a SampleConfig could not hold `number` images of a size, or clips of `frames`."""
    (height, width), columns = [side * config.enlarge for side in sides(size)], config.columns
    strip = height, width * (frames or 1)
    size = (height, width) if image_format(config.output) in ANIMATED else strip
    check_image("--output", config.output, *grid_size(number, size, columns, config.captions))
    size = strip
    if path := config.save_trajectory:
        number, columns = (number, columns) if image_format(path) == "GIF" else (number * STEPS, STEPS)
        check_image("--save-trajectory", path, *grid_size(number, size, columns, titles=False))


def check_image(option, path, width, height):
    """Raises UserError where an image of so many pixels could not be written to `path`."""
    where = f"{option} {path}"
    if image_format(path) not in Image.SAVE:
        raise UserError(where, "cannot be written in this format", "name an image file, such as sample.png")
    if width * height > MAX_PIXELS:
        raise UserError(where, f"{width} x {height} pixels are too many", "draw fewer images, or enlarge them less")
    try:
        for size in ((width, 1), (1, height)):  # some formats limit the sides, and some have no colours
            Image.new("RGB", size).save(io.BytesIO(), format=image_format(path))
    except Exception as error:  # every format raises its own kinds
        raise UserError(where, f"cannot hold {width} x {height} pixels in colour ({error})", "use .png") from None


def write_picture(path, picture, **options):
    """Write a PIL image atomically. Raises RunError, such as for a full disk."""
    content = io.BytesIO()  # some of Pillow's formats write to a file without noticing that the disk is full
    picture.save(content, format=image_format(path), **options)
    with write_errors(path):
        replace_file(path, lambda file: file.write(content.getbuffer()))


def write_animation(path, frames, duration=DURATION, last_duration=None):
    """Write PIL images as an endless animation. duration, last_duration: of a frame and the last one, in milliseconds."""
    options = {"lossless": True} if image_format(path) == "WEBP" else {}
    durations = [duration] * (len(frames) - 1) + [last_duration or duration]
    write_picture(path, frames[0], save_all=True, append_images=frames[1:], duration=durations, loop=0, **options)


def write_images(path, images, columns, enlarge=1, titles=None):
    """Write images (N, H, W, 3) uint8 as a grid; clips (N, F, H, W, 3) as a grid of strips, or moving (.gif, .webp)."""
    if images.ndim == 4 or image_format(path) not in ANIMATED:
        return write_picture(path, draw_grid(as_pictures(images), columns, enlarge, titles))
    write_animation(path, [draw_grid(images[:, i], columns, enlarge, titles) for i in range(images.shape[1])])


def write_trajectory(path, decode, predictions, columns, enlarge):
    """Show how the predicted x_0 changes: as an animation if `path` is a .gif, else as a grid with a row for each image.

    decode: function from x_0 to images (N, H, W, 3) uint8. predictions: x_0 of every step. columns: of an animation."""
    animated = image_format(path) == "GIF"
    count = min(len(predictions), FRAMES if animated else STEPS)
    frames = [as_pictures(decode(predictions[round(i)])) for i in np.linspace(0, len(predictions) - 1, count)]
    if animated:
        write_animation(path, [draw_grid(images, columns, enlarge) for images in frames], last_duration=LAST_DURATION)
    else:
        rows = np.stack(frames, axis=1)  # (N, count, H, W, 3)
        write_picture(path, draw_grid(rows.reshape(-1, *rows.shape[2:]), count, enlarge))
