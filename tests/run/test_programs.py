"""Compiled programs are dropped before a process has no memory mappings left for them."""

import os

import jax
import jax.numpy as jnp
import pytest

from mf_eqx.run import _programs


def test_programs_are_dropped_when_they_take_half_of_the_memory_mappings_of_a_process(monkeypatch):
    traced = []

    @jax.jit
    def function(x):
        traced.append(x)
        return x + 1

    def after(allowed):
        def read_text(path):
            return str(allowed)

        monkeypatch.setattr(_programs.Path, "read_text", read_text)
        function(jnp.zeros(()))
        _programs.drop_programs_if_many()
        function(jnp.zeros(()))
        return len(traced)

    if not os.path.exists("/proc/self/maps"):
        pytest.skip("needs Linux")
    assert after(allowed=10**9) == 1
    assert after(allowed=10) == 2
