#include "matrix.h"

#include <errno.h>
#include <limits.h>
#include <stdatomic.h>
#include <string.h>

#include "mapped.h"
#include "pages.h"
#include "work.h"

enum { PAGE = 4096 };

int pace_packed_size(pace_packed *w) {
    pace_matrix *m = &w->m;
    size_t panel, one;
    if (m->n > LONG_MAX - PACE_NR || m->k > LONG_MAX / 8 / PACE_NR) return ENOMEM;
    m->k_pad = (m->k + PACE_KPAD - 1) / PACE_KPAD * PACE_KPAD;
    m->n_panels = (m->n + PACE_NR - 1) / PACE_NR;
    if (m->group == 0 || m->group >= m->k_pad) m->group = m->k_pad;
    panel = (size_t)pace_panel_bytes(m);
    if (__builtin_mul_overflow((size_t)m->n_panels, panel, &one) || one > SIZE_MAX - PAGE) return ENOMEM;
    const size_t stride = m->count == 1 ? one : (one + PAGE - 1) / PAGE * PAGE;
    if (__builtin_mul_overflow(stride, (size_t)m->count, &w->bytes)) return ENOMEM;
    m->stride = (long)stride;
    return 0;
}

int pace_packed_init(pace_packed *w) {
    w->data = NULL;
    const int e = pace_packed_size(w);
    if (e) return e;
    w->m.data = w->data = pace_alloc_huge(w->bytes);
    return w->data ? 0 : ENOMEM;
}

static float scale_of(const uint8_t *p, int type, long i) {
    float f;
    uint16_t h;
    memcpy(&h, p + 2 * i, 2);
    const uint32_t bits = (uint32_t)h << 16;
    memcpy(&f, type == PACE_SCALES_F32 ? (const void *)(p + 4 * i) : &bits, 4);
    if (type != PACE_SCALES_F16) return f;
    const float magnitude = (h & 0x7c00) == 0
                                ? (float)(h & 0x3ff) * 0x1p-24f
                                : (float)(0x400 + (h & 0x3ff)) * 0x1p-40f * (float)(1 << (h >> 10 & 31)) * 0x1p15f;
    return h & 0x8000 ? -magnitude : magnitude;
}

// The head of a block, in other types.
static void recast_head(uint8_t *to, const pace_matrix *wide, const uint8_t *from, const pace_matrix *w) {
    const int middle = w->layout == PACE_INT4 ? 8 : 128;
    const uint8_t *old = from + PACE_NR * (w->scales == PACE_SCALES_F32 ? 4 : 2);
    uint8_t *zeros = to + PACE_NR * (wide->scales == PACE_SCALES_F32 ? 4 : 2);
    for (long c = 0; c < PACE_NR; c++) {
        const float scale = scale_of(from, w->scales, c);
        int16_t zero = (int16_t)middle;
        if (w->zeros == PACE_ZEROS) memcpy(&zero, old + 2 * c, 2);
        const float offset = w->zeros == PACE_OFFSETS ? scale_of(old, w->scales, c) : -(float)zero * scale;
        if (wide->scales == w->scales && wide->scales != PACE_SCALES_F32)
            memcpy(to + 2 * c, from + 2 * c, 2);
        else
            memcpy(to + 4 * c, &scale, 4);
        if (wide->zeros == PACE_ZEROS) memcpy(zeros + 2 * c, &zero, 2);
        if (wide->zeros == PACE_OFFSETS) memcpy(zeros + 4 * c, &offset, 4);
    }
}

int pace_packed_recast(pace_packed *w, int scales, int zeros) {
    pace_packed wide = {.m = w->m};
    // Offsets are a product of a scale and a zero, or were f32 already.
    wide.m.scales = zeros == PACE_OFFSETS ? PACE_SCALES_F32 : scales;
    wide.m.zeros = zeros;
    const int e = pace_packed_init(&wide);
    if (e) return e;
    const long blocks = (w->m.k_pad + w->m.group - 1) / w->m.group, code_bytes = pace_code_bytes(&w->m);
    const long heads[2] = {pace_block_head(&w->m), pace_block_head(&wide.m)};
    for (long i = 0; i < w->m.count; i++) {
        const uint8_t *from = (const uint8_t *)w->data + i * w->m.stride;
        uint8_t *to = (uint8_t *)wide.data + i * wide.m.stride;
        for (long p = 0; p < w->m.n_panels; p++)
            for (long b = 0, bytes; b < blocks; b++, from += heads[0] + bytes, to += heads[1] + bytes) {
                const long left = w->m.k_pad - b * w->m.group;
                bytes = (left < w->m.group ? left : w->m.group) * code_bytes;
                recast_head(to, &wide.m, from, &w->m);
                memcpy(to + heads[1], from + heads[0], (size_t)bytes);
            }
    }
    pace_packed_free(w);
    *w = wide;
    return 0;
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

// Bytes of scratch, each a multiple of 64, in which 16 rows are quantised: codes, scales, one row as f32.
typedef struct {
    size_t codes, scales, row;
} quantised_bytes;
static quantised_bytes bytes_of_quantised(const pace_matrix *w) {
    const size_t groups = (size_t)((w->k + w->group - 1) / w->group);
    return (quantised_bytes){(16 * (size_t)w->k + 63) / 64 * 64, 64 * groups, 4 * (size_t)w->k_pad};
}

// Packs 16 rows, or fewer, that were copied to `to`, to half a panel; -1, or the first row that can't be.
static long pack_copied(const pack_job *j, char *const to[3], char *panel, long n, long half) {
    const pace_source *src = j->src;
    if (j->w.layout == PACE_MXFP4)
        return j->kernels->pack_mxfp4((uint8_t *)panel, (uint8_t *)to[0], (uint8_t *)to[1], (long)src[0].ld,
                                      (long)src[1].ld, n, j->w.k, half);
    if (pace_is_grouped(&j->w) && !src[1].rows) {
        const quantised_bytes q = bytes_of_quantised(&j->w);
        uint8_t *codes = (uint8_t *)to[0] + copy_bytes(&src[0]);
        char *scales = (char *)codes + q.codes;
        const pace_rows_of_codes rows = {
            .codes = codes, .scales = scales, .ld = j->w.k, .ld_scales = (j->w.k + j->w.group - 1) / j->w.group};
        j->kernels->quantise_rows(codes, scales, (float *)(void *)(scales + q.scales), &j->w, to[0], j->dtype, j->w.k,
                                  n);
        return j->kernels->pack_groups((uint8_t *)panel, &j->w, &rows, n, half);
    }
    if (pace_is_grouped(&j->w)) {
        const pace_rows_of_codes rows = {.codes = (uint8_t *)to[0],
                                         .scales = to[1],
                                         .offsets = to[2],
                                         .ld = (long)src[0].ld,
                                         .ld_scales = (long)src[1].ld / (j->w.scales == PACE_SCALES_F32 ? 4 : 2)};
        return j->kernels->pack_groups((uint8_t *)panel, &j->w, &rows, n, half);
    }
    static const long size[3] = {2, 2, 4};
    j->kernels->pack_half((bf16 *)(void *)panel + half * 32, to[0], j->dtype, (long)src[0].ld / size[j->dtype], n,
                          j->w.k, j->w.k_pad);
    return -1;
}

// Source rows 16 i .. 16 i + n - 1, copied to `rows`, to their half of a panel; 0 or an error.
static int pack_rows(pack_job *j, char *rows, long i, long n) {
    long half = j->at / 16;
    half += j->mode == PACE_PACK_ROWS ? i : 2 * i + (j->mode == PACE_PACK_UP);
    char *to[3] = {rows, NULL, NULL};
    for (int s = 0; s < 3 && j->src[s].rows; s++) {
        const pace_source *src = &j->src[s];
        const char *from = (const char *)src->rows + (size_t)(16 * i) * src->ld;
        to[s] = s == 0 ? rows : to[s - 1] + copy_bytes(&j->src[s - 1]);
        if (pace_copy_mapped(to[s], from, (size_t)(n - 1) * src->ld + src->bytes) != 0) return EFAULT;
    }
    char *panel = (char *)(uintptr_t)j->w.data + half / 2 * pace_panel_bytes(&j->w);
    const long bad = pack_copied(j, to, panel, n, half % 2);
    if (bad < 0) return 0;
    j->bad = 16 * i + bad;
    return EDOM;
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

int pace_packed_fill(pace_packed *w, long i, pace_team *team, const pace_kernels *kernels, const pace_source src[3],
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
    const quantised_bytes q = bytes_of_quantised(&j.w);
    const size_t own = pace_is_grouped(&j.w) && !src[1].rows ? q.codes + q.scales + q.row : 0;
    e = pace_team_run_with(team, pack_worker, &j,
                           copy_bytes(&src[0]) + copy_bytes(&src[1]) + copy_bytes(&src[2]) + own);
    pace_work_destroy(&j.work);
    *bad = j.bad;
    return e ? e : j.error;
}
