/* A disk that becomes full: a library to preload, which lets writes below a directory fail.
 *
 *     cc -shared -fPIC -O2 -o full_disk.so full_disk.c -ldl
 *     LD_PRELOAD=./full_disk.so python ...
 *
 * full_disk(directory, allowed) permits `allowed` operations that need space (creating a file or a
 * directory, writing, flushing) on paths below `directory`; every later one fails with ENOSPC, as
 * on a full disk. Removing and renaming still work. full_disk_count() is how many were asked for.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char below[PATH_MAX];
static long allowed = LONG_MAX;
static atomic_long count;

void full_disk(const char *directory, long operations) {
    if (!realpath(directory, below)) below[0] = 0;
    allowed = operations;
    atomic_store(&count, 0);
}

long full_disk_count(void) { return atomic_load(&count); }

static int fails(void) {
    if (atomic_fetch_add(&count, 1) < allowed) return 0;
    errno = ENOSPC;
    return 1;
}

static int is_below(const char *path) {
    size_t length = strlen(below);
    return length && !strncmp(path, below, length) && (path[length] == '/' || !path[length]);
}

/* Paths are absolute in what is tested; a relative one is taken from the working directory. */
static int path_below(const char *path) {
    char whole[2 * PATH_MAX], here[PATH_MAX];
    if (!below[0]) return 0;
    if (path[0] == '/') return is_below(path);
    if (!getcwd(here, sizeof here)) return 0;
    snprintf(whole, sizeof whole, "%s/%s", here, path);
    return is_below(whole);
}

static int file_below(int file) {
    char link[64], path[PATH_MAX];
    if (!below[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return is_below(path);
}

#define NEXT(name) ((typeof(&name))dlsym(RTLD_NEXT, #name))

#define OPEN(name)                                                                                 \
    int name(const char *path, int flags, ...) {                                                   \
        va_list rest;                                                                              \
        va_start(rest, flags);                                                                     \
        mode_t mode = (flags & (O_CREAT | __O_TMPFILE)) ? va_arg(rest, mode_t) : 0;                \
        va_end(rest);                                                                              \
        int creates = (flags & O_CREAT) && access(path, F_OK);                                     \
        if (creates && path_below(path) && fails()) return -1;                                     \
        return NEXT(name)(path, flags, mode);                                                      \
    }
OPEN(open)
OPEN(open64)

int mkdir(const char *path, mode_t mode) {
    if (access(path, F_OK) && path_below(path) && fails()) return -1;
    return NEXT(mkdir)(path, mode);
}

ssize_t write(int file, const void *data, size_t size) {
    if (file > 2 && file_below(file) && fails()) return -1;
    return NEXT(write)(file, data, size);
}

ssize_t writev(int file, const struct iovec *parts, int number) {
    if (file > 2 && file_below(file) && fails()) return -1;
    return NEXT(writev)(file, parts, number);
}

ssize_t pwrite64(int file, const void *data, size_t size, off64_t at) {
    if (file_below(file) && fails()) return -1;
    return NEXT(pwrite64)(file, data, size, at);
}

int fsync(int file) {
    if (file_below(file) && fails()) return -1;
    return NEXT(fsync)(file);
}
