"""complexity.py against the paper's tables, closed forms and what autograd keeps on a real device."""

import json
import re

import pytest
import torch
from helpers import call

from models import BLOCKS, DiT
from tools import complexity
from tools.complexity import PUBLISHED, TOLERANCE
from training import many_gpus
from training.cost import activation_bytes, build, forward_macs, trainable, training_memory

TINY = {"input_size": 8, "patch_size": 2, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 10}


@pytest.fixture
def run(capsys):
    """run(*options) -> exit status, stdout, stderr."""
    return lambda *options: (call(complexity.main, *options), *capsys.readouterr())


def linear_macs(block, tokens, width, depth, mlp_ratio):
    """The products of the blocks, written out from the paper's description of the designs."""
    t = tokens + 2 * (block == "in-context")
    macs = t * width * width * (4 + 2 * mlp_ratio) + 2 * t * t * width
    macs += {"adaln-zero": 6, "adaln": 4}.get(block, 0) * width * width
    if block == "cross-attention":
        macs += (2 * t + 2 * 2) * width * width + 2 * t * 2 * width
    return depth * macs


def test_every_published_count_is_reproduced(run):
    status, out, _ = run("--table", "--json")
    rows = json.loads(out)
    assert len(rows) == 16
    assert {row["model"] for row in rows} >= {f"DiT-{size}/{p}" for size in ("S", "B", "L", "XL") for p in (2, 4, 8)}
    assert {row["block"] for row in rows if row["model"] == "DiT-XL/2"} == set(BLOCKS)
    for row in rows:
        name = f"{row['model']} {row['block']} {row['image_size']} px"
        tolerance = 0.07 if row["image_size"] == 512 else 0.03
        assert abs(row["counted_gmacs"] - row["gmacs"]) <= tolerance, f"{name} is not the paper's design"
        assert round(row["counted_parameters"] / 1e6) == row["parameters"], f"{name} is not the paper's design"
    assert status == 0


def test_table_shows_a_row_out_of_tolerance_and_exits_with_1(monkeypatch, run):
    wrong = [PUBLISHED[0], PUBLISHED[1]._replace(gmacs=1.45), PUBLISHED[0]._replace(parameters=34)]
    monkeypatch.setattr(complexity, "PUBLISHED", wrong)
    status, out, _ = run("--table")
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
    macs += 16 * 48 * 8 * 16 + (2 * 48 * 48 if block.startswith("adaln") else 0)  # final layer
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
    # the GPU's attention kernel pads its sums to 32 queries, the CPU's does not
    assert expected <= counted <= 1.01 * expected


def test_memory_grows_with_the_batch_and_shrinks_in_bf16():
    model = build("DiT-S/4")
    small, large = (training_memory(model, batch, "fp32") for batch in (8, 16))
    assert small["activations"] * 1.99 < large["activations"] < small["activations"] * 2.01
    everything, learned = sum(p.numel() for p in model.parameters()), trainable(model)
    fixed = {"weights": 4 * everything, "ema": 4 * everything, "gradients": 4 * learned, "optimizer": 8 * learned}
    assert all(small[part] == large[part] == nbytes for part, nbytes in fixed.items())
    assert small["total"] == sum(fixed.values()) + small["activations"]
    assert training_memory(model, 8, "tf32") == small, "TF32 rounds inside products, nothing is stored in it"
    # the residual stream and the norms stay float32, and copies of the weights come on top
    share = activation_bytes(model, 64, "bf16") / activation_bytes(model, 64, "fp32")
    assert 0.5 < share < 0.7


def test_cost_as_json_and_hours(run):
    options = "--model DiT-S/8 --block in-context --depth 2 --image-size 64 --num-classes 10 --precision bf16 --json"
    hours = "--images 3.6e6 --peak-tflops 2 --utilization 0.5"
    status, out, _ = run(*options.split(), *hours.split())
    assert status == 0
    report = json.loads(out)
    assert (report["block"], report["depth"], report["tokens"], report["num_classes"]) == ("in-context", 2, 1, 10)
    assert report["training_flops_per_image"] == 6 * report["forward_macs_per_image"]
    assert report["hours"] == pytest.approx(report["training_flops_per_image"] * 1e-9)
    assert report["training_memory_bytes"]["total"] > 16 * report["parameters"]


def test_cost_as_text_of_a_pixel_model(run):
    options = ["--model", "DiT-S/2", "--image-size", 8, "--downsampling", 1, "--channels", 1, "--num-classes", 0]
    status, out, _ = run(*options, "--depth", 1, "--batch-size", 4)
    assert status == 0
    assert out.splitlines()[0] == "DiT-S/2, adaln-zero, depth 1, 8 px, 16 tokens, 0 classes"
    assert re.search(r"in all, fp32, batch 4 +0\.\d\d GiB\n$", out), "without a peak no hours are printed"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "DiT-M/2"], "DiT-S/2"),
        (["--num-heads", "5"], "number of heads 5"),
        (["--patch-size", "3"], "patch size 3"),
        (["--hidden-size", "90", "--num-heads", "5"], "multiple of 4"),
        (["--image-size", "100"], "image size 100 is not a multiple of 8"),
        (["--block", "adaln-one"], "cross-attention"),
        (["--depth", "0"], "--depth: 0 is not a whole number, 1 or more and 512 or less"),
        (["--mlp-ratio", "nan"], "--mlp-ratio: nan is not a number, 1024 or less and more than 0"),
        (["--utilization", "60"], "--utilization: 60.0 is not a number, 0.001 or more and 1 or less"),
        (["--num-classes", 10**12], "--num-classes: 1000000000000 is not a whole number"),
        (["--hidden-size", 10**9], "--hidden-size: 1000000000 is not a whole number"),
        (["--mlp-ratio", "1e30"], "--mlp-ratio: 1e+30 is not a number"),
        (["--peak-tflops", "1e-300"], "--peak-tflops: 1e-300 is not a number"),
        (["--image-size", 65536, "--downsampling", 1, "--patch-size", 1, "--depth", 1], "too large to be counted"),
        (["--table", "--depth", "3"], "--depth"),
        (["--table", "--batch-size", "3"], "--batch-size"),
        (["--table", "--gpus", "8"], "--gpus: is for the cost of one model"),
        (["--shard"], "--shard: needs --gpus"),
        (["--gpus", 12], "--gpus 12: not a multiple of --gpus-per-node 8"),
        (["--gpus", 8, "--network-bandwidth", 0], "--network-bandwidth: 0.0 is not a number, 0.001 or more"),
    ],
)
def test_wrong_options_are_refused_in_one_line(options, words, run):
    status, out, err = run(*options)
    assert (status, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------------------
# Many GPUs

NODES = many_gpus.Network(gpus_per_node=8, in_node=100e9, between_nodes=10e9, latency=0.0)


def sizes(model):
    """Numbers of parameters: trainable, of the blocks, outside of them."""
    blocks = sum(p.numel() for p in model.blocks.parameters())
    return trainable(model), blocks, sum(p.numel() for p in model.parameters()) - blocks


@pytest.mark.parametrize("gpus", [1, 2, 8, 64])
def test_exchanged_bytes_are_those_of_the_collective_operations(gpus):
    model = build("DiT-S/2")
    (learned, blocks, rest), others = sizes(model), (gpus - 1) / gpus

    def sent(precision, shard, gpus_per_node=8):
        return sum(many_gpus.Step(model, 1, precision, shard).exchanged(gpus, gpus_per_node).values())

    for precision, width in (("fp32", 4), ("bf16", 2)):
        assert sent(precision, None) == pytest.approx(2 * others * 4 * learned), "a ring all-reduce of float32 gradients"
        gathered = 2 * width * blocks + 4 * rest  # what is outside of the blocks is gathered once, in float32
        assert sent(precision, "all") == pytest.approx(others * (gathered + 4 * learned)), "and one reduce-scatter"
    assert sent("fp32", "node", gpus_per_node=gpus) == pytest.approx(sent("fp32", "all")), "there is one node"
    assert sent("fp32", "node", gpus_per_node=1) == pytest.approx(sent("fp32", None)), "each has a copy"
    in_node, copies = min(8, gpus), max(1, gpus // 8)
    hybrid = (in_node - 1) / in_node * (2 * 4 * blocks + 4 * rest + 4 * learned)
    hybrid += 2 * (copies - 1) / copies * 4 * learned / in_node
    assert sent("fp32", "node") == pytest.approx(hybrid), "in the node, then each part with the same of other nodes"


def test_each_gpu_holds_its_part_of_the_state():
    model = build("DiT-S/2")
    (learned, blocks, rest), fixed = sizes(model), model.pos_embed.numel()
    alone = training_memory(model, 4, "bf16")
    assert many_gpus.Step(model, 4, "bf16").memory(64) == alone, "DDP keeps a copy on each"
    assert many_gpus.Step(model, 4, "bf16", "all").memory(1) == alone, "there is nobody to share with"
    parts = many_gpus.Step(model, 4, "bf16", "all").memory(64)
    state = sum(parts[name] for name in ("weights", "ema", "gradients", "optimizer"))
    assert state == pytest.approx((20 * learned + 8 * fixed) / 64, abs=4), "4 + 4 + 4 + 8 bytes of each parameter"
    assert parts["total"] == sum(parts.values()) - parts["total"]
    block = blocks / 12
    assert parts["gathered weights and gradients"] == 2 * 2 * block + 4 * rest + 4 * block
    step = many_gpus.Step(model, 4, "bf16", "node")
    assert [step.num_shards(gpus, 8) for gpus in (1, 4, 8, 64)] == [1, 4, 8, 8]


def test_gathered_weights_leave_no_copies_for_the_backward_pass():
    model = build("DiT-S/2")
    kept = [many_gpus.Step(model, n, "bf16", "all").memory(8)["activations"] for n in (8, 16)]
    assert kept[1] == pytest.approx(2 * kept[0], rel=1e-2), "little is kept that does not grow with the batch"
    with_copies = [activation_bytes(model, n, "bf16") for n in (8, 16)]
    copies = 2 * 12 * 18 * 384 * 384  # a block has 4 D^2 weights in the attention, 8 in the MLP, 6 in the modulation
    assert with_copies[0] - kept[0] == with_copies[1] - kept[1] == copies
    assert activation_bytes(model, 8, "fp32") == many_gpus.Step(model, 8, "fp32", "all").memory(8)["activations"]


def test_a_ring_is_as_fast_as_its_slowest_connection():
    assert NODES.ring_seconds(8e9, 1, passes=2) == 0
    assert NODES.ring_seconds(8e9, 8, passes=2) == pytest.approx(2 * 7 / 8 * 8e9 / 100e9), "within the node"
    assert NODES.ring_seconds(8e9, 64, passes=1) == pytest.approx(63 / 64 * 8e9 / 80e9), "eight adapters of 10 GB/s"
    fast = many_gpus.Network(8, 100e9, 50e9, 1e-3)
    assert fast.ring_seconds(8e9, 64, passes=1) == pytest.approx(63 / 64 * 8e9 / 100e9 + 7e-3), "and seven hops"
    assert fast.ring_seconds(8e9, 64, passes=2, collectives=3) == pytest.approx(2 * 63 / 64 * 8e9 / 100e9 + 3 * 6e-3)


@pytest.mark.parametrize("shard", [None, "all", "node"])
def test_what_is_exchanged_overlaps_with_the_pass_that_it_belongs_to(shard):
    step = many_gpus.Step(build("DiT-S/2"), 4, "fp32", shard)
    computing = 6 * forward_macs(step.model) * 4 / 1e12
    instant = many_gpus.Network(8, 1e30, 1e30, 0.0)
    for gpus, network in ((1, NODES), (64, instant)):
        row = step.estimate(network, gpus, 1e12)
        assert row["step_seconds"] == pytest.approx(computing)
        assert row["scaling"] == pytest.approx(1)
        assert row["images_per_second"] == pytest.approx(4 * gpus / computing)
    slow = many_gpus.Network(8, 1e3, 1e3, 0.0)  # the exchange takes so long that only it counts
    row = step.estimate(slow, 8, 1e12)
    sent = sum(row["exchanged_bytes"].values()) / 1e3
    assert sent + computing / 3 < row["step_seconds"] < 1.2 * sent, "the first and the last parts overlap with nothing"


def test_estimates_as_text_and_json(run):
    options = ["--model", "DiT-S/8", "--precision", "bf16", "--gpus", 16, "--shard", "--batch-size", 4]
    status, out, _ = run(*options, "--json")
    report = json.loads(out)["many_gpus"]
    assert status == 0
    assert [row["gpus"] for row in report["estimates"]] == [1, 8, 16, 64, 256, 1024]
    assert (report["peak_tflops_of_each"], report["utilization"]) == (989, 0.4)
    times = [row["step_seconds"] for row in report["estimates"]]
    assert times == sorted(times)
    status, out, _ = run(*options, "--peak-tflops", 1600, "--utilization", 0.5)
    assert status == 0
    assert "on 16 GPUs, 8 in a node, divided among all, batch 4 on each" in out
    assert "estimate, at 50% of 100 TFLOP/s, 360 GB/s in a node, 40 GB/s and 5 us between nodes" in out
    assert [int(line.split()[0]) for line in out.splitlines()[-6:]] == [1, 8, 16, 64, 256, 1024]
