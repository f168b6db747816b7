// One position through the blocks of a model on a CPU: norms, products, rotary positions, attention and MLP in one call.
// Every function mirrors one of model.py. rows: of the batch. All numbers of a vector fill whole groups of eight.
#include <math.h>

#include "matvec.c"

typedef struct {
    Layer layer;
    const float *bias;  // (out), or NULL
} Linear;

typedef struct {
    const float *weight, *bias;  // NULL: no norm; no bias
} Norm;

typedef struct {
    Norm attn_norm, attn_post_norm, mlp_norm, mlp_post_norm, q_norm, k_norm;
    Linear q, k, v, out, gate, up, down;
    const float *inverse;  // (rotary / 2): 1 / the angle of a position, see rope(); NULL: no positions
    float *keys, *values;  // the cache: (rows, kv_heads, room, head_dim)
    int64_t room, window;  // window 0: position p is in row p; else it is in row p % window
} Block;

enum { RELU2, GELU, GELU_TANH, SWIGLU, GEGLU };

typedef struct {
    int64_t rows, width, heads, kv_heads, head_dim, hidden, rotary, blocks, position;
    int layer_norm, parallel, qk_norm_width, activation, threads;
    float norm_eps, attn_scale, attn_softcap, residual_scale;
} Model;

// ---- parts of a block ------------------------------------------------------------------------------------------------

static int linear(const Model *model, const Linear *linear, const float *x, float *y) {
    const int failed = product(&linear->layer, x, model->rows, y, model->threads);
    if (linear->bias)
        for (int64_t i = 0; i < model->rows; i++)
            for (int64_t j = 0; j < linear->layer.outputs; j++) y[i * linear->layer.outputs + j] += linear->bias[j];
    return failed;
}

// n vectors of so many numbers; y may be x. layer: a LayerNorm, else an RMSNorm.
static void norm(const Norm *norm, const float *x, int64_t n, int64_t width, int layer, float eps, float *y) {
    for (; n; n--, x += width, y += width) {
        floats total = {0}, squares = {0};
        if (layer)
            for (int64_t j = 0; j < width; j += 8) total += load(x + j);
        const float mean = sum(total) / width;
        for (int64_t j = 0; j < width; j += 8) squares += (load(x + j) - mean) * (load(x + j) - mean);
        const float factor = 1 / sqrtf(sum(squares) / width + eps);
        for (int64_t j = 0; j < width; j += 8) {
            floats value = (load(x + j) - mean) * factor * load(norm->weight + j);
            store(y + j, norm->bias ? value + load(norm->bias + j) : value);
        }
    }
}

static void block_norm(const Model *model, const Norm *weights, const float *x, float *y) {
    if (weights->weight) norm(weights, x, model->rows, model->width, model->layer_norm, model->norm_eps, y);
    else memmove(y, x, model->rows * model->width * sizeof *x);
}

// The norm and the positions of queries or keys x (rows, heads, head_dim). angles: cosines, then sines.
static void turn(const Model *model, const Block *block, const Norm *weights, const float *angles, int64_t heads,
                 float *x) {
    const int64_t D = model->head_dim, half = model->rotary / 2;
    if (weights->weight && model->qk_norm_width) norm(weights, x, model->rows, heads * D, 0, model->norm_eps, x);
    else if (weights->weight) norm(weights, x, model->rows * heads, D, 0, model->norm_eps, x);
    for (int64_t i = 0; block->inverse && i < model->rows * heads; i++, x += D)
        for (int64_t j = 0; j < half; j++) {
            const float a = x[j], b = x[j + half];
            x[j] = a * angles[j] - b * angles[j + half];
            x[j + half] = a * angles[j + half] + b * angles[j];
        }
}

static struct {
    const Model *model;
    const Block *block;
    const float *q;
    float *y, *scores;  // (rows, heads, head_dim), (rows, heads, room)
    int64_t filled;     // rows of the cache that hold a position
} attention;

// softmax(scale q k^T) v of one head: of row piece / heads, head piece % heads.
static void attention_head(int piece) {
    const Model *model = attention.model;
    const int64_t D = model->head_dim, filled = attention.filled, room = attention.block->room;
    const int64_t shared = model->heads / model->kv_heads, first = piece / shared * room * D;
    const float *q = attention.q + piece * D, *key = attention.block->keys + first;
    const float *value = attention.block->values + first, cap = model->attn_softcap;
    float *y = attention.y + piece * D, *scores = attention.scores + piece * ((room + 7) / 8 * 8), largest = -INFINITY;
    for (int64_t i = 0; i < filled; i++, key += D) {
        floats dot = {0};
        for (int64_t j = 0; j < D; j += 8) dot += load(q + j) * load(key + j);
        scores[i] = sum(dot) * model->attn_scale;
    }
    for (int64_t i = filled; i % 8; i++) scores[i] = -INFINITY;
    for (int64_t i = 0; cap && i < filled; i += 8) store(scores + i, cap * (2 * sigmoid(2 / cap * load(scores + i)) - 1));
    for (int64_t i = 0; i < filled; i++) largest = scores[i] > largest ? scores[i] : largest;
    floats total = {0};
    for (int64_t i = 0; i < filled; i += 8) store(scores + i, exponential(load(scores + i) - largest));
    for (int64_t i = filled; i % 8; i++) scores[i] = 0;
    for (int64_t i = 0; i < filled; i += 8) total += load(scores + i);
    const float factor = 1 / sum(total);
    memset(y, 0, D * sizeof *y);
    for (int64_t i = 0; i < filled; i++, value += D)
        for (int64_t j = 0; j < D; j += 8) store(y + j, load(y + j) + factor * scores[i] * load(value + j));
}

static void activate(const Model *model, const float *gate, float *up) {
    for (int64_t i = 0; i < model->rows * model->hidden; i += 8) {
        const floats x = load(up + i), positive = choose(x > 0, x, x * 0);
        switch (model->activation) {
            case RELU2: store(up + i, positive * positive); break;
            case GELU: store(up + i, gelu(x)); break;
            case GELU_TANH: store(up + i, gelu_tanh(x)); break;
            case SWIGLU: store(up + i, load(gate + i) * sigmoid(load(gate + i)) * x); break;
            case GEGLU: store(up + i, gelu_tanh(load(gate + i)) * x); break;
        }
    }
}

static void add(const Model *model, float *x, const float *y) {
    for (int64_t i = 0; i < model->rows * model->width; i += 8)
        store(x + i, load(x + i) + model->residual_scale * load(y + i));
}

// Write keys or values (rows, kv_heads, head_dim) of the new position into the cache.
static void remember(const Model *model, const Block *block, const float *x, float *cache) {
    const int64_t D = model->head_dim, place = block->window ? model->position % block->window : model->position;
    for (int64_t i = 0; i < model->rows * model->kv_heads; i++)
        memcpy(cache + (i * block->room + place) * D, x + i * D, D * sizeof *x);
}

// ---- all blocks ------------------------------------------------------------------------------------------------------

// x (rows, width): the residual stream of the position before the first block -> after the last one. Returns 1, with
// nothing of use in x, where there is no memory.
int decode(const Model *model, const Block *blocks, float *x) {
    const int64_t rows = model->rows, C = rows * model->width, H = rows * model->heads * model->head_dim;
    const int64_t KV = rows * model->kv_heads * model->head_dim, F = rows * model->hidden;
    int64_t room = 0;
    for (int64_t i = 0; i < model->blocks; i++) room = blocks[i].room > room ? blocks[i].room : room;
    const int64_t scores = rows * model->heads * ((room + 7) / 8 * 8);
    float *memory = malloc((2 * C + 2 * H + 2 * KV + 2 * F + scores + model->rotary) * sizeof *memory);
    if (!memory) return 1;
    float *normed = memory, *y = normed + C, *q = y + C, *heads = q + H, *k = heads + H, *v = k + KV, *gate = v + KV;
    float *up = gate + F, *angles = up + F + scores;
    attention.model = model, attention.q = q, attention.y = heads, attention.scores = up + F;
    int failed = 0;
    for (const Block *block = blocks; block < blocks + model->blocks && !failed; block++) {
        for (int64_t i = 0; block->inverse && i < model->rotary / 2; i++) {
            angles[i] = cosf(model->position / block->inverse[i]);
            angles[i + model->rotary / 2] = sinf(model->position / block->inverse[i]);
        }
        block_norm(model, &block->attn_norm, x, normed);
        failed |= linear(model, &block->q, normed, q);
        failed |= linear(model, &block->k, normed, k);
        failed |= linear(model, &block->v, normed, v);
        turn(model, block, &block->q_norm, angles, model->heads, q);
        turn(model, block, &block->k_norm, angles, model->kv_heads, k);
        remember(model, block, k, block->keys);
        remember(model, block, v, block->values);
        const int64_t length = model->position + 1;
        attention.block = block;
        attention.filled = block->window && block->window < length ? block->window : length;
        parallel(attention_head, rows * model->heads, model->threads);
        failed |= linear(model, &block->out, heads, y);
        block_norm(model, &block->attn_post_norm, y, y);
        if (model->parallel) block_norm(model, &block->mlp_norm, x, normed);
        add(model, x, y);
        if (!model->parallel) block_norm(model, &block->mlp_norm, x, normed);
        if (block->gate.layer.weight) failed |= linear(model, &block->gate, normed, gate);
        failed |= linear(model, &block->up, normed, up);
        activate(model, gate, up);
        failed |= linear(model, &block->down, up, y);
        block_norm(model, &block->mlp_post_norm, y, y);
        add(model, x, y);
    }
    free(memory);
    return failed;
}
