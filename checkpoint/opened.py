"""A checkpoint that is opened once and knows what it holds: weights, model config, class names, autoencoder, checksum.

checkpoint = Checkpoint.open("results/000-DiT-XL-2/checkpoints/0400000.pt")
model = checkpoint.build_model()
"""

import argparse
import functools
import math
import os

import torch

from checkpoint import diffusers_folder, files, metadata
from checkpoint.config import DiTConfig
from checkpoint.files import CheckpointError
from models import SIZES, DiT
from runtime.errors import UserError
from runtime.files import checksum, checksum_of_text

FACTOR = 8  # pixels per latent cell of the autoencoder that models without a record were trained on


class Checkpoint:
    """What a file of train.py, of the original release, or of weights alone (.pt, .safetensors, diffusers) holds.

    state: the file's dict. path: for messages. metadata: the record of weights alone (see checkpoint.metadata). num_heads:
    for weights without a record, whose shapes do not tell it. files: what was read, for the checksum. Properties that read
    the record raise CheckpointError where it is damaged."""

    def __init__(self, state, path="the checkpoint", metadata=None, num_heads=None, files=None):
        self.state, self.path, self.metadata, self._num_heads = state, path, metadata or {}, num_heads
        self.files = files or [path]

    @classmethod
    def open(cls, where, num_heads=None):
        """Read a .pt or .safetensors file, or a model in diffusers' format: a folder, or its name on the hub. Tensors are
        mapped where possible. Raises CheckpointError."""
        if os.path.isdir(where) or diffusers_folder.is_hub_name(where):
            weights, record, paths = diffusers_folder.read(diffusers_folder.fetch(where))
            checkpoint = cls(weights, where, record, num_heads, paths)
        else:
            checkpoint = cls(files.load(where), where, metadata.read(where), num_heads)
        checkpoint.check_record()
        return checkpoint

    def check_record(self):
        """Raises CheckpointError where something that is recorded is not of its type, whether it is needed or not."""
        _ = (
            self.vae,
            self.text_encoder,
            self.class_names,
            self.step,
            self._recorded("image_size", int, self.options, self.metadata),
        )

    # ------------------------------------------------------------------------------------------------------------------
    # What is recorded

    @functools.cached_property
    def options(self):
        """The recorded options of the run, as a dict; empty for weights alone."""
        args = self.state.get("args", {})
        args = vars(args) if isinstance(args, argparse.Namespace) else args
        if not isinstance(args, dict):
            raise CheckpointError(f"{self.path}: damaged: its options (args) are a {type(args).__name__}, not a dict")
        return dict(args)

    def _recorded(self, name, kind, *places):
        """The value in the first of the dicts that has one, or None."""
        value = next((place[name] for place in places if place.get(name) is not None), None)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise CheckpointError(
                f"{self.path}: damaged: its {name} is {value!r:.50}, not of type {getattr(kind, '__name__', kind)}"
            )
        return value

    @property
    def vae(self):
        """The autoencoder that the model was trained with, as --vae names it; None without a record."""
        return self._recorded("vae", str, self.options, self.metadata)

    @property
    def text_encoder(self):
        """(name, CRC-32) of the encoder of a model of texts, as --text-encoder names it; None where not recorded."""
        crc32 = self._recorded("text_encoder_crc32", str, self.state, self.metadata)
        return self._recorded("text_encoder", str, self.options, self.metadata), crc32

    @property
    def image_size(self):
        """Side of the images in pixels."""
        recorded = self._recorded("image_size", int, self.options, self.metadata)
        return recorded or FACTOR * self.model_config["input_size"]

    @property
    def class_names(self):
        """Names of the classes by number; None without a record."""
        names = self._recorded("class_names", list, self.state, self.options, self.metadata)
        if names is not None and not all(isinstance(name, str) for name in names):
            raise CheckpointError(f"{self.path}: damaged: its class_names are not all text")
        return names

    @property
    def step(self):
        """Updates that the training run had made; None without a record."""
        step = self._recorded("step", int, self.state)
        if step is not None and not 0 <= step < 2**63:
            raise CheckpointError(f"{self.path}: damaged: its step is {step}")
        return step

    @functools.cached_property
    def checksum(self):
        """CRC-32 of the file's bytes; of a folder, of the checksums of the files that were read."""
        sums = [checksum(path) for path in self.files]
        return sums[0] if len(sums) == 1 else checksum_of_text(sums)

    # ------------------------------------------------------------------------------------------------------------------
    # The model

    @functools.cached_property
    def weights(self):
        """The state dict to sample with: the EMA's where there is one, else the model's, else the file's own dict."""
        return self._tensors(self.state.get("ema", self.state.get("model", self.state)))

    def _tensors(self, found):
        """A state dict, checked to be one."""
        tensors = isinstance(found, dict) and all(isinstance(value, torch.Tensor) for value in found.values())
        if not tensors or not found or not all(isinstance(key, str) for key in found):
            raise CheckpointError(
                f"{self.path}: not a checkpoint of this project: it holds neither weights nor `ema` or `model`"
            )
        return found

    @functools.cached_property
    def model_config(self):
        """The keyword arguments of DiT: as recorded, or inferred from the shapes of the weights."""
        recorded = self.state.get("model_config", self.metadata.get("model_config"))
        if recorded is None:
            recorded = self._inferred_config()
        elif not isinstance(recorded, dict):
            raise CheckpointError(f"{self.path}: damaged: its model_config is a {type(recorded).__name__}, not a dict")
        try:
            return DiTConfig.from_flat(recorded).flat()
        except UserError as error:
            raise CheckpointError(f"{self.path}: damaged record of the model: {error}") from None

    def _inferred_config(self):
        """The config by the weights' shapes. What shapes leave open (the heads, and whether there is a null class) is taken
        from the recorded options, or from the paper's table of sizes."""
        tensors = self.weights
        try:
            hidden_size, in_channels, patch_size, _ = tensors["x_embedder.proj.weight"].shape
            num_tokens = tensors["pos_embed"].shape[1]
            depth = 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("blocks."))
            mlp_size = tensors["blocks.0.mlp.fc1.weight"].shape[0]
            rows = tensors["y_embedder.embedding_table.weight"].shape[0]
            out_channels = tensors["final_layer.linear.weight"].shape[0] // patch_size**2
        except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
            raise CheckpointError(f"{self.path}: not a DiT: it has no usable {error}") from None
        modulation = tensors.get("blocks.0.adaLN_modulation.1.weight")
        if modulation is not None:
            rows_per_vector = modulation.shape[0] // max(hidden_size, 1) if modulation.ndim else 0
            block = {6: "adaln-zero", 4: "adaln"}.get(rows_per_vector, f"with {rows_per_vector} modulations")
        else:
            block = "cross-attention" if "blocks.0.cross_attn.q.weight" in tensors else "in-context"
        null_text = tensors.get("text_embedder.null_text")
        text = {} if null_text is None else {"text_length": len(null_text), "text_width": null_text.shape[-1] - 1}
        in_table = next((heads for d, width, heads in SIZES.values() if (d, width) == (depth, hidden_size)), None)
        recorded = self._recorded("num_heads", int, self.options)
        num_heads = recorded if recorded is not None else self._num_heads or in_table
        if num_heads is None:
            raise CheckpointError(
                f"{self.path}: a DiT of width {hidden_size} and depth {depth} without a record of its heads; "
                "pass --num-heads"
            )
        dropout = self._recorded("label_dropout", int | float, self.options)
        dropout = 0.1 if dropout is None else dropout
        mlp_ratio = mlp_size / max(hidden_size, 1)
        if int(hidden_size * mlp_ratio) < mlp_size:  # DiT truncates the product, which may round below the width
            mlp_ratio = math.nextafter(mlp_ratio, math.inf)
        num_classes = rows - 1 if dropout > 0 else self._recorded("num_classes", int, self.options)
        return {
            "input_size": math.isqrt(num_tokens) * patch_size,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "hidden_size": hidden_size,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "class_dropout_prob": dropout,
            "num_classes": rows if num_classes is None else num_classes,
            "learn_sigma": out_channels == 2 * in_channels,
            "block": block,
            **text,
        }

    def describe(self):
        """The paper's name of the model, such as DiT-XL/2, or its sizes in words."""
        config = self.model_config
        for name, (depth, width, heads) in SIZES.items():
            if (depth, width, heads) == (config["depth"], config["hidden_size"], config["num_heads"]):
                return f"DiT-{name}/{config['patch_size']}"
        return f"a DiT of width {config['hidden_size']}, depth {config['depth']} and patch {config['patch_size']}"

    def check_finite(self):
        """Raises CheckpointError where a weight is NaN or infinite: the model would draw black images without a word."""
        for part in (self.weights, self._tensors(self.state.get("model", self.weights))):
            for name, tensor in part.items():
                if not tensor.is_floating_point() or tensor.layout != torch.strided:
                    raise CheckpointError(f"{self.path}: damaged: {name} is no plain tensor of floating-point numbers")
                if not tensor.isfinite().all():
                    raise CheckpointError(f"{self.path}: its weights are not finite ({name}); take an earlier checkpoint")

    def check_weights(self):
        """Raises CheckpointError where the weights do not fit the config or are not finite. Returns the model on the meta
        device: shapes without memory, because a damaged record may ask for any size."""
        try:
            with torch.device("meta"):
                model = DiT(**self.model_config)
            check_shapes(self.weights, model.state_dict())
        except ValueError as error:
            raise CheckpointError(f"{self.path}: its weights do not fit ({error})") from None
        self.check_finite()
        return model

    def build_model(self, draw_initial_weights=False):
        """The model with these weights on the CPU, in eval mode and without gradients.

        draw_initial_weights: draw them, and overwrite them: the images of sample.py depend on this part of torch's random
        stream. Raises CheckpointError as `check_weights`."""
        model = self.check_weights()
        model = DiT(**self.model_config) if draw_initial_weights else model.to_empty(device="cpu")
        model.load_state_dict(self.weights)
        return model.eval().requires_grad_(False)


def check_shapes(weights, expected):
    """Raises ValueError where a state dict has other names or shapes than the `expected` one."""
    found, expected = ({name: tuple(tensor.shape) for name, tensor in s.items()} for s in (weights, expected))
    for name in [*expected, *found]:
        if found.get(name) != expected.get(name):
            raise ValueError(f"{name} is {found.get(name, 'missing')}, must be {expected.get(name, 'absent')}")
