"""Regularizers towards features: knowledge distillation, DELTA and attention transfer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import distributed
from .architectures import Head, check_layers, find_stages, unwrap
from .features import Features
from .regularizer import Regularizer


class NotFinite(ValueError):
    """A loss by which nothing can be weighed."""


class _Compared(NamedTuple):
    student: Features
    teacher: nn.Module
    reference: Features  # of the teacher


class FeatureRegularizer(Regularizer):
    """Ω compares features of the model with those that the source gives for the same inputs.

    The source is a frozen copy in eval mode (running statistics, no dropout) that no ``model.train()`` reaches; its
    forward runs in ``penalty``, under the student's autocast. Distances are float32, float64 for float64 features.
    No host synchronization.

    Layers give (B, C, H, W) maps or, from linear layers and transformer blocks, tokens (B, N, D), of which D
    are the channels. B is the rank's batch, so that DDP's mean over ranks is Ω of all. With activation
    checkpointing (``use_reentrant=False``; the other kind is refused) call ``penalty`` before the backward.

    Args:
        coefficient, head, head_decay: as in :class:`Regularizer`.
        layers: module names; by default those of
            :func:`~moe_kernels.models.transfer.architectures.find_stages`.
    """

    uses_features = True

    def __init__(
        self,
        coefficient: float,
        *,
        layers: Sequence[str] | None = None,
        head: Head = None,
        head_decay: float = 0.01,
    ) -> None:
        super().__init__(coefficient, head=head, head_decay=head_decay)
        if isinstance(layers, str):
            raise TypeError(f"layers: expected a sequence of module names, got the string {layers!r}")
        self._given_layers = None if layers is None else tuple(layers)
        self._compared: _Compared | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that are compared."""
        return self._pair().student.layers

    def penalty(self) -> Tensor:
        """Ω of the last forward that kept gradients, a scalar with gradients. Once a forward, before its backward.

        Raises:
            RuntimeError: there was none since the last call, or what :meth:`Features.take` refuses.
            ValueError: a layer's features have another shape than the source's.
        """
        model = self._bound()
        student, teacher, reference_features = self._pair()
        forward = student.take()
        device, dtype = forward.autocast or (next(teacher.parameters()).device.type, None)
        with torch.no_grad(), torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            teacher(*forward.args, **forward.kwargs)
        reference = reference_features.take().outputs
        terms = []
        for name, output in forward.outputs.items():
            if output.shape != reference[name].shape:
                shapes = f"{tuple(output.shape)}, those of the source {tuple(reference[name].shape)}"
                raise ValueError(f"layers: features of {name} have shape {shapes}")
            channels = _channel_dim(model.get_submodule(name), output)
            # float32 operands: autocast lowers none of the operations that distances are made of
            terms.append(self.distance(name, _real(output), _real(reference[name]), channels))
        return torch.stack(terms).sum()

    def identity(self) -> dict[str, Any]:
        layers = None if self._given_layers is None else list(self._given_layers)
        return {**super().identity(), "layers": layers}

    def close(self) -> None:
        super().close()
        if self._compared is not None:
            self._compared.student.close()
        self._compared = None

    def prepare(self, model: nn.Module, source: nn.Module) -> None:
        if not any(weight.requires_grad for name, weight in model.named_parameters() if name not in self._head):
            raise ValueError(f"model: {type(model).__name__} has no trainable parameters outside the head")
        layers = self._layers(model, source) if self._given_layers is None else self._given_layers
        check_layers(model, layers)
        check_layers(source, layers, "layers of the source")
        for name in layers:
            ours, theirs = (
                [tuple(weight.shape) for weight in side.get_submodule(name).parameters()] for side in (model, source)
            )
            if ours != theirs:
                raise ValueError(f"layers: {name} has parameters of shapes {ours}, in the source {theirs}")
        teacher = copy.deepcopy(source).requires_grad_(False).eval()
        teacher.zero_grad(set_to_none=True)
        self._compared = _Compared(Features(model, layers), teacher, Features(teacher, layers, needs_grad=False))

    def _pair(self) -> _Compared:
        self._bound()
        assert self._compared is not None
        return self._compared

    def _layers(self, model: nn.Module, source: nn.Module) -> tuple[str, ...]:
        """The layers that both have by default."""
        ours, theirs = (self._default_layers(side) for side in (model, source))
        if ours != theirs:
            raise ValueError(
                f"layers: by default those of {type(model).__name__} are {', '.join(ours)}, those of the source "
                f"{', '.join(theirs)}; pass the names of layers that correspond"
            )
        return ours

    def _default_layers(self, model: nn.Module) -> tuple[str, ...]:
        return tuple(stage.kernel for stage in find_stages(model))

    def distance(self, name: str, student: Tensor, teacher: Tensor, channels: int) -> Tensor:
        """The term of one layer, a scalar.

        Args:
            name: the layer's.
            student, teacher: features of one shape, float32 or float64, the teacher's without gradients.
            channels: which of their dimensions is that of the channels.
        """
        raise NotImplementedError


class KnowledgeDistillation(FeatureRegularizer):
    """Eq. 3 of DTNH: Ω = 1/n Σ_j Σ_i ‖F_j(w, x_i) − F_j(w_s, x_i)‖², over n images and all filters j of the layers.

    The ``fea_map`` of DELTA's published code is ½ Σ_j Σ_i: its α is 2λ/n.
    """

    name = "know-dist"

    def distance(self, name: str, student: Tensor, teacher: Tensor, channels: int) -> Tensor:
        return F.mse_loss(student, teacher, reduction="sum") / student.shape[0]


class DELTA(FeatureRegularizer):
    """Feature distance weighted by what each channel is worth for the target: Li et al. 2019, arXiv 1901.09229.

    Ω = 1/n Σ_l C_l/(H_l W_l) Σ_i Σ_c a_lc ‖F_lc(w, x_i) − F_lc(w_s, x_i)‖², with Σ_c a_lc = 1: equal weights give the
    squared distance per position. The published code has ½ in the place of 1/n: its α is 2λ/n. The weights a come
    from :meth:`estimate`, after the head was trained alone (the published code: 10 epochs), or a state dict.
    """

    name = "delta"

    def __init__(
        self,
        coefficient: float,
        *,
        layers: Sequence[str] | None = None,
        head: Head = None,
        head_decay: float = 0.01,
    ) -> None:
        super().__init__(coefficient, layers=layers, head=head, head_decay=head_decay)
        self._weights: dict[str, Tensor] = {}

    @property
    def needs_estimate(self) -> bool:
        return not self._weights

    @torch.no_grad()
    def estimate(
        self,
        model: nn.Module,
        batches: Iterable[tuple[Tensor, Tensor]],
        loss: Callable[[Any, Tensor], Tensor],
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Weigh each channel by how much the loss grows without it.

        a = softmax(z / 5), z the standardized (population variance) mean over batches of the loss in eval mode with the
        channel set to zero minus the loss as it is. Where every channel is worth the same the weights are equal.
        The published code sets the filter's weights to zero, which leaves a bias, where there is one, standing.
        One forward per batch, layer and channel. Ranks share their results, so that all have the same weights.

        Args:
            model: the bound model, its head trained. It is left as it was.
            batches: (inputs, targets) on the model's device; the published code takes 4 of 64.
            loss: of (outputs, targets), a scalar.
            progress: called with the forwards done and all there are.

        Raises:
            ValueError: no batches; :class:`NotFinite`: a loss that is not finite.
        """
        self._bound()
        model, batches = unwrap(model), list(batches)
        if not batches:
            raise ValueError("batches: expected at least one batch, got none")
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            growth = self._growth(model, batches, loss, progress)
        finally:
            for module, training in modes.items():
                module.training = training
        if not all(values.isfinite().all() for values in growth.values()):
            raise NotFinite("loss: it is not finite on these batches, so that no channel can be weighed")
        self._weights = {name: _attention(values) for name, values in growth.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"weights": dict(self._weights)} if self._weights else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        device = next(self._bound().parameters()).device
        weights = state.get("weights", {})
        if set(state) - {"weights"} or (weights and set(weights) != set(self.layers)):
            got = ", ".join(weights) if "weights" in state else ", ".join(map(repr, state))
            raise ValueError(f"state: expected weights of {', '.join(self.layers)}, got {got}")
        self._weights = {name: values.to(device) for name, values in weights.items()}

    def close(self) -> None:
        super().close()
        self._weights = {}

    def _growth(
        self,
        model: nn.Module,
        batches: list[tuple[Tensor, Tensor]],
        loss: Callable[[Any, Tensor], Tensor],
        progress: Callable[[int, int], None] | None,
    ) -> dict[str, Tensor]:
        """Layer → (C,) float64: the mean growth of the loss without each channel."""
        sums: dict[str, Tensor] = {}
        done = 0
        for inputs, targets in batches:
            with Features(model, self.layers, needs_grad=False) as features:
                whole = loss(model(inputs), targets).double()
                outputs = features.take().outputs
            dims = {name: _channel_dim(model.get_submodule(name), output) for name, output in outputs.items()}
            total = len(batches) * (1 + sum(outputs[name].shape[dim] for name, dim in dims.items()))
            done += 1
            for name, dim in dims.items():
                channels = outputs[name].shape[dim]
                growth = sums.setdefault(name, whole.new_zeros(channels))
                for channel in range(channels):
                    handle = model.get_submodule(name).register_forward_hook(_without(dim, channel))
                    try:
                        growth[channel] += loss(model(inputs), targets).double() - whole
                    finally:
                        handle.remove()
                    done += 1
                    if progress is not None:
                        progress(done, total)
        count = distributed.sum_(whole.new_tensor(len(batches)))
        return {name: distributed.sum_(growth) / count for name, growth in sums.items()}

    def distance(self, name: str, student: Tensor, teacher: Tensor, channels: int) -> Tensor:
        if self.needs_estimate:
            raise RuntimeError("delta: estimate(model, batches, loss) or load_state_dict comes before penalty()")
        weights, count = self._weights[name], student.shape[channels]
        if weights.shape != (count,):
            raise ValueError(
                f"state: weights of {name} have shape {tuple(weights.shape)}, its features {count} channels"
            )
        others = [dim for dim in range(student.ndim) if dim != channels]
        distances = (student - teacher).square().sum(others)
        # positions · n = all elements of one channel
        return (weights.to(distances.dtype) * distances).sum() * (count * count / student.numel())


class AttentionTransfer(FeatureRegularizer):
    """Distance of attention maps: Zagoruyko and Komodakis 2017, arXiv 1612.03928.

    Ω = 1/n Σ_l Σ_i ‖Q_l(w, x_i)/‖Q_l(w, x_i)‖ − Q_l(w_s, x_i)/‖Q_l(w_s, x_i)‖‖², Q the sum of squares over channels,
    a vector over positions. The paper weighs the norms, not squared, by β/2; its code the squares, as here, averaged
    over positions too: its β is P·λ for maps of P positions. The default layers are the outputs of the stages, as
    there.
    """

    name = "attention-transfer"

    def _default_layers(self, model: nn.Module) -> tuple[str, ...]:
        return tuple(stage.output for stage in find_stages(model))

    def distance(self, name: str, student: Tensor, teacher: Tensor, channels: int) -> Tensor:
        if student.ndim < 3:
            raise ValueError(
                f"layers: features of {name} have shape {tuple(student.shape)}, without positions to attend"
            )
        ours, theirs = (F.normalize(side.square().sum(channels).flatten(1), dim=1) for side in (student, teacher))
        return (ours - theirs).square().sum() / student.shape[0]


def _channel_dim(module: nn.Module, output: Tensor) -> int:
    """The dimension of the channels: 1 of maps, the last of tokens and vectors."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return 1
    return 1 if output.ndim >= 4 and not isinstance(module, nn.Linear) else output.ndim - 1


def _real(features: Tensor) -> Tensor:
    return features if features.dtype is torch.float64 else features.float()


def _without(dim: int, channel: int) -> Callable[..., Tensor]:
    """A forward hook that sets one channel of the output to zero."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output.select(dim, channel).zero_()
        return output

    return hook


def _attention(growth: Tensor) -> Tensor:
    """softmax(z / 5) of the standardized ``growth``, float32."""
    centred = growth - growth.mean()
    deviation = centred.square().mean().sqrt()
    z = torch.where(deviation > 0, centred / deviation, 0.0)
    return torch.softmax(z / 5, dim=0).float()
