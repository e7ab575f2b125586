// Vectors of LANES floats, for one instruction set.  Included by the `*_lanes.h` files; see levels.h.  No include guard.

namespace NAMESPACE {

#if LANES == 1
typedef float lanes;
#else
typedef float lanes __attribute__((vector_size(4 * LANES)));
#endif
enum { W = LANES };

static inline lanes load(const float *p) {
    lanes x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}
static inline void store(float *p, lanes x) { __builtin_memcpy(p, &x, sizeof x); }

static inline float sum(lanes x) {
    float p[W], s = 0;
    store(p, x);
    for (int i = 0; i < W; i++) s += p[i];
    return s;
}

// Rows and columns change places: W rows of W, in steps that swap blocks of H.
template <int H>
static inline void transpose_square([[maybe_unused]] lanes *row) {
#if LANES > 1 && defined(__clang__)  // which has no shuffles by a vector of indices: all steps at once
    float from[W][W], to[W][W];
    __builtin_memcpy(from, row, sizeof from);
    for (int i = 0; i < W; i++)
        for (int j = 0; j < W; j++) to[j][i] = from[i][j];
    __builtin_memcpy(row, to, sizeof to);
#elif LANES > 1
    typedef int32_t indices __attribute__((vector_size(4 * LANES)));
    indices upper, lower;
    for (int i = 0; i < W; i++) {
        upper[i] = i & H ? W + i - H : i;
        lower[i] = i & H ? W + i : i + H;
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; i++)
        if (!(i & H)) {
            const lanes a = row[i], b = row[i + H];
            row[i] = __builtin_shuffle(a, b, upper);
            row[i + H] = __builtin_shuffle(a, b, lower);
        }
    if constexpr (H > 1) transpose_square<H / 2>(row);
#endif
}

// The larger of two in each lane; a NaN in either stays.
static inline lanes larger(lanes x, lanes y) {
    float a[W], b[W];
    store(a, x);
    store(b, y);
    for (int i = 0; i < W; i++) a[i] = b[i] <= a[i] ? a[i] : b[i] > a[i] ? b[i] : a[i] + b[i];
    return load(a);
}

// exp(x) for x from -87 to 87, within 2 ulp; beyond them exp of the nearer one; NaN stays NaN.
static inline float exp_within_87(float x) {
    float z = x < -87.0f ? -87.0f : x;
    z = z > 87.0f ? 87.0f : z;
    float shifted = z * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer nearest to z / ln 2 in the low bits
    float whole = shifted - 12582912.0f;
    float f = z - whole * 0.693359375f + whole * 2.12194440e-4f;  // Cephes expf: ln 2 in two parts
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    int32_t bits;
    __builtin_memcpy(&bits, &shifted, 4);
    bits = (bits - 0x4B400000 + 127) << 23;
    float power;
    __builtin_memcpy(&power, &bits, 4);
    return p * power;
}

// exp(x) for x <= 0; below the smallest normal number 0.
static inline float exp_nonpositive(float x) { return x < -87.0f ? 0.0f : exp_within_87(x); }

[[maybe_unused]] static void exp_nonpositive(const float *x, float *y, int64_t count) {
#pragma GCC ivdep
    for (int64_t i = 0; i < count; i++) y[i] = exp_nonpositive(x[i]);
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exp_within_87(-x)); }

static inline float tanh_(float x) {
    const float e = exp_nonpositive(-2.0f * (x < 0 ? -x : x)), y = (1.0f - e) / (1.0f + e);
    return x < 0 ? -y : y;
}

// To the nearest bf16, ties to even; NaN stays NaN.
static inline uint16_t bf16(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return (uint16_t)(x == x ? rounded : bits >> 16 | 0x40);
}

// Where a result goes: float32, or bf16 for the product that reads it next.
static inline void put(float *to, lanes x) { store(to, x); }
static inline void put(uint16_t *to, lanes x) {
#if LANES == 1
    *to = bf16(x);
#elif defined(DOT_BF16)
    const __m256bh narrow = _mm512_cvtneps_pbh((__m512)x);
    __builtin_memcpy(to, &narrow, sizeof narrow);
#else
    typedef uint32_t words __attribute__((vector_size(4 * LANES)));
    typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
    const words bits = (words)x, is_number = (words)(x == x);
    const words rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16, nan = bits >> 16 | 0x40;
    const halves narrow = __builtin_convertvector((rounded & is_number) | (nan & ~is_number), halves);
    __builtin_memcpy(to, &narrow, sizeof narrow);
#endif
}

}  // namespace NAMESPACE
