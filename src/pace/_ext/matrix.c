#include "matrix.h"

#include <errno.h>
#include <limits.h>
#include <stdatomic.h>
#include <string.h>

#include "mapped.h"
#include "pages.h"
#include "work.h"

enum { PAGE = 4096 };

int pace_packed_init(pace_packed *w, int layout, long n, long k, long count) {
    size_t panel, one;
    memset(w, 0, sizeof *w);
    if (n > LONG_MAX - PACE_NR || k > LONG_MAX / 4 / PACE_NR) return ENOMEM;
    w->m = (pace_matrix){.n = n, .k = k, .layout = layout, .count = count};
    w->m.k_pad = (k + PACE_KPAD - 1) / PACE_KPAD * PACE_KPAD;
    w->m.n_panels = (n + PACE_NR - 1) / PACE_NR;
    panel = (size_t)pace_panel_bytes(&w->m);
    if (__builtin_mul_overflow((size_t)w->m.n_panels, panel, &one) || one > SIZE_MAX - PAGE) return ENOMEM;
    const size_t stride = count == 1 ? one : (one + PAGE - 1) / PAGE * PAGE;
    if (__builtin_mul_overflow(stride, (size_t)count, &w->bytes)) return ENOMEM;
    w->m.data = w->data = pace_alloc_huge(w->bytes);
    w->m.stride = (long)stride;
    return w->data ? 0 : ENOMEM;
}

void pace_packed_free(pace_packed *w) {
    pace_free_huge(w->data, w->bytes);
    w->data = NULL;
}

typedef struct {
    pace_matrix w;
    const pace_source *src;
    const pace_kernels *kernels;
    long rows, at;
    int dtype, mode;
    atomic_int error;
    atomic_long bad;
    pace_work work;
} pack_job;

// Bytes of a worker's copy of 16 source rows.
static size_t copy_bytes(const pace_source *src) { return (16 * src->ld + 63) / 64 * 64; }

// Source rows 16 i .. 16 i + n - 1, copied to `rows`, to their half of a panel; 0 or an error.
static int pack_rows(pack_job *j, char *rows, long i, long n) {
    long half = j->at / 16;
    half += j->mode == PACE_PACK_ROWS ? i : 2 * i + (j->mode == PACE_PACK_UP);
    char *to[2] = {rows, rows + copy_bytes(&j->src[0])};
    for (int s = 0; s < 2 && j->src[s].rows; s++) {
        const pace_source *src = &j->src[s];
        const char *from = (const char *)src->rows + (size_t)(16 * i) * src->ld;
        if (pace_copy_mapped(to[s], from, (size_t)(n - 1) * src->ld + src->bytes) != 0) return EFAULT;
    }
    char *panel = (char *)(uintptr_t)j->w.data + half / 2 * pace_panel_bytes(&j->w);
    if (j->w.layout == PACE_MXFP4) {
        const long bad = j->kernels->pack_mxfp4((uint8_t *)panel, (uint8_t *)to[0], (uint8_t *)to[1],
                                                (long)j->src[0].ld, (long)j->src[1].ld, n, j->w.k, half % 2);
        if (bad < 0) return 0;
        j->bad = 16 * i + bad;
        return EDOM;
    }
    if (j->w.layout == PACE_INT8) {
        const long bad = j->kernels->pack_int8((uint8_t *)panel, (int8_t *)to[0], (float *)(void *)to[1],
                                               (long)j->src[0].ld, n, j->w.k, j->w.k_pad, half % 2);
        if (bad < 0) return 0;
        j->bad = 16 * i + bad;
        return EDOM;
    }
    static const long size[3] = {2, 2, 4};
    j->kernels->pack_half((bf16 *)(void *)panel + half % 2 * 32, rows, j->dtype, (long)j->src[0].ld / size[j->dtype], n,
                          j->w.k, j->w.k_pad);
    return 0;
}

static void pack_worker(void *arg, int tid, pace_team *team) {
    pack_job *j = arg;
    long begin, end;
    while (pace_work_next(&j->work, tid, 2, &begin, &end))
        for (long i = begin; i < end; i++) {
            const long left = j->rows - i * 16;
            const int e = pack_rows(j, pace_team_scratch(team, tid), i, left < 16 ? left : 16);
            if (e) {
                j->error = e;
                return;
            }
        }
}

int pace_packed_fill(pace_packed *w, long i, pace_team *team, const pace_kernels *kernels, const pace_source src[2],
                     int dtype, long rows, long at, int mode, long *bad) {
    pack_job j = {.w = pace_matrix_at(&w->m, i),
                  .src = src,
                  .kernels = kernels,
                  .rows = rows,
                  .at = at,
                  .dtype = dtype,
                  .mode = mode};
    int e = pace_work_init(&j.work, pace_team_size(team));
    if (e) return e;
    pace_work_arm_all(&j.work, (rows + 15) / 16);
    e = pace_team_run_with(team, pack_worker, &j, copy_bytes(&src[0]) + copy_bytes(&src[1]));
    pace_work_destroy(&j.work);
    *bad = j.bad;
    return e ? e : j.error;
}
