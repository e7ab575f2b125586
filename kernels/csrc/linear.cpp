// Products with packed matrices: y = activation(x W^T), for one row (decoding) to thousands (reading).
//
// A matrix [N, K] is packed once, as panels of 32 rows (the last filled up with zeros):
//     float32  [panels][K][32]; k are filled up with zeros to a multiple of 16
//     bf16     [panels][pairs of k][32][2]: what products of pairs take; pairs are filled up to a multiple of 16
//     int8     like bf16, with a float32 scale per row: the matrix is scale * int8
// Sums are float32 and in the order of k, whatever the number of rows and threads; inputs of bf16 and int8 matrices
// are bf16.  So a row's result is the same bits in any call.  Processors with products of bf16 pairs, or tiles, use them.

#include <omp.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "products.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

enum { FLOAT32, BF16, INT8 };
constexpr int PANEL = 32;

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

constexpr int64_t BLOCK = 8;         // groups of rows that are gathered at once: they fit into the L2 cache
constexpr int64_t ROW_BYTES = 512;   // of all those rows, for one k: 32 rows of 2 bytes, 12 of 4

// K as a panel is filled up: to 16 steps.
int64_t filled(int64_t K, int kind) { return kind == FLOAT32 ? (K + 15) / 16 * 16 : (K + 31) / 32 * 32; }

#ifdef HAS_TILES
template <class Tile>
Level with_tiles() {
    Level made = avx512_bf16::level;
    made.kinds[BF16] = {amx::ROWS, 4, amx::gather, amx::product<Tile>};
    made.kinds[INT8] = {amx::ROWS, 4, amx::gather, nullptr};
    return made;
}
#endif

// The highest up to `limit` that this processor has.
int highest(int limit) {
#ifdef HAS_TILES
    static const bool is_permitted = amx::is_permitted();
    if (limit == 5 || (limit == 4 && is_permitted)) return limit;
#endif
#ifdef X86_LEVELS
    if (limit >= 3 && has_avx512() && __builtin_cpu_supports("avx512bf16")) return 3;
    if (limit >= 2 && has_avx512()) return 2;
    if (limit >= 1 && has_avx2()) return 1;
#endif
    return 0;
}

const Level &fastest(int limit) {
    switch (highest(limit)) {
#ifdef HAS_TILES
        case 5: {
            static const Level software = with_tiles<amx::Software>();
            return software;
        }
        case 4: {
            static const Level hardware = with_tiles<amx::Hardware>();
            return hardware;
        }
#endif
#ifdef X86_LEVELS
        case 3:
            return avx512_bf16::level;
        case 2:
            return avx512::level;
        case 1:
            return avx2::level;
#endif
        default:
            return baseline::level;
    }
}

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// A product cut into tasks: blocks of rows, and for each of them groups of panels.
struct Plan {
    int64_t steps, panel_bytes, n_panels, rows, group, groups, tasks;
};

// Enough tasks for every thread to end at about the same time, none so small that gathering the rows again shows.
Plan plan_of(int64_t n, const Matrix &matrix, const Kind &of, int64_t n_panels_of_all, int threads) {
    Plan plan;
    const int64_t K = filled(matrix.K, (int)matrix.kind);
    plan.steps = matrix.kind == FLOAT32 ? K : K / 2;
    plan.panel_bytes = PANEL * K * (matrix.kind == FLOAT32 ? 4 : matrix.kind == BF16 ? 2 : 1);
    plan.n_panels = (matrix.N + PANEL - 1) / PANEL;
    plan.rows = of.rows * BLOCK;
    const int64_t blocks = (n + plan.rows - 1) / plan.rows;
    plan.group = n_panels_of_all * blocks / (threads * 4);
    plan.group = plan.group < 1 ? 1 : smaller(plan.group, n > of.rows ? 16 : 64);
    plan.groups = (plan.n_panels + plan.group - 1) / plan.group;
    plan.tasks = blocks * plan.groups;
    return plan;
}

// Rows [first, last) of a product, gathered in `given`, with one panel.
void with_panel(const Product &job, const Plan &plan, const Level &level, int64_t first, int64_t last, int64_t panel,
                const char *given, uint16_t *widened, float *sums) {
    const Matrix &matrix = *job.matrix;
    const Kind &of = level.kinds[matrix.kind], *by = &of;
    const void *weights = (const char *)matrix.panels + panel * plan.panel_bytes;
    if (matrix.kind == INT8 && (!of.product || last - first > of.rows)) {  // they are read more than once
        level.widened(plan.steps * PANEL * 2, (const int8_t *)weights, widened);
        weights = widened, by = &level.kinds[BF16];
    }
    const int64_t column = panel * PANEL, width = smaller(PANEL, matrix.N - column);
    float scales[PANEL] = {};
    for (int64_t i = 0; matrix.scales && i < width; i++) scales[i] = matrix.scales[column + i];
    for (int64_t row = first; row < last; row += of.rows) {
        const int64_t count = smaller(of.rows, last - row);
        by->product(count, plan.steps, given + (row - first) * plan.steps * of.given_bytes, weights, sums);
        level.finish(count * PANEL, matrix.scales ? scales : nullptr, job.activation, sums);
        for (int64_t i = 0; i < count; i++) {
            const int64_t o = (row + i) * job.y_stride + column;
            const float *from = sums + i * PANEL;
            float *to = (float *)job.y + o;
            if (job.narrow)
                level.put_bf16((uint16_t *)job.y + o, from, width);
            else if (job.add)
                for (int64_t j = 0; j < width; j++) to[j] += from[j];
            else
                __builtin_memcpy(to, from, sizeof(float) * (size_t)width);
        }
    }
}

}  // namespace

// The gathered rows, a widened panel, the sums.
int64_t products_scratch(int64_t K) { return filled(K, BF16) * (ROW_BYTES + PANEL * 2) + 32 * PANEL * 4; }

void products(int64_t n, const Product *jobs, int64_t count, int limit, int threads, char *scratch) {
    const Level &level = fastest(limit);
    Plan plans[MOST_PRODUCTS];
    int64_t n_panels = 0, tasks = 0, K = 0;
    for (int64_t i = 0; i < count; i++) n_panels += (jobs[i].matrix->N + PANEL - 1) / PANEL;
    for (int64_t i = 0; i < count; i++) {
        const Matrix &matrix = *jobs[i].matrix;
        plans[i] = plan_of(n, matrix, level.kinds[matrix.kind], n_panels, threads);
        tasks += plans[i].tasks;
        K = matrix.K > K ? matrix.K : K;
    }
    if (tasks == 0) return;
    const int64_t room = products_scratch(K);
#pragma omp parallel num_threads((int)smaller(threads, tasks))
    {
        char *given = scratch + omp_get_thread_num() * room;
        uint16_t *widened = (uint16_t *)(given + filled(K, BF16) * ROW_BYTES);
        float *sums = (float *)(widened + filled(K, BF16) * PANEL);
        int64_t gathered = -1;  // the job and the block of rows
#pragma omp for schedule(dynamic, 1)
        for (int64_t number = 0; number < tasks; number++) {
            int64_t task = number, i = 0;
            for (; task >= plans[i].tasks; i++) task -= plans[i].tasks;
            const Product &job = jobs[i];
            const Plan &plan = plans[i];
            const Kind &of = level.kinds[job.matrix->kind];
            const int64_t block = task / plan.groups, first = block * plan.rows, last = smaller(n, first + plan.rows);
            if (gathered != block * MOST_PRODUCTS + i)
                for (int64_t row = first; row < last; row += of.rows)
                    of.gather(smaller(of.rows, last - row), job.matrix->K, job.stride,
                              (const char *)job.x + row * job.stride * (job.matrix->kind == FLOAT32 ? 4 : 2),
                              given + (row - first) * plan.steps * of.given_bytes);
            gathered = block * MOST_PRODUCTS + i;
            const int64_t begin = task % plan.groups * plan.group, end = smaller(plan.n_panels, begin + plan.group);
            for (int64_t panel = begin; panel < end; panel++)
                with_panel(job, plan, level, first, last, panel, given, widened, sums);
        }
#ifdef HAS_TILES
        const Kind &wide = level.kinds[BF16];
        if (wide.rows == amx::ROWS) wide.product(0, 0, nullptr, nullptr, nullptr);  // gives the tiles back
#endif
    }
}

#define EXPORT extern "C" __attribute__((visibility("default")))

// The instruction set that products use where `limit` is allowed, numbered as that is.
EXPORT int instruction_set(int limit) { return highest(limit); }

EXPORT int64_t linear_scratch(int64_t K) { return products_scratch(K); }

// One product; the arguments as products.h has them.
EXPORT void linear(int64_t n, int64_t N, int64_t K, int kind, int limit, const void *x, int64_t stride,
                   const void *panels, const float *scales, int activation, void *y, int64_t y_stride, int narrow,
                   int add, int threads, char *scratch) {
    const Matrix matrix = {panels, scales, N, K, kind};
    const Product job = {&matrix, x, stride, activation, y, y_stride, narrow != 0, add != 0};
    products(n, &job, 1, limit, threads, scratch);
}
