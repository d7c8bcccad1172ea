r"""Fine-tuning towards a reward, from samples of the field itself and without a derivative of the reward.

An average of the trained field, the old one, makes samples x, whose rewards say which to imitate and which to avoid:

$$A_i = \frac{R_i - \text{mean}}{\text{standard deviation}}, \qquad
\rho_i = \tfrac12 + \tfrac12\, \mathrm{clip}(A_i / A_{\max}, -1, 1).$$

Each sample gets new noise, z = (1 - t) x + t eps with v = eps - x, and the velocities that the MeanFlow identity makes
of the trained and of the old average velocity, with the derivative of the old one in both,

$$V = u_\theta(z, r, t) + (t - r)\, \mathrm{sg}\, \frac{d u_{old}}{dt}, \qquad V_{old} = u_{old}(z, r, t) + (t - r)
\frac{d u_{old}}{dt},$$

are moved apart: $V_{old} + \beta (V - V_{old})$ towards v of good samples, $V_{old} - \beta (V - V_{old})$ towards v of
bad ones. At r = t, without the weights of `RewardObjective` and without a reference, the minimum is known for an exact
old field,

$$V = V_{old} + \tfrac{2}{\beta}\, \mathrm{E}[\rho | z]\, (V_{+} - V_{old}), \qquad
V_{+} = \mathrm{E}[\rho v | z] / \mathrm{E}[\rho | z],$$

where $V_{+}$ is the velocity of samples that are drawn again in proportion to $\rho$.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from .._abstract_objective import AbstractObjective
from .._batch import Batch, check_batch
from .._custom_types import at_least_float32, Condition, Scalar
from .._derivative import AbstractDerivative, FusedJVP
from .._field import AbstractField, stopped
from .._mean import Mean, mean_of, Metrics
from .._model.guidance import condition_at
from .._row import Context, teacher_of
from .._sample import as_grid, sample
from .._times import TimePairs, UniformTimes
from .._trained import Trained
from .._validate import as_count, as_float, check_positive, with_checked_scalar


class RewardObjective(AbstractObjective):
    r"""The loss of a field that is to be rewarded more (MeanFlowNFT; with r = t alone it is DiffusionNFT):

    $$L = \frac{A_{\max}}{\beta} \Big[\rho\, \frac{|t (V_{old} + \beta (V - V_{old}) - v)|^2}{w_+} + (1 - \rho)\,
    \frac{|t (V_{old} - \beta (V - V_{old}) - v)|^2}{w_-}\Big],$$

    with $w_\pm$ the mean absolute value of the entries of the same difference, and at least 1e-5. It needs the old
    field as teacher: `TrainStep(..., averages=[ExponentialAverage(0.9)], teacher=0)`. A batch gives the conditions of
    the samples, and their shape; its x is not used. The advantages A are of the whole batch, so it is differentiated at
    once, without accumulation. Start from a trained field, and watch samples: a reward says nothing about diversity,
    and they lose it. A `reference`, such as the field that training starts from, holds them back by a further term,
    $\kappa\, |u - u_{ref}|^2$ per number.

    **Arguments:**

    - `reward`: R, a function of a sample and its condition that returns a finite number; another makes the loss NaN. It
      need not be differentiable. Samples follow a reward without a bound as far as it leads.
    - `group`: how many rows in succession get the condition of the first of them, and are compared with their own mean,
      in units of the deviation of all rows; None to compare all rows. With conditions of different difficulty, groups
      keep that out of the advantages.
    - `strength`: $\beta$.
    - `largest_advantage`: $A_{\max}$.
    - `time_pairs`: of (r, t) at which the field is trained; a quarter has r = t and a quarter r = 0 by default.
    - `times`, `unroll`: of the samples that the old field makes, as for `sample`.
    - `derivative`: the engine that computes $du_{old}/dt$ along v.
    - `reference`, `anchor`: a frozen field, or None, and $\kappa$.
    - `adaptive`: whether the two terms are divided by $w_\pm$; False for the squares alone, whose minimum is known.

    **Metrics:** `loss`, which may rise while the reward does; `reward`, the mean over the samples of the old field;
    `change`, $|V - V_{old}|^2$ per number.

    **Raises:** `ValueError` unless `strength` and `largest_advantage` are > 0, `anchor` is > 0 with a `reference` and 0
    without, and `group` is None or a count >= 2; when called, without a teacher, for batches with `eps`, if `group`
    does not divide the rows, or unless a reward is one number.

    Source: MeanFlowNFT: Bringing Forward-Process RL to Average-Velocity Generators, Huang, Zhou, Zhang, Bo, Pang, 2026,
    arXiv 2607.15273, from the authors' code; DiffusionNFT, arXiv 2509.16117. There the old field follows the trained
    one more slowly from step to step (a decay that grows to 0.5), and du/dt is a central difference.
    """

    reward: Callable[[Float[Array, "*data"], Condition], Scalar]
    group: int | None = None
    strength: float = eqx.field(default=0.1, converter=as_float("strength"))
    largest_advantage: float = eqx.field(default=5.0, converter=as_float("largest_advantage"))
    time_pairs: TimePairs = TimePairs(UniformTimes(), equal=0.25, at_data=1 / 3)
    times: tuple[float, ...] = eqx.field(converter=as_grid, default=(1.0, 0.0))
    unroll: bool = False
    derivative: AbstractDerivative = FusedJVP()
    reference: AbstractField | None = None
    anchor: float = eqx.field(default=0.0, converter=as_float("anchor"))
    adaptive: bool = True

    def __check_init__(self):
        if not callable(self.reward):
            raise ValueError(f"reward must be a function of a sample and its condition, got {self.reward!r:.80}")
        check_positive("strength", self.strength)
        check_positive("largest_advantage", self.largest_advantage)
        check_positive("anchor", self.anchor, or_zero=True)
        if (self.reference is None) != (self.anchor == 0):
            given = "none" if self.reference is None else type(self.reference).__name__
            raise ValueError(f"anchor must be > 0 if and only if there is a reference, got {self.anchor} and {given}")
        if self.group is not None:
            as_count("group", self.group, 2)

    @property
    def divisor(self) -> None:
        return None

    @property
    def needs_teacher(self) -> bool:
        return True

    @property
    def trained(self) -> Trained:
        """Which values of a field it trains, for those who sample later."""
        pairs, average = self.time_pairs, self.time_pairs.equal < 1
        return Trained(
            average=average,
            null_velocity=False,
            null_average=False,
            velocity=pairs.equal > 0,
            ends_at_data=average and pairs.at_data == 1,
            one_step=average and pairs.at_noise == 1,
        )

    def parts(self, batch: Batch) -> list[tuple[AbstractObjective, Batch]]:
        return [(self, batch)]

    def init(self) -> None:
        return None

    def evaluate(
        self, field: AbstractField, batch: Batch, state: None, *, key: Key[Array, ""], context: Context | None = None
    ) -> tuple[Scalar, tuple[Metrics, None]]:
        old, batch = stopped(teacher_of(context, type(self).__name__)), self._with_shared_conditions(batch)

        def generated(example: Batch) -> tuple[Float[Array, "*data"], Scalar]:
            eps = _noise(example, jr.fold_in(key, example.index))
            x = sample(old, eps, example.condition, times=self.times, unroll=self.unroll)
            reward = with_checked_scalar(self.reward(x, example.condition), "the reward of a sample")
            return x, jnp.asarray(reward, jnp.promote_types(jnp.result_type(reward), x.dtype))

        x, rewards = jax.lax.stop_gradient(jax.vmap(generated)(batch))

        def loss_of_row(example: Batch, x: Float[Array, "*data"], rho: Scalar) -> tuple[Scalar, Scalar]:
            return self._loss_of_row(field, old, x, example, rho, jr.fold_in(jr.fold_in(key, example.index), 1))

        losses, changes = jax.vmap(loss_of_row)(batch, x, self._shares(rewards))
        loss = losses.mean()
        metrics = {"loss": Mean(loss, jnp.ones((), loss.dtype)), "reward": mean_of(rewards), "change": mean_of(changes)}
        return loss, (metrics, None)

    def _with_shared_conditions(self, batch: Batch) -> Batch:
        check_batch("batch", batch)
        if batch.eps is not None:
            raise ValueError("eps must be None for samples of the field itself, got some")
        rows, group = batch.index.shape[0], self.group
        if group is None:
            return batch
        if rows % group:
            raise ValueError(f"group must divide the {rows} rows of a batch, got {group}")
        shared = jax.tree.map(lambda leaf: jnp.repeat(leaf[::group], group, axis=0), batch.condition)
        return Batch(batch.x, shared, batch.index)

    def _shares(self, rewards: Float[Array, " rows"]) -> Float[Array, " rows"]:
        """The shares rho of rows that are to be imitated."""
        groups = rewards.reshape(-1, self.group or rewards.shape[0])
        groups = groups - groups[:, :1]  # equal rewards are then zeros, whatever a mean is rounded to
        above = (groups - groups.mean(1, keepdims=True)).ravel()
        deviation = jnp.maximum((rewards - rewards[0]).std(), jnp.finfo(rewards.dtype).tiny)
        return 0.5 + 0.5 * jnp.clip(above / deviation / self.largest_advantage, -1, 1)

    def _loss_of_row(
        self,
        field: AbstractField,
        old: AbstractField,
        x: Float[Array, "*data"],
        example: Batch,
        rho: Scalar,
        key: Key[Array, ""],
    ) -> tuple[Scalar, Scalar]:
        """The loss of one sample at one pair of times, and the square of the change there."""
        time_key, noise_key, field_key = jr.split(key, 3)
        r, t = (time.astype(x.dtype) for time in self.time_pairs(key=time_key))
        eps = jr.normal(noise_key, x.shape, x.dtype)
        z, v = (1 - t) * x + t * eps, eps - x
        condition = condition_at(example.condition, r, t)
        u_old, rate = self.derivative(old, z, r, t, condition, tangent=(v, 0.0, 1.0), key=None)
        u = field(z, r, t, condition, key=field_key)
        change = u - jax.lax.stop_gradient(u_old)
        error = jax.lax.stop_gradient(u_old + (t - r) * rate) - v

        def loss(sign: float) -> Scalar:
            difference = t * (error + sign * self.strength * change)
            size = jnp.maximum(jnp.abs(difference).mean(), 1e-5) if self.adaptive else 1.0
            return jnp.square(difference).mean() / jax.lax.stop_gradient(size)

        value = self.largest_advantage / self.strength * (rho * loss(1.0) + (1 - rho) * loss(-1.0))
        if self.reference is not None:
            u_reference = stopped(self.reference)(z, r, t, condition, key=None)
            value = value + self.anchor * jnp.square(u - u_reference).mean()
        return value, jnp.square(change).mean()


def _noise(example: Batch, key: Key[Array, ""]) -> Float[Array, "*data"]:
    return jr.normal(jr.fold_in(key, 0), example.x.shape, at_least_float32(example.x).dtype)
