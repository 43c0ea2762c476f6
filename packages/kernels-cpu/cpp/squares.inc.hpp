// Squared norms of per-sample gradients in double; included once for each instruction set, whose name NAMESPACE is.
//
// Squares of floats are exact in double, so a sum of n of them is right to n unit roundoffs, in whatever order.
#include <cmath>
#include <cstddef>
#include <cstdint>

namespace dpfa {
namespace NAMESPACE {

constexpr int SUMS = 16;  // partial sums that do not wait for each other; the same for all instruction sets

// The sum of squares of x[0 ... count); with `total`, x is added to it on the way.
template <bool ADDED>
inline double squares(const float* __restrict x, std::size_t count, double* __restrict total) {
    double sums[SUMS] = {};
    std::size_t done = 0;
    for (; done + SUMS <= count; done += SUMS)
        for (int i = 0; i < SUMS; ++i) {
            const double value = x[done + i];
            if (ADDED) total[done + i] += value;
            sums[i] += value * value;
        }
    for (int i = 0; done < count; ++done, ++i) {
        const double value = x[done];
        if (ADDED) total[done] += value;
        sums[i] += value * value;
    }
    for (int half = SUMS / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    return sums[0];
}

// out[b] for the samples b of x [samples, count].
void bare_squares(const float* x, std::size_t samples, std::size_t count, double* out) {
    for (std::size_t b = 0; b < samples; ++b) out[b] = squares<false>(x + b * count, count, nullptr);
}

// Of samples whose gradient has the row sum_{t: id t} g[t] for each id: out[b] the sum of its squares, and spread[b]
// the sum of the norms |g[t]|, from g [samples, tokens, count]. ids [samples, tokens] ascend, order says where in g
// each stands, and ids equal to `left_out` count nothing; `total` is working memory for one row.
void embedding_squares(const float* g, const std::int64_t* ids, const std::int64_t* order, std::int64_t left_out,
                       std::size_t samples, std::size_t tokens, std::size_t count, double* total, double* out,
                       double* spread) {
    for (std::size_t b = 0; b < samples; ++b, g += tokens * count, ids += tokens, order += tokens) {
        double square = 0.0, lengths = 0.0;
        for (std::size_t first = 0, last; first < tokens; first = last) {
            for (last = first + 1; last < tokens && ids[last] == ids[first];) ++last;
            if (ids[first] == left_out) continue;
            if (last == first + 1) {
                const double one = squares<false>(g + order[first] * count, count, nullptr);
                square += one;
                lengths += std::sqrt(one);
                continue;
            }
            for (std::size_t i = 0; i < count; ++i) total[i] = 0.0;
            for (std::size_t t = first; t < last; ++t)
                lengths += std::sqrt(squares<true>(g + order[t] * count, count, total));
            for (std::size_t i = 0; i < count; ++i) square += total[i] * total[i];
        }
        out[b] = square;
        spread[b] = lengths;
    }
}

}  // namespace NAMESPACE
}  // namespace dpfa
