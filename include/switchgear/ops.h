// SPDX-License-Identifier: BSD-3-Clause
// The ops of switchgear: one Args struct and one function each. This is the C++ API; Python binds exactly this.
//
//   T tokens · K top_k · E experts · H hidden_size · I intermediate_size · S = T·K slots
//   N = 2I for gated experts, I for plain ones: the width of the first projection
//
// Formats, the same everywhere:
//   topk_ids        [T,K]  int32    expert of each choice; -1 is an empty slot
//   topk_weights    [T,K]  float32
//   expert_offsets  [E+1]  int32    EXCLUSIVE: expert e owns the slots [expert_offsets[e], expert_offsets[e+1])
//   token_indices   [S]    int32    slot -> token, ascending within an expert; -1 past expert_offsets[E]
//   slot_indices    [T,K]  int32    (token, choice) -> slot, -1 where topk_ids is -1
//
// `float` below means float32, bfloat16 or float16; all `float` tensors of one call share their dtype unless a line says
// otherwise. Sums run in float32 in a fixed order that does not depend on the number of rows or threads.
// Every op checks its arguments before it writes (ValueError, TypeError), then writes all of its outputs.
//
// All tensors of a call are on one device, whose backend (backend.h) runs it. On a CUDA device an op returns once its work is
// queued. Values in device memory are not checked, since reading them would wait for the device: ids outside [0,E) count as
// empty slots, and slots with indices out of range are skipped.
#pragma once
#include <array>
#include <cstdint>

#include "switchgear/adapter.h"
#include "switchgear/tensor.h"
#include "switchgear/weight.h"

namespace switchgear {

// Temporary memory of an op on a CUDA device, aligned to 256 bytes. It belongs to the op until the kernels that the op queued
// have run, so a caller reuses it in stream order.
struct Allocator {
  void* (*allocate)(void* context, int64_t bytes) = nullptr;
  void* context = nullptr;
};

struct Execution {
  int num_threads = 0;      // CPU: threads of an op; 0: the OpenMP default (without it, the number of processors)
  void* stream = nullptr;   // CUDA: the cudaStream_t that the op is queued on; null is the default stream
  Allocator allocator;      // CUDA: required by ops that need temporary memory
  bool allow_tf32 = false;  // CUDA: float32 products may round their factors to TF32
  int reserved_multiprocessors = 0;  // CUDA: that grouped GEMMs leave to kernels of other streams
};

// ---- route -------------------------------------------------------------------------------------------------------------

enum class ScoreFunction : uint8_t { kSoftmax, kSigmoid };
enum class GroupScore : uint8_t { kMax, kTop2Sum };  // how a group of experts is ranked

struct RouteOptions {
  int64_t top_k = 1;
  ScoreFunction score_function = ScoreFunction::kSoftmax;
  bool normalize = false;  // divide the chosen scores by their sum + 1e-20
  float scale = 1.0f;      // multiplies topk_weights last
  int64_t num_groups = 1;  // experts are chosen from the best `topk_groups` of `num_groups` equal groups
  int64_t topk_groups = 1;
  GroupScore group_score = GroupScore::kMax;
};

struct RouteArgs {
  TensorView router_logits;   // [T,E] float, any bit pattern
  TensorView selection_bias;  // [E] float32, optional: added for the choice, not to the weight
  RouteOptions options;
  TensorView topk_ids;      // out
  TensorView topk_weights;  // out
};
void route(const RouteArgs& args, Execution exec = {});

struct RouteBackwardArgs {
  TensorView grad_topk_weights;  // [T,K] float32
  TensorView router_logits;      // [T,E] float
  TensorView topk_ids;           // [T,K]
  RouteOptions options;
  TensorView grad_router_logits;  // out [T,E], dtype of router_logits
};
void route_backward(const RouteBackwardArgs& args, Execution exec = {});

// ---- gate --------------------------------------------------------------------------------------------------------------

// The router's product: router_logits[t] = x[t]·weightᵀ + bias, summed in float32 and rounded once. Its bits for a token depend
// neither on the other tokens nor on the number of threads, so nor does the choice of experts.
struct GateArgs {
  TensorView x;              // [T,H] float
  TensorView weight;         // [E,H] float32, or dtype of x
  TensorView bias;           // [E] float32, or dtype of x; optional
  TensorView router_logits;  // out [T,E] float32, or dtype of x
};
void gate(const GateArgs& args, Execution exec = {});

// gate, and then route on its logits.
struct GateRouteArgs {
  GateArgs gate;
  TensorView selection_bias;  // [E] float32, optional
  RouteOptions options;
  TensorView topk_ids;      // out
  TensorView topk_weights;  // out
};
void gate_route(const GateRouteArgs& args, Execution exec = {});

// ---- routing policies --------------------------------------------------------------------------------------------------
// Values, scores and priorities may have any bits: NaN and -Inf rank last, +Inf first, and ties go to the lowest index.
// Tokens compete only within a sequence (sequence_ids [T] in [0,B); all tokens are one sequence if absent).

// For each token the fewest experts, best first, whose scores sum to `top_p` or more; without experts whose score is below
// `threshold`, but at least min_experts and at most M. Choices and weights are otherwise those of route.
struct RouteDynamicOptions {
  ScoreFunction score_function = ScoreFunction::kSoftmax;
  int64_t min_experts = 1;  // <= M
  double top_p = 1e30;
  float threshold = 0.0f;
  bool normalize = false;
  float scale = 1.0f;
};

struct RouteDynamicArgs {
  TensorView router_logits;   // [T,E] float, any bit pattern
  TensorView selection_bias;  // [E] float32, optional
  RouteDynamicOptions options;
  TensorView topk_ids;      // out [T,M], -1 after the last choice
  TensorView topk_weights;  // out [T,M] float32, 0 there
};
void route_dynamic(const RouteDynamicArgs& args, Execution exec = {});

// Expert choice: topk_ids[t] lists the columns e in which values[t,e] is among the limits[b] largest of its sequence b,
// ascending, then -1.
struct ColumnTopkArgs {
  TensorView values;        // [T,E] float, any bit pattern
  TensorView sequence_ids;  // [T] int32, optional
  TensorView limits;        // [B] int32, >= 0
  TensorView topk_ids;      // out [T,E]
};
void column_topk(const ColumnTopkArgs& args, Execution exec = {});

// Which choices keep their place if an expert has too many.
enum class Drop : uint8_t {
  kOrder,     // the first tokens; within a token the first choices
  kReverse,   // the last ones
  kChoice,    // all tokens' first choices before the second ones
  kPriority,  // those of the highest priority, ties by order
};

struct FitCapacityOptions {
  int64_t num_experts = 1;
  Drop drop = Drop::kOrder;
  int64_t candidates = 0;  // most experts a token may go to; see scores
};

// An expert takes at most limits[b] choices of the tokens of sequence b; kept_ids is topk_ids with -1 for the others. With
// `scores`, lost choices are rerouted: in round r each token with lost choices offers the first of them to its r-th best
// expert that it has not chosen and whose score is above 0. The expert accepts by precedence while it has places; its id then
// replaces the -1. There are candidates - K rounds.
struct FitCapacityArgs {
  TensorView topk_ids;      // [T,K]
  TensorView priorities;    // [T,K] float32, with kPriority
  TensorView scores;        // [T,E] float32, optional
  TensorView sequence_ids;  // [T] int32, optional
  TensorView limits;        // [B] int32, >= 0
  FitCapacityOptions options;
  TensorView kept_ids;  // out [T,K]
};
void fit_capacity(const FitCapacityArgs& args, Execution exec = {});

// One expert for each token, and equally many tokens of a sequence for each expert (the first experts may have one more). The
// total of values is within T·eps of the largest if the auction ends within max_iterations. NaN and -Inf count as
// min - (max - min) - 1 of the finite values of the sequence, +Inf as max + (max - min) + 1.
struct AssignBalancedArgs {
  TensorView values;          // [T,E] float32, any bit pattern
  TensorView sequence_ids;    // [T] int32, optional
  int64_t num_sequences = 1;  // B
  double eps = -1.0;          // negative: (max - min) / 50 of the sequence's values, at least 1e-4
  int64_t max_iterations = 100;
  TensorView expert_ids;  // out [T] int32
};
void assign_balanced(const AssignBalancedArgs& args, Execution exec = {});

// log A of the assignment A of tokens to experts that maximises ⟨S, A⟩ + λ·H(A) with Σ_t A = limits[b] in each sequence and
// column, Σ_e A <= cap, 0 <= A <= 1, after at most `iterations` rounds of charges; above 0 where A is 1. S/λ if cap >= E. A
// sequence stops after a round that changed the charge of none of its tokens by more than `tolerance`.
struct AssignCappedArgs {
  TensorView values;        // S [T,E] float, any bit pattern; NaN ranks last
  TensorView sequence_ids;  // [T] int32, optional
  TensorView limits;        // [B] int32, >= 0; more than the tokens of the sequence: all of them
  int64_t cap = 1;
  double entropy = 1e-3;  // λ > 0
  int64_t iterations = 100;
  double tolerance = 0.0;  // >= 0, of log A
  TensorView assignment;   // out [T,E] float32
};
void assign_capped(const AssignCappedArgs& args, Execution exec = {});

// ---- plan --------------------------------------------------------------------------------------------------------------

struct Plan {
  TensorView expert_offsets;  // [E+1]
  TensorView token_indices;   // [S]
  TensorView slot_indices;    // [T,K]
};

struct PlanArgs {
  TensorView topk_ids;  // [T,K]
  Plan plan;            // out
};
void plan(const PlanArgs& args, Execution exec = {});

// ---- permute, combine --------------------------------------------------------------------------------------------------

// permuted_x[s] = x[token_indices[s]], times the slot's topk_weight if given; zero rows past expert_offsets[E]
struct PermuteArgs {
  TensorView x;  // [T,H] float
  Plan plan;
  TensorView topk_weights;  // [T,K] float32, optional
  TensorView permuted_x;    // out [S,H]
};
void permute(const PermuteArgs& args, Execution exec = {});

// y[t] = Σ_k topk_weights[t,k] · permuted_y[slot_indices[t,k]], k ascending; weights are 1 if absent
struct CombineArgs {
  TensorView permuted_y;  // [S,H] float
  Plan plan;
  TensorView topk_weights;  // [T,K] float32, optional
  TensorView y;             // out [T,H]
};
void combine(const CombineArgs& args, Execution exec = {});

// grad_topk_weights[t,k] = <grad_y[t], permuted_y[slot_indices[t,k]]>, 0 for empty slots
struct CombineBackwardArgs {
  TensorView grad_y;      // [T,H] float
  TensorView permuted_y;  // [S,H] float
  Plan plan;
  TensorView grad_topk_weights;  // out [T,K] float32
};
void combine_weight_backward(const CombineBackwardArgs& args, Execution exec = {});

// ---- grouped_gemm ------------------------------------------------------------------------------------------------------

// out[s,n] = Σ_k x[r(s),k] · weight[e(s)][n,k] + bias[e(s),n];  r(s) = token_indices[s] if given, else s.
// Columns past an expert's row_count and rows past expert_offsets[E] are zero. `transposed`, for integers, minifloats
// and groups (plain weights have strides for it): out[s,c] = Σ_n x[r(s),n] · weight[e(s)][n,c], which gradients of x need.
struct GroupedGemmArgs {
  TensorView x;               // [R,C] float, rows contiguous; transposed: [R,N]
  Weight weight;              // [E,N,C]; plain with input_gradient
  TensorView bias;            // [E,N] float, optional; none if transposed
  TensorView expert_offsets;  // [E+1]
  TensorView token_indices;   // [S], optional
  TensorView out;             // out [S,N]; transposed: [S,C]
  bool transposed = false;
  bool input_gradient = false;  // sums in the order of moe_backward, not moe_forward
};
void grouped_gemm(const GroupedGemmArgs& args, Execution exec = {});

// grad_weight[e][n,c] = Σ_{s of e} grad_out[s,n] · x[r(s),c]; zero for experts without rows. With `experts`, matrix i of
// grad_weight is that of expert experts[i], and no others are computed. On a CUDA device an expert outside [0,E) has no rows.
struct GroupedGemmWgradArgs {
  TensorView grad_out;        // [S,N] float
  TensorView x;               // [R,C] float
  TensorView expert_offsets;  // [E+1]
  TensorView token_indices;   // [S], optional
  TensorView experts;         // [n], ascending, optional
  TensorView grad_weight;     // out [E,N,C], any strides; with experts [n,N,C]
};
void grouped_gemm_wgrad(const GroupedGemmWgradArgs& args, Execution exec = {});

// ---- glu ---------------------------------------------------------------------------------------------------------------

enum class Activation : uint8_t { kSilu, kGelu, kGeluTanh, kRelu, kRelu2, kSwigluOai };

// The names in Python, in the order of the enumerators.
inline constexpr std::array kActivationNames{"silu", "gelu", "gelu_tanh", "relu", "relu2", "swiglu_oai"};

// a = act(gate) ⊙ up for gated experts, act(h) for plain ones.
//   limit > 0   gate = min(gate, limit), up = clamp(up, -limit, limit) first; gradients pass within it, ends included
//   kSwigluOai  (up + 1) · gate · sigmoid(alpha · gate), gpt-oss's gate (gated only)
//   interleaved gate = h[:, 0::2], up = h[:, 1::2]; else gate = h[:, :I], up = h[:, I:]
struct GluOptions {
  Activation activation = Activation::kSilu;
  bool gated = true;
  bool interleaved = false;
  float alpha = 1.702f;
  float limit = 0.0f;
};

struct GluArgs {
  TensorView h;  // [S,N] float
  GluOptions options;
  TensorView a;  // out [S,I]
};
void glu(const GluArgs& args, Execution exec = {});

struct GluBackwardArgs {
  TensorView grad_a;  // [S,I] float
  TensorView h;       // [S,N] float
  GluOptions options;
  TensorView grad_h;  // out [S,N]
};
void glu_backward(const GluBackwardArgs& args, Execution exec = {});

// ---- the whole layer ---------------------------------------------------------------------------------------------------

struct ExpertWeights {
  Weight gate_up_proj;      // [E,N,H]; in 2 parts if gates precede ups
  Weight down_proj;         // [E,H,I]; integers if gate_up_proj is, of 8 or 4 bits
  TensorView gate_up_bias;  // [E,N] float, optional
  TensorView down_bias;     // [E,H] float, optional
  Adapter gate_up_adapter;  // optional
  Adapter down_adapter;     // optional
};

// y[t] = Σ_k topk_weights[t,k] · (glu(x[t]·W_guᵀ + b_gu) · W_dᵀ + b_d), experts ascending; an adapter acts as a part of W
struct MoeForwardArgs {
  TensorView x;  // [T,H] float
  ExpertWeights weights;
  TensorView topk_ids;
  TensorView topk_weights;
  GluOptions options;
  TensorView y;  // out [T,H]
  TensorView h;  // out [S,N], optional: the pre-activation in slot order, which backward needs; zero rows at the tail
  // [T,H] float32, instead of y: what moe_forward rounds to y is added to it, expert by expert. So calls with disjoint ascending
  // ranges of the experts, from zeros on, leave sums that round to the bits of one call. On the CPU. The masks of dropout are
  // those of the slots of this call.
  TensorView sums;

  const TensorView& out() const { return sums.defined() ? sums : y; }
};
void moe_forward(const MoeForwardArgs& args, Execution exec = {});

// Gradients. An output that is not defined is not computed. Those of projections need plain weights. With `experts`, the gradients
// of projections and biases are those of these experts only, [n,…], as in grouped_gemm_wgrad.
struct MoeBackwardArgs {
  TensorView grad_y;  // [T,H] float
  TensorView x;       // [T,H] float
  TensorView h;       // [S,N] float, from moe_forward
  ExpertWeights weights;
  TensorView topk_ids;
  TensorView topk_weights;
  TensorView experts;  // [n], ascending, optional
  GluOptions options;
  TensorView grad_x;             // out [T,H]
  TensorView grad_gate_up_proj;  // out [E,N,H]
  TensorView grad_down_proj;     // out [E,H,I]
  TensorView grad_gate_up_bias;  // out [E,N]
  TensorView grad_down_bias;     // out [E,H]
  TensorView grad_topk_weights;  // out [T,K] float32
  TensorView grad_gate_up_a;     // out, as a and b of the adapters; zero past an expert's rank
  TensorView grad_gate_up_b;
  TensorView grad_down_a;
  TensorView grad_down_b;
  bool adds = false;  // to grad_gate_up_proj and grad_down_proj, each rounded before: the bits of two tensors and a sum
  bool adds_x = false;  // to grad_x, which is float32 then, as moe_forward to sums. On the CPU
};
void moe_backward(const MoeBackwardArgs& args, Execution exec = {});

// ---- attention ---------------------------------------------------------------------------------------------------------

// Causal attention of T new tokens over a cache of keys and values, in which `length` positions are filled and the new tokens are
// the last T of them. Row t of sequence b is at position p = length - T + t and sees the positions in
// [max(starts[b], p - window + 1), p]; heads [j·N/J, (j + 1)·N/J) share head j of the cache.
//   out[b,t,n] = Σ_p w_p · values[b,j,p] / (Σ_p w_p + e^sinks[n]),   w_p = e^(scale · <q[b,t,n], keys[b,j,p]>)
// A row that sees nothing is zero. A row's bits depend on its own position from starts[b] on and on what it sees, not on T, B or
// where in the cache the sequence starts; starts[b] < 0: the first -starts[b] positions have been dropped.
struct AttendArgs {
  TensorView q;        // [B,T,N,D] float
  TensorView keys;     // [B,J,C,D] float
  TensorView values;   // [B,J,C,V] float
  TensorView starts;   // [B] int32, optional: 0
  TensorView sinks;    // [N] float32, optional: none
  int64_t length = 0;  // T <= length <= C
  float scale = 1.0f;  // > 0
  int64_t window = 0;  // 0: none
  TensorView out;      // out [B,T,N,V]
};
void attend(const AttendArgs& args, Execution exec = {});

// y = s · weight / √(mean(s²) + eps), of each row; s = x, or x + residual rounded to the dtype, which `sum` gets.
struct RmsNormArgs {
  TensorView x;         // [T,H] float
  TensorView residual;  // [T,H] float, optional
  TensorView weight;    // [H] float32, or dtype of x
  float eps = 1e-6f;    // > 0
  TensorView y;         // out [T,H]
  TensorView sum;       // out [T,H], with residual
};
void rms_norm(const RmsNormArgs& args, Execution exec = {});

// What attend takes, of new tokens. Each head of q and k is normalised as by rms_norm if there is a weight: one of D elements is for
// a single head, one of N·D or J·D for all of a token's. Then the elements i and i + R, or 2·i and 2·i + 1, turn by angle i < R; those
// from 2·R on stay. v is copied. Outputs may be views of the cache.
struct RotateHeadsArgs {
  TensorView q;              // [B,T,N,D] float
  TensorView k;              // [B,T,J,D] float
  TensorView v;              // [B,T,J,V] float
  TensorView cos, sin;       // [B,T,R], or [1,T,R] for all sequences, float32, or dtype of q; optional: no turn
  TensorView q_weight;       // [D] or [N·D] float32, or dtype of q; optional: no norm
  TensorView k_weight;       // [D] or [J·D]
  float eps = 1e-6f;         // > 0
  TensorView q_out;          // out [B,T,N,D]
  TensorView k_out;          // out [B,T,J,D]
  TensorView v_out;          // out [B,T,J,V]
  bool interleaved = false;  // pairs are 2·i and 2·i + 1
};
void rotate_heads(const RotateHeadsArgs& args, Execution exec = {});

// A linear layer: a plain matrix [N,C], or another form of one expert [1,N,C].
struct Linear {
  Weight weight;
  TensorView bias;  // [N], optional
};

// The attention of a decoder layer, in the ops above and with their bits:
//   y, sum = rms_norm(o_proj(attend(rotate_heads(q_proj(n), k_proj(n), v_proj(n)))), residual = x),   n = rms_norm(x)
// The T new tokens are written to the positions [length - T, length) of the cache. Each op checks what it gets.
struct AttentionBlockArgs {
  TensorView x;            // [B,T,H] float
  TensorView input_norm;   // [H], as RmsNormArgs::weight
  TensorView output_norm;  // [H]
  Linear q_proj, k_proj, v_proj, o_proj;
  TensorView q_norm, k_norm;  // as RotateHeadsArgs::q_weight
  TensorView cos, sin;        // [B,T,R or more]
  int64_t angles = 0;         // R
  TensorView starts, sinks;   // as in AttendArgs
  int64_t length = 0;
  float scale = 1.0f;
  int64_t window = 0;
  float input_eps = 1e-6f, head_eps = 1e-6f, output_eps = 1e-6f;
  TensorView keys;    // in, out [B,J,C,D]
  TensorView values;  // in, out [B,J,C,V]
  TensorView y;       // out [B·T,H]
  TensorView sum;     // out [B·T,H]
};
void attention_block(const AttentionBlockArgs& args, Execution exec = {});

// ---- the ops of a backend ----------------------------------------------------------------------------------------------

// X(op, its arguments, a tensor that every call has). The tables of backends and their declarations come from these lists.
#define SWITCHGEAR_OPS(X)                                 \
  X(route, RouteArgs, router_logits)                      \
  X(route_backward, RouteBackwardArgs, router_logits)     \
  X(gate, GateArgs, x)                                    \
  X(route_dynamic, RouteDynamicArgs, router_logits)       \
  X(column_topk, ColumnTopkArgs, values)                  \
  X(fit_capacity, FitCapacityArgs, topk_ids)              \
  X(assign_balanced, AssignBalancedArgs, values)          \
  X(assign_capped, AssignCappedArgs, values)              \
  X(plan, PlanArgs, topk_ids)                             \
  X(permute, PermuteArgs, x)                              \
  X(combine, CombineArgs, y)                              \
  X(combine_weight_backward, CombineBackwardArgs, grad_y) \
  X(grouped_gemm, GroupedGemmArgs, x)                     \
  X(grouped_gemm_wgrad, GroupedGemmWgradArgs, x)          \
  X(glu, GluArgs, h)                                      \
  X(glu_backward, GluBackwardArgs, h)                     \
  X(moe_forward, MoeForwardArgs, x)                       \
  X(moe_backward, MoeBackwardArgs, x)

// Ops that only the CPU has kernels for. On other devices Python runs their definition.
#define SWITCHGEAR_CPU_OPS(X) \
  X(attend, AttendArgs, q)    \
  X(rms_norm, RmsNormArgs, x) \
  X(rotate_heads, RotateHeadsArgs, q)

}  // namespace switchgear
