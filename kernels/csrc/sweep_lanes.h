// The recurrence of RWKV-7 through a few tokens of one head.  Included once per instruction set, see levels.h; no include
// guard.  A head's state is held in tiles of `width` values, each [N key][width values].

#include "lanes.h"

namespace NAMESPACE {

// TILES * W values of one head through T tokens; as forward_tile of wkv_lanes.h.  tile [N key][values] is the state.
// w (decay), k, v, a, b, y: [T][N]; r as the others but `stride` apart.  sa: S a of each token, as y; NULL: not wanted.
template <int TILES>
static void sweep(int64_t T, int64_t N, int64_t stride, int64_t value, const float *r, const float *w, const float *k,
                  const float *v, const float *a, const float *b, float *y, float *sa, float *tile) {
    lanes product[TILES] = {};
    for (int64_t j = 0; j < N; j++)
        for (int i = 0; i < TILES; i++) product[i] += load(tile + (j * TILES + i) * W) * a[j];
    for (int64_t t = 0; t < T; t++) {
        const float *next_a = t + 1 < T ? a + N : a;  // after the last token the product is not used
        lanes yt[TILES] = {}, next[TILES] = {}, vt[TILES];
        for (int i = 0; i < TILES; i++) vt[i] = load(v + value + i * W);
        if (sa)
            for (int i = 0; i < TILES; i++) store(sa + t * N + value + i * W, product[i]);
        for (int64_t j = 0; j < N; j++) {
            const float wj = w[j], bj = b[j], kj = k[j], rj = r[j], aj = next_a[j];  // before a store that could change them
            for (int i = 0; i < TILES; i++) {
                lanes s = load(tile + (j * TILES + i) * W) * wj + product[i] * bj + vt[i] * kj;
                store(tile + (j * TILES + i) * W, s);
                yt[i] += s * rj;
                next[i] += s * aj;
            }
        }
        for (int i = 0; i < TILES; i++) store(y + value + i * W, yt[i]), product[i] = next[i];
        r += stride, w += N, k += N, v += N, a += N, b += N, y += N;
    }
}

// Values [value, value + W) of the state's tiles, each [N key][width values].
static inline float *tile_of(float *tiles, int64_t value, int64_t N, int64_t width) {
    return tiles + value / width * N * width + value % width;
}

// W rows, `stride` from each other, of N → N rows of W, `to_stride` from each other; N a multiple of W.
static inline void transpose(int64_t N, int64_t stride, const float *from, int64_t to_stride, float *to) {
    for (int64_t j = 0; j < N; j += W) {
        lanes row[W];
        for (int i = 0; i < W; i++) row[i] = load(from + i * stride + j);
        transpose_square<W / 2>(row);
        for (int i = 0; i < W; i++) store(to + (j + i) * to_stride, row[i]);
    }
}

// A state [N value][N key] → its tiles, and back.
static inline void to_tiles(int64_t N, int64_t width, const float *state, float *tiles) {
    for (int64_t value = 0; value < N; value += W) transpose(N, N, state + value * N, width, tile_of(tiles, value, N, width));
}
static inline void from_tiles(int64_t N, int64_t width, float *tiles, float *state) {
    for (int64_t value = 0; value < N; value += W)
        for (int64_t key = 0; key < N; key += W)
            transpose(W, width, tile_of(tiles, value, N, width) + key * width, N, state + value * N + key);
}

}  // namespace NAMESPACE
