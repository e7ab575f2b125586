// The functions of the widest lanes that this processor has and that divide N, of the LEVEL that was included last.
// No include guard: each file has a `Level`, and a `level` in every namespace of levels.h.

const Level &level_for(int64_t N) {
#ifdef X86_LEVELS
    if (N % 16 == 0 && has_avx512()) return avx512::level;
    if (N % 8 == 0 && has_avx2()) return avx2::level;
#endif
    return N % 4 == 0 ? baseline::level : scalar::level;
}
