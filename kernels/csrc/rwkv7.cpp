// RWKV-7: norm, token shift and mixing in one pass; everything of a head from its projections to the input of the output
// matrix in another; and with the products of linear.cpp all layers.  Source of the equations: v7.py.
//
// Conventions as in wkv.cpp.  n tokens are S segments laid end to end: segment s is made of tokens offsets[s] to
// offsets[s + 1] (none, too), starts from row from[s] of the given state and ends in row to[s] of the new one (-1: in
// none).  Rows of states are `state_stride` and `new_stride` floats from each other.  `narrow`: out is bf16.  Results
// depend neither on the number of threads nor on the other segments, nor on how a text is divided into calls.

#include <omp.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "products.h"

// As time_mix has them, one after the other.
struct TimeMix {
    const float *r, *k, *v, *w, *a, *g, *v_mix, *v_first, *w0, *a0, *v0, *k_k, *k_a, *r_k, *ln_weight, *ln_bias;
    float eps;
};

namespace {

constexpr int64_t TOKENS = 16;  // of one head at a time: they and its state stay in the caches

struct Level {
    const float *(*mixed)(int64_t, int64_t, int64_t, int64_t, int64_t, float, const float *, const float *,
                          const float *, const float *, const float *, const float *const *, void *, int, float *);
    void (*head)(const TimeMix &, int64_t, int64_t, int64_t, int64_t, int64_t, const float *, float *, void *, int,
                 float *);
};

#define LEVEL "rwkv7_lanes.h"
#include "levels.h"
#undef LEVEL

#include "level_for.h"

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// x         : in, [n, C];  eps, weight [C] and bias [C]: of the LayerNorm;  mix: in, [n_mix, C]
// deltas    : in, n_mix pointers to what is added to mix for each token, [n, C]; NULL: nothing
// x_prev    : in, what the token before each segment left, rows [C]
// out       : out, [n_mix, n, C];  last: out, rows [C], what the last token of each segment leaves
// scratch   : threads * 2 C floats
EXPORT void norm_shift_mix(int64_t S, const int64_t *offsets, const int64_t *from, const int64_t *to, int64_t C,
                           int64_t n_mix, float eps, const float *x, const float *weight, const float *bias, const float *mix,
                           const float *const *deltas, const float *x_prev, int64_t state_stride, void *out, int narrow,
                           float *last, int64_t new_stride, int threads, float *scratch) {
    const Level &level = level_for(C);
    const int64_t n = offsets[S], blocks = (n + TOKENS - 1) / TOKENS;
#pragma omp parallel num_threads(threads)
    {
        float *rows = scratch + omp_get_thread_num() * 2 * C;
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
                const float *h =
                    level.mixed(first, until, C, n, n_mix, eps, x, weight, bias, before, mix, deltas, out, narrow, rows);
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

// What the layers are made of, one after the other as 64-bit numbers; low ranks as w1, w2 and so on of w a g v.
struct Layer {
    const float *ln1_weight, *ln1_bias, *att_mix, *ln2_weight, *ln2_bias, *ffn_mix;
    const float *w0, *a0, *v0, *k_k, *k_a, *r_k, *ln_weight, *ln_bias;
    Matrix receptance, key, value, output, first[4], second[4], ffn_key, ffn_value;
};

// All layers.  x: in and out, [n, C], the residual stream.  States are [rows, layers, ...], a row `row` and a layer
// `layer` floats from the next; the same for the new ones, and for x_prev with C, kv with H N N.
// norm_eps    : of the LayerNorms;  eps: of the GroupNorm
// narrow      : products take bf16: what they read (mixed, ranks, out, hidden) is bf16, else float32
// mixed       : [6, n, C];  projections: [8, n, C] float32;  ranks: [n, R], R the sum of the first layer's four;
//               out: [n, C];  hidden: [n, d_ffn];  these and scratch have undefined contents before and after
EXPORT void rwkv7_layers(int64_t S, const int64_t *offsets, const int64_t *from, const int64_t *to, int64_t n_layer,
                         int64_t H, int64_t N, float norm_eps, float eps, const Layer *layers, float *x,
                         const float *att_x_prev, const float *kv, const float *ffn_x_prev, float *new_att_x_prev, float *new_kv,
                         float *new_ffn_x_prev, char *mixed, float *projections, char *ranks, char *out, char *hidden,
                         int narrow, int limit, int threads, char *scratch) {
    const int64_t n = offsets[S], C = H * N, row = n_layer * C, kv_row = row * N, bytes = narrow ? 2 : 4;
    float *r = projections, *k = r + n * C, *w = k + n * C, *a = w + n * C, *g = a + n * C, *v_mix = g + n * C,
          *v_first = v_mix + n * C, *v_here = v_first + n * C;
    float *low[4] = {w, a, g, v_mix};
    const int activation[4] = {TANH, NONE, SIGMOID, NONE};
    const int64_t source[4] = {1, 4, 5, 3};  // which of r w k v a g is mixed for w, a, g and v
    for (int64_t i = 0; i < n_layer; i++) {
        const Layer &of = layers[i];
        const int64_t n_low = i ? 4 : 3;
        float *v = i ? v_here : v_first;
        norm_shift_mix(S, offsets, from, to, C, 6, norm_eps, x, of.ln1_weight, of.ln1_bias, of.att_mix, nullptr, att_x_prev + i * C,
                       row, mixed, narrow, new_att_x_prev + i * C, row, threads, (float *)scratch);
        const auto x_of = [&](int64_t m) { return mixed + m * n * C * bytes; };
        Product first[7] = {{&of.receptance, x_of(0), C, NONE, r, C, false, false},
                            {&of.key, x_of(2), C, NONE, k, C, false, false},
                            {&of.value, x_of(3), C, NONE, v, C, false, false}};
        Product second[4];
        char *rank = ranks;
        for (int64_t j = 0; j < n_low; j++) {
            const int64_t R = of.first[j].N;
            first[3 + j] = {&of.first[j], x_of(source[j]), C, activation[j], rank, R, narrow != 0, false};
            second[j] = {&of.second[j], rank, R, NONE, low[j], C, false, false};
            rank += n * R * bytes;
        }
        products(n, first, 3 + n_low, limit, threads, scratch);
        products(n, second, n_low, limit, threads, scratch);
        const TimeMix heads = {r, k, v, w, a, g, i ? v_mix : nullptr, v_first, of.w0, of.a0, of.v0, of.k_k, of.k_a,
                               of.r_k, of.ln_weight, of.ln_bias, eps};
        time_mix(S, offsets, from, to, H, N, &heads, kv + i * C * N, kv_row, new_kv + i * C * N, kv_row, out, narrow,
                 threads, (float *)scratch);
        const Product output = {&of.output, out, C, NONE, x, C, false, true};
        products(n, &output, 1, limit, threads, scratch);

        norm_shift_mix(S, offsets, from, to, C, 1, norm_eps, x, of.ln2_weight, of.ln2_bias, of.ffn_mix, nullptr, ffn_x_prev + i * C,
                       row, mixed, narrow, new_ffn_x_prev + i * C, row, threads, (float *)scratch);
        const Product key = {&of.ffn_key, mixed, C, RELU2, hidden, of.ffn_key.N, narrow != 0, false};
        const Product value = {&of.ffn_value, hidden, of.ffn_key.N, NONE, x, C, false, true};
        products(n, &key, 1, limit, threads, scratch);
        products(n, &value, 1, limit, threads, scratch);
    }
}
