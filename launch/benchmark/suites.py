"""The standard set of measurements, in parts that can be run one at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from launch.benchmark.catalogue import DEFAULT_TOKENS, MODELS, Case, Options, Shape

# One implementation of each kind, for sweeps of many shapes: this library, logits at once, logits
# in chunks, no logits.
_SWEEP = (
    *("cce-tp-exact", "cce-tp-paper", "cce-tp-far-field"),
    *("torch-eager-fp32", "liger", "apple-cce"),
)
_OURS = ("cce-tp-exact", "cce-tp-paper", "cce-tp-far-field")
_SHARDED = (
    *_OURS,
    *("megatron-unfused", "megatron-native", "liger-logits", "liger-tp"),
    *("apple-cce", "apple-cce-exact"),
)
_BASE = Shape.of_model("llama3-8b")
# Where the three bars of the project stand.
_BARS = ("gemma2-2b", "llama3-8b", "llama3-70b-tp8")


def _models() -> list[Case]:
    return [Case(shape=Shape.of_model(name), name=name) for name in MODELS]


def _tokens() -> list[Case]:
    sizes = [2**power for power in range(8, 17)]
    shapes = [replace(_BASE, tokens=size) for size in sizes]
    return [Case(shape=shape, implementations=_SWEEP) for shape in shapes]


def _vocabulary() -> list[Case]:
    sizes = (4000, 8192, 16384, 32768, 65536, 131072, 262144, 524288, 1048576)
    shapes = [replace(_BASE, vocab=size) for size in sizes]
    return [Case(shape=shape, implementations=_SWEEP) for shape in shapes]


def _hidden() -> list[Case]:
    shapes = [replace(_BASE, hidden=size) for size in (512, 1024, 2048, 4096, 8192, 16384)]
    return [Case(shape=shape, implementations=_SWEEP) for shape in shapes]


def _ragged() -> list[Case]:
    """Sizes that are no multiples of a tile, each beside the plain shape."""
    shapes = (
        _BASE,
        replace(_BASE, hidden=4104),
        replace(_BASE, hidden=4095),
        replace(_BASE, vocab=128257),
        replace(_BASE, tokens=8191),
        Shape(8191, 4095, 128257),
    )
    return [Case(shape=shape, implementations=_OURS) for shape in shapes]


def _precision() -> list[Case]:
    names = (*_OURS, "torch-eager", "torch-compiled", "liger")
    kinds = (("fp16", False), ("fp32", False), ("fp32", True))
    return [
        Case(shape=_BASE, dtype=dtype, tf32=tf32, implementations=names) for dtype, tf32 in kinds
    ]


def _options() -> list[Case]:
    together = Options(bias=True, softcap=30.0, z_loss=1e-4, label_smoothing=0.1)
    asked = (
        Options(),
        together,
        Options(bias=True),
        Options(softcap=30.0),
        Options(z_loss=1e-4),
        Options(label_smoothing=0.1),
        Options(statistics=True),
        Options(grad_weight_out=True),
        Options(workspace_mib=16),
        Options(workspace_mib=1024),
        Options(keep_logits_mib=1024),
        Options(keep_logits_in_grad=False),
        Options(forward_only=True),
    )
    cases = [Case(shape=_BASE, options=each, implementations=_OURS) for each in asked]
    others = ("torch-eager-fp32", "torch-compiled", "liger")
    cases[1] = replace(cases[1], implementations=(*_OURS, *others))
    return cases


def _shards() -> list[Case]:
    """What one rank of 2, 4 and 8 has to do, and the whole; also with dC in fp32, as Megatron."""
    cases = []
    for name in ("gemma2-2b", "llama3-8b"):
        whole = Case(shape=Shape.of_model(name), name=name, implementations=_OURS)
        parts = [whole, *(replace(whole, shard=(0, ranks)) for ranks in (2, 4, 8))]
        added = Options(grad_weight_out=True)
        cases += parts
        cases += [replace(part, options=added, implementations=_OURS[:1]) for part in parts]
    return cases


def _host() -> list[Case]:
    return [Case(shape=Shape(256, 512, 4096), host_time=True)]


def _parallel() -> list[Case]:
    """The vocabulary over 1, 2, 4 and 8 ranks, with and without sequence parallelism."""
    models = [(name, Shape.of_model(name)) for name in ("llama3-8b", "gemma2-2b")]
    models.insert(0, ("llama3-70b", Shape(DEFAULT_TOKENS, 8192, 128256)))
    kinds = [(ranks, parts) for ranks in (1, 2, 4, 8) for parts in (False, True)[:ranks]]
    cases = []
    for name, shape in models:
        for ranks, parts in kinds:
            case = Case(
                shape=shape,
                name=name,
                suite="parallel",
                ranks=ranks,
                sequence_parallel=parts,
                implementations=_SHARDED,
            )
            cases += [case, _nothing_kept(case)]
    return cases


def _nothing_kept(case: Case) -> Case:
    """The same for the exact path without logits in dC's memory."""
    none = Options(keep_logits_in_grad=False)
    return replace(case, options=none, implementations=_OURS[:1])


_PARTS: dict[str, Callable[[], list[Case]]] = {
    "models": _models,
    "tokens": _tokens,
    "vocabulary": _vocabulary,
    "hidden": _hidden,
    "ragged": _ragged,
    "precision": _precision,
    "options": _options,
    "shards": _shards,
    "host": _host,
}
SUITES = ("standard", "bars", "parallel", *_PARTS)


def suite(name: str) -> list[Case]:
    """The cases of a suite.

    "standard" is all parts, "bars" three shapes of this library alone, with and without logits in
    dC's memory, "parallel" for several processes.

    Raises:
        ValueError: no such suite.
    """
    if name == "bars":
        cases = []
        for each in _BARS:
            case = Case(shape=Shape.of_model(each), suite=name, name=each, implementations=_OURS)
            cases += [case, _nothing_kept(case)]
        return cases
    if name == "parallel":
        return _parallel()
    if name not in SUITES:
        raise ValueError(f"--suite: expected one of {', '.join(SUITES)}, got {name!r}")
    parts = list(_PARTS) if name == "standard" else [name]
    return [replace(case, suite=part) for part in parts for case in _PARTS[part]()]
