"""Matrix products of the backward pass by the vendor library, with sums in fp32 (fp64 for fp64)."""

from __future__ import annotations

import torch
from torch import Tensor

from cce_tp.problem import rows_of, statistics_dtype
from cce_tp.workspace import blocks, borrowed_tokens


def copies_operands(operand: Tensor) -> bool:
    """Whether products of such operands are taken from wide copies of them (16 bits on the CPU)."""
    return not operand.is_cuda and operand.dtype != statistics_dtype(operand.dtype)


_NARROW_SUMS = {
    torch.bfloat16: "allow_bf16_reduced_precision_reduction",
    torch.float16: "allow_fp16_reduced_precision_reduction",
}


class FullPrecisionSums:
    """A context without partial sums in 16 bits, which the library may use for long products.

    Measured: dE of 300 tokens over 2^20 rows, taken in one product, erred by 1.4e-2.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        """
        Args:
            dtype: of the products' operands; the setting of another dtype is left alone.
        """
        name = _NARROW_SUMS.get(dtype)
        self._name = name if name and getattr(torch.backends.cuda.matmul, name) else None

    def __enter__(self) -> None:
        if self._name:
            setattr(torch.backends.cuda.matmul, self._name, False)

    def __exit__(self, *error: object) -> None:
        if self._name:
            setattr(torch.backends.cuda.matmul, self._name, True)


def _wide_mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the accumulator's dtype."""
    dtype = statistics_dtype(a.dtype)
    if a.dtype == dtype or copies_operands(a):
        return a.to(dtype) @ b.to(dtype)
    return torch.mm(a, b, out_dtype=dtype)


def add_product(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool) -> None:
    """out = or += a @ b, joined in the wider dtype before the rounding to out's.

    Where `a` does not end at a whole unit of memory, which makes the library's products slow, what
    is left over of it, less than a unit, is a small product of its own. The few terms left over of
    K come first, rounded to `out` by themselves; a 16-bit `out` that is added to would be rounded
    twice as a whole, and so its product is not cut.

    Args:
        out: (M, N), the operands' dtype or a wider one.
        a: (M, K).
        b: (K, N), same dtype as a.
        accumulate: add to `out` instead of overwriting it.
    """
    direct = not copies_operands(a)
    rows, inner = _whole_units(a, b) if direct else a.shape
    if rows < a.shape[0]:
        add_product(out[:rows], a[:rows], b, accumulate=accumulate)
        add_product(out[rows:], a[rows:], b, accumulate=accumulate)
        return
    if inner < a.shape[1] and not (accumulate and out.dtype.itemsize == 2):
        add_product(out, a[:, inner:], b[inner:], accumulate=accumulate)
        a, b, accumulate = a[:, :inner], b[:inner], True
    if direct and out.dtype == a.dtype:
        if accumulate:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif direct and out.dtype == torch.float32:
        if accumulate:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        wide = _wide_mm(a, b)
        if accumulate:
            out.add_(wide)
        else:
            out.copy_(wide)


# Operands are read in units of this many bytes.
_UNIT_BYTES = 16
# Products of fewer multiplications, a microsecond or so of a large GPU, are not worth a second one.
_SMALL = 1 << 28


def _is_aligned(matrix: Tensor) -> bool:
    """Whether each row, or each column where those are contiguous, begins at a whole unit."""
    pitch = matrix.stride(0) if matrix.stride(1) == 1 else matrix.stride(1)
    return pitch * matrix.itemsize % _UNIT_BYTES == 0 and matrix.data_ptr() % _UNIT_BYTES == 0


def _whole_units(a: Tensor, b: Tensor) -> tuple[int, int]:
    """The shape of `a` without what is left over, in its contiguous axis, of whole units; all of it
    where nothing is gained by that.

    Rows that begin at a unit but do not end at one make the library's products slow. Measured on an
    H100: 4096 x 8191 by 8191 x 4096 in 16 bits takes 2.04 ms, with 8192 and with 8184 0.43 and
    0.38; and 8191 rows where they are the contiguous axis 0.61.
    """
    (rows, inner), axis = a.shape, 1 if a.stride(1) == 1 else 0
    left = a.shape[axis] % (_UNIT_BYTES // a.itemsize)
    if not left or left == a.shape[axis] or rows * inner * b.shape[1] < _SMALL:
        return rows, inner
    if not (_is_aligned(a) and _is_aligned(b)):
        return rows, inner
    return (rows, inner - left) if axis else (rows - left, inner)


# Columns of a product that stands for a sum: with one the library reads the matrix half as fast.
_SUM_COLUMNS = 8


def row_sums(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """matrix.sum(dim=1) in the wider dtype.

    Of 16 bits on a GPU a product with ones, summed in fp32 too: measured on an H200, 42,496 rows of
    8192 take 171 us, and torch's own sum 255 to 301.

    Args:
        matrix: (M, N), last dim contiguous.
        dtype: fp32 or fp64.
    """
    if matrix.itemsize != 2 or copies_operands(matrix):
        return matrix.sum(dim=1, dtype=dtype)
    rows, columns = matrix.shape
    out = torch.empty((rows, _SUM_COLUMNS), dtype=dtype, device=matrix.device)
    add_product(out, matrix, matrix.new_ones((columns, _SUM_COLUMNS)), accumulate=False)
    return out[:, 0]


# dC of a wide strip is taken in pieces of this many rows, or twice as many where a piece has fewer
# than 2^37 multiplications. Measured on an H200 for N of 8192, against pieces of 8192 rows: twice
# as many 2.9% less time at D 2304, this many 2.6% and 3.5% less at D 4096 and 8192, where 33 tiles
# of 128 rows fill whole waves of 132 multiprocessors; other sizes from 6144 to 21248 take from 3%
# less (11264 at D 2304) to 6% more.
_WEIGHT_ROWS = 4224


def weight_product(
    out: Tensor, grad_VN: Tensor, input: Tensor, *, accumulate: bool, sums: Tensor | None
) -> None:
    """out = or += G^T @ input, a part of dC; and the bias gradient beside it.

    Args:
        out: (V, D), as `add_product` takes it.
        grad_VN: G^T (V, N).
        input: (N, D).
        accumulate: add to `out` instead of overwriting it.
        sums: (V,) fp32 or fp64, the sums of G^T's rows are added to it; or None.
    """
    rows = _WEIGHT_ROWS if input.numel() * _WEIGHT_ROWS > 1 << 37 else 2 * _WEIGHT_ROWS
    for start, stop in blocks(grad_VN.shape[0], rows):
        part = rows_of(grad_VN, start, stop)
        add_product(rows_of(out, start, stop), part, input, accumulate=accumulate)
    if sums is not None:
        sums += row_sums(grad_VN, sums.dtype)


class InputSum:
    """Where dE of a token chunk is summed over strips: in fp32, and then rounded once.

    Attributes:
        parts: (first token, last token + 1, tensor to sum into), tokens counted from the chunk's.
    """

    def __init__(
        self,
        out: Tensor,
        dtype: torch.dtype,
        *,
        in_place: bool,
        borrow: bool,
        tile: int = 1,
        held: Tensor | None = None,
    ) -> None:
        """
        Args:
            out: (n, D) rows of dE.
            dtype: of the sum.
            in_place: one product makes it all, so that `out` itself may take it.
            borrow: sum the first `borrowed_tokens` of the tokens in the memory of `out`, which is
                half as wide as the sum; only the others take memory of their own.
            tile: tokens that must not be cut between the two parts.
            held: (tokens that are not borrowed, D) of `dtype`, takes the others; None for a new
                tensor.
        """
        self._out = out
        tokens, hidden = out.shape
        if in_place or out.dtype == dtype:
            self.parts = [(0, tokens, out)]
            return
        half = borrowed_tokens(tokens, tile) if borrow else 0
        self.parts = []
        if half:
            inside = out[: 2 * half].view(-1).view(dtype).view(half, hidden)
            self.parts.append((0, half, inside))
        if held is None:
            held = torch.empty((tokens - half, hidden), dtype=dtype, device=out.device)
        self.parts.append((half, tokens, held))

    @staticmethod
    def can_borrow(out: Tensor | None, dtype: torch.dtype) -> bool:
        """Whether half of the sums fit into `out`."""
        return (
            out is not None
            and out.is_contiguous()
            and 2 * out.itemsize == dtype.itemsize
            and borrowed_tokens(out.shape[0]) > 0
        )

    def finish(self, unscale: Tensor | None) -> None:
        """Scale and round the sums into dE."""
        for n0, n1, total in self.parts:
            if unscale is not None:
                total.mul_(unscale)
            if total.data_ptr() != self._out.data_ptr():
                self._out[n0:n1].copy_(total)
            elif total.dtype != self._out.dtype:
                _narrow_in_place(total, self._out)


def _narrow_in_place(total: Tensor, out: Tensor) -> None:
    """out[:n] = total, where total (n, D) lies at the start of out's memory, twice as wide.

    Row i goes from byte 4 D i to byte 2 D i: on its own old place the first rows, which go through
    a temporary, and on the place of rows that have moved already all others, in doubling pieces.
    """
    tokens = total.shape[0]
    done = min(16, tokens)
    out[:done].copy_(total[:done].to(out.dtype))
    while done < tokens:
        more = min(done, tokens - done)
        out[done : done + more].copy_(total[done : done + more])
        done += more
