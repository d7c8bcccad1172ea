"""Figures against a parameter."""

import numpy as np
import pytest

from mf_eqx import picture

pytest.importorskip("matplotlib")


def drawn(path, monkeypatch, panels, **options):
    """The figure that was saved."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *rest, **more: figures.append(figure) or save(figure, *rest, **more)
    )
    picture.save_trends(path, panels, "p", **options)
    assert path.read_bytes().startswith(b"\x89PNG")
    return figures[0]


def test_points_are_seeds_and_lines_their_means(tmp_path, monkeypatch):
    series = picture.Series("one", {0.0: [1.0, 3.0], 1.0: [4.0, 8.0]}, "C0", "--")
    (panel,) = drawn(tmp_path / "a.png", monkeypatch, {"error": [series]}).axes
    points, means = panel.lines
    np.testing.assert_array_equal(points.get_xydata(), [[0, 1], [0, 3], [1, 4], [1, 8]])
    np.testing.assert_array_equal(means.get_xydata(), [[0, 2], [1, 6]])
    assert (panel.get_title(), panel.get_xlabel(), panel.get_yscale()) == ("error", "p", "log")


def test_points_without_a_mean_are_drawn_and_the_legend_names_the_series_of_all_panels(tmp_path, monkeypatch):
    one, two = (picture.Series(name, {1.0: [0.2, 0.5]}, "C0") for name in ("one", "two"))
    half = picture.Series("one", {1.0: [0.0, 0.5]}, "C0")
    figure = drawn(tmp_path / "a.png", monkeypatch, {"A": [half], "B": [one, two]})
    assert [line.get_xydata().tolist() for line in figure.axes[0].lines] == [[[1, 0.5]]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two"]


def test_values_that_a_logarithmic_axis_has_no_place_for_are_left_out(tmp_path, monkeypatch):
    series = [
        picture.Series("one", {0.0: [1e-6], 1.0: [2.0]}, "C0"),
        picture.Series("none", {0.0: [0.0], 1.0: [0.0]}, "C1"),
    ]
    (panel,) = drawn(tmp_path / "a.png", monkeypatch, {"error": series}, least=1e-4).axes
    assert [line.get_xydata().tolist() for line in panel.lines] == [[[1, 2]], [[1, 2]]]
