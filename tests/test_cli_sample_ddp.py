"""sample_ddp.py as a whole: images that depend on seed and index alone, and nothing lost by an interruption."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call
from PIL import Image

import sample_ddp
from runtime.errors import UserError
from sampling import pipeline as sampling

STEPS = ["--num-sampling-steps", "3", "--num-fid-samples", "11", "--device", "cpu", "--folder", "set"]


def command(ckpt, folder, *extra):
    return ["--ckpt", ckpt, *STEPS, "--sample-dir", folder, *extra]


def read(folder):
    with np.load(folder / "set.npz") as file:
        return file["arr_0"], file["arr_1"]


@pytest.fixture(scope="module")
def undisturbed(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert call(sample_ddp.main, *command(tiny_checkpoint, folder, "--per-proc-batch-size", 3)) == 0
    return folder


def test_the_set_is_as_published(undisturbed):
    images, labels = read(undisturbed)
    assert (images.shape, images.dtype) == ((11, 8, 8, 3), np.uint8)
    assert (labels.shape, labels.dtype) == ((11,), np.int64)
    assert ((labels >= 0) & (labels < 10)).all()
    assert sorted(p.name for p in (undisturbed / "set").glob("*.png")) == [f"{i:06d}.png" for i in range(11)]
    for i in range(11):
        assert np.array_equal(np.asarray(Image.open(undisturbed / f"set/{i:06d}.png")), images[i])
    assert len({image.tobytes() for image in images}) == 11, "no two images may be the same"


@pytest.mark.parametrize(("world_size", "batch"), [(2, 3), (1, 8), (2, 8)])
def test_images_do_not_depend_on_processes_or_batch(undisturbed, tiny_checkpoint, tmp_path, ranks, world_size, batch):
    run = ranks(sample_ddp.main, command(tiny_checkpoint, tmp_path, "--per-proc-batch-size", batch), world_size)
    assert run.wait() == [0] * world_size, run.text()
    (images, labels), (expected, expected_labels) = read(tmp_path), read(undisturbed)
    assert np.array_equal(labels, expected_labels)
    difference = np.abs(images.astype(int) - expected).max()
    assert difference <= (0 if batch == 3 else 1), "one grey level is allowed where the batch differs"


def test_decoding_aside_changes_nothing(undisturbed, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    """What GPUs do, with a CPU's threads: a batch is decoded and written while the next is drawn, and an error is told."""
    monkeypatch.setattr(sample_ddp, "DECODED_ASIDE", {"cpu"})
    assert call(sample_ddp.main, *command(tiny_checkpoint, tmp_path, "--per-proc-batch-size", 3)) == 0
    assert (tmp_path / "set.npz").read_bytes() == (undisturbed / "set.npz").read_bytes()
    monkeypatch.setattr(sample_ddp, "write_png", lambda path, pixels: full(path))
    assert call(sample_ddp.main, *command(tiny_checkpoint, tmp_path / "full")) == 2
    assert "000000.png: no space" in capsys.readouterr().err


def full(path):
    raise UserError(f"{path}: no space")


def test_compiled_blocks_draw_the_same_images(undisturbed, tiny_checkpoint, tmp_path, capsys):
    argv = command(tiny_checkpoint, tmp_path, "--per-proc-batch-size", 3, "--compile", "aot_eager")
    assert call(sample_ddp.main, *argv) == 0
    assert np.abs(read(tmp_path)[0].astype(int) - read(undisturbed)[0]).max() <= 1
    assert call(sample_ddp.main, *argv[:-2], "--num-fid-samples", 12) == 2, "sets of both may not be mixed"
    assert "compile aot_eager, now None" in capsys.readouterr().err


def test_an_interrupted_run_goes_on_byte_for_byte(undisturbed, tiny_checkpoint, tmp_path, capsys):
    argv = command(tiny_checkpoint, tmp_path, "--per-proc-batch-size", 3)
    assert call(sample_ddp.main, *argv, "--num-fid-samples", 6) == 0
    (tmp_path / "set/000001.png").unlink()
    half = tmp_path / "set/000004.png"
    half.write_bytes(half.read_bytes()[:40])
    (tmp_path / "set/000003.png").write_bytes(b"")
    (tmp_path / "set.npz").unlink()
    assert call(sample_ddp.main, *argv) == 0
    assert "2 damaged or missing images are drawn again" in capsys.readouterr().err
    assert (tmp_path / "set.npz").read_bytes() == (undisturbed / "set.npz").read_bytes()
    assert call(sample_ddp.main, *argv) == 0
    assert "Nothing left to do" in capsys.readouterr().out


def test_a_kill_between_the_last_image_and_the_npz_loses_nothing(undisturbed, tiny_checkpoint, tmp_path):
    argv = command(tiny_checkpoint, tmp_path, "--per-proc-batch-size", 3)
    assert call(sample_ddp.main, *argv) == 0
    (tmp_path / "set.npz").unlink()
    assert call(sample_ddp.main, *argv) == 0
    assert (tmp_path / "set.npz").read_bytes() == (undisturbed / "set.npz").read_bytes()


def test_a_kill_at_any_moment_loses_nothing(undisturbed, tiny_checkpoint, tmp_path, ranks):
    argv = command(tiny_checkpoint, tmp_path, "--per-proc-batch-size", 3)
    for delay in (0.02, 0.1, 0.2, 0.4):
        run = ranks(sample_ddp.main, argv)
        time.sleep(delay)
        os.kill(run.processes[0].pid, signal.SIGKILL)
        assert run.wait()[0] in (0, -9)
    assert call(sample_ddp.main, *argv) == 0
    assert (tmp_path / "set.npz").read_bytes() == (undisturbed / "set.npz").read_bytes()


def test_what_killed_writes_left_is_removed(undisturbed, tiny_checkpoint, tmp_path):
    (tmp_path / "set").mkdir()
    leftovers = [tmp_path / "set/.000003.png.77.tmp", tmp_path / ".set.npz.77.tmp"]
    other = tmp_path / ".other.npz.77.tmp"  # of a set that may be being made
    for path in (*leftovers, other):
        path.touch()
    assert call(sample_ddp.main, *command(tiny_checkpoint, tmp_path, "--per-proc-batch-size", 3)) == 0
    assert [path.exists() for path in (*leftovers, other)] == [False, False, True]
    assert (tmp_path / "set.npz").read_bytes() == (undisturbed / "set.npz").read_bytes()


def full_disk_of_rank_1(argv):
    def no_room(path, write):
        raise OSError(28, "No space left on device")

    if os.environ["RANK"] == "1":
        sample_ddp.files.replace_file = no_room
    sample_ddp.main(argv)


def test_an_error_of_any_rank_is_told(tiny_checkpoint, tmp_path, ranks):
    run = ranks(full_disk_of_rank_1, command(tiny_checkpoint, tmp_path, "--per-proc-batch-size", 3), 2)
    assert run.wait() == [2, 2], run.text()
    assert "000003.png: cannot be written (No space left on device)" in run.text()
    assert "Traceback" not in run.text(0) + run.text(1)


def test_labels_can_be_balanced(tiny_checkpoint, tmp_path):
    assert call(sample_ddp.main, *command(tiny_checkpoint, tmp_path, "--balanced-labels")) == 0
    assert read(tmp_path)[1].tolist() == [*range(10), 0]


def test_the_folder_is_named_after_the_settings(tiny_checkpoint, tmp_path):
    argv = command(tiny_checkpoint, tmp_path, "--cfg-scale", 2, "--global-seed", 7)
    argv.remove("--folder"), argv.remove("set")
    assert call(sample_ddp.main, *argv) == 0
    assert (tmp_path / "DiT-XL-2-0000004-size-8-vae-none-cfg-2.0-seed-7.npz").is_file()


@pytest.mark.parametrize("change", [["--cfg-scale", 3], ["--num-sampling-steps", 4], ["--global-seed", 1]])
def test_other_settings_may_not_share_the_folder(undisturbed, tiny_checkpoint, capsys, change):
    before = (undisturbed / "set.npz").read_bytes()
    assert call(sample_ddp.main, *command(tiny_checkpoint, undisturbed), *change) == 2
    assert f"{change[0][2:].replace('-', '_')} " in capsys.readouterr().err
    assert (undisturbed / "set.npz").read_bytes() == before


def test_another_checkpoint_of_the_same_name_may_not_share_the_folder(undisturbed, tiny_checkpoint, tmp_path, capsys):
    state = torch.load(tiny_checkpoint, weights_only=True)
    state["ema"]["final_layer.linear.bias"] += 1
    torch.save(state, tmp_path / tiny_checkpoint.name)
    assert call(sample_ddp.main, *command(tmp_path / tiny_checkpoint.name, undisturbed)) == 2
    assert "checkpoint_crc32" in capsys.readouterr().err


def test_an_images_numbers_are_its_own():
    a = sampling.image_noise(0, [5, 6, 7], 2, (1, 4, 4))
    assert a.shape == (3, 3, 1, 4, 4)
    assert torch.equal(a[:, 1:2], sampling.image_noise(0, [6], 2, (1, 4, 4)))
    assert not torch.equal(a, sampling.image_noise(1, [5, 6, 7], 2, (1, 4, 4)))
    assert len({sampling.image_label(0, i, 1000) for i in range(200)}) > 150
    labels = [sampling.image_label(0, i, 10) for i in range(2000)]
    assert min(labels.count(c) for c in range(10)) > 140  # 200 expected, 4.5 standard deviations


@pytest.mark.slow
def test_the_npz_is_written_in_constant_memory(tiny_checkpoint, tmp_path):
    """A tenfold set may not need noticeably more: its pixels alone are 26 MB more."""
    peaks = []
    for number in (1_000, 10_000):
        folder = tmp_path / str(number) / "set"
        folder.mkdir(parents=True)
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(folder / "000000.png")
        for i in range(1, number):
            os.link(folder / "000000.png", folder / f"{i:06d}.png")
        script = (
            "import argparse, resource, sample_ddp, sys; from pathlib import Path\n"
            f"args = argparse.Namespace(image_size=32, num_fid_samples={number}, balanced_labels=True, num_classes=10)\n"
            f"assert not sample_ddp.write_npz(Path({str(folder)!r} + '.npz'), Path({str(folder)!r}), args)\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        root = Path(sample_ddp.__file__).parent
        done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.splitlines()[-1]) / 1024)
        with np.load(f"{folder}.npz") as file:
            assert file["arr_0"].shape == (number, 32, 32, 3)
    print(f"peak memory for 1,000 and 10,000 images: {peaks[0]:.0f} and {peaks[1]:.0f} MiB")
    assert peaks[1] - peaks[0] < 10
