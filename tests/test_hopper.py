"""cce_tp.kernels.hopper: the kernels that Hopper runs in place of Triton's, bit by bit, and of the
vendor's product.

Where they run is decided by sizes; here, on a Hopper GPU, both are made to run and compared.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from types import FunctionType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from cce_tp import products
from cce_tp.kernels import backward, forward, launch, tuning
from cce_tp.kernels.launch import LogitsForm
from cce_tp.problem import LocalLogits, LogitGradient
from cce_tp.stats import StatRows
from cce_tp.workspace import gradient_pitch
from variants import HAS_CUDA

ON_HOPPER = HAS_CUDA and torch.cuda.get_device_capability() == (9, 0) and tuning._has_gluon()
hopper = pytest.mark.skipif(HAS_CUDA and not ON_HOPPER, reason="needs a Hopper GPU and Gluon")
gpu = pytest.mark.gpu
pytestmark = pytest.mark.no_poison


@pytest.mark.parametrize(
    ("tokens", "vocab", "faster"),
    [
        (8192, 256000, True),
        (8192, 128256, True),
        (16384, 128256, True),
        (8192, 32064, True),
        (3072, 50304, False),
        # Half of the last round of tiles, or most of the last row of them, would be idle.
        (8192, 16032, False),
        (4096, 128256, False),
        (1024, 128256, False),
        (1000, 50000, False),
        (1, 128256, False),
        (8192, 1, False),
        # Of less than a round of tiles two make the shorter ones.
        (64, 256, False),
    ],
)
def test_where_three_are_the_faster_ones(tokens: int, vocab: int, faster: bool) -> None:
    """On a GPU of 132 multiprocessors."""
    assert tuning.warpgroups_pay(tokens, vocab, 132, 0.012) == faster


# What no kernel would write, in 16 bits, too.
UNWRITTEN = -16384.0


class Case(NamedTuple):
    """Sizes of a problem, and what is asked of it."""

    tokens: int
    vocab: int
    hidden: int
    dtype: torch.dtype = torch.bfloat16
    scale: float = 1.0
    first_id: int = 0
    bias: bool = False
    softcap: float | None = None

    @property
    def rounds_alike(self) -> bool:
        """Whether scale, bias and cap are rounded as in Triton's kernels, which take one after the
        other."""
        return self.scale in (0.5, 1.0) and not (self.bias and self.softcap)

    def make(self) -> LocalLogits:
        made: dict[str, Any] = {"device": "cuda", "dtype": self.dtype}
        input = torch.randn(self.tokens, self.hidden, **made)
        weight = torch.randn(self.vocab, self.hidden, **made) * 3 * self.hidden**-0.5
        first, past = self.first_id - self.vocab // 4, self.first_id + 2 * self.vocab
        target = torch.randint(min(first, 0), past, (self.tokens,), device="cuda")
        target[:: max(2, self.tokens // 7)] = -100
        bias = torch.randn(self.vocab, **made) if self.bias else None
        return LocalLogits(input, weight, bias, target, self.first_id, self.scale, self.softcap)


SIZES = [
    Case(1, 1, 32),
    Case(63, 255, 8),
    Case(64, 256, 64),
    Case(65, 257, 72),
    Case(192, 1111, 256),
    Case(193, 1111, 264),
    Case(1500, 1111, 224),
    Case(1500, 20000, 256),
    Case(8192, 9000, 512),
    Case(3000, 40001, 96, torch.float16),
]
OPTIONS = [Case(700, 9000, 256, first_id=77), Case(700, 9000, 256, scale=0.5)]
MORE = [
    Case(33, 100, 64, bias=True),
    Case(700, 9000, 256, scale=0.7),
    Case(700, 9000, 256, scale=0.7, bias=True),
    Case(700, 9000, 256, scale=0.7, softcap=5.0),
    Case(700, 9000, 256, bias=True),
    Case(65, 257, 72, softcap=5.0),
    Case(700, 9000, 224, scale=0.5, bias=True, softcap=5.0),
    Case(1500, 1111, 264, torch.float16, bias=True, softcap=50.0),
]
BY_WARPGROUPS = list(itertools.product([*SIZES, *OPTIONS, *MORE], (2, 3)))
ROWS = StatRows(logit_sum=False, entropy=False, argmax=False)


@contextlib.contextmanager
def made_by(warpgroups: int) -> Iterator[None]:
    """As if the sizes said so, on a device that two are for."""
    with (
        mock.patch.object(tuning, "warpgroups", lambda *_: warpgroups),
        mock.patch.object(tuning, "few_warpgroups", lambda _: 2),
    ):
        yield


def _statistics(
    logits: LocalLogits, keep_columns: int, masses: bool, rows: StatRows = ROWS
) -> list[Tensor]:
    """Of all tiles, and what is kept."""
    num_tokens, vocab, _ = logits.shape
    num_tiles = tuning.ceil_div(vocab, 256)
    tiles, merged = forward.empty_tiles(num_tiles, num_tokens, rows, logits.input, more=int(masses))
    tiles.fill_(UNWRITTEN)
    merged.fill_(UNWRITTEN)
    ids = torch.randperm(vocab, device="cuda") if masses else None
    keep = None
    if keep_columns:
        pitch = gradient_pitch(num_tokens)
        keep = torch.full((keep_columns, pitch), UNWRITTEN, dtype=torch.float16, device="cuda")
        keep = keep[:, :num_tokens]
    forward.tile_statistics(logits, rows, tiles, merged, ids=ids, masses=masses, keep=keep)
    return [tiles, merged[2], *([] if keep is None else [keep])]


def _assert_equal_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        whole = {2: torch.int16, 4: torch.int32}[one.itemsize]
        assert torch.equal(one.contiguous().view(whole), other.contiguous().view(whole))


def test_only_what_they_can_do_goes_to_them() -> None:
    """They know no filter and no large cap; and what takes registers goes by two warpgroups."""
    input, weight = torch.zeros(8, 16).bfloat16(), torch.zeros(32, 16).bfloat16()
    target = torch.zeros(8, dtype=torch.int64)
    plain = LocalLogits(input, weight, None, target, 0, 1.0, None)
    upstream = LogitGradient(*torch.ones(3, 8), 0.0, 0.0, 32)
    reached: list[str] = []

    def maker(name: str) -> Any:
        def make(form: LogitsForm, *arguments: Any) -> Any:
            reached.append(f"{name} {form.warpgroups}")
            return lambda *tensors: None

        return make

    ours = SimpleNamespace(statistics=maker("hopper"), gradients=maker("hopper"))
    with (
        made_by(3),
        mock.patch.object(tuning, "use_descriptors", lambda *_: True),
        mock.patch.dict("sys.modules", {"cce_tp.kernels.hopper": ours}),
        mock.patch("cce_tp.kernels.hopper", ours, create=True),
        mock.patch.object(forward, "_tile_statistics", maker("triton")),
        mock.patch.object(backward, "_grad_logits", maker("triton")),
    ):
        assert LogitsForm.of(plain).warpgroups == 3
        capped = plain._replace(logit_softcap=30.0)
        assert LogitsForm.of(capped).warpgroups == 3
        assert LogitsForm.of(plain._replace(logit_softcap=51.0)).warpgroups == 0
        for rows in (
            ROWS,
            *(StatRows(*flags) for flags in torch.eye(3, dtype=torch.bool).tolist()),
        ):
            tiles, merged = forward.empty_tiles(1, 8, rows, input)
            forward.tile_statistics(plain, rows, tiles, merged)
        assert reached == ["hopper 3", "hopper 3", "hopper 2", "hopper 2"]
        reached.clear()
        keep = torch.zeros(32, 8, dtype=torch.float16)
        for flags in ((False, True, True), (False, False, True)):
            tiles, merged = forward.empty_tiles(1, 8, StatRows(*flags), input)
            forward.tile_statistics(plain, StatRows(*flags), tiles, merged, keep=keep)
            forward.tile_statistics(plain, StatRows(*flags), tiles, merged, ids=target)
        assert reached == ["triton 0", "triton 0", "hopper 2", "triton 0"]
        reached.clear()
        tiles, merged = forward.empty_tiles(1, 8, ROWS, input, more=3)
        forward.tile_statistics(capped, ROWS, tiles, merged)
        forward.tile_statistics(capped, ROWS, tiles, merged, keep=keep)
        forward.tile_statistics(capped, ROWS, tiles, merged, ids=target, masses=True)
        assert reached == ["hopper 3", "hopper 2", "triton 0"]
        reached.clear()
        for eps in (None, 1e-3):
            backward.grad_logits(plain, upstream, torch.zeros(32, 8).bfloat16(), eps)
        backward.grad_logits(capped, upstream, torch.zeros(32, 8).bfloat16(), None)
        assert reached == ["hopper 3", "triton 0", "hopper 2"]
        reached.clear()
        with mock.patch.object(tuning, "few_warpgroups", lambda _: 0):
            forward.tile_statistics(capped, ROWS, tiles, merged, keep=keep)
            backward.grad_logits(capped, upstream, torch.zeros(32, 8).bfloat16(), None)
        assert reached == ["triton 0", "triton 0"]


def test_two_warpgroups_are_for_a_large_cache() -> None:
    """Elsewhere three may waste a little more, where D is small."""
    few, many, narrow = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for shape in ((1024, 4096), (8192, 4096), (4096, 2304))
    )
    found = []
    for mib in (50, 60):
        with (
            mock.patch.object(tuning, "is_interpreted", lambda: False),
            mock.patch.object(tuning, "_is_hopper", lambda _: True),
            mock.patch.object(tuning, "_l2_bytes", lambda _, mib=mib: mib << 20),
        ):
            config = tuning.tile_config(90, 2)
            found += [tuning.warpgroups(each, 128256, config, 132) for each in (few, many, narrow)]
            found.append(tuning.few_warpgroups(few))
    assert found == [0, 3, 3, 0, 2, 3, 2, 2]


@pytest.mark.parametrize(("hidden", "found"), [(4096, 2), (4112, 2), (4104, 0), (4100, 0)])
def test_rows_that_cut_sectors_go_to_tritons_kernels(hidden: int, found: int) -> None:
    input = torch.empty(1024, hidden, dtype=torch.bfloat16, device="meta")
    with (
        mock.patch.object(tuning, "is_interpreted", lambda: False),
        mock.patch.object(tuning, "_is_hopper", lambda _: True),
        mock.patch.object(tuning, "few_warpgroups", lambda _: 2),
    ):
        config = tuning.tile_config(90, 2)
        assert tuning.warpgroups(input, 100, config, 132) == found


@gpu
@hopper
def test_several_groups_of_token_blocks() -> None:
    """Of 3, 3 and 2 blocks, of which the last has fewer tokens."""
    from cce_tp.kernels import hopper as module

    logits = Case(1500, 30000, 256).make()
    with made_by(0):
        expected = _statistics(logits, 0, masses=False)
    launch.forget()  # how many are in a group is worked out once for a size
    try:
        with made_by(3), mock.patch.dict(module._GROUP_BLOCKS, {3: 3}):
            assert module._group(LogitsForm.of(logits).token_blocks, 3) == 3
            _assert_equal_bits(_statistics(logits, 0, masses=False), expected)
    finally:
        launch.forget()


@gpu
@hopper
@pytest.mark.parametrize("keep", [0, 1, 2], ids=["nothing-kept", "half-kept", "all-kept"])
@pytest.mark.parametrize(("case", "warpgroups"), BY_WARPGROUPS, ids=str)
def test_statistics_have_the_same_bits(case: Case, warpgroups: int, keep: int) -> None:
    """But for what is rounded once here and twice there: to rounding."""
    logits = case.make()
    masses = case.hidden == 256 and case.softcap is None
    columns = case.vocab * keep // 2
    rows = ROWS._replace(logit_sum=case.vocab > 1000)
    with made_by(0):
        expected = _statistics(logits, columns, masses, rows)
    assert not (expected[0] == UNWRITTEN).any()
    with made_by(warpgroups), mock.patch.object(forward, "_tile_statistics", None):
        # A race would not show every time.
        found = [_statistics(logits, columns, masses, rows) for _ in range(3)]
    for each in found[1:]:
        _assert_equal_bits(each, found[0])
    if case.rounds_alike:
        _assert_equal_bits(found[0], expected)
    # Maxima and sums of exponentials; sums in which terms cancel, and what is kept in fp16.
    torch.testing.assert_close(found[0][0][:, :2], expected[0][:, :2], rtol=5e-5, atol=5e-5)
    for one, other in zip(found[0], expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)


@gpu
@hopper
@pytest.mark.parametrize("case", [*OPTIONS, *MORE, Case(1500, 20000, 256)], ids=str)
@pytest.mark.parametrize("entropy, keep", [(False, False), (True, False), (False, True)])
def test_optional_statistics_have_the_same_bits(case: Case, entropy: bool, keep: bool) -> None:
    logits, rows = case.make(), StatRows(logit_sum=True, entropy=entropy, argmax=True)
    columns = case.vocab // 2 if keep else 0
    with made_by(0):
        expected, target, *kept = _statistics(logits, columns, False, rows)
    with made_by(3), mock.patch.object(forward, "_tile_statistics", None):
        found = [_statistics(logits, columns, False, rows) for _ in range(3)]
    for tiles, found_target, *found_kept in found:
        _assert_equal_bits([tiles, found_target, *found_kept], found[0])
        if case.rounds_alike:
            _assert_equal_bits(found_kept, kept)
        for one, other in zip(found_kept, kept, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)
        if not case.rounds_alike:
            ids = tiles[:, -1].contiguous().view(torch.int32)
            same = ids == expected[:, -1].contiguous().view(torch.int32)
            assert same.float().mean() > 0.99  # two logits that are equal but for rounding
            torch.testing.assert_close(tiles[:, :-1], expected[:, :-1], rtol=2e-3, atol=2e-3)
            torch.testing.assert_close(found_target, target, rtol=2e-3, atol=2e-3)
        else:
            _assert_equal_bits([tiles, found_target], [expected, target])


@gpu
@hopper
@pytest.mark.parametrize(
    "z_loss_and_smoothing", [(0.0, 0.0), (1e-2, 0.1)], ids=["plain", "z-loss-and-smoothing"]
)
@pytest.mark.parametrize(("case", "warpgroups"), BY_WARPGROUPS, ids=str)
def test_gradients_have_the_same_bits(
    case: Case, warpgroups: int, z_loss_and_smoothing: tuple[float, float]
) -> None:
    """But for terms that come together in one instruction here and in two there: to rounding."""
    logits = case.make()
    num_tokens, vocab, _ = logits.shape
    pitch = gradient_pitch(num_tokens)
    # As they are, so that the probabilities are some that a gradient of 16 bits shows.
    x = logits.input.float() @ logits.weight.float().t()
    x = (x if logits.bias is None else x + logits.bias) * case.scale
    x = x if case.softcap is None else case.softcap * torch.tanh(x / case.softcap)
    max_logit = x.amax(dim=1)
    upstream = LogitGradient(
        torch.rand(num_tokens, device="cuda") * (logits.target >= 0),
        max_logit,
        x.logsumexp(dim=1) - max_logit,
        *z_loss_and_smoothing,
        vocab,
    )
    del x

    def run() -> Tensor:
        out = torch.full((vocab, pitch), UNWRITTEN, dtype=case.dtype, device="cuda")[:, :num_tokens]
        backward.grad_logits(logits, upstream, out, None)
        return out

    with made_by(0):
        expected = run()
    assert torch.isfinite(expected).all() and not (expected == UNWRITTEN).any()
    with made_by(warpgroups), mock.patch.object(backward, "_grad_logits", None):
        found = [run() for _ in range(3)]
    _assert_equal_bits([found[0], found[0]], found[1:])
    if z_loss_and_smoothing == (0.0, 0.0) and case.rounds_alike and not case.softcap:
        _assert_equal_bits(found[:1], [expected])
    smallest = 1e-7 if case.dtype == torch.float16 else 1e-9
    torch.testing.assert_close(found[0], expected, rtol=0.01, atol=smallest)


@gpu
@hopper
@pytest.mark.parametrize("warpgroups", [2, 3])
def test_a_bias_may_lie_anywhere(warpgroups: int) -> None:
    """Two bytes from where several of them could be loaded at once."""
    logits = Case(300, 1024, 128, bias=True).make()
    assert logits.bias is not None
    moved = torch.empty(1025, dtype=logits.bias.dtype, device="cuda")[1:].copy_(logits.bias)
    ones = torch.ones(300, device="cuda")
    upstream = LogitGradient(ones, 9 * ones, ones, 0.0, 0.0, 1024)
    found = []
    with (
        made_by(warpgroups),
        mock.patch.object(forward, "_tile_statistics", None),
        mock.patch.object(backward, "_grad_logits", None),
    ):
        for each in (logits, logits._replace(bias=moved)):
            out = torch.empty(1024, gradient_pitch(300), dtype=torch.bfloat16, device="cuda")
            backward.grad_logits(each, upstream, out[:, :300], None)
            found.append([*_statistics(each, 512, masses=False), out[:, :300]])
    _assert_equal_bits(found[1], found[0])


@gpu
@hopper
@pytest.mark.parametrize("warpgroups", [0, 2, 3])
def test_a_huge_scaled_logit_has_a_finite_gradient(warpgroups: int) -> None:
    """At 1e10 a product that is rounded in the forward pass alone is hundreds above its maximum."""
    logits = Case(300, 1024, 128, scale=0.7).make()
    logits = logits._replace(input=logits.input * 1e10)
    with made_by(warpgroups):
        tiles, _ = _statistics(logits, 0, masses=False)
        max_logit = tiles[:, 0].amax(dim=0)
        upstream = LogitGradient(
            torch.ones(300, device="cuda"), max_logit, torch.zeros(300, device="cuda"),
            0.0, 0.0, 1024,
        )  # fmt: skip
        out = torch.empty(1024, gradient_pitch(300), dtype=torch.bfloat16, device="cuda")[:, :300]
        backward.grad_logits(logits, upstream, out, None)
    assert torch.isfinite(out).all() and out.abs().max() <= 1


class _Int(int):
    """A number as Gluon has it."""

    def to(self, _: Any) -> _Int:
        return self

    def __add__(self, other: int) -> _Int:
        return _Int(int(self) + other)

    def __sub__(self, other: int) -> _Int:
        return _Int(int(self) - other)

    def __mul__(self, other: int) -> _Int:
        return _Int(int(self) * other)

    def __floordiv__(self, other: int) -> _Int:
        return _Int(int(self) // other)


@pytest.mark.skipif(not tuning._has_gluon(), reason="this Triton's Gluon is another")
def test_every_tile_is_made_once_and_row_blocks_take_turns() -> None:
    """For the last group of rows, too, which may have fewer of them; at 8192 tokens a program with
    all tiles of the short last row block would be early, and the others late."""
    from cce_tp.kernels import hopper as module

    names = {"minimum": min, "maximum": max, "uint32": None, "int32": None}
    names["where"] = lambda condition, one, other: one if condition else other
    tile = FunctionType(module._tile.fn.__code__, {"gl": SimpleNamespace(**names)})

    def order(rows: int, columns: int, group: int) -> list[tuple[int, int]]:
        sizes = (_Int(rows), _Int(columns), _Int(group))
        return [tile(_Int(number), *sizes) for number in range(rows * columns)]

    for rows, columns in itertools.product((1, 2, 3, 4, 7, 8, 43), (1, 2, 33, 130, 501)):
        for group in {1, 3, 4, rows, module._group(rows, 3)}:
            everything = set(itertools.product(range(rows), range(columns)))
            assert set(order(rows, columns, group)) == everything
    last = [block == 42 for block, _ in order(43, 1000, module._group(43, 3))]
    of_programs = [sum(last[program::132]) for program in range(132)]
    assert min(of_programs) >= 6 and max(of_programs) <= 9  # of 7.6 on average


@pytest.mark.parametrize(
    ("rows", "columns", "made"),
    [
        (25344, 4096, 25344),  # 16 rounds of 132 tiles
        (8448, 2304, 8448),
        (128256, 8192, 128256),
        (16384, 4096, 15360),  # an eleventh round would be hardly begun
        # The last round a third or a half full, or columns that leave a part of each tile unused.
        (8448, 4096, 0),
        (12672, 2304, 0),
        (25344, 4104, 0),
        (1000, 4096, 0),
        (1, 1, 0),
    ],
)
def test_rows_of_a_product_that_they_make(rows: int, columns: int, made: int) -> None:
    assert tuning.product_rows(rows, columns, 132) == made


def test_only_products_that_are_rounded_once_go_to_them() -> None:
    """Not what is added to in 16 bits, nor sums of few terms."""
    narrow, wide = torch.zeros(8448, 2304).bfloat16(), torch.zeros(8448, 2304)
    a, b = torch.zeros(8448, 4096).bfloat16(), torch.zeros(4096, 2304).bfloat16()

    def rows(out: Tensor, accumulate: bool, terms: int = 4096) -> int:
        return tuning.rows_for_warpgroups(out, a[:, :terms], b[:terms], accumulate)

    with (
        mock.patch.object(tuning, "is_interpreted", lambda: False),
        mock.patch.object(tuning, "_is_hopper", lambda _: True),
        mock.patch.object(tuning, "use_descriptors", lambda *_: True),
        mock.patch.object(tuning, "config_for", lambda _: (None, 132)),
    ):
        assert rows(narrow, False) == rows(wide, True) == rows(wide, False) == 8448
        assert rows(narrow, True) == rows(narrow, False, 256) == rows(narrow.half(), False) == 0
        assert tuning.rows_for_warpgroups(wide, a.float(), b.float(), True) == 0
        with mock.patch.object(tuning, "_is_hopper", lambda _: False):
            assert rows(wide, True) == 0


def _weight_products(
    shape: tuple[int, int, int], dtypes: tuple[torch.dtype, torch.dtype], rows: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(dC found, right, row sums found, right) for an out that is written, and that is added to if
    it is in fp32, of which `rows` go to `kernels.hopper`."""
    vocab, tokens, hidden = shape
    narrow, wide = dtypes
    pitch = gradient_pitch(tokens)
    stored = torch.randn(vocab, pitch, device="cuda").to(narrow)
    stored[:, tokens:] = torch.nan  # what follows a row is nobody's
    grad_VN, input = stored[:, :tokens], torch.randn(tokens, hidden, device="cuda").to(narrow)
    product, sums = grad_VN.double() @ input.double(), grad_VN.double().sum(dim=1)
    for accumulate in (False, True)[: 1 + (wide == torch.float32)]:
        before = torch.randn(vocab, hidden, device="cuda").to(wide)
        sums_before = torch.randn(vocab, device="cuda")
        made = []
        for _ in range(2):
            around = torch.full((vocab + 2, hidden), UNWRITTEN, device="cuda", dtype=wide)
            out, sums_out = around[1:-1].copy_(before), sums_before.clone()
            with mock.patch.object(tuning, "rows_for_warpgroups", lambda *_: rows):
                backward.weight_product(out, grad_VN, input, accumulate=accumulate, sums=sums_out)
            assert (around[:: vocab + 1] == UNWRITTEN).all()
            made.append((out, sums_out))
        _assert_equal_bits([*made[0]], [*made[1]])
        alone = before.clone()
        with mock.patch.object(tuning, "rows_for_warpgroups", lambda *_: rows):
            backward.weight_product(alone, grad_VN, input, accumulate=accumulate, sums=None)
        _assert_equal_bits([alone], [made[0][0]])
        right = product + before.double() if accumulate else product
        yield made[0][0], right, made[0][1], sums + sums_before.double()


@gpu
@hopper
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "shape",
    [(1, 8, 8), (191, 200, 264), (193, 33, 256), (1000, 1111, 512), (5000, 4096, 1304)],
    ids=str,
)
def test_weight_products(
    shape: tuple[int, int, int], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """And their rows' sums; all rows by it, or a part."""
    for rows in (shape[0], max(1, shape[0] // 2)):
        for found, right, sums_found, sums_right in _weight_products(shape, dtypes, rows):
            error = (found.double() - right).norm() / right.norm()
            assert error < torch.finfo(dtypes[1]).eps + 1e-5
            torch.testing.assert_close(sums_found.double(), sums_right, rtol=1e-5, atol=1e-3)


@gpu
@hopper
def test_weight_products_keep_what_is_not_finite() -> None:
    grad_VN = torch.zeros(300, 2048, device="cuda", dtype=torch.bfloat16)
    grad_VN[7, 11], grad_VN[250, 2047] = torch.nan, torch.inf
    input = torch.ones(2048, 256, device="cuda", dtype=torch.bfloat16)
    out, sums = torch.zeros(300, 256, device="cuda"), torch.zeros(300, device="cuda")
    with (
        mock.patch.object(tuning, "rows_for_warpgroups", lambda *_: 300),
        mock.patch.object(products, "weight_product", None),
    ):
        backward.weight_product(out, grad_VN, input, accumulate=True, sums=sums)
    for found in (out, sums[:, None]):
        assert found[7].isnan().all() and (found[250] == torch.inf).all()
        assert (found[8:250] == 0).all()


@gpu
@hopper
@pytest.mark.parametrize("into", [False, True], ids=["returned", "added"])
def test_the_bias_gradient_comes_with_dc(into: bool) -> None:
    """Of a call whose dC goes to them, in every way in which it is cut; against fp32."""
    import cce_tp

    tokens, vocab, hidden = 4096, 9000, 2304
    input = torch.randn(tokens, hidden, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(vocab, hidden, device="cuda") * 0.05).bfloat16().requires_grad_()
    bias = torch.randn(vocab, device="cuda").bfloat16().requires_grad_()
    target = torch.randint(0, vocab, (tokens,), device="cuda")
    wide = [each.detach().float().requires_grad_() for each in (input, weight, bias)]
    logits = wide[0] @ wide[1].t() + wide[2]
    torch.nn.functional.cross_entropy(logits, target).backward()
    reached: list[int] = []

    def product_rows(rows: int, *more: int) -> int:
        reached.append(rows)
        return rows - rows % 2

    options = {"grad_weight_out": torch.zeros(vocab, hidden, device="cuda")} if into else {}
    for more in ({}, {"keep_logits_in_grad": False}, {"workspace_bytes": 24 << 20}):
        if into and "keep_logits_in_grad" in more:
            continue
        reached.clear()
        for each in (input, weight, bias):
            each.grad = None
        if into:
            options["grad_weight_out"].zero_()
        with mock.patch.object(tuning, "product_rows", product_rows):
            cce_tp.linear_cross_entropy(
                input, weight, target, linear_bias=bias, **options, **more
            ).backward()
        assert sum(reached) >= vocab
        dC = options["grad_weight_out"] if into else weight.grad
        for grad, right in ((input.grad, wide[0]), (dC, wide[1]), (bias.grad, wide[2])):
            assert grad is not None and right.grad is not None
            assert (grad.float() - right.grad).norm() / right.grad.norm() < 5e-3


@gpu
@hopper
def test_a_call_of_that_size_takes_them() -> None:
    """And is right: the loss against fp32, at the least number of tokens and rows that do."""
    import cce_tp

    tokens, vocab, hidden = 8192, 40960, 64
    input = torch.randn(tokens, hidden, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(vocab, hidden, device="cuda").bfloat16() * 0.3
    weight.requires_grad_()
    target = torch.randint(0, vocab, (tokens,), device="cuda")
    logits = LocalLogits(input, weight, None, target, 0, 1.0, None)
    assert LogitsForm.of(logits).warpgroups
    loss = cce_tp.linear_cross_entropy(input, weight, target)
    loss.backward()
    exact_input = input.detach().float().requires_grad_()
    exact_weight = weight.detach().float().requires_grad_()
    exact = torch.nn.functional.cross_entropy(exact_input @ exact_weight.t(), target)
    exact.backward()
    torch.testing.assert_close(loss, exact, rtol=1e-5, atol=1e-5)
    for grad, right in ((input.grad, exact_input.grad), (weight.grad, exact_weight.grad)):
        assert grad is not None and right is not None
        assert (grad.float() - right).norm() / right.norm() < 4e-3
