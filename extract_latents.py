"""Encode an image folder once, so that training need not: see latent_folder.py for what is stored.

    torchrun --nproc_per_node=8 extract_latents.py --data-path /path/to/imagenet/train --out latents/imagenet256
    torchrun --nproc_per_node=8 train.py --model DiT-XL/2 --data-path latents/imagenet256

Run again after an interruption, the command makes the shards that are missing or damaged, and leaves the others alone.
"""

import argparse
import contextlib
import os
import shutil
import signal
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from cli import options
from data import autoencoder as latents
from data import images as data
from data import stored_latents as latent_folder
from runtime import distributed, files
from runtime.errors import UserError
from sampling import pipeline as sampling


def parse_args(argv=None):
    parser = options.Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data-path", required=True, help="an image folder, one folder a class")
    add("--out", required=True, help="the folder of latents to make, or to complete")
    add("--vae", default="ema", help='autoencoder: "ema" or "mse" of the Stable Diffusion VAE, or a folder or hub name of '
        "an AutoencoderKL")  # fmt: skip
    add("--image-size", type=options.positive, default=256, help="side in pixels")
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="store the mirrored images' latents too")
    add("--dtype", choices=["float16", "float32"], default="float16", help="of the stored numbers")
    add("--batch-size", type=options.positive, default=32, help="images that a process encodes at once")
    add("--shard-size", type=options.positive, default=8192, help="images in a file, which a process holds in memory")
    add("--num-workers", type=options.count, default=4, help="processes that read images, per encoding process")
    add("--skip-bad-images", action="store_true", help="replace unreadable images by the next readable one")
    add("--tf32", action=argparse.BooleanOptionalAction, default=True, help="TF32 matrix products on GPUs")
    options.add_device_option(parser)
    args = parser.parse_args(argv)
    if args.data_path == "digits":
        parser.error("--data-path digits: they are 8x8 pixels, too small for an autoencoder; train.py takes them so")
    if args.vae == "none":
        parser.error("--vae none: pixels need no encoding; train.py takes the image folder as it is")
    return parser, args


def main(argv=None):
    parser, args = parse_args(argv)
    status = 0
    with parser.reporting():
        try:
            extract(args, distributed.setup(args.device))
        except KeyboardInterrupt:
            status = 130
        finally:
            distributed.close()
    sys.exit(status)


def extract(args, context):
    dataset, space = context.run_on_all_ranks(lambda: prepare(args, context))
    folder = Path(args.out)
    with context.run_on_all_ranks(lambda: files.lock_folder(folder) if context.is_main else contextlib.nullcontext()):
        record = context.run_on_main(lambda: begin(args, folder, dataset, space))
        missing = find_missing(context, folder, record)
        if missing:
            context.run_on_main(lambda: reopen(context, folder, record, missing))
            encode(args, context, dataset, space.place(context.device), folder, record, missing)
        context.run_on_main(lambda: print(finish(args, folder, record, dataset, missing), flush=True))


def prepare(args, context):
    """(images, autoencoder on the CPU), or a UserError for what cannot work."""
    dataset = data.load(args.data_path, args.image_size, flip=False, skip_bad=args.skip_bad_images)
    space = latents.load(args.vae)
    options.check_image_size(args.image_size, space.factor, 1)
    sampling.use_tf32(context.device, args.tf32)
    return dataset, space.place("cpu")


def begin(args, folder, dataset, space):
    """The record that the folder is begun with. Raises UserError where it was begun with another."""
    record = {
        "version": latent_folder.VERSION,
        "vae": args.vae,
        **latent_folder.description(space),
        "image_size": args.image_size,
        "dtype": args.dtype,
        "mirrors": args.flip,
        "batch_size": args.batch_size,
        "shard_size": args.shard_size,
        "tf32": args.tf32,
        "images": len(dataset),
        "names_crc32": f"{zlib.crc32(chr(10).join(dataset.fingerprint()).encode()):08x}",
        "classes": dataset.classes,
    }
    path = folder / "options.json"
    before = files.read_json(path)
    ours = isinstance(before, dict) and "encoder_crc32" in before
    if not ours and any(entry.name != ".lock" for entry in folder.iterdir()):
        raise UserError(f"--out {folder}: holds other files already; choose a new folder")
    if not any(folder.glob("shard-*.npy")):  # nothing that another --batch-size, say, would not fit
        write(folder, lambda: files.write_json(path, record))
        return record
    of_images = [name for name in ("images", "names_crc32", "classes") if before.get(name) != record[name]]
    if of_images:
        raise UserError(
            f"--data-path {args.data_path}: {len(dataset):,} images, not the {before.get('images', 0):,} that {folder} was "
            "begun with, or with other names; bring those back, or choose another --out"
        )
    # the autoencoder's folder may have moved: its contents count
    differing = [f"{k} {before.get(k)}, now {v}" for k, v in record.items() if before.get(k) != v and k != "vae"]
    if differing:
        raise UserError(f"--out {folder}: begun with {'; '.join(differing)}; use the same, or choose another folder")
    return before


def find_missing(context, folder, record):
    """Numbers of the shards that are to be made: not there, or not whole. Every process reads its share of them."""
    numbers = range(latent_folder.num_shards(record))
    bar = tqdm(numbers[context.rank :: context.world_size], desc="Verifying", unit="shard", leave=False,
        disable=not context.is_main)  # fmt: skip
    mine = [number for number in bar if not latent_folder.is_whole(folder, number, record)]
    return sorted(number for part in context.all_gather(mine) for number in part)


def reopen(context, folder, record, missing):
    """Mark the folder as unfinished until it has the missing shards. Raises UserError where the disk lacks the room."""
    item = np.dtype(record["dtype"]).itemsize
    needed = sum(int(np.prod(latent_folder.shard_shape(record, number))) * item for number in missing)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"--out {folder}: {needed / 1e6:,.1f} MB are still to be written, the disk has {free / 1e6:,.1f} MB free; "
            "choose a folder on another disk"
        )
    (folder / "index.json").unlink(missing_ok=True)
    print(f"{len(missing)} of {latent_folder.num_shards(record)} shards to make, {context.describe()}", flush=True)


def encode(args, context, dataset, space, folder, record, missing):
    """Make the missing shards, every world_size-th on this process. The processes take their batches in step, so that what
    goes wrong with one is told at once. A batch never reaches over a shard's end: what is stored does not depend on who
    else is at work."""
    plans = [
        [batch for number in missing[rank :: context.world_size] for batch in shard_batches(args, number, len(dataset))]
        for rank in range(context.world_size)
    ]
    order = ([(index, 0) for index in batch] for batch in plans[context.rank])
    batches = iter(data.loader(dataset, order, args.num_workers, pin_memory=context.device.type == "cuda"))
    # a worker's death would raise anywhere; next_batch finds it out by itself
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    shard = Shard(folder, record, space)
    total = sum(len(batch) for plan in plans for batch in plan)
    bar = tqdm(total=total, desc="Encoding", unit="image", disable=not context.is_main)
    try:
        for step in range(max(map(len, plans))):
            read = data.next_batch(batches) if step < len(plans[context.rank]) else (None, None)
            context.run_on_all_ranks(lambda read=read: shard.add(*read))
            bar.update(sum(len(plan[step]) for plan in plans if step < len(plan)))
    finally:
        del batches  # now, while this process can tell its workers to end; see train.run
        bar.close()


def shard_batches(args, number, images):
    """The shard's batches, as ranges of images' indices."""
    first, end = number * args.shard_size, min((number + 1) * args.shard_size, images)
    return [range(i, min(i + args.batch_size, end)) for i in range(first, end, args.batch_size)]


class Shard:
    """Collects encoded batches, in order, and writes a shard when it is full."""

    def __init__(self, folder, record, space):
        self.folder, self.record, self.space, self.moments = folder, record, space, None

    def add(self, batch, failure):
        """Encode a batch, the images and their mirrors; None is no batch. Raises UserError for what went wrong with reading
        it (failure), with its values or with writing."""
        if failure:
            raise UserError(failure)
        if batch is None:
            return
        indices = batch["index"].tolist()
        number, first = divmod(indices[0], self.record["shard_size"])
        if first == 0:
            self.moments = np.empty(latent_folder.shard_shape(self.record, number), self.record["dtype"])
            self.squared_errors, self.replaced = np.zeros(2), []
        images = data.to_model_range(batch["image"].to(self.space.vae.device, non_blocking=True))
        views = [images, images.flip(-1)] if self.record["mirrors"] else [images]
        exact = torch.stack([self.space.moments(view) for view in views], dim=1).cpu().numpy()  # (N, M, 2, C, h, w)
        stored = self.moments[first : first + len(indices)]
        with np.errstate(over="ignore"):  # looked at right here
            stored[:] = exact
        if not np.isfinite(stored).all():
            way_out = "pass --dtype float32" if np.isfinite(exact).all() else "look at them, and at --vae"
            raise UserError(f"images {indices[0]} to {indices[-1]}: latents not finite as {stored.dtype}; {way_out}")
        mean, std = np.moveaxis(stored.astype(np.float64) - exact, 2, 0)
        self.squared_errors += np.square(mean).sum(), np.square(std / exact[:, :, 1]).sum()
        for index, label, line in zip(indices, batch["label"].tolist(), batch["replaced"], strict=True):
            if line:
                tqdm.write(f"Skipped {line}")
                self.replaced.append({"index": index, "label": label, "reason": line})
        if first + len(indices) == len(self.moments):
            parts = (number, self.moments, self.squared_errors.tolist(), self.replaced)
            write(self.folder, lambda: latent_folder.write_shard(self.folder, *parts))


def write(folder, action):
    try:
        return action()
    except OSError as error:  # numpy's, of a full disk, has no strerror
        raise UserError(f"--out {folder}: cannot be written ({error.strerror or error}); whole shards are kept") from None


def finish(args, folder, record, dataset, missing):
    """Write the index, if need be. Returns the line to end with."""
    names, labels = zip(*[(os.path.relpath(path, args.data_path), label) for path, label in dataset.samples], strict=True)
    index, stale = write(folder, lambda: latent_folder.finish(folder, record, list(names), list(labels)))
    what = f"{folder}: latents of {index['images']:,} images{', and of their mirrors' if index['mirrors'] else ''}"
    if not missing and not stale:
        return f"Nothing left to do: {what}"
    rounding = index["rounding"]
    return (
        f"{what}; rounding to {index['dtype']} changed the mean by {rounding['mean_rms']:.1e} (RMS, in units of the scaled "
        f"latents, whose variance is about 1), the standard deviation by {rounding['std_relative_rms']:.1e} of itself (RMS)"
    )


if __name__ == "__main__":
    main()
