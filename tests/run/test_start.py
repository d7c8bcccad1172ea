"""What a training begins from: weights or checkpoints of another run. With no steps, the state is that at the start."""

import dataclasses
import functools
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
import trainer

import mf_eqx as mfx
from mf_eqx import checkpoint, data, run, vae
from mf_eqx.run._start import description_of, started

for package in ("grain", "orbax.checkpoint", "safetensors"):
    pytest.importorskip(package)

CONFIG = trainer.Config(steps=2, save_every=1, preview_every=0)


def begun(root, start, config=CONFIG, **options):
    """The state of a run before its first step."""
    return trainer.train(config, run.RunDirectory(root / "new"), start=str(start), steps=0, **options)


def plain(leaf):
    return np.asarray(jr.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)


def same(one, other):
    return bool(eqx.tree_equal(*(jax.tree.map(plain, eqx.filter(tree, eqx.is_array)) for tree in (one, other))))


@pytest.fixture(scope="module")
def fresh():
    """The state of a run from nothing."""
    return eqx.filter_jit(trainer.parts(16, False, False, 0.5, 1, None)[1])()


@pytest.fixture(scope="module")
def other(fresh, tmp_path_factory):
    """Directory and last state of a run of two steps, each of which adds 1 to all that is trained."""
    root, state = tmp_path_factory.mktemp("other"), fresh
    checkpoints = checkpoint.Checkpoints(root / "checkpoints")

    def trained(state):
        return state.field, state.averages, state.opt_state, state.step

    for number in (1, 2):
        arrays, others = eqx.partition(trained(state), eqx.is_array)
        added = jax.tree.map(lambda x: jnp.asarray(plain(x) + 1), arrays)
        state = eqx.tree_at(trained, state, eqx.combine(added, others))
        checkpoints.save(number, state, {"network": mfx.describe(state.field)})
    checkpoints.wait()
    return root, state


def test_a_checkpoint_gives_network_averages_and_optimiser(other, fresh, tmp_path, capsys):
    root, last = other
    state = begun(tmp_path, root)
    for part in ("field", "averages", "opt_state"):
        assert same(getattr(state, part), getattr(last, part)), part
        assert not same(getattr(state, part), getattr(fresh, part)), part
    assert int(state.step) == 0 and same(state.key, fresh.key)
    found = f"start: network, averages, state of the optimiser from {root}/checkpoints/00000002; new: all else\n"
    assert found in capsys.readouterr().out


def test_weights_give_the_network_and_averages_that_are_its_copies(other, fresh, tmp_path, capsys):
    average = other[1].averages[0]
    checkpoint.save_weights(tmp_path / "ema.safetensors", average)
    state = begun(tmp_path, tmp_path / "ema.safetensors")
    assert same(state.field, average) and same(state.averages, (average,)) and same(state.opt_state, fresh.opt_state)
    assert "ema.safetensors; new: averages, state of the optimiser, all else\n" in capsys.readouterr().out


def test_the_state_of_the_objective_is_as_make_state_has_it(tmp_path):
    field = mfx.MLP(2, width=8, depth=1, key=jr.key(0))
    objective = mfx.SampleObjective(mfx.FrechetLoss(np.zeros(2, np.float32), np.eye(2, dtype=np.float32)))
    step = mfx.TrainStep(objective, optax.sgd(0.1))
    checkpoint.save_weights(tmp_path / "ema.safetensors", field)
    filled = objective.fill(field, [mfx.Batch(np.zeros((8, 2), np.float32))], key=jr.key(1))

    def make_state(filled):
        state = mfx.init_state(field, step.optimizer, (), objective, key=jr.key(0))
        return dataclasses.replace(state, objective=filled)

    state = started(str(tmp_path / "ema.safetensors"), eqx.Partial(make_state, filled), step)()
    assert same(state.objective, filled) and filled[0].weight > 0


def test_the_number_of_a_checkpoint_chooses_it(other, tmp_path):
    path = other[0] / "checkpoints" / "00000001"
    state, last = begun(tmp_path, path), other[1]
    assert int(state.opt_state[0].count) == 1 and not same(state.field, last.field)


def test_another_optimiser_begins_anew(other, tmp_path, capsys):
    state = begun(tmp_path, other[0], dataclasses.replace(CONFIG, sgd=True))
    assert same(state.field, other[1].field) and not jax.tree.leaves(state.opt_state)
    assert "new: state of the optimiser, all else" in capsys.readouterr().out


def continued(tmp_path, optimizer):
    """The state of an optimiser at the start from one of three steps."""
    step = mfx.TrainStep(mfx.Objective(), optimizer)

    def make_state():
        return mfx.init_state(mfx.MLP(2, width=4, depth=1, key=jr.key(0)), optimizer, key=jr.key(1))

    trained = jax.tree.map(lambda leaf: leaf + 3, make_state().opt_state)
    checkpoints = checkpoint.Checkpoints(tmp_path / "old")
    checkpoints.save(3, eqx.tree_at(lambda state: state.opt_state, make_state(), trained))
    checkpoints.wait()
    stream = data.Stream(data.ArraySource(np.zeros((8, 2), np.float32)), 8)
    arguments = (trainer.Config(), step, make_state, stream, run.RunDirectory(tmp_path / "new"))
    return run.train(*arguments, steps=0, start=str(tmp_path / "old")).opt_state


def test_schedules_start_again_and_moments_do_not(tmp_path):
    adam, schedule = continued(tmp_path, optax.adam(optax.linear_schedule(0.0, 1e-2, 5)))
    assert (int(adam.count), int(schedule.count)) == (3, 0)


@pytest.mark.slow
def test_injected_schedules_start_again_and_moments_do_not(tmp_path):
    rate = optax.linear_schedule(0.5, 1e-2, 5)
    state = continued(tmp_path, optax.inject_hyperparams(optax.adam)(rate, b1=0.25))
    assert int(state.count) == int(state.hyperparams_states["learning_rate"].count) == 0
    assert (float(state.hyperparams["learning_rate"]), float(state.hyperparams["b1"])) == (0.5, 0.25)
    assert int(state.inner_state[0].count) == 3


def test_a_damaged_newest_checkpoint_is_passed_over(other, tmp_path, capsys):
    shutil.copytree(other[0], tmp_path / "copy")
    (tmp_path / "copy" / "checkpoints" / "00000002.json").write_text("{")
    state = begun(tmp_path, tmp_path / "copy")
    assert int(state.opt_state[0].count) == 1
    lines = capsys.readouterr().out
    assert "00000002: passed over, because its record" in lines and "checkpoints/00000001; new: all else\n" in lines
    (tmp_path / "copy" / "checkpoints" / "00000001.json").write_text("{")
    with pytest.raises(checkpoint.CheckpointError, match="its record"):
        begun(tmp_path, tmp_path / "copy")


@pytest.mark.slow
def test_a_run_that_continues_does_not_read_its_start_again(other, tmp_path):
    shutil.copytree(other[0], tmp_path / "copy")
    arguments = (CONFIG, run.RunDirectory(tmp_path / "new"))
    trainer.train(*arguments, start=str(tmp_path / "copy"), steps=1)
    shutil.rmtree(tmp_path / "copy")
    assert int(trainer.train(*arguments, start=str(tmp_path / "copy")).opt_state[0].count) == 4


def test_another_network_is_refused_by_its_description(tmp_path):
    step = mfx.TrainStep(mfx.Objective(), optax.sgd(1.0))

    def make_state(heads=4):
        field = mfx.DiT((1, 4, 4), mfx.DiTSize(1, 8, heads, patch=2), key=jr.key(0))
        return mfx.init_state(field, step.optimizer, key=jr.key(1))

    checkpoint.save_weights(tmp_path / "ema.safetensors", make_state(heads=2).field)
    with pytest.raises(ValueError, match=r"start must be of size .*'heads': 4.*, got .*'heads': 2.* in "):
        started(str(tmp_path / "ema.safetensors"), make_state, step)


def tokenizer_state(step, groups, value=1.0):
    """Of a tokenizer all of whose parameters have the same value."""
    size = vae.AutoencoderSize(widths=(4,), blocks=1, latent=1, groups=groups, channels=1)
    shapes, others = eqx.partition(
        eqx.filter_eval_shape(lambda: vae.Autoencoder(size, key=jr.key(0))),
        lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct),
    )
    filled = jax.tree.map(lambda leaf: jax.device_put(np.full(leaf.shape, value, leaf.dtype)), shapes)
    tokenizer = eqx.combine(filled, others)
    return mfx.init_state(tokenizer, step.optimizer, step.averages, step.objective, key=jr.key(1))


def test_another_tokenizer_is_refused_by_its_size(tmp_path):
    step = mfx.TrainStep(vae.AutoencoderObjective(), optax.sgd(1.0))
    checkpoints, saved = checkpoint.Checkpoints(tmp_path / "checkpoints"), tokenizer_state(step, 2, value=2.0)
    checkpoints.save(1, saved, {"network": description_of(saved.field)})
    checkpoints.wait()
    found = started(str(tmp_path), functools.partial(tokenizer_state, step, 2), step)()
    assert same(found.field, saved.field)
    with pytest.raises(ValueError, match="start must be of groups 4, got 2 in "):
        started(str(tmp_path), functools.partial(tokenizer_state, step, 4), step)
    with pytest.raises(ValueError, match="start must be of network MLP, got Autoencoder in "):
        started(str(tmp_path), trainer.parts(16, False, False, 0.5, 1, None)[1], step)


@pytest.mark.parametrize("kind", ["weights", "checkpoint"])
def test_another_network_is_refused(kind, other, tmp_path):
    path = other[0]
    if kind == "weights":
        path = tmp_path / "ema.safetensors"
        checkpoint.save_weights(path, other[1].averages[0])
    with pytest.raises(ValueError, match="start must be of width 8, got 16 in "):
        begun(tmp_path, path, dataclasses.replace(CONFIG, width=8))


def test_a_directory_of_several_trainings_is_refused_with_their_names(other, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(other[0], tmp_path / "both" / name)
    with pytest.raises(ValueError, match=r"start must be .* with none; there are some in .*both/a and .*both/b"):
        begun(tmp_path, tmp_path / "both")
    shutil.rmtree(tmp_path / "both" / "b")
    assert same(begun(tmp_path, tmp_path / "both").field, other[1].field)


def test_a_missing_start_is_an_error_with_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        begun(tmp_path, "nowhere")
