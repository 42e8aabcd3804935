// LayerNorm of each head of q and k, then RoPE, in fp32 and rounded once; k and v go to their slots of the pages.
//
//     h    = (x - mean) / sqrt(var + 1e-5) * weight + bias
//     q, k = (h1 * cos - h2 * sin, h2 * cos + h1 * sin)     h1, h2: the halves of a head
//
// A head of a token is a task. Bytes: qkv once read, once written.

constexpr float QK_NORM_EPS = 1e-5f;
constexpr int64_t MAX_HEAD_DIM = 256;

// x: a head.  cos_sin: the row of its position.
template <class T>
static void norm_rope(const T* x, const T* weight, const T* bias, const T* cos_sin, int64_t head_dim, T* out) {
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

template <class T>
static void qk_norm_rope_heads(const Tensor& qkv, const Tensor* norms, const Tensor& rope, const Tensor& positions,
                               const Tensor& slots, const Tensor& k_pages, const Tensor& v_pages, const Tensor& q,
                               int threads) {
    int64_t n = qkv.shape[0], heads = q.shape[1], kv_heads = k_pages.shape[2], head_dim = q.shape[2];
    int64_t per_token = heads + 2 * kv_heads;
    parallel(n * per_token, threads_for(8 * n * per_token * head_dim, threads), [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            int64_t token = task / per_token, head = task % per_token;
            const T* x = qkv.as<T>() + task * head_dim;
            const T* cos_sin = rope.as<T>() + positions.as<int64_t>()[token] * head_dim;
            int64_t slot = slots.as<int64_t>()[token] * kv_heads;
            auto norm = [&](const Tensor* weight_bias, int64_t index, int64_t of, T* out) {
                int64_t row = index * weight_bias->shape[0] / of * head_dim;
                norm_rope(x, weight_bias[0].as<T>() + row, weight_bias[1].as<T>() + row, cos_sin, head_dim, out);
            };
            if (head < heads)
                norm(norms, head, heads, q.as<T>() + (token * heads + head) * head_dim);
            else if (head < heads + kv_heads)
                norm(norms + 2, head - heads, kv_heads, k_pages.as<T>() + (slot + head - heads) * head_dim);
            else
                std::copy(x, x + head_dim, v_pages.as<T>() + (slot + head - heads - kv_heads) * head_dim);
        }
    });
}

// norms: weight and bias of q, weight and bias of k.
static void qk_norm_rope(const Tensor& qkv, const Tensor* norms, const Tensor& rope, const Tensor& positions,
                         const Tensor& slots, const Tensor& k_pages, const Tensor& v_pages, const Tensor& q,
                         int threads) {
    DType dtype = expect_float("qkv", qkv);
    expect("qkv", qkv, dtype, {ANY, ANY});
    expect("k_pages", k_pages, dtype, {ANY, ANY, ANY, ANY});
    int64_t n = qkv.shape[0], pages = k_pages.shape[0], page_size = k_pages.shape[1], kv_heads = k_pages.shape[2];
    int64_t head_dim = k_pages.shape[3];
    expect("v_pages", v_pages, dtype, {pages, page_size, kv_heads, head_dim});
    expect(head_dim > 0 && head_dim % 2 == 0 && head_dim <= MAX_HEAD_DIM, "head_dim is not even, or above 256");
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
    expect_range("slots", slots, 0, pages * page_size);
    auto run = dtype == DType::f32 ? qk_norm_rope_heads<float> : qk_norm_rope_heads<bf16>;
    run(qkv, norms, rope, positions, slots, k_pages, v_pages, q, threads);
}
