"""Generation without PyTorch (floor 2): the bundle format, what runs its graphs, the tokenizer."""
