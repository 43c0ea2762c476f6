// The C functions of training noise, and the instruction set that this processor has.
#include <cstddef>
#include <cstdint>

#include "levels.hpp"

#define DECLARED(NAMESPACE)                                                                                      \
    namespace dpfa {                                                                                             \
    namespace NAMESPACE {                                                                                        \
    void add_noise_f32(float*, std::size_t, std::size_t, double, const std::uint32_t*, std::uint32_t,            \
                       const std::uint32_t*);                                                                    \
    void add_noise_f64(double*, std::size_t, std::size_t, double, const std::uint32_t*, std::uint32_t,           \
                       const std::uint32_t*);                                                                    \
    }                                                                                                            \
    }

DECLARED(portable)
ON_X86(DECLARED(avx2))
ON_X86(DECLARED(avx512))

// 0 portable, 1 AVX2, 2 AVX-512: the highest that this processor has.
EXPORTED int dpfa_best_level() {
#ifdef DPFA_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2")) return 1;
#endif
    return 0;
}

// Adds std times the standard normals of elements skip, skip + 1, ... (counted from first_block's first of eight) to
// out[0 ... count). Returns 0, or 1 for a level that was not built.
EXPORTED int dpfa_add_noise_f32(int level, float* out, std::size_t skip, std::size_t count, double std_,
                                const std::uint32_t* key, std::uint32_t first_block, const std::uint32_t* stream) {
    AT_LEVEL(level, add_noise_f32, out, skip, count, std_, key, first_block, stream);
}
EXPORTED int dpfa_add_noise_f64(int level, double* out, std::size_t skip, std::size_t count, double std_,
                                const std::uint32_t* key, std::uint32_t first_block, const std::uint32_t* stream) {
    AT_LEVEL(level, add_noise_f64, out, skip, count, std_, key, first_block, stream);
}
