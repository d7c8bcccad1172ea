"""Identities: the equations that an average velocity satisfies for r < t. One method, one file."""

from .alpha_flow import AlphaFlow as AlphaFlow
from .base import AbstractIdentity as AbstractIdentity, AbstractIdentityWithLoss as AbstractIdentityWithLoss
from .consistency_training import ConsistencyTraining as ConsistencyTraining
from .facts import Facts as Facts
from .improved_mean_flow import ImprovedMeanFlow as ImprovedMeanFlow
from .inductive_moment_matching import InductiveMomentMatching as InductiveMomentMatching
from .lagrangian_self_distillation import LagrangianSelfDistillation as LagrangianSelfDistillation
from .mean_flow import MeanFlow as MeanFlow
from .shortcut import Shortcut as Shortcut
from .split_mean_flow import semigroup_residual as semigroup_residual, SplitMeanFlow as SplitMeanFlow
from .terminal_velocity_matching import TerminalVelocityMatching as TerminalVelocityMatching
