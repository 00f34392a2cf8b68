"""What a backward pass did, and conditions under which it does what it does on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from cce_tp import backward, ops


@contextmanager
def operands_as_they_are() -> Iterator[None]:
    """16-bit products take no wide copies of their operands, as on a GPU."""
    with ExitStack() as stack:
        for module in (backward, ops):
            stack.enter_context(mock.patch.object(module, "copies_operands", lambda _: False))
        yield


@contextmanager
def kept_columns() -> Iterator[list[int]]:
    """Yields, for each backward pass, how many columns' logits it had from the forward pass."""
    columns: list[int] = []
    run = backward._BackwardPass.run

    def spy(self: Any, workspace_bytes: int) -> None:
        # The far field's walk lets go of them.
        far = 0 if self.far is None or self.kept is None else self.kept.columns
        run(self, workspace_bytes)
        columns.append(far if self.kept is None else self.kept.columns)

    with mock.patch.object(backward._BackwardPass, "run", spy):
        yield columns
