"""What the blocks of a U-Net are conditioned on: the times, the condition, the guidance if it is an input, and the
numbers that describe the augmentation, as one vector."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.nn.initializers import normal
from jaxtyping import Array, Float, Key

from .._custom_types import Condition, Time
from ..nn import AbstractConditionEmbedding, LabelEmbedding, Linear, sinusoidal_embedding, TimeVariables
from ..nn._condition_embedding import as_embedding, check_one_embedding, embedded_condition
from .guidance import check_has_condition, GuidanceCondition, GuidanceEmbedding, without_guidance
from .unet_block import xavier_uniform


class UNetCondition(NamedTuple):
    """The condition of a U-Net: an integer label, or another condition in its place, and numbers that describe how the
    image was augmented (None for no augmentation, as when sampling)."""

    label: Condition = None
    augmentation: Float[Array, " numbers"] | None = None


class UNetEmbedding(eqx.Module):
    """The embedding on which every block is conditioned. The sines and cosines of the times are concatenated; a vector
    for the label or another condition and one that is linear in the numbers of the augmentation are added; two linear
    layers with SiLU follow. It is computed in float32 or better.

    **Arguments:** `width` of the result; `labels`, `condition`, `guidance`, `augmentation` as for `UNet`; `variables`
    its `time_variables`; `key`.
    """

    label: LabelEmbedding | None
    condition: AbstractConditionEmbedding | None
    guidance: GuidanceEmbedding | None
    augmentation: Float[Array, "numbers features"] | None
    hidden: Linear
    out: Linear
    variables: TimeVariables = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        labels: int | None,
        condition: int | AbstractConditionEmbedding | None,
        guidance: bool,
        augmentation: int,
        variables: TimeVariables,
        *,
        key: Key[Array, ""],
    ):
        features = len(variables(jnp.zeros(()), jnp.ones(()))) * width // 2
        label_key, augmentation_key, hidden_key, out_key = jr.split(key, 4)
        self.label = None if labels is None else LabelEmbedding(labels, features, init=normal(0.2), key=label_key)
        self.condition = as_embedding(condition, features, init=xavier_uniform(), key=label_key)
        check_one_embedding(self.label, self.condition)
        check_has_condition(guidance, labels, condition)
        self.guidance = None
        if guidance:
            self.guidance = GuidanceEmbedding(features, size=256, init=normal(0.02), key=jr.fold_in(label_key, 1))
        numbers = (augmentation, features)
        self.augmentation = xavier_uniform()(augmentation_key, numbers, jnp.float32) if augmentation else None
        self.hidden = Linear(features, width, key=hidden_key)
        self.out = Linear(width, width, key=out_key)
        self.variables = variables

    def __call__(self, r: Time, t: Time, given: GuidanceCondition | Condition) -> Float[Array, " width"]:
        condition = without_guidance(given, self.guidance is not None)
        condition = condition if isinstance(condition, UNetCondition) else UNetCondition(condition)
        self._check(condition)
        x = jnp.concatenate([self._embedded(value) for value in self.variables(r, t)])
        added = embedded_condition(condition.label, self.label, self.condition, x.shape[0])
        x = x if added is None else x + added
        if self.guidance is not None:
            x = x + self.guidance(given)
        if self.augmentation is not None and condition.augmentation is not None:
            x = x + condition.augmentation @ self.augmentation
        return jax.nn.silu(self.out(jax.nn.silu(self.hidden(x))))

    def _embedded(self, value: Time) -> Float[Array, " features"]:
        """The sines of a time, then its cosines."""
        size = self.out.weight.shape[0] // 2
        return jnp.roll(sinusoidal_embedding(value, size, endpoint=True), size // 2)

    def _check(self, condition: UNetCondition) -> None:
        numbers = 0 if self.augmentation is None else len(self.augmentation)
        if condition.augmentation is not None and jnp.shape(condition.augmentation) != (numbers,):
            raise ValueError(f"augmentation must have shape ({numbers},), got {jnp.shape(condition.augmentation)}")
