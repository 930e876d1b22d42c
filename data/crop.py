"""The training crop. Imports PIL alone of what is not fast, since it is also known as train.center_crop_arr."""

from PIL import Image

from runtime.shapes import sides

LONGEST = 64  # longer side over shorter side, relative to the crop's, of an image that is enlarged as a whole


def center_crop_arr(image, size):
    """The training crop of a PIL image, of a `size` in pixels: halved by box averages while both sides are at least twice
    the crop's (which keeps fine detail from aliasing), then bicubic so that it just covers the crop, then the centre."""
    height, width = sides(size)
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    if scale > 1:  # enlarged as a whole, an image of another form would take gigabytes
        left = max(0, image.width - -(-LONGEST * image.height * width // height)) // 2
        top = max(0, image.height - -(-LONGEST * image.width * height // width)) // 2
        image = image.crop((left, top, image.width - left, image.height - top))
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample=Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
