// What tile.cpp is called with, the memory it works in, and the first of its three passes over a row: read the logits,
// exponentiate, sum.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "logits.hpp"

extern "C" {

enum Kind : int32_t { kCrossEntropy, kForwardKL, kReverseKL, kJSD };

struct Term {
    int32_t kind;
    float weight, temperature, beta, label_smoothing;
};

struct Tile {
    int64_t rows, vocabulary;
    void* student;         // [rows, vocabulary], raw logits, overwritten by the gradient
    const void* teacher;   // [rows, vocabulary], raw logits, or null
    const int64_t* labels;
    const float* token_scale;
    const Term* terms;
    float* values;         // [term_count, rows], value_stride apart
    int64_t value_stride;
    float* statistics;     // [rows, 5]
    Head student_head, teacher_head;
    int32_t term_count, threads, student_is_bf16, teacher_is_bf16, want_gradient;
};
}

namespace {

// The row of one model.
struct Side {
    Vec* z;          // one block, or the whole row where a later pass reads it again
    float max;       // of the row
    int64_t argmax;  // the first one
};

struct BlockSums {
    float student_shift, teacher_shift;  // what was subtracted from z before exp
    float student, teacher;              // sum of e
    float student_mean, teacher_mean;    // sum of e (z - shift)
    float cross;                         // sum of e_p ((z_p - shift_p) - (z_q - shift_q))
};

// The softmax of both models at one temperature. A probability is e times the factor of its block.
struct Softmax {
    float temperature;
    Vec *student, *teacher;
    float *student_factor, *teacher_factor;
    double student_log_z, teacher_log_z;    // log sum exp((z - max) / T)
    double student_mean, teacher_mean;      // E_q[z_q - max_q], E_p[z_p - max_p]
    double cross;                           // E_p[(z_p - max_p) - (z_q - max_q)]
    float student_gradient, teacher_gradient;  // the objective's gradient holds this much of q and of p
};

// Part of the gradient that is not a multiple of q or p: `weight` times a row.
struct Extra {
    Vec* row;
    float weight;
};

struct Workspace {
    int64_t blocks, vectors;
    std::unique_ptr<Vec[]> memory;
    std::unique_ptr<float[]> factors;
    Side student, teacher;
    std::vector<BlockSums> sums;
    std::vector<Softmax> softmaxes;  // the first is the one at T = 1
    std::vector<int> softmax_of;     // of each term
    std::vector<Extra> extras;
    bool keep_z = false;

    explicit Workspace(const Tile& tile);
    // Where a block of z lives: all share one place unless a later pass reads them.
    Vec* z_block(const Side& side, int64_t block) const { return side.z + (keep_z ? block * kBlock : 0); }
    int64_t size(int64_t block) const { return std::min<int64_t>(kBlock, vectors - block * kBlock); }
};

Workspace::Workspace(const Tile& tile) {
    vectors = (tile.vocabulary + kLanes - 1) / kLanes;
    blocks = (vectors + kBlock - 1) / kBlock;
    sums.resize(blocks);
    std::vector<float> temperatures{1.0f};
    keep_z = tile.student_head.softcap > 0;
    for (int k = 0; k < tile.term_count; ++k) {
        const Term& term = tile.terms[k];
        const auto found = std::find(temperatures.begin(), temperatures.end(), term.temperature);
        softmax_of.push_back(int(found - temperatures.begin()));
        if (found == temperatures.end()) temperatures.push_back(term.temperature);
        if (term.kind == kReverseKL || term.kind == kJSD) extras.push_back({});
        keep_z |= term.kind == kReverseKL || term.kind == kJSD || term.label_smoothing > 0;
    }
    keep_z |= temperatures.size() > 1;
    const int64_t z_length = keep_z ? vectors : std::min<int64_t>(kBlock, vectors);
    memory.reset(new Vec[2 * z_length + (2 * temperatures.size() + extras.size()) * vectors]);
    factors.reset(new float[2 * temperatures.size() * blocks]);
    Vec* next = memory.get();
    float* factor = factors.get();
    const auto take = [&next](int64_t length) { return (next += length) - length; };
    student.z = take(z_length);
    teacher.z = take(z_length);
    for (Extra& extra : extras) extra.row = take(vectors);
    for (size_t t = 0; t < temperatures.size(); ++t, factor += 2 * blocks) {
        Softmax softmax{};
        softmax.temperature = temperatures[t];
        softmax.student = take(vectors);
        softmax.teacher = take(vectors);
        softmax.student_factor = factor;
        softmax.teacher_factor = factor + blocks;
        softmaxes.push_back(softmax);
    }
}

// Exponentiate a block of both sides at one temperature and sum what values and statistics need.
template <bool at_one>
BlockSums exponentiate(const Vec* zs, const Vec* zt, int64_t size, float shift_s, float shift_t, float inverse_t,
                       Vec* es, Vec* et) {
    Vec sum_s{}, sum_t{}, mean_s{}, mean_t{}, cross{};
    for (int64_t i = 0; i < size; ++i) {
        const Vec ds = zs[i] - shift_s, e = exp(at_one ? ds : ds * inverse_t);
        es[i] = e;
        sum_s += e;
        mean_s += e * ds;
        if (zt == nullptr) continue;
        const Vec dt = zt[i] - shift_t, p = exp(at_one ? dt : dt * inverse_t);
        et[i] = p;
        sum_t += p;
        mean_t += p * dt;
        cross += p * (dt - ds);
    }
    return {shift_s, shift_t, sum(sum_s), sum(sum_t), sum(mean_s), sum(mean_t), sum(cross)};
}

// Put the sums of the blocks together once the row's maxima are known, and set the blocks' factors.
void combine(const Workspace& work, bool has_teacher, Softmax& out) {
    double zs = 0, zt = 0, mean_s = 0, mean_t = 0, cross = 0;
    for (int64_t b = 0; b < work.blocks; ++b) {
        const BlockSums& block = work.sums[b];
        const double below_s = double(block.student_shift) - work.student.max;
        const double fs = std::exp(below_s / out.temperature);
        out.student_factor[b] = float(fs);
        zs += fs * block.student;
        mean_s += fs * (block.student_mean + below_s * block.student);
        if (!has_teacher) continue;
        const double below_t = double(block.teacher_shift) - work.teacher.max;
        const double ft = std::exp(below_t / out.temperature);
        out.teacher_factor[b] = float(ft);
        zt += ft * block.teacher;
        mean_t += ft * (block.teacher_mean + below_t * block.teacher);
        cross += ft * (block.cross + (below_t - below_s) * block.teacher);
    }
    out.student_log_z = std::log(zs);
    out.student_mean = mean_s / zs;
    for (int64_t b = 0; b < work.blocks; ++b) out.student_factor[b] *= float(1 / zs);
    out.student_gradient = out.teacher_gradient = 0;
    if (!has_teacher) return;
    out.teacher_log_z = std::log(zt);
    out.teacher_mean = mean_t / zt;
    out.cross = cross / zt;
    for (int64_t b = 0; b < work.blocks; ++b) out.teacher_factor[b] *= float(1 / zt);
}

double kl_to_teacher(const Softmax& at) { return at.cross / at.temperature - at.teacher_log_z + at.student_log_z; }

void note_maximum(Side& side, const Vec* z, int64_t size, float top, int64_t start) {
    if (!(top > side.max)) return;
    side.max = top;
    side.argmax = start + first_index(z, size, top);
}

// Pass 1: read the row, find its maxima, exponentiate at T = 1; then the other temperatures. Returns the label's logit.
template <class S, class P>
float read_row(const Tile& tile, Workspace& work, const S* student, const P* teacher, int64_t label) {
    float label_z = kNoMass;
    Side &s = work.student, &t = work.teacher;
    s.max = t.max = -INFINITY;
    s.argmax = t.argmax = 0;
    for (int64_t b = 0; b < work.blocks; ++b) {
        const int64_t first = b * kBlock, start = first * kLanes, size = work.size(b);
        const int64_t count = std::min<int64_t>(kBlock * kLanes, tile.vocabulary - start);
        Vec *zs = work.z_block(s, b), *zt = nullptr;
        const float top_s = read_block(student + start, count, tile.student_head, zs);
        float top_t = 0;
        note_maximum(s, zs, size, top_s, start);
        if (label >= start && label < start + count) label_z = zs[(label - start) / kLanes][(label - start) % kLanes];
        if (teacher != nullptr) {
            zt = work.z_block(t, b);
            top_t = read_block(teacher + start, count, tile.teacher_head, zt);
            note_maximum(t, zt, size, top_t, start);
        }
        const Softmax& at = work.softmaxes[0];
        work.sums[b] = exponentiate<true>(zs, zt, size, top_s, top_t, 1, at.student + first, at.teacher + first);
    }
    combine(work, teacher != nullptr, work.softmaxes[0]);
    for (size_t k = 1; k < work.softmaxes.size(); ++k) {
        Softmax& at = work.softmaxes[k];
        for (int64_t b = 0; b < work.blocks; ++b) {
            const int64_t first = b * kBlock;
            const Vec* zt = teacher == nullptr ? nullptr : t.z + first;
            work.sums[b] = exponentiate<false>(s.z + first, zt, work.size(b), s.max, t.max, 1 / at.temperature,
                                               at.student + first, at.teacher + first);
        }
        combine(work, teacher != nullptr, at);
    }
    return label_z;
}
}
