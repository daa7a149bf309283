# Part of _kernels.pyx: suffix automata of token ids.

cdef extern from "suffix.h" nogil:
    ctypedef struct pace_suffix:
        pass
    ctypedef struct pace_suffix_guess:
        long n
        int match
        float expected
    ctypedef struct pace_suffix_place:
        pass
    int PACE_SUFFIX_ORDER, PACE_SUFFIX_BREAK, PACE_SUFFIX_MAX_TOKENS
    pace_suffix *pace_suffix_new(uint64_t seed)
    void pace_suffix_free(pace_suffix *a)
    size_t pace_suffix_bytes(const pace_suffix *a)
    long pace_suffix_tokens(const pace_suffix *a)
    int pace_suffix_add(pace_suffix *a, const int32_t *tokens, long n)
    pace_suffix_place pace_suffix_end(const pace_suffix *a)
    pace_suffix_place pace_suffix_locate(const pace_suffix *a, const int32_t *context, long n)
    void pace_suffix_follow(const pace_suffix *a, const pace_suffix *text, pace_suffix_place *place)
    pace_suffix_guess pace_suffix_propose(const pace_suffix *a, pace_suffix_place place, int min_match, long max_tokens,
                                          float least, int32_t *tokens, float *confidence)


SUFFIX_ORDER, SUFFIX_BREAK = PACE_SUFFIX_ORDER, PACE_SUFFIX_BREAK

cdef enum:
    MOST_GUESSED = 256
    PLACES = 2  # in so many other texts it knows where it stands


cdef class Suffixes:
    """Belongs to one thread at a time: the GIL is held throughout, a call takes microseconds."""
    cdef pace_suffix *a  # NULL once memory has run out
    cdef pace_suffix_place[PLACES] places  # zeros to begin with

    def __cinit__(self, uint64_t seed):
        self.a = pace_suffix_new(seed)
        if self.a == NULL:
            raise MemoryError("cannot allocate a suffix automaton")

    def __dealloc__(self):
        pace_suffix_free(self.a)

    cdef pace_suffix *whole(self) except NULL:
        if self.a == NULL:
            raise MemoryError("a suffix automaton is lost: there was no memory for it to grow")
        return self.a

    @property
    def nbytes(self):
        return pace_suffix_bytes(self.whole())

    @property
    def n_tokens(self):
        return pace_suffix_tokens(self.whole())

    def add(self, const int32_t[::1] tokens):
        cdef int e
        self.whole()
        if tokens.shape[0] == 0:
            return
        e = pace_suffix_add(self.a, &tokens[0], tokens.shape[0])
        if e == ENOMEM:
            pace_suffix_free(self.a)
            self.a = NULL
            self.whole()
        if e:
            raise ValueError(f"{tokens.shape[0]} tokens on {pace_suffix_tokens(self.a)}: a suffix automaton holds "
                             f"{PACE_SUFFIX_MAX_TOKENS}")

    def propose(self, context, int min_match, long max_tokens, float least, tuple past):
        # One call and not one for each index: most of a guess's cost is Python's, and more so where caches are cold.
        cdef int32_t[2][MOST_GUESSED] tokens
        cdef float[2][MOST_GUESSED] confidence
        cdef int best = 0  # whose row of these holds the best guess so far
        cdef const int32_t[::1] behind
        cdef pace_suffix_place place
        cdef long i, n = 0
        cdef pace_suffix_guess guess, other
        cdef Suffixes index
        if min_match < 1 or not 0 <= max_tokens <= MOST_GUESSED:
            raise ValueError(f"min_match is {min_match} and max_tokens {max_tokens}, expected 1 or more and 0 to {MOST_GUESSED}")
        if context is not None:
            behind = context
            n = behind.shape[0]
            if n == 0:
                return [], [], 0.0, 0
            place = pace_suffix_locate(self.whole(), &behind[0], n)
        else:
            place = pace_suffix_end(self.whole())
        guess = pace_suffix_propose(self.a, place, min_match, max_tokens, least, tokens[0], confidence[0])
        for i, index in enumerate(past):
            if context is not None:
                place = pace_suffix_locate(index.whole(), &behind[0], n)
            else:
                pace_suffix_follow(index.whole(), self.a, &self.places[i % PLACES])
                place = self.places[i % PLACES]
            other = pace_suffix_propose(index.a, place, min_match, max_tokens, least, tokens[1 - best],
                                        confidence[1 - best])
            if other.expected > guess.expected:
                guess, best = other, 1 - best
        return ([tokens[best][i] for i in range(guess.n)], [confidence[best][i] for i in range(guess.n)], guess.expected,
                guess.match)
