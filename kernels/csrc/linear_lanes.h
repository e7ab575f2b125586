// Products of a few rows with one panel of weights.  Included once per instruction set, see levels.h; no include guard.
//
// A panel is 32 rows of the matrix, as linear.cpp has them.  A product has ROWS rows of input at most, and for each of
// them 32 sums, which stay in registers while the panel passes by once.  Every sum runs over k in order, alone: it
// depends neither on the other rows, nor on threads.

#include "lanes.h"

namespace NAMESPACE {

// What a kind of weight is multiplied with.  A step is one k (float32) or a pair of them (16 and 8 bits): Weight[32][K]
// of the panel, and Given of each row of input; there are multiples of 16 of them.  A step is made in HALVES, so that
// operands take few registers.
struct Float32 {
    typedef float Weight;
    typedef float Given;
    typedef lanes Operand;
    enum { K = 1, HALVES = 1 };
    static inline Operand operand(const float *w, int) { return load(w); }
    static inline void add(lanes &sum, const Operand &w, const float &x, int) { sum += w * x; }
};

#ifdef DOT_BF16
struct Pair {
    typedef uint32_t Given;
    typedef __m512bh Operand;
    enum { K = 2, HALVES = 1 };
    static inline void add(lanes &sum, const Operand &w, const uint32_t &x, int) {
        sum = (lanes)_mm512_dpbf16_ps((__m512)sum, w, (__m512bh)_mm512_set1_epi32((int)x));
    }
};
struct Bf16 : Pair {
    typedef uint16_t Weight;
    static inline Operand operand(const uint16_t *w, int) { return (__m512bh)_mm512_loadu_si512(w); }
};
struct Int8 : Pair {
    typedef int8_t Weight;
    static inline __m512 floats(const int8_t *w) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)w)));
    }
    static inline Operand operand(const int8_t *w, int) {
        return _mm512_cvtne2ps_pbh(floats(w + 16), floats(w));  // exact
    }
};
#else
#if LANES == 1
typedef uint32_t words;
#else
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef int16_t shorts __attribute__((vector_size(2 * LANES)));
#endif
struct Pair {
    struct Given {
        float of_half[2];  // even and odd k
    };
    typedef lanes Operand;
    enum { K = 2, HALVES = 2 };
    static inline void add(lanes &sum, const Operand &w, const Given &x, int half) { sum += w * x.of_half[half]; }
};
struct Bf16 : Pair {
    typedef uint16_t Weight;
    static inline Operand operand(const uint16_t *w, int half) {
        words pairs;
        __builtin_memcpy(&pairs, w, sizeof pairs);
        const words bits = half ? pairs & 0xFFFF0000 : pairs << 16;
        Operand made;
        __builtin_memcpy(&made, &bits, sizeof made);
        return made;
    }
};
struct Int8 : Pair {
    typedef int8_t Weight;
    static inline Operand operand(const int8_t *w, int half) {
#if LANES == 1
        return (float)w[half];
#else
        shorts pairs;
        __builtin_memcpy(&pairs, w, sizeof pairs);
        return __builtin_convertvector(half ? pairs >> 8 : (pairs << 8) >> 8, lanes);
#endif
    }
};
#endif

enum { STEPS = 16, ROWS = W == 16 ? 12 : W == 1 ? 2 : 6, COLUMNS = W == 1 ? 4 : 2 };  // what the registers hold

static inline void give(float &to, const float *x) { to = *x; }
#ifdef DOT_BF16
static inline void give(uint32_t &to, const uint16_t *x) { __builtin_memcpy(&to, x, 4); }
#else
static inline void give(Pair::Given &to, const uint16_t *x) {
    const uint32_t even = (uint32_t)x[0] << 16, odd = (uint32_t)x[1] << 16;
    __builtin_memcpy(&to.of_half[0], &even, 4);
    __builtin_memcpy(&to.of_half[1], &odd, 4);
}
#endif

// M rows of x (float32, or bf16 for Pair), `stride` elements from each other → [steps / 16][M][16], as `product` wants
// them; the last steps are filled up with zeros.
template <class Kind>
static void gather(int64_t M, int64_t K, int64_t stride, const void *x, void *to) {
    typedef std::conditional_t<Kind::K == 1, float, uint16_t> Element;
    enum { COUNT = STEPS * Kind::K };
    typename Kind::Given *given = (typename Kind::Given *)to;
    for (int64_t k = 0; k < K; k += COUNT)
        for (int64_t m = 0; m < M; m++, given += STEPS) {
            const Element *from = (const Element *)x + m * stride + k;
            Element last[COUNT] = {};
            if (K - k < COUNT) from = (const Element *)__builtin_memcpy(last, from, sizeof(Element) * (size_t)(K - k));
            for (int s = 0; s < STEPS; s++) give(given[s], from + s * Kind::K);
        }
}

// sums [M][32] = given · panel
template <class Kind, int M>
static void product_of(int64_t steps, const void *given, const void *panel, float *sums) {
    for (int c = 0; c < PANEL; c += COLUMNS * W) {
        const auto *x = (const typename Kind::Given *)given;
        const auto *w = (const typename Kind::Weight *)panel + c * Kind::K;
        lanes sum[M][COLUMNS] = {};
        for (int64_t block = 0; block < steps; block += STEPS, x += M * STEPS)
            for (int s = 0; s < STEPS; s++, w += PANEL * Kind::K) {
#pragma GCC unroll 2
                for (int half = 0; half < Kind::HALVES; half++) {
                    typename Kind::Operand operand[COLUMNS];
                    for (int i = 0; i < COLUMNS; i++) operand[i] = Kind::operand(w + i * W * Kind::K, half);
#pragma GCC unroll 12
                    for (int m = 0; m < M; m++)
                        for (int i = 0; i < COLUMNS; i++) Kind::add(sum[m][i], operand[i], x[m * STEPS + s], half);
                }
            }
        for (int m = 0; m < M; m++)
            for (int i = 0; i < COLUMNS; i++) store(sums + m * PANEL + c + i * W, sum[m][i]);
    }
}

template <class Kind, int M = ROWS>
static void product(int64_t m, int64_t steps, const void *given, const void *panel, float *sums) {
    if constexpr (M > 1)
        if (m < M) return product<Kind, M - 1>(m, steps, given, panel, sums);
    product_of<Kind, M>(steps, given, panel, sums);
}

// An int8 panel as the bf16 panel of the same numbers, which all are bf16 numbers.
static void widened(int64_t count, const int8_t *panel, uint16_t *to) {
    for (int64_t i = 0; i < count; i++) to[i] = bf16((float)panel[i]);
}

static void finish(int64_t count, const float *scales, int64_t activation, float *sums) {
    if (scales)
        for (int64_t i = 0; i < count; i++) sums[i] *= scales[i % PANEL];
    switch (activation) {
        case TANH:
#pragma GCC ivdep
            for (int64_t i = 0; i < count; i++) sums[i] = tanh_(sums[i]);
            break;
        case SIGMOID:
#pragma GCC ivdep
            for (int64_t i = 0; i < count; i++) sums[i] = sigmoid(sums[i]);
            break;
        case RELU2:
#pragma GCC ivdep
            for (int64_t i = 0; i < count; i++) sums[i] = sums[i] < 0 ? 0 : sums[i] * sums[i];
            break;
        case SILU:
#pragma GCC ivdep
            for (int64_t i = 0; i < count; i++) sums[i] *= sigmoid(sums[i]);
            break;
        default:;
    }
}

static void put_bf16(uint16_t *to, const float *from, int64_t count) {
    int64_t i = 0;
    for (; i + W <= count; i += W) put(to + i, load(from + i));
    for (; i < count; i++) to[i] = bf16(from[i]);
}

static const Level level = {
    {{ROWS, sizeof(Float32::Given), gather<Float32>, product<Float32>},
     {ROWS, sizeof(Pair::Given), gather<Bf16>, product<Bf16>},
     {ROWS, sizeof(Pair::Given), gather<Int8>, product<Int8>}},
    widened,
    finish,
    put_bf16,
};

}  // namespace NAMESPACE
