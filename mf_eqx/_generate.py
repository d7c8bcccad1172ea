"""Many samples, batch after batch, on all devices.

    generator = Generator(field, jr.key(0), field.data_shape, labels=1000)
    for x in generator.batches(50_000, 256, Parallelism()):
        ...

Sample i depends only on the key and on i, not on the batch size or the devices.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, Key, Real

from ._custom_types import Label
from ._field import AbstractField
from ._sample import check_times, sample, Times
from ._sharding import Parallelism
from ._validate import check_sizes


def _as_times(times: Times) -> tuple[float, ...]:
    return tuple(map(float, times))


class Generator(eqx.Module):
    """A generator of numbered samples.

    **Arguments:**

    - `field`: any field; one trained with guidance, or a `GuidedField`, makes guided samples.
    - `key`: one for all samples.
    - `data_shape`: of one sample.
    - `times`: the grid from noise to data, see `sample`.
    - `labels`: None for a field without labels, or their number K: sample i has a random label in [0, K).
    - `balanced`: sample i has the label i mod K instead.
    - `method`: `sample`, along average velocities; or `sample_euler`, `sample_heun`, along v = u(z, t, t).
    - `unroll`: whether to unroll the loop over the steps, see `sample`.

    **Raises:** `ValueError` if `times`, `labels`, `balanced` or `data_shape` is not valid.
    """

    field: AbstractField
    key: Key[Array, ""]
    data_shape: tuple[int, ...] = eqx.field(static=True)
    times: tuple[float, ...] = eqx.field(static=True, default=(1.0, 0.0), converter=_as_times)
    labels: int | None = eqx.field(static=True, default=None)
    balanced: bool = eqx.field(static=True, default=False)
    method: Callable[..., Float[Array, "*data"]] = eqx.field(static=True, default=sample)
    unroll: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        check_times(self.times)
        check_sizes(data_shape=self.data_shape)
        if self.labels is not None and not (isinstance(self.labels, int) and self.labels >= 1):
            raise ValueError(f"labels must be an integer >= 1 or None, got {self.labels}")
        if self.balanced and self.labels is None:
            raise ValueError("labels must be given if balanced is True, got None")

    def __call__(self, numbers: Int[ArrayLike, " rows"] | Sequence[int]) -> Float[Array, "rows *data"]:
        """The samples with these numbers, on the devices that hold the numbers."""
        return _from_numbers(self, jnp.asarray(numbers))

    def inputs(self, number: Int[ArrayLike, ""]) -> tuple[Float[Array, "*data"], Int[Array, ""] | None]:
        """The noise and the label of a sample."""
        number = jnp.asarray(number)
        eps_key, label_key = jr.split(jr.fold_in(self.key, number))
        eps = jr.normal(eps_key, self.data_shape)
        if self.labels is None:
            return eps, None
        return eps, number % self.labels if self.balanced else jr.randint(label_key, (), 0, self.labels)

    def from_noise(
        self,
        eps: Real[ArrayLike, "rows *data"] | Sequence[Any],
        label: Int[ArrayLike, " rows"] | Sequence[int] | None = None,
    ) -> Float[Array, "rows *data"]:
        """Samples from given noise and labels.

        **Raises:** `ValueError` unless `label` is given if and only if the generator has labels.
        """
        if (label is None) != (self.labels is None):
            raise ValueError(f"label must be given if and only if labels is, got {label} with labels {self.labels}")
        return _from_noise(self, jnp.asarray(eps), None if label is None else jnp.asarray(label))

    def batches(self, count: int, batch: int, devices: Parallelism) -> Iterator[Float[Array, "batch *data"]]:
        """Samples 0, 1, ... in batches of equal size, whose rows are spread over all devices. The last batch may have
        samples beyond `count`.

        All processes must call it together; each gets the rows of its own devices.

        **Arguments:** `count` number of samples; `batch` number of rows of a batch, a multiple of the number of
        devices; `devices`.

        **Raises:** `ValueError` unless count >= 0, batch >= 1, and batch is a multiple of the number of devices.
        """
        if count < 0:
            raise ValueError(f"count must be >= 0, got {count}")
        if batch < 1:
            raise ValueError(f"batch must be >= 1, got {batch}")
        local_rows = devices.positions(batch).astype(np.int32)
        replicated = devices.replicate(self)
        return (replicated(devices.place(start + local_rows, batch)) for start in range(0, count, batch))


@eqx.filter_jit
def _from_numbers(generator: Generator, numbers: Int[Array, " rows"]) -> Float[Array, "rows *data"]:
    return generator.from_noise(*jax.vmap(generator.inputs)(numbers))


@eqx.filter_jit
def _from_noise(
    generator: Generator, eps: Real[Array, "rows *data"], label: Int[Array, " rows"] | None
) -> Float[Array, "rows *data"]:
    def generate(eps: Real[Array, "*data"], label: Label | None) -> Float[Array, "*data"]:
        return generator.method(generator.field, eps, label, times=generator.times, unroll=generator.unroll)

    return jax.vmap(generate)(eps, label)
