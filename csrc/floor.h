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
            for (int part = 0; part < 4; ++part)
                sums[part] = sums[part] + load(buffer.as<int32_t>() + i * 64 + part * LANES);
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

constexpr int SUMS = LEAF == 16 ? 12 : 5;  // enough to hide how long a multiplication takes, few enough for registers

// Billions of multiplications and additions a second, of bytes into int32.
static double int8_gmac_s(int threads) {
    uint8_t w[64] = {1, 2, 3};
    int8_t x[4] = {1, 2, 3, 4};
    return rate(threads, SUMS * 64, [&](int64_t rounds) {
        i32 sums[SUMS] = {};
        Bytes weights = bytes(w);
        for (int64_t i = 0; i < rounds; ++i) {
            Four input = four(x);
            asm volatile("" ::: "memory");
            LUMINA_UNROLL
            for (int j = 0; j < SUMS; ++j) sums[j] = dot(sums[j], weights, input);
        }
        i32 total = sums[0];
        LUMINA_UNROLL
        for (int j = 1; j < SUMS; ++j) total = total + sums[j];
        return sum(to_f32(total));
    });
}

// Billions of operations a second, a multiplication and an addition being two, of bf16 into fp32.
static double bf16_gflop_s(int threads) {
    uint8_t w[64] = {0, 0x3F};
    Bf16::Input x = {};
    return rate(threads, SUMS * 64, [&](int64_t rounds) {
        f32 sums[SUMS] = {};
        auto weights = Bf16::weights(w);
        for (int64_t i = 0; i < rounds; ++i) {
            asm volatile("" ::: "memory");
            LUMINA_UNROLL
            for (int j = 0; j < SUMS; ++j) sums[j] = Bf16::dot(sums[j], weights, x);
        }
        f32 total = sums[0];
        LUMINA_UNROLL
        for (int j = 1; j < SUMS; ++j) total = total + sums[j];
        return sum(total);
    });
}
