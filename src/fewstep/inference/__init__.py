"""PyTorch inference within a memory budget."""
