#include "pool.h"

#include <errno.h>
#include <string.h>

#include "pages.h"

int pace_pool_init(pace_pool *pool, long n_layers, long n_blocks, const pace_kv *shape) {
    *pool = (pace_pool){.n_layers = n_layers, .n_blocks = n_blocks, .kv = *shape};
    const double most = (double)n_layers * (double)n_blocks * (double)shape->n_kv_heads * (double)shape->block;
    if (most * 4 * PACE_MAX_HEAD_DIM > 0x1p62) return ENOMEM;  // and nothing below overflows
    pool->kv.block_stride = n_layers * shape->n_kv_heads * pace_kv_head_bytes(shape);
    pool->bytes = (size_t)(n_blocks * pool->kv.block_stride);
    pool->kv.kv = pace_alloc_huge(pool->bytes);
    return pool->kv.kv ? 0 : ENOMEM;
}

void pace_pool_free(pace_pool *pool) {
    pace_free_huge(pool->kv.kv, pool->bytes);
    pool->kv.kv = NULL;
}

pace_kv pace_pool_layer(const pace_pool *pool, long layer) {
    pace_kv kv = pool->kv;
    kv.kv += layer * kv.n_kv_heads * pace_kv_head_bytes(&kv);
    return kv;
}

static void copy_head(const pace_kv *kv, const char *src, char *dst, long n) {
    const size_t size = kv->int8 ? 1 : sizeof(bf16), d = (size_t)kv->head_dim, b = (size_t)kv->block;
    const size_t tokens = (size_t)n, pairs = (tokens + 1) / 2, group = (size_t)pace_kv_group(kv);
    const size_t end = (tokens + group - 1) / group * group;  // of the last group that holds a token
    for (size_t p = 0; p < d / 2; p++)                        // K [d / 2][block][2]
        memcpy(dst + p * 2 * b * size, src + p * 2 * b * size, tokens * 2 * size);
    src += b * d * size;  // V [block / 2][d][2]
    dst += b * d * size;
    memcpy(dst, src, pairs * 2 * d * size);
    if (tokens % 2)
        for (size_t e = 0; e < d; e++) memset(dst + ((pairs - 1) * 2 * d + 2 * e + 1) * size, 0, size);
    memset(dst + pairs * 2 * d * size, 0, (end / 2 - pairs) * 2 * d * size);
    if (!kv->int8) return;
    src += b * d;  // scales of K [block], of V [block]
    dst += b * d;
    memcpy(dst, src, tokens * sizeof(float));
    memcpy(dst + b * sizeof(float), src + b * sizeof(float), tokens * sizeof(float));
    memset(dst + (b + tokens) * sizeof(float), 0, (end - tokens) * sizeof(float));
}

void pace_pool_copy(const pace_pool *pool, long src, long dst, long n_tokens) {
    for (long layer = 0; layer < pool->n_layers; layer++) {
        const pace_kv kv = pace_pool_layer(pool, layer);
        for (long h = 0; h < kv.n_kv_heads; h++)
            copy_head(&kv, pace_kv_head(&kv, src, h), pace_kv_head(&kv, dst, h), n_tokens);
    }
}

void pace_pool_map_ahead(pace_pool *pool, long reached, long n_seqs) {
    if (pool->n_mapped < reached) pool->n_mapped = reached;
    if (pool->n_mapped >= pool->n_blocks || pool->n_mapped >= reached + n_seqs) return;
    pace_map_huge(pool->kv.kv + pool->n_mapped++ * pool->kv.block_stride, (size_t)pool->kv.block_stride);
}
