// Vectors of floats for tile.cpp: loading, storing, sums, exp and log. They are the vector extensions of GCC and Clang,
// so that no intrinsics are needed; a vector is as wide as the CPU's registers.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t BitVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * kLanes)));
using bf16 = uint16_t;

constexpr int kBlock = 1024 / kLanes;      // vectors in a block
constexpr float kNoMass = -1e30f;          // stands for -inf: finite, so that 0 * z is 0
constexpr float kLogTiny = -87.33654475f;  // log of the smallest normal number
constexpr float kTiny = 1.17549435e-38f;

inline Vec spread(float x) { return Vec{} + x; }
inline Vec max(Vec a, Vec b) { return b > a ? b : a; }

inline float sum(Vec v) {
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int k = 0; k < half; ++k) v[k] += v[k + half];
    return v[0];
}

inline float maximum(Vec v) {
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int k = 0; k < half; ++k) v[k] = std::max(v[k], v[k + half]);
    return v[0];
}

template <class To, class From> inline To bits(From value) {
    To result;
    std::memcpy(&result, &value, sizeof result);
    return result;
}

// e^x for x <= 0; 0 below the normal range. x = n log 2 + r, a polynomial in r, times 2^n. With a fused multiply-add
// the relative error is 1.1e-7 + 2e-9 |n|, and rounding.
inline Vec exp(Vec x) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
    const Vec shifted = x * 1.44269504f + kRound, n = shifted - kRound;
    const Vec r = x - n * 0.693147181f;
    Vec y = r * 8.312478e-3f + 4.189055e-2f;
    y = y * r + 1.6667116e-1f;
    y = y * r + 4.9999228e-1f;
    y = y * r + 1.0f;
    y = y * r + 1.0f;
    return x < kLogTiny ? Vec{} : bits<Vec>(bits<BitVec>(y) + (bits<BitVec>(shifted) << 23));
}

// log x for normal x > 0, relative error 3e-7. x = 2^n (1 + f) with 1 + f in [1/sqrt 2, sqrt 2).
inline Vec log(Vec x) {
    const BitVec offset = bits<BitVec>(x) - 0x3F3504F3u;
    const Vec n = __builtin_convertvector(bits<IntVec>(offset) >> 23, Vec);
    const Vec f = bits<Vec>((offset & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
    Vec y = f * -1.01917244e-1f + 1.602438e-1f;
    y = y * f - 1.7137128e-1f;
    y = y * f + 1.9924504e-1f;
    y = y * f - 2.4983267e-1f;
    y = y * f + 3.3334246e-1f;
    y = y * f - 0.5f;
    return n * 0.693147181f + (y * f * f + f);
}

inline float widen(float x) { return x; }
inline float widen(bf16 x) { return bits<float>(uint32_t(x) << 16); }

inline Vec load(const float* from) {
    Vec v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline Vec load(const bf16* from) {
    HalfVec v;
    std::memcpy(&v, from, sizeof v);
    return bits<Vec>(__builtin_convertvector(v, BitVec) << 16);
}

inline void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }

inline void store(bf16* to, Vec v) {  // to nearest, ties to even
    const BitVec b = bits<BitVec>(v);
    const HalfVec half = __builtin_convertvector((b + 0x7FFFu + ((b >> 16) & 1u)) >> 16, HalfVec);
    std::memcpy(to, &half, sizeof half);
}
}
