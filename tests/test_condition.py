"""What a model draws by: names and numbers of classes, vectors, and what all conditions have in common."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.condition import Classes, Texts, Vectors, read_condition
from diffusion.guidance import guided_denoiser
from models import DiT
from runtime.errors import UserError

SMALL = {"input_size": 4, "patch_size": 2, "in_channels": 1, "hidden_size": 8, "depth": 1, "num_heads": 2}
ROWS = np.array([[0.5, -1.0, 2.0], [3.0, 0.0, 1.0]], np.float32)
NULL_TEXT = torch.cat([torch.zeros(4, 5), torch.tensor([[1.0], [0], [0], [0]])], dim=1)
CONDITIONS = [Classes(10, "abcdefghij"), Classes(0), Vectors(3, ROWS), Texts(5, 4, null_text=NULL_TEXT)]


@pytest.mark.parametrize("condition", CONDITIONS, ids=lambda c: c.describe())
def test_every_condition_trains_drops_guides_and_is_recorded(condition):
    torch.manual_seed(0)
    model = DiT(**SMALL, **condition.model_arguments())
    y = condition.blank(2000)
    null = condition.null(y)
    assert null.shape == y.shape
    assert null.dtype == y.dtype
    if y.is_floating_point():
        y = y + 1  # a blank vector or text is what stands for none
    dropped = condition.drop(y, 0.3)
    is_null = (dropped == null).view(2000, -1).all(1)
    if condition.describe() != "nothing":
        assert is_null.double().mean() == pytest.approx(0.3, abs=0.05)
    assert torch.equal(dropped[~is_null], y[~is_null])
    assert torch.equal(condition.drop(y, 0), y)
    x = torch.randn(2, 1, 4, 4)
    assert guided_denoiser(model.eval(), y[:2], null[:2], cfg_scale=2.0)(x, 500).shape == (2, 2, 4, 4)
    again = read_condition({"kind": condition.kind, **condition.record()}, getattr(condition, "names", None))
    assert again.record() == condition.record()
    assert DiT(**SMALL, **again.model_arguments()).state_dict().keys() == model.state_dict().keys()


def test_a_name_that_is_another_class_number_is_refused_with_both_meanings():
    """Folders called 0 to 11 are numbered 0, 1, 10, 11, 2, ..."""
    classes = Classes(12, sorted(map(str, range(12))))
    assert classes.parse(["0", "1"]) == [0, 1], "where name and number agree nothing is in doubt"
    with pytest.raises(UserError, match='is the name of class 2 and the number of class "8"; write name:10 or number:10'):
        classes.parse(["10"])
    outside = Classes(3, ["7", "8", "9"])
    assert outside.parse(["7"]) == [0], "no class has this number"
    assert classes.parse(["name:10", "number:10", 10]) == [2, 10, 10], "the way out works"
    assert classes.parse(classes.words(range(12))) == list(range(12))


def test_names_are_found_composed_or_not_and_a_few_classes_are_listed():
    decomposed = "cafe\u0301"  # as a Mac writes it
    classes = Classes(3, [decomposed, "Tea", "milk"])
    assert classes.parse(["caf\u00e9", "tea"]) == [0, 1]
    with pytest.raises(UserError, match=r"no class is called that \(0 .*, 1 Tea, 2 milk\); give its number"):
        classes.parse(["water"])
    with pytest.raises(UserError, match=r"--labels 3: out of range, the model's classes are 0 to 2 \(0 "):
        classes.parse(["3"])
    with pytest.raises(UserError, match=r"did you mean 2 \(milk\)"):
        classes.parse(["mil"])


def test_labels_of_other_data_go_by_name():
    class Data:
        classes = folders = ("b", "a")

    classes = Classes(3, "abc").for_data(Data(), SimpleNamespace(data_path="folder"))
    assert classes.y({"label": torch.tensor([0, 1, 1])}, "cpu").tolist() == [1, 0, 0]
    assert Classes(0).y({"label": torch.tensor([4, 2])}, "cpu").tolist() == [0, 0]


def test_random_classes_belong_to_seed_and_index():
    classes, many = Classes(10), list(range(2000))
    labels = classes.random(0, many, "cpu")
    assert torch.equal(labels[5:7], classes.random(0, [5, 6], "cpu"))
    assert not torch.equal(labels, classes.random(1, many, "cpu"))
    assert labels.bincount().min() > 140  # 200 expected, 4.5 standard deviations


def test_vectors_are_read_from_files_and_follow_the_images(tmp_path):
    vectors = Vectors(3, ROWS)
    np.save(tmp_path / "one.npy", ROWS[0].astype(np.float64))
    np.save(tmp_path / "two.npy", ROWS)
    choices = vectors.parse([str(tmp_path / "one.npy"), str(tmp_path / "two.npy")])
    assert vectors.encode(choices, "cpu").tolist() == [[*ROWS[0], 1], [*ROWS[0], 1], [*ROWS[1], 1]]
    assert vectors.titles(choices[:1]) == ["0.5 -1 2"]
    y = vectors.y({"index": torch.tensor([0, 1]), "source": torch.tensor([1, 1])}, "cpu")
    assert y.tolist() == [[*ROWS[1], 1]] * 2, "a replaced image has the vector of the one in its place"
    assert vectors.mix(y[:1], vectors.null(y[:1]), torch.tensor([[0.5]])).tolist() == [[1.5, 0, 0.5, 0.5]]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is not there; write it with numpy.save"),
        (b"no array", "cannot be read"),
        (np.zeros((2, 4)), "vectors of 4 numbers, the model's have 3"),
        (np.zeros((2, 3, 3)), r"of shape \(2, 3, 3\)"),
        (np.array([[1.0, np.nan, 2.0]]), "finite numbers"),
        (np.array([["a", "b", "c"]]), "finite numbers"),
    ],
)
def test_files_that_hold_no_vectors_are_refused(content, words, tmp_path):
    path = tmp_path / "v.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    with pytest.raises(UserError, match=words):
        Vectors(3).parse([str(path)])


@pytest.mark.parametrize(
    "record", [{"kind": "smell"}, {"kind": "vector", "size": -1}, {"kind": "text", "width": 1.5, "length": 3}]
)
def test_damaged_records_are_refused(record):
    with pytest.raises(UserError, match="condition"):
        read_condition(record)
