import sys

import numpy as np
import pytest

from mf_eqx import picture
from mf_eqx.picture import _curves

image = pytest.importorskip("matplotlib.image")
figure = pytest.importorskip("matplotlib.figure")


def records(steps: int = 100) -> list[dict]:
    return [
        {"step": 10 * i, "loss": 1.0 + i % 2, "error": None if i == 50 else 2.0**-i, "by_gap": [1.0, 2.0, None, 4.0]}
        for i in range(1, steps + 1)
    ]


@pytest.fixture
def panels(monkeypatch):
    """The panels of the figure that was saved last, by title."""
    kept = {}
    save = figure.Figure.savefig

    def keep(self, *arguments, **options):
        kept.update({axes.get_title(): axes for axes in self.axes})
        save(self, *arguments, **options)

    monkeypatch.setattr(figure.Figure, "savefig", keep)
    return kept


def test_each_metric_gets_a_panel_with_its_values(tmp_path, panels):
    picture.save_curves(tmp_path / "curves.png", records())
    assert list(panels) == ["loss", "error", "by_gap"]
    np.testing.assert_array_equal(panels["loss"].lines[0].get_xydata().T, [10 * np.arange(1, 101), [2.0, 1.0] * 50])


def test_the_file_is_a_picture(tmp_path):
    picture.save_curves(tmp_path / "curves.png", records(), ["loss"])
    assert image.imread(tmp_path / "curves.png").std() > 0.01


def test_only_the_named_metrics_are_drawn(tmp_path, panels):
    picture.save_curves(tmp_path / "curves.png", records(), ["error"])
    assert list(panels) == ["error"]


def test_several_runs_share_a_panel_and_are_named(tmp_path, panels):
    picture.save_curves(tmp_path / "curves.png", {"MeanFlow": records(), "Flow Matching": records(40)}, ["loss"])
    names = [text.get_text() for text in panels["loss"].get_legend().get_texts()]
    assert names == ["MeanFlow", "Flow Matching"]


def test_bins_that_have_values_are_named(tmp_path, panels):
    renamed = [{"step": one["step"], "identity_error_by_gap": one["by_gap"], "other": [1.0, 2.0]} for one in records()]
    picture.save_curves(tmp_path / "curves.png", renamed)
    names = {title: [text.get_text() for text in axes.get_legend().get_texts()] for title, axes in panels.items()}
    gaps = ["t - r in 0 to 0.25", "t - r in 0.25 to 0.5", "t - r in 0.75 to 1"]
    assert names == {"identity_error_by_gap": gaps, "other": ["bin 0", "bin 1"]}


def test_a_metric_that_only_one_run_has_is_drawn_for_that_run(tmp_path, panels):
    picture.save_curves(tmp_path / "curves.png", {"a": records(), "b": [{"step": 1, "loss": 1.0}]})
    assert [line.get_xdata().size for line in panels["error"].lines[::2] if line.get_xdata().size] == [100]


def test_null_leaves_a_gap(tmp_path, panels):
    picture.save_curves(tmp_path / "curves.png", records(), ["error"])
    for line in panels["error"].lines:
        assert np.flatnonzero(np.isnan(line.get_ydata())).tolist() == [49]


def test_bins_get_a_curve_each(tmp_path, panels):
    picture.save_curves(tmp_path / "curves.png", records(), ["by_gap"])
    assert [line.get_ydata()[0] for line in panels["by_gap"].lines[::2]][:2] == [1.0, 2.0]
    assert len(panels["by_gap"].lines) == 8


def test_bold_curve_is_the_running_mean():
    values = np.arange(100.0) + np.tile([5.0, -5.0], 50)
    smooth = _curves._running_mean(values)
    np.testing.assert_allclose(smooth[50], values[48:53].mean())
    np.testing.assert_allclose(smooth[0], values[:3].mean())


def test_metric_over_decades_gets_a_logarithmic_axis(tmp_path, panels):
    picture.save_curves(tmp_path / "curves.png", records(), ["loss", "error"])
    assert (panels["loss"].get_yscale(), panels["error"].get_yscale()) == ("linear", "log")


@pytest.mark.parametrize("metrics", [{}, {"loss": 1.0}, {"loss": None}])
def test_a_single_record_can_be_drawn(tmp_path, metrics):
    picture.save_curves(tmp_path / "curves.png", [{"step": 1, "rate": 1.0, **metrics}])
    assert (tmp_path / "curves.png").exists()


def test_no_records_are_refused(tmp_path):
    with pytest.raises(ValueError, match="records must hold at least one metric, got 0 records"):
        picture.save_curves(tmp_path / "curves.png", [])


def test_unknown_name_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="names must be among loss, error, by_gap; got los"):
        picture.save_curves(tmp_path / "curves.png", records(), ["los"])


def test_global_state_of_pyplot_is_not_touched(tmp_path):
    picture.save_curves(tmp_path / "curves.png", records(), ["loss"])
    assert "matplotlib.pyplot" not in sys.modules
