"""Balancing losses from the statistics of one routing.

T tokens, E experts, k choices; P the probabilities that were routed by (with noise, where there is any), C the ones
without noise, n_je how often expert e was the j-th choice. Every function takes a
:class:`~moe_kernels.ops.routing.Routing` and returns a differentiable scalar, 0 for zero tokens. No tensor is read by
the host.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from moe_kernels.ops.routing import Routing


def _tokens(routing: Routing) -> int:
    return max(routing.experts.shape[0], 1)


def gshard(routing: Routing) -> Tensor:
    """E · Σ_e mean_t(P_te) · n_1e / T: first choices only (GShard, Lepikhin et al. 2021, Algorithm 1)."""
    statistics, tokens = routing.statistics, _tokens(routing)
    fraction = statistics.counts[0].to(statistics.scores.dtype) / tokens
    return statistics.scores.shape[0] * ((statistics.scores / tokens) * fraction).sum()


def switch(routing: Routing) -> Tensor:
    """E · Σ_e f_e · mean_t(P_te), f_e = Σ_j n_je / (T k): for k = 1 Fedus et al. 2022, Eq. 4.

    For k > 1 f_e counts all k choices and is divided by k, so that the loss stays 1 at perfect balance whatever k is.
    """
    statistics, tokens = routing.statistics, _tokens(routing)
    fraction = statistics.counts.sum(0).to(statistics.scores.dtype) / (tokens * routing.experts.shape[1])
    return statistics.scores.shape[0] * ((statistics.scores / tokens) * fraction).sum()


def _squared_variation(values: Tensor, correction: int) -> Tensor:
    """Var / (mean² + 1e-10); with one expert there is nothing to balance."""
    if values.shape[0] == 1:
        return values.sum() * 0
    variance: Tensor = values.var(correction=correction)
    return variance / (values.mean().square() + 1e-10)


def load_importance(routing: Routing) -> Tensor:
    """½ (CV²(importance) + CV²(load)), V-MoE (Riquelme et al. 2021, App. A); CV = population std / mean.

    importance_e = Σ_t C_te; load_e = Σ_t Φ((L_te − θ_t) / σ) with clean logits L, the threshold θ_t = noisy logit of
    the k-th choice, and σ the standard deviation of the noise, which must not be 0.
    """
    statistics = routing.statistics
    return (_squared_variation(statistics.importance, 0) + _squared_variation(statistics.load, 0)) / 2


def tutel(routing: Routing) -> Tensor:
    """½ (Var(importance) / mean² + Var(load) / mean²), the loss that GMoE was trained with, as Tutel computes it.

    It differs from :func:`load_importance` in two ways: the variances are unbiased (divided by E − 1), and the load is
    Σ_t Φ((C_te − θ_t) / σ), which compares a probability with a logit. Kept to reproduce published results.
    """
    statistics = routing.statistics
    return (_squared_variation(statistics.importance, 1) + _squared_variation(statistics.scaled_load, 1)) / 2


def z_loss(routing: Routing) -> Tensor:
    """mean_t (log Σ_e exp L_te)², the router z-loss (ST-MoE, Zoph et al. 2022, Eq. 5), on logits without noise."""
    return routing.statistics.z / _tokens(routing)


BALANCE_LOSSES: dict[str, Callable[[Routing], Tensor]] = {
    "gshard": gshard,
    "switch": switch,
    "load_importance": load_importance,
    "tutel": tutel,
}
NEED_NOISE = ("load_importance", "tutel")
