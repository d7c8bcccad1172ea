"""Distances between a generated sample and a sample of the truth, from the points themselves or from their moments."""

from ._distance import energy_distance as energy_distance, sliced_wasserstein as sliced_wasserstein
from ._frechet import (
    frechet_distance as frechet_distance,
    frechet_distance_of_moments as frechet_distance_of_moments,
)
