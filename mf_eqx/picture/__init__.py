"""Plots of a run as PNG files, drawn by matplotlib (extra `experiments`), which is imported where it is used.

    save_image          one image
    save_image_grid     samples of images
    save_point_grid     samples in the plane, by method and number of evaluations
    save_point_panels   samples in the plane, one panel each
    save_flows          paths of points in the plane (`flow_of` follows a field)
    save_heat_maps      a number in each cell of a grid, such as an error over (r, t)
    save_curves         metrics of runs over steps
    save_trends         one number against another, in several series
    save_figure         any other figure of matplotlib (`new_figure` makes one)

This module is imported explicitly (`from mf_eqx import picture`).
"""

from ._curves import save_curves as save_curves
from ._figure import new_figure as new_figure, save_figure as save_figure
from ._image_grid import save_image as save_image, save_image_grid as save_image_grid
from ._plane import (
    Flow as Flow,
    flow_of as flow_of,
    save_flows as save_flows,
    save_heat_maps as save_heat_maps,
    save_point_grid as save_point_grid,
    save_point_panels as save_point_panels,
)
from ._trends import save_trends as save_trends, Series as Series
