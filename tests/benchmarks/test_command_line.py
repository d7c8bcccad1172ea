"""Every benchmark from its command line."""

import pytest

from mf_eqx import run


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("jvp_overhead", "--preset accelerator --batch 16 6", "--batch must be multiples of 4 with share 0.25, got 6"),
        ("jvp_accuracy", "--steps 0.1 0.01 --shown-step 0.2", "--shown-step must be one of steps, got 0.2"),
        ("compile_time", "--model XL/2 --form scan --repeats 0", "--repeats must be >= 1, got 0"),
        ("sampling_throughput", "--evaluations 1 0", "--evaluations must be positive numbers, got (1, 0)"),
        ("one_step_vs_ode", "--data digits --samples 9", "--samples must be >= 10, got 9"),
        ("loader_throughput", "--threads 0", "--threads must be >= 1, got 0"),
        (
            "loader_throughput",
            "--quick --rows 500",
            "--rows must be >= 640 with quick",
        ),
        ("checkpoint_blocking", "--rounds 0", "--rounds must be >= 1, got 0"),
        ("device_peaks", "--rounds 0", "--rounds must be >= 1, got 0"),
        ("step_profile", "--model XL/2 --batch 6", "--batch must be a positive multiple of 4, got 6"),
        ("step_forms", "--rounds 0", "--rounds must be >= 1, got 0"),
        ("compile_for", "--device h1000", "--device must be one of a100, h100, h200, v5e, v5p, v6e, or several"),
        ("device_scaling", "--batch 12", "--batch must be a multiple of 4 x 2 devices, got 12"),
    ],
)
def test_bad_input_ends_in_one_line(benchmark_script, name, arguments, message, refusal_of, tmp_path, monkeypatch):
    pytest.importorskip("tyro")
    script = benchmark_script(name)
    monkeypatch.chdir(tmp_path)
    presets = getattr(script, "PRESETS", None) or script.Config()
    line = refusal_of(run.main, script.main, presets, argv=arguments.split())
    assert message in line
    assert not list(tmp_path.iterdir())
