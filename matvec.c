// y = x W^T on a CPU, for one row x or a few. W is packed, w = scale q + bias, with an integer q of 2 to 8 bits for each
// weight and a scale and a bias for each group of inputs (MLX's format, see quantized.py), or it is dense.
//
// A scale multiplies the sum of q x over its group, and a bias the sum of x over the group, which is the same for every
// output. Nothing but these sums is rounded. There are two ways to take the integers out:
//   4 bits      sixteen words hold 128 integers. Shifts of 0, 4, ..., 28 bits take one out of each word at a time, and
//               x is put into that order before.
//   other bits  eight integers fill `bits` bytes. Shifts of 0, bits, 2 bits, ... take all eight out of one number of 64
//               bits.
#pragma once
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef float floats __attribute__((vector_size(32)));  // eight numbers each
typedef int32_t ints __attribute__((vector_size(32)));
typedef uint64_t longs __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(16)));
typedef float lanes __attribute__((vector_size(64)));  // sixteen numbers each
typedef uint32_t words __attribute__((vector_size(64)));
typedef int32_t integers __attribute__((vector_size(64)));

#define INLINE static inline __attribute__((always_inline))
enum { FLOAT32, FLOAT16, BFLOAT16 };

INLINE floats load(const float *x) {
    floats found;
    memcpy(&found, x, sizeof found);
    return found;
}

INLINE float sum(floats x) {
    return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}

// ---- functions of eight numbers --------------------------------------------------------------------------------------

INLINE void store(float *x, floats value) { memcpy(x, &value, sizeof value); }

INLINE floats choose(ints condition, floats yes, floats no) {
    return (floats)((condition & (ints)yes) | (~condition & (ints)no));
}

// e^x = 2^y = 2^n 2^f for a whole n and |f| <= 1/2; 2^f by its Taylor series. x is bounded to +-87.
INLINE floats exponential(floats x) {
    const floats limit = {87, 87, 87, 87, 87, 87, 87, 87};
    const float round = 0x1.8p23f;  // adding it leaves the whole number in the low bits of the mantissa
    x = choose(x > limit, limit, choose(x < -limit, -limit, x));
    const floats y = x * 1.44269504f, shifted = y + round, f = y - (shifted - round);
    floats power = 1.54035304e-4f * f + 1.33335581e-3f;
    power = ((power * f + 9.61812911e-3f) * f + 5.55041087e-2f) * f + 2.40226507e-1f;
    power = (power * f + 6.93147181e-1f) * f + 1;
    return power * (floats)(((ints)shifted + 127) << 23);
}

INLINE floats sigmoid(floats x) { return 1 / (1 + exponential(-x)); }

INLINE floats gelu_tanh(floats x) { return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x)); }

INLINE floats gelu(floats x) {
    floats y;
    for (int i = 0; i < 8; i++) y[i] = x[i] * (0.5f + 0.5f * erff(x[i] * 0.707106781f));
    return y;
}

// ---- weights ---------------------------------------------------------------------------------------------------------

// Eight integers of so many bits, lowest bit first. Of 3, 5 and 6 bytes the last ones are read apart: reading beyond the
// end of the weight could fail.
INLINE floats unpack(const uint8_t *bytes, const int bits) {
    const int first = bits == 8 ? 8 : bits >= 4 ? 4 : 2;
    uint64_t word = 0;
    memcpy(&word, bytes, first);
    for (int i = first; i < bits; i++) word |= (uint64_t)bytes[i] << 8 * i;
    longs q = {word, word, word, word, word, word, word, word};
    const longs shifts = {0, bits, 2 * bits, 3 * bits, 4 * bits, 5 * bits, 6 * bits, 7 * bits};
    return __builtin_convertvector(__builtin_convertvector(q >> shifts & ((1 << bits) - 1), ints), floats);
}

// Eight finite numbers of 16 bits. A float16 has an exponent of 5 bits, from 15 on, and a float32 of 8 bits, from 127 on.
INLINE floats widen(halves x, const int kind) {
    ints bits = __builtin_convertvector(x, ints);
    if (kind == BFLOAT16) return (floats)(bits << 16);
    floats size = (floats)((bits & 0x7fff) << 13) * 0x1p112f;
    return (floats)((ints)size | (bits & 0x8000) << 16);
}

INLINE float number(const void *x, int64_t i, int kind) {
    if (kind == FLOAT32) return ((const float *)x)[i];
    halves one = {((const uint16_t *)x)[i]};
    return widen(one, kind)[0];
}

INLINE floats numbers(const void *x, int64_t i, int kind) {
    if (kind == FLOAT32) return load((const float *)x + i);
    halves eight;
    memcpy(&eight, (const uint16_t *)x + i, sizeof eight);
    return widen(eight, kind);
}

typedef struct {
    const void *weight, *scales, *biases;  // packed: (out, in bits / 8) bytes, (out, in / group), (out, in / group)
    int64_t outputs, inputs, group;
    int bits, kind;  // bits 0: dense; kind: of scales and biases, or of a dense weight
} Layer;

enum { GROUPS = 4096 };  // of a row, at most

// The scales of a row as float32, and the part of its products that the biases make: sums (n, groups) of x over each
// group -> products (n).
INLINE void scales_and_biases(const Layer *layer, int64_t row, const float *sums, float *scales, float *products,
                              const int n) {
    const int64_t groups = layer->inputs / layer->group, first = row * groups, whole = groups / 8 * 8;
    floats total[4] = {0};
    float rest[4] = {0};
    for (int64_t i = 0; i < whole; i += 8) {
        floats scale = numbers(layer->scales, first + i, layer->kind);
        floats bias = numbers(layer->biases, first + i, layer->kind);
        memcpy(scales + i, &scale, sizeof scale);
        for (int k = 0; k < n; k++) total[k] += bias * load(sums + k * groups + i);
    }
    for (int64_t i = whole; i < groups; i++) {
        scales[i] = number(layer->scales, first + i, layer->kind);
        for (int k = 0; k < n; k++) rest[k] += number(layer->biases, first + i, layer->kind) * sums[k * groups + i];
    }
    for (int k = 0; k < n; k++) products[k] = sum(total[k]) + rest[k];
}

// The products of one row of a packed W with n rows of x, into y (n, out).
INLINE void packed_row(const Layer *layer, int64_t row, const float *x, const float *sums, float *y, const int bits,
                       const int n) {
    const int64_t groups = layer->inputs / layer->group;
    const uint8_t *bytes = (const uint8_t *)layer->weight + row * (layer->inputs * bits / 8);
    float scales[GROUPS], bias[4];
    floats total[4] = {0};
    scales_and_biases(layer, row, sums, scales, bias, n);
    for (int64_t i = 0; i < groups; i++) {
        floats dot[4] = {0};
        for (int64_t j = 0; j < layer->group; j += 8, x += 8, bytes += bits) {
            floats q = unpack(bytes, bits);
            for (int k = 0; k < n; k++) dot[k] += q * load(x + k * layer->inputs);
        }
        for (int k = 0; k < n; k++) total[k] += scales[i] * dot[k];
    }
    for (int k = 0; k < n; k++) y[k * layer->outputs + row] = sum(total[k]) + bias[k];
}

// Rows of x in the order in which four_bits_row() reads them, with zeros up to a whole number of 128 inputs: number
// 8 w + k of each 128 goes to 16 k + w.
static int64_t whole_128(int64_t inputs) { return (inputs + 127) / 128 * 128; }

static void reorder(const float *x, int64_t rows, int64_t inputs, float *ordered) {
    memset(ordered, 0, rows * whole_128(inputs) * sizeof(float));
    for (int64_t row = 0; row < rows; row++, x += inputs, ordered += whole_128(inputs))
        for (int64_t i = 0; i < inputs; i++) ordered[i / 128 * 128 + i % 8 * 16 + i % 128 / 8] = x[i];
}

// packed_row() for 4 bits; x as reorder() leaves it. A group fills 4, 8 or 16 of the sixteen words.
INLINE void four_bits_row(const Layer *layer, int64_t row, const float *x, const float *sums, float *y,
                          const int group, const int n) {
    const int64_t width = layer->inputs / 8, room = whole_128(layer->inputs);
    const uint32_t *weight = (const uint32_t *)layer->weight + row * width;
    float scales[GROUPS + 3], bias[4];
    lanes total[4] = {0};
    scales_and_biases(layer, row, sums, scales, bias, n);
    memset(scales + layer->inputs / group, 0, 3 * sizeof *scales);  // for the last of the sixteen words
    for (int64_t i = 0; i < width; i += 16, x += 128) {
        words word = {0};
        if (width - i >= 16) memcpy(&word, weight + i, sizeof word);
        else memcpy(&word, weight + i, (width - i) * sizeof *weight);
        lanes dot[4] = {0};
        for (int shift = 0; shift < 8; shift++) {
            lanes q = __builtin_convertvector((integers)(word >> 4 * shift & 15), lanes), input;
            for (int k = 0; k < n; k++) {
                memcpy(&input, x + k * room + 16 * shift, sizeof input);
                dot[k] += q * input;
            }
        }
        const float *s = scales + 8 * i / group;
        const int b = group == 128 ? 0 : group == 64 ? 0 : 1, c = 64 / group, d = group == 32 ? 3 : c;
        lanes scale = {s[0], s[0], s[0], s[0], s[b], s[b], s[b], s[b], s[c], s[c], s[c], s[c], s[d], s[d], s[d], s[d]};
        for (int k = 0; k < n; k++) total[k] += scale * dot[k];
    }
    for (int k = 0; k < n; k++) {
        floats half[2];
        memcpy(half, total + k, sizeof half);
        y[k * layer->outputs + row] = sum(half[0] + half[1]) + bias[k];
    }
}

INLINE void dense_row(const Layer *layer, int64_t row, const float *x, float *y, const int kind, const int n) {
    const int64_t first = row * layer->inputs;
    floats total[4] = {0}, other[4] = {0};  // two sums, since an addition waits for the one before it
    int64_t j = 0;
    for (; j + 16 <= layer->inputs; j += 16) {
        floats w = numbers(layer->weight, first + j, kind), v = numbers(layer->weight, first + j + 8, kind);
        for (int k = 0; k < n; k++) {
            total[k] += w * load(x + k * layer->inputs + j);
            other[k] += v * load(x + k * layer->inputs + j + 8);
        }
    }
    for (int k = 0; k < n; k++) {
        if (j < layer->inputs) total[k] += numbers(layer->weight, first + j, kind) * load(x + k * layer->inputs + j);
        total[k] += other[k];
    }
    for (int k = 0; k < n; k++) y[k * layer->outputs + row] = sum(total[k]);
}

// n, which is 1 or 4, is a constant in each of the two calls, and so are bits: the compiler unrolls their loops.
INLINE void one_row(const Layer *layer, int64_t row, const float *x, const float *sums, float *y, const int n) {
    switch (layer->bits) {
        case 2: packed_row(layer, row, x, sums, y, 2, n); break;
        case 3: packed_row(layer, row, x, sums, y, 3, n); break;
        case 4:
            if (layer->group == 32) four_bits_row(layer, row, x, sums, y, 32, n);
            else if (layer->group == 64) four_bits_row(layer, row, x, sums, y, 64, n);
            else four_bits_row(layer, row, x, sums, y, 128, n);
            break;
        case 5: packed_row(layer, row, x, sums, y, 5, n); break;
        case 6: packed_row(layer, row, x, sums, y, 6, n); break;
        case 8: packed_row(layer, row, x, sums, y, 8, n); break;
        default:
            if (layer->kind == FLOAT32) dense_row(layer, row, x, y, FLOAT32, n);
            else if (layer->kind == FLOAT16) dense_row(layer, row, x, y, FLOAT16, n);
            else dense_row(layer, row, x, y, BFLOAT16, n);
    }
}

#if defined(__x86_64__)
#define PAUSE __builtin_ia32_pause
#else
#define PAUSE sched_yield
#endif

// ---- threads ---------------------------------------------------------------------------------------------------------
//
// Work is cut into pieces, which threads take one after another. The caller takes pieces too, and waits at the end only
// for those that were begun: a thread that the system lets wait delays little. Between two calls a thread looks for
// pieces again and again, for some milliseconds, because to wake it takes longer than many a call.

enum { LOOKS = 1 << 17 };  // before a thread sleeps

static void (*work)(int piece);
static atomic_int waiting, unfinished, sleeping;  // pieces that nobody took, and that are not finished; threads
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t more = PTHREAD_COND_INITIALIZER;

// Do a piece of the work; 0: there is none.
static int work_on_piece(void) {
    int piece = atomic_load(&waiting);
    do {
        if (piece == 0) return 0;
    } while (!atomic_compare_exchange_weak(&waiting, &piece, piece - 1));
    work(piece - 1);
    atomic_fetch_sub(&unfinished, 1);
    return 1;
}

static void *thread(void *unused) {
    for (int looks = 0;; looks++) {
        if (work_on_piece()) looks = 0;
        if (looks < LOOKS) {
            PAUSE();
        } else {
            pthread_mutex_lock(&mutex);
            atomic_fetch_add(&sleeping, 1);
            while (!atomic_load(&waiting)) pthread_cond_wait(&more, &mutex);
            atomic_fetch_sub(&sleeping, 1);
            pthread_mutex_unlock(&mutex);
            looks = 0;
        }
    }
    return unused;
}

// Call each(0) ... each(pieces - 1), in any order, by so many threads. One call at a time.
static void parallel(void (*each)(int), int pieces, int threads) {
    static int started = 1;
    for (pthread_t id; started < threads && !pthread_create(&id, NULL, thread, NULL); started++) pthread_detach(id);
    work = each;
    atomic_store(&unfinished, pieces);
    atomic_store(&waiting, pieces);
    if (threads > 1 && atomic_load(&sleeping)) {
        pthread_mutex_lock(&mutex);
        pthread_cond_broadcast(&more);
        pthread_mutex_unlock(&mutex);
    }
    while (work_on_piece()) continue;
    while (atomic_load(&unfinished)) PAUSE();
}

// ---- the product of a layer ------------------------------------------------------------------------------------------

enum { PIECE = 1 << 15 };  // weights of a piece, at least

static struct {
    const Layer *layer;
    const float *x, *sums;
    float *y;
    int64_t rows, width, outputs;  // rows of x and their width; outputs of a piece
} task;

static void product_piece(int piece) {
    const int64_t first = piece * task.outputs, outputs = task.layer->outputs;
    const int64_t groups = task.layer->inputs / task.layer->group;
    for (int64_t row = first; row < first + task.outputs && row < outputs; row++)
        for (int64_t i = 0; i < task.rows; i += i + 4 <= task.rows ? 4 : 1) {
            const float *x = task.x + i * task.width, *sums = task.sums + i * groups;
            if (i + 4 <= task.rows) one_row(task.layer, row, x, sums, task.y + i * outputs, 4);
            else one_row(task.layer, row, x, sums, task.y + i * outputs, 1);
        }
}

// x (rows, in) float32 -> y (rows, out) by so many threads. One call at a time. Returns 1 where there is no memory, or
// a row has too many groups.
int product(const Layer *layer, const float *x, int64_t rows, float *y, int threads) {
    const int64_t groups = layer->inputs / layer->group, four_bits = layer->bits == 4;
    const int64_t width = four_bits ? whole_128(layer->inputs) : layer->inputs;
    float *sums = groups <= GROUPS ? malloc((rows * (groups + four_bits * width) + 1) * sizeof(float)) : NULL;
    if (!sums) return 1;
    for (int64_t i = 0; i < rows * groups; i++) {
        floats total = {0};
        for (int64_t j = 0; j < layer->group; j += 8) total += load(x + i * layer->group + j);
        sums[i] = sum(total);
    }
    if (four_bits) reorder(x, rows, layer->inputs, sums + rows * groups);
    task.layer = layer, task.x = four_bits ? sums + rows * groups : x, task.sums = sums, task.y = y;
    task.rows = rows, task.width = width;
    task.outputs = threads > 1 ? 1 + PIECE / (layer->inputs * rows) : layer->outputs;
    parallel(product_piece, (layer->outputs + task.outputs - 1) / task.outputs, threads);
    free(sums);
    return 0;
}
