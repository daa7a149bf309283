// plan.h - the compiled plan: one forward pass as a flat list of operators, and the team that runs it.
//
// Everything is sized when the plan is built: a step allocates nothing, takes no lock but its turn on the team, and
// calls no Python. The batch is an argument; the plan keeps no sequence state (that lives in the KV pool and the
// caller's tables).
#ifndef PACE_PLAN_H
#define PACE_PLAN_H

#include "kernels.h"
#include "pages.h"
#include "threads.h"
#include "work.h"

// A packed weight matrix: bf16 panels, see kernels.h.
typedef struct {
    bf16 *data;
    size_t bytes;
    long n, k, k_pad, n_panels;
} pace_matrix;

int pace_matrix_init(pace_matrix *w, long n, long k);  // 0, or ENOMEM
void pace_matrix_free(pace_matrix *w);

enum pace_pack_mode { PACE_PACK_ROWS, PACE_PACK_GATE, PACE_PACK_UP };
// Source rows [rows][k], stride ld, of dtype 0 bf16, 1 f16, 2 f32, go to packed columns from `at` (a multiple of
// 16) on; gate and up rows alternate in blocks of 16. Runs on the team, each worker packs what it will read. 0, EFAULT
// where the rows are of a file that was truncated meanwhile, ENOMEM, or an error of pace_team_run.
int pace_matrix_pack(pace_matrix *w, pace_team *team, const pace_kernels *kernels, const void *src, int dtype, long ld,
                     long rows, long at, int mode);

// KV cache memory of all layers: [n_blocks][n_layers] as pace_kv describes them. A block's layers lie together, so that
// its first use touches its own pages alone. ([n_layers][n_blocks] made one block in 4 or 8 touch a new huge page in
// every layer at once: a step of 150 ms took 230, all of it the kernel's zeroing.)
typedef struct {
    size_t bytes;
    long n_layers, n_blocks;
    long n_mapped;  // leading blocks whose pages are there
    pace_kv kv;     // of layer 0; n_heads and what belongs to a batch unset
} pace_pool;

// shape: block, n_kv_heads, head_dim, int8 and contiguous. 0, or ENOMEM.
int pace_pool_init(pace_pool *pool, long n_layers, long n_blocks, const pace_kv *shape);
void pace_pool_free(pace_pool *pool);
pace_kv pace_pool_layer(const pace_pool *pool, long layer);
// The first n_tokens (0 .. block) of block src in every layer to block dst, as if they had just been appended there:
// V of dst is clear up to the end of its group. src and dst differ.
void pace_pool_copy(const pace_pool *pool, long src, long dst, long n_tokens);
// Before a step of n_seqs sequences that uses blocks below `reached`: map the pages of one more block, while there are
// fewer than n_seqs ahead. Blocks are handed out in ascending order, and the kernel zeroes a page when it is touched
// first: 8 streams of the 1B shape that began a block in the same step waited 85 ms for 64 MB in a virtual machine.
void pace_pool_map_ahead(pace_pool *pool, long reached, long n_seqs);

typedef struct {
    void *data;
    size_t bytes;
    long width, ld;
    int bf16, logits;  // element type; row set: all tokens, or the rows whose logits were asked for
} pace_slot;

enum pace_op_kind { PACE_EMBED, PACE_NORM, PACE_GEMM, PACE_ANGLES, PACE_ROPE_KV, PACE_ATTENTION, PACE_SELECT };
enum { PACE_N_OP_KINDS = PACE_SELECT + 1 };

typedef struct {
    int kind;
    int logits;  // runs over the logit rows
    int head;    // the last one, which makes logits: at most max_logits rows at a time
    const pace_kernels *kernels;
    union {
        struct {
            const pace_matrix *table;
            float *x;
            long ldx;
            float scale;
        } embed;
        pace_norm norm;
        struct {
            pace_gemm g;
            long n_panels;
            float *block_max;  // the LM head's: [m][blocks of PACE_LOGIT_BLOCK columns] maxima of c (f32), or NULL
        } gemm;
        struct {  // cos and sin of every row's angles, once per step and table
            const float *inv_freq;
            float *cos, *sin;
            long half;
            float factor;
        } angles;
        pace_rope_kv rope;
        pace_attention attention;
        struct {
            const char *src;
            char *dst;
            size_t row_bytes, src_stride, dst_stride;
        } select;
    } u;
} pace_op;

typedef struct {
    const int32_t *token_ids;     // [n_tokens]
    const int32_t *q_start;       // [n_seqs + 1]
    const int32_t *kv_len;        // [n_seqs]
    const int32_t *block_tables;  // [n_seqs][table_stride]
    const int32_t *logit_rows;    // [n_logits]
    long n_tokens, n_seqs, n_logits, table_stride;
} pace_batch;

typedef struct {
    pace_team *team;
    int n_threads;
    pace_op *ops;
    long n_ops, cap_ops;
    long max_tokens, max_seqs, max_logits;  // logits that exist at a time; a step may ask for more, see pace_plan_head
    long first_op, head_row;                // where a run begins; the first logit row of the head's
    long n_heads, n_kv_heads, head_dim;
    pace_batch batch;
    pace_rows *rope_rows, *tiles;  // this step's work lists
    long n_rope_rows, n_tiles;
    // Split attention: few tiles are cut along the KV cache as well (see cut_attention). All of one step's layers share
    // the same cut.
    long split, pieces_per_item;  // pieces of the longest tile, 0: no split; pieces a work item takes
    float *parts;                 // [tile][kv head][piece][rows][2 + head_dim]
    long part_stride;             // floats of one tile and kv head
    pace_work fold;
    pace_work ring[2];
    void *scratch;  // one area per worker
    size_t scratch_stride, scratch_bytes;
    double *op_s;  // seconds of every operator in the last step, as worker 0 saw it
} pace_plan;

int pace_plan_init(pace_plan *p, pace_team *team, long max_tokens, long max_seqs, long max_logits, long n_heads,
                   long n_kv_heads, long head_dim);
void pace_plan_free(pace_plan *p);
pace_op *pace_plan_add(pace_plan *p, int kind, const pace_kernels *kernels);  // NULL: out of memory
// The batch must have been checked by the caller (ranges, monotone q_start, table entries). 0 or an error of
// pace_team_run.
int pace_plan_step(pace_plan *p, const pace_batch *batch);
// The logits of the last step's rows from `first` on, at most max_logits of them: scoring a prompt of 2000 tokens must
// not take a gigabyte. The step itself has made the first ones.
int pace_plan_head(pace_plan *p, long first);

#endif
