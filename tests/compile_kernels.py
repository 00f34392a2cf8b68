"""Compile every kernel for one GPU architecture, without a GPU. Run as a script by a test.

    python tests/compile_kernels.py 90
    python tests/compile_kernels.py 90 few

The second one leaves out cases whose code is in the others. The library is called as users call
it, on CPU tensors; in place of a launch, the kernel is compiled for the arguments it was given.
Prints one line of JSON per kernel: name, dtype, variant, shared (bytes) or error. Before those of
LOGGED it prints what the assembler says.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

import cce_tp
from backward_passes import operands_as_they_are
from cce_tp import options
from cce_tp.backend import backend
from cce_tp.far_field import KeptRows
from cce_tp.kernels import far_field as far_kernels
from cce_tp.kernels import tuning

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EVERYTHING: dict[str, Any] = {
    "label_smoothing": 0.1,
    "z_loss": 1e-3,
    "logit_scale": 2.0,
    "logit_softcap": 30.0,
    "return_stats": "entropy",
    "grad_filter": cce_tp.GradFilter.paper(),
}
# dtype, hidden size, features. 255: odd strides, which descriptors cannot address; architectures
# without them take the pointers' way at any size. "everything" has the code of "plain" in it.
CASES = (
    ("bf16", 256, "plain"),
    ("bf16", 256, "everything"),
    ("bf16", 255, "plain"),
    ("bf16", 256, "far-field"),
    ("bf16", 256, "far-kept"),
    ("fp16", 256, "kept"),
    ("fp32", 256, "everything"),
    ("fp32", 256, "far-field"),
    ("bf16", 256, "cap"),
)
TERMS: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 1e-3, "logit_scale": 2.0}
# All of them are built where the project is measured; elsewhere, where they differ in the sizes of
# tiles and in how operands are loaded, every kernel once or so, in the way it usually takes.
FEW = (
    ("bf16", "everything"),
    ("bf16", "far-kept"),
    ("fp16", "kept"),
)
IN_FP32 = ("fp32", "everything")
# They differ from 8.0 and 10.0 in the sizes of tiles, and have the least memory for them.
SMALL = (86, 120)
# On Hopper: the speed of the exact path stands on these.
LOGGED = (
    ("bf16", "plain"),
    ("bf16", "cap"),
    ("bf16", "far-field"),
    ("bf16", "added"),
)
LOG = {"TRITON_DUMP_PTXAS_LOG": "1", "TRITON_ALWAYS_COMPILE": "1"}
# What `cce_tp.kernels.hopper` may make, too, by so many warpgroups, or by two what takes registers.
WARPGROUPS = (
    ("bf16", 256, "plain", 3),
    ("bf16", 256, "far-kept", 3),
    ("fp16", 256, "terms", 3),
    ("bf16", 256, "added", 3),
    ("bf16", 256, "cap", 3),
    ("bf16", 256, "plain", 2),
    ("bf16", 256, "everything", 2),
)
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.int8: "i8",
}


def _type(value: Any) -> str:
    """A kernel argument's type as Triton spells it in a signature."""
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype]
    if type(value).__name__ == "TensorDescriptor":  # Triton's, or Gluon's with a layout
        layout = "" if isinstance(value, TensorDescriptor) else f",{value.layout!r}"
        return f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}{layout}>"
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int) and not isinstance(value, bool):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "constexpr"


def _source(kernel: JITFunction) -> type[ASTSource]:
    if not getattr(kernel, "is_gluon", lambda: False)():
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


class Compiler:
    """Stands in for `JITFunction.run`: compiles instead of launching, each distinct kernel once."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self.done: set[str] = set()
        self.results: list[dict[str, Any]] = []
        self.label: dict[str, str] = {}

    def run(self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = [parameter.name for parameter in kernel.params]
        options = {
            "num_warps": kwargs.pop("num_warps", 4),
            "num_stages": kwargs.pop("num_stages", 3),
        }
        values = {**dict(zip(names, args, strict=False)), **kwargs}
        assert set(values) == set(names), f"{kernel.__name__}: {set(values) ^ set(names)}"
        signature, constants, attributes = {}, {}, {}
        for parameter in kernel.params:
            value = values[parameter.name]
            kind = "constexpr" if parameter.is_constexpr else _type(value)
            specialize = not parameter.do_not_specialize
            if specialize and isinstance(value, int) and not isinstance(value, bool) and value == 1:
                kind = "constexpr"
            signature[parameter.name] = kind
            if kind == "constexpr":
                constants[(parameter.num,)] = value
            elif kind.startswith("*") or (kind.startswith("i") and specialize and value % 16 == 0):
                attributes[(parameter.num,)] = [["tt.divisibility", 16]]
        key = repr((kernel.__name__, signature, constants, attributes, options))
        if key in self.done:
            return
        self.done.add(key)
        result: dict[str, Any] = {"kernel": kernel.__name__, **self.label}
        source = _source(kernel)(kernel, signature, constants, attributes)
        try:
            made = triton.compile(source, target=self.target, options=options)
            result["shared"] = made.metadata.shared
        except Exception as error:
            result["error"] = f"{type(error).__name__}: {error}"[-2000:]
        self.results.append(result)
        print(json.dumps(result), flush=True)


def call(dtype: torch.dtype, hidden: int, features: str) -> None:
    """A call of the loss; "everything" launches all that the exact and the paper's filter have."""
    vocab = 8192 if features == "far-kept" else 1024  # kept logits must fit dC's memory
    input = torch.zeros(512, hidden, dtype=dtype, requires_grad=True)
    weight = torch.zeros(vocab, hidden, dtype=dtype, requires_grad=True)
    target = torch.zeros(512, dtype=torch.int64)
    options: dict[str, Any] = {}
    if features == "everything":
        bias = torch.zeros(1024, dtype=dtype, requires_grad=True)
        options = {**EVERYTHING, "linear_bias": bias}
    if features == "kept":
        options = {**EVERYTHING, "keep_logits_bytes": 1 << 20}
        del options["grad_filter"]
    if features == "far-field":
        bias = torch.zeros(1024, dtype=dtype, requires_grad=True)
        chosen = cce_tp.GradFilter.far_field()
        options = {**EVERYTHING, "linear_bias": bias, "grad_filter": chosen}
    if features == "added":
        bias = torch.zeros(1024, dtype=dtype, requires_grad=True)
        options = {"linear_bias": bias, "grad_weight_out": torch.zeros(1024, hidden)}
    if features == "terms":
        options = TERMS
    if features == "cap":
        options = {"logit_softcap": 30.0}
    if features == "far-kept":
        options = {"keep_logits_in_grad": True, "grad_filter": cce_tp.GradFilter.far_field()}
    answer = cce_tp.linear_cross_entropy(input, weight, target, impl="triton", **options)
    (answer[0] if isinstance(answer, tuple) else answer).backward()


def _first_tile_kept(*args: Any) -> KeptRows:
    """Nothing is computed, so that the choice of tiles must be made up."""
    made = far_kernels.kept_rows(*args)
    made.rows.zero_()
    made.numbers.zero_()[::2] = 1
    return made


def cases_of(capability: int, few: bool) -> list[tuple[str, int, str, int]]:
    """dtype, hidden size, features, warpgroups of `kernels.hopper` or 0."""
    cases = [(*case, 0) for case in CASES]
    if capability != 90:
        few, cases = True, [case for case in cases if case[1] == 256]
    elif tuning._has_gluon():
        cases += WARPGROUPS
    if capability == 90:
        wanted = (*FEW, LOGGED[0])
    else:
        wanted = (FEW[0], IN_FP32) if capability in SMALL else (*FEW[:2], IN_FP32)
    return [case for case in cases if not few or (case[0], case[2]) in wanted]


def main(capability: int, few: bool) -> None:
    compiler = Compiler(capability)

    def run(self: JITFunction, *args: Any, **kwargs: Any) -> None:
        compiler.run(self, *args, **kwargs)

    for name, hidden, features, warpgroups in cases_of(capability, few):
        dtype = DTYPES[name]
        config = tuning.tile_config(capability, dtype.itemsize)
        descriptors = capability >= 90 and hidden == 256
        kind = "descriptors" if descriptors else "pointers"
        kind = f"{warpgroups}-warpgroups" if warpgroups else kind
        compiler.label = {"dtype": name, "variant": f"{features}-{kind}-{hidden}"}
        log = LOG if capability == 90 and (name, features) in LOGGED else {}
        with (
            mock.patch.dict(os.environ, log),
            mock.patch.object(JITFunction, "run", run),
            mock.patch.object(options, "_why_not_triton", lambda *_: None),
            mock.patch.object(tuning, "config_for", lambda *_, c=config: (c, 128)),
            mock.patch.object(tuning, "use_descriptors", lambda *_, d=descriptors: d),
            mock.patch.object(tuning, "warpgroups", lambda *_, w=warpgroups: w),
            mock.patch.object(tuning, "few_warpgroups", lambda _: 2),
            mock.patch.object(
                tuning, "rows_for_warpgroups", lambda out, *_, w=warpgroups: len(out) if w else 0
            ),
            mock.patch.object(
                tuning, "use_branch_descriptor", lambda _, d=descriptors: d and capability < 100
            ),
            operands_as_they_are(),
        ):
            backend("triton").kept_rows = _first_tile_kept
            call(dtype, hidden, features)


if __name__ == "__main__":
    main(int(sys.argv[1]), "few" in sys.argv[2:])
