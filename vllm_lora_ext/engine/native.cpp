// Adds B(Ax) to the rows of y that have an adapter, each row with its own adapter.
//
// A row's result is computed in one fixed order: 16 partial sums over the input
// features, one fixed tree over them, then the ranks one after the other. It
// depends on the row and on its adapter only, never on which or how many other
// rows are in the batch, so a neighbour's adapter cannot change a bit of it.
// Rows without an adapter are not in the list of rows and are never touched.
//
// Plain C++ with vector extensions: no torch headers, so it builds in seconds.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;       // float32 numbers in one vector
constexpr int TILE_ROWS = 4;    // rows x (ranks or vectors of y) held in registers
constexpr int TILE_WIDTH = 4;
constexpr int ROW_BLOCK = 128;  // rows in one piece of work
constexpr int WIDEN_ROWS = 12;  // from here on it pays to convert B first
constexpr int RANK_BLOCK = 8;   // ranks in one piece of the first product
constexpr int OUT_BLOCK = 512;  // output features in one piece of the second
constexpr int LONG_OUT_BLOCK = 2432;  // the same with many rows: memory likes long runs

typedef float Vec __attribute__((vector_size(64)));
typedef uint32_t UVec __attribute__((vector_size(64)));
typedef int32_t IVec __attribute__((vector_size(64)));
typedef uint16_t HVec __attribute__((vector_size(32)));

struct BFloat16 {
    uint16_t bits;
};

inline Vec load(const float* source) {
    Vec value;
    std::memcpy(&value, source, sizeof value);
    return value;
}

inline Vec load(const BFloat16* source) {
    HVec half;
    std::memcpy(&half, source, sizeof half);
    return (Vec)(__builtin_convertvector(half, UVec) << 16);
}

inline void store(float* target, Vec value) { std::memcpy(target, &value, sizeof value); }

// Round to nearest, ties to even; a NaN stays one.
inline void store(BFloat16* target, Vec value) {
#ifdef __AVX512BF16__
    __m256bh half = _mm512_cvtneps_pbh((__m512)value);
    std::memcpy(target, &half, sizeof half);
#else
    UVec bits = (UVec)value;
    UVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    UVec quiet = (bits >> 16) | 0x40;
    UVec is_nan = (UVec)(value != value);
    HVec half = __builtin_convertvector((is_nan & quiet) | (~is_nan & rounded), HVec);
    std::memcpy(target, &half, sizeof half);
#endif
}

inline float widen(float value) { return value; }

inline float widen(BFloat16 value) {
    uint32_t bits = (uint32_t)value.bits << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

// `count` numbers, padded with zeros.
template <typename T>
inline Vec load_some(const T* source, int count) {
    T padded[LANES] = {};
    std::memcpy(padded, source, count * sizeof(T));
    return load(padded);
}

inline float sum(Vec value) {
    float lanes[LANES];
    std::memcpy(lanes, &value, sizeof lanes);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
}

}  // namespace

extern "C" {

// One adapter's weights for one slice of a module: A is (rank, in), B is (rank, out),
// each with its distance between rows in elements. rank 0: the adapter has nothing here.
struct Weights {
    const void* a;
    const void* b;
    int64_t a_stride;
    int64_t b_stride;
    int64_t rank;
};

// A module of the model; `weights` is (slots, slices). Slice s of y is [offset[s], offset[s + 1]).
struct Module {
    int64_t in_features;
    int64_t slices;
    const int64_t* offset;
    const Weights* weights;
};

// The rows of a step that have an adapter, grouped: group g has slot[g] and the rows
// row[start[g]] to row[start[g + 1] - 1].
struct Step {
    int64_t groups;
    const int32_t* slot;
    const int32_t* start;
    const int32_t* row;
};
}

namespace {

struct Piece {
    int32_t group, slice, first_row, rows, first, count;
    int64_t low_rank;  // where the group's numbers of this slice begin in the buffer
};

// The part of a dot product that goes by whole vectors; returns how many features it took.
template <typename T, int ROWS, int RANKS>
inline int64_t dot_whole(const T* const* x, const T* a, int64_t a_stride, int64_t in_features,
                         Vec (&part)[ROWS][RANKS]) {
    int64_t i = 0;
    for (; i + LANES <= in_features; i += LANES) {
        Vec weight[RANKS];
        for (int k = 0; k < RANKS; k++) weight[k] = load(a + k * a_stride + i);
        for (int r = 0; r < ROWS; r++) {
            Vec value = load(x[r] + i);
            for (int k = 0; k < RANKS; k++) part[r][k] += value * weight[k];
        }
    }
    return i;
}

#ifdef __AVX512BF16__
// Two products per lane in one instruction, and no conversion.
template <int ROWS, int RANKS>
inline int64_t dot_whole(const BFloat16* const* x, const BFloat16* a, int64_t a_stride,
                         int64_t in_features, Vec (&part)[ROWS][RANKS]) {
    int64_t i = 0;
    for (; i + 2 * LANES <= in_features; i += 2 * LANES) {
        __m512bh weight[RANKS];
        for (int k = 0; k < RANKS; k++)
            weight[k] = (__m512bh)_mm512_loadu_si512(a + k * a_stride + i);
        for (int r = 0; r < ROWS; r++) {
            __m512bh value = (__m512bh)_mm512_loadu_si512(x[r] + i);
            for (int k = 0; k < RANKS; k++)
                part[r][k] = (Vec)_mm512_dpbf16_ps((__m512)part[r][k], value, weight[k]);
        }
    }
    return i;
}
#endif

// low_rank[row][rank] = x[row] . A[rank]
template <typename T, int ROWS, int RANKS>
inline void shrink_tile(const T* const* x, const T* a, int64_t a_stride, int64_t in_features,
                        float* low_rank, int64_t low_rank_stride) {
    Vec part[ROWS][RANKS] = {};
    for (int64_t i = dot_whole(x, a, a_stride, in_features, part); i < in_features; i += LANES) {
        int rest = (int)std::min<int64_t>(LANES, in_features - i);
        Vec weight[RANKS];
        for (int k = 0; k < RANKS; k++) weight[k] = load_some(a + k * a_stride + i, rest);
        for (int r = 0; r < ROWS; r++) {
            Vec value = load_some(x[r] + i, rest);
            for (int k = 0; k < RANKS; k++) part[r][k] += value * weight[k];
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int k = 0; k < RANKS; k++) low_rank[r * low_rank_stride + k] = sum(part[r][k]);
}

// y[row] += low_rank[row] . B for VECTORS x 16 output features
template <typename T, typename B, int ROWS, int VECTORS>
inline void expand_tile(T* const* y, const B* b, int64_t b_stride, int64_t rank,
                        const float* low_rank, int64_t low_rank_stride) {
    Vec part[ROWS][VECTORS] = {};
    for (int64_t k = 0; k < rank; k++) {
        Vec weight[VECTORS];
        for (int v = 0; v < VECTORS; v++) weight[v] = load(b + k * b_stride + v * LANES);
        for (int r = 0; r < ROWS; r++) {
            float factor = low_rank[r * low_rank_stride + k];
            for (int v = 0; v < VECTORS; v++) part[r][v] += weight[v] * factor;
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++)
            store(y[r] + v * LANES, load(y[r] + v * LANES) + part[r][v]);
}

// The last output features, fewer than one vector: the same sums, on padded copies.
template <typename T, typename B>
void expand_rest(T* y, const B* b, int64_t b_stride, int64_t rank, const float* low_rank, int count) {
    Vec part = {};
    for (int64_t k = 0; k < rank; k++) part += load_some(b + k * b_stride, count) * low_rank[k];
    T padded[LANES] = {};
    std::memcpy(padded, y, count * sizeof(T));
    store(padded, load(padded) + part);
    std::memcpy(y, padded, count * sizeof(T));
}

template <typename T, int ROWS>
void shrink_rows(const T* const* x, const Weights& w, int64_t in_features, int first, int count,
                 float* low_rank) {
    const T* a = (const T*)w.a + first * w.a_stride;
    int k = 0;
    for (; k + TILE_WIDTH <= count; k += TILE_WIDTH)
        shrink_tile<T, ROWS, TILE_WIDTH>(x, a + k * w.a_stride, w.a_stride, in_features,
                                         low_rank + k, w.rank);
    for (; k < count; k++)
        shrink_tile<T, ROWS, 1>(x, a + k * w.a_stride, w.a_stride, in_features, low_rank + k, w.rank);
}

template <typename T, typename B, int ROWS>
void expand_rows(T* const* y, const B* b, int64_t b_stride, int64_t rank, int count,
                 const float* low_rank) {
    T* at[ROWS];
    int o = 0;
    for (; o + TILE_WIDTH * LANES <= count; o += TILE_WIDTH * LANES) {
        for (int r = 0; r < ROWS; r++) at[r] = y[r] + o;
        expand_tile<T, B, ROWS, TILE_WIDTH>(at, b + o, b_stride, rank, low_rank, rank);
    }
    for (; o + LANES <= count; o += LANES) {
        for (int r = 0; r < ROWS; r++) at[r] = y[r] + o;
        expand_tile<T, B, ROWS, 1>(at, b + o, b_stride, rank, low_rank, rank);
    }
    if (o < count)
        for (int r = 0; r < ROWS; r++)
            expand_rest(y[r] + o, b + o, b_stride, rank, low_rank + r * rank, count - o);
}

template <typename T>
struct Call {
    const Module& module;
    const Step& step;
    T* y;
    int64_t y_stride;
    const T* x;  // null for an embedding
    int64_t x_stride;
    const int64_t* token;  // an embedding's token ids
    float* low_rank;

    const Weights& weights(const Piece& p) const {
        return module.weights[step.slot[p.group] * module.slices + p.slice];
    }

    void shrink(const Piece& p) const {
        const Weights& w = weights(p);
        const int32_t* row = step.row + step.start[p.group] + p.first_row;
        float* target = low_rank + p.low_rank + p.first_row * w.rank + p.first;
        for (int r = 0; r < p.rows; r += TILE_ROWS, target += TILE_ROWS * w.rank) {
            const T* at[TILE_ROWS];
            int rows = std::min(TILE_ROWS, p.rows - r);
            for (int i = 0; i < rows; i++) at[i] = x + row[r + i] * x_stride;
            if (rows == 4) shrink_rows<T, 4>(at, w, module.in_features, p.first, p.count, target);
            if (rows == 3) shrink_rows<T, 3>(at, w, module.in_features, p.first, p.count, target);
            if (rows == 2) shrink_rows<T, 2>(at, w, module.in_features, p.first, p.count, target);
            if (rows == 1) shrink_rows<T, 1>(at, w, module.in_features, p.first, p.count, target);
        }
    }

    // A row of an embedding picks one column of A.
    void pick(const Piece& p) const {
        const Weights& w = weights(p);
        const int32_t* row = step.row + step.start[p.group] + p.first_row;
        float* target = low_rank + p.low_rank + p.first_row * w.rank;
        for (int r = 0; r < p.rows; r++)
            for (int k = p.first; k < p.first + p.count; k++)
                target[r * w.rank + k] = widen(((const T*)w.a)[k * w.a_stride + token[row[r]]]);
    }

    void expand(const Piece& p) const {
        const Weights& w = weights(p);
        const T* b = (const T*)w.b + p.first;
        if (p.rows < WIDEN_ROWS) return expand(p, w.rank, b, w.b_stride);
        // Many rows: convert B once, and have it in one place.
        static thread_local std::vector<float> wide;
        if ((int64_t)wide.size() < w.rank * p.count) wide.resize(w.rank * p.count);
        for (int64_t k = 0; k < w.rank; k++)
            for (int o = 0; o < p.count; o++) wide[k * p.count + o] = widen(b[k * w.b_stride + o]);
        expand(p, w.rank, (const float*)wide.data(), p.count);
    }

    template <typename B>
    void expand(const Piece& p, int64_t rank, const B* b, int64_t b_stride) const {
        const int32_t* row = step.row + step.start[p.group] + p.first_row;
        const float* source = low_rank + p.low_rank + p.first_row * rank;
        int64_t column = module.offset[p.slice] + p.first;
        for (int r = 0; r < p.rows; r += TILE_ROWS, source += TILE_ROWS * rank) {
            T* at[TILE_ROWS];
            int rows = std::min(TILE_ROWS, p.rows - r);
            for (int i = 0; i < rows; i++) at[i] = y + row[r + i] * y_stride + column;
            if (rows == 4) expand_rows<T, B, 4>(at, b, b_stride, rank, p.count, source);
            if (rows == 3) expand_rows<T, B, 3>(at, b, b_stride, rank, p.count, source);
            if (rows == 2) expand_rows<T, B, 2>(at, b, b_stride, rank, p.count, source);
            if (rows == 1) expand_rows<T, B, 1>(at, b, b_stride, rank, p.count, source);
        }
    }
};

// What there is to do, cut into pieces that threads can take. Kept between calls: the
// engine computes one batch at a time, in one thread.
struct Plan {
    std::vector<Piece> shrink, expand;
    std::vector<float> low_rank;

    void cut(const Module& module, const Step& step) {
        shrink.clear();
        expand.clear();
        int64_t used = 0;
        for (int32_t g = 0; g < step.groups; g++) {
            int32_t rows = step.start[g + 1] - step.start[g];
            for (int32_t s = 0; s < module.slices; s++) {
                const Weights& w = module.weights[step.slot[g] * module.slices + s];
                if (!w.rank) continue;
                int32_t width = (int32_t)(module.offset[s + 1] - module.offset[s]);
                for (int32_t r = 0; r < rows; r += ROW_BLOCK) {
                    int32_t some = std::min(ROW_BLOCK, rows - r);
                    for (int32_t k = 0; k < w.rank; k += RANK_BLOCK)
                        shrink.push_back(
                            {g, s, r, some, k, std::min<int32_t>(RANK_BLOCK, (int32_t)w.rank - k), used});
                    int32_t block = some < WIDEN_ROWS || w.rank > 64 ? OUT_BLOCK : LONG_OUT_BLOCK;
                    for (int32_t o = 0; o < width; o += block)
                        expand.push_back({g, s, r, some, o, std::min(block, width - o), used});
                }
                used += rows * w.rank;
            }
        }
        if ((int64_t)low_rank.size() < used) low_rank.resize(used);
    }
};

template <typename T>
void run(const Module* module, const Step* step, void* y, int64_t y_stride, const void* x,
         int64_t x_stride, const int64_t* token) {
    static Plan plan;
    plan.cut(*module, *step);
    Call<T> call{*module, *step,   (T*)y, y_stride,
                 (const T*)x, x_stride, token, plan.low_rank.data()};
    int64_t shrinks = plan.shrink.size(), expands = plan.expand.size();
    if (!expands) return;
#pragma omp parallel
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < shrinks; i++)
            if (token) call.pick(plan.shrink[i]);
            else call.shrink(plan.shrink[i]);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < expands; i++) call.expand(plan.expand[i]);
    }
}

}  // namespace

extern "C" {

void add_lora_float32(const Module* module, const Step* step, void* y, int64_t y_stride, const void* x,
                      int64_t x_stride, const int64_t* token) {
    run<float>(module, step, y, y_stride, x, x_stride, token);
}

void add_lora_bfloat16(const Module* module, const Step* step, void* y, int64_t y_stride,
                       const void* x, int64_t x_stride, const int64_t* token) {
    run<BFloat16>(module, step, y, y_stride, x, x_stride, token);
}
}
