import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mf_eqx import AbstractWeight, AdaptiveWeight, ConstantWeight, Context, GapCurriculum, Row

pytestmark = pytest.mark.usefixtures("x64")

ERRORS = [0.0, 0.3, 7.0, 1e6]


@pytest.mark.parametrize("error", ERRORS)
def test_constant_weight_is_its_value_whatever_the_error(error):
    assert ConstantWeight(2.5)(jnp.asarray(error)) == 2.5


def test_constant_weight_is_one_by_default():
    assert ConstantWeight()(jnp.asarray(3.0)) == 1


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(("power", "offset"), [(1.0, 0.01), (0.75, 1e-3), (0.5, 1e-2), (2.0, 1.0)])
def test_adaptive_weight_is_equation_22(error, power, offset):
    weight = AdaptiveWeight(power, offset)(jnp.asarray(error))
    np.testing.assert_allclose(weight, 1 / (error + offset) ** power, rtol=1e-14)


def test_adaptive_weight_is_that_of_the_imagenet_experiments_by_default():
    assert (AdaptiveWeight().power, AdaptiveWeight().offset) == (1.0, 0.01)


@pytest.mark.parametrize("error", ERRORS)
def test_power_zero_is_the_plain_squared_error(error):
    assert AdaptiveWeight(power=0.0)(jnp.asarray(error)) == 1


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_a_weight_of_the_mean_error_makes_a_loss_of_it(power):
    residual = jnp.array([[0.3, -1.0], [2.0, 0.5]])
    mean, drawn = jnp.mean(residual**2), Row(residual, residual, 0.1, 0.9)
    loss = AdaptiveWeight(power, 0.2, mean=True)(4 * mean, drawn) * 4 * mean
    np.testing.assert_allclose(loss, mean / (mean + 0.2) ** power, rtol=1e-14)
    np.testing.assert_allclose(ConstantWeight(3.0, mean=True)(4 * mean, drawn) * 4 * mean, 3 * mean, rtol=1e-14)


@pytest.mark.parametrize("weight", [ConstantWeight(mean=True), AdaptiveWeight(mean=True)])
def test_a_weight_of_the_mean_error_needs_the_row(weight):
    with pytest.raises(ValueError, match="row must be given for a weight of the mean error, got None"):
        weight(jnp.asarray(1.0))


@pytest.mark.parametrize("weight", [ConstantWeight(2.0), AdaptiveWeight(1.0), AdaptiveWeight(0.5)])
def test_no_gradient_passes_through_the_weight(weight):
    error = jnp.asarray(0.7)
    assert jax.grad(lambda error: weight(error) * error)(error) == weight(error)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("weight", [ConstantWeight(2.0), AdaptiveWeight(0.75)])
def test_weight_has_the_precision_of_the_error(weight, dtype):
    assert weight(jnp.asarray(0.7, dtype)).dtype == dtype


@pytest.mark.parametrize("power", [-0.5, float("nan")])
def test_negative_power_is_refused(power):
    with pytest.raises(ValueError, match=f"power must be >= 0 and finite, got {power}"):
        AdaptiveWeight(power=power)


@pytest.mark.parametrize("offset", [0.0, -1.0, float("nan")])
def test_offset_that_is_not_positive_is_refused(offset):
    with pytest.raises(ValueError, match=f"offset must be > 0 and finite, got {offset}"):
        AdaptiveWeight(offset=offset)


def row(r, t, step=None):
    context = None if step is None else Context(jnp.asarray(step))
    return Row(jnp.zeros(2), jnp.zeros(2), jnp.asarray(r), jnp.asarray(t), context=context)


@pytest.mark.parametrize(("step", "done"), [(0, 0.0), (25, 0.25), (100, 1.0), (1000, 1.0), (None, 1.0)])
@pytest.mark.parametrize(("r", "t"), [(0.0, 1.0), (0.3, 0.5), (0.7, 0.7)])
def test_gap_curriculum_is_its_formula_at_every_step(step, done, r, t):
    curriculum = GapCurriculum(AdaptiveWeight(0.5), optax.linear_schedule(0.0, 1.0, 100), power=3.0)
    expected = AdaptiveWeight(0.5)(jnp.asarray(0.7)) * (done + (1 - done) * (1 - (t - r)) ** 3)
    np.testing.assert_allclose(curriculum(jnp.asarray(0.7), row(r, t, step)), expected, rtol=1e-6)


def test_gap_curriculum_passes_no_gradient_and_keeps_the_precision_of_the_error():
    curriculum, error = GapCurriculum(AdaptiveWeight(1.0), 0.2), jnp.asarray(0.7, jnp.float32)
    weight = curriculum(error, row(0.1, 0.9))
    assert weight.dtype == jnp.float32
    assert jax.grad(lambda error: curriculum(error, row(0.1, 0.9)) * error)(error) == weight


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gap_curriculum_promotes_no_dtype_by_itself(dtype, x64):
    with jax.numpy_dtype_promotion("strict"):
        times = jnp.array([0.1, 0.9], dtype)
        weight = GapCurriculum(ConstantWeight(), 0.2)(jnp.asarray(0.7, dtype), Row(times, times, *times))
    assert weight.dtype == dtype


class Late(AbstractWeight):
    """A mask as a weight."""

    def __call__(self, error, row):
        return row.t > 0.5


def test_gap_curriculum_of_a_mask_is_not_rounded_to_one():
    weight = GapCurriculum(Late(), 0.2)(jnp.asarray(0.7), row(0.1, 0.9))
    np.testing.assert_allclose(weight, GapCurriculum(ConstantWeight(), 0.2)(jnp.asarray(0.7), row(0.1, 0.9)), rtol=1e-6)


@pytest.mark.parametrize(("name", "arguments"), [("done", (1.5,)), ("power", (0.5, 0.0))])
def test_gap_curriculum_names_what_it_refuses(name, arguments):
    with pytest.raises(ValueError, match=f"{name} must"):
        GapCurriculum(ConstantWeight(), *arguments)
