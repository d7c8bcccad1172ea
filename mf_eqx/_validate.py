"""Checks of arguments that several parts of the package share. Values that JAX traces are not known, and so pass."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Bool, Integer, Shaped

Count: TypeAlias = int | np.integer
"""A number of things."""


def on_host_if_known(values: Any) -> Shaped[np.ndarray, "..."] | None:
    """`values` on the host, or None where JAX traces them."""
    try:
        return np.asarray(values)
    except jax.errors.TracerArrayConversionError:
        return None


def described(tree: Any) -> str:
    """What an error message says of a PyTree: a number whose value is known, otherwise the dtype and shape of each
    array, which are known of traced ones too."""
    named = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)]
    if not named:
        return f"{tree!r:.60}"
    text = ", ".join(f"{name} {_described_leaf(leaf)}".strip() for name, leaf in named)
    return text if len(text) <= 300 else f"{text[:300]}..."


def _described_leaf(leaf: Any) -> str:
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex):
        return type(leaf).__name__
    value = on_host_if_known(leaf) if np.shape(leaf) == () else None
    return (
        str(value) if value is not None else f"{getattr(leaf, 'dtype', type(leaf).__name__)} of shape {np.shape(leaf)}"
    )


def check_finite(name: str, values: Any) -> None:
    """Raises a `ValueError` unless all `values` are finite."""
    on_host = on_host_if_known(values)
    if on_host is not None and not (finite := _is_finite(name, on_host)).all():
        raise ValueError(f"{name} must be finite, got {np.sum(~finite)} values that are not")


def _is_finite(name: str, values: Shaped[np.ndarray, "..."]) -> Bool[np.ndarray | np.bool_, "..."]:
    try:
        return np.isfinite(values)
    except TypeError:
        raise ValueError(f"{name} must be a number, or an array of numbers, got {values.tolist()!r:.100}") from None


def is_pair(value: Any) -> bool:
    """Whether `value` is a tuple or a list of two."""
    return isinstance(value, tuple | list) and len(value) == 2


def with_checked_scalar(value: Any, name: str, *, differentiable: bool = False) -> Any:
    """`value`. **Raises:** `ValueError` unless it is one real number, and floating-point if it is `differentiable`."""
    is_scalar = isinstance(value, jax.Array | np.ndarray | np.generic | int | float) and np.shape(value) == ()
    wanted = (jnp.floating,) if differentiable else (jnp.floating, jnp.integer, jnp.bool_)
    if not is_scalar or not any(jnp.issubdtype(jnp.result_type(value), kind) for kind in wanted):
        kind = "real floating-point" if differentiable else "real"
        raise ValueError(f"{name} must be a {kind} scalar, got {described(value)}")
    return value


def check_positive(name: str, values: Any, *, or_zero: bool = False) -> None:
    """Raises a `ValueError` unless all `values` are > 0, or >= 0 with `or_zero`, and finite."""
    on_host = on_host_if_known(values)
    if on_host is not None and not np.all(_is_finite(name, on_host) & ((on_host > 0) | (or_zero & (on_host == 0)))):
        raise ValueError(f"{name} must be {'>= 0' if or_zero else '> 0'} and finite, got {on_host}")


def as_float(name: str) -> Callable[[Any], float]:
    """A function that makes a float of a number, to be the converter of a field of that name."""

    def convert(value: Any) -> float:
        """**Raises:** `ValueError` unless `value` is a number that is known while JAX traces."""
        if on_host_if_known(value) is None:
            raise ValueError(f"{name} must be known when the program is compiled, got {value}")
        try:
            if isinstance(value, str):
                raise TypeError
            return float(value)
        except (TypeError, ValueError):
            raise ValueError(f"{name} must be a number, got {value!r:.100}") from None

    return convert


def as_count(name: str, value: Count, minimum: int = 1) -> int:
    """`value` as an int. **Raises:** `ValueError` unless it is an integer, not a bool, and >= `minimum`."""
    if not _is_count(value, minimum):
        raise ValueError(f"{name} must be an integer >= {minimum}, got {value!r}")
    return int(value)


def as_labels(name: str, labels: Any) -> Integer[Array, "..."]:
    """`labels` as an array of JAX. **Raises:** `ValueError` unless they are integers which that array can hold."""
    held = jnp.asarray(labels)
    if held.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers, got {held.dtype}")
    if isinstance(labels, np.ndarray) and (changed := labels[labels.astype(held.dtype) != labels]).size:
        raise ValueError(f"{name} must be representable in {held.dtype}, got {changed[0]}")
    return held


def check_counts(**counts: Count | Sequence[Count]) -> None:
    """Raises a `ValueError` unless each of `counts`, one integer or several, is >= 1."""
    for name, count in counts.items():
        if not isinstance(count, Sequence):
            as_count(name, count)
        elif not all(_is_count(element) for element in count):
            raise ValueError(f"{name} must be of integers >= 1, got {count!r}")


def as_tuple(name: str, values: Any, example: tuple[Any, ...]) -> tuple[Any, ...]:
    """`values` as a tuple. **Raises:** `ValueError`, with an example, unless they are a tuple or a list."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"{name} must be a tuple or a list, such as {example}, got {values!r:.100}")
    return tuple(values)


def check_kind(name: str, value: Any, kind: type) -> None:
    """Raises a `ValueError` unless `value` is an instance of `kind`."""
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be an instance of {kind.__name__}, got {value!r:.100}")


def check_floating(name: str, dtype: DTypeLike) -> None:
    """Raises a `ValueError` unless `dtype` is that of floating-point numbers."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name} must be floating point, got {dtype}")


def check_key(key: Any) -> None:
    """Raises a `ValueError` if `key` is no key, such as a seed, or one of `rbg` or `unsafe_rbg`: what a row draws from
    these under `vmap` depends on the batch that it is in."""
    try:
        kind = jr.key_impl(key) if isinstance(key, jax.Array) else None
    except TypeError:
        kind = None
    if kind is None:
        raise ValueError(f"key must be a key of JAX, such as jax.random.key(0), got {key!r:.100}")
    if kind in ("rbg", "unsafe_rbg"):
        raise ValueError(
            "key must be of an implementation that draws the same for a row alone and in a batch, such as threefry2x32 "
            f"(`impl` of jax.random.key, or jax_default_prng_impl), got {kind}"
        )


def check_data_shape(shape: Sequence[Count]) -> None:
    """Raises a `ValueError` unless `shape` is that of an image or of a sequence, channels first."""
    if not isinstance(shape, Sequence) or len(shape) not in (2, 3):
        raise ValueError(f"data_shape must be (channels, height, width) or (channels, length), got {shape}")
    check_counts(data_shape=shape)


def check_z(z: Array | np.ndarray, data_shape: tuple[int, ...]) -> None:
    """Raises a `ValueError` unless `z` has the data_shape of the network that is given it."""
    if z.shape != data_shape:
        raise ValueError(f"z must have the data_shape {data_shape}, got {z.shape}")


def _is_count(value: Any, minimum: int = 1) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= minimum


def quotient(total: ArrayLike, count: ArrayLike) -> Array | np.ndarray:
    """total / count, NaN without a warning where both are 0; computed on the host unless JAX traces the values."""
    dividend, divisor = on_host_if_known(total), on_host_if_known(count)
    if dividend is None or divisor is None:
        return jnp.divide(total, count)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.divide(dividend, divisor))
