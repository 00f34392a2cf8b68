"""Pretrain a GPT through `megatron.training.pretrain` of Megatron-core 0.19 or newer.

For users who have Megatron's own arguments: those, and the `--cce` group.

    torchrun --nproc-per-node 8 -m launch.pretrain_gpt --cce --tensor-model-parallel-size 8 ...

`launch.pretrain` is the same for release 0.16, whose wheel has no megatron.training.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from launch import topology
from megatron_integration import (
    CceConfig,
    add_cce_arguments,
    cce_requested,
    far_field_metrics,
    fused_count,
    materialized_count,
    pre_wrap_hook,
    take_alias,
)


def main() -> None:
    """Parse Megatron's arguments and train.

    Raises:
        SystemExit: megatron.training is not installed.
        ValueError: arguments that exclude each other, or an option this entry does not handle.
    """
    if importlib.util.find_spec("megatron.training") is None:
        raise SystemExit(
            "launch.pretrain_gpt needs megatron.training, which the wheels of megatron-core 0.19 "
            "and newer hold (Python 3.12); with an older release use launch.pretrain"
        )
    from megatron.core.enums import ModelType
    from megatron.training import pretrain  # type: ignore[import-not-found]
    from megatron.training.argument_utils import (  # type: ignore[import-not-found]
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import (  # type: ignore[import-not-found]
        parse_and_validate_args,
    )

    topology.resolve()
    skip_building_helpers()
    fused = _resolve_alias(sys.argv)
    # Megatron divides by the interval even where no evaluation is asked for.
    args = parse_and_validate_args(add_cce_arguments, args_defaults={"eval_interval": 1000})
    model_config = gpt_config_from_args(args)
    models: list[Any] = []
    _refuse_packed_sequences(args)
    config = CceConfig.from_args(take_alias(args)) if fused or cce_requested(args) else None
    model_config.pre_wrap_hooks.append(partial(_agree_on_loss, config))
    if config is not None:
        model_config.pre_wrap_hooks.append(pre_wrap_hook(config))
    model_config.pre_wrap_hooks.append(lambda chunks: (models.extend(chunks), chunks)[1])
    _datasets.is_distributed = True  # type: ignore[attr-defined]  # every rank reads its own
    pretrain(
        pretrain_cfg_container_from_args(args, model_config),
        _datasets,
        ModelType.encoder_or_decoder,
        _forward_step,
    )
    if torch.distributed.is_initialized() and torch.distributed.get_rank() == 0:
        print(
            f"cce: {fused_count(models)} fused losses, logits materialised "
            f"{materialized_count(models)} times"
        )


def _resolve_alias(argv: list[str]) -> bool:
    """Rewrite `--cross-entropy-fusion-impl cce` to `--cce` before Megatron's checks see it."""
    for i, word in enumerate(argv):
        if word == "--cross-entropy-fusion-impl=cce":
            argv[i : i + 1] = ["--cce"]
            return True
        if word == "--cross-entropy-fusion-impl" and argv[i + 1 : i + 2] == ["cce"]:
            argv[i : i + 2] = ["--cce"]
            return True
    return False


def _agree_on_loss(config: CceConfig | None, chunks: Any) -> Any:
    """Megatron's hook; raises the same ValueError on all ranks unless they have one loss in common.

    Otherwise some ranks would enter the stock loss's collectives and some those of the fused one.
    """
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    mine = "no --cce" if config is None else str(config)
    torch.distributed.all_gather_object(everyone, mine)
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            raise ValueError(
                f"--cce: expected the same on every rank, got {everyone[0]} on rank 0 and {theirs} "
                f"on rank {rank}"
            )
    return chunks


def _refuse_packed_sequences(args: Any) -> None:
    """Refuse the options that need batches other than those `_forward_step` makes."""
    for option in ("hybrid_context_parallel", "sft", "dataloader_inter_document_masking"):
        if getattr(args, option, False):
            raise ValueError(
                f"--{option.replace('_', '-')}: expected not to be set with launch.pretrain_gpt, "
                "got it: sequences of several lengths in one row are not handled here"
            )


def skip_building_helpers() -> None:
    """Keep Megatron from building its dataset helpers where they are built already.

    The wheel ships the compiled helpers without the Makefile that Megatron runs at start, which
    would end the first rank and leave the others in a barrier.
    """
    from megatron.core.datasets import utils

    folder = os.path.dirname(os.path.abspath(utils.__file__))
    if os.path.exists(os.path.join(folder, "Makefile")):
        return
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        utils.compile_helpers = lambda: None


def _datasets(num_samples: Any, vp_stage: int | None = None) -> Any:
    """Megatron's dataset provider: (train, valid, test) sample counts -> three datasets."""
    del vp_stage
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
    from megatron.training import get_args, get_tokenizer  # type: ignore[attr-defined]
    from megatron.training.utils import (  # type: ignore[attr-defined]
        get_blend_and_blend_per_split,
    )

    args: Any = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
    )
    kind = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(kind, num_samples, lambda: True, config).build()


def _forward_step(
    data_iterator: Iterator[dict[str, Tensor]], model: Any, return_schedule_plan: bool = False
) -> Any:
    """Megatron's forward step: one micro batch -> (b, s) losses and how to sum them.

    With --overlap-moe-expert-parallel-comm Megatron asks for the plan that makes the losses.
    """
    from launch.training.data import part_of_context

    batch = {
        name: value.cuda(non_blocking=True)
        for name, value in next(data_iterator).items()
        if isinstance(value, Tensor)
    }
    batch = part_of_context(batch)
    run = model.build_schedule_plan if return_schedule_plan else model
    loss = run(
        batch["tokens"],
        batch["position_ids"],
        batch.get("attention_mask"),
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return loss, partial(_sum_loss, batch["loss_mask"], model)


def _sum_loss(
    loss_mask: Tensor, model: Any, output: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum over the tokens that count, their number, and both for the log.

    Megatron logs each pair as the sum of the first over the sum of the second, of all micro
    batches and replicas; so a metric that comes with 1 is averaged.
    """
    mask = loss_mask.reshape(-1).float()
    total = (output.reshape(-1).float() * mask).sum()
    tokens = mask.sum().to(torch.int)
    report = torch.stack([total.detach(), tokens.to(torch.float32)])
    metrics = far_field_metrics(model) if model.training else {}
    pairs = {key: torch.stack([value, torch.ones_like(value)]) for key, value in metrics.items()}
    return total, tokens, {"lm loss": report, **pairs}


if __name__ == "__main__":
    main()
