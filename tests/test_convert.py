"""convert.py and the formats that it reads and writes: exact in both directions, the same images, one line for bad input.

What docs/interchange.md says of diffusers' DiT is tested here too, so that a new version that differs is noticed.
"""

import json
import os
import resource
import shutil
import signal

import pytest
import torch
from helpers import call
from reference import fill, filled
from safetensors.torch import load_file, save_file

import sample
import sample_ddp
from checkpoint import diffusers_folder, files
from checkpoint.opened import Checkpoint
from diffusion.samplers import last
from models import BLOCKS, DiT, DiT_models
from sampling.config import GuidanceConfig, SamplerConfig, SourceConfig
from sampling.pipeline import Pipeline
from tools import convert, likelihood

TINY = {"input_size": 4, "hidden_size": 32, "depth": 3, "num_heads": 2, "num_classes": 3}
UNCONDITIONAL = {"in_channels": 3, "num_classes": 0, "names": []}
NAMES = ["ant", "honey bee, bee", "猫"]


def model_file(path, vae="none", image_size=None, names=NAMES, **changes):
    """A checkpoint of random weights as train.py writes it, whose EMA differs from the model."""
    model = fill(DiT(**{**TINY, **changes}))
    ema = {name: value if name == "pos_embed" else 0.5 * value for name, value in model.state_dict().items()}
    args = {"vae": vae, "image_size": image_size or model.input_size}
    state = {"model": model.state_dict(), "ema": ema, "args": args, "model_config": model.config, "class_names": names}
    files.save(path, {**state, "step": 7})
    return path


@pytest.fixture
def ckpt(tmp_path):
    """A model of grey pixels."""
    return model_file(tmp_path / "0000007.pt", in_channels=1)


@pytest.fixture
def folder(ckpt, tmp_path):
    assert call(convert.main, ckpt, tmp_path / "dit") == 0
    return tmp_path / "dit"


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert torch.equal(tensor, b[name]), name


def listing(folder):
    """Every file below a folder with its bytes."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ----------------------------------------------------------------------------------------------------------------------
# Exact in both directions


def test_values_are_equal_bit_for_bit_after_every_conversion(tmp_path):
    model = filled(DiT_models["DiT-S/4"], input_size=16, num_classes=10)
    torch.save(model.state_dict(), tmp_path / "start.pt")
    chain = ["start.pt", "a.safetensors", "folder", "b.safetensors", "end.pt"]
    for source, target in zip(chain, chain[1:], strict=False):
        assert call(convert.main, tmp_path / source, tmp_path / target, "--vae", "none") == 0
        opened = Checkpoint.open(tmp_path / target)
        assert_equal(opened.weights, model.state_dict())
        assert opened.model_config == model.config
        shutil.rmtree(tmp_path / source) if source == "folder" else os.remove(tmp_path / source)
    end = torch.load(tmp_path / "end.pt", weights_only=True)
    DiT_models["DiT-S/4"](input_size=16, num_classes=10).load_state_dict(end)  # as scripts for the original release do


@pytest.mark.parametrize("name", DiT_models)
def test_keys_and_shapes_of_all_models_are_those_of_diffusers(name, monkeypatch):
    from diffusers import DiTTransformer2DModel

    monkeypatch.setattr(torch, "equal", lambda a, b: a.shape == b.shape)  # tensors without values cannot be compared
    with torch.device("meta"):
        model = DiT_models[name]()
    state = model.state_dict()
    checkpoint = Checkpoint({**state, "pos_embed": diffusers_folder.fixed_positions(model.config)})
    config = diffusers_folder.transformer_config(checkpoint)
    tensors = diffusers_folder.to_diffusers(state, len(model.blocks))
    with torch.device("meta"):
        expected = DiTTransformer2DModel(**config).state_dict()
    assert {key: tensor.shape for key, tensor in tensors.items()} == {k: v.shape for k, v in expected.items()}
    back = diffusers_folder.from_diffusers(tensors, model.config)
    assert {key: tensor.shape for key, tensor in back.items()} == {k: v.shape for k, v in state.items()}


def test_the_record_goes_along(ckpt, folder, tmp_path):
    assert call(convert.main, folder, tmp_path / "w.safetensors") == 0
    start, weights = Checkpoint.open(ckpt), Checkpoint.open(ckpt).state["ema"]
    for where in (folder, folder / "transformer", tmp_path / "w.safetensors"):
        opened = Checkpoint.open(where)
        for name in ("model_config", "class_names", "vae", "image_size"):
            assert getattr(opened, name) == getattr(start, name), (where, name)
        assert_equal(opened.weights, weights)
        assert len(opened.checksum) == 8


def test_rounded_weights_are_half_as_large_and_draw_nearly_the_same(tmp_path):
    ckpt = model_file(tmp_path / "a.pt", in_channels=1, learn_sigma=False, hidden_size=64)
    half, full = tmp_path / "half.safetensors", tmp_path / "full.safetensors"
    assert call(convert.main, ckpt, full) == call(convert.main, ckpt, half, "--dtype", "bfloat16") == 0
    assert os.path.getsize(half) < 0.56 * os.path.getsize(full)
    weights, exact = Checkpoint.open(half).weights, Checkpoint.open(full).weights
    assert torch.equal(weights["pos_embed"], exact["pos_embed"])
    assert all(torch.equal(w, exact[name].bfloat16()) for name, w in weights.items() if name != "pos_embed")
    inputs = torch.randn(2, 1, 4, 4), torch.tensor([5.0, 900.0]), torch.tensor([0, 3])
    outputs = [Checkpoint.open(path).build_model()(*inputs) for path in (half, full)]
    assert outputs[0].dtype == torch.float32, "it computes in full"
    torch.testing.assert_close(*outputs, rtol=0, atol=0.05)
    assert not torch.equal(*outputs)


def test_a_file_says_how_to_draw_and_options_win(ckpt, tmp_path, capsys):
    file, options = tmp_path / "a.safetensors", ("--cfg-scale", 2, "--num-sampling-steps", 3)
    words = "--labels 2 0 --samples-per-label 3 --columns 3 --enlarge 2 --cfg-scale 2 --num-sampling-steps 3"
    assert call(convert.main, ckpt, file, "--drawing", words) == 0
    assert call(convert.main, file, tmp_path / "copy.safetensors", "--dtype", "float32") == 0

    def drawn(*words):
        assert call(sample.main, *words, "--output", tmp_path / "a.png") == 0
        return (tmp_path / "a.png").read_bytes()

    layout = ("--labels", 2, 0, "--samples-per-label", 3, "--columns", 3, "--enlarge", 2)
    by_hand = drawn("--ckpt", ckpt, *layout, *options)
    assert drawn("--ckpt", file) == drawn("--ckpt", tmp_path / "copy.safetensors") == by_hand
    other = ("--labels", 1, "--columns", 2, "--cfg-scale", 1)
    assert drawn("--ckpt", file, *other) == drawn("--ckpt", ckpt, *layout, *options, *other)
    assert drawn("--ckpt", file, "--interpolate", "classes")
    capsys.readouterr()
    assert call(convert.main, ckpt, tmp_path / "b.safetensors", "--drawing", "--cfg-scale 2 --seed 3") == 2
    assert "--drawing --cfg-scale 2 --seed 3: --seed cannot be recorded; leave it out" in capsys.readouterr().err
    assert call(convert.main, ckpt, tmp_path / "folder", "--drawing", "--cfg-scale 2") == 2
    assert "--drawing: does not go with TARGET" in capsys.readouterr().err


def test_a_file_cannot_name_other_files_or_break_a_command(ckpt, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for drawing, error in (
        ('{"output": "mine.png", "vae": "theirs"}', None),
        ('{"cfg_scale": "large"}', "a.safetensors: its record of the drawing: 'large' is not a number"),
        ("[1]", "a.safetensors: damaged: its drawing is [1], not of type dict"),
    ):
        assert call(convert.main, ckpt, "a.safetensors", "--overwrite") == 0
        config = json.dumps(Checkpoint.open(ckpt).model_config)
        record = {"model_config": config, "vae": '"none"', "image_size": "4", "drawing": drawing}
        save_file(load_file("a.safetensors"), "a.safetensors", record)
        assert call(sample.main, "--ckpt", "a.safetensors", "--num-sampling-steps", 2) == (2 if error else 0)
        assert not os.path.exists("mine.png")
        assert not error or error in capsys.readouterr().err


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("change", [{"mlp_ratio": 2.0}, {"class_dropout_prob": 0.0}, {"learn_sigma": False}])
def test_safetensors_hold_every_model(tmp_path, block, change):
    ckpt = model_file(tmp_path / "a.pt", block=block, **change)
    assert call(convert.main, ckpt, tmp_path / "a.safetensors") == 0
    opened = Checkpoint.open(tmp_path / "a.safetensors")
    assert opened.model_config == Checkpoint.open(ckpt).model_config
    assert_equal(opened.weights, Checkpoint.open(ckpt).weights)
    opened.build_model()


def test_the_autoencoder_goes_into_the_folder_and_its_name_stays(tmp_path, small_vae):
    ckpt = model_file(tmp_path / "a.pt", vae="ema", image_size=32)
    assert call(convert.main, ckpt, tmp_path / "dit", "--vae", small_vae) == 0
    opened = Checkpoint.open(tmp_path / "dit")
    assert (opened.vae, opened.image_size) == (str(tmp_path / "dit/vae"), 32)
    assert_equal(*(load_file(path / "diffusion_pytorch_model.safetensors") for path in (small_vae, tmp_path / "dit/vae")))
    assert call(convert.main, tmp_path / "dit", tmp_path / "b.safetensors") == 0
    assert Checkpoint.open(tmp_path / "b.safetensors").vae == str(small_vae), "--vae replaces the record"
    assert call(convert.main, ckpt, tmp_path / "without", "--vae", "none") == 0
    assert not (tmp_path / "without/vae").exists()
    assert Checkpoint.open(tmp_path / "without").vae == "ema"


@pytest.mark.parametrize("form", ["bin", "shards", "fp16"])
def test_folders_that_others_wrote_are_read(folder, tmp_path, form):
    """Old uploads are pickles, large ones are split; neither has our record."""
    from diffusers import DiTTransformer2DModel

    weights = Checkpoint.open(folder).weights
    model = DiTTransformer2DModel.from_pretrained(folder / "transformer")
    out = tmp_path / "others"
    if form == "fp16":
        model.half()
        weights = {name: value if name == "pos_embed" else value.half() for name, value in weights.items()}
    options = {"bin": {"safe_serialization": False}, "shards": {"max_shard_size": "100KB"}, "fp16": {}}[form]
    model.save_pretrained(out, **options)
    assert len(list(out.glob("*.safetensors"))) == {"bin": 0, "fp16": 1}.get(
        form, len(list(out.glob("*-of-*.safetensors")))
    )
    opened = Checkpoint.open(out)
    assert_equal(opened.weights, weights)
    opened.build_model()
    assert (opened.class_names, opened.vae, opened.model_config["num_classes"]) == (None, None, 3)


def test_all_files_of_a_folder_have_the_same_permissions(folder):
    assert len({path.stat().st_mode for path in folder.rglob("*") if path.is_file()}) == 1


def test_a_name_on_the_hub_is_fetched_once_it_is_no_folder(folder, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, allow_patterns):
        asked.append(name)
        return folder

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert_equal(Checkpoint.open("someone/some-DiT").weights, Checkpoint.open(folder).weights)
    assert asked == ["someone/some-DiT"]


# ----------------------------------------------------------------------------------------------------------------------
# The same images


def load_pipeline(folder, monkeypatch, tmp_path):
    from diffusers import DiTPipeline
    from diffusers.utils import dynamic_modules_utils

    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    pipeline = DiTPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def assert_same_images(ckpt, folder, vae, monkeypatch, tmp_path, cfg_scale, cfg_channels=None):
    """DDIM with 20 steps and guidance, from the same noise."""
    guidance = GuidanceConfig(cfg_scale=cfg_scale, cfg_channels=cfg_channels)
    sampler = SamplerConfig(sampler="ddim", num_sampling_steps=20)
    ours = Pipeline.load(SourceConfig(ckpt=str(ckpt), vae=vae), sampler, guidance)
    number = ours.condition.num_classes
    labels = [0, max(number - 1, 0), min(number, 1)]
    x_T, _ = ours.noise(0, range(3))
    theirs = load_pipeline(folder, monkeypatch, tmp_path)
    options = {"guidance_scale": cfg_scale, "num_inference_steps": 20, "latents": x_T}
    options["guided_channels"] = ours.shape[0] if cfg_channels == "all" else None
    x_0 = last(ours.steps(torch.tensor(labels), x_T))
    drawn = theirs(labels, output_type="latent", **options).images
    assert (drawn - x_0).abs().max() <= 1e-5 * x_0.abs().max()
    expected = (ours.space.decode(x_0) / 2 + 0.5).clamp(0, 1)
    images = theirs(labels, output_type="pt", **options).images
    assert (images - expected).abs().max() <= 1e-5 * expected.abs().max()
    return theirs, labels, options, x_0


@pytest.mark.parametrize(("num_classes", "cfg_channels"), [(10, "all"), (1000, None)])
@torch.no_grad()
def test_the_exported_pipeline_draws_the_same_images(tmp_path, small_vae, monkeypatch, num_classes, cfg_channels):
    names = [f"class {i}" for i in range(num_classes)]
    ckpt = model_file(tmp_path / "a.pt", vae="ema", image_size=32, names=names, num_classes=num_classes)
    assert call(convert.main, ckpt, tmp_path / "dit", "--vae", small_vae) == 0
    pipeline, labels, options, x_0 = assert_same_images(
        ckpt, tmp_path / "dit", str(small_vae), monkeypatch, tmp_path, 4.0, cfg_channels
    )
    assert pipeline.get_label_ids(["class 0", f"class {num_classes - 1}"]) == [0, num_classes - 1]
    assert len(pipeline(labels, num_inference_steps=2).images) == 3, "PIL images by default"
    for block in pipeline.transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 1
    wrong = pipeline(labels, output_type="latent", **options).images
    assert (wrong - x_0).abs().max() > 1e-3 * x_0.abs().max(), "the shift must matter to this test"


@pytest.mark.parametrize(("cfg_scale", "change"), [
    (1.0, {"in_channels": 1}), (3.0, {"in_channels": 1}), (0.5, {"in_channels": 3, "learn_sigma": False}),
    (1.0, UNCONDITIONAL), (3.0, UNCONDITIONAL),
])  # fmt: skip
@torch.no_grad()
def test_models_of_pixels_and_without_classes_too(tmp_path, monkeypatch, cfg_scale, change):
    ckpt = model_file(tmp_path / "a.pt", **change)
    assert call(convert.main, ckpt, tmp_path / "dit") == 0
    assert_same_images(ckpt, tmp_path / "dit", None, monkeypatch, tmp_path, cfg_scale)


def test_a_plain_load_is_not_wrong_in_silence(folder, monkeypatch, tmp_path):
    """diffusers refuses to load the folder, or, in old versions, loads the folder's own pipeline."""
    from diffusers import DiffusionPipeline, DiTPipeline
    from diffusers.utils import dynamic_modules_utils

    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    for kind in (DiTPipeline, DiffusionPipeline):
        try:
            outcome = type(kind.from_pretrained(folder)).__name__
        except ValueError as error:
            outcome = str(error)
        assert "OriginalDiTPipeline" in outcome or "trust_remote_code" in outcome


@torch.no_grad()
def test_what_the_docs_say_of_diffusers_own_class(folder):
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel.from_pretrained(folder / "transformer")
    embedders = [block.norm1.emb for block in transformer.transformer_blocks]
    assert {embedder.time_proj.downscale_freq_shift for embedder in embedders} == {1}
    t = torch.tensor([10, 500, 999])
    shifted = embedders[0].time_proj(t)
    embedders[0].time_proj.downscale_freq_shift = 0
    exact = embedders[0].time_proj(t)
    errors = ((shifted - exact).norm(dim=1) / exact.norm(dim=1)).tolist()
    assert errors == pytest.approx([0.013, 0.607, 1.011], abs=0.001)
    frequencies = torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(128) / 128)
    angles = t[:, None] * frequencies
    torch.testing.assert_close(exact, torch.cat([angles.cos(), angles.sin()], dim=1), rtol=0, atol=1e-4)
    plain = DiTPipeline(transformer, None, DDIMScheduler(), id2label={"0": "ant"})
    plain.set_progress_bar_config(disable=True)
    with pytest.raises(IndexError):  # its null class is 1000
        plain([0], num_inference_steps=1)
    assert "id2label" not in plain.config


# ----------------------------------------------------------------------------------------------------------------------
# Every command reads every form


@pytest.mark.parametrize("form", ["w.safetensors", "dit"])
def test_sampling_and_likelihood_take_every_form(tmp_path, form, image_folder, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ckpt = model_file(tmp_path / "a.pt", in_channels=3, names=["ant", "bee", "cat"])
    assert call(convert.main, ckpt, form) == 0
    options = ("--num-sampling-steps", 2, "--device", "cpu")
    for source in (ckpt, form):
        command = ("--ckpt", source, "--labels", "ant", "2", "--output", f"{source}.png", "--guide-ckpt", source)
        assert call(sample.main, *command, *options) == 0
    assert (tmp_path / f"{form}.png").read_bytes() == (tmp_path / f"{ckpt}.png").read_bytes()
    command = ("--ckpt", form, "--data-path", image_folder, "--num-images", 2, "--num-timesteps", 2, "--device", "cpu")
    assert call(likelihood.main, *command) == 0
    command = ("--ckpt", form, "--num-fid-samples", 3, *options, "--folder", "set")
    assert call(sample_ddp.main, *command) == 0
    assert call(sample_ddp.main, *command) == 0
    assert (
        json.loads((tmp_path / "samples/set/options.json").read_text())["checkpoint_crc32"]
        == Checkpoint.open(form).checksum
    )
    other = model_file(tmp_path / "other.pt", in_channels=3, num_heads=4)
    assert call(convert.main, other, form, "--overwrite") == 0
    capsys.readouterr()
    assert call(sample_ddp.main, *command) == 2
    assert "CRC-32" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture
def refuse(capsys, tmp_path):
    """refuse(source, target) asserts that convert.py ends with one line, that it leaves nothing behind and runs no code."""

    def check(*argv, status=2):
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        capsys.readouterr()
        assert call(convert.main, *argv) == status
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        return lines[0]

    return check


@pytest.mark.parametrize(
    ("change", "words"),
    [({"block": block}, block) for block in BLOCKS if block != "adaln-zero"]
    + [({"mlp_ratio": 2.0}, "MLP ratio is 2.0"), ({"class_dropout_prob": 0.0}, "no null class")],
)
def test_what_diffusers_cannot_hold_is_refused(tmp_path, refuse, change, words):
    line = refuse(model_file(tmp_path / "a.pt", in_channels=1, **change), tmp_path / "dit")
    assert words in line
    assert "write a .safetensors" in line


@pytest.mark.parametrize(("change", "words"), [
    ({"input_size": (4, 8)}, "--image-size 16"), ({"input_size": (16,)}, "--image-size 16"),
    ({"class_dropout_prob": 0.0}, "--label-dropout 0"),
])  # fmt: skip
def test_what_a_file_without_a_record_cannot_tell_is_refused(tmp_path, refuse, change, words):
    """Such a .pt file was written, and read as another model or not at all."""
    line = refuse(model_file(tmp_path / "a.pt", image_size=16, in_channels=1, **change), tmp_path / "b.pt")
    assert f"cannot record {words}" in line
    assert line.endswith("write a .safetensors file")


def test_a_changed_position_embedding_is_not_lost(ckpt, tmp_path, refuse):
    state = files.load(ckpt, mmap=False)
    state["ema"]["pos_embed"] += 1e-3
    files.save(ckpt, state)
    assert "position embedding was changed" in refuse(ckpt, tmp_path / "dit")


def test_an_autoencoder_that_does_not_fit_or_is_absent_is_refused(tmp_path, small_vae, refuse):
    assert "4 channels" in refuse(model_file(tmp_path / "a.pt", in_channels=3), tmp_path / "dit", "--vae", small_vae)
    ckpt = model_file(tmp_path / "b.pt", vae="ema", image_size=32)
    assert "or --vae none to leave it out" in refuse(ckpt, tmp_path / "dit")


@pytest.mark.parametrize("target", ["w.safetensors", "w.pt", "dit"])
def test_a_target_that_exists_is_kept_unless_it_may_be_replaced(ckpt, tmp_path, refuse, target):
    target = tmp_path / target
    assert call(convert.main, ckpt, target) == 0
    assert "pass --overwrite" in refuse(ckpt, target)
    truncate(target / "transformer/config.json" if target.is_dir() else target)
    assert call(convert.main, ckpt, target, "--overwrite") == 0
    assert_equal(Checkpoint.open(target, num_heads=2).weights, Checkpoint.open(ckpt).weights)
    assert call(convert.main, target, target, "--overwrite", "--num-heads", 2) == 0, "onto itself"
    assert_equal(Checkpoint.open(target, num_heads=2).weights, Checkpoint.open(ckpt).weights)
    assert {path.name for path in tmp_path.iterdir()} == {ckpt.name, target.name}, "no temporary file is left"


@pytest.mark.parametrize("target", ["w.safetensors", "w.pt", "dit"])
def test_a_full_disk_leaves_what_was_there(ckpt, tmp_path, target):
    assert call(convert.main, ckpt, tmp_path / target) == 0
    before = listing(tmp_path)
    pid = os.fork()
    if pid == 0:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 2)
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            os._exit(call(convert.main, ckpt, tmp_path / target, "--overwrite"))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    assert listing(tmp_path) == before
