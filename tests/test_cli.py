"""The command lines: help and mistakes of every command, and the configs behind them (runtime/config.py)."""

import contextlib
import dataclasses
import importlib
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from helpers import call
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from models import BLOCKS
from runtime.config import Config, differences, field_types, flag, option
from runtime.devices import check_compile
from runtime.errors import RunError, UserError
from runtime.parser import Parser
from runtime.shapes import ImageSize
from sampling.config import SampleConfig, SampleSetConfig

ROOT = Path(__file__).parents[1]
COMMANDS = {
    **{"train": "TrainConfig", "extract_latents": "ExtractConfig", "evaluate": "EvaluateConfig"},
    **{"sample": "SampleConfig", "sample_ddp": "SampleSetConfig"},
    "tools.likelihood": "LikelihoodConfig",
    "tools.sweep": "SweepConfig",
    "tools.complexity": "CostConfig",
    "tools.plot": "PlotConfig",
    "tools.convert": "ConvertConfig",
    "tools.app": "AppConfig",
}
CONFIGS = [getattr(importlib.import_module(name), config) for name, config in COMMANDS.items()]


def is_required(field):
    return field.default is dataclasses.MISSING


# ----------------------------------------------------------------------------------------------------------------------
# Commands


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_each_default_once(name, capsys):
    assert call(importlib.import_module(name).main, "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: None)" not in text
    assert not re.search(r"\(default: [^()]*\) \(default", text)
    assert "(default:" in text


START = """
import importlib, os, sys
for name in sys.argv[1:]:
    command = importlib.import_module(name)
    for word in ("--typo", "--help"):
        os.environ.pop("GOMP_SPINCOUNT", None)
        try:
            command.main([word])
        except SystemExit as end:
            assert bool(end.code) == (word == "--typo")
    print("imported", name, *{"torch", "numpy", "scipy", "diffusers"} & set(sys.modules), os.environ["GOMP_SPINCOUNT"])
"""


def test_commands_start_without_slow_imports():
    """In one process, in which each command adds its modules to those of the ones before."""
    spin = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY"}  # what the user may set
    environment = {name: value for name, value in os.environ.items() if name not in spin}
    argv = [sys.executable, "-c", START, *COMMANDS]
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.count("usage: ") == len(COMMANDS)
    found = [line for line in done.stdout.splitlines() if line.startswith("imported ")]
    # seconds of imports, for which --help and mistakes would wait; and OpenMP's threads would spin beside other work
    assert found == [f"imported {name} 1000" for name in COMMANDS]
    assert done.stderr.count("\n") == len(COMMANDS), "one line about each typo"


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_during_the_first_imports_ends_with_one_line(name, tmp_path):
    """Sent when the command imports its first module of more than a few lines, before it can handle signals."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'runtime.config':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    words = ["-m", name] if "." in name else [f"{name}.py"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stderr == f"{name.split('.')[-1]}.py: error: interrupted\n"
    assert done.returncode == -signal.SIGINT, "a shell has to see that it was interrupted"


@pytest.mark.parametrize("config_class", CONFIGS)
def test_every_help_text_stands_alone(config_class):
    for field in config_class.all_fields():
        text = field.metadata["help"].split(" (default")[0]
        assert len(text.split()) >= 3, f"{flag(field.name)}: {text!r} is too short to understand"
        assert re.match(r"[A-Za-z.]", text), f"{flag(field.name)}: {text!r} does not start with a word"
        first = text.split()[0]
        assert first not in "of in for at with that which as and beside".split(), f"{flag(field.name)}: {text!r}"
        assert not first.endswith("'s"), f"{flag(field.name)}: {text!r} is a fragment of a sentence"


def test_compilation_without_a_compiler_is_refused_at_once(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="--compile: needs a C\\+\\+ compiler, and there is no no-such-compiler"):
        check_compile("inductor", "cpu")
    check_compile("aot_eager", "cpu")
    check_compile(None, "cpu")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("--lr: is too large"), 2, "error: --lr: is too large"),
        (RunError("the loss is not finite"), 1, "error: the loss is not finite"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
    ],
)
def test_errors_are_one_line_on_the_first_rank(error, status, line, capsys, monkeypatch):
    parser = Parser(CONFIGS[-1], "A command.")
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as end, parser.report_errors():
            raise error
        assert end.value.code == status
        err = capsys.readouterr().err
        assert err.count("\n") == lines
        assert err.endswith(f"{line}\n" if lines else "")


@dataclasses.dataclass(frozen=True)
class Topic(Config):
    """a topic"""

    block: str = option("adaln", "a block of the table", choices="models:BLOCKS")
    flip: bool = option(True, "mirror the images", basic=True)
    quiet: bool = option(False, "say less about it")


@dataclasses.dataclass(frozen=True)
class Options(Config):
    topic: Topic
    data: str = option(help="where the data is", path="folder", basic=True)
    output: str | None = option(None, "where results go", path="output")
    prompt: tuple[str, ...] | None = option(None, "texts to draw", repeatable=True)
    lr: float = option(1.0, "rate of learning", low=-9)


def parse(capsys, *argv):
    """(config, None) or (None, the line of the error)."""
    try:
        return Parser(Options, "A command.").parse(list(argv)), None
    except SystemExit:
        return None, capsys.readouterr().err.rpartition("error: ")[2].strip()


def test_help_shows_the_options_of_every_day_first(capsys):
    with pytest.raises(SystemExit):
        Parser(Options, "A command.").parse(["--help"])
    text = capsys.readouterr().out
    order = ("everyday", "  --flip, --no-flip", "  --data", "\noptions", "  --lr", "a topic", "  --block")
    parts = [text.index(word) for word in order]
    assert parts == sorted(parts)
    assert "[options] --data DATA" in text.split("\n")[0]
    assert "--no-quiet" not in text


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--dat x", "unrecognized arguments: --dat; did you mean --data?"),  # and not: --data is required
        ("--data . --lrr=3", "unrecognized arguments: --lrr; did you mean --lr?"),
        ("--data . --no-qiet", "unrecognized arguments: --no-qiet; did you mean --no-quiet?"),
        ("--data . --zzzzzzzzz", "unrecognized arguments: --zzzzzzzzz; see --help"),
        ("--data missing", f"--data missing: no such folder; check the path {ROOT / 'missing'}"),
        ("--data . --output .", "--output .: is a folder; name a file"),
        ("--data . --prompt --lr 3", "argument --prompt: expected at least one argument"),
        ("--data . --block x", f"argument --block: 'x' is not one of {', '.join(BLOCKS)}"),
    ],
)
def test_mistakes_are_answered_with_a_way_out(words, line, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert parse(capsys, *words.split()) == (None, line)


@pytest.mark.parametrize("words", [["--prompt", "-5 degrees", "-x"], ["--prompt=-5 degrees", "--prompt=-x"]])
def test_a_value_may_begin_with_a_dash(words, capsys):
    config, _ = parse(capsys, "--data", str(ROOT), *words, "--lr", "-3", "--no-quiet")
    assert (config.prompt, config.lr, config.topic.quiet) == (("-5 degrees", "-x"), -3, False)


def test_choices_are_the_keys_of_a_table_without_importing_it(monkeypatch):
    import models

    choices = Topic.__dataclass_fields__["block"].metadata["choices"]
    monkeypatch.setitem(models.BLOCKS, "mine", None)
    assert "mine" in choices, "a block that a program has added"
    monkeypatch.delitem(models.BLOCKS, "mine")
    expected = list(models.BLOCKS)
    monkeypatch.delitem(sys.modules, "models")
    assert list(choices) == expected
    assert "models" not in sys.modules


def test_paths_of_a_record_are_not_checked():
    assert Options.from_flat({"data": "missing"}).data == "missing"


# ----------------------------------------------------------------------------------------------------------------------
# Configs

ODD_VALUES = [10**400, -(10**400), float("nan"), float("inf"), 1e308, True, None]
ODD_VALUES += ["", "\0", "\ud800", "1", [], [[]], {}, [1]]
JSON = st.recursive(
    st.sampled_from(ODD_VALUES) | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=2),
    max_leaves=4,
)


@st.composite
def valid_values(draw, config_class):
    """Flat values for a config, each within the bounds of its field."""
    values = {}
    for field in config_class.all_fields():
        kind, count, optional = FIELDS[config_class][field.name]
        if not is_required(field) and draw(st.booleans()):
            continue
        data = field.metadata
        if data["choices"]:
            value = st.sampled_from(list(data["choices"]))
        elif kind is bool:
            value = st.booleans()
        elif kind is str:
            value = st.text(min_size=1, max_size=5)
        elif kind is int:
            value = st.integers(data["low"], data["high"])
        else:
            low = data["low"] if data["above"] is None else data["above"]
            value = st.floats(low, data["high"], exclude_min=data["above"] is not None, allow_nan=False)
            value = value.filter(math.isfinite)
        if count is not None:
            value = st.lists(value, min_size=1 if count == "+" else count, max_size=3 if count == "+" else count)
        values[field.name] = draw(st.none() | value if optional else value)
    return values


def nested_field_types(config_class):
    found = {}
    for name, (kind, count, optional) in field_types(config_class).items():
        if isinstance(kind, type) and issubclass(kind, Config):
            found |= nested_field_types(kind)
        else:
            found[name] = kind, count, optional
    return found


FIELDS = {config_class: nested_field_types(config_class) for config_class in CONFIGS}
NO_DEADLINE = settings(suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow], deadline=None)


@pytest.mark.parametrize("config_class", CONFIGS)
@pytest.mark.parametrize("value", ODD_VALUES, ids=lambda value: repr(value)[:8])
def test_odd_values_of_every_field_end_in_a_config_or_a_user_error(config_class, value):
    required = {field.name: "a" for field in config_class.all_fields() if is_required(field)}
    for name, (kind, *_) in FIELDS[config_class].items():
        with contextlib.suppress(UserError):
            found = config_class.from_flat({**required, name: value}).flat()[name]
            assert found == (ImageSize(value) if kind is ImageSize and value is not None else value)


@NO_DEADLINE
@given(data=st.data(), config_class=st.sampled_from(CONFIGS))
def test_any_json_value_ends_in_a_config_or_a_user_error(data, config_class):
    values = data.draw(valid_values(config_class))
    name = data.draw(st.sampled_from(sorted(FIELDS[config_class])))
    values[name] = data.draw(JSON)
    with contextlib.suppress(UserError):
        config = config_class.from_flat(values)
        assert config_class.from_flat(config.flat()) == config


@NO_DEADLINE
@given(data=st.data(), config_class=st.sampled_from(CONFIGS))
def test_flat_values_give_the_config_back(data, config_class):
    values = data.draw(valid_values(config_class))
    try:
        config = config_class.from_flat(values)
    except UserError:  # options that do not go together
        assume(False)
    assert config_class.from_flat(config.flat()) == config
    assert config.flat().keys() == {field.name for field in config_class.all_fields()}
    assert {name: config.flat()[name] for name in values} == values


@pytest.mark.parametrize("config_class", [SampleConfig, SampleSetConfig])
def test_no_values_give_the_defaults_of_nested_configs_too(config_class):
    """The default guidance of sample.py is another than that of sample_ddp.py."""
    assert config_class.from_flat({}) == Parser(config_class, "").parse([]) == config_class()
    assert config_class.defaults() == config_class().flat()


@NO_DEADLINE
@given(data=st.data(), config_class=st.sampled_from(CONFIGS))
def test_a_command_line_gives_the_same_config_as_its_values(data, config_class):
    values = data.draw(valid_values(config_class))
    argv, positional = [], []
    for field in config_class.all_fields():
        value = values.get(field.name)
        if value is None:
            values.pop(field.name, None)
        elif field.metadata["positional"]:
            positional += value if isinstance(value, list) else [value]
        elif isinstance(value, bool):
            argv.append(flag(field.name) if value else f"--no-{flag(field.name)[2:]}")
        elif isinstance(value, list):
            argv += [flag(field.name), *map(str, value)]
        else:
            argv.append(f"{flag(field.name)}={value}")
    lists = [value for value in values.values() if isinstance(value, list)]
    assume(not any(str(word).startswith("--") or word == "-h" for value in [positional, *lists] for word in value))
    try:
        expected = config_class.from_flat(values)
    except UserError:
        assume(False)
    with mock.patch.object(Config, "check_paths"):  # there are no such files
        assert Parser(config_class, "A command.").parse([*positional, *argv]) == expected


@NO_DEADLINE
@given(recorded=st.dictionaries(st.sampled_from("abcdef"), JSON), now=st.dictionaries(st.sampled_from("abcdef"), JSON),
       ignore=st.sets(st.sampled_from("abcdef")))  # fmt: skip
def test_differences_are_those_of_values_that_both_know(recorded, now, ignore):
    phrases = differences(recorded, now, ignore)
    expected = {name for name in recorded.keys() & now.keys() - ignore if recorded[name] != now[name]}
    assert {phrase.split(" ")[0] for phrase in phrases} == {f"--{name}" for name in expected}
    assert len(phrases) == len(expected)


def test_a_difference_names_the_flag_and_both_values():
    assert differences({"max_steps": 3, "betas": [0.9, 0.9]}, {"max_steps": 4, "betas": (0.9, 0.9)}) == [
        "--max-steps 3, now 4"
    ]
