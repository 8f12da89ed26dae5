"""The benchmark of few-step methods on Fashion-MNIST: its data, its judge, its teacher and its measures."""
