// The C functions of squared norms.
#include <cstddef>
#include <cstdint>

#include "levels.hpp"

#define DECLARED(NAMESPACE)                                                                                      \
    namespace dpfa {                                                                                             \
    namespace NAMESPACE {                                                                                        \
    void bare_squares(const float*, std::size_t, std::size_t, double*);                                          \
    void embedding_squares(const float*, const std::int64_t*, const std::int64_t*, std::int64_t, std::size_t,    \
                           std::size_t, std::size_t, double*, double*, double*);                                 \
    }                                                                                                            \
    }

DECLARED(portable)
ON_X86(DECLARED(avx2))
ON_X86(DECLARED(avx512))

// See squares.inc.hpp. Each returns 0, or 1 for a level that was not built.
EXPORTED int dpfa_bare_squares(int level, const float* x, std::size_t samples, std::size_t count, double* out) {
    AT_LEVEL(level, bare_squares, x, samples, count, out);
}
EXPORTED int dpfa_embedding_squares(int level, const float* g, const std::int64_t* ids, const std::int64_t* order,
                                    std::int64_t left_out, std::size_t samples, std::size_t tokens, std::size_t count,
                                    double* total, double* out, double* spread) {
    AT_LEVEL(level, embedding_squares, g, ids, order, left_out, samples, tokens, count, total, out, spread);
}
