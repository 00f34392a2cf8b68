"""What can be measured: shapes by name, the options of a case, the implementations by name.

No torch here: the commands that only read results need none.

Legend: N tokens, D hidden size, V vocabulary rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

DEFAULT_TOKENS = 8192
DTYPES = ("bf16", "fp16", "fp32")
INPUTS = ("random", "peaked")
# How the ids lie on ranks that one process plays: in blocks, or every W-th on a rank.
IDS = ("natural", "interleaved")

# Name -> (D, V) of a model's output layer.
MODELS = {
    "gemma2-2b": (2304, 256000),
    "llama3-8b": (4096, 128256),
    "qwen3-8b": (4096, 151936),
    # One rank's rows of a 70B model under tensor parallelism over 8.
    "llama3-70b-tp8": (8192, 16032),
}

# Name -> what it is, in the order of the tables.
IMPLEMENTATIONS = {
    "cce-tp-exact": "this library, GradFilter.exact()",
    "cce-tp-paper": "this library, GradFilter.paper()",
    "cce-tp-far-field": "this library, GradFilter.far_field()",
    "torch-eager": "PyTorch: F.cross_entropy on logits in the inputs' dtype",
    "torch-eager-fp32": "PyTorch: F.cross_entropy on the logits cast to fp32",
    "torch-compiled": "torch.compile of torch-eager-fp32",
    "torch-linear-ce": "PyTorch 2.13 or newer: F.linear_cross_entropy, in chunks of tokens",
    "megatron-unfused": "Megatron-core: output layer's product, vocab_parallel_cross_entropy",
    "megatron-native": "Megatron-core: the same with fused_vocab_parallel_cross_entropy",
    "apple-cce": "cut-cross-entropy with its default filter",
    "apple-cce-exact": "cut-cross-entropy with filter_eps=None",
    "liger": "liger-kernel: LigerFusedLinearCrossEntropyLoss",
    "liger-logits": "Megatron-core's product, liger-kernel's LigerVocabParallelCrossEntropy",
    "liger-tp": "liger-kernel: liger_fused_linear_scaled_cross_entropy_tp",
    "te": "PyTorch product, Transformer Engine's parallel_cross_entropy",
}


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one problem, the vocabulary being the global one."""

    tokens: int
    hidden: int
    vocab: int

    def __str__(self) -> str:
        return f"{self.tokens} x {self.hidden} x {self.vocab}"

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read "N,D,V".

        Raises:
            ValueError: not three positive integers.
        """
        parts = text.split(",")
        if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) for part in parts):
            raise ValueError(
                f"--shape: expected N,D,V, three positive integers such as 8192,2304,256000, "
                f"got {text!r}"
            )
        return cls(*map(int, parts))

    @classmethod
    def of_model(cls, name: str, tokens: int = DEFAULT_TOKENS) -> Shape:
        """The output layer of a model in `MODELS`.

        Raises:
            ValueError: no such name.
        """
        if name not in MODELS:
            raise ValueError(f"--model: expected one of {', '.join(MODELS)}, got {name!r}")
        return cls(tokens, *MODELS[name])


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is asked of the loss; the names are those of the command line.

    Attributes:
        bias: add a bias to the logits.
        softcap: cap of the logits, or None.
        z_loss, label_smoothing: coefficients; 0: off.
        statistics: ask for the statistics of the logits beside the loss.
        grad_weight_out: add dC in fp32 to a given tensor in place of returning it.
        workspace_mib: cap on temporaries in MiB; None: the library's default.
        keep_logits_mib: this library's exact filter keeps so many MiB of logits for the backward
            pass.
        keep_logits_in_grad: it keeps as many as fit the memory of dC; the far field those of the
            first rows of its order; None: the library's default.
        forward_only: no backward pass.

    Raises:
        ValueError: a value outside its range.
    """

    bias: bool = False
    softcap: float | None = None
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    statistics: bool = False
    grad_weight_out: bool = False
    workspace_mib: float | None = None
    keep_logits_mib: float = 0.0
    keep_logits_in_grad: bool | None = None
    forward_only: bool = False

    def __post_init__(self) -> None:
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"--softcap: expected a number > 0, got {self.softcap}")
        if not 0 <= self.z_loss < math.inf:
            raise ValueError(f"--z-loss: expected a number >= 0, got {self.z_loss}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"--label-smoothing: expected a number in [0, 1), got {self.label_smoothing}"
            )
        if self.workspace_mib is not None and not 1 <= self.workspace_mib < math.inf:
            raise ValueError(
                f"--workspace-mib: expected a number of at least 1, got {self.workspace_mib}"
            )

        if not 0 <= self.keep_logits_mib < math.inf:
            raise ValueError(
                f"--keep-logits-mib: expected a number >= 0, got {self.keep_logits_mib}"
            )
        if self.keep_logits_in_grad and (self.keep_logits_mib > 0 or self.grad_weight_out):
            raise ValueError(
                "--keep-logits-in-grad: expected not to be set together with --keep-logits-mib or "
                "--grad-weight-out, got both"
            )

    def asked(self) -> tuple[str, ...]:
        """Names of the options an implementation must have; a cap binds only who has temporaries
        to cap, and a backward pass can be left out by anybody."""
        free = ("forward_only", "workspace_mib", "keep_logits_mib", "keep_logits_in_grad")
        names = [name for name in self.__slots__ if name not in free]
        return tuple(name for name in names if getattr(self, name) not in (None, False, 0.0))

    def changed(self) -> dict[str, bool | float]:
        """The options that are not at their defaults."""
        plain = Options()
        values = {name: getattr(self, name) for name in self.__slots__}
        return {name: value for name, value in values.items() if value != getattr(plain, name)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One line of a plan: a problem and how it is measured.

    Attributes:
        shape: sizes; V is the whole vocabulary, also where only a shard of it is measured.
        suite: name of the suite it belongs to, or "".
        name: of the model, or "".
        dtype: one of DTYPES.
        tf32: take fp32 products in TF32.
        inputs: one of INPUTS, or "snapshot".
        options: of the loss.
        shard: (rank, ranks): measure this rank's rows alone, without a group; or None.
        played: one of IDS: the shard belongs to a group that this process plays, and the softmax
            is the group's; None: a shard is a problem of its own.
        ranks: how many hold the vocabulary between them; None: all that there are.
        sequence_parallel: each of them holds a part of the tokens' hidden states.
        host_time: measure the host's time per call as well.
        implementations: names, None: all.
    """

    shape: Shape
    suite: str = ""
    name: str = ""
    dtype: str = "bf16"
    tf32: bool = False
    inputs: str = "random"
    options: Options = field(default_factory=Options)
    shard: tuple[int, int] | None = None
    played: str | None = None
    ranks: int | None = None
    sequence_parallel: bool = False
    host_time: bool = False
    implementations: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.tf32 and self.dtype != "fp32":
            raise ValueError(f"--tf32: expected together with --dtype fp32, got {self.dtype}")
        if self.shard is not None:
            rank, ranks = self.shard
            if not 0 <= rank < ranks <= self.shape.vocab:
                raise ValueError(
                    f"--shard: expected r/W with 0 <= r < W <= V={self.shape.vocab}, "
                    f"got {rank}/{ranks}"
                )


def parse_shard(text: str) -> tuple[int, int]:
    """Read "r/W".

    Raises:
        ValueError: not two integers.
    """
    rank, slash, ranks = text.partition("/")
    if not (slash and rank.isdecimal() and ranks.isdecimal()):
        raise ValueError(f"--shard: expected r/W such as 0/8, got {text!r}")
    return int(rank), int(ranks)


def played_cases(case: Case, ranks: int, ids: str | None) -> list[Case]:
    """One case for each of the ranks that hold it, in each order that `ids` lists.

    Raises:
        ValueError: no number of ranks that could hold it, or an unknown order.
    """
    vocab = case.shape.vocab
    if not 1 <= ranks <= vocab:
        raise ValueError(f"--shards-of: expected 1 <= W <= V={vocab}, got {ranks}")
    orders = tuple(dict.fromkeys(part.strip() for part in (ids or IDS[0]).split(",")))
    for order in orders:
        if order not in IDS:
            raise ValueError(f"--ids: expected orders among {', '.join(IDS)}, got {order!r}")
    return [
        replace(case, shard=(rank, ranks), played=order)
        for order in orders
        for rank in range(ranks)
    ]


def parse_sizes(text: str) -> tuple[int, ...]:
    """Read "1,2,4".

    Raises:
        ValueError: not positive integers.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"--tensor-parallel: expected sizes such as 1,2,4, got {text!r}")
    return tuple(dict.fromkeys(map(int, parts)))


def parse_implementations(text: str | None) -> tuple[str, ...] | None:
    """Read "name,name"; None stays None, which means all.

    Raises:
        ValueError: an unknown name.
    """
    if text is None:
        return None
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in names:
        if name not in IMPLEMENTATIONS:
            raise ValueError(
                f"--implementations: expected names among {', '.join(IMPLEMENTATIONS)}, "
                f"got {name!r}"
            )
    if not names:
        raise ValueError(f"--implementations: expected at least one name, got {text!r}")
    return names
