"""Draw many images from a DiT, for evaluation: PNG files and one .npz of all.

    torchrun --nproc_per_node=8 sample_ddp.py --num-fid-samples 50000 --cfg-scale 1.5
    python sample_ddp.py --ckpt results/000-DiT-S-2/checkpoints/0400000.pt --balanced-labels --num-fid-samples 1000

Image i depends on the seed and on i alone. Run again after an interruption, the command goes on where it stopped.
"""

import argparse
import itertools
import json
import sys
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

import download
from cli import options
from diffusion import samplers
from runtime import devices, distributed, files
from runtime.errors import UserError
from sampling import pipeline as sampling

DECODED_ASIDE = {"cuda"}  # devices that decode a batch while they draw the next; a CPU's cores are busy with one


def parse_args(argv=None):
    parser = options.Parser(__doc__.split("\n")[0])
    sampling.add_options(parser, vae="ema", cfg_scale=1.5)
    add = parser.add_argument_group("set of images").add_argument
    add("--sample-dir", default="samples", help="where the folder of images and the .npz are made")
    add("--folder", help="the folder's name (default: one made of the settings)")
    add("--num-fid-samples", type=options.positive, default=50_000, help="number of images")
    add("--per-proc-batch-size", type=options.positive, default=32, help="images that a process draws at once")
    add("--global-seed", type=options.count, default=0, help="seed of labels and noise")
    add("--balanced-labels", action=argparse.BooleanOptionalAction, default=False,
        help="image i is of class i modulo the number of classes, instead of a random one")  # fmt: skip
    return parser, options.parse_with_checkpoint(parser, argv)


def main(argv=None):
    parser, args = parse_args(argv)
    with parser.reporting():
        sampling.check(args)
        try:
            sample(args, distributed.setup(args.device))
        finally:
            distributed.close()


def sample(args, context):
    folder, lock = open_folder(args, context)
    npz = folder.parent / f"{folder.name}.npz"
    size = (args.num_fid_samples, args.image_size, args.image_size, 3)
    try:
        if context.broadcast(npz_shape(npz) == size):
            say(context, f"Nothing left to do: {npz} holds {args.num_fid_samples:,} images")
            return
        model, space, guide = context.run_on_all_ranks(lambda: (*sampling.load_model(args), sampling.load_guide(args)))
        space = space.place(context.device)
        model, guide = (sampling.place(args, network, context.device) for network in (model, guide))
        if args.precision == "bf16" and not devices.has_bf16(context.device):
            say(context, devices.NO_BF16)
        say(context, f"{args.model}, {args.num_fid_samples:,} images to {folder}, {context.describe()}")

        missing = context.run_on_main(lambda: absent(args, folder))
        while True:  # at least once: a run may have been killed between its last image and the .npz
            batches = sorted({index // args.per_proc_batch_size for index in missing})
            context.run_on_all_ranks(lambda batches=batches: draw(args, context, model, space, guide, folder, batches))
            missing = context.run_on_main(lambda: write_npz(npz, folder, args))
            if not missing:
                break
        say(context, f"{npz}: arr_0 {size} uint8, arr_1 labels")
    finally:
        if lock:
            lock.close()


def say(context, text):
    if context.is_main:
        print(text, flush=True)


def labels(args, indices):
    if args.balanced_labels:
        return [index % max(args.num_classes, 1) for index in indices]
    return [sampling.image_label(args.global_seed, index, args.num_classes) for index in indices]


def batch_indices(args, batch):
    first = batch * args.per_proc_batch_size
    return range(first, min(first + args.per_proc_batch_size, args.num_fid_samples))


def absent(args, folder):
    """Indices of images that are not there. Of a batch that lacks one all are drawn, as an undisturbed run would: the sums
    in a matrix product may depend, in the last bit, on what else is in the batch."""
    there = {path.name for path in folder.glob("*.png")}
    return [i for i in range(args.num_fid_samples) if f"{i:06d}.png" not in there]


@torch.inference_mode()
def draw(args, context, model, space, guide, folder, batches):
    """Draw the given batches, every world_size-th on this process, while threads decode the batch before, on a GPU, and
    write its files."""
    total = sum(len(batch_indices(args, batch)) for batch in batches)
    bar = tqdm(total=total, desc="Sampling", unit="image", disable=not context.is_main)
    shape = (model.in_channels, model.input_size, model.input_size)
    noises = 0 if sampling.is_deterministic(args) else args.num_sampling_steps
    on_gpu = context.device.type == "cuda"
    stream = torch.cuda.Stream(context.device) if on_gpu else None

    def draw_noise(batch):
        noise = sampling.image_noise(args.global_seed, batch_indices(args, batch), noises, shape)
        return noise.pin_memory() if on_gpu else noise

    def finish(x_0, indices, drawn=None):
        """Decode, in that stream, and have the files written. Returns the writes under way."""
        with torch.inference_mode(), torch.cuda.stream(stream):  # both are a thread's own
            if drawn:
                drawn.wait()
            pixels = sampling.to_uint8(space.decode(x_0))
        return [writers.submit(write_png, folder / f"{i:06d}.png", p) for i, p in zip(indices, pixels, strict=True)]

    def finished(writes):
        future = Future()
        future.set_result(writes)
        return future

    before = finished([])  # the batch before: its decoding, which leads to its writes
    with ThreadPoolExecutor(4) as writers, ThreadPoolExecutor(1) as decoder, ThreadPoolExecutor(1) as noise_maker:
        mine = batches[context.rank :: context.world_size]
        upcoming = noise_maker.submit(draw_noise, mine[0]) if mine else None
        for batch, following in itertools.pairwise([*mine, None]):
            indices = batch_indices(args, batch)
            noise = upcoming.result().to(context.device, non_blocking=True)
            upcoming = noise_maker.submit(draw_noise, following) if following is not None else None
            denoise = sampling.denoiser(args, model, torch.tensor(labels(args, indices), device=context.device), guide)
            steps = sampling.steps(args, denoise, noise[0], lambda x, i, noise=noise: noise[1 + i])
            x_0 = samplers.last(steps)
            for write in before.result():
                write.result()
            if context.device.type in DECODED_ASIDE:
                before = decoder.submit(finish, x_0, indices, stream and torch.cuda.current_stream().record_event())
            else:
                before = finished(finish(x_0, indices))
            bar.update(min(len(indices) * context.world_size, total - bar.n))
        for write in before.result():
            write.result()
    bar.close()


def write_png(path, pixels):
    try:
        files.replace_file(path, lambda file: Image.fromarray(pixels).save(file, format="PNG"))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); the images so far are kept") from None


def write_npz(npz, folder, args):
    """Stream the PNG files into `arr_0` (N, H, W, 3) uint8 and the labels into `arr_1`, as numpy.savez would, holding one
    image at a time. Returns the indices of images that are missing or damaged; only if there are none is `npz` there."""
    size, number = args.image_size, args.num_fid_samples
    bad = []

    def member(archive, name, shape, dtype, rows):
        with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:  # of 1980: the same bytes always
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for row in rows:
                file.write(row.tobytes())

    def images():
        for i in tqdm(range(number), desc="Writing npz", unit="image"):
            pixels = read_png(folder / f"{i:06d}.png", size)
            if pixels is None:
                bad.append(i)
                pixels = np.zeros((size, size, 3), np.uint8)
            yield pixels

    def write(file):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            member(archive, "arr_0", (number, size, size, 3), np.uint8, images())
            member(archive, "arr_1", (number,), np.int64, (np.int64(labels(args, [i])[0]) for i in range(number)))
        if bad:
            raise _DamagedError

    try:
        files.replace_file(npz, write)
    except _DamagedError:
        print(f"{len(bad)} damaged or missing images are drawn again, the first is {bad[0]:06d}.png", file=sys.stderr)
    except OSError as error:
        raise UserError(f"{npz}: cannot be written ({error.strerror}); the images in {folder} are kept") from None
    return bad


class _DamagedError(Exception):
    """Keeps `replace_file` from giving an incomplete file its name."""


def read_png(path, size):
    """(size, size, 3) uint8, or None where the file is not a whole image of that size."""
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError):
        return None
    return pixels if pixels.shape == (size, size, 3) else None


def npz_shape(npz):
    """The shape of `arr_0`, or None where there is no such file."""
    try:
        with zipfile.ZipFile(npz) as archive, archive.open("arr_0.npy") as file:
            np.lib.format.read_magic(file)
            return np.lib.format.read_array_header_1_0(file)[0]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def open_folder(args, context):
    """(folder, lock): the set's folder, held by rank 0. What it was made with stands in its options.json; a run with other
    settings is refused. An error of rank 0 is every rank's."""
    name = Path(args.ckpt).stem if args.ckpt else "pretrained"
    vae = args.vae.strip("/").replace("/", "-")
    model, size = args.model.replace("/", "-"), args.image_size
    default = f"{model}-{name}-size-{size}-vae-{vae}-cfg-{args.cfg_scale}-seed-{args.global_seed}"
    folder, lock, error = Path(args.sample_dir) / (args.folder or default), None, None
    if context.is_main:
        try:
            lock = files.lock_folder(folder)
            files.remove_leftovers(folder.parent, f"{folder.name}.npz")
            check_settings(args, folder / "options.json")
        except UserError as problem:
            error = str(problem)
    error = context.broadcast(error)
    if error:
        raise UserError(error)
    return folder, lock


def check_settings(args, path):
    free = ("state", "ckpt", "sample_dir", "folder", "num_fid_samples", "per_proc_batch_size", "device")
    settings = {name: value for name, value in vars(args).items() if name not in free}
    # the released checkpoint is downloaded here, by rank 0 alone; the others find it there
    ckpt = args.ckpt or download.download(download.released_checkpoint(args.image_size))
    settings["checkpoint_crc32"] = files.checksum(ckpt)
    settings["guide_ckpt"] = args.guide_ckpt and files.checksum(args.guide_ckpt)
    if path.exists():
        before = json.loads(path.read_text())
        differing = [f"{k} {before.get(k)}, now {v}" for k, v in settings.items() if before.get(k) != v]
        if differing:
            raise UserError(
                f"{path.parent}: its images were made with {'; '.join(differing)}; choose another --sample-dir or --folder"
            )
    elif any(path.parent.glob("*.png")):
        raise UserError(f"{path.parent}: holds images of unknown settings; choose another --sample-dir or --folder")
    files.write_json(path, settings)


if __name__ == "__main__":
    main()
