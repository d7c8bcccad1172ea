"""Conditions of any structure: rows come back as they were given, and what no field can use is refused by its name."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mf_eqx as mfx
from mf_eqx import data
from mf_eqx.data._source import AbstractSource
from mf_eqx.run._plan import batch_shapes

DRAWS = np.random.default_rng(0)
ROWS = 9
X = DRAWS.normal(size=(ROWS, 8, 3)).astype(np.float32)
VECTOR = DRAWS.normal(size=(ROWS, 12)).astype(np.float32)
TOKENS = DRAWS.integers(0, 50, (ROWS, 4)).astype(np.int32)
TREES = {
    "vector": VECTOR,
    "dict": {"joints": VECTOR, "words": TOKENS, "open": VECTOR[:, 0] > 0},
    "tuple": (VECTOR, [TOKENS, None]),
}
TREE = pytest.mark.parametrize("condition", TREES.values(), ids=TREES)


def same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def taken(condition, rows):
    return jax.tree.map(lambda leaf: leaf[rows], condition)


def source(condition, x=X):
    return data.ArraySource(x, condition=condition, name="robot")


# Rows in memory


@TREE
def test_rows_come_in_the_order_asked_for(condition):
    rows = np.array([3, 0, 3])
    found = source(condition).take(rows)
    assert found.label is None
    same(found.condition, taken(condition, rows))


@TREE
def test_source_tells_structure_shapes_and_dtypes(condition):
    like = source(condition).row_condition
    same(
        jax.tree.map(lambda leaf: np.zeros((ROWS, *leaf.shape), leaf.dtype), like),
        jax.tree.map(np.zeros_like, condition),
    )


def test_source_with_labels_has_no_other_condition():
    found = data.ArraySource(X, np.arange(ROWS))
    assert found.row_condition is None and found.take(np.array([1])).condition is None


def test_arrays_of_jax_and_other_byte_orders_are_taken():
    found = source({"a": jnp.asarray(VECTOR), "b": VECTOR.astype(">f4")}).take(np.arange(ROWS))
    same(found.condition, {"a": VECTOR, "b": VECTOR})


def longer(condition):
    return np.concatenate([condition, condition[:1]])


REFUSED = {
    "another length": (
        {"a": VECTOR[:3]},
        r"\['a'\] must be an array whose leading axis has the 9 rows of x, got shape",
    ),
    "a number": ({"a": 1.0}, r"\['a'\] must be an array whose leading axis has the 9 rows of x, got 1.0"),
    "lists": ([[0.0]] * ROWS, r"\[0\]\[0\] must be an array whose leading axis has the 9 rows of x, got 0.0"),
    "nothing": ({}, " must hold at least one array or be None, got {}"),
    "an empty axis": (VECTOR[:, :0], r" must have no empty axis, got rows of shape \(0,\)"),
    "text": ((np.array(["a"] * ROWS),), r"\[0\] must be of numbers of at most 64 bits, .* got <U1"),
    "complex": (VECTOR.astype(complex), " must be of numbers of at most 64 bits, .* got complex128"),
    "more bits": (VECTOR.astype(np.longdouble), " must be of numbers of at most 64 bits, .* got float128"),
}


@pytest.mark.parametrize(("condition", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_condition_of_rows_is_refused_by_name(condition, message):
    with pytest.raises(ValueError, match=f"robot: condition{message}"):
        source(condition)


def test_label_and_condition_are_refused_together():
    with pytest.raises(ValueError, match="arrays: label must be None with a condition, which may hold labels too, got"):
        data.ArraySource(X, TOKENS[:, 0], condition=VECTOR)


@pytest.mark.parametrize(
    ("label", "got"),
    [(VECTOR, r"float32 of shape \(9, 12\)"), (TOKENS, r"int32 of shape \(9, 4\)"), ({"a": VECTOR}, "dict")],
)
def test_condition_in_the_place_of_labels_is_told_where_it_belongs(label, got):
    rule = r"one integer for each row \(pass any other condition as condition=...\)"
    with pytest.raises(ValueError, match=rf"arrays: label must be an array of {rule}, got {got}"):
        data.ArraySource(X, label)


# Several as one


@TREE
def test_joined_source_has_the_conditions_of_its_parts(condition):
    parts = [source(taken(condition, slice(a, b)), X[a:b]) for a, b in itertools.pairwise((0, 2, 3, 9))]
    rows = DRAWS.permutation(ROWS)
    same(data.JoinedSource(parts, name="all").take(rows).condition, taken(condition, rows))


@pytest.mark.parametrize("other", [VECTOR[:, :3], VECTOR.astype(np.float64), {"a": VECTOR}, None])
def test_sources_of_different_conditions_are_not_joined(other):
    with pytest.raises(ValueError, match=r"robot: row_condition must be .* as in robot, got "):
        data.JoinedSource([source(VECTOR), source(other)], name="all")


# Batches


def stream(condition, batch=4, **options):
    pytest.importorskip("grain")
    return data.Stream(source(condition), batch, **options)


@TREE
def test_batch_has_the_conditions_of_its_rows(condition):
    found = stream(condition, seed=1)
    for step in (0, 5):
        same(found[step].condition, taken(condition, found.rows(step)))


@TREE
def test_iteration_puts_every_array_on_the_mesh(condition):
    parallelism = mfx.Parallelism(devices=jax.devices()[:1])
    (batch,) = stream(condition, parallelism=parallelism).batches(3, 4)
    same(batch.condition, stream(condition)[3].condition)
    assert all(leaf.sharding == parallelism.rows for leaf in jax.tree.leaves(batch.condition))


@TREE
def test_shapes_of_a_batch_are_known_before_it_is_read(condition):
    found = batch_shapes(stream(condition))
    same(
        jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), found.condition),
        zeros(stream(condition)[0].condition),
    )


def zeros(condition):
    return jax.tree.map(np.zeros_like, condition)


def put(value, dtype):
    found = np.abs(VECTOR).astype(dtype)
    found[5, 2] = value
    return {"joints": found}


VALUES = {
    "nan": (put(np.nan, np.float32), "must be finite, got NaN or infinity in row 5"),
    "infinity": (put(np.inf, np.float16), "must be finite, got NaN or infinity in row 5"),
    "large": (put(1e39, np.float64), r"must be finite as float32, .* got 1e\+39 in row 5"),
    "integer": (put(2**31, np.int64), "must fit into int32, which JAX .*, got 2147483648 in row 5"),
    "unsigned": (put(2**63, np.uint64), "must fit into uint32, which JAX .*, got 9223372036854775808 in row 5"),
}


@pytest.mark.parametrize(("condition", "message"), VALUES.values(), ids=VALUES)
def test_values_that_would_not_arrive_are_refused_by_name_and_row(condition, message):
    found = stream(condition, ROWS)
    with pytest.raises(ValueError, match=rf"robot: condition\['joints'\] {message}"):
        next(found.batches())


def test_values_that_arrive_where_jax_has_64_bits_pass(x64):
    for name in ("large", "integer", "unsigned"):
        assert len(stream(VALUES[name][0], ROWS)[0].x) == ROWS


def test_fingerprint_follows_the_condition():
    others = [
        VECTOR,
        VECTOR + (np.arange(ROWS) == 4)[:, None],
        VECTOR.astype(np.float64),
        VECTOR.reshape(ROWS, 3, 4),
        {"a": VECTOR},
        None,
    ]
    found = [repr(stream(condition).fingerprint()) for condition in others]
    assert len(set(found)) == len(others) and found[0] == repr(stream(VECTOR.copy()).fingerprint())
    assert stream(None).fingerprint()["condition"] == {}


class Faulty(AbstractSource):
    """Returns another condition than it declares."""

    def __init__(self, condition, labels=None):
        self.name, self.row_shape, self.dtype, self.labels = "faulty", X.shape[1:], X.dtype, labels
        self.row_condition, self.condition = source(TREES["dict"]).row_condition, condition

    def __len__(self):
        return ROWS

    def take(self, rows):
        return data.Rows(X[rows], None, self.condition(rows))


FAULTS = {
    "none": (lambda rows: None, "condition must have the structure PyTreeDef.*, got PyTreeDef"),
    "structure": (lambda rows: VECTOR[rows], "condition must have the structure PyTreeDef.*, got PyTreeDef"),
    "dtype": (
        lambda rows: TREES["dict"] | {"words": TOKENS.astype(float)},
        r"condition\['words'\] must be int32 of shape \(9, 4\), got float64 of shape \(9, 4\)",
    ),
    "rows": (
        lambda rows: TREES["dict"] | {"joints": VECTOR[1:]},
        r"condition\['joints'\] must be float32 of shape \(9, 12\), got float32 of shape \(8, 12\)",
    ),
}


@pytest.mark.parametrize(("condition", "message"), FAULTS.values(), ids=FAULTS)
def test_condition_that_is_not_what_its_source_says_is_refused(condition, message, tmp_path):
    pytest.importorskip("grain")
    for use in (
        lambda source: data.Stream(source, ROWS, shuffle=False)[0],
        lambda source: data.JoinedSource([source], name="all").take(np.arange(ROWS)),
        lambda source: data.write_shards(source, tmp_path / "s"),
    ):
        with pytest.raises(ValueError, match=f"faulty: {message}"):
            use(Faulty(condition))


def test_source_of_labels_and_another_condition_is_refused():
    pytest.importorskip("grain")
    with pytest.raises(ValueError, match="faulty: labels must be None with a row_condition, got 3"):
        data.Stream(Faulty(None, labels=3), 3)


# Files


def saved(folder, name, array):
    np.save(folder / name, array)
    return folder / name


@TREE
def test_conditions_in_npy_files_are_those_that_were_saved(condition, tmp_path):
    names = map("{}.npy".format, itertools.count())
    paths = jax.tree.map(lambda leaf: saved(tmp_path, next(names), leaf), condition)
    found = data.NpySource(saved(tmp_path, "x.npy", X), condition=paths)
    rows = np.array([8, 0, 8])
    same(found.take(rows).condition, taken(condition, rows))
    assert found.row_condition == source(condition).row_condition


def test_conditions_of_several_npy_files_follow_one_another(tmp_path):
    cuts = list(itertools.pairwise((0, 5, 9)))
    x = [saved(tmp_path, f"x{a}.npy", X[a:b]) for a, b in cuts]
    condition = [{"joints": str(saved(tmp_path, f"c{a}.npy", VECTOR[a:b]))} for a, b in cuts]
    same(data.NpySource(x, condition=condition).take(np.arange(ROWS)[::-1]).condition, {"joints": VECTOR[::-1]})


def test_npy_conditions_that_do_not_fit_are_refused(tmp_path):
    x, vector = saved(tmp_path, "x.npy", X), saved(tmp_path, "c.npy", VECTOR)
    short, wide = saved(tmp_path, "short.npy", VECTOR[:3]), saved(tmp_path, "wide.npy", longer(VECTOR)[:9, :5])
    for files, condition, message in (
        (x, short, r"short.npy: must have 9 rows as .*x.npy has, got 3"),
        (x, {}, "condition must hold at least one path or be None, got {}"),
        (x, {"a": VECTOR}, r"condition\['a'\] must be a path, got ndarray"),
        ([x, x], vector, "condition must be 2 PyTrees of paths, one for each file of x, got .*Path"),
        ([x, x], [vector], "condition must be 2 PyTrees of paths, one for each file of x, got 1"),
        ([x, x], [vector, {"a": vector}], "condition must have the same structure for all files of x, PyTree"),
        ([x, x], [vector, wide], r"wide.npy: must have rows of shape \(12,\) as .*c.npy has, got \(5,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            data.NpySource(files, condition=condition)
    with pytest.raises(ValueError, match=r"x.npy: label must be None with a condition, got both"):
        data.NpySource(x, saved(tmp_path, "l.npy", TOKENS[:, 0]), condition=vector)


# Rows drawn on the device


@TREE
def test_drawn_rows_keep_their_conditions(condition):
    condition = jax.tree.map(
        lambda leaf: (
            jnp.asarray(leaf)
            .at[:]
            .set(jnp.arange(ROWS).reshape(-1, *[1] * (leaf.ndim - 1)) if leaf.dtype != bool else leaf)
        ),
        condition,
    )
    batch = data.DrawRows(jnp.arange(1.0 * ROWS)[:, None], condition, 5)(jax.random.key(0))
    rows = np.asarray(batch.x[:, 0]).astype(int)
    same(jax.tree.map(np.asarray, batch.condition), taken(jax.tree.map(np.asarray, condition), rows))
