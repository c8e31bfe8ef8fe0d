"""The two Triton kernels of a linear operation: h = weight·(A·x) of all segments, and y, which reads NF4 and h.

Products run on tensor cores with float32 accumulators. An accumulator is [outputs, rows]: outputs fill the long side
of a tensor core's tile, so that a decode step with few rows wastes little of it. In the interpreter operands are
converted to float32 first (WIDE): its dot of bfloat16 is wrong.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from loramux.ops.cuda.lookup import nf4_values

# Columns of a segment's row (segments.py).
START = tl.constexpr(0)
STOP = tl.constexpr(1)
WEIGHT = tl.constexpr(2)
BUFFER = tl.constexpr(3)
OFFSETS = tl.constexpr(4)
RANKS = tl.constexpr(5)
PRODUCTS = tl.constexpr(6)
WIDTH = tl.constexpr(8)
# A column of row 0: whether all ranks are multiples of eight.
ALIGNED = tl.constexpr(1)

# Ranks and segments of one product in `_branches`.
RANKS_AT_ONCE = tl.constexpr(16)
TOGETHER = tl.constexpr(2)

# An NF4 block, a tile's rows, and the bytes of both (tiles.py).
BLOCK = tl.constexpr(64)
TILE = tl.constexpr(64)
TILE_BYTES = tl.constexpr(2048)
NESTED = tl.constexpr(256)
NESTED_BITS = tl.constexpr(8)


@triton.jit
def _dot(a, b, acc, WIDE: tl.constexpr):
    if WIDE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit(do_not_specialize=["h_rows", "capacity"])
def lora_down(
    x,
    table,
    sites,
    h,
    shares,
    arrivals,
    items,
    x_stride,
    h_rows,
    max_rank,
    capacity,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
    WIDE: tl.constexpr,
):
    """h [h_rows, PARTS, max_rank] in x's dtype; what is beyond a rank is not written.

    Grid: (tiles of ranks x tiles of rows, segments x SPLITS, PARTS). With SPLITS > 1 each program sums over a share of
    K, into shares float32 [SPLITS, h_rows, PARTS, max_rank]; the one that arrives last adds them up in their order, and
    sets its counter in arrivals int32 [PARTS, capacity, tiles] back to zero. The first program of a segment and part
    leaves its rank and the address of its B in items int64 [PARTS, capacity, 2]. OVERLAP: the next launch, which waits
    for this one where it reads what is written here, may begin at once.
    """
    if OVERLAP:
        gdc_launch_dependents()
    rank_tiles = tl.cdiv(max_rank, BLOCK_R)
    rank_tile = tl.program_id(0) % rank_tiles
    row_tile = tl.program_id(0) // rank_tiles
    segment = tl.program_id(1) // SPLITS
    split = tl.program_id(1) % SPLITS
    part = tl.program_id(2)
    if segment < tl.load(table):
        row = table + (segment + 1) * WIDTH
        start = tl.load(row + START).to(tl.int32)
        stop = tl.load(row + STOP).to(tl.int32)
        buffer = tl.load(row + BUFFER)
        offsets = tl.load(row + OFFSETS).to(tl.pointer_type(tl.int64))
        ranks = tl.load(row + RANKS).to(tl.pointer_type(tl.int32))
        site = tl.load(sites + part)
        rank = tl.load(ranks + site)
        if (tl.program_id(0) == 0) & (split == 0):
            item = items + (part * capacity + segment) * 2
            tl.store(item, rank.to(tl.int64))
            tl.store(item + 1, buffer + tl.load(offsets + site * 4 + 1) * 2)
        if (rank_tile * BLOCK_R < rank) & (start + row_tile * BLOCK_T < stop):
            weight = tl.load(row + WEIGHT).to(tl.int32).to(tl.float32, bitcast=True)
            factor = (buffer + tl.load(offsets + site * 4) * 2).to(tl.pointer_type(x.dtype.element_ty))
            factor = tl.multiple_of(factor, 16)
            j = rank_tile * BLOCK_R + tl.arange(0, BLOCK_R)
            t = start + row_tile * BLOCK_T + tl.arange(0, BLOCK_T)
            k = tl.arange(0, BLOCK_K)
            a_at = factor + j[:, None] * K + k[None, :]
            x_at = x + t[None, :].to(tl.int64) * x_stride + k[:, None]
            chunk: tl.constexpr = (K // BLOCK_K + SPLITS - 1) // SPLITS
            acc = tl.zeros((BLOCK_R, BLOCK_T), dtype=tl.float32)
            for i in range(split * chunk, tl.minimum(split * chunk + chunk, K // BLOCK_K)):
                a = tl.load(a_at + i * BLOCK_K, mask=j[:, None] < rank, other=0.0)
                b = tl.load(x_at + i * BLOCK_K, mask=t[None, :] < stop, other=0.0)
                acc = _dot(a, b, acc, WIDE)
            first = tl.load(row + PRODUCTS) - start
            at = ((first + t[None, :]) * PARTS + part) * max_rank + j[:, None]
            written = (j[:, None] < rank) & (t[None, :] < stop)
            if SPLITS == 1:
                tl.store(h + at, (acc * weight).to(h.dtype.element_ty), mask=written)
            else:
                stride = h_rows * PARTS * max_rank
                tl.store(shares + split * stride + at, acc, mask=written)
                arrived = arrivals + (part * capacity + segment) * tl.num_programs(0) + tl.program_id(0)
                # All threads have stored before one of them says so.
                tl.debug_barrier()
                if tl.atomic_add(arrived, 1, sem="acq_rel") == SPLITS - 1:
                    acc = tl.zeros((BLOCK_R, BLOCK_T), dtype=tl.float32)
                    for other in tl.range(SPLITS, num_stages=1, loop_unroll_factor=4):
                        acc += tl.load(shares + other * stride + at, mask=written, other=0.0, cache_modifier=".cg")
                    tl.store(arrived, 0)
                    tl.store(h + at, (acc * weight).to(h.dtype.element_ty), mask=written)


@triton.jit
def _read(factor, rank, j, n, rows, covers):
    """Rows n of some segments' B, their ranks j, zero elsewhere: [outputs, segments, ranks]."""
    wanted = (n < rows)[:, None, None] & covers[None, :, None] & (j < rank[None, :, None])
    return tl.load(factor[None, :, None] + n[:, None, None] * rank[None, :, None] + j, mask=wanted, other=0.0)


@triton.jit
def _branches(
    acc,
    table,
    items,
    h,
    max_rank,
    capacity,
    n,
    rows,
    t,
    part,
    first,
    step,
    DTYPE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    WIDE: tl.constexpr,
):
    """acc [outputs, rows] plus B·h of the segments that cover a row of t; B is read for those alone.

    A walk over pairs of a segment and sixteen of its ranks, TOGETHER of them in one product: one after another, each
    would wait for its own addresses and its own factor. This is the `first` of `step` programs that share the walk.
    Where another row's adapter stands a row meets zeros, and its own ranks come in sixteens: its sum does not depend on
    the others.
    """
    chunks = max_rank // RANKS_AT_ONCE
    total = tl.load(table).to(tl.int32) * chunks
    aligned = tl.load(table + ALIGNED) != 0
    top = tl.min(t, axis=0)
    r = tl.arange(0, RANKS_AT_ONCE)
    for turn in range(first * TOGETHER, total, step * TOGETHER):
        pair = turn + tl.arange(0, TOGETHER)
        there = pair < total
        segment = pair // chunks
        row = table + (segment + 1) * WIDTH
        item = items + (part * capacity + segment) * 2
        start = tl.load(row + START, mask=there, other=0).to(tl.int32)
        stop = tl.load(row + STOP, mask=there, other=0).to(tl.int32)
        product = tl.load(row + PRODUCTS, mask=there, other=0).to(tl.int32)
        rank = tl.load(item, mask=there, other=0).to(tl.int32)
        factor = tl.load(item + 1, mask=there, other=0).to(tl.pointer_type(DTYPE))
        begin = pair % chunks * RANKS_AT_ONCE
        covers = (start < top + BLOCK_T) & (stop > top) & (begin < rank)
        if tl.max(covers.to(tl.int32), axis=0) > 0:
            j = begin[None, :, None] + r[None, None, :]
            factor = tl.multiple_of(factor, [16])
            # Sixteen bytes at a time where each row of B begins at a multiple of them. multiple_of would mark the ranks
            # in the other branch, too.
            if aligned:
                b = _read(factor, rank // 8 * 8, j, n, rows, covers)
            else:
                b = _read(factor, rank, j, n, rows, covers)
            wanted = covers[None, :, None] & (j < rank[None, :, None])
            h_row = (product - start)[None, :, None] + t[:, None, None]
            inside = (t[:, None, None] >= start[None, :, None]) & (t[:, None, None] < stop[None, :, None])
            a = tl.load(h + (h_row * PARTS + part) * max_rank + j, mask=inside & wanted, other=0.0)
            acc = _dot(
                tl.reshape(b, (BLOCK_N, TOGETHER * RANKS_AT_ONCE)),
                tl.trans(tl.reshape(a, (BLOCK_T, TOGETHER * RANKS_AT_ONCE))),
                acc,
                WIDE,
            )
    return acc


@triton.jit
def _extras(acc, table, sites, n, rows, t, part, DTYPE: tl.constexpr, BLOCK_T: tl.constexpr):
    """acc with the segments' lora_bias added and, where there is a scale, scaled; acc is the sum of everything else."""
    top = tl.min(t, axis=0)
    site = tl.load(sites + part)
    for segment in range(0, tl.load(table).to(tl.int32)):
        row = table + (segment + 1) * WIDTH
        start = tl.load(row + START).to(tl.int32)
        stop = tl.load(row + STOP).to(tl.int32)
        if (start < top + BLOCK_T) & (stop > top):
            offsets = tl.load(row + OFFSETS).to(tl.pointer_type(tl.int64)) + site * 4
            buffer = tl.load(row + BUFFER)
            inside = ((t >= start) & (t < stop))[None, :]
            bias_at = tl.load(offsets + 2)
            if bias_at >= 0:
                weight = tl.load(row + WEIGHT).to(tl.int32).to(tl.float32, bitcast=True)
                bias = tl.load((buffer + bias_at * 2).to(tl.pointer_type(DTYPE)) + n, mask=n < rows, other=0.0)
                acc += tl.where(inside, weight * bias.to(tl.float32)[:, None], 0.0)
            scale_at = tl.load(offsets + 3)
            if scale_at >= 0:
                scale = tl.load((buffer + scale_at * 2).to(tl.pointer_type(tl.float32)) + n, mask=n < rows, other=0.0)
                acc *= tl.where(inside, scale[:, None], 1.0)
    return acc


@triton.jit
def _finish(
    acc,
    y,
    bias,
    table,
    sites,
    n,
    rows,
    column,
    t,
    T,
    part,
    COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
    EXTRAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    DTYPE: tl.constexpr = y.dtype.element_ty
    if EXTRAS:
        acc = _extras(acc, table, sites, n, rows, t, part, DTYPE, BLOCK_T)
    if BIAS:
        acc += tl.load(bias + column + n, mask=n < rows, other=0.0)[:, None]
    at = t[None, :].to(tl.int64) * COLUMNS + column + n[:, None]
    tl.store(y + at, acc.to(DTYPE), mask=(n[:, None] < rows) & (t[None, :] < T))


@triton.jit(do_not_specialize=["T", "capacity"])
def nf4_linear(
    x,
    y,
    codes,
    absmax,
    group_scales,
    tables,
    offsets,
    values,
    bias,
    partial,
    arrivals,
    table,
    sites,
    items,
    h,
    T,
    x_stride,
    max_rank,
    capacity,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOUBLE: tl.constexpr,
    BIAS: tl.constexpr,
    LORA: tl.constexpr,
    EXTRAS: tl.constexpr,
    SHARED: tl.constexpr,
    SPLITS: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    WAIT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """y [T, COLUMNS] = scale·(W·x + Σ B·h + lora_bias) + bias, the parts side by side.

    Grid: tiles of outputs x SPLITS x tiles of rows, the last one fastest, so that neighbours share weights in the
    cache. With SPLITS > 1 each program sums over a share of K; the one that arrives last adds the shares up in their
    order, so that the sum does not depend on who that is. SHARED spreads the segments over these programs too: then a
    row's order of summation depends on the segments before its own. WAIT: this was launched while lora_down may still
    run, whose h is read from here on.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    blocks: tl.constexpr = K // BLOCK
    row_tiles = tl.cdiv(T, BLOCK_T)
    row_tile = tl.program_id(0) % row_tiles
    split = tl.program_id(0) // row_tiles % SPLITS
    place = tl.program_id(0) // row_tiles // SPLITS

    # Which part, and where its rows, tiles, columns and groups begin.
    part = 0
    begins = 0
    rows = ROWS[0]
    tile = 0
    column = 0
    group = 0
    for p in tl.static_range(1, PARTS):
        begins += (ROWS[p - 1] + BLOCK_N - 1) // BLOCK_N
        if place >= begins:
            part = p
            rows = ROWS[p]
    for p in tl.static_range(1, PARTS):
        if part >= p:
            place -= (ROWS[p - 1] + BLOCK_N - 1) // BLOCK_N
            tile += (ROWS[p - 1] + TILE - 1) // TILE
            column += ROWS[p - 1]
            group += (ROWS[p - 1] * blocks + NESTED - 1) // NESTED

    n = place * BLOCK_N + tl.arange(0, BLOCK_N)
    t = row_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    half = tl.arange(0, 32)
    # A place may end beyond the part's last tile; what it reads instead is never stored.
    tile_of = tile + tl.minimum(n // TILE, (rows - 1) // TILE)
    code_at = codes + (tile_of * (blocks * TILE_BYTES) + n % TILE * 32)[:, None] + half[None, :]
    absmax_at = absmax + tile_of * (blocks * TILE) + n % TILE
    x_at = x + t[None, :].to(tl.int64) * x_stride + half[:, None]
    present = t[None, :] < T

    chunk: tl.constexpr = (blocks + SPLITS - 1) // SPLITS
    begin = split * chunk
    end = tl.minimum(begin + chunk, blocks)
    # Shares are rounded up, so that the last may have no block; what is read for its first one then is never used.
    near = tl.minimum(begin, blocks - 1)
    # Indices of absmax are read two blocks ahead and looked up one block ahead: a chain of two latencies.
    quantized = tl.load(absmax_at + near * TILE)
    if DOUBLE:
        tables += part * NESTED
        offset = tl.load(offsets + part)
        in_group = tl.minimum(n, rows - 1) * blocks
        scale = tl.load(tables + quantized.to(tl.int32))
        scale = scale * tl.load(group_scales + group + ((in_group + near) >> NESTED_BITS)) + offset
    else:
        scale = quantized
    quantized = tl.load(absmax_at + tl.minimum(near + 1, blocks - 1) * TILE)
    acc = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
    for turn in range(begin, end, UNROLL):
        for ahead in tl.static_range(UNROLL):
            block = turn + ahead
            packed = tl.load(code_at + block * TILE_BYTES)
            x_first = tl.load(x_at + block * BLOCK, mask=present, other=0.0)
            x_second = tl.load(x_at + block * BLOCK + 32, mask=present, other=0.0)
            first, second = nf4_values(packed, values, DTYPE, ASSEMBLY)
            product = _dot(first, x_first, tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32), WIDE)
            product = _dot(second, x_second, product, WIDE)
            acc += product * scale[:, None]
            if DOUBLE:
                scale = tl.load(tables + quantized.to(tl.int32))
                following = tl.minimum(block + 1, blocks - 1)
                scale = scale * tl.load(group_scales + group + ((in_group + following) >> NESTED_BITS)) + offset
            else:
                scale = quantized
            quantized = tl.load(absmax_at + tl.minimum(block + 2, blocks - 1) * TILE)

    if LORA:
        if WAIT:
            gdc_wait()
        if SHARED:
            acc = _branches(
                acc, table, items, h, max_rank, capacity, n, rows, t, part, split, SPLITS,
                DTYPE, PARTS, BLOCK_N, BLOCK_T, WIDE,
            )  # fmt: skip
        elif split == 0:
            acc = _branches(
                acc, table, items, h, max_rank, capacity, n, rows, t, part, 0, 1,
                DTYPE, PARTS, BLOCK_N, BLOCK_T, WIDE,
            )  # fmt: skip

    if SPLITS == 1:
        _finish(acc, y, bias, table, sites, n, rows, column, t, T, part, COLUMNS, BIAS, EXTRAS, BLOCK_T)
    else:
        target = tl.program_id(0) // row_tiles // SPLITS * row_tiles + row_tile
        share = tl.arange(0, BLOCK_N)[:, None] * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
        stride = BLOCK_N * BLOCK_T
        tl.store(partial + (target * SPLITS + split).to(tl.int64) * stride + share, acc)
        # All threads have stored before one of them says so.
        tl.debug_barrier()
        if tl.atomic_add(arrivals + target, 1, sem="acq_rel") == SPLITS - 1:
            acc = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
            for other in range(SPLITS):
                at = partial + (target * SPLITS + other).to(tl.int64) * stride + share
                acc += tl.load(at, cache_modifier=".cg")
            tl.store(arrivals + target, 0)
            _finish(acc, y, bias, table, sites, n, rows, column, t, T, part, COLUMNS, BIAS, EXTRAS, BLOCK_T)
