// The two passes a sparse teacher needs over rows of the student's raw logits. The teacher names k tokens of a row; the
// losses themselves, elsewhere, see those k logits and the logsumexp of all others.
//
// read_sparse takes that and the statistics from a row and leaves it as it was; spread_sparse writes the gradient over
// it. z are logits as the loss sees them (after scale and soft cap). Arithmetic is fp32 within a block and double over
// blocks. The named tokens are left out of the sums of the others, not subtracted from them: they may hold nearly all
// mass. Results do not depend on the number of threads.

#include <new>

#include "sparse.hpp"
#include "threads.hpp"

namespace {

template <class S> S no_token();
template <> float no_token<float>() { return -INFINITY; }
template <> bf16 no_token<bf16>() { return 0xFF80; }

// Read z of the named tokens, and last the label's, into the workspace, and set the named ones in the row to -inf.
template <class S> void take_named(const SparseTile& tile, Workspace<S>& work, S* student, int64_t row) {
    const int64_t* ids = tile.ids + row * tile.named;
    const int64_t label = tile.labels[row];
    for (int64_t c = 0; c < tile.named; ++c) work.raw[c] = ids[c] < 0 ? no_token<S>() : student[ids[c]];
    work.raw[tile.named] = label < 0 || label >= tile.vocabulary ? no_token<S>() : student[label];
    read_block(work.raw.data(), tile.named + 1, tile.head, work.z.data());
    for (int64_t c = 0; c < tile.named; ++c)
        if (ids[c] >= 0) student[ids[c]] = no_token<S>();
}

// Write `raw` into the columns of the named tokens.
template <class S> void put_named(const SparseTile& tile, const S* raw, S* student, int64_t row) {
    const int64_t* ids = tile.ids + row * tile.named;
    for (int64_t c = 0; c < tile.named; ++c)
        if (ids[c] >= 0) student[ids[c]] = raw[c];
}

// Sum the named tokens, whose z are in the workspace. Returns the label's z.
template <class S> float sum_named(const SparseTile& tile, Workspace<S>& work) {
    const float label = work.z_of(tile.named);
    work.z[tile.named / kLanes][tile.named % kLanes] = kNoMass;
    for (size_t b = 0; b < work.named.size(); ++b) {
        const Vec* z = work.z.data() + b * kBlock;
        const int64_t size = std::min<int64_t>(kBlock, vectors(tile.named) - b * kBlock);
        Vec top = spread(kNoMass);
        for (int64_t i = 0; i < size; ++i) top = max(top, z[i]);
        sum_block(tile, z, size, maximum(top), work.named[b]);
    }
    return label;
}

// The first of the named tokens whose z is `value`; the vocabulary's size if there is none.
template <class S> int64_t first_named(const SparseTile& tile, const Workspace<S>& work, int64_t row, float value) {
    int64_t first = tile.vocabulary;
    for (int64_t c = 0; c < tile.named; ++c) {
        const int64_t id = tile.ids[row * tile.named + c];
        if (id >= 0 && work.z_of(c) == value) first = std::min(first, id);
    }
    return first;
}

template <class S> void read_row(const SparseTile& tile, Workspace<S>& work, S* student, int64_t row) {
    take_named(tile, work, student, row);
    const float label = sum_named(tile, work), named_top = largest(work.named);
    float peak = kFloor, reference = 0;
    int64_t top = tile.vocabulary;
    double above = 0;  // sum of z - reference
    Vec z[kBlock];
    for (size_t b = 0; b < work.others.size(); ++b) {
        const int64_t start = b * kBlock * kLanes, count = std::min<int64_t>(kBlock * kLanes, tile.vocabulary - start);
        const float block_top = read_block(student + start, count, tile.head, z);
        sum_block(tile, z, vectors(count), block_top, work.others[b]);
        if (block_top > peak) {
            peak = block_top;
            top = start + first_index(z, vectors(count), block_top);
        }
        if (b == 0) reference = std::max(named_top, peak);
        if (tile.want_mean) above += sum_above(z, vectors(count), reference);
    }
    put_named(tile, work.raw.data(), student, row);
    if (tile.want_mean) above += sum_above(work.z.data(), vectors(tile.named), reference);

    if (named_top > peak) top = tile.vocabulary;
    if (named_top >= peak) top = std::min(top, first_named(tile, work, row, named_top));
    tile.top[row] = top;
    const double highest = std::max(named_top, peak), gap = peak - highest;
    for (int64_t c = 0; c < tile.named; ++c) tile.logits[row * tile.named + c] = float(work.z_of(c) - highest);
    for (int t = 0; t < tile.temperature_count; ++t) {
        const double mass = sum_exp(tile, work.others, t, peak);
        tile.mass[t * tile.rows + row] = float(mass);
        tile.rest[t * tile.rows + row] = mass == 0 ? kNoMass : float(gap / tile.temperatures[t] + std::log(mass));
    }
    const double z_sum = sum_exp(tile, work.named, 0, highest) + sum_exp(tile, work.others, 0, highest);
    const double log_z = std::log(z_sum);
    const double expected = (sum_mean(work.named, highest) + sum_mean(work.others, highest)) / z_sum;
    const double mean = tile.want_mean ? above / tile.vocabulary + (reference - highest) : 0;
    tile.figures[row] = {float(log_z), float(log_z - expected), float(label - highest), float(mean), peak};
}

// Write the named tokens' gradients over the row. The workspace holds their z.
template <class S>
void spread_named(const SparseTile& tile, Workspace<S>& work, S* student, int64_t row, float scale) {
    const int64_t* ids = tile.ids + row * tile.named;
    const float* of_named = tile.of_named + row * tile.named;
    Vec gradient[kBlock];
    for (int64_t b = 0; b < blocks(tile.named); ++b) {
        const int64_t start = b * kBlock * kLanes, count = std::min<int64_t>(kBlock * kLanes, tile.named - start);
        for (int64_t i = 0; i < count; ++i) {
            const float extra = tile.everywhere + (ids[start + i] == tile.labels[row] ? tile.on_label : 0);
            gradient[i / kLanes][i % kLanes] = scale * (of_named[start + i] + extra);
        }
        if (tile.head.softcap > 0)
            multiply_by_slope(gradient, work.z.data() + b * kBlock, 1 / tile.head.softcap, vectors(count));
        write_block(gradient, count, work.raw.data() + start);
    }
    put_named(tile, work.raw.data(), student, row);
}

// Of the others it is `of_rest exp((z - peak) / T) / mass`, summed over temperatures.
template <class S> void spread_row(const SparseTile& tile, Workspace<S>& work, S* student, int64_t row) {
    take_named(tile, work, student, row);
    const float scale = tile.token_scale[row] * tile.head.scale, peak = tile.figures[row].peak;
    Vec z[kBlock], gradient[kBlock];
    for (size_t b = 0; b < work.others.size(); ++b) {
        const int64_t start = b * kBlock * kLanes, count = std::min<int64_t>(kBlock * kLanes, tile.vocabulary - start);
        const int64_t size = vectors(count), at_label = tile.labels[row] - start;
        read_block(student + start, count, tile.head, z);
        std::fill(gradient, gradient + size, spread(scale * tile.everywhere));
        for (int t = 0; t < tile.temperature_count; ++t) {
            const float of_rest = tile.of_rest[t * tile.rows + row], mass = tile.mass[t * tile.rows + row];
            if (of_rest == 0 || mass == 0) continue;
            const float share = scale * of_rest / mass, inverse_t = 1 / tile.temperatures[t];
            for (int64_t i = 0; i < size; ++i) gradient[i] += share * exp((z[i] - peak) * inverse_t);
        }
        if (at_label >= 0 && at_label < count) gradient[at_label / kLanes][at_label % kLanes] += scale * tile.on_label;
        if (tile.head.softcap > 0) multiply_by_slope(gradient, z, 1 / tile.head.softcap, size);
        write_block(gradient, count, student + start);
    }
    spread_named(tile, work, student, row, scale);
}

// Call `work_on` for every row, on up to `threads` threads.
template <class S, class Row> int on_rows(const SparseTile& tile, const Row& work_on) try {
    const int64_t shares = std::max<int64_t>(1, std::min<int64_t>(tile.threads, tile.rows));
    std::vector<Workspace<S>> workspaces(shares, Workspace<S>(tile));
    share_rows(tile.rows, shares, [&](int64_t k, int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row)
            work_on(tile, workspaces[k], static_cast<S*>(tile.student) + row * tile.vocabulary, row);
    });
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}
}

// Fill logits, rest, mass, figures and top. Returns 0, or 1 when there is no memory to work in.
extern "C" int read_sparse(const SparseTile* tile) {
    return tile->is_bf16 ? on_rows<bf16>(*tile, read_row<bf16>) : on_rows<float>(*tile, read_row<float>);
}

// Overwrite the raw logits by their gradient, after read_sparse. Returns the same.
extern "C" int spread_sparse(const SparseTile* tile) {
    return tile->is_bf16 ? on_rows<bf16>(*tile, spread_row<bf16>) : on_rows<float>(*tile, spread_row<float>);
}
