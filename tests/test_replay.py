"""cce_tp.replay: from the fourth call of a kind on a recorded function runs; with the same bits.

Legend: N tokens, V vocabulary rows, D hidden size.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _python_dispatch
from triton.backends.nvidia import driver

import cce_tp
from backward_passes import operands_as_they_are
from cce_tp import arguments, backward, far_field, ops, options, products, replay
from cce_tp.kernels import launch, tuning
from cce_tp.kernels.launch import Prepared
from oracle import Operands, Outcome
from problems import Problem, call, even_bounds, restrict, same_bits
from ranks import Rank, RankPool
from sharding_cases import shard_of
from variants import DEVICE, HAS_CUDA

EVERYTHING: dict[str, Any] = {
    "label_smoothing": 0.1,
    "z_loss": 1e-3,
    "logit_scale": 1.3,
    "logit_softcap": 9.0,
}
FAR = {"grad_filter": cce_tp.GradFilter.far_field()}
SUM_AND_FACTORS = (torch.float32, torch.bfloat16, torch.bfloat16)
# Calls until the one that is recorded is over.
CALLS = replay._CALLS_BEFORE + 1


def recorded() -> dict[str, Callable[..., Any]]:
    """The replays that there are, by part; fails for one that could not be recorded."""
    parts = {name: it for kind in replay._kinds.values() for name, it in kind._parts.items()}
    assert all(it is not None for it in parts.values()), parts
    return {name: it for name, it in parts.items() if callable(it)}


@contextmanager
def spied_on() -> Iterator[list[str]]:
    """Names of the parts that are replayed."""
    names: list[str] = []
    call_part = replay.Kind.call

    def spy(self: replay.Kind, part: str, *arguments: Any) -> Any:
        if callable(self._parts.get(part)):
            names.append(part)
        return call_part(self, part, *arguments)

    with mock.patch.object(replay.Kind, "call", spy):
        yield names


def without_replays() -> Any:
    return mock.patch.object(replay, "kind_of", lambda name, tensors: replay.NEVER)


def check_same(found: Outcome, expected: Outcome) -> None:
    for name, value in vars(expected).items():
        assert same_bits(getattr(found, name), value), name


CASES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "plain": ({}, {"all", "gradients"}),
    "none": ({"reduction": "none"}, {"all", "gradients"}),
    "everything": ({**EVERYTHING, "reduction": "sum"}, {"all", "gradients"}),
    "statistics": ({**EVERYTHING, "return_stats": "entropy"}, {"all", "gradients"}),
    "kept": ({"keep_logits_bytes": 1 << 16}, {"all", "gradients"}),
    "inside": ({"keep_logits_in_grad": True}, {"all", "gradients"}),
    "little": ({"workspace_bytes": 1 << 20}, {"all", "gradients"}),
    "far": ({**FAR}, {"all", "far field"}),
    "far-everything": ({**FAR, **EVERYTHING, "return_stats": True}, {"all", "far field"}),
    "far-inside": ({**FAR, "keep_logits_in_grad": True}, {"all", "far field", "run"}),
}


# Logits are kept of 16-bit operands alone.
_DTYPES = {
    name: [torch.float16] if name in ("kept", "inside", "far-inside") else [torch.float32]
    for name in CASES
} | {"everything": [torch.float32, torch.float16], "far": [torch.float32, torch.float16]}


# What of PyTorch is observed is seen by these, whatever its release.
_EVERYWHERE = {"plain", "inside", "far-inside"}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[] if name in _EVERYWHERE else [pytest.mark.once])
        for name, dtypes in _DTYPES.items()
        for dtype in dtypes
    ],
)
def test_replays_have_the_bits_of_calls(name: str, dtype: torch.dtype) -> None:
    options, parts = CASES[name]
    # Rows that are many beside D, and fewer tokens than D: the far field's logits fit into dC.
    tokens, vocab, hidden = ((40,), 907, 64) if "far" in name else ((2, 35), 403, 104)
    problem = Problem(
        impl="triton", dtype=dtype, tokens=tokens, vocab=vocab, hidden=hidden, bias=True
    )
    problem = replace(problem, options=options)
    options = {**options, "impl": "triton"}
    if name == "far-inside":
        problem = replace(problem, bias=False, spread=6.0)
    with operands_as_they_are():
        for seed in range(CALLS):
            call(replace(problem, seed=seed).build(DEVICE), options)
        assert recorded().keys() == parts
        for seed in (7,) if "far" in name else (7, 8):  # which take long in Triton's interpreter
            operands = replace(problem, seed=seed).build(DEVICE)
            with without_replays():
                expected = call(operands, options)
            with spied_on() as replayed:
                found = call(operands, options)
            assert {*replayed} == parts
            check_same(found, expected)


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3]
)
def test_each_set_of_gradients_has_replays_of_its_own(wanted: tuple[bool, bool, bool]) -> None:
    problem = Problem(impl="triton", bias=True)
    everything = (True, True, True)
    for seed in range(2 * CALLS):
        operands = replace(problem, seed=seed).build(DEVICE)
        call(operands, {"impl": "triton"}, requires_grad=(everything, wanted)[seed % 2])
    operands = replace(problem, seed=9).build(DEVICE)
    for which in (wanted, everything, wanted):
        with without_replays():
            expected = call(operands, {"impl": "triton"}, requires_grad=which)
        with spied_on() as replayed:
            check_same(call(operands, {"impl": "triton"}, requires_grad=which), expected)
        assert "all" in replayed and ("gradients" in replayed) == any(which)


@pytest.mark.once
@pytest.mark.parametrize("wanted", [(True, True, False), (False, True, False)])
def test_validation_between_training_steps_is_another_kind(
    wanted: tuple[bool, bool, bool],
) -> None:
    """With the far field a call without gradients takes the vocabulary in its own order."""
    options = {**FAR, "impl": "triton", "keep_logits_in_grad": False}
    problem = Problem(impl="triton", vocab=303)
    for seed in range(CALLS + 2):
        operands = replace(problem, seed=seed).build(DEVICE)
        for grad_mode in (torch.enable_grad, torch.no_grad):
            with without_replays(), grad_mode():
                expected = call(operands, options, requires_grad=wanted)
            with grad_mode():
                check_same(call(operands, options, requires_grad=wanted), expected)
    assert len(replay._kinds) == 3  # two of losses, one of gradients


def test_gradients_added_to_a_given_tensor() -> None:
    problem, outs = Problem(impl="triton"), {}
    for which in ("calls", "replays"):
        out = torch.zeros(problem.vocab, problem.hidden, device=DEVICE)
        for seed in range(CALLS + 2):
            operands = replace(problem, seed=seed).build(DEVICE)
            with nullcontext() if which == "replays" else without_replays():
                call(operands, {"impl": "triton", "grad_weight_out": out})
        outs[which] = out
    assert "gradients" in recorded() and same_bits(outs["calls"], outs["replays"])


def test_a_second_backward_pass_through_the_same_graph() -> None:
    """With kept logits it recomputes, as the first one did not."""
    problem = Problem(impl="triton", dtype=torch.float16, tokens=(24,), hidden=48)

    def both_passes(operands: Operands) -> list[Tensor]:
        input, weight = (
            each.detach().requires_grad_() for each in (operands.input, operands.weight)
        )
        loss = cce_tp.linear_cross_entropy(
            input, weight, operands.target, impl="triton", keep_logits_in_grad=True
        )
        made = []
        for again in (True, False):
            made += torch.autograd.grad(loss, (input, weight), retain_graph=again)
        return made

    with operands_as_they_are():
        for seed in range(CALLS):
            both_passes(replace(problem, seed=seed).build(DEVICE))
        operands = replace(problem, seed=5).build(DEVICE)
        with spied_on() as replayed:
            found = both_passes(operands)
        assert replayed == ["all", "gradients", "gradients"]
        with without_replays():
            expected = both_passes(operands)
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.once
def test_strides_alignment_and_settings_make_kinds_of_their_own() -> None:
    operands = Problem(impl="triton", tokens=(64,), hidden=32).build(DEVICE)
    memory = torch.zeros(64 * 40 + 1, device=DEVICE)
    inputs = {
        "contiguous": operands.input,
        "apart": memory[:-1].view(64, 40)[:, :32].copy_(operands.input),
        "misaligned": memory.new_zeros(64 * 32 + 1)[1:].view(64, 32).copy_(operands.input),
    }
    other = replace(tuning.config_for(operands.input)[0], block_v=16)
    settings: dict[str, Any] = {
        "as they are": nullcontext,
        "other tiles": lambda: tuning.forced(other),
        "other precision": lambda: mock.patch.object(tuning, "input_precision", lambda _: "tf32"),
    }
    with torch.no_grad():
        for _ in range(CALLS + 1):
            for input in inputs.values():
                for setting in settings.values():
                    given = replace(operands, input=input)
                    with setting(), without_replays():
                        expected = call(given, {"impl": "triton"})
                    with setting():
                        check_same(call(given, {"impl": "triton"}), expected)
    assert len(replay._kinds) == len(inputs) * len(settings)
    for kind in replay._kinds.values():
        assert callable(kind._parts["all"])


def test_one_tensor_in_two_places() -> None:
    """Other calls of the kind have two, which a recorded function could not tell apart."""

    def loss(input: Tensor, weight: Tensor) -> Tensor:
        target = torch.arange(len(input), device=DEVICE)
        return cce_tp.linear_cross_entropy(input, weight, target, impl="triton")

    rows, others = torch.randn(2, 40, 32, device=DEVICE).unbind()
    with torch.no_grad():
        same = [loss(rows, rows) for _ in range(CALLS + 1)]
        assert all(same_bits(each, same[0]) for each in same)
        for _ in range(CALLS + 1):
            with without_replays():
                expected = loss(rows, others)
            assert same_bits(loss(rows, others), expected)
        assert recorded().keys() == {"all"} and same_bits(loss(rows, rows), same[0])


@pytest.mark.once
@pytest.mark.parametrize("hooks", ["copies", "parts"])
@pytest.mark.parametrize("name", ["plain", "kept", "inside", "far"])
def test_hooks_on_saved_tensors(name: str, hooks: str) -> None:
    """What they give back may have other strides, or be aligned in another way."""
    options = {**CASES[name][0], "impl": "triton"}
    problem = Problem(
        impl="triton", dtype=torch.float16, tokens=(24,), vocab=303, hidden=64, options=options
    )

    def part(tensor: Tensor) -> Tensor:
        flat = tensor.new_empty(tensor.numel() + 1)
        flat[1:] = tensor.reshape(-1)
        return flat[1:].view(tensor.shape)

    copy = {"copies": lambda each: each.clone(memory_format=torch.contiguous_format), "parts": part}
    hooked = torch.autograd.graph.saved_tensors_hooks(copy[hooks], lambda each: each)
    with operands_as_they_are():
        for seed in range(CALLS):
            call(replace(problem, seed=seed).build(DEVICE), options)
        for seed in range(5, 7 + CALLS):
            operands = replace(problem, seed=seed).build(DEVICE)
            with without_replays(), hooked:
                expected = call(operands, options)
            for context in (hooked, nullcontext()):
                with context:
                    check_same(call(operands, options), expected)


@pytest.mark.once
def test_gradients_lent_in_the_dtype_of_the_weight() -> None:
    """Which autocast, and not the loss's operands, leaves open."""
    problem = Problem(impl="triton", dtype=torch.float16, tokens=(24,), vocab=303, hidden=64)
    options = {"impl": "triton", "keep_logits_in_grad": True}
    autocast = torch.autocast(DEVICE, torch.float16)
    with operands_as_they_are(), autocast:
        for seed in range(2 * CALLS):
            for dtype in (torch.float16, torch.float32):
                operands = replace(problem, seed=seed).build(DEVICE)
                operands = replace(operands, weight=operands.weight.to(dtype))
                with without_replays():
                    expected = call(operands, options)
                assert expected.grad_weight is not None and expected.grad_weight.dtype == dtype
                check_same(call(operands, options), expected)
    assert {*recorded()} == {"all", "gradients"}


@pytest.mark.once
@pytest.mark.parametrize("kept", ["keep_logits_bytes", "keep_logits_in_grad"])
def test_what_is_kept_follows_from_the_gradients_that_are_wanted(kept: str) -> None:
    problem = Problem(impl="triton", dtype=torch.float16, tokens=(24,), vocab=303, hidden=64)
    options = {"impl": "triton", kept: True if kept == "keep_logits_in_grad" else 1 << 20}
    with operands_as_they_are():
        for seed in range(2 * CALLS):
            operands = replace(problem, seed=seed).build(DEVICE)
            for wanted in ((True, True, False), (False, False, False), (False, True, False)):
                with without_replays():
                    expected = call(operands, options, requires_grad=wanted)
                check_same(call(operands, options, requires_grad=wanted), expected)


@pytest.mark.once
def test_upstream_and_the_tensor_added_to_make_kinds_of_their_own() -> None:
    problem = Problem(impl="triton", vocab=203, hidden=32, tokens=(40,))
    options = {"impl": "triton", "reduction": "none"}
    upstream = torch.randn(80, device=DEVICE)
    upstreams = (upstream[:40], upstream[::2], upstream[:1].expand(40), upstream[1:41])
    memory = torch.zeros(203 * 32 + 1, device=DEVICE)
    outs = (memory[:-1], memory[1:], memory[:-1].bfloat16())
    # Each differs from the first in one of the two.
    cases = [*((each, None) for each in upstreams), *((upstreams[0], each) for each in outs)]
    for seed in range(CALLS + 1):
        operands = replace(problem, seed=seed).build(DEVICE)
        for given, flat in cases:
            found = []
            for context in (without_replays(), nullcontext()):
                out = None if flat is None else flat.zero_().view(203, 32)
                with context:
                    outcome = call(
                        replace(operands, upstream=given), {**options, "grad_weight_out": out}
                    )
                found.append((outcome, None if out is None else out.clone()))
            check_same(found[1][0], found[0][0])
            assert same_bits(found[1][1], found[0][1])


def test_tensors_of_a_recorded_call_are_let_go() -> None:
    problem, alive = Problem(impl="triton", dtype=torch.float16, hidden=96), []
    with operands_as_they_are():
        for seed in range(CALLS + 1):
            operands = replace(problem, seed=seed).build(DEVICE)
            outcome = call(operands, {"impl": "triton", "keep_logits_in_grad": True})
            tensors = [operands.input, operands.weight, outcome.loss, outcome.grad_weight]
            storages = [each.untyped_storage() for each in tensors if each is not None]
            alive += [StorageWeakRef(each) for each in storages]
            del storages
            del operands, outcome, tensors
    assert recorded()
    gc.collect()
    assert len(alive) == 4 * (CALLS + 1) and all(each.expired() for each in alive)
    for replayed in recorded().values():
        held = [each for each in replayed.__globals__.values() if isinstance(each, Tensor)]
        assert not held


@pytest.mark.parametrize(("value", "enabled"), [("0", False), ("1", True), ("", True)])
def test_the_environment_turns_replays_off(value: str, enabled: bool) -> None:
    code = f"from cce_tp import replay; assert replay._ENABLED is {enabled}"
    environment = {**os.environ, "CCE_TP_REPLAY": value}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)


def test_large_problems_are_not_replayed() -> None:
    input, weight = torch.zeros(2, 16, device="meta"), torch.zeros(3, 16, device="meta")
    assert replay.kind_of((), (input, weight)) is not replay.NEVER
    limit = replay._LARGEST // 32
    weight = torch.zeros(1, 16, device="meta").expand(limit + 1, 16)
    assert replay.kind_of((), (input, weight)) is replay.NEVER
    assert replay.kind_of(None, (input, input)) is replay.NEVER


def test_kinds_are_forgotten_where_there_are_too_many() -> None:
    for tokens in range(1, replay._MOST_KINDS + 10):
        input = torch.zeros(tokens, 16)
        assert replay.kind_of((), (input, input)) is replay.kind_of((), (input, input))
    assert len(replay._kinds) == 9
    launch.forget()
    assert not replay._kinds


def run_parts(function: Callable[..., Any], *tensors: Tensor, leaves: Any = None) -> list[Any]:
    """Of one part, until it is replayed."""
    kind = replay.Kind()
    more = () if leaves is None else (leaves,)
    return [kind.call("part", tensors, lambda: function(*tensors), *more) for _ in range(CALLS + 2)]


class TestOneFunction:
    def test_views_operators_and_plain_values(self) -> None:
        matrix = torch.arange(24.0).view(4, 6)[:, 1:]

        def function(matrix: Tensor) -> Any:
            a, b = matrix.t()[1:3].unbind()
            parts = torch.sort(a + b, descending=True)
            wide = matrix.new_empty(3, 4, dtype=torch.float64).zero_()
            wide[1:].copy_(parts.values)
            return [parts.indices, wide.view(torch.int64)[1], "name", (3, None)], wide.sum()

        first, *others = run_parts(function, matrix)
        for (listed, total), expected in [(each, first[0]) for each in others]:
            assert torch.equal(listed[0], expected[0]) and torch.equal(listed[1], expected[1])
            assert listed[2:] == ["name", (3, None)] and total == first[1]
        storages = {each[0][1].untyped_storage().data_ptr() for each in (first, *others)}
        assert len(storages) == len(others) + 1  # each call has memory of its own

    @pytest.mark.parametrize("added", [False, True])
    def test_products_with_sums_in_fp32_are_called_as_they_were(self, added: bool) -> None:
        """Where there is no GPU they exist on the meta device alone, and not in all releases."""
        device = DEVICE if HAS_CUDA else "meta"
        out, a, b = (torch.empty(4, 4, dtype=it, device=device) for it in SUM_AND_FACTORS)
        called: list[tuple[Any, dict[str, Any]]] = []

        def function(out: Tensor, a: Tensor, b: Tensor) -> None:
            products.add_product(out, a, b, accumulate=added)

        def spy(*arguments: Any, **named: Any) -> Tensor:
            called.append((arguments, named))
            return product(*arguments, **named)

        name = "addmm" if added else "mm"
        product = getattr(torch, name)
        with (
            mock.patch.object(products, "copies_operands", lambda _: False),
            mock.patch.object(torch, name, spy),
        ):
            run_parts(function, out, a, b)
        assert len(called) == CALLS + 2
        for passed, named in called:
            assert [*map(id, passed)] == [*map(id, called[0][0])] and named == called[0][1]
            assert named["out_dtype"] == torch.float32 and named["out"] is out

    def test_what_it_writes_into(self) -> None:
        out = torch.zeros(5)

        def function(out: Tensor) -> None:
            out[1:3] += 1
            out[4:].fill_(7)

        run_parts(function, out)
        assert out.tolist() == [0, CALLS + 2, CALLS + 2, 0, 7]

    def test_a_tensor_from_elsewhere_is_no_part(self) -> None:
        elsewhere, kind = torch.ones(3), replay.Kind()
        for value in range(CALLS + 2):
            elsewhere.fill_(value)
            made = kind.call("part", (), lambda: elsewhere * 2)
            assert made.tolist() == [2.0 * value] * 3
        assert kind._parts == {"part": None}

    def test_an_error_passes_and_leaves_nothing(self) -> None:
        kind = replay.Kind()

        def fails() -> None:
            raise RuntimeError("out of memory")

        for _ in range(CALLS + 2):
            with pytest.raises(RuntimeError, match="out of memory"):
                kind.call("part", (), fails)
            assert replay.recorder() is None
        assert kind.call("part", (), lambda: 3) == 3

    def test_what_is_left_out_is_called_anew_in_its_place(self) -> None:
        seen: list[Any] = []
        number = iter(range(100))

        def function(tensor: Tensor) -> Tensor:
            sums = tensor.sum()
            now = next(number)
            replay.outside(lambda given: seen.append((now, given.item())), sums)
            return sums * 2

        def leaves(given: Tensor) -> None:
            seen.append(("anew", given.item()))

        run_parts(function, torch.ones(4), leaves=leaves)
        assert seen[:CALLS] == [(at, 4.0) for at in range(CALLS)]
        assert seen[CALLS:] == [("anew", 4.0)] * 2

    def test_threads_do_not_see_each_others_recordings(self) -> None:
        started, done = threading.Event(), threading.Event()
        seen: list[Any] = []

        def function() -> Tensor:
            started.set()
            assert done.wait(30)
            return torch.zeros(2)

        def other() -> None:
            assert started.wait(30)
            seen.append(replay.recorder())
            torch.ones(3).add_(1)
            done.set()

        kind = replay.Kind()
        kind._parts["part"] = replay._CALLS_BEFORE
        thread = threading.Thread(target=other)
        thread.start()
        made = kind.call("part", (), function)
        thread.join(30)
        assert seen == [None] and made.tolist() == [0, 0]
        replayed = kind._parts["part"]
        # The other thread's operators are not in it: what makes zeros alone.
        assert callable(replayed) and str(replayed.__doc__).count(" = ") == 1

    def test_one_recording_at_a_time(self) -> None:
        """PyTorch keeps track of its observers in variables that all threads share."""
        first, second = threading.Event(), threading.Event()
        kinds = replay.Kind(), replay.Kind()

        def holds() -> Tensor:
            first.set()
            assert second.wait(30)
            return torch.zeros(2)

        for kind in kinds:
            kind._parts["part"] = replay._CALLS_BEFORE
        thread = threading.Thread(target=lambda: kinds[0].call("part", (), holds))
        thread.start()
        assert first.wait(30)
        assert kinds[1].call("part", (), lambda: torch.ones(2)).tolist() == [1, 1]
        second.set()
        thread.join(30)
        assert callable(kinds[0]._parts["part"])
        assert kinds[1]._parts["part"] == replay._CALLS_BEFORE  # the next call may
        assert not _python_dispatch._is_in_torch_dispatch_mode
        kinds[1].call("part", (), lambda: torch.ones(2))
        assert callable(kinds[1]._parts["part"]) and not replay._recording.locked()


@pytest.mark.no_poison
def test_memory_is_let_go_as_early() -> None:
    """Of what a function drops, the next allocation can take the memory."""
    seen: list[int] = []
    memory, strided = _Memory(), torch.empty_strided

    def tracked(*arguments: Any, **named: Any) -> Tensor:
        return memory.add(strided(*arguments, **named))

    def note(_: Tensor) -> None:
        seen.append(memory.count)

    def function(out: Tensor) -> None:
        for _ in range(3):
            part = torch.empty_strided((64,), (1,))
            torch.mul(out, 2, out=part[:4])
            replay.outside(note, part)
            out.copy_(part[:4])
            del part

    with mock.patch.object(torch, "empty_strided", tracked):
        run_parts(function, torch.ones(4), leaves=note)
    assert seen == [1] * 3 * (CALLS + 2)


@pytest.mark.parametrize("filtered", [False, True], ids=["exact", "far"])
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "sequence-parallel"])
def test_ranks_replay_what_lies_between_their_collectives(
    pool: RankPool, filtered: bool, sequence_parallel: bool
) -> None:
    problem = Problem(
        impl="triton", tokens=(24,), vocab=403, bias=True, options=FAR if filtered else {}
    )
    found = pool.run(on_a_rank, problem, sequence_parallel, ranks=3)
    expected = {"statistics", "loss", "far field"} if filtered else {"statistics", "loss"}
    if not filtered:
        expected = set() if sequence_parallel else expected | {"gradients"}
    assert all(parts == expected for parts in found)


def on_a_rank(rank: Rank, problem: Problem, sequence_parallel: bool) -> set[str]:
    """Names of the parts that were replayed, with the same bits as without."""
    bounds = even_bounds(problem.vocab, rank.size)
    shard = replace(shard_of(rank, bounds, problem.vocab), sequence_parallel=sequence_parallel)
    options = {**problem.options, "impl": "triton", "vocab_shard": shard}
    replay.forget()
    parts: set[str] = set()
    for seed in range(CALLS + 2):
        operands = restrict(replace(problem, seed=seed).build(rank.device), *bounds[rank.rank])
        if sequence_parallel:
            operands = replace(operands, input=operands.input.chunk(rank.size)[rank.rank])
        with without_replays():
            expected = call(operands, options)
        with spied_on() as replayed:
            check_same(call(operands, options), expected)
        parts = {*replayed}
    return parts


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["plain", "everything", "inside", "far", "far-inside"])
def test_replays_have_the_bits_of_calls_on_the_gpu(name: str, dtype: torch.dtype) -> None:
    if "inside" in name and dtype == torch.float32:
        pytest.skip("16 bits do not hold these logits")
    options = {**CASES[name][0], "impl": "triton"}
    hidden, vocab = (1024, 32000) if "far" in name else (512, 8200)
    problem = Problem(
        impl="triton", dtype=dtype, tokens=(512,), vocab=vocab, hidden=hidden, spread=6.0
    )
    for seed in range(CALLS):
        call(replace(problem, seed=seed).build(DEVICE), options)
    operands = replace(problem, seed=7).build(DEVICE)
    with without_replays():
        expected = call(operands, options)
    with spied_on() as replayed:
        found = call(operands, options)
    assert {*replayed} == CASES[name][1]
    check_same(found, expected)


class _Memory:
    """Says of an address how far into which allocation it is, by the allocation's size."""

    def __init__(self) -> None:
        # First byte, bytes, and whether it is still there.
        self._known: list[tuple[int, int, StorageWeakRef]] = []

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._known.append((storage.data_ptr(), storage.nbytes(), StorageWeakRef(storage)))
        return tensor

    def place(self, address: int) -> tuple[int, ...]:
        """Nothing for what other operators have made, as those that merge several launches."""
        self._known = [known for known in self._known if not known[2].expired()]
        for first, nbytes, _ in self._known:
            if first <= address < first + max(nbytes, 1):
                return nbytes, address - first
        return ()

    @property
    def count(self) -> int:
        return sum(not known[2].expired() for known in self._known)

    def makers(self) -> Iterator[Any]:
        def noted(maker: Any) -> Any:
            def make(*arguments: Any, **named: Any) -> Any:
                made = maker(*arguments, **named)
                for each in made if isinstance(made, tuple) else (made,):
                    self.add(each)
                return made

            return make

        made = (torch.clone, torch.index_select, torch.sort, torch.zeros, Tensor.new_full)
        names = ("empty", "empty_like", "empty_strided", "zeros", "zeros_like", "sort")
        methods = ("new_empty", "new_full", "new_zeros", "clone", "index_select")
        for name in names:
            yield mock.patch.object(torch, name, noted(getattr(torch, name)))
        for name in methods:
            yield mock.patch.object(Tensor, name, noted(getattr(Tensor, name)))
        fast = {each: noted(maker) for each, maker in replay._FAST.items() if maker in made}
        yield mock.patch.dict(replay._FAST, fast)


@contextmanager
def as_on_a_gpu(started: list[Any]) -> Iterator[_Memory]:
    """Kernels are compiled ones that only say with what they were launched, operands go into
    products as they are, and those with sums in fp32 exist, but leave them as they were."""
    memory, kernels = _Memory(), {}

    def start(compiled: Any, grid: int, arguments: Any) -> None:
        seen = []
        for each in arguments:
            if hasattr(each, "base"):
                described = {name: it for name, it in vars(each).items() if name != "base"}
                seen += ["descriptor", described, memory.place(each.base.data_ptr())]
            else:
                large = type(each) is int and each > 1 << 32
                seen.append(memory.place(each) if large else each)
        started.append((compiled, grid, seen))

    class Compiled(dict[Any, Any]):
        def get(self, key: Any, default: Any = None) -> Any:
            return kernels.setdefault(key, f"kernel {len(kernels)}")

    with ExitStack() as stack, torch.library._scoped_library("aten", "IMPL") as sums:
        for name in ("mm.dtype_out", "addmm.dtype_out"):
            sums.impl(name, lambda *arguments, out, **named: out, "CPU")
        for module in (backward, far_field, ops, products):
            if hasattr(module, "copies_operands"):
                new = lambda _: False  # noqa: E731
                stack.enter_context(mock.patch.object(module, "copies_operands", new))
        patches = (
            (options, "_resolve_impl", lambda *of: "triton"),
            (launch, "_compiled", Compiled()),
            (launch, "_start", start),
            (Tensor, "index_select", lambda rows, _, at: rows.new_empty(len(at), rows.shape[1])),
            (far_field, "_HostCopy", lambda numbers: SimpleNamespace(wait=lambda: NUMBERS)),
        )
        for where, name, new in patches:
            stack.enter_context(mock.patch.object(where, name, new))
        for maker in memory.makers():
            stack.enter_context(maker)
        # What is remembered of other tests, and what they are not to find.
        for forget in (launch.forget, options._resolve.cache_clear, arguments._known.clear):
            forget()
            stack.callback(forget)
        yield memory


# Tiles that are kept, their rows that are late, and how many come first.
NUMBERS = torch.tensor([3, 20, 2])


@pytest.mark.skipif(HAS_CUDA, reason="stands for a GPU where there is none")
@pytest.mark.no_poison
@pytest.mark.parametrize("name", CASES)
def test_launches_of_replays_have_the_arguments_of_calls(name: str) -> None:
    """Of compiled kernels, which do not run here: every pointer, number and descriptor."""
    given, parts = CASES[name]
    tokens, vocab, hidden = (40, 1403, 96) if "far" in name else (70, 403, 104)
    seen: list[list[Any]] = []
    started: list[Any] = []
    with as_on_a_gpu(started) as memory:
        for _ in range(CALLS + 3):
            made = {
                "input": torch.zeros(tokens, hidden, dtype=torch.bfloat16),
                "weight": torch.zeros(vocab, hidden, dtype=torch.bfloat16),
                "target": torch.zeros(tokens, dtype=torch.int64),
                "upstream": torch.ones(tokens if given.get("reduction") == "none" else ()),
            }
            # With a bias the far field adds to the rows of its list, which holds nothing here.
            bias = None if "far" in name else torch.zeros(vocab, dtype=torch.bfloat16)
            for each in (*made.values(), bias):
                if each is not None:
                    memory.add(each)
            outcome = call(Operands(**made, bias=bias), {**given, "impl": "triton"})
            assert outcome.grad_weight is not None
            seen.append([*started])
            started.clear()
        assert recorded().keys() == parts and len(seen[0]) >= 4
    pointers = [it for *_, each in seen[0] for it in each if type(it) is tuple]
    assert pointers.count(()) <= 1 < len(pointers)
    for launches in seen[1:]:
        assert [launched[:2] for launched in launches] == [launched[:2] for launched in seen[0]]
        for found, expected in zip(launches, seen[0], strict=True):
            assert found[2] == expected[2]


def test_a_replayed_launch_takes_addresses_and_makes_descriptors_anew() -> None:
    kernel = SimpleNamespace(arg_names=["matrix", "bias_ptr", "out_ptr", "N", "BLOCK"])
    run = Prepared(kernel, 7, N=32, BLOCK=16, num_warps=4, blocks={"matrix": (16, 8)})
    compiled, started = object(), []

    def start(made: Any, grid: int, arguments: Any) -> None:
        started.append((made, grid, *arguments))

    memories, kind = [torch.zeros(2, 32, 64) for _ in range(CALLS + 2)], replay.Kind()

    def function_of(memory: Tensor) -> Callable[[], None]:
        return lambda: run(memory[0], None, memory[1])

    with (
        mock.patch.object(launch, "launch", lambda *arguments, **named: compiled),
        mock.patch.object(launch, "_start", start),
    ):
        for memory in memories:
            kind.call("part", (memory,), function_of(memory))
    assert callable(kind._parts["part"])
    for (made, grid, matrix, bias, out, *rest), memory in zip(
        started[-2:], memories[-2:], strict=True
    ):
        assert made is compiled and grid == 7 and bias is None and rest == [32, 16]
        assert matrix.base.data_ptr() == memory.data_ptr() and matrix.block_shape == [16, 8]
        assert matrix.shape == [32, 64] and matrix.strides == [64, 1]
        assert out == memory.data_ptr() + memory[0].nbytes


def _compiled_by_triton(indices: set[int], scratch: int = 0) -> tuple[Any, list[Any]]:
    """A compiled kernel as in Triton 3.6, whose launcher is in a closure; and what it launched."""
    launched: list[Any] = []

    def launcher(*arguments: Any) -> None:
        launched.append(arguments)

    tensordesc_indices, tensordesc_meta = indices, [f"meta {at}" for at in sorted(indices)]

    def inner(*arguments: Any) -> None:
        launcher("encoded anew", tensordesc_indices, tensordesc_meta, *arguments)

    run = SimpleNamespace(
        launch=inner,
        launch_cooperative_grid=False,
        launch_pdl=True,
        global_scratch_size=scratch,
        profile_scratch_size=0,
    )
    return SimpleNamespace(run=run, function="function", packed_metadata="packed"), launched


MATRICES = [torch.zeros(32, 64) for _ in range(3)]
AT = [each.data_ptr() for each in MATRICES]
LIKE = launch._Described(launch._descriptor(MATRICES[0], (16, 8)))
# Of a kernel of two matrices, a number between them, and one that is always the same.
TEMPLATE = [None, None, None, 5]
HEAD = (7, 1, 1, "stream", "function", False, True, None, None, "packed", None, None, None)


@contextmanager
def as_with_triton_3_6() -> Iterator[list[tuple[str, int]]]:
    """The codes of descriptors are addresses and one; yields of what they were made."""
    encoded: list[tuple[str, int]] = []

    def encode(descriptor: Any, meta: str) -> list[Any]:
        assert descriptor.block_shape == [16, 8]
        address = descriptor.base.data_ptr()
        encoded.append((meta, address))
        return [address + 1, *descriptor.shape, *descriptor.strides]

    with (
        mock.patch.object(launch.triton, "__version__", "3.6.0"),
        mock.patch("triton.backends.nvidia.driver.make_tensordesc_arg", encode),
        mock.patch.object(launch, "_current_stream", lambda: "stream"),
    ):
        yield encoded


def _start_of(compiled: Any) -> launch._Start:
    return launch._Start(compiled, 7, TEMPLATE, [0, 1, 2], {0: LIKE, 2: LIKE})


def test_descriptors_are_encoded_once_for_an_address() -> None:
    compiled, launched = _compiled_by_triton({0, 2})
    with as_with_triton_3_6() as encoded:
        start = _start_of(compiled)
        for one, other in ((0, 1), (0, 1), (2, 1), (0, 0)):
            start(AT[one], 99, AT[other])
            codes = [(AT[each] + 1, 32, 64, 64, 1) for each in (one, other)]
            assert launched.pop() == (*HEAD, *codes[0], 99, *codes[1], 5)
        # Each place for itself, with what Triton knows of it.
        metas = "meta 0", "meta 2"
        expected = [(metas[0], AT[0]), (metas[1], AT[1]), (metas[0], AT[2]), (metas[1], AT[0])]
        assert encoded == expected
        with mock.patch.object(launch, "_MOST_ENCODED", 4):
            start(AT[1], 99, AT[2])  # one too many: all before are forgotten
            start(AT[0], 99, AT[2])
        assert encoded[4:] == [(metas[0], AT[1]), (metas[1], AT[2]), (metas[0], AT[0])]


def test_launches_without_descriptors_are_direct_too() -> None:
    compiled, launched = _compiled_by_triton(set())
    compiled.run.launch = lambda *arguments: launched.append(arguments)
    with as_with_triton_3_6():
        launch._Start(compiled, 7, [0, 5], [0], {})(99)
    assert launched == [(*HEAD, 99, 5)]


def test_who_listens_hears_of_direct_launches() -> None:
    compiled, launched = _compiled_by_triton({0, 2})
    ordinary = mock.patch.object(launch, "_start")
    with as_with_triton_3_6():
        start = _start_of(compiled)
        with ordinary as called, mock.patch.object(launch, "_is_watched", lambda: True):
            start(AT[0], 99, AT[1])
    ((given, grid, (one, number, other, last)),) = [each.args for each in called.mock_calls]
    assert given is compiled and (grid, number, last) == (7, 99, 5) and launched == []
    assert [each.base.data_ptr() for each in (one, other)] == AT[:2]


def test_other_launchers_are_left_to_triton() -> None:
    """With kernels that take memory of their own, and in other releases."""
    made, _ = _compiled_by_triton({0, 2})
    others = _compiled_by_triton({0, 2}, scratch=1)[0], _compiled_by_triton({0})[0], object()
    described = {0: LIKE, 2: LIKE}
    with as_with_triton_3_6():
        assert launch._direct_launch(made, TEMPLATE, described) is not None
        for other in others:
            assert launch._direct_launch(other, TEMPLATE, described) is None
        with mock.patch.object(launch.triton, "__version__", "3.8.0"):
            assert launch._direct_launch(made, TEMPLATE, described) is None


@pytest.mark.gpu
def test_replays_on_the_gpu_encode_no_descriptor_again() -> None:
    """Or else it goes unnoticed that Triton's launcher has changed."""
    if torch.cuda.get_device_capability() < (9, 0) or not triton.__version__.startswith("3.6."):
        pytest.skip("without descriptors, or not as in Triton 3.6")
    input = torch.randn(512, 512, dtype=torch.bfloat16, device=DEVICE)
    weight = torch.randn(8192, 512, dtype=torch.bfloat16, device=DEVICE)
    target = torch.zeros(512, dtype=torch.int64, device=DEVICE)

    def encoded() -> list[int]:
        """Addresses of matrices of which a call made descriptors."""
        with mock.patch(name, side_effect=make) as calls:
            cce_tp.linear_cross_entropy(input, weight, target)
        return [call.args[0].base.data_ptr() for call in calls.mock_calls]

    name = "triton.backends.nvidia.driver.make_tensordesc_arg"
    make = driver.make_tensordesc_arg
    launch.forget()  # kernels have been prepared with the function as it was
    seen = [encoded() for _ in range(CALLS + 2)]
    launch.forget()
    here = {input.data_ptr(), weight.data_ptr()}
    assert here <= {*seen[0], *seen[1]} and here.isdisjoint(seen[-1])
