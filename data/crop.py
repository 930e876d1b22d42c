"""The training crop. Imports PIL alone, since it is also known as train.center_crop_arr."""

from PIL import Image


def center_crop_arr(image, size):
    """The training crop of a PIL image, (size, size): halved by box averages while the shorter side is at least twice the
    size (which keeps fine detail from aliasing), then bicubic so that the shorter side is the size, then the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample=Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
