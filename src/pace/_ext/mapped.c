#define _GNU_SOURCE
#include "mapped.h"

#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

// The kernel copies, as it would from another process: a page that can't be had ends the copy there. The alternatives:
// a handler for SIGBUS is the whole process's, and not a library's to install; a look at the file's size before the
// copy says nothing of the moment after; pread wants the file, where the caller has rows of an array. 128 KB at a time
// from the page cache it takes about a fifth longer than memcpy.
int pace_copy_mapped(void *dst, const void *src, size_t bytes) {
    while (bytes > 0) {
        struct iovec to = {dst, bytes}, from = {(char *)(uintptr_t)src, bytes};
        ssize_t n = process_vm_readv(getpid(), &to, 1, &from, 1, 0);
        if (n == 0 || (n < 0 && errno == EFAULT)) return EFAULT;
        if (n < 0) {  // refused by a sandbox: then as everybody does
            memcpy(dst, src, bytes);
            return 0;
        }
        dst = (char *)dst + n;
        src = (const char *)src + n;
        bytes -= (size_t)n;
    }
    return 0;
}
