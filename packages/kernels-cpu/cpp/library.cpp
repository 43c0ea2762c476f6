// The C functions that Python calls, and the choice of the instruction set.
#include <cstddef>
#include <cstdint>

#ifdef _WIN32
#define EXPORTED extern "C" __declspec(dllexport)
#else
#define EXPORTED extern "C" __attribute__((visibility("default")))
#endif

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
#ifdef DPFA_X86
DECLARED(avx2)
DECLARED(avx512)
#endif

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
#define ADD_NOISE(NAME, NUMBER)                                                                                  \
    EXPORTED int dpfa_##NAME(int level, NUMBER* out, std::size_t skip, std::size_t count, double std_,           \
                             const std::uint32_t* key, std::uint32_t first_block, const std::uint32_t* stream) { \
        if (level == 0) dpfa::portable::NAME(out, skip, count, std_, key, first_block, stream);                  \
        ON_X86(if (level == 1) dpfa::avx2::NAME(out, skip, count, std_, key, first_block, stream);)              \
        ON_X86(if (level == 2) dpfa::avx512::NAME(out, skip, count, std_, key, first_block, stream);)            \
        return level < 0 || level > HIGHEST;                                                                     \
    }

#ifdef DPFA_X86
#define ON_X86(statement) statement
#define HIGHEST 2
#else
#define ON_X86(statement)
#define HIGHEST 0
#endif

ADD_NOISE(add_noise_f32, float)
ADD_NOISE(add_noise_f64, double)
