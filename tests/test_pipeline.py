"""sampling/: what is opened and checked, labels, each image's own noise, and what a pipeline draws."""

import argparse
import re

import numpy as np
import pytest
import torch
from reference import fill

from checkpoint import files
from checkpoint.opened import Checkpoint, record_of
from data.autoencoder import load_space
from data.condition import Classes, draw
from diffusion import OBJECTIVES, create_diffusion, samplers
from models import DiT
from runtime.errors import UserError
from sampling.config import ComputeConfig, DrawConfig, GuidanceConfig, SampleConfig, SamplerConfig, SourceConfig
from sampling.opened import Opened
from sampling.pipeline import Pipeline, image_noise, to_uint8

SIZES = {"input_size": 8, "patch_size": 2, "in_channels": 1, "num_classes": 10}
SIZES |= {"hidden_size": 16, "depth": 1, "num_heads": 2}
STEPS = SamplerConfig(num_sampling_steps=4)


def save(path, args=None, **changes):
    """A checkpoint of small weights, far from zero, as train.py wrote them before class names and configs were stored."""
    weights = fill(DiT(**{**SIZES, **changes})).state_dict()
    args = {"num_heads": 2, "image_size": 8, "vae": "none", "num_classes": 10, **(args or {})}
    files.save(path, {"ema": {name: 0.5 * value for name, value in weights.items()}, "args": args})
    return path


def opened(ckpt=None, kind=DrawConfig, **source):
    return Opened.open(kind(source=SourceConfig(ckpt=ckpt and str(ckpt), **source)))


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


def test_drawing_from_python_ends_in_pictures(tmp_path):
    """Image i depends on the seed and on i alone, and the folder of a run stands for its newest checkpoint."""
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="run: the run has no checkpoint yet"):
        Pipeline.load(tmp_path / "run")
    save(tmp_path / "run/checkpoints/0000002.pt", depth=2)
    save(tmp_path / "run/checkpoints/0000010.pt", args={"class_names": ["ant", "bee", *"cdefghij"]})
    pipeline = Pipeline.load(tmp_path / "run", STEPS)
    assert len(pipeline.model.blocks) == 1
    images = pipeline.draw(["bee", "7", 3], seed=5)
    assert [(image.size, image.mode) for image in images] == [((8, 8), "RGB")] * 3
    expected = pipeline.to_pixels(pipeline([1, 7, 3], *pipeline.noise(5, range(3))))
    assert np.array_equal(np.stack(images), expected)
    again = np.stack(pipeline.draw(["bee", 7, 3, 2], seed=5, batch_size=2)).astype(int)[:3]
    assert np.abs(again - expected).max() <= 1, "batches may round differently"
    assert len(pipeline.draw()) == 8, "some classes"


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (lambda p: p.draw(["dog"]), "--labels dog: no class is called that"),
        (lambda p: p.draw([10]), "--labels 10: out of range, the model's classes are 0 to 9"),
        (lambda p: p.draw(3), "what to draw: is one value, 3; give a list, such as [3]"),
        (lambda p: p.draw("dog"), "what to draw: is one value, 'dog'; give a list, such as ['dog']"),
        (lambda p: p.noise(0, 3), "indices is 3, must be a list or a range, such as range(3)"),
        (lambda p: p([99], *p.noise(0, [0])), "class 99: is no number from 0 to 9"),
        (lambda p: p(["dog"], *p.noise(0, [0])), "class 'dog': is no number from 0 to 9; `parse` makes one of a name"),
        (lambda p: p(torch.tensor([11]), *p.noise(0, [0])), "y: holds labels from 11 to 11; the model's are 0 to 10"),
        (lambda p: p([1], *p.noise(0, [0, 1])), "there are 1 choices for 2 noises, must be one for each"),
        (lambda p: p([1], [[0.0]]), "x_T is a list, must be a tensor (N, 1, 8, 8), as `noise` draws it"),
        (lambda p: p([1], torch.zeros(1, 4, 8, 8)), "x_T is of shape (1, 4, 8, 8), must be"),
    ],
)
def test_mistakes_in_python_raise_a_sentence(ckpt, mistake, words):
    pipeline = Pipeline.load(ckpt, STEPS)
    with pytest.raises(ValueError, match="^" + re.escape(words)):
        mistake(pipeline)


def test_flows_are_drawn_by_their_own_sampler(tmp_path):
    model = DiT(**SIZES, objective="flow", predict="v", learn_sigma=False)
    files.save(
        tmp_path / "flow.pt", {"ema": model.state_dict(), "args": {"vae": "none", "image_size": 8}, **record_of(model)}
    )
    flow, diffusion = Pipeline.load(tmp_path / "flow.pt"), Pipeline.load(save(tmp_path / "a.pt"))
    assert (flow.sampler.sampler, flow.sampler.num_sampling_steps) == OBJECTIVES["flow"].default_sampler
    assert (diffusion.sampler.sampler, diffusion.sampler.num_sampling_steps) == ("ddpm", 250)
    assert Pipeline(model, load_space("none", 1)).sampler == flow.sampler
    assert Pipeline.load(tmp_path / "flow.pt", SamplerConfig("euler", 5)).sampler == SamplerConfig("euler", 5)
    with pytest.raises(UserError, match="--sampler flow-sde: .*a.pt is no flow model; choose ddpm"):
        Pipeline.load(tmp_path / "a.pt", SamplerConfig("flow-sde", 5))


def test_the_flows_of_other_programs_are_refused(tmp_path):
    """Their time runs the other way; they were drawn as if they predicted noise."""
    for args in ({"path_type": "Linear", "prediction": "velocity"}, argparse.Namespace(prediction="velocity")):
        weights = fill(DiT(**SIZES)).state_dict()
        torch.save({"ema": weights, "args": args}, tmp_path / "sit.pt")
        with pytest.raises(UserError, match="sit.pt: weights of another program's flow .*prediction=velocity"):
            Pipeline.load(tmp_path / "sit.pt")


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
    assert (made.condition.num_classes, made.condition.titles([7])) == (10, ["7"])


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
    assert len({*draw(0, range(200), 1000)}) > 150
    labels = draw(0, range(2000), 10)
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
    checked = opened(ckpt)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Pipeline.build(checked)
    assert torch.equal(torch.get_rng_state(), before)
    Pipeline.build(checked, draw_initial_weights=True)
    drawn = torch.get_rng_state()
    torch.manual_seed(0)
    DiT(**SIZES)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_what_the_checkpoint_records_is_the_default(ckpt, tmp_path, small_vae):
    expected = {"image_size": 8, "num_classes": 10, "vae": "none"}
    assert expected.items() <= opened(ckpt).settings.items()
    assert expected.items() <= opened(ckpt, image_size=8, num_classes=10).settings.items()
    latent = save(tmp_path / "latent.pt", args={"image_size": 64, "vae": str(small_vae)}, in_channels=4)
    assert opened(latent).settings["vae"] == str(small_vae)
    released = save(tmp_path / "released.pt", args={"image_size": 64, "vae": "ema"}, in_channels=4)
    with pytest.raises(UserError, match="^autoencoder mse: no usable autoencoder"):  # each command has a decoder of its own
        opened(released, SampleConfig)


def test_weights_of_a_pixel_model_need_no_record(tmp_path):
    """The image size was taken to be 8 pixels a cell."""
    torch.save(fill(DiT(**{**SIZES, "in_channels": 3})).state_dict(), tmp_path / "bare.pt")
    assert opened(tmp_path / "bare.pt", vae="none", num_heads=2).settings["image_size"] == 8
    with pytest.raises(UserError, match=r"--num-heads 4: .*a.pt holds 2"):
        opened(save(tmp_path / "a.pt"), num_heads=4)


def test_errors_name_what_the_user_gave(ckpt, tmp_path):
    gone = save(tmp_path / "gone.pt", args={"image_size": 64, "vae": "/nowhere/vae"}, in_channels=4)
    with pytest.raises(UserError, match=r"^autoencoder /nowhere/vae, recorded in .*gone.pt: no usable autoencoder"):
        opened(gone)
    with pytest.raises(UserError, match=r"^--vae /nowhere/vae: no usable autoencoder"):
        opened(gone, vae="/nowhere/vae")
    with pytest.raises(UserError, match="^--vae none: the released DiT-XL/2 has 4 channels, it works on latents"):
        opened(vae="none")
    with pytest.raises(UserError, match=f"^--guide-ckpt {ckpt}: in_channels 1, but the released DiT-XL/2 has 4"):
        Opened.open(DrawConfig(guidance=GuidanceConfig(cfg_scale=4.0, guide_ckpt=str(ckpt))))


def test_labels_go_by_number_and_name():
    imagenet = Classes.from_record({"num_classes": 1000})
    assert imagenet.parse(["207", "golden retriever", "Daisy", "n02099601"]) == [207, 207, 985, 207]
    assert (imagenet.names[134], imagenet.names[517]) == ("crane bird", "crane")
    with pytest.raises(UserError, match=r"several classes are called that; did you mean 0 \(crane\), 2 \(Crane\)"):
        Classes(3, ["crane", "bee", "Crane"]).parse(["crane"])
    with pytest.raises(UserError, match="no class is called that; did you mean .*goldfish"):
        imagenet.parse(["goldfis"])
    for wrong in ("--5", "", "9" * 5000):
        with pytest.raises(UserError, match="no class is called that"):
            imagenet.parse([wrong])
    assert Classes(2, ["ant", "bee"]).parse(["bee", "0"]) == [1, 0]
    assert Classes(0).parse(["0"]) == [0]


def test_wordnet_numbers_that_a_checkpoint_records_are_read_as_names(tmp_path):
    recorded = ["n01440764", "n02099601", "n00015388", "n01514668", "n01792158"]
    condition = Pipeline.load(save(tmp_path / "a.pt", args={"class_names": recorded}, num_classes=5), STEPS).condition
    assert condition.names[:3] == ["tench", "golden retriever", "animal"]
    assert condition.parse(["Golden Retriever", "n02099601", "n00015388", "3"]) == [1, 1, 2, 3]
    assert condition.parse(recorded) == [0, 1, 2, 3, 4], "names that several classes have"
    assert condition.titles([1]) == ["golden retriever"]


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
