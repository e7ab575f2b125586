// Products with packed matrices: y = activation(x W^T), for one row (decoding) to thousands (reading).
//
// A matrix [N, K] is packed once, as panels of 32 rows (the last filled up with zeros):
//     float32  [panels][K][32]
//     bf16     [panels][pairs of k][32][2]: what products of pairs take; pairs are filled up to a multiple of 16
//     int8     like bf16, with a float32 scale per row: the matrix is scale * int8
// Sums are float32 and in the order of k, whatever the number of rows and threads; inputs of bf16 and int8 matrices
// are bf16.  So a row's result is the same bits in any call.  Processors with products of bf16 pairs, or tiles, use them.

#include <omp.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

enum Activation { NONE, TANH, SIGMOID, RELU2 };

struct Kind {
    int64_t rows, given_bytes;  // of input at once; of a step of one of them
    void (*gather)(int64_t, int64_t, int64_t, const void *, void *);
    void (*product)(int64_t, int64_t, const void *, const void *, float *);
};

struct Level {
    Kind kinds[3];  // float32, bf16, int8; without `product` int8 is widened first
    void (*widened)(int64_t, const int8_t *, uint16_t *);
    void (*finish)(int64_t, const float *, int64_t, float *);
    void (*put_bf16)(uint16_t *, const float *, int64_t);
};

#define LEVEL "linear_lanes.h"
#include "levels.h"
#ifdef X86_LEVELS
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#define LANES 16
#define NAMESPACE avx512_bf16
#define DOT_BF16
#include "linear_lanes.h"
#undef DOT_BF16
#undef LANES
#undef NAMESPACE
#pragma GCC pop_options
#endif
#undef LEVEL
#if defined(__linux__) && defined(X86_LEVELS)
#define HAS_TILES
#include "linear_amx.h"
#endif

enum { FLOAT32, BF16, INT8, PANEL = 32 };
constexpr int64_t BLOCK = 8;         // groups of rows that are gathered at once: they fit into the L2 cache
constexpr int64_t ROW_BYTES = 512;   // of all those rows, for one k: 32 rows of 2 bytes, 12 of 4

// Of a panel; K as it is filled up.
int64_t filled(int64_t K, int kind) { return kind == FLOAT32 ? K : (K + 31) / 32 * 32; }

#ifdef HAS_TILES
template <class Tile>
Level with_tiles() {
    Level made = avx512_bf16::level;
    made.kinds[BF16] = {amx::ROWS, 4, amx::gather, amx::product<Tile>};
    made.kinds[INT8] = {amx::ROWS, 4, amx::gather, nullptr};
    return made;
}
#endif

const Level &fastest(int limit) {
#ifdef HAS_TILES
    static const Level hardware = with_tiles<amx::Hardware>(), software = with_tiles<amx::Software>();
    static const bool is_permitted = amx::is_permitted();
    if (limit == 5) return software;
    if (limit == 4 && is_permitted) return hardware;
#endif
#ifdef X86_LEVELS
    if (limit >= 3 && has_avx512() && __builtin_cpu_supports("avx512bf16")) return avx512_bf16::level;
    if (limit >= 2 && has_avx512()) return avx512::level;
    if (limit >= 1 && has_avx2()) return avx2::level;
#endif
    return baseline::level;
}

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Bytes of scratch that one thread of `linear` needs for inputs of K: the gathered rows, a widened panel, the sums.
EXPORT int64_t linear_scratch(int64_t K) { return filled(K, BF16) * (ROW_BYTES + PANEL * 2) + 32 * PANEL * 4; }

// n, N, K    : of x [n, K] and the matrix [N, K]
// kind       : 0 float32, 1 bf16, 2 int8
// limit      : instruction sets allowed: 0 any processor's, 1 AVX2, 2 AVX-512, 3 with products of bf16 pairs, 4 AMX;
//              5: AMX in software
// x          : in, float32 for kind 0, else bf16; rows `stride` elements from each other
// panels     : in;  scales: in, float32 [N], kind 2 only, else NULL
// activation : 0 none, 1 tanh, 2 sigmoid, 3 relu squared
// y          : out, rows `y_stride` elements from each other: [n, N] float32, or bf16 where `narrow`; where `add` it is
//              float32 and the result is added to what it holds
// scratch    : threads * linear_scratch(K) bytes at a multiple of 64, contents undefined before and after
EXPORT void linear(int64_t n, int64_t N, int64_t K, int kind, int limit, const void *x, int64_t stride,
                   const void *panels, const float *scales, int activation, void *y, int64_t y_stride, int narrow,
                   int add, int threads, char *scratch) {
    const Level &level = fastest(limit);
    const Kind &of = level.kinds[kind], &wide = level.kinds[BF16];
    const int64_t whole = filled(K, kind), steps = kind == FLOAT32 ? whole : whole / 2;
    const int64_t panel_bytes = PANEL * whole * (kind == FLOAT32 ? 4 : kind == BF16 ? 2 : 1);
    const int64_t n_panels = (N + PANEL - 1) / PANEL, rows = of.rows * BLOCK, blocks = (n + rows - 1) / rows;
    if (n < 1) return;
    // Enough tasks for every thread to end at about the same time, none so small that gathering the rows again shows.
    int64_t group = n_panels * blocks / (threads * 4);
    group = group < 1 ? 1 : smaller(group, n > of.rows ? 16 : 64);
    const int64_t groups = (n_panels + group - 1) / group, tasks = blocks * groups, room = linear_scratch(K);
#pragma omp parallel num_threads((int)smaller(threads, tasks))
    {
        char *given = scratch + omp_get_thread_num() * room;
        uint16_t *widened = (uint16_t *)(given + filled(K, BF16) * ROW_BYTES);
        float *sums = (float *)(widened + filled(K, BF16) * PANEL);
        int64_t gathered = -1;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; task++) {
            const int64_t block = task / groups, first = block * rows, last = smaller(n, first + rows);
            const int64_t row_bytes = steps * of.given_bytes;
            if (block != gathered)
                for (int64_t row = first; row < last; row += of.rows)
                    of.gather(smaller(of.rows, last - row), K, stride,
                              (const char *)x + row * stride * (kind == FLOAT32 ? 4 : 2), given + (row - first) * row_bytes);
            gathered = block;
            const int64_t panel_end = smaller(n_panels, (task % groups + 1) * group);
            for (int64_t panel = task % groups * group; panel < panel_end; panel++) {
                const void *weights = (const char *)panels + panel * panel_bytes;
                const Kind *by = &of;
                if (kind == INT8 && (!of.product || last - first > of.rows)) {  // they are read more than once
                    level.widened(steps * PANEL * 2, (const int8_t *)weights, widened);
                    weights = widened, by = &wide;
                }
                const int64_t column = panel * PANEL, width = smaller(PANEL, N - column);
                float row_scales[PANEL] = {};
                for (int64_t i = 0; scales && i < width; i++) row_scales[i] = scales[column + i];
                for (int64_t row = first; row < last; row += of.rows) {
                    const int64_t count = smaller(of.rows, last - row);
                    by->product(count, steps, given + (row - first) * row_bytes, weights, sums);
                    level.finish(count * PANEL, scales ? row_scales : nullptr, activation, sums);
                    for (int64_t i = 0; i < count; i++) {
                        const int64_t o = (row + i) * y_stride + column;
                        const float *from = sums + i * PANEL;
                        if (narrow)
                            level.put_bf16((uint16_t *)y + o, from, width);
                        else if (add)
                            for (int64_t j = 0; j < width; j++) ((float *)y)[o + j] += from[j];
                        else
                            __builtin_memcpy((float *)y + o, from, sizeof(float) * (size_t)width);
                    }
                }
            }
        }
#ifdef HAS_TILES
        if (wide.rows == amx::ROWS) wide.product(0, 0, nullptr, nullptr, nullptr);  // gives the tiles back
#endif
    }
}
