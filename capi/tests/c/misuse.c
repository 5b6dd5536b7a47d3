// Everything that a caller can get wrong, each with its status and its message. Nothing here may
// read or write where it must not: the tests run it under valgrind too.
//
//     misuse FILE      FILE: something that is no PTX
#include <framestride.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// A call that must fail. Of what is wrong with a spec, which other tests read, only the first line
// is shown.
#define WRONG(name, call)                                                                                           \
  do {                                                                                                              \
    framestride_status status = (call);                                                                             \
    const char *message = framestride_last_error();                                                                 \
    size_t shown = status == FRAMESTRIDE_INVALID_SPEC ? strcspn(message, "\n") : strlen(message);                   \
    printf("## %s\n%d: %.*s\n", name, (int)status, (int)shown, message);                                            \
    if (status == FRAMESTRIDE_OK) exit(1);                                                                          \
  } while (0)

// A call that must not.
#define RIGHT(call)                                                                                                 \
  do {                                                                                                              \
    if ((call) != FRAMESTRIDE_OK) {                                                                                 \
      printf("%s failed: %s\n", #call, framestride_last_error());                                                   \
      exit(1);                                                                                                      \
    }                                                                                                               \
  } while (0)

// A field of the call that would be right, with another value, and what becomes of it.
#define WRONG_CALL(name, change)                                                                                    \
  do {                                                                                                              \
    framestride_call call = right_call();                                                                           \
    change;                                                                                                         \
    WRONG(name, framestride_forward(attention, &call, NULL));                                                       \
  } while (0)

#define WRONG_PROBLEM(name, change)                                                                                 \
  do {                                                                                                              \
    framestride_problem problem = right_problem();                                                                  \
    framestride_spec wrong;                                                                                         \
    change;                                                                                                         \
    WRONG(name, framestride_spec_new(&problem, &wrong));                                                            \
  } while (0)

static framestride_device device;
static framestride_spec spec;
static framestride_module module;
static framestride_attention attention;
static uint64_t workspace_bytes;

// There is no memory at such an address. Calls that are refused only look at it.
static void *nowhere(uintptr_t address) { return (void *)address; }

// A call of one item of two heads of 139 rows of 64 channels.
static framestride_call right_call(void) {
  framestride_call call;
  memset(&call, 0, sizeof call);
  call.size = sizeof call;
  framestride_tensor *tensors[] = {&call.q, &call.k, &call.v, &call.out};
  for (uintptr_t i = 0; i < 4; i++) {
    tensors[i]->data = nowhere(0x100000 * (i + 1));
    tensors[i]->batch = 139 * 128;
    tensors[i]->row = 128;
    tensors[i]->head = 64;
  }
  call.cos = nowhere(0x500000);
  call.sin = nowhere(0x600000);
  call.after.lengths = nowhere(0x700000);
  call.lse = nowhere(0x800000);
  call.workspace = nowhere(0x1000000);
  call.workspace_bytes = workspace_bytes;
  return call;
}

static framestride_problem right_problem(void) {
  framestride_problem problem;
  memset(&problem, 0, sizeof problem);
  problem.size = sizeof problem;
  problem.frames = 4;
  problem.tokens_per_frame = 30;
  problem.heads = 2;
  problem.head_dim = 64;
  problem.spatial.value = problem.temporal.value = 0.5;
  return problem;
}

static void null_pointers(void) {
  framestride_problem problem = right_problem();
  framestride_call call = right_call();
  framestride_spec out;
  framestride_module loaded;
  char text[8];
  size_t needed;
  WRONG("device_gpu, device", framestride_device_gpu(0, NULL));
  WRONG("device_borrow, context", framestride_device_borrow(NULL, &device));
  WRONG("device_borrow, device", framestride_device_borrow(&problem, NULL));
  WRONG("device_emulator, device", framestride_device_emulator(NULL));
  WRONG("device_info, details", framestride_device_info(device, NULL));
  WRONG("spec_new, problem", framestride_spec_new(NULL, &out));
  WRONG("spec_new, spec", framestride_spec_new(&problem, NULL));
  WRONG("spec_parse, toml", framestride_spec_parse(NULL, 0, &out));
  WRONG("spec_parse, spec", framestride_spec_parse("", 0, NULL));
  WRONG("spec_shipped, name", framestride_spec_shipped(NULL, &out));
  WRONG("spec_shipped, spec", framestride_spec_shipped("tiny_plain", NULL));
  WRONG("spec_info, details", framestride_spec_info(spec, NULL));
  WRONG("spec_toml, buffer", framestride_spec_toml(spec, NULL, 1, &needed));
  WRONG("spec_toml, needed", framestride_spec_toml(spec, text, sizeof text, NULL));
  WRONG("describe, needed", framestride_describe(spec, NULL, text, sizeof text, NULL));
  WRONG("half_width, half_width", framestride_half_width(spec, FRAMESTRIDE_HEAD_SPATIAL, 0.5, NULL));
  WRONG("load, module", framestride_load(device, spec, NULL));
  WRONG("load_file, path", framestride_load_file(device, NULL, &loaded));
  WRONG("module_info, details", framestride_module_info(module, NULL));
  WRONG("module_spec, spec", framestride_module_spec(module, NULL));
  WRONG("attention_new, attention", framestride_attention_new(module, 1, 2, NULL));
  WRONG("workspace_bytes, bytes", framestride_workspace_bytes(attention, NULL));
  WRONG("forward, call", framestride_forward(attention, NULL, NULL));
  WRONG("profile, call", framestride_profile(attention, NULL, NULL));
  call.out.data = NULL;
  WRONG("forward without out", framestride_forward(attention, &call, NULL));
}

// A structure of another version is larger. What this one does not know of must be zero.
static void sizes(void) {
  struct {
    framestride_problem known;
    char unknown[24];
  } larger;
  memset(&larger, 0, sizeof larger);
  larger.known = right_problem();
  larger.known.size = sizeof larger;
  framestride_spec made;
  RIGHT(framestride_spec_new(&larger.known, &made));
  RIGHT(framestride_spec_free(made));
  larger.unknown[5] = 1;
  WRONG("a later field that is set", framestride_spec_new(&larger.known, &made));
  WRONG_PROBLEM("no size", problem.size = 0);
  WRONG_PROBLEM("a size that is too small", problem.size = sizeof problem - 16);
  WRONG_PROBLEM("a size that is none", problem.size = UINT64_MAX);
  WRONG_CALL("no size of a call", call.size = 0);
  WRONG_CALL("a size of a call that is too small", call.size = 8);

  struct {
    framestride_spec_details known;
    uint64_t unknown[3];
  } room;
  memset(&room, 0xff, sizeof room);
  room.known.size = sizeof room;
  RIGHT(framestride_spec_info(spec, &room.known));
  if (room.known.size != sizeof room || room.known.sequence != 139 || room.unknown[0] || room.unknown[2]) exit(1);
  framestride_device_details small;
  small.size = 16;
  WRONG("details that are too small", framestride_device_info(device, &small));
  framestride_module_details none;
  none.size = 0;
  WRONG("details without a size", framestride_module_info(module, &none));
}

static void handles(void) {
  framestride_call call = right_call();
  framestride_device_details details;
  memset(&details, 0, sizeof details);
  details.size = sizeof details;
  // Handles of other kinds, made of the numbers of live ones.
  framestride_device no_device = {module.handle};
  framestride_spec no_spec = {device.handle};
  framestride_module no_module = {attention.handle};
  framestride_attention no_attention = {spec.handle};
  framestride_module loaded;
  framestride_attention planned;
  WRONG("a module as a device", framestride_device_info(no_device, &details));
  WRONG("a device as a spec", framestride_load(device, no_spec, &loaded));
  WRONG("an attention as a module", framestride_attention_new(no_module, 1, 2, &planned));
  WRONG("a spec as an attention", framestride_forward(no_attention, &call, NULL));
  WRONG("freeing a module as a device", framestride_device_free(no_device));
  uint64_t made_up[] = {1, 0x100000000, 0xffffffff, UINT64_MAX, device.handle + 2, device.handle + 0x200000000,
                        device.handle + 0x100000000};
  for (size_t i = 0; i < sizeof made_up / sizeof *made_up; i++) {
    framestride_attention handle = {made_up[i]};
    WRONG("a handle that was made up", framestride_forward(handle, &call, NULL));
    WRONG("freeing it", framestride_attention_free(handle));
  }

  // Nothing is freed with 0.
  framestride_device zero = {0};
  RIGHT(framestride_device_free(zero));
  WRONG("a handle of 0", framestride_device_info(zero, &details));

  framestride_device d;
  framestride_spec s;
  framestride_module m;
  framestride_attention a;
  uint64_t bytes;
  RIGHT(framestride_device_emulator(&d));
  RIGHT(framestride_spec_shipped("tiny_plain", &s));
  RIGHT(framestride_load(d, s, &m));
  RIGHT(framestride_attention_new(m, 1, 1, &a));
  // What was made of a handle goes on without it.
  RIGHT(framestride_device_free(d));
  RIGHT(framestride_spec_free(s));
  RIGHT(framestride_module_free(m));
  RIGHT(framestride_workspace_bytes(a, &bytes));
  RIGHT(framestride_attention_free(a));
  WRONG("a freed device", framestride_supported(d, spec));
  WRONG("a freed spec", framestride_supported(device, s));
  WRONG("a freed module", framestride_module_spec(m, &s));
  WRONG("a freed attention", framestride_workspace_bytes(a, &bytes));
  WRONG("a device freed twice", framestride_device_free(d));
  WRONG("a spec freed twice", framestride_spec_free(s));
  WRONG("a module freed twice", framestride_module_free(m));
  WRONG("an attention freed twice", framestride_attention_free(a));
  // A handle that takes the place of a freed one is another.
  framestride_device again;
  RIGHT(framestride_device_emulator(&again));
  WRONG("a freed device whose place is taken", framestride_device_free(d));
  RIGHT(framestride_device_free(again));
}

static void specs(void) {
  framestride_spec wrong;
  uint32_t half_width;
  const char *toml = "name = \"a\"\n[video]\nframes = 0\n";
  WRONG("a wrong spec", framestride_spec_parse(toml, strlen(toml), &wrong));
  WRONG("a spec that is no UTF-8", framestride_spec_parse("name = \"\xff\"", 10, &wrong));
  WRONG("a spec that is too long", framestride_spec_parse(toml, SIZE_MAX, &wrong));
  WRONG("an unknown name", framestride_spec_shipped("tiny_plan", &wrong));
  size_t needed;
  WRONG("an unknown GPU", framestride_describe(spec, "b200", NULL, 0, &needed));
  WRONG_PROBLEM("no frames", problem.frames = 0);
  WRONG_PROBLEM("no heads, and an odd head dim", (problem.heads = 0, problem.head_dim = 65));
  WRONG_PROBLEM("a bad name", problem.name = "A name");
  WRONG_PROBLEM("half a grid", problem.grid_height = 5);
  WRONG_PROBLEM("an unknown dtype", problem.dtype = 2);
  WRONG_PROBLEM("an unknown norm", problem.norm_kind = 3);
  WRONG_PROBLEM("an unknown extent of a norm", problem.norm_over = 2);
  WRONG_PROBLEM("an unknown rotation", problem.rope_pairs = 3);
  WRONG_PROBLEM("a flag of 2", problem.rope_per_head = 2);
  WRONG_PROBLEM("an unknown unit", problem.spatial.unit = 3);
  WRONG_PROBLEM("no density", problem.temporal.value = 0);
  WRONG_PROBLEM("half a token", (problem.spatial.unit = FRAMESTRIDE_WIDTH_TOKENS, problem.spatial.value = 1.5));
  WRONG_PROBLEM("products that there are none of", problem.compute = 2);
  WRONG_PROBLEM("a bound of precisions without 8 bits", problem.largest_error = 0.04);
  WRONG_PROBLEM("8 bits with head dim 64", (problem.compute = FRAMESTRIDE_COMPUTE_E4M3, problem.head_dim = 64));
  WRONG("a density of a dense head", framestride_half_width(spec, FRAMESTRIDE_HEAD_DENSE, 0.5, &half_width));
  WRONG("a density that is too low", framestride_half_width(spec, FRAMESTRIDE_HEAD_SPATIAL, 0.001, &half_width));
}

static void loading(const char *no_ptx) {
  framestride_module loaded;
  framestride_attention planned;
  WRONG("a file that is not there", framestride_load_file(device, "no/such.ptx", &loaded));
  WRONG("a file that is no PTX", framestride_load_file(device, no_ptx, &loaded));
  WRONG("a batch of 0", framestride_attention_new(module, 0, 2, &planned));
  WRONG("no heads", framestride_attention_new(module, 1, 0, &planned));
  WRONG("too many heads", framestride_attention_new(module, 70000, 70000, &planned));
  framestride_spec all_heads;
  RIGHT(framestride_spec_shipped("tiny_heads_sinks", &all_heads));
  RIGHT(framestride_load(device, all_heads, &loaded));
  WRONG("some heads of a norm over heads", framestride_attention_new(loaded, 1, 1, &planned));
  RIGHT(framestride_module_free(loaded));
  RIGHT(framestride_spec_free(all_heads));
}

static void calls(void) {
  WRONG_CALL("q that is NULL", call.q.data = NULL);
  WRONG_CALL("precisions without 8 bits", call.precisions = nowhere(0x900000));
  WRONG_CALL("precisions that nobody finds", call.found_precisions = nowhere(0x900000));
  WRONG_CALL("k at an odd address", call.k.data = nowhere(0x200001));
  WRONG_CALL("strides that overflow", call.v.row = UINT64_MAX / 2);
  WRONG_CALL("rows of out that overlap", call.out.row = 64);
  WRONG_CALL("heads of out that overlap", call.out.head = 0);
  WRONG_CALL("no cosines", call.cos = NULL);
  WRONG_CALL("misaligned sines", call.sin = nowhere(0x600004));
  WRONG_CALL("a misaligned weight", call.q_norm.weight = nowhere(0x900008));
  WRONG_CALL("a bias of an rms norm", call.k_norm.bias = nowhere(0x900000));
  WRONG_CALL("a flag of 2", call.after.has_q_norm = 2);
  WRONG_CALL("misaligned lengths", call.after.lengths = nowhere(0x700002));
  WRONG_CALL("tables that are not aligned", call.rope_batch = 2);
  WRONG_CALL("some tensors of text", call.after.k = call.k);
  WRONG_CALL("text that the spec does not have", call.before.q = call.before.k = call.before.v = call.q);
  WRONG_CALL("text tensors at an odd address",
             (call.after.q = call.after.k = call.after.v = call.q, call.after.v.data = nowhere(0x900001)));
  WRONG_CALL("lse over out", call.lse = nowhere(0x400040));
  WRONG_CALL("no workspace", call.workspace = NULL);
  WRONG_CALL("a misaligned workspace", call.workspace = nowhere(0x1000010));
  WRONG_CALL("a small workspace", call.workspace_bytes = 1024);
  WRONG_CALL("q in the workspace", call.q.data = nowhere(0x1000400));
  WRONG_CALL("types from nowhere", call.head_types_from = 3);
  WRONG_CALL("given types that are NULL", call.head_types_from = FRAMESTRIDE_HEAD_TYPES_GIVEN);
  WRONG_CALL("given types of a profiled call", call.head_types = nowhere(0x900000));
  WRONG_CALL("errors over out", call.found_errors = nowhere(0x400000));
  WRONG_CALL("found types of a dense call",
             (call.head_types_from = FRAMESTRIDE_HEAD_TYPES_DENSE, call.found_head_types = nowhere(0x900000)));
  WRONG_CALL("a half width that is too large", call.temporal_half_width = 116);
  WRONG_CALL("a scale that is no number", call.scale = 0.0f / (float)call.reserved);
  WRONG_CALL("a negative scale", call.scale = -1);
  WRONG_CALL("a seed of a flag of 2", call.has_seed = 2);
  WRONG_CALL("a reserved field of a call", call.reserved = 1);
  framestride_call call = right_call();
  call.head_types_from = FRAMESTRIDE_HEAD_TYPES_DENSE;
  WRONG("profiling of dense heads", framestride_profile(attention, &call, NULL));
}

static void studies(void) {
  const char *study = "{\"framestride_study\": 1, \"models\": [{\"name\": \"one\", \"layers\": 1}], \"video\": [4, 5, 6], "
                      "\"sampled_rows\": 64, \"densities\": [0.2, 0.5], \"error\": 0.1, \"steps\": [{\"index\": 0, "
                      "\"count\": 1, \"noise\": null, \"layers\": [{\"size\": [1.0], \"errors\": [[[0.09, 0.04]], "
                      "[[null, 0.0025]]]}]}]}";
  size_t bytes = strlen(study), needed;
  const char *later = "{\"framestride_study\": 2}";
  WRONG("a study that is NULL", framestride_study_table(NULL, 0, 0, 0, NULL, 0, &needed));
  WRONG("a study that ends early", framestride_study_table(study, bytes - 1, 0, 0, NULL, 0, &needed));
  WRONG("a study of a later version", framestride_study_plot(later, strlen(later), 0, NULL, 0, &needed));
  WRONG("a table that is none", framestride_study_table(study, bytes, 0, 2, NULL, 0, &needed));
  WRONG("an error that is none", framestride_study_schedule(study, bytes, 1, NULL, 0, &needed));
  RIGHT(framestride_study_plot(study, bytes, 0, NULL, 0, &needed));
  char text[1024];
  RIGHT(framestride_study_table(study, bytes, 0, 1, text, sizeof text, &needed));
  if (strlen(text) + 1 != needed || !strstr(text, "temporal")) exit(1);
  // 0.5 is within the study's own error, and nothing is within a lower one.
  RIGHT(framestride_study_schedule(study, bytes, 0, text, sizeof text, &needed));
  if (!strstr(text, "\"density\":[0.5]")) exit(1);
  RIGHT(framestride_study_schedule(study, bytes, 0.01, text, sizeof text, &needed));
  if (!strstr(text, "\"density\":[1.0]")) exit(1);
}

int main(int count, char **arguments) {
  if (count != 2 || framestride_abi_version() != FRAMESTRIDE_ABI_VERSION || !framestride_version()[0]) return 1;
  if (framestride_last_error()[0]) return 1;
  RIGHT(framestride_device_emulator(&device));
  RIGHT(framestride_spec_shipped("tiny_text_last", &spec));
  RIGHT(framestride_load(device, spec, &module));
  RIGHT(framestride_attention_new(module, 1, 2, &attention));
  RIGHT(framestride_workspace_bytes(attention, &workspace_bytes));
  null_pointers();
  sizes();
  handles();
  specs();
  loading(arguments[1]);
  calls();
  studies();

  // A spec is given back as text, into a buffer that is large enough.
  size_t needed, again;
  RIGHT(framestride_spec_toml(spec, NULL, 0, &needed));
  char *text = malloc(needed);
  text[0] = 7;
  RIGHT(framestride_spec_toml(spec, text, needed - 1, &again));
  if (again != needed || text[0] != 7) return 1;
  RIGHT(framestride_spec_toml(spec, text, needed, &again));
  char names[4096];
  RIGHT(framestride_spec_names(names, sizeof names, &needed));
  if (strlen(names) + 1 != needed || !strstr(names, "hunyuan_video_720p\n")) return 1;
  RIGHT(framestride_describe(spec, "h100", NULL, 0, &needed));
  char *description = malloc(needed);
  RIGHT(framestride_describe(spec, "h100", description, needed, &again));
  if (again != needed || strlen(description) + 1 != needed || !strstr(description, "sequence   139 =")) return 1;
  free(description);
  framestride_spec same;
  RIGHT(framestride_spec_parse(text, strlen(text), &same));
  RIGHT(framestride_spec_free(same));
  free(text);

  RIGHT(framestride_attention_free(attention));
  RIGHT(framestride_module_free(module));
  RIGHT(framestride_spec_free(spec));
  RIGHT(framestride_device_free(device));
  return 0;
}
