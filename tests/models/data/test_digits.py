"""Four domains of handwritten digits."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from moe_kernels.models.data import digits


@pytest.fixture(scope="module")
def data():
    return digits.load(0)


def stacked(dataset):
    return torch.stack([dataset[i][0] for i in range(len(dataset))])


def test_the_interface(data):
    assert data.domains == ("plain", "inverted", "sketch", "blurred")
    assert data.classes == tuple("0123456789")
    assert sum(map(len, data.train)) == sum(map(len, data.evaluation)) == 1797
    for train, evaluation in zip(data.train, data.evaluation, strict=True):
        assert torch.equal(train.labels, evaluation.labels)
        image, label = evaluation[0]
        assert image.shape == (3, 32, 32)
        assert image.dtype == torch.float32
        assert isinstance(label, int)
        images = stacked(evaluation)
        assert -1 <= images.min() < images.max() <= 1


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_every_digit_belongs_to_exactly_one_domain(seed):
    labels = load_digits().target
    parts = digits.partition(labels, 4, seed)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(1797))
    counts = np.stack([np.bincount(labels[part], minlength=10) for part in parts])
    assert np.ptp(counts, axis=0).max() <= 1
    assert np.ptp(counts.sum(axis=1)) <= 1
    assert all((np.diff(part) > 0).all() for part in parts)


def test_the_domains_are_the_partition(data):
    labels = load_digits().target
    for dataset, part in zip(data.evaluation, digits.partition(labels, 4, 0), strict=True):
        assert np.array_equal(dataset.labels.numpy(), labels[part])


def test_another_seed_deals_and_draws_otherwise(data):
    other = digits.load(1)
    assert any(not torch.equal(a.labels, b.labels) for a, b in zip(data.evaluation, other.evaluation, strict=True))
    ink = load_digits().images[:3] / 16
    for domain in digits.DOMAINS:
        one, two = (digits.render(domain, ink, seed, np.arange(3)) for seed in (0, 1))
        assert np.abs(one - two).max(axis=(1, 2, 3)).min() > 0.01


def test_an_image_does_not_depend_on_its_neighbours():
    ink = load_digits().images[:6] / 16
    for domain in digits.DOMAINS:
        together = digits.render(domain, ink, 0, np.arange(6))
        alone = digits.render(domain, ink[4:5], 0, np.array([4]))
        np.testing.assert_allclose(alone[0], together[4], atol=1e-6)


def test_an_unknown_domain_lists_the_valid_ones():
    with pytest.raises(ValueError, match="'cartoon'; its domains are plain, inverted, sketch, blurred"):
        digits.render("cartoon", np.zeros((1, 8, 8)), 0, np.arange(1))


def test_enlarging_reproduces_a_constant_and_a_ramp():
    # Cubic convolution is exact for straight lines away from the border.
    x, y = np.meshgrid(np.linspace(-2, 2, 9, dtype=np.float32), np.linspace(-2, 2, 9, dtype=np.float32))
    ramp = np.arange(8, dtype=np.float32)[None, None, :] + 10 * np.arange(8, dtype=np.float32)[None, :, None]
    values = digits._interpolate(ramp, x[None], y[None])
    np.testing.assert_allclose(values[0], (x + 3.5) + 10 * (y + 3.5), atol=1e-4)


def test_augmentation_shifts_and_follows_torchs_generator(data):
    train, evaluation = data.train[0], data.evaluation[0]
    torch.manual_seed(0)
    first = [train[5][0] for _ in range(60)]
    torch.manual_seed(0)
    assert all(torch.equal(image, train[5][0]) for image in first)
    assert all(torch.equal(evaluation[5][0], evaluation[5][0]) for _ in range(3))

    def mass_centre(image):
        weight = image.mean(0) + 1
        places = torch.arange(32.0)
        return torch.stack([(weight.sum(1) * places).sum(), (weight.sum(0) * places).sum()]) / weight.sum()

    moves = torch.stack([mass_centre(image) - mass_centre(evaluation[5][0]) for image in first])
    assert moves.amax() > 1
    assert moves.amin() < -1
    assert moves.abs().amax() < 2.6


def test_changing_an_item_does_not_change_the_data(data):
    before = data.evaluation[1][3][0]
    data.evaluation[1][3][0].zero_()
    assert torch.equal(data.evaluation[1][3][0], before)


def test_the_domain_shift_is_real(data):
    """Nearest class mean in pixels: good where it was fitted, lost elsewhere, so style matters."""
    images = [stacked(dataset).flatten(1) for dataset in data.evaluation]
    labels = [dataset.labels for dataset in data.evaluation]
    for source in range(4):
        fitted = torch.arange(len(labels[source])) % 5 > 0
        means = torch.stack([images[source][fitted & (labels[source] == label)].mean(0) for label in range(10)])

        def accuracy(x, y, means=means):
            return (torch.cdist(x, means).argmin(1) == y).float().mean().item()

        within = accuracy(images[source][~fitted], labels[source][~fitted])
        elsewhere = [accuracy(images[i], labels[i]) for i in range(4) if i != source]
        assert within > 0.6
        assert np.mean(elsewhere) < within - 0.25
