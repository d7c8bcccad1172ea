"""Objectives that compare the distributions of whole batches and of the data. One method, one file."""

from .frechet_loss import FrechetLoss as FrechetLoss, RunningMoments as RunningMoments
