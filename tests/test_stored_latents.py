"""data/stored_latents.py: what is read is what was stored, drawn from and mirrored as encoding on the fly would; and every
folder that cannot be trusted is refused."""

import dataclasses
import importlib
import json
import pickle
import shutil
import zlib

import numpy as np
import pytest
import torch
from helpers import call
from hypothesis import given, settings
from hypothesis import strategies as st

import extract_latents
from data import stored_latents
from data.autoencoder import StoredSpace, load_space, to_model_range
from data.config import ExtractConfig
from data.extraction import begin
from data.images import ImageDataset
from data.order import GlobalOrder, is_mirrored, make_loader, next_batch
from data.stored_latents import (
    AGAIN,
    Settings,
    StoredLatents,
    is_complete,
    is_latents_folder,
    shard_path,
    write_index,
    write_shard,
)
from runtime.errors import UserError

SETTINGS = Settings(
    version=stored_latents.VERSION, vae="ema", encoder_crc32="0", scaling=0.5, shift=0.25, channels=4, factor=8,
    image_size=16, dtype="float16", mirrors=True, batch_size=2, shard_size=5, tf32=True, images=12, names_crc32="0",
    classes=("a", "b"),
)  # fmt: skip


def make(folder, random=None, **changes):
    """A finished folder of made-up moments. Returns them, of all images: (N, M, 2, C, h, w)."""
    made, random = dataclasses.replace(SETTINGS, **changes), random or np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for number in range(made.num_shards):
        moments = random.normal(size=made.shard_shape(number)).astype(made.dtype)
        parts.append(np.abs(moments))
        write_shard(folder, number, parts[-1])
    write_index(folder, made, [f"a/{i}.png" for i in range(made.images)], [i % 2 for i in range(made.images)])
    return np.concatenate(parts)


@given(
    images=st.integers(1, 20), shard_size=st.integers(1, 25), mirrors=st.booleans(), seed=st.integers(0, 9),
    dtype=st.sampled_from(["float16", "float32"]), image_size=st.sampled_from([8, 24]), keys=st.data(),
)  # fmt: skip
@settings(deadline=None, max_examples=25)
def test_a_batch_is_the_rows_that_its_keys_name(
    tmp_path_factory, images, shard_size, mirrors, seed, dtype, image_size, keys
):
    folder = tmp_path_factory.mktemp("latents")
    sizes = {"images": images, "shard_size": shard_size, "image_size": image_size}
    moments = make(folder, mirrors=mirrors, dtype=dtype, **sizes)
    stored = StoredLatents(folder, seed, flip=mirrors)
    keys = keys.draw(st.lists(st.tuples(st.integers(0, images - 1), st.integers(0, 50)), min_size=1, max_size=8))
    batch = stored.__getitems__(keys)
    assert batch["moments"].numpy().dtype == dtype
    assert (batch["index"].dtype, batch["label"].dtype) == (torch.int64, torch.int64)
    assert batch["replaced"] == [""] * len(keys)
    for row, (index, epoch) in enumerate(keys):
        side = is_mirrored(seed, index, epoch) if mirrors else 0
        assert np.array_equal(batch["moments"][row].numpy(), moments[index, side])
        assert (batch["index"][row], batch["label"][row]) == (index, index % 2)
        assert torch.equal(stored[index, epoch]["moments"], batch["moments"][row])
    assert (len(stored), stored.name(images - 1)) == (images, f"a/{images - 1}.png")


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_hands_over_whole_batches(tmp_path, workers):
    moments = make(tmp_path)
    stored = StoredLatents(tmp_path, flip=False)
    pickle.loads(pickle.dumps(stored))
    order = GlobalOrder(12, 5, seed=0, stop=24)
    seen = list(make_loader(stored, order, workers))
    assert [batch["index"].tolist() for batch in seen] == [[index for index, _ in keys] for keys in order]
    for batch in seen:
        assert np.array_equal(batch["moments"].numpy(), moments[batch["index"].numpy(), 0])


def test_a_latent_is_mirrored_where_its_image_would_be(tmp_path, image_folder):
    """The same run from images and from latents sees the same flips."""
    make(tmp_path)
    stored, straight = (StoredLatents(tmp_path, seed=3, flip=flip) for flip in (True, False))
    images, plain = (ImageDataset(image_folder, 16, seed=3, flip=flip) for flip in (True, False))
    for key in [(index, epoch) for index in range(12) for epoch in range(5)]:
        flipped = not torch.equal(images[key]["image"], plain[key]["image"])
        assert flipped != torch.equal(stored[key]["moments"], straight[key]["moments"])


def test_draws_have_the_stored_mean_and_deviation():
    space = StoredSpace(channels=4, factor=8, scaling=0.5, shift=0.25)
    moments = torch.rand(3, 2, 4, 2, 2).half()
    torch.manual_seed(0)
    draws = torch.stack([space.sample(moments) for _ in range(4000)])
    assert draws.dtype == torch.float32
    mean, std = moments.float().unbind(1)
    error = (draws.mean(0) - (mean - 0.25) * 0.5) / (std * 0.5 / 4000**0.5)
    assert error.abs().max() < 4.5, "standard errors; the largest of 48 is beyond 4.5 once in 3,000 seeds"
    torch.testing.assert_close(draws.std(0), std * 0.5, rtol=0.06, atol=0)  # its standard error is 1.1 %


@pytest.fixture(scope="module")
def extracted(image_folder, small_vae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("extracted") / "latents"
    argv = ["--data-path", image_folder, "--vae", small_vae, "--image-size", 16, "--shard-size", 5, "--batch-size", 2]
    assert call(extract_latents.main, *argv, "--out", folder, "--dtype", "float32", "--num-workers", 0) == 0
    return folder


def test_many_epochs_are_distributed_as_encoding_on_the_fly(extracted, image_folder, small_vae):
    """Each element's mean and standard deviation over epochs, flips and posterior draws, against the closed form that the
    moments give: half of the time the image's, half of the time the mirror's. Both ways of training have to agree."""
    space = load_space(str(small_vae)).place("cpu")
    stored = StoredLatents(extracted, seed=1)
    images = ImageDataset(image_folder, 16, seed=1)
    plain = ImageDataset(image_folder, 16, flip=False)[4, 0]["image"][None]
    both = to_model_range(torch.cat([plain, plain.flip(-1)]))
    mean, std = space.moments(both).unbind(1)
    mean, std = mean * space.scaling, std * space.scaling
    expected_mean = mean.mean(0)
    expected_std = (std.square().mean(0) + mean.var(0, correction=0)).sqrt()
    epochs, epochs_on_the_fly = 4000, 800
    torch.manual_seed(0)
    batch = stored.__getitems__([(4, epoch) for epoch in range(epochs)])
    on_the_fly = torch.stack([images[4, epoch]["image"] for epoch in range(epochs_on_the_fly)])
    for x_0 in (space.sample(batch["moments"]), space.encode(to_model_range(on_the_fly))):
        error = (x_0.mean(0) - expected_mean) / (expected_std / len(x_0) ** 0.5)
        assert error.abs().max() < 4.5, "standard errors, of 16 elements"
        torch.testing.assert_close(x_0.std(0), expected_std, rtol=4.5 / (2 * len(x_0)) ** 0.5, atol=0)


def test_the_mirrors_entry_is_the_mirrored_images_posterior(extracted, image_folder, small_vae):
    space = load_space(str(small_vae)).place("cpu")
    images = ImageDataset(image_folder, 16, flip=False)
    moments = np.concatenate([np.load(shard_path(extracted, number)) for number in range(3)])
    assert moments.shape == (12, 2, 2, 4, 2, 2)
    for index in range(12):
        pixels = to_model_range(images[index, 0]["image"][None])
        for side, view in enumerate([pixels, pixels.flip(-1)]):
            posterior = space.vae.encode(view).latent_dist
            expected = torch.stack([posterior.mean[0], posterior.std[0]])
            torch.testing.assert_close(torch.from_numpy(moments[index, side]), expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(moments[:, 0], moments[:, 1, ..., ::-1]), "which is not the posterior, mirrored"


def test_the_rounding_error_is_that_of_the_stored_numbers(tmp_path, image_folder, small_vae, extracted):
    argv = ["--data-path", image_folder, "--vae", small_vae, "--image-size", 16, "--batch-size", 2, "--num-workers", 0]
    assert call(extract_latents.main, *argv, "--out", tmp_path / "half") == 0
    half = np.load(shard_path(tmp_path / "half", 0)).astype(np.float64)
    exact = np.concatenate([np.load(shard_path(extracted, number)) for number in range(3)])
    told = json.loads((tmp_path / "half/index.json").read_text())["rounding"]
    # images 4 and 9 were in batches of other sizes, which may change their last bit
    mean = (half - exact)[:, :, 0] * 0.18215
    std = (half / exact - 1)[:, :, 1]
    assert told["mean_rms"] == pytest.approx(np.sqrt(np.square(mean).mean()), rel=0.05)
    assert told["std_relative_rms"] == pytest.approx(np.sqrt(np.square(std).mean()), rel=0.05)
    assert 1e-5 < told["std_relative_rms"] < 2.0**-11, "half a unit in the last place of float16 at the most"
    assert json.loads((extracted / "index.json").read_text())["rounding"] == {"mean_rms": 0, "std_relative_rms": 0}


def test_resuming_can_tell_latents_from_images_and_from_others(tmp_path, image_folder):
    make(tmp_path / "a")
    make(tmp_path / "b", random=np.random.default_rng(1))
    a, b = (StoredLatents(tmp_path / name).identity() for name in "ab")
    assert a != b
    assert a != ImageDataset(image_folder, 16).identity()
    assert a == StoredLatents(tmp_path / "a", seed=5, flip=False).identity()


def edit_index(**changes):
    def edit(folder):
        path = folder / "index.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def append(path, more):
    path.write_bytes(path.read_bytes() + more)


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


DAMAGES = [
    ("unfinished latents, there is no index.json yet; run the same", lambda f: (f / "index.json").unlink()),
    ("index.json: damaged; run the same", cut("index.json", 40)),
    (
        "index.json: damaged .version: is missing; it has no default.; run the same",
        lambda f: (f / "index.json").write_text("{}"),
    ),
    ("index.json: damaged .shard-size: '5' is not a whole number", edit_index(shard_size="5")),
    ("index.json: damaged .images: -12 is not a whole number, 1 or more", edit_index(images=-12)),
    ("index.json: damaged .image-size: 1000000000000 is not", edit_index(image_size=10**12)),
    ("index.json: damaged .shards: not one checksum for each shard", edit_index(shards=[{"crc32": 5}] * 3)),
    ("index.json: of format 2, known is 1; extract the latents again", edit_index(version=2)),
    (
        "shard-00001.npy: cannot be read .No such file or directory.; run the same",
        lambda f: (f / "shard-00001.npy").unlink(),
    ),
    ("shard-00002.npy: truncated or damaged; run the same", cut("shard-00002.npy", -1)),
    ("shard-00000.npy: truncated or damaged; run the same", cut("shard-00000.npy", 20)),
    ("shard-00000.npy: truncated or damaged; run the same", cut("shard-00000.npy", 0)),
    ("shard-00000.npy: not of the size", lambda f: np.save(f / "shard-00000.npy", np.zeros((5, 2, 2, 4, 1), np.float16))),
    ("shard-00002.npy: not of the size", lambda f: shutil.copy(f / "shard-00000.npy", f / "shard-00002.npy")),
    ("shard-00000.npy: not of the size", lambda f: append(f / "shard-00000.npy", b"more")),
    ("images.json: missing or damaged; run the same", lambda f: (f / "images.json").unlink()),
    ("images.json: missing or damaged", lambda f: (f / "images.json").write_text("[]")),
]


@pytest.mark.parametrize(("message", "damage"), DAMAGES)
def test_a_folder_that_is_not_whole_is_refused(tmp_path, message, damage):
    make(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        StoredLatents(tmp_path)
    assert "\n" not in str(error.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=5),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize("name", ["index.json", "images.json", "options.json", "shard-00001.json"])
def test_any_record_is_taken_or_refused_in_one_line(tmp_path_factory, image_folder, small_vae, name):
    """Other types, missing and additional keys, lists, huge numbers: nothing but a UserError of one line may follow."""
    folder = tmp_path_factory.mktemp("latents")
    vae = load_space(str(small_vae)).place("cpu")
    config = ExtractConfig(data_path=str(image_folder), out=str(folder), image_size=16)
    images = ImageDataset(image_folder, 16)
    made = begin(config, folder, images, vae)
    make(folder, **{**made.flat(), "shard_size": 5, "classes": ("a", "b", "c")})
    (folder / "options.json").write_text(json.dumps({**made.flat(), "shard_size": 5}))
    record = json.loads((folder / name).read_text())

    def use():
        if name in ("options.json", "shard-00001.json"):
            settings = begin(dataclasses.replace(config, shard_size=5), folder, images, vae)
            if all(is_complete(folder, number, settings) for number in range(settings.num_shards)):
                write_index(folder, settings, images.names, images.labels.tolist())
            return
        stored = StoredLatents(folder)
        stored.identity()
        for key in [(0, 0), (11, 1)]:
            stored.name(key[0])
            stored.open_space(stored.settings.vae).sample(stored.__getitems__([key])["moments"])

    @given(JSON, st.sampled_from(["", *record, *record]), st.booleans())
    @settings(deadline=None, max_examples=60)
    def holds(value, key, is_missing):
        """A key's value, or without a key the whole file."""
        changed = {k: v for k, v in {**record, key: value}.items() if not (k == key and is_missing)} if key else value
        before = {path.name: path.read_bytes() for path in folder.glob("*.json")}
        content = json.dumps(changed)
        (folder / name).write_text(content)
        if name == "images.json":  # under the right checksum
            edit_index(images_json_crc32=f"{zlib.crc32(content.encode()):08x}")(folder)
        message = ""
        try:
            use()
        except UserError as error:
            message = str(error)
        assert "\n" not in message
        for file, content in before.items():
            (folder / file).write_bytes(content)

    use()
    holds()


def test_a_shard_that_vanishes_later_is_named(tmp_path):
    make(tmp_path)
    stored = StoredLatents(tmp_path)
    (tmp_path / "shard-00001.npy").unlink()
    assert next_batch(iter(make_loader(stored, [[(0, 0)]])))[1] is None
    for workers in (0, 1):
        batches = iter(make_loader(stored, [[(7, 0)]], workers))
        expected = f"{tmp_path}/shard-00001.npy: cannot be read (No such file or directory); {AGAIN}"
        assert next_batch(batches) == (None, expected)


@pytest.mark.parametrize("unit", ["latents", "images"])
def test_benchmarks_measure(capsys, unit):
    benchmark = importlib.import_module(f"benchmarks.{unit}")
    argv = "--images 44 --image-size 16 --batch-size 2 --num-workers 0 --seconds 0.02 --repeats 2".split()
    assert call(benchmark.main, *argv, "--json") == 0
    row = json.loads(capsys.readouterr().out)[f"{unit}_per_second"]["0"]
    assert 0 < row["least"] <= row["median"] <= row["most"]
    if unit == "latents":
        assert call(benchmark.main, *argv, "--cold", "--images", 99) == 0
        assert "least to most of 2" in capsys.readouterr().out
        assert call(benchmark.main, *argv, "--cold") == 2
        assert "--images 44: --cold needs 84" in capsys.readouterr().err
    assert call(benchmark.main, *argv, "--folder", "nowhere") == 2
    assert "--folder nowhere: no such folder" in capsys.readouterr().err


def test_only_folders_of_latents_are_recognised(tmp_path, image_folder):
    make(tmp_path / "latents")
    (tmp_path / "options.json").write_text('{"lr": 1e-4}')  # as a training run's folder has one
    assert is_latents_folder(tmp_path / "latents")
    for other in (image_folder, tmp_path, tmp_path / "nowhere", "digits"):
        assert not is_latents_folder(other)
