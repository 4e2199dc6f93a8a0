"""The peers of ``expert_ffn`` that are libraries, one file each.

A peer is a function of the same arguments as the plain forms in ``expert_ffn`` and imports its library when it is
called: what is not installed, or does not take the device, dtype or shape, raises, and the harness makes a row of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from torch import Tensor

from moe_kernels.benchmarks.candidates import Candidate, Function, Problem, Value
from moe_kernels.benchmarks.inductor import compiled
from moe_kernels.benchmarks.peers import megablocks, scattermoe, sonicmoe, transformers, tutel

PARAMETERS = ("w1", "b1", "w2", "b2")
Layout = Callable[[Mapping[str, Tensor]], Mapping[str, Value]]


def whole(leaves: Mapping[str, Tensor]) -> Mapping[str, Value]:
    """All experts in one tensor, as ours."""
    return leaves


def apart(leaves: Mapping[str, Tensor]) -> Mapping[str, Value]:
    """The parameters of each expert leaves of their own, as a list of modules has them."""
    return {
        name: [part.detach().requires_grad_() for part in leaf] if name in PARAMETERS else leaf
        for name, leaf in leaves.items()
    }


def hidden_major(leaves: Mapping[str, Tensor]) -> Mapping[str, Value]:
    """``w2`` of the same shape (E, d, h), in memory as (E, h, d)."""
    w2 = leaves["w2"].detach().transpose(1, 2).contiguous().transpose(1, 2)
    return {**leaves, "w2": w2.requires_grad_()}


class Peer(NamedTuple):
    """A function, and how its library or form holds the parameters, so that nobody pays for a change of layout."""

    function: Function
    layout: Layout = whole
    compile: bool = False


LIBRARIES: dict[str, Peer] = {
    **{
        f"transformers {name}": Peer(partial(transformers.expert_ffn, implementation=name))
        for name in transformers.IMPLEMENTATIONS
    },
    "Tutel": Peer(tutel.expert_ffn, hidden_major),
    "ScatterMoE": Peer(scattermoe.expert_ffn),
    "MegaBlocks": Peer(megablocks.expert_ffn, hidden_major),
    "SonicMoE": Peer(sonicmoe.expert_ffn),
}


def candidates(
    problem: Problem, peers: Mapping[str, Peer], within: Callable[[Function], Function]
) -> dict[str, Candidate]:
    """The peers as candidates, each function put ``within`` what surrounds it, and compiled with that."""
    layouts = {layout: layout(problem.leaves) for layout in {peer.layout for peer in peers.values()}}
    functions = {name: within(peer.function) for name, peer in peers.items()}
    return {
        name: problem.candidate(compiled(functions[name]) if peer.compile else functions[name], layouts[peer.layout])
        for name, peer in peers.items()
    }
