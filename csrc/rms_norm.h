// RMSNorm, alone, with the residual addition in front, and with the addition behind.
//
//     h        = x / sqrt(mean(x^2) + eps)   rounded to the dtype
//     norm(x)  = weight * h                  rounded to the dtype
//
//     residual = residual + x, rounded to the dtype;  out = norm(residual)
//     residual = residual + norm(x)
//
// A token is a task. Bytes: 2, 4 and 3 rows read or written a token.

template <class T>
inline f32 rounded(f32 v) {
    if constexpr (std::is_same_v<T, float>) return v;
    T narrow[LANES];
    store(narrow, v);
    return load(narrow);
}

template <class T>
static void normalize(const T* x, const T* weight, float eps, int64_t hidden, T* out) {
    f32 squares = all(0);
    for (int64_t i = 0; i < hidden; i += LANES) {
        f32 v = load(x + i, hidden - i);
        squares = fma(v, v, squares);
    }
    f32 scale = all(1 / std::sqrt(sum(squares) / static_cast<float>(hidden) + eps));
    for (int64_t i = 0; i < hidden; i += LANES) {
        f32 h = rounded<T>(load(x + i, hidden - i) * scale);
        store(out + i, h * load(weight + i, hidden - i), hidden - i);
    }
}

template <class T>
static void add(const T* a, const T* b, int64_t n, T* sums) {
    for (int64_t i = 0; i < n; i += LANES) store(sums + i, load(a + i, n - i) + load(b + i, n - i), n - i);
}

template <class T>
static void rms_norm_rows(const Tensor& x, const Tensor& weight, float eps, const Tensor& out, int threads) {
    int64_t n = x.shape[0], hidden = x.shape[1];
    parallel(n, threads_for(n * hidden, threads), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row)
            normalize(x.as<T>() + row * hidden, weight.as<T>(), eps, hidden, out.as<T>() + row * hidden);
    });
}

static void rms_norm(const Tensor& x, const Tensor& weight, float eps, const Tensor& out, int threads) {
    DType dtype = expect_float("x", x);
    expect("x", x, dtype, {ANY, ANY});
    expect("weight", weight, dtype, {x.shape[1]});
    expect("out", out, dtype, {x.shape[0], x.shape[1]});
    (dtype == DType::f32 ? rms_norm_rows<float> : rms_norm_rows<bf16>)(x, weight, eps, out, threads);
}

template <class T>
static void add_rms_norm_rows(const Tensor& x, const Tensor& residual, const Tensor& weight, float eps,
                              const Tensor& out, const Tensor& sums, int threads) {
    int64_t n = x.shape[0], hidden = x.shape[1];
    parallel(n, threads_for(n * hidden, threads), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            T* total = sums.as<T>() + row * hidden;
            add(x.as<T>() + row * hidden, residual.as<T>() + row * hidden, hidden, total);
            normalize(total, weight.as<T>(), eps, hidden, out.as<T>() + row * hidden);
        }
    });
}

static void add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, float eps, const Tensor& out,
                         const Tensor& sums, int threads) {
    DType dtype = expect_float("x", x);
    expect("x", x, dtype, {ANY, ANY});
    expect("weight", weight, dtype, {x.shape[1]});
    for (auto [name, tensor] : {std::pair{"residual", &residual}, {"out", &out}, {"sums", &sums}})
        expect(name, *tensor, dtype, {x.shape[0], x.shape[1]});
    auto rows = dtype == DType::f32 ? add_rms_norm_rows<float> : add_rms_norm_rows<bf16>;
    rows(x, residual, weight, eps, out, sums, threads);
}

template <class T>
static void rms_norm_add_rows(const Tensor& x, const Tensor& residual, const Tensor& weight, float eps,
                              const Tensor& sums, int threads) {
    int64_t n = x.shape[0], hidden = x.shape[1];
    parallel(n, threads_for(n * hidden, threads), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            T* total = sums.as<T>() + row * hidden;
            normalize(x.as<T>() + row * hidden, weight.as<T>(), eps, hidden, total);
            add(total, residual.as<T>() + row * hidden, hidden, total);
        }
    });
}

static void rms_norm_add(const Tensor& x, const Tensor& residual, const Tensor& weight, float eps, const Tensor& sums,
                         int threads) {
    DType dtype = expect_float("x", x);
    expect("x", x, dtype, {ANY, ANY});
    expect("weight", weight, dtype, {x.shape[1]});
    for (auto [name, tensor] : {std::pair{"residual", &residual}, {"sums", &sums}})
        expect(name, *tensor, dtype, {x.shape[0], x.shape[1]});
    (dtype == DType::f32 ? rms_norm_add_rows<float> : rms_norm_add_rows<bf16>)(x, residual, weight, eps, sums, threads);
}
