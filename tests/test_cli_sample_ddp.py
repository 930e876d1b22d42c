"""sample_ddp.py as a whole: images that depend on seed and index alone, and nothing lost by an interruption."""

import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import call, to_the_end
from PIL import Image

import sample_ddp
from checkpoint import files
from checkpoint.opened import record_of
from models import DiT
from runtime.errors import UserError
from runtime.npy import map_npz
from sampling import image_set, pipeline

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


@pytest.mark.parametrize(("world_size", "batch"), [(2, 3), (1, 8)])
def test_images_do_not_depend_on_processes_or_batch(undisturbed, tiny_checkpoint, tmp_path, ranks, world_size, batch):
    to_its_end = functools.partial(to_the_end, sample_ddp.main)
    run = ranks(to_its_end, command(tiny_checkpoint, tmp_path, "--per-proc-batch-size", batch), world_size)
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
    monkeypatch.setattr(image_set, "write_png", lambda path, pixels: full(path))
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
    leftovers = [tmp_path / "set/.000003.png.77.dit.tmp", tmp_path / ".set.npz.77.dit.tmp"]
    other = tmp_path / ".other.npz.77.dit.tmp"  # of a set that may be being made
    for path in (*leftovers, other):
        path.touch()
    assert call(sample_ddp.main, *command(tiny_checkpoint, tmp_path, "--per-proc-batch-size", 3)) == 0
    assert [path.exists() for path in (*leftovers, other)] == [False, False, True]
    assert (tmp_path / "set.npz").read_bytes() == (undisturbed / "set.npz").read_bytes()


def full_disk_of_rank_1(argv):
    if os.environ["RANK"] == "1":
        image_set.replace_file = mock.Mock(side_effect=OSError(28, "No space left on device"))
    sample_ddp.main(argv)


def test_an_error_of_any_rank_is_told(tiny_checkpoint, tmp_path, ranks):
    run = ranks(full_disk_of_rank_1, command(tiny_checkpoint, tmp_path, "--per-proc-batch-size", 3), 2)
    assert run.wait() == [1, 1], run.text()
    assert "000003.png: cannot be written (No space left on device)" in run.text()
    assert "Traceback" not in run.text(0) + run.text(1)


def test_labels_can_be_balanced(tiny_checkpoint, tmp_path):
    assert call(sample_ddp.main, *command(tiny_checkpoint, tmp_path, "--balanced-labels")) == 0
    assert read(tmp_path)[1].tolist() == [*range(10), 0]


def test_the_folder_is_named_after_the_settings(tiny_checkpoint, tmp_path):
    argv = command(tiny_checkpoint, tmp_path, "--cfg-scale", 2, "--global-seed", 7)
    argv.remove("--folder"), argv.remove("set")
    assert call(sample_ddp.main, *argv) == 0
    assert (tmp_path / "DiT-1x16-2-0000004-size-8-vae-none-cfg-2.0-seed-7.npz").is_file()


def test_other_settings_may_not_share_the_folder(undisturbed, tiny_checkpoint, capsys):
    before = (undisturbed / "set.npz").read_bytes()
    assert call(sample_ddp.main, *command(tiny_checkpoint, undisturbed), "--global-seed", 1) == 2
    assert "its images were made with --global-seed 0, now 1" in capsys.readouterr().err
    assert (undisturbed / "set.npz").read_bytes() == before


def test_another_checkpoint_of_the_same_name_may_not_share_the_folder(undisturbed, tiny_checkpoint, tmp_path, capsys):
    state = torch.load(tiny_checkpoint, weights_only=True)
    state["ema"]["final_layer.linear.bias"] += 1
    torch.save(state, tmp_path / tiny_checkpoint.name)
    assert call(sample_ddp.main, *command(tmp_path / tiny_checkpoint.name, undisturbed)) == 2
    assert "its images were made with a checkpoint of CRC-32" in capsys.readouterr().err


def test_options_that_are_newer_than_the_record_were_not_given(undisturbed, tiny_checkpoint, tmp_path, capsys):
    """What earlier versions did not record; tests/test_old_folders.py completes a set of theirs."""
    shutil.copytree(undisturbed, tmp_path / "copy")
    path = tmp_path / "copy/set/options.json"
    record = json.loads(path.read_text())
    assert (record.pop("labels"), record.pop("num_heads")) == (None, None)
    path.write_text(json.dumps(record))
    assert call(sample_ddp.main, *command(tiny_checkpoint, tmp_path / "copy", "--labels", 1)) == 2
    assert "its images were made with --labels None, now [1]" in capsys.readouterr().err
    assert call(sample_ddp.main, *command(tiny_checkpoint, tmp_path / "copy")) == 0
    assert json.loads(path.read_text()) == {**record, "labels": None, "num_heads": None}


def test_labels_can_be_chosen(tiny_checkpoint, tmp_path, capsys):
    argv = command(tiny_checkpoint, tmp_path, "--labels")
    assert call(sample_ddp.main, *argv, 7, "n02099601") == 2
    assert "--labels n02099601: no class is called that" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()
    assert call(sample_ddp.main, *argv, 7, 1, 7) == 0
    assert read(tmp_path)[1].tolist() == [7, 1, 7, 7, 1, 7, 7, 1, 7, 7, 1]
    assert json.loads((tmp_path / "set/options.json").read_text())["labels"] == [7, 1, 7]
    assert call(sample_ddp.main, *argv[:-1]) == 2
    assert "--labels [7, 1, 7], now None" in capsys.readouterr().err


def test_a_folder_in_an_images_place_is_one_line(tiny_checkpoint, tmp_path, capsys):
    assert call(sample_ddp.main, *command(tiny_checkpoint, tmp_path)) == 0
    (tmp_path / "set.npz").unlink()
    (tmp_path / "set/000003.png").unlink()
    (tmp_path / "set/000003.png").mkdir()
    assert call(sample_ddp.main, *command(tiny_checkpoint, tmp_path)) == 1
    assert "000003.png: cannot be written (Is a directory)" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE, errno.ESTALE])
def test_an_image_that_the_system_cannot_read_is_kept(undisturbed, tiny_checkpoint, tmp_path, monkeypatch, capsys, number):
    """It may be undamaged: it was deleted and drawn again."""
    shutil.copytree(undisturbed / "set", tmp_path / "set")
    opened = Image.open

    def fails(path, *args):
        if Path(path).name == "000004.png":
            raise OSError(number, os.strerror(number))
        return opened(path, *args)

    monkeypatch.setattr(Image, "open", fails)
    argv = command(tiny_checkpoint, tmp_path, "--per-proc-batch-size", 3)
    assert call(sample_ddp.main, *argv) == 1
    line = f"set/000004.png: cannot be read ({os.strerror(number)}); it is kept; run again when it can be read"
    assert line in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "set/000004.png").exists()
    monkeypatch.undo()
    assert call(sample_ddp.main, *argv) == 0
    assert (tmp_path / "set.npz").read_bytes() == (undisturbed / "set.npz").read_bytes()


def test_a_flows_set_says_which_sampler_it_was_drawn_with(tmp_path, capsys):
    model = DiT(8, 2, 1, 16, 1, 2, num_classes=3, objective="flow", predict="v", learn_sigma=False)
    files.save(
        tmp_path / "0000001.pt", {"ema": model.state_dict(), "args": {"vae": "none", "image_size": 8}, **record_of(model)}
    )
    argv = ["--ckpt", tmp_path / "0000001.pt", "--num-fid-samples", 2, "--device", "cpu", "--sample-dir", tmp_path]
    assert call(sample_ddp.main, *argv) == 0
    (npz,) = tmp_path.glob("*.npz")
    assert npz.stem.endswith("-0000001-size-8-vae-none-cfg-1.5-flow-heun-20-seed-0")
    record = json.loads((tmp_path / npz.stem / "options.json").read_text())
    assert (record["sampler"], record["num_sampling_steps"]) == ("flow-heun", 20)
    assert "20 steps of flow-heun" in capsys.readouterr().out


def test_sets_are_mapped(undisturbed, tmp_path):
    for name in ("arr_0", "arr_1"):
        mapped = map_npz(undisturbed / "set.npz", name)
        assert isinstance(mapped, np.memmap)
        with np.load(undisturbed / "set.npz") as found:
            assert np.array_equal(mapped, found[name])
    arrays = {"arr_0": np.arange(24.0).reshape(2, 3, 4), "b": np.int16(7), "long name " * 9: np.arange(3) > 1}
    np.savez(tmp_path / "a.npz", **arrays)
    for name, array in arrays.items():
        assert np.array_equal(map_npz(tmp_path / "a.npz", name), array)
    np.savez_compressed(tmp_path / "b.npz", **arrays)
    (tmp_path / "c.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-30])
    for path, name, kind in (("a.npz", "c", KeyError), ("b.npz", "arr_0", ValueError), ("c.npz", "arr_0", ValueError)):
        with pytest.raises(kind):
            map_npz(tmp_path / path, name)


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "lower --per-proc-batch-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "lower --per-proc-batch-size"),
        (MemoryError(), 1, "lower --per-proc-batch-size"),
    ],
)
def test_what_stops_it_is_one_line(tiny_checkpoint, tmp_path, monkeypatch, capsys, error, status, words):
    monkeypatch.setattr(pipeline.Pipeline, "noise", mock.Mock(side_effect=error))
    assert call(sample_ddp.main, *command(tiny_checkpoint, tmp_path)) == status
    out, err = capsys.readouterr()
    assert words in err.splitlines()[-1]
    assert (f"the same command draws the images that {tmp_path}/set still lacks" in out) == (status == 130)


def test_images_that_are_not_finite_are_not_written(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    steps = pipeline.Pipeline.steps
    monkeypatch.setattr(
        pipeline.Pipeline, "steps", lambda *args: ({**out, "sample": out["sample"] * torch.nan} for out in steps(*args))
    )
    assert call(sample_ddp.main, *command(tiny_checkpoint, tmp_path)) == 2
    assert "not finite: --cfg-scale is too large" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.rglob("*.png"))


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
            "import resource; from pathlib import Path; from sampling.image_set import write_npz\n"
            f"folder, shape = Path({str(folder)!r}), ({number}, 32, 32, 3)\n"
            "assert write_npz(folder.with_suffix('.npz'), folder, shape, lambda index: 0)\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        root = Path(sample_ddp.__file__).parent
        done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.splitlines()[-1]) / 1024)
        with np.load(f"{folder}.npz") as file:
            assert file["arr_0"].shape == (number, 32, 32, 3)
    print(f"peak memory for 1,000 and 10,000 images: {peaks[0]:.0f} and {peaks[1]:.0f} MiB")
    assert peaks[1] - peaks[0] < 10
