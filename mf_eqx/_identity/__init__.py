"""Identities: the equations that an average velocity satisfies for r < t. One method, one file."""

from .base import AbstractIdentity as AbstractIdentity, Context as Context
from .improved_mean_flow import ImprovedMeanFlow as ImprovedMeanFlow
from .mean_flow import MeanFlow as MeanFlow
from .shortcut import Shortcut as Shortcut
from .split_mean_flow import semigroup_residual as semigroup_residual, SplitMeanFlow as SplitMeanFlow
