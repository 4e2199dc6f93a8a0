"""``routing``: tokens to gates and expert ids, with the statistics that balancing losses and telemetry need.

T tokens, d features, p projected features, E experts, k choices. Everything is decided in float32 (float64 for
float64 inputs), whatever the dtype of ``x`` and whether or not autocast is on.

1. Clean logits L (T, E). Cosine (GMoE, Sec. 3.3): with q = Wx + b, L = s · q̂ Êᵀ, where ^ is ℓ2 normalization (norms
   below 1e-12 count as 1e-12) and s = exp(min(log_scale, ln 100)) is the inverse of the paper's τ. Linear: L = W x.
2. Noise (V-MoE, Riquelme et al. 2021): N = L + noise_std · ε, ε standard normal and a pure function of ``seed`` and
   the position, so that a recomputation replays it. Without noise N = L.
3. P = softmax(N). The experts are the k largest of P, ties to the lowest id; the gates are their probabilities, or
   with ``renormalize`` these divided by their sum.
4. Statistics, sums over tokens (:class:`Statistics`). With C = softmax(L), the threshold θ_t = the noisy logit of the
   last choice and Φ the normal distribution function, ``load`` is Σ_t Φ((L − θ) / noise_std), V-MoE's smooth count of
   how often an expert would be chosen, and ``scaled_load`` is the same with C in the place of L, as Tutel computes it.

A NaN in a token makes its gates NaN and leaves the other tokens alone; its experts are then the first k.
Gates and all statistics but ``counts``, ``entropy`` and ``confidence`` are differentiable, once; those of the
reference any number of times.
Deterministic: on a CPU bit for bit for any number of threads, on a GPU for the same kind of device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_kernels import backend
from moe_kernels.ops import _library
from moe_kernels.reference import routing as reference


class Statistics(NamedTuple):
    """Per-expert sums over the T tokens of one call; float tensors have the dtype of the gates."""

    counts: Tensor
    """(k, E) int64: how often expert e was the j-th choice."""
    scores: Tensor
    """(E,): Σ_t P, the probabilities that were routed by."""
    importance: Tensor
    """(E,): Σ_t C, the probabilities without noise."""
    load: Tensor
    """(E,): V-MoE's smooth load; zero without noise."""
    scaled_load: Tensor
    """(E,): Tutel's form of it; zero without noise."""
    z: Tensor
    """(): Σ_t (log Σ_e exp L)², the router z-loss (Zoph et al. 2022, Eq. 5) before its mean."""
    entropy: Tensor
    """(): Σ_t of the entropy of C, in nats; not differentiable."""
    confidence: Tensor
    """(T,): the largest of P, by which batch priority goes; not a sum, and not differentiable."""


class Routing(NamedTuple):
    """What :func:`route` returns."""

    gates: Tensor
    """(T, k) float32 (float64 for float64 inputs), by descending probability."""
    experts: Tensor
    """(T, k) int64, distinct in each row."""
    statistics: Statistics


_SELECTION = "Tensor? seed, int top_k, float noise_std, bool renormalize"
_GRADS = "Tensor grad_gates, Tensor grad_sums, Tensor grad_totals"
_OUTPUTS = "Tensor gates, Tensor experts, Tensor counts, Tensor sums, Tensor totals, Tensor confidence, Tensor logits"


def _fake_selection(x: Tensor, weight: Tensor, num_experts: int, top_k: int) -> tuple[Tensor, ...]:
    tokens = x.shape[0]
    return (
        weight.new_empty(tokens, top_k),
        weight.new_empty(tokens, top_k, dtype=torch.int64),
        weight.new_empty(top_k, num_experts, dtype=torch.int64),
        weight.new_empty(4, num_experts),
        weight.new_empty(2),
        weight.new_empty(tokens),
        weight.new_empty(tokens, num_experts),
    )


def _fake_cosine(
    x: Tensor,
    projection: Tensor,
    bias: Tensor,
    embedding: Tensor,
    log_scale: Tensor,
    seed: Tensor | None,
    top_k: int,
    noise_std: float,
    renormalize: bool,
) -> tuple[Tensor, ...]:
    return (
        *_fake_selection(x, projection, embedding.shape[0], top_k),
        projection.new_empty(x.shape[0], projection.shape[0]),
    )


def _fake_linear(
    x: Tensor, weight: Tensor, seed: Tensor | None, top_k: int, noise_std: float, renormalize: bool
) -> tuple[Tensor, ...]:
    return _fake_selection(x, weight, weight.shape[0], top_k)


_cosine = _library.define(
    "routing_cosine",
    "(Tensor x, Tensor projection, Tensor bias, Tensor embedding, Tensor log_scale, "
    f"{_SELECTION}) -> ({_OUTPUTS}, Tensor projected)",
    _fake_cosine,
)
_cosine_backward = _library.define(
    "routing_cosine_backward",
    f"({_GRADS}, Tensor x, Tensor projection, Tensor embedding, Tensor log_scale, Tensor logits, Tensor projected, "
    f"Tensor experts, {_SELECTION}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda gg, gs, gt, x, projection, embedding, log_scale, *rest: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(projection, memory_format=torch.contiguous_format),
        projection.new_empty(projection.shape[0]),
        torch.empty_like(embedding, memory_format=torch.contiguous_format),
        torch.empty_like(log_scale, memory_format=torch.contiguous_format),
    ),
)
_linear = _library.define("routing_linear", f"(Tensor x, Tensor weight, {_SELECTION}) -> ({_OUTPUTS})", _fake_linear)
_linear_backward = _library.define(
    "routing_linear_backward",
    f"({_GRADS}, Tensor x, Tensor weight, Tensor logits, Tensor experts, {_SELECTION}) -> (Tensor, Tensor)",
    lambda gg, gs, gt, x, weight, *rest: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(weight, memory_format=torch.contiguous_format),
    ),
)


OPERATORS = (_cosine, _linear)
"""What a selective checkpoint policy keeps."""


def _save(ctx: Any, tensors: tuple[Tensor, ...], seed: Tensor | None, rest: tuple[Any, ...], output: Any) -> None:
    _, experts, counts, _, _, confidence, *saved = output
    ctx.mark_non_differentiable(experts, counts, confidence, *saved)
    ctx.save_for_backward(*tensors, *saved, experts, *(() if seed is None else (seed,)))
    ctx.has_seed, ctx.rest = seed is not None, rest


def _saved(ctx: Any) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    return (*tensors, *(() if ctx.has_seed else (None,)), *ctx.rest)


def _cosine_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, projection, _, embedding, log_scale, seed, *rest = inputs
    _save(ctx, (x, projection, embedding, log_scale), seed, tuple(rest), output)


def _cosine_gradient(ctx: Any, *grads: Any) -> Any:
    gates, _, _, sums, totals, *_ = grads
    return (*_cosine_backward(gates, sums, totals, *_saved(ctx)), None, None, None, None)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, seed, *rest = inputs
    _save(ctx, (x, weight), seed, tuple(rest), output)


def _linear_gradient(ctx: Any, *grads: Any) -> Any:
    gates, _, _, sums, totals, *_ = grads
    return (*_linear_backward(gates, sums, totals, *_saved(ctx)), None, None, None, None)


_library.differentiate("routing_cosine", _cosine_setup, _cosine_gradient)
_library.differentiate("routing_linear", _linear_setup, _linear_gradient)
_library.refuse_second_derivative("routing_cosine_backward")
_library.refuse_second_derivative("routing_linear_backward")


def _check_selection(
    x: Tensor, num_experts: int, top_k: int, noise_std: float, seed: Tensor | None, renormalize: bool
) -> Tensor | None:
    """Raise on a selection that cannot be made; returns the seed where it is used."""
    if num_experts < 1:
        raise ValueError(f"the router needs at least one expert, got {num_experts}")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k: expected 1 to {num_experts} (the number of experts), got {top_k}")
    if renormalize and top_k == 1:
        raise ValueError("renormalize: a single gate would be constant 1 and give the router no gradient, got top_k=1")
    if not noise_std >= 0:
        raise ValueError(f"noise_std: expected a number ≥ 0, got {noise_std}")
    if noise_std == 0:
        return None
    if seed is None:
        raise ValueError(f"seed: noise_std={noise_std} needs an int64 seed tensor of shape (1,), got None")
    _library.check_tensor("seed", seed, (1,), floating=False, like=x)
    return seed


def _run(
    operator: Callable[..., Any], meaning: Callable[..., Any], tensors: tuple[Tensor, ...], *selection: Any
) -> Routing:
    """Run the kernel or its reference on parameters in the dtype of the arithmetic, out of the reach of autocast.

    So is x, but for Triton's kernels, which cast it where they load it.
    """
    x, *parameters = tensors
    dtype, device = _library.wide_dtype(x.dtype), x.device.type
    chosen = backend.choose("routing", device, x.dtype)
    narrow = chosen == "triton" and x.dtype in (torch.bfloat16, torch.float16)
    tensors = (x if narrow else _library.cast(x, dtype), *(_library.cast(tensor, dtype) for tensor in parameters))
    if chosen == "reference":
        with _library.without_autocast(device):
            outputs = meaning(*tensors, *selection)
    else:  # autocast has no rule for our operators and leaves them alone
        outputs = operator(*tensors, *selection)
    gates, experts, counts, sums, totals, confidence, *_ = outputs
    scores, importance, load, scaled_load = sums.unbind(0)
    z, entropy = totals.unbind(0)
    statistics = Statistics(counts, scores, importance, load, scaled_load, z, entropy, confidence)
    return Routing(gates, experts, statistics)


def route(
    x: Tensor,
    projection: Tensor,
    bias: Tensor,
    embedding: Tensor,
    log_scale: Tensor,
    *,
    top_k: int,
    noise_std: float = 0.0,
    seed: Tensor | None = None,
    renormalize: bool = False,
) -> Routing:
    """Cosine routing (GMoE, Sec. 3.3), as specified at the top of this module.

    Args:
        x: (T, d) float32, bfloat16, float16 or float64.
        projection: (p, d), W. Parameters may have another floating dtype than ``x``.
        bias: (p,), b.
        embedding: (E, p), one row an expert.
        log_scale: (1,), the logarithm of s = 1/τ; values above ln 100 count as ln 100 and get no gradient.
        top_k: number of experts a token, 1 to E.
        noise_std: standard deviation of the noise on the logits.
        seed: (1,) int64 on the device of ``x``; required with noise.
        renormalize: divide the gates by their sum; refused for ``top_k=1``.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    _library.check_tensor("x", x, ("T", "d"), floating=True, like=x)
    _library.check_tensor("projection", projection, ("p", x.shape[1]), floating=True, like=x)
    _library.check_tensor("bias", bias, (projection.shape[0],), floating=True, like=x)
    _library.check_tensor("embedding", embedding, ("E", projection.shape[0]), floating=True, like=x)
    _library.check_tensor("log_scale", log_scale, (1,), floating=True, like=x)
    seed = _check_selection(x, embedding.shape[0], top_k, noise_std, seed, renormalize)
    tensors = (x, projection, bias, embedding, log_scale)
    return _run(_cosine, reference.cosine, tensors, seed, top_k, noise_std, renormalize)


def route_linear(
    x: Tensor,
    weight: Tensor,
    *,
    top_k: int,
    noise_std: float = 0.0,
    seed: Tensor | None = None,
    renormalize: bool = False,
) -> Routing:
    """Linear routing (GMoE, Eq. 2; V-MoE), as specified at the top of this module.

    Args:
        x: (T, d) float32, bfloat16, float16 or float64.
        weight: (E, d), one row an expert.
        top_k, noise_std, seed, renormalize: as for :func:`route`.
    """
    _library.check_tensor("x", x, ("T", "d"), floating=True, like=x)
    _library.check_tensor("weight", weight, ("E", x.shape[1]), floating=True, like=x)
    seed = _check_selection(x, weight.shape[0], top_k, noise_std, seed, renormalize)
    return _run(_linear, reference.linear, (x, weight), seed, top_k, noise_std, renormalize)
