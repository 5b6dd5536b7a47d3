// A GPU's side of the library, on a driver that runs nothing: what a launch does besides launching,
// which is nothing, and what it refuses. The program counts every call of the allocator, the
// library's too.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <framestride.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static long allocations;

// These take the place of the C library's for the whole process.
extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
void *malloc(size_t bytes) { return allocations++, __libc_malloc(bytes); }
void *calloc(size_t count, size_t bytes) { return allocations++, __libc_calloc(count, bytes); }
void *realloc(void *old, size_t bytes) { return allocations++, __libc_realloc(old, bytes); }
int posix_memalign(void **pointer, size_t alignment, size_t bytes) {
  return allocations++, (*pointer = __libc_memalign(alignment, bytes)) ? 0 : 12;
}

#define REQUIRE(condition)                                                                                          \
  do {                                                                                                              \
    if (!(condition)) {                                                                                             \
      printf("%s:%d: %s does not hold: %s\n", __FILE__, __LINE__, #condition, framestride_last_error());            \
      exit(1);                                                                                                      \
    }                                                                                                               \
  } while (0)
#define RIGHT(call) REQUIRE((call) == FRAMESTRIDE_OK)

// A call that must fail, and its message.
#define WRONG(name, call)                                                                                           \
  do {                                                                                                              \
    int before = *launches;                                                                                         \
    framestride_status status = (call);                                                                             \
    printf("## %s\n%d: %s\n", name, (int)status, framestride_last_error());                                         \
    REQUIRE(status != FRAMESTRIDE_OK && *launches == before);                                                       \
  } while (0)

// Addresses that the driver takes for memory of the GPU, of another context, and of the host.
static void *on_gpu(uintptr_t address) { return (void *)address; }
static void *elsewhere(void) { return (void *)0xbad0000000100000; }
static void *on_host(void) { return (void *)0xdad0000000100000; }

int main(void) {
  int unused = 0, *launches = &unused;
  framestride_device device, other;
  framestride_device_details details;
  memset(&details, 0, sizeof details);
  details.size = sizeof details;
  framestride_spec spec;
  RIGHT(framestride_spec_shipped("tiny_text_last", &spec));
  if (getenv("FAKE_INIT") || getenv("FAKE_COUNT")) {
    WRONG("no GPU", framestride_device_gpu(0, &device));
    return 0;
  }
  RIGHT(framestride_device_gpu(0, &device));
  WRONG("a GPU that is not there", framestride_device_gpu(1, &other));
  RIGHT(framestride_device_borrow((void *)0x1000, &other));
  RIGHT(framestride_device_info(other, &details));
  RIGHT(framestride_device_free(other));
  if (getenv("FAKE_CC0") || getenv("FAKE_DRIVER")) {
    framestride_module none;
    if (strcmp(details.family, "sm_80") == 0) {
      framestride_spec narrow;
      RIGHT(framestride_spec_shipped("tiny_e4m3", &narrow));
      RIGHT(framestride_supported(device, spec));
      WRONG("8 bits on a GPU of another family", framestride_supported(device, narrow));
      return 0;
    }
    REQUIRE(details.family[0] == 0);
    WRONG("a GPU that is not supported", framestride_supported(device, spec));
    WRONG("loading on it", framestride_load(device, spec, &none));
    return 0;
  }
  REQUIRE(strcmp(details.family, "sm_90a") == 0 && details.multiprocessors == 132 && details.driver == 12080);
  REQUIRE(strstr(details.name, "H100") && details.capability_major == 9 && !details.is_emulator);
  RIGHT(framestride_supported(device, spec));

  framestride_module module;
  framestride_attention attention;
  uint64_t bytes;
  RIGHT(framestride_load(device, spec, &module));
  RIGHT(framestride_attention_new(module, 1, 2, &attention));
  RIGHT(framestride_workspace_bytes(attention, &bytes));
  launches = dlsym(dlopen("libcuda.so.1", RTLD_NOW), "pretend_launches");
  REQUIRE(launches);
  framestride_call call;
  memset(&call, 0, sizeof call);
  call.size = sizeof call;
  framestride_tensor *tensors[] = {&call.q, &call.k, &call.v, &call.out};
  for (uintptr_t i = 0; i < 4; i++) {
    tensors[i]->data = on_gpu(0x100000 * (i + 1));
    tensors[i]->row = 128;
    tensors[i]->head = 64;
  }
  call.cos = on_gpu(0x500000);
  call.sin = on_gpu(0x600000);
  call.after.lengths = on_gpu(0x700000);
  call.lse = on_gpu(0x800000);
  call.found_head_types = on_gpu(0x900000);
  call.workspace = on_gpu(0x1000000);
  call.workspace_bytes = bytes;

  // The first call resolves the driver's functions. From the second on, nothing is allocated.
  RIGHT(framestride_forward(attention, &call, on_gpu(0x5000)));
  REQUIRE(*launches == 5);
  long before = allocations;
  RIGHT(framestride_forward(attention, &call, on_gpu(0x5000)));
  RIGHT(framestride_profile(attention, &call, on_gpu(0x5000)));
  REQUIRE(*launches == 5 + 5 + 3);
  call.found_head_types = NULL;
  call.head_types_from = FRAMESTRIDE_HEAD_TYPES_DENSE;
  RIGHT(framestride_forward(attention, &call, NULL));
  call.head_types_from = FRAMESTRIDE_HEAD_TYPES_GIVEN;
  call.head_types = on_gpu(0x900000);
  RIGHT(framestride_forward(attention, &call, NULL));
  REQUIRE(*launches == 13 + 2 + 2);
  REQUIRE(allocations == before);

  WRONG("a stream of another context", framestride_forward(attention, &call, elsewhere()));
  REQUIRE(allocations > before);
  framestride_call wrong = call;
  wrong.v.data = elsewhere();
  WRONG("v of another context", framestride_forward(attention, &wrong, NULL));
  wrong = call;
  wrong.workspace = elsewhere();
  WRONG("a workspace of another context", framestride_forward(attention, &wrong, NULL));
  wrong = call;
  wrong.after.lengths = on_host();
  // Some systems let kernels use all memory of the process.
  if (getenv("FAKE_PAGEABLE")) {
    RIGHT(framestride_forward(attention, &wrong, NULL));
  } else {
    WRONG("lengths in memory of the host", framestride_forward(attention, &wrong, NULL));
  }

  RIGHT(framestride_attention_free(attention));
  RIGHT(framestride_module_free(module));
  RIGHT(framestride_spec_free(spec));
  RIGHT(framestride_device_free(device));
  return 0;
}
