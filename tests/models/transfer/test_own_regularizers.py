"""A regularizer of a user's own in the place of a method."""

from dataclasses import replace

import pytest
from toy_transfer import CONFIG, FELT, Interrupted, batch_norm_net, config, interrupt_after, pretrained, toy_target

from moe_kernels.models.transfer.regularizers import L2SP, FeatureRegularizer, Regularizer
from moe_kernels.models.transfer.trainer import finetune

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtnh", [False, True])
def test_a_regularizer_object_is_a_method(tmp_path, dtnh):
    named = finetune(batch_norm_net, toy_target(), config("l2-sp", dtnh), tmp_path / "named")
    asked = replace(CONFIG, method=L2SP(FELT["l2-sp"]), dtnh=dtnh)
    given = finetune(batch_norm_net, toy_target(), asked, tmp_path / "given")
    assert given["history"] == named["history"]
    assert (given["run"]["method"], given["run"]["coefficient"]) == ("l2-sp", FELT["l2-sp"])
    assert given["run"]["regularizer"] == {
        "class": "moe_kernels.models.transfer.weight_space.L2SP",
        **asked.method.identity(),
    }
    assert finetune(batch_norm_net, toy_target(), asked, tmp_path / "given") == given
    other = replace(asked, method=L2SP(FELT["l2-sp"], parameters="all"))
    with pytest.raises(ValueError, match=r"regularizer\.parameters: 'kernels' there, 'all' here"):
        finetune(batch_norm_net, toy_target(), other, tmp_path / "given")


class Norms(FeatureRegularizer):
    """One of a user's own, on features."""

    name = "norms"

    def distance(self, name, student, teacher, channels):
        return (student.flatten(1).norm(dim=1) - teacher.flatten(1).norm(dim=1)).square().mean()


class Pull(Regularizer):
    """One of a user's own that gives Ω itself, of the weights of one layer."""

    name = "pull"
    uses_features = True

    def prepare(self, model, source):
        self.weight, self.start = model.conv1.weight, source.conv1.weight.detach().clone()

    def penalty(self):
        return (self.weight - self.start).square().sum()


@pytest.mark.parametrize("kind", [Norms, Pull])
def test_a_regularizer_of_ones_own_trains_with_and_without_dtnh(tmp_path, kind):
    # an interrupted run with an object goes on as any
    for dtnh in (False, True):
        asked = replace(CONFIG, method=kind(0.5), dtnh=dtnh)
        with pytest.raises(Interrupted):
            finetune(
                pretrained, toy_target(), asked, tmp_path / f"{dtnh}", checkpoint_share=1e9, on_step=interrupt_after(3)
            )
        found = finetune(pretrained, toy_target(), asked, tmp_path / f"{dtnh}")
        assert found == finetune(pretrained, toy_target(), asked, tmp_path / f"{dtnh} whole")
        assert (found["run"]["method"], found["run"]["coefficient"]) == (kind.name, 0.5)
        assert found["final"]["regularizer"] > 0
        assert (found["final"]["angle_to_loss"] is not None) == dtnh
        without = finetune(pretrained, toy_target(), replace(asked, coefficient=0.0), tmp_path / f"{dtnh} without")
        assert without["final"]["regularizer"] > found["final"]["regularizer"]
