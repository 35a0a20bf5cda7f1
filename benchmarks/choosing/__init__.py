"""Which choice of pages keeps a real model's tokens, in plain PyTorch over transformers."""
