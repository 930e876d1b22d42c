"""checkpoint/: files are written atomically, damage is recognised, records are checked, and no code is run."""

import argparse
import errno
import os
import random
import re
import resource
import signal
import time
import zipfile
from unittest import mock

import pytest
import safetensors.torch
import torch
from helpers import call
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import fill
from safetensors.torch import save_file
from test_models import SMALL

from checkpoint import diffusers_folder, saver
from checkpoint import files as checkpoint
from checkpoint.files import CheckpointError, UnreadableError
from checkpoint.opened import Checkpoint
from models import BLOCKS, DiT, DiT_models
from runtime import files
from runtime.errors import RunError
from tools import convert

MODEL = DiT(**SMALL)

STATE = {"model": {"w": torch.arange(5000.0)}, "step": 7, "args": {"lr": 1e-4, "betas": [0.9, 0.999]}}


@pytest.fixture
def saved(tmp_path):
    checkpoint.save(tmp_path / "0000007.pt", STATE)
    return tmp_path / "0000007.pt"


def test_round_trip_is_exact_and_needs_no_code(saved):
    state = torch.load(saved, weights_only=True)
    assert torch.equal(state["model"]["w"], STATE["model"]["w"])
    assert (state["step"], state["args"]) == (7, STATE["args"])
    checkpoint.verify(saved)
    assert [p.name for p in saved.parent.iterdir()] == ["0000007.pt"], "no temporary file may be left"


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.999])
def test_truncated_files_are_recognised(saved, keep):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(keep * len(whole)) if keep < 1 else keep])
    for check in (checkpoint.verify, checkpoint.load):
        with pytest.raises(CheckpointError, match=r"0000007\.pt"):
            check(saved)


def test_any_flipped_byte_of_a_tensor_is_recognised(saved):
    whole = saved.read_bytes()
    start = whole.find(STATE["model"]["w"].numpy().tobytes())
    assert start > 0
    for offset in random.Random(0).sample(range(20_000), 40):
        damaged = bytearray(whole)
        damaged[start + offset] ^= 1 << (offset % 8)
        saved.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="checksum"):
            checkpoint.verify(saved)


def test_the_newest_whole_checkpoint_is_used(tmp_path):
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path / f"{step:07d}.pt", {**STATE, "step": step})
    damaged = bytearray((tmp_path / "0000004.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "0000004.pt").write_bytes(damaged)
    (tmp_path / "0000003.pt").write_bytes(b"PK\3\4")
    (tmp_path / "notes.pt").write_bytes(b"not one of ours")
    warnings = []
    path, state = checkpoint.load_newest(tmp_path, warnings.append)
    assert (path.name, state["step"]) == ("0000002.pt", 2)
    assert ["0000004.pt" in warnings[0], "0000003.pt" in warnings[1]] == [True, True]


def damage(path):
    """Flip a bit in the middle, among the values of tensors."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_found_by_every_reader(tmp_path):
    path = tmp_path / "w.pt"
    checkpoint.save(path, {"ema": {"w": torch.zeros(10_000)}})
    damage(path)
    for read in (checkpoint.load, Checkpoint.open, checkpoint.verify):
        with pytest.raises(CheckpointError, match=r"w.pt: damaged: the checksum of \S+ does not match"):
            read(path)
    assert checkpoint.load(path, verify=False)["ema"]["w"].count_nonzero() <= 1


def test_a_flipped_bit_in_converted_weights_is_found(tmp_path):
    model = DiT(input_size=4, patch_size=2, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=3)
    torch.save({"ema": model.state_dict(), "model_config": model.config}, tmp_path / "w.pt")
    path = tmp_path / "w.safetensors"
    for dtype in ([], ["--dtype", "bfloat16", "--overwrite"]):
        assert call(convert.main, tmp_path / "w.pt", path, *dtype) == 0
        assert Checkpoint.open(path).weights.keys() == model.state_dict().keys()
        content = bytearray(path.read_bytes())
        content[-100] ^= 1  # the lowest bit of a weight
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="w.safetensors: damaged: the checksum of its weights does not match"):
            Checkpoint.open(path)


def raiser(error, cause=None):
    def fail(*args, **kwargs):
        raise error from cause

    return mock.Mock(side_effect=fail)


@pytest.mark.parametrize(
    ("where", "fault", "why"),
    [
        ((zipfile, "ZipFile"), raiser(OSError(errno.EIO, "Input/output error")), "Input/output error"),
        ((zipfile, "ZipFile"), raiser(zipfile.BadZipFile(), OSError(errno.ESTALE, "Stale handle")), "Stale handle"),
        ((torch, "load"), raiser(RuntimeError("DefaultCPUAllocator: can't allocate memory: 12")), "out of memory"),
        ((torch, "load"), raiser(MemoryError()), "out of memory"),
        ((os, "stat"), raiser(PermissionError(errno.EACCES, "Permission denied")), "Permission denied"),
    ],
)
def test_an_error_of_the_system_is_not_damage(where, fault, why, tmp_path, monkeypatch):
    """The newest checkpoint was passed over, and renamed, because it could not be read for a moment."""
    for step in (1, 2):
        checkpoint.save(tmp_path / f"{step:07d}.pt", STATE)
    monkeypatch.setattr(checkpoint, "newest_first", lambda folder: [folder / "0000002.pt", folder / "0000001.pt"])
    with monkeypatch.context() as patch:
        patch.setattr(*where, fault)
        with pytest.raises(UnreadableError) as error:
            checkpoint.load_newest(tmp_path, pytest.fail)
    assert str(error.value).startswith(f"{tmp_path}/0000002.pt: cannot be read ({why}); ")
    assert not isinstance(error.value, CheckpointError), "such errors are passed over"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0000001.pt", "0000002.pt"]


def test_too_many_open_files_are_not_damage(saved):
    def open_without_descriptors():
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
        for read, what in ((checkpoint.load, saved), (checkpoint.newest_first, saved.parent)):
            with pytest.raises(UnreadableError, match=re.escape(f"{what}: cannot be read (Too many open files); ")):
                read(what)

    checkpoint.load(saved)  # imports what it needs
    assert _in_fork(open_without_descriptors) == 0


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_where_files_cannot_be_mapped_they_are_read(suffix, tmp_path, monkeypatch):
    path, weights = tmp_path / f"w.{suffix}", {"w": torch.arange(9.0)}
    checkpoint.save(path, weights) if suffix == "pt" else save_file(weights, path)
    error = RuntimeError("unable to mmap 484 bytes from file <w.pt>: No such device (19)")
    monkeypatch.setattr(torch.UntypedStorage, "from_file", raiser(error))
    monkeypatch.setattr(safetensors.torch, "load_file", raiser(error))
    assert torch.equal(checkpoint.load(path)["w"], weights["w"])


def test_a_run_on_the_cpu_makes_no_cuda_context(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", raiser(AssertionError("makes a context")))
    writer = saver.BackgroundSaver(tmp_path)
    writer.save(1, STATE)
    writer.wait()


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_that_carries_code_is_refused_without_running_it(tmp_path, monkeypatch, legacy):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Bomb()}, "bad.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"bad\.pt: refused, it carries code"):
        checkpoint.load("bad.pt")
    assert not (tmp_path / "exploded").exists()


def test_files_of_the_original_release_load(tmp_path):
    weights = DiT(**SMALL).state_dict()
    args = argparse.Namespace(model="DiT-S/2", num_classes=10, image_size=64, vae="ema")
    torch.save({"model": weights, "ema": weights, "opt": {}, "args": args}, tmp_path / "0400000.pt")
    opened = Checkpoint.open(tmp_path / "0400000.pt")
    assert (opened.vae, opened.image_size) == ("ema", 64)
    assert opened.weights.keys() == weights.keys()


def test_each_average_has_a_name(tmp_path):
    first, second, raw = (DiT(**SMALL).state_dict() for _ in range(3))
    state = {"ema": first, "emas": {"0.5": second}, "model": raw, "args": {"ema_decay": 0.9999, "num_heads": 4}}
    torch.save(state, tmp_path / "a.pt")
    for name, expected in {None: first, "0.9999": first, "0.5": second, "model": raw}.items():
        opened = Checkpoint.open(tmp_path / "a.pt", average=name)
        assert all(torch.equal(value, expected[key]) for key, value in opened.build_model().state_dict().items()), name
    assert [*opened.averages] == ["0.9999", "0.5", "model"]
    with pytest.raises(CheckpointError, match=r"a.pt: has no weights called 0.9; it holds 0.9999, 0.5, model$"):
        Checkpoint.open(tmp_path / "a.pt", average="0.9")
    assert [*Checkpoint({"ema": first}).averages] == ["ema"], "of the original release, which records no decay"
    assert not Checkpoint(first).averages
    torch.save(first, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="b.pt: has no weights called model; it holds one set of weights"):
        Checkpoint.open(tmp_path / "b.pt", average="model")
    second["final_layer.linear.bias"][0] = torch.nan
    with pytest.raises(CheckpointError, match="weights are not finite"):
        Checkpoint(state).check_finite()  # a run that resumes would go on averaging it


def test_safetensors_hold_weights(tmp_path):
    model = DiT_models["DiT-S/8"](input_size=16, num_classes=10)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    opened = Checkpoint.open(tmp_path / "w.safetensors")
    model.load_state_dict(opened.weights)
    config = opened.model_config
    assert opened.describe() == "DiT-S/8"
    assert (config["input_size"], config["num_classes"], config["num_heads"]) == (16, 10, 6)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("change", [{}, {"in_channels": 1, "mlp_ratio": 2.0}, {"learn_sigma": False, "num_classes": 0}])
def test_a_model_is_rebuilt_from_its_weights(block, change):
    model = DiT(**{**SMALL, **change}, block=block)
    opened = Checkpoint({"ema": model.state_dict(), "args": {"num_heads": 4}})
    assert opened.model_config == {**model.config, "class_dropout_prob": 0.1}
    for name, tensor in opened.build_model().state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert opened.model_config["block"] == block


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pos_embed": None}, "not a DiT: it has no 'pos_embed'"),
        ({"x_embedder.proj.weight": torch.zeros(8, 4, 2)}, "not a DiT: its weights have other shapes"),
        ({"pos_embed": torch.zeros(3)}, "not a DiT: its weights have other shapes"),
    ],
)
def test_weights_of_other_models_are_told_apart_in_a_sentence(changes, words):
    state = {name: tensor for name, tensor in {**MODEL.state_dict(), **changes}.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=words):
        _ = Checkpoint(state).model_config


def test_a_rectangle_without_a_record_has_the_size_of_its_latents():
    model = DiT(**{**SMALL, "input_size": (4, 8)})
    opened = Checkpoint({"model": model.state_dict(), "model_config": model.config})
    assert (opened.image_size, opened.build_model().config) == ("32x64", model.config)
    with pytest.raises(CheckpointError, match="its input is not a square; write a .safetensors file"):
        diffusers_folder.transformer_config(opened)


def _in_fork(action):
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except RunError as error:
            os._exit(17 if "cannot be written (File too large); earlier checkpoints are" in str(error) else 18)
        except BaseException:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_full_disk_leaves_earlier_checkpoints_and_says_so(saved):
    def write_beyond_the_limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        checkpoint.save(saved, {"model": {"w": torch.zeros(100_000)}})

    before = saved.read_bytes()
    assert _in_fork(write_beyond_the_limit) == 17
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["0000007.pt"]


def test_a_kill_while_writing_leaves_the_old_file(saved):
    before = saved.read_bytes()
    for delay in (0.0, 0.005, 0.02):
        pid = os.fork()
        if pid == 0:
            while True:
                checkpoint.save(saved, STATE)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        checkpoint.verify(saved)
        assert saved.read_bytes() == before


def test_pruning_waits_for_the_new_one_and_keeps_what_was_asked(tmp_path, monkeypatch):
    writer = saver.BackgroundSaver(tmp_path, keep_last=2, keep_every=4)
    for step in range(1, 8):
        writer.save(step, STATE)
    writer.wait()
    assert [int(p.stem) for p in checkpoint.newest_first(tmp_path)] == [7, 6, 4]

    def no_room(path, state):
        raise CheckpointError("no room")

    monkeypatch.setattr(checkpoint, "save", no_room)
    writer.save(8, STATE)
    with pytest.raises(CheckpointError, match="no room"):
        writer.wait()
    assert [int(p.stem) for p in checkpoint.newest_first(tmp_path)] == [7, 6, 4], "nothing is pruned for a failed write"


def test_a_checkpoint_holds_the_state_of_its_step_however_late_it_is_written(tmp_path, monkeypatch):
    plain_save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda path, state: (time.sleep(0.1), plain_save(path, state)))
    weights, writer = torch.zeros(10), saver.BackgroundSaver(tmp_path)
    writer.save(1, {"w": weights})
    weights += 1
    writer.wait()
    assert not checkpoint.load(tmp_path / "0000001.pt")["w"].any(), "training must not change what is being written"


def test_a_flipped_bit_in_the_archives_tables_is_recognised_or_changes_nothing(tmp_path):
    """Names, sizes and offsets have no checksum: what passes verify has to load as it was saved."""
    path, state = tmp_path / "0000001.pt", {"model": {"w": torch.arange(30.0)}, "step": 7}
    checkpoint.save(path, state)
    whole = path.read_bytes()
    for offset in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[offset] ^= 1 << (offset % 8)
        path.write_bytes(damaged)
        try:
            checkpoint.verify(path)
            loaded = checkpoint.load(path, mmap=False)
        except CheckpointError:
            continue
        assert loaded["step"] == 7, offset
        assert torch.equal(loaded["model"]["w"], state["model"]["w"]), offset


def test_a_folder_of_damaged_checkpoints_is_not_an_empty_one(tmp_path):
    assert checkpoint.load_newest(tmp_path, print) == (None, None)
    (tmp_path / "0000003.pt").write_bytes(b"PK\3\4")
    with pytest.raises(CheckpointError, match="all of its checkpoints"):
        checkpoint.load_newest(tmp_path, print)


def test_leftovers_of_killed_writes_are_removed_and_nothing_else(tmp_path):
    for name in (".0000007.pt.123.dit.tmp", "0000007.pt", ".lock", "notes.tmp", ".of.another.tmp"):
        (tmp_path / name).touch()
    files.remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", ".of.another.tmp", "0000007.pt", "notes.tmp"]


def test_without_memory_for_a_copy_the_checkpoint_is_written_at_once(tmp_path, monkeypatch):
    def no_memory(state):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(saver, "copy_to_host", no_memory)
    saver.BackgroundSaver(tmp_path).save(7, STATE)
    assert checkpoint.load(tmp_path / "0000007.pt")["step"] == 7


def test_a_callers_own_safe_classes_stay(tmp_path):
    torch.save({"args": argparse.Namespace(a=1)}, tmp_path / "x.pt")
    torch.serialization.add_safe_globals([argparse.Namespace])
    try:
        checkpoint.load(tmp_path / "x.pt")
        assert argparse.Namespace in torch.serialization.get_safe_globals()
    finally:
        torch.serialization.clear_safe_globals()
    checkpoint.load(tmp_path / "x.pt")
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_special_files_are_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "0000001.pt")
    for check in (checkpoint.load, checkpoint.verify):
        with pytest.raises(CheckpointError, match="not a file"):
            check(tmp_path / "0000001.pt")


def test_a_config_that_is_recorded_is_read_and_not_inferred():
    model = DiT(**SMALL, class_dropout_prob=0)
    opened = Checkpoint({"model": model.state_dict(), "model_config": model.config})
    assert opened.model_config == model.config


@pytest.mark.parametrize("wrap", [
    lambda weights: {"state_dict": weights},
    lambda weights: {"module": {**weights, "step": 7}},
    lambda weights: {"model": {f"module._orig_mod.{key}": value for key, value in weights.items()}},
    lambda weights: {"state_dict": {f"net.{key}": value for key, value in weights.items()}},
])  # fmt: skip
def test_state_dicts_as_other_trainers_write_them_are_read(wrap):
    model = fill(DiT(**SMALL))
    found = Checkpoint({**wrap(model.state_dict()), "args": {"num_heads": SMALL["num_heads"]}}).weights
    assert found.keys() == model.state_dict().keys()
    assert Checkpoint({**wrap(model.state_dict()), "args": None}).weights.keys() == found.keys()
    assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
RECORD = ("args", "model_config", "class_names", "step", "ema", "model")


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(RECORD), JSON), st.dictionaries(st.sampled_from(list(MODEL.config)), JSON))
def test_any_record_is_read_or_refused_with_one_line(record, config):
    state = {"model": MODEL.state_dict(), "model_config": {**MODEL.config, **config}, **record}
    opened = Checkpoint(state, "x.pt")
    for read in (lambda: (opened.vae, opened.image_size), lambda: opened.class_names, lambda: opened.step,
                 lambda: opened.model_config, opened.build_model, opened.describe):  # fmt: skip
        line = None
        try:
            read()
        except CheckpointError as error:
            line = str(error)
        assert line is None or (line.startswith("x.pt") and "\n" not in line)


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_refused_with_one_line(tmp_path_factory, content):
    for name in ("0000001.pt", "w.safetensors"):
        path = tmp_path_factory.mktemp("bytes") / name
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            Checkpoint.open(path)
