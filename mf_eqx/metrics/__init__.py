"""Distances between a generated sample and a sample of the truth or its density, errors of a field, and the quality of
images (FID and its relatives)."""

from ._density import mode_coverage as mode_coverage, total_variation as total_variation
from ._density_ratio import (
    reverse_kullback_leibler as reverse_kullback_leibler,
    ReverseKullbackLeibler as ReverseKullbackLeibler,
)
from ._distance import (
    energy_distance as energy_distance,
    maximum_mean_discrepancy as maximum_mean_discrepancy,
    sliced_wasserstein as sliced_wasserstein,
)
from ._efficientnet_lite0 import (
    EfficientNetLite0 as EfficientNetLite0,
    load_efficientnet_lite0 as load_efficientnet_lite0,
)
from ._feature_moments import (
    AccumulatedMoments as AccumulatedMoments,
    FeatureMoments as FeatureMoments,
    load_moments as load_moments,
    save_moments as save_moments,
)
from ._features import (
    collect_features as collect_features,
    FeatureExtractor as FeatureExtractor,
    SampleFeatures as SampleFeatures,
    stream_moments as stream_moments,
)
from ._field_error import (
    draw_states as draw_states,
    field_errors as field_errors,
    field_truth as field_truth,
    FieldErrors as FieldErrors,
    FieldTruth as FieldTruth,
    KnownRows as KnownRows,
    relative_error as relative_error,
    relative_error_by_cell as relative_error_by_cell,
    RelativeError as RelativeError,
)
from ._field_residual import (
    relative_identity_residual as relative_identity_residual,
    relative_semigroup_residual as relative_semigroup_residual,
)
from ._frechet import (
    frechet_distance as frechet_distance,
    frechet_distance_of_moments as frechet_distance_of_moments,
)
from ._inception import (
    convert_inception as convert_inception,
    Features as Features,
    Inception as Inception,
    load_inception as load_inception,
)
from ._inception_score import inception_score as inception_score, MeanAndStd as MeanAndStd
from ._kernel_inception_distance import kernel_inception_distance as kernel_inception_distance
from ._linear_probe import linear_probe as linear_probe, LinearProbe as LinearProbe
from ._precision_recall import precision_recall as precision_recall, PrecisionRecall as PrecisionRecall
from ._protocol import (
    ADM as ADM,
    CIFAR_TRAIN as CIFAR_TRAIN,
    CIFAR_TRAIN_HALF_PIXEL as CIFAR_TRAIN_HALF_PIXEL,
    floor_to_pixels as floor_to_pixels,
    LITE0 as LITE0,
    Protocol as Protocol,
    round_to_pixels as round_to_pixels,
    TORCH_FIDELITY as TORCH_FIDELITY,
    unrounded_pixels as unrounded_pixels,
)
from ._resize import resize_half_pixel as resize_half_pixel, resize_tensorflow1 as resize_tensorflow1
from ._sample_quality import sample_quality as sample_quality, SampleQuality as SampleQuality
