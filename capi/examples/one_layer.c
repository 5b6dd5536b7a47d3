// One layer with everything that it can be given: a spec in numbers, QK-norm, RoPE, text of
// different lengths, half widths of this call. Rows are computed again here, in the plainest way.
//
//     one_layer gpu|emulator [FILE]
//
// FILE becomes the inputs and the outputs, for a comparison with the Rust library.

#include <framestride.h>
#include <math.h>

#include "memory.h"

enum { BATCH = 2, HEADS = 2, D = 64, FRAMES = 5, FRAME_TOKENS = 30, VIDEO = FRAMES * FRAME_TOKENS, TEXT = 20 };
enum { S = VIDEO + TEXT, ELEMENTS = BATCH * S * HEADS * D, ANGLES = VIDEO * D / 2 };
// Half widths in tokens: two frames less a few patches, and ten patches.
enum { SPATIAL = 2 * FRAME_TOKENS - 8, TEMPORAL = 10 * FRAMES };

static const uint32_t LENGTHS[BATCH] = {20, 7};
static const double EPS = 1e-6;

// Q, K and V are [B, S, H, D]: the video, then the text. Weights of the norms are [D]. The tables
// of RoPE have a row for each token of the video and a column for each pair of channels.
static uint16_t q[ELEMENTS], k[ELEMENTS], v[ELEMENTS], out[ELEMENTS];
static float q_weight[D], k_weight[D], cosines[ANGLES], sines[ANGLES], lse[BATCH * HEADS * S];
static uint32_t types[BATCH * HEADS];
static float errors[BATCH * HEADS * 2];

static size_t at(int item, int row, int head) { return (((size_t)item * S + row) * HEADS + head) * D; }

// A row of Q or K, normalised and rotated.
static void prepare(double *y, const uint16_t *x, const float *weight, int row) {
  double squares = 0;
  for (int i = 0; i < D; i++) squares += from_bf16(x[i]) * from_bf16(x[i]);
  // The norm of the text has no weights here, and text is not rotated.
  for (int i = 0; i < D; i++) y[i] = from_bf16(x[i]) / sqrt(squares / D + EPS) * (row < VIDEO ? weight[i] : 1);
  for (int i = 0; row < VIDEO && i < D; i += 2) {
    double a = y[i], b = y[i + 1], c = cosines[row * (D / 2) + i / 2], s = sines[row * (D / 2) + i / 2];
    y[i] = a * c - b * s;
    y[i + 1] = b * c + a * s;
  }
}

// A spatial head counts video tokens frame by frame, and a temporal head patch by patch. Text sees
// and is seen everywhere.
static int is_seen(uint32_t type, int row, int key) {
  if (row >= VIDEO || key >= VIDEO) return 1;
  if (type == FRAMESTRIDE_HEAD_SPATIAL) return abs(row - key) < SPATIAL;
  int a = row % FRAME_TOKENS * FRAMES + row / FRAME_TOKENS, b = key % FRAME_TOKENS * FRAMES + key / FRAME_TOKENS;
  return abs(a - b) < TEMPORAL;
}

// Compares a row of the output, and its log-sum-exp.
static void compare(int item, int head, int row) {
  double query[D], key_row[D], expected[D] = {0}, sum = 0;
  prepare(query, q + at(item, row, head), q_weight, row);
  for (int key = 0; key < VIDEO + (int)LENGTHS[item]; key++) {
    if (!is_seen(types[item * HEADS + head], row, key)) continue;
    prepare(key_row, k + at(item, key, head), k_weight, key);
    double product = 0;
    for (int i = 0; i < D; i++) product += query[i] * key_row[i];
    double weight = exp(product / sqrt(D));
    sum += weight;
    for (int i = 0; i < D; i++) expected[i] += weight * from_bf16(v[at(item, key, head) + i]);
  }
  for (int i = 0; i < D; i++) REQUIRE(fabs(from_bf16(out[at(item, row, head) + i]) - expected[i] / sum) < 0.02);
  REQUIRE(fabs(lse[(item * HEADS + head) * S + row] - log(sum)) < 0.02);
}

int main(int count, char **arguments) {
  for (size_t i = 0; i < ELEMENTS; i++) {
    q[i] = to_bf16(wave(i, 1));
    k[i] = to_bf16(wave(i, 2));
    v[i] = to_bf16(wave(i, 3));
  }
  for (size_t i = 0; i < D; i++) {
    q_weight[i] = (float)(1 + wave(i, 4) / 2);
    k_weight[i] = (float)(1 + wave(i, 5) / 2);
  }
  for (size_t i = 0; i < ANGLES; i++) {
    cosines[i] = (float)cos(3 * wave(i, 6));
    sines[i] = (float)sin(3 * wave(i, 6));
  }

  // The device, with a context and a stream of ours on a GPU.
  int gpu = count > 1 && strcmp(arguments[1], "gpu") == 0;
  struct memory memory;
  REQUIRE(open_memory(&memory, gpu));
  framestride_device device;
  CHECK(gpu ? framestride_device_borrow(memory.context, &device) : framestride_device_emulator(&device));

  // The shape of the model. What is not set has its default: bf16, for one.
  framestride_problem problem;
  memset(&problem, 0, sizeof problem);
  problem.size = sizeof problem;
  problem.name = "one_layer";
  problem.frames = FRAMES;
  problem.tokens_per_frame = FRAME_TOKENS;
  problem.after_tokens = TEXT;
  problem.heads = HEADS;
  problem.head_dim = D;
  problem.norm_kind = FRAMESTRIDE_NORM_RMS;
  problem.norm_eps = EPS;
  problem.rope_pairs = FRAMESTRIDE_ROPE_INTERLEAVED;
  problem.spatial.value = problem.temporal.value = 0.5; // a density
  framestride_spec spec;
  CHECK(framestride_spec_new(&problem, &spec));
  CHECK(framestride_supported(device, spec));

  // Once for a model: its kernels, a plan, and a workspace that all layers use in turn.
  framestride_module module;
  CHECK(framestride_load(device, spec, &module));
  framestride_attention attention;
  CHECK(framestride_attention_new(module, BATCH, HEADS, &attention));
  uint64_t workspace_bytes;
  CHECK(framestride_workspace_bytes(attention, &workspace_bytes));

  // For each step and layer: addresses and strides.
  framestride_call call;
  memset(&call, 0, sizeof call);
  call.size = sizeof call;
  call.q.batch = call.k.batch = call.v.batch = call.out.batch = S * HEADS * D;
  call.q.row = call.k.row = call.v.row = call.out.row = HEADS * D;
  call.q.head = call.k.head = call.v.head = call.out.head = D;
  call.q.data = upload(&memory, q, sizeof q);
  call.k.data = upload(&memory, k, sizeof k);
  call.v.data = upload(&memory, v, sizeof v);
  call.out.data = allocate(&memory, sizeof out);
  // The projections of the text left its rows in tensors of their own. Here they lie in the same
  // memory as those of the video.
  framestride_tensor *video[] = {&call.q, &call.k, &call.v};
  framestride_tensor *text[] = {&call.after.q, &call.after.k, &call.after.v};
  for (int i = 0; i < 3; i++) {
    *text[i] = *video[i];
    text[i]->data = (uint16_t *)video[i]->data + VIDEO * HEADS * D;
  }
  float *weights[2] = {upload(&memory, q_weight, sizeof q_weight), upload(&memory, k_weight, sizeof k_weight)};
  float *tables[2] = {upload(&memory, cosines, sizeof cosines), upload(&memory, sines, sizeof sines)};
  uint32_t *lengths = upload(&memory, LENGTHS, sizeof LENGTHS);
  call.q_norm.weight = weights[0];
  call.k_norm.weight = weights[1];
  call.cos = tables[0];
  call.sin = tables[1];
  call.after.lengths = lengths;
  call.after.has_q_norm = call.after.has_k_norm = 1; // norms of their own, without weights
  call.lse = allocate(&memory, sizeof lse);
  call.found_head_types = allocate(&memory, sizeof types);
  call.found_errors = allocate(&memory, sizeof errors);
  call.spatial_half_width = SPATIAL;
  call.temporal_half_width = TEMPORAL;
  call.has_seed = 1;
  call.seed = 1;
  call.workspace = allocate(&memory, workspace_bytes);
  call.workspace_bytes = workspace_bytes;
  CHECK(framestride_forward(attention, &call, memory.stream));

  download(&memory, out, call.out.data, sizeof out);
  download(&memory, lse, call.lse, sizeof lse);
  download(&memory, types, call.found_head_types, sizeof types);
  download(&memory, errors, call.found_errors, sizeof errors);
  for (int i = 0; i < BATCH * HEADS; i++) {
    const char *name = types[i] == FRAMESTRIDE_HEAD_SPATIAL ? "spatial" : "temporal";
    printf("batch %d, head %d: %s, errors %g and %g\n", i / HEADS, i % HEADS, name, errors[2 * i], errors[2 * i + 1]);
  }
  compare(0, 0, 3);
  compare(0, 1, VIDEO - 1);
  compare(1, 0, VIDEO + 6);
  for (size_t i = at(1, VIDEO + (int)LENGTHS[1], 0); i < ELEMENTS; i++) REQUIRE(from_bf16(out[i]) == 0);
  puts("three rows agree with a plain computation, and rows of invalid text are zero");

  if (count > 2) {
    FILE *file = fopen(arguments[2], "wb");
    REQUIRE(file);
    REQUIRE(fwrite(q, sizeof q, 1, file) + fwrite(k, sizeof k, 1, file) + fwrite(v, sizeof v, 1, file) == 3);
    REQUIRE(fwrite(q_weight, sizeof q_weight, 1, file) + fwrite(k_weight, sizeof k_weight, 1, file) == 2);
    REQUIRE(fwrite(cosines, sizeof cosines, 1, file) + fwrite(sines, sizeof sines, 1, file) == 2);
    REQUIRE(fwrite(out, sizeof out, 1, file) + fwrite(lse, sizeof lse, 1, file) == 2);
    REQUIRE(fwrite(types, sizeof types, 1, file) + fwrite(errors, sizeof errors, 1, file) == 2);
    REQUIRE(fclose(file) == 0);
  }

  void *all[] = {call.q.data, call.k.data, call.v.data, call.out.data, weights[0],     weights[1], tables[0],
                 tables[1],   lengths,     call.lse,    call.found_errors, call.workspace, call.found_head_types};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) release(&memory, all[i]);
  CHECK(framestride_attention_free(attention));
  CHECK(framestride_module_free(module));
  CHECK(framestride_spec_free(spec));
  CHECK(framestride_device_free(device));
  close_memory(&memory);
  return 0;
}
