#include "lists.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

int pace_list_init(pace_list *list, const pace_list_key *key, long max_tokens, long max_seqs) {
    *list = (pace_list){.key = *key};
    // n rows at consecutive positions are at most n / 32 + 2 groups and n tiles. All rows of a sequence are one such
    // run; logit rows may all stand alone.
    list->rows = malloc(((size_t)max_tokens + 2 * (size_t)max_seqs) * sizeof(pace_rows));
    return list->rows ? 0 : ENOMEM;
}

void pace_list_free(pace_list *list) {
    free(list->rows);
    list->rows = NULL;
}

// Rows [first, end) of slots, the batch's from `token` on.
static void add_run(pace_list *list, const pace_batch *b, long seq, long first, long end, long token) {
    const long tile = PACE_ATTN_ROWS / (list->key.tiles ? list->key.group : 1);
    for (long r = first, next; r < end; r = next) {
        const long at = token + r - first;
        next = r + (list->key.tiles ? tile : PACE_ROPE_ROWS - pace_position(b, seq, at) % PACE_ROPE_ROWS);
        if (next > end) next = end;
        list->rows[list->n++] = (pace_rows){(int32_t)seq, (int32_t)r, (int32_t)next, (int32_t)at};
    }
}

static void tile_seen(const pace_list *list, const pace_batch *b, const pace_rows *tile, long *begin, long *end) {
    *begin = pace_first_seen(pace_position_of(b, tile, tile->row0), list->key.window, list->key.chunk);
    *end = pace_position_of(b, tile, tile->row1);
}

static int goes_before(const pace_list *list, const pace_batch *b, const pace_rows *x, const pace_rows *y) {
    long x0, x1, y0, y1;
    tile_seen(list, b, x, &x0, &x1);
    tile_seen(list, b, y, &y0, &y1);
    const long cx = (x1 - x0) * (x->row1 - x->row0), cy = (y1 - y0) * (y->row1 - y->row0);
    return cx != cy ? cx > cy : x->row0 < y->row0;
}

// Restores the heap below i: a parent goes after its children, so that the root is the last of all.
static void sift(const pace_list *list, const pace_batch *b, long i, long n) {
    pace_rows *t = list->rows, moved = t[i];
    for (long child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && goes_before(list, b, &t[child], &t[child + 1])) child++;
        if (!goes_before(list, b, &moved, &t[child])) break;
        t[i] = t[child];
    }
    t[i] = moved;
}

// Longest first, in place: qsort allocates from a thousand bytes on, and a step must not.
static void sort_tiles(pace_list *list, const pace_batch *b) {
    for (long i = list->n / 2; i-- > 0;) sift(list, b, i, list->n);
    for (long n = list->n; n-- > 1;) {
        const pace_rows last = list->rows[0];
        list->rows[0] = list->rows[n];
        list->rows[n] = last;
        sift(list, b, 0, n);
    }
}

long pace_list_pieces(const pace_list *list, const pace_batch *b, long i) {
    long begin, end;
    tile_seen(list, b, &list->rows[i], &begin, &end);
    return (end + PACE_PIECE - 1) / PACE_PIECE - begin / PACE_PIECE;
}

// Fewer than two tiles and heads per worker, and a cache long enough: cut along the cache too. Three items a worker
// even out.
static void cut_tiles(pace_list *list, const pace_batch *b, int n_threads) {
    const long units = list->n * list->key.n_kv_heads;
    long most = 0, rows = 0;
    list->split = 0;
    if (n_threads == 1 || units == 0 || units >= 2 * n_threads) return;
    for (long i = 0; i < list->n; i++) {
        const long pieces = pace_list_pieces(list, b, i);
        const long n = (list->rows[i].row1 - list->rows[i].row0) * list->key.group;
        most = pieces > most ? pieces : most;
        rows = n > rows ? n : rows;
    }
    list->part_stride = most * rows * (list->key.head_dim + 2);
    if (most < 4 || (size_t)(units * list->part_stride) * sizeof(float) > PACE_PARTS_BYTES) return;
    const long wanted = (3 * n_threads + units - 1) / units;
    list->split = most;
    list->pieces_per_item = (most + wanted - 1) / wanted;
}

void pace_list_make(pace_list *list, const pace_batch *b, int n_threads) {
    list->n = 0;
    if (list->key.logits) {
        for (long i = 0, end, seq = 0; i < b->n_logits; i = end) {
            while (b->logit_rows[i] >= b->q_start[seq + 1]) seq++;
            for (end = i + 1; end < b->n_logits; end++)
                if (b->logit_rows[end] != b->logit_rows[i] + (end - i) || b->logit_rows[end] >= b->q_start[seq + 1])
                    break;
            add_run(list, b, seq, i, end, b->logit_rows[i]);
        }
    } else {
        for (long s = 0; s < b->n_seqs; s++) add_run(list, b, s, b->q_start[s], b->q_start[s + 1], b->q_start[s]);
    }
    if (!list->key.tiles) return;
    sort_tiles(list, b);
    cut_tiles(list, b, n_threads);
}
