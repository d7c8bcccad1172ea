r"""What a training step costs in units of Flow Matching's.

XLA counts the body of a loop once. So a network whose blocks run in a loop seems cheap, and so do further passes
through it. Here operations are counted in the program as JAX traces it, each loop as often as it runs. For a DiT-B/4
and the default objective, a quarter of whose rows have r < t,

    field = eqx.filter_eval_shape(lambda key: mfx.DiT((4, 32, 32), mfx.DIT_B4, key=key), jr.key(0))
    measure.relative_cost(mfx.Objective(), field, mfx.Batch(jnp.zeros((16, 4, 32, 32))))

is 1.085: Flow Matching costs three forward passes, MeanFlow a tangent pass T of a quarter of the rows more, 1 + T / 12.
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr

from .._abstract_objective import AbstractObjective
from .._batch import Batch
from .._field import AbstractField, stopped
from .._objective import Objective
from .._row import Context
from ._program import product_flops


def relative_cost(objective: AbstractObjective, field: AbstractField, batch: Batch) -> float:
    """The operations of matrix products and convolutions in loss and gradient of an objective, in units of those of
    Flow Matching with the same network and batch. What is the same in both is left out: optimiser, averages.

    Nothing is computed, only traced: seconds for the largest networks. A scanned network costs what it costs unrolled.
    An evaluation that is written twice counts twice, although XLA may merge the two.

    **Arguments:** `objective`, that of a `TrainStep` for example; `field` the network, arrays or their shapes; `batch`
    likewise, as the objective gets it, after `TrainStep.prepare`.

    **Returns:** the ratio. Where a branch is chosen at run time (a schedule of `AlphaFlow`), the most expensive one
    counts.

    **Raises:** `ValueError` if the batch does not meet the requirements of the objective, if the network has no matrix
    products, or for a loop without a fixed number of iterations.
    """
    if (base := _gradient_flops(Objective(identity=None, identity_share=0), field, batch)) == 0:
        raise ValueError(f"field must have matrix products or convolutions, got {type(field).__name__} without any")
    return _gradient_flops(objective, field, batch) / base


def _gradient_flops(objective: AbstractObjective, field: AbstractField, batch: Batch) -> int:
    """Operations of the products in loss and gradient."""

    def gradient(field: AbstractField, batch: Batch) -> Any:
        context = Context(jnp.zeros((), jnp.int32), stopped(field))

        def loss(field: AbstractField) -> Any:
            return objective.evaluate(field, batch, objective.init(), key=jr.key(0), context=context)[0]

        return eqx.filter_grad(loss)(field)

    return product_flops(gradient, field, batch)
