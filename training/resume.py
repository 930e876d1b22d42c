"""Resuming: find the checkpoint, compare its options with those of this run, restore."""

import contextlib
from pathlib import Path

from checkpoint import files
from checkpoint.config import ModelOptions
from checkpoint.opened import Checkpoint
from runtime.config import differences
from runtime.errors import UserError

# options of earlier versions, which a checkpoint may record: the value that all runs have now
REMOVED = {"loss_weight": "uniform", "ddp_comm": "fp32"}
MODEL = ModelOptions.defaults().keys() - {"image_size"}  # compared by the model's config


def find_checkpoint(how, folder, log):
    """(path, state) to resume from, (None, None) to start anew. The state of an automatic choice is read, and verified;
    that of a file that the user names is None. how: --resume. folder: of the run's checkpoints. Raises UserError."""
    if how == "none":
        if found := files.newest_first(folder):
            raise UserError(f"--resume none: {found[0].parent} holds checkpoints; choose another --run-dir, or resume")
        return None, None
    if how == "auto":
        return files.load_newest(folder, log)
    files.verify(how)
    return Path(how), None


def peek(run, num_heads=None):
    """The Checkpoint that a run with this RunConfig will resume from, or an earlier one of the same model, not verified;
    None where it starts anew, or where all are damaged, which find_checkpoint reports. num_heads: see `Checkpoint.open`."""
    how = run.how_to_resume
    if how not in ("auto", "none"):
        return Checkpoint.open(how, num_heads, verify=False)
    for path in files.newest_first(Path(run.run_dir) / "checkpoints") if how == "auto" else []:
        with contextlib.suppress(files.CheckpointError):  # damage alone: what cannot be read now must not be passed over
            checkpoint = Checkpoint.open(path, verify=False)
            if checkpoint.model_config:
                return checkpoint
    return None


def restore(trainer, path, state, options, fingerprint, log):
    """Restore the trainer from a checkpoint of ours, or of the original release, which records no position. Returns
    (training seconds so far, the latest updates that were skipped in a row).

    state: the file's dict, or None to read it here. options: of the run, a Config, to compare with the recorded ones.
    fingerprint: of the data. Raises UserError, before anything is changed, for another model, options or data."""
    # each process needs a part alone of what is sharded: mapped, the file is in the host's memory once
    state = files.load(path, mmap=bool(trainer.compute.shard), verify=False) if state is None else state
    checkpoint = Checkpoint(state, path, base=options.flat().get("init_from"))
    checkpoint.check_record()
    if not isinstance(state.get("opt"), dict):
        raise UserError(f"--resume {path}: holds weights alone, no optimizer state to continue from; use --init-from")
    step = checkpoint.step
    if step is None:
        if not Path(path).stem.isdecimal():
            raise UserError(f"--resume {path}: records no step; name the file as the release does, such as 0400000.pt")
        step = int(Path(path).stem)
    trainer.condition.check_same(checkpoint.condition, path)
    check_model(checkpoint, trainer.model.config)
    # options that the file does not know had their default: the original release has constants for them
    recorded = {**options.defaults(), **checkpoint.options}
    now = options.flat()
    ignored = options.changeable() | MODEL | ({"precision"} - checkpoint.options.keys())
    if trainer.recipe.lr_schedule == "cosine":
        ignored -= {"epochs", "max_steps"}  # the learning rate depends on the length of the run
    changes = differences(recorded, now, ignored)
    if (data := state.get("data", fingerprint)) != fingerprint:
        if not (isinstance(data, list) and len(data) == 2 and all(isinstance(value, int) for value in data)):
            raise UserError(f"{path}: damaged: its record of the data is {data!r:.50}")
        changes += [f"--data-path held {data[0]:,} images (checksum of names {data[1]:08x}), now other ones"]
    before = {name: checkpoint.options.get(name, value) for name, value in REMOVED.items()}
    removed = [f"{change} (the option was removed)" for change in differences(before, REMOVED)]
    changes += removed
    if changes and not now["allow_changes"]:
        way_out = "pass --allow-changes" if removed else "use the same, or pass --allow-changes"
        raise UserError(f"{path}: made with {'; '.join(changes)}; {way_out}")
    images_seen = state.get("images_seen", step * trainer.recipe.global_batch_size)
    if not isinstance(images_seen, int) or not 0 <= images_seen < 2**63:
        raise UserError(f"{path}: damaged: its images_seen is {images_seen!r:.50}")
    checkpoint.check_finite()
    try:
        trainer.load_state_dict({**state, "step": step, "images_seen": images_seen})
    except ValueError as error:
        raise UserError(f"{path}: its state does not fit this model ({error})") from None
    for change in changes:
        log(f"Changed on resuming: {change}")
    world_size = checkpoint.options.get("world_size", trainer.context.world_size)
    if world_size != trainer.context.world_size:
        log(f"The checkpoint is of {world_size} processes, now {trainer.context.world_size}: the order of images stays. "
            "Noise, timesteps and dropped labels, drawn per process, and the order of summation differ, so the result is "
            "not bit for bit that of an undisturbed run")  # fmt: skip
    found = (state.get("training_seconds"), float, 0.0), (state.get("bad_steps"), int, 0)
    return tuple(value if isinstance(value, kind) else otherwise for value, kind, otherwise in found)


def check_model(checkpoint, model_config):
    """Raises UserError where the checkpoint is of another model than `model_config`."""
    before, now = (
        {**c, "mlp_ratio": int(c["hidden_size"] * c["mlp_ratio"]) / c["hidden_size"]}  # what is inferred from the shapes
        for c in (checkpoint.model_config, model_config)
    )
    differing = [name for name in before if before[name] != now[name] and name != "class_dropout_prob"]
    if differing:  # no option can make these fit
        what = "; ".join(f"model {name} {before[name]}, now {now[name]}" for name in differing)
        way_out = "choose another --run-dir, or give that model's options"
        raise UserError(checkpoint.path, f"another model ({what})", way_out)
