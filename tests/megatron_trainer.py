"""One training run of a small model through Megatron's schedules, wrappers and optimizers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_harness import forward, install_cce, model_parallel
from megatron_models import Case, batch_of, build

# Small: Adam divides by the root of the squared gradient, so that where a gradient is nearly zero
# its rounding, not its value, decides the first steps.
LEARNING_RATE = 1e-4
# After this many steps the data repeat, so that what was learnt shows in the loss.
PERIOD = 2


@dataclass(frozen=True)
class Plan:
    """How one run trains.

    Attributes:
        case, layout: the model and the parallel sizes.
        steps, micro: optimizer steps and microbatches of each.
        overlap: distributed optimizer with both overlaps.
        ddp: further fields of DistributedDataParallelConfig.
        optimizer: further fields of OptimizerConfig.
        wrap: put the model in Float16Module: "no", "before" or "after" install.
        overlap_experts: run the schedule plan that overlaps the experts' communication.
    """

    case: Case
    layout: dict[str, int] = field(default_factory=dict)
    steps: int = 10
    micro: int = 2
    overlap: bool = False
    ddp: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    wrap: str = "no"
    overlap_experts: bool = False


class Trainer:
    """Model chunks, optimizer and schedule of one rank, built as Megatron's own loop does."""

    def __init__(self, plan: Plan, fused: bool) -> None:
        from megatron.core import parallel_state as state
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.transformer.module import Float16Module

        self.plan, case = plan, plan.case
        stages = range(state.get_virtual_pipeline_model_parallel_world_size() or 1)
        vpp = len(stages) > 1
        chunks = [build(case, vp_stage=stage if vpp else None) for stage in stages]
        if fused and plan.wrap != "before":
            install_cce(chunks, case)
        if plan.wrap != "no" or case.dtype != torch.float32:
            chunks = [Float16Module(chunk.config, chunk) for chunk in chunks]
        self.raw = [getattr(chunk, "module", chunk) for chunk in chunks]
        options: dict[str, Any] = {
            "grad_reduce_in_fp32": True,
            "use_distributed_optimizer": plan.overlap,
            "overlap_grad_reduce": plan.overlap,
            "overlap_param_gather": plan.overlap,
            **plan.ddp,
        }
        self.ddp = [
            DistributedDataParallel(
                chunk.config,
                DistributedDataParallelConfig(**options),
                chunk,
                disable_bucketing=i > 0,
            )
            for i, chunk in enumerate(chunks)
        ]
        if fused and plan.wrap == "before":
            install_cce(self.ddp, case)
        config = self.raw[0].config
        # Not when it is made, which would allow it for half precision only.
        config.overlap_moe_expert_parallel_comm = plan.overlap_experts
        config.finalize_model_grads_func = finalize_model_grads
        if options["overlap_grad_reduce"]:
            config.no_sync_func = [c.no_sync for c in self.ddp] if vpp else self.ddp[0].no_sync
        if options["overlap_param_gather"]:
            sync = [c.start_param_sync for c in self.ddp]
            config.param_sync_func = sync if vpp else sync[0]
        optimizer = {
            "optimizer": "adam",
            "lr": LEARNING_RATE,
            "clip_grad": 1.0,
            "use_distributed_optimizer": options["use_distributed_optimizer"],
            "overlap_param_gather": options["overlap_param_gather"],
            "params_dtype": case.dtype,
            "bf16": case.dtype == torch.bfloat16,
            "fp16": case.dtype == torch.float16,
            **plan.optimizer,
        }
        self.optimizer = get_megatron_optimizer(OptimizerConfig(**optimizer), self.ddp)
        config.grad_scale_func = self.optimizer.scale_loss
        for chunk in self.raw[1:]:
            for name in ("finalize_model_grads_func", "no_sync_func", "param_sync_func"):
                setattr(chunk.config, name, getattr(config, name))
            chunk.config.grad_scale_func = config.grad_scale_func

    def step(self, number: int) -> dict[str, Any]:
        """One optimizer step; the loss is None where this rank has no head."""
        from megatron.core import parallel_state as state
        from megatron.core.pipeline_parallel import get_forward_backward_func

        plan = self.plan
        for chunk in self.ddp:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        replica = state.get_data_parallel_rank()
        first = 100 * (number % PERIOD) + 10 * replica
        seeds = range(first, first + plan.micro)
        batches = [[batch_of(plan.case, seed) for seed in seeds] for _ in self.ddp]
        reports = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=[iter(b) for b in batches] if len(batches) > 1 else iter(batches[0]),
            model=self.ddp if len(self.ddp) > 1 else self.ddp[0],
            num_microbatches=plan.micro,
            seq_length=plan.case.seq,
            micro_batch_size=plan.case.batch,
            forward_only=False,
        )
        updated, norm, _ = self.optimizer.step()
        losses = [float(report["loss"]) for report in reports]
        return {
            "loss": sum(losses) / len(losses) if losses else None,
            "norm": None if norm is None else float(norm),
            "updated": updated,
        }

    def _forward_step(self, batches: Any, model: Any, return_schedule_plan: bool = False) -> Any:
        batch = next(batches)
        case = self.plan.case
        if return_schedule_plan != self.plan.overlap_experts:
            raise AssertionError(f"another schedule than planned: {return_schedule_plan}")

        def loss_func(loss: torch.Tensor) -> Any:
            total = (loss.float() * batch.mask).sum()
            tokens = batch.mask.sum().int()
            return total, tokens, {"loss": (total / tokens).detach()}

        run = model.build_schedule_plan if return_schedule_plan else model
        return forward(run, batch, case), loss_func


def train(plan: Plan, fused: bool) -> dict[str, Any]:
    from megatron_integration import fused_count, materialized_count

    trainer = Trainer(plan, fused)
    steps = [trainer.step(number) for number in range(plan.steps)]
    return {
        "steps": steps,
        "trainer": trainer,
        "fused": sum(fused_count(chunk) for chunk in trainer.ddp),
        "materialized": sum(materialized_count(chunk) for chunk in trainer.ddp),
    }


def compare_plans(rank: Any, plans: list[Plan]) -> list[str]:
    """Fused beside stock: the losses of all steps equal to 1e-5; the differences of this rank."""
    wrong = []
    with model_parallel(**plans[0].layout):
        for plan in plans:
            want, got = train(plan, fused=False), train(plan, fused=True)
            found = _step_differences(got["steps"], want["steps"])
            heads = (1 + plan.case.mtp) * plan.micro * plan.steps
            owns_head = want["steps"][0]["loss"] is not None
            if got["materialized"] or got["fused"] != heads * owns_head:
                found.append(f"{got['fused']} fused, {got['materialized']} materialized")
            found += _tied_copies(got["trainer"], plan)
            wrong += [f"rank {rank.rank}: {plan}: {each}" for each in found]
    return wrong


def _step_differences(got: list[dict], want: list[dict]) -> list[str]:
    wrong = []
    for number, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        if ours["updated"] != theirs["updated"]:
            wrong.append(f"step {number}: updated {ours['updated']}, stock {theirs['updated']}")
        for key, tolerance in (("loss", 1e-5), ("norm", 1e-4)):
            mine, stock = ours[key], theirs[key]
            if (mine is None) != (stock is None):
                wrong.append(f"step {number}: {key} {mine}, stock {stock}")
            elif mine is not None and not abs(mine - stock) <= tolerance:
                wrong.append(f"step {number}: {key} {mine:.7f}, stock {stock:.7f}")
    if want[0]["loss"] is None or len(want) <= PERIOD:
        return wrong
    if not want[-1]["loss"] < want[(len(want) - 1) % PERIOD]["loss"] - 1e-3:
        wrong.append("stock does not train: this test shows nothing")
    return wrong


def _tied_copies(trainer: Trainer, plan: Plan) -> list[str]:
    """Check 4: first and last stage hold the same bits of a tied embedding."""
    from megatron.core import parallel_state as state

    if not plan.case.tied or plan.layout.get("pp", 1) == 1:
        return []
    ends = [trainer.raw[0], trainer.raw[-1]]
    owner = ends[0] if state.is_pipeline_first_stage(ignore_virtual=True) else ends[1]
    weight = owner.shared_embedding_or_output_weight().detach()
    summed = weight.clone()
    torch.distributed.all_reduce(summed, group=state.get_embedding_group())
    return [] if torch.equal(summed, 2 * weight) else ["the tied copies differ"]
