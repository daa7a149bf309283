// pool.h - the memory of a KV cache.
#ifndef PACE_POOL_H
#define PACE_POOL_H

#include "kernels.h"

// KV cache memory of a group of layers: [n_blocks][n_layers] as pace_kv describes them. A block's layers lie together,
// so that its first use touches its own pages alone. ([n_layers][n_blocks] made one block in 4 or 8 touch a new huge
// page in every layer at once: a step of 150 ms took 230, all of it the kernel's zeroing.)
typedef struct {
    size_t bytes;
    long n_layers, n_blocks;
    long n_mapped;  // leading blocks whose pages are there
    pace_kv kv;     // of layer 0
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

#endif
