"""What the far field leaves and how it errs, on a snapshot of a trained model.

    python docs/figures/far_field_study.py snapshot.pt [--tokens 8192]

The snapshot holds e (N, D), c (V, D) and t (N,) int64 (docs/benchmarks.md says how to make one).
Two tables: errors of this library's gradients before they are rounded to 16 bits (fp32 leaves under
autocast, the same 16-bit products); and, computed from exact probabilities, which share of the
tiles a budget of *mass* would keep, and how it would err.
"""

from __future__ import annotations

import argparse

import torch
from tabulate import tabulate
from torch import Tensor

from cce_tp import GradFilter, linear_cross_entropy
from cce_tp.filtering import LARGEST_FAR_MASS

_TILE = 256


def exact_gradients(probs: Tensor, e: Tensor, c: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(N, V), (N, D), (V, D), (N,) -> dE, dC of the mean loss, fp32."""
    rows = torch.arange(len(t), device=t.device)
    probs[rows, t] -= 1
    gradients = probs @ c / len(t), probs.t() @ e / len(t)
    probs[rows, t] += 1
    return gradients


def relative(error: Tensor, size: Tensor) -> float:
    return float(error.norm() / size.norm())


def library(e: Tensor, c: Tensor, t: Tensor, wanted: tuple[Tensor, Tensor]) -> list[list[object]]:
    """Rows of the first table."""
    rows = []
    for name, chosen in (("exact", GradFilter.exact()), ("far field", GradFilter.far_field())):
        input, weight = (each.detach().float().clone().requires_grad_() for each in (e, c))
        with torch.autocast(e.device.type, dtype=torch.bfloat16):
            loss, stats = linear_cross_entropy(
                input, weight, t, grad_filter=chosen, return_stats=True
            )
        made = torch.autograd.grad(loss, (input, weight))
        errors = [relative(got - want, want) for got, want in zip(made, wanted, strict=True)]
        kept = 1.0 if stats.tiles_kept is None else float(stats.tiles_kept)
        left = 0.0 if stats.far_mass is None else float(stats.far_mass)
        rows.append([name, f"{kept:.1%}", f"{left:.2%}", *(f"{each:.2e}" for each in errors)])
    return rows


def by_mass(
    probs: Tensor, e: Tensor, c: Tensor, wanted: tuple[Tensor, Tensor]
) -> list[list[object]]:
    """Rows of the second table."""
    order = (c @ e.mean(dim=0)).argsort(descending=True, stable=True)
    order = order[: len(order) // _TILE * _TILE]
    c = c[order]
    tiles = probs[:, order].view(len(e), -1, _TILE)
    mass = tiles.sum(dim=2)
    off = (tiles - mass[:, :, None] / _TILE).view(len(e), -1) / len(e)
    largest, total = mass.amax(dim=0), mass.sum(dim=0)
    ranked = largest.argsort(descending=True)
    left = total[ranked].flip(0).cumsum(0).flip(0) / len(e)
    rows = []
    for budget in (0.0025, 0.005, 0.01):
        kept = torch.zeros(len(total), dtype=torch.bool, device=e.device)
        kept[ranked] = left > budget
        kept |= largest > LARGEST_FAR_MASS
        error = off * (~kept).repeat_interleave(_TILE)
        errors = (relative(error @ c, wanted[0]), relative(error.t() @ e, wanted[1]))
        share = f"{float(kept.float().mean()):.1%}"
        rows.append([f"{budget:.2%}", share, *(f"{each:.1e}" for each in errors)])
    return rows


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("snapshot")
    parser.add_argument("--tokens", type=int, default=8192)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = torch.load(given.snapshot, weights_only=True)
    used = found["t"][: given.tokens] >= 0
    e, t = (found[key][: given.tokens][used].to(device) for key in ("e", "t"))
    c = found["c"].to(device)
    wide_e, wide_c = e.float(), c.float()
    probs = torch.cat([(part @ wide_c.t()).softmax(dim=1) for part in wide_e.split(1024)])
    wanted = exact_gradients(probs, wide_e, wide_c, t)
    headers = ["filter", "tiles kept", "mass left", "error of dE", "of dC"]
    print(tabulate(library(e, c, t, wanted), headers))
    headers = ["mass left, at most", "tiles kept", "error of dE", "of dC"]
    print(tabulate(by_mass(probs, wide_e, wide_c, wanted), headers))


if __name__ == "__main__":
    main()
