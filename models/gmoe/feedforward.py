"""Finding the feed-forward networks (FFNs) of a vision transformer and reading what each one computes.

A block's FFN is understood when it is fc2(dropout(φ(fc1 x))), with an optional dropout after it. Names are
not trusted: a copy of the FFN runs once, the order in which its parts are called is read, and its output is
compared with that of those parts in a chain. Two layouts are known:

- ``block.mlp`` (or ``.ffn``, ``.feed_forward``), one module of width d to d: timm, torchvision, transformers;
- ``block.intermediate`` and ``block.output.dense``: BERT's layout, as some models of transformers have it.
"""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_kernels.nn import MoE

_FFN_NAMES = ("mlp", "ffn", "feed_forward")

# By class name with its module, so that no library has to be imported to be recognised. Subclasses do not
# count: they may compute something else.
_ACTIVATION_CLASSES = {
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.SiLU": "silu",
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
    "timm.layers.activations.QuickGELU": "quick_gelu",
    "timm.layers.activations.Swish": "silu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.FastGELUActivation": "gelu_tanh",
    "transformers.activations.AccurateGELUActivation": "gelu_tanh",
    "transformers.activations.QuickGELUActivation": "quick_gelu",
    "transformers.activations.SiLUActivation": "silu",
}
_ACTIVATION_FUNCTIONS = ((F.gelu, "gelu"), (F.relu, "relu"), (torch.relu, "relu"), (F.silu, "silu"))


@dataclass(frozen=True)
class FeedForward:
    """The FFN of one block: output_dropout(fc2(dropout(φ(fc1 x)))).

    Attributes:
        fc1, fc2: its linear layers, d → h and h → d.
        activation: φ by the name that :class:`moe_kernels.nn.MoE` gives it.
        dropout, output_dropout: probabilities after φ and after fc2.
        training: the mode it is in.
        slots: (parent, attribute) pairs. The first takes the replacement, the others become identities.
    """

    fc1: nn.Linear
    fc2: nn.Linear
    activation: str
    dropout: float
    output_dropout: float
    training: bool
    slots: tuple[tuple[nn.Module, str], ...]

    def replace(self, layer: nn.Module) -> None:
        """Put ``layer`` where the FFN stands."""
        (parent, attribute), *others = self.slots
        setattr(parent, attribute, layer)
        for parent, attribute in others:
            setattr(parent, attribute, nn.Identity())


def find_blocks(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """The transformer blocks of ``model`` in order, and the name of the list that holds them.

    Raises:
        ValueError: there is no list of blocks, or more than one (a model with two towers).
    """
    found = {
        name: list(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) and all(_slots(block) for block in module)
    }
    kind = type(model).__name__
    if not found:
        names = ", ".join(f".{name}" for name in _FFN_NAMES)
        raise ValueError(
            f"model: no transformer blocks found in {kind}; looked for a ModuleList or Sequential whose "
            f"every member has its feed-forward network as {names}, or as .intermediate and .output.dense"
        )
    if len(found) > 1:
        raise ValueError(
            f"model: {kind} has {len(found)} lists of transformer blocks ({', '.join(found)}); "
            "pass the part of it that holds the wanted one, for instance model.vision_model"
        )
    return next(iter(found.items()))


def read_ffn(block: nn.Module, name: str) -> FeedForward:
    """What the FFN of ``block`` computes; ``name`` is what messages call the block.

    Raises:
        ValueError: it is a mixture of experts already, or not a plain FFN of two ``nn.Linear``: gated, a norm
            inside, an unknown activation or part. The message names the block and the reason.
    """
    slots = _slots(block)
    ffn, *outer = (getattr(parent, attribute) for parent, attribute in slots)
    where = f"{name}.{slots[0][1]} ({type(ffn).__name__}) cannot be converted"
    if isinstance(ffn, MoE):
        raise ValueError(f"{where}: it is a mixture of experts already")
    try:
        parts = _parts(ffn, outer)
    except _NotPlainError as reason:
        raise ValueError(f"{where}: {reason}") from None
    fc1, fc2 = (part.run for part in parts if isinstance(part.run, nn.Linear))
    second = next(i for i, part in enumerate(parts) if part.run is fc2)
    return FeedForward(
        fc1=fc1,
        fc2=fc2,
        activation=parts[1].kind,
        dropout=_combined_dropout(parts[:second]),
        output_dropout=_combined_dropout(parts[second:]),
        training=ffn.training,
        slots=slots,
    )


class _NotPlainError(Exception):
    """Why an FFN is not fc2(dropout(φ(fc1 x)))."""


class _Part(NamedTuple):
    kind: str  # "linear", "dropout" or the name of an activation
    run: Callable[[Tensor], Tensor]


def _slots(block: nn.Module) -> tuple[tuple[nn.Module, str], ...]:
    """Where the FFN of ``block`` stands; empty when it has none."""
    for name in _FFN_NAMES:
        if isinstance(getattr(block, name, None), nn.Module):
            return ((block, name),)
    output = getattr(block, "output", None)
    has_intermediate = isinstance(getattr(block, "intermediate", None), nn.Module)
    if has_intermediate and isinstance(output, nn.Module) and hasattr(output, "dense"):
        return ((block, "intermediate"), (output, "dense"))
    return ()


def _parts(ffn: nn.Module, outer: list[nn.Module]) -> list[_Part]:
    """The parts of ``ffn`` in the order they are called, identities left out, and then those of ``outer``."""
    children = dict(ffn.named_children())
    linears = [module for module in [*children.values(), *outer] if isinstance(module, nn.Linear)]
    if len(linears) > 2 or (len(linears) == 2 and linears[0].out_features != linears[1].in_features):
        shapes = ", ".join(f"{linear.in_features} → {linear.out_features}" for linear in linears)
        raise _NotPlainError(f"it is gated or deeper than fc2(φ(fc1 x)): its linear layers are {shapes}")
    known = {name: _part(name, module) for name, module in children.items()}
    if len(linears) < 2:
        raise _NotPlainError(f"it has {len(linears)} nn.Linear, expected 2")
    x, output, called = _run_copy(ffn, widths={linear.in_features for linear in linears})
    parts = [part for name in called if (part := known[name]) is not None]
    if all(part.kind in ("linear", "dropout") for part in parts):
        # the activation is no module: it may be an attribute that holds a function
        parts[1:1] = [_Part(kind, value) for value in vars(ffn).values() if (kind := _function_kind(value))]
    inner = len(parts)
    parts += [part for module in outer if (part := _part("output.dense", module)) is not None]
    order = " → ".join(part.kind for part in parts)
    if not re.fullmatch(r"linear → (?!linear|dropout)\w+( → dropout)* → linear( → dropout)*", order):
        raise _NotPlainError(f"expected linear → activation → linear, with dropout at most, got {order}")
    expected = _chain(parts[:inner], x)
    # Both are the same operations: a difference beyond rounding means that more than the parts is computed.
    if not x.is_meta and float((output - expected).abs().max()) > 1e-4 * float(expected.abs().max()):
        raise _NotPlainError("it computes something else than its parts one after the other")
    return parts


def _part(name: str, module: nn.Module) -> _Part | None:
    """The part that ``module`` is, ``None`` for an identity."""
    kind = type(module)
    if kind is nn.Identity:
        return None
    if kind is nn.Linear:
        return _Part("linear", module)
    if kind is nn.Dropout:
        return _Part("dropout", module)
    if isinstance(module, nn.GELU) and kind is nn.GELU:
        return _Part("gelu" if module.approximate == "none" else "gelu_tanh", module)
    if activation := _ACTIVATION_CLASSES.get(f"{kind.__module__}.{kind.__qualname__}"):
        return _Part(activation, module)
    if "norm" in kind.__name__.lower():
        raise _NotPlainError(f"it has a norm inside, {name} ({kind.__name__}), and an expert has none")
    raise _NotPlainError(
        f"{name} ({kind.__name__}) is not nn.Linear, nn.Dropout or a known activation "
        "(exact, tanh and quick GELU, ReLU, SiLU)"
    )


def _function_kind(value: object) -> str | None:
    """The activation that an attribute holds as a function."""
    if isinstance(value, functools.partial) and value.func is F.gelu and not value.args:
        return {"tanh": "gelu_tanh", "none": "gelu"}.get(value.keywords.get("approximate", "none"))
    return next((name for function, name in _ACTIVATION_FUNCTIONS if value is function), None)


def _float32(device: torch.device) -> AbstractContextManager[object]:
    """No gradients, and no autocast where there is one."""
    stack = ExitStack()
    stack.enter_context(torch.no_grad())
    if device.type != "meta":
        stack.enter_context(torch.autocast(device.type, enabled=False))
    return stack


def _run_copy(ffn: nn.Module, widths: set[int]) -> tuple[Tensor, Tensor, list[str]]:
    """Four rows x, what a copy of ``ffn`` makes of them in eval mode, and its children in calling order."""
    copied = copy.deepcopy(ffn).float().eval()
    device = next(copied.parameters()).device
    called: list[str] = []
    for name, child in copied.named_children():
        child.register_forward_hook(lambda *_, name=name: called.append(name))
    # which of its linear layers comes first is not known yet, so that either width may be the one it takes
    for width in sorted(widths):
        x = torch.arange(4 * width, dtype=torch.float32).sin().view(4, width).to(device)
        called.clear()
        try:
            with _float32(device):
                return x, copied(x), called
        except Exception as error:
            reason = error
    raise _NotPlainError(f"it does not take rows of features: {reason}") from reason


def _chain(parts: list[_Part], x: Tensor) -> Tensor:
    """``parts`` applied one after the other in float32 and eval mode."""
    with _float32(x.device):
        for part in parts:
            if isinstance(part.run, nn.Linear):
                bias = part.run.bias
                x = F.linear(x, part.run.weight.float(), None if bias is None else bias.float())
            elif part.kind != "dropout":
                x = part.run(x)
    return x


def _combined_dropout(parts: list[_Part]) -> float:
    """The probability of being dropped by one of ``parts`` at least."""
    probabilities = [part.run.p for part in parts if isinstance(part.run, nn.Dropout) and part.run.p > 0]
    return probabilities[0] if len(probabilities) == 1 else 1 - math.prod(1 - p for p in probabilities)
