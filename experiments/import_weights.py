"""Weights that others released into the files that everything here reads.

    python experiments/import_weights.py --dit xl2/checkpoint --to dit.safetensors
    python experiments/import_weights.py --imf iMF-B-2/checkpoint_800640 --to imf.safetensors
    python experiments/import_weights.py --pmf pMF-B-16/checkpoint --weights ema_params/500 --to pmf.safetensors
    python experiments/import_weights.py --unet cifar10.pth --weights net_ema1 --to unet.safetensors
    python experiments/import_weights.py --sit SiT-XL-2-256x256.pt --to start.safetensors
    python experiments/import_weights.py --inception pt_inception-2015-12-05-6726825d.pth --to inception.safetensors

--dit: the ImageNet network of the MeanFlow authors' JAX code, a file of `flax.serialization.to_bytes` or a folder that
flax wrote through Orbax. --imf, --pmf: the networks of improved and of pixel MeanFlow, in either form. --unet: the
CIFAR-10 network of the MeanFlow authors' torch code. --sit: SiT, trained by Flow Matching, to start from; what of it is
changed stands in mf_eqx/released/_sit.py. --inception: the network of the FID, in the file of pytorch-fid or
torch-fidelity.

Nothing is downloaded and nothing in a file is executed. Every tensor is accounted for, or the file is refused. What is
written says what it was made from, and is read by generate.py, evaluate.py and `checkpoint.load_weights` (the one of
--inception by `metrics.load_inception`). --unet, --sit and --inception need torch.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.random as jr

import mf_eqx as mfx
from mf_eqx import checkpoint, metrics, released, run, vae


@dataclasses.dataclass(frozen=True)
class Config:
    """An import. Exactly one of dit, imf, pmf, unet, sit and inception is given."""

    dit: str | None = None
    """The authors' DiT: a train state written by flax."""
    imf: str | None = None
    """The network of improved MeanFlow: a train state written by flax."""
    pmf: str | None = None
    """The network of pixel MeanFlow: a train state written by flax."""
    unet: str | None = None
    """The authors' CIFAR-10 network: a file of torch.save."""
    sit: str | None = None
    """SiT: a file of torch.save."""
    inception: str | None = None
    """Inception-v3 as of pytorch-fid or torch-fidelity: a file of torch.save."""
    weights: str | None = None
    """Which of the sets of weights in the file; by default the average: ema_params, net_ema or ema. Pixel MeanFlow has
    several averages, such as ema_params/500."""
    velocity_head: bool = True
    """Keep the velocity head of imf and pmf if the file holds its blocks. Sampling does not need it."""
    heads: int | None = None
    """Attention heads of a transformer; by default those of the published network of the same width."""
    image_size: tuple[int, int] | None = None
    """Height and width of the images or latents of a transformer; by default 256 256 with pmf, else 32 32."""
    alternating: bool = False
    """The unet is EDM's own, whose attention takes query, key and value of each channel side by side."""
    seed: int = 0
    """Seed of what SiT lacks: the first layer of the embedding of t - r."""
    to: str = ""
    """New file to write."""

    def __post_init__(self):
        run.check_sizes(self, heads=1 << 14, image_size=1 << 14)
        if self.heads is not None and self.heads < 1:
            raise ValueError(f"heads must be >= 1, got {self.heads}")
        if self.image_size is not None and min(self.image_size) < 1:
            raise ValueError(f"image_size must be positive, got {self.image_size}")
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, got {self.seed}")


class Imported(NamedTuple):
    """A network from a file, which of the file's sets of weights it has, and what was trained, if that is known."""

    field: mfx.DiT | mfx.UNet | mfx.InContextDiT | mfx.XPrediction
    weights: str
    trained: mfx.Trained | None = None


KINDS = ("dit", "imf", "pmf", "unet", "sit", "inception")
"""The fields of which exactly one is given."""
TRANSFORMERS = ("dit", "imf", "pmf", "sit")
NEEDED_BY = {"weights": (*TRANSFORMERS, "unet"), "heads": TRANSFORMERS, "image_size": TRANSFORMERS, "seed": ("sit",)}
NEEDED_BY |= {"alternating": ("unet",), "velocity_head": ("imf", "pmf")}
"""For which kinds a field may be given."""


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_flags(config: Config) -> str:
    """The kind of the file. Refuses none and several, and flags that say nothing of it."""
    given = [name for name in KINDS if getattr(config, name) is not None]
    if len(given) != 1:
        found = " and ".join(map(flag, given)) or "none"
        raise ValueError(f"exactly one of {', '.join(map(flag, KINDS))} must be given, got {found}")
    (kind,) = given
    for name, kinds in NEEDED_BY.items():
        if getattr(config, name) != getattr(Config(), name) and kind not in kinds:
            raise ValueError(f"{flag(name)} must be given with {' or '.join(map(flag, kinds))}, got {flag(kind)}")
    if not config.to:
        raise ValueError(f"--to must be given with {flag(kind)}, got none")
    if Path(config.to).exists():
        raise ValueError(f"--to must be a new file, got {config.to}")
    return kind


def choose(sets: Mapping[str, Any], wanted: str | None, average: str, path: str) -> str:
    """The name of the set that is asked for; else that of the average, else of the only one."""
    name = average if wanted is None else wanted
    found = [held for held in sets if held == name or held.endswith(f".{name}")]
    if not found and wanted is None:
        found = list(sets)
    if len(found) != 1:
        choices = ", ".join(repr(held) for held in sorted(sets))
        raise ValueError(f"--weights must be one of {choices} for {path}, got {wanted or 'none'}")
    return found[0]


def dit_shapes(channels: int, size: mfx.DiTSize, labels: int | None, config: Config) -> mfx.DiT:
    """A DiT without numbers."""
    shape = (channels, *(config.image_size or (32, 32)))
    return eqx.filter_eval_shape(lambda: mfx.DiT(shape, size, labels=labels, key=jr.key(0)))


def import_dit(path: str, config: Config) -> Imported:
    weights = config.weights or "ema_params"
    tensors = released.read_flax(path, weights)
    channels, size, labels = released.measure_dit(tensors, path, heads=config.heads)
    return Imported(released.fill_dit(dit_shapes(channels, size, labels, config), tensors, path), weights)


def in_context_tree(path: str, weights: str) -> dict[str, Any]:
    """The set of weights called `weights`: ema_params, or ema_params/500 of a file with several averages."""
    part = weights.partition("/")[0]
    held = released.read_flax(path, part)
    sets = {f"{part}/{name}": tree for name, tree in held.items() if isinstance(tree, dict) and "net" in tree}
    sets |= {part: held} if "net" in held else {}
    if weights not in sets:
        raise ValueError(f"--weights must be one of {', '.join(sorted(sets)) or 'none'} for {path}, got {weights}")
    return sets[weights]


def import_imf(path: str, config: Config) -> Imported:
    weights, pixels = config.weights or "ema_params", config.pmf is not None
    tensors = in_context_tree(path, weights)
    found = released.measure_in_context_dit(tensors, path, heads=config.heads)
    if found.size.learned_positions != pixels:
        right, wrong = ("pmf", "imf") if found.size.learned_positions else ("imf", "pmf")
        raise ValueError(f"{flag(wrong)} must be a file of this method, got one for {flag(right)}: {path}")
    shape = (found.channels, *(config.image_size or ((256, 256) if pixels else (32, 32))))
    options = {"labels": found.labels, "tokens": found.tokens, "guidance": True}
    options["velocity_head"] = found.velocity_head and config.velocity_head
    shapes = eqx.filter_eval_shape(lambda: mfx.InContextDiT(shape, found.size, **options, key=jr.key(0)))
    network = released.fill_in_context_dit(shapes, tensors, path)
    return Imported(mfx.XPrediction(network) if pixels else network, weights)


def import_unet(path: str, config: Config) -> Imported:
    sets = released.read_state_dicts(path, "map_layer0.weight")
    weights = choose(sets, config.weights, "net_ema", path)
    shape, size, augmentation = released.measure_unet(sets[weights], path)
    # The rate is seen in no tensor; 0.2 is the paper's, and off without a key.
    options = {"augmentation": augmentation, "dropout": 0.2}
    shapes = eqx.filter_eval_shape(lambda: mfx.UNet(shape, size, **options, key=jr.key(0)))
    return Imported(released.fill_unet(shapes, sets[weights], path, alternating=config.alternating), weights)


def import_sit(path: str, config: Config) -> Imported:
    sets = released.read_state_dicts(path, "x_embedder.proj.weight")
    weights = choose(sets, config.weights, "ema", path)
    channels, size, labels = released.measure_sit(sets[weights], path, heads=config.heads)
    shapes = dit_shapes(channels, size, labels, config)
    field = released.fill_sit(shapes, sets[weights], path, key=jr.key(config.seed))
    return Imported(field, weights, mfx.Trained(average=False, null_velocity=True, null_average=False))


IMPORTS = {"dit": import_dit, "imf": import_imf, "pmf": import_imf, "unet": import_unet, "sit": import_sit}


def sha256(path: str, kind: str) -> str:
    """The digest of a file, or of the names and digests of all files in a folder that flax wrote."""
    if kind not in ("dit", "imf", "pmf") or not Path(path).is_dir():
        return run.sha256_of_file(path)
    files = sorted(file for file in Path(path).rglob("*") if file.is_file())
    lines = [f"{file.relative_to(path).as_posix()} {run.sha256_of_file(file)}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def main(config: Config) -> None:
    """Import released weights."""
    kind = check_flags(config)
    run.require("safetensors")
    run.check_writable(config.to)
    path = getattr(config, kind)
    digest = sha256(path, kind)
    if kind == "inception":
        metrics.convert_inception(path, config.to)
        print(f"{config.to}: Inception-v3 from {path}, sha256 {digest}")
        return
    field, weights, trained = IMPORTS[kind](path, config)
    source = {"kind": kind, "weights": weights, "sha256": digest}
    is_latent = field.data_shape[0] == vae.SD_VAE.latent
    tokenizer = checkpoint.Tokenizer(vae.SD_VAE) if is_latent else None
    notes = checkpoint.Notes(pixels=(-1, 1), tokenizer=tokenizer, trained=trained)
    checkpoint.save_weights(config.to, field, {"source": source}, notes)
    count = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(field, eqx.is_array)))
    about = mfx.describe(field)
    print(f"{config.to}: {about['network']} of {about['size']}, {count:,} parameters")
    print(f"from {weights or 'the only weights'} in {path}, sha256 {digest}")


if __name__ == "__main__":
    run.main(main, Config(), description=__doc__)
