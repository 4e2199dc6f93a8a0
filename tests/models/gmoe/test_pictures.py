import numpy as np
import pytest
import torch
from PIL import Image
from toy_domains import dense_net, sparse_net, toy_domains

from moe_kernels.models import figures
from moe_kernels.models.data import digits
from moe_kernels.models.gmoe import create, pictures


def read(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(float) / 255


def colored(picture: np.ndarray, color: tuple[float, float, float]) -> int:
    """How many pixels have a color."""
    return int((np.abs(picture - np.array(color)).max(-1) < 0.01).sum())


def result(model: str, domain: str, trial: int, test: list[float]) -> dict:
    history = [{"step": 10 * i, "test": value, "validation": value / 2} for i, value in enumerate(test)]
    return {"run": {"model": model, "held_out": [domain], "trial": trial}, "history": history}


def test_curves_show_every_model(tmp_path):
    results = [
        result(model, domain, trial, [0.1, height + 0.1 * trial, 0.5])
        for model, height in (("dense", 0.2), ("sparse", 0.6))
        for domain in ("x", "y")
        for trial in (0, 1)
    ]
    pictures.plot_curves(results, tmp_path / "curves.png")
    picture = read(tmp_path / "curves.png")
    for color in figures.colors(2):
        assert colored(picture, color) > 100
    assert picture.shape[1] > picture.shape[0]


def test_curves_of_an_unfinished_table(tmp_path):
    results = [result("dense", "x", 0, [0.1, 0.2]), result("sparse", "y", 0, [0.3, 0.2])]
    pictures.plot_curves(results, tmp_path / "curves.png")
    assert read(tmp_path / "curves.png").std() > 0.05


def test_domains(tmp_path):
    pictures.plot_domains(toy_domains(), tmp_path / "domains.png")
    assert read(tmp_path / "domains.png").std() > 0.05


def test_patches_are_given_to_the_expert_that_the_layer_chose():
    model, data = sparse_net(), toy_domains()
    images = torch.stack([data.evaluation[0][index][0] for index in range(5)])
    model.train()
    chosen = pictures.patch_experts(model, images)
    assert model.training
    assert list(chosen) == ["layer"]
    assert chosen["layer"].shape == (5, 2, 2)
    model.eval()
    model(images)
    assert torch.equal(chosen["layer"].flatten(), model.layer.last_routing.experts[:, 0])


def test_tokens_that_are_no_patches_are_left_out():
    model = create("gmoe_digits", num_classes=10).eval()
    images = torch.stack([digits.load().evaluation[0][index][0] for index in range(2)])
    chosen = pictures.patch_experts(model, images)
    rows, columns = model.patch_embed.grid_size
    assert len(chosen) == 2
    for name, experts in chosen.items():
        assert experts.shape == (2, rows, columns)
        tokens = model.get_submodule(name).last_routing.experts[:, 0].view(2, -1)
        assert torch.equal(experts.flatten(1), tokens[:, 1:])


def test_a_dense_model_has_no_routing():
    with pytest.raises(ValueError, match="must have an MoE layer, ToyNet has none"):
        pictures.patch_experts(dense_net(), torch.zeros(1, 3, 8, 8))


def test_routing_tints_each_patch_in_its_expert_s_color():
    picture = np.zeros((4, 4, 3), np.uint8)
    colors = np.array([[[1, 0, 0], [0, 1, 0]], [[0, 0, 1], [1, 1, 1]]], float)
    tinted = pictures._tinted(picture, colors)
    assert tinted.shape == (4, 4, 3)
    for row in range(4):
        for column in range(4):
            np.testing.assert_allclose(tinted[row, column], 0.55 * colors[row // 2, column // 2])


def test_routing_shows_every_expert_that_is_used(tmp_path):
    torch.manual_seed(1)
    model, data = sparse_net(), toy_domains()
    pictures.plot_routing(model, data, tmp_path / "routing.png", title="a title")
    picture = read(tmp_path / "routing.png")
    for color in figures.colors(3):
        # in the legend at least
        assert colored(picture, color) > 50
