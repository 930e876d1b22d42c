"""app.py: the page draws what sample.py draws, without a browser and in a real one."""

import base64
import contextlib
import functools
import io
import os
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import urllib.request
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import Ranks, call, to_the_end, wait_for
from PIL import Image
from reference import fill

import sample
from checkpoint import files
from models import DiT
from runtime.errors import UserError
from sampling import web
from sampling.config import ComputeConfig
from sampling.pipeline import Pipeline
from tools import app, convert

CPU = ComputeConfig(device="cpu")
VALUES = {
    "labels": ["3", "5"], "prompt": "", "samples_per_label": 2, "interpolate": False, "cfg_scale": 3.0, "sampler": "ddpm",
    "num_sampling_steps": 4, "seed": 0, "image_size": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def ckpt(tiny_checkpoint, tmp_path_factory):
    """A checkpoint whose weights are far from zero, so that all settings count."""
    state = files.load(tiny_checkpoint)
    weights = fill(DiT(**state["model_config"])).state_dict()
    path = tmp_path_factory.mktemp("lively") / "0000004.pt"
    files.save(path, {**state, "ema": {name: 0.5 * value for name, value in weights.items()}})
    return path


def drawn_by_page(artist, ckpt, **changes):
    """(config, images, captions) of the page's final picture."""
    *_, (config, step, images, captions) = artist.draw(web.page_config({**VALUES, "ckpt": str(ckpt), **changes}, CPU))
    assert step == 0
    return config, images, captions


def drawn_by_sample(command, folder):
    """The pixels of the grid that a command line of sample.py writes."""
    python, script, *words = shlex.split(command)
    assert (python, script) == ("python", "sample.py")
    assert call(sample.main, *words, "--output", folder / "sample.png") == 0
    with Image.open(folder / "sample.png") as picture:
        return np.asarray(picture.convert("RGB"))


def test_the_page_draws_what_sample_draws(ckpt, tmp_path):
    """With one artist, so that the model that it keeps is used again, for another seed, and for the first seed anew."""
    artist, seen = web.Artist(), set()
    for changes in (
        {}, {"cfg_scale": 1.0}, {"sampler": "dpm-solver++", "num_sampling_steps": 6}, {"seed": 7},
        {"interpolate": True, "samples_per_label": 3, "labels": ["0", "1", "9"]}, {"labels": list("0123456789")},
    ):  # fmt: skip
        config, images, captions = drawn_by_page(artist, ckpt, **changes)
        pixels = np.asarray(web.draw_grid(config, images, captions))
        assert np.array_equal(pixels, drawn_by_sample(web.command(config), tmp_path)), changes
        seen.add(pixels.tobytes())
    assert len(seen) == 6, "each of the settings must count"


def test_the_page_takes_what_a_file_records_of_its_drawing(ckpt, tmp_path):
    file, words = tmp_path / "small.safetensors", "--samples-per-label 3 --columns 3 --sampler ddim --eta 1 --enlarge 2"
    assert call(convert.main, ckpt, file, "--drawing", words) == 0
    for sampler, eta in (("ddim", 1), ("unipc", 0)):
        config, images, captions = drawn_by_page(web.Artist(), file, sampler=sampler)
        assert config.sampler.eta == eta
        pixels = np.asarray(web.draw_grid(config, images, captions))
        assert np.array_equal(pixels, drawn_by_sample(web.command(config), tmp_path))


def test_drawings_that_overlap_do_not_disturb_each_other(ckpt):
    """A drawing that was stopped goes on for a moment while the next visitor's begins. Both use torch's random stream."""
    expected = [drawn_by_page(web.Artist(), ckpt, seed=seed)[1] for seed in range(4)]
    artist, found = web.Artist(), {}

    def draw(seed):
        found[seed] = drawn_by_page(artist, ckpt, seed=seed)[1]

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[seed], expected[seed]) for seed in range(4))


def test_the_predicted_images_appear_during_sampling(ckpt, monkeypatch):
    monkeypatch.setattr(web, "PREVIEW_SECONDS", 0)
    monkeypatch.setattr(web, "time", SimpleNamespace(monotonic=lambda: 0.0))  # or fast steps would not be shown
    config = web.page_config({**VALUES, "ckpt": str(ckpt)}, CPU)
    shown = [(step, images.shape) for _, step, images, _ in web.Artist().draw(config)]
    assert shown == [(step, (4, 8, 8, 3)) for step in (3, 2, 1, 0)]


def test_pictures_carry_their_settings(ckpt, tmp_path):
    for changes in ({}, {"interpolate": True, "labels": ["3", "5", "5"], "samples_per_label": 4}):
        config, images, captions = drawn_by_page(web.Artist(), ckpt, **changes)
        path, singles, archive = web.write_pictures(tmp_path, config, images, captions)
        values = {**VALUES, "ckpt": str(ckpt), **changes}
        assert web.read_settings(path) == values
        assert len(singles) == len(images)
        for i, (single, caption) in enumerate(singles):
            assert web.read_settings(single) == values
            with Image.open(single) as picture:
                assert np.array_equal(np.asarray(picture), images[i])
                assert (picture.text["image"], picture.text["caption"]) == (str(i), caption)
        with zipfile.ZipFile(archive) as file:
            assert sorted(file.namelist()) == sorted([*(f"{i:03d}.png" for i in range(len(images))), "grid.png"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_sampling_steps": 0}, "Steps: 0 is not a whole number, 1 or more"),
        ({"cfg_scale": -1}, "Guidance: -1"),
        ({"cfg_scale": 1e39}, "Guidance is too large"),
        ({"seed": -1}, "Seed: -1"),
        ({"seed": 12.5}, "Seed: 12.5 is not a whole number"),
        ({"seed": None}, "Seed: None is not a whole number"),
        ({"samples_per_label": None, "interpolate": True}, "Number of images: None"),
        ({"samples_per_label": 0}, "Number of images: 0"),
        ({"samples_per_label": 1000}, "Number of images: 2000 in all are too many"),
        ({"labels": []}, "Classes: choose one or more"),
        ({"labels": ["10"]}, "Classes 10: out of range"),
        ({"labels": ["3"], "interpolate": True}, "Interpolate: needs two classes"),
        ({"samples_per_label": 1, "interpolate": True}, "Interpolate: needs two classes or more, and two images"),
        ({"sampler": "dpm-solver++", "num_sampling_steps": 1000}, "Sampler dpm-solver++: dpm-solver++ cannot make 1000"),
        ({"sampler": "nonsense"}, "Sampler: 'nonsense' is not one of"),
        ({"ckpt": "nowhere.pt"}, "nowhere.pt: no such file"),
    ],
)
def test_bad_values_get_a_message_in_the_pages_words(changes, words, ckpt):
    with pytest.raises(UserError) as error:
        drawn_by_page(web.Artist(), changes.pop("ckpt", ckpt), **changes)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_images_that_the_memory_cannot_hold_get_a_message(ckpt, monkeypatch):
    monkeypatch.setattr("runtime.devices.host_memory", lambda: 10_000)
    with pytest.raises(UserError, match="out of memory: .*draw fewer images at once"):
        drawn_by_page(web.Artist(), ckpt)


@pytest.mark.parametrize("content", [b"", b"no picture", "plain", '{"seed": -1}', "[]", "{", "{}", "3"])
def test_files_without_settings_get_a_message(content, tmp_path):
    path = tmp_path / "a.png"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        info = web.PngImagePlugin.PngInfo()
        info.add_text("settings" if content != "plain" else "other", content)
        Image.new("RGB", (2, 2)).save(path, pnginfo=info)
    with pytest.raises(UserError, match="holds no settings"):
        web.read_settings(path)


def test_checkpoints_are_found_the_newest_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="make demo"):
        web.find_checkpoints()
    names = ["demo/run/checkpoints/0000100.pt", "results/000-DiT-S-2/checkpoints/0000020.pt", "pretrained_models/a.pt"]
    for age, name in enumerate([*names, "results/b/checkpoints/0000030.pt.aside", "demo/x/0000001.pt"]):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
        os.utime(name, (1000 + age, 1000 + age))
    assert web.find_checkpoints() == [names[1], names[0], names[2]]
    assert web.find_checkpoints("own.pt") == ["own.pt", names[1], names[0], names[2]]
    assert web.find_checkpoints(names[0]) == [names[0], names[1], names[2]]
    Path("assets").mkdir()
    Path("assets/small.safetensors").touch()
    assert web.find_checkpoints() == ["assets/small.safetensors", names[1], names[0], names[2]]


def test_classes_are_offered_by_number_and_name(ckpt, tmp_path):
    choices, default, settings, sizes = web.offers(str(ckpt))
    assert choices == [(str(i), str(i)) for i in range(10)]
    assert default == [str(i) for i in range(8)]
    assert (settings, sizes) == (("dpm-solver++", 20, 4.0), ["8"])
    words = "--sampler ddim --num-sampling-steps 5 --cfg-scale 2"
    assert call(convert.main, ckpt, tmp_path / "small.safetensors", "--drawing", words) == 0
    assert web.offers(str(tmp_path / "small.safetensors")) == (choices, default, ("ddim", 5, 2), ["8"])
    state = torch.load(ckpt, weights_only=True)
    torch.save({**state, "class_names": ["ant", *"bcdefghij"]}, tmp_path / "named.pt")
    assert web.offers(str(tmp_path / "named.pt"))[0][:2] == [("0 ant", "0"), ("1 b", "1")]


def test_a_page_without_its_package_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for found, what in (((), "which is not installed"), ((6, 23), "6.24 or later, here is 6.23")):
        monkeypatch.setattr(app, "gradio_version", lambda found=found: found)
        assert call(app.main) == 2
        text = f'error: the page needs the package gradio, {what}; install it with: pip install "gradio>=6.24"\n'
        assert capsys.readouterr().err == f"{Path(sys.argv[0]).name}: {text}"


# ----------------------------------------------------------------------------------------------------------------------
# In a browser


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def chromium():
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:  # a package of the system, which `make setup` cannot install; .ci/run installs it
        pytest.skip("Chromium is not installed: apt-get install chromium")
    return path


@pytest.fixture(scope="module")
def url(ckpt, tmp_path_factory):
    """The address of a running app.py."""
    pytest.importorskip("gradio", reason="the package gradio is not installed")
    folder, port = tmp_path_factory.mktemp("app"), free_port()

    def paced(pipeline, *args, draw=Pipeline.steps, **options):
        for out in draw(pipeline, *args, **options):
            time.sleep(0.02)  # so that nobody's thousand steps are over before he has stopped them
            yield out

    def serve(argv):
        os.chdir(folder)
        Pipeline.steps = paced
        os.environ["TMPDIR"], tempfile.tempdir = str(folder), None
        app.main(argv)

    argv = ["--ckpt", ckpt, "--device", "cpu", "--port", port]
    command = functools.partial(to_the_end, serve)  # threads that are left would keep the process from ending
    run, address = Ranks(command, argv, 1, tmp_path_factory.mktemp("output") / "output"), f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: address in run.text())
        with contextlib.redirect_stderr(io.StringIO()) as error:
            assert call(app.main, *argv) == 2
        assert f": error: --host 127.0.0.1 --port {port}: cannot be listened on" in error.getvalue()
        assert error.getvalue().count("\n") == 1
        yield address
        os.kill(run.processes[0].pid, signal.SIGTERM)
        assert run.wait(60) == [0]
        assert not [*folder.iterdir()], "the pictures must be removed in the end"
    finally:
        run.processes[0].kill()


@pytest.fixture(scope="module")
def browser(chromium):
    sync_api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_the_page_is_served(url):
    with urllib.request.urlopen(url) as answer:
        assert answer.status == 200


class Visitor:
    """A visitor of the page in a window of its own. hosts: where the page has sent requests to."""

    def __init__(self, browser, url, width=1280):
        self.page, self.hosts = browser.new_context(viewport={"width": width, "height": 900}).new_page(), set()
        self.page.on("request", lambda request: self.hosts.add(urllib.parse.urlsplit(request.url).netloc))
        self.page.set_default_timeout(60_000)
        self.page.goto(url)
        self.button("Draw").wait_for()

    def button(self, name):
        return self.page.get_by_role("button", name=name)

    def choose(self, classes=(), **values):
        """Type classes to search for, and fill in fields by their titles."""
        field = self.page.get_by_label("Classes")
        if classes:
            self.page.get_by_title("Clear").click()
        for name in classes:
            field.fill(name)
            field.press("Enter")
        field.press("Escape")
        for title, value in values.items():
            self.page.get_by_label(title).fill(str(value))

    def status(self, text):
        self.page.locator("#status").get_by_text(text).wait_for()

    def picture(self):
        """The bytes of the grid's file, and its pixels as the browser shows them."""
        image = self.page.locator("#picture img")
        shown = image.evaluate("""async image => {
            await image.decode();
            const canvas = document.createElement("canvas");
            [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
            canvas.getContext("2d").drawImage(image, 0, 0);
            return canvas.toDataURL("image/png").split(",")[1];
        }""")
        file = urllib.request.urlopen(image.get_attribute("src")).read()
        return file, np.asarray(Image.open(io.BytesIO(base64.b64decode(shown))).convert("RGB"))


@pytest.mark.slow
def test_in_a_browser_the_picture_is_that_of_sample(url, browser, tmp_path):
    visitor = Visitor(browser, url)
    visitor.choose(["7", "2", "9"], Steps=5, Guidance=2.5, Seed=11)
    visitor.button("Draw").click()
    visitor.status("3 images")
    file, shown = visitor.picture()
    command = visitor.page.locator("#command code").inner_text()
    assert command.strip().split(" --labels ")[1] == "7 2 9 --seed 11 --columns 3 --enlarge 12 --captions"
    assert np.array_equal(shown, drawn_by_sample(command, tmp_path))
    assert np.array_equal(shown, np.asarray(Image.open(io.BytesIO(file)).convert("RGB")))

    # what is downloaded carries the settings, and the settings give the same picture in a new window
    with visitor.page.expect_download() as downloaded:
        visitor.page.locator("#picture").get_by_label("Download").click()
    downloaded.value.save_as(tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes() == file
    with visitor.page.expect_download() as downloaded:
        visitor.button("Download all").click()
    with zipfile.ZipFile(downloaded.value.path()) as archive:
        assert sorted(archive.namelist()) == ["000.png", "001.png", "002.png", "grid.png"]
    second = Visitor(browser, url)
    second.page.locator("input[type=file]").set_input_files(tmp_path / "grid.png")
    second.page.wait_for_function("[...document.querySelectorAll('input')].some(input => input.value === '11')")
    second.button("Draw").click()
    second.status("3 images")
    assert second.picture()[0] == file
    assert visitor.hosts | second.hosts == {url.removeprefix("http://")}, "the page must not use the network"


@pytest.mark.slow
def test_in_a_browser_visitors_wait_and_may_stop(url, browser):
    first, second = Visitor(browser, url), Visitor(browser, url)
    first.choose(Steps=1000)
    first.page.get_by_label("Sampler").click()
    first.page.get_by_role("option", name="ddpm").click()
    first.button("Draw").click()
    first.status("of 1000: the predicted images")
    second.choose(Steps=3)
    second.button("Draw").click()
    second.status("Waiting until the model is free")
    first.button("Stop").click()
    first.status("Stopped before")
    second.status("8 images")
    first.choose(Steps=0)
    first.button("Draw").click()
    first.page.get_by_text("Steps: 0 is not a whole number, 1 or more").wait_for()
    first.status("Nothing was drawn: the message says why")
    first.choose(Steps=3, Seed=12.5)
    first.button("Draw").click()
    first.page.get_by_text("Seed: 12.5 is not a whole number").wait_for()
    first.choose(Seed=12)
    first.button("Draw").click()
    first.status("8 images")


@pytest.mark.slow
def test_in_a_browser_the_page_fits_a_phone(url, browser):
    visitor = Visitor(browser, url, width=390)
    visitor.choose(Steps=3)
    visitor.button("Draw").click()
    visitor.status("8 images")
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 390
    for image in visitor.page.locator("#picture img, #singles img").all():
        box = image.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
