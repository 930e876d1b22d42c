"""Mistakes: those of the table in tests/stress/mistakes.txt; readers that are given anything; and decisions where it was
not clear what a user expects."""

import contextlib
import importlib
import io
import json
import signal
import sys

import numpy as np
import pytest
from conftest import TINY
from helpers import call, command_module
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from stress import mistake_cases, mistake_inputs, mistakes
from test_checkpoint import JSON

import sample
import sample_ddp
import train
from checkpoint import diffusers_folder, files
from data.autoencoder import load_space
from evaluation.image_sets import open_images
from runtime import devices
from runtime.errors import OutOfMemoryError, UserError
from runtime.files import check_output
from runtime.npy import read_npy_header
from runtime.parser import Parser
from sampling.opened import Opened
from training.run_folder import drop_later_metrics

ANYTHING = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("command", mistake_cases.VALID)
def test_wrong_values_are_answered_with_one_line(command, capsys):
    """All cases of the kind "values", parsed here."""
    parser = Parser(mistake_cases.config_class(command), command)
    for case in mistake_cases.value_cases(command):
        with pytest.raises(SystemExit) as end:
            parser.parse(case.argv)
        lines = capsys.readouterr().err.splitlines()
        assert (end.value.code, len(lines)) == (2, 1), case.name
        assert case.word in lines[0], (case.name, lines)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder whose in/ holds the files of the table."""
    mistakes.prepare()
    root = tmp_path_factory.mktemp("mistakes")
    mistake_inputs.make_inputs(root, mistakes.run_cases)
    return root


TABLE = [*mistake_cases.table_cases()]


@pytest.mark.slow
@pytest.mark.parametrize("command", {case.command: None for case in TABLE})
def test_mistakes_are_answered_with_one_line(command, inputs, monkeypatch, capfd):
    """All cases of the table that this process can run itself."""
    main = importlib.import_module(command_module(command)).main
    monkeypatch.setattr(sys, "argv", [f"{command}.py"])
    before, wrong = mistakes.stamps(inputs / "in"), []
    for number, case in enumerate(case for case in TABLE if case.command == command and case.is_simple):
        contents = mistakes.make_folder(case, inputs, folder := inputs / f"{command}{number}")
        (folder / "results").mkdir()  # of train.py's run folders, which stays
        monkeypatch.chdir(folder)
        there = mistakes.stamps(folder)
        signal.alarm(60)  # what waits for ever ends the process
        status = call(main, *case.argv)
        signal.alarm(0)
        said = capfd.readouterr()
        faults, line = mistakes.judge(case, [status], [said.out], [said.err])
        faults += ["left something"] * (case.kind == "combinations" and mistakes.stamps(folder) != there)
        if faults := faults + mistakes.changes(case, folder, contents):
            wrong.append(f"{case.name}: {'; '.join(faults)}: {line or said.err[-500:]}")
    assert not wrong, "\n".join(wrong)
    assert mistakes.stamps(inputs / "in") == before, "a refused command changes nothing"


@pytest.mark.slow
def test_mistakes_in_several_processes_on_full_disks_and_ctrl_c_are_answered_with_one_line(inputs):
    """One case of each command and kind of those that need processes of their own."""
    cases = {(case.command, case.kind): case for case in TABLE if not case.is_simple and not case.alone and not case.slow}
    wrong = [answer for answer in mistakes.run_cases([*cases.values()], inputs) if answer["wrong"]]
    assert not wrong, "\n\n".join(f"{answer['name']}: {answer['wrong']}\n{answer['text']}" for answer in wrong)


# ----------------------------------------------------------------------------------------------------------------------
# Readers


def user_error_or_value(read, *arguments):
    with contextlib.suppress(UserError):
        read(*arguments)


@ANYTHING
@given(st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_autoencoder_config_ends_in_a_space_or_a_user_error(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    user_error_or_value(load_space, str(tmp_path))


@ANYTHING
@given(st.sampled_from(["scaling_factor", "latent_channels", "block_out_channels", "in_channels", "shift_factor"]), JSON)
def test_any_value_in_an_autoencoder_config_ends_in_a_space_or_a_user_error(small_vae, tmp_path, name, value):
    config = json.loads((small_vae / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, name: value}))
    user_error_or_value(load_space, str(tmp_path))


@ANYTHING
@given(st.lists(st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()), max_size=6), st.booleans())
def test_any_rows_of_metrics_are_cut_where_they_are_none(tmp_path, lines, ends):
    path, whole = tmp_path / "metrics.jsonl", b'{"step": 1}\n{"step": 2}\n'
    path.write_bytes(whole + b"\n".join(lines) + b"\n" * ends)
    drop_later_metrics(path, step=2)
    kept = path.read_bytes()
    assert kept.startswith(whole)
    assert all(json.loads(line)["step"] <= 2 for line in kept.splitlines())


@ANYTHING
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_settings_of_a_sample_folder_are_read_or_refused(tiny_checkpoint, tmp_path, content):
    folder = tmp_path / "samples/set"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "options.json").write_bytes(content)
    parser = Parser(sample_ddp.SampleSetConfig, "")
    config = parser.parse(["--ckpt", str(tiny_checkpoint), "--cfg-scale", "1"])
    user_error_or_value(sample_ddp.check_settings, Opened.open(config), None, folder)


@ANYTHING
@given(st.binary(max_size=300) | st.binary(max_size=100).map(lambda tail: b"\x93NUMPY\x01\x00v\x00" + tail)
       | st.tuples(st.integers(0, 9), JSON, JSON).map(lambda parts: mistake_inputs.npy_header(
           f"{{'descr': '|u1', 'fortran_order': {parts[1]!r}, 'shape': {parts[2]!r}, }}", parts[0])))  # fmt: skip
def test_any_array_header_is_read_or_refused(tmp_path, content):
    with contextlib.suppress(ValueError):
        shape, _ = read_npy_header(io.BytesIO(content), len(content))
        assert all(length >= 0 for length in shape)
    for name, whole in (("raw.npz", content), ("zip.npz", mistake_inputs.npz_bytes({}, arr_0=content))):
        (tmp_path / name).write_bytes(whole)
        user_error_or_value(open_images, tmp_path / name)


@ANYTHING
@given(st.binary(max_size=100) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_config_of_a_model_in_diffusers_format_is_refused_with_one_line(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError):
        diffusers_folder.read(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Decisions


def test_a_run_whose_log_cannot_be_written_is_not_resumed(tmp_path, capsys):
    """A user would miss the record of the run for hours of training: nothing is trained, and nothing changed."""
    run = tmp_path / "run"
    assert call(train.main, *TINY, "--max-steps", 2, "--run-dir", run) == 0
    (run / "log.txt").rename(run / "log.txt.moved")
    (run / "log.txt").mkdir()
    before = (run / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert call(train.main, *TINY, "--max-steps", 4, "--run-dir", run) == 1
    assert "log.txt is a folder, not a file" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before
    assert [path.name for path in files.newest_first(run / "checkpoints")] == ["0000002.pt"]


def test_a_folder_named_like_a_later_checkpoint_is_set_aside(tmp_path, capsys):
    """The run could not write the checkpoint of that step, and would find out when hours of training are to be saved."""
    run = tmp_path / "run"
    assert call(train.main, *TINY, "--max-steps", 2, "--run-dir", run) == 0
    (run / "checkpoints/0000004.pt").mkdir()
    assert call(train.main, *TINY, "--max-steps", 4, "--run-dir", run) == 0
    assert "Renamed 0000004.pt" in capsys.readouterr().out
    assert (run / "checkpoints/0000004.pt").is_file()
    assert (run / "checkpoints/0000004.pt.aside").is_dir()


@pytest.mark.parametrize(("steps", "warns"), [(3, True), (20, False)])
def test_an_inversion_of_few_steps_is_drawn_with_a_warning(tiny_checkpoint, tmp_path, capsys, steps, warns):
    """It is legitimate, to see what happens, but the image that comes back is another one."""
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "in.png")
    options = ["--sampler", "ddim", "--num-sampling-steps", steps, "--init-image", tmp_path / "in.png", "--invert"]
    assert call(sample.main, "--ckpt", tiny_checkpoint, "--labels", 1, "--output", tmp_path / "o.png", *options) == 0
    assert ("--invert: 3 steps are few" in capsys.readouterr().err) == warns


def test_special_files_are_no_outputs(tmp_path):
    """Replacing them would destroy them; for the superuser also a device such as /dev/null."""
    for kind in ("pipe", "socket", "link-loop"):
        mistake_inputs.make_special(tmp_path / kind, kind)
        with pytest.raises(UserError, match=f"--output .*{kind}: cannot be written to"):
            check_output(tmp_path / kind, "--output")
    with pytest.raises(UserError, match="not a regular file"):
        check_output("/dev/null", "--output")
    with pytest.raises(UserError, match="too long"):
        check_output(tmp_path / ("x" * 250), "--output")  # the temporary file's name is longer
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link-loop", "pipe", "socket"]


def test_what_cannot_fit_into_the_memory_is_refused(monkeypatch):
    monkeypatch.setattr(devices, "host_memory", lambda: 2**30)
    devices.check_memory(2**30, "lower --x")
    with pytest.raises(OutOfMemoryError, match="needs 2 GiB or more of 1; lower --x"):
        devices.check_memory(2**31, "lower --x")
    monkeypatch.setattr(devices, "host_memory", lambda: None)
    devices.check_memory(2**80, "lower --x")


def test_other_errors_of_the_system_are_one_line_too(capsys):
    parser = Parser(mistakes.MistakesConfig, "")
    for error, words in (
        (OSError(28, "No space left on device", "a\nb"), "a\\nb: No space left on device"),
        (MemoryError(), "out of memory"),
        (BrokenPipeError(32, "Broken pipe"), "Broken pipe"),
    ):
        with pytest.raises(SystemExit) as end, parser.report_errors():
            raise error
        assert end.value.code == 1
        assert capsys.readouterr().err.splitlines()[-1].endswith(words)
