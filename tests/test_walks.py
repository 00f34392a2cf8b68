"""Every way in which the backward pass can walk the (tokens, vocabulary) plane, and the choice.

The planner picks by price; here each way is forced on a small problem and held against the oracle.

Legend: N tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

import cce_tp
from backward_passes import operands_as_they_are
from cce_tp import backward, products, sharding, workspace
from cce_tp.products import InputSum
from cce_tp.workspace import (
    BackwardSizes,
    PrefixWalk,
    StripWalk,
    TailWalk,
    TokenWalk,
    Walk,
    WholeWalk,
    plan_backward,
)
from problems import Problem, call, check, same_bits
from variants import DEVICE, IMPL_DTYPES, LOW_IMPL_DTYPES

pytestmark = pytest.mark.once

MIB = 1 << 20
# The interpreter's tiles are 32 tokens x 64 rows: several, ragged, each way.
WALKS: dict[str, tuple[Walk, ...]] = {
    "strips": (TokenWalk(chunk=75, strip=64, weight=True),),
    "lent": (TokenWalk(chunk=75, strip=16, weight=True, lent=True),),
    "borrowed": (TokenWalk(chunk=75, strip=80, weight=True, borrow=True),),
    "lent-and-borrowed": (TokenWalk(chunk=75, strip=16, weight=True, lent=True, borrow=True),),
    "whole-vocabulary": (TokenWalk(chunk=32, strip=703, weight=True),),
    "both-cut": (TokenWalk(chunk=32, strip=96, weight=True),),
    "both-cut-borrowed": (TokenWalk(chunk=32, strip=96, weight=True, borrow=True),),
    "whole": (WholeWalk(96, 75),),
    "whole-in-chunks": (WholeWalk(96, 32),),
    "tail": (TailWalk(tail=160, strip=16, borrow=False),),
    "tail-and-borrowed": (TailWalk(tail=96, strip=16, borrow=True),),
    "two-passes": (TokenWalk(chunk=32, strip=703, weight=False), StripWalk(96, 75)),
    "two-passes-cut": (TokenWalk(chunk=32, strip=96, weight=False), StripWalk(96, 32)),
}
_SUMS_OVER_CHUNKS = {"whole-vocabulary", "both-cut", "both-cut-borrowed"}


def cases(names: Iterable[str], *, narrow_sums: bool) -> list[Any]:
    """(walk, impl, dtype): a 16-bit dE alone borrows; a 16-bit dC is not summed over chunks."""
    found = []
    for name, case in itertools.product(names, IMPL_DTYPES):
        impl, dtype = case.values
        narrow = dtype in (torch.float16, torch.bfloat16)
        if narrow and name in _SUMS_OVER_CHUNKS and not narrow_sums:
            continue
        if narrow or "borrow" not in name:
            found.append(pytest.param(name, impl, dtype, id=f"{name}-{case.id}"))
    return found


def with_and_without_bias(found: list[Any]) -> list[Any]:
    """Both of each case, but of a walk that the kernels do in two dtypes: in fp32 with a bias, in
    16 bits without. To a kernel it is a switch of the tile, whichever walk the tile is part of; the
    walk sums its gradient in PyTorch."""
    both = []
    for case, bias in itertools.product(found, [False, True]):
        name, impl, dtype = case.values
        in_two = sum(other.values[:2] == (name, impl) for other in found) > 1
        if impl == "torch" or not in_two or bias == (dtype == torch.float32):
            both.append(
                pytest.param(*case.values, bias, id=f"{'bias' if bias else 'no-bias'}-{case.id}")
            )
    return both


@pytest.mark.parametrize(
    ("name", "impl", "dtype", "bias"), with_and_without_bias(cases(WALKS, narrow_sums=False))
)
def test_each_walk(name: str, impl: str, dtype: torch.dtype, bias: bool) -> None:
    options = {"reduction": "none", "label_smoothing": 0.1, "z_loss": 1e-3}
    # lent: the first strips are 256 wide, so that D = 200 > N = 75 leaves room for them.
    problem = Problem(
        impl=impl, dtype=dtype, tokens=(75,), vocab=703, hidden=200, bias=bias, options=options
    )
    with mock.patch.object(backward, "plan_backward", lambda *_: WALKS[name]):
        check(problem, DEVICE)


@pytest.mark.parametrize(("impl", "dtype"), LOW_IMPL_DTYPES)
@pytest.mark.parametrize("name", ["tail", "tail-and-borrowed"])
def test_a_sum_held_in_the_tail(name: str, impl: str, dtype: torch.dtype) -> None:
    """As on a GPU, where 16-bit products need no wide copies, whose strips would hold the sum."""
    problem = Problem(impl=impl, dtype=dtype, tokens=(75,), vocab=703, hidden=200)
    with (
        mock.patch.object(backward, "copies_operands", lambda _: False),
        mock.patch.object(backward, "plan_backward", lambda *_: WALKS[name]),
    ):
        check(problem, DEVICE)


@pytest.mark.parametrize(
    ("name", "impl", "dtype"),
    cases(sorted(_SUMS_OVER_CHUNKS | {"strips", "borrowed"}), narrow_sums=True),
)
def test_walks_that_add_to_a_given_tensor(name: str, impl: str, dtype: torch.dtype) -> None:
    """An fp32 grad_weight_out takes the sum over token chunks whatever the dtype of the weight."""
    problem = Problem(impl=impl, dtype=dtype, tokens=(75,), vocab=703, hidden=40)
    operands = problem.build(DEVICE)
    out = torch.full((703, 40), 2.0, device=DEVICE)
    options: dict[str, Any] = {"impl": impl, "grad_weight_out": out}
    with mock.patch.object(backward, "plan_backward", lambda *_: WALKS[name]):
        outcome = call(operands, options)
    wanted = call(operands, {"impl": "torch"})
    assert outcome.grad_weight is None
    tolerance = {torch.float32: 5e-5, torch.float64: 5e-5}.get(dtype, 1e-2)
    scale = float(wanted.grad_weight.abs().max())
    torch.testing.assert_close(
        out - 2, wanted.grad_weight.to(out.dtype), rtol=tolerance, atol=tolerance * scale
    )
    torch.testing.assert_close(
        outcome.grad_input, wanted.grad_input, rtol=tolerance, atol=tolerance * scale
    )


@pytest.mark.parametrize("name", WALKS)
def test_sum_over_ranks_starts_when_input_gradient_is_complete(name: str) -> None:
    """Then, and not later: what follows writes dC alone, and dE is as it stays."""
    dtype = torch.bfloat16 if "borrow" in name else torch.float32
    problem = Problem(impl="torch", dtype=dtype, tokens=(75,), vocab=703, hidden=200)
    events: list[str] = []
    complete: list[torch.Tensor] = []
    product = backward.add_product

    def add_product(out: Any, a: Any, b: Any, **more: Any) -> None:
        events.append("dC" if a.stride(1) == 1 else "dE")  # G^T as it is stored, or its transpose
        product(out, a, b, **more)

    def start(reduction: Any) -> None:
        events.append("start")
        complete.append(reduction._partial.clone())

    with (
        mock.patch.object(backward, "plan_backward", lambda *_: WALKS[name]),
        mock.patch.object(backward, "add_product", add_product),
        mock.patch.object(products, "add_product", add_product),
        mock.patch.object(sharding.InputGradReduction, "start", start),
    ):
        outcome = call(problem.build(DEVICE), {"impl": "torch"})
    assert events.count("start") == 1
    before, after = events[: events.index("start")], events[events.index("start") + 1 :]
    assert "dE" not in after
    assert before[-1] == "dE"
    if name in ("whole", "whole-in-chunks", "two-passes", "two-passes-cut"):
        assert "dC" not in before
    assert "dC" in after
    assert same_bits(complete[0].view_as(outcome.grad_input), outcome.grad_input)


def test_lent_strips_leave_room_for_their_gradient() -> None:
    sizes = sizes_of(512, 96, 5000)
    walk = TokenWalk(chunk=512, strip=64, weight=True, lent=True)
    strips = list(walk.strips(sizes))
    assert strips[0][0] == 0 and strips[-1][1] == 5000
    assert all(a[1] == b[0] for a, b in itertools.pairwise(strips))
    assert strips[0][1] > 64
    for start, stop in strips:
        if stop - start > 64:
            used = -(-stop * sizes.lent_row // workspace.ALIGNMENT) * workspace.ALIGNMENT
            used += (stop - start) * sizes.gradient_row
            assert used <= 5000 * sizes.lent_row, (start, stop)


@pytest.mark.parametrize("shape", [(512, 520, 5000), (512, 513, 777), (75, 200, 703)], ids=str)
@pytest.mark.parametrize("weight_row", [0, 800])
def test_no_strip_of_a_whole_walk_overwrites_what_is_still_read(
    shape: tuple[int, int, int], weight_row: int
) -> None:
    sizes = sizes_of(*shape, weight_row=weight_row)
    sizes = sizes._replace(gradient_row=-(-shape[0] // 16) * 32)
    row, vocab = sizes.lent_row, shape[2]
    strips = list(WholeWalk(96, shape[0]).strips(sizes))
    assert strips[0][0] == 0 and strips[-1][1] == vocab
    assert all(a[1] == b[0] for a, b in itertools.pairwise(strips))
    assert max(stop - start for start, stop, copied in strips if copied or weight_row) <= 96
    for start, stop, copied in strips:
        read_later = stop if copied else start  # a product also reads its own rows
        first_byte = vocab * (row - sizes.gradient_row) + read_later * sizes.gradient_row
        assert stop * row <= first_byte or read_later == vocab
    assert any(copied for *_, copied in strips)


@pytest.mark.parametrize("ratio", [1.02, 2.0, 3.6])
@pytest.mark.parametrize("weight_row", [0, 800])
def test_no_strip_over_kept_logits_overwrites_what_is_still_read(
    ratio: float, weight_row: int
) -> None:
    hidden = 512
    sizes = sizes_of(round(ratio * hidden), hidden, 3000, weight_row=weight_row)
    columns = int(20000 * sizes.lent_row / sizes.gradient_row) // 256 * 256
    rest = TokenWalk(chunk=sizes.tokens, strip=256, weight=True)
    strips = list(PrefixWalk(512, rest).strips(sizes, columns))
    assert strips[0][0] == 0 and strips[-1][1] == columns
    assert all(a[1] == b[0] for a, b in itertools.pairwise(strips))
    assert max(stop - start for start, stop, copied in strips if copied or weight_row) <= 512
    for start, stop, copied in strips:
        read_later = stop if copied else start  # a product also reads its own rows
        assert stop * sizes.lent_row <= read_later * sizes.gradient_row
    if not weight_row and ratio == 2.0:  # the first two are of the buffer's width, then doubled
        assert [stop for _, stop, _ in strips[:4]] == [512, 1024, 2048, 4096]


def test_a_whole_walk_copies_no_more_than_it_must() -> None:
    """At N = D / 2 half of the rows that are left have their memory free each time."""
    strips = list(WholeWalk(1024, 256).strips(sizes_of(256, 512, 4096)))
    assert strips == [(0, 2048, False), (2048, 3072, False), (3072, 4096, True)]


@pytest.mark.parametrize("shape", [(512, 96, 5000), (8192, 4096, 32000), (75, 200, 703)], ids=str)
@pytest.mark.parametrize("can_borrow", [False, True])
def test_a_tail_holds_the_sum_and_nothing_overwrites_it(
    shape: tuple[int, int, int], can_borrow: bool
) -> None:
    tokens, hidden, vocab = shape
    sizes = sizes_of(*shape, can_borrow=can_borrow, gradient_row=-(-tokens // 16) * 32)
    ((_, (walk,)),) = workspace._tail_walk(sizes, 40 * MIB)
    assert isinstance(walk, TailWalk) and walk.borrow == can_borrow
    row, front = sizes.lent_row, vocab - walk.tail
    held = (tokens - can_borrow * workspace.borrowed_tokens(tokens)) * 4 * hidden
    # Aligned up from the first row of the tail.
    assert -(-front * row // workspace.ALIGNMENT) * workspace.ALIGNMENT + held <= vocab * row
    parts = (walk.ahead(sizes), list(walk.front(sizes)), list(walk.behind(sizes)))
    for strips, first, last in zip(parts, (front, 0, front), (vocab, front, vocab), strict=True):
        assert strips[0][0] == first and strips[-1][1] == last
        assert all(a[1] == b[0] for a, b in itertools.pairwise(strips))
    assert all((stop - start) * sizes.gradient_row <= front * row for start, stop in parts[0])
    for strips, last in ((parts[1], front), (parts[2], vocab)):
        for start, stop in strips:
            if stop - start > walk.strip:  # G lies after the strip's own rows
                used = -(-stop * row // workspace.ALIGNMENT) * workspace.ALIGNMENT
                assert used + (stop - start) * sizes.gradient_row <= last * row


def test_a_tail_is_taken_where_the_sum_fits_nowhere_else() -> None:
    """5% of the logits of a vocabulary of 32000: less than half of dE's sum."""
    mib = workspace.default_workspace_bytes(8192, 4096, 32000) // MIB
    assert mib == 32
    (walk,) = plan_backward(sizes_of(8192, 4096, 32000), mib * MIB)
    assert isinstance(walk, TailWalk)
    # Of a vocabulary that does not hold it, all logits are computed twice.
    walks = plan_backward(sizes_of(8192, 4096, 8000), mib * MIB)
    assert [type(each) for each in walks] == [TokenWalk, StripWalk]


def test_kept_logits_make_a_second_look_at_them_cheap() -> None:
    """What is kept is read and not computed again; the rest is a product."""
    shape, mib = (8192, 4096, 32000), 32
    gemm, moved = sizes_of(*shape).gemm, 4 * 8192  # bytes per column
    assert sizes_of(*shape).logits(0, 32000) == gemm
    some = sizes_of(*shape, known=8000)
    assert some.logits(0, 32000) == gemm * 3 // 4 + 8000 * moved
    assert some.logits(16000, 32000) == gemm // 2
    all_but_some = sizes_of(*shape, known=24000)
    assert all_but_some.logits(16000, 32000) == gemm // 4 + 8000 * moved
    few = sizes_of(*shape, can_hold=False, lent_row=0)
    assert len(plan_backward(few, mib * MIB)) == 2
    price = {known: _price_of_two(few._replace(known=known), mib) for known in (0, 32000)}
    assert price[0] - price[32000] == gemm - 32000 * moved


@pytest.mark.parametrize("shape", [(8192, 2304, 256000), (8192, 8192, 16032)], ids=str)
def test_kept_logits_are_not_read_twice_without_need(shape: tuple[int, int, int]) -> None:
    walks = [plan_backward(sizes_of(*shape, known=known), 96 * MIB) for known in (0, shape[2])]
    assert walks[0] == walks[1] and len(walks[0]) == 1


def _price_of_two(sizes: BackwardSizes, mib: int) -> int:
    ((price, _),) = workspace._two_passes(sizes, mib * MIB)
    return price


def sizes_of(tokens: int, hidden: int, vocab: int, **more: Any) -> BackwardSizes:
    """A bf16 problem on a GPU that returns a bf16 dC, or as `more` says."""
    given: dict[str, Any] = {
        "tokens": tokens,
        "vocab": vocab,
        "hidden": hidden,
        "element": 2,
        "token_row": 4 * hidden,
        "single_row": 0,
        "can_borrow": True,
        "token_tile": 1,
        "can_hold": True,
        "strip_row": 0,
        "weight_row": 0,
        "weight_accumulator": 4 * hidden,
        "weight_accumulates": False,
        "lent_row": 2 * hidden,
        "gradient_row": 2 * tokens,
        "loan_columns": 0,
        "loan_bytes": 0,
        "sequential": False,
        "fixed": 0,
        "known": 0,
        "need_input": True,
        "need_weight": True,
    }
    return BackwardSizes(**(given | more))


SHAPES = [(8192, 2304, 256000), (8192, 4096, 128256), (8192, 8192, 16032)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mib", [16, 64, 128, 256])
@pytest.mark.parametrize("into", ["bf16", "fp32", "bf16-given"])
def test_a_plan_fits_its_workspace(shape: tuple[int, int, int], mib: int, into: str) -> None:
    """What a plan says that it holds at once, added up."""
    apart = {"lent_row": 0, "can_hold": False}
    given = {"fp32": {"weight_accumulates": True, **apart}, "bf16-given": apart}
    sizes = sizes_of(*shape, **given.get(into, {}))
    tokens, _, vocab = shape
    for walk in plan_backward(sizes, mib * MIB):
        if isinstance(walk, TokenWalk):
            sums = sizes.sum_bytes(walk.chunk, walk.borrow)
            if walk.strip >= vocab:
                sums = 0
            held = sums + walk.chunk * walk.strip * sizes.element
        elif isinstance(walk, WholeWalk | TailWalk):
            held = walk.strip * sizes.gradient_row
        else:
            sums = walk.strip * sizes.weight_accumulator if walk.chunk < tokens else 0
            held = sums + walk.chunk * walk.strip * sizes.element
        assert held <= mib * MIB, walk


@pytest.mark.parametrize(
    ("shape", "mib", "passes"),
    [(SHAPES[0], 128, 1), (SHAPES[1], 128, 1), (SHAPES[1], 100, 1), (SHAPES[2], 64, 1)],
    ids=str,
)
def test_one_recomputation_where_memory_allows(
    shape: tuple[int, int, int], mib: int, passes: int
) -> None:
    assert len(plan_backward(sizes_of(*shape), mib * MIB)) == passes


@pytest.mark.parametrize("impl", ["torch"])
def test_the_choice_changes_rounding_only(impl: str) -> None:
    """Default and least workspace agree; the same workspace gives the same bits."""
    problem = Problem(impl=impl, tokens=(300,), vocab=1200, hidden=100)
    operands = problem.build(DEVICE)
    first, again = (call(operands, {"impl": impl}) for _ in range(2))
    small = call(operands, {"impl": impl, "workspace_bytes": MIB})
    assert same_bits(first.grad_weight, again.grad_weight)
    torch.testing.assert_close(small.grad_weight, first.grad_weight, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(small.grad_input, first.grad_input, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("hidden", "mib", "rows"),
    [(4096, 105, 768), (4096, 1, 16), (8192, 1, 8), (16384, 1, 4), (1 << 17, 1, 1), (16, 105, 999)],
)
def test_pieces_of_dc_stay_within_a_quarter_of_the_workspace(
    hidden: int, mib: int, rows: int
) -> None:
    """Whole tiles of a product where they fit, and not a fixed number of rows where D is large."""
    run = SimpleNamespace(
        piece_bytes=min(16, mib / 8) * MIB, _product_dtype=lambda _: torch.float32
    )
    run.piece_bytes = int(run.piece_bytes)
    out = torch.empty(999, hidden, device="meta")
    found = backward._BackwardPass._piece_rows(run, out)  # type: ignore[arg-type]
    assert found == (rows if rows < 128 else rows - rows % 128)
    assert found == 1 or found * hidden * 4 <= mib * MIB // 4


def _sizes_of_the_papers_filter(tokens: int, hidden: int, vocab: int) -> BackwardSizes:
    """On a GPU: those of a small call, made larger."""
    found: list[BackwardSizes] = []

    def plan(sizes: BackwardSizes, workspace_bytes: int) -> Any:
        found.append(sizes)
        return plan_backward(sizes, workspace_bytes)

    small = Problem(impl="triton", dtype=torch.float16, tokens=(70,), vocab=150, hidden=32)
    options = {"impl": "triton", "grad_filter": cce_tp.GradFilter.paper()}
    with operands_as_they_are(), mock.patch.object(backward, "plan_backward", plan):
        call(small.build(DEVICE), options)
    (sizes,) = found
    assert sizes.can_borrow and sizes.token_tile >= 16
    assert sizes.weight_row == 0 and sizes.fixed == 48 * 150
    assert sizes.token_row == sizes.weight_accumulator == 4 * 32 and sizes.strip_row == 2 * 32
    return sizes._replace(
        tokens=tokens,
        vocab=vocab,
        hidden=hidden,
        token_row=4 * hidden,
        token_tile=128,
        strip_row=2 * hidden,
        weight_accumulator=4 * hidden,
        gradient_row=2 * tokens,
        fixed=48 * vocab,
    )


@pytest.mark.parametrize(
    ("shape", "steps"),
    [
        ((2048, 2304, 131072), 16),
        ((8192, 2304, 131072), 47),
        ((8191, 2304, 131072), 48),
        ((4096, 4096, 128256), 36),
    ],
    ids=str,
)
def test_the_papers_filter_takes_few_steps(shape: tuple[int, int, int], steps: int) -> None:
    """At its default workspace; each is several launches, for which a GPU waits."""
    tokens, hidden, vocab = shape
    sizes = _sizes_of_the_papers_filter(*shape)
    cap = workspace.default_workspace_bytes(tokens, hidden, vocab, filtered=True)
    (walk,) = plan_backward(sizes, cap)
    assert isinstance(walk, TokenWalk) and len([*walk.strips(sizes)]) <= steps


@pytest.mark.parametrize(("tokens", "chunk"), [(8192, 8192), (8191, 4096), (456, 256), (71, 71)])
@pytest.mark.parametrize("tile", [1, 32, 128])
def test_a_sum_in_two_places_does_not_cut_tiles_of_tokens(
    tokens: int, chunk: int, tile: int
) -> None:
    """And takes no more memory than is planned for."""
    planned = sizes_of(tokens, 4, 1000, token_tile=tile).sum_bytes(chunk, True)
    for start, stop in workspace.blocks(tokens, chunk):
        out = torch.empty(stop - start, 4, dtype=torch.bfloat16)
        parts = InputSum(out, torch.float32, in_place=False, borrow=True, tile=tile).parts
        assert parts[-1][0] % tile == 0 and (len(parts) == 2) == (
            (stop - start) // 2 >= max(8, tile)
        )
        assert parts[-1][2].nbytes <= planned <= 16 * chunk
    assert sizes_of(tokens, 4, 1000).sum_bytes(chunk, False) == 16 * chunk


@pytest.mark.parametrize("tokens", [16, 71, 8191])
def test_halves_of_a_sum_start_aligned(tokens: int) -> None:
    """An operand that starts at an odd token makes the library's product several times slower."""
    out = torch.empty(tokens, 4, dtype=torch.bfloat16)
    assert InputSum.can_borrow(out, torch.float32)
    total = InputSum(out, torch.float32, in_place=False, borrow=True)
    (start, middle, inside), (again, stop, own) = total.parts
    assert (start, middle, stop) == (0, again, tokens) and middle % 8 == 0
    assert 2 * inside.shape[0] > tokens - 16 and own.shape[0] == tokens - middle
    values = torch.randn(tokens, 4)
    for n0, n1, part in total.parts:
        part.copy_(values[n0:n1])
    total.finish(None)
    assert same_bits(out, values.bfloat16())
    assert not InputSum.can_borrow(out[:15], torch.float32)
