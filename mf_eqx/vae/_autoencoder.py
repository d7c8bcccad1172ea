"""The autoencoder: an encoder, a decoder, and the two 1x1 convolutions between them."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from .._custom_types import at_least_float32
from .._leaves import digest_of_arrays, leaves
from .._validate import check_floating
from ..nn import cast
from ._blocks import conv, DownLevel, Middle, norm, UpLevel
from ._moments import Moments

_MIN_LOG_VARIANCE, _MAX_LOG_VARIANCE = -30.0, 20.0


class AutoencoderSize(NamedTuple):
    """The size of a tokenizer: `widths` the channels of its levels, each of half the resolution of the one before;
    `blocks` residual blocks per level in the encoder (the decoder has one more); `latent` channels of a latent;
    `groups` of the group normalisations; `channels` of an image: 3 in colour, 1 in grey."""

    widths: tuple[int, ...]
    blocks: int
    latent: int
    groups: int
    channels: int = 3


SD_VAE = AutoencoderSize(widths=(128, 256, 512, 512), blocks=2, latent=4, groups=32)
"""The tokenizer of Stable Diffusion 1 and 2, such as sd-vae-ft-mse: 83,653,863 parameters."""


class Encoder(eqx.Module):
    """From an image to two numbers for each channel and position of the latent."""

    conv_in: eqx.nn.Conv2d
    down: tuple[DownLevel, ...]
    middle: Middle
    norm: eqx.nn.GroupNorm
    conv_out: eqx.nn.Conv2d

    def __init__(self, size: AutoencoderSize, *, key: Key[Array, ""]):
        in_key, down_key, middle_key, out_key = jr.split(key, 4)
        first, last = size.widths[0], size.widths[-1]
        keys = jr.split(down_key, len(size.widths))
        self.conv_in = conv(size.channels, first, key=in_key)
        self.down = tuple(
            DownLevel(before, width, size.blocks, size.groups, shrink=i + 1 < len(keys), key=keys[i])
            for i, (before, width) in enumerate(zip((first, *size.widths), size.widths, strict=False))
        )
        self.middle = Middle(last, size.groups, key=middle_key)
        self.norm = norm(last, size.groups)
        self.conv_out = conv(last, 2 * size.latent, key=out_key)

    def __call__(self, x: Float[Array, "colours height width"]) -> Float[Array, "moments lower narrower"]:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm(self.middle(x))))


class Decoder(eqx.Module):
    """From a latent to an image."""

    conv_in: eqx.nn.Conv2d
    middle: Middle
    up: tuple[UpLevel, ...]
    norm: eqx.nn.GroupNorm
    conv_out: eqx.nn.Conv2d

    def __init__(self, size: AutoencoderSize, *, key: Key[Array, ""]):
        in_key, middle_key, up_key, out_key = jr.split(key, 4)
        widths = size.widths[::-1]
        keys = jr.split(up_key, len(widths))
        self.conv_in = conv(size.latent, widths[0], key=in_key)
        self.middle = Middle(widths[0], size.groups, key=middle_key)
        self.up = tuple(
            UpLevel(before, width, size.blocks + 1, size.groups, enlarge=i + 1 < len(keys), key=keys[i])
            for i, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False))
        )
        self.norm = norm(widths[-1], size.groups)
        self.conv_out = conv(widths[-1], size.channels, key=out_key)

    def __call__(self, latent: Float[Array, "latent height width"]) -> Float[Array, "colours higher wider"]:
        x = self.middle(self.conv_in(latent))
        for level in self.up:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm(x)))


class Autoencoder(eqx.Module):
    r"""The tokenizer of latent diffusion: from an image (3, height, width) in [-1, 1] to the moments of its latent
    (latent, height / 8, width / 8), and from a latent to an image. (For other sizes, `channels` replaces 3, and
    2^(levels - 1) replaces 8.)

    **Arguments:**

    - `size`: an `AutoencoderSize`, such as `SD_VAE`, or one of your own.
    - `dtype`: compute precision, float32 or bfloat16 (float64 for tests). Parameters, the statistics of norms, moments
      and images stay float32 or better.
    - `key`: for random weights, which `AutoencoderObjective` trains; `load_autoencoder` reads trained ones. (Drawing
      random weights takes a few seconds of compilation, less than half of that with a key of `impl="rbg"`.)

    For a batch use `jax.vmap`. Its memory is proportional to the number of images: with `SD_VAE` and 256 x 256 pixels
    in float32, each image takes about 225 MiB while decoding and 130 to 250 MiB while encoding (XLA on the CPU; 620 and
    270 GFLOP). So process large batches in pieces:

        @eqx.filter_jit
        def decode(tokenizer, statistics, z):  # of a `LatentStatistics`
            return jax.lax.map(lambda z: tokenizer.decode(statistics.restore(z)), z, batch_size=16)

    On GPUs float32 convolutions run in TF32 unless `jax.default_matmul_precision("highest")` is set, as they do in
    torch.
    """

    encoder: Encoder
    to_moments: eqx.nn.Conv2d
    from_latent: eqx.nn.Conv2d
    decoder: Decoder
    size: AutoencoderSize = eqx.field(static=True)
    dtype: DTypeLike = eqx.field(static=True)

    def __init__(self, size: AutoencoderSize, *, dtype: DTypeLike = jnp.float32, key: Key[Array, ""]):
        if not size.widths or min(*size.widths, *size[1:]) < 1:
            raise ValueError(f"size must be positive throughout, got {size}")
        if any(width % size.groups for width in size.widths):
            raise ValueError(f"widths must be multiples of the {size.groups} groups, got {size.widths}")
        check_floating("dtype", dtype)
        encoder_key, moments_key, latent_key, decoder_key = jr.split(key, 4)
        self.encoder = Encoder(size, key=encoder_key)
        self.to_moments = conv(2 * size.latent, 2 * size.latent, kernel=1, key=moments_key)
        self.from_latent = conv(size.latent, size.latent, kernel=1, key=latent_key)
        self.decoder = Decoder(size, key=decoder_key)
        self.size = size
        self.dtype = jnp.dtype(dtype)

    @property
    def factor(self) -> int:
        """The ratio of an image's height and width to those of its latent: 8 for `SD_VAE`."""
        return 2 ** (len(self.size.widths) - 1)

    def digest(self) -> str:
        """SHA-256 of all parameters and their paths. It identifies the weights, whatever file they were read from."""
        return digest_of_arrays(leaves(self))

    def encode(self, x: Float[Array, "colours height width"]) -> Moments:
        r"""The posterior of an image: $\mu$ and $\sigma$, where $\log \sigma^2$ is clipped to [-30, 20].

        **Arguments:** `x` (channels, height, width) in [-1, 1], with height and width that are multiples of `factor`.

        The range is not checked, since values are known only on the device.

        **Raises:** `ValueError` if `x` has another shape, or is an array of integers.
        """
        channels, factor = self.size.channels, self.factor
        if x.ndim != 3 or x.shape[0] != channels or x.shape[1] % factor or x.shape[2] % factor or not x.size:
            rule = f"positive multiples of {factor}"
            raise ValueError(f"x must be ({channels}, height, width) with height and width {rule}, got {x.shape}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"x must be floating point, in [-1, 1], got {x.dtype}")
        encoded = cast(self.encoder, self.dtype)(x.astype(self.dtype))
        moments = cast(self.to_moments, self.dtype)(encoded)
        mean, log_variance = jnp.split(moments.astype(at_least_float32(x).dtype), 2)
        return Moments(mean, jnp.exp(0.5 * jnp.clip(log_variance, _MIN_LOG_VARIANCE, _MAX_LOG_VARIANCE)))

    def decode(self, latent: Float[Array, "latent height width"]) -> Float[Array, "colours higher wider"]:
        """The image of a latent, approximately in [-1, 1] but not clipped.

        **Arguments:** `latent` of any height and width, as the encoder makes them: what a field generates is first
        brought back by `LatentStatistics.restore`.

        **Raises:** `ValueError` if `latent` has another number of channels, or is an array of integers.
        """
        if latent.ndim != 3 or latent.shape[0] != self.size.latent or 0 in latent.shape:
            raise ValueError(f"latent must be ({self.size.latent}, height, width), none of them 0, got {latent.shape}")
        check_floating("latent", latent.dtype)
        decoder_input = cast(self.from_latent, self.dtype)(latent.astype(self.dtype))
        x = cast(self.decoder, self.dtype)(decoder_input)
        return x.astype(np.promote_types(latent.dtype, jnp.float32))
