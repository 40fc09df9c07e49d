// A row of raw logits, block by block: from memory into vectors as a loss sees them, and gradients back into memory.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "simd.hpp"

extern "C" {

struct Head {
    float scale, softcap;  // z = softcap * tanh(scale * raw / softcap); softcap 0: z = scale * raw
};
}

namespace {

// Read `count` raw logits into whole vectors z, filled up without mass; return their maximum. Fetches ahead.
template <class Raw> float read_block(const Raw* raw, int64_t count, Head head, Vec* z) {
    Vec top = spread(kNoMass);
    const float slope = head.softcap > 0 ? -2 * head.scale / head.softcap : 0;
    const auto shape = [&](Vec x) {
        Vec shaped = x * head.scale;
        if (head.softcap > 0) {
            const Vec e = exp(x * slope > 0 ? x * -slope : x * slope), t = (1.0f - e) / (1.0f + e);
            shaped = head.softcap * (shaped < 0 ? -t : t);
        }
        shaped = x < kNoMass ? spread(kNoMass) : shaped;
        top = max(top, shaped);
        return shaped;
    };
    const int64_t whole = count / kLanes;
    for (int64_t i = 0; i < whole; ++i) {
        __builtin_prefetch(raw + (i + kBlock) * kLanes);
        z[i] = shape(load(raw + i * kLanes));
    }
    if (whole * kLanes < count) {
        Vec rest = spread(-INFINITY);
        for (int64_t i = whole * kLanes; i < count; ++i) rest[i - whole * kLanes] = widen(raw[i]);
        z[whole] = shape(rest);
    }
    return maximum(top);
}

// Index of the first number in z that equals `value`, which is there.
int64_t first_index(const Vec* z, int64_t size, float value) {
    IntVec index{}, found = index + INT32_MAX;
    for (int k = 0; k < kLanes; ++k) index[k] = k;
    for (int64_t i = 0; i < size; ++i, index += kLanes) found = ((z[i] == value) & (found > index)) ? index : found;
    int32_t first = found[0];
    for (int k = 1; k < kLanes; ++k) first = std::min(first, found[k]);
    return first;
}

// Through z = softcap * tanh(...): times 1 - (z / softcap)^2.
void multiply_by_slope(Vec* gradient, const Vec* z, float inverse_cap, int64_t size) {
    for (int64_t i = 0; i < size; ++i) {
        const Vec t = z[i] * inverse_cap, slope = 1.0f - t * t;
        gradient[i] *= slope < 0 ? Vec{} : slope;
    }
}

// Store a block that holds `count` numbers; the last vector may be partial.
template <class Raw> void write_block(const Vec* block, int64_t count, Raw* to) {
    const int64_t whole = count / kLanes;
    for (int64_t i = 0; i < whole; ++i) store(to + i * kLanes, block[i]);
    if (whole * kLanes == count) return;
    Raw rest[kLanes];
    store(rest, block[whole]);
    std::copy(rest, rest + count % kLanes, to + whole * kLanes);
}
}
