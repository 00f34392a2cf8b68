"""Host side of a launch: fast ways to start a kernel, and the arguments that kernels share.

`Prepared` is for the kernels of every call, whose sizes come again; `launch` for all others.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from cce_tp import replay
from cce_tp.kernels import tuning
from cce_tp.problem import LocalLogits

# Compiled kernels by (kernel, options, constants, kinds of the other arguments).
_compiled: dict[tuple[Any, ...], Any] = {}
# Functions that make a `Prepared`, each with a cache of its own.
_makers: list[Any] = []


# Functions from a kernel's arguments by name to its others and its constexpr ones, in order. By the
# kernel's Python function: Triton's own object takes long to hash.
_in_order: dict[Any, tuple[Callable[[dict[str, Any]], tuple[Any, ...]], ...]] = {}


def _take_apart(kernel: Any) -> tuple[Callable[[dict[str, Any]], tuple[Any, ...]], ...]:
    """Fills `_in_order`; constexpr parameters are named in capitals."""
    names = kernel.arg_names
    constants = [name for name in names if name.isupper() and len(name) > 1]
    others = [name for name in names if name not in constants]
    assert names == [*others, *constants], f"{kernel}: constexpr parameters come last"
    return _in_order.setdefault(kernel.fn, (_picker(others), _picker(constants)))


def _picker(names: list[str]) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    if len(names) > 1:
        return itemgetter(*names)
    return lambda arguments: tuple(arguments[name] for name in names)


def _kinds(values: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    """What Triton specialises a kernel on, of arguments: equal kinds, equal machine code; and the
    arguments with addresses in place of tensors.

    Of an integer it is whether it is 1, divisible by 16, or beyond 32 bits; of a pointer its dtype
    and whether it is aligned.
    """
    kinds: list[Any] = []
    plain: list[Any] = []
    add = kinds.append
    for value in values:
        cls = value.__class__
        if cls is int:
            # Strings, since 1 and True would be one key.
            kind = "one" if value == 1 else "multiple" if value & 15 == 0 else "any"
            add(kind if -(2**31) <= value < 2**31 else kind + ", wide")
        elif cls is float or value is None:
            add(cls)
        elif cls.__name__ == "TensorDescriptor":  # Triton's own, or Gluon's
            base = value.base
            add((base.dtype, base.get_device(), *value.block_shape))
        else:
            address = value.data_ptr()
            add((value.dtype, value.get_device(), address & 15))
            value = address
        plain.append(value)
    return kinds, plain


def _start(compiled: Any, grid: int, arguments: Iterable[Any]) -> None:
    """compiled[(grid, 1, 1)](*arguments) on the current device and stream.

    Triton calls its hooks before and after, with a description of the launch, and asks the driver
    about every tensor: a third to a half of the time that a launch takes. Where nobody listens it
    goes without the hooks; tensors come as addresses, so that they must be on this device."""
    if _is_watched():
        compiled[(grid, 1, 1)](*arguments)
        return
    run, function, packed = compiled.run, compiled.function, compiled.packed_metadata
    run(grid, 1, 1, _current_stream(), function, packed, None, None, None, *arguments)


def _current_stream() -> int:
    return driver.active.get_current_stream(torch.cuda.current_device())


def _is_watched() -> bool:
    """Whether somebody listens to Triton's launches."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    # Chains of hooks, empty unless somebody listens; None or one hook in Triton 3.4.
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def launch(kernel: Any, grid: int, *, num_warps: int, num_stages: int = 3, **arguments: Any) -> Any:
    """kernel[(grid,)](**arguments), without Triton's own analysis of the arguments after the first.

    That analysis takes several times as long as the launch itself (about 50 of 67 microseconds for
    20 arguments), which shows where the device is not kept busy for as long.

    Args:
        kernel: a triton.jit function whose constexpr parameters come last, named in capitals.
        grid: number of programs.
        num_warps, num_stages: Triton's launch options.
        arguments: all parameters of the kernel, by name.

    Returns:
        The compiled kernel; None from Triton's interpreter, which compiles nothing.
    """
    pick_others, pick_constants = _in_order.get(kernel.fn) or _take_apart(kernel)
    others, constants = pick_others(arguments), pick_constants(arguments)
    recorder = replay.recorder()
    if recorder is not None:
        options = {"num_warps": num_warps, "num_stages": num_stages}
        return _recorded(recorder, kernel, grid, others, constants, options)
    kinds, plain = _kinds(others)
    key = (kernel.fn, num_warps, num_stages, *constants, *kinds)
    compiled = _compiled.get(key)
    if compiled is not None:
        _start(compiled, grid, (*plain, *constants))
        return compiled
    made = kernel[(grid,)](*others, *constants, num_warps=num_warps, num_stages=num_stages)
    if made is not None:
        _compiled[key] = made
    return made


def _recorded(
    recorder: replay.Recorder,
    kernel: Any,
    grid: int,
    others: tuple[Any, ...],
    constants: tuple[Any, ...],
    options: dict[str, int],
) -> Any:
    """`launch`, while a part of a call is recorded."""
    places = [at for at, each in enumerate(others) if _has_memory(each)]

    def run(_: Any) -> Any:
        named = dict(zip(kernel.arg_names, (*others, *constants), strict=True))
        return launch(kernel, grid, **options, **named)

    return recorder.launch(
        run,
        tuple(getattr(others[at], "base", others[at]) for at in places),
        lambda _: _replayed(kernel, grid, others, constants, options, places),
    )


def _has_memory(value: Any) -> bool:
    return isinstance(value, Tensor) or _is_descriptor(value)


def _is_descriptor(value: Any) -> bool:
    return value.__class__.__name__ == "TensorDescriptor"  # Triton's own, or Gluon's


def _replayed(
    kernel: Any,
    grid: int,
    others: tuple[Any, ...],
    constants: tuple[Any, ...],
    options: dict[str, int],
    places: list[int],
) -> tuple[Callable[..., Any], Iterable[int]]:
    """As `Prepared._replayed`, of what is at some places of the arguments."""
    compiled = _compiled.get((kernel.fn, *options.values(), *constants, *_kinds(others)[0]))
    described = {at: _Described(others[at]) for at in places if _is_descriptor(others[at])}
    template = [None if at in places else each for at, each in enumerate((*others, *constants))]
    if compiled is not None:
        return _Start(compiled, grid, template, places, described), ()

    def interpret(*given: Any) -> None:
        arguments = [*template]
        for at, each in zip(places, given, strict=True):
            arguments[at] = described[at].of(each) if at in described else each
        kernel[(grid,)](*arguments, **options)

    return interpret, range(len(places))


class _Described:
    """A descriptor of one matrix, as those of others like it."""

    def __init__(self, descriptor: Any) -> None:
        self._kind = type(descriptor)
        self._fields = {name: it for name, it in vars(descriptor).items() if name != "base"}

    def of(self, base: Any) -> Any:
        """base: a tensor, or what knows its address."""
        # The constructor would check again what holds for this shape and alignment.
        made = object.__new__(self._kind)
        vars(made).update(self._fields, base=base)
        return made


class _Address:
    """All that a launch asks of a tensor."""

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address


class _Start:
    """`_start` of one compiled kernel, as a function of its tensors' addresses alone."""

    def __init__(
        self,
        compiled: Any,
        grid: int,
        template: Sequence[Any],
        places: Sequence[int],
        described: dict[int, _Described],
    ) -> None:
        """
        Args:
            template: the arguments, with anything in the place of a tensor.
            places: of the tensors among the arguments, in the order in which addresses come.
            described: by place, what goes as a descriptor.
        """
        self._compiled, self._grid, self._template = compiled, grid, [*template]
        self._places, self._described = places, described
        self._direct = _direct_launch(compiled, self._template, described)

    def __call__(self, *addresses: int | None) -> None:
        if self._direct is not None and not _is_watched():
            self._direct(self._grid, self._places, addresses)
            return
        arguments = [*self._template]
        for at, each in zip(self._places, addresses, strict=True):
            arguments[at] = each
        for at, described in self._described.items():
            arguments[at] = described.of(_Address(arguments[at]))
        _start(self._compiled, self._grid, arguments)


# Matrices of whose descriptors a launch remembers the encoded form: 128 bytes each.
_MOST_ENCODED = 64


def _direct_launch(
    compiled: Any, template: list[Any], described: dict[int, _Described]
) -> Callable[[int, Sequence[int], tuple[int | None, ...]], None] | None:
    """What Triton's launcher calls in the end; or None where that is not as in Triton 3.6.

    The launcher encodes every descriptor anew for every launch, which takes as long as the rest of
    a launch for each of them. The code says nothing but where a matrix lies and its form, and in
    training that is one of a few places.
    """
    run = getattr(compiled, "run", None)
    launcher = getattr(run, "launch", None)
    if run is None or launcher is None or not triton.__version__.startswith("3.6."):
        return None
    scratch = [getattr(run, f"{kind}_scratch_size", None) for kind in ("global", "profile")]
    if scratch != [0, 0]:
        return None
    metas: list[Any] = []
    if described:
        # A closure that encodes, around the launcher itself.
        cells = inspect.getclosurevars(launcher).nonlocals if inspect.isfunction(launcher) else {}
        metas, launcher = cells.get("tensordesc_meta", [None]), cells.get("launcher")
        if {*described} != cells.get("tensordesc_indices") or None in metas or launcher is None:
            return None
    from triton.backends.nvidia import driver as nvidia

    options = run.launch_cooperative_grid, run.launch_pdl, None, None
    function, packed = compiled.function, compiled.packed_metadata
    meta_of = dict(zip(sorted(described), metas, strict=True))
    # Every descriptor goes as its code, then its shape and strides, which are the same every time.
    expanded: list[Any] = []
    moved: list[int] = []
    for at, each in enumerate(template):
        moved.append(len(expanded))
        if at in described:
            form = described[at].of(None)
            expanded += [None, *form.shape, *form.strides]
        else:
            expanded.append(each)
    encoded: dict[tuple[int, int], Any] = {}

    def code_of(at: int, address: int) -> Any:
        if len(encoded) >= _MOST_ENCODED:
            encoded.clear()
        matrix = described[at].of(_Address(address))
        code, *_ = nvidia.make_tensordesc_arg(matrix, meta_of[at])
        encoded[at, address] = code
        return code

    def start(grid: int, places: Sequence[int], addresses: tuple[int | None, ...]) -> None:
        arguments = [*expanded]
        for at, address in zip(places, addresses, strict=True):
            if at in meta_of:
                address = encoded.get((at, address)) or code_of(at, address)
            arguments[moved[at]] = address
        stream = _current_stream()
        launcher(grid, 1, 1, stream, function, *options, packed, None, None, None, *arguments)

    return start


def forget() -> None:
    """As if no kernel had been launched yet."""
    _compiled.clear()
    replay.forget()
    for maker in _makers:
        maker.cache_clear()


class Prepared:
    """A kernel with all of its arguments but the tensors, which come first among its parameters.

    What follows from sizes and options is worked out once for them; a launch looks at addresses
    alone. For tensors of one set of shapes, strides and dtypes; holds none of them.
    """

    def __init__(
        self,
        kernel: Any,
        grid: int,
        *,
        num_warps: int,
        num_stages: int = 3,
        blocks: dict[str, tuple[int, int]] | None = None,
        **arguments: Any,
    ) -> None:
        """
        Args:
            kernel, grid, num_warps, num_stages: as for `launch`.
            blocks: rows and columns of a tile, of each matrix that goes as a descriptor.
            arguments: all parameters of the kernel but the tensors, by name.
        """
        names = kernel.arg_names
        self._names = [name for name in names if name not in arguments]
        assert names[: len(self._names)] == self._names, f"{kernel}: tensors come first"
        self._kernel, self._grid, self._arguments = kernel, grid, arguments
        self._options = {"num_warps": num_warps, "num_stages": num_stages}
        self._fixed = tuple(arguments[name] for name in names[len(self._names) :])
        self._blocks = {names.index(name): block for name, block in (blocks or {}).items()}
        # By device and alignment.
        self._known: dict[tuple[Any, ...], _Start] = {}

    def __call__(self, first: Tensor, *others: Tensor | None) -> None:
        """Launch, with the kernel's tensors in their order."""
        tensors = (first, *others)
        recorder = replay.recorder()
        if recorder is None:
            self._launch(tensors)
        else:
            recorder.launch(self._launch, tensors, self._replayed)

    def _launch(self, tensors: tuple[Tensor | None, ...]) -> None:
        addresses, key = self._addresses(tensors)
        start = self._known.get(key)
        if start is None:
            self._first_launch(key, [*tensors])
        else:
            start(*addresses)

    def _replayed(
        self, tensors: tuple[Tensor | None, ...]
    ) -> tuple[Callable[..., None], Iterable[int]]:
        """The launch for tensors of these kinds, as a function of their addresses; and at which
        places it takes the tensors themselves."""
        start = self._known.get(self._addresses(tensors)[1])
        if start is None:  # Triton's interpreter
            return lambda *given: self._launch(given), range(len(tensors))
        return start, ()

    @staticmethod
    def _addresses(
        tensors: tuple[Tensor | None, ...],
    ) -> tuple[list[int | None], tuple[Any, ...]]:
        """Of tensors, and what the compiled kernel depends on."""
        addresses = [None if each is None else each.data_ptr() for each in tensors]
        aligned = [None if each is None else each & 15 for each in addresses]
        first = tensors[0]
        assert first is not None
        return addresses, (first.get_device(), *aligned)

    def _first_launch(self, key: tuple[Any, ...], arguments: list[Any]) -> None:
        described = {}
        in_gluon = getattr(self._kernel, "is_gluon", lambda: False)()
        for place, block in self._blocks.items():
            arguments[place] = _descriptor(arguments[place], block, in_gluon)
            described[place] = _Described(arguments[place])
        named = dict(zip(self._names, arguments, strict=True))
        made = launch(self._kernel, self._grid, **named, **self._arguments, **self._options)
        if made is not None:
            places = range(len(arguments))
            template = [*(None for _ in places), *self._fixed]
            self._known[key] = _Start(made, self._grid, template, places, described)


def prepared(maker: Callable[..., Prepared]) -> Callable[..., Prepared]:
    """Keep what a function of sizes and options has made, for those that it was called with last.

    By position and of one type each: 1, 1.0 and True are one key, and different machine code."""
    cached = functools.lru_cache(maxsize=256)(maker)
    _makers.append(cached)
    return cached


def matrix_argument(
    matrix: Tensor, block_rows: int, block_cols: int, descriptor: bool
) -> Tensor | TensorDescriptor:
    """A row-major matrix as `kernels.tile` takes it: a pointer, or a descriptor of tiles."""
    return _descriptor(matrix, (block_rows, block_cols)) if descriptor else matrix


def _descriptor(matrix: Tensor, block: tuple[int, int], in_gluon: bool = False) -> Any:
    described = matrix, list(matrix.shape), list(matrix.stride()), [*block]
    if not in_gluon:
        return TensorDescriptor(*described)
    from cce_tp.kernels import hopper

    return hopper.descriptor(*described)


def logit_arguments(
    shape: tuple[int, int, int], first_id: int, logit_scale: float, logit_softcap: float | None
) -> dict[str, Any]:
    """Arguments of every kernel that meets logits, from what `LocalLogits` says of them."""
    tokens, vocab, _ = shape
    return {
        "N": tokens,
        "V": vocab,
        "first_id": first_id,
        "logit_scale": float(logit_scale),
        "logit_softcap": 1.0 if logit_softcap is None else float(logit_softcap),
        "HAS_SCALE": logit_scale != 1.0,
        "HAS_SOFTCAP": logit_softcap is not None,
    }


def precise_cap(logit_softcap: float | None, dtype: torch.dtype) -> bool:
    """A tanh that is off by 1.2e-7 of the cap is lost in the rounding of 16-bit operands, unless
    the cap is large."""
    return logit_softcap is not None and (logit_softcap > 50.0 or dtype.itemsize > 2)


class LogitsForm(NamedTuple):
    """All about `LocalLogits` but the tensors, and how kernels tile it: a key for `prepared`.

    Attributes:
        shape: N, V, D.
        strides: of the rows of input and weight.
        dtype: of the operands.
        has_bias, first_id, logit_scale, logit_softcap: see `LocalLogits`.
        config, programs: see `tuning.config_for`.
        descriptor: whether input and weight go as descriptors.
        warpgroups: of `kernels.hopper` that are to make them, of whose tiles there are `tiles`; or
            0.
        precision: of products, see `tuning.input_precision`.
    """

    shape: tuple[int, int, int]
    strides: tuple[int, int]
    dtype: torch.dtype
    has_bias: bool
    first_id: int
    logit_scale: float
    logit_softcap: float | None
    config: tuning.TileConfig
    programs: int
    descriptor: bool
    warpgroups: int
    precision: str

    @classmethod
    def of(cls, logits: LocalLogits) -> LogitsForm:
        """The form in which kernels take these logits now; settings of torch are read anew."""
        input, weight = logits.input, logits.weight
        config, programs = tuning.config_for(input)
        descriptor = tuning.use_descriptors(input, weight)
        return cls(
            logits.shape,
            (input.stride(0), weight.stride(0)),
            input.dtype,
            logits.bias is not None,
            logits.first_id,
            logits.logit_scale,
            logits.logit_softcap,
            config,
            programs,
            descriptor,
            tuning.warpgroups(input, len(weight), config, programs)
            if descriptor and not precise_cap(logits.logit_softcap, input.dtype)
            else 0,
            tuning.input_precision(input.dtype),
        )

    def of_few_warpgroups(self, few: int) -> LogitsForm:
        """For what needs more registers than three of them leave.

        Args:
            few: what `tuning.few_warpgroups` says."""
        return self._replace(warpgroups=min(self.warpgroups, few))

    @property
    def token_blocks(self) -> int:
        """Number of tiles that cover the tokens."""
        rows = self.warpgroups * tuning.WARPGROUP_ROWS or self.config.block_n
        return tuning.ceil_div(self.shape[0], rows)

    @property
    def tiles(self) -> int:
        """Number of tiles of the logits."""
        return self.token_blocks * tuning.ceil_div(self.shape[1], self.config.block_v)

    @property
    def blocks(self) -> dict[str, tuple[int, int]]:
        """The operands' descriptors, as `Prepared` takes them."""
        if not self.descriptor:
            return {}
        config = self.config
        return {
            "input": (config.block_n, config.block_d),
            "weight": (config.block_v, config.block_d),
        }

    def tile_arguments(self) -> dict[str, Any]:
        """Arguments of every kernel that walks all tiles, and its options, but for the tensors."""
        config, itemsize = self.config, self.dtype.itemsize
        hidden = self.shape[2]
        return {
            **logit_arguments(self.shape, self.first_id, self.logit_scale, self.logit_softcap),
            "D": hidden,
            "stride_input": self.strides[0],
            "stride_weight": self.strides[1],
            "HAS_BIAS": self.has_bias,
            "PRECISE_CAP": precise_cap(self.logit_softcap, self.dtype),
            "NUM_PROGRAMS": self.programs,
            "DESCRIPTOR": self.descriptor,
            "PRECISION": self.precision,
            "BLOCK_N": config.block_n,
            "BLOCK_V": config.block_v,
            "BLOCK_D": config.block_d,
            "GROUP_N": config.group_n(hidden, itemsize),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }
