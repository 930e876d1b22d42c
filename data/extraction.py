"""Makes a folder of stored latents, or completes one: the work of extract_latents.py."""

import contextlib
import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from data.autoencoder import LatentSpace, latent_sides, load_space, per_frame, to_model_range
from data.images import ImageDataset, load_dataset
from data.latents import DamagedError, Settings, Shard, is_complete, read_settings, read_statistics, shard_path, write_shard
from data.order import make_loader, next_batch
from data.statistics import channel_sums
from runtime import devices, files
from runtime.config import differences, flag
from runtime.errors import UserError
from runtime.shapes import sides


def extract(config, context):
    """Make the folder of latents of an ExtractConfig, or what is missing of it. All ranks call this. Raises UserError."""
    with context.together():
        dataset, space = prepare(config, context)
        text, folder = dataset.open_text(config), Path(config.out)
    for note in dataset.notes:
        context.print(note)
    with context.together():
        lock = files.lock_folder(folder) if context.is_main else contextlib.nullcontext()
    with lock:
        settings = context.on_main(begin, config, folder, dataset, space, text)
        missing = find_missing(context, folder, settings)
        if missing:
            context.on_main(remove_damaged, context, folder, settings, missing)
            text, space = text and text.to(context.device), space.to(context.device)
            encode(config, context, dataset, ShardWriter(folder, settings, dataset, space, text), missing)
        context.print(context.on_main(finish, folder, settings, dataset, missing))


def prepare(config, context):
    """(images, autoencoder on the CPU). Raises UserError for what cannot work."""
    dataset = load_dataset(replace(config, flip=False), config.image_size, context=context, num_frames=config.num_frames)
    space = load_space(config.vae)
    if not isinstance(dataset, ImageDataset):
        raise UserError(f"--data-path {config.data_path}", "holds latents already", "name the images that they are of")
    latent_sides(config.image_size, space.factor, side=space.side)  # raises
    images = min(config.batch_size, len(dataset))  # of three channels in uint8, and then in float32
    pixels = math.prod(sides(config.image_size)) * (config.num_frames or 1)
    devices.check_memory(15 * images * pixels, "lower --batch-size or --image-size")
    devices.set_precision("tf32" if config.tf32 else "fp32", context.device)
    return dataset, space.to("cpu")


def begin(config, folder, dataset, space, text=None):
    """The Settings of the folder: those that it was begun with, if any shard is there. Raises UserError for others."""
    images = {"images": len(dataset), "names_crc32": dataset.checksum, "classes": dataset.folders}
    images["captions_crc32"] = text and dataset.captions.checksum
    encoder = space.encoder_settings()
    texts = {f"text_{name}": text and getattr(text, name) for name in ("crc32", "width", "length")}
    settings = Settings.from_flat({**config.flat(), **images, **encoder, **texts})
    try:
        before = read_settings(folder)
    except DamagedError:  # nothing that another --batch-size, say, would not fit
        if any(entry.name != ".lock" and not entry.match("shard-*.safetensors") for entry in folder.iterdir()):
            raise UserError(f"--out {folder}", "holds other files already", "choose a new folder") from None
        return settings
    number, begun = f"{len(dataset):,} images", f"that {folder} was begun with"
    crc32 = {"text_crc32": text.crc32} if text and before.text_crc32 else {}
    checks = [  # an encoder's folder may have moved: its contents count
        ("data_path", f"{number}, not the {before.images:,} {begun}, or with other names or texts", images),
        ("vae", f"not the autoencoder {before.vae} {begun}, nor one with its encoder", encoder),
        ("text_encoder", f"not the encoder {before.text_encoder} {begun}", crc32),
    ]
    for name, problem, values in checks:
        if differences(before.flat(), values):
            raise UserError(f"{flag(name)} {getattr(config, name)}", problem, "use that one, or choose another --out")
    ignore = {"vae", "text_encoder"} if before.text_crc32 and text else {"vae"}  # a folder that has moved is no other one
    if changed := differences(before.flat(), settings.flat(), ignore):
        raise UserError(f"--out {folder}", f"begun with {'; '.join(changed)}", "use the same, or choose another folder")
    return before


def find_missing(context, folder, settings):
    """Numbers of the shards that are to be made: missing or damaged ones. Every process reads its share of them."""
    numbers = range(context.rank, settings.num_shards, context.world_size)
    bar = tqdm(numbers, desc="Verifying", unit="shard", leave=False, disable=not context.is_main)
    with context.together():
        mine = [number for number in bar if not is_complete(folder, number, settings)]
    return sorted(number for part in context.all_gather(mine) for number in part)


def remove_damaged(context, folder, settings, missing):
    """Delete what is there of the missing shards. Raises UserError where the disk lacks the room for them."""
    needed = sum(math.prod(settings.shard_shape(number)) for number in missing) * np.dtype(settings.dtype).itemsize
    free = shutil.disk_usage(folder).free
    if needed > free:
        problem = f"{needed / 1e6:,.1f} MB are still to be written, the disk has {free / 1e6:,.1f} MB free"
        raise UserError(f"--out {folder}", problem, "choose a folder on another disk")
    for number in missing:
        shard_path(folder, number).unlink(missing_ok=True)
    print(f"{len(missing)} of {settings.num_shards} shards to make, {context.describe()}", flush=True)


def encode(config, context, dataset, writer, missing):
    """Make the missing shards, every world_size-th on this process. The processes take their batches in step, so that an
    error of one stops all at once. A batch ends with its shard, so that any number of processes stores the same."""
    shares = [missing[rank :: context.world_size] for rank in range(context.world_size)]
    plans = [[batch for number in share for batch in shard_batches(writer.settings, number)] for share in shares]
    order = ([(index, 0) for index in batch] for batch in plans[context.rank])
    batches = iter(make_loader(dataset, order, config.num_workers, pin_memory=context.device.type == "cuda"))
    total = sum(len(batch) for plan in plans for batch in plan)
    bar = tqdm(total=total, desc="Encoding", unit="image", disable=not context.is_main)
    try:
        for step in itertools.zip_longest(*plans, fillvalue=()):  # a batch of each process
            read = next_batch(batches) if step[context.rank] else (None, None)
            with context.together():
                writer.add(*read)
            bar.update(sum(map(len, step)))
    finally:
        del batches  # ends the workers
        bar.close()


def shard_batches(settings, number):
    """The shard's batches, as ranges of images' indices."""
    first = number * settings.shard_size
    end, size = first + settings.shard_shape(number)[0], settings.batch_size
    return [range(i, min(i + size, end)) for i in range(first, end, size)]


class ShardWriter:
    """Collects encoded batches, in order, and writes a shard when it is full. text: the encoder of texts, or None."""

    def __init__(self, folder, settings, dataset, space, text=None):
        self.folder, self.settings, self.dataset, self.space, self.text = folder, settings, dataset, space, text

    @devices.explain_out_of_memory("lower --batch-size or --shard-size")
    def add(self, batch, failure):
        """Encode a batch, images and flips; None is no batch. Raises UserError for failed reading (failure) or writing."""
        if failure:
            raise UserError(failure)
        if batch is None:
            return
        indices = batch["index"].tolist()
        number, first = divmod(indices[0], self.settings.shard_size)
        if first == 0:
            self.moments = np.empty(self.settings.shard_shape(number), self.settings.dtype)
            self.errors, self.labels, self.sources = np.zeros(2), [], []
            self.sums = torch.zeros(2, self.settings.channels, dtype=torch.float64)
        images = to_model_range(batch["image"].to(self.space.vae.device, non_blocking=True))
        views = [images, images.flip(-1)] if self.settings.flip else [images]
        exact = torch.stack([per_frame(self.space.moments, view) for view in views], dim=1).cpu()  # (N, F, M, C, h, w)
        self.sums += channel_sums(exact, axis=2)
        exact = exact.numpy()
        stored = self.rounded(exact, f"images {indices[0]} to {indices[-1]}", "latents", "look at them, and at --vae")
        self.moments[first : first + len(indices)] = stored
        error = stored.astype(np.float64) - exact
        self.errors += np.square(error[:, :, 0]).sum(), np.square(error[:, :, 1:] / exact[:, :, 1:]).sum()
        for line in filter(None, batch["replaced"]):
            tqdm.write(f"Skipped {line}")
        self.labels += batch["label"].tolist()
        self.sources += batch["source"].tolist()
        if len(self.labels) == len(self.moments):
            with files.write_errors(f"--out {self.folder}", "; whole shards are kept"):
                write_shard(self.folder, number, self.settings, self.arrays())

    def rounded(self, exact, where, what, way_out):
        """An array as it is stored. Raises UserError where its values are not finite."""
        with np.errstate(over="ignore"):  # looked at right here
            stored = exact.astype(self.settings.dtype)
        if not np.isfinite(stored).all():
            way_out = "pass --dtype float32" if np.isfinite(exact).all() else way_out
            raise UserError(where, f"{what} not finite as {stored.dtype}", way_out)
        return stored

    def arrays(self):
        """The arrays of the shard that is full."""
        names = "\0".join(self.dataset.names[source] for source in self.sources)
        arrays = {"moments": self.moments, "label": np.array(self.labels), "image": np.array(self.sources)}
        arrays |= {"errors": self.errors, "name": np.frombuffer(names.encode("utf-8", "surrogateescape"), np.uint8)}
        arrays["sums"] = self.sums.numpy()
        if self.text:
            texts = [self.dataset.captions.of(source) for source in self.sources]
            tokens, lengths = self.encode_texts([*(text for entry in texts for text in entry), ""])
            arrays |= {"text": np.frombuffer(json.dumps(texts).encode(), np.uint8), "tokens": tokens, "length": lengths}
        return arrays

    def encode_texts(self, texts):
        """(tokens (T, W), numbers of tokens (N,)) of texts. Raises UserError where they are not finite."""
        tokens, lengths, size = [], [], self.settings.batch_size
        for first in range(0, len(texts), size):
            exact, found = self.text.tokens(texts[first : first + size])
            tokens.append(self.rounded(exact.cpu().numpy(), "texts", "tokens", "look at them, and at --text-encoder"))
            lengths += found.tolist()
        return np.concatenate(tokens), np.array(lengths)


def finish(folder, settings, dataset, missing):
    """The line to end with."""
    what = f"{folder}: latents of {settings.images:,} images{', and of their flips' if settings.flip else ''}"
    what += f", and {len(dataset.captions.texts):,} texts" if dataset.captions else ""
    if not missing:
        return f"Nothing left to do: {what}"
    shards = range(settings.num_shards)
    values = sum(math.prod(settings.shard_shape(number)) for number in shards) / settings.moments
    mean, std = np.sqrt(sum(Shard(folder, number).file.get_tensor("errors") for number in shards) / values)
    scaling = sum(settings.scaling) / len(settings.scaling)
    if statistics := read_statistics(folder, settings):
        space = LatentSpace(settings.channels, settings.factor, settings.scaling, settings.shift)
        found = torch.tensor([*statistics.values()])[:, :, None, None]  # (2, C, 1, 1)
        means, stds = (found[0] - space.shift) * space.scaling, found[1] * space.scaling
        what += f"; with the autoencoder's factor the channels' means are from {means.min():.2f} to {means.max():.2f}"
        what += f", their standard deviations from {stds.min():.2f} to {stds.max():.2f}"
    what += f"; rounding to {settings.dtype} changed the mean by {mean * scaling:.1e} (RMS, in units of the scaled latents"
    return f"{what}, whose variance is about 1), the standard deviation by {std:.1e} of itself (RMS)"
