// Box-Muller in double from ChaCha words: radius from 32 or 53 bits, angle from 32. No branches, no tables.
// The polynomials are those of fdlibm (Sun Microsystems, freely distributable), each within one unit of the last place.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace dpfa {
namespace {  // each instruction set has its own: the linker must not merge them

inline double as_double(std::uint64_t bits) {
    double x;
    std::memcpy(&x, &bits, 8);
    return x;
}

inline std::uint64_t as_bits(double x) {
    std::uint64_t bits;
    std::memcpy(&bits, &x, 8);
    return bits;
}

// Integers below 2^32 and above it, put into the fraction of a double.
inline double exact(std::uint64_t below_2_to_32) { return as_double(0x4330000000000000u | below_2_to_32) - 0x1p52; }

// ln y for normal y > 0.
inline double log_of(double y) {
    // y = 2^k m with m in [sqrt(1/2), sqrt(2))
    const std::uint64_t shifted = as_bits(y) + (0x3ff0000000000000u - 0x3fe6a09e00000000u);
    const double k = as_double(0x4330000000000000u | (shifted >> 52)) - (0x1p52 + 1023.0);
    const double m = as_double((shifted & 0x000fffffffffffffu) + 0x3fe6a09e00000000u);
    const double f = m - 1.0, s = f / (2.0 + f), z = s * s, w = z * z;
    const double even = w * (3.999999999940941908e-01 + w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01));
    const double odd = z * (6.666666666666735130e-01 +
                            w * (2.857142874366239149e-01 + w * (1.818357216161805012e-01 + w * 1.479819860511658591e-01)));
    const double half = 0.5 * f * f;
    return k * 6.93147180369123816490e-01 - ((half - (s * (half + (even + odd)) + k * 1.90821492927058770002e-10)) - f);
}

// -ln((x + 1/2) / 2^bits) for an integer 0 <= x < 2^bits given as a double, bits <= 53.
inline double minus_log_uniform(double x, double count) {
    // distance to the nearer end of the range: exact, as it has at most 53 bits and the half
    const double other = (count - 1.0) - x;
    const bool upper = x > other;
    const double tail = ((upper ? other : x) + 0.5) / count;  // a power of two: exact
    const double rest = 1.0 - tail;
    const double lost = (1.0 - rest) - tail;  // what the rounding of 1 - tail lost
    return -(log_of(upper ? rest : tail) + (upper ? lost : 0.0));
}

// cos and sin of angle * 2 pi / 2^32.
inline void circle(std::int32_t angle, double& cosine, double& sine) {
    const std::uint32_t quarter = (static_cast<std::uint32_t>(angle) + 0x20000000u) >> 30;
    const std::int32_t rest = static_cast<std::int32_t>(static_cast<std::uint32_t>(angle) - (quarter << 30));
    const double x = static_cast<double>(rest) * (6.283185307179586476925287 * 0x1p-32);
    const double z = x * x;
    const double s =
        x + x * z *
                (-1.66666666666666324348e-01 +
                 z * (8.33333333332248946124e-03 +
                      z * (-1.98412698298579493134e-04 +
                           z * (2.75573137070700676789e-06 + z * (-2.50507602534068634195e-08 + z * 1.58969099521155010221e-10)))));
    const double tail = z * z *
                        (4.16666666666666019037e-02 +
                         z * (-1.38888888888741095749e-03 +
                              z * (2.48015872894767294178e-05 +
                                   z * (-2.75573143513906633035e-07 + z * (2.08757232129817482790e-09 + z * -1.13596475577881948265e-11)))));
    const double half = 0.5 * z, w = 1.0 - half;
    const double c = w + (((1.0 - w) - half) + tail);
    // a quarter turn exchanges the two, half a turn changes the signs
    const std::uint64_t swap = 0u - static_cast<std::uint64_t>(quarter & 1u);
    const std::uint64_t cb = as_bits(c), sb = as_bits(s);
    const std::uint64_t minus_c = static_cast<std::uint64_t>((quarter + 1u) & 2u) << 62;
    const std::uint64_t minus_s = static_cast<std::uint64_t>(quarter & 2u) << 62;
    cosine = as_double(((cb & ~swap) | (sb & swap)) ^ minus_c);
    sine = as_double(((sb & ~swap) | (cb & swap)) ^ minus_s);
}

}  // namespace
}  // namespace dpfa
