"""The loss on held-out images, with the same noise and timesteps each time. It rises while the training loss falls where a
model begins to memorise its images, in fine-tuning above all."""

import dataclasses

import torch

from data.autoencoder import encode_batch
from data.images import load_dataset
from data.order import make_loader
from data.text_encoder import check_same, encode_texts
from runtime import seeds
from runtime.errors import UserError

MAX_IMAGES = 512  # of a larger folder, so many are chosen at random
NUM_RANGES = 4  # of t; each image is seen once in each of them


class Validation:
    """Measures the loss of the trained weights every --val-every steps. Every rank makes it and calls it.

    config: TrainConfig. dataset: of the training images. text: what encodes their texts, if they have any. Making it reads
    and encodes the held-out images, once; they are kept on the CPU, each rank's part of them. Image, timestep and noise do
    not depend on --global-seed, so that runs can be compared. Raises UserError for images that cannot be used."""

    def __init__(self, config, session, dataset, text=None):
        self.session, self.every = session, config.monitor.val_every
        if not self.every:
            return
        self.context = session.context
        per_process = config.recipe.global_batch_size // self.context.world_size
        self.batch_size = max(1, per_process // config.compute.grad_accum)  # what fits in training fits here
        self.indices, self.x_0, self.y = self.context.run_on_all_ranks(lambda: self.read(config, dataset, text))

    def read(self, config, dataset, text):
        """This rank's part: the images' numbers, x_0 (N, C, h, w) and y: labels (N,), or texts (N, L, W + 1)."""
        try:
            data = dataclasses.replace(config.data, data_path=config.monitor.val_data_path, flip=False)
            data = dataclasses.replace(data, text_length=text.length) if text else data
            held_out = load_dataset(data, config.model.image_size, seed=0, context=self.context)
            space = held_out.open_space(config.vae).place(self.context.device)
            if text:
                own = held_out.open_text(data)
                check_same("--text-encoder", own, text.crc32, "the training data")
                text = own.place(self.context.device)
        except UserError as error:
            raise UserError(str(error).replace("--data-path", "--val-data-path")) from None
        if held_out.channels != dataset.channels:
            raise UserError(f"--val-data-path {data.data_path}: has {held_out.channels} channels, --data-path "
                f"{dataset.channels}; give held-out images of the same kind")  # fmt: skip
        labels = (
            match_classes(held_out, dataset, data.data_path) if config.model.num_classes else [0] * len(held_out.classes)
        )
        chosen = seeds.generator(0, seeds.VALIDATION).permutation(len(held_out))[:MAX_IMAGES]
        indices = chosen[self.context.rank :: self.context.world_size].tolist()
        batches = [indices[i : i + self.batch_size] for i in range(0, len(indices), self.batch_size)]
        x_0, y = [], []
        # the encoder's posterior is sampled from torch's stream, which each training step sets anew
        torch.manual_seed(seeds.torch_seed(0, seeds.VALIDATION, self.context.rank))
        for batch in make_loader(held_out, [[(index, 0) for index in batch] for batch in batches]):
            x_0.append(encode_batch(space, batch, self.context.device).cpu())
            of_classes = torch.tensor([labels[label] for label in batch["label"].tolist()])
            y.append(encode_texts(text, batch, self.context.device).cpu() if text else of_classes)
        return indices, *(torch.cat(parts) if parts else None for parts in (x_0, y))

    def measure_if_due(self):
        """Measure the loss and record it, if this step is one of those."""
        if not self.session.due(self.every):
            return
        with self.session.meter.paused():
            parts = self.losses()
            values = {"val_loss": sum(parts.values()) / len(parts)} | {f"val_loss_t_{name}": v for name, v in parts.items()}
            ranges = ", ".join(f"{loss:.4f} at t {name.replace('_', '-')}" for name, loss in parts.items())
            step = f"(step={self.session.trainer.steps_made:07d})"
            self.session.log(f"{step} Validation Loss: {values['val_loss']:.4f} ({ranges})")
            self.session.record_metrics(**values)

    @torch.no_grad()
    def losses(self):
        """The mean loss over all images for each range of t: {"0_249": loss, ...}, on all ranks."""
        trainer, device = self.session.trainer, self.context.device
        model = trainer.whole(trainer.model)
        width = trainer.diffusion.num_timesteps // NUM_RANGES
        sums = torch.zeros(NUM_RANGES, dtype=torch.float64)
        for part in range(NUM_RANGES):
            for first in range(0, len(self.indices), self.batch_size):
                batch = slice(first, first + self.batch_size)
                x_0 = self.x_0[batch]
                random = [seeds.generator(0, seeds.VALIDATION, 1 + part, index) for index in self.indices[batch]]
                t = torch.tensor([part * width + int(generator.integers(width)) for generator in random])
                noise = torch.stack(
                    [torch.from_numpy(generator.standard_normal(x_0.shape[1:], "float32")) for generator in random]
                )
                x_0, t, noise, y = (values.to(device) for values in (x_0, t, noise, self.y[batch]))
                with trainer.autocast:
                    found = trainer.diffusion.training_losses(model, x_0, t, {"y": y}, noise)
                sums[part] += found["loss"].cpu().double().sum()
        gathered = self.context.all_gather((sums.tolist(), len(self.indices)))
        number = sum(count for _, count in gathered)
        totals = (sum(column) / number for column in zip(*(values for values, _ in gathered), strict=True))
        return {f"{part * width}_{(part + 1) * width - 1}": total for part, total in enumerate(totals)}


def match_classes(held_out, dataset, path):
    """The training data's label for each label of the held-out images, by the classes' names. Raises UserError."""
    labels = {name: label for label, name in enumerate(dataset.classes)}
    if unknown := [name for name in held_out.classes if name not in labels]:
        raise UserError(
            f'--val-data-path {path}: its class "{unknown[0]}" is not one of --data-path; both need the same class folders'
        )
    return [labels[name] for name in held_out.classes]
