// ChaCha20 (RFC 8439's block function), LANES consecutive blocks at a time, one block in each lane.
#pragma once
#include <cstdint>

namespace dpfa {
namespace {  // each instruction set has its own: the linker must not merge them

constexpr int LANES = 16;
using Words = std::uint32_t[16][LANES];

inline std::uint32_t rotated(std::uint32_t x, int by) { return (x << by) | (x >> (32 - by)); }

inline void quarter_round(std::uint32_t* __restrict a, std::uint32_t* __restrict b, std::uint32_t* __restrict c,
                          std::uint32_t* __restrict d) {
    for (int i = 0; i < LANES; ++i) {
        a[i] += b[i];
        d[i] = rotated(d[i] ^ a[i], 16);
        c[i] += d[i];
        b[i] = rotated(b[i] ^ c[i], 12);
        a[i] += b[i];
        d[i] = rotated(d[i] ^ a[i], 8);
        c[i] += d[i];
        b[i] = rotated(b[i] ^ c[i], 7);
    }
}

// words[w][i] is word w of the block numbered first + i; stream is state words 13, 14, 15.
inline void chacha20(const std::uint32_t key[8], std::uint32_t first, const std::uint32_t stream[3], Words& words) {
    static constexpr std::uint32_t constants[4] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574};
    alignas(64) Words start;
    for (int i = 0; i < LANES; ++i) {
        for (int w = 0; w < 4; ++w) start[w][i] = constants[w];
        for (int w = 0; w < 8; ++w) start[4 + w][i] = key[w];
        start[12][i] = first + static_cast<std::uint32_t>(i);
        for (int w = 0; w < 3; ++w) start[13 + w][i] = stream[w];
    }
    for (int w = 0; w < 16; ++w)
        for (int i = 0; i < LANES; ++i) words[w][i] = start[w][i];
    for (int round = 0; round < 10; ++round) {
        for (int w = 0; w < 4; ++w) quarter_round(words[w], words[4 + w], words[8 + w], words[12 + w]);
        for (int w = 0; w < 4; ++w)
            quarter_round(words[w], words[4 + (w + 1) % 4], words[8 + (w + 2) % 4], words[12 + (w + 3) % 4]);
    }
    for (int w = 0; w < 16; ++w)
        for (int i = 0; i < LANES; ++i) words[w][i] += start[w][i];
}

}  // namespace
}  // namespace dpfa
