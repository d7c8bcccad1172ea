"""Steps compiled for devices that are not here: with the compilers of these devices where they are installed (`slow`),
otherwise with the CPU in their place."""

import importlib.util
import json

import jax
import pytest

from mf_eqx import measure


@pytest.fixture(scope="module")
def compile_for(benchmark_script):
    return benchmark_script("compile_for")


@pytest.fixture(scope="module")
def other_devices(benchmark_script):
    return benchmark_script("other_devices")


@pytest.fixture
def cpu_for_all(other_devices, monkeypatch):
    """Every device is the CPU."""
    monkeypatch.setattr(other_devices.Target, "devices", lambda self: jax.devices()[:1])


def record_of(directory):
    (record,) = json.loads((directory / "results.json").read_text())
    return record


def test_a_run_says_what_a_step_needs_on_one_device(cpu_for_all, finished):
    found = record_of(finished("compile_for", model="MLP", batch=4, device=("h100",), dtype="float32"))
    assert (found["device"], found["variant"], found["memory"]) == ("1 x h100", "MeanFlow", 81_559 * 2**20)
    assert found["collectives"] == {} and found["refused"] == ""
    assert 0 < found["temporary"] < 2**30
    parameters = found["state"] / 4 / 4  # Adam's moments and an average are as large; 4 bytes
    assert 100_000 < parameters < 1_000_000


@pytest.fixture
def refusing(cpu_for_all, monkeypatch):
    """A compiler that refuses programs, as a TPU's does."""

    def refuse(*inputs, **options):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (21.99G) exceeds available HBM (15.75G). HLO module: jit_arrays_to_arrays."
        )

    monkeypatch.setattr(measure, "compile_program", refuse)


def test_a_step_that_a_compiler_refuses_is_a_row_of_the_table(refusing, compile_for, other_devices):
    result = compile_for.compiled(
        compile_for.Setting("tiny", 4), "Flow Matching", other_devices.target("v5e"), fsdp=False
    )
    assert {"23.61", "refused, has 16.9 GB"} <= set(result.row)


def test_another_error_of_a_compiler_is_not_taken_for_too_little_memory(
    cpu_for_all, compile_for, other_devices, monkeypatch
):
    def fail(*inputs, **options):
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: no")

    monkeypatch.setattr(measure, "compile_program", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="UNIMPLEMENTED"):
        compile_for.compiled(compile_for.Setting("tiny", 4), "MeanFlow", other_devices.target("v5e"), fsdp=False)


@pytest.mark.parametrize(
    ("state", "answer"), [(10, "yes, 11% of"), (70, "beyond JAX's default, 71% of"), (100, "no, 101% of")]
)
def test_a_step_fits_if_state_and_temporary_memory_do(compile_for, state, answer):
    result = compile_for.Result("1 x h100", "MeanFlow", 100 * 10**9, 70 * 10**9, 1.0, state * 10**9, 10**9)
    assert any(str(cell).startswith(answer) for cell in result.row)


def test_devices_are_described_by_the_fields_of_xla(other_devices):
    text = other_devices.GPUS["a100"].description("a100")
    for field in ("core_count: 108", "device_memory_size: 85899345920", "major: 8 minor: 0", 'platform_name: "CUDA"'):
        assert field in text


def test_devices_are_known_by_name_and_number(other_devices):
    named = [str(other_devices.target(text)) for text in ("h100", "h200:8", "v5e", "v5p", "v6e:16")]
    assert named == ["1 x h100", "8 x h200", "1 x v5e", "4 x v5p", "16 x v6e"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"device": ("h1000",)}, "device must be one of a100, .*; got h1000"),
        ({"device": ("h100:x",)}, "device must be one of a100, .*; got h100:x"),
        ({"device": ("v5e:3",)}, "device must be 1, 4, 8, .* of v5e, got 3"),
        ({"device": ()}, "device must be at least one of a100, .*; got none"),
        ({"variant": ()}, "variant must be at least one of Flow Matching, .*; got none"),
        ({"variant": ("no",)}, "variant must be among Flow Matching, .*; got no"),
        ({"model": "C/4"}, "model must be among MLP, .*; got C/4"),
        ({"share": 1}, r"share must lie in \[0.02, 0.9\], got 1"),
        ({"variant": ("finite difference",)}, "dtype must be float32 for finite difference, got bfloat16"),
        ({"form": "default"}, "form must be among scan, unroll; got default"),
        ({"attention": "cudnn"}, "attention must be among xla, chunked, pallas; got cudnn"),
        ({"attention": "pallas"}, "attention must be xla or chunked for a TPU, got pallas for v5e"),
        ({"batch": 12, "device": ("h100:8",)}, "batch must be a multiple of 4 x 8 for MeanFlow on 8 x h100, got 12"),
    ],
)
def test_bad_values_are_refused_by_name(compile_for, values, message):
    with pytest.raises(ValueError, match=message):
        compile_for.Config(**values)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="the compiler is installed")
def test_without_a_compiler_a_run_says_what_is_missing(other_devices):
    with pytest.raises(ValueError, match=r"device v5e needs its compiler, pip install -e '\.\[compilers\]'"):
        other_devices.target("v5e").devices()


# With the compilers


@pytest.fixture
def with_compilers(other_devices):
    pytest.importorskip("libtpu")
    pytest.importorskip("jax_plugins.xla_cuda12")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny", "U-Net tiny"])
@pytest.mark.parametrize("device", ["h100:2", "v5e:4"])
def test_a_data_parallel_step_sums_its_gradient_in_one_all_reduce(
    with_compilers, compile_for, other_devices, resized, model, device
):
    setting = compile_for.Setting(model, 16, "bfloat16", form="unroll" if "U-Net" in model else "scan")
    with resized():
        result = compile_for.compiled(setting, "guided", other_devices.target(device), fsdp=False)
    assert result.collectives == {"all-reduce": 1}


@pytest.mark.slow
@pytest.mark.parametrize("device", ["h100:2", "v5e:4"])
def test_with_fsdp_a_device_holds_its_part_of_the_state(with_compilers, compile_for, other_devices, device):
    where = other_devices.target(device)
    whole, part = (
        compile_for.compiled(compile_for.Setting("tiny", 64, "bfloat16", form="scan"), "MeanFlow", where, fsdp=fsdp)
        for fsdp in (False, True)
    )
    assert part.state < 1.2 * whole.state / where.number
    assert set(part.collectives) == {"all-reduce", "all-gather", "reduce-scatter"}
