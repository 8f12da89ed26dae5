"""Generation without PyTorch: the bundle format, what runs its graphs, the tokenizer."""
