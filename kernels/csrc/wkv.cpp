// The recurrences of RWKV-4 to 7 in float32 with state in and out; of RWKV-7 backward, too.
//
//     7:    S_t = S_{t-1} diag(exp w_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T,   y_t = S_t r_t
//     5, 6: y_t = r_t (S_{t-1} + diag(u) k_t^T v_t),   S_t = diag(exp w_t) S_{t-1} + k_t^T v_t
//     4:    as `wkv4_recurrent` of recurrence/reference.py defines it
//
// Sources: RWKV-7 paper (arXiv 2503.14456), section 4; Eagle and Finch paper (arXiv 2404.05892), section 4; RWKV-4
// paper (arXiv 2305.13048), section 3.
//
// Plain C ABI.  Unless said otherwise every pointer is float32, contiguous, not NULL, owned by the caller and not
// kept after the call; inputs are only read, outputs are written in full, no two of them overlap.
// r w k v a b y and their gradients: [B, T, H, N].  States and their gradients: [B, H, N value, N key].
// The forward pass takes S segments of any lengths, laid end to end: [n, H, N]; B rows of T tokens are S = B of them.
// Any B, S, H, T, N >= 1.  Functions are thread safe (no global state is written) and divide their work over `threads` threads
// of the OpenMP runtime which the process already has; results do not depend on `threads`.

#include <omp.h>

#include <cstddef>
#include <cstdint>

namespace {

constexpr int64_t KEPT = 16;  // tokens between the states that the forward pass keeps for the backward pass

struct Level {
    int64_t width;
    void (*exp_nonpositive)(const float *, float *, int64_t);
    void (*forward_tile)(int64_t, int64_t, int64_t, int64_t, const float *, const float *, const float *, const float *,
                         const float *, const float *, const float *, float *, float *, float *, float *, int64_t,
                         float *);
    int64_t (*head_scratch)(int64_t);
    void (*backward_head)(int64_t, int64_t, int64_t, int64_t, const float *, const float *, const float *,
                          const float *, const float *, const float *, const float *, const float *, const float *,
                          const float *, float *, float *, float *, float *, float *, float *, float *, float *);
    void (*wkv6_tile)(int64_t, int64_t, int64_t, int64_t, const float *, const float *, const float *, const float *,
                      const float *, const float *, float *, float *, float *);
    void (*wkv4_tile)(int64_t, int64_t, int64_t, const float *, const float *, const float *, const float *,
                      const float *, float *, float *);
};

#define LEVEL "wkv_lanes.h"
#include "levels.h"
#undef LEVEL

#include "level_for.h"

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// The version of this interface; a caller made for another one must not call the rest.
EXPORT int abi_version() { return 8; }

// Floats of scratch that one thread of wkv6_forward or wkv7_forward (backward = 0) or wkv7_backward (backward = 1) needs.
EXPORT int64_t wkv7_scratch(int64_t N, int backward) {
    return backward ? level_for(N).head_scratch(N) : N * level_for(N).width;
}

// States that wkv7_forward keeps of a segment of T tokens.
EXPORT int64_t wkv7_kept(int64_t T) { return (T + KEPT - 1) / KEPT; }

// offsets   : in, int64 [S + 1], ascending: segment s is made of tokens offsets[s] to offsets[s + 1], n = offsets[S]
// state     : in
// from      : in, int64 [S], the row of `state` that each segment starts from; NULL: row s
// to        : in, int64 [S], the row of `new_state` that each segment ends in, -1 for none; NULL: row s
// decay     : out, exp(w); also what wkv7_backward wants
// new_state : out, S after the last token of the segments that have a row in it; NULL where none has
// sa        : out, S_{t-1} a_t per token, for wkv7_backward; may be NULL
// states    : out where sa is not NULL, for wkv7_backward; then all segments have T tokens: [S, wkv7_kept(T), H, N, N]
// scratch   : threads * wkv7_scratch(N, 0) floats, contents undefined before and after
EXPORT void wkv7_forward(int64_t S, const int64_t *offsets, int64_t H, int64_t N, int threads, const float *r,
                         const float *w, const float *k, const float *v, const float *a, const float *b,
                         const float *state, const int64_t *from, const int64_t *to, float *decay, float *y,
                         float *new_state, float *sa, float *states, float *scratch) {
    const Level &lanes = level_for(N);
    const int64_t stride = H * N, tiles = N / lanes.width, room = wkv7_scratch(N, 0);
#pragma omp parallel num_threads(threads)
    {
        float *mine = scratch + omp_get_thread_num() * room;
#pragma omp for schedule(static)
        for (int64_t row = offsets[0]; row < offsets[S]; row++)
            lanes.exp_nonpositive(w + row * stride, decay + row * stride, stride);
#pragma omp for schedule(dynamic, 1)
        for (int64_t unit = 0; unit < S * H * tiles; unit++) {
            const int64_t segment = unit / (H * tiles), head = unit / tiles % H, value = unit % tiles * lanes.width;
            const int64_t first = offsets[segment], T = offsets[segment + 1] - first;
            const int64_t source = from ? from[segment] : segment, target = to ? to[segment] : segment;
            const int64_t o = (first * H + head) * N;
            lanes.forward_tile(T, N, stride, value, decay + o, r + o, k + o, v + o, a + o, b + o,
                               state + (source * H + head) * N * N, y + o,
                               target < 0 ? nullptr : new_state + (target * H + head) * N * N, sa ? sa + o : nullptr,
                               sa ? states + (segment * wkv7_kept(T) * H + head) * N * N : nullptr, stride * N, mine);
        }
    }
}

// offsets, from, to, decay, new_state, scratch: as wkv7_forward has them
// u         : in, [H, N]
// state     : in, [rows, H, N key, N value]
EXPORT void wkv6_forward(int64_t S, const int64_t *offsets, int64_t H, int64_t N, int threads, const float *r,
                         const float *w, const float *k, const float *v, const float *u, const float *state,
                         const int64_t *from, const int64_t *to, float *decay, float *y, float *new_state,
                         float *scratch) {
    const Level &lanes = level_for(N);
    const int64_t stride = H * N, tiles = N / lanes.width, room = wkv7_scratch(N, 0);
#pragma omp parallel num_threads(threads)
    {
        float *mine = scratch + omp_get_thread_num() * room;
#pragma omp for schedule(static)
        for (int64_t row = offsets[0]; row < offsets[S]; row++)
            lanes.exp_nonpositive(w + row * stride, decay + row * stride, stride);
#pragma omp for schedule(dynamic, 1)
        for (int64_t unit = 0; unit < S * H * tiles; unit++) {
            const int64_t segment = unit / (H * tiles), head = unit / tiles % H, value = unit % tiles * lanes.width;
            const int64_t first = offsets[segment], T = offsets[segment + 1] - first;
            const int64_t source = from ? from[segment] : segment, target = to ? to[segment] : segment;
            const int64_t o = (first * H + head) * N;
            lanes.wkv6_tile(T, N, stride, value, decay + o, r + o, k + o, v + o, u + head * N,
                            state + (source * H + head) * N * N, y + o,
                            target < 0 ? nullptr : new_state + (target * H + head) * N * N, mine);
        }
    }
}

// offsets, from, to: as wkv7_forward has them
// w k v y  : [n, C];  u : [C]
// state    : in, [rows, 3, C]: num, den, max;  new_state : out, likewise; NULL where none has a row in it
EXPORT void wkv4_forward(int64_t S, const int64_t *offsets, int64_t C, int threads, const float *w, const float *k,
                         const float *v, const float *u, const float *state, const int64_t *from, const int64_t *to,
                         float *y, float *new_state) {
    const Level &lanes = level_for(C);
    const int64_t tiles = C / lanes.width;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t unit = 0; unit < S * tiles; unit++) {
        const int64_t segment = unit / tiles, channel = unit % tiles * lanes.width;
        const int64_t first = offsets[segment], T = offsets[segment + 1] - first, o = first * C + channel;
        const int64_t source = from ? from[segment] : segment, target = to ? to[segment] : segment;
        lanes.wkv4_tile(T, C, C, w + o, k + o, v + o, u + channel, state + source * 3 * C + channel, y + o,
                        target < 0 ? nullptr : new_state + target * 3 * C + channel);
    }
}

// decay, sa, states : in, from wkv7_forward
// dy          : in, gradient of y;  d_new_state: in, gradient of the state after the last token; NULL: zeros
// dr .. db    : out, gradients; dw is that of log-decay
// d_state     : out, gradient of the state before the first token
// scratch     : threads * wkv7_scratch(N, 1) floats, contents undefined before and after
EXPORT void wkv7_backward(int64_t B, int64_t T, int64_t H, int64_t N, int threads, const float *r, const float *decay,
                          const float *k, const float *v, const float *a, const float *b, const float *sa,
                          const float *states, const float *dy, const float *d_new_state, float *dr, float *dw,
                          float *dk, float *dv, float *da, float *db, float *d_state, float *scratch) {
    const Level &lanes = level_for(N);
    const int64_t stride = H * N, room = wkv7_scratch(N, 1);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t head = 0; head < B * H; head++) {
        const int64_t o = (head / H * T * H + head % H) * N, s = head * N * N;
        lanes.backward_head(T, N, stride, stride * N, decay + o, r + o, k + o, v + o, a + o, b + o, sa + o,
                            states + (head / H * wkv7_kept(T) * H + head % H) * N * N, dy + o,
                            d_new_state ? d_new_state + s : nullptr, dr + o, dw + o, dk + o, dv + o, da + o, db + o,
                            d_state + s, scratch + omp_get_thread_num() * room);
    }
}
