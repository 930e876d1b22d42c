"""Makes a folder of stored latents, or completes one: the work of extract_latents.py."""

import contextlib
import itertools
import math
import shutil
import signal
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from data.autoencoder import check_image_size, load_space, to_model_range
from data.images import ImageDataset, list_with_captions
from data.order import make_loader, next_batch
from data.stored_latents import VERSION, Settings, is_complete, read_record, write_index, write_shard
from runtime import devices, files
from runtime.config import differences
from runtime.errors import UserError


def extract(config, context):
    """Make the folder of latents that an ExtractConfig names, or what is missing of it. All ranks call this. Raises
    UserError."""
    dataset, space = context.run_on_all_ranks(lambda: prepare(config, context))
    for note in dataset.notes:
        context.print(note)
    folder, text = Path(config.out), context.run_on_all_ranks(lambda: dataset.open_text(config))
    with context.run_on_all_ranks(lambda: files.lock_folder(folder) if context.is_main else contextlib.nullcontext()):
        settings = context.run_on_main(lambda: begin(config, folder, dataset, space, text))
        missing = find_missing(context, folder, settings)
        if missing:
            context.run_on_main(lambda: mark_unfinished(context, folder, settings, missing))
            text = text and text.place(context.device)
            encode(config, context, dataset, space.place(context.device), settings, missing, text)
        context.run_on_main(lambda: print(finish(folder, settings, dataset, missing), flush=True))


def prepare(config, context):
    """(images, autoencoder on the CPU). Raises UserError for what cannot work."""
    listing = context.run_on_main(lambda: list_with_captions(config.data_path, bool(config.text_encoder)))
    skip_bad, space = config.skip_bad_images, load_space(config.vae)
    dataset = ImageDataset(config.data_path, config.image_size, flip=False, skip_bad=skip_bad, listing=listing)
    check_image_size(config.image_size, space.factor, 1)
    images = min(config.batch_size, len(dataset))  # of three channels in uint8, and then in float32
    devices.check_memory(15 * images * config.image_size**2, "lower --batch-size or --image-size")
    devices.set_precision("tf32" if config.tf32 else "fp32", context.device)
    return dataset, space.place("cpu")


def begin(config, folder, dataset, space, text=None):
    """The Settings that the folder is begun with. Raises UserError where it was begun with others."""
    images = {"images": len(dataset), "names_crc32": dataset.checksum, "classes": dataset.folders}
    images["captions_crc32"] = text and dataset.captions.checksum
    encoder = {"version": VERSION, **space.encoder_settings()}
    texts = {"text_crc32": text and text.crc32, "text_width": text and text.width, "text_length": text and text.length}
    settings = Settings.from_flat({**config.flat(), "mirrors": config.flip, **images, **encoder, **texts})
    path = folder / "options.json"
    if "encoder_crc32" not in (files.read_json(path) or {}) and any(entry.name != ".lock" for entry in folder.iterdir()):
        raise UserError(f"--out {folder}: holds other files already; choose a new folder")
    if not any(folder.glob("shard-*.npy")):  # nothing that another --batch-size, say, would not fit
        with write_errors(folder):
            files.write_json(path, settings.record())
        return settings
    before = read_record(Settings, path, "choose another --out")
    if differences(before.flat(), images):
        raise UserError(
            f"--data-path {config.data_path}: {len(dataset):,} images, not the {before.images:,} that {folder} was begun "
            "with, or with other names or texts; bring those back, or choose another --out"
        )
    if differences(before.flat(), encoder):  # the autoencoder's folder may have moved: its contents count
        raise UserError(
            f"--vae {config.vae}: not the autoencoder {before.vae} that {folder} was begun with, nor one with its encoder; "
            "use that one, or choose another --out"
        )
    if before.text_crc32 and text and before.text_crc32 != text.crc32:
        raise UserError(
            f"--text-encoder {config.text_encoder}: not the encoder {before.text_encoder} that {folder} was begun with; "
            "use that one, or choose another --out"
        )
    ignore = {"vae", "text_encoder"} if before.text_crc32 and text else {"vae"}  # a folder that has moved is no other one
    if changed := differences(before.flat(), settings.flat(), ignore):
        changed = "; ".join(changed).replace("--mirrors", "--flip")
        raise UserError(f"--out {folder}: begun with {changed}; use the same, or choose another folder")
    return before


def find_missing(context, folder, settings):
    """Numbers of the shards that are to be made: missing or damaged ones. Every process reads its share of them."""
    numbers = range(context.rank, settings.num_shards, context.world_size)
    bar = tqdm(numbers, desc="Verifying", unit="shard", leave=False, disable=not context.is_main)
    mine = [number for number in bar if not is_complete(folder, number, settings)]
    return sorted(number for part in context.all_gather(mine) for number in part)


def mark_unfinished(context, folder, settings, missing):
    """Delete the index until the missing shards are made. Raises UserError where the disk lacks the room for them."""
    needed = sum(math.prod(settings.shard_shape(number)) for number in missing) * np.dtype(settings.dtype).itemsize
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"--out {folder}: {needed / 1e6:,.1f} MB are still to be written, the disk has {free / 1e6:,.1f} MB free; "
            "choose a folder on another disk"
        )
    (folder / "index.json").unlink(missing_ok=True)
    print(f"{len(missing)} of {settings.num_shards} shards to make, {context.describe()}", flush=True)


def encode(config, context, dataset, space, settings, missing, text=None):
    """Make the missing shards, every world_size-th on this process. The processes take their batches in step, so that an
    error of one stops all at once. A batch never reaches over a shard's end: what is stored does not depend on the number
    of processes."""
    plans = [
        [batch for number in missing[rank :: context.world_size] for batch in shard_batches(settings, number)]
        for rank in range(context.world_size)
    ]
    order = ([(index, 0) for index in batch] for batch in plans[context.rank])
    batches = iter(make_loader(dataset, order, config.num_workers, pin_memory=context.device.type == "cuda"))
    # a worker's death would raise anywhere; next_batch finds it out by itself
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    writer = ShardWriter(Path(config.out), settings, space, text, dataset.captions)
    total = sum(len(batch) for plan in plans for batch in plan)
    bar = tqdm(total=total, desc="Encoding", unit="image", disable=not context.is_main)
    try:
        for step in itertools.zip_longest(*plans, fillvalue=()):  # a batch of each process
            read = next_batch(batches) if step[context.rank] else (None, None)
            context.run_on_all_ranks(lambda read=read: writer.add(*read))
            bar.update(sum(map(len, step)))
    finally:
        del batches  # now, while this process can tell its workers to end; next_batch says why
        bar.close()


def shard_batches(settings, number):
    """The shard's batches, as ranges of images' indices."""
    first = number * settings.shard_size
    end, size = first + settings.shard_shape(number)[0], settings.batch_size
    return [range(i, min(i + size, end)) for i in range(first, end, size)]


class ShardWriter:
    """Collects encoded batches, in order, and writes a shard when it is full. text, captions: the encoder and the texts of
    the images, or None."""

    def __init__(self, folder, settings, space, text=None, captions=None):
        self.folder, self.settings, self.space, self.moments = folder, settings, space, None
        self.text, self.captions = text, captions

    @devices.explain_out_of_memory("lower --batch-size or --shard-size")
    def add(self, batch, failure):
        """Encode a batch, the images and their mirrors; None is no batch. Raises UserError for what went wrong with reading
        it (failure), with its values or with writing."""
        if failure:
            raise UserError(failure)
        if batch is None:
            return
        indices = batch["index"].tolist()
        number, first = divmod(indices[0], self.settings.shard_size)
        if first == 0:
            self.moments = np.empty(self.settings.shard_shape(number), self.settings.dtype)
            self.squared_errors, self.replaced, self.texts = np.zeros(2), [], []
        images = to_model_range(batch["image"].to(self.space.vae.device, non_blocking=True))
        views = [images, images.flip(-1)] if self.settings.mirrors else [images]
        exact = torch.stack([self.space.moments(view) for view in views], dim=1).cpu().numpy()  # (N, M, 2, C, h, w)
        stored = self.moments[first : first + len(indices)]
        with np.errstate(over="ignore"):  # looked at right here
            stored[:] = exact
        if not np.isfinite(stored).all():
            way_out = "pass --dtype float32" if np.isfinite(exact).all() else "look at them, and at --vae"
            raise UserError(f"images {indices[0]} to {indices[-1]}: latents not finite as {stored.dtype}; {way_out}")
        mean, std = np.moveaxis(stored.astype(np.float64) - exact, 2, 0)
        self.squared_errors += np.square(mean).sum(), np.square(std / exact[:, :, 1]).sum()
        sources = batch["source"].tolist() if self.text else indices
        for index, label, line, source in zip(indices, batch["label"].tolist(), batch["replaced"], sources, strict=True):
            if line:
                tqdm.write(f"Skipped {line}")
                of = {"source": source} if self.text else {}
                self.replaced.append({"index": index, "label": label, "reason": line, **of})
            self.texts += self.captions.of(source) if self.text else []
        if first + len(indices) == len(self.moments):
            with write_errors(self.folder):
                texts = self.encode_texts([*self.texts, ""]) if self.text else None
                write_shard(self.folder, number, self.moments, self.squared_errors.tolist(), self.replaced, texts)

    def encode_texts(self, texts):
        """(tokens, lengths) of texts, as `write_shard` takes them. Raises UserError where they are not finite."""
        parts, size = [], self.settings.batch_size
        for first in range(0, len(texts), size):
            tokens, lengths = self.text.tokens(texts[first : first + size])
            with np.errstate(over="ignore"):  # looked at right here
                tokens = tokens.cpu().numpy().astype(self.settings.dtype)
            if not np.isfinite(tokens).all():
                raise UserError(
                    f"texts: tokens not finite as {tokens.dtype}; pass --dtype float32, or look at --text-encoder"
                )
            parts.append((tokens, lengths.tolist()))
        return np.concatenate([tokens for tokens, _ in parts]), [n for _, lengths in parts for n in lengths]


def write_errors(folder):
    return files.write_errors(f"--out {folder}", "; whole shards are kept")


def finish(folder, settings, dataset, missing):
    """Write the index, if need be. Returns the line to end with."""
    with write_errors(folder):
        index, changed = write_index(folder, settings, dataset.names, dataset.labels.tolist(), dataset.captions)
    what = f"{folder}: latents of {settings.images:,} images{', and of their mirrors' if settings.mirrors else ''}"
    what += f", and {len(dataset.captions.texts):,} texts" if dataset.captions else ""
    if not missing and not changed:
        return f"Nothing left to do: {what}"
    rounding = index["rounding"]
    return (
        f"{what}; rounding to {settings.dtype} changed the mean by {rounding['mean_rms']:.1e} (RMS, in units of the scaled "
        f"latents, whose variance is about 1), the standard deviation by {rounding['std_relative_rms']:.1e} of itself (RMS)"
    )
