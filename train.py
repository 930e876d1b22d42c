"""Train a DiT on images: an image folder (one folder a class), or scikit-learn's digits.

    torchrun --nproc_per_node=8 train.py --model DiT-XL/2 --data-path /path/to/imagenet/train
    python train.py --data-path digits --vae none --image-size 8 --num-classes 10 --model DiT-S/2 --max-steps 1500

The recipe is the paper's (section 4): AdamW, constant learning rate 1e-4, no weight decay, batch 256, horizontal flips, EMA
0.9999. A command with --run-dir, given again, resumes where the run stopped.
"""

import argparse
import contextlib
import math
import signal
import sys
import zlib
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from checkpoint import files as checkpoint
from cli import options
from data import autoencoder as latents
from data import images as data
from data import stored_latents as latent_folder
from data.images import center_crop_arr, next_batch  # noqa: F401 -- the former is known to users as train.center_crop_arr
from diffusion import create_diffusion
from models import DiT_models
from runtime import devices, distributed, seeds
from runtime.errors import RunError, UserError
from training import run_folder
from training.ema import EMA
from training.watch import BadSteps, Progress, StopSignals

# What may differ between a run and its continuation; every other option changes the result.
FREE = {
    "data_path", "results_dir", "run_dir", "resume", "allow_changes", "epochs", "max_steps", "log_every", "ckpt_every",
    "keep_last", "keep_every", "num_workers", "device", "max_bad_steps", "class_names", "eval_every", "eval_reference",
    "eval_samples", "eval_cfg_scale", "eval_sampling_steps", "inception_weights", "compile", "grad_accum",
    "grad_checkpoint",
}  # fmt: skip


def parse_args(argv=None):
    parser = options.Parser(__doc__.split("\n")[0])
    parser.add_argument("--data-path", required=True, help="an image folder, one folder a class; a folder of latents "
        'that extract_latents.py has made of one; or "digits"')  # fmt: skip
    parser.add_argument("--results-dir", default="results", help="where numbered run folders are made")
    parser.add_argument("--run-dir", help="an explicit run folder, in place of a numbered one; resumes what is there")
    options.add_model_options(parser, vae="ema")
    options.add_design_options(parser)

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=options.positive, default=1400, help="passes over the data")
    add("--max-steps", type=options.positive, help="stop after this many updates, if that is earlier")
    add("--global-batch-size", type=options.positive, default=256, help="images an update, over all processes")
    add("--global-seed", type=options.count, default=0, help="seed of everything random")
    add("--lr", type=options.number(above=0), default=1e-4, help="learning rate, constant")
    add("--betas", type=options.number(low=0, high=0.999999), nargs=2, default=[0.9, 0.999], help="AdamW's")
    add("--weight-decay", type=options.number(low=0), default=0.0, help="AdamW's")
    add("--clip-grad-norm", type=options.number(above=0), help="scale gradients down to this norm (default: off)")
    add("--ema-decay", type=options.number(low=0, high=1), default=0.9999, help="of the averaged weights")
    add("--ema-warmup", action="store_true", help="start from a low decay, for short runs")
    add("--label-dropout", type=options.number(low=0, high=1), default=0.1, help="share of labels made null, for guidance")
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror half of the images")
    add("--precision", choices=["fp32", "tf32", "bf16"],
        help="of matrix products (default: bf16 on GPUs that have it, else fp32)")  # fmt: skip
    options.add_compile_option(parser)
    add("--grad-accum", type=options.positive, default=1, metavar="K",
        help="split each process's batch in K, one after the other in memory; the update is the same")  # fmt: skip
    add("--grad-checkpoint", type=options.count, default=0, metavar="K", help="keep no activations of every K-th block and "
        "compute them again for the gradient: 1 saves most memory, 0 is off; the update is the same")  # fmt: skip
    options.add_device_option(parser)
    add("--num-workers", type=options.count, default=4, help="processes that read images, per training process")
    add("--skip-bad-images", action="store_true", help="replace unreadable images by the next readable one")
    add("--max-bad-steps", type=options.positive, default=10, help="stop after so many non-finite updates in a row")

    add = parser.add_argument_group("record").add_argument
    add("--log-every", type=options.positive, default=100, help="steps between lines of the log")
    add("--ckpt-every", type=options.positive, default=50_000, help="steps between checkpoints")
    add("--keep-last", type=options.count, default=0, help="checkpoints to keep; 0 keeps all")
    add("--keep-every", type=options.count, default=0, help="also keep those whose step this divides")
    add("--resume", help='"auto" (the latest whole one in --run-dir, if any), "none", or a checkpoint\'s path '
        "(default: auto with --run-dir, else none)")  # fmt: skip
    add("--allow-changes", action="store_true", help="resume although options that change the result differ")

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval-every", type=options.positive, help="steps between measurements of the average's FID (default: none)")
    add("--eval-reference", metavar="FILE", help="what to compare with: .npz or folder of images, as for evaluate.py")
    add("--eval-samples", type=options.number(int, low=2), default=10_000, help="images to draw for it; FID falls with "
        "their number, so compare equal ones only")  # fmt: skip
    add("--eval-cfg-scale", type=options.number(low=0), default=1.0, help="guidance weight of these; 1 turns guidance off")
    add("--eval-sampling-steps", type=options.number(int, low=1, high=1000), default=250, help="DDPM steps of these")
    add("--inception-weights", metavar="PATH", help="the Inception network's state dict (default: torch-fidelity's, "
        "downloaded)")  # fmt: skip
    args = parser.parse_args(argv)

    args.resume = args.resume or ("auto" if args.run_dir else "none")
    if args.resume == "auto" and not args.run_dir:
        parser.error("--resume auto: needs --run-dir, the folder to look in")
    if args.data_path == "digits" and args.vae != "none":
        parser.error("--vae: the digits are 8x8 pixels, too small for an autoencoder; pass --vae none")
    if bool(args.eval_every) != bool(args.eval_reference):
        parser.error("--eval-every and --eval-reference: both are needed, or neither")
    if args.eval_cfg_scale != 1 and args.label_dropout == 0 and args.num_classes:
        parser.error(
            f"--eval-cfg-scale {args.eval_cfg_scale}: guidance needs null labels, and --label-dropout is 0; pass 1"
        )
    if args.inception_weights and not Path(args.inception_weights).is_file():
        parser.error(f"--inception-weights {args.inception_weights}: no such file; without the option it is downloaded")
    return parser, args


def main(argv=None):
    parser, args = parse_args(argv)
    stop = StopSignals()
    with parser.reporting():
        try:
            status = train(args, distributed.setup(args.device), stop)
        except KeyboardInterrupt:
            status = 130
        finally:
            distributed.close()
    sys.exit(status)


def train(args, context, stop):
    """Train as args say. Returns the exit status: 0 when finished or preempted, 130 after Ctrl-C."""
    if args.run_dir and context.is_main and Path(args.run_dir).is_dir():
        run_folder.mark_started(args.run_dir)
    dataset, space, model = context.run_on_all_ranks(lambda: prepare(args, context))
    if any(identity != data_identity(dataset) for identity in context.all_gather(data_identity(dataset))):
        raise UserError(f"--data-path {args.data_path}: the processes do not see the same images")
    evaluator = None
    if args.eval_every:
        from evaluation.during_training import Evaluator  # with SciPy and torch-fidelity, which take seconds to import

        evaluator = Evaluator(args, context, space)
    folder = open_folder(args, context)
    try:
        trainer = Trainer(args, context, model, space.place(context.device))
        source = resume(trainer, dataset, folder)
        return run(trainer, dataset, folder, stop, source, evaluator)
    finally:
        if folder:
            folder.close()


def prepare(args, context):
    """(dataset, latent space, model), or a UserError for what cannot work, before anything that takes long."""
    stored = latent_folder.recognised(args.data_path)
    if stored:
        dataset = latent_folder.Latents(args.data_path, args.global_seed, args.flip)
    else:
        dataset = data.load(args.data_path, args.image_size, args.global_seed, args.flip, args.skip_bad_images)
    check_data(args, dataset, context)
    space = dataset.space(args.vae, decodes=args.eval_every) if stored else latents.load(args.vae, dataset.channels)
    bf16 = context.device.type == "cuda" and devices.has_bf16(context.device)
    args.precision = args.precision or ("bf16" if bf16 else "fp32")
    options.check_compile(args.compile, context.device.type)
    return dataset, space, build_model(args, space)


def run(trainer, dataset, folder, stop, source, evaluator=None):
    args, context = trainer.args, trainer.context
    say = folder.log if folder else lambda text: None
    total_steps = args.epochs * len(dataset) // args.global_batch_size
    total_steps = min(total_steps, args.max_steps or total_steps)
    record = {**vars(args), "world_size": context.world_size, "torch": torch.__version__}
    context.run_on_all_ranks(lambda: folder and folder.start(record, trainer.step))
    introduce(trainer, dataset, source, say)
    if trainer.step >= total_steps:
        say(f"Nothing left to do at step {trainer.step} of {total_steps}; raise --max-steps or --epochs to go on")
        if folder:
            folder.mark("finished", trainer.step)
        return 0

    batches = iter(read_batches(trainer, dataset, total_steps))
    # a worker's death would raise anywhere, in the middle of an update too; next_batch finds it out by itself
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    progress, bad_steps = trainer.progress, BadSteps(args.max_bad_steps)
    writer = checkpoint.Writer(Path(args.run_dir) / "checkpoints", args.keep_last, args.keep_every)
    outcome, saved = "failed", trainer.step if source and source.parent == writer.folder else None

    def save():
        nonlocal saved
        if saved == trainer.step:
            return
        context.run_on_all_ranks(writer.wait)
        state = trainer.state(dataset)  # all ranks take part: each has its share of the sums
        if folder:
            writer.save(trainer.step, state)
        saved = trainer.step

    def finish_writing():
        writer.wait()
        if folder and folder.error:
            raise folder.error

    bar = tqdm(total=total_steps, initial=trainer.step, desc="Training", unit="step", disable=not context.is_main)
    try:
        while trainer.step < total_steps:
            batch, failure = next_batch(batches)
            bad_steps.count(say)
            unwritten = bool(writer.error or (folder and folder.error))
            stopping, failed, diverged, unwritten = context.any(
                [stop.requested, failure is not None, bad_steps.too_many, unwritten]
            )
            if unwritten:
                context.run_on_all_ranks(finish_writing)  # raises
            if failed:
                save()
                raise UserError(next(filter(None, context.all_gather(failure))))
            if diverged:
                indices = [index for part in context.all_gather(bad_steps.batch) for index in part]
                raise RunError(
                    f"step {bad_steps.step}: loss or gradient not finite, {args.max_bad_steps} updates in a row skipped; "
                    f"{last_checkpoint(writer)}; lower --lr, or look at its batch: {', '.join(map(dataset.name, indices))}"
                )
            if stopping:
                ending = "interrupted" if any(context.all_gather(stop.by_hand)) else "preempted"
                save()
                break
            finite = trainer.update(batch)
            bad_steps.note(trainer.step, batch["index"].tolist(), finite)
            for line in filter(None, batch["replaced"]):
                say(f"Skipped {line}")
            bar.update()
            if trainer.step % args.log_every == 0:
                values = progress.summarise(context)
                bar.set_postfix(loss=f"{values['loss']:.4f}")
                speed = values["steps_per_second"]
                say(f"(step={trainer.step:07d}) Train Loss: {values['loss']:.4f}, Train Steps/Sec: {speed:.2f}")
                if folder:
                    epoch = round(trainer.images_seen / len(dataset), 4)
                    folder.metrics(step=trainer.step, epoch=epoch, **values)
            if trainer.step % args.ckpt_every == 0 or trainer.step == total_steps:
                save()
            if evaluator and trainer.step % args.eval_every == 0:
                with progress.paused():
                    fid = evaluator(trainer.ema.module, stop)
                if fid is not None:
                    say(f"(step={trainer.step:07d}) FID: {fid:.4f} of {args.eval_samples:,} images")
                    folder.metrics(step=trainer.step, fid=fid, fid_samples=args.eval_samples)
                else:
                    say(f"(step={trainer.step:07d}) FID: not measured, a stop was asked for")
        else:
            ending = "finished"
        context.run_on_all_ranks(finish_writing)
        outcome = ending
    except BaseException as error:
        with contextlib.suppress(checkpoint.CheckpointError):  # the error under way is the one to tell
            writer.wait()
        say(f"Stopped at step {trainer.step}: {str(error) or type(error).__name__}")
        raise
    finally:
        # now, while this process can tell its data workers to end: an error's traceback would keep them until the
        # interpreter's exit, which sends them SIGTERM, which they ignore, and waits for them for ever
        del batches
        bar.close()
        if folder:
            folder.mark(outcome, trainer.step)
    context.barrier()
    if outcome == "finished":
        say(f"Done: {trainer.step} steps, run folder {args.run_dir}")
        return 0
    say(
        f"Stopped ({outcome}), saved at step {trainer.step}; to resume, give the same command with --run-dir {args.run_dir}"
    )
    return 130 if outcome == "interrupted" else 0


class Trainer:
    """What an update changes - the weights, their average, the optimizer, the position in the data - and how."""

    def __init__(self, args, context, model, space):
        self.args, self.context, self.space, device = args, context, space, context.device
        self.model = model.to(device).train()
        model.y_embedder.eval()  # labels are dropped in `update`, for the whole batch
        model.checkpoint_every = args.grad_checkpoint
        self.ema = EMA(model, args.ema_decay, args.ema_warmup)
        self.diffusion = create_diffusion("")
        # all parameters, the frozen one too: its place is part of the state's layout in existing checkpoints
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=args.lr, betas=tuple(args.betas), weight_decay=args.weight_decay, fused=True
        )
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
        if device.type == "cuda":
            torch.set_float32_matmul_precision("highest" if args.precision == "fp32" else "high")
        if args.compile:
            # would cut blocks where DDP's buckets end; a block's gradients are ready together as it is
            torch._dynamo.config.optimize_ddp = False
            for network in (model, self.ema.module):
                network.compile_blocks(args.compile)
        self.parallel_model = model
        if context.world_size > 1:
            ids = [device] if device.type == "cuda" else None  # the local device, not the global rank
            self.parallel_model = DistributedDataParallel(
                model, device_ids=ids, gradient_as_bucket_view=True,
                static_graph=args.grad_accum == 1,  # it counts on one backward pass an update
            )  # fmt: skip
        self.step = self.images_seen = 0
        self.progress = Progress(device)

    def update(self, batch):
        """One step of the recipe on this rank's part of the batch. Returns whether it was finite, on the device."""
        args, device = self.args, self.context.device
        # noise, timesteps and null labels belong to (seed, step, rank): there is no random state to save or to lose
        torch.manual_seed(seeds.torch_seed(args.global_seed, seeds.TRAINING_STEP, self.step, self.context.rank))
        y = batch["label"].to(device, non_blocking=True)
        if args.num_classes == 0:
            y = torch.zeros_like(y)
        x_0 = draw_x_0(self.space, batch, device)
        t = torch.randint(self.diffusion.num_timesteps, (len(x_0),), device=device)
        noise = torch.randn_like(x_0)
        losses = self.accumulate(x_0, t, noise, self.model.y_embedder.drop(y))
        finite = self.descend()
        self.step += 1
        self.images_seen += args.global_batch_size
        self.progress.add(losses, self.grad_norm, finite, len(x_0))
        return finite

    def accumulate(self, x_0, t, noise, y):
        """Leave the gradient of the mean loss in the parameters, from --grad-accum parts of the batch in turn. All that is
        random was drawn for the whole batch, so their number changes the result by rounding alone. Returns the losses, (N,)
        each."""
        self.optimizer.zero_grad()
        num_parts, found = self.args.grad_accum, []
        parts = zip(*(values.tensor_split(num_parts) for values in (x_0, t, noise, y)), strict=True)
        for i, (x_0_i, t_i, noise_i, y_i) in enumerate(parts, 1):
            exchange = self.context.world_size == 1 or i == num_parts  # the ranks share the last sum, not the parts
            with contextlib.nullcontext() if exchange else self.parallel_model.no_sync():
                with self.autocast:
                    losses = self.diffusion.training_losses(self.parallel_model, x_0_i, t_i, {"y": y_i}, noise_i)
                (losses["loss"].sum() / len(x_0)).backward()
            found.append({name: values.detach() for name, values in losses.items()})
        return {name: torch.cat([losses[name] for losses in found]) for name in found[0]}

    def descend(self):
        """Follow the gradient, unless it is not finite: then the fused optimizer leaves weights and state alone, on the
        device, on all ranks alike (they share the averaged gradient), and the host need not know."""
        weights = self.ema.weights
        self.grad_norm = torch.nn.utils.get_total_norm([p.grad for p in weights])
        if self.args.clip_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(weights, self.args.clip_grad_norm, self.grad_norm)
        finite = self.grad_norm.isfinite()
        self.optimizer.found_inf = (~finite).float()
        self.optimizer.step()
        self.ema.update(self.step)
        return finite

    def state(self, dataset):
        """The checkpoint's dict. Every rank has to call this."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict(),
            "opt": self.optimizer.state_dict(),
            "args": {name: value for name, value in vars(self.args).items() if value is not None},
            "step": self.step,
            "images_seen": self.images_seen,
            "progress": self.context.all_gather(self.progress.state()),
            "data": data_identity(dataset),
        }

    def restore(self, state):
        """Take up a checkpoint of ours, or of the original release, which holds neither step nor position."""
        self.model.load_state_dict(state["model"])
        self.ema.module.load_state_dict(state["ema"])
        hyperparameters = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        saved = {**state["opt"], "param_groups": [
            {**theirs, **ours} for theirs, ours in zip(state["opt"]["param_groups"], hyperparameters, strict=True)
        ]}  # fmt: skip
        self.optimizer.load_state_dict(saved)
        self.step = state["step"]
        self.images_seen = state.get("images_seen", self.step * self.args.global_batch_size)
        if "progress" in state:
            self.progress.restore(state["progress"], self.context)


def draw_x_0(space, batch, device):
    """x_0 (N, C, h, w) of a batch's images, or of their stored moments: a fresh draw either way."""
    if "moments" in batch:
        return space.sample(batch["moments"].to(device, non_blocking=True))
    return space.encode(data.to_model_range(batch["image"].to(device, non_blocking=True)))


def check_data(args, dataset, context):
    """Refuse, before anything slow, what cannot be trained on."""
    if isinstance(dataset, latent_folder.Latents):
        dataset.check(args.image_size, args.skip_bad_images)
    check_batch(args, context.world_size)
    if args.num_classes and len(dataset.classes) > args.num_classes:
        raise UserError(
            f"--num-classes {args.num_classes}: {args.data_path} has {len(dataset.classes)} classes; "
            f"pass --num-classes {len(dataset.classes)}, or 0 to ignore them"
        )
    if args.epochs * len(dataset) < args.global_batch_size:
        raise UserError(
            f"--global-batch-size {args.global_batch_size}: more than the {args.epochs * len(dataset)} images of all "
            f"epochs; lower it, or raise --epochs"
        )
    args.class_names = dataset.classes


def check_batch(args, world_size):
    if args.global_batch_size % world_size:
        raise UserError(
            f"--global-batch-size {args.global_batch_size}: not a multiple of the {world_size} processes; "
            f"{math.ceil(args.global_batch_size / world_size) * world_size} is"
        )
    if args.grad_accum * world_size > args.global_batch_size:
        raise UserError(
            f"--grad-accum {args.grad_accum}: more than the {args.global_batch_size // world_size} images that a process "
            "has of each batch; lower it"
        )


def build_model(args, space):
    """The DiT that args name, initialised from --global-seed; notes its resolved sizes in args."""
    design = options.design(args)
    patch_size = design.get("patch_size", DiT_models[args.model].keywords["patch_size"])
    options.check_image_size(args.image_size, space.factor, patch_size)
    torch.manual_seed(args.global_seed)
    try:
        model = DiT_models[args.model](
            input_size=args.image_size // space.factor,
            in_channels=space.channels,
            class_dropout_prob=args.label_dropout,
            num_classes=args.num_classes,
            **design,
        )
    except ValueError as error:
        raise UserError(f"--model {args.model} with these overrides: {error}") from None
    args.hidden_size, args.depth, args.patch_size = model.pos_embed.shape[-1], len(model.blocks), patch_size
    args.num_heads = model.blocks[0].attn.num_heads
    return model


def open_folder(args, context):
    """Rank 0's RunFolder, None on the others; sets args.run_dir on all. An error of rank 0 is every rank's."""
    folder, error = None, None
    if context.is_main:
        try:
            args.run_dir = str(args.run_dir or run_folder.numbered(args.results_dir, args.model))
            folder = run_folder.RunFolder(args.run_dir)
            if args.resume == "none" and checkpoint.newest_first(folder.checkpoints):
                raise UserError(f"--resume none: {folder.path} holds checkpoints; choose another --run-dir, or resume")
        except (UserError, OSError) as problem:
            error = str(problem)
    args.run_dir, error = context.broadcast((args.run_dir, error))
    if error:
        raise UserError(error)
    return folder


def resume(trainer, dataset, folder):
    """Restore the checkpoint that --resume names, if any. Returns its path."""
    args, context = trainer.args, trainer.context
    path, state = context.run_on_all_ranks(lambda: find(args, folder))
    path = context.broadcast(path)
    if path is not None:
        context.run_on_all_ranks(lambda: take_up(trainer, dataset, folder, path, state))
    return path


def find(args, folder):
    """Rank 0 looks for the checkpoint to resume from and reads all of it, to see that it is whole. (path, state), where the
    state may be None, left to be loaded, and so may the path."""
    if folder is None or args.resume == "none":
        return None, None
    if args.resume == "auto":
        return checkpoint.load_newest(folder.checkpoints, folder.log)
    path = Path(args.resume)
    if path.is_file():
        checkpoint.verify(path)
    return path, None


def take_up(trainer, dataset, folder, path, state):
    state = state or checkpoint.load(path, mmap=False)
    if "opt" not in state:
        raise UserError(f"--resume {path}: holds weights alone, no optimizer state to go on from")
    if "step" not in state:
        if not path.stem.isdecimal():
            raise UserError(f"--resume {path}: records no step; name it as the release does, such as 0400000.pt")
        state["step"] = int(path.stem)
    check_unchanged(trainer, dataset, state, path, folder)
    trainer.restore(state)


def check_unchanged(trainer, dataset, state, path, folder):
    """Refuse to continue with options that change the result, unless --allow-changes."""
    args, now = trainer.args, {**vars(trainer.args)}
    before = checkpoint.options(state)
    config = checkpoint.model_config(state, path)
    mine = checkpoint.model_config({"model": trainer.model.state_dict(), "args": now})
    differing = [
        f"model {name} {config[name]}, now {mine[name]}"
        for name in config
        if config[name] != mine[name] and name != "class_dropout_prob"
    ]
    if differing:  # no option can make these fit
        raise UserError(f"{path}: another model ({'; '.join(differing)})")
    changed = [
        f"--{name.replace('_', '-')} {before.get(name)}, now {now.get(name)}"
        for name in sorted(before.keys() & now.keys() - FREE)
        if before[name] != now[name] and now[name] is not None
    ]
    if "data" in state and state["data"] != data_identity(dataset):
        images, crc = state["data"]
        changed.append(f"--data-path held {images:,} images (checksum of names {crc:08x}), now other ones")
    if changed and not args.allow_changes:
        raise UserError(f"{path}: made with {'; '.join(changed)}; use the same, or pass --allow-changes")
    say = folder.log if folder else lambda text: None
    for change in changed:
        say(f"Changed on resuming: {change}")
    ranks = len(state.get("progress", []))
    if ranks not in (0, trainer.context.world_size):
        say(
            f"The checkpoint is of {ranks} processes, now {trainer.context.world_size}: it goes on with the images "
            "not yet seen in this epoch, in the same order; noise, timesteps and dropped labels, drawn per process, "
            "and the order of summation differ, so the result is not bit for bit that of an undisturbed run"
        )


def data_identity(dataset):
    """Number of images and CRC-32 of their relative names and labels."""
    return [len(dataset), zlib.crc32("\n".join(dataset.fingerprint()).encode())]


def introduce(trainer, dataset, source, say):
    args = trainer.args
    parameters = sum(p.numel() for p in trainer.ema.weights)
    say(f"{args.model} ({args.block}), {parameters:,} trainable parameters, {args.precision}, {trainer.context.describe()}")
    say(f"{len(dataset):,} images of {len(dataset.classes)} classes from {args.data_path}; run folder {args.run_dir}")
    if source:
        say(f"Resumed from {source} at step {trainer.step}")
    if args.precision == "bf16" and not devices.has_bf16(trainer.context.device):
        say(devices.NO_BF16)


def read_batches(trainer, dataset, total_steps):
    args, context = trainer.args, trainer.context
    stop = trainer.images_seen + (total_steps - trainer.step) * args.global_batch_size
    order = data.GlobalOrder(
        len(dataset), args.global_batch_size, args.global_seed, context.rank, context.world_size, trainer.images_seen, stop
    )
    return data.loader(dataset, order, args.num_workers, pin_memory=context.device.type == "cuda")


def last_checkpoint(writer):
    with contextlib.suppress(checkpoint.CheckpointError):
        writer.wait()
    found = checkpoint.newest_first(writer.folder)
    return f"the last good checkpoint is {found[0]}" if found else "there is no checkpoint yet"


if __name__ == "__main__":
    main()
