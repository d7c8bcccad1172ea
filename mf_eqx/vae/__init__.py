r"""The tokenizer of latent diffusion: images become small latents on which a field is trained, and latents images.

    folder = vae.download_autoencoder()                     once; or a folder or a .safetensors file that you have
    tokenizer = vae.load_autoencoder(folder)

    moments = tokenizer.encode(x)                           x (3, height, width) in [-1, 1]
    z = vae.SCALE * moments.sample(key=key)                 (4, height / 8, width / 8), standard deviation about 1
    x = tokenizer.decode(z / vae.SCALE)                     (3, height, width), not clipped

The encoder gives each image a normal distribution over latents, $q(z | x) = N(\mu, \operatorname{diag} \sigma^2)$.
Keep the moments of a data set, not samples: drawing anew at every read is what the papers do. Everything is per
example; batches are the caller's, and so is the memory that they take (`Autoencoder`). Imported explicitly (`from
mf_eqx import vae`); loading needs the extra `export`, downloading the extra `hub`.

Source: High-Resolution Image Synthesis with Latent Diffusion Models, Rombach, Blattmann, Lorenz, Esser, Ommer, 2022,
arXiv 2112.10752; layers and their names as in `AutoencoderKL` of diffusers.
"""

from ._autoencoder import (
    Autoencoder as Autoencoder,
    AutoencoderSize as AutoencoderSize,
    Moments as Moments,
    SCALE as SCALE,
    SD_VAE as SD_VAE,
)
from ._download import download_autoencoder as download_autoencoder
from ._load import load_autoencoder as load_autoencoder
