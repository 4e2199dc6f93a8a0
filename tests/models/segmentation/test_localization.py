import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy

from moe_kernels.models import files
from moe_kernels.models.segmentation import localization
from moe_kernels.models.segmentation.configuration import SegmentConfig
from moe_kernels.models.segmentation.localization import Localizer, Task, Training
from moe_kernels.ops import hypercolumn

CONFIG = SegmentConfig(localization_hidden=16, localization_rates=(1e-2, 1e-2, 1e-3))
CHANNELS = 10
NAMES = tuple(f"image {number}" for number in range(12))
CLASSES = ("cat", "dog", "owl/night")
TAGS = np.array([[n % 2 == 0, n % 3 == 0, n < 4] for n in range(12)])


@pytest.fixture(autouse=True)
def one_thread():
    """Also in the processes that are forked: OpenMP's threads do not live on in them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def features(name: str) -> hypercolumn.Pyramid:
    """Noise; a class adds a pattern in one quarter of the maps."""
    number = NAMES.index(name)
    draw = torch.Generator().manual_seed(number)
    maps = [torch.randn(1, c, h, w, generator=draw).abs() for c, h, w in ((4, 6, 8), (6, 3, 4))]
    for label in np.flatnonzero(TAGS[number]):
        maps[1][0, 2 * label : 2 * label + 2, label % 2, label // 2] += 6
    return hypercolumn.pyramid(maps, (6, 8))


def train(folder, todo=None, config=CONFIG, **options):
    todo = localization.tasks(NAMES, CLASSES, TAGS) if todo is None else todo
    return localization.train(todo, features, CHANNELS, folder, config, checkpoint_share=1e9, **options)


def states(nets):
    return {name: net.state_dict() for name, net in nets.items()}


def assert_same(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("loss", ["global", "pixel"])
@pytest.mark.parametrize("present", [True, False])
def test_the_gradient_at_the_maxima_is_that_of_the_whole_map(loss, present):
    config = replace(CONFIG, loss=loss, localization_rates=(0.0,))
    training = Training([Task("cat", NAMES[:6], NAMES[6:])], CHANNELS, config, torch.device("cpu"))
    net = training.nets[0]
    exact = Localizer(CHANNELS, 16).double()
    exact.load_state_dict(net.state_dict())
    together = set()
    for _ in range(5):
        z = hypercolumn.pyramid([torch.randn(1, 4, 6, 8), torch.randn(1, 6, 3, 4)], (6, 8))
        found = training.step(0, z, [0], [present])
        s, b = exact(hypercolumn.dense(z)[0].double().flatten(1).T).T
        together.add(len({int(scores.argmax()) for scores in (s, b, s - b)}))
        maxima = torch.softmax(torch.stack([s.max(), b.max()]), 0)[0]
        probability = torch.sigmoid(s - b).max() if loss == "pixel" else maxima
        whole = binary_cross_entropy(probability, torch.tensor(float(present), dtype=torch.float64))
        exact.zero_grad()
        whole.backward()
        torch.testing.assert_close(found[0].double(), whole.detach(), rtol=1e-5, atol=1e-6)
        for name, parameter in exact.named_parameters():
            torch.testing.assert_close(net.get_parameter(name).grad.double(), parameter.grad, rtol=1e-4, atol=1e-6)
        assert net.w1.grad.any()
    assert 3 in together  # where both losses are not of the same locations


def test_the_loss_is_finite_for_any_scores():
    scores = torch.tensor([[[1e4, 0.0], [0.0, -1e4]], [[-1e4, 0.0], [0.0, 1e4]]])
    losses = localization.image_loss(scores.repeat(2, 1, 1), torch.tensor([True, True, False, False]))
    torch.testing.assert_close(losses, torch.tensor([0.0, 2e4, 2e4, 0.0]))


@pytest.mark.parametrize("loss", ["global", "pixel"])
def test_classes_are_found_where_they_are(tmp_path, loss):
    nets = train(tmp_path, config=replace(CONFIG, loss=loss, localization_rates=(1e-2,) * 20 + (1e-3,)))
    for label, name in enumerate(CLASSES):
        for image in np.flatnonzero(TAGS[:, label]):
            scores = localization.evidence(nets[name].maps(features(NAMES[image])), loss)[0]
            row, column = divmod(int(scores.argmax()), 8)
            assert abs(row - 2 * (label % 2)) <= 2, (name, image)
            assert abs(column - 2 * (label // 2)) <= 2, (name, image)


def test_a_class_is_the_same_alone_later_or_beside_others(tmp_path):
    todo = localization.tasks(NAMES, CLASSES, TAGS)
    together = train(tmp_path / "together")
    for task in todo:
        alone = train(tmp_path / "apart", [task])
        assert_same(states(alone), {task.name: together[task.name].state_dict()})
    # and it follows from its name and the seed
    renamed = train(tmp_path / "renamed", [replace(todo[0], name="lion")])["lion"]
    assert (renamed.w1 != together["cat"].w1).any()
    reseeded = train(tmp_path / "reseeded", todo[:1], replace(CONFIG, seed=1))["cat"]
    assert (reseeded.w1 != together["cat"].w1).any()


def test_every_positive_and_as_many_negatives_in_an_epoch():
    few = Task("few", NAMES[:3], NAMES[3:]).images(0)
    assert sum(few.values()) == 3
    assert len(few) == 6
    assert {name for (name, _), present in few.items() if present} == set(NAMES[:3])
    many = Task("many", NAMES[:9], NAMES[9:]).images(0)
    assert len(many) == 18
    assert {name for (name, _), present in many.items() if not present} == set(NAMES[9:])
    assert Task("few", NAMES[:3], NAMES[3:]).images(1) != few
    assert Task("less", NAMES[:3], NAMES[3:]).images(0) != few

    training = Training(localization.tasks(NAMES, CLASSES, TAGS), CHANNELS, CONFIG, torch.device("cpu"))
    order = training.order()
    for place, task in enumerate(training.todo):
        for epoch in range(3):
            mine = [(image, places, present) for e, image, places, present in order if e == epoch]
            uses = [(image, present[places.index(place)]) for image, places, present in mine if place in places]
            assert len(uses) == 2 * len(task.positives)
            assert sorted(image for image, present in uses if present) == sorted(task.positives)
    epochs = [[image for e, image, _, _ in order if e == epoch] for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]


def test_rates_of_the_epochs_reach_adam(tmp_path):
    still = train(tmp_path, config=replace(CONFIG, localization_rates=(0.0, 0.0)))["cat"]
    new = Training(localization.tasks(NAMES, CLASSES, TAGS), CHANNELS, CONFIG, torch.device("cpu")).nets[0]
    assert_same(still.state_dict(), new.state_dict())


@pytest.mark.parametrize("step", [1, 7, 20])
def test_a_killed_training_ends_with_the_same_bits(tmp_path, step):
    whole = train(tmp_path / "whole")

    def die(done, total):
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        train(tmp_path / "parts", on_step=die)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    steps = []
    resumed = train(tmp_path / "parts", on_step=lambda done, total: steps.append(done))
    assert steps[0] == step
    assert_same(states(resumed), states(whole))
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {
        "cat.safetensors",
        "dog.safetensors",
        "owl%2Fnight.safetensors",
    }
    for path in (tmp_path / "parts").iterdir():
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()


def test_finished_networks_are_read_back_and_others_refused(tmp_path):
    before = train(tmp_path)
    steps = []
    assert_same(states(train(tmp_path, on_step=lambda *step: steps.append(step))), states(before))
    assert steps == []
    assert_same(localization.load(tmp_path, "owl/night").state_dict(), before["owl/night"].state_dict())
    for change, message in (
        ({"config": replace(CONFIG, loss="pixel")}, "loss: 'global' there, 'pixel' here"),
        ({"description": {"backbone": "other"}}, "backbone: nothing there, 'other' here"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tmp_path, **change)
    with pytest.raises(FileNotFoundError, match="class horse has no localization network"):
        localization.load(tmp_path, "horse")
    files.write_bytes(tmp_path / "cat.safetensors", b"no tensors")
    with pytest.raises(ValueError, match=r"cat\.safetensors cannot be read"):
        localization.load(tmp_path, "cat")


def test_networks_of_other_pictures_are_refused_or_trained_anew(tmp_path):
    old, new = (
        [replace(task, digests={name: f"{name} {version}" for name in NAMES[:1]})]
        for version in ("old", "new")
        for task in localization.tasks(NAMES, CLASSES, TAGS)[:1]
    )
    train(tmp_path, old)
    with pytest.raises(ValueError, match=r"was trained otherwise:\n  positives: others there than here\nAsk"):
        train(tmp_path, new)
    steps = []
    train(tmp_path, new, replace=True, on_step=lambda *step: steps.append(step))
    assert steps
    train(tmp_path, new)


def test_a_class_without_images_of_one_kind_is_named():
    with pytest.raises(ValueError, match="class unicorn has no image"):
        Task("unicorn", (), NAMES)
    with pytest.raises(ValueError, match="class sky has no negatives"):
        localization.tasks(NAMES, ("sky",), np.ones((12, 1), bool))


def test_a_loss_that_is_not_finite_names_the_class(tmp_path):
    with pytest.raises(RuntimeError, match="loss of class cat is not finite"):
        train(tmp_path, config=replace(CONFIG, localization_rates=(1e30, 1e30)))
    assert not (tmp_path / "cat.safetensors").exists()
