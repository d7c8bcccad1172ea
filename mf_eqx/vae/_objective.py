r"""Training of a tokenizer: decoded images should equal the encoded ones, and latents should be near a standard normal
distribution.

$$\mathcal L = \frac{1}{D} \Big( \| x - \hat x \|_1 + \beta\, \mathrm{KL}\big(q(\ell | x) \,\|\, N(0, I)\big) \Big)
    + \text{perceptual}, \qquad \hat x = \mathrm{decode}(\ell), \quad \ell \sim q(\ell | x),$$

with D the number of an image's values, so that beta weighs sums over all values, as in the paper, and the size of
gradients does not depend on that of images. The paper adds a discriminator, which is left out here.

Source: High-Resolution Image Synthesis with Latent Diffusion Models, Rombach, Blattmann, Lorenz, Esser, Ommer, 2022,
arXiv 2112.10752, App. G; the divergence is that of Auto-Encoding Variational Bayes, Kingma, Welling, 2013, arXiv
1312.6114, App. B.
"""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from .._abstract_objective import AbstractMeanObjective
from .._batch import Batch, check_batch
from .._custom_types import at_least_float32, Scalar
from .._mean import mean_of, Metrics
from .._perceptual import PerceptualTerm
from .._row import Context, Row
from .._validate import as_float, check_kind, check_positive
from ._autoencoder import Autoencoder


class AutoencoderObjective(AbstractMeanObjective):
    r"""The loss of an `Autoencoder` on images in [-1, 1], for the same `TrainStep` that trains fields:

        objective = vae.AutoencoderObjective(kl=1e-3)
        step = mfx.TrainStep(objective, optimizer, averages, data.FromPixels())
        state = mfx.init_state(tokenizer, optimizer, averages, objective, key=key)

    Conditions are not used. On a CPU train with accumulation 1: XLA runs convolutions inside of loops without its fast
    kernels.

    **Arguments:**

    - `kl`: $\beta$, >= 0. The paper's 1e-6 leaves latents of a large deviation, which only `LatentStatistics` bring to
      1.
    - `perceptual`: None, or a term in the features of a network. For it, a decoded image is a state at t = 0.

    **Metrics**, each a `Mean` over images: `loss`; `absolute_error` and `squared_error` per value of an image; `kl` in
    nats, summed over a latent; `perceptual_loss`, if there is such a term, its part of the loss.

    **Raises:** `ValueError` for values out of range; when called, if the network is no `Autoencoder`, or if images are
    not floating point or not of its channels and sides.
    """

    learns: ClassVar[type[eqx.Module]] = Autoencoder

    kl: float = eqx.field(default=1e-6, converter=as_float("kl"))
    perceptual: PerceptualTerm | None = None

    def __check_init__(self):
        check_positive("kl", self.kl, or_zero=True)
        if self.perceptual is not None:
            check_kind("perceptual", self.perceptual, PerceptualTerm)

    def __call__(
        self, field: Autoencoder, batch: Batch, *, key: Key[Array, ""], context: Context | None = None
    ) -> tuple[Scalar, Metrics]:
        """The pair `(loss, metrics)`; `field` is the tokenizer."""
        check_kind("field", field, Autoencoder)
        check_batch("batch", batch)
        metrics = jax.vmap(lambda row: self._of_row(field, row, jr.fold_in(key, row.index)))(batch)
        means = {name: mean_of(values) for name, values in metrics.items()}
        return jnp.asarray(means["loss"].value), means

    def _of_row(self, tokenizer: Autoencoder, row: Batch, key: Key[Array, ""]) -> dict[str, Any]:
        """All metrics of one image."""
        x = jnp.asarray(row.x)
        moments = tokenizer.encode(x)
        x, decoded = at_least_float32(x), tokenizer.decode(moments.sample(key=key))
        absolute, divergence = jnp.mean(jnp.abs(x - decoded)), moments.divergence()
        found = {"absolute_error": absolute, "squared_error": jnp.mean((x - decoded) ** 2), "kl": divergence}
        loss = absolute + self.kl / x.size * divergence
        if self.perceptual is not None:
            found["perceptual_loss"] = _perceptual_loss(self.perceptual, x, decoded, key)
            loss = loss + found["perceptual_loss"]
        return {"loss": loss, **found}


def _perceptual_loss(
    term: PerceptualTerm,
    x: Float[Array, "colours height width"],
    decoded: Float[Array, "colours height width"],
    key: Key[Array, ""],
) -> Scalar:
    """The term of an image and of what was decoded, the state at t = 0, from which no step leads on."""
    zeros = jnp.zeros_like(decoded)
    return term(Row(decoded, zeros, 0.0, 0.0, x=x, key=key), zeros)
