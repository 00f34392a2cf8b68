"""Error of the loss in fp32 without TF32 against fp64, beside PyTorch's.

    python docs/figures/fp32_study.py [--small]

On a GPU these are the kernels, whose products are made of three in TF32; without one the readable
implementation. Per line: the largest error of a token's loss, relative to it or to 1, and the
relative errors of dE and dC. `--small` shrinks all sizes, to try it on a CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cce_tp import linear_cross_entropy

# Tokens, hidden size, vocabulary; deviation of the logits, or None for terms of one sign; whether
# the likeliest id is the target.
CASES = (
    (1024, 4096, 16032, 1.0, False),
    (1024, 16384, 8192, 1.0, False),
    (1024, 4096, 16032, 5.0, True),
    (1024, 8192, 8192, None, False),
)


def gradients(
    loss: Callable[[Tensor, Tensor], Tensor], input: Tensor, weight: Tensor
) -> tuple[Tensor, ...]:
    """Losses of the tokens, and dE and dC of their mean."""
    input, weight = (each.detach().clone().requires_grad_() for each in (input, weight))
    losses = loss(input, weight)
    return losses.detach(), *torch.autograd.grad(losses.mean(), (input, weight))


def errors(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> str:
    """A line of the table."""
    losses = ((found[0] - exact[0]).abs() / exact[0].abs().clamp(min=1)).max()
    parts = [(a - b).norm() / b.norm() for a, b in zip(found[1:], exact[1:], strict=True)]
    return ", ".join(f"{float(each):.1e}" for each in (losses, *parts))


def main(small: bool) -> None:
    """Print the table."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("highest")
    for tokens, hidden, vocab, deviation, likeliest in CASES:
        if small:
            tokens, hidden, vocab = tokens // 16, hidden // 16, vocab // 16
        input = torch.randn(tokens, hidden, device=device)
        weight = torch.randn(vocab, hidden, device=device) * hidden**-0.5
        if deviation is None:
            input, weight = input.abs(), weight.abs() * hidden**-0.5
        else:
            weight *= deviation
        target = torch.randint(0, vocab, (tokens,), device=device)
        if likeliest:
            target = (input @ weight.t()).argmax(dim=1)

        def theirs(e: Tensor, c: Tensor, target: Tensor = target) -> Tensor:
            return cross_entropy(e @ c.t(), target, reduction="none")

        def ours(e: Tensor, c: Tensor, target: Tensor = target) -> Tensor:
            found = linear_cross_entropy(e, c, target, reduction="none")
            assert isinstance(found, Tensor)
            return found

        exact = gradients(theirs, input.double(), weight.double())
        print(f"{tokens} x {hidden} x {vocab}, deviation {deviation}, likeliest id {likeliest}")
        print("  PyTorch", errors(gradients(theirs, input, weight), exact))
        print("  here   ", errors(gradients(ours, input, weight), exact))


if __name__ == "__main__":
    main("--small" in sys.argv[1:])
