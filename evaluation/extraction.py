"""Features of whole image sets, by one or several networks in one pass, shared by all processes of a Context.

features = extract_all({"name": network}, open_images(path), context, 64, "features of samples")["name"]
"""

import dataclasses
import functools

import torch
import torch.distributed as dist
from tqdm.auto import tqdm

from evaluation.metrics import FeatureSet, Statistics
from runtime.errors import UserError


def extract_all(networks, images, context, batch_size, title):
    """{name: FeatureSet} of {name: network} and all `images` (see image_sets.py), of which each process of `context` takes
    its share; `title` is that of the progress bar. Rank 0 has them, on the CPU and in the images' order, the others None.
    Raises UserError for damaged images, on every rank."""
    start, stop = share(len(images), context.rank, context.world_size)
    found, spatial = {name: [] for name in networks}, {}
    bar = tqdm(total=stop - start, desc=title, unit="image", leave=False, disable=not context.is_main)
    with context.together(), bar:
        for batch in images.batches(start, stop, batch_size):
            pixels = torch.from_numpy(batch).to(context.device)
            for name, network in networks.items():
                pooled, x, logits = network(pixels)
                found[name].append(FeatureSet(pooled.cpu(), None if logits is None else logits.cpu()))
                if x is not None:
                    spatial[name] = (spatial.get(name) or Statistics(x.shape[1], context.device)).update(x)
            bar.update(len(batch))
        for name, parts in found.items():
            if not all(x.isfinite().all() for part in parts for x in (part.pooled, part.logits) if x is not None):
                raise UserError(images.path, f"the features of {name} are not finite", "get the network's weights again")
            found[name] = join(parts)
            if name in spatial:
                found[name].spatial = spatial[name].cpu()
    ranks = gather(found, context)
    return {name: ranks and join([part[name] for part in ranks]) for name in networks}


def join(parts):
    """The FeatureSet of all images of a list of them; None where there are no images."""
    parts = [part for part in parts if part]
    if not parts:
        return None
    logits = None if parts[0].logits is None else torch.cat([part.logits for part in parts])
    spatial = parts[0].spatial and functools.reduce(Statistics.merge, [part.spatial for part in parts])
    return FeatureSet(torch.cat([part.pooled for part in parts]), logits, spatial)


def complete(features, images, network, device):
    """The FeatureSet of images on the device, with mean and covariance of the pooled features and of the spatial ones.

    Statistics in the file replace those of its images, as in ADM's suite, where they are of the same network: `published`.
    features: None for a set without images, of which there is what the file holds."""
    found = {}
    if features:
        pooled = Statistics(features.pooled.shape[1], device)
        for rows in features.pooled.split(4096):
            pooled.update(rows)
        found = {"mu": pooled.mu, "sigma": pooled.sigma}
        if features.spatial:
            found |= {"mu_s": features.spatial.mu, "sigma_s": features.spatial.sigma}
    found |= images.statistics if network.published else {}
    return dataclasses.replace(features or FeatureSet(), pooled=features and features.pooled.to(device), **found)


def share(n, rank, world_size):
    """[start, stop) of the n items that `rank` works on; the shares are consecutive and differ by one item at most."""
    return n * rank // world_size, n * (rank + 1) // world_size


def gather(value, context):
    """Every rank's value on rank 0, in the order of ranks; None on the others."""
    values = [value] * context.world_size if context.is_main else None
    if context.world_size > 1:
        dist.gather_object(value, values, dst=0, group=context.host_group)
    return values


def gather_statistics(statistics, context):
    """{name: merged Statistics} of those of all ranks, which may lack some, on rank 0's CPU, None on the others."""
    ranks = gather({name: found.cpu() for name, found in statistics.items()}, context)
    return ranks and {name: functools.reduce(Statistics.merge, [rank[name] for rank in ranks if name in rank])
                      for name in ranks[0]}  # fmt: skip
