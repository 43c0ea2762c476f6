// What a part of a release's noise is for; the same for all instruction sets.
#pragma once
#include <cstdint>

namespace dpfa {

enum Law : int { BM32 = 0, BM64 = 1, LAPLACE53 = 2 };

// Noise of the elements [batch, row, head, column] of an output. Strides count elements and are those of batch, row
// and head; columns are consecutive.
struct Release {
    std::int64_t rows, heads, columns;
    std::int64_t out_strides[3];
    const double* scale;  // of each batch row, row and head
    std::int64_t scale_strides[3];
    // groups of sixteen rows of one head of one batch row: counted through all of them
    std::int64_t first_group, last_group;
    const std::uint32_t* key;
    std::uint32_t number[2];  // of the release, low word and high word
};

}  // namespace dpfa
