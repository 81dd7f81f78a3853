"""The kernels in plain torch: the native ones must match them, and they run where there is no native one.

On the CPU every op is batch-invariant: a row's result has the same bits whatever the other rows are and however many
there are. Stock ops are not (MKL picks another loop order for another row count; vectorised exp and tanh have a scalar
tail with other bits, and where it falls depends on how threads split the tensor), so only these are used:

- elementwise +, -, *, /, rsqrt and round, which IEEE 754 fixes to the bit, in an order written down here;
- integer sums held in float32 (below 2^24, exact in any order);
- library matrix products of one fixed shape on fresh (64-byte aligned) memory, the same call for every row.

Arithmetic of `block_linear`, shared with C++ to the bit, no fused multiply-add anywhere:

    per row t and block b of 32 columns, in float32:
      amax = max |x|;  below 1e-30 the block counts as zero (s = 0, a = 0)
      s = amax / 127;  a = round_half_even(x * (127 / amax))    a block with NaN or Inf: s = NaN, a = 0
      dot = sum q * a,  sum = sum a                             exact integers
    with minimum:  term = (s * scale) * dot + minimum * (s * sum)
    without:       term = (s * scale) * (dot - zero * sum)      zero: 8 (4 bit), 16 (5 bit), 128 (8 bit)
    with a table:  term = (s * (scale * unit)) * dot            q: the numbers of the table
    with factors f0, f1 of scale and g0, g1 of minimum for the first and the last 16 columns, and their dots and sums:
      dot = f0 * (dot0 - zero * sum0) + f1 * (dot1 - zero * sum1),  sum = g0 * sum0 + g1 * sum1, and as above
    y[t, n] = ((0 + term_0) + term_1) + ...                     blocks in column order

Other devices get no promise about bits: there the same functions use one stock call for all rows, with weights
dequantised in slices and activations not quantised. Left out: speed, which is the part of the other libraries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.kernels.blocks import BlockTensor, factors, split, split_rows, values_of
from specdec.kernels.forms import BLOCK, GROUP, HALF, BlockForm
from specdec.kernels.low_rank import low_rank as low_rank
from specdec.kernels.store import KVView

TINY = 1e-30
_ROW_TILE = 8
_CHUNK = 1 << 22  # elements of the largest temporary
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


def recorded(*tensors: Tensor | None) -> bool:
    """Return whether gradients of one of `tensors` are being recorded."""
    return torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in tensors)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise activations to int8 values, per row and block of 32.

    x float32 [T, K] -> values float32 [T, B, 32] (integers -127..127), scale [T, B], sum of values [T, B].
    """
    values, scale = _quantised(x.reshape(x.shape[0], x.shape[1] // BLOCK, BLOCK))  # [T, B, 32]
    return values, scale, values.sum(dim=-1)


def _quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise x float32 [..., N], each last row a block -> integers -127..127 in float32 [..., N], scale [...]."""
    largest = x.abs().amax(dim=-1)  # [...]; NaN stays NaN
    finite = largest < torch.inf
    usable = finite & (largest >= TINY)
    # torch turns 127 / tensor into reciprocal * 127, which rounds twice: divide tensor by tensor
    top = torch.full_like(largest, 127.0)
    inverse = torch.where(usable, top / largest, 0.0)
    values = torch.where(usable[..., None], torch.round(x * inverse[..., None]), 0.0)
    return values, torch.where(finite, torch.where(usable, largest / top, 0.0), torch.nan)


def block_linear(x: Tensor, w: BlockTensor) -> Tensor:
    """Multiply x [T, K] by packed weights -> x @ w.T [T, N] in x.dtype; the module docstring has the arithmetic."""
    if x.device.type != "cpu":
        return expanded_linear(x, w)
    values, scale, total = quantise_rows(x.float())
    rows, blocks = scale.shape
    values = values.transpose(0, 1).contiguous()  # [B, T, 32]
    scale, total = scale.t()[:, :, None], total.t()[:, :, None]  # [B, T, 1]
    offset = total * (float(w.zero) if w.form == BlockForm(w.bits) else 0.0)
    out = x.new_empty((rows, w.q.shape[0] * GROUP), dtype=torch.float32)
    step = max(1, _CHUNK // (GROUP * blocks * max(rows, BLOCK)))
    for start in range(0, w.q.shape[0], step):
        part = slice(start, start + step)
        d = w.scale[part].float().transpose(0, 1).reshape(blocks, 1, -1) * w.unit  # [B, 1, n]
        lows = total
        if w.sub is None:
            terms = torch.bmm(values, _columns_first(w, part)).sub_(offset)  # [B, T, n]
        else:
            terms, lows = _by_halves(values, w, part)
        terms = terms.mul_(scale * d)
        if w.minimum is not None:
            m = w.minimum[part].float().transpose(0, 1).reshape(blocks, 1, -1)  # [B, 1, n]
            terms = terms.add_(m * (scale * lows))
        total_n = torch.zeros_like(terms[0])  # [T, n]
        for term in terms:
            total_n += term
        out[:, start * GROUP : start * GROUP + total_n.shape[1]] = total_n
    return out[:, : w.rows].to(x.dtype).contiguous()


def block_rows(ids: Tensor, w: BlockTensor, dtype: torch.dtype) -> Tensor:
    """Dequantise rows of w: ids long [T] -> [T, K] in dtype (float32 arithmetic: multiply, then add)."""
    ids = ids.to(w.device)
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < w.rows:
        raise IndexError(f"ids must be from 0 to {w.rows - 1}, got {ids.tolist()}")
    return _rows(ids, w, dtype)


def _rows(ids: Tensor, w: BlockTensor, dtype: torch.dtype) -> Tensor:
    group, lane = ids // GROUP, ids % GROUP
    codes = split_rows(w, ids).reshape(ids.shape[0], w.columns // BLOCK, BLOCK)  # [T, B, 32]
    values = values_of(codes, w)  # [T, B, 32]
    d = w.scale[group, :, lane].float()[..., None] * w.unit  # [T, B, 1]
    low = None if w.minimum is None else w.minimum[group, :, lane].float()[..., None]
    if w.sub is not None:
        of_scale, of_minimum = (f.repeat_interleave(HALF, dim=-1) for f in factors(w, w.sub[group, :, lane]))
        values = values * of_scale
        low = None if low is None else low * of_minimum
    values = values * d
    if low is not None:
        values = values + low
    return values.reshape(ids.shape[0], w.columns).to(dtype)  # [T, K]


def best(x: Tensor) -> tuple[float, int]:
    """Return the largest of x [n] and the first index that has it; a NaN wins."""
    value = x.max()
    wanted = torch.isnan(x) if torch.isnan(value) else x == value
    return float(value), int(wanted.to(torch.uint8).argmax())


def gumbel_candidates(scores: Tensor, top: float, floor: float, key: int, ids: Tensor | None = None) -> Tensor:
    """Return the indices int64 [n] of scores [candidates] above `floor`: each could win with enough noise."""
    return torch.nonzero(scores > floor).squeeze(1)


def dense_linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply x [T, K] by w [N, K] and add bias [N], where there is one -> [T, N] in x.dtype.

    On the CPU rows go through the library eight at a time, padded with zero rows: measured bitwise
    independent of a row's place in the tile, where one, two and three rows are not. A pass that records
    gradients uses one plain call, because training is not held to batch invariance.
    """
    w = w.to(x.dtype)
    if x.device.type != "cpu" or recorded(x, w):
        return F.linear(x, w, bias)
    out = x.new_empty((x.shape[0], w.shape[0]))
    tile = x.new_zeros((_ROW_TILE, x.shape[1]))
    for start in range(0, x.shape[0], _ROW_TILE):
        rows = x[start : start + _ROW_TILE]
        # a copy: the library may choose its loop by the alignment of the memory
        tile[: rows.shape[0]] = rows
        out[start : start + _ROW_TILE] = F.linear(tile, w)[: rows.shape[0]]
    return out if bias is None else out + bias


def attention(q: Tensor, kv: KVView, lo: Sequence[int], hi: Sequence[int], scale: float) -> Tensor:
    """Attend with T query rows to a ring of key slots, by softmax.

    q [T, Hq, D] over `kv` -> [T, Hq, Dv] in q.dtype. Row t sees positions lo[t]..hi[t]-1 (at most S of them). Query
    heads are grouped Hq/Hkv to a key head, in order. A row that sees nothing is zero.
    """
    if q.device.type != "cpu":
        return _masked_attention(q, kv, lo, hi, scale)
    rows, heads, _ = q.shape
    out = q.new_zeros((rows, heads, kv.value_width))
    for row, (low, high) in enumerate(zip(lo, hi, strict=True)):
        if low < high:
            query = (q[row].float() * scale).view(kv.kv_heads, heads // kv.kv_heads, -1)  # [Hkv, G, D]
            assert high - low <= kv.slots, f"row sees {high - low} positions of a ring of {kv.slots}"
            keys, values = read_kv(kv, low, high)
            scores = torch.matmul(query, keys.transpose(1, 2))  # [Hkv, G, L]
            found = torch.matmul(torch.softmax(scores, dim=-1), values)
            out[row] = found.view(heads, -1)  # [Hkv, G, Dv] -> [Hq, Dv]
    return out


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Norm x [..., D]: x / sqrt(mean(x^2) + eps) * weight [D], in float32, cast to x.dtype at the end.

    The sum of squares is a halving tree over D padded with zeros to a power of two (lane i adds lane
    i + half): elementwise additions only, so the order is the same for every shape, and C++ can follow it.
    """
    wide = x.float()
    width = x.shape[-1]
    total = F.pad(wide * wide, (0, (1 << (width - 1).bit_length()) - width))
    while total.shape[-1] > 1:
        half = total.shape[-1] // 2
        total = total[..., :half] + total[..., half:]
    # torch.rsqrt is 1 / sqrt(x), each rounded as IEEE 754 says; torch.sqrt of a tensor is not (MKL's, 1 ulp)
    normed = wide * torch.rsqrt(total / torch.full_like(total, width) + eps)
    if weight is not None:
        normed = normed * weight.float()
    return normed.to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [T, H, D], halves convention: x * cos + rotate_half(x) * sin; cos, sin [T, D]."""
    wide = x.float()
    half = x.shape[-1] // 2
    turned = torch.cat((-wide[..., half:], wide[..., :half]), dim=-1)
    return (wide * cos.float()[:, None] + turned * sin.float()[:, None]).to(x.dtype)  # cos: [T, 1, D]


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Compute activation(gate) * up, both [T, I], in float32; activation is "silu" or "gelu_tanh"."""
    apply = _ACTIVATIONS.get(activation)
    if apply is None:
        raise ValueError(f'unknown activation {activation!r}: use "silu" or "gelu_tanh"')
    if gate.device.type != "cpu" or gate.dim() < 2 or recorded(gate):
        return (apply(gate.float()) * up.float()).to(gate.dtype)
    # a row at a time: where a vectorised exp ends and its scalar tail begins must not depend on T
    rows = [apply(row.float()) for row in gate]
    return (torch.stack(rows) * up.float()).to(gate.dtype) if rows else torch.empty_like(gate)


def _columns_first(w: BlockTensor, groups: slice) -> Tensor:
    """Lay out the integers of some groups for a product per block: float32 [B, 32, n], codes without a table as they
    are stored."""
    chunks = split(w.q[groups], w.bits).permute(1, 2, 4, 0, 3)  # [B, 8, I, G, R]
    codes = chunks.reshape(w.q.shape[1], BLOCK, -1)  # [B, 32, n]
    return codes.float() if w.table is None and w.sub is None else values_of(codes, w)


def _by_halves(values: Tensor, w: BlockTensor, groups: slice) -> tuple[Tensor, Tensor]:
    """Multiply values [B, T, 32] by blocks that have factors for 16 inputs: dots and sums [B, T, n] with those."""
    assert w.sub is not None
    weights = _columns_first(w, groups)
    dots = sums = torch.zeros((), dtype=torch.float64)
    for half, columns in enumerate((slice(0, HALF), slice(HALF, BLOCK))):
        part = values[:, :, columns].contiguous()
        dot = torch.bmm(part, weights[:, columns].contiguous())  # [B, T, n]
        both = w.sub[groups][..., half].transpose(0, 1).reshape(dot.shape[0], 1, -1)  # [B, 1, n]
        of_scale, of_minimum = factors(w, both)  # whose products may take more than float32's 24 bits
        dots = dots + dot.double() * of_scale.double()
        sums = sums + part.sum(dim=-1, keepdim=True).double() * of_minimum.double()
    return dots.float(), sums.float()


def expanded_linear(x: Tensor, w: BlockTensor, linear: Callable[[Tensor, Tensor], Tensor] = F.linear) -> Tensor:
    """Multiply by a dequantised slice of weights at a time, in x.dtype; a row's bits are as `linear` makes them."""
    out = x.new_empty((x.shape[0], w.rows))
    step = max(GROUP, (1 << 25) // w.columns)
    for start in range(0, w.rows, step):
        ids = torch.arange(start, min(start + step, w.rows), dtype=torch.int64, device=w.device)
        out[:, start : start + step] = linear(x, _rows(ids, w, x.dtype))
    return out


def _visible(store: Tensor, scale: Tensor | None, low: int, high: int) -> Tensor:
    """Copy the slots of positions low..high-1 in order, [H, L, D] float32, into fresh aligned memory.

    Fresh, because the library's summation order may depend on strides (the ring's size) and on alignment.
    """
    slots = store.shape[1]
    first, last = low % slots, (high - 1) % slots + 1
    if first < last:
        part = store[:, first:last].to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        return part if scale is None else part * scale[:, first:last, None]
    part = torch.cat((store[:, first:], store[:, :last]), dim=1).float()
    return part if scale is None else part * torch.cat((scale[:, first:], scale[:, :last]), dim=1)[..., None]


def quantise_store(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise rows of a store: x [H, T, D] -> int8 [H, T, D] and scale float32 [H, T].

    The rule is that of `quantise_rows` with the whole width as one block; a number is value * scale.
    """
    values, scale = _quantised(x.float())
    return values.to(torch.int8), scale


def read_kv(kv: KVView, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Read the keys and values [Hkv, L, D] of positions low .. high - 1, as float32."""
    values = _visible(kv.values, kv.value_scale, low, high)
    if kv.keys is None:
        return _keys_from_values(kv, values, slice(low, high)), values
    return _visible(kv.keys, kv.key_scale, low, high), values


def _keys_from_values(kv: KVView, values: Tensor, positions: slice | Tensor) -> Tensor:
    """Make the keys [H, L, D] of `positions` from their values [H, L, D], in float32."""
    made = kv.key_from_value
    assert made is not None
    keys = values * made.weight.float()
    half, count = keys.shape[-1] // 2, made.cos.shape[-1]
    cos, sin = made.cos[positions], made.sin[positions]  # [L, n]
    low, high = keys[..., :count].clone(), keys[..., half : half + count].clone()
    keys[..., :count] = low * cos - high * sin
    keys[..., half : half + count] = high * cos + low * sin
    return keys


def _masked_attention(q: Tensor, kv: KVView, lo: Sequence[int], hi: Sequence[int], scale: float) -> Tensor:
    """Attend with all rows in one call; row t sees a slot whose position for t lies in lo..hi-1."""
    slots = kv.slots
    low = torch.tensor(lo, dtype=torch.int64, device=q.device)[:, None]  # [T, 1]
    high = torch.tensor(hi, dtype=torch.int64, device=q.device)[:, None]
    # steps from a row's first position to the slot: it sees the slot when that is less than its count
    ahead = (torch.arange(slots, dtype=torch.int64, device=q.device) - low) % slots  # [T, S]
    seen = ahead < high - low
    group = q.shape[1] // kv.kv_heads

    def whole(store: Tensor, factor: Tensor | None) -> Tensor:
        return store.to(q.dtype) if factor is None else (store * factor[..., None]).to(q.dtype)

    v = whole(kv.values, kv.value_scale)  # [Hkv, S, Dv]
    if kv.keys is not None:
        k = whole(kv.keys, kv.key_scale)
    else:
        # a full layer's slots are its positions, those that nobody sees yet included
        k = _keys_from_values(kv, v.float(), torch.arange(slots, dtype=torch.int64, device=q.device)).to(q.dtype)
    keys, found = k.repeat_interleave(group, dim=0), v.repeat_interleave(group, dim=0)  # [Hq, S, D]
    scores = torch.matmul(q.transpose(0, 1), keys.transpose(1, 2)).float() * scale  # [Hq, T, S]
    weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1)
    weights = weights.masked_fill(~seen, 0.0)  # a row that sees nothing is NaN before this
    return torch.matmul(weights.to(q.dtype), found).transpose(0, 1).contiguous()  # [T, Hq, Dv]
