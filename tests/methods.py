"""The methods that the tests of all methods go through. A new method is one line here; its facts say what is asked."""

import jax.numpy as jnp

import mf_eqx as mfx

METHODS = {
    "MeanFlow": mfx.MeanFlow(),
    "ImprovedMeanFlow": mfx.ImprovedMeanFlow(),
    "mixed tangent": mfx.ImprovedMeanFlow(0.5),
    "ModularMeanFlow": mfx.ModularMeanFlow(),
    "SplitMeanFlow": mfx.SplitMeanFlow(),
    "Shortcut": mfx.Shortcut(),
    "LagrangianDistillation": mfx.LagrangianDistillation(),
    "LagrangianDistillation with stopped derivative": mfx.LagrangianDistillation(stop_derivative=True),
    "LagrangianSelfDistillation": mfx.LagrangianSelfDistillation(),
    "TerminalVelocityMatching": mfx.TerminalVelocityMatching(),
    "AlphaFlow at its end": mfx.AlphaFlow(0.0),
    "AlphaFlow halfway": mfx.AlphaFlow(0.5),
    "AlphaFlow by a schedule": mfx.AlphaFlow(mfx.SigmoidSchedule(-1, 1)),
    "AlignYourFlow without regularisation": mfx.AlignYourFlow(1.0),
    "AlignYourFlow": mfx.AlignYourFlow(),
    "EulerianSelfDistillation": mfx.EulerianSelfDistillation(),
    "EulerianSelfDistillation with stopped advection": mfx.EulerianSelfDistillation(stop_advection=True),
    "SoFlow": mfx.SoFlow(0.1),
    "ConsistencyTraining": mfx.ConsistencyTraining(0.25),
    "ConsistencyTraining by iCT": mfx.ConsistencyTraining.improved(1),
    "ContinuousConsistency": mfx.ContinuousConsistency(),
    "FlowAnchoredConsistency": mfx.FlowAnchoredConsistency(),
    "RecursiveConsistency": mfx.RecursiveConsistency(),
    "RecursiveConsistency of order 1 by itself": mfx.RecursiveConsistency(1, by_teacher=False),
    "RecursiveConsistency of order 4": mfx.RecursiveConsistency(4, step=0.1),
    "RecursiveConsistency along its own velocity": mfx.RecursiveConsistency(1, 0.05, 0.0, by_teacher=False),
    "TransitionModel": mfx.TransitionModel(),
    "InductiveMomentMatching": mfx.InductiveMomentMatching(),
}


def those(condition):
    """The methods whose facts meet a condition."""
    return {name: identity for name, identity in METHODS.items() if condition(identity.facts)}


ONE_ROW = those(lambda facts: facts.group == 1)
EXACT = those(lambda facts: facts.exact)


def taught_by(identity, teacher):
    """Options of a row: a context with the teacher, or its velocity, if the method wants it."""
    context = mfx.Context(jnp.zeros((), jnp.int32), teacher) if identity.facts.needs_teacher else None
    return {"context": context, "velocity": teacher if identity.facts.needs_velocity else None}


def given_velocity(identity):
    """Options of an objective: some velocity if the method wants one."""
    return {"velocity": lambda z, t, condition: jnp.sin(z) - t} if identity.facts.needs_velocity else {}


def guidance(identity, null):
    """Guidance and label dropout as options of an objective, as far as the method takes them."""
    options = {"label_dropout": mfx.LabelDropout(0.1, null), **given_velocity(identity)}
    takes_none = identity.facts.uses_pair or identity.facts.needs_velocity
    return options if takes_none else {**options, "guidance": mfx.Guidance(2.0, 0.5)}


def trainer(identity, optimizer, averages, **options):
    """A step with half of the rows for the method, taught by the first average if it wants a teacher."""
    objective = mfx.Objective(identity, identity_share=0.5, **{**given_velocity(identity), **options})
    return mfx.TrainStep(objective, optimizer, averages, teacher=0 if identity.facts.needs_teacher else None)
