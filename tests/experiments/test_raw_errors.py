"""Raw errors at stages of a training: that the two targets differ by the noise times the Jacobian of a step, and what
the command line leaves."""

import json

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fields import filled

import mf_eqx as mfx
from mf_eqx import run


@pytest.fixture(scope="module")
def raw_errors(experiment):
    return experiment("raw_errors")


def test_residuals_of_two_velocities_differ_by_the_noise_times_the_jacobian_of_a_step(x64):
    field = filled(lambda: mfx.MLP(3, width=8, depth=1, key=jr.key(0)))

    @jax.jit
    def difference(z, own, mean, r, t):
        residuals = [mfx.MeanFlow().residual(field, mfx.Row(z, v, r, t)) for v in (own, mean)]
        jacobian = jax.jacobian(lambda z: z - (t - r) * field(z, r, t))(z)
        return residuals[0] - residuals[1], jacobian @ (mean - own)

    found, expected = difference(*np.random.default_rng(1).standard_normal((3, 3)), jnp.asarray(0.2), jnp.asarray(0.7))
    assert found.dtype == np.float64 and np.abs(expected).min() > 1e-3
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.slow
def test_a_run_leaves_a_row_for_each_stage_and_a_figure(raw_errors, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = "--steps 100 --stages 2 --rounds 2"
    run.main(raw_errors.main, raw_errors.Config(), argv=arguments.split())
    (directory,) = (tmp_path / "runs").glob("*/*")
    assert (directory / "raw_errors.png").stat().st_size > 0
    rows = json.loads((directory / "results.json").read_text())
    assert [row["step"] for row in rows] == [50, 100]
    assert all(row[f"r = t, {raw_errors.ALL}"] < row[f"r = t, {raw_errors.OWN}"] for row in rows)
    assert rows[1]["distance"] < rows[0]["distance"]


def test_stages_that_do_not_divide_the_steps_are_refused(raw_errors, refusal_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refusal_of(run.main, raw_errors.main, raw_errors.Config(), argv=["--stages", "7"])
    assert "--stages must divide the 3000 steps, got 7" in line
