"""Safetensors in every type that a file of weights may have."""

import json

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("safetensors")
from mf_eqx._foreign import fill, Origin, read_safetensors

VALUES = np.array([[1.5, -3.0, 2**-20], [1e30, -0.0, 255.0]])
BYTES = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": jnp.bfloat16, "I64": "i8", "U8": "u1", "BOOL": "?"}


def file(path, content, dtype, shape=VALUES.shape):
    """By hand: safetensors' own writer for NumPy knows nothing of bfloat16."""
    tensors = {"a.weight": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(content)]}}
    header = json.dumps(tensors).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content)
    return path


@pytest.mark.parametrize("dtype", BYTES)
def test_every_type_is_read_with_its_values(dtype, tmp_path):
    with np.errstate(over="ignore"):
        values = (VALUES if dtype in ("F64", "F32", "BF16") else np.clip(VALUES, 0, 200)).astype(BYTES[dtype])
    found = read_safetensors(file(tmp_path / "weights", values.tobytes(), dtype))["a.weight"]
    np.testing.assert_array_equal(found, values.astype(np.float64))
    assert found.dtype == (np.float32 if dtype in ("F16", "BF16") else values.dtype)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_a_type_that_is_not_read_is_refused_by_tensor_and_type(dtype, tmp_path):
    path = file(tmp_path / "weights", bytes(6), dtype)
    with pytest.raises(ValueError, match=f"weights: a.weight must have a dtype among F64, .*, got {dtype}$"):
        read_safetensors(path)


class Module(eqx.Module):
    weight: jnp.ndarray


def filled(path, convert=lambda tensor: tensor):
    module = Module(jnp.zeros(VALUES.shape))
    origins = {".weight": Origin(("a.weight",), VALUES.shape, convert)}
    return fill(module, origins, read_safetensors(path), path)


def test_bfloat16_weights_fill_a_module(tmp_path):
    values = VALUES.astype(jnp.bfloat16)
    found = filled(file(tmp_path / "weights", values.tobytes(), "BF16")).weight
    np.testing.assert_array_equal(found, values.astype(np.float32))
    assert found.dtype == jnp.float32


def test_bfloat16_that_is_not_finite_is_refused_by_name(tmp_path):
    values = np.where(VALUES == 255, np.nan, VALUES).astype(jnp.bfloat16)
    with pytest.raises(ValueError, match=r"has values that are no finite real numbers in a\.weight"):
        filled(file(tmp_path / "weights", values.tobytes(), "BF16"))


def test_values_that_the_modules_precision_does_not_hold_are_refused_by_name(tmp_path):
    path = file(tmp_path / "weights", np.full(VALUES.shape, 1e300).tobytes(), "F64")
    with pytest.raises(ValueError, match=r"must hold values that are finite in float32, but has others in a\.weight"):
        filled(path)


@pytest.mark.filterwarnings("ignore:invalid value encountered in sqrt")
def test_values_that_conversion_makes_no_numbers_are_refused_by_name(tmp_path):
    path = file(tmp_path / "weights", VALUES.astype("f4").tobytes(), "F32")
    with pytest.raises(ValueError, match=r"must hold values that are finite in float32, but has others in a\.weight"):
        filled(path, np.sqrt)
