// Causal attention of ragged queries over pages, with an online softmax.
//
// A line is a query of one head. Keys are taken in chunks of 128, one after another, each joined to the softmax of those
// before: a line's result is the same bits whatever else is in the step. A task is some neighbouring key-value heads
// and up to 64 lines of each in one row. Bytes: keys and values once a task, in the order of memory, as a token's heads
// lie side by side; what a chunk holds of them stays in the cache for the other lines.

constexpr int KEYS = 128;       // of a chunk
constexpr int LINES = 4;        // that share loads of keys and values
constexpr int BAND_LINES = 64;  // of a task, for each of its heads
constexpr int HEADS = 32;       // of a task: two pages of memory a token, so that it is read in long runs
constexpr int SOON = 4;         // keys between what is asked of memory and what is multiplied

// K: what keys and values are kept in.
template <class K>
struct Pages {
    const K *k, *v;
    const float *k_scales, *v_scales;  // of each head of each token, where K is int8
    int64_t page_size, kv_heads, head_dim;
    const int32_t* table;  // of the row

    // Where the tokens `begin` to `end` lie, counted in heads.
    void find(int64_t begin, int64_t end, int64_t* places) const {
        int64_t page = begin / page_size, offset = begin % page_size;
        for (int64_t j = 0; j < end - begin; ++j) {
            places[j] = (table[page] * page_size + offset) * kv_heads;
            if (++offset == page_size) offset = 0, ++page;
        }
    }
};

// The softmax of some lines of one head: queries, and what the keys so far have come to. Rows are of whole vectors.
struct Lines {
    float *queries, *sums;  // [lines, width]
    float *tops, *totals;   // [lines]
    int64_t ends[LINES];    // how many keys each sees
};

// Call `part(i, load)` for each vector of a head, where `load` reads one from `i` on; the last may be cut short.
template <class Part>
inline void each_vector(int64_t head_dim, Part part) {
    int64_t i = 0;
    for (; i + LANES <= head_dim; i += LANES) part(i, [](const auto* p) { return load(p); });
    if (i < head_dim) part(i, [=](const auto* p) { return load(p, head_dim - i); });
}

// Products of N queries with WIDE keys of a head: enough sums at a time to hide how long an fma takes.
template <int N, int WIDE, class K>
inline void dot_keys(const K* k, const int64_t* places, const float* q, int64_t width, int64_t head_dim,
                     float* scores) {
    f32 dots[N][WIDE] = {};
    each_vector(head_dim, [&](int64_t i, auto load_part) {
        LUMINA_UNROLL
        for (int w = 0; w < WIDE; ++w) {
            __builtin_prefetch(k + places[w + SOON] * head_dim + i);
            f32 part = load_part(k + places[w] * head_dim + i);
            LUMINA_UNROLL
            for (int n = 0; n < N; ++n) dots[n][w] = fma(load(q + n * width + i), part, dots[n][w]);
        }
    });
    LUMINA_UNROLL
    for (int n = 0; n < N; ++n)
        LUMINA_UNROLL
        for (int w = 0; w < WIDE; ++w) scores[n * KEYS + w] = sum(dots[n][w]);
}

// Add the values of WIDE keys of a head, by their weights, to the sums of N lines.
template <int N, int WIDE, class K>
inline void add_values(const K* v, const int64_t* places, const float* weights, int64_t width, int64_t head_dim,
                       float* sums) {
    each_vector(head_dim, [&](int64_t i, auto load_part) {
        f32 parts[N];
        LUMINA_UNROLL
        for (int n = 0; n < N; ++n) parts[n] = load(sums + n * width + i);
        LUMINA_UNROLL
        for (int w = 0; w < WIDE; ++w) {
            __builtin_prefetch(v + places[w + SOON] * head_dim + i);
            f32 value = load_part(v + places[w] * head_dim + i);
            LUMINA_UNROLL
            for (int n = 0; n < N; ++n) parts[n] = fma(all(weights[n * KEYS + w]), value, parts[n]);
        }
        LUMINA_UNROLL
        for (int n = 0; n < N; ++n) store(sums + n * width + i, parts[n]);
    });
}

// Turn a line's products with the keys of a chunk into weights, and shrink what it has summed so far to their measure.
// seen: keys of the chunk that the line sees, of `keys` in all.  k_scales, v_scales: null, or [keys].
inline void weigh(float* scores, int64_t seen, int64_t keys, const float* k_scales, const float* v_scales,
                  int64_t width, float& top, float& total, float* sums) {
    keys = (keys + LANES - 1) / LANES * LANES;
    if (seen <= 0) return std::fill(scores, scores + keys, 0.0f);
    for (int64_t j = 0; k_scales && j < seen; ++j) scores[j] *= k_scales[j];
    std::fill(scores + seen, scores + keys, -INFINITY);
    f32 tops = all(top), totals = all(0);
    for (int64_t j = 0; j < keys; j += LANES) tops = max(load(scores + j), tops);
    float before = top;
    top = largest(tops);
    for (int64_t j = 0; j < keys; j += LANES) {
        f32 weight = exp(load(scores + j) - all(top));
        store(scores + j, weight);
        totals = totals + weight;
    }
    float shrink = std::exp(before - top);
    total = total * shrink + sum(totals);
    for (int64_t i = 0; i < width; i += LANES) store(sums + i, load(sums + i) * all(shrink));
    for (int64_t j = 0; v_scales && j < seen; ++j) scores[j] *= v_scales[j];
}

// Take the keys `begin` to `end` into N lines of each of `heads` heads, from head `first` on.
template <class K, int N>
static void attend_chunk(const Pages<K>& pages, const int64_t* places, int64_t first, int64_t heads, int64_t begin,
                         int64_t end, const Lines* lines, int64_t width) {
    constexpr int DOTS = LEAF == LANES ? 4 : LINES / N, VALUES = 4;  // keys at a time, as many as registers hold
    constexpr bool scaled = std::is_same_v<K, int8_t>;
    int64_t head_dim = pages.head_dim, keys = end - begin, j = 0;
    alignas(64) float scores[HEADS][N][KEYS], scales[2][KEYS];
    const K *k = pages.k + first * head_dim, *v = pages.v + first * head_dim;
    for (; j + DOTS <= keys; j += DOTS)
        for (int64_t h = 0; h < heads; ++h)
            dot_keys<N, DOTS>(k + h * head_dim, places + j, lines[h].queries, width, head_dim, &scores[h][0][j]);
    for (; j < keys; ++j)
        for (int64_t h = 0; h < heads; ++h)
            dot_keys<N, 1>(k + h * head_dim, places + j, lines[h].queries, width, head_dim, &scores[h][0][j]);

    for (int64_t h = 0; h < heads; ++h) {
        for (j = 0; scaled && j < keys; ++j) {
            scales[0][j] = pages.k_scales[places[j] + first + h];
            scales[1][j] = pages.v_scales[places[j] + first + h];
        }
        for (int n = 0; n < N; ++n)
            weigh(scores[h][n], std::min(lines[h].ends[n] - begin, keys), keys, scaled ? scales[0] : nullptr,
                  scaled ? scales[1] : nullptr, width, lines[h].tops[n], lines[h].totals[n],
                  lines[h].sums + n * width);
    }

    for (j = 0; j + VALUES <= keys; j += VALUES)
        for (int64_t h = 0; h < heads; ++h)
            add_values<N, VALUES>(v + h * head_dim, places + j, &scores[h][0][j], width, head_dim, lines[h].sums);
    for (; j < keys; ++j)
        for (int64_t h = 0; h < heads; ++h)
            add_values<N, 1>(v + h * head_dim, places + j, &scores[h][0][j], width, head_dim, lines[h].sums);
}

// A band of lines of one row. Line i of a key-value head is query i / group, head i % group of those that share the keys.
struct Band {
    int64_t row, begin, end;  // lines, counted over the queries of the step
    int64_t last;             // keys that line `end - 1` sees
};

template <class T, class K>
static void attend(const Pages<K>& pages, const Band& band, int64_t first, int64_t heads, const Tensor& q,
                   const Tensor& out) {
    static thread_local std::vector<float> memory;
    int64_t head_dim = pages.head_dim, group = q.shape[1] / pages.kv_heads, n = band.end - band.begin;
    int64_t width = (head_dim + LANES - 1) / LANES * LANES, places[KEYS + SOON];
    memory.resize(heads * n * (2 * width + 2) + LANES);
    float* queries = memory.data();
    float *sums = queries + heads * n * width, *tops = sums + heads * n * width, *totals = tops + heads * n;
    std::fill(sums, tops, 0.0f);
    std::fill(tops, totals, -INFINITY);
    std::fill(totals, totals + heads * n, 0.0f);

    auto place = [&](int64_t h, int64_t i) {
        int64_t line = band.begin + i;
        return ((line / group * pages.kv_heads + first + h) * group + line % group) * head_dim;
    };
    f32 scale = all(1 / std::sqrt(static_cast<float>(head_dim)));
    for (int64_t h = 0; h < heads; ++h)
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j < head_dim; j += LANES)
                store(queries + (h * n + i) * width + j, load(q.as<T>() + place(h, i) + j, head_dim - j) * scale);

    for (int64_t begin = 0; begin < band.last; begin += KEYS) {
        int64_t end = std::min(band.last, begin + KEYS);
        pages.find(begin, std::min(band.last, end + SOON), places);
        std::fill(places + std::min<int64_t>(band.last - begin, KEYS + SOON), places + KEYS + SOON, places[0]);
        for (int64_t i = 0; i < n; i += LINES) {
            int64_t count = std::min<int64_t>(LINES, n - i);
            Lines lines[HEADS];
            for (int64_t h = 0; h < heads; ++h) {
                int64_t at = h * n + i;
                lines[h] = {queries + at * width, sums + at * width, tops + at, totals + at, {}};
                for (int64_t k = 0; k < count; ++k)
                    lines[h].ends[k] = band.last - ((band.end - 1) / group - (band.begin + i + k) / group);
            }
            auto run = count == 1   ? attend_chunk<K, 1>
                       : count == 2 ? attend_chunk<K, 2>
                       : count == 3 ? attend_chunk<K, 3>
                                    : attend_chunk<K, 4>;
            run(pages, places, first, heads, begin, end, lines, width);
        }
    }
    for (int64_t h = 0; h < heads; ++h)
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j < head_dim; j += LANES)
                store(out.as<T>() + place(h, i) + j, load(sums + (h * n + i) * width + j) / all(totals[h * n + i]),
                      head_dim - j);
}

template <class T, class K>
static void attend_rows(const Tensor& q, const Tensor* pages, const Tensor& tables, const Tensor& cu_seqlens,
                        const Tensor& seq_lens, const Tensor& out, int threads) {
    int64_t page_size = pages[0].shape[1], kv_heads = pages[0].shape[2], head_dim = q.shape[2];
    int64_t group = q.shape[1] / kv_heads, products = 0;
    std::vector<Band> bands;
    for (int64_t row = 0; row < seq_lens.shape[0]; ++row) {
        int64_t begin = cu_seqlens.as<int32_t>()[row] * group, end = cu_seqlens.as<int32_t>()[row + 1] * group;
        int64_t length = seq_lens.as<int32_t>()[row];
        for (int64_t line = begin; line < end; line += BAND_LINES) {
            int64_t next = std::min<int64_t>(line + BAND_LINES, end);
            bands.push_back({row, line, next, length - ((end - 1) / group - (next - 1) / group)});
            products += 2 * (next - line) * length * kv_heads * head_dim;
        }
    }
    threads = threads_for(products, threads);
    int64_t n = static_cast<int64_t>(bands.size());
    // Fewer heads a task where there are too few tasks for all threads.
    int64_t heads = std::clamp<int64_t>(kv_heads * n / threads, 1, std::min<int64_t>(HEADS, kv_heads));
    int64_t parts = (kv_heads + heads - 1) / heads;
    // A thread takes some heads of all rows, so that long rows and short ones fall to all alike.
    parallel(n * parts, threads, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const Band& band = bands[task % n];
            int64_t first = task / n * heads;
            const int32_t* table = tables.as<int32_t>() + band.row * tables.shape[1];
            Pages<K> own{pages[0].as<K>(), pages[2].as<K>(), pages[1].as<float>(), pages[3].as<float>(),
                         page_size,        kv_heads,         head_dim,             table};
            attend<T>(own, band, first, std::min(heads, kv_heads - first), q, out);
        }
    });
}

static void paged_attention(const Tensor& q, const Tensor* pages, const Tensor& tables, const Tensor& cu_seqlens,
                            const Tensor& seq_lens, const Tensor& out, int threads) {
    DType dtype = expect_float("q", q);
    bool int8 = expect_pages(pages, dtype);
    int64_t page_size = pages[0].shape[1], kv_heads = pages[0].shape[2], head_dim = pages[0].shape[3];
    expect("q", q, dtype, {ANY, ANY, head_dim});
    int64_t n = q.shape[0], heads = q.shape[1];
    expect(heads % kv_heads == 0, "the key-value heads do not divide the heads");
    expect("seq_lens", seq_lens, DType::i32, {ANY});
    int64_t rows = seq_lens.shape[0];
    expect("block_tables", tables, DType::i32, {rows, ANY});
    expect("cu_seqlens", cu_seqlens, DType::i32, {rows + 1});
    expect("out", out, dtype, {n, heads * head_dim});
    const int32_t *cu = cu_seqlens.as<int32_t>(), *lengths = seq_lens.as<int32_t>();
    expect(cu[0] == 0 && cu[rows] == n, "cu_seqlens does not span the queries");
    for (int64_t row = 0; row < rows; ++row) {
        expect(cu[row] <= cu[row + 1], "cu_seqlens falls");
        expect(lengths[row] >= cu[row + 1] - cu[row], "a row has more queries than tokens");
        int64_t blocks = (lengths[row] + page_size - 1) / page_size;
        expect(blocks <= tables.shape[1], "a row is longer than its block table");
        Tensor used{tables.as<int32_t>() + row * tables.shape[1], DType::i32, 1, {blocks}, true};
        expect_range("block_tables", used, 0, pages[0].shape[0]);
    }
    auto run = dtype == DType::f32 ? int8 ? attend_rows<float, int8_t> : attend_rows<float, float>
               : int8              ? attend_rows<bf16, int8_t>
                                   : attend_rows<bf16, bf16>;
    run(q, pages, tables, cu_seqlens, seq_lens, out, threads);
}
