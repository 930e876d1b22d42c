"""data/captions.py: the texts of images and the files that they are read from."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.captions import TEMPLATES, WITHOUT_DIGIT, Captions, digit_captions, read_captions, read_prompts
from data.config import DataConfig
from data.images import load_dataset
from runtime.errors import UserError

LISTS = [["one"], ["two", "2"], ["three", "3", "III"]]


def write(folder, *lines):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "metadata.jsonl").write_text(text)


def entry(name, text):
    return {"file_name": name, "text": text}


def test_each_image_gets_its_texts_whatever_the_order_of_the_lines(tmp_path):
    write(tmp_path, entry("b/1.png", ["x", "y"]), "", entry("a.png", "Grüße"), {**entry("./b/1.png", "z\nz"), "more": 1})
    captions = read_captions(tmp_path, ["a.png", "b/1.png"])
    assert [captions.of(i) for i in range(2)] == [["Grüße"], ["x", "y", "z\nz"]]
    other = read_captions(tmp_path, ["b/1.png", "a.png"])
    assert other.of(1) == ["Grüße"]
    assert other.checksum != captions.checksum, "texts that belong to other images are other data"


@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 10**6))
def test_the_text_of_an_epoch_is_one_of_the_images_own_and_always_the_same(seed, epoch):
    captions = Captions(LISTS)
    for index, texts in enumerate(LISTS):
        number = captions.choose(seed, index, epoch)
        assert captions.texts[number] in texts
        assert number == Captions(LISTS).choose(seed, index, epoch)


def test_all_texts_are_drawn_equally_often_in_an_order_that_seed_epoch_and_image_decide():
    captions = Captions([LISTS[2]] * 4)
    drawn = [[captions.choose(0, index, epoch) - 3 * index for epoch in range(900)] for index in range(4)]
    counts = Counter(drawn[0])
    assert min(counts[i] for i in range(3)) > 240
    assert drawn[0] != drawn[1], "the image counts"
    assert drawn[0] != [captions.choose(1, 0, epoch) for epoch in range(900)], "the seed counts"


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([entry("a.png", "x"), "{"], "metadata.jsonl, line 2: is not"),
        (["[1]"], "line 1: is not"),
        ([entry("a.png", "  ")], "line 1: is not"),
        ([entry("a.png", [])], "line 1: is not"),
        ([entry("a.png", ["x", 3])], "line 1: is not"),
        ([entry("a.png", "\ud800")], "line 1: is not"),
        ([{"file_name": "a.png"}], "line 1: is not"),
        ([entry(7, "x")], "line 1: is not"),
        ([entry("a.png", "x"), entry("c.png", "y"), entry("b/1.png", "z")], "names c.png, which is no image in"),
        ([entry("a.png", "x")], "has no text of the image b/1.png; add a line"),
        ([""], "has no text of the image a.png and of 1 others"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(tmp_path, lines, words):
    write(tmp_path, *lines)
    with pytest.raises(UserError, match=words) as caught:
        read_captions(tmp_path, ["a.png", "b/1.png"])
    assert "\n" not in str(caught.value)


def test_a_folder_without_metadata_is_told_the_way_out(tmp_path):
    with pytest.raises(UserError, match="has no metadata.jsonl.*write one; train.py takes classes"):
        read_captions(tmp_path, ["a.png"])
    (tmp_path / "metadata.jsonl").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        read_captions(tmp_path, ["a.png"])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3)
    | st.dictionaries(st.sampled_from(["file_name", "text", "x"]), children),
    max_leaves=6,
)


@given(
    content=st.binary(max_size=80) | st.lists(json_values, max_size=3).map(lambda v: "\n".join(map(json.dumps, v)).encode())
)
@settings(deadline=None, max_examples=300)
def test_any_file_gives_texts_or_one_line(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("any")
    for name, read in {
        "metadata.jsonl": lambda path: read_captions(folder, ["a.png"]).of(0),
        "prompts.txt": read_prompts,
        "prompts.jsonl": read_prompts,
    }.items():
        (folder / name).write_bytes(content)
        message = ""
        try:
            texts = read(folder / name)
        except UserError as error:
            texts, message = ["none"], str(error)
        assert "\n" not in message
        assert texts
        assert all(isinstance(text, str) and text.strip() and text.encode() for text in texts)


def test_prompts_are_lines_or_entries(tmp_path):
    (tmp_path / "a.txt").write_text("  a seven\n\nan eight \n")
    (tmp_path / "a.jsonl").write_text('{"text": "a seven"}\n{"text": ["an eight", "a nine"], "file_name": "b.png"}\n')
    assert read_prompts(tmp_path / "a.txt") == ["a seven", "an eight"]
    assert read_prompts(tmp_path / "a.jsonl") == ["a seven", "an eight", "a nine"]
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(UserError, match="holds no prompts"):
        read_prompts(tmp_path / "empty.txt")
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")


def test_captions_of_digits_name_the_digit():
    captions = digit_captions([7, 0])
    assert captions.of(0)[:2] == ["a handwritten seven", "a handwritten 7"]
    assert captions.of(1)[:2] == ["a handwritten zero", "a handwritten 0"]
    assert len(captions.of(0)) == 2 * len(TEMPLATES) + len(WITHOUT_DIGIT)


def test_images_come_with_their_texts(image_folder, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for path in image_folder.glob("*/*.png"):
        (folder / path.parent.name).mkdir(exist_ok=True)
        (folder / path.parent.name / path.name).write_bytes(path.read_bytes())
    (folder / "z.png").write_bytes((image_folder / "ant/0.png").read_bytes())
    names = ["z.png", *(f"{name}/{i}.png" for name in ("ant", "bee", "cat") for i in range(4))]
    write(folder, *(entry(name, [f"{name} A", f"{name} B"]) for name in reversed(names)))
    config = DataConfig(data_path=str(folder), text_encoder="any")
    dataset = load_dataset(config, 16, seed=3)
    assert (len(dataset), dataset.notes) == (13, []), "images beside the folders count where there are texts"
    seen = {dataset[i, epoch]["text"] for i in range(13) for epoch in range(12)}
    assert seen == {f"{name} {letter}" for name in names for letter in "AB"}
    for index in range(13):
        name = dataset.name(index).split("images/")[1]
        assert dataset[index, 5]["text"].split(" ")[0] == name
        assert dataset.texts([(index, 5)]) == {"text": [dataset[index, 5]["text"]]}
    identity = dataset.fingerprint()
    write(folder, *(entry(name, f"{name} C") for name in names))
    assert load_dataset(config, 16).fingerprint() != identity, "other texts are other data"
    (folder / "bee/2.png").write_bytes(b"no image")
    dataset = load_dataset(DataConfig(**{**config.flat(), "skip_bad_images": True}), 16)
    assert dataset[7, 0]["text"] == "bee/3.png C", "the image in a bad one's place brings its own text"
