import sys
import warnings

import numpy as np
import pytest

from mf_eqx import picture

image = pytest.importorskip("matplotlib.image")
figure = pytest.importorskip("matplotlib.figure")

RNG = np.random.default_rng(0)
POINTS = {"MeanFlow": [RNG.uniform(-1, 1, (n, 2)) for n in (5, 6)], "truth": [RNG.uniform(-1, 1, (7, 2))] * 2}


def flow(seed: int) -> picture.Flow:
    rng = np.random.default_rng(seed)
    return picture.Flow(*(rng.uniform(-1, 1, shape) for shape in ((3, 4, 2), (6, 2), (2, 6, 2))))


FLOWS = {"truth": flow(0), "MeanFlow": flow(1)}
EDGES = [0.0, 0.25, 0.5, 1.0]
MAP = 10.0 ** -np.arange(9.0).reshape(3, 3)
LABELS = {"row_label": "r", "column_label": "t", "value_label": "error"}

SAVERS = {
    "points": lambda path, **options: picture.save_point_grid(path, POINTS, ["one", "two"], limit=2, **options),
    "panels": lambda path, **options: picture.save_point_panels(path, {"truth": np.zeros((3, 2))}, limit=2, **options),
    "flows": lambda path, **options: picture.save_flows(path, FLOWS, ["one", "two"], limit=2, **options),
    "maps": lambda path, **options: picture.save_heat_maps(path, {"MeanFlow": MAP}, EDGES, **LABELS, **options),
}
each = pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "picture.png"


@pytest.fixture
def saved(monkeypatch):
    """The figures that were saved."""
    kept = []
    save = figure.Figure.savefig

    def keep(self, *arguments, **options):
        kept.append(self)
        save(self, *arguments, **options)

    monkeypatch.setattr(figure.Figure, "savefig", keep)
    return kept


def grid(saved):
    """The panels of the figure that was saved last, as rows of columns."""
    panels = saved[-1].axes
    return np.array(panels).reshape(panels[0].get_subplotspec().get_gridspec().get_geometry())


def names(panels):
    """The titles above the columns and the labels left of the rows; nothing is written anywhere else."""
    titles = [[panel.get_title() for panel in row] for row in panels]
    labels = [[panel.get_ylabel() for panel in row] for row in panels]
    assert not any(any(row) for row in titles[1:]) and not any(any(row[1:]) for row in labels)
    return titles[0], [row[0] for row in labels]


def texts(panel):
    return [text.get_text() for text in panel.texts]


# All pictures


@pytest.fixture(scope="module", params=SAVERS.values(), ids=SAVERS)
def file(request, tmp_path_factory):
    """Each kind of picture, under a name that says of no kind."""
    path = tmp_path_factory.mktemp("file") / "picture.part"
    request.param(path)
    return path


def test_the_file_is_a_picture(file):
    assert image.imread(file, "png").std() > 0.01


def test_a_picture_of_any_file_name_is_a_png(file):
    assert file.read_bytes().startswith(b"\x89PNG")


@each
def test_the_title_stands_above_everything(path, saved, save):
    save(path, title="two moons")
    save(path)
    assert [made.get_suptitle() for made in saved] == ["two moons", ""]


def test_global_state_of_pyplot_is_not_touched(file):
    assert "matplotlib.pyplot" not in sys.modules


# Points


def test_each_sample_is_drawn_in_the_panel_of_its_row_and_column(path, saved):
    picture.save_point_grid(path, POINTS, ["one", "two"], limit=2)
    for row, samples in zip(grid(saved), POINTS.values(), strict=True):
        for panel, sample in zip(row, samples, strict=True):
            (drawn,) = panel.collections
            np.testing.assert_array_equal(drawn.get_offsets(), sample)


def test_names_of_samples_stand_left_and_those_of_columns_above(path, saved):
    picture.save_point_grid(path, POINTS, ["one", "two"], limit=2)
    assert names(grid(saved)) == (["one", "two"], ["MeanFlow", "truth"])


def test_a_single_sample_is_drawn(path, saved):
    picture.save_point_grid(path, {"truth": [np.zeros((1, 2))]}, ["one"], limit=2)
    assert names(grid(saved)) == (["one"], ["truth"])


@pytest.mark.parametrize("kind", ["points", "flows"])
def test_all_panels_of_the_plane_have_the_same_limits(path, saved, kind):
    SAVERS[kind](path)
    assert {panel.get_xlim() + panel.get_ylim() for panel in saved[0].axes} == {(-2, 2, -2, 2)}


@pytest.mark.parametrize(
    "outside",
    [[3.0, 0.0], [0.0, -3.0], [np.nan, 0.0], [-np.inf, np.inf]],
    ids=["right", "below", "nan", "infinite"],
)
def test_the_share_of_points_outside_is_written(path, saved, outside):
    sample = np.concatenate([np.zeros((7, 2)), [outside]])
    picture.save_point_grid(path, {"truth": [sample, np.zeros((8, 2))]}, ["one", "two"], limit=2)
    assert [texts(panel) for panel in grid(saved)[0]] == [["12.5% outside"], []]


def test_points_on_the_edge_are_not_outside(path, saved):
    picture.save_point_grid(path, {"truth": [np.array([[2.0, -2.0]])]}, ["one"], limit=2)
    assert texts(grid(saved)[0, 0]) == []


def test_an_empty_sample_is_an_empty_panel_without_a_warning(path, saved):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture.save_point_grid(path, {"truth": [np.zeros((0, 2))]}, ["one"], limit=2)
    assert texts(grid(saved)[0, 0]) == []


def test_samples_alone_stand_in_lines_each_under_its_name(path, saved):
    samples = {str(n): RNG.uniform(-1, 1, (n, 2)) for n in range(1, 5)}
    picture.save_point_panels(path, samples, limit=2, columns=3)
    panels = saved[0].axes
    assert [panel.get_title() for panel in panels] == list(samples)
    for panel, sample in zip(panels, samples.values(), strict=True):
        np.testing.assert_array_equal(panel.collections[0].get_offsets(), sample)
    places = [panel.get_subplotspec() for panel in panels]
    assert [(place.rowspan.start, place.colspan.start) for place in places] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    with pytest.raises(ValueError, match="columns must be"):
        picture.save_point_panels(path, samples, limit=2, columns=0)
    with pytest.raises(ValueError, match="at least one row"):
        picture.save_point_panels(path, {}, limit=2)


# Flows


def test_trajectories_come_first_and_then_the_arrows_of_each_column(path, saved):
    picture.save_flows(path, FLOWS, ["one", "two"], limit=2)
    assert names(grid(saved)) == (["trajectories", "one", "two"], ["truth", "MeanFlow"])


def test_each_field_has_its_paths_above_the_true_ones(path, saved):
    picture.save_flows(path, FLOWS, ["one", "two"], limit=2)
    for row, own in zip(grid(saved), FLOWS.values(), strict=True):
        drawn = [line.get_xydata() for line in row[0].lines]
        np.testing.assert_array_equal(drawn, [*FLOWS["truth"].paths, *own.paths])
        assert [line.get_color() for line in row[0].lines] == ["0.75"] * 3 + ["C0"] * 3


def test_dots_mark_the_ends_of_the_paths(path, saved):
    picture.save_flows(path, FLOWS, ["one", "two"], limit=2)
    for row, own in zip(grid(saved), FLOWS.values(), strict=True):
        (dots,) = row[0].collections
        np.testing.assert_array_equal(dots.get_offsets(), own.paths[:, -1])


def test_arrows_are_the_vectors_at_the_points(path, saved):
    picture.save_flows(path, FLOWS, ["one", "two"], limit=2)
    for row, own in zip(grid(saved), FLOWS.values(), strict=True):
        for panel, vectors in zip(row[1:], own.arrows, strict=True):
            (arrows,) = panel.collections
            np.testing.assert_array_equal(arrows.get_offsets(), own.points)
            np.testing.assert_array_equal(np.stack([arrows.U, arrows.V], axis=1), vectors)


def test_all_arrows_have_one_scale(path, saved):
    picture.save_flows(path, FLOWS, ["one", "two"], limit=2)
    assert {panel.collections[0].scale for panel in grid(saved)[:, 1:].flat} == {10}


def test_a_field_without_columns_has_its_paths_only(path, saved):
    picture.save_flows(path, {"truth": flow(0)._replace(arrows=np.zeros((0, 6, 2)))}, [], limit=2)
    assert names(grid(saved)) == (["trajectories"], ["truth"])


# Heat maps


def maps_saved(path, saved, maps):
    picture.save_heat_maps(path, maps, EDGES, **LABELS)
    return saved[-1].axes[: len(maps)]


def test_each_map_has_a_panel_with_its_name_and_the_labels_of_the_axes(path, saved):
    panels = maps_saved(path, saved, {"MeanFlow": MAP, "Shortcut": MAP / 2})
    assert [panel.get_title() for panel in panels] == ["MeanFlow", "Shortcut"]
    assert [panel.get_xlabel() for panel in panels] == ["t", "t"]
    assert [panel.get_ylabel() for panel in panels] == ["r", ""]


def test_rows_of_a_map_go_up_and_its_columns_to_the_right(path, saved):
    (panel,) = maps_saved(path, saved, {"MeanFlow": MAP})
    (mesh,) = panel.collections
    np.testing.assert_array_equal(mesh.get_array().reshape(3, 3), MAP)
    corners = mesh.get_coordinates()
    np.testing.assert_array_equal(corners[0, :, 0], EDGES)
    np.testing.assert_array_equal(corners[:, 0, 1], EDGES)


@pytest.mark.parametrize(("factor", "highest"), [(1, 1), (100, 10)])
def test_colours_are_logarithmic_over_all_values_of_all_maps_up_to_the_highest(path, saved, factor, highest):
    panels = maps_saved(path, saved, {"MeanFlow": MAP, "Shortcut": factor * MAP})
    for panel in panels:
        norm = panel.collections[0].norm
        assert type(norm).__name__ == "LogNorm" and (norm.vmin, norm.vmax) == (1e-8, highest)


def test_the_colours_are_named(path, saved):
    maps_saved(path, saved, {"MeanFlow": MAP})
    assert [panel.get_ylabel() for panel in saved[-1].axes[1:]] == ["error"]


def test_empty_cells_have_no_colour(path, saved):
    holes = np.where(MAP < 1e-4, np.nan, MAP)
    (panel,) = maps_saved(path, saved, {"MeanFlow": holes})
    mesh = panel.collections[0]
    np.testing.assert_array_equal(np.ma.getmaskarray(mesh.get_array()).reshape(3, 3), np.isnan(holes))
    assert mesh.norm.vmin == 1e-4


def test_a_map_of_equal_values_is_drawn(path):
    picture.save_heat_maps(path, {"MeanFlow": np.full((3, 3), 0.1)}, EDGES, **LABELS)
    assert image.imread(path).std() > 0.01


# Errors


@pytest.mark.parametrize("columns", [["one"], ["one", "two", "three"]])
def test_columns_that_do_not_fit_a_row_are_refused(path, columns):
    message = f"columns must be 2 titles, one per item of row '{{}}', got {len(columns)}"
    with pytest.raises(ValueError, match=message.format("truth")):
        picture.save_flows(path, FLOWS, columns, limit=2)
    for points in (POINTS, {"MeanFlow": POINTS["MeanFlow"], "data": []})[len(columns) // 3 :]:
        with pytest.raises(ValueError, match=r"row '(MeanFlow|data)' must have 1 to [123] items, got [02]"):
            picture.save_point_grid(path, points, columns, limit=2)
    assert not path.exists()


def test_a_row_of_fewer_samples_leaves_its_other_places_empty(path, saved):
    picture.save_point_grid(path, {**POINTS, "data": POINTS["MeanFlow"][:1]}, ["one", "two"], limit=2)
    places = [panel.get_subplotspec() for panel in saved[-1].axes]
    assert [(place.rowspan.start, place.colspan.start) for place in places] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_a_limit_that_is_not_positive_is_refused(path, limit):
    with pytest.raises(ValueError, match="limit must be > 0"):
        picture.save_point_grid(path, POINTS, ["one", "two"], limit=limit)
    with pytest.raises(ValueError, match="limit must be > 0"):
        picture.save_flows(path, FLOWS, ["one", "two"], limit=limit)


@pytest.mark.parametrize("maps", [{}, {"MeanFlow": np.full((3, 3), np.nan)}, {"MeanFlow": np.zeros((3, 3))}])
def test_maps_without_a_positive_number_are_refused(path, maps):
    with pytest.raises(ValueError, match="maps must hold at least one positive number"):
        picture.save_heat_maps(path, maps, EDGES, **LABELS)
