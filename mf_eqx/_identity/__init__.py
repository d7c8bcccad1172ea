"""Identities: the equations that an average velocity satisfies for r < t. One method, one file."""

from .align_your_flow import AlignYourFlow as AlignYourFlow
from .alpha_flow import AlphaFlow as AlphaFlow
from .base import (
    AbstractIdentity as AbstractIdentity,
    AbstractIdentityWithLoss as AbstractIdentityWithLoss,
    AbstractIdentityWithVelocity as AbstractIdentityWithVelocity,
    AbstractScheduledIdentity as AbstractScheduledIdentity,
)
from .consistency_training import ConsistencyTraining as ConsistencyTraining
from .continuous_consistency import ContinuousConsistency as ContinuousConsistency
from .earlier_times import (
    ect_earlier_time as ect_earlier_time,
    ict_earlier_time as ict_earlier_time,
    imm_earlier_time as imm_earlier_time,
)
from .eulerian_self_distillation import EulerianSelfDistillation as EulerianSelfDistillation
from .facts import Facts as Facts
from .flow_anchored_consistency import FlowAnchoredConsistency as FlowAnchoredConsistency
from .improved_mean_flow import ImprovedMeanFlow as ImprovedMeanFlow
from .inductive_moment_matching import InductiveMomentMatching as InductiveMomentMatching
from .lagrangian_distillation import LagrangianDistillation as LagrangianDistillation
from .lagrangian_self_distillation import LagrangianSelfDistillation as LagrangianSelfDistillation
from .mean_flow import MeanFlow as MeanFlow
from .modular_mean_flow import ModularMeanFlow as ModularMeanFlow
from .namespace import identities_in as identities_in
from .recursive_consistency import RecursiveConsistency as RecursiveConsistency
from .shortcut import Shortcut as Shortcut
from .so_flow import SoFlow as SoFlow
from .split_mean_flow import semigroup_residual as semigroup_residual, SplitMeanFlow as SplitMeanFlow
from .terminal_velocity_matching import TerminalVelocityMatching as TerminalVelocityMatching
from .transition_model import TransitionModel as TransitionModel
