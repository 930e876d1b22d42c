"""models.py against the reference's numbers, the paper's tables and closed forms."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import SMALL, assert_golden, fill, filled, golden, normal

import models
from models import (
    BLOCKS,
    SIZES,
    CrossAttention,
    DiT,
    DiT_models,
    DiTBlock,
    DiTConfig,
    FinalLayer,
    LabelEmbedder,
    SpaceTimeBlock,
    TimestepEmbedder,
    get_2d_sincos_pos_embed,
    modulate,
    position_embedding,
)

# Trainable and frozen parameters, 1000 classes, 256 px
PARAMETERS = {
    **{"S/2": 32_963_360, "S/4": 32_945_024, "S/8": 33_148_160},
    **{"B/2": 130_512_416, "B/4": 130_475_648, "B/8": 130_881_536},
    **{"L/2": 458_102_816, "L/4": 458_053_760, "L/8": 458_594_816},
    **{"XL/2": 675_129_632, "XL/4": 675_074_432, "XL/8": 675_683_072},
}


def golden_models():
    names = [key.removesuffix(":forward") for key in golden("models") if key.endswith(":forward")]
    return [pytest.param(n, marks=pytest.mark.slow) if "XL" in n or "B" in n else n for n in names]


@pytest.mark.parametrize("name", golden_models())
@torch.no_grad()
def test_forward_and_guidance_match_the_reference(name):
    data = golden("models")
    model_name, size = name.split("@")
    size = int(size)
    model = filled(DiT_models[model_name], input_size=size)
    tol = 2e-4 if "XL" in name else 1e-5
    x, n = normal("x", 2, 4, size, size), 1 if "XL" in name else 2  # images; guidance does not know the model's size
    out = model(x[:n], torch.tensor([17, 803])[:n], torch.tensor([207, 1000])[:n])
    assert_golden(out[:, :, ::4, ::4], data[f"{name}:forward"][:n], f"{name} forward", tol)
    if n == 2:
        y = torch.tensor([207, 360, 1000, 1000])
        out = model.forward_with_cfg(torch.cat([x, x]), torch.full((4,), 500), y, 4.0)
        assert_golden(out[:, :, ::4, ::4], data[f"{name}:cfg4"], f"{name} forward_with_cfg", tol)
    assert sum(p.numel() for p in model.parameters()) == data[f"{name}:params"]
    keys = [f"{key} {tuple(tensor.shape)}" for key, tensor in model.state_dict().items()]
    assert keys == list(data[f"{name}:keys"]), "the state dict's keys are what lets released checkpoints load"
    assert_golden(model.pos_embed[0, ::7, ::5], data[f"{name}:pos_embed"], f"{name} pos_embed")


@torch.no_grad()
def test_small_model_matches_the_reference():
    data, model = golden("small"), fill(DiT(**SMALL))
    x, t, y = normal("small", 6, 4, 8, 8), torch.tensor([0, 1, 10, 500, 998, 999]), torch.tensor([0, 1, 2, 3, 4, 10])
    assert_golden(model(x, t, y), data["forward"], "forward")
    assert_golden(model.forward_with_cfg(x, t, y, 1.5), data["cfg"], "forward_with_cfg")


def test_initialisation_from_a_seed_matches_the_reference():
    data = golden("init")
    for name, seed in sorted({tuple(key.split(":")[:2]) for key in data}):
        torch.manual_seed(int(seed))
        for key, tensor in DiT_models[name]().state_dict().items():
            v = tensor.double().flatten()
            statistics = torch.stack([v.sum(), (v**2).sum(), v[0], v[-1]])
            expected = data[f"{name}:{seed}:{key}"]
            # a sum of millions of draws cancels: its rounding is judged by the tensor's size, not by the sum
            scale = max(np.abs(expected).max(), 1.0)
            error = np.abs(statistics.numpy() - expected).max() / scale
            assert error <= 1e-5, f"{name} seed {seed}: {key} is not drawn as the reference draws it ({error:.1e})"


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_papers(name):
    with torch.device("meta"):
        model = DiT_models[f"DiT-{name}"]()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    depth, width, heads = SIZES[name.split("/")[0]]
    assert (len(model.blocks), model.pos_embed.shape[-1], model.blocks[0].attn.num_heads) == (depth, width, heads)


def test_every_model_of_the_table_can_be_imported_by_its_name():
    for name, constructor in DiT_models.items():
        assert getattr(models, name.replace("-", "_").replace("/", "_")) is constructor


def test_config_holds_every_argument_and_builds_the_same_model():
    model = DiT(**SMALL, block="adaln", learn_sigma=False)
    assert list(model.config) == [field.name for field in dataclasses.fields(DiTConfig)]
    assert model.config == {**DiT(**SMALL).config, "block": "adaln", "learn_sigma": False}
    with torch.device("meta"):
        copy = DiT(**model.config)
    assert copy.config == model.config
    assert [(k, v.shape) for k, v in copy.state_dict().items()] == [(k, v.shape) for k, v in model.state_dict().items()]


@pytest.mark.parametrize("in_channels", [1, 3, 4, 8, 16])
def test_three_of_four_channels_are_guided_and_all_of_any_other_number_or_objective(in_channels):
    with torch.device("meta"):
        model = DiT(**{**SMALL, "in_channels": in_channels, "depth": 1})
        flow = DiT(**{**SMALL, "in_channels": in_channels, "depth": 1}, objective="flow", predict="v")
    assert model.guided_channels == (3 if in_channels == 4 else in_channels)
    assert flow.guided_channels == in_channels, "the published numbers are those of the paper's objective"


@pytest.mark.parametrize("assign", [True, False])
@torch.no_grad()
def test_model_built_on_the_meta_device_and_loaded_computes_the_same(assign):
    model = fill(DiT(**SMALL))
    with torch.device("meta"):
        loaded = DiT(**SMALL).eval()
    if not assign:
        loaded.to_empty(device="cpu")
    loaded.load_state_dict(model.state_dict(), assign=assign)
    args = normal("x", 2, 4, 8, 8), torch.tensor([17, 803]), torch.tensor([1, 10])
    assert torch.equal(loaded(*args), model(*args))


@torch.no_grad()
def test_timestep_embedding_is_the_sinusoid_at_every_timestep():
    embedder, t = DiT(**SMALL).t_embedder, torch.tensor([0.0, 1.0, 250.5, 999.0])
    seen = []
    embedder.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    embedder(t)
    angles = t.double()[:, None] * 10000.0 ** (-torch.arange(128).double() / 128)
    torch.testing.assert_close(seen[0].double(), torch.cat([angles.cos(), angles.sin()], dim=1), rtol=0, atol=2e-4)


def test_new_adaln_zero_block_is_the_identity():
    model = DiT(**SMALL)
    x, c = torch.randn(2, 16, 96), torch.randn(2, 96)
    for block in model.blocks:
        assert torch.equal(block(x, c), x), "adaLN-Zero gates must start at zero"
    assert isinstance(model.blocks[0], DiTBlock)


@pytest.mark.parametrize("block", BLOCKS)
def test_every_design_answers_to_timestep_and_class_after_a_step(block):
    torch.manual_seed(0)
    model = DiT(**SMALL, block=block, class_dropout_prob=0.0)
    x, target = torch.randn(4, 4, 8, 8), torch.randn(4, 8, 8, 8)
    t, y = torch.tensor([1, 300, 600, 900]), torch.arange(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    assert not model(x, t, y).any(), "the output layer starts at zero"
    for _ in range(2):  # the first step moves the output layer alone
        optimizer.zero_grad()
        F.mse_loss(model(x, t, y), target).backward()
        optimizer.step()
    model.eval()
    out = model(x, t, y)
    assert (out - model(x, t.flip(0), y)).abs().amax() > 1e-4, f"{block} ignores t"
    assert (out - model(x, t, y.flip(0))).abs().amax() > 1e-4, f"{block} ignores y"


def test_in_context_tokens_carry_no_position_and_are_removed():
    model = fill(DiT(**SMALL, block="in-context"))
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.final_layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x, t, y = normal("c", 2, 4, 8, 8), torch.tensor([3, 800]), torch.tensor([1, 10])
    model(x, t, y)
    tokens, final = seen
    assert tokens.shape == (2, 16 + 2, 96)
    assert torch.equal(tokens[:, 16], model.t_embedder(t)), "t_emb must enter as it is, without a position"
    assert torch.equal(tokens[:, 17], model.y_embedder(y)), "y_emb must enter as it is, without a position"
    assert final.shape == (2, 16, 96), "the decoder must see the image's tokens alone"


def test_cross_attention_matches_the_softmax_formula_over_two_tokens():
    attention = CrossAttention(24, num_heads=3).double()
    x, c = torch.randn(2, 5, 24).double(), torch.randn(2, 2, 24).double()
    out = torch.zeros(2, 5, 24).double()
    q, (k, v) = attention.q(x), attention.kv(c).chunk(2, dim=-1)
    for head in range(3):
        part = slice(8 * head, 8 * head + 8)
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / 8**0.5).softmax(-1)
        assert weights.shape == (2, 5, 2)
        out[..., part] = weights @ v[..., part]
    torch.testing.assert_close(attention(x, c), attention.proj(out), rtol=1e-10, atol=1e-12)


def test_cross_attention_blocks_get_exactly_the_two_embeddings():
    model = fill(DiT(**SMALL, block="cross-attention"))
    seen = []
    for block in model.blocks:
        block.cross_attn.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    t, y = torch.tensor([3]), torch.tensor([1])
    model(normal("c", 1, 4, 8, 8), t, y)
    expected = torch.stack([model.t_embedder(t), model.y_embedder(y)], dim=1)
    assert len(seen) == 3
    assert all(torch.equal(c, expected) for c in seen)


def test_label_dropout_is_for_training_and_has_its_rate():
    model = DiT(**SMALL, class_dropout_prob=0.3)
    table = model.y_embedder.embedding_table
    y = torch.zeros(20_000, dtype=torch.int64)
    torch.manual_seed(0)
    null = (model.y_embedder(y) == table.weight[10]).all(1).double().mean()
    assert abs(null - 0.3) < 0.015  # 4.6 standard deviations
    assert torch.equal(model.eval().y_embedder(y), table(y))


def test_label_table_has_a_null_row_only_where_it_is_needed():
    assert DiT(**SMALL, class_dropout_prob=0.0).y_embedder.embedding_table.num_embeddings == 10
    assert DiT(**SMALL, class_dropout_prob=0.1).y_embedder.embedding_table.num_embeddings == 11
    unconditional = DiT(**{**SMALL, "num_classes": 0}, class_dropout_prob=0.0)
    assert unconditional.y_embedder.embedding_table.num_embeddings == 1
    assert unconditional.null_class == 0


def test_unpatchify_puts_every_value_where_the_patch_convolution_read_it():
    """A token's values run row in patch, column in patch, channel."""
    model = DiT(input_size=6, patch_size=2, in_channels=3, hidden_size=8, depth=1, num_heads=1, learn_sigma=False)
    image = torch.arange(3 * 36.0).view(1, 3, 6, 6)
    tokens = torch.empty(1, 9, 12)
    for token in range(9):
        row, column = divmod(token, 3)
        for i in range(2):
            for j in range(2):
                for channel in range(3):
                    value = image[0, channel, 2 * row + i, 2 * column + j]
                    tokens[0, token, (i * 2 + j) * 3 + channel] = value
    assert torch.equal(model.unpatchify(tokens), image)


def test_names_that_forks_import_have_the_original_releases_meaning():
    x, shift, scale = torch.randn(4, 4, 8), torch.randn(4, 8), torch.randn(4, 8)  # as many samples as tokens
    expected = torch.stack([x[i] * (1 + scale[i]) + shift[i] for i in range(4)])
    torch.testing.assert_close(modulate(x, shift, scale), expected)
    torch.testing.assert_close(modulate(x, shift[:, None], scale[:, None]), expected)
    c = torch.randn(4, 8)
    assert DiTBlock(8, 2, mlp_ratio=2.0)(x, c).shape == x.shape
    assert FinalLayer(8, 2, 3)(x, c).shape == (4, 4, 12)
    embedding = TimestepEmbedder.timestep_embedding(torch.tensor([0.0, 7.0]), 5)
    assert torch.equal(embedding[0], torch.tensor([1.0, 1, 0, 0, 0]))
    assert TimestepEmbedder(8, frequency_embedding_size=64)(torch.tensor([3])).shape == (1, 8)
    labels, embedder = torch.tensor([1, 2, 3, 0]), LabelEmbedder(4, 8, dropout_prob=0.5)
    assert (embedder.num_classes, embedder.dropout_prob) == (4, 0.5)
    forced = torch.tensor([1, 0, 1, 0])
    assert embedder.token_drop(labels, forced).tolist() == [4, 2, 4, 0]
    assert torch.equal(embedder(labels, False), embedder.embedding_table(labels))
    assert torch.equal(embedder(labels, True, forced), embedder.embedding_table(torch.tensor([4, 2, 4, 0])))
    grid = get_2d_sincos_pos_embed(8, 3, cls_token=True, extra_tokens=2)
    assert grid.shape == (11, 8)
    assert not grid[:2].any()
    np.testing.assert_array_equal(grid[2:], position_embedding(8, 3).numpy())
    model = DiT(**SMALL)
    assert model.num_heads == SMALL["num_heads"]
    larger = DiT(**{**SMALL, "input_size": 12})
    model.pos_embed = larger.pos_embed  # as forks do for another resolution
    assert model(torch.zeros(1, 4, 12, 12), torch.zeros(1), torch.tensor([1])).shape == (1, 8, 12, 12)


def test_guidance_in_the_original_releases_form_takes_a_forward_that_returns_more():
    class Fork(DiT):
        def forward(self, x, t, y):
            return super().forward(x, t, y), y

    model, fork = fill(DiT(**SMALL)), Fork(**SMALL)
    fork.load_state_dict(model.state_dict())
    inputs = normal("x", 4, 4, 8, 8), torch.arange(4), torch.tensor([1, 2, 5, 5]), 1.5
    assert torch.equal(fork.eval().forward_with_cfg(*inputs), model.eval().forward_with_cfg(*inputs))


@pytest.mark.filterwarnings("ignore")  # PyTorch calls the older ways deprecated; they are used
def test_the_model_can_be_exported_traced_and_quantized():
    model = fill(DiT(**{**SMALL, "depth": 1}))

    def arguments(number):
        return normal("x", number, 4, 8, 8), torch.arange(number) * 100, torch.arange(number)

    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model, arguments(4), dynamic_shapes=({0: batch},) * 3).module()
    traced = torch.jit.trace(model, arguments(4))
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
    for number in (2, 6):
        expected = model(*arguments(number))
        torch.testing.assert_close(exported(*arguments(number)), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(traced(*arguments(number)), expected, rtol=1e-5, atol=1e-5)
        assert (quantized(*arguments(number)) - expected).abs().max() < 0.2 * expected.abs().max()


@pytest.mark.parametrize("sizes", [
    {"input_size": (4, 6), "patch_size": 2}, {"input_size": (8,), "patch_size": (2,)},
    {"input_size": (2, 4, 6), "patch_size": (1, 2, 2)}, {"input_size": (4, 6), "patch_size": (2, 3), "block": "in-context"},
])  # fmt: skip
def test_grids_of_one_to_three_sides_put_every_value_back_in_its_place(sizes):
    model = DiT(**{**SMALL, **sizes}, learn_sigma=False)
    shape = model.sizes.sides
    x = torch.arange(4.0 * np.prod(shape)).view(1, 4, *shape)
    # the patch convolution that copies its patch, in unpatchify's order: cells of the patch, then channels
    values = int(np.prod(model.sizes.patch)) * 4
    weight = torch.eye(values).view(values, *model.sizes.patch, 4).movedim(-1, 1)
    convolution = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(shape)]
    tokens = convolution(x, weight, stride=model.sizes.patch).flatten(2).transpose(1, 2)
    assert torch.equal(model.unpatchify(tokens), x)
    assert model(x, torch.tensor([3]), torch.tensor([1])).shape == (1, 4, *shape)
    fill(model)  # after which the times have positions too
    places = model.pos_embed[0]
    if len(shape) == 3:
        times = position_embedding(model.hidden_size, (model.sizes.grid[0],)).float()
        places = places + model.time_embed(times).repeat_interleave(len(places) // len(times), dim=0)
    assert len(places.unique(dim=0)) == len(places) == np.prod(model.sizes.grid), "every token has a position of its own"


@pytest.mark.parametrize("block", ["adaln-zero", "space-time"])
def test_a_clip_of_one_frame_is_its_picture(block):
    """Same weights, same numbers: the patch convolution has one side more, and the time layer starts at zero."""
    picture = fill(DiT(**SMALL))
    clip = DiT(**{**SMALL, "block": block, "input_size": (1, 8, 8), "patch_size": (1, 2, 2)})
    weights = picture.state_dict()
    weights["x_embedder.proj.weight"] = weights["x_embedder.proj.weight"][:, :, None]
    rows = clip.state_dict()  # the gates of the attention over time are zero at first
    for name in [name for name in weights if name.startswith("blocks.") and "adaLN" in name]:
        rows[name][: len(weights[name])] = weights[name]
        weights[name] = rows[name]
    clip.load_state_dict({**rows, **weights})
    clip.eval()
    x, t, y = normal("x", 2, 4, 8, 8), torch.tensor([3, 800]), torch.tensor([1, 10])
    torch.testing.assert_close(clip(x[:, :, None], t, y)[:, :, 0], picture(x, t, y), rtol=1e-6, atol=1e-6)


def test_the_space_time_block_is_two_attentions_within_frames_and_over_time():
    """Against attention over all tokens with a mask: of the same frame, then of the same place."""
    torch.manual_seed(0)
    frames, tokens, width = 3, 4, 12
    block, whole = SpaceTimeBlock(width, 2).double(), DiTBlock(width, 2).double()
    block.adaLN_modulation[1].weight.data.normal_()
    x, c = torch.randn(2, frames * tokens, width).double(), torch.randn(2, width).double()
    shift1, scale1, gate1, shift2, scale2, gate2, shift3, scale3, gate3 = block.adaLN_modulation(c).chunk(9, dim=-1)
    frame, place = torch.arange(frames * tokens) // tokens, torch.arange(frames * tokens) % tokens
    expected = x
    parts = [(block.attn, shift1, scale1, gate1, frame), (block.attn_time, shift3, scale3, gate3, place)]
    for attention, shift, scale, gate, group in parts:
        h = modulate(whole.norm1(expected), shift, scale)
        h = attention(h, attn_mask=group[:, None] == group[None, :])
        expected = expected + gate[:, None] * h
    expected = expected + gate2[:, None] * block.mlp(modulate(whole.norm2(expected), shift2, scale2))
    torch.testing.assert_close(block(x, c, frames), expected)


def test_a_token_of_a_space_time_block_attends_to_its_frame_and_over_time_alone():
    sizes = {**SMALL, "patch_size": (1, 2, 2), "block": "space-time"}
    few, more = (DiT(**{**sizes, "input_size": (frames, 8, 8)}) for frames in (4, 8))
    x = torch.zeros(1, 4, 4, 8, 8)
    seen = []

    def attend(q, k, v, **_):
        seen.append(q.shape[0] * q.shape[-2] * k.shape[-2])
        return v

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attend)
        few(x, torch.zeros(1), torch.tensor([0]))
        pairs = sum(seen)
        seen.clear()
        more(torch.cat([x, x], dim=2), torch.zeros(1), torch.tensor([0]))
    within, over_time = 4 * 16 * 16, 16 * 4 * 4
    assert pairs == SMALL["depth"] * (within + over_time)
    assert sum(seen) == SMALL["depth"] * (2 * within + 4 * over_time)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            (torch.zeros(2, 4, 9, 8), torch.zeros(2), torch.zeros(2).long()),
            r"x is .* \(2, 4, 9, 8\), must be float \(N, 4, 8, 8\)",
        ),
        ((torch.zeros(2, 3, 8, 8), torch.zeros(2), torch.zeros(2).long()), r"must be float \(N, 4, 8, 8\)"),
        ((torch.zeros(2, 4, 8, 8).byte(), torch.zeros(2), torch.zeros(2).long()), "torch.uint8"),
        ((torch.zeros(2, 4, 8, 8), torch.zeros(3), torch.zeros(2).long()), r"t is a Tensor of shape \(3,\)"),
        ((torch.zeros(2, 4, 8, 8), torch.zeros(2), torch.zeros(1).long()), r"y is a Tensor of shape \(1,\)"),
        ((torch.zeros(2, 4, 8, 8), torch.zeros(2), [1, 2]), "y is a list"),
        ((torch.zeros(2, 4, 8, 8), torch.zeros(2), torch.tensor([1, 11])), "labels 1 to 11: they must be 0 to 10"),
        ((torch.zeros(2, 4, 8, 8), torch.zeros(2), torch.tensor([-1, 3])), "must be 0 to 10"),
        ((torch.zeros(2, 4, 8, 8), torch.zeros(2), torch.zeros(2)), r"float weights of classes are \(N, 11\)"),
    ],
)
def test_what_forward_does_not_take_is_said_in_a_sentence(arguments, words):
    with pytest.raises(ValueError, match=words):
        DiT(**SMALL).eval()(*arguments)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"num_heads": 5}, "number of heads 5"),
        ({"num_heads": 0}, "num_heads 0 is no int from 1 to"),
        ({"input_size": []}, r"input size \[\] and patch size 2 do not have 1 to 3 sides each"),
        ({"input_size": (8, 8), "patch_size": (2,)}, "sides each"),
        ({"patch_size": 3}, "patch size 3"),
        ({"hidden_size": 90, "num_heads": 5}, "multiple of 4"),
        ({"mlp_ratio": 0.001}, "MLP ratio 0.001"),
        ({"block": "adaln-one"}, "adaln-zero, adaln, cross-attention, in-context"),
        (
            {"rope": True, "num_heads": 12, "input_size": (2, 8, 8), "patch_size": (1, 2, 2)},
            "whose width is a multiple of 6",
        ),
    ],
)
def test_impossible_sizes_are_refused_with_the_reason(wrong, words):
    with pytest.raises(ValueError, match=words):
        DiT(**{**SMALL, **wrong})
