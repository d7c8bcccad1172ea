"""The profile of a step: which operations count, and whose time is whose."""

import json
from types import SimpleNamespace

import jax
import pytest


@pytest.fixture(scope="module")
def step_profile(benchmark_script):
    return benchmark_script("step_profile")


def plane(name, **lines):
    """A plane of a profile: lines of (operation, start, duration), with facts where they are given."""

    def event(name, start, duration, facts=()):
        return SimpleNamespace(name=name, start_ns=start, duration_ns=duration, stats=tuple(dict(facts).items()))

    found = [SimpleNamespace(name=line, events=[event(*row) for row in rows]) for line, rows in lines.items()]
    return SimpleNamespace(name=name, lines=found)


def found(step_profile, *planes):
    return list(step_profile.operations(SimpleNamespace(planes=planes)))


def test_of_a_gpu_the_streams_of_the_first_device_count(step_profile):
    derived = {"XLA Modules": [("jit_step", 0, 100)], "Stream #13(Compute)": [("nvjet_hsh_128", 10, 20)]}
    planes = [plane("/host:CPU", python=[("step", 0, 500)]), plane("/device:GPU:1", **derived)]
    first = plane("/device:GPU:0", **derived, **{"Stream #14(MemcpyD2D)": [("MemcpyD2D", 30, 5)]})
    names = [operation.name for operation in found(step_profile, *planes, first)]
    assert names == ["nvjet_hsh_128", "MemcpyD2D"]


def test_of_a_tpu_the_operations_of_xla_count_by_their_category(step_profile):
    lines = {"Steps": [("0", 0, 100)], "XLA Ops": [("fusion.3", 0, 10, {"hlo_category": "convolution fusion"})]}
    (operation,) = found(step_profile, plane("/device:TPU:0", **lines))
    assert operation.kind == "convolutions"


def test_of_a_cpu_the_operations_of_xla_count_on_all_threads(step_profile):
    rows = [("dot.3", 0, 10, {"hlo_op": "dot.3"}), ("end: dot.3", 10, 1, {}), ("Await", 0, 50, {})]
    planes = plane("/host:CPU", one=rows, two=rows[:1]), plane("/host:metadata")
    assert [operation.name for operation in found(step_profile, *planes)] == ["dot.3", "dot.3"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64 custom-call.4", "matrix products"),
        ("gemm_fusion_dot_128", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention kernels"),
        ("sm80_xmma_fprop_implicit_gemm_tf32f32_nhwckrsc_nhwc", "convolutions"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "collectives"),
        ("loop_convert_fusion_2", "other arithmetic"),
        ("loop_multiply_fusion", "other arithmetic"),
        ("input_reduce_fusion_1", "reductions"),
        ("wrapped_transpose", "copies"),
        ("loop_dynamic_update_slice_fusion", "copies"),
        ("while.3", "control"),
        ("input_scatter_fusion", "copies"),
        ("void cudnn::ops::nchwToNhwcKernel<float> cudnn-conv.4", "layout changes"),
    ],
)
def test_kind_follows_from_the_name(step_profile, name, kind):
    assert step_profile.kind_of(name) == kind


def test_time_of_operations_inside_of_another_is_not_counted_twice(step_profile):
    rows = [("while.1", 0, 100), ("dot.1", 10, 30), ("add", 50, 20), ("copy.1", 200, 5)]
    rows = [(*row, {"hlo_op": row[0]}) for row in rows]
    operations = found(step_profile, plane("/host:CPU", one=rows, two=rows[:1]))
    assert step_profile.sums(operations, 2, "name") == pytest.approx(
        {"while.1": 75e-6, "dot.1": 15e-6, "add": 10e-6, "copy.1": 2.5e-6}
    )
    assert step_profile.busy(operations) == 105


def test_where_kernels_of_a_stream_overlap_the_time_is_that_of_the_one_that_began_last(step_profile):
    rows = [("gemm", 0, 10), ("copy", 5, 10), ("add", 8, 12), ("reduce", 30, 2)]
    operations = found(step_profile, plane("/device:GPU:0", **{"Stream #13": rows}))
    assert dict(step_profile.sums(operations, 1, "name")) == pytest.approx(
        {"gemm": 5e-6, "copy": 3e-6, "add": 12e-6, "reduce": 2e-6}
    )
    assert step_profile.busy(operations) == 22


@pytest.mark.slow
def test_profile_of_a_step_finds_its_products(finished):
    directory = finished("step_profile", steps=1, batch=4)
    (record,) = json.loads((directory / "results.json").read_text())
    assert record["kinds"]["matrix products"] > 0
    assert record["milliseconds"] > 0
    assert record["profiled_milliseconds"] > 0


def test_a_profile_without_a_plane_of_the_device_is_refused(step_profile, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    planes = [plane("/host:CPU"), plane("/device:CUSTOM:0"), plane("/device:TPU:0 SparseCore")]
    with pytest.raises(RuntimeError, match="saw no GPU or TPU, only /host:CPU, /device:CUSTOM:0, /device:TPU:0 Sparse"):
        found(step_profile, *planes)


@pytest.mark.parametrize("remat", ["none", "products"])
def test_a_step_that_needs_too_much_memory_is_tried_with_the_next_remat(step_profile, remat, monkeypatch):
    tried = []

    def compile_step(setting, variant):
        tried.append(setting.remat)
        if setting.remat != "full":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(step_profile, "warmed_up", compile_step)
    setting, _ = step_profile.fitting(step_profile.Setting("tiny", remat=remat), "guided")
    assert setting.remat == "full"
    assert tried == ["none", "products", "full"][["none", "products"].index(remat) :]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "B"}, "model must be among MLP, .*; got B"),
        ({"variant": "no"}, "variant must be among Flow Matching, .*; got no"),
        ({"batch": 6}, "batch must be a positive multiple of 4, got 6"),
        ({"steps": 0}, "steps must be >= 1, got 0"),
    ],
)
def test_bad_values_are_refused_by_name(step_profile, values, message):
    with pytest.raises(ValueError, match=message):
        step_profile.Config(**values)
