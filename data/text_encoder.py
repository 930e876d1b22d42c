"""Texts as a model takes them, encoded by a frozen T5 or CLIP text model of the package transformers.

encoder = TextEncoder("google/t5-v1_1-xl")       # reads the config and the tokenizer
encoder.to(device)                            # reads the weights
y = encoder(["a handwritten seven"])             # (N, L, W + 1): of each token W numbers, then 1, or 0 for padding
"""

import functools
import json
import math
import zlib
from dataclasses import dataclass

import torch

from data.pretrained import attempt
from runtime.errors import UserError

LENGTH = 120  # tokens, as in PixArt-alpha (Chen et al. 2024)
CLASSES = {"t5": "T5EncoderModel", "clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel"}  # by config.model_type


class TextEncoder:
    """name: a local folder, with model and tokenizer, or a hub name. length: tokens of a text that are used, at most
    (default: 120, or as many as the encoder takes). width: W of a token. Raises UserError, in one line, where there is no
    such encoder or it cannot be fetched."""

    def __init__(self, name, length=None):
        self.name, self.encoder = name, None
        self.config, self.tokenizer = self._attempt(self._read_config)
        config = getattr(self.config, "text_config", self.config)
        limit = min(self.tokenizer.model_max_length, getattr(config, "max_position_embeddings", math.inf))
        if length and length > limit:
            raise UserError(f"--text-length {length}", f"--text-encoder {name} takes up to {limit} tokens", "lower it")
        self.width, self.length = config.hidden_size, length or min(LENGTH, limit)

    def _attempt(self, read):
        try:
            import transformers  # takes seconds to import
        except ImportError:
            raise UserError("--text-encoder", "needs the package transformers", 'pip install "transformers>=5.0"') from None
        way_out = "pass a folder with a T5 or CLIP text model and its tokenizer, or a hub name, as --text-encoder"
        return attempt("--text-encoder", self.name, "text encoder", way_out, read, transformers)

    def _read_config(self, transformers):
        config = transformers.AutoConfig.from_pretrained(self.name)
        if config.model_type not in CLASSES:
            raise ValueError(f"its kind is {config.model_type}, not t5 or clip")
        return config, transformers.AutoTokenizer.from_pretrained(self.name)

    def _read_weights(self, transformers):
        verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()  # it would warn of the decoder or image model, which are not needed
        transformers.logging.disable_progress_bar()
        kind = getattr(transformers, CLASSES[self.config.model_type])
        with torch.random.fork_rng(devices=[]):  # some versions draw weights before they read them
            encoder, report = kind.from_pretrained(self.name, dtype=torch.float32, output_loading_info=True)
        transformers.logging.set_verbosity(verbosity)
        if report["missing_keys"]:  # they would be drawn at random
            raise ValueError(f"the weights {min(report['missing_keys'])} are missing")
        return encoder

    def to(self, device):
        self.encoder = self.encoder or self._attempt(self._read_weights)
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

    def __call__(self, texts):
        """y (N, L, W + 1) of texts, each distinct one encoded once."""
        distinct = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        return pad(*self.tokens(distinct), self.length)[[distinct[text] for text in texts]]

    @property
    def null(self):
        """The empty text, (L, W + 1): the condition that stands for none."""
        return self([""])[0]


_loaded = {}  # {(name, length): the TextEncoder}, one at most


def load_text_encoder(name, length=None):
    """The TextEncoder with its weights, read once: the training data and the held-out data share it. length: None for the
    encoder's own. Raises UserError."""
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
