"""Configurations are data: nothing in one can run code or read what is not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launch.training import settings
from launch_runs import ROOT

pytestmark = pytest.mark.no_poison
BASE = (ROOT / "configs" / "tiny_cpu.yaml").read_text()


@pytest.mark.parametrize(
    "line",
    [
        "run_dir: !!python/object/apply:os.mkdir [CANARY]",
        "run_dir: !!python/object/new:os.mkdir [CANARY]",
        "run_dir: !!python/name:os.system ''",
        "run_dir: !!python/module:os",
        "run_dir: ${eval:__import__('os').mkdir('CANARY')}",
    ],
)
def test_yaml_makes_no_objects(tmp_path: Path, line: str) -> None:
    canary = tmp_path / "canary"
    path = tmp_path / "hostile.yaml"
    text = re.sub(r"^run_dir: .*$", lambda _: line, BASE, flags=re.MULTILINE)
    path.write_text(text.replace("CANARY", str(canary)))
    with pytest.raises(ValueError, match="--config: cannot read"):
        settings.load(path)
    assert not canary.exists()


@pytest.mark.parametrize("text", ["[1, 2", "\x00", "a: b: c", "- 1\n- 2\n", "\ud7ff: &a [*a]"])
def test_what_is_no_configuration_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"expected|cannot read|unknown key"):
        settings.load(path)


def test_our_own_code_unpickles_nothing_without_a_limit() -> None:
    """No pickle.load, no torch.load but with weights_only=True, no shell, no eval."""
    allowed = {
        "launch/training/trust.py",  # the unpickler that admits known classes only
        "cce_tp/replay.py",  # executes what it has written itself, of numbers and its own names
    }
    found = []
    for folder in ("cce_tp", "megatron_integration", "launch"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            text = path.read_text()
            for call in re.findall(r"torch\.load\(.*", text):
                if "weights_only=True" not in call:
                    found.append(f"{name}: {call}")
            for pattern in (
                r"\bpickle\.loads?\(",
                r"allow_pickle=True",
                r"\bos\.(system|popen)\(",
                r"shell=True",
                r"yaml\.(unsafe_|full_)?load\(",
                r"(?<![\w.])(eval|exec)\(",
            ):
                if name not in allowed:
                    found += [f"{name}: {match[0]}" for match in re.finditer(pattern, text)]
    assert found == []


def test_no_script_hands_a_string_to_a_shell() -> None:
    for path in sorted((ROOT / "launch").glob("*.s*")):
        code = "\n".join(
            line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")
        )
        assert not re.search(r"\b(eval|bash -c|sh -c|xargs)\b", code), path.name
        assert re.search(r'"\$@"', code), f"{path.name}: arguments are passed on as words"
