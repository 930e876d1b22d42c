"""Encode an image folder once, so that training need not: data/latents.py tells what is stored.

    torchrun --nproc_per_node=8 extract_latents.py --data-path /path/to/imagenet/train --out latents/imagenet256
    torchrun --nproc_per_node=8 train.py --model DiT-XL/2 --data-path latents/imagenet256

Run again after an interruption, the command makes the shards that are missing or damaged, and leaves the others alone."""

import runtime  # noqa: F401 -- first: from here on Ctrl-C prints a line  # isort: skip
from data.config import ExtractConfig
from runtime.parser import Parser


def main(argv=None):
    with Parser(ExtractConfig, __doc__).processes(argv) as (config, context):
        from data.extraction import extract

        extract(config, context)


if __name__ == "__main__":
    main()
