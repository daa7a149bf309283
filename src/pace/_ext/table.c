// table.c - compiled once per ISA tier with that tier's -m flags and -DPACE_ISA=<tier>. Everything it includes is
// static; the table is the unit's only external symbol.
#include <immintrin.h>

#include "kernels.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__)
#define PACE_AMX 1
#endif

#include "attention.h"
#include "experts.h"
#include "gemm.h"
#include "quantise.h"
#include "roofline_impl.h"
#include "rope.h"
#include "route.h"
#include "rowwise.h"

#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)

extern const pace_kernels PASTE(pace_kernels_, PACE_ISA);

const pace_kernels PASTE(pace_kernels_, PACE_ISA) = {
    .isa = TEXT(PACE_ISA),
#define ENTRY(op, cut) .op = kernel_##op,
    PACE_OPERATORS(ENTRY)
#undef ENTRY
        .gemm_scratch = GEMM_SCRATCH,
    .gemm_rows = GEMM_TILE_ROWS,
    .row_step = GEMM_ROW_STEP,
    .gemm_group = GEMM_GROUP,
    .pack_half = pack_half,
    .pack_mxfp4 = pack_mxfp4,
    .pack_groups = pack_groups,
    .quantise_rows = quantise_rows,
    .unpack_row = unpack_row,
    .attention_part = attention_part,
    .attention_fold = attention_fold,
    .attention_scratch = sizeof(attention_buf),
    .softmax = softmax,
    .argmax = argmax,
    .block_max = block_max,
    .block_exp_sum = block_exp_sum,
    .roof = PACE_ROOFLINE_TABLE,
};
