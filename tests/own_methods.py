"""A file of a user's own with two methods, as text: one that any batch can have, and one that takes rows by threes."""

OWN = """
import mf_eqx as mfx

class Mine(mfx.AbstractIdentity):
    facts = mfx.Facts()

    def residual(self, field, row):
        return row.evaluate(field, row.z, row.r, row.t) - row.v

class Triples(mfx.AbstractIdentityWithLoss):
    facts = mfx.Facts(group=3)

    def residual_and_loss(self, field, rows):
        return rows.v, 0.0
"""
