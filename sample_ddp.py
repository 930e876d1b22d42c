"""Draw many images from a DiT, for evaluation: PNG files and one .npz of all.

    torchrun --nproc_per_node=8 sample_ddp.py --num-fid-samples 50000 --cfg-scale 1.5
    python sample_ddp.py --ckpt results/000-DiT-S-2 --balanced-labels --num-fid-samples 1000

Image i depends on the seed and on i alone. After an interruption the same command draws the images that are missing."""

import runtime  # noqa: F401 -- first: from here on Ctrl-C prints a line  # isort: skip
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import zip_longest
from pathlib import Path

from runtime.config import differences
from runtime.errors import UserError
from runtime.files import check_output, lock_folder, read_json, remove_leftovers, write_errors, write_json
from runtime.parser import Parser
from runtime.shapes import sides
from sampling.config import SampleSetConfig

DECODED_ASIDE = {"cuda"}  # devices that decode a batch while they draw the next; a CPU's cores are busy with one

ELSEWHERE = "choose another --sample-dir or --folder"


def main(argv=None):
    with Parser(SampleSetConfig, __doc__).processes(argv) as (config, context):
        sample(config, context)


def sample(config, context):
    """Draw the images that are missing in the set's folder, and write all of them to the .npz file."""
    from runtime.devices import precision_warning  # here and below: torch takes seconds to import
    from sampling import image_set
    from sampling.labels import SetLabels, choices_of_set
    from sampling.opened import Opened
    from sampling.pipeline import Pipeline

    with context.together():
        opened = Opened.open(config)
    given = context.on_main(choices_of_set, config, opened)
    labels = SetLabels.of(config, opened, given)
    number, frames = config.num_fid_samples, [opened.frames] if opened.frames else []
    shape = (number, *frames, *sides(opened.settings["image_size"]), 3)
    folder = Path(config.sample_dir) / (config.folder or default_name(config, opened))
    npz = folder.with_name(f"{folder.name}.npz")
    with ExitStack() as stack:

        def claim_folder():
            """Lock the folder until the stack ends, and check its settings. Returns whether the set is complete."""
            stack.enter_context(lock_folder(folder))
            remove_leftovers(folder.parent, npz.name)
            check_output(npz, "--folder" if config.folder else "--sample-dir")
            check_settings(opened, given, folder)
            return image_set.is_complete(npz, shape)

        if context.on_main(claim_folder):
            context.print(f"Nothing left to do: {npz} holds {number:,} images")
            return
        with context.together():
            pipeline = Pipeline.build(opened, context.device)
        if warning := precision_warning(config.compute.precision, context.device):
            context.print(warning)
        sampler = pipeline.sampler
        context.print(f"{opened.checkpoint.describe()}, {sampler.num_sampling_steps} steps of {sampler.sampler}, "
                      f"{number:,} images to {folder}, {context.describe()}")  # fmt: skip
        try:
            written = False
            while not written:  # again if files were damaged
                batches = context.on_main(image_set.incomplete_batches, folder, number, config.per_proc_batch_size)
                with context.together():
                    draw(config, context, pipeline, labels, folder, batches)
                written = context.on_main(image_set.write_npz, npz, folder, shape, labels.label)
        except KeyboardInterrupt:
            context.print(f"Interrupted: the same command draws the images that {folder} still lacks")
            raise
        context.print(f"{npz}: arr_0 {shape} uint8, arr_1 labels")


def draw(config, context, pipeline, labels, folder, batches):
    """Draw batches, which are ranges of indices, every world_size-th on this process. Threads draw the noise of the next
    batch and write the files of the one before; on a GPU they also decode it."""
    import torch
    from tqdm.auto import tqdm

    from diffusion import samplers
    from runtime.devices import explain_out_of_memory
    from sampling.grid import as_pictures
    from sampling.image_set import write_pngs

    total, batches = sum(map(len, batches)), batches[context.rank :: context.world_size]
    aside = context.device.type in DECODED_ASIDE
    stream = torch.cuda.Stream(context.device) if context.device.type == "cuda" else None

    def decode_and_write(x_0, indices, drawn):
        with torch.inference_mode(), torch.cuda.stream(stream):  # both hold for one thread
            if drawn:
                drawn.wait()
            write_pngs(folder, indices, as_pictures(pipeline.to_pixels(x_0)))

    with (
        explain_out_of_memory("lower --per-proc-batch-size"),
        tqdm(total=total, desc="Sampling", unit="image", disable=not context.is_main) as bar,
        ThreadPoolExecutor(1) as drawer,
        ThreadPoolExecutor(1) as writer,
        torch.inference_mode(),
    ):
        draw_noise, written = partial(drawer.submit, pipeline.noise, config.global_seed), None
        upcoming = draw_noise(batches[0]) if batches else None
        for indices, following in zip_longest(batches, batches[1:]):
            x_T, step_noise = upcoming.result()
            upcoming = draw_noise(following) if following else None
            x_0 = samplers.last(pipeline.steps(labels.choices(indices), x_T, step_noise))
            if aside:
                call = decode_and_write, x_0, indices, stream and torch.cuda.current_stream().record_event()
            else:
                call = write_pngs, folder, indices, as_pictures(pipeline.to_pixels(x_0))
            if written:
                written.result()  # which raises its error
            written = writer.submit(*call)
            bar.update(min(len(indices) * context.world_size, total - bar.n))
        if written:
            written.result()


def default_name(config, opened):
    """The name of the set's folder, as published: it says the model by its own sizes, the sampler where that is not the
    published one, and --average where it is given."""
    settings, sampler = opened.settings, opened.config.sampler
    checkpoint = Path(opened.checkpoint.path).stem if config.source.ckpt else "pretrained"
    model, vae = opened.checkpoint.describe().replace("/", "-"), settings["vae"].strip("/").replace("/", "-")
    name = f"{model}-{checkpoint}-size-{settings['image_size']}-vae-{vae}-cfg-{opened.config.guidance.cfg_scale}"
    name += "" if sampler.sampler == "ddpm" else f"-{sampler.sampler}-{sampler.num_sampling_steps}"
    name += f"-average-{config.source.average}" if config.source.average else ""
    return f"{name}-seed-{config.global_seed}"


def check_settings(opened, given, folder):
    """Record in options.json what the images of the folder are made with. Raises UserError where that differs from what the
    images that are there were made with. given: the choices that the user named, or None."""
    settings, path, crc32 = opened.made_with(given), folder / "options.json", opened.checkpoint.checksum
    recorded = read_json(path)
    if recorded is None:
        if path.exists() or any(folder.glob("*.png")):
            raise UserError(path, "missing or damaged", ELSEWHERE)
    else:
        older = dict.fromkeys(settings) | opened.config.defaults()  # a record may be older than an option
        differing = differences({**older, **recorded}, settings)
        if recorded.get("checkpoint_crc32") != crc32:
            differing.append(f"a checkpoint of CRC-32 {recorded.get('checkpoint_crc32')}, now {crc32}")
        if differing:
            raise UserError(folder, f"its images were made with {'; '.join(differing)}", ELSEWHERE)
    with write_errors(path):
        write_json(path, {**settings, "checkpoint_crc32": crc32})


if __name__ == "__main__":
    main()
