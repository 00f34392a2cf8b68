"""Triton kernels. Importing this package imports Triton; nothing here knows of ranks or
autograd."""
