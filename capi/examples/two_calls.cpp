// Profiling alone, then attention with the types that it found, in C++: a spec in TOML, and what
// owns the handles. Rows are computed again here, in the plainest way.
//
//     two_calls gpu|emulator

#include <framestride.h>

#include <cmath>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string_view>
#include <vector>

#include "memory.h"

namespace {

// Throws the message of a call that failed.
void check(framestride_status status) {
  if (status != FRAMESTRIDE_OK) throw std::runtime_error(framestride_last_error());
}

// A handle that is freed with its owner.
template <class Handle, framestride_status (*Free)(Handle)>
class Owned {
 public:
  Owned() = default;
  Owned(const Owned &) = delete;
  Owned &operator=(const Owned &) = delete;
  ~Owned() { Free(handle_); }
  Handle get() const { return handle_; }
  Handle *fill() { return &handle_; }

 private:
  Handle handle_{};
};

using Device = Owned<framestride_device, framestride_device_free>;
using Spec = Owned<framestride_spec, framestride_spec_free>;
using Module = Owned<framestride_module, framestride_module_free>;
using Attention = Owned<framestride_attention, framestride_attention_free>;

// Memory of the device, freed with its owner.
auto own(const memory &memory, void *pointer) {
  auto free = [&memory](void *p) { release(&memory, p); };
  return std::unique_ptr<void, decltype(free)>(pointer, free);
}

constexpr std::string_view toml = R"(
name = "two_calls"

[video]
frames = 6
tokens_per_frame = 20

[attention]
heads = 3
head_dim = 64

[masks.spatial]
density = 0.4

[masks.temporal]
half_width_frames = 1.5
)";

// Head 0 looks at its own frame, head 1 at the same place in all frames.
double planted(const framestride_spec_details &spec, size_t row, size_t head, size_t channel) {
  size_t frame = row / spec.tokens_per_frame, place = row % spec.tokens_per_frame;
  return 2 * wave((head == 0 ? frame : place) * spec.head_dim + channel, 7);
}

void run(bool gpu) {
  memory memory;
  REQUIRE(open_memory(&memory, gpu));
  Device device;
  check(gpu ? framestride_device_borrow(memory.context, device.fill()) : framestride_device_emulator(device.fill()));
  Spec spec;
  check(framestride_spec_parse(toml.data(), toml.size(), spec.fill()));
  framestride_spec_details details{};
  details.size = sizeof details;
  check(framestride_spec_info(spec.get(), &details));
  Module module;
  check(framestride_load(device.get(), spec.get(), module.fill()));
  Attention attention;
  check(framestride_attention_new(module.get(), 1, details.heads, attention.fill()));
  uint64_t workspace_bytes = 0;
  check(framestride_workspace_bytes(attention.get(), &workspace_bytes));

  // Q, K and V lie in one tensor, as a fused projection leaves them: [S, 3, H, D].
  const size_t rows = details.sequence, heads = details.heads, d = details.head_dim;
  std::vector<uint16_t> qkv(rows * 3 * heads * d), out(rows * heads * d);
  for (size_t i = 0; i < qkv.size(); i++) {
    size_t row = i / (3 * heads * d), part = i / (heads * d) % 3, head = i / d % heads;
    qkv[i] = to_bf16(part < 2 && head < 2 ? planted(details, row, head, i % d) : wave(i, 8));
  }
  auto qkv_memory = own(memory, upload(&memory, qkv.data(), 2 * qkv.size()));
  auto out_memory = own(memory, allocate(&memory, 2 * out.size()));
  auto lse_memory = own(memory, allocate(&memory, heads * rows * sizeof(float)));
  auto types_memory = own(memory, allocate(&memory, heads * sizeof(uint32_t)));
  auto workspace = own(memory, allocate(&memory, workspace_bytes));

  framestride_call call{};
  call.size = sizeof call;
  auto part = [&](size_t index) {
    void *data = static_cast<uint16_t *>(qkv_memory.get()) + index * heads * d;
    return framestride_tensor{data, 0, 3 * heads * d, d};
  };
  call.q = part(0);
  call.k = part(1);
  call.v = part(2);
  call.workspace = workspace.get();
  call.workspace_bytes = workspace_bytes;
  call.found_head_types = static_cast<uint32_t *>(types_memory.get());
  check(framestride_profile(attention.get(), &call, memory.stream));

  // The next call takes what the first one found. It has another scale, and gives the log-sum-exp.
  call.head_types_from = FRAMESTRIDE_HEAD_TYPES_GIVEN;
  call.head_types = call.found_head_types;
  call.found_head_types = nullptr;
  call.out = framestride_tensor{out_memory.get(), 0, heads * d, d};
  call.lse = static_cast<float *>(lse_memory.get());
  call.scale = 0.1f;
  check(framestride_forward(attention.get(), &call, memory.stream));

  std::vector<uint32_t> types(heads);
  std::vector<float> lse(heads * rows);
  download(&memory, types.data(), types_memory.get(), types.size() * sizeof types[0]);
  download(&memory, out.data(), out_memory.get(), out.size() * sizeof out[0]);
  download(&memory, lse.data(), lse_memory.get(), lse.size() * sizeof lse[0]);
  REQUIRE(types[0] == FRAMESTRIDE_HEAD_SPATIAL && types[1] == FRAMESTRIDE_HEAD_TEMPORAL);

  auto element = [&](size_t row, size_t part, size_t head) { return &qkv[((row * 3 + part) * heads + head) * d]; };
  auto position = [&](uint32_t type, size_t row) {
    size_t per_frame = details.tokens_per_frame;
    return type == FRAMESTRIDE_HEAD_TEMPORAL ? row % per_frame * details.frames + row / per_frame : row;
  };
  for (size_t head = 0; head < heads; head++) {
    bool temporal = types[head] == FRAMESTRIDE_HEAD_TEMPORAL;
    long half_width = temporal ? details.temporal_half_width : details.spatial_half_width;
    for (size_t row = 0; row < rows; row += 17) {
      std::vector<double> expected(d);
      double sum = 0;
      for (size_t key = 0; key < rows; key++) {
        long distance = static_cast<long>(position(types[head], row)) - static_cast<long>(position(types[head], key));
        if (std::labs(distance) >= half_width) continue;
        double product = 0;
        for (size_t i = 0; i < d; i++) {
          product += from_bf16(element(row, 0, head)[i]) * from_bf16(element(key, 1, head)[i]);
        }
        double weight = std::exp(0.1f * product);
        sum += weight;
        for (size_t i = 0; i < d; i++) expected[i] += weight * from_bf16(element(key, 2, head)[i]);
      }
      for (size_t i = 0; i < d; i++) {
        REQUIRE(std::fabs(from_bf16(out[(row * heads + head) * d + i]) - expected[i] / sum) < 0.02);
      }
      REQUIRE(std::fabs(lse[head * rows + row] - std::log(sum)) < 0.05);
    }
  }
  std::puts("a spatial and a temporal head were found, and every 17th row agrees with a plain computation");
  close_memory(&memory);
}

}  // namespace

int main(int count, char **arguments) {
  try {
    run(count > 1 && std::string_view(arguments[1]) == "gpu");
  } catch (const std::exception &error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
