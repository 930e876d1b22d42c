"""evaluate.py as users run it, with the real network's architecture and random weights, on a few small images."""

import errno
import functools
import hashlib
import io
import json
import os
import shutil
import subprocess
import zipfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import to_the_end
from PIL import Image

import evaluate
from evaluation import comparison, image_sets
from evaluation.comparison import PUBLISHED
from evaluation.extraction import share
from evaluation.image_sets import checksum, open_images
from evaluation.inception import inception_weights, load_inception, port
from evaluation.metrics import Statistics, frechet_distance, inception_score, precision_recall
from runtime import download, files
from runtime.errors import UserError
from runtime.npy import read_npy_header

ROOT = Path(__file__).parent.parent
COUNTS = {"reference": 7, "samples": 5}  # a fifth of a second each; precision and recall need four


@pytest.fixture(scope="module")
def folder(tmp_path_factory, inception_file):
    """Weights, and two sets of 40x40 images, each as .npz and as folder of PNGs."""
    folder = tmp_path_factory.mktemp("evaluate")
    shutil.copy(inception_file, folder / "inception.pth")
    for seed, (name, n) in enumerate(COUNTS.items()):
        rng = np.random.default_rng(seed)
        colours = rng.integers(0, 256, (n, 5, 5, 3), dtype=np.uint8)
        images = colours.repeat(8, axis=1).repeat(8, axis=2)
        np.savez(folder / f"{name}.npz", images)
        (folder / name).mkdir()
        for i in rng.permutation(n):  # the order of writing must not matter
            Image.fromarray(images[i]).save(folder / name / f"{i:06d}.png")
    return folder


def images_of(folder, name):
    with np.load(folder / f"{name}.npz") as file:
        return file["arr_0"]


def main(*args):
    """The command in this process, for speed."""
    evaluate.main([*map(str, args), "--device", "cpu"])


def fails(capsys, *args):
    """The one line that a user's mistake gets."""
    with pytest.raises(SystemExit) as stop:
        main(*args)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def network_and_cache(folder):
    return "--inception-weights", folder / "inception.pth", "--cache", folder / "cache"


def report_of(samples):
    return json.loads(Path(f"{samples}.metrics.json").read_text())


def numbers(report):
    return [report[name] for name in PUBLISHED]


@pytest.fixture(scope="module")
def measured(folder):
    """One process, batches of 4, features into the cache: its output and report."""
    inputs = folder / "reference.npz", folder / "samples.npz"
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        main(*inputs, "--batch-size", 4, *network_and_cache(folder))
    return out.getvalue(), err.getvalue(), report_of(folder / "samples.npz")


def test_numbers_are_those_of_the_definitions(folder, measured):
    """Features of the whole set in one batch, and each metric from them directly."""
    network = load_inception(folder / "inception.pth")
    reference, samples = (network(torch.from_numpy(images_of(folder, name))) for name in COUNTS)
    fid, sfid = (
        frechet_distance(*(m for x in pair for m in (x.double().mean(0).numpy(), np.cov(x.double().numpy(), rowvar=False))))
        for pair in ((reference[i], samples[i]) for i in (0, 1))
    )
    expected = [fid, sfid, inception_score(samples[2]), *precision_recall(reference[0], samples[0])]
    assert numbers(measured[2]) == pytest.approx(expected, rel=1e-4)
    assert fid > 1e-3
    assert reference[1].shape == (7, 17 * 17 * 7)
    torch.testing.assert_close(reference[2], reference[0] @ network.network.fc.weight.T)


def test_spatial_features_run_over_height_width_channel(folder):
    """Against the layer's own output: channel-first order would not match published sFID statistics."""
    network = load_inception(folder / "inception.pth")
    seen = []
    network.network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    _, spatial, _ = network(torch.from_numpy(images_of(folder, "samples")[:2]))
    for n, row, column, channel in ((0, 0, 0, 6), (1, 3, 16, 2), (1, 16, 0, 0)):
        assert spatial[n, (row * 17 + column) * 7 + channel] == seen[0][n, channel, row, column]


def test_numbers_do_not_depend_on_processes_batches_and_file_order(folder, measured, ranks):
    """Two processes with another batch size read PNGs that were written in shuffled order. They end as interpreters do."""
    argv = [folder / "reference", folder / "samples", "--batch-size", 3, "--inception-weights", folder / "inception.pth"]
    run = ranks(functools.partial(to_the_end, evaluate.main), [*argv, "--device", "cpu"], 2)
    assert run.wait() == [0, 0], run.text() + run.text(1)
    report = report_of(folder / "samples")
    assert numbers(report) == pytest.approx(numbers(measured[2]), rel=1e-5)
    assert report["settings"]["processes"] == 2
    assert [run.text(rank).count("Inception Score  ") for rank in (0, 1)] == [1, 0], "one table, from rank 0"


def test_folders_are_listed_by_the_rules_of_training(folder, measured, tmp_path, capsys):
    """Linked folders were left out, hidden ones measured too, PPM refused, and ._0.png of a Mac ended the command."""
    images = sorted((folder / "samples").glob("*.png"))
    (tmp_path / "set/.git").mkdir(parents=True)
    (tmp_path / "set/cat").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "set/dog").symlink_to(tmp_path / "elsewhere")
    shutil.copy(images[0], tmp_path / "set/.git")
    for number, image in enumerate(images):
        shutil.copy(image, tmp_path / ("elsewhere" if number else "set/cat"))
    Image.open(images[1]).save(tmp_path / "elsewhere/1.ppm")
    (tmp_path / "elsewhere" / images[1].name).unlink()
    for left_out in ("._0.png", "0.gif"):
        (tmp_path / "set/cat" / left_out).write_bytes(b"no image")
    main(folder / "reference.npz", tmp_path / "set", "--batch-size", 4, *network_and_cache(folder))
    assert numbers(report_of(tmp_path / "set")) == pytest.approx(numbers(measured[2]), rel=1e-5)
    assert "set: files whose endings are not those of readable images: 1 .gif\n" in capsys.readouterr().out


def test_an_image_that_one_process_cannot_read_ends_all(folder, ranks, tmp_path):
    shutil.copytree(folder / "samples", tmp_path / "samples")
    last = tmp_path / "samples" / "000004.png"
    last.write_bytes(last.read_bytes()[:-40])
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    argv = [tmp_path / "statistics.npz", tmp_path / "samples", "--inception-weights", folder / "inception.pth"]
    run = ranks(evaluate.main, [*argv, "--device", "cpu", "--batch-size", 2], 2)
    assert run.wait() == [2, 2]
    assert "000004.png: not a readable image" in run.text(0).splitlines()[-1]
    assert run.text(1) == ""


def test_report_traces_the_numbers(folder, measured):
    out, err, report = measured
    for name, n in COUNTS.items():
        assert report[name]["images"] == n
        assert report[name]["sha256"] == checksum(folder / f"{name}.npz")
    assert report["inception_weights"]["sha256"] == checksum(folder / "inception.pth")
    assert report["settings"]["batch_size"] == 4
    assert report["versions"]["torch"] in torch.__version__
    assert any("fewer than 50000" in line for line in report["warnings"])
    assert "warning: 5 samples" in err
    assert "features of samples.npz" in err  # the progress bar
    assert f"{report['fid']:.3f}" in out


def test_checksum_of_a_folder_is_that_of_its_sha256sum_listing(folder):
    listing = subprocess.run("sha256sum *.png", shell=True, cwd=folder / "samples", capture_output=True).stdout
    assert open_images(folder / "samples").checksum() == hashlib.sha256(listing).hexdigest()


def test_cached_features_give_the_same_numbers_without_the_network(folder, measured, monkeypatch):
    monkeypatch.setattr(comparison, "extract_all", None)  # calling it would raise
    inputs = folder / "reference.npz", folder / "samples.npz"
    main(*inputs, *network_and_cache(folder))
    assert numbers(report_of(folder / "samples.npz")) == numbers(measured[2])
    with pytest.raises(TypeError):
        main(*inputs, *network_and_cache(folder)[:2])


def test_statistics_of_the_file_replace_those_of_its_images(folder, measured, tmp_path):
    """FID and sFID against Gaussians at 0; precision and recall from the images still, or none without images."""
    flat, flat_s = (np.diag((np.arange(dim) < 4).astype(float)) for dim in (2048, 2023))  # low ranks are quick
    unit = {"mu": np.zeros(2048), "sigma": flat, "mu_s": np.zeros(2023), "sigma_s": flat_s}
    np.savez(tmp_path / "both.npz", images_of(folder, "reference")[:4], **unit)
    main(tmp_path / "both.npz", folder / "samples.npz", *network_and_cache(folder))
    report = report_of(folder / "samples.npz")
    features = load_inception(folder / "inception.pth")(torch.from_numpy(images_of(folder, "samples")))
    for name, x in zip(("fid", "sfid"), features[:2], strict=True):
        x = Statistics(x.shape[1]).update(x)
        expected = frechet_distance(np.zeros(len(x.mu)), flat if name == "fid" else flat_s, x.mu, x.sigma)
        assert report[name] == pytest.approx(expected, rel=1e-5)
    assert report["inception_score"] == pytest.approx(measured[2]["inception_score"])
    assert report["precision"] is not None

    np.savez(tmp_path / "only.npz", mu=unit["mu"], sigma=unit["sigma"])
    main(tmp_path / "only.npz", folder / "samples.npz", *network_and_cache(folder))
    only = report_of(folder / "samples.npz")
    assert [only[name] is None for name in PUBLISHED] == [False, True, False, True, True]
    assert only["fid"] == pytest.approx(report["fid"], rel=1e-6)


def test_warns_of_another_size_and_of_one_class(folder, measured, capsys, tmp_path):
    np.savez(tmp_path / "flat.npz", np.zeros((4, 24, 32, 3), np.uint8), np.full(4, 207))
    main(folder / "reference.npz", tmp_path / "flat.npz", *network_and_cache(folder))
    err = capsys.readouterr().err
    assert "40x40 pixels, samples 32x24" in err
    assert "all images have the label 207" in err
    assert "100% of the samples into one class" in err


def test_warns_of_another_file_format(tmp_path):
    for suffix in ("png", "jpg"):
        (tmp_path / suffix).mkdir()
        for i in range(4):
            Image.new("RGB", (8, 8)).save(tmp_path / suffix / f"{i}.{suffix}")
    sets = {suffix: open_images(tmp_path / suffix) for suffix in ("png", "jpg")}
    (line,) = [line for line in comparison.check(sets["png"], sets["jpg"]) if "JPEG" in line]
    assert "0% of the reference are JPEG files, 100% of the samples" in line
    assert not [line for line in comparison.check(sets["jpg"], sets["jpg"]) if "JPEG" in line]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (np.arange(10).repeat(600), True),
        (np.tile(np.arange(3).repeat(50), 40), True),
        (np.arange(10).repeat(100), False),  # of one split, whose order does not matter
        (np.random.default_rng(0).integers(10, size=6000), False),
        (np.tile(np.arange(10), 600), False),
        (None, False),
    ],
)
def test_labels_in_order_are_noticed(labels, expected):
    """The Inception Score is of consecutive splits."""
    assert comparison.in_order(labels) == expected


def test_an_npz_that_the_system_cannot_read_is_not_called_damaged(folder, capsys, monkeypatch):
    stale = mock.Mock(side_effect=OSError(errno.ESTALE, os.strerror(errno.ESTALE)))
    for module, name in ((zipfile, "ZipFile"), (image_sets, "open")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, stale, raising=False)
            line = fails(capsys, folder / "reference.npz", folder / "samples.npz", *network_and_cache(folder))
            assert line.endswith(f"reference.npz: cannot be read ({os.strerror(errno.ESTALE)})")


def test_damaged_npz_is_noticed_while_it_is_read(folder, tmp_path):
    """A changed byte inside the images is caught by zip's checksum, a cut file at once; compressed files stream too."""
    images = images_of(folder, "samples")
    np.savez_compressed(tmp_path / "good.npz", images)
    good = open_images(tmp_path / "good.npz")
    assert np.array_equal(np.concatenate(list(good.batches(2, 5, 2))), images[2:])
    np.savez(tmp_path / "bad.npz", images)
    data = bytearray((tmp_path / "bad.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "bad.npz").write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        list(open_images(tmp_path / "bad.npz").batches(0, 5, 4))
    (tmp_path / "cut.npz").write_bytes(data[:5000])
    with pytest.raises(ValueError, match="cut short"):
        open_images(tmp_path / "cut.npz")
    assert zipfile.ZipFile(tmp_path / "good.npz").testzip() is None


def npy(array, version=(1, 0)):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version=version)
    return stream.getvalue()


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_npy_headers_of_every_version_are_read(version):
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    data = npy(array, version)
    stream = io.BytesIO(data)
    assert read_npy_header(stream, len(data)) == ((2, 3, 4), np.int16)
    assert stream.read() == array.tobytes()
    assert read_npy_header(io.BytesIO(npy(np.zeros((3, 2), order="F"))), row_major=False) == ((3, 2), np.float64)


def test_statistics_may_be_of_any_order_and_type_of_number(tmp_path):
    sigma = np.cov(np.random.default_rng(0).normal(size=(2048, 8))).astype(np.float32)
    np.savez(tmp_path / "good.npz", mu=np.arange(2048), sigma=np.asfortranarray(sigma))
    statistics = open_images(tmp_path / "good.npz").statistics
    assert np.array_equal(statistics["sigma"], sigma)
    assert np.array_equal(statistics["mu"], np.arange(2048.0))
    np.savez(tmp_path / "bad.npz", mu=np.full(2048, "1"), sigma=sigma)
    with pytest.raises(UserError, match="mu is <U1; must be floating-point numbers"):
        open_images(tmp_path / "bad.npz")


def test_a_damaged_statistic_is_noticed(tmp_path):
    np.savez(tmp_path / "bad.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    data = bytearray((tmp_path / "bad.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "bad.npz").write_bytes(data)
    with pytest.raises(UserError, match=r"bad.npz: damaged .npz file \(Bad CRC-32"):
        open_images(tmp_path / "bad.npz")


def test_an_image_that_is_no_regular_file_is_not_waited_for(folder, tmp_path):
    """As where it was replaced after the check; a reader of a FIFO would wait for ever."""
    shutil.copytree(folder / "samples", tmp_path / "images")
    os.mkfifo(tmp_path / "images/zzz.png")
    with pytest.raises(UserError, match=r"zzz.png: not a readable image \(not a regular file"):
        list(open_images(tmp_path / "images").batches(5, 6, 1))


def test_an_image_above_the_limit_of_pillow_gets_one_line(folder, capsys, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 40 // 3)
    line = fails(capsys, folder / "reference.npz", folder / "samples", *network_and_cache(folder))
    assert "000000.png: not a readable image (Image size (1600 pixels) exceeds limit" in line
    assert "skip-bad-images" not in line, "this command has no such option"


def test_rotation_in_exif_data_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (24, 32)).save(tmp_path / "0.png")
    Image.new("RGB", (32, 24)).save(tmp_path / "1.jpg", exif=exif)
    images = open_images(tmp_path)
    images.check()
    assert next(images.batches(0, 2, 2)).shape == (2, 32, 24, 3)
    Image.new("RGB", (32, 24)).save(tmp_path / "1.jpg")
    with pytest.raises(UserError, match="1.jpg: 32x24 pixels, but .*0.png has 24x32"):
        list(open_images(tmp_path).batches(0, 2, 2))


def test_file_names_may_hold_any_bytes(folder, tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.png"
    shutil.copy(folder / "samples" / "000000.png", path)
    listing = subprocess.run("sha256sum *.png", shell=True, cwd=tmp_path, capture_output=True).stdout
    assert open_images(tmp_path).checksum() == hashlib.sha256(listing).hexdigest()


def test_outputs_are_checked_before_anything_slow(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(comparison, "check", None)  # calling it would raise
    inputs = folder / "reference.npz", folder / "samples.npz"
    open_file = Path.open

    def closed(path, *mode):
        if path.parent.name == "cache":
            raise PermissionError(13, "Permission denied")
        return open_file(path, *mode)

    monkeypatch.setattr(Path, "open", closed)
    assert "--cache" in (line := fails(capsys, *inputs, "--cache", tmp_path / "cache"))
    assert "(Permission denied)" in line


def test_a_full_disk_loses_no_numbers(folder, measured, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(files, "replace_file", mock.Mock(side_effect=OSError(28, "No space left on device")))
    images = folder / "reference.npz", folder / "samples.npz"
    weights = "--inception-weights", folder / "inception.pth"
    with pytest.raises(SystemExit) as stop:
        main(*images, *weights, "--cache", tmp_path)
    out, err = capsys.readouterr()
    assert stop.value.code == 1
    assert f"{measured[2]['fid']:.3f}" in out
    assert err.count("cannot be written (No space left on device); the features are not kept") == 2
    assert "samples.npz.metrics.json: cannot be written (No space left on device)" in err.splitlines()[-1]


def test_damaged_features_in_the_cache_are_named(folder, measured, capsys, tmp_path):
    for path in (folder / "cache").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[:-1000])
    line = fails(capsys, folder / "reference.npz", folder / "samples.npz", *network_and_cache(folder)[:3], tmp_path)
    assert "--cache" in line
    assert "cannot be read" in line
    assert "delete it" in line


def test_the_network_is_downloaded_once_and_checked(monkeypatch, capsys, tmp_path, folder):
    """From an address on this disk. A file with another checksum than the one in its name never gets the name."""
    data = b"weights"
    source = tmp_path / f"weights-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    monkeypatch.setattr(port, "URL_INCEPTION_V3", source.as_uri())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    inputs = folder / "reference.npz", folder / "samples.npz"
    assert "download failed" in (line := fails(capsys, *inputs))
    assert "give the file as --inception-weights" in line
    source.write_bytes(b"Log in to the network first")
    assert "its SHA-256 is" in (line := fails(capsys, *inputs))
    assert "give the file as --inception-weights" in line
    target = tmp_path / "home/hub/checkpoints" / source.name
    assert not target.exists()
    source.write_bytes(data)
    monkeypatch.setattr(download, "fcntl", None)  # as on Windows
    assert inception_weights() == target
    source.unlink()
    assert inception_weights().read_bytes() == data


def test_loading_the_network_leaves_the_random_state(folder):
    before = torch.get_rng_state()
    load_inception(folder / "inception.pth")
    assert torch.equal(torch.get_rng_state(), before)


def test_shares_cover_every_item_once():
    for n in range(12):
        for world_size in range(1, 6):
            parts = [range(*share(n, rank, world_size)) for rank in range(world_size)]
            assert [i for part in parts for i in part] == list(range(n))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
