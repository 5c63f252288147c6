/*
 * What a C program that is linked with livepatch's agent has of it: shadow variables and sessions. See src/shadow.rs and src/session.rs.
 * A program without the agent can have the shadow variables, too: a patch brings them along (livepatch_shadow.c).
 */
#ifndef LIVEPATCH_H
#define LIVEPATCH_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Fills new memory, which is zero; anything but 0 says that it could not. Uses no shadow itself. */
typedef int (*livepatch_constructor)(void *object, void *data, void *with);
/* Undoes what is in memory that is about to be freed. */
typedef void (*livepatch_destructor)(void *object, void *data);

/* The memory attached to object under id, or NULL. Takes no lock. */
void *livepatch_shadow_get(void *object, uint64_t id);
/* Attaches len bytes; NULL where some are attached already, or none could be made. */
void *livepatch_shadow_attach(void *object, uint64_t id, size_t len, livepatch_constructor constructor, void *with);
/* The same, but gives what is attached already. */
void *livepatch_shadow_get_or_attach(void *object, uint64_t id, size_t len, livepatch_constructor constructor, void *with);
void livepatch_shadow_detach(void *object, uint64_t id, livepatch_destructor destructor);
void livepatch_shadow_detach_all(uint64_t id, livepatch_destructor destructor);
/* How many objects have something under id, and how many bytes that is: what grows without end is a leak. */
void livepatch_shadow_count(uint64_t id, size_t *objects, size_t *bytes);
/* To be called where an object is freed: the next object at its address has no shadows then. */
void livepatch_shadow_drop_all_of(void *object);

/* The handling of one message of a session, on this thread: all functions of a canary by session run in one version until it ends. */
void *livepatch_session_enter(uint64_t id);
void livepatch_session_leave(void *scope);

#ifdef __cplusplus
}
#endif
#endif
