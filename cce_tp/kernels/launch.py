"""Host side of a launch: a fast way to start a kernel, and the arguments that kernels share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cce_tp.kernels import tuning
from cce_tp.problem import LocalLogits

# Compiled kernels by (kernel, options, constants, kinds of the other arguments).
_compiled: dict[tuple[Any, ...], Any] = {}


# Functions from a kernel's arguments by name to its others and its constexpr ones, in order. By the
# kernel's Python function: Triton's own object takes long to hash.
_in_order: dict[Any, tuple[Callable[[dict[str, Any]], tuple[Any, ...]], ...]] = {}


def _take_apart(kernel: Any) -> tuple[Callable[[dict[str, Any]], tuple[Any, ...]], ...]:
    """Fills `_in_order`; constexpr parameters are named in capitals."""
    names = kernel.arg_names
    constants = [name for name in names if name.isupper() and len(name) > 1]
    others = [name for name in names if name not in constants]
    assert names == [*others, *constants], f"{kernel}: constexpr parameters come last"
    return _in_order.setdefault(kernel.fn, (_picker(others), _picker(constants)))


def _picker(names: list[str]) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    if len(names) > 1:
        return itemgetter(*names)
    return lambda arguments: tuple(arguments[name] for name in names)


def _kinds(values: Iterable[Any]) -> list[Any]:
    """What Triton specialises a kernel on, of arguments: equal kinds, equal machine code.

    Of an integer it is whether it is 1, divisible by 16, or beyond 32 bits; of a pointer its dtype
    and whether it is aligned.
    """
    kinds: list[Any] = []
    add = kinds.append
    for value in values:
        cls = value.__class__
        if cls is int:
            # Strings, since 1 and True would be one key.
            kind = "one" if value == 1 else "multiple" if value & 15 == 0 else "any"
            add(kind if -(2**31) <= value < 2**31 else kind + ", wide")
        elif cls is float or value is None:
            add(cls)
        elif cls is TensorDescriptor:
            base = value.base
            add((base.dtype, base.get_device(), *value.block_shape))
        else:
            add((value.dtype, value.get_device(), value.data_ptr() & 15))
    return kinds


def launch(
    kernel: Any, grid: int, *, num_warps: int, num_stages: int = 3, **arguments: Any
) -> None:
    """kernel[(grid,)](**arguments), without Triton's own analysis of the arguments after the first.

    That analysis takes several times as long as the launch itself (about 50 of 67 microseconds for
    20 arguments), which shows where the device is not kept busy for as long.

    Args:
        kernel: a triton.jit function whose constexpr parameters come last, named in capitals.
        grid: number of programs.
        num_warps, num_stages: Triton's launch options.
        arguments: all parameters of the kernel, by name.
    """
    pick_others, pick_constants = _in_order.get(kernel.fn) or _take_apart(kernel)
    others, constants = pick_others(arguments), pick_constants(arguments)
    key = (kernel.fn, num_warps, num_stages, *constants, *_kinds(others))
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[(grid, 1, 1)](*others, *constants)
        return
    made = kernel[(grid,)](*others, *constants, num_warps=num_warps, num_stages=num_stages)
    if made is not None:  # Triton's interpreter compiles nothing
        _compiled[key] = made


def matrix_argument(
    matrix: Tensor, block_rows: int, block_cols: int, descriptor: bool
) -> Tensor | TensorDescriptor:
    """A row-major matrix as `kernels.tile` takes it: a pointer, or a descriptor of tiles."""
    if not descriptor:
        return matrix
    return TensorDescriptor(
        matrix, list(matrix.shape), list(matrix.stride()), [block_rows, block_cols]
    )


def logits_arguments(logits: LocalLogits) -> dict[str, Any]:
    """Arguments of every kernel that computes logits: sizes, strides, bias, scale, cap."""
    num_tokens, vocab, hidden = logits.shape
    softcap = logits.logit_softcap
    return {
        "bias_ptr": logits.bias,
        "N": num_tokens,
        "V": vocab,
        "D": hidden,
        "stride_input": logits.input.stride(0),
        "stride_weight": logits.weight.stride(0),
        "logit_scale": float(logits.logit_scale),
        "logit_softcap": 1.0 if softcap is None else float(softcap),
        "HAS_BIAS": logits.bias is not None,
        "HAS_SCALE": logits.logit_scale != 1.0,
        "HAS_SOFTCAP": softcap is not None,
        # A tanh that is off by 1.2e-7 of the cap is lost in the rounding of 16-bit operands, unless
        # the cap is large.
        "PRECISE_CAP": softcap is not None and (softcap > 50.0 or logits.input.itemsize > 2),
    }


def tiling_arguments(logits: LocalLogits, descriptor: bool) -> dict[str, Any]:
    """Arguments of a kernel that walks all tiles of `logits`: operands and tile sizes."""
    config, programs = tuning.config_for(logits.input)
    sizes = _tile_sizes(config, logits.input.shape[1], logits.input.itemsize)
    return {
        **sizes,
        "input": matrix_argument(logits.input, config.block_n, config.block_d, descriptor),
        "weight": matrix_argument(logits.weight, config.block_v, config.block_d, descriptor),
        "NUM_PROGRAMS": programs,
        "DESCRIPTOR": descriptor,
        "PRECISION": tuning.input_precision(logits.input.dtype),
    }


@functools.cache
def _tile_sizes(config: tuning.TileConfig, hidden: int, itemsize: int) -> dict[str, int]:
    return {
        "BLOCK_N": config.block_n,
        "BLOCK_V": config.block_v,
        "BLOCK_D": config.block_d,
        "GROUP_N": config.group_n(hidden, itemsize),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
