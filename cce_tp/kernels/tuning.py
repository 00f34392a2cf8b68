"""Tile sizes by architecture, and what the hardware or the interpreter can do."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cce_tp.kernels import tuned


@dataclass(frozen=True, slots=True, kw_only=True)
class TileConfig:
    """Launch configuration of the kernels that compute a tile of logits.

    Attributes:
        block_n, block_v: tokens and vocabulary rows per tile; also the paper filter's granularity.
        block_d: depth of one step of the matmul loop.
        group_mib: MiB of hidden states that sweep the vocabulary together (L2 reuse of the
            classifier).
        least_group: token blocks that do so at least.
        num_warps, num_stages: Triton's launch options.
    """

    block_n: int
    block_v: int
    block_d: int
    group_mib: int = 16
    least_group: int = 16
    num_warps: int = 8
    num_stages: int = 3

    def group_n(self, hidden: int, itemsize: int) -> int:
        """Token blocks of a group: a power of two.

        Measured on an H200 at D = 2304, 4096, 8192: 32, 16, 16 blocks give the fastest forward
        pass (0.99, 0.98, 1.00 gemm); 8 blocks cost 2%, 1%, 1%, twice as many 0%, 2%, 3%.
        """
        blocks = self.group_mib * 2**20 / (self.block_n * hidden * itemsize)
        return max(self.least_group, 2 ** round(math.log2(max(blocks, 1))))


# Few programs with small tiles: a test of moderate size still has ragged and several tiles.
_INTERPRETER = TileConfig(
    block_n=32, block_v=64, block_d=32, group_mib=0, least_group=2, num_warps=4, num_stages=1
)

# (capability from, bytes per element) -> configuration; the highest capability not above the
# device's wins. All fit the shared memory of the smallest part of their generation: 8.0 163 KiB,
# 8.6/8.9/12.0 99 KiB, 9.0/10.0 227 KiB per block; those of fp32 spill no registers in the two large
# kernels, as 64 x 128 with 4 warps would. Where nothing else is said, that is all that chose them:
# nobody has timed them yet. `python -m launch.tune` does.
_CONFIGS: dict[tuple[int, int], TileConfig] = {
    (80, 2): TileConfig(block_n=128, block_v=256, block_d=32, num_stages=3),
    (80, 4): TileConfig(block_n=64, block_v=128, block_d=32, num_stages=3),
    (86, 2): TileConfig(block_n=128, block_v=128, block_d=32, num_stages=3),
    (86, 4): TileConfig(block_n=64, block_v=128, block_d=32, num_stages=3),
    # Measured on an H200, torch 2.11, Triton 3.6, at 8192 x 2304 x 256000, 8192 x 4096 x 128256
    # and 8192 x 8192 x 16032: forward pass 0.99, 0.98, 1.00 gemm, G^T 1.05, 1.02, 1.03 gemm.
    (90, 2): TileConfig(block_n=128, block_v=256, block_d=64, num_stages=3),
    # Measured on an H100, torch 2.11, Triton 3.6, at 8192 x 4096 x 16032, in products by the vendor
    # library in the same precision: forward pass 0.70 without TF32 (3 stages: 0.67) and 1.34 with
    # it (1.44; steps of 64 2.05; 128 x 256 and 64 x 256 1.5).
    (90, 4): TileConfig(block_n=128, block_v=128, block_d=32, num_stages=4),
    (120, 2): TileConfig(block_n=128, block_v=128, block_d=32, num_stages=3),
    (120, 4): TileConfig(block_n=64, block_v=128, block_d=32, num_stages=3),
}

_forced: TileConfig | None = None


@contextlib.contextmanager
def forced(config: TileConfig) -> Iterator[None]:
    """Every kernel takes this configuration while this is open: for the tuner."""
    global _forced
    before, _forced = _forced, config
    try:
        yield
    finally:
        _forced = before


def ceil_div(size: int, step: int) -> int:
    """Number of steps that cover `size`; Triton's own takes ten times as long on the host."""
    return -(-size // step)


@functools.cache
def is_interpreted() -> bool:
    """Whether Triton runs kernels in its CPU interpreter: fixed when it is first asked, as Triton
    fixes it when kernels are imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def tile_config(capability: int, itemsize: int) -> TileConfig:
    """Configuration for a compute capability (90 for 9.0) and an element size in bytes (2 or 4)."""
    known = [cc for cc, size in _CONFIGS if size == itemsize and cc <= capability]
    if not known:
        raise ValueError(
            f"impl: the Triton kernels need compute capability 8.0 or newer, got "
            f"{capability // 10}.{capability % 10}; use impl='torch'"
        )
    return _CONFIGS[max(known), itemsize]


@functools.cache
def _device_properties(index: int) -> tuple[int, int]:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor, torch.cuda.get_device_properties(index).multi_processor_count


@functools.cache
def _device_config(index: int, itemsize: int) -> TileConfig:
    capability, _ = _device_properties(index)
    shipped = tile_config(capability, itemsize)
    if not tuned.enabled():
        return shipped
    name = tuned.key(torch.cuda.get_device_name(index), capability, itemsize)
    return tuned.find(name, TileConfig) or shipped


def config_for(tensor: Tensor) -> tuple[TileConfig, int]:
    """(configuration, number of persistent programs) for the tensor's device and element size.

    The configuration is the shipped one; with CCE_TP_TUNED=1 what `tuned` has for the device.
    """
    if is_interpreted():
        return _forced or _INTERPRETER, 3
    index = tensor.device.index or 0
    return _forced or _device_config(index, tensor.element_size()), _device_properties(index)[1]


def use_descriptors(*matrices: Tensor) -> bool:
    """Whether the tensor memory accelerator exists and can address the matrices."""
    if not is_interpreted():
        capability, _ = _device_properties(matrices[0].device.index or 0)
        if capability < 90:
            return False
    for matrix in matrices:
        row, column = matrix.stride()
        rows, columns = matrix.shape
        addressable = (
            column == 1
            and row >= columns
            and row * matrix.itemsize % 16 == 0
            and matrix.data_ptr() % 16 == 0
            and rows > 0
            and columns > 0
        )
        if not addressable:
            return False
    return True


@functools.cache
def _has_gluon() -> bool:
    """Whether this Triton has the Gluon that `kernels.hopper` is written in: in 3.9 some of it has
    other names, and registers are spilled."""
    import triton

    return triton.__version__.startswith(("3.6.", "3.7."))


def _is_hopper(index: int) -> bool:
    """Whether `kernels.hopper` runs on a device."""
    return _device_properties(index)[0] == 90 and _has_gluon()


# Rows (tokens, or of dC) and columns of a tile in `kernels.hopper`.
HOPPER_ROWS = 192
_TILE_COLUMNS = 256
# Rows of each warpgroup.
WARPGROUP_ROWS = 64
# What a tile with tokens for one or for two of three warpgroups alone takes, in tokens of a full
# one, and what a launch takes beside its tiles. Measured on an H100 at D = 4096.
_PART_COSTS = {0: 0, 1: 135, 2: 160}
_LAUNCH_COST = 96


# Bytes that memory moves at once.
_SECTOR = 32
# Bytes of the L2 cache with which two warpgroups are faster than Triton's kernels: an H200 has 60
# MiB, an H100 50.
_L2_FOR_TWO = 55 << 20


@functools.cache
def _l2_bytes(index: int) -> int:
    return torch.cuda.get_device_properties(index).L2_cache_size


def few_warpgroups(input: Tensor) -> int:
    """How many make the tiles of what three do not fit, or 0 for Triton's kernels.

    Two where the L2 cache is an H200's. On H100s (50 MiB) the forward pass takes 1.28 by two of
    them at 8192 x 8192 x 16032, and from 1.06 and 1.10 on with 2048 and 4096 tokens at 4096 x
    128256, where Triton's kernels took 1.02 each (with 256 tokens 1.06, and two 1.02). Why is not
    known: three are as fast there as on an H200."""
    if is_interpreted():
        return 0
    return 2 if _l2_bytes(input.device.index or 0) >= _L2_FOR_TWO else 0


def warpgroups(input: Tensor, vocab: int, config: TileConfig, programs: int) -> int:
    """How many warpgroups of `kernels.hopper` make tiles of logits fastest, of operands that
    descriptors address; 0 where Triton's kernels do.

    Three where that pays, else two, if they do on this device: of tiles as large as Triton's, but
    faster (forward pass without options 1.02 to 1.004 at D 4096 and 1.03 to 1.00 at 2304, an H200).
    They stand for the shipped tiles of Hopper, not for other ones that somebody has measured. Nor
    do they pay where rows do not start at whole sectors of memory: they load 64 bytes of a row at a
    time, which are then in three sectors and not in two (an H200, D 4104: 1.56, Triton's kernels
    with steps of 128 bytes 1.13).

    Args:
        input: (N, D).
        vocab: V.
        config, programs: see `config_for`.
    """
    if is_interpreted() or input.element_size() != 2 or config != _CONFIGS[90, 2]:
        return 0
    if not _is_hopper(input.device.index or 0) or input.stride(0) * input.itemsize % _SECTOR:
        return 0
    few = few_warpgroups(input)
    allowed = _ALLOWED * (1 if few else max(1.0, 4096 / max(input.shape[1], _LEAST_MEASURED_D)))
    return 3 if warpgroups_pay(len(input), vocab, programs, allowed) else few


# What rounding may cost three warpgroups above what it costs tiles of 128 tokens. On an H200, where
# two make those: the forward pass of 8192 tokens is faster by 0.5% at V 64,128 and D 4096, where it
# costs 0.8%, and by 0.7% at 128,000 and 2304, where it costs 0.5%. On an H100, where Triton's
# kernels do, more with smaller D, down to the least measured: in eighteen shapes with less forward
# passes are faster by 1.1% to 7%, but for one that is slower by 1.7%; with more slower by 0.3% to
# 14%.
_ALLOWED = 0.012
_LEAST_MEASURED_D = 1536


def warpgroups_pay(num_tokens: int, vocab: int, programs: int, allowed: float) -> bool:
    """Whether rounding up to whole tiles of three warpgroups, and to whole rounds of tiles, costs
    no more than `allowed` above what it costs tiles of 128 tokens.

    What rounding costs is from eighteen shapes on an H100. Sizes of less than a round of tiles were
    not measured: there the others make the shorter ones."""
    config = _CONFIGS[90, 2]
    columns = ceil_div(vocab, config.block_v)
    whole, rest = divmod(num_tokens, HOPPER_ROWS)
    row = whole * HOPPER_ROWS + _PART_COSTS.get(ceil_div(rest, WARPGROUP_ROWS), HOPPER_ROWS)
    ours = max(row * columns / programs, min(row, HOPPER_ROWS)) + _LAUNCH_COST
    tiles = ceil_div(num_tokens, config.block_n) * columns
    others = ceil_div(tiles, programs) * config.block_n
    return ours <= (1 + allowed) * others


# What the vendor's product takes beside one of `kernels.hopper`, where neither leaves tiles unused.
# Measured on an H100 for 8192 terms, D from 2304 to 8192, at 25,344 rows 1.005 to 1.02, added to
# fp32 1.015 to 1.04; for 4096 to 512 terms 1.006 to 1.07, and 1.02 to 1.2. Of 30 other sizes this
# model chose what is slower in four, by 0.1% to 0.4%, one of them by 1.8% when added to fp32.
_VENDOR_COST = 1.015
# Rows of its tiles, and what a second product costs beside them.
_VENDOR_ROWS = 128
_SECOND_PRODUCT = 24
# What must be used of the tiles here.
_LEAST_USE = 0.96
# The fewest terms for which that was measured.
_LEAST_DEPTH = 512


def rows_for_warpgroups(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> int:
    """How many rows, the first ones, of out = or += a @ b `kernels.hopper` is to make.

    Args:
        out: (M, N).
        a, b: (M, K) and (K, N).
        accumulate: whether out is added to.
    """
    if is_interpreted() or a.element_size() != 2 or not _is_hopper(a.device.index or 0):
        return 0
    rounded_once = out.dtype == torch.float32 or (out.dtype == a.dtype and not accumulate)
    if not rounded_once or a.shape[1] < _LEAST_DEPTH or not use_descriptors(out, a, b):
        return 0
    return product_rows(len(a), b.shape[1], config_for(a)[1])


@functools.lru_cache(maxsize=256)
def product_rows(rows: int, columns: int, programs: int) -> int:
    """`rows_for_warpgroups`, on Hopper: so many that rounding up to whole tiles, and to rounds
    of a tile for each program, costs least, the vendor's product making the others."""
    across = ceil_div(columns, _TILE_COLUMNS)

    def time(count: int, tile_rows: int) -> int:
        return ceil_div(ceil_div(count, tile_rows) * across, programs) * tile_rows

    def price(count: int) -> float:
        ours, used = time(count, HOPPER_ROWS), count * columns / (programs * _TILE_COLUMNS)
        if used < _LEAST_USE * ours:
            return math.inf
        second = _SECOND_PRODUCT if 0 < count < rows else 0
        return ours + second + _VENDOR_COST * time(rows - count, _VENDOR_ROWS)

    return min((0, *range(HOPPER_ROWS, rows, HOPPER_ROWS), rows), key=price)


def use_branch_descriptor(matrix: Tensor) -> bool:
    """`use_descriptors` of a matrix to which only some of a kernel's tiles are stored.

    Not on Blackwell, whose tensor memory Triton (3.6 to 3.9) cannot give to such a branch."""
    if not is_interpreted() and _device_properties(matrix.device.index or 0)[0] >= 100:
        return False
    return use_descriptors(matrix)


def input_precision(dtype: torch.dtype) -> str:
    """tl.dot's precision: fp32 follows the setting that torch's own products on CUDA follow.

    Without TF32 a product is made of three in TF32, of the operands' leading and trailing halves:
    it errs by about 2^-22 of each term and runs on the tensor cores, which have no fp32.
    """
    if dtype != torch.float32:
        return "ieee"
    # Where the newer setting exists, reading the older one may be an error.
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if setting is None:
        return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
    return "tf32" if setting == "tf32" else "tf32x3"


def state(dtype: torch.dtype) -> tuple[TileConfig | None, str]:
    """What may change from call to call of what is said here of operands of this dtype."""
    return _forced, input_precision(dtype)
