// SPDX-License-Identifier: BSD-3-Clause
// Weights in the block types of GGUF files, in the files' own bytes: a row is a run of blocks, nothing else. A code q is an
// integer, or the entry of a table of 16. Multi-byte numbers are little-endian; d and m are float16.
//
//   q8_0, q4_0, q5_0, iq4_nl   w = d · q                    32 columns share d
//   mxfp4gguf                  w = 2^(e - 128) · q          32 columns share e, one byte
//   q4_1, q5_1                 w = d · q + m                32 columns share d and m
//   q3_k, q6_k, iq4_xs         w = (d · s) · q              256 share d; 16, in iq4_xs 32, share the integer s
//   q2_k, q4_k, q5_k           w = (d · s) · q - (m · t)    256 share d and m; 32, in q2_k 16, share the integers s and t
//
// Each product and difference is rounded to float32. Only the last one can be inexact.
//
// Storage: data [E, parts, rows / parts, bytes of a row] uint8. The rows of a part are contiguous; experts and parts have any
// strides, since gates and ups may be two tensors of one file.
#pragma once
#include <cstdint>

#include "switchgear/weight.h"

namespace switchgear {

struct GgufType {
  int64_t columns, bytes;  // of a block
};

// From Format::kQ80 on.
inline constexpr GgufType kGgufTypes[] = {
    {32, 34},    // q8_0
    {32, 18},    // q4_0
    {32, 20},    // q4_1
    {32, 22},    // q5_0
    {32, 24},    // q5_1
    {32, 18},    // iq4_nl
    {32, 17},    // mxfp4_gguf
    {256, 84},   // q2_k
    {256, 110},  // q3_k
    {256, 144},  // q4_k
    {256, 176},  // q5_k
    {256, 210},  // q6_k
    {256, 136},  // iq4_xs
};

constexpr const GgufType& gguf_type(Format format) {
  return kGgufTypes[static_cast<size_t>(format) - static_cast<size_t>(Format::kQ80)];
}

// The table of iq4_nl and iq4_xs.
alignas(16) inline constexpr int8_t kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                                      1,    13,   25,  38,  53,  69,  89,  113};

}  // namespace switchgear
