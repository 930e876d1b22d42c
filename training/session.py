"""What guards a run: folder, lock, log, metrics, checkpoints, resuming, signals, and the agreement of ranks on stopping.

with Session(config, context, signals) as session:
    trainer = Trainer(...)
    session.resume(trainer, dataset, config.flat())
    for batch in session.batches():
        session.record(trainer.step(batch))
        if session.due(config.run.ckpt_every):
            session.save()
"""

import contextlib
import signal

import torch
from tqdm.auto import tqdm

from checkpoint import files as checkpoint_files
from checkpoint.saver import BackgroundSaver
from data.order import GlobalOrder, make_loader, next_batch
from runtime.distributed import first_sentence
from runtime.errors import RunError, UserError
from training import resume
from training.meter import Meter
from training.run_folder import open_run_folder
from training.throughput import peak_images_per_second


class Session:
    """Opens the run's folder on entry; on exit writes how the run ended and waits for the last checkpoint.

    config: has `run` (RunConfig), `recipe` (RecipeConfig), `data` (DataConfig) and `model`. context: the processes.
    signals: StopSignals. After the loop, exit_status is 0 when the run is finished or preempted, 130 after Ctrl-C."""

    def __init__(self, config, context, signals):
        self.config, self.context, self.signals = config, context, signals
        self.outcome, self.saved_step, self.exit_status = "failed", None, 0
        self.trainer = self.dataset = self.meter = self.bar = self.last_result = None

    def __enter__(self):
        self.run_dir, self.folder = open_run_folder(self.config.run, self.config.model.model, self.context)
        run = self.config.run
        self.saver = BackgroundSaver(f"{self.run_dir}/checkpoints", run.keep_last, run.keep_every)
        return self

    def __exit__(self, error_class, error, traceback):
        step = self.trainer.steps_made if self.trainer else None
        try:
            if error is None:
                self.context.run_on_all_ranks(self._finish_writing)
                self.context.barrier()
        except BaseException:
            self.outcome = "failed"
            raise
        finally:
            with contextlib.suppress(checkpoint_files.CheckpointError):  # the error under way is the one to report
                self.saver.wait()
            if error is not None:
                self.outcome = "failed"
                if self.trainer:
                    text = str(error) if isinstance(error, UserError) else first_sentence(error)
                    self.log(f"Stopped at step {step}: {text}")
            elif self.outcome == "finished":
                self.log(f"Done: {step} steps, run folder {self.run_dir}")
            elif self.outcome != "failed":
                how = f"the same command with --run-dir {self.run_dir}"
                self.log(f"Stopped ({self.outcome}), saved at step {step}; to resume, give {how}")
            if self.bar is not None:
                self.bar.close()
            if self.folder:
                self.folder.write_status(self.outcome, step)
                self.folder.close()

    def log(self, text):
        """Print a line and add it to log.txt, on rank 0."""
        if self.folder:
            self.folder.log(text)

    # ------------------------------------------------------------------------------------------------------------------
    # Resuming and saving

    def resume(self, trainer, dataset, options):
        """Restore the checkpoint that --resume names, if any, and begin to record. options: what options.json and the
        checkpoints store."""
        self.trainer, self.dataset, self.options = trainer, dataset, {**options, "world_size": self.context.world_size}
        context, how, seconds = self.context, self.config.run.how_to_resume, 0.0
        path, state = context.run_on_all_ranks(
            lambda: resume.find_checkpoint(how, self.saver.folder, self.log) if self.folder else (None, None)
        )
        path = context.broadcast(path)
        if path is not None:
            parts = (self.config, trainer.model.config, dataset.identity(), self.log)
            seconds = context.run_on_all_ranks(lambda: resume.restore(trainer, path, state, *parts))
        compute, tflops = self.config.compute, self.config.monitor.peak_tflops
        self.peak_speed = peak_images_per_second(trainer.model, context, compute.precision, tflops)
        self.saved_step = trainer.steps_made if path and path.parent == self.saver.folder else None
        record = {**self.options, "torch": torch.__version__}
        context.run_on_all_ranks(lambda: self.folder and self.folder.start(record, trainer.steps_made))
        self.meter = Meter(context.device, seconds)  # now, so that starting the trackers does not count as training
        if path is not None:
            self.log(f"Resumed from {path} at step {trainer.steps_made}")

    def save(self):
        """Start writing a checkpoint, unless there is one of this step."""
        if self.saved_step == self.trainer.steps_made:
            return
        self.context.run_on_all_ranks(self.saver.wait)
        state = self.trainer.state_dict()  # on all ranks: those of a sharded model give their parts
        if self.folder:
            state |= {
                "args": self.options,
                "model_config": self.trainer.model.config,
                "class_names": self.dataset.classes,
                "data": self.dataset.identity(),
                "training_seconds": self.meter.training_seconds(),
            }
            if text := self.trainer.text:
                state["text_encoder_crc32"] = text.crc32
            self.saver.save(self.trainer.steps_made, state, is_copy=bool(self.config.compute.shard))
        self.saved_step = self.trainer.steps_made

    def _finish_writing(self):
        self.saver.wait()
        if self.folder and self.folder.error:
            raise self.folder.error

    # ------------------------------------------------------------------------------------------------------------------
    # The loop

    def due(self, every):
        """Whether something that happens at every so many steps happens now. every: None for never."""
        return bool(every) and self.trainer.steps_made % every == 0

    def batches(self):
        """This rank's batches until the run ends. Before each one the ranks agree whether to go on: a signal, an unreadable
        image or a full disk of one rank stops all of them at the same step, after saving. They have to agree in every step,
        because a rank without a batch would leave the others waiting in the exchange of gradients."""
        trainer, total = self.trainer, self.config.recipe.total_steps(len(self.dataset))
        if trainer.steps_made >= total:
            self.log(
                f"Nothing left to do at step {trainer.steps_made} of {total}; raise --max-steps or --epochs to train longer"
            )
            self.outcome = "finished"
            return
        loader = iter(self._loader(total))
        # a data worker's death would raise anywhere, in the middle of an update too; next_batch notices it by itself
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.bar = tqdm(total=total, initial=trainer.steps_made, desc="Training", unit="step",
            disable=not self.context.is_main)  # fmt: skip
        try:
            while trainer.steps_made < total:
                batch, failure = next_batch(loader)
                write_failed = bool(self.saver.error or (self.folder and self.folder.error))
                stop, failed, write_failed = self.context.any([self.signals.requested, failure is not None, write_failed])
                if write_failed:
                    self.context.run_on_all_ranks(self._finish_writing)  # raises
                if failed:
                    self.save()
                    raise UserError(next(filter(None, self.context.all_gather(failure))))
                if stop:
                    interrupted = any(self.context.all_gather(self.signals.interrupted))
                    self.outcome = "interrupted" if interrupted else "preempted"
                    self.exit_status = 130 if interrupted else 0
                    self.save()
                    return
                yield batch
            self._check_finite()
            self.save()
            self.outcome = "finished"
        finally:
            del (
                loader
            )  # ends its workers, now: an error's traceback would keep them, and the interpreter would wait for them

    def _loader(self, total):
        recipe, context, seen = self.config.recipe, self.context, self.trainer.images_seen
        end = seen + (total - self.trainer.steps_made) * recipe.global_batch_size
        order = GlobalOrder(
            len(self.dataset), recipe.global_batch_size, recipe.global_seed, context.rank, context.world_size, seen, end
        )
        return make_loader(self.dataset, order, self.config.data.num_workers, pin_memory=context.device.type == "cuda")

    def record(self, result):
        """Add a step's result to the sums; every --log-every steps write a line to log.txt and a row to metrics.jsonl."""
        self.last_result = result
        self.meter.add(result.losses, result.grad_norm, result.finite, len(result.batch["label"]))
        for line in filter(None, result.batch["replaced"]):
            self.log(f"Skipped {line}")
        self.bar.update()
        if not self.due(self.config.run.log_every):
            return
        values = self.meter.summarise(self.context)
        if self.peak_speed:
            values["utilization"] = values["images_per_second"] / self.peak_speed
        self.bar.set_postfix_str(postfix(values, self.context.device))
        self.log(
            f"(step={self.trainer.steps_made:07d}) Train Loss: {values['loss']:.4f}, "
            f"Train Steps/Sec: {values['steps_per_second']:.2f}"
        )
        if values["skipped_steps"]:
            self.log(f"{values['skipped_steps']} updates skipped since the line before: loss or gradient not finite")
        values["learning_rate"] = self.trainer.optimizer.param_groups[0]["lr"]
        self.record_metrics(epoch=round(self.trainer.images_seen / len(self.dataset), 4), **values)
        self._check_finite()

    def record_metrics(self, **values):
        """Add a row of the present step to metrics.jsonl, on rank 0."""
        if self.folder:
            self.folder.write_metrics({"step": self.trainer.steps_made, **values})

    def record_fid(self, fid, num_samples):
        """Record FID, which rank 0 knows; None where a stop cut the measurement short."""
        step = f"(step={self.trainer.steps_made:07d})"
        if fid is None:
            self.log(f"{step} FID: not measured, a stop was asked for")
        else:
            self.log(f"{step} FID: {fid:.4f} of {num_samples:,} images")
            self.record_metrics(fid=fid, fid_samples=num_samples)

    def record_grid(self, picture):
        """Write a grid of images, the same PIL image on all ranks. Raises RunError, on all ranks, where it cannot be
        written."""
        step = self.trainer.steps_made
        path = self.context.run_on_main(lambda: self.folder.write_grid(step, picture))
        self.log(f"(step={step:07d}) Samples: {path}")

    def stop_requested(self):
        """Whether any rank was asked to stop. Every rank has to call this equally often."""
        return self.context.any([self.signals.requested])[0]

    def _check_finite(self):
        """Raises RunError, on all ranks, after too many updates in a row that were not finite."""
        bad, limit = int(self.meter.bad_in_a_row), self.config.recipe.max_bad_steps
        if bad < limit:
            return
        names = [
            self.dataset.name(int(i))
            for part in self.context.all_gather(self.last_result.batch["index"].tolist())
            for i in part
        ]
        with contextlib.suppress(checkpoint_files.CheckpointError):
            self.saver.wait()
        found = checkpoint_files.newest_first(self.saver.folder)
        last = f"the last good checkpoint is {found[0]}" if found else "there is no checkpoint yet"
        raise RunError(
            f"step {self.trainer.steps_made}: loss or gradient not finite, the last {bad} updates were skipped; {last}; "
            f"lower --lr, or look at the images of this batch: {', '.join(names)}"
        )


def postfix(values, device):
    """The end of the progress bar, whose beginning shows the steps and the time left."""
    parts = [f"loss {values['loss']:.4f}", f"{values['images_per_second']:,.4g} images/s"]
    if device.type == "cuda":
        parts.append(f"{values['peak_memory_gib']:.1f} GiB")
    if "utilization" in values:
        parts.append(f"{values['utilization']:.1%} of the peak")
    return ", ".join(parts)
