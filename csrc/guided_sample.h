// Guidance, temperature, top-k, top-p, min-p and a draw by Gumbel noise, in a few passes over one row of scores.
//
//     scores = (uncond + guidance * (cond - uncond)) / temperature
//     draw   = argmax over the kept of scores - log(-log(u(seed, image, position, token)))
//
// What is kept is what reaches a threshold, found by radix: no sorting. A draw is a task.

// Order-preserving: larger floats have larger keys.
inline uint32_t key_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
inline float value_of(uint32_t key) {
    uint32_t bits = key & 0x80000000u ? key & 0x7FFFFFFFu : ~key;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// The largest value of which the weights of all values as large, or larger, add up to `target`; the smallest of all
// where none does.  weight: called with an index.
template <class Weight>
static float reach(const float* values, int64_t n, double target, Weight weight) {
    uint32_t prefix = 0;
    for (int shift : {21, 10, 0}) {
        int bits = shift == 0 ? 10 : 11;
        double found[2048] = {};
        bool seen[2048] = {};
        for (int64_t i = 0; i < n; ++i) {
            uint32_t key = key_of(values[i]);
            if (shift < 21 && key >> (shift + bits) != prefix) continue;
            uint32_t bin = key >> shift & ((1u << bits) - 1);
            found[bin] += weight(i);
            seen[bin] = true;
        }
        int bin = -1;
        for (int b = (1 << bits) - 1; b >= 0; --b) {
            if (!seen[b]) continue;
            bin = b;
            if (found[b] >= target) break;
            target -= found[b];
        }
        // Rounding can leave the last bin short of what is left; then all of it is in.
        prefix = prefix << bits | static_cast<uint32_t>(bin);
    }
    return value_of(prefix);
}

struct NoiseKey {
    int64_t seed, image, position;
};

// Gumbel noise of 16 tokens: Philox4x32-10 of (token / 4, position, image, 0), word token % 4.
static void gumbel(const NoiseKey& key, const int64_t* tokens, float* out) {
    uint32_t c0[LANES], c1[LANES], c2[LANES], c3[LANES];
    for (int i = 0; i < LANES; ++i) {
        c0[i] = static_cast<uint32_t>(tokens[i] >> 2), c1[i] = static_cast<uint32_t>(key.position);
        c2[i] = static_cast<uint32_t>(key.image), c3[i] = 0;
    }
    uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
    for (int round = 0; round < 10; ++round) {
        for (int i = 0; i < LANES; ++i) {
            uint64_t left = uint64_t{c0[i]} * 0xD2511F53u, right = uint64_t{c2[i]} * 0xCD9E8D57u;
            c0[i] = static_cast<uint32_t>(right >> 32) ^ c1[i] ^ k0, c1[i] = static_cast<uint32_t>(right);
            c2[i] = static_cast<uint32_t>(left >> 32) ^ c3[i] ^ k1, c3[i] = static_cast<uint32_t>(left);
        }
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    float u[LANES];
    for (int i = 0; i < LANES; ++i) {
        const uint32_t words[4] = {c0[i], c1[i], c2[i], c3[i]};
        u[i] = std::min(static_cast<float>(words[tokens[i] & 3]) * 0x1p-32f + 0x1p-33f, 1 - 0x1p-24f);
    }
    // log1p(-u) is log(w) * -u / (w - 1) for w = 1 - u as rounded, and -u where w rounds to 1.
    float exponential[LANES];
    f32 v = load(u), w = all(1) - v;
    store(exponential, log(w) * v / (w - all(1)));
    for (int i = 0; i < LANES; ++i)
        if (1 - u[i] == 1) exponential[i] = u[i];
    store(out, all(0) - log(load(exponential)));
}

// More than the noise of two tokens can differ by: u lies in [2^-33, 1 - 2^-24], so noise in [-3.2, 16.7]. What is that
// far below the top is never drawn, and needs no noise of its own.
constexpr float NOISE_SPREAD = 20;

struct DrawControls {
    float guidance, temperature, top_p, min_p;
    int64_t top_k;
};

// Column of the draw; -1 where the scores are not finite.
template <class T>
static int64_t draw(const T* cond, const T* uncond, const int64_t* token_ids, int64_t columns, const DrawControls& c,
                    const NoiseKey& key, std::vector<float>& scores, std::vector<float>& weights,
                    std::vector<int32_t>& kept) {
    scores.resize(columns + LANES);
    float temperature = c.temperature > 0 ? c.temperature : 1;
    f32 top_lanes = all(-INFINITY), sound = all(1);
    for (int64_t i = 0; i < columns; i += LANES) {
        f32 score = load(cond + i, columns - i);
        if (uncond != cond) {
            f32 base = load(uncond + i, columns - i);
            score = base + all(c.guidance) * (score - base);
        }
        score = score / all(temperature);
        if (columns - i < LANES) {
            store(&scores[i], score);
            std::fill(&scores[columns], &scores[i] + LANES, -INFINITY);
            score = load(&scores[i]);
        }
        top_lanes = max(score, top_lanes);
        sound = sound * below_infinity(score);
        store(&scores[i], score);
    }
    float top = largest(top_lanes);
    if (sum(sound) < LANES || top == -INFINITY) return -1;
    if (c.temperature <= 0) return std::find(scores.begin(), scores.end(), top) - scores.begin();

    float threshold = -INFINITY;
    int64_t k = c.top_k > 0 ? std::min(c.top_k, columns) : columns;
    if (k < columns) threshold = reach(scores.data(), columns, static_cast<double>(k), [](int64_t) { return 1.0; });
    if (c.top_p < 1) {
        // Of what ties with the last of the top k, only as many as fit into k have mass.
        weights.resize(columns + LANES);
        int64_t above = 0, equal = 0;
        for (int64_t i = 0; i < columns; ++i) above += scores[i] > threshold, equal += scores[i] == threshold;
        float share = k < columns ? static_cast<float>(k - above) / static_cast<float>(equal) : 1;
        for (int64_t i = 0; i < columns; i += LANES) store(&weights[i], exp(load(&scores[i]) - all(top)));
        double mass = 0;
        for (int64_t i = 0; i < columns; ++i) {
            weights[i] = scores[i] > threshold ? weights[i] : scores[i] == threshold ? weights[i] * share : 0;
            mass += weights[i];
        }
        float border = reach(scores.data(), columns, c.top_p * mass, [&](int64_t i) { return double{weights[i]}; });
        threshold = std::max(threshold, border);
    }
    threshold = std::max(threshold, top + std::log(c.min_p));
    threshold = std::max(threshold, top - NOISE_SPREAD);

    kept.clear();
    for (int64_t i = 0; i < columns; ++i)
        if (scores[i] >= threshold && scores[i] > -INFINITY) kept.push_back(static_cast<int32_t>(i));
    int64_t n = static_cast<int64_t>(kept.size()), best = -1;
    float best_score = -INFINITY;
    for (int64_t i = 0; i < n; i += LANES) {
        int64_t tokens[LANES] = {}, count = std::min<int64_t>(LANES, n - i);
        for (int64_t j = 0; j < count; ++j) tokens[j] = token_ids[kept[i + j]];
        float noise[LANES];
        gumbel(key, tokens, noise);
        for (int64_t j = 0; j < count; ++j) {
            float score = scores[kept[i + j]] + noise[j];
            if (score > best_score) best_score = score, best = kept[i + j];
        }
    }
    return best;
}

template <class T>
static void draw_all(const Tensor& logits, const Tensor& cond, const Tensor& uncond, const Tensor& token_ids,
                     const Tensor* controls, const Tensor* keys, const Tensor& out, int threads) {
    int64_t m = cond.shape[0], columns = logits.shape[1];
    parallel(m, threads_for(8 * m * columns, threads), [&](int64_t begin, int64_t end) {
        std::vector<float> scores, weights;
        std::vector<int32_t> kept;
        for (int64_t i = begin; i < end; ++i) {
            DrawControls c{controls[0].as<float>()[i], controls[1].as<float>()[i], controls[3].as<float>()[i],
                           controls[4].as<float>()[i], controls[2].as<int64_t>()[i]};
            NoiseKey key{keys[0].as<int64_t>()[i], keys[1].as<int64_t>()[i], keys[2].as<int64_t>()[i]};
            const int64_t* ids = token_ids.as<int64_t>();
            int64_t column = draw(logits.as<T>() + cond.as<int64_t>()[i] * columns,
                                  logits.as<T>() + uncond.as<int64_t>()[i] * columns, ids, columns, c, key, scores,
                                  weights, kept);
            out.as<int64_t>()[i] = column < 0 ? -1 : ids[column];
        }
    });
}

// controls: guidance, temperature, top_k, top_p, min_p.  keys: seed, image, position.
static void guided_sample(const Tensor& logits, const Tensor& cond, const Tensor& uncond, const Tensor& token_ids,
                          const Tensor* controls, const Tensor* keys, const Tensor& out, int threads) {
    DType dtype = expect_float("logits", logits);
    expect("logits", logits, dtype, {ANY, ANY});
    expect("cond", cond, DType::i64, {ANY});
    int64_t m = cond.shape[0];
    expect("uncond", uncond, DType::i64, {m});
    expect("token_ids", token_ids, DType::i64, {logits.shape[1]});
    for (int i = 0; i < 5; ++i) expect("a control", controls[i], i == 2 ? DType::i64 : DType::f32, {m});
    for (int i = 0; i < 3; ++i) expect("a noise key", keys[i], DType::i64, {m});
    expect("out", out, DType::i64, {m});
    expect_range("cond", cond, 0, logits.shape[0]);
    expect_range("uncond", uncond, 0, logits.shape[0]);
    auto run = dtype == DType::f32 ? draw_all<float> : draw_all<bf16>;
    run(logits, cond, uncond, token_ids, controls, keys, out, threads);
}
