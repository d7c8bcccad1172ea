"""Texts are drawn as they are, and a picture is written whole or not at all."""

import numpy as np
import pytest

from mf_eqx import picture

pytest.importorskip("matplotlib")

TEXT = "$5_$10"  # a formula that is wrong, for matplotlib
POINTS = np.zeros((3, 2))
FLOW = picture.Flow(np.zeros((2, 3, 2)), np.zeros((4, 2)), [np.ones((4, 2))])
RECORDS = [{"step": step, TEXT: 1.0} for step in (1, 2, 3)]
CALLS = {
    "point grid": lambda path: picture.save_point_grid(path, {TEXT: [POINTS]}, [TEXT], limit=2, title=TEXT),
    "point panels": lambda path: picture.save_point_panels(path, {TEXT: POINTS}, limit=2, title=TEXT),
    "flows": lambda path: picture.save_flows(path, {TEXT: FLOW}, [TEXT], limit=2, title=TEXT),
    "heat maps": lambda path: picture.save_heat_maps(
        path, {TEXT: np.ones((2, 2))}, [0, 1, 2], row_label=TEXT, column_label=TEXT, value_label=TEXT, title=TEXT
    ),
    "curves": lambda path: picture.save_curves(path, {TEXT: RECORDS, "b": RECORDS}, title=TEXT),
    "trends": lambda path: picture.save_trends(path, {TEXT: [picture.Series(TEXT, {1: [2.0]}, "C0")]}, TEXT),
}


@pytest.mark.parametrize("save", CALLS.values(), ids=CALLS)
def test_dollar_signs_in_texts_are_no_formula(save, tmp_path):
    save(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_full_disk_names_the_picture_and_leaves_none(full_disk, tmp_path):
    save = CALLS["point panels"]
    save(tmp_path / "before.png")
    with full_disk(100), pytest.raises(OSError, match=r"File too large: .*picture\.png'"):
        save(tmp_path / "picture.png")
    assert [path.name for path in tmp_path.iterdir()] == ["before.png"]
