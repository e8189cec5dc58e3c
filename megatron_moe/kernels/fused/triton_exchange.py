"""The kernels of the fused all-to-all, in plain Triton: no inline assembly and no device library, so that the interpreter runs them too.

Pointers of other ranks' memory come as int64 tables [WORLD]. They become pointers inside, and only then is their alignment stated:
before the cast the compiler forgets it, and stores of 16 bytes become 2-byte ones.

Signals: every rank has a pad [CHANNELS, WORLD] int32 of epochs, which grow and are never reset. A rank enters a meeting by writing its
epoch into everyone's pad (release), and leaves it when everyone's epoch is in its own (acquire). Epochs are counted on the device, so
that a recorded graph may run again. A wait that exceeds `spins` is given up: `error` then says who was missing, and nothing waits
any more.
"""
# T tokens here, K experts per token, H row width, R rows that fit here, E experts, EL experts here, WORLD ranks, P2 = next power of two

from megatron_moe.kernels.jit import constexpr, jit, tl


@jit
def _meet(signal_ptrs, epochs, error, me, spins, WORLD: constexpr, CHANNEL: constexpr):
    """One program enters the meeting of all ranks and waits for them. Returns the epoch."""
    epoch = tl.load(epochs + CHANNEL) + 1
    for i in tl.static_range(WORLD):
        pad = tl.load(signal_ptrs + (me + i) % WORLD).to(tl.pointer_type(tl.int32))
        tl.atomic_xchg(pad + CHANNEL * WORLD + me, epoch, sem="release", scope="sys")
    mine = tl.load(signal_ptrs + me).to(tl.pointer_type(tl.int32)) + CHANNEL * WORLD
    left = tl.where(tl.load(error) == 0, spins, 0)
    for i in tl.static_range(WORLD):
        seen = tl.atomic_add(mine + i, 0, sem="acquire", scope="sys")
        while (seen < epoch) & (left > 0):
            seen = tl.atomic_add(mine + i, 0, sem="acquire", scope="sys")
            left -= 1
        if seen < epoch:
            tl.store(error, 1 + CHANNEL * WORLD + i)
    tl.store(epochs + CHANNEL, epoch)
    return epoch


@jit
def _is_last(ticket):
    """True in one program, the last to arrive: what the others wrote, anywhere, it may announce."""
    tl.debug_barrier()
    number = tl.atomic_add(ticket, 1, sem="acq_rel", scope="sys")
    is_last = number == tl.num_programs(0) - 1
    if is_last:
        tl.atomic_xchg(ticket, 0, sem="relaxed", scope="gpu")
    return is_last


@jit(do_not_specialize=["me", "spins"])
def meet_kernel(
    signal_ptrs,  # int64 [WORLD]: everyone's pad
    epochs,  # int32 [CHANNELS], of this rank
    error,  # int32 [1]
    me,
    spins,
    WORLD: constexpr,
    CHANNEL: constexpr,
):
    """One program: nobody leaves before all have entered."""
    _meet(signal_ptrs, epochs, error, me, spins, WORLD, CHANNEL)


# ---------------------------------------------------------------- plan


@jit
def _tile(ids, first, T, K: constexpr, KP2: constexpr, E: constexpr, BT: constexpr):
    """Of BT tokens from `first`: (token, choice, whether there is such an assignment, its expert or E), flat [BT * KP2]."""
    slot = tl.arange(0, BT * KP2)
    token, choice = first + slot // KP2, slot % KP2
    is_there = (token < T) & (choice < K)
    expert = tl.load(ids + token * K + choice, mask=is_there, other=-1).to(tl.int32)
    return token, choice, is_there, tl.where(expert < 0, E, expert)


@jit
def count_kernel(
    ids,  # int64 [T, K], -1: dropped
    block_counts,  # int32 [blocks, E] out: rows of each expert among the tokens of a block
    T,
    steps,  # tiles of BT tokens per block
    K: constexpr,
    KP2: constexpr,
    E: constexpr,
    EP2: constexpr,
    BT: constexpr,
):
    """A program per block of tokens."""
    block = tl.program_id(0)
    e = tl.arange(0, EP2)
    counts = tl.zeros((EP2,), tl.int32)
    for step in range(steps):
        _, _, _, expert = _tile(ids, (block * steps + step) * BT, T, K, KP2, E, BT)
        counts += tl.sum((expert[:, None] == e[None, :]).to(tl.int32), axis=0)
    tl.store(block_counts + block * E + e, counts, mask=e < E)


@jit(do_not_specialize=["me", "spins"])
def publish_kernel(
    block_counts,  # int32 [blocks, E]; out: those of the blocks before each block
    count_ptrs,  # int64 [WORLD]: everyone's int32 [2, WORLD, E], by turns
    signal_ptrs,
    epochs,
    error,
    base,  # int32 [E] out: the row of my first assignment to expert e, at the owner of e
    start,  # int32 [EL] out: the first row of each expert here,
    filled,  # int32 [EL] out: the row behind its last,
    ends,  # int32 [EL] out: and the same with padding, not beyond R
    info,  # int32 [4] out: rows here, most rows of any rank, my rows for others, rows of others here
    needed,  # int32 [1]: the largest `most rows` so far
    blocks,
    R,
    me,
    spins,
    WORLD: constexpr,
    E: constexpr,
    EL: constexpr,
    EP2: constexpr,
    ALIGN: constexpr,
    NB: constexpr,  # blocks at a time
):
    """One program: everyone learns everyone's counts, and with them where its rows go."""
    e, b = tl.arange(0, EP2), tl.arange(0, NB)
    is_expert = e < E
    mine = tl.zeros((EP2,), tl.int32)
    for first in range(0, blocks, NB):
        at = block_counts + (first + b)[:, None] * E + e[None, :]
        mask = ((first + b) < blocks)[:, None] & is_expert[None, :]
        counts = tl.load(at, mask=mask, other=0)
        tl.store(at, mine[None, :] + tl.cumsum(counts, axis=0) - counts, mask=mask)
        mine += tl.sum(counts, axis=0)
    turn = (tl.load(epochs + 0) + 1) % 2  # a rank may be one meeting ahead of another, and write while that one reads
    for i in tl.static_range(WORLD):
        table = tl.load(count_ptrs + (me + i) % WORLD).to(tl.pointer_type(tl.int32))
        tl.store(table + (turn * WORLD + me) * E + e, mine, mask=is_expert)
    tl.debug_barrier()
    _meet(signal_ptrs, epochs, error, me, spins, WORLD, 0)
    tl.debug_barrier()
    table = tl.load(count_ptrs + me).to(tl.pointer_type(tl.int32)) + turn * WORLD * E
    total, before = tl.zeros((EP2,), tl.int32), tl.zeros((EP2,), tl.int32)
    for r in tl.static_range(WORLD):
        counts = tl.load(table + r * E + e, mask=is_expert, other=0, volatile=True)
        before += tl.where(r < me, counts, 0)
        total += counts
    padded = (total + ALIGN - 1) // ALIGN * ALIGN
    owner = e // EL
    global_start = tl.cumsum(padded, axis=0) - padded
    tl.store(base + e, global_start, mask=is_expert)  # to be read at other places of the vector
    tl.debug_barrier()
    local_start = global_start - tl.load(base + owner * EL, mask=is_expert, other=0)
    tl.debug_barrier()
    tl.store(base + e, local_start + before, mask=is_expert)
    is_here = is_expert & (owner == me)
    local = e - me * EL
    tl.store(start + local, local_start, mask=is_here)
    tl.store(filled + local, tl.minimum(local_start + total, R), mask=is_here)
    tl.store(ends + local, tl.minimum(local_start + padded, R), mask=is_here)
    most = 0
    for r in tl.static_range(WORLD):
        most = tl.maximum(most, tl.sum(tl.where(owner == r, padded, 0), axis=0))
    mine_here = tl.sum(tl.where(is_here, mine, 0), axis=0)
    tl.store(info, tl.sum(tl.where(is_here, padded, 0), axis=0))
    tl.store(info + 1, most)
    tl.store(info + 2, tl.sum(mine, axis=0) - mine_here)
    tl.store(info + 3, tl.sum(tl.where(is_here, total, 0), axis=0) - mine_here)
    tl.store(needed, tl.maximum(tl.load(needed), most))


@jit
def place_kernel(
    ids,  # int64 [T, K]
    blocks_before,  # int32 [blocks, E]
    base,  # int32 [E]
    owner_TK,  # int32 [T, K] out, a token's choices by ascending expert: the rank that owns it, -1 for none,
    row_TK,  # int32 [T, K] out: the row there,
    choice_TK,  # int32 [T, K] out: and which choice it is
    T,
    R,
    steps,
    K: constexpr,
    KP2: constexpr,
    E: constexpr,
    EL: constexpr,
    EP2: constexpr,
    BT: constexpr,
):
    """A program per block of tokens. Rows of an expert keep the order of tokens and choices: no atomics, the same in every run."""
    block = tl.program_id(0)
    e = tl.arange(0, EP2)
    next_row = tl.load(base + e, mask=e < E, other=0) + tl.load(blocks_before + block * E + e, mask=e < E, other=0)
    for step in range(steps):
        token, choice, is_there, expert = _tile(ids, (block * steps + step) * BT, T, K, KP2, E, BT)
        one_hot = (expert[:, None] == e[None, :]).to(tl.int32)
        row = tl.sum(one_hot * (next_row[None, :] + tl.cumsum(one_hot, axis=0) - 1), axis=1)
        next_row += tl.sum(one_hot, axis=0)
        owner = tl.where((expert < E) & (row < R), expert // EL, -1)
        key = tl.reshape(tl.where(is_there, expert, E + 1) * KP2 + choice, (BT, KP2))
        place = tl.reshape(tl.sum((key[:, None, :] < key[:, :, None]).to(tl.int32), axis=2), (BT * KP2,))
        at = token * K + place
        tl.store(owner_TK + at, owner, mask=is_there)
        tl.store(row_TK + at, row, mask=is_there)
        tl.store(choice_TK + at, choice, mask=is_there)


# ---------------------------------------------------------------- push


@jit(do_not_specialize=["me", "spins"])
def send_kernel(
    x,  # [T, H]
    weights,  # [T, K], read with HAS_W
    owner_TK,
    row_TK,
    choice_TK,
    x_ptrs,  # int64 [WORLD]: everyone's rows [R, H]
    weight_ptrs,  # int64 [WORLD]: everyone's row weights [R]
    signal_ptrs,
    epochs,
    error,
    ticket,  # int32 [1], zero
    me,
    spins,
    T,
    H: constexpr,
    K: constexpr,
    WORLD: constexpr,
    BH: constexpr,
    HAS_W: constexpr,
    DT: constexpr,
    WDT: constexpr,
):
    """Any number of programs: a row is read once, and written to each of its owners. Ends when everyone's rows are here."""
    column = tl.arange(0, BH)
    token = tl.program_id(0).to(tl.int64)
    while token < T:
        for first in tl.static_range(0, H, BH):
            is_column = first + column < H
            row_of_x = tl.load(x + token * H + first + column, mask=is_column, other=0.0)
            for j in tl.static_range(K):
                owner = tl.load(owner_TK + token * K + j)
                if owner >= 0:
                    row = tl.load(row_TK + token * K + j).to(tl.int64)
                    there = tl.multiple_of(tl.load(x_ptrs + owner).to(tl.pointer_type(DT)), 16)
                    tl.store(there + row * H + first + column, row_of_x, mask=is_column)
                    if HAS_W and first == 0:
                        weight = tl.load(weights + token * K + tl.load(choice_TK + token * K + j))
                        tl.store(tl.load(weight_ptrs + owner).to(tl.pointer_type(WDT)) + row, weight)
        token += tl.num_programs(0)
    if _is_last(ticket):  # who waits last cannot be waited for by programs that have not started
        _meet(signal_ptrs, epochs, error, me, spins, WORLD, 1)


@jit
def land_kernel(
    received,  # [R, H], written by all ranks
    received_weights,  # [R], read with HAS_W
    start,  # int32 [EL]
    filled,  # int32 [EL]
    rows,  # [rows, H] out: a copy of its own
    row_weights,  # [rows] out, with HAS_W
    num_rows,
    H: constexpr,
    EL: constexpr,
    ELP2: constexpr,
    BH: constexpr,
    HAS_W: constexpr,
):
    """Any number of programs. Rows of nobody - between experts, and behind the last - become zeros."""
    e = tl.arange(0, ELP2)
    first_row = tl.load(start + e, mask=e < EL, other=2147483647)
    end_row = tl.load(filled + e, mask=e < EL, other=0)
    column = tl.arange(0, BH)
    row = tl.program_id(0)
    while row < num_rows:
        is_somebodys = tl.sum(((first_row <= row) & (row < end_row)).to(tl.int32), axis=0) > 0
        for first in tl.static_range(0, H, BH):
            is_column = first + column < H
            at = row.to(tl.int64) * H + first + column
            tl.store(rows + at, tl.load(received + at, mask=is_column & is_somebodys, other=0.0), mask=is_column)
        if HAS_W:
            tl.store(row_weights + row, tl.load(received_weights + row, mask=is_somebodys, other=0.0))
        row += tl.num_programs(0)


# ---------------------------------------------------------------- pull


@jit
def stage_kernel(
    rows,  # [rows, H]
    scalars,  # [rows], read with HAS_S
    ends,  # int32 [EL]
    staged,  # [R, H] out, read by all ranks
    staged_scalars,  # [R] out
    num_rows,
    H: constexpr,
    EL: constexpr,
    BH: constexpr,
    HAS_S: constexpr,
):
    """Any number of programs: the rows of experts to where others find them."""
    end = tl.minimum(tl.load(ends + EL - 1), num_rows)
    column = tl.arange(0, BH)
    row = tl.program_id(0)
    while row < end:
        for first in tl.static_range(0, H, BH):
            at = row.to(tl.int64) * H + first + column
            tl.store(staged + at, tl.load(rows + at, mask=first + column < H), mask=first + column < H)
        if HAS_S:
            tl.store(staged_scalars + row, tl.load(scalars + row))
        row += tl.num_programs(0)


@jit
def gather_sum_kernel(
    row_ptrs,  # int64 [WORLD]: everyone's rows [R, H]
    scalar_ptrs,  # int64 [WORLD]: everyone's [R]
    owner_TK,
    row_TK,
    choice_TK,
    out,  # [T, H]
    scalars,  # [T, K] out, with HAS_S: zeros before
    T,
    H: constexpr,
    K: constexpr,
    BH: constexpr,
    HAS_S: constexpr,
    DT: constexpr,
    WDT: constexpr,
):
    """A program per token and BH columns: its rows are added in WDT, by expert within a rank, and then the ranks' sums by rank."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BH + tl.arange(0, BH)
    is_column = column < H
    total, of_rank = tl.zeros((BH,), WDT), tl.zeros((BH,), WDT)
    rank = -1
    for j in tl.static_range(K):  # unrolled and without a branch: K independent reads under way
        owner = tl.load(owner_TK + token * K + j, mask=token < T, other=-1)
        row = tl.load(row_TK + token * K + j, mask=token < T, other=0).to(tl.int64)
        there = tl.multiple_of(tl.load(row_ptrs + tl.maximum(owner, 0)).to(tl.pointer_type(DT)), 16)
        value = tl.load(there + row * H + column, mask=is_column & (owner >= 0), other=0.0).to(WDT)
        total = tl.where(owner == rank, total, total + of_rank)
        of_rank = tl.where(owner == rank, of_rank + value, value)
        rank = owner
        if HAS_S:  # noqa: SIM102 - known when it is compiled
            if (tl.program_id(1) == 0) & (owner >= 0):
                scalar = tl.load(tl.load(scalar_ptrs + owner).to(tl.pointer_type(WDT)) + row)
                tl.store(scalars + token * K + tl.load(choice_TK + token * K + j), scalar)
    tl.store(out + token * H + column, (total + of_rank).to(DT), mask=is_column & (token < T))
