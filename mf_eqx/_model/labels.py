"""Labels that a network has, and others."""

import jax
import numpy as np

from .._custom_types import Condition
from .._field import AbstractField
from .._validate import on_host_if_known
from ..nn import LabelEmbedding
from .dit import DiT
from .guidance import GuidanceCondition
from .in_context_dit import InContextDiT
from .mlp import MLP
from .unet import UNet, UNetCondition
from .x_prediction import XPrediction


def number_of_labels(field: AbstractField) -> int | None:
    """The number of labels of a network of this package, which is also its null label; None for one without labels, and
    for other fields."""
    field = field.field if isinstance(field, XPrediction) else field
    embedding = getattr(getattr(field, "embedding", None), "label", None)
    if not isinstance(field, MLP | DiT | InContextDiT | UNet) or not isinstance(embedding, LabelEmbedding):
        return None
    return embedding.null_label


def check_labels_fit(name: str, condition: Condition, field: AbstractField) -> None:
    """Raises a `ValueError` if `condition`, which is called `name`, has labels that a network of this package lacks, of
    one row or of several: under `jax.vmap` they would give NaN. Other fields, other conditions and values that JAX
    traces pass."""
    if (most := number_of_labels(field)) is None:
        return
    if isinstance(condition, GuidanceCondition):
        condition = condition.condition
    labels = condition.label if isinstance(condition, UNetCondition) else condition
    known = on_host_if_known(labels) if isinstance(labels, jax.Array | np.ndarray | np.generic | int) else None
    if known is not None and (wrong := (known < 0) | (known > most)).any():
        raise ValueError(f"{name} must lie in [0, {most}] for a network with {most} labels, got {known[wrong].flat[0]}")
