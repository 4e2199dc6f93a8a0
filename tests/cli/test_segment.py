import inspect
import re
import shutil
import warnings

import numpy as np
import pytest
import toy_voc
from PIL import Image
from toy_segmentation import toy_backbone
from typer.testing import CliRunner

from moe_kernels.cli import segment
from moe_kernels.cli import segment_options as options
from moe_kernels.models import files
from moe_kernels.models.data.rgb import read_rgb
from moe_kernels.models.segmentation import SegmentConfig, configuration, crf, demo, pictures
from moe_kernels.models.segmentation.evaluation import MeanIoU

SMALL = ["--localization-hidden", 16, "--localization-rates", "1e-2,1e-2,1e-2,1e-3", "--hidden", 16, "--batch", 20]
SMALL += ["--epochs", 20, "--lr", 3e-3, "--device", "cpu"]
pytestmark = pytest.mark.filterwarnings("ignore:train_aug lists")


def call(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(segment.app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, re.sub(r"\s+", " ", result.output)


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path_factory):
    """A toy in the place of the named backbones; what was found sound is not remembered in the home folder."""
    monkeypatch.setattr(segment.backbones, "create", lambda **created: toy_backbone())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp()))


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    return toy_voc.make(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def fitted(voc, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "segmenter"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segment.backbones, "create", lambda **created: toy_backbone())
        code, output = call("fit", voc, out, "--samples", 6, *SMALL)
    assert code == 0, output
    return out


def test_fit_tells_what_it_did_and_may_be_repeated(fitted, voc):
    code, output = call("fit", voc, fitted, "--samples", 6, *SMALL)
    assert code == 0, output
    assert re.search(r"features [\d.]+ s, localization [\d.]+ s, .* classifier [\d.]+ s; [\d.]+ s in all", output)
    assert f"4 classes, {toy_voc.TRAIN} images: {fitted}" in output
    losses = segment.segmentation.Segmenter.load(fitted).losses()
    for name, (first, *_, last) in losses.items():
        images = sum(name in toy_voc.contents(number) for number in range(toy_voc.TRAIN))
        assert f"│ {name} │ {images} │ {last:.3f} │ {first:.3f} │" in output
    code, output = call("fit", voc, fitted, "--samples", 7, *SMALL)
    assert code == 1
    assert "samples: 6 there, 7 here" in output


def test_a_run_without_its_times_is_read_all_the_same(fitted, voc, tmp_path):
    run = shutil.copytree(fitted, tmp_path / "run")
    (run / "times.json").unlink()
    code, output = call("fit", voc, run, "--samples", 6, *SMALL)
    assert code == 0, output
    assert "in all" not in output


def test_options_reach_the_configuration(voc, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(segment.backbones, "create", lambda **created: made.append(created) or toy_backbone())
    weights = tmp_path / "weights.pth"
    arguments = ["--split", "train", "--tags", "masks", "--loss", "pixel", "--strategy", "spatial", "--samples", 3]
    arguments += [
        "--localization-hidden",
        4,
        "--localization-rates",
        "0.5,0.25",
        "--penalty",
        "max",
        "--threshold",
        0.3,
    ]
    arguments += ["--spatial-sigma", 0.2, "--hidden", 5, "--batch", 7, "--epochs", 1, "--lr", 0.125, "--seed", 9]
    arguments += ["--storage", "float32", "--features", tmp_path / "features", "--device", "cpu", "--grid", "8x10"]
    arguments += ["--backbone", "resnet18", "--weights", weights, "--image-size", "32x40", "--layers", "0, 2"]
    code, output = call("fit", voc, tmp_path / "out", *arguments, "--ceil-mode", "--preprocessing", "caffe")
    assert code == 0, output
    found = files.read_json(tmp_path / "out" / "config.json")
    assert found["config"] == {
        "loss": "pixel",
        "localization_hidden": 4,
        "localization_rates": [0.5, 0.25],
        "strategy": "spatial",
        "samples": 3,
        "penalty": "max",
        "threshold": 0.3,
        "spatial_sigma": 0.2,
        "hidden": 5,
        "batch": 7,
        "epochs": 1,
        "learning_rate": 0.125,
        "storage": "float32",
        "seed": 9,
    }
    assert set(found["config"]) == set(vars(SegmentConfig()))
    assert len(list((tmp_path / "features").glob("*.safetensors"))) == toy_voc.TRAIN
    expected = {"name": "resnet18", "weights": str(weights), "image_size": [32, 40], "grid": [8, 10], "layers": [0, 2]}
    assert found["created"] == expected | {"ceil_mode": True, "preprocessing": "caffe"}
    assert made == [found["created"]]
    assert options.created_by(
        "vgg16", "hub", None, None, "conv1_1,conv1_2/pool", False, options.Preprocessing.caffe
    ) == {
        "name": "vgg16",
        "weights": "hub",
        "image_size": None,
        "grid": None,
        "layers": ["conv1_1", "conv1_2/pool"],
        "ceil_mode": False,
        "preprocessing": "caffe",
    }


def test_the_options_have_the_configurations_defaults():
    config = SegmentConfig()
    for command in (segment.fit, segment.ablate):
        parameters = {p.name: p.default for p in inspect.signature(command).parameters.values()}
        for name in set(parameters) & set(vars(config)) - {"localization_rates"}:
            value = parameters[name]
            if command is segment.ablate and name == "samples":
                assert value == "1,5,10,20,50"
            else:
                assert getattr(value, "value", value) == getattr(config, name), name
        assert options.numbers("", parameters["localization_rates"], float) == config.localization_rates
    assert set(vars(config)) <= set(inspect.signature(segment.fit).parameters)
    for kind, values in (
        (options.Loss, configuration.LOSSES),
        (options.Strategy, configuration.STRATEGIES),
        (options.Penalty, configuration.PENALTIES),
        (options.Storage, configuration.STORAGES),
        (options.Preprocessing, segment.backbones.PREPROCESSING),
        (options.MaskNumbers, segment.coco.MASK_NUMBERS),
    ):
        assert [choice.value for choice in kind] == list(values)


def test_some_classes_of_the_data_are_enough_and_a_fit_reads_no_mask(voc, tmp_path):
    root, out = tmp_path / "VOCdevkit" / "VOC2012", tmp_path / "run"
    shutil.copytree(voc, root)
    for mask in (root / "SegmentationClassAug").iterdir():
        mask.write_bytes(b"no picture")
    code, output = call("fit", root, out, "--classes", "ring, disc", "--samples", 3, *SMALL)
    assert code == 0, output
    assert segment.segmentation.Segmenter.load(out).classes == ("ring", "disc")
    code, output = call("evaluate", out, voc, "--device", "cpu")
    assert code == 1
    assert "square" in output
    code, output = call("evaluate", out, voc, "--classes", "disc,ring", "--device", "cpu")
    assert code == 0, output
    assert set(files.read_json(out / "evaluation.json")["plain"]["classes"]) == {"background", "disc", "ring"}
    code, output = call("fit", root, out, "--classes", "disc,cat", *SMALL)
    assert code == 1
    assert "there is no cat" in output


def test_predict_writes_label_maps_with_a_palette_and_pictures(fitted, voc, tmp_path):
    images = voc / "JPEGImages"
    first = next(images.glob("2007_000016.*"))
    inner = tmp_path / "inner"
    (inner / "deep").mkdir(parents=True)
    for place in ("deep", ".cache"):
        (inner / place).mkdir(exist_ok=True)
        Image.new("L", (9, 7), 200).save(inner / place / "grey.png")
    (inner / "note.txt").write_text("no image")
    code, output = call("predict", fitted, first, inner, "--out", tmp_path / "out", "--device", "cpu")
    assert code == 0, output
    assert f"2 images: {tmp_path / 'out'}; 0 background, 1 disc, 2 square, 3 cross, 4 ring" in output
    written = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png"))
    assert written == ["2007_000016-overlay.png", "2007_000016.png", "deep/grey-overlay.png", "deep/grey.png"]
    with Image.open(tmp_path / "out" / "2007_000016.png") as found, Image.open(first) as image:
        assert (found.mode, found.size) == ("P", image.size)
        expected = segment.segmentation.Segmenter.load(fitted).predict(read_rgb(first))
        np.testing.assert_array_equal(np.asarray(found), expected)
        colours = np.array(found.getpalette()).reshape(-1, 3)
        np.testing.assert_array_equal(colours[: expected.max() + 1], pictures.palette()[: expected.max() + 1])
    code, output = call("predict", fitted, inner, "--out", inner / "out", "--device", "cpu")
    again = call("predict", fitted, inner, "--out", inner / "out", "--device", "cpu")
    assert (code, output) == again, "hidden files and earlier results were read"
    assert f"1 images: {inner / 'out'}; " in output
    code, output = call("predict", fitted, first, "--out", tmp_path / "bare", "--no-overlay", "--device", "cpu")
    assert code == 0, output
    assert [path.name for path in (tmp_path / "bare").iterdir()] == ["2007_000016.png"]


def test_predict_overwrites_no_image_and_no_result(fitted, tmp_path):
    for name in ("a.png", "a-overlay.png", "b.jpg"):
        Image.new("L", (9, 7), 200).save(tmp_path / name)
    before = (tmp_path / "a.png").read_bytes()
    code, output = call("predict", fitted, tmp_path, "--out", tmp_path, "--device", "cpu")
    assert code == 1
    assert "out must be another folder: there images would be overwritten" in output
    code, output = call("predict", fitted, tmp_path, "--out", tmp_path / "out", "--device", "cpu")
    assert code == 1
    assert f"results must have different names; of two images would be {tmp_path / 'out' / 'a-overlay.png'}" in output
    assert (tmp_path / "a.png").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-overlay.png", "a.png", "b.jpg"]
    code, output = call("predict", fitted, tmp_path / "a.png", "--out", tmp_path / "b.jpg")
    assert code == 2
    assert "is a file" in output


def test_evaluate_takes_masks_of_a_plain_folder_by_their_names(fitted, voc, tmp_path):
    names = toy_voc.names("val")
    for place in ("images", "masks"):
        (tmp_path / place).mkdir()
    for number, name in enumerate(names, toy_voc.TRAIN):
        picture, mask, _ = toy_voc.draw(number)
        Image.fromarray(picture).save(tmp_path / "images" / f"{name}.png")
        Image.fromarray(mask).save(tmp_path / "masks" / f"{name}.png")
    (tmp_path / "tags.csv").write_text("file,tags\n" + "".join(f"{name},\n" for name in names))
    code, output = call("evaluate", fitted, tmp_path, "--device", "cpu")
    assert code == 1
    assert "nothing says what their numbers stand for: write class_names.txt" in output
    (tmp_path / "class_names.txt").write_text("\n".join(toy_voc.CLASSES))
    code, output = call("evaluate", fitted, tmp_path, "--device", "cpu", "--out", tmp_path / "found.json")
    assert code == 0, output
    segmenter, metric = segment.segmentation.Segmenter.load(fitted), MeanIoU(toy_voc.CLASSES)
    for number in range(toy_voc.TRAIN, toy_voc.TRAIN + toy_voc.VAL):
        picture, mask, _ = toy_voc.draw(number)
        metric.update(segmenter.predict(Image.fromarray(picture)), mask)
    assert files.read_json(tmp_path / "found.json")["plain"]["classes"] == metric.compute()[1]


def test_mask_numbers_reach_cocos_layout(fitted, voc, tmp_path):
    (tmp_path / "val2017").mkdir()
    (tmp_path / "masks" / "val2017").mkdir(parents=True)
    (tmp_path / "annotations").mkdir()
    Image.new("RGB", (9, 7)).save(tmp_path / "val2017" / "a.jpg")
    Image.new("L", (9, 7), 90).save(tmp_path / "masks" / "val2017" / "a.png")
    content = {"categories": [{"id": 3, "name": "disc"}, {"id": 90, "name": "ring"}]}
    content |= {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}
    files.write_json(tmp_path / "annotations" / "instances_val2017.json", content)
    arguments = ["evaluate", fitted, tmp_path, "--device", "cpu", "--out", tmp_path / "found.json"]
    code, output = call(*arguments)
    assert code == 1
    assert "unknown label 90" in output
    code, output = call(*arguments, "--mask-numbers", "id")
    assert code == 0, output
    assert files.read_json(tmp_path / "found.json")["images"] == 1
    for command in (["evaluate", fitted, voc], ["ablate", voc, tmp_path / "out"]):
        code, output = call(*command, "--mask-numbers", "id", "--device", "cpu")
        assert code == 1
        assert "has the layout of voc, for which there is no mask_numbers" in output


def test_evaluate_tells_iou_with_and_without_crf(fitted, voc, monkeypatch):
    code, output = call("evaluate", fitted, voc, "--device", "cpu")
    assert code == 0, output
    found = files.read_json(fitted / "evaluation.json")
    assert (found["images"], found["split"]) == (toy_voc.VAL, "val")
    assert set(found["plain"]["classes"]) == {"background", *toy_voc.CLASSES}
    for name, value in found["plain"]["classes"].items():
        assert f"│ {name} │ {100 * value:.1f} │" in output
    assert f"{100 * found['plain']['mean']:.1f}" in output
    assert "crf" not in found

    # without the extra the step is left out, and that is told
    monkeypatch.setattr(crf, "available", lambda: 'pip install "moe-kernels[crf]"')
    code, output = call("evaluate", fitted, voc, "--crf", "--device", "cpu", "--out", fitted / "again.json")
    assert code == 0, output
    assert 'the CRF is left out: pip install "moe-kernels[crf]"' in output
    assert files.read_json(fitted / "again.json") == found


def test_the_crf_is_used_where_it_is_asked_for(fitted, voc, tmp_path):
    pytest.importorskip("pydensecrf", reason="the extra [crf]")
    code, output = call("evaluate", fitted, voc, "--crf", "--device", "cpu", "--out", tmp_path / "found.json")
    assert code == 0, output
    assert "with CRF, %" in output
    assert files.read_json(tmp_path / "found.json")["crf"]["mean"] > 0
    image = next((voc / "JPEGImages").glob("2007_000016.*"))
    for arguments in (["--crf"], []):
        code, output = call(
            "predict", fitted, image, "--out", tmp_path / str(len(arguments)), "--no-overlay", *arguments
        )
        assert code == 0, output
    plain, refined = ((tmp_path / name / "2007_000016.png").read_bytes() for name in "01")
    assert plain != refined


def test_classes_are_added_from_files_and_from_tagged_data(fitted, voc, tmp_path):
    run = shutil.copytree(fitted, tmp_path / "run")
    new = tmp_path / "new"
    new.mkdir()
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 90, (30, 40, 3), np.uint8)
        pixels[5:20, 5:25] = (250, 120, 0)
        Image.fromarray(pixels).save(new / f"{number}.png")
    (new / "deep").mkdir()
    shutil.move(new / "4.png", new / "deep" / "0.png")
    code, output = call("add-class", run, "orange", new, "--split", "val")
    assert code == 1
    assert "split and tags are choices for one folder of tagged data" in output
    code, output = call("add-class", run, "orange", new, "--device", "cpu")
    assert code == 0, output
    assert f"5 classes: {run}" in output
    assert re.search(r"localization [\d.]+ s, .* in all", output)

    folder = tmp_path / "tagged"
    (folder / "images").mkdir(parents=True)
    for number in range(4):
        with Image.open(new / f"{number}.png") as image:
            image.transpose(Image.Transpose.ROTATE_180).save(folder / "images" / f"{number}.png")
    (folder / "tags.csv").write_text("file,tags\n0.png,apricot\n1.png,apricot;orange\n2.png,\n3.png,orange\n")
    code, output = call("add-class", run, "apricot", folder, "--device", "cpu")
    assert code == 0, output
    segmenter = segment.segmentation.Segmenter.load(run)
    assert segmenter.classes == (*toy_voc.CLASSES, "orange", "apricot")
    assert [len(part.tags) for part in segmenter.parts()] == [toy_voc.TRAIN, 5, 2]
    assert set(segmenter.samples("apricot/1")[1]) == {0, 5, 6}

    code, output = call("add-class", shutil.copytree(fitted, tmp_path / "other"), "disc", voc, "--tags", "nothing")
    assert code == 1
    assert "tags must be one of xml, masks, got 'nothing'" in output
    for arguments, message in (
        (["orange", new], "class orange is there already"),
        (["lemon", tmp_path / "nowhere"], "there is no such file or folder"),
        (["lemon", tmp_path / "tagged" / "tags.csv"], "tags.csv"),
        (["lemon", folder], "images must have the tag lemon; their tags are apricot, orange"),
    ):
        code, output = call("add-class", run, *arguments, "--device", "cpu")
        assert code == 1
        assert output.startswith("error: ")
        assert message in output


def test_ablate_writes_the_papers_tables(voc, tmp_path):
    quick = ["--localization-hidden", 4, "--localization-rates", 1e-2, "--hidden", 4, "--epochs", 1, "--device", "cpu"]
    code, output = call("ablate", voc, tmp_path / "out", "--samples", "1,20", *quick)
    assert code == 0, output
    for heading in ("Localization", "Sampling", "Samples a class and image"):
        assert heading in output
    found = files.read_json(tmp_path / "out" / "results.json")
    assert len(found["variants"]) == 6
    assert found["variants"]["global-diverse-20"]["images"] == toy_voc.VAL
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| spatial |" in text
    assert (tmp_path / "out" / "report.html").exists()
    before = (tmp_path / "out" / "results.json").read_bytes()
    code, output = call("ablate", voc, tmp_path / "out", "--samples", "1,20", *quick)
    assert (code, (tmp_path / "out" / "results.json").read_bytes()) == (0, before)


def test_bad_images_stop_or_are_left_out(voc, tmp_path):
    data = shutil.copytree(voc, tmp_path / "VOC2012")
    (data / "JPEGImages" / "2007_000000.jpg").write_bytes(b"no image")
    code, output = call("fit", data, tmp_path / "out", *SMALL)
    assert code == 1
    assert "2007_000000.jpg" in output
    assert not (tmp_path / "out").exists()
    quick = ["--localization-rates", 1e-2, "--localization-hidden", 4, "--epochs", 1]
    with pytest.warns(UserWarning, match=r"2007_000000\.jpg"):
        code, output = call("fit", data, tmp_path / "out", *quick, "--device", "cpu", "--skip-bad")
    assert code == 0, output
    assert f"{toy_voc.TRAIN - 1} images" in output
    with pytest.warns(UserWarning, match=r"2007_000000\.jpg"):
        code, output = call(
            *("predict", tmp_path / "out", data / "JPEGImages", "--skip-bad", "--no-overlay"),
            *("--out", tmp_path / "maps", "--device", "cpu"),
        )
    assert code == 0, output
    assert f"{toy_voc.TRAIN + toy_voc.VAL - 1} images" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "81"], "samples must be at most 80, the locations of the grid, got 81"),
        (["--samples", "0"], "samples must be at least 1, got 0"),
        (["--localization-rates", "1e-4;1e-5"], "localization-rates must be numbers such as 1,2, got '1e-4;1e-5'"),
        (["--image-size", "256"], "image-size must be HEIGHTxWIDTH such as 256x336, got '256'"),
        (["--split", "nowhere"], "nowhere"),
        (["--layers", ""], "layers must be names with commas between them, got ''"),
        (["--classes", "disc,"], "classes must be names with commas between them, got 'disc,'"),
        (["--device", "tpu9"], "device must be auto, cpu, cuda or cuda:<index>, got 'tpu9'"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence(voc, tmp_path, arguments, message):
    code, output = call("fit", voc, tmp_path / "out", *arguments)
    assert code == 1
    assert output.startswith("error: ")
    assert message in output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("samples", ["inf", "2.7"])
def test_the_numbers_of_samples_are_whole(voc, tmp_path, samples):
    code, output = call("ablate", voc, tmp_path / "out", "--samples", samples)
    assert (code, output) == (1, f"error: samples must be whole numbers such as 1,2, got '{samples}' ")


def test_the_backbone_is_made_before_images_are_looked_at(tmp_path, monkeypatch):
    def fail(**created):
        raise FileNotFoundError("there are no such weights")

    monkeypatch.setattr(segment.backbones, "create", fail)
    for command in ("fit", "ablate"):
        assert call(command, tmp_path / "nowhere", tmp_path / "out") == (1, "error: there are no such weights ")


def test_an_interruption_says_what_the_same_command_does(fitted, voc, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(segment.segmentation.Segmenter, "load", interrupt)
    monkeypatch.setattr(segment.segmentation, "fit", interrupt)
    for command, what in (
        (["evaluate", fitted, voc], "begins anew"),
        (["predict", fitted, voc / "JPEGImages", "--out", tmp_path], "begins anew"),
        (["fit", voc, tmp_path], "goes on from here"),
    ):
        assert call(*command, "--device", "cpu") == (130, f"interrupted; the same command {what} ")


def test_a_warning_is_its_text_alone():
    with segment.one_sentence():
        assert warnings.formatwarning(UserWarning("left out"), UserWarning, "a.py", 3) == "warning: left out\n"
    assert "a.py" in warnings.formatwarning(UserWarning("left out"), UserWarning, "a.py", 3)


def test_help_names_the_extra():
    for command in ("predict", "evaluate", "ablate"):
        assert "needs the extra crf" in call(command, "--help")[1]


def test_runs_and_data_that_are_none(fitted, tmp_path):
    for arguments in (["predict", tmp_path, tmp_path, "--out", tmp_path], ["evaluate", tmp_path, tmp_path]):
        code, output = call(*arguments)
        assert code == 1
        assert output.startswith(f"error: {tmp_path} holds no segmenter")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    (tmp_path / "tags.csv").write_text("file,tags\na.png,disc\n")
    code, output = call("evaluate", fitted, tmp_path)
    assert code == 1
    assert "evaluation needs masks" in output
    code, output = call("evaluate", fitted, tmp_path, "--split", "val")
    assert code == 1
    assert "has the layout of folder, for which there is no split" in output
    code, output = call(
        "predict", fitted, tmp_path / "images", tmp_path / "images" / "a.png", "--out", tmp_path / "out"
    )
    assert code == 0, output
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    code, output = call("predict", fitted, tmp_path / "images", tmp_path / "a.jpg", "--out", tmp_path / "out")
    assert code == 1
    assert "images must have different names" in output


def test_the_demo_command_runs_the_plan_and_shows_its_tables(monkeypatch, tmp_path):
    plan = demo.plan(quick=True, seed=3)
    names = [segment.ablation.name_of(variant) for variant in segment.ablation.variants(plan.segmenter).values()]
    variants = {
        name: {"config": {"loss": "global", "strategy": "diverse", "samples": int(name.split("-")[2])}}
        for name in names
    }
    found = {"maps": {"threshold": 0.2, "mean": 0.25}, "variants": variants}
    for number, row in enumerate(variants.values()):
        row["plain"] = {"mean": number / 10}
    monkeypatch.setattr(demo, "run", lambda out, todo: found if (out, todo) == (tmp_path, plan) else {})
    code, output = call("demo", "--out", tmp_path, "--seed", 3, "--quick")
    assert code == 0, output
    assert re.search(r"│ pixel │ [1-9]0\.0 │", output)
    assert str(tmp_path / "report.html") in output

    def fail(out, todo):
        raise ValueError("of another plan")

    monkeypatch.setattr(demo, "run", fail)
    assert call("demo", "--out", tmp_path) == (1, "error: of another plan ")
