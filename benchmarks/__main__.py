"""How fast it is: one entry for all measurements of speed and memory.

    python -m benchmarks train_step --model DiT-S/4 --device cpu     # and sampling, gpu: their --help lists more
    python -m benchmarks latents saving --json numbers.json          # any of the small ones, by their names
    OMP_NUM_THREADS=1 python -m benchmarks images --num-workers 0 1 2

The small ones: images, latents, listing, saving, memory, text, metrics; see README.md.
"""

import importlib
import sys

from runtime.files import write_json
from runtime.parser import Parser

PROGRAMS = ("train_step", "sampling", "gpu")


def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] in PROGRAMS:
        return importlib.import_module(f"benchmarks.{words[0]}").main(words[1:])
    from benchmarks.rows import ROWS, RowsConfig
    from benchmarks.timing import machine, table

    parser, found = Parser(RowsConfig, __doc__), {}
    config = parser.parse(words)
    with parser.report_errors():
        setting = {"machine": machine(config.device), **config.flat()}
        for name in config.rows:
            found[name] = ROWS[name](config)
            print(f"{name}, {setting['machine']}\n\n{table(found[name])}\n", flush=True)
        if config.json:
            write_json(config.json, {"settings": setting, **found})


if __name__ == "__main__":
    main()
