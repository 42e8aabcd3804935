// Products of few rows with a weight matrix: fp32, bf16, or int8 and int4 weights with int8 activations.
//
// Weights lie in panels of 32 outputs, two halves of 16. A panel is a run of vectors of 64 bytes, for each STEP inputs
// one of each half, in the order in which they are read; lane i of a vector belongs to output i, so that no sum ever
// crosses lanes:
//
//     fp32  1 input     16 values
//     bf16  2 inputs    16 pairs
//     int8  4 inputs    16 fours, plus 128
//     int4  8 inputs    16 fours of bytes: the first four inputs in the low bits, the others in the high ones, plus 8
//
// Quantised weights have a bf16 scale for each 64 inputs of an output; activations are quantised likewise, row by row,
// and the products are summed as integers within such a group.
//
// With AMX, products of many rows go by tiles: see linear_tiles.h.
//
// A task is a panel for all rows, chunk by chunk, so that a weight is read from memory once; of few weights it is all
// panels for a share of the rows. A chunk stays in the first cache while tile after tile of rows is multiplied with it,
// and meanwhile the next one is asked of memory, a share in each tile, so that neither need wait for the other. Every
// output is summed over its inputs in one order, whatever the other rows: results are the same bits in any batch.

constexpr int GROUP = 64;   // inputs that share a scale
constexpr int CHUNK = 128;  // vectors of a half that are summed apart
constexpr int BAND = 64;    // rows that go through a panel together
constexpr int HALVES = 2;
constexpr int WIDTH = HALVES * LANES;
constexpr int64_t STRIDE = HALVES * 64;  // bytes from a vector of a half to its next

// Bytes of weights up to which threads share the rows, and rows that a thread then has at least. To read weights of the
// third cache twice costs less than to have each other's rows, in and out, from another core: 192 x 192 in bf16 with
// 128 rows 25 us by shares of the weights, as long as by one thread, and 12 by shares of the rows (two cores with AMX).
constexpr int64_t FEW_WEIGHTS = 1 << 20, ROWS_A_THREAD = 16;

// Rows of a tile at most, and rows up to which a tile takes both halves: as many sums as there are registers for.
#if defined(LUMINA_AVX512)
constexpr int TILE_ROWS = 8, WIDE_ROWS = 8;  // 16 of 32 registers are sums; with 24, g++ 12 keeps some in memory
#elif defined(LUMINA_AVX2)
constexpr int TILE_ROWS = 6, WIDE_ROWS = 3;  // 12 of 16, two a half
#else
constexpr int TILE_ROWS = 2, WIDE_ROWS = 1;
#endif

#if defined(LUMINA_AMX)
constexpr int SIDE = 16;     // rows of a tile of AMX, and outputs of a product
constexpr int FEW_ROWS = 8;  // up to which integers gain nothing by tiles
#else
constexpr int SIDE = 1, FEW_ROWS = 0;
#endif
inline int64_t whole_tiles(int64_t rows) { return (rows + SIDE - 1) / SIDE * SIDE; }

// Ask of memory for what is multiplied a chunk later: into the first cache, which AMD's processors read 2 to 12 % faster
// than by way of the second. Those with AMX, Intel's, read a quarter slower so (see `prefetch_far`): there it goes into
// the second, and what comes in NEAR bytes from there to the first.
#if defined(LUMINA_AMX)
inline void ask(const uint8_t* ahead, const uint8_t* weights) {
    constexpr int64_t NEAR = 1024;
    prefetch_far(ahead), prefetch_near(weights + NEAR);
}
#else
inline void ask(const uint8_t* ahead, const uint8_t*) { prefetch_near(ahead); }
#endif

// What a tile or a vector loads at once, within one line of the cache.
template <class T>
struct alignas(64) Line {
    T values[64 / sizeof(T)];
};

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

// Integer formats. Sums: of a run of RUN vectors; they begin from the sums as int32 that are there, and end as such.

struct Int8 {
    static constexpr int STEP = 4, ZERO = 128, RUN = GROUP / STEP;
    using Weights = Bytes;
    using Sums = i32;
    static Sums begin(i32 sums) { return sums; }
    static i32 end(i32, Sums sums) { return sums; }
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
    static Sums begin(i32) { return {}; }
    static i32 end(i32 sums, const Sums& run) {
        __m256i ones = _mm256_set1_epi16(1);
        return sums + i32{reinterpret_cast<leaf_i32>(_mm256_madd_epi16(run.halves[0], ones)),
                          reinterpret_cast<leaf_i32>(_mm256_madd_epi16(run.halves[1], ones))};
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
    static Sums begin(i32 sums) { return sums; }
    static i32 end(i32, Sums sums) { return sums; }
};
#endif

// What is multiplied at a time: a chunk of one half of a panel, or of both, with some rows.
struct Tile {
    const uint8_t* weights;
    const bf16* scales;
    int64_t row, begin, end;  // the first row; vectors of the chunk
    float* sums;              // [rows, WIDTH], to be added to
    const uint8_t* ahead;     // what to ask of memory meanwhile, `pace` bytes further for each vector
    int64_t pace;

    Tile second_half() const {
        Tile other = *this;
        other.weights += 64, other.scales += LANES, other.sums += LANES, other.ahead += pace;
        return other;
    }
};

// What a thread reads of the activations: some inputs of some rows. Inputs begin at a whole group, and end at one or
// with the row.
struct Part {
    int64_t row, last_row, begin, end;
};

// Activations as a float format reads them.
template <class Format>
struct FloatInput {
    std::vector<typename Format::Input> values;
    int64_t vectors;

    void prepare(int64_t rows, int64_t inputs) {
        vectors = (inputs + Format::STEP - 1) / Format::STEP;
        values.resize(rows * vectors);
    }

    template <class T>
    void read(const T* x, int64_t inputs, const Part& part) {
        for (int64_t row = part.row; row < part.last_row; ++row)
            Format::keep(x + row * inputs + part.begin, part.end - part.begin,
                         &values[row * vectors + part.begin / Format::STEP]);
    }

    // Add the products of ROWS rows with WIDE halves.
    template <int ROWS, int WIDE>
    void multiply(const Tile& t) const {
        f32 parts[ROWS][WIDE] = {};
        const typename Format::Input* x = &values[t.row * vectors];
        const uint8_t *weights = t.weights, *ahead = t.ahead;
        for (int64_t s = t.begin; s < t.end; ++s, weights += STRIDE, ahead += HALVES * t.pace)
            LUMINA_UNROLL
            for (int p = 0; p < WIDE; ++p) {
                ask(ahead + p * t.pace, weights + p * 64);
                auto w = Format::weights(weights + p * 64);
                LUMINA_UNROLL
                for (int r = 0; r < ROWS; ++r) parts[r][p] = Format::dot(parts[r][p], w, x[r * vectors + s]);
            }
        LUMINA_UNROLL
        for (int r = 0; r < ROWS; ++r)
            LUMINA_UNROLL
            for (int p = 0; p < WIDE; ++p) {
                float* sum = t.sums + r * WIDTH + p * LANES;
                store(sum, load(sum) + parts[r][p]);
            }
    }
};

// Activations in int8, a scale for each group of a row. The rows of a group lie together: a whole row apart, they would
// all want the same few places of the first cache.
template <class Format>
struct QuantizedInput {
    std::vector<Line<int8_t>> values;  // [groups, rows]: the inputs of a group
    std::vector<float> scales;         // [groups, rows]
    std::vector<int32_t> offsets;  // likewise: what the zero points of weights add to the products, its sign turned
    int64_t rows;                  // with those that fill the last tile, which hold nothing

    void prepare(int64_t n, int64_t inputs) {
        rows = n <= FEW_ROWS ? n : whole_tiles(n);
        int64_t groups = inputs / GROUP;
        values.resize(groups * rows);
        scales.resize(groups * rows);
        offsets.resize(groups * rows);
    }

    template <class T>
    void read(const T* x, int64_t inputs, const Part& part) {
        for (int64_t row = part.row; row < part.last_row; ++row)
            for (int64_t g = part.begin / GROUP; g < part.end / GROUP; ++g)
                read_group(x + row * inputs + g * GROUP, g * rows + row);
    }

    template <class T>
    void read_group(const T* from, int64_t place) {
        int8_t* to = values[place].values;
        f32 top = all(0), totals = all(0);
        for (int i = 0; i < GROUP; i += LANES) top = max(abs(load(from + i)), top);
        float scale = largest(top) / 127;
        f32 inverse = all(scale > 0 ? 1 / scale : 0);
        for (int i = 0; i < GROUP; i += LANES) {
            f32 v = load(from + i);
            i32 steps = to_i32(v * inverse);
            store(to + i, steps);
            totals = totals + fma(v, all(0), to_f32(steps));  // no number where v is infinite or none
        }
        float total = sum(totals);
        scales[place] = scale + (total - total);
        offsets[place] = -Format::ZERO * static_cast<int32_t>(total == total ? total : 0);
    }

    template <int ROWS, int WIDE>
    void multiply(const Tile& t) const {
        constexpr int VECTORS = GROUP / Format::STEP;
        const uint8_t *weights = t.weights, *ahead = t.ahead;
        const bf16* weight_scales = t.scales;
        f32 totals[ROWS][WIDE];
        LUMINA_UNROLL
        for (int r = 0; r < ROWS; ++r)
            LUMINA_UNROLL
            for (int p = 0; p < WIDE; ++p) totals[r][p] = load(t.sums + r * WIDTH + p * LANES);
        for (int64_t g = t.begin / VECTORS; g < t.end / VECTORS; ++g, weight_scales += WIDTH) {
            int64_t first = g * rows + t.row;
            const int8_t* x = values[first].values;
            prefetch_far(weight_scales + CHUNK / VECTORS * WIDTH);
            i32 parts[ROWS][WIDE];
            LUMINA_UNROLL
            for (int r = 0; r < ROWS; ++r)
                LUMINA_UNROLL
                for (int p = 0; p < WIDE; ++p) parts[r][p] = all_i32(offsets[first + r]);
            for (int run = 0; run < VECTORS; run += Format::RUN) {
                typename Format::Sums sums[ROWS][WIDE];
                LUMINA_UNROLL
                for (int r = 0; r < ROWS; ++r)
                    LUMINA_UNROLL
                    for (int p = 0; p < WIDE; ++p) sums[r][p] = Format::begin(parts[r][p]);
#pragma GCC unroll 2  // more, and g++ 12 gathers the prefetches of them all, more than a core has room for
                for (int s = 0; s < Format::RUN; ++s, x += Format::STEP, weights += STRIDE, ahead += HALVES * t.pace) {
                    typename Format::Weights w[WIDE];
                    LUMINA_UNROLL
                    for (int p = 0; p < WIDE; ++p) {
                        ask(ahead + p * t.pace, weights + p * 64);
                        w[p] = Format::weights(weights + p * 64);
                    }
                    LUMINA_UNROLL
                    for (int r = 0; r < ROWS; ++r)
                        LUMINA_UNROLL
                        for (int p = 0; p < WIDE; ++p) sums[r][p] = Format::dot(sums[r][p], w[p], x + r * GROUP);
                }
                LUMINA_UNROLL
                for (int r = 0; r < ROWS; ++r)
                    LUMINA_UNROLL
                    for (int p = 0; p < WIDE; ++p) parts[r][p] = Format::end(parts[r][p], sums[r][p]);
            }
            LUMINA_UNROLL
            for (int p = 0; p < WIDE; ++p) {
                f32 scale = load(weight_scales + p * LANES);
                LUMINA_UNROLL
                for (int r = 0; r < ROWS; ++r) {
                    f32 both = scale * all(scales[first + r]);
                    totals[r][p] = fma(to_f32(parts[r][p]), both, totals[r][p]);
                }
            }
        }
        LUMINA_UNROLL
        for (int r = 0; r < ROWS; ++r)
            LUMINA_UNROLL
            for (int p = 0; p < WIDE; ++p) store(t.sums + r * WIDTH + p * LANES, totals[r][p]);
    }
};

// Multiply a tile of `rows` rows, at most TILE_ROWS, with both halves.
template <int ROWS = TILE_ROWS, class Input>
static void multiply_tile(const Input& x, int64_t rows, const Tile& t) {
    if (rows < ROWS) {
        if constexpr (ROWS > 1) multiply_tile<ROWS - 1>(x, rows, t);
    } else if constexpr (ROWS <= WIDE_ROWS) {
        x.template multiply<ROWS, HALVES>(t);
    } else {
        x.template multiply<ROWS, 1>(t);
        x.template multiply<ROWS, 1>(t.second_half());
    }
}

// A matrix of weights.
struct Panels {
    const uint8_t* data;
    const bf16* scales;  // [panels, groups, WIDTH]
    int64_t count, vectors, groups;
};

// Multiply rows `band` to `band + rows` with a panel; sums [rows, WIDTH] get the products.
template <class Input>
static void multiply_rows(const Input& x, const Panels& w, int64_t panel, int64_t band, int64_t rows, float* sums) {
    int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    std::fill(sums, sums + rows * WIDTH, 0.0f);
    for (int64_t begin = 0; begin < w.vectors; begin += CHUNK) {
        int64_t end = std::min<int64_t>(begin + CHUNK, w.vectors), group = begin * w.groups / w.vectors;
        const uint8_t* weights = w.data + (panel * w.vectors + begin) * STRIDE;
        for (int64_t t = 0; t < tiles; ++t) {
            int64_t row = rows * t / tiles, next = rows * (t + 1) / tiles;
            Tile tile{weights, w.scales + (panel * w.groups + group) * WIDTH, band + row, begin, end, sums + row * WIDTH,
                      weights + CHUNK * STRIDE * (tiles + t) / tiles, 64 / tiles};
            multiply_tile(x, next - row, tile);
        }
    }
}

template <class Input>
static void multiply_panel(const Input& x, const Panels& w, int64_t panel, int64_t band, int64_t rows, float* sums) {
    multiply_rows(x, w, panel, band, rows, sums);
}

#if defined(LUMINA_AMX)
#include "linear_tiles.h"
#else
using Bf16Input = FloatInput<Bf16>;
struct TilesOn {};
#endif

// Multiply rows `begin` to `end` with panels `first` to `last`.
template <class T, class Input>
static void multiply(const Input& input, const Panels& w, int64_t begin, int64_t end, int64_t first, int64_t last,
                     const Tensor& out) {
    int64_t outputs = out.shape[1];
    alignas(64) float sums[BAND * WIDTH];
    [[maybe_unused]] TilesOn tiles_on;
    for (int64_t panel = first; panel < last; ++panel)
        for (int64_t band = begin; band < end; band += BAND) {
            int64_t rows = std::min<int64_t>(BAND, end - band);
            multiply_panel(input, w, panel, band, rows, sums);
            for (int64_t row = 0; row < rows; ++row)
                for (int64_t i = 0; i < WIDTH && panel * WIDTH + i < outputs; i += LANES)
                    store(out.as<T>() + (band + row) * outputs + panel * WIDTH + i, load(sums + row * WIDTH + i),
                          outputs - panel * WIDTH - i);
        }
}

template <class T, class Input>
static void multiply(const Tensor& x, Input& input, const Panels& w, const Tensor& out, int threads) {
    int64_t n = x.shape[0], inputs = x.shape[1], outputs = out.shape[1];
    threads = threads_for(n * inputs * outputs, threads);
    if (w.count * w.vectors * STRIDE <= FEW_WEIGHTS && n >= threads * ROWS_A_THREAD)
        return parallel(whole_tiles(n) / SIDE, threads, [&](int64_t begin, int64_t end) {
            begin *= SIDE, end = std::min(end * SIDE, n);
            input.read(x.as<T>(), inputs, {begin, end, 0, inputs});
            multiply<T>(input, w, begin, end, 0, w.count, out);
        });
    // By inputs and not by rows, whose scales lie side by side in lines that threads would take from each other: 16 rows of
    // 4,096 take 10 us in place of 35 by two cores that share no cache (AMD EPYC of family 26).
    parallel((inputs + GROUP - 1) / GROUP, threads_for(n * inputs, threads), [&](int64_t begin, int64_t end) {
        input.read(x.as<T>(), inputs, {0, n, begin * GROUP, std::min(end * GROUP, inputs)});
    });
    parallel(w.count, threads, [&](int64_t first, int64_t last) { multiply<T>(input, w, 0, n, first, last, out); });
}

template <class T, class Input>
static void linear_of(const Tensor& x, const Panels& w, const Tensor& out, int threads) {
    static thread_local Input input;
    input.prepare(x.shape[0], x.shape[1]);
    multiply<T>(x, input, w, out, threads);
}

// panels: uint8 [panels, vectors, 128].  scales: bf16 [panels, groups, 32], with no groups for floats.
// bits: of a weight; 32, 16, 8 or 4.
static void linear(const Tensor& x, const Tensor& panels, const Tensor& scales, int bits, const Tensor& out,
                   int threads) {
    DType dtype = expect_float("x", x);
    expect("x", x, dtype, {ANY, ANY});
    expect("panels", panels, DType::u8, {ANY, ANY, STRIDE});
    int64_t inputs = x.shape[1], count = panels.shape[0], vectors = panels.shape[1];
    bool quantized = bits == 8 || bits == 4;
    expect(inputs > 0, "x has no inputs");
    expect(quantized || bits == (dtype == DType::f32 ? 32 : 16), "the bits of weights are not those of x, 8 or 4");
    expect(!quantized || inputs % GROUP == 0, "inputs are no multiple of 64, as quantized weights want them");
    int64_t step = 32 / bits;
    expect(vectors == (inputs + step - 1) / step, "x has another number of inputs than the weights");
    int64_t groups = quantized ? inputs / GROUP : 0;
    expect("scales", scales, DType::bf16, {count, groups, WIDTH});
    expect("out", out, dtype, {x.shape[0], ANY});
    expect(count == (out.shape[1] + WIDTH - 1) / WIDTH, "out has another width than the weights");
    Panels w{panels.as<uint8_t>(), scales.as<bf16>(), count, vectors, groups};
    bool is_f32 = dtype == DType::f32;
    auto run = bits == 32  ? linear_of<float, FloatInput<Fp32>>
               : bits == 16 ? linear_of<bf16, Bf16Input>
               : bits == 8  ? is_f32 ? linear_of<float, QuantizedInput<Int8>> : linear_of<bf16, QuantizedInput<Int8>>
               : is_f32     ? linear_of<float, QuantizedInput<Int4>>
                            : linear_of<bf16, QuantizedInput<Int4>>;
    run(x, w, out, threads);
}
