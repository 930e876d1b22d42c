"""What a .safetensors file of weights says of its model: text in its metadata, of which ours is JSON.

The record of a model is a dict with some of `model_config` (the arguments of models.DiT), `class_names` (list of str),
`vae` (as --vae names it), `image_size` (pixels), `condition` (of data/condition.py, where it is not the class), `latents`
(statistics of each channel, where the latents were normalised by these) and `drawing` (options of sample.py by name, which
it takes where the command line gives no others)."""

import json

from checkpoint import files
from checkpoint.files import CheckpointError

NAMES = ("model_config", "class_names", "vae", "image_size", "condition", "latents", "drawing")
OLD_NAMES = ("text_encoder", "text_encoder_crc32")  # of models of texts, before they had a `condition`


def of(checkpoint, vae=None):
    """The record of an opened checkpoint. vae: in place of the recorded one; without any, the image size is a guess."""
    vae = vae or checkpoint.metadata.get("recorded_vae") or checkpoint.vae
    found = {"model_config": checkpoint.model_config, "class_names": checkpoint.class_names, "vae": vae}
    found |= {"condition": checkpoint.condition_record, "latents": checkpoint.latents, "drawing": checkpoint.drawing}
    return found | {"image_size": checkpoint.image_size if checkpoint.vae else None}


def to_text(record, weights):
    """The metadata of a .safetensors file: the record, the weights' checksum, and "format", which diffusers asks for."""
    own = {"format": "pt", "crc32": files.checksum_of(weights)}
    return own | {name: json.dumps(record[name]) for name in NAMES if record.get(name) is not None}


def read(path):
    """The record in a .safetensors file, empty for other files. Raises CheckpointError where it is damaged."""
    if not str(path).endswith(".safetensors"):
        return {}
    metadata = files.header(path)
    try:
        return {name: json.loads(metadata[name]) for name in (*NAMES, *OLD_NAMES) if name in metadata}
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: damaged: its metadata is not JSON") from None
