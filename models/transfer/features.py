"""Outputs of chosen modules, collected by forward hooks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .architectures import check_layers, unwrap


class Forward(NamedTuple):
    """One forward of a model.

    Attributes:
        args, kwargs: what the model was called with.
        outputs: layer name → the tensor that the layer gave, with its gradient's history.
        autocast: the device type and the dtype of autocast in it, ``None`` where it was off.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: dict[str, Tensor]
    autocast: tuple[str, torch.dtype] | None


class Features:
    """Collects the outputs of ``layers`` in the last forward of ``model``. A context manager that removes its hooks.

    Only what happens between the entry and the end of the model's own forward counts, so that the second forward
    of activation checkpointing does not. A layer that the next module changes in place (VGG's convolutions, behind
    which stands ``ReLU(inplace=True)``) hands that module a copy.

    ``DistributedDataParallel`` and ``torch.compile`` may wrap the model, before or after. Under ``torch.compile``
    the hooks must be there before the first call (it does not look for new ones), and the collected tensors
    are outputs of the compiled graph. A copy or a pickle of the model has no working hooks.

    Args:
        model: the model, called as a whole: methods of it, such as ``forward_features``, are not seen.
        layers: names of its modules. Each must be called once in a forward and give a tensor.
        needs_grad: forwards under ``no_grad`` do not count.

    Raises:
        ValueError: a layer that the model does not have, with the nearest names; the same twice; none.
        TypeError: one string, or ``nn.DataParallel``.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], *, needs_grad: bool = True) -> None:
        model = unwrap(model)
        check_layers(model, layers)
        self.layers = tuple(layers)
        self.needs_grad = needs_grad
        self._kind = type(model).__name__
        self._open = False
        self._forward: Forward | None = None
        self._calls: dict[str, int] = {}
        self._versions: dict[str, int] = {}
        self._handles = [
            model.register_forward_pre_hook(_Hook(self._begin), with_kwargs=True, prepend=True),
            model.register_forward_hook(_Hook(self._end)),
        ]
        followed = _followed_in_place(model)
        for name in self.layers:
            module = model.get_submodule(name)
            hook = _Hook(self._collector(name, copy=module in followed))
            self._handles.append(module.register_forward_hook(hook))

    def take(self) -> Forward:
        """The last forward, which is then forgotten.

        Raises:
            RuntimeError: there was none since the last call; a layer was not called in it, or more than once, or
                without gradients (reentrant activation checkpointing does that), or was changed in place later.
            TypeError: a layer's output is no tensor.
        """
        forward, self._forward = self._forward, None
        if forward is None:
            grad = " that keeps gradients" if self.needs_grad else ""
            raise RuntimeError(f"no forward of {self._kind}{grad} since its features were last taken")
        for name in self.layers:
            calls = self._calls.get(name, 0)
            if calls != 1:
                raise RuntimeError(f"layer {name!r} was called {calls} times in one forward, expected once")
            output = forward.outputs.get(name)
            if output is None:
                raise RuntimeError(
                    f"layer {name!r} was run without gradients in a forward that keeps them: activation checkpointing "
                    "must have use_reentrant=False"
                )
            if not isinstance(output, Tensor):
                raise TypeError(f"layer {name!r}: expected a tensor as its output, got {type(output).__name__}")
            if name in self._versions and output._version != self._versions[name]:
                raise RuntimeError(
                    f"layer {name!r}: its output was changed in place later in the forward; choose another layer, or "
                    "set inplace=False in what follows it"
                )
        return forward

    def close(self) -> None:
        """Remove the hooks and forget what was collected."""
        for handle in self._handles:
            handle.remove()
        self._forward, self._open = None, False

    def __enter__(self) -> Features:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._open = torch.is_grad_enabled() or not self.needs_grad
        if self._open:
            device = next((parameter.device.type for parameter in module.parameters()), "cpu")
            autocast = (device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
            self._forward = Forward(args, kwargs, {}, autocast)
            self._calls = {}
            self._versions = {}

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._open = False

    def _collector(self, name: str, copy: bool) -> Any:
        def collect(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if not self._open or self._forward is None:
                return None
            self._calls[name] = self._calls.get(name, 0) + 1
            if self.needs_grad and not torch.is_grad_enabled():
                return None
            self._forward.outputs[name] = output
            if not isinstance(output, Tensor):
                return None
            compiling = torch.compiler.is_compiling()
            # neither a compiled graph nor inference mode has versions
            if not compiling and not output.is_inference():
                self._versions[name] = output._version
            return output.clone() if copy or compiling else None

        return collect


class _Hook:
    """A hook that copies and pickles of the model do not carry on: they would write into the original's record."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __reduce__(self) -> Any:
        return _Hook, (_nothing,)


def _nothing(*_: Any) -> None:
    return None


def _followed_in_place(model: nn.Module) -> set[nn.Module]:
    """Members of ``nn.Sequential`` whose successor works in place."""
    found = set()
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            found |= {first for first, then in itertools.pairwise(module) if getattr(then, "inplace", False)}
    return found
