"""The contrast: one flow of ops, in PyTorch, C++ and Triton."""
