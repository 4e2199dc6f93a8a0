"""Benchmarks, installed as ``moe_kernels.benchmarks``: one file an operator, peers beside ours, the limit beside both.

``harness`` measures, ``workloads`` says on what, ``report`` writes it down, ``registry`` names the operators.
"""
