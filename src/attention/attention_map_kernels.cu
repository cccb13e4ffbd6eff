// Column sums of softmax(q kᵀ · scale) without the queries × keys matrix, on tensor cores.
//
//   query_statistics   per query: the largest score and 1 / Σ exp(score − largest)
//   column_sums        per key:   Σ over queries of exp(score − largest) / Σ
//
// Each kernel computes all scores again, which is cheaper than keeping them. Both work alike: a
// warp keeps its "rows", 16 or 32, in registers, and the "columns" of their head pass through
// shared memory, so that all of a row's sums stay in the few lanes that own it. In the first kernel
// the rows are queries and the columns keys; in the second it is the other way round.
//
// The scores of a row and a column differ only by rounding between the two kernels, and both
// subtract the same fp32 maximum, so the columns add up to the number of queries even where the
// scores are so large that an fp32 log-sum-exp would be off by whole percents.
//
// Every sum is made by one warp in one order: no atomics, the same bits in every run.

#include "attention_map_kernels.h"

#include <cfloat>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>

namespace sag {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
// In shared memory at a time.
constexpr int kColumns = 64;

// mma.m16n8k16 multiplies 16 rows × 16 values by 16 values × 8 columns. Lane l of the warp holds
//
//   a[0..3]  values 2(l%4), +1 of row l/4; of row l/4 + 8; then values 8 further on, of both rows
//   b[0..1]  values 2(l%4), +1 of column l/4; then values 8 further on
//   c[0..3]  row l/4, columns 2(l%4), +1; then row l/4 + 8, the same columns
//
// so the four lanes of one l/4, a quad, own two rows of scores, and each of them a quarter.
constexpr int kMmaRows = 16, kMmaColumns = 8, kMmaDepth = 16;
constexpr int kColumnTiles = kColumns / kMmaColumns;

// How many times 16 rows a warp holds: twice where they fit into the registers, because each column
// read from shared memory then serves 32 rows. kSteps: head_dim in steps of kMmaDepth.
template <int kSteps>
constexpr int kRowTiles = kSteps <= 8 ? 2 : 1;

__host__ __device__ constexpr int rows_per_block(int row_tiles) {
  return kWarps * row_tiles * kMmaRows;
}

template <int kSteps>
using RowFragments = std::uint32_t[kRowTiles<kSteps>][kSteps][4];
template <int kSteps>
using Scores = float[kRowTiles<kSteps>][kColumnTiles][4];

// What a lane owns of the scores.
template <int kSteps>
constexpr int kLaneRows = 2 * kRowTiles<kSteps>;
constexpr int kLaneColumns = 2 * kColumnTiles;

// Dot products are exact in fp32 up to the sum's rounding: fp16 products cannot overflow here.
template <typename T>
__device__ void mma(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1);

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define SAG_MMA(type)                                                        \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
#else
// Never called: callers check the compute capability.
#define SAG_MMA(type) __trap()
#endif

template <>
__device__ __forceinline__ void mma<__half>(float (&c)[4], const std::uint32_t (&a)[4],
                                            std::uint32_t b0, std::uint32_t b1) {
  SAG_MMA("f16");
}

template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float (&c)[4], const std::uint32_t (&a)[4],
                                                   std::uint32_t b0, std::uint32_t b1) {
  SAG_MMA("bf16");
}

#undef SAG_MMA

// The fastest 2^x: relative error 2^-22, results below 2^-126 are 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The lane's rows, from 0: l/4 of the first 16, l/4 + 8, and so on.
template <int kSteps>
__device__ int row_of_lane(int i) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  constexpr int kTiles = kRowTiles<kSteps>;
  return blockIdx.x * rows_per_block(kTiles) + warp * kTiles * kMmaRows + lane / 4 + i * 8;
}

// The lane's columns, within the tile.
__device__ int column_of_lane(int j) {
  return j / 2 * kMmaColumns + threadIdx.x % 4 * 2 + j % 2;
}

// The score of the lane's row i and its column j.
template <int kTiles>
__device__ float& score(float (&scores)[kTiles][kColumnTiles][4], int i, int j) {
  return scores[i / 2][j / 2][i % 2 * 2 + j % 2];
}

// The first token of the head that this block works on: grid y is the query head, z the image.
template <typename T>
__device__ const T* head_of_block(const TokenVectors& tokens) {
  return static_cast<const T*>(tokens.data) + blockIdx.z * tokens.batch_stride +
         blockIdx.y / tokens.heads_per_vector * tokens.head_stride;
}

// Where a value of [B, heads, tokens] lies for the head of this block.
__device__ std::int64_t head_offset(int tokens) {
  return (static_cast<std::int64_t>(blockIdx.z) * gridDim.y + blockIdx.y) * tokens;
}

// --- Rows: from global memory to registers, once ------------------------------------------------

// Two neighbouring values; 0 beyond the last row and beyond head_dim.
template <typename T>
__device__ std::uint32_t load_pair(const T* head, const TokenVectors& rows, int row, int value,
                                   int head_dim) {
  if (row >= rows.tokens || value >= head_dim) return 0;
  return *reinterpret_cast<const std::uint32_t*>(head + row * rows.token_stride + value);
}

template <typename T, int kSteps>
__device__ void load_rows(RowFragments<kSteps>& fragments, const TokenVectors& rows, int head_dim) {
  const T* head = head_of_block<T>(rows);
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < kRowTiles<kSteps>; ++m) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = row_of_lane<kSteps>(2 * m + i % 2);
        const int value = step * kMmaDepth + lane % 4 * 2 + i / 2 * 8;
        fragments[m][step][i] = load_pair(head, rows, row, value, head_dim);
      }
    }
  }
}

// --- Columns: from global to shared memory, tile by tile ----------------------------------------

// A column's vector in shared memory. The 16 extra bytes put the eight vectors that ldmatrix reads
// at a time into different banks.
template <typename T, int kSteps>
struct ColumnVector {
  T values[kSteps * kMmaDepth + 16 / sizeof(T)];
};

template <typename T, int kSteps>
using ColumnTile = ColumnVector<T, kSteps>[kColumns];

// Begins to copy a tile, 16 bytes a thread; 0 beyond the last column and beyond head_dim.
template <typename T, int kSteps>
__device__ void prefetch_tile(ColumnTile<T, kSteps>& tile, const T* head,
                              const TokenVectors& columns, int first, int head_dim) {
  constexpr int kValues = 16 / sizeof(T), kPieces = kSteps * kMmaDepth / kValues;
  for (int i = threadIdx.x; i < kColumns * kPieces; i += kThreads) {
    const int column = i / kPieces, value = i % kPieces * kValues;
    const bool exists = first + column < columns.tokens && value < head_dim;
    const T* source = exists ? head + (first + column) * columns.token_stride + value : head;
    __pipeline_memcpy_async(&tile[column].values[value], source, 16, exists ? 0 : 16);
  }
}

// The b fragments of 16 columns for one step: b[0], b[1] of the first eight, then of the others.
template <typename T, int kSteps>
__device__ void load_columns(std::uint32_t (&b)[4], const ColumnTile<T, kSteps>& tile, int first,
                             int step) {
  const int lane = threadIdx.x % 32;
  const int column = first + lane / 16 * 8 + lane % 8, value = step * kMmaDepth + lane / 8 % 2 * 8;
  const auto address = __cvta_generic_to_shared(&tile[column].values[value]);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
               : "r"(static_cast<std::uint32_t>(address)));
}

// The scores of the warp's rows and the tile's columns, not yet scaled.
template <typename T, int kSteps>
__device__ void multiply(Scores<kSteps>& scores, const RowFragments<kSteps>& rows,
                         const ColumnTile<T, kSteps>& tile) {
#pragma unroll
  for (auto& row_scores : scores)
#pragma unroll
    for (auto& c : row_scores) c[0] = c[1] = c[2] = c[3] = 0;
#pragma unroll
  for (int n = 0; n < kColumnTiles; n += 2) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      std::uint32_t b[4];
      load_columns<T, kSteps>(b, tile, n * kMmaColumns, step);
#pragma unroll
      for (int m = 0; m < kRowTiles<kSteps>; ++m) {
        mma<T>(scores[m][n], rows[m][step], b[0], b[1]);
        mma<T>(scores[m][n + 1], rows[m][step], b[2], b[3]);
      }
    }
  }
}

// Gives columns beyond the last one the score −∞, that is, the weight 0.
template <int kSteps>
__device__ void mask_columns_from(Scores<kSteps>& scores, int count) {
#pragma unroll
  for (int j = 0; j < kLaneColumns; ++j) {
#pragma unroll
    for (int i = 0; i < kLaneRows<kSteps>; ++i)
      if (column_of_lane(j) >= count) score(scores, i, j) = -INFINITY;
  }
}

// --- Per query: the maximum and the sum ---------------------------------------------------------

// Of a row's scores seen so far, times scale_log2: the largest, and the sum of 2^(score − largest).
struct OnlineSoftmax {
  // Not −∞, because −∞ − (−∞) is NaN.
  float largest = -FLT_MAX;
  float sum = 0;

  // Adds the lane's row i of a tile.
  template <int kSteps>
  __device__ void add(Scores<kSteps>& scores, int i, float scale_log2) {
    float unscaled = -INFINITY;
#pragma unroll
    for (int j = 0; j < kLaneColumns; ++j) unscaled = fmaxf(unscaled, score(scores, i, j));
    rescale(fmaxf(largest, unscaled * scale_log2));

    float tile_sum = 0;
#pragma unroll
    for (int j = 0; j < kLaneColumns; ++j)
      tile_sum += exp2_fast(fmaf(score(scores, i, j), scale_log2, -largest));
    sum += tile_sum;
  }

  // Merges what another lane saw of the same row.
  __device__ void merge_with_lane(int mask) {
    OnlineSoftmax other;
    other.largest = __shfl_xor_sync(~0u, largest, mask);
    other.sum = __shfl_xor_sync(~0u, sum, mask);
    const float both = fmaxf(largest, other.largest);
    rescale(both);
    other.rescale(both);
    sum += other.sum;
  }

  __device__ void rescale(float new_largest) {
    sum *= exp2_fast(largest - new_largest);
    largest = new_largest;
  }
};

template <typename T, int kSteps>
__global__ void __launch_bounds__(kThreads)
    query_statistics(TokenVectors q, TokenVectors k, int head_dim, float scale_log2,
                     float2* statistics) {
  extern __shared__ __align__(16) unsigned char shared[];
  auto& tiles = *reinterpret_cast<ColumnTile<T, kSteps>(*)[2]>(shared);
  const T* keys = head_of_block<T>(k);
  RowFragments<kSteps> rows;
  load_rows<T, kSteps>(rows, q, head_dim);
  OnlineSoftmax softmax[kLaneRows<kSteps>];

  prefetch_tile<T, kSteps>(tiles[0], keys, k, 0, head_dim);
  __pipeline_commit();
  for (int first = 0, current = 0; first < k.tokens; first += kColumns, current ^= 1) {
    if (first + kColumns < k.tokens)
      prefetch_tile<T, kSteps>(tiles[current ^ 1], keys, k, first + kColumns, head_dim);
    __pipeline_commit();
    // Wait for the current tile's copies, not the next one's.
    __pipeline_wait_prior(1);
    __syncthreads();

    Scores<kSteps> scores;
    multiply<T, kSteps>(scores, rows, tiles[current]);
    if (first + kColumns > k.tokens) mask_columns_from<kSteps>(scores, k.tokens - first);
#pragma unroll
    for (int i = 0; i < kLaneRows<kSteps>; ++i)
      softmax[i].template add<kSteps>(scores, i, scale_log2);
    // After this the tile may be overwritten.
    __syncthreads();
  }

  statistics += head_offset(q.tokens);
#pragma unroll
  for (int i = 0; i < kLaneRows<kSteps>; ++i) {
    softmax[i].merge_with_lane(1);
    softmax[i].merge_with_lane(2);
    const int query = row_of_lane<kSteps>(i);
    if (threadIdx.x % 4 == 0 && query < q.tokens)
      statistics[query] = {softmax[i].largest, 1 / softmax[i].sum};
  }
}

// --- Per key: the sum over queries --------------------------------------------------------------

using StatisticsTile = float2[kColumns];

// Queries beyond the last one get {0, 0}, that is, the weight 0.
__device__ void prefetch_statistics(StatisticsTile& tile, const float2* statistics, int first,
                                    int queries) {
  for (int i = threadIdx.x; i < kColumns; i += kThreads) {
    const bool exists = first + i < queries;
    __pipeline_memcpy_async(&tile[i], exists ? statistics + first + i : statistics, sizeof(float2),
                            exists ? 0 : sizeof(float2));
  }
}

// Returns the attention that the tile's queries give to the lane's key i.
template <int kSteps>
__device__ float attention_of_tile(Scores<kSteps>& scores, int i, const StatisticsTile& tile,
                                   float scale_log2) {
  float sum = 0;
#pragma unroll
  for (int j = 0; j < kLaneColumns; ++j) {
    const auto [largest, inverse_sum] = tile[column_of_lane(j)];
    const float weight = exp2_fast(fmaf(score(scores, i, j), scale_log2, -largest));
    sum = fmaf(weight, inverse_sum, sum);
  }
  return sum;
}

template <typename T, int kSteps>
__global__ void __launch_bounds__(kThreads)
    column_sums(TokenVectors q, TokenVectors k, int head_dim, float scale_log2,
                const float2* statistics, float* sums) {
  extern __shared__ __align__(16) unsigned char shared[];
  auto& tiles = *reinterpret_cast<ColumnTile<T, kSteps>(*)[2]>(shared);
  __shared__ __align__(16) StatisticsTile statistics_tiles[2];
  const T* queries = head_of_block<T>(q);
  statistics += head_offset(q.tokens);
  RowFragments<kSteps> rows;
  load_rows<T, kSteps>(rows, k, head_dim);
  float attention[kLaneRows<kSteps>] = {};

  prefetch_tile<T, kSteps>(tiles[0], queries, q, 0, head_dim);
  prefetch_statistics(statistics_tiles[0], statistics, 0, q.tokens);
  __pipeline_commit();
  for (int first = 0, current = 0; first < q.tokens; first += kColumns, current ^= 1) {
    if (first + kColumns < q.tokens) {
      prefetch_tile<T, kSteps>(tiles[current ^ 1], queries, q, first + kColumns, head_dim);
      prefetch_statistics(statistics_tiles[current ^ 1], statistics, first + kColumns, q.tokens);
    }
    __pipeline_commit();
    __pipeline_wait_prior(1);
    __syncthreads();

    Scores<kSteps> scores;
    multiply<T, kSteps>(scores, rows, tiles[current]);
#pragma unroll
    for (int i = 0; i < kLaneRows<kSteps>; ++i)
      attention[i] += attention_of_tile<kSteps>(scores, i, statistics_tiles[current], scale_log2);
    __syncthreads();
  }

  sums += head_offset(k.tokens);
#pragma unroll
  for (int i = 0; i < kLaneRows<kSteps>; ++i) {
    attention[i] += __shfl_xor_sync(~0u, attention[i], 1);
    attention[i] += __shfl_xor_sync(~0u, attention[i], 2);
    const int key = row_of_lane<kSteps>(i);
    if (threadIdx.x % 4 == 0 && key < k.tokens) sums[key] = attention[i];
  }
}

// --- Launching ----------------------------------------------------------------------------------

template <typename Kernel>
cudaError_t allow_shared_memory(Kernel kernel, int bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

template <typename T, int kSteps>
cudaError_t launch(const ColumnSumsCall& call, cudaStream_t stream) {
  constexpr int kShared = 2 * sizeof(ColumnTile<T, kSteps>);
  for (const auto error : {allow_shared_memory(query_statistics<T, kSteps>, kShared),
                           allow_shared_memory(column_sums<T, kSteps>, kShared)})
    if (error != cudaSuccess) return error;

  const auto grid = [&call](int rows) {
    constexpr int kRows = rows_per_block(kRowTiles<kSteps>);
    return dim3((rows + kRows - 1) / kRows, call.heads, call.batch);
  };
  const auto statistics = reinterpret_cast<float2*>(call.statistics);
  query_statistics<T, kSteps><<<grid(call.q.tokens), kThreads, kShared, stream>>>(
      call.q, call.k, call.head_dim, call.scale_log2, statistics);
  column_sums<T, kSteps><<<grid(call.k.tokens), kThreads, kShared, stream>>>(
      call.q, call.k, call.head_dim, call.scale_log2, statistics, call.column_sums);
  return cudaGetLastError();
}

// The narrowest kernel that holds head_dim: those that UNets use (40, 64, 80, 128, 160) and the
// largest.
template <typename T>
cudaError_t launch_for_head_dim(const ColumnSumsCall& call, cudaStream_t stream) {
  if (call.head_dim <= 32) return launch<T, 2>(call, stream);
  if (call.head_dim <= 48) return launch<T, 3>(call, stream);
  if (call.head_dim <= 64) return launch<T, 4>(call, stream);
  if (call.head_dim <= 80) return launch<T, 5>(call, stream);
  if (call.head_dim <= 128) return launch<T, 8>(call, stream);
  if (call.head_dim <= 160) return launch<T, 10>(call, stream);
  if (call.head_dim <= 256) return launch<T, 16>(call, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_column_sums(const ColumnSumsCall& call, cudaStream_t stream) {
  return call.is_bfloat16 ? launch_for_head_dim<__nv_bfloat16>(call, stream)
                          : launch_for_head_dim<__half>(call, stream);
}

}  // namespace sag
