"""A whole sampler as one file, for users who only sample.

    export_sampler("sampler.jaxexport", field, (3, 32, 32), condition=0, times=(1.0, 0.0))

Requires the extra `export`.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from .._custom_types import Condition
from .._field import AbstractField
from .._files import write_whole
from .._optional import optional
from .._sample import sample
from .._validate import as_tuple


def export_sampler(
    path: str | Path,
    field: AbstractField,
    data_shape: tuple[int, ...],
    condition: Condition = None,
    *,
    times: Sequence[float] = (1.0, 0.0),
    postprocess: Callable[[Float[Array, "*data"]], PyTree[Array]] | None = None,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
) -> None:
    """Write `sample` together with the weights as one program for several platforms, by `jax.export`.

        generate = jax.jit(jax.export.deserialize(pathlib.Path("sampler.jaxexport").read_bytes()).call)
        x = generate(eps, label)                          (rows, *data_shape) from noise of the same shape

    requires nothing but JAX. Without `jax.jit` each call takes 0.2 ms longer (on a CPU: 0.3 instead of 0.1 ms for a
    network of negligible cost). The number of rows is arbitrary, but the first call with a new one compiles the
    program. In place of the label stands any condition, such as vectors or a dictionary of arrays, all with a leading
    axis of rows. The weights are part of the program: a few hundred MB are no problem, but the format's limit of 2 GB
    is close to the size of the largest networks. Unlike the other files of this part, it has no checksum, because JAX
    itself reads it: if you distribute the file, distribute its SHA-256 as well. Names and line numbers of source files
    are left out, so that one version of JAX always writes the same bytes for the same field.

    **Arguments:** `path` of the file; `field`; `data_shape` of one row; `condition` of one row, of which only the
    structure, shapes and dtypes are used, or None (a named tuple, or another class of nodes, must be registered for
    `jax.export` first: its error says how); `times` as for `sample`; `postprocess` None, or what the program returns of
    each sample: `mf_eqx.metrics.round_to_pixels` for uint8 pixels, the decoder of a tokenizer, or a function of your
    own that undoes the normalisation of the data; `platforms` on which the program can run.

    **Raises:** `ValueError` for a field that cannot be sampled, see `sample`, or if `data_shape` or `platforms` is no
    tuple or list.
    """
    with optional("flatbuffers"):
        import flatbuffers  # noqa: F401 # pyright: ignore[reportMissingImports] # jax.export uses it for writing

    def draw(eps: Any, *condition: Any) -> Any:
        x = sample(field, eps, *condition, times=tuple(times))
        return x if postprocess is None else postprocess(x)

    data_shape = as_tuple("data_shape", data_shape, (3, 32, 32))
    platforms = as_tuple("platforms", platforms, ("cpu", "cuda"))
    (rows,) = jax.export.symbolic_shape("rows")
    conditions = () if condition is None else (condition,)
    arguments = [jax.ShapeDtypeStruct((rows, *data_shape), jnp.float32)]
    arguments += jax.tree.map(lambda c: jax.ShapeDtypeStruct((rows, *np.shape(c)), jnp.result_type(c)), conditions)
    with _without_source_lines():
        exported = jax.export.export(jax.jit(jax.vmap(draw)), platforms=list(platforms))(*arguments)
    if jax.process_index() == 0:
        write_whole(path, bytes(exported.serialize()))


@contextlib.contextmanager
def _without_source_lines() -> Iterator[None]:
    """A context in which JAX writes no tracebacks into its programs."""
    before = jax.config.jax_traceback_in_locations_limit  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", before)
