#include "matrix.h"

#include <errno.h>
#include <stdatomic.h>
#include <string.h>

#include "mapped.h"
#include "pages.h"
#include "work.h"

enum { PAGE = 4096 };

int pace_packed_init(pace_packed *w, long n, long k, long count) {
    const size_t k_pad = ((size_t)k + PACE_KPAD - 1) / PACE_KPAD * PACE_KPAD;
    const size_t n_panels = ((size_t)n + PACE_NR - 1) / PACE_NR;
    size_t one;
    memset(w, 0, sizeof *w);
    if (__builtin_mul_overflow(n_panels * PACE_NR, k_pad, &one) || __builtin_mul_overflow(one, sizeof(bf16), &one) ||
        one > SIZE_MAX - PAGE)
        return ENOMEM;
    const size_t stride = count == 1 ? one : (one + PAGE - 1) / PAGE * PAGE;
    if (__builtin_mul_overflow(stride, (size_t)count, &w->bytes)) return ENOMEM;
    w->data = pace_alloc_huge(w->bytes);
    if (!w->data) return ENOMEM;
    w->m = (pace_matrix){.data = w->data,
                         .n = n,
                         .k = k,
                         .k_pad = (long)k_pad,
                         .n_panels = (long)n_panels,
                         .count = count,
                         .stride = (long)stride};
    return 0;
}

void pace_packed_free(pace_packed *w) {
    pace_free_huge(w->data, w->bytes);
    w->data = NULL;
}

typedef struct {
    pace_matrix w;
    bf16 *data;
    const char *src;
    const pace_kernels *kernels;
    long ld, rows, at;
    int dtype, mode;
    atomic_int error;
    pace_work work;
} pack_job;

static void pack_worker(void *arg, int tid, pace_team *team) {
    pack_job *j = arg;
    void *rows = pace_team_scratch(team, tid);
    static const size_t size[3] = {2, 2, 4};
    long begin, end;
    while (pace_work_next(&j->work, tid, 2, &begin, &end))
        for (long i = begin; i < end; i++) {
            const long left = j->rows - i * 16, n = left < 16 ? left : 16;
            // Half-panel that receives rows 16 i .. 16 i + 15 of the source.
            long half = j->at / 16;
            half += j->mode == PACE_PACK_ROWS ? i : 2 * i + (j->mode == PACE_PACK_UP);
            bf16 *dst = j->data + (half / 2) * j->w.k_pad * PACE_NR + (half % 2) * 32;
            const char *src = j->src + (size_t)(i * 16 * j->ld) * size[j->dtype];
            if (pace_copy_mapped(rows, src, (size_t)((n - 1) * j->ld + j->w.k) * size[j->dtype]) != 0) {
                j->error = EFAULT;
                return;
            }
            j->kernels->pack_half(dst, rows, j->dtype, j->ld, n, j->w.k, j->w.k_pad);
        }
}

int pace_packed_fill(pace_packed *w, long i, pace_team *team, const pace_kernels *kernels, const void *src, int dtype,
                     long ld, long rows, long at, int mode) {
    pack_job j = {.w = w->m,
                  .data = (bf16 *)(void *)(w->data + i * w->m.stride),
                  .src = src,
                  .kernels = kernels,
                  .ld = ld,
                  .rows = rows,
                  .at = at,
                  .dtype = dtype,
                  .mode = mode};
    int e = pace_work_init(&j.work, pace_team_size(team));
    if (e) return e;
    pace_work_arm_all(&j.work, (rows + 15) / 16);
    e = pace_team_run_with(team, pack_worker, &j, (size_t)(16 * ld) * sizeof(float));
    pace_work_destroy(&j.work);
    return e ? e : j.error;
}
