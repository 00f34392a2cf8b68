"""Calls of known sizes, replayed: what a call did, without working out again what to do.

For small problems a GPU waits for Python, and most of that time goes to decisions that are the same
in every call of the same sizes: how to cut the work, which kernel in which form, where in memory
each piece lies. So the third call of a kind is recorded, part by part, as functions of its
tensors: every allocation, view, product and launch. From the fourth call on those functions run.
With CCE_TP_REPLAY=0 in the environment every call works out what to do.

What a part does must follow from the kind alone: from the name that it is called by, the sizes,
strides, dtypes and alignment of tensors, and `_settings`. So a part neither waits for the device
nor talks to other ranks, but for what it calls through `outside`. A replay makes the same
calls on the same operands in the same order: it gives the same bits.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten: Any = torch.ops.aten
_ALLOCATIONS = (
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
)


def _mm(a: Tensor, b: Tensor, dtype: torch.dtype, *, out: Tensor) -> None:
    torch.mm(a, b, out_dtype=dtype, out=out)


def _addmm(sum: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, *, out: Tensor) -> None:
    torch.addmm(sum, a, b, out_dtype=dtype, out=out)


# What calls an operator fastest: operators themselves take thrice as long. All others are called as
# they are.
_FAST: dict[Any, Callable[..., Any]] = {
    _aten.mm.out: torch.mm,
    _aten.mm.dtype_out: _mm,
    _aten.addmm.out: torch.addmm,
    _aten.addmm.dtype_out: _addmm,
    _aten.addmm_.default: Tensor.addmm_,
    _aten.copy_.default: Tensor.copy_,
    _aten.fill_.Scalar: Tensor.fill_,
    _aten.clone.default: torch.clone,
    _aten.index_select.default: torch.index_select,
    _aten.new_full.default: Tensor.new_full,
    _aten.sort.stable: torch.sort,
    _aten.view.dtype: Tensor.view,
    _aten.zeros.default: torch.zeros,
    _aten.zeros_like.default: torch.zeros_like,
}
# Multiplications of a product that keeps a large GPU busy for longer than the host works without
# replays.
_LARGEST = 1 << 40
# Calls of one kind before it is recorded: the first one compiles kernels, and many sizes come but
# once or twice.
_CALLS_BEFORE = 2
_MOST_KINDS = 256
_ENABLED = os.environ.get("CCE_TP_REPLAY", "1") != "0"

_thread = threading.local()
# Held while a part is recorded, one at a time in all threads: PyTorch keeps track of its observers
# in variables that all threads share.
_recording = threading.Lock()


def recorder() -> Recorder | None:
    """Of the part that is being recorded in this thread, or None."""
    return getattr(_thread, "recorder", None) if _recording.locked() else None


def outside(function: Callable[..., None], *tensors: Tensor) -> None:
    """function(*tensors), from within a part that leaves out what it does: a replay calls its own.

    It must make no tensor that the part reads."""
    active = recorder()
    if active is None:
        function(*tensors)
    else:
        active.leave(function, tensors)


def _nothing() -> None:
    pass


class Kind:
    """Calls of one kind: which parts of them are recorded."""

    def __init__(self, *, records: bool = True) -> None:
        self._records = records
        # How often a part came; or its replay; or None where it has none.
        self._parts: dict[str, int | Callable[..., Any] | None] = {}

    def call(
        self,
        part: str,
        tensors: Sequence[Tensor | None],
        function: Callable[[], Any],
        leaves: Callable[..., None] = _nothing,
    ) -> Any:
        """function(), or its replay.

        Args:
            part: of the calls of this kind.
            tensors: all that it reads or writes.
            function: returns tensors and plain values, in tuples and lists.
            leaves: what it calls through `outside`, if anything.
        """
        known = self._parts.get(part, 0) if self._records else None
        if known is None:
            return function()
        if not isinstance(known, int):
            return known(leaves, *tensors)
        if known < _CALLS_BEFORE:
            self._parts[part] = known + 1
            return function()
        # A tensor that is given twice has two names, which other calls may give to two tensors.
        given = [id(each) for each in tensors if each is not None]
        if len({*given}) < len(given) or not _recording.acquire(blocking=False):
            return function()
        try:
            with Recorder(tensors) as recording:
                outputs = function()
        finally:
            _recording.release()
        self._parts[part] = recording.finish(outputs)
        return outputs


# Of calls that are not to be replayed.
NEVER = Kind(records=False)
_kinds: dict[tuple[Any, ...], Kind] = {}


def kind_of(name: tuple[Any, ...] | None, tensors: Sequence[Tensor | None]) -> Kind:
    """The kind of a call.

    Args:
        name: all that its parts depend on beside tensors and `_settings`, hashable; None for a call
            that is not to be replayed.
        tensors: those whose sizes are not known by those of others; the first two (N, D) and
            (V, D).
    """
    if name is None or not _ENABLED:
        return NEVER
    input, weight = tensors[0], tensors[1]
    assert input is not None and weight is not None
    if not 0 < input.numel() * weight.shape[0] <= _LARGEST:
        return NEVER
    forms = [
        None
        if each is None
        else (each.shape, each.stride(), each.dtype, each.get_device(), each.data_ptr() & 15)
        for each in tensors
    ]
    key = (*name, _settings(input.dtype), *forms)
    kind = _kinds.get(key)
    if kind is None:
        if len(_kinds) >= _MOST_KINDS:
            _kinds.clear()
        kind = _kinds[key] = Kind()
    return kind


_state: Callable[[torch.dtype], Any] | None = None


def _settings(dtype: torch.dtype) -> Any:
    """What else decides how a call of such operands goes."""
    global _state
    if _state is None:  # imports Triton
        from cce_tp.kernels import tuning

        _state = tuning.state
    return _state(dtype)


def forget() -> None:
    """As if there had been no call yet."""
    _kinds.clear()


class Recorder(TorchDispatchMode):
    """Writes down, as Python source, what a function does to tensors.

    What PyTorch does not see of that, as launches, must go through `launch`. Nothing that goes
    wrong in here changes what the function does.

    Attributes:
        problem: why there is no replay, or None.
    """

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.problem: str | None = None
        self._seeing = True
        # Weak, so that recording takes no more memory than the call itself.
        self._names: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        # Of views: what they are views of, which is none itself, and how far ahead they begin.
        self._views: dict[str, tuple[str, int]] = {}
        # The same in bytes, where views may be of another dtype, too.
        self._memory: dict[str, tuple[str, int]] = {}
        self._constants: dict[str, Any] = {}
        # Source, the tensors that it reads, and those that it makes.
        self._lines: list[tuple[str, list[str], list[str]]] = []
        self._count = 0
        self._inputs = [self._new(each) for each in tensors]

    def __enter__(self) -> Recorder:
        super().__enter__()
        _thread.recorder = self
        return self

    def __exit__(self, *error: Any) -> None:
        _thread.recorder = None
        super().__exit__(*error)

    def launch(
        self,
        run: Callable[[tuple[Any, ...]], Any],
        tensors: tuple[Tensor | None, ...],
        replayed: Callable[[tuple[Any, ...]], tuple[Callable[..., Any], Iterable[int]]],
    ) -> Any:
        """run(tensors), a launch of a kernel that works on their memory.

        Args:
            replayed: makes of them a function that does the same, of their addresses; and at which
                places it takes the tensors themselves.
        """
        with self._paused():  # Triton's interpreter uses PyTorch
            result = run(tensors)
        with _Noting(self, "a launch"):
            self._note_launch(tensors, *replayed(tensors))
        return result

    def leave(self, function: Callable[..., None], tensors: tuple[Tensor, ...]) -> None:
        """function(*tensors), in whose place the replay has one of its own."""
        with _Noting(self, function):
            names = [self._name(each) for each in tensors]
            self._lines.append((f"leaves({', '.join(names)})", names, []))
        with self._paused():
            function(*tensors)

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        self._seeing, _thread.recorder = False, None
        try:
            yield
        finally:
            self._seeing, _thread.recorder = True, self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        result = func(*args, **named)
        if self._seeing:
            with _Noting(self, func):
                self._note(func, args, named, result)
        return result

    def finish(self, outputs: Any) -> Callable[..., Any] | None:
        """The replay, of what the function returned; or None."""
        replay = None
        if self.problem is None:
            with _Noting(self, "what it returns"):
                replay = self._compiled(outputs)
        return replay

    def _note_launch(
        self, tensors: tuple[Tensor | None, ...], function: Any, whole: Iterable[int]
    ) -> None:
        read: list[str] = []
        parts: list[str] = []
        for place, tensor in enumerate(tensors):
            if tensor is None or place in whole:
                parts.append(self._written(tensor, read))
                continue
            base, ahead = self._place_of(tensor)
            read.append(base)
            parts.append(f"{base}.data_ptr() + {ahead}" if ahead else f"{base}.data_ptr()")
        self._lines.append((f"{self._constant(function)}({', '.join(parts)})", read, []))

    def _note(self, func: Any, args: tuple[Any, ...], named: Any, result: Any) -> None:
        made = _listed(result)
        if all(self._is_known(each) for each in made):  # in place
            self._add([], _FAST.get(func, func), args, named)
        elif func in _ALLOCATIONS:
            geometry = tuple(result.shape), result.stride()
            kind = {"dtype": result.dtype, "device": result.device}
            self._add([result], torch.empty_strided, geometry, kind)
        elif func is not _aten.view.dtype and all(_shares(each, args[0]) for each in made):
            for each in made:
                self._add_view(each, args[0])
        else:
            self._add(made, _FAST.get(func, func), args, named)
            if func is _aten.view.dtype:
                self._memory[self._name(result)] = self._place_of(args[0])

    def _place_of(self, tensor: Tensor) -> tuple[str, int]:
        """Where it begins: so many bytes after the first one of a tensor that is no view."""
        name = self._name(tensor)
        return self._memory.get(name, (name, 0))

    def _add(self, made: Sequence[Tensor], function: Any, args: Any, named: Any) -> None:
        read: list[str] = []
        parts = [self._written(each, read) for each in args]
        parts += [f"{name}={self._written(each, read)}" for name, each in named.items()]
        source, names = f"{self._constant(function)}({', '.join(parts)})", []
        if made:
            names = [self._new(each) for each in made]
            source = f"{', '.join(names)} = {source}"
        self._lines.append((source, read, names))

    def _add_view(self, view: Tensor, of: Tensor) -> None:
        name = self._name(of)
        if _place(view) == _place(of):
            self._names[id(view)] = weakref.ref(view), name
            return
        base, ahead = self._views.get(name, (name, 0))
        further = int(view.storage_offset()) - int(of.storage_offset())
        ahead += further
        memory, first_byte = self._place_of(of)
        name = self._new(view)
        self._views[name] = base, ahead
        self._memory[name] = memory, first_byte + further * view.itemsize
        geometry = f"{tuple(view.shape)}, {view.stride()}, {base}.storage_offset() + {ahead}"
        self._lines.append((f"{name} = {base}.as_strided({geometry})", [base], [name]))

    def _new(self, tensor: Tensor | None) -> str:
        self._count += 1
        name = f"t{self._count}"
        if tensor is not None:
            self._names[id(tensor)] = weakref.ref(tensor), name
        return name

    def _is_known(self, tensor: Any) -> bool:
        known = self._names.get(id(tensor))
        return known is not None and known[0]() is tensor

    def _name(self, tensor: Tensor) -> str:
        if not self._is_known(tensor):
            raise LookupError(f"a tensor {tuple(tensor.shape)} from elsewhere")
        return self._names[id(tensor)][1]

    def _constant(self, value: Any) -> str:
        name = f"c{len(self._constants)}"
        self._constants[name] = value
        return name

    def _written(self, value: Any, read: list[str]) -> str:
        """An argument, as source; `read` takes the names of the tensors in it."""
        if isinstance(value, Tensor):
            read.append(self._name(value))
            return read[-1]
        if isinstance(value, (list, tuple)):
            inside = "".join(f"{self._written(each, read)}, " for each in value)
            if hasattr(value, "_fields"):  # a named tuple
                return f"{self._constant(type(value))}({inside})"
            return f"({inside})" if isinstance(value, tuple) else f"[{inside}]"
        if value is None or type(value) in (int, bool):
            return repr(value)
        return self._constant(value)

    def _compiled(self, outputs: Any) -> Callable[..., Any]:
        kept: list[str] = []
        returned = self._written(outputs, kept)
        # From the last line to the first: without what nobody reads, as views of which only other
        # views are taken; and a tensor is let go of as soon as the call did so, if not earlier.
        body = [f"return {returned}"]
        needed = {*kept, *self._inputs}
        for source, read, made in reversed(self._lines):
            if made and needed.isdisjoint(made):
                continue
            if done := [name for name in dict.fromkeys([*read, *made]) if name not in needed]:
                body.append(f"del {', '.join(done)}")
            body.append(source)
            needed.update(read)
        lines = "".join(f"    {line}\n" for line in reversed(body))
        head = f"def replay({', '.join(['leaves', *self._inputs])}):\n"
        return _function(head + lines, self._constants)


class _Noting:
    """Something is written down, unless that has failed before; if it fails, there is no replay."""

    def __init__(self, recorder: Recorder, what: Any) -> None:
        self._recorder, self._what = recorder, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> bool:
        if isinstance(error, Exception):
            self._recorder.problem = self._recorder.problem or f"{self._what}: {error!r}"
            return True
        return False


def _listed(result: Any) -> list[Any]:
    """What an operator returns."""
    if result is None:
        return []
    return [*result] if isinstance(result, (list, tuple)) else [result]


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.storage_offset(), tensor.shape, tensor.stride()


def _shares(view: Any, base: Any) -> bool:
    """Whether a tensor is a view of another one, of the same dtype."""
    if not (isinstance(view, Tensor) and isinstance(base, Tensor)) or view.dtype != base.dtype:
        return False
    return view.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()


def _function(text: str, constants: dict[str, Any]) -> Callable[..., Any]:
    """Compiled; its source is its documentation."""
    scope = dict(constants)
    exec(compile(text, "<cce_tp.replay>", "exec"), scope)
    scope["replay"].__doc__ = text
    return scope["replay"]
