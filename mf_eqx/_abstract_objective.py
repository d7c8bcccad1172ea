"""What any loss over a batch is to a `TrainStep`: an `Objective`, one of whole batches, or one of a user's own."""

import abc
from typing import Any, ClassVar

import equinox as eqx
from jaxtyping import Array, Key, PyTree

from ._batch import Batch
from ._custom_types import Scalar
from ._field import AbstractField
from ._mean import Metrics
from ._row import Context
from ._validate import described, is_pair


class AbstractObjective(eqx.Module):
    """A loss over a batch, and what a `TrainStep` must know to differentiate it."""

    learns: ClassVar[type[eqx.Module]] = AbstractField
    """The kind of network that is trained; another one, such as `mf_eqx.vae.Autoencoder`, takes the field's place in
    states and steps, if `init_state` is given the objective."""

    @property
    @abc.abstractmethod
    def divisor(self) -> int | None:
        """The number of rows of which a batch, and each part of it for a device or a micro-batch, must be a multiple:
        the loss is then the mean over such parts. None if the loss is not such a mean: it is then differentiated on the
        whole batch at once."""

    @property
    @abc.abstractmethod
    def needs_teacher(self) -> bool:
        """Whether the objective evaluates `Context.teacher`."""

    @abc.abstractmethod
    def parts(self, batch: Batch) -> list[tuple["AbstractObjective", Batch]]:
        """The rows of each kind, with an objective for these rows alone. The loss is the mean over all rows, so the
        parts may be differentiated one after the other, with the intermediate results of only one in memory.

        **Raises:** `ValueError` if the batch does not meet the requirements of the objective.
        """

    @abc.abstractmethod
    def init(self) -> PyTree[Array]:
        """The objective's own state before the first step, such as running moments; None if it has none. It is part of
        the training state, as `TrainState.objective`. Only an objective whose `divisor` is None may have one."""

    @abc.abstractmethod
    def evaluate(
        self, field: Any, batch: Batch, state: Any, *, key: Key[Array, ""], context: Context | None = None
    ) -> tuple[Scalar, tuple[Metrics, Any]]:
        """The loss, and as auxiliary output the metrics and the objective's state after the step.

        **Arguments:** `field`, of the kind that the objective `learns`; `batch`; `state` from `init` or the step
        before; `key` of the step; `context`.
        """


class AbstractMeanObjective(AbstractObjective):
    """A loss that is a mean over all rows, for batches of any size, without a state of its own."""

    @abc.abstractmethod
    def __call__(
        self, field: Any, batch: Batch, *, key: Key[Array, ""], context: Context | None = None
    ) -> tuple[Scalar, Metrics]:
        """The pair `(loss, metrics)`."""

    @property
    def divisor(self) -> int:
        return 1

    @property
    def needs_teacher(self) -> bool:
        return False

    def parts(self, batch: Batch) -> list[tuple[AbstractObjective, Batch]]:
        return [(self, batch)]

    def init(self) -> None:
        return None

    def evaluate(
        self, field: Any, batch: Batch, state: None, *, key: Key[Array, ""], context: Context | None = None
    ) -> tuple[Scalar, tuple[Metrics, None]]:
        result = self(field, batch, key=key, context=context)
        if not is_pair(result):
            raise ValueError(f"{type(self).__name__} must return a loss and metrics, got {described(result)}")
        return result[0], (result[1], None)
