// y = x W^T on a CPU, for one row x or a few. W is packed, w = scale q + bias, with an integer q of 2 to 8 bits for each
// weight and a scale and a bias for each group of inputs (MLX's format, see quantized.py), or it is dense.
//
// Eight inputs at a time: their integers fill `bits` bytes. Shifts of 0, bits, 2 bits, ... take all eight out of one
// number of 64 bits; they become float32 and are multiplied by x. Then a scale multiplies the sum over its group, and a
// bias the sum of x over the group, which is the same for every output. Nothing but these sums is rounded.
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

// Eight integers of so many bits, lowest bit first. Of 3, 5, 6 and 7 bytes the last ones are read apart: reading beyond
// the end of the weight could fail.
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

typedef struct {
    const void *weight, *scales, *biases;  // packed: (out, in bits / 8) bytes, (out, in / group), (out, in / group)
    int64_t outputs, inputs, group;
    int bits, kind;  // bits 0: dense; kind: of scales and biases, or of a dense weight
} Layer;

// The products of one row of a packed W with n rows of x, into y (n, out). sums (n, groups): of x over each group.
INLINE void packed_row(const Layer *layer, int64_t row, const float *x, const float *sums, float *y, const int bits,
                       const int n) {
    const int64_t groups = layer->inputs / layer->group;
    const uint8_t *bytes = (const uint8_t *)layer->weight + row * (layer->inputs * bits / 8);
    floats total[4] = {0};
    float bias[4] = {0};
    for (int64_t i = 0; i < groups; i++) {
        floats dot[4] = {0};
        for (int64_t j = 0; j < layer->group; j += 8, x += 8, bytes += bits) {
            floats q = unpack(bytes, bits);
            for (int k = 0; k < n; k++) dot[k] += q * load(x + k * layer->inputs);
        }
        const float scale = number(layer->scales, row * groups + i, layer->kind);
        const float offset = number(layer->biases, row * groups + i, layer->kind);
        for (int k = 0; k < n; k++) {
            total[k] += scale * dot[k];
            bias[k] += offset * sums[k * groups + i];
        }
    }
    for (int k = 0; k < n; k++) y[k * layer->outputs + row] = sum(total[k]) + bias[k];
}

INLINE void dense_row(const Layer *layer, int64_t row, const float *x, float *y, const int kind, const int n) {
    const int64_t first = row * layer->inputs;
    floats total[4] = {0};
    for (int64_t j = 0; j < layer->inputs; j += 8) {
        halves eight = {0};
        if (kind != FLOAT32) memcpy(&eight, (const uint16_t *)layer->weight + first + j, sizeof eight);
        floats w = kind == FLOAT32 ? load((const float *)layer->weight + first + j) : widen(eight, kind);
        for (int k = 0; k < n; k++) total[k] += w * load(x + k * layer->inputs + j);
    }
    for (int k = 0; k < n; k++) y[k * layer->outputs + row] = sum(total[k]);
}

// n, which is 1 or 4, is a constant in each of the two calls, and so are bits: the compiler unrolls their loops.
INLINE void one_row(const Layer *layer, int64_t row, const float *x, const float *sums, float *y, const int n) {
    switch (layer->bits) {
        case 2: packed_row(layer, row, x, sums, y, 2, n); break;
        case 3: packed_row(layer, row, x, sums, y, 3, n); break;
        case 4: packed_row(layer, row, x, sums, y, 4, n); break;
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
// The outputs are cut into pieces, which threads take one after another. The caller takes pieces too, and waits at the
// end only for those that were begun: a thread that the system lets wait delays little. Between two products a thread
// looks for pieces again and again, for some milliseconds, because to wake it takes longer than many a product.

enum { PIECE = 1 << 15, LOOKS = 1 << 17 };  // weights of a piece, at least; looks before a thread sleeps

static struct {
    const Layer *layer;
    const float *x, *sums;
    float *y;
    int64_t rows, outputs;  // of x; of a piece
} work;
static atomic_int waiting, unfinished, sleeping;  // pieces that nobody took, and that are not finished; threads
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t more = PTHREAD_COND_INITIALIZER;

// Compute a piece of the work; 0: there is none.
static int work_on_piece(void) {
    int piece = atomic_load(&waiting);
    do {
        if (piece == 0) return 0;
    } while (!atomic_compare_exchange_weak(&waiting, &piece, piece - 1));
    const int64_t first = (piece - 1) * work.outputs, outputs = work.layer->outputs;
    const int64_t groups = work.layer->inputs / work.layer->group;
    for (int64_t row = first; row < first + work.outputs && row < outputs; row++)
        for (int64_t i = 0; i < work.rows; i += i + 4 <= work.rows ? 4 : 1) {
            const float *x = work.x + i * work.layer->inputs, *sums = work.sums + i * groups;
            if (i + 4 <= work.rows) one_row(work.layer, row, x, sums, work.y + i * outputs, 4);
            else one_row(work.layer, row, x, sums, work.y + i * outputs, 1);
        }
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

// x (rows, in) float32 -> y (rows, out) by so many threads. One call at a time. Returns 1 where there is no memory.
int product(const Layer *layer, const float *x, int64_t rows, float *y, int threads) {
    static int started = 1;
    const int64_t groups = layer->inputs / layer->group;
    float *sums = malloc((rows * groups + 1) * sizeof(float));
    if (!sums) return 1;
    for (int64_t i = 0; i < rows * groups; i++) {
        floats total = {0};
        for (int64_t j = 0; j < layer->group; j += 8) total += load(x + i * layer->group + j);
        sums[i] = sum(total);
    }
    for (pthread_t id; started < threads && !pthread_create(&id, NULL, thread, NULL); started++) pthread_detach(id);
    work.layer = layer, work.x = x, work.sums = sums, work.y = y, work.rows = rows;
    work.outputs = threads > 1 ? 1 + PIECE / (layer->inputs * rows) : layer->outputs;
    const int pieces = (layer->outputs + work.outputs - 1) / work.outputs;
    atomic_store(&unfinished, pieces);
    atomic_store(&waiting, pieces);
    if (threads > 1 && atomic_load(&sleeping)) {
        pthread_mutex_lock(&mutex);
        pthread_cond_broadcast(&more);
        pthread_mutex_unlock(&mutex);
    }
    while (work_on_piece()) continue;
    while (atomic_load(&unfinished)) PAUSE();
    free(sums);
    return 0;
}
