r"""The tokenizer of latent diffusion: it encodes images as small latents, the data of a field, and decodes latents.

    folder = vae.download_autoencoder()                     once; or use a folder of your own
    tokenizer = vae.load_autoencoder(folder)
    statistics = vae.read_latent_statistics(folder)         of its config.json

    moments = tokenizer.encode(x)                           x (3, height, width) in [-1, 1]
    z = statistics.standardise(moments.sample(key=key))     (4, height / 8, width / 8), standard deviation about 1
    x = tokenizer.decode(statistics.restore(z))             (3, height, width), not clipped

The encoder gives each image a normal distribution over latents, $q(z | x) = N(\mu, \operatorname{diag} \sigma^2)$.
Store the moments of a data set, not samples of them: the papers draw a new sample every time an image is used.
`AutoencoderObjective` trains a tokenizer of one's own (experiments/tokenizer.py), and `save_autoencoder` keeps it. All
methods take one example; for batches, and the memory that these take, see `Autoencoder`. Import this part explicitly
(`from mf_eqx import vae`); downloading requires the extra `hub`.

Source: High-Resolution Image Synthesis with Latent Diffusion Models, Rombach, Blattmann, Lorenz, Esser, Ommer, 2022,
arXiv 2112.10752; layers and their names as in `AutoencoderKL` of diffusers.
"""

from ._autoencoder import (
    Autoencoder as Autoencoder,
    AutoencoderSize as AutoencoderSize,
    SD_VAE as SD_VAE,
)
from ._download import download_autoencoder as download_autoencoder
from ._layout import (
    latent_statistics_origin as latent_statistics_origin,
    read_latent_statistics as read_latent_statistics,
)
from ._load import load_autoencoder as load_autoencoder
from ._moments import LatentStatistics as LatentStatistics, Moments as Moments, SCALE as SCALE
from ._objective import AutoencoderObjective as AutoencoderObjective
from ._save import save_autoencoder as save_autoencoder
