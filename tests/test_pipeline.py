"""sampling/: what is opened and checked, labels, each image's own noise, and what a pipeline draws."""

import numpy as np
import pytest
import torch
from reference import fill

from checkpoint import files
from checkpoint.opened import Checkpoint
from data.autoencoder import load_space
from diffusion import create_diffusion, samplers
from models import DiT
from runtime.errors import UserError
from sampling.config import ComputeConfig, GuidanceConfig, SamplerConfig, SourceConfig
from sampling.labels import parse_labels, readable_names
from sampling.noise import image_label, image_noise
from sampling.pipeline import Pipeline, to_uint8
from sampling.source import Source

SIZES = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 1,
    "hidden_size": 16,
    "depth": 1,
    "num_heads": 2,
    "num_classes": 10,
}
STEPS = SamplerConfig(num_sampling_steps=4)


def save(path, args=None, **changes):
    """A checkpoint of small weights, far from zero, as train.py wrote them before class names and configs were stored."""
    weights = fill(DiT(**{**SIZES, **changes})).state_dict()
    args = {"num_heads": 2, "image_size": 8, "vae": "none", "num_classes": 10, **(args or {})}
    files.save(path, {"ema": {name: 0.5 * value for name, value in weights.items()}, "args": args})
    return path


@pytest.fixture
def ckpt(tmp_path):
    return save(tmp_path / "a.pt")


def test_a_pipeline_draws_what_its_steps_end_in(ckpt):
    pipeline = Pipeline.load(ckpt, STEPS, GuidanceConfig(cfg_scale=2.0))
    x_T, step_noise = pipeline.noise(3, range(2))
    images = pipeline([1, 2], x_T, step_noise)
    assert images.shape == x_T.shape == (2, 1, 8, 8)
    steps = list(pipeline.steps(torch.tensor([1, 2]), x_T, step_noise))
    assert [out["step"] for out in steps] == [3, 2, 1, 0]
    assert torch.equal(steps[-1]["sample"], images)
    assert steps[0]["pred_xstart"].shape == images.shape
    assert not torch.equal(pipeline([2, 2], x_T, step_noise)[0], images[0]), "labels must count"
    pipeline.model.double()  # float32 rounds batches of one and of two differently, by up to 4e-6 of the largest pixel
    single_x_T, single_noise = pipeline.noise(3, [1])
    single, both = pipeline([2], single_x_T.double(), single_noise), pipeline([1, 2], x_T.double(), step_noise)
    torch.testing.assert_close(single[0], both[1])


def test_models_without_a_learned_variance_are_drawn_with_the_fixed_one(tmp_path):
    pipeline = Pipeline.load(save(tmp_path / "a.pt", learn_sigma=False), STEPS, GuidanceConfig(cfg_scale=2.0))
    x_T, step_noise = pipeline.noise(0, [0])
    fixed = create_diffusion("4", learn_sigma=False)
    x_0 = x_T
    for i in (3, 2, 1, 0):
        t = torch.tensor([i])
        out = fixed.p_sample(lambda x, t: pipeline.denoiser([1])(x, t.item()), x_0, t, False,
            draw_noise=lambda x, i=i: step_noise(x, i))  # fmt: skip
        x_0 = out["sample"]
    assert torch.equal(pipeline([1], x_T, step_noise), x_0)


def test_a_pipeline_is_made_of_a_model_too(ckpt):
    """The way of the FID during training, whose model is not in a file."""
    loaded = Pipeline.load(ckpt, STEPS)
    made = Pipeline(Checkpoint.open(ckpt).build_model(), load_space("none", 1), STEPS)
    noise = loaded.noise(0, [0])
    assert torch.equal(made([7], *noise), loaded([7], *noise))
    assert (made.null_class, made.num_classes, made.class_name(7)) == (10, 10, "7")


def test_the_noise_of_deterministic_samplers_is_x_T_alone(ckpt):
    ddpm, ddim = (Pipeline.load(ckpt, SamplerConfig(sampler=name, num_sampling_steps=4)) for name in ("ddpm", "ddim"))
    (x_T, step_noise), (same, _) = ddpm.noise(5, [3, 4]), ddim.noise(5, [3, 4])
    assert torch.equal(x_T, image_noise(5, [3, 4], 4, (1, 8, 8))[0])
    assert torch.equal(step_noise(x_T, 2), image_noise(5, [3, 4], 4, (1, 8, 8))[3])
    assert torch.equal(same, image_noise(5, [3, 4], 0, (1, 8, 8))[0])


def test_an_images_numbers_are_its_own():
    a = image_noise(0, [5, 6, 7], 2, (1, 4, 4))
    assert a.shape == (3, 3, 1, 4, 4)
    assert torch.equal(a[:, 1:2], image_noise(0, [6], 2, (1, 4, 4)))
    assert not torch.equal(a, image_noise(1, [5, 6, 7], 2, (1, 4, 4)))
    assert image_noise(2**63 - 1, [10**8], 0, (1, 1, 1)).isfinite().all()
    assert len({image_label(0, i, 1000) for i in range(200)}) > 150
    labels = [image_label(0, i, 10) for i in range(2000)]
    assert min(labels.count(c) for c in range(10)) > 140  # 200 expected, 4.5 standard deviations


def test_each_file_is_opened_once(ckpt, tmp_path, monkeypatch):
    opened, load = [], files.load
    monkeypatch.setattr(files, "load", lambda path, **options: (opened.append(str(path)), load(path, **options))[1])
    weaker = save(tmp_path / "weaker.pt", hidden_size=8)
    Pipeline.load(ckpt, STEPS, GuidanceConfig(cfg_scale=2.0, guide_ckpt=str(weaker)))
    assert sorted(opened) == sorted([str(ckpt), str(weaker)])


def test_bf16_is_autocast_and_near_float32(ckpt):
    """The weights are rounded once, before the first step; the result must be that of rounding them in each."""
    x, y = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 5, 9])

    def predict(weights, products):
        pipeline = Pipeline.load(ckpt, STEPS, GuidanceConfig(cfg_scale=2.0), ComputeConfig(precision=weights, device="cpu"))
        pipeline.precision = products
        return pipeline.denoiser(y)(x, 500)

    plain, rounded = predict("fp32", "fp32"), predict("bf16", "bf16")
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, predict("fp32", "bf16"))
    error = (rounded - plain).square().mean().sqrt() / plain.std()
    assert 1e-4 < error < 0.02, "8 bits of mantissa, on a model of random weights"


def test_initial_weights_are_drawn_only_where_asked(ckpt):
    source = Source.open(ckpt, STEPS)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Pipeline.build(source)
    assert torch.equal(torch.get_rng_state(), before)
    Pipeline.build(source, draw_initial_weights=True)
    drawn = torch.get_rng_state()
    torch.manual_seed(0)
    DiT(**SIZES)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_what_the_checkpoint_records_is_the_default(ckpt, tmp_path, small_vae):
    expected = {"image_size": 8, "num_classes": 10, "vae": "none"}
    assert expected.items() <= Source.open(ckpt).settings.items()
    assert expected.items() <= Source.open(SourceConfig(ckpt=str(ckpt), image_size=8, num_classes=10)).settings.items()
    latent = save(tmp_path / "latent.pt", args={"image_size": 64, "vae": str(small_vae)}, in_channels=4)
    assert Source.open(latent).settings["vae"] == str(small_vae)
    released = save(tmp_path / "released.pt", args={"image_size": 64, "vae": "ema"}, in_channels=4)
    with pytest.raises(UserError, match="^autoencoder mse: no usable autoencoder"):  # each command has a decoder of its own
        Source.open(released, released_vae="mse")


def test_weights_of_a_pixel_model_need_no_record(tmp_path):
    """The image size was taken to be 8 pixels a cell."""
    torch.save(fill(DiT(**{**SIZES, "in_channels": 3})).state_dict(), tmp_path / "bare.pt")
    source = SourceConfig(ckpt=str(tmp_path / "bare.pt"), vae="none", num_heads=2)
    assert Source.open(source).settings["image_size"] == 8
    with pytest.raises(UserError, match=r"--num-heads 4: .*a.pt holds 2"):
        Source.open(SourceConfig(ckpt=str(save(tmp_path / "a.pt")), num_heads=4))


def test_errors_name_what_the_user_gave(ckpt, tmp_path):
    gone = save(tmp_path / "gone.pt", args={"image_size": 64, "vae": "/nowhere/vae"}, in_channels=4)
    with pytest.raises(UserError, match=r"^autoencoder /nowhere/vae, recorded in .*gone.pt: no usable autoencoder"):
        Source.open(gone)
    with pytest.raises(UserError, match=r"^--vae /nowhere/vae: no usable autoencoder"):
        Source.open(SourceConfig(ckpt=str(gone), vae="/nowhere/vae"))
    with pytest.raises(UserError, match="^--vae none: the released DiT-XL/2 has 4 channels, it works on latents"):
        Source.open(SourceConfig(vae="none"))
    with pytest.raises(UserError, match=f"^--guide-ckpt {ckpt}: in_channels 1, but the released DiT-XL/2 has 4"):
        Source.open(SourceConfig(), guidance=GuidanceConfig(cfg_scale=4.0, guide_ckpt=str(ckpt)))


def test_labels_go_by_number_and_name():
    imagenet = readable_names(None, 1000)
    assert parse_labels(["207", "golden retriever", "Daisy", "n02099601"], imagenet, 1000) == [207, 207, 985, 207]
    assert (imagenet[134], imagenet[517]) == ("crane bird", "crane")
    with pytest.raises(UserError, match=r"several classes are called that; did you mean 0 \(crane\), 2 \(Crane\)"):
        parse_labels(["crane"], ["crane", "bee", "Crane"], 3)
    with pytest.raises(UserError, match="no class is called that; did you mean .*goldfish"):
        parse_labels(["goldfis"], imagenet, 1000)
    for wrong in ("--5", "", "9" * 5000):
        with pytest.raises(UserError, match="no class is called that"):
            parse_labels([wrong], imagenet, 1000)
    assert parse_labels(["bee", "0"], ["ant", "bee"], 2) == [1, 0]
    assert parse_labels(["0"], [], 0) == [0]


def test_wordnet_numbers_that_a_checkpoint_records_are_read_as_names(tmp_path):
    recorded = ["n01440764", "n02099601", "n00015388", "n01514668", "n01792158"]
    pipeline = Pipeline.load(save(tmp_path / "a.pt", args={"class_names": recorded}, num_classes=5), STEPS)
    assert pipeline.class_names[:3] == ["tench", "golden retriever", "animal"]
    assert pipeline.parse_labels(["Golden Retriever", "n02099601", "n00015388", "3"]) == [1, 1, 2, 3]
    assert pipeline.parse_labels(recorded) == [0, 1, 2, 3, 4], "names that several classes have"
    assert pipeline.class_name(1) == "golden retriever"


def test_pixels_are_rounded_as_published():
    values = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.0, 2.0]).view(1, 1, 1, 6)
    assert to_uint8(values)[0, 0].tolist() == [[v] * 3 for v in (0, 0, 128, 191, 255, 255)]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pixels_that_are_not_finite_are_no_picture(value):
    images = torch.zeros(2, 3, 4, 4)
    images[1, 0, 2, 2] = value
    with pytest.raises(UserError, match="not finite: --cfg-scale is too large, or the weights are damaged"):
        to_uint8(images)


def test_steps_take_a_denoiser_in_place_of_the_labels_own(ckpt):
    pipeline = Pipeline.load(ckpt, SamplerConfig(sampler="ddim", num_sampling_steps=3))
    x_T, _ = pipeline.noise(0, [0])
    x_0 = samplers.last(pipeline.steps([1], x_T, denoiser=lambda x_t, t: torch.zeros(1, 2, 8, 8)))
    assert torch.equal(x_0, samplers.last(pipeline.steps([2], x_T, denoiser=lambda x_t, t: torch.zeros(1, 2, 8, 8))))
