// Winograd's F(4x4, 3x3): convolutions of 3 x 3 with 36 products where the definition has 144.
//
//     y  = A4' [ (G3 w G3') * (B d B') ] A4          d: 6 x 6 of x, one pixel beyond each side of the tile y of 4 x 4
//     dw = A3' [ sum over tiles (G4 dy G4') * (B d B') ] A3,   and dx = the first with w turned about and C, K exchanged
//
// Lavin and Gray 2016, "Fast algorithms for convolutional neural networks", with the points 0, +-sqrt(1/2), +-sqrt(2) and
// infinity instead of 0, +-1, +-2: their powers stay near 1, which halves the error of float32. For a point p the row of G
// is N(p) [1 p p^2 ..], that of A [1 p p^2 ..]; B is the same in both directions.
//
// In the transformed domain a convolution is 36 matrix products over channels. Here a block of tiles goes through all of its
// stages before the next one does, so that what is transformed stays in the cache of its core. Every number is one sum in one
// order, whatever the block, the batch and the number of threads.
//
// All float32. Pictures [N, H, W, C] in memory; weights [K, C, 3, 3]; C and K multiples of 32. Loaded by winograd.py.

#include <algorithm>
#include <cstdlib>
#include <memory>

namespace {

#ifdef __AVX512F__
constexpr long WIDE = 16, ROWS = 8;  // floats of a register; rows of a product that are summed up in registers at once
#else
constexpr long WIDE = 8, ROWS = 6;
#endif
constexpr long PANEL = 2 * WIDE, POINTS = 36, PATCH = 6, TILE = 4, KERNEL = 3;
constexpr long SKEW = 16;  // floats between rows, so that rows of a power of two do not share a set of the cache
constexpr long BLOCK = 64, CHUNK = 16;  // of the weights' gradient: channels on each side, tiles between two visits

typedef float Vec __attribute__((vector_size(4 * WIDE), aligned(4), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }

// Floats of a thread, kept from call to call: fresh memory would cost a page fault every 4 KB.
float* scratch(int which, long size) {
    thread_local struct Kept {
        std::unique_ptr<float, decltype(&std::free)> memory{nullptr, &std::free};
        long size = 0;
    } kept[2];
    Kept& mine = kept[which];
    if (mine.size < size) {
        mine.memory.reset(static_cast<float*>(std::aligned_alloc(64, (size * sizeof(float) + 63) / 64 * 64)));
        mine.size = size;
    }
    return mine.memory.get();
}

// -- transforms of one line: a point's row and its negative's share their even and odd parts --------------------------------

constexpr float A1 = 0.70710678118654752f, B1 = 1.41421356237309505f;  // a, b; a^2 = 1/2, b^2 = 2, a^3 = a/2, b^3 = 2b
constexpr float NA = -2.f / 3.f, NB = 1.f / 6.f;                       // N(+-a), N(+-b); N(0) = 1

inline void transform_patch(const Vec* d, long step, Vec* v) {  // B: 6 -> 6
    Vec d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step], d5 = d[5 * step];
    Vec even_a = d4 - 2.f * d2, odd_a = A1 * (d3 - 2.f * d1), even_b = d4 - .5f * d2, odd_b = B1 * (d3 - .5f * d1);
    v[0] = d0 + d4 - 2.5f * d2;
    v[1] = even_a + odd_a;
    v[2] = even_a - odd_a;
    v[3] = even_b + odd_b;
    v[4] = even_b - odd_b;
    v[5] = d1 + d5 - 2.5f * d3;
}

inline void transform_kernel(const Vec* g, long step, Vec* u) {  // G3: 3 -> 6
    Vec g0 = g[0], g1 = g[step], g2 = g[2 * step];
    Vec even_a = NA * (g0 + .5f * g2), odd_a = (NA * A1) * g1, even_b = NB * (g0 + 2.f * g2), odd_b = (NB * B1) * g1;
    u[0] = g0;
    u[1] = even_a + odd_a;
    u[2] = even_a - odd_a;
    u[3] = even_b + odd_b;
    u[4] = even_b - odd_b;
    u[5] = g2;
}

inline void transform_tile(const Vec* g, long step, Vec* u) {  // G4: 4 -> 6
    Vec g0 = g[0], g1 = g[step], g2 = g[2 * step], g3 = g[3 * step];
    Vec even_a = NA * (g0 + .5f * g2), odd_a = (NA * A1) * (g1 + .5f * g3);
    Vec even_b = NB * (g0 + 2.f * g2), odd_b = (NB * B1) * (g1 + 2.f * g3);
    u[0] = g0;
    u[1] = even_a + odd_a;
    u[2] = even_a - odd_a;
    u[3] = even_b + odd_b;
    u[4] = even_b - odd_b;
    u[5] = g3;
}

inline void gather_tile(const Vec* m, long step, Vec* y) {  // A4': 6 -> 4
    Vec m5 = m[5 * step], sum_a = m[step] + m[2 * step], sum_b = m[3 * step] + m[4 * step];
    Vec odd_a = A1 * (m[step] - m[2 * step]), odd_b = B1 * (m[3 * step] - m[4 * step]);
    y[0] = m[0] + sum_a + sum_b;
    y[1] = odd_a + odd_b;
    y[2] = .5f * sum_a + 2.f * sum_b;
    y[3] = .5f * odd_a + 2.f * odd_b + m5;
}

inline void gather_kernel(const Vec* m, long step, Vec* y) {  // A3': 6 -> 3
    Vec m5 = m[5 * step], sum_a = m[step] + m[2 * step], sum_b = m[3 * step] + m[4 * step];
    y[0] = m[0] + sum_a + sum_b;
    y[1] = A1 * (m[step] - m[2 * step]) + B1 * (m[3 * step] - m[4 * step]);
    y[2] = .5f * sum_a + 2.f * sum_b + m5;
}

// A transform of both directions: [FROM, FROM] in, [TO, TO] out.
template <long FROM, long TO, void (*LINE)(const Vec*, long, Vec*)>
inline void both(const Vec* in, Vec* out) {
    Vec half[FROM * TO];  // [FROM, TO]
#pragma GCC unroll 6
    for (long i = 0; i < FROM; i++) LINE(in + i * FROM, 1, half + i * TO);
#pragma GCC unroll 6
    for (long j = 0; j < TO; j++) {
        Vec column[TO];
        LINE(half + j, TO, column);
#pragma GCC unroll 6
        for (long i = 0; i < TO; i++) out[i * TO + j] = column[i];
    }
}

// -- pictures and tiles -----------------------------------------------------------------------------------------------------

struct Place {  // of a tile: its picture, and the pixel of its first corner
    long n, top, left;
};

struct Tiles {  // of N pictures of H x W, in rows of tiles of 4 x 4; the last ones may reach beyond the edge
    long N, H, W, down = (H + TILE - 1) / TILE, across = (W + TILE - 1) / TILE, count = N * down * across;

    Place place(long tile) const {
        return {tile / (down * across), tile / across % down * TILE, tile % across * TILE};
    }
    long pixel(long n, long h, long w) const { return (n * H + h) * W + w; }

    // The pixels of a square at a tile, with a border: pointers into x [N, H, W, C], or to zeros beyond the edge.
    template <long SIZE>
    void square(const float* x, long C, const float* zeros, long tile, long border, const float** p) const {
        Place at = place(tile);
        for (long i = 0; i < SIZE; i++)
            for (long j = 0; j < SIZE; j++) {
                long h = at.top + i - border, w = at.left + j - border;
                p[i * SIZE + j] = h < 0 || h >= H || w < 0 || w >= W ? zeros : x + pixel(at.n, h, w) * C;
            }
    }
};

// Squares at `tiles` tiles from `first` on, channels c0 .. c0 + width of C, to v [36, tiles.., ld]; a point has `far` floats.
template <long SIZE, void (*LINE)(const Vec*, long, Vec*)>
void transform(const Tiles& grid, const float* x, long C, const float* zeros, long border, long first, long tiles, long c0,
               long width, float* v, long far, long ld) {
    const float *p[SIZE * SIZE], *next[SIZE * SIZE];
    grid.square<SIZE>(x, C, zeros, first, border, next);
    for (long t = 0; t < tiles; t++) {
        std::copy(next, next + SIZE * SIZE, p);
        if (t + 1 < tiles) grid.square<SIZE>(x, C, zeros, first + t + 1, border, next);
        for (long c = 0; c < width; c += WIDE) {
            Vec in[SIZE * SIZE], out[POINTS];
            for (long i = 0; i < SIZE * SIZE; i++) __builtin_prefetch(next[i] + c0 + c);
            for (long i = 0; i < SIZE * SIZE; i++) in[i] = load(p[i] + c0 + c);
            both<SIZE, PATCH, LINE>(in, out);
            for (long i = 0; i < POINTS; i++) store(v + i * far + t * ld + c, out[i]);
        }
    }
}

// -- products ---------------------------------------------------------------------------------------------------------------

// m[r, 0..PANEL] (+)= sum over s < depth of a[r * row + s * step] * b[s * ldb + 0..PANEL], r < R; m has rows of ldm.
template <long R, bool ADD>
void product(const float* a, long row, long step, const float* b, long ldb, long depth, float* m, long ldm) {
    Vec sum[R][2];
#pragma GCC unroll 8
    for (long r = 0; r < R; r++)
        for (long i = 0; i < 2; i++) sum[r][i] = ADD ? load(m + r * ldm + i * WIDE) : Vec{};
    for (long s = 0; s < depth; s++) {
        Vec left = load(b + s * ldb), right = load(b + s * ldb + WIDE);
#pragma GCC unroll 8
        for (long r = 0; r < R; r++) {
            float one = a[r * row + s * step];
            sum[r][0] += one * left;
            sum[r][1] += one * right;
        }
    }
#pragma GCC unroll 8
    for (long r = 0; r < R; r++)
        for (long i = 0; i < 2; i++) store(m + r * ldm + i * WIDE, sum[r][i]);
}

template <bool ADD>
void product_of(long rows, const float* a, long row, long step, const float* b, long ldb, long depth, float* m, long ldm) {
    for (; rows >= ROWS; rows -= ROWS, a += ROWS * row, m += ROWS * ldm)
        product<ROWS, ADD>(a, row, step, b, ldb, depth, m, ldm);
    switch (rows) {
        case 1: return product<1, ADD>(a, row, step, b, ldb, depth, m, ldm);
        case 2: return product<2, ADD>(a, row, step, b, ldb, depth, m, ldm);
        case 3: return product<3, ADD>(a, row, step, b, ldb, depth, m, ldm);
        case 4: return product<4, ADD>(a, row, step, b, ldb, depth, m, ldm);
        case 5: return product<5, ADD>(a, row, step, b, ldb, depth, m, ldm);
        case 6: return product<6, ADD>(a, row, step, b, ldb, depth, m, ldm);
        case 7: return product<7, ADD>(a, row, step, b, ldb, depth, m, ldm);
    }
}

}  // namespace

// -- what winograd.py calls -------------------------------------------------------------------------------------------------

// w [K, C, 3, 3] to u [K / PANEL, 36, C, PANEL]; turned: to what dx asks for, [C / PANEL, 36, K, PANEL].
extern "C" void winograd_weights(const float* w, long K, long C, int turned, float* u, int threads) {
    long outs = turned ? C : K, ins = turned ? K : C, out_step = turned ? 9 : C * 9, in_step = turned ? C * 9 : 9;
#pragma omp parallel for collapse(2) num_threads(threads)
    for (long panel = 0; panel < outs / PANEL; panel++)
        for (long c = 0; c < ins; c++) {
            float taps[9][PANEL];
            for (long k = 0; k < PANEL; k++) {
                const float* from = w + (panel * PANEL + k) * out_step + c * in_step;
                for (long i = 0; i < 9; i++) taps[turned ? 8 - i : i][k] = from[i];
            }
            for (long k = 0; k < PANEL; k += WIDE) {
                Vec in[9], out[POINTS];
                for (long i = 0; i < 9; i++) in[i] = load(taps[i] + k);
                both<KERNEL, PATCH, transform_kernel>(in, out);
                for (long i = 0; i < POINTS; i++) store(u + ((panel * POINTS + i) * ins + c) * PANEL + k, out[i]);
            }
        }
}

// x [N, H, W, C], u as above, bias [K] or null, to y [N, H, W, K].
extern "C" void winograd_convolve(const float* x, const float* u, const float* bias, float* y, long N, long H, long W, long C,
                                  long K, int threads) {
    Tiles grid{N, H, W};
    constexpr long tiles = 2 * ROWS;
    long ld = C + SKEW, far = tiles * ld + SKEW, blocks = (grid.count + tiles - 1) / tiles;
    long panels = K / PANEL, groups = std::clamp(4 * threads / std::max(blocks, 1L), 1L, panels);  // of panels: few tiles
    std::unique_ptr<float[]> zeros(new float[C]());
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
    for (long block = 0; block < blocks; block++)
        for (long group = 0; group < groups; group++) {
            float *v = scratch(0, POINTS * far), *m = scratch(1, POINTS * tiles * PANEL);
            long first = block * tiles, count = std::min(tiles, grid.count - first);
            transform<PATCH, transform_patch>(grid, x, C, zeros.get(), 1, first, count, 0, C, v, far, ld);
            for (long panel = panels * group / groups; panel < panels * (group + 1) / groups; panel++) {
                for (long i = 0; i < POINTS; i++)
                    product_of<false>(count, v + i * far, ld, 1, u + (panel * POINTS + i) * C * PANEL, PANEL, C,
                                      m + i * tiles * PANEL, PANEL);
                for (long t = 0; t < count; t++)
                    for (long k = 0; k < PANEL; k += WIDE) {
                        Vec in[POINTS], out[TILE * TILE], offset = bias ? load(bias + panel * PANEL + k) : Vec{};
                        for (long i = 0; i < POINTS; i++) in[i] = load(m + (i * tiles + t) * PANEL + k);
                        both<PATCH, TILE, gather_tile>(in, out);
                        Place at = grid.place(first + t);
                        for (long i = 0; i < std::min(TILE, H - at.top); i++)
                            for (long j = 0; j < std::min(TILE, W - at.left); j++)
                                store(y + grid.pixel(at.n, at.top + i, at.left + j) * K + panel * PANEL + k,
                                      out[i * TILE + j] + offset);
                    }
            }
        }
}

// x [N, H, W, C] and dy [N, H, W, K] to dw [parts, K, C, 3, 3]: each of so many parts of the tiles has its own sum.
extern "C" void winograd_weights_gradient(const float* x, const float* dy, float* dw, long N, long H, long W, long C, long K,
                                          long parts, int threads) {
    Tiles grid{N, H, W};
    long share = (grid.count + parts - 1) / parts;
    std::unique_ptr<float[]> zeros(new float[std::max(C, K)]());
#pragma omp parallel for collapse(3) schedule(dynamic) num_threads(threads)
    for (long part = 0; part < parts; part++)
        for (long c0 = 0; c0 < C; c0 += BLOCK)
            for (long k0 = 0; k0 < K; k0 += BLOCK) {
                long cs = std::min(BLOCK, C - c0), ks = std::min(BLOCK, K - k0), end = std::min(grid.count, (part + 1) * share);
                constexpr long ld = BLOCK + SKEW, far = CHUNK * ld + SKEW;
                float *v = scratch(0, 2 * POINTS * far), *g = v + POINTS * far, *sums = scratch(1, POINTS * BLOCK * BLOCK);
                std::fill(sums, sums + POINTS * BLOCK * BLOCK, 0.f);
                for (long first = part * share; first < end; first += CHUNK) {
                    long count = std::min(CHUNK, end - first);
                    transform<PATCH, transform_patch>(grid, x, C, zeros.get(), 1, first, count, c0, cs, v, far, ld);
                    transform<TILE, transform_tile>(grid, dy, K, zeros.get(), 0, first, count, k0, ks, g, far, ld);
                    for (long i = 0; i < POINTS; i++)
                        for (long k = 0; k < ks; k += PANEL)
                            product_of<true>(cs, v + i * far, 1, ld, g + i * far + k, ld, count,
                                             sums + i * BLOCK * BLOCK + k, BLOCK);
                }
                for (long c = 0; c < cs; c++)
                    for (long k = 0; k < ks; k += WIDE) {
                        Vec in[POINTS], out[9];
                        for (long i = 0; i < POINTS; i++) in[i] = load(sums + (i * BLOCK + c) * BLOCK + k);
                        both<PATCH, KERNEL, gather_kernel>(in, out);
                        for (long j = 0; j < WIDE; j++)
                            for (long i = 0; i < 9; i++) dw[((part * K + k0 + k + j) * C + c0 + c) * 9 + i] = out[i][j];
                    }
            }
}
