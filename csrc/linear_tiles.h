// Products of panels by AMX, where a tile of 16 rows takes as long as two or three rows do otherwise.
//
// A tile of weights is 16 vectors of a half of a panel, as they lie there: 32 inputs in bf16, a group of 64 in int8. A
// group of int4 is taken apart into as much first. Rows are filled up to whole tiles; what comes out of such rows is
// not looked at. A load of weights is for up to 32 rows in bf16, in four tiles of sums, and for all of a band in
// integers.

#include "tiles.h"

// Bytes between what is multiplied and what goes to the first and to the second cache meanwhile.
constexpr int64_t TILES_NEAR = 4096, AHEAD = CHUNK * STRIDE;

// bf16 activations as tiles read them: blocks of 32 inputs, one after another, of all rows.
struct Bf16Input {
    static constexpr int BLOCK = 2 * SIDE;
    std::vector<Line<bf16>> values;  // [blocks, rows]: the inputs of a block, with zeros behind the last
    int64_t rows, blocks;

    void prepare(int64_t n, int64_t inputs) {
        rows = whole_tiles(n);
        blocks = (inputs + BLOCK - 1) / BLOCK;
        values.resize(blocks * rows);
    }
    void read(const bf16* x, int64_t inputs, const Part& part) {
        int64_t whole = part.end / BLOCK;
        for (int64_t row = part.row; row < part.last_row; ++row) {
            const bf16* from = x + row * inputs;
            for (int64_t b = part.begin / BLOCK; b < whole; ++b)
                std::memcpy(values[b * rows + row].values, from + b * BLOCK, 64);
            if (part.end == whole * BLOCK) continue;
            bf16* last = values[whole * rows + row].values;
            std::fill(std::copy(from + whole * BLOCK, from + part.end, last), last + BLOCK, bf16{});
        }
    }
};

// Add the products of COUNT tiles of rows with blocks `begin` to `end` of a panel to the sums; the first block begins
// them. Meanwhile `share` bytes a block are asked of memory, the `part`-th such share of the block that far ahead.
template <int COUNT>
static void add_blocks(const Bf16Input& x, const uint8_t* weights, int64_t vectors, int64_t row, int64_t begin,
                       int64_t end, int64_t part, int64_t share, float* sums) {
    constexpr int64_t SUMS = WIDTH * sizeof *sums, NEXT = SIDE * WIDTH;
    if (begin == 0) {
        zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
    } else {
        load_tile<0>(sums, SUMS), load_tile<1>(sums + LANES, SUMS);
        if constexpr (COUNT == 2) load_tile<2>(sums + NEXT, SUMS), load_tile<3>(sums + NEXT + LANES, SUMS);
    }
    for (int64_t b = begin; b < end; ++b) {
        const uint8_t* block = weights + b * SIDE * STRIDE;
        alignas(64) uint8_t last[SIDE * STRIDE];
        if (int64_t left = vectors - b * SIDE; left < SIDE) {  // what lies behind the panel may be no number
            std::fill(std::copy(block, block + left * STRIDE, last), last + sizeof last, uint8_t{0});
            block = last;
        }
        for (int64_t i = part * share; i < (part + 1) * share; i += 64)
            prefetch_far(weights + b * SIDE * STRIDE + AHEAD + i);
        for (int64_t i = 0; part == 0 && i < SIDE * STRIDE; i += 64)
            prefetch_near(weights + b * SIDE * STRIDE + TILES_NEAR + i);
        load_tile<6>(block, STRIDE), load_tile<7>(block + 64, STRIDE);
        const Line<bf16>* values = &x.values[b * x.rows + row];
        load_tile<4>(values, 64);
        dot_tiles_bf16<0, 4, 6>(), dot_tiles_bf16<1, 4, 7>();
        if constexpr (COUNT == 2) {
            load_tile<5>(values + SIDE, 64);
            dot_tiles_bf16<2, 5, 6>(), dot_tiles_bf16<3, 5, 7>();
        }
    }
    store_tile<0>(sums, SUMS), store_tile<1>(sums + LANES, SUMS);
    if constexpr (COUNT == 2) store_tile<2>(sums + NEXT, SUMS), store_tile<3>(sums + NEXT + LANES, SUMS);
}

static void multiply_panel(const Bf16Input& x, const Panels& w, int64_t panel, int64_t band, int64_t rows,
                           float* sums) {
    const uint8_t* weights = w.data + panel * w.vectors * STRIDE;
    // What several tiles of rows read stays in the first cache meanwhile.
    int64_t parts = (rows + 2 * SIDE - 1) / (2 * SIDE), chunk = parts == 1 ? x.blocks : CHUNK / SIDE;
    for (int64_t begin = 0; begin < x.blocks; begin += chunk)
        for (int64_t row = 0; row < rows; row += 2 * SIDE) {
            auto add = rows - row > SIDE ? add_blocks<2> : add_blocks<1>;
            add(x, weights, w.vectors, band + row, begin, std::min(begin + chunk, x.blocks), row / (2 * SIDE),
                SIDE * STRIDE / parts, sums + row * WIDTH);
        }
}

// A group of both halves of a panel as tiles of bytes, rows of a half STRIDE apart; in `room` where it is not so.
template <class Format>
inline const uint8_t* bytes_of(const uint8_t* group, uint8_t*) {
    return group;
}
template <>
inline const uint8_t* bytes_of<Int4>(const uint8_t* group, uint8_t* room) {
    for (int64_t i = 0; i < GROUP / Int4::STEP; ++i)
        for (int64_t half = 0; half < STRIDE; half += 64) {
            Int4::Weights w = Int4::weights(group + i * STRIDE + half);
            _mm512_store_si512(room + 2 * i * STRIDE + half, w.first);
            _mm512_store_si512(room + (2 * i + 1) * STRIDE + half, w.second);
        }
    return room;
}

// A tile of rows with a group of a panel: where their products are to be added, and what these are scaled by first.
struct Group {
    int64_t first, rows;   // in `QuantizedInput`; at most SIDE
    const bf16* scales;    // of the weights, [WIDTH]
    float* sums;           // [rows, WIDTH]
    const uint8_t* ahead;  // what to ask of memory while they are added, `pace` lines for each two rows
    int64_t pace;
};
using Products = int32_t[SIDE][WIDTH];
constexpr int64_t LATE = 3;  // steps from when products are made to when they are added: see `advance`

// Scale products and add them to the sums, as `QuantizedInput::multiply` does, to the bit.
template <class Format>
inline void add_products(const QuantizedInput<Format>& x, const Group& group, const Products& products) {
    Group g = group;
    f32 scales[HALVES] = {load(g.scales), load(g.scales + LANES)};
    const int32_t *offsets = &x.offsets[g.first], *part = products[0];
    const float* row_scales = &x.scales[g.first];
    for (int64_t r = 0; r < g.rows; r += 2, g.sums += 2 * WIDTH, part += 2 * WIDTH, g.ahead += g.pace * 64) {
        LUMINA_UNROLL
        for (int64_t k = 0; k < 2; ++k) {  // of an odd number of rows one more, of which nobody reads the sums
            for (int64_t i = k; i < g.pace; i += 2)
                prefetch_far(g.ahead + i * 64), prefetch_near(g.ahead + i * 64 - (AHEAD - TILES_NEAR));
            i32 offset = all_i32(offsets[r + k]);
            f32 scale = all(row_scales[r + k]);
            LUMINA_UNROLL
            for (int p = 0; p < HALVES; ++p) {
                float* sum = g.sums + k * WIDTH + p * LANES;
                store(sum, fma(to_f32(load(part + k * WIDTH + p * LANES) + offset), scales[p] * scale, load(sum)));
            }
        }
    }
}

// One step: tiles 2 N and 2 N + 1 hold products of two steps ago, which are stored, and multiply `values` with the
// weights of tiles 6 and 7; products stored a step ago are added. Nothing waits for what the step begins. Not inline,
// or g++ keeps addresses in vector registers, and tiles wait for all the arithmetic before them.
template <int N, class Format>
__attribute__((noinline)) static void advance(const QuantizedInput<Format>& x, const Line<int8_t>* values,
                                              Products* products, const Group& stored) {
    constexpr int64_t ROW = sizeof products[N][0];
    store_tile<2 * N>(products[N][0], ROW), store_tile<2 * N + 1>(products[N][0] + LANES, ROW);
    zero_tile<2 * N>(), zero_tile<2 * N + 1>();
    load_tile<4 + N>(values, 64);
    dot_tiles_int8<2 * N, 4 + N, 6>(), dot_tiles_int8<2 * N + 1, 4 + N, 7>();
    add_products(x, stored, products[1 - N]);
}

template <class Format>
static void multiply_panel(const QuantizedInput<Format>& x, const Panels& w, int64_t panel, int64_t band, int64_t rows,
                           float* sums) {
    if (rows <= FEW_ROWS) return multiply_rows(x, w, panel, band, rows, sums);
    constexpr int64_t BYTES = GROUP / Format::STEP * STRIDE;
    int64_t tiles = whole_tiles(rows) / SIDE, pairs = (rows + 1) / 2, pace = (BYTES / 64 + pairs - 1) / pairs;
    int64_t ahead = AHEAD + LATE * BYTES / tiles / 64 * 64;  // of the products that are added, so many steps back
    alignas(64) uint8_t room[2][SIDE * STRIDE];
    alignas(64) Products products[2];
    Group none{0, 0, w.scales, sums, w.data, 0}, groups[LATE + 1] = {none, none, none, none};
    int64_t s = 0;
    auto next = [&](const Line<int8_t>* values, const Group& group) {
        groups[s % (LATE + 1)] = group;
        const Group& stored = groups[(s + 1) % (LATE + 1)];
        s % 2 ? advance<1>(x, values, products, stored) : advance<0>(x, values, products, stored);
        ++s;
    };
    std::fill(sums, sums + tiles * SIDE * WIDTH, 0.0f);
    for (int64_t g = 0; g < w.groups; ++g) {
        int64_t place = panel * w.groups + g;
        const uint8_t* weights = bytes_of<Format>(w.data + place * BYTES, room[g % 2]);
        prefetch_far(w.scales + (place + AHEAD / BYTES) * WIDTH);
        load_tile<6>(weights, STRIDE), load_tile<7>(weights + 64, STRIDE);
        for (int64_t row = 0; row < rows; row += SIDE) {
            int64_t first = g * x.rows + band + row;
            next(&x.values[first], {first, std::min<int64_t>(rows - row, SIDE), w.scales + place * WIDTH,
                                    sums + row * WIDTH, w.data + place * BYTES + ahead + row / 2 * pace * 64, pace});
        }
    }
    for (int64_t i = 0; i < LATE; ++i) next(x.values.data(), none);  // what these multiply is added nowhere
}
