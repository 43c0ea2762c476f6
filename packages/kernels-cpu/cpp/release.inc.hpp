// Release noise, from key stream to sum in one pass; included once for each instruction set, whose name NAMESPACE is.
//
// Sixteen rows of one head of one batch row are a run of blocks. A block has the pairs of columns c, c + 1 of the rows
// r and r + 8: those whose columns differ by multiples of eight. Four blocks side by side make eight columns whole.
#include "laws.hpp"
#include "release.hpp"

namespace dpfa {
namespace NAMESPACE {

template <typename Number>
inline void add_eight(Number* __restrict out, const Number* __restrict values, std::int64_t columns) {
    if (columns >= 8)
        for (int i = 0; i < 8; ++i) out[i] += values[i];
    else
        for (int i = 0; i < columns; ++i) out[i] += values[i];
}

template <typename Law, typename Number>
void add_group(Number* out, const Release& release, const double* scale, std::int64_t group, std::int64_t stream) {
    constexpr int PAIRS = 16 / Law::WORDS, EIGHTS = PAIRS / 2, QUADS = LANES / 4;
    const std::int64_t across = (release.columns + 8 * EIGHTS - 1) / (8 * EIGHTS);  // quads of blocks in a row
    const std::int64_t first_row = 16 * group, left = release.rows - first_row;
    const std::uint32_t state[3] = {static_cast<std::uint32_t>(stream), release.number[0], release.number[1]};
    alignas(64) Words words;
    alignas(64) Lanes first, second, scales[2];
    alignas(64) Number mixed[2 * LANES];
    std::int64_t row[QUADS], column[QUADS];
    for (std::int64_t quad = 0; quad < 8 * across && quad / across < left; quad += QUADS) {
        for (int q = 0; q < QUADS; ++q) {
            row[q] = (quad + q) / across;
            column[q] = (quad + q) % across * 8 * EIGHTS;
            for (int half = 0; half < 2; ++half) {
                const std::int64_t here = row[q] + 8 * half;
                const double width = here < left ? scale[(first_row + here) * release.scale_strides[1]] : 0.0;
                for (int p = 0; p < 4; ++p) scales[half][4 * q + p] = width;
            }
        }
        chacha20(release.key, static_cast<std::uint32_t>(4 * (group * 8 * across + quad)), state, words);
        for (int pair = 0; pair < PAIRS; ++pair) {
            const int half = pair & 1;
            if (row[0] + 8 * half >= left || 8 * (pair >> 1) >= release.columns) continue;
            Law::pair(words + Law::WORDS * pair, first, second);
            for (int i = 0; i < LANES; ++i) {
                mixed[2 * i] = static_cast<Number>(first[i] * scales[half][i]);
                mixed[2 * i + 1] = static_cast<Number>(second[i] * scales[half][i]);
            }
            for (int q = 0; q < QUADS; ++q) {
                const std::int64_t here = row[q] + 8 * half, start = column[q] + 8 * (pair >> 1);
                if (here < left)
                    add_eight(out + (first_row + here) * release.out_strides[1] + start, mixed + 8 * q,
                              release.columns - start);
            }
        }
    }
}

template <typename Law, typename Number>
void add_groups(Number* out, const Release& release) {
    const std::int64_t groups = (release.rows + 15) / 16;
    for (std::int64_t each = release.first_group; each < release.last_group; ++each) {
        const std::int64_t stream = each / groups, batch = stream / release.heads, head = stream % release.heads;
        add_group<Law>(out + batch * release.out_strides[0] + head * release.out_strides[2], release,
                       release.scale + batch * release.scale_strides[0] + head * release.scale_strides[2],
                       each % groups, stream);
    }
}

template <typename Number>
void add_release(int law, Number* out, const Release& release) {
    if (law == BM32) add_groups<Bm32>(out, release);
    if (law == BM64) add_groups<Bm64>(out, release);
    if (law == LAPLACE53) add_groups<Laplace53>(out, release);
}

void add_release_f32(int law, float* out, const Release& release) { add_release(law, out, release); }
void add_release_f64(int law, double* out, const Release& release) { add_release(law, out, release); }

void key_stream(std::uint32_t* out, std::int64_t blocks, const std::uint32_t* key, std::uint32_t first,
                const std::uint32_t* stream) {
    alignas(64) Words words;
    for (std::int64_t done = 0; done < blocks; done += LANES) {
        chacha20(key, first + static_cast<std::uint32_t>(done), stream, words);
        for (std::int64_t i = 0; i < LANES && done + i < blocks; ++i)
            for (int w = 0; w < 16; ++w) out[16 * (done + i) + w] = words[w][i];
    }
}

}  // namespace NAMESPACE
}  // namespace dpfa
