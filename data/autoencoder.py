"""The latent space that a model's x_0 lives in: latents of a frozen autoencoder of diffusers, or pixels ("none").

    space = load_space("ema")                # reads the config
    space.to(device)                         # reads the weights
    x_0 = space.encode(images)               # (N, 3, H, W) in [-1, 1] -> (N, C, H/8, W/8), about unit variance
    images = space.decode(x_0)

Another kind of autoencoder is a line in AUTOENCODERS, and a class where its encoder gives something else."""

import functools
import inspect
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data.pretrained import attempt
from runtime.config import Config, option
from runtime.errors import UserError
from runtime.files import checksum_of_arrays
from runtime.shapes import bucket_shapes, plain_size, sides

RELEASED = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}


class Pixels:
    """Identity: the model works on pixels in [-1, 1]. channels: of the images."""

    factor = 1

    def __init__(self, channels):
        self.channels = channels

    def to(self, device):
        return self

    def encode(self, images):
        return images

    def decode(self, x_0):
        return x_0


class LatentSpace:
    """What there is to know of a latent space where no image has to be encoded or decoded: that of stored latents.

    channels: of a latent. factor: pixels per latent cell. scaling, shift: x_0 = (latent - shift) * scaling has about unit
    variance; each is a number, or a list of one for each channel. statistics: where they take the place of the
    autoencoder's, {"mean", "std"} of `data.statistics`."""

    statistics = None

    def __init__(self, channels, factor, scaling, shift):
        self.channels, self.factor, self.scaling, self.shift = channels, factor, per_channel(scaling), per_channel(shift)

    def to(self, device):
        self.scaling, self.shift = (v.to(device) if torch.is_tensor(v) else v for v in (self.scaling, self.shift))
        return self

    def normalise_by(self, statistics):
        """Take measured statistics of each channel in place of the autoencoder's numbers: x_0 = (latent - mean) / std."""
        self.statistics = statistics
        self.scaling, self.shift = per_channel([1 / std for std in statistics["std"]]), per_channel(statistics["mean"])

    def sample(self, moments):
        """x_0 (N, C, h, w) of stored moments (N, M, C, h, w): drawn from the posterior with torch's random stream of their
        device, the same draw as diffusers' latent_dist.sample(), or with M = 1 the latent itself; then normalised."""
        mean, *std = moments.float().unbind(1)
        latent = mean + std[0] * torch.randn(mean.shape, device=mean.device) if std else mean
        scaling, shift = self.normalisation(latent.ndim)
        return (latent - shift) * scaling

    def normalisation(self, ndim):
        """(scaling, shift) for latents (N, C, ...) of so many dimensions."""
        return (v.view(-1, *[1] * (ndim - 2)) if torch.is_tensor(v) else v for v in (self.scaling, self.shift))


def per_frame(function, x):
    """function(x) of images (N, C, H, W); of clips (N, C, F, H, W) that of all frames, (N, ..., F, h, w)."""
    if x.ndim == 4:
        return function(x)
    return function(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).movedim(1, -3)


def per_channel(values):
    """A number where all values are equal, else a tensor (C, 1, 1)."""
    values = [values] if isinstance(values, int | float) else list(values)
    return float(values[0]) if len(set(values)) == 1 else torch.tensor(values)[:, None, None]


@dataclass(frozen=True)
class AutoencoderConfig(Config):
    """What is needed of an autoencoder's config.json."""

    in_channels: int = option(low=1, high=1024)
    latent_channels: int = option(low=1, high=1024)
    block_out_channels: tuple[int, ...] = option((1,), low=1)  # each level but the first halves the side
    patch_size: int = option(1, low=1, high=1024)  # side of patches that become channels, before or after these levels
    scaling_factor: float = option(1.0, above=0)
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = option(None, above=0)
    image_size: int | None = option(None, low=1)  # in pixels, where it takes one size alone

    def check(self):
        for name, values in (("latents_mean", self.latents_mean), ("latents_std", self.latents_std)):
            if values and len(values) != self.latent_channels:
                raise UserError(f"--{name}", f"{len(values)} numbers, for {self.latent_channels} channels")

    def statistics(self):
        """(scaling, shift), of each channel or of all, as diffusers' pipelines have them: (z - latents_mean) / latents_std
        * scaling_factor, or (z - shift_factor) * scaling_factor."""
        scaling, shift = self.scaling_factor, self.latents_mean or self.shift_factor or 0.0
        return [scaling / std for std in self.latents_std] if self.latents_std else scaling, shift


class Autoencoder(LatentSpace):
    """A frozen autoencoder of diffusers, `vae`, whose posterior is a Gaussian or whose encoder gives the latent. name: of
    its folder or on the hub. kind: of the class in diffusers. side: of the images in pixels, if it takes one size alone."""

    side = None

    def __init__(self, name, kind, config):
        self.name, self.kind, self.vae = name, kind, None
        factor = 2 ** (len(config.block_out_channels) - 1) * config.patch_size
        super().__init__(config.latent_channels, factor, *config.statistics())
        if config.in_channels != 3:
            raise UserError(f"--vae {name}", f"takes {config.in_channels} channels, the images have 3", "name another one")

    @staticmethod
    def renamed(values):
        """What AutoencoderConfig has under another name than diffusers' config, whose `values` these are."""
        return {"block_out_channels": values.get("encoder_block_out_channels") or values.get("block_out_channels")}

    def to(self, device):
        """Read the weights, at the first call, and move them to the device. Raises UserError."""
        self.vae = self.vae or attempt_vae(self.name, self._read_weights)
        self.vae.to(device).eval().requires_grad_(False)
        return super().to(device)

    def _read_weights(self, diffusers):
        kind, options = getattr(diffusers, self.kind), {"low_cpu_mem_usage": False, "output_loading_info": True}
        read = functools.partial(kind.from_pretrained, self.name, **options)
        try:
            vae, report = read()
        except OSError as error:
            try:
                vae, report = read(variant="fp16")  # there may be half-precision files alone
            except Exception:
                raise error from None
        if missing := report["missing_keys"]:
            raise ValueError(f"the weights {min(missing)} are missing")  # they would be drawn at random
        for name, tensor in vae.state_dict().items():
            if not tensor.isfinite().all():
                raise ValueError(f"the weights {name} are not finite")
        return vae

    def encoder_settings(self):
        """What decides on the latents: statistics, sizes, and the CRC-32 of the encoder's weights, names and values."""
        state = self.vae.state_dict()
        encoder = [name for name in state if not name.startswith(("decoder.", "post_quant_conv."))]
        number = self.moments(torch.zeros(1, 3, self.factor, self.factor, device=self.vae.device)).shape[1]  # 2, or 1
        found = {"channels": self.channels, "factor": self.factor, "moments": number}
        found["encoder_crc32"] = checksum_of_arrays({name: state[name].cpu().contiguous().numpy() for name in encoder})
        statistics = {"scaling": self.scaling, "shift": self.shift}
        return found | {k: v.flatten().tolist() if torch.is_tensor(v) else [v] for k, v in statistics.items()}

    @torch.no_grad()
    def moments(self, images):
        """(N, 3, H, W) in [-1, 1] -> (N, 2, C, h, w): mean and standard deviation of the posterior, not normalised; of a
        deterministic encoder (N, 1, C, h, w): the latent."""
        encoded = self.vae.encode(images)
        posterior = getattr(encoded, "latent_dist", None)
        parts = [posterior.mean, posterior.std] if posterior else [encoded[0]]
        # contiguous: in a channels-last order torch.randn_like(x_0) would draw other noise than for stored moments
        return torch.stack(parts, dim=1).contiguous()

    def encode(self, images):
        """x_0; a sample of the posterior, drawn from torch's random stream."""
        return self.sample(per_frame(self.moments, images))

    def decode(self, x_0):
        scaling, shift = self.normalisation(x_0.ndim)
        return per_frame(self.decode_latent, x_0 / scaling + shift)

    @torch.no_grad()
    def decode_latent(self, latent):
        """(N, C, h, w), not normalised -> (N, 3, H, W) in about [-1, 1]."""
        return self.vae.decode(latent).sample


class Flux2Autoencoder(Autoencoder):
    """One whose 2x2 patches of latents are the cells, normalised by the running statistics of its batch norm, `vae.bn`:
    they are known once the weights are read."""

    @staticmethod
    def renamed(values):
        return {"patch_size": 2, "latent_channels": 4 * values["latent_channels"]}

    def _read_weights(self, diffusers):
        vae = super()._read_weights(diffusers)
        if not self.statistics:
            self.scaling = (vae.bn.running_var + vae.bn.eps).rsqrt()[:, None, None]
            self.shift = vae.bn.running_mean[:, None, None]
        return vae

    def moments(self, images):
        return F.pixel_unshuffle(super().moments(images), 2)

    def decode_latent(self, latent):
        return super().decode_latent(F.pixel_shuffle(latent, 2))


class VideoAutoencoder(Autoencoder):
    """One of videos, (N, C, frames, H, W), whose first frame is encoded by itself: an image is a video of one frame."""

    @staticmethod
    def renamed(values):
        patch = values.get("patch_size") or 1  # of pixels, which become channels first
        channels = values.get("input_channels") or values["in_channels"] / patch**2
        found = {"in_channels": int(channels), "latent_channels": values["z_dim"], "block_out_channels": values["dim_mult"]}
        return found | {"patch_size": patch}

    def moments(self, images):
        return super().moments(images[:, :, None]).squeeze(3)

    def decode_latent(self, latent):
        return super().decode_latent(latent[:, :, None]).squeeze(2)


class RepresentationAutoencoder(Autoencoder):
    """The features of a frozen image encoder, and a decoder trained on them: RAE (Zheng et al. 2025). Images are in [0, 1];
    the latents come normalised. The encoder resizes images to its own size, so that the decoder's fits one size alone."""

    def __init__(self, name, kind, config):
        super().__init__(name, kind, config)
        self.side = config.image_size

    @staticmethod
    def renamed(values):
        if not values["reshape_to_2d"]:
            raise ValueError("its latents have no grid: reshape_to_2d is off")
        found = {"latent_channels": values["encoder_hidden_size"], "in_channels": values["num_channels"]}
        found["patch_size"] = values["patch_size"]  # of the decoder
        found["image_size"] = values["encoder_input_size"] // values["encoder_patch_size"] * values["patch_size"]
        return found | {"scaling_factor": 1.0, "latents_mean": None, "latents_std": None}  # its encoder applies them

    def moments(self, images):
        return super().moments((images + 1) / 2)

    def decode_latent(self, latent):
        return 2 * super().decode_latent(latent) - 1


# By the name of diffusers' class. docs/latents.md has the table
AUTOENCODERS = {
    "AutoencoderKL": Autoencoder,
    "AutoencoderDC": Autoencoder,
    "AutoencoderTiny": Autoencoder,
    "AutoencoderKLFlux2": Flux2Autoencoder,
    "AutoencoderKLQwenImage": VideoAutoencoder,
    "AutoencoderKLWan": VideoAutoencoder,
    "AutoencoderRAE": RepresentationAutoencoder,
}


def load_autoencoder(name):
    """The Autoencoder of a local folder or hub name, by its config. Raises UserError where none can be had."""

    def read(diffusers):
        found = diffusers.AutoencoderKL.load_config(name)
        kind = found.get("_class_name", "AutoencoderKL")
        if kind not in AUTOENCODERS:
            raise ValueError(f"it is of the kind {kind}; known are {', '.join(AUTOENCODERS)}")
        # a config of an older diffusers lacks the keys that were added since, as that of the released autoencoders lacks
        # scaling_factor: diffusers then takes the constructor's defaults, and so do we
        parameters = inspect.signature(getattr(diffusers, kind).__init__).parameters.values()
        values = {p.name: p.default for p in parameters if p.default is not p.empty} | found
        values |= {"patch_size": 1, "image_size": None} | AUTOENCODERS[kind].renamed(values)
        try:
            return kind, AutoencoderConfig.from_flat(values)
        except UserError as error:  # names keys of the file as if they were options
            raise ValueError(error) from None

    kind, config = attempt_vae(name, read)
    return AUTOENCODERS[kind](name, kind, config)


def attempt_vae(name, read):
    import diffusers  # takes seconds

    return attempt("--vae", name, "autoencoder", "pass a folder written by save_pretrained", read, diffusers)


SPACES = {"none": Pixels}  # by the name that --vae gives; made with the number of the images' channels


def load_space(vae, image_channels=3):
    """The latent space that --vae names: one of SPACES, "ema" or "mse" (the released decoders), or a folder or hub name."""
    return SPACES[vae](image_channels) if vae in SPACES else load_autoencoder(RELEASED.get(vae, vae))


def to_model_range(images):
    """uint8 (N, C, H, W) -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def encode_batch(space, batch, device):
    """x_0 (N, C, h, w) of a batch's images, or of their stored moments: a fresh draw either way."""
    if "moments" in batch:
        return space.sample(batch["moments"].to(device, non_blocking=True))
    return space.encode(to_model_range(batch["image"].to(device, non_blocking=True)))


def model_sizes(image_size, aspect_buckets, factor, patch_size, side=None):
    """The arguments of `models.DiT` for images of a size, and for --aspect-buckets. Raises UserError as `latent_sides`."""
    found = {"input_size": latent_sides(image_size, factor, patch_size, side)}
    if aspect_buckets:
        shapes = bucket_shapes(image_size, aspect_buckets, factor * patch_size)
        others = [latent_sides(plain_size(shape), factor, patch_size, side) for shape in shapes]
        found["other_sizes"] = [cells for cells in others if cells != found["input_size"]]
    return found


def latent_sides(image_size, factor, patch_size=1, side=None):
    """The sides (h, w) in latent cells of images of a size in pixels. Raises UserError where the autoencoder's downsampling
    and the patch size do not divide them, or where the autoencoder takes squares of another `side` alone."""
    pixels, unit = sides(image_size), factor * patch_size
    if any(n % unit for n in pixels):
        problem = f"not a multiple of {unit} (autoencoder {factor} times patch {patch_size})"
        below = image_size // unit * unit if isinstance(image_size, int) else 0
        near = below or plain_size([max(1, round(n / unit)) * unit for n in pixels])
        fits = f"{below} and {below + unit} are the nearest that fit" if below else f"{near} is the nearest that fits"
        raise UserError(f"--image-size {image_size}", problem, fits)
    if side not in (None, image_size):
        raise UserError(f"--image-size {image_size}", f"the autoencoder takes {side} pixels alone", f"pass {side}")
    return tuple(n // factor for n in pixels)
