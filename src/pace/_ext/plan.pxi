# Part of _kernels.pyx: the plan. Operators are filled from the lists of their fields (operators.h), none is named here.

cdef extern from "operators.h" nogil:
    int PACE_N_OP_KINDS, PACE_OP_gemm
    int PACE_FIELD_slot, PACE_FIELD_matrix, PACE_FIELD_vector, PACE_FIELD_columns, PACE_FIELD_real, PACE_FIELD_integer
    int PACE_FIELD_flag, PACE_FIELD_triple, PACE_FIELD_kv, PACE_FIELD_rotation
    ctypedef struct pace_field:
        const char *name
        int op, type
        size_t offset
    const pace_field *pace_fields
    const char *const *pace_op_names
    const char *const *pace_choices(int type)
    union op_union:
        pace_gemm gemm
    ctypedef struct pace_op:
        int kind, logits, head
        float *block_max
        const pace_kernels *kernels
        op_union u


cdef extern from "plan.h" nogil:
    ctypedef struct pace_plan:
        pace_op *ops
        long n_ops, max_tokens, max_seqs, max_logits
        pace_batch batch
        double *op_s
        long *op_experts
    int pace_plan_init(pace_plan *p, pace_team *team, long max_tokens, long max_seqs, long max_logits)
    void pace_plan_free(pace_plan *p)
    int pace_plan_add(pace_plan *p, const pace_op *op)
    int pace_plan_part(pace_plan *p, const pace_batch *batch, long first, long end)
    int pace_plan_head(pace_plan *p, long first)


def operators():
    """Names of the fields of every operator, in the order of the structs."""
    cdef const pace_field *f = pace_fields
    out = {pace_op_names[i].decode(): [] for i in range(PACE_N_OP_KINDS)}
    while f.name != NULL:
        out[pace_op_names[f.op].decode()].append(f.name.decode())
        f += 1
    return out


cdef int choice(const pace_field *f, value) except -1:
    """The number of a choice by name."""
    cdef const char *const *names = pace_choices(f.type)
    known = []
    cdef int i = 0
    while names[i] != NULL:
        known.append(names[i].decode())
        i += 1
    if value not in known:
        raise ValueError(f"{f.name.decode()} is {value!r}, expected one of {', '.join(known)}")
    return known.index(value)


cdef class Plan:
    """Groups of layers, slots and operators are added in order, then step() runs them."""
    cdef pace_plan p
    cdef list keep, memory, pools, reaches
    cdef pace_slot slots[64]
    cdef long slot_rows[64]
    cdef int n_slots
    cdef Team team
    cdef bint stepping
    cdef readonly long vocab_size, max_position
    cdef readonly size_t nbytes

    def __cinit__(self, Team team not None, long max_tokens, long max_seqs, long max_logits, long vocab_size,
                  long max_position):
        self.keep, self.memory, self.pools, self.reaches = [], [], [], []
        self.team, self.vocab_size, self.max_position = team, vocab_size, max_position
        for size in (max_tokens, max_seqs, max_logits, vocab_size, max_position):
            if not 1 <= size <= 0x7fffffff:
                raise ValueError(f"a plan of {max_tokens} tokens, {max_seqs} sequences, {max_logits} logit rows, a vocabulary "
                                 f"of {vocab_size} and {max_position} positions: all must be positive int32")
        team.check_open()
        if pace_plan_init(&self.p, team.team, max_tokens, max_seqs, max_logits):
            raise MemoryError("cannot allocate the plan")

    def __dealloc__(self):
        pace_plan_free(&self.p)

    def add_group(self, KVPool pool not None, reach):
        """The next group of layers: its pool, and how many tokens a query sees at most (None: all)."""
        if len(self.pools) == PACE_MAX_GROUPS:
            raise ValueError(f"more than {PACE_MAX_GROUPS} groups of layers")
        self.pools.append(pool)
        self.reaches.append(0 if reach is None else reach)

    def add_slot(self, long width, dtype, long rows, long group=0):
        if self.n_slots == 64:
            raise ValueError("more than 64 slots")
        if not 1 <= width <= 0x7fffffff or not 1 <= rows <= 0x7fffffff:
            raise ValueError(f"slot of {rows} rows of {width}: both must be positive int32")
        if dtype not in ("f32", "bf16", "int8") or (dtype == "int8" and width % PACE_MX_GROUP):
            raise ValueError(f"slot of {width} columns of {dtype}: int8 wants whole groups of {PACE_MX_GROUP}")
        if dtype == "int8" and group and (group < 16 or group > 128 or group & (group - 1)):
            raise ValueError(f"slot of int8 with groups of {group}: expected 16, 32, 64, 128, or 0 for whole rows")
        cdef pace_slot s
        s.group = 0
        cdef long step = current.row_step
        if dtype == "int8":
            s.group = group if group and group < width else width
            s.ld = ((width + 8 * ((width + s.group - 1) // s.group) + step - 1) // step | 1) * step
        elif dtype == "bf16":
            s.ld = ((2 * width + step - 1) // step | 1) * step // 2
        else:
            s.ld = (width + 15) // 16 * 16
        s.width, s.bf16, s.int8 = width, dtype == "bf16", dtype == "int8"
        memory = Memory(<size_t>rows * <size_t>s.ld * (1 if s.int8 else 2 if s.bf16 else 4) + 64)  # below 2^64: int32
        s.data = (<Memory>memory).data
        self.memory.append(memory)
        self.nbytes += memory.nbytes
        self.slots[self.n_slots], self.slot_rows[self.n_slots] = s, rows
        self.n_slots += 1
        return self.n_slots - 1

    cdef pace_slot *at(self, int i) except NULL:
        if not 0 <= i < self.n_slots:
            raise ValueError(f"slot {i} of {self.n_slots}")
        return &self.slots[i]

    cdef int fill(self, const pace_field *f, char *to, value) except -1:
        """Write one field; its memory is zero. What it points to is kept."""
        cdef float[::1] numbers
        cdef int32_t[::1] order
        cdef pace_rotation turn
        cdef pace_kv kv
        cdef int i
        if f.type == PACE_FIELD_flag:
            (<int *>to)[0] = bool(value)
        elif pace_choices(f.type) != NULL:
            (<int *>to)[0] = choice(f, "none" if value is None else value)
        elif value is None:
            return 0
        elif f.type == PACE_FIELD_slot:
            (<pace_slot *>to)[0] = self.at(value)[0]
        elif f.type == PACE_FIELD_matrix:
            (<pace_matrix *>to)[0] = (<Matrix?>value).m
            self.keep.append(value)
        elif f.type == PACE_FIELD_vector:
            # A bias is read in whole panels; of experts [count, n] each is.
            width = -(-value.shape[1] // PACE_NR) * PACE_NR if value.ndim == 2 else len(value) + PACE_NR
            padded = np.zeros((len(value) if value.ndim == 2 else 1, width), np.float32)
            padded[:, : value.shape[value.ndim - 1]] = value
            numbers = padded.reshape(-1)
            self.keep.append(padded)
            (<const float **>to)[0] = &numbers[0]
        elif f.type == PACE_FIELD_columns:
            # A kernel follows these wherever they lead.
            if not np.array_equal(np.sort(value), np.arange(len(value))):
                raise ValueError(f"{f.name.decode()} does not have each of its {len(value)} columns once")
            order = columns = np.array(value, np.int32)
            self.keep.append(columns)
            (<const int32_t **>to)[0] = &order[0]
        elif f.type == PACE_FIELD_real:
            (<float *>to)[0] = value
        elif f.type == PACE_FIELD_integer:
            (<long *>to)[0] = value
        elif f.type == PACE_FIELD_triple:
            for i in range(3):
                (<float *>to)[i] = value[i]
        elif f.type == PACE_FIELD_kv:
            group, layer = value
            pool = self.pools[group]
            if not 0 <= layer < pool.n_layers:
                raise ValueError(f"layer {layer} of a KV pool of {pool.n_layers}")
            kv = pace_pool_layer(&(<KVPool>pool).pool, layer)
            kv.group = group
            (<pace_kv *>to)[0] = kv
        else:
            cos, sin, turn.interleaved = value
            turn.cos, turn.sin = <const float *>self.at(cos).data, <const float *>self.at(sin).data
            turn.ld, turn.half = self.at(cos).ld, self.at(cos).width
            (<pace_rotation *>to)[0] = turn
        return 0

    def add(self, name, tier, bint logits, dict fields):
        """Append an operator over the token rows or the logit rows; fields: by name, as many as it has. A wrong one leaves
        the plan as it was."""
        cdef pace_op op
        cdef const pace_field *f = pace_fields
        cdef long n_kept = len(self.keep)
        memset(&op, 0, sizeof(op))
        op.kernels, op.logits, op.kind = find(tier), logits, -1
        n_filled = 0
        try:
            while f.name != NULL:
                if pace_op_names[f.op].decode() == name:
                    op.kind = f.op
                    self.fill(f, <char *>&op.u + f.offset, fields[f.name.decode()])
                    n_filled += 1
                f += 1
            if op.kind < 0 or n_filled != len(fields):
                raise ValueError(f"operator {name!r} with fields {', '.join(fields)}; known are {operators()}")
            e = pace_plan_add(&self.p, &op)
            if e == E2BIG:
                raise ValueError("a plan with too many kinds of attention layers")
            check_run(e)
        except BaseException:
            del self.keep[n_kept:]
            raise

    def set_head(self, int logits):
        """The last operator is a GEMM to this slot, the LM head: it runs on as many rows at a time as the slot has, and
        notes the maxima of the blocks of its rows: f32 [rows, blocks].

        None where it is no such GEMM, or its kernels note none."""
        cdef pace_slot *d = self.at(logits)
        cdef pace_op *op = &self.p.ops[self.p.n_ops - 1] if self.p.n_ops else NULL
        if op == NULL or op.kind != PACE_OP_gemm or op.u.gemm.dst.data != d.data or d.bf16:
            return None
        op.head = op.logits
        if op.kernels.block_max == NULL:
            return None
        maxima = np.zeros((self.slot_rows[logits], (d.width + PACE_LOGIT_BLOCK - 1) // PACE_LOGIT_BLOCK), np.float32)
        cdef float[:, ::1] a = maxima
        self.keep.append(maxima)
        op.block_max = &a[0, 0]
        return maxima

    def view(self, int i):
        """All rows of a slot as f32, uint16 or int8 [rows, width], no copy; the array keeps the memory alive."""
        cdef pace_slot *s = self.at(i)
        a = np.frombuffer(self.memory[i], np.int8 if s.int8 else np.uint16 if s.bf16 else np.float32)
        rows = self.slot_rows[i]
        return a[: rows * s.ld].reshape(rows, s.ld)[:, : s.width]

    cdef long check_table(self, KVPool pool, long reach, const int32_t[:, ::1] table, const int32_t[::1] q_start,
                          const int32_t[::1] kv_len) except -1:
        """Refuse a table that leads out of its pool where the step reads or writes; returns the blocks that it reaches."""
        cdef long s, i, begin, end, seen, reached = 0, n_seqs = kv_len.shape[0]
        if table.shape[0] < n_seqs:
            raise ValueError(f"block table of {table.shape[0]} rows for {n_seqs} sequences")
        if pool.contiguous and table.shape[1] != 1:
            raise ValueError(f"a contiguous pool wants tables of 1 column, the first block, got {table.shape[1]}")
        for s in range(n_seqs):
            end = (<long>kv_len[s] + pool.block_size - 1) // pool.block_size
            # Keys are read in groups of 32, from the first one that this step's first row sees.
            seen = <long>kv_len[s] - (<long>q_start[s + 1] - q_start[s]) - reach + 1
            begin = seen // 32 * 32 // pool.block_size if reach and seen > 0 else 0
            if pool.contiguous:
                if not -begin <= table[s, 0] <= pool.n_blocks - end:
                    raise ValueError(f"sequence {s} needs {end - begin} blocks from {table[s, 0] + begin} on, there are "
                                     f"{pool.n_blocks}")
                reached = max(reached, table[s, 0] + end)
                continue
            if end > table.shape[1]:
                raise ValueError(f"sequence {s} of length {kv_len[s]} needs {end} blocks, its table has {table.shape[1]}")
            for i in range(begin, end):
                if not 0 <= table[s, i] < pool.n_blocks:
                    raise ValueError(f"sequence {s} names block {table[s, i]} of {pool.n_blocks}")
                reached = max(reached, <long>table[s, i] + 1)
        return reached

    def step(self, const int32_t[::1] token_ids, const int32_t[::1] q_start, const int32_t[::1] kv_len, tuple block_tables,
             const int32_t[::1] logit_rows, long first=0, long end=-1):
        cdef pace_batch b
        cdef const int32_t[:, ::1] table
        cdef long s, i, n_seqs = kv_len.shape[0], n = token_ids.shape[0], n_logits = logit_rows.shape[0], last = -1, q_len
        cdef long most = self.p.max_tokens if self.p.n_ops and self.p.ops[self.p.n_ops - 1].head else self.p.max_logits
        cdef long reached[8]
        end = self.p.n_ops if end < 0 else end
        if not 0 <= first <= end <= self.p.n_ops:
            raise ValueError(f"operators {first} to {end} of {self.p.n_ops}")
        if not 1 <= n <= self.p.max_tokens or not 1 <= n_seqs <= self.p.max_seqs or n_logits > most:
            raise ValueError(f"step of {n} tokens, {n_seqs} sequences, {n_logits} logit rows; the plan holds "
                             f"{self.p.max_tokens}, {self.p.max_seqs}, {most}")
        if q_start.shape[0] != n_seqs + 1 or q_start[0] != 0 or q_start[n_seqs] != n:
            raise ValueError("q_start must run from 0 to the number of tokens, one entry per sequence and one more")
        for s in range(n_seqs):
            q_len = <long>q_start[s + 1] - q_start[s]
            if q_len < 1 or kv_len[s] < q_len:
                raise ValueError(f"sequence {s} has {q_len} rows and kv_len {kv_len[s]}")
            if kv_len[s] > self.max_position:
                raise ValueError(f"sequence {s} has length {kv_len[s]}, the model has {self.max_position} positions")
        if len(block_tables) != len(self.pools):
            raise ValueError(f"{len(block_tables)} block tables for {len(self.pools)} groups of layers")
        for i in range(len(block_tables)):
            table = block_tables[i]
            reached[i] = self.check_table(self.pools[i], self.reaches[i], table, q_start, kv_len)
            b.tables[i].blocks, b.tables[i].stride = &table[0, 0], table.shape[1]
        for i in range(n):
            if not 0 <= token_ids[i] < self.vocab_size:
                raise ValueError(f"token id {token_ids[i]} at row {i}, the vocabulary has {self.vocab_size}")
        for i in range(n_logits):
            if not last < logit_rows[i] < n:
                raise ValueError(f"logit_rows must ascend below {n}, got {logit_rows[i]} after {last}")
            last = logit_rows[i]
        b.token_ids, b.q_start, b.kv_len = &token_ids[0], &q_start[0], &kv_len[0]
        b.logit_rows = &logit_rows[0] if n_logits else NULL
        b.n_tokens, b.n_seqs, b.n_logits = n, n_seqs, n_logits
        cdef int e
        self.enter()
        try:
            for i in range(len(self.pools)):
                self.map_ahead(self.pools[i], reached[i], n_seqs)
            with nogil:
                e = pace_plan_part(&self.p, &b, first, end)
        finally:
            self.stepping = False
        check_run(e)

    cdef void map_ahead(self, KVPool pool, long reached, long n_seqs):
        with nogil:
            pace_pool_map_ahead(&pool.pool, reached, n_seqs)

    cdef int enter(self) except -1:
        """One step at a time: it writes the plan's slots and work lists."""
        self.team.check_open()
        if self.stepping:
            raise RuntimeError("the plan is running a step in another thread")
        self.stepping = True
        return 0

    def head(self, long first):
        if not self.p.n_ops or not self.p.ops[self.p.n_ops - 1].head or not 0 <= first < self.p.batch.n_logits:
            raise ValueError(f"logits from row {first} on; the last step has {self.p.batch.n_logits}")
        cdef int e
        self.enter()
        try:
            with nogil:
                e = pace_plan_head(&self.p, first)
        finally:
            self.stepping = False
        check_run(e)

    def op_seconds(self):
        return [self.p.op_s[i] for i in range(self.p.n_ops)]

    def op_experts(self):
        return [self.p.op_experts[i] for i in range(self.p.n_ops)]
