import os
import shutil
import signal
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from toy_segmentation import CLASSES, CONFIG, toy_backbone, toy_images

from moe_kernels.models import files, runs
from moe_kernels.models.segmentation import Segmenter, TaggedImages, fit, stages
from moe_kernels.models.segmentation.sampling import normalized

ADDED = "blue"
QUICK = replace(CONFIG, epochs=1, localization_rates=(1e-2,))


@pytest.fixture(autouse=True)
def one_thread():
    """Also in the processes that are forked: OpenMP's threads do not live on in them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def backbone():
    return toy_backbone()


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, backbone):
    """Of red and green; copy it before it is changed."""
    folder = tmp_path_factory.mktemp("fitted") / "run"
    fit(toy_images(16, CLASSES[:2]), backbone, folder, CONFIG, progress=False)
    return folder


@pytest.fixture
def copy(fitted, backbone, tmp_path):
    return Segmenter.load(shutil.copytree(fitted, tmp_path / "copy"), backbone)


@pytest.fixture(scope="module")
def blue():
    """Images of the new class, some with old ones too."""
    images = toy_images(30, prefix="new ")
    return images.subset(np.flatnonzero(images.tags[:, 2]))


def content(folder):
    """Every file of a run by its path, but the times."""
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name != stages.TIMES and ".lock" not in name}


def test_it_segments_what_it_was_told_by_tags(tmp_path, backbone):
    data = toy_images(24)
    segmenter = fit(data, backbone, tmp_path, CONFIG, progress=False)
    test = toy_images(30).subset(range(24, 30))
    found = segmenter.evaluate(test, progress=False)
    assert found["images"] == 6
    assert set(found["plain"]["classes"]) == {"background", *CLASSES}
    assert found["plain"]["mean"] > 0.5
    image = test.image(0)
    labels = segmenter.predict(image)
    assert (labels.shape, labels.dtype) == ((36, 45), np.uint8)
    probabilities = segmenter.probabilities(image)
    torch.testing.assert_close(probabilities.sum(0), torch.ones(36, 45))
    np.testing.assert_array_equal(probabilities.argmax(0).numpy(), labels)
    losses = segmenter.losses()
    assert set(losses) == set(CLASSES)
    assert all(len(means) == 10 and means[-1] < 0.5 < means[0] for means in losses.values())
    assert set(segmenter.times()["fit"]) == {"features", "localization", "scores", "sampling", "classifier"}
    # of a size of its own
    assert segmenter.predict(image.resize((17, 90))).shape == (90, 17)


def test_masks_are_not_looked_at(tmp_path, backbone, monkeypatch):
    monkeypatch.setattr(TaggedImages, "mask", interrupt)
    fit(toy_images(8), backbone, tmp_path, replace(CONFIG, epochs=1, localization_rates=(1e-2,)), progress=False)


def test_the_time_of_an_interrupted_stage_counts(tmp_path, backbone, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(stages, "time", SimpleNamespace(monotonic=lambda: 10.0 * next(clock)))
    config = replace(CONFIG, epochs=1, localization_rates=(1e-2,))
    with monkeypatch.context() as patch:
        patch.setattr(stages.localization, "train", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(toy_images(8), backbone, tmp_path, config, progress=False)
    segmenter = fit(toy_images(8), backbone, tmp_path, config, progress=False)
    expected = {"features": 20.0, "localization": 20.0, "scores": 10.0, "sampling": 10.0, "classifier": 10.0}
    assert segmenter.times() == {"fit": expected}


def test_points_of_a_training_image(fitted, backbone):
    segmenter, data = Segmenter.load(fitted, backbone), toy_images(16, CLASSES[:2])
    for number in (0, 1):
        locations, labels = segmenter.samples(str(number))
        present = np.flatnonzero(data.tags[number]) + 1
        assert labels.tolist() == [*np.repeat(present, CONFIG.samples), *[0] * CONFIG.samples]
        for label in (0, *present):
            assert len(set(locations[labels == label])) == CONFIG.samples
        # the first is where the score is highest
        (maps,) = segmenter.localizer(CLASSES[present[0] - 1]).maps(
            stages.wide(segmenter.backbone.features(data.image(number))).pyramid
        )
        assert locations[0] == maps[0].argmax()
    with pytest.raises(ValueError, match="an image that the segmenter was trained on, got 'nobody'"):
        segmenter.samples("nobody")


def test_localization_is_normalized(fitted, backbone):
    segmenter, data = Segmenter.load(fitted, backbone), toy_images(16, CLASSES[:2])
    image = data.image(3)
    found = segmenter.localize(image)
    assert found.shape == (2, 36, 45)
    highest = []
    pyramids = [stages.wide(backbone.features(data.image(number))).pyramid for number in range(16)]
    for label, name in enumerate(CLASSES[:2]):
        maps = [segmenter.localizer(name).maps(pyramid)[0, 0] for pyramid in pyramids]
        highest.append(np.mean([float(maps[number].max()) for number in np.flatnonzero(data.tags[:, label])]))
        raw = normalized(maps[3][None], torch.tensor(highest[-1:]))
        expected = torch.nn.functional.interpolate(raw[None], (36, 45), mode="bilinear")[0, 0]
        torch.testing.assert_close(found[label], expected.float(), rtol=2e-2, atol=2e-2)  # the cache is float16
    assert segmenter.highest() == pytest.approx(dict(zip(CLASSES, highest, strict=False)), rel=1e-2)


def test_the_maps_as_a_result_at_thresholds(fitted, backbone):
    segmenter, data = Segmenter.load(fitted, backbone), toy_images(16, CLASSES[:2])
    found = segmenter.evaluate_localization(data, [0.2, 1e9], progress=False)
    assert list(found) == [0.2, 1e9]
    nothing = found[1e9]["classes"]
    assert (nothing["red"], nothing["green"]) == (0, 0)
    assert nothing["background"] == pytest.approx(np.mean([(data.mask(n) == 0).mean() for n in range(16)]))
    assert found[0.2]["classes"]["red"] > 0


def test_evaluation_knows_classes_by_name(fitted, backbone):
    segmenter = Segmenter.load(fitted, backbone)
    data = toy_images(8, CLASSES[:2])
    found = segmenter.evaluate(data, progress=False)
    assert segmenter.evaluate(data.only(("green", "red")), progress=False) == found
    with pytest.raises(ValueError, match="the segmenter knows red, green; the data has blue too"):
        segmenter.evaluate(toy_images(3), progress=False)
    with pytest.raises(ValueError, match="needs masks"):
        segmenter.evaluate(TaggedImages(["a"], ["red"], [[True]], [np.zeros((3, 3, 3), np.uint8)]), progress=False)


def test_evaluation_with_and_without_crf(fitted, backbone):
    pytest.importorskip("pydensecrf", reason="the extra [crf]")
    segmenter, data = Segmenter.load(fitted, backbone), toy_images(4, CLASSES[:2])
    found = segmenter.evaluate(data, crf=True, progress=False)
    assert found["plain"] == segmenter.evaluate(data, progress=False)["plain"]
    assert found["crf"] != found["plain"]
    image = data.image(0)
    assert (segmenter.predict(image, crf=True) != segmenter.predict(image)).any()


@pytest.mark.parametrize("strategy", ["top", "spatial", "dense"])
def test_every_strategy_runs(tmp_path, backbone, strategy):
    config = replace(CONFIG, strategy=strategy, loss="pixel", epochs=2, localization_rates=(1e-2,))
    segmenter = fit(toy_images(8), backbone, tmp_path, config, progress=False)
    assert segmenter.config == config
    locations, labels = segmenter.samples("1")
    assert len(locations) == len(set(locations)) if strategy == "dense" else len(labels) == 12


def test_images_of_any_mode_and_their_files(fitted, backbone, tmp_path):
    segmenter, colours = Segmenter.load(fitted, backbone), toy_images(1).image(0)
    alpha = colours.copy()
    alpha.putalpha(255)
    alpha.save(tmp_path / "alpha.png")
    for image in (alpha, tmp_path / "alpha.png", str(tmp_path / "alpha.png")):
        np.testing.assert_array_equal(segmenter.predict(image), segmenter.predict(colours))
        torch.testing.assert_close(segmenter.localize(image), segmenter.localize(colours))
    deep = Image.fromarray(np.asarray(colours.convert("L")).astype(np.uint16) * 257)
    grey = segmenter.probabilities(colours.convert("L"))
    torch.testing.assert_close(segmenter.probabilities(deep), grey)
    np.testing.assert_array_equal(segmenter.predict(np.asarray(colours)), segmenter.predict(colours))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        segmenter.predict(tmp_path / "nowhere.png")
    for wrong in (np.zeros((5, 4, 3)), np.zeros((5, 4), np.uint8)):
        with pytest.raises(TypeError, match=r"an array must be an image uint8 \(h, w, 3\), got (float64|uint8) \(5, 4"):
            segmenter.predict(wrong)
    with pytest.raises(TypeError, match=r"image must be an image, its file or an array .* got NoneType"):
        segmenter.predict(None)
    with pytest.raises(ValueError, match="nets must be of at least one class, got none"):
        segmenter.localize(colours, {})


def test_features_are_shared_by_segmenters_of_one_backbone(tmp_path, backbone, monkeypatch):
    config = replace(CONFIG, epochs=1, localization_rates=(1e-2,))
    data, shared = toy_images(8), tmp_path / "features"
    alone = fit(data, backbone, tmp_path / "alone", config, progress=False)
    fit(data, backbone, tmp_path / "one", replace(config, samples=2), features=shared, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(type(backbone), "forward", interrupt)
        two = fit(data, backbone, tmp_path / "two", config, features=shared, progress=False)
    torch.testing.assert_close(two.classifier.state_dict(), alone.classifier.state_dict(), rtol=0, atol=0)
    for name, features, other, message in (
        ("three", shared, {"backbone": toy_backbone(grid=(4, 5))}, "holds features of toy"),
        ("three", tmp_path / "alone", {}, "is not empty and no cache of features"),
        (
            "one",
            tmp_path / "others",
            {},
            r"one/features is there already, and is not .*others: name the folder that it is \(\.\./features\)",
        ),
        ("alone", shared, {}, "alone/features is there already, and is not .*: .* or delete it"),
    ):
        given = {"dataset": data, "backbone": backbone, "config": config} | other
        given["config"] = replace(config, samples=2) if name == "one" else config
        with pytest.raises(ValueError, match=message):
            fit(folder=tmp_path / name, features=features, progress=False, **given)
    assert [path.name for path in (tmp_path / "three").iterdir()] == [".lock"]


def test_a_link_to_features_that_leads_nowhere(tmp_path, backbone):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "features").symlink_to("../gone")
    with pytest.raises(FileNotFoundError, match=r"features leads to \.\./gone, which is not there"):
        fit(toy_images(8), backbone, tmp_path / "run", QUICK, progress=False)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file must be a folder for the segmenter"):
        fit(toy_images(8), backbone, tmp_path / "file", QUICK, progress=False)


def test_features_of_another_set_with_the_same_names_are_refused(tmp_path, backbone, blue):
    shared = tmp_path / "features"
    segmenter = fit(toy_images(8, CLASSES[:2]), backbone, tmp_path / "one", QUICK, features=shared, progress=False)
    fit(toy_images(8), backbone, tmp_path / "two", QUICK, features=shared, progress=False)
    before = content(segmenter.folder)
    with pytest.raises(ValueError, match=r"needs the features of \d images that .* has of others of the same name"):
        segmenter.add_class(ADDED, blue, progress=False)
    assert content(segmenter.folder) == before


def test_storage_in_float32(tmp_path, backbone):
    config = replace(CONFIG, epochs=1, localization_rates=(1e-2,), storage="float32")
    fit(toy_images(8), backbone, tmp_path, config, progress=False)
    found = stages.points.Points([tmp_path / "parts" / "0" / "points"]).gather(np.arange(5))[0]
    assert found.dtype == torch.float32
    assert (found != found.half()).any()


def test_without_global_features(tmp_path):
    segmenter = fit(toy_images(8), toy_backbone(head=False), tmp_path, replace(CONFIG, epochs=2), progress=False)
    assert segmenter.predict(toy_images(1).image(0)).shape == (36, 45)


# -- one more class ----------------------------------------------------------------------------------------------------


def test_a_class_is_added_and_the_others_are_untouched(copy, fitted, backbone, blue):
    before = copy.evaluate(toy_images(16, CLASSES[:2]), progress=False)["plain"]["classes"]
    highest = copy.highest()
    copy.add_class(ADDED, blue, progress=False)
    assert copy.classes == CLASSES
    old, new = content(fitted), content(copy.folder)
    assert {name for name in old if new[name] != old[name]} == {stages.CLASSIFIER}
    assert f"localization/{ADDED}.safetensors" in set(new) - set(old)
    found = copy.evaluate(toy_images(24), progress=False)["plain"]["classes"]
    assert found[ADDED] > 0.2
    after = copy.evaluate(toy_images(16, CLASSES[:2]), progress=False)["plain"]["classes"]
    assert all(after[name] > before[name] - 0.2 for name in before)
    assert "add blue" in copy.times()
    assert copy.highest() == highest | {ADDED: copy.parts()[1].highest()[ADDED]}
    assert copy.parts()[1].highest().keys() > {ADDED}
    assert copy.localize(blue.image(0)).shape == (3, 36, 45)
    # the tags of old classes count in the new images
    two = next(f"blue/{name}" for name, row in zip(blue.names, blue.tags, strict=True) if row.sum() == 2)
    assert len(set(copy.samples(two)[1])) == 3
    assert len(set(copy.samples("0")[1])) == 2
    torch.testing.assert_close(
        Segmenter.load(copy.folder, backbone).classifier.state_dict(), copy.classifier.state_dict(), rtol=0, atol=0
    )


def test_an_added_class_is_localized_as_if_it_had_been_there(copy, backbone, blue, tmp_path):
    """Its network is that of one fit to all images at once, bit for bit."""
    copy.add_class(ADDED, blue, progress=False)
    old = toy_images(16, CLASSES[:2])
    everything = TaggedImages(
        [*old.names, *(f"blue/{name}" for name in blue.names)],
        CLASSES,
        np.concatenate([np.pad(old.tags, ((0, 0), (0, 1))), blue.tags]),
        [np.asarray(data.image(number)) for data in (old, blue) for number in range(len(data))],
    )
    together = fit(everything, backbone, tmp_path / "together", CONFIG, progress=False)
    torch.testing.assert_close(
        copy.localizer(ADDED).state_dict(), together.localizer(ADDED).state_dict(), rtol=0, atol=0
    )


def test_images_with_the_tag_are_never_negatives(copy, blue, monkeypatch):
    """Not those either that had it before the segmenter knew of it."""
    train, seen = stages.localization.train, []
    monkeypatch.setattr(stages.localization, "train", lambda todo, *a, **k: seen.append(todo) or train(todo, *a, **k))
    tags = np.concatenate([blue.tags, np.arange(len(blue))[:, None] < 3], 1)
    images = [np.asarray(blue.image(number)) for number in range(len(blue))]
    copy.add_class(ADDED, TaggedImages(blue.names, (*CLASSES, "navy"), tags, images), progress=False)
    copy.add_class("navy", [blue.image(3)], progress=False)
    ((first,), (second,)) = seen
    old = {str(number) for number in range(16)}
    names = [f"blue/{name}" for name in blue.names]
    assert (set(first.positives), set(first.negatives)) == (set(names), old)
    # nor the picture itself, which is there as another class's
    assert (set(second.positives), set(second.negatives)) == ({"navy/0"}, old | set(names[4:]))


def test_a_class_from_files_and_from_images(copy, blue, tmp_path):
    for number in range(4):
        blue.image(number).save(tmp_path / f"{number}.png")
    paths = sorted(tmp_path.glob("*.png"))
    copy.add_class(ADDED, paths, progress=False)
    copy.add_class("navy", [blue.image(number) for number in range(4, 7)], progress=False)
    assert copy.classes == (*CLASSES, "navy")
    assert [len(part.tags) for part in copy.parts()] == [16, 4, 3]
    assert set(copy.samples("blue/0")[1]) == {0, 3}
    assert set(copy.samples("navy/0")[1]) == {0, 4}

    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"bad\.png"):
        copy.add_class("sky", [tmp_path / "bad.png", paths[0]], progress=False)
    with pytest.warns(UserWarning, match=r"bad\.png"):
        copy.add_class("sky", [tmp_path / "bad.png", paths[0]], skip_bad=True, progress=False)
    assert [len(part.tags) for part in copy.parts()] == [16, 4, 3, 1]


def test_classes_that_cannot_be_added(copy, fitted, blue):
    before = content(fitted)
    for name, images, message in (
        ("red", blue, "class red is there already: red, green"),
        ("background", blue, "class background is there already"),
        ("owl", blue, "images must have the tag owl; their tags are red, green, blue"),
        ("owl", [], "at least one of class owl, got none"),
        ("..", [blue.image(0)], r"the name of a class must not be .* got '\.\.'"),
        ("", [blue.image(0)], "the name of a class must not be empty"),
        (" owl", [blue.image(0)], "the name of a class must not .* got ' owl'"),
        ("ö" * 40, [blue.image(0)], "the name of a class must not .* more than 200"),
        ("owl", "owl.png", "images must be a sequence of images or files, got one str"),
        ("owl", blue.image(0), "images must be a sequence of images or files, got one Image"),
        ("owl", [3], "image must be an image, its file or an array .* got int"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            copy.add_class(name, images, progress=False)
    assert content(copy.folder) == before


def test_names_of_new_images_are_new(tmp_path, backbone):
    segmenter = fit(toy_images(8, CLASSES[:2], "blue/"), backbone, tmp_path, QUICK, progress=False)
    with pytest.raises(ValueError, match="images must have new names; those of the segmenter have blue/1, blue/2, bl"):
        segmenter.add_class(ADDED, toy_images(8), progress=False)


def test_an_addition_that_was_given_up_leaves_no_trace(copy, fitted, backbone, blue, tmp_path):
    stop = {"classifier": "train", "localization": "train"}
    for number, (module, function) in enumerate(stop.items()):
        images = [blue.image(number) for number in range(3)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(getattr(stages, module), function, interrupt)
            with pytest.raises(KeyboardInterrupt):
                copy.add_class(f"azure {number}", images, progress=False)
    assert copy.classes == Segmenter.load(copy.folder, backbone).classes == CLASSES[:2]
    copy.add_class(ADDED, blue, progress=False)
    other = Segmenter.load(shutil.copytree(fitted, tmp_path / "other"), backbone)
    other.add_class(ADDED, blue, progress=False)
    expected, found = content(other.folder), content(copy.folder)
    assert expected == {name: found[name] for name in expected}


def interrupt(*args, **options):
    raise KeyboardInterrupt


def repainted(data):
    """Other pictures of the same names and tags."""
    images = [255 - np.asarray(data.image(number)) for number in range(len(data))]
    return TaggedImages(data.names, data.classes, data.tags, images)


@pytest.mark.parametrize("stage", ["localization", "points", "classifier"])
def test_an_interrupted_addition_begins_anew_with_other_images(copy, fitted, backbone, blue, tmp_path, stage):
    interrupted = {"points": "collect"}.get(stage, "train")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(getattr(stages, stage), interrupted, interrupt)
        with pytest.raises(KeyboardInterrupt):
            copy.add_class(ADDED, repainted(blue), progress=False)
    copy.add_class(ADDED, blue, progress=False)
    other = Segmenter.load(shutil.copytree(fitted, tmp_path / "other"), backbone)
    other.add_class(ADDED, blue, progress=False)
    assert content(other.folder) == content(copy.folder)


def test_a_segmenter_that_another_extended_has_to_be_loaded_again(copy, backbone, blue):
    stale = Segmenter.load(copy.folder, backbone)
    copy.add_class(ADDED, blue, progress=False)
    before = content(copy.folder)
    with pytest.raises(RuntimeError, match="now knows red, green, blue: load it again"):
        stale.add_class("navy", [blue.image(0)], progress=False)
    assert content(copy.folder) == before


def test_points_and_features_that_are_missing_are_told_and_come_back(copy, fitted, backbone, blue):
    data, complete = toy_images(16, CLASSES[:2]), content(fitted)
    for missing in ("parts/0/points", "features"):
        shutil.rmtree(copy.folder / missing)
        (copy.folder / stages.TIMES).unlink()
        assert copy.times() == {}
        with pytest.raises(ValueError, match=f"an addition needs .*{missing}.*Delete .*{stages.CLASSIFIER}"):
            copy.add_class(ADDED, blue, progress=False)
        (copy.folder / stages.CLASSIFIER).unlink()
        fit(data, backbone, copy.folder, CONFIG, progress=False)
        assert content(copy.folder) == complete


# -- killed, resumed, refused ------------------------------------------------------------------------------------------


def killed(action, writes):
    """Do ``action`` in a child that kills itself in the middle of its ``writes``-th atomic write; None: at its end."""
    child = os.fork()
    if child == 0:
        replace_file, done = os.replace, [0]

        def counted(*args):
            done[0] += 1
            if done[0] == writes:
                os.kill(os.getpid(), signal.SIGKILL)
            replace_file(*args)

        files.os.replace = counted
        action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_fit_and_an_addition_killed_at_many_instants_end_with_the_same_bits(tmp_path, backbone, blue):
    config = replace(CONFIG, localization_rates=(1e-2,) * 2, epochs=10)
    data = toy_images(8, CLASSES[:2])

    def work(name):
        segmenter = fit(data, backbone, tmp_path / name, config, progress=False, checkpoint_share=1e9)
        if ADDED not in segmenter.classes:
            segmenter.add_class(ADDED, blue, progress=False, checkpoint_share=1e9)

    work("whole")
    times = 0
    # some in every stage; the last ones in the addition
    for writes in (1, 5, 7, 20, 2, 12, 8, 16, 5, 25, 30, 15, 25, 5, 12, 40, 14, 9, 30):
        ended = killed(partial(work, "parts"), writes)
        assert ended in (0, -signal.SIGKILL)
        times += ended != 0
    assert times >= 12
    work("parts")
    whole, parts = content(tmp_path / "whole"), content(tmp_path / "parts")
    assert list(whole) == list(parts)
    assert [name for name in whole if whole[name] != parts[name]] == []


def test_a_fit_is_not_repeated(fitted, backbone, monkeypatch):
    for module, function in (("localization", "train"), ("classifier", "train"), ("points", "score")):
        monkeypatch.setattr(getattr(stages, module), function, interrupt)
    fit(toy_images(16, CLASSES[:2]), backbone, fitted, CONFIG, progress=False)


def test_a_folder_of_another_configuration_is_refused(copy, backbone):
    data = toy_images(16, CLASSES[:2])
    before = content(copy.folder)
    for change, message in (
        ({"config": replace(CONFIG, samples=5)}, "samples: 4 there, 5 here"),
        ({"dataset": data.subset(range(12))}, "images: 16 there, 12 here"),
        ({"dataset": data.with_tags(data.tags[:, ::-1])}, "tags: others there than here"),
        ({"dataset": repainted(data)}, "pictures: others there than here"),
        ({"dataset": data.only(("green", "red"))}, r"classes: \['red', 'green'\] there, \['green', 'red'\] here"),
        ({"backbone": toy_backbone(image_size=(40, 40))}, r"image_size: \[32, 40\] there, \[40, 40\] here"),
    ):
        given = {"dataset": data, "backbone": backbone, "config": CONFIG} | change
        with pytest.raises(ValueError, match=f"is of another configuration:\n  {message}"):
            fit(folder=copy.folder, progress=False, **given)
    with pytest.raises(ValueError, match="was fitted with another backbone:\n  grid: "):
        Segmenter.load(copy.folder, toy_backbone(grid=(4, 5)))
    assert content(copy.folder) == before


def test_what_cannot_be_fitted_is_told_before_anything_is_done(tmp_path, backbone):
    data = toy_images(8)
    for dataset, config, message in (
        (data.subset([]), CONFIG, "expected images to learn from, got none"),
        (data.with_tags(data.tags & [True, False, True]), CONFIG, "no image has the tag green"),
        (data.with_tags(data.tags | [True, False, False]), CONFIG, "all 8 images have the tag.* red"),
        (
            TaggedImages("ab", ("sky", "background"), np.eye(2), np.zeros((2, 3, 3, 3), np.uint8)),
            CONFIG,
            "classes must not have the name background",
        ),
        (data, replace(CONFIG, samples=81), "samples must be at most 80, the locations of the grid, got 81"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(dataset, backbone, tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


def test_a_disk_that_is_full_is_told_before_anything_is_done(tmp_path, backbone, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=3000)
    monkeypatch.setattr(stages.shutil, "disk_usage", lambda path: free)
    with pytest.raises(OSError, match=r"has 0\.0 GB free, and 80 points take"):
        fit(toy_images(8), backbone, tmp_path, CONFIG, progress=False)
    assert not list(tmp_path.glob("features/*.safetensors"))


def test_images_without_a_tag_show_what_classes_are_not(tmp_path, backbone):
    data = toy_images(9)
    tags = data.tags.copy()
    tags[8] = False
    with pytest.warns(UserWarning, match="1 of 9 images have no tag.*8"):
        segmenter = fit(data.with_tags(tags), backbone, tmp_path, replace(CONFIG, epochs=2), progress=False)
    assert segmenter.samples("8")[1].tolist() == [0] * CONFIG.samples


def test_what_cannot_be_loaded(tmp_path, fitted, backbone):
    with pytest.raises(FileNotFoundError, match="holds no segmenter"):
        Segmenter.load(tmp_path)
    with pytest.raises(ValueError, match="fitted with a module of its own, which has to be given"):
        Segmenter.load(fitted)
    unfinished = shutil.copytree(fitted, tmp_path / "unfinished")
    (unfinished / stages.CLASSIFIER).unlink()
    with pytest.raises(FileNotFoundError, match="not trained to the end"):
        Segmenter.load(unfinished, backbone)


def test_it_is_loaded_with_the_backbone_it_was_created_with(tmp_path, monkeypatch, backbone):
    made = []
    monkeypatch.setattr("moe_kernels.models.segmentation.backbones.create", lambda **how: made.append(how) or backbone)
    config = replace(CONFIG, epochs=1, localization_rates=(1e-2,))
    fit(toy_images(8), backbone, tmp_path, config, created={"name": "vgg16"}, progress=False)
    image = Image.new("RGB", (20, 10))
    assert made == []
    assert Segmenter.load(tmp_path).predict(image).shape == (10, 20)
    assert made == [{"name": "vgg16"}]
    assert files.read_json(tmp_path / "config.json")["config"] == runs.identity(asdict(config))
