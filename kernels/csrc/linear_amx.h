// Products with AMX tiles: 32 rows of input at once, 2 x 2 tiles of 16 x 16 sums.  Included by linear.cpp.
//
// A tile of the input is [16 rows][32 k], of a panel [16 pairs of k][16 rows][2].  Each tile of sums adds up 32 k apart
// and then adds that to what it holds, so the last bits are not those of the other instruction sets.

#include <unistd.h>
#include <cpuid.h>
#include <sys/syscall.h>

namespace amx {

constexpr int ROWS = 32, TILE = 16, SUMS = 0, GIVEN = 4, WEIGHTS = 6;  // the numbers of tile registers: 4 sums, 2 and 2

struct alignas(64) Shapes {  // what ldtilecfg reads
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// For `rows` rows of input, of which the first 16 are in the upper tiles.
inline Shapes shapes(int64_t rows) {
    Shapes made;
    const uint8_t of[2] = {(uint8_t)(rows < TILE ? rows : TILE), (uint8_t)(rows > TILE ? rows - TILE : 1)};
    for (int i = 0; i < 8; i++) {
        made.row_bytes[i] = 64;
        made.rows[i] = i < GIVEN ? of[i / 2] : i < WEIGHTS ? of[i - GIVEN] : TILE;
    }
    return made;
}

// The instructions.  In assembly: GCC 12's intrinsics do not say that they read and write memory.
struct Hardware {
    static void configure(const Shapes &to) { __asm__ volatile("ldtilecfg %0" ::"m"(to) : "memory"); }
    template <int T>
    static void zero() { __asm__ volatile("tilezero %%tmm%c0" ::"i"(T)); }
    template <int T>
    static void load(const void *from, int64_t stride) {
        __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
    }
    template <int T>
    static void store(void *to, int64_t stride) {
        __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
    }
    template <int SUM, int A, int B>
    static void product() { __asm__ volatile("tdpbf16ps %%tmm%c0, %%tmm%c1, %%tmm%c2" ::"i"(B), "i"(A), "i"(SUM)); }
    static void release() { __asm__ volatile("tilerelease"); }
};

// The same in software, from Intel's manual: for tests on processors without AMX.
struct Software {
    struct Tiles {
        Shapes shapes;
        char bytes[8][TILE][64];
    };
    static Tiles &tiles() {
        static thread_local Tiles of;
        return of;
    }
    static void configure(const Shapes &to) { tiles().shapes = to; }
    template <int T>
    static void zero() { __builtin_memset(tiles().bytes[T], 0, sizeof tiles().bytes[T]); }
    template <int T>
    static void load(const void *from, int64_t stride) {
        for (int i = 0; i < tiles().shapes.rows[T]; i++)
            __builtin_memcpy(tiles().bytes[T][i], (const char *)from + i * stride, 64);
    }
    template <int T>
    static void store(void *to, int64_t stride) {
        for (int i = 0; i < tiles().shapes.rows[T]; i++) __builtin_memcpy((char *)to + i * stride, tiles().bytes[T][i], 64);
    }
    static float number(const char *row, int i) {
        uint16_t half;
        __builtin_memcpy(&half, row + 2 * i, 2);
        const uint32_t bits = (uint32_t)half << 16;
        float value;
        __builtin_memcpy(&value, &bits, 4);
        return value;
    }
    template <int SUM, int A, int B>
    static void product() {
        Tiles &of = tiles();
        for (int m = 0; m < of.shapes.rows[SUM]; m++)
            for (int n = 0; n < TILE; n++) {
                float even = 0, odd = 0, sum;
                for (int k = 0; k < of.shapes.rows[B]; k++) {
                    even += number(of.bytes[A][m], 2 * k) * number(of.bytes[B][k], 2 * n);
                    odd += number(of.bytes[A][m], 2 * k + 1) * number(of.bytes[B][k], 2 * n + 1);
                }
                __builtin_memcpy(&sum, of.bytes[SUM][m] + 4 * n, 4);
                sum += even + odd;
                __builtin_memcpy(of.bytes[SUM][m] + 4 * n, &sum, 4);
            }
    }
    static void release() { tiles().shapes = Shapes(); }
};

// M rows of bf16 → [K / 32][M][32], the last filled up with zeros.
inline void gather(int64_t M, int64_t K, int64_t stride, const void *x, void *to) {
    for (int64_t k = 0; k < K; k += 2 * TILE)
        for (int64_t m = 0; m < M; m++) {
            uint16_t *row = (uint16_t *)to + k * M + m * 2 * TILE;
            const int64_t count = K - k < 2 * TILE ? K - k : 2 * TILE;
            __builtin_memcpy(row, (const uint16_t *)x + m * stride + k, 2 * (size_t)count);
            __builtin_memset(row + count, 0, 2 * (size_t)(2 * TILE - count));
        }
}

template <class Tile>
void product(int64_t M, int64_t steps, const void *given, const void *panel, float *sums) {
    static thread_local int64_t configured;  // 0: not at all
    if (!given) {
        Tile::release();
        configured = 0;
        return;
    }
    if (configured != M) Tile::configure(shapes(M));
    configured = M;
    const bool two = M > TILE;
    Tile::template zero<SUMS>();
    Tile::template zero<SUMS + 1>();
    Tile::template zero<SUMS + 2>();
    Tile::template zero<SUMS + 3>();
    for (int64_t s = 0; s < steps; s += TILE) {
        const char *x = (const char *)given + s * M * 4, *w = (const char *)panel + s * 128;
        Tile::template load<GIVEN>(x, 64);
        Tile::template load<WEIGHTS>(w, 128);
        Tile::template load<WEIGHTS + 1>(w + 64, 128);
        Tile::template product<SUMS, GIVEN, WEIGHTS>();
        Tile::template product<SUMS + 1, GIVEN, WEIGHTS + 1>();
        if (two) {
            Tile::template load<GIVEN + 1>(x + 64 * TILE, 64);
            Tile::template product<SUMS + 2, GIVEN + 1, WEIGHTS>();
            Tile::template product<SUMS + 3, GIVEN + 1, WEIGHTS + 1>();
        }
    }
    Tile::template store<SUMS>(sums, 128);
    Tile::template store<SUMS + 1>(sums + TILE, 128);
    if (two) {
        Tile::template store<SUMS + 2>(sums + TILE * 32, 128);
        Tile::template store<SUMS + 3>(sums + TILE * 33, 128);
    }
}

// Whether the processor has AMX for bf16 and the system lets this process use it (Linux 5.16 and later must be asked).
inline bool is_permitted() {
    unsigned a, b, c, d;
    const bool has = __get_cpuid_count(7, 0, &a, &b, &c, &d) && d >> 22 & 1 && d >> 24 & 1;
    return has && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

}  // namespace amx
