// What training RWKV-7 computes between its matrix products, forward and backward; source of the equations: v7.py.
//
// Conventions as in wkv.cpp.  n tokens are S segments of one or more, laid end to end; C = H N.  Where `narrow`, what
// products give and take, and the gradients of that, are bf16, else float32; everything is computed in float32.  Sums
// over tokens are partial sums in a fixed order, one for each part of the work, for the caller to add: results depend
// neither on the number of threads nor on which of them does what.

#include <omp.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace {

constexpr int64_t KEPT = 16;    // tokens between the states that the forward pass keeps for the backward pass
constexpr int64_t TOKENS = 64;  // of a partial sum of norm_shift_mix_backward

// A bound for the states that are kept of the segments before `segment`, which begins at token `first`.
int64_t kept(int64_t first, int64_t segment) { return first / KEPT + segment; }

// What time_mix_forward reads, one after the other: what products give, [n, C], the vectors of the layer, [C], and eps.
struct TimeMix {
    const void *r, *k, *v, *w, *a, *g, *v_mix, *v_first;
    const float *w0, *a0, *v0, *k_k, *k_a, *r_k, *ln_weight, *ln_bias;
    float eps;
};

// Gradients of the first eight, in their order.
struct TimeMixGradients {
    void *r, *k, *v, *w, *a, *g, *v_mix, *v_first;
};

struct Level {
    int64_t (*time_mix_scratch)(int64_t);
    void (*time_mix)(const TimeMix &, int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, const float *, float *,
                     float *, float *, float *, void *, float *);
    void (*time_mix_back)(const TimeMix &, int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, const float *,
                          const float *, const float *, const void *, const float *, const TimeMixGradients &, float *,
                          float *, float *);
    void (*mix_back)(int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float, const float *, const float *,
                     const float *, const float *, const float *, const void *const *, float *, float *, float *, float *);
    void (*relu2)(int, int64_t, const void *, const void *, void *);
    float (*softmax)(int, int64_t, int64_t, float, void *, float *);
};

#define LEVEL "training_lanes.h"
#include "levels.h"
#undef LEVEL

#include "level_for.h"

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Floats of scratch that one thread of time_mix_forward or time_mix_backward needs.
EXPORT int64_t time_mix_training_scratch(int64_t N) { return level_for(N).time_mix_scratch(N); }

// States [H, N, N] that time_mix_forward keeps for S segments of n tokens together.
EXPORT int64_t time_mix_kept(int64_t n, int64_t S) { return kept(n, S); }

// of        : w and a are what the low ranks add to w0 and a0, g is the gate; v_mix is what the low rank adds to v0, NULL
//             in the model's first layer, whose v is the others' v_first
// offsets   : in, [S + 1], where each segment of the n tokens begins, and n
// state     : in, [S, H, N value, N key];  new_state : out, likewise
// sa, y     : out, [n, C], and states [time_mix_kept(n, S), H, N, N]: for time_mix_backward
// out       : out, [n, C], the input of the output matrix
// scratch   : threads * time_mix_training_scratch(N) floats
EXPORT void time_mix_forward(int64_t S, const int64_t *offsets, int64_t H, int64_t N, const TimeMix *of, int narrow,
                             const float *state, float *new_state, float *sa, float *y, float *states, void *out,
                             int threads, float *scratch) {
    const Level &level = level_for(N);
    const int64_t room = level.time_mix_scratch(N);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t unit = 0; unit < S * H; unit++) {
        const int64_t segment = unit / H, h = unit % H, first = offsets[segment], T = offsets[segment + 1] - first;
        level.time_mix(*of, narrow, T, N, H * N, (first * H + h) * N, h * N, H * N * N, state + unit * N * N,
                       new_state + unit * N * N, sa, y, states + (kept(first, segment) * H + h) * N * N, out,
                       scratch + omp_get_thread_num() * room);
    }
}

// offsets, sa, y, states: as in and from time_mix_forward
// d_out     : in, [n, C];  d_new_state : in; NULL: zeros
// d         : out, gradients of r to v_first; of the last two nothing where v_mix is NULL
// sums      : out, [S, 8, C], partial sums of the gradients of w0 to ln_bias, in their order; v0's is zero without v_mix
// d_state   : out, [S, H, N, N]
EXPORT void time_mix_backward(int64_t S, const int64_t *offsets, int64_t H, int64_t N, const TimeMix *of, int narrow,
                              const float *sa, const float *y, const float *states, const void *d_out,
                              const float *d_new_state, const TimeMixGradients *d, float *sums, float *d_state,
                              int threads, float *scratch) {
    const Level &level = level_for(N);
    const int64_t room = level.time_mix_scratch(N);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t unit = 0; unit < S * H; unit++) {
        const int64_t segment = unit / H, h = unit % H, first = offsets[segment], T = offsets[segment + 1] - first;
        level.time_mix_back(*of, narrow, T, N, H * N, (first * H + h) * N, h * N, H * N * N, sa, y,
                            states + (kept(first, segment) * H + h) * N * N, d_out,
                            d_new_state ? d_new_state + unit * N * N : nullptr, *d, sums + segment * 8 * H * N,
                            d_state + unit * N * N, scratch + omp_get_thread_num() * room);
    }
}

// Gradients of norm_shift_mix (rwkv7.cpp) over segments, without deltas.
// offsets   : in, [S + 1];  blocks : in, [S + 1], the blocks of 64 tokens that the segments before have, the last of each
//             may be shorter
// x_prev    : in, [S, C], the norm before each segment
// d_out     : in, n_mix pointers to [n, C]; what the last tokens leave has no gradient
// dx        : out, [n, C];  d_x_prev : out, [S, C]
// sums      : out, [all blocks, 2 + n_mix, C]: partial sums of the gradients of weight, bias, mix
// scratch   : threads * 6 C floats
EXPORT void norm_shift_mix_backward(int64_t S, const int64_t *offsets, const int64_t *blocks, int64_t C, int64_t n_mix,
                                    int narrow, float eps, const float *x, const float *weight, const float *bias,
                                    const float *mix, const float *x_prev, const void *const *d_out, float *dx,
                                    float *d_x_prev, float *sums, int threads, float *scratch) {
    const Level &level = level_for(C);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t unit = 0; unit < blocks[S]; unit++) {
        const int64_t segment = std::upper_bound(blocks, blocks + S, unit) - blocks - 1;
        const int64_t T = offsets[segment + 1] - offsets[segment], first = (unit - blocks[segment]) * TOKENS;
        const int64_t last = first + TOKENS < T ? first + TOKENS : T;
        level.mix_back(narrow, offsets[segment], first, last, T, C, n_mix, eps, x, weight, bias, mix, x_prev + segment * C,
                       d_out, dx, d_x_prev + segment * C, sums + unit * (2 + n_mix) * C,
                       scratch + omp_get_thread_num() * 6 * C);
    }
}

// y = relu(z)^2 of `count` elements; where dy is not NULL: y = 2 relu(z) dy.
EXPORT void relu2(int64_t count, int narrow, const void *z, const void *dy, void *y, int threads) {
    const int64_t part = 1 << 15, size = narrow ? 2 : 4;
    const Level &level = level_for(16);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t first = 0; first < count; first += part)
        level.relu2(narrow, count - first < part ? count - first : part, (const char *)z + first * size,
                    dy ? (const char *)dy + first * size : nullptr, (char *)y + first * size);
}

// Cross-entropy of each of n rows of V logits, and in their place its gradient times `scale`.
// logits    : in and out, [n, V];  targets : in, [n], each below V;  losses : out, [n], in nats
// scratch   : threads * V floats
EXPORT void softmax_gradient(int64_t n, int64_t V, int narrow, const int64_t *targets, float scale, void *logits,
                             float *losses, int threads, float *scratch) {
    const Level &level = level_for(16);
    const int64_t size = narrow ? 2 : 4;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < n; i++)
        losses[i] = level.softmax(narrow, V, targets[i], scale, (char *)logits + i * V * size,
                                  scratch + omp_get_thread_num() * V);
}
