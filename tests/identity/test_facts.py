"""The settings with which papers train: objectives can be made of them, and they have the papers' numbers."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from methods import given_velocity, METHODS, those

import mf_eqx as mfx

UNIFORM = mfx.TimePairs(mfx.UniformTimes())
SELF_DISTILLATION = {"time_pairs": UNIFORM, "boundary_times": mfx.UniformTimes(), "weight": mfx.ConstantWeight()}
EXACT_VALUES = {
    "MeanFlow": {},
    "ImprovedMeanFlow": {"identity_share": 1 / 2},
    "TerminalVelocityMatching": {
        "identity_share": 1 / 2,
        "time_pairs": mfx.TimePairs(mfx.LogitNormalTimes(-0.4, 1.0), gap_times=mfx.LogitNormalTimes(-0.8, 1.0)),
        "boundary_times": mfx.LogitNormalTimes(-0.4, 1.0),
        "weight": mfx.ConstantWeight(mean=True),
    },
    "ModularMeanFlow": None,
    "Shortcut": {"time_pairs": UNIFORM, "boundary_times": mfx.UniformTimes(), "weight": mfx.ConstantWeight(mean=True)},
    "SplitMeanFlow": SELF_DISTILLATION,
    "AlignYourFlow": {
        "identity_share": 1,
        "time_pairs": mfx.TimePairs(mfx.UniformTimes(), gap_times=mfx.LogitNormalTimes(-0.8, 1.0)),
    },
    "LagrangianSelfDistillation": SELF_DISTILLATION,
    "EulerianSelfDistillation": SELF_DISTILLATION,
    "AlphaFlow by a schedule": {
        "identity_share": 3 / 4,
        "boundary_times": mfx.LogitNormalTimes(-0.4, 1.0),
        "weight": mfx.AdaptiveWeight(1.0, 0.001, mean=True),
    },
    "SoFlow": {
        "time_pairs": mfx.TimePairs(mfx.LogitNormalTimes(0.2, 0.8), mfx.LogitNormalTimes(-1.0, 0.8)),
        "boundary_times": mfx.LogitNormalTimes(-0.2, 1.0),
        "weight": mfx.AdaptiveWeight(1.0, 0.01, mean=True),
    },
    "TransitionModel": {
        "identity_share": 1 / 2,
        "time_pairs": mfx.TimePairs(mfx.LogitNormalTimes(-0.4, 1.0), at_data=0.2),
        "weight": mfx.AdaptiveWeight(1.0, 1e-5, mean=True),
    },
    "InductiveMomentMatching": {"identity_share": 1, "time_pairs": UNIFORM},
}


@pytest.mark.parametrize("method", METHODS)
def test_paper_settings_are_arguments_of_an_objective_and_no_defaults(method):
    settings = METHODS[method].facts.paper_settings or {}
    assert settings.keys() <= {"time_pairs", "boundary_times", "identity_share", "weight"}
    objective = mfx.Objective(METHODS[method], **given_velocity(METHODS[method]), **settings)
    default = mfx.Objective()
    for name, value in settings.items():
        assert getattr(objective, name) == value != getattr(default, name)


@pytest.mark.parametrize("method", EXACT_VALUES)
def test_paper_settings_are_the_papers(method):
    assert METHODS[method].facts.paper_settings == EXACT_VALUES[method]


@pytest.mark.parametrize(
    ("method", "mean", "std"),
    [
        ("ConsistencyTraining", -1.1, 2.0),
        ("ContinuousConsistency", -1.0, 1.6),
        ("FlowAnchoredConsistency", -0.93, 1.85),
    ],
)
def test_methods_that_end_at_the_data_draw_one_time(method, mean, std):
    """Not two, of which the larger would be t."""
    pairs = METHODS[method].facts.paper_settings["time_pairs"]
    t = jax.vmap(lambda key: pairs(key=key)[1])(jr.split(jr.key(0), 10_000))
    logit = jnp.log(t) - jnp.log1p(-t)
    np.testing.assert_allclose([jnp.mean(logit), jnp.std(logit)], [mean, std], rtol=0, atol=4 * std / 100)


@pytest.mark.parametrize("method", those(lambda facts: facts.paper_settings))
def test_settings_are_no_part_of_the_hash(method):
    assert isinstance(hash(METHODS[method].facts), int)
