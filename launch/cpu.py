"""Lets Megatron-core train on the CPU, over gloo, where there is no CUDA device.

Megatron-core is written for CUDA: it allocates on "cuda", keeps streams and events, reads the
CUDA generator, and tells parameters apart by names such as "torch.cuda.FloatTensor". The sums
themselves run anywhere. `run_megatron_on_cpu` answers these questions of it with the CPU.

What is replaced, in the whole process:

- a CUDA device named in a call of a torch function is the CPU; `Tensor.cuda`, `pin_memory` and
  `record_stream` do nothing; `Tensor.type()` says "torch.cuda.FloatTensor" where it would have
  said "torch.FloatTensor", for Megatron's optimizers;
- in `torch.cuda`: device number, streams, events, synchronisation, profiler ranges, cache and
  memory statistics do nothing; the generator is the CPU's. `torch.cuda.is_available()` goes on to
  say False;
- torch.compile gives back the function uncompiled, since Megatron compiles a dozen small ones;
- `WrappedTorchNorm` accepts sequence parallelism (see launch/torch_norm.py).

For tests and small runs: it is neither fast nor how Megatron is meant to be run.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from typing import Any

import torch

_CONSTRUCTORS = (
    *("arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like"),
    *("linspace", "ones", "ones_like", "rand", "rand_like", "randint", "randn", "randn_like"),
    *("randperm", "scalar_tensor", "tensor", "zeros", "zeros_like"),
)
_active = False


def run_megatron_on_cpu() -> bool:
    """Make megatron.core trainable on the CPU; call it before importing megatron.core.

    Process-wide and for good; a second call changes nothing, and nor does any call where there
    is a CUDA device.

    Returns:
        Whether Megatron runs on the CPU now.
    """
    global _active
    if torch.cuda.is_available():
        return False
    if not _active:
        _active = True
        _stop_compiling()
        _replace_cuda_functions()
        _replace_torch_functions()
        from launch.torch_norm import allow_sequence_parallel_norms

        allow_sequence_parallel_norms()
    return True


def _replace_torch_functions() -> None:
    """Functions, not a TorchFunctionMode: a mode is off in backward passes and other threads."""
    for name in _CONSTRUCTORS:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"):
        setattr(torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name)))
    stock_to, stock_type = torch.Tensor.to, torch.Tensor.type

    @functools.wraps(stock_to)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = ("cpu", *args[1:])
        return stock_to(self, *args, **_with_cpu(kwargs))

    @functools.wraps(stock_type)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = stock_type(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    replacements = {"to": to, "type": type_, "record_stream": _nothing}
    replacements |= dict.fromkeys(("cuda", "pin_memory"), lambda self, *_, **__: self)
    for name, replacement in replacements.items():
        setattr(torch.Tensor, name, replacement)


def _on_cpu(make: Any) -> Any:
    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Any:
        return make(*args, **_with_cpu(kwargs))

    return made


def _with_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    if "device" in kwargs and _is_cuda(kwargs["device"]):
        kwargs["device"] = "cpu"
    if kwargs.get("pin_memory"):
        kwargs["pin_memory"] = False
    return kwargs


def _is_cuda(device: Any) -> bool:
    if isinstance(device, bool):
        return False
    if isinstance(device, int):
        return True
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


class _Stream:
    """A stream or an event of a device that does everything at once."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return _nothing

    def record_event(self, event: Any = None) -> Any:
        return event or self


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _get_rng_state(device: Any = None) -> torch.Tensor:
    del device
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = None) -> None:
    del device
    torch.set_rng_state(new_state)


def _replace_cuda_functions() -> None:
    stream = _Stream()
    zero = {"current_device", "memory_allocated", "max_memory_allocated", "memory_reserved"}
    replacements: dict[str, Any] = {
        **dict.fromkeys(zero, lambda *_, **__: 0),
        **dict.fromkeys(("synchronize", "empty_cache", "reset_peak_memory_stats"), _nothing),
        "set_device": _nothing,
        "Stream": _Stream,
        "Event": _Stream,
        "current_stream": lambda *_, **__: stream,
        "default_stream": lambda *_, **__: stream,
        "stream": lambda *_, **__: contextlib.nullcontext(),
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    for name in ("range_push", "range_pop"):
        setattr(torch.cuda.nvtx, name, _nothing)
    generator = {
        "get_rng_state": _get_rng_state,
        "set_rng_state": _set_rng_state,
        "manual_seed": torch.default_generator.manual_seed,
        # Megatron sets the state of a generator through these two.
        "default_generators": (torch.default_generator,),
        "_lazy_call": lambda call, **_: call(),
    }
    for module in (torch.cuda, torch.cuda.random):
        for name, replacement in generator.items():
            setattr(module, name, replacement)


def _stop_compiling() -> None:
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    # Its tables of torch's functions admit no replaced ones, so they are made before.
    importlib.import_module("torch._dynamo")
