"""Training of a tokenizer: the loss is its formula, the ordinary step minimises it, and nothing else is taken."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from fields import filled

import mf_eqx as mfx
from mf_eqx import data, vae

SIZE = vae.AutoencoderSize(widths=(2, 4), blocks=1, latent=2, groups=1, channels=1)
X = np.random.default_rng(5).integers(0, 256, (4, 1, 4, 6), np.uint8)
X[:2] = [[[[0]]], [[[255]]]]  # two of one brightness each
KEY = jr.key(3)
OPTIMIZER = optax.adam(1e-2)


@functools.cache
def fresh(dtype=jnp.float32):
    with jax.enable_x64(False):
        return vae.Autoencoder(SIZE, dtype=dtype, key=jr.key(0, impl="rbg"))  # compiled sooner than threefry


@functools.cache
def tokenizer():
    with jax.enable_x64(False):
        return filled(lambda: vae.Autoencoder(SIZE, key=jr.key(0)))


def batch(rows=range(4)):
    rows = np.array(rows)
    return mfx.Batch(X[rows].astype(np.float32) / 127.5 - 1, None, rows.astype(np.int32))


@eqx.filter_jit
def evaluated(objective, network, batch, key=KEY):
    return objective(network, batch, key=key)


def values(objective, network, batch):
    loss, metrics = evaluated(objective, network, batch)
    assert loss == metrics["loss"].value
    return {name: float(mean.value) for name, mean in metrics.items()}


def test_loss_is_the_formula():
    found, rows = values(vae.AutoencoderObjective(0.25), tokenizer(), batch()), batch()
    absolute, squared, kl = [], [], []
    for x, index in zip(rows.x, rows.index, strict=True):
        moments = eqx.filter_jit(tokenizer().encode)(jnp.asarray(x))
        latent = moments.mean + moments.std * jr.normal(jr.fold_in(KEY, index), moments.mean.shape)
        decoded = np.asarray(eqx.filter_jit(tokenizer().decode)(latent))
        absolute.append(np.abs(x - decoded).sum())
        squared.append(((x - decoded) ** 2).sum())
        mean, std = np.asarray(moments.mean), np.asarray(moments.std)
        kl.append(0.5 * (mean**2 + std**2 - 1 - np.log(std**2)).sum())
    np.testing.assert_allclose(found["loss"], (np.mean(absolute) + 0.25 * np.mean(kl)) / 24, rtol=1e-5)
    np.testing.assert_allclose(found["absolute_error"], np.mean(absolute) / 24, rtol=1e-5)
    np.testing.assert_allclose(found["squared_error"], np.mean(squared) / 24, rtol=1e-5)
    np.testing.assert_allclose(found["kl"], np.mean(kl), rtol=1e-5)
    assert 0.25 * found["kl"] / 24 > 1e-3 * found["loss"]  # so that its weight is seen


def test_noise_of_an_image_does_not_depend_on_the_rows_beside_it():
    objective = vae.AutoencoderObjective(0.25)
    whole = values(objective, tokenizer(), batch())
    halves = [values(objective, tokenizer(), batch(rows)) for rows in ((3, 0, 0, 3), (2, 2, 1, 1))]
    for name in whole:
        np.testing.assert_allclose(whole[name], np.mean([half[name] for half in halves]), rtol=1e-5)
    others = eqx.tree_at(lambda batch: batch.index, batch(), np.arange(4, 8, dtype=np.int32))
    assert abs(values(objective, tokenizer(), others)["loss"] - whole["loss"]) > 1e-4 * whole["loss"]


def trained(kl, steps=60):
    """The last state, and all metrics, of a training on the same four images."""
    objective = vae.AutoencoderObjective(kl)
    step = mfx.TrainStep(objective, OPTIMIZER, [mfx.ExponentialAverage(0.9)], data.FromPixels())
    state = mfx.init_state(fresh(), OPTIMIZER, step.averages, objective, key=KEY)
    records = []
    for _ in range(steps):
        state, metrics = step(state, mfx.Batch(X))
        records.append({name: float(mean.value) for name, mean in metrics.items()})
    return state, records


@pytest.mark.rehearsal
def test_ordinary_step_trains_a_tokenizer_and_its_average():
    state, records = trained(0.0)
    assert int(state.faults.total) == 0 and isinstance(state.averages[0], vae.Autoencoder)
    assert records[-1]["absolute_error"] < 0.6 * records[0]["absolute_error"]
    objective = vae.AutoencoderObjective(0.0)
    after, before = (values(objective, network, batch())["loss"] for network in (state.averages[0], fresh()))
    assert after < 0.8 * before
    pairs = zip(*(jax.tree.leaves_with_path(network) for network in (state.field, fresh())), strict=True)
    assert not [jax.tree_util.keystr(path) for (path, moved), (_, before) in pairs if (moved == before).all()]


@pytest.mark.slow  # 13 s: compiling another step
def test_a_large_weight_takes_the_image_out_of_the_latent():
    (_, free), (_, held) = trained(0.0), trained(100.0)
    assert held[-1]["kl"] < 0.05 * held[0]["kl"] and held[-1]["kl"] < 0.05 * free[-1]["kl"]
    assert held[-1]["absolute_error"] > free[-1]["absolute_error"]


@pytest.mark.slow
def test_parts_of_a_batch_in_turn_have_the_gradient_and_metrics_of_all_together():
    sgd = optax.sgd(1.0)

    def run(accumulation):
        step = mfx.TrainStep(vae.AutoencoderObjective(1e-3), sgd, accumulation=accumulation)
        return step(mfx.init_state(fresh(), sgd, objective=step.objective, key=KEY), batch())

    (whole, together), (found, in_turn) = run(1), run(2)
    changes = [
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(jax.tree.map(jnp.subtract, state.field, fresh()))])
        for state in (whole, found)
    ]
    # In float32, where parameters of size 1 change by 1e-3 and more.
    np.testing.assert_allclose(changes[1], changes[0], atol=1e-4 * np.abs(changes[0]).max())
    for name in ("loss", "absolute_error", "kl", "gradient_norm"):
        np.testing.assert_allclose(in_turn[name].value, together[name].value, rtol=1e-4)


@pytest.mark.slow
def test_bfloat16_gives_nearly_the_loss_and_gradient_of_float32_in_float32():
    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def loss(network):
        return vae.AutoencoderObjective(1e-3)(network, batch(), key=KEY)[0]

    (expected, gradient), (found, slope) = loss(fresh()), loss(fresh(jnp.bfloat16))
    assert found.dtype == jnp.float32 and {leaf.dtype for leaf in jax.tree.leaves(slope)} == {jnp.dtype("float32")}
    # bfloat16 has 8 bits: single values are off by up to 0.4%, after some twenty layers by some percent.
    assert 0 < abs(found - expected) < 0.02 * expected
    slopes, gradients = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (slope, gradient)
    )
    assert 0 < np.linalg.norm(slopes - gradients) < 0.1 * np.linalg.norm(gradients)


def twice(image):
    return 2 * image


def test_perceptual_term_is_added_with_its_coefficient():
    plain = values(vae.AutoencoderObjective(0.25), tokenizer(), batch())
    term = mfx.PerceptualTerm(twice, (4, 6), 0.3, smallest_crop=1, weight=mfx.ConstantWeight())
    found = values(vae.AutoencoderObjective(0.25, perceptual=term), tokenizer(), batch())
    np.testing.assert_allclose(found["perceptual_loss"], 0.3 * 4 * 24 * plain["squared_error"], rtol=1e-4)
    np.testing.assert_allclose(found["loss"], plain["loss"] + found["perceptual_loss"], rtol=1e-5)


class Field(mfx.AbstractField):
    weight: jax.Array

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.weight * z


@pytest.mark.usefixtures("unchecked")
def test_states_hold_what_the_objective_learns_and_nothing_else():
    objective, field = vae.AutoencoderObjective(), Field(jnp.ones(()))
    with pytest.raises(ValueError, match=r"field must be .*Autoencoder, got Field"):
        mfx.init_state(field, OPTIMIZER, objective=objective, key=KEY)
    with pytest.raises(
        ValueError, match=r"field must be callable as field\(z, r, t, condition, key=key\), got Autoenc"
    ):
        mfx.init_state(tokenizer(), OPTIMIZER, key=KEY)
    with pytest.raises(
        ValueError, match=r"field must be callable as field\(z, r, t, condition, key=key\), got Autoenc"
    ):
        mfx.init_state(tokenizer(), OPTIMIZER, objective=mfx.Objective(), key=KEY)


@pytest.mark.usefixtures("unchecked")
def test_a_step_refuses_the_state_of_another_kind_of_network():
    objective = vae.AutoencoderObjective()
    of_tokenizer = mfx.init_state(tokenizer(), OPTIMIZER, objective=objective, key=KEY)
    rule = r"field must be callable as field\(z, r, t, condition, key=key\), got Autoencoder"
    with pytest.raises(ValueError, match=rule):
        mfx.TrainStep(mfx.Objective(), OPTIMIZER)(of_tokenizer, mfx.Batch(X))
    of_field = mfx.init_state(Field(jnp.ones(())), OPTIMIZER, key=KEY)
    with pytest.raises(ValueError, match=r"field must be .*Autoencoder, got Field"):
        mfx.TrainStep(objective, OPTIMIZER)(of_field, mfx.Batch(X))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("teacher", [0, Field(jnp.ones(()))], ids=["average", "frozen"])
def test_a_teacher_is_refused(teacher):
    rule = "teacher must be None for AutoencoderObjective, which learns no field, got "
    with pytest.raises(ValueError, match=rule):
        mfx.TrainStep(vae.AutoencoderObjective(), OPTIMIZER, [mfx.ExponentialAverage(0.9)], teacher=teacher)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vae.AutoencoderObjective(-1e-6), "kl must be >= 0 and finite, got -1e-06"),
        (lambda: vae.AutoencoderObjective(np.inf), "kl must be >= 0 and finite, got inf"),
        (lambda: vae.AutoencoderObjective(perceptual=twice), "perceptual must be .*PerceptualTerm, got"),
        (
            lambda: vae.AutoencoderObjective()(Field(jnp.ones(())), batch(), key=KEY),
            r"field must be .*Autoencoder, got Field",
        ),
        (
            lambda: vae.AutoencoderObjective()(tokenizer(), mfx.Batch(X), key=KEY),
            r"x must be floating point, in \[-1, 1\], got uint8",
        ),
        (
            lambda: vae.AutoencoderObjective()(tokenizer(), mfx.Batch(np.zeros((2, 3, 4, 6), np.float32)), key=KEY),
            r"x must be \(1, height, width\) .* got \(3, 4, 6\)",
        ),
    ],
    ids=range(6),
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
