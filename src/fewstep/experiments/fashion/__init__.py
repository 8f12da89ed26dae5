"""``fewstep ablate fashion``: the benchmark of distillation methods on Fashion-MNIST.

The protocol is in ``docs/results/methods.md``.
"""
