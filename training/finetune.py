"""Fine-tuning: start from the weights of another model (--init-from), and train only a part of the parameters (--freeze).

All weights are taken over exactly, with two exceptions: the label table, where the classes differ, and the position
embedding, where the grid of patches differs."""

import dataclasses
import fnmatch
import os
import re
from pathlib import Path

import torch

from checkpoint import lora
from checkpoint.config import DEFAULT, MODELS
from checkpoint.opened import Checkpoint, check_shapes
from data.condition import comparable
from models import DiT_models, TimestepEmbedder
from runtime.config import flag
from runtime.errors import UserError, about
from runtime.files import reason

TABLE, POSITIONS = "y_embedder.embedding_table.weight", "pos_embed"


def resolve(options, config, resumed=None):
    """(ModelOptions, source) of ModelOptions and a FinetuneConfig: the options with the model's name, sizes and design
    filled in, with --init-from from there, and the Checkpoint of the first weights; None where they are random, or those of
    a run that is resumed. Such a run takes the design, the number of its classes and the time shift from its own
    checkpoint, `resumed`, since the file of --init-from may be gone. Raises UserError."""
    init_from, source = config.init_from, None
    if resumed is not None:
        missing = [name for name in ("num_classes", "time_shift") if getattr(options, name) is None]
        options = dataclasses.replace(options, **{name: resumed.model_config[name] for name in missing})
    if not init_from:
        design = {"block": options.block or "adaln-zero", "objective": options.objective or "diffusion"}
        name = options.model or (DEFAULT if options.name == DEFAULT else None)
        return dataclasses.replace(options, model=name, **design), None
    if resumed is None or config.lora_rank:  # whose checkpoints lack the base's weights
        source = Checkpoint.open(init_from, options.num_heads, average=config.init_average)
        if not source.model_config["learn_sigma"] and source.model_config["objective"] == "diffusion":
            raise UserError(f"--init-from {init_from}: a model without learned variance, which train.py cannot train")
    checkpoint = resumed or source
    name = checkpoint.describe()
    options = dataclasses.replace(options, model=name if name in MODELS else None, **sizes_of(checkpoint, options))
    return options, source


def sizes_of(checkpoint, options):
    """The checkpoint's values of the design in ModelOptions. Raises UserError where the command line contradicts them."""
    patch = checkpoint.sizes.patch
    found, given = {**checkpoint.model_config, "patch_size": patch[-1]}, options.overrides()
    if len(patch) == 3:  # of clips
        found["patch_frames"] = patch[0]
        if not options.num_frames:
            raise UserError(f"--init-from {checkpoint.path}", "a model of clips", "give --num-frames")
    if given.get("objective") == "meanflow" and found["objective"] == "flow":  # whose weights are those of r = t
        found["objective"] = "meanflow"
    if (options.block, found["block"]) == ("space-time", "adaln-zero"):
        found["block"] = "space-time"  # see `inflate`
    named = DiT_models[options.model].keywords if options.model else {}
    for name, value in {**named, **given}.items():
        same = value == found[name]
        if name == "mlp_ratio":  # only the width that results counts: it is all that weights without a record tell
            same = int(value * found["hidden_size"]) == int(found[name] * found["hidden_size"])
        if not same and name != "time_shift":  # which is no part of the weights
            option = f"{flag(name)} {value}" if name in given else f"--model {options.model}, {flag(name)} {value}"
            raise UserError(f"{option}: {checkpoint.path} has {found[name]}; leave the option out to use that")
    found = {**found, "time_shift": options.time_shift or found["time_shift"]}
    return {name: found[name] for name in options.flat() if name in found and name != "num_classes"}


def load_into(model, source, rows):
    """Take over what of a Checkpoint fits into `model`; its other values stay as they are. rows: {row of the label table:
    row of the checkpoint's}. Returns lines that say what was done. Raises UserError for weights that do not fit."""
    path, weights, old, where = source.path, source.weights, source.model_config, f"--init-from {source.path}"
    if old["in_channels"] != model.in_channels:
        problem = f"a model of {old['in_channels']} channels, those of this run's images are {model.in_channels}"
        raise UserError(where, problem, "pass the autoencoder that it was trained with as --vae")
    source.check_weights()
    weights = inflate(weights, source.sizes, model)
    new = model.state_dict()  # its tensors share the memory of the model's parameters
    before, now = source.sizes.grid, model.sizes.grid
    # what belongs to a condition that the other model does not have
    other = source.condition.kind != (model.condition.kind if model.condition else "classes")
    own = {name for name in weights.keys() ^ new.keys() if other and ("text" in name or name.startswith("y_embedder."))}
    own |= {name for name in new.keys() - weights.keys() if name.startswith("span_embedder.")}  # zero at first
    differing = own | {TABLE, POSITIONS}
    try:
        check_shapes(*({name: part[name] for name in part.keys() - differing} for part in (weights, new)))
    except ValueError as error:
        raise UserError(where, f"its weights do not fit ({error})") from None

    totals = take_over(new, weights, own if before == now else own | {POSITIONS}, rows)

    table = [("part", "tensors", "taken over", "newly made", "left out")]
    table += [(part, *map("{:,}".format, row)) for part, row in totals.items()]
    vae = f", trained with --vae {source.vae}" if source.vae else ""
    lines = [f"Initialised from {path}, {source.describe()}{vae}; numbers of values:"]
    lines += ["".join(f"{cell:>13}" for cell in row) for row in table]
    if old["objective"] != model.objective:  # a flow that becomes a meanflow
        embedder = TimestepEmbedder(model.hidden_size)
        embedder.load_state_dict(model.t_embedder.state_dict())
        model.t_embedder.imitate(embedder)
        lines += ["Timestep embedding: fitted to that of the flow, whose time is a hundred times as fast"]
    if before != now:
        sides = (" x ".join(map(str, grid)) for grid in (now, before))
        lines += ["Position embedding: computed for {} patches, was {}".format(*sides)]
    if TABLE in new and TABLE in weights:
        names = {**dict(enumerate(getattr(source.condition, "names", ()))), old["num_classes"]: "null class"}
        pairs = [f"{row} from {was} ({names.get(was, 'without a name')})" for row, was in rows.items()]
        pairs[20:] = ["..."] if len(pairs) > 20 else []
        lines += [f"Rows of the label table: {', '.join(pairs) or 'none'} taken over, others N(0, 0.02)"]
    return lines


def take_over(new, weights, left, rows):
    """Copy a state dict into `new`; of the label table `rows`, as of `load_into`, and of the names in `left` nothing.
    Returns {part of the model: numbers of tensors, and of values taken over, newly made and left out}."""
    totals = {}
    for name in {**new, **weights}:
        made, there = (part[name].numel() if name in part else 0 for part in (new, weights))
        taken = used = made
        if name in left:
            taken = used = 0
        elif name == TABLE:
            new[name][list(rows)] = weights[name][list(rows.values())].to(new[name].dtype)
            taken, used = (len(kept) * new[name].shape[1] for kept in (rows, {*rows.values()}))
        else:
            new[name].copy_(weights[name])
        row, part = (int(name in new), taken, made - taken, there - used), name.split(".")[0]
        totals[part] = [a + b for a, b in zip(totals.get(part, (0, 0, 0, 0)), row, strict=True)]
    return totals


def inflate(weights, sizes, model):
    """The weights of a model of these sizes (DiTConfig) as those of `model`. Of images, for a model of clips: each frame is
    seen as the image was, and predicted alike; positions in time start at zero. Of adaLN-Zero, for `space-time`: the
    attention over time starts behind a gate of zero. Others stay as they are."""
    new, found, frames = model.state_dict(), {**weights}, model.sizes.patch[0]
    if model.sizes.frames and not sizes.frames:
        found["time_embed.weight"] = new["time_embed.weight"]
        kernel = found["x_embedder.proj.weight"]
        found["x_embedder.proj.weight"] = kernel[:, :, None].expand(-1, -1, frames, -1, -1) / frames  # the frames' mean
        for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
            found[name] = torch.cat([found[name]] * frames)
    if (sizes.block, model.block) == ("adaln-zero", "space-time"):
        for name in new.keys() & found.keys():
            if name.startswith("blocks.") and "adaLN_modulation" in name:  # the first six vectors are those there
                found[name] = torch.cat([found[name], new[name][len(found[name]) :]])
        found |= {name: new[name] for name in new if ".attn_time." in name or ".norm_time." in name}
    return found


def label_rows(source, words, num_classes, label_dropout, names):
    """{row of the new label table: row of the checkpoint's, from which it starts}: the classes of --keep-classes (words),
    or those of the same name, or without names those of the same number, if there are equally many; and the null class.
    names: of the run's classes. Raises UserError."""
    old, known = source.model_config, getattr(source.condition, "names", ())
    rows = {i: i for i in range(num_classes)} if num_classes == old["num_classes"] else {}
    if words:
        if len(words) == 1 and Path(words[0]).is_file():
            try:
                words = Path(words[0]).read_text(encoding="utf-8").splitlines()
            except (OSError, ValueError) as error:
                raise UserError(f"--keep-classes {words[0]}: not a text file ({reason(error)})") from None
        words = [word.strip() for word in words if word.strip()]
        if len(words) != num_classes:
            problem = f"names {len(words)} classes, --num-classes is {num_classes}"
            raise UserError("--keep-classes", problem, "give one for each class of this run, - for a class that has none")
        kept = {row: word for row, word in enumerate(words) if word != "-"}
        with about("--keep-classes", option="--labels"):
            rows = dict(zip(kept, source.condition.parse(kept.values()), strict=True))
    elif known:
        numbers = {}
        for number, name in enumerate(known):
            numbers.setdefault(plain(name), []).append(number)
        for row, name in enumerate(names[:num_classes]):
            found = numbers.get(plain(name), [])
            rows.pop(row, None)
            if row in found or len(found) == 1:  # of two classes called the same, ImageNet's cranes, the one at its place
                rows[row] = row if row in found else found[0]
    tables = (num_classes, label_dropout), (old["num_classes"], old["class_dropout_prob"])
    if all(dropout > 0 or number == 0 for number, dropout in tables):  # both have a row of the null class
        rows[num_classes] = old["num_classes"]
    return rows


def plain(name):
    """A class's name for comparison, without the WordNet number that tells two of the same name apart."""
    return comparable(re.sub(r" \(n\d{8}\)$", "", name))


def freeze(model, config, source=None):
    """Add the pairs of --lora-rank, and exclude the parameters that match a pattern of --freeze from training. config: a
    FinetuneConfig. source: the Checkpoint of the first weights (default: all of them). Returns lines for the log. Raises
    UserError for a pattern that matches none, and where no parameter is left to train."""
    lines, patterns = [], config.freeze
    if config.lora_rank:
        lines.append(lora.add(model, config.lora_rank, source and source.weights))
        if source:
            where = os.path.abspath(source.path) if os.path.exists(source.path) else source.path  # or a name on the hub
            model.base = {"path": where, "crc32": source.checksum, "average": source.average}
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
    if frozen:
        lines.append(f"Not trained (--freeze): {len(frozen)} of {len(parameters)} tensors, {values:,} values")
    return lines
