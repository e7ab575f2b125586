// Gradients of the recurrence of RWKV-7 through a few tokens of one head.  Included once per instruction set, see
// levels.h; no include guard.
//
// Every row of S (one value) evolves by itself given r w k a b, and every column (one key) by itself given S a: the
// gradients of v and S a are found with values in the lanes, then those of r w k a b with keys in the lanes.  Both hold
// the gradient of the state, each laid out its own way; sums stay in registers.

#include "sweep_lanes.h"

namespace NAMESPACE {

enum { VALUES_AT_ONCE = W == 16 ? 4 : W == 1 ? 1 : 2, KEYS_AT_ONCE = W == 16 ? 2 : 1 };  // tiles, as registers allow

// As `sum`, but by halves: fewer additions wait for each other.
static inline float sum_by_halves(lanes x) {
    float p[W];
    store(p, x);
    for (int half = W / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) p[i] += p[i + half];
    return p[0];
}

// The widest group of up to MOST tiles that divides N, in floats.
template <int MOST>
static inline int64_t width_of(int64_t N) {
    if constexpr (MOST > 1)
        if (N % (MOST * W)) return width_of<MOST / 2>(N);
    return MOST * W;
}

// One head's work memory, and what a block of tokens leaves for the block before it.
struct Head {
    float *by_value, *by_key;           // gradient of the state after the block: tiles [N key][values], [N value][keys]
    float *next_w, *next_a, *next_dsa;  // [N], of the token after the block
    float *inside, *dsa, *sums;         // states [KEPT][N value][keys]; [KEPT][N]; (S a) dy and v dy [KEPT][2]
};

static inline int64_t head_scratch(int64_t N) {
    return 2 * N * N + 3 * N + KEPT * N * width_of<KEYS_AT_ONCE>(N) + KEPT * N + KEPT * 2;
}

static inline Head head_of(int64_t N, float *scratch) {
    float *by_key = scratch + N * N, *next = by_key + N * N, *inside = next + 3 * N;
    float *dsa = inside + KEPT * N * width_of<KEYS_AT_ONCE>(N);
    return {scratch, by_key, next, next + N, next + 2 * N, inside, dsa, dsa + KEPT * N};
}

// d_new_state [N value][N key]; NULL: zeros.
static void begin(int64_t N, const float *d_new_state, const Head &head) {
    const int64_t width = width_of<KEYS_AT_ONCE>(N);
    for (int64_t j = 0; j < N; j++) head.next_w[j] = 1, head.next_a[j] = head.next_dsa[j] = 0;
    if (!d_new_state) {
        __builtin_memset(head.by_value, 0, sizeof(float) * (size_t)(2 * N * N));
        return;
    }
    to_tiles(N, width_of<VALUES_AT_ONCE>(N), d_new_state, head.by_value);
    for (int64_t value = 0; value < N; value++)
        for (int64_t key = 0; key < N; key += W)
            store(tile_of(head.by_key, key, N, width) + value * width, load(d_new_state + value * N + key));
}

// The gradient of the state before the last block that was gone through.
static void end(int64_t N, const Head &head, float *d_state) {
    const int64_t width = width_of<KEYS_AT_ONCE>(N);
    for (int64_t value = 0; value < N; value++)
        for (int64_t key = 0; key < N; key += W)
            store(d_state + value * N + key, load(tile_of(head.by_key, key, N, width) + value * width));
}

template <int TILES>
static void values_back(int64_t T, int64_t N, int64_t stride, int64_t value, const float *w, const float *r,
                        const float *k, const float *a, const float *b, const float *dy, float *dv, const Head &head) {
    if constexpr (TILES > 1)
        if (N % (TILES * W)) return values_back<TILES / 2>(T, N, stride, value, w, r, k, a, b, dy, dv, head);
    float *tile = head.by_value + value * N;
    const float *next_w = head.next_w, *next_a = head.next_a;
    lanes dproduct[TILES];
    for (int i = 0; i < TILES; i++) dproduct[i] = load(head.next_dsa + value + i * W);
    for (int64_t t = T - 1; t >= 0; t--) {
        const int64_t o = t * stride;
        lanes dyt[TILES], dvt[TILES] = {}, dsat[TILES] = {};
        for (int i = 0; i < TILES; i++) dyt[i] = load(dy + o + value + i * W);
        for (int64_t j = 0; j < N; j++) {
            const float wj = next_w[j], aj = next_a[j], rj = r[o + j], kj = k[o + j], bj = b[o + j];
            for (int i = 0; i < TILES; i++) {
                const lanes d = load(tile + (j * TILES + i) * W) * wj + dproduct[i] * aj + dyt[i] * rj;
                store(tile + (j * TILES + i) * W, d);
                dvt[i] += d * kj;
                dsat[i] += d * bj;
            }
        }
        for (int i = 0; i < TILES; i++) {
            store(dv + o + value + i * W, dvt[i]);
            store(head.dsa + t * N + value + i * W, dsat[i]);
            dproduct[i] = dsat[i];
        }
        next_w = w + o, next_a = a + o;
    }
}

template <int TILES>
static void keys_back(int64_t T, int64_t N, int64_t stride, int64_t key, const float *w, const float *r, const float *k,
                      const float *v, const float *a, const float *b, const float *sa, const float *state,
                      const float *dy, float *dr, float *dw, float *dk, float *da, float *db, const Head &head) {
    if constexpr (TILES > 1)
        if (N % (TILES * W))
            return keys_back<TILES / 2>(T, N, stride, key, w, r, k, v, a, b, sa, state, dy, dr, dw, dk, da, db, head);
    enum { WIDTH = TILES * W };
    float *d_tile = head.by_key + key * N, *inside = head.inside;
    for (int64_t value = 0; value < N; value++)
        for (int i = 0; i < TILES; i++) store(inside + value * WIDTH + i * W, load(state + value * N + key + i * W));
    for (int64_t t = 0; t + 1 < T; t++) {  // the state before every token
        const int64_t o = t * stride;
        const float *from = inside + t * N * WIDTH;
        float *to = inside + (t + 1) * N * WIDTH;
        lanes wt[TILES], bt[TILES], kt[TILES];
        for (int i = 0; i < TILES; i++)
            wt[i] = load(w + o + key + i * W), bt[i] = load(b + o + key + i * W), kt[i] = load(k + o + key + i * W);
        for (int64_t j = 0; j < N; j++) {
            const float saj = sa[o + j], vj = v[o + j];
            for (int i = 0; i < TILES; i++)
                store(to + j * WIDTH + i * W, load(from + j * WIDTH + i * W) * wt[i] + bt[i] * saj + kt[i] * vj);
        }
    }
    for (int64_t t = T - 1; t >= 0; t--) {
        const int64_t o = t * stride;
        const float *before = inside + t * N * WIDTH, *dsa = head.dsa + t * N;
        lanes rt[TILES], wt[TILES], at[TILES], xr[TILES] = {}, xw[TILES] = {}, xk[TILES] = {}, xa[TILES] = {}, xb[TILES] = {};
        for (int i = 0; i < TILES; i++)
            rt[i] = load(r + o + key + i * W), wt[i] = load(w + o + key + i * W), at[i] = load(a + o + key + i * W);
        for (int64_t j = 0; j < N; j++) {
            const float dyj = dy[o + j], dsaj = dsa[j], vj = v[o + j], saj = sa[o + j];
            for (int i = 0; i < TILES; i++) {
                const lanes s = load(before + j * WIDTH + i * W), d = load(d_tile + j * WIDTH + i * W) + rt[i] * dyj;
                xr[i] += s * dyj;
                xw[i] += d * s;
                xk[i] += d * vj;
                xa[i] += s * dsaj;
                xb[i] += d * saj;
                store(d_tile + j * WIDTH + i * W, d * wt[i] + at[i] * dsaj);
            }
        }
        for (int i = 0; i < TILES; i++) {  // y reads the state after the token
            const int64_t at_key = o + key + i * W;
            store(dr + at_key, xr[i] * wt[i] + load(b + at_key) * head.sums[2 * t] + load(k + at_key) * head.sums[2 * t + 1]);
            store(dw + at_key, xw[i] * wt[i]);
            store(dk + at_key, xk[i]);
            store(da + at_key, xa[i]);
            store(db + at_key, xb[i]);
        }
    }
}

// Gradients through T <= KEPT tokens, whose vectors lie `stride` apart; w is the decay, dw that of its logarithm.
// sa: S a of each token, from the forward pass; state [N value][N key]: before the first of these tokens.
static void block_back(int64_t T, int64_t N, int64_t stride, const float *w, const float *r, const float *k,
                       const float *v, const float *a, const float *b, const float *sa, const float *state,
                       const float *dy, float *dr, float *dw, float *dk, float *dv, float *da, float *db,
                       const Head &head) {
    for (int64_t t = 0; t < T; t++) {
        lanes with_sa = {}, with_v = {};
        for (int64_t j = 0; j < N; j += W) {
            const lanes dyj = load(dy + t * stride + j);
            with_sa += dyj * load(sa + t * stride + j);
            with_v += dyj * load(v + t * stride + j);
        }
        head.sums[2 * t] = sum_by_halves(with_sa), head.sums[2 * t + 1] = sum_by_halves(with_v);
    }
    for (int64_t value = 0; value < N; value += width_of<VALUES_AT_ONCE>(N))
        values_back<VALUES_AT_ONCE>(T, N, stride, value, w, r, k, a, b, dy, dv, head);
    for (int64_t key = 0; key < N; key += width_of<KEYS_AT_ONCE>(N))
        keys_back<KEYS_AT_ONCE>(T, N, stride, key, w, r, k, v, a, b, sa, state, dy, dr, dw, dk, da, db, head);
    __builtin_memcpy(head.next_w, w, sizeof(float) * (size_t)N);
    __builtin_memcpy(head.next_a, a, sizeof(float) * (size_t)N);
    __builtin_memcpy(head.next_dsa, head.dsa, sizeof(float) * (size_t)N);
}

}  // namespace NAMESPACE
