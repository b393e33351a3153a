// SPDX-License-Identifier: Apache-2.0
// Threads with a name, that leave every signal to the program's own threads.
#ifndef VMTH_XFER_WORKER_THREAD_HPP
#define VMTH_XFER_WORKER_THREAD_HPP

#include <pthread.h>

#include <csignal>
#include <string>
#include <thread>
#include <utility>

namespace vmth {

// Names have at most 15 characters ("vmth-send-63"). The caller joins.
template <typename Body> std::thread start_thread(const std::string &name, Body body)
{
    // A new thread inherits the mask: set it around the start, so that no signal slips in.
    sigset_t all;
    sigset_t old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    try {
        std::thread thread([name, body = std::move(body)]() mutable {
            pthread_setname_np(pthread_self(), name.c_str());
            body();
        });
        pthread_sigmask(SIG_SETMASK, &old, nullptr);
        return thread;
    } catch (...) {
        pthread_sigmask(SIG_SETMASK, &old, nullptr);
        throw;
    }
}

}  // namespace vmth

#endif
