"""Any value for any field of any experiment: a configuration, or one line and exit code 2. Never a traceback."""

import contextlib
import dataclasses
import functools
import importlib
import io
import itertools
import pathlib
import signal
import sys
import typing

import jax
import pytest

from mf_eqx import run

for package in ("tyro", "hypothesis", "matplotlib", "sklearn", "beartype"):
    pytest.importorskip(package)

from hypothesis import given, HealthCheck, settings, strategies as st  # noqa: E402

EXPERIMENTS, BENCHMARKS = (pathlib.Path(__file__).parents[2] / name for name in ("experiments", "benchmarks"))
SCRIPTS = ("toy_2d", "digits", "ablations", "weight_bias", "tangent_study", "prepare_data")
ALL_SCRIPTS = (*SCRIPTS, "images", "cifar10", "imagenet_latents", "evaluate", "generate", "prepare_latents")
ALL_SCRIPTS += ("import_weights", "pixels", "post_train", "tokenizer")
TIMED = ("checkpoint_blocking", "compile_time", "device_scaling", "jvp_accuracy", "jvp_overhead", "loader_throughput")
TIMED += ("one_step_vs_ode", "sampling_throughput")
LONGEST = 60  # seconds for one command line; usual are 0.02 to 0.2


@pytest.fixture(scope="module", autouse=True)
def alone():
    """Scripts can be imported, and several processes are never really joined."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        patch.syspath_prepend(EXPERIMENTS)
        patch.setattr(jax.distributed, "initialize", lambda *flags, **options: None)
        patch.setattr(sys, "argv", ["script.py"])
        patch.delenv("MF_EQX_TRACEBACK", raising=False)
        yield


@functools.cache
def presets(script):
    module = importlib.import_module(script)
    return getattr(module, "PRESETS", None) or module.Config()


def first(script):
    found = presets(script)
    return found if dataclasses.is_dataclass(found) else next(iter(found.values()))[1]


def too_long(*_):
    raise TimeoutError(f"longer than {LONGEST} s")


def check(script, arguments):
    """The configuration that comes out, or the line that refuses."""
    out, err, found = io.StringIO(), io.StringIO(), []
    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LONGEST)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run.main(lambda config: found.append(config), presets(script), argv=arguments)
    except SystemExit as ended:
        assert ended.code == 2, (ended.code, arguments)
        assert err.getvalue().startswith("script.py: error: ") and err.getvalue().count("\n") == 1, err.getvalue()
        assert out.getvalue() == "" and not found
    else:
        assert len(found) == 1 and err.getvalue() == ""
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return found[0] if found else err.getvalue()


STRANGE = [
    *("", " ", "x", "nan", "inf", "-inf", "-1", "0", "-0.0", "1e400", "1e-400", "1e300", "1e30", "0.5", "1.5", "1_000"),
    *(
        "None",
        "True",
        "true",
        "٣",
        "½",
        "1,2",
        "a b",
        "a\nb",
        "--",
        "-",
        "---",
        "../..",
        "/",
        "a/" * 2000,
        "\x1b[31m",
        "{}",
    ),
    *(str(sign * 2**bits + 1) for bits in (31, 32, 63, 64, 100) for sign in (1, -1)),
]
VALUES = st.one_of(
    st.sampled_from(STRANGE),
    st.integers().map(str),
    st.floats().map(str),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20),
)


@st.composite
def command_lines(draw, names):
    arguments = []
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)):
        value = draw(VALUES)
        arguments += draw(
            st.sampled_from([[f"--{name}={value}"], [f"--{name}", value], [f"--{name}"], [f"--no-{name}"]])
        )
    return arguments


def test_without_arguments_every_script_has_a_configuration():
    for script in SCRIPTS[:-1]:
        assert check(script, []) == first(script)


def test_a_good_value_comes_out():
    assert check("digits", ["--learning-rate", "1e-4"]).learning_rate == 1e-4


# These make hundreds of configurations.
LONG = ("ablations", "weight_bias", "tangent_study")


def quick(scripts):
    return [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in scripts]


@pytest.mark.parametrize("script", quick(SCRIPTS))
def test_any_values_make_a_configuration_or_one_line(script):
    names = [field.name.replace("_", "-") for field in dataclasses.fields(first(script))]

    @settings(max_examples=16, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(command_lines(names))
    def holds(arguments):
        check(script, arguments)

    holds()


@pytest.mark.parametrize(
    ("script", "flag"),
    [("digits", "--depth"), ("digits", "--width"), ("weight_bias", "--seeds"), ("toy_2d", "--depth")],
)
@pytest.mark.parametrize("value", [2**31, 2**63 + 1])
def test_huge_sizes_are_judged_at_once(script, flag, value):
    check(script, [flag, str(value)])


def numbers(script):
    """Each flag of a script that takes a number, or several, with how many it has by default and of what type."""
    for field in dataclasses.fields(first(script)):
        value = getattr(first(script), field.name)
        several = value if isinstance(value, tuple) else (value,)
        if several and all(type(one) in (int, float) for one in several):
            yield field.name.replace("_", "-"), len(several), type(several[0])


@pytest.mark.parametrize("script", quick(ALL_SCRIPTS))
def test_numbers_that_nothing_computes_with_are_refused_in_one_line(script):
    sizes = itertools.cycle(("2147483648", "4294967296", "1" + 30 * "0"))
    for flag, count, kind in numbers(script):
        for value in ("nan", "inf") if kind is float else (next(sizes),):
            line = check(script, [f"--{flag}", *[value] * count])
            assert isinstance(line, str) and (flag in line or flag.replace("-", "_") in line), (flag, value, line)


def integers(script):
    """Each flag of a script that takes an integer, or several, with how many."""
    hints = typing.get_type_hints(type(first(script)))
    for field in dataclasses.fields(first(script)):
        kinds = {hints[field.name], *typing.get_args(hints[field.name])}
        kinds |= {one for kind in kinds for one in typing.get_args(kind)}
        if int in kinds:
            value = getattr(first(script), field.name)
            count = len(value) if isinstance(value, tuple) and value else 1
            yield field.name.replace("_", "-"), 2 if field.name == "cell" else count


@pytest.mark.parametrize("script", quick([*ALL_SCRIPTS, *TIMED]))
def test_sizes_of_all_magnitudes_make_a_configuration_or_one_line(script):
    importlib.import_module(script)
    flags = st.sampled_from(list(integers(script)))
    magnitudes = st.integers(10, 31).flatmap(lambda bits: st.integers(2 ** (bits - 1), 2**bits - 1))
    multiples = magnitudes.map(lambda size: max(size // 64 * 64, 64))  # which the rules on divisors let through

    @settings(max_examples=7, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(flags, magnitudes | multiples)
    def holds(flag, size):
        name, count = flag
        check(script, [f"--{name}", *[str(size)] * count])

    holds()


def ended(script, arguments):
    """Exit code, lines of error, and what is left in the directory that the script is run in."""
    module, err = importlib.import_module(script), io.StringIO()
    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LONGEST)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            run.main(module.main, presets(script), argv=arguments.split())
    except SystemExit as stop:
        return stop.code, err.getvalue().splitlines(), list(pathlib.Path.cwd().iterdir())
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    raise AssertionError(f"{script} {arguments} was to end before it computes")


HUGE, EVEN = 2**31 - 1, 2_000_000_000


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        *(("toy_2d", f"--{name} {EVEN} --dry-run") for name in ("dit-batch", "seeds", "batch", "workers", "rows")),
        *(("digits", f"--{name} {EVEN} --dry-run") for name in ("width", "depth", "batch", "fsdp", "accumulation")),
        *(("weight_bias", f"--{name} {EVEN} --dry-run") for name in ("seeds", "samples", "workers")),
        *(("tangent_study", f"--{name} {EVEN} --dry-run") for name in ("seeds", "gradient-rows", "samples", "width")),
        ("ablations", f"--seeds {EVEN} --dry-run"),
        ("ablations", f"--data digits --workers {EVEN} --dry-run"),
        *(("cifar10", f"--preset tiny --{name} {EVEN} --dry-run") for name in ("blocks", "width", "fsdp")),
        ("imagenet_latents", f"--patch {HUGE} --dry-run"),
        ("evaluate", f"--evaluations {EVEN} --dry-run"),
        ("digits", "--fsdp 3"),
        ("sampling_throughput", "--quick --dtype bfloat16 --attention cudnn"),
        ("sampling_throughput", "--quick --attention cudnn"),
        ("jvp_accuracy", "--seed 9999999999999999999999999"),
    ],
)
def test_a_run_of_sizes_that_cannot_be_is_refused_in_one_line_and_leaves_nothing(
    script, arguments, tmp_path, monkeypatch
):
    if jax.default_backend() == "gpu" and "cudnn" in arguments:
        pytest.skip("cuDNN is there")
    if jax.device_count() % 3 == 0 and "--fsdp 3" in arguments:
        pytest.skip("three devices are there")
    monkeypatch.chdir(tmp_path)
    code, lines, left = ended(script, arguments)
    assert code == 2 and not left
    assert len([line for line in lines if "error: " in line]) == 1, lines


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [f"--steps {HUGE} --log-every {HUGE}", f"--keep-last {HUGE} --dit-batch 1000000"])
def test_a_dry_run_of_large_numbers_that_can_be_ends(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = "--data eight_gaussians --methods MeanFlow --settings common --shorter --dry-run"
    assert ended("toy_2d", f"{few} {arguments}") == (0, [], [])
