"""The ground floor: errors, files, random numbers, processes and devices, configs. Imports nothing of this project."""

import os
import sys


def end_quietly(kind, error, traceback):
    """sys.excepthook of commands: Ctrl-C before a command has begun, as in its imports, prints a line, not a traceback."""
    if kind is not KeyboardInterrupt:
        sys.__excepthook__(kind, error, traceback)
    elif os.environ.get("RANK", "0") == "0":
        print(f"{os.path.basename(sys.argv[0])}: error: interrupted", file=sys.stderr)


# Not in other programs that import this package, and here because it is what every command imports first
if os.path.abspath(getattr(sys.modules["__main__"], "__file__", "")).startswith(os.path.dirname(__path__[0]) + os.sep):
    sys.excepthook = end_quietly
