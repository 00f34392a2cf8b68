"""Context parallelism, and the schedule that overlaps the experts' communication."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from megatron_harness import (
    assert_nothing,
    differences,
    install_cce,
    model_parallel,
    one_step,
    run_ranks,
    share,
)
from megatron_models import Batch, Case, batch_of, build, experts_on_cpu, grid
from megatron_trainer import Plan, compare_plans


def _part(batch: Batch) -> Batch:
    """What this context-parallel rank holds, as the launchers cut it."""
    from launch.training.data import part_of_context

    return Batch(**part_of_context(vars(batch)))


def _context_parallel(rank: Any, cases: list[Case]) -> list[str]:
    """Fused beside stock, both over two context ranks, and both beside stock over one."""
    wrong = []
    whole = {}
    with model_parallel(tp=2):
        for case in share(cases):
            whole[case.name] = one_step(build(case), batch_of(case), case).loss
    # Half of the cases each: after this every rank has all.
    found = [{} for _ in range(rank.size)]
    torch.distributed.all_gather_object(found, whole)
    whole = {name: loss for answer in found for name, loss in answer.items()}
    with model_parallel(tp=2, cp=2):
        for case in cases:
            batch = batch_of(case)
            expected = _part(replace(batch, mask=whole[case.name])).mask
            batch = _part(batch)
            want = one_step(build(case), batch, case)
            got = one_step(install_cce(build(case)), batch, case)
            found = differences(got, want, heads=1 + case.mtp)
            error = (got.loss - expected).abs().max().item()
            if not error <= 1e-5:
                found.append(f"loss differs by {error:.2e} from that without context parallelism")
            wrong += [f"rank {rank.rank}: {case.name}: {each}" for each in found]
    return wrong


def test_context_parallel() -> None:
    """Check 31: two context ranks, with attention over both and labels rolled across them."""
    cases = grid(Case(seq=32), tied=[False, True], sequence_parallel=[False, True], mtp=[0, 2])
    assert_nothing(run_ranks(_context_parallel, cases))


def _plans(rank: Any, plans: list[Plan]) -> list[str]:
    with experts_on_cpu():
        return compare_plans(rank, plans)


EXPERTS = Case(
    sequence_parallel=True,
    config={
        "num_moe_experts": 4,
        "moe_token_dispatcher_type": "alltoall",
        "add_bias_linear": False,
    },
)


def test_schedule_plan() -> None:
    """Check 29: overlap_moe_expert_parallel_comm runs pieces of the model, not its forward."""
    plan = Plan(EXPERTS, {"tp": 2, "ep": 2}, steps=2, micro=3, overlap_experts=True)
    assert_nothing(run_ranks(_plans, [plan, replace(plan, case=replace(EXPERTS, tied=True))]))


def test_schedule_plan_in_a_virtual_pipeline() -> None:
    """Check 29: the interleaved schedule of the same, with a head of multi-token prediction."""
    case = replace(EXPERTS, layers=4, mtp=1, sequence_parallel=False)
    layout = {"tp": 1, "pp": 2, "ep": 2, "vpp": 2}
    plan = Plan(case, layout, steps=2, micro=4, overlap_experts=True)
    assert_nothing(run_ranks(_plans, [plan], poison=False))
