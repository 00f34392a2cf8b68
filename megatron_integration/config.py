"""Options of the fused output layer, and the command-line flags that set them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from cce_tp import GradFilter

_FILTERS = ("exact", "paper", "far-field")
_MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class CceConfig:
    """How the output layer's loss is computed once `install` has put it in place.

    Attributes:
        grad_filter: GradFilter.exact() (default), .paper() or .far_field().
        workspace_bytes: cap on temporaries of one head, in bytes, at least 1 MiB; None: 5% of
            the global logits in bf16, or if more, half of the hidden states in bf16 within 16 to
            64 MiB; with a filter at least 96 MiB.
        keep_logits_bytes: bytes of 16-bit logits that a head keeps for its backward pass, beside
            workspace_bytes, so that fewer are computed twice; with the exact filter. 0: none.
        keep_logits_in_grad: a head in 16 bits keeps as many logits as fit the memory of dC, which
            then lives from its forward pass to its backward pass and reaches `main_grad` through
            autograd; with the exact filter, or with the far field, which keeps those of the first
            rows of its order; without keep_logits_bytes and Megatron's
            gradient_accumulation_fusion.
        strict: materialising the logits of a head in training mode is a RuntimeError instead of
            one warning.
        capture_dir: folder where one micro batch is saved for `launch.benchmark run --snapshot`;
            None: nothing is saved.
        capture_after: number of losses computed in training before the one that is saved, counted
            for each output layer (micro batches and heads of multi-token prediction each count).

    Raises:
        ValueError: a value outside its range.
    """

    grad_filter: GradFilter = GradFilter.exact()  # noqa: RUF009 (frozen)
    workspace_bytes: int | None = None
    keep_logits_bytes: int = 0
    keep_logits_in_grad: bool = False
    strict: bool = False
    capture_dir: str | None = None
    capture_after: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.grad_filter, GradFilter):
            raise ValueError(f"grad_filter: expected a GradFilter, got {self.grad_filter!r}")
        size = self.workspace_bytes
        if size is not None and (isinstance(size, bool) or not isinstance(size, int)):
            raise ValueError(f"workspace_bytes: expected an int or None, got {size!r}")
        if size is not None and size < _MIB:
            raise ValueError(
                "--cce-workspace-mb (workspace_bytes): expected at least 1 MiB, got "
                f"{size / _MIB:g} MiB"
            )
        kept = self.keep_logits_bytes
        if isinstance(kept, bool) or not isinstance(kept, int) or kept < 0:
            raise ValueError(
                f"--cce-keep-logits-mb (keep_logits_bytes): expected a size >= 0, got {kept!r}"
            )
        if kept > 0 and self.grad_filter.kind != "exact":
            raise ValueError(
                "--cce-keep-logits-mb (keep_logits_bytes): expected 0 with "
                f"--cce-grad-filter {self.grad_filter.kind}, got {kept!r}"
            )
        self._check_keep_logits_in_grad()
        if self.capture_dir is not None and not (
            isinstance(self.capture_dir, str) and self.capture_dir
        ):
            raise ValueError(
                f"--cce-capture (capture_dir): expected a folder's name, got {self.capture_dir!r}"
            )
        count = self.capture_after
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(
                f"--cce-capture-after (capture_after): expected an integer >= 0, got {count!r}"
            )

    def _check_keep_logits_in_grad(self) -> None:
        inside, name = self.keep_logits_in_grad, "--cce-keep-logits-in-grad (keep_logits_in_grad)"
        if not isinstance(inside, bool):
            raise ValueError(f"{name}: expected True or False, got {inside!r}")
        if inside and self.keep_logits_bytes > 0:
            raise ValueError(
                f"{name}: expected not to be set together with --cce-keep-logits-mb, got both: "
                "each is a place for the same logits; drop one"
            )
        if inside and self.grad_filter.kind == "paper":
            raise ValueError(f"{name}: expected False with --cce-grad-filter paper, got True")

    @classmethod
    def from_args(cls, args: Any) -> CceConfig:
        """Read the flags of `add_cce_arguments` from a parsed namespace.

        Raises:
            ValueError: flags that exclude each other, naming both, or a value outside its range.
        """
        if cce_requested(args):
            _refuse_conflicts(args)
        megabytes = getattr(args, "cce_workspace_mb", None)
        return cls(
            grad_filter=_filter_by_name(
                getattr(args, "cce_grad_filter", "exact"),
                getattr(args, "cce_far_field_budget", None),
            ),
            workspace_bytes=None if megabytes is None else int(megabytes * _MIB),
            keep_logits_bytes=int((getattr(args, "cce_keep_logits_mb", None) or 0) * _MIB),
            keep_logits_in_grad=getattr(args, "cce_keep_logits_in_grad", False),
            strict=getattr(args, "cce_strict", False),
            capture_dir=getattr(args, "cce_capture", None),
            capture_after=getattr(args, "cce_capture_after", 0),
        )


def _filter_by_name(name: str, far_field_budget: float | None) -> GradFilter:
    if name not in _FILTERS:
        raise ValueError(f"--cce-grad-filter: expected one of {', '.join(_FILTERS)}, got {name!r}")
    if name == "far-field":
        if far_field_budget is None:
            return GradFilter.far_field()
        try:
            return GradFilter.far_field(far_field_budget)
        except ValueError as error:
            # The filter's own message begins with "budget: ".
            raise ValueError(f"--cce-far-field-{error}") from error
    if far_field_budget is not None:
        raise ValueError(
            "--cce-far-field-budget: expected only with --cce-grad-filter far-field, got "
            f"{far_field_budget!r} with {name}"
        )
    return GradFilter.paper() if name == "paper" else GradFilter.exact()


def _refuse_conflicts(args: Any) -> None:
    for option in ("logits_save_dir", "logits_load_dir"):
        if getattr(args, option, None):
            raise ValueError(
                f"--{option.replace('_', '-')}: expected not to be set together with --cce, got "
                f"{getattr(args, option)!r}: distillation needs the logits, which --cce never makes"
            )
    other = getattr(args, "cross_entropy_fusion_impl", None)
    if getattr(args, "cross_entropy_loss_fusion", False) and other != "cce":
        raise ValueError(
            "--cross-entropy-loss-fusion: expected not to be set together with --cce, got both: "
            "each replaces the loss of the output layer; drop one"
        )


def cce_requested(args: Any) -> bool:
    """True for `--cce`, or its other name `--cross-entropy-fusion-impl cce`."""
    if getattr(args, "cce", False):
        return True
    return getattr(args, "cross_entropy_fusion_impl", None) == "cce"


def add_cce_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the `--cce` group to Megatron's parser; usable as its `extra_args_provider`.

    Where the parser knows `--cross-entropy-fusion-impl`, that option accepts `cce` as another
    name for `--cce`. Megatron itself must not see that value: take it back after parsing with
    `take_alias`.
    """
    group = parser.add_argument_group("cut cross-entropy")
    group.add_argument(
        "--cce", action="store_true", help="fuse output layer and loss; never make the logits"
    )
    group.add_argument(
        "--cce-grad-filter",
        choices=_FILTERS,
        default="exact",
        help="what the backward pass may leave out (default: exact)",
    )
    group.add_argument(
        "--cce-far-field-budget",
        type=float,
        default=None,
        metavar="X",
        help="with far-field: how much of a token's probability may be approximated, on average "
        f"over the tokens, in [0, 1) (default: {GradFilter.far_field().budget})",
    )
    group.add_argument(
        "--cce-workspace-mb",
        type=float,
        default=None,
        metavar="MIB",
        help="cap on temporaries of one head, in MiB (default: about 5%% of the bf16 logits)",
    )
    group.add_argument(
        "--cce-keep-logits-mb",
        type=float,
        default=0.0,
        metavar="MIB",
        help="logits that a head keeps for its backward pass instead of computing them twice (0)",
    )
    group.add_argument(
        "--cce-keep-logits-in-grad",
        action="store_true",
        help="keep as many as fit the memory of the output weight's gradient, which is then held "
        "from a head's forward pass to its backward pass; needs --no-gradient-accumulation-fusion",
    )
    group.add_argument(
        "--cce-strict",
        action="store_true",
        help="logits that something materialises in training are an error, not a warning",
    )
    group.add_argument(
        "--cce-capture",
        default=None,
        metavar="DIR",
        help="save the hidden states, targets and classifier of one micro batch for the benchmark",
    )
    group.add_argument(
        "--cce-capture-after",
        type=int,
        default=0,
        metavar="N",
        help="number of losses in training before the one that is saved (default: 0)",
    )
    for action in parser._actions:
        if "--cross-entropy-fusion-impl" in action.option_strings and action.choices is not None:
            choices = list(action.choices)
            action.choices = choices if "cce" in choices else [*choices, "cce"]
    return parser


def take_alias(args: Any, default: str = "native") -> Any:
    """Turn `--cross-entropy-fusion-impl cce` into `--cce`, so that Megatron sees its own values.

    Stock code that is reached with an unknown implementation fails with UnboundLocalError.
    Returns the same namespace.
    """
    if getattr(args, "cross_entropy_fusion_impl", None) == "cce":
        args.cce = True
        args.cross_entropy_fusion_impl = default
        args.cross_entropy_loss_fusion = False
    return args
