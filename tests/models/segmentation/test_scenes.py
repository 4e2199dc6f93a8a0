import numpy as np
import pytest
import torch
from scipy.ndimage import label

from moe_kernels.models.data import digits, letters
from moe_kernels.models.segmentation import scenes


def pixels(data):
    return np.stack([np.asarray(data.image(index)) for index in range(len(data))])


def masks(data):
    return np.stack([data.mask(index) for index in range(len(data))])


def test_scenes_follow_from_seed_part_classes_and_number():
    data, more = scenes.load("train", 4), scenes.load("train", 6)
    assert np.array_equal(pixels(data), pixels(more)[:4])
    assert np.array_equal(masks(data), masks(more)[:4])
    assert data.names == more.names[:4]
    others = [scenes.load("validation", 4), scenes.load("train", 4, seed=1), scenes.load("train", 4, classes="0123456")]
    for other in others:
        assert not (pixels(other) == pixels(data)).all(axis=(1, 2, 3)).any()
    # names are of one cache together
    assert not {name for other in (data, *others[::2]) for name in other.names[4:]}
    assert len({name for other in (data, others[0], others[2]) for name in other.names}) == 12


def test_tags_and_masks_say_the_same_and_every_object_is_one_piece():
    data = scenes.load("validation", 40, classes="13579")
    assert data.classes == tuple("13579")
    assert data.tags.any(1).all()
    assert data.tags.sum(1).max() > 1
    for tags, mask in zip(data.tags, masks(data), strict=True):
        assert set(np.flatnonzero(tags) + 1) == set(np.unique(mask)) - {0}
        for value in np.flatnonzero(tags) + 1:
            pieces, _ = label(mask == value)
            # but for specks of an interpolated edge
            assert np.bincount(pieces.ravel())[1:].max() > 0.95 * (mask == value).sum()


def test_a_mask_is_exact(monkeypatch):
    """With hard edges and without noise, what differs from the bare ground is what the mask says, pixel for pixel."""
    digit, mix = scenes._digit, scenes.mix
    monkeypatch.setattr(scenes, "_NOISE", 0.0)
    monkeypatch.setattr(scenes, "_digit", lambda *arguments: (digit(*arguments) >= 0.5).astype(np.float32))
    drawn = scenes.load("train", 8)
    # on the ground, which fills the picture, nothing is laid
    monkeypatch.setattr(scenes, "mix", lambda *parts: mix(*parts) if parts[2].shape[1:] == scenes.SIZE else parts[0])
    bare = scenes.load("train", 8)
    assert np.array_equal(masks(drawn), masks(bare))
    changed, inside = (pixels(drawn) != pixels(bare)).any(-1), masks(drawn) > 0
    assert inside.any((1, 2)).all()
    assert not (changed & ~inside).any()
    # now and then a colour is that of the ground
    assert (inside & ~changed).sum() < 0.001 * inside.sum()


def test_no_digit_is_in_both_parts(monkeypatch):
    used = {}
    draw = scenes._digit
    for part in scenes.PARTS:
        seen = used.setdefault(part, set())
        monkeypatch.setattr(
            scenes, "_digit", lambda ink, height, seen=seen: seen.add(ink.tobytes()) or draw(ink, height)
        )
        scenes.load(part, 60)
    assert len(used["train"]) > 60
    assert not used["train"] & used["validation"]
    known = {ink.tobytes() for ink in digits.scanned()[0]}
    assert used["train"] | used["validation"] <= known


def test_always_is_in_every_scene_in_turn():
    data = scenes.load("train", 6, always=("4", "9"))
    assert [bool(tag) for tag in data.tags[range(6), [4, 9, 4, 9, 4, 9]]] == [True] * 6
    assert data.tags[:, :4].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"part": "test"}, "part must be one of train, validation, got 'test'"),
        ({"part": "train", "classes": "1x"}, "classes must be of .*, got x"),
        ({"part": "train", "classes": "12", "always": "3"}, "always must be of the classes 1, 2, got 3"),
    ],
)
def test_what_there_is_not_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        scenes.load(count=1, **arguments)


def test_the_distance_to_a_letter_does_not_depend_on_its_neighbours():
    chance = np.random.default_rng(0).random((4, 7), np.float32)
    labels = np.array([8, 0, 8, 11])  # I, A, I, L
    found = letters.distances(labels, chance)
    assert found.shape == (4, letters.SIZE, letters.SIZE)
    assert np.array_equal(letters.distances(labels[2:], chance[2:]), found[2:])
    assert not np.array_equal(found[0], found[2])
    # on the stem of the I, beside it, and on the bar of the L
    assert found[0, 16, 14:19].min() < 1 < 4 < found[0, 16, 4]
    assert found[3, 22:28, 16].min() < 1


def test_pictures_of_letters():
    images, labels = scenes.pictures_of_letters(30, 40)
    assert images.shape == (30, 3, 40, 40)
    assert images.dtype == torch.float32
    assert -1 <= float(images.min()) < float(images.max()) <= 1
    assert labels.tolist() == [*range(26), 0, 1, 2, 3]
    fewer, _ = scenes.pictures_of_letters(5, 40)
    assert torch.equal(fewer, images[:5])
    other, _ = scenes.pictures_of_letters(5, 40, seed=1)
    assert not torch.equal(fewer, other)
