// Many threads at once: they share handles, make and free their own, and run calls.
//
//     threads ROUNDS CALLS      ROUNDS: how often each makes and frees its own
//                               CALLS: how many threads run a call at the end
#define _POSIX_C_SOURCE 200809L
#include <framestride.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define RIGHT(call)                                                                                                 \
  do {                                                                                                              \
    if ((call) != FRAMESTRIDE_OK) {                                                                                 \
      printf("%s failed: %s\n", #call, framestride_last_error());                                                   \
      exit(1);                                                                                                      \
    }                                                                                                               \
  } while (0)

enum { THREADS = 8, MOST_ROUNDS = 40 };

static framestride_device device;
static framestride_spec spec;
static framestride_module module;
static framestride_attention attention;
static framestride_spec contested[MOST_ROUNDS];
static atomic_int freed[MOST_ROUNDS];
static pthread_barrier_t barrier;
static int rounds, calls;

// Rows of V are all equal, so every row of the output equals them too, whatever the mask is.
static void forward(int thread) {
  enum { S = 4 * 96, D = 128 };
  uint64_t bytes;
  RIGHT(framestride_workspace_bytes(attention, &bytes));
  uint16_t *tensors[4];
  for (int i = 0; i < 4; i++) tensors[i] = aligned_alloc(256, S * D * sizeof(uint16_t));
  for (int i = 0; i < S * D; i++) {
    tensors[0][i] = (uint16_t)(0x3f00 | i * 37 % 251);
    tensors[1][i] = (uint16_t)(0xbf00 | i * 53 % 239);
    tensors[2][i] = (uint16_t)(0x4000 + thread + i % D);
  }
  framestride_call call;
  memset(&call, 0, sizeof call);
  call.size = sizeof call;
  framestride_tensor *of[] = {&call.q, &call.k, &call.v, &call.out};
  for (int i = 0; i < 4; i++) {
    of[i]->data = tensors[i];
    of[i]->row = D;
  }
  call.head_types_from = FRAMESTRIDE_HEAD_TYPES_DENSE;
  call.workspace = aligned_alloc(256, bytes);
  call.workspace_bytes = bytes;
  RIGHT(framestride_forward(attention, &call, NULL));
  for (int i = 0; i < S * D; i++) {
    int difference = tensors[3][i] - tensors[2][i];
    if (abs(difference) > 1) {
      printf("thread %d, element %d: %#x, not %#x\n", thread, i, tensors[3][i], tensors[2][i]);
      exit(1);
    }
  }
  for (int i = 0; i < 4; i++) free(tensors[i]);
  free(call.workspace);
}

static void *run(void *argument) {
  int thread = *(int *)argument;
  char name[32];
  snprintf(name, sizeof name, "no_such_spec_%d", thread);
  pthread_barrier_wait(&barrier);
  for (int round = 0; round < rounds; round++) {
    framestride_spec own;
    framestride_attention planned;
    framestride_spec_details details;
    memset(&details, 0, sizeof details);
    details.size = sizeof details;
    RIGHT(framestride_spec_shipped("tiny_text_last", &own));
    RIGHT(framestride_attention_new(module, 1, 1 + (uint32_t)round, &planned));
    RIGHT(framestride_spec_info(own, &details));
    RIGHT(framestride_spec_info(spec, &details));
    RIGHT(framestride_spec_free(own));
    if (framestride_spec_info(own, &details) != FRAMESTRIDE_INVALID_HANDLE) exit(1);
    // A message is its thread's own.
    if (framestride_spec_shipped(name, &own) != FRAMESTRIDE_INVALID_SPEC) exit(1);
    if (!strstr(framestride_last_error(), name)) exit(1);
    // All threads free the same handle, and one of them succeeds.
    freed[round] += framestride_spec_free(contested[round]) == FRAMESTRIDE_OK;
    RIGHT(framestride_attention_free(planned));
  }
  if (thread < calls) forward(thread);
  return NULL;
}

int main(int count, char **arguments) {
  if (count != 3) return 1;
  rounds = atoi(arguments[1]);
  calls = atoi(arguments[2]);
  if (rounds > MOST_ROUNDS) return 1;
  RIGHT(framestride_device_emulator(&device));
  RIGHT(framestride_spec_shipped("tiny_plain", &spec));
  RIGHT(framestride_load(device, spec, &module));
  RIGHT(framestride_attention_new(module, 1, 1, &attention));
  for (int round = 0; round < rounds; round++) RIGHT(framestride_spec_shipped("tiny_plain", &contested[round]));
  pthread_t threads[THREADS];
  int numbers[THREADS];
  pthread_barrier_init(&barrier, NULL, THREADS);
  for (int i = 0; i < THREADS; i++) {
    numbers[i] = i;
    if (pthread_create(&threads[i], NULL, run, &numbers[i])) return 1;
  }
  for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
  for (int round = 0; round < rounds; round++) {
    if (freed[round] != 1) {
      printf("%d threads freed one handle\n", freed[round]);
      return 1;
    }
  }
  RIGHT(framestride_attention_free(attention));
  RIGHT(framestride_module_free(module));
  RIGHT(framestride_spec_free(spec));
  RIGHT(framestride_device_free(device));
  return 0;
}
