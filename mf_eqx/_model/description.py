"""Networks as values that JSON can hold, and back: how files of weights say what they are the weights of.

    description = describe(field)                     {"network": "DiT", "data_shape": [3, 32, 32], "labels": 10, ...}
    fresh = make_network(description, key=key)        the same structure, with new parameters

A description has all arguments that decide which function of its parameters a network is. How it computes that function
(dtype, attention, rematerialisation, unrolling) is chosen anew whenever one is made. The description of an
`XPrediction` is that of its network and its smallest time, as "x_prediction".
"""

import inspect
import json
from collections.abc import Mapping
from typing import Any, TypeAlias

import equinox as eqx
import jax.random as jr
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from .._leaves import leaves, listed, shapes
from ..nn import (
    AbstractAttention,
    AbstractConditionEmbedding,
    AbstractConditionTokens,
    duration,
    end_duration,
    end_start,
    end_start_duration,
    Remat,
)
from .dit import DiT, DiTSize
from .in_context_dit import InContextDiT
from .in_context_embedding import TokenCounts
from .in_context_size import InContextDiTSize
from .mlp import MLP
from .unet import UNet
from .unet_size import UNetSize
from .x_prediction import XPrediction

Network: TypeAlias = MLP | DiT | InContextDiT | UNet | XPrediction

_NETWORKS = {network.__name__: network for network in (MLP, DiT, InContextDiT, UNet)}
_SIZES = {
    "DiT": {"size": DiTSize},
    "InContextDiT": {"size": InContextDiTSize, "tokens": TokenCounts},
    "UNet": {"size": UNetSize},
}
"""Arguments that are named tuples."""
_TIME_VARIABLES = {
    variables.__name__: variables for variables in (end_duration, end_start, end_start_duration, duration)
}
_NOT_DESCRIBED = {"dtype", "attention", "remat", "unroll", "fourier_scale", "key"}
"""Arguments of networks that say how they compute, or with which parameters they start."""
_X_PREDICTION = "x_prediction"


def describe(field: eqx.Module) -> dict[str, Any]:
    """The description of an `MLP`, a `DiT`, an `InContextDiT` or a `UNet`, or of the `XPrediction` of one, as values
    that JSON can hold: the name of the class as "network", and its `arguments`. The parameters are no part of it.

    **Raises:** `ValueError` for another field, and for a network with parts that have no description: a condition
    embedding or time variables of your own, or arrays that its arguments do not explain.
    """
    if type(field) is XPrediction:
        return {**describe(field.field), _X_PREDICTION: field.smallest_time}
    if not isinstance(field, MLP | DiT | InContextDiT | UNet):
        rule = "an MLP, a DiT, an InContextDiT or a UNet to be described"
        raise ValueError(f"field must be {rule}, got {type(field).__name__}")
    try:
        arguments = field.arguments
    except AttributeError as error:  # parts were replaced by others
        raise ValueError(f"field must be made by {type(field).__name__} to be described, but {error}") from error
    if isinstance(condition := arguments["condition"], AbstractConditionEmbedding | AbstractConditionTokens):
        rule = "a vector or None for a network to be described"
        raise ValueError(f"condition must be {rule}, got the embedding {type(condition).__name__}")
    if (variables := arguments["time_variables"]) not in _TIME_VARIABLES.values():
        rule = f"among {', '.join(_TIME_VARIABLES)} for a network to be described"
        raise ValueError(f"time_variables must be {rule}, got {getattr(variables, '__name__', variables)}")
    name = type(field).__name__
    sizes = {argument: arguments[argument]._asdict() for argument in _SIZES.get(name, ())}
    about = {"network": name, **arguments, "time_variables": variables.__name__, **sizes}
    description = json.loads(json.dumps(about, default=int))  # sizes may be integers of NumPy
    made = eqx.filter_eval_shape(lambda: make_network(description, key=jr.key(0)))
    found, wanted = shapes(leaves(field)), shapes(leaves(made))
    if different := [name for name in found | wanted if found.get(name) != wanted.get(name)]:
        raise ValueError(
            f"field must have the arrays of its arguments to be described, got others: {listed(different)}"
        )
    return description


def make_network(
    description: Mapping[str, Any],
    *,
    dtype: DTypeLike | None = None,
    attention: AbstractAttention | None = None,
    remat: Remat | None = None,
    unroll: int | bool | None = None,
    key: Key[Array, ""],
) -> Network:
    """A fresh network of a description, which may come from a file of others.

    **Arguments:** `description` by `describe`; arguments that it lacks have their defaults; `dtype`, `attention`,
    `remat`, `unroll` how the network computes, None for its own default (an `MLP` has only `dtype`); `key`.

    **Raises:** `ValueError` if the description is not that of a network.
    """
    given = dict(description)
    if _X_PREDICTION in given:
        smallest = given.pop(_X_PREDICTION)
        if isinstance(smallest, bool) or not isinstance(smallest, int | float):
            raise ValueError(f"{_X_PREDICTION} must be a number, got {smallest!r:.60}")
        how = {"dtype": dtype, "attention": attention, "remat": remat, "unroll": unroll}
        return XPrediction(make_network(given, **how, key=key), smallest)
    name = given.pop("network", None)
    if not isinstance(name, str) or name not in _NETWORKS:
        raise ValueError(f"network must be one of {', '.join(_NETWORKS)}, got {name!r:.60}")
    network = _NETWORKS[name]
    parameters = inspect.signature(network).parameters.keys()
    if unknown := given.keys() - (parameters - _NOT_DESCRIBED):
        raise ValueError(f"description of a {name} has unknown arguments: {listed(sorted(unknown))}")
    how = {"dtype": dtype, "attention": attention, "remat": remat, "unroll": unroll}
    how = {option: value for option, value in how.items() if value is not None}
    if unknown := how.keys() - parameters:
        raise ValueError(f"{listed(sorted(unknown))} must be None for {name}, which has no such choice")
    try:
        return network(**_decoded(name, given), **how, key=key)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"description must be that of a {name}, but none can be made: {error}") from error


def _decoded(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as the network takes them."""
    decoded = dict(arguments)
    if "data_shape" in decoded:
        decoded["data_shape"] = tuple(decoded["data_shape"])
    if "time_variables" in decoded:
        decoded["time_variables"] = _TIME_VARIABLES[decoded["time_variables"]]
    for argument, kind in _SIZES.get(name, {}).items():
        if argument in decoded or argument == "size":
            parts: dict[str, Any] = {
                part: tuple(value) if isinstance(value, list) else value for part, value in decoded[argument].items()
            }
            decoded[argument] = kind(**parts)
    return decoded
