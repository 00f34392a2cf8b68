"""Options of the pretraining loop, under Megatron's own argument names, and their defaults.

`LoopOptions` holds what the loop itself reads. Whatever else stands in the section `megatron` goes
to the dataclasses of the installed megatron.core that have a field of that name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class LoopOptions:
    """Section `megatron`, as far as the loop reads it itself; None: see launch/training.

    Attributes:
        seq_length, max_position_embeddings: tokens; the second defaults to the first.
        micro_batch_size, global_batch_size: sequences.
        train_iters, exit_interval: last iteration; stop after one divisible by exit_interval.
        lr_warmup_init, lr_warmup_iters, lr_decay_iters, lr_wsd_decay_iters: the schedule, in
            iterations; decay ends with train_iters unless told otherwise.
        start_weight_decay, end_weight_decay, weight_decay_incr_style: weight decay over time.
        vocab_size: entries before padding; without data_path that of the tokenizer to be trained.
        make_vocab_size_divisible_by: padding, times the tensor-parallel size.
        data_path, train_data_path, valid_data_path: prefixes of indexed datasets, a string or a
            list; with none of them the text of the Python installation is used.
        split: shares of training, validation and test data of data_path.
        mock_data: made-up tokens.
        data_cache_path: where tokenizer, text and dataset indexes are kept.
        tokenizer_model: JSON file of the tokenizers library, for data_path.
        save, load: checkpoint folders; load falls back on a fresh start where there is none. A
            job that its launcher starts again after a failure loads from `save`.
        nonfinite_loss: what to do about a loss or a gradient that is NaN or infinite. stop: an
            error with iteration and rank, at the latest at the next log or save, before anything
            is saved. skip: every step is checked before its update, a bad one is reported and
            leaves the parameters as they were; ten in a row are an error. (Not an option of
            Megatron's own.)
        distributed_backend: nccl or gloo; default: nccl where there are CUDA devices.
        attention_backend: unfused is Megatron's own; anything else PyTorch's fused attention
            unless Transformer Engine is used.
        transformer_impl: local or transformer_engine; default: the latter where installed.
    """

    seq_length: int = 1024
    max_position_embeddings: int | None = None
    micro_batch_size: int = 1
    global_batch_size: int | None = None
    train_iters: int = 100
    exit_interval: int | None = None
    lr: float = 3e-4
    min_lr: float = 0.0
    lr_decay_style: str = "cosine"
    lr_warmup_init: float = 0.0
    lr_warmup_iters: int = 0
    lr_decay_iters: int | None = None
    lr_wsd_decay_iters: int | None = None
    lr_wsd_decay_style: str = "exponential"
    weight_decay: float = 0.01
    start_weight_decay: float | None = None
    end_weight_decay: float | None = None
    weight_decay_incr_style: str = "constant"
    seed: int = 1234
    vocab_size: int = 16384
    make_vocab_size_divisible_by: int = 128
    untie_embeddings_and_output_weights: bool = False
    position_embedding_type: str = "rope"
    rotary_percent: float = 1.0
    rotary_base: int = 10000
    use_rope_scaling: bool = False
    rope_scaling_factor: float = 8.0
    swiglu: bool = False
    disable_bias_linear: bool = False
    num_layers_per_virtual_pipeline_stage: int | None = None
    data_path: Any = None
    train_data_path: Any = None
    valid_data_path: Any = None
    split: str = "969,30,1"
    mock_data: bool = False
    data_cache_path: str = "runs/data"
    tokenizer_model: str | None = None
    num_workers: int = 0
    eod_mask_loss: bool = False
    eval_interval: int | None = None
    eval_iters: int = 10
    log_interval: int = 1
    tensorboard_dir: str | None = None
    save: str | None = None
    save_interval: int | None = None
    load: str | None = None
    no_load_optim: bool = False
    no_load_rng: bool = False
    nonfinite_loss: str = "stop"
    distributed_backend: str | None = None
    distributed_timeout_minutes: int = 30
    attention_backend: str = "auto"
    transformer_impl: str | None = None


@dataclass
class LossOptions:
    """Section `cce`: stock, stock-native-fusion or cce, and the options of the last.

    Attributes:
        loss: stock, stock-native-fusion or cce.
        grad_filter, far_field_budget, workspace_mb, keep_logits_mb, keep_logits_in_grad, strict,
        capture, capture_after: as the flags `--cce-...`.
        interleave_ids: give rank r of W = tensor_model_parallel_size the ids r, r + W, ..., with
            any of the losses. Tokens and labels of each batch are renumbered, so that the rows of
            embedding and output layer stand for other ids; a checkpoint says so.
    """

    loss: str = "cce"
    grad_filter: str = "exact"
    far_field_budget: float | None = None
    workspace_mb: float | None = None
    keep_logits_mb: float = 0.0
    keep_logits_in_grad: bool = False
    strict: bool = False
    capture: str | None = None
    capture_after: int = 0
    interleave_ids: bool = False


LOSSES = ("stock", "stock-native-fusion", "cce")
# Set by the loop, from the options above or because they are functions; never by name.
RESERVED = {
    "cross_entropy_loss_fusion": "cce.loss=stock-native-fusion",
    "add_bias_linear": "disable_bias_linear",
    "gated_linear_unit": "swiglu",
    "params_dtype": "bf16 or fp16",
    "pipeline_dtype": "bf16 or fp16",
    "autocast_dtype": "bf16 or fp16",
}
POSITIVE = (
    *("seq_length", "micro_batch_size", "train_iters", "vocab_size", "log_interval", "eval_iters"),
    *("make_vocab_size_divisible_by", "tensor_model_parallel_size", "num_layers", "hidden_size"),
    *("pipeline_model_parallel_size", "context_parallel_size", "num_attention_heads"),
    *("expert_model_parallel_size", "expert_tensor_parallel_size"),
    *("global_batch_size", "exit_interval", "eval_interval", "save_interval"),
)
