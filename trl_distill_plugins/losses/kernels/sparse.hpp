// What sparse.cpp is called with, the memory it works in, and sums over a row's named tokens and over its others.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "logits.hpp"

extern "C" {

// What read_sparse says of a row. The row's maximum is subtracted from every z but `peak`.
struct RowFigures {
    float log_z;    // log sum exp z, over all tokens
    float entropy;  // of softmax z
    float label;    // z of the label
    float mean;     // of z, over all tokens; 0 unless want_mean
    float peak;     // the largest z of a token that is not named, as it is
};

struct SparseTile {
    int64_t rows, vocabulary, named;
    void* student;               // [rows, vocabulary], raw logits
    const int64_t* ids;          // [rows, named], different tokens; -1: none
    const int64_t* labels;       // [rows]
    const float* temperatures;   // [temperature_count], the first is 1
    float* logits;               // [rows, named], z of the named tokens minus the row's maximum
    float* rest;                 // [temperature_count, rows], log sum exp((z - maximum) / T) over the others
    float* mass;                 // [temperature_count, rows], sum exp((z - peak) / T) over the others
    RowFigures* figures;         // [rows]
    int64_t* top;                // [rows], the first token of the largest z
    const float* of_named;       // [rows, named], the gradient by z of the named tokens,
    const float* of_rest;        // [temperature_count, rows], and by that of the others, in sum
    const float* token_scale;    // [rows]
    float on_label, everywhere;  // what cross-entropies add to the gradient of the label, and of each token
    Head head;
    int32_t temperature_count, threads, is_bf16, want_mean;
};
}

namespace {

constexpr float kFloor = -1e29f;  // above kNoMass: less this, z of a block without mass have exponentials of 0

inline int64_t vectors(int64_t numbers) { return (numbers + kLanes - 1) / kLanes; }
inline int64_t blocks(int64_t numbers) { return (vectors(numbers) + kBlock - 1) / kBlock; }

struct BlockSums {
    float shift;           // what was subtracted from z before exp
    float mean;            // sum of e (z - shift) at T = 1
    std::vector<float> e;  // sum of exp((z - shift) / T), of each temperature
};

// S is the type of the raw logits.
template <class S> struct Workspace {
    std::vector<BlockSums> named, others;
    std::vector<S> raw;  // of the named tokens and, last, of the label
    std::vector<Vec> z;  // the same after scale and soft cap

    explicit Workspace(const SparseTile& tile) : raw(tile.named + 1), z(vectors(tile.named + 1)) {
        const BlockSums empty{0, 0, std::vector<float>(tile.temperature_count)};
        named.assign(blocks(tile.named), empty);
        others.assign(blocks(tile.vocabulary), empty);
    }
    float z_of(int64_t named_token) const { return z[named_token / kLanes][named_token % kLanes]; }
};

// Exponentiate a block at all temperatures, and sum.
inline void sum_block(const SparseTile& tile, const Vec* z, int64_t size, float top, BlockSums& sums) {
    const float shift = sums.shift = std::max(top, kFloor);
    Vec total{}, mean{};
    for (int64_t i = 0; i < size; ++i) {
        const Vec d = z[i] - shift, e = exp(d);
        total += e;
        mean += e * d;
    }
    sums.e[0] = sum(total);
    sums.mean = sum(mean);
    for (int t = 1; t < tile.temperature_count; ++t) {
        const float inverse_t = 1 / tile.temperatures[t];
        Vec tempered{};
        for (int64_t i = 0; i < size; ++i) tempered += exp((z[i] - shift) * inverse_t);
        sums.e[t] = sum(tempered);
    }
}

// Sum of z - reference over the tokens that are there.
inline float sum_above(const Vec* z, int64_t size, float reference) {
    Vec total{};
    for (int64_t i = 0; i < size; ++i) total += z[i] == kNoMass ? Vec{} : z[i] - reference;
    return sum(total);
}

inline float largest(const std::vector<BlockSums>& blocks) {
    float top = kFloor;
    for (const BlockSums& block : blocks) top = std::max(top, block.shift);
    return top;
}

// Sum over blocks of exp((z - shift) / T), T being the temperature at `t`.
inline double sum_exp(const SparseTile& tile, const std::vector<BlockSums>& blocks, int t, double shift) {
    double sum = 0;
    for (const BlockSums& block : blocks)
        sum += std::exp((block.shift - shift) / tile.temperatures[t]) * block.e[t];
    return sum;
}

// Sum over blocks of (z - shift) exp(z - shift).
inline double sum_mean(const std::vector<BlockSums>& blocks, double shift) {
    double sum = 0;
    for (const BlockSums& block : blocks) {
        const double below = block.shift - shift;
        sum += std::exp(below) * (block.mean + below * block.e[0]);
    }
    return sum;
}
}
