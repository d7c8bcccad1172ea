"""States as flat dictionaries: what tells two of them apart."""

import hashlib

import jax.numpy as jnp
import numpy as np
import pytest

from mf_eqx._leaves import by_name, digest_of_arrays

ARRAYS = {"b": np.asarray([[1, 2], [3, 4]], np.int16), "a": np.asarray(2.5, np.float32), "c": jnp.ones(3, jnp.bfloat16)}


def test_digest_is_that_of_a_text_and_of_names_types_shapes_and_bytes_in_order():
    content = b"text" + b"b int16 (2, 2);" + b"\1\0\2\0\3\0\4\0" + b"a float32 ();" + b"\0\0\x20\x40"
    content += b"c bfloat16 (3,);" + b"\x80\x3f" * 3
    assert digest_of_arrays(ARRAYS, "text") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    "other",
    [
        {"b": np.asarray([[1, 2], [3, 5]], np.int16)},
        {"b": np.asarray([1, 2, 3, 4], np.int16)},
        {"b": np.asarray([[1, 2], [3, 4]], np.uint16)},
        {"B": ARRAYS["b"]},
    ],
)
def test_digest_tells_values_shapes_types_and_names_apart(other):
    assert digest_of_arrays({"b": ARRAYS["b"]}) != digest_of_arrays(other)


def test_transposed_array_has_the_digest_of_its_values():
    values = np.arange(6).reshape(2, 3)
    assert digest_of_arrays({"a": np.asfortranarray(values)}) == digest_of_arrays({"a": values})


def test_leaves_are_named_as_in_python():
    tree = {"a": 1, "b": (2, [None, 3])}
    assert by_name("tree", tree) == {"tree['a']": 1, "tree['b'][0]": 2, "tree['b'][1][1]": 3}
    assert by_name("tree", 4) == {"tree": 4} and by_name("tree", None) == {}
