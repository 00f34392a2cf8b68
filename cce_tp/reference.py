"""impl="torch": the tile functions in plain PyTorch, for any device and for reading.

It computes one tile of logits at a time, as the Triton kernels do, and never (N, V) at once. fp16
and bf16 tiles are multiplied in fp32, fp64 in fp64.

Legend: N tokens, V vocabulary rows of this rank, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cce_tp import stats
from cce_tp.far_field import (
    FarField,
    FarGradient,
    KeptRows,
    RankBudget,
    SortedStatistics,
    TargetPlan,
    TileMasses,
    mass_dtype,
    rounds_gradient,
)
from cce_tp.filtering import LARGEST_FAR_MASS
from cce_tp.problem import (
    KeptLogits,
    LocalLogits,
    LogitGradient,
    LossTerms,
    TokenLoss,
    statistics_dtype,
)
from cce_tp.stats import StatRows
from cce_tp.workspace import blocks

# Tokens and vocabulary rows per tile. The paper's filter decides per tile of this size.
TILE_N = 128
TILE_V = 256


def _logits_tile(logits: LocalLogits) -> Tensor:
    """x = cap(scale * (E C^T + bias)), the whole rectangle of `logits`, in fp32 or fp64."""
    dtype = statistics_dtype(logits.input.dtype)
    x_NV = logits.input.to(dtype) @ logits.weight.to(dtype).t()
    if logits.bias is not None:
        x_NV = x_NV + logits.bias.to(dtype)
    if logits.logit_scale != 1.0:
        x_NV *= logits.logit_scale
    if logits.logit_softcap is not None:
        x_NV = (x_NV / logits.logit_softcap).tanh_() * logits.logit_softcap
    return x_NV


def _is_target(logits: LocalLogits) -> Tensor:
    columns_V = torch.arange(logits.weight.shape[0], device=logits.target.device)
    return columns_V == (logits.target - logits.first_id)[:, None]


def _tile_statistics(logits: LocalLogits, rows: StatRows) -> Tensor:
    x_NV = _logits_tile(logits)
    max_N = x_NV.amax(dim=1)
    base_N = torch.where(max_N == -torch.inf, 0.0, max_N)
    shifted_NV = x_NV - base_N[:, None]
    exp_NV = shifted_NV.exp()
    packed = [max_N, exp_NV.sum(dim=1), torch.where(_is_target(logits), x_NV, 0.0).sum(dim=1)]
    if rows.logit_sum:
        packed.append(x_NV.sum(dim=1))
    if rows.entropy:
        packed.append(torch.where(exp_NV > 0, exp_NV * shifted_NV, 0.0).sum(dim=1))
    if rows.argmax:
        packed.append(stats.pack_ids(x_NV.argmax(dim=1) + logits.first_id, x_NV.dtype))
    return torch.stack(packed)


def statistics(
    logits: LocalLogits, rows: StatRows, workspace_bytes: int, kept: KeptLogits | None
) -> Tensor:
    """Packed (rows, N) statistics of this rank's logits, as `kernels.forward.statistics`."""
    num_tokens, vocab, _ = logits.shape
    dtype = statistics_dtype(logits.input.dtype)
    merged = stats.empty_statistics(num_tokens, rows, like=logits.input, dtype=dtype)
    for n0, n1 in blocks(num_tokens, TILE_N):
        block = logits.tokens(n0, n1)
        for v0, v1 in blocks(vocab, TILE_V):
            tile = _tile_statistics(block.columns(v0, v1), rows)
            merged[:, n0:n1] = stats.merge(torch.stack([merged[:, n0:n1], tile]), rows)
            if kept is not None and v0 < kept.columns:
                _keep(kept, block.columns(v0, v1), tile[StatRows.MAX], (n0, n1), (v0, v1))
    return merged


def _keep(
    kept: KeptLogits,
    logits: LocalLogits,
    max_N: Tensor,
    tokens: tuple[int, int],
    columns: tuple[int, int],
) -> None:
    base_N = torch.where(max_N == -torch.inf, 0.0, max_N)
    kept.tile_max[columns[0] // TILE_V, slice(*tokens)] = base_N
    below = _below(logits, _logits_tile(logits), base_N)
    kept.below_max[slice(*columns), slice(*tokens)] = below.t()


def _below(logits: LocalLogits, x_NV: Tensor, base_N: Tensor) -> Tensor:
    """What is kept of logits; with a cap no infinity, which would be one in its derivative."""
    below_NV = x_NV - base_N[:, None]
    if logits.logit_softcap is not None:
        below_NV = below_NV.clamp(min=torch.finfo(torch.float16).min)
    return below_NV.to(torch.float16)


def grad_kept(
    kept: KeptLogits,
    start: int,
    logits: LocalLogits,
    upstream: LogitGradient,
    out: Tensor,
    tiles: Tensor | None,
) -> None:
    """As `kernels.backward.grad_kept`."""
    for v0, v1 in blocks(out.shape[0], TILE_V):
        columns = torch.arange(start + v0, start + v1, device=out.device)
        if tiles is not None and not tiles[columns // kept.tile].any():
            continue
        for n0, n1 in blocks(out.shape[1], TILE_N):
            block, upstream_block = kept.tokens(n0, n1), upstream.tokens(n0, n1)
            x_VN = block.below_max[start + v0 : start + v1].to(block.tile_max.dtype)
            x_VN = x_VN + block.tile_max[columns // kept.tile]
            g_NV = _gradient_of(x_VN.t(), logits.tokens(n0, n1).columns(v0, v1), upstream_block)
            out[v0:v1, n0:n1] = g_NV.mul_(logits.logit_scale * upstream_block.grad[:, None]).t()


def token_loss(packed_RN: Tensor, target_N: Tensor, rows: StatRows, terms: LossTerms) -> TokenLoss:
    """Loss and what the backward pass needs, as `kernels.loss.token_loss`."""
    max_N, target_logit_N = packed_RN[StatRows.MAX], packed_RN[StatRows.TARGET]
    counted_N = target_N != terms.ignore_index
    in_vocab_N = (target_N >= 0) & (target_N < terms.vocab_size)
    log_sum_N = packed_RN[StatRows.SUM_EXP].log()
    # A target that is no id poisons its token: a NaN loss is seen, a plausible one is not.
    log_sum_N = torch.where(in_vocab_N | ~counted_N, log_sum_N, torch.nan)
    # lse - (1 - a) x_target - a mean(x) + z lse^2; differences come before sums.
    loss_N = log_sum_N + (max_N - target_logit_N)
    if terms.label_smoothing > 0:
        mean_N = packed_RN[rows.logit_sum_row] / terms.vocab_size
        loss_N = loss_N + terms.label_smoothing * (target_logit_N - mean_N)
    if terms.z_loss > 0:
        loss_N = loss_N + terms.z_loss * (max_N + log_sum_N) ** 2
    loss = torch.where(counted_N, loss_N, 0.0)
    count = torch.empty(0, dtype=torch.int32, device=loss.device)
    if terms.reduction != "none":
        loss = loss.sum()
        count = counted_N.sum(dtype=torch.int32).clamp(min=1)
    if terms.reduction == "mean":
        loss = loss / count
    return TokenLoss(loss, torch.stack([max_N, log_sum_N]), count)


def token_gradient(upstream: Tensor, target_N: Tensor, count: Tensor, terms: LossTerms) -> Tensor:
    """(N,) gradient of the summed loss, as `kernels.loss.token_gradient`."""
    if terms.reduction == "mean":
        upstream = upstream / count
    return torch.where(target_N != terms.ignore_index, upstream, 0.0)


def tile_bytes(logits: LocalLogits) -> int:
    """Temporaries of one gradient tile: wide tiles, a mask, and copies of 16-bit operands."""
    wide = statistics_dtype(logits.input.dtype)
    copies = logits.input.dtype != wide
    tile = TILE_N * TILE_V
    return wide.itemsize * (4 * tile + copies * (TILE_N + TILE_V) * logits.shape[2]) + tile


def _gradient_of(x_NV: Tensor, logits: LocalLogits, upstream: LogitGradient) -> Tensor:
    """Gradient of each token's own loss with respect to y, before the upstream gradient."""
    g_NV = (x_NV - upstream.max_logit[:, None]).sub_(upstream.log_sum[:, None])
    # A logit of another width of tile may be rounded otherwise than in the forward pass, and then
    # lie above the maximum: by 1e23 at 1e30.
    g_NV = g_NV.clamp_(max=0.0).exp_()
    if upstream.z_loss != 0:
        lse_N = upstream.max_logit + upstream.log_sum
        g_NV *= (1 + 2 * upstream.z_loss * lse_N)[:, None]
    g_NV -= upstream.uniform_weight
    g_NV -= upstream.onehot_weight * _is_target(logits).to(g_NV.dtype)
    if logits.logit_softcap is not None:
        g_NV *= 1 - (x_NV / logits.logit_softcap).square_()
    # A masked token has gradient exactly 0 even where its logits are not finite.
    return g_NV.masked_fill_(upstream.grad[:, None] == 0, 0.0)


def _gradient_tile(logits: LocalLogits, upstream: LogitGradient, eps: float | None) -> Tensor:
    g_NV = _gradient_of(_logits_tile(logits), logits, upstream)
    if eps is not None and bool((g_NV.abs() < eps).all()):
        return g_NV.zero_()
    return g_NV.mul_(logits.logit_scale * upstream.grad[:, None])


def grad_logits(
    logits: LocalLogits, upstream: LogitGradient, out_VN: Tensor, eps: float | None
) -> None:
    """Write G^T, logit_scale included, into `out_VN` (V, N); dropped tiles are zeros.

    Returns None: with no list of kept tiles the caller takes dense products.
    """
    num_tokens, vocab, _ = logits.shape
    for n0, n1 in blocks(num_tokens, TILE_N):
        block, upstream_block = logits.tokens(n0, n1), upstream.tokens(n0, n1)
        for v0, v1 in blocks(vocab, TILE_V):
            tile = _gradient_tile(block.columns(v0, v1), upstream_block, eps)
            out_VN[v0:v1, n0:n1] = tile.t()


def tile_rows(like: Tensor) -> int:
    """As `kernels.far_field.tile_rows`."""
    return TILE_V


def probes(input: Tensor, step: int) -> Tensor:
    """As `kernels.far_field.probes`."""
    # A product with a constant vector, not mean(): that takes a buffer as large as input on CUDA.
    average = torch.mv(input.t(), input.new_full(input.shape[:1], 1 / input.shape[0]))
    return torch.cat([average[None], input[::step]])


def mass_key(
    weight: Tensor, probes: Tensor, bias: Tensor | None, logit_scale: float, out: Tensor
) -> None:
    """As `kernels.far_field.mass_key`."""
    dtype = statistics_dtype(weight.dtype)
    for v0, v1 in blocks(weight.shape[0], TILE_V):
        sampled = probes.to(dtype) @ weight[v0:v1].to(dtype).t()
        others = sampled[1:] - sampled[0]
        deviation = torch.linalg.vector_norm(others, dim=0) * logit_scale
        key = sampled[0] * logit_scale + 0.5 / len(others) * deviation * deviation
        out[v0:v1] = key if bias is None else key + logit_scale * bias[v0:v1]


def target_places(order: Tensor, target: Tensor, first_id: int) -> tuple[Tensor, Tensor]:
    """As `kernels.far_field.target_places`."""
    vocab = order.shape[0]
    places = torch.empty_like(order)
    places.scatter_(0, order, torch.arange(vocab, device=order.device))
    column = target - first_id
    local = (column >= 0) & (column < vocab)
    place = torch.where(local, places[torch.where(local, column, 0)], -1)
    return place, torch.where(local, place + first_id, -1)


def kept_rows(kept: Tensor, order: Tensor, tile: int, first_late: int) -> KeptRows:
    """As `kernels.far_field.kept_rows`."""
    by_tile = torch.zeros(kept.shape[0] * tile, dtype=torch.int64, device=order.device)
    by_tile[: order.shape[0]] = order
    by_tile = by_tile.view(-1, tile)
    filled = torch.arange(by_tile.numel(), device=order.device).view(-1, tile) < order.shape[0]
    late = ((by_tile >= first_late) & filled).sum(dim=1, dtype=torch.int32)
    chosen = torch.full_like(by_tile.view(-1), -1)
    listed = torch.where(filled, by_tile, -1)[kept != 0].view(-1)
    chosen[: len(listed)] = listed
    is_late = chosen >= first_late
    direct = torch.where(is_late, -1, chosen)
    held = torch.where(is_late, torch.cumsum(is_late, dim=0) - 1, -1)
    slot = (torch.cumsum(kept, dim=0) - 1).to(torch.int32)
    run = torch.cumprod(kept, dim=0).sum()
    numbers = torch.stack([kept.sum(), (late * kept).sum(), run]).to(torch.int32)
    return KeptRows(chosen, slot, numbers, direct, held, chosen[is_late])


def plan_targets(
    far: FarField, slot: Tensor, upstream: LogitGradient, logits: LocalLogits
) -> TargetPlan:
    """As `kernels.far_field.plan_targets`."""
    here, vocab = far.place >= 0, logits.weight.shape[0]
    tile = torch.where(here, far.place // TILE_V, -1)
    kept = here & (far.kept[tile.clamp(min=0)] != 0)
    column = torch.where(kept, slot[tile.clamp(min=0)] * TILE_V + far.place % TILE_V, -1)
    # A token without a gradient adds nothing to its target's row, which may have many such.
    far_target = here & ~kept & (upstream.grad != 0)
    row = torch.where(far_target, logits.target - logits.first_id, -1)
    factor = upstream.grad * (-upstream.onehot_weight * logits.logit_scale)
    if logits.logit_softcap is not None:
        factor = factor * (1 - (far.target_logit / logits.logit_softcap) ** 2)
    # A masked token has gradient exactly 0 even where its logits are not finite.
    factor = torch.where(upstream.grad == 0, 0.0, factor)
    is_target = torch.zeros(vocab + 1, dtype=torch.uint8, device=row.device)
    is_target.index_fill_(0, torch.where(row >= 0, row, vocab), 1)
    remainder = torch.where(far_target, factor, 0.0)
    if rounds_gradient(logits.input.dtype):
        alone = logits.columns(0, 1)._replace(target=torch.zeros_like(column), first_id=0)
        g_N = _gradient_of(far.target_logit[:, None], alone, upstream)[:, 0]
        remainder = torch.where(kept, g_N * logits.logit_scale * upstream.grad, remainder)
    return TargetPlan(column, row, tile, factor, is_target[:vocab], remainder)


def subtract_stored(remainder: Tensor, column: Tensor, start: int, grad_KN: Tensor) -> None:
    """As `kernels.far_field.subtract_stored`."""
    at = column - start
    tokens = ((at >= 0) & (at < len(grad_KN))).nonzero().view(-1)
    remainder[tokens] -= grad_KN[at[tokens], tokens].to(remainder.dtype)


def _cap_slope(logits: LocalLogits, x_NV: Tensor) -> Tensor:
    if logits.logit_softcap is None:
        return torch.ones_like(x_NV)
    return 1 - (x_NV / logits.logit_softcap) ** 2


def sorted_statistics(
    logits: LocalLogits,
    order: Tensor,
    target: Tensor,
    rows: StatRows,
    workspace_bytes: int,
    free: Tensor | None,
    kept: KeptLogits | None,
) -> SortedStatistics:
    """As `kernels.far_field.sorted_statistics`; the tiles' rows: maximum m, sum of exp(x - m), of
    its square, of it times the cap's derivative, and of that derivative."""
    num_tokens, vocab, hidden = logits.shape
    dtype = statistics_dtype(logits.input.dtype)
    merged = stats.empty_statistics(num_tokens, rows, like=logits.input, dtype=dtype)
    starts = range(0, vocab, TILE_V)
    tiles = torch.empty((len(starts), 5, num_tokens), dtype=dtype, device=logits.input.device)
    means = logits.weight.new_empty(len(starts), hidden)
    for index, start in enumerate(starts):
        ids = order[start : start + TILE_V]
        part = logits.gathered(ids, target - logits.first_id - start)
        means[index] = part.weight.to(dtype).mean(dim=0)
        for n0, n1 in blocks(num_tokens, TILE_N):
            block = part.tokens(n0, n1)
            tile = _tile_statistics(block, rows)
            if rows.argmax:
                best = ids[_logits_tile(block).argmax(dim=1)] + logits.first_id
                tile[rows.argmax_row] = stats.pack_ids(best, dtype)
            merged[:, n0:n1] = stats.merge(torch.stack([merged[:, n0:n1], tile]), rows)
            x_NV = _logits_tile(block)
            slope_NV = _cap_slope(logits, x_NV)
            base_N = torch.where(tile[0] == -torch.inf, 0.0, tile[0])
            exp_NV = (x_NV - base_N[:, None]).exp()
            made = (exp_NV * exp_NV, exp_NV * slope_NV, slope_NV)
            sums = [tile[0], tile[1], *(each.sum(dim=1) for each in made)]
            tiles[index, :, n0:n1] = torch.stack(sums)
            if kept is not None and start < kept.columns:
                kept.below_max[start : start + TILE_V, n0:n1] = _below(part, x_NV, base_N).t()
                kept.tile_max[index, n0:n1] = base_N
    return SortedStatistics(merged, tiles, means)


def tile_masses(
    tiles: Tensor,
    normaliser_2N: Tensor,
    target_N: Tensor,
    logits: LocalLogits,
    *,
    ignore_index: int,
    budget: RankBudget,
    slopes: bool,
    leading: int,
) -> TileMasses:
    """As `kernels.far_field.tile_masses`."""
    vocab, num_tiles = logits.weight.shape[0], tiles.shape[0]
    scale_TN = ((tiles[:, 0] - normaliser_2N[0]) - normaliser_2N[1]).exp()
    ignored_N = target_N == ignore_index
    counted_TN = torch.where(ignored_N, 0.0, tiles[:, 1] * scale_TN)
    deviation_TN = 2 * counted_TN
    if not budget.is_zero:
        count_T = (vocab - TILE_V * torch.arange(num_tiles, device=tiles.device)).clamp(max=TILE_V)
        # Scaled after the root: the square of a small scale would be 0.
        spread_TN = (count_T[:, None] * tiles[:, 2] - tiles[:, 1] ** 2).clamp(min=0).sqrt()
        deviation_TN = torch.minimum(spread_TN * scale_TN, deviation_TN)
        deviation_TN = torch.where(ignored_N, 0.0, deviation_TN)
    largest_T, total_T = counted_TN.amax(dim=1), counted_TN.sum(dim=1)
    deviation_T = deviation_TN.sum(dim=1)
    # The smallest first; of equals the later one.
    ascending = num_tiles - 1 - torch.sort(deviation_T.flip(0), stable=True).indices
    left_T = torch.empty_like(total_T)
    left_T[ascending] = deviation_T[ascending].cumsum(dim=0)
    allowed = budget.by_mass * total_T.sum() + budget.by_rows * (~ignored_N).sum()
    kept = ~((left_T <= allowed) & (largest_T <= LARGEST_FAR_MASS))
    kept[-1] |= vocab % TILE_V != 0
    kept[0] = True  # never none: the first holds the likeliest rows
    if leading:
        first = kept[:leading]
        number = torch.arange(1, leading + 1, device=kept.device)
        dense = first & (4 * first.cumsum(dim=0) >= 3 * number)
        first |= number <= torch.where(dense, number, 0).amax()
    dtype = mass_dtype(logits.input.dtype)
    slope = tiles[:, 4] if slopes else tiles[:0, 4]
    mass = tiles[:, 3] * scale_TN
    totals = torch.stack([total_T, deviation_T]).float()
    # A tensor of its own, not a part of `tiles`, which would live as long.
    slope = torch.empty_like(slope, dtype=dtype, memory_format=torch.contiguous_format).copy_(slope)
    return TileMasses(mass.to(dtype), slope, totals, kept.to(torch.int32))


def far_gradient(
    masses: TileMasses, upstream: LogitGradient, logits: LocalLogits, out: Tensor | None
) -> Tensor:
    """As `kernels.far_field.far_gradient`."""
    dtype = logits.input.dtype
    wide = statistics_dtype(dtype)
    num_tiles, vocab = masses.kept.shape[0], logits.weight.shape[0]
    rows_left_T = vocab - TILE_V * torch.arange(num_tiles, device=masses.kept.device)
    slope = rows_left_T.clamp(max=TILE_V)[:, None].to(wide)
    if masses.slope.shape[0] > 0:
        slope = masses.slope.to(wide)
    lse_N = upstream.max_logit + upstream.log_sum
    g_TN = masses.mass.to(wide) * (1 + 2 * upstream.z_loss * lse_N)
    g_TN = (g_TN - upstream.uniform_weight * slope) * (upstream.grad * logits.logit_scale)
    g_TN = torch.where((masses.kept != 0)[:, None] | (upstream.grad == 0), 0.0, g_TN).to(dtype)
    return g_TN if out is None else out.copy_(g_TN)


def gather_rows(weight: Tensor, rows: Tensor, *, out: Tensor | None = None) -> Tensor:
    """As `kernels.far_field.gather_rows`."""
    made = torch.where((rows >= 0)[:, None], weight[rows.clamp(min=0)], 0.0)
    return made if out is None else out.copy_(made)


def scatter_rows(out: Tensor, rows: Tensor, value: Tensor, *, accumulate: bool) -> None:
    """As `kernels.far_field.scatter_rows`."""
    entries = (rows >= 0).nonzero().view(-1)
    rows, value = rows[entries], value[entries]
    if accumulate:
        value = value + out[rows]
    out[rows] = value.to(out.dtype)


def add_target_rows(
    out: Tensor, weight: Tensor, target: Tensor, first_id: int, factors: Tensor
) -> None:
    """As `kernels.far_field.add_target_rows`."""
    row = target - first_id
    tokens = ((row >= 0) & (row < len(weight)) & (factors != 0)).nonzero().view(-1)
    out[tokens] += factors[tokens, None] * weight[row[tokens]].to(out.dtype)


def write_far_rows(
    far: FarGradient,
    input: Tensor,
    out: Tensor | None,
    bias: Tensor | None,
    rows: tuple[int, int],
    *,
    targets: bool,
    accumulate: bool,
) -> None:
    """As `kernels.far_field.write_far_rows`."""
    vocab, (start, stop) = far.order.shape[0], rows
    tokens = (far.targets.row >= 0).nonzero().view(-1)
    targets_row = far.targets.row[tokens]
    if bias is not None and targets:
        bias.index_add_(0, targets_row, far.targets.factor[tokens].to(bias.dtype))
    if out is None or far.weight is None:
        return
    for tile in (far.kept == 0).nonzero().view(-1).tolist():
        ids = far.order[tile * far.tile : (tile + 1) * far.tile]
        is_target = far.targets.is_target[ids] != 0
        ids = ids[torch.where(is_target, targets, (ids >= start) & (ids < stop))]
        if len(ids) == 0:
            continue
        total = (far.weight[tile] / min(far.tile, vocab - tile * far.tile)).repeat(len(ids), 1)
        if targets:
            inside = far.targets.tile[tokens] == tile
            place = (targets_row[inside, None] == ids).to(torch.uint8).argmax(dim=1)
            value = far.targets.factor[tokens[inside], None] * input[tokens[inside]].to(total.dtype)
            total.index_add_(0, place, value)
        if accumulate:
            total += out[ids]
        out[ids] = total.to(out.dtype)
