// lists.h - the work of one step's rope and attention operators: which rows go together, in which order, and whether
// few of them are cut along the KV cache as well. Operators that see their rows alike share a list.
#ifndef PACE_LISTS_H
#define PACE_LISTS_H

#include "kernels.h"

typedef struct {
    int tiles;                  // attention's tiles, longest first; else rope's groups of PACE_ROPE_ROWS positions
    int logits;                 // of the logit rows
    long group, window, chunk;  // of attention: query heads per kv head, what a query sees
    long n_kv_heads, head_dim;
} pace_list_key;

typedef struct {
    pace_list_key key;
    pace_rows *rows;  // [n]
    long n;
    // Few tiles are cut along the KV cache too; the pieces themselves never change (law 1).
    long split, pieces_per_item;  // pieces of the longest tile, 0: no split; pieces that a work item takes
    long part_stride;             // floats of the partial results of one tile and kv head
} pace_list;

// Room for split attention's partial results. 32 MB hold 4000 pieces (a million tokens) of 32 heads of 64.
#define PACE_PARTS_BYTES ((size_t)32 << 20)

int pace_list_init(pace_list *list, const pace_list_key *key, long max_tokens, long max_seqs);  // 0, or ENOMEM
void pace_list_free(pace_list *list);
void pace_list_make(pace_list *list, const pace_batch *b, int n_threads);  // allocates nothing
// First to last piece of the positions that tile i sees.
long pace_list_pieces(const pace_list *list, const pace_batch *b, long i);

#endif
