"""Augmentation: how crops are distorted, and that this does not depend on how many workers share the batch."""

from typing import Any

import numpy as np
import pytest

SEED = 42


def augmented(images: Any, step: int = 0, first: int = 0, size: int | None = None) -> np.ndarray:
    """Augment `images` as the rows from `first` on of step `step`, in a global batch of `size` (None: their number)."""
    import tensorflow as tf

    from job.data import augment
    from job.data.chance import BatchRows

    rows = BatchRows(tf.constant(step, tf.int64), first, size or len(images))
    return augment.augmented(tf.constant(images), rows, SEED).numpy()


@pytest.fixture
def crops() -> np.ndarray:
    """Return eight crops with a black border on the left and right, as crops of tall boxes have."""
    images = np.random.default_rng(0).integers(1, 256, (8, 80, 80, 1), dtype=np.uint8)
    images[:, :, :20] = images[:, :, 60:] = 0
    return images


def test_augmentation_depends_on_step_and_row_but_not_on_the_worker(
    crops: np.ndarray,
) -> None:
    whole = augmented(crops, step=3)
    parts = [augmented(crops[first:end], 3, first, 8) for first, end in ((0, 3), (3, 4), (4, 8))]
    assert np.array_equal(np.concatenate(parts), whole)
    same = np.repeat(crops[:1], 8, axis=0)
    copies = [augmented(same, step) for step in range(2)]
    assert len({crop.tobytes() for step in copies for crop in step}) == 16


def test_grey_levels_stay_in_their_range_and_black_stays_black(crops: np.ndarray) -> None:
    for step in range(20):
        after = augmented(crops, step)
        assert after.dtype == np.float32
        assert after.shape == crops.shape
        assert 0 <= after.min() <= after.max() <= 255
        assert np.isfinite(after).all()
    assert not augmented(np.zeros_like(crops)).any()


def only(monkeypatch: pytest.MonkeyPatch, **limits: float) -> None:
    """Set these limits of the augmentation, and all others to 0."""
    from job.data import augment

    names = ("ROTATION", "SHEAR", "LOG_ZOOM", "SHIFT", "ELASTIC", "GAIN", "LOG_GAMMA", "STROKE", "ERASED")
    for name in names:
        monkeypatch.setattr(augment, name, limits.get(name, 0.0))


def test_with_limits_of_0_crops_stay_as_they_are(crops: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch)
    assert augmented(crops) == pytest.approx(crops, abs=1e-3)


def test_a_transform_turns_zooms_and_shifts_about_the_middle() -> None:
    import tensorflow as tf

    from job.data.augment import _transforms

    def of(angle: float = 0, shear: float = 0, zoom_x: float = 1, zoom_y: float = 1, x: float = 0, y: float = 0) -> Any:
        values = (tf.constant([value], tf.float32) for value in (angle, shear, zoom_x, zoom_y, x, y))
        return _transforms(*values).numpy()[0]

    def source(transform: Any, x: float, y: float) -> list[float]:
        return list(transform @ [x, y, 1])

    assert source(of(), 10, 20) == pytest.approx([10, 20])
    assert source(of(x=3, y=-2), 10, 20) == pytest.approx([13, 18])
    assert source(of(zoom_x=2), 39.5 + 10, 39.5 + 10) == pytest.approx([39.5 + 5, 39.5 + 10], abs=1e-4)
    assert source(of(angle=np.pi / 2), 39.5 + 10, 39.5) == pytest.approx([39.5, 39.5 + 10], abs=1e-4)
    assert source(of(shear=0.1), 39.5, 39.5 + 10) == pytest.approx([39.5 + 1, 39.5 + 10], abs=1e-4)
    assert source(of(0.3, 0.1, 1.2, 0.8), 39.5, 39.5) == pytest.approx([39.5, 39.5], abs=1e-4)


def test_a_line_becomes_a_curve_that_stays_near_it(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, ELASTIC=3.5)
    images = np.zeros((8, 80, 80, 1), np.uint8)
    images[:, :, 39:41] = 255
    after = augmented(images)[:, 5:-5, :, 0]
    across = (after * np.arange(80)).sum(axis=2) / after.sum(axis=2)  # middle of the line, in each row
    assert (np.ptp(across, axis=1) > 1).all()
    assert 2 < np.abs(across - 39.5).max() <= 3.5 + 0.1
    assert np.abs(np.diff(across, axis=1)).max() < 1  # the line has no gaps


def test_pixels_shifted_in_are_black(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, SHIFT=5.0)
    after = augmented(np.full((16, 80, 80, 1), 255, np.uint8))[..., 0]
    assert after[:, 6:-6, 6:-6] == pytest.approx(255)
    for crop in after:
        edges = np.stack([crop[40, :6], crop[40, -6:][::-1], crop[:6, 40], crop[-6:, 40][::-1]])
        assert (np.diff(edges, axis=1) >= 0).all()
        assert ((edges > 0) & (edges < 255)).any(axis=1).sum() <= 2  # on each axis, one edge has a grey pixel
        assert edges.min() < 255


def test_strokes_become_thinner_or_bolder(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, STROKE=0.5)
    images = np.full((16, 80, 80, 1), 255, np.uint8)
    images[:, 20:60, 38:42] = 0
    ink = (255 - augmented(images)).sum(axis=(1, 2, 3)) / (255.0 * 40 * 4)
    assert (ink < 0.95).any()
    assert (ink > 1.05).any()
    assert ((ink > 0.5) & (ink < 1.6)).all()


def moved(x: int, y: int) -> np.ndarray:
    """Return where augmentation moves a dot at x, y of a crop, in 512 rows of a step: (512, 2) x and y."""
    images = np.zeros((512, 80, 80, 1), np.uint8)
    images[:, y - 1 : y + 2, x - 1 : x + 2] = 255
    after = augmented(images)[..., 0]
    shares = after / after.sum(axis=(1, 2), keepdims=True)
    return np.stack([shares.sum(axis=1) @ np.arange(80), shares.sum(axis=2) @ np.arange(80)], axis=1)


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("ROTATION", -6, 6),  # degrees
        ("SHEAR", -0.1, 0.1),
        ("LOG_ZOOM", 1 / 1.14, 1.14),
        ("SHIFT", -5, 5),  # pixels
        ("GAIN", 0.8 * 100, 1.2 * 100),  # of grey level 100
        ("LOG_GAMMA", 255 * (100 / 255) ** 1.4, 255 * (100 / 255) ** (1 / 1.4)),
    ],
)
def test_distortions_reach_the_limits_of_the_docs_and_no_further(
    name: str, least: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from job.data import augment

    only(monkeypatch, **{name: getattr(augment, name)})
    middle, right, below = moved(40, 40), moved(60, 40), moved(40, 60)
    levels = augmented(np.full((512, 80, 80, 1), 100, np.uint8))[:, 40, 40, 0]
    measured = {
        "ROTATION": [np.degrees(np.arctan2((right - middle)[:, 1], (right - middle)[:, 0]))],
        "SHEAR": [(below - middle)[:, 0] / 20],
        "LOG_ZOOM": [(right - middle)[:, 0] / 20, (below - middle)[:, 1] / 20],
        "SHIFT": [*(middle - 40).T],
        "GAIN": [levels],
        "LOG_GAMMA": [levels],
    }
    for values in measured[name]:
        room = 0.02 * (most - least)
        assert least - room / 2 <= values.min() <= least + room  # the dots are interpolated
        assert most - room <= values.max() <= most + room / 2


def test_some_crops_have_a_rectangle_of_their_mean(crops: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, ERASED=1.0)
    for before, after in zip(crops.astype(np.float32), augmented(crops), strict=True):
        changed = np.abs(after - before)[..., 0] > 1e-3
        rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        assert 1 <= len(rows) <= 0.36 * 80
        assert 1 <= len(columns) <= 0.36 * 80
        assert after[changed] == pytest.approx(before.mean(), rel=1e-4)
    only(monkeypatch, ERASED=0.25)
    many = np.repeat(crops, 50, axis=0)
    share = (np.abs(augmented(many) - many) > 1e-3).any(axis=(1, 2, 3)).mean()
    assert 0.15 < share < 0.35
