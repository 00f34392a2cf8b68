"""launch.pretrain_gpt on the CPU: what Megatron's training code asks of CUDA is answered here.

Run under torchrun with Megatron's arguments; prints what Megatron prints.
"""

from __future__ import annotations

import os
import sys
import types
from typing import Any

import torch
import torch.distributed as dist


def pretend_cuda() -> None:
    """On top of launch.cpu: there is one device, of compute capability 9.0, and it is the CPU."""
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    from launch.cpu import run_megatron_on_cpu
    from launch.torch_norm import allow_sequence_parallel_norms

    run_megatron_on_cpu()
    allow_sequence_parallel_norms()
    properties = types.SimpleNamespace(major=9, minor=0, name="CPU", total_memory=1 << 34)
    nothing = dict.fromkeys(("set_stream", "reset_max_memory_allocated", "ipc_collect"))
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: "CPU",
        "max_memory_reserved": lambda *_: 0,
        "device_memory_used": lambda *_: 0,
        "memory_stats": lambda *_: {},
        **{name: lambda *_, **__: None for name in nothing},
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    start = dist.init_process_group

    def without_device(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_id", None)
        return start(*args, **kwargs)

    dist.init_process_group = without_device
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        if hasattr(torch.optim.Optimizer, name):
            setattr(torch.optim.Optimizer, name, lambda self: None)
    torch.nn.Module.cuda = lambda self, *_: self  # type: ignore[method-assign]


def allow_context_parallel() -> None:
    """Megatron's own local attention refuses it; the one of launch.pretrain does not."""
    from megatron.core.models.backends import LocalSpecProvider

    from launch.training.attention import FusedAttention

    LocalSpecProvider.core_attention = lambda self: FusedAttention


if __name__ == "__main__":
    if os.environ.get("RANK_WITHOUT_CCE") == os.environ["RANK"]:
        sys.argv.remove("--cce")
    pretend_cuda()
    if "--context-parallel-size" in sys.argv:
        allow_context_parallel()
    from launch.pretrain_gpt import main
    from megatron_models import experts_on_cpu

    with experts_on_cpu():
        main()
