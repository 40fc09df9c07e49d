// Sorts rows of non-negative floats, whose bits are in the order of the numbers: by the lowest eleven bits, then, keeping
// that order among equals, by the next eleven, then by the rest.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

#include "threads.hpp"

namespace {

constexpr int kDigit = 11, kPasses = 3, kBins = 1 << kDigit;

using Key = uint64_t;  // the bits of a number above its index

int64_t digit(Key key, int pass) { return (key >> (32 + pass * kDigit)) & (kBins - 1); }

void sort_row(const float* row, int64_t width, Key* keys, Key* other, float* sorted, int64_t* order) {
    uint32_t next[kPasses][kBins] = {};
    for (int64_t i = 0; i < width; ++i) {
        uint32_t bits;
        std::memcpy(&bits, row + i, sizeof bits);
        keys[i] = Key(bits) << 32 | Key(i);
        for (int pass = 0; pass < kPasses; ++pass) ++next[pass][digit(keys[i], pass)];
    }
    for (int pass = 0; pass < kPasses; ++pass, std::swap(keys, other)) {
        uint32_t before = 0;
        for (uint32_t& place : next[pass]) before += std::exchange(place, before);
        for (int64_t i = 0; i < width; ++i) other[next[pass][digit(keys[i], pass)]++] = keys[i];
    }
    for (int64_t i = 0; i < width; ++i) {
        const uint32_t bits = keys[i] >> 32;
        std::memcpy(sorted + i, &bits, sizeof bits);
        order[i] = uint32_t(keys[i]);
    }
}
}

// Write the rows `[count, width]` in ascending order, and where each number was. `width` is below 2^32. Returns 0, or 1
// when there is no memory to work in.
extern "C" int sort_rows(const float* rows, int64_t count, int64_t width, float* sorted, int64_t* order,
                         int32_t threads) try {
    const int64_t shares = std::max<int64_t>(1, std::min<int64_t>(threads, count));
    const std::unique_ptr<Key[]> memory(new Key[shares * 2 * width]);
    share_rows(count, shares, [&](int64_t k, int64_t begin, int64_t end) {
        Key* keys = memory.get() + k * 2 * width;
        for (int64_t at = begin * width; at < end * width; at += width)
            sort_row(rows + at, width, keys, keys + width, sorted + at, order + at);
    });
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}
