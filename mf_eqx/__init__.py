"""One-step generative modelling with average velocities: MeanFlow and its relatives, in Equinox."""

from ._derivative import (
    AbstractDerivative as AbstractDerivative,
    FusedJVP as FusedJVP,
    total_derivative as total_derivative,
)
from ._field import AbstractField as AbstractField
from ._guidance import Guidance as Guidance, LabelDropout as LabelDropout
from ._identity import (
    AbstractIdentity as AbstractIdentity,
    Context as Context,
    ImprovedMeanFlow as ImprovedMeanFlow,
    MeanFlow as MeanFlow,
    semigroup_residual as semigroup_residual,
    Shortcut as Shortcut,
    SplitMeanFlow as SplitMeanFlow,
)
from ._interpolant import (
    AbstractInterpolant as AbstractInterpolant,
    LinearInterpolant as LinearInterpolant,
    TrigonometricInterpolant as TrigonometricInterpolant,
)
from ._objective import (
    AbstractObjective as AbstractObjective,
    Batch as Batch,
    Mean as Mean,
    Metrics as Metrics,
    Objective as Objective,
)
from ._times import (
    AbstractTimes as AbstractTimes,
    check_batch_size as check_batch_size,
    LogitNormalTimes as LogitNormalTimes,
    split_rows as split_rows,
    TimePairs as TimePairs,
    UniformTimes as UniformTimes,
)
from ._weight import (
    AbstractWeight as AbstractWeight,
    AdaptiveWeight as AdaptiveWeight,
    ConstantWeight as ConstantWeight,
)

__version__ = "0.1.0"
