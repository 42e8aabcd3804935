// Sixteen lanes of fp32 or int32, whatever the registers: one of AVX-512, two of AVX2, four of SSE or NEON.
//
// Included once for each instruction set, inside its namespace. Ops are written for sixteen lanes and for nothing else;
// what a set does better than plain vector code is in the few functions with an #if.

#if defined(LUMINA_AVX512)
constexpr int LEAF = 16;
#elif defined(LUMINA_AVX2)
constexpr int LEAF = 8;
#else
constexpr int LEAF = 4;
#endif
constexpr int LANES = 16;

// In front of a loop over sums that must stay in registers: a compiler leaves them in memory where it does not unroll.
#define LUMINA_UNROLL _Pragma("GCC unroll 16")

typedef float leaf_f32 __attribute__((vector_size(4 * LEAF)));
typedef int32_t leaf_i32 __attribute__((vector_size(4 * LEAF)));
typedef uint32_t leaf_u32 __attribute__((vector_size(4 * LEAF)));
typedef uint16_t leaf_u16 __attribute__((vector_size(2 * LEAF)));
typedef int8_t leaf_i8 __attribute__((vector_size(LEAF)));

// Two of something as one of twice the lanes.
template <class T>
struct Pair {
    T lo, hi;
};

template <class T, int N>
struct Wide {
    using type = Pair<typename Wide<T, N / 2>::type>;
};
template <class T>
struct Wide<T, LEAF> {
    using type = T;
};
using f32 = Wide<leaf_f32, LANES>::type;
using i32 = Wide<leaf_i32, LANES>::type;

#define LUMINA_BOTH(op) \
    template <class T>  \
    inline Pair<T> operator op(Pair<T> a, Pair<T> b) { \
        return {a.lo op b.lo, a.hi op b.hi};           \
    }
LUMINA_BOTH(+)
LUMINA_BOTH(-)
LUMINA_BOTH(*)
LUMINA_BOTH(/)
#undef LUMINA_BOTH

// Loads and stores.

template <class V>
struct Lanes {  // of a leaf
    static constexpr int N = LEAF;
};
template <class T>
struct Lanes<Pair<T>> {
    static constexpr int N = 2 * Lanes<T>::N;
};

// g++ 12 widens in several steps where a processor has one.
inline leaf_i32 widen(leaf_i8 v) {
#if defined(LUMINA_AVX512)
    return reinterpret_cast<leaf_i32>(_mm512_cvtepi8_epi32(reinterpret_cast<__m128i>(v)));
#elif defined(LUMINA_AVX2)
    return reinterpret_cast<leaf_i32>(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(reinterpret_cast<int64_t>(v))));
#else
    return __builtin_convertvector(v, leaf_i32);
#endif
}
inline leaf_u32 widen(leaf_u16 v) {
#if defined(LUMINA_AVX512)
    return reinterpret_cast<leaf_u32>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(v)));
#elif defined(LUMINA_AVX2)
    return reinterpret_cast<leaf_u32>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(v)));
#else
    return __builtin_convertvector(v, leaf_u32);
#endif
}

inline void load_leaf(leaf_f32& v, const float* p) { std::memcpy(&v, p, sizeof v); }
inline void load_leaf(leaf_i32& v, const int32_t* p) { std::memcpy(&v, p, sizeof v); }
inline void load_leaf(leaf_f32& v, const int8_t* p) {
    leaf_i8 narrow;
    std::memcpy(&narrow, p, sizeof narrow);
    v = __builtin_convertvector(widen(narrow), leaf_f32);
}
inline void load_leaf(leaf_f32& v, const bf16* p) {
    leaf_u16 narrow;
    std::memcpy(&narrow, p, sizeof narrow);
    v = reinterpret_cast<leaf_f32>(widen(narrow) << 16);
}
template <class T, class P>
inline void load_leaf(Pair<T>& v, const P* p) {
    load_leaf(v.lo, p);
    load_leaf(v.hi, p + Lanes<T>::N);
}

inline void store_leaf(float* p, leaf_f32 v) { std::memcpy(p, &v, sizeof v); }
inline void store_leaf(bf16* p, leaf_f32 v) {
#if defined(LUMINA_AVX512)
    // As below, but that what is below the smallest normal number becomes 0.
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
#else
    leaf_u32 bits = reinterpret_cast<leaf_u32>(v);
    leaf_u32 rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // to the nearest, ties to even
    leaf_u16 narrow = __builtin_convertvector(v == v ? rounded : leaf_u32{} + 0x7FC0, leaf_u16);
    std::memcpy(p, &narrow, sizeof narrow);
#endif
}
inline void store_leaf(int32_t* p, leaf_i32 v) { std::memcpy(p, &v, sizeof v); }
inline void store_leaf(int8_t* p, leaf_i32 v) {  // |v| < 128
#if defined(LUMINA_AVX512)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(v)));
#else
    leaf_i8 narrow = __builtin_convertvector(v, leaf_i8);
    std::memcpy(p, &narrow, sizeof narrow);
#endif
}
template <class T, class P>
inline void store_leaf(P* p, Pair<T> v) {
    store_leaf(p, v.lo);
    store_leaf(p + Lanes<T>::N, v.hi);
}

template <class P>
inline f32 load(const P* p) {
    f32 v;
    load_leaf(v, p);
    return v;
}
inline i32 load(const int32_t* p) {
    i32 v;
    load_leaf(v, p);
    return v;
}
template <class P, class V>
inline void store(P* p, V v) {
    store_leaf(p, v);
}

// The first n lanes, n > 0, all of them from 16 on; those beyond are 0 and are not touched in memory.
template <class P>
inline f32 load(const P* p, int64_t n) {
    if (n >= LANES) return load(p);
    P part[LANES] = {};
    std::copy(p, p + n, part);
    return load(part);
}
template <class P>
inline void store(P* p, f32 v, int64_t n) {
    if (n >= LANES) return store(p, v);
    P part[LANES];
    store(part, v);
    std::copy(part, part + n, p);
}

// Ask for a line of memory, into the second cache or into the first. A core has few places for lines that are on their
// way to its first cache: what is asked of memory takes them from all else, for as long as memory takes.
inline void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }
inline void prefetch_near(const void* p) { __builtin_prefetch(p, 0, 3); }

// Arithmetic.

// x - 0 is x whatever its sign, which a compiler may use; x + 0 is not.
inline void fill_leaf(leaf_f32& v, float x) { v = x - leaf_f32{}; }
inline void fill_leaf(leaf_i32& v, int32_t x) { v = leaf_i32{} + x; }
template <class T, class X>
inline void fill_leaf(Pair<T>& v, X x) {
    fill_leaf(v.lo, x);
    fill_leaf(v.hi, x);
}
inline f32 all(float x) {
    f32 v;
    fill_leaf(v, x);
    return v;
}
inline i32 all_i32(int32_t x) {
    i32 v;
    fill_leaf(v, x);
    return v;
}

inline leaf_f32 fma(leaf_f32 a, leaf_f32 b, leaf_f32 c) {  // a * b + c
#if defined(LUMINA_AVX512)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(LUMINA_AVX2)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}
// b where either is no number, as the instructions of x86 have it; g++ makes a comparison and a choice of the words.
inline leaf_f32 max(leaf_f32 a, leaf_f32 b) {
#if defined(LUMINA_AVX512)
    return _mm512_max_ps(a, b);
#elif defined(LUMINA_AVX2)
    return _mm256_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}
inline leaf_f32 min(leaf_f32 a, leaf_f32 b) {
#if defined(LUMINA_AVX512)
    return _mm512_min_ps(a, b);
#elif defined(LUMINA_AVX2)
    return _mm256_min_ps(a, b);
#else
    return a < b ? a : b;
#endif
}
inline leaf_f32 to_f32(leaf_i32 v) { return __builtin_convertvector(v, leaf_f32); }
inline leaf_i32 to_i32(leaf_f32 v) {  // to the nearest, ties to even; |v| < 2^22
    constexpr float MAGIC = 0x1.8p23f;
    return reinterpret_cast<leaf_i32>(v + MAGIC) - reinterpret_cast<leaf_i32>(leaf_f32{} + MAGIC);
}
inline leaf_f32 abs(leaf_f32 v) { return reinterpret_cast<leaf_f32>(reinterpret_cast<leaf_i32>(v) & 0x7FFFFFFF); }
inline leaf_f32 below_infinity(leaf_f32 v) { return v < INFINITY ? leaf_f32{} + 1.0f : leaf_f32{}; }  // 1 or 0

// e^v, to 2 units in the last place; 0 below the smallest normal number, infinite above 2.4e38.
inline leaf_f32 exp(leaf_f32 v) {
    leaf_f32 x = min(max(v, leaf_f32{} - 87.33654f), leaf_f32{} + 88.37626f);
    leaf_i32 n = to_i32(x * 1.44269504f);
    leaf_f32 whole = to_f32(n);
    leaf_f32 r = fma(whole, leaf_f32{} - 0.693359375f, x);
    r = fma(whole, leaf_f32{} + 2.12194440e-4f, r);
    leaf_f32 p = leaf_f32{} + 1.9875691500e-4f;
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = fma(p, r, leaf_f32{} + c);
    p = fma(p * r, r, r + 1.0f);
    leaf_f32 power = reinterpret_cast<leaf_f32>((n + 127) << 23);
    leaf_f32 out = p * power;
    out = v < -87.33654f ? leaf_f32{} : out;
    out = v > 88.37626f ? leaf_f32{} + INFINITY : out;
    return v == v ? out : v;
}

// The natural logarithm of a positive normal number, to 2 units in the last place.
inline leaf_f32 log(leaf_f32 v) {
    leaf_i32 bits = reinterpret_cast<leaf_i32>(v);
    leaf_i32 n = (bits - 0x3F3504F3) >> 23;  // so that the mantissa is in [sqrt(1/2), sqrt(2))
    leaf_f32 x = reinterpret_cast<leaf_f32>(bits - (n << 23)) - 1.0f;
    leaf_f32 p = leaf_f32{} + 7.0376836292e-2f;
    for (float c : {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f,
                    2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f})
        p = fma(p, x, leaf_f32{} + c);
    leaf_f32 whole = to_f32(n), square = x * x;
    leaf_f32 tail = fma(whole, leaf_f32{} - 2.12194440e-4f, p * x * square);
    tail = fma(square, leaf_f32{} - 0.5f, tail);
    return fma(whole, leaf_f32{} + 0.693359375f, x + tail);
}

#define LUMINA_EACH(name) \
    template <class T>    \
    inline auto name(Pair<T> v)->Pair<decltype(name(v.lo))> { \
        return {name(v.lo), name(v.hi)};                      \
    }
LUMINA_EACH(to_f32)
LUMINA_EACH(to_i32)
LUMINA_EACH(abs)
LUMINA_EACH(below_infinity)
LUMINA_EACH(exp)
LUMINA_EACH(log)
#undef LUMINA_EACH
template <class T>
inline Pair<T> max(Pair<T> a, Pair<T> b) {
    return {max(a.lo, b.lo), max(a.hi, b.hi)};
}
template <class T>
inline Pair<T> fma(Pair<T> a, Pair<T> b, Pair<T> c) {
    return {fma(a.lo, b.lo, c.lo), fma(a.hi, b.hi, c.hi)};
}

// All lanes into one, halves onto each other: the same order on every instruction set.
template <int STEP = LEAF / 2, class Join>
inline float join_lanes(leaf_f32 v, Join join) {
    leaf_i32 from;
    for (int i = 0; i < LEAF; ++i) from[i] = i ^ STEP;
    v = join(v, __builtin_shuffle(v, from));
    if constexpr (STEP > 1)
        return join_lanes<STEP / 2>(v, join);
    else
        return v[0];
}
template <class T, class Join>
inline float join_lanes(Pair<T> v, Join join) {
    return join_lanes(join(v.lo, v.hi), join);
}
inline float sum(f32 v) {
    return join_lanes(v, [](auto a, auto b) { return a + b; });
}
inline float largest(f32 v) {
    return join_lanes(v, [](auto a, auto b) { return max(a, b); });
}

// Run `body(begin, end)` on `threads` threads, on shares of n as even as can be. One thread makes no parallel region.
template <class Body>
inline void parallel(int64_t n, int threads, Body body) {
    if (threads <= 1 || n <= 1) return body(int64_t{0}, n);
#pragma omp parallel num_threads(threads)
    {
        int64_t team = omp_get_num_threads(), mine = omp_get_thread_num();
        body(n * mine / team, n * (mine + 1) / team);
    }
}

// Work that is not worth a second thread: waking it takes some microseconds.
inline int threads_for(int64_t operations, int threads) { return operations < 32768 ? 1 : threads; }
