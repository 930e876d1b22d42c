"""A checkpoint that is opened once and knows what it holds: weights, model config, class names, autoencoder, checksum.

checkpoint = Checkpoint.open("results/000-DiT-XL-2/checkpoints/0400000.pt")
model = checkpoint.build_model()
"""

import argparse
import dataclasses
import functools
import math
import os

import torch

from checkpoint import diffusers_folder, files, lora, metadata
from checkpoint.files import CheckpointError
from data.condition import read_condition
from models import BLOCKS, SIZES, DiT, DiTConfig
from runtime.errors import UserError
from runtime.files import checksum, checksum_of_text
from runtime.shapes import ImageSize, plain_size

FIRST = "x_embedder.proj.weight"  # before it stands what has wrapped the model: module. of DDP, _orig_mod. of torch.compile
FACTOR = 8  # pixels per latent cell of the autoencoder that models without a record were trained on


class Checkpoint:
    """What a file of train.py, of the original release, or of weights alone (.pt, .safetensors, diffusers) holds.

    state: the file's dict. path: for messages. metadata: the record of weights alone (see checkpoint.metadata). num_heads:
    for weights without a record, whose shapes do not tell it. files: what was read, for the checksum. average: as `open`
    takes it. Properties that read the record raise CheckpointError where it is damaged."""

    def __init__(self, state, path="the checkpoint", metadata=None, num_heads=None, files=None, average=None, base=None):
        self.state, self.path, self.metadata, self._num_heads = state, path, metadata or {}, num_heads
        self.files, self.average, self.base = files or [path], average, base

    @classmethod
    def open(cls, where, num_heads=None, verify=True, average=None, base=None):
        """Read a .pt or .safetensors file; the newest checkpoint of a run's folder; or a model in diffusers' format: a
        folder, or its name on the hub. Tensors are mapped if possible. verify: as `files.load`. average: the weights to
        take, a name in `averages` (default: the first). base: of LoRA weights, where it moved. Raises CheckpointError."""
        where = newest_of_run(where)
        if os.path.isdir(where) or diffusers_folder.is_hub_name(where):
            weights, record, paths = diffusers_folder.read(diffusers_folder.fetch(where))
            checkpoint = cls(weights, where, record, num_heads, paths, average)
        else:
            state = files.load(where, verify=verify)
            checkpoint = cls(state, where, metadata.read(where), num_heads, average=average, base=base)
        checkpoint.check_record()
        return checkpoint

    def check_record(self):
        """Raises CheckpointError where something that is recorded is not of its type, whether it is needed or not."""
        if self.average not in (None, *self.averages):
            known = f"it holds {', '.join(self.averages)}" if self.averages else "it holds one set of weights"
            raise CheckpointError(f"{self.path}: has no weights called {self.average}; {known}")
        _ = self._recorded_size, self.vae, self.condition_record, self.class_names, self.step, self.latents
        # SiT's names: its models take 1 - s where ours take 1000 s, and predict the velocity the other way round
        if others := [f"{name}={self.options[name]}" for name in ("prediction", "path_type") if name in self.options]:
            what = f"weights of another program's flow ({', '.join(others)}), whose time runs the other way"
            raise CheckpointError(f"{self.path}: {what}; sample them with that program")

    # ------------------------------------------------------------------------------------------------------------------
    # What is recorded

    @functools.cached_property
    def options(self):
        """The recorded options of the run, as a dict; empty for weights alone."""
        args = self.state.get("args") or {}  # another trainer's may be None
        args = vars(args) if isinstance(args, argparse.Namespace) else args
        if not isinstance(args, dict):
            raise self._damaged(f"its options (args) are a {type(args).__name__}, not a dict")
        return dict(args)

    def _damaged(self, problem):
        return CheckpointError(f"{self.path}: damaged: {problem}")

    def _recorded(self, name, kind, *places):
        """The value in the first of the dicts that has one, or None."""
        value = next((place[name] for place in places if place.get(name) is not None), None)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise self._damaged(f"its {name} is {value!r:.50}, not of type {getattr(kind, '__name__', kind)}")
        return value

    @property
    def vae(self):
        """The autoencoder that the model was trained with, as --vae names it; None without a record."""
        return self._recorded("vae", str, self.options, self.metadata)

    @property
    def latents(self):
        """Each channel's {"mean": numbers, "std": numbers} that normalised the latents; None: the autoencoder's own."""
        record = self._recorded("latents", dict, self.state, self.metadata)
        if record is not None:
            for name, low in (("mean", -math.inf), ("std", 0)):
                values, number = record.get(name), self.model_config["in_channels"]
                fits = isinstance(values, list) and len(values) == number and all(isinstance(v, float) for v in values)
                if not fits or not all(low < value < math.inf for value in values):
                    raise self._damaged(f"its latents' {name} is {values!r:.50}, not {number} such numbers")
        return record

    @property
    def condition_record(self):
        """What the model draws by, where it is not the class: {"kind": ..., what data/condition.py records}, else None."""
        record = self._recorded("condition", dict, self.state, self.metadata)
        null_text = self._found.get("text_embedder.null_text")
        # a model of texts that is older than the record of conditions
        if record is None and isinstance(null_text, torch.Tensor) and null_text.ndim == 2:
            crc32 = self._recorded("text_encoder_crc32", str, self.state, self.metadata)
            record = {"kind": "text", "width": null_text.shape[-1] - 1, "length": len(null_text), "crc32": crc32}
            record["name"] = self._recorded("text_encoder", str, self.options, self.metadata)
        return record

    @property
    def drawing(self):
        """Options of sample.py by name that the file records for drawing with it; None without a record."""
        return self._recorded("drawing", dict, self.metadata)

    @functools.cached_property
    def condition(self):
        """What the model draws by, of `data.condition`."""
        try:
            record = self.condition_record or {"num_classes": self.model_config["num_classes"]}
            return read_condition(record, self.class_names, self._found)
        except (TypeError, UserError) as error:
            raise self._damaged(f"its record of the condition: {error}") from None

    @property
    def image_size(self):
        """Size of the images in pixels: see `runtime.shapes`."""
        return self._recorded_size or plain_size([FACTOR * side for side in self.sizes.sides[-2:]])

    @property
    def _recorded_size(self):
        recorded = self._recorded("image_size", int | str, self.options, self.metadata)
        try:
            return recorded and ImageSize(recorded)
        except ValueError as error:
            raise self._damaged(f"its image_size: {error}") from None

    @property
    def class_names(self):
        """Names of the classes by number; None without a record."""
        names = self._recorded("class_names", list, self.state, self.options, self.metadata)
        if names is not None and not all(isinstance(name, str) for name in names):
            raise self._damaged("its class_names are not all text")
        return names

    @property
    def step(self):
        """Updates that the training run had made; None without a record."""
        step = self._recorded("step", int, self.state)
        if step is not None and not 0 <= step < 2**63:
            raise self._damaged(f"its step is {step}")
        return step

    @functools.cached_property
    def checksum(self):
        """CRC-32 of the file's bytes; of a folder, of the checksums of the files that were read."""
        sums = [checksum(path) for path in self.files]
        return sums[0] if len(sums) == 1 else checksum_of_text(sums)

    # ------------------------------------------------------------------------------------------------------------------
    # The model

    @functools.cached_property
    def averages(self):
        """The weights of a training run by their names, {name: state dict}: the averages by their decays, that of
        --ema-decay first, and the trained weights as "model". Empty for weights alone."""
        decay = self._recorded("ema_decay", int | float, self.options)
        found = {"ema" if decay is None else str(decay): self.state.get("ema")}
        found |= {**(self._recorded("emas", dict, self.state) or {}), "model": self.state.get("model")}
        return {name: weights for name, weights in found.items() if weights is not None}

    @functools.cached_property
    def weights(self):
        """The state dict to sample with: that of `average`; by default the EMA's where there is one, else the model's, else
        the file's own dict. LoRA weights are merged into those of their base, which is read here."""
        own, record = self._tensors(self._found), self._recorded("base", dict, self.state)
        if record is None:
            return own
        where, problem = self.base or str(record.get("path")), f"the base of the LoRA weights {self.path}"
        try:
            base = Checkpoint.open(where, average=record.get("average"))
            if base.checksum != record.get("crc32"):
                raise CheckpointError(f"{where}: holds another model")
            return lora.merge(base.weights, own)
        except CheckpointError as error:
            way_out = "put it there, or name it: sample.py --ckpt beside --lora, train.py --init-from"
            raise CheckpointError(f"{problem}: {error}; {way_out}") from None

    @property
    def _found(self):
        """What should be the state dict: the EMA's, the model's, that of another trainer's file, or the file itself."""
        if self.average:
            return self.averages[self.average]
        names = (name for name in ("ema", "model", "state_dict", "module") if name in self.state)
        found = self.state.get(next(names, None), self.state)
        return found if isinstance(found, dict) else {}

    def _tensors(self, found):
        """A state dict, checked to be one. Plain numbers, such as counters of steps, are left out."""
        tensors = found if isinstance(found, dict) else {}
        tensors = {key: value for key, value in tensors.items() if not isinstance(value, int | float)}
        if not tensors or not all(isinstance(key, str) and isinstance(tensors[key], torch.Tensor) for key in tensors):
            raise CheckpointError(f"{self.path}: not a checkpoint of this project: it holds neither weights nor `ema` or "
                                  "`model`")  # fmt: skip
        wrapped = next((key for key in tensors if key.endswith(f".{FIRST}")), "")
        if (prefix := wrapped.removesuffix(FIRST)) and all(key.startswith(prefix) for key in tensors):
            return {key.removeprefix(prefix): value for key, value in tensors.items()}
        return tensors

    @property
    def model_config(self):
        """The keyword arguments of DiT."""
        return dataclasses.asdict(self.sizes)

    @functools.cached_property
    def sizes(self):
        """The model's DiTConfig: as recorded, or inferred from the shapes of the weights."""
        recorded = self.state.get("model_config", self.metadata.get("model_config"))
        if recorded is None:
            recorded = self._inferred_config()
        elif not isinstance(recorded, dict):
            raise self._damaged(f"its model_config is a {type(recorded).__name__}, not a dict")
        known = {field.name for field in dataclasses.fields(DiTConfig)}
        try:
            return DiTConfig(**{name: value for name, value in recorded.items() if name in known})
        except (ValueError, TypeError) as error:
            raise self._damaged(f"its record of the model: {error}") from None

    def _inferred_config(self):
        """The config by the weights' shapes; heads and null class by the recorded options, or the paper's sizes."""
        tensors = self.weights
        try:
            hidden_size, in_channels, patch_size, _ = tensors["x_embedder.proj.weight"].shape
            num_tokens = tensors["pos_embed"].shape[1]
            depth = 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("blocks."))
            mlp_size = tensors["blocks.0.mlp.fc1.weight"].shape[0]
            rows = tensors["y_embedder.embedding_table.weight"].shape[0]
            out_channels = tensors["final_layer.linear.weight"].shape[0] // patch_size**2
        except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
            problem = f"it has no {error}" if isinstance(error, KeyError) else "its weights have other shapes"
            raise CheckpointError(f"{self.path}: not a DiT: {problem}") from None
        if "blocks.0.adaLN_modulation.1.weight" in tensors:
            vectors = tensors["blocks.0.adaLN_modulation.1.weight"].numel() // max(hidden_size, 1) ** 2
            designs = (name for name, design in BLOCKS.items() if design.num_modulations == vectors)
            block = next(designs, f"with {vectors} modulations")
        else:
            block = "cross-attention" if "blocks.0.cross_attn.q.weight" in tensors else "in-context"
        in_table = next((heads for d, width, heads in SIZES.values() if (d, width) == (depth, hidden_size)), None)
        recorded = self._recorded("num_heads", int, self.options)
        num_heads = recorded if recorded is not None else self._num_heads or in_table
        if num_heads is None:
            problem = f"a DiT of width {hidden_size} and depth {depth} without a record of its heads"
            # a guide, or the page, has no such option
            way_out = "pass --num-heads, or record it in a .safetensors file with python -m tools.convert --num-heads"
            raise CheckpointError(self.path, problem, way_out)
        recorded = self._recorded("label_dropout", int | float, self.options)
        dropout = 0.1 if recorded is None else recorded
        mlp_ratio = mlp_size / max(hidden_size, 1)
        if int(hidden_size * mlp_ratio) < mlp_size:  # DiT truncates the product, which may round below the width
            mlp_ratio = math.nextafter(mlp_ratio, math.inf)
        num_classes = rows - 1 if dropout > 0 else self._recorded("num_classes", int, self.options)
        num_classes = rows if num_classes is None else num_classes
        return {
            "input_size": math.isqrt(num_tokens) * patch_size, "patch_size": patch_size, "in_channels": in_channels,
            "hidden_size": hidden_size, "depth": depth, "num_heads": num_heads, "mlp_ratio": mlp_ratio, "block": block,
            "class_dropout_prob": dropout, "num_classes": num_classes, "learn_sigma": out_channels == 2 * in_channels,
        }  # fmt: skip

    def describe(self):
        return name_of(self.model_config)

    def check_finite(self):
        """Raises CheckpointError where a weight is NaN or infinite: the model would draw black images without a word."""
        for part in map(self._tensors, self.averages.values() or [self.weights]):
            for name, tensor in part.items():
                if not tensor.is_floating_point() or tensor.layout != torch.strided:
                    raise self._damaged(f"{name} is no plain tensor of floating-point numbers")
                if not tensor.isfinite().all():
                    raise CheckpointError(f"{self.path}: its weights are not finite ({name}); take an earlier checkpoint")

    def _new_model(self):
        return DiT(**{**self.model_config, **self.condition.model_arguments()})

    def check_weights(self):
        """Raises CheckpointError where the weights do not fit the config or are not finite. Returns the model on the meta
        device: shapes without memory, because a damaged record may ask for any size."""
        weights = self.weights
        try:
            with torch.device("meta"):
                model = self._new_model()
            check_shapes(weights, model.state_dict())
        except ValueError as error:
            raise CheckpointError(f"{self.path}: its weights do not fit ({error})") from None
        self.check_finite()
        return model

    def build_model(self, draw_initial_weights=False):
        """The model with these weights on the CPU, in eval mode and without gradients.

        draw_initial_weights: draw them, and overwrite them: the images of sample.py depend on this part of torch's random
        stream. Raises CheckpointError as `check_weights`."""
        model = self.check_weights()
        model = self._new_model() if draw_initial_weights else model.to_empty(device="cpu")
        model.load_state_dict(self.weights)
        return model.eval().requires_grad_(False)


def name_of(model_config):
    """The paper's name of the model, such as DiT-XL/2; of other sizes DiT-{depth}x{width}/{patch}."""
    depth, width, heads, patch = (model_config[name] for name in ("depth", "hidden_size", "num_heads", "patch_size"))
    name = next((name for name, size in SIZES.items() if size == (depth, width, heads)), f"{depth}x{width}")
    return f"DiT-{name}/{patch if isinstance(patch, int) else patch[-1]}"


def newest_of_run(where):
    """The path of the newest checkpoint where `where` is the folder of a run; else `where`. Raises CheckpointError."""
    folder = os.path.join(where, "checkpoints")
    if not os.path.isdir(folder):
        return where
    found = files.newest_first(folder)
    if not found:
        raise CheckpointError(f"{where}: the run has no checkpoint yet; wait for the first, or name another run")
    return str(found[0])


def record_of(model, class_names=None):
    """What a checkpoint stores of a model beside its weights; `condition` where it is not the class."""
    condition = {"condition": {"kind": model.condition.kind, **model.condition.record()}} if model.condition else {}
    return {"model_config": model.config, "class_names": class_names, **condition}


def check_shapes(weights, expected):
    """Raises ValueError where a state dict has other names or shapes than the `expected` one."""
    found, expected = ({name: tuple(tensor.shape) for name, tensor in s.items()} for s in (weights, expected))
    for name in [*expected, *found]:
        if found.get(name) != expected.get(name):
            raise ValueError(f"{name} is {found.get(name, 'missing')}, must be {expected.get(name, 'absent')}")
