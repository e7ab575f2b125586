// What RWKV-7 computes between its matrix products, in two functions: norm, token shift and mixing in one pass; and
// everything of a head from its projections to the input of the output matrix.  Source of the equations: v7.py.
//
// Conventions as in wkv.cpp.  n tokens are S segments laid end to end: segment s is made of tokens offsets[s] to
// offsets[s + 1] (none, too), starts from row from[s] of the given state and ends in row to[s] of the new one (-1: in
// none).  Rows of states are `state_stride` and `new_stride` floats from each other.  `narrow`: out is bf16.  Results
// depend neither on the number of threads nor on the other segments, nor on how a text is divided into calls.

#include <omp.h>

#include <cstddef>
#include <cstdint>

// As time_mix has them, one after the other.
struct TimeMix {
    const float *r, *k, *v, *w, *a, *g, *v_mix, *v_first, *w0, *a0, *v0, *k_k, *k_a, *r_k, *ln_weight, *ln_bias;
    float eps;
};

namespace {

constexpr int64_t TOKENS = 16;  // of one head at a time: they and its state stay in the caches

struct Level {
    const float *(*mixed)(int64_t, int64_t, int64_t, int64_t, int64_t, const float *, const float *, const float *,
                          const float *, const float *, void *, int, float *);
    void (*head)(const TimeMix &, int64_t, int64_t, int64_t, int64_t, int64_t, const float *, float *, void *, int,
                 float *);
};

#define LEVEL "rwkv7_lanes.h"
#include "levels.h"
#undef LEVEL

const Level &level_for(int64_t N) {
#ifdef X86_LEVELS
    if (N % 16 == 0 && has_avx512()) return avx512::level;
    if (N % 8 == 0 && has_avx2()) return avx2::level;
#endif
    return N % 4 == 0 ? baseline::level : scalar::level;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// x         : in, [n, C];  weight, bias: of the LayerNorm, [C];  mix: in, [n_mix, C]
// x_prev    : in, what the token before each segment left, rows [C]
// out       : out, [n_mix, n, C];  last: out, rows [C], what the last token of each segment leaves
// scratch   : threads * 3 C floats
EXPORT void norm_shift_mix(int64_t S, const int64_t *offsets, const int64_t *from, const int64_t *to, int64_t C,
                           int64_t n_mix, const float *x, const float *weight, const float *bias, const float *mix,
                           const float *x_prev, int64_t state_stride, void *out, int narrow, float *last,
                           int64_t new_stride, int threads, float *scratch) {
    const Level &level = level_for(C);
    const int64_t n = offsets[S], blocks = (n + TOKENS - 1) / TOKENS;
#pragma omp parallel num_threads(threads)
    {
        float *rows = scratch + omp_get_thread_num() * 3 * C;
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            int64_t first = block * TOKENS, low = 0, high = S;
            const int64_t end = first + TOKENS < n ? first + TOKENS : n;
            while (high - low > 1) {  // the last segment that begins at `first` or before
                const int64_t middle = (low + high) / 2;
                (offsets[middle] <= first ? low : high) = middle;
            }
            for (int64_t s = low; first < end; s++) {
                if (offsets[s + 1] == first) continue;  // it has no tokens
                const int64_t until = offsets[s + 1] < end ? offsets[s + 1] : end;
                const float *before = first == offsets[s] ? x_prev + from[s] * state_stride : nullptr;
                const float *h = level.mixed(first, until, C, n, n_mix, x, weight, bias, before, mix, out, narrow, rows);
                if (until == offsets[s + 1] && to[s] >= 0)
                    __builtin_memcpy(last + to[s] * new_stride, h, sizeof(float) * (size_t)C);
                first = until;
            }
        }
#pragma omp for schedule(static)
        for (int64_t s = 0; s < S; s++)
            if (offsets[s] == offsets[s + 1] && to[s] >= 0)
                __builtin_memcpy(last + to[s] * new_stride, x_prev + from[s] * state_stride, sizeof(float) * (size_t)C);
    }
}

// r k v     : in, [n, C], the projections
// w a g     : in, [n, C], what the low ranks add to w0 and a0, and the gate
// v_mix     : in, [n, C], what the low rank adds to v0; NULL in layer 0, whose v the other layers get as v_first
// w0 .. bias: in, [C], the vectors of the layer; eps: of the GroupNorm
// state     : in, rows [H, N value, N key];  new_state: out
// out       : out, [n, C], the input of the output matrix
// scratch   : threads * time_mix_scratch(N) floats
EXPORT int64_t time_mix_scratch(int64_t N) { return N * N + 7 * TOKENS * N; }

EXPORT void time_mix(int64_t S, const int64_t *offsets, const int64_t *from, const int64_t *to, int64_t H, int64_t N,
                     const TimeMix *of, const float *state, int64_t state_stride, float *new_state, int64_t new_stride,
                     void *out, int narrow, int threads, float *scratch) {
    const Level &level = level_for(N);
    const int64_t room = time_mix_scratch(N);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t unit = 0; unit < S * H; unit++) {
        const int64_t s = unit / H, h = unit % H, T = offsets[s + 1] - offsets[s];
        level.head(*of, T, N, H * N, (offsets[s] * H + h) * N, h * N, state + from[s] * state_stride + h * N * N,
                   to[s] < 0 ? nullptr : new_state + to[s] * new_stride + h * N * N, out, narrow,
                   scratch + omp_get_thread_num() * room);
    }
}
