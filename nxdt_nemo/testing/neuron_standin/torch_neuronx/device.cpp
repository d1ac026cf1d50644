// A PrivateUse1 device whose memory is the host's: what a device library registers with torch, and no more.
//
// Stands in for the C++ half of TorchNeuron. Every operation that is not below goes to the CPU by torch's own fallback,
// with copies there and back, so that a tensor of this device and one of the host never mix unnoticed. Random numbers
// are drawn from the device's own generator, which is a Mersenne twister as the CPU's: the same seed, the same numbers.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>

namespace {

constexpr auto kNeuron = c10::DeviceType::PrivateUse1;
const c10::Device kDevice(kNeuron, 0);  // a process has one, as with TorchNeuron's ranks

// NXDT_STANDIN_DEVICES=0 makes a host without a device.
c10::DeviceIndex devices() {
  const char* said = std::getenv("NXDT_STANDIN_DEVICES");
  return said == nullptr ? 1 : static_cast<c10::DeviceIndex>(std::atoi(said));
}

// --- memory ---

std::atomic<int64_t> held{0}, peak{0}, allocations{0};

struct Block {
  void* data;
  size_t bytes;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  held -= static_cast<int64_t>(block->bytes);
  c10::free_cpu(block->data);
  delete block;
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    TORCH_CHECK(devices() > 0, "no neuron device");
    allocations += 1;
    auto* block = new Block{c10::alloc_cpu(bytes), bytes};
    int64_t now = held += static_cast<int64_t>(bytes), before = peak;
    while (now > before && !peak.compare_exchange_weak(before, now)) {
    }
    return {block->data, block, &release, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return nullptr;
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

Memory memory;
REGISTER_ALLOCATOR(kNeuron, &memory);

// --- streams and devices: there is one of each, and work is done when it returns ---

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override {
    return kNeuron;
  }
  c10::Device exchangeDevice(c10::Device) const override {
    return kDevice;
  }
  c10::Device getDevice() const override {
    return kDevice;
  }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return getStream(device);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return stream;
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return devices();
  }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override {
    return true;
  }
  bool queryStream(const c10::Stream&) const override {
    return true;
  }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// --- random numbers ---

struct Generator final : c10::GeneratorImpl {
  explicit Generator(at::Generator host) : GeneratorImpl(kDevice, c10::DispatchKeySet(kKey)), host_(std::move(host)) {}

  void set_current_seed(uint64_t seed) override {
    host_.set_current_seed(seed);
  }
  void set_offset(uint64_t offset) override {
    host_.set_offset(offset);
  }
  uint64_t get_offset() const override {
    return host_.get_offset();
  }
  uint64_t current_seed() const override {
    return host_.current_seed();
  }
  uint64_t seed() override {
    return host_.seed();
  }
  void set_state(const c10::TensorImpl& state) override {
    host_.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return host_.unsafeGetGeneratorImpl()->get_state();
  }
  at::Generator host_;

 private:
  static constexpr auto kKey = c10::DispatchKey::PrivateUse1;
  Generator* clone_impl() const override {
    return new Generator(host_.clone());
  }
};

at::Generator made() {
  return at::make_generator<Generator>(at::detail::createCPUGenerator());
}

const at::Generator& default_generator() {
  static at::Generator generator = made();
  return generator;
}

// While this lives, the CPU's default generator goes on where the device's is; afterwards each has its own again.
struct Lent {
  Lent() : cpu_(at::detail::getDefaultCPUGenerator()), own_(cpu_.get_state()), lent_(hosts_(default_generator())) {
    cpu_.set_state(lent_.get_state());
  }
  ~Lent() {
    lent_.set_state(cpu_.get_state());
    cpu_.set_state(own_);
  }
  static at::Generator hosts_(const at::Generator& generator) {
    return static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->host_;
  }

 private:
  at::Generator cpu_;
  at::Tensor own_;
  at::Generator lent_;
};

// --- what torch asks a device library ---

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return devices() > 0;
  }
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return true;
  }
  c10::DeviceIndex deviceCount() const override {
    return devices();
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return 0;
  }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override {
    return 0;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override {
    return 0;
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return default_generator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return made();
  }
  at::Allocator* getPinnedMemoryAllocator() const override {
    return c10::GetAllocator(c10::DeviceType::CPU);
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    c10::DataPtr larger = memory.allocate(bytes);
    std::memcpy(larger.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.set_data_ptr_noswap(std::move(larger));
    storage.set_nbytes(bytes);
  }
};

// --- operations ---

// The same bytes as a tensor of the host's; a tensor of the host's as it is.
at::Tensor on_host(const at::Tensor& x) {
  if (x.device().type() != kNeuron) {
    return x;
  }
  auto* start = static_cast<char*>(x.storage().mutable_data());
  auto options = x.options().device(c10::kCPU);
  if (start == nullptr) {
    return at::empty_strided(x.sizes(), x.strides(), options);
  }
  return at::from_blob(start + x.storage_offset() * x.element_size(), x.sizes(), x.strides(), options);
}

at::Tensor empty(
    c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>, std::optional<c10::Device>,
    std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(
      size, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
    std::optional<c10::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& target, bool) {
  on_host(target).copy_(on_host(self));
  return target;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& target) {
  target.resize_(self.sizes());
  return copy_from(self, target, false);
}

at::Scalar local_scalar_dense(const at::Tensor& self) {
  return at::_local_scalar_dense(on_host(self));
}

void hold(const c10::Storage& storage, const at::Tensor& self) {
  size_t bytes = (self.storage_offset() + self.numel()) * self.element_size();
  if (bytes > storage.nbytes()) {
    at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(storage, bytes);
  }
}

const at::Tensor& resize_(const at::Tensor& self, c10::IntArrayRef size, std::optional<c10::MemoryFormat> format) {
  if (self.sizes() != size) {  // else strides stay: a view is resized in place where an operation writes to it
    self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
    hold(self.storage(), self);
  }
  if (format.has_value()) {
    self.unsafeGetTensorImpl()->empty_tensor_restride(*format);
  }
  return self;
}

at::Tensor& set_storage(
    at::Tensor& self, c10::Storage storage, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  if (stride.data() == nullptr) {
    self.unsafeGetTensorImpl()->set_storage_offset(offset);
    self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  } else {
    self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  }
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, c10::Storage storage) {
  int64_t numbers = static_cast<int64_t>(storage.nbytes() / self.element_size());
  return set_storage(self, std::move(storage), 0, {numbers}, {});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  if (!op.hasTag(at::Tag::nondeterministic_seeded)) {
    return at::native::cpu_fallback(op, stack);
  }
  for (auto& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (value.isGenerator() && value.toGenerator().device().type() == kNeuron) {
      const auto& asked = value.toGenerator();
      if (asked == default_generator()) {
        const_cast<c10::IValue&>(value) = c10::IValue();
      } else {
        const_cast<c10::IValue&>(value) = Lent::hosts_(asked);
      }
    }
  }
  Lent lent;
  at::native::cpu_fallback(op, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar_dense);
  m.impl("resize_", &resize_);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("alias", &at::native::alias);
  m.impl("unfold", &at::native::unfold);
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

#define LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FLOAT(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  LOWER(matmul)
  LOWER(linear)
  LOWER(mm)
  LOWER(bmm)
  LOWER(addmm)
  LOWER(baddbmm)
  LOWER(scaled_dot_product_attention)
  FLOAT(nll_loss)
  FLOAT(layer_norm)
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  m.def("device_count", [] { return static_cast<int>(devices()); });
  m.def("default_generator", [] { return default_generator(); });
  m.def("allocations", [] { return allocations.load(); });
  m.def("memory_allocated", [] { return held.load(); });
  m.def("max_memory_allocated", [] { return peak.load(); });
  m.def("reset_peak_memory_stats", [] { peak = held.load(); });
}
