"""data.py: every kind of file read right, the reference's crop, and an order that no number of processes changes."""

import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from reference import golden

from data import images as data
from train import center_crop_arr


def test_crop_matches_the_reference():
    expected = golden("center_crop")
    for i, key in enumerate(key for key in expected if not key.endswith("crc32")):
        shape, size = key.split("->")
        (h, w), size = map(int, shape.split("x")), int(size)
        pixels = np.random.RandomState(i).randint(0, 256, (math.ceil(h / 4), math.ceil(w / 4), 3)).astype(np.uint8)
        pixels = pixels.repeat(4, axis=0).repeat(4, axis=1)[:h, :w]
        crop = np.asarray(center_crop_arr(Image.fromarray(pixels), size))
        assert np.array_equal(crop if size <= 64 else crop[::8, ::8], expected[key]), key
        assert zlib.crc32(crop.tobytes()) == expected[f"{key}:crc32"], key


PICTURE = np.zeros((6, 9, 3), np.uint8)
PICTURE[:3, :4] = [250, 20, 90]  # lopsided in every direction


@pytest.mark.parametrize("kind", ["rgb", "rgba", "palette", "palette with transparency", "exif"])
def test_colours_and_orientation_are_read_right(tmp_path, kind):
    path, image = tmp_path / "a.png", Image.fromarray(PICTURE)
    if kind == "rgba":
        image.putalpha(128)
    elif kind.startswith("palette"):
        image = image.quantize(4)
        if "transparency" in kind:
            image.info["transparency"] = 0
    elif kind == "exif":
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was held upright: rotate by 270 degrees to see it so
        image = image.transpose(Image.Transpose.ROTATE_90)
        image.save(path, exif=exif)
    if kind != "exif":
        image.save(path)
    assert np.array_equal(np.asarray(data.open_image(path)), PICTURE)


def test_grey_sixteen_bit_and_cmyk_are_read_right(tmp_path):
    grey = PICTURE[:, :, 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(PICTURE).convert("CMYK").save(tmp_path / "cmyk.tif")
    for name in ("grey.png", "deep.png"):
        assert np.array_equal(np.asarray(data.open_image(tmp_path / name)), grey[:, :, None].repeat(3, axis=2)), name
    assert np.array_equal(np.asarray(data.open_image(tmp_path / "cmyk.tif")), PICTURE)


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "gone"])
def test_unreadable_images_are_named(tmp_path, image_folder, damage):
    path = tmp_path / "broken.jpg"
    if damage != "gone":
        Image.fromarray(PICTURE.repeat(20, axis=0).repeat(20, axis=1)).save(path)
        whole = path.read_bytes()
        path.write_bytes({"truncated": whole[: len(whole) // 2], "text": b"not an image", "empty": b""}[damage])
    with pytest.raises(data.DataError, match="broken.jpg"):
        data.open_image(path)


def test_bad_images_are_replaced_only_on_request(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(3):
        Image.fromarray(PICTURE).save(tmp_path / f"a/{i}.png")
    (tmp_path / "a/1.png").write_bytes(b"broken")
    with pytest.raises(data.DataError, match=r"1\.png"):
        data.load(tmp_path, 4)[1, 0]
    item = data.load(tmp_path, 4, flip=False, skip_bad=True)[1, 0]
    assert "1.png" in item["replaced"]
    assert torch.equal(item["image"], data.load(tmp_path, 4, flip=False)[2, 0]["image"])
    for i in range(3):
        (tmp_path / f"a/{i}.png").write_bytes(b"broken")
    with pytest.raises(data.DataError, match="none of the images"):
        data.load(tmp_path, 4, skip_bad=True)[0, 0]


@given(st.integers(1, 40), st.sampled_from([1, 2, 3, 4]), st.integers(1, 4), st.integers(0, 9))
@settings(deadline=None)
def test_processes_share_the_same_batches_and_an_epoch_holds_each_image_once(images, world_size, per_rank, seed):
    size = world_size * per_rank
    stop = 3 * images // size * size
    one = list(data.GlobalOrder(images, size, seed, stop=stop))
    shares = [list(data.GlobalOrder(images, size, seed, rank, world_size, stop=stop)) for rank in range(world_size)]
    for i, batch in enumerate(one):
        assert sorted(batch) == sorted(key for share in shares for key in share[i]), "the global batch must not change"
    row = [key for batch in one for key in batch]
    for epoch in range(stop // images):
        assert sorted(index for index, e in row if e == epoch) == list(range(images))


@given(st.integers(1, 6), st.integers(0, 5))
@settings(deadline=None, max_examples=20)
def test_order_goes_on_anywhere(batches_done, seed):
    whole = list(data.GlobalOrder(10, 4, seed, stop=40))
    assert list(data.GlobalOrder(10, 4, seed, start=4 * batches_done, stop=40)) == whole[batches_done:]


def test_order_depends_on_seed_and_epoch():
    def epoch(seed, number):
        return [i for b in data.GlobalOrder(50, 50, seed, start=50 * number, stop=50 * (number + 1)) for i, _ in b]

    assert epoch(0, 0) != epoch(1, 0) != epoch(0, 1) != epoch(0, 0)


def test_flips_are_fair_and_belong_to_seed_epoch_and_image(image_folder):
    images = data.load(image_folder, 16, seed=3)
    plain = data.load(image_folder, 16, flip=False)
    mirrored = []
    for epoch in range(20):
        for index in range(len(images)):
            image, straight = images[index, epoch]["image"], plain[index, epoch]["image"]
            mirrored.append(not torch.equal(image, straight))
            assert torch.equal(image, straight.flip(-1) if mirrored[-1] else straight)
            assert torch.equal(image, images[index, epoch]["image"]), "the same key must give the same picture"
    assert 80 < sum(mirrored) < 160  # 240 fair coins, five standard deviations


def test_digits_are_eight_by_eight_and_never_mirrored():
    digits = data.load("digits", 8, flip=True)
    assert (len(digits), digits.channels, digits.classes) == (1797, 1, list("0123456789"))
    assert digits[0, 0]["image"].shape == (1, 8, 8)
    assert all(torch.equal(digits[5, 0]["image"], digits[5, epoch]["image"]) for epoch in range(10))
    low, high = data.to_model_range(digits[0, 0]["image"]).aminmax()
    assert low == -1
    assert abs(high - (15 / 8 - 1)) < 1 / 255  # 15 of 16, to the nearest of 256 levels


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: (p / "a").mkdir(parents=True)])
def test_folders_without_images_are_refused(tmp_path, make):
    make(tmp_path / "data")
    with pytest.raises(data.DataError, match="--data-path .*data"):
        data.load(tmp_path / "data", 8)
