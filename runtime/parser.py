"""argparse parsers made from configs (runtime/config.py). A user's mistake is printed as one line, with exit status 2."""

import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import gc
import itertools
import os
import signal
import sys

from runtime.config import Config, check_value, field_types, flag, label
from runtime.errors import RunError, UserError
from runtime.launch import launched


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Adds the default to an option's help, unless there is none, it is "off", or the help states it in words."""

    def _get_help_string(self, action):  # the method that the base class itself overrides
        clear = action.default is None or action.default is False or action.required or "(default" in (action.help or "")
        return action.help if clear else super()._get_help_string(action)


class Output:
    """A text stream that drops failed writes: a run does not end with its output, as with `| head` or a full disk."""

    def __init__(self, stream):
        # None where the shell has closed it; what is opened next would take its number and get what libraries print
        self._stream = stream or open(os.devnull, "w")  # noqa: SIM115
        with contextlib.suppress(AttributeError, ValueError):  # an object that is not a file
            self._stream.reconfigure(errors="backslashreplace")  # a file's name may hold bytes that are no text

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
            self._stream.write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


def prepare_process():
    """What every command does before it imports PyTorch."""
    if not isinstance(sys.stdout, Output):
        sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    # what is imported next makes 600,000 objects; looking through them again and again takes an eighth of a start
    gc.set_threshold(50_000)
    spin_briefly()
    keep_freed_memory()
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        with contextlib.suppress(ValueError):  # of a thread that is not the first
            signal.signal(signal.SIGINT, interrupt)


def interrupt(number, frame):
    """Ctrl-C: raise KeyboardInterrupt. While modules are being imported, end the process at once, since nothing has begun:
    C++ code that imports modules, as PyTorch's does, aborts on an exception."""
    while frame and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    if not frame:
        raise KeyboardInterrupt
    if speaks():
        print(f"{os.path.basename(sys.argv[0])}: error: interrupted", file=sys.stderr)
    os._exit(130)


def speaks():
    """Whether this process is the one that prints what all of them know."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def spin_briefly():
    """Let OpenMP's threads give up their cores soon while they wait, unless the user has said how they shall wait. libgomp
    reads the variable when PyTorch loads it.

    Steps a second of DiT-S/2 on two busy cores (load 7 to 16, three rounds, all settings in turn): 0.02 to 0.06 by default;
    with a count of 0 0.10 to 0.18, 100 0.15 to 0.20, 1000 0.13 to 0.23, 10,000 0.08 to 0.14, 100,000 0.04 to 0.10;
    OMP_WAIT_POLICY=PASSIVE 0.09 to 0.29, but it is slower on idle cores, where 1000 costs nothing."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY"}.intersection(os.environ):
        os.environ["GOMP_SPINCOUNT"] = "1000"


def keep_freed_memory(most=1 << 30):
    """Let glibc's malloc keep up to `most` bytes that were freed, for the next step's activations, unless the user has set
    how it works. By default it maps each array of some MiB anew, and the kernel fills it with zeros.

    Processor time on one core of an AMD EPYC, in turn: features of 32 images by EfficientNet-Lite0 1.23 and 1.28 s
    by default, 0.70 and 0.59 s so; a training step of the demo's model 65.6 and 68.5 ms, 63.4 and 62.9 ms."""
    trim_threshold, mmap_threshold = -1, -3
    if not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library, which has no such call
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(mmap_threshold, most), mallopt(trim_threshold, most)


class Parser(argparse.ArgumentParser):
    """The parser of a command whose options are the fields of `config_class`; a nested config is a group of options.

    description: the command's docstring. presets: {field name: {value of that field: other defaults}}, for options that
    stand for several; or {field name: function of all values that returns the other defaults, and may raise UserError}."""

    def __init__(self, config_class, description, presets=None):
        # abbreviations would change their meaning with every new option
        super().__init__(description=description, formatter_class=Formatter, allow_abbrev=False, add_help=False)
        self.config_class, self.defaults, self.presets = config_class, config_class.defaults(), presets or {}
        self.everyday, self.other = self.add_argument_group("everyday options"), self.add_argument_group("options")
        self.usage = "%(prog)s [options]"  # of 70 options argparse would make forty lines
        self._add_options(config_class, self.other)
        first = self.everyday if any(field.metadata["basic"] for field in config_class.all_fields()) else self.other
        first.add_argument("-h", "--help", action="help", help="show this help and exit")

    def _add_options(self, config_class, topic):
        for field in dataclasses.fields(config_class):
            kind, count, _ = field_types(config_class)[field.name]
            if issubclass(kind, Config):
                title = (kind.__doc__ or kind.__name__).split("\n")[0].rstrip(".")
                self._add_options(kind, self.add_argument_group(title))
                continue
            default = self.defaults.get(field.name, field.default)
            required = default is dataclasses.MISSING
            text = field.metadata["help"].replace("%", "%%")
            if field.metadata["positional"]:
                name = label(field)
                self.add_argument(field.name, metavar=name, help=text, nargs=count)
                self.usage += f" {name}"
                continue
            words = {"help": text, "required": required, "default": None if required else default}
            if kind is bool:
                # of an option that is off, nobody types the --no- form, which is understood
                words["action"] = argparse.BooleanOptionalAction if default else "store_true"
            else:
                words |= {"type": self._converter(kind, field.metadata), "metavar": field.metadata["metavar"]}
                if field.metadata["choices"] and not words["metavar"]:
                    words["metavar"] = "{" + ",".join(map(str, field.metadata["choices"])) + "}"
                if count is not None:
                    words["nargs"] = count
                if field.metadata["repeatable"]:
                    words["action"] = "extend"
                if field.metadata["const"] is not None:
                    words |= {"nargs": "?", "const": field.metadata["const"]}
            group = self.everyday if field.metadata["basic"] else topic
            option = group.add_argument(flag(field.name), **words)
            if kind is bool and not default:
                hidden = {"help": argparse.SUPPRESS, "default": argparse.SUPPRESS, "dest": field.name}
                group.add_argument(f"--no-{flag(field.name)[2:]}", action="store_false", **hidden)
            if required:
                self.usage += f" {flag(field.name)} {option.metavar or field.name.upper()}"

    def _parse_optional(self, word):  # of the base class; a value may begin with "-": a negative number, a prompt
        return super()._parse_optional(word) if word.startswith("--") or word == "-h" else None

    def parse_args(self, argv=None, namespace=None):
        argv = sys.argv[1:] if argv is None else argv
        known = self._option_string_actions
        names = [word.partition("=")[0] for word in itertools.takewhile(lambda word: word != "--", argv)]
        for name in names if not {"-h", "--help"}.intersection(argv) else ():
            # before argparse misses the value that the misspelt option should give
            if name.startswith("--") and " " not in name and name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                self.error(f"unrecognized arguments: {name}; {f'did you mean {close[0]}?' if close else 'see --help'}")
        return super().parse_args(argv, namespace)

    @staticmethod
    def _converter(kind, metadata):
        def convert(value):
            with contextlib.suppress(ValueError):
                value = kind(value)
            try:
                return check_value(value, kind, metadata)
            except ValueError as error:
                raise argparse.ArgumentTypeError(str(error)) from None

        return convert

    def parse(self, argv=None):
        """The config of a command line. Mistakes end the process with one line and exit status 2."""
        prepare_process()
        values = vars(self.parse_args(argv))
        for name, choices in self.presets.items():
            with self.report_errors():
                others = choices(values) if callable(choices) else choices[values[name]]
            self.set_defaults(**others)  # what the command line gives wins over them
            values = vars(self.parse_args(argv))
        with self.report_errors():
            config = self.config_class.from_flat(values)
            if launched()[0] == 0:  # on another host there may be nothing; what reads the data there says so
                config.check_paths()
            return config

    @contextlib.contextmanager
    def options(self, argv=None):
        """Parse, in a command of one process: the block gets the config, and its errors are reported."""
        config = self.parse(argv)
        with self.report_errors():
            yield config

    @contextlib.contextmanager
    def processes(self, argv=None):
        """Parse, and join the other processes of the command: the block gets (config, Context), and its errors are
        reported. It imports what it needs itself: torch takes seconds, and by then the command line is checked."""
        with self.options(argv) as config:
            from runtime.distributed import processes

            with processes(config.flat()["device"]) as context:
                yield config, context

    def error(self, message, status=UserError.status, every_rank=False):
        if every_rank or speaks():
            for bar in [*sys.modules["tqdm"].tqdm._instances] if "tqdm" in sys.modules else ():
                bar.close()  # the line would stand behind a bar that is still open
            message = str(message).replace("\n", "\\n")  # a file's name may hold line breaks
            print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(status)

    @contextlib.contextmanager
    def report_errors(self):
        """Print a UserError, or an unforeseen one of the system, as one line and exit with its status; Ctrl-C with 130."""
        try:
            yield
        except UserError as error:
            self.error(error, error.status, every_rank=error.of_one_rank)
        except MemoryError:
            self.error("out of memory", RunError.status, every_rank=True)
        except OSError as error:
            what = f"{error.filename}: " if error.filename else "input or output failed: "
            self.error(f"{what}{error.strerror or error}", RunError.status, every_rank=True)
        except KeyboardInterrupt:
            self.error("interrupted", 130)
