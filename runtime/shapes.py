"""An image's size as options and records have it: the side of a square in pixels, 256, or "256x384", height by width."""

import re


class ImageSize:
    """The kind of an option that is such a size; `ImageSize(value)` is the size itself, an int or a str."""

    def __new__(cls, value):
        return plain_size(sides(value))


def sides(size):
    """(height, width) of a size; a tuple of them stays as it is. Raises ValueError, whose text continues a sentence."""
    text = "x".join(map(str, size)) if isinstance(size, tuple | list) else str(size)
    found = re.fullmatch(r"(\d{1,9})(?:x(\d{1,9}))?", text)
    if not found:
        raise ValueError(f"{text!r:.80} is not the side of a square in pixels, nor HEIGHTxWIDTH, such as 256x384")
    return int(found[1]), int(found[2] or found[1])


def bucket_shapes(size, number, unit):
    """At most `number` shapes (height, width) of about the area of a size, it among them, in multiples of `unit` pixels:
    their ratios of width to height are the size's own times 1/2 to 2, in equal factors."""
    (height, width), found = sides(size), []
    for i in range(number):
        stretch = 2 ** (i / (number - 1) - 0.5)
        found.append(tuple(max(1, round(side / unit)) * unit for side in (height / stretch, width * stretch)))
    return list(dict.fromkeys(found))


def plain_size(sides):
    """The other way round: the form in options and records, which is a number where all sides are equal."""
    return sides[0] if len({*sides}) == 1 else "x".join(map(str, sides))
