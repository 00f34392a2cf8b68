"""Reads a run's settings: a YAML file, then the command line, checked name by name.

Nothing here imports torch before the section `env` has been applied.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import os
import re
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from launch.training.options import LOSSES, POSITIVE, RESERVED, LoopOptions, LossOptions

if TYPE_CHECKING:
    from megatron_integration import CceConfig

_SECTIONS = ("run_dir", "env", "megatron", "cce")


@dataclass
class Settings:
    """A checked run.

    Attributes:
        run_dir: folder for metrics, figure and summary.
        loop: what the loop reads itself.
        core: further fields of megatron.core's own dataclasses, by name.
        loss: section `cce`.
        name: of the run, for figure and summary.
    """

    run_dir: str
    loop: LoopOptions
    core: dict[str, Any]
    loss: LossOptions
    name: str

    def parallel(self, kind: str) -> int:
        """Size of `tensor_model_parallel`, `context_parallel` and so on."""
        return self.core.get(f"{kind}_size") or 1

    def flat(self) -> dict[str, Any]:
        """Every setting that ranks must share, by its full name."""
        sections = {
            "megatron": {**dataclasses.asdict(self.loop), **self.core},
            "cce": dataclasses.asdict(self.loss),
        }
        return {f"{name}.{key}": v for name, keys in sections.items() for key, v in keys.items()}


def read(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The sections of a file with the command line's `section.key=value` put over them.

    Raises:
        ValueError: no such file, not YAML, or an unknown section.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"--config: expected a YAML file, got {str(path)!r}, which is none")
    for item in overrides:
        if "=" not in item:
            raise ValueError(f"overrides: expected section.key=value, got {item!r}")
    try:
        base = OmegaConf.create({"run_dir": f"runs/{file.stem}", "env": {}, "megatron": {}})
        merged = OmegaConf.merge(base, OmegaConf.load(file), OmegaConf.from_dotlist([*overrides]))
        found: Any = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, YAMLError, OSError, ValueError, TypeError) as error:
        raise ValueError(f"--config: cannot read {file} with these overrides: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"--config: expected sections in {file}, got {type(found).__name__}")
    _refuse_unknown(found, _SECTIONS, "")
    for section in _SECTIONS[1:]:
        found[section] = found.get(section) or {}
        if not isinstance(found[section], dict):
            raise ValueError(f"{section}: expected keys and values, got {found[section]!r}")
    found["name"] = file.stem
    return found


def apply_environment(found: dict[str, Any]) -> None:
    """Set the variables of the section `env`; the shell's own values are not kept."""
    for key, value in found["env"].items():
        os.environ[str(key)] = str(value)


def check(found: dict[str, Any]) -> Settings:
    """Turn what `read` returned into settings.

    Raises:
        ValueError: an unknown key, with the nearest known one, or a value that does not fit.
    """
    found = copy.deepcopy(found)
    megatron, cce = found["megatron"], found["cce"]
    _take_alias(megatron, cce)
    own = {field.name for field in dataclasses.fields(LoopOptions)}
    _refuse_unknown(megatron, own | core_fields(), "megatron.")
    for key, instead in RESERVED.items():
        if key in megatron:
            raise ValueError(
                f"megatron.{key}: expected not to be set, got {megatron[key]!r}: use {instead}"
            )
    _refuse_unknown(cce, [field.name for field in dataclasses.fields(LossOptions)], "cce.")
    settings = Settings(
        run_dir=str(found["run_dir"]),
        loop=_typed(LoopOptions, {k: v for k, v in megatron.items() if k in own}, "megatron"),
        core={k: v for k, v in megatron.items() if k not in own},
        loss=_typed(LossOptions, cce, "cce"),
        name=found["name"],
    )
    _check_values(settings)
    if settings.loss.loss == "cce":
        cce_config(settings)
    return settings


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Settings:
    """`read` and `check` in one, without the section `env`."""
    return check(read(path, overrides))


def cce_config(settings: Settings) -> CceConfig:
    """Section `cce` as the integration's own options.

    Raises:
        ValueError: a value outside its range, or values that exclude each other, by their names in
            the file.
    """
    from megatron_integration import CceConfig

    options = {f"cce_{key}": value for key, value in dataclasses.asdict(settings.loss).items()}
    try:
        return CceConfig.from_args(Namespace(cce=True, **options))
    except ValueError as error:
        flags = re.compile(r"--cce-([a-z-]+)")
        named = flags.sub(lambda flag: "cce." + flag[1].replace("-", "_"), str(error))
        raise ValueError(named) from error


def reduced(settings: Settings, world_size: int) -> Settings:
    """The same run at a size for a test on `world_size` CPU processes.

    Kept: which features are on, and parallelism as far as it fits. Cut: every size, the number of
    steps, half precision; tokens are made up and nothing is saved.
    """
    small = copy.deepcopy(settings)
    loop, core = small.loop, small.core
    pp = min(settings.parallel("pipeline_model_parallel"), max(1, world_size // 2))
    cp = min(settings.parallel("context_parallel"), world_size // pp)
    tp = min(settings.parallel("tensor_model_parallel"), world_size // (pp * cp))
    core.update(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    core["context_parallel_size"] = cp
    core["sequence_parallel"] = tp > 1 and core.get("sequence_parallel", False)
    if loop.num_layers_per_virtual_pipeline_stage:
        loop.num_layers_per_virtual_pipeline_stage = 1
    core.pop("virtual_pipeline_model_parallel_size", None)
    core["num_layers"] = 2 * pp
    core["hidden_size"], core["num_attention_heads"] = 64, 4
    core.pop("kv_channels", None)
    if core.get("num_query_groups"):
        core["num_query_groups"] = max(2, tp)
    if core.get("ffn_hidden_size"):
        core["ffn_hidden_size"] = 128
    for key in ("bf16", "fp16"):
        core.pop(key, None)
    replicas = world_size // (tp * pp * cp)
    loop.seq_length, loop.max_position_embeddings = 32, 32
    loop.micro_batch_size, loop.global_batch_size = 1, 2 * pp * replicas
    loop.vocab_size = 500
    loop.train_iters, loop.eval_interval, loop.eval_iters, loop.log_interval = 2, 2, 1, 1
    loop.lr_warmup_iters, loop.lr_decay_iters, loop.num_workers = 0, None, 0
    loop.mock_data = True
    loop.data_path = loop.train_data_path = loop.valid_data_path = None
    loop.save = loop.load = loop.tensorboard_dir = None
    loop.distributed_backend, loop.transformer_impl = "gloo", "local"
    return small


def core_fields() -> set[str]:
    """Names of the fields that the installed megatron.core knows."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    names = set()
    for cls in (TransformerConfig, OptimizerConfig, DistributedDataParallelConfig):
        names |= {field.name for field in dataclasses.fields(cls) if _settable(field)}
    return names


def _settable(field: Any) -> bool:
    hidden = field.name.startswith("_") or field.name == "timers"
    return field.init and not hidden and "Callable" not in str(field.type)


def _refuse_unknown(found: dict[str, Any], known: Iterable[str], prefix: str) -> None:
    known = sorted(known)
    for key in found:
        if key in known:
            continue
        near = difflib.get_close_matches(str(key).replace("-", "_"), known, n=1, cutoff=0.0)
        raise ValueError(f"{prefix}{key}: unknown key; did you mean {prefix}{near[0]}?")


def _take_alias(megatron: dict[str, Any], cce: dict[str, Any]) -> None:
    """`cross_entropy_fusion_impl: cce` is another name for `cce.loss: cce`."""
    if megatron.get("cross_entropy_fusion_impl") != "cce":
        return
    del megatron["cross_entropy_fusion_impl"]
    if cce.setdefault("loss", "cce") != "cce":
        raise ValueError(
            "megatron.cross_entropy_fusion_impl: expected not to be cce together with "
            f"cce.loss={cce['loss']}, got both"
        )


def _typed(cls: Any, values: dict[str, Any], section: str) -> Any:
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), values))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{section}.{error.full_key}: {reason}") from error


def _check_values(settings: Settings) -> None:
    loop, core = settings.loop, settings.core
    if settings.loss.loss not in LOSSES:
        raise ValueError(
            f"cce.loss: expected one of {', '.join(LOSSES)}, got {settings.loss.loss!r}"
        )
    for key in ("num_layers", "hidden_size", "num_attention_heads"):
        if key not in core:
            raise ValueError(f"megatron.{key}: expected a value, got none")
    for key in POSITIVE:
        value = core.get(key) if key in core else getattr(loop, key, None)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"megatron.{key}: expected a positive integer, got {value!r}")
    if loop.nonfinite_loss not in ("stop", "skip"):
        raise ValueError(
            f"megatron.nonfinite_loss: expected stop or skip, got {loop.nonfinite_loss!r}"
        )
    if loop.distributed_backend not in (None, "nccl", "gloo"):
        raise ValueError(
            f"megatron.distributed_backend: expected nccl or gloo, got {loop.distributed_backend!r}"
        )
    if loop.transformer_impl not in (None, "local", "transformer_engine"):
        raise ValueError(
            "megatron.transformer_impl: expected local or transformer_engine, got "
            f"{loop.transformer_impl!r}"
        )
    chunks = 2 * settings.parallel("context_parallel")
    if chunks > 2 and loop.seq_length % chunks:
        raise ValueError(
            "megatron.seq_length: expected a multiple of 2 x context_parallel_size = "
            f"{chunks}, got {loop.seq_length}"
        )
    if loop.save_interval and not loop.save:
        raise ValueError("megatron.save: expected a folder, as save_interval is set, got none")
    decay = loop.lr_decay_iters or loop.train_iters
    if not 0 <= loop.lr_warmup_iters < decay:
        raise ValueError(
            "megatron.lr_warmup_iters: expected 0 or more and fewer than the "
            f"{decay} iterations of the decay, got {loop.lr_warmup_iters}"
        )
    if bool(loop.train_data_path) != bool(loop.valid_data_path):
        raise ValueError(
            "megatron.valid_data_path: expected together with train_data_path, got only one of them"
        )
