"""extract_latents.py as a whole, and train.py from what it leaves: each image once, whoever encodes it; nothing lost by an
interruption; the same training as from images; and what mistakes get."""

import functools
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import call, latest, metrics, to_the_end, wait_for
from safetensors.numpy import load_file
from test_latents import rewrite

import extract_latents
import train
from data import extraction
from data.autoencoder import Autoencoder, LatentSpace
from data.config import DataConfig
from data.images import load_dataset
from data.latents import StoredLatents, read_settings
from data.order import GlobalOrder
from runtime import files as runtime_files
from runtime.distributed import Context
from training import setup

SHARDS = [f"shard-{number:05d}.safetensors" for number in range(4)]
OPTIONS = "--image-size 16 --batch-size 2 --shard-size 3 --num-workers 0 --device cpu".split()


def command(images, vae, out, *extra):
    return ["--data-path", images, "--vae", vae, "--out", out, *OPTIONS, *extra]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def one_line(capture):
    """The error that a command ended with."""
    error = capture.readouterr().err
    assert "Traceback" not in error
    return error.strip().split("\r")[-1].split("\n")[-1]


@pytest.fixture(scope="module")
def small_vae(small_vae, tmp_path_factory):
    """conftest's, with posteriors that tell images and flips apart: their means differ by far more than they are wide."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(small_vae)
    with torch.no_grad():
        vae.encoder.conv_out.weight[:4] *= 50
        vae.quant_conv.weight.copy_(torch.eye(8)[:, :, None, None])
        vae.quant_conv.bias.copy_(torch.tensor([0, 0, 0, 0, -2, -2, -2, -2]))
    folder = tmp_path_factory.mktemp("sharp_vae")
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(image_folder, small_vae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "latents"
    assert call(extract_latents.main, *command(image_folder, small_vae, folder)) == 0
    return folder


@pytest.fixture(scope="module")
def exact(image_folder, small_vae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exact") / "latents"
    assert call(extract_latents.main, *command(image_folder, small_vae, folder, "--dtype", "float32")) == 0
    return folder


def test_the_folder_is_as_documented(undisturbed, small_vae):
    assert sorted(files(undisturbed)) == SHARDS
    expected = {"vae": str(small_vae), "scaling": (0.18215,), "shift": (0,), "channels": 4, "factor": 8, "moments": 2,
        "image_size": 16, "dtype": "float16", "flip": True, "images": 12, "classes": ("ant", "bee", "cat")}  # fmt: skip
    settings = read_settings(undisturbed)
    assert {key: getattr(settings, key) for key in expected} == expected
    stored = StoredLatents(undisturbed)
    assert list(stored.names) == [f"{name}/{i}.png" for name in ("ant", "bee", "cat") for i in range(4)]
    assert stored.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for number, name in enumerate(SHARDS):
        arrays = load_file(undisturbed / name)  # by the library that others would read it with
        assert {name: (array.shape, str(array.dtype)) for name, array in arrays.items()} == {
            "moments": ((3, 2, 2, 4, 2, 2), "float16"), "label": ((3,), "int64"), "image": ((3,), "int64"),
            "name": ((29,), "uint8"), "errors": ((2,), "float64"), "sums": ((2, 4), "float64"),
        }  # fmt: skip
        assert arrays["image"].tolist() == [3 * number, 3 * number + 1, 3 * number + 2]


@pytest.mark.parametrize(("world_size", "workers"), [(2, 1), (3, 0)])
def test_bytes_do_not_depend_on_processes_or_workers(
    undisturbed, image_folder, small_vae, tmp_path, ranks, world_size, workers
):
    run = ranks(
        extract_latents.main, command(image_folder, small_vae, tmp_path / "out", "--num-workers", workers), world_size
    )
    assert run.wait() == [0] * world_size, run.text()
    assert files(tmp_path / "out") == files(undisturbed)


def counting(argv):
    """Notes each image that is encoded, and is killed while it would write the third shard."""
    add, write = extraction.ShardWriter.add, extraction.write_shard
    out = argv[argv.index("--out") + 1]

    def note(self, batch, failure):
        add(self, batch, failure)
        if batch is not None:
            with open(f"{out}.encoded", "a") as file:
                file.writelines(f"{index}\n" for index in batch["index"].tolist())

    def killed(folder, number, *parts):
        if number == 2 and not os.path.exists(f"{out}.killed"):
            open(f"{out}.killed", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        write(folder, number, *parts)

    extraction.ShardWriter.add, extraction.write_shard = note, killed
    extract_latents.main(argv)


def test_a_killed_run_makes_only_the_missing_shards(undisturbed, image_folder, small_vae, tmp_path, ranks):
    out = tmp_path / "latents"
    argv = [str(word) for word in command(image_folder, small_vae, out)]
    assert ranks(counting, argv).wait() == [-9]
    assert sorted(path.name for path in out.glob("*.safetensors")) == SHARDS[:2]
    before = {name: (out / name).stat().st_mtime_ns for name in SHARDS[:2]}
    run = ranks(counting, argv, 2)
    assert run.wait() == [0, 0], run.text()
    assert {name: (out / name).stat().st_mtime_ns for name in SHARDS[:2]} == before
    assert files(out) == files(undisturbed)
    encoded = sorted(map(int, (tmp_path / "latents.encoded").read_text().split()))
    # 6 and 7 were encoded, their shard was not written
    assert encoded == sorted([*range(12), 6, 7])


def test_a_kill_at_any_moment_loses_nothing(undisturbed, image_folder, small_vae, tmp_path, ranks):
    argv = command(image_folder, small_vae, tmp_path / "out")
    for delay in (0.02, 0.1, 0.2, 0.3):
        run = ranks(extract_latents.main, argv)
        time.sleep(delay)
        os.kill(run.processes[0].pid, signal.SIGKILL)
        assert run.wait()[0] in (0, -9)
    assert call(extract_latents.main, *argv) == 0
    assert files(tmp_path / "out") == files(undisturbed)


@pytest.mark.parametrize("damage", ["flipped byte", "gone", "cut", "other settings", "label"])
def test_what_is_damaged_is_found_and_made_again(undisturbed, image_folder, small_vae, tmp_path, capfd, damage):
    out = tmp_path / "latents"
    shutil.copytree(undisturbed, out)
    shard = out / SHARDS[1]
    content = bytearray(shard.read_bytes())
    if damage == "flipped byte":
        content[-50] ^= 1
        shard.write_bytes(content)
    elif damage == "cut":
        shard.write_bytes(content[:-1])
    elif damage == "gone":
        shard.unlink()
    else:
        rewrite(shard, {"label": np.ones(3, np.int64)} if damage == "label" else None, {"image_size": 24})
    others = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors") if path != shard}
    argv = command(image_folder, small_vae, out)
    assert call(extract_latents.main, *argv) == 0
    assert "1 of 4 shards to make" in capfd.readouterr().out
    assert {name: (out / name).stat().st_mtime_ns for name in others} == others
    assert files(out) == files(undisturbed)
    assert call(extract_latents.main, *argv) == 0
    assert "Nothing left to do" in capfd.readouterr().out


TRAIN = "--image-size 16 --num-classes 3 --hidden-size 16 --depth 1 --num-heads 2 --patch-size 1 --global-batch-size 4 "
TRAIN = (TRAIN + "--lr 1e-3 --device cpu --log-every 1 --num-workers 0 --max-steps 8").split()


def losses(folder, data_path, vae, *extra):
    assert call(train.main, *TRAIN, "--data-path", data_path, "--vae", vae, "--run-dir", folder, *extra) == 0
    return np.array([row["loss"] for row in metrics(folder)])


def test_training_from_latents_is_training_from_images(undisturbed, exact, image_folder, small_vae, tmp_path):
    """Eight updates over two and a half epochs, flips and label dropout included: in float32 the same losses, and
    in float16, which keeps 11 bits, nearly."""
    expected = losses(tmp_path / "images", image_folder, small_vae)
    stored, rounded = (losses(tmp_path / f.parent.name, f, small_vae) for f in (exact, undisturbed))
    straight = losses(tmp_path / "straight", undisturbed, small_vae, "--no-flip")
    apart = [np.abs(found / expected - 1).max() for found in (stored, rounded, straight)]
    print("largest relative difference of a loss: float32 {:.1e}, float16 {:.1e}, unmirrored {:.1e}".format(*apart))
    assert apart[0] < 1e-4
    assert apart[1] < 5e-4
    assert apart[2] > 2e-3, "the flips make a difference that the bands would show"


def noting_reads(argv):
    """Notes which latents are read, by any worker of any rank."""
    read = StoredLatents.__getitems__

    def note(self, keys):
        with open(f"{argv[argv.index('--run-dir') + 1]}.read", "a") as file:
            file.writelines(f"{index} {epoch}\n" for index, epoch in keys)
        return read(self, keys)

    StoredLatents.__getitems__ = note
    train.main(argv)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 2)])
def test_processes_and_workers_share_the_latents_of_each_batch(
    undisturbed, small_vae, tmp_path, ranks, world_size, workers
):
    """Each latent of the global batches is read exactly once, whatever the number of processes and workers."""
    argv = [*TRAIN, "--data-path", undisturbed, "--vae", small_vae, "--run-dir", tmp_path / "run", "--num-workers", workers]
    run = ranks(noting_reads, [str(word) for word in argv], world_size)
    assert run.wait() == [0] * world_size, run.text()
    assert latest(tmp_path / "run")["images_seen"] == 32
    read = [tuple(map(int, line.split())) for line in (tmp_path / "run.read").read_text().splitlines()]
    assert sorted(read) == sorted(key for batch in GlobalOrder(12, 4, seed=0, stop=32) for key in batch)


def test_training_holds_no_autoencoder_unless_it_evaluates(undisturbed, small_vae, tmp_path, monkeypatch):
    def space(data_path, vae, *extra):
        argv = [*TRAIN, "--data-path", data_path, "--vae", vae, *extra]
        config = train.make_parser().parse([str(word) for word in argv])
        context = Context(0, 0, 1, torch.device("cpu"))
        config, _ = setup.resolve(config, context)
        dataset, _ = setup.load_data(config.data, config.model, config.recipe, context)
        return setup.prepare(config, context, dataset)[0]

    assert type(space(undisturbed, small_vae)) is LatentSpace
    shutil.copytree(undisturbed, tmp_path / "released")
    for name in SHARDS:
        rewrite(tmp_path / "released" / name, settings={"vae": "ema"})
    # a hub's name is taken at its word: no network is asked
    assert type(space(tmp_path / "released", "ema")) is LatentSpace
    evaluating = space(undisturbed, small_vae, "--eval-every", 4, "--eval-reference", "reference.npz")
    assert evaluating.decode(torch.zeros(1, 4, 2, 2)).shape == (1, 3, 16, 16)


def test_a_run_from_images_goes_on_from_latents_only_when_told(undisturbed, image_folder, small_vae, tmp_path, capfd):
    losses(tmp_path, image_folder, small_vae, "--max-steps", 2)
    argv = [*TRAIN, "--data-path", undisturbed, "--vae", small_vae, "--run-dir", tmp_path]
    assert call(train.main, *argv) == 2
    assert "--data-path held 12 images" in one_line(capfd)
    assert call(train.main, *argv, "--allow-changes") == 0


def test_another_name_of_the_same_encoder_is_accepted(undisturbed, small_vae, tmp_path, capfd):
    """As "ema" and "mse" are: they share the encoder and differ in the decoder."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(small_vae)
    torch.nn.init.ones_(vae.decoder.conv_out.bias)
    vae.save_pretrained(tmp_path / "decoder")
    torch.nn.init.ones_(vae.encoder.conv_out.bias)
    vae.save_pretrained(tmp_path / "encoder")
    vae.register_to_config(scaling_factor=0.2)
    vae.encoder.load_state_dict(AutoencoderKL.from_pretrained(small_vae).encoder.state_dict())
    vae.save_pretrained(tmp_path / "scaling")
    losses(tmp_path / "run", undisturbed, tmp_path / "decoder", "--max-steps", 1)
    for other in (tmp_path / "encoder", tmp_path / "scaling", "none", tmp_path / "nowhere"):
        assert call(train.main, *TRAIN, "--data-path", undisturbed, "--vae", other) == 2
        error = one_line(capfd)
        assert f"--vae {other}: {undisturbed} holds latents of {small_vae}" in error
        assert f"pass --vae {small_vae}" in error


def test_other_weights_under_the_same_name_are_refused(image_folder, small_vae, tmp_path, capfd):
    from diffusers import AutoencoderKL

    shutil.copytree(small_vae, tmp_path / "vae")
    assert call(extract_latents.main, *command(image_folder, tmp_path / "vae", tmp_path / "latents")) == 0
    vae = AutoencoderKL.from_pretrained(small_vae)
    torch.nn.init.ones_(vae.encoder.conv_out.bias)
    vae.save_pretrained(tmp_path / "vae")
    assert call(train.main, *TRAIN, "--data-path", tmp_path / "latents", "--vae", tmp_path / "vae") == 2
    assert "this is not that autoencoder" in one_line(capfd)


def test_skip_bad_images_may_be_added_on_resuming_and_logs_a_file_once(image_folder, tmp_path, capfd):
    """The advice of the error has to work when it is followed."""
    shutil.copytree(image_folder, tmp_path / "images")
    (tmp_path / "images/ant/3.png").write_bytes(b"broken")
    argv = [*TRAIN, "--data-path", tmp_path / "images", "--vae", "none", "--run-dir", tmp_path / "run", "--max-steps", 12]
    assert call(train.main, *argv) == 2
    assert "remove it, or pass --skip-bad-images" in one_line(capfd)
    assert call(train.main, *argv, "--skip-bad-images") == 0
    assert (tmp_path / "run/log.txt").read_text().count("Skipped") == 1, "in four epochs"


def test_what_a_failed_start_was_begun_with_may_change(image_folder, small_vae, tmp_path, monkeypatch, capfd):
    """A bad image and too large a batch are found out while encoding; the way out must not be barred."""
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    (images / "cat/3.png").write_bytes(b"broken")  # in the last shard
    argv = command(images, small_vae, tmp_path / "out")
    assert call(extract_latents.main, *argv, "--shard-size", 12, "--batch-size", 3) == 2
    assert "pass --skip-bad-images" in one_line(capfd)
    assert call(extract_latents.main, *argv) == 2, "no shard was made: another batch size and shard size are taken"
    assert (tmp_path / "out" / SHARDS[2]).exists()
    assert call(extract_latents.main, *argv, "--batch-size", 3) == 2
    assert "begun with --batch-size 2, now 3" in one_line(capfd)
    assert call(extract_latents.main, *argv, "--skip-bad-images") == 0
    assert load_file(tmp_path / "out" / SHARDS[3])["image"].tolist() == [9, 10, 0], "of the next one that can be read"


def test_what_cannot_be_trained_on_is_refused(undisturbed, image_folder, small_vae, tmp_path, capfd):
    def bad(message, folder, *extra):
        assert call(train.main, *TRAIN, "--data-path", folder, "--vae", small_vae, *extra) == 2
        assert message in one_line(capfd)

    bad("pass --image-size 16, or extract others", undisturbed, "--image-size", 32)
    shutil.copytree(undisturbed, tmp_path / "unfinished")
    (tmp_path / "unfinished" / SHARDS[1]).unlink()
    bad("unfinished latents, 3 of 4 shards are there; run the same extract_latents.py", tmp_path / "unfinished")
    assert call(extract_latents.main, *command(image_folder, small_vae, tmp_path / "straight", "--no-flip")) == 0
    capfd.readouterr()
    assert load_file(tmp_path / "straight" / SHARDS[0])["moments"].shape == (3, 1, 2, 4, 2, 2)
    bad("--flip: ", tmp_path / "straight")
    losses(tmp_path / "run", tmp_path / "straight", small_vae, "--no-flip", "--max-steps", 1)


def test_too_small_a_disk_is_told_before_anything_is_written(image_folder, small_vae, tmp_path, capfd, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    argv = command(image_folder, small_vae, tmp_path / "out", "--image-size", 16 * 16, "--shard-size", 1)
    assert call(extract_latents.main, *argv) == 2
    assert "0.4 MB are still to be written, the disk has 0.1 MB free" in one_line(capfd)


def test_what_is_left_out_of_the_images_is_told(undisturbed, image_folder, small_vae, tmp_path, capfd):
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    (images / "bee/._1.png").write_bytes(b"not an image")
    (images / "cat/4.gif").touch()
    for folder in (".git", "bug"):
        (images / folder).mkdir()
    assert call(extract_latents.main, *command(images, small_vae, tmp_path / "out")) == 0
    text = capfd.readouterr().out
    assert f"Left out of {images}: folders without images, which are no classes: bug\n" in text
    assert "1 .gif" in text
    assert files(tmp_path / "out") == files(undisturbed)


def test_names_of_any_bytes_are_stored_and_trained_on(image_folder, small_vae, tmp_path, capfd):
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    (images / "cat").rename(os.fsdecode(os.fsencode(images) + b"/cat\xe9"))
    os.rename(images / "bee/1.png", os.fsencode(images) + b"/bee/\xff.png")
    out = tmp_path / "out"
    for message in ("latents of 12 images", "Nothing left to do"):
        assert call(extract_latents.main, *command(images, small_vae, out)) == 0
        assert message in capfd.readouterr().out
    assert all((images / name).is_file() for name in StoredLatents(out).names)
    assert StoredLatents(out).classes == ["ant", "bee", "cat\\udce9"]
    losses(tmp_path / "latents", out, small_vae, "--max-steps", 1)
    losses(tmp_path / "images_run", images, small_vae, "--max-steps", 1)


def test_imagenets_classes_have_readable_names_in_training_alone(image_folder, small_vae, tmp_path):
    """The folder of latents keeps the names of the folders, so that extractions begun before can be completed."""
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    for old, new in zip(("ant", "bee", "cat"), ("n02099601", "n02219486", "n02123045"), strict=True):
        (images / old).rename(images / new)
    assert call(extract_latents.main, *command(images, small_vae, tmp_path / "out")) == 0
    assert read_settings(tmp_path / "out").classes == ("n02099601", "n02123045", "n02219486")
    for path in (images, tmp_path / "out"):
        dataset = load_dataset(DataConfig(str(path)), 16)
        assert dataset.classes == ["golden retriever", "tabby", "ant"]


def test_a_second_run_is_refused(image_folder, small_vae, tmp_path, ranks, capfd):
    held = ranks(holding, [str(tmp_path)])
    wait_for(lambda: (tmp_path / "held").exists())
    assert call(extract_latents.main, *command(image_folder, small_vae, tmp_path)) == 2
    assert "another run is writing here" in one_line(capfd)
    (tmp_path / "held").unlink()
    assert held.wait() == [0]


def holding(argv):
    folder = Path(argv[0])
    lock = runtime_files.lock_folder(folder)
    (folder / "held").touch()
    while (folder / "held").exists():
        time.sleep(0.02)
    lock.close()


def test_bad_images_stop_the_run_or_are_replaced(image_folder, small_vae, tmp_path, ranks, capfd):
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    (images / "ant/3.png").write_bytes(b"broken")
    for world_size, workers in ((2, 0), (1, 1)):
        argv = command(images, small_vae, tmp_path / "stopped", "--num-workers", workers)
        run = ranks(extract_latents.main, argv, world_size)
        assert run.wait() == [2] * world_size, run.text()
        assert "3.png: not a readable image" in run.text()
        assert "Traceback" not in run.text(0) + run.text(world_size - 1)
    assert (tmp_path / "stopped" / SHARDS[0]).exists(), "the shard before it is kept"
    assert call(extract_latents.main, *command(images, small_vae, tmp_path / "out", "--skip-bad-images")) == 0
    assert "Skipped" in capfd.readouterr().out
    shard = load_file(tmp_path / "out" / SHARDS[1])
    np.testing.assert_allclose(shard["moments"][0], shard["moments"][1], rtol=1e-2, atol=1e-3)
    assert (shard["image"].tolist(), shard["label"].tolist()) == ([4, 4, 5], [1, 1, 1]), "of the image that is in its place"
    assert StoredLatents(tmp_path / "out").name(3) == "bee/0.png"


def test_an_unreadable_image_ends_the_command_and_its_workers(image_folder, small_vae, tmp_path, ranks):
    """In one process, whose interpreter would wait for data workers that something still refers to."""
    shutil.copytree(image_folder, tmp_path / "images")
    (tmp_path / "images/ant/3.png").write_bytes(b"broken")
    argv = command(tmp_path / "images", small_vae, tmp_path / "out", "--num-workers", 2)
    run = ranks(functools.partial(to_the_end, extract_latents.main), argv)
    assert run.wait(timeout=90) == [2], run.text()
    assert "3.png: not a readable image" in run.text().splitlines()[-1]


def limited(argv):
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))  # bytes; what the command prints is far less
    extract_latents.main(argv)


@pytest.mark.parametrize(("workers", "status", "message"), [
    (0, 1, "cannot be written ("),
    (1, 2, "a data worker died: RuntimeError: unable to resize file"),  # in shared memory, for images
])  # fmt: skip
def test_a_limit_of_file_sizes_ends_it_with_one_line(image_folder, small_vae, tmp_path, ranks, workers, status, message):
    argv = command(image_folder, small_vae, tmp_path / "out", "--num-workers", workers)
    run = ranks(limited, [*argv, "--image-size", 64, "--shard-size", 12])
    assert run.wait() == [status], run.text()
    assert message in run.text().splitlines()[-1]
    assert "Traceback" not in run.text()


def few_files(argv):
    there = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (there + 24, there + 24))
    to_the_end(extract_latents.main, argv)


def test_a_limit_of_open_files_ends_it_with_one_line(image_folder, small_vae, tmp_path, ranks):
    """Wherever it is noticed: as workers start, as they hand over batches, or as batches are received. Nothing waits."""
    run = ranks(few_files, command(image_folder, small_vae, tmp_path / "out", "--num-workers", 6, "--batch-size", 1))
    assert run.wait(timeout=90) in ([1], [2]), run.text()
    last = run.text().splitlines()[-1]
    assert "Too many open files" in last or "raise the limit with ulimit -n" in last
    assert "Traceback" not in run.text()


ABORTS = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    os.abort()
"""


def ctrl_c_while_importing(argv):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.modules.pop("data.extraction")
    sys.modules["data"].__path__ = [os.getcwd()]
    extract_latents.main(argv)


def test_ctrl_c_during_the_imports_is_no_traceback(image_folder, small_vae, tmp_path, ranks, monkeypatch):
    """PyTorch's C++ code, which imports modules, aborts where one of them raises."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "extraction.py").write_text(ABORTS)
    run = ranks(ctrl_c_while_importing, command(image_folder, small_vae, tmp_path / "out"))
    assert run.wait() == [130]
    assert run.text().endswith(": error: interrupted\n")
    assert run.text().count("\n") == 1


def full_disk(argv):
    def no_room(path, write):
        raise OSError("8192 requested and 0 written")  # as numpy says it

    if os.environ["RANK"] == "1":
        runtime_files.replace_file = no_room
    extract_latents.main(argv)


def test_a_full_disk_of_any_rank_stops_all_with_one_line(undisturbed, image_folder, small_vae, tmp_path, ranks):
    run = ranks(full_disk, command(image_folder, small_vae, tmp_path / "out"), 2)
    assert run.wait() == [1, 1], run.text()
    assert "cannot be written (8192 requested and 0 written); whole shards are kept" in run.text()
    assert "Traceback" not in run.text(0) + run.text(1)
    assert call(extract_latents.main, *command(image_folder, small_vae, tmp_path / "out")) == 0
    assert files(tmp_path / "out") == files(undisturbed)


def test_latents_that_are_not_finite_are_not_stored(image_folder, small_vae, tmp_path, capfd, monkeypatch):
    moments = Autoencoder.moments
    for factor, way_out in ((1e6, "pass --dtype float32"), (np.nan, "look at them, and at --vae")):
        monkeypatch.setattr(Autoencoder, "moments", lambda self, x, factor=factor: moments(self, x) * factor)
        assert call(extract_latents.main, *command(image_folder, small_vae, tmp_path)) == 2
        assert f"images 0 to 1: latents not finite as float16; {way_out}" in one_line(capfd)


def interrupted(argv):
    write = extraction.write_shard

    def ctrl_c(folder, number, *parts):
        write(folder, number, *parts)
        os.kill(os.getpid(), signal.SIGINT)

    extraction.write_shard = ctrl_c
    signal.signal(signal.SIGINT, signal.default_int_handler)
    extract_latents.main(argv)


def test_ctrl_c_ends_it_without_a_traceback(undisturbed, image_folder, small_vae, tmp_path, ranks):
    run = ranks(interrupted, command(image_folder, small_vae, tmp_path / "out", "--num-workers", 1))
    assert run.wait() == [130], run.text()
    assert "Traceback" not in run.text()
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == SHARDS[:1]
    assert call(extract_latents.main, *command(image_folder, small_vae, tmp_path / "out")) == 0
    assert files(tmp_path / "out") == files(undisturbed)


def interrupted_in_forks(argv):
    os.register_at_fork(before=lambda: os.kill(os.getpid(), signal.SIGINT))  # Python drops what a hook raises
    signal.signal(signal.SIGINT, signal.default_int_handler)
    extract_latents.main(argv)


def test_ctrl_c_while_workers_are_started_is_not_lost(image_folder, small_vae, tmp_path, ranks):
    run = ranks(interrupted_in_forks, command(image_folder, small_vae, tmp_path / "out", "--num-workers", 2))
    assert run.wait() == [130], run.text()
    assert "Exception ignored" not in run.text()
    assert "Traceback" not in run.text()
    assert not list((tmp_path / "out").glob("*.safetensors"))
