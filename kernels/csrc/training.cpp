// What training RWKV-7 computes between its matrix products, forward and backward; source of the equations: v7.py.
//
// Conventions as in wkv.cpp.  Texts are B rows of T tokens, n = B T, C = H N.  Where `narrow`, what products give and
// take, and the gradients of that, are bf16, else float32; everything is computed in float32.  Sums over tokens are
// partial sums in a fixed order, one for each part of the work, for the caller to add: results depend neither on the
// number of threads nor on which of them does what.

#include <omp.h>

#include <cstddef>
#include <cstdint>

namespace {

constexpr int64_t KEPT = 16;    // tokens between the states that the forward pass keeps for the backward pass
constexpr int64_t TOKENS = 64;  // of a partial sum of norm_shift_mix_backward

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

// of        : w and a are what the low ranks add to w0 and a0, g is the gate; v_mix is what the low rank adds to v0, NULL
//             in the model's first layer, whose v is the others' v_first
// state     : in, [B, H, N value, N key];  new_state : out, likewise
// sa, y     : out, [n, C], and states [B, wkv7_kept(T), H, N, N]: for time_mix_backward
// out       : out, [n, C], the input of the output matrix
// scratch   : threads * time_mix_training_scratch(N) floats
EXPORT void time_mix_forward(int64_t B, int64_t T, int64_t H, int64_t N, const TimeMix *of, int narrow,
                             const float *state, float *new_state, float *sa, float *y, float *states, void *out,
                             int threads, float *scratch) {
    const Level &level = level_for(N);
    const int64_t kept = (T + KEPT - 1) / KEPT, room = level.time_mix_scratch(N);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t unit = 0; unit < B * H; unit++) {
        const int64_t h = unit % H, s = unit * N * N;
        level.time_mix(*of, narrow, T, N, H * N, (unit / H * T * H + h) * N, h * N, H * N * N, state + s, new_state + s,
                       sa, y, states + (unit / H * kept * H + h) * N * N, out, scratch + omp_get_thread_num() * room);
    }
}

// sa, y, states: in, from time_mix_forward
// d_out     : in, [n, C];  d_new_state : in; NULL: zeros
// d         : out, gradients of r to v_first; of the last two nothing where v_mix is NULL
// sums      : out, [B, 8, C], partial sums of the gradients of w0 to ln_bias, in their order; v0's is zero without v_mix
// d_state   : out, [B, H, N, N]
EXPORT void time_mix_backward(int64_t B, int64_t T, int64_t H, int64_t N, const TimeMix *of, int narrow, const float *sa,
                              const float *y, const float *states, const void *d_out, const float *d_new_state,
                              const TimeMixGradients *d, float *sums, float *d_state, int threads, float *scratch) {
    const Level &level = level_for(N);
    const int64_t kept = (T + KEPT - 1) / KEPT, room = level.time_mix_scratch(N);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t unit = 0; unit < B * H; unit++) {
        const int64_t h = unit % H, b = unit / H, s = unit * N * N;
        level.time_mix_back(*of, narrow, T, N, H * N, (b * T * H + h) * N, h * N, H * N * N, sa, y,
                            states + (b * kept * H + h) * N * N, d_out, d_new_state ? d_new_state + s : nullptr, *d,
                            sums + b * 8 * H * N, d_state + s, scratch + omp_get_thread_num() * room);
    }
}

// Gradients of norm_shift_mix (rwkv7.cpp) over B rows of T tokens, without deltas.
// d_out     : in, n_mix pointers to [n, C]; what the last tokens leave has no gradient
// dx        : out, [n, C];  d_x_prev : out, [B, C]
// sums      : out, [B, blocks, 2 + n_mix, C], blocks = (T + 63) / 64: partial sums of the gradients of weight, bias, mix
// scratch   : threads * 6 C floats
EXPORT void norm_shift_mix_backward(int64_t B, int64_t T, int64_t C, int64_t n_mix, int narrow, float eps,
                                    const float *x, const float *weight, const float *bias, const float *mix,
                                    const float *x_prev, const void *const *d_out, float *dx, float *d_x_prev,
                                    float *sums, int threads, float *scratch) {
    const Level &level = level_for(C);
    const int64_t blocks = (T + TOKENS - 1) / TOKENS;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t unit = 0; unit < B * blocks; unit++) {
        const int64_t b = unit / blocks, first = unit % blocks * TOKENS;
        const int64_t last = first + TOKENS < T ? first + TOKENS : T;
        level.mix_back(narrow, b * T, first, last, T, C, n_mix, eps, x, weight, bias, mix, x_prev + b * C, d_out,
                       dx, d_x_prev + b * C, sums + unit * (2 + n_mix) * C,
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
