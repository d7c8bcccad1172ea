"""Weights that the authors of papers released, in the layouts of their own code.

Imported explicitly (`from mf_eqx import released`). `experiments/import_weights.py` turns files into ours.
"""

from ._unet import fill_unet as fill_unet
