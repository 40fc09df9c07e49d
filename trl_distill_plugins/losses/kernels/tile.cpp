// Value, statistics and gradient of the objective on a tile of logits, one row (one token) after the other.
//
// p is the teacher's distribution, q the student's, z are logits as the loss sees them (after scale and soft cap).
// Each row is read from memory once, in blocks that stay in the first-level cache, and everything else it needs stays
// in the second. Arithmetic is fp32 within a block and double over blocks. Results do not depend on the number of
// threads.

#include <new>

#include "row.hpp"
#include "threads.hpp"

namespace {

// -(1 - s) log q(y) - s / V sum log q; gradient q - (1 - s) [v = y] - s / V, of which the row gets q here.
double cross_entropy(const Tile& tile, const Workspace& work, const Term& term, Softmax& at, float label_z) {
    const double smoothing = term.label_smoothing;
    double gap = (1 - smoothing) * (double(work.student.max) - label_z);
    if (smoothing > 0) {
        double total = 0;  // of max - z, where there is mass
        for (int64_t b = 0; b < work.blocks; ++b) {
            Vec block{};
            for (int64_t i = b * kBlock, end = i + work.size(b); i < end; ++i) {
                const Vec z = work.student.z[i];
                block += z == kNoMass ? Vec{} : work.student.max - z;
            }
            total += sum(block);
        }
        gap += smoothing / tile.vocabulary * total;
    }
    at.student_gradient += term.weight / term.temperature;
    return gap / term.temperature + at.student_log_z;
}

// sum p (log p - log q); gradient q - p. Both come from sums that are there.
double forward_kl(const Term& term, Softmax& at) {
    at.student_gradient += term.weight / term.temperature;
    at.teacher_gradient -= term.weight / term.temperature;
    return kl_to_teacher(at);
}

// sum q (log q - log p) = sum u; gradient u - q sum u. Fills the row u.
double reverse_kl(const Workspace& work, const Term& term, Softmax& at, Extra& extra) {
    const float inverse_t = 1 / term.temperature, log_zs = float(at.student_log_z), log_zt = float(at.teacher_log_z);
    double value = 0;
    for (int64_t b = 0; b < work.blocks; ++b) {
        Vec total{};
        for (int64_t i = b * kBlock, end = i + work.size(b); i < end; ++i) {
            const Vec log_q = (work.student.z[i] - work.student.max) * inverse_t - log_zs;
            const Vec log_p = max(spread(kLogTiny), (work.teacher.z[i] - work.teacher.max) * inverse_t - log_zt);
            const Vec u = at.student[i] * at.student_factor[b] * (log_q - log_p);
            extra.row[i] = u;
            total += u;
        }
        value += sum(total);
    }
    extra.weight = term.weight * inverse_t;
    at.student_gradient -= extra.weight * float(value);
    return value;
}

// beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q. With u = q (log q - log m), the second KL is
// sum u and the gradient (1 - beta) (u - q sum u). Fills the row u.
double jsd(const Workspace& work, const Term& term, Softmax& at, Extra& extra) {
    const float inverse_t = 1 / term.temperature, log_zs = float(at.student_log_z), log_zt = float(at.teacher_log_z);
    double from_teacher = 0, from_student = 0;
    for (int64_t b = 0; b < work.blocks; ++b) {
        Vec total_t{}, total_s{};
        for (int64_t i = b * kBlock, end = i + work.size(b); i < end; ++i) {
            const Vec q = at.student[i] * at.student_factor[b], p = at.teacher[i] * at.teacher_factor[b];
            const Vec log_m = log(max(spread(kTiny), term.beta * p + (1 - term.beta) * q));
            const Vec log_q = (work.student.z[i] - work.student.max) * inverse_t - log_zs;
            const Vec log_p = (work.teacher.z[i] - work.teacher.max) * inverse_t - log_zt;
            const Vec u = q * (log_q - log_m);
            extra.row[i] = u;
            total_s += u;
            total_t += p * (log_p - log_m);
        }
        from_teacher += sum(total_t);
        from_student += sum(total_s);
    }
    extra.weight = term.weight * (1 - term.beta) * inverse_t;
    at.student_gradient -= extra.weight * float(from_student);
    return term.beta * from_teacher + (1 - term.beta) * from_student;
}

// Pass 2: the value of each term; leaves the gradient's shares in the softmaxes and extra rows.
void evaluate_terms(const Tile& tile, Workspace& work, int64_t row, float label_z) {
    size_t extra = 0;
    for (int k = 0; k < tile.term_count; ++k) {
        const Term& term = tile.terms[k];
        Softmax& at = work.softmaxes[work.softmax_of[k]];
        double value = 0;
        switch (term.kind) {
            case kCrossEntropy: value = cross_entropy(tile, work, term, at, label_z); break;
            case kForwardKL: value = forward_kl(term, at); break;
            case kReverseKL: value = reverse_kl(work, term, at, work.extras[extra++]); break;
            case kJSD: value = jsd(work, term, at, work.extras[extra++]); break;
        }
        tile.values[k * tile.value_stride + row] = float(value);
    }
}

void write_statistics(const Tile& tile, const Workspace& work, int64_t row) {
    const Softmax& at = work.softmaxes[0];
    const bool has_teacher = tile.teacher != nullptr;
    float* out = tile.statistics + 5 * row;
    out[0] = has_teacher ? float(kl_to_teacher(at)) : 0;
    out[1] = float(at.student_log_z - at.student_mean);
    out[2] = has_teacher ? float(at.teacher_log_z - at.teacher_mean) : 0;
    out[3] = has_teacher && work.student.argmax == work.teacher.argmax;
    out[4] = work.student.argmax == tile.labels[row];
}

void add(Vec* to, const Vec* row, float weight, int64_t size) {
    for (int64_t i = 0; i < size; ++i) to[i] += weight * row[i];
}

// Pass 3: add the shares up block by block and write the gradient by the raw logits over the row.
template <class S> void write_gradient(const Tile& tile, Workspace& work, S* student, int64_t row) {
    const Head head = tile.student_head;
    const float scale = tile.token_scale[row] * head.scale;
    float on_label = 0, everywhere = 0;
    for (int k = 0; k < tile.term_count; ++k) {
        const Term& term = tile.terms[k];
        if (term.kind != kCrossEntropy) continue;
        on_label -= scale * term.weight / term.temperature * (1 - term.label_smoothing);
        everywhere -= scale * term.weight / term.temperature * term.label_smoothing / tile.vocabulary;
    }
    const int64_t label = tile.labels[row];
    Vec gradient[kBlock];
    for (int64_t b = 0; b < work.blocks; ++b) {
        const int64_t first = b * kBlock, size = work.size(b), start = first * kLanes;
        const int64_t count = std::min<int64_t>(kBlock * kLanes, tile.vocabulary - start);
        std::fill(gradient, gradient + size, spread(everywhere));
        for (const Softmax& at : work.softmaxes) {
            const float of_q = scale * at.student_gradient, of_p = scale * at.teacher_gradient;
            if (of_q != 0) add(gradient, at.student + first, of_q * at.student_factor[b], size);
            if (of_p != 0) add(gradient, at.teacher + first, of_p * at.teacher_factor[b], size);
        }
        for (const Extra& extra : work.extras) add(gradient, extra.row + first, scale * extra.weight, size);
        const int64_t at_label = label - start;
        if (at_label >= 0 && at_label < count) gradient[at_label / kLanes][at_label % kLanes] += on_label;
        if (head.softcap > 0) multiply_by_slope(gradient, work.student.z + first, 1 / head.softcap, size);
        write_block(gradient, count, student + start);
    }
}

template <class S, class P> void run_rows(const Tile& tile, Workspace& work, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        S* student = static_cast<S*>(tile.student) + row * tile.vocabulary;
        const P* teacher = tile.teacher ? static_cast<const P*>(tile.teacher) + row * tile.vocabulary : nullptr;
        const float label_z = read_row(tile, work, student, teacher, tile.labels[row]);
        evaluate_terms(tile, work, row, label_z);
        write_statistics(tile, work, row);
        if (tile.want_gradient) write_gradient(tile, work, student, row);
    }
}
}

// Run a tile on up to `threads` threads; the calling one does what none could be started for. Returns 0, or 1 when
// there is no memory to work in; then nothing was written.
extern "C" int run_tile(const Tile* tile) try {
    const auto run = tile->student_is_bf16 ? (tile->teacher_is_bf16 ? run_rows<bf16, bf16> : run_rows<bf16, float>)
                                           : (tile->teacher_is_bf16 ? run_rows<float, bf16> : run_rows<float, float>);
    const int64_t shares = std::max<int64_t>(1, std::min<int64_t>(tile->threads, tile->rows));
    std::vector<Workspace> workspaces;
    for (int64_t k = 0; k < shares; ++k) workspaces.emplace_back(*tile);
    share_rows(tile->rows, shares,
               [&](int64_t k, int64_t begin, int64_t end) { run(*tile, workspaces[k], begin, end); });
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}
