"""The 2015 TensorFlow InceptionV3 that the field's numbers are made with, and features of whole image sets.

network = load_inception(inception_weights(), device)
pooled, spatial, logits = network(images)                     # uint8 (N, H, W, 3)
features = extract(network, open_images(path), context, batch_size=64)    # shared by all processes
"""

import pickle
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3 as port
from tqdm.auto import tqdm

from evaluation.metrics import Statistics, full_precision
from runtime.errors import UserError

POOLED, SPATIAL, CLASSES = 2048, 17 * 17 * 7, 1008


def inception_weights(path=None):
    """Path of the network's weights: `path`, or torch-fidelity's file, downloaded to torch's hub folder if missing.

    Raises UserError when it cannot be had."""
    if path is not None:
        return Path(path)
    target = Path(torch.hub.get_dir()) / "checkpoints" / Path(port.URL_INCEPTION_V3).name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        checksum = target.stem.rsplit("-", 1)[1]  # the file's name ends with the first digits of its SHA-256
        try:
            torch.hub.download_url_to_file(port.URL_INCEPTION_V3, target, hash_prefix=checksum)
        except (OSError, RuntimeError) as error:  # no network, or another checksum
            raise UserError(
                f"{port.URL_INCEPTION_V3}: download failed ({error}); fetch the file and give it as --inception-weights"
            ) from error
    return target


def load_inception(weights, device="cpu"):
    """The network with the weights of a state-dict file, as InceptionFeatures on `device`.

    Raises UserError when the file holds anything but tensors, or tensors of another network."""
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        # torch-fidelity's constructor unpickles the file itself, without restriction; it is handed the tensors instead
        with mock.patch.object(port, "load_state_dict_from_url", return_value=state):
            network = port.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"])
    except (OSError, EOFError, pickle.UnpicklingError, RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{weights}: not the weights of torch-fidelity's InceptionV3 ({reason})") from error
    return InceptionFeatures(network).to(device)


class InceptionFeatures(nn.Module):
    """Images to the three outputs that the metrics use; float32 without TF32, whatever the caller has set."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, module, inputs, output):
        # height, width, channel, as TensorFlow lays it out: published mu_s and sigma_s have this order
        self.spatial = output[:, :7].permute(0, 2, 3, 1).flatten(1)

    @torch.inference_mode()
    def forward(self, images):
        """images: uint8 (N, H, W, 3). Returns float32 pooled (N, 2048), spatial (N, 2023), logits (N, 1008)."""
        with full_precision(), torch.autocast(images.device.type, enabled=False):
            pooled, logits = self.network(images.permute(0, 3, 1, 2))
        return pooled, self.spatial, logits


@dataclass
class Features:
    """What a set of N images leaves behind: pooled (N, 2048) and logits (N, 1008) on the CPU, spatial Statistics."""

    pooled: torch.Tensor
    logits: torch.Tensor
    spatial: Statistics


def extract(network, images, context, batch_size, progress=None):
    """Features of all `images` (see image_sets), each process of `context` taking its share; `progress` names a bar.

    Returns Features in the images' order on rank 0, None on the others. Raises UserError for damaged images."""
    start, stop = share(len(images), context.rank, context.world_size)
    pooled, logits, spatial = [], [], Statistics(SPATIAL, context.device)
    with tqdm(total=stop - start, desc=progress, unit="image", disable=progress is None or not context.is_main) as bar:
        try:
            for batch in images.batches(start, stop, batch_size):
                batch_pooled, batch_spatial, batch_logits = network(torch.from_numpy(batch).to(context.device))
                pooled.append(batch_pooled.cpu())
                logits.append(batch_logits.cpu())
                spatial.update(batch_spatial)
                bar.update(len(batch))
            problem = None
        except UserError as error:
            problem = str(error)
    problems = list(filter(None, context.all_gather(problem)))  # one rank's error is every rank's, and rank 0 prints it
    if problems:
        raise UserError(problems[0])
    pooled = gather_rows(torch.cat([torch.empty(0, POOLED), *pooled]), len(images), context)
    logits = gather_rows(torch.cat([torch.empty(0, CLASSES), *logits]), len(images), context)
    spatial = gather_statistics(spatial, context)
    return Features(pooled, logits, spatial) if context.is_main else None


def gaussians(images, features):
    """Mean and covariance of a set, pooled and spatial: {"fid": (mu, sigma), "sfid": (mu_s, sigma_s)}, float64 numpy.

    Statistics that the file brings replace those of its images, as in ADM's suite. `features` may be None for a set
    without images; what is then unknown is left out."""
    known = images.statistics
    result = {}
    if "mu" in known:
        result["fid"] = known["mu"], known["sigma"]
    elif features:
        pooled = Statistics(POOLED, features.spatial.mean.device)
        for rows in features.pooled.split(4096):
            pooled.update(rows)
        result["fid"] = pooled.mu, pooled.sigma
    if "mu_s" in known:
        result["sfid"] = known["mu_s"], known["sigma_s"]
    elif features:
        result["sfid"] = features.spatial.mu, features.spatial.sigma
    return result


def share(n, rank, world_size):
    """[start, stop) of the n items that `rank` works on; the shares are consecutive and differ by one item at most."""
    return n * rank // world_size, n * (rank + 1) // world_size


def gather_rows(rows, n, context):
    """Concatenate the `share` of n rows that each rank holds, (n_rank, D): (n, D) on rank 0's CPU, else None."""
    sizes = [stop - start for start, stop in (share(n, r, context.world_size) for r in range(context.world_size))]
    parts = list(_gather(rows, [(size, rows.shape[1]) for size in sizes], context))
    return torch.cat(parts) if context.is_main else None


def gather_statistics(statistics, context):
    """Statistics of what all ranks have seen on rank 0, None on the others; one rank's is held beside it at a time."""
    dim = len(statistics.mean)
    packed = torch.cat(
        [statistics.scatter, statistics.mean[None], torch.full_like(statistics.mean[None], statistics.count)]
    )
    merged = Statistics(dim, context.device)
    for part in _gather(packed, [(dim + 2, dim)] * context.world_size, context):
        one = Statistics(dim, context.device)
        one.scatter, one.mean, one.count = part[:dim], part[dim], int(part[-1, 0])
        merged.merge(one)
    return merged if context.is_main else None


def _gather(tensor, shapes, context):
    """Yield each rank's tensor on rank 0, in rank order, and nothing elsewhere. They go from host to host, over gloo."""
    tensor = tensor.cpu().contiguous()
    if context.is_main:
        yield tensor
        for rank in range(1, context.world_size):
            received = tensor.new_empty(shapes[rank])
            if received.numel():
                dist.recv(received, rank)
            yield received
    elif tensor.numel():
        dist.send(tensor, 0)
