import jax.numpy as jnp
import numpy as np

from mf_eqx import Mean, run


def test_a_mean_becomes_total_over_count():
    assert run.fetch({"loss": Mean(jnp.asarray(6.0), jnp.asarray(4.0))}) == {"loss": 1.5}


def test_bins_become_a_list_with_nan_where_nothing_was_counted():
    values = run.fetch({"by_gap": Mean(jnp.asarray([1.0, 0.0]), jnp.asarray([2.0, 0.0]))})
    np.testing.assert_array_equal(values["by_gap"], [0.5, np.nan])


def test_arrays_of_any_kind_become_plain_numbers():
    values = run.fetch({"a": jnp.asarray(0.5, jnp.bfloat16), "b": np.float32(0.25), "c": 3, "d": jnp.arange(2)})
    assert values == {"a": 0.5, "b": 0.25, "c": 3, "d": [0, 1]}
    assert [type(value) for value in values.values()] == [float, float, int, list]
