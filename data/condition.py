"""What a model draws by: a class, a text, a vector, or nothing. A run, a pipeline and a checkpoint hold one Condition and
never ask which it is. Another condition is one subclass and its line in CONDITIONS: docs/extending.md shows one.

    condition = Classes(10, ["zero", "one", ...])
    y = condition.encode(condition.parse(["one", "7"]), device)      # (2,) int64
    null = condition.null(y)                                         # "no condition", for guidance

In training y comes from a batch of the data. In sampling it comes from choices: a list of what --labels, --prompt or
--vector names, which `parse` makes of words and `encode` turns into y."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import torch

from data.listing import comparable, imagenet_names, printable, readable_names
from data.text_encoder import TextEncoder, check_same, pad
from diffusion.guidance import mix_classes, null_like
from models import MAX_CLASSES, MAX_SIZE, TextEmbedder, VectorEmbedder
from runtime import files, seeds
from runtime.errors import UserError, about

EXAMPLES = 16  # of a condition with more choices, so many are shown while a model is trained


class Condition:
    """The interface, and what most conditions share. A subclass gives at least `embedder`, `y`, `parse` and `encode`.

    kind: the key in CONDITIONS. option: the flag of sample.py whose words `parse` takes. The constructor takes what
    `record` holds. Methods raise UserError, with the way out, for what the user has to correct."""

    kind, option = None, "--labels"

    @classmethod
    def of_data(cls, config, dataset, num_classes):
        """The condition of a training run. config: a DataConfig."""
        return cls()

    @classmethod
    def from_record(cls, record, names=None, weights=None):
        """The condition that `record` describes. names: of the classes, as recorded. weights: the model's state dict."""
        return cls(**record)

    def record(self):
        """The constructor's arguments that a checkpoint stores beside `kind`: plain JSON."""
        return {}

    def describe(self):
        """In a few words."""
        return self.kind

    def embedder(self, hidden_size):
        """The module that turns y into an embedding (N, D); or, where it has `attends = True`, into tokens (N, L, D) that
        every block attends to, and their mask (N, 1, 1, L)."""
        raise NotImplementedError  # a subclass has to say

    def model_arguments(self):
        """The arguments of DiT that are about the condition."""
        return {"num_classes": 0, "condition": self}

    def to(self, device):
        """Move what encodes to the device. Returns self."""
        return self

    def null(self, y):
        """No condition, in the form and number of y."""
        return torch.zeros_like(y)

    # ------------------------------------------------------------------------------------------------------------------
    # Training

    def y(self, batch, device):
        """What the model takes, (N, ...), for a batch of the data."""
        raise NotImplementedError  # a subclass has to say

    def drop(self, y, dropout):
        """y with no condition in place of each sample's with probability `dropout`: Ho and Salimans 2022, algorithm 1."""
        if dropout == 0:
            return y
        dropped = torch.rand(len(y), device=y.device) < dropout
        return torch.where(dropped.view(-1, *[1] * (y.ndim - 1)), self.null(y), y)

    def for_data(self, dataset, config):
        """The same condition for batches of other data, such as held-out images."""
        return self

    def blank(self, number):
        """y of the right form for so many images, whatever it says."""
        return self.encode([self.default()[0]] * number, "cpu")

    def examples(self, device):
        """(y, titles) of what a grid shows during training where the user names nothing."""
        choices = self.default()
        return self.encode(choices, device), self.titles(choices)

    def random(self, seed, indices, device):
        """y of the images `indices` of a set whose conditions are drawn: image i depends on (seed, i) alone."""
        choices = self.default() if self.all() is None else self.all()
        return self.encode([choices[number] for number in draw(seed, indices, len(choices))], device)

    def check_same(self, other, path):
        """Raises UserError where the condition of the checkpoint at `path` is another one."""
        if (other.kind, other.record()) != (self.kind, self.record()):
            raise UserError(path, f"draws by {other.describe()}, not by {self.describe()}", "train on the data of that run")

    # ------------------------------------------------------------------------------------------------------------------
    # Sampling

    def prepare(self, path, negative_prompt=None, text_encoder=None):
        """Find what encodes choices; `to` reads its weights. path: of the checkpoint. The other arguments are options of
        sample.py for models of texts. Returns self."""
        for option, given in (("--negative-prompt", negative_prompt), ("--text-encoder", text_encoder)):
            if given:
                raise UserError(option, f"{path} draws by {self.describe()}, not by texts", "leave it out")
        return self

    def parse(self, words):
        """Choices, a list, of words from the command line or of values from Python."""
        raise NotImplementedError  # a subclass has to say

    def default(self):
        """Choices where the user gives none."""
        raise UserError(self.option, "says what to draw, and the model needs it", "give it")

    def all(self):
        """Every choice there is, among which a set of images may draw; None where there is no end of them."""
        return None

    def encode(self, choices, device):
        """y of choices."""
        raise NotImplementedError  # a subclass has to say

    def check(self, y):
        """y, a tensor, if the model can take it."""
        return y

    def titles(self, choices):
        """A text for each choice, to be written under its image."""
        return [str(choice) for choice in choices]

    def words(self, choices):
        """A word that names each choice exactly; of classes and texts `parse` makes it again."""
        return [str(choice) for choice in choices]

    def label(self, choices, position):
        """The number that a set of images records for an image of choices[position]."""
        return position

    def mix(self, y_from, y_to, weight):
        """Between two conditions: y_from at weight 0, y_to at 1. weight: (N, 1)."""
        raise UserError("--interpolate classes", f"between two of {self.describe()} there is no way", "interpolate seeds")


def draw(seed, indices, count):
    """A number below `count` for each image of a set, which depends on the seed and the image's index alone."""
    return [int(seeds.generator(seed, seeds.SAMPLE_LABEL, index).integers(count)) for index in indices]


class Classes(Condition):
    """One of num_classes classes; with 0 there is no condition. names: of the classes by number, as many as are known.
    numbers: the class of each label of the data, if another. y: (N,) int64, or (N, num_classes + 1) float weights."""

    kind = "classes"
    IMAGENET = (207, 360, 387, 974, 88, 979, 417, 279)  # what the original release's sample.py draws

    def __init__(self, num_classes, names=(), numbers=None):
        self.num_classes, self.names, self.numbers = num_classes, list(names)[:num_classes], numbers

    @classmethod
    def of_data(cls, config, dataset, num_classes):
        return cls(num_classes, dataset.classes)

    @classmethod
    def from_record(cls, record, names=None, weights=None):
        """ImageNet's names stand for 1000 classes without a record."""
        if names is None and record["num_classes"] == 1000:
            names = list(imagenet_names().values())
        return cls(**record, names=readable_names((names or [])[: record["num_classes"]]))

    def record(self):
        return {"num_classes": self.num_classes}

    def describe(self):
        return f"{self.num_classes} classes" if self.num_classes else "nothing"

    def model_arguments(self):
        return {"num_classes": self.num_classes}

    def null(self, y):
        return null_like(y, self.num_classes)

    def y(self, batch, device):
        labels = batch["label"] if self.numbers is None else torch.tensor(self.numbers)[batch["label"]]
        labels = labels.to(device, non_blocking=True)
        return labels if self.num_classes else torch.zeros_like(labels)

    def for_data(self, dataset, config):
        """By the classes' names; in order where the model's names are not known and the data has as many classes."""
        where, count = f"--data-path {config.data_path}", len(dataset.classes)
        if not self.names and self.num_classes not in (0, count):
            problem = f"has {count} classes, the model has {self.num_classes} and records no names to tell which these are"
            raise UserError(where, problem, "give a folder of all classes")
        if not self.names or not self.num_classes:
            return Classes(self.num_classes)
        numbers = []
        for name, folder in zip(dataset.classes, dataset.folders, strict=True):
            # a name that two of the model's classes share stands beside the folder's
            known = [candidate for candidate in (folder, name, f"{name} ({folder})") if candidate in self.names]
            if not known:
                problem = f'its class "{name}" is not one of the model\'s, such as {self.names[0]}'
                raise UserError(where, problem, "give the classes' folders the same names")
            numbers.append(self.names.index(known[0]))
        return Classes(self.num_classes, self.names, numbers)

    def examples(self, device):
        count = self.num_classes
        labels = [i * count // EXAMPLES for i in range(EXAMPLES)] if count > EXAMPLES or not count else list(range(count))
        return self.encode(labels, device), self.titles(labels) if count else None

    def parse(self, words):
        """Class numbers of words that are numbers, names or WordNet numbers (n02099601 is "golden retriever"). Where a name
        is another class's number, "name:10" and "number:10" say which is meant."""
        return [self._number(word) for word in words]

    def _number(self, word):
        where, highest, names = f"--labels {word}", max(self.num_classes - 1, 0), [*map(comparable, self.names)]
        kind, _, text = str(word).partition(":")
        if kind not in ("name", "number"):
            kind, text = "number" if isinstance(word, int | np.integer) else "either", str(word)
        number = int(text) if kind != "name" and re.fullmatch(r"-?\d{1,18}", text) else None
        wanted = comparable(imagenet_names().get(text, text) if re.fullmatch(r"n\d{8}", text) else text)
        found = [i for i, name in enumerate(names) if kind != "number" and name in (wanted, f"{wanted} ({text})")]
        if number is not None and 0 <= number <= highest:
            if found not in ([], [number]):
                problem = f'is the name of class {found[0]} and the number of class "{self.titles([number])[0]}"'
                raise UserError(where, problem, f"write name:{text} or number:{text}")
            return number
        if len(found) == 1:
            return found[0]
        few = f" ({', '.join(f'{i} {name}' for i, name in enumerate(self.names))})" if 0 < len(names) <= 10 else ""
        if number is not None and not found:
            raise UserError(where, f"out of range, the model's classes are 0 to {highest}{few}", "choose one of these")
        near = [f"{i} ({self.names[i]})" for i, name in enumerate(names) if wanted in name][:5]
        problem = f"{'several classes are' if found else 'no class is'} called that{'' if near else few}"
        raise UserError(where, problem, f"did you mean {', '.join(near)}?" if near else "give its number")

    def words(self, choices):
        ambiguous = {name for i, name in enumerate(map(comparable, self.names)) if name != str(i)}
        return [f"number:{choice}" if str(choice) in ambiguous else str(choice) for choice in choices]

    def default(self):
        return [*self.IMAGENET] if self.num_classes == 1000 else [*range(min(self.num_classes, 8))] or [0]

    def all(self):
        return range(max(self.num_classes, 1))

    def encode(self, choices, device):
        count = len(self.all())
        for choice in choices:
            if not isinstance(choice, int | np.integer | torch.Tensor) or not 0 <= choice < count:
                raise UserError(f"class {choice!r}", f"is no number from 0 to {count - 1}", "`parse` makes one of a name")
        return torch.tensor([int(choice) for choice in choices], dtype=torch.int64, device=device)

    def check(self, y):
        if not y.is_floating_point() and len(y) and not 0 <= y.min() <= y.max() <= self.num_classes:
            raise UserError("y", f"holds labels from {y.min()} to {y.max()}", f"the model's are 0 to {self.num_classes}")
        return y

    def titles(self, choices):
        return [self.names[label] if label < len(self.names) else str(label) for label in choices]

    def label(self, choices, position):
        return choices[position]

    def mix(self, y_from, y_to, weight):
        return mix_classes(y_from, y_to, weight, self.num_classes)


class Texts(Condition):
    """A text, of which an encoder makes up to `length` tokens of `width` numbers. name, crc32: of the encoder. encoder: a
    TextEncoder or StoredTexts. null_text: (L, W + 1), the empty text. dataset: of training. y: see `TextEmbedder`."""

    kind, option = "text", "--prompt"
    negative = None  # a text to guide away from, in place of the empty one

    def __init__(self, width, length, name=None, crc32=None, encoder=None, null_text=None, dataset=None):
        self.width, self.length, self.name, self.crc32 = width, length, name, crc32
        self.encoder, self.null_text, self.dataset = encoder, null_text, dataset
        self.where = "--text-encoder"  # how messages name the encoder

    @classmethod
    def of_data(cls, config, dataset, num_classes):
        encoder = dataset.open_text(config)
        if isinstance(encoder, TextEncoder):
            encoder.remember(dataset.captions.texts)
        return cls(encoder.width, encoder.length, encoder.name, encoder.crc32, encoder, encoder.null, dataset)

    @classmethod
    def from_record(cls, record, names=None, weights=None):
        return cls(**record, null_text=(weights or {}).get("text_embedder.null_text"))

    def record(self):
        return {"width": self.width, "length": self.length, "name": self.name, "crc32": self.crc32}

    def describe(self):
        return f"texts of up to {self.length} tokens, encoded by {self.name} (CRC-32 {self.crc32})"

    def embedder(self, hidden_size):
        module = TextEmbedder(self.width, self.length, hidden_size)
        if self.null_text is not None and not module.null_text.is_meta:
            module.null_text.data.copy_(self.null_text)
        return module

    def prepare(self, path, negative_prompt=None, text_encoder=None):
        name = text_encoder or self.name
        if not name:
            raise UserError(path, "does not record its text encoder", "name it with --text-encoder")
        self.where = "--text-encoder" if text_encoder else f"text encoder {name}, recorded in {path}"
        with about(self.where):
            self.encoder, self.negative = TextEncoder(name, self.length), negative_prompt
            if self.encoder.width != self.width:
                problem = f"has tokens of width {self.encoder.width}, {path} takes {self.width}"
                raise UserError(f"--text-encoder {name}", problem, "pass the one that it was trained with")
        return self

    def to(self, device):
        with about(self.where):
            if self.encoder:
                self.encoder = self.encoder.to(device)
                check_same(self.encoder, self.crc32, "the model's tokens")
        return self

    def null(self, y):
        return (self.encode([self.negative], y.device)[0] if self.negative else self.null_text).to(y).expand_as(y)

    def y(self, batch, device):
        if "text_tokens" not in batch:
            return self.encoder(batch["text"])
        tokens, lengths = (batch[name].to(device, non_blocking=True) for name in ("text_tokens", "text_lengths"))
        return pad(tokens.float(), lengths, self.length)

    def for_data(self, dataset, config):
        other = Texts.of_data(dataclasses.replace(config, text_length=self.length), dataset, 0)
        check_same(other.encoder, self.crc32, "the tokens of the training data")
        return other

    def check_same(self, other, path):
        if isinstance(other, Texts):  # the encoder's folder may have moved
            return check_same(self.encoder, other.crc32, f"the tokens of {path}")
        return super().check_same(other, path)

    def blank(self, number):
        return torch.zeros(number, self.length, self.width + 1)

    def examples(self, device):
        """Texts of images, spread evenly over the data."""
        data, numbers = self.dataset, [i * len(self.dataset) // EXAMPLES for i in range(EXAMPLES)]
        return self._of_images(numbers, device), [data.captions.text(data.seed, number, 0) for number in numbers]

    def random(self, seed, indices, device):
        """Those of images of the data, chosen at random."""
        return self._of_images(draw(seed, indices, len(self.dataset)), device)

    def _of_images(self, numbers, device):
        return self.y(self.dataset.texts([(number, 0) for number in numbers]), device)

    def parse(self, words):
        for word in words:
            if not isinstance(word, str):
                raise UserError("--prompt", f"{word!r:.50} is no text", "give one text for each image")
        return list(words)

    def encode(self, choices, device):
        return self.encoder(self.parse(choices)).to(device)


class Vectors(Condition):
    """A vector of `size` numbers, continuous, such as a pose or an embedding. rows: (N, size) float32, of the training
    images in their order. y: (N, size + 1) float: the vector, then 1, or 0 for no condition."""

    kind, option = "vector", "--vector"
    FILE = "vectors.npy"  # in the folder of the training data

    def __init__(self, size, rows=None):
        self.size, self.rows = size, rows

    @classmethod
    def of_data(cls, config, dataset, num_classes):
        where = f"{config.data_path}/{cls.FILE}"
        rows, images = read_vectors(where, where), len(dataset)
        if len(rows) != images:
            way_out = "give one for each image, in the order of their paths"
            raise UserError(where, f"has {len(rows):,} rows for {images:,} images", way_out)
        return cls(rows.shape[1], rows)

    def record(self):
        return {"size": self.size}

    def describe(self):
        return f"vectors of {self.size} numbers"

    def embedder(self, hidden_size):
        return VectorEmbedder(self.size, hidden_size)

    def y(self, batch, device):
        return self.encode(self.rows[batch.get("source", batch["index"])], device)

    def for_data(self, dataset, config):
        return Vectors(self.size, self.fit(Vectors.of_data(config, dataset, 0).rows, f"{config.data_path}/{self.FILE}"))

    def fit(self, rows, where):
        """rows (N, size), if they are of this size."""
        if rows.shape[1:] != (self.size,):
            problem = f"vectors of {rows.shape[-1]} numbers, the model's have {self.size}"
            raise UserError(where, problem, "give vectors of that size")
        return rows

    def blank(self, number):
        return torch.zeros(number, self.size + 1)

    def default(self):
        """Vectors of training images, where these are known."""
        if self.rows is None:
            return super().default()
        return list(self.rows[[i * len(self.rows) // EXAMPLES for i in range(EXAMPLES)]])

    def all(self):
        return self.rows

    def parse(self, words):
        """The rows of .npy files, each (size,) or (N, size); from Python vectors too."""
        choices = []
        for word in words:
            if isinstance(word, str | Path):
                choices += list(self.fit(read_vectors(word, f"--vector {word}"), f"--vector {word}"))
            else:
                choices += list(self.fit(np.atleast_2d(np.asarray(word, np.float32)), "vector"))
        return choices

    def encode(self, choices, device):
        rows = torch.from_numpy(np.stack(self.parse(choices))).to(device)
        return torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)

    def words(self, choices):
        return [str(row.tolist()) for row in choices]

    def titles(self, choices):
        return [" ".join(f"{number:.3g}" for number in row) for row in choices]

    def mix(self, y_from, y_to, weight):
        return y_from + weight * (y_to - y_from)


def read_vectors(path, where):
    """(N, size) float32 of a .npy file, which may hold one vector alone. Raises UserError."""
    try:
        files.check_regular(path)
        with open(path, "rb") as file:
            rows = np.atleast_2d(np.lib.format.read_array(file))
    except FileNotFoundError:
        raise UserError(where, "is not there", "write it with numpy.save, one row for each vector") from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(where, f"cannot be read ({files.reason(error)})", "write it with numpy.save") from None
    if rows.ndim != 2 or rows.dtype.kind not in "fiu" or not rows.size or not np.isfinite(rows.astype(np.float32)).all():
        problem = f"{printable(path)} holds {rows.dtype} of shape {rows.shape}, must be finite numbers (N, size)"
        raise UserError(where, problem, "write it with numpy.save, one row for each vector")
    return rows.astype(np.float32)


CONDITIONS = {"classes": Classes, "text": Texts, "vector": Vectors}


def open_condition(config, dataset, num_classes):
    """The condition of a training run, as a TrainingDataConfig says. Raises UserError."""
    return CONDITIONS[config.kind].of_data(config, dataset, num_classes)


def read_condition(record, names=None, weights=None):
    """The condition of a checkpoint. record: {"kind": ..., what `Condition.record` gives}. Raises UserError."""
    arguments = dict(record)
    kind = arguments.pop("kind", "classes")
    if kind not in CONDITIONS:
        raise UserError("condition", f"{kind!r} is none of {', '.join(CONDITIONS)}", "import the code that adds it first")
    for name, value in arguments.items():
        limit = MAX_CLASSES if name == "num_classes" else MAX_SIZE
        if isinstance(value, (bool, float)) or (isinstance(value, int) and not 0 <= value <= limit):
            raise UserError("condition", f"its {name} is {value!r}")
    return CONDITIONS[kind].from_record(arguments, names, weights)
