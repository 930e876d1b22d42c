"""The files that the cases of tests/stress/mistake_cases.py read: whole ones, and damaged and special ones."""

import json
import os
import shutil
import socket
import subprocess
import zlib

import numpy as np
import torch
from helpers import make_autoencoder, make_images, make_inception
from PIL import Image
from stress.mistake_cases import (
    BAD_IMAGES,
    INDEX,
    NAN,
    RECORDS,
    RESUMED,
    SET_OPTIONS,
    SPECIAL,
    VAE_CONFIGS,
    case,
    npz_bytes,
    npz_files,
)  # fmt: skip
from torch import nn


def make_special(path, kind):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        folder = os.open(path.parent, os.O_RDONLY)
        socket.socket(socket.AF_UNIX).bind(f"/proc/self/fd/{folder}/{path.name}")  # a full path may be too long for it
        os.close(folder)
    elif kind == "broken-link":
        path.symlink_to("nowhere")
    elif kind == "link-loop":
        path.symlink_to(path.name)
    elif kind == "folder":
        path.mkdir()
        (path / "something").mkdir()
    elif kind != "missing":
        path.write_bytes({"empty": b"", "text": b"some text\n", "bytes": bytes(range(256)) * 9, "list": b"[1, 2]"}[kind])


def variant(folder, name):
    """A copy of a folder, pipes included."""
    target = folder.with_name(name)
    subprocess.run(["cp", "-a", folder, target], check=True)
    return target


def model_file(path, args=(), class_names=None, **config):
    from models import DiT

    torch.manual_seed(0)
    sizes = {
        "input_size": 8,
        "patch_size": 2,
        "in_channels": 1,
        "hidden_size": 16,
        "depth": 1,
        "num_heads": 2,
        "num_classes": 10,
    }
    model = DiT(**{**sizes, **config})
    for parameter in model.parameters():
        if not parameter.any():  # zero at first, so that class and guidance would change nothing
            nn.init.normal_(parameter, std=0.1)
    state = {
        "ema": model.state_dict(),
        "model_config": model.config,
        "args": {"vae": "none", "image_size": 8, **dict(args)},
    }
    torch.save(state | ({"class_names": class_names} if class_names else {}), path)
    return state


def make_inputs(root, run_cases):
    """Everything that the cases read, in root/in. run_cases: of tests/stress/mistakes.py, for what commands make."""
    from safetensors.torch import save_file

    inputs = root / "in"
    inputs.mkdir(parents=True)
    make_images(inputs / "images")
    make_autoencoder(inputs / "vae")
    make_inception(inputs / "inception.pth")
    state = torch.load(inputs / "inception.pth")
    torch.save({**state, "fc.bias": state["fc.bias"] * NAN}, inputs / "inception-nan.pth")
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(inputs / "image.png")
    (inputs / "one-image/a").mkdir(parents=True)
    shutil.copy(inputs / "image.png", inputs / "one-image/a")
    (inputs / "empty-classes/a").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 6, 8, 8, 3), dtype=np.uint8)
    for folder, name, images in (("", "reference", pixels[0]), ("", "samples", pixels[1]), ("set", "samples", pixels[1])):
        (inputs / folder).mkdir(exist_ok=True)
        np.savez(inputs / folder / f"{name}.npz", arr_0=images)
    for kind in ("folder", "pipe"):
        shutil.copy(inputs / "samples.npz", inputs / f"report-{kind}.npz")
        make_special(inputs / f"report-{kind}.npz.metrics.json", kind)
    (inputs / "a.json").write_text('{"fid": 3}')
    for kind in SPECIAL:
        if kind in ("pipe", "socket", "broken-link", "link-loop", "empty", "text", "bytes", "folder"):
            for end in ("", ".png", ".json", ".pt", ".gif"):
                make_special(inputs / "bad" / f"{kind}{end}", kind)
    make_checkpoints(inputs)
    shutil.copy(inputs / "tiny.pt", inputs / "set/x.pt")
    for name, content in npz_files().items():
        make_special(inputs / "npz" / f"{name}.npz", "missing")
        (inputs / "npz" / f"{name}.npz").write_bytes(content)
    make_image_folders(inputs)
    make_autoencoders(inputs)
    for name in ("caf\udce9", "new\nline", "\u202e", "a b"):
        make_special(inputs / "names" / name, "text")
    variant(inputs / "images", "latin")
    (inputs / "latin/bee").rename(inputs / "latin/be\udce9")
    (inputs / "latin/ant/0.png").rename(inputs / "latin/ant/a\nb\udce9.png")
    for command, extra in (
        ("train", "--run-dir in/run-whole --sample-every 2"), ("extract_latents", "--out in/latents --shard-size 5"),
        ("sample_ddp", "--sample-dir in/set-whole"), ("convert", ""),
    ):  # fmt: skip
        positional = ["in/latent.pt", "in/dit-whole"] if command == "convert" else None
        whole = case(command, "", extra + " --vae in/vae" * (command == "convert"), "", positional=positional, status=(0,))
        answer = run_cases([whole], root, without_inputs=True)[0]
        assert not answer["wrong"], answer
        if command == "train":
            shutil.copy(inputs / "run-whole/checkpoints/0000004.pt", inputs / "tiny.pt")
            make_records(inputs)
    make_variants(inputs)
    save_file(torch.load(inputs / "tiny.pt")["ema"], inputs / "weights.safetensors")


def make_checkpoints(inputs):
    model_file(inputs / "tiny.pt")  # until a run's takes its place
    model_file(inputs / "no-null.pt", class_dropout_prob=0.0)
    model_file(inputs / "unconditional.pt", num_classes=0)
    model_file(inputs / "latent.pt", {"vae": "in/vae", "image_size": 16}, in_channels=4, input_size=2, patch_size=1)
    model_file(inputs / "colour.pt", {"image_size": 16}, ["ant", "bee", "cat"], in_channels=3, input_size=16, num_classes=3)
    torch.save(torch.load(inputs / "tiny.pt")["ema"], inputs / "no-heads.pt")


class Code:
    def __reduce__(self):
        return os.system, ("touch code-was-run",)


def make_records(inputs):
    from safetensors.torch import save_file

    tiny = torch.load(inputs / "tiny.pt")
    for folder in ("records", "bytes"):
        (inputs / folder).mkdir()
    for name, damage in {**RECORDS, **RESUMED}.items():
        torch.save(damage(dict(tiny)), inputs / "records" / f"{name}.pt")
    whole = (inputs / "tiny.pt").read_bytes()
    save_file(tiny["ema"], weights := inputs / "bytes/whole.safetensors")
    save_file({"a": torch.zeros(3)}, inputs / "bytes/other.safetensors")
    save_file(tiny["ema"], inputs / "bytes/metadata.safetensors", {"model_config": "{not JSON"})
    contents = {
        "truncated.pt": whole[:-200], "half.pt": whole[: len(whole) // 2], "tail.pt": whole[500:],
        "zip.pt": npz_bytes({})[:0] + b"PK\x05\x06" + bytes(18),
        "png.pt": (inputs / "image.png").read_bytes(), "npz.pt": npz_bytes({"arr_0": np.zeros(3)}),
        "truncated.safetensors": weights.read_bytes()[:-100], "header.safetensors": b"\xff" * 8 + b"{}",
        "text.safetensors": b"some text",
    }  # fmt: skip
    for name, content in contents.items():
        (inputs / "bytes" / name).write_bytes(content)
    for name, value in {
        "code.pt": {"model": Code()},
        "list.pt": [1, 2],
        "number.pt": 3,
        "tensor.pt": torch.zeros(3),
    }.items():
        torch.save(value, inputs / "bytes" / name)


def make_image_folders(inputs):
    folders, png = inputs / "image-folders", (inputs / "images/ant/0.png").read_bytes()
    header = bytearray(png)
    header[16:24] = (60000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(bytes(header[12:29])).to_bytes(4, "big")
    contents = {
        "truncated": png[:200],
        "text": b"some text",
        "empty": b"",
        "bomb": bytes(header),
        "bytes": bytes(range(256)),
    }
    for name in BAD_IMAGES:
        folder = folders / name
        shutil.copytree(inputs / "images", folder)
        for i in range(4):  # of one size, as evaluate.py wants them
            shutil.copy(inputs / "images/ant/0.png", folder / "ant" / f"{i}.png")
        stem = name.split(".")[0]
        if stem in ("pipe", "broken-link", "link-loop"):
            make_special(folder / "ant" / name, stem)
        else:
            (folder / "ant" / name).write_bytes(contents.get(stem, b"some text"))
    shutil.copytree(inputs / "images/ant", folders / "mixed")
    for name, picture in {
        "16-bit": Image.fromarray(np.zeros((8, 8), np.uint16)), "no-images": None, "animated": Image.new("RGB", (8, 8)),
    }.items():  # fmt: skip
        folder = inputs / "animated" if name == "animated" else folders / name
        folder.mkdir()
        for i in range(4 if picture else 0):
            more = {"save_all": True, "append_images": [picture]} if name == "animated" else {}
            picture.save(folder / f"{i}.png", **more)


def make_autoencoders(inputs):
    from safetensors.torch import load_file, save_file

    config, weights = json.loads((inputs / "vae/config.json").read_text()), "diffusion_pytorch_model.safetensors"
    tensors = load_file(inputs / "vae" / weights)
    for name, values in VAE_CONFIGS.items():
        (variant(inputs / "vae", f"vae-{name}") / "config.json").write_text(json.dumps({**config, **values}))
    for name, text in {"list": "[1]", "number": "3"}.items():
        (variant(inputs / "vae", f"vae-{name}") / "config.json").write_text(text)
    for name in ("no-weights", "truncated", "weights-text", "nan", "large", "pipe"):
        path = variant(inputs / "vae", f"vae-{name}") / weights
        content = path.read_bytes()
        path.unlink()
        if name in ("nan", "large"):
            factor = {"nan": NAN, "large": 1e6}[name]
            save_file({**tensors, "quant_conv.weight": tensors["quant_conv.weight"] * factor}, path, {"format": "pt"})
        elif name == "pipe":
            make_special(inputs / "vae-pipe/config.json", "pipe")
        elif name != "no-weights":
            path.write_bytes({"truncated": content[:-100], "weights-text": b"some text"}[name])


def make_variants(inputs):
    """Folders of latents, of samples, of runs and in diffusers' format, with one thing wrong in each."""
    for name in ("index.json", "images.json", "shard-00000.npy"):
        for kind in ("pipe", "folder", "link-loop", "missing", "empty", "text", "bytes"):
            make_special(variant(inputs / "latents", f"latents-{name}-{kind}") / name, kind)
    for name, damage in INDEX.items():
        path = variant(inputs / "latents", f"latents-{name}") / "index.json"
        path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    for name, content in {"truncated": "{", "count": '{"count": 3, "crc32": "00000000"}', "text": '"text"'}.items():
        (variant(inputs / "latents", f"latents-shard-{name}") / "shard-00001.json").write_text(content)
    (variant(inputs / "latents", "latents-part") / "index.json").unlink()

    for kind in ("pipe", "folder", "link-loop", "missing", "empty", "text", "bytes", "list"):
        make_special(variant(inputs / "set-whole", f"set-options.json-{kind}") / "set/options.json", kind)
    for name, values in SET_OPTIONS.items():
        path = variant(inputs / "set-whole", f"set-{name}") / "set/options.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    make_special(variant(inputs / "set-whole", "set-npz-folder") / "set.npz", "folder")
    for kind in ("folder", "pipe"):
        folder = variant(inputs / "set-whole", f"set-png-{kind}")
        (folder / "set.npz").unlink()
        make_special(folder / "set/000000.png", kind)

    for name in ("status.json", "log.txt", "metrics.jsonl", "options.json", "checkpoints", ".lock"):
        for kind in ("pipe", "folder", "text"):
            make_special(variant(inputs / "run-whole", f"run-{name}-{kind}") / name, kind)
    make_special(variant(inputs / "run-whole", "run-step-folder") / "checkpoints/0000006.pt", "folder")
    for path in (variant(inputs / "run-whole", "run-all-damaged") / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:-50])
    shutil.copy(inputs / "bytes/code.pt", variant(inputs / "run-whole", "run-newest-code") / "checkpoints/0000005.pt")
    for kind in ("pipe", "folder", "text", "empty", "bytes"):
        make_special(variant(inputs / "run-whole", f"run-grid-{kind}") / "samples/0000002.png", kind)
    shutil.rmtree(variant(inputs / "run-whole", "run-grid-missing") / "samples")
    rows = {"garbage": b"not JSON\n", "numbers": b"3\nnull\n", "nested": b"[" * 100_000 + b"\n", "bytes": b"\xff\xfe\n"}
    for name, content in rows.items():
        path = variant(inputs / "run-whole", f"run-rows-{name}") / "metrics.jsonl"
        path.write_bytes(path.read_bytes() + content)

    weights = "transformer/diffusion_pytorch_model.safetensors"
    for name, place, change_text in (
        ("config-missing", "transformer/config.json", None), ("config-list", "transformer/config.json", lambda config: [1]),
        ("config-sizes", "transformer/config.json", lambda config: {**config, "num_layers": "x"}),
        ("weights-missing", weights, None), ("weights-truncated", weights, b"abc"), ("weights-other", weights, "other"),
        ("kind", "transformer/config.json", lambda config: {**config, "_class_name": "UNet2DModel"}),
        ("names", "model_index.json", lambda index: {**index, "id2label": {"0": 3}}),
    ):  # fmt: skip
        path = variant(inputs / "dit-whole", f"dit-{name}") / place
        if change_text is None:
            path.unlink()
        elif callable(change_text):
            path.write_text(json.dumps(change_text(json.loads(path.read_text()))))
        elif change_text == "other":
            shutil.copy(inputs / "bytes/other.safetensors", path)
        else:
            path.write_bytes(change_text)
