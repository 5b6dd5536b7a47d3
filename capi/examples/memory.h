// What the examples share: memory of a GPU or of the process, and bf16. An engine has its own.
//
// The CUDA driver is opened at run time. So neither its headers nor its library are needed to
// compile.
#ifndef MEMORY_H
#define MEMORY_H

#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// Ends the program with the message of a call that failed.
#define CHECK(call)                                                                                                 \
  do {                                                                                                              \
    if ((call) != FRAMESTRIDE_OK) {                                                                                 \
      fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, framestride_last_error());                                 \
      exit(1);                                                                                                      \
    }                                                                                                               \
  } while (0)

// Ends the program where something is not as it must be.
#define REQUIRE(condition)                                                                                          \
  do {                                                                                                              \
    if (!(condition)) {                                                                                             \
      fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition);                                 \
      exit(1);                                                                                                      \
    }                                                                                                               \
  } while (0)

// The functions of the driver that the examples call. Each returns 0 when all went well.
struct driver {
  int (*init)(unsigned flags);
  int (*retain)(void **context, int device);
  int (*make_current)(void *context);
  int (*allocate)(unsigned long long *address, size_t bytes);
  int (*release)(unsigned long long address);
  int (*to_device)(unsigned long long address, const void *data, size_t bytes);
  int (*to_host)(void *data, unsigned long long address, size_t bytes);
  int (*make_stream)(void **stream, unsigned flags);
  int (*end_stream)(void *stream);
  int (*wait)(void *stream);
};

// A GPU with its context and a stream, or the memory of the process.
struct memory {
  struct driver driver;
  void *context; // NULL without a GPU
  void *stream;
};

// ISO C has no conversion from an object's address to a function's.
static inline int find(void *library, const char *name, void *function) {
  void *found = dlsym(library, name);
  memcpy(function, &found, sizeof found);
  return found != NULL;
}

// The memory of GPU 0 if `gpu` says so, else that of the process. Returns 0 where there is no GPU.
static inline int open_memory(struct memory *memory, int gpu) {
  memset(memory, 0, sizeof *memory);
  if (!gpu) return 1;
  struct driver *d = &memory->driver;
  void *cuda = dlopen("libcuda.so.1", RTLD_NOW);
  return cuda && find(cuda, "cuInit", &d->init) && find(cuda, "cuDevicePrimaryCtxRetain", &d->retain)
         && find(cuda, "cuCtxSetCurrent", &d->make_current) && find(cuda, "cuMemAlloc_v2", &d->allocate)
         && find(cuda, "cuMemFree_v2", &d->release) && find(cuda, "cuMemcpyHtoD_v2", &d->to_device)
         && find(cuda, "cuMemcpyDtoH_v2", &d->to_host) && find(cuda, "cuStreamCreate", &d->make_stream)
         && find(cuda, "cuStreamDestroy_v2", &d->end_stream) && find(cuda, "cuStreamSynchronize", &d->wait)
         && d->init(0) == 0 && d->retain(&memory->context, 0) == 0 && d->make_current(memory->context) == 0
         && d->make_stream(&memory->stream, 0) == 0;
}

// Memory at a multiple of 256 bytes.
static inline void *allocate(const struct memory *memory, size_t bytes) {
  if (!memory->context) {
    void *pointer = aligned_alloc(256, (bytes + 255) / 256 * 256);
    REQUIRE(pointer);
    return pointer;
  }
  unsigned long long address = 0;
  REQUIRE(memory->driver.allocate(&address, bytes) == 0);
  return (void *)(uintptr_t)address;
}

static inline void release(const struct memory *memory, void *pointer) {
  if (!memory->context) free(pointer);
  else REQUIRE(memory->driver.release((uintptr_t)pointer) == 0);
}

// Memory with a copy of `data`.
static inline void *upload(const struct memory *memory, const void *data, size_t bytes) {
  void *pointer = allocate(memory, bytes);
  if (!memory->context) memcpy(pointer, data, bytes);
  else REQUIRE(memory->driver.to_device((uintptr_t)pointer, data, bytes) == 0);
  return pointer;
}

// Copies memory to `data`, after all work on the stream.
static inline void download(const struct memory *memory, void *data, const void *pointer, size_t bytes) {
  if (!memory->context) {
    memcpy(data, pointer, bytes);
    return;
  }
  REQUIRE(memory->driver.wait(memory->stream) == 0);
  REQUIRE(memory->driver.to_host(data, (uintptr_t)pointer, bytes) == 0);
}

static inline void close_memory(const struct memory *memory) {
  if (memory->context) REQUIRE(memory->driver.end_stream(memory->stream) == 0);
}

// Some number of -1 to 1 that bf16 holds.
static inline double wave(size_t index, uint32_t seed) {
  uint32_t hash = ((uint32_t)index + seed * 7919u) * 2654435761u;
  hash = (hash ^ hash >> 15) * 2246822519u;
  return (double)(hash >> 24) / 128 - 1;
}

// The bits of a number that bf16 holds, and back.
static inline uint16_t to_bf16(double value) {
  float f = (float)value;
  uint32_t bits;
  memcpy(&bits, &f, sizeof bits);
  return (uint16_t)(bits >> 16);
}

static inline double from_bf16(uint16_t half) {
  uint32_t bits = (uint32_t)half << 16;
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

#endif
