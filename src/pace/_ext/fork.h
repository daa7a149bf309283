// Whether this is still the process in which something was made: threads do not exist in a forked child.
#ifndef PACE_FORK_H
#define PACE_FORK_H

#include <stdbool.h>
#include <sys/types.h>

typedef struct {
    unsigned char *alive;  // a page that the kernel empties in a forked child; NULL: it can't, pid decides
    pid_t pid;
} pace_origin;

void pace_origin_init(pace_origin *origin);
bool pace_origin_is_here(const pace_origin *origin);
void pace_origin_destroy(pace_origin *origin);

#endif
