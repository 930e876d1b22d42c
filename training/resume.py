"""Resuming: find the checkpoint, compare its options with those of this run, restore."""

import contextlib
from pathlib import Path

from checkpoint import files
from checkpoint.opened import Checkpoint
from data.text_encoder import check_same
from runtime.config import differences
from runtime.errors import UserError
from training.config import TrainedDesign

DESIGN = {"model", *TrainedDesign.defaults()}  # compared by the model's config


def find_checkpoint(how, folder, log):
    """(path, state) to resume from, (None, None) to start anew. Every byte of the file is read, to see that it is not
    damaged. how: the value of --resume. folder: of the run's checkpoints. Raises UserError."""
    if how == "none":
        if found := files.newest_first(folder):
            raise UserError(f"--resume none: {found[0].parent} holds checkpoints; choose another --run-dir, or resume")
        return None, None
    if how == "auto":
        return files.load_newest(folder, log)
    if Path(how).is_file():
        files.verify(how)
    return Path(how), None


def peek(run):
    """The Checkpoint that a run with this RunConfig will resume from, or an earlier one of the same model, opened and not
    yet verified; None where the run starts anew, or where every file is damaged, which find_checkpoint reports."""
    how = run.how_to_resume
    if how not in ("auto", "none"):
        return Checkpoint.open(how)
    for path in files.newest_first(Path(run.run_dir) / "checkpoints") if how == "auto" else []:
        with contextlib.suppress(files.CheckpointError):
            checkpoint = Checkpoint.open(path)
            if checkpoint.model_config:
                return checkpoint
    return None


def restore(trainer, path, state, config, model_config, identity, log):
    """Restore the trainer from a checkpoint of ours, or of the original release, which records no position.

    state: the file's dict, or None to read it here. config: of the run, whose options are compared with the recorded ones.
    model_config: of the model that was built. identity: of the data. Raises UserError, before anything is changed, where
    the checkpoint is of another model or made with other options. Returns the training seconds so far."""
    # each process needs a part alone of what is sharded: mapped, the file is in the host's memory once
    state = files.load(path, mmap=bool(config.compute.shard)) if state is None else state
    checkpoint = Checkpoint(state, path)
    checkpoint.check_record()
    if not isinstance(state.get("opt"), dict):
        raise UserError(f"--resume {path}: holds weights alone, no optimizer state to continue from")
    step = checkpoint.step
    if step is None:
        if not Path(path).stem.isdecimal():
            raise UserError(f"--resume {path}: records no step; name the file as the release does, such as 0400000.pt")
        step = int(Path(path).stem)
    if trainer.text:
        check_same("--text-encoder", trainer.text, state.get("text_encoder_crc32"), path)
    changes = compare(checkpoint, config, model_config, identity)
    if changes and not config.run.allow_changes:
        raise UserError(f"{path}: made with {'; '.join(changes)}; use the same, or pass --allow-changes")
    images_seen = state.get("images_seen", step * config.recipe.global_batch_size)
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
    if isinstance(progress := state.get("progress"), list):  # files of older versions: an entry for each process
        world_size = len(progress)
    if world_size != trainer.context.world_size:
        log(
            f"The checkpoint is of {world_size} processes, now {trainer.context.world_size}: training resumes with the "
            "rest of the epoch in the same order. Noise, timesteps and dropped labels, drawn per process, and the order of "
            "summation differ, so the result is not bit for bit that of an undisturbed run"
        )
    seconds = state.get("training_seconds", 0.0)
    return seconds if isinstance(seconds, float) else 0.0


def compare(checkpoint, config, model_config, identity):
    """What differs from the checkpoint and changes the result, as phrases. Raises UserError for another model."""
    before, now = (
        {**c, "mlp_ratio": int(c["hidden_size"] * c["mlp_ratio"]) / c["hidden_size"]}  # what is inferred from the shapes
        for c in (checkpoint.model_config, model_config)
    )
    differing = [
        f"model {name} {before[name]}, now {now[name]}"
        for name in before
        if before[name] != now[name] and name != "class_dropout_prob"
    ]
    if differing:  # no option can make these fit
        raise UserError(f"{checkpoint.path}: another model ({'; '.join(differing)})")
    # options that the file does not know had their default: files of older versions left out what was None
    recorded = {**config.defaults(), **checkpoint.options}
    ignored = config.changeable() | DESIGN | ({"precision"} - checkpoint.options.keys())
    if config.recipe.lr_schedule == "cosine":
        ignored -= {"epochs", "max_steps"}  # the learning rate depends on the length of the run
    changed = differences(recorded, config.flat(), ignored)
    data = checkpoint.state.get("data", identity)
    if data != identity:
        if not (isinstance(data, list) and len(data) == 2 and all(isinstance(value, int) for value in data)):
            raise UserError(f"{checkpoint.path}: damaged: its record of the data is {data!r:.50}")
        changed.append(f"--data-path held {data[0]:,} images (checksum of names {data[1]:08x}), now other ones")
    return changed
