"""Time tile configurations of the two large kernels on this GPU, and keep the best one in a file.

    python -m launch.tune --shape 8192,4096,128256
    CCE_TP_TUNED=1 torchrun ... -m launch.pretrain ...

The kernels are those that compute a tile of logits: the statistics of the forward pass, and the
gradient of the logits, which the backward pass hands to library products. A configuration is left
out if it does not build, spills registers, takes more shared memory than there is, or gives other
results than the shipped one. The best two of the rest, by the time of both kernels together, are
then timed again in turn with the shipped one, since the clocks of a GPU depend on what ran before;
the fastest of these goes into the cache file (see cce_tp/kernels/tuned.py), which is read with
CCE_TP_TUNED=1 alone. One that is less than 1% faster than the shipped one is not taken for faster.

Legend: N tokens, D hidden size, V vocabulary rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cce_tp.kernels import tuned, tuning
from cce_tp.kernels.tuning import TileConfig
from cce_tp.problem import LocalLogits, LogitGradient
from cce_tp.stats import StatRows
from launch.benchmark.catalogue import DTYPES, Shape

_TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Columns whose gradient is held at once.
_STRIP = 16384
# (block_n, block_v, block_d, warps, stages) by bytes per element.
_TILES: dict[int, tuple[tuple[int, int, int, int, int], ...]] = {
    2: (
        *((128, 256, 64, 8, stages) for stages in (2, 3, 4)),
        *((128, 256, 32, 8, stages) for stages in (3, 4, 5)),
        (128, 256, 128, 8, 2),
        *((256, 128, 64, 8, stages) for stages in (3, 4)),
        *((128, 128, 64, warps, stages) for warps in (4, 8) for stages in (3, 4)),
        *((128, 128, 32, warps, stages) for warps in (4, 8) for stages in (3, 4)),
        *((64, 256, 64, warps, 3) for warps in (4, 8)),
        *((64, 128, 64, 4, stages) for stages in (3, 4)),
        (256, 64, 64, 8, 3),
    ),
    4: (
        *((128, 128, 32, 8, stages) for stages in (2, 3, 4)),
        *((64, 128, 32, warps, stages) for warps in (4, 8) for stages in (3, 4)),
        *((128, 128, 16, 8, stages) for stages in (3, 4)),
        *((128, 64, 32, warps, 3) for warps in (4, 8)),
        *((64, 64, 32, 4, stages) for stages in (3, 4)),
        *((64, 256, 32, 8, stages) for stages in (2, 3)),
        (128, 128, 64, 8, 2),
        (128, 256, 32, 8, 2),
    ),
}
_GROUPS_MIB = (8, 32)
# Of the shipped configuration and the best two of the others, in turn.
_FINAL_ROUNDS = 3
# What the shipped configuration may take in the time of the best, and stay: less is noise.
_MARGIN = 1.01


def candidates(itemsize: int) -> list[TileConfig]:
    """The tiles that are tried, for 2 or 4 bytes per element."""
    names = ("block_n", "block_v", "block_d", "num_warps", "num_stages")
    return [TileConfig(**dict(zip(names, each, strict=True))) for each in _TILES[itemsize]]


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of a configuration.

    Attributes:
        config: the configuration.
        forward_ms, gradient_ms: medians over all V columns, or None.
        registers, shared: per thread, and bytes per block, of the larger of the two kernels.
        problem: why it is left out, or None.
    """

    config: TileConfig
    forward_ms: float | None = None
    gradient_ms: float | None = None
    registers: int | None = None
    shared: int | None = None
    problem: str | None = None

    @property
    def total_ms(self) -> float:
        """Of both; infinite where it is left out."""
        if self.forward_ms is None or self.gradient_ms is None:
            return float("inf")
        return self.forward_ms + self.gradient_ms


class Tuner:
    """Tries configurations on made-up inputs.

    Args:
        shape: N, D, V.
        dtype: of the inputs.
        device: where.
        time_ms: median time of a function.
    """

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        device: torch.device,
        time_ms: Callable[[Callable[[], Any]], float],
    ) -> None:
        self.shape, self._time_ms = shape, time_ms
        made: dict[str, Any] = {
            "generator": torch.Generator(device).manual_seed(0),
            "device": device,
        }
        hidden = torch.randn(shape.tokens, shape.hidden, **made).to(dtype)
        weight = torch.empty(shape.vocab, shape.hidden, dtype=dtype, device=device)
        for part in weight.split(_STRIP):
            part.copy_(torch.randn(part.shape, **made) * shape.hidden**-0.5)
        target = torch.randint(0, shape.vocab, (shape.tokens,), **made)
        self.logits = LocalLogits(hidden, weight, None, target, 0, 1.0, None)
        self.strip = self.logits.columns(0, min(_STRIP, shape.vocab))
        padded = -(-shape.tokens // 16) * 16
        self._buffer = hidden.new_empty(self.strip.weight.shape[0], padded)
        self._upstream: LogitGradient | None = None
        self._expected: tuple[Tensor, Tensor] | None = None
        self._first: TileConfig | None = None

    def _statistics(self) -> Tensor:
        from cce_tp.kernels import forward

        return forward.statistics(self.logits, StatRows(False, False, False), 1 << 34, None)

    def _gradient(self) -> Tensor:
        from cce_tp.kernels import backward

        assert self._upstream is not None
        out = self._buffer[:, : self.shape.tokens]
        backward.grad_logits(self.strip, self._upstream, out, None)
        return out

    def try_one(self, config: TileConfig) -> Trial:
        """Build, compare and time a configuration; the first one is what others must equal."""
        from cce_tp.kernels import launch

        launch.forget()
        with tuning.forced(config):
            try:
                packed = self._statistics()
                if self._upstream is None:
                    self._upstream = LogitGradient(
                        torch.ones_like(packed[0]), packed[0], packed[1].log(), 0.0, 0.0, 1
                    )
                gradient = self._gradient()
                built = [each for each in launch._compiled.values() if hasattr(each, "n_spills")]
                found = Trial(
                    config,
                    registers=max((each.n_regs for each in built), default=None),
                    shared=max((each.metadata.shared for each in built), default=None),
                    problem=self._problem(
                        config, packed, gradient, [each.n_spills for each in built]
                    ),
                )
                if found.problem is not None:
                    return found
                strips = self.shape.vocab / self.strip.weight.shape[0]
                return replace(
                    found,
                    forward_ms=self._time_ms(self._statistics),
                    gradient_ms=strips * self._time_ms(self._gradient),
                )
            except Exception as error:  # of the compiler, the assembler or the driver
                text = (str(error).strip().splitlines() or [""])[0]
                return Trial(config, problem=f"{type(error).__name__}: {text}"[:120])

    def _problem(
        self, config: TileConfig, packed: Tensor, gradient: Tensor, spills: list[int]
    ) -> str | None:
        if self._expected is None:
            self._first, self._expected = config, (packed.clone(), gradient.clone())
        if any(spills) and config != self._first:  # what is shipped is what others are held against
            return f"spills {max(spills)} registers"
        limits = (1e-5, 4 * torch.finfo(gradient.dtype).eps)
        pairs = zip((packed, gradient), self._expected, limits, strict=True)
        errors = [((got.float() - want).norm() / want.norm()).item() for got, want, _ in pairs]
        names = ("statistics", "gradient")
        for name, error, limit in zip(names, errors, limits, strict=True):
            if not error <= limit:
                return f"another {name}: relative difference {error:.1e}"
        return None

    def run(self, shipped: TileConfig, others: Iterable[TileConfig]) -> list[Trial]:
        """Try the shipped configuration and others, then the best with other groups.

        Returns:
            The final trials: of the shipped configuration, and of the best two of the others."""
        trials = [self.try_one(shipped)]
        if trials[0].problem is not None:
            raise ValueError(f"the shipped configuration cannot be run: {trials[0].problem}")
        show(trials[0])
        for config in others:
            if config != shipped:
                trials.append(self.try_one(config))
                show(trials[-1])
        best = min(trials, key=lambda trial: trial.total_ms).config
        for size in _GROUPS_MIB:
            trials.append(self.try_one(replace(best, group_mib=size)))
            show(trials[-1])
        return self._final(trials)

    def _final(self, trials: list[Trial]) -> list[Trial]:
        """The trials, with the times of the best and the shipped one taken anew, in turn."""
        able = [at for at in range(1, len(trials)) if trials[at].problem is None]
        finalists = [0, *sorted(able, key=lambda at: trials[at].total_ms)[:2]]
        again: list[list[Trial]] = [[] for _ in finalists]
        for _ in range(_FINAL_ROUNDS):
            for at, found in zip(finalists, again, strict=True):
                found.append(self.try_one(trials[at].config))
        failed = next((each.problem for each in again[0] if each.problem is not None), None)
        if failed is not None:
            raise ValueError(f"the shipped configuration ran at first, and then not: {failed}")
        print(f"in turn, {_FINAL_ROUNDS} times:")
        for at, found in zip(finalists, again, strict=True):
            trials[at] = sorted(found, key=lambda trial: trial.total_ms)[_FINAL_ROUNDS // 2]
            show(trials[at])
        return [trials[at] for at in finalists]


def choose(trials: Sequence[Trial]) -> Trial:
    """The fastest, or the first one, which is shipped, where that is about as fast."""
    best = min(trials, key=lambda trial: trial.total_ms)
    return best if best.total_ms * _MARGIN < trials[0].total_ms else trials[0]


def show(trial: Trial) -> None:
    """A line of the table."""
    config = trial.config
    tile = f"{config.block_n} x {config.block_v} x {config.block_d}"
    how = f"{config.num_warps} warps, {config.num_stages} stages, {config.group_mib} MiB"
    result = trial.problem
    if result is None:
        result = f"{trial.forward_ms:8.3f} + {trial.gradient_ms:8.3f} ms"
        if trial.registers is not None:
            result += f", {trial.registers} registers, {(trial.shared or 0) / 1024:.0f} KiB"
    print(f"{tile:15} {how:26} {result}", flush=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m launch.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--shape", default="8192,4096,128256", metavar="N,D,V")
    made.add_argument("--dtype", choices=DTYPES, default="bf16")
    made.add_argument("--dry-run", action="store_true", help="measure, and keep nothing")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    args = parser().parse_args(arguments)
    try:
        shape, dtype = Shape.parse(args.shape), _TORCH_DTYPES[args.dtype]
        if not torch.cuda.is_available():
            raise ValueError("expected a CUDA device to measure on, torch sees none")
        tune(shape, dtype, torch.device("cuda", torch.cuda.current_device()), args.dry_run)
    except ValueError as error:
        print(f"launch.tune: {error}", file=sys.stderr)
        return 2
    return 0


def tune(shape: Shape, dtype: torch.dtype, device: torch.device, dry_run: bool) -> None:
    """Measure on a GPU, and store the best."""
    from triton.testing import do_bench

    name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability()
    capability = 10 * major + minor
    shipped = tuning.tile_config(capability, dtype.itemsize)

    def time_ms(step: Callable[[], Any]) -> float:
        return float(do_bench(step, warmup=50, rep=200, quantiles=[0.5]))  # type: ignore[arg-type]

    print(f"{name}, {shape}, {dtype}: forward + gradient of the logits; first what is shipped")
    trials = Tuner(shape, dtype, device, time_ms).run(shipped, candidates(dtype.itemsize))
    best = choose(trials)
    print(f"best, {trials[0].total_ms / best.total_ms:.3f} times as fast as what is shipped:")
    show(best)
    if dry_run:
        return
    measured = {
        "shape": asdict(shape),
        "forward_ms": best.forward_ms,
        "gradient_ms": best.gradient_ms,
        "shipped_forward_ms": trials[0].forward_ms,
        "shipped_gradient_ms": trials[0].gradient_ms,
    }
    file = tuned.store(tuned.key(name, capability, dtype.itemsize), best.config, measured)
    print(f"kept in {file}; CCE_TP_TUNED=1 in the environment makes use of it")


if __name__ == "__main__":
    sys.exit(main())
