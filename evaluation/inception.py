"""The 2015 TensorFlow InceptionV3 that the field's numbers are made with, and features of whole image sets.

network = load_inception(inception_weights(), device)
pooled, spatial, logits = network(images)                     # uint8 (N, H, W, 3)
features = extract(network, open_images(path), context, 64, "features")    # shared by all processes
"""

from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3 as port
from tqdm.auto import tqdm

from evaluation.image_sets import checksum
from evaluation.metrics import Statistics, full_precision
from runtime.download import DownloadError, fetch
from runtime.errors import UserError
from runtime.files import reason

POOLED, SPATIAL, CLASSES = 2048, 17 * 17 * 7, 1008


def inception_weights(path=None):
    """Path of the network's weights: `path`, or torch-fidelity's file, downloaded to torch's hub folder if missing.
    Raises UserError when it cannot be downloaded."""
    if path is not None:
        return Path(path)
    target = Path(torch.hub.get_dir()) / "checkpoints" / Path(port.URL_INCEPTION_V3).name
    try:
        return fetch(port.URL_INCEPTION_V3, target, check_name)
    except DownloadError as error:
        raise UserError(f"{error}, or give the file as --inception-weights") from None


def check_name(file):
    """Raises ValueError if the first digits of the SHA-256 of a file are not those that its name ends with."""
    wanted = file.name.partition(".")[0].rsplit("-", 1)[1]
    found = checksum(file)
    if not found.startswith(wanted):
        raise ValueError(f"its SHA-256 is {found}, must begin with {wanted}")


def load_inception(weights, device="cpu"):
    """The network with the weights of a state-dict file, as InceptionFeatures on `device`. torch's random state stays.

    Raises UserError when the file holds anything but tensors, tensors of another network, or values that are not finite."""
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        # torch-fidelity's constructor unpickles the file itself, without restriction; it is given the tensors instead. It
        # draws initial weights first.
        with mock.patch.object(port, "load_state_dict_from_url", return_value=state), torch.random.fork_rng(devices=[]):
            network = port.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"])
    except Exception as error:  # a damaged file makes torch.load raise many kinds
        raise UserError(f"{weights}: not the weights of torch-fidelity's InceptionV3 ({reason(error).strip()})") from error
    for name, tensor in network.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(f"{weights}: {name} holds NaN or infinity; download the weights again")
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
    """Features of N images: pooled (N, 2048) and logits (N, 1008) on the CPU, and Statistics of the spatial features."""

    pooled: torch.Tensor
    logits: torch.Tensor
    spatial: Statistics


def extract(network, images, context, batch_size, title):
    """Features of all `images` (see image_sets.py), of which each process of `context` takes its share; `title` is that of
    the progress bar. Returns Features in the images' order on rank 0, None on the others. Raises UserError for damaged
    images, on every rank."""

    def extract_share():
        start, stop = share(len(images), context.rank, context.world_size)
        pooled, logits, spatial = [torch.empty(0, POOLED)], [torch.empty(0, CLASSES)], Statistics(SPATIAL, context.device)
        with tqdm(total=stop - start, desc=title, unit="image", disable=not context.is_main) as bar:
            for batch in images.batches(start, stop, batch_size):
                batch_pooled, batch_spatial, batch_logits = network(torch.from_numpy(batch).to(context.device))
                pooled.append(batch_pooled.cpu())
                logits.append(batch_logits.cpu())
                spatial.update(batch_spatial)
                bar.update(len(batch))
        if not all(x.isfinite().all() for x in (*pooled, *logits)):
            raise UserError(f"{images.path}: the network's features are not finite; download the Inception weights again")
        return torch.cat(pooled), torch.cat(logits), spatial

    pooled, logits, spatial = context.run_on_all_ranks(extract_share)
    parts, spatial = gather((pooled, logits), context), gather_statistics(spatial, context)
    return Features(*map(torch.cat, zip(*parts, strict=True)), spatial) if context.is_main else None


def gaussians(images, features, device="cpu"):
    """mu and sigma of the pooled features, mu_s and sigma_s of the spatial ones, by these names, float64 numpy.

    Statistics in the file replace those of its images, as in ADM's suite. `features` may be None for a set without images;
    the result then lacks what the file does not hold. device: where to add up."""
    if not features:
        return images.statistics
    pooled, spatial = Statistics(POOLED, device), features.spatial
    for rows in features.pooled.split(4096):
        pooled.update(rows)
    found = {"mu": pooled.mu, "sigma": pooled.sigma, "mu_s": spatial.mu, "sigma_s": spatial.sigma}
    return found | images.statistics


def share(n, rank, world_size):
    """[start, stop) of the n items that `rank` works on; the shares are consecutive and differ by one item at most."""
    return n * rank // world_size, n * (rank + 1) // world_size


def gather(value, context):
    """Every rank's value on rank 0, in the order of ranks; None on the others."""
    values = [value] if context.is_main else None
    if context.world_size > 1:
        values = values and values * context.world_size
        dist.gather_object(value, values, dst=0, group=context.host_group)
    return values


def gather_statistics(statistics, context):
    """The merged Statistics of all ranks on rank 0's CPU, None on the others."""
    merged, *others = gather(statistics.cpu(), context) or [None]
    for other in others:
        merged.merge(other)
    return merged
