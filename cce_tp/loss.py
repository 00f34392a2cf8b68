"""The public function and module.

Legend: N tokens (all leading dims of `target` together), V global vocabulary, V_local rows of
this rank, D hidden size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast, overload

import torch
from torch import Tensor, nn

from cce_tp.arguments import prepare
from cce_tp.autograd import LinearCrossEntropyFunction, anchors
from cce_tp.filtering import GradFilter
from cce_tp.options import ReturnStats, Settings
from cce_tp.sharding import VocabShard
from cce_tp.stats import LossStats

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Keywords(TypedDict, total=False):
    """For type checkers: the keyword arguments that do not change the return type."""

    linear_bias: Tensor | None
    ignore_index: int
    reduction: str
    label_smoothing: float
    z_loss: float
    logit_scale: float
    logit_softcap: float | None
    vocab_shard: VocabShard | None
    grad_filter: GradFilter
    grad_weight_out: Tensor | None
    impl: str
    workspace_bytes: int | None
    keep_logits_bytes: int
    keep_logits_in_grad: bool | None


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[_Keywords],
) -> Tensor: ...


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    return_stats: Literal[True, "entropy"],
    **options: Unpack[_Keywords],
) -> tuple[Tensor, LossStats]: ...


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    vocab_shard: VocabShard | None = None,
    grad_filter: GradFilter = GradFilter.exact(),  # noqa: B008 (frozen)
    grad_weight_out: Tensor | None = None,
    return_stats: ReturnStats = False,
    impl: str = "auto",
    workspace_bytes: int | None = None,
    keep_logits_bytes: int = 0,
    keep_logits_in_grad: bool | None = None,
) -> Tensor | tuple[Tensor, LossStats]:
    """Cross entropy of `input @ linear_weight.T` against `target`, without storing the logits.

    With y = logit_scale * (input @ linear_weight.T + linear_bias) and x = softcap * tanh(y /
    softcap), the loss of a token is lse(x) - (1 - a) x[target] - a mean(x) + z_loss * lse(x)^2,
    where a is label_smoothing and lse and mean go over the global vocabulary (natural logarithm).
    Method: arXiv 2411.09009; soft cap: arXiv 2408.00118; z-loss: arXiv 2204.02311.

    Under a group, every rank calls this with the same `input`, `target` and options and its own
    rows of the weight. All ranks get the same bits of the loss and of `input`'s gradient; the
    gradients of weight and bias are local. Sums are in fp32 (fp64 for fp64); gradients come back
    in the dtype of the tensor they belong to.

    Args:
        input: (..., D) hidden states, fp32, bf16, fp16, or fp64 with impl="torch".
        linear_weight: (V_local, D) this rank's classifier rows, same dtype as `input` (or under
            autocast). A DTensor with Shard(0) on a 1-D mesh is its own vocab_shard; Replicate is
            a full weight.
        target: (...) int64 or int32 global ids. An id outside [0, V) that is not ignore_index
            reads no memory and makes that token's loss, lse and entropy NaN (its gradient too,
            unless its upstream gradient is 0); with the environment variable CCE_TP_DEBUG=1 it is
            a ValueError.
        linear_bias: (V_local,) this rank's bias, or None.
        ignore_index: target value whose tokens have loss and gradient exactly 0.
        reduction: "none", "sum", or "mean" over max(number of tokens that are not ignored, 1).
        label_smoothing: a in [0, 1), spread over the global vocabulary.
        z_loss: coefficient of lse^2, added per token that is not ignored.
        logit_scale: factor on the logits, before the cap.
        logit_softcap: cap, or None.
        vocab_shard: which rows of the vocabulary this rank holds; None means all of them.
        grad_filter: GradFilter.exact(), .paper() or .far_field().
        grad_weight_out: (V_local, D) contiguous, fp32, bf16 or the weight's dtype. If given, the
            backward pass adds dC to it and autograd gets no gradient for the weight. Untouched if
            the weight does not require grad.
        return_stats: True also returns LossStats; "entropy" fills its entropy as well.
        impl: "triton", "torch" (readable, any device, also tiled), or "auto": triton for CUDA
            tensors it supports, else torch.
        workspace_bytes: cap on temporaries beyond the gradients, at least 1 MiB; smaller is
            slower. None: 5% of the global logits in bf16; at least 16 MiB, or half of the hidden
            states in bf16 if that is more, up to 64 MiB; with a filter at least 96 MiB.
            GradFilter.far_field() has a floor that a smaller cap does not lower
            (docs/far-field.md).
        keep_logits_bytes: how many bytes of 16-bit logits, beside workspace_bytes, to keep from the
            forward pass, so that the backward pass recomputes fewer; this rank's first rows, whole
            tiles of them. For fp16 and bf16 operands and the exact filter.
        keep_logits_in_grad: keep as many logits as fit the memory of the weight's gradient, which
            is then allocated in the forward pass and not in the backward pass: all of them while N
            (up to a multiple of 16) <= D, a share of D / N beyond (with an fp32 gradient twice
            that). With GradFilter.far_field() those of the first 13.5% of the rows in its order,
            or as many whole tiles of them as fit beside `input` in fp32. Their tiles' maxima, about
            1% of what is kept, are part of workspace_bytes. For fp16 and bf16 operands, with the
            exact filter or the far field; not together with keep_logits_bytes or grad_weight_out.
            None, the default: wherever that can be.
            Nothing is kept on the CPU, under torch.compile, unless `input` and the weight both need
            a gradient, with the exact filter where the maxima would take half of workspace_bytes,
            or where N > D and it does not hold beside them half of `input` in fp32 and 512 columns
            of logits in 16 bits (by default where V is below some 20 D), or with the far field
            where not one tile fits or workspace_bytes does not hold the kept rows of the weight's
            gradient among its last ones (by default where D is 16384), nor
            there where D is odd. A second backward pass through the same graph recomputes; non-
            reentrant activation checkpointing around the loss has the gradient's memory twice while
            it recomputes. Each loss that waits for its backward pass holds such a gradient: where
            several do, as heads of multi-token prediction, False takes less memory.

    Returns:
        The loss, fp32 (fp64 for fp64): () for "mean" and "sum", target's shape for "none"; with
        return_stats a pair (loss, LossStats).

    Raises:
        ValueError: bad arguments. Under a group on every rank, if it is the group's first call, or
            its first call with these options and the ranks disagree about it; a later error of
            one rank alone is raised there alone (CCE_TP_DEBUG=1: everywhere, always).
    """
    operands, options, settings = prepare(
        input,
        linear_weight,
        target,
        linear_bias,
        vocab_shard,
        grad_weight_out,
        {
            "ignore_index": ignore_index,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "logit_scale": logit_scale,
            "logit_softcap": logit_softcap,
            "grad_filter": grad_filter,
            "return_stats": return_stats,
            "impl": impl,
            "workspace_bytes": workspace_bytes,
            "keep_logits_bytes": keep_logits_bytes,
            "keep_logits_in_grad": keep_logits_in_grad,
        },
    )
    loss, *statistics = LinearCrossEntropyFunction.apply(
        operands.input,
        operands.weight,
        operands.bias,
        operands.target,
        operands.grad_weight_out,
        options,
        torch.is_grad_enabled(),
        *anchors(options.compute_dtype, operands.input, operands.weight, operands.bias),
    )
    if settings.reduction == "none":
        loss = loss.view(target.shape)
    if not settings.return_stats:
        return loss
    *per_token, tiles_kept, far_mass, far_deviation = statistics
    shaped = (None if each is None else each.view(target.shape) for each in per_token)
    return loss, LossStats(*cast("Any", (*shaped, tiles_kept, far_mass, far_deviation)))


class LinearCrossEntropyLoss(nn.Module):
    """`linear_cross_entropy` with fixed options; the weight is passed to forward.

    Args:
        vocab_shard: as in `linear_cross_entropy`.
        options: ignore_index, reduction, label_smoothing, z_loss, logit_scale, logit_softcap,
            grad_filter, return_stats, impl, workspace_bytes, keep_logits_bytes,
            keep_logits_in_grad, as in `linear_cross_entropy`.

    Raises:
        ValueError: an option outside its range, on construction.
    """

    def __init__(self, *, vocab_shard: VocabShard | None = None, **options: Any) -> None:
        super().__init__()
        unknown = sorted(set(options) - set(Settings.__slots__))
        if unknown:
            raise ValueError(f"{unknown[0]}: expected one of {sorted(Settings.__slots__)}")
        Settings(**options)  # raises for an option outside its range
        self.options = options
        self.vocab_shard = vocab_shard

    def forward(
        self,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        *,
        linear_bias: Tensor | None = None,
        grad_weight_out: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, LossStats]:
        """(..., D), (V_local, D), (...) -> the loss, or (loss, LossStats)."""
        return linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            grad_weight_out=grad_weight_out,
            vocab_shard=self.vocab_shard,
            **self.options,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
