"""Sets of weights in files of torch: found wherever they lie, each without its prefix; nothing is executed."""

import argparse
import os

import numpy as np
import pytest

pytest.importorskip("torch")
import torch

from mf_eqx import released

ANCHOR = "map_layer0.weight"


def tensors(start, prefix=""):
    return {
        f"{prefix}{ANCHOR}": torch.arange(start, start + 6.0).reshape(2, 3),
        f"{prefix}enc.first.bias": torch.full((2,), start),
    }


def saved(path, held):
    torch.save(held, path)
    return path


def assert_tensors(found, start):
    assert found.keys() == tensors(start).keys()
    for name, tensor in tensors(start).items():
        np.testing.assert_array_equal(found[name], tensor.numpy())


@pytest.mark.parametrize("outer", [(), ("model",), ("state", "model")])
def test_every_average_is_found_by_its_prefix(outer, tmp_path):
    held = tensors(1.0, "net.") | tensors(2.0, "net_ema.") | tensors(3.0, "net_ema1.")
    for name in reversed(outer):
        held = {name: held, "optimizer": {0: {"step": torch.ones(())}}, "epoch": 3}
    sets = released.read_state_dicts(saved(tmp_path / "file", held), ANCHOR)
    assert list(sets) == [".".join([*outer, name]) for name in ("net", "net_ema", "net_ema1")]
    for number, found in enumerate(sets.values()):
        assert_tensors(found, 1.0 + number)


def test_a_dictionary_for_each_average_is_found(tmp_path):
    held = {"model": tensors(1.0), "ema": tensors(2.0), "steps": 5}
    sets = released.read_state_dicts(saved(tmp_path / "file", held), ANCHOR)
    assert list(sets) == ["model", "ema"]  # as in the file
    assert_tensors(sets["ema"], 2.0)


def test_a_set_alone_has_no_name(tmp_path):
    sets = released.read_state_dicts(saved(tmp_path / "file", tensors(1.0)), ANCHOR)
    assert list(sets) == [""]
    assert_tensors(sets[""], 1.0)


def test_half_precision_is_read_into_float32(tmp_path):
    held = {name: tensor.bfloat16() for name, tensor in tensors(1.0).items()}
    assert_tensors(released.read_state_dicts(saved(tmp_path / "file", held), ANCHOR)[""], 1.0)


def test_a_name_that_only_ends_alike_is_no_set(tmp_path):
    path = saved(tmp_path / "file", {f"other_{ANCHOR}": torch.zeros(1), "a": {"b": torch.zeros(1)}})
    with pytest.raises(ValueError, match=f"^{path}: must hold {ANCHOR}, alone or with a prefix, got a.b, other_map"):
        released.read_state_dicts(path, ANCHOR)


def test_a_set_with_something_else_is_refused(tmp_path):
    path = saved(tmp_path / "file", {"ema": tensors(1.0) | {"decay": 0.999}})
    with pytest.raises(ValueError, match=f"^{path}: must hold only tensors under 'ema.', got others in decay$"):
        released.read_state_dicts(path, ANCHOR)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("extra", [Evil(), argparse.Namespace(rate=1)])
def test_a_file_with_code_is_refused_and_not_executed(extra, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path / "file", {"ema": tensors(1.0), "args": extra})
    with pytest.raises(ValueError, match=f"^{path}: must be a file of torch.save with tensors alone"):
        released.read_state_dicts(path, ANCHOR)
    assert os.listdir() == ["file"]
