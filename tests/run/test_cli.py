import dataclasses
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from mf_eqx import check_batch_size, checkpoint, Guidance, run
from mf_eqx.run import _cli
from mf_eqx.run._processes import RefusedElsewhere, Separated

pytest.importorskip("tyro")


@dataclass(frozen=True)
class Schedule:
    rate: float = 1e-3
    """Peak learning rate."""

    def __post_init__(self):
        if not self.rate > 0:
            raise ValueError(f"rate must be > 0, got {self.rate}")


@dataclass(frozen=True)
class Config:
    steps: int = 100
    """Number of optimisation steps."""
    batch_size: int = 32
    """Rows per step."""
    scale: float | None = None
    """Guidance scale."""
    compare: bool = False
    """Train the baseline, too."""
    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError(f"steps must be >= 0, got {self.steps}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {self.batch_size}")


PRESETS = {"plain": ("without guidance", Config()), "guided": ("guidance of scale 2", Config(scale=2.0, steps=200))}


@pytest.fixture(autouse=True)
def named_script(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/script.py"])
    monkeypatch.delenv("MF_EQX_TRACEBACK", raising=False)


def parsed(*argv: str, presets=PRESETS) -> Config:
    return run.main(lambda config: config, presets, argv=argv)


def help_text(capsys, *argv: str, presets=PRESETS) -> str:
    with pytest.raises(SystemExit) as stop:
        run.main(lambda config: config, presets, argv=[*argv, "--help"], description="What it does.")
    assert stop.value.code == 0
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def refusal(capsys, *argv: str, function=lambda config: config, presets=PRESETS) -> str:
    """The one line on stderr of a call that must exit with code 2."""
    with pytest.raises(SystemExit) as stop:
        run.main(function, presets, argv=argv)
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err.removesuffix("\n")


def test_without_arguments_the_first_preset_runs():
    assert parsed() == PRESETS["plain"][1]


def test_a_preset_is_chosen_by_name():
    assert parsed("--preset", "guided") == PRESETS["guided"][1]


def test_flags_override_the_preset_wherever_it_stands():
    expected = Config(scale=2.0, steps=7)
    assert parsed("--preset", "guided", "--steps", "7") == parsed("--steps", "7", "--preset=guided") == expected


def test_flags_reach_nested_and_boolean_fields():
    assert parsed("--schedule.rate", "0.5", "--compare") == Config(schedule=Schedule(0.5), compare=True)


def test_a_single_configuration_needs_no_presets():
    assert parsed("--steps", "3", presets=Config()) == Config(steps=3)


def test_main_returns_the_result_of_the_function():
    assert run.main(lambda config: config.steps + 1, Config(), argv=[]) == 101


def test_help_shows_every_field_with_its_meaning_and_default(capsys):
    text = help_text(capsys)
    assert "--steps INT Number of optimisation steps. (default: 100)" in text
    assert "--batch-size INT Rows per step. (default: 32)" in text
    assert "--scale {None}|FLOAT Guidance scale. (default: None)" in text
    assert "--compare, --no-compare Train the baseline, too. (default: False)" in text
    assert "--schedule.rate FLOAT Peak learning rate. (default: 0.001)" in text


def test_help_shows_description_and_presets(capsys):
    text = help_text(capsys)
    assert "What it does. presets: plain without guidance guided guidance of scale 2" in text
    assert "--preset NAME" in text


def test_help_of_a_preset_shows_its_values(capsys):
    assert "--steps INT Number of optimisation steps. (default: 200)" in help_text(capsys, "--preset", "guided")


@dataclass(frozen=True)
class Documented(Config):
    size: int = 8
    """A size whose description is so long that its source
    has two lines."""


def test_help_has_no_line_breaks_of_the_source(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        run.main(lambda config: config, Documented(), argv=["--help"])
    text = capsys.readouterr().out
    assert "that its source has two lines. (default: 8)" in text and "Rows per step. (default: 32)" in text


def test_help_without_presets_does_not_mention_them(capsys):
    assert "preset" not in help_text(capsys, presets=Config())


def test_unknown_flag_is_refused_with_the_nearest_one(capsys):
    line = refusal(capsys, "--stepz", "3")
    assert line == "script.py: error: unknown argument --stepz, did you mean --steps?"


def test_unknown_nested_flag_is_refused_with_the_nearest_one(capsys):
    line = refusal(capsys, "--schedule.rates=1")
    assert line == "script.py: error: unknown argument --schedule.rates, did you mean --schedule.rate?"


def test_unknown_flag_like_no_other_is_refused(capsys):
    assert refusal(capsys, "--qqq") == "script.py: error: unknown argument --qqq; --help lists all"


def test_preset_without_its_flag_is_refused_with_the_flag(capsys):
    assert refusal(capsys, "guided") == "script.py: error: unknown argument guided, did you mean --preset guided?"


def test_unknown_preset_is_refused_with_all_names(capsys):
    line = refusal(capsys, "--preset", "guide")
    assert line == "script.py: error: --preset must be one of plain, guided; got 'guide'"


def test_unparsable_value_is_refused_with_flag_and_value(capsys):
    assert refusal(capsys, "--steps", "many") == (
        "script.py: error: --steps: invalid literal for int() with base 10: 'many'"
    )


@pytest.mark.parametrize("unicode", [True, False])
def test_no_frame_of_the_parser_is_left_in_any_encoding(capsys, monkeypatch, unicode):
    monkeypatch.setattr(type(sys.stdout), "encoding", "utf-8" if unicode else "ascii", raising=False)
    assert refusal(capsys, "--steps", "many").endswith("error: --steps: invalid literal for int() with base 10: 'many'")


def test_unparsable_optional_value_is_refused_in_one_line_too(capsys):
    line = refusal(capsys, "--scale", "none")
    assert line.startswith("script.py: error: --scale: ") and line.endswith("['none'].")


def test_flag_without_its_value_is_refused_by_name(capsys):
    assert "'--batch-size'" in refusal(capsys, "--batch-size")


def test_check_of_the_configuration_is_refused_with_the_flag(capsys):
    assert refusal(capsys, "--batch-size", "-3") == "script.py: error: --batch-size must be >= 1, got -3"


def test_check_of_a_nested_configuration_is_refused_with_its_message(capsys):
    line = refusal(capsys, "--schedule.rate", "-1")
    assert line == "script.py: error: schedule: rate must be > 0, got -1.0"


@dataclass(frozen=True)
class Files:
    out: str = "."
    """Where to."""
    data: str = ""
    """A folder."""
    others: tuple[str, ...] = ()
    """Files."""


@pytest.mark.parametrize(
    ("path", "start"),
    [("a/b/rows.npy", "--data: "), ("c", "--others: "), ("elsewhere", "[Errno 2] "), ("a", "[Errno 2] ")],
)
def test_a_file_that_cannot_be_read_is_refused_with_the_flag_that_names_it_or_its_folder(path, start, capsys):
    with pytest.raises(SystemExit):
        run.main(lambda config: Path(path).read_bytes(), Files(), argv=["--data", "a/b", "--others", "no", "c"])
    ending = f"No such file or directory: '{path}' (MF_EQX_TRACEBACK=1 shows where)"
    assert capsys.readouterr().err.strip() == f"script.py: error: {start}{ending}"


@dataclasses.dataclass(frozen=True)
class Opened:
    """A configuration that reads its files."""

    data: tuple[str, ...] = ()
    """Files."""

    def __post_init__(self):
        for path in self.data:
            Path(path).read_bytes()


@pytest.mark.parametrize("argv", [["--data", "gone.npy"], ["--data=gone.npy"]])
def test_a_file_that_the_configuration_itself_cannot_read_is_refused_with_its_flag(argv, capsys):
    with pytest.raises(SystemExit):
        run.main(lambda config: None, Opened(), argv=argv)
    line = "script.py: error: --data: No such file or directory: 'gone.npy' (MF_EQX_TRACEBACK=1 shows where)"
    assert capsys.readouterr().err.strip() == line


def test_value_error_of_the_script_is_one_line_with_a_hint(capsys):
    def function(config: Config) -> None:
        raise ValueError("labels must lie in [0, 10),\ngot 11")

    line = refusal(capsys, function=function)
    assert line == "script.py: error: labels must lie in [0, 10), got 11 (MF_EQX_TRACEBACK=1 shows where)"


def test_value_error_of_a_module_of_the_package_is_one_line(capsys):
    assert "scale must be > 0 and finite, got -1.0" in refusal(capsys, function=lambda config: Guidance(-1.0))


def test_value_error_of_the_package_under_jit_is_one_line(capsys):
    def function(config: Config) -> None:
        eqx.filter_jit(lambda x: check_batch_size(x.size, Fraction(1, 4)))(jnp.zeros(6))

    assert "got 6" in refusal(capsys, function=function)


def test_value_error_from_elsewhere_is_a_bug_and_keeps_its_traceback():
    with pytest.raises(ValueError, match="concatenate"):
        run.main(lambda config: jnp.concatenate([]), Config(), argv=[])


def test_other_errors_of_the_script_keep_their_traceback():
    def function(config: Config) -> None:
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        run.main(function, Config(), argv=[])


def test_missing_file_is_one_line_with_its_name(capsys, tmp_path):
    path = tmp_path / "none.npz"
    assert str(path) in refusal(capsys, function=lambda config: path.read_bytes())


def test_missing_package_is_one_line_with_what_to_install(capsys):
    def function(config: Config) -> None:
        with run.optional("no_such_package"):
            import no_such_package  # noqa: F401 # pyright: ignore[reportMissingImports]

    line = refusal(capsys, function=function)
    assert line == "script.py: error: no_such_package is not installed: pip install no_such_package"


def test_traceback_is_kept_on_demand(monkeypatch):
    monkeypatch.setenv("MF_EQX_TRACEBACK", "1")
    with pytest.raises(ValueError, match="scale"):
        run.main(lambda config: Guidance(-1.0), Config(), argv=[])


def test_interrupt_is_one_line_and_code_130(capsys):
    def function(config: Config) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run.main(function, Config(), argv=[])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "script.py: interrupted\n"


def script_that(folder, does):
    """The path of a script of its own, whose function has these lines."""
    script = folder / "digits.py"
    script.write_text(
        "from dataclasses import dataclass\n"
        "from mf_eqx import run\n"
        "@dataclass(frozen=True)\n"
        "class Config:\n"
        "    share: float = 0.25\n"
        "def train(config):\n"
        f"    {does}\n"
        "if __name__ == '__main__':\n"
        "    run.main(train, Config())\n"
    )
    return script


@pytest.mark.rehearsal
def test_a_script_of_its_own_refuses_without_traceback(tmp_path):
    script = script_that(tmp_path, "raise ValueError(f'share must lie in [0, 1], got {config.share}')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        [sys.executable, str(script), "--share", "2"], capture_output=True, text=True, env=environment
    )
    message = "digits.py: error: --share must lie in [0, 1], got 2.0 (MF_EQX_TRACEBACK=1 shows where)\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", message)


@pytest.mark.rehearsal
@pytest.mark.parametrize("flush", [True, False])
def test_a_pipe_that_nothing_reads_ends_in_one_line(flush, tmp_path):
    script = script_that(tmp_path, f"input(); print('a plan', flush={flush})")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, str(script)], text=True, env=environment, **pipes) as ended:
        ended.stdout.close()
        ended.stdin.write("go\n")
        ended.stdin.close()
        assert ended.stderr.read() == "digits.py: stopped, since nothing reads its output any more\n"
    assert ended.returncode == 141


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (run.NonFinite("3 steps in a row\nwere bad"), 3, "script.py: error: 3 steps in a row were bad"),
        (run.InUse("runs/a: is in use"), 4, "script.py: error: runs/a: is in use"),
        (run.Stopped(signal.SIGINT, 7), 130, "script.py: stopped by SIGINT after step 7; the same command continues"),
        (run.Stopped(signal.SIGTERM, 7), 143, "script.py: stopped by SIGTERM after step 7; the same command continues"),
        (checkpoint.CheckpointError("step 5 could not be saved"), 2, "script.py: error: step 5 could not be saved"),
        (RefusedElsewhere("the first could not"), 2, "script.py: error: the first could not"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value)[:3],
)
def test_each_ending_has_its_exit_code_and_its_line(error, code, line, capsys):
    def function(config: Config) -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        run.main(function, Config(), argv=[])
    assert stop.value.code == code
    assert capsys.readouterr() == ("", line + "\n")


def test_a_run_that_lost_a_process_exits_with_5_and_waits_for_nobody(capsys, monkeypatch):
    def function(config: Config) -> None:
        raise Separated("another process is gone")

    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with pytest.raises(SystemExit):
        run.main(function, Config(), argv=[])
    assert codes == [5]
    assert capsys.readouterr().err == "script.py: error: another process is gone\n"


@dataclass(frozen=True)
class Trained(run.Settings):
    steps: int = 3


@pytest.mark.parametrize("presets", [Trained(), {"a": ("one", Trained()), "b": ("two", Trained())}])
def test_a_run_of_several_processes_is_joined_before_anything_else(presets, monkeypatch):
    joined = []
    monkeypatch.setattr(_cli, "connect", joined.append)
    run.main(lambda config: joined.append(config), presets, argv=["--steps", "4"])
    assert joined == [["--steps", "4"], Trained(steps=4)]


def test_a_script_without_settings_joins_nobody(monkeypatch):
    monkeypatch.setattr(_cli, "connect", lambda arguments: pytest.fail("joined"))
    run.main(lambda config: config, Config(), argv=[])


def test_flags_of_several_processes_are_refused_in_one_line(capsys):
    line = refusal(capsys, "--processes", "2", presets=Trained())
    assert "coordinator, processes and process must be given together, or none of them" in line


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError("Unable to allocate 29.8 GiB"), "Unable to allocate 29.8 GiB"),
        (MemoryError(), "an allocation failed"),
        (jax.errors.JaxRuntimeError("INTERNAL: Out of memory, 9 bytes"), "INTERNAL: Out of memory, 9 bytes"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nheld: much"),
            "RESOURCE_EXHAUSTED: Out of memory",
        ),
    ],
)
def test_memory_that_ends_is_one_line(capsys, error, told):
    def function(config):
        raise error

    line = refusal(capsys, function=function)
    assert line == f"script.py: error: out of memory: {told} (MF_EQX_TRACEBACK=1 shows where)"


def test_an_array_that_no_memory_holds_is_one_line(capsys):
    line = refusal(capsys, function=lambda config: jax.block_until_ready(jnp.zeros((2**30, 2**20))))
    assert line.startswith("script.py: error: out of memory: ")


def test_other_errors_of_the_device_keep_their_traceback():
    def function(config):
        raise jax.errors.JaxRuntimeError("INTERNAL: no such thing")

    with pytest.raises(jax.errors.JaxRuntimeError):
        run.main(function, PRESETS, argv=[])


def create_and_run_out_of_memory(*files):
    def function(config):
        directory = run.RunDirectory.create(config, root="runs")
        for name in files:
            directory.path(name).write_text("result")
        raise MemoryError

    return function


def test_a_refusal_takes_back_a_directory_that_holds_nothing_yet(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refusal(capsys, function=create_and_run_out_of_memory())
    assert not list(tmp_path.iterdir())


def test_a_refusal_leaves_a_directory_that_holds_results(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refusal(capsys, function=create_and_run_out_of_memory("results.md"))
    assert len(list(tmp_path.glob("runs/script/*/results.md"))) == 1
