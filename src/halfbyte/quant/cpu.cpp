// The 4-bit formats on a CPU: dequantise and quantise, for any instruction set, AVX2 and AVX-512.
//
// cpu.py builds this file at first use and chooses; format.py and mxfp4.py hold the same operations
// in plain PyTorch, and every variant here agrees with them bit for bit. Three things make that cheap:
//
// - A block has one scale and sixteen levels, so there are sixteen possible results. They are
//   computed (and rounded to 16 bits, if asked) once a block, and decoding is a table lookup:
//   a permute instruction on AVX-512, two byte shuffles or two permutes on AVX2.
// - Each result is one float32 multiplication and one rounding, whatever the variant. Build with
//   -ffp-contract=off: scale_of() must round twice.
// - Work is cut into pieces that threads take as they come, so results do not depend on their
//   number. The threads are those of torch's own OpenMP runtime, entered through its
//   GOMP_parallel: a second pool would compete for the cores with torch's, whose idle threads spin.
//
// Functions are compiled for their own instruction set by attribute, so the file needs no
// machine-dependent flags and one build is right for every CPU of an architecture.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,f16c")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx2,f16c")))
#endif
#define INLINE inline __attribute__((always_inline))

namespace {

enum Type : int { kFloat32, kBfloat16, kFloat16 };
enum Variant : int { kScalar, kAvx2, kAvx512 };

struct Bfloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Conversions are free of branches, so that loops over them become vector code.

INLINE float widen(float value) { return value; }
INLINE float widen(Bfloat16 value) { return float_of(uint32_t(value.bits) << 16); }
INLINE float widen(Float16 value) {
    const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, rest = value.bits & 0x7fff;
    // The exponents of the two types lie 112 apart; the product also makes subnormals normal.
    const float finite = float_of(rest << 13) * 0x1p112f;
    return float_of(sign | (rest >= 0x7c00 ? 0x7f800000 | rest << 13 : bits_of(finite)));
}

INLINE void narrow(float value, float& to) { to = value; }
INLINE void narrow(float value, Bfloat16& to) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    to.bits = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : uint16_t(rounded);
}
INLINE void narrow(float value, Float16& to) {
    const uint32_t bits = bits_of(value), rest = bits & 0x7fffffff;
    const uint32_t normal = (rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13;
    // Adding a half leaves a subnormal's bits, rounded, at the end of the sum.
    const uint32_t subnormal = bits_of(float_of(rest) + 0.5f) - bits_of(0.5f);
    uint32_t rounded = rest < (113u << 23) ? subnormal : normal;
    rounded = rest >= (143u << 23) ? 0x7c00 : rounded;
    rounded = rest > 0x7f800000 ? 0x7e00 : rounded;
    to.bits = uint16_t(bits >> 16 & 0x8000) | uint16_t(rounded);
}

// ------------------------------------------------------------------------------------- threads

// libgomp's entry to a parallel region; every OpenMP runtime on Linux has it.
using Fork = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

template <class Body>
struct Pieces {
    const Body& body;
    int64_t count;
    std::atomic<int64_t> next{0};

    static void work(void* self) {
        auto& pieces = *static_cast<Pieces*>(self);
        for (int64_t i; (i = pieces.next++) < pieces.count;) pieces.body(i);
    }
};

template <class Body>
void run_pieces(int64_t count, int threads, Fork fork, const Body& body) {
    Pieces<Body> pieces{body, count};
    if (count < threads) threads = int(count);
    if (threads <= 1) {
        Pieces<Body>::work(&pieces);
    } else if (fork) {
        fork(Pieces<Body>::work, &pieces, unsigned(threads), 0);
    } else {
        std::vector<std::thread> others;
        for (int i = 1; i < threads; ++i) others.emplace_back(Pieces<Body>::work, &pieces);
        Pieces<Body>::work(&pieces);
        for (auto& other : others) other.join();
    }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Body>
void over_blocks(int64_t numel, int64_t block_size, int threads, Fork fork, const Body& body) {
    // Eight pieces a thread even out their speeds. Many small ones would have threads meet on the
    // same fresh 2 MB page, which each then clears: 8 ms instead of 5 for a result of 64 MB.
    const int64_t blocks = ceil_div(numel, block_size);
    const int64_t step = std::max<int64_t>(1, blocks / (8 * threads));
    run_pieces(ceil_div(blocks, step), threads, fork, [&](int64_t piece) {
        body(piece * step, std::min(blocks, (piece + 1) * step));
    });
}

// ---------------------------------------------------------------------------------- dequantise

// A weight of bitsandbytes' format: the first of two codes is in the high nibble.
struct Encoded {
    static constexpr bool kLowFirst = false;
    const uint8_t* codes;
    const float* scales;  // null with double quantisation
    const uint8_t* scale_codes;
    const float* scale_scales;
    const float* scale_offset;
    const float* scale_levels;  // [256]
    const float* levels;        // [16]
    int64_t numel, block_size;

    INLINE float scale_of(int64_t block) const {
        if (scales) return scales[block];
        return scale_levels[scale_codes[block]] * scale_scales[block / 256] + *scale_offset;
    }
};

// A weight in MXFP4: the first of two codes is in the low nibble. Levels are doubled and scales
// halved, as in mxfp4.py.
struct Mxfp4 {
    static constexpr bool kLowFirst = true;
    static constexpr int64_t block_size = 32;
    const uint8_t* codes;
    const uint8_t* scales;
    const float* levels;  // [16]
    int64_t numel;

    INLINE float scale_of(int64_t block) const {
        const uint32_t exponent = scales[block];
        return float_of(exponent < 2 ? 0x200000u << exponent : (exponent - 1) << 23);
    }
};

template <class Weight, class Out>
void decode_scalar(const Weight& w, int64_t first, int64_t last, Out* out) {
    for (int64_t block = first; block < last; ++block) {
        Out table[16];
        const float scale = w.scale_of(block);
        for (int i = 0; i < 16; ++i) narrow(w.levels[i] * scale, table[i]);
        const int64_t start = block * w.block_size;
        const int64_t count = std::min<int64_t>(w.block_size, w.numel - start);
        const uint8_t* codes = w.codes + start / 2;
        Out* to = out + start;
        constexpr int first_shift = Weight::kLowFirst ? 0 : 4;
        for (int64_t i = 0; i < count / 2; ++i) {
            to[2 * i] = table[codes[i] >> first_shift & 15];
            to[2 * i + 1] = table[codes[i] >> (4 - first_shift) & 15];
        }
        if (count % 2) to[count - 1] = table[codes[count / 2] >> first_shift & 15];
    }
}

#if defined(__x86_64__)

AVX2 INLINE __m128i rounded(__m256 value, Float16) {
    return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
}
AVX2 INLINE __m128i rounded(__m256 value, Bfloat16) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    const __m256i result =
        _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1));
}

template <class Weight>
AVX2 void decode_avx2(const Weight& w, int64_t first, int64_t last, float* out) {
    const __m256 low = _mm256_loadu_ps(w.levels), high = _mm256_loadu_ps(w.levels + 8);
    // Puts the eight nibbles of a little-endian word, in the order of elements, at bits 0..3.
    const __m256i shifts = Weight::kLowFirst ? _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28)
                                             : _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
    for (int64_t block = first; block < last; ++block) {
        const __m256 scale = _mm256_set1_ps(w.scale_of(block));
        const __m256 low_table = _mm256_mul_ps(low, scale), high_table = _mm256_mul_ps(high, scale);
        const uint8_t* codes = w.codes + block * w.block_size / 2;
        float* to = out + block * w.block_size;
        for (int64_t i = 0; i < w.block_size; i += 8) {
            int32_t word;
            std::memcpy(&word, codes + i / 2, 4);
            const __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(word), shifts);
            const __m256 value = _mm256_blendv_ps(
                _mm256_permutevar8x32_ps(low_table, index),
                _mm256_permutevar8x32_ps(high_table, index),
                _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
            _mm256_storeu_ps(to + i, value);
        }
    }
}

template <class Weight, class Out16>
AVX2 void decode_avx2(const Weight& w, int64_t first, int64_t last, Out16* out) {
    const __m256 low = _mm256_loadu_ps(w.levels), high = _mm256_loadu_ps(w.levels + 8);
    const __m256i nibble = _mm256_set1_epi8(15);
    // Byte shuffles look up half a result: the low bytes of the table and the high bytes apart.
    const __m128i halves = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    for (int64_t block = first; block < last; ++block) {
        const __m256 scale = _mm256_set1_ps(w.scale_of(block));
        const __m128i a = _mm_shuffle_epi8(rounded(_mm256_mul_ps(low, scale), Out16{}), halves);
        const __m128i b = _mm_shuffle_epi8(rounded(_mm256_mul_ps(high, scale), Out16{}), halves);
        const __m256i low_bytes = _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(a, b));
        const __m256i high_bytes = _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(a, b));
        const uint8_t* codes = w.codes + block * w.block_size / 2;
        Out16* to = out + block * w.block_size;
        for (int64_t i = 0; i < w.block_size; i += 32) {
            const __m128i packed = _mm_loadu_si128((const __m128i*)(codes + i / 2));
            // Elements 0-15 in the lower lane, 16-31 in the upper. Unpacking works within lanes, so
            // the words come out as 0-7, 16-23 and 8-15, 24-31.
            const __m128i high = _mm_srli_epi16(packed, 4);
            const __m128i even = Weight::kLowFirst ? packed : high;
            const __m128i odd = Weight::kLowFirst ? high : packed;
            const __m256i index = _mm256_and_si256(
                nibble,
                _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd)));
            const __m256i first_bytes = _mm256_shuffle_epi8(low_bytes, index);
            const __m256i second_bytes = _mm256_shuffle_epi8(high_bytes, index);
            const __m256i c = _mm256_unpacklo_epi8(first_bytes, second_bytes);
            const __m256i d = _mm256_unpackhi_epi8(first_bytes, second_bytes);
            _mm256_storeu_si256((__m256i*)(to + i), _mm256_permute2x128_si256(c, d, 0x20));
            _mm256_storeu_si256((__m256i*)(to + i + 16), _mm256_permute2x128_si256(c, d, 0x31));
        }
    }
}

template <class Weight>
AVX512 void decode_avx512(const Weight& w, int64_t first, int64_t last, float* out) {
    const __m512 levels = _mm512_loadu_ps(w.levels);
    for (int64_t block = first; block < last; ++block) {
        const __m512 table = _mm512_mul_ps(levels, _mm512_set1_ps(w.scale_of(block)));
        const uint8_t* codes = w.codes + block * w.block_size / 2;
        float* to = out + block * w.block_size;
        for (int64_t i = 0; i < w.block_size; i += 16) {
            // A byte in each 64 bits; its nibbles then go to the low four bits of either half,
            // the only bits the permute reads.
            const __m512i bytes =
                _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)(codes + i / 2)));
            const __m512i index =
                Weight::kLowFirst
                    ? _mm512_or_si512(bytes, _mm512_slli_epi64(bytes, 28))
                    : _mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(bytes, 32));
            _mm512_storeu_ps(to + i, _mm512_permutexvar_ps(index, table));
        }
    }
}

AVX512 INLINE __m256i rounded(__m512 value, Float16) {
    return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
}
AVX512 INLINE __m256i rounded(__m512 value, Bfloat16) {
    // Not the instruction of AVX512-BF16: that one flushes subnormals.
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum =
        _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(
        _mm512_mask_set1_epi32(_mm512_srli_epi32(sum, 16), nan, 0x7fc0));
}

template <class Weight, class Out16>
AVX512 void decode_avx512(const Weight& w, int64_t first, int64_t last, Out16* out) {
    const __m512 levels = _mm512_loadu_ps(w.levels);
    for (int64_t block = first; block < last; ++block) {
        const __m512 scaled = _mm512_mul_ps(levels, _mm512_set1_ps(w.scale_of(block)));
        const __m512i table = _mm512_broadcast_i64x4(rounded(scaled, Out16{}));
        const uint8_t* codes = w.codes + block * w.block_size / 2;
        Out16* to = out + block * w.block_size;
        for (int64_t i = 0; i < w.block_size; i += 32) {
            // As above, with the table twice, so that the fifth bit the permute reads is free.
            const __m512i bytes =
                _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(codes + i / 2)));
            const __m512i index =
                Weight::kLowFirst
                    ? _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12))
                    : _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
            _mm512_storeu_si512(to + i, _mm512_permutexvar_epi16(index, table));
        }
    }
}

#endif  // __x86_64__

template <class Weight, class Out>
void decode(const Weight& w, int64_t first, int64_t last, Out* out,
            [[maybe_unused]] int variant) {
#if defined(__x86_64__)
    // The vector variants decode whole blocks; a short last one is left over.
    const int64_t whole = std::min(last, w.numel / w.block_size);
    if (variant == kAvx512) decode_avx512(w, first, whole, out);
    if (variant == kAvx2) decode_avx2(w, first, whole, out);
    if (variant != kScalar) first = whole;
#endif
    decode_scalar(w, first, last, out);
}

template <class Weight>
void decode_all(const Weight& w, void* out, int type, int variant, int threads, Fork fork) {
    over_blocks(w.numel, w.block_size, threads, fork, [&](int64_t first, int64_t last) {
        if (type == kFloat32) decode(w, first, last, static_cast<float*>(out), variant);
        if (type == kBfloat16) decode(w, first, last, static_cast<Bfloat16*>(out), variant);
        if (type == kFloat16) decode(w, first, last, static_cast<Float16*>(out), variant);
    });
}

// ------------------------------------------------------------------------------------ quantise

struct Source {
    const void* values;
    int64_t numel, block_size;
    const float* bounds;         // [15], ascending
    const uint8_t* packed_order; // [256]: two ranks to two codes
    uint8_t* codes;
    float* scales;
};

// One block. Plain loops that compilers turn into vectors of the caller's instruction set.
template <class In>
INLINE void encode_block(const Source& s, int64_t block) {
    const int64_t start = block * s.block_size;
    const int64_t count = std::min(s.block_size, s.numel - start);
    const In* values = static_cast<const In*>(s.values) + start;
    alignas(64) float scaled[4096 + 1];
    // As integers magnitudes compare the same, and NaN is the largest: it ends up as the scale.
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {
        scaled[i] = widen(values[i]);
        const uint32_t magnitude = bits_of(scaled[i]) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    float scale = float_of(largest);
    const float raised = scale < 1e-38f ? 1e-38f : scale;
    if (count == s.block_size) {
        const float factor = 1 / raised;
        for (int64_t i = 0; i < count; ++i) scaled[i] *= factor;
    } else {
        // format.py says why a short block is divided and stores the raised scale.
        for (int64_t i = 0; i < count; ++i) scaled[i] /= raised;
        scale = raised;
    }
    s.scales[block] = scale;
    scaled[count] = 0;  // the partner of an odd last element
    const int64_t bytes = (count + 1) / 2;
    float bounds[15];
    std::memcpy(bounds, s.bounds, sizeof bounds);
    uint8_t ranks[4096 + 1];
    for (int64_t i = 0; i < 2 * bytes; ++i) {
        int32_t rank = 0;
        for (int j = 0; j < 15; ++j) rank += scaled[i] > bounds[j];
        ranks[i] = uint8_t(rank);
    }
    uint8_t* to = s.codes + start / 2;
    for (int64_t i = 0; i < bytes; ++i) to[i] = uint8_t(ranks[2 * i] << 4 | ranks[2 * i + 1]);
    for (int64_t i = 0; i < bytes; ++i) to[i] = s.packed_order[to[i]];
}

template <class In>
void encode_scalar(const Source& s, int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) encode_block<In>(s, block);
}
#if defined(__x86_64__)
template <class In>
AVX2 void encode_avx2(const Source& s, int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) encode_block<In>(s, block);
}
template <class In>
AVX512 void encode_avx512(const Source& s, int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) encode_block<In>(s, block);
}
#endif

template <class In>
void encode(const Source& s, int64_t first, int64_t last, [[maybe_unused]] int variant) {
#if defined(__x86_64__)
    if (variant == kAvx512) return encode_avx512<In>(s, first, last);
    if (variant == kAvx2) return encode_avx2<In>(s, first, last);
#endif
    encode_scalar<In>(s, first, last);
}

}  // namespace

extern "C" {

int halfbyte_best_variant() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        return kAvx512;
    if (avx2) return kAvx2;
#endif
    return kScalar;
}

// Asks for 2 MB pages under memory about to be written for the first time (see cpu.py).
void halfbyte_use_large_pages(void* memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    const uintptr_t page = 1 << 21, start = (uintptr_t(memory) + page - 1) / page * page;
    const uintptr_t end = (uintptr_t(memory) + uintptr_t(bytes)) / page * page;
    if (start < end) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

void halfbyte_dequantize(const uint8_t* codes, const float* scales, const uint8_t* scale_codes,
                         const float* scale_scales, const float* scale_offset,
                         const float* scale_levels, const float* levels, int64_t numel,
                         int64_t block_size, void* out, int type, int variant, int threads,
                         Fork fork) {
    const Encoded w{codes,        scales, scale_codes, scale_scales, scale_offset,
                    scale_levels, levels, numel,       block_size};
    decode_all(w, out, type, variant, threads, fork);
}

void halfbyte_dequantize_mxfp4(const uint8_t* codes, const uint8_t* scales, const float* levels,
                               int64_t numel, void* out, int type, int variant, int threads,
                               Fork fork) {
    decode_all(Mxfp4{codes, scales, levels, numel}, out, type, variant, threads, fork);
}

void halfbyte_quantize(const void* values, int type, int64_t numel, int64_t block_size,
                       const float* bounds, const uint8_t* packed_order, uint8_t* codes,
                       float* scales, int variant, int threads, Fork fork) {
    const Source s{values, numel, block_size, bounds, packed_order, codes, scales};
    over_blocks(numel, block_size, threads, fork, [&](int64_t first, int64_t last) {
        if (type == kFloat32) encode<float>(s, first, last, variant);
        if (type == kBfloat16) encode<Bfloat16>(s, first, last, variant);
        if (type == kFloat16) encode<Float16>(s, first, last, variant);
    });
}

}  // extern "C"
