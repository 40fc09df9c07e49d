// Shares rows among threads.

#pragma once

#include <algorithm>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

// Call run(k, begin, end) for shares k = 0 .. shares - 1 of the rows, each on a thread of its own; the calling thread
// takes the first share and those that no thread could be started for.
template <class Run> void share_rows(int64_t rows, int64_t shares, const Run& run) {
    std::vector<std::thread> threads;
    threads.reserve(shares);
    const auto run_share = [&](int64_t k) { run(k, rows * k / shares, rows * (k + 1) / shares); };
    for (int64_t k = 1; k < shares; ++k) {
        try {
            threads.emplace_back(run_share, k);
        } catch (const std::system_error&) {
            run_share(k);
        }
    }
    run_share(0);
    for (std::thread& thread : threads) thread.join();
}
