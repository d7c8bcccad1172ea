"""One-step generative modelling with average velocities: MeanFlow and its relatives, in Equinox.

    import mf_eqx as mfx
    from mf_eqx import checkpoint, data, exact, measure, metrics, picture, released, run, vae

The first line has all public names of the files below that begin with an underscore, and `mfx.nn`. The subpackages in
the second line must be imported explicitly, so that a training job does not load what it does not use. What is where:

    _custom_types.py   the symbols, and types made of them
    _validate.py       checks of arguments that several parts share
    _batch.py          rows of training data
    _mean.py           means that add up over micro-batches, devices and steps
    _interpolant.py    paths from data to noise; the velocity follows by jvp
    _times.py          time samplers, pairs (r, t), the strided split
    _row.py            one drawn example, and how rows are drawn: noise, times, label dropout
    _stable_target.py  the velocity estimated from reference data: targets with less variance
    _schedule.py       hyper-parameters that change with the training step
    _weight.py         constant and adaptive weights, and short gaps first
    _perceptual.py     losses of images in features of a network
    _field.py          what an average velocity is: subclass it
    _derivative.py     du/dt, and the engines that compute it
    _engine_guards.py  what engines refuse: silent zeros, fields without forward mode
    _guidance.py       guidance inside the target, and at sampling
    _label_dropout.py  rows without their condition, and null conditions
    _drawn_guidance.py guidance drawn for each row, an input of the field
    _identity/         one file per method, and what holds of it
    _abstract_objective.py  what any loss over a batch is
    _objective.py      from a batch to a loss: boundary condition + identity
    _trained.py        which values of a field a training has learnt
    _batch_objective/  losses on whole batches of generated samples, one file each
    _gradient.py       gradients in turn: kinds of rows, micro-batches, devices
    _model/            DiT, in-context DiT, U-Net and MLP; networks that predict data
    nn/                public blocks: attention, embeddings, stacks (scan, remat), what optimisers must know of them
    _sample.py         n-step sampling of u, of consistency models, and of v by Euler and Heun
    _reward.py         sampling towards a reward, by the look-ahead of a flow map
    _log_density.py    samples with their exact density under the model
    _ema.py            averages of the parameters
    _optimizer.py      which optimisers a step can serve, and what it hands them
    _sharding.py       meshes, and what lies where on them
    _fsdp.py           divided parameters in a step: one whole block at a time
    _generate.py       many samples, each by its number, on all devices
    _train_state.py    TrainState, init_state
    _train.py          TrainStep, scan_steps
    _quiet.py          Orbax without its messages
    _optional.py       packages that not every machine has
    _leaves.py         states as flat dictionaries, and back
    _files.py          files that are whole at any moment, and how files of others are opened
    _json.py           JSON of others, read within bounds
    _foreign.py        the one strict way in for weights of other programs
    _legacy_torch.py   files of torch from before 1.6, read without torch
    _plain_pickle.py   pickles of plain values, read without running them
    data/              sources, the one deterministic stream of batches, checks of both
    checkpoint/        states on disk with digests; exported weights and samplers (loads orbax)
    exact/             toy data sets, exact fields and their average velocity (loads diffrax)
    metrics/           errors of fields, distances of samples, coverage; FID and relatives, with their networks
    vae/               the tokenizer of latent diffusion, read from files or trained
    released/          weights that authors of papers released, in the layouts of their code
    run/               what every script needs: command line, run directory, the training loop, progress
    picture/           what is drawn: grids of images and points, flows, curves (loads matplotlib)
    measure/           what a program costs: time, operations, memory

If `jaxtyping.install_import_hook("mf_eqx", "beartype.beartype")` runs before the import, shapes and types in the whole
package are checked during tracing. Experiments and tests do that; `JAXTYPING_DISABLE=1` turns the checks off.
"""

from . import nn as nn
from ._abstract_objective import (
    AbstractMeanObjective as AbstractMeanObjective,
    AbstractObjective as AbstractObjective,
)
from ._batch import Batch as Batch
from ._batch_objective import (
    AbstractPopulation as AbstractPopulation,
    AbstractSampleLoss as AbstractSampleLoss,
    Drifting as Drifting,
    FrechetLoss as FrechetLoss,
    PopulationMoments as PopulationMoments,
    QueuedFeatures as QueuedFeatures,
    QueuedPopulation as QueuedPopulation,
    RewardObjective as RewardObjective,
    RunningMoments as RunningMoments,
    RunningPopulation as RunningPopulation,
    SampleObjective as SampleObjective,
)
from ._derivative import (
    AbstractDerivative as AbstractDerivative,
    CentralDifference as CentralDifference,
    FusedJVP as FusedJVP,
    Passes as Passes,
    StoppedJVP as StoppedJVP,
    total_derivative as total_derivative,
)
from ._drawn_guidance import (
    DrawnGuidance as DrawnGuidance,
    PowerLawScales as PowerLawScales,
    WithGuidance as WithGuidance,
)
from ._ema import ExponentialAverage as ExponentialAverage, HalfLife as HalfLife
from ._field import (
    AbstractField as AbstractField,
    AbstractFieldWithVelocity as AbstractFieldWithVelocity,
    has_velocity_head as has_velocity_head,
    instantaneous_velocity as instantaneous_velocity,
    stopped as stopped,
    WithVelocity as WithVelocity,
)
from ._generate import Generator as Generator
from ._guidance import (
    AbstractGuidance as AbstractGuidance,
    Guidance as Guidance,
    GuidanceRange as GuidanceRange,
    GuidedField as GuidedField,
)
from ._identity import (
    AbstractIdentity as AbstractIdentity,
    AbstractIdentityWithLoss as AbstractIdentityWithLoss,
    AbstractIdentityWithVelocity as AbstractIdentityWithVelocity,
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
    LagrangianDistillation as LagrangianDistillation,
    LagrangianSelfDistillation as LagrangianSelfDistillation,
    MeanFlow as MeanFlow,
    ModularMeanFlow as ModularMeanFlow,
    RecursiveConsistency as RecursiveConsistency,
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
from ._label_dropout import LabelDropout as LabelDropout
from ._log_density import (
    sample_with_log_density as sample_with_log_density,
    SampleWithLogDensity as SampleWithLogDensity,
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
    GuidanceCondition as GuidanceCondition,
    IMF_B2 as IMF_B2,
    IMF_L2 as IMF_L2,
    IMF_M2 as IMF_M2,
    IMF_XL2 as IMF_XL2,
    InContextDiT as InContextDiT,
    InContextDiTSize as InContextDiTSize,
    make_network as make_network,
    MLP as MLP,
    PMF_B16 as PMF_B16,
    PMF_H16 as PMF_H16,
    PMF_L16 as PMF_L16,
    TokenCounts as TokenCounts,
    UNet as UNet,
    UNET_CIFAR10 as UNET_CIFAR10,
    UNetCondition as UNetCondition,
    UNetSize as UNetSize,
    XPrediction as XPrediction,
)
from ._objective import Objective as Objective
from ._perceptual import PerceptualTerm as PerceptualTerm
from ._reward import sample_with_reward as sample_with_reward
from ._row import Context as Context, Row as Row
from ._sample import (
    sample as sample,
    sample_consistency as sample_consistency,
    sample_euler as sample_euler,
    sample_heun as sample_heun,
    uniform_times as uniform_times,
)
from ._schedule import at_step as at_step, Schedule as Schedule, SigmoidSchedule as SigmoidSchedule
from ._sharding import Parallelism as Parallelism, Placement as Placement
from ._stable_target import StableTarget as StableTarget
from ._times import (
    AbstractLimitedTimes as AbstractLimitedTimes,
    AbstractTimes as AbstractTimes,
    check_batch_size as check_batch_size,
    LogitNormalTimes as LogitNormalTimes,
    split_rows as split_rows,
    TimePairs as TimePairs,
    UniformTimes as UniformTimes,
)
from ._train import scan_steps as scan_steps, TrainStep as TrainStep
from ._train_state import Faults as Faults, init_state as init_state, TrainState as TrainState
from ._trained import Trained as Trained
from ._weight import (
    AbstractWeight as AbstractWeight,
    AdaptiveWeight as AdaptiveWeight,
    ConstantWeight as ConstantWeight,
    GapCurriculum as GapCurriculum,
)

__version__ = "0.1.0"
