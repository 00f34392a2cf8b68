"""The pretraining loop: data in, Megatron's schedules, optimizer step, what is logged."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from launch import topology
from launch.interleaving import Interleaving
from launch.training import checkpoint, data, model
from launch.training.report import Clock, Report, peak_mib
from launch.training.settings import Settings
from megatron_integration import far_field_metrics, fused_count, materialized_count
from megatron_integration.far_field import METRICS

# So many steps in a row whose loss or gradient is not finite are no accident.
_MOST_SKIPPED = 10


class Trainer:
    """A run from its settings to its summary; one object per rank.

    Call `run` once, after `model.start_distributed` and `model.start_model_parallel`.
    """

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings, self.loop, self.device = settings, settings.loop, device
        self.batch = model.global_batch_size(settings)
        self.rank = dist.get_rank()
        self.replica = parallel_state.get_data_parallel_rank()
        self.replicas = parallel_state.get_data_parallel_world_size()
        self.microbatches = self.batch // (self.loop.micro_batch_size * self.replicas)
        origin = data.source(self.loop, self.rank)
        self.padded_vocab = origin.vocabulary.padded(
            self.loop.make_vocab_size_divisible_by, settings.parallel("tensor_model_parallel")
        )
        self.vocabulary = f"{origin.vocabulary.origin}; padded to {self.padded_vocab}"
        self.ids: Interleaving | None = None
        self.train_data, self.valid_data = data.datasets(self.loop, origin, self.batch)
        if settings.loss.interleave_ids and settings.parallel("tensor_model_parallel") > 1:
            self._interleave(settings.parallel("tensor_model_parallel"))
        self.chunks = model.build_model(settings, self.padded_vocab, device)
        self.optimizer, self.schedule = model.build_optimizer(settings, self.chunks)
        self.start, self.samples = self._resume()
        self.iteration = self.start
        self._skipped = 0
        self._bad_ranks: list[int] = []

    def _interleave(self, ranks: int) -> None:
        """From here on rows of embedding and output layer, tokens and labels go by places."""
        self.ids = Interleaving(self.padded_vocab, ranks)
        self.vocabulary += f"; ids interleaved over {ranks} ranks"
        self.train_data = data.Interleaved(self.train_data, self.ids)
        self.valid_data = data.Interleaved(self.valid_data, self.ids)

    def _resume(self) -> tuple[int, int]:
        """(iteration, samples) of the checkpoint that was loaded, or zeros."""
        own, given, job = self.loop.save, self.loop.load, topology.resolve().job
        mine = (self.chunks, self.optimizer, self.schedule)
        if own is not None and checkpoint.owned_by(own, job):
            found = checkpoint.load(own, *mine, ids=self.ids)
            if found[0]:
                return found
        found = (0, 0)
        if given:
            found = checkpoint.load(
                given,
                *mine,
                with_optimizer=not self.loop.no_load_optim,
                with_generators=not self.loop.no_load_rng,
                ids=self.ids,
            )
        if own is not None:
            aside = checkpoint.claim(own, job, keep=bool(given) and _same_folder(own, str(given)))
            if aside is not None and self.rank == 0:
                print(f"launch.pretrain: the checkpoints of an earlier run are in {aside} now")
        return found

    def run(self) -> dict[str, Any]:
        """Train to the last iteration; returns the summary on rank 0, {} elsewhere.

        After SIGTERM on any rank: a checkpoint at the end of the step, if `save` is set, and an
        orderly return with `stopped` in the summary.

        Raises:
            RuntimeError: a loss or gradient that is not finite, or a collective that another rank
                has left, with the iteration and the rank.
        """
        report = Report(self.rank == 0, self.settings, self.start)
        self._announce(report)
        with Signals() as signals:
            try:
                return self._run(report, signals)
            except RuntimeError as error:
                if not _of_a_collective(error):
                    raise
                raise RuntimeError(
                    f"iteration {self.iteration}: rank {self.rank} has lost another rank in a "
                    f"collective; the rank that failed first names the cause: {error}"
                ) from error

    def _run(self, report: Report, signals: Signals) -> dict[str, Any]:
        begin, clock, stopping = time.perf_counter(), Clock(), False
        batches = self._batches(self.train_data, self.samples, self.loop.train_iters * self.batch)
        losses: list[Tensor] = []
        for iteration in range(self.start + 1, self.loop.train_iters + 1):
            self.iteration = iteration
            loss, norm, stopping = self._step(batches, signals)
            self.samples += self.batch
            if loss is None:
                report.skipped(iteration, self._bad_ranks)
            else:
                losses.append(loss)
            last = iteration == self.loop.train_iters or _due(self.loop.exit_interval, iteration)
            last = last or stopping
            if not losses:
                pass
            elif last or iteration % self.loop.log_interval == 0 or iteration == self.start + 1:
                self._log(report, iteration, losses, norm, clock)
            clock.pause()
            if self.loop.eval_interval and (last or _due(self.loop.eval_interval, iteration)):
                report.validation(iteration, self._validate())
            if self.loop.save and (last or _due(self.loop.save_interval, iteration)):
                self._save(iteration)
            clock.resume()
            if last:
                break
        facts = self._facts(time.perf_counter() - begin)
        if stopping:
            facts["stopped"] = f"by SIGTERM after iteration {self.iteration}"
        return report.close(facts)

    def _announce(self, report: Report) -> None:
        own = sum(p.numel() for chunk in self.chunks for p in chunk.parameters())
        report.note(f"vocabulary: {self.vocabulary}")
        report.note(
            f"{dist.get_world_size()} ranks on {self.device.type}, megatron-core "
            f"{version('megatron-core')}, torch {torch.__version__}: {own / 1e6:.1f} million "
            f"parameters on rank 0, {self.microbatches} x {self.loop.micro_batch_size} x "
            f"{self.replicas} sequences of {self.loop.seq_length} tokens a step, "
            f"loss {self.settings.loss.loss}, from iteration {self.start}"
        )
        report.note(f"topology: {topology.resolve()}")
        report.note(f"placement: {model.placement()}")

    def _batches(self, dataset: Any, first: int, count: int) -> list[Any]:
        """One iterator per chunk; None on stages that read neither tokens nor labels."""
        found = []
        for stage in range(len(self.chunks)):
            vp_stage = stage if len(self.chunks) > 1 else None
            ends = (
                parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
                parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            )
            needed = any(ends)
            args = (dataset, self.loop, first, count, self.replica, self.replicas)
            found.append(data.batches(*args) if needed else None)
        return found

    def _forward(
        self, batches: Iterator[Any] | None, chunk: Any, return_schedule_plan: bool = False
    ) -> tuple[Any, Any]:
        """Losses per token, or with overlap_moe_expert_parallel_comm the plan that makes them."""
        run = chunk.build_schedule_plan if return_schedule_plan else chunk
        if batches is None:
            return run(None, None, None), partial(_loss, None)
        batch = data.part_of_context(data.to_device(next(batches), self.device))
        more = {"loss_mask": batch["loss_mask"]} if chunk.config.mtp_num_layers else {}
        output = run(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], **more)
        return output, partial(_loss, batch["loss_mask"])

    def _pass(self, batches: list[Any], microbatches: int, *, forward_only: bool) -> Tensor:
        """All micro-batches of one step; (2,) fp32 sum of losses and number of tokens.

        Zeros where the pipeline stage has no loss; equal on tensor-parallel ranks.
        """
        results = get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=batches if len(batches) > 1 else batches[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=microbatches,
            seq_length=self.loop.seq_length,
            micro_batch_size=self.loop.micro_batch_size,
            forward_only=forward_only,
        )
        total = torch.zeros(2, device=self.device)
        if results:
            total += torch.stack([result["loss"] for result in results]).sum(0)
        return total

    def _counted(self, total: Tensor) -> Tensor:
        """Tensor-parallel ranks hold the same loss: one of them counts."""
        first = parallel_state.get_tensor_model_parallel_rank() == 0
        return total if first else torch.zeros_like(total)

    def _step(self, batches: list[Any], signals: Signals) -> tuple[Tensor | None, Any, bool]:
        """(sum of losses and number of tokens of this rank, gradient norm, whether to stop).

        The first is None, and no parameter has changed, where the step was skipped.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss = self._pass(batches, self.microbatches, forward_only=False)
        usable, stopping = self._usable(loss, signals)
        norm = None
        if usable:
            _, norm, _ = self.optimizer.step()
        self.schedule.step(increment=self.batch)
        return self._counted(loss) if usable else None, norm, stopping

    def _usable(self, loss: Tensor, signals: Signals) -> tuple[bool, bool]:
        """(whether loss and gradients are finite on all ranks, whether a rank got SIGTERM).

        One small all-reduce per step, before the update, so that no parameter and no checkpoint
        takes in what is not finite, and all ranks leave after the same step.
        """
        bad_loss = ~torch.isfinite(loss).all()
        bad_grad = torch.zeros_like(bad_loss)
        if not self.settings.core.get("fp16"):  # there the loss scale's own business
            for extremes in map(torch.aminmax, self._gradients()):
                bad_grad |= ~(extremes.min.isfinite() & extremes.max.isfinite())
        flags = torch.stack([bad_loss, bad_grad, torch.full_like(bad_loss, signals.terminate)])
        found = flags.to(torch.int32)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        any_loss, any_grad, stopping = found.tolist()
        if not (any_loss or any_grad):
            self._skipped = 0
            return True, bool(stopping)
        table = self._gather(torch.cat([loss, flags[:2].to(loss.dtype)]))
        # A bad loss says more on where it came from: gradients are summed over ranks.
        self._bad_ranks = table[:, 2 if any_loss else 3].nonzero().flatten().tolist()
        rank = self._bad_ranks[0]
        what = "loss" if any_loss else "gradient"
        value = table[rank, 0].item() if any_loss else "NaN or infinity"
        text = f"got {value} at iteration {self.iteration} on rank {rank}"
        self._skipped += 1
        if self.loop.nonfinite_loss == "stop" or self._skipped >= _MOST_SKIPPED:
            more = "" if self._skipped == 1 else f", {self._skipped} iterations in a row"
            raise RuntimeError(f"{what}: expected a finite number, {text}{more}")
        return False, bool(stopping)

    def _gradients(self) -> Iterator[Tensor]:
        """Buffers with the gradients of this rank's parameters."""
        for chunk in self.chunks:
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                if buffer.grad_data.numel():
                    yield buffer.grad_data

    def _gather(self, losses: Tensor) -> Tensor:
        """(n, ...) of this rank -> (ranks, n, ...); an all-reduce, which every backend has."""
        table = losses.new_zeros(dist.get_world_size(), *losses.shape)
        table[self.rank] = losses
        dist.all_reduce(table)
        return table.cpu()

    def _log(
        self, report: Report, iteration: int, losses: list[Tensor], norm: Any, clock: Clock
    ) -> None:
        sums = self._gather(torch.stack(losses)).double().sum(0)
        tokens = len(losses) * self.batch * self.loop.seq_length
        values = {
            "loss": (sums[-1, 0] / sums[-1, 1].clamp(min=1)).item(),
            "lr": float(self.optimizer.param_groups[0]["lr"]),
            "grad_norm": math.nan if norm is None else float(norm),
            "tokens_per_s": tokens / clock.lap(),
            "peak_mib": round(peak_mib(), 1),
            **self._far_field(),
        }
        losses.clear()
        report.train(iteration, values)

    def _far_field(self) -> dict[str, float]:
        """Mean of the far field's metrics over all ranks that have an output layer."""
        if self.settings.loss.grad_filter != "far-field" or self.settings.loss.loss != "cce":
            return {}
        own = far_field_metrics(self.chunks)
        # The ranks without an output layer do not know the names.
        sums = torch.zeros(1 + len(METRICS), device=self.device)
        if own:
            sums = torch.stack([sums.new_ones(()), *(own[key] for key in METRICS)])
        dist.all_reduce(sums)
        count, *values = sums.tolist()
        return {key: value / max(count, 1) for key, value in zip(METRICS, values, strict=True)}

    def _validate(self) -> float:
        """Mean over the same eval_iters batches of the validation data every time."""
        with self._synchronised_parameters():
            for chunk in self.chunks:
                chunk.eval()
            count = self.loop.eval_iters
            batches = self._batches(self.valid_data, 0, count * self.batch)
            with torch.no_grad():
                total = self._pass(batches, self.microbatches * count, forward_only=True)
            for chunk in self.chunks:
                chunk.train()
        sums = self._gather(self._counted(total)).double().sum(0)
        return (sums[0] / sums[1].clamp(min=1)).item()

    def _save(self, iteration: int) -> None:
        assert self.loop.save is not None
        with self._synchronised_parameters():
            checkpoint.save(
                self.loop.save,
                iteration,
                self.chunks,
                self.optimizer,
                self.schedule,
                self.samples,
                ids=self.ids,
            )

    def _synchronised_parameters(self) -> Any:
        return _Synchronised([c for c in self.chunks if c.ddp_config.overlap_param_gather])

    def _facts(self, seconds: float) -> dict[str, Any]:
        facts = {
            "loss": self.settings.loss.loss,
            "vocabulary": self.vocabulary,
            "seconds": round(seconds, 1),
            "run_dir": self.settings.run_dir,
        }
        if self.settings.loss.loss == "cce":
            counts = torch.tensor(
                [fused_count(self.chunks), materialized_count(self.chunks)], device=self.device
            )
            dist.all_reduce(counts, dist.ReduceOp.MAX)
            facts["fused_losses"], facts["logits_made"] = counts.tolist()
        if self.loop.tensorboard_dir:
            facts["tensorboard"] = self.loop.tensorboard_dir
        if self.loop.save:
            facts["checkpoints"] = self.loop.save
        return facts


class _Synchronised:
    """With overlap_param_gather parameters are whole only inside a forward pass, or here."""

    def __init__(self, chunks: list[Any]) -> None:
        self._chunks = chunks

    def __enter__(self) -> None:
        for chunk in self._chunks:
            chunk.disable_forward_pre_hook()

    def __exit__(self, *_: object) -> None:
        for chunk in self._chunks:
            chunk.enable_forward_pre_hook()


class Signals:
    """Notes SIGTERM instead of ending the process, inside a `with`.

    Under a scheduler it comes twice: to every process, and again from torchrun. Who cannot wait
    sends SIGKILL, as torchrun does after 30 seconds.

    Attributes:
        terminate: whether this process has got it.
    """

    def __init__(self) -> None:
        self.terminate = False
        self._before: Any = None

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: Any) -> None:
        del number, frame
        self.terminate = True


def _of_a_collective(error: RuntimeError) -> bool:
    """Whether it comes of torch.distributed, where the cause is on another rank."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def _same_folder(one: str, other: str) -> bool:
    return Path(one).resolve() == Path(other).resolve()


def _due(interval: int | None, iteration: int) -> bool:
    return bool(interval) and iteration % interval == 0  # type: ignore[operator]


def _loss(mask: Tensor | None, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(b, s) fp32 losses -> sum, number of tokens, and both for the log, all on the device."""
    assert mask is not None
    total = (output.float() * mask).sum()
    tokens = mask.sum()
    logged = torch.stack([total.detach(), tokens])
    return total, tokens.to(torch.int), {"loss": logged}
