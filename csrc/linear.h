// Products of few rows with a weight matrix: fp32, bf16, or int8 and int4 weights with int8 activations.
//
// Weights lie in panels of 16 outputs. A panel is a run of 64-byte vectors, one for each STEP inputs, in the order in
// which they are read; lane i of a vector belongs to output i, so that no sum ever crosses lanes:
//
//     fp32  1 input     16 values
//     bf16  2 inputs    16 pairs
//     int8  4 inputs    16 fours, plus 128
//     int4  8 inputs    16 fours of bytes: the first four inputs in the low bits, the others in the high ones, plus 8
//
// Quantised weights have a bf16 scale for each 64 inputs of an output; activations are quantised likewise, row by row,
// and the products are summed as integers within such a group.
//
// A task is two panels for all rows, so that a weight is read from memory once. Every output is summed over
// its inputs in one order, chunk by chunk, whatever the other rows: results are the same bits in any batch.

constexpr int GROUP = 64;   // inputs that share a scale
constexpr int CHUNK = 128;  // vectors of a panel that are summed apart
constexpr int BAND = 64;    // rows that go through a panel together
constexpr int PANELS = 2;   // that a task takes; weights come in so many
constexpr int WIDTH = PANELS * LANES;
constexpr int AHEAD = 2048;  // bytes between what is asked of memory and what is multiplied

// Rows of a tile at most, and rows up to which a tile is two panels wide: as many sums as there are registers for.
#if defined(LUMINA_AVX512)
constexpr int TILE_ROWS = 12, WIDE_ROWS = 12;  // 24 of 32 registers are sums
#elif defined(LUMINA_AVX2)
constexpr int TILE_ROWS = 6, WIDE_ROWS = 3;  // 12 of 16, two a panel
#else
constexpr int TILE_ROWS = 2, WIDE_ROWS = 1;
#endif

typedef int16_t leaf_i16 __attribute__((vector_size(4 * LEAF)));

// Formats. Weights: what one vector holds, taken apart.  Input: how the activations of a step are kept.

struct Fp32 {
    static constexpr int STEP = 1;
    using Input = float;
    using Weights = f32;
    static Weights weights(const uint8_t* p) { return load(reinterpret_cast<const float*>(p)); }
    static f32 dot(f32 sums, Weights w, const Input& x) { return fma(w, all(x), sums); }
    static void keep(const float* row, int64_t inputs, Input* out) { std::copy(row, row + inputs, out); }
};

#if defined(LUMINA_AVX512)
struct Bf16 {
    static constexpr int STEP = 2;
    using Input = uint32_t;
    using Weights = __m512bh;
    static Weights weights(const uint8_t* p) { return reinterpret_cast<Weights>(_mm512_loadu_si512(p)); }
    static f32 dot(f32 sums, Weights w, const Input& x) {
        return _mm512_dpbf16_ps(sums, w, reinterpret_cast<Weights>(_mm512_set1_epi32(static_cast<int>(x))));
    }
    static void keep(const bf16* row, int64_t inputs, Input* out) {
        out[(inputs - 1) / 2] = 0;
        std::memcpy(out, row, inputs * sizeof *row);
    }
};
#else
inline leaf_f32 low_half(leaf_u32 pair) { return reinterpret_cast<leaf_f32>(pair << 16); }
inline leaf_f32 high_half(leaf_u32 pair) { return reinterpret_cast<leaf_f32>(pair & 0xFFFF0000u); }

struct Bf16 {
    static constexpr int STEP = 2;
    struct Input {
        float even, odd;
    };
    struct Weights {
        f32 even, odd;
    };
    static void split(const uint8_t* p, leaf_f32& even, leaf_f32& odd) {
        leaf_u32 pair;
        std::memcpy(&pair, p, sizeof pair);
        even = low_half(pair), odd = high_half(pair);
    }
    template <class T>
    static void split(const uint8_t* p, Pair<T>& even, Pair<T>& odd) {
        split(p, even.lo, odd.lo);
        split(p + 4 * Lanes<T>::N, even.hi, odd.hi);
    }
    static Weights weights(const uint8_t* p) {
        Weights w;
        split(p, w.even, w.odd);
        return w;
    }
    static f32 dot(f32 sums, Weights w, const Input& x) { return fma(w.odd, all(x.odd), fma(w.even, all(x.even), sums)); }
    static void keep(const bf16* row, int64_t inputs, Input* out) {
        float* values = reinterpret_cast<float*>(out);
        if (inputs % 2) values[inputs] = 0;
        for (int64_t i = 0; i < inputs; i += LANES) store(values + i, load(row + i, inputs - i), inputs - i);
    }
};
#endif

// Sixteen fours of unsigned bytes, ready to be multiplied with four signed ones; exact in every set.
#if defined(LUMINA_AVX512)
using Bytes = __m512i;
using Four = __m512i;
inline Bytes bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Four four(const int8_t* x) {
    int32_t word;
    std::memcpy(&word, x, sizeof word);
    return _mm512_set1_epi32(word);
}
inline i32 dot(i32 sums, Bytes w, Four x) {
    return reinterpret_cast<i32>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), w, x));
}
inline Bytes low_bits(Bytes w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
inline Bytes high_bits(Bytes w) { return low_bits(_mm512_srli_epi16(w, 4)); }
#else
// As pairs of 16 bits: the even bytes of each four, and the odd ones. No product of bytes can overflow there.
struct LeafBytes {
    leaf_i16 even, odd;
};
using Bytes = Wide<LeafBytes, LANES>::type;
struct Four {
    leaf_i16 even, odd;
};
inline LeafBytes apart(leaf_u32 word) {
    return {reinterpret_cast<leaf_i16>(word & 0x00FF00FFu), reinterpret_cast<leaf_i16>((word >> 8) & 0x00FF00FFu)};
}
inline void bytes_leaf(LeafBytes& v, const uint8_t* p) {
    leaf_u32 word;
    std::memcpy(&word, p, sizeof word);
    v = apart(word);
}
inline leaf_i32 pairs(leaf_i32 sums, leaf_i16 w, leaf_i16 x) {  // sums + w[2 i] * x[2 i] + w[2 i + 1] * x[2 i + 1]
#if defined(LUMINA_AVX2)
    return sums + reinterpret_cast<leaf_i32>(_mm256_madd_epi16(reinterpret_cast<__m256i>(w), reinterpret_cast<__m256i>(x)));
#elif defined(__SSE2__)
    return sums + reinterpret_cast<leaf_i32>(_mm_madd_epi16(reinterpret_cast<__m128i>(w), reinterpret_cast<__m128i>(x)));
#else
    leaf_i32 a = reinterpret_cast<leaf_i32>(w), b = reinterpret_cast<leaf_i32>(x);
    return sums + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}
inline Four four(const int8_t* x) {
    int32_t word;
    std::memcpy(&word, x, sizeof word);
    leaf_i16 all = reinterpret_cast<leaf_i16>(leaf_i32{} + word);
    return {all << 8 >> 8, all >> 8};
}
inline leaf_i32 dot(leaf_i32 sums, LeafBytes w, Four x) { return pairs(pairs(sums, w.even, x.even), w.odd, x.odd); }
inline LeafBytes low_bits(LeafBytes w) { return {w.even & 15, w.odd & 15}; }
inline LeafBytes high_bits(LeafBytes w) { return {w.even >> 4, w.odd >> 4}; }

template <class T>
inline void bytes_leaf(Pair<T>& v, const uint8_t* p) {
    bytes_leaf(v.lo, p);
    bytes_leaf(v.hi, p + 4 * Lanes<T>::N);
}
inline Bytes bytes(const uint8_t* p) {
    Bytes v;
    bytes_leaf(v, p);
    return v;
}
template <class S, class T>
inline Pair<S> dot(Pair<S> sums, Pair<T> w, Four x) {
    return {dot(sums.lo, w.lo, x), dot(sums.hi, w.hi, x)};
}
template <class T>
inline Pair<T> low_bits(Pair<T> w) {
    return {low_bits(w.lo), low_bits(w.hi)};
}
template <class T>
inline Pair<T> high_bits(Pair<T> w) {
    return {high_bits(w.lo), high_bits(w.hi)};
}
#endif

// Integer formats. Sums: of RUN vectors, before they are added up as int32.

struct Int8 {
    static constexpr int STEP = 4, ZERO = 128, RUN = GROUP / STEP;
    using Weights = Bytes;
    using Sums = i32;
    static i32 total(Sums sums) { return sums; }
    static Weights weights(const uint8_t* p) { return bytes(p); }
    static i32 dot(i32 sums, Weights w, const int8_t* x) { return lumina::LUMINA_ISA::dot(sums, w, four(x)); }
};

#if defined(LUMINA_AVX2)
// Four bits times eight are so small that 16 products fit into 16 bits: no taking apart, and half the additions.
struct Int4 {
    static constexpr int STEP = 8, ZERO = 8, RUN = 4;  // 4 vectors * 4 products * 15 * 127 < 2^15
    struct Weights {
        __m256i first[2], second[2];
    };
    struct Sums {
        __m256i halves[2];
    };
    static Weights weights(const uint8_t* p) {
        Weights w;
        for (int i = 0; i < 2; ++i) {
            __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + i), low = _mm256_set1_epi8(15);
            w.first[i] = _mm256_and_si256(both, low);
            w.second[i] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
        }
        return w;
    }
    static Sums dot(Sums sums, const Weights& w, const int8_t* x) {
        int32_t words[2];
        std::memcpy(words, x, sizeof words);
        __m256i first = _mm256_set1_epi32(words[0]), second = _mm256_set1_epi32(words[1]);
        for (int i = 0; i < 2; ++i) {
            __m256i a = _mm256_maddubs_epi16(w.first[i], first), b = _mm256_maddubs_epi16(w.second[i], second);
            sums.halves[i] = _mm256_add_epi16(sums.halves[i], _mm256_add_epi16(a, b));
        }
        return sums;
    }
    static i32 total(const Sums& sums) {
        __m256i ones = _mm256_set1_epi16(1);
        return {reinterpret_cast<leaf_i32>(_mm256_madd_epi16(sums.halves[0], ones)),
                reinterpret_cast<leaf_i32>(_mm256_madd_epi16(sums.halves[1], ones))};
    }
};
#else
struct Int4 {
    static constexpr int STEP = 8, ZERO = 8, RUN = GROUP / STEP;
    struct Weights {
        Bytes first, second;
    };
    using Sums = i32;
    static Weights weights(const uint8_t* p) {
        Bytes both = bytes(p);
        return {low_bits(both), high_bits(both)};
    }
    static i32 dot(i32 sums, Weights w, const int8_t* x) {
        sums = lumina::LUMINA_ISA::dot(sums, w.first, four(x));
        return lumina::LUMINA_ISA::dot(sums, w.second, four(x + 4));
    }
    static i32 total(Sums sums) { return sums; }
};
#endif

// A matrix of weights, and what a call multiplies it with.

struct Panels {
    const uint8_t* data;
    const bf16* scales;  // [panels, groups, 16]
    int64_t vectors;     // of a panel
    const uint8_t* at(int64_t panel, int64_t vector) const { return data + (panel * vectors + vector) * 64; }
};

// Activations as a float format reads them.
template <class Format>
struct FloatInput {
    std::vector<typename Format::Input> values;
    int64_t vectors;

    template <class T>
    void read(const T* x, int64_t row, int64_t inputs) {
        Format::keep(x + row * inputs, inputs, &values[row * vectors]);
    }

    // Add to sums [ROWS, WIDTH] the products of rows with the vectors `begin` to `end` of WIDE panels.
    template <int ROWS, int WIDE>
    void tile(const Panels& w, int64_t panel, int64_t row, int64_t begin, int64_t end, float* sums) const {
        f32 parts[ROWS][WIDE] = {};
        const typename Format::Input* x = &values[row * vectors];
        for (int64_t s = begin; s < end; ++s)
            LUMINA_UNROLL
            for (int p = 0; p < WIDE; ++p) {
                const uint8_t* vector = w.at(panel + p, s);
                __builtin_prefetch(vector + AHEAD);
                auto weights = Format::weights(vector);
                LUMINA_UNROLL
                for (int r = 0; r < ROWS; ++r) parts[r][p] = Format::dot(parts[r][p], weights, x[r * vectors + s]);
            }
        LUMINA_UNROLL
        for (int r = 0; r < ROWS; ++r)
            LUMINA_UNROLL
            for (int p = 0; p < WIDE; ++p) {
                float* sum = sums + r * WIDTH + p * LANES;
                store(sum, load(sum) + parts[r][p]);
            }
    }
};

// Activations in int8, a scale for each group of a row.
template <class Format>
struct QuantizedInput {
    std::vector<int8_t> values;
    std::vector<float> scales;
    std::vector<int32_t> offsets;  // what the zero points of the weights add to the products, with its sign turned
    int64_t inputs;

    template <class T>
    void read(const T* x, int64_t row, int64_t) {
        for (int64_t g = 0; g < inputs / GROUP; ++g) {
            const T* from = x + row * inputs + g * GROUP;
            int8_t* to = &values[row * inputs + g * GROUP];
            f32 top = all(0), check = all(0);
            for (int i = 0; i < GROUP; i += LANES) {
                f32 v = load(from + i);
                top = max(abs(v), top);
                check = fma(v, all(0), check);  // no number where v is infinite or none
            }
            float scale = largest(top) / 127;
            f32 inverse = all(scale > 0 ? 1 / scale : 0);
            int32_t total = 0;
            for (int i = 0; i < GROUP; i += LANES) {
                int32_t whole[LANES];
                store(whole, to_i32(load(from + i) * inverse));
                for (int j = 0; j < LANES; ++j) total += to[i + j] = static_cast<int8_t>(whole[j]);
            }
            scales[row * (inputs / GROUP) + g] = scale + sum(check);
            offsets[row * (inputs / GROUP) + g] = -Format::ZERO * total;
        }
    }

    template <int ROWS, int WIDE>
    void tile(const Panels& w, int64_t panel, int64_t row, int64_t begin, int64_t end, float* sums) const {
        constexpr int VECTORS = GROUP / Format::STEP;
        int64_t groups = inputs / GROUP;
        for (int64_t g = begin / VECTORS; g < end / VECTORS; ++g) {
            i32 parts[ROWS][WIDE] = {};
            const int8_t* x = &values[row * inputs + g * GROUP];
            for (int run = 0; run < VECTORS; run += Format::RUN) {
                typename Format::Sums runs[ROWS][WIDE] = {};
                for (int s = run; s < run + Format::RUN; ++s)
                    LUMINA_UNROLL
                    for (int p = 0; p < WIDE; ++p) {
                        const uint8_t* vector = w.at(panel + p, g * VECTORS + s);
                        __builtin_prefetch(vector + AHEAD);
                        auto weights = Format::weights(vector);
                        LUMINA_UNROLL
                        for (int r = 0; r < ROWS; ++r)
                            runs[r][p] = Format::dot(runs[r][p], weights, x + r * inputs + s * Format::STEP);
                    }
                LUMINA_UNROLL
                for (int r = 0; r < ROWS; ++r)
                    LUMINA_UNROLL
                    for (int p = 0; p < WIDE; ++p) parts[r][p] = parts[r][p] + Format::total(runs[r][p]);
            }
            LUMINA_UNROLL
            for (int p = 0; p < WIDE; ++p) {
                f32 scale = load(w.scales + ((panel + p) * groups + g) * LANES);
                LUMINA_UNROLL
                for (int r = 0; r < ROWS; ++r) {
                    float* sum = sums + r * WIDTH + p * LANES;
                    int64_t group = (row + r) * groups + g;
                    f32 whole = to_f32(parts[r][p] + all_i32(offsets[group]));
                    store(sum, fma(whole, scale * all(scales[group]), load(sum)));
                }
            }
        }
    }
};

// Add the products of `rows` rows, at most TILE_ROWS, with two panels.
template <int ROWS = TILE_ROWS, class Input>
static void tile_rows(const Input& x, int64_t rows, const Panels& w, int64_t panel, int64_t row, int64_t begin,
                      int64_t end, float* sums) {
    if (rows < ROWS) {
        if constexpr (ROWS > 1) tile_rows<ROWS - 1>(x, rows, w, panel, row, begin, end, sums);
    } else if constexpr (ROWS <= WIDE_ROWS) {
        x.template tile<ROWS, PANELS>(w, panel, row, begin, end, sums);
    } else {
        for (int p = 0; p < PANELS; ++p) x.template tile<ROWS, 1>(w, panel + p, row, begin, end, sums + p * LANES);
    }
}

template <class T, class Input>
static void multiply(const Tensor& x, Input& input, const Panels& w, int64_t panels, const Tensor& out, int threads) {
    int64_t n = x.shape[0], inputs = x.shape[1], outputs = out.shape[1];
    threads = threads_for(n * inputs * outputs, threads);
    parallel(n, threads_for(n * inputs, threads), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) input.read(x.as<T>(), row, inputs);
    });
    parallel(panels / PANELS, threads, [&](int64_t first, int64_t last) {
        alignas(64) float sums[BAND * WIDTH];
        for (int64_t panel = first * PANELS; panel < last * PANELS; panel += PANELS)
            for (int64_t band = 0; band < n; band += BAND) {
                int64_t rows = std::min<int64_t>(BAND, n - band), tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
                std::fill(sums, sums + rows * WIDTH, 0.0f);
                for (int64_t begin = 0; begin < w.vectors; begin += CHUNK)
                    for (int64_t t = 0; t < tiles; ++t) {
                        int64_t row = rows * t / tiles, next = rows * (t + 1) / tiles;
                        tile_rows(input, next - row, w, panel, band + row, begin,
                                  std::min<int64_t>(begin + CHUNK, w.vectors), sums + row * WIDTH);
                    }
                for (int64_t row = 0; row < rows; ++row)
                    for (int64_t i = 0; i < WIDTH && panel * LANES + i < outputs; i += LANES)
                        store(out.as<T>() + (band + row) * outputs + panel * LANES + i, load(sums + row * WIDTH + i),
                              outputs - panel * LANES - i);
            }
    });
}

template <class T, class Format>
static void linear_floats(const Tensor& x, const Panels& w, int64_t panels, const Tensor& out, int threads) {
    static thread_local FloatInput<Format> input;
    input.vectors = w.vectors;
    input.values.resize(x.shape[0] * w.vectors);
    multiply<T>(x, input, w, panels, out, threads);
}

template <class T, class Format>
static void linear_quantized(const Tensor& x, const Panels& w, int64_t panels, const Tensor& out, int threads) {
    static thread_local QuantizedInput<Format> input;
    int64_t n = x.shape[0], groups = x.shape[1] / GROUP;
    input.inputs = x.shape[1];
    input.values.resize(n * input.inputs);
    input.scales.resize(n * groups);
    input.offsets.resize(n * groups);
    multiply<T>(x, input, w, panels, out, threads);
}

// panels: uint8 [panels, vectors, 64].  scales: bf16 [panels, groups, 16], with no groups for floats.
// bits: of a weight; 32, 16, 8 or 4.
static void linear(const Tensor& x, const Tensor& panels, const Tensor& scales, int bits, const Tensor& out,
                   int threads) {
    DType dtype = expect_float("x", x);
    expect("x", x, dtype, {ANY, ANY});
    expect("panels", panels, DType::u8, {ANY, ANY, 64});
    int64_t inputs = x.shape[1], count = panels.shape[0], vectors = panels.shape[1];
    bool quantized = bits == 8 || bits == 4;
    expect(quantized || bits == (dtype == DType::f32 ? 32 : 16), "the bits of weights are not those of x, 8 or 4");
    expect(!quantized || inputs % GROUP == 0, "inputs are no multiple of 64, as quantized weights want them");
    int64_t step = 32 / bits;
    expect(vectors == (inputs + step - 1) / step, "x has another number of inputs than the weights");
    expect("scales", scales, DType::bf16, {count, quantized ? inputs / GROUP : 0, LANES});
    expect("out", out, dtype, {x.shape[0], ANY});
    int64_t wanted = (out.shape[1] + LANES - 1) / LANES;
    expect(count == (wanted + PANELS - 1) / PANELS * PANELS, "out has another width than the weights");
    Panels w{panels.as<uint8_t>(), scales.as<bf16>(), vectors};
    if (bits == 32) return linear_floats<float, Fp32>(x, w, count, out, threads);
    if (bits == 16) return linear_floats<bf16, Bf16>(x, w, count, out, threads);
    auto run = bits == 8 ? dtype == DType::f32 ? linear_quantized<float, Int8> : linear_quantized<bf16, Int8>
               : dtype == DType::f32           ? linear_quantized<float, Int4>
                                               : linear_quantized<bf16, Int4>;
    run(x, w, count, out, threads);
}
