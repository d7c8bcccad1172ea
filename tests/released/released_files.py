"""Weights in the layouts of the released networks, with numbers of our own; and files of flax, written by hand."""

import msgpack
import numpy as np
from random_tensors import random_tensor

CHANNELS, HEIGHT, WIDTH = 4, 8, 12
DEPTH, FEATURES, HEADS, PATCH, LABELS = 3, 16, 2, 2, 5
SIZE = {"depth": DEPTH, "width": FEATURES, "patch": PATCH, "channels": CHANNELS, "labels": LABELS}


def layers(depth, width, outputs, *, flax):
    """The linear layers of DiT by name, as (inputs, outputs); `outputs` of the last one."""
    number = "layers_{}" if flax else "{}"
    times = ("t_embedder", "h_embedder") if flax else ("t_embedder",)
    for embedder in times:
        yield f"{embedder}/mlp/{number.format(0)}", (256, width)
        yield f"{embedder}/mlp/{number.format(2)}", (width, width)
    for i in range(depth):
        block = f"blocks/{number.format(i)}"
        yield f"{block}/attn/qkv", (width, 3 * width)
        yield f"{block}/attn/proj", (width, width)
        yield f"{block}/mlp/fc1", (width, 4 * width)
        yield f"{block}/mlp/fc2", (4 * width, width)
        yield f"{block}/adaLN_modulation/{number.format(1)}", (width, 6 * width)
    yield f"final_layer/adaLN_modulation/{number.format(1)}", (width, 2 * width)
    yield "final_layer/linear", (width, outputs)


def flax_shapes(depth, width, patch, channels, labels):
    """Of the authors' JAX DiT, by names joined with slashes."""
    shapes = {
        "net/x_embedder/proj/kernel": (patch, patch, channels, width),
        "net/x_embedder/proj/bias": (width,),
        "net/y_embedder/embedding_table/_flax_embedding/embedding": (labels + 1, width),
    }
    for name, (inputs, outputs) in layers(depth, width, patch**2 * channels, flax=True):
        shapes[f"net/{name}/_flax_linear/kernel"] = (inputs, outputs)
        shapes[f"net/{name}/_flax_linear/bias"] = (outputs,)
    return shapes


def sit_shapes(depth, width, patch, channels, labels, height=HEIGHT, columns=WIDTH):
    """Of SiT in torch."""
    shapes = {
        "pos_embed": (1, height * columns // patch**2, width),
        "x_embedder.proj.weight": (width, channels, patch, patch),
        "x_embedder.proj.bias": (width,),
        "y_embedder.embedding_table.weight": (labels + 1, width),
    }
    for name, (inputs, outputs) in layers(depth, width, 2 * patch**2 * channels, flax=False):
        shapes[f"{name}.weight".replace("/", ".")] = (outputs, inputs)
        shapes[f"{name}.bias".replace("/", ".")] = (outputs,)
    return shapes


def flax_tensors(seed="dit", **size):
    """By names joined with slashes."""
    # The scale of random tensors goes by torch's order of axes, which is the opposite.
    return {
        name: random_tensor(f"{seed} {name}", shape[::-1]).transpose()
        for name, shape in flax_shapes(**(SIZE | size)).items()
    }


def positions(rows, columns, width):
    """DiT's embedding of positions, number by number."""
    found = np.zeros((rows * columns, width))
    quarter = width // 4
    for token in range(rows * columns):
        for axis, place in enumerate((token % columns, token // columns)):
            for k in range(quarter):
                angle = place / 10_000 ** (k / quarter)
                found[token, 2 * quarter * axis + k] = np.sin(angle)
                found[token, 2 * quarter * axis + quarter + k] = np.cos(angle)
    return found


def sit_tensors(seed="sit", **size):
    """By their names in torch."""
    shapes = sit_shapes(**(SIZE | size))
    tensors = {name: random_tensor(f"{seed} {name}", shape) for name, shape in shapes.items()}
    tensors["pos_embed"] = positions(HEIGHT // PATCH, WIDTH // PATCH, FEATURES)[None].astype(np.float32)
    return tensors


def nested(tensors):
    """Dictionaries in dictionaries, from names with slashes."""
    tree = {}
    for name, tensor in tensors.items():
        *outer, last = name.split("/")
        node = tree
        for part in outer:
            node = node.setdefault(part, {})
        node[last] = tensor
    return tree


def extension(array, code=1):
    """An array as flax puts it into a file."""
    return msgpack.ExtType(code, msgpack.packb([list(array.shape), array.dtype.name, array.tobytes()]))


def write_flax(path, tree):
    """A file as `flax.serialization.to_bytes` writes it."""
    path.write_bytes(msgpack.packb(tree, default=lambda array: extension(np.asarray(array))))
    return path


def write_state(path, **parts):
    """A train state with these parts by names with slashes, in the middle of an optimizer's and a step."""
    moments = {"0": {"mu": np.zeros((2, 3), np.float32), "count": np.zeros((), np.int32)}}
    trees = {name: nested(tensors) for name, tensors in parts.items()}
    return write_flax(path, {"step": 7, "opt_state": moments, **trees, "rng": np.zeros(2, np.uint32)})
