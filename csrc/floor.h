// What this machine can do at most: how fast it reads memory, and how fast it multiplies and adds. For benchmarks.

// Sums of a rate's loop go here, so that no compiler can leave the loop out.
static volatile float floor_sink;

// Gigabytes a second of reading `buffer`, uint8 [n], once, on `threads` threads.
static double read_gb_s(const Tensor& buffer, int threads) {
    expect("buffer", buffer, DType::u8, {ANY});
    int64_t lines = buffer.shape[0] / 256;
    expect(lines > 0, "buffer has less than 256 bytes");
    double start = omp_get_wtime();
    parallel(lines, threads, [&](int64_t begin, int64_t end) {
        i32 sums[4] = {};
        for (int64_t i = begin; i < end; ++i)
            LUMINA_UNROLL
            for (int part = 0; part < 4; ++part) {
                const int32_t* line = buffer.as<int32_t>() + i * 64 + part * LANES;
                prefetch_far(line + 4096);  // 16 KB ahead, the fastest of what was tried
                sums[part] = sums[part] + load(line);
            }
        floor_sink = sum(to_f32((sums[0] + sums[1]) + (sums[2] + sums[3])));
    });
    return static_cast<double>(lines) * 256 / (omp_get_wtime() - start) / 1e9;
}

// Billions of rounds a second of `step(i)` on a thread each, where a round is `per_round` operations.
template <class Step>
static double rate(int threads, int64_t per_round, Step step) {
    constexpr int64_t ROUNDS = 4'000'000;
    double start = omp_get_wtime();
    parallel(threads, threads, [&](int64_t begin, int64_t end) {
        if (begin < end) floor_sink = step(ROUNDS);
    });
    return static_cast<double>(ROUNDS * per_round * threads) / (omp_get_wtime() - start) / 1e9;
}

// What a tile of a rate multiplies, see `linear`.
struct BytesTile {
    static constexpr int PRODUCTS = 4 * LANES;
    using Sums = i32;
    using Weights = Bytes;
    using Lane = int32_t;
    struct Input {
        int8_t values[4];
    };
    static Weights weights(const uint8_t* p) { return bytes(p); }
    static i32 dot(i32 sums, Weights w, const Input& x) { return lumina::LUMINA_ISA::dot(sums, w, four(x.values)); }
    static float total(i32 sums) { return sum(to_f32(sums)); }
};
struct Bf16Tile : Bf16 {
    static constexpr int PRODUCTS = 2 * LANES;
    using Sums = f32;
    using Lane = float;
    static float total(f32 sums) { return sum(sums); }
};

// Of the tile: as many sums as hide how long a multiplication takes, and few enough to stay in registers.
constexpr int RATE_ROWS = LEAF == 16 ? 8 : LEAF == 8 ? 4 : 2, RATE_HALVES = LEAF == 16 ? 2 : 1;

// Billions of multiplications and additions a second of tiles whose operands stay in registers and the first cache. No
// two products have the same operands, no two sums the same start: a compiler makes equal ones once.
template <class Tile>
static double tile_gmac_s(int threads) {
    uint8_t weights[RATE_HALVES][64] = {};
    typename Tile::Lane starts[RATE_ROWS][RATE_HALVES][LANES] = {};
    typename Tile::Input inputs[RATE_ROWS] = {};
    asm volatile("" : : "r"(weights), "r"(starts), "r"(inputs) : "memory");  // as if all were unlike
    return rate(threads, Tile::PRODUCTS * RATE_ROWS * RATE_HALVES, [&](int64_t rounds) {
        typename Tile::Sums sums[RATE_ROWS][RATE_HALVES];
        LUMINA_UNROLL
        for (int r = 0; r < RATE_ROWS; ++r)
            LUMINA_UNROLL
            for (int p = 0; p < RATE_HALVES; ++p) sums[r][p] = load(starts[r][p]);
        typename Tile::Weights w[RATE_HALVES];
        for (int p = 0; p < RATE_HALVES; ++p) w[p] = Tile::weights(weights[p]);
        for (int64_t i = 0; i < rounds; ++i) {
            asm volatile("" ::: "memory");  // inputs are read anew
            LUMINA_UNROLL
            for (int r = 0; r < RATE_ROWS; ++r)
                LUMINA_UNROLL
                for (int p = 0; p < RATE_HALVES; ++p) sums[r][p] = Tile::dot(sums[r][p], w[p], inputs[r]);
        }
        typename Tile::Sums total = sums[0][0];
        LUMINA_UNROLL
        for (int r = 0; r < RATE_ROWS; ++r)
            LUMINA_UNROLL
            for (int p = 0; p < RATE_HALVES; ++p) total = total + sums[r][p];
        return Tile::total(total);
    });
}

#if defined(LUMINA_AMX)
// Likewise of tiles of 16 x 16 sums. PRODUCTS: of each of these.
template <int PRODUCTS, class Dots>
static double tiles_gmac_s(int threads, Dots dots) {
    uint8_t tile[SIDE * 64];
    for (int i = 0; i < SIDE * 64; ++i) tile[i] = static_cast<uint8_t>(i * 181 >> 3);  // zeros are faster
    return rate(threads, 4 * SIDE * SIDE * PRODUCTS, [&](int64_t rounds) {
        TilesOn on;
        load_tile<4>(tile, 64), load_tile<5>(tile, 64), load_tile<6>(tile, 64), load_tile<7>(tile, 64);
        zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
        for (int64_t i = 0; i < rounds; ++i) dots();
        return 0.0f;
    });
}
static double int8_gmac_s(int threads) {
    return tiles_gmac_s<64>(threads, [] {
        dot_tiles_int8<0, 4, 6>(), dot_tiles_int8<1, 4, 7>(), dot_tiles_int8<2, 5, 6>(), dot_tiles_int8<3, 5, 7>();
    });
}
static double bf16_gflop_s(int threads) {
    return 2 * tiles_gmac_s<32>(threads, [] {
        dot_tiles_bf16<0, 4, 6>(), dot_tiles_bf16<1, 4, 7>(), dot_tiles_bf16<2, 5, 6>(), dot_tiles_bf16<3, 5, 7>();
    });
}
#else
// Of bytes into int32.
static double int8_gmac_s(int threads) { return tile_gmac_s<BytesTile>(threads); }

// Of bf16 into fp32; operations, a multiplication and an addition being two.
static double bf16_gflop_s(int threads) { return 2 * tile_gmac_s<Bf16Tile>(threads); }
#endif
