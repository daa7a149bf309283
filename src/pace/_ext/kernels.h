// kernels.h - the contract between the plan executor and the kernels of every ISA tier.
//
// One table of function pointers per tier; table.c is compiled once per tier and fills it. Reading this file
// is enough to write a correct kernel: every argument has its shape, type and alignment here.
//
// Rules every kernel obeys
//   * An output element is ONE reduction in ONE fixed order that does not depend on how many other rows, panels
//     or threads there are (DESIGN law 1). Splitting work never splits a sum.
//   * No allocation, no globals, no locks. Scratch comes from the caller, 64-byte aligned.
//   * Never writes outside the stated output; never reads past the padding stated here.
//
// Letters: m rows (tokens), n output columns, k reduction length. ld* strides count elements, not bytes.
// bf16 is the upper half of an f32, kept in uint16_t.
#ifndef PACE_KERNELS_H
#define PACE_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "roofline.h"

typedef uint16_t bf16;

// A packed weight matrix is a row of panels: [n_panels][k_pad / 2][PACE_NR][2] bf16. Two consecutive k stand
// side by side (what vdpbf16ps and tdpbf16ps multiply), PACE_NR columns form a panel. k is padded to PACE_KPAD
// and n to PACE_NR with zeros. 32 columns = two 512-bit vectors: with 14 rows, 28 accumulators, 2 weight
// vectors and 1 broadcast fill the 32 registers of AVX-512.
#define PACE_NR 32
#define PACE_KPAD 32

// Activations: [m][ld] bf16 with ld a multiple of 32 and ld * 2 not a multiple of 4096 bytes (rows of one tile
// must not share a cache set); columns from k to k_pad are zero.

enum pace_act { PACE_ACT_NONE, PACE_ACT_SILU, PACE_ACT_GELU, PACE_ACT_GELU_TANH, PACE_ACT_RELU };
enum pace_epilogue { PACE_STORE, PACE_ADD, PACE_GATED };

typedef struct {
    const bf16 *a;      // [m][lda] activations
    const bf16 *w;      // packed panels
    const float *bias;  // [n_panels * PACE_NR] in packed column order, or NULL
    void *c;            // [m][ldc] f32, or bf16 when c_bf16
    long lda, ldc;
    long m, n, k;  // n: output columns (a gated panel has 16, others 32); k: padded reduction length
    float scale;   // store: act(y) * scale; add: c += scale * y
    int epilogue;  // enum pace_epilogue; gated: columns 0..15 of a panel are gate, 16..31 up
    int act;       // enum pace_act
    int c_bf16;
} pace_gemm;

typedef struct {
    const float *x;  // [m][ldx]
    void *y;         // [m][ldy] f32, or bf16 when y_bf16; y += norm(x) when add (f32 only)
    const float *weight;
    const float *bias;  // NULL: none
    long ldx, ldy, m, n;
    float eps;
    int kind;  // 0: rms * w, 1: rms * (1 + w), 2: layer norm
    int y_bf16, add;
} pace_norm;

// KV cache of one layer: blocks of `block` tokens, each holding per kv head
//   K [head_dim / 2][block][2] then V [block / 2][head_dim][2], bf16 or int8,
//   int8 only: f32 scales of K [block], then of V [block].
// So S = Q K^T and O = P V both have the pair layout of a packed panel and nothing is ever transposed. block and
// head_dim are multiples of 16, so every part starts on a cache line.
//
// int8: a token's K (after norm and rotation) and V of one kv head have one scale each, amax / 127; an element is
// x / scale to the nearest integer, ties to even. amax 0: scale 0 and zeros. A head with a NaN or an infinity has the
// scale NaN, so that its scores and its share of the output are NaN and the engine's check of the logits sees it.
typedef struct {
    char *kv;                            // block 0, 64-byte aligned
    long block_stride;                   // bytes from a block to the next
    long block;                          // tokens in a block: a power of two >= 16
    long n_heads, n_kv_heads, head_dim;  // head_dim: a multiple of 16 up to PACE_MAX_HEAD_DIM
    int int8;                            // element type: 0 bf16, 1 int8 with scales
    int contiguous;                      // a sequence's blocks follow each other; its table is the first one
    const int32_t *block_tables;         // [n_seqs][table_stride]
    long table_stride;
    const int32_t *q_start;  // [n_seqs + 1] first row of each sequence
    const int32_t *kv_len;   // [n_seqs] length including this step's rows
} pace_kv;

static inline long pace_kv_head_bytes(const pace_kv *kv) {
    return kv->int8 ? 2 * kv->block * (kv->head_dim + (long)sizeof(float)) : 4 * kv->block * kv->head_dim;
}

static inline char *pace_kv_head(const pace_kv *kv, long block, long kv_head) {
    return kv->kv + block * kv->block_stride + kv_head * pace_kv_head_bytes(kv);
}

// K, V and scales of one kv head in the block that holds position pos of a sequence.
static inline char *pace_kv_at(const pace_kv *kv, long seq, long pos, long kv_head) {
    const int32_t *table = kv->block_tables + seq * kv->table_stride;
    const long i = pos / kv->block;
    return pace_kv_head(kv, kv->contiguous ? table[0] + i : table[i], kv_head);
}

// Scales of K [block], of V right behind them; int8 only.
static inline float *pace_kv_scales(const pace_kv *kv, char *head) {
    return (float *)(void *)(head + 2 * kv->block * kv->head_dim);
}

// P V reads V in whole groups of this many tokens: whoever writes the first token of a group clears V of all of it,
// scales included, because a stale NaN times a zero probability would be a NaN (and another request's data). Scores of
// stale keys are selected away, not multiplied, so K needs no clearing.
static inline long pace_kv_group(const pace_kv *kv) { return kv->block < 32 ? kv->block : 32; }

// Rows of one sequence, at most PACE_ROPE_ROWS of them and inside one aligned group of that many positions, so
// that one work item owns the whole group of V rows that it may have to clear (pace_kv_group).
#define PACE_ROPE_ROWS 32
typedef struct {
    int32_t seq, row0, row1;
} pace_rows;

typedef struct {
    const float *qkv;  // [m][ldx] q | k | v of each token
    bf16 *q;           // [m][ldq]
    long ldx, ldq;
    const float *cos, *sin;        // [m][rotary_dim / 2], attention factor included
    long rotary_dim;               // 0: no rotation
    int interleaved;               // 0: halves (x[i], x[i + r/2]); 1: neighbours (x[2i], x[2i+1])
    const float *q_norm, *k_norm;  // [head_dim] RMS weights applied per head before the rotation, or NULL
    int norm_kind;                 // as pace_norm.kind
    float norm_eps;
    pace_kv kv;
} pace_rope_kv;

// Attention walks the KV cache in pieces of PACE_PIECE tokens at absolute positions. Inside a piece: all scores,
// one maximum, one exp, one product with V; pieces are folded in ascending order. A row's arithmetic therefore
// does not depend on which other rows share the tile, nor on the block size.
#define PACE_PIECE 256
#define PACE_ATTN_ROWS 64  // most rows (query tokens x query heads per kv head) in one tile
typedef struct {
    const bf16 *q;  // [m][ldq]
    bf16 *out;      // [m][ldo]
    long ldq, ldo;
    float scale;
    float softcap;       // 0: none
    long window;         // 0: none; else a query at p sees positions p - window + 1 .. p
    const float *sinks;  // [n_heads] or NULL
    pace_kv kv;
} pace_attention;

typedef struct {
    const char *isa;
    // Output panels [p0, p1) of rows [m0, m1). scratch: gemm_scratch bytes.
    void (*gemm_bf16)(const pace_gemm *g, long p0, long p1, long m0, long m1, void *scratch);
    size_t gemm_scratch;
    int gemm_rows;  // rows of one register tile: m up to this streams the weights exactly once
    // Pack up to 16 source rows [rows][ld] (dtype 0 bf16, 1 f16, 2 f32) into half a panel: dst[k_pad/2][32][2],
    // 16 columns of it. Missing rows and k..k_pad become zero.
    void (*pack_half)(bf16 *dst, const void *src, int dtype, long ld, long rows, long k, long k_pad);
    void (*unpack_row)(float *dst, const bf16 *w, long row, long k, long k_pad);  // packed column `row` as f32 [k]
    void (*embed)(float *x, const bf16 *w, long token, long k, long k_pad, float scale);
    void (*norm)(const pace_norm *g, long m0, long m1);
    void (*rope_kv)(const pace_rope_kv *g, const pace_rows *rows, long kv_head);
    // Query tokens [row0, row1) of sequence rows->seq for one kv head; (row1 - row0) * group <= PACE_ATTN_ROWS.
    void (*attention)(const pace_attention *g, const pace_rows *rows, long kv_head, void *scratch);
    // The same tile in two steps, so that few tiles keep many threads busy: its pieces [p0, p1), counted from the
    // first one it sees, to parts [n_pieces][rows][2 + head_dim] (max, sum, O); then all of them folded in order. NULL:
    // the tier has no split form.
    void (*attention_part)(const pace_attention *g, const pace_rows *rows, long kv_head, long p0, long p1, float *parts,
                           void *scratch);
    void (*attention_fold)(const pace_attention *g, const pace_rows *rows, long kv_head, long n_pieces,
                           const float *parts, void *scratch);
    size_t attention_scratch;
    void (*softmax)(float *x, long n);       // in place, one row
    long (*argmax)(const float *x, long n);  // lowest index among equals; -1 when a NaN is met
    // Passes of the sampler over n logits in blocks of PACE_LOGIT_BLOCK, the last one shorter. Not in the reference
    // table, which only runs plans. max[b]: the largest of block b, NaN where it holds one.
    void (*block_max)(const float *x, long n, float *max);
    // sum[b]: of exp((x - max) * inv_temperature) over block b; max is the largest of x.
    void (*block_exp_sum)(const float *x, long n, float max, float inv_temperature, float *sum);
    pace_roofline roof;
} pace_kernels;

#define PACE_MAX_HEAD_DIM 256
#define PACE_LOGIT_BLOCK 128  // 1000 blocks in a vocabulary of 128k: few enough to sort, large enough to skip

// Tiers, best first; NULL-terminated. Defined in dispatch.c.
extern const pace_kernels *const pace_tiers[];
const pace_kernels *pace_find_tier(const char *isa);  // NULL when unknown or not runnable on this CPU

#endif
