// A block of a model on a CPU, forward and backward: norms, products, rotary positions, attention and MLP in one call.
// Every function mirrors one of model.py. All numbers of a row fill whole groups of eight.
//
// N = batch length tokens, C width, D head_dim, F hidden; H and KV heads. Threads share the rows of x, then the heads,
// then the rows again; each multiplies by a BLAS that uses one thread. A gradient of a weight sums over all rows, so
// that threads share its outputs: no number depends on how many threads there are.
#include <math.h>

#include "matvec.c"

typedef struct {
    float *weight, *bias;  // NULL: there is none
} Part;

typedef struct {  // of a block, or their gradients
    Part attn_norm, q, k, v, q_norm, k_norm, out, mlp_norm, gate, up, down;
} Parts;

enum { RELU2, GELU, GELU_TANH, SWIGLU, GEGLU };

// cblas_sgemm: c (m, n) = alpha a b + beta c, row by row; a or b may be the transpose of what is in memory.
typedef void Gemm(int order, int transpose_a, int transpose_b, int m, int n, int k, float alpha, const float *a,
                  int lda, const float *b, int ldb, float beta, float *c, int ldc);
enum { ROW_MAJOR = 101, PLAIN = 111, TRANSPOSED = 112 };

typedef struct {
    int64_t batch, length, width, heads, kv_heads, head_dim, hidden, rotary;
    int layer_norm, activation, threads;
    float norm_eps, attn_scale, residual_scale;
    const float *cosines, *sines;  // (length, rotary / 2)
    Gemm *gemm;
} Shape;

// What the backward pass needs, in one buffer of saved_size() numbers. (N, C), or as it says.
typedef struct {
    float *normed, *raw_q, *raw_k, *q, *k, *v;  // q (N, H D), k and v (N, KV D); raw: before norm and positions
    float *sums;                                // (N, H) log of the sum of e^score
    float *heads, *middle, *mlp_normed;         // heads (N, H D); middle: the residual stream after attention
    float *gate, *up;                           // (N, F)
} Saved;

static struct {
    const Shape *shape;
    const Parts *parts, *gradients;
    const float *x, *dy;
    float *y, *dx, *hidden;                     // hidden (N, F): what the activation function gives
    Saved saved;
    float *dmiddle, *dgate, *dup, *dheads, *dq, *dk, *dv, *norm_sums;
    int64_t tokens, rows, C, D, F, Q, KV;       // rows of a piece; Q = H D, KV = kv_heads D
    atomic_int failed;
} now;

// ---- parts of a block ------------------------------------------------------------------------------------------------

// y (n, out) = x (n, in) W^T + b
static void linear(const Part *part, const float *x, int64_t n, int64_t in, int64_t out, float *y) {
    for (int64_t i = 0; part->bias && i < n; i++) memcpy(y + i * out, part->bias, out * sizeof *y);
    now.shape->gemm(ROW_MAJOR, PLAIN, TRANSPOSED, n, out, in, 1, x, in, part->weight, in, part->bias ? 1 : 0, y, out);
}

// y (n, out) = residual + scale (x (n, in) W^T + b)
static void add_linear(const Part *part, const float *x, int64_t n, int64_t in, int64_t out, const float *residual,
                       float *y) {
    const float scale = now.shape->residual_scale;
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < out; j++)
            y[i * out + j] = residual[i * out + j] + (part->bias ? scale * part->bias[j] : 0);
    now.shape->gemm(ROW_MAJOR, PLAIN, TRANSPOSED, n, out, in, scale, x, in, part->weight, in, 1, y, out);
}

// dx (n, in) = scale dy (n, out) W, added to dx where it is not the first
static void linear_backward(const Part *part, const float *dy, int64_t n, int64_t in, int64_t out, float scale,
                            int first, float *dx) {
    now.shape->gemm(ROW_MAJOR, PLAIN, PLAIN, n, in, out, scale, dy, out, part->weight, in, first ? 0 : 1, dx, in);
}

// The mean of a row (0 in an RMSNorm), and 1 / its deviation from that.
INLINE float statistics(const float *x, int64_t width, int layer, float eps, float *mean) {
    floats total = {0}, squares = {0};
    for (int64_t j = 0; layer && j < width; j += 8) total += load(x + j);
    *mean = sum(total) / width;
    for (int64_t j = 0; j < width; j += 8) squares += (load(x + j) - *mean) * (load(x + j) - *mean);
    return 1 / sqrtf(sum(squares) / width + eps);
}

static void norm(const Part *part, const float *x, int64_t n, int64_t width, int layer, float *y) {
    for (; n; n--, x += width, y += width) {
        float mean, factor = statistics(x, width, layer, now.shape->norm_eps, &mean);
        for (int64_t j = 0; j < width; j += 8) {
            floats value = (load(x + j) - mean) * factor * load(part->weight + j);
            store(y + j, part->bias ? value + load(part->bias + j) : value);
        }
    }
}

// y = z w + b, z = (x - mean) factor: dx = factor (g - mean(g) - z mean(g z)), g = dy w; an RMSNorm has no mean(g).
// dx = residual + that; NULL: no residual. sums (2, width): of dy z and of dy, added. dx may be dy.
static void norm_backward(const Part *part, const float *x, const float *dy, int64_t n, int64_t width, int layer,
                          const float *residual, float *dx, float *sums) {
    for (; n; n--, x += width, dy += width, dx += width, residual += residual ? width : 0) {
        float mean, factor = statistics(x, width, layer, now.shape->norm_eps, &mean);
        floats total = {0}, product = {0};
        for (int64_t j = 0; j < width; j += 8) {
            floats z = (load(x + j) - mean) * factor, d = load(dy + j), g = d * load(part->weight + j);
            total += g, product += g * z;
            store(sums + j, load(sums + j) + d * z);
            if (part->bias) store(sums + width + j, load(sums + width + j) + d);
        }
        const float mean_g = layer ? sum(total) / width : 0, mean_gz = sum(product) / width;
        for (int64_t j = 0; j < width; j += 8) {
            floats z = (load(x + j) - mean) * factor, g = load(dy + j) * load(part->weight + j);
            floats d = factor * (g - mean_g - z * mean_gz);
            store(dx + j, residual ? load(residual + j) + d : d);
        }
    }
}

// Norm and rotary positions of queries or keys: raw (n, heads D), of the tokens from `first` on -> y. They may be one.
static void turn(const Part *weight, const float *raw, int64_t first, int64_t n, int64_t heads, float *y) {
    const Shape *shape = now.shape;
    const int64_t half = shape->rotary / 2, D = now.D;
    for (int64_t i = 0; i < n * heads; i++, raw += D, y += D) {
        const float *cosines = shape->cosines + (first + i / heads) % shape->length * half;
        const float *sines = shape->sines + (first + i / heads) % shape->length * half;
        if (weight->weight) norm(weight, raw, 1, D, 0, y);
        for (int64_t j = 0; j < half; j++) {
            const float a = y[j], b = y[j + half];
            y[j] = a * cosines[j] - b * sines[j];
            y[j + half] = a * sines[j] + b * cosines[j];
        }
    }
}

// The gradient of turn() for one head of all tokens of a text: raw and dy point to the head in the first token's row.
static void turn_backward(const Part *weight, const float *raw, int64_t stride, float *dy, float *sums) {
    const Shape *shape = now.shape;
    const int64_t half = shape->rotary / 2;
    for (int64_t i = 0; i < shape->length; i++, raw += stride, dy += stride) {
        const float *cosines = shape->cosines + i * half, *sines = shape->sines + i * half;
        for (int64_t j = 0; j < half; j++) {
            const float a = dy[j], b = dy[j + half];
            dy[j] = a * cosines[j] + b * sines[j];
            dy[j + half] = b * cosines[j] - a * sines[j];
        }
        if (weight->weight) norm_backward(weight, raw, dy, 1, now.D, 0, NULL, dy, sums);
    }
}

// erf(x), within 5e-7 (Abramowitz & Stegun 1964, 7.1.26), and e^(-x^2).
INLINE floats erf_of(floats x, floats *e) {
    const floats size = choose(x < 0, -x, x), t = 1 / (1 + 0.3275911f * size);
    *e = exponential(-size * size);
    floats p = ((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t;
    const floats y = 1 - ((p - 0.284496736f) * t + 0.254829592f) * t * *e;
    return choose(x < 0, -y, y);
}

// An activation function and its slope. Of SWIGLU and GEGLU it is that of the gate.
INLINE floats activated(floats x, const int activation, floats *slope) {
    if (activation == RELU2) {
        const floats positive = choose(x > 0, x, x * 0);
        *slope = 2 * positive;
        return positive * positive;
    }
    if (activation == GELU) {
        floats e, half = 0.5f + 0.5f * erf_of(x * 0.707106781f, &e);
        *slope = half + 0.398942280f * x * e;
        return x * half;
    }
    const int silu = activation == SWIGLU;
    const floats s = sigmoid(silu ? x : 1.59576912f * (x + 0.044715f * x * x * x));
    *slope = s + x * s * (1 - s) * (silu ? x * 0 + 1 : 1.59576912f * (1 + 0.134145f * x * x));
    return x * s;
}

// gate, up -> hidden; with dhidden, which is in dup, also the gradients dgate and dup. n numbers.
INLINE void activate_by(const int activation, const int backward, int64_t first, int64_t n) {
    const int gated = activation >= SWIGLU;
    for (int64_t i = first; i < first + n; i += 8) {
        floats up = load(now.saved.up + i), slope, value;
        value = activated(gated ? load(now.saved.gate + i) : up, activation, &slope);
        store(now.hidden + i, gated ? value * up : value);
        if (!backward) continue;
        const floats d = load(now.dup + i);
        if (gated) store(now.dgate + i, d * up * slope);
        store(now.dup + i, d * (gated ? value : slope));
    }
}

INLINE void activate(const int backward, int64_t first, int64_t n) {
    switch (now.shape->activation) {
        case RELU2: activate_by(RELU2, backward, first, n); break;
        case GELU: activate_by(GELU, backward, first, n); break;
        case GELU_TANH: activate_by(GELU_TANH, backward, first, n); break;
        case SWIGLU: activate_by(SWIGLU, backward, first, n); break;
        case GEGLU: activate_by(GEGLU, backward, first, n); break;
    }
}

// ---- attention -------------------------------------------------------------------------------------------------------

enum { QUERIES = 64 };  // whose scores are in memory at a time: they skip the keys after the last one of them

// scores (n, room) of n queries from `start` on, and of the keys up to the last of them: scale q k^T
static void score(const float *q, const float *k, int64_t start, int64_t n, int64_t room, float *scores) {
    now.shape->gemm(ROW_MAJOR, PLAIN, TRANSPOSED, n, start + n, now.D, now.shape->attn_scale, q + start * now.Q, now.Q,
                    k, now.KV, 0, scores, room);
}

// One head of one text: heads = softmax(scale q k^T) v.
static void attention(int piece) {
    const int64_t H = now.shape->heads, T = now.shape->length, D = now.D, room = (T + 7) / 8 * 8;
    const int64_t text = piece / H, head = piece % H, own = text * T * now.Q + head * D;
    const int64_t shared = text * T * now.KV + head / (H / now.shape->kv_heads) * D;
    float *scores = malloc(QUERIES * room * sizeof *scores);
    if (!scores) {
        atomic_store(&now.failed, 1);
        return;
    }
    for (int64_t start = 0; start < T; start += QUERIES) {
        const int64_t n = T - start < QUERIES ? T - start : QUERIES;
        score(now.saved.q + own, now.saved.k + shared, start, n, room, scores);
        for (int64_t i = 0; i < n; i++) {
            const int64_t seen = start + i + 1;
            float *row = scores + i * room, largest = -INFINITY;
            floats most = {-INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY};
            for (int64_t j = seen; j % 8; j++) row[j] = -INFINITY;
            for (int64_t j = 0; j < seen; j += 8) most = choose(load(row + j) < most, most, load(row + j));
            for (int j = 0; j < 8; j++) largest = most[j] < largest ? largest : most[j];
            floats total = {0};
            for (int64_t j = 0; j < seen; j += 8) {
                const floats e = exponential(load(row + j) - largest);
                store(row + j, e);
                total += e;
            }
            const float factor = 1 / sum(total);
            for (int64_t j = 0; j < seen; j += 8) store(row + j, load(row + j) * factor);
            for (int64_t j = seen; j < start + n; j++) row[j] = 0;
            now.saved.sums[(text * T + start + i) * H + head] = largest + logf(sum(total));
        }
        now.shape->gemm(ROW_MAJOR, PLAIN, PLAIN, n, D, start + n, 1, scores, room, now.saved.v + shared, now.KV, 0,
                        now.saved.heads + own + start * now.Q, now.Q);
    }
    free(scores);
}

// The queries that share a key head of a text: dheads -> dq, dk, dv. With P = softmax(S), S = scale q k^T, y = P v:
// dv = P^T dy, dS = P (dy v^T - the sum of dy y), dq = scale dS k, dk = scale dS^T q.
static void attention_backward(int piece) {
    const int64_t H = now.shape->heads, T = now.shape->length, D = now.D, room = (T + 7) / 8 * 8;
    const int64_t text = piece / now.shape->kv_heads, head = piece % now.shape->kv_heads;
    const int64_t shared = text * T * now.KV + head * D, each = H / now.shape->kv_heads;
    const float *k = now.saved.k + shared, *v = now.saved.v + shared;
    float *dk = now.dk + shared, *dv = now.dv + shared, *sums = now.norm_sums + piece * 4 * D;
    float *weights = malloc(2 * QUERIES * room * sizeof *weights), *dscores = weights + QUERIES * room;
    if (!weights) {
        atomic_store(&now.failed, 1);
        return;
    }
    memset(sums, 0, 4 * D * sizeof *sums);
    for (int64_t i = 0; i < T; i++) {
        memset(dk + i * now.KV, 0, D * sizeof *dk);
        memset(dv + i * now.KV, 0, D * sizeof *dv);
    }
    for (int64_t h = head * each; h < (head + 1) * each; h++) {
        const int64_t own = text * T * now.Q + h * D;
        for (int64_t start = 0; start < T; start += QUERIES) {
            const int64_t n = T - start < QUERIES ? T - start : QUERIES, end = start + n;
            const float *q = now.saved.q + own + start * now.Q, *dy = now.dheads + own + start * now.Q;
            const float *y = now.saved.heads + own + start * now.Q;
            score(now.saved.q + own, k, start, n, room, weights);
            now.shape->gemm(ROW_MAJOR, PLAIN, TRANSPOSED, n, end, D, 1, dy, now.Q, v, now.KV, 0, dscores, room);
            for (int64_t i = 0; i < n; i++) {
                const int64_t seen = start + i + 1;
                const float log_sum = now.saved.sums[(text * T + start + i) * H + h];
                float *row = weights + i * room, *drow = dscores + i * room;
                floats product = {0};
                for (int64_t j = 0; j < D; j += 8) product += load(dy + i * now.Q + j) * load(y + i * now.Q + j);
                const float mean = sum(product), scale = now.shape->attn_scale;
                for (int64_t j = 0; j < seen; j += 8) {
                    const floats weight = exponential(load(row + j) - log_sum);
                    store(row + j, weight);
                    store(drow + j, scale * weight * (load(drow + j) - mean));
                }
                for (int64_t j = seen; j < end; j++) row[j] = drow[j] = 0;
            }
            now.shape->gemm(ROW_MAJOR, TRANSPOSED, PLAIN, end, D, n, 1, weights, room, dy, now.Q, 1, dv, now.KV);
            now.shape->gemm(ROW_MAJOR, TRANSPOSED, PLAIN, end, D, n, 1, dscores, room, q, now.Q, 1, dk, now.KV);
            now.shape->gemm(ROW_MAJOR, PLAIN, PLAIN, n, D, end, 1, dscores, room, k, now.KV, 0,
                            now.dq + own + start * now.Q, now.Q);
        }
        turn_backward(&now.parts->q_norm, now.saved.raw_q + own, now.Q, now.dq + own, sums);
    }
    turn_backward(&now.parts->k_norm, now.saved.raw_k + shared, now.KV, dk, sums + 2 * D);
    free(weights);
}

// ---- the rows of a piece ---------------------------------------------------------------------------------------------

static int64_t rows_of(int piece, int64_t *first) {
    *first = piece * now.rows;
    return now.tokens - *first < now.rows ? now.tokens - *first : now.rows;
}

static void before_attention(int piece) {
    int64_t first, n = rows_of(piece, &first), C = now.C;
    const Parts *parts = now.parts;
    const Saved *saved = &now.saved;
    float *normed = saved->normed + first * C, *raw_q = saved->raw_q + first * now.Q;
    float *raw_k = saved->raw_k + first * now.KV;
    norm(&parts->attn_norm, now.x + first * C, n, C, now.shape->layer_norm, normed);
    linear(&parts->q, normed, n, C, now.Q, raw_q);
    linear(&parts->k, normed, n, C, now.KV, raw_k);
    linear(&parts->v, normed, n, C, now.KV, saved->v + first * now.KV);
    turn(&parts->q_norm, raw_q, first, n, now.shape->heads, saved->q + first * now.Q);
    turn(&parts->k_norm, raw_k, first, n, now.shape->kv_heads, saved->k + first * now.KV);
}

static void after_attention(int piece) {
    int64_t first, n = rows_of(piece, &first), C = now.C, F = now.F;
    const Parts *parts = now.parts;
    const Saved *saved = &now.saved;
    float *middle = saved->middle + first * C, *normed = saved->mlp_normed + first * C;
    add_linear(&parts->out, saved->heads + first * now.Q, n, now.Q, C, now.x + first * C, middle);
    norm(&parts->mlp_norm, middle, n, C, now.shape->layer_norm, normed);
    if (parts->gate.weight) linear(&parts->gate, normed, n, C, F, saved->gate + first * F);
    linear(&parts->up, normed, n, C, F, saved->up + first * F);
    activate(0, first * F, n * F);
    add_linear(&parts->down, now.hidden + first * F, n, F, C, middle, now.y + first * C);
}

// The sums of a norm's gradients over a piece: of attn_norm (which = 0) and mlp_norm (1) after those of all heads.
static float *norm_sums(int piece, int which) {
    return now.norm_sums + now.shape->batch * now.shape->kv_heads * 4 * now.D + (2 * piece + which) * 2 * now.C;
}

static void backward_to_attention(int piece) {
    int64_t first, n = rows_of(piece, &first), C = now.C, F = now.F;
    const Parts *parts = now.parts;
    const float *dy = now.dy + first * C, scale = now.shape->residual_scale;
    float *dnormed = now.dx + first * C, *dmiddle = now.dmiddle + first * C, *sums = norm_sums(piece, 1);
    memset(sums, 0, 2 * C * sizeof *sums);
    linear_backward(&parts->down, dy, n, F, C, scale, 1, now.dup + first * F);
    activate(1, first * F, n * F);
    linear_backward(&parts->up, now.dup + first * F, n, C, F, 1, 1, dnormed);
    if (parts->gate.weight) linear_backward(&parts->gate, now.dgate + first * F, n, C, F, 1, 0, dnormed);
    norm_backward(&parts->mlp_norm, now.saved.middle + first * C, dnormed, n, C, now.shape->layer_norm, dy, dmiddle,
                  sums);
    linear_backward(&parts->out, dmiddle, n, now.Q, C, scale, 1, now.dheads + first * now.Q);
}

static void backward_from_attention(int piece) {
    int64_t first, n = rows_of(piece, &first), C = now.C;
    const Parts *parts = now.parts;
    float *dx = now.dx + first * C, *sums = norm_sums(piece, 0);
    memset(sums, 0, 2 * C * sizeof *sums);
    linear_backward(&parts->q, now.dq + first * now.Q, n, C, now.Q, 1, 1, dx);
    linear_backward(&parts->k, now.dk + first * now.KV, n, C, now.KV, 1, 0, dx);
    linear_backward(&parts->v, now.dv + first * now.KV, n, C, now.KV, 1, 0, dx);
    norm_backward(&parts->attn_norm, now.x + first * C, dx, n, C, now.shape->layer_norm, now.dmiddle + first * C, dx,
                  sums);
}

// ---- gradients of weights --------------------------------------------------------------------------------------------

static struct {
    const Part *gradient;
    const float *dy, *x;  // (N, out), (N, in)
    int64_t outputs, inputs;
    float scale;
} products[7];  // 7 linear layers

static int cuts;  // pieces of a product

// A share of the outputs of a linear layer: dW = dy^T x, db = the sum of dy.
static void weight_gradient(int piece) {
    const typeof(*products) *product = products + piece / cuts;
    const int64_t outputs = product->outputs, inputs = product->inputs, size = (outputs / cuts + 15) / 16 * 16;
    const int64_t first = piece % cuts * size, left = outputs - first;
    const int64_t n = left < size || piece % cuts == cuts - 1 ? left : size;
    const Part *gradient = product->gradient;
    if (!gradient->weight || n <= 0) return;
    now.shape->gemm(ROW_MAJOR, TRANSPOSED, PLAIN, n, inputs, now.tokens, product->scale, product->dy + first, outputs,
                    product->x, inputs, 0, gradient->weight + first * inputs, inputs);
    if (!gradient->bias) return;
    memset(gradient->bias + first, 0, n * sizeof(float));
    for (int64_t i = 0; i < now.tokens; i++)
        for (int64_t j = first; j < first + n; j++) gradient->bias[j] += product->scale * product->dy[i * outputs + j];
}

// n sums (2, width), `stride` apart -> the gradients of a norm.
static void norm_gradient(const Part *gradient, const float *sums, int64_t n, int64_t stride, int64_t width) {
    if (gradient->weight) memset(gradient->weight, 0, width * sizeof(float));
    if (gradient->bias) memset(gradient->bias, 0, width * sizeof(float));
    for (; n; n--, sums += stride)
        for (int64_t j = 0; j < width; j++) {
            if (gradient->weight) gradient->weight[j] += sums[j];
            if (gradient->bias) gradient->bias[j] += sums[width + j];
        }
}

// ---- a block ---------------------------------------------------------------------------------------------------------

// Fills in `now` for a call; returns how many pieces the rows make. Called with buffer NULL, it gives its size.
static int64_t arrange(const Shape *shape, const Parts *parts, float *buffer, int64_t *size) {
    now.shape = shape, now.parts = parts;
    now.tokens = shape->batch * shape->length, now.C = shape->width, now.D = shape->head_dim, now.F = shape->hidden;
    now.Q = shape->heads * now.D, now.KV = shape->kv_heads * now.D;
    now.rows = now.tokens / 4 / 16 * 16;  // for each piece BLAS copies the weights into its own order
    now.rows = now.rows < 64 ? 64 : now.rows > 256 ? 256 : now.rows;
    atomic_store(&now.failed, 0);
    const int64_t N = now.tokens, C = now.C;
    Saved *saved = &now.saved;
    float *end = buffer;
#define TAKE(pointer, n) pointer = end, end += (n)
    TAKE(saved->normed, N * C), TAKE(saved->q, N * now.Q), TAKE(saved->k, N * now.KV), TAKE(saved->v, N * now.KV);
    saved->raw_q = saved->q, saved->raw_k = saved->k;
    if (parts->q_norm.weight) TAKE(saved->raw_q, N * now.Q), TAKE(saved->raw_k, N * now.KV);
    TAKE(saved->heads, N * now.Q), TAKE(saved->middle, N * C), TAKE(saved->mlp_normed, N * C);
    TAKE(saved->up, N * now.F), TAKE(saved->sums, N * shape->heads);
    if (parts->gate.weight) TAKE(saved->gate, N * now.F);
    *size = end - buffer;
    return (N + now.rows - 1) / now.rows;
}

int64_t saved_size(const Shape *shape, const Parts *parts) {
    int64_t size;
    arrange(shape, parts, NULL, &size);
    return size;
}

// x (N, C) -> y (N, C), and what the backward pass needs. Returns 1 where there is no memory.
int block_forward(const Shape *shape, const Parts *parts, const float *x, float *y, float *saved) {
    int64_t size, pieces = arrange(shape, parts, saved, &size);
    now.x = x, now.y = y;
    now.hidden = malloc(now.tokens * now.F * sizeof(float));
    if (!now.hidden) return 1;
    parallel(before_attention, pieces, shape->threads);
    parallel(attention, shape->batch * shape->heads, shape->threads);
    parallel(after_attention, pieces, shape->threads);
    free(now.hidden);
    return atomic_load(&now.failed);
}

// The gradients dx (N, C) and those of all parts, from dy (N, C), x and what block_forward() saved.
int block_backward(const Shape *shape, const Parts *parts, const Parts *gradients, const float *x, const float *dy,
                   float *saved, float *dx) {
    int64_t size, pieces = arrange(shape, parts, saved, &size), heads = shape->batch * shape->kv_heads;
    const int64_t N = now.tokens, C = now.C, D = now.D, F = now.F, Q = now.Q, KV = now.KV;
    const int64_t gate = parts->gate.weight ? N * F : 0, sums = heads * 4 * D + pieces * 4 * C;
    float *buffer = malloc((2 * N * F + gate + N * (C + 2 * Q + 2 * KV) + sums) * sizeof *buffer);
    if (!buffer) return 1;
    now.x = x, now.dy = dy, now.dx = dx;
    float *end = buffer;
    TAKE(now.hidden, N * F), TAKE(now.dup, N * F), TAKE(now.dgate, gate), TAKE(now.dmiddle, N * C);
    TAKE(now.dheads, N * Q), TAKE(now.dq, N * Q), TAKE(now.dk, N * KV), TAKE(now.dv, N * KV);
    now.norm_sums = end;
    parallel(backward_to_attention, pieces, shape->threads);
    parallel(attention_backward, heads, shape->threads);
    parallel(backward_from_attention, pieces, shape->threads);
    const Saved *s = &now.saved;
    const typeof(*products) all[] = {
        {&gradients->up, now.dup, s->mlp_normed, F, C, 1},
        {&gradients->gate, now.dgate, s->mlp_normed, F, C, 1},
        {&gradients->down, dy, now.hidden, C, F, shape->residual_scale},
        {&gradients->q, now.dq, s->normed, Q, C, 1},
        {&gradients->k, now.dk, s->normed, KV, C, 1},
        {&gradients->v, now.dv, s->normed, KV, C, 1},
        {&gradients->out, now.dmiddle, s->heads, C, Q, shape->residual_scale},
    };
    memcpy(products, all, sizeof all);
    cuts = 2;
    parallel(weight_gradient, 7 * cuts, shape->threads);
    norm_gradient(&gradients->q_norm, now.norm_sums, heads, 4 * D, D);
    norm_gradient(&gradients->k_norm, now.norm_sums + 2 * D, heads, 4 * D, D);
    norm_gradient(&gradients->attn_norm, norm_sums(0, 0), pieces, 4 * C, C);
    norm_gradient(&gradients->mlp_norm, norm_sums(0, 1), pieces, 4 * C, C);
    free(buffer);
    return atomic_load(&now.failed);
}

// ---- the loss --------------------------------------------------------------------------------------------------------

static struct {
    const float *x, *weight, *weights;  // (N, C), (V, C), (N)
    const int32_t *targets;             // (N)
    float *dlogits, *dx;                // (N, V), (N, C)
    double *losses;                     // (N)
    float scale;
    int64_t V;
} head;

// Rows of x -> their losses, and the gradients of the weighted sum: (softmax - 1 at the target) weight.
static void loss_piece(int piece) {
    int64_t first, n = rows_of(piece, &first), C = now.C, V = head.V;
    float *logits = head.dlogits + first * V;
    now.shape->gemm(ROW_MAJOR, PLAIN, TRANSPOSED, n, V, C, head.scale, head.x + first * C, C, head.weight, C, 0, logits,
                    V);
    for (int64_t i = first; i < first + n; i++, logits += V) {
        floats most = load(logits), total = {0};
        for (int64_t j = 8; j < V; j += 8) most = choose(load(logits + j) < most, most, load(logits + j));
        float largest = most[0];
        for (int j = 1; j < 8; j++) largest = most[j] < largest ? largest : most[j];
        const float at_target = logits[head.targets[i]];
        for (int64_t j = 0; j < V; j += 8) {
            const floats e = exponential(load(logits + j) - largest);
            store(logits + j, e);
            total += e;
        }
        head.losses[i] = head.weights[i] * (logf(sum(total)) + (largest - at_target));
        const float factor = head.weights[i] / sum(total);
        for (int64_t j = 0; j < V; j += 8) store(logits + j, load(logits + j) * factor);
        logits[head.targets[i]] -= head.weights[i];
    }
    now.shape->gemm(ROW_MAJOR, PLAIN, PLAIN, n, C, V, head.scale, head.dlogits + first * V, V, head.weight, C, 0,
                    head.dx + first * C, C);
}

// The sum of weights cross_entropy(scale x W^T, targets), and its gradients dx and dW. shape: its batch, length, width,
// threads and gemm. Returns 1 where there is no memory, or a target is no token.
int head_loss(const Shape *shape, int64_t V, float scale, const float *x, const float *weight, const int32_t *targets,
              const float *weights, double *total, float *dx, float *dweight) {
    static Parts none;
    int64_t size, pieces = arrange(shape, &none, NULL, &size), N = now.tokens;
    for (int64_t i = 0; i < N; i++)
        if (targets[i] < 0 || targets[i] >= V) return 1;
    head.dlogits = malloc(N * V * sizeof(float));
    head.losses = malloc(N * sizeof(double));
    if (head.dlogits && head.losses) {
        head.x = x, head.weight = weight, head.weights = weights, head.targets = targets, head.dx = dx;
        head.scale = scale, head.V = V;
        parallel(loss_piece, pieces, shape->threads);
        const Part gradient = {dweight, NULL};
        products[0] = (typeof(*products)){&gradient, head.dlogits, x, V, now.C, scale};
        cuts = V < 1024 ? 2 : V < 8192 ? 4 : 16;
        parallel(weight_gradient, cuts, shape->threads);
        *total = 0;
        for (int64_t i = 0; i < N; i++) *total += head.losses[i];
    }
    const int failed = !head.dlogits || !head.losses;
    free(head.dlogits);
    free(head.losses);
    return failed;
}

// ---- the optimizer ---------------------------------------------------------------------------------------------------
//
// Arrays are cut into pieces of so many numbers, which threads share.

enum { NUMBERS = 1 << 15 };

typedef struct {
    const float *gradient, *parameter;
    float *mean, *square, *updated;
    int64_t size;
} Array;

static struct {
    const Array *arrays;
    double *sums;  // of each piece
    float beta1, beta2, rate, factor, eps;
} update;

// The array of a piece, and the first and the last of its numbers.
static const Array *array_of(int64_t piece, int64_t *first, int64_t *end) {
    const Array *array = update.arrays;
    for (; piece * NUMBERS >= array->size; array++) piece -= (array->size + NUMBERS - 1) / NUMBERS;
    *first = piece * NUMBERS;
    *end = *first + NUMBERS < array->size ? *first + NUMBERS : array->size;
    return array;
}

static int64_t pieces_of(const Array *arrays, int n) {
    int64_t pieces = 0;
    for (update.arrays = arrays; n; n--, arrays++) pieces += (arrays->size + NUMBERS - 1) / NUMBERS;
    return pieces;
}

static void square_piece(int piece) {
    int64_t first, end;
    const float *x = array_of(piece, &first, &end)->gradient;
    floats total = {0};
    for (; first + 8 <= end; first += 8) total += load(x + first) * load(x + first);
    double rest = sum(total);
    for (; first < end; first++) rest += x[first] * x[first];
    update.sums[piece] = rest;
}

// The sum of all gradients' squares; less than 0 where there is no memory.
double sum_of_squares(const Array *arrays, int n, int threads) {
    const int64_t pieces = pieces_of(arrays, n);
    double total = 0;
    update.sums = malloc(pieces * sizeof(double));
    if (!update.sums) return -1;
    parallel(square_piece, pieces, threads);
    for (int64_t i = 0; i < pieces; i++) total += update.sums[i];
    free(update.sums);
    return total;
}

static void adam_piece(int piece) {
    int64_t first, end;
    const Array *array = array_of(piece, &first, &end);
    const float *restrict g = array->gradient, *restrict p = array->parameter;
    float *restrict m = array->mean, *restrict v = array->square, *restrict y = array->updated;
    const float b1 = update.beta1, b2 = update.beta2, rate = update.rate, factor = update.factor, eps = update.eps;
    for (int64_t i = first; i < end; i++) {
        m[i] = b1 * m[i] + (1 - b1) * g[i];
        v[i] = b2 * v[i] + (1 - b2) * (g[i] * g[i]);
        y[i] = p[i] - rate * m[i] / (sqrtf(v[i]) * factor + eps);
    }
}

// Adam (Kingma & Ba 2015): the means of gradients and of their squares, in place, and updated = parameter - rate mean /
// (factor sqrt(square) + eps). rate and factor hold the corrections of the first steps.
void adam(const Array *arrays, int n, float beta1, float beta2, float rate, float factor, float eps, int threads) {
    const int64_t pieces = pieces_of(arrays, n);
    update.beta1 = beta1, update.beta2 = beta2, update.rate = rate, update.factor = factor, update.eps = eps;
    parallel(adam_piece, pieces, threads);
}
