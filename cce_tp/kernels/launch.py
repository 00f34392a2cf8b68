"""Host side of a launch: the arguments that every kernel over logits takes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cce_tp.kernels import tuning
from cce_tp.problem import LocalLogits


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
    return {
        "bias_ptr": logits.bias,
        "N": num_tokens,
        "V": vocab,
        "D": hidden,
        "stride_input": logits.input.stride(0),
        "stride_weight": logits.weight.stride(0),
        "logit_scale": float(logits.logit_scale),
        "logit_softcap": 1.0 if logits.logit_softcap is None else float(logits.logit_softcap),
        "HAS_BIAS": logits.bias is not None,
        "HAS_SCALE": logits.logit_scale != 1.0,
        "HAS_SOFTCAP": logits.logit_softcap is not None,
    }


def tiling_arguments(logits: LocalLogits, descriptor: bool) -> dict[str, Any]:
    """Arguments of a kernel that walks all tiles of `logits`: operands and tile sizes."""
    config, programs = tuning.config_for(logits.input)
    return {
        "input": matrix_argument(logits.input, config.block_n, config.block_d, descriptor),
        "weight": matrix_argument(logits.weight, config.block_v, config.block_d, descriptor),
        "NUM_PROGRAMS": programs,
        "DESCRIPTOR": descriptor,
        "PRECISION": tuning.input_precision(logits.input.dtype),
        "BLOCK_N": config.block_n,
        "BLOCK_V": config.block_v,
        "BLOCK_D": config.block_d,
        "GROUP_N": config.group_n,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
