"""The methods that a namespace holds, for scripts that compare all of them."""

import inspect
from collections.abc import Mapping
from typing import Any

from .base import AbstractIdentity, AbstractScheduledIdentity


def identities_in(
    namespace: Mapping[str, Any], steps: int, *, known_velocity: bool = False
) -> dict[str, AbstractIdentity]:
    """Every method in a namespace such as `vars(mf_eqx)` or `globals()`, by name, with its paper's parameters.

    A method with schedules is made by `for_training(steps)`, any other without arguments; one that needs arguments is
    left out.

    **Arguments:** `namespace`; `steps` of the training; `known_velocity` whether the objective will have a `velocity`,
    without which the methods that need one are left out.
    """
    methods = {}
    for name, member in namespace.items():
        if not (isinstance(member, type) and issubclass(member, AbstractIdentity)) or inspect.isabstract(member):
            continue
        if issubclass(member, AbstractScheduledIdentity):
            methods[name] = member.for_training(steps)
        elif not any(_is_required(parameter) for parameter in inspect.signature(member).parameters.values()):
            methods[name] = member()
    return {name: method for name, method in methods.items() if known_velocity or not method.facts.needs_velocity}


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind not in (
        parameter.VAR_POSITIONAL,
        parameter.VAR_KEYWORD,
    )
