# Part of _kernels.pyx: packed weights, the KV cache's memory, and the plan that runs on them.

cdef extern from "plan.h" nogil:
    ctypedef struct pace_matrix:
        bf16 *data
        size_t bytes
        long n, k, k_pad, n_panels
    int pace_matrix_init(pace_matrix *w, long n, long k)
    void pace_matrix_free(pace_matrix *w)
    int pace_matrix_pack(pace_matrix *w, pace_team *team, const pace_kernels *kernels, const void *src, int dtype,
                         long ld, long rows, long at, int mode)
    ctypedef struct pace_pool:
        size_t bytes
        long n_mapped
    int pace_pool_init(pace_pool *pool, long n_layers, long n_blocks, const pace_kv *shape)
    void pace_pool_free(pace_pool *pool)
    pace_kv pace_pool_layer(const pace_pool *pool, long layer)
    void pace_pool_copy(const pace_pool *pool, long src, long dst, long n_tokens)
    void pace_pool_map_ahead(pace_pool *pool, long reached, long n_seqs)
    int PACE_EMBED, PACE_NORM, PACE_GEMM, PACE_ANGLES, PACE_ROPE_KV, PACE_ATTENTION, PACE_SELECT
    struct embed_op:
        const pace_matrix *table
        float *x
        long ldx
        float scale
    struct gemm_op:
        pace_gemm g
        long n_panels
        float *block_max
    struct angles_op:
        const float *inv_freq
        float *cos
        float *sin
        long half
        float factor
    struct select_op:
        const char *src
        char *dst
        size_t row_bytes, src_stride, dst_stride
    union op_union:
        embed_op embed
        pace_norm norm
        gemm_op gemm
        angles_op angles
        pace_rope_kv rope
        pace_attention attention
        select_op select
    ctypedef struct pace_op:
        int kind, logits, head
        const pace_kernels *kernels
        op_union u
    ctypedef struct pace_batch:
        const int32_t *token_ids
        const int32_t *q_start
        const int32_t *kv_len
        const int32_t *block_tables
        const int32_t *logit_rows
        long n_tokens, n_seqs, n_logits, table_stride
    ctypedef struct pace_plan:
        pace_op *ops
        pace_team *team
        long n_ops, max_tokens, max_seqs, max_logits
        pace_batch batch
        double *op_s
    int pace_plan_init(pace_plan *p, pace_team *team, long max_tokens, long max_seqs, long max_logits, long n_heads,
                       long n_kv_heads, long head_dim)
    void pace_plan_free(pace_plan *p)
    pace_op *pace_plan_add(pace_plan *p, int kind, const pace_kernels *kernels)
    int pace_plan_step(pace_plan *p, const pace_batch *batch)
    int pace_plan_head(pace_plan *p, long first)


cdef class Matrix:
    cdef pace_matrix w
    cdef readonly long n, k

    def __cinit__(self, long n, long k):
        if n < 1 or k < 1:
            raise ValueError(f"matrix is [{n}, {k}], both must be positive")
        if pace_matrix_init(&self.w, n, k):
            raise MemoryError(f"cannot allocate a packed matrix [{n}, {k}]")
        self.n, self.k = n, k

    def __dealloc__(self):
        pace_matrix_free(&self.w)

    @property
    def nbytes(self):
        return self.w.bytes

    def pack(self, Team team, const unsigned char[:, ::1] src, int dtype, long at, int mode):
        cdef long rows = src.shape[0], k = self.k, most
        if dtype not in (0, 1, 2) or mode not in (0, 1, 2) or rows < 1 or src.shape[1] != k * (4 if dtype == 2 else 2):
            raise ValueError(f"source rows have {src.shape[1]} bytes, the matrix wants {k} elements of type {dtype}")
        most = at + (rows if mode == 0 else (rows + 15) // 16 * 32 - 16 * (mode == 1))
        if at < 0 or at % 16 or most > self.w.n_panels * PACE_NR:
            raise ValueError(f"{rows} rows at {at} do not fit a packed matrix of {self.n} rows")
        cdef const void *p = &src[0, 0]
        cdef int e
        with nogil:
            e = pace_matrix_pack(&self.w, team.team, current, p, dtype, k, rows, at, mode)
        check_run(e)

    def unpack(self):
        out = np.empty((self.n, self.k), np.float32)
        cdef float[:, ::1] o = out
        cdef long i
        with nogil:
            for i in range(self.n):
                current.unpack_row(&o[i, 0], self.w.data, i, self.k, self.w.k_pad)
        return out


cdef class KVPool:
    cdef pace_pool pool
    cdef readonly long n_layers, n_kv_heads, head_dim, n_blocks, block_size
    cdef readonly bint contiguous

    def __cinit__(self, long n_layers, long n_kv_heads, long head_dim, long n_blocks, long block_size, bint int8,
                  bint contiguous):
        cdef pace_kv shape
        if min(n_layers, n_kv_heads, n_blocks) < 1:
            raise ValueError(f"KV pool of {n_layers} layers, {n_kv_heads} heads, {n_blocks} blocks: all must be positive")
        if head_dim % 16 or not 16 <= head_dim <= 256:
            raise ValueError(f"head_dim is {head_dim}, expected a multiple of 16 up to 256")
        if block_size < 16 or block_size & (block_size - 1):
            raise ValueError(f"block_size is {block_size}, expected a power of two from 16 on")
        self.n_layers, self.n_kv_heads, self.head_dim = n_layers, n_kv_heads, head_dim
        self.n_blocks, self.block_size, self.contiguous = n_blocks, block_size, contiguous
        memset(&shape, 0, sizeof(shape))
        shape.block, shape.n_kv_heads, shape.head_dim = block_size, n_kv_heads, head_dim
        shape.int8, shape.contiguous = int8, contiguous
        if pace_pool_init(&self.pool, n_layers, n_blocks, &shape):
            raise MemoryError(f"cannot allocate a KV pool of {n_blocks} blocks of {block_size} tokens")

    def __dealloc__(self):
        pace_pool_free(&self.pool)

    @property
    def nbytes(self):
        return self.pool.bytes

    @property
    def n_mapped(self):
        return self.pool.n_mapped

    def copy(self, long src, long dst, long n_tokens):
        if not 0 <= src < self.n_blocks or not 0 <= dst < self.n_blocks or src == dst:
            raise ValueError(f"copy of block {src} to {dst}: expected two different blocks of {self.n_blocks}")
        if not 0 <= n_tokens <= self.block_size:
            raise ValueError(f"copy of {n_tokens} tokens, expected 0 to {self.block_size}, the size of a block")
        with nogil:
            pace_pool_copy(&self.pool, src, dst, n_tokens)


cdef struct slot:
    char *data
    long width, ld, rows
    int is_bf16, logits


cdef class Plan:
    """Slots and operators are added by index in order, then step() runs them."""
    cdef pace_plan p
    cdef slot slots[64]
    cdef int n_slots
    cdef list keep, memory
    cdef Team team
    cdef KVPool pool
    cdef readonly long vocab_size, max_blocks
    cdef readonly size_t nbytes
    cdef long n_heads

    def __cinit__(self, Team team, KVPool pool, long max_tokens, long max_seqs, long max_logits, long n_heads,
                  long vocab_size):
        if min(max_tokens, max_seqs, max_logits, n_heads, vocab_size) < 1:
            raise ValueError("plan sizes must be positive")
        self.keep = [team, pool]
        self.memory = []
        self.team, self.pool = team, pool
        self.vocab_size, self.n_heads = vocab_size, n_heads
        if pace_plan_init(&self.p, team.team, max_tokens, max_seqs, max_logits, n_heads, pool.n_kv_heads,
                          pool.head_dim):
            raise MemoryError("cannot allocate the plan")

    def __dealloc__(self):
        pace_plan_free(&self.p)

    cdef pace_op *add(self, int kind, tier) except NULL:
        cdef const pace_kernels *kernels = find(tier)
        cdef pace_op *op = pace_plan_add(&self.p, kind, kernels)
        if op == NULL:
            raise MemoryError("cannot allocate the plan")
        return op

    cdef const float *vector(self, v, long n) except? NULL:
        """Address of an f32 vector that the plan keeps alive; NULL for None."""
        if v is None:
            return NULL
        v = np.asarray(v, np.float32)
        if v.shape != (n,):
            raise ValueError(f"vector is {v.shape}, expected ({n},)")
        padded = np.zeros(n + 32, np.float32)  # a bias is read in whole panels
        padded[:n] = v
        self.keep.append(padded)
        cdef float[::1] a = padded
        return &a[0]

    cdef slot *at(self, int i) except NULL:
        if not 0 <= i < self.n_slots:
            raise ValueError(f"slot {i} of {self.n_slots}")
        return &self.slots[i]

    def add_slot(self, long width, bint is_bf16, bint logits, long rows):
        if self.n_slots == 64:
            raise ValueError("more than 64 slots")
        cdef slot *s = &self.slots[self.n_slots]
        # 64 extra bytes a row: rows of a register tile then fall into different cache sets.
        s.ld = (width + 31) // 32 * 32 + 32 if is_bf16 else (width + 15) // 16 * 16
        s.width, s.is_bf16, s.logits, s.rows = width, is_bf16, logits, rows
        memory = Memory(<size_t>rows * s.ld * (2 if is_bf16 else 4) + 64)
        s.data = <char *>(<Memory>memory).data
        self.memory.append(memory)
        self.nbytes += memory.nbytes
        self.n_slots += 1
        return self.n_slots - 1

    def add_embed(self, tier, int dst, Matrix table, float scale):
        cdef slot *d = self.at(dst)
        cdef pace_op *op = self.add(PACE_EMBED, tier)
        if d.is_bf16 or d.width != table.k or table.n < self.vocab_size:
            raise ValueError(f"embedding table [{table.n}, {table.k}] does not hold {self.vocab_size} tokens of width {d.width}")
        self.keep.append(table)
        op.logits = d.logits
        op.u.embed.table, op.u.embed.x = &table.w, <float *>d.data
        op.u.embed.ldx, op.u.embed.scale = d.ld, scale

    def add_norm(self, tier, int src, int dst, weight, bias, int kind, float eps, bint accumulate):
        cdef slot *s = self.at(src)
        cdef slot *d = self.at(dst)
        if s.is_bf16 or s.width != d.width or s.logits != d.logits or (accumulate and d.is_bf16):
            raise ValueError("norm wants an f32 source, a destination of the same shape, and f32 to accumulate")
        cdef pace_op *op = self.add(PACE_NORM, tier)
        op.logits = s.logits
        op.u.norm.x = <const float *>s.data
        op.u.norm.y = d.data
        op.u.norm.weight = self.vector(weight, s.width)
        op.u.norm.bias = self.vector(bias, s.width)
        op.u.norm.ldx, op.u.norm.ldy, op.u.norm.n = s.ld, d.ld, s.width
        op.u.norm.eps, op.u.norm.kind = eps, kind
        op.u.norm.y_bf16, op.u.norm.add = d.is_bf16, accumulate

    def add_gemm(self, tier, int src, int dst, Matrix w, bias, int epilogue, int act, float scale):
        cdef slot *s = self.at(src)
        cdef slot *d = self.at(dst)
        cdef long n = (2 if epilogue == 2 else 1) * d.width
        if not s.is_bf16 or s.width != w.k or s.logits != d.logits or w.n != n:
            raise ValueError(f"matrix [{w.n}, {w.k}] does not take a slot of width {s.width} to one of {d.width}")
        if (epilogue == 1 and d.is_bf16) or (epilogue == 2 and not d.is_bf16):
            raise ValueError("the add epilogue wants an f32 slot, the gated one a bf16 slot")
        cdef pace_op *op = self.add(PACE_GEMM, tier)
        op.logits = s.logits
        self.keep.append(w)
        op.u.gemm.n_panels = w.w.n_panels
        op.u.gemm.g.a = <const bf16 *>s.data
        op.u.gemm.g.w = w.w.data
        op.u.gemm.g.bias = self.vector(bias, w.n)
        op.u.gemm.g.c = d.data
        op.u.gemm.g.lda, op.u.gemm.g.ldc = s.ld, d.ld
        op.u.gemm.g.n, op.u.gemm.g.k = d.width, w.w.k_pad
        op.u.gemm.g.scale, op.u.gemm.g.epilogue, op.u.gemm.g.act = scale, epilogue, act
        op.u.gemm.g.c_bf16 = d.is_bf16

    def set_head(self, int logits):
        """The last operator is a GEMM to this slot, the LM head: it runs on as many rows at a time as the slot has, and
        notes the maxima of the blocks of its rows: f32 [rows, blocks].

        None where it is no such GEMM, or its kernels note none."""
        cdef slot *d = self.at(logits)
        cdef pace_op *op = &self.p.ops[self.p.n_ops - 1] if self.p.n_ops else NULL
        if op == NULL or op.kind != PACE_GEMM or op.u.gemm.g.c != <void *>d.data or d.is_bf16:
            return None
        op.head = d.logits
        if op.kernels.block_max == NULL:
            return None
        maxima = np.zeros((d.rows, (d.width + PACE_LOGIT_BLOCK - 1) // PACE_LOGIT_BLOCK), np.float32)
        cdef float[:, ::1] a = maxima
        self.keep.append(maxima)
        op.u.gemm.block_max = &a[0, 0]
        return maxima

    def add_angles(self, tier, inv_freq, int cos, int sin, float factor):
        cdef pace_op *op = self.add(PACE_ANGLES, tier)
        cdef slot *c = self.at(cos)
        cdef slot *s = self.at(sin)
        half = len(inv_freq)
        if c.width != half or s.width != half or c.is_bf16 or s.is_bf16:
            raise ValueError(f"angle slots must be f32 and {half} wide")
        op.u.angles.inv_freq = self.vector(inv_freq, half)
        op.u.angles.cos, op.u.angles.sin = <float *>c.data, <float *>s.data
        op.u.angles.half, op.u.angles.factor = half, factor

    cdef pace_kv kv(self, long layer) except *:
        if not 0 <= layer < self.pool.n_layers:
            raise ValueError(f"layer {layer} of {self.pool.n_layers}")
        cdef pace_kv kv = pace_pool_layer(&self.pool.pool, layer)
        kv.n_heads = self.n_heads
        return kv

    def add_rope_kv(self, tier, int src, int dst, long layer, int cos, int sin, long rotary_dim, bint interleaved,
                    q_norm, k_norm, int norm_kind, float norm_eps):
        cdef slot *s = self.at(src)
        cdef slot *d = self.at(dst)
        cdef long hd = self.pool.head_dim
        if s.is_bf16 or not d.is_bf16 or s.width != (self.n_heads + 2 * self.pool.n_kv_heads) * hd or d.width != self.n_heads * hd:
            raise ValueError(f"q|k|v slot of {s.width} and q slot of {d.width} do not fit {self.n_heads} heads of {hd}")
        cdef pace_op *op = self.add(PACE_ROPE_KV, tier)
        op.u.rope.qkv, op.u.rope.ldx = <const float *>s.data, s.ld
        op.u.rope.q, op.u.rope.ldq = <bf16 *>d.data, d.ld
        if rotary_dim:
            if rotary_dim > hd or rotary_dim % 2 or self.at(cos).width != rotary_dim // 2:
                raise ValueError(f"rotary_dim is {rotary_dim} with head_dim {hd}")
            op.u.rope.cos, op.u.rope.sin = <const float *>self.at(cos).data, <const float *>self.at(sin).data
        op.u.rope.rotary_dim, op.u.rope.interleaved = rotary_dim, interleaved
        op.u.rope.q_norm, op.u.rope.k_norm = self.vector(q_norm, hd), self.vector(k_norm, hd)
        op.u.rope.norm_kind, op.u.rope.norm_eps = norm_kind, norm_eps
        op.u.rope.kv = self.kv(layer)

    def add_attention(self, tier, int src, int dst, long layer, float scale, float softcap, long window, sinks):
        cdef slot *s = self.at(src)
        cdef slot *d = self.at(dst)
        cdef long width = self.n_heads * self.pool.head_dim
        if not s.is_bf16 or not d.is_bf16 or s.width != width or d.width != width:
            raise ValueError(f"attention slots must be bf16 and {width} wide")
        if self.n_heads % self.pool.n_kv_heads or self.n_heads // self.pool.n_kv_heads > 64:
            raise ValueError(f"{self.n_heads} query heads over {self.pool.n_kv_heads} kv heads: at most 64 to one")
        cdef pace_op *op = self.add(PACE_ATTENTION, tier)
        op.u.attention.q, op.u.attention.ldq = <const bf16 *>s.data, s.ld
        op.u.attention.out, op.u.attention.ldo = <bf16 *>d.data, d.ld
        op.u.attention.scale, op.u.attention.softcap, op.u.attention.window = scale, softcap, window
        op.u.attention.sinks = self.vector(sinks, self.n_heads)
        op.u.attention.kv = self.kv(layer)

    def add_select(self, tier, int src, int dst):
        cdef slot *s = self.at(src)
        cdef slot *d = self.at(dst)
        if s.width != d.width or s.is_bf16 != d.is_bf16 or s.logits or not d.logits:
            raise ValueError("select wants two slots of one shape, from token rows to logit rows")
        cdef pace_op *op = self.add(PACE_SELECT, tier)
        cdef size_t size = 2 if s.is_bf16 else 4
        op.logits = 1
        op.u.select.src, op.u.select.dst, op.u.select.row_bytes = s.data, d.data, s.width * size
        op.u.select.src_stride, op.u.select.dst_stride = s.ld * size, d.ld * size

    def view(self, int i):
        """All rows of a slot as f32 or uint16 [rows, width], no copy; the array keeps the memory alive."""
        cdef slot *s = self.at(i)
        a = np.frombuffer(self.memory[i], np.uint16 if s.is_bf16 else np.float32)
        return a[: s.rows * s.ld].reshape(s.rows, s.ld)[:, : s.width]

    def step(self, const int32_t[::1] token_ids, const int32_t[::1] q_start, const int32_t[::1] kv_len,
             const int32_t[:, ::1] block_tables, const int32_t[::1] logit_rows):
        cdef pace_batch b
        cdef long s, i, n_seqs = kv_len.shape[0], n = token_ids.shape[0], last = -1, q_len, need, reached = 0
        cdef long most = self.p.max_tokens if self.p.n_ops and self.p.ops[self.p.n_ops - 1].head else self.p.max_logits
        if not 1 <= n <= self.p.max_tokens or not 1 <= n_seqs <= self.p.max_seqs or logit_rows.shape[0] > most:
            raise ValueError(f"step of {n} tokens, {n_seqs} sequences, {logit_rows.shape[0]} logit rows; the plan holds "
                             f"{self.p.max_tokens}, {self.p.max_seqs}, {most}")
        if q_start.shape[0] != n_seqs + 1 or block_tables.shape[0] < n_seqs or q_start[0] != 0 or q_start[n_seqs] != n:
            raise ValueError("q_start must run from 0 to the number of tokens, one entry per sequence and one more")
        for s in range(n_seqs):
            q_len = q_start[s + 1] - q_start[s]
            if q_len < 1 or kv_len[s] < q_len:
                raise ValueError(f"sequence {s} has {q_len} rows and kv_len {kv_len[s]}")
            need = (kv_len[s] + self.pool.block_size - 1) // self.pool.block_size
            if self.pool.contiguous:
                if block_tables.shape[1] != 1:
                    raise ValueError(f"a contiguous pool wants tables of 1 column, the first block, got {block_tables.shape[1]}")
                if not 0 <= block_tables[s, 0] <= self.pool.n_blocks - need:
                    raise ValueError(f"sequence {s} needs {need} blocks from {block_tables[s, 0]} on, there are {self.pool.n_blocks}")
                reached = max(reached, block_tables[s, 0] + need)
                continue
            if need > block_tables.shape[1]:
                raise ValueError(f"sequence {s} of length {kv_len[s]} needs {need} blocks, its table has {block_tables.shape[1]}")
            for i in range(need):
                if not 0 <= block_tables[s, i] < self.pool.n_blocks:
                    raise ValueError(f"sequence {s} names block {block_tables[s, i]} of {self.pool.n_blocks}")
                reached = max(reached, block_tables[s, i] + 1)
        for i in range(n):
            if not 0 <= token_ids[i] < self.vocab_size:
                raise ValueError(f"token id {token_ids[i]} at row {i}, the vocabulary has {self.vocab_size}")
        for i in range(logit_rows.shape[0]):
            if not last < logit_rows[i] < n:
                raise ValueError(f"logit_rows must ascend below {n}, got {logit_rows[i]} after {last}")
            last = logit_rows[i]
        b.token_ids, b.q_start, b.kv_len = &token_ids[0], &q_start[0], &kv_len[0]
        b.block_tables, b.table_stride = &block_tables[0, 0], block_tables.shape[1]
        b.logit_rows = &logit_rows[0] if logit_rows.shape[0] else NULL
        b.n_tokens, b.n_seqs, b.n_logits = n, n_seqs, logit_rows.shape[0]
        cdef int e
        with nogil:
            pace_pool_map_ahead(&self.pool.pool, reached, n_seqs)
            e = pace_plan_step(&self.p, &b)
        check_run(e)

    def head(self, long first):
        if not self.p.n_ops or not self.p.ops[self.p.n_ops - 1].head or not 0 <= first < self.p.batch.n_logits:
            raise ValueError(f"logits from row {first} on; the last step has {self.p.batch.n_logits}")
        cdef int e
        if self.team.team == NULL:
            raise RuntimeError("the thread team is closed")
        with nogil:
            e = pace_plan_head(&self.p, first)
        check_run(e)

    def op_seconds(self):
        return [self.p.op_s[i] for i in range(self.p.n_ops)]
