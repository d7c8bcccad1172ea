"""Checks of arguments, and what they are used for: sizes of zero everywhere, and 0/0 that is meant."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from fields import filled
from methods import guidance, METHODS, trainer

import mf_eqx as mfx
from mf_eqx import checkpoint, data, exact, metrics, nn, vae
from mf_eqx._validate import check_counts, check_finite, check_positive, described

KEY = jr.key(0)


def dit(shape=(4, 8, 8), **size):
    return mfx.DiT(shape, mfx.DiTSize(**({"depth": 1, "width": 8, "heads": 2, "patch": 2} | size)), key=KEY)


def unet(shape=(3, 8, 8), **size):
    default = {"width": 8, "multipliers": (1,), "blocks": 1, "attention": ()}
    return mfx.UNet(shape, mfx.UNetSize(**(default | size)), key=KEY)


def generator():
    return mfx.Generator(mfx.MLP(2, width=4, depth=1, key=KEY), KEY, (2,))


EMPTY = {
    "MLP of size 0": (lambda: mfx.MLP(0, key=KEY), "size must be an integer >= 1, got 0"),
    "MLP of width 0": (lambda: mfx.MLP(2, width=0, key=KEY), "width must be an integer >= 1, got 0"),
    "MLP of depth 0": (lambda: mfx.MLP(2, depth=0, key=KEY), "depth must be an integer >= 1, got 0"),
    "MLP of half a layer": (lambda: mfx.MLP(2, depth=1.5, key=KEY), "depth must be an integer >= 1, got 1.5"),
    "MLP of 0 labels": (lambda: mfx.MLP(2, labels=0, key=KEY), "labels must be an integer >= 1, got 0"),
    **{
        f"{name} of shape {shape}": (
            lambda make=make, shape=shape: make(shape),
            rf"data_shape must be of integers >= 1, got \({', '.join(map(str, shape))}\)",
        )
        for name, make in (("DiT", dit), ("U-Net", unet))
        for shape in ((0, 8, 8), (3, 0, 8), (3, 8, 0))
    },
    **{
        f"DiT of {name} 0": (lambda name=name: dit(**{name: 0}), f"{name} must be an integer >= 1, got 0")
        for name in mfx.DiTSize._fields
    },
    "U-Net of width 0": (lambda: unet(width=0), "width must be an integer >= 1, got 0"),
    "U-Net of blocks 0": (lambda: unet(blocks=0), "blocks must be an integer >= 1, got 0"),
    "U-Net of multiplier 0": (lambda: unet(multipliers=(0,)), "multipliers must be of integers >= 1, got"),
    "Linear from 0": (lambda: nn.Linear(0, 3, key=KEY), "in_size must be an integer >= 1, got 0"),
    "Linear to 0": (lambda: nn.Linear(3, 0, key=KEY), "out_size must be an integer >= 1, got 0"),
    "GroupNorm of 0 groups": (lambda: nn.GroupNorm(0, 4), "channels must be a multiple of groups, got 4 .* 0 groups"),
    "GroupNorm of 0 channels": (lambda: nn.GroupNorm(1, 0), "channels must be an integer >= 1, got 0"),
    "SelfAttention of 0 heads": (lambda: nn.SelfAttention(4, 0, key=KEY), "width must be a multiple of heads, got"),
    "SelfAttention of width 0": (lambda: nn.SelfAttention(0, 2, key=KEY), "width must be an integer >= 1, got 0"),
    "LabelEmbedding of width 0": (lambda: nn.LabelEmbedding(3, 0, key=KEY), "width must be an integer >= 1, got 0"),
    "VectorEmbedding of size 0": (lambda: nn.VectorEmbedding(0, 4, key=KEY), "size must be an integer >= 1, got 0"),
    "VectorEmbedding of width 0": (lambda: nn.VectorEmbedding(3, 0, key=KEY), "width must be an integer >= 1, got 0"),
    "MLP of an empty condition": (lambda: mfx.MLP(2, condition=0, key=KEY), "condition must be an integer >= 1, got 0"),
    "TimePairEmbedding of width 0": (lambda: nn.TimePairEmbedding(0, key=KEY), "width must be an integer >= 1, got 0"),
    "positions of size 0": (lambda: nn.sinusoidal_positions(2, 2, 0), "size must be a positive multiple of 4, got 0"),
    "positions of length 0": (lambda: nn.sinusoidal_line_positions(0, 4), "length must be an integer >= 1, got 0"),
    "DiT of shape (3, 0)": (lambda: dit((3, 0)), r"data_shape must be of integers >= 1, got \(3, 0\)"),
    "positions of height 0": (lambda: nn.sinusoidal_positions(0, 2, 4), "height must be an integer >= 1, got 0"),
    "sinusoids of size 0": (lambda: nn.sinusoidal_embedding(0.5, 0), "size must be even and positive, got 0"),
    "no noise": (
        lambda: mfx.sample(generator().field, jnp.ones(0)),
        r"eps must hold at least one value, got shape \(0,\)",
    ),
    "batches of 0": (lambda: generator().batches(1, 0, mfx.Parallelism()), "batch must be an integer >= 1, got 0"),
    "mixture without values": (
        lambda: exact.GaussianMixture(jnp.ones((3, 0)), 1.0),
        r"mean must .* got shape \(3, 0\)",
    ),
    "points without values": (lambda: exact.PointSet(jnp.ones((3, 0))), r"points must .* got shape \(3, 0\)"),
    "stack of 0 copies": (lambda: exact.StackedMixture(exact.eight_gaussians(), 0), "copies must be >= 1, got 0"),
    "draw of 0": (lambda: exact.draw(exact.eight_gaussians(), 0, KEY), "number must be an integer >= 1, got 0"),
    "Draw of 0": (lambda: exact.Draw(exact.eight_gaussians(), 0), "batch must be an integer >= 1, got 0"),
    "DrawLabelled of 0": (
        lambda: exact.DrawLabelled(exact.eight_gaussians(), 0),
        "batch must be an integer >= 1, got 0",
    ),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("make", "message"), EMPTY.values(), ids=EMPTY)
def test_what_would_be_empty_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


BATCH = mfx.Batch(jnp.ones((4, 2)))
STEP = mfx.TrainStep(mfx.Objective(), optax.sgd(0.1))


def state():
    return mfx.init_state(generator().field, STEP.optimizer, key=KEY)


def prepared(function):
    return mfx.TrainStep(mfx.Objective(), optax.sgd(0.1), prepare=function)(state(), BATCH)


OF_ANOTHER_KIND = {
    "times for time_pairs": (lambda: mfx.Objective(time_pairs=mfx.UniformTimes()), "time_pairs .* TimePairs, got Unif"),
    "number for weight": (lambda: mfx.Objective(weight=1.0), "weight .* AbstractWeight, got 1.0"),
    "class for identity": (
        lambda: mfx.Objective(mfx.MeanFlow),
        "identity .* AbstractIdentity, got <class '.*MeanFlow'>",
    ),
    "identity for objective": (lambda: mfx.TrainStep(mfx.MeanFlow(), STEP.optimizer), "objective .* got MeanFlow"),
    "batch for state": (lambda: STEP(BATCH, state()), "state .* TrainState, got Batch"),
    "array for batch": (lambda: STEP(state(), BATCH.x), r"batch must be a Batch, .* got an array of shape \(4, 2\)"),
    "array of prepare": (lambda: prepared(lambda row, key: row.x), "the result of prepare .* Batch, .* got"),
    "seed for key": (
        lambda: mfx.init_state(generator().field, STEP.optimizer, key=0),
        r"key must be .* jax.random.key\(0\), got 0",
    ),
    "seed of a generator": (
        lambda: mfx.Generator(generator().field, 0, (2,)),
        r"key must be .* jax.random.key\(0\), got 0",
    ),
    "numbers for key": (
        lambda: mfx.init_state(generator().field, STEP.optimizer, key=jnp.ones(2)),
        r"key must be .* jax.random.key\(0\), got Array",
    ),
    "rbg key of a run": (
        lambda: mfx.init_state(generator().field, STEP.optimizer, key=jr.key(0, impl="rbg")),
        r"key must .* threefry2x32 .* got rbg",
    ),
    "rbg key of an objective": (
        lambda: mfx.Objective()(generator().field, BATCH, key=jr.key(0, impl="unsafe_rbg")),
        r"key must .* threefry2x32 .* got unsafe_rbg",
    ),
    "rbg key of a generator": (
        lambda: mfx.Generator(generator().field, jr.key(0, impl="rbg"), (2,)),
        r"key must .* threefry2x32 .* got rbg",
    ),
    "tuple for a U-Net's size": (
        lambda: mfx.UNet((3, 8, 8), (8, (1,), 1, ()), key=KEY),
        r"size .* UNetSize, got \(8, ",
    ),
    "tuple for a DiT's size": (lambda: mfx.DiT((3, 8, 8), (1, 8, 2, 2), key=KEY), r"size .* DiTSize, got \(1, 8"),
    "number for multipliers": (lambda: unet(multipliers=2), "multipliers must be a tuple or a list, .* got 2"),
    "number for attention": (lambda: unet(attention=8), "attention must be a tuple or a list, .* got 8"),
    "part for parts": (lambda: data.InTurn(data.FromPixels()), "parts must be a tuple or a list, .* got FromPixels"),
    "steps for times": (
        lambda: mfx.Generator(generator().field, KEY, (2,), 4),
        "times must .* got 4: mfx.uniform_times.4. makes one of 4",
    ),
    "network for a teacher": (
        lambda: mfx.TrainStep(mfx.Objective(), STEP.optimizer, teacher=eqx.nn.Linear(2, 2, key=KEY)),
        "field must be callable as .* got Linear, which takes",
    ),
    "network for a guided field": (
        lambda: mfx.GuidedField(eqx.nn.Linear(2, 2, key=KEY), 2.0, null=1),
        "field must be callable as .* got Linear, which takes",
    ),
    "name for platforms": (
        lambda: checkpoint.export_sampler("never", generator().field, (2,), platforms="cpu"),
        "platforms must be a tuple or a list, .* got 'cpu'",
    ),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("make", "message"), OF_ANOTHER_KIND.values(), ids=OF_ANOTHER_KIND)
def test_argument_of_another_kind_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("size", [1, np.int64(3), (1, 2), []])
def test_sizes_of_at_least_one_are_taken(size):
    check_counts(size=size)


@pytest.mark.parametrize("check", [check_finite, check_positive])
def test_values_that_are_traced_pass(check):
    assert jax.jit(lambda x: (check("x", x), x)[1])(jnp.nan) is not None


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        (None, "None"),
        ({}, "{}"),
        (np.int64(3), "3"),
        (jnp.asarray(3), "3"),
        (np.zeros((2, 3)), "float64 of shape (2, 3)"),
        ({"a": True, "b": (jnp.zeros(4), "text")}, "['a'] True, ['b'][0] float32 of shape (4,), ['b'][1] str"),
    ],
)
def test_tree_is_described_by_its_values_or_its_shapes(tree, text):
    assert described(tree) == text


def test_traced_tree_is_described_by_its_shapes():
    found = []
    jax.eval_shape(lambda tree: found.append(described(tree)), {"a": jnp.zeros(4), "b": jnp.zeros(())})
    assert found == ["['a'] float32 of shape (4,), ['b'] float32 of shape ()"]


# 0 / 0


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_mean_of_nothing_is_nan_without_a_stop_by_debug_nans(kind):
    mean = mfx.Mean(kind([3.0, 0.0]), kind([2.0, 0.0]))
    with jax.debug_nans(True):
        found = mean.value
    np.testing.assert_array_equal(found, [1.5, np.nan])
    assert found.dtype == mean.total.dtype and found.shape == (2,)


def test_single_mean_of_nothing_is_nan_without_a_warning(recwarn):
    assert np.isnan(mfx.Mean(jnp.zeros(()), jnp.zeros(())).value)
    assert not recwarn.list


def test_mean_of_traced_values_is_traced():
    found = jax.jit(lambda total: mfx.Mean(total, jnp.asarray([2.0, 0.0])).value)(jnp.asarray([3.0, 0.0]))
    np.testing.assert_array_equal(found, [1.5, np.nan])


QUICK = (None, "MeanFlow")


@pytest.mark.parametrize(
    "method", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in METHODS if name not in QUICK)]
)
def test_a_step_and_its_metrics_make_no_nan_on_the_way(method):
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    average = [mfx.ExponentialAverage(0.9)]
    # Times at both ends, and data without any variation.
    times = mfx.TimePairs(AtTheEnds())
    if method is None:
        step = mfx.TrainStep(mfx.Objective(None, time_pairs=times, identity_share=0), optimizer, average)
    else:
        step = trainer(METHODS[method], optimizer, average, time_pairs=times, **guidance(METHODS[method], 2))
    field = filled(lambda: mfx.MLP(2, width=4, depth=1, labels=2, key=KEY))
    with jax.debug_nans(True):
        state = mfx.init_state(field, optimizer, average, key=KEY)
        for _ in range(2):
            state, metrics = step(state, mfx.Batch(jnp.zeros((8, 2)), jnp.zeros(8, jnp.int32)))
        assert np.isfinite(metrics["loss"].value)
        assert all(mean.value is not None for mean in metrics.values())


class AtTheEnds(mfx.AbstractTimes):
    def __call__(self, *, key):
        return jnp.round(jr.uniform(key))


# Numbers that are not finite. As constants of a program XLA:CPU makes other numbers of them: jitted, sigmoid(NaN + n)
# was 2e-44, and a training with NaN for times had a finite loss.

FLOATS = {
    "AutoencoderObjective.kl": vae.AutoencoderObjective,
    "AdaptiveWeight.offset": lambda value: mfx.AdaptiveWeight(offset=value),
    "AlignYourFlow.offset": lambda value: mfx.AlignYourFlow(offset=value),
    "AlphaFlow.clip": lambda value: mfx.AlphaFlow(0.5, clip=value),
    "ConsistencyTraining.offset": lambda value: mfx.ConsistencyTraining(0.5, offset=value),
    "ContinuousConsistency.offset": lambda value: mfx.ContinuousConsistency(offset=value),
    "FlowAnchoredConsistency.power": mfx.FlowAnchoredConsistency,
    "RunningPopulation.decay": mfx.RunningPopulation,
    "SigmoidSchedule.steepness": lambda value: mfx.SigmoidSchedule(0, 1, value),
    "AdaptiveWeight.power": lambda value: mfx.AdaptiveWeight(power=value),
    "AverageVelocity.atol": lambda value: exact.AverageVelocity(lambda z, t, c: z, atol=value),
    "AverageVelocity.rtol": lambda value: exact.AverageVelocity(lambda z, t, c: z, rtol=value),
    "CentralDifference.step": mfx.CentralDifference,
    "ConstantWeight.value": mfx.ConstantWeight,
    "GapCurriculum.power": lambda value: mfx.GapCurriculum(mfx.ConstantWeight(), 0.5, value),
    "EDMAugmentation.flip": lambda value: data.EDMAugmentation(flip=value),
    "EDMAugmentation.probability": lambda value: data.EDMAugmentation(probability=value),
    "EDMAugmentation.scale": lambda value: data.EDMAugmentation(scale=value),
    "EDMAugmentation.shift": lambda value: data.EDMAugmentation(shift=value),
    "EDMAugmentation.turned": lambda value: data.EDMAugmentation(turned=value),
    "GaussianAverageVelocity.std": lambda value: exact.GaussianAverageVelocity(jnp.zeros(2), value),
    "GroupNorm.epsilon": lambda value: nn.GroupNorm(1, 2, epsilon=value),
    "Guidance.mix": lambda value: mfx.Guidance(1.0, value),
    "Guidance.scale": mfx.Guidance,
    "GuidedField.scale": lambda value: mfx.GuidedField(mfx.MLP(2, labels=2, key=KEY), value, null=2),
    "HalfLife.images": lambda value: mfx.HalfLife(value, 8),
    "GuidedVelocity.scale": lambda value: exact.GuidedVelocity(lambda z, t, c: z, value),
    "InductiveMomentMatching.bias": lambda value: mfx.InductiveMomentMatching(bias=value),
    "InductiveMomentMatching.gap": mfx.InductiveMomentMatching,
    "InductiveMomentMatching.power": lambda value: mfx.InductiveMomentMatching(power=value),
    "LabelDropout.rate": lambda value: mfx.LabelDropout(value, 2),
    "LogitNormalTimes.mean": lambda value: mfx.LogitNormalTimes(value, 1.0),
    "LogitNormalTimes.std": lambda value: mfx.LogitNormalTimes(0.0, value),
    "MeanFlow.tangent_r": lambda value: mfx.MeanFlow(tangent_r=value),
    "MeanFlow.tangent_t": lambda value: mfx.MeanFlow(tangent_t=value),
    "Objective.smallest_time": lambda value: mfx.Objective(smallest_time=value),
    "PerceptualTerm.before": lambda value: mfx.PerceptualTerm(jnp.tanh, (4, 4), before=value),
    "PerceptualTerm.coefficient": lambda value: mfx.PerceptualTerm(jnp.tanh, (4, 4), value),
    "PerceptualTerm.smallest_crop": lambda value: mfx.PerceptualTerm(jnp.tanh, (4, 4), smallest_crop=value),
    "Protocol.centre": lambda value: dataclasses.replace(metrics.LITE0, centre=value),
    "RecursiveConsistency.clip": lambda value: mfx.RecursiveConsistency(clip=value),
    "RewardObjective.anchor": lambda value: mfx.RewardObjective(jnp.sum, anchor=value),
    "RewardObjective.largest_advantage": lambda value: mfx.RewardObjective(jnp.sum, largest_advantage=value),
    "RewardObjective.strength": lambda value: mfx.RewardObjective(jnp.sum, strength=value),
    "RandomFlip.probability": data.RandomFlip,
    "PowerLawScales.largest": lambda value: mfx.PowerLawScales(largest=value),
    "PowerLawScales.power": mfx.PowerLawScales,
    "PowerLawScales.smallest": lambda value: mfx.PowerLawScales(smallest=value),
    "InContextEmbedding.time_scale": lambda value: mfx.InContextDiT(
        (1, 4, 4), mfx.InContextDiTSize(2, 8, 2, 2, 1), time_scale=value, key=KEY
    ),
    "RMSNorm.epsilon": lambda value: nn.RMSNorm(2, epsilon=value),
    "TimePairEmbedding.time_scale": lambda value: nn.TimePairEmbedding(4, time_scale=value, key=KEY),
    "TimePairs.at_data": lambda value: mfx.TimePairs(at_data=value),
    "TimePairs.at_noise": lambda value: mfx.TimePairs(at_noise=value),
    "TimePairs.equal": lambda value: mfx.TimePairs(equal=value),
    "TimePairs.uniform": lambda value: mfx.TimePairs(uniform=value),
    "TransitionModel.offset": lambda value: mfx.TransitionModel(offset=value),
    "TransitionModel.sigma": mfx.TransitionModel,
    "UNetBlock.dropout": lambda value: mfx.UNet(
        (3, 8, 8), mfx.UNetSize(width=8, multipliers=(1,), blocks=1, attention=()), dropout=value, key=KEY
    ),
    "XPrediction.smallest_time": lambda value: mfx.XPrediction(exact.PointMassAverageVelocity(np.ones(2)), value),
}


def float_fields():
    """All fields of modules of the package that are floats."""
    found, left = set(), [eqx.Module]
    while left:
        cls = left.pop()
        left += cls.__subclasses__()
        if cls.__module__.startswith("mf_eqx.") and dataclasses.is_dataclass(cls):
            found |= {f"{cls.__name__}.{field.name}" for field in dataclasses.fields(cls) if field.type is float}
    return found


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", FLOATS)
def test_a_float_that_is_not_finite_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name.partition('.')[2]} .*got {value}|must be finite, got 1 values"):
        FLOATS[name](value)


@pytest.mark.parametrize("value", [None, "one"])
@pytest.mark.parametrize("name", FLOATS)
def test_a_float_that_is_no_number_is_refused_by_name(name, value, unchecked):
    rule = f"{name.partition('.')[2]} must be a number(, or an array of numbers)?, got .*{value!r}"
    with pytest.raises(ValueError, match=rule):
        FLOATS[name](value)


def test_every_float_of_a_module_is_in_the_list():
    assert float_fields() == set(FLOATS)
