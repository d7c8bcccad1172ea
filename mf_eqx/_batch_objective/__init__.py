"""Objectives that compare the distributions of generated samples and of the data. One loss, one file."""

from .drifting import Drifting as Drifting
from .frechet_loss import FrechetLoss as FrechetLoss
from .population import (
    AbstractPopulation as AbstractPopulation,
    PopulationMoments as PopulationMoments,
    QueuedFeatures as QueuedFeatures,
    QueuedPopulation as QueuedPopulation,
    RunningMoments as RunningMoments,
    RunningPopulation as RunningPopulation,
)
from .reward_objective import RewardObjective as RewardObjective
from .sample_objective import AbstractSampleLoss as AbstractSampleLoss, SampleObjective as SampleObjective
