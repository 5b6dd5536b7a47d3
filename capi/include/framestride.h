// framestride: sparse attention for video diffusion transformers on NVIDIA GPUs.
//
// A spec is the shape of a model's attention. A module has its kernels, loaded on a device. An
// attention is a module planned for a batch and a number of heads, and framestride_forward is one
// call of it.
//
// Functions return a status, and 0 is FRAMESTRIDE_OK. framestride_last_error has the message.
// Nothing is written to the results of a function that fails. No function throws, and none ends the
// process.
//
// A structure begins with its size, which the caller sets. Set all of it to zero first: 0 in a
// field is its default, or stands for nothing. Later versions only add fields at the end, and
// programs need not be compiled again for them.
//
// capi/README.md has the shortest program that works.

#ifndef FRAMESTRIDE_H
#define FRAMESTRIDE_H

#include <stddef.h>
#include <stdint.h>

// The version of this interface that the header describes. It grows with every addition.
#define FRAMESTRIDE_ABI_VERSION 3

// What a function returns. Later versions may have more values.
typedef enum {
  // All went well.
  FRAMESTRIDE_OK = 0,
  // An argument is not what it must be. Nothing was launched.
  FRAMESTRIDE_INVALID_ARGUMENT = 1,
  // A handle was freed, is of another kind, or was never given.
  FRAMESTRIDE_INVALID_HANDLE = 2,
  // A spec is wrong. The message lists every problem.
  FRAMESTRIDE_INVALID_SPEC = 3,
  // A file cannot be read, or does not hold kernels of this version.
  FRAMESTRIDE_INVALID_FILE = 4,
  // The GPU or its driver does not run the kernels, or this version cannot do what was asked for.
  FRAMESTRIDE_UNSUPPORTED = 5,
  // There is no driver, or no GPU of this number.
  FRAMESTRIDE_NO_GPU = 6,
  // A call of the CUDA driver failed. The message has its name and its code.
  FRAMESTRIDE_DRIVER = 7,
  // The emulator stopped a kernel.
  FRAMESTRIDE_EMULATOR = 8,
  // The library made a mistake, which is worth a report.
  FRAMESTRIDE_INTERNAL = 9,
} framestride_status;

// A handle of a device: a GPU, or the emulator.
//
// Any thread may use any handle, several threads at the same time too. What a handle was made of may
// be freed before it: a module keeps its device, and an attention its module. A handle of zero
// stands for nothing, and freeing it does nothing.
typedef struct {
  // A number for the library.
  uint64_t handle;
} framestride_device;

// What a device is.
typedef struct {
  // sizeof(framestride_device_details), set by the caller.
  uint64_t size;
  // The name that the driver gives the GPU, or "emulator".
  char name[256];
  // The family whose kernels it runs, such as "sm_90a". It is empty where there are no kernels
  // for it, or its driver is too old for them.
  char family[32];
  // The compute capability: 9 and 0 for Hopper, and for the emulator.
  uint32_t capability_major;
  uint32_t capability_minor;
  // How many multiprocessors it has.
  uint32_t multiprocessors;
  // The driver as CUDA counts it: 12080 is 12.8. It is 0 for the emulator.
  uint32_t driver;
  // 1 for the emulator, 0 for a GPU.
  uint32_t is_emulator;
  uint32_t reserved;
} framestride_device_details;

// The type of the elements of Q, K, V and the output.
typedef uint32_t framestride_dtype;

// The norm of Q and K before RoPE.
typedef uint32_t framestride_norm_kind;

// The channels that one statistic of a norm covers.
typedef uint32_t framestride_norm_over;

// Which channels RoPE rotates together.
typedef uint32_t framestride_rope_pairs;

// In what the width of a mask is counted.
typedef uint32_t framestride_width_unit;

// The width of a mask.
typedef struct {
  // How much of the unit.
  double value;
  framestride_width_unit unit;
  uint32_t reserved;
} framestride_width;

// What tensor cores multiply in attention.
typedef uint32_t framestride_compute;

// A shape in numbers. What is 0 has its default, or is not there. shapes/src/spec.rs explains every
// number and its limits, under the same names.
//
// The sequence is [before | video | after]: S = before + N + after rows, with N = frames x
// tokens_per_frame.
typedef struct {
  // sizeof(framestride_problem).
  uint64_t size;
  // What messages call it, of [a-z0-9_]. NULL is "unnamed".
  const char *name;
  // Latent frames.
  uint32_t frames;
  // Patches of one latent frame.
  uint32_t tokens_per_frame;
  // Height and width of a frame in patches, for pictures alone. Both, or neither.
  uint32_t grid_height;
  uint32_t grid_width;
  // The most text tokens there can be before the video and after it, padding included.
  uint32_t before_tokens;
  uint32_t after_tokens;
  // Leading frames that every query sees.
  uint32_t sink_frames;
  // Heads of the model. A call may have another number.
  uint32_t heads;
  // Channels of a head: 64 or 128.
  uint32_t head_dim;
  framestride_dtype dtype;
  // The batch that is planned for; 1 by default. A call may have another.
  uint32_t batch;
  framestride_norm_kind norm_kind;
  framestride_norm_over norm_over;
  framestride_rope_pairs rope_pairs;
  // How many leading channels of a head are rotated; head_dim by default.
  uint32_t rope_channels;
  // 1 when text before the video is rotated too, and likewise after it.
  uint32_t rope_before;
  uint32_t rope_after;
  // 1 when each head has its own tables.
  uint32_t rope_per_head;
  // The term that is added in the root; 1e-6 by default.
  double norm_eps;
  // The masks of spatial and temporal heads.
  framestride_width spatial;
  framestride_width temporal;
  // Seed of the draw of sampled rows, where a call gives none.
  uint64_t profile_seed;
  // Rows that profiling samples from each head, 1 to 1024; 64 by default.
  uint32_t profile_rows;
  // Denoising steps and layers of the model, and how many leading ones of each stay dense.
  uint32_t schedule_steps;
  uint32_t schedule_layers;
  uint32_t schedule_dense_steps;
  uint32_t schedule_dense_layers;
  framestride_compute compute;
  // With FRAMESTRIDE_COMPUTE_E4M3, the largest relative error of 8 bits over the sampled rows of a head,
  // above 0 and at most 1. Heads beyond it are computed in the type of the tensors. 0: no head is.
  double largest_error;
} framestride_problem;

// A handle of a spec: the shape of one model's attention, checked. It needs no device.
typedef struct {
  // A number for the library.
  uint64_t handle;
} framestride_spec;

// What a spec says, and what follows from it.
typedef struct {
  // sizeof(framestride_spec_details), set by the caller.
  uint64_t size;
  char name[128];
  // Rows of a sequence: S = before_tokens + video_tokens + after_tokens.
  uint32_t sequence;
  uint32_t video_tokens;
  uint32_t before_tokens;
  uint32_t after_tokens;
  uint32_t frames;
  uint32_t tokens_per_frame;
  // Height and width of a frame in patches, or 0 and 0.
  uint32_t grid_height;
  uint32_t grid_width;
  uint32_t sink_frames;
  uint32_t heads;
  uint32_t head_dim;
  framestride_dtype dtype;
  uint32_t batch;
  // The most batch x heads of a call.
  uint32_t most_heads;
  framestride_norm_kind norm_kind;
  framestride_norm_over norm_over;
  framestride_rope_pairs rope_pairs;
  // Rotated channels of a head, or 0 without RoPE. A row of a table has half as many columns.
  uint32_t rope_channels;
  // 1 when text before the video is rotated too, and likewise after it.
  uint32_t rope_before;
  uint32_t rope_after;
  // Rows of the tables, or 0 without RoPE.
  uint32_t rope_rows;
  // 1 when each head has its own tables.
  uint32_t rope_per_head;
  // Half widths of the spatial and the temporal band in tokens, 1 to N.
  uint32_t spatial_half_width;
  uint32_t temporal_half_width;
  uint32_t profile_rows;
  // A call stays dense where step < dense_steps, or layer < dense_layers. Both count from 0.
  uint32_t schedule_steps;
  uint32_t schedule_layers;
  uint32_t schedule_dense_steps;
  uint32_t schedule_dense_layers;
  framestride_compute compute;
  uint64_t profile_seed;
  double norm_eps;
  // Visible pairs over S^2 of a spatial and of a temporal head, when all text is valid.
  double spatial_density;
  double temporal_density;
  // The widths of the masks as the spec has them.
  framestride_width spatial;
  framestride_width temporal;
  // The largest error of a head in 8 bits, or 0 where the spec has none.
  double largest_error;
} framestride_spec_details;

// The type of a head: which keys its queries see. Arrays of head types have these values.
typedef uint32_t framestride_head_type;

// A handle of a module: the kernels of one spec, loaded on one device.
typedef struct {
  // A number for the library.
  uint64_t handle;
} framestride_module;

// How long a module took to load.
typedef struct {
  // sizeof(framestride_module_details), set by the caller.
  uint64_t size;
  // Seconds that it took to fill in the template. It is 0 for kernels from a file.
  double fill_seconds;
  // Seconds that the device took to load the kernels.
  double load_seconds;
  // Seconds of these that the driver's compiler took. It is 0 when the driver found the kernels in
  // its cache, and on the emulator.
  double compile_seconds;
} framestride_module_details;

// A handle of an attention: a module, planned for a batch and a number of heads.
typedef struct {
  // A number for the library.
  uint64_t handle;
} framestride_attention;

// Rows of head_dim contiguous elements, in the type of the spec. Element (b, s, h, d) is
// data[b * batch + s * row + h * head + d].
//
// So [B, S, H, D], [B, H, S, D], packed QKV and slices are all tensors. `data` and strides may be any
// multiples of 2 bytes; those that are multiples of 16 bytes are faster.
typedef struct {
  // Element (0, 0, 0, 0).
  void *data;
  // Elements from one batch item to the next.
  uint64_t batch;
  // Elements from one token to the next.
  uint64_t row;
  // Elements from one head to the next.
  uint64_t head;
} framestride_tensor;

// The affine part of a norm of Q or K, contiguous, at multiples of 16 bytes. It has head_dim
// elements, or heads x head_dim where a statistic is over all heads.
typedef struct {
  // NULL is ones.
  const float *weight;
  // NULL is zeros. Only a layer norm has one.
  const float *bias;
} framestride_norm;

// The text on one side of the video.
typedef struct {
  // Its rows [B, tokens, H, D], where they lie in tensors of their own. All three are given, or
  // none: then the rows are among those of the call's q, k and v, before the video or after it.
  framestride_tensor q;
  framestride_tensor k;
  framestride_tensor v;
  // How many tokens of each item are valid, [B]. Valid ones come first. NULL: all are.
  const uint32_t *lengths;
  // The norms of these rows, where has_q_norm and has_k_norm are 1. Else they have those of the
  // video.
  framestride_norm q_norm;
  framestride_norm k_norm;
  uint32_t has_q_norm;
  uint32_t has_k_norm;
} framestride_text;

// Where the types of heads come from.
typedef uint32_t framestride_head_types;

// Everything that one call reads and writes. Set all of it to zero, then what there is.
//
// All memory belongs to the caller: memory of the GPU, or of the process for the emulator. It stays
// as it is until the work is done. The structure itself is read during the call alone. Two calls that
// may run at the same time have different workspaces.
typedef struct {
  // sizeof(framestride_call).
  uint64_t size;
  // Q, K and V [B, S, H, D] as the projections left them, neither normalised nor rotated. Rows of
  // text that has tensors of its own are not among these. The output has all S rows.
  framestride_tensor q;
  framestride_tensor k;
  framestride_tensor v;
  // The output [B, S, H, D]. It may be the memory of q, k or v (but see `precisions`). Rows of invalid text are zero.
  framestride_tensor out;
  // The norms of video rows, where the spec has a norm.
  framestride_norm q_norm;
  framestride_norm k_norm;
  // The text before the video and after it.
  framestride_text before;
  framestride_text after;
  // The tables of RoPE, where the spec has it: contiguous [rows, channels / 2], or
  // [rows, heads, channels / 2] where each head has its own, at multiples of 16 bytes. Rows are
  // those of the video, and those of text that is rotated too.
  const float *cos;
  const float *sin;
  // Elements from one item's table to the next, a multiple of 4. 0: all items share one.
  uint64_t rope_batch;
  // Where the natural log-sum-exp of each row's scaled scores goes, [B, H, S]. NULL: nowhere.
  float *lse;
  // The types of heads [B, H], for FRAMESTRIDE_HEAD_TYPES_GIVEN. NULL: else.
  const uint32_t *head_types;
  // Where a call that profiles writes what it finds. The types are [B, H]. The errors are
  // [B, H, 2]: mean squared errors of the spatial and of the temporal mask, against dense attention
  // of the sampled rows. NULL: nowhere.
  uint32_t *found_head_types;
  float *found_errors;
  // framestride_workspace_bytes bytes or more at a multiple of 256. All layers may use it in turn.
  void *workspace;
  uint64_t workspace_bytes;
  // Seed of the rows that profiling samples, where has_seed is 1. Else the spec's is taken.
  uint64_t seed;
  uint32_t has_seed;
  framestride_head_types head_types_from;
  // Half widths of the bands in tokens, 1 to N. 0: the spec's.
  uint32_t spatial_half_width;
  uint32_t temporal_half_width;
  // Softmax scale. 0: 1 / sqrt(head_dim).
  float scale;
  uint32_t reserved;
  // In how many bits heads multiply [B, H], where the spec has a largest_error: 8 in 8 bits, any other
  // number in the type of the tensors. NULL: a call that profiles finds it, and another one computes all
  // heads in that type. The output is not the memory of q, k or v, unless the call neither profiles nor
  // is given these.
  const uint32_t *precisions;
  // Where a call writes what it finds: 8 or 16 [B, H], and the relative errors of 8 bits over the sampled
  // rows [B, H]. NULL: nowhere.
  uint32_t *found_precisions;
  float *found_precision_errors;
} framestride_call;

#define FRAMESTRIDE_DTYPE_BF16 0

#define FRAMESTRIDE_DTYPE_F16 1

// The type of the tensors.
#define FRAMESTRIDE_COMPUTE_DTYPE 0

// e4m3, 8 bits, with head_dim 128 on a Hopper. It is faster and less exact.
#define FRAMESTRIDE_COMPUTE_E4M3 1

#define FRAMESTRIDE_NORM_NONE 0

// x / sqrt(mean(x^2) + eps) * weight
#define FRAMESTRIDE_NORM_RMS 1

// (x - mean(x)) / sqrt(var(x) + eps) * weight + bias
#define FRAMESTRIDE_NORM_LAYER 2

// The head_dim channels of each head.
#define FRAMESTRIDE_NORM_OVER_HEAD 0

// All heads x head_dim channels of a token. Every call then has all heads of the model.
#define FRAMESTRIDE_NORM_OVER_HEADS 1

#define FRAMESTRIDE_ROPE_NONE 0

// (0, 1), (2, 3) and so on.
#define FRAMESTRIDE_ROPE_INTERLEAVED 1

// (0, n / 2), (1, n / 2 + 1) and so on, of n rotated channels.
#define FRAMESTRIDE_ROPE_HALF 2

// Every key.
#define FRAMESTRIDE_HEAD_DENSE 0

// A band in frame-major order.
#define FRAMESTRIDE_HEAD_SPATIAL 1

// A band in token-major order.
#define FRAMESTRIDE_HEAD_TEMPORAL 2

// Visible pairs over all S^2 pairs, above 0 and at most 1. The nearest half width is taken.
#define FRAMESTRIDE_WIDTH_DENSITY 0

// The half width in tokens, 1 to N.
#define FRAMESTRIDE_WIDTH_TOKENS 1

// The half width in frames' worth of tokens.
#define FRAMESTRIDE_WIDTH_FRAMES 2

// The call profiles the heads, and takes what it finds.
#define FRAMESTRIDE_HEAD_TYPES_PROFILED 0

// Every head is dense.
#define FRAMESTRIDE_HEAD_TYPES_DENSE 1

// The caller gives them.
#define FRAMESTRIDE_HEAD_TYPES_GIVEN 2

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// The message of this thread's last call that failed: what was found, what is allowed, and how to
// mend it. UTF-8 of several lines, and empty where no call has failed.
//
// The text is the library's, and stays valid until this thread's next call fails or it ends.
const char *framestride_last_error(void);

// The version of the library, such as "0.1.0". The text is the library's.
const char *framestride_version(void);

// The version of the interface that the library has. Programs that were compiled with a header of
// this version or of an earlier one work with it.
uint32_t framestride_abi_version(void);

// Opens GPU `ordinal` in its primary context, which the CUDA runtime and PyTorch use too.
//
// It loads the driver (libcuda) if nobody has. Any GPU can be opened;
// framestride_device_info says whether there are kernels for it.
framestride_status framestride_device_gpu(int32_t ordinal, framestride_device *device);

// Opens the GPU of a context of the caller's, a CUcontext. It is borrowed: it must outlive the
// device and all that is made of it, and is never destroyed. The context that is current on a
// thread is the same after every call.
framestride_status framestride_device_borrow(void *context, framestride_device *device);

// Opens an emulator, which runs the same kernels on the CPU. It is exact and slow, and for tests.
//
// Its memory is that of the process: tensors and workspace are host memory, and every call is done
// when it returns. It touches whole words of 4 bytes, so nobody may write the bytes beside a tensor
// in the same word during a call.
framestride_status framestride_device_emulator(framestride_device *device);

// Fills `details`, whose size is set.
framestride_status framestride_device_info(framestride_device device,
                                           framestride_device_details *details);

// Frees a device. What was made of it goes on working.
framestride_status framestride_device_free(framestride_device device);

// Makes a spec of numbers.
framestride_status framestride_spec_new(const framestride_problem *problem, framestride_spec *spec);

// Makes a spec of `bytes` bytes of TOML text. README.md has an example.
framestride_status framestride_spec_parse(const char *toml, size_t bytes, framestride_spec *spec);

// Makes a spec that the library ships, such as "hunyuan_video_720p". shapes/models has them all.
framestride_status framestride_spec_shipped(const char *name, framestride_spec *spec);

// Writes the names of all specs that the library ships to `buffer`, one a line, as framestride_spec_toml
// does.
framestride_status framestride_spec_names(char *buffer,
                                          size_t capacity,
                                          size_t *needed);

// Fills `details`, whose size is set.
framestride_status framestride_spec_info(framestride_spec spec, framestride_spec_details *details);

// Writes the TOML text of a spec to `buffer`, with a zero byte behind it.
//
// `*needed` becomes the bytes of both. Where `capacity` is less, nothing else is written, and that
// is no error: `buffer` may be NULL with a capacity of 0, to ask for the size.
framestride_status framestride_spec_toml(framestride_spec spec,
                                         char *buffer,
                                         size_t capacity,
                                         size_t *needed);

// Writes a description for people to `buffer`, as framestride_spec_toml does: sequence, tiles, exact
// densities, workspace, arithmetic, and what the spec is estimated to gain over dense attention.
//
// `gpu` is the short name of one that there are rates of, such as "h100". NULL is the first GPU of
// this machine, or all there are rates of.
framestride_status framestride_describe(framestride_spec spec,
                                        const char *gpu,
                                        char *buffer,
                                        size_t capacity,
                                        size_t *needed);

// Draws the masks of a spec, as the command `framestride plot` does, and writes the PNG file to
// `buffer`. Sizes are as for framestride_spec_toml, but there is no zero byte.
//
// Pictures of common models have less than 1 MiB. Each call draws, which takes a moment.
framestride_status framestride_plot(framestride_spec spec,
                                    uint8_t *buffer,
                                    size_t capacity,
                                    size_t *needed);

// The half width in tokens that gives a type of head the density that is nearest to `density`. A
// call takes it as spatial_half_width or temporal_half_width.
framestride_status framestride_half_width(framestride_spec spec,
                                          framestride_head_type head_type,
                                          double density,
                                          uint32_t *half_width);

// Whether a device runs the kernels of a spec: FRAMESTRIDE_OK, or FRAMESTRIDE_UNSUPPORTED and a
// message with the reason. Nothing is loaded.
framestride_status framestride_supported(framestride_device device, framestride_spec spec);

// Frees a spec. What was made of it goes on working.
framestride_status framestride_spec_free(framestride_spec spec);

// Loads the kernels of a spec. It needs no compiler: templates in the library are filled in with the
// numbers of the spec.
//
// On a GPU the driver compiles them now, which takes a second or two, unless it has them in its
// cache. They are never compiled later.
framestride_status framestride_load(framestride_device device,
                                    framestride_spec spec,
                                    framestride_module *module);

// Loads kernels that `framestride build` wrote: NAME.ptx at `path`, and NAME.json beside it.
framestride_status framestride_load_file(framestride_device device,
                                         const char *path,
                                         framestride_module *module);

// Fills `details`, whose size is set.
framestride_status framestride_module_info(framestride_module module,
                                           framestride_module_details *details);

// Gives the spec of a module a handle of its own, which is freed as any other.
framestride_status framestride_module_spec(framestride_module module, framestride_spec *spec);

// Frees a module. An attention that was made of it goes on working, and the kernels are unloaded
// when the last one is freed. By then no call that uses them may still run.
framestride_status framestride_module_free(framestride_module module);

// Plans calls of `batch` items of `heads` heads. They may be some of the model's heads, or more than
// the spec has; but a norm over all heads needs exactly the spec's.
framestride_status framestride_attention_new(framestride_module module,
                                             uint32_t batch,
                                             uint32_t heads,
                                             framestride_attention *attention);

// Bytes that the workspace of a call must have: about three times Q, or 1.5 times
// where all heads multiply in 8 bits.
framestride_status framestride_workspace_bytes(framestride_attention attention, uint64_t *bytes);

// Launches one layer on `stream`, from Q, K and V to the output: norm, RoPE, profiling if it is asked
// for, attention.
//
// `stream` is a CUstream or cudaStream_t of the device's context; NULL is its default stream. The
// emulator has none.
//
// Everything is checked before the first launch. The call then launches kernels and returns: it
// allocates nothing, copies nothing, loads nothing and waits for nothing. So it can be captured in a
// CUDA graph. The handle, the memory and the stream live until the work is done.
framestride_status framestride_forward(framestride_attention attention,
                                       const framestride_call *call,
                                       void *stream);

// Launches what finds the types of the heads, and no attention: they and their errors go to
// found_head_types and found_errors. head_types_from is FRAMESTRIDE_HEAD_TYPES_PROFILED. out and lse
// are not looked at. All else is as for framestride_forward.
framestride_status framestride_profile(framestride_attention attention,
                                       const framestride_call *call,
                                       void *stream);

// Frees an attention. By then none of its calls may still run.
framestride_status framestride_attention_free(framestride_attention attention);

// Writes a table of a study to `buffer`, as framestride_spec_toml does.
//
// A study is `bytes` bytes of JSON, which the command `framestride study` and framestride.study of
// Python write. `error` is the relative error that a layer may have, above 0 and below 1, or 0 for
// the study's own. The table has the relative error of each layer at each density, or with `by_head`
// 1 that of each head under each mask.
framestride_status framestride_study_table(const char *study,
                                           size_t bytes,
                                           double error,
                                           uint32_t by_head,
                                           char *buffer,
                                           size_t capacity,
                                           size_t *needed);

// Writes the schedule of a study to `buffer`, as framestride_spec_toml does: JSON of the least
// density of each layer and step with which the layer is within `error`. Where the study tried 8 bits, it
// says which layers have them, and which of their heads stay in 16.
framestride_status framestride_study_schedule(const char *study,
                                              size_t bytes,
                                              double error,
                                              char *buffer,
                                              size_t capacity,
                                              size_t *needed);

// Draws density against error, and heads by layer, and writes the PNG file to `buffer`, as
// framestride_plot does.
framestride_status framestride_study_plot(const char *study,
                                          size_t bytes,
                                          double error,
                                          uint8_t *buffer,
                                          size_t capacity,
                                          size_t *needed);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* FRAMESTRIDE_H */
