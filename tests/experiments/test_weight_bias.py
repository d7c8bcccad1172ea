"""The study of the weight from its command line: what it leaves, and that the power alone biases the exact flow."""

import json
import re

import pytest

from mf_eqx import run


@pytest.fixture(scope="module")
def weight_bias(experiment):
    return experiment("weight_bias")


@pytest.fixture(scope="module")
def finished(weight_bias, tmp_path_factory):
    root = tmp_path_factory.mktemp("weight_bias")
    arguments = "--steps 4 --seeds 1 --powers 0 0.5 --offsets 1 --samples 100 --rows 50 --data three_gaussians"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        run.main(weight_bias.main, weight_bias.Config(), argv=arguments.split())
    (directory,) = (root / "runs").glob("*/*")
    return directory


@pytest.mark.slow
def test_a_run_leaves_results_and_pictures(finished):
    for name in ("config.json", "results.md", "results.json", "weight_bias.png", "samples.png"):
        assert (finished / name).stat().st_size > 0


@pytest.mark.slow
def test_exact_flow_is_biased_by_the_power_alone(finished, weight_bias):
    rows = json.loads((finished / "results.json").read_text())
    error = {row["power"]: row["error of v"] for row in rows if row["kind"] == weight_bias.EXACT}
    assert error[0.0] < 1e-8  # float32
    assert error[0.5] > 1e-4


def test_targets_are_compared_at_every_weight(weight_bias):
    cells = weight_bias.cells(weight_bias.Config(powers=(0.0, 1.0), offsets=(0.01, 1.0), seeds=2))
    kinds = [weight_bias.EXACT, weight_bias.CONDITIONAL, weight_bias.MARGINAL]
    assert [sum(cell.kind == kind for cell in cells) for kind in kinds] == [3, 6, 6]  # p = 0 has no offset


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--seeds 0", r"--seeds must lie in \[1, 100\], got 0"),
        ("--powers -1", "--powers must be 0 or lie in"),
        ("--offsets 0", "--offsets must be > 0, got 0.0"),
        ("--data moons", "--data must be among"),
    ],
)
def test_bad_input_ends_in_one_line(weight_bias, arguments, message, refusal_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refusal_of(run.main, weight_bias.main, weight_bias.Config(), argv=arguments.split())
    assert re.search(message, line), line
