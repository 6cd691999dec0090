/* A process that needs more memory than there is: overfill PAGES TASKS ORDER.
 *
 * It enters the cgroup of TASKS and runs until it is killed.
 *
 *   in-order    fills its pages with noise, one after the other: refused pages are neighbours in swap, 60 per request
 *   at-random   fills them with compressible data, then reads random ones and overwrites them with noise: such a page keeps its
 *               swap slot, so each refused page is a request of its own
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE_BYTES = 4096, WORDS = PAGE_BYTES / 8 };

static uint64_t noise = 88172645463325252ull;

static uint64_t next_noise(void)
{
    noise ^= noise << 13;
    noise ^= noise >> 7;
    return noise ^= noise << 17;
}

static void fill_with_noise(uint64_t *page)
{
    for (int word = 0; word < WORDS; word++)
        page[word] = next_noise();
}

int main(int count, char **argument)
{
    if (count != 4)
        return 2;
    size_t pages = strtoul(argument[1], NULL, 10);
    int tasks = open(argument[2], O_WRONLY);
    if (dprintf(tasks, "%d", getpid()) < 0)
        return 2;
    close(tasks);
    uint64_t *memory = mmap(NULL, pages * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return 2;
    madvise(memory, pages * PAGE_BYTES, MADV_NOHUGEPAGE);
    int in_order = !strcmp(argument[3], "in-order");
    for (size_t page = 0; page < pages; page++)
        if (in_order)
            fill_with_noise(memory + page * WORDS);
        else
            memory[page * WORDS] = page + 1;
    for (;;) {
        size_t page = next_noise() % pages;
        uint64_t *words = memory + page * WORDS;
        if (!in_order && *(volatile uint64_t *)words != page + 1)
            return 3; /* not what was written there */
        fill_with_noise(words);
        words[0] = page + 1;
    }
}
