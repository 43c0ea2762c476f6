// Runs of Gaussian noise; included once for each instruction set, whose name NAMESPACE is.
#include <cstddef>

#include "chacha.hpp"
#include "normal.hpp"

namespace dpfa {
namespace NAMESPACE {

// Standard normals of LANES blocks by the 53-bit profile: values[e][i] is element e of block i.
inline void normals53(const Words& words, double (&values)[8][LANES]) {
    for (int pair = 0; pair < 4; ++pair) {
        const std::uint32_t* low = words[4 * pair];
        const std::uint32_t* high = words[4 * pair + 1];
        const std::uint32_t* angle = words[4 * pair + 2];
        for (int i = 0; i < LANES; ++i) {
            const double x = exact(high[i]) * 0x1p21 + exact(low[i] >> 11);
            const double radius = std::sqrt(2.0 * minus_log_uniform(x, 0x1p53));
            double cosine, sine;
            circle(static_cast<std::int32_t>(angle[i]), cosine, sine);
            values[2 * pair][i] = radius * cosine;
            values[2 * pair + 1][i] = radius * sine;
        }
    }
}

// To out[0 ... count) the elements from `skip` on, counted from the first of the eight in first_block.
template <typename Number>
void add_noise(Number* out, std::size_t skip, std::size_t count, double std_, const std::uint32_t* key,
               std::uint32_t first_block, const std::uint32_t* stream) {
    alignas(64) Words words;
    alignas(64) double values[8][LANES];
    alignas(64) Number rows[LANES * 8];
    std::size_t done = 0;
    for (; done < count; first_block += LANES) {
        chacha20(key, first_block, stream, words);
        normals53(words, values);
        for (int e = 0; e < 8; ++e)
            for (int i = 0; i < LANES; ++i) rows[i * 8 + e] = static_cast<Number>(values[e][i] * std_);
        const std::size_t here = LANES * 8 - skip;
        const std::size_t some = here < count - done ? here : count - done;
        for (std::size_t i = 0; i < some; ++i) out[done + i] += rows[skip + i];
        done += some;
        skip = 0;
    }
}

void add_noise_f32(float* out, std::size_t skip, std::size_t count, double std_, const std::uint32_t* key,
                   std::uint32_t first_block, const std::uint32_t* stream) {
    add_noise(out, skip, count, std_, key, first_block, stream);
}
void add_noise_f64(double* out, std::size_t skip, std::size_t count, double std_, const std::uint32_t* key,
                   std::uint32_t first_block, const std::uint32_t* stream) {
    add_noise(out, skip, count, std_, key, first_block, stream);
}

}  // namespace NAMESPACE
}  // namespace dpfa
