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

template <class T>
struct Pages {
    const T *k, *v;
    int64_t page_size, kv_heads, head_dim;
    const int32_t* table;  // of the row

    // Where the keys `begin` to `end` of a head lie, and their values.
    void find(int64_t head, int64_t begin, int64_t end, int64_t* places) const {
        int64_t page = begin / page_size, offset = begin % page_size;
        for (int64_t key = begin; key < end; ++key) {
            *places++ = ((table[page] * page_size + offset) * kv_heads + head) * head_dim;
            if (++offset == page_size) offset = 0, ++page;
        }
    }
};

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

// Sums of the values of some keys by N lines of weights, for WIDE vectors of a head from `i` on.
template <int N, int WIDE, class T>
inline void sum_values(const T* v, const int64_t* places, int64_t keys, const float (*weights)[KEYS], int64_t i,
                       int64_t head_dim, float (*out)[MAX_HEAD_DIM + LANES]) {
    f32 sums[N][WIDE] = {};
    for (int64_t j = 0; j < keys; ++j)
        LUMINA_UNROLL
        for (int w = 0; w < WIDE; ++w) {
            f32 value = load(v + places[j] + i + w * LANES, head_dim - i - w * LANES);
            LUMINA_UNROLL
            for (int n = 0; n < N; ++n) sums[n][w] = fma(all(weights[n][j]), value, sums[n][w]);
        }
    LUMINA_UNROLL
    for (int n = 0; n < N; ++n)
        LUMINA_UNROLL
        for (int w = 0; w < WIDE; ++w) store(out[n] + i + w * LANES, sums[n][w]);
}

template <class T, int N>
static void attend_chunk(const Pages<T>& pages, int64_t kv_head, const float (*q)[MAX_HEAD_DIM + LANES],
                         const int64_t* ends, int64_t begin, int64_t end, Softmax* out) {
    constexpr int WIDE = LINES / N;
    int64_t head_dim = pages.head_dim, keys = end - begin, places[KEYS];
    alignas(64) float scores[N][KEYS], sums[N][MAX_HEAD_DIM + LANES];
    pages.find(kv_head, begin, end, places);
    int64_t j = 0;
    auto row = [&](int64_t key) { return reinterpret_cast<float(*)[KEYS]>(&scores[0][key]); };
    for (; j + WIDE <= keys; j += WIDE) dot_keys<N, WIDE>(pages.k, places + j, q, head_dim, row(j));
    for (; j < keys; ++j) dot_keys<N, 1>(pages.k, places + j, q, head_dim, row(j));

    int64_t padded = (keys + LANES - 1) / LANES * LANES;
    float tops[N], totals[N];
    LUMINA_UNROLL
    for (int n = 0; n < N; ++n) {
        int64_t seen = std::clamp<int64_t>(ends[n] - begin, 0, keys);
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

template <class T>
static void attend(const Pages<T>& pages, const Lines& lines, const Tensor& q, const Tensor& out) {
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
        auto run = lines.count == 1   ? attend_chunk<T, 1>
                   : lines.count == 2 ? attend_chunk<T, 2>
                   : lines.count == 3 ? attend_chunk<T, 3>
                                      : attend_chunk<T, 4>;
        run(pages, lines.head, queries, lines.ends, begin, end, softmax);
    }
    for (int64_t n = 0; n < lines.count; ++n)
        for (int64_t i = 0; i < head_dim; i += LANES)
            store(out.as<T>() + places[n] + i, load(softmax[n].sums + i) / all(softmax[n].total), head_dim - i);
}

template <class T>
static void attend_rows(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages, const Tensor& tables,
                        const Tensor& cu_seqlens, const Tensor& seq_lens, const Tensor& out, int threads) {
    int64_t kv_heads = k_pages.shape[2], head_dim = q.shape[2], group = q.shape[1] / kv_heads, keys = 0;
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
            Pages<T> pages{k_pages.as<T>(), v_pages.as<T>(), k_pages.shape[1], kv_heads, head_dim, table};
            attend(pages, lines, q, out);
        }
    });
}

static void paged_attention(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages, const Tensor& tables,
                            const Tensor& cu_seqlens, const Tensor& seq_lens, const Tensor& out, int threads) {
    DType dtype = expect_float("q", q);
    expect("q", q, dtype, {ANY, ANY, ANY});
    int64_t n = q.shape[0], heads = q.shape[1], head_dim = q.shape[2];
    expect("k_pages", k_pages, dtype, {ANY, ANY, ANY, head_dim});
    int64_t page_size = k_pages.shape[1], kv_heads = k_pages.shape[2];
    expect("v_pages", v_pages, dtype, {k_pages.shape[0], page_size, kv_heads, head_dim});
    expect(head_dim > 0 && head_dim <= MAX_HEAD_DIM, "head_dim is above 256");
    expect(page_size > 0 && kv_heads > 0 && heads % kv_heads == 0, "the key-value heads do not divide the heads");
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
        expect_range("block_tables", used, 0, k_pages.shape[0]);
    }
    auto run = dtype == DType::f32 ? attend_rows<float> : attend_rows<bf16>;
    run(q, k_pages, v_pages, tables, cu_seqlens, seq_lens, out, threads);
}
