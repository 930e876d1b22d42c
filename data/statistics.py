"""The mean and the standard deviation of each channel of the latents of some data, which --latent-norm channel normalises
by. They are those of draws from the posteriors, without drawing: E z = E mean and E z^2 = E [mean^2 + std^2]."""

import torch

from data.autoencoder import per_frame, to_model_range
from data.order import batches_of_one_shape, make_loader, next_batch
from runtime import seeds
from runtime.errors import UserError

NUM_IMAGES = 1024  # that are measured, of data for which extract_latents.py has not recorded the sums
BATCH_SIZE = 16  # any number of processes encodes the same batches


def channel_sums(moments, axis=1):
    """Sums of z and of z^2 over all but the channels: moments (N, M, C, ...), M at `axis` -> (2, C) float64 on the CPU."""
    mean, *std = moments.cpu().double().unbind(axis)
    squares = mean**2 + sum(values**2 for values in std)
    return torch.stack([values.movedim(axis, 0).flatten(1).sum(1) for values in (mean, squares)])


def channel_statistics(sums, count):
    """{"mean": C numbers, "std": C numbers} of sums (2, C) over `count` values of each channel."""
    mean, square = sums / count
    return {"mean": mean.tolist(), "std": (square - mean**2).clamp(min=0).sqrt().tolist()}


def measure(dataset, space, seed, context, num_workers=0):
    """(statistics, number of images): of the first images in the order of a run with this seed, flipped as there. Ranks
    take whole batches in turn, whose sums are added in order: their number changes no bit. All call. Raises UserError."""
    chosen = seeds.generator(seed, seeds.DATA_ORDER, 0).permutation(len(dataset))[:NUM_IMAGES].tolist()
    order = [[(index, 0) for index in batch] for batch in batches_of_one_shape(dataset, chosen, BATCH_SIZE)]
    mine, found, count = order[context.rank :: context.world_size], [], 0
    batches = iter(make_loader(dataset, mine, num_workers))
    with context.together():
        for _ in mine:
            batch, failure = next_batch(batches)
            if failure:
                raise UserError(failure)
            moments = batch.get("moments")
            if moments is None:
                moments = per_frame(space.moments, to_model_range(batch["image"].to(context.device)))
            found.append(channel_sums(moments))
            count += len(moments) * moments[0, 0, 0].numel()
    return channel_statistics(sum(context.all_in_turn(found)), sum(context.all_gather(count))), len(chosen)
