/* A wall clock that a test sets, for LD_PRELOAD: the real one plus the seconds (int64) in the file that STRATUM_TEST_LEAP names.
 * Every process that has it mapped leaps at once. The monotonic clocks stay as they are. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile const int64_t *leap_s;
static int (*real_gettime)(clockid_t, struct timespec *);

__attribute__((constructor)) static void prepare(void)
{
    const char *path = getenv("STRATUM_TEST_LEAP");
    int descriptor = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;

    real_gettime = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    if (descriptor >= 0) {
        void *mapped = mmap(NULL, sizeof(int64_t), PROT_READ, MAP_SHARED, descriptor, 0);
        if (mapped != MAP_FAILED)
            leap_s = mapped;
        close(descriptor);
    }
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    int failed;

    if (!real_gettime)
        prepare();
    failed = real_gettime(clock, now);
    if (!failed && leap_s && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += *leap_s;
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    struct timespec exact;

    (void)zone;
    clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *out)
{
    struct timespec exact;

    clock_gettime(CLOCK_REALTIME, &exact);
    if (out)
        *out = exact.tv_sec;
    return exact.tv_sec;
}
