"""The mistakes that tests/stress/mistakes.py makes: what is added to a command line that works, and what is to be said."""

import dataclasses
import importlib
import io
import os
import zipfile
from dataclasses import dataclass

import numpy as np
import torch

from runtime.config import Config, field_types, flag

# A command line of each command that works. What is added to it wins over what is there
VALID = {
    "train": "--data-path digits --vae none --image-size 8 --num-classes 10 --hidden-size 16 --depth 1 --num-heads 2 "
    "--patch-size 2 --global-batch-size 12 --lr 1e-3 --device cpu --log-every 2 --num-workers 0 --ckpt-every 2 "
    "--max-steps 4",
    "sample": "--ckpt in/tiny.pt --num-sampling-steps 2 --device cpu --labels 1 2 --output out.png",
    "sample_ddp": "--ckpt in/tiny.pt --num-sampling-steps 2 --num-fid-samples 4 --per-proc-batch-size 2 --device cpu "
    "--folder set",
    "evaluate": "--inception-weights in/inception.pth --device cpu",
    "likelihood": "--ckpt in/tiny.pt --data-path digits --num-images 4 --num-timesteps 4 --device cpu",
    "extract_latents": "--data-path in/images --out latents --vae in/vae --image-size 16 --batch-size 4 --num-workers 0 "
    "--device cpu",
    "complexity": "--model DiT-S/8 --image-size 64",
    "convert": "", "plot": "--output curves.png", "animate": "--output out.gif", "app": "",
}  # fmt: skip
POSITIONAL = {
    "evaluate": ["in/reference.npz", "in/samples.npz"], "convert": ["in/tiny.pt", "out.safetensors"],
    "plot": ["in/run-whole"], "animate": ["in/run-whole"],
}  # fmt: skip
CONFIGS = {
    "train": "train.TrainConfig", "sample": "sampling.config.SampleConfig", "sample_ddp": "sampling.config.SampleSetConfig",
    "evaluate": "evaluation.config.EvaluateConfig", "likelihood": "evaluation.config.LikelihoodConfig",
    "extract_latents": "data.config.ExtractConfig", "complexity": "tools.complexity.CostConfig",
    "convert": "tools.convert.ConvertConfig", "plot": "tools.plot.PlotConfig", "animate": "tools.animate.AnimateConfig",
    "app": "tools.app.AppConfig",
}  # fmt: skip
KINDS = ("values", "combinations", "files", "damaged", "records", "numbers", "sizes", "disks", "names", "interrupted")
IMAGES = "--data-path in/images --vae none --image-size 16 --num-classes 3"  # of train, in place of the digits


@dataclass(frozen=True)
class Case:
    """A mistake. words: what the line must hold. status: the exit statuses that are right; 0 is for what is no mistake.
    ranks: number of processes. alone: whether to start Python anew, as a user does. copies: what of the inputs the command
    may change. limit: bytes that a file may grow to. interrupt: the text after which Ctrl-C is pressed."""

    command: str
    kind: str
    argv: tuple
    words: tuple
    status: tuple = (1, 2)
    ranks: int = 1
    alone: bool = False
    copies: tuple = ()
    limit: int | None = None
    interrupt: str | None = None

    @property
    def name(self):
        extra = [f"{self.ranks} processes"] * (self.ranks > 1) + ["own process"] * self.alone
        extra += [f"files up to {self.limit} bytes"] * (self.limit is not None) + list(self.copies)
        return " ".join([self.command, *map(ascii, self.argv), *(f"[{word}]" for word in extra)])


def case(command, kind, extra, *words, positional=None, **more):
    """A Case: the command's valid line, with `extra` added. extra: text or a list. words: default to its first word."""
    extra = extra.split() if isinstance(extra, str) else [str(word) for word in extra]
    argv = (*(positional or POSITIONAL.get(command, ())), *VALID[command].split(), *extra)
    return Case(command, kind, argv, words or tuple(extra[:1]), **more)


# ----------------------------------------------------------------------------------------------------------------------
# Values of options, by the configs' own fields


def options_of(config_class):
    """(field, kind, number of values, optional) of every option."""
    for field in dataclasses.fields(config_class):
        kind, count, optional = field_types(config_class)[field.name]
        if isinstance(kind, type) and issubclass(kind, Config):
            yield from options_of(kind)
        else:
            yield field, kind, count, optional


def value_cases():
    for command, place in CONFIGS.items():
        module, _, name = place.rpartition(".")
        for field, kind, count, _ in options_of(getattr(importlib.import_module(module), name)):
            if field.metadata["positional"]:
                continue
            metadata, option_name = field.metadata, flag(field.name)
            low, high, above = metadata["low"], metadata["high"], metadata["above"]
            if kind is bool:
                yield case(command, "values", [f"{option_name}=maybe"], option_name)
                continue
            bad = ["", "wrong"] if metadata["choices"] else [""]
            if kind in (int, float):
                bad = ["", "wrong", "nan", str(2**70) if kind is int else "inf"]
                bad += [low - 1] if low is not None else []
                bad += [above] if above is not None else []
                bad += [high + 1] if high is not None else []
            for value in bad:
                values = [value] * (count if isinstance(count, int) else 1)
                yield case(command, "values", [option_name, *values], option_name)
            if metadata["const"] is None:
                yield case(command, "values", [option_name], option_name)
        yield case(command, "values", "--unknown-option 1", "--unknown-option")
        if command != "plot":  # takes any number of runs
            yield case(command, "values", ["extra-word", "another", "third"], "another")
    for command, missing in (("train", "--data-path"), ("likelihood", "--ckpt"), ("extract_latents", "--out")):
        yield Case(command, "values", (), (missing,))
    for command, missing in (("evaluate", "REFERENCE"), ("convert", "SOURCE"), ("plot", "RUN"), ("animate", "RUN")):
        yield Case(command, "values", (), (missing,))


COMBINATIONS = """
train: --vae ema
train: --eval-every 2
train: --eval-reference in/reference.npz
train: --resume auto
train: --keep-classes 1
train: --run-dir run --resume none --image-size 9 --patch-size 2|--image-size
train: --global-batch-size 5 --grad-accum 6|--grad-accum
train: --num-classes 3
train: --hidden-size 18|hidden size
train: --num-heads 3|heads
train: --hidden-size 6 --num-heads 1|hidden size
train: --patch-size 3|--image-size
train: --mlp-ratio 0.001|MLP
train: --global-batch-size 1000000 --epochs 1|--global-batch-size
train: --eval-every 2 --eval-reference in/reference.npz --eval-cfg-scale 3 --label-dropout 0|--eval-cfg-scale
train: --flip --data-path in/latents --vae in/vae --image-size 24 --num-classes 3|--image-size
train: --data-path in/latents --vae none --image-size 16 --num-classes 3|--vae
train: --compile wrong
train: --data-path in/latents --vae in/vae --image-size 16 --num-classes 3 --skip-bad-images|--skip-bad-images
train: --init-from in/tiny.pt --hidden-size 32|--hidden-size
train: --init-from in/tiny.pt --predict v|--predict
train: --init-from in/tiny.pt --objective flow|--objective
train: --objective flow --predict eps|--predict
train: --predict x0|--predict
train: --objective flow --loss-weight min-snr|--loss-weight
train: --rope --hidden-size 12|rotary
train: --val-every 2
train: --val-data-path in/images
train: --sample-labels 1 2
train: --sample-every 2 --sample-labels seven|--sample-labels
train: --sample-every 2 --sample-cfg-scale 4 --label-dropout 0|--sample-cfg-scale
sample: --sampler flow-euler
sample: --sampler flow-heun --init-image in/image.png --mask in/image.png|--mask
sample_ddp: --sampler flow-sde --num-sampling-steps 5|--sampler
animate: --output out.png
plot: --output curves.xyz
plot: --output curves
app: --host 256.0.0.1 --ckpt in/tiny.pt|--host
train: --init-from in/tiny.pt --keep-classes 1 2|--keep-classes
train: --init-from in/tiny.pt --block adaln|--block
train: --freeze nothing.*|--freeze
train: --freeze *|--freeze
train: --device cuda
train: --eval-every 2 --eval-reference in/samples.npz --eval-samples 1|--eval-samples
sample: --strength 0.5
sample: --mask in/image.png
sample: --invert
sample: --to-seed 3
sample: --interpolate seeds --columns 1|--columns
sample: --interpolate classes --labels 1|--interpolate
sample: --interpolate seeds --samples-per-label 2|--samples-per-label
sample: --init-image in/image.png --interpolate seeds|--interpolate
sample: --init-image in/image.png --invert|--invert
sample: --init-image in/image.png --strength 0.5 --mask in/image.png|--strength
sample: --sampler ddim --eta 0.5 --spacing linspace|--sampler
sample: --sampler heun --eta 1|--sampler
sample: --sampler dpm-solver++ --num-sampling-steps 1000 --spacing karras|--s
sample: --spacing trailing|--sampler
sample: --precision tf32 --no-tf32|--precision
sample: --cfg-channels 3
sample: --guide-ckpt in/tiny.pt --cfg-scale 1|--guide-ckpt
sample: --guidance-interval 0.7 0.2|--guidance-interval
sample: --labels 10|--labels
sample: --labels dog|--labels
sample: --labels -1|--labels
sample: --labels 99999999999999999999|--labels
sample: --model DiT-S/2|--model
sample: --image-size 16|--image-size
sample: --num-classes 11|--num-classes
sample: --num-heads 1|--num-heads
sample: --vae in/vae|--vae
sample: --output out.txt|--output
sample: --output out.psd|--output
sample: --output out.mpg|--output
sample: --output out|--output
sample: --save-trajectory out.png|--save-trajectory
sample: --save-trajectory out.pdf.x|--save-trajectory
sample: --guide-ckpt in/latent.pt|--guide-ckpt
sample: --device cuda
sample: --compile wrong
sample: --ckpt in/no-null.pt|in/no-null.pt
sample: --ckpt in/latent.pt --vae none|--vae
sample: --samples-per-label 10000 --enlarge 64|--output
sample: --output ./out.png --save-trajectory out.png|--save-trajectory
sample_ddp: --labels 1 --balanced-labels|--labels
sample_ddp: --labels 10|--labels
sample_ddp: --labels cat|--labels
sample_ddp: --guidance-interval 0.5 0.5|--guidance-interval
sample_ddp: --sampler unipc --eta 0.1|--sampler
sample_ddp: --precision tf32 --no-tf32|--precision
sample_ddp: --ckpt in/no-null.pt|in/no-null.pt
sample_ddp: --model DiT-B/2|--model
sample_ddp: --vae in/vae|--vae
sample_ddp: --device cuda
sample_ddp: --guide-ckpt in/tiny.pt --cfg-scale 1|--guide-ckpt
sample_ddp: --num-heads 4|--num-heads
sample_ddp: --cfg-channels 3
sample_ddp: --compile wrong
likelihood: --ckpt in/latent.pt|--ckpt
likelihood: --vae in/vae|vae
likelihood: --data-path in/latents|--data-path
likelihood: --data-path in/images|--data-path
likelihood: --output out.txt|--output
likelihood: --model DiT-S/2|--model
likelihood: --image-size 16|--image-size
likelihood: --num-classes 3|--num-classes
likelihood: --device cuda
likelihood: --data-path in/one-image|--data-path
likelihood: --num-heads 1|--num-heads
extract_latents: --data-path digits
extract_latents: --vae none
extract_latents: --image-size 20
extract_latents: --out in/images/below|--out
extract_latents: --device cuda
extract_latents: --out in/images|--out
extract_latents: --out in/set|--out
extract_latents: --image-size 4
extract_latents: --num-workers 2 --data-path in/empty-classes|--data-path
complexity: --table --model DiT-B/2|--model
complexity: --table --json --batch-size 3|--
complexity: --image-size 60|--model
complexity: --downsampling 7|--model
complexity: --num-heads 5|--model
complexity: --hidden-size 18|--model
complexity: --mlp-ratio 0.0001|--model
complexity: --patch-size 5|--model
"""


def listed_cases(text, kind):
    """A case of each line: the command, what is added to its valid line, and after a bar what the error must say."""
    for line in text.strip().splitlines():
        command, extra = line.split(": ", 1)
        extra, _, word = extra.partition("|")
        yield case(command, kind, extra, *filter(None, [word]))


def combination_cases():
    yield from listed_cases(COMBINATIONS, "combinations")
    for target in ("out.bin", "out.ckpt", "in/images", "in/tiny.pt", "in/vae", "no/such/out.pt"):
        yield case("convert", "combinations", "", "TARGET", positional=["in/tiny.pt", target])
    yield case("convert", "combinations", "--overwrite", "TARGET", positional=["in/tiny.pt", "in/images"])
    yield case("convert", "combinations", "--vae in/vae", "--vae", positional=["in/tiny.pt", "out-folder"])
    yield case("convert", "combinations", "", "--num-heads", positional=["in/no-heads.pt", "out.pt"])
    yield case("convert", "combinations", "--num-heads 3", "no-heads.pt", positional=["in/no-heads.pt", "out.pt"])
    yield case("convert", "combinations", "--vae none", "no-null.pt", positional=["in/no-null.pt", "out-folder"])


# ----------------------------------------------------------------------------------------------------------------------
# Files that are missing, special, or something else

READ = {  # options that name a file or folder to read, and what else their use needs
    "train": {
        "--data-path": IMAGES, "--vae": IMAGES, "--init-from": "", "--resume": "",
        "--inception-weights": "--eval-every 2 --eval-reference in/reference.npz", "--val-data-path": "--val-every 2",
        "--eval-reference": "--eval-every 2 --inception-weights in/inception.pth",
    },
    "sample": {
        "--ckpt": "", "--guide-ckpt": "", "--init-image": "", "--mask": "--init-image in/image.png",
        "--vae": "--ckpt in/latent.pt",
    },
    "sample_ddp": {"--ckpt": "", "--guide-ckpt": "", "--vae": "--ckpt in/latent.pt"},
    "likelihood": {"--ckpt": "", "--data-path": ""},
    "evaluate": {"--inception-weights": "", "REFERENCE": "", "SAMPLES": ""},
    "extract_latents": {"--data-path": "", "--vae": ""},
    "convert": {"SOURCE": "", "--vae": ""}, "plot": {"RUN": ""}, "animate": {"RUN": ""}, "app": {"--ckpt": ""},
}  # fmt: skip
SPECIAL = ("missing", "pipe", "socket", "broken-link", "link-loop", "empty", "text", "bytes", "folder", "missing\udce9",
           "missing\nname", "x" * 300, "missing.pt/below", "text/below")  # fmt: skip
WRITTEN = {  # options that name a file or folder to write
    "train": {"--run-dir": "", "--results-dir": ""},
    "sample": {"--output": "", "--save-trajectory": ""},
    "sample_ddp": {"--sample-dir": "", "--folder": ""},
    "likelihood": {"--output": ""},
    "evaluate": {"--cache": ""},
    "extract_latents": {"--out": ""},
    "convert": {"TARGET": ""}, "plot": {"--output": ""}, "animate": {"--output": ""},
}  # fmt: skip


def named(command, name, path, extra=(), kind="files", **more):
    """A case in which an option, or a positional argument such as REFERENCE, names `path`."""
    if name.startswith("-"):
        return case(command, kind, [*extra, name, path], more.pop("word", name), **more)
    places = {"REFERENCE": 0, "SAMPLES": 1, "SOURCE": 0, "TARGET": 1, "RUN": 0}
    positional = list(POSITIONAL[command])
    positional[places[name]] = path
    word = more.pop("word", os.path.basename(path.split("\n")[0])[:30].encode("utf-8", "backslashreplace").decode())
    return case(command, kind, list(extra), word, positional=positional, **more)


def file_cases():
    for command, names in READ.items():
        for name, extra in names.items():
            for special in SPECIAL:
                word = special.split("\n")[0].split("/")[0].removesuffix("\udce9")[:20]
                more = {"positional": ["in/latent.pt", "out-folder"]} if (command, name) == ("convert", "--vae") else {}
                yield named(command, name, f"in/bad/{special}", extra.split(), word=word, **more)
    ends = {"sample": ".png", "likelihood": ".json", "plot": ".png", "animate": ".gif"}
    for command, names in WRITTEN.items():
        is_file = command in ends or command == "convert"
        for name in names:
            for special in ("pipe", "socket", "link-loop", "text/below", "x" * 300, *(["folder"] if is_file else ["text"])):
                if command in ends:
                    special = f"{special}{ends[command]}"
                elif command == "convert" and special != "text/below":
                    special = f"{special}.pt"
                path = f"in/bad/{special}" if name != "--folder" else f"../in/bad/{special}"
                yield named(command, name, path, word=special[:20].split("/")[0])
            if is_file:
                yield named(command, name, f"no/such/folder/out{ends.get(command, '.pt')}", word="no/such/folder")
    for name, word in (
        ("index.json", "index.json"),
        ("images.json", "images.json"),
        ("shard-00000.npy", "shard-00000.npy"),
    ):
        for special in ("pipe", "folder", "link-loop", "missing", "empty", "text", "bytes"):
            extra = f"--data-path in/latents-{name}-{special} --vae in/vae --image-size 16 --num-classes 3"
            yield case("train", "files", extra, word if (name, special) != ("index.json", "folder") else "latents-")
    for kind in ("pipe", "folder"):
        yield case("plot", "files", "", "metrics.jsonl", positional=[f"in/run-metrics.jsonl-{kind}"])
        yield case("animate", "files", "", "0000002.png", positional=[f"in/run-grid-{kind}"])
    yield case("plot", "files", "", "metrics.jsonl", positional=["in/run-metrics.jsonl-text"])
    yield case("plot", "files", "--x images", "--x images", positional=["in/run-options.json-text"])
    for kind in ("text", "empty", "bytes"):
        yield case("animate", "damaged", "", "0000002.png", positional=[f"in/run-grid-{kind}"])
    yield case("animate", "files", "", "samples", positional=["in/run-grid-missing"])
    for name in ("garbage", "numbers", "nested", "bytes"):
        yield case("plot", "damaged", "", positional=[f"in/run-rows-{name}"], status=(0,))
    for name in ("options.json",):
        for special in ("pipe", "folder", "link-loop", "missing", "empty", "text", "bytes", "list"):
            yield case("sample_ddp", "files", f"--sample-dir set-{name}-{special} --num-fid-samples 6", "options.json",
                       copies=(f"set-{name}-{special}",))  # fmt: skip
    for name in ("status.json", "log.txt", "metrics.jsonl", "options.json", "checkpoints", ".lock"):
        for special in ("pipe", "folder", "text"):
            if (name, special) not in {("checkpoints", "folder"), (".lock", "text"), ("log.txt", "text"), ("status.json",
            "text"),
                                       ("options.json", "text"), ("metrics.jsonl", "text"), ("status.json", "pipe"),
                                       ("options.json", "pipe")}:  # fmt: skip
                run = f"run-{name}-{special}"
                yield case("train", "files", f"--run-dir {run} --max-steps 6", run, copies=(run,))
    yield case("train", "files", "--run-dir run-step-folder --max-steps 6", "", status=(0,), copies=("run-step-folder",))
    yield case(
        "sample_ddp", "files", "--sample-dir set-npz-folder --num-fid-samples 6", "set.npz", copies=("set-npz-folder",)
    )
    yield case("sample_ddp", "files", "--sample-dir set-png-folder", "000000.png", copies=("set-png-folder",))
    yield case("sample_ddp", "files", "--sample-dir set-png-pipe", "", status=(0,), copies=("set-png-pipe",))
    yield case(
        "evaluate", "files", "", "report-folder.npz.metrics.json", positional=["in/reference.npz", "in/report-folder.npz"]
    )
    yield case(
        "evaluate", "files", "", "report-pipe.npz.metrics.json", positional=["in/reference.npz", "in/report-pipe.npz"]
    )
    yield case("evaluate", "files", "", "a.json", positional=["in/reference.npz", "in/a.json"])
    yield case("train", "files", "--init-from in/tiny.pt --keep-classes in/bad/bytes", "--keep-classes")
    yield case("train", "files", "--init-from in/tiny.pt --keep-classes in/bad/pipe", "--keep-classes")


# ----------------------------------------------------------------------------------------------------------------------
# Damaged files, and records in them that are wrong

BYTES = ("truncated.pt", "half.pt", "tail.pt", "zip.pt", "code.pt", "list.pt", "number.pt", "tensor.pt", "png.pt", "npz.pt",
         "truncated.safetensors", "header.safetensors", "metadata.safetensors", "other.safetensors",
         "text.safetensors")  # fmt: skip


def change(**values):
    return lambda state: {**state, **values}


def recorded(part, **values):
    return lambda state: {**state, part: {**state[part], **values}}


def without(*path):
    def remove(state):
        state = dict(state)
        if len(path) > 1:
            state[path[0]] = without(*path[1:])(state[path[0]])
        else:
            state.pop(path[0])
        return state

    return remove


def weight(name, make):
    return lambda state: {**state, "ema": {**state["ema"], name: make(state["ema"][name])}}


def inferred(action):
    """Of a file without model_config, whose sizes are inferred."""
    return lambda state: action(without("model_config")(state))


NAN, HUGE = float("nan"), 10**9
RECORDS = {  # that every reader of a checkpoint refuses
    "args-text": change(args="text"),
    "args-list": change(args=[1]),
    "args-number": change(args=3),
    "args-none": change(args=None),
    "vae-number": recorded("args", vae=3),
    "vae-list": recorded("args", vae=["none"]),
    "size-text": recorded("args", image_size="8"),
    "size-float": recorded("args", image_size=8.5),
    "names-number": change(class_names=3),
    "names-text": change(class_names="cat"),
    "names-numbers": change(class_names=[1, 2]),
    "config-text": change(model_config="text"),
    "config-list": change(model_config=[1]),
    "heads-3": recorded("model_config", num_heads=3),
    "heads-0": recorded("model_config", num_heads=0),
    "heads-text": recorded("model_config", num_heads="2"),
    "heads-none": recorded("model_config", num_heads=None),
    "width-huge": recorded("model_config", hidden_size=HUGE),
    "width-65536": recorded("model_config", hidden_size=65536),
    "depth-huge": recorded("model_config", depth=10**6),
    "depth-512": recorded("model_config", depth=512),
    "depth-0": recorded("model_config", depth=0),
    "mlp-huge": recorded("model_config", mlp_ratio=1e30),
    "mlp-nan": recorded("model_config", mlp_ratio=NAN),
    "mlp-text": recorded("model_config", mlp_ratio="4"),
    "block-unknown": recorded("model_config", block="unknown"),
    "block-number": recorded("model_config", block=1),
    "input-huge": recorded("model_config", input_size=HUGE),
    "input-65536": recorded("model_config", input_size=65536, patch_size=1),
    "input-other": recorded("model_config", input_size=16),
    "patch-0": recorded("model_config", patch_size=0),
    "classes-huge": recorded("model_config", num_classes=10**12),
    "classes-many": recorded("model_config", num_classes=10**7),
    "classes-negative": recorded("model_config", num_classes=-1),
    "dropout-2": recorded("model_config", class_dropout_prob=2.0),
    "dropout-text": recorded("model_config", class_dropout_prob="x"),
    "sigma-text": recorded("model_config", learn_sigma="yes"),
    "channels-0": recorded("model_config", in_channels=0),
    "ema-none": change(ema=None),
    "ema-text": change(ema="text"),
    "ema-list": change(ema=[1]),
    "ema-empty": change(ema={}),
    "ema-numbers": change(ema={"pos_embed": 1}),
    "weight-missing": without("ema", "pos_embed"),
    "weight-more": recorded("ema", extra=torch.zeros(2)),
    "weight-shape": weight("pos_embed", lambda w: w[:, :3]),
    "weight-nan": weight("final_layer.linear.weight", lambda w: w * NAN),
    "weight-inf": weight("blocks.0.attn.qkv.bias", lambda w: w + float("inf")),
    "weight-0d": weight("pos_embed", lambda w: w.sum()),
    "weight-sparse": weight("blocks.0.attn.qkv.weight", lambda w: w.to_sparse()),
    "weight-complex": weight("blocks.0.attn.qkv.weight", lambda w: w * 1j),
    "weight-text": weight("pos_embed", lambda w: "text"),
    "inferred-0d": inferred(weight("pos_embed", lambda w: w.sum())),
    "inferred-heads": inferred(recorded("args", num_heads=3)),
    "inferred-heads-text": inferred(recorded("args", num_heads="2")),
    "inferred-heads-0": inferred(recorded("args", num_heads=0)),
    "inferred-heads-negative": inferred(recorded("args", num_heads=-2)),
    "inferred-dropout": inferred(recorded("args", label_dropout="x")),
    "inferred-dropout-nan": inferred(recorded("args", label_dropout=NAN)),
    "inferred-block": inferred(without("ema", "blocks.0.mlp.fc1.weight")),
    "inferred-table": inferred(weight("y_embedder.embedding_table.weight", lambda w: w[:0])),
    "inferred-modulation": inferred(weight("blocks.0.adaLN_modulation.1.weight", lambda w: w[:50])),
    "inferred-patch": inferred(weight("x_embedder.proj.weight", lambda w: w[..., :1])),
}
RESUMED = {  # that only matter when a run is resumed
    "opt-none": change(opt=None),
    "opt-text": change(opt="text"),
    "opt-empty": change(opt={}),
    "opt-list": change(opt=[]),
    "opt-groups": recorded("opt", param_groups=[]),
    "opt-groups-text": recorded("opt", param_groups="text"),
    "opt-group-none": recorded("opt", param_groups=[None]),
    "opt-state": recorded("opt", state="text"),
    "opt-state-entry": recorded("opt", state={0: "text"}),
    "opt-state-tensor": recorded("opt", state={0: {"step": "x"}}),
    "step-text": change(step="4"),
    "step-negative": change(step=-1),
    "step-float": change(step=1.5),
    "step-list": change(step=[4]),
    "step-huge": change(step=2**70),
    "step-true": change(step=True),
    "seen-text": change(images_seen="x"),
    "seen-negative": change(images_seen=-5),
    "seen-huge": change(images_seen=2**70),
    "data-number": change(data=3),
    "data-text": change(data="text"),
    "data-short": change(data=[1]),
    "data-other": change(data=[1, 2]),
    "data-texts": change(data=["a", "b"]),
    "model-none": change(model=None),
    "model-missing": without("model"),
    "model-nan": recorded("model", **{"final_layer.linear.bias": torch.full((8,), NAN)}),
    "model-text": change(model="text"),
    "args-lr": recorded("args", lr="fast"),
    "args-seed": recorded("args", global_seed=1),
    "args-betas": recorded("args", betas="x"),
    "no-opt": without("opt"),
}
HARMLESS_WITHOUT_RECORDS = {"args-text", "args-list", "args-number", "args-none"}


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
    """{name: bytes} of .npz files that cannot be measured, with their word in the line."""
    images, mu, sigma = np.zeros((6, 8, 8, 3), np.uint8), np.zeros(2048), np.eye(2048, dtype=np.float32)
    good = npz_bytes({"arr_0": images})
    flipped = bytearray(good)
    flipped[len(good) // 3] ^= 4
    shape = "{'descr': '|u1', 'fortran_order': %s, 'shape': %s, }"
    encrypted = bytearray(good)
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        encrypted[good.index(mark) + place] |= 1
    method = bytearray(good)
    for mark, place in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        method[good.index(mark) + place] = 99
    return {
        "truncated": good[:-30],
        "crc": bytes(flipped),
        "encrypted": bytes(encrypted),
        "method": bytes(method),
        "empty-zip": npz_bytes({}),
        "float": npz_bytes({"arr_0": images / 255}),
        "int": npz_bytes({"arr_0": images.astype(int)}),
        "flat": npz_bytes({"arr_0": images[0]}),
        "grey": npz_bytes({"arr_0": images[..., :1]}),
        "none": npz_bytes({"arr_0": images[:0]}),
        "few": npz_bytes({"arr_0": images[:2]}),
        "text": npz_bytes({"arr_0": np.array(["a"])}),
        "object": npz_bytes({}, arr_0=npy_header("{'descr': '|O', 'fortran_order': False, 'shape': (6, 8, 8, 3), }")),
        "fortran": npz_bytes({"arr_0": np.asfortranarray(images)}),
        "7TiB": npz_bytes({}, arr_0=npy_header(shape % (False, "(10000000, 512, 512, 3)"))),
        "huge": npz_bytes({}, arr_0=npy_header(shape % (False, f"({2**62}, 8, 8, 3)"))),
        "negative": npz_bytes({}, arr_0=npy_header(shape % (False, "(-6, 8, 8, 3)"))),
        "shape-text": npz_bytes({}, arr_0=npy_header(shape % (False, "'six'"))),
        "version": npz_bytes({}, arr_0=npy_header(shape % (False, "(6, 8, 8, 3)"), 9)),
        "notnpy": npz_bytes({}, arr_0=b"not an array"),
        "header": npz_bytes({}, arr_0=npy_header("{'descr': __import__('os')")),
        "no-arrays": npz_bytes({"x": mu}),
        "only-mu": npz_bytes({"mu": mu}),
        "only-sigma": npz_bytes({"sigma": sigma}),
        "mu-nan": npz_bytes({"mu": mu * NAN, "sigma": sigma}),
        "sigma-inf": npz_bytes({"mu": mu, "sigma": np.full((2048, 2048), np.inf, np.float32)}),
        "mu-short": npz_bytes({"mu": mu[:5], "sigma": sigma}),
        "mu-text": npz_bytes({"mu": np.array(["a"] * 2048), "sigma": sigma}),
        "mu-huge": npz_bytes({"mu": mu + 1e35, "sigma": sigma}),
        "mu-complex": npz_bytes({"mu": mu * 1j, "sigma": sigma}),
    }


BAD_IMAGES = ("truncated.png", "text.png", "empty.png", "bomb.png", "pipe.png", "broken-link.png", "link-loop.png",
"bytes.jpg",
              "caf\udce9.png", "new\nline.png")  # fmt: skip
VAE_CONFIGS = {
    "scaling-text": {"scaling_factor": "x"},
    "scaling-0": {"scaling_factor": 0},
    "scaling-nan": {"scaling_factor": NAN},
    "channels-text": {"latent_channels": "4"},
    "channels-0": {"latent_channels": 0},
    "channels-list": {"latent_channels": [4]},
    "channels-other": {"latent_channels": 8},
    "blocks-number": {"block_out_channels": 8},
    "blocks-text": {"block_out_channels": ["a"]},
    "blocks-empty": {"block_out_channels": []},
    "blocks-none": {"block_out_channels": None},
    "grey": {"in_channels": 1},
    "shift-text": {"shift_factor": "x"},
    "kinds": {"down_block_types": ["x"] * 4},
}
INDEX = {
    "list": lambda index: [1],
    "empty": lambda index: {"encoder_crc32": "0"},
    "version": lambda index: {**index, "version": 9},
    "version-text": lambda index: {**index, "version": "1"},
    "images-text": lambda index: {**index, "images": "x"},
    "images-more": lambda index: {**index, "images": 10**9},
    "size": lambda index: {**index, "image_size": 10**9},
    "dtype": lambda index: {**index, "dtype": "complex64"},
    "shards-none": lambda index: {**index, "shards": None},
    "shards-text": lambda index: {**index, "shards": "text"},
    "shards-numbers": lambda index: {**index, "shards": [1, 2, 3]},
    "shards-fewer": lambda index: {**index, "shards": []},
    "crc": lambda index: {**index, "images_json_crc32": "00000000"},
    "classes": lambda index: {**index, "classes": 3},
    "classes-fewer": lambda index: {**index, "classes": ["ant"]},
    "scaling": lambda index: {**index, "scaling": NAN},
    "factor": lambda index: {**index, "factor": 0},
    "channels": lambda index: {**index, "channels": 10**6},
    "mirrors": lambda index: {**index, "mirrors": False},
}
SET_OPTIONS = {
    "other": {"cfg_scale": 7},
    "checksum": {"checkpoint_crc32": 3},
    "checksum-none": {"checkpoint_crc32": None},
    "steps": {"num_sampling_steps": "2"},
    "seed": {"global_seed": [0]},
}


def damage_cases():
    readers = [("sample", "--ckpt"), ("sample", "--guide-ckpt"), ("train", "--resume"), ("train", "--init-from"),
    ("likelihood", "--ckpt"),
               ("convert", "SOURCE"), ("sample_ddp", "--ckpt")]  # fmt: skip
    for number, name in enumerate(BYTES):
        for command, reader in readers:
            yield named(
                command,
                reader,
                f"in/bytes/{name}",
                kind="damaged",
                word=name,
                ranks=1 + (command == "sample_ddp" and number % 4 == 0),
            )
    for number, name in enumerate(RECORDS):
        # every reader reads the record by the same code: three of them each
        for command, reader in [*readers[:4], *readers[4:6]][number % 2 :: 2]:
            if name in HARMLESS_WITHOUT_RECORDS and command == "convert":
                continue
            yield named(command, reader, f"in/records/{name}.pt", kind="records", word=f"{name}.pt")
    for number, name in enumerate(RESUMED):
        ranks = 2 if number % 8 == 0 else 1
        yield named("train", "--resume", f"in/records/{name}.pt", kind="records", word=f"{name}.pt", ranks=ranks)
    for name in ("truncated.pt", "code.pt", "list.pt", "zip.pt"):
        yield named("evaluate", "--inception-weights", f"in/bytes/{name}", kind="damaged", word=name)
    for number, name in enumerate(npz_files()):
        yield named("evaluate", "SAMPLES", f"in/npz/{name}.npz", kind="damaged", word=f"{name}.npz")
        if number % 2:
            yield named(
                "evaluate",
                "REFERENCE",
                f"in/npz/{name}.npz",
                kind="damaged",
                word=f"{name}.npz",
                ranks=1 + (number % 4 == 1),
            )
        elif name not in ("few", "only-mu"):
            yield named("train", "--eval-reference", f"in/npz/{name}.npz", READ["train"]["--eval-reference"].split(),
            "damaged",
                        word=f"{name}.npz")  # fmt: skip
    for number, name in enumerate(BAD_IMAGES):
        word, folder = name.split(".")[0].split("\udce9")[0].split("\n")[0], f"in/image-folders/{name}"
        yield case(
            "train", "damaged", [*IMAGES.split(), "--data-path", folder, "--run-dir", "run"], word, ranks=1 + number % 2
        )
        yield case("extract_latents", "damaged", ["--data-path", folder], word, ranks=1 + (number + 1) % 2)
        yield case("likelihood", "damaged", ["--ckpt", "in/colour.pt", "--data-path", folder, "--num-images", 9], word)
        yield case("evaluate", "damaged", "", word, positional=["in/reference.npz", f"{folder}/ant"])
        yield case("sample", "damaged", ["--init-image", f"{folder}/ant/{name}"], "--init-image")
    for name in BAD_IMAGES[:2]:
        folder = f"in/image-folders/{name}"
        yield case("train", "damaged", [*IMAGES.split(), "--data-path", folder, "--num-workers", 2], name, alone=True)
        yield case("extract_latents", "damaged", ["--data-path", folder, "--num-workers", 2], name, alone=True)
    for name in ("mixed", "16-bit", "no-images"):
        yield case("evaluate", "damaged", "", name, positional=["in/reference.npz", f"in/image-folders/{name}"])
    yield case(
        "evaluate", "damaged", "", "", positional=["in/reference.npz", "animated"], status=(0,), copies=("animated",)
    )
    for name in VAE_CONFIGS:
        yield case("sample", "records", ["--ckpt", "in/latent.pt", "--vae", f"in/vae-{name}"], "--vae")
        yield case("extract_latents", "records", ["--vae", f"in/vae-{name}"], "--vae")
    for name in ("list", "number", "no-weights", "truncated", "weights-text", "nan", "pipe"):
        yield case("sample", "damaged", ["--ckpt", "in/latent.pt", "--vae", f"in/vae-{name}"], "--vae")
        yield case("train", "damaged", [*IMAGES.split(), "--vae", f"in/vae-{name}"], "--vae", ranks=1 + (name == "nan"))
        yield case("convert", "damaged", ["--vae", f"in/vae-{name}"], "--vae", positional=["in/latent.pt", "out-folder"])
    for name in INDEX:
        extra = f"--data-path in/latents-{name} --vae in/vae --image-size 16 --num-classes 3"
        yield case("train", "records", extra, "mirror" if name == "mirrors" else "json")
    for name in ("truncated", "count", "text"):
        yield case(
            "extract_latents",
            "damaged",
            f"--out latents-shard-{name} --shard-size 5",
            "",
            status=(0,),
            copies=(f"latents-shard-{name}",),
        )
    for name in SET_OPTIONS:
        yield case("sample_ddp", "records", f"--sample-dir set-{name} --num-fid-samples 6", "set", copies=(f"set-{name}",))
    for name in ("all-damaged", "newest-code"):
        yield case("train", "damaged", f"--run-dir run-{name} --max-steps 6", "run-", copies=(f"run-{name}",),
                   status=(2,) if name == "all-damaged" else (0,))  # fmt: skip
    for name in ("garbage", "numbers", "nested", "bytes"):
        yield case(
            "train", "records", f"--run-dir run-rows-{name} --max-steps 6", "", status=(0,), copies=(f"run-rows-{name}",)
        )
    for name in (
        "config-missing",
        "config-list",
        "config-sizes",
        "weights-missing",
        "weights-truncated",
        "weights-other",
        "kind",
        "names",
    ):
        yield named("convert", "SOURCE", f"in/dit-{name}", kind="damaged", word=f"dit-{name}")
        yield named("sample", "--ckpt", f"in/dit-{name}", kind="damaged", word=f"dit-{name}")


# ----------------------------------------------------------------------------------------------------------------------
# Numbers, sizes, disks, names, Ctrl-C


def number_cases():
    for scale in ("1e38", "3e38", "1e300"):
        yield case("sample", "numbers", f"--cfg-scale {scale}", "--cfg-scale")
        yield case("sample_ddp", "numbers", f"--cfg-scale {scale}", "--cfg-scale", ranks=2 if scale == "1e38" else 1)
    yield case("sample", "numbers", "--ckpt in/latent.pt --vae in/vae --cfg-scale 1e38", "--cfg-scale")
    yield case("sample", "numbers", "--save-trajectory steps.gif --cfg-scale 1e38", "--cfg-scale")
    for name in ("weight-nan", "weight-inf"):
        for command in ("sample", "sample_ddp", "likelihood"):
            yield case(
                command, "numbers", f"--ckpt in/records/{name}.pt", f"{name}.pt", ranks=1 + (command == "sample_ddp")
            )
        yield case("sample", "numbers", f"--guide-ckpt in/records/{name}.pt", f"{name}.pt")
    yield case("evaluate", "numbers", "--inception-weights in/inception-nan.pth", "inception-nan.pth")
    yield case(
        "train",
        "numbers",
        "--eval-every 2 --eval-reference in/reference.npz --inception-weights in/inception-nan.pth",
        "inception-nan.pth",
    )
    for lr in ("1e30", "1e300"):
        yield case("train", "numbers", f"--lr {lr} --max-bad-steps 2 --max-steps 40 --run-dir run", "not finite")
    yield case("train", "numbers", "--weight-decay 1e39 --max-bad-steps 2 --max-steps 40 --run-dir run", "not finite")
    yield case(
        "train",
        "numbers",
        "--eval-every 2 --eval-reference in/npz/mu-nan.npz --inception-weights in/inception.pth",
        "mu-nan.npz",
    )
    yield case("extract_latents", "numbers", "--vae in/vae-nan", "--vae", ranks=2)
    yield case("extract_latents", "numbers", "--vae in/vae-large", "--dtype float32")
    yield case("complexity", "numbers", "--images 1e300", "--images")


SIZES = """
train: --hidden-size 65536 --num-heads 2 --depth 512|memory
train: --hidden-size 4096 --depth 512|memory
train: --num-classes 10000000 --hidden-size 4096|memory
train: --data-path in/images --vae none --num-classes 3 --image-size 65536|memory
train: --global-batch-size 10000000 --epochs 100000|memory
train: --mlp-ratio 1024 --hidden-size 16384 --depth 64|memory
train: --data-path in/images --vae none --num-classes 3 --image-size 65536 --patch-size 1|memory
train: --eval-every 2 --eval-reference in/reference.npz --num-workers 1025|--num-workers
sample: --samples-per-label 10000 --enlarge 64|--output
sample: --columns 10000 --interpolate seeds --enlarge 64 --labels 1 2 3 4 5 6 7 8 9|--output
sample: --samples-per-label 9999 --save-trajectory x.png --enlarge 40|--
sample: --output out.webp --enlarge 64 --columns 40 --samples-per-label 40|--output
sample: --output out.gif --enlarge 64 --columns 10000 --samples-per-label 5000 --labels 1 2|--output
sample_ddp: --num-fid-samples 100000000 --per-proc-batch-size 1000000 --num-sampling-steps 250|--per-proc-batch-size
"""


def size_cases():
    yield from listed_cases(SIZES, "sizes")
    for extra in (
        "--hidden-size 65536 --depth 512 --num-heads 1",
        "--image-size 65536 --downsampling 1 --channels 65536 --batch-size 10000000",
        "--num-classes 10000000 --hidden-size 65536 --num-heads 1 --mlp-ratio 1024 --depth 1",
    ):  # what can be counted is no mistake
        yield case("complexity", "sizes", extra, "", status=(0, 1, 2))
    yield case(
        "evaluate",
        "sizes",
        "--batch-size 9223372036854775807",
        "",
        status=(0,),
        positional=["in/reference.npz", "set/samples.npz"],
        copies=("set",),
    )
    yield case(
        "likelihood",
        "sizes",
        "--batch-size 9223372036854775807 --num-images 9223372036854775807 --num-timesteps 2",
        "",
        status=(0, 1, 2),
    )
    yield case("extract_latents", "sizes", "--batch-size 65536 --shard-size 10000000", "", status=(0,))
    yield case("extract_latents", "sizes", "--image-size 65536", "memory")


def disk_cases():
    for limit in (0, 20, 40):
        yield case("sample", "disks", "", "out.png", limit=limit)
        yield case("sample", "disks", "--save-trajectory steps.gif --output out.bmp --enlarge 1", "", limit=limit)
        yield case("sample", "disks", "--output out.jpg --num-sampling-steps 1", "out.jpg", limit=limit // 2)
        yield case("likelihood", "disks", "", "likelihood.json", limit=limit)
        yield case("convert", "disks", "", "TARGET", limit=limit)
        yield case("convert", "disks", "--vae none", "TARGET", positional=["in/latent.pt", "out-folder"], limit=limit * 50)
        yield case(
            "convert", "disks", "--overwrite", "TARGET", positional=["in/tiny.pt", "set/x.pt"], copies=("set",), limit=limit
        )
        yield case("extract_latents", "disks", "", "--out", limit=limit)
        yield case(
            "evaluate",
            "disks",
            "",
            "samples.npz.metrics.json",
            positional=["in/reference.npz", "set/samples.npz"],
            copies=("set",),
            limit=limit,
        )
    yield case("sample", "disks", "--save-trajectory steps.bmp --enlarge 64", "steps.bmp", limit=100_000)
    for limit in (0, 150, 1000, 60_000):
        yield case("sample_ddp", "disks", "", "", limit=limit if limit < 60_000 else 900, ranks=1 + (limit == 150))
        yield case("train", "disks", "--run-dir run", "run", limit=limit, ranks=1 + (limit == 60_000))
        yield case("train", "disks", "--run-dir run-whole --max-steps 8", "run-whole", limit=limit, copies=("run-whole",))
    yield case("likelihood", "disks", "", "likelihood.json", limit=8000)
    yield case("extract_latents", "disks", "", "--out", limit=500, ranks=2)
    yield case("extract_latents", "disks", "--num-workers 2", "File too large", limit=500, alone=True)
    yield case("extract_latents", "disks", "--out latents --shard-size 4", "--out", copies=("latents-part",), limit=0)
    yield case(
        "evaluate",
        "disks",
        "--cache cache",
        "metrics.json",
        positional=["in/reference.npz", "set/samples.npz"],
        copies=("set",),
        limit=0,
    )
    yield case(
        "sample_ddp", "disks", "--sample-dir set-whole --num-fid-samples 40", "set", copies=("set-whole",), limit=600
    )


def name_cases():
    for command, name in (("sample", "caf\udce9.png"), ("sample", "new\nline.png"), ("sample", "-x.png")):
        yield case(command, "names", [f"--output={name}"], "", status=(0,))
    for name in ("caf\udce9", "new\nline", "\u202e", "a b"):
        yield case("train", "names", ["--run-dir", name], "", status=(0,))
        yield case("sample_ddp", "names", ["--folder", name], "", status=(0,))
        yield case("convert", "names", [], "", status=(0,), positional=["in/tiny.pt", f"{name}.safetensors"])
        yield case("likelihood", "names", ["--output", f"{name}.json"], "", status=(0,))
        yield case("extract_latents", "names", ["--out", name], "", status=(0,))
        yield case("sample", "names", ["--ckpt", f"in/names/{name}"], "names/")
        yield case("sample", "names", ["--labels", name], "--labels")
        yield case("evaluate", "names", [], "names", positional=["in/reference.npz", f"in/names/{name}"])
    yield case("train", "names", [*IMAGES.split(), "--data-path", "in/latin"], "", status=(0,))
    yield case("extract_latents", "names", ["--data-path", "in/latin"], "", status=(0,))
    yield case("train", "names", "--run-dir .", "", status=(0,))
    yield case("train", "names", "--model dit-s/2", "--model")
    yield case("train", "names", "--Data-path digits", "--Data-path")
    yield case("train", "names", "--data digits", "--data")
    yield case("sample_ddp", "names", "--folder .", "--folder")
    yield case("sample_ddp", "names", "--folder ..", "--folder")


def interruption_cases():
    """Ctrl-C, to all processes, after a text of the command's output."""
    long = {
        "train": ("--max-steps 1000000 --run-dir run", "step=0000002"),
        "sample": ("--num-sampling-steps 1000 --samples-per-label 100", "%|"),
        "sample_ddp": ("--num-sampling-steps 1000 --num-fid-samples 400", "Sampling"),
        "likelihood": ("--num-timesteps 1000 --num-images 1000", "Likelihood"),
        "evaluate": ("--batch-size 1", "features"), "extract_latents": ("--batch-size 1 --image-size 512", "Encoding"),
    }  # fmt: skip
    for command, (extra, text) in long.items():
        word = "Stopped (interrupted)" if command == "train" else "interrupted"
        yield case(command, "interrupted", extra, word, status=(130,), interrupt=text)
        if command not in ("sample",):
            yield case(command, "interrupted", extra, word, status=(130,), interrupt=text, ranks=2)
    yield case("sample", "interrupted", long["sample"][0], "interrupted", status=(130,), interrupt="%|", alone=True)
    yield case(
        "extract_latents",
        "interrupted",
        f"{long['extract_latents'][0]} --num-workers 2",
        "interrupted",
        status=(130,),
        interrupt="Encoding",
        alone=True,
    )
    yield case("complexity", "interrupted", "--depth 500", "interrupted", status=(130,), interrupt="", alone=True)


def all_cases():
    makers = (
        value_cases,
        combination_cases,
        file_cases,
        damage_cases,
        number_cases,
        size_cases,
        disk_cases,
        name_cases,
        interruption_cases,
    )
    return [found for make in makers for found in make()]
