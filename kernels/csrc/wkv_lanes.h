// One tile of a recurrence, W lanes wide.  Included once per instruction set, see levels.h; no include guard.
//
// RWKV-7: every row of S (one value) evolves by itself given r w k a b, and every column (one key) by itself given S a;
// RWKV-5 and 6: every column of S (one value) by itself; RWKV-4: every channel.
// So tiles of W of them need nothing from each other, and no sum is ever split between threads.
// All pointers are float32; a vector of token t starts at pointer + t * stride.

#include "sweep_back_lanes.h"

namespace NAMESPACE {

// Rows [value, value + W) of one head, all T tokens.
// state, new_state (may be NULL) [N value][N key]; sa (may be NULL) receives S a per token, and states the state before
// every block of KEPT tokens, `state_stride` apart; tile: N * W floats of scratch.
static void forward_tile(int64_t T, int64_t N, int64_t stride, int64_t value, const float *decay, const float *r,
                         const float *k, const float *v, const float *a, const float *b, const float *state, float *y,
                         float *new_state, float *sa, float *states, int64_t state_stride, float *tile) {
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
        if (sa && t % KEPT == 0)
            for (int64_t j = 0; j < N; j += W)
                transpose(W, W, tile + j * W, N, states + t / KEPT * state_stride + value * N + j);
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

// Gradients of one head through all T tokens, last block of KEPT first.  states: before each block, from forward_tile,
// `state_stride` apart; d_new_state and d_state [N value][N key]; scratch: head_scratch(N) floats.
static void backward_head(int64_t T, int64_t N, int64_t stride, int64_t state_stride, const float *decay, const float *r,
                          const float *k, const float *v, const float *a, const float *b, const float *sa,
                          const float *states, const float *dy, const float *d_new_state, float *dr, float *dw,
                          float *dk, float *dv, float *da, float *db, float *d_state, float *scratch) {
    const Head head = head_of(N, scratch);
    begin(N, d_new_state, head);
    for (int64_t block = (T - 1) / KEPT; block >= 0; block--) {
        const int64_t first = block * KEPT, o = first * stride, count = T - first < KEPT ? T - first : KEPT;
        block_back(count, N, stride, decay + o, r + o, k + o, v + o, a + o, b + o, sa + o, states + block * state_stride,
                   dy + o, dr + o, dw + o, dk + o, dv + o, da + o, db + o, head);
    }
    end(N, head, d_state);
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

static const Level level = {W, exp_nonpositive, forward_tile, head_scratch, backward_head, wkv6_tile, wkv4_tile};

}  // namespace NAMESPACE
