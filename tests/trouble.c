/* A disk that is slow or fails, and a clock that jumps, for a process that runs with this library in LD_PRELOAD
 * (tests/trouble.py). What is wrong stands in a file, so that it can change while the process works. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

struct wrong {
    int64_t clock;    /* seconds that the wall clock is off */
    int64_t slow;     /* milliseconds that a write to the folder takes */
    int64_t error;    /* with which writing there fails; 0: it does not */
    char folder[4072];
};
static const struct wrong *wrong;

/* Read from now on what is wrong from this file, which is as long as the structure. */
int trouble_use(const char *path) {
    int fd = open(path, O_RDONLY);
    void *at = fd < 0 ? MAP_FAILED : mmap(NULL, sizeof(struct wrong), PROT_READ, MAP_SHARED, fd, 0);
    if (fd >= 0) close(fd);
    if (at == MAP_FAILED) return -1;
    wrong = at;
    return 0;
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static int inside(const char *path) {
    size_t length;
    if (!wrong || !wrong->folder[0] || !path) return 0;
    length = strlen(wrong->folder);
    return !strncmp(path, wrong->folder, length) && (path[length] == '/' || !path[length]);
}

static int is_inside(int fd) {
    char link[64], path[PATH_MAX];
    ssize_t length;
    if (!wrong || !(wrong->slow || wrong->error)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return inside(path);
}

/* Whether it fails. A write takes its time; a change of names does not. */
static int fails(int there, int takes) {
    if (!there) return 0;
    if (takes && wrong->slow) {
        struct timespec pause = {wrong->slow / 1000, wrong->slow % 1000 * 1000000};
        nanosleep(&pause, NULL);
    }
    if (!wrong->error) return 0;
    errno = (int)wrong->error;
    return 1;
}

/* A full disk lets names be made, and what there is be read and removed. */
static int refuses(const char *path, int flags) {
    return wrong && wrong->error != ENOSPC && (flags & (O_WRONLY | O_RDWR | O_CREAT)) && fails(inside(path), 0);
}

#define OPEN(name)                                                                                        \
    int name(const char *path, int flags, ...) {                                                          \
        va_list rest; mode_t mode;                                                                        \
        va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest);                                 \
        REAL(name);                                                                                       \
        return refuses(path, flags) ? -1 : real(path, flags, mode);                                       \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                                      \
    int name(int folder, const char *path, int flags, ...) {                                              \
        va_list rest; mode_t mode;                                                                        \
        va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest);                                 \
        REAL(name);                                                                                       \
        return refuses(path, flags) ? -1 : real(folder, path, flags, mode);                               \
    }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    return fails(is_inside(fd), 1) ? -1 : real(fd, data, size);
}

int fsync(int fd) {
    REAL(fsync);
    return fails(is_inside(fd), 1) ? -1 : real(fd);
}

int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    return refuses(path, O_CREAT) ? -1 : real(path, mode);
}

int rename(const char *from, const char *to) {
    REAL(rename);
    return refuses(to, O_CREAT) ? -1 : real(from, to);
}

int unlink(const char *path) {
    REAL(unlink);
    return refuses(path, O_WRONLY) ? -1 : real(path);
}

int clock_gettime(clockid_t clock, struct timespec *found) {
    REAL(clock_gettime);
    int status = real(clock, found);
    if (!status && wrong && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) found->tv_sec += wrong->clock;
    return status;
}

int gettimeofday(struct timeval *found, void *zone) {
    REAL(gettimeofday);
    int status = real(found, zone);
    if (!status && wrong) found->tv_sec += wrong->clock;
    return status;
}

time_t time(time_t *found) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (found) *found = now.tv_sec;
    return now.tv_sec;
}
