"""Folders of latents, as prepare_latents.py leaves them."""

import json

import numpy as np

from mf_eqx import data, vae

NOTES = {
    **{"images": "images", "rows": 12, "labels": 3, "size": [8, 8], "parts": 1, "vae": "0" * 64, "bfloat16": False},
    "tokenizer": {"widths": [4, 8], "blocks": 1, "latent": 4, "groups": 2, "channels": 3},
    **{"class_names": None, "statistics": vae.LatentStatistics().as_json(), "grey": False, "holdout": 0.0},
}


def save_latents(folder, *, labelled=True, **changes):
    """One part, of twelve images; `changes` of the notes."""
    x = np.random.default_rng(0).uniform(0.1, 1, (12, 8, 4, 4)).astype(np.float16)
    label = {"label": np.arange(12) % 3, "labels": 3} if labelled else {}
    data.write_shards(data.ArraySource(x, **label), folder / "part_0000")
    (folder / "latents.json").write_text(json.dumps({**NOTES, **changes}))
