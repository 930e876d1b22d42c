"""The training crop. Imports PIL alone, since it is also known as train.center_crop_arr."""

from PIL import Image

LONGEST = 64  # longer side over shorter side, of an image that is enlarged as a whole


def center_crop_arr(image, size):
    """The training crop of a PIL image, (size, size): halved by box averages while the shorter side is at least twice the
    size (which keeps fine detail from aliasing), then bicubic so that the shorter side is the size, then the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    (width, height), scale = image.size, size / min(image.size)
    if scale > 1 and max(width, height) > LONGEST * min(width, height):  # enlarged as a whole it would take gigabytes
        longest = LONGEST * min(width, height)
        left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
        image = image.crop((left, top, width - left, height - top))
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample=Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
