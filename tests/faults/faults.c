/* Loaded in front of the C library: numbers the calls that change files, and at one number does what faults_begin asks for.
 *
 * Only calls on regular files and on names count; the standard streams do not. A disk that is full stays full. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum mode { COUNT, KILL_BEFORE, KILL_AFTER, KILL_HALFWAY, FAIL, FULL, SHORT, SIGNAL, FAIL_READ };
enum what { NAME, DATA, SPACE }; /* changes names or flushes, writes bytes, needs room on the disk */
enum verdict { GO_ON, REFUSE, HALF, THEN_DIE };

static enum mode mode;
static int wanted, detail, active, full;
static int changes, reads;
static char names[1 << 16];
static size_t length;

void faults_begin(int how, int at, int with) {
  mode = how; wanted = at; detail = with; full = changes = reads = 0; length = 0; active = 1;
}
void faults_end(void) { active = 0; }
int faults_changes(void) { return changes; }
int faults_reads(void) { return reads; }
const char *faults_names(void) { names[length] = 0; return names; }

static void die(void) { kill(getpid(), SIGKILL); for (;;) pause(); }

static enum verdict change(const char *name, enum what what) {
  int number = __sync_add_and_fetch(&changes, 1);
  size_t size = strlen(name);
  if (mode == COUNT && length + size + 2 < sizeof names) {
    memcpy(names + length, name, size);
    length += size;
    names[length++] = ' ';
  }
  if (full && what != NAME) { errno = ENOSPC; return REFUSE; }
  if (mode == SHORT) return what == DATA ? HALF : GO_ON;
  if (number != wanted) return GO_ON;
  switch (mode) {
    case KILL_BEFORE: die();
    case KILL_AFTER: return THEN_DIE;
    case KILL_HALFWAY: if (what != DATA) die(); return HALF;
    case FAIL: if (detail == EINTR && what != DATA) return GO_ON; errno = detail; return REFUSE;
    case FULL: if (what == NAME) return GO_ON; full = 1; errno = ENOSPC; return REFUSE;
    case SIGNAL: kill(getpid(), detail); return GO_ON;
    default: return GO_ON;
  }
}

static int refused_read(void) {
  if (__sync_add_and_fetch(&reads, 1) != wanted || mode != FAIL_READ) return 0;
  errno = detail;
  return 1;
}

static int is_file(int fd) {
  struct stat about;
  return fd > 2 && !fstat(fd, &about) && S_ISREG(about.st_mode) && about.st_nlink;
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)

#define CHANGE(type, name, what, parameters, arguments)            \
  type name parameters {                                           \
    REAL(name);                                                    \
    if (!active) return real arguments;                            \
    enum verdict verdict = change(#name, what);                    \
    if (verdict == REFUSE) return -1;                              \
    type result = real arguments;                                  \
    if (verdict == THEN_DIE) die();                                \
    return result;                                                 \
  }

#define WRITE(name, parameters, arguments)                         \
  ssize_t name parameters {                                        \
    REAL(name);                                                    \
    if (!active || !is_file(fd)) return real arguments;            \
    enum verdict verdict = change(#name, DATA);                    \
    if (verdict == REFUSE) return -1;                              \
    if (verdict == HALF && size > 1) size = mode == SHORT ? size - size / 3 : size / 2; \
    ssize_t result = real arguments;                               \
    if (verdict == THEN_DIE || (verdict == HALF && mode == KILL_HALFWAY)) die(); \
    return result;                                                 \
  }

#define READ(name, parameters, arguments)                          \
  ssize_t name parameters {                                        \
    REAL(name);                                                    \
    if (active && is_file(fd) && refused_read()) return -1;        \
    return real arguments;                                         \
  }

WRITE(write, (int fd, const void *data, size_t size), (fd, data, size))
WRITE(pwrite64, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { return pwrite64(fd, data, size, at); }
READ(pread64, (int fd, void *data, size_t size, off_t at), (fd, data, size, at))
ssize_t pread(int fd, void *data, size_t size, off_t at) { return pread64(fd, data, size, at); }
READ(preadv64, (int fd, const struct iovec *parts, int count, off_t at), (fd, parts, count, at))
ssize_t preadv(int fd, const struct iovec *parts, int count, off_t at) { return preadv64(fd, parts, count, at); }
READ(preadv64v2, (int fd, const struct iovec *parts, int count, off_t at, int flags), (fd, parts, count, at, flags))
CHANGE(int, fsync, NAME, (int fd), (fd))
CHANGE(int, fdatasync, NAME, (int fd), (fd))
CHANGE(int, ftruncate64, NAME, (int fd, off_t size), (fd, size))
CHANGE(int, rename, NAME, (const char *from, const char *to), (from, to))
CHANGE(int, renameat2, NAME, (int a, const char *from, int b, const char *to, unsigned flags), (a, from, b, to, flags))
CHANGE(int, unlink, NAME, (const char *path), (path))
CHANGE(int, unlinkat, NAME, (int folder, const char *path, int flags), (folder, path, flags))
CHANGE(int, rmdir, NAME, (const char *path), (path))
CHANGE(int, mkdir, SPACE, (const char *path, mode_t bits), (path, bits))
CHANGE(int, chmod, NAME, (const char *path, mode_t bits), (path, bits))

int posix_fallocate64(int fd, off_t at, off_t size) { /* the one call that returns its error */
  REAL(posix_fallocate64);
  if (!active) return real(fd, at, size);
  enum verdict verdict = change("posix_fallocate", SPACE);
  if (verdict == REFUSE) return errno;
  int result = real(fd, at, size);
  if (verdict == THEN_DIE) die();
  return result;
}

int open64(const char *path, int flags, ...) {
  REAL(open64);
  mode_t bits = 0;
  if (!(flags & O_CREAT)) return real(path, flags);
  va_list rest;
  va_start(rest, flags);
  bits = va_arg(rest, int);
  va_end(rest);
  if (!active) return real(path, flags, bits);
  enum verdict verdict = change("creat", SPACE);
  if (verdict == REFUSE) return -1;
  int result = real(path, flags, bits);
  if (verdict == THEN_DIE) die();
  return result;
}
