"""Triton kernels; importing them imports Triton. They know nothing of ranks or autograd."""
