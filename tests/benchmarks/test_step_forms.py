"""The forms of a step."""

import json
from types import SimpleNamespace

import jax
import jax.random as jr
import numpy as np
import pytest

from mf_eqx import measure


@pytest.fixture(scope="module")
def step_forms(benchmark_script):
    return benchmark_script("step_forms")


@pytest.mark.slow
def test_all_forms_take_the_same_step(step_forms, resized):
    setting = step_forms.Setting("tiny", 4)
    with resized():
        state, batch = step_forms.make_state(setting, key=jr.key(0)), step_forms.make_batch(setting, key=jr.key(1))
        found = {}
        for form in step_forms.FORMS:
            step, shapes = step_forms.make_form(form, setting, "guided")
            program = measure.compile_program(step, shapes, batch)
            after, _ = program(jax.tree.unflatten(jax.tree.structure(shapes), jax.tree.leaves(state)), batch)
            found[form] = [np.asarray(leaf) for leaf in jax.tree.leaves(after.opt_state)]
    for form in step_forms.FORMS[1:]:
        for one, other in zip(found[form], found["loop"], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_a_run_compares_every_form_with_the_first(finished):
    directory = finished("step_forms", batch=4, rounds=1)
    records = json.loads((directory / "results.json").read_text())
    assert [r["form"] for r in records] == ["loop", "plain", "unrolled"]
    assert records[0]["ratio"] == 1


@pytest.fixture
def small_memory(step_forms, monkeypatch):
    """A device on which steps with a remat fit, and the plain one does not."""

    def make_form(form, setting, variant):
        return (form, setting.remat), (1.0,)

    def compile_program(step, *rest, **options):
        if step[0] == "plain" or step[1] == "none":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return lambda state, batch: (state, 0.0)

    monkeypatch.setattr(step_forms, "make_form", make_form)
    monkeypatch.setattr(step_forms, "make_state", lambda setting, key: (1.0,))
    monkeypatch.setattr(measure, "compile_program", compile_program)


def test_the_first_form_is_tried_with_the_next_remat_and_others_are_left_out(step_forms, small_memory):
    steps = step_forms.fitting(step_forms.Setting("tiny", 4), "guided", "loop")
    assert steps.setting.remat == "products"
    assert [steps.add(form) for form in ("plain", "unrolled")] == [False, True]
    assert list(steps.programs) == ["loop", "unrolled"]


def test_a_step_that_never_fits_is_refused(step_forms, small_memory):
    with pytest.raises(ValueError, match="batch must be smaller than 4: tiny needs more memory"):
        step_forms.fitting(step_forms.Setting("tiny", 4), "guided", "plain")


def test_costs_are_shown_before_any_time_is_known(step_forms, small_memory):
    steps = step_forms.fitting(step_forms.Setting("tiny", 4), "guided", "loop")
    cost = measure.Cost(1, 1, 2.5, 1, 1, 1, 1, 3_000_000, 1, 1)
    steps.programs["loop"] = SimpleNamespace(cost=cost)
    text, records = step_forms.described(steps, ("loop", "plain"), {})
    assert [(r["wall_seconds"], r["cost"] and r["cost"]["compile_seconds"]) for r in records] == [
        (None, 2.5),
        (None, None),
    ]
    assert "not enough memory" in text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "MLP"}, "model must be among tiny, .*; got MLP"),
        ({"form": ()}, "form must be at least one of loop, .*; got none"),
        ({"form": ("loop", "no")}, "form must be among loop, .*; got no"),
        ({"batch": 6}, "batch must be a positive multiple of 4, got 6"),
        ({"rounds": 0}, "rounds must be >= 1, got 0"),
    ],
)
def test_bad_values_are_refused_by_name(step_forms, values, message):
    with pytest.raises(ValueError, match=message):
        step_forms.Config(**values)
