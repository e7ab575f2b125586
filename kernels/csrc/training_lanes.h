// What training.cpp computes.  Included once per instruction set, see levels.h; no include guard.

#include "sweep_back_lanes.h"

namespace NAMESPACE {

static inline void widen(int64_t count, const float *from, float *to) {
    __builtin_memcpy(to, from, sizeof(float) * (size_t)count);
}
static inline void widen(int64_t count, const uint16_t *from, float *to) {
    for (int64_t j = 0; j < count; j++) {
        const uint32_t bits = (uint32_t)from[j] << 16;
        __builtin_memcpy(to + j, &bits, 4);
    }
}
// The last ones of a row, which fill no vector.
static inline void put_one(uint16_t *to, float x) { *to = bf16(x); }
static inline void put_one(float *to, float x) { *to = x; }

// Up to KEPT tokens of one head, [KEPT][N] each: what products gave (k and v before the layer's vectors), what the
// recurrence reads, the sigmoids on the way, and of each token 1 / |k k_k|.
struct Tokens {
    float *r, *k0, *v0, *g, *v_first, *w, *k, *v, *a, *b, *of_w, *of_a, *of_v, *scale;
};

enum { ARRAYS = 13 };

static inline Tokens tokens_of(int64_t N, float *scratch) {
    const int64_t size = KEPT * N;
    float *p[ARRAYS];
    for (int i = 0; i < ARRAYS; i++) p[i] = scratch + i * size;
    return {p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9], p[10], p[11], p[12], scratch + ARRAYS * size};
}

// Tokens, what the gradients through a block need (more than the forward pass does), nine rows of gradients, eight sums.
static int64_t time_mix_scratch(int64_t N) {
    return ARRAYS * KEPT * N + KEPT + head_scratch(N) + 9 * KEPT * N + 8 * N;
}

template <class In>
static void prepare(const TimeMix &of, int64_t count, int64_t N, int64_t stride, int64_t o, int64_t h, const Tokens &z) {
    for (int64_t t = 0; t < count; t++) {
        const int64_t at = o + t * stride, to = t * N;
        float *r = z.r + to, *k0 = z.k0 + to, *v0 = z.v0 + to, *v_first = z.v_first + to, *w = z.w + to, *k = z.k + to,
              *v = z.v + to, *a = z.a + to, *b = z.b + to, *of_w = z.of_w + to, *of_a = z.of_a + to, *of_v = z.of_v + to;
        widen(N, (const In *)of.r + at, r);
        widen(N, (const In *)of.k + at, k0);
        widen(N, (const In *)of.v + at, v0);
        widen(N, (const In *)of.g + at, z.g + to);
        widen(N, (const In *)of.w + at, of_w);
        widen(N, (const In *)of.a + at, of_a);
#pragma GCC ivdep
        for (int64_t j = 0; j < N; j++) {
            of_w[j] = sigmoid(of.w0[h + j] + of_w[j]);
            w[j] = exp_within_87(-0.606530659712633f * of_w[j]);
            of_a[j] = sigmoid(of.a0[h + j] + of_a[j]);
            k[j] = k0[j] * (1.0f + (of_a[j] - 1.0f) * of.k_a[h + j]);
            a[j] = k0[j] * of.k_k[h + j];
        }
        if (of.v_mix) {
            widen(N, (const In *)of.v_mix + at, of_v);
            widen(N, (const In *)of.v_first + at, v_first);
#pragma GCC ivdep
            for (int64_t j = 0; j < N; j++) {
                of_v[j] = sigmoid(of.v0[h + j] + of_v[j]);
                v[j] = v0[j] + (v_first[j] - v0[j]) * of_v[j];
            }
        } else
            __builtin_memcpy(v, v0, sizeof(float) * (size_t)N);
        lanes squares = {};
        for (int64_t j = 0; j < N; j += W) squares += load(a + j) * load(a + j);
        const float length = __builtin_sqrtf(sum_by_halves(squares)), scale = 1.0f / (length < 1e-12f ? 1e-12f : length);
        z.scale[t] = scale;
#pragma GCC ivdep
        for (int64_t j = 0; j < N; j++) {
            b[j] = a[j] * scale * of_a[j];
            a[j] = -a[j] * scale;
        }
    }
}

template <int TILES>
static void forward_block(int64_t T, int64_t N, const Tokens &z, float *y, float *sa, float *tiles) {
    if constexpr (TILES > 1)
        if (N % (TILES * W)) return forward_block<TILES / 2>(T, N, z, y, sa, tiles);
    for (int64_t value = 0; value < N; value += TILES * W)
        sweep<TILES>(T, N, N, value, z.r, z.w, z.k, z.v, z.a, z.b, y, sa, tiles + value * N);
}

// Mean of y, and 1 / its deviation.
static inline void moments(int64_t N, float eps, const float *y, float &mean, float &scale) {
    lanes total = {}, squares = {};
    for (int64_t j = 0; j < N; j += W) total += load(y + j);
    mean = sum_by_halves(total) / (float)N;
    for (int64_t j = 0; j < N; j += W) {
        const lanes d = load(y + j) - mean;
        squares += d * d;
    }
    scale = 1.0f / __builtin_sqrtf(sum_by_halves(squares) / (float)N + eps);
}

template <class In>
static void time_mix_of(const TimeMix &of, int64_t T, int64_t N, int64_t stride, int64_t o, int64_t h,
                        int64_t state_stride, const float *state, float *new_state, float *sa, float *y, float *states,
                        In *out, float *scratch) {
    const Tokens z = tokens_of(N, scratch);
    float *tiles = z.scale + KEPT, *sa_here = tiles + N * N, *y_here = sa_here + KEPT * N;
    const int64_t width = width_of<VALUES_AT_ONCE>(N);
    to_tiles(N, width, state, tiles);
    for (int64_t first = 0; first < T; first += KEPT) {
        const int64_t count = T - first < KEPT ? T - first : KEPT, at_block = o + first * stride;
        from_tiles(N, width, tiles, states + first / KEPT * state_stride);
        prepare<In>(of, count, N, stride, at_block, h, z);
        forward_block<VALUES_AT_ONCE>(count, N, z, y_here, sa_here, tiles);
        for (int64_t t = 0; t < count; t++) {
            const int64_t at = at_block + t * stride, to = t * N;
            float mean, scale;
            moments(N, of.eps, y_here + to, mean, scale);
            lanes bonus = {};
            for (int64_t j = 0; j < N; j += W) bonus += load(z.r + to + j) * load(z.k + to + j) * load(of.r_k + h + j);
            const float rk = sum_by_halves(bonus);
            for (int64_t j = 0; j < N; j += W) {
                const lanes yj = load(y_here + to + j);
                const lanes normed = (yj - mean) * scale * load(of.ln_weight + h + j) + load(of.ln_bias + h + j);
                put(out + at + j, (normed + rk * load(z.v + to + j)) * load(z.g + to + j));
                store(y + at + j, yj);
                store(sa + at + j, load(sa_here + to + j));
            }
        }
    }
    from_tiles(N, width, tiles, new_state);
}

static void time_mix(const TimeMix &of, int narrow, int64_t T, int64_t N, int64_t stride, int64_t o, int64_t h,
                     int64_t state_stride, const float *state, float *new_state, float *sa, float *y, float *states,
                     void *out, float *scratch) {
    if (narrow)
        time_mix_of(of, T, N, stride, o, h, state_stride, state, new_state, sa, y, states, (uint16_t *)out, scratch);
    else
        time_mix_of(of, T, N, stride, o, h, state_stride, state, new_state, sa, y, states, (float *)out, scratch);
}

// Of the eight vectors, in the order of TimeMix.
enum { OF_W0, OF_A0, OF_V0, OF_K_K, OF_K_A, OF_R_K, OF_LN_WEIGHT, OF_LN_BIAS, VECTORS };

template <class In>
static void time_mix_back_of(const TimeMix &of, int64_t T, int64_t N, int64_t stride, int64_t o, int64_t h,
                             int64_t state_stride, const float *sa, const float *y, const float *states, const In *d_out,
                             const float *d_new_state, const TimeMixGradients &d, float *sums, float *d_state,
                             float *scratch) {
    const Tokens z = tokens_of(N, scratch);
    const Head head = head_of(N, z.scale + KEPT);
    float *dy = z.scale + KEPT + head_scratch(N), *dr = dy + KEPT * N, *dw = dr + KEPT * N, *dk = dw + KEPT * N, *dv = dk + KEPT * N,
          *da = dv + KEPT * N, *db = da + KEPT * N, *sa_here = db + KEPT * N, *row = sa_here + KEPT * N,
          *total = row + KEPT * N;
    float *bonus_r = row, *bonus_k = row + N, *bonus_v = row + 2 * N;
    begin(N, d_new_state, head);
    __builtin_memset(total, 0, sizeof(float) * (size_t)(VECTORS * N));
    const auto add = [&](int which, int64_t j, lanes x) { store(total + which * N + j, load(total + which * N + j) + x); };
    for (int64_t first = (T - 1) / KEPT * KEPT; first >= 0; first -= KEPT) {
        const int64_t count = T - first < KEPT ? T - first : KEPT, at_block = o + first * stride;
        prepare<In>(of, count, N, stride, at_block, h, z);
        float factor[KEPT];  // gradient of the bonus of each token
        for (int64_t t = 0; t < count; t++) {  // from the gradient of out to that of y, and of the gate
            const int64_t at = at_block + t * stride, to = t * N;
            __builtin_memcpy(sa_here + to, sa + at, sizeof(float) * (size_t)N);
            float mean, scale, *dz = dv + to;
            moments(N, of.eps, y + at, mean, scale);
            lanes bonus = {}, with_v = {}, with_one = {}, with_y = {};
            for (int64_t j = 0; j < N; j += W) bonus += load(z.r + to + j) * load(z.k + to + j) * load(of.r_k + h + j);
            const float rk = sum_by_halves(bonus);
            widen(N, d_out + at, dz);
            for (int64_t j = 0; j < N; j += W) {
                const lanes normed = (load(y + at + j) - mean) * scale, weight = load(of.ln_weight + h + j);
                const lanes v = load(z.v + to + j), given = load(dz + j), here = given * load(z.g + to + j);
                put((In *)d.g + at + j, given * (normed * weight + load(of.ln_bias + h + j) + rk * v));
                add(OF_LN_WEIGHT, j, here * normed);
                add(OF_LN_BIAS, j, here);
                with_v += here * v;
                with_one += here * weight;
                with_y += here * weight * normed;
                store(dz + j, here);
            }
            const float mean_one = sum_by_halves(with_one) / (float)N, mean_y = sum_by_halves(with_y) / (float)N;
            factor[t] = sum_by_halves(with_v);
            for (int64_t j = 0; j < N; j += W) {
                const lanes normed = (load(y + at + j) - mean) * scale;
                store(dy + to + j, (load(dz + j) * load(of.ln_weight + h + j) - mean_one - normed * mean_y) * scale);
                store(z.g + to + j, load(dz + j) * rk);  // what the bonus adds to the gradient of v
            }
        }
        block_back(count, N, N, z.w, z.r, z.k, z.v, z.a, z.b, sa_here, states + first / KEPT * state_stride, dy, dr, dw, dk,
                   dv, da, db, head);
        for (int64_t t = 0; t < count; t++) {  // from the gradients of what the recurrence reads to those of products
            const int64_t at = at_block + t * stride, to = t * N;
            const float scale = z.scale[t], bonus = factor[t];
            lanes along = {};
            for (int64_t j = 0; j < N; j += W) {
                const lanes r = load(z.r + to + j), k = load(z.k + to + j), r_k = load(of.r_k + h + j);
                const lanes of_a = load(z.of_a + to + j), kk = -load(z.a + to + j);
                store(bonus_r + j, load(dr + to + j) + bonus * k * r_k);
                store(bonus_k + j, load(dk + to + j) + bonus * r * r_k);
                store(bonus_v + j, load(dv + to + j) + load(z.g + to + j));
                add(OF_R_K, j, bonus * r * k);
                const lanes d_kk = load(db + to + j) * of_a - load(da + to + j);
                along += d_kk * kk;
                store(da + to + j, d_kk);
                store(db + to + j, load(db + to + j) * kk);  // its part of the gradient of of_a
            }
            const float with_kk = scale < 1e12f ? sum_by_halves(along) : 0.0f;
            for (int64_t j = 0; j < N; j += W) {
                const lanes of_a = load(z.of_a + to + j), of_w = load(z.of_w + to + j), k0 = load(z.k0 + to + j);
                const lanes k_a = load(of.k_a + h + j), kk = -load(z.a + to + j), d_k = load(bonus_k + j);
                const lanes d_raw = (load(da + to + j) - kk * with_kk) * scale;
                const lanes d_of_a = load(db + to + j) + d_k * k0 * k_a;
                const lanes d_a = d_of_a * of_a * (1.0f - of_a);
                const lanes d_w = load(dw + to + j) * -0.606530659712633f * of_w * (1.0f - of_w);
                put((In *)d.r + at + j, load(bonus_r + j));
                put((In *)d.k + at + j, d_k * (1.0f + (of_a - 1.0f) * k_a) + d_raw * load(of.k_k + h + j));
                put((In *)d.a + at + j, d_a);
                put((In *)d.w + at + j, d_w);
                add(OF_A0, j, d_a);
                add(OF_W0, j, d_w);
                add(OF_K_A, j, d_k * k0 * (of_a - 1.0f));
                add(OF_K_K, j, d_raw * k0);
                const lanes d_v = load(bonus_v + j);
                if (!of.v_mix) {
                    put((In *)d.v + at + j, d_v);
                    continue;
                }
                const lanes of_v = load(z.of_v + to + j);
                const lanes d_mix = d_v * (load(z.v_first + to + j) - load(z.v0 + to + j)) * of_v * (1.0f - of_v);
                put((In *)d.v + at + j, d_v * (1.0f - of_v));
                put((In *)d.v_first + at + j, d_v * of_v);
                put((In *)d.v_mix + at + j, d_mix);
                add(OF_V0, j, d_mix);
            }
        }
    }
    for (int i = 0; i < VECTORS; i++) __builtin_memcpy(sums + i * stride + h, total + i * N, sizeof(float) * (size_t)N);
    end(N, head, d_state);
}

static void time_mix_back(const TimeMix &of, int narrow, int64_t T, int64_t N, int64_t stride, int64_t o, int64_t h,
                          int64_t state_stride, const float *sa, const float *y, const float *states, const void *d_out,
                          const float *d_new_state, const TimeMixGradients &d, float *sums, float *d_state,
                          float *scratch) {
    if (narrow)
        time_mix_back_of(of, T, N, stride, o, h, state_stride, sa, y, states, (const uint16_t *)d_out, d_new_state, d, sums,
                         d_state, scratch);
    else
        time_mix_back_of(of, T, N, stride, o, h, state_stride, sa, y, states, (const float *)d_out, d_new_state, d, sums,
                         d_state, scratch);
}

// Tokens first to last of the row of T that begins at token `begin`; rows: 6 C floats of scratch.
template <class In>
static void mix_back_of(int64_t begin, int64_t first, int64_t last, int64_t T, int64_t C, int64_t n_mix, float eps,
                        const float *x, const float *weight, const float *bias, const float *mix, const float *x_prev,
                        const In *const *d_out, float *dx, float *d_x_prev, float *sums, float *rows) {
    float *now = rows, *before = rows + C, *later = rows + 2 * C, *dh = rows + 3 * C, *here = rows + 4 * C, *wide = rows + 5 * C;
    float *of_weight = sums, *of_bias = sums + C, *of_mix = sums + 2 * C;
    __builtin_memset(sums, 0, sizeof(float) * (size_t)((2 + n_mix) * C));
    const auto normed = [&](int64_t t, float *h, float &mean, float &scale) {
        const float *row = x + (begin + t) * C;
        moments(C, eps, row, mean, scale);
        for (int64_t j = 0; j < C; j += W) store(h + j, (load(row + j) - mean) * scale * load(weight + j) + load(bias + j));
    };
    __builtin_memset(later, 0, sizeof(float) * (size_t)C);  // what the token after wants of this one
    for (int64_t m = 0; last < T && m < n_mix; m++) {
        widen(C, d_out[m] + (begin + last) * C, wide);
        for (int64_t j = 0; j < C; j += W) store(later + j, load(later + j) + load(wide + j) * load(mix + m * C + j));
    }
    float mean, scale, mean_before = 0, scale_before = 0;
    normed(last - 1, now, mean, scale);
    for (int64_t t = last - 1; t >= first; t--) {
        if (t > 0)
            normed(t - 1, before, mean_before, scale_before);
        else
            __builtin_memcpy(before, x_prev, sizeof(float) * (size_t)C);
        __builtin_memcpy(dh, later, sizeof(float) * (size_t)C);
        __builtin_memset(here, 0, sizeof(float) * (size_t)C);
        for (int64_t m = 0; m < n_mix; m++) {
            widen(C, d_out[m] + (begin + t) * C, wide);
            for (int64_t j = 0; j < C; j += W) {
                const lanes d = load(wide + j), weighted = d * load(mix + m * C + j);
                store(dh + j, load(dh + j) + d - weighted);
                store(here + j, load(here + j) + weighted);
                store(of_mix + m * C + j, load(of_mix + m * C + j) + d * (load(before + j) - load(now + j)));
            }
        }
        const float *row = x + (begin + t) * C;
        lanes with_one = {}, with_x = {};
        for (int64_t j = 0; j < C; j += W) {
            const lanes d = load(dh + j), unit = (load(row + j) - mean) * scale, g = d * load(weight + j);
            store(of_weight + j, load(of_weight + j) + d * unit);
            store(of_bias + j, load(of_bias + j) + d);
            with_one += g;
            with_x += g * unit;
        }
        const float mean_one = sum_by_halves(with_one) / (float)C, mean_x = sum_by_halves(with_x) / (float)C;
        for (int64_t j = 0; j < C; j += W) {
            const lanes unit = (load(row + j) - mean) * scale;
            store(dx + (begin + t) * C + j, (load(dh + j) * load(weight + j) - mean_one - unit * mean_x) * scale);
        }
        float *swap = now;
        now = before, before = swap;
        swap = later, later = here, here = swap;
        mean = mean_before, scale = scale_before;
    }
    if (first == 0) __builtin_memcpy(d_x_prev, later, sizeof(float) * (size_t)C);
}

static void mix_back(int narrow, int64_t begin, int64_t first, int64_t last, int64_t T, int64_t C, int64_t n_mix,
                     float eps, const float *x, const float *weight, const float *bias, const float *mix,
                     const float *x_prev, const void *const *d_out, float *dx, float *d_x_prev, float *sums,
                     float *rows) {
    if (narrow)
        mix_back_of(begin, first, last, T, C, n_mix, eps, x, weight, bias, mix, x_prev, (const uint16_t *const *)d_out, dx,
                    d_x_prev, sums, rows);
    else
        mix_back_of(begin, first, last, T, C, n_mix, eps, x, weight, bias, mix, x_prev, (const float *const *)d_out, dx,
                    d_x_prev, sums, rows);
}

// y = relu(z)^2, or 2 relu(z) dy.
template <class In>
static void relu2_of(int64_t count, const In *z, const In *dy, In *y) {
    float from[256], d[256];
    for (int64_t first = 0; first < count; first += 256) {
        const int64_t n = count - first < 256 ? count - first : 256;
        widen(n, z + first, from);
        if (dy) widen(n, dy + first, d);
        for (int64_t j = 0; j < n; j++) {
            const float positive = from[j] > 0 ? from[j] : 0;
            from[j] = dy ? 2 * positive * d[j] : positive * positive;
        }
        int64_t j = 0;
        for (; j + W <= n; j += W) put(y + first + j, load(from + j));
        for (; j < n; j++) put_one(y + first + j, from[j]);
    }
}

static void relu2(int narrow, int64_t count, const void *z, const void *dy, void *y) {
    if (narrow)
        relu2_of(count, (const uint16_t *)z, (const uint16_t *)dy, (uint16_t *)y);
    else
        relu2_of(count, (const float *)z, (const float *)dy, (float *)y);
}

template <class In>
static float softmax_of(int64_t V, int64_t target, float scale, In *logits, float *row) {
    widen(V, logits, row);
    const float hit = row[target];
    lanes most = {}, total = {};
    most += row[0];
    const int64_t whole = V / W * W;
    for (int64_t j = 0; j < whole; j += W) {
        const lanes x = load(row + j);
        most = x > most ? x : most;
    }
    float tops[W], top;
    store(tops, most);
    top = tops[0];
    for (int i = 1; i < W; i++) top = tops[i] > top ? tops[i] : top;
    for (int64_t j = whole; j < V; j++) top = row[j] > top ? row[j] : top;
#pragma GCC ivdep
    for (int64_t j = 0; j < V; j++) row[j] = exp_nonpositive(row[j] - top);
    for (int64_t j = 0; j < whole; j += W) total += load(row + j);
    float all = sum_by_halves(total);
    for (int64_t j = whole; j < V; j++) all += row[j];
    const float share = scale / all;
    for (int64_t j = 0; j < V; j++) row[j] *= share;
    row[target] -= scale;
    for (int64_t j = 0; j < whole; j += W) put(logits + j, load(row + j));
    for (int64_t j = whole; j < V; j++) put_one(logits + j, row[j]);
    return (float)__builtin_log((double)all) + top - hit;
}

static float softmax(int narrow, int64_t V, int64_t target, float scale, void *logits, float *row) {
    return narrow ? softmax_of(V, target, scale, (uint16_t *)logits, row) : softmax_of(V, target, scale, (float *)logits, row);
}

static const Level level = {time_mix_scratch, time_mix, time_mix_back, mix_back, relu2, softmax};

}  // namespace NAMESPACE
