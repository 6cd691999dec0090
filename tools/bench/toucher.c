/* A process with pages of memory, which takes commands and times each touch of a page.
 *
 *     toucher BASE PAGES SEED TASKS
 *
 * Page N is page N of the file BASE (modulo its pages), stamped with N and the seed like RealPages (tmemfs/cli/real_pages.py), and
 * with a version, which changes with each write. Everything except the pages (base pages, versions, orders, times) is allocated and
 * locked before the process enters the cgroup of TASKS: only the pages are limited and swapped.
 *
 * A touch is a load of one byte between two clock_gettime (a vDSO call of about 30 ns: `overhead` is the time of an empty pair).
 * Every byte of a touched page is compared with what was written, outside the timed part.
 *
 * Commands, one per line on stdin; the answer to each is one line of `key value` pairs on stdout:
 *     fill FIRST COUNT                   write pages in order                            ns
 *     pageout                            ask the kernel to swap everything out           swapped (pages)
 *     touch random|sequential COUNT SEED [US]    touch pages that are swapped out, with a pause of US between two touches, then
 *                                        compare                             ns begin end touches wrong major samples
 *     access uniform|zipf COUNT SEED WRITES   touch any pages COUNT times (or for 20 s), WRITES % of touches write; compare each
 *                                                                                        ns touches wrong major
 *     overhead                           an empty pair of clock readings                 ns
 * `samples N` is followed by N times in ns, u32 each.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
#define STAMP 16
#define SWAPPED (1ull << 62)
#define ZIPF_THETA 0.99
#define ACCESS_NS 20000000000ull

static const char *base;
static char *memory;
static uint64_t base_pages, count, seed, state;
static uint32_t *versions, *order, *times;
static double zeta_n, zeta_2;

static void die(const char *what) {
    perror(what);
    exit(1);
}

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static uint64_t draw(void) {   /* xorshift64* */
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 0x2545F4914F6CDD1Dull;
}

static long major_faults(void) {
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    return used.ru_majflt;
}

static size_t stamp_at(uint64_t number) { return number * 64 % (PAGE - STAMP); }

static void stamp(uint64_t number, uint64_t words[2]) {
    words[0] = number;
    words[1] = seed | (uint64_t)versions[number] << 32;
}

static void write_page(uint64_t number) {
    uint64_t words[2];
    char *page = memory + number * PAGE;
    memcpy(page, base + number % base_pages * PAGE, PAGE);
    stamp(number, words);
    memcpy(page + stamp_at(number), words, STAMP);
}

static int is_wrong(uint64_t number) {
    uint64_t words[2];
    size_t at = stamp_at(number);
    const char *page = memory + number * PAGE, *same = base + number % base_pages * PAGE;
    stamp(number, words);
    return memcmp(page, same, at) || memcmp(page + at, words, STAMP) || memcmp(page + at + STAMP, same + at + STAMP, PAGE - at - STAMP);
}

/* Page numbers that are swapped out now, into `order`. */
static uint64_t swapped(void) {
    static uint64_t entries[4096];
    uint64_t found = 0;
    int map = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (map < 0)
        die("toucher: pagemap");
    for (uint64_t first = 0; first < count; first += 4096) {
        uint64_t some = count - first < 4096 ? count - first : 4096;
        off_t at = ((uintptr_t)memory / PAGE + first) * 8;
        if (pread(map, entries, some * 8, at) != (ssize_t)(some * 8))
            die("toucher: pagemap");
        for (uint64_t i = 0; i < some; i++)
            if (entries[i] & SWAPPED)
                order[found++] = first + i;
    }
    close(map);
    return found;
}

static void fill(uint64_t first, uint64_t some) {
    uint64_t began = now();
    for (uint64_t number = first; number < first + some && number < count; number++)
        write_page(number);
    printf("ns %lu\n", now() - began);
}

static void page_out(void) {
    uint64_t out = 0;
    for (int tries = 0; tries < 10 && out < count - count / 256; tries++) {
        madvise(memory, count * PAGE, MADV_PAGEOUT);
        out = swapped();
    }
    printf("swapped %lu\n", out);
}

static uint32_t touch(uint64_t number) {
    uint64_t began = now();
    (void)*(volatile char *)(memory + number * PAGE);
    uint64_t took = now() - began;
    return took > UINT32_MAX ? UINT32_MAX : took;
}

static void pause_us(uint64_t us) {
    struct timespec t = {us / 1000000, us % 1000000 * 1000};
    if (us)
        nanosleep(&t, NULL);
}

static void touch_swapped(int is_random, uint64_t most, uint64_t us) {
    uint64_t found = swapped(), touches = found < most ? found : most, ns = 0, wrong = 0;
    for (uint64_t i = 0; is_random && i < touches; i++) {
        uint64_t other = i + draw() % (found - i), kept = order[i];
        order[i] = order[other];
        order[other] = kept;
    }
    long major = major_faults();
    uint64_t began = now();
    for (uint64_t i = 0; i < touches; i++, pause_us(us))
        times[i] = touch(order[i]);
    uint64_t ended = now();
    major = major_faults() - major;
    for (uint64_t i = 0; i < touches; i++) {
        ns += times[i];
        wrong += is_wrong(order[i]);
    }
    printf("ns %lu begin %lu end %lu touches %lu wrong %lu major %ld samples %lu\n", ns, began, ended, touches, wrong, major, touches);
    fwrite(times, sizeof *times, touches, stdout);
}

static void prepare_zipf(void) {
    if (zeta_n)
        return;
    for (uint64_t i = 1; i <= count; i++)
        zeta_n += pow(1.0 / i, ZIPF_THETA);
    zeta_2 = 1 + pow(0.5, ZIPF_THETA);
}

/* Gray et al., Quickly generating billion-record synthetic databases, 1994; ranks are spread over the pages by `order`. */
static uint64_t zipf(void) {
    static double alpha, eta;
    if (!alpha) {
        alpha = 1 / (1 - ZIPF_THETA);
        eta = (1 - pow(2.0 / count, 1 - ZIPF_THETA)) / (1 - zeta_2 / zeta_n);
    }
    double u = (draw() >> 11) * 0x1p-53, uz = u * zeta_n;
    uint64_t rank = uz < 1 ? 0 : uz < zeta_2 ? 1 : (uint64_t)(count * pow(eta * u - eta + 1, alpha));
    return order[rank < count ? rank : count - 1];
}

static void access_pages(int is_zipf, uint64_t most, uint64_t write_percent) {
    if (is_zipf) {
        uint64_t kept = state;
        state = 88172645463325252ull;   /* the same pages are hot every time */
        prepare_zipf();
        for (uint64_t i = 0; i < count; i++)
            order[i] = i;
        for (uint64_t i = count - 1; i; i--) {
            uint64_t other = draw() % (i + 1), one = order[i];
            order[i] = order[other];
            order[other] = one;
        }
        state = kept;
    }
    uint64_t touches = 0, ns = 0, wrong = 0, until = now() + ACCESS_NS;
    long major = major_faults();
    while (touches < most && now() < until)
        for (int i = 0; i < 16; i++, touches++) {
            uint64_t number = is_zipf ? zipf() : draw() % count;
            ns += touch(number);
            wrong += is_wrong(number);
            if (draw() % 100 < write_percent) {
                uint64_t words[2];
                versions[number]++;
                stamp(number, words);
                memcpy(memory + number * PAGE + stamp_at(number), words, STAMP);
            }
        }
    printf("ns %lu touches %lu wrong %lu major %ld\n", ns, touches, wrong, major_faults() - major);
}

static void overhead(void) {
    uint64_t best = UINT64_MAX;
    for (int i = 0; i < 1000; i++) {
        uint64_t began = now(), took = now() - began;
        best = took < best ? took : best;
    }
    printf("ns %lu\n", best);
}

static void *locked(size_t bytes) {
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (at == MAP_FAILED || mlock(at, bytes))
        die("toucher: memory");
    return at;
}

static void prepare(const char *file, const char *tasks) {
    struct stat found;
    int fd = open(file, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &found))
        die("toucher: base");
    base_pages = found.st_size / PAGE;
    base = mmap(NULL, found.st_size, PROT_READ, MAP_SHARED | MAP_POPULATE, fd, 0);
    versions = locked(count * sizeof *versions);
    order = locked(count * sizeof *order);
    times = locked(count * sizeof *times);
    memory = mmap(NULL, count * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED || memory == MAP_FAILED || madvise(memory, count * PAGE, MADV_NOHUGEPAGE))
        die("toucher: memory");
    FILE *out = fopen(tasks, "w");
    if (!out || fprintf(out, "%d\n", getpid()) < 0 || fclose(out))
        die("toucher: cgroup");
}

int main(int argc, char **argv) {
    static char line[200];
    if (argc != 5) {
        fprintf(stderr, "usage: toucher BASE PAGES SEED TASKS\n");
        return 2;
    }
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    signal(SIGINT, SIG_IGN);
    count = strtoull(argv[2], NULL, 10);
    seed = strtoul(argv[3], NULL, 10);
    prepare(argv[1], argv[4]);
    puts("ready 1");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        char word[20] = "", how[20] = "";
        unsigned long a = 0, b = 0, c = 0;
        if (sscanf(line, "%19s %lu %lu", word, &a, &b) < 2)
            sscanf(line, "%19s %19s %lu %lu %lu", word, how, &a, &b, &c);
        state = 0x9E3779B97F4A7C15ull ^ ((b + 1) * 0xD1342543DE82EF95ull) ^ seed;
        if (!strcmp(word, "fill"))
            fill(a, b);
        else if (!strcmp(word, "pageout"))
            page_out();
        else if (!strcmp(word, "touch"))
            touch_swapped(!strcmp(how, "random"), a, c);
        else if (!strcmp(word, "access"))
            access_pages(!strcmp(how, "zipf"), a, c);
        else if (!strcmp(word, "overhead"))
            overhead();
        else
            die("toucher: unknown command");
        fflush(stdout);
    }
    return 0;
}
