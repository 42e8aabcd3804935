// LayerNorm of each head of q and k, then RoPE, in fp32 and rounded once; k and v go to their slots of the pages.
//
//     h    = (x - mean) / sqrt(var + 1e-5) * weight + bias
//     q, k = (h1 * cos - h2 * sin, h2 * cos + h1 * sin)     h1, h2: the halves of a head
//
// A head of a token is a task. Bytes: qkv once read, once written. In int8 a head of k or v is its largest magnitude over
// 127, and the nearest steps of it.

constexpr float QK_NORM_EPS = 1e-5f;
constexpr int64_t MAX_HEAD_DIM = 256;

// x: a head.  cos_sin: the row of its position.
template <class T, class Out>
static void norm_rope(const T* x, const T* weight, const T* bias, const T* cos_sin, int64_t head_dim, Out* out) {
    float h[MAX_HEAD_DIM + LANES];
    f32 total = all(0);
    for (int64_t i = 0; i < head_dim; i += LANES) total = total + load(x + i, head_dim - i);
    float mean = sum(total) / static_cast<float>(head_dim);
    f32 squares = all(0);
    for (int64_t i = 0; i < head_dim; i += LANES) {
        f32 v = load(x + i, head_dim - i) - all(mean);
        store(h + i, v);
        if (head_dim - i < LANES) std::fill(h + head_dim, h + i + LANES, 0.0f);
        v = load(h + i);
        squares = fma(v, v, squares);
    }
    f32 scale = all(1 / std::sqrt(sum(squares) / static_cast<float>(head_dim) + QK_NORM_EPS));
    for (int64_t i = 0; i < head_dim; i += LANES)
        store(h + i, fma(load(h + i) * scale, load(weight + i, head_dim - i), load(bias + i, head_dim - i)));
    int64_t half = head_dim / 2;
    for (int64_t i = 0; i < half; i += LANES) {
        f32 cos = load(cos_sin + i, half - i), sin = load(cos_sin + half + i, half - i);
        f32 first = load(h + i, half - i), second = load(h + half + i, half - i);
        store(out + i, first * cos - second * sin, half - i);
        store(out + half + i, second * cos + first * sin, half - i);
    }
}

// Keep a head as `Out` does: rounded to the model's dtype, or in int8 with a scale.
template <class Out>
static void keep_head(const float* h, int64_t head_dim, Out* out, float* scale) {
    if constexpr (!std::is_same_v<Out, int8_t>) {
        for (int64_t i = 0; i < head_dim; i += LANES) store(out + i, load(h + i, head_dim - i), head_dim - i);
    } else {
        f32 top = all(0);
        for (int64_t i = 0; i < head_dim; i += LANES) top = max(abs(load(h + i, head_dim - i)), top);
        *scale = largest(top) / 127;
        for (int64_t i = 0; i < head_dim; i += LANES) {
            int32_t steps[LANES] = {};
            if (*scale > 0) store(steps, to_i32(load(h + i, head_dim - i) / all(*scale)));
            for (int64_t j = 0; j < std::min<int64_t>(LANES, head_dim - i); ++j)
                out[i + j] = static_cast<int8_t>(steps[j]);
        }
    }
}

template <class T, class Kept>
static void qk_norm_rope_heads(const Tensor& qkv, const Tensor* norms, const Tensor& rope, const Tensor& positions,
                               const Tensor& slots, const Tensor* pages, const Tensor& q, int threads) {
    int64_t n = qkv.shape[0], heads = q.shape[1], kv_heads = pages[0].shape[2], head_dim = q.shape[2];
    int64_t per_token = heads + 2 * kv_heads;
    parallel(n * per_token, threads_for(8 * n * per_token * head_dim, threads), [&](int64_t begin, int64_t end) {
        alignas(64) float h[MAX_HEAD_DIM + LANES];
        for (int64_t task = begin; task < end; ++task) {
            int64_t token = task / per_token, head = task % per_token;
            const T* x = qkv.as<T>() + task * head_dim;
            const T* cos_sin = rope.as<T>() + positions.as<int64_t>()[token] * head_dim;
            auto norm = [&](const Tensor* weight_bias, int64_t index, int64_t of, auto* out) {
                int64_t row = index * weight_bias->shape[0] / of * head_dim;
                norm_rope(x, weight_bias[0].as<T>() + row, weight_bias[1].as<T>() + row, cos_sin, head_dim, out);
            };
            if (head < heads) {
                norm(norms, head, heads, q.as<T>() + (token * heads + head) * head_dim);
                continue;
            }
            bool is_key = head < heads + kv_heads;
            int64_t kv_head = (head - heads) % kv_heads;
            if (is_key)
                norm(norms + 2, kv_head, kv_heads, h);
            else
                for (int64_t i = 0; i < head_dim; i += LANES) store(h + i, load(x + i, head_dim - i), head_dim - i);
            int64_t place = slots.as<int64_t>()[token] * kv_heads + kv_head;
            const Tensor* kept = is_key ? pages : pages + 2;
            keep_head(h, head_dim, kept[0].as<Kept>() + place * head_dim, kept[1].as<float>() + place);
        }
    });
}

// Check the pages of an op; return whether they are in int8.
static bool expect_pages(const Tensor* pages, DType dtype) {
    bool int8 = pages[0].dtype == DType::i8;
    if (int8) dtype = DType::i8;
    expect("k_pages", pages[0], dtype, {ANY, ANY, ANY, ANY});
    const int64_t* shape = pages[0].shape;
    expect(shape[1] > 0 && shape[2] > 0, "pages have no tokens or no heads");
    expect(shape[3] > 0 && shape[3] % 2 == 0 && shape[3] <= MAX_HEAD_DIM, "head_dim is not even, or above 256");
    expect("v_pages", pages[2], dtype, {shape[0], shape[1], shape[2], shape[3]});
    for (int i : {1, 3}) {
        if (int8)
            expect("scales of pages", pages[i], DType::f32, {shape[0], shape[1], shape[2]});
        else
            expect("scales of pages", pages[i], DType::f32, {0});
    }
    return int8;
}

static void qk_norm_rope(const Tensor& qkv, const Tensor* norms, const Tensor& rope, const Tensor& positions,
                         const Tensor& slots, const Tensor* pages, const Tensor& q, int threads) {
    DType dtype = expect_float("qkv", qkv);
    bool int8 = expect_pages(pages, dtype);
    int64_t n = qkv.shape[0], kv_heads = pages[0].shape[2], head_dim = pages[0].shape[3];
    expect("q", q, dtype, {n, ANY, head_dim});
    int64_t heads = q.shape[1];
    expect("qkv", qkv, dtype, {n, (heads + 2 * kv_heads) * head_dim});
    for (int i = 0; i < 4; ++i) {
        expect("a QK-norm", norms[i], dtype, {norms[i / 2 * 2].shape[0], head_dim});
        int64_t of = i < 2 ? heads : kv_heads;
        expect(norms[i].shape[0] > 0 && of % norms[i].shape[0] == 0, "the rows of a QK-norm do not divide its heads");
    }
    expect("rope", rope, dtype, {ANY, head_dim});
    expect("positions", positions, DType::i64, {n});
    expect("slots", slots, DType::i64, {n});
    expect_range("positions", positions, 0, rope.shape[0]);
    expect_range("slots", slots, 0, pages[0].shape[0] * pages[0].shape[1]);
    auto run = dtype == DType::f32 ? int8 ? qk_norm_rope_heads<float, int8_t> : qk_norm_rope_heads<float, float>
               : int8              ? qk_norm_rope_heads<bf16, int8_t>
                                   : qk_norm_rope_heads<bf16, bf16>;
    run(qkv, norms, rope, positions, slots, pages, q, threads);
}
