"""Pretrain a GPT with megatron.core: one machine or many, CPU or GPUs, stock loss or fused.

bash launch/torchrun.sh --config configs/tiny_cpu.yaml            (or mpirun.sh, slurm.sbatch)
torchrun --nproc-per-node 2 -m launch.pretrain --config configs/tiny_cpu.yaml
torchrun --nproc-per-node 8 --nnodes 2 ... -m launch.pretrain --config configs/llama3_8b_tp8.yaml \
    megatron.lr=1e-4 cce.loss=stock

The sections of the file are `env` (environment variables, set before PyTorch is loaded),
`megatron` (Megatron's own argument names, written with underscores), `cce` (`loss`: stock,
stock-native-fusion or cce; `grad_filter`, `far_field_budget`, `workspace_mb`, `keep_logits_mb`,
`keep_logits_in_grad`, `strict`, `capture`, `capture_after`, `interleave_ids`) and `run_dir`. The
command line beats the file; an unknown key is an error. To resume, give `megatron.load`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from launch.training import settings

# Exit status of rank 0 after SIGTERM, as a shell reports it.
_TERMINATED = 143


def parse(arguments: Sequence[str] | None = None) -> tuple[str, list[str]]:
    """(config file, overrides) from the command line."""
    parser = argparse.ArgumentParser(
        prog="launch.pretrain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file of the run")
    parser.add_argument("--cce", action="store_true", help="the same as cce.loss=cce")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", default=[])
    found = parser.parse_args(arguments)
    return found.config, [*found.overrides, *(["cce.loss=cce"] if found.cce else [])]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    try:
        found = settings.read(*parse(arguments))
        settings.apply_environment(found)
        prepare()
        run = settings.check(found)
    except ValueError as error:
        print(f"launch.pretrain: {error}", file=sys.stderr)
        return 2
    try:
        summary = train(run)
    except ValueError as error:  # settings that do not fit this machine, model or checkpoint
        print(f"launch.pretrain: {error}", file=sys.stderr, flush=True)
        return 2
    return _TERMINATED if "stopped" in summary else 0


def prepare() -> None:
    """What must precede the first import of megatron.core."""
    import logging
    import warnings

    # Megatron warns at import of every library that it would rather have.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    from launch.cpu import run_megatron_on_cpu

    run_megatron_on_cpu()
    from launch.torch_norm import allow_sequence_parallel_norms  # imports megatron.core

    allow_sequence_parallel_norms()


def train(run: settings.Settings, *, keep_group: bool = False) -> dict[str, Any]:
    """Train with checked settings under a launcher; returns the summary on rank 0.

    Args:
        run: the settings.
        keep_group: leave torch's process group up, for another call.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state

    from launch.training import model
    from launch.training.loop import Trainer

    device = model.start_distributed(run)
    model.start_model_parallel(run)
    # After an error the other ranks may be in a collective: no orderly end then.
    summary = Trainer(run, device).run()
    parallel_state.destroy_model_parallel()
    if not keep_group:
        dist.destroy_process_group()
    return summary


if __name__ == "__main__":
    sys.exit(main())
