// SPDX-License-Identifier: BSD-3-Clause
// Decoder layers while decoding, in one call.
#pragma once
#include <vector>

#include "switchgear/ops.h"

namespace switchgear {

// attention_block, gate_route and moe_forward on its y, and the sum of both, with the bits of each op:
//   n, s = attention_block(x),   y = s + moe_forward(n, gate_route(n))
struct DecoderLayerArgs {
  AttentionBlockArgs attention;  // without y and sum
  GateRouteArgs router;          // without x and outputs
  bool rounds = false;           // the weights of the choices to bfloat16, if x has it
  MoeForwardArgs experts;        // without x, choices and outputs
  TensorView y;                  // out [B,T,H]
};

// One after the other.
void decoder_layers(const std::vector<DecoderLayerArgs>& layers, Execution exec = {});

}  // namespace switchgear
