"""Encode an image folder once, so that training need not: data/latents.py tells what is stored.

    torchrun --nproc_per_node=8 extract_latents.py --data-path /path/to/imagenet/train --out latents/imagenet256
    torchrun --nproc_per_node=8 train.py --model DiT-XL/2 --data-path latents/imagenet256

Run again after an interruption, the command makes the shards that are missing or damaged, and leaves the others alone.
"""

from data.config import ExtractConfig
from runtime.parser import Parser


def main(argv=None):
    parser = Parser(ExtractConfig, __doc__)
    config = parser.parse(argv)
    with parser.report_errors():
        # imported after the command line is parsed, because PyTorch takes seconds to import
        from data.extraction import extract
        from runtime.distributed import processes

        with processes(config.device) as context:
            extract(config, context)


if __name__ == "__main__":
    main()
