"""The small measurements: a function for each, which takes a RowsConfig and returns what is printed, a list of dicts."""

import contextlib
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # torch-fidelity installs a package named tests
from helpers import Ranks

from benchmarks import timing
from benchmarks.train_step import SPACE, StepConfig, build_model, make_trainer
from checkpoint import files
from checkpoint.config import MAX_SIZE, ModelOptions
from checkpoint.saver import BackgroundSaver
from data.condition import Texts
from data.config import DataConfig
from data.images import load_dataset
from data.latents import Settings, StoredLatents, read_settings, write_shard
from data.order import GlobalOrder, make_loader
from data.text_encoder import StoredTexts
from evaluation.metrics import Statistics, frechet_distance, inception_score, precision_recall
from runtime import distributed
from runtime.config import Config, option
from runtime.devices import pick_device
from runtime.errors import RunError, UserError
from runtime.files import write_errors
from training import setup, sharding  # noqa: F401 -- counted as memory before the model, with and without --shard
from training.cost import forward_macs, training_memory
from training.meter import peak_memory
from training.trainer import Trainer

WIDTH, HEIGHT = 500, 375  # of the most frequent size in ImageNet
WARM_UP = 20  # batches: all that the workers read ahead, and more


def by_row(help, kind=1, **bounds):
    return option(None, f"{help} (default: by the row)", low=kind, **bounds)


@dataclass(frozen=True)
class RowsConfig(Config):
    """Options of the rows. Each takes those that it needs."""

    rows: tuple[str, ...] = option(help="what to measure", positional=True, metavar="ROW")
    model: ModelOptions
    device: str = option("cpu", "where to compute", choices=("cpu", "cuda"))
    folder: str = option(tempfile.gettempdir(), "folder on the disk to measure; a temporary folder is made in it")
    data_path: str | None = option(None, "folder of images or latents to read (default: random ones are made)")
    images: int | None = by_row("number of images, of files or of feature vectors", high=10**8)
    reference: int = option(10_000, "number of feature vectors of the reference, for metrics", low=4)
    batch_size: int | None = by_row("images of a batch or of a training step", high=65536)
    num_workers: tuple[int, ...] = option((0, 1, 2), "numbers of processes that read; each is measured", low=0, high=1024)
    cold: bool = option(False, "drop the latents from the system's cache before each measurement, which then ends with the "
        "first epoch at the latest")  # fmt: skip
    processes: int = option(4, "number of processes, for memory", low=1, high=1024)
    text_width: int = option(1024, "width of a text's tokens", low=1, high=MAX_SIZE)
    text_length: int = option(120, "tokens of a text, with padding", low=1, high=MAX_SIZE)
    seconds: float = option(3.0, "duration of a measurement of reading, at least", above=0)
    repeats: int = option(5, "number of measurements or seeds, whose median is shown", low=1, high=10_000)
    json: str | None = option(None, "also write the numbers to this file", metavar="FILE", path="output")

    def check(self):
        if not set(self.rows) <= {*ROWS}:
            raise UserError(f"ROW {' '.join(self.rows)}: they are {', '.join(ROWS)}, train_step, sampling and gpu")
        if not Path(self.folder).is_dir():
            raise UserError(f"--folder {self.folder}: no such folder")

    def step(self, model, size, **more):
        """The config of a training step. model, size of the batch: where the options give none."""
        given = {name: value for name, value in self.model.flat().items() if value is not None}
        given = {"model": model, "batch_size": self.batch_size or size, "device": pick_device(self.device), **given}
        config = StepConfig.from_flat({**given, **more})
        return replace(config, compute=setup.resolve_precision(config.compute, torch.device(config.compute.device)))


@contextlib.contextmanager
def temporary(config):
    with write_errors(f"--folder {config.folder}"), tempfile.TemporaryDirectory(dir=config.folder) as folder:
        yield Path(folder)


def spread(values, name="seconds"):
    return {name: statistics.median(values), "least": min(values), "most": max(values)}


def in_processes(main, argv, number):
    """The output of each of several processes, as under torchrun. Raises RunError where one fails."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = Ranks(main, argv, number, Path(folder) / "output")
        if any(ranks.wait(timeout=3600)):
            raise RunError(f"a process has failed: {ranks.text().strip()[-500:]}")
        return [ranks.text(rank) for rank in range(number)]


# ----------------------------------------------------------------------------------------------------------------------
# Reading data


def images(config):
    """Images per second that are read, decoded, cropped and mirrored through make_loader as train.py uses it."""
    config = replace(config, images=config.images or 200, batch_size=config.batch_size or 16)
    with filled(config, make_images) as folder:
        return reading(config, load_dataset(DataConfig(str(folder)), config.model.image_size))


def latents(config):
    """Stored latents per second that are read through make_loader as train.py uses it: the moments of an image or of its
    flip, shuffled, in batches."""
    config = replace(config, images=config.images or 20_000, batch_size=config.batch_size or 256)
    needed = 2 * (WARM_UP + 1) * config.batch_size
    if config.cold and not config.data_path and config.images < needed:
        raise UserError(f"--images {config.images}: --cold needs {needed} or more, of which half count")
    with filled(config, make_latents) as folder:
        return reading(config, StoredLatents(folder, flip=read_settings(folder).flip))


@contextlib.contextmanager
def filled(config, make):
    """--data-path, or a temporary folder that make(folder, images, image_size) has filled."""
    if config.data_path:
        yield config.data_path
        return
    with temporary(config) as folder:
        make(folder, config.images, config.model.image_size)
        yield folder


def make_images(folder, number, image_size):
    """JPEG files with a photograph's spectrum: amplitudes fall as 1 / frequency, the colours go mostly together."""
    (folder / "all").mkdir()
    random = np.random.default_rng(0)
    fall = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH))
    fall[0, 0] = np.inf
    for i in tqdm(range(number), desc="Making images", unit="image"):
        spectrum = np.fft.rfft2(random.standard_normal((4, HEIGHT, WIDTH))) / fall
        grey, *colours = np.fft.irfft2(spectrum, (HEIGHT, WIDTH))
        pixels = np.stack([grey + 0.3 * colour for colour in colours], axis=2)
        pixels = np.clip(128 + 50 * pixels / pixels.std(), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"all/{i:05d}.jpg", quality=95)


def make_latents(folder, number, image_size):
    settings = Settings(
        vae="random numbers", encoder_crc32="0" * 8, scaling=(0.18215,), shift=(0.0,), channels=4, factor=8, moments=2,
        image_size=image_size, dtype="float16", flip=True, batch_size=1, shard_size=8192, tf32=False, images=number,
        names_crc32="0" * 8, classes=("all",),
    )  # fmt: skip
    random = np.random.default_rng(0)
    for shard in tqdm(range(settings.num_shards), desc="Making latents", unit="shard"):
        moments = np.empty(settings.shard_shape(shard), np.float16)
        for row in moments:
            row[:] = random.random(row.shape, np.float32)
        numbers = np.arange(len(moments)) + shard * settings.shard_size
        names = np.frombuffer(b"\0".join(b"all/%d.png" % image for image in numbers), np.uint8)
        arrays = {"moments": moments, "label": np.zeros_like(numbers), "image": numbers, "name": names}
        write_shard(folder, shard, settings, {**arrays, "errors": np.zeros(2)})


def reading(config, dataset):
    """A row for each number of workers; they take turns."""
    rates = {workers: [] for workers in config.num_workers}
    for _ in tqdm(range(config.repeats), desc="Reading", unit="turn"):
        for workers, found in rates.items():
            found.append(rate(config, dataset, workers))
    return [{"workers": workers, **spread(found, "per second")} for workers, found in rates.items()]


def rate(config, dataset, workers):
    """Images per second, read and moved to the device, after the workers' start and a few batches."""
    if config.cold:
        dataset.shards = {}  # pages in use by a map are not dropped
        for path in Path(dataset.folder).glob("*.safetensors"):
            drop_from_cache(path)
    order = GlobalOrder(len(dataset), config.batch_size, seed=0, stop=1 << 60)
    batches = iter(make_loader(dataset, order, workers, pin_memory=config.device == "cuda"))

    def take():
        batch = next(batches)
        batch.get("moments", batch.get("image")).to(config.device, non_blocking=True)
        return len(batch["index"])

    for _ in range(WARM_UP):
        take()
    # of a cold cache the first epoch alone; batches that the workers have read ahead already are not timed
    last = len(dataset) - (WARM_UP + 1) * config.batch_size if config.cold else float("inf")
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < config.seconds and count < last:
        count += take()
    timing.synchronize(torch.device(config.device))
    return count / (time.perf_counter() - start)


def drop_from_cache(path):
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def listing(config):
    """Time and memory for the names of a million image files: torchvision's ImageFolder, and as train.py lists them, in two
    processes with two data workers each; Linux, some minutes."""
    with temporary(config) as folder:
        for i in range(config.images or 1_000_000):
            path = folder / f"class_{i // 1000:04d}" / f"image_{i:08d}.JPEG"
            path.parent.mkdir(exist_ok=True)
            if i % 10_000 == 0:  # file systems limit the links to one file
                original = path
                original.touch()
            else:
                os.link(original, path)
        outputs = [text for way in ("ImageFolder", "train.py") for text in in_processes(list_names, (way, folder), 2)]
    names = ("way", "process", "seconds", "CPU seconds", "MiB", "MiB of a data worker", "of another")
    return [dict(zip(names, text.splitlines()[-1].split(), strict=True)) for text in outputs]


def private_memory():
    """MiB that this process shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024


def list_names(argv):
    from torchvision.datasets import ImageFolder

    way, folder = argv
    with distributed.processes("cpu") as context:
        context.on_main(lambda: np.zeros(1))  # what the first exchange imports is not measured
        before, start, cpu = private_memory(), time.perf_counter(), time.process_time()
        shared = way == "train.py" and load_dataset(DataConfig(folder), 256, context=context)
        names = shared.names if shared else ImageFolder(folder).samples
        numbers = [time.perf_counter() - start, time.process_time() - cpu, private_memory() - before]
        numbers += DataLoader([names, names], None, num_workers=2, collate_fn=memory_of_reading)
        print(way, context.rank, *(f"{number:.1f}" for number in numbers))
        context.barrier()


def memory_of_reading(names):
    """The memory in MiB that a data worker takes by reading all names."""
    before = private_memory()
    for name in names:
        name[0]  # ImageFolder's are tuples of path and class
    return private_memory() - before


# ----------------------------------------------------------------------------------------------------------------------
# Training, beside its steps


def saving(config):
    """What a checkpoint costs the training loop: the copy that the loop waits for, beside writing the file at once, and all
    that the loop loses until the file is written, because the steps meanwhile are slower."""
    settings = config.step("DiT-S/2", 4)
    trainer, batch = make_trainer(settings)
    step = "a training step"
    seconds = {step: [], "written at once": [], "copied, the loop waits": [], "then written in the background": []}
    seconds["lost by a loop that goes on"] = []

    def timed(what, action, *arguments):
        timing.synchronize(trainer.device)
        start = time.perf_counter()
        action(*arguments)
        timing.synchronize(trainer.device)
        seconds[what].append(time.perf_counter() - start)

    def save_and_train(number):
        saver.save(number, trainer.state_dict())
        while saver.thread and saver.thread.is_alive():
            timed(step, trainer.step, batch)

    with temporary(config) as folder:
        saver = BackgroundSaver(folder, keep_last=1)
        trainer.step(batch)  # makes the optimizer's state
        for number in range(1, 3 * config.repeats, 3):
            timed(step, trainer.step, batch)
            timed("written at once", files.save, f"{folder}/{number:07d}.pt", trainer.state_dict())
            timed("copied, the loop waits", saver.save, number + 1, trainer.state_dict())
            timed("then written in the background", saver.wait)
            usual, before = statistics.median(seconds[step]), len(seconds[step])
            timed("lost by a loop that goes on", save_and_train, number + 2)
            seconds["lost by a loop that goes on"][-1] -= usual * (len(seconds[step]) - before)
            del seconds[step][before:]  # slower than the others
            saver.wait()
        size = os.path.getsize(files.newest_first(folder)[0]) / 2**20
    return [{"model": settings.model.name, "MiB": size, "what": what, **spread(found)} for what, found in seconds.items()]


def memory(config):
    """The most memory that each process holds in three steps, with a copy of the model in each (DDP) and with --shard.
    MALLOC_MMAP_THRESHOLD_=65536 makes the C library give freed memory back, so that what is counted is what is needed."""
    depth = {} if config.model.depth else {"depth": 21}  # of DiT-L: 400 million parameters
    size, rows = max(1, (config.batch_size or 4) // config.processes), []
    for kind, shard in {"copies": None, "shards": "all"}.items():
        step = config.step("DiT-L/8", 4, batch_size=size, shard=shard, **depth)
        outputs = in_processes(partial(make_steps, step), [], config.processes)
        numbers = [[int(word) for word in text.splitlines()[-1].split()] for text in outputs]
        peaks = [peak / 2**30 for _, _, peak in numbers]
        row = {"kind": kind, "processes": config.processes, "million parameters": numbers[0][0] / 1e6}
        row |= {"GiB before the model": numbers[0][1] / 2**30, "GiB of the largest": max(peaks), "GiB of all": sum(peaks)}
        rows.append(row)
    return rows


def make_steps(step_config, argv):
    """In each process: three updates of a new model. Prints the most memory that it had, and what it had before."""
    before = peak_memory(torch.device("cpu"))
    trainer, batch = make_trainer(step_config)
    for _ in range(3):
        trainer.step(batch)
    print(sum(p.numel() for p in trainer.model.parameters()), before, peak_memory(trainer.device))
    distributed.close()


def text(config):
    """Time of a training step, and memory, of a model of texts beside the model of classes of the same size. Latents and
    texts are stored ones, so that neither the autoencoder nor the text encoder runs."""
    step = config.step("DiT-S/4", 16)
    steps = {name: partial(text_step, config, step, name) for name in ("classes", "texts")}
    found, rows = timing.race(steps, config.device, config.repeats), []
    for name in steps:
        with torch.device("meta"):
            model = build_model(step, condition_of(config, name))
        row = {"model of": name, **spread(found[name].seconds), "GMACs": forward_macs(model) / 1e9}
        row["million parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
        rows.append(row | {"GiB": training_memory(model, step.timing.batch_size, step.compute.precision)["total"] / 2**30})
    return rows


def condition_of(config, name):
    """None stands for the classes."""
    if name == "classes":
        return None
    null = torch.randn(config.text_length, config.text_width + 1)
    encoder = StoredTexts("", "", config.text_width, config.text_length, null)
    return Texts(encoder.width, encoder.length, encoder=encoder, null_text=null)


def text_step(config, step, name):
    """Makes the training step of a model of texts, or of classes."""
    size, context, condition = step.timing.batch_size, distributed.setup(config.device), condition_of(config, name)
    model = build_model(step, condition)
    batch = {"label": torch.zeros(size, dtype=torch.int64)}
    batch["moments"] = torch.rand(size, 2, 4, *model.sizes.sides).half()
    if name == "texts":
        lengths = torch.randint(5, condition.length + 1, (size,))
        batch |= {"text_tokens": torch.randn(int(lengths.sum()), condition.width).half(), "text_lengths": lengths}
    trainer = Trainer(step.recipe, step.compute, context, model, SPACE, condition=condition)
    return lambda: trainer.step(batch)


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


def metrics_alone(config):
    """Time and memory of the metrics on random feature vectors, without the network. The memory is the most so far."""
    generator, device, rows = torch.Generator().manual_seed(0), config.device, []
    number, dim, classes = config.images or 50_000, 2048, 1008
    samples, reference = (torch.randn(n, dim, generator=generator).to(device) for n in (number, config.reference))

    def moments(x):
        found = Statistics(dim, device)
        for batch in x.split(64):
            found.update(batch)
        return found.mu, found.sigma

    def measure(what, work):
        start = time.perf_counter()
        result = work()
        row = {"what": what, "seconds": time.perf_counter() - start}
        rows.append(row | {"peak GiB": peak_memory(torch.device("cpu")) / 2**30})
        return result

    logits, known = torch.randn(number, classes, generator=generator), moments(reference)
    measure("the vectors alone", lambda: None)
    found = measure(f"mean and covariance of {number} x {dim}", lambda: moments(samples))
    measure(f"Frechet distance, {dim} dimensions", lambda: frechet_distance(*known, *found))
    measure(f"precision, recall: {number} x {dim}, {len(reference)}", lambda: precision_recall(reference, samples))
    measure(f"Inception Score of {number} x {classes}", lambda: inception_score(logits))
    return rows


ROWS = {
    "images": images, "latents": latents, "listing": listing, "saving": saving, "memory": memory, "text": text,
    "metrics": metrics_alone,
}  # fmt: skip
