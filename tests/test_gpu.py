"""What GPUs have to show: `pytest -m gpu`. Most tests run on the CPU too, so that their code is tried everywhere."""

import copy
import threading

import numpy as np
import pytest
import sklearn.datasets  # noqa: F401 -- this and others are imported here, so that no test waits for them
import torch
import torch.distributed as dist
from conftest import TINY
from helpers import SHARDS, assert_same_state, call, flat, latest, metrics

import sample_ddp
import train
from checkpoint import files
from checkpoint.saver import BackgroundSaver
from data.autoencoder import LatentSpace
from models import DiT
from runtime import distributed
from training import run, sharding  # noqa: F401
from training.config import ComputeConfig, RecipeConfig
from training.meter import Meter
from training.trainer import Trainer

# each of these tests but the compiled one runs on the CPU too, so that its own code is tried everywhere
MISSING = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA GPU here")
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, MISSING])
on_each_device = pytest.mark.parametrize("device", ["cpu", CUDA])

IMAGES, WIDTH = 8, 144  # of a batch; two heads of 72 dimensions, as those of DiT-XL
SPACE = LatentSpace(channels=4, factor=8, scaling=1.0, shift=0.0)


@pytest.fixture(autouse=True)
def settings():
    """What set_precision and use_deterministic_kernels change for the whole process."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def make_model(device):
    """256 tokens on a GPU, as many as DiT-XL/2 has at 256 px, and 16 on a CPU. No matrix is zero, which would leave most
    gradients zero."""
    torch.manual_seed(0)
    model = DiT(32 if device == "cuda" else 8, 2, hidden_size=WIDTH, depth=2, num_heads=2, num_classes=10)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def make_trainer(model, device, precision="fp32", world_size=1, **compute):
    """Of a copy of the model."""
    place = torch.device(device, 0) if device == "cuda" else torch.device(device)
    context, recipe = distributed.Context(0, 0, world_size, place), RecipeConfig(global_batch_size=IMAGES, ema_decay=0.9)
    return Trainer(recipe, ComputeConfig(precision=precision, **compute), context, copy.deepcopy(model), SPACE)


def make_steps(trainer, number):
    """Steps whose random numbers are the CPU's. Returns the losses (number, N) and the gradients' norms (number,)."""
    losses, norms, side = [], [], trainer.model.input_size
    for _ in range(number):
        random = torch.Generator().manual_seed(trainer.steps_made)
        x_0, noise = torch.randn(2, IMAGES, 4, side, side, generator=random).to(trainer.device)
        t, y = (torch.randint(most, (IMAGES,), generator=random).to(trainer.device) for most in (1000, 11))
        losses.append(trainer.backward(x_0, t, noise, y)["loss"].cpu())
        norms.append(trainer.optimizer_step()[0].cpu())
        trainer.steps_made += 1
    return torch.stack(losses), torch.stack(norms)


def make_batch(trainer, broken=False):
    """Stored latents in the kind of memory that train.py's loader uses."""
    side = trainer.model.input_size
    random = torch.Generator().manual_seed(trainer.steps_made)
    moments = torch.rand(IMAGES, 2, 4, side, side, generator=random).half()
    if broken:
        moments[0, 0, 0, 0, 0] = float("nan")
    batch = {"moments": moments, "label": torch.arange(IMAGES)}
    return {name: values.pin_memory() if trainer.device.type == "cuda" else values for name, values in batch.items()}


def relative(found, expected):
    return float((found.cpu() - expected).norm() / expected.norm())


# ----------------------------------------------------------------------------------------------------------------------
# Training steps


@on_each_device
def test_steps_in_float32_are_those_of_the_cpu(device):
    model = make_model(device)
    expected = make_trainer(model, "cpu")
    found = make_trainer(model, device, grad_accum=2)  # which a CPU, too, rounds in another order
    losses, norms = make_steps(expected, 1)
    found_losses, found_norms = make_steps(found, 1)
    for (name, a), b in zip(found.model.named_parameters(), expected.model.parameters(), strict=True):
        if not a.requires_grad:
            continue
        gradient, wanted = a.grad.cpu(), b.grad
        if name.endswith("qkv.bias"):  # a key's bias changes no softmax: its gradient is nothing but rounding
            gradient, wanted = (torch.cat([g[:WIDTH], g[2 * WIDTH :]]) for g in (gradient, wanted))
        assert relative(gradient, wanted) < 1e-4, f"gradient of {name}"
    more, more_norms = make_steps(expected, 4)
    found_more, found_more_norms = make_steps(found, 4)
    torch.testing.assert_close(torch.cat([found_losses, found_more]), torch.cat([losses, more]), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        torch.cat([found_norms, found_more_norms]), torch.cat([norms, more_norms]), rtol=1e-3, atol=0
    )
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    for networks in ((found.model, expected.model), (found.ema.module, expected.ema.module)):
        moved, wanted = (torch.cat([p.detach().cpu().flatten() for p in n.parameters()]) - start for n in networks)
        assert relative(moved, wanted) < 0.02, "Adam enlarges the rounding of gradients near zero, and nothing more"


@pytest.mark.parametrize(
    ("device", "precision", "compile", "tolerance"),
    [
        ("cpu", "bf16", None, 0.03),
        pytest.param("cuda", "bf16", None, 0.03, marks=CUDA.marks),
        pytest.param("cuda", "fp32", "inductor", 1e-3, marks=CUDA.marks),
        pytest.param("cuda", "bf16", "inductor", 0.03, marks=CUDA.marks),
    ],
)
def test_bf16_and_compiled_steps_are_close_to_float32(device, precision, compile, tolerance):
    model = make_model(device)
    losses, norms = make_steps(make_trainer(model, device), 3)
    found = make_trainer(model, device, precision, compile=compile)
    found_losses, found_norms = make_steps(found, 3)
    torch.testing.assert_close(found_losses.mean(1), losses.mean(1), rtol=tolerance, atol=0)
    torch.testing.assert_close(found_norms, norms, rtol=2 * tolerance, atol=0)
    assert not (precision == "bf16" and torch.equal(found_losses, losses)), "that is not bf16"


@on_each_device
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_steps_are_the_same_bit_for_bit(device, precision, tmp_path):
    """With --deterministic: the fastest kernels of a GPU add in an order of their own each time."""
    model = make_model(device)
    undisturbed, stopped, resumed = (make_trainer(model, device, precision, deterministic=True) for _ in range(3))
    for trainer, last in ((undisturbed, 6), (stopped, 3)):
        while trainer.steps_made < last:
            trainer.step(make_batch(trainer))
    files.save(tmp_path / "0000003.pt", stopped.state_dict())
    resumed.load_state_dict(files.load(tmp_path / "0000003.pt"))
    while resumed.steps_made < 6:
        resumed.step(make_batch(resumed))
    assert torch.are_deterministic_algorithms_enabled()
    assert_same_state(resumed.state_dict(), undisturbed.state_dict())


@on_each_device
def test_a_resumed_command_is_the_same_bit_for_bit(device, tmp_path):
    argv = [*TINY, "--device", device, "--precision", "fp32", "--deterministic"]
    assert call(train.main, *argv, "--max-steps", 6, "--run-dir", tmp_path / "whole") == 0
    for last in (3, 6):
        assert call(train.main, *argv, "--max-steps", last, "--run-dir", tmp_path / "parts") == 0
    assert_same_state(latest(tmp_path / "parts"), latest(tmp_path / "whole"))


WAITS = "cudaStreamSynchronize cudaDeviceSynchronize cudaEventSynchronize aten::item aten::_local_scalar_dense".split()


def ancestors(event):
    while event.cpu_parent is not None:
        event = event.cpu_parent
        yield event.name


@on_each_device
def test_the_host_never_waits_between_two_lines_of_the_log(device):
    """Also where an update is not finite, and is skipped."""
    trainer = make_trainer(make_model(device), device, "bf16" if device == "cuda" else "fp32")
    meter, batches = Meter(trainer.device), [make_batch(trainer, broken) for broken in (False, False, True, False)]

    def make_step(batch):
        result = trainer.step(batch)
        meter.add(result.losses, result.grad_norm, result.finite, IMAGES)
        return result.finite

    for batch in batches[:2]:  # the first steps fill caches
        make_step(batch)
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []
    with torch.profiler.profile(activities=activities) as profile:
        with torch.profiler.record_function("the steps"):
            finite = [make_step(batch) for batch in batches]
        bool(finite[0])  # waits: to know that the profile shows it
    span = next(event.time_range for event in profile.events() if event.name == "the steps")
    waits = [event for event in profile.events() if event.name in WAITS]
    if device == "cpu":  # whose AdamW reads its own count of steps
        waits = [event for event in waits if "aten::_fused_adamw_" not in ancestors(event)]
    assert [event.name for event in waits if event.time_range.start < span.end] == [], "the host waited during the steps"
    assert waits, "the profile shows no waiting, not even where there is some"
    assert torch.stack(finite).tolist() == [True, True, False, True]


@on_each_device
def test_a_step_that_is_not_finite_changes_nothing(device):
    trainer = make_trainer(make_model(device), device)
    trainer.step(make_batch(trainer))
    before = copy.deepcopy(trainer.state_dict())
    assert not trainer.step(make_batch(trainer, broken=True)).finite
    for part in ("model", "opt"):
        for name, value in flat(trainer.state_dict()[part]).items():
            wanted = flat(before[part])[name]
            assert torch.equal(value, wanted) if isinstance(value, torch.Tensor) else value == wanted, name
    assert trainer.step(make_batch(trainer)).finite


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints, sampling, processes, memory


@on_each_device
def test_training_goes_on_while_a_checkpoint_is_copied_and_written(device, tmp_path, monkeypatch):
    trainer = make_trainer(make_model(device), device)
    trainer.step(make_batch(trainer))
    files.save(tmp_path / "expected.pt", trainer.state_dict())
    written, may_write, save = [], threading.Event(), files.save

    def save_later(path, state):
        assert may_write.wait(60)
        written.append(state)
        save(path, state)

    monkeypatch.setattr(files, "save", save_later)
    saver = BackgroundSaver(tmp_path)
    saver.save(1, trainer.state_dict())
    for _ in range(3):
        trainer.step(make_batch(trainer))
    assert saver.thread.is_alive()
    may_write.set()
    saver.wait()
    expected = files.load(tmp_path / "expected.pt")
    assert_same_state(files.load(tmp_path / "0000001.pt"), expected)
    assert not torch.equal(trainer.model.blocks[0].mlp.fc1.weight.cpu(), expected["model"]["blocks.0.mlp.fc1.weight"])
    copies = [value for value in flat(written[0]).values() if isinstance(value, torch.Tensor)]
    assert all(value.device.type == "cpu" for value in copies)
    if device == "cuda":
        weights = [value for path, value in flat(written[0]).items() if path[0] in ("model", "ema")]
        assert all(value.is_pinned() for value in weights), "the copy would wait for the device"


@on_each_device
def test_decoding_in_its_own_stream_changes_nothing(device, small_vae, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = DiT(4, 2, hidden_size=48, depth=2, num_heads=2, num_classes=10)
    model.final_layer.linear.weight.data.normal_(std=0.02)
    record = {"vae": str(small_vae), "image_size": 32}
    files.save(tmp_path / "model.pt", {"ema": model.state_dict(), "model_config": model.config, "args": record})
    sizes = "--num-fid-samples 10 --per-proc-batch-size 3 --num-sampling-steps 8 --folder set".split()
    found = []
    for aside in (True, False):
        if device == "cpu":
            monkeypatch.setattr(sample_ddp, "DECODED_ASIDE", {"cpu"} if aside else set())
        elif not aside:
            monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
        words = "--ckpt", tmp_path / "model.pt", "--device", device, "--sample-dir", tmp_path / f"aside-{aside}"
        assert call(sample_ddp.main, *words, *sizes) == 0
        with np.load(tmp_path / f"aside-{aside}/set.npz") as file:
            found.append(file["arr_0"])
    assert np.array_equal(*found)
    assert len({image.tobytes() for image in found[0]}) == 10


@on_each_device
def test_a_sharded_run_of_one_process_trains_the_same(device, tmp_path):
    if device == "cpu" and not SHARDS:
        pytest.skip("this version of PyTorch does not shard models on CPUs")
    argv = [*TINY, "--device", device, "--precision", "fp32", "--max-steps", 6]
    for name, options in (("whole", []), ("sharded", ["--shard"])):
        assert call(train.main, *argv, *options, "--run-dir", tmp_path / name) == 0
    whole, sharded = ([row["loss"] for row in metrics(tmp_path / name)] for name in ("whole", "sharded"))
    assert sharded == pytest.approx(whole, rel=1e-5)
    states = [latest(tmp_path / name) for name in ("whole", "sharded")]
    assert flat(states[0]["ema"]).keys() == flat(states[1]["ema"]).keys()
    for name, value in states[0]["ema"].items():
        assert relative(states[1]["ema"][name], value) < 1e-3 or not value.any(), name


@on_each_device
def test_ddp_over_nccl_trains_the_same(device):
    """With one rank: gloo takes NCCL's place on a CPU."""
    model = make_model(device)
    losses, norms = make_steps(make_trainer(model, device), 3)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        ones = torch.ones(3, device=device)
        dist.all_reduce(ones)
        assert ones.tolist() == [1, 1, 1]
        trainer = make_trainer(model, device, world_size=2)  # for which Trainer uses DDP; the group is of this one alone
        assert type(trainer.parallel_model).__name__ == "DistributedDataParallel"
        found_losses, found_norms = make_steps(trainer, 3)
    finally:
        distributed.close()
    torch.testing.assert_close(found_losses, losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_norms, norms, rtol=1e-4, atol=0)


@on_each_device
def test_out_of_memory_is_one_line_with_the_ways_out(device, tmp_path, monkeypatch, capfd):
    """With the allocator's own error, where activations would be allocated."""
    forward = DiT.forward  # which counts operations, too, on the meta device

    def allocate(self, x, *rest, **more):
        return forward(self, x, *rest, **more) if x.is_meta else x.new_empty(2**48)

    monkeypatch.setattr(DiT, "forward", allocate)
    assert call(train.main, *TINY, "--device", device, "--run-dir", tmp_path, "--max-steps", 2) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1, lines
    assert "out of memory" in lines[0]
    assert "pass --grad-accum or --grad-checkpoint" in lines[0]
