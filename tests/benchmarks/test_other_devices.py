"""What the package puts on a device compiles for a GPU and for a TPU, by their own compilers, where these are installed
(the extra `compilers`, in an environment of its own). `test_lowering.py` holds what can be said without them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest
from methods import guidance, METHODS

import mf_eqx as mfx
from mf_eqx import measure, nn, vae

pytestmark = pytest.mark.slow
ROWS, LABELS, LATENT = 64, 4, (4, 16, 16)


@pytest.fixture(params=["h100", "v5e"])
def one_device(request, benchmark_script, monkeypatch):
    pytest.importorskip("libtpu")
    pytest.importorskip("jax_plugins.xla_cuda12")
    where = benchmark_script("other_devices").target(request.param)
    # What a program does differently on one of them, it asks here.
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu" if request.param == "v5e" else "gpu")
    return mfx.Parallelism(devices=where.devices()[:1])


def shape(*axes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(axes, dtype)


def compiled(one_device, function, *inputs):
    """The program of a function for this device."""
    arrays, others = eqx.partition(inputs, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))

    def placed(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one_device.replicated)

    return measure.compile_program(function, *eqx.combine(jax.tree.map(placed, arrays), others))


def compiled_step(one_device, objective, make, data_shape, optimizer=optax.adam(1e-3)):
    """The program of a whole training step."""
    averages, teacher = [mfx.ExponentialAverage(0.9)], 0 if objective.needs_teacher else None
    step = mfx.TrainStep(objective, optimizer, averages, teacher=teacher, parallelism=one_device)

    def make_inputs(key):
        batch = mfx.Batch(jnp.zeros((ROWS, *data_shape)), jnp.zeros(ROWS, jnp.int32))
        return mfx.init_state(make(key), optimizer, averages, objective, key=key), batch

    return compiled(one_device, step, *eqx.filter_eval_shape(make_inputs, jr.key(0)))


def asks_the_host(program):
    return any(word in program.text for word in ("infeed(", "outfeed(", "send(", "recv(", "callback"))


def vectors(size):
    return lambda key: mfx.MLP(size, width=64, depth=2, labels=LABELS, key=key)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_of_every_method_compiles(one_device, name):
    identity = METHODS[name]
    objective = mfx.Objective(identity, identity_share=0.5, **guidance(identity, LABELS))
    assert not asks_the_host(compiled_step(one_device, objective, vectors(2), (2,)))


def in_context(key):
    size = mfx.InContextDiTSize(depth=2, width=64, heads=2, patch=4, head_depth=1)
    return mfx.InContextDiT(LATENT, size, labels=LABELS, velocity_head=True, dtype=jnp.bfloat16, key=key)


def test_a_step_of_improved_mean_flow_with_muon_compiles(one_device):
    identity = mfx.ImprovedMeanFlow()
    objective = mfx.Objective(identity, identity_share=0.5, **guidance(identity, LABELS))
    muon = optax.contrib.muon(1e-3, muon_weight_dimension_numbers=nn.muon_dimension_numbers)
    assert not asks_the_host(compiled_step(one_device, objective, in_context, LATENT, muon))


@pytest.mark.parametrize("method", [mfx.sample, mfx.sample_euler, mfx.sample_heun])
def test_generation_compiles(one_device, method):
    def generate(field, key, numbers):
        return mfx.Generator(field, key, LATENT, mfx.uniform_times(4), LABELS, method=method)(numbers)

    field = eqx.filter_eval_shape(in_context, jr.key(0))
    key = jax.eval_shape(lambda: jr.key(0))
    assert not asks_the_host(compiled(one_device, generate, field, key, shape(ROWS, dtype=jnp.int32)))


def test_the_decoder_of_latents_compiles(one_device):
    size = vae.AutoencoderSize(widths=(32, 32), blocks=1, latent=4, groups=8)
    autoencoder = eqx.filter_eval_shape(lambda key: vae.Autoencoder(size, key=key), jr.key(0))

    def decode(autoencoder, latent):
        return jax.vmap(autoencoder.decode)(latent)

    assert not asks_the_host(compiled(one_device, decode, autoencoder, shape(ROWS, *LATENT)))


def test_losses_on_batches_of_samples_compile(one_device):
    loss = mfx.FrechetLoss(jnp.zeros(8), jnp.eye(8))
    objective = mfx.SampleObjective((loss, mfx.Drifting()), weights=(1.0, 1.0))
    assert not asks_the_host(compiled_step(one_device, objective, vectors(8), (8,)))
