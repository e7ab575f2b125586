// One tile of a recurrence, W lanes wide.  Included once per instruction set, see levels.h; no include guard.
//
// RWKV-7: every row of S (one value) evolves by itself given r w k a b, and every column (one key) by itself given S a;
// RWKV-5 and 6: every column of S (one value) by itself; RWKV-4: every channel.
// So tiles of W of them need nothing from each other, and no sum is ever split between threads.
// All pointers are float32; a vector of token t starts at pointer + t * stride.

#include "lanes.h"

namespace NAMESPACE {

// Rows [value, value + W) of one head, all T tokens.
// state, new_state (may be NULL) [N value][N key]; sa (may be NULL) receives S a per token; tile: N * W floats of scratch.
static void forward_tile(int64_t T, int64_t N, int64_t stride, int64_t value, const float *decay, const float *r,
                         const float *k, const float *v, const float *a, const float *b, const float *state, float *y,
                         float *new_state, float *sa, float *tile) {
    for (int64_t j = 0; j < N; j++)
        for (int64_t i = 0; i < W; i++) tile[j * W + i] = state[(value + i) * N + j];
    lanes product = {};  // S a of the coming token
    for (int64_t j = 0; T > 0 && j < N; j++) product += load(tile + j * W) * a[j];
    for (int64_t t = 0; t < T; t++) {
        const int64_t o = t * stride;
        const float *next_a = t + 1 < T ? a + o + stride : a;  // after the last token the product is not used
        const lanes vt = load(v + o + value);
        lanes yt = {}, next = {};
        if (sa) store(sa + o + value, product);
        for (int64_t j = 0; j < N; j++) {
            lanes s = load(tile + j * W) * decay[o + j] + product * b[o + j] + vt * k[o + j];
            store(tile + j * W, s);
            yt += s * r[o + j];
            next += s * next_a[j];
        }
        store(y + o + value, yt);
        product = next;
    }
    if (!new_state) return;
    for (int64_t j = 0; j < N; j++)
        for (int64_t i = 0; i < W; i++) new_state[(value + i) * N + j] = tile[j * W + i];
}

// Gradients of v and of S a for rows [value, value + W), last token first.
// d_new_state [N value][N key]; dv, dsa as v; tile: N * W floats of scratch.
static void backward_values(int64_t T, int64_t N, int64_t stride, int64_t value, const float *decay, const float *r,
                            const float *k, const float *a, const float *b, const float *dy, const float *d_new_state,
                            float *dv, float *dsa, float *tile) {
    for (int64_t j = 0; j < N; j++)
        for (int64_t i = 0; i < W; i++) tile[j * W + i] = d_new_state[(value + i) * N + j];
    lanes dproduct = {};
    for (int64_t t = T - 1; t >= 0; t--) {
        const int64_t o = t * stride;
        const lanes dyt = load(dy + o + value);
        lanes dvt = {}, dsat = {};
        if (t == T - 1) {
            for (int64_t j = 0; j < N; j++) {
                lanes d = load(tile + j * W) + dyt * r[o + j];
                store(tile + j * W, d);
                dvt += d * k[o + j];
                dsat += d * b[o + j];
            }
        } else {
            const float *later_decay = decay + o + stride, *later_a = a + o + stride;
            for (int64_t j = 0; j < N; j++) {
                lanes d = load(tile + j * W) * later_decay[j] + dproduct * later_a[j] + dyt * r[o + j];
                store(tile + j * W, d);
                dvt += d * k[o + j];
                dsat += d * b[o + j];
            }
        }
        store(dv + o + value, dvt);
        store(dsa + o + value, dsat);
        dproduct = dsat;
    }
}

// Gradients of r, w (log-decay), k, a, b and the state for columns [key, key + W), last token first.
// Needs sa of the forward pass and dsa of backward_values.  States are kept at the start of every block of tokens and
// computed again inside; scratch: N * W * (blocks + block + 2) floats.
static void backward_keys(int64_t T, int64_t N, int64_t stride, int64_t key, int64_t block, const float *decay,
                          const float *r, const float *k, const float *v, const float *a, const float *b,
                          const float *sa, const float *dsa, const float *state, const float *dy,
                          const float *d_new_state, float *dr, float *dw, float *dk, float *da, float *db,
                          float *d_state, float *scratch) {
    const int64_t size = N * W, blocks = (T + block - 1) / block;
    float *d_tile = scratch, *inside = d_tile + size, *starts = inside + size * (block + 1);
    for (int64_t i = 0; i < N; i++) {
        store(d_tile + i * W, load(d_new_state + i * N + key));
        store(starts + i * W, load(state + i * N + key));
    }
    auto step = [&](int64_t t, const float *from, float *to) {
        const int64_t o = t * stride;
        const lanes wt = load(decay + o + key), bt = load(b + o + key), kt = load(k + o + key);
        for (int64_t i = 0; i < N; i++)
            store(to + i * W, load(from + i * W) * wt + bt * sa[o + i] + kt * v[o + i]);
    };
    for (int64_t c = 0; c + 1 < blocks; c++) {
        const float *from = starts + c * size;
        for (int64_t t = c * block; t < (c + 1) * block; t++) {
            step(t, from, starts + (c + 1) * size);
            from = starts + (c + 1) * size;
        }
    }
    for (int64_t c = blocks - 1; c >= 0; c--) {
        const int64_t first = c * block, last = first + block < T ? first + block : T;
        __builtin_memcpy(inside, starts + c * size, sizeof(float) * (size_t)size);
        for (int64_t t = first; t < last; t++) step(t, inside + (t - first) * size, inside + (t - first + 1) * size);
        for (int64_t t = last - 1; t >= first; t--) {
            const int64_t o = t * stride;
            const float *before = inside + (t - first) * size, *after = before + size;
            const lanes rt = load(r + o + key), wt = load(decay + o + key), at = load(a + o + key);
            lanes xr = {}, xw = {}, xk = {}, xa = {}, xb = {};
            for (int64_t i = 0; i < N; i++) {
                const float dyi = dy[o + i], dsai = dsa[o + i];
                const lanes s = load(before + i * W), d = load(d_tile + i * W) + rt * dyi;
                xr += load(after + i * W) * dyi;
                xw += d * s;
                xk += d * v[o + i];
                xa += s * dsai;
                xb += d * sa[o + i];
                store(d_tile + i * W, d * wt + at * dsai);
            }
            store(dr + o + key, xr);
            store(dw + o + key, xw * wt);
            store(dk + o + key, xk);
            store(da + o + key, xa);
            store(db + o + key, xb);
        }
    }
    for (int64_t i = 0; i < N; i++) store(d_state + i * N + key, load(d_tile + i * W));
}

// RWKV-5 and 6: columns [value, value + W) of one head, all T tokens.
// u [N]; state, new_state (may be NULL) [N key][N value]; tile: N * W floats of scratch.
static void wkv6_tile(int64_t T, int64_t N, int64_t stride, int64_t value, const float *decay, const float *r,
                      const float *k, const float *v, const float *u, const float *state, float *y, float *new_state,
                      float *tile) {
    for (int64_t j = 0; j < N; j++) store(tile + j * W, load(state + j * N + value));
    for (int64_t t = 0; t < T; t++) {
        const int64_t o = t * stride;
        const lanes vt = load(v + o + value);
        lanes yt = {};
        for (int64_t j = 0; j < N; j++) {
            const lanes kv = vt * k[o + j], s = load(tile + j * W);
            yt += (s + kv * u[j]) * r[o + j];
            store(tile + j * W, s * decay[o + j] + kv);
        }
        store(y + o + value, yt);
    }
    if (!new_state) return;
    for (int64_t j = 0; j < N; j++) store(new_state + j * N + value, load(tile + j * W));
}

// RWKV-4: W channels, all T tokens.  w (log-decay), k, v, y: pointers to the first channel; state, new_state (may be
// NULL): num, den and max, one W after the other at `channels` floats from each other.
static void wkv4_tile(int64_t T, int64_t stride, int64_t channels, const float *w, const float *k, const float *v,
                      const float *u, const float *state, float *y, float *new_state) {
    const lanes ut = load(u);
    lanes num = load(state), den = load(state + channels), top = load(state + 2 * channels);
    for (int64_t t = 0; t < T; t++) {
        const int64_t o = t * stride;
        const lanes wt = load(w + o), kt = load(k + o), vt = load(v + o);
        lanes q = larger(top, ut + kt), e[4];
        float x[4 * W];
        store(x, top - q);
        store(x + W, ut + kt - q);
        const lanes later = larger(top + wt, kt);
        store(x + 2 * W, top + wt - later);
        store(x + 3 * W, kt - later);
        exp_nonpositive(x, x, 4 * W);
        for (int i = 0; i < 4; i++) e[i] = load(x + i * W);
        store(y + o, (e[0] * num + e[1] * vt) / (e[0] * den + e[1]));
        num = e[2] * num + e[3] * vt;
        den = e[2] * den + e[3];
        top = later;
    }
    if (!new_state) return;
    store(new_state, num);
    store(new_state + channels, den);
    store(new_state + 2 * channels, top);
}

static const Lanes table = {W, exp_nonpositive, forward_tile, backward_values, backward_keys, wkv6_tile, wkv4_tile};

}  // namespace NAMESPACE
