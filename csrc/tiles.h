// Tiles of AMX: eight registers of 16 rows of 64 bytes, and products of two of them added to a third.
//
// As assembly, since g++ before 13 has no intrinsics for them behind a pragma. Tile numbers are template arguments.

// While one lives, its thread may use tiles, all of their full size; afterwards no switch of threads has to save them.
struct TilesOn {
    TilesOn() {
        struct {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE};
        } config;
        asm volatile("ldtilecfg %0" : : "m"(config));
    }
    ~TilesOn() { asm volatile("tilerelease"); }
};

template <int N>
inline void zero_tile() {
    asm volatile("tilezero %%tmm%c0" : : "i"(N));
}
// Sanitizers see nothing of what assembly touches: they are shown the ends of each row.
inline void show_rows([[maybe_unused]] const void* p, [[maybe_unused]] int64_t stride) {
#ifdef __SANITIZE_ADDRESS__
    for (int row = 0; row < SIDE; ++row) {
        const volatile char* bytes = static_cast<const char*>(p) + row * stride;
        bytes[0], bytes[63];
    }
#endif
}
template <int N>
inline void load_tile(const void* p, int64_t stride) {
    show_rows(p, stride);
    asm volatile("tileloadd (%0,%1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(N) : "memory");
}
template <int N>
inline void store_tile(void* p, int64_t stride) {
    show_rows(p, stride);
    asm volatile("tilestored %%tmm%c2, (%0,%1)" : : "r"(p), "r"(stride), "i"(N) : "memory");
}

// Tile SUMS [rows, outputs] += tile X [rows, inputs] * tile W [inputs, outputs], where W holds four (two) inputs of an
// output side by side: signed bytes with unsigned ones into int32, or bf16 into fp32.
template <int SUMS, int X, int W>
inline void dot_tiles_int8() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(X), "i"(W));
}
template <int SUMS, int X, int W>
inline void dot_tiles_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(X), "i"(W));
}
