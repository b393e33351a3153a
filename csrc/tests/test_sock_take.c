/* SPDX-License-Identifier: Apache-2.0 */
/* Taking from real socket pairs: what is there, what comes meanwhile, the end, errors. */
#define _GNU_SOURCE
#include "sys/sock_take.h"

#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "t_check.h"

#define PIECE 4096u
#define PIECES 64u
/* Longer than any test waits: what is to come does come. */
#define LONG_NS 60000000000

static int pair[2];
static uint8_t content[PIECE * PIECES];
static uint8_t taken[sizeof(content) + 1];

static void open_pair(void)
{
    T_EQUAL(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0);
    for (size_t i = 0; i < sizeof(content); i++) {
        content[i] = (uint8_t)(i * 31 + i / 251);
    }
    memset(taken, 0, sizeof(taken));
}

static void close_pair(void)
{
    close(pair[0]);
    close(pair[1]);
}

static void *write_pieces(void *unused)
{
    (void)unused;
    for (size_t at = 0; at < sizeof(content);) {
        const ssize_t n = send(pair[0], content + at, PIECE, MSG_NOSIGNAL);

        T_EQUAL(n > 0, 1);
        at += (size_t)n;
    }
    return NULL;
}

static void test_what_is_there_is_taken_without_waiting(void)
{
    size_t got = 99;
    bool ended = true;

    open_pair();
    T_EQUAL(vmth_sock_take(pair[1], taken, PIECE, LONG_NS, &got, &ended), 0);
    T_EQUAL(got, 0); /* never waits for the first byte */
    T_EQUAL(ended, 0);
    T_EQUAL(send(pair[0], content, 100, 0), 100);
    T_EQUAL(vmth_sock_take(pair[1], taken, PIECE, 0, &got, &ended), 0);
    T_EQUAL(got, 100);
    T_EQUAL(ended, 0);
    T_EQUAL(memcmp(taken, content, 100), 0);
    close_pair();
}

static void test_pieces_that_come_meanwhile_are_one(void)
{
    pthread_t writer;
    size_t total = 0;
    unsigned calls = 0;

    open_pair();
    T_EQUAL(pthread_create(&writer, NULL, write_pieces, NULL), 0);
    while (total < sizeof(content)) {
        size_t got = 0;
        bool ended = true;

        T_EQUAL(vmth_sock_take(pair[1], taken + total, sizeof(content) - total, LONG_NS, &got,
                               &ended),
                0);
        T_EQUAL(ended, 0);
        total += got;
        calls += got > 0;
    }
    T_EQUAL(pthread_join(writer, NULL), 0);
    T_EQUAL(calls, 1); /* with so much patience only a full buffer ends a call */
    T_EQUAL(memcmp(taken, content, sizeof(content)), 0);
    T_EQUAL(taken[sizeof(content)], 0);
    close_pair();
}

static void test_the_end_comes_with_what_was_before_it(void)
{
    size_t got = 0;
    bool ended = false;

    open_pair();
    T_EQUAL(send(pair[0], content, 100, 0), 100);
    T_EQUAL(shutdown(pair[0], SHUT_WR), 0);
    T_EQUAL(vmth_sock_take(pair[1], taken, PIECE, LONG_NS, &got, &ended), 0);
    T_EQUAL(got, 100);
    T_EQUAL(ended, 1);
    T_EQUAL(vmth_sock_take(pair[1], taken, PIECE, LONG_NS, &got, &ended), 0);
    T_EQUAL(got, 0);
    T_EQUAL(ended, 1);
    close_pair();
}

static void test_a_full_buffer_does_not_show_the_end(void)
{
    size_t got = 0;
    bool ended = true;

    open_pair();
    T_EQUAL(send(pair[0], content, 100, 0), 100);
    T_EQUAL(shutdown(pair[0], SHUT_WR), 0);
    T_EQUAL(vmth_sock_take(pair[1], taken, 100, LONG_NS, &got, &ended), 0);
    T_EQUAL(got, 100);
    T_EQUAL(ended, 0);
    close_pair();
}

static void test_errors_leave_the_outputs_alone(void)
{
    size_t got = 99;
    bool ended = true;

    T_EQUAL(vmth_sock_take(-1, taken, PIECE, 0, &got, &ended), -EBADF);
    T_EQUAL(got, 99);
    T_EQUAL(ended, 1);
}

int main(void)
{
    test_what_is_there_is_taken_without_waiting();
    test_pieces_that_come_meanwhile_are_one();
    test_the_end_comes_with_what_was_before_it();
    test_a_full_buffer_does_not_show_the_end();
    test_errors_leave_the_outputs_alone();
    return T_PASS;
}
