"""Triton's interpreter, without work that changes nothing: two thirds of a kernel's time.

Before a kernel runs, the interpreter puts functions of its own into triton.language; it does so
again before every call of another @triton.jit function from the kernel, when all of them are in
place. Of every sum and product of integers it computes in int64 whether it overflows, for an
assertion that it then leaves out. And what a type or a shape comes to it works out anew for every
value.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

# Of the names that functions see: how many there were, and which are modules of the language.
_languages: dict[int, tuple[Any, int, list[Any]]] = {}


def is_patched(function: Any) -> bool:
    """Whether the interpreter's functions are in every module of the language that it sees."""
    import triton.language as tl

    names = function.__globals__
    known, size, seen = _languages.get(id(names), (None, 0, []))
    if known is not names or size != len(names):
        modules = [each for each in names.values() if inspect.ismodule(each)]
        seen = [each for each in modules if each is tl or each is tl.core]
        _languages[id(names)] = names, len(names), seen
    # A module is patched, and restored, as a whole.
    return bool(seen) and not any(tl.core.is_builtin(each.load) for each in seen)


def patch_all() -> None:
    """From now on the interpreter leaves out what changes nothing.

    A Triton whose interpreter does any of it in another way stays as it is there.
    """
    patch_once()
    check_no_overflow()
    remember_types()


def check_no_overflow() -> None:
    """Unless an overflow would be reported."""
    from triton.runtime import interpreter

    builder = getattr(interpreter, "interpreter_builder", None)
    options = getattr(builder, "options", None)
    if not getattr(options, "debug", True) and hasattr(options, "sanitize_overflow"):
        builder.options = dataclasses.replace(options, sanitize_overflow=False)  # type: ignore


def remember_types() -> None:
    """What follows from the type of a value is worked out once: numpy's type, number, shape."""
    import triton.language as tl
    from triton.runtime import interpreter

    stock = getattr(interpreter, "_get_np_dtype", None)
    if stock is None or hasattr(stock, "stock"):
        return
    known: dict[str, Any] = {}

    def get_np_dtype(dtype: Any) -> Any:
        if isinstance(dtype, tl.block_type):
            dtype = dtype.element_ty
        if type(dtype) is not tl.dtype:
            return stock(dtype)
        if dtype.name not in known:
            known[dtype.name] = stock(dtype)
        return known[dtype.name]

    get_np_dtype.stock = stock  # type: ignore[attr-defined]
    interpreter._get_np_dtype = get_np_dtype
    _remember_attributes(tl.block_type, lambda element, shape: (element.name, *map(_plain, shape)))
    _remember_attributes(tl.tensor, lambda _, type: (type.__class__, type.name), own="handle")


def _plain(size: Any) -> Any:
    return getattr(size, "value", size)


def _remember_attributes(kind: type, key: Callable[..., Any], own: str | None = None) -> None:
    """Objects made from two arguments of the same key share their attributes, but for the one that
    is the first argument."""
    stock: Any = kind.__init__
    if hasattr(stock, "stock"):
        return
    known: dict[Any, dict[str, Any]] = {}

    def init(self: Any, *args: Any, **more: Any) -> None:
        if type(self) is not kind or len(args) != 2 or more:
            stock(self, *args, **more)
            return
        found = known.get(name := key(*args))
        if found is None:
            stock(self, *args)
            known[name] = {each: value for each, value in vars(self).items() if each != own}
            return
        vars(self).update(found)
        if own is not None:
            setattr(self, own, args[0])

    init.stock = stock  # type: ignore[attr-defined]
    kind.__init__ = init  # type: ignore[misc]


def patch_once() -> None:
    """From now on a call that finds the interpreter's functions in place leaves them there."""
    from triton.runtime import interpreter

    stock, scope = (getattr(interpreter, name, None) for name in ("_patch_lang", "_LangPatchScope"))
    if stock is None or scope is None or hasattr(stock, "stock"):
        return

    def patch_lang(function: Any) -> Any:
        return scope() if is_patched(function) else stock(function)

    patch_lang.stock = stock  # type: ignore[attr-defined]
    interpreter._patch_lang = patch_lang
