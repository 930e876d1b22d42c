"""Fine-tuning: what --init-from takes over, --freeze, and the schedule of the learning rate."""

import dataclasses
import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY
from helpers import assert_same_state, call, latest, metrics, without_timings
from reference import fill
from safetensors.torch import save_file

import sample_ddp
import train
from checkpoint import files
from checkpoint.opened import Checkpoint
from models import DiT, DiT_models, position_embedding
from runtime import distributed
from studies import finetune as benchmark
from tools import convert
from training import finetune, setup
from training.config import RecipeConfig
from training.trainer import Trainer

OLD = {"input_size": 8, "patch_size": 2, "in_channels": 3, "hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 6}
NAMES = ["ant", "bee", "cat", "dog", "eel", "fox"]
# a run on the three classes of image_folder, without a word about the model's sizes
RUN = "--vae none --image-size 8 --num-classes 3 --global-batch-size 4 --lr 1e-3 --device cpu --log-every 1 --num-workers 0"
RUN = [*RUN.split(), "--data-path"]
TABLE = "y_embedder.embedding_table.weight"


def write_source(path, **changes):
    """A checkpoint of random weights; those under "model" are to be left alone."""
    model = fill(DiT(**{**OLD, **changes}))
    state = {"ema": model.state_dict(), "model": {name: tensor + 1 for name, tensor in model.state_dict().items()}}
    state |= {"class_names": NAMES, "model_config": model.config, "args": {"vae": "none"}}
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source") / "0000009.pt")


def prepare(argv):
    """(config, model, notes) as the command makes them before the first update."""
    config = train.make_parser().parse([str(word) for word in argv])
    context = distributed.setup("cpu")
    config, opened = setup.resolve(config, context)
    dataset, options = setup.load_data(config.data, config.model, config.recipe, context)
    config = dataclasses.replace(config, model=options)
    _, _, model, notes = setup.prepare(config, context, dataset, opened)
    return config, model, notes


@pytest.mark.parametrize(("size", "classes"), [(8, 6), (8, 3), (16, 6), (16, 4), (8, 0)])
def test_everything_is_taken_over_exactly_but_other_classes_and_another_grid(source, image_folder, size, classes):
    extra = ["--image-size", size, "--num-classes", classes]
    config, model, notes = prepare([*RUN, image_folder, "--init-from", source, *extra])
    old, new = Checkpoint.open(source).weights, model.state_dict()
    scratch = setup.build_model(config.model, config.recipe, SimpleNamespace(factor=1, channels=3)).state_dict()
    assert old.keys() == new.keys()
    for name in old.keys() - {TABLE, "pos_embed"}:
        assert torch.equal(new[name], old[name]), name
    assert torch.equal(new[TABLE][-1], old[TABLE][-1]), "the null class"
    same = classes if classes == 6 else min(classes, 3)  # as many classes, or those of the same name: ant, bee, cat
    assert torch.equal(new[TABLE][:same], old[TABLE][:same])
    assert torch.equal(new[TABLE][same:-1], scratch[TABLE][same:-1]), "as without --init-from, N(0, 0.02)"
    assert torch.equal(new["pos_embed"], (scratch if size == 16 else old)["pos_embed"])
    if size == 16:
        torch.testing.assert_close(new["pos_embed"][0], position_embedding(16, 8).float(), rtol=0, atol=0)
    rows = [re.findall(r" ([\d,]+)", line) for line in notes if re.match(r" *\w+( +[\d,]+){4}$", line)]
    tensors, taken, made, left = (sum(int(n.replace(",", "")) for n in column) for column in zip(*rows, strict=True))
    values = [sum(tensor.numel() for tensor in weights.values()) for weights in (old, new)]
    assert (tensors, taken + left, taken + made) == (len(new), *values)


@pytest.mark.parametrize("design", [{"block": "cross-attention"}, {"mlp_ratio": 1.3, "patch_size": 4}, {"num_heads": 8}])
def test_the_sizes_and_the_block_come_from_the_weights(tmp_path, image_folder, design):
    where = write_source(tmp_path / "weights.pt", **design)
    assert call(train.main, *RUN, image_folder, "--init-from", where, "--max-steps", 1, "--run-dir", tmp_path / "run") == 0
    state = latest(tmp_path / "run")
    changed = {"num_classes": 3, "class_dropout_prob": 0.1, "learn_sigma": True}
    assert state["model_config"] == {**Checkpoint.open(where).model_config, **OLD, **design, **changed} | {
        name: Checkpoint.open(where).model_config[name] for name in ("block", "mlp_ratio")
    }
    assert all(state["args"][name] == value for name, value in design.items())


def test_the_sizes_may_be_repeated(tmp_path, image_folder):
    """A ratio of 1.3 gives the MLP 20 units, from which one of 1.25 is inferred."""
    torch.save(Checkpoint.open(write_source(tmp_path / "a.pt", mlp_ratio=1.3)).weights, tmp_path / "bare.pt")
    sizes = "--mlp-ratio 1.3 --num-heads 2 --hidden-size 16 --depth 2 --patch-size 2 --block adaln-zero --model DiT-XL/2"
    config, model, _ = prepare([*RUN, image_folder, "--init-from", tmp_path / "bare.pt", *sizes.split()])
    assert (config.model.mlp_ratio, model.blocks[0].mlp.fc1.out_features) == (1.25, 20)


def test_a_model_of_the_paper_is_recognised(tmp_path, image_folder):
    with torch.device("meta"):
        model = DiT_models["DiT-S/8"](input_size=8, in_channels=3, num_classes=3)
    torch.save({name: torch.zeros(t.shape) for name, t in model.state_dict().items()}, tmp_path / "S.pt")  # as released
    argv = [*RUN, image_folder, "--init-from", tmp_path / "S.pt", "--max-steps", 1, "--results-dir", tmp_path / "results"]
    assert call(train.main, *argv) == 0
    options = latest(tmp_path / "results/000-DiT-S-8")["args"]
    assert (options["model"], options["hidden_size"], options["patch_size"]) == ("DiT-S/8", 384, 8)


def test_rows_of_kept_classes_are_in_the_order_of_the_new_ones(source, image_folder, tmp_path):
    old, seeds = Checkpoint.open(source).weights[TABLE], []
    (tmp_path / "classes.txt").write_text("fox\n\n2\n-\n", encoding="utf-8")
    for seed, words in ((0, ["FOX", "2", "-"]), (0, [tmp_path / "classes.txt"]), (1, ["5", "cat", "-"])):
        argv = [*RUN, image_folder, "--init-from", source, "--global-seed", seed, "--keep-classes", *words]
        _, model, notes = prepare(argv)
        table = model.state_dict()[TABLE]
        assert torch.equal(table[[0, 1, 3]], old[[5, 2, 6]])
        assert "0 from 5 (fox), 1 from 2 (cat), 3 from 6 (null class) taken over" in notes[-1]
        seeds.append(table[2])
    assert torch.equal(seeds[0], seeds[1])
    assert not torch.equal(seeds[0], seeds[2]), "a new row is drawn from --global-seed"
    assert 0.005 < seeds[0].std() < 0.04


def test_classes_start_from_the_class_of_the_same_name(source, image_folder, tmp_path, capfd):
    """One folder is renamed, so that all later ones have another number than in the source."""
    shutil.copytree(image_folder, tmp_path / "images")
    (tmp_path / "images/ant").rename(tmp_path / "images/dog")
    command = [*RUN, tmp_path / "images", "--init-from", source, "--run-dir", tmp_path / "run", "--max-steps", 1]
    assert call(train.main, *command, "--lr", 1e-12) == 0
    expected = Checkpoint.open(source).weights[TABLE][[1, 2, 3, 6]]
    torch.testing.assert_close(latest(tmp_path / "run")["model"][TABLE], expected, rtol=0, atol=1e-11)
    assert "0 from 1 (bee), 1 from 2 (cat), 2 from 3 (dog)" in (tmp_path / "run/log.txt").read_text()
    (tmp_path / "images/cat").rename(tmp_path / "images/gnu")
    notes = prepare([*RUN, tmp_path / "images", "--init-from", source])[2]
    assert "0 from 1 (bee), 1 from 3 (dog), 3 from 6 (null class) taken over" in "".join(notes)
    imagenet = SimpleNamespace(
        model_config={"num_classes": 3, "class_dropout_prob": 0},
        condition=SimpleNamespace(names=["crane", "tabby", "crane"]),
    )
    names = ["crane (n02012849)", "tabby", "crane (n03126707)"]
    assert finetune.label_rows(imagenet, None, 3, 0, names) == {0: 0, 1: 1, 2: 2}
    imagenet.condition.names = ()
    assert finetune.label_rows(imagenet, None, 3, 0, names) == {0: 0, 1: 1, 2: 2}, "by number where no name is known"


def test_a_model_of_no_papers_size_is_called_by_its_sizes_and_the_sources_recipe_is_named(tmp_path, image_folder):
    where = tmp_path / "weights.pt"
    torch.save({**torch.load(write_source(where)), "args": {"vae": "none", "timestep_sampling": "logit-normal"}}, where)
    argv = [*RUN, image_folder, "--init-from", where, "--max-steps", 1, "--results-dir", tmp_path / "results"]
    assert call(train.main, *argv) == 0
    folder = tmp_path / "results/000-DiT-2x16-2"
    log, options = (folder / "log.txt").read_text(), json.loads((folder / "options.json").read_text())
    assert "DiT-2x16/2 (adaln-zero)" in log
    assert "The weights were trained with --timestep-sampling logit-normal, now uniform" in log
    assert (options["model"], options["hidden_size"], options["objective"]) == (None, 16, "diffusion")
    drawn = ["--ckpt", folder / "checkpoints/0000001.pt", "--num-fid-samples", 1, "--num-sampling-steps", 1]
    assert call(sample_ddp.main, *drawn, "--device", "cpu", "--sample-dir", tmp_path / "drawn") == 0
    assert (tmp_path / "drawn/DiT-2x16-2-0000001-size-8-vae-none-cfg-1.5-seed-0").is_dir()


@pytest.mark.parametrize(("kind", "extra"), [("vector", ["--condition", "vector"]), ("classes", [])])
def test_a_model_of_another_condition_gives_all_but_what_belongs_to_it(tmp_path, image_folder, kind, extra):
    shutil.copytree(image_folder, tmp_path / "images")
    np.save(tmp_path / "images/vectors.npy", np.random.default_rng(0).normal(size=(12, 5)))
    write_source(tmp_path / "a.pt")
    at, where, vector = RUN.index("--num-classes"), tmp_path / "a.pt", ["--condition", "vector"]
    run = [*RUN[:at], *RUN[at + 2 :]]
    if kind == "classes":  # from a model of vectors to one of classes
        once = ["--init-from", where, "--max-steps", 1, "--run-dir", tmp_path / "run"]
        assert call(train.main, *run, tmp_path / "images", *vector, *once) == 0
        where = tmp_path / "run/checkpoints/0000001.pt"
    _, model, _ = prepare([*run, tmp_path / "images", "--init-from", where, *extra])
    old, new = Checkpoint.open(where).weights, model.state_dict()
    assert old.keys() != new.keys()
    assert all(torch.equal(new[name], old[name]) for name in old if not name.startswith("y_embedder."))


def test_null_rows_are_taken_over_where_both_models_have_one(tmp_path, image_folder):
    unconditional = write_source(tmp_path / "a.pt", num_classes=0)
    without = write_source(tmp_path / "b.pt", class_dropout_prob=0.0)
    old = Checkpoint.open(unconditional).weights[TABLE]
    assert torch.equal(prepare([*RUN, image_folder, "--init-from", unconditional])[1].state_dict()[TABLE][3:], old)
    _, model, notes = prepare([*RUN, image_folder, "--init-from", without])
    assert len(model.state_dict()[TABLE]) == 4
    assert "Rows of the label table: 0 from 0 (ant), 1 from 1 (bee), 2 from 2 (cat) taken over" in "".join(notes)
    _, model, _ = prepare([*RUN, image_folder, "--init-from", without, "--num-classes", 6, "--label-dropout", 0])
    assert torch.equal(model.state_dict()[TABLE], Checkpoint.open(without).weights[TABLE])


def test_training_starts_at_step_zero_with_the_same_average(source, image_folder):
    config, model, _ = prepare([*RUN, image_folder, "--init-from", source])
    space = SimpleNamespace(factor=1, channels=3)
    trainer = Trainer(config.recipe, config.compute, distributed.setup("cpu"), model, space)
    assert (trainer.steps_made, trainer.images_seen, len(trainer.optimizer.state)) == (0, 0, 0)
    for average, weight in zip(trainer.ema.module.parameters(), model.parameters(), strict=True):
        assert torch.equal(average, weight)


@pytest.mark.parametrize("name", ["w.safetensors", "release.pt", "diffusers"])
def test_other_formats_are_taken_too(tmp_path, source, image_folder, name):
    weights, where = {name: tensor.clone() for name, tensor in Checkpoint.open(source).weights.items()}, tmp_path / name
    if name == "diffusers":
        assert call(convert.main, source, where) == 0
    else:  # without a record
        save_file(weights, where) if where.suffix == ".safetensors" else torch.save(weights, where)
    argv = [*RUN, image_folder, "--init-from", where]
    config, model, _ = prepare([*argv, "--num-heads", 2])
    assert torch.equal(model.state_dict()["blocks.1.mlp.fc2.bias"], weights["blocks.1.mlp.fc2.bias"])
    assert (config.model.hidden_size, config.model.num_heads) == (16, 2)


# ----------------------------------------------------------------------------------------------------------------------
# Resuming


def test_a_resumed_run_does_not_read_the_file_again(tmp_path, source, image_folder, capfd):
    """The file is gone; the newest checkpoint is damaged, so that the one before it has to tell the sizes."""
    shutil.copy(source, tmp_path / "source.pt")
    command = [*RUN, image_folder, "--init-from", tmp_path / "source.pt", "--keep-classes", "dog", "-", "0"]
    command += ["--ckpt-every", 2]
    assert call(train.main, *command, "--run-dir", tmp_path / "whole", "--max-steps", 6) == 0
    assert call(train.main, *command, "--run-dir", tmp_path / "parts", "--max-steps", 4) == 0
    assert "Initialised from" in capfd.readouterr().out
    (tmp_path / "source.pt").unlink()
    newest = tmp_path / "parts/checkpoints/0000004.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    assert call(train.main, *command, "--run-dir", tmp_path / "parts", "--max-steps", 6) == 0
    output = capfd.readouterr().out
    assert "Resumed from" in output
    assert "Initialised from" not in output
    assert_same_state(latest(tmp_path / "parts"), latest(tmp_path / "whole"))
    assert without_timings(tmp_path / "parts") == without_timings(tmp_path / "whole")
    moved = [*RUN, image_folder, "--init-from", "elsewhere.pt", "--max-steps", 6, "--run-dir", tmp_path / "parts"]
    assert call(train.main, *moved) == 0
    assert call(train.main, *command, "--run-dir", tmp_path / "other", "--max-steps", 2) == 2
    assert "source.pt" in capfd.readouterr().err


def test_a_run_that_is_resumed_by_name_takes_the_sizes_from_there(tmp_path, tiny_checkpoint, source):
    command = "--data-path digits --vae none --image-size 8 --num-classes 10 --global-batch-size 12 --lr 1e-3 --device cpu"
    command = [*command.split(), "--num-workers", 0, "--init-from", source, "--resume", tiny_checkpoint, "--max-steps", 5]
    assert call(train.main, *command, "--run-dir", tmp_path) == 0
    assert latest(tmp_path)["step"] == 5


def test_a_run_may_start_from_another_average(source, image_folder):
    _, model, _ = prepare([*RUN, image_folder, "--init-from", source, "--init-average", "model"])
    expected = torch.load(source)["model"]["final_layer.linear.weight"]
    assert torch.equal(model.state_dict()["final_layer.linear.weight"], expected)


# ----------------------------------------------------------------------------------------------------------------------
# Frozen parameters


@pytest.mark.parametrize("world_size", [1, 2])
def test_frozen_parameters_stay_and_have_no_optimizer_state(tmp_path, source, image_folder, ranks, world_size):
    command = [*RUN, image_folder, "--init-from", source, "--max-steps", 3, "--run-dir", tmp_path / "run"]
    command += ["--freeze", "x_embedder.*", "blocks.0.*", "blocks.1.attn.qkv.bias"]
    run = ranks(train.main, command, world_size)
    assert run.wait() == [0] * world_size, run.text()
    state, old = latest(tmp_path / "run"), Checkpoint.open(source).weights
    frozen = [n for n in old if n.startswith(("x_embedder.", "blocks.0.", "blocks.1.attn.qkv.bias", "pos_embed"))]
    for number, name in enumerate(dict(DiT(**OLD).named_parameters())):
        if name == TABLE:
            continue
        for part in ("model", "ema"):
            assert torch.equal(state[part][name], old[name]) == (name in frozen), (part, name)
        assert (number in state["opt"]["state"]) == (name not in frozen), name
    assert len(state["opt"]["param_groups"][0]["params"]) == len(old), "the layout is that of a run without --freeze"
    assert f"Not trained (--freeze): {len(frozen) - 1} of {len(old)} tensors" in run.text()


def test_what_is_frozen_may_change_with_leave_alone(tmp_path, capfd):
    command = [*TINY, "--run-dir", tmp_path]
    assert call(train.main, *command, "--max-steps", 2) == 0
    before = latest(tmp_path)
    assert call(train.main, *command, "--max-steps", 4, "--freeze", "blocks.*") == 2
    assert "--freeze None, now ['blocks.*']" in capfd.readouterr().err
    assert call(train.main, *command, "--max-steps", 4, "--freeze", "blocks.*", "--allow-changes") == 0
    state = latest(tmp_path)
    blocks = [i for i, name in enumerate(before["model"]) if name.startswith("blocks.")]
    assert not state["opt"]["state"].keys() & set(blocks), "state that is of no use is not kept"
    assert torch.equal(state["model"]["blocks.0.attn.qkv.weight"], before["model"]["blocks.0.attn.qkv.weight"])
    assert call(train.main, *command, "--max-steps", 6, "--allow-changes") == 0
    assert latest(tmp_path)["opt"]["state"].keys() == before["opt"]["state"].keys()


# ----------------------------------------------------------------------------------------------------------------------
# The learning rate


def test_the_learning_rate_follows_its_formulas():
    constant = RecipeConfig(lr=3e-4)
    assert {constant.learning_rate(step, 10) for step in range(10)} == {3e-4}, "bit for bit"
    warmed = dataclasses.replace(constant, lr_warmup_steps=4)
    assert [warmed.learning_rate(step, 9) for step in range(5)] == pytest.approx([7.5e-5, 1.5e-4, 2.25e-4, 3e-4, 3e-4])
    assert warmed.learning_rate(4, 10) == 3e-4
    cosine = dataclasses.replace(warmed, lr_schedule="cosine")
    rates = [cosine.learning_rate(step, 12) for step in range(4, 12)]
    assert rates == pytest.approx([3e-4 * (1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)])
    assert rates[0] == 3e-4
    assert cosine.learning_rate(12, 12) == pytest.approx(0, abs=1e-19)
    assert cosine.learning_rate(1, 2) == 1.5e-4, "a run may be shorter than the warm-up"


COSINE = "--lr-warmup-steps 2 --lr-schedule cosine --log-every 1 --ckpt-every 3".split()


def test_a_resumed_run_has_the_learning_rate_of_one_that_was_not_stopped(tmp_path, capfd):
    command = [*TINY, *COSINE, "--max-steps", 8, "--run-dir"]
    for folder in ("whole", "parts"):
        assert call(train.main, *command, tmp_path / folder) == 0
    for path in files.newest_first(tmp_path / "parts/checkpoints")[:2]:
        path.unlink()
    assert call(train.main, *command, tmp_path / "parts") == 0
    assert "at step 3" in capfd.readouterr().out
    assert_same_state(latest(tmp_path / "parts"), latest(tmp_path / "whole"))
    assert without_timings(tmp_path / "parts") == without_timings(tmp_path / "whole")
    expected = [5e-4, 1e-3] + [1e-3 * (1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)]
    assert [row["learning_rate"] for row in metrics(tmp_path / "whole")] == pytest.approx(expected)


def test_the_length_of_a_cosine_is_part_of_the_recipe(tmp_path, capfd):
    command = [*TINY, *COSINE, "--run-dir", tmp_path]
    assert call(train.main, *command, "--max-steps", 4) == 0
    assert call(train.main, *command, "--max-steps", 6) == 2
    assert "--max-steps 4, now 6; use the same, or pass --allow-changes" in capfd.readouterr().err
    assert call(train.main, *command, "--max-steps", 4, "--epochs", 7) == 2
    assert call(train.main, *command, "--max-steps", 6, "--allow-changes") == 0
    assert metrics(tmp_path)[-1]["learning_rate"] == pytest.approx(1e-3 * (1 + math.cos(math.pi * 3 / 4)) / 2)


def test_the_benchmark_counts_the_steps_of_both(tmp_path, capsys):
    argv = "--seeds 1 --source-steps 2 --max-steps 2 --every 1 --samples 5 --target 0.01".split()
    assert call(benchmark.main, *argv, "--json", tmp_path / "a.json", "--plot", tmp_path / "a.png") == 0
    (result,) = json.loads((tmp_path / "a.json").read_text())
    for name in ("finetuned", "scratch"):
        steps = [step for step, accuracy in result[name] if accuracy >= 0.01]
        assert result[f"{name}_steps"] == (steps[0] if steps else None)
        assert [step for step, _ in result[name]] == list(range(1, (steps or [2])[0] + 1))
    assert "from scratch" in capsys.readouterr().out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes
