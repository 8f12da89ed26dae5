"""LoRA files and the adapters made of them."""
