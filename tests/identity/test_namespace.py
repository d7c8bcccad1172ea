"""Scripts that compare all methods find them by themselves."""

import jax.numpy as jnp
import numpy as np
from methods import METHODS

import mf_eqx as mfx


class Own(mfx.AbstractIdentity):
    facts = mfx.Facts()

    def residual(self, field, row):
        return row.z


class NeedsStrength(Own):
    strength: float


def test_every_method_of_the_package_is_found_and_in_the_shared_list():
    found = mfx.identities_in(vars(mfx), steps=100, known_velocity=True)
    assert all(name == type(identity).__name__ for name, identity in found.items())
    assert {type(identity) for identity in METHODS.values()} == {type(identity) for identity in found.values()}


def test_without_a_known_velocity_the_methods_that_need_one_are_left_out():
    every, without = (mfx.identities_in(vars(mfx), 1, known_velocity=known) for known in (True, False))
    assert every.keys() - without.keys() == {"LagrangianDistillation"}


def test_methods_of_ones_own_are_found_unless_they_need_arguments():
    names = {"Own": Own, "NeedsStrength": NeedsStrength, "AbstractIdentity": mfx.AbstractIdentity, "number": 3}
    assert mfx.identities_in(names, steps=1).keys() == {"Own"}


def test_schedules_are_stretched_over_the_training():
    for steps in (100, 2000):
        alpha = mfx.identities_in(vars(mfx), steps)["AlphaFlow"].alpha
        found = [alpha(jnp.asarray(part * steps // 2)) for part in (0, 1, 2)]
        np.testing.assert_allclose(found, [1, 0.5, 0], atol=1e-5)


def test_every_schedule_can_be_made_for_a_training_without_steps():
    for identity in mfx.identities_in(vars(mfx), steps=0).values():
        assert isinstance(identity.facts, mfx.Facts)
