"""Generated sources and targets: the same in every process, honest, and of the classes that they say."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from moe_kernels.models.data import digits
from moe_kernels.models.transfer import sources

PROGRAM = """
import hashlib
from moe_kernels.models.transfer import sources
sha = hashlib.sha256()
tasks = [sources.source(name, 64, seed=2) for name in sources.SOURCES]
tasks += [sources.target(name, 2, 2, seed=2) for name in sources.TARGETS]
for task in tasks:
    for part in (task.plain, task.test):
        sha.update(part.images.numpy().tobytes() + part.labels.numpy().tobytes())
found = sha.hexdigest()
"""


@pytest.fixture(scope="module")
def tasks():
    return {name: sources.source(name, 320, seed=1) for name in sources.SOURCES} | {
        name: sources.target(name, 5, 8, seed=1) for name in sources.TARGETS
    }


@pytest.mark.parametrize("name", [*sources.SOURCES, *sources.TARGETS])
def test_shapes_and_even_classes(tasks, name):
    task = tasks[name]
    assert task.name == name
    for part in (task.train, task.plain, task.test):
        image, _ = part[0]
        assert image.shape == (3, sources.SIZE, sources.SIZE)
        assert image.dtype == torch.float32
        assert part.images.shape[1:] == (3, sources.CANVAS, sources.CANVAS)
        assert -1 <= part.images.min() < -0.5
        assert 0.5 < part.images.max() <= 1
        counts = torch.bincount(part.labels, minlength=len(task.classes))
        assert len(counts) == len(task.classes)
        assert counts.max() - counts.min() <= (1 if name in sources.SOURCES else 0)
    if name in sources.TARGETS:
        assert (len(task.train), len(task.test)) == (50, 80)
    else:
        assert (len(task.train), len(task.test)) == (320 - 32, 32)


def test_another_process_draws_the_same():
    here: dict[str, str] = {}
    exec(PROGRAM, here)
    subprocess.run(
        [sys.executable, "-c", f"{PROGRAM}\nassert found == {here['found']!r}, found"],
        env=os.environ | {"PYTHONHASHSEED": "1"},
        check=True,
    )


def test_no_image_is_in_two_parts(tasks):
    images = [image for task in tasks.values() for part in (task.plain, task.test) for image in part.images]
    assert len({image.numpy().tobytes() for image in images}) == len(images)


def test_every_digit_is_in_one_part_of_one_target_and_in_no_source(monkeypatch):
    seen, scanned = [], digits.scanned

    def noted(style, ink, seed, indices):
        assert np.array_equal(ink, scanned()[0][indices])
        seen.append((style, indices))
        return np.zeros((len(indices), 3, sources.CANVAS, sources.CANVAS), np.float32)

    monkeypatch.setattr(digits, "render", noted)
    targets = [sources.target(name, 10, 40, seed=3) for name in ("inverted", "sketch")]
    assert [(style, len(indices)) for style, indices in seen] == [
        (style, size) for style in ("inverted", "sketch") for size in (100, 400)
    ]
    everything = np.concatenate([indices for _, indices in seen])
    assert len(np.unique(everything)) == len(everything) == 1000
    for target, (train, test) in zip(targets, (seen[:2], seen[2:]), strict=True):
        for part, (_, indices) in ((target.plain, train), (target.test, test)):
            assert np.array_equal(part.labels, scanned()[1][indices])

    monkeypatch.setattr(digits, "scanned", lambda: pytest.fail("a source with digits"))
    for name in sources.SOURCES:
        sources.source(name, 64)


def test_what_is_drawn_depends_on_seed_and_index_only():
    for draw in (sources.textures, sources.weaves):
        images, labels = draw(np.arange(30), 5)
        some = np.array([17, 4, 29])
        again, again_labels = draw(some, 5)
        assert torch.equal(again, images[torch.from_numpy(some)])
        assert torch.equal(again_labels, labels[torch.from_numpy(some)])
        assert (draw(np.arange(30), 6)[0] - images).abs().amax(dim=(1, 2, 3)).min() > 0.05


def directions(images: torch.Tensor, count: int) -> np.ndarray:
    """The strongest plane waves of each image, in half turns, (N, count), in ascending order."""
    grey = images.mean(dim=1)
    # finer than the canvas's own frequencies
    power = torch.fft.fft2(grey - grey.mean(dim=(1, 2), keepdim=True), s=(256, 256)).abs()
    frequencies = torch.fft.fftfreq(256)
    y, x = torch.meshgrid(frequencies, frequencies, indexing="ij")
    found = []
    for spectrum in power:
        peaks = []
        for _ in range(count):
            row, column = divmod(int(spectrum.argmax()), 256)
            peaks.append(float(torch.atan2(y[row, column], x[row, column]) / torch.pi) % 1)
            for sign in (1, -1):
                near = torch.hypot(x - sign * x[row, column], y - sign * y[row, column]) < 0.04
                spectrum = spectrum.masked_fill(near, 0)
        found.append(sorted(peaks))
    return np.array(found)


def apart(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The distance of directions on the circle of half turns."""
    return np.abs((one - other + 0.5) % 1 - 0.5)


def test_striped_textures_run_in_the_direction_of_their_class():
    images, labels = sources.textures(np.arange(320), 1)
    striped = labels < 16
    found = directions(images[striped], 1)[:, 0]
    expected = labels[striped].numpy() % 8 / 8
    assert sources.source("textures", 64).classes[13] == "striped coarse at 112.5°"
    # a colour may be as grey as the other: then there is only noise to be seen
    assert np.quantile(apart(found, expected), 0.9) < 0.25 / 8 + 0.02


def test_weaves_cross_in_the_two_directions_of_their_class():
    task = sources.target("weaves", 1, 20)
    found = directions(task.test.images, 2)
    pairs = np.array(
        [[float(side[:-1]) / 180 for side in task.classes[label].split(" × ")] for label in task.test.labels]
    )
    straight, swapped = (apart(found, sides).max(axis=1) for sides in (pairs, pairs[:, ::-1]))
    assert np.median(np.minimum(straight, swapped)) < 0.25 / 5 + 0.02


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="name must be one of letters, textures, got 'faces'"):
        sources.source("faces")
    with pytest.raises(ValueError, match="name must be one of inverted, sketch, weaves, got 'letters'"):
        sources.target("letters")
    with pytest.raises(ValueError, match="count must be at least 64, two for each class of textures, got 63"):
        sources.source("textures", 63)
    with pytest.raises(ValueError, match="per_class and tested must be at least 1, got 0 and 3"):
        sources.target("sketch", 0, 3)
    with pytest.raises(ValueError, match=r"per_class and tested must be at most 8\d together, got 10 and 90"):
        sources.target("inverted", 10, 90)


def test_another_size_shows_the_same():
    own, large = sources.target("sketch", 1, 1), sources.target("sketch", 1, 1, size=64)
    image, twice = own.plain[3][0], large.plain[3][0]
    assert twice.shape == (3, 64, 64)
    assert torch.equal(own.plain.labels, large.plain.labels)
    shrunk = torch.nn.functional.interpolate(twice[None], scale_factor=0.5, mode="area")[0]
    assert torch.corrcoef(torch.stack((image.flatten(), shrunk.flatten())))[0, 1] > 0.98


@pytest.mark.parametrize("name", sources.TARGETS)
def test_images_are_normalized_as_is_asked(name):
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    own, other = sources.target(name, 1, 1), sources.target(name, 1, 1, mean=mean, std=std)
    assert (other.mean, other.std, own.mean, own.std) == (mean, std, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert own.identity != other.identity
    assert (own.identity["seed"], sources.target(name, 1, 1, seed=3).identity["seed"]) == (0, 3)
    for ours, theirs in ((own.plain.images, other.plain.images), (own.test.images, other.test.images)):
        pixels = theirs * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
        torch.testing.assert_close(pixels, ours / 2 + 0.5)
