"""The command that runs everything: what it makes of parts that end, fail, take too long and are missing something."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from devices import TESTS

GOOD = 'import pathlib; p = pathlib.Path("runs/x/y"); p.mkdir(parents=True, exist_ok=True); '
GOOD += '(p / "results.md").write_text("| rate |"); (p / "results.json").write_text("[{\\"rate\\": 1}]"); '


@pytest.fixture(scope="module")
def accelerator(benchmark_script):
    return benchmark_script("accelerator")


@pytest.fixture(scope="module")
def parts(benchmark_script):
    return benchmark_script("accelerator_parts")


@pytest.fixture
def runner(accelerator, parts, tmp_path, monkeypatch):
    """Make a runner of parts that are a line of Python each; what they are called with is noted in a file."""
    machine = parts.Machine("gpu", "NVIDIA H200", 1, 140e9, {"jax": "0"})
    monkeypatch.setattr(accelerator, "GRACE", 5)
    monkeypatch.setattr(accelerator, "driver", lambda: "")

    class Line(parts.Part):
        @property
        def command(self):
            code = f'open({str(tmp_path / "calls")!r}, "a").write({self.name!r} + " "); {self.script}'
            return [sys.executable, "-S", "-c", code]

    def make(*, seconds=20, **lines):
        found = [Line(name, "?", line, {}, seconds, ()) for name, line in lines.items()]
        return accelerator.Runner(machine, found, tmp_path / "all")

    return make


def called(tmp_path):
    return (tmp_path / "calls").read_text().split()


def soon(seconds=60):
    return time.monotonic() + seconds


def test_a_part_that_came_to_its_end_is_not_repeated_and_others_come_after_new_ones(runner, tmp_path):
    lines = {"good": GOOD, "bad": GOOD + "raise SystemExit(3)"}
    runner(**lines).run_all(soon())
    runner(**lines, new=GOOD).run_all(soon())
    assert called(tmp_path) == ["good", "bad", "new", "bad"]
    records = json.loads((tmp_path / "all" / "results.json").read_text())
    assert {r["part"]: r["state"] for r in records} == {"good": "done", "bad": "failed (exit code 3)", "new": "done"}
    assert all(r["records"] == [{"rate": 1}] and r["text"] == "| rate |" for r in records)


def test_a_part_is_stopped_at_its_limit_and_what_it_had_is_kept(runner, tmp_path):
    found = runner(slow=GOOD + "import time; time.sleep(60)", seconds=1)
    found.run_all(soon())
    result = found.result(found.parts[0])
    assert result["state"] == "stopped at its limit"
    assert result["records"] == [{"rate": 1}]
    assert "stopped at its limit" in (tmp_path / "all" / "results.md").read_text()


def test_a_part_that_had_no_time_keeps_its_place_and_one_that_used_up_its_limit_goes_to_the_end(runner, tmp_path):
    waits = GOOD + "import time; time.sleep(60)"
    found = runner(limited=waits, hurried=waits, new=GOOD)
    found.parts[:2] = [
        found.parts[0].__class__(name, "?", waits, {}, n, ()) for name, n in (("limited", 1), ("hurried", 6))
    ]
    found.run_all(soon(5 + 1 + 4))  # the grace period, the limit of the first, more than half of the second's
    states = [(found.result(part) or {}).get("state") for part in found.parts]
    assert states == ["stopped at its limit", "stopped for lack of time", None]
    assert [part.name for part in found.missing()] == ["hurried", "new", "limited"]


def test_no_part_is_started_whose_grace_period_would_end_too_late(runner, tmp_path):
    runner(good=GOOD, seconds=2).run_all(soon(5.5))
    assert not (tmp_path / "calls").exists()


def test_a_worse_second_attempt_leaves_what_the_first_one_had(runner, tmp_path):
    two = GOOD.replace("[{", "[{}, {")
    first = runner(part=two + "raise SystemExit(3)")
    first.run_all(soon())
    worse = GOOD.replace("| rate |", "nothing") + "print('second'); raise SystemExit(4)"
    second = runner(part=worse)
    second.run_all(soon())
    found = second.result(second.parts[0])
    assert (found["state"], found["text"], len(found["records"])) == ("failed (exit code 4)", "| rate |", 2)
    assert (tmp_path / "all" / "parts" / "part" / "log.txt").read_text().count("new attempt") == 2


def test_a_part_sees_a_package_in_a_relative_folder(runner, tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "package_of_the_test.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{os.environ.get('PYTHONPATH', '')}{os.pathsep}site")
    found = runner(part="import package_of_the_test; " + GOOD)
    found.run_all(soon())
    assert found.result(found.parts[0])["state"] == "done"


@pytest.mark.parametrize("name", ["XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"])
def test_the_share_of_memory_that_the_user_sets_is_left_alone(accelerator, name, monkeypatch):
    monkeypatch.setenv(name, "0.5")
    assert {k: v for k, v in accelerator.environment().items() if "MEM_FRACTION" in k} == {name: "0.5"}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_part_does_not_outlive_the_command_that_started_it(accelerator, tmp_path):
    code = "import os, time; open('pid', 'w').write(str(os.getpid())); os.rename('pid', 'number'); time.sleep(60)"
    bound = [sys.executable, "-S", "-c", accelerator.BOUND, sys.executable, "-S", "-c", code]
    parent = subprocess.Popen([sys.executable, "-S", "-c", f"import subprocess; subprocess.run({bound})"], cwd=tmp_path)
    while not (tmp_path / "number").exists():
        assert parent.poll() is None
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    child, until = Path("/proc", (tmp_path / "number").read_text(), "stat"), time.monotonic() + 10
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_part_that_ends_without_results_leaves_its_last_lines(runner):
    found = runner(bad="raise ValueError('no such thing')")
    found.run_all(soon())
    assert "ValueError: no such thing" in found.result(found.parts[0])["text"]


def test_a_part_that_time_is_too_short_for_is_passed_over_for_a_shorter_one(runner, tmp_path):
    found = runner(long=GOOD, short=GOOD)
    found.parts[0] = found.parts[0].__class__("long", "?", GOOD, {}, 1000, ())
    found.run_all(soon(60))
    assert called(tmp_path) == ["short"]
    assert "no time: " in (tmp_path / "all" / "results.md").read_text()


def test_a_part_is_skipped_for_what_is_missing(accelerator, parts, tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator, "driver", lambda: "")
    machine = parts.Machine("gpu", "NVIDIA H200", 1, 140e9, {})
    two = [
        parts.Part("training", "?", "no.py", {}, 1, ("no_such_package",)),
        parts.Part("devices", "?", "no.py", {}, 1, (), lacks="there is one device"),
    ]
    accelerator.Runner(machine, two, tmp_path).run_all(soon())
    text = (tmp_path / "results.md").read_text()
    assert "needs no_such_package" in text
    assert "there is one device" in text
    assert not (tmp_path / "ledger.jsonl").exists()


def test_results_of_another_device_are_not_taken_for_those_of_this_one(runner, parts, tmp_path):
    runner(good=GOOD).run_all(soon())
    other = runner(good=GOOD)
    other.machine = parts.Machine("gpu", "NVIDIA H100", 1, 80e9, {})
    assert other.missing() == other.parts


def test_every_goal_is_read_from_records_of_its_benchmark(benchmark_script):
    goals = benchmark_script("accelerator_goals")
    cost = {"argument_bytes": 2, "donated_bytes": 1, "temporary_bytes": 1e9}
    step = {"dtype": "bfloat16", "remat": "none", "attention": "xla", "share": 0.25, "cost": cost, "form": "default"}
    step |= {"flops": 1.0, "matmul_peak": 20.0, "batch": 256, "batch_bytes": 1, "allocator_peak_bytes": 2e9}
    records = [
        {**step, "part": "steps", "model": model, "variant": variant, "wall_seconds": [0.1 * (1 + i)]}
        for model in ("B/4", "B/2", "XL/2")
        for i, variant in enumerate(goals.VARIANTS)
    ]
    unet = {**step, "model": "U-Net", "share": 0.75, "variant": "MeanFlow", "batch": 1024, "wall_seconds": [1.0]}
    records += [{**unet, "part": "steps U-Net", "dtype": dtype} for dtype in ("float32", "bfloat16")]
    records += [{"part": "sampling", "model": m, "batch": 256, "wall_seconds": [0.01]} for m in ("B/4", "XL/2")]
    seconds = {"trace_seconds": 1.0, "lower_seconds": 1.0, "compile_seconds": 1.0}
    records += [{"part": "compile", "model": "XL/2", "form": "scan", "warm": w, **seconds} for w in (False, True)]
    records += [{"part": "accuracy", "engine": "fused JVP", "precision": "bfloat16", "time_scale": 1.0, "median": 0.01}]
    records += [{"part": "machine", "what": what, "rate": 8e14} for what in ("products in bfloat16", "copies")]
    records += [{"part": "checks", "test": "a", "outcome": "PASSED"}]
    found = {goal.what: goal.found(records) for goal in goals.GOALS}
    assert [what for what, value in found.items() if value is None] == []
    assert found["XL/2, MeanFlow: time over Flow Matching's"] == "+100.0% (xla, default)"
    assert found["state whose memory is reused"] == "at least 100.0%"
    assert (
        found["B/4, MeanFlow: ms per step"] == "200.0 (xla, default; 25% of peak, 1.0 GB temporary, 2.0 GB allocated)"
    )
    assert found["U-Net: images per second, float32"] == "1,024"
    assert {goal.found([]) for goal in goals.GOALS} == {None}


def test_a_step_is_compared_with_flow_matching_of_its_own_part_and_round(benchmark_script):
    goal = benchmark_script("accelerator_goals").overhead("XL/2", "MeanFlow", "")
    step = {"model": "XL/2", "batch": 256, "dtype": "bfloat16", "form": "default", "share": 0.25, "flops": 1.0}
    step |= {"attention": "xla", "remat": "products"}
    times = {("a", "Flow Matching"): [1.0, 2.0, 4.0], ("a", "MeanFlow"): [1.1, 2.2, 8.0], ("b", "Flow Matching"): [0.5]}
    records = [{**step, "part": p, "variant": v, "wall_seconds": wall} for (p, v), wall in times.items()]
    assert goal.found(records) == "+10.0% (xla, remat products, default)"


def test_every_goal_stands_in_the_readme(benchmark_script):
    text = (TESTS.parent / "benchmarks" / "README.md").read_text()
    goals = benchmark_script("accelerator_goals").GOALS
    assert [goal.what for goal in goals if f"| {goal.what} | {goal.wanted} |" not in text] == []


def test_a_training_says_how_many_images_it_took_in_a_second(accelerator, parts, tmp_path):
    folder = tmp_path / "runs" / "digits" / "digits" / "meanflow"
    folder.mkdir(parents=True)
    session = {"start": 0, "stop": 10, "seconds": {"steps": 2.0}}
    (folder / "summary.json").write_text(json.dumps({"seconds": {"steps": 2.0}, "sessions": [session]}))
    (folder.parent / "config.json").write_text(json.dumps({"config": {"batch": 64}}))
    (tmp_path / "log.txt").write_text("")
    text, _ = accelerator.collected(parts.Part("digits", "?", "digits.py", {}, 1), tmp_path)
    assert "meanflow: 10 steps in 2.0 s, 320 images per second" in text


def test_log_of_tests_is_counted_with_the_names_of_those_that_failed(accelerator, parts, tmp_path):
    lines = ["../../tests/nn/test_a.py::test_x[a b] PASSED [ 50%]", "../../tests/nn/test_a.py::test_y FAILED [100%]"]
    (tmp_path / "log.txt").write_text("\n".join(["collected", *lines, "FAILED ../../tests/nn/test_a.py::test_y - no"]))
    part = parts.Part("checks", "?", "pytest", {"paths": []}, 1)
    text, records = accelerator.collected(part, tmp_path)
    assert text == "1 passed, 1 failed\n- FAILED nn/test_a.py::test_y"
    assert [r["outcome"] for r in records] == ["PASSED", "FAILED"]


def test_log_of_tests_in_several_processes_is_counted_likewise(accelerator, parts, tmp_path):
    lines = ["tests/nn/test_a.py::test_x[a b] ", "[gw1] [  5%] PASSED tests/nn/test_a.py::test_x[a b] "]
    lines += ["tests/nn/test_a.py::test_y ", "[gw0] [100%] FAILED tests/nn/test_a.py::test_y "]
    (tmp_path / "log.txt").write_text("\n".join([*lines, "FAILED tests/nn/test_a.py::test_y - no"]))
    text, records = accelerator.collected(parts.Part("checks", "?", "pytest", {"paths": []}, 1), tmp_path)
    assert text == "1 passed, 1 failed\n- FAILED nn/test_a.py::test_y"
    assert records[0] == {"test": "nn/test_a.py::test_x[a b]", "outcome": "PASSED"}


def test_a_file_of_tests_that_cannot_be_imported_is_counted(accelerator, parts, tmp_path):
    lines = ["tests/nn/test_a.py::test_x PASSED [100%]", "ERROR tests/nn/test_b.py - ModuleNotFoundError: No module"]
    (tmp_path / "log.txt").write_text("\n".join(lines))
    text, _ = accelerator.collected(parts.Part("checks", "?", "pytest", {"paths": []}, 1), tmp_path)
    assert text == "1 passed, 1 error\n- ERROR nn/test_b.py"


@pytest.mark.parametrize("is_there", [False, True])
def test_checks_run_in_several_processes_where_that_is_installed(parts, is_there, monkeypatch):
    monkeypatch.setattr(parts, "find_spec", lambda name: is_there or None)
    monkeypatch.setattr(parts, "TESTERS", 4)
    found = parts.parts(parts.Machine("gpu", "NVIDIA H200", 1, 140e9, {}), False, "")
    (checks,) = [part.command for part in found if part.name == "checks"]
    assert ("-n" in checks) is is_there


def test_parts_share_the_programs_that_they_compile_and_tests_do_not(accelerator, parts, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    machine = parts.Machine("gpu", "NVIDIA H200", 1, 140e9, {})
    found = accelerator.Runner(machine, parts.parts(machine, False, ""), tmp_path)
    for part in found.parts:
        place = accelerator.environment(part).get("JAX_COMPILATION_CACHE_DIR")
        if part.script == parts.PYTEST:
            assert place is None
        else:
            assert (found.folder(part) / place).resolve() == (found.directory / "programs").resolve()


def test_lists_within_lists_of_a_configuration_become_tuples(benchmark_script):
    @dataclasses.dataclass(frozen=True)
    class Config:
        intervals: tuple[tuple[float, float], ...] = ()

    script = types.SimpleNamespace(Config=Config)
    found = benchmark_script("call_script").configured(script, {"intervals": [[0.4, 0.6]]})
    assert found.intervals == ((0.4, 0.6),)


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("kind", ["NVIDIA H200", "TPU v4"])
def test_every_part_has_a_configuration_that_its_script_takes(benchmark_script, parts, kind, tiny, tmp_path):
    caller = benchmark_script("call_script")
    platform = "gpu" if "NVIDIA" in kind else "tpu"
    names = []
    for part in parts.parts(parts.Machine(platform, kind, 4, 32e9, {}), tiny, str(tmp_path)):
        names.append(part.name)
        if part.script == parts.PYTEST:
            for path in part.config["paths"]:
                file, _, test = path.partition("::")
                assert f"def {test}(" in (TESTS.parent / file).read_text() if test else (TESTS.parent / file).exists()
        elif part.script.startswith("benchmarks/"):
            script = benchmark_script(part.script.removeprefix("benchmarks/").removesuffix(".py"))
            caller.configured(script, json.loads(part.command[-1]))
        else:
            for package in part.needs:
                pytest.importorskip(package)
            script = benchmark_script(part.script.removeprefix("experiments/").removesuffix(".py"))
            caller.configured(script, json.loads(part.command[-1]))
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "--minutes must be a finite number > 0, got 0"),
        (["--tiny", "--only", "all"], "--only must be among machine, .*; got all"),
        ([], "--tiny must be given on a CPU"),
    ],
)
def test_bad_input_is_refused_by_name(accelerator, parts, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(accelerator, "probe", lambda: parts.Machine("cpu", "cpu", 1, 0, {}))
    with pytest.raises((ValueError, SystemExit)) as caught:
        accelerator.main(arguments)
    assert re.search(message, str(caught.value) + capsys.readouterr().err)


def start(folder, *arguments, without=()):
    (hidden := folder / "hidden").mkdir(exist_ok=True)
    for name in without:
        (hidden / f"{name}.py").write_text("raise ImportError")
    command = [sys.executable, str(TESTS.parent / "benchmarks" / "accelerator.py"), "--tiny", *arguments]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (hidden, TESTS.parent)))
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.rehearsal
def test_tiny_form_runs_from_its_command_line_and_needs_neither_tyro_nor_grain(tmp_path):
    out, _ = (process := start(tmp_path, "--only", "machine", without=("tyro", "grain"))).communicate()
    assert process.returncode == 0
    (record,) = json.loads((tmp_path / "runs" / "accelerator_tiny" / "results.json").read_text())
    assert record["state"] == "done"
    assert {r["what"] for r in record["records"]} >= {"copies", "products in bfloat16"}
    assert "| products in bfloat16, TFLOP/s" in out


@pytest.mark.slow
def test_a_command_that_is_stopped_goes_on_when_it_is_given_again(tmp_path):
    folder = tmp_path / "runs" / "accelerator_tiny"
    process = start(tmp_path, "--only", "machine", "steps")
    while not (folder / "parts" / "steps" / "log.txt").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    states = {r["part"]: r["state"] for r in json.loads((folder / "results.json").read_text())}
    assert states == {"machine": "done", "steps": "interrupted"}
    start(tmp_path, "--only", "machine", "steps").communicate()
    lines = [json.loads(line)["settings"]["part"] for line in (folder / "ledger.jsonl").read_text().splitlines()]
    assert lines == ["machine", "steps", "steps"]
    assert json.loads((folder / "results.json").read_text())[1]["state"] == "done"


@pytest.mark.slow
def test_every_part_of_the_tiny_form_comes_to_its_end(tmp_path):
    start(tmp_path).communicate()
    records = json.loads((tmp_path / "runs" / "accelerator_tiny" / "results.json").read_text())
    assert len(records) > 5
    assert {r["state"] for r in records} == {"done"}
