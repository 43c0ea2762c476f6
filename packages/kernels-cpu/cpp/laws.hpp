// The laws of release noise: two standard values from two or four words, for LANES blocks at a time.
#pragma once
#include "chacha.hpp"
#include "normal.hpp"

namespace dpfa {
namespace {  // each instruction set has its own: the linker must not merge them

using Lanes = double[LANES];

// -ln of a uniform number of 53 bits: the top ones of high * 2^32 + low.
inline double exponential53(std::uint32_t low, std::uint32_t high) {
    return minus_log_uniform(exact(high) * 0x1p21 + exact(low >> 11), 0x1p53);
}

inline void polar(double exponential, std::uint32_t angle, double& first, double& second) {
    const double radius = std::sqrt(2.0 * exponential);
    double cosine, sine;
    circle(static_cast<std::int32_t>(angle), cosine, sine);
    first = radius * cosine;
    second = radius * sine;
}

// Gaussian: a radius of 32 bits, an angle.
struct Bm32 {
    static constexpr int WORDS = 2;
    static void pair(const std::uint32_t (*words)[LANES], Lanes& first, Lanes& second) {
        for (int i = 0; i < LANES; ++i)
            polar(minus_log_uniform(exact(words[0][i]), 0x1p32), words[1][i], first[i], second[i]);
    }
};

// Gaussian: a radius of 53 bits, an angle, a word that is not used.
struct Bm64 {
    static constexpr int WORDS = 4;
    static void pair(const std::uint32_t (*words)[LANES], Lanes& first, Lanes& second) {
        for (int i = 0; i < LANES; ++i)
            polar(exponential53(words[0][i], words[1][i]), words[2][i], first[i], second[i]);
    }
};

// Laplace: two exponentials of 53 bits; the lowest bit of each 64 is the sign.
struct Laplace53 {
    static constexpr int WORDS = 4;
    static void one(const std::uint32_t (*words)[LANES], Lanes& value) {
        for (int i = 0; i < LANES; ++i) {
            const std::uint64_t sign = static_cast<std::uint64_t>(words[0][i]) << 63;
            value[i] = as_double(as_bits(exponential53(words[0][i], words[1][i])) ^ sign);
        }
    }
    static void pair(const std::uint32_t (*words)[LANES], Lanes& first, Lanes& second) {
        one(words, first);
        one(words + 2, second);
    }
};

}  // namespace
}  // namespace dpfa
