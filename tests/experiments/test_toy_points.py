"""Points, a network and methods of one's own in the toy script."""

import dataclasses
import json

import numpy as np
import pytest

from mf_eqx import checkpoint, run

MINE = """
import equinox as eqx
import jax
import jax.numpy as jnp
import mf_eqx as mfx

class Net(mfx.AbstractField):
    mlp: eqx.nn.MLP

    def __init__(self, size, *, key):
        self.mlp = eqx.nn.MLP(size + 2, size, 8, 1, jax.nn.silu, key=key)

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.mlp(jnp.concatenate([z, jnp.stack([t, t - r])]))

class Mine(mfx.AbstractIdentity):
    facts = mfx.Facts()

    def residual(self, field, row):
        return row.evaluate(field, row.z, row.r, row.t) - row.v
"""


@pytest.fixture(scope="module")
def toy_2d(experiment):
    return experiment("toy_2d")


@pytest.fixture(scope="module")
def toy_points(experiment):
    return experiment("toy_points")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("cross.npy", 100 + 7 * np.array([[1, 0], [-1, 0], [0, 1], [0, -1]]))
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


def test_points_are_a_mixture_of_the_size_of_the_noise(toy_points, folder):
    mixture = toy_points.mixture_of_points("cross.npy", 0.1, 10)
    np.testing.assert_allclose(mixture.mean, [[1, 0], [-1, 0], [0, 1], [0, -1]], atol=1e-6)
    np.testing.assert_allclose(mixture.std, 0.1, rtol=1e-6)


def test_of_many_points_always_the_same_are_taken(toy_points, folder):
    np.save("many.npy", np.random.default_rng(1).standard_normal((100, 2)))
    np.save("copy.npy", np.load("many.npy"))
    found = [np.asarray(toy_points.mixture_of_points(name, 0.1, 30).mean) for name in ("many.npy", "copy.npy")]
    np.testing.assert_array_equal(*found)
    assert found[0].shape == (30, 2) and len(np.unique(found[0], axis=0)) == 30


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (np.zeros((3, 3)), r"data must hold points of shape \(rows, 2\), got \(rows, 3\) in .*threes.npy"),
        (np.ones((3, 2)), "data must hold two or more different points, got one in .*ones.npy"),
        (np.array([[0, np.nan], [1, 2]]), r"data must be finite numbers, got \[ 0. nan\] in row 0 of .*nan.npy"),
    ],
    ids=["threes", "ones", "nan"],
)
def test_other_files_are_refused(toy_2d, folder, request, points, message):
    path = folder / f"{request.node.callspec.id}.npy"
    np.save(path, points)
    with pytest.raises(ValueError, match=message):
        toy_2d.Config(data=(str(path),))


def test_what_is_not_there_is_refused(toy_2d, folder):
    with pytest.raises(FileNotFoundError, match=r"none\.npy"):
        toy_2d.Config(data=("none.npy",))
    with pytest.raises(ValueError, match=r"blur must lie in .*, got 0.0"):
        toy_2d.Config(data=("cross.npy",), blur=0.0)
    with pytest.raises(
        ValueError, match=r"network must name a subclass of AbstractField in .*mine.py, .* Net; got Mine"
    ):
        toy_2d.Config(network=f"{folder / 'mine.py'}:Mine")


def test_two_data_sets_of_one_name_are_refused(toy_2d, folder):
    (folder / "a").mkdir()
    for name in ("a/cross.npy", "two_moons.npy"):
        np.save(name, np.load("cross.npy"))
    with pytest.raises(ValueError, match=r"data must be files of different names, .*, got cross.npy, a/cross.npy"):
        toy_2d.Config(data=("cross.npy", "a/cross.npy", "two_moons"))
    with pytest.raises(ValueError, match=r"data must be files of different names, .*, got two_moons.npy"):
        toy_2d.Config(data=("cross.npy", "two_moons.npy"))


def test_a_cell_is_found_by_its_points_and_network_and_others_as_before(toy_2d, folder):
    cell, own = toy_2d.Cell("two_moons", "MeanFlow", 0), toy_2d.Cell("cross.npy", "MeanFlow", 0)
    plain, exact = toy_2d.Config(), own._replace(method="Exact")
    changed = dataclasses.replace(plain, blur=0.2, points=99)
    assert toy_2d.recipe(changed, cell) == toy_2d.recipe(plain, cell)
    assert not {"blur", "points", "network"} & set(toy_2d.recipe(plain, cell))
    np.save("moved.npy", np.load("cross.npy"))
    assert toy_2d.recipe(plain, own) == toy_2d.recipe(plain, own._replace(data="moved.npy"))
    assert toy_2d.recipe(changed, own) != toy_2d.recipe(plain, own)
    (folder / "other.py").write_text(MINE + "# changed")
    network, other = (dataclasses.replace(plain, network=f"{folder / name}.py:Net") for name in ("mine", "other"))
    assert toy_2d.recipe(network, exact) == toy_2d.recipe(plain, exact)
    recipes = [toy_2d.recipe(config, own) for config in (plain, network, other)]
    assert recipes[0] != recipes[1] != recipes[2]
    json.dumps(recipes)


def test_one_method_of_a_file_may_be_named(toy_2d, folder):
    (folder / "two.py").write_text(MINE + MINE.replace("Mine", "Other"))
    assert set(toy_2d.own_methods(str(folder / "two.py"))[0]) == {"Mine", "Other"}
    assert set(toy_2d.own_methods(f"{folder / 'two.py'}:Other")[0]) == {"Other"}


def test_a_network_of_ones_own_takes_the_place_of_mlp_and_dit(toy_2d, folder):
    config = toy_2d.Config(network=str(folder / "mine.py"))
    for data, size in (("cross.npy", 2), ("eight_gaussians_64d", 64)):
        assert toy_2d.make_field(config, data, 0).mlp.out_size == size


@pytest.mark.slow
def test_a_run_on_points_of_ones_own_leaves_a_table_and_pictures(toy_2d, folder):
    own = f"--identity {folder / 'mine.py'} --network {folder / 'mine.py'}:Net"
    arguments = f"--quick --data cross.npy {own} --blur 0.1 --steps 20 --rows 20 --samples 100 --large-samples 100"
    run.main(toy_2d.main, toy_2d.PRESETS, argv=arguments.split())
    (path,) = folder.glob("runs/*/all/*/results.json")
    rows = {row["method"]: row for row in json.loads(path.read_text())}
    assert set(rows) == {"FlowMatching", "MeanFlow", "Mine", "Exact"}
    assert rows["Exact"]["overall"] < 1e-6 < rows["Mine"]["overall"]
    notes = checkpoint.read_weights(path.parent / "cross_Mine.safetensors").notes
    points = np.load("cross.npy")
    back = notes.in_unit_of_data(((points - points.mean(axis=0)) / notes.std).astype(np.float32))
    np.testing.assert_allclose(back, points, rtol=1e-5, atol=1e-5)
    for kind in ("samples", "one_step", "errors", "flows"):
        assert (path.parent / f"cross_{kind}.png").stat().st_size > 0
