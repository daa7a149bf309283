#define _GNU_SOURCE
#include "pages.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { SMALL_PAGE = 4096, HUGE_PAGE = 2 << 20 };

static size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

#ifdef __SANITIZE_ADDRESS__
// Under AddressSanitizer every allocation has poisoned bytes on either side, and ends where it was asked to. From 1 MiB
// on it is a fresh mapping, of which the sanitizer fills the first 4 KiB.
void *pace_alloc_huge(size_t bytes) {
    void *p;
    if (bytes > SIZE_MAX / 2 || posix_memalign(&p, bytes < HUGE_PAGE ? SMALL_PAGE : HUGE_PAGE, bytes ? bytes : 1) != 0)
        return NULL;
    return memset(p, 0, bytes < 1 << 20 ? bytes : 1 << 20);
}

void pace_free_huge(void *p, size_t bytes) {
    (void)bytes;
    free(p);
}
#else
void *pace_alloc_huge(size_t bytes) {
    if (bytes > SIZE_MAX / 2) return NULL;
    size_t need = round_up(bytes ? bytes : 1, SMALL_PAGE);
    bool huge = need >= HUGE_PAGE;
    size_t mapped = need + (huge ? HUGE_PAGE : 0);
    char *p = mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return NULL;
    if (!huge) return p;
    // Trim to alignment. The tail keeps small pages: rounding it up would cost up to 2 MiB each.
    size_t head = (HUGE_PAGE - (uintptr_t)p % HUGE_PAGE) % HUGE_PAGE;
    if (head) munmap(p, head);
    if (mapped - head > need) munmap(p + head + need, mapped - head - need);
    madvise(p + head, need, MADV_HUGEPAGE);  // refused where THP is "never": small pages then
    return p + head;
}

void pace_free_huge(void *p, size_t bytes) {
    if (p) munmap(p, round_up(bytes ? bytes : 1, SMALL_PAGE));
}
#endif

void pace_map_huge(void *p, size_t bytes) {
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
    const uintptr_t begin = (uintptr_t)p / SMALL_PAGE * SMALL_PAGE;
    // Refused before Linux 5.14: then pages come when they are touched.
    madvise((void *)begin, round_up((uintptr_t)p + bytes - begin, SMALL_PAGE), MADV_POPULATE_WRITE);
}
