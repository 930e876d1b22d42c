"""Tables of images: Parquet files and Arrow folders are read as the same pictures in files are, by whole commands too."""

import io
import json
import os
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from helpers import assert_same_state, call, latest, metrics, paced, wait_for, without_timings
from PIL import Image

import evaluate
import extract_latents
import train
from data.config import DataConfig
from data.images import ImageDataset, load_dataset
from data.order import GlobalOrder, make_loader
from data.table import beside_the_data
from evaluation.image_sets import open_images
from runtime.errors import UserError

datasets = pytest.importorskip("datasets")
import pyarrow as pa  # noqa: E402
import pyarrow.parquet  # noqa: E402

CLASSES = datasets.ClassLabel(names=["ant", "bee", "cat"])
RUN = "--vae none --image-size 8 --hidden-size 16 --depth 1 --num-heads 2 --global-batch-size 4 --lr 1e-3 --device cpu "
RUN = (RUN + "--log-every 1 --ckpt-every 2 --label-dropout 0.3 --ema-warmup").split()


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """The folder in which Parquet becomes Arrow; commands that are forked see it too."""
    folder = tmp_path_factory.mktemp("arrow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        datasets.disable_progress_bars()
        yield folder


def write(folder, columns, features=None, files=1, split="train", row_group_size=5):
    """Parquet files of columns {name: list}. features: of the package datasets, else the file knows plain types alone."""
    folder.mkdir(exist_ok=True, parents=True)
    table = pa.table(columns, schema=features and datasets.Features(features).arrow_schema)
    for number, rows in enumerate(np.array_split(np.arange(len(table)), files)):
        path = folder / f"{split}-{number:05}-of-{files:05}.parquet"
        pyarrow.parquet.write_table(table.take(rows), path, row_group_size=row_group_size)
    return folder


def columns_of(folder):
    """The images of a folder of class folders, in its order."""
    paths = sorted(folder.glob("*/*"))
    images = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    return {"image": images, "label": [CLASSES.str2int(path.parent.name) for path in paths]}


@pytest.fixture(scope="module")
def tables(tmp_path_factory, image_folder):
    """{kind: path} of the same twelve pictures."""
    folder, features = tmp_path_factory.mktemp("tables"), {"image": datasets.Image(), "label": CLASSES}
    parquet = write(folder / "parquet", columns_of(image_folder), features, files=3)
    shutil.copytree(parquet, folder / "repository/data")  # as a data set of the hub is downloaded
    (folder / "repository/README.md").write_text("about it")
    rows = datasets.load_dataset("parquet", data_files=[*map(str, sorted(parquet.glob("*")))], split="train")
    rows.save_to_disk(folder / "arrow", num_shards=2)
    datasets.DatasetDict({"train": rows, "test": rows.select(range(3))}).save_to_disk(folder / "splits")
    rows.to_parquet(folder / "one.parquet")
    shutil.copy(rows.cache_files[0]["filename"], folder / "one.arrow")
    kinds = ("parquet", "repository", "arrow", "splits", "one.parquet", "one.arrow")
    return {"files": image_folder, **{kind: folder / kind for kind in kinds}, "train": f"{folder}/splits:train"}


@pytest.mark.parametrize("kind", ["parquet", "repository", "arrow", "splits", "train", "one.parquet", "one.arrow"])
@pytest.mark.parametrize("workers", [0, 2])
def test_items_are_those_of_the_same_pictures_in_files(tables, kind, workers):
    """The order is a function of (seed, epoch), and the checksum the same, so that a run may even go on from the other."""
    order, found = GlobalOrder(12, 4, seed=3, start=4, stop=28), {}
    for path in (tables["files"], tables[kind]):
        dataset = load_dataset(DataConfig(str(path)), 16, seed=3)
        found[path] = [*make_loader(dataset, order, workers)], dataset.fingerprint(), dataset.classes, [*dataset.names]
    (batches, *facts), (expected, *expected_facts) = found.values()
    assert facts == expected_facts
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        assert all(torch.equal(batch[name], other[name]) for name in ("image", "label", "index", "source"))


def test_pictures_of_every_kind_are_made_upright_rgb(tmp_path, monkeypatch):
    """EXIF, modes and transparency: the same function as for files, with the same result."""
    random = np.random.default_rng(0).integers(0, 256, (12, 10, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    colours, grey = Image.fromarray(random[..., :3]), Image.fromarray(random[..., 0])
    kinds = {
        "a.jpg": (colours, {"exif": exif}), "b.png": (Image.fromarray(random), {}), "c.webp": (colours, {}),
        "d.png": (Image.fromarray(random[..., 0].astype(np.uint16) * 257), {}), "e.png": (grey.convert("P"), {}),
        "f.tif": (Image.new("CMYK", (9, 9)), {}), "g.tif": (colours, {"compression": "tiff_lzw"}), "h.bmp": (colours, {}),
    }  # fmt: skip
    (tmp_path / "files/ant").mkdir(parents=True)
    for name, (image, options) in kinds.items():
        image.save(tmp_path / "files/ant" / name, **options)
    write(tmp_path / "parquet", columns_of(tmp_path / "files"))
    files, rows = (load_dataset(DataConfig(str(tmp_path / kind)), 8) for kind in ("files", "parquet"))
    assert len(files) == len(rows) == 8
    Image.init()  # with all formats of Pillow, which writing a grid loads, in any order
    monkeypatch.setattr(Image, "ID", Image.ID[::-1])
    assert all(torch.equal(files[i, 0]["image"], rows[i, 0]["image"]) for i in range(8))


def test_a_header_is_read_without_the_rest(tmp_path):
    """Sizes of all images, such as for buckets of shapes, must not cost all of their bytes."""
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 400, 3), dtype=np.uint8)).save(data, "PNG")
    dataset = load_dataset(DataConfig(str(write(tmp_path / "data", {"image": [data.getvalue()] * 2}))), 8)
    file = dataset.file(1)
    with Image.open(file) as image:
        assert image.size == (400, 600)
        assert file.tell() < 2000 < len(data.getvalue())


def test_a_picture_that_is_none_stops_or_is_replaced(tmp_path, image_folder):
    columns = columns_of(image_folder)
    columns["image"][1]["bytes"] = columns["image"][1]["bytes"][:40]
    columns["image"][2] = {"bytes": None, "path": str(tmp_path / "gone.png")}
    columns["image"][3] = None
    path = str(write(tmp_path / "parquet", columns))
    with pytest.raises(UserError, match=r"parquet/0/1.png: not a readable image \(.*\); remove it$") as error:
        load_dataset(DataConfig(path), 8)[1, 0]
    assert "pyarrow" not in str(error.value)
    with pytest.raises(UserError, match=r"parquet/0/gone.png: the file is gone$"):
        load_dataset(DataConfig(path), 8)[2, 0]
    item = load_dataset(DataConfig(path, flip=False, skip_bad_images=True), 8)[1, 0]
    assert (item["index"], item["source"], item["label"]) == (1, 4, 1)
    assert "1.png: not a readable image" in item["replaced"], "its own, and not the last one that was passed over"


IMAGES = [b"0", b"1", b"22"]
FOUND = {  # columns: what is found, or the error
    "class labels win over numbers": ({"label": CLASSES, "size": datasets.Value("int64")}, "label", ["ant", "bee", "cat"]),
    "numbers are their own names": ({"year": [3, 0, 1]}, "year", ["0", "1", "2", "3"]),
    "texts become sorted names": ({"kind": ["ox", "elk", "ox"]}, "kind", ["elk", "ox"]),
    "no labels": ({"score": [0.5, 0.1, 0.2]}, None, ["."]),
}


@pytest.mark.parametrize("columns", FOUND)
def test_labels_are_found_by_type(tmp_path, columns):
    given, name, classes = FOUND[columns]
    typed = {key: value for key, value in given.items() if not isinstance(value, list)}
    given = {key: [0, 2, 2] if key in typed else value for key, value in given.items()}
    features = {"image": datasets.Value("binary"), **typed} if typed else None
    dataset = load_dataset(DataConfig(str(write(tmp_path / "data", {"image": IMAGES, **given}, features))), 8)
    assert dataset.classes == classes
    assert dataset.notes[0].endswith(f"images image, labels {name}" if name else "images image")
    folder = f"{classes[dataset.labels[2]]}/" if name else ""
    assert dataset.names[2] == f"{folder}row 2", "the table has no names of files"


MISTAKES = {
    "two columns of images": ({"a": IMAGES, "b": IMAGES}, {}, "2 columns of images; name one with --image-column"),
    "no images": ({"a": [1, 2, 3]}, {}, "has no columns of images"),
    "another type": ({"a": IMAGES, "b": [1, 2, 3]}, {"image_column": "b"}, "--image-column b: .* are a (images), b"),
    "two labels": ({"a": IMAGES, "b": [1, 2, 3], "c": [1, 2, 3]}, {}, "2 columns of .*name one with --label-column"),
    "no such label": ({"a": IMAGES, "b": [1, 2, 3]}, {"label_column": "c"}, "--label-column c: .* no such column"),
    "unknown labels": ({"a": IMAGES, "b": [1, -1, 3]}, {}, "row 1: its b is -1, no number of a class"),
    "empty labels": ({"a": IMAGES, "b": [1, 2, None]}, {}, "row 2: has no b"),
    "huge labels": ({"a": IMAGES, "b": [1, 2, 10**12]}, {}, "row 2: its b is 1000000000000, no"),
    "captions without an encoder": ({"a": IMAGES}, {"caption_column": "b"}, "--caption-column b: needs --text-encoder"),
    "two captions": ({"a": IMAGES, "b": ["x"] * 3, "c": [["x"]] * 3}, {"text_encoder": "t5"},
        "name one with --caption-column"),
    "blank captions": ({"a": IMAGES, "b": ["x", " ", "z"]}, {"text_encoder": "t5"}, "row 1: has no b"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_about_columns_get_one_line(tmp_path, name):
    columns, options, expected = MISTAKES[name]
    path = str(write(tmp_path / "data", columns))
    with pytest.raises(UserError, match=expected.replace("(", r"\(").replace(")", r"\)")) as error:
        load_dataset(DataConfig(path, **options), 8)
    assert "\n" not in str(error.value)
    assert path in str(error.value) or "--text-encoder" in str(error.value)


def test_several_columns_are_told_apart_by_their_options(tmp_path):
    columns = {"a": IMAGES, "b": IMAGES[::-1], "n": [0, 1, 1], "m": [1, 0, 0]}
    columns |= {"t": ["x", "y", "z"], "u": [["p"], ["q", "r"], ["s"]]}
    path = str(write(tmp_path / "data", columns))
    dataset = load_dataset(DataConfig(path, image_column="b", label_column="m"), 8)
    assert [dataset.file(i).read() for i in range(3)] == IMAGES[::-1]
    assert dataset.labels.tolist() == [1, 0, 0]
    dataset = load_dataset(DataConfig(path, image_column="a", caption_column="u", text_encoder="t5"), 8)
    assert dataset.captions.of(1) == ["q", "r"]
    assert dataset.classes == ["."], "numbers beside captions, such as widths, are not taken for classes"
    assert load_dataset(DataConfig(path, image_column="a", label_column="none"), 8).classes == ["."]
    assert load_dataset(DataConfig(path, image_column="a", label_column="t"), 8).classes == ["x", "y", "z"]


def test_other_pictures_of_the_same_labels_are_other_data(tmp_path):
    a, b = (load_dataset(DataConfig(str(write(tmp_path / name, {"image": images, "n": [0, 1, 1]}))), 8)
            for name, images in (("a", IMAGES), ("b", [b"0", b"11", b"22"])))  # fmt: skip
    assert a.fingerprint() != b.fingerprint()


def test_splits_are_told_by_names(tmp_path):
    for split, images in (("validation", IMAGES[:2]), ("test", IMAGES[:1]), ("train", IMAGES)):
        write(tmp_path / "data", {"image": images}, split=split)
    sizes = {split: len(load_dataset(DataConfig(f"{tmp_path}/data{split}"), 8)) for split in ("", ":validation", ":test")}
    assert sizes == {"": 3, ":validation": 2, ":test": 1}
    with pytest.raises(UserError, match="its splits are test, train, validation; name one of them: .*data:test"):
        load_dataset(DataConfig(f"{tmp_path}/data:dev"), 8)


def test_columns_of_what_is_no_table_and_names_that_are_not_there(tmp_path, image_folder):
    with pytest.raises(UserError, match="^--label-column x: .* is not Parquet or Arrow data; leave it out$"):
        load_dataset(DataConfig(str(image_folder), label_column="x"), 8)
    with pytest.raises(UserError, match="^--data-path owner/name: no usable table of images there") as error:
        load_dataset(DataConfig("owner/name"), 8)
    assert "\n" not in str(error.value)
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": []}, features).save_to_disk(tmp_path / "empty", num_shards=1)
    with pytest.raises(UserError, match="^--data-path .*empty: (holds no rows|no usable table of images in that folder)"):
        load_dataset(DataConfig(str(tmp_path / "empty")), 8)  # some versions of the package do not even open it
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.parquet").write_bytes(b"PAR1 is not enough")
    with pytest.raises(UserError, match="^--data-path .*bad: no usable table of images in that folder"):
        load_dataset(DataConfig(str(tmp_path / "bad")), 8)


def test_a_full_disk_is_noticed_before_the_conversion(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "data", {"image": [os.urandom(2000)] * 3, "label": [0, 1, 2]})
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("data.table.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match=f"needs 0.0 MB in {cache}, .* set HF_DATASETS_CACHE to a folder on another disk"):
        load_dataset(DataConfig(str(path)), 8)


def test_a_conversion_that_was_killed_is_made_again(tmp_path, cache, ranks):
    """By two processes at once, which wait for each other."""
    columns = {"image": [os.urandom(20_000) for _ in range(2000)], "n": [0] * 2000}
    path = write(tmp_path / "data", columns, row_group_size=50)

    def main(argv):
        print(load_dataset(DataConfig(str(path)), 8).fingerprint())

    before = {*cache.rglob("*.arrow")}
    first = ranks(main, [])
    wait_for(lambda: {*cache.rglob("*.arrow")} - before, pause=0.001)
    first.processes[0].kill()
    assert first.wait() == [-signal.SIGKILL]
    pair = ranks(main, [], world_size=2)
    assert pair.wait() == [0, 0], pair.text()
    assert pair.text(0) == pair.text(1) == f"{load_dataset(DataConfig(str(path)), 8).fingerprint()}\n"


def test_extracted_latents_are_the_same_bytes(tables, small_vae, tmp_path, ranks):
    options = ["--vae", small_vae, "--image-size", 16, "--shard-size", 5, "--batch-size", 2, "--device", "cpu", "--out"]
    for kind, world_size in (("files", 1), ("parquet", 2), ("arrow", 1)):
        run = ranks(extract_latents.main, ["--data-path", tables[kind], *options, tmp_path / kind], world_size)
        assert run.wait() == [0] * world_size, run.text()
    shards = sorted(path.name for path in (tmp_path / "files").glob("shard-*"))
    assert len(shards) == 3
    for kind in ("parquet", "arrow"):
        for shard in shards:
            assert (tmp_path / kind / shard).read_bytes() == (tmp_path / "files" / shard).read_bytes()


@pytest.mark.slow
def test_a_run_that_is_killed_three_times_is_the_undisturbed_one(tables, tmp_path, ranks):
    command = [*RUN, "--data-path", tables["parquet"], "--num-workers", 2, "--run-dir"]
    command += [tmp_path / "killed", "--val-data-path", tables["files"], "--val-every", 5]
    command += ["--image-column", "image", "--max-steps"]  # of the rows alone
    for steps in (3, 9, 15):
        run = ranks(paced, [*command, 100_000])
        wait_for(lambda: metrics(tmp_path / "killed")[-1]["step"] > steps)  # noqa: B023
        os.kill(run.processes[0].pid, signal.SIGKILL)
        assert run.wait() == [-signal.SIGKILL]
    end = latest(tmp_path / "killed")["step"] + 3
    assert ranks(train.main, [*command, end]).wait() == [0]
    command[command.index(tmp_path / "killed")] = tmp_path / "whole"
    assert ranks(train.main, [*command, end]).wait() == [0]
    assert_same_state(latest(tmp_path / "killed"), latest(tmp_path / "whole"))
    assert without_timings(tmp_path / "killed") == without_timings(tmp_path / "whole")


def test_a_run_is_the_same_from_files_and_from_rows_and_goes_on_from_the_other(tables, tmp_path, ranks):
    for path, folder, steps in (("files", "files", 6), ("parquet", "rows", 3), ("arrow", "rows", 6)):
        command = [*RUN, "--data-path", tables[path], "--run-dir", tmp_path / folder, "--max-steps", steps]
        run = ranks(train.main, [*command, "--num-workers", 0], world_size=2)
        assert run.wait() == [0, 0], run.text()
    assert_same_state(latest(tmp_path / "files"), latest(tmp_path / "rows"))


@pytest.fixture
def means(monkeypatch):
    """A feature network called mean: the colour of an image."""
    from evaluation.features import NETWORKS, FeatureNetwork, Outputs

    class Mean(FeatureNetwork):
        preprocessing, weights = "means", {"path": "", "sha256": "0" * 64}

        def outputs(self, images):
            return Outputs(pooled=images.float().mean((1, 2)))

    monkeypatch.setitem(NETWORKS, "mean", Mean)


def test_evaluation_measures_rows_as_files(tmp_path, means):
    random = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (tmp_path / "files" / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / "files" / name / f"{i}.jpg")
    features = {"image": datasets.Image(), "label": CLASSES}
    write(tmp_path / "rows", columns_of(tmp_path / "files"), features)
    files, rows = open_images(tmp_path / "files"), open_images(tmp_path / "rows")
    for images in (files, rows):
        images.check()
    assert rows.checksum() == files.checksum(), "features that --cache keeps are found again"
    assert (rows.labels.tolist(), rows.jpeg, rows.size) == (files.labels.tolist(), 1, (8, 8))
    assert np.array_equal(next(rows.batches(2, 7, 5)), next(files.batches(2, 7, 5)))
    options = ["--features", "mean", "--resamples", 0, "--device", "cpu"]
    for kind in ("files", "rows"):
        assert call(evaluate.main, tmp_path / "files", tmp_path / kind, *options) == 0
    reports = [json.loads((tmp_path / f"{kind}.metrics.json").read_text()) for kind in ("files", "rows")]
    numbers = [{**report, "date": None, "samples": None} for report in reports]
    assert numbers[0] == numbers[1]


def test_tables_beside_the_data_follow_its_column_where_they_have_one_of_that_name(tmp_path, capsys, means):
    """Held-out images and the reference of FID during training; and both sets of evaluate.py."""
    (tmp_path / "files/ant").mkdir(parents=True)
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(tmp_path / f"files/ant/{i}.png")
    pictures, kind = columns_of(tmp_path / "files")["image"], datasets.Image()
    pair = write(tmp_path / "pair", {"a": pictures, "b": pictures[:1] * 6}, {"a": kind, "b": kind})
    one, files = write(tmp_path / "one", {"picture": pictures}, {"picture": kind}), tmp_path / "files"

    options = [one, pair, "--features", "mean", "--resamples", 0, "--device", "cpu"]
    assert call(evaluate.main, *options) == 2
    assert "name one with --image-column; its columns are a (images), b (images)" in capsys.readouterr().err
    for column, close in (("a", True), ("b", False)):
        assert call(evaluate.main, *options, "--image-column", column) == 0
        report = json.loads((tmp_path / "pair.metrics.json").read_text())
        assert (report["networks"]["mean"]["fd"] < 1e-3) == close

    command = [*RUN, "--max-steps", 1, "--val-every", 1, "--eval-every", 1, "--eval-features", "mean"]
    command += ["--eval-samples", 2, "--eval-sampling-steps", 2, "--data-path"]
    for data, held_out, reference in ((files, pair, one), (one, one, pair)):
        words = [data, "--val-data-path", held_out, "--eval-reference", reference, "--run-dir", tmp_path / "refused"]
        assert call(train.main, *command, *words) == 2
        advice = "name one with --image-column, if --data-path has it too, or give data with one; its columns are a"
        assert advice in capsys.readouterr().err
    for option in ("--label-column", "--caption-column"):  # of held-out data, whose other columns are looked for, too
        with pytest.raises(UserError, match=f"name one with {option}, if --data-path has it too"), beside_the_data():
            raise UserError("--data-path x", "has 2 columns", f"name one with {option}; its columns are a, b")
    for held_out, reference in ((pair, one), (one, pair)):
        words = [pair, "--val-data-path", held_out, "--eval-reference", reference, "--image-column", "a"]
        assert call(train.main, *command, *words, "--run-dir", tmp_path / f"{held_out.name}-run") == 0


def test_rows_without_labels_that_are_known_can_be_measured(tmp_path):
    """A test set's labels are -1: training refuses them, evaluation does not need them."""
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "PNG")
    columns = {"image": [{"bytes": data.getvalue(), "path": f"{i}.png"} for i in range(3)], "label": [-1] * 3}
    images = open_images(write(tmp_path / "data", columns, {"image": datasets.Image(), "label": CLASSES}))
    assert images.labels is None
    assert [*images.names] == ["0.png", "1.png", "2.png"]


def test_training_data_without_the_package_is_one_line(tables, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="is a table, which needs the package datasets; pip install"):
        load_dataset(DataConfig(str(tables["parquet"])), 8)
    assert isinstance(load_dataset(DataConfig(str(tables["files"])), 8), ImageDataset), "folders need it not"
