# Part of _kernels.pyx: weights, and the KV cache's memory.

cdef extern from "matrix.h" nogil:
    ctypedef struct pace_packed:
        pace_matrix m
        char *data
        size_t bytes
    ctypedef struct pace_source:
        const void *rows
        size_t bytes, ld
    int pace_packed_init(pace_packed *w)
    int pace_packed_size(pace_packed *w)
    int pace_packed_recast(pace_packed *w, int scales, int zeros)
    void pace_packed_free(pace_packed *w)
    int pace_packed_fill(pace_packed *w, long i, pace_team *team, const pace_kernels *kernels, const pace_source *src,
                         int dtype, long rows, long at, int mode, long *bad)



cdef extern from "pool.h" nogil:
    ctypedef struct pace_pool:
        size_t bytes
        long n_mapped
    int pace_pool_init(pace_pool *pool, long n_layers, long n_blocks, const pace_kv *shape)
    void pace_pool_free(pace_pool *pool)
    pace_kv pace_pool_layer(const pace_pool *pool, long layer)
    void pace_pool_copy(const pace_pool *pool, long src, long dst, long n_tokens)
    void pace_pool_map_ahead(pace_pool *pool, long reached, long n_seqs)


cdef bint sources_are_elements(const pace_source *src):
    """Rows to be quantised: no scales beside."""
    return src[1].rows == NULL


cdef class Matrix:
    """What an operator takes for a weight [n, k], or for `count` of them."""
    cdef pace_matrix m
    cdef readonly long n, k, count


LAYOUTS = PACE_LAYOUTS.decode()


cdef class Packed(Matrix):
    """Panels of their own, or those that a file has: `source`, of just their bytes, which is kept and only read."""
    cdef pace_packed w
    cdef const unsigned char[::1] source

    def __cinit__(self, long n, long k, long count, int layout, long group=0, int scales=0, int zeros=0, source=None):
        if n < 1 or k < 1 or count < 1:
            raise ValueError(f"matrix is [{n}, {k}], both must be positive, and so must their count, {count}")
        if layout not in (PACE_PANELS, PACE_MXFP4, PACE_INT8, PACE_INT4, PACE_FP8):
            raise ValueError(f"layout {layout} is none of panels")
        if group and (layout < PACE_INT8 or group < 16 or 256 % group):
            raise ValueError(f"groups of {group} columns in layout {layout}")
        if scales not in (0, 1, 2) or zeros not in (0, 1, 2) or (zeros and layout not in (PACE_INT8, PACE_INT4)):
            raise ValueError(f"scales of type {scales} and zeros of type {zeros} in layout {layout}")
        if layout == PACE_MXFP4 and k % PACE_MX_GROUP:
            raise ValueError(f"MXFP4 matrix is [{n}, {k}], its rows must be whole groups of {PACE_MX_GROUP}")
        self.w.m.layout, self.w.m.n, self.w.m.k, self.w.m.count = layout, n, k, count
        self.w.m.group, self.w.m.scales, self.w.m.zeros = group, scales, zeros
        if source is not None:
            self.source = source
            if pace_packed_size(&self.w) or self.w.bytes != <size_t>self.source.shape[0]:
                raise ValueError(f"{self.source.shape[0]} bytes for a packed matrix [{n}, {k}], which has {self.w.bytes}")
            self.w.m.data = &self.source[0]
        elif pace_packed_init(&self.w):
            raise MemoryError(f"cannot allocate a packed matrix [{n}, {k}]" + f" {count} times" * (count > 1))
        self.m, self.n, self.k, self.count = self.w.m, n, k, count

    def __dealloc__(self):
        pace_packed_free(&self.w)

    @property
    def nbytes(self):
        return self.w.bytes

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, <void *>self.w.m.data, <Py_ssize_t>self.w.bytes, True, flags)

    cdef long index(self, long i) except -1:
        if not 0 <= i < self.count:
            raise ValueError(f"matrix {i} of {self.count}")
        return i

    cdef int fill(self, Team team, pace_source *src, int dtype, long rows, long at, int mode, long i) except -1:
        """Place rows; both sources have been checked against k."""
        cdef long most, room = self.m.n_panels * PACE_NR, bad = -1
        if mode not in (0, 1, 2) or rows < 1:
            raise ValueError(f"{rows} rows in mode {mode}")
        most = rows if mode == 0 else (rows + 15) // 16 * 32 - 16 * (mode == 1)
        if at < 0 or at % 16 or at > room or most > room - at:
            raise ValueError(f"{rows} rows at {at} do not fit a packed matrix of {self.n} rows")
        self.index(i)
        if self.w.data == NULL:
            raise ValueError("rows for a packed matrix that a file has")
        cdef int e
        with nogil:
            e = pace_packed_fill(&self.w, i, team.team, current, src, dtype, rows, at, mode, &bad)
        if e == EDOM and self.m.layout != PACE_MXFP4:
            if sources_are_elements(src):
                raise Unrepresentable(f"row {bad} has a weight that is no finite number")
            what = {PACE_INT4: ", or a code above 15", PACE_FP8: ", or a NaN"}.get(self.m.layout, "")
            raise Unrepresentable(f"row {bad} has a scale or an offset that is no finite number{what}")
        if e == EDOM:
            raise Unrepresentable(f"row {bad} has a scale of 255, which is NaN, or a weight of 2^128 or more")
        check_run(e)
        return 0

    def pack(self, Team team, const unsigned char[:, ::1] src, int dtype, long at, int mode, long i):
        cdef pace_source sources[3]
        memset(sources, 0, sizeof(sources))
        if self.m.layout == PACE_MXFP4 or self.m.zeros:
            raise ValueError("rows of bf16, f16 or f32 for a quantised matrix; expected its codes and scales")
        if dtype not in (0, 1, 2) or src.shape[0] < 1 or src.shape[1] != self.k * (4 if dtype == 2 else 2):
            raise ValueError(f"source rows have {src.shape[1]} bytes, the matrix wants {self.k} elements of type {dtype}")
        sources[0].rows, sources[0].bytes, sources[0].ld = &src[0, 0], src.shape[1], src.shape[1]
        self.fill(team, sources, dtype, src.shape[0], at, mode, i)

    def pack_mxfp4(self, Team team, const unsigned char[:, :] blocks, const unsigned char[:, :] scales, long at, int mode,
                   long i):
        cdef pace_source sources[3]
        cdef long groups = self.k // PACE_MX_GROUP
        memset(sources, 0, sizeof(sources))
        if self.m.layout != PACE_MXFP4:
            raise ValueError("blocks and scales of MXFP4 for a matrix of another format")
        if blocks.shape[0] != scales.shape[0] or blocks.shape[1] != 16 * groups or scales.shape[1] != groups:
            raise ValueError(f"blocks of {blocks.shape[0]} rows of {blocks.shape[1]} bytes with scales of "
                             f"{scales.shape[0]} rows of {scales.shape[1]}, the matrix wants rows of {16 * groups} and {groups}")
        if blocks.shape[0] < 1 or blocks.strides[1] != 1 or (groups > 1 and scales.strides[1] != 1):
            raise ValueError("no rows, or rows of MXFP4 whose bytes do not stand side by side")
        if blocks.strides[0] < blocks.shape[1] or scales.strides[0] < scales.shape[1]:
            raise ValueError("rows of MXFP4 that overlap or run backwards")
        sources[0].rows, sources[0].bytes, sources[0].ld = &blocks[0, 0], blocks.shape[1], blocks.strides[0]
        sources[1].rows, sources[1].bytes, sources[1].ld = &scales[0, 0], scales.shape[1], scales.strides[0]
        self.fill(team, sources, 0, blocks.shape[0], at, mode, i)

    @property
    def kind(self):
        """Types of scales and of zeros."""
        return self.m.scales, self.m.zeros

    def recast(self, int scales, int zeros):
        """Scales and zeros of wider types: the same weights."""
        if self.w.data == NULL:
            raise ValueError("other types of scales for a packed matrix that a file has")
        if pace_packed_recast(&self.w, scales, zeros):
            raise MemoryError(f"cannot allocate a packed matrix [{self.n}, {self.k}]")
        self.m = self.w.m

    def pack_groups(self, Team team, const unsigned char[:, :] codes, const unsigned char[:, ::1] scales,
                    const unsigned char[:, ::1] offsets, long at, int mode, long i):
        """Bytes of scales and offsets in the matrix' types; no offsets: as many rows of 0 bytes."""
        cdef pace_source sources[3]
        cdef long groups = (self.k + self.m.group - 1) // self.m.group, size = 2 if self.m.scales else 4
        cdef long zero_size = 0 if not self.m.zeros else 2 if self.m.zeros == 1 else size
        memset(sources, 0, sizeof(sources))
        if self.m.layout < PACE_INT8 or self.m.layout > PACE_FP8:
            raise ValueError("codes and scales for a matrix of another format")
        if codes.shape[0] < 1 or codes.shape[1] != self.k or codes.strides[1] != 1 or codes.strides[0] < self.k:
            raise ValueError(f"{codes.shape[0]} rows of {codes.shape[1]} codes, the matrix wants rows of {self.k} that stand "
                             "side by side")
        if scales.shape[0] != codes.shape[0] or scales.shape[1] != groups * size:
            raise ValueError(f"{codes.shape[0]} rows with {scales.shape[0]} rows of scales, {scales.shape[1]} bytes each; the "
                             f"matrix wants {groups * size}")
        if offsets.shape[0] != codes.shape[0] or offsets.shape[1] != groups * zero_size:
            raise ValueError(f"{codes.shape[0]} rows with {offsets.shape[0]} rows of offsets, {offsets.shape[1]} bytes each; "
                             f"the matrix wants {groups * zero_size}")
        sources[0].rows, sources[0].bytes, sources[0].ld = &codes[0, 0], self.k, codes.strides[0]
        sources[1].rows, sources[1].bytes, sources[1].ld = &scales[0, 0], scales.shape[1], scales.shape[1]
        if zero_size:
            sources[2].rows, sources[2].bytes, sources[2].ld = &offsets[0, 0], offsets.shape[1], offsets.shape[1]
        self.fill(team, sources, 0, codes.shape[0], at, mode, i)

    def unpack(self, long i, rows=None):
        cdef pace_matrix m = pace_matrix_at(&self.m, self.index(i))
        cdef const int32_t[::1] which = np.arange(self.n, dtype=np.int32) if rows is None else rows
        cdef long row, n = which.shape[0]
        for row in range(n):
            if not 0 <= which[row] < self.n:
                raise ValueError(f"row {which[row]} of {self.n}")
        out = np.empty((n, self.k), np.float32)
        cdef float[:, ::1] o = out
        with nogil:
            for row in range(n):
                current.unpack_row(&o[row, 0], &m, which[row])
        return out


def quantise_rows(const unsigned char[:, ::1] src, int dtype, long k, int layout, long group):
    """Codes uint8 [rows, k] and scales, bf16 bits [rows, ceil(k / group)], of rows of dtype 0 bf16, 1 f16, 2 f32."""
    cdef pace_matrix m
    cdef long rows = src.shape[0]
    if layout not in (PACE_INT8, PACE_INT4, PACE_FP8) or k < 1 or group < 1 or (group < k and group % 16):
        raise ValueError(f"rows of {k} columns, groups of {group}, in layout {layout}")
    if dtype not in (0, 1, 2) or rows < 1 or src.shape[1] != k * (4 if dtype == 2 else 2):
        raise ValueError(f"{rows} rows of {src.shape[1]} bytes, expected {k} elements of type {dtype}")
    memset(&m, 0, sizeof(m))
    m.layout, m.k, m.scales = layout, k, PACE_SCALES_BF16
    m.k_pad = (k + PACE_KPAD - 1) // PACE_KPAD * PACE_KPAD
    m.group = group if group < k else m.k_pad
    codes = np.empty((rows, k), np.uint8)
    scales = np.empty((rows, (k + group - 1) // group), np.uint16)
    row = np.empty(m.k_pad + 16, np.float32)
    cdef unsigned char[:, ::1] c = codes
    cdef unsigned short[:, ::1] s = scales
    cdef float[::1] r = row
    with nogil:
        current.quantise_rows(&c[0, 0], &s[0, 0], &r[0], &m, &src[0, 0], dtype, k, rows)
    return codes, scales


cdef class Mapped(Matrix):
    """Rows [n, k] of dtype 0 bf16, 1 f16, 2 f32 where they are; keeps their array."""
    cdef const unsigned char[:, ::1] rows

    def __cinit__(self, const unsigned char[:, ::1] src, int dtype):
        if dtype not in (0, 1, 2) or src.shape[0] < 1 or src.shape[1] < 1:
            raise ValueError(f"table of {src.shape[0]} rows of {src.shape[1]} bytes and type {dtype}")
        self.rows = src
        self.n, self.k, self.count = src.shape[0], src.shape[1] // (4 if dtype == 2 else 2), 1
        self.m.data, self.m.n, self.m.k, self.m.layout = &src[0, 0], self.n, self.k, PACE_BF16_ROWS + dtype
        self.m.count = 1


cdef class KVPool:
    cdef pace_pool pool
    cdef readonly long n_layers, n_kv_heads, head_dim, n_blocks, block_size
    cdef readonly bint contiguous

    def __cinit__(self, long n_layers, long n_kv_heads, long head_dim, long n_blocks, long block_size, bint int8,
                  bint contiguous):
        cdef pace_kv shape
        if min(n_layers, n_kv_heads, n_blocks) < 1:
            raise ValueError(f"KV pool of {n_layers} layers, {n_kv_heads} heads, {n_blocks} blocks: all must be positive")
        if head_dim % 16 or not 16 <= head_dim <= PACE_MAX_HEAD_DIM:
            raise ValueError(f"head_dim is {head_dim}, expected a multiple of 16 up to {PACE_MAX_HEAD_DIM}")
        if block_size < 16 or block_size & (block_size - 1):
            raise ValueError(f"block_size is {block_size}, expected a power of two from 16 on")
        if n_blocks > 0x7fffffff:
            raise ValueError(f"n_blocks is {n_blocks}, tables hold numbers up to {0x7fffffff}")
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
