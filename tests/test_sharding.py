"""Where a state and its rows lie follows from shapes alone, and nothing that is computed depends on it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import run_on_devices
from jax.sharding import PartitionSpec

import mf_eqx as mfx


@pytest.fixture(scope="module")
def on_devices():
    return run_on_devices("shard_on_devices.py")


# The rule


def rule(on_devices, mesh, shape):
    """The mesh axis of each axis of an array, as far as it is given."""
    (found,) = [spec for *dims, spec in on_devices["rules"][mesh] if tuple(dims) == shape]
    return found


@pytest.mark.parametrize(
    ("mesh", "shape", "axis"),
    [
        ("shared by 4", (8, 12), 1),
        ("shared by 4", (2, 2, 16), 2),
        ("shared by 4", (7, 16, 8), 1),
        ("shared by 4", (7, 64), 1),
        ("shared by 8", (7, 12, 8), 2),  # 12 is larger and cannot be divided
    ],
)
def test_largest_axis_that_the_devices_divide_is_shared(on_devices, mesh, shape, axis):
    assert rule(on_devices, mesh, shape) == [None] * axis + ["fsdp"]


@pytest.mark.parametrize("shape", [(12, 8), (8, 8)])
def test_first_axis_which_may_stack_blocks_is_shared_only_if_it_must_be(on_devices, shape):
    assert rule(on_devices, "shared by 4", shape) == [None, "fsdp"]
    assert rule(on_devices, "shared by 4", (64, 7)) == rule(on_devices, "shared by 8", (8, 12)) == ["fsdp"]


def test_of_equal_axes_the_first_is_shared(on_devices):
    assert rule(on_devices, "shared by 4", (16, 4, 4)) == [None, "fsdp"]


@pytest.mark.parametrize("shape", [(), (3,), (60,), (0, 64)])
def test_small_leaf_is_on_every_device(on_devices, shape):
    assert rule(on_devices, "shared by 4", shape) == []


def test_leaf_of_the_least_size_is_large(on_devices):
    assert rule(on_devices, "shared by 4", (64,)) == ["fsdp"]


def test_no_leaf_below_65536_elements_is_large_by_default(on_devices):
    assert all(spec == [] for *_, spec in on_devices["rules"]["shared if large"])


def test_large_leaf_that_cannot_be_divided_is_on_every_device(on_devices):
    assert rule(on_devices, "shared by 4", (66, 33)) == []


def test_without_fsdp_every_leaf_is_on_every_device(on_devices):
    assert all(spec == [] for *_, spec in on_devices["rules"]["data parallel"])


def test_neighbours_share_a_copy_of_the_parameters(on_devices):
    assert on_devices["mesh"] == [[0, 1, 2, 3], [4, 5, 6, 7]]


# A state made where it belongs


def test_made_state_lies_where_the_rule_says(on_devices):
    made = on_devices["made"]
    assert made["as_the_rule_says"]
    for name, parts in made["parts"].items():
        if name.endswith(".large"):
            assert parts == [[2048, 12]], name
        elif name.endswith(".odd"):
            assert parts == [[67, 31]], name


def test_no_device_ever_holds_a_whole_large_leaf(on_devices):
    made = on_devices["made"]
    (needed,) = made["needed"]  # one program made everything: its result and all that it needs meanwhile
    assert 0 < needed < max(made["held"]) + made["whole"]


def test_state_made_in_parts_has_the_bits_of_the_whole_one(on_devices):
    assert on_devices["made"]["same_bits"]


def test_made_state_keeps_what_is_no_array(on_devices):
    assert on_devices["made"]["static"] == "odd"


def test_table_has_the_bytes_that_every_device_holds(on_devices):
    made = on_devices["made"]
    total = sum(row[-1] for row in made["table"])
    assert made["held"] == [total] * 8


def test_table_names_leaf_shape_dtype_and_axes(on_devices):
    table = {row[0]: row[1:] for row in on_devices["made"]["table"]}
    assert table[".field.large"] == [[2048, 48], "float32", str(PartitionSpec(None, "fsdp")), 2048 * 48 * 4 // 4]
    assert table[".field.odd"] == [[67, 31], "float32", str(PartitionSpec()), 67 * 31 * 4]
    assert table[".field.small"] == [[8], "bfloat16", str(PartitionSpec()), 16]
    assert table[".opt_state[0].mu.large"] == table[".averages[0].large"] == table[".field.large"]
    assert len(table) == len(on_devices["made"]["parts"])


def test_table_of_shapes_is_the_table_of_the_state(on_devices):
    assert on_devices["made"]["same_table"]


def test_replicated_state_is_whole_and_the_same_on_every_device(on_devices):
    assert on_devices["replicated"] == {"whole": True, "same_bits": True, "static": "odd"}


# Rows


def test_rows_are_spread_over_both_axes_in_their_order(on_devices):
    assert on_devices["placed"]["rows"] == np.arange(16).reshape(8, 2).tolist()
    assert on_devices["placed"]["shards"] == 8


def test_placed_batch_is_the_batch(on_devices):
    assert on_devices["placed"]["leaves"] == 3 and on_devices["placed"]["equal"]


def test_one_process_needs_all_rows(on_devices):
    assert on_devices["placed"]["positions"] == list(range(16))


def test_rows_that_the_devices_do_not_divide_are_refused(on_devices):
    assert on_devices["placed"]["refused"] == "batch must be a multiple of the 8 devices that share it, got 12"


@pytest.fixture
def one():
    return mfx.Parallelism(devices=jax.devices()[:1])


class Held:
    """Stands in for the sharding of rows of a process that has only some of the devices."""

    def __init__(self, *slices):
        self.slices = slices

    def addressable_devices_indices_map(self, shape):
        return dict(enumerate((index,) for index in self.slices))


def test_process_needs_the_rows_of_its_devices_once_and_in_order(one, monkeypatch):
    held = Held(slice(8, 12), slice(0, 4), slice(8, 12))
    monkeypatch.setattr(mfx.Parallelism, "rows", held)
    np.testing.assert_array_equal(one.positions(16), [0, 1, 2, 3, 8, 9, 10, 11])


def test_place_finds_the_rows_of_a_device_among_those_of_its_process(one, monkeypatch):
    """The second of two processes: it has rows 8 to 15 of 16, and its devices ask for them by their global numbers."""
    held, found = Held(slice(8, 12), slice(12, 16)), {}
    monkeypatch.setattr(mfx.Parallelism, "rows", held)

    def make(shape, sharding, part):
        assert shape == (16, 3) and sharding is held
        found.update({index.start: part((index, slice(None))) for index in held.slices})
        return jnp.zeros(())

    monkeypatch.setattr(jax, "make_array_from_callback", make)
    here = np.arange(24).reshape(8, 3)
    one.place({"x": here}, rows=16)
    np.testing.assert_array_equal(found[8], here[:4])
    np.testing.assert_array_equal(found[12], here[4:])


def test_on_one_device_everything_is_whole(one):
    assert one.shards == 1
    made = one.make(lambda: {"a": jnp.arange(3), "b": "text", "c": None})
    assert made["b"] == "text" and made["c"] is None
    np.testing.assert_array_equal(one.place(made["a"]), [0, 1, 2])


def test_gathered_and_spread_trees_keep_what_is_no_array(one):
    tree = {"a": jnp.arange(3), "b": "text"}
    found = eqx.filter_jit(lambda tree: one.spread(one.gather(tree)))(tree)
    assert found["b"] == "text"
    np.testing.assert_array_equal(found["a"], tree["a"])


# Refusals


def test_devices_that_the_axes_do_not_fill_are_refused(on_devices):
    assert on_devices["refused"] == [
        "fsdp must divide the number of devices, 8, got 3",
        "fsdp must be an integer >= 1, got 0",
        "data x fsdp must be the number of devices, 8, got 4 x 4",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fsdp": 1.0}, "fsdp must be an integer >= 1, got 1.0"),
        ({"fsdp": True}, "fsdp must be an integer >= 1, got True"),
        ({"data": 1.0}, "data must be an integer >= 1, got 1.0"),
        ({"least_size": -1}, "least_size must be an integer >= 0, got -1"),
        ({"devices": []}, "devices must be at least one, got none"),
    ],
    ids=range(5),
)
def test_numbers_that_make_no_mesh_are_refused(unchecked, options, message):
    with pytest.raises(ValueError, match=message):
        mfx.Parallelism(**{"devices": jax.devices()[:1], **options})


@pytest.mark.parametrize(
    ("tree", "rows", "message"),
    [
        ({"a": np.zeros(4), "b": np.zeros(5)}, None, r"tree\['b'\] must have 4 rows, got 5"),
        ({"a": np.zeros(4), "b": np.zeros((3, 2))}, None, r"tree\['b'\] must have 4 rows, got 3"),
        ({"a": np.zeros(4)}, 2, r"tree\['a'\] must have 2 rows, got 4"),
        ({"a": np.zeros(4), "b": np.zeros(())}, 4, r"tree\['b'\] must have a leading axis of rows, got a scalar"),
        ({}, None, "tree must have at least one array, got none"),
    ],
    ids=range(5),
)
def test_rows_that_are_not_those_of_the_batch_are_refused(one, tree, rows, message):
    with pytest.raises(ValueError, match=message):
        one.place(tree, rows)
