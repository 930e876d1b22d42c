"""--shard: the same training as without it, in 1, 2 and 4 processes, and checkpoints that move freely between them."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import diffusers  # noqa: F401 -- forked processes start faster with what is imported here already
import numpy as np
import pytest
import sklearn.datasets  # noqa: F401
import torch
from conftest import TINY
from helpers import SHARDS, Ranks, assert_same_state, call, flat, latest, without_timings
from PIL import Image
from torch.distributed.tensor import DTensor

import train
from data.autoencoder import Pixels
from models import DiT
from runtime.distributed import Context, processes
from runtime.errors import UserError
from training import plan, run_folder, sharding, watchers  # noqa: F401
from training.config import ComputeConfig, RecipeConfig
from training.cost import build, training_memory
from training.trainer import Trainer

pytestmark = pytest.mark.skipif(not SHARDS, reason="this version of PyTorch does not shard models on CPUs")

OPTIONS = {
    "plain": {},
    "more": {"clip": 0.01, "frozen": 7, "grad_accum": 2, "grad_checkpoint": 2, "compile": "aot_eager"},
}
D = 24


def make_trainer(context, shard=None, clip=None, frozen=0, **compute):
    """A Trainer whose initial weights are the same everywhere, none of them zero: of zeros, few gradients are not."""
    torch.manual_seed(0)
    model = DiT(8, 2, 1, hidden_size=D, depth=3, num_heads=2, num_classes=10)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    for parameter in list(model.parameters())[-frozen:] if frozen else ():
        parameter.requires_grad = False
    recipe = RecipeConfig(global_batch_size=8, clip_grad_norm=clip, ema_decay=0.9, more_ema_decays=(0.5,))
    return Trainer(recipe, ComputeConfig(shard=shard, **compute), context, model, Pixels(1))


def make_steps(trainer, last, broken=False):
    """Train to the step `last` on batches that are divided among the processes. Returns the mean loss over all processes
    and the norm of the gradient in each step. broken: an image of process 0 is not finite."""
    rows, context = [], trainer.context
    while trainer.steps_made < last:
        random = torch.Generator().manual_seed(trainer.steps_made)
        mine = slice(context.rank, None, context.world_size)
        x_0, noise = torch.randn(2, 8, 1, 8, 8, generator=random)[:, mine]
        t, y = (torch.randint(most, (8,), generator=random)[mine] for most in (1000, 11))
        x_0[0] *= float("nan") if broken and context.is_main else 1
        loss = trainer.backward(x_0, t, noise, y)["loss"].mean()
        grad_norm, finite = trainer.optimizer_step()
        trainer.steps_made += 1
        assert type(grad_norm) is torch.Tensor
        assert bool(finite) != broken
        rows.append((sum(context.all_gather(float(loss))) / context.world_size, float(grad_norm)))
    return rows


def assert_close(found, expected):
    """Both are (rows, state) after ten steps."""
    (rows, state), (expected_rows, expected_state) = found, expected
    torch.testing.assert_close(torch.tensor(rows), torch.tensor(expected_rows[-len(rows) :]), rtol=1e-6, atol=1e-6)
    for part in ("model", "ema", "emas"):
        found, expected_part = flat(state[part]), flat(expected_state[part])
        assert found.keys() == expected_part.keys()
        for name, value in expected_part.items():
            difference = (found[name] - value).abs()
            if name[-1].endswith("qkv.bias"):  # of keys, changes no softmax: its gradient is rounding, which Adam enlarges
                difference[D : 2 * D] = 0
            assert difference.max() <= 1e-6, f"{part} {name}: {difference.max()}"


def train_sharded(argv):
    """In each process, with each pair of a name of options and a way to shard (all, or node, of two processes each): ten
    steps, from a state where there is one, that are left in files; the state after five, too."""
    folder, *pairs = argv
    with processes("cpu") as context:
        for name, how in map(str.split, pairs):
            options = {**OPTIONS[name], "compile": None} if context.world_size == 4 else OPTIONS[name]  # it takes seconds
            trainer, start, rows = make_trainer(context, how, **options), Path(folder) / f"{name}-5.pt", []
            assert all(isinstance(p, DTensor) for p in [*trainer.ema.weights, *trainer.ema.averages])
            if start.exists():
                trainer.load_state_dict(torch.load(start, mmap=True))
            else:
                rows = make_steps(trainer, 5)
                save(trainer.state_dict(), start, context)
            save((rows + make_steps(trainer, 10), trainer.state_dict()), f"{folder}/{name}-{how}.pt", context)
        check_more(trainer)


def check_more(trainer):
    """What is left to see in processes that have trained."""
    context, before = trainer.context, trainer.state_dict()
    whole = trainer.full(trainer.ema.module)
    if context.is_main:
        assert all(torch.equal(value, before["ema"][name]) for name, value in whole.state_dict().items())
        whole(torch.randn(3, 1, 8, 8), torch.arange(3), torch.arange(3))  # alone, and nobody waits

    make_steps(trainer, trainer.steps_made + 1, broken=True)
    after = trainer.state_dict()
    if context.is_main:
        assert all(torch.isfinite(value).all() for value in after["ema"].values())
        for state in (before, after):  # averages move on towards the weights, as without --shard
            del state["ema"], state["emas"]
        assert_same_state({**before, "ema": {}, "step": 0}, {**after, "ema": {}, "step": 0})
    else:
        assert not any(isinstance(value, torch.Tensor) for value in after["model"].values())

    state = context.broadcast(before | {"ema": {}})
    state["model"]["pos_embed"] = torch.zeros(1, 5, D)
    with pytest.raises(ValueError, match=r"a tensor of \(1, 5, 24\), must be \(1, 16, 24\)"):
        trainer.load_state_dict(state)

    def sums(module, shard=sharding.fully_shard, **options):
        shard(module, **options).set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)

    def crashes(module, **options):
        raise RuntimeError("not on this device\nwith details")

    mistakes = {crashes: r"not on this device\); use version", sums: r"the gradients are wrong by 1 of their size\)"}
    for mistake, message in list(mistakes.items())[: 2 if context.world_size == 2 else 1]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sharding, "fully_shard", mistake)
            with pytest.raises(UserError, match=message):
                make_trainer(context, "all")


def save(value, path, context):
    if context.is_main:
        torch.save(value, path)
    context.barrier()


@pytest.fixture(scope="module")
def expected():
    """{name of options: (rows, state)} of ten steps in one process without --shard."""
    trainers = {name: make_trainer(Context(0, 0, 1, torch.device("cpu")), **options) for name, options in OPTIONS.items()}
    return {name: (make_steps(trainer, 10), trainer.state_dict()) for name, trainer in trainers.items()}


def by_nodes_of_two(argv):
    os.environ["LOCAL_RANK"] = str(int(os.environ["RANK"]) % 2)
    train_sharded(argv)


def run(ranks, world_size, *argv, main=train_sharded):
    done = ranks(main, argv, world_size)
    assert done.wait() == [0] * world_size, "".join(map(done.text, range(world_size)))


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """The folder that two processes leave."""
    folder = tmp_path_factory.mktemp("two")
    run(lambda *command: Ranks(*command, folder / "output"), 2, folder, "plain all", "more all")
    return folder


def test_one_process_shards_alone(ranks, tmp_path, expected):
    run(ranks, 1, tmp_path, "plain all", "more all")
    for name, ten_steps in expected.items():
        assert_close(torch.load(tmp_path / f"{name}-all.pt"), ten_steps)


def test_two_processes_train_as_one_and_an_unsharded_process_resumes(expected, by_two):
    for name, ten_steps in expected.items():
        assert_close(torch.load(by_two / f"{name}-all.pt"), ten_steps)
        trainer = make_trainer(Context(0, 0, 1, torch.device("cpu")), **OPTIONS[name])
        trainer.load_state_dict(torch.load(by_two / f"{name}-5.pt"))
        assert_close((make_steps(trainer, 10), trainer.state_dict()), ten_steps)


@pytest.mark.slow
def test_four_processes_resume_what_two_have_saved(ranks, tmp_path, expected, by_two):
    for name in expected:
        shutil.copy(by_two / f"{name}-5.pt", tmp_path)
    run(ranks, 4, tmp_path, "plain all", "more node", main=by_nodes_of_two)
    for name, how in (("plain", "all"), ("more", "node")):
        assert_close(torch.load(tmp_path / f"{name}-{how}.pt"), expected[name])


def test_the_command_does_what_it_does_without_shard(ranks, tmp_path, monkeypatch):
    """In bfloat16, with a grid and validation, for which process 1 has fewer batches or none, and one process resumes."""
    monkeypatch.setattr(watchers, "MAX_IMAGES", 13)
    options = [*TINY, "--precision", "bf16", "--sample-every", 4, "--sample-labels", 3, "--sample-cfg-scale", 1]
    options += ["--val-data-path", "digits", "--val-every", 4, "--max-steps", 4]
    plain, sharded = tmp_path / "plain", tmp_path / "sharded"
    for folder, how in ((plain, []), (sharded, ["--shard"])):
        done = ranks(train.main, [*options, *how, "--run-dir", folder], 2)
        assert done.wait() == [0, 0], done.text()
    for name, value in latest(plain)["ema"].items():
        torch.testing.assert_close(latest(sharded)["ema"][name], value, rtol=0, atol=1e-6)
    for row, expected_row in zip(without_timings(sharded), without_timings(plain), strict=True):
        assert row == pytest.approx(expected_row, rel=1e-5)
    pictures = [np.asarray(Image.open(folder / "samples/0000004.png"), dtype=int) for folder in (plain, sharded)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert "optimizer state and EMA are divided among 2 processes (--shard)" in (sharded / "log.txt").read_text()
    assert call(train.main, *options, "--run-dir", sharded, "--max-steps", 6) == 0
    assert latest(sharded)["step"] == 6


def test_devices_that_cannot_be_shared_are_refused(monkeypatch):
    monkeypatch.setattr(sharding.dist, "is_initialized", lambda: True)
    uneven = SimpleNamespace(device=torch.device("cpu"), world_size=3, all_gather=lambda local_rank: [0, 1, 0])
    with pytest.raises(UserError, match="--shard node: needs equally many processes on each node"):
        sharding.make_mesh(uneven, "node")
    with pytest.raises(UserError, match="--shard: MPS cannot be shared"):
        sharding.make_mesh(SimpleNamespace(device=torch.device("mps"), world_size=1), "all")


def test_the_plan_divides_the_memory(ranks):
    done = ranks(train.main, [*TINY, "--shard", "--dry-run"], 2)
    assert done.wait() == [0, 0], done.text()
    assert "\n  memory: gathered        0.00 GiB\n" in done.text()
    assert " s measured, " in done.text()
    model = build("DiT-B/4", num_classes=10)
    alone, divided = (training_memory(model, 4, "fp32", num_shards) for num_shards in (1, 4))
    for name in ("weights", "ema", "gradients", "optimizer"):
        assert divided[name] == pytest.approx(alone[name] / 4, abs=1)
    assert 0.25 * alone["total"] < divided["total"] < 0.5 * alone["total"]
