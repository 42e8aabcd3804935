// SwiGLU: silu(gate) * up, where a row holds gate, then up. silu is rounded to the dtype before it is multiplied.
//
// Shares of all elements are tasks. Bytes: 3 halves of a row a token.

template <class T>
static void silu_mul_rows(const Tensor& gate_up, const Tensor& out, int threads) {
    int64_t n = gate_up.shape[0], width = gate_up.shape[1] / 2, n_blocks = (width + LANES - 1) / LANES;
    parallel(n * n_blocks, threads_for(4 * n * width, threads), [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            int64_t row = task / n_blocks, i = task % n_blocks * LANES;
            const T* gate = gate_up.as<T>() + 2 * row * width + i;
            f32 g = load(gate, width - i), up = load(gate + width, width - i);
            f32 silu = rounded<T>(g / (all(1) + exp(all(0) - g)));
            store(out.as<T>() + row * width + i, silu * up, width - i);
        }
    });
}

static void silu_mul(const Tensor& gate_up, const Tensor& out, int threads) {
    DType dtype = expect_float("gate_up", gate_up);
    expect("gate_up", gate_up, dtype, {ANY, ANY});
    expect(gate_up.shape[1] % 2 == 0, "gate_up has an odd number of columns; expected two halves");
    expect("out", out, dtype, {gate_up.shape[0], gate_up.shape[1] / 2});
    (dtype == DType::f32 ? silu_mul_rows<float> : silu_mul_rows<bf16>)(gate_up, out, threads);
}
