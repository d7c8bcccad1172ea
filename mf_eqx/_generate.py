"""Many samples, batch after batch, on all devices.

    generator = Generator(field, jr.key(0), field.data_shape, labels=1000)
    for x in generator.batches(50_000, 256, Parallelism()):
        ...

Sample i depends only on the key and on i, not on the batch size, the devices or `jax_enable_x64`. Its noise is drawn in
float32, or in float64 for a field with parameters in float64: these draws differ.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Int, Key, PyTree, Real

from ._custom_types import as_floats, Condition
from ._drawn_guidance import WithGuidance
from ._field import AbstractField, check_field
from ._guidance import GuidedField
from ._leaves import by_name
from ._model import check_labels_fit, number_of_labels
from ._sample import as_grid, sample
from ._sharding import Parallelism
from ._validate import as_count, check_counts, check_key, Count, described, on_host_if_known


def _as_arrays(condition: PyTree[Any]) -> PyTree[Array]:
    """The same PyTree of arrays of JAX."""
    return jax.tree.map(jnp.asarray, condition)


def _as_number_of_labels(labels: Count | None) -> int | None:
    return None if labels is None else as_count("labels", labels)


class Generator(eqx.Module):
    """A generator of numbered samples.

    **Arguments:**

    - `field`: any field. Guided samples come from one trained with `Guidance`; from a `WithGuidance` of one trained
      with `DrawnGuidance`, at any scale and interval; or from a `GuidedField`.
    - `key`: one for all samples.
    - `data_shape`: of one sample.
    - `times`: the grid from noise to data, see `sample`.
    - `labels`: None for a field without labels, or their number K: sample i has a random label in [0, K).
    - `balanced`: sample i has the label i mod K instead.
    - `condition`: None, or the conditions of a field that has others than labels: a PyTree of arrays with a leading
      axis of n rows, of which sample i has row i mod n.
    - `method`: `sample`, along average velocities; `sample_euler`, `sample_heun`, along v = u(z, t, t);
      `sample_consistency`, for u(z, 0, t) alone; or another function with their arguments, such as
      `functools.partial(sample_consistency, new_noise=0.5)` or one of `sample_with_reward`. A method with an argument
      of the name `key` gets one of the sample's own.
    - `unroll`: whether to unroll the loop over the steps. True is much faster for convolutional networks on CPUs:
      inside a loop XLA does not use its fast kernels for convolutions, see `sample`.

    **Raises:** `ValueError` if `field`, `times`, `labels`, `balanced`, `condition` or `data_shape` is not valid, if
    both `labels` and `condition` are given, or if a network of this package, also in a `GuidedField` or a
    `WithGuidance`, lacks some of the labels.
    """

    field: AbstractField
    key: Key[Array, ""]
    data_shape: tuple[int, ...] = eqx.field(static=True)
    times: tuple[float, ...] = eqx.field(static=True, default=(1.0, 0.0), converter=as_grid)
    labels: int | None = eqx.field(static=True, default=None, converter=_as_number_of_labels)
    balanced: bool = eqx.field(static=True, default=False)
    method: Callable[..., Float[Array, "*data"]] = eqx.field(static=True, default=sample)
    unroll: bool = eqx.field(static=True, default=False)
    condition: PyTree[Array] = eqx.field(default=None, converter=_as_arrays)

    def __check_init__(self):
        check_field(self.field)
        check_key(self.key)
        check_counts(data_shape=self.data_shape)
        if not callable(self.method):
            raise ValueError(f"method must be a function such as mfx.sample, got {self.method!r:.80}")
        for name in ("times", "unroll", "key"):
            if isinstance(self.method, functools.partial) and name in self.method.keywords:
                raise ValueError(f"method must leave {name} to the generator, got {self.method!r:.80}")
        if self.balanced and self.labels is None:
            raise ValueError("labels must be given if balanced is True, got None")
        self._check_labels("labels", self.labels)
        self._check_labels("condition", self.condition)
        if self.condition is not None:
            if self.labels is not None:
                raise ValueError(f"labels must be None with a condition, got {self.labels}")
            _check_rows(self.condition, None)

    def _check_labels(self, name: str, condition: PyTree[Any]) -> None:
        """Refuses labels that the network lacks."""
        check_labels_fit(name, condition, self._network())

    def _network(self) -> AbstractField:
        return self.field.field if isinstance(self.field, GuidedField | WithGuidance) else self.field

    def __call__(self, numbers: Int[ArrayLike, " rows"] | Sequence[Any]) -> Float[Array, "rows *data"]:
        """The samples with these numbers, on the devices that hold the numbers.

        **Raises:** `ValueError` unless `numbers` is a list or an array of integers with one axis, and, where they are
        not on a device yet, in [0, 2^31).
        """
        return _from_numbers(self, _as_numbers(numbers))

    def inputs(self, number: Int[ArrayLike, ""]) -> tuple[Float[Array, "*data"], Condition]:
        """The noise and the condition of a sample."""
        number = _wide(jnp.asarray(number))
        eps_key, label_key = jr.split(jr.fold_in(self.key, number))
        eps = jr.normal(eps_key, self.data_shape, _dtype_of_noise(self.field))
        if self.labels is None:
            return eps, jax.tree.map(lambda leaf: leaf[number % len(leaf)], self.condition)
        return eps, number % self.labels if self.balanced else jr.randint(label_key, (), 0, self.labels, jnp.int32)

    def from_noise(
        self, eps: Real[ArrayLike, "rows *data"] | Sequence[Any], condition: PyTree[Any] = None
    ) -> Float[Array, "rows *data"]:
        """Samples from given noise and conditions.

        **Arguments:** `eps` noise, one row for each sample; `condition` None, or a PyTree of arrays with the same
        leading axis. For a generator with `labels` K, integer labels in [0, K], where K means "no label",
        also for a network of this package that has more labels. New noise of
        row i, where `method` draws some, is that of sample i.

        **Raises:** `ValueError` if the condition is missing though the generator has `labels` or a `condition`, if it
        has another number of rows, or, where values are known, if a label lies outside of [0, K].
        """
        eps = as_floats("eps", eps)
        numbers = jnp.arange(len(eps))
        if condition is None and (self.labels is not None or self.condition is not None):
            raise ValueError("condition must be given for a generator with labels or a condition, got None")
        if self.labels is not None:
            labels = _as_labels(condition, len(eps), self.labels)
            null = number_of_labels(self._network())
            labels = labels if null is None else jnp.where(labels == self.labels, null, labels)
            return _generated(self, eps, labels, numbers)
        condition = _as_arrays(condition)
        _check_rows(condition, len(eps))
        self._check_labels("condition", condition)
        return _generated(self, eps, condition, numbers)

    def batches(self, count: int, batch: int, devices: Parallelism) -> Iterator[Float[Array, "batch *data"]]:
        """Samples 0, 1, ... in batches of equal size, whose rows are spread over all devices. The last batch may have
        samples beyond `count`.

        All processes must call it together; each gets the rows of its own devices.

        **Arguments:** `count` number of samples; `batch` number of rows of a batch, a multiple of the number of
        devices; `devices`.

        **Raises:** `ValueError` unless count >= 0, batch >= 1, and batch is a multiple of the number of devices.
        """
        count, batch = as_count("count", count, 0), as_count("batch", batch)
        local_rows = devices.positions(batch).astype(np.int32)
        replicated = devices.replicate(self)
        return (replicated(devices.place(start + local_rows, batch)) for start in range(0, count, batch))


@eqx.filter_jit
def _from_numbers(generator: Generator, numbers: Int[Array, " rows"]) -> Float[Array, "rows *data"]:
    return _generated(generator, *jax.vmap(generator.inputs)(numbers), numbers)


@eqx.filter_jit
def _generated(
    generator: Generator, eps: Real[Array, "rows *data"], condition: PyTree[Array], numbers: Int[Array, " rows"]
) -> Float[Array, "rows *data"]:
    options: dict[str, Any] = {"times": generator.times, "unroll": generator.unroll}
    draws = "key" in inspect.signature(generator.method).parameters

    def generate(eps: Real[Array, "*data"], condition: Condition, number: Int[Array, ""]) -> Float[Array, "*data"]:
        # The third key of a sample: the first two are for its noise and its label.
        more = {"key": jr.split(jr.fold_in(generator.key, number), 3)[2]} if draws else {}
        return generator.method(generator.field, eps, condition, **options, **more)

    return jax.vmap(generate)(eps, condition, numbers)


def _dtype_of_noise(field: AbstractField) -> DTypeLike:
    """Float32, or float64 for a field with parameters in float64."""
    dtypes = (leaf.dtype for leaf in jax.tree.leaves(field) if eqx.is_inexact_array(leaf))
    return jnp.float64 if jnp.float64 in dtypes else jnp.float32


def _as_numbers(numbers: Any) -> Int[Array, " rows"]:
    """Numbers of samples as an array of JAX."""
    given = None if isinstance(numbers, jax.Array) else on_host_if_known(numbers)
    given = jnp.asarray(numbers) if given is None else given
    if given.ndim != 1 or not (jnp.issubdtype(given.dtype, jnp.integer) or given.size == 0):
        raise ValueError(f"numbers must be integers with one axis, got {given.dtype} of shape {given.shape}")
    if isinstance(given, np.ndarray) and given.size > 0 and not 0 <= given.min() <= given.max() < 2**31:
        raise ValueError(f"numbers must be in [0, 2^31), got {given.min()} to {given.max()}")
    return _wide(given) if isinstance(given, jax.Array) else jnp.asarray(given, jnp.int32)


def _wide(numbers: Int[Array, "..."]) -> Int[Array, "..."]:
    """Numbers of at least 32 bits: a remainder by 300 would be one by 44 in 8 bits."""
    return numbers.astype(jnp.int32) if numbers.dtype.itemsize < 4 else numbers


def _check_rows(condition: PyTree[Array], rows: int | None) -> None:
    """Refuses arrays without a leading axis of `rows` rows, or for None of any equal number of rows."""
    for name, leaf in by_name("condition", condition).items():
        rows = leaf.shape[0] if rows is None and leaf.ndim and leaf.shape[0] else rows
        if leaf.shape[:1] != (rows,):
            wanted = "at least one row" if rows is None else f"{rows} rows"
            raise ValueError(f"{name} must have a leading axis of {wanted}, got shape {leaf.shape}")


def _as_labels(labels: Any, rows: int, count: int) -> Int[Array, " rows"]:
    """Labels as an array, of which those outside of [0, count] are refused: the table of a network would return
    NaN for them."""
    labels = jnp.asarray(labels) if isinstance(labels, Sequence) else labels
    if not isinstance(labels, jax.Array | np.ndarray) or labels.shape != (rows,) or labels.dtype.kind not in "iu":
        raise ValueError(f"condition must be one integer label for each of {rows} samples, got {described(labels)}")
    known = on_host_if_known(labels)
    if known is not None and (wrong := (known < 0) | (known > count)).any():
        rule = f"labels in [0, {count}], where {count} means no label"
        raise ValueError(f"condition must be {rule}, got {known[wrong][0]}")
    return jnp.asarray(labels, jnp.int32)
