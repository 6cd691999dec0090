/* The floor: the minimum that a FUSE server can do, as a baseline for tmemfs.
 *
 *     floor null|raw MOUNTPOINT BYTES
 *
 * It serves one file, `swap`, of BYTES. null: READ returns a constant page, WRITE drops its data. raw: pages are kept as they are
 * in one array of memory, and FALLOCATE punches holes into it. It implements the kernel's protocol itself
 * (include/uapi/linux/fuse.h, as tmemfs/fuse/wire.py describes it): one thread, one read(2) and one write(2) per request, no copy
 * of a page beyond the kernel's in raw's READ, one in its WRITE. statfs returns a block size other than zero, without which loop
 * turns discard off. It prints 'ready' when it is mounted, and ends when it is unmounted. Its memory is locked as it is faulted in:
 * its pages are swap.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define PAGE 4096
#define SWAP_NODE 2
#define REQUEST_PAGES 256
#define REQUEST_BYTES (REQUEST_PAGES * PAGE)
#define IO_HEAD (sizeof(struct fuse_in_header) + sizeof(struct fuse_write_in))
#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24
#endif

static int device, is_raw;
static uint64_t size;
static char *pages;   /* raw: `size` bytes; null: REQUEST_BYTES that every READ answers with */

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void reply(uint64_t unique, int error, const void *body, size_t bytes) {
    struct fuse_out_header head = {.len = sizeof head + (error ? 0 : bytes), .error = -error, .unique = unique};
    struct iovec parts[2] = {{&head, sizeof head}, {(void *)body, bytes}};
    if (writev(device, parts, error || !bytes ? 1 : 2) < 0 && errno != ENOENT && errno != ENODEV)
        perror("floor: reply");
}

static struct fuse_attr attributes(uint64_t node) {
    struct fuse_attr attr = {.ino = node, .nlink = 1, .blksize = PAGE};
    attr.mode = node == FUSE_ROOT_ID ? S_IFDIR | 0755 : S_IFREG | 0600;
    if (node == SWAP_NODE) {
        attr.size = size;
        attr.blocks = size / 512;
    }
    return attr;
}

static void initialise(const struct fuse_in_header *head, const struct fuse_init_in *in) {
    struct fuse_init_out out = {
        .major = FUSE_KERNEL_VERSION, .minor = FUSE_KERNEL_MINOR_VERSION, .max_readahead = in->max_readahead,
        .max_background = 64, .congestion_threshold = 48, .max_write = REQUEST_BYTES, .time_gran = 1,
        .max_pages = REQUEST_PAGES,
    };
    out.flags = in->flags & (FUSE_ASYNC_READ | FUSE_BIG_WRITES | FUSE_ASYNC_DIO | FUSE_MAX_PAGES | FUSE_PARALLEL_DIROPS);
    reply(head->unique, 0, &out, sizeof out);
}

static void look_up(const struct fuse_in_header *head, const char *name) {
    if (head->nodeid != FUSE_ROOT_ID || strcmp(name, "swap")) {
        reply(head->unique, ENOENT, NULL, 0);
        return;
    }
    struct fuse_entry_out out = {.nodeid = SWAP_NODE, .entry_valid = 3600, .attr_valid = 3600};
    out.attr = attributes(SWAP_NODE);
    reply(head->unique, 0, &out, sizeof out);
}

static void read_pages(const struct fuse_in_header *head, const struct fuse_read_in *in) {
    uint64_t bytes = in->offset >= size ? 0 : in->size < size - in->offset ? in->size : size - in->offset;
    reply(head->unique, 0, is_raw ? pages + in->offset : pages, bytes);
}

static void write_pages(const struct fuse_in_header *head, const struct fuse_write_in *in, const char *data) {
    if (in->offset > size || in->size > size - in->offset) {
        reply(head->unique, ENOSPC, NULL, 0);
        return;
    }
    if (is_raw)
        memcpy(pages + in->offset, data, in->size);
    struct fuse_write_out out = {.size = in->size};
    reply(head->unique, 0, &out, sizeof out);
}

static void punch(const struct fuse_in_header *head, const struct fuse_fallocate_in *in) {
    if (in->mode != (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE) && in->mode != (FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE)) {
        reply(head->unique, EOPNOTSUPP, NULL, 0);
        return;
    }
    uint64_t length = in->offset >= size ? 0 : in->length < size - in->offset ? in->length : size - in->offset;
    int whole = !(in->offset % PAGE) && !(length % PAGE);
    if (is_raw && length && (!whole || (madvise(pages + in->offset, length, MADV_DONTNEED_LOCKED)
                                        && madvise(pages + in->offset, length, MADV_DONTNEED))))
        memset(pages + in->offset, 0, length);
    reply(head->unique, 0, NULL, 0);
}

static void answer(char *request, ssize_t count) {
    const struct fuse_in_header *head = (const void *)request;
    const void *body = head + 1;
    (void)count;
    switch (head->opcode) {
    case FUSE_READ: read_pages(head, body); break;
    case FUSE_WRITE: write_pages(head, body, request + IO_HEAD); break;
    case FUSE_FALLOCATE: punch(head, body); break;
    case FUSE_INIT: initialise(head, body); break;
    case FUSE_LOOKUP: look_up(head, body); break;
    case FUSE_GETATTR:
    case FUSE_SETATTR: {
        struct fuse_attr_out out = {.attr_valid = 3600, .attr = attributes(head->nodeid)};
        reply(head->unique, 0, &out, sizeof out);
        break;
    }
    case FUSE_STATFS: {
        struct fuse_statfs_out out = {.st = {.blocks = size / PAGE, .bsize = PAGE, .frsize = PAGE, .namelen = 255}};
        reply(head->unique, 0, &out, sizeof out);
        break;
    }
    case FUSE_OPEN:
    case FUSE_OPENDIR: {
        struct fuse_open_out out = {.open_flags = head->opcode == FUSE_OPEN ? FOPEN_DIRECT_IO : 0};
        reply(head->unique, 0, &out, sizeof out);
        break;
    }
    case FUSE_FSYNC:
    case FUSE_FLUSH:
    case FUSE_RELEASE:
    case FUSE_RELEASEDIR:
    case FUSE_READDIR: reply(head->unique, 0, NULL, 0); break;
    case FUSE_FORGET:
    case FUSE_BATCH_FORGET:
    case FUSE_INTERRUPT: break;
    default: reply(head->unique, ENOSYS, NULL, 0);
    }
}

static char *memory(uint64_t bytes, int flags) {
    char *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | flags, -1, 0);
    if (at == MAP_FAILED)
        die("floor: mmap");
    return at;
}

int main(int argc, char **argv) {
    if (argc != 4 || (strcmp(argv[1], "null") && strcmp(argv[1], "raw"))) {
        fprintf(stderr, "usage: floor null|raw MOUNTPOINT BYTES\n");
        return 2;
    }
    is_raw = !strcmp(argv[1], "raw");
    size = strtoull(argv[3], NULL, 10);
    char *request = memory(REQUEST_BYTES + PAGE, MAP_POPULATE);
    pages = is_raw ? memory(size, 0) : memory(REQUEST_BYTES, MAP_POPULATE);
    if (!is_raw)
        memset(pages, 0x5a, REQUEST_BYTES);
    madvise(pages, is_raw ? size : REQUEST_BYTES, MADV_NOHUGEPAGE);
    if (mlockall(MCL_CURRENT | MCL_ONFAULT))
        die("floor: mlockall");
    device = open("/dev/fuse", O_RDWR | O_CLOEXEC);
    if (device < 0)
        die("floor: /dev/fuse");
    char options[200];
    snprintf(options, sizeof options, "fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions", device);
    if (mount("floor", argv[2], "fuse.floor", MS_NOSUID | MS_NODEV, options))
        die("floor: mount");
    puts("ready");
    fclose(stdout);
    signal(SIGINT, SIG_IGN);
    for (;;) {
        ssize_t count = read(device, request, REQUEST_BYTES + PAGE);
        if (count >= 0)
            answer(request, count);
        else if (errno == ENODEV)
            return 0;
        else if (errno != EINTR && errno != EAGAIN && errno != ENOENT)
            die("floor: read");
    }
}
