"""What only real kernels show: sizes past 2^31 elements, CUDA graphs, no host synchronisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cce_tp
from cce_tp.backend import backend
from cce_tp.problem import KeptLogits, LocalLogits, LogitGradient
from cce_tp.sharding import TokenGather
from cce_tp.stats import StatRows
from cce_tp.workspace import gradient_pitch
from oracle import dense
from problems import Problem, call, same_bits
from tolerance import error_norm, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.no_poison]

DTYPES = [
    pytest.param(torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.float32, id="fp32"),
]


def language_model_like(
    tokens: int, vocab: int, hidden: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator("cuda").manual_seed(0)
    input = torch.randn(tokens, hidden, generator=random, device="cuda").to(dtype)
    weight = torch.empty(vocab, hidden, dtype=dtype, device="cuda")
    for start in range(0, vocab, 1 << 16):  # in parts: the fp32 numbers of all of it would not fit
        part = weight[start : start + (1 << 16)]
        part.copy_(2 * hidden**-0.5 * torch.randn(part.shape, generator=random, device="cuda"))
    target = torch.randint(0, vocab, (tokens,), generator=random, device="cuda")
    target[::17] = -100
    target[1], target[2] = 0, vocab - 1
    return input, weight, target


def sampled_logits(input: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """(R, V) fp64 logits of some tokens, from fp64 products in parts."""
    parts = [input[rows].double() @ part.double().t() for part in weight.split(1 << 15)]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize(
    ("tokens", "vocab", "hidden"),
    [
        pytest.param(16384, 262144, 64, id="N-times-V-2^32"),
        pytest.param(9000, 256000, 136, id="N-times-V-past-2^31-ragged"),
        pytest.param(256, 2**20 + 40, 2304, id="V-times-D-past-2^31"),
        pytest.param(300, 2**20 + 41, 2111, id="V-times-D-past-2^31-odd-strides"),
        pytest.param(1_100_000, 300, 2048, id="N-times-D-past-2^31"),
    ],
)
def test_sizes_past_32_bits(tokens: int, vocab: int, hidden: int) -> None:
    """Losses, statistics and gradients of sampled rows against fp64."""
    input, weight, target = language_model_like(tokens, vocab, hidden, torch.bfloat16)
    input.requires_grad_(), weight.requires_grad_()
    loss, stats = cce_tp.linear_cross_entropy(
        input, weight, target, reduction="none", return_stats=True
    )
    loss.sum().backward()
    rows = torch.tensor([0, 1, 2, tokens // 2, tokens - 2, tokens - 1], device="cuda")
    x = sampled_logits(input.detach(), weight.detach(), rows)
    lse = torch.logsumexp(x, dim=1)
    torch.testing.assert_close(stats.lse[rows].double(), lse, rtol=1e-5, atol=1e-5)
    assert torch.equal(stats.max_logit[rows].double().sub(x.amax(dim=1)).abs() < 1e-3, rows >= 0)
    valid = target[rows] != -100
    safe = torch.where(valid, target[rows], 0)
    wanted = torch.where(valid, lse - x.gather(1, safe[:, None])[:, 0], 0.0)
    torch.testing.assert_close(loss[rows].double(), wanted, rtol=1e-5, atol=1e-4)
    probs = x.softmax(dim=1)
    probs[torch.arange(len(rows)), safe] -= 1
    probs[~valid] = 0
    parts = zip(probs.split(1 << 15, dim=1), weight.detach().split(1 << 15), strict=True)
    grad_rows = sum(p @ w.double() for p, w in parts)
    assert input.grad is not None and weight.grad is not None
    assert relative_error(input.grad[rows], grad_rows) < 6e-3
    _check_weight_rows(input.detach(), weight, target, stats.lse)


def _check_weight_rows(input: Tensor, weight: Tensor, target: Tensor, lse: Tensor) -> None:
    """Rows of dC at both ends and in the middle, from all tokens in fp64."""
    vocab = weight.shape[0]
    columns = torch.tensor([0, 1, vocab // 2, vocab - 2, vocab - 1], device="cuda")
    wanted = torch.zeros(len(columns), weight.shape[1], dtype=torch.float64, device="cuda")
    for start in range(0, len(input), 1 << 16):
        part = slice(start, start + (1 << 16))
        e = input[part].double()
        g = torch.exp(e @ weight.detach()[columns].double().t() - lse[part, None].double())
        g = g - (target[part, None] == columns).double()
        g[target[part] == -100] = 0
        wanted += g.t() @ e
    assert weight.grad is not None
    assert relative_error(weight.grad[columns], wanted) < 6e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [1.0, 6.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_error_is_no_larger_than_that_of_pytorch(
    dtype: torch.dtype, spread: float, bias: bool
) -> None:
    """Against fp64, with PyTorch's own path in the same dtype as the yardstick."""
    problem = Problem(
        tokens=(1000,),
        vocab=5003,
        hidden=520,
        dtype=dtype,
        impl="triton",
        bias=bias,
        spread=spread,
        options={"reduction": "mean"},
    )
    operands = problem.build("cuda")
    ours = call(operands, {**problem.options, "impl": "triton"})
    exact = dense(operands, problem.options)
    theirs = dense(operands, problem.options, dtype=dtype)
    for name in ("loss", "grad_input", "grad_weight", "grad_bias"):
        if getattr(ours, name) is None:
            continue
        error = error_norm(getattr(ours, name), getattr(exact, name))
        limit = error_norm(getattr(theirs, name), getattr(exact, name))
        floor = 2e-6 * getattr(exact, name).norm().item()
        assert error <= 1.05 * limit + floor, f"{name}: {error:.3e}, PyTorch {limit:.3e}"


def training_step(
    tokens: int = 500, dtype: torch.dtype = torch.bfloat16, **options: Any
) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A forward and backward pass over static tensors, and what it writes."""
    input, weight, target = language_model_like(tokens, 3001, 264, dtype)
    input.requires_grad_(), weight.requires_grad_()
    input.grad, weight.grad = torch.zeros_like(input), torch.zeros_like(weight)

    def step() -> Tensor:
        input.grad.zero_()
        weight.grad.zero_()
        loss = cce_tp.linear_cross_entropy(input, weight, target, **options)
        loss.backward()
        return loss.detach()

    return step, [input, weight, target]


OPTIONS = [
    pytest.param({}, id="plain"),
    pytest.param({"label_smoothing": 0.1, "z_loss": 1e-3, "logit_softcap": 30.0}, id="options"),
    pytest.param({"workspace_bytes": 1 << 20}, id="1MiB"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_no_host_synchronisation(dtype: torch.dtype, options: dict[str, Any]) -> None:
    step, _ = training_step(dtype=dtype, **options)
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_capture_in_a_cuda_graph(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Replay on new inputs gives the bits of an eager run on them."""
    step, (input, weight, target) = training_step(dtype=dtype, **options)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    with torch.no_grad():
        input.normal_()
        target.copy_(target.roll(5))
    graph.replay()
    replayed = [loss.clone(), input.grad.clone(), weight.grad.clone()]
    eager = [step(), input.grad, weight.grad]
    for first, second in zip(replayed, eager, strict=True):
        assert same_bits(first, second)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_runs_give_equal_bits(dtype: torch.dtype) -> None:
    """The exact path has no atomics; other work on the device must not change the result."""
    step, (input, weight, _) = training_step(tokens=2000, dtype=dtype)
    first = [step().clone(), input.grad.clone(), weight.grad.clone()]
    side = torch.cuda.Stream()
    busy = torch.randn(2048, 2048, device="cuda")
    for _ in range(5):
        with torch.cuda.stream(side):
            for _ in range(8):
                busy = (busy @ busy).clamp(-1, 1)
        again = [step(), input.grad, weight.grad]
        assert all(same_bits(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("offset", [1, 3, 8], ids=lambda offset: f"offset-{offset}")
@pytest.mark.parametrize("hidden", [128, 132, 129], ids=lambda hidden: f"D-{hidden}")
def test_unaligned_operands(offset: int, hidden: int) -> None:
    """Slices that the tensor memory accelerator cannot address take the pointers' way."""
    base = torch.randn(300 * hidden + offset, device="cuda").bfloat16()
    weight = torch.randn(500 * hidden + offset, device="cuda").bfloat16() * hidden**-0.5
    input = base[offset:].view(300, hidden).requires_grad_()
    weight = weight[offset:].view(500, hidden).requires_grad_()
    target = torch.randint(0, 500, (300,), device="cuda")
    loss = cce_tp.linear_cross_entropy(input, weight, target)
    loss.backward()
    exact_input = input.detach().double().requires_grad_()
    exact_weight = weight.detach().double().requires_grad_()
    exact = F.cross_entropy(exact_input @ exact_weight.t(), target)
    exact.backward()
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    assert relative_error(input.grad, exact_input.grad) < 6e-3
    assert relative_error(weight.grad, exact_weight.grad) < 6e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("edges", [(516, 1032), (512, 1024), (3, 1029)], ids=str)
def test_pieces_of_the_tokens_make_the_whole(dtype: torch.dtype, edges: tuple[int, int]) -> None:
    """Statistics, kept logits and G^T of the tokens in the middle first, then of those beside.

    Not bit by bit: for other numbers of tokens Triton makes other machine code."""
    tokens, vocab = 1500, 1111
    input, weight, target = language_model_like(tokens, vocab, 256, dtype)
    logits = LocalLogits(input, weight, None, target, 0, 1.0, None)
    chosen, rows = backend("triton"), StatRows(False, False, False)
    pitch = gradient_pitch(tokens)
    grads = torch.linspace(0.5, 1, tokens, device="cuda")

    def run(pieces: list[tuple[int, int]]) -> list[Tensor]:
        kept = None
        if dtype != torch.float32:
            kept = KeptLogits.empty(logits, chosen.tile_rows(input), 1 << 30)
        packed = torch.empty(rows.count, tokens, device="cuda")
        for start, stop in pieces:
            keep = None if kept is None else kept.tokens(start, stop)
            part = logits.tokens(start, stop)
            packed[:, start:stop] = chosen.statistics(part, rows, 1 << 26, keep)
        top, total = packed[StatRows.MAX], packed[StatRows.SUM_EXP]
        upstream = LogitGradient(grads, top, total.log(), 0.0, 0.0, vocab)
        out = torch.full((vocab, pitch), 7.0, dtype=dtype, device="cuda")
        for start, stop in pieces:
            part, share = logits.tokens(start, stop), upstream.tokens(start, stop)
            chosen.grad_logits(part, share, out[:, start:stop], None)
        return [packed, out[:, :tokens], *(() if kept is None else kept[:2])]

    gather = object.__new__(TokenGather)
    gather.whole, gather.own, gather._work = input, edges, None
    gather._local = input[slice(*edges)]
    pieces = [(start, stop) for start, stop, _ in gather.pieces()]
    assert len(pieces) == 3 and pieces[0][0] > 0
    for found, expected in zip(run(pieces), run([(0, tokens)]), strict=True):
        assert relative_error(found.float(), expected.float()) < 1e-4


def test_another_stream() -> None:
    """Kernels go to the current stream, and so does the backward pass."""
    step, (input, weight, _) = training_step()
    first = [step().clone(), input.grad.clone(), weight.grad.clone()]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        again = [step(), input.grad, weight.grad]
    side.synchronize()
    assert all(same_bits(a, b) for a, b in zip(first, again, strict=True))


def test_torch_and_triton_agree() -> None:
    options: dict[str, Any] = {"label_smoothing": 0.1, "return_stats": "entropy"}
    operands = Problem(tokens=(300,), vocab=1000, hidden=64, bias=True).build("cuda")
    one, other = (call(operands, {**options, "impl": impl}) for impl in ("torch", "triton"))
    for name in ("loss", "lse", "entropy", "grad_input", "grad_weight", "grad_bias"):
        torch.testing.assert_close(
            getattr(one, name), getattr(other, name), rtol=1e-4, atol=1e-5, msg=name
        )
    assert torch.equal(one.argmax, other.argmax)
