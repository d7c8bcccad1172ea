import dataclasses

import numpy as np
import pytest

from mf_eqx.metrics import (
    AccumulatedMoments,
    frechet_distance,
    inception_score,
    kernel_inception_distance,
    precision_recall,
    sample_quality,
    SampleFeatures,
)


def samples(rows=40, seed=0, protocol="ADM", weights="12ab34cd56"):
    generator = np.random.default_rng(seed)
    pooled = generator.standard_normal((rows, 6)).astype(np.float32)
    moments = AccumulatedMoments.of(pooled).moments(protocol, weights)
    return SampleFeatures(pooled, generator.standard_normal((rows, 5)).astype(np.float32), moments)


def test_numbers_are_those_of_their_functions():
    ours, reference = samples(), samples(50, seed=1)
    quality = sample_quality(ours, reference.moments, reference.pooled, splits=4, subsets=3, size=20, neighbours=2)
    np.testing.assert_allclose(quality.fid, frechet_distance(ours.pooled, reference.pooled), rtol=1e-11)
    assert quality.inception_score == inception_score(ours.logits, splits=4)
    assert quality.kid == kernel_inception_distance(ours.pooled, reference.pooled, subsets=3, size=20)
    assert quality.precision_recall == precision_recall(ours.pooled, reference.pooled, neighbours=2)


def test_moments_alone_give_what_needs_no_features():
    quality = sample_quality(samples(), samples(50, seed=1).moments)
    assert quality.kid is None and quality.precision_recall is None and quality.fid > 0


def test_every_printed_number_comes_with_count_protocol_and_weights():
    reference = samples(50, seed=1)
    quality = sample_quality(samples(), reference.moments, reference.pooled, size=20, subsets=2)
    assert str(quality).startswith(f"FID {quality.fid:.4g}, IS ")
    assert "KID" in str(quality) and "precision" in str(quality)
    assert str(quality).endswith("(40 images, ADM, weights 12ab34cd)")


def test_printed_quality_leaves_out_what_is_unknown():
    assert "KID" not in str(sample_quality(samples(weights=None), samples(50, seed=1).moments))
    assert str(sample_quality(samples(weights=None), samples(50, seed=1).moments)).endswith("weights unknown)")


@pytest.mark.parametrize("what", ["protocol", "weights"])
def test_reference_of_another_making_is_refused(what):
    reference = dataclasses.replace(samples(50, seed=1).moments, **{what: "other"})
    with pytest.raises(ValueError, match=f"{what} of the reference must be .* got 'other'"):
        sample_quality(samples(), reference)


@pytest.mark.parametrize("what", ["protocol", "weights"])
def test_reference_that_does_not_tell_is_taken(what):
    reference = dataclasses.replace(samples(50, seed=1).moments, **{what: None})
    assert sample_quality(samples(), reference).fid > 0
