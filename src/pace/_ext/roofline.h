// The two roofs every kernel is judged against, measured with each tier's own best instructions.
//
// Each function runs on the calling thread; start it on all workers of a team at once and divide
// the sum of the returned amounts by the common wall time. A tier's roof is what its instructions
// reach, so bf16 on a tier without a bf16 dot product is the f32 FMA rate.
#ifndef PACE_ROOFLINE_H
#define PACE_ROOFLINE_H

#include <stddef.h>

typedef struct pace_roofline {
    // Reads [p, p + bytes) once, in four streams, and returns the bytes read (a multiple of 512).
    // p is 64-byte aligned.
    double (*read)(const void *p, size_t bytes);
    // iters passes over the independent accumulators, registers only; return the operations done,
    // two per multiply-add.
    double (*dot_bf16)(long iters);
    double (*dot_s8)(long iters);
    double (*fma_f32)(long iters);
    // One pass of each does this many operations: choose iters from it.
    double dot_bf16_ops, dot_s8_ops, fma_f32_ops;
} pace_roofline;

#endif
