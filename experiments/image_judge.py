"""What samples of images score beside real ones, by several measures, since each of them misses something:

- the Frechet distance and the sliced Wasserstein distance to test images in several spaces of features: pixels,
  EfficientNet-Lite0 where its weights are installed, and a classifier that is trained on the training images
- coverage (Naeem et al., Reliable Fidelity and Diversity Metrics for Generative Models, 2020, arXiv 2002.09797): the
  share of test images in whose ball, which reaches to the fifth nearest test image, there is a sample
- the share of samples in which that classifier reads the wanted class, over all and for each class
- the share of samples whose nearest image of all is a training image

Real images stand in the rows above: as many training images against the test images, which is the floor of a distance,
and the classifier's accuracy on the test images.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import image_classifier
import image_sources
import jax.random as jr
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from mf_eqx import data, metrics, run

CLASSIFIER = "classifier"
"""Name of the space of the classifier's features."""
MOST_FEATURES = 1024
"""Size of the space of pixels. Larger images enter as means over squares of pixels."""
COMPUTED_AT_ONCE = 100
"""Images in one call, so that one compiled program computes the features of any number of them."""
NEIGHBOURS = 5
"""k of the coverage: the ball around a test image reaches to its k-th nearest test image."""
MOST_SEARCHED = 2000
"""Most samples whose nearest real image is looked for."""
SEARCHED_AT_ONCE = 4096
"""Real images that are searched in one call."""
MOST_CLASSES = 20
"""Most classes that have a column of their own in the printed table."""

Images: TypeAlias = UInt8[np.ndarray, "rows channels height width"]
Points: TypeAlias = Float[np.ndarray, "rows features"]


class FeatureSpace(NamedTuple):
    """A name, and what images become in it."""

    name: str
    features: Callable[[Images], Points]


def pixels(x: Images) -> Points:
    """Pixels in [0, 1], or their means over squares that are just large enough for `MOST_FEATURES`."""
    return image_sources.means_over_squares(x, MOST_FEATURES).reshape(len(x), -1) / 255


def feature_spaces() -> list[FeatureSpace]:
    """All that no training is needed for. Without the weights of EfficientNet-Lite0 a line says how to install them."""
    spaces = [FeatureSpace("pixels", pixels)]
    try:
        return [*spaces, lite0_space()]
    except run.MissingDependency as error:
        run.tell(f"the features of EfficientNet-Lite0 will be missing among the distances: {error}")
        return spaces


def lite0_space() -> FeatureSpace:
    """That of EfficientNet-Lite0.

    **Raises:** `MissingDependency` if its weights are not installed.
    """
    extractor = metrics.FeatureExtractor(metrics.load_efficientnet_lite0(), metrics.LITE0)

    def lite0(x: Images) -> Points:
        parts = image_sources.in_parts(x, COMPUTED_AT_ONCE)
        return metrics.collect_features(extractor, parts, len(x)).pooled

    return FeatureSpace("lite0", lite0)


class Result(NamedTuple):
    """What images scored against the test images, made in how many evaluations each; dictionaries by space of features,
    lists by class."""

    what: str
    evaluations: int | None = None
    frechet: dict[str, float] | None = None
    sliced_wasserstein: dict[str, float] | None = None
    coverage: dict[str, float] | None = None
    coverage_by_class: list[float | None] | None = None
    agreement: float | None = None
    agreement_by_class: list[float | None] | None = None
    nearer_to_training: float | None = None


class Described(NamedTuple):
    """Images, their features by space, and the class that the classifier reads in each."""

    x: Images
    features: dict[str, Points]
    read: Int[np.ndarray, " rows"] | None


class Judge:
    """Test images, and everything about them that is computed once.

    **Arguments:** `spaces` of features; `classifier`, or None without labels; `train`, `test` images; `count` how many
    of each are compared.
    """

    def __init__(
        self,
        spaces: Sequence[FeatureSpace],
        classifier: image_classifier.Classifier | None,
        train: data.AbstractSource,
        test: data.AbstractSource,
        count: int,
    ):
        self.spaces, self.classifier, self.train, self.test = spaces, classifier, train, test
        self.known, real = (source.take(image_sources.spread(len(source), count)) for source in (train, test))
        self.real, self.labels = self.describe(real.x), train.labels
        self.label = real.label if classifier is not None else None
        self.radii = {name: radii(features) for name, features in self.real.features.items()}

    def describe(self, x: Images) -> Described:
        features, read = {space.name: space.features(x) for space in self.spaces}, None
        if self.classifier is not None:
            features[CLASSIFIER], read = image_classifier.read(self.classifier, x)
        return Described(x, features, read)

    def real_images(self) -> list[Result]:
        """The floor of all distances and, with labels, the classifier's accuracy."""
        found = self.describe(self.known.x)
        floor = Result("training images", **self._distances(found), **self._coverage(found, self.known.label))
        return [floor] if self.label is None else [floor, Result("test images", **self._agreement(self.real))]

    def samples(
        self,
        what: str,
        made: Iterable[tuple[int, Float[np.ndarray, "rows channels height width"]]],
        *,
        search: bool = True,
    ) -> list[Result]:
        """Samples in [-1, 1], by their number of evaluations; for each test image one of the same label. `search` says
        whether their nearest images are looked for, which takes longest where all images are many."""
        results, searched = [], {}
        for evaluations, x in made:
            if not np.isfinite(x).all():
                results.append(Result(what, evaluations, dict.fromkeys(self.real.features, math.nan)))
                continue
            found = self.describe(np.rint(127.5 * (x.clip(-1, 1) + 1)).astype(np.uint8))
            scores = {**self._distances(found), **self._coverage(found, self.label), **self._agreement(found)}
            results.append(Result(what, evaluations, **scores))
            if search:
                searched[len(results) - 1] = found.x[image_sources.spread(len(x), min(len(x), MOST_SEARCHED))]
        for index, share in zip(searched, self._nearer_to_training([*searched.values()]), strict=True):
            results[index] = results[index]._replace(nearer_to_training=share)
        return results

    def _distances(self, found: Described) -> dict[str, Any]:
        pairs = {name: (found.features[name], features) for name, features in self.real.features.items()}
        return {
            "frechet": {name: metrics.frechet_distance(*pair) for name, pair in pairs.items()},
            "sliced_wasserstein": {
                name: float(metrics.sliced_wasserstein(*pair, key=jr.key(0))) for name, pair in pairs.items()
            },
        }

    def _coverage(self, found: Described, label: Int[np.ndarray, " rows"] | None) -> dict[str, Any]:
        """In every space; of each class by its own images alone, in the last space that was not trained on the data."""
        whole = {
            name: float(covered(features, self.radii[name], found.features[name]).mean())
            for name, features in self.real.features.items()
        }
        if label is None or self.label is None or self.labels is None:
            return {"coverage": whole}
        name = self.spaces[-1].name
        parts = [
            (self.real.features[name][self.label == c], found.features[name][label == c]) for c in range(self.labels)
        ]
        by_class = [
            float(covered(real, radii(real), made).mean()) if len(real) > 1 and len(made) else None
            for real, made in parts
        ]
        return {"coverage": whole, "coverage_by_class": by_class}

    def _agreement(self, found: Described) -> dict[str, Any]:
        if found.read is None or self.label is None or self.labels is None:
            return {}
        right = found.read == self.label
        parts = [right[self.label == c] for c in range(self.labels)]
        by_class = [float(part.mean()) if len(part) else None for part in parts]
        return {"agreement": float(right.mean()), "agreement_by_class": by_class}

    def _nearer_to_training(self, searched: Sequence[Images]) -> list[float]:
        """Of each set the share of images whose nearest one of all is a training image. They are searched for together,
        so that the files of all images are read once."""
        if not searched:
            return []
        near, far = (distance_to(source, np.concatenate(searched)) for source in (self.train, self.test))
        return [float(part.mean()) for part in np.split(near < far, np.cumsum([*map(len, searched)])[:-1])]


def radii(real: Points) -> Float[np.ndarray, " rows"]:
    """The distance of each point to its fifth nearest one, or to the last where there are fewer."""
    from sklearn.neighbors import NearestNeighbors  # here and below, so that whoever judges nothing can do without

    neighbours = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(real) - 1), algorithm="brute").fit(real)
    return neighbours.kneighbors()[0][:, -1]


def covered(
    real: Points, radius: Float[np.ndarray, " rows"], made: Float[np.ndarray, "samples features"]
) -> Bool[np.ndarray, " rows"]:
    """Whether there is a sample in the ball of each real point."""
    from sklearn.metrics import pairwise_distances_argmin_min

    return pairwise_distances_argmin_min(real, made)[1] <= radius


def distance_to(source: data.AbstractSource, x: Images) -> Float[np.ndarray, " rows"]:
    """That of the pixels of each image to the nearest ones of a source, all of which is searched."""
    from sklearn.metrics import pairwise_distances_argmin_min

    wanted, parts = pixels(x), math.ceil(len(source) / SEARCHED_AT_ONCE)
    found = (pixels(source.take(rows).x) for rows in np.array_split(np.arange(len(source)), parts))
    return np.min([pairwise_distances_argmin_min(wanted, part)[1] for part in found], axis=0)


# Tables


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def least(shares: Sequence[float | None] | None) -> float | None:
    return min((share for share in shares or () if share is not None), default=None)


def _in(found: dict[str, float] | None, spaces: Sequence[str]) -> list[float | None]:
    return [(found or {}).get(space) for space in spaces]


def report(results: Sequence[Result], names: Sequence[str] | None, chance: float) -> str:
    """All tables as text.

    **Arguments:** `results`; `names` of the classes, or None without labels; `chance` the share of training images
    among all images.
    """
    spaces = [*(results[0].frechet or ())]
    tables = [_distances(results, spaces), _shares(results, spaces, chance)]
    if names and len(names) <= MOST_CLASSES:
        text = "The wanted class read, by class:"
        tables.append(f"{text}\n\n{_by_class([(row, row.agreement_by_class) for row in results], names)}")
        space = [name for name in spaces if name != CLASSIFIER][-1]
        text = f"Covered, by class, in the space of {space}:"
        tables.append(f"{text}\n\n{_by_class([(row, row.coverage_by_class) for row in results], names)}")
    return "\n\n".join(tables)


def _distances(results: Sequence[Result], spaces: Sequence[str]) -> str:
    rows = [
        (row.what, row.evaluations, *_in(row.frechet, spaces), *_in(row.sliced_wasserstein, spaces))
        for row in results
        if row.frechet
    ]
    headers = ("", "evaluations", *(f"{kind} {space}" for kind in ("FD", "W2") for space in spaces))
    text = "Frechet (FD) and sliced Wasserstein (W2) distances to the test images, by space of features:"
    return f"{text}\n\n{run.table(rows, headers)}"


def _shares(results: Sequence[Result], spaces: Sequence[str], chance: float) -> str:
    rows = [
        (
            *(row.what, row.evaluations),
            *map(percent, _in(row.coverage, spaces)),
            *map(percent, (least(row.coverage_by_class), row.agreement, least(row.agreement_by_class))),
            percent(row.nearer_to_training),
        )
        for row in results
    ]
    headers = ("", "evaluations", *spaces, "lowest class", "right class", "lowest class", "nearer to training")
    text = (
        "Test images that are covered, by space of features; images in which the right class is read; images whose "
        f"nearest one is a training image (by chance {percent(chance)}; a share far above this means that training "
        "images are repeated, a share near it says nothing about quality):"
    )
    return f"{text}\n\n{run.table(rows, headers)}"


def _by_class(found: Sequence[tuple[Result, list[float | None] | None]], names: Sequence[str]) -> str:
    rows = [(row.what, row.evaluations, *map(percent, shares)) for row, shares in found if shares]
    return run.table(rows, ("", "evaluations", *names))
