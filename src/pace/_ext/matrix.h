// matrix.h - packed weight matrices: their memory, and how rows of a checkpoint come to it.
#ifndef PACE_MATRIX_H
#define PACE_MATRIX_H

#include "kernels.h"
#include "threads.h"

typedef struct {
    pace_matrix m;  // as kernels see it
    char *data;     // panels, zero until they are filled
    size_t bytes;
} pace_packed;

// `count` matrices [n][k] of one layer's experts, or one; all are positive. Each begins on a page of its own, in one
// mapping of huge pages. 0, or ENOMEM.
int pace_packed_init(pace_packed *w, long n, long k, long count);
void pace_packed_free(pace_packed *w);

enum pace_pack_mode { PACE_PACK_ROWS, PACE_PACK_GATE, PACE_PACK_UP };
// Source rows [rows][k], stride ld, of dtype 0 bf16, 1 f16, 2 f32, go to packed columns of matrix `i` from `at` (a
// multiple of 16) on; gate and up rows alternate in blocks of 16. Runs on the team, each worker packs what it will
// read. 0, EFAULT where the rows are of a file that was truncated meanwhile, ENOMEM, or an error of pace_team_run.
int pace_packed_fill(pace_packed *w, long i, pace_team *team, const pace_kernels *kernels, const void *src, int dtype,
                     long ld, long rows, long at, int mode);

#endif
