"""The files that the cases of tests/stress/mistakes.txt read: whole ones, and damaged and special ones."""

import io
import json
import os
import pickle
import shutil
import socket
import subprocess
import zipfile
import zlib

import numpy as np
import torch
from helpers import make_autoencoder, make_images, make_inception
from PIL import Image
from torch import nn

NAN, INF, HUGE = float("nan"), float("inf"), 10**9
SPECIAL = ("pipe", "socket", "broken-link", "link-loop", "empty", "text", "bytes", "folder")
SPOILED = ("pipe", "folder", "link-loop", "missing", "empty", "text", "bytes")
NAMES = ("caf\udce9", "new\nline", "\u202e", "a b")
CHECKPOINTS = ("truncated.pt", "flipped.pt", "half.pt", "tail.pt", "zip.pt", "code.pt", "pickle.pt", "list.pt",
    "number.pt", "tensor.pt", "png.pt", "npz.pt", "truncated.safetensors", "header.safetensors", "metadata.safetensors",
    "other.safetensors", "text.safetensors")  # fmt: skip
PICTURES = ("truncated.png", "text.png", "empty.png", "bomb.png", "pipe.png", "broken-link.png", "link-loop.png",
    "bytes.jpg", "caf\udce9.png", "new\nline.png")  # fmt: skip
DIT = {  # what is wrong with a folder in diffusers' format: what the error says
    "config-missing": "no transformer/config.json", "config-list": "not a JSON object", "config-sizes": "depth 'x'",
    "kind": "UNet2DModel", "design": "another design", "depth": "depth 1000000000", "heads": "not a DiT of this kind",
    "width": "fit", "weights-missing": "has no weights", "weights-truncated": "truncated", "weights-other": "is missing",
    "weights-more": "q_norm must be absent", "weights-nan": "not finite", "embedders": "differs between the blocks",
    "names": "no name of class 1", "names-numbers": "class_names", "index": "not a JSON object",
    "bin-code": "it carries code",
}  # fmt: skip
ARRAYS = {  # what is wrong with an .npz file: what the error says
    "truncated": "not a .npz file", "crc": "Bad CRC-32", "encrypted": "is encrypted", "method": "compression method",
    "empty-zip": "needs arr_0", "object": "holds Python objects",
    "7TiB": "promises 7,864,320,000,000 bytes where there are 0", "huge": "promises",
    "one-more": "promises 1,153 bytes where there are 1,152", "negative": "the impossible shape (-6, 8, 8, 3)",
    "shape-text": "not a readable .npy array", "version": "its version 9.0 is unknown",
    "header": "not a readable .npy array", "notnpy": "not a readable .npy array (the magic string",
    "empty-member": "arr_0 is not a readable .npy array", "cut-header": "arr_0 is not a readable .npy array",
    "kind": "arr_0 is not a readable .npy array", "float": "float64 with values from -1 to -1", "int": "must be uint8",
    "flat": "must be (N, H, W, 3)", "grey": "must be (N, H, W, 3)", "none": "must be (N, H, W, 3)",
    "text": "must be (N, H, W, 3)", "fortran": "column-major", "only-sigma": "only one of mu and sigma",
    "no-arrays": "needs arr_0", "mu-nan": "mu holds NaN, infinity or values above", "sigma-inf": "sigma holds NaN",
    "sigma_s-nan": "sigma_s holds NaN", "mu-short": "mu has shape (5,)", "mu-text": "must be floating-point numbers",
    "mu-huge": "mu holds NaN", "mu-complex": "must be floating-point numbers", "mu-object": "mu holds Python objects",
    "labels-notnpy": "arr_1 is not a readable .npy array", "sigma_s-7TiB": "sigma_s has a header that promises",
}  # fmt: skip
WORDS = {  # what the error says of each choice in a list
    "folders": DIT, "arrays": ARRAYS,
    "checkpoints": dict.fromkeys(("code.pt", "pickle.pt"), "refused, it carries code (posix.system)")
    | {"flipped.pt": "damaged: the checksum of"},
    "broken": {"list": "no usable autoencoder", "number": "no usable autoencoder", "nan": "not finite"},
    "pictures": {"truncated.png": "not a readable image (image file is truncated)", "text.png": "not a readable image"},
}  # fmt: skip
ROWS = {"garbage": b"not JSON\n", "numbers": b"3\nnull\n", "nested": b"[" * 100_000 + b"\n", "bytes": b"\xff\xfe\n"}

# ----------------------------------------------------------------------------------------------------------------------
# Wrong records: of a checkpoint, an autoencoder's config, stored latents, a set of images


def change(**values):
    return lambda state: {**state, **values}


def recorded(part, **values):
    return lambda state: {**state, part: {**state[part], **values}}


def without(part, *names):
    def remove(state):
        if names:
            return {**state, part: without(*names)(state[part])}
        return {name: value for name, value in state.items() if name != part}

    return remove


def weight(name, make):
    return lambda state: {**state, "ema": {**state["ema"], name: make(state["ema"][name])}}


def values_of(make, **values):
    """{"name-0": damage, ...}: a damage by make(name=value) for each value of each name."""
    return {f"{name}-{i}": make(**{name: value}) for name, found in values.items() for i, value in enumerate(found)}


def model(**values):
    return recorded("model_config", **values)


def args(**values):
    return recorded("args", **values)


def stored(**values):
    """Of the Settings in a shard of latents."""
    return lambda record: {**record, "settings": json.dumps({**json.loads(record["settings"]), **values})}


ARGS = values_of(change, args=("text", [1], 3))  # harmless for who wants the weights alone
RECORDS = {  # that every reader of a checkpoint refuses
    **values_of(args, vae=(3, ["none"]), image_size=("8x", 8.5)),
    **values_of(change, class_names=(3, "cat", [1, 2]), model_config=("text", [1])),
    **values_of(
        model, num_heads=(3, 0, "2", None), hidden_size=(HUGE, 65536), depth=(10**6, 64, 0), mlp_ratio=(1e30, NAN, "4"),
        block=("unknown", 1), input_size=(HUGE, 16), patch_size=(0,), num_classes=(10**12, 10**7, -1),
        class_dropout_prob=(2.0, "x"), learn_sigma=("yes",), in_channels=(0,),
    ),
    "input-65536": model(input_size=65536, patch_size=1),
    **values_of(change, ema=(None, "text", [1], {}, {"pos_embed": 1})),
    "weight-missing": without("ema", "pos_embed"),
    "weight-more": recorded("ema", extra=torch.zeros(2)),
    "weight-nan": weight("final_layer.linear.weight", lambda w: w * NAN),
    "weight-inf": weight("blocks.0.attn.qkv.bias", lambda w: w + INF),
    "weight-shape": weight("pos_embed", lambda w: w[:, :3]),
    "weight-0d": weight("pos_embed", lambda w: w.sum()),
    "weight-text": weight("pos_embed", lambda w: "text"),
    "weight-sparse": weight("blocks.0.attn.qkv.weight", lambda w: w.to_sparse()),
    "weight-complex": weight("blocks.0.attn.qkv.weight", lambda w: w * 1j),
}  # fmt: skip
INFERRED = {  # of a file without model_config, whose sizes are inferred
    **values_of(args, num_heads=(3, "2", 0, -2), label_dropout=("x", NAN)),
    "0d": weight("pos_embed", lambda w: w.sum()),
    "block": without("ema", "blocks.0.mlp.fc1.weight"),
    "table": weight("y_embedder.embedding_table.weight", lambda w: w[:0]),
    "modulation": weight("blocks.0.adaLN_modulation.1.weight", lambda w: w[:50]),
    "patch": weight("x_embedder.proj.weight", lambda w: w[..., :1]),
}
RECORDS |= {
    f"inferred-{name}": lambda state, damage=damage: damage(without("model_config")(state))
    for name, damage in INFERRED.items()
}
RESUMED = {  # that only matter when a run is resumed
    **values_of(
        change, opt=(None, "text", {}, []), step=("4", -1, 1.5, [4], 2**70, True), images_seen=("x", -5, 2**70),
        data=(3, "text", [1], [1, 2], ["a", "b"]), model=(None, "text"),
    ),
    **values_of(
        lambda **values: recorded("opt", **values), param_groups=([], "text", [None]),
        state=("text", {0: "text"}, {0: {"step": "x"}}),
    ),
    **values_of(args, lr=("fast",), global_seed=(1,), betas=("x",)),
    "model-missing": without("model"),
    "model-nan": recorded("model", **{"final_layer.linear.bias": torch.full((8,), NAN)}),
    "no-opt": without("opt"),
}  # fmt: skip
AUTOENCODERS = values_of(
    change, scaling_factor=("x", 0, NAN), latent_channels=("4", 0, [4], 8), block_out_channels=(8, ["a"], [], None),
    in_channels=(1,), shift_factor=("x",), down_block_types=(["x"] * 4,), _class_name=("VQModel",),
    latents_mean=([1.0] * 3,), latents_std=([1.0, 1.0, 1.0, 0.0],),
)  # fmt: skip
WORDS["autoencoders"] = {name: name.rpartition("-")[0].replace("_", "-") for name in AUTOENCODERS}
WORDS["autoencoders"] |= {  # where the value has the right type
    "latent_channels-3": "", "in_channels-0": "takes 1 channels", "down_block_types-0": "no usable autoencoder",
    "_class_name-0": "it is of the kind VQModel", "latents_mean-0": "3 numbers, for 4 channels",
}  # fmt: skip
INDEXES = {"list": lambda record: [1], "empty": lambda record: {}, "no-settings": without("settings")}
INDEXES |= values_of(change, version=(9, "1"), crc32=("x", 3), settings=("text", "[1]", None)) | values_of(
    stored, images=("x", 10**9), image_size=(10**9,), dtype=("complex64",), classes=(3, ["ant"]), scaling=([NAN], []),
    factor=(0,), channels=(10**6,), flip=(False, "x"), moments=(3,),
)  # fmt: skip
SETTINGS = values_of(
    change, cfg_scale=(7, ["1.5"]), checkpoint_crc32=(3, None), num_sampling_steps=("2",), global_seed=([0],)
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Arrays that cannot be measured


def npz_bytes(arrays, **members):
    file = io.BytesIO()
    np.savez(file, **arrays)
    with zipfile.ZipFile(file, "a") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def npy_header(text, version=1, data=b""):
    """An .npy file with any header."""
    body = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + len(body).to_bytes(2 if version == 1 else 4, "little") + body + data


def npz_files():
    """{name: bytes} of .npz files that cannot be measured."""
    images, mu, sigma = np.zeros((6, 8, 8, 3), np.uint8), np.zeros(2048), np.eye(2048, dtype=np.float32)
    good = npz_bytes({"arr_0": images})

    def patched(value, *places):
        """The bytes after the marks of a local and of a central header."""
        content = bytearray(good)
        for mark, place in zip((b"PK\x03\x04", b"PK\x01\x02"), places, strict=True):
            content[good.index(mark) + place] = value
        return bytes(content)

    def header(shape, kind="|u1", version=1, data=b""):
        return npy_header(f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}", version, data)

    def shaped(*words, **named):
        return npz_bytes({}, arr_0=header(*words, **named))

    arrays = {
        "float": images / 127.5 - 1, "int": images.astype(int), "flat": images[0], "grey": images[..., :1],
        "none": images[:0], "few": images[:2], "text": np.array(["a"]), "fortran": np.asfortranarray(images),
    }  # fmt: skip
    moments = {
        "only-mu": {"mu": mu}, "only-sigma": {"sigma": sigma}, "no-arrays": {"x": mu},
        "mu-nan": {"mu": mu * NAN, "sigma": sigma}, "sigma-inf": {"mu": mu, "sigma": np.full_like(sigma, INF)},
        "mu-short": {"mu": mu[:5], "sigma": sigma}, "mu-text": {"mu": np.array(["a"] * 2048), "sigma": sigma},
        "mu-huge": {"mu": mu + 1e35, "sigma": sigma}, "mu-complex": {"mu": mu * 1j, "sigma": sigma},
        "sigma_s-nan": {"mu": mu, "sigma": sigma, "mu_s": mu[:2023], "sigma_s": np.full((2023, 2023), NAN, np.float32)},
    }  # fmt: skip
    crc = bytearray(good)
    crc[len(good) // 3] ^= 4
    return {
        "truncated": good[:-30], "crc": bytes(crc), "encrypted": patched(1, 6, 8), "method": patched(99, 8, 10),
        "empty-zip": npz_bytes({}), "object": shaped("(6, 8, 8, 3)", "|O"), "7TiB": shaped("(10000000, 512, 512, 3)"),
        "huge": shaped(f"({2**62}, 8, 8, 3)"), "negative": shaped("(-6, 8, 8, 3)"), "shape-text": shaped("'six'"),
        "version": shaped("(6, 8, 8, 3)", version=9), "notnpy": npz_bytes({}, arr_0=b"not an array"),
        "header": npz_bytes({}, arr_0=npy_header("{'descr': __import__('os')")),
        "empty-member": npz_bytes({}, arr_0=b""), "kind": shaped("(6, 8, 8, 3)", "|z9"),
        "cut-header": npz_bytes({}, arr_0=npy_header("{'descr': '|u1', 'fortran_order': False, 'shape': (4,), }")[:30]),
        "one-more": shaped("(1153,)", data=bytes(1152)), "labels-notnpy": npz_bytes({"arr_0": images}, arr_1=b"notnpy"),
        "mu-object": npz_bytes({"sigma": sigma}, mu=header("(2048,)", "|O")),
        "sigma_s-7TiB": npz_bytes({"mu": mu, "sigma": sigma, "mu_s": mu[:2023]}, sigma_s=header(f"({2**40},)", "<f8")),
        **{name: npz_bytes({"arr_0": array}) for name, array in arrays.items()},
        **{name: npz_bytes(values) for name, values in moments.items()},
    }  # fmt: skip


LISTS = {  # what mistakes.txt names in braces
    "specials": (*SPECIAL, "missing", "missing\udce9", "missing\nname", "x" * 300, "missing.pt/below", "text/below"),
    "unwritable": ("pipe", "socket", "link-loop", "text/below", "x" * 300), "spoiled": SPOILED, "names": NAMES,
    "checkpoints": CHECKPOINTS, "pictures": PICTURES, "folders": DIT, "rows": ROWS, "args": ARGS, "records": RECORDS,
    "resumed": RESUMED, "autoencoders": AUTOENCODERS, "indexes": INDEXES, "settings": SETTINGS,
    "broken": ("list", "number", "no-weights", "truncated", "weights-text", "nan", "pipe"),
    "arrays": ARRAYS,
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# The files


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


def variants(folder, prefix, place, damages):
    """Copies of a folder, pipes included, with something else in a place of each. damages: by the copy's name the kind of a
    special file, or bytes, or a function of the JSON that is there."""
    for name, damage in damages.items():
        copy = folder.with_name(f"{prefix}-{name}")
        subprocess.run(["cp", "-a", folder, copy], check=True)
        if isinstance(damage, str):
            make_special(copy / place, damage)
        else:
            path = copy / place
            path.write_bytes(
                damage if isinstance(damage, bytes) else json.dumps(damage(json.loads(path.read_text()))).encode()
            )


def rewritten(shard, damage):
    """The bytes of a shard of latents with another record in its header."""
    content = shard.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:size])
    header["__metadata__"]["latents"] = json.dumps(damage(json.loads(header["__metadata__"]["latents"])))
    words = json.dumps(header).encode()
    return len(words).to_bytes(8, "little") + words + content[size:]


def flipped(content):
    """One bit in the middle of a file is another one."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def kinds(*names):
    return {name: name for name in names}


def model_file(path, args=(), class_names=None, **config):
    from checkpoint.opened import record_of
    from models import DiT

    torch.manual_seed(0)
    sizes = {"input_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 16, "depth": 1, "num_heads": 2}
    model = DiT(**{**sizes, "num_classes": 10, **config})
    for parameter in model.parameters():
        if not parameter.any():  # zero at first, so that class and guidance would change nothing
            nn.init.normal_(parameter, std=0.1)
    record = {"vae": "none", "image_size": 8, **dict(args)}
    torch.save({"ema": model.state_dict(), "args": record, **record_of(model, class_names)}, path)


def make_inputs(root, run_cases):
    """Everything that the cases read, in root/in. run_cases: of tests/stress/mistakes.py, for what commands make."""
    from safetensors.torch import save_file
    from stress.mistake_cases import VALID, Case, combine

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
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 8, 8, 3), dtype=np.uint8)
    (inputs / "measured").mkdir()
    for name, images in (("reference", pixels[0]), ("samples", pixels[1]), ("measured/samples", pixels[1])):
        np.savez(inputs / f"{name}.npz", arr_0=images)
    for kind in ("folder", "pipe"):
        shutil.copy(inputs / "samples.npz", inputs / f"report-{kind}.npz")
        make_special(inputs / f"report-{kind}.npz.metrics.json", kind)
    (inputs / "a.json").write_text('{"fid": 3}')
    for kind in SPECIAL:
        for end in ("", ".png", ".json", ".pt", ".gif"):
            make_special(inputs / "bad" / f"{kind}{end}", kind)
    make_checkpoints(inputs)
    shutil.copy(inputs / "tiny.pt", inputs / "measured/x.pt")
    for name, content in npz_files().items():
        make_special(inputs / "npz" / f"{name}.npz", "missing")
        (inputs / "npz" / f"{name}.npz").write_bytes(content)
    make_image_folders(inputs)
    make_autoencoders(inputs)
    for name in NAMES:
        make_special(inputs / "names" / name, "text")
    shutil.copytree(inputs / "images", inputs / "latin")
    (inputs / "latin/bee").rename(inputs / "latin/be\udce9")
    (inputs / "latin/ant/0.png").rename(inputs / "latin/ant/a\nb\udce9.png")
    for command, extra in (
        ("train", "--run-dir in/run-whole --sample-every 2"), ("extract_latents", "--out in/latents --shard-size 5"),
        ("sample_ddp", "--sample-dir in/set-whole"), ("convert", "in/latent.pt in/dit-whole --vae in/vae"),
    ):  # fmt: skip
        whole = Case(command, "whole", combine(VALID[command].split(), extra.split()), status=(0,))
        answer = run_cases([whole], root, without_inputs=True)[0]
        assert not answer["wrong"], answer
        if command == "train":
            shutil.copy(inputs / "run-whole/checkpoints/0000004.pt", inputs / "tiny.pt")
            make_records(inputs)
    make_variants(inputs)
    save_file(torch.load(inputs / "tiny.pt")["ema"], inputs / "weights.safetensors")


def make_checkpoints(inputs):
    from data.condition import Texts
    from data.text_encoder import TextEncoder
    from studies.text_digits import make_encoder

    model_file(inputs / "tiny.pt")  # until a run's takes its place
    model_file(inputs / "no-null.pt", class_dropout_prob=0.0)
    model_file(inputs / "unconditional.pt", num_classes=0)
    latent = {"in_channels": 4, "input_size": 2, "patch_size": 1, "depth": 2}
    model_file(inputs / "latent.pt", {"vae": "in/vae", "image_size": 16}, **latent)
    model_file(inputs / "fixed.pt", learn_sigma=False)
    model_file(inputs / "mean.pt", objective="meanflow", predict="v", learn_sigma=False)
    model_file(inputs / "clips.pt", input_size=(4, 8, 8), patch_size=(2, 2, 2))
    model_file(inputs / "colour.pt", {"image_size": 16}, ["ant", "bee", "cat"], in_channels=3, input_size=16, num_classes=3)
    torch.save(torch.load(inputs / "tiny.pt")["ema"], inputs / "no-heads.pt")
    for name, width, seed in (("encoder", 16, 0), ("encoder-other", 16, 1), ("encoder-wide", 24, 0)):
        make_encoder(inputs / name, width, seed)
    encoder = TextEncoder(str(inputs / "encoder"), 16).to("cpu")
    for name, place in (("text", "in/encoder"), ("text-moved", "gone/encoder")):
        text = Texts(16, 16, place, encoder.crc32, null_text=encoder.null)
        model_file(inputs / f"{name}.pt", num_classes=0, condition=text)


class Code:
    def __reduce__(self):
        return os.system, ("touch code-was-run",)


def make_records(inputs):
    from safetensors.torch import save_file

    tiny = torch.load(inputs / "tiny.pt")
    for folder in ("records", "bytes"):
        (inputs / folder).mkdir()
    for name, damage in {**ARGS, **RECORDS, **RESUMED}.items():
        torch.save(damage(dict(tiny)), inputs / "records" / f"{name}.pt")
    whole = (inputs / "tiny.pt").read_bytes()
    save_file(tiny["ema"], weights := inputs / "bytes/whole.safetensors")
    save_file({"a": torch.zeros(3)}, inputs / "bytes/other.safetensors")
    save_file(tiny["ema"], inputs / "bytes/metadata.safetensors", {"model_config": "{not JSON"})
    contents = {
        "truncated.pt": whole[:-200], "flipped.pt": flipped(whole), "half.pt": whole[: len(whole) // 2],
        "tail.pt": whole[500:], "zip.pt": b"PK\x05\x06" + bytes(18), "png.pt": (inputs / "image.png").read_bytes(),
        "npz.pt": npz_bytes({"arr_0": np.zeros(3)}), "pickle.pt": pickle.dumps(Code(), protocol=2),
        "truncated.safetensors": weights.read_bytes()[:-100],
        "header.safetensors": b"\xff" * 8 + b"{}", "text.safetensors": b"some text",
    }  # fmt: skip
    for name, content in contents.items():
        (inputs / "bytes" / name).write_bytes(content)
    values = {"code.pt": {"model": Code()}, "list.pt": [1, 2], "number.pt": 3, "tensor.pt": torch.zeros(3)}
    for name, value in values.items():
        torch.save(value, inputs / "bytes" / name)


def make_image_folders(inputs):
    folders, png = inputs / "image-folders", (inputs / "images/ant/0.png").read_bytes()
    header = bytearray(png)
    header[16:24] = (60000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(bytes(header[12:29])).to_bytes(4, "big")
    contents = {"truncated": png[:200], "empty": b"", "bomb": bytes(header), "bytes": bytes(range(256))}
    for name in PICTURES:
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
    deep, frame = Image.fromarray(np.zeros((8, 8), np.uint16)), Image.new("RGB", (8, 8))
    for folder in (folders / "16-bit", folders / "no-images", inputs / "animated"):
        folder.mkdir()
    for i in range(4):
        deep.save(folders / f"16-bit/{i}.png")
        frame.save(inputs / f"animated/{i}.png", save_all=True, append_images=[frame])


def make_autoencoders(inputs):
    from safetensors.torch import load_file, save_file

    weights = "diffusion_pytorch_model.safetensors"
    tensors, content = load_file(inputs / "vae" / weights), (inputs / "vae" / weights).read_bytes()
    variants(inputs / "vae", "vae", "config.json", {**AUTOENCODERS, "list": b"[1]", "number": b"3", "pipe": "pipe"})
    damages = {"no-weights": "missing", "truncated": content[:-100], "weights-text": b"some text"}
    variants(inputs / "vae", "vae", weights, damages | {"nan": "missing", "large": "missing"})
    for name, factor in {"nan": NAN, "large": 1e6}.items():
        wrong = {**tensors, "quant_conv.weight": tensors["quant_conv.weight"] * factor}
        save_file(wrong, inputs / f"vae-{name}" / weights, {"format": "pt"})


def make_variants(inputs):
    """Folders of latents, of samples, of runs and in diffusers' format, with one thing wrong in each."""
    from safetensors.torch import load_file, save

    latents, images, run, dit = (inputs / name for name in ("latents", "set-whole", "run-whole", "dit-whole"))
    first, last = (latents / f"shard-0000{number}.safetensors" for number in (0, 1))
    variants(latents, "latents-shard", first.name, kinds(*SPOILED))
    variants(latents, "latents", first.name, {name: rewritten(first, damage) for name, damage in INDEXES.items()})
    damages = {**kinds("missing", "text", "empty"), "truncated": last.read_bytes()[:-100]}
    variants(latents, "latents-last", last.name, damages)

    variants(images, "set-options.json", "set/options.json", {**kinds(*SPOILED, "list"), "nested": b"[" * 100_000})
    variants(images, "set", "set/options.json", SETTINGS)
    variants(images, "set-npz", "set.npz", kinds("folder"))
    variants(images, "set-png", "set/000000.png", kinds("folder", "pipe"))
    for kind in ("folder", "pipe"):
        (inputs / f"set-png-{kind}/set.npz").unlink()

    for name in ("status.json", "log.txt", "metrics.jsonl", "options.json", "checkpoints", ".lock"):
        variants(run, f"run-{name}", name, kinds("pipe", "folder", "text"))
    variants(run, "run-step", "checkpoints/0000006.pt", kinds("folder"))
    variants(run, "run-newest", "checkpoints/0000005.pt", {"code": (inputs / "bytes/code.pt").read_bytes()})
    variants(run, "run-grid", "samples/0000002.png", kinds("pipe", "folder", "text", "empty", "bytes"))
    variants(run, "run-grid", "samples", kinds("missing"))
    rows = (run / "metrics.jsonl").read_bytes()
    variants(run, "run-rows", "metrics.jsonl", {name: rows + more for name, more in ROWS.items()})
    variants(run, "run-all", "status.json", {"damaged": b"{}"})
    for path in (inputs / "run-all-damaged/checkpoints").iterdir():
        path.write_bytes(flipped(path.read_bytes()))

    variants(dit, "dit", "transformer/config.json", {
        "config-missing": "missing", "config-list": lambda config: [1], "config-sizes": change(num_layers="x"),
        "kind": change(_class_name="UNet2DModel"), "design": change(norm_type="ada_norm_single"),
        "depth": change(num_layers=10**9), "heads": change(attention_head_dim=None), "width": change(attention_head_dim=4),
    })  # fmt: skip
    place = "transformer/diffusion_pytorch_model.safetensors"
    tensors, bias = load_file(dit / place), "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.bias"
    changed = {
        "weights-more": {**tensors, "q_norm": torch.ones(1)}, "embedders": {**tensors, bias: tensors[bias] + 1},
        "weights-nan": {**tensors, "proj_out_2.bias": tensors["proj_out_2.bias"] * NAN},
    }  # fmt: skip
    weights = {"weights-missing": "missing", "weights-truncated": b"abc", "weights-other": {"a": torch.zeros(3)}, **changed}
    variants(dit, "dit", place, {name: save(made) if isinstance(made, dict) else made for name, made in weights.items()})
    names = {"names": {"0": 3}, "names-numbers": {str(i): i for i in range(10)}}
    names = {name: change(id2label=labels) for name, labels in names.items()} | {"index": "text"}
    variants(dit, "dit", "model_index.json", names)
    code = {"code": (inputs / "bytes/code.pt").read_bytes()}
    variants(inputs / "dit-weights-missing", "dit-bin", place.replace(".safetensors", ".bin"), code)
