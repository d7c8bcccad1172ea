"""Label dropout: rows that lose their condition, and null conditions, which mean "none"."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, PyTree

from ._custom_types import Condition
from ._leaves import by_name
from ._validate import as_float, described


class LabelDropout(eqx.Module):
    """Replacement of the condition by "no label", which trains the unconditional velocity that guidance needs.

    Dropped rows regress on plain v (the authors' ImageNet code).

    **Arguments:**

    - `rate`: share of all rows of the batch, 0.1 in the paper.
    - `null`: the condition that means "none": for a field with labels `field.null_label`, otherwise a PyTree with the
      structure of one example's condition, such as a vector of zeros. In a dropped row all arrays of the condition are
      replaced together. Each is broadcast to the shape of the condition's, so that a number is enough, and cast to its
      dtype; an `Objective` refuses other shapes, and a value that the cast would change, such as 300 for uint8 labels.
      Where null may occur in the data, add a flag to the condition: `{"x": x, "given": True}` and `{"x": 0.0, "given":
      False}`.
    - `boundary_only`: whether only r = t rows are dropped, with probability `rate` / (1 - identity share), so that the
      null condition is never trained at r < t. True agrees in expectation with the authors' ImageNet code, which drops
      a prefix of Binomial(B, 0.1) rows, all of them r = t rows. With False any row may be dropped, as in the paper's
      text. With an identity share of 1 any row may be dropped in either case.

    **Raises:** `ValueError` unless 0 <= rate <= 1, or if `null` contains a NumPy integer that does not fit into the
    dtype to which JAX converts it.
    """

    rate: float = eqx.field(converter=as_float("rate"))
    null: Condition
    boundary_only: bool = True

    def __check_init__(self):
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate must lie in [0, 1], got {self.rate}")
        check_null(self.null)

    def null_like(self, condition: Condition) -> Condition:
        """The null condition as arrays of the shapes and dtypes of one row's condition."""
        return jax.tree.map(lambda null, c: jnp.broadcast_to(jnp.asarray(null, c.dtype), c.shape), self.null, condition)

    def check(self, condition: PyTree[ArrayLike]) -> None:
        """Raises a `ValueError` unless the null condition can stand for rows of this condition of a batch."""
        given, null = (jax.tree.structure(tree) for tree in (condition, self.null))
        if given != null:
            raise ValueError(f"condition must have the structure of label_dropout.null, {null}; got {given}")
        nulls = by_name("", self.null)
        for name, leaf in by_name("", condition).items():
            _check_fit(name, nulls[name], leaf)
        if not jax.tree.leaves(condition):
            raise ValueError(f"condition must be given with label_dropout, got {described(condition)}")


def null_shaped_as(null: Condition, condition: Condition) -> Condition:
    """The null condition with the shapes of the condition, if it has the same structure."""
    if jax.tree.structure(null) != jax.tree.structure(condition):  # a field may accept several structures
        return null
    conditions = by_name("", condition)
    for name, leaf in by_name("", null).items():
        _check_shape(f"null{name}", leaf, np.shape(conditions[name]))

    def broadcast(null: Any, c: Any) -> Any:
        return null if np.shape(null) == np.shape(c) else jnp.broadcast_to(null, np.shape(c))

    return jax.tree.map(broadcast, null, condition)


def _check_shape(name: str, null: ArrayLike, shape: tuple[int, ...]) -> None:
    """Raises a `ValueError` unless `null`, which is called `name`, can be broadcast to the shape of one condition."""
    found = np.shape(null)
    if len(found) > len(shape) or any(a not in (1, b) for a, b in zip(found[::-1], shape[::-1], strict=False)):
        raise ValueError(f"{name} must be a number or of shape {shape} as the condition is, got shape {found}")


def check_null(null: Condition) -> None:
    """Refuses NumPy numbers whose value changes when JAX converts them: 2^32 becomes 0 in int32."""
    for leaf in jax.tree.leaves(null):
        if isinstance(leaf, np.ndarray | np.generic):
            dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
            if (changed := _first_changed_by_cast(leaf, dtype)) is not None:
                raise ValueError(f"null must be representable in {dtype}, to which JAX converts it, got {changed}")


def _first_changed_by_cast(value: ArrayLike | np.generic, dtype: np.dtype) -> Any:
    """The first number in `value` that a cast to `dtype` would change, or None if there is none: an integer out of
    range, a real number that would become infinite, or any complex number. Rounding does not count."""
    value = np.asarray(value)
    if np.iscomplexobj(value):
        changed = np.full(value.shape, True)
    elif jnp.issubdtype(dtype, jnp.floating):
        wide = value.astype(np.float64)
        with np.errstate(over="ignore"):
            changed = np.isfinite(wide) & ~np.isfinite(wide.astype(dtype))
    else:
        low, high = (0, 1) if jnp.issubdtype(dtype, jnp.bool_) else (jnp.iinfo(dtype).min, jnp.iinfo(dtype).max)
        changed = np.asarray((value < low) | (value > high), bool)
    return value[changed][0] if changed.any() else None


def _check_fit(name: str, null: ArrayLike, condition: ArrayLike) -> None:
    """Refuses a null condition that does not broadcast to one row of the condition, or that a cast to its dtype would
    change.

    **Arguments:** `name` of the leaf within its PyTree; `null` that leaf of the null condition; `condition` of a batch.
    """
    rule = f"label_dropout.null{name} must be"
    _check_shape(f"label_dropout.null{name}", null, np.shape(condition)[1:])
    dtype, null_dtype = jnp.result_type(condition), getattr(null, "dtype", None) or np.asarray(null).dtype
    is_float, null_is_float = (jnp.issubdtype(kind, jnp.floating) for kind in (dtype, null_dtype))
    if null_is_float and not is_float:
        raise ValueError(f"{rule} an integer like the condition, got {described(null)}")
    try:
        changed = _first_changed_by_cast(null, dtype)
    except jax.errors.TracerArrayConversionError:  # `null` is traced: only its dtype is known
        if not is_float and np.promote_types(null_dtype, dtype) != dtype:
            wanted = f"of the condition's dtype {dtype}, or a Python integer"
            raise ValueError(f"{rule} {wanted}, got an array of {null_dtype}") from None
        return
    if changed is not None:
        raise ValueError(f"{rule} representable in the condition's dtype {dtype}, got {changed}")
