from dataclasses import replace

import numpy as np
import pytest
from toy_segmentation import CLASSES, CONFIG, toy_backbone, toy_images

from moe_kernels.models import files, report
from moe_kernels.models.segmentation import ablation, fit
from moe_kernels.models.segmentation.data import TaggedImages

QUICK = replace(CONFIG, localization_rates=(1e-2,) * 2, epochs=3)
TRAIN, TEST = toy_images(8), toy_images(12).subset(range(8, 12))
NAMES = ["global-diverse-4", "pixel-diverse-4"]
NAMES += ["global-dense-4", "global-spatial-4", "global-top-4", "global-diverse-1", "global-diverse-6"]


@pytest.fixture(scope="module")
def backbone():
    return toy_backbone()


def compare(out, backbone, **options):
    given = {"samples": (1, 4, 6), "thresholds": (0.1, 0.5, 2.0), "progress": False} | options
    return ablation.run(TRAIN, TEST, backbone, out, QUICK, **given)


@pytest.fixture(scope="module")
def compared(tmp_path_factory, backbone):
    out = tmp_path_factory.mktemp("ablation")
    return out, compare(out, backbone)


def test_every_variant_is_what_a_fit_of_its_own_is(compared, backbone, tmp_path):
    out, found = compared
    assert sorted(found["variants"]) == sorted(NAMES)
    for name, changes in (("global-top-4", {"strategy": "top"}), ("pixel-diverse-4", {"loss": "pixel"})):
        alone = fit(TRAIN, backbone, tmp_path / name, replace(QUICK, **changes), progress=False)
        expected = alone.evaluate(TEST, progress=False)
        assert {key: found["variants"][name][key] for key in expected} == expected
        for net in ("classifier.safetensors", "localization/red.safetensors"):
            assert (out / name / net).read_bytes() == (tmp_path / name / net).read_bytes()
    tried = fit(TRAIN, backbone, out / NAMES[0], QUICK, progress=False).evaluate_localization(
        TEST, (0.1, 0.5, 2.0), progress=False
    )
    best = max(tried, key=lambda threshold: tried[threshold]["mean"])
    assert found["maps"] == {"threshold": best, **tried[best]}


def test_what_is_common_is_there_once_and_points_go(compared):
    out, _ = compared
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*NAMES, "features", *(f"{what}-{loss}" for what in ("localization", "scores") for loss in ("global", "pixel"))]
    )
    kept = [path.parent.parent.parent.name for path in out.glob("*/parts/0/points")]
    assert kept == [NAMES[0]]


def test_it_goes_on_where_it_was(compared, backbone, monkeypatch, tmp_path):
    out, before = compared
    with monkeypatch.context() as patch:
        patch.setattr(ablation.Segmenter, "evaluate", None)
        patch.setattr(ablation.Segmenter, "evaluate_localization", None)
        assert compare(out, backbone) == before
    evaluate, calls = ablation.Segmenter.evaluate, []

    def once_or_twice(self, *args, **options):
        calls.append(self.folder.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(self, *args, **options)

    monkeypatch.setattr(ablation.Segmenter, "evaluate", once_or_twice)
    with pytest.raises(KeyboardInterrupt):
        compare(tmp_path, backbone)
    assert compare(tmp_path, backbone) == before
    assert sorted(calls) == sorted([*NAMES, calls[2]])


def test_results_of_other_test_images_do_not_count(compared):
    images, masks = ([np.asarray(given(index)) for index in range(len(TEST))] for given in (TEST.image, TEST.mask))
    changed = [images[0] + 1, *images[1:]], [255 - masks[0], *masks[1:]]
    others = [
        TaggedImages(TEST.names, TEST.classes, TEST.tags, changed[0], masks),
        TaggedImages(TEST.names, TEST.classes, TEST.tags, images, changed[1], numbers=np.zeros(256, np.int16)),
        TEST.only(TEST.classes[::-1]),
        TEST.only(TEST.classes[:2]),
        TEST.subset(range(3)),
    ]
    digests = {ablation._digest(other) for other in (TEST, *others)}
    assert len(digests) == 6
    same = TaggedImages(TEST.names, TEST.classes, TEST.tags, images, masks)
    assert ablation._digest(same) == ablation._digest(TEST)
    out, _ = compared
    told = files.read_json(out / NAMES[0] / "evaluation.json")["run"]
    assert (
        told["test"]
        == files.read_json(out / NAMES[0] / "maps-evaluation.json")["run"]["test"]
        == ablation._digest(TEST)
    )


def test_the_tables(compared):
    _, found = compared
    for name, row in found["variants"].items():
        row["plain"]["mean"] = {"global-top-4": 0.5, "global-diverse-6": 0.9}.get(name, 0.25)
    text = report.markdown("Compared", ablation.sections(found, QUICK))
    assert "| softmax | mIoU, % |" in text
    assert "| top | **50.0** |\n| diverse | 25.0 |" in text
    assert "| 1 | 25.0 |\n| 4 | 25.0 |\n| 6 | **90.0** |" in text
    assert f"{100 * found['maps']['mean']:.1f} %" in text
    for row in found["variants"].values():
        row["crf"] = {"mean": 1.0}
    text = report.markdown("Compared", ablation.sections(found, QUICK))
    assert "| 6 | **90.0** | **100.0** |" in text


def test_what_cannot_be_compared(backbone, tmp_path):
    bare = TaggedImages(["a"], TRAIN.classes, TRAIN.tags[:1], [np.asarray(TRAIN.image(0))])
    with pytest.raises(ValueError, match="test images must have masks"):
        ablation.run(TRAIN, bare, backbone, tmp_path / "out", QUICK)
    with pytest.raises(ValueError, match="the classes that are trained, red, green; got blue"):
        ablation.run(toy_images(8, CLASSES[:2]), TEST, backbone, tmp_path / "out", QUICK)
    with pytest.raises(ValueError, match=r"samples must be at most the locations of the grid, \(8, 10\), got 81"):
        compare(tmp_path / "out", backbone, samples=(1, 81))
    with pytest.raises(ValueError, match="thresholds must be at least one"):
        compare(tmp_path / "out", backbone, thresholds=())
    assert not (tmp_path / "out").exists()
