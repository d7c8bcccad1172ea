r"""Exact fields: distributions whose velocity is known in closed form, and their average velocities.

    AbstractDistribution ------ MarginalVelocity ------ AverageVelocity
    (GaussianMixture,                |                   (an AbstractField)
     StackedMixture, PointSet) GuidedVelocity

A distribution has a method for its marginal velocity (Eq. 1) on any interpolant. `MarginalVelocity` fixes the
interpolant and is a function v(z, t | condition). `GuidedVelocity` combines two values of this function into $v_{cfg}$
(Eq. 13). `AverageVelocity` integrates any such function to u(z, r, t | condition) by solving an ordinary differential
equation, and is a field like every network; given a network of Flow Matching, it is what a distillation of this network
should learn:

    mixture = exact.GaussianMixture(mean, std, label=label)
    v = exact.MarginalVelocity(mixture, LinearInterpolant())
    u = exact.AverageVelocity(exact.GuidedVelocity(v, scale=2.0))
    u(z, r, t, jnp.asarray(3))

`WeightedVelocity` is the velocity that Flow Matching learns instead of v under an adaptive weight; it shows the bias of
the weight without a network. `checkerboard`, `two_moons` and the other toy data sets are all mixtures; `StackedMixture`
consists of independent copies of a mixture, for any number of dimensions. `draw` and `Draw` make samples and batches of
distributions.

`GaussianAverageVelocity` and `PointMassAverageVelocity` are two fields whose average velocity u itself is known in
closed form; they are the references for everything above.

Import this part explicitly (`from mf_eqx import exact`), because it imports diffrax.
"""

from .._field import Velocity as Velocity
from ._average_velocity import AverageVelocity as AverageVelocity
from ._base import AbstractDistribution as AbstractDistribution
from ._draw import Draw as Draw, draw as draw, DrawLabelled as DrawLabelled
from ._gaussian import GaussianAverageVelocity as GaussianAverageVelocity
from ._gaussian_mixture import GaussianMixture as GaussianMixture
from ._guided_velocity import GuidedVelocity as GuidedVelocity
from ._marginal_velocity import MarginalVelocity as MarginalVelocity
from ._point_mass import PointMassAverageVelocity as PointMassAverageVelocity
from ._point_set import PointSet as PointSet
from ._stacked_mixture import StackedMixture as StackedMixture
from ._toys import (
    checkerboard as checkerboard,
    eight_gaussians as eight_gaussians,
    pinwheel as pinwheel,
    swiss_roll as swiss_roll,
    three_gaussians as three_gaussians,
    two_moons as two_moons,
    two_spirals as two_spirals,
)
from ._weighted_velocity import WeightedVelocity as WeightedVelocity
