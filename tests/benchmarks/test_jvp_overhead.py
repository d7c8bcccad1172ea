"""The comparison of steps: what is asked for, what it concludes from measurements, and a whole run."""

import io
import json
import re

import equinox as eqx
import jax
import numpy as np
import pytest

from mf_eqx import measure, run
from mf_eqx.measure import Cost, Times


@pytest.fixture(scope="module")
def jvp_overhead(benchmark_script):
    return benchmark_script("jvp_overhead")


@pytest.fixture(scope="module")
def steps(benchmark_script):
    return benchmark_script("steps")


@pytest.fixture(scope="module")
def setting(jvp_overhead):
    return jvp_overhead.Setting("tiny")


# What is asked for


def test_settings_leave_the_base_along_one_axis_at_a_time(jvp_overhead):
    axes = {
        "model": ("S/4", "B/4"),
        "batch": (16, 32, 64),
        "dtype": ("bfloat16", "float32"),
        "form": ("default", "scan", "unroll"),
        "remat": ("none", "products", "full"),
        "attention": ("xla", "cudnn"),
        "share": (0.25, 0.75),
    }
    base, *others = jvp_overhead.settings(jvp_overhead.Config(**axes))
    assert base == tuple(values[0] for values in axes.values())
    changes = [{a: v for a, v in other._asdict().items() if v != getattr(base, a)} for other in others]
    assert changes == [{axis: value} for axis, values in axes.items() for value in values[1:]]


def test_flow_matching_comes_first_whatever_is_asked_for(jvp_overhead, setting):
    config = jvp_overhead.Config(variant=("SplitMeanFlow", "MeanFlow"))
    assert jvp_overhead.chosen(config, setting) == ["Flow Matching", "MeanFlow", "SplitMeanFlow"]


def test_finite_difference_is_left_out_of_bfloat16_alone(jvp_overhead, setting):
    everything = jvp_overhead.Config()
    assert tuple(jvp_overhead.chosen(everything, setting)) == jvp_overhead.COMPARED
    left = [name for name in jvp_overhead.COMPARED if name != "finite difference"]
    assert jvp_overhead.chosen(everything, setting._replace(dtype="bfloat16")) == left


def test_quick_is_the_small_model_in_the_base_setting(jvp_overhead):
    asked = jvp_overhead.Config(
        model=("XL/2", "B/4"), batch=(256,), dtype=("bfloat16",), attention=("cudnn",), rounds=3
    )
    quick = jvp_overhead.shrunk(asked)
    assert jvp_overhead.settings(quick) == [("tiny", 16, "float32", "default", "none", "xla", 0.25)]
    assert quick.rounds == 3
    assert set(jvp_overhead.COMPARED) - set(quick.variant) == {"stopped JVP", "finite difference"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": ()}, "model must be at least one of MLP, tiny, .*; got none"),
        ({"model": ("S/4", "S/3")}, "model must be among MLP, tiny, .*; got S/3"),
        ({"dtype": ("float16",)}, "dtype must be among float32, bfloat16; got float16"),
        ({"form": ("loop",)}, "form must be among default, scan, unroll; got loop"),
        ({"remat": ("some",)}, "remat must be among none, products, full; got some"),
        ({"attention": ("flash",)}, "attention must be among xla, cudnn, chunked, pallas; got flash"),
        ({"attention": ("xla", "cudnn")}, "attention cudnn must come with dtype bfloat16, got float32"),
        ({"model": ("MLP",), "remat": ("full",)}, "model MLP must come with form default, remat none and "),
        ({"variant": ("meanflow",)}, "variant must be among Flow Matching, .*; got meanflow"),
        ({"variant": ()}, "variant must be at least one of Flow Matching, .*; got none"),
        ({"variant": ("MeanFlow", "MeanFlow")}, "variant must differ from each other, got MeanFlow, MeanFlow"),
        ({"batch": ()}, r"batch must be positive numbers, got \(\)"),
        ({"batch": (16, 0)}, r"batch must be positive numbers, got \(16, 0\)"),
        ({"batch": (16, 6)}, "batch must be multiples of 4 with share 0.25, got 6"),
        ({"share": (0.25, 0.3)}, "batch must be multiples of 10 with share 0.3, got 16"),
        ({"share": (0.25, 0.001)}, "^share must be within 0.001 of a fraction"),
        ({"share": ()}, r"share must be numbers in \(0, 0.9\], got \(\)"),
        ({"share": (0.25, 1.0)}, r"share must be numbers in \(0, 0.9\], got \(0.25, 1.0\)"),
        ({"rounds": 0}, "rounds must be >= 1, got 0"),
    ],
)
def test_bad_values_are_refused_by_name(jvp_overhead, values, message):
    with pytest.raises(ValueError, match=message):
        jvp_overhead.Config(**values)


# What is concluded


def cost(**values):
    numbers = dict.fromkeys(("trace_seconds", "lower_seconds", "compile_seconds", "bytes_accessed"), 1.0)
    numbers |= dict.fromkeys(("program_lines", "argument_bytes", "output_bytes", "donated_bytes"), 1)
    return Cost(**{**numbers, "temporary_bytes": 3_000_000, "flops": 1.0, **values})


def measurement(jvp_overhead, setting, name, flops, wall, cpu=None):
    """One with these seconds; without, one that memory was too small for."""
    if wall is None:
        return jvp_overhead.Measurement(setting, name, flops, None, None, None, None)
    times = Times(np.array(wall, float), np.array(cpu or wall, float))
    return jvp_overhead.Measurement(setting, name, flops, 1.5, cost(), times, 7_000_000)


@pytest.fixture
def measured(jvp_overhead, setting):
    """0.04 s + operations / (10 GFLOP/s), and a step without times."""
    gigaflops = {"Flow Matching": 1, "MeanFlow": 1.1, "ImprovedMeanFlow": 1.2}
    known = [measurement(jvp_overhead, setting, n, 1e9 * x, [0.04 + x / 10] * 3) for n, x in gigaflops.items()]
    return [*known, measurement(jvp_overhead, setting, "guided", 1.5e9, None)]


def cells(text):
    """The rows of a Markdown table, by their first cell."""
    header, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line)
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def test_fit_recovers_fixed_cost_and_rate(jvp_overhead, measured):
    fit = jvp_overhead.fit(measured)
    np.testing.assert_allclose(fit, (0.04, 1e10, 1), rtol=1e-6)


def test_no_line_is_fitted_with_a_cost_below_zero(jvp_overhead, setting):
    for seconds in ([0.1, 0.3, 0.5], [0.5, 0.3, 0.1]):  # from operations 1, 2, 3: fixed cost -0.1; rate below zero
        points = [measurement(jvp_overhead, setting, "MeanFlow", i + 1.0, [s]) for i, s in enumerate(seconds)]
        assert jvp_overhead.fit(points) is None


def test_fit_takes_medians(jvp_overhead, setting, measured):
    disturbed = [m._replace(times=m.times and Times(np.add(m.times.wall, [0, 0, 9]), m.times.cpu)) for m in measured]
    np.testing.assert_allclose(jvp_overhead.fit(disturbed), jvp_overhead.fit(measured))


def test_fit_needs_three_different_numbers_of_operations(jvp_overhead, measured):
    assert jvp_overhead.fit(measured[:2]) is None
    assert jvp_overhead.fit([*measured[:2], measured[1]]) is None
    assert jvp_overhead.fit([*measured[:2], measured[3]]) is None  # without times it is no point


def test_ratio_is_the_median_of_the_rounds_ratios(jvp_overhead, setting):
    base = measurement(jvp_overhead, setting, "Flow Matching", 1.0, [1, 2, 4], [1, 1, 1])
    step = measurement(jvp_overhead, setting, "MeanFlow", 1.0, [2, 2, 12], [5, 6, 9])
    assert jvp_overhead.ratio(step, base, "wall") == 2  # the medians' ratio is 1
    assert jvp_overhead.ratio(step, base, "cpu") == 6


def test_ratio_is_unknown_if_either_step_has_no_times(jvp_overhead, measured):
    assert jvp_overhead.ratio(measured[3], measured[0], "wall") is None
    assert jvp_overhead.ratio(measured[0], measured[3], "wall") is None


def test_table_holds_times_against_flow_matching_and_the_peak(jvp_overhead, measured):
    row = cells(jvp_overhead.tabulate(measured, peak=2e10))["ImprovedMeanFlow"]
    shown = {
        "GFLOP": "1.2",
        "/ FM": "1.200",
        "XLA / FM": "1.500",
        "ms": "160.0",
        "least": "160.0",
        "spread": "0%",
        "CPU ms": "160.0",
    }
    shown |= {"time / FM": "1.14", "CPU / FM": "1.14", "of peak": "38%"}  # 0.16 / 0.14; 1.2 / 0.16 / 20
    shown |= {"temporary MB": "3", "allocator MB": "7", "trace s": "1.00", "lower s": "1.00", "compile s": "1.00"}
    assert row == {"step": "ImprovedMeanFlow", **shown}


def test_table_shows_a_step_that_memory_was_too_small_for(jvp_overhead, measured):
    row = cells(jvp_overhead.tabulate(measured, peak=2e10))["guided"]
    assert {header: cell for header, cell in row.items() if cell != "-"} == {
        "step": "guided",
        "GFLOP": "1.5",
        "/ FM": "1.500",
    }


def test_description_says_the_share_of_fixed_cost(jvp_overhead, setting, measured):
    text = jvp_overhead.describe(measured, peak=2e10)
    assert text.startswith(f"**{setting}**")
    assert "Matrix products reach 20 GFLOP/s here." in text
    assert re.search(r"40\.0 ms \+ GFLOP / 10 s .*: 29% of a Flow Matching step", text)  # 0.04 / 0.14


@pytest.mark.parametrize("without", ["enough variants", "Flow Matching"])
def test_description_does_without_a_fit(jvp_overhead, measured, without):
    lost = measured[0]._replace(times=None, cost=None)
    chosen = measured[:2] if without == "enough variants" else [lost, *measured[1:], measured[1]._replace(flops=2e9)]
    text = jvp_overhead.describe(chosen, peak=2e10)
    assert "Matrix products" in text
    assert "Fit" not in text


def test_picture_does_without_a_setting_that_has_no_base(jvp_overhead, measured, tmp_path):
    pytest.importorskip("matplotlib")
    lost = measured[0]._replace(times=None, cost=None)
    jvp_overhead.save_figure(tmp_path / "picture.png", [measured, [lost, *measured[1:]]])
    assert (tmp_path / "picture.png").stat().st_size > 0


# Memory


def test_only_lack_of_memory_is_passed_over(jvp_overhead, setting):
    stream = io.StringIO()
    progress = run.Progress(1, stream=stream)
    with jvp_overhead.telling_memory(progress, setting, "guided"):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")
    assert f"{setting}: guided needs more memory than there is" in stream.getvalue()
    for error in (jax.errors.JaxRuntimeError("INTERNAL: no"), ValueError("RESOURCE_EXHAUSTED")):
        with pytest.raises(type(error)), jvp_overhead.telling_memory(progress, setting, "guided"):
            raise error


@pytest.mark.parametrize("fails", ["while it is compiled", "when it is run"])
def test_a_step_without_memory_costs_the_others_nothing(jvp_overhead, steps, setting, fails, monkeypatch):
    chosen = ("Flow Matching", "MeanFlow", "SplitMeanFlow")
    names = {id(steps.variants(0.25)[name].objective): name for name in chosen}

    def compile_program(step, state, batch, donate):
        name = names[id(step.objective)]
        if fails == "while it is compiled" and name == "MeanFlow":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: compiling")

        def take(state, batch):
            arrays = [leaf for leaf in jax.tree.leaves(state) if eqx.is_array(leaf)]
            assert not any(leaf.is_deleted() for leaf in arrays)
            if name == "MeanFlow":
                for leaf in arrays:  # donated, hence gone
                    leaf.delete()
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: running")
            return state, {}

        # The step that fails stands between the others.
        program = take
        program.cost = cost(temporary_bytes=chosen.index(name))
        return program

    monkeypatch.setattr(measure, "compile_program", compile_program)
    setting, config = setting._replace(model="MLP"), jvp_overhead.Config(model=("MLP",), variant=chosen, rounds=2)
    meter = jvp_overhead.Meter(run.Progress(1, stream=io.StringIO()))
    found = {m.name: m.times for m in jvp_overhead.measured(config, setting, meter)}
    assert tuple(found) == chosen
    assert found["MeanFlow"] is None
    assert found["Flow Matching"].wall.size == found["SplitMeanFlow"].wall.size == 2


# A whole run


@pytest.fixture(scope="module")
def directory(finished):
    return finished(
        "jvp_overhead", model=("tiny",), batch=(4,), variant=("Flow Matching", "MeanFlow"), rounds=2, count=False
    )


@pytest.mark.slow
def test_a_run_leaves_times_of_each_variant(directory):
    records = json.loads((directory / "results.json").read_text())
    assert [record["variant"] for record in records] == ["Flow Matching", "MeanFlow"]
    for record in records:
        seconds = np.array([record["wall_seconds"], record["cpu_seconds"]], float)
        assert seconds.shape == (2, 2)
        assert np.isfinite(seconds).all()
        assert record["flops"] > 0
        assert record["cost"]["compile_seconds"] > 0


@pytest.mark.slow
def test_a_run_leaves_a_table_and_a_picture(directory):
    assert set(cells((directory / "results.md").read_text())) == {"Flow Matching", "MeanFlow"}
    assert (directory / "jvp_overhead.png").stat().st_size > 0
