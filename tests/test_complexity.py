"""Counts of cost against the paper's tables, closed forms and what autograd keeps on a real device."""

import json
import re

import pytest
import torch
from helpers import call

from models import BLOCKS, DiT
from studies import published
from studies.published import PUBLISHED, TOLERANCE
from tools import complexity
from training.cost import activation_bytes, build, forward_macs, inputs, trainable, training_memory

TINY = {"input_size": 8, "patch_size": 2, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 10}


@pytest.fixture
def run(capsys):
    """run(*options) -> exit status, stdout, stderr."""
    return lambda *options, command=complexity: (call(command.main, *options), *capsys.readouterr())


def linear_macs(block, tokens, width, depth, mlp_ratio):
    """The products of the blocks, written out from the paper's description of the designs."""
    t = tokens + 2 * (block == "in-context")
    macs = t * width * width * (4 + 2 * mlp_ratio) + 2 * t * t * width
    macs += {"adaln-zero": 6, "adaln": 4}.get(block, 0) * width * width
    if block == "space-time":  # of a picture: a second attention, of each token to itself, and three more modulations
        macs += 4 * t * width * width + 2 * t * width + 9 * width * width
    if block == "cross-attention":
        macs += (2 * t + 2 * 2) * width * width + 2 * t * 2 * width
    return depth * macs


def test_every_published_count_is_reproduced(run):
    status, out, _ = run("--json", command=published)
    rows = json.loads(out)
    assert len(rows) == 16
    assert {row["model"] for row in rows} >= {f"DiT-{size}/{p}" for size in ("S", "B", "L", "XL") for p in (2, 4, 8)}
    assert {row["block"] for row in rows if row["model"] == "DiT-XL/2"} == set(BLOCKS) - {"space-time"}
    for row in rows:
        name = f"{row['model']} {row['block']} {row['image_size']} px"
        tolerance = 0.07 if row["image_size"] == 512 else 0.03
        assert abs(row["counted_gmacs"] - row["gmacs"]) <= tolerance, f"{name} is not the paper's design"
        assert round(row["counted_parameters"] / 1e6) == row["parameters"], f"{name} is not the paper's design"
    assert status == 0


def test_table_shows_a_row_out_of_tolerance_and_exits_with_1(monkeypatch, run):
    wrong = [PUBLISHED[0], PUBLISHED[1]._replace(gmacs=1.45), PUBLISHED[0]._replace(parameters=34)]
    monkeypatch.setattr(published, "PUBLISHED", wrong)
    status, out, _ = run(command=published)
    assert status == 1
    assert [line.endswith("OUT OF TOLERANCE") for line in out.splitlines()[2:]] == [False, True, True]
    assert TOLERANCE == {256: 0.03, 512: 0.07}


@pytest.mark.parametrize("block", BLOCKS)
def test_overrides_change_every_design_as_the_formula_says(block):
    sizes = {"hidden_size": 48, "depth": 3, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2.0}
    model = build("DiT-S/2", input_size=16, block=block, **sizes)
    assert model.blocks[0].attn.num_heads == 4
    macs = linear_macs(block, tokens=16, width=48, depth=3, mlp_ratio=2)
    macs += 16 * 48 * 4 * 16  # patch convolution
    macs += 256 * 48 + 48 * 48  # timestep embedding
    macs += 16 * 48 * 8 * 16 + (2 * 48 * 48 if BLOCKS[block].num_modulations else 0)  # final layer
    assert forward_macs(model) == macs, "attention or a linear layer is not counted as it should be"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("block", BLOCKS)
def test_activations_are_what_autograd_keeps_on_a_real_device(block, precision):
    model = DiT(**TINY, block=block)
    own, saved = {p.data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x, t, y = torch.zeros(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        out = model(x, t, y)
    expected = sum(nbytes for pointer, nbytes in saved.items() if pointer not in own)
    del out
    counted = activation_bytes(build("DiT-S/2", **TINY, block=block), 2, precision)
    # the GPU's attention kernel pads its sums to 32 queries, the CPU's does not: for each token, where it attends to itself
    padding = 4 * 31 * 2 * 16 * model.num_heads * model.depth if block == "space-time" else 0
    assert expected <= counted <= 1.01 * expected + padding


def test_memory_grows_with_the_batch_and_shrinks_in_bf16():
    model = build("DiT-S/4")
    small, large = (training_memory(model, batch, "fp32") for batch in (8, 16))
    assert small["activations"] * 1.99 < large["activations"] < small["activations"] * 2.01
    everything, learned = sum(p.numel() for p in model.parameters()), trainable(model)
    fixed = {"weights": 4 * everything, "ema": 4 * everything, "gradients": 4 * learned, "optimizer": 8 * learned}
    assert all(small[part] == large[part] == nbytes for part, nbytes in fixed.items())
    assert small["total"] == sum(fixed.values()) + small["activations"] + small["backward pass"]
    assert small["backward pass"] == small["activations"] // 12, "the gradients of one of twelve blocks"
    assert training_memory(model, 8, "tf32") == small, "TF32 rounds inside products, nothing is stored in it"
    # the residual stream and the norms stay float32, and copies of the weights come on top
    share = activation_bytes(model, 64, "bf16") / activation_bytes(model, 64, "fp32")
    assert 0.5 < share < 0.7


def test_cost_as_json(run):
    options = "--model DiT-S/8 --block in-context --depth 2 --image-size 64 --num-classes 10 --precision bf16 --json"
    status, out, _ = run(*options.split())
    assert status == 0
    report = json.loads(out)
    assert (report["block"], report["depth"], report["tokens"], report["num_classes"]) == ("in-context", 2, 1, 10)
    assert report["training_flops_per_image"] == 6 * report["forward_macs_per_image"]
    assert report["training_memory_bytes"]["total"] > 16 * report["parameters"]


@pytest.mark.parametrize(("vae", "tokens", "channels"), [("none", 64, 3), ("mse", 1, 4), ("folder", 16, 5)])
def test_the_autoencoder_decides_on_the_tokens_and_channels(vae, tokens, channels, run, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()  # an autoencoder whose latent cells are 2 pixels; its weights are not needed
    config = {"_class_name": "AutoencoderKL", "in_channels": 3, "latent_channels": 5, "block_out_channels": [8, 8]}
    (tmp_path / "folder/config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    options = ["--model", "DiT-S/2", "--image-size", 16, "--vae", vae, "--depth", 1, "--num-classes", 0, "--json"]
    status, out, _ = run(*options)
    assert status == 0
    report = json.loads(out)
    model = build("DiT-S/2", input_size=2 * int(tokens**0.5), in_channels=channels, depth=1, num_classes=0)
    assert (report["tokens"], report["parameters"]) == (tokens, trainable(model))


def test_cost_as_text(run):
    options = ["--model", "DiT-S/2", "--image-size", 8, "--vae", "none", "--channels", 1, "--num-classes", 0]
    status, out, _ = run(*options, "--depth", 1, "--batch-size", 4, "--shard", 2)
    assert status == 0
    title, *rows = out.splitlines()
    settings = "batch 4 on each device, fp32, divided among 2 devices"
    assert title == f"DiT-S/2, adaln-zero, depth 1, 8 px, 16 tokens, 0 classes; {settings}"
    assert re.fullmatch(r"  memory in all           0\.\d\d GiB on each device", rows[-1])


def test_an_input_may_have_any_number_of_sides():
    clip, frame = build("DiT-S/2", input_size=(4, 8, 6), patch_size=(1, 2, 2)), build("DiT-S/2", input_size=(8, 6))
    assert inputs(clip, 2)[0].shape == (2, 4, 4, 8, 6)
    tokens, width, depth = 12, 384, 12
    # four times the tokens: four times the products, and sixteen times those of attention
    of_tokens = depth * (12 * tokens * width**2 + 2 * tokens**2 * width)
    assert forward_macs(clip) - forward_macs(frame) > 3 * of_tokens


def test_a_clip_is_counted_with_all_its_frames(run):
    options = "--model DiT-S/8 --depth 1 --vae none --image-size 32 --num-frames 4 --patch-frames 2 --num-classes 0".split()
    status, out, _ = run(*options, "--json")
    model = build("DiT-S/8", depth=1, num_classes=0, in_channels=3, input_size=(4, 32, 32), patch_size=(2, 8, 8))
    assert (status, json.loads(out)["forward_macs_per_image"]) == (0, forward_macs(model))
    _, out, _ = run(*options)
    assert "4 frames, 32 px, 32 tokens" in out
    assert "GMACs a clip" in out


# ----------------------------------------------------------------------------------------------------------------------
# --shard


def test_each_device_holds_its_part_of_the_state():
    model = build("DiT-S/2")
    learned, fixed, block = trainable(model), model.pos_embed.numel(), sum(p.numel() for p in model.blocks[0].parameters())
    parts = training_memory(model, 4, "bf16", num_shards=64)
    state = sum(parts[name] for name in ("weights", "ema", "gradients", "optimizer"))
    assert state == pytest.approx((20 * learned + 8 * fixed) / 64, abs=4), "4 + 4 + 4 + 8 bytes of each parameter"
    assert parts["gathered"] == 2 * 2 * block + 4 * (learned + fixed - 12 * block) + 4 * block
    assert parts["total"] == sum(parts.values()) - parts["total"]


@pytest.mark.parametrize("checkpointing", [0, 1])
def test_gathered_weights_leave_no_copies_for_the_backward_pass(checkpointing):
    model = build("DiT-S/2")
    model.gradient_checkpointing = checkpointing
    alone, divided = (activation_bytes(model, 8, "bf16", sharded) for sharded in (False, True))
    copies = 2 * 12 * 18 * 384 * 384  # a block has 4 D^2 weights in the attention, 8 in the MLP, 6 in the modulation
    assert alone - divided == (0 if checkpointing else copies), "a checkpointed block keeps no copies anyway"
    assert activation_bytes(model, 8, "fp32", sharded=True) == activation_bytes(model, 8, "fp32")
