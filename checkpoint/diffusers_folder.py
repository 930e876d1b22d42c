"""Models as folders in diffusers' format, read and written without loss: a DiTPipeline, or its transformer/ alone.

    model_index.json, pipeline.py      the pipeline and the names of the classes
    transformer/                       the DiT: config.json and diffusion_pytorch_model.safetensors
    vae/, scheduler/                   the autoencoder, which a model of pixels lacks, and DDIM's settings

The weights are the same tensors under other names, with two differences: the embedders of timestep and class are copied
into every block, and the position embedding is not stored."""

import dataclasses
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from checkpoint import files, metadata
from checkpoint.files import CheckpointError
from data.pretrained import check_network
from models import DiTConfig, position_embedding
from runtime.files import read_json, reason, write_json

WEIGHTS = "diffusion_pytorch_model"
# Our layers: diffusers' layers. A layer with three names is split into them, in this order
OUTER = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
EMBEDDERS = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
BLOCK = {
    "adaLN_modulation.1": ["norm1.linear"],
    "attn.qkv": ["attn1.to_q", "attn1.to_k", "attn1.to_v"], "attn.proj": ["attn1.to_out.0"],
    "mlp.fc1": ["ff.net.0.proj"], "mlp.fc2": ["ff.net.2"],
}  # fmt: skip
# Arguments of models.DiT and what they are called in transformer/config.json, and what all DiTs have in common there
SIZES = {
    "input_size": "sample_size", "patch_size": "patch_size", "in_channels": "in_channels",
    "depth": "num_layers", "num_heads": "num_attention_heads", "num_classes": "num_embeds_ada_norm",
}  # fmt: skip
DEFAULTS = dataclasses.asdict(DiTConfig())
COMMON = {"norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate", "attention_bias": True}


def layer_names(depth):
    """{our layer: its names in diffusers' model} for all layers of a model of `depth` blocks."""
    blocks = [f"transformer_blocks.{i}" for i in range(depth)]
    names = {ours: [theirs] for ours, theirs in OUTER.items()}
    names |= {ours: [f"{block}.{theirs}" for block in blocks] for ours, theirs in EMBEDDERS.items()}
    for i, block in enumerate(blocks):
        names |= {f"blocks.{i}.{ours}": [f"{block}.{name}" for name in theirs] for ours, theirs in BLOCK.items()}
    return names


def fixed_positions(config):
    """The state dict's pos_embed (1, T, D)."""
    return position_embedding(config["hidden_size"], DiTConfig(**config).grid)[None].float()


def from_diffusers(tensors, config):
    """The state dict of models.DiT(**config) in diffusers' `tensors`. Raises KeyError for fewer, ValueError for more."""
    tensors = dict(tensors)
    weights = {"pos_embed": fixed_positions(config)}
    for ours, names in layer_names(config["depth"]).items():
        for kind in ("weight", "bias") if ours != "y_embedder.embedding_table" else ("weight",):
            parts = [tensors.pop(f"{name}.{kind}") for name in names]
            if ours.endswith("qkv"):
                parts = [torch.cat(parts)]
            if not all(torch.equal(part, parts[0]) for part in parts[1:]):
                raise ValueError(f"{ours} differs between the blocks, which have one in common here")
            weights[f"{ours}.{kind}"] = parts[0]
    if tensors:
        raise ValueError(f"{min(tensors)} must be absent")
    return weights


def to_diffusers(weights, depth):
    """Diffusers' tensors of a state dict of models.DiT, each with its own memory."""
    tensors = {}
    for ours, names in layer_names(depth).items():
        for kind in ("weight", "bias"):
            if (tensor := weights.get(f"{ours}.{kind}")) is not None:
                parts = tensor.chunk(3) if ours.endswith("qkv") else [tensor] * len(names)
                tensors |= {f"{name}.{kind}": part.clone() for name, part in zip(names, parts, strict=True)}
    return tensors


def is_hub_name(where):
    """Whether `where` names a model on the Hugging Face hub, OWNER/MODEL, and no file or folder here."""
    looks_so = re.fullmatch(r"[\w.-]+/[\w.-]+", str(where)) and Path(where).suffix not in (".pt", ".safetensors")
    return bool(looks_so) and not os.path.exists(where)


def fetch(where):
    """The folder itself, or that of the hub's model, downloaded when missing. Raises CheckpointError."""
    if not is_hub_name(where):
        return where
    from huggingface_hub import constants, snapshot_download  # takes long to import

    try:
        check_network(where, os.path.isdir(f"{constants.HF_HUB_CACHE}/models--{str(where).replace('/', '--')}"))
        folder = snapshot_download(str(where), allow_patterns=["*.json", "*.safetensors"])
        if not any(Path(folder).glob(f"**/{WEIGHTS}*.safetensors")):  # an old upload
            folder = snapshot_download(str(where), allow_patterns=["*.json", "*.bin"])
        return folder
    except Exception as error:  # the hub's client and its HTTP library each raise their own kinds
        problem = f"no such file or folder, nor a model that the hub gives ({reason(error)[:200]})"
        raise CheckpointError(where, problem) from None


def read(folder):
    """(weights, record, files) of a folder: a state dict of models.DiT, a dict of what is known of the model (see
    checkpoint.metadata), and the files that were read. Raises CheckpointError."""
    folder = Path(folder)
    inner = folder / "transformer" if (folder / "transformer").is_dir() else folder
    index, config = _read_json(folder / "model_index.json"), _read_json(inner / "config.json")
    if not config:
        problem = "not a DiT in diffusers' format, it has no transformer/config.json"
        way_out = "name a checkpoint file, or a folder that DiTPipeline.save_pretrained or convert.py has written"
        raise CheckpointError(folder, problem, way_out)
    kind = config.get("_class_name")
    if kind not in ("DiTTransformer2DModel", "Transformer2DModel") or not COMMON.items() <= config.items():
        raise CheckpointError(f"{inner}: not a DiT but a {kind}, or one of another design")
    found = (sorted(inner.glob(WEIGHTS + end)) for end in (".safetensors", "-*.safetensors", ".bin"))
    paths = next(filter(None, found), None)
    if not paths:
        raise CheckpointError(f"{inner}: has no weights: neither {WEIGHTS}.safetensors nor {WEIGHTS}.bin")
    tensors = {key: tensor for path in paths for key, tensor in files.load(path).items()}
    try:
        sizes = {ours: config[theirs] for ours, theirs in SIZES.items()}
        sizes["hidden_size"] = config["num_attention_heads"] * config["attention_head_dim"]
        sizes["learn_sigma"] = config["out_channels"] == 2 * config["in_channels"]
        sizes = dataclasses.asdict(DiTConfig(**sizes))  # the rest as in the paper
        weights = from_diffusers(tensors, sizes)
    except (ArithmeticError, AttributeError, KeyError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        missing = " is missing" if isinstance(error, KeyError) else ""
        raise CheckpointError(f"{inner}: not a DiT of this kind: {str(error).removeprefix('--')}{missing}") from None
    record = {"model_config": sizes} | metadata.read(paths[0])
    vae, names = _read_json(folder / "vae/config.json"), index.get("id2label")
    if vae:
        record |= {"vae": str((folder / "vae").resolve()), "recorded_vae": record.get("vae")}
        if isinstance(levels := vae.get("block_out_channels"), list):  # each level but the last halves the side
            record.setdefault("image_size", sizes["input_size"] * 2 ** (len(levels) - 1))
    if isinstance(names, dict):
        record["class_names"] = [names.get(str(i)) for i in range(sizes["num_classes"])]
        if None in record["class_names"]:
            number = record["class_names"].index(None)
            raise CheckpointError(f"{folder / 'model_index.json'}: id2label has no name of class {number}")
    return weights, record, [inner / "config.json", *paths]


def is_square(config):
    """Whether the input and the patches of a model are squares, as weights' shapes say of all that have no record."""
    return isinstance(config["input_size"], int) and isinstance(config["patch_size"], int)


def newer_options(checkpoint):
    """What no weights' names or shapes and no config of diffusers tell of a model, as text."""
    config, names = checkpoint.model_config, ("objective", "predict", "rope", "time_shift")
    found = [f"--{name} {config[name]}" for name in names if config[name] != DEFAULTS[name]]
    found += ["--latent-norm channel"] if checkpoint.latents else []
    found += [] if is_square(config) else [f"--image-size {checkpoint.image_size}"]
    found += ["--label-dropout 0"] if config["num_classes"] and not config["class_dropout_prob"] else []
    found += ["--aspect-buckets"] if config["other_sizes"] else []
    return " ".join(found + [f"--condition {record['kind']}" for record in [checkpoint.condition_record] if record])


def transformer_config(checkpoint):
    """The arguments of diffusers' DiTTransformer2DModel for a checkpoint. Raises CheckpointError if it cannot hold it."""
    config = checkpoint.model_config
    width, pos_embed = config["hidden_size"], checkpoint.weights["pos_embed"].float()
    for problem, applies in {
        "its input is not a square": not is_square(config),
        f"its block design is {config['block']}, not adaln-zero": config["block"] != "adaln-zero",
        f"its MLP ratio is {config['mlp_ratio']}, not 4": int(width * config["mlp_ratio"]) != 4 * width,
        "it has no null class": config["class_dropout_prob"] == 0 and config["num_classes"],
        f"it has {newer_options(checkpoint)}": newer_options(checkpoint),
        "its position embedding was changed": not pos_embed.allclose(fixed_positions(config), rtol=0, atol=1e-6),
    }.items():
        if applies:
            problem = f"diffusers' DiT cannot hold this model, {problem}"
            raise CheckpointError(checkpoint.path, problem, "write a .safetensors file")
    sizes = {theirs: config[ours] for ours, theirs in SIZES.items()}
    sizes["attention_head_dim"] = width // config["num_heads"]
    sizes["out_channels"] = config["in_channels"] * (2 if config["learn_sigma"] else 1)
    return COMMON | sizes | {"norm_eps": 1e-6}


def write(folder, checkpoint, record, vae=None):
    """Write a checkpoint as the folder of a DiTPipeline, atomically; one that is there is replaced.

    record: see checkpoint.metadata. vae: an AutoencoderKL of diffusers, or None. Raises CheckpointError where the format
    cannot hold the model, and OSError, RuntimeError or SafetensorError where the folder cannot be written."""
    from diffusers import DDIMScheduler, DiTTransformer2DModel, __version__  # takes seconds to import

    config = transformer_config(checkpoint)
    tensors = to_diffusers(checkpoint.weights, config["num_layers"])
    with torch.device("meta"):
        transformer = DiTTransformer2DModel(**config)
    expected = {key: tensor.shape for key, tensor in transformer.state_dict().items()}
    if expected != {key: tensor.shape for key, tensor in tensors.items()}:
        raise CheckpointError(f"diffusers {__version__}: its DiT has other tensors than that of 0.42; install that version")
    index = {"_class_name": ["pipeline", "OriginalDiTPipeline"], "_diffusers_version": __version__}
    index |= {"transformer": ["diffusers", "DiTTransformer2DModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    index["vae"] = ["diffusers", "AutoencoderKL"] if vae else [None, None]
    if len(names := record.get("class_names") or []) == config["num_embeds_ada_norm"]:
        index["id2label"] = dict(enumerate(names))

    def fill(folder):
        transformer.save_config(folder / "transformer")
        save_file(tensors, folder / "transformer" / f"{WEIGHTS}.safetensors", metadata.to_text(record, tensors))
        # the process of the paper, at the timesteps of "ddimN"
        DDIMScheduler(clip_sample=False, timestep_spacing="leading").save_pretrained(folder / "scheduler")
        if vae:
            vae.save_pretrained(folder / "vae")
        shutil.copyfile(Path(__file__).with_name("diffusers_pipeline.py"), folder / "pipeline.py")
        write_json(folder / "model_index.json", index)
        for path in folder.rglob("*.safetensors"):  # which safetensors 0.8 makes for their owner alone
            shutil.copymode(folder / "model_index.json", path)

    _replace_folder(Path(os.path.abspath(folder)), fill)


def _replace_folder(folder, fill):
    """Write a folder atomically: fill(temporary) writes into a folder beside it, which then takes its place."""
    temporary, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        temporary.mkdir()
        fill(temporary)
        if folder.exists():
            os.rename(folder, old)
        os.rename(temporary, folder)
    except BaseException:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _read_json(path):
    """The dict in a JSON file, empty where there is no such file. Raises CheckpointError."""
    value = read_json(path)
    if value is None and path.exists():
        raise CheckpointError(f"{path}: damaged, it is not a JSON object")
    return value or {}
