// matrix.h - packed weight matrices: their memory, and how rows of a checkpoint come to it.
#ifndef PACE_MATRIX_H
#define PACE_MATRIX_H

#include "kernels.h"
#include "threads.h"

typedef struct {
    pace_matrix m;  // as kernels see it
    char *data;     // panels, zero until they are filled; NULL: they are somebody else's
    size_t bytes;
} pace_packed;

// `count` matrices of one layer's experts, or one, in panels: w->m has layout, n, k and count, and group, scales and
// zeros where the layout has groups (group 0: a column is one); sizes are positive, k fits the layout. Each begins on a
// page of its own, in one mapping of huge pages. 0, or ENOMEM.
int pace_packed_init(pace_packed *w);
// What they take: the sizes of w->m that follow from those, and w->bytes. 0, or ENOMEM where they overflow.
int pace_packed_size(pace_packed *w);
// Other types of scales and zeros, of which the old ones are a special case: the same weights. 0, or ENOMEM.
int pace_packed_recast(pace_packed *w, int scales, int zeros);
void pace_packed_free(pace_packed *w);

// Rows of `bytes` bytes, `ld` bytes apart.
typedef struct {
    const void *rows;
    size_t bytes, ld;
} pace_source;

enum pace_pack_mode { PACE_PACK_ROWS, PACE_PACK_GATE, PACE_PACK_UP };
// Source rows go to packed columns of matrix `i` from `at` (a multiple of 16) on; gate and up rows alternate in blocks
// of
// 16. For panels of bf16: src[0] has k elements a row of dtype 0 bf16, 1 f16, 2 f32. For MXFP4: blocks and scales (see
// pack_mxfp4 of pace_kernels); for what has groups: codes, scales, and zeros or offsets (see pack_groups), or elements
// alone, which are quantised (see quantise_rows). Runs on the team, each worker packs what it will read. 0; EFAULT
// where the rows are of a file that was truncated meanwhile; EDOM: *bad is a row with a scale that is no number, or a
// value out of range; ENOMEM, or an error of pace_team_run.
int pace_packed_fill(pace_packed *w, long i, pace_team *team, const pace_kernels *kernels, const pace_source src[3],
                     int dtype, long rows, long at, int mode, long *bad);

#endif
