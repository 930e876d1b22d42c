"""Draw many images from a DiT, for evaluation: PNG files and one .npz of all.

    torchrun --nproc_per_node=8 sample_ddp.py --num-fid-samples 50000 --cfg-scale 1.5
    python sample_ddp.py --ckpt results/000-DiT-S-2/checkpoints/0400000.pt --balanced-labels --num-fid-samples 1000

Image i depends on the seed and on i alone. After an interruption the same command draws the images that are missing.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from runtime.config import differences
from runtime.errors import UserError
from runtime.files import check_output, checksum_of_text, lock_folder, read_json, remove_leftovers, write_errors, write_json
from runtime.parser import Parser
from sampling.config import SampleSetConfig

DECODED_ASIDE = {"cuda"}  # devices that decode a batch while they draw the next; a CPU's cores are busy with one


def main(argv=None):
    parser = Parser(SampleSetConfig, __doc__)
    config = parser.parse(argv)
    with parser.report_errors():
        from runtime.distributed import processes  # here and below: torch takes seconds to import

        with processes(config.compute.device) as context:
            sample(config, context)


def sample(config, context):
    """Draw the images that are missing in the set's folder, and write all of them to the .npz file."""
    from data.captions import read_prompts
    from runtime.devices import precision_warning
    from sampling import image_set
    from sampling.noise import image_label
    from sampling.original import check_prompts
    from sampling.pipeline import Pipeline
    from sampling.source import Source

    options = (config.source, config.sampler, config.guidance, config.compute, "ema", config.text)
    prompts = context.run_on_main(lambda: read_prompts(config.prompts) if config.prompts else ())
    source = context.run_on_all_ranks(lambda: Source.open(*options, prompts))
    context.run_on_all_ranks(lambda: check_prompts(source, "--prompts"))
    labels, classes = config.labels and source.parse_labels(config.labels), max(source.settings["num_classes"], 1)
    cycle = range(len(prompts) or classes) if prompts or config.balanced_labels else labels

    def label_of(index):
        return cycle[index % len(cycle)] if cycle else image_label(config.global_seed, index, classes)

    number, size = config.num_fid_samples, source.settings["image_size"]
    folder = Path(config.sample_dir) / (config.folder or default_name(config, source.settings))
    npz = folder.with_name(f"{folder.name}.npz")
    with ExitStack() as stack:

        def claim_folder():
            """Lock the folder until the stack ends, and check its settings. Returns whether the set is complete."""
            stack.enter_context(lock_folder(folder))
            remove_leftovers(folder.parent, npz.name)
            check_output(npz, "--folder" if config.folder else "--sample-dir")
            check_settings(config, source, labels, folder)
            return image_set.npz_shape(npz) == (number, size, size, 3)

        if context.run_on_main(claim_folder):
            context.print(f"Nothing left to do: {npz} holds {number:,} images")
            return
        pipeline = context.run_on_all_ranks(lambda: Pipeline.build(source, context.device))
        if warning := precision_warning(config.compute.precision, context.device):
            context.print(warning)
        context.print(f"{source.settings['model']}, {number:,} images to {folder}, {context.describe()}")
        try:
            written = False
            while not written:  # again if files were damaged
                batches = context.run_on_main(
                    lambda: image_set.incomplete_batches(folder, number, config.per_proc_batch_size)
                )
                context.run_on_all_ranks(lambda batches=batches: draw(config, context, pipeline, label_of, folder, batches))
                written = context.run_on_main(lambda: image_set.write_npz(npz, folder, number, size, label_of))
        except KeyboardInterrupt:
            context.print(f"Interrupted: the same command draws the images that {folder} still lacks")
            raise
        context.print(f"{npz}: arr_0 {(number, size, size, 3)} uint8, arr_1 labels")


def default_name(config, settings):
    checkpoint = Path(config.source.ckpt).stem if config.source.ckpt else "pretrained"
    model, vae = settings["model"].replace("/", "-"), settings["vae"].strip("/").replace("/", "-")
    name = f"{model}-{checkpoint}-size-{settings['image_size']}-vae-{vae}-cfg-{config.guidance.cfg_scale}"
    return f"{name}-seed-{config.global_seed}"


def check_settings(config, source, labels, folder):
    """Record in options.json what the images of the folder are made with. Raises UserError where that differs from what the
    images that are there were made with."""
    free = ("ckpt", "sample_dir", "folder", "num_fid_samples", "per_proc_batch_size", "device", "text_encoder")
    settings = {name: value for name, value in config.flat().items() if name not in free}
    settings |= {**source.settings, "labels": labels, "guide_ckpt": source.guide and source.guide.checksum}
    settings["prompts"] = source.text_encoder and checksum_of_text(source.class_names)
    path, crc32 = folder / "options.json", source.checkpoint.checksum
    recorded = read_json(path)
    if recorded is None and (path.exists() or any(folder.glob("*.png"))):
        raise UserError(
            f"{path}: missing or damaged; choose another --sample-dir or --folder than that of the images there"
        )
    if recorded is not None:
        older = dict.fromkeys(settings) | config.defaults()  # a record may be older than an option
        differing = differences({**older, **recorded}, settings)
        if recorded.get("checkpoint_crc32") != crc32:
            differing.append(f"a checkpoint of CRC-32 {recorded.get('checkpoint_crc32')}, now {crc32}")
        if differing:
            different = "; ".join(differing)
            raise UserError(f"{folder}: its images were made with {different}; choose another --sample-dir or --folder")
    with write_errors(path):
        write_json(path, {**settings, "checkpoint_crc32": crc32})


def draw(config, context, pipeline, label_of, folder, batches):
    """Draw batches, which are ranges of indices, every world_size-th on this process. Threads draw the noise of the next
    batch and write the files of the one before; on a GPU they also decode it."""
    import torch
    from tqdm.auto import tqdm

    from diffusion import samplers
    from runtime.devices import explain_out_of_memory
    from sampling import image_set

    total, batches = sum(map(len, batches)), batches[context.rank :: context.world_size]
    bar = tqdm(total=total, desc="Sampling", unit="image", disable=not context.is_main)
    stream = torch.cuda.Stream(context.device) if context.device.type == "cuda" else None

    def finish(x_0, indices, drawn=None):
        """Decode x_0, in the stream, and have the files written. Returns the writes under way."""
        with torch.inference_mode(), torch.cuda.stream(stream):  # both hold for one thread
            if drawn:
                drawn.wait()
            images = pipeline.to_pixels(x_0)
        paths = [image_set.png(folder, index) for index in indices]
        return [writers.submit(image_set.write_png, path, image) for path, image in zip(paths, images, strict=True)]

    with (
        explain_out_of_memory("lower --per-proc-batch-size"),
        torch.inference_mode(),
        ThreadPoolExecutor(4) as writers,
        ThreadPoolExecutor(1) as decoder,
        ThreadPoolExecutor(1) as noise_maker,
        bar,
    ):
        noises = (noise_maker.submit(pipeline.noise, config.global_seed, indices) for indices in batches)
        upcoming, writes_before = next(noises, None), list  # writes_before() waits until the batch before is decoded
        for indices in batches:
            noise, upcoming = upcoming.result(), next(noises, None)
            x_0 = samplers.last(pipeline.steps([label_of(index) for index in indices], *noise))
            for write in writes_before():
                write.result()
            if context.device.type in DECODED_ASIDE:
                drawn = stream and torch.cuda.current_stream().record_event()
                writes_before = decoder.submit(finish, x_0, indices, drawn).result
            else:
                writes_before = partial(list, finish(x_0, indices))
            bar.update(min(len(indices) * context.world_size, total - bar.n))
        for write in writes_before():
            write.result()


if __name__ == "__main__":
    main()
