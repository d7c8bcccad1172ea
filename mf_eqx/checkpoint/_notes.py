"""What travels with weights beside the network: what its values are, and what was trained."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Real

from .._guidance import GuidanceRange
from .._trained import Trained
from .._validate import check_counts, check_kind
from ..vae import AutoencoderSize, LatentStatistics


class Tokenizer(NamedTuple):
    """The tokenizer of which a field's data are latents: its `size`; its `digest` (`vae.Autoencoder.digest`), or None
    if only the size is known; and the `statistics` by which latents were standardised."""

    size: AutoencoderSize
    digest: str | None = None
    statistics: LatentStatistics = LatentStatistics()


@dataclasses.dataclass(frozen=True)
class Notes:
    """Notes on weights, for those who sample. None is always "not known", or "there is none".

    **Arguments:**

    - `pixels`: for images, and for latents of images: the values of black and of full brightness, such as (-1, 1).
    - `tokenizer`: for latents: what decodes them to pixels, after `tokenizer.statistics.restore`.
    - `class_names`: the name of each label.
    - `trained`: which values of the field were trained: `Objective.trained`.
    - `steps`: training steps.
    - `decay`: decay per step, if the weights are an average.
    - `mean`, `std`: of data that were standardised: the field's data are (data - mean) / std, with a mean for each
      entry of a row's first axis, or one for all, and one std > 0. `in_unit_of_data` goes back.

    **Raises:** `ValueError` for values of other types or ranges, or for statistics of other channels than the
    tokenizer's latents have.
    """

    pixels: tuple[float, float] | None = None
    tokenizer: Tokenizer | None = None
    class_names: tuple[str, ...] | None = None
    trained: Trained | None = None
    steps: int | None = None
    decay: float | None = None
    mean: tuple[float, ...] | None = None
    std: float | None = None

    def __post_init__(self):
        for name in ("pixels", "class_names", "mean"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        pixels, names = self.pixels, self.class_names
        if pixels is not None and not (_are(float, pixels, 2) and -math.inf < pixels[0] < pixels[1] < math.inf):
            raise ValueError(f"pixels must be two finite numbers, the lower one first, got {pixels!r:.80}")
        if names is not None and not (names and _are(str, names)):
            raise ValueError(f"class_names must be a tuple of at least one text, got {names!r:.80}")
        if self.trained is not None:
            _check_trained(self.trained)
        if self.tokenizer is not None:
            _check_tokenizer(self.tokenizer)
        if self.steps is not None and not (_are(int, (self.steps,)) and self.steps >= 0):
            raise ValueError(f"steps must be an integer >= 0, got {self.steps!r:.80}")
        if self.decay is not None and not (_are(float, (self.decay,)) and 0 <= self.decay < 1):
            raise ValueError(f"decay must lie in [0, 1), got {self.decay!r:.80}")
        if self.mean is not None and not (self.mean and _are(float, self.mean) and all(map(math.isfinite, self.mean))):
            raise ValueError(f"mean must be finite numbers, at least one, got {self.mean!r:.80}")
        if self.std is not None and not (_are(float, (self.std,)) and 0 < self.std < math.inf):
            raise ValueError(f"std must be > 0 and finite, got {self.std!r:.80}")

    def in_unit_of_data(self, x: Real[Array | np.ndarray, "rows *data"]) -> Real[np.ndarray, "rows *data"]:
        """Samples in the unit of the data, std x + mean, in floating point; as they are if neither is known.

        **Raises:** `ValueError` if `x` has fewer axes than two, or if `mean` has neither one number nor as many as the
        first axis of a row.
        """
        x = np.asarray(x)
        if self.mean is None and self.std is None:
            return x
        if x.ndim < 2:
            raise ValueError(f"x must have rows of at least one axis, got shape {x.shape}")
        x = x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(np.float32)
        if self.mean is not None and len(self.mean) not in (1, x.shape[1]):
            raise ValueError(f"mean must have one number or {x.shape[1]}, as rows of x, got {len(self.mean)}")
        mean = np.asarray(self.mean or 0, x.dtype).reshape(-1, *[1] * (x.ndim - 2))
        return x * x.dtype.type(1 if self.std is None else self.std) + mean

    def as_json(self) -> dict[str, Any]:
        """All that is known, as values that JSON can hold."""
        known = {name: value for name, value in vars(self).items() if value is not None}
        if self.tokenizer is not None:
            size, digest, statistics = self.tokenizer
            known["tokenizer"] = {"size": size._asdict(), "digest": digest, "statistics": statistics.as_json()}
        if self.trained is not None:
            guidance = self.trained.guidance
            known["trained"] = {**self.trained._asdict(), "guidance": None if guidance is None else guidance._asdict()}
        return known


def _check_tokenizer(tokenizer: Tokenizer) -> None:
    """Raises a `ValueError` for a tokenizer that cannot be, and for statistics of other channels than its latents."""
    size, digest, statistics = tokenizer
    check_kind("size", size, AutoencoderSize)
    check_counts(**size._asdict())
    if not isinstance(digest, str | None):
        raise ValueError(f"digest must be a text or None, got {digest!r:.80}")
    check_kind("statistics", statistics, LatentStatistics)
    statistics.check_channels(size.latent)


def _check_trained(trained: Trained) -> None:
    """Raises a `ValueError` for values of other types than those of `Trained`, or a range without numbers."""
    *flags, guidance = trained
    if not _are(bool, tuple(flags)):
        raise ValueError(f"trained must be of bools, got {trained!r:.120}")
    if guidance is None:
        return
    middle = () if guidance.middle is None else (guidance.middle,)
    if not _are(float, (guidance.smallest, guidance.largest, *middle)):
        raise ValueError(f"guidance must be of numbers, got {guidance!r:.120}")
    if not (0 < guidance.smallest <= guidance.largest < math.inf and all(0 <= time <= 1 for time in middle)):
        rule = "0 < smallest <= largest, finite, and a middle in [0, 1]"
        raise ValueError(f"guidance must satisfy {rule}, got {guidance!r:.120}")


def _are(kind: type, values: Any, number: int | None = None) -> bool:
    """Whether `values` is a tuple of `number` values (None: any number) of one kind. An int also counts as a float, but
    a bool only as a bool."""
    kinds = (int, float) if kind is float else kind
    return (
        isinstance(values, tuple)
        and number in (None, len(values))
        and all(isinstance(value, kinds) and (kind is bool or not isinstance(value, bool)) for value in values)
    )


def notes_of_json(values: Mapping[str, Any]) -> Notes:
    """The notes of which these are the JSON. **Raises:** `ValueError` if they are no notes, or lack a field of the
    tokenizer or of what was trained."""
    known: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    try:
        if "tokenizer" in known:
            tokenizer = dict(known["tokenizer"])
            size = {**tokenizer["size"], "widths": tuple(tokenizer["size"]["widths"])}
            statistics = LatentStatistics(**{name: tuple(v) for name, v in tokenizer["statistics"].items()})
            known["tokenizer"] = Tokenizer(_whole(AutoencoderSize, size), tokenizer["digest"], statistics)
        if "trained" in known:
            trained = dict(known["trained"])
            if trained.get("guidance") is not None:
                trained["guidance"] = GuidanceRange(**trained["guidance"])
            known["trained"] = _whole(Trained, trained)
        return Notes(**known)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"notes must be those of checkpoint.Notes, but cannot be read: {error}") from error


def _whole(kind: Any, values: Mapping[str, Any]) -> Any:
    """A named tuple of values for all its fields: those that have defaults must be there, too."""
    if missing := [name for name in kind._fields if name not in values]:
        raise TypeError(f"{kind.__name__} lacks {', '.join(missing)}")
    return kind(**values)
