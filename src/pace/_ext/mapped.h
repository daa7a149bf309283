// Reads a mapped file that somebody else may have truncated, or whose disk may fail, since it was mapped.
#ifndef PACE_MAPPED_H
#define PACE_MAPPED_H

#include <stddef.h>

// memcpy, but 0 or EFAULT where touching src would raise SIGBUS and, as nobody handles it, end the process.
int pace_copy_mapped(void *dst, const void *src, size_t bytes);

#endif
