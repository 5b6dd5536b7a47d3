// A real GPU and its driver: which memory and which streams a call takes, what it refuses, that a
// call which was refused harms nothing, that calls can be captured, and what one costs the host.
#define _POSIX_C_SOURCE 200809L
#include <framestride.h>
#include <pthread.h>
#include <time.h>

#include "../../examples/memory.h"

enum { S = 4 * 96, D = 128 };

static struct memory memory;
static framestride_device device;
static framestride_spec spec;
static framestride_module module;
static framestride_attention attention;
static framestride_call right;
static int failed;

static void judge(const char *name, int ok) {
  printf("%s  %s\n", ok ? "ok    " : "FAILED", name);
  if (!ok && framestride_last_error()[0]) printf("        %s\n", framestride_last_error());
  failed |= !ok;
}

// Whether a call gives the right output: rows of V are all equal, so every row of the output equals
// them.
static int runs(const framestride_call *call, void *stream) {
  static uint16_t out[S * D];
  if (framestride_forward(attention, call, stream) != FRAMESTRIDE_OK) return 0;
  if (stream != memory.stream && memory.driver.wait(stream) != 0) return 0;
  download(&memory, out, call->out.data, sizeof out);
  for (int i = 0; i < S * D; i++) {
    if (out[i] != to_bf16(i % D)) return 0;
  }
  return 1;
}

// Whether a call is refused with a word in its message, and a right one runs after it.
static int refuses(const framestride_call *call, void *stream, const char *word) {
  if (framestride_forward(attention, call, stream) != FRAMESTRIDE_INVALID_ARGUMENT) return 0;
  int said = strstr(framestride_last_error(), word) != NULL;
  return runs(&right, memory.stream) && said;
}

// Memory that is mapped by hand, as PyTorch's expandable segments are. The structures are those of
// the driver.
static unsigned long long map_by_hand(void *cuda, size_t bytes) {
  struct {
    int type, handle_types, location_type, location;
    void *windows;
    unsigned char flags[8];
  } properties = {1, 0, 1, 0, NULL, {0}};
  struct {
    int location_type, location, flags;
  } access = {1, 0, 3};
  int (*granularity)(size_t *, const void *, int);
  int (*reserve)(unsigned long long *, size_t, size_t, unsigned long long, unsigned long long);
  int (*create)(unsigned long long *, size_t, const void *, unsigned long long);
  int (*map)(unsigned long long, size_t, size_t, unsigned long long, unsigned long long);
  int (*set_access)(unsigned long long, size_t, const void *, size_t);
  REQUIRE(find(cuda, "cuMemGetAllocationGranularity", &granularity)
          && find(cuda, "cuMemAddressReserve", &reserve) && find(cuda, "cuMemCreate", &create)
          && find(cuda, "cuMemMap", &map) && find(cuda, "cuMemSetAccess", &set_access));
  size_t unit = 0;
  REQUIRE(granularity(&unit, &properties, 0) == 0);
  size_t size = (bytes + unit - 1) / unit * unit;
  unsigned long long address = 0, handle = 0;
  REQUIRE(reserve(&address, size, 0, 0, 0) == 0 && create(&handle, size, &properties, 0) == 0);
  REQUIRE(map(address, size, 0, handle, 0) == 0 && set_access(address, size, &access, 1) == 0);
  return address;
}

static void *on_another_thread(void *result) {
  *(int *)result = framestride_forward(attention, &right, memory.stream) == FRAMESTRIDE_OK;
  return NULL;
}

static double seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

int main(void) {
  if (!open_memory(&memory, 1)) {
    puts("no GPU");
    return 2;
  }
  void *cuda = dlopen("libcuda.so.1", RTLD_NOW);
  int (*attribute)(int *, int, int), (*count)(int *);
  int (*make_context)(void **, unsigned, int), (*end_context)(void *), (*pop)(void **);
  int (*allocate_pinned)(void **, size_t, unsigned), (*allocate_managed)(unsigned long long *, size_t, unsigned);
  int (*allocate_async)(unsigned long long *, size_t, void *), (*begin)(void *, int), (*end)(void *, void **);
  int (*instantiate)(void **, void *, unsigned long long), (*launch)(void *, void *);
  REQUIRE(find(cuda, "cuDeviceGetAttribute", &attribute) && find(cuda, "cuDeviceGetCount", &count)
          && find(cuda, "cuCtxCreate_v2", &make_context) && find(cuda, "cuCtxDestroy_v2", &end_context)
          && find(cuda, "cuCtxPopCurrent_v2", &pop)
          && find(cuda, "cuMemHostAlloc", &allocate_pinned) && find(cuda, "cuMemAllocManaged", &allocate_managed)
          && find(cuda, "cuMemAllocAsync", &allocate_async) && find(cuda, "cuStreamBeginCapture_v2", &begin)
          && find(cuda, "cuStreamEndCapture", &end) && find(cuda, "cuGraphInstantiateWithFlags", &instantiate)
          && find(cuda, "cuGraphLaunch", &launch));
  CHECK(framestride_device_borrow(memory.context, &device));
  framestride_device_details details;
  memset(&details, 0, sizeof details);
  details.size = sizeof details;
  CHECK(framestride_device_info(device, &details));
  printf("%s, capability %u.%u, driver %u, family %s\n", details.name, details.capability_major,
         details.capability_minor, details.driver, details.family);
  CHECK(framestride_spec_shipped("tiny_plain", &spec));
  CHECK(framestride_supported(device, spec));
  CHECK(framestride_load(device, spec, &module));
  CHECK(framestride_attention_new(module, 1, 1, &attention));
  uint64_t bytes;
  CHECK(framestride_workspace_bytes(attention, &bytes));

  static uint16_t q[S * D], v[S * D];
  for (size_t i = 0; i < S * D; i++) {
    q[i] = to_bf16(wave(i, 1));
    v[i] = to_bf16((double)(i % D));
  }
  memset(&right, 0, sizeof right);
  right.size = sizeof right;
  right.q.data = right.k.data = upload(&memory, q, sizeof q);
  right.v.data = upload(&memory, v, sizeof v);
  right.out.data = allocate(&memory, sizeof q);
  right.q.row = right.k.row = right.v.row = right.out.row = D;
  right.workspace = allocate(&memory, bytes);
  right.workspace_bytes = bytes;
  judge("a call", runs(&right, memory.stream));
  judge("on the default stream", runs(&right, NULL));

  framestride_call call = right;
  call.q.data = q;
  // Some systems let kernels use all memory of the process, of which the driver knows nothing then.
  int uses_pageable = 0;
  REQUIRE(attribute(&uses_pageable, 88, 0) == 0);
  if (uses_pageable) {
    judge("q in memory of the host is taken", runs(&call, memory.stream));
  } else {
    judge("q in memory of the host is refused", refuses(&call, memory.stream, "q: found address"));
    call = right;
    call.workspace = (void *)(uintptr_t)0x100;
    judge("a workspace that is no memory is refused", refuses(&call, memory.stream, "workspace: found address"));
  }
  call = right;
  call.workspace_bytes = 1024;
  judge("a small workspace is refused", refuses(&call, memory.stream, "workspace: found 1024 bytes"));

  void *context, *stream, *popped;
  REQUIRE(make_context(&context, 0, 0) == 0 && memory.driver.make_stream(&stream, 0) == 0);
  unsigned long long other = 0;
  REQUIRE(memory.driver.allocate(&other, bytes) == 0);
  // The other context stays current here, and the library uses its own.
  judge("with another context current", framestride_forward(attention, &right, memory.stream) == FRAMESTRIDE_OK);
  framestride_status status = framestride_forward(attention, &right, stream);
  judge("a stream of another context is refused", status == FRAMESTRIDE_INVALID_ARGUMENT);
  REQUIRE(pop(&popped) == 0 && popped == context);

  int gpus = 0;
  REQUIRE(count(&gpus) == 0);
  if (gpus > 1) {
    void *second, *current;
    unsigned long long remote = 0;
    REQUIRE(memory.driver.retain(&second, 1) == 0 && memory.driver.make_current(second) == 0);
    REQUIRE(memory.driver.allocate(&remote, bytes) == 0 && pop(&current) == 0);
    REQUIRE(memory.driver.make_current(memory.context) == 0);
    call = right;
    call.workspace = (void *)(uintptr_t)remote;
    judge("a workspace of another GPU is refused", refuses(&call, memory.stream, "workspace: found address"));
  }

  void *pinned;
  REQUIRE(allocate_pinned(&pinned, sizeof q, 0) == 0);
  memcpy(pinned, q, sizeof q);
  call = right;
  call.q.data = pinned;
  judge("pinned memory of the host is taken", runs(&call, memory.stream));
  unsigned long long address = 0;
  REQUIRE(allocate_managed(&address, sizeof q, 1) == 0);
  memcpy((void *)(uintptr_t)address, q, sizeof q);
  call.q.data = (void *)(uintptr_t)address;
  judge("managed memory is taken", runs(&call, memory.stream));
  REQUIRE(allocate_async(&address, bytes, memory.stream) == 0);
  call = right;
  call.workspace = (void *)(uintptr_t)address;
  judge("memory of a stream-ordered pool is taken", runs(&call, memory.stream));
  call.workspace = (void *)(uintptr_t)map_by_hand(cuda, bytes);
  judge("memory that is mapped by hand is taken", runs(&call, memory.stream));

  for (int mode = 0; mode < 3; mode++) {
    static const char *const modes[] = {"captured, global", "captured, thread-local", "captured, relaxed"};
    void *graph = NULL, *executable = NULL;
    REQUIRE(begin(memory.stream, mode) == 0);
    status = framestride_forward(attention, &right, memory.stream);
    int ended = end(memory.stream, &graph);
    static uint16_t zeros[S * D];
    REQUIRE(memory.driver.to_device((uintptr_t)right.out.data, zeros, sizeof zeros) == 0);
    int replayed = status == FRAMESTRIDE_OK && ended == 0 && instantiate(&executable, graph, 0) == 0
                   && launch(executable, memory.stream) == 0;
    static uint16_t out[S * D];
    download(&memory, out, right.out.data, sizeof out);
    judge(modes[mode], replayed && memcmp(out, v, sizeof v) == 0);
  }

  pthread_t thread;
  int ran = 0;
  REQUIRE(pthread_create(&thread, NULL, on_another_thread, &ran) == 0 && pthread_join(thread, NULL) == 0);
  judge("from a thread without a context", ran);

  // Few enough calls that the stream's queue takes them all, so the host never waits for the GPU.
  enum { ROUNDS = 100, CALLS = 50 };
  double least = 1;
  for (int round = 0; round < ROUNDS; round++) {
    REQUIRE(memory.driver.wait(memory.stream) == 0);
    double start = seconds();
    for (int i = 0; i < CALLS; i++) CHECK(framestride_forward(attention, &right, memory.stream));
    double each = (seconds() - start) / CALLS;
    if (each < least) least = each;
  }
  printf("        host time of a profiled call (5 launches): %.1f us\n", least * 1e6);
  judge("calls in a row", runs(&right, memory.stream));

  // It comes last, since a kernel that took it would ruin the context.
  call = right;
  call.workspace = (void *)(uintptr_t)other;
  judge("a workspace of another context is refused", refuses(&call, memory.stream, "workspace: found address"));
  REQUIRE(end_context(context) == 0);
  CHECK(framestride_attention_free(attention));
  CHECK(framestride_module_free(module));
  CHECK(framestride_spec_free(spec));
  CHECK(framestride_device_free(device));
  close_memory(&memory);
  return failed;
}
