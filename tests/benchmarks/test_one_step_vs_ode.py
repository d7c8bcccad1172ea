"""One step against ODE solvers: samplers on a field in closed form, the verdict on made-up points, and a whole run."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fields import GaussianField
from own_methods import OWN

import mf_eqx as mfx

ONE = "u of MeanFlow"


@pytest.fixture(scope="module")
def one_step_vs_ode(benchmark_script):
    return benchmark_script("one_step_vs_ode")


@pytest.fixture(scope="module")
def gaussian():
    return GaussianField(jnp.array([1.0, -2.0]), 0.5)


class Counting(mfx.AbstractField):
    """A field that tells the host of each evaluation."""

    field: mfx.AbstractField
    times: list

    def __call__(self, z, r, t, condition=None, *, key=None):
        jax.debug.callback(lambda t: self.times.append(float(t)), t)
        return self.field(z, r, t, condition, key=key)


# Samplers


def error(sampler, field):
    """Largest distance of samples from the ODE's solution, and evaluations."""
    eps = jr.normal(jr.key(0), (6, 2))
    found, evaluations = sampler.generate(eps, None)
    expected = jax.vmap(lambda z: field.flow(z, 0.0, 1.0))(eps)
    return float(jnp.abs(found - expected).max()), float(evaluations)


def test_average_velocity_in_one_step_is_exact(one_step_vs_ode, gaussian):
    sampler = one_step_vs_ode.fixed(ONE, gaussian, mfx.sample, 1, 1)
    wrong, evaluations = error(sampler, gaussian)
    assert wrong < 1e-5
    assert evaluations == 1
    assert str(sampler) == f"{ONE}, 1 step"


@pytest.mark.parametrize(("name", "order"), [("Euler", 1), ("Heun", 2)])
def test_fixed_steps_converge_with_their_order(one_step_vs_ode, gaussian, name, order):
    method, per_step = one_step_vs_ode.FIXED[name]
    few, many = (error(one_step_vs_ode.fixed(name, gaussian, method, n, per_step), gaussian)[0] for n in (16, 32))
    assert many < 0.1
    assert 0.8 * 2**order < few / many < 1.2 * 2**order


@pytest.mark.parametrize(("name", "steps"), [("Euler", 3), ("Heun", 3)])
def test_evaluations_of_fixed_steps_are_those_that_are_made(one_step_vs_ode, gaussian, name, steps):
    method, per_step = one_step_vs_ode.FIXED[name]
    field = Counting(gaussian, [])
    _, evaluations = one_step_vs_ode.fixed(name, field, method, steps, per_step).generate(jnp.ones((1, 2)), None)
    jax.effects_barrier()
    assert len(field.times) == evaluations


@pytest.fixture(scope="module")
def solved(one_step_vs_ode, gaussian):
    """The error of one sample of an adaptive solver, evaluations as they are told, and those that were made."""

    @functools.cache
    def solve(name, tolerance):
        field, eps = Counting(gaussian, []), jnp.ones((1, 2))
        found, told = one_step_vs_ode.adaptive(name, field, name, tolerance).generate(eps, None)
        jax.effects_barrier()
        return float(jnp.abs(found[0] - gaussian.flow(eps[0], 0.0, 1.0)).max()), float(told), len(field.times)

    return solve


@pytest.mark.parametrize("name", ["Bosh3", "Tsit5"])
def test_adaptive_steps_are_as_exact_as_asked_for(solved, name):
    wrong, *_ = solved(name, 1e-4)
    assert wrong < 1e-3  # in all, where each step may be wrong by 1e-4


def test_a_smaller_tolerance_is_more_exact_and_costs_more(solved):
    (rough, few, _), (fine, many, _) = solved("Bosh3", 1e-2), solved("Bosh3", 1e-4)
    assert fine < rough / 10
    assert many > 1.5 * few


@pytest.mark.parametrize("name", ["Bosh3", "Tsit5"])
def test_evaluations_of_adaptive_steps_are_those_that_are_made(solved, name):
    _, told, made = solved(name, 1e-4)
    assert told == made


def test_every_solver_is_tried_on_v_of_every_network(one_step_vs_ode, gaussian):
    config = one_step_vs_ode.Config(euler=(1, 4), heun=(2,), tolerances=(0.1, 0.01))
    names = [str(s) for s in one_step_vs_ode.samplers(config, {"MeanFlow": gaussian, "Flow Matching": gaussian})]
    settings = {"Euler": ("1 step", "4 steps"), "Heun": ("2 steps",)}
    settings |= dict.fromkeys(("Bosh3", "Tsit5"), ("tolerance 0.1", "tolerance 0.01"))
    on_v = [
        f"{solver} on v of {network}, {setting}"
        for network in ("MeanFlow", "Flow Matching")
        for solver, several in settings.items()
        for setting in several
    ]
    expected = [f"{ONE}, 1 step", f"{ONE}, 2 steps", f"{ONE}, 4 steps", *on_v]
    assert names == expected


def test_every_method_is_tried_in_as_many_steps_as_it_learns(one_step_vs_ode, gaussian):
    config = one_step_vs_ode.Config(methods=("Shortcut", "ConsistencyTraining"), euler=(1,), heun=(1,))
    fields = dict.fromkeys(("Shortcut", "ConsistencyTraining", "Flow Matching"), gaussian)
    samplers = one_step_vs_ode.samplers(config, fields)
    averages = [str(s) for s in samplers if s.family.startswith("u ")]
    steps = ["1 step", "2 steps", "4 steps"]
    # Consistency training learns u(z, 0, t) alone: the first of two steps is not of that kind.
    assert averages == [*(f"u of Shortcut, {number}" for number in steps), "u of ConsistencyTraining, 1 step"]
    assert {s.family for s in samplers if s.family.startswith("Euler")} == {f"Euler on v of {name}" for name in fields}


@pytest.mark.parametrize("family", ["u of MeanFlow", "Euler on v of Flow Matching"])
def test_a_family_names_its_sampler_and_its_network(one_step_vs_ode, family):
    expected = {"u of MeanFlow": ("u", "MeanFlow"), "Euler on v of Flow Matching": ("Euler", "Flow Matching")}
    assert one_step_vs_ode.parts(family) == expected[family]


# Verdict


def point(one_step_vs_ode, family, evaluations, seconds, distance):
    return one_step_vs_ode.Point("toy", family, "1 step", evaluations, seconds, 0.0, distance)


def test_verdict_names_the_cheapest_of_those_as_near_by_either_cost(one_step_vs_ode):
    points = [
        point(one_step_vs_ode, ONE, 1, 0.5, 0.2),
        point(one_step_vs_ode, "Euler", 2, 0.1, 0.3),  # cheap, but not as near
        point(one_step_vs_ode, "Heun", 8, 5.0, 0.2),
        point(one_step_vs_ode, "Tsit5", 16, 2.0, 0.1),
    ]
    (line,) = one_step_vs_ode.verdict(points).splitlines()
    assert line == (
        "- u of MeanFlow in 1 step (0.2): Heun needs 8 times the evaluations (8), Tsit5 4 times the seconds."
    )


def test_verdict_says_if_no_solver_comes_as_near(one_step_vs_ode):
    points = [
        point(one_step_vs_ode, ONE, 1, 0.5, 0.2),
        point(one_step_vs_ode, ONE, 2, 0.5, 0.4),
        point(one_step_vs_ode, "Euler", 2, 0.1, 0.3),
    ]
    near, far = one_step_vs_ode.verdict(points).splitlines()
    assert near == "- u of MeanFlow in 1 step (0.2): no solver on v of any network comes as near."
    assert "Euler needs 1 times the evaluations" in far


def test_verdict_holds_every_method_against_all_solvers_and_no_method_against_another(one_step_vs_ode):
    points = [
        point(one_step_vs_ode, "u of MeanFlow", 1, 0.5, 0.2),
        point(one_step_vs_ode, "u of Shortcut", 1, 0.5, 0.1),
        point(one_step_vs_ode, "u of SoFlow", 1, 0.5, float("nan")),
        point(one_step_vs_ode, "Euler on v of Shortcut", 8, 1.0, 0.15),
    ]
    first, second, third = one_step_vs_ode.verdict(points).splitlines()
    assert first.startswith("- u of MeanFlow in 1 step (0.2): Euler on v of Shortcut needs 8 times the evaluations")
    assert second == "- u of Shortcut in 1 step (0.1): no solver on v of any network comes as near."
    assert third == "- u of SoFlow in 1 step (nan): samples are not finite."


# What is trained


def test_networks_on_digits_get_target_and_teacher_as_their_methods_allow(one_step_vs_ode):
    methods = ("MeanFlow", "ConsistencyTraining", "TerminalVelocityMatching")
    config, digits = one_step_vs_ode.Config(methods=methods), one_step_vs_ode.digits
    settings = one_step_vs_ode.digits_settings(config)
    target = digits.stable_target(settings, digits.load(settings).train)
    objectives = one_step_vs_ode.digits_objectives(config, settings, target)
    assert [type(objective.identity).__name__ for objective in objectives.values()] == [*methods, "NoneType"]
    with_target = [name for name, objective in objectives.items() if objective.stable_target is not None]
    assert with_target == ["MeanFlow", "TerminalVelocityMatching", "Flow Matching"]
    assert [name for name, objective in objectives.items() if objective.needs_teacher] == ["TerminalVelocityMatching"]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "mine.py"
    path.write_text(OWN)
    return str(path)


def test_identities_of_a_file_join_the_methods(one_step_vs_ode, own):
    config = one_step_vs_ode.Config(identity=own, methods=("Mine", "Shortcut"))
    assert one_step_vs_ode.toy_settings(config, "checkerboard").methods == ("Mine", "Shortcut", "FlowMatching")
    objectives = one_step_vs_ode.digits_objectives(config, one_step_vs_ode.digits_settings(config))
    assert type(objectives["Mine"].identity).__name__ == "Mine"


def test_a_method_that_does_not_fit_into_the_batch_is_refused_before_anything_trains(one_step_vs_ode, own):
    message = "methods must take the batch of digits, 64; got Triples, which takes multiples of 6"
    with pytest.raises(ValueError, match=message):
        one_step_vs_ode.Config(identity=own, methods=("Triples",), data=("digits",))
    with pytest.raises(ValueError, match=r"batch must be a positive multiple of 6.* common settings of Triples"):
        one_step_vs_ode.Config(identity=own, methods=("Triples",), data=("checkerboard",))


# A whole run


SMALL = {"toy_steps": 2, "samples": 20, "euler": (1,), "heun": (1,), "tolerances": (0.1,), "rounds": 1}


@pytest.fixture(scope="module")
def directory(finished):
    return finished("one_step_vs_ode", data=("three_gaussians",), **SMALL)


@pytest.fixture(scope="module")
def records(directory):
    return json.loads((directory / "results.json").read_text())


@pytest.mark.slow
def test_a_run_leaves_costs_and_distances_of_every_sampler(records):
    assert len(records) == 3 + 2 * 4
    for record in records:
        numbers = [record[name] for name in ("evaluations", "seconds", "distance")]
        assert np.isfinite(numbers).all()
        assert min(numbers) > 0


@pytest.mark.slow
def test_a_run_leaves_a_table_with_the_exact_distance_and_a_picture(directory):
    text = (directory / "results.md").read_text()
    assert text.startswith("**three_gaussians**")
    assert "(exact average velocity, 1 step): " in text
    assert "20 samples." in text
    assert (directory / "one_step_vs_ode.png").stat().st_size > 0


@pytest.mark.slow
def test_a_run_of_two_other_methods_has_them_in_table_verdict_and_picture(finished):
    methods = ("Shortcut", "ConsistencyTraining")
    directory = finished("one_step_vs_ode", data=("three_gaussians",), methods=methods, **SMALL)
    assert len(json.loads((directory / "results.json").read_text())) == 3 + 1 + 3 * 4
    text = (directory / "results.md").read_text()
    for name in methods:
        assert re.search(rf"\| u of {name} +\| 1 step ", text)
        assert f"- u of {name} in 1 step (" in text
    assert "MeanFlow" not in text
    assert (directory / "one_step_vs_ode.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": ()}, "data must be at least one of digits, .*; got none"),
        ({"data": ("digits", "moons")}, "data must be among digits, .*; got moons"),
        ({"methods": ()}, "methods must be at least one of .*; got none"),
        ({"methods": ("MeanFlow", "Flow")}, "methods must be among .*MeanFlow, .*; got Flow"),
        ({"methods": ("FlowMatching",)}, "methods must be among .*; got FlowMatching"),
        ({"methods": ("Exact",)}, "methods must be among .*; got Exact"),
        ({"methods": ("MeanFlow", "MeanFlow")}, "methods must differ from each other, got MeanFlow, MeanFlow"),
        ({"identity": "none.py"}, r"identity must be a Python file, got none\.py"),
        ({"euler": ()}, r"euler must be positive numbers, got \(\)"),
        ({"heun": (1, 0)}, r"heun must be positive numbers, got \(1, 0\)"),
        ({"tolerances": (-0.1,)}, r"tolerances must be positive numbers, got \(-0.1,\)"),
        ({"toy_steps": 0}, "toy_steps must be >= 1, got 0"),
        ({"digits_steps": 0}, "digits_steps must be >= 1, got 0"),
        ({"samples": 9}, "samples must be >= 10, got 9"),
        ({"rounds": 0}, "rounds must be >= 1, got 0"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
    ],
)
def test_bad_values_are_refused_by_name(one_step_vs_ode, values, message):
    with pytest.raises(ValueError, match=message):
        one_step_vs_ode.Config(**values)


def test_short_trainings_on_digits_warm_up_and_average_for_as_short_a_part(one_step_vs_ode):
    settings = [one_step_vs_ode.digits_settings(one_step_vs_ode.Config(digits_steps=steps)) for steps in (3000, 300)]
    whole = one_step_vs_ode.digits.Config()
    assert whole.steps == 3000
    assert (settings[0].warmup, settings[0].decay) == (whole.warmup, whole.decay)
    assert settings[1].warmup == whole.warmup // 10
    np.testing.assert_allclose(settings[1].decay ** 300, whole.decay**3000)
