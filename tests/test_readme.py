"""The README's Python snippets run as they stand: on one rank, and on all four where they shard.

And the tests that docs/megatron.md names are there.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ranks import Rank, RankPool

README = Path(__file__).parent.parent / "README.md"
_BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
SNIPPETS = _BLOCK.findall(README.read_text(encoding="utf-8")) if README.exists() else []


def execute(rank: Rank, code: str) -> list[str]:
    """Run the snippet beside a torch.distributed that is set up; the names with gradients."""
    names: dict[str, object] = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), names)
    return sorted(name for name, each in names.items() if getattr(each, "grad", None) is not None)


def test_there_are_snippets_for_one_rank_and_for_several() -> None:
    assert README.exists()
    sharded = ["VocabShard" in snippet for snippet in SNIPPETS]
    assert True in sharded and False in sharded


@pytest.mark.no_poison
@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet(pool: RankPool, number: int) -> None:
    code = SNIPPETS[number]
    sharded = "VocabShard" in code
    answers = pool.run(
        execute, code, group="world" if sharded else "1", poison=False, timeout_s=120
    )
    assert all(answer == answers[0] for answer in answers)
    assert answers[0], "no tensor of the snippet has a gradient"


def test_snippets_are_short() -> None:
    for snippet in SNIPPETS:
        lines = [line for line in snippet.splitlines() if line.strip()]
        assert len(lines) <= 12, f"{len(lines)} lines:\n{snippet}"


def test_every_acceptance_check_names_tests_that_exist() -> None:
    text = (README.parent / "docs" / "megatron.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+ .*?) \| (.*?) \|", text.split("## Acceptance checks")[1], re.M)
    numbers = [int(number) for name, _ in rows for number in re.findall(r"(?:^|; )(\d+) ", name)]
    assert numbers == list(range(1, 37))
    for name, tests in rows:
        file = None
        for word in re.findall(r"`([^` ]+)", tests):
            if word.startswith("tests/"):
                assert (README.parent / word).exists(), (name, word)
                continue
            short, _, function = word.rpartition("::")
            if short:
                file = README.parent / "tests" / f"test_megatron_{short}.py"
            elif not word.startswith("test_"):
                continue  # an option
            assert file is not None and f"def {function}(" in file.read_text(), (name, word)
