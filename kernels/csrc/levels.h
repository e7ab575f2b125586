// Includes the file LEVEL once for every instruction set, each in a namespace of its own with LANES floats to a vector;
// the fastest that a processor has is then chosen at run time, in one binary.  By pragma and not by target_clones: GCC
// lowers vector types before it clones.  No include guard.

#define LANES 1
#define NAMESPACE scalar
#include LEVEL
#undef LANES
#undef NAMESPACE

#define LANES 4
#define NAMESPACE baseline
#include LEVEL
#undef LANES
#undef NAMESPACE

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#ifndef X86_LEVELS
#define X86_LEVELS
static inline bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
static inline bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define LANES 8
#define NAMESPACE avx2
#include LEVEL
#undef LANES
#undef NAMESPACE
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")
#define LANES 16
#define NAMESPACE avx512
#include LEVEL
#undef LANES
#undef NAMESPACE
#pragma GCC pop_options
#endif
