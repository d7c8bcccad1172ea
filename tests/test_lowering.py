"""What is not here, an NVIDIA GPU and a TPU, gets programs that it can run: all that the package puts on a device
lowers for both, and the lowered programs neither compute in float64 nor talk to the host.

Nothing is allocated: networks, states and batches are shapes. Programs are lowered and not run.
"""

import functools
import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest
from devices import run_on_devices

import mf_eqx as mfx
from mf_eqx import metrics, nn, vae

BOTH = ("cuda", "tpu")
ROWS, LABELS, LATENT, IMAGE = 16, 1000, (4, 32, 32), (3, 32, 32)
KERNELS = {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}
TRITON = "__gpu$xla.gpu.triton"
DROPOUT = mfx.LabelDropout(0.1, LABELS)
OBJECTIVES = {
    "Flow Matching": mfx.Objective(identity=None, identity_share=0, label_dropout=DROPOUT),
    "MeanFlow": mfx.Objective(label_dropout=DROPOUT),
    "guided": mfx.Objective(guidance=mfx.Guidance(1.0, 0.5), label_dropout=DROPOUT),
    "improved": mfx.Objective(mfx.ImprovedMeanFlow(), identity_share=0.5, label_dropout=DROPOUT),
}


def dit(size, **options):
    """With a loop over the blocks, as where an accelerator is at hand."""
    return LATENT, lambda key: mfx.DiT(LATENT, size, labels=LABELS, dtype=jnp.bfloat16, unroll=1, **options, key=key)


def unet(size):
    return IMAGE, lambda key: mfx.UNet(IMAGE, size, labels=LABELS, dtype=jnp.bfloat16, key=key)


SMALL = mfx.DiTSize(depth=2, width=64, heads=1, patch=4)
CHUNKED = dit(SMALL, attention=nn.ChunkedAttention())
IN_CONTEXT = LATENT, lambda key: mfx.InContextDiT(LATENT, mfx.IMF_B2, labels=LABELS, dtype=jnp.bfloat16, key=key)
REMAT = jax.checkpoint_policies.dots_with_no_batch_dims_saveable


def shape(*axes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(axes, dtype)


def has_shape(leaf):
    return hasattr(leaf, "dtype") and hasattr(leaf, "shape")


@pytest.fixture(autouse=True)
def quick(unchecked):
    """Types are checked by other tests: to check them here takes most of the time."""


def lowered(function, *inputs, platforms=BOTH):
    """The program of a function for each of these platforms, as text."""
    dynamic, static = eqx.partition(inputs, has_shape)

    def arrays_to_arrays(dynamic):
        return eqx.filter(function(*eqx.combine(dynamic, static)), eqx.is_array)

    allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in (*KERNELS, TRITON)]
    exported = jax.export.export(jax.jit(arrays_to_arrays), platforms=platforms, disabled_checks=allowed)(dynamic)
    assert exported.platforms == tuple(platforms)
    return exported.mlir_module()


def lowered_step(objective, network, **options):
    """A whole training step, with Adam and one average."""
    data_shape, make = network
    step = mfx.TrainStep(OBJECTIVES[objective], optax.adam(1e-4), [mfx.ExponentialAverage(0.9999)])
    state = eqx.filter_eval_shape(
        lambda key: mfx.init_state(make(key), step.optimizer, step.averages, key=key), jr.key(0)
    )
    rows = shape(ROWS, *data_shape), shape(ROWS, dtype=jnp.int32)
    return lowered(lambda state, x, label: step(state, mfx.Batch(x, label)), state, *rows, **options)


def tensors(text, kind):
    """The numbers of elements of all tensors of this type."""
    return [math.prod(map(int, axes.split("x")[:-1])) for axes in re.findall(rf"tensor<((?:\d+x)*){kind}>", text)]


def runs_by_itself(text, kernels=frozenset()):
    """Whether a program needs nothing of its host and no library but these kernels, and has no float64."""
    called = set(re.findall(r"custom_call @([\w$.]+)", text))
    moved = re.findall(r"stablehlo\.(?:send|recv|infeed|outfeed)\b|pinned_host", text)
    return called <= kernels and not moved and not tensors(text, "f64")


# The steps


@pytest.mark.parametrize(
    ("objective", "network"),
    [
        pytest.param("Flow Matching", dit(mfx.DIT_B4), id="Flow Matching, B/4", marks=pytest.mark.slow),
        pytest.param("MeanFlow", dit(mfx.DIT_B4), id="MeanFlow, B/4", marks=pytest.mark.slow),
        pytest.param("guided", dit(mfx.DIT_B4), id="guided, B/4", marks=pytest.mark.slow),
        pytest.param("Flow Matching", dit(mfx.DIT_XL2), id="Flow Matching, XL/2", marks=pytest.mark.slow),
        pytest.param("MeanFlow", dit(mfx.DIT_XL2), id="MeanFlow, XL/2", marks=pytest.mark.slow),
        pytest.param("guided", dit(mfx.DIT_XL2, remat=REMAT), id="guided, XL/2, remat"),
        pytest.param("improved", IN_CONTEXT, id="improved MeanFlow, in-context B/2", marks=pytest.mark.slow),
        pytest.param("guided", CHUNKED, id="guided, chunked attention", marks=pytest.mark.slow),
        pytest.param("guided", unet(mfx.UNET_CIFAR10), id="guided, U-Net", marks=pytest.mark.slow),
    ],
)
def test_a_training_step_lowers_for_gpu_and_tpu_and_needs_no_host(objective, network):
    assert runs_by_itself(lowered_step(objective, network))


def small_step(objective, network):
    return lambda: lowered_step(objective, network)


def small_sampler():
    def generate(field, noise, label):  # not from a `Generator`, whose noise is float64 there
        return jax.vmap(lambda *row: mfx.sample(field, *row, times=mfx.uniform_times(4)))(noise, label)

    return lowered(generate, shapes_of(dit(SMALL)[1]), shape(ROWS, *LATENT), shape(ROWS, dtype=jnp.int32))


def small_features():
    network = shapes_of(lambda key: metrics.EfficientNetLite0(key=key))
    return lowered(
        lambda network, x: metrics.FeatureExtractor(network, metrics.ADM)(x), network, shape(ROWS, 3, 32, 32)
    )


def small_decoder():
    size = vae.AutoencoderSize(widths=(32, 32), blocks=1, latent=4, groups=8)
    autoencoder = shapes_of(lambda key: vae.Autoencoder(size, key=key))
    return lowered(lambda autoencoder, x: jax.vmap(autoencoder.decode)(x), autoencoder, shape(ROWS, 4, 16, 16))


SMALL_UNET = unet(mfx.UNetSize(width=32, multipliers=(1, 2), blocks=1, attention=(16,)))
SMALL_IMF = mfx.InContextDiTSize(depth=2, width=64, heads=1, patch=4, head_depth=1)
SMALL_IN_CONTEXT = LATENT, lambda key: mfx.InContextDiT(LATENT, SMALL_IMF, labels=LABELS, dtype=jnp.bfloat16, key=key)


@pytest.mark.parametrize(
    "lower",
    [
        pytest.param(small_step("MeanFlow", dit(SMALL)), id="DiT"),
        pytest.param(small_step("MeanFlow", SMALL_UNET), id="U-Net", marks=pytest.mark.slow),
        pytest.param(small_step("improved", SMALL_IN_CONTEXT), id="improved"),
        pytest.param(small_sampler, id="sampler"),
        pytest.param(small_features, id="features"),
        pytest.param(small_decoder, id="decoder"),
    ],
)
def test_a_program_has_no_float64_beyond_numbers_per_row_even_where_it_is_enabled(x64, lower):
    assert max(tensors(lower(), "f64"), default=0) <= ROWS


def test_numbers_in_float64_would_be_found(x64):
    assert tensors(lowered(jnp.sin, shape(2, 3, dtype=jnp.float64)), "f64")[0] == 6


def test_a_callback_would_be_found():
    def printing(x):
        jax.debug.print("{}", x)
        return x

    assert not runs_by_itself(jax.jit(printing).lower(shape(3)).as_text())


# cuDNN's attention


@pytest.fixture
def cudnn(monkeypatch):
    """JAX asks for cuDNN's version while it traces, of a library that is not here: as if it were."""
    kernels = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(kernels, "check_cudnn_version", lambda: 91000)


def test_a_step_with_cudnn_attention_lowers_for_gpu_with_its_kernels_alone(cudnn):
    text = lowered_step("MeanFlow", dit(mfx.DIT_XL2, attention=nn.CudnnAttention()), platforms=("cuda",))
    assert runs_by_itself(text, KERNELS)
    # Blocks are scanned: one kernel for rows with r = t, one for the JVP's primal, and as many for the backward passes.
    assert [text.count(f"@{kernel}(") for kernel in sorted(KERNELS)] == [2, 2]
    # Weights of attention are held for the tangents alone, which belong to a quarter of the rows.
    assert f"tensor<{ROWS // 4}x16x256x256xf32>" in text
    assert not re.search(rf"tensor<(?:{ROWS}|{3 * ROWS // 4})x16x256x256x", text)


def test_cudnn_attention_lowers_for_no_other_platform(cudnn):
    attention, inputs = nn.CudnnAttention(), [shape(64, 2, 64, dtype=jnp.bfloat16)] * 3
    with pytest.raises(NotImplementedError, match="not found for platform tpu"):
        lowered(attention, *inputs, platforms=("tpu",))


# Kernels in Pallas


@pytest.fixture
def h100():
    """From JAX 0.11 on, Pallas asks while it lowers for which GPU."""
    device = jax.sharding.AbstractDevice("NVIDIA H100", None, "gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        yield


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("size", [mfx.DIT_B2, pytest.param(mfx.DIT_XL2, marks=pytest.mark.slow)], ids=["64", "72"])
def test_a_step_with_attention_in_pallas_lowers_for_gpu_with_its_kernels_alone(h100, size):
    text = lowered_step("MeanFlow", dit(size, attention=nn.PallasAttention()), platforms=("cuda",))
    assert runs_by_itself(text, {TRITON})
    # Blocks are scanned: the value of rows with r = t, value and tangent of the others, and two kernels for the
    # gradients of each.
    assert text.count(f"@{TRITON}(") == 6
    # Nothing is as large as the weights of attention.
    assert not re.search(r"tensor<(?:\d+x)*256x256x", text)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_attention_in_pallas_lowers_for_no_other_platform(platform):
    attention, inputs = nn.PallasAttention(), [shape(64, 2, 64, dtype=jnp.bfloat16)] * 3
    with pytest.raises(ValueError, match=r"Only interpret mode is supported on CPU|cannot be used for tpu lowering"):
        lowered(attention, *inputs, platforms=(platform,))


# Sampling and evaluation


@functools.cache
def shapes_of(make):
    return eqx.filter_eval_shape(make, jr.key(0))


@pytest.mark.parametrize("method", [mfx.sample, mfx.sample_euler, mfx.sample_heun])
def test_generation_lowers_for_gpu_and_tpu_and_needs_no_host(method):
    def generate(field, key, numbers):
        return mfx.Generator(field, key, LATENT, mfx.uniform_times(4), LABELS, method=method)(numbers)

    numbers = shape(ROWS, dtype=jnp.int32)
    field = shapes_of(dit(mfx.DIT_XL2 if method is mfx.sample else SMALL)[1])
    assert runs_by_itself(lowered(generate, field, jax.eval_shape(lambda: jr.key(0)), numbers))


def test_features_for_distances_lower_for_gpu_and_tpu_and_need_no_host():
    network = shapes_of(lambda key: metrics.EfficientNetLite0(key=key))

    def features(network, x):
        return metrics.FeatureExtractor(network, metrics.ADM)(x)

    assert runs_by_itself(lowered(features, network, shape(ROWS, 3, 64, 64)))


@pytest.mark.slow
def test_inception_and_the_decoder_lower_for_gpu_and_tpu_and_need_no_host():
    inception = shapes_of(lambda key: metrics.Inception(key=key))
    autoencoder = shapes_of(lambda key: vae.Autoencoder(vae.SD_VAE, key=key))

    def judged(inception, autoencoder, latent):
        images = jax.vmap(autoencoder.decode)(latent)
        return metrics.FeatureExtractor(inception, metrics.ADM)(images)

    assert runs_by_itself(lowered(judged, inception, autoencoder, shape(ROWS, 4, 32, 32)))


# Eight devices


@pytest.fixture(scope="module")
def on_eight():
    return run_on_devices("lower_on_devices.py")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["data parallel", "FSDP"])
def test_a_step_on_eight_devices_lowers_for_gpu_and_tpu_and_needs_no_host(on_eight, how):
    assert on_eight[how]["devices"] == 8
    assert on_eight[how]["runs_by_itself"]


@pytest.mark.slow
def test_a_data_parallel_step_that_is_lowered_for_gpu_communicates_in_one_all_reduce(on_eight):
    assert on_eight["data parallel"]["collectives"] == {"all-reduce": 1}


@pytest.mark.slow
def test_fsdp_gathers_and_sums_and_moves_no_rows_between_devices(on_eight):
    found = on_eight["FSDP"]["collectives"]
    assert found["all-gather"] > 0 and found["reduce-scatter"] > 0
    assert set(found) <= {"all-gather", "all-reduce", "reduce-scatter"}
