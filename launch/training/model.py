"""Builds what is trained: process groups, GPT model chunks, optimizer and schedule."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import random
import socket
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import numpy
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from launch import topology
from launch.training.attention import use_fused_attention
from launch.training.settings import Settings, cce_config
from megatron_integration import install


def start_distributed(settings: Settings) -> torch.device:
    """Join the process group that the launcher describes; returns this rank's device.

    Ranks may share a device (gloo only): rank r of a machine takes device r modulo their number.

    Raises:
        ValueError: several ranks per device under nccl, not started by a launcher, or, on every
            rank, ranks that were started with other settings.
    """
    loop, place = settings.loop, topology.resolve()
    device, backend = torch.device("cpu"), loop.distributed_backend or "gloo"
    if torch.cuda.is_available():
        backend = loop.distributed_backend or "nccl"
        devices = torch.cuda.device_count()
        # srun may show each task its own device only.
        shared = devices > 1 or place.launcher != "srun"
        if backend == "nccl" and shared and place.local_world_size > devices:
            raise ValueError(
                f"megatron.distributed_backend: expected gloo for more ranks than the {devices} "
                "device(s) of this machine, got nccl"
            )
        device = torch.device("cuda", place.local_rank % devices)
        torch.cuda.set_device(device)
        if backend == "gloo":
            _reduce_one_by_one()
    timeout = timedelta(minutes=loop.distributed_timeout_minutes)
    if not dist.is_initialized():
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        if place.nodes == 1:
            # torchrun may keep its store over a restart, with the addresses of dead processes in
            # it. (launch/torchrun.sh sees to that on many nodes, which count restarts differently.)
            store = PrefixStore(f"start-{place.restarts}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    _agree_on(settings, device)
    return device


def _agree_on(settings: Settings, device: torch.device) -> None:
    """Raise the same ValueError on every rank unless all ranks have the same settings.

    What each rank reports is its own; everything else decides which collectives it enters.
    """
    mine = settings.flat()
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True, default=str).encode()).digest()
    number = int.from_bytes(digest[:7], "big")
    bounds = torch.tensor([number, -number], dtype=torch.int64, device=device)
    dist.all_reduce(bounds, dist.ReduceOp.MAX)
    if bounds[0].item() == -bounds[1].item():
        return
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for rank, theirs in enumerate(everyone):
        for key in sorted(everyone[0].keys() | theirs.keys()):
            first, other = everyone[0].get(key), theirs.get(key)
            if str(first) != str(other):
                raise ValueError(
                    f"{key}: expected the same on every rank, got {first!r} on rank 0 and "
                    f"{other!r} on rank {rank}"
                )


def placement() -> str:
    """One line: the parallel sizes, and whether each tensor-parallel group is inside a node.

    A collective over all ranks.
    """
    names: list[Any] = [None] * dist.get_world_size()
    place = topology.resolve()
    dist.all_gather_object(names, (place.node, socket.gethostname()))
    group: Any = parallel_state.get_tensor_model_parallel_group()
    nodes = {names[rank][0] for rank in dist.get_process_group_ranks(group)}
    spans = torch.tensor([len(nodes) > 1], dtype=torch.int32)
    spans = spans.to(torch.cuda.current_device() if torch.cuda.is_available() else "cpu")
    dist.all_reduce(spans, dist.ReduceOp.MAX)
    sizes = {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "context": parallel_state.get_context_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(),
    }
    hosts: dict[Any, list[int]] = {}
    for rank, node in enumerate(names):
        hosts.setdefault(node, []).append(rank)
    some = ", ".join(f"{name}: {_runs(ranks)}" for (_, name), ranks in [*hosts.items()][:8])
    text = ", ".join(f"{kind} {size}" for kind, size in sizes.items())
    text += f"; ranks by node: {some}{', ...' if len(hosts) > 8 else ''}"
    if spans.item():
        text += "; SLOW: a tensor-parallel group spans nodes (docs/multi-node.md, placement)"
    return text


def _runs(ranks: list[int]) -> str:
    """[0, 1, 2, 3] -> "0-3"."""
    if ranks == [*range(ranks[0], ranks[-1] + 1)] and len(ranks) > 1:
        return f"{ranks[0]}-{ranks[-1]}"
    return " ".join(map(str, ranks))


def _reduce_one_by_one() -> None:
    """Let Megatron reduce gradients of CUDA tensors over gloo, which cannot join several calls.

    Only for reductions that are not overlapped: what is joined is also what is waited for.
    """
    from megatron.core.distributed import param_and_grad_buffer

    module: Any = param_and_grad_buffer
    module._coalescing_manager = lambda *_, **__: contextlib.nullcontext()


def start_model_parallel(settings: Settings) -> None:
    """Make Megatron's process groups and seed every generator.

    Raises:
        ValueError: a world size that the parallel sizes do not divide.
    """
    sizes = {
        kind: settings.parallel(kind)
        for kind in ("tensor_model_parallel", "pipeline_model_parallel", "context_parallel")
    }
    product = sizes["tensor_model_parallel"] * sizes["pipeline_model_parallel"]
    product *= sizes["context_parallel"]
    if dist.get_world_size() % product:
        raise ValueError(
            "megatron.tensor_model_parallel_size, pipeline_model_parallel_size, "
            f"context_parallel_size: expected a product that divides the {dist.get_world_size()} "
            f"ranks, got {product}"
        )
    options: dict[str, Any] = {f"{kind}_size": size for kind, size in sizes.items()}
    parallel_state.initialize_model_parallel(
        virtual_pipeline_model_parallel_size=virtual_stages(settings),
        expert_model_parallel_size=settings.parallel("expert_model_parallel"),
        expert_tensor_parallel_size=settings.core.get("expert_tensor_parallel_size"),
        distributed_timeout_minutes=settings.loop.distributed_timeout_minutes,
        **options,
    )
    seed = settings.loop.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def virtual_stages(settings: Settings) -> int | None:
    """Model chunks per pipeline stage; None: no interleaving."""
    per_stage = settings.loop.num_layers_per_virtual_pipeline_stage
    given = settings.core.get("virtual_pipeline_model_parallel_size")
    if per_stage is None:
        return given
    layers = settings.core["num_layers"] // settings.parallel("pipeline_model_parallel")
    if layers % per_stage:
        raise ValueError(
            "megatron.num_layers_per_virtual_pipeline_stage: expected a divisor of the "
            f"{layers} layers of a stage, got {per_stage}"
        )
    return layers // per_stage


def global_batch_size(settings: Settings) -> int:
    """Sequences per step.

    Raises:
        ValueError: not a multiple of micro-batch size times replicas.
    """
    loop = settings.loop
    smallest = loop.micro_batch_size * parallel_state.get_data_parallel_world_size()
    size = loop.global_batch_size or smallest
    if size % smallest:
        raise ValueError(
            "megatron.global_batch_size: expected a multiple of micro_batch_size x data-parallel "
            f"size = {smallest}, got {size}"
        )
    return size


def _fields(cls: Any, values: dict[str, Any]) -> dict[str, Any]:
    known = {field.name for field in dataclasses.fields(cls) if field.init}
    return {key: value for key, value in values.items() if key in known}


def _dtype(settings: Settings) -> torch.dtype:
    if settings.core.get("bf16"):
        return torch.bfloat16
    return torch.float16 if settings.core.get("fp16") else torch.float32


def transformer_config(settings: Settings) -> TransformerConfig:
    """Megatron's configuration of the model, from the sections `megatron` and `cce`."""
    loop, dtype = settings.loop, _dtype(settings)
    values = _fields(TransformerConfig, settings.core)
    values.update(
        params_dtype=dtype,
        pipeline_dtype=dtype,
        virtual_pipeline_model_parallel_size=virtual_stages(settings),
        add_bias_linear=not loop.disable_bias_linear,
        gated_linear_unit=loop.swiglu,
        activation_func=F.silu if loop.swiglu else F.gelu,
        cross_entropy_loss_fusion=settings.loss.loss == "stock-native-fusion",
        transformer_impl="transformer_engine" if uses_te(settings) else "local",
    )
    values.setdefault("use_cpu_initialization", not torch.cuda.is_available())
    if loop.attention_backend in AttnBackend.__members__:
        values["attention_backend"] = AttnBackend[loop.attention_backend]
    return TransformerConfig(**values)


def uses_te(settings: Settings) -> bool:
    """Whether the layers are Transformer Engine's.

    Raises:
        ValueError: asked for, but not installed.
    """
    there = torch.cuda.is_available() and find_spec("transformer_engine") is not None
    wanted = settings.loop.transformer_impl
    if wanted == "transformer_engine" and not there:
        raise ValueError(
            "megatron.transformer_impl: expected local where Transformer Engine is not installed, "
            "got transformer_engine"
        )
    return there if wanted is None else wanted == "transformer_engine"


def _layer_spec(settings: Settings, config: Any) -> Any:
    common = {
        "num_experts": config.num_moe_experts,
        "moe_grouped_gemm": config.moe_grouped_gemm,
        "qk_layernorm": config.qk_layernorm,
        "multi_latent_attention": config.multi_latent_attention,
    }
    if uses_te(settings):
        return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(**common)
    spec = gpt_layer_specs.get_gpt_layer_local_spec(normalization=config.normalization, **common)
    if settings.loop.attention_backend != "unfused" and not config.multi_latent_attention:
        return use_fused_attention(spec)
    if config.context_parallel_size > 1:
        raise ValueError(
            "megatron.context_parallel_size: expected 1 with attention_backend=unfused or "
            "multi_latent_attention where Transformer Engine is not used, got "
            f"{config.context_parallel_size}"
        )
    return spec


def _chunk(settings: Settings, config: Any, padded_vocab: int, stage: int | None) -> GPTModel:
    loop = settings.loop
    ends = {
        "pre_process": parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        "post_process": parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
    }
    spec = _layer_spec(settings, config)
    mtp: dict[str, Any] = {}
    if config.mtp_num_layers and ends["post_process"]:
        mtp["mtp_block_spec"] = gpt_layer_specs.get_gpt_mtp_block_spec(
            config, spec, use_transformer_engine=uses_te(settings), vp_stage=stage
        )
    return GPTModel(
        config,
        spec,
        vocab_size=padded_vocab,
        max_sequence_length=loop.max_position_embeddings or loop.seq_length,
        share_embeddings_and_output_weights=not loop.untie_embeddings_and_output_weights,
        position_embedding_type=loop.position_embedding_type,  # type: ignore[arg-type]
        rotary_percent=loop.rotary_percent,
        rotary_base=loop.rotary_base,
        rope_scaling=loop.use_rope_scaling,
        rope_scaling_factor=loop.rope_scaling_factor,
        vp_stage=stage,
        **ends,
        **mtp,
    )


def build_model(settings: Settings, padded_vocab: int, device: torch.device) -> list[Any]:
    """The model chunks of this rank, with the loss of section `cce`, wrapped for training."""
    config = transformer_config(settings)
    stages = virtual_stages(settings)
    chunks: list[Any] = [
        _chunk(settings, config, padded_vocab, stage)
        for stage in (range(stages) if stages else [None])
    ]
    if settings.loss.loss == "cce":
        install(chunks, cce_config(settings))
    for chunk in chunks:
        for parameter in chunk.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        chunk.to(device)
    if _dtype(settings) is not torch.float32:
        chunks = [Float16Module(config, chunk) for chunk in chunks]
    values = _fields(DistributedDataParallelConfig, settings.core)
    values.setdefault("grad_reduce_in_fp32", _dtype(settings) is not torch.float32)
    ddp_config = DistributedDataParallelConfig(**values)
    return [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]


def build_optimizer(settings: Settings, chunks: list[Any]) -> tuple[Any, Any]:
    """(optimizer, learning-rate and weight-decay schedule), the schedule in samples."""
    loop = settings.loop
    values = _fields(OptimizerConfig, settings.core)
    values.update(
        lr=loop.lr,
        min_lr=loop.min_lr,
        weight_decay=loop.weight_decay,
        params_dtype=_dtype(settings),
    )
    optimizer = get_megatron_optimizer(OptimizerConfig(**values), chunks)
    batch = global_batch_size(settings)
    wsd = loop.lr_wsd_decay_iters
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=loop.lr_warmup_init,
        max_lr=loop.lr,
        min_lr=loop.min_lr,
        lr_warmup_steps=loop.lr_warmup_iters * batch,
        lr_decay_steps=(loop.lr_decay_iters or loop.train_iters) * batch,
        lr_decay_style=loop.lr_decay_style,
        start_wd=_first(loop.start_weight_decay, loop.weight_decay),
        end_wd=_first(loop.end_weight_decay, loop.weight_decay),
        wd_incr_steps=loop.train_iters * batch,
        wd_incr_style=loop.weight_decay_incr_style,
        wsd_decay_steps=wsd * batch if wsd else None,
        lr_wsd_decay_style=loop.lr_wsd_decay_style,
    )
    _connect(chunks, optimizer)
    return optimizer, schedule


def _first(value: float | None, default: float) -> float:
    return default if value is None else value


def _connect(chunks: list[Any], optimizer: Any) -> None:
    """What Megatron's schedules call back."""
    config, ddp_config = chunks[0].config, chunks[0].ddp_config
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss

    def of_chunks(name: str) -> Any:
        found = [getattr(chunk, name) for chunk in chunks]
        return found[0] if len(found) == 1 else found

    if ddp_config.overlap_grad_reduce:
        config.no_sync_func = of_chunks("no_sync")
        if ddp_config.align_param_gather:
            config.grad_sync_func = of_chunks("start_grad_sync")
    if ddp_config.overlap_param_gather and ddp_config.align_param_gather:
        config.param_sync_func = of_chunks("start_param_sync")
