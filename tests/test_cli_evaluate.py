"""evaluate.py as users run it, with the real network's architecture and random weights, on a few small images."""

import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from evaluation.image_sets import checksum, open_images
from evaluation.inception import load_inception, share
from evaluation.metrics import Statistics, frechet_distance, inception_score, precision_recall

ROOT = Path(__file__).parent.parent
COUNTS = {"reference": 11, "samples": 9}


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
    return [report[name] for name in evaluate.METRICS]


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
    assert reference[1].shape == (11, 17 * 17 * 7)
    torch.testing.assert_close(reference[2], reference[0] @ network.network.fc.weight.T)


def test_spatial_features_run_over_height_width_channel(folder):
    """Against the layer's own output: channel-first order would not match published sFID statistics."""
    network = load_inception(folder / "inception.pth")
    seen = []
    network.network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    _, spatial, _ = network(torch.from_numpy(images_of(folder, "samples")[:2]))
    for n, row, column, channel in ((0, 0, 0, 6), (1, 3, 16, 2), (1, 16, 0, 0)):
        assert spatial[n, (row * 17 + column) * 7 + channel] == seen[0][n, channel, row, column]


@pytest.mark.slow
def test_numbers_do_not_depend_on_processes_batches_and_file_order(folder, measured):
    """Two processes with another batch size read PNGs that were written in shuffled order."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [ROOT / "evaluate.py", folder / "reference", folder / "samples", "--batch-size", "3", "--device", "cpu"]
    command += ["--inception-weights", folder / "inception.pth"]
    done = subprocess.run(map(str, command), capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    report = report_of(folder / "samples")
    assert numbers(report) == pytest.approx(numbers(measured[2]), rel=1e-5)
    assert report["settings"]["processes"] == 2
    assert done.stdout.count("Inception Score") == 1  # one table, from rank 0


def test_report_traces_the_numbers(folder, measured):
    out, err, report = measured
    for name, n in COUNTS.items():
        assert report[name]["images"] == n
        assert report[name]["sha256"] == checksum(folder / f"{name}.npz")
    assert report["inception_weights"]["sha256"] == checksum(folder / "inception.pth")
    assert report["settings"]["batch_size"] == 4
    assert report["versions"]["torch"] in torch.__version__
    assert any("fewer than 50000" in line for line in report["warnings"])
    assert "warning: 9 samples" in err
    assert "features of samples.npz" in err  # the progress bar
    assert f"{report['fid']:.3f}" in out


def test_checksum_of_a_folder_is_that_of_its_sha256sum_listing(folder):
    listing = subprocess.run("sha256sum *.png", shell=True, cwd=folder / "samples", capture_output=True).stdout
    assert checksum(folder / "samples", open_images(folder / "samples").files) == hashlib.sha256(listing).hexdigest()


def test_cached_features_give_the_same_numbers_without_the_network(folder, measured, monkeypatch):
    monkeypatch.setattr(evaluate, "extract", None)  # calling it would raise
    inputs = folder / "reference.npz", folder / "samples.npz"
    main(*inputs, *network_and_cache(folder))
    assert numbers(report_of(folder / "samples.npz")) == numbers(measured[2])
    with pytest.raises(TypeError):
        main(*inputs, *network_and_cache(folder)[:2])


def test_statistics_of_the_file_replace_those_of_its_images(folder, measured, tmp_path):
    """FID and sFID against unit Gaussians at 0; precision and recall from the images still, or none without images."""
    unit = {"mu": np.zeros(2048), "sigma": np.eye(2048), "mu_s": np.zeros(2023), "sigma_s": np.eye(2023)}
    np.savez(tmp_path / "both.npz", images_of(folder, "reference")[:4], **unit)
    main(tmp_path / "both.npz", folder / "samples.npz", *network_and_cache(folder))
    report = report_of(folder / "samples.npz")
    features = load_inception(folder / "inception.pth")(torch.from_numpy(images_of(folder, "samples")))
    for name, x in zip(("fid", "sfid"), features[:2], strict=True):
        x = Statistics(x.shape[1]).update(x)
        zero, eye = np.zeros(len(x.mu)), np.eye(len(x.mu))
        assert report[name] == pytest.approx(frechet_distance(zero, eye, x.mu, x.sigma), rel=1e-5)
    assert report["inception_score"] == pytest.approx(measured[2]["inception_score"])
    assert report["precision"] is not None

    np.savez(tmp_path / "only.npz", mu=unit["mu"], sigma=unit["sigma"])
    main(tmp_path / "only.npz", folder / "samples.npz", *network_and_cache(folder))
    only = report_of(folder / "samples.npz")
    assert [only[name] is None for name in evaluate.METRICS] == [False, True, False, True, True]
    assert only["fid"] == pytest.approx(report["fid"], rel=1e-6)


def test_warns_of_another_size_and_of_one_class(folder, measured, capsys, tmp_path):
    np.savez(tmp_path / "flat.npz", np.zeros((4, 24, 32, 3), np.uint8), np.full(4, 207))
    main(folder / "reference.npz", tmp_path / "flat.npz", *network_and_cache(folder))
    err = capsys.readouterr().err
    assert "40x40 pixels, samples 32x24" in err
    assert "all images have the label 207" in err
    assert "100% of the samples into one class" in err


def test_mistakes_in_npz_files_get_one_line(folder, capsys, tmp_path):
    def mistake(**arrays):
        np.savez(tmp_path / "bad.npz", **arrays)
        return fails(capsys, folder / "reference.npz", tmp_path / "bad.npz", *network_and_cache(folder))

    images = images_of(folder, "samples")
    assert "float32 with values from -1 to 1" in mistake(arr_0=(images > 127).astype(np.float32) * 2 - 1)
    assert "(9, 3, 40, 40); must be (N, H, W, 3)" in mistake(arr_0=images.transpose(0, 3, 1, 2).copy())
    assert "needs arr_0" in mistake(pictures=images)
    assert "only one of mu and sigma" in mistake(arr_0=images, mu=np.zeros(2048))
    assert "mu has shape (5,)" in mistake(mu=np.zeros(5), sigma=np.eye(5))
    assert "3 images; at least 4" in mistake(arr_0=images[:3])
    assert "no such file" in fails(capsys, tmp_path / "none", tmp_path / "bad.npz")
    (tmp_path / "text.npz").write_text("no zip")
    assert "not a .npz file" in fails(capsys, tmp_path / "text.npz", tmp_path / "bad.npz")


def test_damaged_npz_is_noticed_while_it_is_read(folder, tmp_path):
    """A changed byte inside the images is caught by zip's checksum, a cut file at once; compressed files stream too."""
    images = images_of(folder, "samples")
    np.savez_compressed(tmp_path / "good.npz", images)
    good = open_images(tmp_path / "good.npz")
    assert np.array_equal(np.concatenate(list(good.batches(2, 9, 4))), images[2:])
    np.savez(tmp_path / "bad.npz", images)
    data = bytearray((tmp_path / "bad.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "bad.npz").write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        list(open_images(tmp_path / "bad.npz").batches(0, 9, 4))
    (tmp_path / "cut.npz").write_bytes(data[:5000])
    with pytest.raises(ValueError, match="cut short"):
        open_images(tmp_path / "cut.npz")
    assert zipfile.ZipFile(tmp_path / "good.npz").testzip() is None


def test_mistakes_in_folders_get_one_line(folder, capsys, tmp_path):
    def mistake():
        return fails(capsys, folder / "reference.npz", tmp_path, *network_and_cache(folder))

    assert "no image in this folder" in mistake()
    for i in range(4):
        Image.new("RGB", (32, 32), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
    Image.new("RGB", (48, 32)).save(tmp_path / "4.png")
    assert "4.png: 48x32 pixels, but" in mistake()
    (tmp_path / "4.png").write_bytes(b"not an image")
    assert "4.png: not a readable image" in mistake()
    data = (folder / "samples" / "000000.png").read_bytes()
    (tmp_path / "4.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"4.png: damaged image"):
        list(open_images(tmp_path).batches(4, 5, 1))
    Image.fromarray(np.full((32, 32), 40000, np.uint16)).save(tmp_path / "4.png")
    with pytest.raises(ValueError, match="more than 8 bits"):
        list(open_images(tmp_path).batches(4, 5, 1))


def test_mistakes_in_options_get_one_line(folder, monkeypatch, capsys, tmp_path):
    inputs = folder / "reference.npz", folder / "samples.npz"
    assert "both are needed" in fails(capsys, inputs[0])
    assert "none.pth: no such file" in fails(capsys, *inputs, "--inception-weights", "none.pth")
    assert "its folder is missing" in fails(capsys, inputs[0], tmp_path / "none" / "samples.npz")

    def offline(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert "give it as --inception-weights" in fails(capsys, *inputs)


def test_weights_that_are_code_or_another_network_are_refused(folder, capsys, tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    inputs = folder / "reference.npz", folder / "samples.npz", "--inception-weights", tmp_path / "weights.pth"
    (tmp_path / "weights.pth").write_bytes(pickle.dumps(Code(), protocol=2))
    assert "weights.pth: not the weights" in fails(capsys, *inputs)
    torch.save({"code": Code()}, tmp_path / "weights.pth")
    assert "weights.pth: not the weights" in fails(capsys, *inputs)
    assert not (tmp_path / "ran").exists()
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "weights.pth")
    assert "weights.pth: not the weights" in fails(capsys, *inputs)


def test_reproduce_lists_both_tables_and_puts_measured_rows_below(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("samples").mkdir()
    row = Path("samples/DiT-XL-2-pretrained-size-256-vae-ema-cfg-1.5-seed-0.npz.metrics.json")
    row.write_text(json.dumps({**dict.fromkeys(evaluate.METRICS, 0.125), "samples": {"images": 50000}}))
    main("--reproduce")
    out = capsys.readouterr().out
    assert out.count("sample_ddp.py") == out.count("evaluate.py") == out.count("published") == 6
    assert out.count("measured") == 1
    published, measured = (out.index(text) for text in ("278.24", "measured (50000 images)"))
    assert 0 < measured - published < 100


def test_shares_cover_every_item_once():
    for n in range(12):
        for world_size in range(1, 6):
            parts = [range(*share(n, rank, world_size)) for rank in range(world_size)]
            assert [i for part in parts for i in part] == list(range(n))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
