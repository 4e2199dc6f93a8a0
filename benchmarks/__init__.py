"""Benchmarks, installed as ``moe_kernels.benchmarks``: one file an operator, peers beside ours, the limit beside both.

``candidates`` binds functions to tensors, ``inductor`` compiles them, ``peers`` holds the libraries; ``workloads`` says
on what, ``harness`` measures by one of the ``stopwatches`` against ``limits``, ``memory`` weighs; ``report`` and
``picture`` write it down, ``registry`` names the operators. ``on_gpu.sh`` does everything that a GPU is needed for.
"""
