"""What a call costs the host, counted: kernels launched and torch operators dispatched.

Nothing is computed: launches are counted instead of made. Counts are the same on every machine.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

import cce_tp
from backward_passes import operands_as_they_are
from cce_tp import ops
from cce_tp.kernels import launch, tuning
from cce_tp.kernels.launch import Prepared
from cce_tp.problem import KeptLogits
from variants import DEVICE

pytestmark = pytest.mark.no_poison  # which fills what is allocated: operators of its own


class _Counter(TorchDispatchMode):
    """Launches, and the operators inside of this library's own, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[str] = []
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.operators[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    def of(self, *names: str) -> int:
        return sum(self.operators[name] for name in names)


@pytest.fixture
def count() -> Iterator[Any]:
    """A function that makes a call, and the count of what it did."""
    made: list[_Counter] = []

    def launched(self: Prepared, *tensors: Tensor | None) -> None:
        made[-1].kernels.append(self._kernel.fn.__name__)

    def run(function: Any) -> tuple[Any, _Counter]:
        made.append(_Counter())
        with made[-1]:
            return function(), made[-1]

    with (
        mock.patch.object(Prepared, "__call__", launched),
        mock.patch.object(ops, "_modes_above", lambda: 0),  # as where nobody looks on
    ):
        yield run


def operands(tokens: int, hidden: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    input = torch.zeros(tokens, hidden, device=DEVICE, requires_grad=True)
    weight = torch.zeros(vocab, hidden, device=DEVICE, requires_grad=True)
    return input, weight, torch.zeros(tokens, dtype=torch.int64, device=DEVICE)


VIEWS = ("slice", "select", "unbind", "as_strided", "view", "t", "transpose", "detach", "alias")
MEMORY = ("empty", "new_empty", "empty_like", "zeros", "zeros_like", "new_zeros")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_launches_and_operators_of_the_exact_path(count: Any, reduction: str) -> None:
    input, weight, target = operands(64, 128, 1000)
    upstream = torch.ones(() if reduction == "mean" else (64,), device=DEVICE)

    def forward() -> Tensor:
        return cce_tp.linear_cross_entropy(
            input, weight, target, impl="triton", reduction=reduction
        )

    loss, seen = count(forward)
    kernels = ["tile_statistics_kernel", "merge_tiles_kernel", "token_loss_kernel"]
    assert seen.kernels == kernels
    assert seen.of(*MEMORY) <= 5 and seen.of(*VIEWS) <= 1
    assert seen.operators.total() == seen.of(*MEMORY, *VIEWS)

    _, seen = count(lambda: torch.autograd.grad(loss, (input, weight), upstream))
    assert seen.kernels == ["token_gradient_kernel", "grad_logits_kernel"]
    assert seen.of("mm", "addmm") == 3 and seen.of("copy_") == 1
    assert seen.of(*MEMORY) <= 4 and seen.of(*VIEWS) <= 11
    assert seen.operators.total() == seen.of("mm", "copy_", *MEMORY, *VIEWS)


def test_keeping_logits_takes_no_operator_of_its_own(count: Any) -> None:
    """In the memory of dC; what they are below comes from the kernel that merges the tiles."""
    given = operands(64, 128, 1000)
    input, weight = (each.detach().half().requires_grad_() for each in given[:2])

    def forward() -> Tensor:
        return cce_tp.linear_cross_entropy(
            input, weight, given[2], impl="triton", keep_logits_in_grad=True
        )

    inside = mock.patch.object(KeptLogits, "inside", side_effect=KeptLogits.inside)
    with operands_as_they_are(), inside as kept:
        _, seen = count(forward)
    assert kept.called
    kernels = ["tile_statistics_kernel", "merge_tiles_kernel", "token_loss_kernel"]
    assert seen.kernels == kernels
    assert seen.of(*MEMORY) <= 7 and seen.of(*VIEWS) <= 2
    assert seen.operators.total() == seen.of(*MEMORY, *VIEWS)


def test_launches_and_operators_where_tokens_are_more_than_hidden(count: Any) -> None:
    """The memory of dC does not hold all of G^T: two strips, each with its part of dE and of dC."""
    input, weight, target = operands(256, 128, 1000)
    loss, _ = count(lambda: cce_tp.linear_cross_entropy(input, weight, target, impl="triton"))
    upstream = torch.ones((), device=DEVICE)
    _, seen = count(lambda: torch.autograd.grad(loss, (input, weight), upstream))
    assert seen.kernels == ["token_gradient_kernel", "grad_logits_kernel", "grad_logits_kernel"]
    assert seen.of("mm", "addmm", "addmm_") == 4
    assert seen.of(*MEMORY) <= 4 and seen.of(*VIEWS) <= 12
    assert seen.operators.total() == seen.of("mm", "addmm_", *MEMORY, *VIEWS)


@contextmanager
def python_calls() -> Iterator[list[str]]:
    """The functions of this library that are called, in this thread and new ones."""
    names: list[str] = []
    ours = str(Path(cce_tp.__file__).parent)

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith((ours, "<cce_tp.replay")):
            names.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        yield names
    finally:
        sys.setprofile(None)


def test_replays_leave_out_most_of_the_python() -> None:
    """From the fourth call of one kind on."""
    input, weight, target = operands(64, 128, 1000)
    forward, backward = [], []
    with (
        mock.patch.object(Prepared, "_launch", lambda self, tensors: None),
        torch.autograd.set_multithreading_enabled(False),
    ):
        for _ in range(6):
            with python_calls() as names:
                loss = cce_tp.linear_cross_entropy(input, weight, target, impl="triton")
            forward.append(len(names))
            with python_calls() as names:
                torch.autograd.grad(loss, (input, weight))
            backward.append(len(names))
    assert forward[-1] == forward[-2] <= 40 and 2 * forward[-1] < forward[1]
    assert backward[-1] == backward[-2] <= 40 and 3 * backward[-1] < backward[1]


def test_settings_are_read_at_every_call() -> None:
    """What is kept for the same sizes is not kept for other settings."""
    input, weight, target = operands(64, 128, 1024)
    seen = []

    def launched(self: Prepared, *tensors: Tensor | None) -> None:
        if self._kernel.fn.__name__ == "tile_statistics_kernel":
            seen.append((self._arguments["PRECISION"], self._arguments["BLOCK_V"]))

    def call() -> None:
        with torch.no_grad():
            cce_tp.linear_cross_entropy(input, weight, target, impl="triton")

    other = replace(tuning.config_for(input)[0], block_v=16)
    with mock.patch.object(Prepared, "__call__", launched):
        call()
        with mock.patch.object(tuning, "input_precision", lambda _: "tf32"), tuning.forced(other):
            call()
        call()
    first, second, third = seen
    assert second == ("tf32", 16) and first == third != second


class _Compiled:
    """In place of a compiled kernel: remembers the arguments of its launches, with Triton's hooks
    and without."""

    function, packed_metadata = 12, (4, 1, 0)

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.hooked: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *arguments: self.hooked.append((grid, *arguments))

    def run(self, *arguments: Any) -> None:
        assert arguments[3:9] == (7, self.function, self.packed_metadata, None, None, None)
        self.launches.append((arguments[:3], *arguments[9:]))


@pytest.fixture
def stream() -> Iterator[None]:
    """Stream number 7, where there is no GPU either."""
    active = SimpleNamespace(get_current_stream=lambda device: 7 if device == 3 else None)
    with (
        mock.patch.object(launch, "driver", SimpleNamespace(active=active)),
        mock.patch.object(torch.cuda, "current_device", lambda: 3),
    ):
        yield


@pytest.mark.usefixtures("stream")
def test_a_prepared_launch_passes_its_own_tensors_and_keeps_none() -> None:
    kernel = SimpleNamespace(arg_names=["matrix", "bias_ptr", "out_ptr", "N", "BLOCK"])
    run = Prepared(kernel, 7, N=32, BLOCK=16, num_warps=4, blocks={"matrix": (16, 8)})
    compiled = _Compiled()
    first_launches: list[dict[str, Any]] = []

    def first_launch(kernel: Any, grid: int, **arguments: Any) -> _Compiled:
        first_launches.append(arguments)
        return compiled

    with mock.patch.object(launch, "launch", first_launch):
        memory = torch.zeros(4, 32, 64)
        run(memory[0], None, memory[1])
        run(memory[2], None, memory[3])
        # Another alignment may be other machine code, and so may a tensor in place of None.
        run(memory[0], None, memory.view(-1)[1:])
        run(memory[0], memory[1], memory[1])
    assert len(first_launches) == 3
    assert first_launches[0].pop("matrix").base is not None
    given = {"bias_ptr": None, "N": 32, "BLOCK": 16, "num_warps": 4, "num_stages": 3}
    assert first_launches[0] == {**given, "out_ptr": mock.ANY}

    ((grid, descriptor, bias, out, *fixed),) = compiled.launches
    assert grid == (7, 1, 1) and bias is None and fixed == [32, 16]
    assert out == memory[3].data_ptr() and not compiled.hooked
    checked = TensorDescriptor(memory[2], [32, 64], [64, 1], [16, 8])
    assert vars(descriptor).keys() == vars(checked).keys()
    for name, value in vars(checked).items():
        if name != "base":
            assert vars(descriptor)[name] == value, name
    assert descriptor.base.data_ptr() == memory[2].data_ptr()

    alive = weakref.ref(memory)
    first_launches.clear(), compiled.launches.clear()
    del memory, checked, descriptor
    gc.collect()
    assert alive() is None


@pytest.mark.usefixtures("stream")
@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_who_listens_to_launches_hears_of_them(name: str) -> None:
    compiled, hook = _Compiled(), getattr(knobs.runtime, name)
    launch._start(compiled, 5, [1, 2])
    # A chain of hooks; in Triton 3.4 one hook, or None.
    listening = SimpleNamespace(calls=[print]) if hasattr(hook, "calls") else print
    with mock.patch.object(knobs.runtime, name, listening):
        launch._start(compiled, 5, [3, 4])
    launch._start(compiled, 5, [5, 6])
    assert compiled.launches == [((5, 1, 1), 1, 2), ((5, 1, 1), 5, 6)]
    assert compiled.hooked == [((5, 1, 1), 3, 4)]


def test_forgetting_makes_launches_anew() -> None:
    made = []

    @launch.prepared
    def maker(size: int) -> Any:
        made.append(size)
        return object()

    try:
        assert maker(1) is maker(1) and made == [1]
        launch.forget()
        maker(1)
        assert made == [1, 1]
    finally:
        launch._makers.pop()
