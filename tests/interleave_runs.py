"""Training runs with natural and interleaved ids under one torchrun, on the CPU.

`python interleave_runs.py FOLDER` runs the series on two ranks.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from fault_runs import UNSAVED, Series

BEGUN, HALF, END = 2, 6, 8
# 68 padding rows; a loss mask that is made of natural ids.
SMALL = (
    *("megatron.vocab_size=700", "megatron.eod_mask_loss=true", f"megatron.train_iters={END}"),
    *("megatron.eval_interval=2", "megatron.eval_iters=1"),
)
VARIANTS = {
    "tied": (),
    "apart": (
        *("megatron.untie_embeddings_and_output_weights=true", "megatron.mtp_num_layers=1"),
        *("megatron.use_distributed_optimizer=true", "cce.grad_filter=far-field"),
    ),
}
INTERLEAVED = "cce.interleave_ids=true"


def values(run_dir: str | os.PathLike[str]) -> list[tuple[int, float]]:
    """(iteration, training or validation loss)."""
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    keys = ("loss", "validation_loss")
    found = map(json.loads, lines)
    return [(each["iteration"], each[key]) for each in found for key in keys if key in each]


class InterleaveSeries(Series):
    def steps(self) -> None:
        """Natural throughout; and from iteration 2 to 6 interleaved, by way of the converter."""
        for name, options in VARIANTS.items():
            common = (*SMALL, *options)
            self.train(f"{name}, natural", *common, *UNSAVED)
            self.train(f"{name}, begun", *common, f"megatron.exit_interval={BEGUN}")
            self.convert(f"{name}, begun", f"{name}, converted")
            half = (*common, INTERLEAVED, f"megatron.exit_interval={HALF}")
            self.train(f"{name}, interleaved", *half, load=f"{name}, converted")
            self.convert(f"{name}, interleaved", f"{name}, restored", undo=True)
            self.train(f"{name}, natural again", *common, *UNSAVED, load=f"{name}, restored")
        self.convert("tied, converted", "tied, back", undo=True)
        self._refused()

    def convert(self, source: str, out: str, *, undo: bool = False) -> None:
        import torch.distributed as dist

        from launch.interleave_ids import convert

        if self.rank == 0:
            folders = (self.folder / name / "checkpoints" for name in (source, out))
            self.answers[f"converted {out}"] = convert(*folders, 2, undo=undo)
        dist.barrier()

    def _refused(self) -> None:
        self.train("refused natural", *SMALL, load="tied, converted")
        self.train("refused interleaved", *SMALL, INTERLEAVED, load="tied, begun")
        one = ("megatron.tensor_model_parallel_size=1", "megatron.sequence_parallel=false")
        self.train("refused size", *SMALL, INTERLEAVED, *one, load="tied, converted")
        larger = ("megatron.vocab_size=800",)
        self.train("refused padding", *SMALL, INTERLEAVED, *larger, load="tied, converted")


if __name__ == "__main__":
    InterleaveSeries(Path(sys.argv[1])).run()
