/* SPDX-License-Identifier: Apache-2.0 */
/* A fuzzing driver that needs no fuzzer: replays a corpus, then mutates it from a seed.
 *
 *   fuzz_packet.c.replay [--seed N] [--iterations N] [--seconds N] corpus-directory-or-file...
 *
 * The target is LLVMFuzzerTestOneInput, so the same file also builds with -fsanitize=fuzzer. A crash is
 * reproduced by the seed and iteration printed before it, or by the file named. */
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#define MAX_INPUT_BYTES 4096u
#define MAX_INPUTS 256u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes);

struct input {
    uint8_t bytes[MAX_INPUT_BYTES];
    size_t nbytes;
};

static struct input inputs[MAX_INPUTS];
static size_t ninputs;
static uint64_t random_state;

static uint64_t next_random(void)
{
    uint64_t value = (random_state += 0x9e3779b97f4a7c15u);

    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
    value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
    return value ^ (value >> 31);
}

/* The target gets an exact allocation, so that a sanitizer sees a byte read past it. */
static void run(const uint8_t *bytes, size_t nbytes)
{
    uint8_t *exact = malloc(nbytes != 0 ? nbytes : 1);

    if (exact == NULL) {
        fprintf(stderr, "out of memory\n");
        exit(1);
    }
    memcpy(exact, bytes, nbytes);
    (void)LLVMFuzzerTestOneInput(exact, nbytes);
    free(exact);
}

static void load_file(const char *path)
{
    FILE *file = fopen(path, "rb");

    if (file == NULL || ninputs == MAX_INPUTS) {
        fprintf(stderr, "%s: cannot be read, or more than %u inputs\n", path, MAX_INPUTS);
        exit(1);
    }
    inputs[ninputs].nbytes = fread(inputs[ninputs].bytes, 1, MAX_INPUT_BYTES, file);
    fclose(file);
    ninputs++;
}

static void load(const char *path)
{
    char name[4096];
    struct stat status;
    const struct dirent *entry;
    DIR *directory;

    if (stat(path, &status) == 0 && S_ISREG(status.st_mode)) {
        load_file(path);
        return;
    }
    directory = opendir(path);
    if (directory == NULL) {
        fprintf(stderr, "%s: no such corpus\n", path);
        exit(1);
    }
    while ((entry = readdir(directory)) != NULL) {
        if (entry->d_name[0] != '.') {
            snprintf(name, sizeof(name), "%s/%s", path, entry->d_name);
            load_file(name);
        }
    }
    closedir(directory);
}

/* One to four small changes: what a damaged or a hostile stream looks like. */
static size_t mutate(uint8_t *bytes, size_t nbytes)
{
    static const uint8_t edges[] = {0x00, 0x01, 0x7f, 0x80, 0xff};

    for (uint64_t changes = 1 + next_random() % 4; changes > 0 && nbytes > 0; changes--) {
        const size_t at = next_random() % nbytes;
        const size_t length = 1 + next_random() % 8;

        switch (next_random() % 5) {
        case 0:
            bytes[at] ^= (uint8_t)(1u << (next_random() % 8));
            break;
        case 1:
            bytes[at] = (uint8_t)next_random();
            break;
        case 2: /* a field to an edge value */
            memset(bytes + at, edges[next_random() % sizeof(edges)],
                   length < nbytes - at ? length : nbytes - at);
            break;
        case 3:
            nbytes = at;
            break;
        default: /* a piece of another input */
            if (nbytes + length <= MAX_INPUT_BYTES) {
                const struct input *other = &inputs[next_random() % ninputs];

                memmove(bytes + at + length, bytes + at, nbytes - at);
                for (size_t i = 0; i < length; i++) {
                    bytes[at + i] = other->nbytes != 0 ? other->bytes[(at + i) % other->nbytes] : 0;
                }
                nbytes += length;
            }
            break;
        }
    }
    return nbytes;
}

int main(int argc, char **argv)
{
    unsigned long long seed = 1;
    unsigned long long iterations = 1000000;
    double seconds = 5;
    unsigned long long done = 0;
    uint8_t bytes[MAX_INPUT_BYTES];
    const time_t start = time(NULL);

    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--seed") == 0 && i + 1 < argc) {
            seed = strtoull(argv[++i], NULL, 0);
        } else if (strcmp(argv[i], "--iterations") == 0 && i + 1 < argc) {
            iterations = strtoull(argv[++i], NULL, 0);
        } else if (strcmp(argv[i], "--seconds") == 0 && i + 1 < argc) {
            seconds = strtod(argv[++i], NULL);
        } else {
            load(argv[i]);
        }
    }
    if (ninputs == 0) {
        fprintf(stderr, "usage: %s [--seed N] [--iterations N] [--seconds N] corpus...\n", argv[0]);
        return 2;
    }
    for (size_t i = 0; i < ninputs; i++) {
        run(inputs[i].bytes, inputs[i].nbytes);
    }
    random_state = seed;
    while (done < iterations && difftime(time(NULL), start) < seconds) {
        for (unsigned i = 0; i < 1000 && done < iterations; i++, done++) {
            const struct input *from = &inputs[next_random() % ninputs];

            memcpy(bytes, from->bytes, from->nbytes);
            run(bytes, mutate(bytes, from->nbytes));
        }
    }
    printf("%s: %zu inputs, %llu mutations from seed %llu\n", argv[0], ninputs, done, seed);
    return 0;
}
