import json
import os
import random
import subprocess
import sys
from dataclasses import replace

import interrupted_segment_demo
import numpy as np
import pytest
import torch
from interrupted_segment_demo import PLAN
from PIL import Image

from moe_kernels.models import files
from moe_kernels.models.segmentation import crf, demo, demo_plan, demo_report, localization, scenes, segmenter
from moe_kernels.models.segmentation.configuration import SegmentConfig
from moe_kernels.models.segmentation.data import TaggedImages


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_everything_is_written_and_a_second_call_repeats_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(crf, "available", lambda: "the dense CRF needs moe-kernels[crf]")
    lines = []
    found = demo.run(tmp_path, PLAN, say=lines.append, progress=False)
    assert lines[1:] == ["no CRF: the dense CRF needs moe-kernels[crf]", "added 4", "added 9"]
    expected = ["dense-3", "diverse-1", "diverse-3", "spatial-3", "top-3"]
    assert sorted(found["variants"]) == [*(f"global-{name}" for name in expected), "pixel-diverse-3"]
    assert found["maps"]["threshold"] in PLAN.thresholds
    assert 0 <= found["points"]["classes"] <= 1
    assert found["crf"] is None
    assert set(found["added"]["new"]) == {"background", *"0123456789"}

    content = files.read_json(tmp_path / "results.json")
    assert content.pop("plan")["train"] == PLAN.train
    assert content == json.loads(json.dumps(found))
    report = (tmp_path / "report.md").read_text()
    for heading in ("Table 1: Localization", "Table 2: Sampling", "Table 3: Samples", "Table 4: The segmenter"):
        assert f"## {heading}" in report
    rows = ("pixel", "global", "dense", "spatial", "top", "diverse", "1", "3", "segmenter", "the localization's maps")
    for row in (*rows, "old classes, before", "old classes, after", "all classes, after", "training the backbone"):
        assert f"\n| {row} | " in report
    assert 'needs "moe-kernels[crf]"' in report
    assert "segmenter and CRF" not in report
    for claim in demo_report.check(found, PLAN.segmenter):
        assert f"\n| {claim.text} | " in report
    for name in ("scenes.png", "added.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 500
        assert f"({name})" in report
    assert (tmp_path / "report.html").read_text().count("data:image/png;base64,") == 2

    before = [(tmp_path / name).read_bytes() for name in ("results.json", "times.json", "report.md")]
    for place, name in (
        (demo, "train"),
        (localization.Training, "step"),
        (segmenter.Segmenter, "evaluate"),
        (segmenter.Segmenter, "evaluate_localization"),
    ):
        monkeypatch.setattr(place, name, lambda *arguments, **options: pytest.fail("done again"))
    monkeypatch.setattr(demo.pictures, "plot_rows", lambda *arguments: None)
    demo.run(tmp_path, PLAN, say=lines.append, progress=False)
    assert [(tmp_path / name).read_bytes() for name in ("results.json", "times.json", "report.md")] == before

    with pytest.raises(ValueError, match=r"(?s)holds a demo of another plan.*train: 16 there, 17 here"):
        demo.run(tmp_path, replace(PLAN, train=17), say=lines.append, progress=False)


def test_killed_at_any_instant_it_ends_with_the_same_numbers(tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    print("seed of the instants:", seed)
    # a child writes some 180 files, each of its forerunners up to 60 of them
    instants = random.Random(seed).choices(range(1, 60), k=3)
    script = [sys.executable, interrupted_segment_demo.__file__, str(tmp_path), *map(str, instants)]
    # one thread: a process that forks must not have started others
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(script, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    whole, *killed, last = map(json.loads, done.stdout.splitlines())
    assert whole["ended"] == last["ended"] == 0
    assert killed == [{"ended": -9, "files": instant} for instant in instants]
    assert last["files"] < whole["files"]
    assert (tmp_path / "parts" / "results.json").read_bytes() == (tmp_path / "whole" / "results.json").read_bytes()
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".tmp" or path.name == "checkpoint.pt"]


def test_points_are_judged_in_the_middle_of_their_cells():
    rows, columns = demo._pixels(np.arange(np.prod(demo.GRID)))
    for pixels, cells, size, place in zip((rows, columns), demo.GRID, scenes.SIZE, (0, 1), strict=True):
        found = pixels.reshape(demo.GRID).take(0, axis=1 - place)
        assert (found == (np.arange(cells) + 0.5) * size / cells).all()

    class Half:
        """Its points: those of the first half of the grid are of class 1, which is what each image shows at the top."""

        def samples(self, name):
            return np.arange(np.prod(demo.GRID)), np.repeat([1, 0], np.prod(demo.GRID) // 2)

    masks = np.zeros((2, *scenes.SIZE), np.uint8)
    masks[:, : scenes.SIZE[0] // 2] = 1
    masks[1, : scenes.SIZE[0] // 4] = 0
    data = TaggedImages(["a", "b"], ["1"], np.ones((2, 1)), np.zeros((2, *scenes.SIZE, 3), np.uint8), masks)
    assert demo._points(Half(), data) == {"classes": 0.75, "background": 1.0}


def test_the_plans_classes_are_all_digits_once():
    assert sorted((*demo_plan.CLASSES, *demo_plan.ADDED)) == list("0123456789")
    for quick in (False, True):
        todo = demo_plan.plan(quick, seed=3)
        assert todo.segmenter.seed == todo.pretraining.trial == 3
        assert todo.segmenter.samples in todo.samples
        assert (todo.segmenter.loss, todo.segmenter.strategy) == ("global", "diverse")


def test_the_claims_are_read_from_the_right_numbers():
    config = SegmentConfig()

    def result(mean, **classes):
        every = dict.fromkeys(("background", *demo_plan.CLASSES), mean) | classes
        return {"mean": mean, "classes": every}

    def found(ours, pixel, top, spatial, dense, counts, maps, refined, after, background):
        rows = [(replace(config, loss="pixel"), pixel), (config, ours)]
        named = {"top": top, "spatial": spatial, "dense": dense}
        rows += [(replace(config, strategy=strategy), mean) for strategy, mean in named.items()]
        rows += [(replace(config, samples=count), mean) for count, mean in counts.items()]
        return {
            "variants": {
                f"{row.loss}-{row.strategy}-{row.samples}": {
                    "plain": result(mean),
                    "config": {"loss": row.loss, "strategy": row.strategy, "samples": row.samples},
                }
                for row, mean in rows
            },
            "maps": result(maps),
            "crf": None if refined is None else result(refined),
            "added": {"old": result(after)["classes"] | {"4": 0.0}, "new": {}},
            "points": {"classes": 0.5, "background": background},
        }

    good = found(0.4, 0.3, 0.3, 0.2, 0.1, {1: 0.1, 5: 0.38, 50: 0.39}, 0.2, 0.5, 0.395, 0.95)
    assert [claim.holds for claim in demo_report.check(good, config)] == [True] * 11
    bad = found(0.4, 0.5, 0.5, 0.5, 0.45, {1: 0.45, 5: 0.3, 50: 0.39}, 0.5, 0.3, 0.38, 0.8)
    assert [claim.holds for claim in demo_report.check(bad, config)] == [False] * 11
    # neither a CRF nor other K
    few = found(0.4, 0.3, 0.3, 0.2, 0.25, {}, 0.2, None, 0.41, 0.95)
    verdicts = {claim.text.split(" (")[0]: claim.holds for claim in demo_report.check(few, config)}
    assert verdicts["Table 4: a CRF makes it better"] is None
    assert verdicts["Table 2: dense sampling is the worst"] is False
    assert verdicts["Adding classes does not hurt the old ones"] is True
