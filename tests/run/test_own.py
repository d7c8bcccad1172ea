"""Classes from a Python file of a user's own."""

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import mf_eqx as mfx
from mf_eqx import run

MINE = """
import equinox as eqx
import jax
import jax.numpy as jnp
import mf_eqx as mfx
from mf_eqx import Shortcut
from beside import WIDTH

class Net(mfx.AbstractField):
    layer: eqx.nn.Linear

    def __init__(self, size, *, key):
        self.layer = eqx.nn.Linear(size, size, key=key)

    def __call__(self, z, r, t, condition=None, *, key=None):
        return t * self.layer(z)

class Flat(mfx.AbstractField):
    weight: jax.Array

    def __init__(self, shape, *, key):
        self.weight = jnp.ones(3)

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.weight * jnp.sum(z)

class Mix(mfx.AbstractIdentity):
    facts = mfx.Facts()

    def residual(self, field, row):
        return row.evaluate(field, row.z, row.r, row.t) - row.v

class Scaled(mfx.AbstractIdentity):
    factor: float
    facts = mfx.Facts()

    def residual(self, field, row):
        return self.factor * row.v
"""


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "beside.py").write_text("WIDTH = 8\n")
    (tmp_path / "mine.py").write_text(MINE)
    return str(tmp_path / "mine.py")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import jax\njax.nothing", r"mine.py, line 2: AttributeError: module 'jax' has no attribute 'nothing'"),
        ("def f(:", r"mine.py: SyntaxError: .*mine.py, line 1"),
    ],
)
def test_file_that_does_not_run_is_refused_with_its_line(tmp_path, text, found):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError, match=f"identity must be a Python file that runs, but .*{found}"):
        run.own_identity("identity", str(tmp_path / "mine.py"), 1)


def test_network_is_made_for_a_size_or_a_shape(mine):
    make = run.own_network("network", f"{mine}:Net", (2,))
    field = make(key=jr.key(0))
    assert isinstance(field, mfx.AbstractField)
    assert field(jnp.ones(2), jnp.zeros(()), jnp.ones(())).shape == (2,)
    with pytest.raises(ValueError, match=r"network must be a class that can be called as Net\(\(3, 4\), key=key\)"):
        run.own_network("network", f"{mine}:Net", (3, 4))


def test_network_that_returns_another_shape_is_refused(mine):
    with pytest.raises(ValueError, match=r"network must return the shape of z, \(2,\), got \(3,\) from Flat\(2, key"):
        run.own_network("network", f"{mine}:Flat", (2,))


def test_network_is_tried_with_a_condition_if_there_is_one(mine):
    label = jax.ShapeDtypeStruct((), jnp.int32)
    assert run.own_network("network", f"{mine}:Net", (2,), label)(key=jr.key(0)).layer.in_features == 2


def test_a_class_that_takes_labels_gets_their_number(mine, tmp_path):
    text = MINE.replace("size, *, key", "size, labels=5, *, key").replace("Linear(size, size,", "Linear(labels, size,")
    (tmp_path / "labels.py").write_text(text.replace("self.layer(z)", "self.layer.weight[:, condition]"))
    label, place = jax.ShapeDtypeStruct((), jnp.int32), f"{tmp_path}/labels.py:Net"
    sizes = [
        run.own_network("network", place, (2,), label, labels=n)(key=jr.key(0)).layer.in_features for n in (3, None)
    ]
    assert sizes == [3, 5]
    assert run.own_network("network", f"{mine}:Net", (2,), label, labels=3)(key=jr.key(0)).layer.in_features == 2


def test_identity_is_made_without_arguments(mine):
    assert type(run.own_identity("identity", f"{mine}:Mix", 1)).__name__ == "Mix"
    with pytest.raises(ValueError, match="identity must be a class that can be made without arguments, got Scaled"):
        run.own_identity("identity", f"{mine}:Scaled", 1)


def test_a_class_from_elsewhere_counts_by_name_alone(mine, tmp_path):
    assert run.own_class("identity", f"{mine}:Shortcut", mfx.AbstractIdentity) is mfx.Shortcut
    only = tmp_path / "only.py"
    only.write_text("from mf_eqx import Shortcut\n")
    with pytest.raises(
        ValueError, match=r"identity must be FILE.py:CLASS .* one .*; got .*only.py, which defines none"
    ):
        run.own_class("identity", str(only), mfx.AbstractIdentity)


def test_a_file_with_one_such_class_needs_no_name(tmp_path):
    path = tmp_path / "one.py"
    path.write_text("from mf_eqx import AbstractWeight\n\nclass One(AbstractWeight):\n    __call__ = lambda *_: 1\n")
    assert run.own_class("weight", str(path), mfx.AbstractWeight).__name__ == "One"


def test_what_is_not_there_is_refused_with_what_is(mine):
    with pytest.raises(ValueError, match=r"network must name a subclass of AbstractField .* has Net, Flat; got Mix"):
        run.own_class("network", f"{mine}:Mix", mfx.AbstractField)
    with pytest.raises(ValueError, match=r"network must be FILE.py:CLASS unless .*; got .*, which defines Net, Flat"):
        run.own_class("network", mine, mfx.AbstractField)
    with pytest.raises(ValueError, match=r"network must be a Python file, got none\.py"):
        run.own_class("network", "none.py:Net", mfx.AbstractField)


def test_another_file_is_not_run(tmp_path):
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(ValueError, match=r"network must be a Python file, got .*notes\.txt"):
        run.own_file("network", str(tmp_path / "notes.txt"))


def test_a_file_of_the_same_name_in_another_folder_is_another_file(mine, tmp_path, monkeypatch):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "mine.py").write_text("WIDTH = 3\n")
    found = []
    for folder in (tmp_path, tmp_path / "below"):
        monkeypatch.chdir(folder)
        found.append(run.own_file("own", "mine.py"))
    assert found[0].digest == run.own_file("own", mine).digest and found[1].members["WIDTH"] == 3


def test_digest_is_that_of_the_text(mine, tmp_path):
    same, other = tmp_path / "same.py", tmp_path / "other.py"
    same.write_text(MINE)
    other.write_text(MINE + "# changed\n")
    digests = [run.own_file("own", str(path)).digest for path in (f"{mine}:Net", same, other)]
    assert digests[0] == digests[1] != digests[2]
