"""data/latents.py: what is read is what was stored, drawn from and flipped as encoding on the fly would; and every
folder that cannot be trusted is refused."""

import dataclasses
import errno
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from helpers import call
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import extract_latents
from data import latents
from data.autoencoder import LatentSpace, load_space, to_model_range
from data.config import ExtractConfig
from data.extraction import begin
from data.images import ImageDataset
from data.latents import (
    AGAIN,
    Settings,
    StoredLatents,
    is_complete,
    is_latents_folder,
    read_statistics,
    shard_path,
    write_shard,
)
from data.order import GlobalOrder, is_flipped, make_loader, next_batch
from data.statistics import channel_statistics, channel_sums
from runtime.errors import UserError

SETTINGS = Settings(
    vae="ema", encoder_crc32="0", scaling=(0.5,), shift=(0.25,), channels=4, factor=8, moments=2, image_size=16,
    dtype="float16", flip=True, batch_size=2, shard_size=5, tf32=True, images=12, names_crc32="0", classes=("a", "b"),
)  # fmt: skip


def make(folder, random=None, **changes):
    """A finished folder of made-up moments. Returns them, of all images: (N, F, M, C, h, w)."""
    made, random = dataclasses.replace(SETTINGS, **changes), random or np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for number in range(made.num_shards):
        parts.append(np.abs(random.normal(size=made.shard_shape(number)).astype(made.dtype)))
        images = np.arange(number * made.shard_size, number * made.shard_size + len(parts[-1]))
        name = np.frombuffer("\0".join(f"a/{image}.png" for image in images).encode(), np.uint8)
        arrays = {"moments": parts[-1], "label": images % 2, "image": images, "name": name, "errors": np.zeros(2)}
        write_shard(folder, number, made, arrays)
    return np.concatenate(parts)


@given(
    images=st.integers(1, 20), shard_size=st.integers(1, 25), flip=st.booleans(), seed=st.integers(0, 9),
    dtype=st.sampled_from(["float16", "float32"]), image_size=st.sampled_from([8, 24]), keys=st.data(),
)  # fmt: skip
@settings(deadline=None, max_examples=25)
def test_a_batch_is_the_rows_that_its_keys_name(tmp_path_factory, images, shard_size, flip, seed, dtype, image_size, keys):
    folder = tmp_path_factory.mktemp("latents")
    sizes = {"images": images, "shard_size": shard_size, "image_size": image_size}
    moments = make(folder, flip=flip, dtype=dtype, **sizes)
    stored = StoredLatents(folder, seed, flip=flip)
    keys = keys.draw(st.lists(st.tuples(st.integers(0, images - 1), st.integers(0, 50)), min_size=1, max_size=8))
    batch = stored.__getitems__(keys)
    assert batch["moments"].numpy().dtype == dtype
    assert (batch["index"].dtype, batch["label"].dtype) == (torch.int64, torch.int64)
    assert batch["replaced"] == [""] * len(keys)
    for row, (index, epoch) in enumerate(keys):
        side = is_flipped(seed, index, epoch) if flip else 0
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


def test_a_latent_is_flipped_where_its_image_would_be(tmp_path, image_folder):
    """The same run from images and from latents sees the same flips."""
    make(tmp_path)
    stored, straight = (StoredLatents(tmp_path, seed=3, flip=flip) for flip in (True, False))
    images, plain = (ImageDataset(image_folder, 16, seed=3, flip=flip) for flip in (True, False))
    for key in [(index, epoch) for index in range(12) for epoch in range(5)]:
        flipped = not torch.equal(images[key]["image"], plain[key]["image"])
        assert flipped != torch.equal(stored[key]["moments"], straight[key]["moments"])


def test_draws_have_the_stored_mean_and_deviation():
    space = LatentSpace(channels=4, factor=8, scaling=0.5, shift=0.25)
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
    moments give: half of the time the image's, half of the time the flip's. Both ways of training have to agree."""
    space = load_space(str(small_vae)).to("cpu")
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


def test_the_flips_entry_is_the_flipped_images_posterior(extracted, image_folder, small_vae):
    space = load_space(str(small_vae)).to("cpu")
    images = ImageDataset(image_folder, 16, flip=False)
    moments = np.concatenate([load_file(shard_path(extracted, number))["moments"] for number in range(3)])
    assert moments.shape == (12, 2, 2, 4, 2, 2)
    for index in range(12):
        pixels = to_model_range(images[index, 0]["image"][None])
        for side, view in enumerate([pixels, pixels.flip(-1)]):
            posterior = space.vae.encode(view).latent_dist
            expected = torch.stack([posterior.mean[0], posterior.std[0]])
            torch.testing.assert_close(torch.from_numpy(moments[index, side]), expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(moments[:, 0], moments[:, 1, ..., ::-1]), "which is not the posterior, flipped"


def test_the_rounding_error_is_that_of_the_stored_numbers(tmp_path, image_folder, small_vae, extracted, capfd):
    argv = ["--data-path", image_folder, "--vae", small_vae, "--image-size", 16, "--batch-size", 2, "--num-workers", 0]
    assert call(extract_latents.main, *argv, "--out", tmp_path / "half") == 0
    half = load_file(shard_path(tmp_path / "half", 0))["moments"].astype(np.float64)
    exact = np.concatenate([load_file(shard_path(extracted, number))["moments"] for number in range(3)])
    words = capfd.readouterr().out.split()
    told = [float(words[words.index(word) + shift]) for word, shift in (("mean", 2), ("deviation", 2))]
    # images 4 and 9 were in batches of other sizes, which may change their last bit
    mean = (half - exact)[:, :, 0] * 0.18215
    std = (half / exact - 1)[:, :, 1]
    assert told == pytest.approx([np.sqrt(np.square(mean).mean()), np.sqrt(np.square(std).mean())], rel=0.06)
    assert 1e-5 < told[1] < 2.0**-11, "half a unit in the last place of float16 at the most"
    assert load_file(shard_path(extracted, 0))["errors"].tolist() == [0, 0]


def test_resuming_can_tell_latents_from_images_and_from_others(tmp_path, image_folder):
    make(tmp_path / "a")
    make(tmp_path / "b", random=np.random.default_rng(1))
    a, b = (StoredLatents(tmp_path / name).fingerprint() for name in "ab")
    assert a != b
    assert a != ImageDataset(image_folder, 16).fingerprint()
    assert a == StoredLatents(tmp_path / "a", seed=5, flip=False).fingerprint()


def rewrite(path, arrays=None, settings=None, record=None):
    """Change a shard: some of its arrays, None to leave one out; values of its settings; and of its record."""
    with safe_open(path, "np") as file:
        found = json.loads(file.metadata()["latents"])
    if settings:
        found["settings"] = json.dumps({**json.loads(found["settings"]), **settings})
    arrays = {name: array for name, array in {**load_file(path), **(arrays or {})}.items() if array is not None}
    save_file(arrays, path, {"latents": json.dumps({**found, **(record or {})})})


def shards(change):
    def edit(folder):
        for path in sorted(folder.glob("*.safetensors")):
            change(path)

    return edit


def second(change):
    return lambda folder: change(folder / "shard-00001.safetensors")


def cut(size):
    return lambda path: path.write_bytes(path.read_bytes()[:size])


DAMAGES = [
    ("unfinished latents, 2 of 3 shards are there; run the same", second(lambda p: p.unlink())),
    ("no-such-folder: no such folder", lambda f: f.rename(f.with_name("elsewhere"))),
    ("truncated or damaged; run the same", shards(cut(40))),
    ("shard-00001.safetensors: truncated or damaged; run the same", second(cut(-1))),
    ("shard-00001.safetensors: truncated or damaged", second(cut(0))),
    ("shard-00001.safetensors: truncated or damaged", second(lambda p: p.write_bytes(p.read_bytes() + b"more"))),
    ("shard-00001.safetensors: truncated or damaged", second(lambda p: rewrite(p, {"label": None}))),
    ("shard-00001.safetensors: truncated or damaged", second(lambda p: rewrite(p, {"label": np.full(5, 2)}))),
    ("shard-00001.safetensors: truncated or damaged", second(lambda p: rewrite(p, {"label": np.zeros(4, np.int64)}))),
    ("shard-00001.safetensors: truncated or damaged", second(lambda p: rewrite(p, {"name": np.zeros(2, np.uint8)}))),
    ("shard-00001.safetensors: truncated or damaged", second(lambda p: rewrite(p, settings={"scaling": [0.6]}))),
    ("shard-00001.safetensors: truncated or damaged", second(lambda p: shutil.copy(str(p).replace("1.s", "2.s"), p))),
    ("truncated or damaged; run the same", shards(lambda p: rewrite(p, settings={"shard_size": "5"}))),
    ("truncated or damaged", shards(lambda p: rewrite(p, settings={"image_size": 10**12}))),
    ("truncated or damaged", shards(lambda p: save_file({"a": np.zeros(2)}, p))),
    ("of format 3, known is 2; extract the latents again", shards(lambda p: rewrite(p, record={"version": 3}))),
]  # fmt: skip


@pytest.mark.parametrize(("message", "damage"), DAMAGES)
def test_a_folder_that_is_not_whole_is_refused(tmp_path, message, damage):
    make(tmp_path / "no-such-folder")
    damage(tmp_path / "no-such-folder")
    with pytest.raises(UserError, match=message) as error:
        StoredLatents(tmp_path / "no-such-folder")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["index.json", "options.json"])
def test_a_folder_of_the_format_before_is_refused_in_one_line(tmp_path, name):
    (tmp_path / name).write_text('{"encoder_crc32": "0"}')
    assert is_latents_folder(tmp_path)
    with pytest.raises(UserError, match="latents of an older format; extract them again"):
        StoredLatents(tmp_path)


def test_what_the_system_cannot_read_is_not_damaged(tmp_path, monkeypatch):
    """An error of the file system must not make an extraction write a shard anew, nor say that it is damaged."""
    make(tmp_path)

    def failing(path, framework):
        raise OSError(errno.EIO, "Input/output error")

    for function in ("safe_open", "open"):  # of what open() fails at, safe_open says that there is no such file
        with monkeypatch.context() as patch:
            patch.setattr(latents, function, failing, raising=False)
            for use in (lambda: is_complete(tmp_path, 0, SETTINGS), lambda: StoredLatents(tmp_path)):
                with pytest.raises(UserError, match=r"shard-00000.safetensors: cannot be read .Input/output error.$"):
                    use()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=5),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=5,
)


def test_any_metadata_is_taken_or_refused_in_one_line(tmp_path_factory, image_folder, small_vae):
    """Other types, missing and additional keys, lists, huge numbers: nothing but a UserError of one line may follow."""
    folder = tmp_path_factory.mktemp("latents")
    vae, images = load_space(str(small_vae)).to("cpu"), ImageDataset(image_folder, 16)
    config = ExtractConfig(data_path=str(image_folder), out=str(folder), image_size=16, shard_size=12)
    made = begin(config, folder, images, vae)
    make(folder, **made.flat())
    path = shard_path(folder, 0)
    content = path.read_bytes()

    def use():
        is_complete(folder, 0, begin(config, folder, images, vae))
        stored = StoredLatents(folder)
        stored.fingerprint()
        for key in [(0, 0), (11, 1)]:
            stored.name(key[0])
            stored.open_space(stored.settings.vae).sample(stored.__getitems__([key])["moments"])

    @given(JSON, st.sampled_from(["crc32", "version", "settings", *made.flat(), *made.flat()]), st.booleans())
    @settings(deadline=None, max_examples=100)
    def holds(value, key, is_missing):
        changed = {} if is_missing else {key: value}
        if key in made.flat():
            left = {k: v for k, v in made.flat().items() if k != key}
            changed = {"settings": json.dumps({**left, **changed})}
        rewrite(path, record=changed)
        message = ""
        try:
            use()
        except UserError as error:
            message = str(error)
        assert "\n" not in message
        path.write_bytes(content)

    use()
    holds()


def test_a_shard_that_vanishes_later_is_named(tmp_path):
    make(tmp_path)
    stored = StoredLatents(tmp_path)
    (tmp_path / "shard-00001.safetensors").unlink()
    assert next_batch(iter(make_loader(stored, [[(0, 0)]])))[1] is None
    for workers in (0, 1):
        batches = iter(make_loader(stored, [[(7, 0)]], workers))
        expected = f"{tmp_path}/shard-00001.safetensors: missing; {AGAIN}"
        assert next_batch(batches) == (None, expected)


def test_only_folders_of_latents_are_recognised(tmp_path, image_folder):
    make(tmp_path / "latents")
    (tmp_path / "options.json").write_text('{"lr": 1e-4}')  # as a training run's folder has one
    assert is_latents_folder(tmp_path / "latents")
    for other in (image_folder, tmp_path, tmp_path / "nowhere", "digits"):
        assert not is_latents_folder(other)


# ----------------------------------------------------------------------------------------------------------------------
# Statistics of the channels


def test_statistics_are_those_of_draws():
    """The closed form against 200,000 draws of three images' posteriors."""
    mean, std = torch.randn(3, 4, 5, 2), torch.rand(3, 4, 5, 2)
    moments = torch.stack([mean, std], dim=1)
    found = channel_statistics(channel_sums(moments), 3 * 10)
    draws = mean + std * torch.randn(200_000 // 30, *mean.shape)
    draws = draws.movedim(2, 0).flatten(1)  # (C, all else)
    torch.testing.assert_close(torch.tensor(found["mean"]), draws.mean(1), rtol=0, atol=0.02)
    torch.testing.assert_close(torch.tensor(found["std"]), draws.std(1), rtol=0.02, atol=0)
    only_mean = channel_statistics(channel_sums(moments[:, :1]), 3 * 10)
    torch.testing.assert_close(torch.tensor(only_mean["std"]), mean.movedim(1, 0).flatten(1).std(1, correction=0))


def test_extraction_records_the_statistics_of_all_images_and_flips(extracted):
    moments = np.concatenate([load_file(shard_path(extracted, number))["moments"] for number in range(3)])
    mean, std = moments.astype(np.float64)[:, :, 0], moments.astype(np.float64)[:, :, 1]
    found = read_statistics(extracted, StoredLatents(extracted).settings)
    np.testing.assert_allclose(found["mean"], mean.mean((0, 1, 3, 4)), rtol=1e-12)
    variance = mean.var((0, 1, 3, 4)) + (std**2).mean((0, 1, 3, 4))
    np.testing.assert_allclose(found["std"], np.sqrt(variance), rtol=1e-12)


def test_a_folder_of_before_without_sums_has_no_statistics(tmp_path):
    make(tmp_path)
    assert read_statistics(tmp_path, StoredLatents(tmp_path).settings) is None
