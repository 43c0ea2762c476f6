// The C functions of release noise.
#include <cstdint>

#include "levels.hpp"
#include "release.hpp"

#define DECLARED(NAMESPACE)                                                                             \
    namespace dpfa {                                                                                    \
    namespace NAMESPACE {                                                                               \
    void add_release_f32(int, float*, const Release&);                                                  \
    void add_release_f64(int, double*, const Release&);                                                 \
    void key_stream(std::uint32_t*, std::int64_t, const std::uint32_t*, std::uint32_t, const std::uint32_t*); \
    }                                                                                                   \
    }

DECLARED(portable)
ON_X86(DECLARED(avx2))
ON_X86(DECLARED(avx512))

// Adds the noise of some groups of rows to out. Returns 0, or 1 for a level or a law that was not built.
EXPORTED int dpfa_add_release_f32(int level, int law, float* out, const dpfa::Release* release) {
    if (law < dpfa::BM32 || law > dpfa::LAPLACE53) return 1;
    AT_LEVEL(level, add_release_f32, law, out, *release);
}
EXPORTED int dpfa_add_release_f64(int level, int law, double* out, const dpfa::Release* release) {
    if (law < dpfa::BM32 || law > dpfa::LAPLACE53) return 1;
    AT_LEVEL(level, add_release_f64, law, out, *release);
}

// The words of consecutive blocks, as the cipher has them: for tests. Returns as above.
EXPORTED int dpfa_key_stream(int level, std::uint32_t* out, std::int64_t blocks, const std::uint32_t* key,
                             std::uint32_t first, const std::uint32_t* stream) {
    AT_LEVEL(level, key_stream, out, blocks, key, first, stream);
}
