// What RWKV-7 computes between its matrix products.  Included once per instruction set, see levels.h; no include guard.

#include "sweep_lanes.h"

namespace NAMESPACE {

// LayerNorm of one vector.
static void layer_norm(int64_t C, float eps, const float *x, const float *weight, const float *bias, float *y) {
    lanes total = {}, squares = {};
    for (int64_t j = 0; j < C; j += W) total += load(x + j);
    const float mean = sum(total) / (float)C;
    for (int64_t j = 0; j < C; j += W) {
        const lanes d = load(x + j) - mean;
        squares += d * d;
    }
    const float scale = 1.0f / __builtin_sqrtf(sum(squares) / (float)C + eps);
    for (int64_t j = 0; j < C; j += W) store(y + j, (load(x + j) - mean) * scale * load(weight + j) + load(bias + j));
}

// Tokens first to last of one segment: h = LayerNorm(x), out[m] = h + (h of the token before - h) (mix[m] + deltas[m]).
// before: h of the token before `first`, found here if it is not the segment's first; rows: 2 C floats of scratch.
// Returns h of the last token, in `rows`.
template <class Out>
static const float *mixed(int64_t first, int64_t last, int64_t C, int64_t n, int64_t n_mix, float eps, const float *x,
                          const float *weight, const float *bias, const float *before, const float *mix,
                          const float *const *deltas, Out *out, float *rows) {
    float *h = rows, *previous = rows + C;
    if (before)
        __builtin_memcpy(previous, before, sizeof(float) * (size_t)C);
    else
        layer_norm(C, eps, x + (first - 1) * C, weight, bias, previous);
    for (int64_t t = first; t < last; t++) {
        layer_norm(C, eps, x + t * C, weight, bias, h);
        for (int64_t m = 0; m < n_mix; m++) {
            Out *to = out + (m * n + t) * C;
            const float *weights = mix + m * C, *delta = deltas ? deltas[m] + t * C : nullptr;
            for (int64_t j = 0; j < C; j += W) {
                const lanes now = load(h + j), weight_here = delta ? load(weights + j) + load(delta + j) : load(weights + j);
                put(to + j, now + (load(previous + j) - now) * weight_here);
            }
        }
        float *other = h;
        h = previous, previous = other;
    }
    return previous;
}

static const float *mixed_to(int64_t first, int64_t last, int64_t C, int64_t n, int64_t n_mix, float eps,
                             const float *x, const float *weight, const float *bias, const float *before, const float *mix,
                             const float *const *deltas, void *out, int narrow, float *rows) {
    if (narrow)
        return mixed(first, last, C, n, n_mix, eps, x, weight, bias, before, mix, deltas, (uint16_t *)out, rows);
    return mixed(first, last, C, n, n_mix, eps, x, weight, bias, before, mix, deltas, (float *)out, rows);
}

// One head of one segment; see time_mix of rwkv7.cpp.  All vectors and matrices begin at the head; T >= 0.
template <class Out>
static void head(const TimeMix &of, int64_t T, int64_t N, int64_t stride, int64_t o, int64_t h, const float *state,
                 float *new_state, Out *out, float *scratch) {
    float *tiles = scratch, *w = tiles + N * N, *k = w + TOKENS * N, *v = k + TOKENS * N, *a = v + TOKENS * N,
          *b = a + TOKENS * N, *y = b + TOKENS * N, *row = y + TOKENS * N;
    const int64_t width = N % (2 * W) == 0 ? 2 * W : W;
    to_tiles(N, width, state, tiles);
    for (int64_t first = 0; first < T; first += TOKENS) {
        const int64_t count = T - first < TOKENS ? T - first : TOKENS;
        for (int64_t t = 0; t < count; t++) {
            const int64_t at = o + (first + t) * stride, to = t * N;
            if (first + t + TOKENS < T)  // rows too far apart to be foreseen; they go to the second cache
                for (const float *input : {of.r, of.k, of.v, of.w, of.a, of.g, of.v_mix, of.v_first})
                    for (int64_t j = 0; input && j < N; j += 16) __builtin_prefetch(input + at + TOKENS * stride + j, 0, 2);
#pragma GCC ivdep
            for (int64_t j = 0; j < N; j++) {
                w[to + j] = exp_within_87(-0.606530659712633f * sigmoid(of.w0[h + j] + of.w[at + j]));
                a[to + j] = sigmoid(of.a0[h + j] + of.a[at + j]);
                k[to + j] = of.k[at + j] * (1.0f + (a[to + j] - 1.0f) * of.k_a[h + j]);
                row[j] = of.k[at + j] * of.k_k[h + j];
            }
            if (of.v_mix)
#pragma GCC ivdep
                for (int64_t j = 0; j < N; j++)
                    v[to + j] = of.v[at + j] +
                                (of.v_first[at + j] - of.v[at + j]) * sigmoid(of.v0[h + j] + of.v_mix[at + j]);
            else
                __builtin_memcpy(v + to, of.v + at, sizeof(float) * (size_t)N);
            lanes squares = {};
            for (int64_t j = 0; j < N; j += W) squares += load(row + j) * load(row + j);
            const float length = __builtin_sqrtf(sum(squares)), scale = 1.0f / (length < 1e-12f ? 1e-12f : length);
#pragma GCC ivdep
            for (int64_t j = 0; j < N; j++) {
                b[to + j] = row[j] * scale * a[to + j];
                a[to + j] = -row[j] * scale;
            }
        }
        for (int64_t value = 0; value < N; value += width) {
            if (width == W)
                sweep<1>(count, N, stride, value, of.r + o + first * stride, w, k, v, a, b, y, nullptr, tiles + value * N);
            else
                sweep<2>(count, N, stride, value, of.r + o + first * stride, w, k, v, a, b, y, nullptr, tiles + value * N);
        }
        for (int64_t t = 0; t < count; t++) {
            const int64_t at = o + (first + t) * stride, to = t * N;
            lanes total = {}, squares = {}, bonus = {};
            for (int64_t j = 0; j < N; j += W) {
                total += load(y + to + j);
                bonus += load(of.r + at + j) * load(k + to + j) * load(of.r_k + h + j);
            }
            const float mean = sum(total) / (float)N, rk = sum(bonus);
            for (int64_t j = 0; j < N; j += W) {
                const lanes d = load(y + to + j) - mean;
                squares += d * d;
            }
            const float scale = 1.0f / __builtin_sqrtf(sum(squares) / (float)N + of.eps);
            for (int64_t j = 0; j < N; j += W) {
                const lanes normed = (load(y + to + j) - mean) * scale * load(of.ln_weight + h + j) + load(of.ln_bias + h + j);
                put(out + at + j, (normed + rk * load(v + to + j)) * load(of.g + at + j));
            }
        }
    }
    if (new_state) from_tiles(N, width, tiles, new_state);
}

static void head_to(const TimeMix &of, int64_t T, int64_t N, int64_t stride, int64_t o, int64_t h, const float *state,
                    float *new_state, void *out, int narrow, float *scratch) {
    if (narrow)
        head(of, T, N, stride, o, h, state, new_state, (uint16_t *)out, scratch);
    else
        head(of, T, N, stride, o, h, state, new_state, (float *)out, scratch);
}

static const Level level = {mixed_to, head_to};

}  // namespace NAMESPACE
