"""Fine-tuning: start from the weights of another model (--init-from), and train only a part of the parameters (--freeze).

All weights are taken over exactly, with two exceptions: the label table, where the classes differ, and the position
embedding, where the grid of patches differs.
"""

import dataclasses
import fnmatch
import zipfile
from dataclasses import dataclass
from pathlib import Path

from checkpoint import files
from checkpoint.config import MODELS
from checkpoint.opened import Checkpoint
from models import DiT_models
from runtime.config import flag
from runtime.errors import UserError
from runtime.files import reason
from sampling.labels import parse_labels, readable_names
from training import resume

TABLE, POSITIONS = "y_embedder.embedding_table.weight", "pos_embed"


def resolve(config):
    """(config, source) of a TrainConfig: the config with the model's name and block design filled in, and the Source of the
    first weights; None where they are random, or those of a run that is resumed.

    With --init-from the sizes and the block design come from there. A run that is resumed takes them from its own
    checkpoint, because the file of --init-from may be gone. Raises UserError."""
    if config.data.text_encoder:  # which takes the place of the classes
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=0))
    name, sizes, source = config.model.model or "DiT-XL/2", {"block": config.design.block or "adaln-zero"}, None
    if config.finetune.init_from:
        checkpoint = resume.peek(config.run)
        if checkpoint is None:
            source = Source.open(config)
            checkpoint = source.checkpoint
        sizes = sizes_of(checkpoint, config)
        name = checkpoint.describe() if checkpoint.describe() in MODELS else name
    model, design = dataclasses.replace(config.model, model=name), dataclasses.replace(config.design, **sizes)
    return dataclasses.replace(config, model=model, design=design), source


def sizes_of(checkpoint, config):
    """The checkpoint's values of the options in DesignOptions. Raises UserError where the command line contradicts them."""
    found, given = checkpoint.model_config, config.design.overrides()
    named = DiT_models[config.model.model].keywords if config.model.model else {}
    for name, value in {**named, **given}.items():
        same = value == found[name]
        if name == "mlp_ratio":  # only the width that results counts: it is all that weights without a record tell
            same = int(value * found["hidden_size"]) == int(found[name] * found["hidden_size"])
        if not same:
            option = f"{flag(name)} {value}" if name in given else f"--model {config.model.model}, {flag(name)} {value}"
            raise UserError(f"{option}: {checkpoint.path} has {found[name]}; leave the option out to use that")
    return {name: found[name] for name in config.design.flat()}


@dataclass(frozen=True)
class Source:
    """Weights to start from. rows: {row of the new label table: row of the checkpoint's, from which it starts}."""

    checkpoint: Checkpoint
    rows: dict

    @classmethod
    def open(cls, config):
        """What the --init-from of a TrainConfig names. Raises UserError."""
        where = config.finetune.init_from
        if Path(where).is_file() and zipfile.is_zipfile(where):
            files.verify(where)  # a flipped bit would go unnoticed
        checkpoint = Checkpoint.open(where, config.design.num_heads)
        if not checkpoint.model_config["learn_sigma"] and checkpoint.model_config["objective"] != "flow":
            raise UserError(f"--init-from {where}: a model without learned variance, which train.py cannot train")
        return cls(checkpoint, label_rows(checkpoint, config))

    def load_into(self, model):
        """Take over what fits into `model`; its other values stay as they are. Returns lines that say what was done. Raises
        UserError for a model of other channels, and for weights of another architecture."""
        path, weights, old = self.checkpoint.path, self.checkpoint.weights, self.checkpoint.model_config
        if old["in_channels"] != model.in_channels:
            raise UserError(
                f"--init-from {path}: a model of {old['in_channels']} channels, those of this run's images are "
                f"{model.in_channels}; pass the autoencoder that it was trained with as --vae"
            )
        new = model.state_dict()  # its tensors share the memory of the model's parameters
        found, expected = ({name: tuple(tensor.shape) for name, tensor in part.items()} for part in (weights, new))
        width, grids = old["hidden_size"], [config["input_size"] // config["patch_size"] for config in (old, model.config)]
        num_rows = old["num_classes"] + has_null(old["num_classes"], old["class_dropout_prob"])
        expected |= {TABLE: (num_rows, width), POSITIONS: (1, grids[0] ** 2, width)}
        added = {name for name in expected.keys() - found.keys() if "text" in name} if not old["text_width"] else set()
        for name in [*(expected.keys() - added), *found]:
            if found.get(name) != expected.get(name):
                wrong = f"{name} is {found.get(name, 'missing')}, must be {expected.get(name, 'absent')}"
                raise UserError(f"--init-from {path}: its weights do not fit ({wrong})")
        self.checkpoint.check_finite()

        totals = {}  # {part of the model: numbers of tensors and of values taken over, newly made, left out}
        for name, tensor in new.items():
            taken = used = tensor.numel()
            if name == TABLE:
                tensor[list(self.rows)] = weights[name][list(self.rows.values())].to(tensor.dtype)
                taken, used = len(self.rows) * width, len({*self.rows.values()}) * width
            elif name in added or (name == POSITIONS and grids[0] != grids[1]):
                taken = used = 0
            else:
                tensor.copy_(weights[name])
            row = 1, taken, tensor.numel() - taken, (0 if name in added else weights[name].numel()) - used
            part = name.split(".")[0]
            totals[part] = [a + b for a, b in zip(totals.get(part, (0, 0, 0, 0)), row, strict=True)]

        titles = ("tensors", "taken over", "newly made", "left out")
        vae = f", trained with --vae {self.checkpoint.vae}" if self.checkpoint.vae else ""
        lines = [f"Initialised from {path}, {self.checkpoint.describe()}{vae}; numbers of values:"]
        lines += ["".join(f"{cell:>13}" for cell in ("part", *titles))]
        lines += ["".join(f"{cell:>13}" for cell in (part, *map("{:,}".format, row))) for part, row in totals.items()]
        if grids[0] != grids[1]:
            lines += [f"Position embedding: computed for {grids[1]} x {grids[1]} patches, was {grids[0]} x {grids[0]}"]
        names = dict(enumerate(readable_names(self.checkpoint.class_names, old["num_classes"])))
        names[old["num_classes"]] = "null class"
        pairs = [f"{row} from {was} ({names.get(was, 'without a name')})" for row, was in self.rows.items()]
        pairs[20:] = ["..."] if len(pairs) > 20 else []
        return [*lines, f"Rows of the label table: {', '.join(pairs) or 'none'} taken over, others N(0, 0.02)"]


def has_null(num_classes, label_dropout):
    """Whether the label table has a row of the null class."""
    return label_dropout > 0 or num_classes == 0


def label_rows(checkpoint, config):
    """Source.rows for a TrainConfig: the classes of --keep-classes, or all of them where there are equally many, and the
    null class. Raises UserError."""
    words, num_classes, old = config.finetune.keep_classes, config.model.num_classes, checkpoint.model_config
    rows = {i: i for i in range(num_classes)} if num_classes == old["num_classes"] else {}
    if words:
        words = read_lines(words[0]) if len(words) == 1 and Path(words[0]).is_file() else words
        if len(words) != num_classes:
            raise UserError(
                f"--keep-classes: names {len(words)} classes, --num-classes is {num_classes}; give one for each class of "
                "this run, and - for a class that has none"
            )
        names = readable_names(checkpoint.class_names, old["num_classes"])
        kept = {row: word for row, word in enumerate(words) if word != "-"}
        try:
            rows = dict(zip(kept, parse_labels(kept.values(), names, old["num_classes"]), strict=True))
        except UserError as error:
            raise UserError(str(error).replace("--labels", "--keep-classes", 1)) from None
    if has_null(num_classes, config.recipe.label_dropout) and has_null(old["num_classes"], old["class_dropout_prob"]):
        rows[num_classes] = old["num_classes"]
    return rows


def read_lines(path):
    """The lines of a text file that are not empty. Raises UserError."""
    try:
        return [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"--keep-classes {path}: not a text file ({reason(error)})") from None


def freeze(model, patterns):
    """Exclude the parameters that match a pattern from training. Returns lines that say what was done. Raises UserError for
    a pattern that matches none, and where no parameter is left to train."""
    parameters, frozen = dict(model.named_parameters()), set()
    for pattern in patterns or ():
        matching = {name for name in parameters if fnmatch.fnmatchcase(name, pattern)}
        if not matching:
            raise UserError(f"--freeze {pattern}: matches no parameter; they have names like blocks.0.attn.qkv.weight")
        frozen |= matching
    for name in frozen:
        parameters[name].requires_grad = False
    if not any(p.requires_grad for p in parameters.values()):
        raise UserError(f"--freeze {' '.join(patterns)}: leaves no parameter to train")
    values = sum(parameters[name].numel() for name in frozen)
    return [f"Not trained (--freeze): {len(frozen)} of {len(parameters)} tensors, {values:,} values"] if frozen else []
