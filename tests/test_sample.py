import functools

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fields import GaussianField, PointMassField

import mf_eqx as mfx
from mf_eqx import exact

pytestmark = pytest.mark.usefixtures("x64")

CONSISTENCY = functools.partial(mfx.sample_consistency, key=jr.key(7))
PATHS = [mfx.LinearInterpolant(), mfx.TrigonometricInterpolant()]
SAMPLERS = [mfx.sample, mfx.sample_euler, mfx.sample_heun, CONSISTENCY, functools.partial(CONSISTENCY, new_noise=0.5)]
GRIDS = [(1.0, 0.0), (1.0, 0.4, 0.0), (1.0, 0.75, 0.5, 0.1, 0.0)]


def gaussian():
    return GaussianField(jnp.array([1.0, -0.5]), 0.4)


def noise(*shape):
    return jr.normal(jr.key(0), shape or (2,))


class Labelled(mfx.AbstractField):
    """A point mass for each label, one in each of two parts of the state."""

    def __call__(self, z, r, t, condition=None, *, key=None):
        assert key is None  # a sampler must not switch dropout on
        return (z - condition) / t


# Grids


def test_uniform_times_run_from_one_to_zero():
    assert mfx.uniform_times(1) == (1.0, 0.0)
    np.testing.assert_allclose(mfx.uniform_times(5), [1, 0.8, 0.6, 0.4, 0.2, 0], atol=1e-15)


@pytest.mark.parametrize("steps", [0, -1])
def test_uniform_times_need_a_step(steps):
    with pytest.raises(ValueError, match=f"steps must be an integer >= 1, got {steps}"):
        mfx.uniform_times(steps)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "times", [(1.0,), (), (0.0, 1.0), (1.0, 0.5, 0.5, 0.0), (1.5, 0.0), (1.0, -0.1), (1.0, float("nan"), 0.0)]
)
def test_grids_that_do_not_decrease_within_zero_and_one_are_refused(sampler, times):
    with pytest.raises(ValueError, match="times must be a strictly decreasing sequence of at least two times in "):
        sampler(gaussian(), noise(), times=times)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_grid_may_be_traced_but_not_be_too_short(sampler):
    found = jax.jit(lambda times: sampler(gaussian(), noise(), times=times))(jnp.array([1.0, 0.5, 0.25]))
    np.testing.assert_allclose(found, sampler(gaussian(), noise(), times=(1.0, 0.5, 0.25)), rtol=1e-6)
    with pytest.raises(ValueError, match="times must be a strictly decreasing sequence of at least two times in "):
        jax.jit(lambda times: sampler(gaussian(), noise(), times=times))(jnp.array([1.0]))


# Average velocities


def test_one_step_is_the_noise_minus_the_field():
    field, eps = gaussian(), noise()
    np.testing.assert_array_equal(mfx.sample(field, eps), eps - field(eps, jnp.zeros(()), jnp.ones(())))


@pytest.mark.parametrize("times", GRIDS)
def test_any_number_of_steps_with_an_exact_field_lands_on_the_exact_flow(times):
    field, eps = gaussian(), noise()
    np.testing.assert_allclose(mfx.sample(field, eps, times=times), field.flow(eps, 0, 1), rtol=1e-13)


def test_a_part_of_the_way_lands_on_the_flow_of_that_part():
    field, z = gaussian(), noise()
    np.testing.assert_allclose(mfx.sample(field, z, times=(0.9, 0.6, 0.3)), field.flow(z, 0.3, 0.9), rtol=1e-13)


def test_samples_of_one_gaussian_have_its_moments():
    field = gaussian()
    x = jax.vmap(lambda eps: mfx.sample(field, eps))(noise(20_000, 2))
    # 20000 draws: the standard error of a mean is 0.003, of a standard deviation 0.002.
    np.testing.assert_allclose(x.mean(0), field.mean, atol=0.012)
    np.testing.assert_allclose(x.std(0), field.std, atol=0.008)


def test_steps_with_an_integrated_field_land_where_a_differential_equation_solver_does():
    mixture = exact.GaussianMixture(jnp.array([[-1.0, 0.0], [1.0, 0.5], [0.0, -1.0]]), 0.3)
    velocity = exact.MarginalVelocity(mixture)
    field, eps = exact.AverageVelocity(velocity), noise(8, 2)

    def solve(eps):
        term = diffrax.ODETerm(lambda t, z, args: velocity(z, jnp.asarray(t)))
        controller = diffrax.PIDController(rtol=1e-11, atol=1e-11)
        ys = diffrax.diffeqsolve(term, diffrax.Tsit5(), 1.0, 0.0, -0.01, eps, stepsize_controller=controller).ys
        return ys[0]

    expected = jax.vmap(solve)(eps)
    for times in GRIDS[::2]:
        samples = jax.jit(jax.vmap(lambda eps, times=times: mfx.sample(field, eps, times=times)))(eps)
        np.testing.assert_allclose(samples, expected, atol=1e-8)


# Jumps to the data, and new noise


class ToDataField(mfx.AbstractField):
    """A Gaussian's average velocity to r = 0, and not a number to other times."""

    def __call__(self, z, r, t, condition=None, *, key=None):
        return jnp.where(r == 0, gaussian()(z, r, t), jnp.nan)


@pytest.mark.parametrize("path", PATHS)
def test_each_jump_goes_to_the_data_and_new_noise_leads_back_along_the_path(path):
    times, key, z = (1.0, 0.6, 0.2, 0.0), jr.key(3), noise()
    for i in range(3):
        t, s = times[i : i + 2]
        x = z - t * gaussian()(z, jnp.zeros(()), jnp.asarray(t))
        alpha, sigma, *_ = path.rates(jnp.asarray(s))
        z = alpha * x + sigma * jr.normal(jr.split(key, 3)[i], (2,))
    found = mfx.sample_consistency(ToDataField(), noise(), times=times, key=key, interpolant=path)
    np.testing.assert_allclose(found, z, rtol=1e-13)


class OnePoint(mfx.AbstractField):
    """The average velocity of data at one point, along any path."""

    path: mfx.AbstractInterpolant

    def __call__(self, z, r, t, condition=None, *, key=None):
        eps = (z - self.path.alpha(t)) / self.path.sigma(t)
        return (z - self.path.alpha(r) - self.path.sigma(r) * eps) / (t - r)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("new_noise", [0.0, 0.3, 0.8, 1.0])
def test_new_noise_replaces_its_share_of_the_old(path, new_noise):
    times, key = (1.0, 0.7, 0.2), jr.key(3)
    eps = noise()
    for new_key in jr.split(key, 2):
        eps = np.sqrt(1 - new_noise**2) * eps + new_noise * jr.normal(new_key, (2,))
    found = mfx.sample_consistency(OnePoint(path), noise(), times=times, key=key, new_noise=new_noise, interpolant=path)
    np.testing.assert_allclose(found, path.alpha(0.2) + path.sigma(0.2) * eps, rtol=1e-12)


@pytest.mark.parametrize("times", GRIDS)
def test_without_new_noise_it_is_sampling_by_average_velocities(times):
    found = CONSISTENCY(gaussian(), noise(), times=times, new_noise=0)
    np.testing.assert_allclose(found, mfx.sample(gaussian(), noise(), times=times), rtol=1e-14)


def test_samples_with_some_new_noise_have_the_moments_of_the_data():
    def draw(eps, key):
        return mfx.sample_consistency(gaussian(), eps, times=(1.0, 0.9, 0.5, 0.0), key=key, new_noise=0.6)

    x = jax.vmap(draw)(noise(20_000, 2), jr.split(jr.key(1), 20_000))
    np.testing.assert_allclose(x.mean(0), gaussian().mean, atol=0.012)
    np.testing.assert_allclose(x.std(0), gaussian().std, atol=0.008)


def test_a_share_of_new_noise_that_is_traced_is_refused(unchecked):
    with pytest.raises(ValueError, match="new_noise must be known when the program is compiled, got"):
        jax.jit(lambda share: CONSISTENCY(gaussian(), noise(), times=(1.0, 0.0), new_noise=share))(0.5)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("new_noise", [-0.1, 1.1, float("nan"), "0.5", None])
def test_a_share_of_new_noise_outside_of_zero_and_one_is_refused(new_noise):
    with pytest.raises(ValueError, match=rf"new_noise must lie in \[0, 1\], got {new_noise}"):
        CONSISTENCY(gaussian(), noise(), times=(1.0, 0.0), new_noise=new_noise)


def test_one_jump_is_one_step():
    field, eps = gaussian(), noise()
    np.testing.assert_allclose(CONSISTENCY(field, eps, times=(1.0, 0.0)), mfx.sample(field, eps), rtol=1e-15)


def test_samples_of_several_jumps_have_the_moments_of_the_data_and_forget_the_first_noise():
    def draw(eps, key):
        return mfx.sample_consistency(gaussian(), eps, times=(1.0, 0.9, 0.8, 0.0), key=key)

    eps = noise(20_000, 2)
    x = jax.vmap(draw)(eps, jr.split(jr.key(1), 20_000))
    np.testing.assert_allclose(x.mean(0), gaussian().mean, atol=0.012)
    np.testing.assert_allclose(x.std(0), gaussian().std, atol=0.008)
    assert abs(np.corrcoef(x[:, 0], eps[:, 0])[0, 1]) < 0.03  # 1 without new noise; the standard error is 0.007


# Instantaneous velocities


def errors(sampler, steps):
    field, eps = gaussian(), noise()
    exact_end = field.flow(eps, 0, 1)
    return [float(jnp.abs(sampler(field, eps, times=mfx.uniform_times(n)) - exact_end).max()) for n in steps]


@pytest.mark.parametrize(("sampler", "order"), [(mfx.sample_euler, 1), (mfx.sample_heun, 2)])
def test_solver_converges_with_its_order(sampler, order):
    coarse, fine = errors(sampler, (200, 400))
    np.testing.assert_allclose(np.log2(coarse / fine), order, atol=0.05)
    assert fine > 1e-8  # not yet rounding


def test_euler_is_one_evaluation_per_step():
    field, eps = gaussian(), noise()
    z = eps
    for t, r in ((1.0, 0.6), (0.6, 0.0)):
        z = z - (t - r) * field(z, jnp.asarray(t), jnp.asarray(t))
    np.testing.assert_allclose(mfx.sample_euler(field, eps, times=(1.0, 0.6, 0.0)), z, rtol=1e-14)


def test_heun_averages_the_slopes_at_both_ends():
    field, eps = gaussian(), noise()
    first = field(eps, jnp.asarray(0.9), jnp.asarray(0.9))
    second = field(eps - 0.5 * first, jnp.asarray(0.4), jnp.asarray(0.4))
    expected = eps - 0.25 * (first + second)
    np.testing.assert_allclose(mfx.sample_heun(field, eps, times=(0.9, 0.4)), expected, rtol=1e-14)


@pytest.mark.parametrize("sampler", [mfx.sample_euler, mfx.sample_heun])
def test_solvers_ask_only_for_the_instantaneous_velocity(sampler):
    class Diagonal(mfx.AbstractField):
        def __call__(self, z, r, t, condition=None, *, key=None):
            return jnp.where(r == t, z, jnp.nan)

    assert bool(jnp.isfinite(sampler(Diagonal(), noise(), times=mfx.uniform_times(3))).all())


# All of them


@pytest.mark.parametrize("sampler", [mfx.sample, mfx.sample_euler])
def test_condition_reaches_the_field(sampler):
    labels = jnp.array([[1.0, 2.0], [-3.0, 0.0]])
    x = jax.vmap(lambda eps, label: sampler(Labelled(), eps, label, times=mfx.uniform_times(3)))(noise(2, 2), labels)
    np.testing.assert_allclose(x, labels, atol=1e-14)  # straight trajectories: no solver errs


def test_point_mass_is_reached_in_one_step():
    field = PointMassField(jnp.array([0.3, -2.0]))
    np.testing.assert_allclose(mfx.sample(field, noise()), field.point, rtol=1e-14)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "times", [[1, 0.5, 0], np.array([1, 0.5, 0]), jnp.array([1, 0.5, 0])], ids=["list", "np", "jnp"]
)
def test_noise_and_times_may_be_lists_and_arrays(sampler, times):
    expected = sampler(gaussian(), jnp.array([1.0, 2.0]), times=(1.0, 0.5, 0.0))
    for eps in ([1.0, 2.0], (1.0, 2.0), np.array([1.0, 2.0])):
        np.testing.assert_array_equal(sampler(gaussian(), eps, times=times), expected)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("make", [lambda: None, lambda: "noise", lambda: ["1", "2"], lambda: jr.key(0)])
def test_noise_that_is_no_numbers_is_refused_by_name(make):
    with pytest.raises(ValueError, match="eps must be an array of numbers, got "):
        mfx.sample(gaussian(), make())


@pytest.mark.usefixtures("unchecked")
def test_times_of_strings_are_refused():
    with pytest.raises(ValueError, match=r"times must be a strictly decreasing .* got \['1', '0'\]"):
        mfx.sample(gaussian(), noise(), times=["1", "0"])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_noise_without_values_is_refused(sampler):
    with pytest.raises(ValueError, match=r"eps must hold at least one value, got shape \(0,\)"):
        sampler(gaussian(), jnp.ones(0), times=(1.0, 0.0))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_jit_and_eager_agree(sampler):
    field, eps = gaussian(), noise()
    jitted = jax.jit(lambda eps: sampler(field, eps, times=(1.0, 0.5, 0.0)))(eps)
    np.testing.assert_allclose(jitted, sampler(field, eps, times=(1.0, 0.5, 0.0)), rtol=1e-14)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_keep_the_precision_of_the_noise(sampler):
    field = GaussianField(jnp.zeros(2, jnp.float32), 0.4)
    assert sampler(field, noise().astype(jnp.float32), times=(1.0, 0.5, 0.0)).dtype == jnp.float32


def test_program_does_not_grow_with_the_number_of_steps():
    def lines(steps):
        sample = jax.jit(lambda eps: mfx.sample(gaussian(), eps, times=mfx.uniform_times(steps)))
        return sample.lower(noise()).as_text().count("\n")

    assert lines(50) == lines(2)


def test_noise_of_integers_is_sampled_in_float32():
    with jax.enable_x64(False):
        x = mfx.sample(GaussianField(jnp.zeros(2), 0.5), [0, 1])
    assert x.dtype == jnp.float32


def test_noise_below_float32_is_sampled_in_float32():
    eps = jnp.ones(2, jnp.bfloat16)
    field = GaussianField(jnp.zeros(2), 0.5)
    x = mfx.sample(field, eps, times=(1.0, 0.5, 0.0))
    assert x.dtype == jnp.float32


# Loops


def loops(steps, method=mfx.sample, **options):
    """How many there are in the program of a sample."""
    times = mfx.uniform_times(steps)
    program = jax.jit(lambda eps: method(gaussian(), eps, times=times, **options)).lower(noise()).as_text()
    return program.count("stablehlo.while")


@pytest.mark.parametrize("method", SAMPLERS[:3])  # random numbers are loops, too
def test_a_single_step_is_no_loop_and_several_are_one(method):
    assert [loops(steps, method) for steps in (1, 2, 9)] == [0, 1, 1]


@pytest.mark.parametrize("method", SAMPLERS[:3])
def test_unrolled_steps_are_no_loop_and_the_same(method):
    assert loops(4, method, unroll=True) == 0
    times = mfx.uniform_times(4)
    looped, unrolled = (method(gaussian(), noise(), times=times, unroll=unroll) for unroll in (False, True))
    np.testing.assert_allclose(looped, unrolled, rtol=1e-14)
