/*
 * Shadow variables for a program that is not linked with livepatch: a store of its own, which the first patch that needs it brings along.
 *
 * Add this file to the new build, beside the sources that use livepatch.h. What it keeps are new statics of the patch, so they outlive the
 * revert; a later patch that is built --after that one finds them. Not for an image that livepatch's agent is linked into: that has the same
 * names.
 *
 * A bucket has the shadows of some objects. Writers lock it; readers take no lock: they walk its list and look whether its number has
 * changed meanwhile. Nodes are never given back, only used again, so a reader never follows a pointer into freed memory.
 */
#include <pthread.h>
#include <stdlib.h>

/* Each image has its own: a library's calls go to it, not to whoever exports the same names. */
#pragma GCC visibility push(hidden)
#include "livepatch.h"

#define BUCKETS 1024

struct livepatch_node {
    struct livepatch_node *next;
    void *object;
    uint64_t id;
    void *data;
    size_t len;
};

struct livepatch_bucket {
    pthread_mutex_t lock;
    /* odd while the list is being changed */
    unsigned changes;
    struct livepatch_node *first;
    /* out of use */
    struct livepatch_node *spare;
};

/* All zero: for glibc and musl that is an unlocked mutex, too. */
static struct livepatch_bucket livepatch_buckets[BUCKETS];

/* Not inlined: a loop over all of them would compare with the address behind the last one, which is nothing that a patch knows. */
__attribute__((noinline)) static struct livepatch_bucket *livepatch_bucket(unsigned i)
{
    return &livepatch_buckets[i % BUCKETS];
}

static struct livepatch_bucket *livepatch_bucket_of(const void *object)
{
    uint64_t hash = (uint64_t)(uintptr_t)object * 0x9e3779b97f4a7c15u;
    return livepatch_bucket((unsigned)(hash >> 32));
}

#define LOAD(field) __atomic_load_n(&(field), __ATOMIC_ACQUIRE)
#define STORE(field, value) __atomic_store_n(&(field), value, __ATOMIC_RELEASE)

static void livepatch_begin(struct livepatch_bucket *b)
{
    __atomic_fetch_add(&b->changes, 1, __ATOMIC_SEQ_CST);
}

static void livepatch_end(struct livepatch_bucket *b)
{
    __atomic_fetch_add(&b->changes, 1, __ATOMIC_SEQ_CST);
}

/* Under the lock: what leads to the node of this key, or to the end of the list. */
static struct livepatch_node **livepatch_find(struct livepatch_bucket *b, const void *object, uint64_t id)
{
    struct livepatch_node **at = &b->first;
    while (*at && !((*at)->object == object && (*at)->id == id)) at = &(*at)->next;
    return at;
}

/* Under the lock: takes a node out, and gives what it held. */
static void *livepatch_take(struct livepatch_bucket *b, struct livepatch_node **at)
{
    struct livepatch_node *node = *at;
    void *data = node->data;
    livepatch_begin(b);
    STORE(*at, node->next);
    STORE(node->next, b->spare);
    STORE(b->spare, node);
    livepatch_end(b);
    return data;
}

void *livepatch_shadow_get(void *object, uint64_t id)
{
    struct livepatch_bucket *b = livepatch_bucket_of(object);
    for (;;) {
        unsigned before = LOAD(b->changes);
        void *found = NULL;
        if (before & 1) continue;
        /* A list that is changed meanwhile may lead round and round: so it is looked at each step. */
        for (struct livepatch_node *n = LOAD(b->first); n && LOAD(b->changes) == before; n = LOAD(n->next)) {
            if (LOAD(n->object) == object && LOAD(n->id) == id) {
                found = LOAD(n->data);
                break;
            }
        }
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        if (LOAD(b->changes) == before) return found;
    }
}

static void *livepatch_attach(void *object, uint64_t id, size_t len, livepatch_constructor constructor, void *with, int or_get)
{
    struct livepatch_bucket *b = livepatch_bucket_of(object);
    pthread_mutex_lock(&b->lock);
    struct livepatch_node *there = *livepatch_find(b, object, id);
    void *data = there && or_get ? there->data : NULL;
    if (!there) {
        struct livepatch_node *node = b->spare ? b->spare : calloc(1, sizeof *node);
        data = node ? calloc(1, len ? len : 1) : NULL;
        if (data && constructor && constructor(object, data, with) != 0) {
            free(data);
            data = NULL;
        }
        livepatch_begin(b);
        if (node && node == b->spare) STORE(b->spare, node->next);
        if (node && !data) {
            /* Made for nothing: it is kept for the next. */
            STORE(node->next, b->spare);
            STORE(b->spare, node);
        }
        if (data) {
            STORE(node->object, object);
            STORE(node->id, id);
            STORE(node->data, data);
            node->len = len;
            STORE(node->next, b->first);
            STORE(b->first, node);
        }
        livepatch_end(b);
    }
    pthread_mutex_unlock(&b->lock);
    return data;
}

void *livepatch_shadow_attach(void *object, uint64_t id, size_t len, livepatch_constructor constructor, void *with)
{
    return livepatch_attach(object, id, len, constructor, with, 0);
}

void *livepatch_shadow_get_or_attach(void *object, uint64_t id, size_t len, livepatch_constructor constructor, void *with)
{
    void *there = livepatch_shadow_get(object, id);
    return there ? there : livepatch_attach(object, id, len, constructor, with, 1);
}

void livepatch_shadow_detach(void *object, uint64_t id, livepatch_destructor destructor)
{
    struct livepatch_bucket *b = livepatch_bucket_of(object);
    pthread_mutex_lock(&b->lock);
    struct livepatch_node **at = livepatch_find(b, object, id);
    void *data = *at ? livepatch_take(b, at) : NULL;
    if (data && destructor) destructor(object, data);
    pthread_mutex_unlock(&b->lock);
    free(data);
}

void livepatch_shadow_detach_all(uint64_t id, livepatch_destructor destructor)
{
    for (unsigned i = 0; i < BUCKETS; i++) {
        struct livepatch_bucket *b = livepatch_bucket(i);
        pthread_mutex_lock(&b->lock);
        for (struct livepatch_node **at = &b->first; *at;) {
            if ((*at)->id != id) {
                at = &(*at)->next;
                continue;
            }
            void *object = (*at)->object, *data = livepatch_take(b, at);
            if (destructor) destructor(object, data);
            free(data);
        }
        pthread_mutex_unlock(&b->lock);
    }
}

void livepatch_shadow_drop_all_of(void *object)
{
    struct livepatch_bucket *b = livepatch_bucket_of(object);
    pthread_mutex_lock(&b->lock);
    for (struct livepatch_node **at = &b->first; *at;) {
        if ((*at)->object == object) free(livepatch_take(b, at));
        else at = &(*at)->next;
    }
    pthread_mutex_unlock(&b->lock);
}

void livepatch_shadow_count(uint64_t id, size_t *objects, size_t *bytes)
{
    *objects = *bytes = 0;
    for (unsigned i = 0; i < BUCKETS; i++) {
        struct livepatch_bucket *b = livepatch_bucket(i);
        pthread_mutex_lock(&b->lock);
        for (struct livepatch_node *n = b->first; n; n = n->next) {
            if (n->id == id) ++*objects, *bytes += n->len;
        }
        pthread_mutex_unlock(&b->lock);
    }
}
