# Part of _kernels.pyx: memory, the thread team, and the roofs that it measures.

cdef struct roof_job:
    double (*dot)(long iters) noexcept nogil
    double (*read)(const void *p, size_t bytes) noexcept nogil
    const char *data
    size_t bytes
    long repeat
    int n_threads
    double done[1024]


cdef void roof_worker(void *arg, int tid, pace_team *team) noexcept nogil:
    cdef roof_job *j = <roof_job *>arg
    cdef size_t share = j.bytes / <size_t>j.n_threads / 512 * 512
    cdef long i
    j.done[tid] = 0
    if j.dot != NULL:
        j.done[tid] = j.dot(j.repeat)
    else:
        for i in range(j.repeat):
            j.done[tid] += j.read(j.data + tid * share, share)


cdef class Memory:
    """Zeroed memory, from huge pages where the system grants them."""
    cdef void *data
    cdef readonly size_t nbytes

    def __cinit__(self, size_t nbytes):
        self.nbytes = nbytes
        self.data = pace_alloc_huge(nbytes)
        if self.data == NULL:
            raise MemoryError(f"cannot allocate {nbytes} bytes")

    def __dealloc__(self):
        pace_free_huge(self.data, self.nbytes)

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.data, <Py_ssize_t>self.nbytes, 0, flags)


class Forked(RuntimeError):
    pass


class Truncated(OSError):
    pass


class Unrepresentable(ValueError):
    pass


cdef int check_run(int e) except -1:
    """Raise what a run's result means."""
    if e == 0:
        return 0
    if e == PACE_E_FORKED:
        raise Forked("this process was forked from one that built the engine; its threads do not exist here: "
                     "build the engine in the child, or start it with the spawn method")
    if e == PACE_E_BUSY:
        raise RuntimeError("the thread team was entered again from inside its own step")
    if e == PACE_E_CLOSED:
        raise RuntimeError("the thread team is closed")
    if e == ENOMEM:
        raise MemoryError("cannot allocate what the step works with")
    if e == EFAULT:
        raise Truncated("the file behind the rows was truncated, or can't be read any more")
    raise OSError(e, "the thread team could not run")


cdef class Team:
    """Who holds a reference may use `team` in any thread, at any time: close() only ends the threads, and whoever runs
    later is told so. The memory goes with the last reference."""
    cdef pace_team *team  # never NULL
    cdef readonly int n_threads

    def __cinit__(self, int n_threads, cpus=None):
        cdef char err[256]
        cdef const int *list_ = NULL
        cdef int[::1] numbers
        if not 1 <= n_threads <= PACE_MAX_THREADS:
            raise ValueError(f"n_threads is {n_threads}, expected 1 to {PACE_MAX_THREADS}")
        if cpus is not None:
            if len(cpus) != n_threads:
                raise ValueError(f"{len(cpus)} cpus for {n_threads} threads")
            numbers = np.array(cpus, np.intc)
            list_ = &numbers[0]
        err[0] = 0
        self.team = pace_team_new(n_threads, list_, err, sizeof(err))
        if self.team == NULL:
            raise OSError(err.decode())
        self.n_threads = n_threads

    cdef int check_open(self) except -1:
        """Refuse early what could only fail later; no promise, as another thread may close the team at once."""
        return check_run(PACE_E_CLOSED if pace_team_is_closed(self.team) else 0)

    cdef double roof(self, roof_job *job) except -1:
        """Operations or bytes per second of one run."""
        cdef int e
        job.n_threads = self.n_threads
        start = time.perf_counter()
        with nogil:
            e = pace_team_run(self.team, roof_worker, <void *>job)
        elapsed = time.perf_counter() - start
        check_run(e)
        return sum([job.done[i] for i in range(self.n_threads)]) / elapsed

    def roof_read(self, Memory memory, long repeat):
        cdef roof_job job
        memset(&job, 0, sizeof(job))
        job.read, job.data, job.bytes, job.repeat = current.roof.read, <const char *>memory.data, memory.nbytes, repeat
        return self.roof(&job)

    def roof_dot(self, kind, tier, long iterations):
        cdef roof_job job
        cdef const pace_kernels *k = find(tier)
        memset(&job, 0, sizeof(job))
        if kind not in ("bf16", "int8", "f32"):
            raise ValueError(f"dot-product roof of {kind!r}, expected bf16, int8 or f32")
        job.dot = k.roof.dot_bf16 if kind == "bf16" else k.roof.dot_s8 if kind == "int8" else k.roof.fma_f32
        job.repeat = iterations
        return self.roof(&job)

    def close(self):
        cdef int e
        with nogil:  # another thread's run may have to end first
            e = pace_team_close(self.team)
        check_run(e)

    def __dealloc__(self):
        pace_team_free(self.team)
