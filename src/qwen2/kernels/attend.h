// The whole operation: tokens are rotated and written, then sequences are cut into work items, long prompts by tokens and few tokens
// with a long history by spans of keys.
#ifndef QWEN2_ATTEND_H
#define QWEN2_ATTEND_H

#include "attention.h"

namespace qwen2 {
namespace QWEN2_ISA {

struct Plan {
    int64_t items, merged, partial_rows, tokens, most_tokens;  // most_tokens: of an item
};

static inline int64_t spans_of(int64_t last) { return last / SPAN + 1; }

// Counts the items, or with `items` writes them. The longest come first: later tokens of a prompt before earlier ones.
static Plan make_plan(const qwen2_attention& a, Item* items) {
    Plan plan = {0, 0, 0, 0, MAX_ROWS / (a.heads / a.kv_heads)};
    int64_t block = 0;
    for (int32_t s = 0; s < a.sequences; s++) {
        const int64_t count = a.counts[s], history = a.histories[s];
        const bool split = count <= SPLIT && history + count > SPAN;
        for (int64_t from = (count - 1) / plan.most_tokens * plan.most_tokens; from >= 0; from -= plan.most_tokens) {
            const int64_t tokens = count - from < plan.most_tokens ? count - from : plan.most_tokens;
            const int64_t spans = spans_of(history + from + tokens - 1);
            for (int32_t head = 0; head < a.kv_heads; head++)
                for (int64_t span = 0; span < (split ? spans : 1); span++) {
                    if (items != nullptr)
                        items[plan.items] = {s, head, static_cast<int32_t>(plan.tokens + from), static_cast<int32_t>(tokens), static_cast<int32_t>(history + from),
                                             static_cast<int32_t>(span), static_cast<int32_t>(split ? 1 : spans),
                                             split ? static_cast<int32_t>(plan.partial_rows) : -1, block};
                    plan.items++;
                    if (split) plan.partial_rows += tokens * (a.heads / a.kv_heads), plan.merged += span == 0;
                }
        }
        plan.tokens += count;
        block += (history + count + BLOCK - 1) / BLOCK;
    }
    return plan;
}

// Which sequence each token belongs to is found by walking; a claim of tokens walks once.
static void write_tokens(const qwen2_attention& a, int64_t from, int64_t to, const Queries& queries) {
    int64_t first = 0, block = 0;
    for (int32_t s = 0; s < a.sequences && first < to; s++) {
        const int64_t count = a.counts[s], history = a.histories[s];
        for (int64_t t = from > first ? from : first; t < to && t < first + count; t++) {
            const float *x = a.qkv + t * a.qkv_stride, *cos = a.cos + t * (a.head_dim / 2), *sin = a.sin + t * (a.head_dim / 2);
            const float* k = x + static_cast<int64_t>(a.heads) * a.head_dim;
            const float* v = k + static_cast<int64_t>(a.kv_heads) * a.head_dim;
            const int64_t position = history + t - first;
            uint8_t* place = a.blocks[block + position / BLOCK];
            rotate_queries(a, t, x, cos, sin, queries);
            if (a.bits == 16) write_token<int16_t>(a, k, v, cos, sin, place, position % BLOCK);
            else write_token<int8_t>(a, k, v, cos, sin, place, position % BLOCK);
        }
        first += count;
        block += (history + count + BLOCK - 1) / BLOCK;
    }
}

static int attend(const qwen2_attention* step) {
    const qwen2_attention& a = *step;
    if (a.sequences == 0) return 0;
    if (cache_bytes(a.head_dim, a.bits) == 0 || a.kv_heads < 1 || a.heads % a.kv_heads != 0 || a.heads / a.kv_heads > MAX_ROWS) return NOT_SUPPORTED;
    const int64_t d = padded(a.head_dim);
    Plan plan = make_plan(a, nullptr);
    const size_t query_bytes = static_cast<size_t>(plan.tokens * a.heads * d) * sizeof(int16_t);
    uint8_t* memory = static_cast<uint8_t*>(shared_scratch(QUERIES, query_bytes + static_cast<size_t>(plan.tokens * a.heads) * sizeof(float)));
    Item* items = static_cast<Item*>(shared_scratch(ROUTES, static_cast<size_t>(plan.items) * sizeof(Item)));
    float* partials = static_cast<float*>(shared_scratch(PARTIALS, static_cast<size_t>(plan.partial_rows * (d + 2)) * sizeof(float) + 1));
    if (memory == nullptr || items == nullptr || partials == nullptr) return NO_MEMORY;
    make_plan(a, items);
    const Queries queries = {reinterpret_cast<int16_t*>(memory), reinterpret_cast<float*>(memory + query_bytes)};

    constexpr int64_t A_CLAIM = 8, ALONE = 2;  // tokens
    if (plan.tokens <= ALONE) write_tokens(a, 0, plan.tokens, queries);
    else
        for_tiles(static_cast<int>((plan.tokens + A_CLAIM - 1) / A_CLAIM), [&](int claim, int) {
            write_tokens(a, claim * A_CLAIM, (claim + 1) * A_CLAIM < plan.tokens ? (claim + 1) * A_CLAIM : plan.tokens, queries);
        });

    Failure failure;
    for_tiles(static_cast<int>(plan.items), [&](int tile, int thread) {
        void* room = scratch(thread, QUERY, Room::bytes(d));
        if (room == nullptr) failure.note();
        else if (a.bits == 16) attend_item<int16_t>(a, queries, items[tile], partials, Room(room, d));
        else attend_item<int8_t>(a, queries, items[tile], partials, Room(room, d));
    });
    if (failure.happened()) return NO_MEMORY;
    if (plan.merged > 0)
        for (int64_t i = 0; i < plan.items; i++)
            if (items[i].partial >= 0 && items[i].span == 0)
                merge_item(a, items + i, spans_of(items[i].position + items[i].tokens - 1), partials);
    return 0;
}

}  // namespace QWEN2_ISA
}  // namespace qwen2

#endif
