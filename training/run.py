"""A run: training that is recorded, can be stopped at any time, and resumes where it stopped.

with run_folder(config.run, config.model.name, context) as folder:
    run = Run(config, context, folder, trainer, dataset, watchers, signals)    # restores the newest checkpoint
    for batch in run.batches():
        run.record(trainer.step(batch))
        run.watch()
"""

import torch
from PIL import Image
from tqdm.auto import tqdm

from checkpoint import files as checkpoint_files
from checkpoint.opened import name_of, record_of
from checkpoint.saver import BackgroundSaver
from data.order import make_loader, next_batch, order_of
from runtime.config import flag
from runtime.devices import precision_warning
from runtime.errors import RunError, UserError
from training import resume
from training.config import PRESETS
from training.cost import peak_images_per_second
from training.grids import write_animation
from training.meter import Meter


class Run:
    """config: TrainConfig. folder: RunFolder. watchers: see `training.watchers`. signals: StopSignals. All ranks make one.
    Making it restores the checkpoint that --resume names, if any, and begins to record. After the loop, exit_status is 0
    when the run is finished or preempted, 130 after Ctrl-C. Raises UserError for a checkpoint that cannot be resumed."""

    def __init__(self, config, context, folder, trainer, dataset, watchers=(), signals=None):
        self.config, self.context, self.folder, self.trainer, self.dataset = config, context, folder, trainer, dataset
        self.watchers, self.signals, self.log, self.exit_status = [*watchers], signals, folder.log, 0
        self.bar, self.last_result, self.skipped = None, None, set()
        self.total_steps = config.recipe.total_steps(len(dataset))
        self.options = {**config.flat(), "world_size": context.world_size}
        self.saver = folder.saver = BackgroundSaver(folder.checkpoints, config.run.keep_last, config.run.keep_every)
        path, state, seconds, bad_steps = None, None, 0.0, 0
        with context.together():
            if context.is_main:
                path, state = resume.find_checkpoint(config.run.how_to_resume, folder.checkpoints, self.log)
        path = context.broadcast(path)
        if path is not None:
            with context.together():
                seconds, bad_steps = resume.restore(trainer, path, state, config, dataset.fingerprint(), self.log)
        self.saved_step = trainer.steps_made if path and path.parent == folder.checkpoints else None
        precision, peak = config.compute.precision, config.monitor.peak_tflops
        self.peak_speed = peak_images_per_second(trainer.model, context, precision, peak, config.recipe.guidance_in_target)
        with context.together():
            folder.start({**self.options, "torch": torch.__version__}, trainer.steps_made)
        folder.step = trainer.steps_made
        self.meter = Meter(context.device, seconds, bad_steps)  # now: starting the trackers does not count as training
        if path is not None:
            self.log(f"Resumed from {path} at step {trainer.steps_made}")
        if bad_steps:
            self.log(f"{path.name} was written after {bad_steps} updates that were skipped, loss or gradient not finite; "
                "if it goes on so, --resume an earlier one")  # fmt: skip

    def introduce(self, lines=()):
        """Log what is trained on what, and lines of `setup.prepare`."""
        config, trainer, dataset, recipe = self.config, self.trainer, self.dataset, self.config.recipe.recipe
        parameters, where = sum(p.numel() for p in trainer.ema.weights), self.context.describe()
        precision, now = config.compute.precision, config.flat()
        name = f"{name_of(trainer.model.config)} ({trainer.model.block})"
        self.log(f"{name}, {parameters:,} trainable parameters, {precision}, {where}")
        if config.compute.shard:
            number = trainer.mesh["shard"].size()
            self.log(f"Weights, gradients, optimizer state and EMA are divided among {number} processes (--shard)")
        images = f"{len(dataset):,} images of {len(dataset.classes)} classes from {config.data.data_path}"
        self.log(f"{images}; run folder {self.folder.path}")
        if preset := " ".join(f"{flag(name)} {now[name]}" for name in PRESETS[recipe]):
            self.log(f"--recipe {recipe} is {preset}")
        for line in filter(None, [*lines, precision_warning(precision, trainer.device)]):
            self.log(line)

    def batches(self):
        """This rank's batches until the run ends. Before each one the ranks agree whether to go on: a signal, an unreadable
        image or a full disk of one rank stops all of them at the same step, after saving. They have to agree in every step,
        because a rank without a batch would leave the others waiting in the exchange of gradients."""
        trainer, total = self.trainer, self.total_steps
        if trainer.steps_made >= total:
            also = ", and pass --allow-changes" if trainer.recipe.lr_schedule == "cosine" else ""  # whose course changes
            way_out = f"raise --max-steps or --epochs{also}"
            self.log(f"Nothing left to do at step {trainer.steps_made} of {total}; to go on, {way_out}")
            self.folder.outcome = "finished"
            return
        loader = iter(self._loader())
        shown = {"desc": "Training", "unit": "step", "disable": not self.context.is_main}
        self.bar = tqdm(total=total, initial=trainer.steps_made, **shown)
        try:
            while trainer.steps_made < total:
                batch, failure = next_batch(loader)
                stop = self.signals is not None and self.signals.requested
                write_failed = bool(self.saver.error or self.folder.error)
                stop, failed, write_failed = self.context.any([stop, failure is not None, write_failed])
                if write_failed:
                    with self.context.together():  # raises
                        self.folder.finish_writing()
                if failed:
                    if trainer.steps_made:  # else nothing would be lost, and options of another run would be refused
                        self.save()
                    raise UserError(next(filter(None, self.context.all_gather(failure))))
                if stop:
                    interrupted = any(self.context.all_gather(self.signals.interrupted))
                    self.folder.outcome = "interrupted" if interrupted else "preempted"
                    self.exit_status = 130 if interrupted else 0
                    self.save()
                    return
                yield batch
            self._check_finite()
            self.save()
            self.watch(at_end=True)
            film = self.folder.path / "samples.gif"
            if self.context.on_main(write_animation, self.folder.path, film):
                self.log(f"Animation of the samples: {film}")
            self.folder.outcome = "finished"
        finally:
            # ends its workers, now: an error's traceback would keep them, and the interpreter would wait for them
            del loader
            self.bar.close()

    def _loader(self):
        recipe, context, seen = self.config.recipe, self.context, self.trainer.images_seen
        size, seed = recipe.global_batch_size, recipe.global_seed
        end = seen + (self.total_steps - self.trainer.steps_made) * size
        order = order_of(self.dataset, size, seed, context.rank, context.world_size, seen, end)
        return make_loader(self.dataset, order, self.config.data.num_workers, pin_memory=context.device.type == "cuda")

    def _due(self, every):
        return bool(every) and self.trainer.steps_made % every == 0

    def record(self, result):
        """Add a step's result to the sums; every --log-every steps write a line to log.txt and a row to metrics.jsonl."""
        self.last_result, self.folder.step = result, self.trainer.steps_made
        self.meter.add(result.losses, result.grad_norm, result.finite, len(result.batch["label"]))
        for line in sorted({*result.batch["replaced"]} - self.skipped - {""}):
            self.log(f"Skipped {line}")
            self.skipped.add(line)
        self.bar.update()
        if self._due(self.config.run.log_every):
            values = self.meter.summarise(self.context)
            if self.peak_speed:
                values["utilization"] = values["images_per_second"] / self.peak_speed
            self.bar.set_postfix_str(postfix(values, self.context.device))
            speed = f"{values['steps_per_second']:.2f}"
            self.log(f"(step={self.trainer.steps_made:07d}) Train Loss: {values['loss']:.4f}, Train Steps/Sec: {speed}")
            if values["skipped_steps"]:
                self.log(f"{values['skipped_steps']} updates skipped since the line before: loss or gradient not finite; "
                    "the averaged weights move on towards the weights as they are")  # fmt: skip
            values["learning_rate"] = self.trainer.optimizer.param_groups[0]["lr"]
            epoch = round(self.trainer.images_seen / len(self.dataset), 4)
            self.folder.write_metrics(self.trainer.steps_made, {"epoch": epoch, **values})
            self._check_finite()

    def watch(self, at_end=False):
        """Call the watchers that are due, and write a checkpoint every --ckpt-every steps, before those that are `slow`.
        at_end: call those that want to be called after the last step, and were not."""
        for slow in (False, True):
            for watcher in self.watchers:
                due = self._due(watcher.every)
                due = getattr(watcher, "at_end", False) and not due if at_end else due
                if due and getattr(watcher, "slow", False) == slow:
                    with self.meter.paused():
                        self._call(watcher)
            if not slow and not at_end and self._due(self.config.run.ckpt_every):
                self.save()

    def _call(self, watcher):
        try:
            found = watcher(self.trainer)
        except RunError:
            raise
        except UserError as error:  # training need not end for it
            found = f"{type(watcher).__name__}: {error}"
        step, line = self.trainer.steps_made, found
        if isinstance(found, dict) and self.context.is_main:
            images = {name: value for name, value in found.items() if isinstance(value, Image.Image)}
            for name, image in images.items():
                self.folder.write_image(step, name, image)
            numbers, line = {name: value for name, value in found.items() if name not in images}, None
            if numbers:
                self.folder.write_metrics(step, numbers)
                as_text = getattr(watcher, "line", lambda v: ", ".join(f"{n} {value:.4g}" for n, value in v.items()))
                line = as_text(numbers)
        if line:
            self.log(f"(step={step:07d}) {line}")

    def save(self):
        """Start writing a checkpoint, unless there is one of this step."""
        if self.saved_step == self.trainer.steps_made:
            return
        with self.context.together():
            self.folder.finish_writing()
        state = self.trainer.state_dict()  # on all ranks: those of a sharded model give their parts
        if self.context.is_main:
            state |= {"args": self.options, **record_of(self.trainer.model, self.dataset.classes)}
            if self.trainer.model.own:
                state["base"] = self.trainer.model.base
            if statistics := getattr(self.trainer.space, "statistics", None):
                state["latents"] = statistics
            state |= {"data": self.dataset.fingerprint(), "training_seconds": self.meter.training_seconds()}
            state["bad_steps"] = int(self.meter.bad_in_a_row)
            self.saver.save(self.trainer.steps_made, state, is_copy=bool(self.config.compute.shard))
        self.saved_step = self.trainer.steps_made

    def _check_finite(self):
        """Raises RunError, on all ranks, after too many updates in a row that were not finite."""
        bad, limit = int(self.meter.bad_in_a_row), self.config.recipe.max_bad_steps
        if bad < limit:
            return
        parts = self.context.all_gather(self.last_result.batch["index"].tolist())
        names = [self.dataset.name(int(i)) for part in parts for i in part]
        with self.context.together():
            self.folder.finish_writing()
        # the last update that was made may have broken the weights: a checkpoint is good if an update was made from it
        found, broken = checkpoint_files.newest_first(self.folder.checkpoints), self.trainer.steps_made - bad
        good = [path for path in found if int(path.stem) < broken]
        last, way_out = "there is no good checkpoint", "start in another folder with a lower --lr"
        if good:
            last = f"the last good checkpoint is {good[0]}"
            way_out = f"give the same command with --resume {good[0]} --allow-changes and a lower --lr"
        problem = f"loss or gradient not finite, the last {bad} updates were skipped; {last}"
        way_out += f", or look at the images of this batch: {', '.join(names)}"
        raise RunError(f"step {self.trainer.steps_made}", problem, way_out)


def postfix(values, device):
    """The end of the progress bar, whose beginning shows the steps and the time left."""
    parts = [f"loss {values['loss']:.4f}", f"{values['images_per_second']:,.4g} images/s"]
    if device.type == "cuda":
        parts.append(f"{values['peak_memory_gib']:.1f} GiB")
    if "utilization" in values:
        parts.append(f"{values['utilization']:.1%} of the peak")
    return ", ".join(parts)
