"""Distances between a generated sample and a sample of the truth, and errors of a field."""

from ._density import mode_coverage as mode_coverage, total_variation as total_variation
from ._distance import (
    energy_distance as energy_distance,
    maximum_mean_discrepancy as maximum_mean_discrepancy,
    sliced_wasserstein as sliced_wasserstein,
)
from ._field import (
    draw_states as draw_states,
    field_errors as field_errors,
    field_truth as field_truth,
    FieldErrors as FieldErrors,
    FieldTruth as FieldTruth,
    KnownRows as KnownRows,
    relative_error as relative_error,
    relative_error_by_cell as relative_error_by_cell,
    relative_identity_residual as relative_identity_residual,
    relative_semigroup_residual as relative_semigroup_residual,
    RelativeError as RelativeError,
)
from ._frechet import (
    frechet_distance as frechet_distance,
    frechet_distance_of_moments as frechet_distance_of_moments,
)
