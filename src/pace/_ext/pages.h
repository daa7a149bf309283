// Memory for weights, the KV cache, activations and scratch: whole pages, huge ones where the system grants them.
#ifndef PACE_PAGES_H
#define PACE_PAGES_H

#include <stddef.h>

// Zeroed memory. From 2 MiB on it is 2 MiB-aligned and asks for huge pages; below, it is
// page-aligned. Pages are placed where they are first touched. NULL if there is none.
void *pace_alloc_huge(size_t bytes);
void pace_map_huge(void *p, size_t bytes);   // touch the pages of a part of it now, where the system can
void pace_free_huge(void *p, size_t bytes);  // bytes as allocated; p may be NULL

#endif
