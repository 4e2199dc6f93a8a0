import inspect
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models.resnet import BasicBlock
from typer.testing import CliRunner

from moe_kernels.cli import transfer
from moe_kernels.models import files
from moe_kernels.models.data.images import IMAGENET_MEAN, IMAGENET_STD
from moe_kernels.models.transfer import backbones, demo, protocol, sources

CLASSES = ("cat", "dog")


class Tiny(nn.Module):
    """A ResNet of two narrow blocks, in the place of the named ones."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, stride=2)
        self.layer1, self.layer2 = (nn.Sequential(BasicBlock(4, 4)) for _ in range(2))
        self.fc = nn.Linear(4, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.layer2(self.layer1(self.conv1(images))).mean((2, 3)))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "places.pth"
    torch.manual_seed(0)
    torch.save(Tiny(9).state_dict(), path)
    return path


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(backbones, "_architecture", lambda name, num_classes: Tiny(num_classes))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("images") / "pets"
    draw = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 4)):
        for label, name in enumerate(CLASSES):
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = draw.integers(0, 128, (40, 36, 3), np.uint8) + np.uint8(100 * label)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


def call(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(transfer.app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, re.sub(r"\s+", " ", result.output)


@pytest.fixture
def train(root, weights, tmp_path):
    fixed = ["--workers", 0, "--device", "cpu", "--batch", 4, "--crop", 16, "--repeats", 1, "--lr", 1e-3]

    def run(*arguments: object) -> tuple[int, str]:
        given = {"--source": weights, "--steps": 2, "--eval-every": 1, "--out": tmp_path}
        options = [part for pair in given.items() if pair[0] not in arguments for part in pair]
        return call("train", root, *fixed, *options, *arguments)

    return run


def test_a_method_with_and_without_dtnh_in_one_table(train, tmp_path):
    options = ["--method", "fine-tuning", "--method", "l2-sp", "--repeats", 2, "--coefficient", 0.5]
    code, output = train(*options)
    assert code == 0, output
    assert output.count("Weights: ") == 4
    code, output = train("--method", "l2-sp", "--coefficient", 0.5, "--dtnh", "--repeats", 2)
    assert code == 0, output
    assert "DTNH(L2-SP), places → pets, seed 1" in output
    found = files.read_json(tmp_path / "results.json")
    (table,) = found["tables"]
    assert table["source"] == "places"
    assert list(table["accuracy"]["pets"]) == ["Fine-tuning", "L2-SP", "DTNH(L2-SP)"]
    assert all(len(cell["repeats"]) == 2 for cell in table["accuracy"]["pets"].values())
    run = found["runs"][0]["run"]
    assert (run["data"], run["classes"], run["model"]) == ("pets", list(CLASSES), "timm/resnet18")
    assert {run["run"]["coefficient"] for run in found["runs"]} == {0.0, 0.5}
    assert (run["momentum"], run["head_decay"], run["scope"]) == (0.9, 0.01, "global")
    assert len(list(tmp_path.glob("*.png"))) == 3
    before = (tmp_path / "results.json").read_bytes()
    code, output = train(*options)
    assert (code, (tmp_path / "results.json").read_bytes()) == (0, before)

    code, output = train(*options, "--momentum", 0.5)
    assert code == 1
    assert "momentum: 0.9 there, 0.5 here" in output


def test_an_embedded_target_at_the_size_of_the_model(weights, tmp_path):
    options = ["--source", weights, "--steps", 1, "--batch", 4, "--crop", 40, "--repeats", 1, "--workers", 0]
    options += ["--train-per-class", 2, "--test-per-class", 1, "--lr", 1e-3, "--device", "cpu", "--out", tmp_path]
    code, output = call("train", "embedded:sketch", *options)
    assert code == 0, output
    run = files.read_json(tmp_path / "results.json")["runs"][0]["run"]
    assert (run["data"], run["train"], run["test"]) == ("sketch", 20, 10)
    # normalized as the backbone's images were
    target = sources.target("sketch", 2, 1, 0, 40, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    assert run["target"] == target.identity
    for arguments, message in (
        (["embedded:photos"], "name must be one of inverted, sketch, weaves, got 'photos'"),
        (["embedded:sketch", "--resize", 44], "resize is for images of files; those of embedded:sketch are drawn"),
        (["embedded:sketch", "--skip-bad"], "skip-bad is for images of files"),
    ):
        code, output = call("train", *arguments, *options)
        assert code == 1
        assert message in output


@pytest.mark.parametrize("option", ["--crop", "--resize", "--train-per-class", "--test-per-class"])
@pytest.mark.parametrize("target", ["embedded:sketch", "folder"])
def test_zero_is_not_the_default(option, target):
    code, output = call("train", target, option, 0)
    assert code == 2
    assert f"Invalid value for '{option}'" in output


def test_images_of_a_size_that_the_model_does_not_take(train, monkeypatch, tmp_path):
    class Fixed(Tiny):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            assert images.shape[-1] == 224, f"Input width ({images.shape[-1]}) doesn't match model (224)."
            return super().forward(images)

    monkeypatch.setattr(backbones, "_architecture", lambda name, num_classes: Fixed(num_classes))
    code, output = train("--method", "l2-sp")
    assert code == 1
    assert output == (
        "error: crop (--crop): timm/resnet18 was made for images of 224 × 224 and cannot take 16 × 16 "
        "(Input width (16) doesn't match model (224)) "
    )
    assert not list(tmp_path.rglob("*.pt"))


def test_a_name_is_of_one_source(train, weights, tmp_path):
    assert train("--method", "l2")[0] == 0
    other = tmp_path / "other" / weights.name
    other.parent.mkdir()
    torch.manual_seed(1)  # other weights than the fixture's, whichever test made those
    torch.save(Tiny(9).state_dict(), other)
    code, output = train("--method", "l2-sp", "--source", other)
    assert code == 1
    assert "has runs of another source of the name places; give this one its own with --source-name: weights:" in output
    code, output = train("--method", "l2-sp", "--source", other, "--source-name", "Other")
    assert code == 0, output
    assert [table["source"] for table in files.read_json(tmp_path / "results.json")["tables"]] == ["Other", "places"]


def test_a_source_of_the_hub_has_the_models_name(train, tmp_path, monkeypatch):
    monkeypatch.setattr(backbones, "_from_hub", lambda name: Tiny(9).state_dict())
    code, output = train("--source", "hub", "--model", "torchvision/resnet34")
    assert code == 0, output
    assert [table["source"] for table in files.read_json(tmp_path / "results.json")["tables"]] == [
        "torchvision/resnet34"
    ]


def test_an_option_is_of_the_methods_that_have_it(train, tmp_path):
    code, output = train(
        *("--method", "fine-tuning", "--method", "l2", "--method", "know-dist", "--dtnh", "--layers", "layer2"),
        *("--scope", "tensor", "--head-decay", 0.5, "--parameters", "kernels", "--steps", 1),
    )
    assert code == 0, output
    found = {run["run"]["method"]: run["run"] for run in files.read_json(tmp_path / "results.json")["runs"]}
    assert {name: run["dtnh"] for name, run in found.items()} == {"fine-tuning": False, "l2": True, "know-dist": True}
    for name, expected in (
        ("scope", ("global", "tensor", "tensor")),
        ("head_decay", (0.01, 0.01, 0.5)),
        ("layers", (None, None, ["layer2"])),
        ("parameters", (None, "kernels", None)),
    ):
        assert tuple(found[method][name] for method in ("fine-tuning", "l2", "know-dist")) == expected, name


def test_a_folder_that_cannot_be_written_to(train, tmp_path):
    (tmp_path / "file").touch()
    code, output = train("--out", tmp_path / "file" / "out")
    assert code == 1
    assert output == (
        f"error: out (--out): {tmp_path / 'file' / 'out'} must be a folder that can be written to (Not a directory) "
    )


def test_the_papers_five_columns_and_a_cross_validation(train, tmp_path, monkeypatch):
    monkeypatch.setattr(protocol, "GRID", (0.1, 1.0))
    code, output = train("--method", "paper", "--cross-validate", "--folds", 2, "--source-name", "Places", "--steps", 1)
    assert code == 0, output
    assert output.count("cross-validation chooses λ = ") == 4
    (table,) = files.read_json(tmp_path / "results.json")["tables"]
    assert list(table["accuracy"]["pets"]) == ["Fine-tuning", "L2-SP", "DTNH(L2-SP)", "KnowDist", "DTNH(KnowDist)"]
    assert table["source"] == "Places"
    folds = list((tmp_path / "cross-validation" / "Places" / "pets").glob("*/*/fold?of2/result.json"))
    assert len(folds) == 4 * 2 * 2
    assert all(f"{files.read_json(path)['run']['coefficient']:g}" == path.parent.parent.name for path in folds)


def test_the_grid_is_what_is_given(train, tmp_path):
    code, output = train("--method", "l2-sp", "--cross-validate", "--grid", "0.25, 0.5", "--folds", 2, "--steps", 1)
    assert code == 0, output
    places = (tmp_path / "cross-validation" / "places" / "pets" / "L2-SP").iterdir()
    assert sorted(path.name for path in places) == ["0.25", "0.5"]


def test_options_reach_the_configuration(train, tmp_path):
    code, output = train(
        *("--method", "know-dist", "--layers", "layer1.0.conv1,layer2", "--head", "fc", "--measure", "--seed", 3),
        *("--head-decay", 0.5, "--coefficient-decay", 0.5, "--drop-at", 0.25, "--scope", "tensor", "--anchored-only"),
        *("--precision", "bfloat16", "--coefficient", 1e-4, "--model", "torchvision/resnet34"),
    )
    assert code == 0, output
    run = files.read_json(tmp_path / "results.json")["runs"][0]["run"]
    expected = {
        "method": "know-dist",
        "layers": ["layer1.0.conv1", "layer2"],
        "head": ["fc"],
        "measure": True,
        "seed": 3,
        "head_decay": 0.5,
        "coefficient_decay": 0.5,
        "drop_at": 0.25,
        "scope": "tensor",
        "anchored_only": True,
        "precision": "bfloat16",
        "coefficient": 1e-4,
        "model": "torchvision/resnet34",
    }
    assert {name: run[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--method", "l3"],
            "method must be one of fine-tuning, l2, l2-sp, know-dist, delta, attention-transfer, got 'l3'",
        ),
        (["--model", "resnet19"], "model must be a name of timm or torchvision, got 'resnet19'"),
        (["--method", "l3", "--dtnh"], "method must be one of fine-tuning"),
        (["--source", "nowhere.pth"], "error: nowhere.pth: No such file or directory"),
        (["--method", "l2-sp", "--coefficient", "1", "--cross-validate"], "exclude one another"),
        (["--method", "paper", "--coefficient", "1"], "coefficient is of one regularizer, got 2: know-dist, l2-sp"),
        (["--coefficient", "1"], "coefficient means nothing for Fine-tuning, got 1.0"),
        (["--cross-validate"], "method fine-tuning has no coefficient"),
        (["--method", "l2-sp", "--grid", "1,2"], "grid is what cross-validate chooses from"),
        (
            ["--method", "l2-sp", "--cross-validate", "--grid", "1,x"],
            "grid must be numbers such as 0.01,0.1, got '1,x'",
        ),
        (["--method", "paper", "--dtnh"], "method paper is all five columns"),
        (["--dtnh"], "dtnh means nothing for Fine-tuning, got True"),
        (["--method", "l2", "--method", "l2-sp", "--layers", "layer1"], "layers means nothing for L2, L2-SP, got"),
        (["--method", "delta", "--dtnh", "--parameters", "all"], "parameters means nothing for DTNH(DELTA), got 'all'"),
        (["--scope", "tensor"], "scope means nothing for Fine-tuning, got 'tensor'"),
        (["--method", "know-dist", "--scope", "group"], "scope means nothing for KnowDist, got 'group'"),
        (["--method", "attention-transfer", "--anchored-only"], "anchored_only means nothing for AT, got True"),
        (["--coefficient-decay", "0.3"], "coefficient_decay means nothing for Fine-tuning, got 0.3"),
        (["--method", "l2", "--head-decay", "0.3"], "head_decay means nothing for L2, got 0.3"),
        (["--method", "l2-sp", "--measure"], "measure means nothing for L2-SP, got True"),
        (["--method", "know-dist", "--dtnh", "--measure"], "measure means nothing for DTNH(KnowDist), got True"),
        (["--head", "nonsense"], "head: no parameter of Tiny starts with 'nonsense'; it has conv1, layer1"),
        (["--method", "know-dist", "--layers", "layer9"], "layer9"),
        (["--method", "l2-sp", "--head", "classifier"], "classifier"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--train-per-class", "2"], "train_per_class and test_per_class are for a folder without train and test"),
        (["--device", "tpu9"], "device must be auto, cpu, cuda or cuda:<index>, got 'tpu9'"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence(train, arguments, message):
    code, output = train(*arguments)
    assert code == 1
    assert output.startswith("error: ")
    assert message in output
    assert "Traceback" not in output


def test_folders_that_are_no_target(weights, tmp_path):
    options = ["--source", weights, "--device", "cpu", "--out", tmp_path / "out"]
    code, output = call("train", tmp_path / "nowhere", *options)
    assert code == 1
    assert "nowhere is missing" in output
    for part in ("train", "test"):
        (tmp_path / "one" / part / "cat").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "one" / part / "cat" / "0.png")
    code, output = call("train", tmp_path / "one", *options)
    assert code == 1
    assert "at least two; it has cat" in output


def test_the_options_have_the_configurations_defaults():
    parameters = {p.name: p.default for p in inspect.signature(transfer.train).parameters.values()}
    config = transfer.DEFAULTS
    names = {"lr": "learning_rate", "method": None, "scope": None, "precision": None, "layers": None, "head": None}
    for name in set(parameters) & (set(vars(config)) | set(names)):
        field = names.get(name, name)
        if field is not None:
            assert parameters[name] == getattr(config, field), name
    assert parameters["method"] == [config.method]
    assert (parameters["scope"].value, parameters["precision"].value) == (config.scope, config.precision)
    assert parameters["repeats"] == 5


def test_the_demo_command_runs_the_plan_and_shows_its_tables(monkeypatch, tmp_path):
    table = protocol.Table("letters", ("digits",), ("Fine-tuning",), {("digits", "Fine-tuning", 0): 0.25})
    monkeypatch.setattr(demo, "run", lambda out, todo: [table] if (out, todo) == (tmp_path, (3, True)) else [])
    monkeypatch.setattr(demo, "plan", lambda seeds, quick: (seeds, quick))
    code, output = call("demo", "--out", tmp_path, "--seeds", 3, "--quick")
    assert code == 0, output
    assert "Source letters" in output
    assert "25.00" in output
    assert str(tmp_path / "report.html") in output

    def fail(out, todo):
        raise ValueError("of another configuration")

    monkeypatch.setattr(demo, "run", fail)
    assert call("demo", "--out", tmp_path) == (1, "error: of another configuration ")
