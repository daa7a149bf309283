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
// Letters: m rows (tokens), n output columns, k reduction length. ld counts elements, not bytes. bf16 is the upper half
// of an f32, kept in uint16_t.
//
// An operator is a struct, the list of its fields, a line in PACE_OPERATORS and a function in every table. Fields have
// the names that models/operators.py gives them, and plans are built from these lists alone; None there is 0 or NULL
// here.
#ifndef PACE_KERNELS_H
#define PACE_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "roofline.h"

typedef uint16_t bf16;

// A packed weight matrix is a row of panels of PACE_NR columns (output features), each one a stream of bytes in the
// order a GEMM reads it, k ascending. The format says what the bytes are. n is padded to PACE_NR with zeros.
//
// PACE_PANELS: bf16, [n_panels][k_pad / 2][PACE_NR][2]. Two consecutive k stand side by side (what vdpbf16ps and
// tdpbf16ps multiply). k is padded to PACE_KPAD with zeros. 32 columns = two 512-bit vectors: with 14 rows, 28
// accumulators, 2 weight vectors and 1 broadcast fill the 32 registers of AVX-512.
//
// PACE_MXFP4: 4.25 bits a weight as gpt-oss ships them. A column's 32 consecutive k are a group with one scale byte e;
// k is a multiple of 32. A panel is [ceil(k / 64)] blocks of PACE_MX_BLOCK bytes, one for two groups (the last may have
// one): scales [2][PACE_NR], then codes [8][2][16][4]: 8 k of 16 columns, 4 bytes a column. Byte 0 has k 0 in its low
// nibble and k 2 in the high one, byte 1 has 4 and 6, byte 2 has 1 and 3, byte 3 has 5 and 7: so a word of 16 bits
// holds the same side of four pairs (bf16), and the low nibbles of 4 bytes are 4 different k (int8 dot products). Bit 3
// of a code is its sign, the others choose from 0 .5 1 1.5 2 3 4 6; the weight is that times 2^(e - 127). e is 1 ..
// 252, 0 where nothing was packed: packing rewrites what has other scales, and makes what is below 2^-126 zero.
//
// PACE_INT8, PACE_INT4, PACE_FP8: a code per weight, and a scale for each column and `group` of consecutive k: a
// multiple of 16, or k_pad for a scale per column. k is padded to PACE_KPAD. A panel is [ceil(k_pad / group)] blocks,
// the last of which may have fewer k: scales [PACE_NR], then zeros or offsets [PACE_NR] where there are any, then
// codes. Of 8 k of a column the first 4 bytes of int8 and FP8 have 0 4 1 5, the second 2 6 3 7, in [k /
// 8][2][PACE_NR][4]; int4 has the first in the low nibbles of 4 bytes and the second in the high ones, [k /
// 8][PACE_NR][4], which is MXFP4's order. Integers are unsigned, u. The weight is
//     PACE_SYMMETRIC  (u - 2^(bits - 1)) * scale
//     PACE_ZEROS      (u - zero) * scale, zero int16
//     PACE_OFFSETS    u * scale + offset, of the scales' type
// and of FP8 its E4M3 number times the scale. Padding has weights of 0 where there are no offsets, and scales and
// offsets of 0 where a whole column or group is.
//
// Every tier reads the same bytes. Files of packed weights name PACE_LAYOUTS, which gets another number when any byte
// of these gets another meaning.
#define PACE_LAYOUTS "panels32-1"
#define PACE_NR 32
#define PACE_KPAD 32
#define PACE_MX_GROUP 32
#define PACE_MX_BLOCK 1088
enum pace_layout {
    PACE_PANELS,
    PACE_MXFP4,
    PACE_INT8,
    PACE_INT4,
    PACE_FP8,
    PACE_BF16_ROWS,
    PACE_F16_ROWS,
    PACE_F32_ROWS
};
enum pace_scales { PACE_SCALES_F32, PACE_SCALES_BF16, PACE_SCALES_F16 };
enum pace_zeros { PACE_SYMMETRIC, PACE_ZEROS, PACE_OFFSETS };
typedef struct {
    const void *data;      // packed panels, or plain rows [n][k] where a checkpoint's file has them; NULL: none
    long n, k;             // rows of the weight (output columns), reduction length
    long k_pad, n_panels;  // of panels
    int layout;            // enum pace_layout: the format; a GEMM takes panels only
    int scales, zeros;     // of int8, int4 and FP8: enums
    long group;            // of those
    long count, stride;    // matrices of one shape (a layer's experts) and the bytes from one to the next; 1 elsewhere
} pace_matrix;

static inline int pace_is_grouped(const pace_matrix *w) {
    return w->layout == PACE_INT8 || w->layout == PACE_INT4 || w->layout == PACE_FP8;
}

// Bytes of a block before its codes, of its codes for one k, and of one with all its k.
static inline long pace_block_head(const pace_matrix *w) {
    const long scale = w->scales == PACE_SCALES_F32 ? 4 : 2;
    return PACE_NR * (scale + (w->zeros == PACE_ZEROS ? 2 : w->zeros == PACE_OFFSETS ? scale : 0));
}
static inline long pace_code_bytes(const pace_matrix *w) { return w->layout == PACE_INT4 ? PACE_NR / 2 : PACE_NR; }
static inline long pace_block_bytes(const pace_matrix *w) { return pace_block_head(w) + w->group * pace_code_bytes(w); }

static inline long pace_panel_bytes(const pace_matrix *w) {
    if (pace_is_grouped(w))
        return (w->k_pad + w->group - 1) / w->group * pace_block_head(w) + w->k_pad * pace_code_bytes(w);
    return w->layout == PACE_MXFP4 ? (w->k + 63) / 64 * PACE_MX_BLOCK : w->k_pad * PACE_NR * (long)sizeof(bf16);
}

// Code of one column and k among codes of int8 and FP8, or of int4.
static inline int pace_byte_code(const uint8_t *codes, long column, long k) {
    return codes[k / 8 * 8 * PACE_NR + k % 4 / 2 * 4 * PACE_NR + column * 4 + k % 2 * 2 + k % 8 / 4];
}
static inline int pace_nibble_code(const uint8_t *codes, long column, long k) {
    return codes[k / 8 * 4 * PACE_NR + column * 4 + k % 2 * 2 + k % 8 / 4] >> (k / 2 % 2 * 4) & 15;
}

// Code of one column and k (0 .. 63) of a block of PACE_MXFP4.
static inline int pace_mx_code(const uint8_t *block, long column, long k) {
    return pace_nibble_code(block + 64, column, k);
}

// Matrix i of `count`.
static inline pace_matrix pace_matrix_at(const pace_matrix *w, long i) {
    pace_matrix one = *w;
    one.data = (const char *)w->data + i * w->stride;
    one.count = 1;
    return one;
}

// Activations: [rows][ld] f32 or bf16. bf16 rows are an odd multiple of 64 bytes apart (rows of one tile must not share
// a cache set: pace_kernels.row_step) and have zeros from column `width` to the next multiple of 32.
//
// int8: `group` columns of a row share a scale, the last ones may be fewer; group is 16, 32, 64, 128 or the width,
// which is a multiple of 32. A row has int8 [width], in every 8 columns the order 0 4 1 5 2 6 3 7 (that of PACE_MXFP4's
// nibbles), then f32 scales [groups], then int32 [groups], -PACE_INT8_ZERO times the sum of the group's integers. An
// element is integer * scale; the scale is amax / 127, the integer x / scale to the nearest, ties to even. amax 0:
// scale 0 and zeros; with a NaN or an infinity: scale NaN and zeros. ld counts bytes.
#define PACE_INT8_ZERO 16  // added to the integers of 4-bit weights, -12 .. 12, so that they are unsigned
typedef struct {
    void *data;
    long ld, width;
    int bf16, int8;  // neither: f32
    long group;      // of int8
} pace_slot;

static inline long pace_slot_groups(const pace_slot *s) { return (s->width + s->group - 1) / s->group; }

// What a step computes. A group is the layers whose keys and values lie in one pool under one table.
#define PACE_MAX_GROUPS 8
typedef struct {
    const int32_t *token_ids;   // [n_tokens]
    const int32_t *q_start;     // [n_seqs + 1] first row of each sequence
    const int32_t *kv_len;      // [n_seqs] length including this step's rows
    const int32_t *logit_rows;  // [n_logits] rows, ascending
    struct pace_table {
        const int32_t *blocks;  // [n_seqs][stride]
        long stride;
    } tables[PACE_MAX_GROUPS];
    long n_tokens, n_seqs, n_logits;
} pace_batch;

static inline long pace_position(const pace_batch *b, long seq, long row) {
    return (long)b->kv_len[seq] - b->q_start[seq + 1] + row;
}

// ---- operators on rows: a call computes rows [m0, m1) -----------------------------------------------------

// Choices by name; the order is the value.
#define PACE_ACTS(X) X(none) X(silu) X(gelu) X(gelu_tanh) X(relu) X(relu2) X(quick_gelu) X(sigmoid)
#define PACE_EPILOGUES(X) X(store) X(add) X(gated) X(mul)
#define PACE_NORMS(X) X(none) X(rms) X(rms1) X(layer)
#define PACE_SCOPES(X) X(head) X(head_own) X(full)
#define PACE_ORDERS(X) X(softmax) X(chosen) X(sigmoid)
#define PACE_ACT_VALUE(name) PACE_ACT_##name,
#define PACE_EPILOGUE_VALUE(name) PACE_EPILOGUE_##name,
#define PACE_NORM_VALUE(name) PACE_NORM_##name,
#define PACE_SCOPE_VALUE(name) PACE_SCOPE_##name,
#define PACE_ORDER_VALUE(name) PACE_ORDER_##name,
enum pace_act { PACE_ACTS(PACE_ACT_VALUE) };
enum pace_epilogue { PACE_EPILOGUES(PACE_EPILOGUE_VALUE) };
enum pace_norm_kind { PACE_NORMS(PACE_NORM_VALUE) };
enum pace_scope { PACE_SCOPES(PACE_SCOPE_VALUE) };
enum pace_order { PACE_ORDERS(PACE_ORDER_VALUE) };

// dst = post * (scale * weight[token] + positions[offset + position]), or post * (dst + ...) with add: f32 products and
// sums in this order. Either matrix may be missing.
typedef struct {
    pace_slot dst;                  // f32 or bf16; f32 with add
    pace_matrix weight, positions;  // [vocabulary], [positions][dst.width]; panels or rows
    float scale, post;
    long offset;
    int add;
} pace_embed;
#define PACE_FIELDS_embed(F) \
    F(embed, slot, dst)      \
    F(embed, matrix, weight) \
    F(embed, matrix, positions) F(embed, real, scale) F(embed, real, post) F(embed, integer, offset) F(embed, flag, add)

// dst = scale * norm(src), or scale * (dst + norm(src)) with add; statistics per row and group of src.width / groups
// columns. rms: x / sqrt(mean(x^2) + eps) * w; rms1: * (1 + w); layer: (x - mean) / sqrt(var + eps) * w + bias.
typedef struct {
    pace_slot src, dst;          // f32; f32 or bf16, f32 with add; dst may be src
    const float *weight, *bias;  // [src.width / groups]; NULL: neither multiplied nor added
    const float *scale;          // [1]; NULL: 1
    float eps;
    long groups;
    int kind;  // enum pace_norm_kind; none: norm(x) is x
    int add;
} pace_norm;
#define PACE_FIELDS_norm(F) \
    F(norm, slot, src)      \
    F(norm, slot, dst)      \
    F(norm, vector, weight) \
    F(norm, vector, bias)   \
    F(norm, vector, scale) F(norm, real, eps) F(norm, integer, groups) F(norm, norm_kind, kind) F(norm, flag, add)

// cos and sin of position * inv_freq, times attention_factor, for every row; once per step and table. The product of
// position and frequency is f32, as in transformers.
typedef struct {
    pace_slot cos, sin;  // f32, width: frequencies
    const float *inv_freq;
    float attention_factor;
} pace_angles;
#define PACE_FIELDS_angles(F) \
    F(angles, slot, cos) F(angles, slot, sin) F(angles, vector, inv_freq) F(angles, real, attention_factor)

// dst[i] = src[logit_rows[i]]: slots of one width and type, rows [m0, m1) of dst.
typedef struct {
    pace_slot src, dst;
} pace_select;
#define PACE_FIELDS_select(F) F(select, slot, src) F(select, slot, dst)

// dst = src in int8, each row by itself.
typedef struct {
    pace_slot src, dst;  // bf16, int8 of the same width and any group
    long times;          // rows of these slots for each row of the batch
} pace_quantise;
#define PACE_FIELDS_quantise(F) F(quantise, slot, src) F(quantise, slot, dst) F(quantise, integer, times)

// dst[r][i] = src[r][order[i]].
typedef struct {
    pace_slot src, dst;    // bf16 of one width
    const int32_t *order;  // [width]: every column once
} pace_permute;
#define PACE_FIELDS_permute(F) F(permute, slot, src) F(permute, slot, dst) F(permute, columns, order)

// The top_k experts of every row and what they weigh; l are its logits. softmax: the best of softmax(l), which weigh
// that. chosen: the best of l, which weigh the softmax over them alone. sigmoid: the best of sigmoid(l) + choice, which
// weigh sigmoid(l). Of equal ones the lower number is better. Experts stand in n_groups groups; only the top_groups
// whose two best sum to most count. Weights are then divided by their sum if renormalise (1e-20 added with sigmoid),
// and multiplied by scale and by expert_scale. With a NaN among the logits the first top_k are chosen and weigh NaN.
#define PACE_MAX_EXPERTS 1024
typedef struct {
    pace_slot src, dst;                  // f32 [m][experts]; f32 [m][2 * top_k]: numbers, best first, then weights
    const float *choice, *expert_scale;  // [experts] or NULL
    long top_k, n_groups, top_groups;
    int order;  // enum pace_order
    int renormalise;
    float scale;
} pace_route;
#define PACE_FIELDS_route(F)       \
    F(route, slot, src)            \
    F(route, slot, dst)            \
    F(route, vector, choice)       \
    F(route, vector, expert_scale) \
    F(route, integer, top_k)       \
    F(route, integer, n_groups)    \
    F(route, integer, top_groups)  \
    F(route, order, order) F(route, flag, renormalise) F(route, real, scale)

// ---- GEMM: a call computes output panels [p0, p1) of rows [m0, m1) ----------------------------------------

// y = src W^T + bias. store: dst = scale * act(y), then cap * tanh(dst / cap) if cap > 0. add: dst += scale * y, times
// other[at] of the row where there is one. mul: dst = scale * act(y) * other[at ..]. gated: dst = act(gate) * up, where
// columns 0..15 of a panel are gate and 16..31 up, so that a panel makes 16 columns of dst and not 32.
typedef struct {
    pace_slot src, dst;  // bf16 [m][weight.k], or int8 (see gemm.h for which weights); f32 or bf16, f32 to add
    pace_slot other;     // f32, mul and add only; data NULL: none
    pace_matrix weight;  // panels
    const float *bias;   // [n_panels * PACE_NR] in packed column order, or NULL
    float scale, cap;
    long at;
    int epilogue, act;  // enums
} pace_gemm;
#define PACE_FIELDS_gemm(F) \
    F(gemm, slot, src)      \
    F(gemm, slot, dst)      \
    F(gemm, slot, other)    \
    F(gemm, matrix, weight) \
    F(gemm, vector, bias)   \
    F(gemm, real, scale)    \
    F(gemm, real, cap) F(gemm, integer, at) F(gemm, epilogue, epilogue) F(gemm, act, act)

// ---- experts: rows sorted by which of a layer's matrices they pass -------------------------------------------

// What a step's rows chose: choices i = 0 .. m * top_k - 1, sorted by expert and by row among those of one.
typedef struct {
    long n_active;          // experts that anybody chose
    const int32_t *expert;  // [n_active] their numbers, ascending
    const int32_t *start;   // [n_active + 1] choices of active expert a: start[a] .. start[a + 1] - 1
    const int32_t *row;     // [m * top_k] the row that made choice i
    const float *weight;    // [m * top_k]
} pace_chosen;

// dst[i] = act(gate) * up of choice i's row and expert: gate and up are columns of src W[e]^T + bias[e] as in a gated
// pace_gemm. With limit > 0: (up + 1) * gate * sigmoid(alpha * gate), gate at most limit and up within +-limit. With
// on_input the row is multiplied by its weight before, and rounded to bf16. A call computes panels [p0, p1) of one
// active expert.
typedef struct {
    pace_slot src, dst;  // bf16 or int8 [m]; bf16 [m * top_k]
    pace_slot route;     // what pace_route stored
    pace_matrix weight;  // count matrices
    const float *bias;   // [count][n_panels * PACE_NR] or NULL
    float alpha, limit;
    int act, on_input;
} pace_experts_in;
#define PACE_FIELDS_experts_in(F) \
    F(experts_in, slot, src)      \
    F(experts_in, slot, dst)      \
    F(experts_in, slot, route)    \
    F(experts_in, matrix, weight) \
    F(experts_in, vector, bias)   \
    F(experts_in, real, alpha)    \
    F(experts_in, real, limit)    \
    F(experts_in, act, act) F(experts_in, flag, on_input)

// dst[row] = the sum over the row's experts e, ascending, of scale * weight * (src[i] W[e]^T + bias[e]); added to dst
// with add, without the weight unless weigh. A call computes panels [p0, p1) of all rows and experts.
typedef struct {
    pace_slot src, dst;  // bf16 or int8 [m * top_k]; f32 [m]
    pace_slot route;     // what pace_route stored
    pace_matrix weight;  // count matrices
    const float *bias;   // [count][n_panels * PACE_NR] or NULL
    float scale;
    int add, weigh;
} pace_experts_out;
#define PACE_FIELDS_experts_out(F) \
    F(experts_out, slot, src)      \
    F(experts_out, slot, dst)      \
    F(experts_out, slot, route)    \
    F(experts_out, matrix, weight) \
    F(experts_out, vector, bias)   \
    F(experts_out, real, scale) F(experts_out, flag, add) F(experts_out, flag, weigh)

// ---- KV cache ---------------------------------------------------------------------------------------------

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
    char *kv;                   // block 0, 64-byte aligned
    long block_stride;          // bytes from a block to the next
    long block;                 // tokens in a block: a power of two >= 16
    long n_kv_heads, head_dim;  // head_dim: a multiple of 16 up to PACE_MAX_HEAD_DIM
    int int8;                   // element type: 0 bf16, 1 int8 with scales
    int contiguous;             // a sequence's blocks follow each other; its table is the first one
    int group;                  // whose tables lead here
} pace_kv;

static inline long pace_kv_head_bytes(const pace_kv *kv) {
    return kv->int8 ? 2 * kv->block * (kv->head_dim + (long)sizeof(float)) : 4 * kv->block * kv->head_dim;
}

static inline char *pace_kv_head(const pace_kv *kv, long block, long kv_head) {
    return kv->kv + block * kv->block_stride + kv_head * pace_kv_head_bytes(kv);
}

// K, V and scales of one kv head in the block that holds position pos of a sequence.
static inline char *pace_kv_at(const pace_kv *kv, const pace_batch *b, long seq, long pos, long kv_head) {
    const int32_t *table = b->tables[kv->group].blocks + seq * b->tables[kv->group].stride;
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

// Rows [row0, row1) of slots, of one sequence and at consecutive positions: the batch's rows from `token` on. Where
// slots have a row for every token, token is row0.
typedef struct {
    int32_t seq, row0, row1, token;
} pace_rows;

static inline long pace_position_of(const pace_batch *b, const pace_rows *rows, long row) {
    return pace_position(b, rows->seq, rows->token + row - rows->row0);
}

// ---- rotation: a call computes rows of one kv head and its query heads ------------------------------------

typedef struct {
    const float *cos, *sin;  // of every token of the batch [n_tokens][ld], attention factor included; NULL: no rotation
    long ld, half;           // 2 * half leading columns of a head rotate, the rest pass
    int interleaved;         // 0: halves (x[i], x[i + half]); 1: neighbours (x[2i], x[2i + 1])
} pace_rotation;

// Heads of q and k: norm, then rotation (or the other way round). q, times 1 + t0 log(1 + floor((position + t2) / t1))
// if t0 is not 0, goes to dst; k and v to the cache, unless append is 0. Columns behind norm_width (0: head_dim) are
// padding: zeros, which stay zeros and don't count in statistics. Rows are at most PACE_ROPE_ROWS, inside one aligned
// group of that many positions, so that one work item owns the whole group of V rows that it may have to clear
// (pace_kv_group).
#define PACE_ROPE_ROWS 32
typedef struct {
    pace_slot src;  // f32 [m], columns q | k | v, heads side by side; q | k if k_is_v, q without append
    pace_slot dst;  // bf16 [m][n_heads * head_dim]
    pace_kv kv;
    pace_rotation rope;
    long n_heads;  // a multiple of kv.n_kv_heads
    // NULL: no weights. [head_dim]; own weights per head (scope head_own and full): [heads * head_dim].
    const float *q_norm, *k_norm;
    int qk_norm;     // enum pace_norm_kind
    int norm_scope;  // enum pace_scope; full: one mean and deviation over all heads of q, and of k
    long norm_width;
    float norm_eps;
    int norm_after_rope;
    int append;
    int k_is_v;  // v is k as it comes
    int v_norm;  // weightless RMS of each head of v
    float temperature[3];
} pace_rope;
#define PACE_FIELDS_rope(F)        \
    F(rope, slot, src)             \
    F(rope, slot, dst)             \
    F(rope, kv, kv)                \
    F(rope, rotation, rope)        \
    F(rope, integer, n_heads)      \
    F(rope, vector, q_norm)        \
    F(rope, vector, k_norm)        \
    F(rope, norm_kind, qk_norm)    \
    F(rope, scope, norm_scope)     \
    F(rope, integer, norm_width)   \
    F(rope, real, norm_eps)        \
    F(rope, flag, norm_after_rope) \
    F(rope, flag, append) F(rope, flag, k_is_v) F(rope, flag, v_norm) F(rope, triple, temperature)

// ---- attention: a call computes a tile, rows x the query heads of one kv head ------------------------------

// The first position that a query at pos sees. window 0: no window; else it sees positions pos - window + 1 .. pos.
// chunk 0: no chunks; else only positions k of its own, k / chunk == pos / chunk.
static inline long pace_first_seen(long pos, long window, long chunk) {
    const long first = window && pos >= window ? pos - window + 1 : 0, start = chunk ? pos / chunk * chunk : 0;
    return first > start ? first : start;
}

// Attention walks the KV cache in pieces of PACE_PIECE tokens at absolute positions. Inside a piece: all scores,
// one maximum, one exp, one product with V; pieces are folded in ascending order. A row's arithmetic therefore
// does not depend on which other rows share the tile, nor on the block size.
#define PACE_PIECE 256
#define PACE_ATTN_ROWS 64  // most rows (query tokens x query heads per kv head) in one tile
typedef struct {
    pace_slot src, dst;  // bf16 [m][n_heads * head_dim]
    pace_kv kv;
    long n_heads;  // a multiple of kv.n_kv_heads, at most PACE_ATTN_ROWS times that
    float scale;
    float softcap;       // 0: none
    long window, chunk;  // see pace_first_seen
    const float *sinks;  // [n_heads] or NULL
} pace_attention;
#define PACE_FIELDS_attention(F)   \
    F(attention, slot, src)        \
    F(attention, slot, dst)        \
    F(attention, kv, kv)           \
    F(attention, integer, n_heads) \
    F(attention, real, scale)      \
    F(attention, real, softcap)    \
    F(attention, integer, window) F(attention, integer, chunk) F(attention, vector, sinks)

// ---- the table of a tier ----------------------------------------------------------------------------------

// Every operator, and what its work is cut into (see plan.c). An operator on rows needs nothing there.
#define PACE_OPERATORS(X)  \
    X(embed, rows)         \
    X(norm, rows)          \
    X(gemm, panels)        \
    X(angles, rows)        \
    X(rope, groups)        \
    X(attention, tiles)    \
    X(select, rows)        \
    X(quantise, rows)      \
    X(permute, rows)       \
    X(route, rows)         \
    X(experts_in, choices) \
    X(experts_out, choices)

// Rows of a checkpoint in codes.
typedef struct {
    const uint8_t *codes;          // [rows][ld], k of them count
    const void *scales, *offsets;  // [rows][ld_scales] elements of the matrix' types; offsets may be zeros, or NULL
    long ld, ld_scales;
} pace_rows_of_codes;

typedef struct {
    const char *isa;
    void (*embed)(const pace_embed *g, const pace_batch *b, long m0, long m1);
    void (*norm)(const pace_norm *g, const pace_batch *b, long m0, long m1);
    void (*angles)(const pace_angles *g, const pace_batch *b, long m0, long m1);
    void (*select)(const pace_select *g, const pace_batch *b, long m0, long m1);
    void (*quantise)(const pace_quantise *g, const pace_batch *b, long m0, long m1);
    void (*permute)(const pace_permute *g, const pace_batch *b, long m0, long m1);
    void (*gemm)(const pace_gemm *g, long p0, long p1, long m0, long m1, void *scratch);  // gemm_scratch bytes
    void (*route)(const pace_route *g, const pace_batch *b, long m0, long m1);
    // Active expert a; scratch: gemm_scratch bytes, and PACE_GATHER_ROWS rows of src before them.
    void (*experts_in)(const pace_experts_in *g, const pace_chosen *c, long a, long p0, long p1, void *scratch);
    void (*experts_out)(const pace_experts_out *g, const pace_chosen *c, long m, long p0, long p1, void *scratch);
    size_t gemm_scratch;
    int gemm_rows;  // rows of one register tile: m up to this streams the weights exactly once
    // bf16 and int8 rows begin an odd multiple of so many bytes apart (a multiple of 64), which spreads those of a
    // register tile over the sets of a cache.
    int row_step;
    int gemm_group;  // panels that many rows are multiplied with together: a claim of work
    // Pack up to 16 source rows [rows][ld] (dtype 0 bf16, 1 f16, 2 f32) into half a panel: dst[k_pad/2][32][2],
    // 16 columns of it. Missing rows and k..k_pad become zero.
    void (*pack_half)(bf16 *dst, const void *src, int dtype, long ld, long rows, long k, long k_pad);
    // The same from rows of MXFP4 as a checkpoint has them: blocks [rows][k / 32][16], low nibble first, and scales
    // [rows] [k / 32], with ld_blocks and ld_scales bytes from row to row. dst is the panel, half 0 or 1. Returns -1,
    // or the first row with a value that is no finite bf16.
    long (*pack_mxfp4)(uint8_t *dst, const uint8_t *blocks, const uint8_t *scales, long ld_blocks, long ld_scales,
                       long rows, long k, long half);
    // The same from codes [rows][ld], one a byte, with scales [rows][groups] of the matrix' type, and zeros or offsets
    // as many where it has some. Returns -1, or the first row with a scale or an offset that is no finite number, a
    // code above 15 of int4, or a NaN of FP8.
    long (*pack_groups)(uint8_t *panel, const pace_matrix *w, const pace_rows_of_codes *src, long rows, long half);
    // Rows of dtype 0 bf16, 1 f16, 2 f32, ld elements apart, to codes [rows][k] and scales [rows][groups] of a
    // symmetric matrix, whose scales are bf16 or f32. A row with a NaN or an infinity gets a scale that is none. row:
    // scratch for k_pad numbers.
    void (*quantise_rows)(uint8_t *codes, void *scales, float *row, const pace_matrix *w, const void *src, int dtype,
                          long ld, long rows);
    void (*unpack_row)(float *dst, const pace_matrix *w, long row);  // packed column `row` as f32 [k]
    void (*rope)(const pace_rope *g, const pace_batch *b, const pace_rows *rows, long kv_head);
    // Rows times the query heads of a kv head: at most PACE_ATTN_ROWS.
    void (*attention)(const pace_attention *g, const pace_batch *b, const pace_rows *rows, long kv_head, void *scratch);
    // The same tile in two steps, so that few tiles keep many threads busy: its pieces [p0, p1), counted from the
    // first one it sees, to parts [n_pieces][rows][2 + head_dim] (max, sum, O); then all of them folded in order. NULL:
    // the tier has no split form.
    void (*attention_part)(const pace_attention *g, const pace_batch *b, const pace_rows *rows, long kv_head, long p0,
                           long p1, float *parts, void *scratch);
    void (*attention_fold)(const pace_attention *g, const pace_batch *b, const pace_rows *rows, long kv_head,
                           long n_pieces, const float *parts, void *scratch);
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

#define PACE_MAX_HEAD_DIM 512
#define PACE_GATHER_ROWS 128  // rows of one expert that are gathered at a time
#define PACE_LOGIT_BLOCK 128  // 1000 blocks in a vocabulary of 128k: few enough to sort, large enough to skip

// Tiers, best first; NULL-terminated. Defined in dispatch.c.
extern const pace_kernels *const pace_tiers[];
const pace_kernels *pace_find_tier(const char *isa);  // NULL when unknown or not runnable on this CPU

#endif
