// gemm_codes.h - few bf16 rows times codes, on tiers without dot products of bf16; part of gemm.h.
#ifndef PACE_GEMM_CODES_H
#define PACE_GEMM_CODES_H

// Few rows on codes. One row meets two panels side by side: the sums of one would wait for each other.
static void gemm_codes(const gemm_job *j, long p0, long p1) {
    const pace_matrix *w = j->w;
    const long k = w->k_pad;
    const int whole = w->group == k;
    mm_args rows = {.lda = j->src->ld};
    mc_args t = {.w = w, .apart = pace_panel_bytes(w), .c = j->c};
    mr_rows wide;
    mr_begin(&wide, 0);
    t.x = wide.x;
    for (long p = p0, np; p < p1; p += np) {
        np = j->rows == 1 && p + 1 < p1 ? 2 : 1;
        for (long k0 = 0; k0 < k; k0 += t.k) {
            t.k = k - k0 < MC_CHUNK ? k - k0 : MC_CHUNK;
            rows.a = gemm_row(j, 0, k0);
            rows.kp = t.k / 2;
            mr_widen(&wide, j->rows, &rows);
            t.block = gr_panel(w, p) + (whole ? 0 : k0 / w->group * pace_block_bytes(w));
            t.in = whole ? k0 : 0;
            t.accumulate = k0 > 0;
            mc_rows((int)j->rows, (int)np, &t);
        }
        for (long i = 0; i < np; i++) gemm_finish(j, p + i, 0, j->rows, t.c + i * PACE_NR);
    }
}

#if !defined(__AVX512F__)
// One row and MXFP4, which is expanded: two panels side by side, because the four sums of one would wait for each
// other. From the L2 of a Zen 3 core: 8.1 GB/s of codes instead of 6.8 (expanding takes half of the time).
static void gemm_lone_row(const gemm_job *j, long p0, long p1, mm_args a) {
    a.c = j->c;
    a.b = j->expanded[0].b;
    a.bps = j->expanded[1].b - j->expanded[0].b;
    a.prefetch = 0;
    for (long p = p0, np; p < p1; p += np) {
        np = p + 1 < p1 ? 2 : 1;
        for (long k0 = 0, kc; k0 < j->w->k_pad; k0 += kc) {
            kc = j->w->k_pad - k0 < MX_CHUNK ? j->w->k_pad - k0 : MX_CHUNK;
            for (long i = 0; i < np; i++) gemm_chunk(j, p + i, k0, kc, j->expanded + i);
            a.a = gemm_row(j, 0, k0);
            a.kp = kc / 2;
            a.accumulate = k0 > 0;
            mm(1, (int)(2 * np), &a);
        }
        for (long i = 0; i < np; i++) gemm_finish(j, p + i, 0, 1, a.c + i * PACE_NR);
    }
}
#endif

#endif
