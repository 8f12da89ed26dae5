"""Generation without PyTorch (floor 2): the bundle format, onnxruntime sessions, the tokenizer."""
