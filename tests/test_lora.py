"""--lora-rank: what is trained, what a checkpoint holds, and that it is the merged model wherever it is read."""

import json
import shutil

import pytest
import torch
from conftest import TINY
from helpers import assert_same_state, call, latest

import sample
import train
from checkpoint import lora
from checkpoint.opened import Checkpoint
from models import DiT
from tools import convert, likelihood

SIZES = {"input_size": 8, "in_channels": 1, "hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 10}
RUN = [*TINY[: TINY.index("--hidden-size")], *TINY[TINY.index("--global-batch-size") :], "--ema-warmup"]


def run(base, folder, *extra):
    return call(train.main, *RUN, "--init-from", base, "--lora-rank", 2, "--run-dir", folder, *extra)


@pytest.fixture(scope="module")
def tuned(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "run"
    assert run(tiny_checkpoint, folder, "--max-steps", 4) == 0
    return folder


def test_pairs_start_without_effect_and_merge_to_the_same_model():
    torch.manual_seed(0)
    model = DiT(**SIZES).eval()
    torch.nn.init.normal_(model.final_layer.linear.weight)  # else the output is zero
    base = {name: value.clone() for name, value in model.state_dict().items()}
    x, t, y = torch.randn(3, 1, 8, 8), torch.tensor([1.0, 500.0, 900.0]), torch.tensor([0, 5, 10])
    before = model(x, t, y)
    lora.add(model, 3, base)
    assert torch.equal(model(x, t, y), before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == model.own == {
        f"blocks.{i}.{layer}.parametrizations.weight.0.{part}"
        for i in range(2) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2") for part in "AB"
    }  # fmt: skip
    for block in model.blocks:
        for pair in (module for module in block.modules() if isinstance(module, lora.LowRank)):
            torch.nn.init.normal_(pair.B)
            torch.nn.init.normal_(block.adaLN_modulation[1].weight)
    changed = {name: value for name, value in model.state_dict().items() if "adaLN" in name}
    plain = DiT(**SIZES).eval()
    plain.load_state_dict(lora.merge({**base, **changed}, {n: v for n, v in model.state_dict().items() if n in model.own}))
    torch.testing.assert_close(plain(x, t, y), model(x, t, y))
    assert (plain(x, t, y) - before).abs().max() > 0.01


def test_a_checkpoint_holds_the_pairs_alone_and_is_read_as_the_whole_model(tuned, tiny_checkpoint, tmp_path):
    state, base = latest(tuned), Checkpoint.open(tiny_checkpoint)
    assert all(".parametrizations.weight.0." in name for part in ("model", "ema") for name in state[part])
    assert any(value.abs().max() > 0 for name, value in state["ema"].items() if name.endswith("B"))
    opened = Checkpoint.open(str(tuned))
    assert opened.weights.keys() == base.weights.keys()
    differing = {name for name, value in opened.weights.items() if not torch.equal(value, base.weights[name])}
    assert differing == {f"blocks.0.{layer}.weight" for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert call(convert.main, tuned, tmp_path / "merged.safetensors") == 0
    merged = Checkpoint.open(tmp_path / "merged.safetensors").weights
    assert all(torch.equal(value, opened.weights[name]) for name, value in merged.items())
    few = ["--data-path", "digits", "--num-images", 2, "--num-timesteps", 2, "--device", "cpu", "--output"]
    assert call(likelihood.main, "--ckpt", tiny_checkpoint, "--lora", tuned, *few, tmp_path / "a.json") == 0
    settings = json.loads((tmp_path / "a.json").read_text())["settings"]
    assert (settings["checkpoint_crc32"], settings["lora"]) == (opened.checksum, str(tuned))


def test_a_base_that_has_moved_is_named_and_another_one_is_refused(tiny_checkpoint, tmp_path, capfd):
    base, moved = tmp_path / "base.pt", tmp_path / "moved.pt"
    shutil.copy(tiny_checkpoint, base)
    assert run(base, tmp_path / "run", "--max-steps", 2) == 0
    argv = ["--labels", 3, "--num-sampling-steps", 2, "--device", "cpu", "--output"]
    assert call(sample.main, "--ckpt", tmp_path / "run", *argv, tmp_path / "a.png") == 0
    measure = ["--data-path", "digits", "--num-images", 2, "--num-timesteps", 2, "--device", "cpu", "--ckpt"]
    report = tmp_path / "run/likelihood.json"
    assert call(likelihood.main, *measure, tmp_path / "run") == 0
    before, _ = json.loads(report.read_text())["total"], report.unlink()
    base.rename(moved)
    assert call(sample.main, "--ckpt", tmp_path / "run", *argv, tmp_path / "b.png") == 2
    assert f"{base}: " in (error := capfd.readouterr().err)
    assert "put it there, or name it: sample.py --ckpt beside --lora, train.py --init-from" in error
    assert call(sample.main, "--ckpt", moved, "--lora", tmp_path / "run", *argv, tmp_path / "b.png") == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert call(likelihood.main, *measure, moved, "--lora", tmp_path / "run") == 0
    assert json.loads(report.read_text())["total"] == before, "the likelihood is the base model's"
    assert run(moved, tmp_path / "run", "--max-steps", 3) == 0, "resumed from there"
    torch.save({**torch.load(moved, weights_only=True), "step": 7}, base)
    assert call(sample.main, "--ckpt", base, "--lora", tmp_path / "run", *argv, tmp_path / "c.png") == 2
    assert "holds another model" in capfd.readouterr().err


def test_a_resumed_run_is_the_uninterrupted_one(tuned, tiny_checkpoint, tmp_path):
    for steps in (1, 3, 4):
        assert run(tiny_checkpoint, tmp_path / "parts", "--max-steps", steps) == 0
    assert_same_state(latest(tuned), latest(tmp_path / "parts"))


def test_two_processes_train_the_same_pairs(tuned, tiny_checkpoint, tmp_path, ranks):
    argv = [*RUN, "--init-from", tiny_checkpoint, "--lora-rank", 2, "--max-steps", 2, "--run-dir"]
    process = ranks(train.main, [*argv, tmp_path / "two"], 2)
    assert process.wait() == [0, 0], process.text()
    assert latest(tmp_path / "two")["model"].keys() == latest(tuned)["model"].keys()
    assert Checkpoint.open(str(tmp_path / "two")).check_weights()


def test_classes_that_the_base_lacks_are_trained_too(tiny_checkpoint, tmp_path):
    words = ["--keep-classes", *"-123456789", "--global-seed", 1]
    assert run(tiny_checkpoint, tmp_path / "run", "--max-steps", 2, *words) == 0
    table = "y_embedder.embedding_table.weight"
    before, after = Checkpoint.open(tiny_checkpoint).weights[table], Checkpoint.open(str(tmp_path / "run")).weights[table]
    assert not torch.equal(before, after)
    assert table in latest(tmp_path / "run")["model"]


def test_the_plan_counts_what_is_trained_and_stored(tiny_checkpoint, capsys):
    assert call(train.main, *RUN, "--init-from", tiny_checkpoint, "--lora-rank", 2, "--dry-run") == 0
    assert "parameters              512 trainable" in capsys.readouterr().out
