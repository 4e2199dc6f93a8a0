"""Drawn letters to pretrain on."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from moe_kernels.models.data import letters


@pytest.fixture(scope="module")
def drawn():
    return letters.load(26 * 12, seed=3)


def test_shapes_types_and_even_classes(drawn):
    images, labels = drawn
    assert images.shape == (312, 3, 32, 32)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert torch.bincount(labels).tolist() == [12] * 26
    assert -1 <= images.min() < -0.8
    assert 0.8 < images.max() <= 1
    assert tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ") == letters.CLASSES


def test_a_smaller_count_is_a_prefix(drawn):
    images, labels = letters.load(40, seed=3)
    torch.testing.assert_close(images, drawn[0][:40], rtol=0, atol=1e-6)
    assert torch.equal(labels, drawn[1][:40])


def test_seeds_and_images_differ(drawn):
    other = letters.load(312, seed=4)[0]
    assert (other - drawn[0]).abs().amax(dim=(1, 2, 3)).min() > 0.05
    assert len({image.numpy().tobytes() for image in drawn[0]}) == 312


def test_no_letters_and_less():
    images, labels = letters.load(0)
    assert images.shape == (0, 3, 32, 32)
    assert labels.shape == (0,)
    with pytest.raises(ValueError, match="count must not be negative, got -1"):
        letters.load(-1)


def test_every_letter_has_strokes_inside_its_box():
    for letter in letters.CLASSES:
        points = np.concatenate(letters._polylines(letter))
        assert np.abs(points).max() <= 1.06, letter
        assert np.ptp(points[:, 1]) >= 1.9, letter
        dots = letters._dots(letter)
        assert len(dots) > len(letters._polylines(letter))


def test_distance_is_the_distance_to_the_strokes():
    chance = np.random.default_rng(0).random((5, 7), dtype=np.float32)
    # Shear and rotation aside (both 0 at chance 1/2), the bend is a scale and a shift.
    chance[:, [0, 3]] = 0.5
    got = letters._distance("K", chance, dotted=False)
    for image, row in zip(got, chance, strict=True):
        scale = np.array([8 + 2 * row[1], 10.5 + 2 * row[2]])
        strokes = [line * scale + 2 * row[4:6] - 1 for line in letters._polylines("K")]
        along = np.linspace(0, 1, 400)[:, None]
        points = np.concatenate([a + along * (b - a) for line in strokes for a, b in pairwise(line)])
        pixel = np.random.default_rng(1).integers(0, 32, (20, 2))
        for x, y in pixel:
            expected = np.hypot(*(points - (np.array([x, y]) + 0.5 - 16)).T).min()
            assert image[y, x] == pytest.approx(expected, abs=0.05)


def test_no_two_letters_look_the_same():
    middle = np.full((1, 7), 0.5, np.float32)
    ink = np.stack([letters._distance(letter, middle, dotted=False)[0] < 1.5 for letter in letters.CLASSES])
    both = (ink[:, None] & ink).sum(axis=(2, 3))
    either = (ink[:, None] | ink).sum(axis=(2, 3))
    alike = both / either - np.eye(26)
    # O and Q are the closest.
    assert alike.max() < 0.9, letters.CLASSES[alike.max(axis=0).argmax()]


@pytest.mark.parametrize("style", range(len(letters.STYLES)))
def test_the_strokes_stand_out_in_every_style(style):
    chance = np.random.default_rng(style).random((40, 16), dtype=np.float32)
    distance = np.repeat(letters._distance("H", np.full((1, 7), 0.5, np.float32), dotted=False), 40, axis=0)
    images = letters.STYLES[style](distance, chance)
    assert images.shape == (40, 3, 32, 32)
    assert images.min() >= 0
    assert images.max() <= 1
    inside, outside = distance[0] < 0.7, distance[0] > 5
    contrast = np.abs(images[:, :, inside].mean(axis=2) - images[:, :, outside].mean(axis=2)).max(axis=1)
    assert contrast.min() > 0.2
    polarity = np.sign((images[:, :, inside].mean(axis=2) - images[:, :, outside].mean(axis=2)).mean(axis=1))
    assert {-1.0, 1.0} == set(polarity)
