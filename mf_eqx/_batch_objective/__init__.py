"""Objectives that compare whole batches with the data: distributions, not fields. One method, one file."""

from .frechet_loss import FrechetLoss as FrechetLoss, RunningMoments as RunningMoments
