"""``grad_projection``: one step of an optimizer that projects by DTNH's rule, every parameter anchored.

Ours: ``AnchoredSGD`` and ``AnchoredAdamW``. Peers, with the same algebra: ``torch._foreach_*``, which has no inner
product, once to the end and once with torch's fused optimizer for the step; ``torch.compile`` of the first; and the
loop over parameters that people write, before torch's optimizer as it is by default. Bare: torch's fused optimizer
alone, which knows no anchor, reduces nothing and so moves little more than half of the bytes: what a user comes from.

All candidates step the same tensors in place. They are put back before a result is judged, not while it is timed, which
is then a training whose gradient never changes: with this learning rate nothing overflows, vanishes or changes its
sign in the steps of a measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_kernels.benchmarks.candidates import OURS, Candidate, Outputs
from moe_kernels.benchmarks.harness import Benchmark, Case
from moe_kernels.benchmarks.inductor import PREFIX, compiled
from moe_kernels.benchmarks.limits import Work
from moe_kernels.benchmarks.parameter_lists import QUICK, SUITES, ParameterList
from moe_kernels.benchmarks.workloads import Draw
from moe_kernels.optim import AnchoredAdamW, AnchoredSGD

SGD = "SGD, scope global"
SGD_TENSOR = "SGD, scope tensor"
ADAMW = "AdamW, scope global"
LOOP = "eager loop"
LR, MOMENTUM, BETAS, EPS, WEIGHT_DECAY = 1e-3, 0.9, (0.9, 0.999), 1e-8, 1e-2
COEFFICIENT = 0.1
MOST_COMPILED = 500
"""Tensors in a list that torch.compile is given: it makes one program of them, whose compilation takes hours."""

Projection = Callable[[list[Tensor], list[Tensor], list[Tensor], str], list[Tensor]]
"""Parameters, gradients, anchors, direction of the case → d of every parameter."""


@dataclass(frozen=True)
class State:
    """What a step reads, and what it changes."""

    grads: list[Tensor]
    anchors: list[Tensor]
    params: list[Tensor]
    buffers: dict[str, list[Tensor]]
    """The state of the optimizer, by its name in torch's."""
    steps: list[Tensor]

    @classmethod
    def draw(cls, workload: ParameterList, direction: str, device: torch.device) -> State:
        """Gradients against the regularizer's, as in a network that is being tuned."""
        draw = Draw(workload, device)

        def normal(std: float) -> list[Tensor]:
            return [draw.normal(*shape, std=std) for shape in workload.shapes]

        anchors, moved, noise = normal(0.05), normal(0.005), normal(0.005)
        if direction == ADAMW:
            buffers = {"exp_avg": normal(0.01), "exp_avg_sq": [torch.full_like(anchor, 1e-4) for anchor in anchors]}
        else:
            buffers = {"momentum_buffer": normal(0.01)}
        return cls(
            [other - away for other, away in zip(noise, moved, strict=True)],
            anchors,
            [anchor + away for anchor, away in zip(anchors, moved, strict=True)],
            buffers,
            [torch.full((), 10.0, device=device) for _ in anchors],
        )

    def changed(self) -> list[Tensor]:
        """What a step changes."""
        return [*self.params, *(buffer for buffers in self.buffers.values() for buffer in buffers), *self.steps]

    def outputs(self) -> Outputs:
        return {"parameters": self.params, **self.buffers}

    def double(self) -> State:
        """A copy in float64."""

        def wide(tensors: Iterable[Tensor]) -> list[Tensor]:
            return [tensor.to(torch.float64, copy=True) for tensor in tensors]

        buffers = {name: wide(tensors) for name, tensors in self.buffers.items()}
        return State(wide(self.grads), wide(self.anchors), wide(self.params), buffers, wide(self.steps))


def _dots(left: list[Tensor], right: list[Tensor]) -> Tensor:
    return torch.stack([torch.dot(a.flatten(), b.flatten()) for a, b in zip(left, right, strict=True)])


def _foreach_directions(
    params: list[Tensor], grads: list[Tensor], anchors: list[Tensor], direction: str
) -> list[Tensor]:
    away = list(torch._foreach_sub(params, anchors))
    dots = _dots(grads, away)
    # On a CPU the lists' norms have four digits only, and are no faster.
    squares = _dots(grads, grads) if grads[0].is_cpu else torch.stack(torch._foreach_norm(grads)).square()
    if direction != SGD_TENSOR:
        dots, squares = dots.sum(), squares.sum()
    scale = 1 - 2 * COEFFICIENT * torch.where(dots < 0, dots / squares, 0)
    directions = torch._foreach_mul(grads, scale.unbind() if direction == SGD_TENSOR else scale)
    torch._foreach_add_(directions, away, alpha=2 * COEFFICIENT)
    return list(directions)


def _loop_directions(params: list[Tensor], grads: list[Tensor], anchors: list[Tensor], direction: str) -> list[Tensor]:
    pulls = [2 * (param - anchor) for param, anchor in zip(params, anchors, strict=True)]
    dots = [(g * r).sum() for g, r in zip(grads, pulls, strict=True)]
    squares = [(g * g).sum() for g in grads]
    if direction != SGD_TENSOR:
        dots, squares = [torch.stack(dots).sum()] * len(grads), [torch.stack(squares).sum()] * len(grads)
    return [
        g + COEFFICIENT * (r - dot / square * g if dot < 0 else r)
        for g, r, dot, square in zip(grads, pulls, dots, squares, strict=True)
    ]


def _foreach_sgd(state: State, directions: list[Tensor]) -> None:
    buffers = state.buffers["momentum_buffer"]
    torch._foreach_mul_(buffers, MOMENTUM)
    torch._foreach_add_(buffers, directions)
    torch._foreach_add_(state.params, buffers, alpha=-LR)


def _foreach_adamw(state: State, directions: list[Tensor]) -> None:
    averages, squares = state.buffers["exp_avg"], state.buffers["exp_avg_sq"]
    torch._foreach_add_(state.steps, 1)
    torch._foreach_lerp_(averages, directions, 1 - BETAS[0])
    torch._foreach_mul_(squares, BETAS[1])
    torch._foreach_addcmul_(squares, directions, directions, 1 - BETAS[1])
    bias, square_bias = (1 - beta ** state.steps[0] for beta in BETAS)
    changes = torch._foreach_sqrt(squares)
    torch._foreach_div_(changes, square_bias.sqrt())
    torch._foreach_add_(changes, EPS)
    torch._foreach_mul_(changes, bias / -LR)
    changes = torch._foreach_div(averages, changes)
    torch._foreach_mul_(state.params, 1 - LR * WEIGHT_DECAY)
    torch._foreach_add_(state.params, changes)


def _foreach_step(state: State, directions: list[Tensor]) -> None:
    (_foreach_adamw if "exp_avg" in state.buffers else _foreach_sgd)(state, directions)


def _parameters(state: State) -> list[nn.Parameter]:
    """The same memory as parameters of their own, which have the gradients."""
    params = [nn.Parameter(param) for param in state.params]
    for param, grad in zip(params, state.grads, strict=True):
        param.grad = grad
    return params


def _share(optimizer: torch.optim.Optimizer, state: State) -> torch.optim.Optimizer:
    """The optimizer goes on from the state, in its memory."""
    for i, param in enumerate(optimizer.param_groups[0]["params"]):
        optimizer.state[param].update({name: buffers[i] for name, buffers in state.buffers.items()})
        if "exp_avg" in state.buffers:
            optimizer.state[param]["step"] = state.steps[i]
    return optimizer


def _ours(state: State, direction: str) -> Candidate:
    params, scope = _parameters(state), "tensor" if direction == SGD_TENSOR else "global"
    optimizer: torch.optim.Optimizer
    if direction == ADAMW:
        optimizer = AnchoredAdamW(
            params, LR, BETAS, EPS, WEIGHT_DECAY, anchor=state.anchors, coefficient=COEFFICIENT, scope=scope
        )
    else:
        optimizer = AnchoredSGD(params, LR, MOMENTUM, anchor=state.anchors, coefficient=COEFFICIENT, scope=scope)
    _share(optimizer, state)

    def run() -> Outputs:
        optimizer.step()
        return state.outputs()

    return run


def _torchs(state: State, direction: str, fused: bool | None) -> torch.optim.Optimizer:
    params = _parameters(state)
    optimizer: torch.optim.Optimizer
    if direction == ADAMW:
        capturable = params[0].device.type == "cuda"
        optimizer = torch.optim.AdamW(params, LR, BETAS, EPS, WEIGHT_DECAY, fused=fused, capturable=capturable)
    else:
        optimizer = torch.optim.SGD(params, LR, MOMENTUM, fused=fused)
    return _share(optimizer, state)


def _bare(state: State, direction: str) -> Candidate:
    optimizer = _torchs(state, direction, fused=True)

    def run() -> Outputs:
        optimizer.step()
        return {}

    return run


def _before_torchs(state: State, direction: str, project: Projection, fused: bool | None) -> Candidate:
    """``project``, then torch's step along what it gives."""
    optimizer = _torchs(state, direction, fused)
    params = optimizer.param_groups[0]["params"]

    @torch.no_grad()
    def run() -> Outputs:
        for param, d in zip(params, project(state.params, state.grads, state.anchors, direction), strict=True):
            param.grad = d
        optimizer.step()
        optimizer.zero_grad()
        return state.outputs()

    return run


def _foreach(state: State, direction: str) -> Candidate:
    """All of the step in lists."""

    @torch.no_grad()
    def run() -> Outputs:
        _foreach_step(state, _foreach_directions(state.params, state.grads, state.anchors, direction))
        return state.outputs()

    return run


def _compiled(state: State, direction: str) -> Candidate:
    step = compiled(_foreach(state, direction))

    def run() -> Outputs:
        if len(state.params) > MOST_COMPILED:
            raise RuntimeError(f"torch.compile is given at most {MOST_COMPILED} tensors, got {len(state.params)}")
        return step()

    return run


def work(workload: ParameterList, direction: str) -> Work:
    """Bytes only, in two phases: g, w and w₀ are read; then these and the state are, and w and the state written.

    With scope tensor the second phase can find a tensor in a cache.
    """
    reduction = 3
    combination = {SGD: 6, SGD_TENSOR: 3, ADAMW: 8}[direction]
    return Work(0, (reduction + combination) * workload.elements * workload.torch_dtype.itemsize)


def _build(workload: ParameterList, direction: str, device: torch.device) -> Case:
    state = State.draw(workload, direction, device)
    first = [tensor.clone() for tensor in state.changed()]

    @torch.no_grad()
    def restore() -> None:
        for tensor, value in zip(state.changed(), first, strict=True):
            tensor.copy_(value)

    def exact() -> Outputs:
        return _foreach(state.double(), direction)()

    bare = f"torch {'AdamW' if direction == ADAMW else 'SGD'}, fused"
    return Case(
        "grad_projection",
        workload,
        direction,
        candidates={
            OURS: _ours(state, direction),
            "foreach": _foreach(state, direction),
            "foreach, fused step": _before_torchs(state, direction, _foreach_directions, fused=True),
            LOOP: _before_torchs(state, direction, _loop_directions, fused=None),
            f"{PREFIX}foreach": _compiled(state, direction),
            bare: _bare(state, direction),
        },
        exact=exact,
        plain=LOOP,
        work=work(workload, direction),
        bare=bare,
        restore=restore,
    )


BENCHMARK = Benchmark(_build, SUITES, QUICK, directions=(SGD, SGD_TENSOR, ADAMW), weigh=SGD, gpu_dtype="float32")
