import inspect
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from test_train import batch, field, leaves, OPTIMIZER, Probe, state

import mf_eqx as mfx

# Every optimiser of optax


def transformations(module):
    """Names of what makes an optimiser from nothing or from a learning rate, leaving out the pieces of others."""
    for name, function in sorted(vars(module).items()):
        if not name.startswith(("_", "scale_by")) and inspect.isfunction(function) and made(function) is not None:
            yield name


def made(function):
    """What the function makes, if that is a transformation and nothing but a learning rate is needed."""
    parameters = inspect.signature(function).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if needed not in ([], ["learning_rate"]):
        return None
    with warnings.catch_warnings(action="ignore"):  # some are deprecated, some want a key
        try:
            found = function(*[1e-3 for _ in needed])
        except (TypeError, ValueError):
            return None
    return found if isinstance(found, optax.GradientTransformation) else None


REFUSED = {"apply_every", "lbfgs", "hutchinson_estimator_diag_hessian", "sophia"}
FOUND = {
    name: getattr(module, name)
    for module in (optax, optax.contrib)
    for name in transformations(module)
    if name not in REFUSED
}
WRAPPED = {
    "mechanize": lambda: optax.contrib.mechanize(optax.sgd(1e-3), 0.01),
    "schedule_free": lambda: optax.contrib.schedule_free(optax.sgd(1e-3), 1e-3),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(1e-3),
    "scale_by_distance_over_gradients": optax.scale_by_distance_over_gradients,
    "lbfgs without a line search": lambda: optax.lbfgs(1e-3, linesearch=None),
    "adam on a plateau": lambda: optax.chain(optax.adam(1e-3), optax.contrib.reduce_on_plateau()),
}
COMMON = {"adam", "adamw", "sgd", "muon", "lamb", "adafactor", "schedule_free_adamw", "inject_hyperparams"}
OPTIMISERS = {**{name: lambda function=function: made(function) for name, function in FOUND.items()}, **WRAPPED}


def test_optimisers_are_found():
    assert {"adamw", "lamb", "polyak_sgd", "prodigy", "dog", "dowg", "momo", "muon", "cocob"} <= set(FOUND)


@pytest.mark.parametrize(
    "name", [name if name in COMMON else pytest.param(name, marks=pytest.mark.slow) for name in OPTIMISERS]
)
def test_every_optimiser_takes_two_steps(name):
    optimizer = OPTIMISERS[name]()
    step, current = mfx.TrainStep(Probe(), optimizer), mfx.init_state(field(), optimizer, key=jr.key(1))
    for seed in range(2):
        current, _ = step(current, batch(seed))
    assert current.faults.total == 0
    assert all(np.isfinite(leaf).all() for leaf in leaves(current.field))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_update_is_given_loss_and_gradient(accumulation):
    def update(updates, state, parameters=None, *, value, grad, **extra):
        same = jnp.array([jnp.all(a == b) for a, b in zip(*map(jax.tree.leaves, (updates, grad)), strict=True)])
        return jax.tree.map(lambda g: -0.1 * g, updates), {"loss": value, "same": jnp.all(same)}

    asking = optax.GradientTransformationExtraArgs(
        lambda parameters: {"loss": jnp.zeros(()), "same": jnp.zeros((), bool)}, update
    )
    step = mfx.TrainStep(Probe(), asking, accumulation=accumulation)
    current, metrics = step(mfx.init_state(field(), asking, key=jr.key(1)), batch())
    assert current.opt_state["same"]
    np.testing.assert_allclose(current.opt_state["loss"], metrics["loss"].value, rtol=1e-6)
    assert current.opt_state["loss"] > 0


SEVERAL, FUNCTION = "optimizer must make an update in every step", "optimizer must need only the loss and its gradient"
UNSERVED = {
    "MultiSteps": (lambda: optax.MultiSteps(OPTIMIZER, 2).gradient_transformation(), SEVERAL, "MultiStepsState"),
    "in a chain": (
        lambda: optax.chain(optax.clip(1.0), optax.MultiSteps(OPTIMIZER, 2).gradient_transformation()),
        SEVERAL,
        "MultiStepsState",
    ),
    "apply_every": (lambda: optax.apply_every(2), SEVERAL, "ApplyEvery"),
    "sam": (lambda: optax.contrib.sam(OPTIMIZER, optax.sgd(0.1)), SEVERAL, "SAMState"),
    "lookahead": (
        lambda: optax.lookahead(OPTIMIZER, 5, 0.5),
        "optimizer must take the field's parameters as they are",
        "LookaheadState",
    ),
    "lbfgs": (optax.lbfgs, FUNCTION, "ScaleByZoomLinesearchState"),
    "backtracking": (
        lambda: optax.chain(optax.sgd(0.1), optax.scale_by_backtracking_linesearch(5)),
        FUNCTION,
        "ScaleByBacktrackingLinesearchState",
    ),
    "sophia": (lambda: optax.contrib.sophia(0.1), FUNCTION, "HutchinsonState"),
}


@pytest.mark.parametrize("name", UNSERVED)
def test_optimiser_that_a_step_cannot_serve_is_refused_where_the_state_is_made(name):
    make, rule, state = UNSERVED[name]
    with pytest.raises(ValueError, match=f"{rule}.*, got one whose state has {state}$"):
        mfx.init_state(field(), make(), key=jr.key(1))


@pytest.mark.parametrize(
    "build", [lambda o: mfx.TrainStep(Probe(), o), lambda o: mfx.init_state(field(), o, key=jr.key(1))]
)
def test_what_is_no_transformation_is_refused(unchecked, build):
    with pytest.raises(ValueError, match=r"optimizer must be an optax.GradientTransformation, got <function adam"):
        build(optax.adam)
    with pytest.raises(ValueError, match=r"every step, .*TrainStep's accumulation .*, got optax.MultiSteps"):
        build(optax.MultiSteps(OPTIMIZER, 2))


@pytest.mark.parametrize("wide", [False, True])
def test_numbers_of_python_in_a_state_follow_the_updates(wide):
    decaying = optax.GradientTransformation(
        lambda parameters: {"rate": 0.5, "count": 0},
        lambda updates, state, parameters=None: (
            jax.tree.map(lambda g: -state["rate"] * g, updates),
            {"rate": state["rate"] * 0.5, "count": state["count"] + 1},
        ),
    )
    objective = Probe()
    with jax.enable_x64(wide):  # where Python's numbers have 64 bits, and parameters 32
        start = mfx.nn.cast(field(), jnp.float32)
        step, current = mfx.TrainStep(objective, decaying), mfx.init_state(start, decaying, key=jr.key(1))
        for _ in range(3):
            current, _ = step(current, batch())
    assert current.opt_state["count"] == 3
    assert current.opt_state["rate"] == 0.5**4
    assert current.field.weight.dtype == jnp.float32
    assert len(objective.traces) == 1


INJECTED = optax.inject_hyperparams(optax.sgd)(0.1)


def test_learning_rate_set_by_hand_as_a_python_number_is_refused_by_name():
    current = mfx.init_state(field(), INJECTED, key=jr.key(1))
    current.opt_state.hyperparams["learning_rate"] = 0.01
    rule = r"state.opt_state.hyperparams\['learning_rate'\] must be an array of its dtype, got the Python number 0.01"
    with pytest.raises(ValueError, match=rule):
        mfx.TrainStep(Probe(), INJECTED)(current, batch())


def test_step_set_by_hand_as_a_python_number_is_refused_by_name(unchecked):
    current = eqx.tree_at(lambda s: s.step, state(()), 7)
    with pytest.raises(ValueError, match=r"state.step must be an array of its dtype, got the Python number 7"):
        mfx.TrainStep(Probe(), OPTIMIZER)(current, batch())


@pytest.mark.parametrize("rate", [jnp.float32(0.0), np.float32(0.0)])
def test_learning_rate_set_by_hand_as_an_array_is_used_without_another_trace(rate):
    objective = Probe()
    step, current = mfx.TrainStep(objective, INJECTED), mfx.init_state(field(), INJECTED, key=jr.key(1))
    current, _ = step(current, batch())
    before = np.asarray(current.field.weight)
    current.opt_state.hyperparams["learning_rate"] = rate
    current, _ = step(current, batch())
    np.testing.assert_array_equal(current.field.weight, before)
    assert len(objective.traces) == 1
