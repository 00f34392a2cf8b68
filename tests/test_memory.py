"""Peak memory: nothing of N x V_local elements, and temporaries that fit `workspace_bytes`.

On the CPU from the profiler's allocation events, on a GPU from the allocator's peak.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import cce_tp
from backward_passes import operands_as_they_are
from cce_tp import ops
from cce_tp.backward import _BackwardPass
from cce_tp.problem import KeptLogits
from cce_tp.workspace import BackwardSizes
from ranks import Rank, RankPool
from variants import IMPLS

pytestmark = pytest.mark.once

MIB = 1 << 20
# The default workspace of cuBLAS, which a product may take from torch's allocator; it is not the
# loss's to cap. Seen on an H100: two plans for 16 MiB came out 8.1 MiB above what they sum up to.
LIBRARY_WORKSPACE = 8320 * 1024


@dataclass(frozen=True)
class Usage:
    """Bytes that a call allocated.

    Attributes:
        peak: most that was live at once, of what was allocated during the call.
        largest: the largest single allocation.
    """

    peak: int
    largest: int


def _events(nodes: list[Any]) -> Iterator[tuple[int, int]]:
    """(time, bytes) of every allocation, in no order."""
    from torch._C._profiler import _EventType

    allocation, open_nodes = _EventType.Allocation, list(nodes)
    while open_nodes:  # hundreds of thousands: a recursion takes twice as long
        node = open_nodes.pop()
        if node.tag == allocation:
            yield node.start_time_ns, node.extra_fields.alloc_size
        open_nodes += node.children


@contextmanager
def _no_operators() -> Iterator[None]:
    """The profiler sees allocations alone: most of its time goes to what it keeps of operators."""
    torch._C._autograd._enable_record_function(False)
    try:
        yield
    finally:
        torch._C._autograd._enable_record_function(True)


def measure(call: Callable[[], Any]) -> Usage:
    """Run once, and add up the CPU allocations in the order of time."""
    gc.collect()
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
        _no_operators(),
    ):
        call()
    results = profiler.profiler.kineto_results
    sizes = [size for _, size in sorted(_events(results.experimental_event_tree()))]
    assert sizes, "the profiler saw no allocation at all"
    live = peak = 0
    for size in sizes:
        live += size
        peak = max(peak, live)
    return Usage(peak, max(sizes))


def measure_both(
    tokens: int, vocab: int, hidden: int, dtype: torch.dtype, shard: Any = None, **options: Any
) -> tuple[Usage, Usage, int]:
    """Usage of the forward and of the backward pass, and the bytes of the gradients they leave."""
    rows = vocab if shard is None else shard.num_rows
    input = torch.randn(tokens, hidden).to(dtype).requires_grad_()
    weight = torch.randn(rows, hidden).to(dtype).requires_grad_()
    target = torch.randint(0, vocab, (tokens,))
    losses: list[Tensor] = []

    def forward() -> None:
        answer = cce_tp.linear_cross_entropy(input, weight, target, vocab_shard=shard, **options)
        losses.append(answer[0] if isinstance(answer, tuple) else answer)

    first = measure(forward)
    second = measure(lambda: losses[0].backward())
    assert input.grad is not None
    grads = input.grad.nbytes + (0 if weight.grad is None else weight.grad.nbytes)
    return first, second, grads


def test_the_tracker_sees_dense_logits() -> None:
    """The measure itself: the usual way does allocate (N, V)."""

    def dense() -> None:
        weight, input = torch.randn(2048, 8), torch.randn(128, 8)
        torch.nn.functional.cross_entropy(input @ weight.t(), torch.zeros(128, dtype=torch.int64))

    usage = measure(dense)
    assert usage.largest >= 128 * 2048 * 4
    assert 2 * usage.largest <= usage.peak <= 4 * usage.largest


@pytest.mark.no_poison
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mib", [1, 4, None], ids=lambda mib: f"{mib}MiB")
def test_temporaries_fit_the_cap(dtype: torch.dtype, mib: int | None) -> None:
    """Gradients of 0.5 to 4 MiB, logits of 64 (bf16) to 128 MiB (fp32)."""
    tokens, vocab, hidden = 2048, 16384, 64
    cap = None if mib is None else mib * MIB
    limit = 16 * MIB if mib is None else mib * MIB
    forward, backward, grads = measure_both(
        tokens, vocab, hidden, dtype, impl="torch", workspace_bytes=cap
    )
    assert forward.peak <= limit, f"forward: {forward.peak / MIB:.2f} MiB"
    assert backward.peak - grads <= limit, f"backward: {(backward.peak - grads) / MIB:.2f} MiB"
    assert max(forward.largest, backward.largest) < tokens * vocab


@pytest.mark.no_poison
@pytest.mark.parametrize("mib", [1, None], ids=lambda mib: f"{mib}MiB")
@pytest.mark.parametrize("hidden", [256, 512], ids=["half", "all"])
def test_maxima_of_logits_in_dC_count(hidden: int, mib: int | None) -> None:
    """As on a GPU; there products copy nothing, so of the backward pass the plan is looked at."""
    tokens, vocab = 512, 4096
    cap = None if mib is None else mib * MIB
    limit = 16 * MIB if mib is None else mib * MIB
    fixed, sizes_of = [], _BackwardPass._sizes

    def spy(self: Any, **options: Any) -> BackwardSizes:
        sizes = sizes_of(self, **options)
        fixed.append(sizes.fixed)
        return sizes

    with (
        operands_as_they_are(),
        mock.patch.object(KeptLogits, "inside", side_effect=KeptLogits.inside) as inside,
        mock.patch.object(_BackwardPass, "_sizes", spy),
    ):
        sizes = (tokens, vocab, hidden, torch.bfloat16)
        with mock.patch.object(ops, "_statistics", side_effect=ops._statistics) as statistics:
            forward, _, _ = measure_both(*sizes, impl="torch", workspace_bytes=cap)
        kept, fixed[:] = list(fixed), []
        measure_both(*sizes, impl="torch", workspace_bytes=cap, keep_logits_in_grad=False)
    assert inside.call_count == 2  # in the forward pass, and in the backward pass
    maxima = inside.call_args[0][1].nbytes
    assert kept[0] - fixed[0] == maxima
    assert statistics.call_args[0][4] == limit - maxima
    peak = forward.peak - vocab * hidden * 2
    assert peak <= limit, f"{peak / MIB:.2f} MiB"


@pytest.mark.no_poison
def test_gradients_of_kept_logits_fit_the_cap() -> None:
    """Of many tokens: a tile's columns of all of them are 4 MiB, and a gradient takes some such."""
    tokens, vocab, hidden = 4096, 1024, 16
    forward, backward, grads = measure_both(
        tokens,
        vocab,
        hidden,
        torch.bfloat16,
        impl="torch",
        workspace_bytes=2 * MIB,
        keep_logits_bytes=tokens * vocab * 2,
    )
    kept = tokens * vocab * 2
    assert kept < forward.peak <= kept + 2 * MIB, f"forward: {forward.peak / MIB:.2f} MiB"
    assert backward.peak - grads <= 2 * MIB, f"backward: {(backward.peak - grads) / MIB:.2f} MiB"


@pytest.mark.no_poison
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"label_smoothing": 0.1, "return_stats": "entropy"}, id="statistics"),
        pytest.param({"logit_softcap": 5.0, "z_loss": 1e-3, "logit_scale": 2.0}, id="softcap"),
        pytest.param({"grad_filter": cce_tp.GradFilter.paper()}, id="paper"),
        pytest.param({"reduction": "none"}, id="none"),
    ],
)
def test_options_fit_the_cap_too(options: dict[str, Any]) -> None:
    tokens, vocab, hidden = 1024, 16384, 64
    if options.get("reduction") == "none":
        return _check_per_token(tokens, vocab, hidden)
    forward, backward, grads = measure_both(
        tokens, vocab, hidden, torch.float32, impl="torch", workspace_bytes=2 * MIB, **options
    )
    assert forward.peak <= 2 * MIB, f"forward: {forward.peak / MIB:.2f} MiB"
    assert backward.peak - grads <= 2 * MIB, f"backward: {(backward.peak - grads) / MIB:.2f} MiB"
    return None


def _check_per_token(tokens: int, vocab: int, hidden: int) -> None:
    input = torch.randn(tokens, hidden, requires_grad=True)
    weight = torch.randn(vocab, hidden, requires_grad=True)
    target = torch.randint(0, vocab, (tokens,))
    loss = cce_tp.linear_cross_entropy(
        input, weight, target, reduction="none", workspace_bytes=2 * MIB, impl="torch"
    )
    upstream = torch.randn(tokens)
    usage = measure(lambda: loss.backward(upstream))
    assert usage.peak - (tokens + vocab) * hidden * 4 <= 2 * MIB


@pytest.mark.no_poison
def test_grad_weight_out_takes_no_second_gradient() -> None:
    """dC goes to the given tensor strip by strip, in fp32 (Megatron's main_grad) or bf16."""
    tokens, vocab, hidden = 512, 8192, 256
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.zeros(vocab, hidden, dtype=dtype)
        _, backward, grads = measure_both(
            tokens,
            vocab,
            hidden,
            torch.bfloat16,
            impl="torch",
            workspace_bytes=2 * MIB,
            grad_weight_out=out,
        )
        assert grads == tokens * hidden * 2
        assert backward.peak - grads <= 2 * MIB, f"{(backward.peak - grads) / MIB:.2f} MiB"


@pytest.mark.no_poison
def test_five_percent_of_the_logits_by_default() -> None:
    """Where 5% of the bf16 logits are more than 16 MiB."""
    tokens, vocab, hidden = 4096, 42240, 8
    forward, backward, grads = measure_both(tokens, vocab, hidden, torch.float32, impl="torch")
    limit = 0.05 * 2 * tokens * vocab
    assert limit > 16 * MIB
    assert forward.peak <= limit and backward.peak - grads <= limit


@pytest.mark.no_poison
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("cap", [None, MIB], ids=["default", "1MiB"])
def test_never_all_the_logits_of_a_small_problem(impl: str, cap: int | None) -> None:
    """Nothing of N x V elements even where it would fit the workspace."""
    if torch.cuda.is_available() and impl == "triton":
        pytest.skip("the CPU's allocation events; the GPU's allocator has its own test")
    tokens, vocab = 320, 1024
    forward, backward, _ = measure_both(
        tokens, vocab, 16, torch.float32, impl=impl, workspace_bytes=cap
    )
    assert max(forward.largest, backward.largest) < 4 * tokens * vocab


def measure_shard(rank: Rank, tokens: int, vocab: int, cap: int | None) -> tuple[Usage, Usage, int]:
    shard = cce_tp.VocabShard.even(vocab, rank.group)
    return measure_both(
        tokens, vocab, 32, torch.float32, shard=shard, impl="torch", workspace_bytes=cap
    )


@pytest.mark.no_poison
@pytest.mark.parametrize("cap", [None, 2 * MIB], ids=["default", "2MiB"])
def test_no_shard_holds_its_logits(pool: RankPool, cap: int | None) -> None:
    """N x V_local fp32 logits would be 32 MiB on each rank."""
    if pool.device == "cuda":
        pytest.skip("the CPU's allocation events; the GPU's allocator has its own test")
    tokens, vocab, ranks = 2048, 8192, 2
    for forward, backward, grads in pool.run(
        measure_shard, tokens, vocab, cap, ranks=ranks, poison=False
    ):
        assert max(forward.largest, backward.largest) < 4 * tokens * vocab // ranks
        limit = cap or 16 * MIB
        assert forward.peak <= limit and backward.peak - grads <= limit


@pytest.mark.gpu
@pytest.mark.no_poison
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mib", [None, 16], ids=["default", "16MiB"])
@pytest.mark.parametrize("inside", [False, None], ids=["nothing-kept", "as-it-comes"])
@pytest.mark.parametrize(
    ("tokens", "hidden", "vocab"),
    [(8192, 2304, 256000), (8192, 4096, 128256), (8192, 8192, 16032), (8192, 4096, 32000)],
    ids=str,
)
def test_peak_on_the_gpu(
    impl: str,
    dtype: torch.dtype,
    mib: int | None,
    inside: bool | None,
    tokens: int,
    hidden: int,
    vocab: int,
) -> None:
    if impl == "torch" and (vocab > 20000 or dtype == torch.float16):
        pytest.skip("the reference is slow at this size")
    input = torch.randn(tokens, hidden, dtype=dtype, device="cuda", requires_grad=True)
    weight = torch.randn(vocab, hidden, dtype=dtype, device="cuda") * hidden**-0.5
    weight.requires_grad_()
    target = torch.randint(0, vocab, (tokens,), device="cuda")
    floor = min(max(16 * MIB, tokens * hidden), 64 * MIB)
    limit = max(0.05 * 2 * tokens * vocab, floor) if mib is None else mib * MIB
    cap = None if mib is None else mib * MIB
    options = {"workspace_bytes": cap, "impl": impl, "keep_logits_in_grad": inside}
    forward, backward = gpu_peaks(input, weight, target, options)
    if inside is None and forward >= weight.nbytes:  # dC is there already, if logits are kept
        forward -= weight.nbytes
    limit += LIBRARY_WORKSPACE
    assert forward <= limit, f"forward: {forward / MIB:.1f} MiB"
    assert backward <= limit, f"backward: {backward / MIB:.1f} MiB"


@pytest.mark.gpu
@pytest.mark.no_poison
@pytest.mark.parametrize("inside", [False, True], ids=["nothing-kept", "logits-in-dC"])
def test_the_far_field_on_the_gpu_fits_five_percent(inside: bool) -> None:
    """Its statistics of tiles included, with a tenth of the tiles kept or so."""
    tokens, hidden, vocab = 8192, 2304, 131072
    weight = 0.02 * torch.randn(vocab, hidden, device="cuda")
    weight[:: vocab // 8000] += 10.0 / hidden
    weight = weight.bfloat16().requires_grad_()
    input = (1.0 + 0.1 * torch.randn(tokens, hidden, device="cuda")).bfloat16().requires_grad_()
    target = torch.randint(0, vocab, (tokens,), device="cuda")
    options: dict[str, Any] = {"grad_filter": cce_tp.GradFilter.far_field(), "impl": "triton"}
    _, statistics = cce_tp.linear_cross_entropy(input, weight, target, return_stats=True, **options)
    assert 0.02 < float(statistics.tiles_kept) < 0.3
    limit = 0.05 * 2 * tokens * vocab + LIBRARY_WORKSPACE
    options["keep_logits_in_grad"] = inside
    forward, backward = gpu_peaks(input, weight, target, options)
    forward -= inside * weight.nbytes  # dC, which is there already
    for peak in (forward, backward):
        assert peak <= limit, f"{peak / MIB:.1f} MiB"


def gpu_peaks(
    input: Tensor, weight: Tensor, target: Tensor, options: dict[str, Any]
) -> tuple[int, int]:
    """Bytes at once in the forward pass, and in the backward pass beyond the gradients."""
    forward = backward = 0
    for _ in range(2):  # the first call also takes the libraries' own workspaces
        input.grad = weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, _ = _requested()
        loss = cce_tp.linear_cross_entropy(input, weight, target, **options)
        forward = _requested()[1] - before
        loss.backward()
        assert input.grad is not None and weight.grad is not None
        backward = _requested()[1] - before - input.grad.nbytes - weight.grad.nbytes
        del loss
    return forward, backward


def _requested() -> tuple[int, int]:
    """(now, peak) bytes asked of the allocator, which may hand out a block up to 1 MiB larger."""
    stats = torch.cuda.memory_stats()
    return stats["requested_bytes.all.current"], stats["requested_bytes.all.peak"]
