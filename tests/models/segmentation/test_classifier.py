import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from moe_kernels.models.segmentation import classifier, rows
from moe_kernels.models.segmentation.backbones import Features
from moe_kernels.models.segmentation.classifier import PixelClassifier
from moe_kernels.models.segmentation.configuration import SegmentConfig
from moe_kernels.models.segmentation.points import Points
from moe_kernels.ops import hypercolumn

CONFIG = SegmentConfig(hidden=8, batch=10, epochs=3, learning_rate=1e-2)
RUN = {"classes": ["cat"]}


@pytest.fixture(autouse=True)
def one_thread():
    """Also in the processes that are forked: OpenMP's threads do not live on in them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_points(folder, count=37, images=5, channels=6, globals_=3, seed=0):
    """Points of label 1 have a large first channel."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 2, count)
    columns = draw.random((count, channels)).astype(np.float16)
    columns[:, 0] += 3 * labels
    about = np.stack([labels, np.sort(draw.integers(0, images, count)), np.arange(count)], 1).astype(np.int32)
    image = draw.random((images, globals_)).astype(np.float16)
    layout = {"columns": ("float16", channels), "image": ("float16", globals_), "about": ("int32", 3)}
    with rows.Writer(folder, layout, {}) as writer:
        writer.append(columns=columns, image=image, about=about)
        writer.finish(images)
    return np.concatenate([columns, image[about[:, 1]]], 1), labels


@pytest.fixture
def points(tmp_path):
    write_points(tmp_path / "points")
    return Points([tmp_path / "points"])


def train(points, folder, config=CONFIG, **options):
    options = {"description": RUN, "checkpoint_share": 1e9} | options
    return classifier.train(points, 2, folder / "classifier.safetensors", config, **options)


def test_points_of_several_parts_are_one_sequence(tmp_path):
    one = write_points(tmp_path / "0")
    two = write_points(tmp_path / "1", count=11, images=2, seed=1)
    features, labels = (np.concatenate(pair) for pair in zip(one, two, strict=True))
    points = Points([tmp_path / "0", tmp_path / "1"])
    assert (len(points), points.channels, points.image_channels) == (48, 6, 3)
    chosen = np.random.default_rng(3).permutation(48)
    found = points.gather(chosen)
    np.testing.assert_array_equal(found[0].numpy(), features[chosen])
    np.testing.assert_array_equal(found[1].numpy(), labels[chosen])


def test_points_without_global_features(tmp_path):
    features, _ = write_points(tmp_path, globals_=0)
    found, _ = Points([tmp_path]).gather(np.arange(37))
    np.testing.assert_array_equal(found.numpy(), features)


@pytest.mark.parametrize("globals_", [0, 3])
def test_points_in_the_memory_of_a_device_are_the_same(tmp_path, monkeypatch, globals_):
    write_points(tmp_path / "0", count=9000, globals_=globals_)  # more than are copied at a time
    write_points(tmp_path / "1", count=11, images=2, globals_=globals_, seed=1)
    points = Points([tmp_path / "0", tmp_path / "1"])
    assert points.nbytes == 2 * (9011 * 6 + 7 * globals_)
    expected = points.gather(chosen := np.random.default_rng(3).permutation(9011))
    monkeypatch.setattr(classifier, "Replayed", lambda function, device: function)
    found = []
    for free in (2 * points.nbytes, 2 * points.nbytes - 2):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 0))
        load, go = classifier.replayed(points, lambda *batch: found.append(batch), torch.device("cpu"))
        assert len(load(chosen)) == (1 if free == 2 * points.nbytes else 2)
        go(*load(chosen))
    for features, labels in found:
        assert torch.equal(features, expected[0])
        assert torch.equal(labels, expected[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_training_on_a_gpu(points, tmp_path, monkeypatch):
    expected = train(points, tmp_path / "cpu").state_dict()
    kept = train(points, tmp_path / "kept", device="cuda").state_dict()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    sent = train(points, tmp_path / "sent", device="cuda").state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(kept[name].cpu(), tensor, rtol=1e-4, atol=1e-5)
        assert torch.equal(kept[name], sent[name])


def test_every_epoch_sees_every_point_once_in_an_order_of_its_own():
    assert classifier.steps(37, CONFIG) == 12
    drawn = list(classifier.batches(37, CONFIG, 0))
    assert [len(batch) for batch in drawn] == [10] * 12
    every = np.concatenate(drawn)
    epochs = [every[first : first + 37] for first in (0, 37, 74)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(37))
    assert (epochs[0] != epochs[1]).any()
    assert (epochs[1] != epochs[2]).any()
    for start in (0, 3, 4, 11, 12):
        later = list(classifier.batches(37, CONFIG, start))
        np.testing.assert_array_equal(np.array(later), np.array(drawn[start:]))
    # more than an epoch in a batch
    (batch,) = classifier.batches(4, replace(CONFIG, epochs=2), 0)
    np.testing.assert_array_equal(np.sort(batch[:8]), np.repeat(np.arange(4), 2))


def test_the_step_is_adam_on_the_cross_entropy(points):
    features, labels = points.gather(np.arange(10))
    net = PixelClassifier(9, 8, 2)
    plain = torch.nn.Sequential(torch.nn.Linear(9, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    with torch.no_grad():
        for mine, theirs in zip(net.parameters(), plain.parameters(), strict=True):
            theirs.copy_(mine)
    adams = [torch.optim.Adam(model.parameters(), 1e-2) for model in (net, plain)]
    for _ in range(3):
        found = classifier.step(net, adams[0], features.float(), labels)
        adams[1].zero_grad()
        loss = torch.nn.functional.cross_entropy(plain(features.float()), labels)
        loss.backward()
        adams[1].step()
        torch.testing.assert_close(found, loss.detach())
    for mine, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_it_learns(points, tmp_path):
    net = train(points, tmp_path, replace(CONFIG, epochs=40))
    features, labels = points.gather(np.arange(37))
    assert (net(features.float()).argmax(1) == labels).all()


@pytest.mark.parametrize("image", [True, False])
def test_an_image_is_the_points_of_its_hypercolumns(image):
    pyramid = hypercolumn.pyramid([torch.rand(1, 4, 6, 8), torch.rand(1, 2, 3, 4)], (6, 8))
    features = Features(pyramid, torch.rand(1, 3) if image else None)
    net = PixelClassifier(9 if image else 6, 8, 4)
    columns = hypercolumn.dense(pyramid)[0].flatten(1).T
    if image:
        columns = torch.cat([columns, features.image.expand(48, -1)], 1)
    expected = net(columns).softmax(1).T.unflatten(1, (6, 8)).detach()
    torch.testing.assert_close(net.probabilities(features, (6, 8)), expected)
    assert (net.labels(features, (6, 8)) == expected.argmax(0)).all()
    assert (net.labels(features, (13, 30)) == net.probabilities(features, (13, 30)).argmax(0)).all()
    large = net.probabilities(features, (13, 30))
    assert large.shape == (4, 13, 30)
    torch.testing.assert_close(large.sum(0), torch.ones(13, 30))
    torch.testing.assert_close(
        large, torch.nn.functional.interpolate(expected[None], (13, 30), mode="bilinear")[0], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("step", [1, 5, 11])
def test_a_killed_training_ends_with_the_same_bits(points, tmp_path, step):
    train(points, tmp_path / "whole")

    def die(done, total):
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        train(points, tmp_path / "parts", on_step=die)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    steps = []
    train(points, tmp_path / "parts", on_step=lambda done, total: steps.append((done, total)))
    assert steps[0] == (step, 12)
    contents = [(tmp_path / run / "classifier.safetensors").read_bytes() for run in ("whole", "parts")]
    assert contents[0] == contents[1]
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["classifier.safetensors"]


def test_a_finished_one_is_read_back_and_another_trained_anew(points, tmp_path):
    before = train(points, tmp_path).state_dict()
    steps = []
    after = train(points, tmp_path, on_step=lambda *step: steps.append(step)).state_dict()
    assert steps == []
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    loaded, run = classifier.load(tmp_path / "classifier.safetensors")
    torch.testing.assert_close(loaded.state_dict(), before, rtol=0, atol=0)
    assert (run["classes"], run["labels"], run["points"], run["hidden"]) == (["cat"], 2, 37, 8)
    train(points, tmp_path, description={"classes": ["dog"]})
    assert classifier.load(tmp_path / "classifier.safetensors")[1]["classes"] == ["dog"]


def test_what_cannot_be_trained(points, tmp_path):
    with pytest.raises(RuntimeError, match="loss of the pixel classifier is not finite"):
        train(points, tmp_path, replace(CONFIG, learning_rate=1e38))
    assert not (tmp_path / "classifier.safetensors").exists()
    write_points(tmp_path / "none", count=0)
    with pytest.raises(ValueError, match="there must be points to train on"):
        train(Points([tmp_path / "none"]), tmp_path)
    with pytest.raises(FileNotFoundError, match="not trained to the end"):
        classifier.load(tmp_path / "classifier.safetensors")
