"""One-step generative modelling with average velocities: MeanFlow and its relatives, in Equinox."""

from . import nn as nn
from ._batch import Batch as Batch
from ._batch_objective import FrechetLoss as FrechetLoss, RunningMoments as RunningMoments
from ._derivative import (
    AbstractDerivative as AbstractDerivative,
    CentralDifference as CentralDifference,
    FusedJVP as FusedJVP,
    Passes as Passes,
    StoppedJVP as StoppedJVP,
    total_derivative as total_derivative,
)
from ._ema import ExponentialAverage as ExponentialAverage
from ._field import (
    AbstractField as AbstractField,
    AbstractFieldWithVelocity as AbstractFieldWithVelocity,
    stopped as stopped,
    WithVelocity as WithVelocity,
)
from ._generate import Generator as Generator
from ._guidance import (
    Guidance as Guidance,
    GuidedField as GuidedField,
    LabelDropout as LabelDropout,
    Trained as Trained,
)
from ._identity import (
    AbstractIdentity as AbstractIdentity,
    AbstractIdentityWithLoss as AbstractIdentityWithLoss,
    AbstractScheduledIdentity as AbstractScheduledIdentity,
    AlignYourFlow as AlignYourFlow,
    AlphaFlow as AlphaFlow,
    ConsistencyTraining as ConsistencyTraining,
    ContinuousConsistency as ContinuousConsistency,
    ect_earlier_time as ect_earlier_time,
    EulerianSelfDistillation as EulerianSelfDistillation,
    Facts as Facts,
    FlowAnchoredConsistency as FlowAnchoredConsistency,
    ict_earlier_time as ict_earlier_time,
    identities_in as identities_in,
    imm_earlier_time as imm_earlier_time,
    ImprovedMeanFlow as ImprovedMeanFlow,
    InductiveMomentMatching as InductiveMomentMatching,
    LagrangianSelfDistillation as LagrangianSelfDistillation,
    MeanFlow as MeanFlow,
    semigroup_residual as semigroup_residual,
    Shortcut as Shortcut,
    SoFlow as SoFlow,
    SplitMeanFlow as SplitMeanFlow,
    TerminalVelocityMatching as TerminalVelocityMatching,
    TransitionModel as TransitionModel,
)
from ._interpolant import (
    AbstractInterpolant as AbstractInterpolant,
    LinearInterpolant as LinearInterpolant,
    TrigonometricInterpolant as TrigonometricInterpolant,
)
from ._mean import Mean as Mean, Metrics as Metrics, total as total
from ._model import (
    describe as describe,
    DiT as DiT,
    DIT_B2 as DIT_B2,
    DIT_B4 as DIT_B4,
    DIT_L2 as DIT_L2,
    DIT_M2 as DIT_M2,
    DIT_S2 as DIT_S2,
    DIT_S4 as DIT_S4,
    DIT_XL2 as DIT_XL2,
    DiTSize as DiTSize,
    make_network as make_network,
    MLP as MLP,
    UNet as UNet,
    UNET_CIFAR10 as UNET_CIFAR10,
    UNetCondition as UNetCondition,
    UNetSize as UNetSize,
)
from ._objective import (
    AbstractMeanObjective as AbstractMeanObjective,
    AbstractObjective as AbstractObjective,
    Objective as Objective,
)
from ._row import Context as Context, Row as Row
from ._sample import (
    sample as sample,
    sample_euler as sample_euler,
    sample_heun as sample_heun,
    uniform_times as uniform_times,
)
from ._schedule import at_step as at_step, Schedule as Schedule, SigmoidSchedule as SigmoidSchedule
from ._sharding import Parallelism as Parallelism, Placement as Placement
from ._stable_target import StableTarget as StableTarget
from ._times import (
    AbstractTimes as AbstractTimes,
    check_batch_size as check_batch_size,
    LogitNormalTimes as LogitNormalTimes,
    split_rows as split_rows,
    TimePairs as TimePairs,
    UniformTimes as UniformTimes,
)
from ._train import (
    Faults as Faults,
    init_state as init_state,
    scan_steps as scan_steps,
    TrainState as TrainState,
    TrainStep as TrainStep,
)
from ._weight import (
    AbstractWeight as AbstractWeight,
    AdaptiveWeight as AdaptiveWeight,
    ConstantWeight as ConstantWeight,
)

__version__ = "0.1.0"
