"""The 2015 TensorFlow InceptionV3 that the field's numbers are made with, in torch-fidelity's port.

network = load_inception(inception_weights()).to(device)
pooled, spatial, logits = network(images)                     # uint8 (N, H, W, 3)
"""

from pathlib import Path
from unittest import mock

import torch
from torch_fidelity import feature_extractor_inceptionv3 as port

from checkpoint import files
from evaluation.features import FeatureNetwork, Outputs
from evaluation.image_sets import checksum
from runtime.download import DownloadError, fetch
from runtime.errors import UserError


def inception_weights(path=None):
    """Path of weights: `path`, or torch-fidelity's file, downloaded to the hub folder if need be. Raises UserError."""
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


def load_inception(weights):
    """The network with the weights of a state-dict file, as InceptionFeatures. torch's random state stays.

    Raises UserError when the file holds anything but tensors, tensors of another network, or values that are not finite."""
    state = files.load(weights)
    try:
        # torch-fidelity's constructor draws initial weights and unpickles the file itself, without restriction: it is given
        # the tensors instead
        with mock.patch.object(port, "load_state_dict_from_url", return_value=state), torch.random.fork_rng(devices=[]):
            network = port.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"])
    except Exception as error:  # of torch.nn, in many lines
        raise UserError(weights, "not the weights of torch-fidelity's InceptionV3",
                        "leave --inception-weights out to download them") from error  # fmt: skip
    for name, tensor in network.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(weights, f"{name} holds NaN or infinity", "download the weights again")
    return InceptionFeatures(network, weights)


class InceptionFeatures(FeatureNetwork):
    """Images to pooled (N, 2048), spatial (N, 2023) and logits (N, 1008)."""

    preprocessing = "all of the image to 299x299 px, bilinear as in TensorFlow 1, not antialiased; (x - 128) / 128"
    published = True

    def __init__(self, network, path):
        super().__init__()
        self.network, self.path = network, path
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    @property
    def weights(self):
        return {"path": str(self.path), "sha256": checksum(Path(self.path))}

    def _keep_spatial(self, module, inputs, output):
        # height, width, channel, as TensorFlow lays it out: published mu_s and sigma_s have this order
        self.spatial = output[:, :7].permute(0, 2, 3, 1).flatten(1)

    def outputs(self, images):
        pooled, logits = self.network(images.permute(0, 3, 1, 2))
        return Outputs(pooled, self.spatial, logits)
