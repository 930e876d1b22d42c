"""Typed configs. A config is a small frozen dataclass beside the code that it configures:

    @dataclass(frozen=True)
    class OptimizerConfig(Config):
        lr: float = option(1e-4, "learning rate", above=0)
        clip_grad_norm: float | None = option(None, "scale gradients down to this norm (default: off)", above=0)

A field's type, bounds and choices are checked whenever a config is made: from the command line (runtime/parser.py), from a
file, or in code. Field names are the flags' names, with _ for -. Configs may be nested."""

import ast
import dataclasses
import functools
import importlib.util
import itertools
import math
import os
import sys
import types
import typing

from runtime import files
from runtime.errors import UserError
from runtime.shapes import ImageSize, sides

MAX_INT = 2**63 - 1  # of every whole number without a bound of its own: arrays and random generators take no larger ones


def option(default=dataclasses.MISSING, help="", *, low=None, high=None, above=None, choices=None, path=None,
           changeable=False, basic=False, metavar=None, const=None, positional=False, repeatable=False):  # fmt: skip
    """A field of a Config.

    help: a sentence that stands alone; the default is added to it unless it says "(default". low, high: inclusive bounds
    of a number; above: an exclusive one. choices: the allowed values, or "module:TABLE", the keys of a dict. path: what a
    command line must name, a "file" or "folder" that exists, or an "output" file that can be written. changeable: whether
    a resumed run may change the value (options that change the result may not). basic: an option of every day, which
    --help shows first. const: the value of the flag when it is given without one. positional: a required argument, without
    a flag. repeatable: of a tuple, that the flag may be given several times, for more values."""
    metadata = {name: value for name, value in locals().items() if name != "default"}
    metadata["choices"] = KeysOf(choices) if isinstance(choices, str) else choices
    return dataclasses.field(default=default, metadata=metadata)


class KeysOf:
    """The keys of a dict in a module, "models:BLOCKS": of the module if it is imported, else by reading its source, since
    importing it may take seconds. The source has to show the dict as {"key": value, ...}."""

    def __init__(self, table):
        self.module, self.name = table.split(":")

    def __iter__(self):
        found = getattr(sys.modules.get(self.module), self.name, None)  # None too while the module is being imported
        return iter(self._keys_in_source() if found is None else found)

    @functools.cache  # noqa: B019 -- there is one object for each option
    def _keys_in_source(self):
        with open(importlib.util.find_spec(self.module).origin, encoding="utf-8") as file:
            for node in ast.parse(file.read()).body:
                names = [getattr(name, "id", None) for name in getattr(node, "targets", [getattr(node, "target", None)])]
                if self.name in names and isinstance(node.value, ast.Dict):
                    return [ast.literal_eval(key) for key in node.value.keys]
        raise AssertionError(f"{self.module}.py shows no dict {self.name}")


@functools.cache
def field_types(config_class):
    """{field name: (kind, number of values, optional)}: kind is int, float, str, bool, ImageSize or a config class; the
    number of values is None for one value, an int for a tuple of that many, or "+" for a tuple of one or more."""
    found = {}
    for name, hint in typing.get_type_hints(config_class).items():
        members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        optional = types.NoneType in members
        (hint,) = (member for member in members if member is not types.NoneType)
        count = None
        if typing.get_origin(hint) is tuple:
            kinds = typing.get_args(hint)
            hint, count = kinds[0], "+" if kinds[-1] is Ellipsis else len(kinds)
        found[name] = hint, count, optional
    return found


def flag(name):
    return f"--{name.replace('_', '-')}"


def label(field):
    """How a message names the option of a field."""
    named = field.metadata.get("positional") and (field.metadata["metavar"] or field.name.upper())
    return named or flag(field.name)


def check_value(value, kind, metadata):
    """The value, converted to `kind` (a list or an int where a float is wanted are fine). Raises ValueError, whose text
    continues a sentence that names the option: "-1 is not a number, more than 0"."""
    if kind is ImageSize:
        return ImageSize([check_value(side, int, metadata) for side in sides(value)])
    low, high, above, choices = (metadata.get(key) for key in ("low", "high", "above", "choices"))
    if kind is int and high is None and isinstance(value, int) and abs(value) > MAX_INT:
        high = MAX_INT
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1000 else math.inf
    fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    fits = fits and (kind is not float or math.isfinite(value)) and (low is None or value >= low)
    fits = fits and (high is None or value <= high) and (above is None or value > above)
    if not fits:
        wanted = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(kind, kind.__name__)
        bounds = (("{} or more", low), ("{} or less", high), ("more than {}", above))
        bounds = " and ".join(words.format(bound) for words, bound in bounds if bound is not None)
        raise ValueError(f"{value!r:.80} is not {wanted}{', ' if bounds else ''}{bounds}")
    if kind is str:
        if not value:  # such as that of a shell variable that is not set
            raise ValueError("is empty; give a value")
        try:
            encodable = b"\0" not in os.fsencode(value)
        except UnicodeEncodeError:  # half of a surrogate pair
            encodable = False
        if not encodable:
            raise ValueError(f"{value!r:.80} has characters that no file name can have")
    if choices and value not in choices:
        raise ValueError(f"{value!r:.80} is not one of {', '.join(map(str, choices))}")
    return value


@dataclasses.dataclass(frozen=True)
class Config:
    """Base of all configs. Making one raises UserError, naming the flag, where a value is not what its field allows."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            kind, count, optional = field_types(type(self))[field.name]
            value = getattr(self, field.name)
            if value is None and optional:
                continue
            try:
                if count is None:
                    value = check_value(value, kind, field.metadata)
                elif not isinstance(value, list | tuple) or len(value) != (len(value) or 1 if count == "+" else count):
                    raise ValueError(f"{value!r} is not {'a list' if count == '+' else f'{count} values'}")
                else:
                    value = tuple(check_value(entry, kind, field.metadata) for entry in value)
            except ValueError as error:
                raise UserError(label(field), error) from None
            object.__setattr__(self, field.name, value)
        self.check()

    def check(self):
        """For subclasses: refuse combinations of values. Raises UserError that names the options."""

    def check_paths(self):
        """Raises UserError where a path is not the file or folder that its option says (`path` of `option`)."""
        values = self.flat()
        for field in self.all_fields():
            kind, paths = field.metadata.get("path"), values[field.name]
            for path in [paths] if isinstance(paths, str) else (kind and paths) or []:
                if kind == "output":
                    files.check_output(path, label(field))
                elif kind:
                    files.check_input(path, label(field), kind)

    def flat(self):
        """{field name: value} of this config and the configs nested in it, as plain JSON values, None included."""
        values = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            values |= value.flat() if isinstance(value, Config) else {field.name: _plain(value)}
        return values

    @classmethod
    def from_flat(cls, values):
        """The config of flat values, as of a file. Missing ones are defaults, unknown ones ignored. Raises UserError."""
        own, values = {}, cls.defaults() | values
        for field in dataclasses.fields(cls):
            kind = field_types(cls)[field.name][0]
            if issubclass(kind, Config):
                own[field.name] = kind.from_flat(values)
            elif field.name not in values:
                raise UserError(flag(field.name), "is missing", "it has no default")
            else:
                own[field.name] = values[field.name]
        return cls(**own)

    @classmethod
    def all_fields(cls):
        """Every field of this config and of the configs nested in it."""
        for field in dataclasses.fields(cls):
            kind = field_types(cls)[field.name][0]
            if issubclass(kind, Config):
                yield from kind.all_fields()
            else:
                yield field

    @classmethod
    def defaults(cls):
        """{name: default} of all fields that have one. A nested config that is a field's default gives its values."""
        values = {field.name: field.default for field in cls.all_fields() if field.default is not dataclasses.MISSING}
        for field in dataclasses.fields(cls):
            values |= field.default.flat() if isinstance(field.default, Config) else {}
        return values

    @classmethod
    def changeable(cls):
        """Names of the options that a resumed run may change."""
        return {field.name for field in cls.all_fields() if field.metadata.get("changeable")}


def as_lists(config_class, names=None):
    """A Config like config_class whose options take lists of values: the options `names`, by default all. An option that is
    a pair takes pairs, one after the other. None stands for the default alone."""
    fields = []
    for field in dataclasses.fields(config_class):
        kind, _, optional = field_types(config_class)[field.name]
        hint, default, metadata = (kind | None if optional else kind), field.default, dict(field.metadata)
        if names is None or field.name in names:
            hint, default = tuple[kind, ...] | None, None
            if field.default is not None and "(default" not in metadata["help"]:
                metadata["help"] += f" (default: {field.default})"
        fields.append((field.name, hint, dataclasses.field(default=default, metadata=metadata)))
    more = {"bases": (Config,), "namespace": {"__doc__": config_class.__doc__}, "frozen": True}
    return dataclasses.make_dataclass(f"{config_class.__name__}Lists", fields, **more)


def combinations(config_class, values):
    """Every combination of the lists that the options of `as_lists(config_class)` take, the first option changing slowest:
    dicts. values: {name: list of values, None, or one value of an option without}. Raises UserError for half a pair."""
    lists = []
    for name, (_, count, _) in field_types(config_class).items():
        given = values[name]
        if count and given is not None:
            if len(given) % count:
                raise UserError(flag(name), f"takes {count} values, or several times {count}, not {len(given)}")
            given = [given[i : i + count] for i in range(0, len(given), count)]
        given = [config_class.defaults()[name]] if given is None else given if isinstance(given, list | tuple) else [given]
        lists.append([(name, value) for value in given])
    return map(dict, itertools.product(*lists))


def differences(recorded, now, ignore=()):
    """What differs between recorded settings and the present ones, as phrases that name the flag: ["--lr 0.1, now 0.2"].

    recorded, now: {name: value}. Only what both know is compared, and `ignore` is not."""
    both = {name: _plain(value) for name, value in now.items() if name in recorded and name not in ignore}
    return [f"{flag(name)} {recorded[name]}, now {value}" for name, value in both.items() if recorded[name] != value]


def _plain(value):
    """The form that a value has in JSON."""
    return list(value) if isinstance(value, tuple) else value
