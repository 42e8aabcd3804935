// Causal attention of ragged queries over pages, with an online softmax.
//
// Keys are taken in chunks of 128, each with its own softmax, joined in order: a query's result is the same bits
// whatever else is in the step. A task is up to four lines of one key-value head; a line is a query of one of the heads
// that share the keys. Bytes: keys and values once for four lines.

constexpr int KEYS = 128;
constexpr int LINES = 4;

// The softmax over one chunk after another.
struct Softmax {
    float top = -INFINITY, total = 0;
    float sums[MAX_HEAD_DIM + LANES];
};

// Where the lines of a task lie. Line i belongs to query first + i / group, and sees `end` keys more than query `first`.
struct Lines {
    int64_t row, query, head, count;
    int64_t ends[LINES];
};

// K: what keys and values are kept in.
template <class K>
struct Pages {
    const K *k, *v;
    const float *k_scales, *v_scales;  // of each head of each token, where K is int8
    int64_t page_size, kv_heads, head_dim;
    const int32_t* table;  // of the row

    // Where the keys `begin` to `end` of a head lie, and their values; and their scales.
    void find(int64_t head, int64_t begin, int64_t end, int64_t* places, float (*scales)[KEYS]) const {
        int64_t page = begin / page_size, offset = begin % page_size;
        for (int64_t j = 0; j < end - begin; ++j) {
            int64_t place = (table[page] * page_size + offset) * kv_heads + head;
            places[j] = place * head_dim;
            if constexpr (std::is_same_v<K, int8_t>) scales[0][j] = k_scales[place], scales[1][j] = v_scales[place];
            if (++offset == page_size) offset = 0, ++page;
        }
    }
};

// Multiply the first n values by others; both have room for whole vectors.
inline void scale_by(float* values, const float* scales, int64_t n) {
    for (int64_t j = 0; j < n; j += LANES) store(values + j, load(values + j) * load(scales + j));
}

// Products of N queries with WIDE keys: enough sums at a time to hide how long an fma takes.
template <int N, int WIDE, class T>
inline void dot_keys(const T* k, const int64_t* places, const float (*q)[MAX_HEAD_DIM + LANES], int64_t head_dim,
                     float (*scores)[KEYS]) {
    f32 dots[N][WIDE] = {};
    for (int64_t i = 0; i < head_dim; i += LANES)
        LUMINA_UNROLL
        for (int w = 0; w < WIDE; ++w) {
            f32 part = load(k + places[w] + i, head_dim - i);
            LUMINA_UNROLL
            for (int n = 0; n < N; ++n) dots[n][w] = fma(load(q[n] + i), part, dots[n][w]);
        }
    LUMINA_UNROLL
    for (int n = 0; n < N; ++n)
        LUMINA_UNROLL
        for (int w = 0; w < WIDE; ++w) scores[n][w] = sum(dots[n][w]);
}

// Sums of the values of some keys by N lines of weights, for WIDE vectors of a head from `i` on; one may be cut short.
template <int N, int WIDE, class T>
inline void sum_values(const T* v, const int64_t* places, int64_t keys, const float (*weights)[KEYS], int64_t i,
                       int64_t head_dim, float (*out)[MAX_HEAD_DIM + LANES]) {
    f32 sums[N][WIDE] = {};
    for (int64_t j = 0; j < keys; ++j)
        LUMINA_UNROLL
        for (int w = 0; w < WIDE; ++w) {
            const T* at = v + places[j] + i + w * LANES;
            f32 value = WIDE > 1 ? load(at) : load(at, head_dim - i);
            LUMINA_UNROLL
            for (int n = 0; n < N; ++n) sums[n][w] = fma(all(weights[n][j]), value, sums[n][w]);
        }
    LUMINA_UNROLL
    for (int n = 0; n < N; ++n)
        LUMINA_UNROLL
        for (int w = 0; w < WIDE; ++w) store(out[n] + i + w * LANES, sums[n][w]);
}

template <class K, int N>
static void attend_chunk(const Pages<K>& pages, int64_t kv_head, const float (*q)[MAX_HEAD_DIM + LANES],
                         const int64_t* ends, int64_t begin, int64_t end, Softmax* out) {
    constexpr int WIDE = LINES / N;
    int64_t head_dim = pages.head_dim, keys = end - begin, places[KEYS];
    constexpr bool scaled = std::is_same_v<K, int8_t>;
    alignas(64) float scores[N][KEYS], sums[N][MAX_HEAD_DIM + LANES], scales[2][scaled ? KEYS : 1] = {};
    pages.find(kv_head, begin, end, places, reinterpret_cast<float(*)[KEYS]>(scales));
    int64_t j = 0;
    auto row = [&](int64_t key) { return reinterpret_cast<float(*)[KEYS]>(&scores[0][key]); };
    for (; j + WIDE <= keys; j += WIDE) dot_keys<N, WIDE>(pages.k, places + j, q, head_dim, row(j));
    for (; j < keys; ++j) dot_keys<N, 1>(pages.k, places + j, q, head_dim, row(j));

    int64_t padded = (keys + LANES - 1) / LANES * LANES;
    float tops[N], totals[N];
    LUMINA_UNROLL
    for (int n = 0; n < N; ++n) {
        int64_t seen = std::clamp<int64_t>(ends[n] - begin, 0, keys);
        if (scaled) scale_by(scores[n], scales[0], seen);
        std::fill(scores[n] + seen, scores[n] + padded, -INFINITY);
        f32 top = all(-INFINITY), total = all(0);
        for (j = 0; j < padded; j += LANES) top = max(load(scores[n] + j), top);
        tops[n] = largest(top);
        for (j = 0; j < padded; j += LANES) {
            f32 weight = exp(load(scores[n] + j) - all(tops[n]));
            store(scores[n] + j, weight);
            total = total + weight;
        }
        totals[n] = sum(total);
        if (scaled) scale_by(scores[n], scales[1], seen);
    }

    int64_t i = 0;
    for (; WIDE > 2 && i + WIDE * LANES <= head_dim; i += WIDE * LANES)
        sum_values<N, WIDE>(pages.v, places, keys, scores, i, head_dim, sums);
    for (; WIDE > 1 && i + 2 * LANES <= head_dim; i += 2 * LANES)
        sum_values<N, 2>(pages.v, places, keys, scores, i, head_dim, sums);
    for (; i < head_dim; i += LANES) sum_values<N, 1>(pages.v, places, keys, scores, i, head_dim, sums);

    LUMINA_UNROLL
    for (int n = 0; n < N; ++n) {
        if (begin >= ends[n]) continue;
        float top = std::max(out[n].top, tops[n]);
        float shrink = std::exp(out[n].top - top), grow = std::exp(tops[n] - top);
        out[n].total = out[n].total * shrink + totals[n] * grow;
        out[n].top = top;
        for (i = 0; i < head_dim; i += LANES) {
            f32 before = begin ? load(out[n].sums + i) * all(shrink) : all(0);
            store(out[n].sums + i, fma(load(sums[n] + i), all(grow), before));
        }
    }
}

template <class T, class K>
static void attend(const Pages<K>& pages, const Lines& lines, const Tensor& q, const Tensor& out) {
    int64_t heads = q.shape[1], head_dim = q.shape[2], group = heads / pages.kv_heads;
    alignas(64) float queries[LINES][MAX_HEAD_DIM + LANES];
    Softmax softmax[LINES];
    f32 scale = all(1 / std::sqrt(static_cast<float>(head_dim)));
    int64_t places[LINES], last = 0;
    for (int64_t n = 0; n < lines.count; ++n) {
        int64_t line = lines.query + n;  // counted over the queries of the step, `group` a query
        places[n] = (line / group * heads + lines.head * group + line % group) * head_dim;
        for (int64_t i = 0; i < head_dim; i += LANES)
            store(queries[n] + i, load(q.as<T>() + places[n] + i, head_dim - i) * scale);
        last = std::max(last, lines.ends[n]);
    }
    for (int64_t begin = 0; begin < last; begin += KEYS) {
        int64_t end = std::min(last, begin + KEYS);
        auto run = lines.count == 1   ? attend_chunk<K, 1>
                   : lines.count == 2 ? attend_chunk<K, 2>
                   : lines.count == 3 ? attend_chunk<K, 3>
                                      : attend_chunk<K, 4>;
        run(pages, lines.head, queries, lines.ends, begin, end, softmax);
    }
    for (int64_t n = 0; n < lines.count; ++n)
        for (int64_t i = 0; i < head_dim; i += LANES)
            store(out.as<T>() + places[n] + i, load(softmax[n].sums + i) / all(softmax[n].total), head_dim - i);
}

template <class T, class K>
static void attend_rows(const Tensor& q, const Tensor* pages, const Tensor& tables, const Tensor& cu_seqlens,
                        const Tensor& seq_lens, const Tensor& out, int threads) {
    int64_t page_size = pages[0].shape[1], kv_heads = pages[0].shape[2], head_dim = q.shape[2], group = q.shape[1] / kv_heads, keys = 0;
    std::vector<Lines> blocks;  // of one head
    for (int64_t row = 0; row < seq_lens.shape[0]; ++row) {
        int64_t begin = cu_seqlens.as<int32_t>()[row] * group, end = cu_seqlens.as<int32_t>()[row + 1] * group;
        int64_t length = seq_lens.as<int32_t>()[row];
        for (int64_t line = begin; line < end; line += LINES) {
            Lines block{row, line, 0, std::min<int64_t>(LINES, end - line), {}};
            for (int64_t n = 0; n < block.count; ++n) block.ends[n] = length - (end - 1 - line - n) / group;
            keys += block.count * length;
            blocks.push_back(block);
        }
    }
    int64_t n = static_cast<int64_t>(blocks.size());
    // A thread takes some heads, so that long rows and short ones fall to all alike.
    parallel(n * kv_heads, threads_for(2 * keys * kv_heads * head_dim, threads), [&](int64_t first, int64_t last) {
        for (int64_t task = first; task < last; ++task) {
            Lines lines = blocks[task % n];
            lines.head = task / n;
            const int32_t* table = tables.as<int32_t>() + lines.row * tables.shape[1];
            Pages<K> own{pages[0].as<K>(), pages[2].as<K>(), pages[1].as<float>(), pages[3].as<float>(),
                         page_size,        kv_heads,         head_dim,             table};
            attend<T>(own, lines, q, out);
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
