"""The forms of a step."""

import json

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
        for one, other in zip(found[form], found["loops"], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_a_run_compares_every_form_with_the_first(finished):
    directory = finished("step_forms", batch=4, rounds=1)
    records = json.loads((directory / "results.json").read_text())
    assert [r["form"] for r in records] == ["loops", "kinds of rows unrolled", "blocks unrolled", "plain"]
    assert records[0]["ratio"] == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "MLP"}, "model must be among tiny, .*; got MLP"),
        ({"form": ()}, "form must be one or more of loops, .*; got none"),
        ({"form": ("loops", "no")}, "form must be one or more of loops, .*; got loops, no"),
        ({"batch": 6}, "batch must be a positive multiple of 4, got 6"),
        ({"rounds": 0}, "rounds must be >= 1, got 0"),
    ],
)
def test_bad_values_are_refused_by_name(step_forms, values, message):
    with pytest.raises(ValueError, match=message):
        step_forms.Config(**values)
